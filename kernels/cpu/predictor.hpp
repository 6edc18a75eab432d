// A mask of many units predicted from one tap: two matrices of int8 codes, whose products all threads share.
//
//   h = relu(hidden_steps * (hidden x) + hidden_bias),  x = tap / its root mean square
//   score = mean + row_steps * (rows h'),  mask = score > threshold of the unit's group
//
// where h' is h rounded to multiples of a 127th of its highest (`formats/mask_scores.py` defines it), so that sums are exact
// integers. A group keeps at least its floor of units, those of the highest scores, ties to the lower index: where fewer are
// above the threshold its scores are computed again, as no scores go through memory.
#pragma once

#include "plan.hpp"

namespace wb {

struct PredictorSource {
  int width = 0, hidden_units = 0, size = 0;
  const std::int8_t* hidden = nullptr;  // (hidden_units, width)
  const float* hidden_steps = nullptr;
  const float* hidden_bias = nullptr;
  const std::int8_t* rows = nullptr;    // (size, hidden_units)
  const float* row_steps = nullptr;
  const float* mean = nullptr;
  std::vector<int> groups;              // ascending from 0 to size
  std::vector<float> thresholds;        // one per group
  std::vector<int> floors;
  int first = 0;                        // positions before it are not masked
};

class Predictor final : public Program {
 public:
  static constexpr int kTogether = 8;  // rows of tokens that are decided together

  // What is between the tap and the mask, of up to kTogether rows.
  struct Space {
    Array<float> x, raw, x_sum;
    Array<std::uint8_t> x_active;
    Array<std::int32_t> units;
    Array<std::int8_t> q;
    std::vector<Activation> of_x;
    std::vector<float*> to_raw;
    std::vector<ActiveUnits> active;
  };

  explicit Predictor(const PredictorSource& source);
  int size() const override { return scores_.out; }
  bool is_mask() const override { return true; }
  const Predictor* predictor() const override { return this; }
  Mask mask(const Kernels& k, const float* tap, int width, int position) const override;
  void set_thresholds(std::vector<float> thresholds) override;

  int first() const { return first_; }
  const Mask& whole() const { return whole_; }  // of the first positions
  int groups() const { return static_cast<int>(floors_.size()); }
  int hidden_tiles() const { return hidden_.tiles; }
  int granules() const { return scores_.granules; }
  void reserve(Space& space) const;

  // In this order, each for all rows and parts before the next.
  void read(const Kernels& k, Space& space, int row, const float* tap) const;
  void hidden(const Kernels& k, Space& space, int n, int first_tile, int last_tile) const;
  void activate(Space& space, int row) const;
  void cut(const Kernels& k, const Space& space, int n, int first_granule, int last_granule, std::uint8_t* const* to) const;
  void fill(const Kernels& k, const Space& space, int row, int group, std::uint8_t* to) const;

 private:
  Arena arena_;
  ScoreMatrix scores_;
  Matrix hidden_;
  std::vector<int> groups_, floors_;
  std::vector<float> thresholds_;
  int first_;
  Mask whole_;
};

}  // namespace wb
