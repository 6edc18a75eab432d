// Sixteen lanes on AVX-512 (F, BW, VL, DQ, VNNI).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "permute_impl.hpp"

namespace wb {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  using B = __m512i;  // 64 bytes: 4 channels of 16 rows
  static constexpr bool transposes_planes = false;
  static constexpr bool many_registers = true;
  static constexpr bool rounds_four = true;
  static constexpr bool widens_integers = false;  // one instruction takes four products of bytes

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
  // The sums across the lanes of four, each added up in the same order wherever it stands.
  static void sum4(const F* x, float* to) {
    const F ab = add(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const F cd = add(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    const F all = add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }

  static F load_fp16(const std::uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_fp16(std::uint16_t* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static F load_u8(const std::uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static F load_i8(const std::int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  // Rounded to nearest; |v| <= 127.
  static void store_i8(std::int8_t* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }
  // Sixty-four at once, rounded to the nearest and saturated.
  static void round_i8(std::int8_t* p, F a, F b, F c, F d) {
    const B ab = _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b)), cd = _mm512_packs_epi32(_mm512_cvtps_epi32(c), _mm512_cvtps_epi32(d));
    const B order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);  // both pack within 128 bits
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(ab, cd)));
  }

  static I izero() { return _mm512_setzero_si512(); }
  static I iset(std::int32_t v) { return _mm512_set1_epi32(v); }
  static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
  static I iload(const std::int32_t* p) { return _mm512_loadu_si512(p); }
  static void istore(std::int32_t* p, I v) { _mm512_storeu_si512(p, v); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  // 1 where a > b, else 0.
  static void store_above(std::uint8_t* p, F a, F b) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_maskz_set1_epi8(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), 1));
  }

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
  // The same of 4 signed codes and 4 activations of 0 to 127.
  static I dot_signed(I sum, B codes, const std::int8_t* a) {
    std::int32_t four;
    std::memcpy(&four, a, 4);
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(four), codes);
  }
  // As `dot`, with activations of the same channels as the codes, 64 of each.
  template <bool Wide>
  static I dot_row(I sum, B codes, const std::int8_t* a) {
    return _mm512_dpbusd_epi32(sum, codes, _mm512_loadu_si512(a));
  }
  // 64 codes from 32 bytes: the low nibbles, then the high ones.
  static B nibbles(const std::uint8_t* p) {
    const B both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return low4(_mm512_srlv_epi64(both, _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0)));
  }
  // Bytes in another order; readable up to the end of the last table.
  static void permute(const ByteOrder& order, const std::int8_t* from, std::int8_t* to) { permute_sixteens(order, from, to); }
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
  // The same with 32 activations of the same channels as the weights.
  static F dot_bf16_row(F sum, B w, const std::uint16_t* a) {
    const B x = _mm512_loadu_si512(a);
    return fma(bf16_high(w), bf16_high(x), fma(bf16_low(w), bf16_low(x), sum));
  }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  static void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
  static B bytes_part(const std::uint8_t* p, int lanes) {
    return _mm512_maskz_loadu_epi8(~std::uint64_t{0} >> (64 - 16 * lanes), p);
  }
  static void interleave(B a, B b, B c, B d, B* to) {
    const B ab = _mm512_unpacklo_epi8(a, b), AB = _mm512_unpackhi_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d), CD = _mm512_unpackhi_epi8(c, d);
    to[0] = _mm512_unpacklo_epi16(ab, cd);
    to[1] = _mm512_unpackhi_epi16(ab, cd);
    to[2] = _mm512_unpacklo_epi16(AB, CD);
    to[3] = _mm512_unpackhi_epi16(AB, CD);
  }

  // The 2^Bits weights of one row, fp16 at p: 32 to a register.
  template <int Bits>
  struct Table {
    static constexpr int parts = Bits <= 5 ? 1 : 1 << (Bits - 5);
    B of[parts];
    explicit Table(const std::uint16_t* p) {
      if constexpr (Bits < 5) of[0] = _mm512_maskz_loadu_epi16((1u << (1 << Bits)) - 1, p);
      else
        for (int i = 0; i < parts; ++i) of[i] = _mm512_loadu_si512(p + 32 * i);
    }
    // Weights of the 32 channels whose codes are word `at` of each plane, the most significant first.
    void weights(const std::uint8_t* const* planes, std::size_t at, F& low, F& high) const {
      const auto set = [&](int j) {
        std::uint32_t word;
        std::memcpy(&word, planes[j] + 4 * at, 4);
        return _cvtu32_mask32(word);
      };
      B codes = _mm512_setzero_si512();
      for (int j = Bits > 6 ? Bits - 6 : 0; j < Bits; ++j)
        codes = _mm512_mask_add_epi16(codes, set(j), codes, _mm512_set1_epi16(static_cast<short>(1 << (Bits - 1 - j))));
      B found;
      if constexpr (Bits <= 5) found = _mm512_permutexvar_epi16(codes, of[0]);
      else if constexpr (Bits == 6) found = pair<0>(codes);
      else if constexpr (Bits == 7) found = _mm512_mask_blend_epi16(set(0), pair<0>(codes), pair<1>(codes));
      else
        found = _mm512_mask_blend_epi16(set(0), _mm512_mask_blend_epi16(set(1), pair<0>(codes), pair<1>(codes)),
                                        _mm512_mask_blend_epi16(set(1), pair<2>(codes), pair<3>(codes)));
      low = _mm512_cvtph_ps(_mm512_castsi512_si256(found));
      high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(found, 1));
    }

   private:
    template <int I>
    B pair(B codes) const { return _mm512_permutex2var_epi16(of[2 * I], codes, of[2 * I + 1]); }
  };
};

