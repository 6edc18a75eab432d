// One pass: rows of tokens through all blocks, every thread side by side.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "decoder_parts.hpp"
#include "half.hpp"

namespace wb {

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
    shared_active.emplace_back(kMaxRows);
    local_active.emplace_back(static_cast<std::size_t>(nt));
    local_rows.emplace_back(static_cast<std::size_t>(nt));
  }
  const int widest = std::max({hidden, queries, neurons});
  for (int t = 0; t < nt; ++t) {
    subset_rows.emplace_back(kMaxRows);
    column_rows.emplace_back().reserve(kMaxRows);
    column_to.emplace_back().reserve(3 * kMaxRows);
    column_of_row.emplace_back().reserve(kMaxRows);
    subset_to.emplace_back(kMaxRows);
    subset_index.emplace_back();
    subset_index.back().reserve(kMaxRows);
    scratch.emplace_back(static_cast<std::size_t>(widest) * 3);
    scores.emplace_back();
    queries_of.emplace_back();
  }
  rows.reserve(kMaxRows);
  slots.resize(static_cast<std::size_t>(kMaxRows) * static_cast<std::size_t>(d.n_values_));
  masks.resize(static_cast<std::size_t>(kMaxRows) * static_cast<std::size_t>(d.n_masks_));
  for (const Decider& decider : d.deciders_) {
    initial.emplace_back();
    if (!decider.program->is_mask()) continue;
    initial.back() = std::make_shared<const std::vector<std::uint8_t>>(static_cast<std::size_t>(decider.program->size()), decider.initial != 0.0f);
    if (const Predictor* predictor = decider.program->predictor(); predictor != nullptr) predictor->reserve(space_of_predictor);
  }
  predicted.resize(Predictor::kTogether), to_predicted.resize(Predictor::kTogether);
  deciding.resize(static_cast<std::size_t>(nt));
  united.resize(static_cast<std::size_t>(nt)), listed.resize(static_cast<std::size_t>(nt));
  angles.resize(static_cast<std::size_t>(kMaxRows) * d.ropes_.size() * static_cast<std::size_t>(s.rotary_dim));
  read.resize(kMaxRows), used.resize(kMaxRows), kept_inputs.resize(kMaxRows);
  passed.resize(static_cast<std::size_t>(nt));
  integers.resize(kMaxRows);
}

void Decoder::Pass::normalize(const Norm& norm, const float* from, float* to) const {
  if (norm.weight == nullptr && !s.layer_norm) std::copy(from, from + s.hidden, to);
  else if (s.layer_norm) k.layer_norm(from, norm.weight, norm.bias, s.hidden, s.epsilon, to);
  else k.rms_norm(from, norm.weight, s.hidden, s.epsilon, to);
}

// Inputs of a row that are no larger than its threshold are left out.
const float* Decoder::Pass::filtered(const float* from, int n, int place, const std::vector<float>& factors, int row, float* to) const {
  if (place < 0) return from;
  const float limit = slot(place, row);
  // What is not a number is kept: it must not vanish.
  if (factors.empty())
    for (int i = 0; i < n; ++i) to[i] = std::fabs(from[i]) <= limit ? 0.0f : from[i];
  else
    for (int i = 0; i < n; ++i) to[i] = std::fabs(from[i]) * factors[static_cast<std::size_t>(i)] <= limit ? 0.0f : from[i];
  return to;
}

void Decoder::Pass::convert_columns(const Format& f, const float* from, std::uint8_t* buffer, ActiveInputs& to) const {
  auto* channels = reinterpret_cast<std::uint32_t*>(buffer + f.channels);
  auto* starts = reinterpret_cast<std::int32_t*>(buffer + f.starts);
  auto* sum = reinterpret_cast<float*>(buffer + f.sum);
  if (f.mode == Mode::columns_f32) {
    to = list_active(f.at, nullptr, nullptr, from, channels, starts, nullptr, reinterpret_cast<float*>(buffer + f.listed), sum);
    return;
  }
  auto* codes = reinterpret_cast<std::int8_t*>(buffer + f.q);
  auto* scale = reinterpret_cast<float*>(buffer + f.scale);
  k.quantize(f.at, from, codes, scale, sum, buffer + f.active);
  to = list_active(f.at, codes, scale, nullptr, channels, starts, reinterpret_cast<std::int8_t*>(buffer + f.listed), nullptr, sum);
}

