// Softmax attention over a cache of keys and values.
#pragma once

#include "lanes.hpp"
#include "vectors_impl.hpp"

namespace wb {
namespace {

template <class V>
typename V::F load_cached(const float* p) {
  return V::load(p);
}
template <class V>
typename V::F load_cached(const std::uint16_t* p) {
  return V::load_fp16(p);
}

// Scores of N queries for the blocks of 16 positions that any of them sees, and their softmax; then the weighted values.
// What one query gives does not depend on the others: each adds up its own positions, in their order.
template <class V, class T, int N>
void attend_queries(const CacheView& cache, int kv_head, const Query* queries, float scale, float* scores) {
  using F = typename V::F;
  const int dim = cache.head_dim;
  int low = queries[0].first / 16, high = queries[0].last / 16;
  int from = queries[0].first, to = queries[0].last;  // what all of them see
  for (int n = 1; n < N; ++n) {
    low = std::min(low, queries[n].first / 16), high = std::max(high, queries[n].last / 16);
    from = std::max(from, queries[n].first), to = std::min(to, queries[n].last);
  }
  // Scores as [block][N][16 positions] and queries likewise: one address serves all N.
  float* const asked = scores + static_cast<std::size_t>(high - low + 1) * N * 16;
  for (int n = 0; n < N; ++n)
    for (int d = 0; d < dim; d += 16) std::copy(queries[n].q + d, queries[n].q + std::min(d + 16, dim), asked + d * N + n * 16);
  const float none = -std::numeric_limits<float>::infinity();
  // Few queries work on several blocks of positions at once, so that one sum need not wait for another.
  constexpr int At = N == 1 ? 4 : N <= 3 ? 2 : 1;
  const auto keys_of = [&](int b) {
    return static_cast<const T*>(cache.keys[b / (kPiece / 16)]) +
           (static_cast<std::size_t>(kv_head) * (kPiece / 16) + b % (kPiece / 16)) * dim * 16;
  };
  for (int b = low; b <= high; b += At) {
    const int here = std::min(At, high - b + 1);
    const T* keys[At];
    WB_UNROLL for (int j = 0; j < At; ++j) keys[j] = keys_of(b + std::min(j, here - 1));
    F sums[At][N];
    WB_UNROLL for (int j = 0; j < At; ++j)
      WB_UNROLL for (int n = 0; n < N; ++n) sums[j][n] = V::zero();
    // Within sixteen, all that changes are two addresses: working them out would take longer than the sums.
    for (int d = 0; d < dim; d += 16) {
      const float* at = asked + d * N;
      for (const float* end = at + std::min(16, dim - d); at < end; ++at)
        WB_UNROLL for (int j = 0; j < At; ++j) {
          const F k = load_cached<V>(keys[j]);
          keys[j] += 16;
          WB_UNROLL for (int n = 0; n < N; ++n) sums[j][n] = V::fma(k, V::set(at[n * 16]), sums[j][n]);
        }
    }
    for (int j = 0; j < here; ++j)
      WB_UNROLL for (int n = 0; n < N; ++n) V::store(scores + ((b + j - low) * N + n) * 16, V::mul(sums[j][n], V::set(scale)));
  }
  float inverse[N];
  for (int n = 0; n < N; ++n) {
    const int first = queries[n].first, last = queries[n].last;
    // Its own blocks alone, so that sums are the same whoever else is asked.
    float* s = scores + ((first / 16 - low) * N + n) * 16;
    float* end = scores + ((last / 16 - low) * N + n) * 16;
    constexpr int next = N * 16;
    for (int i = 0; i < first % 16; ++i) s[i] = none;
    for (int i = last % 16 + 1; i < 16; ++i) end[i] = none;
    F most = V::load(s);
    for (const float* p = s + next; p <= end; p += next) most = V::max(most, V::load(p));
    const F top = V::set(V::highest(most));
    F total = V::zero();
    for (float* p = s; p <= end; p += next) {
      const F weights = exp<V>(V::sub(V::load(p), top));
      V::store(p, weights);
      total = V::add(total, weights);
    }
    // exp is clamped above zero: positions left out are removed again, from the weights and from the sum.
    float sum = V::sum(total);
    for (int i = 0; i < first % 16; ++i) sum -= s[i], s[i] = 0.0f;
    for (int i = last % 16 + 1; i < 16; ++i) sum -= end[i], end[i] = 0.0f;
    inverse[n] = 1.0f / sum;
  }
  const auto weigh = [&](auto at_once, int d) {
    constexpr int A = at_once.value;
    const auto values_of = [&](int p) {
      return static_cast<const T*>(cache.values[p / kPiece]) +
             (static_cast<std::size_t>(kv_head) * kPiece + p % kPiece) * cache.value_dim + d;
    };
    const auto weights_of = [&](int p) { return scores + (p / 16 - low) * N * 16 + p % 16; };
    F sums[A][N];
    WB_UNROLL for (int j = 0; j < A; ++j)
      WB_UNROLL for (int n = 0; n < N; ++n) sums[j][n] = V::zero();
    // A position that a query does not see must not even meet a weight of zero: its value may be infinite.
    const auto alone = [&](int n, int begin, int end) {
      for (int p = begin; p <= end; ++p)
        WB_UNROLL for (int j = 0; j < A; ++j)
          sums[j][n] = V::fma(load_cached<V>(values_of(p) + 16 * j), V::set(weights_of(p)[n * 16]), sums[j][n]);
    };
    if constexpr (N > 1)
      WB_UNROLL for (int n = 0; n < N; ++n) alone(n, queries[n].first, std::min(queries[n].last, from - 1));
    for (int p = from; p <= to;) {
      const T* values = values_of(p);
      const float* weights = weights_of(p);
      for (const int end = std::min(to, p | 15); p <= end; ++p, ++weights, values += cache.value_dim)
        WB_UNROLL for (int j = 0; j < A; ++j) {
          const F v = load_cached<V>(values + 16 * j);
          WB_UNROLL for (int n = 0; n < N; ++n) sums[j][n] = V::fma(v, V::set(weights[n * 16]), sums[j][n]);
        }
    }
    if constexpr (N > 1)
      WB_UNROLL for (int n = 0; n < N; ++n) alone(n, std::max(from, std::max(to + 1, queries[n].first)), queries[n].last);
    WB_UNROLL for (int j = 0; j < A; ++j)
      WB_UNROLL for (int n = 0; n < N; ++n) {
        const F value = V::mul(sums[j][n], V::set(inverse[n]));
        const int place = d + 16 * j;
        if (place + 16 <= dim) V::store(queries[n].out + place, value);
        else store_part<V>(queries[n].out + place, dim - place, value);
      }
  };
  int d = 0;
  for (; d + 16 * At <= dim; d += 16 * At) weigh(std::integral_constant<int, At>(), d);
  for (; d < dim; d += 16) weigh(std::integral_constant<int, 1>(), d);
}

template <class V, class T>
void attend(const CacheView& cache, int kv_head, const Query* queries, int n, float scale, float* scores) {
  for (; n >= kQueries; n -= kQueries, queries += kQueries) attend_queries<V, T, kQueries>(cache, kv_head, queries, scale, scores);
  for (; n >= 6; n -= 6, queries += 6) attend_queries<V, T, 6>(cache, kv_head, queries, scale, scores);
  for (; n >= 4; n -= 4, queries += 4) attend_queries<V, T, 4>(cache, kv_head, queries, scale, scores);
  switch (n) {
    case 3: attend_queries<V, T, 3>(cache, kv_head, queries, scale, scores); break;
    case 2: attend_queries<V, T, 2>(cache, kv_head, queries, scale, scores); break;
    case 1: attend_queries<V, T, 1>(cache, kv_head, queries, scale, scores); break;
    default: break;
  }
}

}  // namespace
}  // namespace wb
