// Tests of the kernels and the decoder in plain C++, to run under sanitizers, where Python would be in the way.
//
//   wb_test [--quick]    --quick: fewer products; for builds that run slowly
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "decoder.hpp"
#include "half.hpp"
#include "predictor.hpp"
#include "test_checks.hpp"

namespace {

using namespace wb;
using namespace wb::test;
using wb::test::distance;  // beside those of this file, which would hide them
using wb::test::same;

// Random codes of a matrix, in all the forms in which they may be handed over.
struct Codes {
  int out, in, bits, group, n_groups;
  bool planes = false, nested = false;  // nested: each width has a grid of its own
  std::vector<std::vector<std::uint8_t>> own_zeros{9}, own_packed{9};
  std::vector<std::vector<std::uint16_t>> own_scales{9};
  std::vector<std::uint8_t> codes, packed, zeros, packed_zeros;
  std::vector<std::uint16_t> scales16, minima16;
  std::vector<float> scales32, minima32;
  bool as_stream = false;
  enum class Zero { symmetric, points, minima16, minima32 } zero = Zero::symmetric;

  Codes(Random& random, int out_, int in_, int bits_, int group_, bool whole = false) : out(out_), in(in_), bits(bits_), group(group_) {
    n_groups = (in + std::min(group, in) - 1) / std::min(group, in);
    const std::size_t n = static_cast<std::size_t>(out) * in, tables = static_cast<std::size_t>(out) * n_groups;
    codes.resize(n);
    // Codes at both ends are the ones that sums overflow on.
    for (auto& c : codes) c = static_cast<std::uint8_t>(random.below(4) == 0 ? (random.below(2) != 0 ? (1 << bits) - 1 : 0) : random.below(1 << bits));
    for (std::size_t i = 0; i < std::min<std::size_t>(n, static_cast<std::size_t>(in)); ++i) codes[i] = static_cast<std::uint8_t>((1 << bits) - 1);
    as_stream = random.below(2) != 0;
    zero = whole ? Zero::points : static_cast<Zero>(random.below(4));
    if (random.below(2) != 0 && !whole) {
      for (std::size_t i = 0; i < tables; ++i) scales16.push_back(float_to_fp16(0.01f + 0.02f * random.uniform()));
    } else {
      for (std::size_t i = 0; i < tables; ++i) scales32.push_back(whole ? 1.0f : 0.01f + 0.02f * random.uniform());
    }
    if (zero == Zero::points)
      for (std::size_t i = 0; i < tables; ++i) zeros.push_back(static_cast<std::uint8_t>(random.below(1 << bits)));
    if (zero == Zero::minima16)
      for (std::size_t i = 0; i < tables; ++i) minima16.push_back(float_to_fp16(-random.uniform()));
    if (zero == Zero::minima32)
      for (std::size_t i = 0; i < tables; ++i) minima32.push_back(-random.uniform());
    if (as_stream) {
      packed = stream(codes, out, in);
      if (zero == Zero::points) packed_zeros = stream(zeros, out, n_groups);
    }
  }

  // Grids for every width up to the parent's, with zero points anywhere or in the middle.
  void nest(Random& random, float scale, bool centred) {
    planes = nested = true;
    zero = Zero::symmetric;
    scales16.clear(), scales32.clear(), zeros.clear(), minima16.clear(), minima32.clear();
    for (int b = 1; b <= bits; ++b) {
      const auto at = static_cast<std::size_t>(b);
      for (std::size_t i = 0; i < static_cast<std::size_t>(out) * n_groups; ++i) {
        own_zeros[at].push_back(static_cast<std::uint8_t>(centred ? 1 << (b - 1) : random.below(1 << b)));
        own_scales[at].push_back(float_to_fp16(scale * (0.5f + random.uniform()) / static_cast<float>(1 << b)));
      }
      own_packed[at] = stream(own_zeros[at], out, n_groups, b);
    }
  }
  Matrix matrix(Arena& arena) const {
    Matrix m = make_groups(arena, out, in, source());
    for (int b = 1; nested && b <= bits; ++b) {
      const auto& packed_zero = own_packed[static_cast<std::size_t>(b)];
      add_width(arena, m, b, own_scales[static_cast<std::size_t>(b)].data(), packed_zero.data(), packed_zero.size() / static_cast<std::size_t>(out));
    }
    return m;
  }

  std::vector<std::uint8_t> stream(const std::vector<std::uint8_t>& values, int rows, int columns) const { return stream(values, rows, columns, bits); }
  static std::vector<std::uint8_t> stream(const std::vector<std::uint8_t>& values, int rows, int columns, int bits) {
    const std::size_t row_bytes = (static_cast<std::size_t>(columns) * bits + 7) / 8;
    std::vector<std::uint8_t> to(row_bytes * rows);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < columns; ++c)
        for (int b = 0; b < bits; ++b) {
          const std::size_t at = static_cast<std::size_t>(c) * bits + b;
          to[r * row_bytes + at / 8] |= static_cast<std::uint8_t>(((values[static_cast<std::size_t>(r) * columns + c] >> b) & 1) << (at % 8));
        }
    return to;
  }

  GroupSource source() const {
    GroupSource s;
    s.bits = bits, s.group = group, s.planes = planes;
    if (as_stream) {
      s.packed = packed.data();
      s.packed_row = packed.size() / out;
      if (zero == Zero::points) s.packed_zeros = packed_zeros.data(), s.packed_zeros_row = packed_zeros.size() / out;
    } else {
      s.codes = codes.data();
      if (zero == Zero::points) s.zeros = zeros.data();
    }
    if (!scales16.empty()) s.scales16 = scales16.data();
    else if (!scales32.empty()) s.scales32 = scales32.data();
    if (zero == Zero::minima16) s.minima16 = minima16.data();
    if (zero == Zero::minima32) s.minima32 = minima32.data();
    return s;
  }

  double weight(int row, int c, int read) const {
    const std::size_t t = static_cast<std::size_t>(row) * n_groups + c / std::min(group, in);
    if (nested) {
      const int b = read > 0 ? read : bits, code = codes[static_cast<std::size_t>(row) * in + c] >> (bits - b);
      const auto at = static_cast<std::size_t>(b);
      return (code - (own_zeros[at][t] + (1 << (b - 1)) - 1) / 2.0) * static_cast<double>(fp16_to_float(own_scales[at][t]));
    }
    const double scale = scales16.empty() ? scales32[t] : fp16_to_float(scales16[t]);
    const int dropped = read > 0 ? bits - read : 0;
    const double code = codes[static_cast<std::size_t>(row) * in + c] >> dropped << dropped;
    switch (zero) {
      case Zero::symmetric: return (code - (1 << (bits - 1))) * scale;
      case Zero::points: return (code - zeros[t]) * scale;
      case Zero::minima16: return code * scale + fp16_to_float(minima16[t]);
      case Zero::minima32: return code * scale + minima32[t];
    }
    return 0;
  }
};

// Random codes into tables of random values, at every width up to their own.
struct TableCodes {
  int out, in, bits;
  std::vector<std::uint8_t> codes, packed;
  std::vector<std::vector<std::uint16_t>> tables{9};

  TableCodes(Random& random, int out_, int in_, int bits_, float size) : out(out_), in(in_), bits(bits_) {
    for (int i = 0; i < out * in; ++i) codes.push_back(static_cast<std::uint8_t>(random.below(1 << bits)));
    packed = Codes::stream(codes, out, in, bits);
    for (int b = 2; b <= bits; ++b)
      for (int i = 0; i < out << b; ++i) tables[static_cast<std::size_t>(b)].push_back(float_to_fp16(random.normal() * size));
  }
  std::size_t packed_row() const { return packed.size() / static_cast<std::size_t>(out); }
  double weight(int row, int c, int read) const {
    const int b = read > 0 ? read : bits, code = codes[static_cast<std::size_t>(row) * in + c] >> (bits - b);
    return fp16_to_float(tables[static_cast<std::size_t>(b)][(static_cast<std::size_t>(row) << b) + code]);
  }
};

// Rows of activations in exactly as much memory as they need, so that a sanitizer sees what reads past it.
struct Prepared {
  std::vector<std::vector<float>> x, scale, sum;
  std::vector<std::vector<std::int8_t>> q;
  std::vector<std::vector<std::uint8_t>> active;
  std::vector<Activation> rows;

  Prepared(const Kernels& k, const Grouping& at, const std::vector<std::vector<float>>& from, bool exact) {
    const std::size_t n = from.size();
    x.resize(n), scale.resize(n), sum.resize(n), q.resize(n), active.resize(n), rows.resize(n);
    for (std::size_t i = 0; i < n; ++i) {
      sum[i].resize(static_cast<std::size_t>(at.n_groups));
      active[i].resize(static_cast<std::size_t>(at.n_blocks));
      if (exact) {
        x[i].resize(static_cast<std::size_t>(at.padded));
        k.pad(at, from[i].data(), x[i].data(), sum[i].data(), active[i].data());
      } else {
        q[i].resize(static_cast<std::size_t>(at.padded));
        scale[i].resize(static_cast<std::size_t>(at.n_blocks));
        k.quantize(at, from[i].data(), q[i].data(), scale[i].data(), sum[i].data(), active[i].data());
      }
      rows[i] = {x[i].data(), q[i].data(), nullptr, scale[i].data(), sum[i].data(), active[i].data()};
    }
  }
  // What the codes of row i stand for, by channel.
  std::vector<double> meaning(const Grouping& at, std::size_t i) const {
    std::vector<double> to;
    int place = 0, block = 0;
    for (int g = 0; g < at.n_groups; ++g)
      for (int from = 0; from < at.width(g); from += kBlock, ++block)
        for (int c = 0; c < std::min(kBlock, at.width(g) - from); ++c, ++place)
          if (from + c < at.channels(g)) to.push_back(x[i].empty() ? static_cast<double>(q[i][place]) * scale[i][block] : static_cast<double>(x[i][place]));
    return to;
  }
};

