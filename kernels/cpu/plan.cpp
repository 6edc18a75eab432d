#include "plan.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace wb {

namespace {

class NormThreshold final : public Program {
 public:
  NormThreshold(float threshold, float low, float high) : threshold_(threshold), low_(low), high_(high) {}
  int size() const override { return 1; }
  void run(const Kernels&, const float* tap, int width, int, float* to) const override {
    double squares = 0;
    for (int i = 0; i < width; ++i) squares += static_cast<double>(tap[i]) * static_cast<double>(tap[i]);
    *to = std::sqrt(squares) > static_cast<double>(threshold_) ? high_ : low_;
  }

 private:
  float threshold_, low_, high_;
};

class ProjectionThreshold final : public Program {
 public:
  ProjectionThreshold(const std::vector<float>& matrix, std::vector<float> scales, float threshold, float low, float high)
      : scales_(std::move(scales)), threshold_(threshold), low_(low), high_(high) {
    const std::size_t rows = scales_.size();
    if (rows == 0 || matrix.empty() || matrix.size() % rows != 0) throw std::invalid_argument("A projection needs one scale per row of its matrix.");
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
  int size() const override { return 1; }
  void run(const Kernels& k, const float* tap, int width, int, float* to) const override {
    double squares = 0;
    for (std::size_t r = 0; r < scales_.size(); ++r) {
      const double part = static_cast<double>(scales_[r]) * static_cast<double>(k.dot_i8(codes_.data() + r * stride_, tap, std::min(width, width_)));
      squares += part * part;
    }
    *to = std::sqrt(squares) > static_cast<double>(threshold_) ? high_ : low_;
  }

 private:
  Array<std::int8_t> codes_;
  std::vector<float> scales_;
  float threshold_, low_, high_;
  int width_ = 0;
  std::size_t stride_ = 0;
};

class LinearLevels final : public Program {
 public:
  LinearLevels(std::vector<float> weights, float bias, bool rms, std::vector<float> thresholds)
      : weights_(std::move(weights)), bias_(bias), rms_(rms), thresholds_(std::move(thresholds)) {
    if (weights_.empty() || !std::is_sorted(thresholds_.begin(), thresholds_.end()))
      throw std::invalid_argument("Levels need weights, and thresholds that ascend.");
  }
  int size() const override { return 1; }
  void run(const Kernels&, const float* tap, int width, int, float* to) const override {
    const int n = std::min(width, static_cast<int>(weights_.size()));
    double sum = 0, squares = 0;
    for (int i = 0; i < n; ++i) {
      sum += static_cast<double>(weights_[static_cast<std::size_t>(i)]) * static_cast<double>(tap[i]);
      squares += static_cast<double>(tap[i]) * static_cast<double>(tap[i]);
    }
    if (rms_) sum /= std::sqrt(squares / n + 1e-12);
    const float score = static_cast<float>(sum) + bias_;
    *to = static_cast<float>(std::lower_bound(thresholds_.begin(), thresholds_.end(), score) - thresholds_.begin());
  }

 private:
  std::vector<float> weights_;
  float bias_;
  bool rms_;
  std::vector<float> thresholds_;
};

class ProjectionMask final : public Program {
 public:
  ProjectionMask(std::vector<float> matrix, int size, int width, int keep)
      : matrix_(std::move(matrix)), size_(size), width_(width), keep_(std::clamp(keep, 0, size)) {
    if (size < 1 || matrix_.size() != static_cast<std::size_t>(size) * static_cast<std::size_t>(width))
      throw std::invalid_argument("A projection's matrix must have one row per entry of its mask.");
  }
  int size() const override { return size_; }
  void run(const Kernels&, const float* tap, int width, int, float* to) const override {
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
    std::fill(to, to + size_, 0.0f);
    for (int i = 0; i < keep_; ++i) to[order[static_cast<std::size_t>(i)]] = 1.0f;
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
  void run(const Kernels&, const float*, int, int position, float* to) const override {
    const auto after = std::upper_bound(positions_.begin(), positions_.end(), position);
    *to = values_[static_cast<std::size_t>(after - positions_.begin()) - 1];
  }

 private:
  std::vector<int> positions_;
  std::vector<float> values_;
};

}  // namespace

std::unique_ptr<Program> norm_threshold(float threshold, float low, float high) {
  return std::make_unique<NormThreshold>(threshold, low, high);
}

std::unique_ptr<Program> projection_threshold(const std::vector<float>& matrix, std::vector<float> scales, float threshold, float low, float high) {
  return std::make_unique<ProjectionThreshold>(matrix, std::move(scales), threshold, low, high);
}

std::unique_ptr<Program> linear_levels(std::vector<float> weights, float bias, bool rms, std::vector<float> thresholds) {
  return std::make_unique<LinearLevels>(std::move(weights), bias, rms, std::move(thresholds));
}

std::unique_ptr<Program> projection_mask(std::vector<float> matrix, int size, int width, int keep) {
  return std::make_unique<ProjectionMask>(std::move(matrix), size, width, keep);
}

std::unique_ptr<Program> position_table(std::vector<int> positions, std::vector<float> values) {
  return std::make_unique<PositionTable>(std::move(positions), std::move(values));
}

}  // namespace wb
