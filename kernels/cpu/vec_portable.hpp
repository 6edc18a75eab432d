// Sixteen lanes in plain C++, for any processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.hpp"
#include "integer.hpp"

namespace wb {

struct Portable {
  struct F { float v[16]; };
  struct I { std::int32_t v[16]; };
  struct B { std::uint8_t v[64]; };

  template <class Get>
  static F each(Get get) {
    F r;
    for (int i = 0; i < 16; ++i) r.v[i] = get(i);
    return r;
  }
  static constexpr bool transposes_planes = false;
  static constexpr bool many_registers = false;
  static constexpr bool rounds_four = false;
  static constexpr bool widens_integers = false;

  static F zero() { return set(0.0f); }
  static F set(float x) { return each([&](int) { return x; }); }
  static F load(const float* p) { return each([&](int i) { return p[i]; }); }
  static void store(float* p, const F& x) { std::memcpy(p, x.v, sizeof x.v); }
  static F add(const F& a, const F& b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
  static F sub(const F& a, const F& b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
  static F mul(const F& a, const F& b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
  static F div(const F& a, const F& b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
  static F max(const F& a, const F& b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
  static F min(const F& a, const F& b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
  static F abs(const F& a) { return each([&](int i) { return std::fabs(a.v[i]); }); }
  static F fma(const F& a, const F& b, const F& c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
  static F fnma(const F& a, const F& b, const F& c) { return each([&](int i) { return c.v[i] - a.v[i] * b.v[i]; }); }
  static F round(const F& a) { return each([&](int i) { return std::nearbyint(a.v[i]); }); }
  static F pow2(const F& n) { return each([&](int i) { return n.v[i] == n.v[i] ? std::ldexp(1.0f, static_cast<int>(n.v[i])) : n.v[i]; }); }
  static float sum(const F& a) {
    float s = 0;
    for (int i = 0; i < 16; ++i) s += a.v[i];
    return s;
  }
  // The sums across the lanes of four.
  static void sum4(const F* x, float* to) {
    for (int i = 0; i < 4; ++i) to[i] = sum(x[i]);
  }
  static float highest(const F& a) {
    float s = a.v[0];
    for (int i = 1; i < 16; ++i) s = a.v[i] > s ? a.v[i] : s;
    return s;
  }

  static F load_fp16(const std::uint16_t* p) { return each([&](int i) { return fp16_to_float(p[i]); }); }
  static void store_fp16(std::uint16_t* p, const F& x) {
    for (int i = 0; i < 16; ++i) p[i] = float_to_fp16(x.v[i]);
  }
  static F load_u8(const std::uint8_t* p) { return each([&](int i) { return static_cast<float>(p[i]); }); }
  static F load_i8(const std::int8_t* p) { return each([&](int i) { return static_cast<float>(p[i]); }); }
  static void store_i8(std::int8_t* p, const F& x) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<std::int8_t>(std::nearbyint(x.v[i]));
  }

  static I izero() { return I{}; }
  static I iset(std::int32_t v) {
    I r;
    for (int i = 0; i < 16; ++i) r.v[i] = v;
    return r;
  }
  static I iadd(const I& a, const I& b) {
    I r;
    for (int i = 0; i < 16; ++i) r.v[i] = a.v[i] + b.v[i];
    return r;
  }
  static I iload(const std::int32_t* p) {
    I r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static void istore(std::int32_t* p, const I& a) { std::memcpy(p, a.v, sizeof a.v); }
  // 1 where a > b, else 0.
  static void store_above(std::uint8_t* p, const F& a, const F& b) {
    for (int i = 0; i < 16; ++i) p[i] = a.v[i] > b.v[i];
  }
  static F to_float(const I& a) { return each([&](int i) { return static_cast<float>(a.v[i]); }); }

  static B bytes(const std::uint8_t* p) {
    B r;
    std::memcpy(r.v, p, 64);
    return r;
  }
  template <class Get>
  static B each_byte(Get get) {
    B r;
    for (int i = 0; i < 64; ++i) r.v[i] = static_cast<std::uint8_t>(get(i));
    return r;
  }
  static B low4(const B& a) { return each_byte([&](int i) { return a.v[i] & 15; }); }
  static B high4(const B& a) { return each_byte([&](int i) { return a.v[i] >> 4; }); }
  template <int M, int To>
  static B crumb(const B& a) {
    return each_byte([&](int i) { return ((a.v[i] >> (2 * M)) & 3) << To; });
  }
  static B either(const B& a, const B& b) {
    return each_byte([&](int i) { return a.v[i] | b.v[i]; });
  }
  static B add_plane(const B& a, const std::uint8_t* p, int value) {
    return each_byte([&](int i) { return a.v[i] + ((p[i / 8] >> (i % 8)) & 1) * value; });
  }
  static B bzero() { return B{}; }

  template <bool Wide>
  static I dot(const I& sum, const B& codes, const std::int8_t* a) {
    I r;
    for (int i = 0; i < 16; ++i)
      r.v[i] = sum.v[i] + codes.v[4 * i] * a[0] + codes.v[4 * i + 1] * a[1] + codes.v[4 * i + 2] * a[2] +
               codes.v[4 * i + 3] * a[3];
    return r;
  }
  // The same of 4 signed codes and 4 activations of 0 to 127.
  static I dot_signed(const I& sum, const B& codes, const std::int8_t* a) {
    I r = sum;
    for (int i = 0; i < 64; ++i) r.v[i / 4] += static_cast<std::int8_t>(codes.v[i]) * a[i % 4];
    return r;
  }
  // As `dot`, with activations of the same channels as the codes, 64 of each.
  template <bool Wide>
  static I dot_row(const I& sum, const B& codes, const std::int8_t* a) {
    I r = sum;
    for (int i = 0; i < 64; ++i) r.v[i / 4] += codes.v[i] * a[i];
    return r;
  }
  // 64 codes from 32 bytes: the low nibbles, then the high ones.
  static B nibbles(const std::uint8_t* p) {
    return each_byte([&](int i) { return i < 32 ? p[i] & 15 : p[i - 32] >> 4; });
  }
  // Bytes in another order; readable up to the end of the last table.
  static void permute(const ByteOrder& order, const std::int8_t* from, std::int8_t* to) {
    for (int i = 0; i < order.n; ++i) to[i] = from[order.from[static_cast<std::size_t>(i)]];
  }
  template <int K>
  static F byte_lane(const B& a) {
    return each([&](int i) { return static_cast<float>(a.v[4 * i + K]); });
  }

  static F bf16_half(const B& a, int half) {
    return each([&](int i) {
      std::uint16_t h;
      std::memcpy(&h, a.v + 4 * i + 2 * half, 2);
      return bf16_to_float(h);
    });
  }
  static F bf16_low(const B& a) { return bf16_half(a, 0); }
  static F bf16_high(const B& a) { return bf16_half(a, 1); }
  static F dot_bf16(const F& sum, const B& w, const std::uint16_t* a) {
    return fma(bf16_high(w), set(bf16_to_float(a[1])), fma(bf16_low(w), set(bf16_to_float(a[0])), sum));
  }
  // The same with 32 activations of the same channels as the weights.
  static F dot_bf16_row(const F& sum, const B& w, const std::uint16_t* a) {
    const B x = bytes(reinterpret_cast<const std::uint8_t*>(a));
    return fma(bf16_high(w), bf16_high(x), fma(bf16_low(w), bf16_low(x), sum));
  }
  static void prefetch(const void*) {}
  static void prefetch_far(const void*) {}
  // The first 16 * lanes bytes, then zeros.
  static B bytes_part(const std::uint8_t* p, int lanes) {
    B r{};
    std::memcpy(r.v, p, 16 * static_cast<std::size_t>(lanes));
    return r;
  }
  // Bytes of four side by side, within each 16 bytes: byte 16 l + 4 k + c of `to[m]` is byte 16 l + 4 m + k of the c-th.
  static void interleave(const B& a, const B& b, const B& c, const B& d, B* to) {
    for (int m = 0; m < 4; ++m)
      for (int i = 0; i < 16; ++i) {
        const int from = 16 * (i / 4) + 4 * m + i % 4;
        to[m].v[4 * i] = a.v[from], to[m].v[4 * i + 1] = b.v[from], to[m].v[4 * i + 2] = c.v[from], to[m].v[4 * i + 3] = d.v[from];
      }
  }

  // The 2^Bits weights of one row, fp16 at p.
  template <int Bits>
  struct Table {
    float of[1 << Bits];
    explicit Table(const std::uint16_t* p) {
      for (int i = 0; i < 1 << Bits; ++i) of[i] = fp16_to_float(p[i]);
    }
    // Weights of the 32 channels whose codes are word `at` of each plane, the most significant first.
    void weights(const std::uint8_t* const* planes, std::size_t at, F& low, F& high) const {
      int codes[32] = {};
      for (int j = 0; j < Bits; ++j)
        for (int i = 0; i < 32; ++i) codes[i] = 2 * codes[i] + ((planes[j][4 * at + static_cast<std::size_t>(i) / 8] >> (i % 8)) & 1);
      low = each([&](int i) { return of[codes[i]]; });
      high = each([&](int i) { return of[codes[16 + i]]; });
    }
  };
};

}  // namespace wb
