#include "plan.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace wb {

namespace {

// How far a score gets in the thresholds, as one of the levels' values.
class LevelsProgram : public Program {
 public:
  explicit LevelsProgram(Levels levels) : levels_(std::move(levels)) {
    if (levels_.values.size() != levels_.thresholds.size() + 1) throw std::invalid_argument("Levels have one value more than thresholds.");
    check(levels_.thresholds);
  }
  int size() const override { return 1; }
  float value(const Kernels& k, const float* tap, int width, int position) const override {
    const auto& cuts = levels_.thresholds;
    std::size_t level = cuts.size();
    if (position >= levels_.first) {
      const float score = this->score(k, tap, width);
      level = static_cast<std::size_t>(std::lower_bound(cuts.begin(), cuts.end(), score) - cuts.begin());
    }
    return levels_.values[level];
  }
  void set_thresholds(std::vector<float> thresholds) override {
    if (thresholds.size() != levels_.thresholds.size()) throw std::invalid_argument("A decision has " + std::to_string(levels_.thresholds.size()) + " thresholds.");
    check(thresholds);
    levels_.thresholds = std::move(thresholds);
  }

 protected:
  virtual float score(const Kernels& k, const float* tap, int width) const = 0;

 private:
  static void check(const std::vector<float>& thresholds) {
    if (!std::is_sorted(thresholds.begin(), thresholds.end())) throw std::invalid_argument("Thresholds of levels must ascend.");
  }
  Levels levels_;
};

// Rows of int8 codes, each with its step.
class Int8Rows {
 public:
  Int8Rows(const std::vector<float>& matrix, std::vector<float> steps) : steps_(std::move(steps)) {
    const std::size_t rows = steps_.size();
    if (rows == 0 || matrix.empty() || matrix.size() % rows != 0) throw std::invalid_argument("A projection needs one step per row of its matrix.");
    width_ = static_cast<int>(matrix.size() / rows);
    stride_ = round_up(static_cast<std::size_t>(width_), 16);
    codes_ = Array<std::int8_t>(rows * stride_);
    for (std::size_t r = 0; r < rows; ++r)
      for (int c = 0; c < width_; ++c) {
        const float value = matrix[r * static_cast<std::size_t>(width_) + static_cast<std::size_t>(c)];
        if (!(value >= -127 && value <= 127) || value != std::round(value)) throw std::invalid_argument("A projection's matrix is int8.");
        codes_[r * stride_ + static_cast<std::size_t>(c)] = static_cast<std::int8_t>(value);
      }
  }
  std::size_t rows() const { return steps_.size(); }
  double dot(const Kernels& k, std::size_t r, const float* x, int n) const {
    return static_cast<double>(steps_[r]) * static_cast<double>(k.dot_i8(codes_.data() + r * stride_, x, std::min(n, width_)));
  }

 private:
  Array<std::int8_t> codes_;
  std::vector<float> steps_;
  int width_ = 0;
  std::size_t stride_ = 0;
};

class NormLevels final : public LevelsProgram {
 public:
  using LevelsProgram::LevelsProgram;

 protected:
  float score(const Kernels& k, const float* tap, int width) const override { return std::sqrt(k.squares(tap, width)); }
};

class ProjectionLevels final : public LevelsProgram {
 public:
  ProjectionLevels(const std::vector<float>& matrix, std::vector<float> steps, Levels levels)
      : LevelsProgram(std::move(levels)), rows_(matrix, std::move(steps)) {}

 protected:
  float score(const Kernels& k, const float* tap, int width) const override {
    double squares = 0;
    for (std::size_t r = 0; r < rows_.rows(); ++r) {
      const double part = rows_.dot(k, r, tap, width);
      squares += part * part;
    }
    return static_cast<float>(std::sqrt(squares));
  }

 private:
  Int8Rows rows_;
};

class LinearLevels final : public LevelsProgram {
 public:
  LinearLevels(std::vector<float> weights, float bias, bool rms, Levels levels)
      : LevelsProgram(std::move(levels)), weights_(std::move(weights)), bias_(bias), rms_(rms) {
    if (weights_.empty()) throw std::invalid_argument("A linear score needs weights.");
  }

 protected:
  float score(const Kernels& k, const float* tap, int width) const override {
    const int n = std::min(width, static_cast<int>(weights_.size()));
    double sum = 0;
    for (int i = 0; i < n; ++i) sum += static_cast<double>(weights_[static_cast<std::size_t>(i)]) * static_cast<double>(tap[i]);
    if (rms_) sum /= std::sqrt(static_cast<double>(k.squares(tap, n)) / n + 1e-12);
    return static_cast<float>(sum) + bias_;
  }

