// The kernels, written once over sixteen lanes; each instruction set compiles this file with its own lanes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels.hpp"

namespace wb {
namespace {

// Loops over the rows of a block: their sums must stay in registers, which needs the loops gone. Only where there are
// registers for them: elsewhere it would cost minutes of compiling for nothing.
#if defined(__GNUC__) && defined(__AVX512F__)
#define WB_UNROLL _Pragma("GCC unroll 16")
#else
#define WB_UNROLL
#endif

// How far ahead of the weights in use the next ones are asked for: about what arrives while a cache miss is served.
constexpr std::size_t kAhead = 3072;

// Codes of a packed chunk: four parts of four channels each.
template <class V, int Bits>
struct Packed {
  static constexpr int step = Bits * kRows * kChunk / 8;
  static constexpr bool wide = Bits == 8;
  const std::uint8_t* p;

  Packed(const Matrix& w, int tile) : p(w.codes + static_cast<std::size_t>(tile) * w.tile_bytes) {}
  static float lift(const Matrix&) { return 1; }
  void skip(int chunks) { p += static_cast<std::size_t>(chunks) * step; }
  void chunk(typename V::B* v) const {
    v[0] = part<0>();
    v[1] = part<1>();
    v[2] = part<2>();
    v[3] = part<3>();
  }
  void prefetch() const {
    for (int at = 0; at < step; at += 64) V::prefetch(p + kAhead + at);
  }
  template <int M>
  typename V::B part() const {
    if constexpr (Bits == 8) {
      return V::bytes(p + 64 * M);
    } else {
      constexpr bool nibbles = Bits >= 4, crumbs = Bits == 2 || Bits == 3 || Bits == 6 || Bits == 7;
      constexpr int crumb_bit = nibbles ? 4 : 0, plane_bit = crumb_bit + (crumbs ? 2 : 0);
      constexpr int crumbs_at = nibbles ? 128 : 0, plane_at = crumbs_at + (crumbs ? 64 : 0);
      typename V::B codes;
      if constexpr (nibbles) {
        const auto both = V::bytes(p + 64 * (M / 2));
        codes = M % 2 == 0 ? V::low4(both) : V::high4(both);
        if constexpr (crumbs) codes = V::either(codes, V::template crumb<M, crumb_bit>(V::bytes(p + crumbs_at)));
      } else {
        codes = V::template crumb<M, 0>(V::bytes(p));
      }
      if constexpr (Bits == 3 || Bits == 5 || Bits == 7) codes = V::add_plane(codes, p + plane_at + 8 * M, 1 << plane_bit);
      return codes;
    }
  }
};

// The top N planes, each from its own array, as codes of their own width: `lift` of the parent's steps make one of theirs.
template <class V, int N>
struct Planes {
  static constexpr bool wide = N == 8;
  static constexpr int step = kRows * kChunk / 8;
  const std::uint8_t* p[N];

  Planes(const Matrix& w, int tile) {
    WB_UNROLL for (int j = 0; j < N; ++j)
      p[j] = w.codes + w.plane_bytes * static_cast<std::size_t>(j) + static_cast<std::size_t>(tile) * w.tile_bytes;
  }
  static float lift(const Matrix& w) { return static_cast<float>(1 << (w.bits - N)); }
  void skip(int chunks) {
    WB_UNROLL for (int j = 0; j < N; ++j) p[j] += static_cast<std::size_t>(chunks) * step;
  }
  void prefetch() const {
    WB_UNROLL for (int j = 0; j < N; ++j) V::prefetch(p[j] + kAhead / 4);
  }
  void chunk(typename V::B* v) const {
    if constexpr (V::transposes_planes) {
      V::template transpose_planes<N>(p, v);
    } else {
      WB_UNROLL for (int m = 0; m < 4; ++m) {
        v[m] = V::bzero();
        WB_UNROLL for (int j = 0; j < N; ++j) v[m] = V::add_plane(v[m], p[j] + 8 * m, 1 << (N - 1 - j));
      }
    }
  }
};

// How a matrix's codes are read at a width: its grid, and how many of the grid's steps one of the codes' is (planes read
// at fewer bits on the parent's grid). Lifts are powers of two: nothing is rounded.
template <class V, class Codes>
struct Reading {
  const Grid& grid;
  const float lift;

