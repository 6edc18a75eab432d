#include "decoder.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <utility>

#include "half.hpp"

namespace wb {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kLogitRows = 16;  // rows of logits held at once

enum class Mode : std::uint8_t { int8, f32, bf16, plain };  // plain: fp32 as it is, no copy

const char* const kUnitOf[][2] = {{"q", "qkv"}, {"k", "qkv"}, {"v", "qkv"}, {"o", "o"}, {"gate", "gate_up"}, {"up", "gate_up"}, {"down", "down"}};

int padded(int n) { return static_cast<int>(round_up(static_cast<std::size_t>(n), 16)); }

// The part of n items that thread t of `threads` takes.
std::pair<int, int> share(int n, int t, int threads) {
  return {static_cast<int>(static_cast<long long>(n) * t / threads), static_cast<int>(static_cast<long long>(n) * (t + 1) / threads)};
}

}  // namespace

// How a row of activations is laid out for some linears.
struct Decoder::Format {
  Mode mode;
  Grouping at;
  int in;
  const std::vector<Transform>* transforms;  // null where there are none
  std::size_t bytes = 0, q = 0, x = 0, b = 0, scale = 0, sum = 0, active = 0;  // places within a row's buffer

  void place() {
    const auto take = [&](std::size_t n) {
      const std::size_t at_byte = bytes;
      bytes += round_up(n, kAlign);
      return at_byte;
    };
    if (mode == Mode::int8) q = take(static_cast<std::size_t>(at.padded));
    if (mode == Mode::f32) x = take(static_cast<std::size_t>(at.padded) * 4);
    if (mode == Mode::plain) x = take(static_cast<std::size_t>(padded(in)) * 4);
    if (mode == Mode::bf16) b = take(static_cast<std::size_t>(padded(in)) * 2);
    if (mode == Mode::int8) scale = take(static_cast<std::size_t>(at.n_blocks) * 4);
    if (mode == Mode::int8 || mode == Mode::f32) {
      sum = take(static_cast<std::size_t>(at.n_groups) * 4);
      active = take(static_cast<std::size_t>(at.n_blocks));
    }
  }
};

struct Decoder::LinearLayer {
  Matrix w;
  bool present = false;
  int format = -1;
  int width_slot = -1;           // place in a row of slot values
  std::vector<int> levels;       // widths that the slot's values are an index into; empty: they are widths
  long bits(float value) const {
    const long at = std::lround(value);
    if (levels.empty()) return at;
    return at >= 0 && at < static_cast<long>(levels.size()) ? levels[static_cast<std::size_t>(at)] : -1;
  }
  std::vector<int> widths;
  std::vector<Transform> transforms;
  std::array<double, 9> bytes{}; // by width; [0] as stored
};

struct Decoder::Norm {
  const float* weight = nullptr;
  const float* bias = nullptr;
};

struct Decoder::Block {
  LinearLayer q, k, v, o, gate, up, down;
  Norm input, post_attention, pre_mlp, post_mlp, q_norm, k_norm;
  int rope = -1, window = 0;
  int heads_slot = -1, neurons_slot = -1, path_slot = -1;
  std::array<int, 4> threshold_slot{-1, -1, -1, -1};  // qkv, o, gate_up, down
  std::array<std::vector<int>, kTaps> deciders;       // by tap
  bool decides(TapKind tap) const { return !deciders[static_cast<std::size_t>(tap)].empty(); }
};

// Buffers of one pass, and the walk through the blocks that every thread takes.
struct Decoder::Pass {
  explicit Pass(Decoder& decoder);

  struct Row {
    Sequence* sequence;
    int position, token;
  };

  void run(int t);
  void block(int index, int t);
  void embed(int t);
  void logits(int t);

  void normalize(const Norm& norm, const float* from, float* to) const;
  void convert(const Format& format, const float* from, float* scratch, std::uint8_t* buffer, Activation& to) const;
  const float* filtered(const float* from, int n, int slot, int row, float* scratch) const;
  void product(const LinearLayer& layer, const std::vector<int>* subset, float* const* y, bool add, int t,
               const float* mask = nullptr, int per_mask = 1);
  void decide(const Block& b, TapKind tap, int t, Array<float>& source, int width);
  void count(const LinearLayer& layer, int t, int mask_slot = -1, int per_mask = 1, const std::vector<int>* subset = nullptr);
  void begin_slots();
  float slot(int place, int row) const { return slots[static_cast<std::size_t>(row) * d.slot_width_ + place]; }
  void lap(Part part, int t) {
    if (t != 0) return;
    const auto now = Clock::now();
    parts[part] += std::chrono::duration<double>(now - last).count();
    last = now;
    ++d.laps_;
  }
  void wait(Part part, int t) {
    d.pool_->barrier();
    lap(part, t);
  }
  void site(const std::string& name, const Array<float>& rows_of, int stride, int width);
  void add_rows(const Norm& norm, const std::vector<int>& active, int t);
  double read_share(const LinearLayer& layer, int row) const;

  Decoder& d;
  const DecoderSpec& s;
  const Kernels& k;
  const int nt;
  int hidden, queries, keys, neurons, vocab;  // padded to 16
  Array<float> x, normed, q, kk, v, attended, other, gate, up, logit;
  std::vector<float*> to_x, to_q, to_k, to_v, to_attended, to_other, to_gate, to_up, to_logit;
  std::vector<Array<std::uint8_t>> shared, local;              // by format
  std::vector<std::vector<Activation>> shared_rows, local_rows;
  std::vector<std::vector<Activation>> subset_rows;            // by thread
  std::vector<std::vector<float*>> subset_to;
  std::vector<std::vector<int>> subset_index;
  std::vector<Array<float>> scratch;                           // by thread: two rows of the widest input
  std::vector<std::vector<float>> scores;                      // by thread
  std::vector<std::vector<Query>> queries_of;                  // by thread
  std::vector<float> slots, angles;

  std::vector<Row> rows;
  std::vector<int> all_rows, attention_rows, mlp_rows, wanted;
  bool single = false;
  std::vector<double> read;
  std::array<double, kParts> parts{};
  Clock::time_point last;
  std::atomic<int> bad_width{0};
  const Visit* visit = nullptr;
  std::exception_ptr thrown;

  // The caller's code, on thread 0. What it throws waits until all threads have left the pass: they meet at barriers.
  template <class Work>
  void call(Work work) {
    if (thrown) return;
    try {
      work();
    } catch (...) {
      thrown = std::current_exception();
    }
  }
};

// Sequence ---------------------------------------------------------------------------------------------------------

Sequence::Sequence(Decoder& decoder) : owner_(&decoder) {
  if (!decoder.finished_) throw std::logic_error("This decoder is not complete.");
  const auto& s = decoder.spec();
  const std::size_t item = s.exact ? 4 : 2;
  key_bytes_ = item * static_cast<std::size_t>(s.kv_heads) * kPiece * static_cast<std::size_t>(s.head_dim);
  value_bytes_ = item * static_cast<std::size_t>(s.kv_heads) * kPiece * static_cast<std::size_t>(padded(s.head_dim));
  keys_.resize(static_cast<std::size_t>(s.blocks));
  values_.resize(static_cast<std::size_t>(s.blocks));
  const auto width = static_cast<std::size_t>(decoder.slot_width());
  held.values.assign(width, 0.0f);
  held.fixed.assign(width, 0.0f);
  held.made.assign(decoder.deciders().size(), 0);
  held.is_fixed.assign(decoder.deciders().size(), 0);
}

