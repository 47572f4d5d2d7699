// Inner loops of expanded attention in float32: queries are in the lanes, so that the softmax over keys needs
// no sums across lanes. Included by kernels_*.cpp.
namespace farthing {
namespace {

#if defined(__AVX512F__)
constexpr int kColumnsAtOnce = 3, kLinesAtOnce = 8;  // vectors of columns, and rows, that registers hold
#elif defined(__AVX2__)
constexpr int kColumnsAtOnce = 1, kLinesAtOnce = 4;
#else
constexpr int kColumnsAtOnce = 1, kLinesAtOnce = 2;
#endif
static_assert(kProductRows % kLinesAtOnce == 0);

// f(first column, vectors) for every group of columns, as many vectors as registers hold.
template <int Most, class F>
inline void for_columns(int columns, F&& f) {
  int at = 0;
  for (; at + 16 * Most <= columns; at += 16 * Most) f.template operator()<Most>(at);
  if constexpr (Most > 1)
    if (at < columns)
      for_columns<Most - 1>(columns - at, [&]<int V>(int more) { f.template operator()<V>(at + more); });
}

template <int M, int V>
inline void product_tile(const Product& p, int row, int column) {
  f32x16 acc[M * V];
  float* c = p.c + static_cast<size_t>(row) * p.ldc + column;
  EACH (int m = 0; m < M; ++m)
    EACH (int v = 0; v < V; ++v) acc[m * V + v] = p.add ? loadf(c + m * p.ldc + 16 * v) : f32x16{};
  const float *a = static_cast<const float*>(p.a) + static_cast<size_t>(row) * p.lda,
              *b = static_cast<const float*>(p.b) + column;
  for (int k = 0; k < p.depth; ++k, b += p.columns) {
    f32x16 x[V];
    EACH (int v = 0; v < V; ++v) x[v] = loadf(b + 16 * v);
    EACH (int m = 0; m < M; ++m) {
      const f32x16 s = splat(a[static_cast<size_t>(m) * p.lda + k]);
      EACH (int v = 0; v < V; ++v) acc[m * V + v] = fma(s, x[v], acc[m * V + v]);
    }
  }
  EACH (int m = 0; m < M; ++m)
    EACH (int v = 0; v < V; ++v) store(c + m * p.ldc + 16 * v, acc[m * V + v]);
}

void product(const Product& p) {
  for_columns<kColumnsAtOnce>(p.columns, [&]<int V>(int column) {
    for (int row = 0; row < p.rows; row += kLinesAtOnce) product_tile<kLinesAtOnce, V>(p, row, column);
  });
}

void pack_rows(const float* in, int depth, int columns, void* out) {
  memcpy(out, in, sizeof(float) * depth * columns);
}

// Moves the references of 16 queries to `best` where it exceeds them by more than kSlack, and what was summed
// with them. Returns the references.
inline f32x16 move_references(const Scores& s, int lane, f32x16 best) {
  const f32x16 before = loadf(s.max + lane);
  const f32x16 now = select(best > before + kSlack, best, before);
  if (reduce_max(now - before) > 0.0f) {
    const f32x16 shrink = exp(before - now);
    store(s.max + lane, now);
    store(s.sum + lane, loadf(s.sum + lane) * shrink);
    float* o = s.out + lane;
    for (int i = 0; i < s.values; ++i, o += kTileQueries) store(o, loadf(o) * shrink);
  }
  return now;
}

constexpr float kHidden = -1.0e30f;  // a score whose weight is 0, far from overflow
static_assert(kHidden < 1.0e4f * kUnseen);

// Hides scores of keys that a query does not see, and finds the largest of 16 queries. s.keys % 4 == 0.
template <bool Masked>
inline f32x16 mask_scores(const Scores& s, int lane) {
  f32x16 most[4] = {splat(kLowest), splat(kLowest), splat(kLowest), splat(kLowest)};
  float* at = s.scores + lane;
  const i32x16 visible = load<i32x16>(s.visible + lane), hidden = load<i32x16>(s.hidden + lane);
  for (int key = 0; key < s.keys; key += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, at += kTileQueries) {
      f32x16 v = loadf(at);
      if (Masked)
        store(at, v = select((visible > splati(key + i)) & (hidden <= splati(key + i)), v, splat(kHidden)));
      most[i] = max(most[i], v);
    }
  return max(max(most[0], most[1]), max(most[2], most[3]));
}

// Moves the references of 16 queries where their new scores require it. Returns them.
inline f32x16 new_references(const Scores& s, int lane) {
  return move_references(s, lane, s.masked ? mask_scores<true>(s, lane) : mask_scores<false>(s, lane));
}

void weigh(const Scores& s) {
  float* weights = static_cast<float*>(s.weights);
  for (int lane = 0; lane < kTileQueries; lane += 16) {
    const f32x16 reference = new_references(s, lane);
    f32x16 total = {};
    for (int key = 0; key < s.keys; ++key) {
      const f32x16 e = exp(loadf(s.scores + key * kTileQueries + lane) - reference);
      store(weights + key * kTileQueries + lane, e);
      total += e;
    }
    store(s.sum + lane, loadf(s.sum + lane) + total);
  }
}

#if defined(__AVX512F__)
inline void transpose16(const float* in, int ldi, float* out, int ldo) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(in + static_cast<size_t>(i) * ldi);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    float* o = out + static_cast<size_t>(i) * ldo;
    _mm512_storeu_si512(o, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(o + 8 * ldo, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    _mm512_storeu_si512(o + 4 * ldo, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_si512(o + 12 * ldo, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
  }
}
#else
inline void transpose16(const float* in, int ldi, float* out, int ldo) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) out[j * ldo + i] = in[i * ldi + j];
}
#endif

void transpose(const float* in, int ldi, int rows, int columns, float* out, int ldo) {
  for (int i = 0; i < rows; i += 16)
    for (int j = 0; j < columns; j += 16)
      transpose16(in + static_cast<size_t>(i) * ldi + j, ldi, out + static_cast<size_t>(j) * ldo + i, ldo);
}

// Column k of a block of a panel: its 16 rows, as in Matrix::has_plain_columns.
template <Format F>
inline f32x16 block_column(const uint8_t* block, f32x16 scale, int k) {
  constexpr FormatTraits format = traits(F);
  if constexpr (format.quantized()) {
    const u32x16 bytes = load<u32x16>(block + k / 4 * 64) >> (8 * (k % 4)) & 255u;
    return to_float(as<i32x16>(bytes) + format.offset()) * scale;
  } else {
    f32x16 pair[2];
    load_pair<F>(block + k / 2 * 2 * format.bytes_a_column(), pair[0], pair[1]);
    return pair[k % 2];
  }
}

template <Format F>
void unpack_as(const Matrix& w, float* out, int ldo) {
  for (int panel = 0; panel < w.panels; ++panel) {
    const uint8_t *record = w.record(panel), *block = record + w.head_bytes();
    const f32x16 scale = w.quantized() ? load<f32x16>(record) : splat(1.0f);
    for (int at = 0; at < w.k; at += kBlock) {
      for (int k = 0; k < kBlock && at + k < w.k; ++k)
        store(out + static_cast<size_t>(at + k) * ldo + panel * kPanel, block_column<F>(block, scale, k));
      block += w.block_bytes();
    }
  }
}

template <size_t... I>
void unpack_in(const Matrix& w, float* out, int ldo, std::index_sequence<I...>) {
  ((w.format == static_cast<Format>(I) ? unpack_as<static_cast<Format>(I)>(w, out, ldo) : void()), ...);
}

void unpack(const Matrix& w, float* out, int ldo) {
  unpack_in(w, out, ldo, std::make_index_sequence<std::size(kFormats)>());
}

}  // namespace
}  // namespace farthing
