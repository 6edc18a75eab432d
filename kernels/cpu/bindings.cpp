// The Python face of the decoder. Arrays come in as numpy, results go out as numpy; the GIL is released while computing.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>

#include "decoder.hpp"
#include "predictor.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using wb::Decoder;
using wb::Sequence;

template <class T, class... Extra>
using In = nb::ndarray<const T, nb::numpy, nb::c_contig, nb::device::cpu, Extra...>;
using Bytes1 = In<std::uint8_t, nb::ndim<1>>;
using Signed2 = In<std::int8_t, nb::ndim<2>>;
using Bytes2 = In<std::uint8_t, nb::ndim<2>>;
using Halves2 = In<std::uint16_t, nb::ndim<2>>;
using Floats1 = In<float, nb::ndim<1>>;
using Floats2 = In<float, nb::ndim<2>>;
using Tokens = In<std::int32_t, nb::ndim<1>>;

nb::object new_array(std::vector<std::size_t> shape, const float* values) {
  std::size_t n = 1;
  for (const std::size_t d : shape) n *= d;
  auto* copy = new float[n > 0 ? n : 1];
  std::copy(values, values + n, copy);
  nb::capsule owner(copy, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, float>(copy, shape.size(), shape.data(), owner));
}

int checked(std::size_t n) {
  if (n > 0x7FFFFFFF) throw std::invalid_argument("A matrix is too large for the cpu engine.");
  return static_cast<int>(n);
}

void shape(const char* what, std::size_t have_rows, std::size_t have, std::size_t rows, std::size_t columns) {
  if (have_rows != rows || have != columns) throw std::invalid_argument(std::string(what) + " do not fit the codes' shape.");
}

// A width of planes: its bits, scales (out, groups) and packed zero points.
using Width = std::tuple<int, Halves2, Bytes2>;

void check_width(const wb::Matrix& m, int bits, const Halves2& scales, const Bytes2& zeros) {
  const auto out = static_cast<std::size_t>(m.out), groups = static_cast<std::size_t>(m.grouping.n_groups);
  shape("scales", scales.shape(0), scales.shape(1), out, groups);
  shape("zero points", zeros.shape(0), zeros.shape(1), out, (groups * static_cast<std::size_t>(std::max(bits, 0)) + 7) / 8);
}

wb::GroupSource group_source(Bytes2 packed, int in, int bits, int group, std::optional<Halves2> scales16, std::optional<Floats2> scales32,
                             std::optional<Bytes2> zeros, std::optional<Halves2> minima16, std::optional<Floats2> minima32, bool planes, bool has_widths, int block = wb::kBlock) {
  if (bits < 2 || bits > 8 || group < 1 || in < 1) throw std::invalid_argument("Codes need 2 to 8 bits, a group size and inputs.");
  const std::size_t out = packed.shape(0), groups = (static_cast<std::size_t>(in) + std::min(group, in) - 1) / static_cast<std::size_t>(std::min(group, in));
  shape("codes", out, packed.shape(1), out, (static_cast<std::size_t>(in) * static_cast<std::size_t>(bits) + 7) / 8);
  wb::GroupSource source;
  source.packed = packed.data();
  source.packed_row = packed.shape(1);
  source.bits = bits;
  source.group = group;
  source.planes = planes;
  source.block = block;
  if (has_widths ? scales16 || scales32 || zeros || minima16 || minima32 : scales16.has_value() == scales32.has_value())
    throw std::invalid_argument("Scales are needed once, as fp16 or fp32.");
  if (scales16) {
    shape("scales", scales16->shape(0), scales16->shape(1), out, groups);
    source.scales16 = scales16->data();
  } else if (scales32) {
    shape("scales", scales32->shape(0), scales32->shape(1), out, groups);
    source.scales32 = scales32->data();
  }
  if (zeros) {
    shape("zero points", zeros->shape(0), zeros->shape(1), out, (groups * static_cast<std::size_t>(bits) + 7) / 8);
    source.packed_zeros = zeros->data();
    source.packed_zeros_row = zeros->shape(1);
  }
  if (minima16) {
    shape("minima", minima16->shape(0), minima16->shape(1), out, groups);
    source.minima16 = minima16->data();
  }
  if (minima32) {
    shape("minima", minima32->shape(0), minima32->shape(1), out, groups);
    source.minima32 = minima32->data();
  }
  return source;
}

// What happens to the inputs of integer products, from the names of `IntegerInput`'s members.
wb::IntegerInput integer_input(const nb::dict& of) {
  wb::IntegerInput input;
  const auto floats = [&](const char* name) { return of.contains(name) ? nb::cast<std::vector<float>>(of[name]) : std::vector<float>{}; };
  const auto ints = [&](const char* name) { return of.contains(name) ? nb::cast<std::vector<int>>(of[name]) : std::vector<int>{}; };
  input.in = nb::cast<int>(of["inputs"]);
  input.bits = nb::cast<int>(of["bits"]);
  input.weight_bits = nb::cast<int>(of["weight_bits"]);
  input.sections = wb::make_sections(ints("channels"), ints("doublings"), input.weight_bits);
  input.apart = nb::cast<bool>(of["apart"]);
  input.order = ints("order");
  const auto aligned = [&](const char* name) {
    const auto values = floats(name);
    return wb::AlignedVector<float>(values.begin(), values.end());
  };
  input.bias = aligned("bias");
  input.multipliers = aligned("multipliers");
  input.steps = floats("steps");
  input.starts = ints("starts");
  input.clip = nb::cast<float>(of["clip"]);
  input.limit = nb::cast<float>(of["limit"]);
  input.section_scales = floats("section_scales");
  input.rotation.block = nb::cast<int>(of["block"]);
  input.rotation.signs = floats("signs");
  if (of.contains("factors")) input.rotation.factors = nb::cast<std::vector<std::vector<float>>>(of["factors"]);
  wb::settle(input);
  return input;
}