const int kRowCounts[] = {1, 2, 3, 5, 8, 17, 33};

void group_products(bool quick) {
  Random random(1);
  const auto isas = available_isas();
  const std::pair<int, int> sizes[] = {{37, 203}, {16, 64}, {5, 7}, {20, 128}};
  for (int bits = 2; bits <= 8; ++bits)
    for (const int group : {8, 16, 32, 64, 100})
      for (const auto& [out, in] : sizes)
        for (int form = -2; form <= bits; ++form) {  // -2 packed, -1 planes, 0 nested as stored, else nested at fewer bits
          if (quick && (random.below(6) != 0 || in > 203)) continue;
          const bool whole = random.below(3) == 0 && form != 0 && (form < 0 || form == bits);
          Codes c(random, out, in, bits, group, whole);
          c.planes = form >= -1;
          if (form >= 0 && !whole) c.nest(random, 2.0f, false);
          const int read = std::max(form, 0);
          Arena arena;
          Matrix w = c.matrix(arena);
          std::vector<float> bias;
          if (!whole && random.below(2) != 0) {
            bias = random.normals(static_cast<std::size_t>(w.tiles) * kRows);
            w.bias = bias.data();
          }
          const bool add = !whole && random.below(2) != 0;
          const std::string where = std::to_string(bits) + " bits, group " + std::to_string(group) + ", " + std::to_string(out) + " x " + std::to_string(in) + ", form " + std::to_string(form);
          if (read == 0) {
            std::vector<float> row(static_cast<std::size_t>(in));
            bool right = true;
            for (int r = 0; r < out; ++r) {
              read_row(w, r, row.data());
              for (int i = 0; i < in; ++i) right &= std::fabs(row[static_cast<std::size_t>(i)] - c.weight(r, i, 0)) < 1e-4;
            }
            CHECK_IN(right, where);
          }
          std::vector<std::vector<float>> x;
          for (int r = 0; r < 33; ++r) {
            x.push_back(random.normals(static_cast<std::size_t>(in)));
            if (whole) {  // integers with scale 1: sums must be exact
              for (float& v : x.back()) v = static_cast<float>(random.below(3) == 0 ? 127 * (random.below(2) * 2 - 1) : random.below(255) - 127);
              for (int g = 0; g < w.grouping.n_groups; ++g)
                for (int i = 0; i < w.grouping.channels(g); i += kBlock) x.back()[static_cast<std::size_t>(g * w.grouping.group + i)] = 127;
              if (r == 0) std::fill(x.back().begin(), x.back().end(), 127.0f);
              if (r == 1) std::fill(x.back().begin(), x.back().end(), -127.0f);
            } else if (r % 5 == 0) {  // blocks that may be left out
              for (int i = 0; i < in; ++i)
                if (i / std::min(group, 64) % 2 == 0) x.back()[static_cast<std::size_t>(i)] = 0;
            }
          }
          for (const bool exact : {false, true}) {
            std::vector<std::vector<double>> expected, sizes_of;
            std::vector<std::vector<float>> first_result;
            for (const Isa isa : isas) {
              const Kernels& k = kernels(isa);
              const Prepared a(k, w.grouping, x, exact);
              if (expected.empty()) {
                for (std::size_t r = 0; r < x.size(); ++r) {
                  const auto meant = a.meaning(w.grouping, r);
                  bool close = static_cast<int>(meant.size()) == in;
                  for (int i = 0; close && i < in; ++i) close = std::fabs(meant[static_cast<std::size_t>(i)] - x[r][static_cast<std::size_t>(i)]) < (whole || exact ? 1e-6 : 0.03);
                  CHECK_IN(close, where);
                  expected.emplace_back();
                  sizes_of.emplace_back();
                  for (int o = 0; o < out; ++o) {
                    double sum = 0, size = 1e-6;
                    for (int i = 0; i < in; ++i) {
                      const double term = c.weight(o, i, read) * meant[static_cast<std::size_t>(i)];
                      sum += term, size += std::fabs(term) + 0.05 * std::fabs(meant[static_cast<std::size_t>(i)]);
                    }
                    if (!bias.empty()) sum += bias[static_cast<std::size_t>(o)], size += 1;
                    if (add) sum += 0.25, size += 1;
                    expected.back().push_back(sum);
                    sizes_of.back().push_back(size);
                  }
                }
              }
              for (const int n : kRowCounts) {
                std::vector<std::vector<float>> y(static_cast<std::size_t>(n), std::vector<float>(static_cast<std::size_t>(w.tiles) * kRows, 0.25f));
                std::vector<float*> to;
                for (auto& row : y) to.push_back(row.data());
                (exact ? k.groups_f32 : k.groups_int8)(w, read, a.rows.data(), n, to.data(), add, 0, w.tiles);
                double worst = 0;
                bool integers = true;
                for (std::size_t r = 0; r < y.size(); ++r)
                  for (int o = 0; o < out; ++o) {
                    const double got = y[r][static_cast<std::size_t>(o)], off = std::fabs(got - expected[r][static_cast<std::size_t>(o)]);
                    worst = std::max(worst, std::isfinite(off) ? off / sizes_of[r][static_cast<std::size_t>(o)] : 1e9);
                    integers &= off == 0;
                  }
                const std::string full = where + (exact ? ", fp32 " : ", int8 ") + isa_name(isa) + ", rows " + std::to_string(n) + ": " + std::to_string(worst);
                CHECK_IN(worst < 3e-6, full);
                if (whole) CHECK_IN(integers, full);
                // A row's result does not depend on the rows beside it, nor does another instruction set change it.
                if (n == 33 && !exact) {
                  if (first_result.empty()) first_result = y;
                  double apart = 0;
                  for (std::size_t r = 0; r < y.size(); ++r)
                    for (int o = 0; o < out; ++o)
                      apart = std::max(apart, std::fabs(static_cast<double>(y[r][static_cast<std::size_t>(o)]) - first_result[r][static_cast<std::size_t>(o)]) / sizes_of[r][static_cast<std::size_t>(o)]);
                  CHECK_IN(apart < 1e-6, full);
                }
                if (w.tiles > 1 && n == 3) {  // one tile leaves the others alone
                  std::vector<std::vector<float>> part(3, std::vector<float>(static_cast<std::size_t>(w.tiles) * kRows, 7.0f));
                  float* part_to[] = {part[0].data(), part[1].data(), part[2].data()};
                  (exact ? k.groups_f32 : k.groups_int8)(w, read, a.rows.data(), 3, part_to, false, 1, 2);
                  bool left = true;
                  for (const auto& row : part)
                    for (std::size_t o = 0; o < row.size(); ++o) left &= (o / kRows == 1) != (row[o] == 7.0f);
                  CHECK_IN(left, full);
                }
              }
            }
          }
        }
}

void dense_products() {
  Random random(2);
  for (const auto& [out, in] : {std::pair<int, int>{37, 201}, {16, 64}, {3, 1}, {33, 2}, {5, 7}}) {
    const auto weights = random.normals(static_cast<std::size_t>(out) * in);
    std::vector<std::uint16_t> halves;
    for (const float v : weights) halves.push_back(float_to_bf16(v));
    Arena arena;
    const Matrix full = make_f32(arena, out, in, weights.data()), half = make_bf16(arena, out, in, halves.data());
    std::vector<std::vector<float>> x;
    for (int r = 0; r < 33; ++r) x.push_back(random.normals(static_cast<std::size_t>(in)));
    for (const Isa isa : available_isas()) {
      const Kernels& k = kernels(isa);
      for (const int form : {0, 1, 2})  // fp32, bf16 with fp32 activations, bf16 with bf16 activations
        for (const int n : kRowCounts) {
          const Matrix& w = form == 0 ? full : half;
          std::vector<std::vector<std::uint16_t>> b;
          std::vector<Activation> rows;
          std::vector<std::vector<float>> y(static_cast<std::size_t>(n), std::vector<float>(static_cast<std::size_t>(w.tiles) * kRows));
          std::vector<float*> to;
          for (int r = 0; r < n; ++r) {
            b.emplace_back(static_cast<std::size_t>(in + in % 2));
            k.to_bf16(x[static_cast<std::size_t>(r)].data(), in, b.back().data());
            rows.push_back({x[static_cast<std::size_t>(r)].data(), nullptr, b.back().data(), nullptr, nullptr, nullptr});
            to.push_back(y[static_cast<std::size_t>(r)].data());
          }
          (form == 2 ? k.dense_bf16 : k.dense_f32)(w, 0, rows.data(), n, to.data(), false, 0, w.tiles);
          double worst = 0;
          for (int r = 0; r < n; ++r)
            for (int o = 0; o < out; ++o) {
              double sum = 0, size = 1e-6;
              for (int i = 0; i < in; ++i) {
                const std::size_t at = static_cast<std::size_t>(o) * in + i;
                const double term = static_cast<double>(form == 0 ? weights[at] : bf16_to_float(halves[at])) *
                                    (form == 2 ? bf16_to_float(b[static_cast<std::size_t>(r)][static_cast<std::size_t>(i)]) : x[static_cast<std::size_t>(r)][static_cast<std::size_t>(i)]);
                sum += term, size += std::fabs(term);
              }
              worst = std::max(worst, std::fabs(y[static_cast<std::size_t>(r)][static_cast<std::size_t>(o)] - sum) / size);
            }
          CHECK_IN(worst < 2e-6, std::string(isa_name(isa)) + " form " + std::to_string(form) + " rows " + std::to_string(n) + " " + std::to_string(worst));
        }
    }
  }
}

