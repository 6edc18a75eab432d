// What a decoder is made of, and one pass of rows through it. Shared by decoder.cpp and pass.cpp alone.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <utility>

#include "decoder.hpp"
#include "predictor.hpp"

namespace wb {

using Clock = std::chrono::steady_clock;

inline constexpr int kLogitRows = 16;  // rows of logits held at once

enum class Mode : std::uint8_t { int8, f32, bf16, plain, integer, columns_int8, columns_f32 };  // plain: fp32 as it is, no copy

inline constexpr const char* kUnitOf[][2] = {{"q", "qkv"}, {"k", "qkv"}, {"v", "qkv"}, {"o", "o"}, {"gate", "gate_up"}, {"up", "gate_up"}, {"down", "down"}};

inline int padded(int n) { return static_cast<int>(round_up(static_cast<std::size_t>(n), 16)); }

// The part of n items that thread t of `threads` takes.
inline std::pair<int, int> share(int n, int t, int threads) {
  return {static_cast<int>(static_cast<long long>(n) * t / threads), static_cast<int>(static_cast<long long>(n) * (t + 1) / threads)};
}

// How a row of activations is laid out for some linears.
struct Decoder::Format {
  Mode mode;
  Grouping at;
  int in;
  const std::vector<Transform>* transforms;  // null where there are none
  const IntegerInput* integer;               // likewise
  std::size_t bytes = 0, q = 0, x = 0, b = 0, scale = 0, sum = 0, active = 0, offset = 0, channels = 0, starts = 0, listed = 0;  // places within a row's buffer

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
    if (mode == Mode::integer) {
      q = take(integer->row_bytes());
      scale = take(static_cast<std::size_t>(integer->parts()) * 4);
      offset = take(static_cast<std::size_t>(integer->parts()) * 4);
    }
    if (mode == Mode::columns_int8 || mode == Mode::columns_f32) {
      const auto blocks = static_cast<std::size_t>(at.n_blocks), list = static_cast<std::size_t>(in) + 3 * blocks + 1;
      if (mode == Mode::columns_int8) {
        q = take(static_cast<std::size_t>(at.padded));
        scale = take(blocks * 4);
        active = take(blocks);
      }
      sum = take(std::max(blocks, static_cast<std::size_t>(at.n_groups)) * 4);
      channels = take(list * 4);
      starts = take((blocks + 1) * 4);
      listed = take(list * (mode == Mode::columns_int8 ? 1 : 4));
    }
    if (mode == Mode::int8) scale = take(static_cast<std::size_t>(at.n_blocks) * 4);
    if (mode == Mode::int8 || mode == Mode::f32) {
      sum = take(static_cast<std::size_t>(at.n_groups) * 4);
      active = take(static_cast<std::size_t>(at.n_blocks));
    }
  }
};

