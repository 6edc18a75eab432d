// Decisions inside a step: deciders read a tap and write a slot, consumers read slots. The same plan as the engine's
// Python side describes; every value is a float, masks are one float per entry.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace wb {

enum class TapKind : std::uint8_t { residual, block_input, attention_output };
enum class ScopeKind : std::uint8_t { reply, every, token };

// A small causal function of one row of a tap and its position, writing `size` values.
class Program {
 public:
  virtual ~Program() = default;
  virtual int size() const = 0;
  virtual void run(const float* tap, int width, int position, float* to) const = 0;
};

// `high` where the Euclidean norm exceeds `threshold`, else `low`.
std::unique_ptr<Program> norm_threshold(float threshold, float low, float high);
// 1 for the `keep` largest entries of matrix (size, width) times the tap, else 0; ties go to the lower index.
std::unique_ptr<Program> projection_mask(std::vector<float> matrix, int size, int width, int keep);
// The value of the last entry whose position is not after the row's.
std::unique_ptr<Program> position_table(std::vector<int> positions, std::vector<float> values);

struct Decider {
  TapKind tap;
  int block;
  ScopeKind scope;
  int every;
  float initial;
  std::unique_ptr<Program> program;
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