void vector_kernels() {
  Random random(3);
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  for (const Isa isa : available_isas()) {
    const Kernels& k = kernels(isa);
    const std::string name = isa_name(isa);
    for (const int n : {1, 2, 15, 16, 17, 31, 33, 48, 100, 4096 + 5, 3 * 4096}) {
      const auto x = random.normals(static_cast<std::size_t>(n), 3), weight = random.normals(static_cast<std::size_t>(n)), bias = random.normals(static_cast<std::size_t>(n));
      std::vector<float> y(static_cast<std::size_t>(n)), expected(static_cast<std::size_t>(n));
      double squares = 0, mean = 0, spread = 0, top = x[0], total = 0;
      for (const float v : x) squares += static_cast<double>(v) * v, mean += v, top = std::max<double>(top, v);
      mean /= n;
      for (const float v : x) spread += (v - mean) * (v - mean), total += std::exp(v - top);
      for (int i = 0; i < n; ++i) expected[static_cast<std::size_t>(i)] = static_cast<float>(weight[static_cast<std::size_t>(i)] * x[static_cast<std::size_t>(i)] / std::sqrt(squares / n + 1e-5));
      k.rms_norm(x.data(), weight.data(), n, 1e-5f, y.data());
      CHECK_IN(distance(y, expected) < 2e-6, name);
      for (int i = 0; i < n; ++i) expected[static_cast<std::size_t>(i)] = static_cast<float>(weight[static_cast<std::size_t>(i)] * (x[static_cast<std::size_t>(i)] - mean) / std::sqrt(spread / n + 1e-5) + bias[static_cast<std::size_t>(i)]);
      k.layer_norm(x.data(), weight.data(), bias.data(), n, 1e-5f, y.data());
      CHECK_IN(distance(y, expected) < (n == 1 ? 1e-3 : 5e-6), name + " " + std::to_string(n));
      CHECK_IN(std::fabs(k.log_sum_exp(x.data(), n) - (top + std::log(total))) < 2e-5, name);
      for (const Function f : {Function::relu, Function::silu, Function::gelu_tanh, Function::gelu}) {
        for (int i = 0; i < n; ++i) {
          const double v = x[static_cast<std::size_t>(i)];
          const double to = f == Function::relu ? std::max(v, 0.0)
                            : f == Function::silu ? v / (1 + std::exp(-v))
                            : f == Function::gelu_tanh ? 0.5 * v * (1 + std::tanh(std::sqrt(2 / 3.14159265358979) * (v + 0.044715 * v * v * v)))
                                                       : 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
          expected[static_cast<std::size_t>(i)] = static_cast<float>(to);
        }
        y = x;
        k.apply(f, y.data(), n);
        CHECK_IN(distance(y, expected) < 2e-6, name);
        for (int i = 0; i < n; ++i) expected[static_cast<std::size_t>(i)] *= bias[static_cast<std::size_t>(i)];
        y = x;
        k.apply_gated(f, y.data(), bias.data(), n);
        CHECK_IN(distance(y, expected) < 2e-6, name);
        std::vector<float> extreme{nan, 0, 1e4f, -1e4f, 3e38f, -3e38f};
        k.apply(f, extreme.data(), static_cast<int>(extreme.size()));
        CHECK_IN(std::isnan(extreme[0]) && extreme[1] == 0 && extreme[2] == 1e4f && std::fabs(extreme[3]) < 1e-3f && extreme[4] > 2e38f, name);
      }
      y = x;
      k.add(y.data(), bias.data(), n);
      CHECK_IN(y[static_cast<std::size_t>(n - 1)] == x[static_cast<std::size_t>(n - 1)] + bias[static_cast<std::size_t>(n - 1)], name);
    }

    // Every fp16 value, and roundings between neighbours, as the plain code converts them.
    std::vector<float> values;
    for (int h = 0; h < 0x7C00; ++h) {
      const float here = fp16_to_float(static_cast<std::uint16_t>(h)), next = h + 1 < 0x7C00 ? fp16_to_float(static_cast<std::uint16_t>(h + 1)) : 65536.0f;
      for (const float v : {here, 0.5f * (here + next), std::nextafter(0.5f * (here + next), 0.0f), std::nextafter(0.5f * (here + next), 1e9f)}) values.push_back(h % 2 != 0 ? v : -v);
    }
    for (const float v : {inf, -inf, 1e30f, 1e-40f}) values.push_back(v);
    std::vector<std::uint16_t> halves(values.size());
    k.to_fp16(values.data(), static_cast<int>(values.size()), halves.data());
    bool right = true;
    for (std::size_t i = 0; i < values.size(); ++i) right &= halves[i] == float_to_fp16(values[i]);
    CHECK_IN(right, name);

    // Activations that are hard to quantize.
    for (const int in : {7, 64, 100, 203}) {
      const Grouping at = Grouping::of(in, 100);
      for (const float size : {1e-45f, 1e-40f, 1e-38f, 1e-37f, 1e-30f, 1e30f, 3e38f}) {
        std::vector<float> x;
        for (int i = 0; i < in; ++i) x.push_back(size * static_cast<float>(i % 3 - 1));
        const Prepared a(k, at, {x}, false);
        const auto meant = a.meaning(at, 0);
        bool fine = true;
        for (int i = 0; i < in; ++i) fine &= std::fabs(meant[static_cast<std::size_t>(i)] - x[static_cast<std::size_t>(i)]) <= 0.01 * static_cast<double>(size) + 1e-36;
        for (const auto code : a.q[0]) fine &= code >= -127;
        CHECK_IN(fine, name + " size " + std::to_string(std::log10(size)));
      }
      for (const float poison : {nan, inf, -inf}) {
        auto x = random.normals(static_cast<std::size_t>(in));
        x[static_cast<std::size_t>(in - 1)] = poison;
        const Prepared a(k, at, {x}, false);
        CHECK_IN(std::isnan(a.scale[0].back()) && a.active[0].back() != 0 && std::isnan(a.sum[0].back()), name);
        CHECK_IN(in <= 100 || !std::isnan(a.scale[0].front()), name);
      }
      const Prepared nothing(k, at, {std::vector<float>(static_cast<std::size_t>(in))}, false);
      CHECK_IN(std::all_of(nothing.active[0].begin(), nothing.active[0].end(), [](std::uint8_t v) { return v == 0; }), name);
    }
  }
}

void attention() {
  Random random(4);
  for (const Isa isa : available_isas()) {
    const Kernels& k = kernels(isa);
    for (const bool half : {false, true})
      for (const int dim : {2, 12, 16, 20, 64, 80})
        for (const auto& [first, last] : {std::pair<int, int>{0, 0}, {0, 15}, {0, 16}, {5, 63}, {5, 64}, {130, 199}, {64, 127}})
          for (int heads = 1; heads <= 6; ++heads) {
            const int kv_heads = 2, value_dim = (dim + 15) / 16 * 16, pieces = last / kPiece + 1, n = last + 1;
            const auto keys = random.normals(static_cast<std::size_t>(kv_heads) * n * dim), values = random.normals(static_cast<std::size_t>(kv_heads) * n * dim);
            std::vector<std::vector<float>> key32(static_cast<std::size_t>(pieces)), value32 = key32;
            std::vector<std::vector<std::uint16_t>> key16(static_cast<std::size_t>(pieces)), value16 = key16;
            std::vector<void*> key_at, value_at;
            for (int piece = 0; piece < pieces; ++piece) {
              auto& a = key32[static_cast<std::size_t>(piece)];
              auto& b = value32[static_cast<std::size_t>(piece)];
              a.assign(static_cast<std::size_t>(kv_heads) * kPiece * dim, std::numeric_limits<float>::quiet_NaN());  // what is not written is never used
              b.assign(static_cast<std::size_t>(kv_heads) * kPiece * value_dim, 0.0f);
              for (int h = 0; h < kv_heads; ++h)
                for (int p = 0; p < kPiece && piece * kPiece + p < n; ++p)
                  for (int i = 0; i < dim; ++i) {
                    const std::size_t from = (static_cast<std::size_t>(h) * n + piece * kPiece + p) * dim + i;
                    a[((static_cast<std::size_t>(h) * (kPiece / 16) + p / 16) * dim + i) * 16 + p % 16] = keys[from];
                    b[(static_cast<std::size_t>(h) * kPiece + p) * value_dim + i] = values[from];
                  }
              for (const float v : a) key16[static_cast<std::size_t>(piece)].push_back(float_to_fp16(v));
              for (const float v : b) value16[static_cast<std::size_t>(piece)].push_back(float_to_fp16(v));
              key_at.push_back(half ? static_cast<void*>(key16[static_cast<std::size_t>(piece)].data()) : a.data());
              value_at.push_back(half ? static_cast<void*>(value16[static_cast<std::size_t>(piece)].data()) : b.data());
            }
            const auto q = random.normals(static_cast<std::size_t>(heads) * dim);
            std::vector<float> out(static_cast<std::size_t>(heads) * dim), scores(static_cast<std::size_t>(kQueries) * 16 * (last / 16 - first / 16 + 1 + (dim + 15) / 16)), expected;
            const auto rounded = [&](float v) { return half ? static_cast<double>(fp16_to_float(float_to_fp16(v))) : static_cast<double>(v); };
            for (int h = 0; h < heads; ++h) {
              std::vector<double> weights;
              double total = 0;
              for (int p = first; p <= last; ++p) {
                double s = 0;
                for (int i = 0; i < dim; ++i) s += q[static_cast<std::size_t>(h * dim + i)] * rounded(keys[(static_cast<std::size_t>(n) + p) * dim + i]);
                weights.push_back(std::exp(0.3 * s));
                total += weights.back();
              }
              for (int i = 0; i < dim; ++i) {
                double sum = 0;
                for (int p = first; p <= last; ++p) sum += weights[static_cast<std::size_t>(p - first)] / total * rounded(values[(static_cast<std::size_t>(n) + p) * dim + i]);
                expected.push_back(static_cast<float>(sum));
              }
            }
            std::vector<Query> queries;
            for (int h = 0; h < heads; ++h) queries.push_back({q.data() + h * dim, out.data() + h * dim, first, last});
            (half ? k.attend_f16 : k.attend_f32)({key_at.data(), value_at.data(), dim, value_dim}, 1, queries.data(), heads, 0.3f, scores.data());
            CHECK_IN(distance(out, expected) < 1e-5, std::string(isa_name(isa)) + " dim " + std::to_string(dim) + " heads " + std::to_string(heads) + " last " + std::to_string(last) + " " + std::to_string(distance(out, expected)));
          }
  }
}

