// Integer products against sums in 64 bits.
#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "half.hpp"
#include "kernels.hpp"
#include "test_checks.hpp"

namespace wb::test {

namespace {

struct Case {
  IntegerInput input;
  int out = 0;
  std::vector<int> weights;            // (out, in), signed
  std::vector<std::uint8_t> packed;
  std::vector<std::uint16_t> scales;
};

// Steps, and a matrix of random codes of which every third is one of the two outermost.
void complete(Case& c, Random& random) {
  IntegerInput& in = c.input;
  in.steps = {0.05f, 0.01f};
  in.starts = {0, 2};
  in.limit = 100;
  settle(in);
  c.out = 1 + random.below(70);
  const int top = 1 << (in.weight_bits - 1);
  const std::size_t row = (static_cast<std::size_t>(in.in) * static_cast<std::size_t>(in.weight_bits) + 7) / 8;
  c.packed.resize(row * static_cast<std::size_t>(c.out));
  for (int r = 0; r < c.out; ++r) {
    c.scales.push_back(float_to_fp16(0.01f + random.uniform()));
    for (int i = 0; i < in.in; ++i) {
      const int w = random.below(3) == 0 ? (random.below(2) != 0 ? -top : top - 1) : random.below(2 * top) - top;
      c.weights.push_back(w);
      auto* to = c.packed.data() + row * static_cast<std::size_t>(r);
      if (in.weight_bits == 8) to[i] = static_cast<std::uint8_t>(w + top);
      else to[i / 2] |= static_cast<std::uint8_t>((w + top) << (4 * (i % 2)));
    }
  }
}

Case random_case(Random& random, bool apart) {
  Case c;
  IntegerInput& in = c.input;
  in.bits = random.below(2) != 0 ? 8 : 4;
  in.weight_bits = random.below(2) != 0 ? 8 : 4;
  std::vector<int> channels, doublings;
  for (int s = 0, n = 1 + random.below(5); s < n; ++s) {
    channels.push_back(1 + random.below(s == n - 1 ? 120 : 20));
    doublings.push_back(s == 0 || apart ? 0 : random.below(3));
  }
  in.sections = make_sections(channels, doublings, in.weight_bits);
  for (const int n : channels) in.in += n;
  in.apart = apart;
  if (apart)
    for (std::size_t s = 0; s < channels.size(); ++s) in.section_scales.push_back(static_cast<float>(1 << random.below(5)));
  for (int i = 0; i < in.in; ++i) in.order.push_back(i);
  for (int i = in.in - 1; i > 0; --i) std::swap(in.order[static_cast<std::size_t>(i)], in.order[static_cast<std::size_t>(random.below(i + 1))]);
  complete(c, random);
  return c;
}

// Rows of `size` times a normal number: products against sums in 64 bits.
void one(Isa isa, Random& random, const Case& c, float size) {
  const bool apart = c.input.apart;
  const IntegerInput& in = c.input;
  const Kernels& k = kernels(isa);
  Arena arena;
  IntegerSource source;
  source.packed = c.packed.data();
  source.packed_row = c.packed.size() / static_cast<std::size_t>(c.out);
  source.bits = in.weight_bits;
  source.scales16 = c.scales.data();
  const Matrix w = make_integer(arena, c.out, in, source);
  const int n = 1 + random.below(70);
  const auto laid_out = static_cast<std::size_t>(in.laid_out()), row = in.row_bytes(), parts = static_cast<std::size_t>(in.parts()), width = static_cast<std::size_t>(w.tiles) * kRows;
  std::vector<std::int8_t> q(row * static_cast<std::size_t>(n));
  std::vector<float> scale(parts * static_cast<std::size_t>(n)), y(width * static_cast<std::size_t>(n));
  std::vector<std::int32_t> offset(scale.size());
  std::vector<Activation> rows(static_cast<std::size_t>(n));
  std::vector<float*> to;
  std::vector<std::size_t> places(rows.size());  // rows lie one after the other, or anyhow
  std::iota(places.begin(), places.end(), std::size_t{0});
  if (random.below(3) == 0)
    for (std::size_t i = places.size() - 1; i > 0; --i) std::swap(places[i], places[static_cast<std::size_t>(random.below(static_cast<int>(i) + 1))]);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    std::int8_t* codes = q.data() + places[i] * row;
    const auto x = random.normals(static_cast<std::size_t>(in.in), size);
    IntegerCounts counts;
    k.quantize_integer(in, x.data(), static_cast<int>(i % 4), codes, scale.data() + i * parts, offset.data() + i * parts, counts);
    rows[i].q = codes;
    rows[i].scale = scale.data() + i * parts;
    rows[i].offset = offset.data() + i * parts;
    to.push_back(y.data() + i * width);
    const float step = i % 4 < 2 ? 0.05f : 0.01f, top = static_cast<float>((1 << (in.bits - 1)) - 1);
    std::int64_t clamped = 0, beyond = 0;
    for (std::size_t place = 0; place < laid_out; ++place) {
      const auto channel = in.order.empty() ? static_cast<int>(place) : in.order[place];
      if (channel == in.in) {
        CHECK(rows[i].q[place] == 0);
        continue;
      }
      const float exact = std::nearbyint(x[static_cast<std::size_t>(channel)] * (1.0f / step));
      const float code = std::min(std::max(exact, -top - 1), top);
      CHECK(static_cast<float>(rows[i].q[place]) == code);
      clamped += exact != code;
      beyond += std::fabs(exact) > in.limit;
    }
    CHECK(counts.clamped == clamped && counts.beyond == beyond);
  }
  const int middle = random.below(w.tiles + 1);
  k.integer(w, 0, rows.data(), n, to.data(), false, 0, middle);
  k.integer(w, 0, rows.data(), n, to.data(), false, middle, w.tiles);
  for (std::size_t i = 0; i < rows.size(); ++i)
    for (int r = 0; r < c.out; ++r) {
      std::int64_t total = 0;
      double sum_of_parts = 0;
      const std::int8_t* p = rows[i].q;
      std::size_t place = 0;
      for (std::size_t s = 0; s < in.sections.size(); ++s) {
        std::int64_t sum = 0;
        for (int j = 0; j < in.sections[s].quads * kQuad; ++j, ++place) {
          const int channel = in.order.empty() ? static_cast<int>(place) : in.order[place];
          if (channel < in.in) sum += static_cast<std::int64_t>(p[place]) * c.weights[static_cast<std::size_t>(r * in.in + channel)];
        }
        total = total * (std::int64_t{1} << in.sections[s].doublings) + sum;
        if (apart) sum_of_parts += static_cast<double>(sum) * static_cast<double>(rows[i].scale[s]) * static_cast<double>(fp16_to_float(c.scales[static_cast<std::size_t>(r)]));
      }
      const float found = to[i][r];
      if (apart) {
        CHECK(std::fabs(static_cast<double>(found) - sum_of_parts) <= 1e-4 * (std::fabs(sum_of_parts) + 1));
      } else {
        CHECK(std::llabs(total) <= std::numeric_limits<std::int32_t>::max());
        CHECK(found == static_cast<float>(total) * (fp16_to_float(c.scales[static_cast<std::size_t>(r)]) * rows[i].scale[0]));
      }
    }
}

// Sections whose doublings come to what 16 bits hold of a shifted code, to one less, and beyond; every code an extreme.
void widening(Isa isa, Random& random) {
  const std::vector<std::vector<int>> doublings = {{0}, {0, 8}, {0, 7}, {0, 9}, {0, 4, 4}, {0, 4, 5}, {0, 1, 8}, {0, 9, 1}, {0, 3, 3, 3, 1}, {0, 0, 8, 0, 1}, {0, 12}, {0, 13}};
  for (const auto& steps : doublings)
    for (const int bits : {4, 8})
      for (const int first : {1, 4, 5, 19}) {
        Case c;
        IntegerInput& in = c.input;
        in.bits = bits;
        std::vector<int> channels;
        for (std::size_t s = 0; s < steps.size(); ++s) channels.push_back(s == 0 ? (steps.back() < 12 ? first : std::min(first, 5)) : 1 + random.below(40));
        for (const int n : channels) in.in += n;
        in.sections = make_sections(channels, steps, 8);
        complete(c, random);
        one(isa, random, c, 1e4f);
      }
}

// As many doublings as a sum of 32 bits has room for, and runs of sections that repeat what is doubled or have sums of their own.
void tile_sums(Isa isa, Random& random) {
  struct Run {
    int first, whole, gathered, shift;
    bool operator==(const Run&) const = default;
  };
  struct Deep {
    int bits, weight_bits;
    std::vector<int> channels, doublings;
    std::vector<Run> runs;
  };
  const std::vector<Deep> cases = {
      {8, 8, {200, 64}, {0, 0}, {}},
      {8, 8, {64, 64}, {0, 8}, {{64, 64, 0, 0}, {0, 64, 0, 8}}},
      {8, 8, {1, 30}, {0, 16}, {{4, 64, 0, 0}, {0, 64, 0, 16}}},
      {8, 8, {20, 556}, {0, 1}, {{0, 576, 16, 0}}},
      {8, 8, {4, 4, 16, 552}, {0, 1, 1, 1}, {{0, 576, 16, 0}}},
      {8, 8, {12, 96, 464, 964}, {0, 1, 1, 1}, {{572, 1024, 0, 0}, {0, 512, 48, 1}}},
      {4, 8, {30, 130}, {0, 4}, {{32, 192, 0, 0}, {0, 64, 0, 4}}},
      {4, 4, {10, 50}, {0, 1}, {{0, 64, 16, 0}}},
      {8, 8, {3, 130, 1, 200, 1, 330}, {0, 0, 1, 0, 2, 1}, {}},
      {8, 4, {3, 130, 1, 200, 1, 330}, {0, 1, 4, 2, 4, 1}, {}},
      {8, 8, {1, 1, 1, 1, 1, 20}, {0, 1, 2, 4, 4, 4}, {}},
      {4, 4, std::vector<int>(22, 1), {0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, {}},
      {4, 4, {1, 130}, {0, 24}, {}},
  };
  for (const Deep& deep : cases) {
    Case c;
    IntegerInput& in = c.input;
    in.bits = deep.bits, in.weight_bits = deep.weight_bits;
    for (const int n : deep.channels) in.in += n;
    in.sections = make_sections(deep.channels, deep.doublings, in.weight_bits);
    complete(c, random);
    std::vector<Run> runs;
    for (const TileSum& sum : in.tile_sums) runs.push_back({sum.first, sum.whole, static_cast<int>(sum.gathered.size()), sum.shift});
    CHECK(deep.runs.empty() || runs == deep.runs);
    for (int i = 0; i < 4; ++i) one(isa, random, c, i % 2 == 0 ? 1e4f : 2);
  }
}

void shifts() {
  const auto placed = [](int bits, const std::vector<int>& doublings) {
    IntegerInput in;
    in.bits = bits;
    in.in = 4 * static_cast<int>(doublings.size());
    in.sections = make_sections(std::vector<int>(doublings.size(), 4), doublings, 8);
    settle(in);
    std::vector<std::pair<int, int>> found;
    for (const Section& s : in.sections) found.emplace_back(s.shift, s.lead);
    return found;
  };
  using Placed = std::vector<std::pair<int, int>>;
  CHECK((placed(8, {0, 1, 2}) == Placed{{3, 0}, {2, 0}, {0, 0}}));
  CHECK((placed(8, {0, 4, 4}) == Placed{{8, 0}, {4, 0}, {0, 0}}));
  CHECK((placed(8, {0, 4, 5}) == Placed{{0, 0}, {5, 9}, {0, 0}}));
  CHECK((placed(8, {0, 9}) == Placed{{0, 0}, {0, 9}}));
  CHECK((placed(4, {0, 4, 5}) == Placed{{9, 0}, {5, 0}, {0, 0}}));
  CHECK((placed(4, {0, 13}) == Placed{{0, 0}, {0, 13}}));
}

// Orders of bytes that ascend within sections, and such as do not, of all lengths about whole sixteens.
void orders(Isa isa, Random& random) {
  for (const int n : {1, 4, 15, 16, 17, 60, 64, 68, 127, 128, 129, 576})
    for (const bool ascending : {true, false}) {
      Case c;
      IntegerInput& in = c.input;
      in.in = n;
      std::vector<int> part(static_cast<std::size_t>(n)), channels;
      for (int& p : part) p = random.below(5);
      for (int p = 0; p < 5; ++p) {
        const auto before = in.order.size();
        for (int i = 0; i < n; ++i)
          if (part[static_cast<std::size_t>(i)] == p) in.order.push_back(i);
        if (in.order.size() > before) channels.push_back(static_cast<int>(in.order.size() - before));
      }
      if (!ascending) std::reverse(in.order.begin(), in.order.end());
      std::vector<int> doublings(channels.size(), 1);
      doublings[0] = 0;
      in.sections = make_sections(channels, doublings, 8);
      complete(c, random);
      one(isa, random, c, 2);
    }
}

IntegerInput plain(int in) {
  IntegerInput input;
  input.in = in;
  input.sections = make_sections({in}, {0}, 8);
  return input;
}

void misuse() {
  CHECK_THROWS(std::invalid_argument, make_sections({}, {}, 8));
  CHECK_THROWS(std::invalid_argument, make_sections({4, 4}, {0}, 8));
  CHECK_THROWS(std::invalid_argument, make_sections({4, 0}, {0, 1}, 8));
  const auto refused = [](auto change) {
    IntegerInput input = plain(8);
    change(input);
    CHECK_THROWS(std::invalid_argument, settle(input));
  };
  refused([](IntegerInput& i) { i.in = 9; });
  refused([](IntegerInput& i) { i.bits = 5; });
  refused([](IntegerInput& i) { i.clip = 0; });
  refused([](IntegerInput& i) { i.steps = {1}; });
  refused([](IntegerInput& i) { i.steps = {1, 1}, i.starts = {0, 0}; });
  refused([](IntegerInput& i) { i.steps = {0}, i.starts = {0}; });
  refused([](IntegerInput& i) { i.bias = {1}; });
  refused([](IntegerInput& i) { i.order = {0, 1, 2, 3, 4, 5, 6, 6}; });
  refused([](IntegerInput& i) { i.order = {0, 1, 2, 3, 4, 5, 6, 9}; });
  refused([](IntegerInput& i) { i.section_scales = {1}; });
  refused([](IntegerInput& i) { i.rotation.block = 4; });
  refused([](IntegerInput& i) { i.in = 100000, i.sections = make_sections({100000}, {0}, 8); });
  refused([](IntegerInput& i) { i.sections = make_sections({4, 4}, {0, 20}, 8); });
}

}  // namespace

void integer_products(bool quick) {
  for (const Isa isa : available_isas()) {
    Random random(11);
    for (int i = 0; i < (quick ? 30 : 150); ++i) one(isa, random, random_case(random, i % 3 == 0), 2);
    widening(isa, random);
    orders(isa, random);
    tile_sums(isa, random);
  }
  shifts();
  misuse();
}

}  // namespace wb::test