 private:
  std::vector<float> weights_;
  float bias_;
  bool rms_;
};

class ProjectionMask final : public Program {
 public:
  ProjectionMask(std::vector<float> matrix, int size, int width, int keep)
      : matrix_(std::move(matrix)), size_(size), width_(width), keep_(std::clamp(keep, 0, size)) {
    if (size < 1 || matrix_.size() != static_cast<std::size_t>(size) * static_cast<std::size_t>(width))
      throw std::invalid_argument("A projection's matrix must have one row per entry of its mask.");
  }
  int size() const override { return size_; }
  bool is_mask() const override { return true; }
  Mask mask(const Kernels&, const float* tap, int width, int) const override {
    std::vector<double> scores(static_cast<std::size_t>(size_));
    for (int i = 0; i < size_; ++i) {
      const float* row = matrix_.data() + static_cast<std::size_t>(i) * width_;
      double total = 0;
      for (int c = 0; c < std::min(width, width_); ++c) total += static_cast<double>(row[c]) * static_cast<double>(tap[c]);
      scores[static_cast<std::size_t>(i)] = total == total ? total : -std::numeric_limits<double>::infinity();  // NaN has no order
    }
    std::vector<int> order(static_cast<std::size_t>(size_));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return scores[a] > scores[b]; });
    auto made = std::make_shared<std::vector<std::uint8_t>>(static_cast<std::size_t>(size_));
    for (int i = 0; i < keep_; ++i) (*made)[static_cast<std::size_t>(order[static_cast<std::size_t>(i)])] = 1;
    return made;
  }

 private:
  std::vector<float> matrix_;
  int size_, width_, keep_;
};

class PositionTable final : public Program {
 public:
  PositionTable(std::vector<int> positions, std::vector<float> values)
      : positions_(std::move(positions)), values_(std::move(values)) {
    if (positions_.empty() || positions_.front() != 0 || positions_.size() != values_.size() ||
        !std::is_sorted(positions_.begin(), positions_.end()))
      throw std::invalid_argument("A table needs ascending positions from 0, with one value each.");
  }
  int size() const override { return 1; }
  bool reads_tap() const override { return false; }
  float value(const Kernels&, const float*, int, int position) const override {
    const auto after = std::upper_bound(positions_.begin(), positions_.end(), position);
    return values_[static_cast<std::size_t>(after - positions_.begin()) - 1];
  }

 private:
  std::vector<int> positions_;
  std::vector<float> values_;
};

class Threshold final : public Program {
 public:
  Threshold(float value, int first) : value_(value), first_(first) { check(); }
  int size() const override { return 1; }
  bool reads_tap() const override { return false; }
  float value(const Kernels&, const float*, int, int position) const override { return position < first_ ? 0.0f : value_; }
  void set_thresholds(std::vector<float> thresholds) override {
    if (thresholds.size() != 1) throw std::invalid_argument("This decision has 1 threshold.");
    value_ = thresholds[0];
    check();
  }

 private:
  void check() const {
    if (!(value_ >= 0)) throw std::invalid_argument("A threshold of inputs is at least 0.");
  }
  float value_;
  int first_;
};

class ConstantMask final : public Program {
 public:
  ConstantMask(std::vector<std::uint8_t> values, int first) : first_(first) {
    if (values.empty() || std::any_of(values.begin(), values.end(), [](std::uint8_t v) { return v > 1; }))
      throw std::invalid_argument("A mask is made of zeros and ones.");
    whole_ = std::make_shared<const std::vector<std::uint8_t>>(values.size(), std::uint8_t{1});
    values_ = std::make_shared<const std::vector<std::uint8_t>>(std::move(values));
  }
  int size() const override { return static_cast<int>(values_->size()); }
  bool is_mask() const override { return true; }
  bool reads_tap() const override { return false; }
  Mask mask(const Kernels&, const float*, int, int position) const override { return position < first_ ? whole_ : values_; }

 private:
  Mask values_, whole_;
  int first_;
};

}  // namespace

float Program::value(const Kernels&, const float*, int, int) const { throw std::logic_error("This decision gives a mask."); }

Mask Program::mask(const Kernels&, const float*, int, int) const { throw std::logic_error("This decision gives a number."); }

std::unique_ptr<Program> threshold(float value, int first) { return std::make_unique<Threshold>(value, first); }

std::unique_ptr<Program> constant_mask(std::vector<std::uint8_t> values, int first) {
  return std::make_unique<ConstantMask>(std::move(values), first);
}

void Program::set_thresholds(std::vector<float>) { throw std::invalid_argument("This decision has no thresholds."); }

std::unique_ptr<Program> norm_levels(Levels levels) {
  return std::make_unique<NormLevels>(std::move(levels));
}

std::unique_ptr<Program> projection_levels(const std::vector<float>& matrix, std::vector<float> steps, Levels levels) {
  return std::make_unique<ProjectionLevels>(matrix, std::move(steps), std::move(levels));
}

std::unique_ptr<Program> linear_levels(std::vector<float> weights, float bias, bool rms, Levels levels) {
  return std::make_unique<LinearLevels>(std::move(weights), bias, rms, std::move(levels));
}

std::unique_ptr<Program> projection_mask(std::vector<float> matrix, int size, int width, int keep) {
  return std::make_unique<ProjectionMask>(std::move(matrix), size, width, keep);
}

std::unique_ptr<Program> position_table(std::vector<int> positions, std::vector<float> values) {
  return std::make_unique<PositionTable>(std::move(positions), std::move(values));
}

}  // namespace wb