void sampling() {
  Random random(5);
  const auto logits = random.normals(300, 3);
  const int best = static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  CHECK(sample(logits.data(), 300, {}, 0.5) == best);
  CHECK(sample(logits.data(), 300, {1.0, 1, 1.0}, 0.999) == best);
  CHECK(sample(logits.data(), 300, {1.0, 0, 0.0}, 0.999) == best);
  std::vector<int> seen(300);
  for (int i = 0; i < 20000; ++i) ++seen[static_cast<std::size_t>(sample(logits.data(), 300, {1.0, 0, 1.0}, (i + 0.5) / 20000))];
  double total = 0;
  for (const float v : logits) total += std::exp(v);
  bool close = true;
  for (std::size_t i = 0; i < seen.size(); ++i) close &= std::fabs(seen[i] / 20000.0 - std::exp(logits[i]) / total) < 2e-4;
  CHECK(close);
  for (const Sampler s : {Sampler{}, {0.7, 0, 1.0}, {0.7, 5, 0.9}}) {
    for (const double u : {0.0, 0.3, 0.9999999999}) CHECK(sample(logits.data(), 300, s, u) >= 0);
    auto bad = logits;
    bad[299] = std::numeric_limits<float>::quiet_NaN();
    CHECK(sample(bad.data(), 300, s, 0.5) == -1);
    bad[299] = -std::numeric_limits<float>::infinity();
    const int chosen = sample(bad.data(), 300, s, 0.5);
    CHECK(chosen >= 0 && chosen < 299);
    const float one = 1;
    CHECK(sample(&one, 1, s, 0.5) == 0);
  }
}

// Decoders ---------------------------------------------------------------------------------------------------------

enum class Family { llama, opt, gemma };
const char* const kNames[] = {"llama", "opt", "gemma"};
constexpr int kContext = 208;

void table_products(bool quick) {
  Random random(12);
  const std::pair<int, int> sizes[] = {{37, 203}, {16, 64}, {5, 7}, {20, 144}, {1, 1}, {33, 32}};
  for (int bits = 2; bits <= 8; ++bits)
    for (const auto& [out, in] : sizes) {
      if (quick && random.below(3) != 0) continue;
      const TableCodes c(random, out, in, bits, 0.05f);
      Arena arena;
      Matrix w = make_tables(arena, out, in, bits, c.packed.data(), c.packed_row());
      for (int b = 2; b <= bits; ++b) add_table(arena, w, b, c.tables[static_cast<std::size_t>(b)].data());
      CHECK_THROWS(std::invalid_argument, add_table(arena, w, bits + 1, c.tables[2].data()));
      CHECK_THROWS(std::invalid_argument, add_width(arena, w, bits, nullptr, nullptr, 0));
      std::vector<float> bias;
      if (random.below(2) != 0) {
        bias = random.normals(static_cast<std::size_t>(w.tiles) * kRows);
        w.bias = bias.data();
      }
      const bool add = random.below(2) != 0;
      std::vector<float> read_back(static_cast<std::size_t>(in));
      for (int r = 0; r < out; ++r) {
        read_row(w, r, read_back.data());
        bool right = true;
        for (int i = 0; i < in; ++i) right &= read_back[static_cast<std::size_t>(i)] == static_cast<float>(c.weight(r, i, 0));
        CHECK(right);
      }
      std::vector<std::vector<float>> x;
      for (int r = 0; r < 33; ++r) {
        x.push_back(random.normals(static_cast<std::size_t>(in)));
        for (int i = 0; r % 5 == 0 && i < in; ++i)  // words that may be left out
          if (i / kWord % 2 == 0) x.back()[static_cast<std::size_t>(i)] = 0;
      }
      for (const Isa isa : available_isas()) {
        const Kernels& k = kernels(isa);
        const Prepared a(k, w.grouping, x, true);
        for (int read = 0; read <= bits; read += read == 0 ? 2 : 1) {
          std::vector<std::vector<float>> first;
          for (const int n : kRowCounts) {
            std::vector<std::vector<float>> y(static_cast<std::size_t>(n), std::vector<float>(static_cast<std::size_t>(w.tiles) * kRows, 0.25f));
            std::vector<float*> to;
            for (auto& row : y) to.push_back(row.data());
            k.groups_f32(w, read, a.rows.data(), n, to.data(), add, 0, w.tiles);
            double worst = 0;
            for (std::size_t r = 0; r < y.size(); ++r)
              for (int o = 0; o < out; ++o) {
                double sum = bias.empty() ? 0 : bias[static_cast<std::size_t>(o)], size = 1;
                if (add) sum += 0.25;
                for (int i = 0; i < in; ++i) {
                  const double term = c.weight(o, i, read) * x[r][static_cast<std::size_t>(i)];
                  sum += term, size += std::fabs(term);
                }
                worst = std::max(worst, std::fabs(y[r][static_cast<std::size_t>(o)] - sum) / size);
              }
            const std::string where = std::to_string(bits) + " bits read at " + std::to_string(read) + ", " + std::to_string(out) + " x " + std::to_string(in) + ", " + isa_name(isa) + ", rows " + std::to_string(n) + ": " + std::to_string(worst);
            CHECK_IN(worst < 1e-6, where);
            // A row's result does not depend on the rows beside it.
            for (std::size_t r = 0; r < std::min(first.size(), y.size()); ++r) CHECK_IN(same(first[r], y[r]), where);
            if (y.size() > first.size()) first = y;
          }
        }
      }
    }
}

struct Options {
  bool exact = true;
  int threads = 1;
  Isa isa = Isa::portable;
  bool planes = false;      // every linear of the blocks in nested planes
  bool dense = false;       // every linear of the blocks fp32
  std::string poisoned = {};// a matrix with one NaN
  std::function<void(Decoder&, Random&)> plan = {};
};

DecoderSpec spec_of(Family family, const Options& options) {
  DecoderSpec s;
  s.context = kContext;
  s.exact = options.exact;
  s.threads = options.threads;
  s.isa = isa_name(options.isa);
  switch (family) {
    case Family::llama:
      s.blocks = 3, s.hidden = 50, s.heads = 6, s.kv_heads = 2, s.head_dim = 12, s.neurons = 70, s.vocab = 101, s.rotary_dim = 12;
      break;
    case Family::opt:
      s.blocks = 2, s.hidden = 40, s.heads = 4, s.kv_heads = 4, s.head_dim = 10, s.neurons = 64, s.vocab = 67;
      s.layer_norm = true, s.gated = false, s.function = Function::relu, s.position_offset = 2;
      break;
    case Family::gemma:
      s.blocks = 2, s.hidden = 64, s.heads = 4, s.kv_heads = 1, s.head_dim = 32, s.neurons = 96, s.vocab = 90, s.rotary_dim = 16;
      s.function = Function::gelu_tanh, s.softcap = 5, s.embedding_scale = 8;
      break;
  }
  s.attention_scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
  return s;
}