std::size_t Sequence::cache_bytes() const { return store_.size() * (key_bytes_ + value_bytes_) * keys_.size(); }

void Sequence::grow(int positions) {
  const auto pieces = static_cast<std::size_t>((positions + kPiece - 1) / kPiece);
  const std::size_t blocks = keys_.size(), per_block = round_up(key_bytes_, kAlign) + round_up(value_bytes_, kAlign);
  while (store_.size() < pieces) {
    store_.emplace_back(per_block * blocks);  // one allocation for all blocks
    for (std::size_t b = 0; b < blocks; ++b) {
      std::uint8_t* at = store_.back().data() + per_block * b;
      keys_[b].push_back(at);
      values_[b].push_back(at + round_up(key_bytes_, kAlign));
    }
  }
}

// Building ---------------------------------------------------------------------------------------------------------

Decoder::Decoder(DecoderSpec spec) : spec_(std::move(spec)), k_(&wb::kernels(choose_isa(spec_.isa))) {
  const auto& s = spec_;
  if (s.blocks < 1 || s.hidden < 1 || s.heads < 1 || s.kv_heads < 1 || s.head_dim < 1 || s.neurons < 1 || s.vocab < 1 || s.context < 1)
    throw std::invalid_argument("All sizes of a decoder must be at least 1.");
  if (s.heads % s.kv_heads != 0) throw std::invalid_argument("The heads must be a multiple of the key/value heads.");
  if (s.rotary_dim < 0 || s.rotary_dim > s.head_dim || s.rotary_dim % 2 != 0)
    throw std::invalid_argument("The rotary part of a head must be even and no wider than the head.");
  pool_ = std::make_unique<Pool>(s.threads, s.cores);
  blocks_.resize(static_cast<std::size_t>(s.blocks));
  embedding_ = std::make_unique<LinearLayer>();
  output_ = std::make_unique<LinearLayer>();
}

Decoder::~Decoder() = default;

Decoder::LinearLayer& Decoder::linear(const std::string& name) {
  if (finished_) throw std::logic_error("This decoder is complete: nothing can be added.");
  if (name == "embedding") return *embedding_;
  if (name == "output") return *output_;
  const auto dot = name.rfind('.');
  if (name.rfind("blocks.", 0) == 0 && dot > 7 && dot != std::string::npos) {
    const int index = std::stoi(name.substr(7, dot - 7));
    if (index >= 0 && index < spec_.blocks) {
      Block& b = blocks_[static_cast<std::size_t>(index)];
      const std::string role = name.substr(dot + 1);
      for (auto& [key, layer] : std::initializer_list<std::pair<const char*, LinearLayer*>>{
               {"q", &b.q}, {"k", &b.k}, {"v", &b.v}, {"o", &b.o}, {"gate", &b.gate}, {"up", &b.up}, {"down", &b.down}})
        if (role == key) return *layer;
    }
  }
  throw std::invalid_argument("The decoder has no matrix '" + name + "'.");
}

void Decoder::set_groups(const std::string& name, int out, int in, const GroupSource& source) {
  LinearLayer& layer = linear(name);
  layer.w = make_groups(arena_, out, in, source);
  layer.present = true;
}

void Decoder::add_width(const std::string& name, int bits, const std::uint16_t* scales16, const std::uint8_t* packed_zeros, std::size_t packed_zeros_row) {
  wb::add_width(arena_, linear(name).w, bits, scales16, packed_zeros, packed_zeros_row);
}

const Matrix& Decoder::matrix(const std::string& name) { return linear(name).w; }

void Decoder::set_f32(const std::string& name, int out, int in, const float* rows) {
  LinearLayer& layer = linear(name);
  layer.w = make_f32(arena_, out, in, rows);
  layer.present = true;
}

void Decoder::set_bf16(const std::string& name, int out, int in, const std::uint16_t* rows) {
  LinearLayer& layer = linear(name);
  layer.w = make_bf16(arena_, out, in, rows);
  layer.present = true;
}

void Decoder::set_vector(const std::string& name, const float* values, std::size_t n) {
  if (finished_) throw std::logic_error("This decoder is complete: nothing can be added.");
  vectors_[name].assign(values, values + n);
}

int Decoder::add_rope(std::vector<float> frequencies, float factor) {
  if (finished_) throw std::logic_error("This decoder is complete: nothing can be added.");
  if (frequencies.size() * 2 != static_cast<std::size_t>(spec_.rotary_dim))
    throw std::invalid_argument("Rotary positions need one frequency per pair of channels.");
  ropes_.emplace_back(std::move(frequencies), factor);
  return static_cast<int>(ropes_.size()) - 1;
}

void Decoder::set_attention(int block, int rope, int window) {
  if (finished_) throw std::logic_error("This decoder is complete: nothing can be added.");
  if (block < 0 || block >= spec_.blocks || rope >= static_cast<int>(ropes_.size()) || window < 0)
    throw std::invalid_argument("No such block, rotary table or window.");
  blocks_[static_cast<std::size_t>(block)].rope = rope;
  blocks_[static_cast<std::size_t>(block)].window = window;
}

void Decoder::add_transform(const std::string& name, Transform transform) {
  LinearLayer& layer = linear(name);
  const auto in = static_cast<std::size_t>(layer.w.in);
  const std::size_t n = transform.kind == TransformKind::order ? transform.order.size() : transform.values.size();
  if (!layer.present || n != (transform.kind == TransformKind::rotation ? in * in : in))
    throw std::invalid_argument("A transform of '" + name + "' does not fit its inputs.");
  for (const auto i : transform.order)
    if (i < 0 || i >= static_cast<std::int64_t>(in)) throw std::invalid_argument("An order of '" + name + "' names an input that is not there.");
  layer.transforms.push_back(std::move(transform));
}

void Decoder::add_decider(Decider decider) {
  if (finished_) throw std::logic_error("This decoder is complete: nothing can be added.");
  if (decider.block < 0 || decider.block >= spec_.blocks) throw std::invalid_argument("A decider reads a block that is not there.");
  if (decider.scope == ScopeKind::every && decider.every < 1) throw std::invalid_argument("A decider decides every 1 or more positions.");
  decider.first = slot_width_;
  slot_width_ += decider.program->size();
  if (decider.scope != ScopeKind::reply) decider_bytes_ += decider.bytes / (decider.scope == ScopeKind::every ? decider.every : 1);
  blocks_[static_cast<std::size_t>(decider.block)].deciders[static_cast<std::size_t>(decider.tap)].push_back(static_cast<int>(deciders_.size()));
  deciders_.push_back(std::move(decider));
}

