// Rounding rows to integers, and their products with matrices of integer codes.
#pragma once

#include "integer_wide_impl.hpp"
#include "lanes.hpp"
#include "products_impl.hpp"
#include "vectors_impl.hpp"

namespace wb {
namespace {

// Rotate blocks of x in place: signs, then each factor along its own axis of the block, scaled to keep lengths.
inline void rotate(const Rotation& r, int n, float* x, float* other) {
  for (int i = 0; i < n; ++i) x[i] *= r.signs[static_cast<std::size_t>(i)];
  const float scale = 1.0f / std::sqrt(static_cast<float>(r.block));
  int stride = r.block;
  for (const auto& factor : r.factors) {
    int f = 1;
    while (f * f < static_cast<int>(factor.size())) ++f;
    stride /= f;
    for (int begin = 0; begin < n; begin += f * stride)
      for (int i = 0; i < f; ++i) {
        float* to = other + begin + i * stride;
        std::fill(to, to + stride, 0.0f);
        for (int k = 0; k < f; ++k) {
          const float sign = factor[static_cast<std::size_t>(i * f + k)];
          const float* from = x + begin + k * stride;
          for (int j = 0; j < stride; ++j) to[j] += sign * from[j];
        }
      }
    std::copy(other, other + n, x);
  }
  for (int i = 0; i < n; ++i) x[i] *= scale;
}

// Codes of n values, sixteen at a time.
template <class V, bool Counts>
void round_codes(const IntegerInput& in, const float* values, int n, float step, std::int8_t* codes, IntegerCounts& counts) {
  const float top = static_cast<float>((1 << (in.bits - 1)) - 1);
  const auto low = V::set(-top - 1), high = V::set(top), one = V::set(1.0f), none = V::zero();
  const auto limit = V::set(in.limit > 0 ? in.limit : std::numeric_limits<float>::max());
  const auto inverse = V::set(step > 0 ? std::min(1.0f / step, std::numeric_limits<float>::max()) : 0.0f);
  auto clamped = V::zero(), beyond = V::zero();
  int i = 0;
  const auto sixteen = [&](typename V::F v, std::int8_t* to) {
    const auto exact = V::round(V::mul(v, inverse));
    const auto code = V::min(V::max(exact, low), high);
    if constexpr (Counts) {
      clamped = V::add(clamped, V::min(V::abs(V::sub(exact, code)), one));
      beyond = V::add(beyond, V::min(V::max(V::sub(V::abs(exact), limit), none), one));
    }
    V::store_i8(to, code);
  };
  if constexpr (V::rounds_four && !Counts) {
    const auto code = [&](int at) { return V::min(V::max(V::mul(V::load(values + at), inverse), low), high); };
    for (; i + 64 <= n; i += 64) V::round_i8(codes + i, code(i), code(i + 16), code(i + 32), code(i + 48));
  }
  for (; i + 16 <= n; i += 16) sixteen(V::load(values + i), codes + i);
  if (i < n) {
    std::int8_t part[16];
    sixteen(load_part<V>(values + i, n - i, 0.0f), part);
    std::copy(part, part + (n - i), codes + i);
  }
  if constexpr (Counts) {
    counts.clamped += static_cast<std::int64_t>(V::sum(clamped));
    counts.beyond += static_cast<std::int64_t>(V::sum(beyond));
  }
}

// v = (x - bias) * multipliers, padded with zeros to sixteen, and the largest magnitude; NaN if any x is NaN or infinite.
template <class V>
float to_values(const IntegerInput& in, const float* x, float* values) {
  const bool biased = !in.bias.empty(), scaled = !in.multipliers.empty();
  typename V::F poison[2] = {V::zero(), V::zero()}, highest[2] = {V::zero(), V::zero()};  // two, as each waits for the one before it
  const auto sixteen = [&](typename V::F v, int i, int turn) {
    poison[turn] = V::fma(v, V::zero(), poison[turn]);
    if (biased) v = V::sub(v, V::load(in.bias.data() + i));  // zero past the end
    if (scaled) v = V::mul(v, V::load(in.multipliers.data() + i));
    V::store(values + i, v);
    highest[turn] = V::max(highest[turn], V::abs(v));
  };
  int i = 0;
  for (; i + 32 <= in.in; i += 32) sixteen(V::load(x + i), i, 0), sixteen(V::load(x + i + 16), i + 16, 1);
  for (; i + 16 <= in.in; i += 16) sixteen(V::load(x + i), i, 0);
  if (i < in.in) sixteen(load_part<V>(x + i, in.in - i, 0.0f), i, 1);
  return V::highest(V::max(highest[0], highest[1])) + V::sum(V::add(poison[0], poison[1]));
}

inline float own_step(const IntegerInput& in, float highest) { return highest * in.clip / static_cast<float>((1 << (in.bits - 1)) - 1); }

template <class V>
float highest_of(const float* values, int n) {
  auto highest = V::zero();
  int i = 0;
  for (; i + 16 <= n; i += 16) highest = V::max(highest, V::abs(V::load(values + i)));
  if (i < n) highest = V::max(highest, V::abs(load_part<V>(values + i, n - i, 0.0f)));
  return V::highest(highest);
}

// What the weights' unsigned form adds to the sums.
inline void add_offsets(const IntegerInput& in, const std::int8_t* q, std::int32_t* offset) {
  std::int32_t total = 0;
  for (std::size_t s = 0; s < in.sections.size(); ++s) {
    std::int32_t sum = 0;
    const int n = in.sections[s].quads * kQuad;
    for (int i = 0; i < n; ++i) sum += q[i];
    q += n;
    if (in.apart) offset[s] = sum * (1 << (in.weight_bits - 1));
    else total = total * (1 << in.sections[s].doublings) + sum;
  }
  if (!in.apart) offset[0] = total * (1 << (in.weight_bits - 1));
}

template <class V>
void round_row(const IntegerInput& in, const float* x, int position, std::int8_t* q, float* scale, IntegerCounts& counts) {
  const int n = in.in, parts = in.parts();
  const std::size_t whole = round_up(static_cast<std::size_t>(n) + 1, 128);
  thread_local AlignedVector<float> room;
  thread_local AlignedVector<std::int8_t> bytes;
  if (room.size() < 2 * whole) room.resize(2 * whole);
  if (bytes.size() < whole) bytes.resize(whole);
  float* values = room.data();
  if (in.rotation.block > 0) {
    float* turned = room.data() + whole;
    std::copy(x, x + n, turned);
    rotate(in.rotation, n, turned, values);
    x = turned;
  }
  const float highest = to_values<V>(in, x, values);
  std::int8_t* natural = in.order.empty() ? q : bytes.data();
  if (highest != highest) {
    std::fill(natural, natural + n, std::int8_t{0});
    std::fill(scale, scale + parts, highest);
  } else if (in.ranges_apart()) {
    int first = 0;
    for (int s = 0; s < parts; ++s) {
      const int channels = in.sections[static_cast<std::size_t>(s)].channels;
      scale[s] = own_step(in, highest_of<V>(values + first, channels));
      round_codes<V, false>(in, values + first, channels, scale[s], natural + first, counts);
      first += channels;
    }
  } else {
    std::size_t chunk = 0;
    while (chunk + 1 < in.starts.size() && in.starts[chunk + 1] <= position) ++chunk;
    const float step = in.steps.empty() ? own_step(in, highest) : in.steps[chunk];
    for (int s = 0; s < parts; ++s) scale[s] = in.apart ? step * in.section_scales[static_cast<std::size_t>(s)] : step;
    if (in.steps.empty()) round_codes<V, false>(in, values, n, step, natural, counts);
    else round_codes<V, true>(in, values, n, step, natural, counts);
  }
  if (!in.order.empty()) {
    natural[n] = 0;  // what goes where there is no channel
    V::permute(in.bytes, natural, q);
  }
}

template <class V>
void quantize_integer(const IntegerInput& in, const float* x, int position, std::int8_t* q, float* scale, std::int32_t* offset, IntegerCounts& counts) {
  round_row<V>(in, x, position, q, scale, counts);
  add_offsets(in, q, offset);
}

// The codes of N rows side by side, as `Panel` has those of groups.
template <int N>
struct IntegerPanel {
  const std::int8_t* q;        // [quads][N][4]
  const float* scale;          // [parts][N]
  const std::int32_t* offset;  // likewise

