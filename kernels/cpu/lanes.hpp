// What all kernels share that are written over sixteen lanes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels.hpp"

// Loops over the rows of a block: their sums must stay in registers, which needs the loops gone. Only where there are
// registers for them: elsewhere it would cost minutes of compiling for nothing.
#if defined(__GNUC__) && defined(__AVX512F__)
#define WB_UNROLL _Pragma("GCC unroll 16")
#else
#define WB_UNROLL
#endif