  Reading(const Matrix& w, int bits) : grid(w.grid_at(bits)), lift(&grid == &w.grid ? Codes::lift(w) : 1.0f) {}
  typename V::F scale(std::size_t lane) const {
    return V::mul(grid.scales16 != nullptr ? V::load_fp16(grid.scales16 + lane) : V::load(grid.scales32 + lane), V::set(lift));
  }
  typename V::F zero(std::size_t lane) const {
    const auto base = V::set(grid.zero);
    const auto zero = grid.zeros != nullptr ? V::fma(V::load_u8(grid.zeros + lane), V::set(grid.step), base) : base;
    return V::mul(zero, V::set(1.0f / lift));
  }
  typename V::F minimum(std::size_t lane) const {
    return grid.minima16 != nullptr ? V::load_fp16(grid.minima16 + lane) : V::load(grid.minima32 + lane);
  }
};

template <class V, int N>
void put(const Matrix& w, int tile, const typename V::F* total, float* const* y, bool add) {
  WB_UNROLL for (int n = 0; n < N; ++n) {
    float* to = y[n] + static_cast<std::size_t>(tile) * kRows;
    auto value = total[n];
    if (w.bias != nullptr) value = V::add(value, V::load(w.bias + static_cast<std::size_t>(tile) * kRows));
    V::store(to, add ? V::add(V::load(to), value) : value);
  }
}

// Four rows of four times four bytes become four columns, `stride` bytes apart.
inline void transpose_fours(const std::int8_t* const (&rows)[4], char* to, std::size_t stride) {
#if defined(__GNUC__)
  typedef std::int32_t Fours __attribute__((vector_size(16)));
  Fours a, b, c, d;
  std::memcpy(&a, rows[0], 16), std::memcpy(&b, rows[1], 16), std::memcpy(&c, rows[2], 16), std::memcpy(&d, rows[3], 16);
  const Fours ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Fours AB = __builtin_shufflevector(a, b, 2, 6, 3, 7), CD = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(ab, cd, 0, 1, 4, 5), b = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  c = __builtin_shufflevector(AB, CD, 0, 1, 4, 5), d = __builtin_shufflevector(AB, CD, 2, 3, 6, 7);
  std::memcpy(to, &a, 16), std::memcpy(to + stride, &b, 16), std::memcpy(to + 2 * stride, &c, 16), std::memcpy(to + 3 * stride, &d, 16);
#else
  for (std::size_t i = 0; i < 4; ++i)
    for (std::size_t n = 0; n < 4; ++n) std::memcpy(to + i * stride + 4 * n, rows[n] + 4 * i, 4);
#endif
}

// The int8 activations of N rows side by side: one address serves all of them, and a product takes its four from memory.
template <int N>
struct Panel {
  const std::int8_t* q;    // [channels / 4][N][4]
  const float* scale;      // [blocks][N]
  const float* sum;        // [groups][N]
  const std::uint8_t* active;