void set_matrix(Decoder& d, Random& random, const std::string& name, int out, int in, int form, bool poisoned) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), size = 1.5f / std::sqrt(static_cast<float>(in));
  if (form < 8) {  // group codes
    static const int widths[] = {4, 8, 3, 5, 6, 2, 7, 8}, groups[] = {16, 32, 8, 100, 64, 16, 32, 8};
    Codes c(random, out, in, form == 7 ? 8 : widths[form], groups[form]);
    c.planes = form % 2 != 0;
    c.zero = Codes::Zero::symmetric;
    c.minima16.clear(), c.minima32.clear(), c.zeros.clear(), c.scales16.clear();
    c.scales32.assign(static_cast<std::size_t>(out) * c.n_groups, size * 3.5f / static_cast<float>(1 << c.bits));
    if (poisoned) c.scales32[c.scales32.size() / 2] = nan;
    if (form == 7 && !poisoned) c.nest(random, 3.5f * size, true);
    d.set_groups(name, out, in, c.source());
    for (int b = 1; c.nested && b <= c.bits; ++b) {
      const auto& zeros = c.own_packed[static_cast<std::size_t>(b)];
      d.add_width(name, b, c.own_scales[static_cast<std::size_t>(b)].data(), zeros.data(), zeros.size() / static_cast<std::size_t>(out));
    }
    return;
  }
  if (form == 10) {
    TableCodes c(random, out, in, 6, size);
    if (poisoned) std::fill_n(c.tables[6].begin() + (out / 2 << 6), 64, float_to_fp16(nan));
    d.set_tables(name, out, in, 6, c.packed.data(), c.packed_row());
    for (const int b : {3, 6}) d.add_table(name, b, c.tables[static_cast<std::size_t>(b)].data());
    return;
  }
  auto values = random.normals(static_cast<std::size_t>(out) * in, size);
  if (poisoned) values[values.size() / 2] = nan;
  if (form == 8) {
    d.set_f32(name, out, in, values.data());
    return;
  }
  std::vector<std::uint16_t> halves;
  for (const float v : values) halves.push_back(float_to_bf16(v));
  d.set_bf16(name, out, in, halves.data());
}

// The same weights for the same family and options, whatever the threads and instructions.
std::unique_ptr<Decoder> build(Family family, const Options& options) {
  Random random(100 + static_cast<unsigned>(family));
  auto decoder = std::make_unique<Decoder>(spec_of(family, options));
  Decoder& d = *decoder;
  const DecoderSpec& s = d.spec();
  const auto vector = [&](const std::string& name, int n, float mean, float spread) {
    auto v = random.normals(static_cast<std::size_t>(n), spread);
    for (float& x : v) x += mean;
    d.set_vector(name, v.data(), v.size());
  };
  const auto norm = [&](const std::string& name, int n) {
    vector(name, n, 1, 0.1f);
    if (s.layer_norm) vector(name + ".bias", n, 0, 0.1f);
  };
  set_matrix(d, random, "embedding", s.vocab, s.hidden, family == Family::llama ? 1 : family == Family::opt ? 8 : 9, options.poisoned == "embedding");
  if (family == Family::gemma) set_matrix(d, random, "output", s.vocab, s.hidden, 0, options.poisoned == "output");
  if (family == Family::opt) vector("positions", (s.context + s.position_offset) * s.hidden, 0, 0.3f);
  int form = static_cast<int>(family) * 3;
  for (int i = 0; i < s.blocks; ++i) {
    const std::string at = "blocks." + std::to_string(i) + ".";
    const int q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
    for (const auto& [role, out, in] : {std::tuple<const char*, int, int>{"q", q, s.hidden}, {"k", kv, s.hidden}, {"v", kv, s.hidden}, {"o", s.hidden, q},
                                        {"gate", s.neurons, s.hidden}, {"up", s.neurons, s.hidden}, {"down", s.hidden, s.neurons}}) {
      if (!s.gated && std::string(role) == "gate") continue;
      set_matrix(d, random, at + role, out, in, options.planes ? 7 : options.dense ? 8 : form++ % 11, options.poisoned == at + role);
      if (family == Family::opt) vector(at + role + ".bias", out, 0, 0.2f);
    }
    norm(at + "input", s.hidden);
    norm(at + "pre_mlp", s.hidden);
    if (family == Family::gemma) {
      norm(at + "post_attention", s.hidden), norm(at + "post_mlp", s.hidden);
      norm(at + "q_norm", s.head_dim), norm(at + "k_norm", s.head_dim);
    }
  }
  norm("final", s.hidden);
  if (s.rotary_dim > 0)
    for (int rope = 0; rope < 2; ++rope) {
      std::vector<float> f;
      for (int i = 0; i < s.rotary_dim / 2; ++i) f.push_back(std::pow(rope == 0 ? 1e4f : 1e2f, -2.0f * static_cast<float>(i) / static_cast<float>(s.rotary_dim)));
      d.add_rope(f, rope == 0 ? 1.0f : 1.1f);
    }
  for (int i = 0; i < s.blocks; ++i) d.set_attention(i, s.rotary_dim > 0 ? i % 2 : -1, i == 1 && s.rotary_dim > 0 ? 20 : 0);
  if (options.plan) options.plan(d, random);
  d.finish();
  return decoder;
}

std::vector<int> some_tokens(Random& random, int n, int vocab) {
  std::vector<int> tokens;
  for (int i = 0; i < n; ++i) tokens.push_back(random.below(vocab));
  return tokens;
}

using Rows = std::vector<std::vector<float>>;

// Logits of all tokens, fed in passes of at most `pass` tokens.
Rows feed(Decoder& d, Sequence& sequence, const std::vector<int>& tokens, int pass) {
  Rows rows;
  for (int begin = 0; begin < static_cast<int>(tokens.size()); begin += pass)
    d.run({{&sequence, tokens.data() + begin, std::min(pass, static_cast<int>(tokens.size()) - begin)}}, Decoder::Logits::all,
          [&](int, const float* logits) { rows.emplace_back(logits, logits + d.spec().vocab); });
  return rows;
}

Rows feed(Decoder& d, const std::vector<int>& tokens, int pass, int prompt = 0) {
  Sequence sequence(d);
  sequence.prompt_length = prompt;
  return feed(d, sequence, tokens, pass);
}

bool same(const Rows& a, const Rows& b, std::size_t n = 1 << 30) {
  n = std::min(n, std::max(a.size(), b.size()));
  if (a.size() < n || b.size() < n) return false;
  for (std::size_t i = 0; i < n; ++i)
    if (!same(a[i], b[i])) return false;
  return true;
}

double distance(const Rows& a, const Rows& b) {
  double most = a.size() == b.size() ? 0 : 1e9;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) most = std::max(most, distance(a[i], b[i]));
  return most;
}

bool finite(const Rows& rows) {
  for (const auto& row : rows)
    for (const float v : row)
      if (!std::isfinite(v)) return false;
  return true;
}

void misuse(Decoder& d, const std::vector<int>& tokens, const Rows& expected, const std::string& where) {
  const DecoderSpec& s = d.spec();
  Sequence sequence(d), other(d);
  CHECK_IN(same(feed(d, sequence, {tokens.begin(), tokens.begin() + 70}, 70), expected, 70), where);
  const auto run = [&](std::vector<int> ids, Decoder::Logits want = Decoder::Logits::last) { d.run({{&sequence, ids.data(), static_cast<int>(ids.size())}}, want, nullptr); };
  CHECK_THROWS(std::invalid_argument, run({0, -1}));
  CHECK_THROWS(std::invalid_argument, run({0, s.vocab}));
  CHECK_THROWS(std::invalid_argument, run({}));
  CHECK_THROWS(std::invalid_argument, d.run({}, Decoder::Logits::last, nullptr));
  CHECK_THROWS(std::invalid_argument, run(std::vector<int>(kMaxRows + 1, 1)));
  CHECK_THROWS(std::invalid_argument, d.run({{&sequence, tokens.data(), 1}, {&other, tokens.data(), kMaxRows}}, Decoder::Logits::last, nullptr));
  CHECK_THROWS(std::invalid_argument, d.run({{&sequence, tokens.data(), 1}, {&sequence, tokens.data(), 1}}, Decoder::Logits::last, nullptr));
  CHECK_THROWS(std::logic_error, d.add_rope(std::vector<float>(static_cast<std::size_t>(s.rotary_dim / 2)), 1));
  CHECK_THROWS(std::logic_error, d.set_vector("final", expected[0].data(), 1));
  // What a visitor throws comes out, and the threads are ready for the next pass.
  CHECK_THROWS(std::domain_error, d.run({{&sequence, tokens.data() + 70, 40}}, Decoder::Logits::all, [](int row, const float*) {
                 if (row == 20) throw std::domain_error("enough");
               }));
  CHECK_IN(sequence.position() == 70, where);
  {
    d.set_tap([](const std::string& site, int, const float*, int, int) {
      if (site == "blocks.1.o") throw std::domain_error("enough");
    });
    CHECK_THROWS(std::domain_error, run({1, 2, 3}));
    d.set_tap(nullptr);
  }
  auto rest = feed(d, sequence, {tokens.begin() + 70, tokens.end()}, 50);
  CHECK_IN(same(rest, Rows(expected.begin() + 70, expected.end())), where);
  // To the end of the context and no further.
  CHECK_THROWS(std::length_error, run(std::vector<int>(static_cast<std::size_t>(s.context - sequence.position() + 1), 1)));
  CHECK_IN(sequence.position() == static_cast<int>(tokens.size()), where);
  Rows tail = feed(d, sequence, std::vector<int>(static_cast<std::size_t>(s.context - sequence.position()), 1), 1);
  CHECK_IN(finite(tail) && sequence.position() == s.context, where);
  CHECK_THROWS(std::length_error, run({1}));
  CHECK_IN(sequence.position() == s.context && sequence.trace.size() == static_cast<std::size_t>(s.context), where);
}

