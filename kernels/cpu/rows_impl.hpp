// Products of single rows, for matrices of which only some rows are wanted: one row at a time, lanes along its channels,
// added across lanes at its end. What a row of activations gives does not depend on how many there are.
#pragma once

#include "products_impl.hpp"

namespace wb {
namespace {

// The next 64 codes of a row.
template <class V, int Bits>
typename V::B row_codes(const std::uint8_t* p) {
  if constexpr (Bits == 8) {
    return V::bytes(p);
  } else {
    constexpr int low = Bits >= 4 ? 4 : 0;
    typename V::B codes;
    if constexpr (low > 0) codes = V::nibbles(p);
    else codes = V::bzero();
    for (int plane = 0; plane < Bits - low; ++plane) codes = V::add_plane(codes, p + 8 * low + 8 * plane, 1 << (low + plane));
    return codes;
  }
}

// What a thread keeps of a product: tables of its activations, and of the row at hand.
struct RowRoom {
  std::vector<float> of_x, scales, zeros;
  float* take(std::vector<float>& room, std::size_t n) {
    if (room.size() < n) room.resize(n);
    return room.data();
  }
};

inline RowRoom& row_room() {
  thread_local RowRoom room;
  return room;
}

// Sixteen entries of a row's table from group g on, fp32.
template <class V>
typename V::F row_scales(const Grid& grid, std::size_t at) {
  return grid.scales16 != nullptr ? V::load_fp16(grid.scales16 + at) : V::load(grid.scales32 + at);
}

template <class V>
typename V::F row_zeros(const Grid& grid, std::size_t at) {
  const auto base = V::set(grid.zero);
  return grid.zeros != nullptr ? V::fma(V::load_u8(grid.zeros + at), V::set(grid.step), base) : base;
}

template <class V>
typename V::F row_minima(const Grid& grid, std::size_t at) {
  return grid.minima16 != nullptr ? V::load_fp16(grid.minima16 + at) : V::load(grid.minima32 + at);
}

// Entries of groups, each on all lanes (4 channels a lane) of its group.
template <class V>
void spread(const Grouping& at, const float* of_group, float* to) {
  for (int g = 0; g < at.n_groups; ++g) {
    const auto value = V::set(of_group[g]);
    const int lanes = at.width(g) / 4 + (g + 1 == at.n_groups ? 12 : 0);  // to the end of the last piece
    for (int lane = 0; lane < lanes; lane += 16) V::store(to + static_cast<std::size_t>(g * at.stride / 4 + lane), value);
  }
}

// How groups lie in pieces of a row: one is a piece, or several pieces; or they begin anywhere, and each lane of a piece has
// its group's entries.
enum class Pieces : std::uint8_t { one, several, lanes };
constexpr int pieces_of(int channels) { return (channels + kPieceChannels - 1) / kPieceChannels; }

// Add up what lanes hold of R rows of weights times N of activations, in one order for all.
template <class V, int N, int R>
void store_rows(const Matrix& w, const typename V::F* total, float* const* y, const int* listed) {
  typename V::F four[4];
  for (int i = 0; i < 4; ++i) four[i] = i < N * R ? total[i] : V::zero();
  float sums[4];
  V::sum4(four, sums);
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) y[n][listed[r]] = sums[r * N + n] + (w.bias != nullptr ? w.bias[listed[r]] : 0.0f);
}

// Ask for rows that are listed later: from further away than a sequence of lines, as none announces the next.
constexpr std::size_t kRowsAhead = 4096;

// Always inlined: GCC leaves out calls of a function that does nothing else.
template <class V>
#if defined(__GNUC__)
__attribute__((always_inline))
#endif
inline void prefetch_row(const Matrix& w, const int* listed, int n_listed, int j) {
  const std::size_t row_bytes = w.tile_bytes / kRows;
  const int next = std::min(j + static_cast<int>(kRowsAhead / row_bytes) + 1, n_listed - 1);
  const std::uint8_t* p = w.codes + static_cast<std::size_t>(listed[next]) * row_bytes;
  for (std::size_t b = 0; b < row_bytes; b += 64) V::prefetch_far(p + b);
}

// N rows of activations times R listed rows, N R of them 1 or 4. of_x: by row of activations, `stride` floats apart, per
// piece: int8 activations' scale for each lane, or fp32 activations in the order that lanes take them. sums: of groups,
// [N][groups padded to 16].
template <class V, int Bits, bool Exact, Pieces By, int N, int R>
void few_rows(const Matrix& w, const Activation* x, const float* of_x, std::size_t stride, const float* sums, float* const* y,
              const int* listed, RowRoom& room) {
  using F = typename V::F;
  const Grouping& at = w.grouping;
  const Grid& grid = w.grid;
  const auto groups = static_cast<std::size_t>(at.n_groups), padded_groups = round_up(groups, 16);
  const std::size_t row_bytes = w.tile_bytes / kRows;
  const auto all = static_cast<std::size_t>(pieces_of(at.padded));
  const bool minima = grid.has_minima(), zeros = Exact && !minima;
  constexpr std::size_t step = 8 * Bits;
  const std::size_t of_row = padded_groups + 16 * all + 32;
  float* scale_of = room.take(room.scales, R * of_row);  // by row: of groups, then of lanes
  float* zero_of = room.take(room.zeros, R * of_row);
  const std::uint8_t* p[R];
  F total[R * N];
  WB_UNROLL for (int i = 0; i < R * N; ++i) total[i] = V::zero();
  WB_UNROLL for (int r = 0; r < R; ++r) {
    const auto row = static_cast<std::size_t>(listed[r]);
    p[r] = w.codes + row * row_bytes;
    float *scales = scale_of + static_cast<std::size_t>(r) * of_row, *points = zero_of + static_cast<std::size_t>(r) * of_row;
    // What does not depend on codes: minus zero points, or plus minima, times the sums of activations; lanes are groups.
    for (std::size_t g = 0; g < groups; g += 16) {
      const std::size_t lane = row * groups + g;
      const F scale = row_scales<V>(grid, lane);
      V::store(scales + g, scale);
      if (zeros) {
        V::store(points + g, row_zeros<V>(grid, lane));
        continue;
      }
      const F factor = minima ? row_minima<V>(grid, lane) : V::sub(V::zero(), V::mul(scale, row_zeros<V>(grid, lane)));
      WB_UNROLL for (int n = 0; n < N; ++n)
        total[r * N + n] = V::fma(factor, V::load(sums + static_cast<std::size_t>(n) * padded_groups + g), total[r * N + n]);
    }
    if constexpr (By == Pieces::lanes) {
      spread<V>(at, scales, scales + padded_groups);
      if (zeros) spread<V>(at, points, points + padded_groups);
    }
  }
  // Add a piece's products, each row's zero points taken off.
  const auto part = [&](std::size_t piece, const F* zero, F* sum) {
    WB_UNROLL for (int r = 0; r < R; ++r) {
      const auto codes = row_codes<V, Bits>(p[r] + piece * step);
      if constexpr (Exact) {
        const auto one = [&](auto k) {
          const F code = V::sub(V::template byte_lane<k.value>(codes), zero[r]);
          WB_UNROLL for (int n = 0; n < N; ++n)
            sum[r * N + n] = V::fma(code, V::load(of_x + static_cast<std::size_t>(n) * stride + 64 * piece + 16 * static_cast<std::size_t>(k.value)), sum[r * N + n]);
        };
        one(std::integral_constant<int, 0>());
        one(std::integral_constant<int, 1>());
        one(std::integral_constant<int, 2>());
        one(std::integral_constant<int, 3>());
      } else {
        WB_UNROLL for (int n = 0; n < N; ++n)
        {
          const F products = V::to_float(V::template dot_row<Bits == 8>(V::izero(), codes, x[n].q + 64 * piece));
          const F scale = V::load(of_x + static_cast<std::size_t>(n) * stride + 16 * piece);
          sum[r * N + n] = By == Pieces::several ? V::fma(products, scale, sum[r * N + n]) : V::mul(products, scale);
        }
      }
    }
  };
  const std::size_t turns = By == Pieces::lanes ? all : groups;
  std::size_t piece = 0;
  for (std::size_t turn = 0; turn < turns; ++turn) {
    F sum[R * N], zero[R];
    const auto entry = [&](const float* of, int r) {
      const float* own = of + static_cast<std::size_t>(r) * of_row;
      return By == Pieces::lanes ? V::load(own + padded_groups + 16 * turn) : V::set(own[turn]);
    };
    WB_UNROLL for (int i = 0; i < R * N; ++i) sum[i] = V::zero();
    WB_UNROLL for (int r = 0; r < R; ++r) zero[r] = zeros ? entry(zero_of, r) : V::zero();
    if constexpr (By == Pieces::several) {
      for (int left = at.width(static_cast<int>(turn)); left > 0; left -= kPieceChannels, ++piece) part(piece, zero, sum);
    } else {
      part(turn, zero, sum);
    }
    WB_UNROLL for (int r = 0; r < R; ++r) {
      const F scale = entry(scale_of, r);
      WB_UNROLL for (int n = 0; n < N; ++n) total[r * N + n] = V::fma(scale, sum[r * N + n], total[r * N + n]);
    }
  }
  store_rows<V, N, R>(w, total, y, listed);
}

template <class V, int Bits, bool Exact, Pieces By, int N>
void listed_rows(const Matrix& w, const Activation* x, const float* of_x, std::size_t stride, const float* sums, float* const* y,
                 const int* listed, int n_listed, RowRoom& room) {
  for (int j = 0; j < n_listed;) {
    if constexpr (N == 1) {
      if (j + 4 <= n_listed) {
        for (int i = 0; i < 4; ++i) prefetch_row<V>(w, listed, n_listed, j + i);
        few_rows<V, Bits, Exact, By, 1, 4>(w, x, of_x, stride, sums, y, listed + j, room);
        j += 4;
        continue;
      }
    }
    few_rows<V, Bits, Exact, By, N, 1>(w, x, of_x, stride, sums, y, listed + j, room);
    ++j;
  }
}

// Tables of N rows of activations, then their products.
template <class V, int Bits, bool Exact, int N>
void some_rows(const Matrix& w, const Activation* x, float* const* y, const int* listed, int n_listed) {
  RowRoom& room = row_room();
  const Grouping& at = w.grouping;
  const auto padded_groups = round_up(static_cast<std::size_t>(at.n_groups), 16);
  const auto all = static_cast<std::size_t>(pieces_of(at.padded));
  const std::size_t stride = (Exact ? 64 : 16) * all + 16;
  float* of_x = room.take(room.of_x, N * (stride + padded_groups));
  float* sums = of_x + N * stride;
  for (std::size_t n = 0; n < N; ++n) {
    float* to = of_x + n * stride;
    if constexpr (Exact) {
      for (std::size_t place = 0; place < 64 * all; ++place)
        to[place / 64 * 64 + place % 4 * 16 + place % 64 / 4] = place < static_cast<std::size_t>(at.padded) ? x[n].x[place] : 0.0f;
    } else {
      int block = 0;
      std::size_t lane = 0;
      for (int g = 0; g < at.n_groups; ++g)
        for (int left = at.width(g); left > 0; left -= at.block, ++block) {
          const int channels = std::min(left, at.block);
          for (int i = 0; i < channels / 4; ++i) to[lane++] = x[n].scale[block];
        }
      std::fill(to + lane, to + stride, 0.0f);
    }
    for (std::size_t g = 0; g < padded_groups; ++g) sums[n * padded_groups + g] = g < static_cast<std::size_t>(at.n_groups) ? x[n].sum[g] : 0.0f;
  }
  const bool one = at.stride == kPieceChannels || (at.n_groups == 1 && at.padded <= kPieceChannels);
  if (one) listed_rows<V, Bits, Exact, Pieces::one, N>(w, x, of_x, stride, sums, y, listed, n_listed, room);
  else if (at.stride % kPieceChannels == 0 || at.n_groups == 1) listed_rows<V, Bits, Exact, Pieces::several, N>(w, x, of_x, stride, sums, y, listed, n_listed, room);
  else listed_rows<V, Bits, Exact, Pieces::lanes, N>(w, x, of_x, stride, sums, y, listed, n_listed, room);
}

#define WB_ROWS_ARGUMENTS const Matrix &w, const Activation *x, int n, float *const *y, const int *listed, int n_listed

template <class V, int Bits, bool Exact>
void rows_at(WB_ROWS_ARGUMENTS) {
  int i = 0;
  for (; i + 4 <= n; i += 4) some_rows<V, Bits, Exact, 4>(w, x + i, y + i, listed, n_listed);
  for (; i < n; ++i) some_rows<V, Bits, Exact, 1>(w, x + i, y + i, listed, n_listed);
}

template <class V, bool Exact>
void rows_groups(WB_ROWS_ARGUMENTS) {
  if (n_listed == 0) return;
  switch (w.bits) {
    case 2: return rows_at<V, 2, Exact>(w, x, n, y, listed, n_listed);
    case 3: return rows_at<V, 3, Exact>(w, x, n, y, listed, n_listed);
    case 4: return rows_at<V, 4, Exact>(w, x, n, y, listed, n_listed);
    case 5: return rows_at<V, 5, Exact>(w, x, n, y, listed, n_listed);
    case 6: return rows_at<V, 6, Exact>(w, x, n, y, listed, n_listed);
    case 7: return rows_at<V, 7, Exact>(w, x, n, y, listed, n_listed);
    default: return rows_at<V, 8, Exact>(w, x, n, y, listed, n_listed);
  }
}

// Dense rows: each(sum, weights, n, vector) adds the products of a vector of 64 bytes. Two sums, so that a product does not
// wait for the one before it.
template <class V, int N, class Each>
void dense_rows(const Matrix& w, float* const* y, const int* listed, int n_listed, Each each) {
  using F = typename V::F;
  const std::size_t row_bytes = w.tile_bytes / kRows, vectors = row_bytes / 64;
  const bool gaps = n_listed > 0 && listed[n_listed - 1] - listed[0] >= n_listed;  // else the processor sees what comes next
  for (int j = 0; j < n_listed; ++j) {
    const std::uint8_t* p = w.codes + static_cast<std::size_t>(listed[j]) * row_bytes;
    if constexpr (N == 1)
      if (gaps) prefetch_row<V>(w, listed, n_listed, j);
    F total[N][2];
    WB_UNROLL for (int n = 0; n < N; ++n) total[n][0] = total[n][1] = V::zero();
    std::size_t v = 0;
    for (; v + 2 <= vectors; v += 2)
      WB_UNROLL for (int n = 0; n < N; ++n) {
        total[n][0] = each(total[n][0], p + 64 * v, n, v);
        total[n][1] = each(total[n][1], p + 64 * v + 64, n, v + 1);
      }
    if (v < vectors)
      WB_UNROLL for (int n = 0; n < N; ++n) total[n][0] = each(total[n][0], p + 64 * v, n, v);
    F both[N];
    WB_UNROLL for (int n = 0; n < N; ++n) both[n] = V::add(total[n][0], total[n][1]);
    store_rows<V, N, 1>(w, both, y, listed + j);
  }
}

template <class V, int N>
void some_dense_bf16(const Matrix& w, const Activation* x, float* const* y, const int* listed, int n_listed) {
  dense_rows<V, N>(w, y, listed, n_listed, [&](typename V::F sum, const std::uint8_t* p, int n, std::size_t v) {
    return V::dot_bf16_row(sum, V::bytes(p), x[n].b + 32 * v);
  });
}

template <class V, int N>
void some_dense_f32(const Matrix& w, const Activation* x, float* const* y, const int* listed, int n_listed) {
  RowRoom& room = row_room();
  const std::size_t vectors = w.tile_bytes / kRows / 64, stride = 32 * vectors;
  float* of_x = room.take(room.of_x, N * stride);
  const auto in = static_cast<std::size_t>(w.in);
  if (w.kind == Kind::f32) {
    for (std::size_t n = 0; n < N; ++n)
      for (std::size_t c = 0; c < 16 * vectors; ++c) of_x[n * stride + c] = c < in ? x[n].x[c] : 0.0f;
    dense_rows<V, N>(w, y, listed, n_listed, [&](typename V::F sum, const std::uint8_t* p, int n, std::size_t v) {
      return V::fma(V::load(reinterpret_cast<const float*>(p)), V::load(of_x + static_cast<std::size_t>(n) * stride + 16 * v), sum);
    });
    return;
  }
  // Channels of even number, then those of odd.
  for (std::size_t n = 0; n < N; ++n)
    for (std::size_t c = 0; c < 32 * vectors; ++c) of_x[n * stride + c / 32 * 32 + c % 2 * 16 + c % 32 / 2] = c < in ? x[n].x[c] : 0.0f;
  dense_rows<V, N>(w, y, listed, n_listed, [&](typename V::F sum, const std::uint8_t* p, int n, std::size_t v) {
    const auto pair = V::bytes(p);
    const float* at = of_x + static_cast<std::size_t>(n) * stride + 32 * v;
    return V::fma(V::bf16_high(pair), V::load(at + 16), V::fma(V::bf16_low(pair), V::load(at), sum));
  });
}

template <class V>
void rows_dense_bf16(WB_ROWS_ARGUMENTS) {
  int i = 0;
  for (; i + 4 <= n; i += 4) some_dense_bf16<V, 4>(w, x + i, y + i, listed, n_listed);
  for (; i < n; ++i) some_dense_bf16<V, 1>(w, x + i, y + i, listed, n_listed);
}

template <class V>
void rows_dense_f32(WB_ROWS_ARGUMENTS) {
  int i = 0;
  for (; i + 4 <= n; i += 4) some_dense_f32<V, 4>(w, x + i, y + i, listed, n_listed);
  for (; i < n; ++i) some_dense_f32<V, 1>(w, x + i, y + i, listed, n_listed);
}

}  // namespace
}  // namespace wb