  Panel(const Grouping& at, const Activation* x) {
    if constexpr (N == 1) {
      q = x->q, scale = x->scale, sum = x->sum, active = x->active;
    } else {
      const auto tables = static_cast<std::size_t>(at.n_blocks + at.n_groups), fours = static_cast<std::size_t>(at.padded) / 4;
      thread_local std::vector<std::uint32_t> room;
      if (room.size() < N * (fours + tables)) room.resize(N * (fours + tables));
      auto* to = reinterpret_cast<char*>(room.data());
      auto* scales = reinterpret_cast<float*>(room.data() + N * fours);
      float* sums = scales + N * at.n_blocks;
      if constexpr (N % 4 == 0) {
        for (std::size_t n = 0; n < N; n += 4)
          for (std::size_t i = 0; i < fours; i += 4)  // padded to whole chunks: fours is a multiple of 4
            transpose_fours({x[n].q + 4 * i, x[n + 1].q + 4 * i, x[n + 2].q + 4 * i, x[n + 3].q + 4 * i}, to + 4 * (N * i + n), 4 * N);
      } else {
        for (std::size_t n = 0; n < N; ++n)
          for (std::size_t i = 0; i < fours; ++i) std::memcpy(to + 4 * (N * i + n), x[n].q + 4 * i, 4);
      }
      for (std::size_t n = 0; n < N; ++n) {
        for (int i = 0; i < at.n_blocks; ++i) scales[N * i + n] = x[n].scale[i];
        for (int i = 0; i < at.n_groups; ++i) sums[N * i + n] = x[n].sum[i];
      }
      q = reinterpret_cast<const std::int8_t*>(to), scale = scales, sum = sums, active = nullptr;
    }
  }
};

template <class V, class Codes, int N>
void tile_int8(const Matrix& w, int bits, const Panel<N>& x, float* const* y, bool add, int tile) {
  using F = typename V::F;
  // One row alone would wait for each integer sum in turn; more sums hide that.
  constexpr int K = N == 1 ? 4 : N == 2 ? 2 : 1;
  const Grouping& at = w.grouping;
  const Reading<V, Codes> reading(w, bits);
  const bool minima = reading.grid.has_minima();
  Codes codes(w, tile);
  F total[N];
  WB_UNROLL for (int n = 0; n < N; ++n) total[n] = V::zero();
  std::size_t lane = static_cast<std::size_t>(tile) * at.n_groups * kRows;
  const std::int8_t* q = x.q;
  int block = 0;
  for (int g = 0; g < at.n_groups; ++g, lane += kRows) {
    F part[N];
    WB_UNROLL for (int n = 0; n < N; ++n) part[n] = V::zero();
    bool any = N > 1;
    const int width = at.width(g);
    for (int left = width; left > 0; left -= at.block, ++block) {
      const int chunks = std::min(left, at.block) / kChunk;
      if (N == 1 && x.active[block] == 0) {
        codes.skip(chunks);
        q += chunks * kChunk;
        continue;
      }
      any = true;
      typename V::I sums[N][K];
      WB_UNROLL for (int n = 0; n < N; ++n)
        WB_UNROLL for (int k = 0; k < K; ++k) sums[n][k] = V::izero();
      for (int c = 0; c < chunks; ++c, q += N * kChunk) {
        if constexpr (N <= 2) codes.prefetch();
        typename V::B v[4];
        codes.chunk(v);
        WB_UNROLL for (int m = 0; m < 4; ++m)
          WB_UNROLL for (int n = 0; n < N; ++n)
            sums[n][m % K] = V::template dot<Codes::wide>(sums[n][m % K], v[m], q + 4 * (N * m + n));
        codes.skip(1);
      }
      WB_UNROLL for (int n = 0; n < N; ++n) {
        auto sum = sums[n][0];
        for (int k = 1; k < K; ++k) sum = V::iadd(sum, sums[n][k]);
        part[n] = V::fma(V::to_float(sum), V::set(x.scale[N * block + n]), part[n]);
      }
    }
    if (!any) continue;
    const F scale = reading.scale(lane);
    if (minima) {
      const F minimum = reading.minimum(lane);
      WB_UNROLL for (int n = 0; n < N; ++n)
        total[n] = V::fma(minimum, V::set(x.sum[N * g + n]), V::fma(scale, part[n], total[n]));
    } else {
      const F zero = reading.zero(lane);
      WB_UNROLL for (int n = 0; n < N; ++n)
        total[n] = V::fma(scale, V::fnma(zero, V::set(x.sum[N * g + n]), part[n]), total[n]);
    }
  }
  put<V, N>(w, tile, total, y, add);
}

template <class V, int N>
void part_f32(typename V::B v, typename V::F zero, const Activation* x, int channel, typename V::F* sums) {
  const auto one = [&](auto k) {
    const auto code = V::sub(V::template byte_lane<k.value>(v), zero);
    WB_UNROLL for (int n = 0; n < N; ++n) sums[n] = V::fma(code, V::set(x[n].x[channel + k.value]), sums[n]);
  };
  one(std::integral_constant<int, 0>());
  one(std::integral_constant<int, 1>());
  one(std::integral_constant<int, 2>());
  one(std::integral_constant<int, 3>());
}

template <class V, class Codes, int N>
void tile_f32(const Matrix& w, int bits, const Activation* x, float* const* y, bool add, int tile) {
  using F = typename V::F;
  const Grouping& at = w.grouping;
  const Reading<V, Codes> reading(w, bits);
  const bool minima = reading.grid.has_minima();
  Codes codes(w, tile);
  F total[N];
  WB_UNROLL for (int n = 0; n < N; ++n) total[n] = V::zero();
  std::size_t lane = static_cast<std::size_t>(tile) * at.n_groups * kRows;
  int channel = 0, block = 0;
  for (int g = 0; g < at.n_groups; ++g, lane += kRows) {
    const F zero = minima ? V::zero() : reading.zero(lane);
    F part[N];
    WB_UNROLL for (int n = 0; n < N; ++n) part[n] = V::zero();
    for (int left = at.width(g); left > 0; left -= at.block, ++block) {
      const int chunks = std::min(left, at.block) / kChunk;
      if (N == 1 && x[0].active[block] == 0) {
        codes.skip(chunks);
        channel += chunks * kChunk;
        continue;
      }
      for (int c = 0; c < chunks; ++c, channel += kChunk) {
        typename V::B v[4];
        codes.chunk(v);
        for (int m = 0; m < 4; ++m) part_f32<V, N>(v[m], zero, x, channel + 4 * m, part);
        codes.skip(1);
      }
    }
    const F scale = reading.scale(lane);
    WB_UNROLL for (int n = 0; n < N; ++n) total[n] = V::fma(scale, part[n], total[n]);
    if (minima) {
      const F minimum = reading.minimum(lane);
      WB_UNROLL for (int n = 0; n < N; ++n) total[n] = V::fma(minimum, V::set(x[n].sum[g]), total[n]);
    }
  }
  put<V, N>(w, tile, total, y, add);
}

// Dense weights. Two sums each, so that a product does not wait for the one before it.
template <class V, int N>
void tile_dense_f32(const Matrix& w, int, const Activation* x, float* const* y, bool add, int tile) {
  using F = typename V::F;
  F total[N][2];
  WB_UNROLL for (int n = 0; n < N; ++n) total[n][0] = total[n][1] = V::zero();
  const std::uint8_t* base = w.codes + static_cast<std::size_t>(tile) * w.tile_bytes;
  const int even = w.in & ~1;
  if (w.kind == Kind::f32) {
    const auto* p = reinterpret_cast<const float*>(base);
    for (int c = 0; c < even; c += 2, p += 2 * kRows) {
      if constexpr (N <= 2) V::prefetch(reinterpret_cast<const std::uint8_t*>(p) + kAhead), V::prefetch(reinterpret_cast<const std::uint8_t*>(p) + kAhead + 64);
      const F a = V::load(p), b = V::load(p + kRows);
      WB_UNROLL for (int n = 0; n < N; ++n) {
        total[n][0] = V::fma(a, V::set(x[n].x[c]), total[n][0]);
        total[n][1] = V::fma(b, V::set(x[n].x[c + 1]), total[n][1]);
      }
    }
    if (even < w.in)
      WB_UNROLL for (int n = 0; n < N; ++n) total[n][0] = V::fma(V::load(p), V::set(x[n].x[even]), total[n][0]);
  } else {
    for (int c = 0; c < even; c += 2, base += 64) {
      const auto pair = V::bytes(base);
      const F a = V::bf16_low(pair), b = V::bf16_high(pair);
      WB_UNROLL for (int n = 0; n < N; ++n) {
        total[n][0] = V::fma(a, V::set(x[n].x[c]), total[n][0]);
        total[n][1] = V::fma(b, V::set(x[n].x[c + 1]), total[n][1]);
      }
    }
    if (even < w.in) {
      const F a = V::bf16_low(V::bytes(base));
      WB_UNROLL for (int n = 0; n < N; ++n) total[n][0] = V::fma(a, V::set(x[n].x[even]), total[n][0]);
    }
  }
  F sums[N];
  WB_UNROLL for (int n = 0; n < N; ++n) sums[n] = V::add(total[n][0], total[n][1]);
  put<V, N>(w, tile, sums, y, add);
}

template <class V, int N>
void tile_dense_bf16(const Matrix& w, int, const Activation* x, float* const* y, bool add, int tile) {
  using F = typename V::F;
  F total[N][2];
  WB_UNROLL for (int n = 0; n < N; ++n) total[n][0] = total[n][1] = V::zero();
  const std::uint8_t* p = w.codes + static_cast<std::size_t>(tile) * w.tile_bytes;
  const int pairs = (w.in + 1) / 2;
  int c = 0;
  for (; c + 1 < pairs; c += 2, p += 128) {
    if constexpr (N <= 2) V::prefetch(p + kAhead), V::prefetch(p + kAhead + 64);
    const auto a = V::bytes(p), b = V::bytes(p + 64);
    WB_UNROLL for (int n = 0; n < N; ++n) {
      total[n][0] = V::dot_bf16(total[n][0], a, x[n].b + 2 * c);
      total[n][1] = V::dot_bf16(total[n][1], b, x[n].b + 2 * c + 2);
    }
  }
  if (c < pairs)
    WB_UNROLL for (int n = 0; n < N; ++n) total[n][0] = V::dot_bf16(total[n][0], V::bytes(p), x[n].b + 2 * c);
  F sums[N];
  WB_UNROLL for (int n = 0; n < N; ++n) sums[n] = V::add(total[n][0], total[n][1]);
  put<V, N>(w, tile, sums, y, add);
}

// Rows are taken in the largest blocks that the registers hold: each block unpacks a tile's weights once.
#define WB_FOR_ROWS(CALL)                                                    \
  for (int tile = first; tile < last; ++tile) {                              \
    int i = 0;                                                               \
    for (; i + 8 <= n; i += 8) CALL(8)(w, bits, x + i, y + i, add, tile);    \
    if (i + 4 <= n) {                                                        \
      CALL(4)(w, bits, x + i, y + i, add, tile);                             \
      i += 4;                                                                \
    }                                                                        \
    if (i + 2 <= n) {                                                        \
      CALL(2)(w, bits, x + i, y + i, add, tile);                             \
      i += 2;                                                                \
    }                                                                        \
    if (i < n) CALL(1)(w, bits, x + i, y + i, add, tile);                    \
  }

#define WB_PRODUCT_ARGUMENTS \
  const Matrix &w, int bits, const Activation *x, int n, float *const *y, bool add, int first, int last

template <class V, class Codes, int N>
void panel_int8(const Matrix& w, int bits, const Activation* x, float* const* y, bool add, int first, int last) {
  const Panel<N> panel(w.grouping, x);
  for (int tile = first; tile < last; ++tile) tile_int8<V, Codes, N>(w, bits, panel, y, add, tile);
}

template <class V, class Codes>
void rows_int8(WB_PRODUCT_ARGUMENTS) {
  // Twelve sums and twelve parts are what 32 registers hold besides the weights.
  for (; n >= 12; n -= 12, x += 12, y += 12) panel_int8<V, Codes, 12>(w, bits, x, y, add, first, last);
  if (n >= 8) panel_int8<V, Codes, 8>(w, bits, x, y, add, first, last), n -= 8, x += 8, y += 8;
  if (n >= 4) panel_int8<V, Codes, 4>(w, bits, x, y, add, first, last), n -= 4, x += 4, y += 4;
  if (n >= 2) panel_int8<V, Codes, 2>(w, bits, x, y, add, first, last), n -= 2, x += 2, y += 2;
  if (n >= 1) panel_int8<V, Codes, 1>(w, bits, x, y, add, first, last);
}

template <class V, class Codes>
void rows_f32(WB_PRODUCT_ARGUMENTS) {
#define WB_CALL(N) tile_f32<V, Codes, N>
  WB_FOR_ROWS(WB_CALL)
#undef WB_CALL
}

template <class V>
void dense_f32(WB_PRODUCT_ARGUMENTS) {
#define WB_CALL(N) tile_dense_f32<V, N>
  WB_FOR_ROWS(WB_CALL)
#undef WB_CALL
}

template <class V>
void dense_bf16(WB_PRODUCT_ARGUMENTS) {
#define WB_CALL(N) tile_dense_bf16<V, N>
  WB_FOR_ROWS(WB_CALL)
#undef WB_CALL
}

// One switch from the matrix at hand to the code compiled for its width.
#define WB_BY_WIDTH(NAME, ROWS)                                                       \
  template <class V>                                                                  \
  void NAME(WB_PRODUCT_ARGUMENTS) {                                                   \
    if (w.kind == Kind::packed) {                                                     \
      switch (w.bits) {                                                               \
        case 2: return ROWS<V, Packed<V, 2>>(w, bits, x, n, y, add, first, last);     \
        case 3: return ROWS<V, Packed<V, 3>>(w, bits, x, n, y, add, first, last);     \
        case 4: return ROWS<V, Packed<V, 4>>(w, bits, x, n, y, add, first, last);     \
        case 5: return ROWS<V, Packed<V, 5>>(w, bits, x, n, y, add, first, last);     \
        case 6: return ROWS<V, Packed<V, 6>>(w, bits, x, n, y, add, first, last);     \
        case 7: return ROWS<V, Packed<V, 7>>(w, bits, x, n, y, add, first, last);     \
        default: return ROWS<V, Packed<V, 8>>(w, bits, x, n, y, add, first, last);    \
      }                                                                               \
    }                                                                                 \
    switch (bits > 0 ? bits : w.bits) {                                               \
      case 1: return ROWS<V, Planes<V, 1>>(w, bits, x, n, y, add, first, last);       \
      case 2: return ROWS<V, Planes<V, 2>>(w, bits, x, n, y, add, first, last);       \
      case 3: return ROWS<V, Planes<V, 3>>(w, bits, x, n, y, add, first, last);       \
      case 4: return ROWS<V, Planes<V, 4>>(w, bits, x, n, y, add, first, last);       \
      case 5: return ROWS<V, Planes<V, 5>>(w, bits, x, n, y, add, first, last);       \
      case 6: return ROWS<V, Planes<V, 6>>(w, bits, x, n, y, add, first, last);       \
      case 7: return ROWS<V, Planes<V, 7>>(w, bits, x, n, y, add, first, last);       \
      default: return ROWS<V, Planes<V, 8>>(w, bits, x, n, y, add, first, last);      \
    }                                                                                 \
  }
WB_BY_WIDTH(groups_int8, rows_int8)
WB_BY_WIDTH(groups_f32, rows_f32)

// Vectors ----------------------------------------------------------------------------------------------------------

// The last, partial sixteen of a vector, with what lies past the end replaced.
template <class V>
typename V::F load_part(const float* p, int n, float rest) {
  float buffer[16];
  for (int i = 0; i < 16; ++i) buffer[i] = i < n ? p[i] : rest;
  return V::load(buffer);
}

template <class V>
void store_part(float* p, int n, typename V::F v) {
  float buffer[16];
  V::store(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}

// Apply op(F) -> F to every element.
template <class V, class Op>
void map(const float* x, int n, float* y, Op op) {
  int i = 0;
  for (; i + 16 <= n; i += 16) V::store(y + i, op(V::load(x + i), i));
  if (i < n) {
    const auto value = op(load_part<V>(x + i, n - i, 0.0f), i);
    store_part<V>(y + i, n - i, value);
  }
}

template <class V>
typename V::F at(const float* p, int i, int n) {
  return i + 16 <= n ? V::load(p + i) : load_part<V>(p + i, n - i, 0.0f);
}

template <class V>
void rms_norm(const float* x, const float* weight, int n, float eps, float* y) {
  auto squares = V::zero();
  for (int i = 0; i < n; i += 16) {
    const auto v = at<V>(x, i, n);
    squares = V::fma(v, v, squares);
  }
  const auto factor = V::set(1.0f / std::sqrt(V::sum(squares) / static_cast<float>(n) + eps));
  map<V>(x, n, y, [&](auto v, int i) { return V::mul(at<V>(weight, i, n), V::mul(v, factor)); });
}

template <class V>
void layer_norm(const float* x, const float* weight, const float* bias, int n, float eps, float* y) {
  auto total = V::zero();
  for (int i = 0; i < n; i += 16) total = V::add(total, at<V>(x, i, n));
  const auto mean = V::set(V::sum(total) / static_cast<float>(n));
  double squares = 0;
  auto spread = V::zero();
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const auto d = V::sub(V::load(x + i), mean);
    spread = V::fma(d, d, spread);
  }
  for (; i < n; ++i) {
    float m[16];
    V::store(m, mean);
    squares += static_cast<double>(x[i] - m[0]) * static_cast<double>(x[i] - m[0]);
  }
  squares += static_cast<double>(V::sum(spread));
  const auto factor = V::set(1.0f / std::sqrt(static_cast<float>(squares / n) + eps));
  map<V>(x, n, y, [&](auto v, int k) {
    auto out = V::mul(V::sub(v, mean), factor);
    if (weight != nullptr) out = V::mul(out, at<V>(weight, k, n));
    return bias != nullptr ? V::add(out, at<V>(bias, k, n)) : out;
  });
}

// Walk the padded layout: body(g, block, place, channels, from, present): `present` channels of x at `from` go to
// `place`, where `channels` are laid out.
template <class Body>
void walk(const Grouping& grouping, Body body) {
  int place = 0, block = 0;
  for (int g = 0; g < grouping.n_groups; ++g) {
    const int width = grouping.width(g), present = grouping.channels(g);
    for (int from = 0; from < width; from += grouping.block, ++block) {
      const int channels = std::min(grouping.block, width - from);
      body(g, block, place, channels, g * grouping.group + from, std::clamp(present - from, 0, channels));
      place += channels;
    }
  }
}

template <class V>
void quantize(const Grouping& grouping, const float* x, std::int8_t* q, float* scale, float* sum, std::uint8_t* active) {
  for (int g = 0; g < grouping.n_groups; ++g) sum[g] = 0.0f;
  walk(grouping, [&](int g, int block, int place, int channels, int from, int present) {
    auto highest = V::zero(), poison = V::zero();
    typename V::F v[kBlock / 16];
    const int parts = channels / 16;
    for (int i = 0; i < parts; ++i) {
      const int here = present - 16 * i;
      v[i] = here >= 16 ? V::load(x + from + 16 * i) : load_part<V>(x + from + 16 * i, std::max(here, 0), 0.0f);
      highest = V::max(highest, V::abs(v[i]));
      poison = V::fma(v[i], V::zero(), poison);  // NaN if any x is NaN or infinite, which a maximum would lose
    }
    const float most = V::highest(highest), bad = V::sum(poison);
    active[block] = most > 0.0f || bad != bad;
    scale[block] = most / 127.0f + bad;
    // Capped, for 127 / most overflows below 4e-37.
    const auto inverse = V::set(most > 0.0f && bad == bad ? std::min(127.0f / most, std::numeric_limits<float>::max()) : 0.0f);
    auto total = V::zero();
    for (int i = 0; i < parts; ++i) {
      const auto rounded = bad == bad ? V::round(V::mul(v[i], inverse)) : V::zero();
      total = V::add(total, rounded);
      V::store_i8(q + place + 16 * i, rounded);
    }
    sum[g] += scale[block] * V::sum(total);
  });
}

template <class V>
void pad(const Grouping& grouping, const float* x, float* padded, float* sum, std::uint8_t* active) {
  for (int g = 0; g < grouping.n_groups; ++g) sum[g] = 0.0f;
  walk(grouping, [&](int g, int block, int place, int channels, int from, int present) {
    bool any = false;
    double total = 0;
    for (int i = 0; i < channels; ++i) {
      const float v = i < present ? x[from + i] : 0.0f;
      padded[place + i] = v;
      any |= v != 0.0f;
      total += static_cast<double>(v);
    }
    active[block] = any;
    sum[g] += static_cast<float>(total);
  });
}

// exp to within 2 ulp: 2^n * exp(r), |r| <= ln 2 / 2, by a polynomial of degree 6 (Cody and Waite's reduction).
template <class V>
typename V::F exp(typename V::F x) {
  x = V::min(V::set(88.3f), V::max(V::set(-87.3f), x));  // in this order NaN stays NaN
  const auto n = V::round(V::mul(x, V::set(1.44269504f)));
  auto r = V::fnma(n, V::set(0.693359375f), x);
  r = V::fnma(n, V::set(-2.12194440e-4f), r);
  auto p = V::set(1.0f / 720);
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = V::fma(p, r, V::set(c));
  return V::mul(p, V::pow2(n));
}

template <class V>
typename V::F evaluate(Function function, typename V::F x) {
  const auto one = V::set(1.0f);
  switch (function) {
    case Function::relu: return V::max(V::zero(), x);
    case Function::silu: return V::div(x, V::add(one, exp<V>(V::sub(V::zero(), x))));
    case Function::gelu_tanh: {
      // x (1 + tanh u) / 2 = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
      const auto cubic = V::fma(V::mul(V::mul(x, x), x), V::set(0.044715f), x);
      return V::div(x, V::add(one, exp<V>(V::mul(cubic, V::set(-1.59576912f)))));
    }
    case Function::gelu: break;
  }
  float v[16];
  V::store(v, x);
  for (float& value : v) value = 0.5f * value * (1.0f + std::erf(value * 0.70710678f));
  return V::load(v);
}

template <class V>
void apply(Function function, float* x, int n) {
  map<V>(x, n, x, [&](auto v, int) { return evaluate<V>(function, v); });
}

template <class V>
void apply_gated(Function function, float* gate, const float* up, int n) {
  map<V>(gate, n, gate, [&](auto v, int i) { return V::mul(evaluate<V>(function, v), at<V>(up, i, n)); });
}

template <class V>
void add(float* to, const float* from, int n) {
  map<V>(to, n, to, [&](auto v, int i) { return V::add(v, at<V>(from, i, n)); });
}

// Attention --------------------------------------------------------------------------------------------------------

template <class V>
typename V::F load_cached(const float* p) {
  return V::load(p);
}
template <class V>
typename V::F load_cached(const std::uint16_t* p) {
  return V::load_fp16(p);
}

// Scores of N queries for the blocks of 16 positions that any of them sees, and their softmax; then the weighted values.
// What one query gives does not depend on the others: each adds up its own positions, in their order.
template <class V, class T, int N>
void attend_queries(const CacheView& cache, int kv_head, const Query* queries, float scale, float* scores) {
  using F = typename V::F;
  const int dim = cache.head_dim;
  int low = queries[0].first / 16, high = queries[0].last / 16;
  int from = queries[0].first, to = queries[0].last;  // what all of them see
  for (int n = 1; n < N; ++n) {
    low = std::min(low, queries[n].first / 16), high = std::max(high, queries[n].last / 16);
    from = std::max(from, queries[n].first), to = std::min(to, queries[n].last);
  }
  // Scores as [block][N][16 positions] and queries likewise: one address serves all N.
  float* const asked = scores + static_cast<std::size_t>(high - low + 1) * N * 16;
  for (int n = 0; n < N; ++n)
    for (int d = 0; d < dim; ++d) asked[(d / 16 * N + n) * 16 + d % 16] = queries[n].q[d];
  const float none = -std::numeric_limits<float>::infinity();
  // Few queries work on several blocks of positions at once, so that one sum need not wait for another.
  constexpr int At = N == 1 ? 4 : N <= 3 ? 2 : 1;
  const auto keys_of = [&](int b) {
    return static_cast<const T*>(cache.keys[b / (kPiece / 16)]) +
           (static_cast<std::size_t>(kv_head) * (kPiece / 16) + b % (kPiece / 16)) * dim * 16;
  };
  for (int b = low; b <= high; b += At) {
    const int here = std::min(At, high - b + 1);
    const T* keys[At];
    WB_UNROLL for (int j = 0; j < At; ++j) keys[j] = keys_of(b + std::min(j, here - 1));
    F sums[At][N];
    WB_UNROLL for (int j = 0; j < At; ++j)
      WB_UNROLL for (int n = 0; n < N; ++n) sums[j][n] = V::zero();
    for (int d = 0; d < dim; ++d) {
      const float* at = asked + d / 16 * N * 16 + d % 16;
      WB_UNROLL for (int j = 0; j < At; ++j) {
        const F k = load_cached<V>(keys[j] + d * 16);
        WB_UNROLL for (int n = 0; n < N; ++n) sums[j][n] = V::fma(k, V::set(at[n * 16]), sums[j][n]);
      }
    }
    for (int j = 0; j < here; ++j)
      WB_UNROLL for (int n = 0; n < N; ++n) V::store(scores + ((b + j - low) * N + n) * 16, V::mul(sums[j][n], V::set(scale)));
  }
  float inverse[N];
  for (int n = 0; n < N; ++n) {
    const int first = queries[n].first, last = queries[n].last;
    // Its own blocks alone, so that sums are the same whoever else is asked.
    float* s = scores + ((first / 16 - low) * N + n) * 16;
    float* end = scores + ((last / 16 - low) * N + n) * 16;
    constexpr int next = N * 16;
    for (int i = 0; i < first % 16; ++i) s[i] = none;
    for (int i = last % 16 + 1; i < 16; ++i) end[i] = none;
    F most = V::load(s);
    for (const float* p = s + next; p <= end; p += next) most = V::max(most, V::load(p));
    const F top = V::set(V::highest(most));
    F total = V::zero();
    for (float* p = s; p <= end; p += next) {
      const F weights = exp<V>(V::sub(V::load(p), top));
      V::store(p, weights);
      total = V::add(total, weights);
    }
    // exp is clamped above zero: positions left out are removed again, from the weights and from the sum.
    float sum = V::sum(total);
    for (int i = 0; i < first % 16; ++i) sum -= s[i], s[i] = 0.0f;
    for (int i = last % 16 + 1; i < 16; ++i) sum -= end[i], end[i] = 0.0f;
    inverse[n] = 1.0f / sum;
  }
  const auto weigh = [&](auto at_once, int d) {
    constexpr int A = at_once.value;
    const auto values_of = [&](int p) {
      return static_cast<const T*>(cache.values[p / kPiece]) +
             (static_cast<std::size_t>(kv_head) * kPiece + p % kPiece) * cache.value_dim + d;
    };
    const auto weights_of = [&](int p) { return scores + (p / 16 - low) * N * 16 + p % 16; };
    F sums[A][N];
    WB_UNROLL for (int j = 0; j < A; ++j)
      WB_UNROLL for (int n = 0; n < N; ++n) sums[j][n] = V::zero();
    // A position that a query does not see must not even meet a weight of zero: its value may be infinite.
    const auto alone = [&](int n, int begin, int end) {
      for (int p = begin; p <= end; ++p)
        WB_UNROLL for (int j = 0; j < A; ++j)
          sums[j][n] = V::fma(load_cached<V>(values_of(p) + 16 * j), V::set(weights_of(p)[n * 16]), sums[j][n]);
    };
    if constexpr (N > 1)
      WB_UNROLL for (int n = 0; n < N; ++n) alone(n, queries[n].first, std::min(queries[n].last, from - 1));
    for (int p = from; p <= to; ++p) {
      const T* values = values_of(p);
      const float* weights = weights_of(p);
      WB_UNROLL for (int j = 0; j < A; ++j) {
        const F v = load_cached<V>(values + 16 * j);
        WB_UNROLL for (int n = 0; n < N; ++n) sums[j][n] = V::fma(v, V::set(weights[n * 16]), sums[j][n]);
      }
    }
    if constexpr (N > 1)
      WB_UNROLL for (int n = 0; n < N; ++n) alone(n, std::max(from, std::max(to + 1, queries[n].first)), queries[n].last);
    WB_UNROLL for (int j = 0; j < A; ++j)
      WB_UNROLL for (int n = 0; n < N; ++n) {
        const F value = V::mul(sums[j][n], V::set(inverse[n]));
        const int place = d + 16 * j;
        if (place + 16 <= dim) V::store(queries[n].out + place, value);
        else store_part<V>(queries[n].out + place, dim - place, value);
      }
  };
  int d = 0;
  for (; d + 16 * At <= dim; d += 16 * At) weigh(std::integral_constant<int, At>(), d);
  for (; d < dim; d += 16) weigh(std::integral_constant<int, 1>(), d);
}

template <class V, class T>
void attend(const CacheView& cache, int kv_head, const Query* queries, int n, float scale, float* scores) {
  for (; n >= kQueries; n -= kQueries, queries += kQueries) attend_queries<V, T, kQueries>(cache, kv_head, queries, scale, scores);
  for (; n >= 6; n -= 6, queries += 6) attend_queries<V, T, 6>(cache, kv_head, queries, scale, scores);
  for (; n >= 4; n -= 4, queries += 4) attend_queries<V, T, 4>(cache, kv_head, queries, scale, scores);
  switch (n) {
    case 3: attend_queries<V, T, 3>(cache, kv_head, queries, scale, scores); break;
    case 2: attend_queries<V, T, 2>(cache, kv_head, queries, scale, scores); break;
    case 1: attend_queries<V, T, 1>(cache, kv_head, queries, scale, scores); break;
    default: break;
  }
}

template <class V>
float dot_i8(const std::int8_t* a, const float* x, int n) {
  auto total = V::zero();
  int i = 0;
  for (; i + 16 <= n; i += 16) total = V::fma(V::load_i8(a + i), V::load(x + i), total);
  float sum = V::sum(total);
  for (; i < n; ++i) sum += static_cast<float>(a[i]) * x[i];
  return sum;
}

template <class V>
void to_fp16(const float* x, int n, std::uint16_t* y) {
  for (int i = 0; i < n; i += 16) {
    std::uint16_t part[16];
    V::store_fp16(part, at<V>(x, i, n));
    std::copy_n(part, std::min(16, n - i), y + i);
  }
}

template <class V>
void to_bf16(const float* x, int n, std::uint16_t* y) {
  for (int i = 0; i < n; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    y[i] = static_cast<std::uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : rounded);
  }
}

template <class V>
double log_sum_exp(const float* x, int n) {
  float top = x[0];
  for (int i = 0; i < n; ++i) top = std::max(top, x[i]);
  const auto shift = V::set(top);
  double total = 0;
  int i = 0;
  // Partial sums over 4,096 entries stay exact enough in fp32; the rest of the sum is in double.
  while (i + 16 <= n) {
    auto sum = V::zero();
    for (const int end = std::min(n, i + 4096); i + 16 <= end; i += 16) sum = V::add(sum, exp<V>(V::sub(V::load(x + i), shift)));
    total += static_cast<double>(V::sum(sum));
  }
  for (; i < n; ++i) total += std::exp(static_cast<double>(x[i] - top));
  return static_cast<double>(top) + std::log(total);
}

template <class V>
float read_all(const void* p, std::size_t bytes) {
  const auto* x = static_cast<const float*>(p);
  auto a = V::zero(), b = V::zero(), c = V::zero(), d = V::zero();
  for (std::size_t i = 0; i + 64 <= bytes / 4; i += 64) {
    V::prefetch(x + i + 1024);
    V::prefetch(x + i + 1040);
    V::prefetch(x + i + 1056);
    V::prefetch(x + i + 1072);
    a = V::add(a, V::load(x + i));
    b = V::add(b, V::load(x + i + 16));
    c = V::add(c, V::load(x + i + 32));
    d = V::add(d, V::load(x + i + 48));
  }
  return V::sum(V::add(V::add(a, b), V::add(c, d)));
}

// A constant: no instruction of a set may run before the processor was asked for it.
template <class V>
constexpr Kernels make_kernels(Isa isa) {
  Kernels k{};
  k.isa = isa;
  k.groups_int8 = groups_int8<V>;
  k.groups_f32 = groups_f32<V>;
  k.dense_f32 = dense_f32<V>;
  k.dense_bf16 = dense_bf16<V>;
  k.rms_norm = rms_norm<V>;
  k.layer_norm = layer_norm<V>;
  k.quantize = quantize<V>;
  k.pad = pad<V>;
  k.apply = apply<V>;
  k.apply_gated = apply_gated<V>;
  k.add = add<V>;
  k.attend_f32 = attend<V, float>;
  k.attend_f16 = attend<V, std::uint16_t>;
  k.dot_i8 = dot_i8<V>;
  k.to_fp16 = to_fp16<V>;
  k.to_bf16 = to_bf16<V>;
  k.log_sum_exp = log_sum_exp<V>;
  k.read_all = read_all<V>;
  return k;
}

}  // namespace
}  // namespace wb