void Decoder::add_consumer(int slot, const std::string& kind, const std::string& target, std::vector<int> widths, std::vector<int> levels) {
  if (finished_) throw std::logic_error("This decoder is complete: nothing can be added.");
  std::sort(widths.begin(), widths.end());  // a width named twice must not be added twice
  widths.erase(std::unique(widths.begin(), widths.end()), widths.end());
  const Decider& decider = deciders_.at(static_cast<std::size_t>(slot));
  const int size = decider.program->size();
  const auto dot = target.find('.', 7);
  const int index = target.rfind("blocks.", 0) == 0 ? std::stoi(target.substr(7, dot == std::string::npos ? dot : dot - 7)) : -1;
  if (index < 0 || index >= spec_.blocks) throw std::invalid_argument("A consumer's target '" + target + "' is not there.");
  Block& b = blocks_[static_cast<std::size_t>(index)];
  const std::string unit = dot == std::string::npos ? "" : target.substr(dot + 1);
  const auto claim = [&](int& place, int expected) {
    if (place >= 0) throw std::invalid_argument("Two consumers of kind " + kind + " act on " + target + ": the engine takes one.");
    if (size != expected)
      throw std::invalid_argument("The slot of " + kind + " on " + target + " has " + std::to_string(size) + " values where " + std::to_string(expected) + " are needed.");
    place = decider.first;
  };
  if (kind == "heads") claim(b.heads_slot, spec_.heads);
  else if (kind == "neurons") claim(b.neurons_slot, spec_.neurons);
  else if (kind == "path") claim(b.path_slot, 1);
  else if (kind == "width" || kind == "input_threshold") {
    const char* const units[] = {"qkv", "o", "gate_up", "down"};
    const auto at = std::find(std::begin(units), std::end(units), unit);
    if (at == std::end(units)) throw std::invalid_argument("A " + kind + " consumer targets a unit, got '" + target + "'.");
    if (kind == "input_threshold") claim(b.threshold_slot[static_cast<std::size_t>(at - std::begin(units))], 1);
    else
      for (const auto& [role, of] : kUnitOf) {
        if (unit != of) continue;
        LinearLayer& layer = linear("blocks." + std::to_string(index) + "." + role);
        if (!layer.present) continue;
        for (const int w : widths) {
          const bool in_range = w >= 1 && w <= layer.w.bits, own = static_cast<bool>(layer.w.widths[static_cast<std::size_t>(layer.w.bits)]);
          const bool fits = layer.w.kind == Kind::planes ? in_range && (!own || layer.w.widths[static_cast<std::size_t>(w)]) : w == layer.w.bits;
          if (!fits) throw std::invalid_argument(target + " has no " + std::to_string(w) + "-bit form.");
        }
        for (const int w : levels)
          if (!std::binary_search(widths.begin(), widths.end(), w)) throw std::invalid_argument("A level of " + target + " is none of its widths.");
        claim(layer.width_slot, 1);
        layer.widths = widths;
        layer.levels = levels;
      }
  } else {
    throw std::invalid_argument("Unknown consumer kind '" + kind + "'.");
  }
  has_consumers_ = true;
}

const float* Decoder::vector(const std::string& name, std::size_t n, bool required) const {
  const auto found = vectors_.find(name);
  if (found == vectors_.end()) {
    if (required) throw std::invalid_argument("The decoder was given no '" + name + "'.");
    return nullptr;
  }
  if (found->second.size() != n)
    throw std::invalid_argument("'" + name + "' has " + std::to_string(found->second.size()) + " values where " + std::to_string(n) + " belong.");
  return found->second.data();
}

int Decoder::format_of(const LinearLayer& layer) {
  Format format{};
  format.in = layer.w.in;
  format.transforms = layer.transforms.empty() ? nullptr : &layer.transforms;
  switch (layer.w.kind) {
    case Kind::f32: format.mode = Mode::plain; break;
    case Kind::bf16: format.mode = spec_.exact ? Mode::plain : Mode::bf16; break;
    default:
      format.mode = spec_.exact ? Mode::f32 : Mode::int8;
      format.at = layer.w.grouping;
  }
  for (std::size_t i = 0; i < formats_.size(); ++i) {
    const Format& f = formats_[i];
    if (f.mode == format.mode && f.in == format.in && f.at == format.at && f.transforms == format.transforms) return static_cast<int>(i);
  }
  format.place();
  formats_.push_back(format);
  return static_cast<int>(formats_.size()) - 1;
}

void Decoder::finish() {
  const auto& s = spec_;
  const int queries = s.heads * s.head_dim, keys = s.kv_heads * s.head_dim;
  const auto need = [](const LinearLayer& layer, const std::string& name, int out, int in) {
    if (!layer.present) throw std::invalid_argument("The decoder was given no '" + name + "'.");
    if (layer.w.out != out || layer.w.in != in)
      throw std::invalid_argument("'" + name + "' is " + std::to_string(layer.w.out) + " x " + std::to_string(layer.w.in) + " where " + std::to_string(out) + " x " + std::to_string(in) + " belongs.");
  };
  const auto norm_of = [&](const std::string& name, int n, bool required) {
    Norm norm;
    norm.weight = vector(name, static_cast<std::size_t>(n), required);
    norm.bias = vector(name + ".bias", static_cast<std::size_t>(n), false);
    return norm;
  };
  const auto bias_of = [&](const std::string& name, LinearLayer& layer) {
    const float* bias = vector(name + ".bias", static_cast<std::size_t>(layer.w.out), false);
    if (bias == nullptr) return;
    auto* to = arena_.take<float>(static_cast<std::size_t>(layer.w.tiles) * kRows);
    std::copy(bias, bias + layer.w.out, to);
    layer.w.bias = to;
  };
  const auto complete = [&](LinearLayer& layer) {
    layer.format = format_of(layer);
    for (int bits = 0; bits <= 8; ++bits) layer.bytes[static_cast<std::size_t>(bits)] = static_cast<double>(layer.w.read_bytes(bits));
  };
  need(*embedding_, "embedding", s.vocab, s.hidden);
  complete(*embedding_);
  if (output_->present) {
    need(*output_, "output", s.vocab, s.hidden);
    complete(*output_);
  }
  for (int i = 0; i < s.blocks; ++i) {
    Block& b = blocks_[static_cast<std::size_t>(i)];
    const std::string at = "blocks." + std::to_string(i) + ".";
    const std::tuple<const char*, LinearLayer*, int, int> layers[] = {
        {"q", &b.q, queries, s.hidden}, {"k", &b.k, keys, s.hidden}, {"v", &b.v, keys, s.hidden}, {"o", &b.o, s.hidden, queries},
        {"gate", &b.gate, s.neurons, s.hidden}, {"up", &b.up, s.neurons, s.hidden}, {"down", &b.down, s.hidden, s.neurons}};
    for (const auto& [role, layer, out, in] : layers) {
      if (std::string(role) == "gate" && !s.gated) continue;
      need(*layer, at + role, out, in);
      bias_of(at + role, *layer);
      complete(*layer);
      linear_bytes_ += layer->bytes[0];
    }
    b.input = norm_of(at + "input", s.hidden, !s.layer_norm);
    b.pre_mlp = norm_of(at + "pre_mlp", s.hidden, !s.layer_norm);
    b.post_attention = norm_of(at + "post_attention", s.hidden, false);
    b.post_mlp = norm_of(at + "post_mlp", s.hidden, false);
    b.q_norm = norm_of(at + "q_norm", s.head_dim, false);
    b.k_norm = norm_of(at + "k_norm", s.head_dim, false);
  }
  norm_of("final", s.hidden, false);
  if (const auto found = vectors_.find("positions");
      found != vectors_.end() && found->second.size() < static_cast<std::size_t>(s.context + s.position_offset) * static_cast<std::size_t>(s.hidden))
    throw std::invalid_argument("'positions' has no row for every position of the context.");
  finished_ = true;
  pass_ = std::make_unique<Pass>(*this);
}

double Decoder::output_bytes() const { return (output_->present ? *output_ : *embedding_).bytes[0]; }

// Running ----------------------------------------------------------------------------------------------------------

