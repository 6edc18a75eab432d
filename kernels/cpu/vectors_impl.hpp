// Norms, activations, rounding and other work on single vectors.
#pragma once

#include "lanes.hpp"

namespace wb {
namespace {

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
float squares(const float* x, int n) {
  auto total = V::zero();
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const auto part = V::load(x + i);
    total = V::fma(part, part, total);
  }
  float sum = V::sum(total);
  for (; i < n; ++i) sum += x[i] * x[i];
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

}  // namespace
}  // namespace wb