  IntegerPanel(const IntegerInput& in, const Activation* x) {
    if constexpr (N == 1) {
      q = x->q, scale = x->scale, offset = x->offset;
    } else {
      const auto fours = static_cast<std::size_t>(in.quads), parts = static_cast<std::size_t>(in.parts());
      thread_local std::vector<std::uint32_t> room;
      if (room.size() < N * (fours + 2 * parts)) room.resize(N * (fours + 2 * parts));
      auto* to = reinterpret_cast<char*>(room.data());
      auto* scales = reinterpret_cast<float*>(room.data() + N * fours);
      auto* offsets = reinterpret_cast<std::int32_t*>(scales + N * parts);
      std::size_t done = 0;
      if constexpr (N % 4 == 0) {
        done = fours / 4 * 4;
        for (std::size_t n = 0; n < N; n += 4)
          for (std::size_t i = 0; i < done; i += 4)
            transpose_fours({x[n].q + 4 * i, x[n + 1].q + 4 * i, x[n + 2].q + 4 * i, x[n + 3].q + 4 * i}, to + 4 * (N * i + n), 4 * N);
      }
      for (std::size_t n = 0; n < N; ++n) {
        for (std::size_t i = done; i < fours; ++i) std::memcpy(to + 4 * (N * i + n), x[n].q + 4 * i, 4);
        for (std::size_t i = 0; i < parts; ++i) scales[N * i + n] = x[n].scale[i], offsets[N * i + n] = x[n].offset[i];
      }
      q = reinterpret_cast<const std::int8_t*>(to), scale = scales, offset = offsets;
    }
  }
};

// Sums of T tiles with N rows, K of each so that a product does not wait for the one before it.
template <class V, int Bits, int T, int N, int K>
struct IntegerSums {
  using I = typename V::I;
  const std::uint8_t* p[T];
  const std::int8_t* q;
  I of[T][N][K];

