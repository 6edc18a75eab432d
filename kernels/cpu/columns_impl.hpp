// Products of weights that lie input by input with the inputs that are not left out.
#pragma once

#include "columns.hpp"
#include "lanes.hpp"

namespace wb {
namespace {

// Asks for the runs of a row's channels in the order they lie in memory, up to a block ahead of the one in use: what is
// further ahead has left the second cache again where runs are long. The lines are spread over the work: more at once
// than the processor keeps track of would make it wait.
template <class V>
class Ahead {
 public:
  Ahead(const Columns& w, const ColumnPart& part, const ActiveInputs& a) : w_(w), part_(part), a_(a), blocks_(w.at.n_blocks) {
    per_group_ = (w.at.stride + w.at.block - 1) / w.at.block;
    at_ = a.starts[0] * 4;
    run_lines_ = (static_cast<int>(part.stride) + 63) / 64 + (part.stride % 64 != 0);
    enter(0);
  }
  // Lines to ask for at each of `steps`, while a block is in use, to have asked for the next.
  int per_step(int block, int steps) const {
    const int next = std::min(block + 1, blocks_ - 1);
    const int lines = (a_.starts[next + 1] - a_.starts[next]) * 4 * run_lines_ + static_cast<int>(part_.header) / 64;
    return steps > 0 ? (lines + steps - 1) / steps : 0;
  }
  void all_of(int block) {
    while (block_ <= block && block_ < blocks_) line();
  }
  void lines(int n, int block) {
    for (; n > 0 && block_ <= block + 1 && block_ < blocks_; --n) line();
  }

 private:
  void line() {
    V::prefetch_far(p_);
    p_ += 64;
    if (p_ >= end_) next();
  }
  void enter(int block) {  // a block that has any channel, its group's header first
    for (block_ = block; block_ < blocks_ && a_.starts[block_ + 1] == a_.starts[block_]; ++block_) continue;
    if (block_ == blocks_) return;
    at_ = a_.starts[block_] * 4;
    stop_ = a_.starts[block_ + 1] * 4;
    if (part_.header > 0) aim(w_.group(part_, block_ / per_group_), part_.header);
    else aim(w_.channel(part_, static_cast<int>(a_.channels[at_++])), part_.stride);
  }
  void next() {
    if (at_ == stop_) enter(block_ + 1);
    else aim(w_.channel(part_, static_cast<int>(a_.channels[at_++])), part_.stride);
  }
  void aim(const std::uint8_t* run, std::size_t bytes) {
    p_ = reinterpret_cast<const std::uint8_t*>(reinterpret_cast<std::uintptr_t>(run) & ~std::uintptr_t{63});
    end_ = run + bytes;
  }

