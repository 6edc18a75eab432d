// Tests of what is only partly read: predictors, single rows of a matrix, and columns, against doubles on random shapes.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "half.hpp"
#include "pool.hpp"
#include "predictor.hpp"
#include "test_checks.hpp"

namespace {

using namespace wb;
using namespace wb::test;

std::vector<std::int8_t> signed_codes(Random& random, std::size_t n) {
  std::vector<std::int8_t> codes(n);
  // Both ends often: sums overflow on them.
  for (auto& c : codes) c = static_cast<std::int8_t>(random.below(4) == 0 ? (random.below(2) != 0 ? 127 : -128) : random.below(256) - 128);
  return codes;
}

// A mask as threads make it together, and masks of one row alone.
void predictor(Random& random, int width, int units, int size, int n, int threads, Isa isa) {
  const std::string where = std::string(isa_name(isa)) + " " + std::to_string(width) + " " + std::to_string(units) + " " + std::to_string(size) +
                            " x " + std::to_string(n) + " by " + std::to_string(threads);
  const Kernels& k = kernels(isa);
  const auto u = static_cast<std::size_t>(units), w = static_cast<std::size_t>(width), all = static_cast<std::size_t>(size);
  const auto hidden = signed_codes(random, u * w), rows = signed_codes(random, all * u);
  const auto bias = random.normals(u), mean = random.normals(all);
  std::vector<float> hidden_steps(u), row_steps(all);
  for (float& step : hidden_steps) step = 0.001f + 0.002f * random.uniform();
  for (float& step : row_steps) step = random.below(8) == 0 ? 0.0f : 0.002f * random.uniform();
  std::vector<int> groups{0};
  while (groups.back() < size) groups.push_back(std::min(size, groups.back() + 1 + random.below(1 + size / 3)));
  std::vector<float> thresholds;
  std::vector<int> floors;
  for (std::size_t g = 0; g + 1 < groups.size(); ++g) {
    const int of = groups[g + 1] - groups[g];
    thresholds.push_back(random.below(4) == 0 ? 1e9f : 0.5f * random.normal());  // of some no unit is above
    floors.push_back(random.below(2) != 0 ? 0 : random.below(of + 1));
  }
  const Predictor p({width, units, size, hidden.data(), hidden_steps.data(), bias.data(), rows.data(), row_steps.data(), mean.data(), groups, thresholds, floors, 0});
  const auto taps = random.normals(static_cast<std::size_t>(n) * w);
  Predictor::Space space;
  p.reserve(space);
  std::vector<std::vector<std::uint8_t>> made(static_cast<std::size_t>(n), std::vector<std::uint8_t>(all, 9));
  std::vector<std::uint8_t*> to;
  for (auto& mask : made) to.push_back(mask.data());
  const auto part = [&](int items, int t) { return std::pair<int, int>{items * t / threads, items * (t + 1) / threads}; };
  Pool pool(threads);
  pool.run([&](int t) {
    const auto [first, last] = part(n, t);
    for (int r = first; r < last; ++r) p.read(k, space, r, taps.data() + static_cast<std::size_t>(r) * w);
    pool.barrier();
    const auto [a, b] = part(p.hidden_tiles(), t);
    p.hidden(k, space, n, a, b);
    pool.barrier();
    for (int r = first; r < last; ++r) p.activate(space, r);
    pool.barrier();
    const auto [c, d] = part(p.granules(), t);
    p.cut(k, space, n, c, d, to.data());
    pool.barrier();
    const auto [e, f] = part(n * p.groups(), t);
    for (int item = e; item < f; ++item) p.fill(k, space, item / p.groups(), item % p.groups(), to[static_cast<std::size_t>(item / p.groups())]);
  });
  for (int r = 0; r < n; ++r) {
    const float* tap = taps.data() + static_cast<std::size_t>(r) * w;
    const auto& mask = made[static_cast<std::size_t>(r)];
    CHECK_IN(*p.mask(k, tap, width, 0) == mask, where);
    double squares = 0, most = 0;
    for (int c = 0; c < width; ++c) squares += static_cast<double>(tap[c]) * tap[c];
    std::vector<double> h(u);
    for (std::size_t i = 0; i < u; ++i) {
      double sum = 0;
      for (std::size_t c = 0; c < w; ++c) sum += static_cast<double>(hidden[i * w + c]) * tap[c] / std::sqrt(squares / width);
      h[i] = std::max(0.0, sum * hidden_steps[i] + bias[i]);
      most = std::max(most, h[i]);
    }
    double edge = 0;  // hidden units that float and double round apart
    for (double& value : h) {
      const double code = most > 0 ? value * 127 / most : 0;
      if (std::fabs(code - std::floor(code) - 0.5) < 1e-3) edge += 1;
      value = std::nearbyint(code) * most / 127;
    }
    for (std::size_t g = 0; g + 1 < groups.size(); ++g) {
      std::vector<std::pair<double, int>> order;
      int above = 0;
      for (int i = groups[g]; i < groups[g + 1]; ++i) {
        const auto o = static_cast<std::size_t>(i);
        double sum = 0;
        for (std::size_t j = 0; j < u; ++j) sum += rows[o * u + j] * h[j];
        const double score = sum * row_steps[o] + mean[o], room = 1e-4 + edge * 128 * most / 127 * row_steps[o];
        order.emplace_back(-score, i);
        above += mask[o];
        if (std::fabs(score - thresholds[g]) > room && score > thresholds[g]) CHECK_IN(mask[o] == 1, where);
        if (std::fabs(score - thresholds[g]) > room && score <= thresholds[g] && floors[g] == 0) CHECK_IN(mask[o] == 0, where);
      }
      CHECK_IN(above >= floors[g], where);
      if (floors[g] == 0 || edge > 0) continue;
      std::sort(order.begin(), order.end());
      const double last = -order[static_cast<std::size_t>(floors[g]) - 1].first;  // what is well above it is kept
      for (const auto& [minus, unit] : order)
        if (-minus > last + 1e-3) CHECK_IN(mask[static_cast<std::size_t>(unit)] == 1, where);
    }
  }
}

// Group codes and dense weights row by row, of which some rows are wanted.
void listed_rows(Random& random, int out, int in, int bits, int group, int n, Isa isa) {
  const std::string where = std::string(isa_name(isa)) + " " + std::to_string(out) + " " + std::to_string(in) + " bits " + std::to_string(bits) + " group " + std::to_string(group);
  const Kernels& k = kernels(isa);
  const auto o = static_cast<std::size_t>(out), i = static_cast<std::size_t>(in), some = static_cast<std::size_t>(n);
  std::vector<int> listed;
  for (int row = 0; row < out; ++row)
    if (random.below(2) != 0) listed.push_back(row);
  Arena arena;
  std::vector<double> weights(o * i);
  Matrix w;
  if (bits == 16 || bits == 32) {
    auto values = random.normals(o * i);
    std::vector<std::uint16_t> halves(o * i);
    for (std::size_t at = 0; at < values.size(); ++at) {
      std::uint32_t word;
      std::memcpy(&word, &values[at], 4);
      if (bits == 16) word &= 0xFFFF0000u;
      halves[at] = static_cast<std::uint16_t>(word >> 16);
      std::memcpy(&values[at], &word, 4);
      weights[at] = values[at];
    }
    w = bits == 16 ? make_bf16(arena, out, in, halves.data(), true) : make_f32(arena, out, in, values.data(), true);
  } else {
    const auto groups = static_cast<std::size_t>((in + group - 1) / group);
    std::vector<std::uint8_t> codes(o * i), zeros(o * groups);
    std::vector<float> scales(o * groups);
    for (auto& c : codes) c = static_cast<std::uint8_t>(random.below(1 << bits));
    for (auto& z : zeros) z = static_cast<std::uint8_t>(random.below(1 << bits));
    for (auto& s : scales) s = 0.01f + 0.02f * random.uniform();
    for (std::size_t at = 0; at < codes.size(); ++at) {
      const std::size_t table = at / i * groups + at % i / static_cast<std::size_t>(group);
      weights[at] = (static_cast<double>(codes[at]) - zeros[table]) * scales[table];
    }
    GroupSource source;
    source.codes = codes.data(), source.scales32 = scales.data(), source.zeros = zeros.data();
    source.bits = bits, source.group = group, source.by_row = true;
    w = make_groups(arena, out, in, source);
  }
  const auto x = random.normals(some * i);
  const bool dense = bits >= 16;
  const std::size_t stride = round_up(i, 64) + 64 + (dense ? 0 : static_cast<std::size_t>(w.grouping.padded));
  Array<float> space(some * stride), tables(some * 2 * stride), y(some * static_cast<std::size_t>(w.tiles) * kRows);
  Array<std::uint8_t> active(some * stride);
  std::vector<Activation> rows(some);
  std::vector<float*> to(some);
  for (std::size_t r = 0; r < some; ++r) {
    rows[r].x = space.data() + r * stride;
    rows[r].sum = tables.data() + r * stride;
    rows[r].active = active.data() + r * stride;
    to[r] = y.data() + r * static_cast<std::size_t>(w.tiles) * kRows;
    if (dense) std::copy(x.begin() + static_cast<std::ptrdiff_t>(r * i), x.begin() + static_cast<std::ptrdiff_t>((r + 1) * i), space.data() + r * stride);
    else k.pad(w.grouping, x.data() + r * i, space.data() + r * stride, tables.data() + r * stride, active.data() + r * stride);
  }
  (dense ? k.rows_dense_f32 : k.rows_f32)(w, rows.data(), n, to.data(), listed.data(), static_cast<int>(listed.size()));
  for (std::size_t r = 0; r < some; ++r)
    for (const int row : listed) {
      double sum = 0, size = 1e-3;
      for (std::size_t c = 0; c < i; ++c) {
        const double term = weights[static_cast<std::size_t>(row) * i + c] * x[r * i + c];
        sum += term, size += std::fabs(term);
      }
      CHECK_IN(std::fabs(to[r][row] - sum) < 4e-6 * size, where);
    }
}

// Nibbles or bf16 input by input, a part for each thread, against the dense product of what is not zero.
void columns(Random& random, const std::vector<int>& outs, int in, int group, bool nibbles, bool exact, int n, int threads, Isa isa) {
  std::string where = std::string(isa_name(isa)) + (nibbles ? " nibbles" : " bf16") + (exact ? " fp32 " : " int8 ") + std::to_string(in) + " group " + std::to_string(group) + " by " + std::to_string(threads) + ":";
  for (const int out : outs) where += " " + std::to_string(out);
  const Kernels& k = kernels(isa);
  const auto i = static_cast<std::size_t>(in), some = static_cast<std::size_t>(n);
  const std::size_t groups = nibbles ? (i + static_cast<std::size_t>(group) - 1) / static_cast<std::size_t>(group) : 1, row = (i + 1) / 2, zero_row = (groups + 1) / 2;
  std::vector<std::vector<std::uint8_t>> packed, zeros;
  std::vector<std::vector<std::uint16_t>> halves;
  std::vector<std::vector<double>> weights;
  std::vector<ColumnSource> sources;
  for (const int out : outs) {
    const auto o = static_cast<std::size_t>(out);
    auto& of = weights.emplace_back(o * i);
    auto& half = halves.emplace_back(nibbles ? o * groups : o * i);
    auto& codes = packed.emplace_back(o * row);
    auto& points = zeros.emplace_back(o * zero_row);
    for (auto& byte : codes) byte = static_cast<std::uint8_t>(random.below(256));
    for (auto& byte : points) byte = static_cast<std::uint8_t>(random.below(256));
    for (auto& value : half) {
      const float v = nibbles ? 0.01f + 0.02f * random.uniform() : random.normal();
      std::uint32_t word;
      std::memcpy(&word, &v, 4);
      value = nibbles ? float_to_fp16(v) : static_cast<std::uint16_t>(word >> 16);
    }
    for (std::size_t at = 0; at < of.size(); ++at) {
      const std::size_t r = at / i, c = at % i, g = c / static_cast<std::size_t>(group);
      if (nibbles) {
        const int code = (codes[r * row + c / 2] >> (4 * (c % 2))) & 15, point = (points[r * zero_row + g / 2] >> (4 * (g % 2))) & 15;
        of[at] = (code - point) * static_cast<double>(fp16_to_float(half[r * groups + g]));
      } else {
        const std::uint32_t word = static_cast<std::uint32_t>(half[at]) << 16;
        float v;
        std::memcpy(&v, &word, 4);
        of[at] = v;
      }
    }
  }
  for (std::size_t l = 0; l < outs.size(); ++l) {
    ColumnSource s;
    s.out = outs[l];
    if (nibbles) s.packed = packed[l].data(), s.packed_row = row, s.scales = halves[l].data(), s.packed_zeros = zeros[l].data(), s.packed_zeros_row = zero_row;
    else s.rows = halves[l].data();
    sources.push_back(s);
  }
  Arena arena;
  const Columns w = make_columns(arena, in, group, sources, threads, outs.size() == 2 && outs[0] == outs[1]);
  const auto blocks = static_cast<std::size_t>(w.at.n_blocks), list = i + 3 * blocks + 1;
  auto x = random.normals(some * i);
  const int left_out = random.below(4);
  for (float& v : x)
    if (random.below(3) < left_out) v = 0;
  std::vector<ActiveInputs> rows;
  std::vector<std::vector<double>> seen(some, std::vector<double>(i));  // x as it is multiplied
  Array<std::uint32_t> channels(some * list);
  Array<std::int32_t> starts(some * (blocks + 1));
  Array<std::int8_t> q(some * static_cast<std::size_t>(w.at.padded)), q_listed(some * list);
  Array<float> x_listed(some * list), scale(some * blocks), sum(some * (blocks + static_cast<std::size_t>(w.at.n_groups)));
  Array<std::uint8_t> active(some * blocks);
  for (std::size_t r = 0; r < some; ++r) {
    const float* from = x.data() + r * i;
    std::int8_t* codes = q.data() + r * static_cast<std::size_t>(w.at.padded);
    float *scales = scale.data() + r * blocks, *sums = sum.data() + r * (blocks + static_cast<std::size_t>(w.at.n_groups));
    if (!exact) k.quantize(w.at, from, codes, scales, sums, active.data() + r * blocks);
    rows.push_back(list_active(w.at, exact ? nullptr : codes, exact ? nullptr : scales, from, channels.data() + r * list, starts.data() + r * (blocks + 1),
                               exact ? nullptr : q_listed.data() + r * list, exact ? x_listed.data() + r * list : nullptr, sums));
    std::size_t place = 0, block = 0;
    for (int g = 0; g < w.at.n_groups; ++g)
      for (int begin = 0; begin < w.at.width(g); begin += w.at.block, ++block) {
        const int channels_here = std::min(w.at.block, w.at.width(g) - begin);
        for (int c = 0; c < channels_here; ++c, ++place) {
          const int channel = g * w.at.group + begin + c;
          if (begin + c < w.at.channels(g)) seen[r][static_cast<std::size_t>(channel)] = exact ? from[channel] : static_cast<double>(codes[place]) * scales[block];
        }
      }
  }
  std::vector<std::vector<float>> y;
  for (std::size_t r = 0; r < some; ++r)
    for (const int out : outs) y.emplace_back(static_cast<std::size_t>(out), 1.0f);
  std::vector<float*> to;
  for (auto& of : y) to.push_back(of.data());
  std::vector<float* const*> of_row;
  for (std::size_t r = 0; r < some; ++r) of_row.push_back(to.data() + r * outs.size());
  const std::vector<const float*> bias(outs.size(), nullptr);
  const bool add = random.below(2) != 0;
  Pool pool(threads);
  pool.run([&](int t) { k.columns(w, w.parts[static_cast<std::size_t>(t)], rows.data(), n, bias.data(), of_row.data(), add); });
  for (std::size_t r = 0; r < some; ++r)
    for (std::size_t l = 0; l < outs.size(); ++l)
      for (std::size_t o = 0; o < static_cast<std::size_t>(outs[l]); ++o) {
        double expected = add ? 1 : 0, size = 1;
        for (std::size_t c = 0; c < i; ++c) expected += weights[l][o * i + c] * seen[r][c], size += std::fabs(weights[l][o * i + c] * seen[r][c]);
        CHECK_IN(std::fabs(y[r * outs.size() + l][o] - expected) < 1e-5 * size, where);
      }
}

}  // namespace