Decoder::Pass::Pass(Decoder& decoder)
    : d(decoder), s(decoder.spec_), k(*decoder.k_), nt(decoder.pool_->threads()) {
  hidden = padded(s.hidden);
  queries = padded(s.heads * s.head_dim);
  keys = padded(s.kv_heads * s.head_dim);
  neurons = padded(s.neurons);
  vocab = padded(s.vocab);
  const auto buffer = [](Array<float>& array, std::vector<float*>& pointers, int rows_of, int width) {
    array = Array<float>(static_cast<std::size_t>(rows_of) * static_cast<std::size_t>(width));
    for (int r = 0; r < rows_of; ++r) pointers.push_back(array.data() + static_cast<std::size_t>(r) * width);
  };
  std::vector<float*> unused;
  buffer(x, to_x, kMaxRows, hidden);
  buffer(normed, unused, kMaxRows, hidden);
  buffer(q, to_q, kMaxRows, queries);
  buffer(kk, to_k, kMaxRows, keys);
  buffer(v, to_v, kMaxRows, keys);
  buffer(attended, to_attended, kMaxRows, queries);
  buffer(other, to_other, kMaxRows, hidden);
  buffer(gate, to_gate, kMaxRows, neurons);
  buffer(up, to_up, kMaxRows, neurons);
  buffer(logit, to_logit, kLogitRows, vocab);
  for (const Format& f : d.formats_) {
    shared.emplace_back(f.bytes * kMaxRows);
    local.emplace_back(f.bytes * static_cast<std::size_t>(nt));
    shared_rows.emplace_back(kMaxRows);
    local_rows.emplace_back(static_cast<std::size_t>(nt));
  }
  const int widest = std::max({hidden, queries, neurons});
  for (int t = 0; t < nt; ++t) {
    subset_rows.emplace_back(kMaxRows);
    subset_to.emplace_back(kMaxRows);
    subset_index.emplace_back();
    subset_index.back().reserve(kMaxRows);
    scratch.emplace_back(static_cast<std::size_t>(widest) * 3);
    scores.emplace_back();
    queries_of.emplace_back();
  }
  rows.reserve(kMaxRows);
  slots.resize(static_cast<std::size_t>(kMaxRows) * static_cast<std::size_t>(d.slot_width_));
  angles.resize(static_cast<std::size_t>(kMaxRows) * d.ropes_.size() * static_cast<std::size_t>(s.rotary_dim));
  read.resize(kMaxRows);
}

void Decoder::Pass::normalize(const Norm& norm, const float* from, float* to) const {
  if (norm.weight == nullptr && !s.layer_norm) std::copy(from, from + s.hidden, to);
  else if (s.layer_norm) k.layer_norm(from, norm.weight, norm.bias, s.hidden, s.epsilon, to);
  else k.rms_norm(from, norm.weight, s.hidden, s.epsilon, to);
}

// Inputs of a row that are no larger than its threshold are left out.
const float* Decoder::Pass::filtered(const float* from, int n, int place, int row, float* to) const {
  if (place < 0) return from;
  const float limit = slot(place, row);
  for (int i = 0; i < n; ++i) to[i] = std::fabs(from[i]) > limit ? from[i] : 0.0f;
  return to;
}

void Decoder::Pass::convert(const Format& f, const float* from, float* space, std::uint8_t* buffer, Activation& to) const {
  if (f.transforms != nullptr) {
    const int n = f.in;
    for (const Transform& transform : *f.transforms) {
      switch (transform.kind) {
        case TransformKind::scale:
          for (int i = 0; i < n; ++i) space[i] = from[i] * transform.values[static_cast<std::size_t>(i)];
          break;
        case TransformKind::order: {
          float* other_space = from == space ? space + n : space;
          for (int i = 0; i < n; ++i) other_space[i] = from[transform.order[static_cast<std::size_t>(i)]];
          if (other_space != space) std::copy(other_space, other_space + n, space);
          break;
        }
        case TransformKind::rotation: {
          float* other_space = from == space ? space + n : space;
          std::fill(other_space, other_space + n, 0.0f);
          for (int i = 0; i < n; ++i) {
            const float* row = transform.values.data() + static_cast<std::size_t>(i) * n;
            for (int j = 0; j < n; ++j) other_space[j] += from[i] * row[j];
          }
          if (other_space != space) std::copy(other_space, other_space + n, space);
          break;
        }
      }
      from = space;
    }
  }
  to = Activation{};
  switch (f.mode) {
    case Mode::plain: {
      auto* copy = reinterpret_cast<float*>(buffer + f.x);
      std::copy(from, from + f.in, copy);
      to.x = copy;
      return;
    }
    case Mode::bf16: {
      auto* half = reinterpret_cast<std::uint16_t*>(buffer + f.b);
      k.to_bf16(from, f.in, half);
      to.b = half;
      return;
    }
    case Mode::int8:
    case Mode::f32: {
      auto* sum = reinterpret_cast<float*>(buffer + f.sum);
      auto* active = buffer + f.active;
      if (f.mode == Mode::int8) {
        auto* codes = reinterpret_cast<std::int8_t*>(buffer + f.q);
        auto* scale = reinterpret_cast<float*>(buffer + f.scale);
        k.quantize(f.at, from, codes, scale, sum, active);
        to.q = codes;
        to.scale = scale;
      } else {
        auto* copy = reinterpret_cast<float*>(buffer + f.x);
        k.pad(f.at, from, copy, sum, active);
        to.x = copy;
      }
      to.sum = sum;
      to.active = active;
    }
  }
}

double Decoder::Pass::read_share(const LinearLayer& layer, int row) const {
  const Format& f = d.formats_[static_cast<std::size_t>(layer.format)];
  if (f.mode != Mode::int8 && f.mode != Mode::f32) return 1.0;
  const Activation& a = single ? local_rows[static_cast<std::size_t>(layer.format)][0] : shared_rows[static_cast<std::size_t>(layer.format)][static_cast<std::size_t>(row)];
  int active = 0;
  for (int i = 0; i < f.at.n_blocks; ++i) active += a.active[i] != 0;
  return static_cast<double>(active) / f.at.n_blocks;
}

// Add what each row reads of a layer: its width, the blocks of inputs that are not all zero, the tiles not masked.
void Decoder::Pass::count(const LinearLayer& layer, int t, int mask_slot, int per_mask, const std::vector<int>* subset) {
  if (t != 0 || !d.has_consumers_ || !layer.present) return;
  for (const int r : subset != nullptr ? *subset : all_rows) {
    const long bits = layer.width_slot >= 0 ? std::clamp<long>(layer.bits(slot(layer.width_slot, r)), 0, 8) : 0;
    double used = 1;
    if (mask_slot >= 0) {
      int tiles = 0;
      for (int tile = 0; tile < layer.w.tiles; ++tile) {
        bool any = false;
        for (int i = tile * kRows; i < std::min((tile + 1) * kRows, layer.w.out); ++i) any |= slot(mask_slot + i / per_mask, r) != 0.0f;
        tiles += any;
      }
      used = static_cast<double>(tiles) / layer.w.tiles;
    }
    read[static_cast<std::size_t>(r)] += layer.bytes[static_cast<std::size_t>(bits)] * used * read_share(layer, r);
  }
}

