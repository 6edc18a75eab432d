// The kernels, written once over sixteen lanes; each instruction set compiles this file with its own lanes.
#pragma once

#include "attention_impl.hpp"
#include "columns_impl.hpp"
#include "integer_impl.hpp"
#include "products_impl.hpp"
#include "rows_impl.hpp"
#include "scores_impl.hpp"
#include "vectors_impl.hpp"

namespace wb {
namespace {

// A constant: no instruction of a set may run before the processor was asked for it.
template <class V>
constexpr Kernels make_kernels(Isa isa) {
  Kernels k{};
  k.isa = isa;
  k.groups_int8 = groups_int8<V>;
  k.groups_f32 = groups_f32<V>;
  k.dense_f32 = dense_f32<V>;
  k.dense_bf16 = dense_bf16<V>;
  k.rows_int8 = rows_groups<V, false>;
  k.rows_f32 = rows_groups<V, true>;
  k.rows_dense_f32 = rows_dense_f32<V>;
  k.rows_dense_bf16 = rows_dense_bf16<V>;
  k.integer = integer<V>;
  k.columns = columns<V>;
  k.score_sums = score_sums<V>;
  k.scores_above = scores_above<V>;
  k.quantize_integer = quantize_integer<V>;
  k.rms_norm = rms_norm<V>;
  k.layer_norm = layer_norm<V>;
  k.quantize = quantize<V>;
  k.pad = pad<V>;
  k.apply = apply<V>;
  k.apply_gated = apply_gated<V>;
  k.add = add<V>;
  k.attend_f32 = attend<V, float>;
  k.attend_f16 = attend<V, std::uint16_t>;
  k.dot_i8 = dot_i8<V>;
  k.squares = squares<V>;
  k.to_fp16 = to_fp16<V>;
  k.to_bf16 = to_bf16<V>;
  k.log_sum_exp = log_sum_exp<V>;
  k.read_all = read_all<V>;
  return k;
}

}  // namespace
}  // namespace wb
