// Products of many rows with integer codes on AMX tiles: 16 rows by 64 channels times 64 channels by 16 outputs in one
// instruction. A sum that is doubled between sections would have to leave its tile for that, which costs twice the product, so
// channels that are doubled come several times, or a run of sections has a sum of its own, which is doubled once
// (`IntegerInput::tile_sums`).
#pragma once

#include <immintrin.h>

#include "integer_impl.hpp"

namespace wb {
namespace {

constexpr int kTileRows = 16;                                       // of activations
constexpr std::size_t kTileBytes = kRows * kTileChannels;           // of weights
constexpr std::size_t kTileSums = kTileRows * kRows;

// Tiles 0 to 3 hold sums, [rows][outputs] two by two, 4 and 5 activations, 6 and 7 weights. What a thread configures here is
// released at the end of the same call: a context switch then saves no tiles.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }

  // For so many rows, at most two tiles of them.
  void take(int rows) {
    const int upper = std::min(rows, kTileRows), lower = std::max(rows - kTileRows, 1);
    Config config;
    for (int tile = 0; tile < 8; ++tile) {
      const bool weights = tile >= 6, second = tile == 2 || tile == 3 || tile == 5;
      config.rows[tile] = static_cast<std::uint8_t>(weights ? kTileChannels / kQuad : second ? lower : upper);
      config.bytes[tile] = 64;
    }
    _tile_loadconfig(&config);
  }

 private:
  struct alignas(64) Config {
    std::uint8_t palette = 1, start = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {};  // of a row
    std::uint8_t rows[16] = {};
  };
};

// Rows of activations at equal distances, as tiles are loaded; their scales and offsets side by side.
class TileRows {
 public:
  TileRows(const IntegerInput& in, const Activation* x, int n) : at_(x->q) {
    thread_local std::vector<float> scales;
    thread_local std::vector<std::int32_t> offsets;
    scales.clear(), offsets.clear();
    for (int i = 0; i < n; ++i) scales.push_back(*x[i].scale), offsets.push_back(*x[i].offset);
    scale = scales.data(), offset = offsets.data();
    const std::size_t bytes = in.row_bytes();
    if (n > 1) pitch_ = x[1].q - x[0].q;
    bool even = pitch_ >= static_cast<std::ptrdiff_t>(bytes);
    for (int i = 2; i < n && even; ++i) even = x[i].q - x[i - 1].q == pitch_;
    if (n == 1 || even) return;
    thread_local std::vector<std::int8_t> room;
    room.resize(bytes * static_cast<std::size_t>(n));
    for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i) std::copy(x[i].q, x[i].q + bytes, room.data() + bytes * i);
    at_ = room.data(), pitch_ = static_cast<std::ptrdiff_t>(bytes);
  }
  const float* scale;
  const std::int32_t* offset;
  const std::int8_t* row(int i) const { return at_ + pitch_ * i; }
  std::ptrdiff_t pitch() const { return pitch_; }

 private:
  const std::int8_t* at_;
  std::ptrdiff_t pitch_ = 0;
};

template <int A, int B>
void clear_tiles() {
  _tile_zero(0);
  if constexpr (B > 1) _tile_zero(1);
  if constexpr (A > 1) _tile_zero(2);
  if constexpr (A > 1 && B > 1) _tile_zero(3);
}

// Products of A tiles of rows with B tiles of outputs. `between` runs after each step: what waits neither for tiles nor makes them
// wait is done meanwhile, but only if it comes in between, as a step fills most of what a processor looks ahead.
template <int A, int B, class Between>
void add_tiles(const std::int8_t* x, std::ptrdiff_t pitch, const std::uint8_t* w, std::size_t next, int channels, Between between) {
  for (int c = 0; c < channels; c += kTileChannels, x += kTileChannels, w += kTileBytes) {
    _tile_loadd(4, x, pitch);
    _tile_loadd(6, w, 64);
    _tile_dpbsud(0, 4, 6);
    if constexpr (B > 1) {
      _tile_loadd(7, w + next, 64);
      _tile_dpbsud(1, 4, 7);
    }
    if constexpr (A > 1) {
      _tile_loadd(5, x + kTileRows * pitch, pitch);
      _tile_dpbsud(2, 5, 6);
      if constexpr (B > 1) _tile_dpbsud(3, 5, 7);
    }
    between();
  }
}

template <int A, int B>
void store_tiles(std::int32_t* to) {
  _tile_stored(0, to, 64);
  if constexpr (B > 1) _tile_stored(1, to + kTileSums, 64);
  if constexpr (A > 1) _tile_stored(2, to + 2 * kTileSums, 64);
  if constexpr (A > 1 && B > 1) _tile_stored(3, to + 3 * kTileSums, 64);
}

// Two by two tiles of each sum.
struct TileBlock {
  alignas(64) std::int32_t of[kMaxTileSums][4 * kTileSums];
};