// y[row] (+)= W x[row] for all rows or a subset, at the width in force for each; tiles whose mask is all zero are left.
void Decoder::Pass::product(const LinearLayer& layer, const std::vector<int>* subset, float* const* y, bool add, int t,
                            const float* mask, int per_mask) {
  const auto f = static_cast<std::size_t>(layer.format);
  const Matrix& w = layer.w;
  Kernels::Product kernel = nullptr;
  switch (d.formats_[f].mode) {
    case Mode::int8: kernel = k.groups_int8; break;
    case Mode::f32: kernel = k.groups_f32; break;
    case Mode::bf16: kernel = k.dense_bf16; break;
    case Mode::plain: kernel = k.dense_f32; break;
  }
  const auto [first, last] = share(w.tiles, t, nt);
  const auto tiles = [&](int bits, const Activation* a, int n, float* const* to) {
    if (mask == nullptr) {
      kernel(w, bits, a, n, to, add, first, last);
      return;
    }
    const auto used = [&](int tile) {
      for (int r = tile * kRows; r < std::min((tile + 1) * kRows, w.out); ++r)
        if (mask[r / per_mask] != 0.0f) return true;
      return false;
    };
    for (int tile = first; tile < last;) {
      if (!used(tile)) {
        ++tile;
        continue;
      }
      int end = tile + 1;
      while (end < last && used(end)) ++end;
      kernel(w, bits, a, n, to, add, tile, end);
      tile = end;
    }
  };
  const int n_rows = static_cast<int>(rows.size());
  const auto& source = single ? local_rows[f] : shared_rows[f];
  const Activation* a = single ? &source[static_cast<std::size_t>(t)] : source.data();
  if (subset == nullptr && layer.width_slot < 0) {
    tiles(0, a, n_rows, y);
    return;
  }
  auto& sub_rows = subset_rows[static_cast<std::size_t>(t)];
  auto& sub_to = subset_to[static_cast<std::size_t>(t)];
  const std::vector<int>& members = subset != nullptr ? *subset : all_rows;
  const auto run_those = [&](int bits, auto chosen) {
    int n = 0;
    for (const int r : members) {
      if (!chosen(r)) continue;
      sub_rows[static_cast<std::size_t>(n)] = a[r];
      sub_to[static_cast<std::size_t>(n)] = y[r];
      ++n;
    }
    if (n > 0) tiles(bits, sub_rows.data(), n, sub_to.data());
  };
  if (layer.width_slot < 0) {
    run_those(0, [](int) { return true; });
    return;
  }
  for (const int bits : layer.widths) run_those(bits, [&](int r) { return layer.bits(slot(layer.width_slot, r)) == bits; });
  if (t == 0)
    for (const int r : members) {
      const auto bits = static_cast<int>(layer.bits(slot(layer.width_slot, r)));
      if (std::find(layer.widths.begin(), layer.widths.end(), bits) == layer.widths.end()) bad_width.store(bits == 0 ? -1 : bits);
    }
}

void Decoder::Pass::site(const std::string& name, const Array<float>& from, int stride, int width) {
  // Rows of one sequence follow one another; a tap sees each sequence's rows apart.
  std::vector<float> packed;
  for (std::size_t begin = 0; begin < rows.size();) {
    std::size_t end = begin;
    packed.clear();
    while (end < rows.size() && rows[end].sequence == rows[begin].sequence) {
      const float* row = from.data() + end * static_cast<std::size_t>(stride);
      packed.insert(packed.end(), row, row + width);
      ++end;
    }
    call([&] { d.tap_(name, rows[begin].position, packed.data(), static_cast<int>(end - begin), width); });
    begin = end;
  }
}

void Decoder::Pass::begin_slots() {
  const auto width = static_cast<std::size_t>(d.slot_width_);
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const Held& held = rows[r].sequence->held;
    for (std::size_t i = 0; i < d.deciders_.size(); ++i) {
      const Decider& decider = d.deciders_[i];
      const auto first = static_cast<std::size_t>(decider.first), n = static_cast<std::size_t>(decider.program->size());
      float* to = slots.data() + r * width + first;
      if (held.is_fixed[i]) std::copy_n(held.fixed.data() + first, n, to);
      else if (held.replay_rows > 0) std::copy_n(held.replay.data() + static_cast<std::size_t>(rows[r].position) * width + first, n, to);
      else if (held.made[i] && rows[r].position >= rows[r].sequence->prompt_length) std::copy_n(held.values.data() + first, n, to);
      else std::fill_n(to, n, decider.initial);
    }
  }
}

void Decoder::Pass::decide(const Block& b, TapKind tap, int t, Array<float>& source, int width) {
  const auto& here = b.deciders[static_cast<std::size_t>(tap)];
  if (here.empty()) return;
  const std::size_t stride = source.size() / kMaxRows;
  for (const int i : here) {
    const Decider& decider = d.deciders_[static_cast<std::size_t>(i)];
    const auto n = static_cast<std::size_t>(decider.program->size());
    if (decider.scope == ScopeKind::token) {  // nothing is held: rows are shared out
      const auto [first, last] = share(static_cast<int>(rows.size()), t, nt);
      for (auto r = static_cast<std::size_t>(first); r < static_cast<std::size_t>(last); ++r) {
        const Held& held = rows[r].sequence->held;
        if (held.is_fixed[static_cast<std::size_t>(i)] || held.replay_rows > 0) continue;
        decider.program->run(k, source.data() + r * stride, width, rows[r].position,
                             slots.data() + r * static_cast<std::size_t>(d.slot_width_) + decider.first);
      }
    } else if (t == 0) {
      for (std::size_t r = 0; r < rows.size(); ++r) {
        Held& held = rows[r].sequence->held;
        if (held.is_fixed[static_cast<std::size_t>(i)] || held.replay_rows > 0) continue;
        float* values = held.values.data() + decider.first;
        float* to = slots.data() + r * static_cast<std::size_t>(d.slot_width_) + decider.first;
        const int position = rows[r].position;
        const float* row = source.data() + r * stride;
        if (decider.scope == ScopeKind::reply) {
          if (position != rows[r].sequence->prompt_length - 1) continue;
          decider.program->run(k, row, width, position, values);
          held.made[static_cast<std::size_t>(i)] = 1;
          continue;  // in force from the next row on
        }
        if (position % decider.every == 0) {
          decider.program->run(k, row, width, position, values);
          held.made[static_cast<std::size_t>(i)] = 1;
        }
        if (held.made[static_cast<std::size_t>(i)]) std::copy_n(values, n, to);
        else std::fill_n(to, n, decider.initial);
      }
    }
  }
  wait(kDeciders, t);
}

void Decoder::Pass::embed(int t) {
  const Matrix& table = d.embedding_->w;
  const auto positions = d.vectors_.find("positions");
  const auto [first, last] = share(static_cast<int>(rows.size()), t, nt);
  for (int r = first; r < last; ++r) {
    float* to = to_x[static_cast<std::size_t>(r)];
    read_row(table, rows[static_cast<std::size_t>(r)].token, to);
    if (s.embedding_scale != 1.0f)
      for (int i = 0; i < s.hidden; ++i) to[i] *= s.embedding_scale;
    if (positions != d.vectors_.end())
      k.add(to, positions->second.data() + static_cast<std::size_t>(rows[static_cast<std::size_t>(r)].position + s.position_offset) * s.hidden, s.hidden);
    for (std::size_t rope = 0; rope < d.ropes_.size(); ++rope) {
      const auto& [frequencies, factor] = d.ropes_[rope];
      float* angle = angles.data() + (static_cast<std::size_t>(r) * d.ropes_.size() + rope) * static_cast<std::size_t>(s.rotary_dim);
      const std::size_t half = frequencies.size();
      for (std::size_t i = 0; i < half; ++i) {
        const float theta = static_cast<float>(rows[static_cast<std::size_t>(r)].position) * frequencies[i];
        angle[i] = std::cos(theta) * factor;
        angle[half + i] = std::sin(theta) * factor;
      }
    }
  }
}

