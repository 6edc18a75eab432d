#include "isa.hpp"

#include <stdexcept>

#if defined(WB_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace wb {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512bf16: return "avx512bf16";
    case Isa::amx: return "amx";
  }
  return "?";
}

#if defined(WB_AMX)
namespace {

// Linux saves the tiles of those processes alone that have asked for it; it refuses where it cannot.
bool may_use_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned tile = 1u << 24, int8 = 1u << 25;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & tile) == 0 || (d & int8) == 0) return false;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

}  // namespace
#endif

std::vector<Isa> available_isas() {
  std::vector<Isa> found{Isa::portable};
#if defined(WB_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#if defined(WB_AVX512)
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
#endif
  if (avx2) found.push_back(Isa::avx2);
#if defined(WB_AVX512)
  if (avx512) found.push_back(Isa::avx512);
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni"))
    found.push_back(Isa::avx512bf16);
#if defined(WB_AMX)
  static const bool tiles = may_use_tiles();
  if (found.back() == Isa::avx512bf16 && tiles) found.push_back(Isa::amx);
#endif
#endif
#endif
  return found;
}

Isa choose_isa(const std::string& name) {
  const auto found = available_isas();
  if (name.empty() || name == "auto") return found.back();
  std::string known;
  for (const Isa isa : found) {
    if (name == isa_name(isa)) return isa;
    known += (known.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::invalid_argument("The instruction set '" + name + "' cannot be used on this machine: choose " + known + ".");
}

}  // namespace wb