// What is still to be made of such sums: scaled outputs, a few rows at a time.
template <class V, int B, int Sums>
class Scaling {
 public:
  Scaling(const Matrix& w, const TileRows& rows, float* const* y, bool add) : w_(w), rows_(rows), y_(y), add_(add) {
    for (int s = 1; s < Sums; ++s) shift_[s] = V::iset(w.input->tile_sums[static_cast<std::size_t>(s)].shift);
  }
  void begin(const TileBlock& sums, int tile, int row, int rows) {
    sums_ = &sums, tile_ = tile, row_ = row, done_ = 0, n_ = rows;
    for (int t = 0; t < B; ++t) scale_[t] = V::load_fp16(w_.grid.scales16 + static_cast<std::size_t>(tile + t) * kRows);
  }
  void some(int rows) {
    for (const int end = std::min(done_ + rows, n_); done_ < end; ++done_) one(done_);
  }
  void rest() { some(n_); }

 private:
  void one(int r) const {
    const auto step = V::set(rows_.scale[row_ + r]);
    const auto offset = V::iset(-rows_.offset[row_ + r]);
    const int at = 2 * (r / kTileRows) * kTileSums + r % kTileRows * kRows;
    WB_UNROLL for (int t = 0; t < B; ++t) {
      auto sum = V::iadd(V::iload(sums_->of[0] + at + t * kTileSums), offset);
      WB_UNROLL for (int s = 1; s < Sums; ++s) sum = V::iadd(sum, _mm512_sllv_epi32(V::iload(sums_->of[s] + at + t * kTileSums), shift_[s]));
      const auto total = V::mul(V::to_float(sum), V::mul(scale_[t], step));
      put<V, 1>(w_, tile_ + t, &total, y_ + row_ + r, add_);
    }
  }

  const Matrix& w_;
  const TileRows& rows_;
  float* const* y_;
  const bool add_;
  const TileBlock* sums_ = nullptr;
  typename V::F scale_[B];
  typename V::I shift_[Sums];
  int tile_ = 0, row_ = 0, done_ = 0, n_ = 0;
};

// Codes of 4 bits as bytes, for T tiles.
template <class V, int T>
const std::uint8_t* widened(const Matrix& w, int tile, std::size_t next) {
  thread_local std::vector<std::uint8_t> room;
  if (room.size() < T * next + kTileBytes) room.resize(T * next + kTileBytes);  // the last run's last tile may go on past its weights
  for (int t = 0; t < T; ++t) {
    const std::uint8_t* from = w.codes + static_cast<std::size_t>(tile + t) * w.tile_bytes;
    std::uint8_t* to = room.data() + t * next;
    for (std::size_t i = 0; i < w.tile_bytes; i += 64, to += 128) {
      const auto both = V::bytes(from + i);
      _mm512_storeu_si512(to, V::low4(both));
      _mm512_storeu_si512(to + 64, V::high4(both));
    }
  }
  return room.data();
}

// Weights of T tiles that sums take in another order than they lie in: for each tile those of all sums.
template <int T>
const std::uint8_t* gathered(const IntegerInput& in, const std::uint8_t* weights, std::size_t next, std::size_t bytes) {
  thread_local AlignedVector<std::uint8_t> room;
  if (room.size() < T * bytes) room.resize(T * bytes);
  std::uint8_t* to = room.data();
  for (int t = 0; t < T; ++t, weights += next)
    for (const TileSum& sum : in.tile_sums)
      for (const std::int32_t quad : sum.gathered) _mm512_storeu_si512(to, _mm512_loadu_si512(weights + 64 * std::max(quad, 0))), to += 64;
  return room.data();
}