void Decoder::Pass::add_rows(const Norm& norm, const std::vector<int>& active, int t) {
  const auto [first, last] = share(static_cast<int>(active.size()), t, nt);
  for (int i = first; i < last; ++i) {
    const int r = active[static_cast<std::size_t>(i)];
    float* space = scratch[static_cast<std::size_t>(t)].data();
    normalize(norm, to_other[static_cast<std::size_t>(r)], space);
    k.add(to_x[static_cast<std::size_t>(r)], space, s.hidden);
  }
}

void Decoder::Pass::block(int index, int t) {
  Block& b = d.blocks_[static_cast<std::size_t>(index)];
  const int n = static_cast<int>(rows.size());
  const std::string name = "blocks." + std::to_string(index);
  const bool tapped = static_cast<bool>(d.tap_);
  const bool deciding = b.decides(TapKind::block_input);
  float* space = scratch[static_cast<std::size_t>(t)].data();
  const int widest = static_cast<int>(scratch[static_cast<std::size_t>(t)].size()) / 3;

  if (t == 0 && tapped) site(name, x, hidden, s.hidden);
  decide(b, TapKind::residual, t, x, s.hidden);

  // Prepare the inputs of a unit from `from` rows, each thread its share, or the one row for itself.
  const auto prepare_from = [&](std::initializer_list<const LinearLayer*> layers, Array<float>& from, int stride, const Norm* norm,
                                Array<float>* keep, int width, int threshold_slot) {
    const auto [first, last] = single ? std::pair<int, int>{0, 1} : share(n, t, nt);
    for (int r = first; r < last; ++r) {
      const float* row = from.data() + static_cast<std::size_t>(r) * stride;
      if (norm != nullptr) {
        float* to = keep != nullptr && !single ? keep->data() + static_cast<std::size_t>(r) * stride : space;
        normalize(*norm, row, to);
        row = to;
      }
      row = filtered(row, width, threshold_slot, r, space + widest);
      int done = -1;
      for (const LinearLayer* layer : layers) {
        if (!layer->present || layer->format == done) continue;
        done = layer->format;
        const auto f = static_cast<std::size_t>(done);
        const Format& format = d.formats_[f];
        const std::size_t place = single ? static_cast<std::size_t>(t) : static_cast<std::size_t>(r);
        auto& buffers = single ? local[f] : shared[f];
        auto& into = single ? local_rows[f] : shared_rows[f];
        std::vector<float> room(format.transforms != nullptr ? static_cast<std::size_t>(2 * width) : 0);
        convert(format, row, room.data(), buffers.data() + place * format.bytes, into[place]);
      }
    }
    if (!single) wait(kOther, t);
    else lap(kOther, t);
  };

  // Attention.
  const auto normalize_rows = [&](const Norm& norm) {
    const auto [first, last] = share(n, t, nt);
    for (int r = first; r < last; ++r)
      normalize(norm, to_x[static_cast<std::size_t>(r)], normed.data() + static_cast<std::size_t>(r) * hidden);
    wait(kOther, t);
  };
  if (deciding) {  // the normed rows are read before the inputs are prepared from them
    normalize_rows(b.input);
    decide(b, TapKind::block_input, t, normed, s.hidden);
    prepare_from({&b.q, &b.k, &b.v}, normed, hidden, nullptr, nullptr, s.hidden, b.threshold_slot[0]);
  } else {
    prepare_from({&b.q, &b.k, &b.v}, x, hidden, &b.input, &normed, s.hidden, b.threshold_slot[0]);
  }
  if (t == 0 && tapped)
    for (const char* role : {".q", ".k", ".v"}) site(name + role, normed, hidden, s.hidden);

  const auto skipped = [&](int r, float what) {
    if (b.path_slot < 0) return false;
    const float path = slot(b.path_slot, r);
    return path == what || path == 3.0f;
  };
  auto& chosen = subset_index[static_cast<std::size_t>(t)];
  const bool always_attend = b.decides(TapKind::attention_output) || tapped;  // somebody reads what attention gives
  const bool attends = n > 1 || always_attend || !skipped(0, 1.0f);
  const float* head_mask = single && b.heads_slot >= 0 && !always_attend ? slots.data() + b.heads_slot : nullptr;
  if (attends) product(b.q, nullptr, to_q.data(), false, t, s.head_dim % kRows == 0 ? head_mask : nullptr, s.head_dim);
  product(b.k, nullptr, to_k.data(), false, t);
  product(b.v, nullptr, to_v.data(), false, t);
  if (t == 0 && d.has_consumers_) {
    chosen.clear();
    for (int r = 0; r < n; ++r)
      if (!skipped(r, 1.0f)) chosen.push_back(r);
    count(b.q, t, s.head_dim % kRows == 0 ? b.heads_slot : -1, s.head_dim, &chosen);
    count(b.k, t);
    count(b.v, t);
  }
  wait(kLinears, t);

  // Positions and norms of heads; keys and values into the cache.
  const int half = s.rotary_dim / 2, group = s.heads / s.kv_heads;
  const auto turn = [&](float* head, const Norm& norm, int r) {
    if (norm.weight != nullptr) k.rms_norm(head, norm.weight, s.head_dim, s.epsilon, head);
    if (b.rope < 0) return;
    const float* angle = angles.data() + (static_cast<std::size_t>(r) * d.ropes_.size() + static_cast<std::size_t>(b.rope)) * static_cast<std::size_t>(s.rotary_dim);
    for (int i = 0; i < half; ++i) {
      const float a = head[i], c = head[half + i];
      head[i] = a * angle[i] - c * angle[half + i];
      head[half + i] = c * angle[i] + a * angle[half + i];
    }
  };
  {
    const auto [first, last] = share(n * (s.heads + s.kv_heads), t, nt);
    for (int item = first; item < last; ++item) {
      const int r = item / (s.heads + s.kv_heads), h = item % (s.heads + s.kv_heads);
      if (h < s.heads) {
        if (attends) turn(to_q[static_cast<std::size_t>(r)] + h * s.head_dim, b.q_norm, r);
        continue;
      }
      const int kv = h - s.heads, position = rows[static_cast<std::size_t>(r)].position, dim = s.head_dim;
      float* key = to_k[static_cast<std::size_t>(r)] + kv * dim;
      turn(key, b.k_norm, r);
      const float* value = to_v[static_cast<std::size_t>(r)] + kv * dim;
      Sequence& sequence = *rows[static_cast<std::size_t>(r)].sequence;
      const auto piece = static_cast<std::size_t>(position / kPiece);
      const int within = position % kPiece;
      const std::size_t key_at = (static_cast<std::size_t>(kv) * (kPiece / 16) + within / 16) * dim * 16 + within % 16;
      const std::size_t value_at = (static_cast<std::size_t>(kv) * kPiece + within) * padded(dim);
      void* keys_to = sequence.keys_[static_cast<std::size_t>(index)][piece];
      void* values_to = sequence.values_[static_cast<std::size_t>(index)][piece];
      if (s.exact) {
        for (int i = 0; i < dim; ++i) static_cast<float*>(keys_to)[key_at + static_cast<std::size_t>(i) * 16] = key[i];
        std::copy(value, value + dim, static_cast<float*>(values_to) + value_at);
      } else {
        auto* halves = reinterpret_cast<std::uint16_t*>(space);
        k.to_fp16(key, dim, halves);
        for (int i = 0; i < dim; ++i) static_cast<std::uint16_t*>(keys_to)[key_at + static_cast<std::size_t>(i) * 16] = halves[i];
        k.to_fp16(value, dim, static_cast<std::uint16_t*>(values_to) + value_at);
      }
    }
  }
  wait(kAttention, t);

  if (attends) {
    // Queries of one key/value head and of neighbouring rows of a sequence are taken together. One row's heads are
    // shared out one by one, many rows' by the key/value head, so that each thread has early rows and late ones.
    auto& asked = queries_of[static_cast<std::size_t>(t)];
    const auto ask = [&](int r, int head) {
      if (head_mask != nullptr && head_mask[head] == 0.0f) return;
      const Row& row = rows[static_cast<std::size_t>(r)];
      const int from = b.window > 0 ? std::max(0, row.position - b.window + 1) : 0;
      asked.push_back({to_q[static_cast<std::size_t>(r)] + head * s.head_dim, to_attended[static_cast<std::size_t>(r)] + head * s.head_dim, from, row.position});
    };
    const auto answer = [&](int r, int kv) {
      const Sequence& sequence = *rows[static_cast<std::size_t>(r)].sequence;
      const CacheView cache{sequence.keys_[static_cast<std::size_t>(index)].data(), sequence.values_[static_cast<std::size_t>(index)].data(),
                            s.head_dim, padded(s.head_dim)};
      (s.exact ? k.attend_f32 : k.attend_f16)(cache, kv, asked.data(), static_cast<int>(asked.size()), s.attention_scale,
                                              scores[static_cast<std::size_t>(t)].data());
      asked.clear();
    };
    if (n == 1) {
      const auto [first, last] = share(s.heads, t, nt);
      for (int head = first; head < last;) {
        const int kv = head / group;
        for (; head < std::min(last, (kv + 1) * group); ++head) ask(0, head);
        answer(0, kv);
      }
    } else {
      const int most = std::max(1, kQueries / group);
      const auto [first, last] = share(s.kv_heads * n, t, nt);
      for (int item = first; item < last;) {
        const int kv = item / n, begin = item % n;
        for (int r = begin; r < n && item < last && r - begin < most && rows[static_cast<std::size_t>(r)].sequence == rows[static_cast<std::size_t>(begin)].sequence; ++r, ++item)
          for (int head = kv * group; head < (kv + 1) * group; ++head) ask(r, head);
        answer(begin, kv);
      }
    }
  }
  wait(kAttention, t);
  decide(b, TapKind::attention_output, t, attended, s.heads * s.head_dim);
  if (t == 0 && tapped) {
    site(name + ".o", attended, queries, s.heads * s.head_dim);
  }
  if (tapped) d.pool_->barrier();
  if (b.heads_slot >= 0) {
    const auto [first, last] = share(n * s.heads, t, nt);
    for (int item = first; item < last; ++item) {
      const int r = item / s.heads, h = item % s.heads;
      float* head = to_attended[static_cast<std::size_t>(r)] + h * s.head_dim;
      const float keep = slot(b.heads_slot + h, r);
      for (int i = 0; i < s.head_dim; ++i) head[i] = keep == 0.0f ? 0.0f : head[i] * keep;
    }
    wait(kAttention, t);
  }
  // Where the block's result is normed before it is added, it goes to a buffer first.
  const auto contribute = [&](const LinearLayer& layer, const Norm& norm, float path) {
    const std::vector<int>* subset = nullptr;
    if (b.path_slot >= 0) {
      chosen.clear();
      for (int r = 0; r < n; ++r)
        if (!skipped(r, path)) chosen.push_back(r);
      subset = &chosen;
    }
    const bool post = norm.weight != nullptr;
    product(layer, subset, post ? to_other.data() : to_x.data(), !post, t);
    count(layer, t, -1, 1, subset);
    wait(kLinears, t);
    if (post) {
      add_rows(norm, subset != nullptr ? chosen : all_rows, t);
      wait(kOther, t);
    }
  };
  const bool runs_o = n > 1 || !skipped(0, 1.0f);
  if (runs_o) {
    prepare_from({&b.o}, attended, queries, nullptr, nullptr, s.heads * s.head_dim, b.threshold_slot[1]);
    contribute(b.o, b.post_attention, 1.0f);
  }

  // MLP.
  const bool always_mlp = b.decides(TapKind::mlp_input) || b.decides(TapKind::mlp_inner) || tapped;
  const bool runs_mlp = n > 1 || always_mlp || !skipped(0, 2.0f);
  const float* neuron_mask = single && b.neurons_slot >= 0 ? slots.data() + b.neurons_slot : nullptr;
  if (runs_mlp) {
    if (b.decides(TapKind::mlp_input)) {
      normalize_rows(b.pre_mlp);
      decide(b, TapKind::mlp_input, t, normed, s.hidden);
      prepare_from({&b.gate, &b.up}, normed, hidden, nullptr, nullptr, s.hidden, b.threshold_slot[2]);
    } else {
      prepare_from({&b.gate, &b.up}, x, hidden, &b.pre_mlp, &normed, s.hidden, b.threshold_slot[2]);
    }
    if (t == 0 && tapped) {
      if (s.gated) site(name + ".gate", normed, hidden, s.hidden);
      site(name + ".up", normed, hidden, s.hidden);
    }
    if (s.gated) product(b.gate, nullptr, to_gate.data(), false, t, neuron_mask);
    product(b.up, nullptr, to_up.data(), false, t, neuron_mask);
    if (t == 0 && d.has_consumers_) {
      chosen.clear();
      for (int r = 0; r < n; ++r)
        if (!skipped(r, 2.0f)) chosen.push_back(r);
      count(b.gate, t, b.neurons_slot, 1, &chosen);
      count(b.up, t, b.neurons_slot, 1, &chosen);
    }
    // Every thread finishes the neurons that it has just computed.
    const auto [first, last] = share(b.up.w.tiles, t, nt);
    const int begin = first * kRows, width = std::min(last * kRows, s.neurons) - begin;
    for (int r = 0; r < n && width > 0; ++r) {
      float* up_row = to_up[static_cast<std::size_t>(r)] + begin;
      float* to = up_row;
      if (s.gated) {
        to = to_gate[static_cast<std::size_t>(r)] + begin;
        k.apply_gated(s.function, to, up_row, width);
      } else {
        k.apply(s.function, up_row, width);
      }
      if (b.neurons_slot >= 0)
        for (int i = 0; i < width; ++i) {
          const float keep = slot(b.neurons_slot + begin + i, r);
          to[i] = keep == 0.0f ? 0.0f : to[i] * keep;
        }
    }
    wait(kLinears, t);
    Array<float>& inner = s.gated ? gate : up;
    decide(b, TapKind::mlp_inner, t, inner, s.neurons);
    if (t == 0 && tapped) site(name + ".down", inner, neurons, s.neurons);
    if (n > 1 || !skipped(0, 2.0f)) {
      prepare_from({&b.down}, inner, neurons, nullptr, nullptr, s.neurons, b.threshold_slot[3]);
      contribute(b.down, b.post_mlp, 2.0f);
    }
  }
}