#if defined(__AVX512BF16__)
// Where the bytes of two planes go, one plane in bytes 0 .. 31 and one in 32 .. 63, to lie in words ready for unpacking.
struct PlaneOrder {
  alignas(64) std::uint8_t at[64] = {};

  // place(word): part and quadword of the planes' byte that word takes, as 8 part + quadword.
  template <class Place>
  explicit constexpr PlaneOrder(Place place) {
    for (int word = 0; word < 32; ++word) {
      at[2 * word] = static_cast<std::uint8_t>(place(word));
      at[2 * word + 1] = static_cast<std::uint8_t>(32 + place(word));
    }
  }
};
// Word 8 l + 4 h + d is to be dword d of 128-bit lane l of half h.
inline constexpr PlaneOrder kNibbles([](int w) { return 8 * (2 * (w / 4 % 2) + 1 - w % 2) + 2 * (w / 8) + w % 4 / 2; });
inline constexpr PlaneOrder kBytes([](int w) { return 8 * (2 * (w / 4 % 2) + w % 4 / 2) + 2 * (w / 8) + w % 2; });
inline constexpr PlaneOrder kCrumbs([](int w) { return 8 * (3 - w % 4) + w / 4; });

// The same with bf16 dot products in one instruction, and with VBMI and GFNI, which turn planes into codes.
struct Avx512Bf16 : Avx512 {
  static F dot_bf16(F sum, B w, const std::uint16_t* a) {
    std::uint32_t pair;
    std::memcpy(&pair, a, 4);
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w),
                            reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair))));
  }
  static F dot_bf16_row(F sum, B w, const std::uint16_t* a) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(_mm512_loadu_si512(a)));
  }

  static void permute(const ByteOrder& order, const std::int8_t* from, std::int8_t* to) {
    B found = _mm512_setzero_si512();
    for (const ByteOrder::Part& part : order.parts) {
      const B within = _mm512_loadu_si512(order.within.data() + part.to);
      const std::int8_t* table = from + 128 * part.table;
      const B here = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), within, _mm512_loadu_si512(table + 64));
      found = _mm512_mask_mov_epi8(found, _cvtu64_mask64(part.bytes), here);
      _mm512_storeu_si512(to + part.to, found);  // all 64 bytes are right with the last of their parts
    }
  }

  static constexpr bool transposes_planes = true;
  // The codes of a chunk, v[m] its part m, from the 32 bytes that each plane has of it (most significant first).
  //
  // Byte 8 m + q of a plane holds one bit of each of bytes 8 q .. 8 q + 7 of v[m]. Eight planes' bytes of one (m, q),
  // side by side in a quadword, are therefore an 8 x 8 bit matrix whose transpose is those eight codes, which is what
  // an affine map with the unit vectors for its input computes. Four planes leave half of a quadword for another part,
  // two planes three quarters.
  template <int Planes>
  static void transpose_planes(const std::uint8_t* const* p, B* v) {
    if constexpr (Planes == 2) {
      const B crumbs = transpose(_mm512_permutexvar_epi8(order(kCrumbs), both(p[0], p[1])));
      v[0] = crumb<0, 0>(crumbs);
      v[1] = crumb<1, 0>(crumbs);
      v[2] = crumb<2, 0>(crumbs);
      v[3] = crumb<3, 0>(crumbs);
    } else if constexpr (Planes <= 4) {
      B four[2];
      gather<Planes>(p, kNibbles, four);
      for (int h = 0; h < 2; ++h) {
        const B nibbles = transpose(four[h]);
        v[2 * h] = low4(nibbles);
        v[2 * h + 1] = high4(nibbles);
      }
    } else {
      B high[2], low[2];
      gather<Planes - 4>(p, kBytes, high);
      gather<4>(p + Planes - 4, kBytes, low);
      for (int h = 0; h < 2; ++h) {
        v[2 * h] = transpose(_mm512_unpacklo_epi32(high[h], low[h]));
        v[2 * h + 1] = transpose(_mm512_unpackhi_epi32(high[h], low[h]));
      }
    }
  }

 private:
  static B order(const PlaneOrder& t) { return _mm512_load_si512(t.at); }
  static __m256i half(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static B both(const std::uint8_t* a, const std::uint8_t* b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(half(a)), half(b), 1);
  }
  static B transpose(B planes) {
    return _mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(static_cast<long long>(0x8040201008040201ULL)), planes, 0);
  }
  // The bytes of up to four planes in dwords, the last plane in the last byte, absent planes zero.
  template <int Planes>
  static void gather(const std::uint8_t* const* p, const PlaneOrder& t, B* halves) {
    B first = _mm512_setzero_si512(), second;
    if constexpr (Planes == 4) first = _mm512_permutexvar_epi8(order(t), both(p[0], p[1]));
    if constexpr (Planes == 3) first = last_byte(p[0], t);
    if constexpr (Planes >= 2) second = _mm512_permutexvar_epi8(order(t), both(p[Planes - 2], p[Planes - 1]));
    else second = last_byte(p[0], t);
    halves[0] = _mm512_unpacklo_epi16(first, second);
    halves[1] = _mm512_unpackhi_epi16(first, second);
  }
  static B last_byte(const std::uint8_t* p, const PlaneOrder& t) {
    return _mm512_maskz_permutexvar_epi8(0xAAAAAAAAAAAAAAAAULL, order(t), both(p, p));
  }
};
#endif

}  // namespace wb