void Decoder::Pass::convert(const Format& f, const float* from, int position, float* space, std::uint8_t* buffer, Activation& to,
                            IntegerCounts& counts) const {
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
    case Mode::integer: {
      auto* codes = reinterpret_cast<std::int8_t*>(buffer + f.q);
      auto* scale = reinterpret_cast<float*>(buffer + f.scale);
      auto* offset = reinterpret_cast<std::int32_t*>(buffer + f.offset);
      k.quantize_integer(*f.integer, from, position, codes, scale, offset, counts);
      to.q = codes;
      to.scale = scale;
      to.offset = offset;
      return;
    }
    case Mode::columns_int8:
    case Mode::columns_f32: return;  // convert_columns
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
  if (layer.w.by_row) return 1.0;
  if (layer.columns != nullptr) {
    if (layer.place > 0) return 0;
    const ActiveInputs& list = active(static_cast<std::size_t>(layer.format), row, 0);
    return (layer.columns->group_bytes() * list.groups + layer.columns->channel_bytes() * list.count) / layer.bytes[0];
  }
  if (f.mode != Mode::int8 && f.mode != Mode::f32) return 1.0;
  const Activation& a = single ? local_rows[static_cast<std::size_t>(layer.format)][0] : shared_rows[static_cast<std::size_t>(layer.format)][static_cast<std::size_t>(row)];
  int active = 0;
  for (int i = 0; i < f.at.n_blocks; ++i) active += a.active[i] != 0;
  return static_cast<double>(active) / f.at.n_blocks;
}

double Decoder::Pass::read_share_any(const LinearLayer& layer) const {
  const Format& f = d.formats_[static_cast<std::size_t>(layer.format)];
  if (layer.w.by_row) return 1.0;
  if (layer.columns != nullptr) {
    if (layer.place > 0) return 0;
    if (kept_any < 0) return 1;
    const int in = static_cast<int>(any_input.size()), group = layer.columns->at.group;
    int groups = 0;
    for (int begin = 0; begin < in; begin += group)
      groups += std::any_of(any_input.begin() + begin, any_input.begin() + std::min(begin + group, in), [](std::uint8_t any) { return any != 0; });
    return (layer.columns->group_bytes() * groups + layer.columns->channel_bytes() * kept_any * in) / layer.bytes[0];
  }
  if (f.mode != Mode::int8 && f.mode != Mode::f32) return 1.0;
  const auto& of = shared_rows[static_cast<std::size_t>(layer.format)];
  int active = 0;
  for (int i = 0; i < f.at.n_blocks; ++i) active += std::any_of(of.begin(), of.begin() + static_cast<long>(rows.size()), [i](const Activation& a) { return a.active[i] != 0; });
  return static_cast<double>(active) / f.at.n_blocks;
}

// Share of a layer's tiles that are read where `entries` of a mask are computed, or all of them where there is none.
double Decoder::Pass::read_tiles(const LinearLayer& layer, const std::uint8_t* entries, double kept, int per_output) const {
  const Matrix& w = layer.w;
  if (w.by_row) return w.kind != Kind::packed && kept > kMostGathered ? 1 : kept;
  if (entries == nullptr || kept >= 1 || layer.columns != nullptr || (per_output % kRows != 0 && per_output != 1)) return 1;
  int n = 0;
  for (int tile = 0; tile < w.tiles; ++tile) {
    bool any = false;
    for (int i = tile * kRows; i < std::min((tile + 1) * kRows, w.out) && !any; ++i) any = entries[i / per_output] != 0;
    n += any;
  }
  return static_cast<double>(n) / w.tiles;
}

// Share of a mask's entries that are computed.
double Decoder::Pass::kept_share(const MaskPart& part, const std::uint8_t* entries) const {
  return entries == nullptr ? 1 : static_cast<double>(std::count_if(entries, entries + part.size, [](std::uint8_t any) { return any != 0; })) / part.size;
}

