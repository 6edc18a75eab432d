#include "isa.hpp"

#include <stdexcept>

namespace wb {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512bf16: return "avx512bf16";
  }
  return "?";
}

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
