#include "predictor.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace wb {

namespace {

// Signed codes with a step and an addend per row, as a matrix of 8-bit codes around 128 in one group.
Matrix of_int8(Arena& arena, int out, int in, const std::int8_t* codes, const float* steps, const float* addend) {
  std::vector<std::uint8_t> shifted(static_cast<std::size_t>(out) * static_cast<std::size_t>(in));
  for (std::size_t i = 0; i < shifted.size(); ++i) shifted[i] = static_cast<std::uint8_t>(codes[i] + 128);
  GroupSource source;
  source.codes = shifted.data();
  source.scales32 = steps;
  source.bits = 8;
  source.group = in;
  Matrix m = make_groups(arena, out, in, source);
  auto* bias = arena.take<float>(static_cast<std::size_t>(m.tiles) * kRows);
  std::copy(addend, addend + out, bias);
  m.bias = bias;
  return m;
}

}  // namespace

Predictor::Predictor(const PredictorSource& source)
    : groups_(source.groups), floors_(source.floors), thresholds_(source.thresholds), first_(source.first) {
  if (source.width < 1 || source.hidden_units < 1 || source.size < 1) throw std::invalid_argument("A predictor needs inputs, hidden units and outputs.");
  if (groups_.size() < 2 || groups_.front() != 0 || groups_.back() != source.size || floors_.size() + 1 != groups_.size() ||
      std::adjacent_find(groups_.begin(), groups_.end(), std::greater_equal<>()) != groups_.end())
    throw std::invalid_argument("Groups of a predictor must ascend from 0 to its size, with one floor each.");
  for (std::size_t g = 0; g < floors_.size(); ++g)
    if (floors_[g] < 0 || floors_[g] > groups_[g + 1] - groups_[g]) throw std::invalid_argument("A floor is more than its group has units.");
  set_thresholds(source.thresholds);
  hidden_ = of_int8(arena_, source.hidden_units, source.width, source.hidden, source.hidden_steps, source.hidden_bias);
  rows_ = of_int8(arena_, source.size, source.hidden_units, source.rows, source.row_steps, source.mean);
  whole_ = std::make_shared<const std::vector<std::uint8_t>>(static_cast<std::size_t>(source.size), std::uint8_t{1});
}

void Predictor::set_thresholds(std::vector<float> thresholds) {
  if (thresholds.size() != floors_.size()) throw std::invalid_argument("This decision has " + std::to_string(floors_.size()) + " thresholds.");
  for (const float t : thresholds)
    if (std::isnan(t)) throw std::invalid_argument("A threshold is NaN.");
  thresholds_ = std::move(thresholds);
}

void Predictor::reserve(Space& space) const {
  const auto grow = [](auto& array, std::size_t n) {
    if (array.size() < n * kTogether) array = std::decay_t<decltype(array)>(n * kTogether);
  };
  grow(space.x, static_cast<std::size_t>(hidden_.grouping.padded));
  grow(space.x_sum, static_cast<std::size_t>(hidden_.grouping.n_groups));
  grow(space.x_active, static_cast<std::size_t>(hidden_.grouping.n_blocks));
  grow(space.raw, static_cast<std::size_t>(hidden_.tiles) * kRows);
  grow(space.hidden, static_cast<std::size_t>(rows_.grouping.padded));
  grow(space.hidden_sum, static_cast<std::size_t>(rows_.grouping.n_groups));
  grow(space.hidden_active, static_cast<std::size_t>(rows_.grouping.n_blocks));
  grow(space.scores, static_cast<std::size_t>(rows_.tiles) * kRows);
  space.of_x.resize(kTogether), space.of_hidden.resize(kTogether), space.to_raw.resize(kTogether), space.to_scores.resize(kTogether);
}

