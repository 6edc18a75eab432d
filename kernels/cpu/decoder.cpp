#include <algorithm>
#include <stdexcept>

#include "decoder_parts.hpp"

namespace wb {

// Sequence ---------------------------------------------------------------------------------------------------------

Sequence::Sequence(Decoder& decoder) : owner_(&decoder) {
  if (!decoder.finished_) throw std::logic_error("This decoder is not complete.");
  const auto& s = decoder.spec();
  const std::size_t item = s.exact ? 4 : 2;
  key_bytes_ = item * static_cast<std::size_t>(s.kv_heads) * kPiece * static_cast<std::size_t>(s.head_dim);
  value_bytes_ = item * static_cast<std::size_t>(s.kv_heads) * kPiece * static_cast<std::size_t>(padded(s.head_dim));
  keys_.resize(static_cast<std::size_t>(s.blocks));
  values_.resize(static_cast<std::size_t>(s.blocks));
  held.values.assign(static_cast<std::size_t>(decoder.n_values()), 0.0f);
  held.fixed.assign(static_cast<std::size_t>(decoder.n_values()), 0.0f);
  held.masks.resize(static_cast<std::size_t>(decoder.n_masks()));
  held.fixed_masks.resize(static_cast<std::size_t>(decoder.n_masks()));
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

void Decoder::set_tables(const std::string& name, int out, int in, int bits, const std::uint8_t* packed, std::size_t packed_row) {
  LinearLayer& layer = linear(name);
  layer.w = make_tables(arena_, out, in, bits, packed, packed_row);
  layer.present = true;
}

void Decoder::add_table(const std::string& name, int bits, const std::uint16_t* table) { wb::add_table(arena_, linear(name).w, bits, table); }

const Matrix& Decoder::matrix(const std::string& name) { return linear(name).w; }

void Decoder::set_integer(const std::string& name, int out, const IntegerInput& input, const IntegerSource& source) {
  LinearLayer& layer = linear(name);
  if (&layer == embedding_.get() || &layer == output_.get()) throw std::invalid_argument("The embedding and the output layer take no integer codes.");
  layer.w = make_integer(arena_, out, input, source);
  layer.present = true;
}

void Decoder::set_columns(const std::vector<std::string>& names, int in, int group, const std::vector<ColumnSource>& sources) {
  if (names.empty() || names.size() != sources.size()) throw std::invalid_argument("Columns need a source for every linear.");
  const bool paired = names.size() == 2 && names[0].ends_with(".gate") && sources[0].out == sources[1].out;
  const auto columns = std::make_shared<const Columns>(make_columns(arena_, in, group, sources, spec_.threads, paired));
  for (std::size_t i = 0; i < names.size(); ++i) {
    LinearLayer& layer = linear(names[i]);
    layer.w.kind = Kind::columns;
    layer.w.out = sources[i].out;
    layer.w.in = in;
    layer.w.tiles = (sources[i].out + kRows - 1) / kRows;
    layer.w.bits = columns->nibbles ? 4 : 16;
    layer.w.grouping = columns->at;
    layer.columns = columns;
    layer.place = i;
    layer.present = true;
  }
}

void Decoder::set_f32(const std::string& name, int out, int in, const float* rows, bool by_row) {
  LinearLayer& layer = linear(name);
  layer.w = make_f32(arena_, out, in, rows, by_row);
  layer.present = true;
}

void Decoder::set_bf16(const std::string& name, int out, int in, const std::uint16_t* rows, bool by_row) {
  LinearLayer& layer = linear(name);
  layer.w = make_bf16(arena_, out, in, rows, by_row);
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
  decider.place = decider.program->is_mask() ? n_masks_++ : n_values_++;
  decider.bytes /= decider.scope == ScopeKind::every ? decider.every : 1;
  if (decider.scope == ScopeKind::reply) decider.bytes = 0;  // once, beside a prompt
  if (!decides_early(decider))
    blocks_[static_cast<std::size_t>(decider.block)].deciders[static_cast<std::size_t>(decider.tap)].push_back(static_cast<int>(deciders_.size()));
  deciders_.push_back(std::move(decider));
}

void Decoder::set_thresholds(int slot, std::vector<float> thresholds) {
  deciders_.at(static_cast<std::size_t>(slot)).program->set_thresholds(std::move(thresholds));
}

void Decoder::add_consumer(int slot, const std::string& kind, const std::string& target, std::vector<int> widths, std::vector<int> levels, int offset,
                           std::vector<float> factors) {
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
    if (decider.program->is_mask()) throw std::invalid_argument("The slot of " + kind + " on " + target + " is a mask where a number is needed.");
    place = decider.place;
  };
  const auto claim_part = [&](MaskPart& part, int needed) {
    if (part) throw std::invalid_argument("Two consumers of kind " + kind + " act on " + target + ": the engine takes one.");
    if (!decider.program->is_mask() || offset < 0 || offset + needed > size)
      throw std::invalid_argument("The slot of " + kind + " on " + target + " is no mask of " + std::to_string(needed) + " entries from " + std::to_string(offset) + " on.");
    part = {decider.place, offset, needed};
  };
  if (kind == "heads") claim_part(b.heads, spec_.heads);
  else if (kind == "neurons") claim_part(b.neurons, spec_.neurons);
  else if (kind == "path") claim(b.path_slot, 1);
  else if (kind == "width" || kind == "input_threshold") {
    const char* const units[] = {"qkv", "o", "gate_up", "down"};
    const auto at = std::find(std::begin(units), std::end(units), unit);
    if (at == std::end(units)) throw std::invalid_argument("A " + kind + " consumer targets a unit, got '" + target + "'.");
    if (kind == "input_threshold") {
      const auto place = static_cast<std::size_t>(at - std::begin(units));
      const int inputs[] = {spec_.hidden, spec_.heads * spec_.head_dim, spec_.hidden, spec_.neurons};
      claim(b.threshold_slot[place], 1);
      if (!factors.empty() && factors.size() != static_cast<std::size_t>(inputs[place]))
        throw std::invalid_argument(target + " has " + std::to_string(inputs[place]) + " inputs, " + std::to_string(factors.size()) + " factors were given.");
      b.factors[place] = std::move(factors);
    } else
      for (const auto& [role, of] : kUnitOf) {
        if (unit != of) continue;
        LinearLayer& layer = linear("blocks." + std::to_string(index) + "." + role);
        if (!layer.present) continue;
        for (const int w : widths) {
          const bool in_range = w >= 1 && w <= layer.w.bits, own = static_cast<bool>(layer.w.widths[static_cast<std::size_t>(layer.w.bits)]);
          const bool fits = layer.w.kind == Kind::planes   ? in_range && (!own || layer.w.widths[static_cast<std::size_t>(w)])
                            : layer.w.kind == Kind::tables ? in_range && layer.w.tables[static_cast<std::size_t>(w)] != nullptr
                                                           : w == layer.w.bits;
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
    case Kind::integer:
      format.mode = Mode::integer;
      format.integer = layer.w.input.get();
      break;
    case Kind::bf16: format.mode = spec_.exact ? Mode::plain : Mode::bf16; break;
    case Kind::columns:
      format.mode = spec_.exact || layer.w.bits == 16 ? Mode::columns_f32 : Mode::columns_int8;
      format.at = layer.w.grouping;
      break;
    case Kind::tables:
      format.mode = Mode::f32;
      format.at = layer.w.grouping;
      break;
    default:
      format.mode = spec_.exact ? Mode::f32 : Mode::int8;
      format.at = layer.w.grouping;
  }
  for (std::size_t i = 0; i < formats_.size(); ++i) {
    const Format& f = formats_[i];
    const bool same = f.integer == format.integer || (f.integer != nullptr && format.integer != nullptr && *f.integer == *format.integer);
    if (same && f.mode == format.mode && f.in == format.in && f.at == format.at && f.transforms == format.transforms) return static_cast<int>(i);
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
    if (layer.w.kind == Kind::tables && layer.w.tables[static_cast<std::size_t>(layer.w.bits)] == nullptr)
      throw std::invalid_argument("A matrix of tables needs one for the width of its codes.");
    layer.format = format_of(layer);
    for (int bits = 0; bits <= 8; ++bits) layer.bytes[static_cast<std::size_t>(bits)] = static_cast<double>(layer.w.read_bytes(bits));
    if (layer.columns != nullptr && layer.place == 0)
      layer.bytes[0] = layer.columns->group_bytes() * layer.columns->at.n_groups + layer.columns->channel_bytes() * layer.columns->in;
  };
  need(*embedding_, "embedding", s.vocab, s.hidden);
  if (embedding_->w.by_row || output_->w.by_row) throw std::invalid_argument("The embedding and the output layer do not lie by row.");
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
      linear_weights_ += static_cast<double>(out) * in;
    }
    if (b.q.w.by_row || b.k.w.by_row || b.v.w.by_row || b.o.w.by_row || b.down.w.by_row || (s.gated && b.gate.w.by_row != b.up.w.by_row) ||
        (b.up.w.by_row && b.up.width_slot >= 0))
      throw std::invalid_argument("Only gate and up lie by row, both of them, and at one width.");
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
  std::fill(pass.integers.begin(), pass.integers.begin() + n, IntegerCounts{});
  std::fill(pass.read.begin(), pass.read.begin() + n, has_consumers_ ? 0.0 : linear_bytes_);
  for (std::size_t i = 0; i < deciders_.size() && has_consumers_; ++i)
    if (deciders_[i].bytes > 0)
      for (std::size_t r = 0; r < pass.rows.size(); ++r) pass.read[r] += pass.rows[r].sequence->held.is_fixed[i] ? 0.0 : deciders_[i].bytes;
  pass.read_any = has_consumers_ ? 0.0 : linear_bytes_;
  for (std::size_t i = 0; i < deciders_.size() && has_consumers_; ++i)
    if (std::any_of(pass.rows.begin(), pass.rows.end(), [i](const auto& row) { return !row.sequence->held.is_fixed[i]; })) pass.read_any += deciders_[i].bytes;
  std::fill(pass.used.begin(), pass.used.begin() + n, has_consumers_ ? 0.0 : linear_weights_);
  pass.used_any = has_consumers_ ? 0.0 : linear_weights_;
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
  double cache = 0;
  const double item = spec_.exact ? 4 : 2;
  for (const Feed& feed : feeds) {
    for (const Block& b : blocks_) {
      const int length = feed.sequence->position() + feed.count;
      cache += 2 * item * spec_.kv_heads * spec_.head_dim * (b.window > 0 ? std::min(b.window, length) : length);
    }
  }
  const double touched = (n > 1 ? pass.read_any : pass.read[0]) + cache + (pass.wanted.empty() ? 0.0 : output_bytes());
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
      row.integers = pass.integers[static_cast<std::size_t>(r)];
      row.kept_weights = pass.used[static_cast<std::size_t>(r)] / linear_weights_;
      row.pass_weights = n > 1 ? pass.used_any / linear_weights_ : row.kept_weights;
      const float* values = pass.slots.data() + static_cast<std::size_t>(r) * static_cast<std::size_t>(n_values_);
      const Mask* masks = pass.masks.data() + static_cast<std::size_t>(r) * static_cast<std::size_t>(n_masks_);
      row.values.assign(values, values + n_values_);
      row.masks.assign(masks, masks + n_masks_);
      feed.sequence->trace.push_back(std::move(row));
      feed.sequence->tokens.push_back(feed.tokens[i]);
    }
}

}  // namespace wb