wb::IntegerSource integer_source(const wb::IntegerInput& input, const Bytes2& packed, const Halves2& scales) {
  wb::IntegerSource source;
  source.bits = input.weight_bits;
  source.grouped = scales.shape(1) > 1;
  if (source.grouped && !input.apart) throw std::invalid_argument("Weights have groups of their own only where sections are apart.");
  const std::size_t out = packed.shape(0), in = static_cast<std::size_t>(input.in);
  shape("codes", out, packed.shape(1), out, (in * static_cast<std::size_t>(input.weight_bits) + 7) / 8);
  shape("scales", scales.shape(0), scales.shape(1), out, source.grouped ? input.sections.size() : 1);
  source.packed = packed.data();
  source.packed_row = packed.shape(1);
  source.scales16 = scales.data();
  return source;
}

// A width of tables: its bits and values (out, 2^bits).
using Table = std::pair<int, Halves2>;

void check_tables(const Bytes2& packed, int in, int bits, const std::vector<Table>& tables) {
  if (bits < 2 || bits > wb::kMaxPlanes || in < 1) throw std::invalid_argument("Codes of tables need 2 to 8 bits, and inputs.");
  const std::size_t out = packed.shape(0);
  shape("codes", out, packed.shape(1), out, (static_cast<std::size_t>(in) * static_cast<std::size_t>(bits) + 7) / 8);
  bool widest = false;
  for (const auto& [at, values] : tables) {
    if (at < 2 || at > bits) throw std::invalid_argument("A table is looked up by 2 bits or more, and no more than the codes have.");
    shape("tables", values.shape(0), values.shape(1), out, std::size_t{1} << at);
    widest |= at == bits;
  }
  if (!widest) throw std::invalid_argument("The width of the codes needs a table.");
}

// A linear of a matrix of columns: packed 4-bit codes, scales and packed zero points; or bf16 rows.
using NibbleColumns = std::tuple<Bytes2, Halves2, std::optional<Bytes2>>;

std::vector<wb::ColumnSource> column_sources(const std::vector<NibbleColumns>& linears, int in, int group) {
  if (in < 1 || group < 1) throw std::invalid_argument("Columns need inputs and a group size.");
  const std::size_t width = static_cast<std::size_t>(in), of_group = static_cast<std::size_t>(std::min(group, in)), groups = (width + of_group - 1) / of_group;
  std::vector<wb::ColumnSource> sources;
  for (const auto& [packed, scales, zeros] : linears) {
    wb::ColumnSource source;
    source.out = checked(packed.shape(0));
    shape("codes", packed.shape(0), packed.shape(1), packed.shape(0), (width + 1) / 2);
    shape("scales", scales.shape(0), scales.shape(1), packed.shape(0), groups);
    source.packed = packed.data(), source.packed_row = packed.shape(1), source.scales = scales.data();
    if (zeros) {
      shape("zero points", zeros->shape(0), zeros->shape(1), packed.shape(0), (groups + 1) / 2);
      source.packed_zeros = zeros->data(), source.packed_zeros_row = zeros->shape(1);
    }
    sources.push_back(source);
  }
  return sources;
}

std::vector<wb::ColumnSource> column_sources(const std::vector<Halves2>& linears, int in) {
  std::vector<wb::ColumnSource> sources;
  for (const Halves2& rows : linears) {
    shape("rows", rows.shape(0), rows.shape(1), rows.shape(0), static_cast<std::size_t>(in));
    wb::ColumnSource source;
    source.out = checked(rows.shape(0)), source.rows = rows.data();
    sources.push_back(source);
  }
  return sources;
}

// What a matrix of columns gives for rows x (n, in), its linears side by side: (n, sum of their outputs).
nb::object column_product(const wb::Columns& w, const std::vector<wb::ColumnSource>& sources, const Floats2& x, bool exact, const std::string& isa) {
  const auto& k = wb::kernels(wb::choose_isa(isa));
  const auto n = x.shape(0), in = static_cast<std::size_t>(w.in), blocks = static_cast<std::size_t>(w.at.n_blocks), list = in + 3 * blocks + 1;
  if (x.shape(1) != in) throw std::invalid_argument("x does not fit the codes' shape.");
  std::size_t width = 0;
  for (const auto& source : sources) width += static_cast<std::size_t>(source.out);
  std::vector<float> y(n * width), listed_x(n * list), scale(n * blocks), sum(n * std::max<std::size_t>(blocks, static_cast<std::size_t>(w.at.n_groups)));
  std::vector<std::int8_t> q(static_cast<std::size_t>(w.at.padded)), listed_q(n * list);
  std::vector<std::uint32_t> channels(n * list);
  std::vector<std::int32_t> starts(n * (blocks + 1));
  std::vector<std::uint8_t> active(blocks);
  std::vector<wb::ActiveInputs> rows;
  std::vector<float*> to;
  std::vector<float* const*> of_row;
  to.reserve(n * sources.size());
  const std::size_t sums = sum.size() / std::max<std::size_t>(n, 1);
  for (std::size_t i = 0; i < n; ++i) {
    const float* from = x.data() + i * in;
    const bool codes = w.nibbles && !exact;
    if (codes) k.quantize(w.at, from, q.data(), scale.data() + i * blocks, sum.data() + i * sums, active.data());
    rows.push_back(wb::list_active(w.at, codes ? q.data() : nullptr, scale.data() + i * blocks, from, channels.data() + i * list,
                                   starts.data() + i * (blocks + 1), listed_q.data() + i * list, listed_x.data() + i * list, sum.data() + i * sums));
    of_row.push_back(to.data() + to.size());
    float* at = y.data() + i * width;
    for (const auto& source : sources) to.push_back(at), at += source.out;
  }
  const std::vector<const float*> bias(sources.size(), nullptr);
  for (const auto& part : w.parts) k.columns(w, part, rows.data(), checked(n), bias.data(), of_row.data(), false);
  return new_array({n, width}, y.data());
}

