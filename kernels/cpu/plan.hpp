// Decisions inside a step: deciders read a tap and write a slot, consumers read slots. The same plan as the engine's
// Python side describes. A slot holds a float, or a mask: a byte per entry, 1 = computed, shared by all that hold it.
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

using Mask = std::shared_ptr<const std::vector<std::uint8_t>>;
class Predictor;

// A small causal function of one row of a tap and its position, giving a value or a mask of `size` entries.
class Program {
 public:
  virtual ~Program() = default;
  virtual int size() const = 0;
  virtual bool is_mask() const { return false; }
  virtual bool reads_tap() const { return true; }  // else the position says it all
  virtual float value(const Kernels& k, const float* tap, int width, int position) const;
  virtual Mask mask(const Kernels& k, const float* tap, int width, int position) const;
  virtual const Predictor* predictor() const { return nullptr; }  // whose work threads share
  // As many as before, and as the program takes them; in force from the next run on.
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
// The threshold whatever the tap; 0 at the `first` positions.
std::unique_ptr<Program> threshold(float value, int first);
// The values (0 and 1) whatever the tap; ones at the `first` positions.
std::unique_ptr<Program> constant_mask(std::vector<std::uint8_t> values, int first);
// The value of the last entry whose position is not after the row's.
std::unique_ptr<Program> position_table(std::vector<int> positions, std::vector<float> values);

struct Decider {
  TapKind tap;
  int block;
  ScopeKind scope;
  int every;
  float initial;
  std::unique_ptr<Program> program;
  double bytes = 0;  // that a decision reads; of one that a decoder has, a step's share of it
  int place = 0;     // among the values of a row, or among its masks
};

// What one sequence remembers of its decisions. Values by a decider's place, likewise masks.
struct Held {
  std::vector<float> values;
  std::vector<Mask> masks;
  std::vector<std::uint8_t> made;   // per decider: whether it has decided
  std::vector<float> fixed;         // what replaces decisions
  std::vector<Mask> fixed_masks;
  std::vector<std::uint8_t> is_fixed;
  std::vector<float> replay;        // recorded values, a row per position; empty for none
  std::vector<Mask> replay_masks;
  int replay_rows = 0;
};

}  // namespace wb
