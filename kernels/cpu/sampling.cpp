#include "sampling.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <utility>
#include <vector>

namespace wb {

int sample(const float* logits, int n, const Sampler& sampler, double uniform) {
  int best = 0;
  float poison = 0;
  for (int i = 0; i < n; ++i) {
    poison += logits[i] * 0.0f;
    if (logits[i] > logits[best]) best = i;
  }
  if (poison != poison) {
    for (int i = 0; i < n; ++i)
      if (logits[i] != logits[i]) return -1;
  }
  if (sampler.temperature == 0) return best;

  // Largest first, lower ids first among equals. A heap gives them one by one: most draws need only a few.
  const double top = static_cast<double>(logits[best]) / sampler.temperature;
  std::vector<std::pair<double, int>> heap(static_cast<std::size_t>(n));
  for (int i = 0; i < n; ++i) heap[static_cast<std::size_t>(i)] = {static_cast<double>(logits[i]) / sampler.temperature, -i};
  const std::size_t kept = sampler.top_k > 0 ? std::min<std::size_t>(static_cast<std::size_t>(sampler.top_k), heap.size()) : heap.size();
  if (kept < heap.size()) {
    std::nth_element(heap.begin(), heap.begin() + static_cast<std::ptrdiff_t>(kept - 1), heap.end(), std::greater<>());
    heap.resize(kept);
  }
  double total = 0;
  for (const auto& [scaled, id] : heap) total += std::exp(scaled - top);
  std::make_heap(heap.begin(), heap.end());
  std::vector<std::pair<double, int>> taken;  // cumulative share of all, id
  double sum = 0;
  const double limit = sampler.top_p < 1 ? sampler.top_p : 1.0;
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end());
    sum += std::exp(heap.back().first - top);
    taken.emplace_back(sum / total, -heap.back().second);
    heap.pop_back();
    // Without top_p the draw itself says how far to go; with it, the set that reaches top_p must be known first.
    if (limit < 1 ? taken.back().first >= limit : taken.back().first > uniform) break;
  }
  const double share = limit < 1 ? taken.back().first : 1.0;
  for (const auto& [cumulative, id] : taken)
    if (cumulative / share > uniform) return id;
  return taken.back().second;
}

}  // namespace wb