void Decoder::Pass::logits(int t) {
  const LinearLayer& layer = d.output_->present ? *d.output_ : *d.embedding_;
  const auto f = static_cast<std::size_t>(layer.format);
  const Format& format = d.formats_[f];
  Norm final_norm;
  if (const auto found = d.vectors_.find("final"); found != d.vectors_.end()) final_norm.weight = found->second.data();
  if (const auto found = d.vectors_.find("final.bias"); found != d.vectors_.end()) final_norm.bias = found->second.data();
  const bool normed_at_end = final_norm.weight != nullptr;
  float* space = scratch[static_cast<std::size_t>(t)].data();
  auto& sub_rows = subset_rows[static_cast<std::size_t>(t)];
  for (std::size_t begin = 0; begin < wanted.size(); begin += kLogitRows) {
    const int n = static_cast<int>(std::min<std::size_t>(kLogitRows, wanted.size() - begin));
    // Few rows and little work each: every thread prepares all for itself only where there is one.
    const auto [first, last] = n == 1 ? std::pair<int, int>{0, 1} : share(n, t, nt);
    for (int i = first; i < last; ++i) {
      const float* from = to_x[static_cast<std::size_t>(wanted[begin + static_cast<std::size_t>(i)])];
      if (normed_at_end) {
        normalize(final_norm, from, space);
        from = space;
      }
      const std::size_t place = n == 1 ? static_cast<std::size_t>(t) : static_cast<std::size_t>(i);
      convert(format, from, nullptr, (n == 1 ? local[f] : shared[f]).data() + place * format.bytes, (n == 1 ? local_rows[f] : shared_rows[f])[place]);
    }
    if (n > 1) d.pool_->barrier();
    for (int i = 0; i < n; ++i) sub_rows[static_cast<std::size_t>(i)] = n == 1 ? local_rows[f][static_cast<std::size_t>(t)] : shared_rows[f][static_cast<std::size_t>(i)];
    Kernels::Product kernel = k.dense_f32;
    if (format.mode == Mode::int8) kernel = k.groups_int8;
    if (format.mode == Mode::f32) kernel = k.groups_f32;
    if (format.mode == Mode::bf16) kernel = k.dense_bf16;
    const auto [tile, end] = share(layer.w.tiles, t, nt);
    kernel(layer.w, 0, sub_rows.data(), n, to_logit.data(), false, tile, end);
    if (s.softcap > 0)
      for (int i = 0; i < n; ++i)
        for (int c = tile * kRows; c < std::min(end * kRows, s.vocab); ++c) {
          float& value = to_logit[static_cast<std::size_t>(i)][c];
          value = std::tanh(value / s.softcap) * s.softcap;
        }
    wait(kOutput, t);
    if (t == 0 && *visit)
      call([&] {
        for (int i = 0; i < n; ++i) (*visit)(wanted[begin + static_cast<std::size_t>(i)], to_logit[static_cast<std::size_t>(i)]);
      });
    if (begin + kLogitRows < wanted.size()) d.pool_->barrier();
  }
}

