// Sixteen lanes on AVX2, FMA and F16C, as two registers of eight.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "permute_impl.hpp"

namespace wb {

struct Avx2 {
  struct F { __m256 a, b; };
  struct I { __m256i a, b; };
  using B = I;

#define WB_BOTH(name, op) static F name(F x, F y) { return {op(x.a, y.a), op(x.b, y.b)}; }
  WB_BOTH(add, _mm256_add_ps)
  WB_BOTH(sub, _mm256_sub_ps)
  WB_BOTH(mul, _mm256_mul_ps)
  WB_BOTH(div, _mm256_div_ps)
  WB_BOTH(max, _mm256_max_ps)
  WB_BOTH(min, _mm256_min_ps)
#undef WB_BOTH

  static constexpr bool transposes_planes = false;
  static constexpr bool many_registers = false;
  static constexpr bool rounds_four = false;
  static constexpr bool widens_integers = true;

  static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F set(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
  }
  static F abs(F v) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, v.a), _mm256_andnot_ps(sign, v.b)};
  }
  static F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static F fnma(F x, F y, F z) { return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)}; }
  static F round(F v) {
    return {_mm256_round_ps(v.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(v.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  static F pow2(F n) { return {pow2_half(n.a), pow2_half(n.b)}; }
  static float sum(F v) {
    __m256 s = _mm256_add_ps(v.a, v.b);
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
  }
  // The sums across the lanes of four, each added up in the same order wherever it stands.
  static void sum4(const F* x, float* to) {
    const __m256 a = _mm256_add_ps(x[0].a, x[0].b), b = _mm256_add_ps(x[1].a, x[1].b);
    const __m256 c = _mm256_add_ps(x[2].a, x[2].b), d = _mm256_add_ps(x[3].a, x[3].b);
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const __m256 all = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
  static float highest(F v) {
    __m256 s = _mm256_max_ps(v.a, v.b);
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_shuffle_ps(h, h, 1)));
  }

  static F load_fp16(const std::uint16_t* p) {
    const auto* v = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(v)), _mm256_cvtph_ps(_mm_loadu_si128(v + 1))};
  }
  static void store_fp16(std::uint16_t* p, F v) {
    auto* to = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(to, _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(to + 1, _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT));
  }
  static F load_u8(const std::uint8_t* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(v)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)))};
  }
  static F load_i8(const std::int8_t* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)))};
  }
  static void store_i8(std::int8_t* p, F v) {
    const __m256i a = _mm256_cvtps_epi32(v.a), b = _mm256_cvtps_epi32(v.b);
    const __m128i lo = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const __m128i hi = _mm_packs_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(lo, hi));
  }

  static I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static I iset(std::int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
  static I iadd(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static I iload(const std::int32_t* p) { return bytes(reinterpret_cast<const std::uint8_t*>(p)); }
  static void istore(std::int32_t* p, I v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), v.b);
  }
  // 1 where x > y, else 0.
  static void store_above(std::uint8_t* p, F x, F y) {
    const auto above = [](__m256 a, __m256 b) {
      const __m256i all = _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
      return _mm_packs_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    };
    const __m128i all = _mm_packs_epi16(above(x.a, y.a), above(x.b, y.b));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_and_si128(all, _mm_set1_epi8(1)));
  }
  static F to_float(I v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }

  static B bytes(const std::uint8_t* p) {
    const auto* v = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)};
  }
  static B low4(B v) {
    const __m256i m = _mm256_set1_epi8(0x0F);
    return {_mm256_and_si256(v.a, m), _mm256_and_si256(v.b, m)};
  }
  static B high4(B v) {
    const __m256i m = _mm256_set1_epi8(0x0F);
    return {_mm256_and_si256(_mm256_srli_epi16(v.a, 4), m), _mm256_and_si256(_mm256_srli_epi16(v.b, 4), m)};
  }
  template <int M, int To>
  static B crumb(B v) {
    return {crumb_half<M, To>(v.a), crumb_half<M, To>(v.b)};
  }
  static B either(B x, B y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
  static B add_plane(B v, const std::uint8_t* p, int value) {
    std::uint32_t low, high;
    std::memcpy(&low, p, 4);
    std::memcpy(&high, p + 4, 4);
    return {add_plane_half(v.a, low, value), add_plane_half(v.b, high, value)};
  }
  static B bzero() { return izero(); }

  template <bool Wide>
  static I dot(I sum, B codes, const std::int8_t* a) {
    std::int32_t four;
    std::memcpy(&four, a, 4);
    const __m256i x = _mm256_set1_epi32(four);
    return {dot_half<Wide>(sum.a, codes.a, x), dot_half<Wide>(sum.b, codes.b, x)};
  }
  // The same of 4 signed codes and 4 activations of 0 to 127: the sum of two products fits 16 bits.
  static I dot_signed(I sum, B codes, const std::int8_t* a) {
    std::int32_t four;
    std::memcpy(&four, a, 4);
    const __m256i x = _mm256_set1_epi32(four);
    return {dot_half<false>(sum.a, x, codes.a), dot_half<false>(sum.b, x, codes.b)};
  }
  // As `dot`, with activations of the same channels as the codes, 64 of each.
  template <bool Wide>
  static I dot_row(I sum, B codes, const std::int8_t* a) {
    const B x = bytes(reinterpret_cast<const std::uint8_t*>(a));
    return {dot_half<Wide>(sum.a, codes.a, x.a), dot_half<Wide>(sum.b, codes.b, x.b)};
  }
  // 64 codes from 32 bytes: the low nibbles, then the high ones.
  static B nibbles(const std::uint8_t* p) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), m = _mm256_set1_epi8(0x0F);
    return {_mm256_and_si256(both, m), _mm256_and_si256(_mm256_srli_epi16(both, 4), m)};
  }
  // Bytes in another order; readable up to the end of the last table.
  static void permute(const ByteOrder& order, const std::int8_t* from, std::int8_t* to) { permute_sixteens(order, from, to); }

  // Products of 16 bits: what two of them sum to fits 32 without the detour of `dot<true>`. Eight rows of four channels,
  // the sums of channels 0, 1 and of 2, 3 side by side.
  using Wide = I;
  static Wide widen(const std::uint8_t* p) {
    const auto* v = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtepu8_epi16(_mm_loadu_si128(v)), _mm256_cvtepu8_epi16(_mm_loadu_si128(v + 1))};
  }
  static Wide dot_wide(Wide sum, Wide codes, const std::int16_t* a) {
    long long four;
    std::memcpy(&four, a, 8);
    const __m256i x = _mm256_set1_epi64x(four);
    return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(codes.a, x)), _mm256_add_epi32(sum.b, _mm256_madd_epi16(codes.b, x))};
  }
  // The sixteen sums of rows 0 .. 7 and 8 .. 15.
  static I join(Wide low, Wide high) { return {sum_pairs(low), sum_pairs(high)}; }
  // Codes of two rows, widened and shifted: four of a and four of b at `to`, the next four of each `stride` further on.
  static void widen_two(const std::int8_t* a, const std::int8_t* b, int quads, int shift, std::int16_t* to, std::size_t stride) {
    const __m128i by = _mm_cvtsi32_si128(shift);
    const auto store = [&](std::int16_t* at, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(at), v); };
    int i = 0;
    for (; i + 4 <= quads; i += 4, to += 4 * stride) {
      const auto load = [&](const std::int8_t* p) {
        return _mm256_sll_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 4 * i))), by);
      };
      const __m256i x = load(a), y = load(b);
      const __m256i even = _mm256_unpacklo_epi64(x, y), odd = _mm256_unpackhi_epi64(x, y);
      store(to, _mm256_castsi256_si128(even)), store(to + stride, _mm256_castsi256_si128(odd));
      store(to + 2 * stride, _mm256_extracti128_si256(even, 1)), store(to + 3 * stride, _mm256_extracti128_si256(odd, 1));
    }
    for (; i < quads; ++i, to += stride) {
      std::int32_t x, y;
      std::memcpy(&x, a + 4 * i, 4), std::memcpy(&y, b + 4 * i, 4);
      store(to, _mm_sll_epi16(_mm_cvtepi8_epi16(_mm_unpacklo_epi32(_mm_cvtsi32_si128(x), _mm_cvtsi32_si128(y))), by));
    }
  }
  template <int K>
  static F byte_lane(B v) {
    const __m256i m = _mm256_set1_epi32(0xFF);
    return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(v.a, 8 * K), m)),
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(v.b, 8 * K), m))};
  }

  static F bf16_low(B v) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(v.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(v.b, 16))};
  }
  static F bf16_high(B v) {
    const __m256i m = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
    return {_mm256_castsi256_ps(_mm256_and_si256(v.a, m)), _mm256_castsi256_ps(_mm256_and_si256(v.b, m))};
  }
  static F dot_bf16(F sum, B w, const std::uint16_t* a) {
    std::uint32_t pair;
    std::memcpy(&pair, a, 4);
    const __m256i x = _mm256_set1_epi32(static_cast<int>(pair));
    const B both{x, x};
    return fma(bf16_high(w), bf16_high(both), fma(bf16_low(w), bf16_low(both), sum));
  }
  // The same with 32 activations of the same channels as the weights.
  static F dot_bf16_row(F sum, B w, const std::uint16_t* a) {
    const B x = bytes(reinterpret_cast<const std::uint8_t*>(a));
    return fma(bf16_high(w), bf16_high(x), fma(bf16_low(w), bf16_low(x), sum));
  }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  static void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
  static B bytes_part(const std::uint8_t* p, int lanes) {
    if (lanes == 4) return bytes(p);
    const auto* v = reinterpret_cast<const __m128i*>(p);
    const __m256i first = lanes > 1 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)) : _mm256_zextsi128_si256(_mm_loadu_si128(v));
    return {first, lanes > 2 ? _mm256_zextsi128_si256(_mm_loadu_si128(v + 2)) : _mm256_setzero_si256()};
  }
  static void interleave(B a, B b, B c, B d, B* to) {
    const B ab{_mm256_unpacklo_epi8(a.a, b.a), _mm256_unpacklo_epi8(a.b, b.b)}, AB{_mm256_unpackhi_epi8(a.a, b.a), _mm256_unpackhi_epi8(a.b, b.b)};
    const B cd{_mm256_unpacklo_epi8(c.a, d.a), _mm256_unpacklo_epi8(c.b, d.b)}, CD{_mm256_unpackhi_epi8(c.a, d.a), _mm256_unpackhi_epi8(c.b, d.b)};
    to[0] = {_mm256_unpacklo_epi16(ab.a, cd.a), _mm256_unpacklo_epi16(ab.b, cd.b)};
    to[1] = {_mm256_unpackhi_epi16(ab.a, cd.a), _mm256_unpackhi_epi16(ab.b, cd.b)};
    to[2] = {_mm256_unpacklo_epi16(AB.a, CD.a), _mm256_unpacklo_epi16(AB.b, CD.b)};
    to[3] = {_mm256_unpackhi_epi16(AB.a, CD.a), _mm256_unpackhi_epi16(AB.b, CD.b)};
  }

  // The 2^Bits weights of one row, fp16 at p.
  template <int Bits>
  struct Table {
    alignas(32) float of[Bits < 3 ? 8 : 1 << Bits];
    explicit Table(const std::uint16_t* p) {
      if constexpr (Bits < 3) {
        _mm256_store_ps(of, _mm256_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
      } else {
        for (int i = 0; i < 1 << Bits; i += 8)
          _mm256_store_ps(of + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i))));
      }
    }
    // Weights of the 32 channels whose codes are word `at` of each plane, the most significant first.
    void weights(const std::uint8_t* const* planes, std::size_t at, F& low, F& high) const {
      __m256i codes = _mm256_setzero_si256();
      for (int j = 0; j < Bits; ++j) {
        std::uint32_t word;
        std::memcpy(&word, planes[j] + 4 * at, 4);
        codes = add_plane_half(codes, word, 1 << (Bits - 1 - j));
      }
      const __m128i a = _mm256_castsi256_si128(codes), b = _mm256_extracti128_si256(codes, 1);
      low = {eight(a), eight(_mm_srli_si128(a, 8))};
      high = {eight(b), eight(_mm_srli_si128(b, 8))};
    }

   private:
    __m256 eight(__m128i codes) const {
      const __m256i at = _mm256_cvtepu8_epi32(codes);
      // Beyond 5 bits permuting and blending takes longer than fetching from the first cache.
      if constexpr (Bits <= 5) return among<Bits>(of, at);
      else return _mm256_i32gather_ps(of, at, 4);
    }
    template <int Low>
    static __m256 among(const float* of, __m256i at) {
      if constexpr (Low <= 3) return _mm256_permutevar8x32_ps(_mm256_load_ps(of), at);
      else
        return _mm256_blendv_ps(among<Low - 1>(of, at), among<Low - 1>(of + (1 << (Low - 1)), at),
                                _mm256_castsi256_ps(_mm256_slli_epi32(at, 32 - Low)));
    }
  };

 private:
  // Neighbouring sums added; `_mm256_hadd_epi32` works within halves, hence the order in which they come out.
  static __m256i sum_pairs(Wide v) { return _mm256_permute4x64_epi64(_mm256_hadd_epi32(v.a, v.b), 0xD8); }
  static __m256 pow2_half(__m256 n) {
    const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_max_epi32(e, _mm256_setzero_si256()), 23));
  }
  template <int M, int To>
  static __m256i crumb_half(__m256i v) {
    constexpr int by = 2 * M - To;
    if constexpr (by > 0) v = _mm256_srli_epi16(v, by);
    if constexpr (by < 0) v = _mm256_slli_epi16(v, -by);
    return _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(3 << To)));
  }
  static __m256i add_plane_half(__m256i v, std::uint32_t mask, int value) {
    const __m256i spread = _mm256_shuffle_epi8(
        _mm256_set1_epi32(static_cast<int>(mask)),
        _mm256_setr_epi64x(0x0000000000000000, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
    const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ULL));
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
    return _mm256_add_epi8(v, _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(value))));
  }
  // Sums of two products must fit 16 bits: 127 x 127 x 2 does, 255 x 127 x 2 does not, so wide codes go in two parts.
  template <bool Wide>
  static __m256i dot_half(__m256i sum, __m256i codes, __m256i x) {
    const __m256i one = _mm256_set1_epi16(1);
    if constexpr (!Wide) return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), one));
    const __m256i low = _mm256_and_si256(codes, _mm256_set1_epi8(0x7F));
    const __m256i top = _mm256_and_si256(_mm256_srli_epi16(codes, 7), _mm256_set1_epi8(1));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), one));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(top, x), _mm256_set1_epi16(128)));
  }
};

}  // namespace wb
