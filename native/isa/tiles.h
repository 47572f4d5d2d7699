// AMX tiles: the processor's, or, with FARTHING_EMULATE_AMX, emulated in AVX-512 BF16 for tests on machines
// without them. Emulated tiles compute what Intel's manual defines and abort where the processor would fault.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace farthing {

// The compiler does not know that tile loads read memory; earlier stores must be complete.
inline void stored() { asm volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t columns[16] = {};  // bytes
  uint8_t rows[16] = {};

  void set(int tile, int r, int bytes) {
    rows[tile] = static_cast<uint8_t>(r);
    columns[tile] = static_cast<uint16_t>(bytes);
  }
  inline void load() const;
};

}  // namespace farthing

#if defined(FARTHING_EMULATE_AMX)
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace farthing::emulated {

constexpr int kTiles = 8, kTileRows = 16, kTileBytes = 64;

struct Tile {
  int rows, bytes;  // of a row; no rows: not configured
  alignas(64) uint8_t at[kTileRows][kTileBytes];
};
inline thread_local Tile tiles[kTiles];

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

inline Tile& configured(int tile) {
  require(tile >= 0 && tile < kTiles && tiles[tile].rows, "a tile is used that is not configured");
  return tiles[tile];
}

inline void load_config(const TileConfig& c) {
  require(c.palette == 1 && c.start == 0, "the palette or the start row is invalid");
  for (int i = 0; i < 16; ++i) {
    require(!c.rows[i] == !c.columns[i] && c.rows[i] <= kTileRows && c.columns[i] <= kTileBytes &&
                (i < kTiles || !c.rows[i]),
            "a tile's shape is invalid");
    if (i < kTiles) tiles[i] = {c.rows[i], c.columns[i], {}};
  }
}

inline void release() {
  for (Tile& t : tiles) t.rows = 0;
}

inline void zero(int tile) { std::memset(configured(tile).at, 0, sizeof(Tile::at)); }

inline void load(int tile, const void* from, int64_t stride) {
  zero(tile);
  Tile& t = tiles[tile];
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(t.at[r], static_cast<const uint8_t*>(from) + r * stride, static_cast<size_t>(t.bytes));
}

inline void store(int tile, void* to, int64_t stride) {
  const Tile& t = configured(tile);
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(static_cast<uint8_t*>(to) + r * stride, t.at[r], static_cast<size_t>(t.bytes));
}

// Checks the shapes of C += A B, B in rows of four bytes a column; calls add(row of C, row of A, row of B).
template <class F>
inline void product(int c, int a, int b, F&& add) {
  Tile &out = configured(c), &x = configured(a), &y = configured(b);
  require(c != a && c != b && a != b, "the tiles of a product are not distinct");
  require(out.rows == x.rows && out.bytes == y.bytes && x.bytes == 4 * y.rows, "a product's shapes differ");
  for (int m = 0; m < out.rows; ++m) add(out.at[m], x.at[m], y);
}

inline __m512i dword(const uint8_t* row, int k) {
  int32_t v;
  std::memcpy(&v, row + 4 * k, sizeof v);
  return _mm512_set1_epi32(v);
}

inline void dot_signed_unsigned(int c, int a, int b) {
  product(c, a, b, [](uint8_t* out, const uint8_t* x, const Tile& y) {
    __m512i sum = _mm512_load_si512(out);
    for (int k = 0; k < y.rows; ++k) sum = _mm512_dpbusd_epi32(sum, _mm512_load_si512(y.at[k]), dword(x, k));
    _mm512_store_si512(out, sum);
  });
}

// Even and odd columns are summed apart from zero, then together, then to what C holds, without subnormals.
inline void dot_bf16(int c, int a, int b) {
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(mode | 0x8040);  // flush results to zero, read subnormals as zero
  product(c, a, b, [](uint8_t* out, const uint8_t* x, const Tile& y) {
    const auto even = [](__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); };
    const auto odd = [](__m512i v) {
      return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    };
    __m512 sum = _mm512_setzero_ps(), other = _mm512_setzero_ps();
    for (int k = 0; k < y.rows; ++k) {
      const __m512i v = dword(x, k), w = _mm512_load_si512(y.at[k]);
      sum = _mm512_fmadd_ps(even(v), even(w), sum);
      other = _mm512_fmadd_ps(odd(v), odd(w), other);
    }
    _mm512_store_ps(out, _mm512_add_ps(_mm512_load_ps(out), _mm512_add_ps(sum, other)));
  });
  _mm_setcsr(mode);
}

}  // namespace farthing::emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) farthing::emulated::load_config(*(config))
#define _tile_release() farthing::emulated::release()
#define _tile_zero(t) farthing::emulated::zero(t)
#define _tile_loadd(t, from, stride) farthing::emulated::load(t, from, stride)
#define _tile_stored(t, to, stride) farthing::emulated::store(t, to, stride)
#define _tile_dpbsud(c, a, b) farthing::emulated::dot_signed_unsigned(c, a, b)
#define _tile_dpbf16ps(c, a, b) farthing::emulated::dot_bf16(c, a, b)
#endif

namespace farthing {

inline void TileConfig::load() const {
  stored();
  _tile_loadconfig(this);
}

}  // namespace farthing