void decoders(bool quick) {
  for (const Family family : {Family::llama, Family::opt, Family::gemma})
    for (const bool exact : {true, false}) {
      Rows first;
      for (const Isa isa : available_isas()) {
        Rows of_isa;
        for (const int threads : {1, 2, 3}) {
          if (quick && threads > 1 && (threads == 2 || isa != available_isas().back())) continue;
          const std::string where = std::string(kNames[static_cast<int>(family)]) + (exact ? " exact " : " int8 ") + isa_name(isa) + " " + std::to_string(threads) + " threads";
          const auto d = build(family, {.exact = exact, .threads = threads, .isa = isa});
          Random random(7);
          const auto tokens = some_tokens(random, 200, d->spec().vocab);
          const Rows together = feed(*d, tokens, kMaxRows);
          CHECK_IN(together.size() == 200 && finite(together), where);
          double spread = 0;
          for (const float v : together[150]) spread = std::max(spread, std::fabs(static_cast<double>(v) - together[100][0]));
          CHECK_IN(spread > 0.1, where);
          CHECK_IN(same(together, feed(*d, tokens, 1)), where);
          if (!quick || threads == 3) CHECK_IN(same(together, feed(*d, tokens, 17)), where);
          if (of_isa.empty()) of_isa = together;
          CHECK_IN(same(together, of_isa), where);
          if (first.empty()) first = together;
          const double apart = distance(together, first);
          CHECK_IN(apart < (exact ? 2e-4 : 0.3), where + " " + std::to_string(apart));

          // Later tokens change nothing before them.
          auto changed = tokens;
          for (std::size_t i = 90; i < changed.size(); ++i) changed[i] = (changed[i] + 1) % d->spec().vocab;
          const Rows other = feed(*d, changed, 100);
          CHECK_IN(same(together, other, 90) && !same(together[90], other[90]), where);

          // Three sequences in one pass: prompts of different lengths, then steps.
          const auto b = some_tokens(random, 60, d->spec().vocab), c = some_tokens(random, 60, d->spec().vocab);
          const Rows alone[] = {together, feed(*d, b, 60), feed(*d, c, 60)};
          const std::vector<int>* texts[] = {&tokens, &b, &c};
          int at[] = {70, 1, 30};
          Sequence s0(*d), s1(*d), s2(*d);
          Sequence* sequences[] = {&s0, &s1, &s2};
          Rows last;
          std::vector<int> visited;
          const auto collect = [&](int row, const float* logits) {
            visited.push_back(row);
            last.emplace_back(logits, logits + d->spec().vocab);
          };
          d->run({{&s0, tokens.data(), 70}, {&s1, b.data(), 1}, {&s2, c.data(), 30}}, Decoder::Logits::last, collect);
          CHECK_IN(visited == (std::vector<int>{69, 70, 100}), where);
          for (std::size_t i = 0; i < 3; ++i) CHECK_IN(same(last[i], alone[i][static_cast<std::size_t>(at[i] - 1)]), where);
          for (int step = 0; step < 20; ++step) {
            std::vector<Decoder::Feed> feeds;
            for (std::size_t i = 0; i < 3; ++i) feeds.push_back({sequences[i], texts[i]->data() + at[i]++, 1});
            last.clear();
            d->run(feeds, Decoder::Logits::last, collect);
            for (std::size_t i = 0; i < 3; ++i) CHECK_IN(same(last[i], alone[i][static_cast<std::size_t>(at[i] - 1)]), where);
          }
          CHECK_IN(s0.trace.size() == 90 && s0.trace[80].read_bytes == d->linear_bytes() && s0.cache_bytes() > 0, where);

          // Taps see every site and change nothing.
          int sites = 0;
          d->set_tap([&](const std::string&, int, const float* rows, int n, int width) { sites += n > 0 && width > 0 && std::isfinite(rows[n * width - 1]); });
          CHECK_IN(same(together, feed(*d, {tokens.begin(), tokens.begin() + 40}, 40), 40) && same(together, feed(*d, {tokens.begin(), tokens.begin() + 5}, 1), 5), where);
          d->set_tap(nullptr);
          CHECK_IN(sites == 6 * d->spec().blocks * (d->spec().gated ? 8 : 7), where + " " + std::to_string(sites));
          if (!quick || threads == 3) misuse(*d, tokens, together, where);
        }
      }
    }
}

void poison() {
  for (const Isa isa : available_isas())
    for (const bool exact : {true, false})
      for (const Family family : {Family::llama, Family::opt, Family::gemma})
        for (const char* name : {"blocks.0.q", "blocks.0.k", "blocks.1.v", "blocks.1.o", "blocks.1.up", "blocks.0.down", "output"}) {
          if (std::string(name) == "output" && family != Family::gemma) continue;
          const auto d = build(family, {.exact = exact, .threads = 2, .isa = isa, .poisoned = name});
          const std::vector<int> tokens{1, 2, 3, 4, 5, 6, 7};
          for (const int pass : {1, 7}) {
            const Rows rows = feed(*d, tokens, pass);
            const std::string where = std::string(kNames[static_cast<int>(family)]) + " " + isa_name(isa) + (exact ? " exact " : " int8 ") + name;
            CHECK_IN(std::any_of(rows[6].begin(), rows[6].end(), [](float v) { return std::isnan(v); }), where);
            CHECK_IN(sample(rows[6].data(), d->spec().vocab, {}, 0.5) == -1 && sample(rows[6].data(), d->spec().vocab, {1, 0, 1}, 0.5) == -1, where);
          }
        }
}

// A transform before a linear is the same as the linear with the transform in its weights.
void transforms() {
  Random random(8);
  const int in = 72, out = 50;  // "o" of the Llama-like family
  const auto w = random.normals(static_cast<std::size_t>(out) * in, 0.1f), scale = random.normals(in), rotation = random.normals(static_cast<std::size_t>(in) * in, 0.1f);
  std::vector<std::int64_t> order;
  for (int i = 0; i < in; ++i) order.push_back((i * 5 + 3) % in);
  // y = W R^T (P (s x)): x is scaled, then ordered, then rotated.
  std::vector<float> whole(w.size()), turned(w.size());
  for (int o = 0; o < out; ++o)
    for (int i = 0; i < in; ++i) {
      double sum = 0;
      for (int j = 0; j < in; ++j) sum += static_cast<double>(w[static_cast<std::size_t>(o * in + j)]) * rotation[static_cast<std::size_t>(i * in + j)];
      turned[static_cast<std::size_t>(o * in + i)] = static_cast<float>(sum);
    }
  for (int o = 0; o < out; ++o)
    for (int i = 0; i < in; ++i) {
      const auto from = static_cast<std::size_t>(order[static_cast<std::size_t>(i)]);
      whole[static_cast<std::size_t>(o * in) + from] = turned[static_cast<std::size_t>(o * in + i)] * scale[from];
    }
  for (const Isa isa : available_isas())
    for (const int threads : {1, 3}) {
      const auto plain = build(Family::llama, {.threads = threads, .isa = isa, .dense = true, .plan = [&](Decoder& d, Random&) { d.set_f32("blocks.0.o", out, in, whole.data()); }});
      const auto with = build(Family::llama, {.threads = threads, .isa = isa, .dense = true, .plan = [&](Decoder& d, Random&) {
                                d.set_f32("blocks.0.o", out, in, w.data());
                                d.add_transform("blocks.0.o", {TransformKind::scale, scale, {}});
                                d.add_transform("blocks.0.o", {TransformKind::order, {}, order});
                                d.add_transform("blocks.0.o", {TransformKind::rotation, rotation, {}});
                              }});
      const auto tokens = some_tokens(random, 30, 101);
      const Rows rows = feed(*with, tokens, 30);
      CHECK_IN(distance(rows, feed(*plain, tokens, 30)) < 1e-4, isa_name(isa));
      CHECK_IN(same(rows, feed(*with, tokens, 1)), isa_name(isa));
    }
  Random other(9);
  Decoder d(spec_of(Family::llama, {}));
  CHECK_THROWS(std::invalid_argument, d.add_transform("blocks.0.q", {TransformKind::scale, scale, {}}));
  CHECK_THROWS(std::invalid_argument, d.finish());
  CHECK_THROWS(std::invalid_argument, d.set_f32("blocks.9.q", 1, 1, scale.data()));
  CHECK_THROWS(std::logic_error, Sequence{d});
}

Decider decider(TapKind tap, int block, ScopeKind scope, int every, float initial, std::unique_ptr<Program> program) {
  Decider d;
  d.tap = tap, d.block = block, d.scope = scope, d.every = every, d.initial = initial;
  d.program = std::move(program);
  return d;
}