struct Decoder::LinearLayer {
  Matrix w;
  std::shared_ptr<const Columns> columns;  // of this linear and those of its unit that follow
  std::size_t place = 0;                   // among them
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

// Dense rows are all read where more than this share of them is wanted. On a Zen 4 core, of rows of 1152 bytes from memory,
// 7 of 10 at random take 1.3 times as long as all of them in sequence, 5 of 10 as long, 3 of 10 two thirds.
inline constexpr double kMostGathered = 0.45;

// Where a block's heads or neurons lie in a mask.
struct MaskPart {
  int place = -1, offset = 0, size = 0;
  explicit operator bool() const { return place >= 0; }
};

struct Decoder::Block {
  LinearLayer q, k, v, o, gate, up, down;
  Norm input, post_attention, pre_mlp, post_mlp, q_norm, k_norm;
  int rope = -1, window = 0;
  int path_slot = -1;
  MaskPart heads, neurons;
  std::array<int, 4> threshold_slot{-1, -1, -1, -1};  // qkv, o, gate_up, down
  std::array<std::vector<float>, 4> factors;          // of their inputs; empty: 1
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
  void convert(const Format& format, const float* from, int position, float* scratch, std::uint8_t* buffer, Activation& to, IntegerCounts& counts) const;
  const float* filtered(const float* from, int n, int slot, const std::vector<float>& factors, int row, float* scratch) const;
  void convert_columns(const Format& format, const float* from, std::uint8_t* buffer, ActiveInputs& to) const;
  const ActiveInputs& active(std::size_t format, int row, int t) const {
    return single ? local_active[format][static_cast<std::size_t>(t)] : shared_active[format][static_cast<std::size_t>(row)];
  }
  // y[linear][row] (+)= W x[row] of a unit that lies in columns, for all rows or a subset.
  void columns(std::initializer_list<const LinearLayer*> layers, const std::vector<int>* subset, std::initializer_list<float* const*> y, bool add, int t);
  void product(const LinearLayer& layer, const std::vector<int>* subset, float* const* y, bool add, int t,
               const std::uint8_t* mask = nullptr, int per_mask = 1);
  void decide(const Block& b, TapKind tap, int t, Array<float>& source, int width);
  const std::uint8_t* any_row(const MaskPart& part, int t);
  std::pair<int, int> list_neurons(const Block& b, int t);
  void listed_product(const LinearLayer& layer, float* const* y, int t);
  bool decides_now(std::size_t decider, const Row& row) const;
  void decide_held(std::size_t decider, const float* source, std::size_t stride, int width);
  void predict(std::size_t decider, int t, const float* source, std::size_t stride);
  void hold(std::size_t decider, std::size_t row, Mask mask);
  // Add what each row uses of a layer: `outputs` and `inputs` are the parts of masks that say which there are.
  void count(const LinearLayer& layer, int t, MaskPart outputs = {}, int per_output = 1, MaskPart inputs = {},
             const std::vector<int>* subset = nullptr);
  void begin_slots();
  float slot(int place, int row) const { return slots[static_cast<std::size_t>(row) * d.n_values_ + place]; }
  const std::uint8_t* mask(const MaskPart& part, int row) const {
    return masks[static_cast<std::size_t>(row) * d.n_masks_ + part.place]->data() + part.offset;
  }
  double read_tiles(const LinearLayer& layer, const std::uint8_t* entries, double kept, int per_output) const;
  double read_share_any(const LinearLayer& layer) const;  // as read_share, of what any row reads
  double kept_share(const MaskPart& part, const std::uint8_t* entries) const;
  const std::uint8_t* any_of(const MaskPart& part, const std::vector<int>& of, std::vector<std::uint8_t>& all) const;
  // Share of a part's entries that a row computes.
  double kept_share(const MaskPart& part, int row) const {
    if (!part) return 1;
    const std::uint8_t* entries = mask(part, row);
    int kept = 0;
    for (int i = 0; i < part.size; ++i) kept += entries[i];
    return static_cast<double>(kept) / part.size;
  }
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
  std::vector<std::vector<ActiveInputs>> shared_active, local_active;
  std::vector<std::vector<ActiveInputs>> column_rows;          // by thread
  std::vector<std::vector<float*>> column_to;                  // likewise: of every row, where each linear's outputs go
  std::vector<std::vector<float* const*>> column_of_row;
  std::vector<std::vector<Activation>> subset_rows;            // by thread
  std::vector<std::vector<float*>> subset_to;
  std::vector<std::vector<int>> subset_index;
  std::vector<Array<float>> scratch;                           // by thread: two rows of the widest input
  std::vector<std::vector<float>> scores;                      // by thread
  std::vector<std::vector<Query>> queries_of;                  // by thread
  std::vector<float> slots, angles;
  std::vector<Mask> masks;                                     // of a row, by the deciders' places
  std::vector<Mask> initial;                                   // of a decider; none where it gives no mask
  Predictor::Space space_of_predictor;
  std::vector<std::shared_ptr<std::vector<std::uint8_t>>> predicted;
  std::vector<std::uint8_t*> to_predicted;
  std::vector<std::vector<std::uint8_t>> united;               // by thread: what any row of a mask computes
  std::vector<std::vector<int>> listed;                        // by thread: neurons to compute
  std::vector<std::vector<std::size_t>> deciding;              // by thread: rows that a predictor decides for

  std::vector<Row> rows;
  std::vector<int> all_rows, attention_rows, mlp_rows, wanted;
  bool single = false;
  std::vector<double> read, used;      // by row: bytes and weights of the blocks' linears
  double read_any = 0, used_any = 0;   // of what any row reads and uses, where there are several
  std::vector<std::vector<std::uint8_t>> passed;  // by thread: which of the prepared unit's inputs passed for any of its rows
  std::vector<std::uint8_t> any_input, any_entry; // the same of all rows; an entry of a mask
  float kept_any = -1;                 // share of the inputs that passed for any row; -1 for no threshold
  std::vector<float> kept_inputs;      // by row: share of the prepared unit's inputs that passed its threshold; -1 for none
  std::vector<IntegerCounts> integers;  // by row
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

}  // namespace wb
