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
  integers.resize(kMaxRows);
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
    case Mode::integer: kernel = k.integer; break;
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
        IntegerCounts counts;
        convert(format, row, rows[static_cast<std::size_t>(r)].position, room.data(), buffers.data() + place * format.bytes, into[place], counts);
        if (single && t != 0) continue;  // every thread has rounded the same row
        integers[static_cast<std::size_t>(r)].clamped += counts.clamped;
        integers[static_cast<std::size_t>(r)].beyond += counts.beyond;
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
