#include "kernels.hpp"

namespace wb {

extern const Kernels kPortable;
#if defined(WB_X86)
extern const Kernels kAvx2;
#endif
#if defined(WB_AVX512)
extern const Kernels kAvx512;
extern const Kernels kAvx512Bf16;
#endif
#if defined(WB_AMX)
Kernels with_tiles(Kernels k);
#endif

const Kernels& kernels(Isa isa) {
#if defined(WB_X86)
  if (isa == Isa::avx2) return kAvx2;
#endif
#if defined(WB_AVX512)
  if (isa == Isa::avx512) return kAvx512;
  if (isa == Isa::avx512bf16) return kAvx512Bf16;
#endif
#if defined(WB_AMX)
  if (isa == Isa::amx) {
    static const Kernels amx = with_tiles(kAvx512Bf16);
    return amx;
  }
#endif
  (void)isa;
  return kPortable;
}

}  // namespace wb