// Every scope, tap, program and kind of consumer at once.
void add_plan(Decoder& d, Random& random) {
  const DecoderSpec& s = d.spec();
  const auto mask = [&](int size, int width, int keep) { return projection_mask(random.normals(static_cast<std::size_t>(size) * width), size, width, keep); };
  d.add_decider(decider(TapKind::residual, 0, ScopeKind::token, 1, 8, position_table({0, 3, 50, 120}, {8, 3, 5, 1})));
  d.add_decider(decider(TapKind::block_input, 0, ScopeKind::every, 7, 1, mask(s.heads, s.hidden, s.heads / 2)));
  d.add_decider(decider(TapKind::attention_output, 0, ScopeKind::token, 1, 1, mask(s.neurons, s.heads * s.head_dim, s.neurons / 3)));
  d.add_decider(decider(TapKind::residual, 1, ScopeKind::every, 5, 0, position_table({0, 10, 20, 60, 100}, {0, 1, 2, 3, 0})));
  d.add_decider(decider(TapKind::block_input, 1, ScopeKind::reply, 1, 0, norm_levels({{0.5f}, {0.1f, 0.6f}})));
  d.add_decider(decider(TapKind::residual, 1, ScopeKind::reply, 1, 8, norm_levels({{0.1f}, {3, 4}})));
  d.add_decider(decider(TapKind::residual, 1, ScopeKind::token, 1, 0, norm_levels({{3}, {0, 0.3f}, 2})));
  d.add_decider(decider(TapKind::residual, 1, ScopeKind::token, 1, 1, mask(s.heads, s.hidden, 1)));
  std::vector<float> steps(3 * static_cast<std::size_t>(s.hidden));
  for (float& v : steps) v = std::round(20 * static_cast<float>(random.normal()));
  d.add_decider(decider(TapKind::mlp_input, 0, ScopeKind::token, 1, 3, projection_levels(steps, {0.1f, 0.2f, 0.1f}, {{2}, {3, 8}})));
  d.add_decider(decider(TapKind::mlp_inner, 1, ScopeKind::token, 1, 0, linear_levels(random.normals(static_cast<std::size_t>(s.neurons)), 0, true, {{-0.5f, 0.5f}, {0, 1, 2}})));
  d.add_consumer(8, "width", "blocks.0.gate_up", {8, 3});
  d.add_consumer(9, "width", "blocks.1.down", {8, 4, 2}, {2, 4, 8});
  CHECK_THROWS(std::invalid_argument, d.add_consumer(9, "width", "blocks.0.o", {8, 4}, {2, 4, 8}));
  d.add_consumer(0, "width", "blocks.0.qkv", {8, 5, 3, 1});
  d.add_consumer(0, "width", "blocks.1.gate_up", {8, 5, 3, 1});
  d.add_consumer(1, "heads", "blocks.0", {});
  d.add_consumer(2, "neurons", "blocks.0", {});
  d.add_consumer(2, "neurons", "blocks.1", {});
  d.add_consumer(3, "path", "blocks.1", {});
  d.add_consumer(4, "input_threshold", "blocks.0.o", {});
  d.add_consumer(4, "input_threshold", "blocks.1.down", {});
  d.add_consumer(5, "width", "blocks.0.down", {8, 4, 3, 4});  // a width named twice is still one product
  d.add_consumer(5, "width", "blocks.1.o", {8, 4, 3});
  d.add_consumer(6, "input_threshold", "blocks.1.qkv", {});
  d.add_consumer(7, "heads", "blocks.1", {});
  CHECK_THROWS(std::invalid_argument, d.add_consumer(1, "heads", "blocks.0", {}));
  CHECK_THROWS(std::invalid_argument, d.add_consumer(0, "neurons", "blocks.1", {}));
  CHECK_THROWS(std::invalid_argument, d.add_consumer(0, "width", "blocks.1.down", {9}));
  CHECK_THROWS(std::invalid_argument, d.add_consumer(0, "colour", "blocks.1", {}));
  CHECK_THROWS(std::invalid_argument, d.add_consumer(0, "path", "blocks.7", {}));
  CHECK_THROWS(std::invalid_argument, d.add_consumer(0, "path", "elsewhere", {}));
}

bool same_decisions(const RowTrace& a, const RowTrace& b) {
  return a.values == b.values && std::equal(a.masks.begin(), a.masks.end(), b.masks.begin(), b.masks.end(), [](const Mask& x, const Mask& y) { return *x == *y; });
}

void plans(bool quick) {
  for (const Family family : {Family::llama, Family::opt, Family::gemma})
    for (const bool exact : {true, false})
      for (const Isa isa : available_isas()) {
        Rows first;
        for (const int threads : {1, 2, 3}) {
          if (quick && threads > 1 && (threads == 2 || isa != available_isas().back())) continue;
          const std::string where = std::string(kNames[static_cast<int>(family)]) + (exact ? " exact " : " int8 ") + isa_name(isa) + " " + std::to_string(threads) + " threads";
          const auto d = build(family, {.exact = exact, .threads = threads, .isa = isa, .planes = true, .plan = add_plan});
          Random random(11);
          const int prompt = 50;
          const auto tokens = some_tokens(random, 150, d->spec().vocab);
          const std::vector<int> question(tokens.begin(), tokens.begin() + prompt), reply(tokens.begin() + prompt, tokens.end());
          // One by one, where masked work is left out, against passes of many rows, where it is not.
          Sequence one(*d), many(*d);
          one.prompt_length = many.prompt_length = prompt;
          const Rows singly = feed(*d, one, tokens, 1);
          Rows passes = feed(*d, many, question, 50);
          for (auto& row : feed(*d, many, reply, 30)) passes.push_back(std::move(row));
          CHECK_IN(finite(singly), where);
          CHECK_IN(same(singly, passes), where + " " + std::to_string(distance(singly, passes)));
          if (first.empty()) first = singly;
          CHECK_IN(same(singly, first), where);
          bool alike = true, less = false, within = true;
          for (std::size_t i = 0; i < tokens.size(); ++i) {
            alike &= same_decisions(one.trace[i], many.trace[i]) && one.trace[i].kept_weights == many.trace[i].kept_weights && std::fabs(one.trace[i].read_bytes - many.trace[i].read_bytes) < 1;
            less |= one.trace[i].read_bytes < 0.75 * d->linear_bytes();
            within &= one.trace[i].read_bytes > 0 && one.trace[i].read_bytes <= d->linear_bytes();
          }
          CHECK_IN(alike, where);
          CHECK_IN(less, where);
          CHECK_IN(within, where);
          const auto& at_60 = one.trace[60];
          CHECK_IN(at_60.values[0] == 5 && one.trace[2].values[0] == 8 && one.trace[130].values[0] == 1, where);
          CHECK_IN(std::count(at_60.masks[0]->begin(), at_60.masks[0]->end(), 1) == d->spec().heads / 2, where);
          CHECK_IN(one.trace[60].masks[0] == one.trace[57].masks[0] && one.trace[60].kept_weights < 1, where);

          // With others in the pass; recorded decisions replayed; a slot held fixed.
          Sequence a(*d), b(*d), again(*d), fixed(*d);
          a.prompt_length = b.prompt_length = prompt;
          Rows last;
          const auto collect = [&](int, const float* logits) { last.emplace_back(logits, logits + d->spec().vocab); };
          d->run({{&a, tokens.data(), prompt}, {&b, tokens.data(), 3}}, Decoder::Logits::last, collect);
          CHECK_IN(same(last[0], singly[prompt - 1]) && same(last[1], singly[2]), where);
          for (int i = 0; i < 10; ++i) {
            last.clear();
            d->run({{&a, tokens.data() + prompt + i, 1}, {&b, tokens.data() + 3 + i, 1}}, Decoder::Logits::last, collect);
            CHECK_IN(same(last[0], singly[static_cast<std::size_t>(prompt + i)]) && same(last[1], singly[static_cast<std::size_t>(3 + i)]), where);
          }
          for (const auto& row : one.trace) {
            again.held.replay.insert(again.held.replay.end(), row.values.begin(), row.values.end());
            again.held.replay_masks.insert(again.held.replay_masks.end(), row.masks.begin(), row.masks.end());
          }
          again.held.replay_rows = static_cast<int>(one.trace.size());
          CHECK_IN(same(singly, feed(*d, again, tokens, 100)), where);
          CHECK_THROWS(std::out_of_range, feed(*d, again, {1}, 1));
          fixed.held.is_fixed[0] = 1;
          fixed.held.fixed[0] = 4;  // not among the widths
          CHECK_THROWS(std::domain_error, feed(*d, fixed, {1, 2, 3}, 3));
          fixed.held.fixed[0] = 8;
          CHECK_IN(fixed.position() == 0 && finite(feed(*d, fixed, tokens, 60)) && fixed.trace[140].values[0] == 8, where);
        }
      }
}

