// Weights input by input: for every input channel what all outputs multiply it by lies side by side, so that the memory
// of a channel whose input is left out is not touched. Linears that read the same inputs lie in one such matrix.
//
// Outputs are cut into granules of 32, and granules are shared out among the threads: each thread's lie apart from the
// others', group after group of channels:
//
//   of a group      fp16 scales of the part's outputs, their zero points (uint8) where there are any; padded to 64 bytes
//   of a channel    nibbles: 16 bytes a granule. Four granules are a quad, whose 64 bytes of four channels are interleaved
//                   before they are multiplied; outputs lie so that the interleaved bytes are in order (see `place_of`).
//                   bf16: 64 bytes a granule, word 2 i is output i and word 2 i + 1 output 16 + i.
//
// Which channels are taken is known before the product. So their runs are asked for ahead of their use and nothing else
// is, into the second cache and not the first: what goes into the first trains prefetchers that fetch the gaps too
// (docs/notes/sparsity.md). Activations have one scale for each block of up to 64 channels within a group.
#pragma once

#include <cstdint>
#include <vector>

#include "matrix.hpp"

namespace wb {

inline constexpr int kGranule = 32;                   // outputs
inline constexpr int kQuadOutputs = 4 * kGranule;            // outputs of four granules
inline constexpr int kQuadParts = kQuadOutputs / kRows;      // registers of sums that they take

struct ColumnPart {
  int first = 0, granules = 0;
  const std::uint8_t* base = nullptr;
  std::size_t stride = 0, header = 0;                 // bytes of a channel, and before the channels of a group
  int outputs() const { return granules * kGranule; }
  int quads() const { return (granules + 3) / 4; }
};

struct Columns {
  // The rows of a granule: `count` of linear `linear`, from `row` on.
  struct Rows {
    int linear = 0, row = 0, count = 0;
  };

  bool nibbles = true;                                // else bf16, in one group
  int in = 0;
  Grouping at;
  bool zeros = false;                                 // else every zero point is 8
  std::vector<ColumnPart> parts;                      // one for every thread, some of them empty
  std::vector<Rows> granules;

  const std::uint8_t* group(const ColumnPart& part, int g) const {
    return part.base + static_cast<std::size_t>(g) * (part.header + static_cast<std::size_t>(at.group) * part.stride);
  }
  const std::uint8_t* channel(const ColumnPart& part, int c) const {
    return group(part, c / at.group) + part.header + static_cast<std::size_t>(c % at.group) * part.stride;
  }
  double group_bytes() const;                         // of the headers of one group
  double channel_bytes() const;
};

// The channels of one row that are not zero, block after block, each block filled up to a multiple of four.
struct ActiveInputs {
  const std::uint32_t* channels = nullptr;
  const std::int32_t* starts = nullptr;               // of every block, in fours; and the end
  const std::int8_t* q = nullptr;                     // of every channel in the list, or
  const float* x = nullptr;
  const float* scale = nullptr;                       // per block: x = q * scale
  const float* sum = nullptr;                         // per block, of q or x
  int count = 0, groups = 0;                          // channels without filling, and groups that have any
};

// One of the linears that a matrix of columns is made of: nibbles with scales and zero points, or bf16.
struct ColumnSource {
  int out = 0;
  const std::uint8_t* packed = nullptr;               // 4-bit streams, one per row
  std::size_t packed_row = 0;
  const std::uint16_t* scales = nullptr;              // fp16 (out, groups)
  const std::uint8_t* packed_zeros = nullptr;         // or null, for all of them alike
  std::size_t packed_zeros_row = 0;
  const std::uint16_t* rows = nullptr;                // bf16 (out, in)
};

// Of linears that read the same inputs, for `threads`. `paired`: two of equal size, whose granules alternate, so that a
// thread that has outputs of one has the same of the other.
Columns make_columns(Arena& arena, int in, int group, const std::vector<ColumnSource>& sources, int threads, bool paired);

// List the non-zero of q (laid out as `at` says, with the scale of every block; a scale that is no number is one channel's
// too) or, where q is null, of x (in). Room for in + 3 * n_blocks + 1 channels.
ActiveInputs list_active(const Grouping& at, const std::int8_t* q, const float* scale, const float* x, std::uint32_t* channels, std::int32_t* starts,
                         std::int8_t* q_to, float* x_to, float* sum);

}  // namespace wb