void Decoder::Pass::count(const LinearLayer& layer, int t, MaskPart outputs, int per_output, MaskPart inputs, const std::vector<int>* subset) {
  if (t != 0 || !d.has_consumers_ || !layer.present) return;
  const std::vector<int>& of = subset != nullptr ? *subset : all_rows;
  const double size = static_cast<double>(layer.w.out) * layer.w.in;
  double most = 0;  // bytes at the widest width that a row asks for
  for (const int r : of) {
    const auto row = static_cast<std::size_t>(r);
    const long bits = layer.width_slot >= 0 ? std::clamp<long>(layer.bits(slot(layer.width_slot, r)), 0, 8) : 0;
    const double kept = kept_share(outputs, r), bytes = layer.bytes[static_cast<std::size_t>(bits)];
    most = std::max(most, bytes);
    read[row] += bytes * read_tiles(layer, outputs ? mask(outputs, r) : nullptr, kept, per_output) * read_share(layer, r);
    used[row] += size * kept * (kept_inputs[row] >= 0 ? static_cast<double>(kept_inputs[row]) : kept_share(inputs, r));
  }
  if (single || of.empty()) return;
  const std::uint8_t* entries = outputs ? any_of(outputs, of, any_entry) : nullptr;
  const double kept = kept_share(outputs, entries);
  read_any += most * read_tiles(layer, entries, kept, per_output) * read_share_any(layer);
  used_any += size * kept * (kept_any >= 0 ? static_cast<double>(kept_any) : kept_share(inputs, inputs ? any_of(inputs, of, any_entry) : nullptr));
}

// The entries of a mask that any of `of` computes; `all` holds them where rows differ.
const std::uint8_t* Decoder::Pass::any_of(const MaskPart& part, const std::vector<int>& of, std::vector<std::uint8_t>& all) const {
  const std::uint8_t* first = mask(part, of.front());
  const std::uint8_t* last = first;  // neighbouring rows often share their mask
  bool one = true;
  for (const int r : of) {
    const std::uint8_t* entries = mask(part, r);
    if (entries == last) continue;
    if (one) all.assign(first, first + part.size);
    one = false, last = entries;
    for (int i = 0; i < part.size; ++i) all[static_cast<std::size_t>(i)] |= entries[i];
  }
  return one ? first : all.data();
}

// The same of all rows of the pass.
const std::uint8_t* Decoder::Pass::any_row(const MaskPart& part, int t) { return any_of(part, all_rows, united[static_cast<std::size_t>(t)]); }

// List the neurons that a thread computes, and return the tiles that they lie in: its share of those that any row computes.
std::pair<int, int> Decoder::Pass::list_neurons(const Block& b, int t) {
  auto& to = listed[static_cast<std::size_t>(t)];
  to.clear();
  const int tiles = b.up.w.tiles;
  if (!b.neurons) {
    const auto [first, last] = share(tiles, t, nt);
    for (int i = first * kRows; i < std::min(last * kRows, s.neurons); ++i) to.push_back(i);
    return {first, last};
  }
  const std::uint8_t* kept = any_row(b.neurons, t);
  int total = 0;
  for (int i = 0; i < s.neurons; ++i) total += kept[i];
  if (b.up.w.kind != Kind::packed && total > kMostGathered * s.neurons) {
    const auto [first, last] = share(tiles, t, nt);
    for (int i = first * kRows; i < std::min(last * kRows, s.neurons); ++i) to.push_back(i);
    return {first, last};
  }
  const auto [from, until] = share(total, t, nt);
  // A tile is that thread's whose share its first kept neuron is in; tiles without any go with the one before.
  int first = t == 0 ? 0 : tiles, last = tiles, before = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    if (before >= from && first == tiles) first = tile;
    if (before >= until && t + 1 < nt) {
      last = tile;
      break;
    }
    const int end = std::min((tile + 1) * kRows, s.neurons);
    const bool own = before >= from || t == 0;
    const auto place = to.size();
    to.resize(place + kRows);
    std::size_t n = place;
    for (int i = tile * kRows; i < end; ++i) {  // without branches, which nothing could foretell
      to[n] = i;
      n += kept[i];
      before += kept[i];
    }
    to.resize(own ? n : place);
  }
  return {std::min(first, last), last};
}

