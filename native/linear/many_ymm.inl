// How many rows are multiplied with registers of 32 bytes, for many_rows.inl.
//
// With AVX-VNNI products are those of few rows, too. Without it, weights become signed, and rows are the
// unsigned side (Act::flipped, q + 128): what their offset adds, 128 times the weights of a group, is the
// same for all rows, and sums start at its negative. Products of small weights are then summed in 16 bits,
// modulo 2^16, over as many columns as the true sum fits there. Weights of 8 bits are widened to 16 bits
// instead, and so are the rows that they meet.
namespace farthing {
namespace {

constexpr int kTogether = kVnni ? 6 : 4;  // rows whose sums fit in registers
constexpr int kRowStep = 1;               // rows that a product takes at once

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
// sum + product. As intrinsics, GCC adds into the product's register and moves the sum back, in every step.
template <bool Words>
[[gnu::always_inline]] inline __m256i added(__m256i sum, __m256i product) {
  if constexpr (Words) asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(product));
  else asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(product));
  return sum;
}

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
      const auto product = [&](__m256i weights) {
        return in_words(F) ? _mm256_madd_epi16(row, weights) : _mm256_maddubs_epi16(row, weights);
      };
      acc[2 * m] = added<in_words(F)>(acc[2 * m], product(first));
      acc[2 * m + 1] = added<in_words(F)>(acc[2 * m + 1], product(second));
    }
  }
  const __m256i one = _mm256_set1_epi16(1);
  if constexpr (in_spans(F))
    EACH (int m = 0; m < 2 * M; ++m) acc[m] = _mm256_madd_epi16(acc[m], one);
  EACH (int m = 0; m < M; ++m) sums[m] = joined<i32x16>(acc[2 * m], acc[2 * m + 1]);
}

// Of several spans; apart, as their sums would push those of a single one out of the registers.
template <int M, Format F>
[[gnu::noinline]] void sum_spans(const uint8_t* w, const int16_t* start, int columns, const uint8_t* x,
                                 size_t ld, const uint8_t* next, i32x16 (&sums)[M]) {
  constexpr int span = span_columns(F);
  EACH (int m = 0; m < M; ++m) sums[m] = i32x16{};
  for (int k = 0; k < columns; k += span, start += 2 * kPanel) {
    i32x16 more[M];
    sum_span<M, F>(w + k * kPanel, start, columns - k < span ? columns - k : span, x + k, ld,
                   next + k * stream_bytes(F), more);
    EACH (int m = 0; m < M; ++m) sums[m] += more[m];
  }
}

template <int M, Format F>
[[gnu::always_inline]] inline void sum_group(const uint8_t* w, const int16_t* start, int columns,
                                             const uint8_t* x, size_t ld, const uint8_t* next,
                                             i32x16 (&sums)[M]) {
  if constexpr (in_spans(F))
    if (columns > span_columns(F)) return sum_spans<M, F>(w, start, columns, x, ld, next, sums);
  sum_span<M, F>(w, start, columns, x, ld, next, sums);
}
#endif

// Whether sums start at the compensation of a row, unless starts_at_zero.
constexpr bool kStartsAtComp = kVnni;

// Rows at a group that are brought into another form, here words in the order of the weights.
constexpr bool makes_rows(Format f) { return in_words(f); }
constexpr size_t kMadeBytes = 2 * kMostGroup;  // of a row
inline void make_rows(const Act& x, int rows, int k, int columns, uint8_t* words) {
  for (int m = 0; m < rows; ++m, words += kMadeBytes) {
    const int8_t* q = x.q + static_cast<size_t>(m) * x.ld + k;
    for (int i = 0; i < columns; i += 32) {
      const __m256i v = load<__m256i>(q + i), even = even_bytes(v), odd = odd_bytes(v);
      const __m256i low = _mm256_unpacklo_epi32(even, odd), high = _mm256_unpackhi_epi32(even, odd);
      store(words + 2 * i, _mm256_permute2x128_si256(low, high, 0x20));
      store(words + 2 * i + 32, _mm256_permute2x128_si256(low, high, 0x31));
    }
  }
}

// The others, at column k, and whether they are there.
template <Format F>
inline const uint8_t* rows_at(const Act& x, int k) {
  return in_spans(F) ? x.flipped + k : reinterpret_cast<const uint8_t*>(x.q) + k;
}
inline bool has_rows(const Act& x) { return kVnni || x.flipped; }

}  // namespace
}  // namespace farthing