struct TapRecord {
  std::string site;
  int position, n, width;
  std::vector<float> rows;
};

// A decoder with what the bindings add: recorded taps and one buffer of logits.
class Engine {
 public:
  explicit Engine(wb::DecoderSpec spec) : decoder(std::move(spec)) {}

  Decoder decoder;
  std::vector<TapRecord> taps;
  std::vector<float> logits;  // of the last pass, rows in the order they were wanted

  void set_tap(bool on) {
    taps.clear();
    if (!on) {
      decoder.set_tap(nullptr);
      return;
    }
    decoder.set_tap([this](const std::string& site, int position, const float* rows, int n, int width) {
      taps.push_back({site, position, n, width, std::vector<float>(rows, rows + static_cast<std::size_t>(n) * static_cast<std::size_t>(width))});
    });
  }

  // Run tokens of one sequence in passes; `visit` sees logits by offset into the tokens.
  template <class Visit>
  void feed(Sequence& sequence, const std::int32_t* tokens, std::size_t n, Decoder::Logits logits_of, Visit visit) {
    for (std::size_t begin = 0; begin < n; begin += wb::kMaxRows) {
      const std::size_t count = std::min<std::size_t>(wb::kMaxRows, n - begin);
      auto want = logits_of;
      if (want == Decoder::Logits::last && begin + count < n) want = Decoder::Logits::none;
      decoder.run({{&sequence, tokens + begin, static_cast<int>(count)}}, want,
                  [&](int row, const float* values) { visit(begin + static_cast<std::size_t>(row), values); });
    }
  }

  nb::object prefill(Sequence& sequence, Tokens tokens) {
    const auto vocab = static_cast<std::size_t>(decoder.spec().vocab);
    logits.resize(vocab);
    {
      nb::gil_scoped_release free;
      feed(sequence, tokens.data(), tokens.shape(0), Decoder::Logits::last, [&](std::size_t, const float* values) { std::copy(values, values + vocab, logits.begin()); });
    }
    return new_array({vocab}, logits.data());
  }

  nb::object all_logits(Sequence& sequence, Tokens tokens) {
    const auto vocab = static_cast<std::size_t>(decoder.spec().vocab);
    logits.resize(vocab * tokens.shape(0));
    {
      nb::gil_scoped_release free;
      feed(sequence, tokens.data(), tokens.shape(0), Decoder::Logits::all,
           [&](std::size_t row, const float* values) { std::copy(values, values + vocab, logits.begin() + static_cast<std::ptrdiff_t>(row * vocab)); });
    }
    return new_array({tokens.shape(0), vocab}, logits.data());
  }

  // Log-probabilities of targets: targets[i] follows tokens[i]; as many targets as tokens, the last may be -1.
  nb::object score(Sequence& sequence, Tokens tokens, Tokens targets) {
    const std::size_t n = tokens.shape(0);
    if (targets.shape(0) != n) throw std::invalid_argument("Each token needs its target.");
    const int vocab = decoder.spec().vocab;
    for (std::size_t i = 0; i < n; ++i)
      if (targets.data()[i] >= vocab) throw std::invalid_argument("A target is not in the vocabulary.");
    std::vector<float> found(n, 0.0f);
    {
      nb::gil_scoped_release free;
      const auto& k = decoder.kernels();
      feed(sequence, tokens.data(), n, Decoder::Logits::all, [&](std::size_t row, const float* values) {
        const int target = targets.data()[row];
        if (target >= 0) found[row] = static_cast<float>(static_cast<double>(values[target]) - k.log_sum_exp(values, vocab));
      });
    }
    return new_array({n}, found.data());
  }

  nb::object step(std::vector<Sequence*> sequences, Tokens tokens) {
    const auto vocab = static_cast<std::size_t>(decoder.spec().vocab);
    const std::size_t n = sequences.size();
    if (tokens.shape(0) != n) throw std::invalid_argument("One token for each sequence is needed.");
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t j = 0; j < i; ++j)
        if (sequences[i] == sequences[j]) throw std::invalid_argument("A sequence can be in a step only once.");
    logits.resize(vocab * n);
    {
      nb::gil_scoped_release free;
      for (std::size_t begin = 0; begin < n; begin += wb::kMaxRows) {
        std::vector<Decoder::Feed> feeds;
        for (std::size_t i = begin; i < std::min(n, begin + wb::kMaxRows); ++i) feeds.push_back({sequences[i], tokens.data() + i, 1});
        decoder.run(feeds, Decoder::Logits::last, [&](int row, const float* values) {
          std::copy(values, values + vocab, logits.begin() + static_cast<std::ptrdiff_t>((begin + static_cast<std::size_t>(row)) * vocab));
        });
      }
    }
    return new_array({n, vocab}, logits.data());
  }

  // Feed one token and choose the next; -1 where the logits are NaN.
  int step_sample(Sequence& sequence, int token, double temperature, int top_k, double top_p, double uniform) {
    nb::gil_scoped_release free;
    int chosen = -1;
    decoder.run({{&sequence, &token, 1}}, Decoder::Logits::last,
                [&](int, const float* values) { chosen = wb::sample(values, decoder.spec().vocab, {temperature, top_k, top_p}, uniform); });
    return chosen;
  }
};

