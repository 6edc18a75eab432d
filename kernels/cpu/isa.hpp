// Which instructions this processor has, and which of the compiled paths runs.
#pragma once

#include <string>
#include <vector>

namespace wb {

enum class Isa { portable, avx2, avx512, avx512bf16, amx };

const char* isa_name(Isa isa);

// Paths that were compiled and that this processor can run, slowest first; never empty.
std::vector<Isa> available_isas();

// The fastest available path, or the named one. Throws std::invalid_argument for a path that cannot run here.
Isa choose_isa(const std::string& name);

}  // namespace wb
