// Panels times rows on AMX tiles: many rows in blocks of columns, or bfloat16 exactly. Included by
// kernels_amx.cpp.
//
// Rows that are not in blocks have results that do not depend on their number. Integers take the vector
// loops. bfloat16 sums in the order of tiles, so one row takes tiles too; its activations are hi + lo, and
// nothing but the weights is rounded.
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

template <int Panels>
void tile_panels(const Matrix& w, int panel, const Act& x, int rows, float* out, int ldo) {
  const uint8_t* data[2];
  for (int p = 0; p < Panels; ++p) data[p] = w.record(panel + p) + w.head_bytes();
  for (int m = 0; m < rows; m += 32) {
    const int some = rows - m < 32 ? rows - m : 32;
    const Act a = row(x, m);
    float* o = out + static_cast<size_t>(m) * ldo;
    some > 16 ? bf16_block<2, Panels>(w.kp, data, a, some, data[0] + kAhead, 1024 * Panels, o, ldo)
              : bf16_block<1, Panels>(w.kp, data, a, some, data[0] + kAhead, 1024 * Panels, o, ldo);
  }
}

void amx_tile(const Matrix& w, int panel, int count, const Act& x, int rows, float* out, int ldo) {
  if (x.blocks) {
    w.quantized() ? Blocks<false>(w, panel, count, x, rows, out, ldo).run()
                  : Blocks<true>(w, panel, count, x, rows, out, ldo).run();
  } else {
    if (!w.format_traits().halves || !x.hi) return tile(w, panel, count, x, rows, out, ldo);
    for (int i = 0; i < count; i += 2) {
      if (i + 1 < count) tile_panels<2>(w, panel + i, x, rows, out + 16 * i, ldo);
      else tile_panels<1>(w, panel + i, x, rows, out + 16 * i, ldo);
    }
  }
  _tile_release();
}

}  // namespace
}  // namespace farthing
