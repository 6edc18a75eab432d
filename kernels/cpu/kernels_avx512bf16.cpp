#include "kernels_impl.hpp"
#include "vec_avx512.hpp"

namespace wb {
extern constinit const Kernels kAvx512Bf16 = make_kernels<Avx512Bf16>(Isa::avx512bf16);
}
