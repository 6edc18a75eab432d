// Bytes in another order by shuffles of sixteen, which AVX2 has and AVX-512 without VBMI has no better than.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "integer.hpp"

namespace wb {
namespace {

// `from` is readable up to the end of its last sixteen bytes.
inline void permute_sixteens(const ByteOrder& order, const std::int8_t* from, std::int8_t* to) {
  const std::int32_t *part = order.first16.data(), *table = order.sixteens.data();
  const std::uint8_t* shuffle = order.shuffles.data();
  const auto load = [](const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); };
  for (int i = 0; i < order.n; i += 16, ++part) {
    __m128i found = _mm_setzero_si128();
    for (std::int32_t p = part[0]; p < part[1]; ++p)
      found = _mm_or_si128(found, _mm_shuffle_epi8(load(from + 16 * static_cast<std::ptrdiff_t>(table[p])), load(shuffle + 16 * static_cast<std::ptrdiff_t>(p))));
    if (order.n - i >= 16) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), found);
    } else {
      alignas(16) std::int8_t last[16];
      _mm_store_si128(reinterpret_cast<__m128i*>(last), found);
      std::memcpy(to + i, last, static_cast<std::size_t>(order.n - i));
    }
  }
}

}  // namespace
}  // namespace wb
