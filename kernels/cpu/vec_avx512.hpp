// Sixteen lanes on AVX-512 (F, BW, VL, DQ, VNNI).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace wb {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  using B = __m512i;  // 64 bytes: 4 channels of 16 rows

  static F zero() { return _mm512_setzero_ps(); }
  static F set(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
  static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F pow2(F n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }
  static float highest(F a) { return _mm512_reduce_max_ps(a); }

  static F load_fp16(const std::uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_fp16(std::uint16_t* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static F load_u8(const std::uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  // Rounded to nearest; |v| <= 127.
  static void store_i8(std::int8_t* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }

  static I izero() { return _mm512_setzero_si512(); }
  static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }

  static B bytes(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
  static B low4(B v) { return _mm512_and_si512(v, _mm512_set1_epi8(0x0F)); }
  static B high4(B v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(0x0F)); }
  // Bits 2 m, 2 m + 1 of every byte, moved to bits `to`, `to` + 1, all others zero.
  template <int M, int To>
  static B crumb(B v) {
    constexpr int by = 2 * M - To;
    if constexpr (by > 0) v = _mm512_srli_epi16(v, by);
    if constexpr (by < 0) v = _mm512_slli_epi16(v, -by);
    return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(3 << To)));
  }
  static B either(B a, B b) { return _mm512_or_si512(a, b); }
  // `value` in every byte whose bit is set in the 64 bits at p, added to v.
  static B add_plane(B v, const std::uint8_t* p, int value) {
    std::uint64_t mask;
    std::memcpy(&mask, p, 8);
    return _mm512_mask_add_epi8(v, _cvtu64_mask64(mask), v, _mm512_set1_epi8(static_cast<char>(value)));
  }
  static B bzero() { return _mm512_setzero_si512(); }

  // Lane sums of 4 unsigned codes times the 4 signed activations at a.
  template <bool Wide>
  static I dot(I sum, B codes, const std::int8_t* a) {
    std::int32_t four;
    std::memcpy(&four, a, 4);
    return _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(four));
  }
  template <int K>
  static F byte_lane(B v) {
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(v, 8 * K), _mm512_set1_epi32(0xFF)));
  }

  static F bf16_low(B v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
  static F bf16_high(B v) { return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)))); }
  // Lane sums of 2 bf16 weights times the 2 bf16 activations at a.
  static F dot_bf16(F sum, B w, const std::uint16_t* a) {
    std::uint32_t pair;
    std::memcpy(&pair, a, 4);
    const B x = _mm512_set1_epi32(static_cast<int>(pair));
    return fma(bf16_high(w), bf16_high(x), fma(bf16_low(w), bf16_low(x), sum));
  }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
};

#if defined(__AVX512BF16__)
// The same with bf16 dot products in one instruction.
struct Avx512Bf16 : Avx512 {
  static F dot_bf16(F sum, B w, const std::uint16_t* a) {
    std::uint32_t pair;
    std::memcpy(&pair, a, 4);
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w),
                            reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair))));
  }
};
#endif

}  // namespace wb