void Predictor::read(const Kernels& k, Space& space, int row, const float* tap) const {
  const auto r = static_cast<std::size_t>(row);
  const auto& at = hidden_.grouping;
  float* x = space.x.data() + r * static_cast<std::size_t>(at.padded);
  float* sum = space.x_sum.data() + r * static_cast<std::size_t>(at.n_groups);
  auto* active = space.x_active.data() + r * static_cast<std::size_t>(at.n_blocks);
  k.pad(at, tap, x, sum, active);
  const float scale = 1.0f / std::sqrt(k.squares(tap, at.in) / static_cast<float>(at.in) + 1e-12f);
  for (int i = 0; i < at.padded; ++i) x[i] *= scale;
  space.of_x[r] = Activation{};
  space.of_x[r].x = x, space.of_x[r].sum = sum, space.of_x[r].active = active;
  space.to_raw[r] = space.raw.data() + r * static_cast<std::size_t>(hidden_.tiles) * kRows;
  space.to_scores[r] = space.scores.data() + r * static_cast<std::size_t>(rows_.tiles) * kRows;
}

void Predictor::hidden(const Kernels& k, Space& space, int n, int first_tile, int last_tile) const {
  k.groups_f32(hidden_, 0, space.of_x.data(), n, space.to_raw.data(), false, first_tile, last_tile);
}

void Predictor::activate(const Kernels& k, Space& space, int row) const {
  const auto r = static_cast<std::size_t>(row);
  const auto& at = rows_.grouping;
  float* raw = space.to_raw[r];
  for (int i = 0; i < at.in; ++i) raw[i] = std::max(raw[i], 0.0f);
  float* h = space.hidden.data() + r * static_cast<std::size_t>(at.padded);
  float* sum = space.hidden_sum.data() + r * static_cast<std::size_t>(at.n_groups);
  auto* active = space.hidden_active.data() + r * static_cast<std::size_t>(at.n_blocks);
  k.pad(at, raw, h, sum, active);
  space.of_hidden[r] = Activation{};
  space.of_hidden[r].x = h, space.of_hidden[r].sum = sum, space.of_hidden[r].active = active;
}

void Predictor::cut(const Kernels& k, Space& space, int n, int first_tile, int last_tile, std::uint8_t* const* to) const {
  k.groups_f32(rows_, 0, space.of_hidden.data(), n, space.to_scores.data(), false, first_tile, last_tile);
  const int begin = first_tile * kRows, end = std::min(last_tile * kRows, rows_.out);
  auto group = static_cast<std::size_t>(std::upper_bound(groups_.begin(), groups_.end(), begin) - groups_.begin()) - 1;
  for (int at = begin; at < end; ++group) {
    const int until = std::min(end, groups_[group + 1]);
    for (int i = 0; i < n; ++i) {
      const float* scores = space.to_scores[static_cast<std::size_t>(i)];
      for (int unit = at; unit < until; ++unit) to[i][unit] = scores[unit] > thresholds_[group];
    }
    at = until;
  }
}

void Predictor::fill(const Space& space, int row, int group, std::uint8_t* to) const {
  const auto g = static_cast<std::size_t>(group);
  const int begin = groups_[g], end = groups_[g + 1], floor = floors_[g];
  int kept = 0;
  for (int unit = begin; unit < end; ++unit) kept += to[unit];
  if (kept >= floor) return;
  const float* scores = space.to_scores[static_cast<std::size_t>(row)];
  std::vector<std::pair<float, int>> order;
  for (int unit = begin; unit < end; ++unit) {
    const float score = scores[unit];
    order.emplace_back(std::isnan(score) ? std::numeric_limits<float>::infinity() : -score, unit);
  }
  std::nth_element(order.begin(), order.begin() + floor - 1, order.end());
  for (int i = 0; i < floor; ++i) to[order[static_cast<std::size_t>(i)].second] = 1;
}

Mask Predictor::mask(const Kernels& k, const float* tap, int width, int position) const {
  if (width != hidden_.in) throw std::invalid_argument("A predictor reads a tap of another width.");
  if (position < first_) return whole_;
  Space space;
  reserve(space);
  auto made = std::make_shared<std::vector<std::uint8_t>>(static_cast<std::size_t>(size()));
  std::uint8_t* const to = made->data();
  read(k, space, 0, tap);
  hidden(k, space, 1, 0, hidden_tiles());
  activate(k, space, 0);
  cut(k, space, 1, 0, tiles(), &to);
  for (int g = 0; g < groups(); ++g) fill(space, 0, g, to);
  return made;
}

}  // namespace wb