// A mask as an array that shares its memory; it may not be written to.
nb::object mask_array(const wb::Mask& mask) {
  const auto* held = new wb::Mask(mask);
  nb::capsule owner(held, [](void* p) noexcept { delete static_cast<wb::Mask*>(p); });
  const std::size_t n = mask->size();
  return nb::cast(nb::ndarray<nb::numpy, const std::uint8_t>(mask->data(), 1, &n, owner));
}

wb::Mask as_mask(const Bytes1& values, const wb::Decider& decider) {
  if (!decider.program->is_mask() || values.shape(0) != static_cast<std::size_t>(decider.program->size()))
    throw std::invalid_argument("A slot's mask has the wrong size.");
  return std::make_shared<const std::vector<std::uint8_t>>(values.data(), values.data() + values.shape(0));
}

nb::tuple trace_row(const Sequence& sequence, std::size_t i) {
  const wb::RowTrace& row = sequence.trace.at(i);
  nb::list masks;
  for (const auto& mask : row.masks) masks.append(mask_array(mask));
  return nb::make_tuple(row.position, row.token, row.seconds, row.read_bytes, row.touched_bytes,
                        nb::make_tuple(row.parts[0], row.parts[1], row.parts[2], row.parts[3], row.parts[4]), row.values, masks, row.integers.clamped,
                        row.integers.beyond, row.kept_weights, row.pass_weights);
}

wb::Decider decider_at(const std::string& tap, int block, const std::string& scope, int every, float initial, double bytes) {
  wb::Decider d;
  const char* const taps[wb::kTaps] = {"residual", "block_input", "attention_output", "mlp_input", "mlp_inner"};
  const auto found = std::find(std::begin(taps), std::end(taps), tap);
  if (found == std::end(taps)) throw std::invalid_argument("Unknown tap '" + tap + "'.");
  d.tap = static_cast<wb::TapKind>(found - std::begin(taps));
  d.bytes = bytes;
  d.scope = scope == "reply" ? wb::ScopeKind::reply : scope == "every" ? wb::ScopeKind::every : wb::ScopeKind::token;
  d.block = block, d.every = std::max(every, 1), d.initial = initial;
  return d;
}

// Bytes per second of reading `bytes` with all threads of a pool, best of `repeats`.
double bandwidth(int threads, std::size_t bytes, int repeats) {
  nb::gil_scoped_release free;
  const auto& k = wb::kernels(wb::choose_isa("auto"));
  wb::Arena arena;
  bytes = wb::round_up(bytes, 4096 * static_cast<std::size_t>(threads));
  auto* data = arena.take<std::uint8_t>(bytes);
  wb::Pool pool(threads);
  const std::size_t part = bytes / static_cast<std::size_t>(threads);
  pool.run([&](int t) { std::memset(data + part * static_cast<std::size_t>(t), 1, part); });
  double best = 0;
  std::vector<float> sums(static_cast<std::size_t>(threads) * 16);
  for (int i = 0; i < repeats; ++i) {
    const auto started = std::chrono::steady_clock::now();
    pool.run([&](int t) { sums[static_cast<std::size_t>(t) * 16] += k.read_all(data + part * static_cast<std::size_t>(t), part); });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    best = std::max(best, static_cast<double>(bytes) / seconds);
  }
  return std::isnan(sums[0]) ? 0.0 : best;
}

