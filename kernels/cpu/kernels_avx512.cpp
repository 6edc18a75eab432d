#include "kernels_impl.hpp"
#include "vec_avx512.hpp"

namespace wb {
extern constinit const Kernels kAvx512 = make_kernels<Avx512>(Isa::avx512);
}