  IntegerSums(const Matrix& w, const std::int8_t* codes, int tile) : q(codes) {
    WB_UNROLL for (int t = 0; t < T; ++t) p[t] = w.codes + static_cast<std::size_t>(tile + t) * w.tile_bytes;
    clear();
  }
  void clear() {
    WB_UNROLL for (int t = 0; t < T; ++t)
      WB_UNROLL for (int n = 0; n < N; ++n)
        WB_UNROLL for (int k = 0; k < K; ++k) of[t][n][k] = V::izero();
  }
  // A left shift of the sums by one bit. Adding is the cheaper instruction.
  void twice() {
    WB_UNROLL for (int t = 0; t < T; ++t)
      WB_UNROLL for (int n = 0; n < N; ++n)
        WB_UNROLL for (int k = 0; k < K; ++k) of[t][n][k] = V::iadd(of[t][n][k], of[t][n][k]);
  }
  void add(int quads) {
    constexpr int at_once = Bits == 8 ? 1 : 2;  // quads to 64 bytes
    int i = 0;
    for (; i + K * at_once <= quads; i += K * at_once) WB_UNROLL for (int k = 0; k < K; ++k) word(k);
    for (; i < quads; i += at_once) word(0);
  }
  I sum(int t, int n) const {
    I sum = of[t][n][0];
    for (int k = 1; k < K; ++k) sum = V::iadd(sum, of[t][n][k]);
    return sum;
  }

