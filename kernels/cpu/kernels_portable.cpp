#include "kernels_impl.hpp"
#include "vec_portable.hpp"

namespace wb {
extern constinit const Kernels kPortable = make_kernels<Portable>(Isa::portable);
}
