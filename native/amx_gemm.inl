// Panels times many rows on AMX tiles. Included by kernels_amx.cpp.
//
// The integers are the same as on VNNI and the float sums run in the same order, so q4 and q8 give the same
// bits on either. bfloat16 takes the activations as hi + lo, so that nothing but the weights is rounded.
namespace farthing {
namespace {

// The compiler does not know that tile loads read memory: what was stored before must be there.
inline void stored() { asm volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t columns[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int r, int bytes) {
    rows[tile] = static_cast<uint8_t>(r);
    columns[tile] = static_cast<uint16_t>(bytes);
  }
  void load() const {
    stored();
    _tile_loadconfig(this);
  }
};

// Tiles 0, 1 and 2, 3: sums of 16 rows by two panels; 4, 5: activations; 6, 7: weights.
void configure(int rows0, int rows1, int step_bytes) {
  TileConfig c;
  for (int i = 0; i < 2; ++i) {
    c.set(i, rows0, 64);
    if (rows1) c.set(2 + i, rows1, 64);
    c.set(6 + i, step_bytes / 4, 64);
  }
  c.set(4, rows0, step_bytes);
  c.set(5, rows1 ? rows1 : rows0, step_bytes);
  c.load();
}

struct Scratch {
  uint8_t* at = nullptr;
  size_t size = 0;
  uint8_t* take(size_t bytes) {
    if (bytes > size) {
      _mm_free(at);
      at = static_cast<uint8_t*>(_mm_malloc(bytes, 64));
      size = bytes;
    }
    return at;
  }
  ~Scratch() { _mm_free(at); }
};
thread_local Scratch expanded;

// Nibbles to bytes, zero blocks filled in: what a tile can load. Returns the panel's bytes.
const uint8_t* expand_panel(const Matrix& w, const uint8_t* record, uint8_t* out) {
  const uint8_t *mask = record, *p = record + w.head_bytes();
  const bool four = w.format == Format::q4;
  if (!four && !w.sparse) return p;
  uint8_t* to = out;
  for (int k = 0; k < w.kp; k += kBlock) {
    if (w.sparse && !(mask[k / 64] >> (k % 64 / kBlock) & 1)) {
      for (int j = 0; j < 4; ++j, to += 64) _mm512_store_si512(to, _mm512_set1_epi8(four ? 8 : -128));
      continue;
    }
    for (int j = 0; j < (four ? 2 : 4); ++j, p += 64) {
      const __m512i v = _mm512_loadu_si512(p);
      prefetch(p + kAhead);
      _mm512_store_si512(to, four ? low_nibbles(v) : v);
      to += 64;
      if (four) _mm512_store_si512(to, high_nibbles(v)), to += 64;
    }
  }
  return out;
}

inline void flush_rows(const Matrix& w, const uint8_t* record, const int32_t* sums, const Act& x, int rows, int g, float* out, int ldo) {
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(record + w.mask_bytes() + 64);
  const int8_t* zeros = reinterpret_cast<const int8_t*>(scales + w.groups() * 16);
  const f32x16 scale = w.format == Format::q4 ? half_to_float(scales + g * 16) : splat(1.0f);
  for (int m = 0; m < rows; ++m, out += ldo) {
    const int32_t comp = x.comp[m * x.groups + g];
    i32x16 sum = load<i32x16>(sums + 16 * m) + comp;
    if (w.zero) sum += __builtin_convertvector(load<i8x16>(zeros + g * 16), i32x16) * (comp / 8);
    const f32x16 s = w.format == Format::q4 ? scale * x.scale[m * x.groups + g] : splat(x.scale[m * x.groups + g]);
    store(out, fma(to_float(sum), s, g ? loadf(out) : f32x16{}));
  }
}

template <int Rows, int Panels>
inline void dot_step(const int8_t* q, int ld, const uint8_t* const* data, int k) {
  _tile_loadd(4, q + k, ld);
  if (Rows == 2) _tile_loadd(5, q + static_cast<size_t>(16) * ld + k, ld);
  _tile_loadd(6, data[0] + k * 16, 64);
  if (Panels == 2) _tile_loadd(7, data[1] + k * 16, 64);
  _tile_dpbsud(0, 4, 6);
  if (Panels == 2) _tile_dpbsud(1, 4, 7);
  if (Rows == 2) _tile_dpbsud(2, 5, 6);
  if (Rows == 2 && Panels == 2) _tile_dpbsud(3, 5, 7);
}

// 16 or 32 rows by one or two panels.
template <int Rows, int Panels>
void quantized_block(const Matrix& w, const uint8_t* const* record, const uint8_t* const* data, const Act& x, int rows, float* out, int ldo) {
  const int step = w.group % 64 ? 32 : 64, rows0 = rows < 16 ? rows : 16, rows1 = rows - rows0;
  alignas(64) int32_t sums[4][16 * 16];
  configure(rows0, rows1, step);
  for (int g = 0, k = 0; k < w.kp; ++g) {
    _tile_zero(0);
    if (Panels == 2) _tile_zero(1);
    if (Rows == 2) _tile_zero(2);
    if (Rows == 2 && Panels == 2) _tile_zero(3);
    const int end = k + w.group < w.kp ? k + w.group : w.kp;
    for (; k < end; k += step) dot_step<Rows, Panels>(x.q, x.ld, data, k);
    _tile_stored(0, sums[0], 64);
    if (Panels == 2) _tile_stored(1, sums[1], 64);
    if (Rows == 2) _tile_stored(2, sums[2], 64);
    if (Rows == 2 && Panels == 2) _tile_stored(3, sums[3], 64);
    for (int p = 0; p < Panels; ++p) {
      flush_rows(w, record[p], sums[p], x, rows0, g, out + 16 * p, ldo);
      if (Rows == 2) flush_rows(w, record[p], sums[2 + p], row(x, 16), rows1, g, out + static_cast<size_t>(16) * ldo + 16 * p, ldo);
    }
  }
  for (int p = 0; p < Panels; ++p) {
    const f32x16 scale = load<f32x16>(record[p] + w.mask_bytes());
    for (int m = 0; m < rows; ++m) {
      float* o = out + static_cast<size_t>(m) * ldo + 16 * p;
      store(o, loadf(o) * scale);
    }
  }
}

// C += (hi + lo) B for 16 or 32 rows by one or two panels.
template <int Rows, int Panels>
void bf16_block(const Matrix& w, const uint8_t* const* data, const Act& x, int rows, float* out, int ldo) {
  const int rows0 = rows < 16 ? rows : 16, rows1 = rows - rows0;
  configure(rows0, rows1 ? rows1 : rows0, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int k = 0; k < w.kp; k += 32) {
    _tile_loadd(6, data[0] + k * 32, 64);
    if (Panels == 2) _tile_loadd(7, data[1] + k * 32, 64);
    for (int i = 0; i < 16; i += 4) prefetch(data[0] + k * 32 + 64 * i + kAhead);
    for (int half = 0; half < 2; ++half) {
      const uint16_t* a = half ? x.lo : x.hi;
      _tile_loadd(4, a + k, x.ld * 2);
      _tile_dpbf16ps(0, 4, 6);
      if (Panels == 2) _tile_dpbf16ps(1, 4, 7);
      if (Rows != 2) continue;
      _tile_loadd(5, a + static_cast<size_t>(16) * x.ld + k, x.ld * 2);
      _tile_dpbf16ps(2, 5, 6);
      if (Panels == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, ldo * 4);
  if (Panels == 2) _tile_stored(1, out + 16, ldo * 4);
  if (Rows == 2) _tile_stored(2, out + static_cast<size_t>(16) * ldo, ldo * 4);
  if (Rows == 2 && Panels == 2) _tile_stored(3, out + static_cast<size_t>(16) * ldo + 16, ldo * 4);
}

constexpr int kTileRows = 6;  // fewer rows are faster on vectors

bool fits_tiles(const Matrix& w, const Act& x, int rows) {
  if (rows < kTileRows) return false;
  if (w.format == Format::bf16) return x.hi != nullptr;
  return w.quantized() && w.group % 32 == 0 && (!w.sparse || w.kp % 64 == 0) && w.kp % 32 == 0;
}

template <int Panels>
void tile_panels(const Matrix& w, int panel, const Act& x, int rows, float* out, int ldo) {
  const uint8_t *record[2], *data[2];
  for (int p = 0; p < Panels; ++p) {
    record[p] = w.record(panel + p);
    if (w.quantized()) {
      const size_t bytes = static_cast<size_t>(w.kp) * 16;
      data[p] = expand_panel(w, record[p], expanded.take(2 * bytes) + p * bytes);
    } else {
      data[p] = record[p] + w.head_bytes();
    }
  }
  for (int m = 0; m < rows; m += 32) {
    const int some = rows - m < 32 ? rows - m : 32;
    const Act a = row(x, m);
    float* o = out + static_cast<size_t>(m) * ldo;
    if (w.quantized()) some > 16 ? quantized_block<2, Panels>(w, record, data, a, some, o, ldo) : quantized_block<1, Panels>(w, record, data, a, some, o, ldo);
    else some > 16 ? bf16_block<2, Panels>(w, data, a, some, o, ldo) : bf16_block<1, Panels>(w, data, a, some, o, ldo);
  }
}

void amx_tile(const Matrix& w, int panel, int count, const Act& x, int rows, float* out, int ldo) {
  if (!fits_tiles(w, x, rows)) return tile(w, panel, count, x, rows, out, ldo);
  int i = 0;
  for (; i + 2 <= count; i += 2) tile_panels<2>(w, panel + i, x, rows, out + 16 * i, ldo);
  if (i < count) tile_panels<1>(w, panel + i, x, rows, out + 16 * i, ldo);
  _tile_release();
}

}  // namespace
}  // namespace farthing
