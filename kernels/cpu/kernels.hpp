// The compute kernels of one instruction set, behind plain function pointers.
#pragma once

#include <cstdint>

#include "columns.hpp"
#include "isa.hpp"
#include "matrix.hpp"
#include "scores.hpp"

namespace wb {

enum class Function : std::uint8_t { relu, silu, gelu_tanh, gelu };

// Keys and values of one block and sequence, in pieces of kPiece positions.
// keys: [kv head][kPiece / 16][head_dim][16 positions]; values: [kv head][kPiece][value_dim], value_dim padded to 16.
inline constexpr int kPiece = 64;

struct CacheView {
  void* const* keys = nullptr;    // one pointer per piece
  void* const* values = nullptr;
  int head_dim = 0;
  int value_dim = 0;
};

inline constexpr int kQueries = 12;  // most that are taken together

struct Query {
  const float* q = nullptr;  // (head_dim)
  float* out = nullptr;      // likewise
  int first = 0, last = 0;   // positions that it sees
};

struct Kernels {
  Isa isa;

  // y[i] (padded to whole tiles) = W x[i], or += where `add`, for tiles [first, last) and rows i < n.
  // `bits` is the width to read of nested planes, 0 for all that is stored.
  using Product = void (*)(const Matrix& w, int bits, const Activation* x, int n, float* const* y, bool add, int first,
                           int last);
  Product groups_int8;  // int8 activations, exact integer sums within a block of channels
  Product groups_f32;   // fp32 activations; tables too, at widths that have one
  Product dense_f32;    // fp32 or bf16 weights, fp32 activations
  Product dense_bf16;   // bf16 weights, bf16 activations
  // y[i][row] = W x[i] at rows of a matrix that lies by row, for the n_listed rows that are listed.
  using Rows = void (*)(const Matrix& w, const Activation* x, int n, float* const* y, const int* listed, int n_listed);
  Rows rows_int8;
  Rows rows_f32;        // group codes
  Rows rows_dense_f32;
  Rows rows_dense_bf16;
  Product integer;      // integer codes and activations, sums exact
  // y[i][linear] = W x[i], or += where `add`, for the outputs of one part and rows i < n; bias[linear] or null.
  void (*columns)(const Columns& w, const ColumnPart& part, const ActiveInputs* x, int n, const float* const* bias, float* const* const* y, bool add);
  // Of a predictor's row of hidden units, for outputs [first, last) (whole granules of one chunk): sums, what lies from
  // there to `end` asked for ahead; and 1 in to[i] where the score of output first + i is above a threshold, else 0.
  void (*score_sums)(const ScoreMatrix& w, const ActiveUnits& x, int first, int last, int end, std::int32_t* sums);
  void (*scores_above)(const ScoreMatrix& w, float scale, const std::int32_t* sums, int first, int n, float threshold, std::uint8_t* to);
  // Round a row at a position: codes (row_bytes, of which laid_out are codes), scale and offset (parts), and what was clamped or beyond calibration.
  // NaN and infinity give a NaN scale.
  void (*quantize_integer)(const IntegerInput& in, const float* x, int position, std::int8_t* q, float* scale, std::int32_t* offset,
                           IntegerCounts& counts);

  void (*rms_norm)(const float* x, const float* weight, int n, float eps, float* y);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, int n, float eps, float* y);
  // Symmetric int8 per block of at most 64 channels: scale = max|x| / 127. NaN and infinity give a NaN scale.
  void (*quantize)(const Grouping& at, const float* x, std::int8_t* q, float* scale, float* sum, std::uint8_t* active);
  // Copy to the padded layout; sums per group and activity per block.
  void (*pad)(const Grouping& at, const float* x, float* padded, float* sum, std::uint8_t* active);
  void (*apply)(Function function, float* x, int n);
  void (*apply_gated)(Function function, float* gate, const float* up, int n);  // gate = f(gate) * up
  void (*add)(float* to, const float* from, int n);
  // Softmax attention of n queries that share one key/value head. scores: scratch, kQueries * 16 floats for every block
  // of 16 positions between the first and the last of any query, and as many for every 16 of head_dim. Half: fp16 cache, else fp32.
  using Attend = void (*)(const CacheView& cache, int kv_head, const Query* queries, int n, float scale, float* scores);
  Attend attend_f32;
  Attend attend_f16;
  float (*dot_i8)(const std::int8_t* a, const float* x, int n);
  float (*squares)(const float* x, int n);  // their sum
  void (*to_fp16)(const float* x, int n, std::uint16_t* y);
  void (*to_bf16)(const float* x, int n, std::uint16_t* y);
  double (*log_sum_exp)(const float* x, int n);
  float (*read_all)(const void* p, std::size_t bytes);  // load everything, for measuring bandwidth
};

const Kernels& kernels(Isa isa);

}  // namespace wb