 private:
  void word(int k) {
    typename V::B v[T];
    WB_UNROLL for (int t = 0; t < T; ++t) {
      v[t] = V::bytes(p[t]);
      if constexpr (N <= 2) V::prefetch(p[t] + kAhead);
      p[t] += 64;
    }
    if constexpr (Bits == 8) {
      products(k, v);
    } else {
      typename V::B half[T];
      WB_UNROLL for (int t = 0; t < T; ++t) half[t] = V::low4(v[t]);
      products(k, half);
      WB_UNROLL for (int t = 0; t < T; ++t) half[t] = V::high4(v[t]);
      products(k, half);
    }
  }
  void products(int k, const typename V::B* v) {
    WB_UNROLL for (int n = 0; n < N; ++n)
      WB_UNROLL for (int t = 0; t < T; ++t) of[t][n][k] = V::template dot<Bits == 8>(of[t][n][k], v[t], q + kQuad * n);
    q += kQuad * N;
  }
};

template <int N>
constexpr int sums_of_row() { return N == 1 ? 4 : N == 2 ? 2 : 1; }

// One sum through all sections, doubled where the scale halves.
template <class V, int Bits, int T, int N>
void tiles_doubling(const Matrix& w, const IntegerPanel<N>& x, float* const* y, bool add, int tile) {
  IntegerSums<V, Bits, T, N, sums_of_row<N>()> sums(w, x.q, tile);
  for (const Section& s : w.input->sections) {
    for (int i = 0; i < s.doublings; ++i) sums.twice();
    sums.add(s.quads);
  }
  WB_UNROLL for (int t = 0; t < T; ++t) {
    const auto scale = V::load_fp16(w.grid.scales16 + static_cast<std::size_t>(tile + t) * kRows);
    typename V::F total[N];
    WB_UNROLL for (int n = 0; n < N; ++n)
      total[n] = V::mul(V::to_float(V::iadd(sums.sum(t, n), V::iset(-x.offset[n]))), V::mul(scale, V::set(x.scale[n])));
    put<V, N>(w, tile + t, total, y, add);
  }
}

// Every section's sum made fp32 and scaled by itself.
template <class V, int Bits, int N>
void tile_apart(const Matrix& w, const IntegerPanel<N>& x, float* const* y, bool add, int tile) {
  using F = typename V::F;
  const int groups = w.grouping.n_groups;
  const std::uint16_t* scales = w.grid.scales16 + static_cast<std::size_t>(tile) * groups * kRows;
  IntegerSums<V, Bits, 1, N, sums_of_row<N>()> sums(w, x.q, tile);
  F total[N];
  WB_UNROLL for (int n = 0; n < N; ++n) total[n] = V::zero();
  const auto& sections = w.input->sections;
  for (std::size_t s = 0; s < sections.size(); ++s) {
    sums.clear();
    sums.add(sections[s].quads);
    const F own = V::load_fp16(scales + (groups > 1 ? s * kRows : 0));
    WB_UNROLL for (int n = 0; n < N; ++n)
      total[n] = V::fma(V::to_float(V::iadd(sums.sum(0, n), V::iset(-x.offset[N * s + n]))), V::mul(own, V::set(x.scale[N * s + n])), total[n]);
  }
  put<V, N>(w, tile, total, y, add);
}

template <class V, int Bits, int N>
void panel_integer(const Matrix& w, const Activation* x, float* const* y, bool add, int first, int last) {
  const IntegerPanel<N> panel(*w.input, x);
  int tile = first;
  if (w.input->apart) {
    for (; tile < last; ++tile) tile_apart<V, Bits, N>(w, panel, y, add, tile);
    return;
  }
  // Two tiles use each activation twice: loading them is what binds otherwise.
  if constexpr (V::many_registers && N >= 4)
    for (; tile + 2 <= last; tile += 2) tiles_doubling<V, Bits, 2, N>(w, panel, y, add, tile);
  for (; tile < last; ++tile) tiles_doubling<V, Bits, 1, N>(w, panel, y, add, tile);
}

template <class V, int Bits>
void rows_integer(const Matrix& w, const Activation* x, int n, float* const* y, bool add, int first, int last) {
  for (; n >= 12; n -= 12, x += 12, y += 12) panel_integer<V, Bits, 12>(w, x, y, add, first, last);
  if (n >= 8) panel_integer<V, Bits, 8>(w, x, y, add, first, last), n -= 8, x += 8, y += 8;
  if (n >= 4) panel_integer<V, Bits, 4>(w, x, y, add, first, last), n -= 4, x += 4, y += 4;
  if (n >= 2) panel_integer<V, Bits, 2>(w, x, y, add, first, last), n -= 2, x += 2, y += 2;
  if (n >= 1) panel_integer<V, Bits, 1>(w, x, y, add, first, last);
}

template <class V>
void integer(WB_PRODUCT_ARGUMENTS) {
  static_cast<void>(bits);
  if (w.bits == 4) rows_integer<V, 4>(w, x, n, y, add, first, last);
  else {
    if constexpr (V::widens_integers)
      if (!w.input->apart && n > 2) {  // fewer wait for the weights, which bytes are read fastest as
        const int done = rows_wide<V>(w, x, n, y, add, first, last);
        n -= done, x += done, y += done;
      }
    rows_integer<V, 8>(w, x, n, y, add, first, last);
  }
}

}  // namespace
}  // namespace wb
