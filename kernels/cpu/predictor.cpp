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

constexpr int kMostHidden = 1 << 17;  // 2^17 products of at most 127 * 128 fit a sum of 32 bits

// Room for a list of hidden units, filled up to fours.
std::size_t listed(int units) { return round_up(static_cast<std::size_t>(units), 4) + 4; }

}  // namespace

ScoreMatrix make_scores(Arena& arena, int out, int in, const std::int8_t* codes, const float* steps, const float* mean) {
  ScoreMatrix m;
  m.out = out, m.in = in, m.granules = (out + kScoreGranule - 1) / kScoreGranule;
  const auto padded = static_cast<std::size_t>(m.padded());
  auto* to = arena.take<std::int8_t>(padded * static_cast<std::size_t>(in));
  m.codes = to;
  for (int o = 0; o < out; ++o) {
    const int within = o % kScoreGranule, first = o - within;
    const int place = within / 4 % 4 * 16 + within / 16 * 4 + within % 4;
    for (int unit = 0; unit < in; ++unit)
      to[(m.run(first, unit) - m.codes) + place] = codes[static_cast<std::size_t>(o) * static_cast<std::size_t>(in) + static_cast<std::size_t>(unit)];
  }
  const auto vector = [&](const float* from) {
    auto* made = arena.take<float>(padded + kRows);  // read to the end of a register
    std::copy(from, from + out, made);
    return made;
  };
  m.steps = vector(steps), m.mean = vector(mean);
  return m;
}

Predictor::Predictor(const PredictorSource& source)
    : groups_(source.groups), floors_(source.floors), thresholds_(source.thresholds), first_(source.first) {
  if (source.width < 1 || source.hidden_units < 1 || source.size < 1) throw std::invalid_argument("A predictor needs inputs, hidden units and outputs.");
  if (source.hidden_units > kMostHidden) throw std::invalid_argument("A predictor has at most " + std::to_string(kMostHidden) + " hidden units.");
  if (groups_.size() < 2 || groups_.front() != 0 || groups_.back() != source.size || floors_.size() + 1 != groups_.size() ||
      std::adjacent_find(groups_.begin(), groups_.end(), std::greater_equal<>()) != groups_.end())
    throw std::invalid_argument("Groups of a predictor must ascend from 0 to its size, with one floor each.");
  for (std::size_t g = 0; g < floors_.size(); ++g)
    if (floors_[g] < 0 || floors_[g] > groups_[g + 1] - groups_[g]) throw std::invalid_argument("A floor is more than its group has units.");
  set_thresholds(source.thresholds);
  // First, so that runs begin with pages.
  scores_ = make_scores(arena_, source.size, source.hidden_units, source.rows, source.row_steps, source.mean);
  hidden_ = of_int8(arena_, source.hidden_units, source.width, source.hidden, source.hidden_steps, source.hidden_bias);
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
  grow(space.units, listed(scores_.in));
  grow(space.q, listed(scores_.in));
  space.of_x.resize(kTogether), space.to_raw.resize(kTogether), space.active.resize(kTogether);
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
}

void Predictor::hidden(const Kernels& k, Space& space, int n, int first_tile, int last_tile) const {
  k.groups_f32(hidden_, 0, space.of_x.data(), n, space.to_raw.data(), false, first_tile, last_tile);
}

void Predictor::activate(Space& space, int row) const {
  const auto r = static_cast<std::size_t>(row);
  float* h = space.to_raw[r];
  float most = 0, bad = 0;
  for (int u = 0; u < scores_.in; ++u) {
    h[u] = std::max(h[u], 0.0f);
    most = std::max(most, h[u]);
    bad += h[u] * 0.0f;  // NaN if any is NaN or infinite
  }
  ActiveUnits& to = space.active[r];
  std::int32_t* units = space.units.data() + r * listed(scores_.in);
  std::int8_t* q = space.q.data() + r * listed(scores_.in);
  to.units = units, to.q = q, to.fours = 0, to.scale = most / 127.0f + bad;
  if (bad != bad || most == 0.0f) return;
  // Capped, for 127 / most overflows below 4e-37.
  const float inverse = std::min(127.0f / most, std::numeric_limits<float>::max());
  int n = 0;
  for (int u = 0; u < scores_.in; ++u) {
    units[n] = u;
    q[n] = static_cast<std::int8_t>(std::nearbyint(h[u] * inverse));
    n += q[n] != 0;
  }
  for (; n % 4 != 0; ++n) units[n] = units[n - 1], q[n] = 0;
  to.fours = n / 4;
}

void Predictor::cut(const Kernels& k, const Space& space, int n, int first_granule, int last_granule, std::uint8_t* const* to) const {
  alignas(64) std::int32_t sums[kScoreChunk + kRows];  // read to the end of a register
  const int end = last_granule * kScoreGranule;
  for (int first = first_granule * kScoreGranule; first < end;) {
    const int last = std::min(end, (first / kScoreChunk + 1) * kScoreChunk), present = std::min(last, scores_.out);
    for (int i = 0; i < n; ++i) {
      const ActiveUnits& x = space.active[static_cast<std::size_t>(i)];
      // Of further rows the chunk is in the cache.
      k.score_sums(scores_, x, first, last, i == 0 ? end : first, sums);
      auto group = static_cast<std::size_t>(std::upper_bound(groups_.begin(), groups_.end(), first) - groups_.begin()) - 1;
      for (int at = first; at < present; ++group) {
        const int until = std::min(present, groups_[group + 1]);
        k.scores_above(scores_, x.scale, sums + (at - first), at, until - at, thresholds_[group], to[i] + at);
        at = until;
      }
    }
    first = last;
  }
}

void Predictor::fill(const Kernels& k, const Space& space, int row, int group, std::uint8_t* to) const {
  const auto g = static_cast<std::size_t>(group);
  const int begin = groups_[g], end = groups_[g + 1], floor = floors_[g];
  int kept = 0;
  for (int unit = begin; unit < end && kept < floor; ++unit) kept += to[unit];
  if (kept >= floor) return;
  // Scores of masks are not kept: this is rare.
  const ActiveUnits& x = space.active[static_cast<std::size_t>(row)];
  std::vector<std::int32_t> sums(kScoreChunk);
  std::vector<std::pair<float, int>> order;
  for (int at = begin; at < end;) {
    const int first = at / kScoreGranule * kScoreGranule;
    const int last = std::min(static_cast<int>(round_up(static_cast<std::size_t>(end), kScoreGranule)), (first / kScoreChunk + 1) * kScoreChunk);
    k.score_sums(scores_, x, first, last, first, sums.data());
    for (; at < std::min(last, end); ++at) {
      const float score = static_cast<float>(sums[static_cast<std::size_t>(at - first)]) * x.scale * scores_.steps[at] + scores_.mean[at];
      order.emplace_back(std::isnan(score) ? std::numeric_limits<float>::infinity() : -score, at);
    }
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
  activate(space, 0);
  cut(k, space, 1, 0, granules(), &to);
  for (int g = 0; g < groups(); ++g) fill(k, space, 0, g, to);
  return made;
}

}  // namespace wb
