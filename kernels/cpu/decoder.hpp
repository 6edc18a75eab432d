// A whole decoder step: rows of tokens in, logits out, all of it inside one call and one set of threads.
//
// It knows no model by name. What differs between architectures (norms, positions, gates, windows) is data.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "matrix.hpp"
#include "plan.hpp"
#include "pool.hpp"
#include "sampling.hpp"

namespace wb {

inline constexpr int kMaxRows = 128;  // rows of one pass; longer prompts take several

struct DecoderSpec {
  int blocks = 0, hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, neurons = 0, vocab = 0, context = 0;
  bool layer_norm = false;       // with mean and bias; else root mean square
  float epsilon = 1e-5f;
  Function function = Function::silu;
  bool gated = true;
  float embedding_scale = 1, attention_scale = 1, softcap = 0;
  int rotary_dim = 0;            // 0: no rotary positions
  int position_offset = 0;       // of learned positions
  bool exact = false;            // fp32 activations and cache; else int8 activations (bf16 for bf16 weights, fp32 for tables), fp16 cache
  int threads = 1;
  std::vector<int> cores;
  std::string isa = "auto";
};

enum class TransformKind : std::uint8_t { scale, order, rotation };

struct Transform {
  TransformKind kind;
  std::vector<float> values;     // scale (in), rotation (in, in) row-major: y = x R
  std::vector<std::int64_t> order;
};

// Parts of a step that are timed.
enum Part { kLinears, kAttention, kOutput, kDeciders, kOther, kParts };

// What one row did.
struct RowTrace {
  int position = 0, token = 0;
  double seconds = 0;            // wall time of the pass, shared evenly among its rows
  double read_bytes = 0;         // bytes of the blocks' linears that this row reads
  std::array<double, kParts> parts{};  // seconds, likewise shared
  IntegerCounts integers;        // of the inputs of integer products, each unit's once
  double touched_bytes = 0;      // everything the pass read: linears, output layer, cache; shared evenly
  double kept_weights = 1;       // share of the blocks' weights that this row used
  double pass_weights = 1;       // share of them that any row of its pass used
  std::vector<float> values;     // what was decided, by the deciders' places
  std::vector<Mask> masks;
};

class Decoder;

// One running text: cache, position, decisions, trace.
class Sequence {
 public:
  explicit Sequence(Decoder& decoder);
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;
  int position() const { return static_cast<int>(tokens.size()); }
  std::size_t cache_bytes() const;

  std::vector<int> tokens;
  int prompt_length = 0;
  std::vector<RowTrace> trace;
  Held held;

 private:
  friend class Decoder;
  void grow(int positions);

  const Decoder* owner_;
  std::size_t key_bytes_, value_bytes_;
  std::vector<Array<std::uint8_t>> store_;
  std::vector<std::vector<void*>> keys_, values_;  // [block][piece]
};

class Decoder {
 public:
  explicit Decoder(DecoderSpec spec);
  ~Decoder();

  // Building. Names: "embedding", "output", "blocks.<i>.<q|k|v|o|gate|up|down>" for matrices; "positions" (rows of
  // hidden), "final", "final.bias", "blocks.<i>.<input|post_attention|pre_mlp|post_mlp|q_norm|k_norm>" (with ".bias") for norms,
  // and "blocks.<i>.<linear>.bias". Norms that are not set are not applied.
  void set_groups(const std::string& name, int out, int in, const GroupSource& source);
  void add_width(const std::string& name, int bits, const std::uint16_t* scales16, const std::uint8_t* packed_zeros, std::size_t packed_zeros_row);
  void set_tables(const std::string& name, int out, int in, int bits, const std::uint8_t* packed, std::size_t packed_row);
  void add_table(const std::string& name, int bits, const std::uint16_t* table);
  const Matrix& matrix(const std::string& name);
  void set_integer(const std::string& name, int out, const IntegerInput& input, const IntegerSource& source);
  // Linears of one unit input by input, so that inputs left out are not read: `names` as many as `sources`.
  void set_columns(const std::vector<std::string>& names, int in, int group, const std::vector<ColumnSource>& sources);
  // `by_row`: laid out for products of some rows; of gate and up alone, which a mask of neurons reads.
  void set_f32(const std::string& name, int out, int in, const float* rows, bool by_row = false);
  void set_bf16(const std::string& name, int out, int in, const std::uint16_t* rows, bool by_row = false);
  void set_vector(const std::string& name, const float* values, std::size_t n);
  int add_rope(std::vector<float> frequencies, float factor);
  void set_attention(int block, int rope, int window);  // rope -1: none; window 0: all positions
  void add_transform(const std::string& linear, Transform transform);
  // Deciders in the order of their slots; consumers name a slot, a kind and a target as the plan does.
  void add_decider(Decider decider);
  // Of a decider's program, at any time between two passes.
  void set_thresholds(int slot, std::vector<float> thresholds);
  // `offset`: the entry of a mask that heads and neurons begin at. `factors`: of inputs, before they are compared with a threshold.
  void add_consumer(int slot, const std::string& kind, const std::string& target, std::vector<int> widths, std::vector<int> levels = {}, int offset = 0,
                    std::vector<float> factors = {});
  void finish();

  // Running. One call at a time; sequences must be of this decoder.
  // Rows of several sequences may run together; of one sequence they must be consecutive positions.
  // `last`: logits of each sequence's last row, else of all rows, handed over in turn as (row, logits).
  using Visit = std::function<void(int row, const float* logits)>;
  struct Feed {
    Sequence* sequence;
    const int* tokens;
    int count;
  };
  enum class Logits { none, last, all };
  void run(const std::vector<Feed>& feeds, Logits logits, const Visit& visit);

  using Tap = std::function<void(const std::string& site, int position, const float* rows, int n, int width)>;
  void set_tap(Tap tap) { tap_ = std::move(tap); }

  const DecoderSpec& spec() const { return spec_; }
  int n_values() const { return n_values_; }  // slots that hold a number, and those that hold a mask
  int n_masks() const { return n_masks_; }
  const std::vector<Decider>& deciders() const { return deciders_; }
  std::size_t weight_bytes() const { return arena_.used(); }
  double output_bytes() const;
  int laps() const { return laps_; }  // times that the last pass read the clock for its trace
  double linear_bytes() const { return linear_bytes_; }
  Isa isa() const { return k_->isa; }
  Pool& pool() { return *pool_; }
  const Kernels& kernels() const { return *k_; }

 private:
  friend class Sequence;
  struct Format;
  struct LinearLayer;
  struct Norm;
  struct Block;
  struct Pass;

  LinearLayer& linear(const std::string& name);
  const float* vector(const std::string& name, std::size_t n, bool required) const;
  int format_of(const LinearLayer& layer);
  // Whether a decision needs no tap and is not held: it is taken when a pass begins.
  static bool decides_early(const Decider& decider) { return decider.scope == ScopeKind::token && !decider.program->reads_tap(); }

  DecoderSpec spec_;
  const Kernels* k_;
  std::unique_ptr<Pool> pool_;
  Arena arena_;
  std::vector<Block> blocks_;
  std::unique_ptr<LinearLayer> embedding_, output_;
  std::map<std::string, std::vector<float>> vectors_;
  std::vector<std::pair<std::vector<float>, float>> ropes_;
  std::vector<Decider> deciders_;
  std::vector<Format> formats_;
  int n_values_ = 0, n_masks_ = 0;
  bool has_consumers_ = false, finished_ = false;
  double linear_bytes_ = 0, linear_weights_ = 0;
  int laps_ = 0;
  Tap tap_;
  std::unique_ptr<Pass> pass_;
};

}  // namespace wb
