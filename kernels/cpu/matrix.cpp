#include "matrix.hpp"

#include <algorithm>
#include <stdexcept>

#include "half.hpp"

namespace wb {

namespace {

constexpr bool has_nibbles(int bits) { return bits >= 4 && bits <= 7; }
constexpr bool has_crumbs(int bits) { return bits == 2 || bits == 3 || bits == 6 || bits == 7; }
constexpr bool has_plane(int bits) { return bits == 3 || bits == 5 || bits == 7; }
constexpr std::size_t chunk_bytes(int bits) { return static_cast<std::size_t>(bits) * kRows * kChunk / 8; }

// Put the code of (lane r, channel c of the chunk) into a packed chunk.
void put_packed(std::uint8_t* chunk, int bits, int r, int c, unsigned code) {
  const int m = c / 4, byte = 4 * r + c % 4;
  if (bits == 8) {
    chunk[64 * m + byte] = static_cast<std::uint8_t>(code);
    return;
  }
  if (has_nibbles(bits)) {
    chunk[64 * (m / 2) + byte] |= static_cast<std::uint8_t>((code & 15u) << (4 * (m % 2)));
    code >>= 4;
    chunk += 128;
  }
  if (has_crumbs(bits)) {
    chunk[byte] |= static_cast<std::uint8_t>((code & 3u) << (2 * m));
    code >>= 2;
    chunk += 64;
  }
  if (has_plane(bits)) chunk[8 * m + byte / 8] |= static_cast<std::uint8_t>((code & 1u) << (byte % 8));
}

unsigned get_packed(const std::uint8_t* chunk, int bits, int r, int c) {
  const int m = c / 4, byte = 4 * r + c % 4;
  if (bits == 8) return chunk[64 * m + byte];
  unsigned code = 0;
  int shift = 0;
  if (has_nibbles(bits)) {
    code = (chunk[64 * (m / 2) + byte] >> (4 * (m % 2))) & 15u;
    shift = 4;
    chunk += 128;
  }
  if (has_crumbs(bits)) {
    code |= ((chunk[byte] >> (2 * m)) & 3u) << shift;
    shift += 2;
    chunk += 64;
  }
  if (has_plane(bits)) code |= ((chunk[8 * m + byte / 8] >> (byte % 8)) & 1u) << shift;
  return code;
}

// Put the code of a row's padded channel into the pieces of the row, or get it.
void put_in_row(std::uint8_t* row, int bits, int place, unsigned code) {
  std::uint8_t* piece = row + static_cast<std::size_t>(place / kPieceChannels) * 8 * static_cast<std::size_t>(bits);
  const int c = place % kPieceChannels;
  if (bits == 8) {
    piece[c] = static_cast<std::uint8_t>(code);
    return;
  }
  if (bits >= 4) {
    piece[c % 32] |= static_cast<std::uint8_t>((code & 15u) << (4 * (c / 32)));
    code >>= 4, bits -= 4, piece += 32;
  }
  for (int plane = 0; plane < bits; ++plane) piece[8 * plane + c / 8] |= static_cast<std::uint8_t>(((code >> plane) & 1u) << (c % 8));
}

unsigned get_from_row(const std::uint8_t* row, int bits, int place) {
  const std::uint8_t* piece = row + static_cast<std::size_t>(place / kPieceChannels) * 8 * static_cast<std::size_t>(bits);
  const int c = place % kPieceChannels;
  if (bits == 8) return piece[c];
  unsigned code = 0;
  int shift = 0;
  if (bits >= 4) {
    code = (piece[c % 32] >> (4 * (c / 32))) & 15u;
    shift = 4, piece += 32;
  }
  for (int plane = 0; plane < bits - shift; ++plane) code |= ((piece[8 * plane + c / 8] >> (c % 8)) & 1u) << (shift + plane);
  return code;
}

unsigned bits_at(const std::uint8_t* stream, std::size_t index, int bits) {
  const std::size_t at = index * static_cast<std::size_t>(bits);
  unsigned word = stream[at / 8];
  if (at % 8 + static_cast<std::size_t>(bits) > 8) word |= static_cast<unsigned>(stream[at / 8 + 1]) << 8;
  return (word >> (at % 8)) & ((1u << bits) - 1u);
}

Matrix sized(Kind kind, int out, int in) {
  if (out < 1 || in < 1) throw std::invalid_argument("A matrix needs at least one row and one column.");
  Matrix m;
  m.kind = kind;
  m.out = out;
  m.in = in;
  m.tiles = (out + kRows - 1) / kRows;
  return m;
}

// Where a group's entry of a row lies in tables: [tile][group][16], or [row][group].
std::size_t lane_of(const Matrix& m, int row, int g) {
  const auto groups = static_cast<std::size_t>(m.grouping.n_groups);
  if (m.by_row) return static_cast<std::size_t>(row) * groups + static_cast<std::size_t>(g);
  return (static_cast<std::size_t>(row / kRows) * groups + static_cast<std::size_t>(g)) * kRows + static_cast<std::size_t>(row % kRows);
}

// Spread a per-row, per-group table so; sixteen are read at once from any place.
template <class T, class Get>
T* lanes(Arena& arena, const Matrix& m, Get get) {
  const int groups = m.grouping.n_groups;
  T* to = arena.take<T>(static_cast<std::size_t>(m.tiles) * groups * kRows + kRows);
  for (int row = 0; row < m.out; ++row)
    for (int g = 0; g < groups; ++g) to[lane_of(m, row, g)] = get(row, g);
  return to;
}

}  // namespace

Grouping Grouping::of(int in, int group, int block) {
  Grouping it;
  it.in = in;
  it.group = std::min(group, in);
  it.n_groups = (in + it.group - 1) / it.group;
  it.stride = static_cast<int>(round_up(static_cast<std::size_t>(it.group), kChunk));
  it.last = static_cast<int>(round_up(static_cast<std::size_t>(in - it.group * (it.n_groups - 1)), kChunk));
  it.padded = it.stride * (it.n_groups - 1) + it.last;
  it.block = block;
  it.n_blocks = (it.n_groups - 1) * ((it.stride + block - 1) / block) + (it.last + block - 1) / block;
  return it;
}

std::size_t Grid::bytes_per_lane() const {
  return (scales16 != nullptr ? 2u : 0u) + (scales32 != nullptr ? 4u : 0u) + (zeros != nullptr ? 1u : 0u) +
         (minima16 != nullptr ? 2u : 0u) + (minima32 != nullptr ? 4u : 0u);
}

std::size_t Matrix::read_bytes(int at_bits) const {
  const std::size_t per_group = static_cast<std::size_t>(tiles) * grouping.n_groups * kRows;
  std::size_t bytes = 0;
  switch (kind) {
    case Kind::f32:
    case Kind::bf16:
    case Kind::integer:
    case Kind::packed: bytes = tile_bytes * static_cast<std::size_t>(tiles); break;
    case Kind::planes: bytes = plane_bytes * static_cast<std::size_t>(at_bits > 0 ? at_bits : bits); break;
    case Kind::columns: return 0;  // counted by what they lie in
    case Kind::tables: {
      const auto planes = static_cast<std::size_t>(at_bits > 0 ? at_bits : bits);
      bytes = plane_bytes * planes + (static_cast<std::size_t>(tiles) * kRows * 2 << planes);
      break;
    }
  }
  bytes += per_group * grid_at(at_bits).bytes_per_lane();
  if (bias != nullptr) bytes += 4 * static_cast<std::size_t>(tiles) * kRows;
  return bytes;
}

Matrix make_groups(Arena& arena, int out, int in, const GroupSource& source) {
  const int bits = source.bits;
  if (bits < 2 || bits > 8) throw std::invalid_argument("Group codes have 2 to 8 bits.");
  if (source.group < 1) throw std::invalid_argument("A group has at least one channel.");
  if (source.block < kChunk || source.block > kBlock || source.block % kChunk != 0)
    throw std::invalid_argument("A block of activations is 16, 32, 48 or 64 channels.");
  Matrix m = sized(source.planes ? Kind::planes : Kind::packed, out, in);
  m.bits = bits;
  m.grouping = Grouping::of(in, source.group, source.block);
  const Grouping& at = m.grouping;
  const std::size_t chunks = static_cast<std::size_t>(at.padded) / kChunk;
  m.tile_bytes = chunks * (source.planes ? chunk_bytes(1) : chunk_bytes(bits));
  m.by_row = source.by_row;
  if (source.by_row && source.planes) throw std::invalid_argument("Planes do not lie row by row.");
  // A group that is no whole number of pieces is read where its lanes begin: all pieces of the padded row, one after another.
  if (source.by_row)
    m.tile_bytes = kRows * round_up(static_cast<std::size_t>(at.padded), kPieceChannels) / 8 * static_cast<std::size_t>(bits);
  m.plane_bytes = source.planes ? m.tile_bytes * static_cast<std::size_t>(m.tiles) : 0;
  auto* codes = arena.take<std::uint8_t>(source.planes ? m.plane_bytes * static_cast<std::size_t>(bits)
                                                       : m.tile_bytes * static_cast<std::size_t>(m.tiles));
  for (int row = 0; row < out; ++row) {
    const int r = row % kRows;
    std::uint8_t* tile = codes + static_cast<std::size_t>(row / kRows) * m.tile_bytes;
    for (int c = 0; c < in; ++c) {
      const unsigned code =
          source.codes != nullptr
              ? source.codes[static_cast<std::size_t>(row) * in + c]
              : bits_at(source.packed + static_cast<std::size_t>(row) * source.packed_row, static_cast<std::size_t>(c), bits);
      const int place = c / at.group * at.stride + c % at.group;
      if (source.by_row) {
        put_in_row(codes + static_cast<std::size_t>(row) * (m.tile_bytes / kRows), bits, place, code);
        continue;
      }
      const int chunk = place / kChunk, within = place % kChunk;
      if (!source.planes) {
        put_packed(tile + static_cast<std::size_t>(chunk) * chunk_bytes(bits), bits, r, within, code);
        continue;
      }
      const int byte = 4 * r + within % 4;
      const std::size_t offset = static_cast<std::size_t>(chunk) * chunk_bytes(1) + 8 * (within / 4) + byte / 8;
      for (int plane = 0; plane < bits; ++plane)
        tile[m.plane_bytes * static_cast<std::size_t>(plane) + offset] |=
            static_cast<std::uint8_t>(((code >> (bits - 1 - plane)) & 1u) << (byte % 8));
    }
  }
  m.codes = codes;
  const auto index = [&](int row, int g) { return static_cast<std::size_t>(row) * at.n_groups + g; };
  if (source.scales16 != nullptr) m.grid.scales16 = lanes<std::uint16_t>(arena, m, [&](int r, int g) { return source.scales16[index(r, g)]; });
  if (source.scales32 != nullptr) m.grid.scales32 = lanes<float>(arena, m, [&](int r, int g) { return source.scales32[index(r, g)]; });
  if (source.minima16 != nullptr) m.grid.minima16 = lanes<std::uint16_t>(arena, m, [&](int r, int g) { return source.minima16[index(r, g)]; });
  if (source.minima32 != nullptr) m.grid.minima32 = lanes<float>(arena, m, [&](int r, int g) { return source.minima32[index(r, g)]; });
  if (source.zeros != nullptr) {
    m.grid.zeros = lanes<std::uint8_t>(arena, m, [&](int r, int g) { return source.zeros[index(r, g)]; });
  } else if (source.packed_zeros != nullptr) {
    m.grid.zeros = lanes<std::uint8_t>(arena, m, [&](int r, int g) {
      return static_cast<std::uint8_t>(bits_at(source.packed_zeros + static_cast<std::size_t>(r) * source.packed_zeros_row,
                                               static_cast<std::size_t>(g), bits));
    });
  } else if (source.minima16 == nullptr && source.minima32 == nullptr) {
    m.grid.zero = static_cast<float>(1 << (bits - 1));
  }
  return m;
}

void add_width(Arena& arena, Matrix& m, int bits, const std::uint16_t* scales16, const std::uint8_t* packed_zeros, std::size_t packed_zeros_row) {
  if (m.kind != Kind::planes || bits < 1 || bits > m.bits) throw std::invalid_argument("A width of its own needs planes, and at most as many bits as they have.");
  Grid& grid = m.widths[static_cast<std::size_t>(bits)];
  grid.scales16 = lanes<std::uint16_t>(arena, m, [&](int r, int g) { return scales16[static_cast<std::size_t>(r) * m.grouping.n_groups + g]; });
  grid.zeros = lanes<std::uint8_t>(arena, m, [&](int r, int g) {
    return static_cast<std::uint8_t>(bits_at(packed_zeros + static_cast<std::size_t>(r) * packed_zeros_row, static_cast<std::size_t>(g), bits));
  });
  grid.step = 0.5f;
  grid.zero = 0.5f * static_cast<float>((1 << (bits - 1)) - 1);
  if (bits == m.bits) m.grid = grid;
}

Matrix make_tables(Arena& arena, int out, int in, int bits, const std::uint8_t* packed, std::size_t packed_row) {
  if (bits < 2 || bits > kMaxPlanes) throw std::invalid_argument("Codes of tables have 2 to 8 bits.");
  Matrix m = sized(Kind::tables, out, in);
  m.bits = bits;
  m.grouping = Grouping::of(in, in, kWord);
  m.plane_bytes = m.row_bytes() * static_cast<std::size_t>(m.tiles) * kRows;
  auto* codes = arena.take<std::uint8_t>(m.plane_bytes * static_cast<std::size_t>(bits));
  for (int row = 0; row < out; ++row) {
    const std::uint8_t* stream = packed + static_cast<std::size_t>(row) * packed_row;
    std::uint8_t* to = codes + static_cast<std::size_t>(row) * m.row_bytes();
    for (int c = 0; c < in; ++c) {
      const unsigned code = bits_at(stream, static_cast<std::size_t>(c), bits);
      for (int plane = 0; plane < bits; ++plane)
        to[m.plane_bytes * static_cast<std::size_t>(plane) + static_cast<std::size_t>(c) / 8] |=
            static_cast<std::uint8_t>(((code >> (bits - 1 - plane)) & 1u) << (c % 8));
    }
  }
  m.codes = codes;
  return m;
}

void add_table(Arena& arena, Matrix& m, int bits, const std::uint16_t* table) {
  if (m.kind != Kind::tables || bits < 2 || bits > m.bits)
    throw std::invalid_argument("A table needs codes of at least as many bits as it is looked up by, and those at least 2.");
  auto* to = arena.take<std::uint16_t>(static_cast<std::size_t>(m.tiles) * kRows << bits);
  std::copy(table, table + (static_cast<std::size_t>(m.out) << bits), to);
  m.tables[static_cast<std::size_t>(bits)] = to;
}

// Dense rows side by side, each padded with zeros to whole vectors of 64 bytes.
template <class T>
void lay_rows(Arena& arena, Matrix& m, const T* rows) {
  const std::size_t length = round_up(static_cast<std::size_t>(m.in), kAlign / sizeof(T));
  m.by_row = true;
  m.tile_bytes = length * sizeof(T) * kRows;
  auto* to = arena.take<T>(static_cast<std::size_t>(m.tiles) * kRows * length);
  for (int row = 0; row < m.out; ++row)
    std::copy_n(rows + static_cast<std::size_t>(row) * static_cast<std::size_t>(m.in), m.in, to + static_cast<std::size_t>(row) * length);
  m.codes = reinterpret_cast<const std::uint8_t*>(to);
}

Matrix make_f32(Arena& arena, int out, int in, const float* rows, bool by_row) {
  Matrix m = sized(Kind::f32, out, in);
  m.bits = 32;
  if (by_row) {
    lay_rows(arena, m, rows);
    return m;
  }
  m.tile_bytes = static_cast<std::size_t>(in) * kRows * 4;
  auto* to = arena.take<float>(static_cast<std::size_t>(m.tiles) * in * kRows);
  for (int row = 0; row < out; ++row)
    for (int c = 0; c < in; ++c)
      to[(static_cast<std::size_t>(row / kRows) * in + c) * kRows + row % kRows] = rows[static_cast<std::size_t>(row) * in + c];
  m.codes = reinterpret_cast<const std::uint8_t*>(to);
  return m;
}

// [tile][in / 2][16][2]: two neighbouring channels of a row side by side, as bf16 dot products take them.
Matrix make_bf16(Arena& arena, int out, int in, const std::uint16_t* rows, bool by_row) {
  Matrix m = sized(Kind::bf16, out, in);
  m.bits = 16;
  if (by_row) {
    lay_rows(arena, m, rows);
    return m;
  }
  const std::size_t pairs = static_cast<std::size_t>(in + 1) / 2;
  m.tile_bytes = pairs * kRows * 4;
  auto* to = arena.take<std::uint16_t>(static_cast<std::size_t>(m.tiles) * pairs * kRows * 2);
  for (int row = 0; row < out; ++row)
    for (int c = 0; c < in; ++c)
      to[((static_cast<std::size_t>(row / kRows) * pairs + c / 2) * kRows + row % kRows) * 2 + c % 2] =
          rows[static_cast<std::size_t>(row) * in + c];
  m.codes = reinterpret_cast<const std::uint8_t*>(to);
  return m;
}

void read_row(const Matrix& m, int row, float* to) {
  const std::size_t tile = static_cast<std::size_t>(row / kRows);
  const int r = row % kRows;
  const std::uint8_t* base = m.codes + tile * m.tile_bytes;
  const std::uint8_t* own = base + static_cast<std::size_t>(r) * (m.tile_bytes / kRows);  // where rows are side by side
  if (m.by_row && m.kind == Kind::f32) {
    std::copy_n(reinterpret_cast<const float*>(own), m.in, to);
    return;
  }
  if (m.by_row && m.kind == Kind::bf16) {
    for (int c = 0; c < m.in; ++c) to[c] = bf16_to_float(reinterpret_cast<const std::uint16_t*>(own)[c]);
    return;
  }
  if (m.kind == Kind::f32) {
    const auto* w = reinterpret_cast<const float*>(base);
    for (int c = 0; c < m.in; ++c) to[c] = w[static_cast<std::size_t>(c) * kRows + r];
    return;
  }
  if (m.kind == Kind::bf16) {
    const auto* w = reinterpret_cast<const std::uint16_t*>(base);
    for (int c = 0; c < m.in; ++c) to[c] = bf16_to_float(w[(static_cast<std::size_t>(c / 2) * kRows + r) * 2 + c % 2]);
    return;
  }
  if (m.kind == Kind::tables) {
    const std::uint16_t* table = m.tables[static_cast<std::size_t>(m.bits)] + (static_cast<std::size_t>(row) << m.bits);
    const std::uint8_t* codes = m.codes + static_cast<std::size_t>(row) * m.row_bytes();
    for (int c = 0; c < m.in; ++c) {
      unsigned code = 0;
      for (int plane = 0; plane < m.bits; ++plane)
        code = 2 * code + ((codes[m.plane_bytes * static_cast<std::size_t>(plane) + static_cast<std::size_t>(c) / 8] >> (c % 8)) & 1u);
      to[c] = fp16_to_float(table[code]);
    }
    return;
  }
  const Grouping& at = m.grouping;
  for (int g = 0; g < at.n_groups; ++g) {
    const std::size_t lane = lane_of(m, row, g);
    const float scale = m.grid.scales16 != nullptr ? fp16_to_float(m.grid.scales16[lane]) : m.grid.scales32[lane];
    const float zero = m.grid.zero + (m.grid.zeros != nullptr ? m.grid.step * static_cast<float>(m.grid.zeros[lane]) : 0.0f);
    const float minimum = m.grid.minima16 != nullptr ? fp16_to_float(m.grid.minima16[lane])
                                                     : m.grid.minima32 != nullptr ? m.grid.minima32[lane] : 0.0f;
    for (int c = 0; c < at.channels(g); ++c) {
      const int place = g * at.stride + c, chunk = place / kChunk, within = place % kChunk;
      unsigned code = 0;
      if (m.by_row) {
        code = get_from_row(own, m.bits, place);
      } else if (m.kind == Kind::packed) {
        code = get_packed(base + static_cast<std::size_t>(chunk) * chunk_bytes(m.bits), m.bits, r, within);
      } else {
        const int byte = 4 * r + within % 4;
        const std::size_t offset = static_cast<std::size_t>(chunk) * chunk_bytes(1) + 8 * (within / 4) + byte / 8;
        for (int plane = 0; plane < m.bits; ++plane)
          code = 2 * code + ((base[m.plane_bytes * static_cast<std::size_t>(plane) + offset] >> (byte % 8)) & 1u);
      }
      to[g * at.group + c] = (static_cast<float>(code) - zero) * scale + minimum;
    }
  }
}

}  // namespace wb
