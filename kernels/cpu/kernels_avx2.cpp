#include "kernels_impl.hpp"
#include "vec_avx2.hpp"

namespace wb {
extern constinit const Kernels kAvx2 = make_kernels<Avx2>(Isa::avx2);
}
