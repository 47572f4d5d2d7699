// Products of expanded attention on AMX tiles: 16 rows by up to 48 columns. Included by kernels_amx.cpp.
namespace farthing {
namespace {

template <int V>
inline void product_on_tiles(const Product& p, int row, int column) {
  float* c = p.c + static_cast<size_t>(row) * p.ldc + column;
  const int stride = p.ldc * 4;
  if (p.add) {
    _tile_loadd(0, c, stride);
    if constexpr (V > 1) _tile_loadd(1, c + 16, stride);
    if constexpr (V > 2) _tile_loadd(2, c + 32, stride);
  } else {
    _tile_zero(0);
    if constexpr (V > 1) _tile_zero(1);
    if constexpr (V > 2) _tile_zero(2);
  }
  const uint16_t *a = static_cast<const uint16_t*>(p.a) + static_cast<size_t>(row) * p.lda,
                 *b = static_cast<const uint16_t*>(p.b) + 2 * column;
  for (int k = 0; k < p.depth; k += 32, b += static_cast<size_t>(32) * p.columns) {
    _tile_loadd(3, a + k, p.lda * 2);
    _tile_loadd(4, b, p.columns * 4);
    _tile_dpbf16ps(0, 3, 4);
    if constexpr (V > 1) {
      _tile_loadd(5, b + 32, p.columns * 4);
      _tile_dpbf16ps(1, 3, 5);
    }
    if constexpr (V > 2) {
      _tile_loadd(6, b + 64, p.columns * 4);
      _tile_dpbf16ps(2, 3, 6);
    }
  }
  _tile_stored(0, c, stride);
  if constexpr (V > 1) _tile_stored(1, c + 16, stride);
  if constexpr (V > 2) _tile_stored(2, c + 32, stride);
}

void amx_product(const Product& p) {
  TileConfig c;
  for (int i = 0; i < 7; ++i) c.set(i, 16, 64);
  c.load();
  for_columns<3>(p.columns, [&]<int V>(int column) {
    for (int row = 0; row < p.rows; row += kProductRows) product_on_tiles<V>(p, row, column);
  });
  _tile_release();
}

}  // namespace
}  // namespace farthing
