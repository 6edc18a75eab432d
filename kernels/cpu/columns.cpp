#include "columns.hpp"

#include <algorithm>
#include <stdexcept>

namespace wb {

namespace {

unsigned nibble_at(const std::uint8_t* stream, std::size_t i) { return (stream[i / 2] >> (4 * (i % 2))) & 15u; }

// Where output o of a part lies among its nibbles: byte of a channel's run and which half. A quad of n granules has n
// lanes of 16 bytes; interleaving four channels gives four registers of n * 4 outputs for each half, in order.
struct Place {
  std::size_t byte;
  bool high;
};

Place place_of(const ColumnPart& part, int o) {
  const int quad = o / kQuadOutputs, lanes = std::min(4, part.granules - 4 * quad);
  const int within = o % kQuadOutputs, piece = within / (4 * lanes), lane = within % (4 * lanes) / 4, j = within % 4;
  return {static_cast<std::size_t>(64 * quad + 16 * lane + 4 * (piece % 4) + j), piece >= 4};
}

}  // namespace

double Columns::group_bytes() const {
  double bytes = 0;
  for (const ColumnPart& part : parts) bytes += static_cast<double>(part.header);
  return bytes;
}

double Columns::channel_bytes() const {
  double bytes = 0;
  for (const ColumnPart& part : parts) bytes += static_cast<double>(part.stride);
  return bytes;
}

Columns make_columns(Arena& arena, int in, int group, const std::vector<ColumnSource>& sources, int threads, bool paired) {
  if (in < 1 || group < 1 || threads < 1 || sources.empty()) throw std::invalid_argument("Columns need inputs, a group, threads and linears.");
  Columns w;
  w.in = in;
  w.nibbles = sources[0].packed != nullptr;
  w.at = Grouping::of(in, w.nibbles ? group : in);
  w.zeros = sources[0].packed_zeros != nullptr;
  for (const ColumnSource& s : sources)
    if (s.out < 1 || (s.packed != nullptr) != w.nibbles || (s.packed_zeros != nullptr) != w.zeros)
      throw std::invalid_argument("Linears that share columns must be stored alike.");
  if (paired && (sources.size() != 2 || sources[0].out != sources[1].out)) throw std::invalid_argument("Paired linears are two of one size.");
  const auto add = [&](int linear, int row) { w.granules.push_back({linear, row, std::min(kGranule, sources[static_cast<std::size_t>(linear)].out - row)}); };
  if (paired) {
    for (int row = 0; row < sources[0].out; row += kGranule) add(0, row), add(1, row);
  } else {
    for (int i = 0; i < static_cast<int>(sources.size()); ++i)
      for (int row = 0; row < sources[static_cast<std::size_t>(i)].out; row += kGranule) add(i, row);
  }
  const int unit = paired ? 2 : 1;
  const auto units = static_cast<long long>(w.granules.size()) / unit;
  for (int t = 0; t < threads; ++t) {
    ColumnPart part;
    part.first = static_cast<int>(units * t / threads) * unit;
    part.granules = static_cast<int>(units * (t + 1) / threads) * unit - part.first;
    part.stride = static_cast<std::size_t>(part.granules) * (w.nibbles ? 16 : 64);
    part.header = w.nibbles ? round_up(static_cast<std::size_t>(part.outputs()) * (w.zeros ? 3 : 2), kAlign) : 0;
    // What is read past the end of the last run and header stays within the arena.
    auto* base = arena.take<std::uint8_t>(static_cast<std::size_t>(w.at.n_groups) * part.header + static_cast<std::size_t>(in) * part.stride + kAlign);
    part.base = base;
    for (int o = 0; o < part.outputs(); ++o) {
      const Columns::Rows& rows = w.granules[static_cast<std::size_t>(part.first + o / kGranule)];
      if (o % kGranule >= rows.count) continue;
      const ColumnSource& from = sources[static_cast<std::size_t>(rows.linear)];
      const auto row = static_cast<std::size_t>(rows.row + o % kGranule);
      const auto writable = [&](const std::uint8_t* p) { return base + (p - base); };
      if (!w.nibbles) {
        const int within = o % kGranule, word = within < 16 ? 2 * within : 2 * (within - 16) + 1;
        for (int c = 0; c < in; ++c)
          std::memcpy(writable(w.channel(part, c)) + 64 * (o / kGranule) + 2 * word, from.rows + row * static_cast<std::size_t>(in) + static_cast<std::size_t>(c), 2);
        continue;
      }
      const Place place = place_of(part, o);
      for (int c = 0; c < in; ++c)
        writable(w.channel(part, c))[place.byte] |= static_cast<std::uint8_t>(nibble_at(from.packed + row * from.packed_row, static_cast<std::size_t>(c)) << (place.high ? 4 : 0));
      for (int g = 0; g < w.at.n_groups; ++g) {
        std::uint8_t* header = writable(w.group(part, g));
        std::memcpy(header + 2 * o, from.scales + row * static_cast<std::size_t>(w.at.n_groups) + static_cast<std::size_t>(g), 2);
        if (w.zeros) header[2 * part.outputs() + o] = static_cast<std::uint8_t>(nibble_at(from.packed_zeros + row * from.packed_zeros_row, static_cast<std::size_t>(g)));
      }
    }
    w.parts.push_back(part);
  }
  return w;
}

ActiveInputs list_active(const Grouping& at, const std::int8_t* q, const float* scale, const float* x, std::uint32_t* channels, std::int32_t* starts,
                         std::int8_t* q_to, float* x_to, float* sum) {
  ActiveInputs list;
  int n = 0, block = 0;
  for (int g = 0, place = 0; g < at.n_groups; place += at.width(g), ++g) {
    const int before = list.count;
    for (int from = 0; from < at.width(g); from += at.block, ++block) {
      starts[block] = n / 4;
      const int first = g * at.group + from, here = std::clamp(at.channels(g) - from, 0, at.block), begin = n;
      // Written whether active or not, and kept by moving on: no branch for the processor to guess.
      if (q != nullptr) {
        const std::int8_t* of = q + place + from;
        std::int32_t total = 0;
        for (int i = 0; i < here; ++i) {
          channels[n] = static_cast<std::uint32_t>(first + i);
          q_to[n] = of[i];
          total += of[i];
          n += of[i] != 0;
        }
        sum[block] = static_cast<float>(total);
        n += n == begin && here > 0 && scale[block] != scale[block];  // its code is zero: the product is no number either
      } else {
        double total = 0;
        for (int i = 0; i < here; ++i) {
          channels[n] = static_cast<std::uint32_t>(first + i);
          x_to[n] = x[first + i];
          total += static_cast<double>(x[first + i]);
          n += x[first + i] != 0.0f;
        }
        sum[block] = static_cast<float>(total);
      }
      list.count += n - begin;
      for (; n % 4 != 0; ++n) {
        channels[n] = channels[n - 1];
        if (q != nullptr) q_to[n] = 0;
        else x_to[n] = 0.0f;
      }
    }
    list.groups += list.count > before;
  }
  starts[block] = n / 4;
  list.channels = channels, list.starts = starts, list.scale = scale, list.sum = sum;
  list.q = q != nullptr ? q_to : nullptr;
  list.x = q == nullptr ? x_to : nullptr;
  return list;
}

}  // namespace wb