namespace wb::test {

void sparse_products(bool quick) {
  Random random(11);
  for (const Isa isa : available_isas()) {
    // Less than a granule; not whole granules; more than one chunk, and a last one of a single output.
    for (const auto& [width, units, size] : {std::tuple{1, 1, 1}, {17, 3, 63}, {48, 24, 200}, {70, 37, 150}, {65, 66, 1000}, {33, 9, kScoreChunk + 1}, {40, 13, 2 * kScoreChunk + 700}})
      for (const int threads : {1, 2, 3}) predictor(random, width, units, size, quick ? 2 : 8, threads, isa);
    for (int i = 0; i < (quick ? 10 : 60); ++i) predictor(random, 1 + random.below(150), 1 + random.below(140), 1 + random.below(700), 1 + random.below(8), 1 + random.below(3), isa);
    for (const int bits : {2, 3, 4, 5, 6, 7, 8, 16, 32})
      for (int i = 0; i < (quick ? 3 : 20); ++i) listed_rows(random, 1 + random.below(70), 1 + random.below(200), bits, 8 << random.below(5), 1 + random.below(5), isa);
    for (int i = 0; i < (quick ? 12 : 80); ++i) {
      std::vector<int> outs{1 + random.below(200)};
      if (random.below(2) != 0) outs.push_back(random.below(2) != 0 ? outs[0] : 1 + random.below(100));
      if (outs.size() == 2 && random.below(2) != 0) outs.push_back(1 + random.below(70));
      const bool nibbles = i % 3 != 2;
      columns(random, outs, 1 + random.below(200), 8 << random.below(6), nibbles, !nibbles || random.below(2) != 0, 1 + random.below(6), 1 + random.below(3), isa);
    }
  }
}

}  // namespace wb::test
