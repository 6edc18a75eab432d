// Weight matrices in the layouts that the kernels stream, and activations prepared for them.
//
// All layouts are cut into tiles of 16 rows, one row per lane, so that products need no sum across lanes; rows past the
// end are zero. Group codes are cut further into chunks of 16 input channels; groups are padded to whole chunks, with
// channels whose activation is zero. Within a chunk:
//
//   bytes (8 bits)        4 x 64 bytes: byte 4 r + k of part m is the code of row r, channel 4 m + k
//   nibbles (4 to 7)      2 x 64 bytes: low nibbles are part 2 i, high nibbles part 2 i + 1
//   crumbs (2, 3, 6, 7)   64 bytes: bits 2 m, 2 m + 1 of each byte are part m
//   a plane (3, 5, 7)     4 x 64 bits: bit 4 r + k of word m is row r, channel 4 m + k
//
// Matrices of which only some rows are wanted lie row by row instead (`by_row`): what a row holds lies side by side, 64
// channels of its padded groups to a piece (8 x bits bytes): low nibbles of 32 bytes are channels 0 .. 31 and high ones
// 32 .. 63 (from 4 bits on), then the further bits as planes of 64 bits, the lowest first; 8 bits are bytes. Dense rows are
// padded to 64 bytes. Scales and the like are [row][group] there.
//
// "Packed" keeps what its width needs, in that order, side by side. "Planes" keeps every plane of the parent codes in
// an array of its own, the most significant first, so that b bits are read by reading b arrays and nothing else.
// "Tables" are planes too, and what codes stand for is looked up by row: as a lookup takes 32 codes of one row, each plane
// holds row after row, 32 channels to a word, padded to whole words.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "integer.hpp"
#include "memory.hpp"

namespace wb {

inline constexpr int kRows = 16;      // rows of a tile
inline constexpr int kChunk = 16;     // channels of a chunk
inline constexpr int kBlock = 64;     // most channels that may share one activation scale
inline constexpr int kMaxPlanes = 8;
inline constexpr int kWord = 32;      // channels of one row that are looked up together

enum class Kind : std::uint8_t { f32, bf16, packed, planes, tables, integer, columns };

// How activations lie in memory for a matrix of group codes: groups padded to whole chunks.
struct Grouping {
  int in = 0;          // logical channels
  int group = 0;       // channels that share a weight scale
  int n_groups = 0;
  int stride = 0;      // padded channels of every group but the last
  int last = 0;        // padded channels of the last group
  int padded = 0;      // all of them
  int block = kBlock;  // most channels that share one activation scale, whole chunks
  int n_blocks = 0;    // activation scales of a row

  static Grouping of(int in, int group, int block = kBlock);
  int width(int g) const { return g + 1 == n_groups ? last : stride; }
  int channels(int g) const { return g + 1 == n_groups ? in - group * g : group; }
  bool operator==(const Grouping& other) const { return in == other.in && group == other.group && block == other.block; }
};

// What codes stand for: (code - zero) * scale, or code * scale + minimum.
struct Grid {
  const std::uint16_t* scales16 = nullptr;  // fp16 [tile][group][16], or
  const float* scales32 = nullptr;          // fp32
  const std::uint8_t* zeros = nullptr;      // [tile][group][16]: zero points are zero + step * zeros; null: zero everywhere
  float zero = 0, step = 1;
  const float* minima32 = nullptr;          // fp32, or
  const std::uint16_t* minima16 = nullptr;  // fp16, in place of zero points

  explicit operator bool() const { return scales16 != nullptr || scales32 != nullptr; }
  bool has_minima() const { return minima16 != nullptr || minima32 != nullptr; }
  std::size_t bytes_per_lane() const;       // of a group of one row
};

struct Matrix {
  Kind kind = Kind::f32;
  int out = 0, in = 0;
  int tiles = 0;
  int bits = 0;                          // of the stored codes
  Grouping grouping;
  const std::uint8_t* codes = nullptr;
  std::size_t tile_bytes = 0;            // of one plane where there are planes
  std::size_t plane_bytes = 0;
  bool by_row = false;                   // packed or dense: rows side by side, each `tile_bytes` / 16 long
  Grid grid;                             // of the codes as stored
  std::array<Grid, kMaxPlanes + 1> widths;  // of planes read at fewer bits; without scales where there is none of its own
  std::array<const std::uint16_t*, kMaxPlanes + 1> tables{};  // by width: fp16 [row][2^width]; null where not offered
  const float* bias = nullptr;              // fp32, padded to whole tiles
  std::shared_ptr<const IntegerInput> input;  // of integer codes

  std::size_t row_bytes() const { return static_cast<std::size_t>((in + kWord - 1) / kWord) * (kWord / 8); }  // of a plane of tables

  // The grid that codes of that width are read on.
  const Grid& grid_at(int at_bits) const {
    const Grid& own = widths[static_cast<std::size_t>(at_bits)];
    return own ? own : grid;
  }
  // Bytes that a product reads of all tiles at a width (0: as stored).
  std::size_t read_bytes(int at_bits = 0) const;
};

// One row of activations, prepared for the matrices that read it.
struct Activation {
  const float* x = nullptr;              // fp32, padded as the grouping says
  const std::int8_t* q = nullptr;        // int8, likewise
  const std::uint16_t* b = nullptr;      // bf16, padded to an even length
  const float* scale = nullptr;          // per block: x = q * scale
  const float* sum = nullptr;            // per group: sum of x as the codes see it
  const std::uint8_t* active = nullptr;  // per block: 0 where every x is zero
  const std::int32_t* offset = nullptr;  // of integer products, likewise `scale`: per part
};

// Codes uint8 (out, in); scales fp16 or fp32 (out, groups); zeros uint8 (out, groups) or null; minima likewise.
struct GroupSource {
  const std::uint8_t* codes = nullptr;   // one byte a code, or
  const std::uint8_t* packed = nullptr;  // little-endian bit streams, one per row
  std::size_t packed_row = 0;
  const std::uint16_t* scales16 = nullptr;
  const float* scales32 = nullptr;
  const std::uint8_t* zeros = nullptr;
  const std::uint8_t* packed_zeros = nullptr;
  std::size_t packed_zeros_row = 0;
  const std::uint16_t* minima16 = nullptr;
  const float* minima32 = nullptr;
  int bits = 0, group = 0, block = kBlock;
  bool planes = false;
  bool by_row = false;
};

inline constexpr int kPieceChannels = 64;  // of one piece of a row

Matrix make_groups(Arena& arena, int out, int in, const GroupSource& source);
// Give planes a grid of their own at a width: scales fp16 (out, groups), and zero points (k + 2^(bits-1) - 1) / 2 from
// k (out, groups), packed as little-endian streams of `bits` bits, one per row.
void add_width(Arena& arena, Matrix& m, int bits, const std::uint16_t* scales16, const std::uint8_t* packed_zeros, std::size_t packed_zeros_row);
// Codes of tables: little-endian bit streams of `bits` bits, one per row; and the table of a width, fp16 (out, 2^bits).
Matrix make_tables(Arena& arena, int out, int in, int bits, const std::uint8_t* packed, std::size_t packed_row);
void add_table(Arena& arena, Matrix& m, int bits, const std::uint16_t* table);
Matrix make_f32(Arena& arena, int out, int in, const float* rows, bool by_row = false);
Matrix make_bf16(Arena& arena, int out, int in, const std::uint16_t* rows, bool by_row = false);

// One row of the matrix as the codes stand for it, fp32 (in); for embeddings.
void read_row(const Matrix& matrix, int row, float* to);

}  // namespace wb
