#include "integer.hpp"

#include <algorithm>
#include <array>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "matrix.hpp"

namespace wb {

// What one more sum of tiles costs, in steps of products: it is stored, and added to the others.
constexpr int kStepsOfSum = 2;

// Doublings of a section within a run at most: 2^6 times its channels. Sums of 32 bits have room for 24 doublings, which four
// runs reach.
constexpr int kMostRepeated = 6;

std::vector<Section> make_sections(const std::vector<int>& channels, const std::vector<int>& doublings, int weight_bits) {
  if (channels.empty() || channels.size() != doublings.size()) throw std::invalid_argument("Sections need channels and doublings each.");
  const int unit = weight_bits == 4 ? 2 * kQuad : kQuad;
  std::vector<Section> sections;
  for (std::size_t i = 0; i < channels.size(); ++i) {
    if (channels[i] < 1 || doublings[i] < 0 || doublings[i] > 30) throw std::invalid_argument("A section has at least one channel, and 0 to 30 doublings.");
    sections.push_back({channels[i], (channels[i] + unit - 1) / unit * unit / kQuad, doublings[i]});
  }
  return sections;
}

ByteOrder::ByteOrder(std::vector<std::int32_t> order) : n(static_cast<int>(order.size())), from(std::move(order)) {
  within.resize(round_up(from.size(), 64), 0);
  for (std::size_t i = 0; i < from.size(); ++i) {
    within[i] = static_cast<std::uint8_t>(from[i] % 128);
    tables = std::max(tables, from[i] / 128 + 1);
  }
  for (std::size_t begin = 0; begin < from.size(); begin += 64)
    for (int table = 0; table < tables; ++table) {
      Part part{static_cast<int>(begin), table, 0};
      for (std::size_t i = begin; i < std::min(begin + 64, from.size()); ++i)
        if (from[i] / 128 == table) part.bytes |= std::uint64_t{1} << (i - begin);
      if (part.bytes != 0) parts.push_back(part);
    }
  for (std::size_t begin = 0; begin < from.size(); begin += 16) {
    first16.push_back(static_cast<std::int32_t>(sixteens.size()));
    for (std::size_t i = begin; i < std::min(begin + 16, from.size()); ++i) {
      const auto started = sixteens.begin() + first16.back();
      const auto part = std::find(started, sixteens.end(), from[i] / 16) - sixteens.begin();
      if (static_cast<std::size_t>(part) == sixteens.size()) {
        sixteens.push_back(from[i] / 16);
        shuffles.resize(shuffles.size() + 16, 0x80);
      }
      shuffles[16 * static_cast<std::size_t>(part) + i - begin] = static_cast<std::uint8_t>(from[i] % 16);
    }
  }
  first16.push_back(static_cast<std::int32_t>(sixteens.size()));
}

namespace {

// Doublings go into the codes from the last section backwards, as far as the smallest code, -2^(bits-1), fits 16 bits.
void place_shifts(IntegerInput& input) {
  const int most = 16 - input.bits;
  int after = 0;
  for (std::size_t s = input.sections.size(); s-- > 0;) {
    Section& section = input.sections[s];
    section.shift = input.apart ? 0 : after;
    section.lead = 0;
    if (s == 0 || input.apart) continue;
    if (after + section.doublings <= most) {
      after += section.doublings;
    } else {
      section.lead = after + section.doublings;
      after = 0;
    }
  }
}

std::vector<int> powers_of(const IntegerInput& input) {
  std::vector<int> powers(input.sections.size(), 0);
  for (std::size_t s = powers.size(); s-- > 1;) powers[s - 1] = powers[s] + input.sections[s].doublings;
  return powers;
}

// Sections begin to end, and how often each is to come beside the first time.
TileSum sum_of_run(const IntegerInput& input, const std::vector<int>& powers, std::size_t begin, std::size_t end) {
  std::int32_t first = 0, quads = 0;
  for (std::size_t s = 0; s < begin; ++s) first += input.sections[s].quads;
  std::vector<std::int32_t> again;
  for (std::size_t s = begin; s < end; ++s) {
    for (int i = 1; i < 1 << (powers[s] - powers[end - 1]); ++i)
      for (std::int32_t quad = 0; quad < input.sections[s].quads; ++quad) again.push_back(first + quads + quad);
    quads += input.sections[s].quads;
  }
  constexpr std::int32_t of_tile = kTileChannels / kQuad;
  TileSum sum{kQuad * first, 0, {}, powers[end - 1], 0};
  // A tile that is not full goes on into weights of the next run, and what it takes of a row there is zero.
  const std::int32_t whole = again.empty() ? (quads + of_tile - 1) / of_tile * of_tile : quads / of_tile * of_tile;
  sum.whole = kQuad * whole;
  sum.held = kQuad * std::min(whole, quads);
  for (std::int32_t quad = whole; quad < quads; ++quad) sum.gathered.push_back(first + quad);
  sum.gathered.insert(sum.gathered.end(), again.begin(), again.end());
  sum.gathered.resize(round_up(sum.gathered.size(), static_cast<std::size_t>(of_tile)), -1);
  return sum;
}

// Sections fall into runs, so that tiles take the fewest steps: a run repeats channels that are doubled within it, but every
// sum ends with a tile that is not full, and is stored and added once more.
void place_tile_sums(IntegerInput& input) {
  input.tile_sums.clear();
  const auto powers = powers_of(input);
  if (powers[0] == 0 || input.apart) return;
  struct Plan {
    int steps = std::numeric_limits<int>::max();
    std::size_t end = 0;  // of its first run
  };
  // The best for the sections from each on, by the number of runs.
  const std::size_t n = powers.size();
  std::vector<std::array<Plan, kMaxTileSums + 1>> best(n + 1);
  best[n][0].steps = 0;
  for (std::size_t begin = n; begin-- > 0;)
    for (std::size_t end = begin + 1; end <= n && powers[begin] - powers[end - 1] <= kMostRepeated; ++end) {
      int quads = 0;
      for (std::size_t s = begin; s < end; ++s) quads += input.sections[s].quads << (powers[s] - powers[end - 1]);
      const int steps = (kQuad * quads + kTileChannels - 1) / kTileChannels + kStepsOfSum;
      for (std::size_t runs = 0; runs < kMaxTileSums; ++runs)
        if (best[end][runs].steps < best[begin][runs + 1].steps - steps) best[begin][runs + 1] = {best[end][runs].steps + steps, end};
    }
  std::size_t runs = 1;
  for (std::size_t k = 2; k <= kMaxTileSums; ++k)
    if (best[0][k].steps < best[0][runs].steps) runs = k;
  for (std::size_t begin = 0; begin < n; begin = best[begin][runs--].end) input.tile_sums.push_back(sum_of_run(input, powers, begin, best[begin][runs].end));
  std::reverse(input.tile_sums.begin(), input.tile_sums.end());  // the last is not shifted
}

void check_order(const IntegerInput& input) {
  std::vector<char> seen(static_cast<std::size_t>(input.in), 0);
  std::size_t at = 0;
  for (const Section& s : input.sections)
    for (int i = 0; i < s.quads * kQuad; ++i, ++at) {
      const auto channel = input.order[at];
      const bool padding = i >= s.channels;
      if (padding != (channel == input.in) || channel < 0 || channel > input.in || (!padding && seen[static_cast<std::size_t>(channel)]++ != 0))
        throw std::invalid_argument("The order of channels must name each once.");
    }
}

// The largest magnitude that the sum of a row can have, with weights as they are stored: at most 2^bits - 1.
void check_reach(const IntegerInput& input) {
  const std::int64_t most = (std::int64_t{1} << (input.bits - 1)) * ((std::int64_t{1} << input.weight_bits) - 1);
  std::int64_t reach = 0;
  for (const Section& s : input.sections) {
    reach = input.apart ? std::max(reach, most * s.channels) : (reach << s.doublings) + most * s.channels;
    if (reach > std::numeric_limits<std::int32_t>::max())
      throw std::invalid_argument("The sum of these sections can overflow 32 bits: fewer groups are needed.");
  }
}

}  // namespace

void settle(IntegerInput& input) {
  if (input.in < 1 || (input.bits != 4 && input.bits != 8) || (input.weight_bits != 4 && input.weight_bits != 8))
    throw std::invalid_argument("Integer products take codes of 4 or 8 bits.");
  if (!(input.clip > 0 && input.clip <= 1)) throw std::invalid_argument("A clip is in (0, 1].");
  if (input.starts.size() != input.steps.size() || (!input.starts.empty() && input.starts[0] != 0) ||
      std::adjacent_find(input.starts.begin(), input.starts.end(), std::greater_equal<>()) != input.starts.end())
    throw std::invalid_argument("Chunks of positions start at 0 and ascend, and each has its step.");
  const auto n = static_cast<std::size_t>(input.in);
  for (const std::size_t size : {input.bias.size(), input.multipliers.size(), input.rotation.signs.size()})
    if (size != 0 && size != n) throw std::invalid_argument("A value for each input is needed.");
  for (const float step : input.steps)
    if (!(step > 0)) throw std::invalid_argument("A step must be larger than zero.");
  int channels = 0, quads = 0;
  for (const Section& s : input.sections) channels += s.channels, quads += s.quads;
  if (channels != input.in) throw std::invalid_argument("Sections must hold every input once.");
  input.quads = quads;
  if (!input.apart && !input.section_scales.empty()) throw std::invalid_argument("Sections have scales of their own only where they are apart.");
  if (!input.section_scales.empty() && input.section_scales.size() != input.sections.size()) throw std::invalid_argument("Every section needs its scale.");
  if (input.ranges_apart() && !(input.order.empty() && input.steps.empty()))
    throw std::invalid_argument("Sections with ranges of their own take channels as they come.");
  if (!input.order.empty() && input.order.size() != n) throw std::invalid_argument("The order of channels must name each once.");
  std::vector<std::int32_t> channel_of = std::move(input.order);
  const bool padded = quads * kQuad != input.in;
  if (channel_of.empty() && padded) {
    channel_of.resize(n);
    std::iota(channel_of.begin(), channel_of.end(), 0);
  }
  input.order.clear();
  if (!channel_of.empty()) {
    std::size_t next = 0;
    for (const Section& s : input.sections)
      for (int i = 0; i < s.quads * kQuad; ++i) input.order.push_back(i < s.channels ? channel_of[next++] : input.in);
    check_order(input);
    input.bytes = ByteOrder(input.order);
  }
  Rotation& r = input.rotation;
  if (r.block > 0) {
    std::size_t product = 1;
    for (const auto& factor : r.factors) {
      std::size_t f = 1;
      while (f * f < factor.size()) ++f;
      if (f * f != factor.size()) throw std::invalid_argument("Factors of a rotation are square.");
      product *= f;
    }
    if (product != static_cast<std::size_t>(r.block) || input.in % r.block != 0 || r.signs.size() != n)
      throw std::invalid_argument("A rotation does not fit its inputs.");
  }
  const std::size_t whole = round_up(n, 16);
  if (!input.bias.empty()) input.bias.resize(whole, 0.0f);
  if (!input.multipliers.empty()) input.multipliers.resize(whole, 0.0f);
  check_reach(input);
  place_shifts(input);
  place_tile_sums(input);
}

Matrix make_integer(Arena& arena, int out, const IntegerInput& input, const IntegerSource& source) {
  if (source.bits != input.weight_bits) throw std::invalid_argument("Weights and inputs disagree on the weights' bits.");
  if (out < 1) throw std::invalid_argument("A matrix needs at least one row and one column.");
  Matrix m;
  m.kind = Kind::integer;
  m.out = out;
  m.in = input.in;
  m.tiles = (out + kRows - 1) / kRows;
  m.bits = source.bits;
  m.input = std::make_shared<const IntegerInput>(input);
  const bool nibbles = source.bits == 4;
  m.tile_bytes = static_cast<std::size_t>(input.quads) * (nibbles ? 32 : 64);
  auto* codes = arena.take<std::uint8_t>(m.tile_bytes * static_cast<std::size_t>(m.tiles));
  for (int row = 0; row < out; ++row) {
    std::uint8_t* tile = codes + static_cast<std::size_t>(row / kRows) * m.tile_bytes;
    const std::uint8_t* stream = source.packed + static_cast<std::size_t>(row) * source.packed_row;
    for (int i = 0; i < input.laid_out(); ++i) {
      const int c = input.order.empty() ? i : input.order[static_cast<std::size_t>(i)];
      if (c == input.in) continue;  // its activation is zero
      const int quad = i / kQuad, byte = kQuad * (row % kRows) + i % kQuad;
      if (nibbles) tile[64 * (quad / 2) + byte] |= static_cast<std::uint8_t>(((stream[c / 2] >> (4 * (c % 2))) & 15) << (4 * (quad % 2)));
      else tile[64 * quad + byte] = stream[c];
    }
  }
  m.codes = codes;
  const std::size_t groups = source.grouped ? input.sections.size() : 1;
  auto* scales = arena.take<std::uint16_t>(static_cast<std::size_t>(m.tiles) * groups * kRows);
  for (int row = 0; row < out; ++row)
    for (std::size_t g = 0; g < groups; ++g)
      scales[(static_cast<std::size_t>(row / kRows) * groups + g) * kRows + static_cast<std::size_t>(row % kRows)] = source.scales16[static_cast<std::size_t>(row) * groups + g];
  m.grid.scales16 = scales;
  m.grouping.n_groups = static_cast<int>(groups);
  return m;
}

}  // namespace wb