void Decoder::Pass::listed_product(const LinearLayer& layer, float* const* y, int t) {
  const auto f = static_cast<std::size_t>(layer.format);
  const auto& neurons_listed = listed[static_cast<std::size_t>(t)];
  Kernels::Rows kernel = k.rows_int8;
  switch (d.formats_[f].mode) {
    case Mode::f32: kernel = k.rows_f32; break;
    case Mode::bf16: kernel = k.rows_dense_bf16; break;
    case Mode::plain: kernel = k.rows_dense_f32; break;
    default: break;
  }
  const Activation* a = single ? &local_rows[f][static_cast<std::size_t>(t)] : shared_rows[f].data();
  kernel(layer.w, a, static_cast<int>(rows.size()), y, neurons_listed.data(), static_cast<int>(neurons_listed.size()));
}

// y[row] (+)= W x[row] for all rows or a subset, at the width in force for each; tiles whose mask is all zero are left.
void Decoder::Pass::product(const LinearLayer& layer, const std::vector<int>* subset, float* const* y, bool add, int t,
                            const std::uint8_t* mask, int per_mask) {
  const auto f = static_cast<std::size_t>(layer.format);
  const Matrix& w = layer.w;
  Kernels::Product kernel = nullptr;
  switch (d.formats_[f].mode) {
    case Mode::int8: kernel = k.groups_int8; break;
    case Mode::f32: kernel = k.groups_f32; break;
    case Mode::bf16: kernel = k.dense_bf16; break;
    case Mode::plain: kernel = k.dense_f32; break;
    case Mode::integer: kernel = k.integer; break;
    case Mode::columns_int8:
    case Mode::columns_f32: throw std::logic_error("Columns are multiplied as a unit.");
  }
  const auto [first, last] = share(w.tiles, t, nt);
  const auto tiles = [&](int bits, const Activation* a, int n, float* const* to) {
    if (mask == nullptr) {
      kernel(w, bits, a, n, to, add, first, last);
      return;
    }
    const auto used = [&](int tile) {
      for (int r = tile * kRows; r < std::min((tile + 1) * kRows, w.out); ++r)
        if (mask[r / per_mask] != 0) return true;
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

void Decoder::Pass::columns(std::initializer_list<const LinearLayer*> layers, const std::vector<int>* subset, std::initializer_list<float* const*> y, bool add,
                            int t) {
  const Columns& w = *(*layers.begin())->columns;
  const auto f = static_cast<std::size_t>((*layers.begin())->format), here = static_cast<std::size_t>(t), linears = layers.size();
  auto& inputs = column_rows[here];
  auto& to = column_to[here];
  auto& of_row = column_of_row[here];
  const std::vector<int>& members = subset != nullptr ? *subset : all_rows;
  inputs.clear(), to.clear(), of_row.clear();
  for (const int r : members) {
    inputs.push_back(active(f, r, t));
    for (float* const* rows_of : y) to.push_back(rows_of[r]);
  }
  for (std::size_t i = 0; i < members.size(); ++i) of_row.push_back(to.data() + i * linears);
  const float* bias[3] = {};
  for (const LinearLayer* layer : layers) bias[layer->place] = layer->w.bias;
  k.columns(w, w.parts[here], inputs.data(), static_cast<int>(members.size()), bias, of_row.data(), add);
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
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const Held& held = rows[r].sequence->held;
    const int position = rows[r].position;
    float* values = slots.data() + r * static_cast<std::size_t>(d.n_values_);
    Mask* of_row = masks.data() + r * static_cast<std::size_t>(d.n_masks_);
    for (std::size_t i = 0; i < d.deciders_.size(); ++i) {
      const Decider& decider = d.deciders_[i];
      const auto at = static_cast<std::size_t>(decider.place);
      const bool is_mask = decider.program->is_mask();
      // Of a reply's decision: not before the reply.
      const bool holds = held.made[i] && (decider.scope != ScopeKind::reply || position >= rows[r].sequence->prompt_length);
      if (held.is_fixed[i]) {
        if (is_mask) of_row[at] = held.fixed_masks[at];
        else values[at] = held.fixed[at];
      } else if (held.replay_rows > 0) {
        const auto row = static_cast<std::size_t>(position);
        if (is_mask) of_row[at] = held.replay_masks[row * static_cast<std::size_t>(d.n_masks_) + at];
        else values[at] = held.replay[row * static_cast<std::size_t>(d.n_values_) + at];
      } else if (d.decides_early(decider)) {
        if (is_mask) of_row[at] = decider.program->mask(k, nullptr, 0, position);
        else values[at] = decider.program->value(k, nullptr, 0, position);
      } else if (is_mask) {
        of_row[at] = holds ? held.masks[at] : initial[i];
      } else {
        values[at] = holds ? held.values[at] : decider.initial;
      }
    }
  }
}

bool Decoder::Pass::decides_now(std::size_t i, const Row& row) const {
  const Decider& decider = d.deciders_[i];
  if (row.sequence->held.is_fixed[i] || row.sequence->held.replay_rows > 0) return false;
  if (decider.scope == ScopeKind::token) return true;
  if (decider.scope == ScopeKind::every) return row.position % decider.every == 0;
  return row.position == row.sequence->prompt_length - 1;
}

// A mask that a row has decided: in force for it, and where it is held for the rows that follow.
void Decoder::Pass::hold(std::size_t i, std::size_t row, Mask made) {
  const Decider& decider = d.deciders_[i];
  const auto at = static_cast<std::size_t>(decider.place), n = static_cast<std::size_t>(d.n_masks_);
  Held& held = rows[row].sequence->held;
  // A trace that holds many tokens' masks holds one where they are equal.
  if (held.masks[at] != nullptr && *held.masks[at] == *made) made = held.masks[at];
  held.masks[at] = made;
  held.made[i] = 1;
  if (decider.scope == ScopeKind::reply) return;  // in force from the next row on
  for (std::size_t r = row; r < rows.size() && rows[r].sequence == rows[row].sequence; ++r) {
    if (r > row && decides_now(i, rows[r])) break;
    masks[r * n + at] = made;
  }
}

// Decisions that are held, and masks: one thread takes them.
void Decoder::Pass::decide_held(std::size_t i, const float* source, std::size_t stride, int width) {
  const Decider& decider = d.deciders_[i];
  const auto at = static_cast<std::size_t>(decider.place), n = static_cast<std::size_t>(d.n_values_);
  for (std::size_t row = 0; row < rows.size(); ++row) {
    if (!decides_now(i, rows[row])) continue;
    const float* tap = source + row * stride;
    if (decider.program->is_mask()) {
      hold(i, row, decider.program->mask(k, tap, width, rows[row].position));
      continue;
    }
    Held& held = rows[row].sequence->held;
    held.values[at] = decider.program->value(k, tap, width, rows[row].position);
    held.made[i] = 1;
    if (decider.scope == ScopeKind::reply) continue;
    for (std::size_t r = row; r < rows.size() && rows[r].sequence == rows[row].sequence; ++r) {
      if (r > row && decides_now(i, rows[r])) break;
      slots[r * n + at] = held.values[at];
    }
  }
}

// A predictor's decisions, a few rows at a time: threads share its matrices.
void Decoder::Pass::predict(std::size_t i, int t, const float* source, std::size_t stride) {
  const Predictor& p = *d.deciders_[i].program->predictor();
  auto& space = space_of_predictor;
  auto& all = deciding[static_cast<std::size_t>(t)];
  all.clear();
  for (std::size_t r = 0; r < rows.size(); ++r)
    if (decides_now(i, rows[r])) all.push_back(r);
  for (std::size_t begin = 0; begin < all.size(); begin += Predictor::kTogether) {
    const int n = static_cast<int>(std::min<std::size_t>(Predictor::kTogether, all.size() - begin));
    const std::size_t* group = all.data() + begin;
    const auto [first_row, last_row] = share(n, t, nt);
    for (int r = first_row; r < last_row; ++r) {
      p.read(k, space, r, source + group[r] * stride);
      predicted[static_cast<std::size_t>(r)] = std::make_shared<std::vector<std::uint8_t>>(static_cast<std::size_t>(p.size()));
      to_predicted[static_cast<std::size_t>(r)] = predicted[static_cast<std::size_t>(r)]->data();
    }
    d.pool_->barrier();
    const auto [first_hidden, last_hidden] = share(p.hidden_tiles(), t, nt);
    p.hidden(k, space, n, first_hidden, last_hidden);
    d.pool_->barrier();
    for (int r = first_row; r < last_row; ++r) p.activate(space, r);
    d.pool_->barrier();
    const auto [first, last] = share(p.granules(), t, nt);
    p.cut(k, space, n, first, last, to_predicted.data());
    d.pool_->barrier();
    const auto [first_group, last_group] = share(n * p.groups(), t, nt);
    for (int item = first_group; item < last_group; ++item) p.fill(k, space, item / p.groups(), item % p.groups(), to_predicted[static_cast<std::size_t>(item / p.groups())]);
    d.pool_->barrier();
    if (t == 0)
      for (int r = 0; r < n; ++r)
        hold(i, group[r], rows[group[r]].position < p.first() ? p.whole() : Mask(std::move(predicted[static_cast<std::size_t>(r)])));
    d.pool_->barrier();
  }
}

void Decoder::Pass::decide(const Block& b, TapKind tap, int t, Array<float>& source, int width) {
  const std::size_t stride = source.size() / kMaxRows;
  bool any = false;
  for (const int at : b.deciders[static_cast<std::size_t>(tap)]) {
    const auto i = static_cast<std::size_t>(at);
    const Decider& decider = d.deciders_[i];
    if (std::none_of(rows.begin(), rows.end(), [&](const Row& row) { return decides_now(i, row); })) continue;
    any = true;
    if (decider.program->predictor() != nullptr) {
      predict(i, t, source.data(), stride);
    } else if (decider.scope == ScopeKind::token && !decider.program->is_mask()) {  // nothing is held: rows are shared out
      const auto [first, last] = share(static_cast<int>(rows.size()), t, nt);
      for (auto r = static_cast<std::size_t>(first); r < static_cast<std::size_t>(last); ++r)
        if (decides_now(i, rows[r]))
          slots[r * static_cast<std::size_t>(d.n_values_) + static_cast<std::size_t>(decider.place)] =
              decider.program->value(k, source.data() + r * stride, width, rows[r].position);
    } else if (t == 0) {
      decide_held(i, source.data(), stride, width);
    }
  }
  if (any) wait(kDeciders, t);
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
                                Array<float>* keep, int width, std::size_t unit) {
    const int threshold_slot = b.threshold_slot[unit];
    const auto [first, last] = single ? std::pair<int, int>{0, 1} : share(n, t, nt);
    auto& seen = passed[static_cast<std::size_t>(t)];
    if (threshold_slot >= 0 && !single) seen.assign(static_cast<std::size_t>(width), 0);
    for (int r = first; r < last; ++r) {
      const float* row = from.data() + static_cast<std::size_t>(r) * stride;
      if (norm != nullptr) {
        float* to = keep != nullptr && !single ? keep->data() + static_cast<std::size_t>(r) * stride : space;
        normalize(*norm, row, to);
        row = to;
      }
      row = filtered(row, width, threshold_slot, b.factors[unit], r, space + widest);
      if (!single || t == 0) {
        kept_inputs[static_cast<std::size_t>(r)] = -1;
        if (threshold_slot >= 0)
          kept_inputs[static_cast<std::size_t>(r)] = static_cast<float>(width - std::count(row, row + width, 0.0f)) / static_cast<float>(width);
      }
      if (threshold_slot >= 0 && !single)
        for (int i = 0; i < width; ++i) seen[static_cast<std::size_t>(i)] |= row[i] != 0.0f;
      int done = -1;
      for (const LinearLayer* layer : layers) {
        if (!layer->present || layer->format == done) continue;
        done = layer->format;
        const auto f = static_cast<std::size_t>(done);
        const Format& format = d.formats_[f];
        const std::size_t place = single ? static_cast<std::size_t>(t) : static_cast<std::size_t>(r);
        auto& buffers = single ? local[f] : shared[f];
        auto& into = single ? local_rows[f] : shared_rows[f];
        if (layer->columns != nullptr) {
          convert_columns(format, row, buffers.data() + place * format.bytes, (single ? local_active : shared_active)[f][place]);
          continue;
        }
        std::vector<float> room(format.transforms != nullptr ? static_cast<std::size_t>(2 * width) : 0);
        IntegerCounts counts;
        convert(format, row, rows[static_cast<std::size_t>(r)].position, room.data(), buffers.data() + place * format.bytes, into[place], counts);
        if (single && t != 0) continue;  // every thread has rounded the same row
        integers[static_cast<std::size_t>(r)].clamped += counts.clamped;
        integers[static_cast<std::size_t>(r)].beyond += counts.beyond;
      }
    }
    if (!single) wait(kOther, t);
    else lap(kOther, t);
    if (t != 0 || single) return;
    kept_any = -1;
    if (threshold_slot < 0) return;
    any_input.assign(static_cast<std::size_t>(width), 0);  // no thread prepares another unit before this one has its products
    for (const auto& part : passed)
      for (std::size_t i = 0; i < any_input.size(); ++i) any_input[i] |= part[i];
    kept_any = static_cast<float>(std::count(any_input.begin(), any_input.end(), 1)) / static_cast<float>(width);
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
    prepare_from({&b.q, &b.k, &b.v}, normed, hidden, nullptr, nullptr, s.hidden, 0);
  } else {
    prepare_from({&b.q, &b.k, &b.v}, x, hidden, &b.input, &normed, s.hidden, 0);
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
  const std::uint8_t* head_mask = b.heads && !always_attend ? any_row(b.heads, t) : nullptr;
  if (b.q.columns != nullptr) {
    columns({&b.q, &b.k, &b.v}, nullptr, {to_q.data(), to_k.data(), to_v.data()}, false, t);
  } else {
    if (attends) product(b.q, nullptr, to_q.data(), false, t, s.head_dim % kRows == 0 ? head_mask : nullptr, s.head_dim);
    product(b.k, nullptr, to_k.data(), false, t);
    product(b.v, nullptr, to_v.data(), false, t);
  }
  if (t == 0 && d.has_consumers_) {
    chosen.clear();
    for (int r = 0; r < n; ++r)
      if (!skipped(r, 1.0f)) chosen.push_back(r);
    count(b.q, t, b.heads, s.head_dim, {}, b.q.columns != nullptr ? nullptr : &chosen);  // columns hold q, k and v
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
      if (head_mask != nullptr && mask(b.heads, r)[head] == 0) return;
      const Row& row = rows[static_cast<std::size_t>(r)];
      const int from = b.window > 0 ? std::max(0, row.position - b.window + 1) : 0;
      asked.push_back({to_q[static_cast<std::size_t>(r)] + head * s.head_dim, to_attended[static_cast<std::size_t>(r)] + head * s.head_dim, from, row.position});
    };
    const auto answer = [&](int r, int kv) {
      if (asked.empty()) return;
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
  if (b.heads) {
    const auto [first, last] = share(n * s.heads, t, nt);
    for (int item = first; item < last; ++item) {
      const int r = item / s.heads, h = item % s.heads;
      float* head = to_attended[static_cast<std::size_t>(r)] + h * s.head_dim;
      if (mask(b.heads, r)[h] == 0) std::fill(head, head + s.head_dim, 0.0f);
    }
    wait(kAttention, t);
  }
  // Where the block's result is normed before it is added, it goes to a buffer first.
  const auto contribute = [&](const LinearLayer& layer, const Norm& norm, float path, const MaskPart& inputs) {
    const std::vector<int>* subset = nullptr;
    if (b.path_slot >= 0) {
      chosen.clear();
      for (int r = 0; r < n; ++r)
        if (!skipped(r, path)) chosen.push_back(r);
      subset = &chosen;
    }
    const bool post = norm.weight != nullptr;
    if (layer.columns != nullptr) columns({&layer}, subset, {post ? to_other.data() : to_x.data()}, !post, t);
    else product(layer, subset, post ? to_other.data() : to_x.data(), !post, t);
    count(layer, t, {}, 1, inputs, subset);
    wait(kLinears, t);
    if (post) {
      add_rows(norm, subset != nullptr ? chosen : all_rows, t);
      wait(kOther, t);
    }
  };
  const bool runs_o = n > 1 || !skipped(0, 1.0f);
  if (runs_o) {
    prepare_from({&b.o}, attended, queries, nullptr, nullptr, s.heads * s.head_dim, 1);
    contribute(b.o, b.post_attention, 1.0f, b.heads);
  }

  // MLP.
  const bool always_mlp = b.decides(TapKind::mlp_input) || b.decides(TapKind::mlp_inner) || tapped;
  const bool runs_mlp = n > 1 || always_mlp || !skipped(0, 2.0f);
  if (runs_mlp) {
    if (b.decides(TapKind::mlp_input)) {
      normalize_rows(b.pre_mlp);
      decide(b, TapKind::mlp_input, t, normed, s.hidden);
      prepare_from({&b.gate, &b.up}, normed, hidden, nullptr, nullptr, s.hidden, 2);
    } else {
      prepare_from({&b.gate, &b.up}, x, hidden, &b.pre_mlp, &normed, s.hidden, 2);
    }
    if (t == 0 && tapped) {
      if (s.gated) site(name + ".gate", normed, hidden, s.hidden);
      site(name + ".up", normed, hidden, s.hidden);
    }
    std::pair<int, int> own = share(b.up.w.tiles, t, nt);  // the tiles that this thread computes
    if (b.up.w.by_row) {
      own = list_neurons(b, t);
      if (s.gated) listed_product(b.gate, to_gate.data(), t);
      listed_product(b.up, to_up.data(), t);
    } else if (b.up.columns != nullptr) {
      if (s.gated) columns({&b.gate, &b.up}, nullptr, {to_gate.data(), to_up.data()}, false, t);
      else columns({&b.up}, nullptr, {to_up.data()}, false, t);
    } else {
      const std::uint8_t* neuron_mask = b.neurons ? any_row(b.neurons, t) : nullptr;
      if (s.gated) product(b.gate, nullptr, to_gate.data(), false, t, neuron_mask);
      product(b.up, nullptr, to_up.data(), false, t, neuron_mask);
    }
    if (t == 0 && d.has_consumers_) {
      chosen.clear();
      for (int r = 0; r < n; ++r)
        if (!skipped(r, 2.0f)) chosen.push_back(r);
      count(b.gate, t, b.neurons, 1, {}, &chosen);
      count(b.up, t, b.neurons, 1, {}, &chosen);
    }
    // Every thread finishes the neurons that it has just computed.
    int begin = own.first * kRows, width = std::min(own.second * kRows, s.neurons) - begin;
    if (b.up.columns != nullptr) {  // granules, of gate and up in turn
      const ColumnPart& part = b.up.columns->parts[static_cast<std::size_t>(t)];
      const int in_turn = s.gated ? 2 : 1;
      begin = part.first / in_turn * kGranule;
      width = std::min((part.first + part.granules) / in_turn * kGranule, s.neurons) - begin;
    }
    for (int r = 0; r < n && width > 0; ++r) {
      float* up_row = to_up[static_cast<std::size_t>(r)] + begin;
      float* to = up_row;
      if (s.gated) {
        to = to_gate[static_cast<std::size_t>(r)] + begin;
        k.apply_gated(s.function, to, up_row, width);
      } else {
        k.apply(s.function, up_row, width);
      }
      if (b.neurons) {
        const std::uint8_t* kept = mask(b.neurons, r) + begin;
        for (int i = 0; i < width; ++i) to[i] = kept[i] != 0 ? to[i] : 0.0f;
      }
    }
    wait(kLinears, t);
    Array<float>& inner = s.gated ? gate : up;
    decide(b, TapKind::mlp_inner, t, inner, s.neurons);
    if (t == 0 && tapped) site(name + ".down", inner, neurons, s.neurons);
    if (n > 1 || !skipped(0, 2.0f)) {
      prepare_from({&b.down}, inner, neurons, nullptr, nullptr, s.neurons, 3);
      contribute(b.down, b.post_mlp, 2.0f, b.neurons);
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
      IntegerCounts counts;
      convert(format, from, 0, nullptr, (n == 1 ? local[f] : shared[f]).data() + place * format.bytes, (n == 1 ? local_rows[f] : shared_rows[f])[place], counts);
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

}  // namespace wb
