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
  // As many as before, ascending; in force from the next run on.
  virtual void set_thresholds(std::vector<float> thresholds);
};

// A score becomes a value: values[n] where n of the ascending thresholds lie below it. At the `first` positions of a
// sequence the last value, whatever the score.
struct Levels {
  std::vector<float> thresholds, values;
  int first = 0;
};

// Levels of the Euclidean norm.
std::unique_ptr<Program> norm_levels(Levels levels);
// 1 for the `keep` largest entries of matrix (size, width) times the tap, else 0; ties go to the lower index.
std::unique_ptr<Program> projection_mask(std::vector<float> matrix, int size, int width, int keep);
// Levels of the norm of steps * matrix (rows, width; int8) times the tap.
std::unique_ptr<Program> projection_levels(const std::vector<float>& matrix, std::vector<float> steps, Levels levels);
// Levels of weights * tap + bias; `rms`: of the tap over its root mean square.
std::unique_ptr<Program> linear_levels(std::vector<float> weights, float bias, bool rms, Levels levels);
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
