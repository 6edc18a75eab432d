// The second matrix of a predictor: int8 rows of many outputs over few hidden units, hidden unit by hidden unit, so that what
// the units that are zero (of a ReLU, often half of them) would be multiplied with is not read.
//
// Outputs are cut into chunks of a page of bytes. Of a chunk each hidden unit's codes lie side by side, a run that is long
// enough to be read like a stream. Within 64 outputs they lie so that four units' interleaved bytes are in order: output
// 16 k + 4 l + d is byte 16 l + 4 k + d.
#pragma once

#include <algorithm>
#include <cstdint>

#include "memory.hpp"

namespace wb {

inline constexpr int kScoreGranule = 64;   // outputs that are summed at once
inline constexpr int kScoreChunk = 4096;   // outputs whose sums wait in the first cache (16 KB), and bytes of a run

struct ScoreMatrix {
  int out = 0, in = 0;
  int granules = 0;
  const std::int8_t* codes = nullptr;      // [chunk][unit][outputs of the chunk]
  const float* steps = nullptr;            // padded to granules
  const float* mean = nullptr;

  int padded() const { return granules * kScoreGranule; }
  // Outputs of the chunk that `first` is in.
  int chunk_outputs(int first) const { return std::min(kScoreChunk, padded() - first / kScoreChunk * kScoreChunk); }
  // Codes of a hidden unit for the outputs from `first` on, a whole number of granules.
  const std::int8_t* run(int first, int unit) const {
    const int chunk = first / kScoreChunk * kScoreChunk;
    return codes + static_cast<std::size_t>(chunk) * static_cast<std::size_t>(in) +
           static_cast<std::size_t>(unit) * static_cast<std::size_t>(chunk_outputs(first)) + (first - chunk);
  }
};

// The hidden units of one row that are not zero, rounded: h = q * scale. Filled up to a multiple of four by units whose q is 0.
struct ActiveUnits {
  const std::int32_t* units = nullptr;
  const std::int8_t* q = nullptr;          // 0 to 127
  int fours = 0;
  float scale = 0;                         // NaN where a hidden unit is no number
};

// Codes int8 (out, in), steps and means fp32 (out).
ScoreMatrix make_scores(Arena& arena, int out, int in, const std::int8_t* codes, const float* steps, const float* mean);

}  // namespace wb