  const Columns& w_;
  const ColumnPart& part_;
  const ActiveInputs& a_;
  const int blocks_;
  int block_ = 0, at_ = 0, stop_ = 0, per_group_ = 1, run_lines_ = 1;
  const std::uint8_t *p_ = nullptr, *end_ = nullptr;
};

// Where the channels of a block lie, and what its group's outputs are scaled by.
struct ColumnBlock {
  const std::uint8_t* channels;  // of the group
  std::size_t stride;
  std::uint32_t first;           // channel of the group
  const std::uint16_t* scales;
  const std::uint8_t* zeros;     // null: 8
};

template <class V, bool Whole>
typename V::B column_bytes(const std::uint8_t* p, int lanes) {
  if constexpr (Whole) return V::bytes(p);
  else return V::bytes_part(p, lanes);
}

// Add a block's products to the sums of Q quads; the last has `lanes` granules.
template <class V, int Q, bool Whole>
void quads_int8(const ColumnBlock& b, const ActiveInputs& a, int block, int quad, int lanes, float* totals, Ahead<V>* ahead, int per_step) {
  using F = typename V::F;
  typename V::I sums[Q][kQuadParts];
  WB_UNROLL for (int i = 0; i < Q; ++i)
    WB_UNROLL for (int k = 0; k < kQuadParts; ++k) sums[i][k] = V::izero();
  const std::uint8_t* base = b.channels + 64 * quad;
  for (int f = a.starts[block]; f < a.starts[block + 1]; ++f) {
    const std::uint8_t* p[4];
    WB_UNROLL for (int c = 0; c < 4; ++c) p[c] = base + (a.channels[4 * f + c] - b.first) * b.stride;
    const std::int8_t* four = a.q + 4 * f;
    WB_UNROLL for (int i = 0; i < Q; ++i) {
      typename V::B v[4];
      V::interleave(column_bytes<V, Whole>(p[0] + 64 * i, lanes), column_bytes<V, Whole>(p[1] + 64 * i, lanes),
                    column_bytes<V, Whole>(p[2] + 64 * i, lanes), column_bytes<V, Whole>(p[3] + 64 * i, lanes), v);
      WB_UNROLL for (int k = 0; k < 4; ++k) {
        sums[i][k] = V::template dot<false>(sums[i][k], V::low4(v[k]), four);
        sums[i][4 + k] = V::template dot<false>(sums[i][4 + k], V::high4(v[k]), four);
      }
    }
    if (ahead != nullptr) ahead->lines(per_step, block);
  }
  const F step = V::set(a.scale[block]), sum = V::set(a.sum[block]);
  WB_UNROLL for (int i = 0; i < Q; ++i)
    WB_UNROLL for (int k = 0; k < kQuadParts; ++k) {
      const int width = 4 * (Whole ? 4 : lanes), o = kQuadOutputs * (quad + i) + width * k;
      float* to = totals + kQuadOutputs * (quad + i) + kRows * k;
      // Whole numbers below 2^24: the difference is exact.
      const F exact = V::fnma(b.zeros != nullptr ? V::load_u8(b.zeros + o) : V::set(8.0f), sum, V::to_float(sums[i][k]));
      V::store(to, V::fma(V::mul(V::load_fp16(b.scales + o), step), exact, V::load(to)));
    }
}

// The same with fp32 activations, one quad.
template <class V>
void quad_f32(const ColumnBlock& b, const ActiveInputs& a, int block, int quad, int lanes, float* totals) {
  using F = typename V::F;
  F sums[kQuadParts], zeros[kQuadParts];
  const int width = 4 * lanes;
  WB_UNROLL for (int k = 0; k < kQuadParts; ++k) {
    sums[k] = V::zero();
    zeros[k] = b.zeros != nullptr ? V::load_u8(b.zeros + kQuadOutputs * quad + width * k) : V::set(8.0f);
  }
  const std::uint8_t* base = b.channels + 64 * quad;
  for (int f = a.starts[block]; f < a.starts[block + 1]; ++f) {
    const std::uint8_t* p[4];
    for (int c = 0; c < 4; ++c) p[c] = base + (a.channels[4 * f + c] - b.first) * b.stride;
    typename V::B v[4];
    V::interleave(V::bytes_part(p[0], lanes), V::bytes_part(p[1], lanes), V::bytes_part(p[2], lanes), V::bytes_part(p[3], lanes), v);
    const float* x = a.x + 4 * f;
    const auto add = [&](typename V::B codes, int k) {
      sums[k] = V::fma(V::sub(V::template byte_lane<0>(codes), zeros[k]), V::set(x[0]), sums[k]);
      sums[k] = V::fma(V::sub(V::template byte_lane<1>(codes), zeros[k]), V::set(x[1]), sums[k]);
      sums[k] = V::fma(V::sub(V::template byte_lane<2>(codes), zeros[k]), V::set(x[2]), sums[k]);
      sums[k] = V::fma(V::sub(V::template byte_lane<3>(codes), zeros[k]), V::set(x[3]), sums[k]);
    };
    WB_UNROLL for (int k = 0; k < 4; ++k) add(V::low4(v[k]), k), add(V::high4(v[k]), 4 + k);
  }
  WB_UNROLL for (int k = 0; k < kQuadParts; ++k) {
    float* to = totals + kQuadOutputs * quad + kRows * k;
    V::store(to, V::fma(V::load_fp16(b.scales + kQuadOutputs * quad + width * k), sums[k], V::load(to)));
  }
}

// Put the sums of one row where its linears' outputs go. `order`: in the order of the part's outputs, with room for 16 more.
inline void put_columns(const Columns& w, const ColumnPart& part, const float* order, const float* const* bias, float* const* to, bool add) {
  for (int i = 0; i < part.granules; ++i) {
    const Columns::Rows& rows = w.granules[static_cast<std::size_t>(part.first + i)];
    float* y = to[rows.linear] + rows.row;
    const float* from = order + kGranule * i;
    const float* plus = bias[rows.linear] != nullptr ? bias[rows.linear] + rows.row : nullptr;
    for (int r = 0; r < rows.count; ++r) {
      const float value = plus != nullptr ? from[r] + plus[r] : from[r];
      y[r] = add ? y[r] + value : value;
    }
  }
}

constexpr int kAheadRows = 4;  // rows whose channels are asked for ahead; with more of them, most channels are read anyway

template <class V>
void columns_groups(const Columns& w, const ColumnPart& part, const ActiveInputs* x, int n, const float* const* bias, float* const* const* y, bool add) {
  const int quads = part.quads(), tail = part.granules % 4, width = quads * kQuadOutputs;
  thread_local std::vector<float> room;
  room.assign(static_cast<std::size_t>(n + 1) * static_cast<std::size_t>(width) + 64, 0.0f);
  std::vector<Ahead<V>> ahead;
  ahead.reserve(kAheadRows);
  if (n <= kAheadRows)
    for (int r = 0; r < n; ++r) ahead.emplace_back(w, part, x[r]), ahead.back().all_of(0);
  int block = 0;
  for (int g = 0; g < w.at.n_groups; ++g) {
    const std::uint8_t* group = w.group(part, g);
    const ColumnBlock b{group + part.header, part.stride, static_cast<std::uint32_t>(g * w.at.group), reinterpret_cast<const std::uint16_t*>(group),
                        w.zeros ? group + 2 * part.outputs() : nullptr};
    for (int from = 0; from < w.at.width(g); from += w.at.block, ++block)
      for (int r = 0; r < n; ++r) {
        const ActiveInputs& a = x[r];
        const int fours = a.starts[block + 1] - a.starts[block];
        if (fours == 0) continue;
        float* totals = room.data() + static_cast<std::size_t>(r) * static_cast<std::size_t>(width);
        if (a.q == nullptr) {
          for (int quad = 0; quad < quads; ++quad) quad_f32<V>(b, a, block, quad, quad + 1 == quads && tail != 0 ? tail : 4, totals);
          continue;
        }
        Ahead<V>* asking = n <= kAheadRows ? &ahead[static_cast<std::size_t>(r)] : nullptr;
        const int whole = tail != 0 ? quads - 1 : quads;
        const int per_step = asking != nullptr ? asking->per_step(block, fours * (whole / 2 + whole % 2 + (tail != 0))) : 0;
        int quad = 0;
        for (; quad + 2 <= whole; quad += 2) quads_int8<V, 2, true>(b, a, block, quad, 4, totals, asking, per_step);
        if (quad < whole) quads_int8<V, 1, true>(b, a, block, quad, 4, totals, asking, per_step), ++quad;
        if (quad < quads) quads_int8<V, 1, false>(b, a, block, quad, tail, totals, asking, per_step);
      }
  }
  // A last quad of fewer granules fills the first lanes of each register: pushed together, they are in order.
  for (int r = 0; r < n; ++r) {
    float* totals = room.data() + static_cast<std::size_t>(r) * static_cast<std::size_t>(width);
    if (tail != 0)
      for (int k = 1; k < kQuadParts; ++k) std::memmove(totals + kQuadOutputs * (quads - 1) + 4 * tail * k, totals + kQuadOutputs * (quads - 1) + kRows * k, 16 * static_cast<std::size_t>(tail));
    put_columns(w, part, totals, bias, y[r], add);
  }
}

// Add the products of the four channels at each of `from` .. `to` in a row's list. Whole runs, so that memory is read in
// order; the sums wait in the first cache. `ahead`: how many fours further on runs are asked for, 0 for none.
template <class V>
void fours_bf16(const ColumnPart& part, const ActiveInputs& a, int from, int to, int end, int ahead, float* totals) {
  const auto run = [&](int i) { return part.base + static_cast<std::size_t>(a.channels[i]) * part.stride; };
  for (int f = from; f < to; ++f) {
    const std::uint8_t *p[4], *next[4];
    typename V::F x[4];
    const bool asks = ahead > 0 && f + ahead < end;
    WB_UNROLL for (int c = 0; c < 4; ++c) {
      p[c] = run(4 * f + c);
      x[c] = V::set(a.x[4 * f + c]);
      next[c] = asks ? run(4 * (f + ahead) + c) : nullptr;
    }
    for (int i = 0; i < part.granules; ++i) {
      float* at = totals + kGranule * i;
      typename V::F low = V::load(at), high = V::load(at + kRows);
      WB_UNROLL for (int c = 0; c < 4; ++c) {
        const auto pairs = V::bytes(p[c] + 64 * i);
        low = V::fma(V::bf16_low(pairs), x[c], low);
        high = V::fma(V::bf16_high(pairs), x[c], high);
      }
      V::store(at, low);
      V::store(at + kRows, high);
      if (asks)
        WB_UNROLL for (int c = 0; c < 4; ++c) V::prefetch_far(next[c] + 64 * i);
    }
  }
}

template <class V>
void columns_bf16(const Columns& w, const ColumnPart& part, const ActiveInputs* x, int n, const float* const* bias, float* const* const* y, bool add) {
  constexpr std::size_t kAheadBytes = 8192;
  thread_local std::vector<float> room;
  const auto width = static_cast<std::size_t>(part.outputs());
  room.assign(static_cast<std::size_t>(n) * width, 0.0f);
  const int ahead = n <= kAheadRows ? static_cast<int>((kAheadBytes + 4 * part.stride - 1) / (4 * part.stride)) : 0;
  for (int r = 0; ahead > 0 && r < n; ++r)
    for (int i = 0; i < std::min(4 * ahead, 4 * x[r].starts[w.at.n_blocks]); ++i)
      for (std::size_t line = 0; line < part.stride; line += 64) V::prefetch_far(part.base + static_cast<std::size_t>(x[r].channels[i]) * part.stride + line);
  for (int block = 0; block < w.at.n_blocks; ++block)  // rows take turns while a block's channels are in the cache
    for (int r = 0; r < n; ++r)
      fours_bf16<V>(part, x[r], x[r].starts[block], x[r].starts[block + 1], x[r].starts[w.at.n_blocks], ahead, room.data() + static_cast<std::size_t>(r) * width);
  for (int r = 0; r < n; ++r) put_columns(w, part, room.data() + static_cast<std::size_t>(r) * width, bias, y[r], add);
}

template <class V>
void columns(const Columns& w, const ColumnPart& part, const ActiveInputs* x, int n, const float* const* bias, float* const* const* y, bool add) {
  if (part.granules == 0 || n == 0) return;
  if (w.nibbles) columns_groups<V>(w, part, x, n, bias, y, add);
  else columns_bf16<V>(w, part, x, n, bias, y, add);
}

}  // namespace
}  // namespace wb
