// Products of many rows with integer codes of 8 bits where there is no product of bytes that is exact: everything is widened
// to 16 bits first. What the sum would be doubled by between sections is then put into the codes instead.
#pragma once

#include <vector>

#include "lanes.hpp"
#include "products_impl.hpp"

// Sums must stay in registers: all loops over rows go, with WB_UNROLL or without.
#if defined(__clang__)
#define WB_UNROLL_ROWS _Pragma("unroll")
#elif defined(__GNUC__)
#define WB_UNROLL_ROWS _Pragma("GCC unroll 8")
#else
#define WB_UNROLL_ROWS
#endif

namespace wb {
namespace {

// The codes of N rows side by side, widened and shifted.
template <class V, int N>
struct WidePanel {
  static_assert(N % 2 == 0);
  const std::int16_t* q;       // [quads][N][4]
  const float* scale;          // [parts][N]
  const std::int32_t* offset;  // likewise

  WidePanel(const IntegerInput& in, const Activation* x) {
    const auto codes = static_cast<std::size_t>(in.laid_out()), parts = static_cast<std::size_t>(in.parts());
    thread_local std::vector<std::int16_t> room;
    thread_local std::vector<float> scales;
    thread_local std::vector<std::int32_t> offsets;
    if (room.size() < N * codes) room.resize(N * codes);
    if (scales.size() < N * parts) scales.resize(N * parts), offsets.resize(N * parts);
    for (std::size_t n = 0; n < N; n += 2) {
      std::size_t at = 0;
      for (const Section& s : in.sections) {
        V::widen_two(x[n].q + at, x[n + 1].q + at, s.quads, s.shift, room.data() + N * at + kQuad * n, kQuad * N);
        at += static_cast<std::size_t>(s.quads) * kQuad;
      }
    }
    for (std::size_t n = 0; n < N; ++n)
      for (std::size_t i = 0; i < parts; ++i) scales[N * i + n] = x[n].scale[i], offsets[N * i + n] = x[n].offset[i];
    q = room.data(), scale = scales.data(), offset = offsets.data();
  }
};

// Sums of half a tile, eight rows of the matrix, with N rows.
template <class V, int N>
struct WideSums {
  using Wide = typename V::Wide;
  const std::uint8_t* p;
  const std::int16_t* q;
  Wide of[N];

  WideSums(const Matrix& w, const std::int16_t* codes, int tile, int half)
      : p(w.codes + static_cast<std::size_t>(tile) * w.tile_bytes + 32 * half), q(codes) {
    clear();
  }
  void clear() {
    WB_UNROLL_ROWS for (int n = 0; n < N; ++n) of[n] = V::izero();
  }
  void twice() {
    WB_UNROLL_ROWS for (int n = 0; n < N; ++n) of[n] = V::iadd(of[n], of[n]);
  }
  void add(int quads) {
    for (int i = 0; i < quads; ++i, p += 64, q += kQuad * N) {
      const Wide codes = V::widen(p);
      WB_UNROLL_ROWS for (int n = 0; n < N; ++n) of[n] = V::dot_wide(of[n], codes, q + kQuad * n);
    }
  }
};

// One sum through all sections, whose codes hold the powers of two between them as far as 16 bits go.
template <class V, int N>
void tile_wide(const Matrix& w, const WidePanel<V, N>& x, float* const* y, bool add, int tile) {
  const auto& sections = w.input->sections;
  typename V::Wide half[2][N];
  for (int h = 0; h < 2; ++h) {
    WideSums<V, N> sums(w, x.q, tile, h);
    for (std::size_t s = 0; s < sections.size();) {
      for (int i = 0; i < sections[s].lead; ++i) sums.twice();
      int quads = 0;
      do quads += sections[s++].quads;
      while (s < sections.size() && sections[s].lead == 0);
      sums.add(quads);
    }
    WB_UNROLL_ROWS for (int n = 0; n < N; ++n) half[h][n] = sums.of[n];
  }
  const auto scale = V::load_fp16(w.grid.scales16 + static_cast<std::size_t>(tile) * kRows);
  typename V::F total[N];
  WB_UNROLL_ROWS for (int n = 0; n < N; ++n)
    total[n] = V::mul(V::to_float(V::iadd(V::join(half[0][n], half[1][n]), V::iset(-x.offset[n]))), V::mul(scale, V::set(x.scale[n])));
  put<V, N>(w, tile, total, y, add);
}

template <class V, int N>
void panel_wide(const Matrix& w, const Activation* x, float* const* y, bool add, int first, int last) {
  const WidePanel<V, N> panel(*w.input, x);
  for (int tile = first; tile < last; ++tile) tile_wide<V, N>(w, panel, y, add, tile);
}

// As many rows as there are, less what is left for the products of bytes: at most one.
template <class V>
int rows_wide(const Matrix& w, const Activation* x, int n, float* const* y, bool add, int first, int last) {
  // Six rows' sums are 12 of 16 registers.
  int done = 0;
  for (; n - done >= 6; done += 6) panel_wide<V, 6>(w, x + done, y + done, add, first, last);
  if (n - done >= 4) panel_wide<V, 4>(w, x + done, y + done, add, first, last), done += 4;
  if (n - done >= 2) panel_wide<V, 2>(w, x + done, y + done, add, first, last), done += 2;
  return done;
}

}  // namespace
}  // namespace wb
