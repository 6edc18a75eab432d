// What the tests of the kernels share: checks that count, random numbers, distances.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace wb::test {

void integer_products(bool quick);  // test_integer.cpp
void sparse_products(bool quick);   // test_sparse.cpp

inline std::atomic<long> checks{0}, failures{0};

#define CHECK(condition) check((condition), #condition, "", __FILE__, __LINE__)
#define CHECK_IN(condition, where) check((condition), #condition, (where), __FILE__, __LINE__)
#define CHECK_THROWS(type, expression)                                              \
  do {                                                                              \
    bool thrown = false;                                                            \
    try {                                                                           \
      expression;                                                                   \
    } catch (const type&) {                                                         \
      thrown = true;                                                                \
    } catch (...) {                                                                 \
    }                                                                               \
    check(thrown, #expression " throws " #type, "", __FILE__, __LINE__);            \
  } while (false)

inline void check(bool ok, const char* what, const std::string& where, const char* file, int line) {
  ++checks;
  if (ok) return;
  if (++failures <= 50) std::fprintf(stderr, "%s:%d: %s  %s\n", file, line, what, where.c_str());
}

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int below(int n) { return static_cast<int>(engine_() % static_cast<unsigned>(n)); }
  float uniform() { return static_cast<float>(engine_() >> 8) * 0x1p-24f; }
  float normal() {  // near enough, and the same with every standard library
    float sum = 0;
    for (int i = 0; i < 6; ++i) sum += uniform();
    return (sum - 3.0f) * 1.4142135f;
  }
  std::vector<float> normals(std::size_t n, float scale = 1) {
    std::vector<float> v(n);
    for (float& x : v) x = normal() * scale;
    return v;
  }

 private:
  std::mt19937 engine_;
};

inline bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// Largest difference, relative to the largest value; infinite where one is not finite.
inline double distance(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return std::numeric_limits<double>::infinity();
  double most = 0, size = 1e-30;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double d = std::fabs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
    if (!std::isfinite(d)) return std::numeric_limits<double>::infinity();
    most = std::max(most, d);
    size = std::max(size, std::fabs(static_cast<double>(b[i])));
  }
  return most / size;
}

}  // namespace wb::test
