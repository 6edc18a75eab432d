// Sums of a predictor's hidden units, and their scores held against thresholds.
#pragma once

#include "lanes.hpp"
#include "scores.hpp"

namespace wb {
namespace {

// Add 4 Fours hidden units, from run[i] on, to the sums of n granules; ask for what lies at next[i] meanwhile, if anything.
template <class V, int Fours>
void add_units(const std::int8_t* const* run, const std::int8_t* q, const std::int8_t* const* next, int n, std::int32_t* sums) {
  std::int8_t four[4 * Fours];  // the compiler need not fear that sums are stored over it
  std::memcpy(four, q, sizeof four);
  for (int g = 0; g < n; ++g, sums += kScoreGranule) {
    const std::size_t at = static_cast<std::size_t>(g) * kScoreGranule;
    typename V::I of[4];
    WB_UNROLL for (int k = 0; k < 4; ++k) of[k] = V::iload(sums + kRows * k);
    WB_UNROLL for (int f = 0; f < Fours; ++f) {
      const auto bytes = [&](int i) { return V::bytes(reinterpret_cast<const std::uint8_t*>(run[4 * f + i] + at)); };
      typename V::B v[4];
      V::interleave(bytes(0), bytes(1), bytes(2), bytes(3), v);
      WB_UNROLL for (int k = 0; k < 4; ++k) of[k] = V::dot_signed(of[k], v[k], four + 4 * f);
    }
    WB_UNROLL for (int k = 0; k < 4; ++k) V::istore(sums + kRows * k, of[k]);
    if (next != nullptr)
      WB_UNROLL for (int i = 0; i < 4 * Fours; ++i) V::prefetch_far(next[i] + at);
  }
}

// Sums over the hidden units of a row for outputs [first, last): whole granules of one chunk. `end`: up to where the caller
// goes on, whose beginning is asked for ahead; `last` for nothing.
template <class V>
void score_sums(const ScoreMatrix& w, const ActiveUnits& x, int first, int last, int end, std::int32_t* sums) {
  const int n = (last - first) / kScoreGranule;
  std::fill(sums, sums + (last - first), 0);
  const std::int8_t *run[8], *next[8];
  for (int f = 0; f < x.fours;) {
    const int fours = std::min(2, x.fours - f);
    const bool more = f + fours < x.fours;
    const int from = more ? first : last, other = more ? f + fours : 0;
    const bool asks = more ? end > first : end > last;
    for (int i = 0; i < 4 * fours; ++i) {
      run[i] = w.run(first, x.units[4 * f + i]);
      // Fewer follow than are taken now, at the end of the list: its last are asked for twice.
      if (asks) next[i] = w.run(from, x.units[std::min(4 * other + i, 4 * x.fours - 1)]);
    }
    if (fours == 2) add_units<V, 2>(run, x.q + 4 * f, asks ? next : nullptr, n, sums);
    else add_units<V, 1>(run, x.q + 4 * f, asks ? next : nullptr, n, sums);
    f += fours;
  }
}

// to[i] = 1 where the score of output first + i, from its sum, is above the threshold, else 0.
template <class V>
void scores_above(const ScoreMatrix& w, float scale, const std::int32_t* sums, int first, int n, float threshold, std::uint8_t* to) {
  const auto by = V::set(scale), cut = V::set(threshold);
  const auto sixteen = [&](int i, std::uint8_t* out) {
    const auto score = V::add(V::mul(V::mul(V::to_float(V::iload(sums + i)), by), V::load(w.steps + first + i)), V::load(w.mean + first + i));
    V::store_above(out, score, cut);
  };
  int i = 0;
  for (; i + 16 <= n; i += 16) sixteen(i, to + i);
  if (i < n) {
    std::uint8_t part[16];
    sixteen(i, part);
    std::copy(part, part + (n - i), to + i);
  }
}

}  // namespace
}  // namespace wb
