// Quantized panels times many rows with registers of 32 bytes: a group's weights are unpacked once for a
// block of rows, which then cost nothing but loads and products. The integers of a group, and so the results,
// are those of few rows.
//
// With AVX-VNNI products are those of few rows, too. Without it, weights become signed, and rows are the
// unsigned side (Act::flipped, q + 128): what their offset adds, 128 times the weights of a group, is the
// same for all rows, and sums start at its negative. Products of small weights are then summed in 16 bits,
// modulo 2^16, over as many columns as the true sum fits there. Weights of 8 bits are widened to 16 bits
// instead, and so are the rows that they meet. Included by gemm.inl.
#if defined(__AVX2__) && !defined(__AVX512F__)
namespace farthing {
namespace {

constexpr int kTogether = kVnni ? 6 : 4;  // rows whose sums fit in registers
constexpr int kBlockRows = 64;            // rows that share a group's bytes
constexpr int kManyPanels = 2;            // panels that share what is made of the rows
constexpr int kMostGroup = 128;           // columns of a group, at most

// Largest magnitude of what is multiplied.
constexpr int largest_weight(Format f) {
  if (!traits(f).codes) return traits(f).minimums ? (1 << traits(f).bits) - 1 : 1 << (traits(f).bits - 1);
  int top = 0;
  for (const int8_t v : traits(f).codes->of) top = v > top ? v : -v > top ? -v : top;
  return top;
}

// Columns whose products with a row's bytes fit in 16 bits, two of every four in each lane; 0: not even four.
constexpr int span_columns(Format f) {
  int columns = 128;
  while (columns >= 4 && columns / 2 * 127 * largest_weight(f) > 32767) columns /= 2;
  return columns < 16 ? 0 : columns;
}
static_assert(span_columns(Format::q4) == 64 && span_columns(Format::mxfp4) == 32);
static_assert(span_columns(Format::nl4) == 0);

// Whether products are summed in 16 bits, or taken of numbers of 16 bits.
constexpr bool in_spans(Format f) { return !kVnni && span_columns(f) > 0; }
constexpr bool in_words(Format f) { return !kVnni && span_columns(f) == 0; }

// A group of a panel: bytes [K/4][16][4], and what the sums of each span start at. In words: columns 0 and 2
// of every four, then 1 and 3.
struct Unpacked {
  alignas(64) uint8_t w[kMostGroup * kPanel * (kVnni ? 1 : 2)];
  alignas(64) int16_t start[kVnni ? kPanel : kMostGroup / 16 * 2 * kPanel];
};

inline __m256i& at(void* p, int i) { return static_cast<__m256i*>(p)[i]; }
inline const __m256i& at(const void* p, int i) { return static_cast<const __m256i*>(p)[i]; }

template <Format F, int I>
inline bytes64 signed_quad(const uint8_t* p) {
  const bytes64 v = stored_quad<F, I>(p);
  constexpr FormatTraits format = traits(F);
  if constexpr (format.codes != nullptr)
    return look_up(reinterpret_cast<const uint8_t*>(format.codes->of), v);
  if constexpr (format.minimums) return v;
  const __m256i offset = _mm256_set1_epi8(static_cast<char>(format.offset()));
  return {_mm256_add_epi8(v.a, offset), _mm256_add_epi8(v.b, offset)};
}

// Bytes 0 and 2 of every four as numbers of 16 bits, then 1 and 3.
inline __m256i even_bytes(__m256i v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); }
inline __m256i odd_bytes(__m256i v) { return _mm256_srai_epi16(v, 8); }

// Four columns as products take them. offset: the sums of what the rows' offset adds.
template <Format F, int I>
inline void unpack_quad(const uint8_t* data, uint8_t* to, __m256i* offset) {
  if constexpr (kVnni) {
    const bytes64 v = quad<F, I>(data);
    at(to, 0) = v.a, at(to, 1) = v.b;
    return;
  }
  const bytes64 v = signed_quad<F, I>(data);
  if constexpr (in_words(F)) {
    at(to, 0) = even_bytes(v.a), at(to, 1) = even_bytes(v.b);
    at(to, 2) = odd_bytes(v.a), at(to, 3) = odd_bytes(v.b);
    return;
  }
  const __m256i by = _mm256_set1_epi8(-128);  // 128, unsigned
  at(to, 0) = v.a, at(to, 1) = v.b;
  offset[0] = _mm256_add_epi16(offset[0], _mm256_maddubs_epi16(by, v.a));
  offset[1] = _mm256_add_epi16(offset[1], _mm256_maddubs_epi16(by, v.b));
}

// `columns` of a panel, from `data`: the bytes that products take.
template <Format F>
inline const uint8_t* unpack_group(const uint8_t* data, int columns, Unpacked& to) {
  constexpr int step = traits(F).step(), bytes = step * stream_bytes(F), quad_bytes = in_words(F) ? 128 : 64;
  constexpr int span = in_spans(F) ? span_columns(F) : kMostGroup;
  constexpr int spans = step > span ? step / span : 1;  // of a step
  if constexpr (kVnni && in_bytes(F)) return data;
  uint8_t* w = to.w;
  int16_t* start = to.start;
  for (int first = 0; first < columns; first += spans * span, start += spans * 2 * kPanel) {
    __m256i offset[2 * spans] = {};
    const int end = columns - first < spans * span ? columns : first + spans * span;
    for (int k = first; k < end; k += step, data += bytes, w += step / 4 * quad_bytes)
      for_quads<F>([&]<int I>() __attribute__((always_inline)) {
        unpack_quad<F, I>(data, w + I * quad_bytes, offset + (spans > 1 ? 2 * (4 * I / span) : 0));
      });
    if constexpr (in_spans(F))
      EACH (int i = 0; i < 2 * spans; ++i) at(start, i) = _mm256_sub_epi16(__m256i{}, offset[i]);
  }
  return to.w;
}

inline __m256i four_bytes(const void* p) { return _mm256_set1_epi32(load<int32_t>(p)); }

// Sums of M rows over the columns of a group. x: bytes of the rows, Act::q or Act::flipped, or words. next:
// what is prefetched into L2 meanwhile, at an even rate.
#if defined(__AVXVNNI__)
template <int M, Format F>
[[gnu::always_inline]] inline void sum_group(const uint8_t* w, const int16_t*, int columns, const uint8_t* x,
                                             size_t ld, const uint8_t* next, i32x16 (&sums)[M]) {
  for (int k = 0; k < columns; k += 4, w += 64) {
    prefetch_far(next + k * stream_bytes(F));
    const bytes64 v = load_bytes(w);
    EACH (int m = 0; m < M; ++m) sums[m] = dot4(sums[m], v, four_bytes(x + m * ld + k));
  }
}
#else
// Of one span: four columns in a step, or two in words.
template <int M, Format F>
[[gnu::always_inline]] inline void sum_span(const uint8_t* w, const int16_t* start, int columns,
                                            const uint8_t* x, size_t ld, const uint8_t* next,
                                            i32x16 (&sums)[M]) {
  constexpr int step = in_words(F) ? 2 : 4;
  __m256i acc[2 * M];
  EACH (int m = 0; m < 2 * M; ++m) acc[m] = in_words(F) ? __m256i{} : at(start, m % 2);
  for (int k = 0; k < columns; k += step, w += 64, x += 4) {
    prefetch_far(next + k * stream_bytes(F));
    const __m256i first = at(w, 0), second = at(w, 1);
    EACH (int m = 0; m < M; ++m) {
      const __m256i row = four_bytes(x + m * ld);
      if constexpr (in_words(F)) {
        acc[2 * m] = _mm256_add_epi32(acc[2 * m], _mm256_madd_epi16(row, first));
        acc[2 * m + 1] = _mm256_add_epi32(acc[2 * m + 1], _mm256_madd_epi16(row, second));
      } else {
        acc[2 * m] = _mm256_add_epi16(acc[2 * m], _mm256_maddubs_epi16(row, first));
        acc[2 * m + 1] = _mm256_add_epi16(acc[2 * m + 1], _mm256_maddubs_epi16(row, second));
      }
    }
  }
  const __m256i one = _mm256_set1_epi16(1);
  if constexpr (in_spans(F))
    EACH (int m = 0; m < 2 * M; ++m) acc[m] = _mm256_madd_epi16(acc[m], one);
  EACH (int m = 0; m < M; ++m) sums[m] = joined<i32x16>(acc[2 * m], acc[2 * m + 1]);
}

template <int M, Format F>
[[gnu::always_inline]] inline void sum_group(const uint8_t* w, const int16_t* start, int columns,
                                             const uint8_t* x, size_t ld, const uint8_t* next,
                                             i32x16 (&sums)[M]) {
  constexpr int span = in_words(F) ? kMostGroup : span_columns(F);
  sum_span<M, F>(w, start, columns < span ? columns : span, x, ld, next, sums);
  for (int k = span; k < columns; k += span) {
    i32x16 more[M];
    start += 2 * kPanel;
    sum_span<M, F>(w + k * kPanel, start, columns - k < span ? columns - k : span, x + k, ld,
                   next + k * stream_bytes(F), more);
    EACH (int m = 0; m < M; ++m) sums[m] += more[m];
  }
}
#endif

typedef float PanelSums[kBlockRows][kPanel];

// Rows times a group of a panel into its sums, in tiles of M. x: the rows; bytes: what sum_group reads of
// them, at the group.
template <int M, Format F, bool Zero>
void add_group(const uint8_t* w, const int16_t* start, const GroupNumbers& n, int columns, const Act& x,
               int g, const uint8_t* bytes, size_t ld, int tiles, const uint8_t* next,
               float (*totals)[kPanel]) {
  const float* scale = x.scale + g;
  const int32_t* comp = x.comp + g;
  for (int t = 0; t < tiles; ++t, bytes += M * ld, next = w) {
    i32x16 sums[M];
    EACH (int m = 0; m < M; ++m)
      sums[m] = kVnni && !starts_at_zero(F) ? splati(comp[m * x.groups]) : i32x16{};
    sum_group<M, F>(w, start, columns, bytes, ld, next, sums);
    EACH (int m = 0; m < M; ++m, ++totals, scale += x.groups, comp += x.groups) {
      f32x16 total = loadf(*totals);
      add_sum<F, Zero>(n, sums[m], *comp, *scale, total);
      store(*totals, total);
    }
  }
}

template <Format F, bool Zero, int M = kTogether>
auto group_kernel(int rows) {
  if constexpr (M > 1)
    if (rows < M) return group_kernel<F, Zero, M - 1>(rows);
  return add_group<M, F, Zero>;
}

// Rows at a group in words, in the order of the weights.
inline void make_words(const Act& x, int rows, int k, int columns, uint8_t* words) {
  for (int m = 0; m < rows; ++m, words += 2 * kMostGroup) {
    const int8_t* q = x.q + static_cast<size_t>(m) * x.ld + k;
    for (int i = 0; i < columns; i += 32) {
      const __m256i v = load<__m256i>(q + i), even = even_bytes(v), odd = odd_bytes(v);
      const __m256i low = _mm256_unpacklo_epi32(even, odd), high = _mm256_unpackhi_epi32(even, odd);
      store(words + 2 * i, _mm256_permute2x128_si256(low, high, 0x20));
      store(words + 2 * i + 32, _mm256_permute2x128_si256(low, high, 0x31));
    }
  }
}

// At most kBlockRows rows times at most kManyPanels panels.
template <Format F, bool Zero>
void block_rows(const Matrix& w, int panel, int count, const Act& x, int rows, size_t ahead, float* out,
                int ldo) {
  Unpacked unpacked;
  alignas(64) PanelSums totals[kManyPanels] = {};
  alignas(64) uint8_t words[in_words(F) ? kBlockRows * 2 * kMostGroup : 64];
  // Tiles of about the same size: so many have one row more than the others.
  const int tiles = (rows + kTogether - 1) / kTogether, least = rows / tiles, more = rows % tiles;
  const auto large = group_kernel<F, Zero>(least + 1), small = group_kernel<F, Zero>(least);
  for (int g = 0, k = 0; k < w.kp; ++g, k += w.group) {
    const int columns = k + w.group < w.kp ? w.group : w.kp - k;
    if constexpr (in_words(F)) make_words(x, rows, k, columns, words);
    const size_t ld = in_words(F) ? 2 * kMostGroup : x.ld;
    for (int i = 0; i < count; ++i) {
      const uint8_t* record = w.record(panel + i);
      const uint8_t* data = record + w.head_bytes() + static_cast<size_t>(k) * stream_bytes(F);
      const uint8_t* of_w = unpack_group<F>(data, columns, unpacked);
      const GroupNumbers n = group_numbers<F, Zero>(w, record + 64, g);
      const uint8_t* from = in_words(F)   ? words
                            : in_spans(F) ? x.flipped + k
                                          : reinterpret_cast<const uint8_t*>(x.q) + k;
      large(of_w, unpacked.start, n, columns, x, g, from, ld, more, more && ahead ? data + ahead : of_w,
            totals[i]);
      if (more < tiles) {
        const int m = more * (least + 1);
        small(of_w, unpacked.start, n, columns, row(x, m), g, from + m * ld, ld, tiles - more,
              !more && ahead ? data + ahead : of_w, totals[i] + m);
      }
    }
  }
  for (int i = 0; i < count; ++i) {
    const f32x16 scale = load<f32x16>(w.record(panel + i));
    for (int m = 0; m < rows; ++m)
      store(out + static_cast<size_t>(m) * ldo + 16 * i, loadf(totals[i][m]) * scale);
  }
}

typedef void (*BlockKernel)(const Matrix&, int, int, const Act&, int, size_t, float*, int);

template <size_t... I>
BlockKernel block_kernel(const Matrix& w, std::index_sequence<I...>) {
  BlockKernel found = nullptr;
  const auto look = [&]<Format F>() {
    if constexpr (traits(F).quantized() && traits(F).planes == Planes::none) {
      if (w.format != F) return;
      found = block_rows<F, false>;
      if constexpr (traits(F).zeros())
        if (w.zero) found = block_rows<F, true>;
    }
  };
  (look.template operator()<Format{I}>(), ...);
  return found;
}

// Panels times the rows if this is the faster way, else nothing and false.
bool many_rows(const Matrix& w, int panel, int count, const Act& x, int rows, float* out, int ldo) {
  if (rows * w.act_terms <= kRowsAtOnce || !w.quantized() || w.group > kMostGroup || (!kVnni && !x.flipped))
    return false;
  const BlockKernel kernel = block_kernel(w, std::make_index_sequence<std::size(kFormats)>());
  if (!kernel) return false;
  const int terms = w.act_terms, at_once = kBlockRows / terms, blocks = (rows + at_once - 1) / at_once;
  for (int i = 0; i < count; i += kManyPanels) {
    const int together = count - i < kManyPanels ? count - i : kManyPanels;
    for (int b = 0, m = 0; b < blocks; ++b) {
      const int some = (rows - m + blocks - b - 1) / (blocks - b);
      Act block = row(x, m);
      block.terms = 1;  // each is a row
      add_terms<kBlockRows * kManyPanels>(
          terms, some, kPanel * together, out + static_cast<size_t>(m) * ldo + kPanel * i, ldo,
          [&](float* to, int ld) {
            kernel(w, panel + i, together, block, some * terms, b ? 0 : w.stride * together, to, ld);
          });
      m += some;
    }
  }
  return true;
}

}  // namespace
}  // namespace farthing
#endif
