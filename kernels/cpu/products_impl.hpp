// Products of matrices with rows of activations.
#pragma once

#include "lanes.hpp"

namespace wb {
namespace {

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

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define WB_SHUFFLES
#endif
#endif

// Four rows of four times four bytes become four columns, `stride` bytes apart.
inline void transpose_fours(const std::int8_t* const (&rows)[4], char* to, std::size_t stride) {
#if defined(WB_SHUFFLES)
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

// Weights looked up in a table of their row, 32 channels at a time. One row of the matrix after another: what is looked up
// in one register is one row's, and its sum across lanes is small beside the row.
template <class V, int Bits, int N>
void tile_tables(const Matrix& w, int, const Activation* x, float* const* y, bool add, int tile) {
  using F = typename V::F;
  const int words = w.grouping.padded / kWord;
  const bool half = w.grouping.padded % kWord != 0;  // activations are padded to 16 channels only
  const std::size_t row_bytes = w.row_bytes();
  alignas(64) float result[N][kRows];
  for (int r = 0; r < kRows; ++r) {
    const std::size_t row = static_cast<std::size_t>(tile) * kRows + static_cast<std::size_t>(r);
    const std::uint16_t* values = w.tables[Bits] + (row << Bits);
    const typename V::template Table<Bits> table(values);
    const std::uint8_t* p[Bits];
    for (int j = 0; j < Bits; ++j) p[j] = w.codes + w.plane_bytes * static_cast<std::size_t>(j) + row * row_bytes;
    if constexpr (N <= 2) {
      V::prefetch(reinterpret_cast<const std::uint8_t*>(values) + kAhead);
      for (int j = 0; j < Bits; ++j)
        for (std::size_t at = 0; at < row_bytes; at += 64) V::prefetch(p[j] + kAhead / 4 + at);
    }
    F low[N], high[N];
    WB_UNROLL for (int n = 0; n < N; ++n) low[n] = high[n] = V::zero();
    for (int i = 0; i < words; ++i) {
      if (N == 1 && x[0].active[i] == 0) continue;
      F a, b;
      table.weights(p, static_cast<std::size_t>(i), a, b);
      WB_UNROLL for (int n = 0; n < N; ++n) {
        low[n] = V::fma(a, V::load(x[n].x + kWord * i), low[n]);
        high[n] = V::fma(b, V::load(x[n].x + kWord * i + 16), high[n]);
      }
    }
    if (half) {
      F a, b;
      table.weights(p, static_cast<std::size_t>(words), a, b);
      WB_UNROLL for (int n = 0; n < N; ++n) low[n] = V::fma(a, V::load(x[n].x + kWord * words), low[n]);
    }
    WB_UNROLL for (int n = 0; n < N; ++n) result[n][r] = V::sum(V::add(low[n], high[n]));
  }
  F total[N];
  WB_UNROLL for (int n = 0; n < N; ++n) total[n] = V::load(result[n]);
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

template <class V, int Bits>
void rows_tables(WB_PRODUCT_ARGUMENTS) {
#define WB_CALL(N) tile_tables<V, Bits, N>
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
WB_BY_WIDTH(grids_f32, rows_f32)

template <class V>
void groups_f32(WB_PRODUCT_ARGUMENTS) {
  if (w.kind != Kind::tables) return grids_f32<V>(w, bits, x, n, y, add, first, last);
  switch (bits > 0 ? bits : w.bits) {
    case 2: return rows_tables<V, 2>(w, bits, x, n, y, add, first, last);
    case 3: return rows_tables<V, 3>(w, bits, x, n, y, add, first, last);
    case 4: return rows_tables<V, 4>(w, bits, x, n, y, add, first, last);
    case 5: return rows_tables<V, 5>(w, bits, x, n, y, add, first, last);
    case 6: return rows_tables<V, 6>(w, bits, x, n, y, add, first, last);
    case 7: return rows_tables<V, 7>(w, bits, x, n, y, add, first, last);
    default: return rows_tables<V, 8>(w, bits, x, n, y, add, first, last);
  }
}

}  // namespace
}  // namespace wb
