// Block-sparse panels times many rows on AMX tiles. Included by kernels_amx.cpp.
//
// The same integers and float sums in the same order as in cells.inl.
namespace farthing {
namespace {

// The cells of a panel as tiles of bytes, with their missing blocks filled in. Returns the bytes of a tile.
int expand_cells(const Matrix& w, const Cells& cells, uint8_t* out) {
  const FormatTraits& format = w.format_traits();
  const int blocks = cell_columns(w) / kBlock;
  const __m512i nothing = _mm512_set1_epi8(static_cast<char>(-format.offset()));
  const uint8_t* p = cells.data;
  for (int i = 0; i < cells.count; ++i)
    for (int b = 0; b < blocks; ++b, out += 256) {
      if (!(cells.cells[i] >> b & 1)) {
        for (int j = 0; j < 256; j += 64) _mm512_store_si512(out + j, nothing);
        continue;
      }
      if (format.nibbles()) expand_nibbles(w, p, kBlock / 8, out);
      else memcpy(out, p, 256);
      p += w.block_bytes();
    }
  return blocks * 256;
}

// Integer sums of one cell into the float sums of up to 16 rows.
inline void flush_cell(const Matrix& w, const Cells& cells, int i, const int32_t* sums, const Act& x,
                       int rows, float* out) {
  const bool grouped = w.format_traits().grouped();
  const f32x16 scale = grouped ? half_to_float(cells.scales + i * kPanel) : splat(1.0f);
  for (int m = 0; m < rows; ++m) {
    const CellInput& in = x.cells[m * x.cell_count + (cells.cells[i] >> kCellBlocks)];
    const float by = in.scale;
    const int32_t comp = in.comp_all;
    const f32x16 s = grouped ? scale * by : splat(by);
    store(out + 16 * m, fma(to_float(load<i32x16>(sums + 16 * m) + comp), s, loadf(out + 16 * m)));
  }
}

// 16 or 32 rows by one panel. A cell's sums are scaled while the tiles work on the next cell.
template <int Rows>
void sparse_block(const Matrix& w, const Cells& cells, const uint8_t* tiles, int tile_bytes, const Act& x,
                  int rows, float* out, int ldo) {
  const int width = cell_columns(w), rows0 = rows < 16 ? rows : 16, rows1 = rows - rows0;
  const Act below = row(x, rows > 16 ? 16 : 0);
  alignas(64) int32_t sums[2][2][16 * 16];
  alignas(64) float totals[2][16 * 16] = {};
  const auto flush = [&](int i) {
    flush_cell(w, cells, i, sums[i % 2][0], x, rows0, totals[0]);
    if (Rows == 2) flush_cell(w, cells, i, sums[i % 2][1], below, rows1, totals[1]);
  };
  configure(rows0, rows1, width);
  for (int i = 0; i < cells.count; ++i) {
    const int k = (cells.cells[i] >> kCellBlocks) * width;
    _tile_zero(0);
    _tile_loadd(4, x.q + k, x.ld);
    _tile_loadd(6, tiles + static_cast<size_t>(i) * tile_bytes, 64);
    _tile_dpbsud(0, 4, 6);
    if (Rows == 2) {
      _tile_zero(2);
      _tile_loadd(5, x.q + static_cast<size_t>(16) * x.ld + k, x.ld);
      _tile_dpbsud(2, 5, 6);
    }
    if (i) flush(i - 1);
    _tile_stored(0, sums[i % 2][0], 64);
    if (Rows == 2) _tile_stored(2, sums[i % 2][1], 64);
  }
  if (cells.count) flush(cells.count - 1);
  const f32x16 scale = load<f32x16>(cells.rows);
  for (int m = 0; m < rows; ++m)
    store(out + static_cast<size_t>(m) * ldo, loadf(totals[m / 16] + m % 16 * 16) * scale);
}

void sparse_tiles(const Matrix& w, int panel, const Act& x, int rows, float* out, int ldo) {
  const Cells cells = cells_of(w, w.record(panel));
  uint8_t* tiles = expanded.take(static_cast<size_t>(w.kp) * 16);
  const int tile_bytes = expand_cells(w, cells, tiles);
  for (int m = 0; m < rows; m += 32) {
    const int some = rows - m < 32 ? rows - m : 32;
    float* o = out + static_cast<size_t>(m) * ldo;
    some > 16 ? sparse_block<2>(w, cells, tiles, tile_bytes, row(x, m), some, o, ldo)
              : sparse_block<1>(w, cells, tiles, tile_bytes, row(x, m), some, o, ldo);
  }
}

}  // namespace
}  // namespace farthing