void plan_misuse() {
  CHECK_THROWS(std::invalid_argument, position_table({1}, {1}));
  CHECK_THROWS(std::invalid_argument, position_table({0, 2, 1}, {1, 2, 3}));
  CHECK_THROWS(std::invalid_argument, projection_mask({1, 2, 3}, 2, 2, 1));
  CHECK_THROWS(std::invalid_argument, projection_levels({1, 2, 3}, {1, 1}, {{1}, {0, 1}}));
  CHECK_THROWS(std::invalid_argument, projection_levels({1, 2.5f}, {1}, {{1}, {0, 1}}));
  CHECK_THROWS(std::invalid_argument, linear_levels({}, 0, true, {{1}, {0, 1}}));
  CHECK_THROWS(std::invalid_argument, linear_levels({1}, 0, true, {{2, 1}, {0, 1, 2}}));
  CHECK_THROWS(std::invalid_argument, norm_levels({{1}, {0}}));
  CHECK_THROWS(std::invalid_argument, norm_levels({{1}, {0, 1}})->set_thresholds({1, 2}));
  CHECK_THROWS(std::invalid_argument, norm_levels({{1, 2}, {0, 1, 2}})->set_thresholds({2, 1}));
  CHECK_THROWS(std::invalid_argument, position_table({0}, {1})->set_thresholds({1}));
  Decoder d(spec_of(Family::llama, {}));
  CHECK_THROWS(std::invalid_argument, d.add_decider(decider(TapKind::residual, 7, ScopeKind::token, 1, 0, norm_levels({{1}, {0, 1}}))));
  CHECK_THROWS(std::invalid_argument, d.add_decider(decider(TapKind::residual, 0, ScopeKind::every, 0, 0, norm_levels({{1}, {0, 1}}))));
  // A tap full of NaN still gives a mask of the right size.
  const auto program = projection_mask(std::vector<float>(40 * 8, 1.0f), 40, 8, 10);
  std::vector<float> tap(8, std::numeric_limits<float>::quiet_NaN());
  const Mask mask = program->mask(kernels(Isa::portable), tap.data(), 8, 0);
  CHECK(std::count(mask->begin(), mask->end(), 1) == 10);
  CHECK_THROWS(std::invalid_argument, threshold(-1, 0));
  CHECK_THROWS(std::invalid_argument, threshold(1, 0)->set_thresholds({1, 2}));
  CHECK_THROWS(std::invalid_argument, constant_mask({}, 0));
  CHECK_THROWS(std::logic_error, constant_mask({1, 0}, 0)->value(kernels(Isa::portable), nullptr, 0, 0));
  CHECK(*constant_mask({1, 0}, 3)->mask(kernels(Isa::portable), nullptr, 0, 2) == std::vector<std::uint8_t>({1, 1}));
}

// A predictor against its formula in doubles, on every instruction set; floors, ties and NaN.
void predictors() {
  Random random(5);
  const int width = 70, units = 37, size = 150;
  const auto codes = [&](int n) {
    std::vector<std::int8_t> made(static_cast<std::size_t>(n));
    for (auto& c : made) c = static_cast<std::int8_t>(std::clamp(std::lround(40 * random.normal()), -127l, 127l));
    return made;
  };
  const auto hidden = codes(units * width), rows = codes(size * units);
  const auto bias = random.normals(units), mean = random.normals(size);
  const std::vector<float> hidden_steps(units, 0.004f), row_steps(size, 0.003f);
  PredictorSource source{width, units, size, hidden.data(), hidden_steps.data(), bias.data(), rows.data(), row_steps.data(), mean.data(), {0, 5, 50, size}, {0.1f, -0.2f, 0.0f}, {1, 4, 0}, 2};
  const auto tap = random.normals(width);
  std::vector<double> scores(size), h(units);
  double squares = 0;
  for (const float v : tap) squares += static_cast<double>(v) * v;
  for (std::size_t u = 0; u < h.size(); ++u) {
    double sum = 0;
    for (std::size_t c = 0; c < tap.size(); ++c) sum += static_cast<double>(hidden[u * width + c]) * tap[c] / std::sqrt(squares / width);
    h[u] = std::max(0.0, sum * hidden_steps[u] + bias[u]);
  }
  const double step = *std::max_element(h.begin(), h.end()) / 127;
  for (double& v : h) v = std::nearbyint(v / step) * step;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    double sum = 0;
    for (std::size_t u = 0; u < h.size(); ++u) sum += rows[i * units + u] * h[u];
    scores[i] = sum * row_steps[i] + mean[i];
  }
  for (const Isa isa : available_isas()) {
    Predictor p(source);
    const Mask mask = p.mask(kernels(isa), tap.data(), width, 2);
    for (int i = 0; i < size; ++i) {
      const double cut = source.thresholds[i < 5 ? 0 : i < 50 ? 1 : 2], score = scores[static_cast<std::size_t>(i)];
      if (std::fabs(score - cut) > 1e-4) CHECK_IN((*mask)[static_cast<std::size_t>(i)] == (score > cut), isa_name(isa));
    }
    p.set_thresholds({1e9f, 1e9f, 1e9f});
    const Mask floored = p.mask(kernels(isa), tap.data(), width, 7);
    CHECK_IN(std::count(floored->begin(), floored->end(), 1) == 5, isa_name(isa));
    CHECK_IN((*floored)[static_cast<std::size_t>(std::max_element(scores.begin(), scores.begin() + 5) - scores.begin())] == 1, isa_name(isa));
    const std::vector<float> nan(width, std::numeric_limits<float>::quiet_NaN());
    const Mask lost = p.mask(kernels(isa), nan.data(), width, 7);
    CHECK_IN((*lost)[0] == 1 && (*lost)[5] == 1 && (*lost)[8] == 1 && std::count(lost->begin(), lost->end(), 1) == 5, isa_name(isa));
    CHECK_IN(p.mask(kernels(isa), tap.data(), width, 1) == p.whole(), isa_name(isa));
  }
  Predictor p(source);
  CHECK_THROWS(std::invalid_argument, p.set_thresholds({1, 2}));
  CHECK_THROWS(std::invalid_argument, p.mask(kernels(Isa::portable), tap.data(), width - 1, 7));
  source.groups = {0, 50, 5, size};
  CHECK_THROWS(std::invalid_argument, Predictor{source});
  source.groups = {0, 5, 50, size}, source.floors = {6, 0, 0};
  CHECK_THROWS(std::invalid_argument, Predictor{source});
}

void threads_and_lifetimes(bool quick) {
  // The barrier holds all threads back, awake or asleep.
  for (const int n : {1, 2, 3, 5}) {
    Pool pool(n);
    std::vector<int> counts(static_cast<std::size_t>(n));
    bool right = true;
    for (int i = 0; i < 200; ++i) {
      pool.run([&](int t) {
        ++counts[static_cast<std::size_t>(t)];
        pool.barrier();
        if (t == n - 1)
          for (const int c : counts) right &= c == 2 * i + 1;
        pool.barrier();
        ++counts[static_cast<std::size_t>(t)];
      });
      if (i % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(3));
    }
    CHECK(right);
  }
  CHECK_THROWS(std::invalid_argument, Pool(0));
  CHECK_THROWS(std::invalid_argument, Pool(2, {0}));
#if defined(__linux__)
  CHECK_THROWS(std::invalid_argument, Pool(3, {0, 0, 100000}));
  CHECK_THROWS(std::invalid_argument, Pool(3, {0, -1, 0}));
#endif

  const Isa best = available_isas().back();
  Random random(12);
  const auto tokens = some_tokens(random, 60, 67);
  const Rows expected = feed(*build(Family::llama, {.threads = 1, .isa = best}), tokens, 60);
  const Rows expected_opt = feed(*build(Family::opt, {.exact = false, .threads = 1, .isa = best}), tokens, 60);
  for (int i = 0; i < 50; ++i) {  // some used, some not, some with sequences that outlive a pass
    const auto d = build(i % 2 == 0 ? Family::llama : Family::opt, {.exact = i % 2 == 0, .threads = 1 + i % 3, .isa = best});
    if (i % 5 == 0) continue;
    Sequence unused(*d);
    CHECK(same(feed(*d, {tokens.begin(), tokens.begin() + 10}, 1 + i % 10), i % 2 == 0 ? expected : expected_opt, 10));
  }
  {
    const auto a = build(Family::llama, {.isa = best}), b = build(Family::llama, {.isa = best});
    Sequence of_b(*b);
    CHECK_THROWS(std::invalid_argument, feed(*a, of_b, tokens, 10));
  }
  // Two decoders at once, each with threads of its own.
  const auto work = [&](Family family, bool exact, const Rows& right) {
    for (int i = 0; i < (quick ? 2 : 5); ++i) {
      const auto d = build(family, {.exact = exact, .threads = 2, .isa = best});
      CHECK(same(right, feed(*d, tokens, 1)));
      CHECK(same(right, feed(*d, tokens, 30)));
    }
  };
  std::thread one(work, Family::llama, true, std::cref(expected)), two(work, Family::opt, false, std::cref(expected_opt));
  one.join();
  two.join();
  // One decoder used from one thread after another.
  const auto d = build(Family::llama, {.threads = 3, .isa = best});
  for (int i = 0; i < 3; ++i) std::thread([&] { CHECK(same(expected, feed(*d, tokens, 13))); }).join();
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::string(argv[1]) == "--quick";
  std::string found;
  for (const Isa isa : available_isas()) found += std::string(" ") + isa_name(isa);
  std::printf("instruction sets:%s\n", found.c_str());
  const auto part = [](const char* name, const std::function<void()>& run) {
    const auto started = std::chrono::steady_clock::now();
    const long before = checks;
    run();
    std::printf("%-24s %7ld checks %7.1f s\n", name, checks - before, std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count());
    std::fflush(stdout);
  };
  part("group products", [&] { group_products(quick); });
  part("table products", [&] { table_products(quick); });
  part("dense products", dense_products);
  part("integer products", [&] { wb::test::integer_products(quick); });
  part("vector kernels", vector_kernels);
  part("attention", attention);
  part("sampling", sampling);
  part("transforms", transforms);
  part("plans", [&] { plans(quick); });
  part("misuse of plans", plan_misuse);
  part("predictors", predictors);
  part("sparse products", [&] { sparse_products(quick); });
  part("NaN", poison);
  part("threads and lifetimes", [&] { threads_and_lifetimes(quick); });
  part("decoders", [&] { decoders(quick); });
  std::printf("%ld checks, %ld failed\n", checks.load(), failures.load());
  return failures == 0 ? 0 : 1;
}