// Seconds that reading the clock and adding to a part's time takes, mean of many.
double lap_seconds() {
  using Clock = std::chrono::steady_clock;
  constexpr int n = 100000;
  const auto started = Clock::now();
  auto last = started;
  volatile double part = 0;
  for (int i = 0; i < n; ++i) {
    const auto now = Clock::now();
    part = part + std::chrono::duration<double>(now - last).count();
    last = now;
  }
  return std::chrono::duration<double>(last - started).count() / n;
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.doc() = "Compute kernels and decoder of the cpu engine.";
  m.attr("MAX_ROWS") = wb::kMaxRows;
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const auto isa : wb::available_isas()) names.emplace_back(wb::isa_name(isa));
    return names;
  });
  m.def("lap_seconds", &lap_seconds);
  m.def("bandwidth", &bandwidth, "threads"_a, "bytes"_a = std::size_t{1} << 30, "repeats"_a = 5);
  m.def(
      "sample",
      [](Floats1 logits, double temperature, int top_k, double top_p, double uniform) {
        return wb::sample(logits.data(), checked(logits.shape(0)), {temperature, top_k, top_p}, uniform);
      },
      "logits"_a, "temperature"_a, "top_k"_a, "top_p"_a, "uniform"_a);

  // One product, for tests of the kernels: y = W x for rows of x, by codes, with int8 or fp32 activations.
  m.def(
      "group_product",
      [](Bytes2 packed, int in, int bits, int group, std::optional<Halves2> scales16, std::optional<Floats2> scales32, std::optional<Bytes2> zeros,
         std::optional<Halves2> minima16, std::optional<Floats2> minima32, bool planes, std::vector<Width> widths, Floats2 x, int read_bits, bool exact,
         const std::string& isa, std::optional<std::vector<int>> listed) {
        wb::Arena arena;
        auto source = group_source(packed, in, bits, group, scales16, scales32, zeros, minima16, minima32, planes, !widths.empty());
        source.by_row = listed.has_value();
        wb::Matrix w = wb::make_groups(arena, checked(packed.shape(0)), in, source);
        for (const auto& [at, scales, points] : widths) {
          check_width(w, at, scales, points);
          wb::add_width(arena, w, at, scales.data(), points.data(), points.shape(1));
        }
        const auto& k = wb::kernels(wb::choose_isa(isa));
        const std::size_t n = x.shape(0);
        const auto& at = w.grouping;
        if (x.shape(1) != static_cast<std::size_t>(in)) throw std::invalid_argument("x does not fit the codes' shape.");
        const std::size_t width = static_cast<std::size_t>(w.tiles) * wb::kRows;
        wb::Array<float> y(n * width), space(n * static_cast<std::size_t>(at.padded + at.n_blocks + at.n_groups));
        const std::size_t q_stride = wb::round_up(static_cast<std::size_t>(at.padded), wb::kPieceChannels);
        wb::Array<std::int8_t> q(n * q_stride);
        wb::Array<std::uint8_t> active(n * static_cast<std::size_t>(at.n_blocks));
        std::vector<wb::Activation> rows(n);
        std::vector<float*> to(n);
        for (std::size_t i = 0; i < n; ++i) {
          float* scale = space.data() + i * static_cast<std::size_t>(at.padded + at.n_blocks + at.n_groups);
          float *sum = scale + at.n_blocks, *copy = sum + at.n_groups;
          std::int8_t* codes = q.data() + i * q_stride;
          std::uint8_t* is_active = active.data() + i * static_cast<std::size_t>(at.n_blocks);
          const float* from = x.data() + i * static_cast<std::size_t>(in);
          if (exact) k.pad(at, from, copy, sum, is_active);
          else k.quantize(at, from, codes, scale, sum, is_active);
          rows[i] = {copy, codes, nullptr, scale, sum, is_active};
          to[i] = y.data() + i * width;
        }
        if (listed) {
          for (const int row : *listed)
            if (row < 0 || row >= w.out) throw std::invalid_argument("A listed row is not there.");
          (exact ? k.rows_f32 : k.rows_int8)(w, rows.data(), checked(n), to.data(), listed->data(), checked(listed->size()));
        } else {
          (exact ? k.groups_f32 : k.groups_int8)(w, read_bits, rows.data(), checked(n), to.data(), false, 0, w.tiles);
        }
        std::vector<float> result;
        for (std::size_t i = 0; i < n; ++i) result.insert(result.end(), to[i], to[i] + packed.shape(0));
        return new_array({n, packed.shape(0)}, result.data());
      },
      "packed"_a, "inputs"_a, "bits"_a, "group_size"_a, "scales16"_a.none(), "scales32"_a.none(), "zeros"_a.none(), "minima16"_a.none(),
      "minima32"_a.none(), "planes"_a, "widths"_a, "x"_a, "read_bits"_a, "exact"_a, "isa"_a, "listed"_a.none() = nb::none());

  // The same by tables, with fp32 activations.
  m.def(
      "table_product",
      [](Bytes2 packed, int in, int bits, std::vector<Table> tables, Floats2 x, int read_bits, const std::string& isa) {
        check_tables(packed, in, bits, tables);
        wb::Arena arena;
        wb::Matrix w = wb::make_tables(arena, checked(packed.shape(0)), in, bits, packed.data(), packed.shape(1));
        for (const auto& [at, values] : tables) wb::add_table(arena, w, at, values.data());
        if (read_bits != 0 && (read_bits < 2 || read_bits > bits || w.tables[static_cast<std::size_t>(read_bits)] == nullptr))
          throw std::invalid_argument("There is no table of that width.");
        if (x.shape(1) != static_cast<std::size_t>(in)) throw std::invalid_argument("x does not fit the codes' shape.");
        const auto& k = wb::kernels(wb::choose_isa(isa));
        const std::size_t n = x.shape(0), padded = static_cast<std::size_t>(w.grouping.padded), width = static_cast<std::size_t>(w.tiles) * wb::kRows;
        wb::Array<float> y(n * width), space(n * padded);
        wb::Array<std::uint8_t> active(n * static_cast<std::size_t>(w.grouping.n_blocks));
        std::vector<wb::Activation> rows(n);
        std::vector<float*> to(n);
        for (std::size_t i = 0; i < n; ++i) {
          float sum = 0;
          std::uint8_t* is_active = active.data() + i * static_cast<std::size_t>(w.grouping.n_blocks);
          k.pad(w.grouping, x.data() + i * static_cast<std::size_t>(in), space.data() + i * padded, &sum, is_active);
          rows[i] = {space.data() + i * padded, nullptr, nullptr, nullptr, nullptr, is_active};
          to[i] = y.data() + i * width;
        }
        k.groups_f32(w, read_bits, rows.data(), checked(n), to.data(), false, 0, w.tiles);
        std::vector<float> result;
        for (std::size_t i = 0; i < n; ++i) result.insert(result.end(), to[i], to[i] + packed.shape(0));
        return new_array({n, packed.shape(0)}, result.data());
      },
      "packed"_a, "inputs"_a, "bits"_a, "tables"_a, "x"_a, "read_bits"_a, "isa"_a);

  // Integer products: rows x at positions. Returns y, the rows' codes as they are laid out, and what was clamped or beyond.
  m.def(
      "integer_product",
      [](nb::dict of, Bytes2 packed, Halves2 scales, Floats2 x, std::vector<int> positions, const std::string& isa) {
        const wb::IntegerInput input = integer_input(of);
        const std::size_t n = x.shape(0), out = packed.shape(0);
        if (x.shape(1) != static_cast<std::size_t>(input.in) || positions.size() != n) throw std::invalid_argument("x does not fit the codes' shape.");
        wb::Arena arena;
        const wb::Matrix w = wb::make_integer(arena, checked(out), input, integer_source(input, packed, scales));
        const auto& k = wb::kernels(wb::choose_isa(isa));
        const auto width = static_cast<std::size_t>(w.tiles) * wb::kRows, laid_out = static_cast<std::size_t>(input.laid_out()), parts = static_cast<std::size_t>(input.parts()), row = input.row_bytes();
        wb::Array<float> y(n * width), scale(n * parts);
        wb::Array<std::int32_t> offset(n * parts);
        wb::Array<std::int8_t> q(n * row);
        std::vector<wb::Activation> rows(n);
        std::vector<float*> to(n);
        nb::list counts;
        for (std::size_t i = 0; i < n; ++i) {
          wb::IntegerCounts count;
          k.quantize_integer(input, x.data() + i * x.shape(1), positions[i], q.data() + i * row, scale.data() + i * parts, offset.data() + i * parts, count);
          rows[i].q = q.data() + i * row, rows[i].scale = scale.data() + i * parts, rows[i].offset = offset.data() + i * parts;
          to[i] = y.data() + i * width;
          counts.append(nb::make_tuple(count.clamped, count.beyond));
        }
        k.integer(w, 0, rows.data(), checked(n), to.data(), false, 0, w.tiles);
        std::vector<float> result, codes;
        for (std::size_t i = 0; i < n; ++i) result.insert(result.end(), to[i], to[i] + out);
        for (std::size_t i = 0; i < n; ++i) codes.insert(codes.end(), rows[i].q, rows[i].q + laid_out);
        return nb::make_tuple(new_array({n, out}, result.data()), new_array({n, laid_out}, codes.data()), counts);
      },
      "input"_a, "packed"_a, "scales"_a, "x"_a, "positions"_a, "isa"_a);

  // The same where weights lie input by input, as `threads` would share it.
  m.def(
      "column_product",
      [](std::vector<NibbleColumns> linears, int in, int group, int threads, bool paired, Floats2 x, bool exact, const std::string& isa) {
        wb::Arena arena;
        const auto sources = column_sources(linears, in, group);
        return column_product(wb::make_columns(arena, in, group, sources, threads, paired), sources, x, exact, isa);
      },
      "linears"_a, "inputs"_a, "group_size"_a, "threads"_a, "paired"_a, "x"_a, "exact"_a, "isa"_a);
  m.def(
      "bf16_column_product",
      [](std::vector<Halves2> linears, int in, int threads, bool paired, Floats2 x, const std::string& isa) {
        wb::Arena arena;
        const auto sources = column_sources(linears, in);
        return column_product(wb::make_columns(arena, in, in, sources, threads, paired), sources, x, true, isa);
      },
      "linears"_a, "inputs"_a, "threads"_a, "paired"_a, "x"_a, "isa"_a);

  nb::class_<Sequence>(m, "Sequence")
      .def("__init__", [](Sequence* self, Engine& engine) { new (self) Sequence(engine.decoder); }, "engine"_a, nb::keep_alive<1, 2>())
      .def_prop_ro("position", &Sequence::position)
      .def_prop_ro("tokens", [](const Sequence& s) { return s.tokens; })
      .def_prop_ro("cache_bytes", &Sequence::cache_bytes)
      .def_rw("prompt_length", &Sequence::prompt_length)
      .def("trace_length", [](const Sequence& s) { return s.trace.size(); })
      .def("trace_row", &trace_row)
      .def("fix", [](Sequence& s, const Engine& engine, int slot, float value) {
        const auto& decider = engine.decoder.deciders().at(static_cast<std::size_t>(slot));
        if (decider.program->is_mask()) throw std::invalid_argument("The slot holds a mask.");
        s.held.fixed.at(static_cast<std::size_t>(decider.place)) = value;
        s.held.is_fixed[static_cast<std::size_t>(slot)] = 1;
      })
      .def("fix_mask", [](Sequence& s, const Engine& engine, int slot, Bytes1 values) {
        const auto& decider = engine.decoder.deciders().at(static_cast<std::size_t>(slot));
        s.held.fixed_masks.at(static_cast<std::size_t>(decider.place)) = as_mask(values, decider);
        s.held.is_fixed[static_cast<std::size_t>(slot)] = 1;
      })
      // Values of all slots that hold numbers, a row per position; by slot with a mask: its masks, and which of them a position has.
      .def("replay", [](Sequence& s, const Engine& engine, Floats2 values, std::vector<std::tuple<int, std::vector<Bytes1>, std::vector<int>>> masks) {
        const std::size_t n = values.shape(0), n_masks = static_cast<std::size_t>(engine.decoder.n_masks());
        if (values.shape(1) != static_cast<std::size_t>(engine.decoder.n_values()) || n == 0 || masks.size() != n_masks)
          throw std::invalid_argument("Recorded decisions need a value of every slot per position.");
        s.held.replay.assign(values.data(), values.data() + n * values.shape(1));
        s.held.replay_masks.assign(n * n_masks, nullptr);
        for (const auto& [slot, given, which] : masks) {
          const auto& decider = engine.decoder.deciders().at(static_cast<std::size_t>(slot));
          std::vector<wb::Mask> made;
          for (const auto& mask : given) made.push_back(as_mask(mask, decider));
          if (which.size() != n) throw std::invalid_argument("Recorded masks need one for every position.");
          for (std::size_t i = 0; i < n; ++i) s.held.replay_masks[i * n_masks + static_cast<std::size_t>(decider.place)] = made.at(static_cast<std::size_t>(which[i]));
        }
        for (const auto& mask : s.held.replay_masks)
          if (mask == nullptr) throw std::invalid_argument("Recorded decisions lack a slot's masks.");
        s.held.replay_rows = checked(n);
      });

  nb::class_<Engine>(m, "Engine")
      .def("__init__",
           [](Engine* self, int blocks, int hidden, int heads, int kv_heads, int head_dim, int neurons, int vocab, int context, bool layer_norm,
              float epsilon, const std::string& function, bool gated, float embedding_scale, float attention_scale, float softcap, int rotary_dim,
              int position_offset, bool exact, int threads, std::vector<int> cores, std::string isa) {
             wb::DecoderSpec s;
             s.blocks = blocks, s.hidden = hidden, s.heads = heads, s.kv_heads = kv_heads, s.head_dim = head_dim, s.neurons = neurons;
             s.vocab = vocab, s.context = context, s.layer_norm = layer_norm, s.epsilon = epsilon, s.gated = gated;
             s.embedding_scale = embedding_scale, s.attention_scale = attention_scale, s.softcap = softcap;
             s.rotary_dim = rotary_dim, s.position_offset = position_offset, s.exact = exact, s.threads = threads;
             s.cores = std::move(cores), s.isa = std::move(isa);
             if (function == "relu") s.function = wb::Function::relu;
             else if (function == "silu") s.function = wb::Function::silu;
             else if (function == "gelu_tanh") s.function = wb::Function::gelu_tanh;
             else if (function == "gelu") s.function = wb::Function::gelu;
             else throw std::invalid_argument("Unknown activation function '" + function + "'.");
             new (self) Engine(std::move(s));
           },
           nb::kw_only(), "blocks"_a, "hidden"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "neurons"_a, "vocab"_a, "context"_a, "layer_norm"_a,
           "epsilon"_a, "function"_a, "gated"_a, "embedding_scale"_a, "attention_scale"_a, "softcap"_a, "rotary_dim"_a, "position_offset"_a,
           "exact"_a, "threads"_a, "cores"_a, "isa"_a)
      .def(
          "set_groups",
          [](Engine& e, const std::string& name, Bytes2 packed, int in, int bits, int group, std::optional<Halves2> scales16,
             std::optional<Floats2> scales32, std::optional<Bytes2> zeros, std::optional<Halves2> minima16, std::optional<Floats2> minima32,
             bool planes, std::vector<Width> widths, int block, bool by_row) {
            auto source = group_source(packed, in, bits, group, scales16, scales32, zeros, minima16, minima32, planes, !widths.empty(), block);
            source.by_row = by_row;
            e.decoder.set_groups(name, checked(packed.shape(0)), in, source);
            for (const auto& [at, scales, points] : widths) {
              check_width(e.decoder.matrix(name), at, scales, points);
              e.decoder.add_width(name, at, scales.data(), points.data(), points.shape(1));
            }
          },
          "name"_a, "packed"_a, "inputs"_a, "bits"_a, "group_size"_a, "scales16"_a.none() = nb::none(), "scales32"_a.none() = nb::none(),
          "zeros"_a.none() = nb::none(), "minima16"_a.none() = nb::none(), "minima32"_a.none() = nb::none(), "planes"_a = false, "widths"_a = std::vector<Width>(), "block"_a = wb::kBlock,
          "by_row"_a = false)
      .def(
          "set_tables",
          [](Engine& e, const std::string& name, Bytes2 packed, int in, int bits, std::vector<Table> tables) {
            check_tables(packed, in, bits, tables);
            e.decoder.set_tables(name, checked(packed.shape(0)), in, bits, packed.data(), packed.shape(1));
            for (const auto& [at, values] : tables) e.decoder.add_table(name, at, values.data());
          },
          "name"_a, "packed"_a, "inputs"_a, "bits"_a, "tables"_a)
      .def(
          "set_integer",
          [](Engine& e, const std::string& name, nb::dict of, Bytes2 packed, Halves2 scales) {
            const wb::IntegerInput input = integer_input(of);
            e.decoder.set_integer(name, checked(packed.shape(0)), input, integer_source(input, packed, scales));
          },
          "name"_a, "input"_a, "packed"_a, "scales"_a)
      .def("set_columns",
           [](Engine& e, const std::vector<std::string>& names, int in, int group, std::vector<NibbleColumns> linears) {
             e.decoder.set_columns(names, in, group, column_sources(linears, in, group));
           },
           "names"_a, "inputs"_a, "group_size"_a, "linears"_a)
      .def("set_bf16_columns",
           [](Engine& e, const std::vector<std::string>& names, int in, std::vector<Halves2> linears) {
             e.decoder.set_columns(names, in, in, column_sources(linears, in));
           },
           "names"_a, "inputs"_a, "linears"_a)
      .def("set_f32", [](Engine& e, const std::string& name, Floats2 w, bool by_row) { e.decoder.set_f32(name, checked(w.shape(0)), checked(w.shape(1)), w.data(), by_row); }, "name"_a, "weight"_a, "by_row"_a = false)
      .def("set_bf16", [](Engine& e, const std::string& name, Halves2 w, bool by_row) { e.decoder.set_bf16(name, checked(w.shape(0)), checked(w.shape(1)), w.data(), by_row); }, "name"_a, "weight"_a, "by_row"_a = false)
      .def("set_vector", [](Engine& e, const std::string& name, Floats1 v) { e.decoder.set_vector(name, v.data(), v.shape(0)); })
      .def("add_rope", [](Engine& e, Floats1 f, float factor) { return e.decoder.add_rope({f.data(), f.data() + f.shape(0)}, factor); })
      .def("set_attention", [](Engine& e, int block, int rope, int window) { e.decoder.set_attention(block, rope, window); })
      .def("add_scale", [](Engine& e, const std::string& name, Floats1 v) { e.decoder.add_transform(name, {wb::TransformKind::scale, {v.data(), v.data() + v.shape(0)}, {}}); })
      .def("add_order", [](Engine& e, const std::string& name, In<std::int64_t, nb::ndim<1>> v) { e.decoder.add_transform(name, {wb::TransformKind::order, {}, {v.data(), v.data() + v.shape(0)}}); })
      .def("add_rotation", [](Engine& e, const std::string& name, Floats2 v) { e.decoder.add_transform(name, {wb::TransformKind::rotation, {v.data(), v.data() + v.shape(0) * v.shape(1)}, {}}); })
      .def("add_decider",
           [](Engine& e, const std::string& tap, int block, const std::string& scope, int every, float initial, const std::string& program,
              std::vector<float> numbers, std::optional<Floats2> matrix, std::vector<int> positions, double bytes, std::vector<float> thresholds,
              std::vector<float> values, int first) {
             wb::Decider d = decider_at(tap, block, scope, every, initial, bytes);
             wb::Levels levels{std::move(thresholds), std::move(values), first};
             if (program == "norm_levels") d.program = wb::norm_levels(std::move(levels));
             else if (program == "projection_mask" && matrix && numbers.size() == 1)
               d.program = wb::projection_mask({matrix->data(), matrix->data() + matrix->shape(0) * matrix->shape(1)}, checked(matrix->shape(0)),
                                               checked(matrix->shape(1)), static_cast<int>(numbers[0]));
             else if (program == "projection_levels" && matrix && matrix->shape(1) > 1) {
               const std::size_t n = matrix->shape(0), width = matrix->shape(1) - 1;  // each row ends with its scale
               std::vector<float> codes, scales;
               for (std::size_t r = 0; r < n; ++r) {
                 const float* row = matrix->data() + r * (width + 1);
                 codes.insert(codes.end(), row, row + width);
                 scales.push_back(row[width]);
               }
               d.program = wb::projection_levels(codes, std::move(scales), std::move(levels));
             } else if (program == "linear_levels" && matrix && numbers.size() == 2)
               d.program = wb::linear_levels({matrix->data(), matrix->data() + matrix->shape(1)}, numbers[0], numbers[1] != 0, std::move(levels));
             else if (program == "threshold" && levels.thresholds.size() == 1) d.program = wb::threshold(levels.thresholds[0], first);
             else if (program == "constant_mask" && matrix) {
               std::vector<std::uint8_t> mask;
               for (std::size_t i = 0; i < matrix->shape(1); ++i) mask.push_back(matrix->data()[i] != 0.0f);
               d.program = wb::constant_mask(std::move(mask), first);
             } else if (program == "position_table") d.program = wb::position_table(std::move(positions), std::move(numbers));
             else throw std::invalid_argument("Unknown program '" + program + "'.");
             e.decoder.add_decider(std::move(d));
           },
           "tap"_a, "block"_a, "scope"_a, "every"_a, "initial"_a, "program"_a, "numbers"_a, "matrix"_a.none(), "positions"_a, "bytes"_a, "thresholds"_a, "values"_a, "first"_a)
      .def("add_predictor",
           [](Engine& e, const std::string& tap, int block, const std::string& scope, int every, float initial, double bytes, Signed2 hidden,
              Floats1 hidden_steps, Floats1 hidden_bias, Signed2 rows, Floats1 row_steps, Floats1 mean, std::vector<int> groups,
              std::vector<float> thresholds, std::vector<int> floors, int first) {
             wb::PredictorSource p;
             p.width = checked(hidden.shape(1)), p.hidden_units = checked(hidden.shape(0)), p.size = checked(rows.shape(0));
             shape("hidden steps and biases", hidden_steps.shape(0), hidden_bias.shape(0), hidden.shape(0), hidden.shape(0));
             shape("rows", rows.shape(1), mean.shape(0), hidden.shape(0), rows.shape(0));
             shape("row steps", row_steps.shape(0), 0, rows.shape(0), 0);
             p.hidden = hidden.data(), p.hidden_steps = hidden_steps.data(), p.hidden_bias = hidden_bias.data();
             p.rows = rows.data(), p.row_steps = row_steps.data(), p.mean = mean.data();
             p.groups = std::move(groups), p.thresholds = std::move(thresholds), p.floors = std::move(floors), p.first = first;
             wb::Decider d = decider_at(tap, block, scope, every, initial, bytes);
             d.program = std::make_unique<wb::Predictor>(p);
             e.decoder.add_decider(std::move(d));
           },
           nb::kw_only(), "tap"_a, "block"_a, "scope"_a, "every"_a, "initial"_a, "bytes"_a, "hidden"_a, "hidden_steps"_a, "hidden_bias"_a, "rows"_a,
           "row_steps"_a, "mean"_a, "groups"_a, "thresholds"_a, "floors"_a, "first"_a)
      .def("set_thresholds", [](Engine& e, int slot, std::vector<float> thresholds) { e.decoder.set_thresholds(slot, std::move(thresholds)); })
      .def("add_consumer", [](Engine& e, int slot, const std::string& kind, const std::string& target, std::vector<int> widths, std::vector<int> levels, int offset,
                              std::vector<float> factors) {
        e.decoder.add_consumer(slot, kind, target, std::move(widths), std::move(levels), offset, std::move(factors));
      })
      .def("finish", [](Engine& e) { e.decoder.finish(); })
      .def("prefill", &Engine::prefill)
      .def("all_logits", &Engine::all_logits)
      .def("score", &Engine::score)
      .def("step", &Engine::step)
      .def("step_sample", &Engine::step_sample)
      .def("set_tap", &Engine::set_tap)
      .def("take_taps",
           [](Engine& e) {
             nb::list out;
             for (const auto& tap : e.taps)
               out.append(nb::make_tuple(tap.site, tap.position, new_array({static_cast<std::size_t>(tap.n), static_cast<std::size_t>(tap.width)}, tap.rows.data())));
             e.taps.clear();
             return out;
           })
      .def_prop_ro("weight_bytes", [](const Engine& e) { return e.decoder.weight_bytes(); })
      .def_prop_ro("linear_bytes", [](const Engine& e) { return e.decoder.linear_bytes(); })
      .def_prop_ro("output_bytes", [](const Engine& e) { return e.decoder.output_bytes(); })
      .def_prop_ro("laps", [](const Engine& e) { return e.decoder.laps(); })
      .def_prop_ro("isa", [](const Engine& e) { return std::string(wb::isa_name(e.decoder.isa())); });
}
