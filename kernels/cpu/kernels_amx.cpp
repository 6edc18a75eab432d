// The kernels of a processor with AMX tiles: those of AVX-512, but for integer products.
#include "integer_amx_impl.hpp"
#include "vec_avx512.hpp"

namespace wb {

extern const Kernels kAvx512Bf16;

namespace {

// Four rows take no longer without tiles. With five sections of 576 or 1536 channels five take 0.6 to 0.9 of the time with them.
constexpr int kFewest = 5;

void integer_tiles(WB_PRODUCT_ARGUMENTS) {
  if (n < kFewest || w.input->apart) kAvx512Bf16.integer(w, bits, x, n, y, add, first, last);
  else integer_amx<Avx512Bf16>(w, x, n, y, add, first, last);
}

void quantize_tiles(const IntegerInput& in, const float* x, int position, std::int8_t* q, float* scale, std::int32_t* offset, IntegerCounts& counts) {
  if (in.apart) {
    kAvx512Bf16.quantize_integer(in, x, position, q, scale, offset, counts);
    return;
  }
  round_row<Avx512Bf16>(in, x, position, q, scale, counts);
  *offset = add_tile_codes(in, q);
}

}  // namespace

Kernels with_tiles(Kernels k) {
  k.isa = Isa::amx;
  k.integer = integer_tiles;
  k.quantize_integer = quantize_tiles;
  return k;
}

}  // namespace wb
