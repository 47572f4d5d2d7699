// Products of expanded attention on AMX tiles: up to 32 rows by 48 columns. Included by kernels_amx.cpp.
namespace farthing {
namespace {

// R x 16 rows by V x 16 columns. Six sums: a tile's next product waits for the one before it, longer than
// three others take.
template <int R, int V>
inline void product_on_tiles(const Product& p, int row, int column) {
  float* c = p.c + static_cast<size_t>(row) * p.ldc + column;
  float* other = c + static_cast<size_t>(16) * p.ldc;
  const int stride = p.ldc * 4;
  if (p.add) {
    _tile_loadd(0, c, stride);
    if constexpr (V > 1) _tile_loadd(1, c + 16, stride);
    if constexpr (V > 2) _tile_loadd(2, c + 32, stride);
    if constexpr (R > 1) _tile_loadd(3, other, stride);
    if constexpr (R > 1 && V > 1) _tile_loadd(4, other + 16, stride);
    if constexpr (R > 1 && V > 2) _tile_loadd(5, other + 32, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
  }
  const uint16_t *a = static_cast<const uint16_t*>(p.a) + static_cast<size_t>(row) * p.lda,
                 *b = static_cast<const uint16_t*>(p.b) + 2 * column;
  for (int k = 0; k < p.depth; k += 32, b += static_cast<size_t>(32) * p.columns) {
    _tile_loadd(6, a + k, p.lda * 2);
    _tile_loadd(7, b, p.columns * 4);
    _tile_dpbf16ps(0, 6, 7);
    if constexpr (V > 1) {
      _tile_loadd(7, b + 32, p.columns * 4);
      _tile_dpbf16ps(1, 6, 7);
    }
    if constexpr (V > 2) {
      _tile_loadd(7, b + 64, p.columns * 4);
      _tile_dpbf16ps(2, 6, 7);
    }
    if constexpr (R > 1) {  // back from the last columns, which are still there
      _tile_loadd(6, a + static_cast<size_t>(16) * p.lda + k, p.lda * 2);
      if constexpr (V > 2) {
        _tile_dpbf16ps(5, 6, 7);
        _tile_loadd(7, b + 32, p.columns * 4);
      }
      if constexpr (V > 1) {
        _tile_dpbf16ps(4, 6, 7);
        _tile_loadd(7, b, p.columns * 4);
      }
      _tile_dpbf16ps(3, 6, 7);
    }
  }
  _tile_stored(0, c, stride);
  if constexpr (V > 1) _tile_stored(1, c + 16, stride);
  if constexpr (V > 2) _tile_stored(2, c + 32, stride);
  if constexpr (R > 1) _tile_stored(3, other, stride);
  if constexpr (R > 1 && V > 1) _tile_stored(4, other + 16, stride);
  if constexpr (R > 1 && V > 2) _tile_stored(5, other + 32, stride);
}

void amx_product(const Product& p) {
  TileConfig c;
  for (int i = 0; i < 8; ++i) c.set(i, 16, 64);
  c.load();
  for_columns<3>(p.columns, [&]<int V>(int column) {
    int row = 0;
    for (; row + 32 <= p.rows; row += 32) product_on_tiles<2, V>(p, row, column);
    if (row < p.rows) product_on_tiles<1, V>(p, row, column);
  });
  _tile_release();
}

}  // namespace
}  // namespace farthing