void Decoder::Pass::run(int t) {
  if (t == 0) last = Clock::now();
  embed(t);
  wait(kOther, t);
  for (int i = 0; i < s.blocks; ++i) {
    block(i, t);
  }
  if (!wanted.empty()) logits(t);
}

void Decoder::run(const std::vector<Feed>& feeds, Logits logits, const Visit& visit) {
  if (!finished_) throw std::logic_error("This decoder is not complete.");
  Pass& pass = *pass_;
  const auto started = Clock::now();
  pass.rows.clear();
  pass.wanted.clear();
  pass.all_rows.clear();
  int highest = 0;
  for (const Feed& feed : feeds) {
    Sequence& sequence = *feed.sequence;
    if (sequence.owner_ != this) throw std::invalid_argument("A sequence belongs to the engine that started it.");
    for (const Feed* other = feeds.data(); other != &feed; ++other)
      if (other->sequence == &sequence) throw std::invalid_argument("A sequence can be in a pass only once.");
    const int begin = sequence.position();
    if (feed.count < 1) throw std::invalid_argument("No tokens were given.");
    if (begin + feed.count > spec_.context) throw std::length_error("The context is full.");
    if (sequence.held.replay_rows > 0 && begin + feed.count > sequence.held.replay_rows)
      throw std::out_of_range("The recorded decisions end at position " + std::to_string(sequence.held.replay_rows) + ".");
    for (int i = 0; i < feed.count; ++i) {
      if (feed.tokens[i] < 0 || feed.tokens[i] >= spec_.vocab)
        throw std::invalid_argument("Token " + std::to_string(feed.tokens[i]) + " is not in the vocabulary of " + std::to_string(spec_.vocab) + ".");
      pass.rows.push_back({&sequence, begin + i, feed.tokens[i]});
    }
    sequence.grow(begin + feed.count);
    highest = std::max(highest, begin + feed.count);
    const int n = static_cast<int>(pass.rows.size());
    if (logits == Logits::last) pass.wanted.push_back(n - 1);
    if (logits == Logits::all)
      for (int i = 0; i < feed.count; ++i) pass.wanted.push_back(n - feed.count + i);
  }
  if (pass.rows.empty() || pass.rows.size() > static_cast<std::size_t>(kMaxRows))
    throw std::invalid_argument("A pass takes 1 to " + std::to_string(kMaxRows) + " rows.");
  const int n = static_cast<int>(pass.rows.size());
  for (int r = 0; r < n; ++r) pass.all_rows.push_back(r);
  pass.single = n == 1 && !tap_;
  for (auto& s : pass.scores) s.resize(kQueries * (round_up(static_cast<std::size_t>(highest) + 16, 16) + static_cast<std::size_t>(padded(spec_.head_dim))));
  std::fill(pass.read.begin(), pass.read.begin() + n, has_consumers_ ? decider_bytes_ : linear_bytes_);
  pass.parts = {};
  laps_ = 0;
  pass.bad_width.store(0);
  pass.visit = &visit;
  pass.begin_slots();
  const std::function<void(int)> work = [&pass](int t) { pass.run(t); };
  pool_->run(work);
  if (pass.thrown) std::rethrow_exception(std::exchange(pass.thrown, nullptr));
  if (const int bits = pass.bad_width.load(); bits != 0)
    throw std::domain_error("A slot asks for " + std::to_string(std::max(bits, 0)) + " bits, which its unit does not offer.");

  const double seconds = std::chrono::duration<double>(Clock::now() - started).count();
  double cache = 0, most = 0;
  const double item = spec_.exact ? 4 : 2;
  for (const Feed& feed : feeds) {
    for (const Block& b : blocks_) {
      const int length = feed.sequence->position() + feed.count;
      cache += 2 * item * spec_.kv_heads * spec_.head_dim * (b.window > 0 ? std::min(b.window, length) : length);
    }
  }
  for (int r = 0; r < n; ++r) most = std::max(most, pass.read[static_cast<std::size_t>(r)]);
  const double touched = most + cache + (pass.wanted.empty() ? 0.0 : output_bytes());
  int r = 0;
  for (const Feed& feed : feeds)
    for (int i = 0; i < feed.count; ++i, ++r) {
      RowTrace row;
      row.position = pass.rows[static_cast<std::size_t>(r)].position;
      row.token = feed.tokens[i];
      row.seconds = seconds / n;
      row.read_bytes = pass.read[static_cast<std::size_t>(r)];
      for (std::size_t p = 0; p < kParts; ++p) row.parts[p] = pass.parts[p] / n;
      row.touched_bytes = touched / n;
      const float* values = pass.slots.data() + static_cast<std::size_t>(r) * static_cast<std::size_t>(slot_width_);
      row.decisions.assign(values, values + slot_width_);
      feed.sequence->trace.push_back(std::move(row));
      feed.sequence->tokens.push_back(feed.tokens[i]);
    }
}

}  // namespace wb
