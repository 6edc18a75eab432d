// Products of integers: what a row of activations is rounded to before a matrix of integer codes is multiplied with it.
//
// Channels lie in sections. One 32-bit sum runs through all of them: before the products of a section are added, the sum
// is doubled as often as the section's scale is smaller than that of the one before by a factor of two (Tender, Lee et
// al. 2024, section 4). Or every section's sum becomes fp32 and is scaled by itself, which is what that saves.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "memory.hpp"

namespace wb {

struct Matrix;

inline constexpr int kQuad = 4;  // channels that one lane of a dot product takes
inline constexpr int kTileChannels = 64;  // that one product of tiles takes
inline constexpr int kMaxTileSums = 4;

struct Section {
  int channels = 0;  // that carry values
  int quads = 0;     // that are laid out; channels past the last are zero
  int doublings = 0; // of the sum, ahead of this section's products
  // The same where codes are widened to 16 bits (`settle` sets both): codes are shifted, and the sum only where the next
  // shift would not fit.
  int shift = 0;     // of this section's codes
  int lead = 0;      // doublings of the sum ahead of it

  bool operator==(const Section&) const = default;
};

// What tiles sum by itself: a run of sections. Channels that are doubled within it come as often as their doublings multiply
// them, with the same code each time.
struct TileSum {
  int first = 0;                      // channel, as they are laid out
  int whole = 0;                      // channels from there on whose weights are taken as they lie, in whole tiles
  std::vector<std::int32_t> gathered; // quads after those, likewise; -1 for none
  int shift = 0;                      // doublings of the sum, in the end
  int held = 0;                       // of `whole`, what is the run's; the rest is zero in a row

  int channels() const { return whole + kQuad * static_cast<int>(gathered.size()); }
  bool operator==(const TileSum&) const = default;
};

// Random signs, then a product of small Hadamard matrices: blocks of `block` channels are rotated each by itself.
struct Rotation {
  int block = 0;                           // 0: none
  std::vector<float> signs;                // (in)
  std::vector<std::vector<float>> factors; // each (f, f) row-major, of +-1; the product of all f is `block`

  bool operator==(const Rotation&) const = default;
};

// Where each byte comes from, 64 at a time: of which tables of 128 bytes, and where within them; and 16 at a time, of which
// tables of 16. Channels of one section ascend, so that neighbours come from few tables.
struct ByteOrder {
  struct Part {
    int to = 0;               // the first of the 64
    int table = 0;
    std::uint64_t bytes = 0;  // of the 64 that it has

    bool operator==(const Part&) const = default;
  };
  int n = 0;                           // bytes that are placed
  int tables = 0;
  std::vector<std::int32_t> from;      // (n)
  AlignedVector<std::uint8_t> within;  // (n, padded to 64), place within the table
  std::vector<Part> parts;
  std::vector<std::int32_t> sixteens;  // table of each part of 16 bytes
  std::vector<std::uint8_t> shuffles;  // (parts of 16 bytes, 16): place within the table, 0x80 for what others have
  std::vector<std::int32_t> first16;   // part of each 16 bytes, and the end of all

  ByteOrder() = default;
  explicit ByteOrder(std::vector<std::int32_t> order);
  bool operator==(const ByteOrder&) const = default;
};

// What happens to a row of activations x: rotated, v = (x - bias) * multipliers, codes = round(v / step), clamped to
// [-2^(bits-1), 2^(bits-1) - 1], and laid out in `order`.
struct IntegerInput {
  int in = 0;
  int bits = 8, weight_bits = 8;
  std::vector<Section> sections;
  int quads = 0;                     // of all sections
  bool apart = false;                // sections are scaled one by one, and not by doublings
  std::vector<std::int32_t> order;   // (4 quads): channel that goes there, `in` for none; empty: as they come
  ByteOrder bytes;                   // the same, for bytes
  AlignedVector<float> bias;         // (in, padded to 16), or empty
  AlignedVector<float> multipliers;  // likewise
  std::vector<float> steps;          // by chunk of positions, the last for all that follow; empty: of the row's own range
  std::vector<int> starts;           // first position of each chunk, ascending from 0
  float clip = 1;                    // share of a row's own range that is kept
  float limit = 0;                   // inputs of more steps are counted as beyond calibration; 0: none is
  std::vector<float> section_scales; // where sections are apart: of each, times the row's step; empty: ranges of their own
  Rotation rotation;
  std::vector<TileSum> tile_sums;    // for tiles (`settle` sets them), the first not shifted; none where no section is doubled

  bool operator==(const IntegerInput&) const = default;
  int laid_out() const { return quads * kQuad; }
  int padded() const { return static_cast<int>(round_up(static_cast<std::size_t>(laid_out()), kTileChannels)); }
  // Of a row: its codes, then what tiles take of it for each sum. One sum begins with the codes themselves.
  int tiles_at() const { return tile_sums.size() <= 1 ? 0 : padded(); }
  std::size_t row_bytes() const {
    int bytes = tiles_at();
    for (const TileSum& sum : tile_sums) bytes += sum.channels();
    return static_cast<std::size_t>(std::max(bytes, padded()));
  }
  // Scales and offsets of a row.
  // Every section of a row has a range of its own.
  bool ranges_apart() const { return apart && section_scales.empty(); }
  int parts() const { return apart ? static_cast<int>(sections.size()) : 1; }
};

// Of one row: codes that were clamped, and inputs beyond what calibration saw.
struct IntegerCounts {
  std::int64_t clamped = 0, beyond = 0;
};

struct IntegerSource {
  const std::uint8_t* packed = nullptr;    // code + 2^(bits-1), little-endian bit streams of `bits` bits, one per row
  std::size_t packed_row = 0;
  int bits = 8;                            // 4 or 8
  const std::uint16_t* scales16 = nullptr; // fp16 (out), or (out, sections) where weights have groups of their own
  bool grouped = false;
};

// Sections from the channels of each and the doublings ahead of it: padded to what the codes' layout takes at a time.
std::vector<Section> make_sections(const std::vector<int>& channels, const std::vector<int>& doublings, int weight_bits);

// Complete `input` (its order where sections are padded) and check it: every sum that can occur fits 32 bits.
void settle(IntegerInput& input);

// Codes in tiles of 16 rows, [quad][16][4] unsigned: code + 2^(bits-1), which the products take off again exactly. At 4 bits
// two quads share 64 bytes, the first in the low nibbles.
Matrix make_integer(Arena& arena, int out, const IntegerInput& input, const IntegerSource& source);

}  // namespace wb
