// Panels times many rows on AMX tiles. Included by kernels_amx.cpp.
//
// No result depends on the number of rows. Integers give the same bits as on VNNI, the same sums in the same
// order, so few rows take the vector loops. bfloat16 sums in the order of tiles, so all rows take tiles;
// their activations are hi + lo, and nothing but the weights is rounded.
namespace farthing {
namespace {

constexpr int kAhead = 4096;  // bytes of prefetch that one core needs in flight

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

// A panel's factors, four columns in 64 bytes, as tiles read them.
template <Format F>
const uint8_t* expand_panel(const Matrix& w, const uint8_t* record, uint8_t* out) {
  const uint8_t* p = record + w.head_bytes();
  if constexpr (traits(F).bits == 8) return p;
  constexpr int step = traits(F).step(), bytes = step * traits(F).bytes_a_column();
  uint8_t* to = out;
  for (int k = 0; k < w.kp; k += step, p += bytes, to += step * kPanel)
    for_quads<F>([&]<int I>() __attribute__((always_inline)) {
      if (I % 2 == 0) prefetch(p + kAhead + I * 32);
      _mm512_store_si512(to + 64 * I, quad<F, I>(p));
    });
  return out;
}

// Integer sums of group g into the float sums of up to 16 rows by one panel.
template <Format F, bool Zero>
void flush_tile(const Matrix& w, const uint8_t* record, int g, const int32_t* sums, const Act& x, int rows,
                float* out) {
  const GroupNumbers n = group_numbers<F, Zero>(w, record + 64, g);
#pragma GCC unroll 4
  for (int m = 0; m < rows; ++m) {
    const int at = m * x.groups + g;
    f32x16 total = loadf(out + 16 * m);
    const i32x16 sum = load<i32x16>(sums + 16 * m);
    add_sum<F, Zero>(n, starts_at_zero(F) ? sum : sum + x.comp[at], x.comp[at], x.scale[at], total);
    store(out + 16 * m, total);
  }
}

// What tiles need to know of a format.
struct TileFormat {
  const uint8_t* (*expand)(const Matrix& w, const uint8_t* record, uint8_t* out) = nullptr;
  void (*flush)(const Matrix& w, const uint8_t* record, int g, const int32_t* sums, const Act& x, int rows,
                float* out) = nullptr;
};

template <size_t... I>
TileFormat tile_format(const Matrix& w, std::index_sequence<I...>) {
  TileFormat found;
  const auto try_one = [&]<Format F>() {
    if constexpr (traits(F).quantized() && traits(F).planes == Planes::none) {
      if (w.format == F) found = {expand_panel<F>, flush_tile<F, false>};
      if constexpr (traits(F).zeros())
        if (w.format == F && w.zero) found.flush = flush_tile<F, true>;
    }
  };
  (try_one.template operator()<Format{I}>(), ...);
  return found;
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

template <int Rows, int Panels>
inline void store_sums(int32_t (*sums)[16 * 16]) {
  _tile_stored(0, sums[0], 64);
  if (Panels == 2) _tile_stored(1, sums[1], 64);
  if (Rows == 2) _tile_stored(2, sums[2], 64);
  if (Rows == 2 && Panels == 2) _tile_stored(3, sums[3], 64);
}

// 16 or 32 rows by one or two panels. A group's sums are scaled while the tiles work on the next group.
// `ahead`: bytes to prefetch meanwhile.
template <int Rows, int Panels>
void quantized_block(const Matrix& w, const TileFormat& format, const uint8_t* const* record,
                     const uint8_t* const* data, const Act& x, int rows, const uint8_t* ahead, float* out,
                     int ldo) {
  const int step = w.group % 64 ? 32 : 64, rows0 = rows < 16 ? rows : 16, rows1 = rows - rows0,
            groups = w.groups();
  const int fetch = Panels * static_cast<int>(w.data_bytes()) / w.kp * w.group;  // bytes ahead a group
  const Act below = row(x, rows > 16 ? 16 : 0);
  alignas(64) int32_t sums[2][4][16 * 16];
  alignas(64) float totals[4][16 * 16] = {};
  const auto flush = [&](int g) {
    for (int p = 0; p < Panels; ++p) {
      format.flush(w, record[p], g, sums[g % 2][p], x, rows0, totals[p]);
      if (Rows == 2) format.flush(w, record[p], g, sums[g % 2][2 + p], below, rows1, totals[2 + p]);
    }
  };
  configure(rows0, rows1, step);
  for (int g = 0, k = 0; g < groups; ++g) {
    _tile_zero(0);
    if (Panels == 2) _tile_zero(1);
    if (Rows == 2) _tile_zero(2);
    if (Rows == 2 && Panels == 2) _tile_zero(3);
    const int end = k + w.group < w.kp ? k + w.group : w.kp;
    for (; k < end; k += step) dot_step<Rows, Panels>(x.q, x.ld, data, k);
    if (ahead)
      for (int i = 0; i < fetch; i += 64) prefetch(ahead + static_cast<size_t>(g) * fetch + i);
    if (g) flush(g - 1);
    store_sums<Rows, Panels>(sums[g % 2]);
  }
  flush(groups - 1);
  for (int p = 0; p < Panels; ++p) {
    const f32x16 scale = load<f32x16>(record[p]);
    for (int m = 0; m < rows; ++m)
      store(out + static_cast<size_t>(m) * ldo + 16 * p,
            loadf(totals[(m >= 16 ? 2 : 0) + p] + m % 16 * 16) * scale);
  }
}

// (hi + lo) B for 16 or 32 rows by one or two panels.
template <int Rows, int Panels>
void bf16_block(int kp, const uint8_t* const* data, const Act& x, int rows, const uint8_t* ahead,
                int ahead_step, float* out, int ldo) {
  const int rows0 = rows < 16 ? rows : 16, rows1 = rows - rows0;
  configure(rows0, rows1 ? rows1 : rows0, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int k = 0; k < kp; k += 32, ahead += ahead_step) {
    _tile_loadd(6, data[0] + k * 32, 64);
    if (Panels == 2) _tile_loadd(7, data[1] + k * 32, 64);
    for (int i = 0; i < ahead_step; i += 64) prefetch(ahead + i);
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

constexpr int kQuantizedTileRows = 13;  // fewer rows of integers are faster on vectors

bool fits_tiles(const Matrix& w, const Act& x, int rows) {
  if (!w.quantized()) return w.format_traits().halves && x.hi;
  return rows >= kQuantizedTileRows && !w.sparse && w.format_traits().planes == Planes::none &&
         w.group % 32 == 0 && w.kp % 32 == 0;
}

template <int Panels>
void tile_panels(const Matrix& w, int panel, const Act& x, int rows, float* out, int ldo) {
  const uint8_t *record[2], *data[2];
  const TileFormat format = tile_format(w, std::make_index_sequence<std::size(kFormats)>());
  for (int p = 0; p < Panels; ++p) {
    record[p] = w.record(panel + p);
    if (w.quantized()) {
      const size_t bytes = static_cast<size_t>(w.kp) * 16;
      data[p] = format.expand(w, record[p], expanded.take(2 * bytes) + p * bytes);
    } else {
      data[p] = record[p] + w.head_bytes();
    }
  }
  for (int m = 0; m < rows; m += 32) {
    const int some = rows - m < 32 ? rows - m : 32;
    const Act a = row(x, m);
    float* o = out + static_cast<size_t>(m) * ldo;
    const uint8_t* ahead = m ? nullptr : record[Panels - 1] + w.stride;
    if (w.quantized())
      some > 16 ? quantized_block<2, Panels>(w, format, record, data, a, some, ahead, o, ldo)
                : quantized_block<1, Panels>(w, format, record, data, a, some, ahead, o, ldo);
    else
      some > 16 ? bf16_block<2, Panels>(w.kp, data, a, some, data[0] + kAhead, 1024 * Panels, o, ldo)
                : bf16_block<1, Panels>(w.kp, data, a, some, data[0] + kAhead, 1024 * Panels, o, ldo);
  }
}

void amx_tile(const Matrix& w, int panel, int count, const Act& x, int rows, float* out, int ldo) {
  if (!fits_tiles(w, x, rows)) return tile(w, panel, count, x, rows, out, ldo);
  for (int i = 0; i < count; i += 2) {
    if (i + 1 < count) tile_panels<2>(w, panel + i, x, rows, out + 16 * i, ldo);
    else tile_panels<1>(w, panel + i, x, rows, out + 16 * i, ldo);
  }
  _tile_release();
}

}  // namespace
}  // namespace farthing