// All rows of B tiles, A tiles of rows at a time. Sums are scaled, and the next tiles' weights asked for, while products run.
template <class V, int A, int B, int Sums>
void tiles_amx(const Matrix& w, const TileRows& rows, int begin, int end, float* const* y, bool add, int first, int last) {
  const IntegerInput& in = *w.input;
  const std::size_t next = w.bits == 4 ? round_up(2 * w.tile_bytes, kTileBytes) : w.tile_bytes;
  const TileSum plain{0, in.padded(), {}, 0, in.laid_out()};
  const TileSum* of = in.tile_sums.empty() ? &plain : in.tile_sums.data();
  int steps = 0;
  std::size_t again = 0;  // bytes of a tile's weights that are gathered
  for (int s = 0; s < Sums; ++s) steps += of[s].channels() / kTileChannels, again += 64 * of[s].gathered.size();
  const int blocks = (end - begin + A * kTileRows - 1) / (A * kTileRows);
  const int rows_a_step = (A * kTileRows + steps - 1) / steps;
  const auto lines = static_cast<int>((B * w.tile_bytes / 64 + static_cast<std::size_t>(steps * blocks) - 1) / static_cast<std::size_t>(steps * blocks));
  TileBlock sums[2];
  Scaling<V, B, Sums> scaling(w, rows, y, add);
  int turn = 0;
  for (int tile = first; tile + B <= last; tile += B) {
    const std::uint8_t* codes = w.codes + static_cast<std::size_t>(tile) * w.tile_bytes;
    const std::uint8_t* weights = w.bits == 4 ? widened<V, B>(w, tile, next) : codes;
    const std::uint8_t* gather = again > 0 ? gathered<B>(in, weights, next, again) : nullptr;
    const std::uint8_t* ahead = codes + B * w.tile_bytes;
    for (int row = begin; row < end; row += A * kTileRows) {
      const std::int8_t* q = rows.row(row) + in.tiles_at();
      const std::uint8_t* here = gather;
      const auto between = [&] {
        scaling.some(rows_a_step);
        for (int i = 0; i < lines; ++i, ahead += 64) V::prefetch_far(ahead);
      };
      for (int s = 0; s < Sums; ++s) {
        clear_tiles<A, B>();
        add_tiles<A, B>(q, rows.pitch(), weights + static_cast<std::size_t>(of[s].first) * kRows, next, of[s].whole, between);
        q += of[s].whole;
        const int rest = of[s].channels() - of[s].whole;
        add_tiles<A, B>(q, rows.pitch(), here, again, rest, between);
        q += rest, here += rest * kRows;
        store_tiles<A, B>(sums[turn].of[s]);
      }
      scaling.begin(sums[turn], tile, row, std::min(A * kTileRows, end - row));
      turn ^= 1;
    }
  }
  scaling.rest();
}

template <class V, int A, int Sums>
void rows_amx(const Matrix& w, const TileRows& rows, int begin, int end, float* const* y, bool add, int first, int last) {
  const int paired = last - (last - first) % 2;
  tiles_amx<V, A, 2, Sums>(w, rows, begin, end, y, add, first, paired);
  if (paired < last) tiles_amx<V, A, 1, Sums>(w, rows, begin, end, y, add, paired, last);
}

template <class V, int Sums>
void integer_amx(const Matrix& w, const Activation* x, int n, float* const* y, bool add, int first, int last) {
  const TileRows rows(*w.input, x, n);
  Tiles tiles;
  const int whole = n / (2 * kTileRows) * (2 * kTileRows);
  if (whole > 0) {
    tiles.take(2 * kTileRows);
    rows_amx<V, 2, Sums>(w, rows, 0, whole, y, add, first, last);
  }
  if (whole == n) return;
  tiles.take(n - whole);
  if (n - whole > kTileRows) rows_amx<V, 2, Sums>(w, rows, whole, n, y, add, first, last);
  else rows_amx<V, 1, Sums>(w, rows, whole, n, y, add, first, last);
}

template <class V>
void integer_amx(const Matrix& w, const Activation* x, int n, float* const* y, bool add, int first, int last) {
  switch (w.input->tile_sums.size()) {
    case 0:
    case 1: integer_amx<V, 1>(w, x, n, y, add, first, last); break;
    case 2: integer_amx<V, 2>(w, x, n, y, add, first, last); break;
    case 3: integer_amx<V, 3>(w, x, n, y, add, first, last); break;
    default: integer_amx<V, kMaxTileSums>(w, x, n, y, add, first, last); break;
  }
}

// What tiles take of a row for each sum, zeros to whole tiles; and what the weights' unsigned form adds to the sums.
inline std::int32_t add_tile_codes(const IntegerInput& in, std::int8_t* q) {
  std::int8_t* to = q + in.tiles_at();
  std::uint32_t total = 0;
  const auto add = [&](const TileSum& of) {
    __m512i sum = _mm512_setzero_si512();
    const auto place = [&](__m512i bytes) {
      _mm512_storeu_si512(to, bytes);
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), bytes);
      to += kTileChannels;
    };
    int i = 0;
    for (; i + kTileChannels <= of.held; i += kTileChannels) place(_mm512_loadu_si512(q + of.first + i));
    if (i < of.whole) place(_mm512_maskz_loadu_epi8((std::uint64_t{1} << (of.held - i)) - 1, q + of.first + i));
    for (std::size_t g = 0; g < of.gathered.size(); g += kTileChannels / kQuad) {
      const __m512i quads = _mm512_loadu_si512(of.gathered.data() + g);
      place(_mm512_mask_i32gather_epi32(_mm512_setzero_si512(), _mm512_cmpge_epi32_mask(quads, _mm512_setzero_si512()), quads, q, kQuad));
    }
    total += static_cast<std::uint32_t>(_mm512_reduce_add_epi32(sum)) << of.shift;
  };
  if (in.tile_sums.empty()) add({0, in.padded(), {}, 0, in.laid_out()});
  for (const TileSum& of : in.tile_sums) add(of);
  return static_cast<std::int32_t>(total << (in.weight_bits - 1));
}

}  // namespace
}  // namespace wb
