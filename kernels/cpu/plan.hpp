// Decisions inside a step: deciders read a tap and write a slot, consumers read slots. The same plan as the engine's
// Python side describes; every value is a float, masks are one float per entry.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "memory.hpp"

namespace wb {

enum class TapKind : std::uint8_t { residual, block_input, attention_output, mlp_input, mlp_inner };
inline constexpr int kTaps = 5;
enum class ScopeKind : std::uint8_t { reply, every, token };

// A small causal function of one row of a tap and its position, writing `size` values.
class Program {
 public:
  virtual ~Program() = default;
  virtual int size() const = 0;
  virtual void run(const Kernels& k, const float* tap, int width, int position, float* to) const = 0;
};

// `high` where the Euclidean norm exceeds `threshold`, else `low`.
std::unique_ptr<Program> norm_threshold(float threshold, float low, float high);
// 1 for the `keep` largest entries of matrix (size, width) times the tap, else 0; ties go to the lower index.
std::unique_ptr<Program> projection_mask(std::vector<float> matrix, int size, int width, int keep);
// `high` where the norm of scale * matrix (rows, width) times the tap exceeds `threshold`, else `low`.
std::unique_ptr<Program> projection_threshold(const std::vector<float>& matrix, std::vector<float> scales, float threshold, float low, float high);
// How many of the ascending thresholds weights * tap + bias exceeds; `rms`: of the tap over its root mean square.
std::unique_ptr<Program> linear_levels(std::vector<float> weights, float bias, bool rms, std::vector<float> thresholds);
// The value of the last entry whose position is not after the row's.
std::unique_ptr<Program> position_table(std::vector<int> positions, std::vector<float> values);

struct Decider {
  TapKind tap;
  int block;
  ScopeKind scope;
  int every;
  float initial;
  std::unique_ptr<Program> program;
  double bytes = 0;  // that a decision reads
  int first = 0;  // place of its values in a row of slot values
};

// What one sequence remembers of its decisions.
struct Held {
  std::vector<float> values;        // a row of slot values
  std::vector<std::uint8_t> made;   // per decider: whether it has decided
  std::vector<float> fixed;         // a row of slot values that replace decisions
  std::vector<std::uint8_t> is_fixed;
  std::vector<float> replay;        // rows of recorded values per position; empty for none
  int replay_rows = 0;
};

}  // namespace wb
