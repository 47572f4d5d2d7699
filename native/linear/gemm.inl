// Panels times rows, in every format. Included by kernels_*.cpp, compiled once per instruction set.
//
// Sums run over K in the same order for every number of rows and every instruction set (the quantized
// formats are exact integers within a group), so a token's result does not depend on the other rows.
namespace farthing {
namespace {

// Tiles whose integer and float sums fit in the registers: 32 of 16 lanes, 16 of 8, 32 or 16 of 4. Two panels
// by six rows need half a load for each product; one panel by twelve needs a whole one, and processors that
// start two products a cycle load no more than that. Those that start one have fewer instructions a product
// with it, in integers of more than six rows.
#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 6, kPanelsAtOnce = 2, kLongRows = 12, kSparseRows = 8, kByteRows = 8;
#elif defined(__AVXVNNI__)
constexpr int kRowsAtOnce = 6, kPanelsAtOnce = 1, kLongRows = 6, kSparseRows = 4, kByteRows = 6;
#elif defined(__AVX2__)
constexpr int kRowsAtOnce = 3, kPanelsAtOnce = 1, kLongRows = 3, kSparseRows = 4, kByteRows = 3;
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int kRowsAtOnce = 3, kPanelsAtOnce = 1, kLongRows = 3, kSparseRows = 3, kByteRows = 3;
#else
constexpr int kRowsAtOnce = 2, kPanelsAtOnce = 1, kLongRows = 2, kSparseRows = 2, kByteRows = 2;
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
#define MANY_ROWS  // many_rows.inl
constexpr int kFloatRows = 3;
constexpr bool kFlipped = !kVnni;  // whether many rows are read as Act::flipped
#elif defined(__ARM_FEATURE_DOTPROD)
#define MANY_ROWS
constexpr int kFloatRows = 2;
constexpr bool kFlipped = false;
#else
constexpr int kFloatRows = kRowsAtOnce;
constexpr bool kFlipped = false;
#endif
// NEON's processors find a stream by themselves as far as is known; no distance was measured on one.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr bool kFetchesStreams = false;
#else
constexpr bool kFetchesStreams = true;
#endif
constexpr int kSparsePanels = 2;  // that read a block of rows one after the other

// Few rows read as fast as a bare copy if the next lines are prefetched into L2: prefetching into L1 would
// occupy the few buffers that its misses need. Only 4-bit weights, whose bytes take five instructions each,
// are prefetched into L1 too, a little ahead: otherwise too few loads fit the processor's window. The
// arithmetic of more rows hides memory latency only if their next panels are prefetched into L2 meanwhile,
// at an even rate: a group's lines at once would hold every buffer while the sums wait for L1.
constexpr int kStream = 2;  // rows up to which block-sparse panels are read as a stream

constexpr bool in_bytes(Format f) {  // integers that need no unpacking
  return traits(f).quantized() && traits(f).bits == 8 && traits(f).planes == Planes::none;
}

// Rows of a tile.
constexpr int rows_at_once(Format f) { return traits(f).quantized() ? kRowsAtOnce : kFloatRows; }

// Rows of a tile of one panel. Bytes are as fast with rows that compilers can address by pointers.
constexpr int long_rows(Format f) {
  if (!traits(f).quantized() || traits(f).planes != Planes::none) return rows_at_once(f);
  return in_bytes(f) && kLongRows > kRowsAtOnce ? 10 : kLongRows;
}

// Rows up to which a panel is read once, as a stream. A row's products with 16 bytes of FP8 wait for each
// other's sums: a second panel has sums of its own.
constexpr int stream_rows(Format f) {
  if (traits(f).scales == Scales::blocks && kPanelsAtOnce > 1) return 0;
  if (in_bytes(f)) return kByteRows;
  return traits(f).nibbles() && kRowsAtOnce > 2 ? 3 : 2;
}

// What a pass over panels prefetches into L2: the bytes `distance` ahead of groups [from, to), counted panel
// after panel if each has so many `groups`. Of two passes each then takes a panel, at an even rate.
struct Ahead {
  size_t distance;
  int from, to, groups = 0;
  size_t of(int panel, int g) const {  // 0: those that are read, which are in L1 then
    const int at = panel * groups + g;
    return at >= from && at < to ? distance : 0;
  }
};

template <int M, Format F>
inline void fetch(const uint8_t* p, size_t ahead) {
  if constexpr (M <= stream_rows(F) && !kFetchesStreams) return;
  if constexpr (M <= stream_rows(F) && traits(F).nibbles()) prefetch(p + prefetch_distances.nibbles_near);
  prefetch_far(p + ahead);
}

// The scales before a record's data. A stream reads them next to the data, and processors' prefetchers
// follow the data alone much further than two streams that take turns: they go into L1 first. What is `ahead`
// of them is prefetched too, as it is by the data.
template <bool Stream>
inline void fetch_head(const uint8_t* record, const uint8_t* data, size_t ahead) {
  for (const uint8_t* p = record; p < data; p += 64) {
    if constexpr (Stream) prefetch(p);
    if (ahead) prefetch_far(p + ahead);
  }
}

// e4m3 moved into a float16 is the value times 2^-8, subnormals included; the scale carries the 2^8.
inline f32x16 fp8_to_float(const uint8_t* p) {
  const u16x16 b = widen16(p);
  const u16x16 half = (b & 0x80) << 8 | (b & 0x7f) << 7;
  return half_to_float(reinterpret_cast<const uint16_t*>(&half));
}

// 32 of them.
inline void fp8_pair(const uint8_t* p, f32x16& a, f32x16& b) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_slli_epi16(_mm512_cvtepi8_epi16(load<__m256i>(p)), 7);
  const __m512i half = _mm512_and_si512(wide, _mm512_set1_epi16(static_cast<short>(0xbfff)));
  a = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
  b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
#else
  a = fp8_to_float(p);
  b = fp8_to_float(p + 16);
#endif
}

// Two columns of 16 rows of a panel in float32.
template <Format F>
inline void load_pair(const uint8_t* p, f32x16& a, f32x16& b) {
  if constexpr (F == Format::bf16) {
    const u32x16 v = load<u32x16>(p);
    a = bits_to_float(v << 16);
    b = bits_to_float(v & 0xffff0000u);
  } else if constexpr (F == Format::fp8) {
    fp8_pair(p, a, b);
  } else {
    a = load<f32x16>(p);
    b = load<f32x16>(p + 64);
  }
}

#if defined(__AVX512VBMI__)
// The bytes of |x| in bfloat16 by its 7 bits in FP8 (e4m3): low ones, and high ones without these bits, so
// that one instruction puts them and the sign back.
struct Fp8Table {
  alignas(64) uint8_t low[128], high[128];
  constexpr Fp8Table() : low(), high() {
    for (int x = 0; x < 128; ++x) {
      int exponent = x >> 3, mantissa = x & 7;
      if (exponent == 0) {
        for (exponent = 1; mantissa && mantissa < 8; --exponent) mantissa *= 2;
        mantissa -= mantissa ? 8 : 0;
      }
      const int bits = x ? (exponent + 120) << 7 | mantissa << 4 : 0;
      low[x] = static_cast<uint8_t>(bits), high[x] = static_cast<uint8_t>(bits >> 8 ^ x);
    }
  }
  static __m512i find(const uint8_t* table, __m512i x) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), x, _mm512_load_si512(table + 64));
  }
  void look_up(__m512i x, __m512i& low_bytes, __m512i& high_bytes) const {  // with signs
    low_bytes = find(low, x), high_bytes = _mm512_xor_si512(find(high, x), x);
  }
};
constexpr Fp8Table kFp8;
#endif

// M rows by P panels of float weights; even and odd columns are summed apart, in every format and shape.
template <int M, int P, Format F>
void panels_float(const Matrix& w, int panel, const Act& x, Ahead ahead, float* out, int ldo) {
  constexpr int bytes = 2 * traits(F).bytes_a_column();
  constexpr bool blocks = traits(F).scales == Scales::blocks;
  const uint8_t *record[P], *data[P];
  for (int i = 0; i < P; ++i) {
    record[i] = w.record(panel + i), data[i] = record[i] + w.head_bytes();
    if constexpr (blocks) fetch_head<M <= stream_rows(F)>(record[i], data[i], ahead.of(i, 0));
  }
  f32x16 total[P * M] = {};
  f32x16 even[P * M] = {}, odd[P * M] = {};
  const int group = blocks ? w.group : kActGroup;
  for (int g = 0, k0 = 0; k0 < w.kp; ++g, k0 += group) {
    const int end = k0 + group < w.kp ? k0 + group : w.kp;
    size_t far[P];
    for (int i = 0; i < P; ++i) far[i] = ahead.of(i, g);
    for (int k = k0; k < end; k += 2) {
      f32x16 a[P], b[P];
      EACH (int i = 0; i < P; ++i) {
        load_pair<F>(data[i], a[i], b[i]);
        if (bytes >= 64 || k % 4 == 0) fetch<M, F>(data[i], far[i]);
        if (bytes > 64) fetch<M, F>(data[i] + 64, far[i]);
        data[i] += bytes;
      }
      EACH (int m = 0; m < M; ++m) {
        const float* at = x.f32 + m * x.ld + k;
        const f32x16 s = splat(at[0]), t = splat(at[1]);
        EACH (int i = 0; i < P; ++i) {
          even[i * M + m] = fma(a[i], s, even[i * M + m]);
          odd[i * M + m] = fma(b[i], t, odd[i * M + m]);
        }
      }
    }
    if (!blocks) continue;
    EACH (int i = 0; i < P; ++i) {
      const f32x16 scale = load<f32x16>(record[i] + g * 64) * 256.0f;
      EACH (int m = 0; m < M; ++m) {
        total[i * M + m] = fma(even[i * M + m] + odd[i * M + m], scale, total[i * M + m]);
        even[i * M + m] = odd[i * M + m] = f32x16{};
      }
    }
  }
  EACH (int i = 0; i < P; ++i)
    EACH (int m = 0; m < M; ++m)
      store(out + m * ldo + 16 * i, blocks ? total[i * M + m] : even[i * M + m] + odd[i * M + m]);
}

// Whether weights are multiplied as what they stand for, signed, because products with other bytes cost more.
#if defined(__ARM_FEATURE_DOTPROD) && !defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool is_signed(Format f) { return !traits(f).small(); }
#else
constexpr bool is_signed(Format) { return false; }
#endif

// What is stored as what is multiplied: q + 8 and q + 128, or a code and its bias; or signed.
template <Format F>
inline bytes64 factors(bytes64 stored) {
  constexpr const Codes* codes = traits(F).codes;
  if constexpr (codes != nullptr)
    return look_up(is_signed(F) ? reinterpret_cast<const uint8_t*>(codes->of) : codes->factors, stored);
#if defined(__ARM_FEATURE_DOTPROD)
  if constexpr (is_signed(F)) return stored ^ 128;
#endif
  return stored;
}

template <Format F>
inline i32x16 dot4_of(i32x16 acc, bytes64 u, const decltype(splat4(nullptr))& s) {
  return traits(F).small() || is_signed(F) ? dot4_nibble(acc, u, s) : dot4(acc, u, s);
}

// Whether a tile has more rows than there are registers for pointers to them. Row m is then at an address of
// one instruction: a pointer plus 1, 3, 5 … times the distance between rows, times 1, 2, 4 or 8. (Compilers
// keep a pointer per row otherwise, some of them in vector registers.)
constexpr bool by_strides(Format f, int rows, int panels) {
  return panels == 1 && rows > kRowsAtOnce && !in_bytes(f);
}

#if defined(__AVX512VNNI__)
// acc += dot products with the four bytes of row m. An instruction that broadcasts them itself, because two
// threads on one core share what it can issue.
template <size_t Row, int Offset>
[[gnu::always_inline]] inline void add_row(i32x16& acc, bytes64 u, const int8_t* p, size_t ld) {
  constexpr size_t scale = Row & -Row;  // the power of two in Row
  typedef const int8_t all[];
  if constexpr (Row == 0)
    asm("vpdpbusd %c3(%2)%{1to16%}, %1, %0" : "+v"(acc) : "v"(u), "r"(p), "i"(Offset), "m"(*(all*)p));
  else
    asm("vpdpbusd %c3(%2,%4,%c5)%{1to16%}, %1, %0"
        : "+v"(acc)
        : "v"(u), "r"(p), "i"(Offset), "r"(Row / scale * ld), "i"(scale), "m"(*(all*)p));
}

template <int Offset, size_t... Row>
[[gnu::always_inline]] inline void add_rows(i32x16* acc, bytes64 u, const int8_t* p, size_t ld,
                                            std::index_sequence<Row...>) {
  (add_row<Row, Offset>(acc[Row], u, p, ld), ...);
}
#endif

// What is stored of columns 4 I … 4 I + 3 of a step.
template <Format F, int I>
inline bytes64 stored_quad(const uint8_t* p) {
  constexpr FormatTraits format = traits(F);
  if constexpr (format.bits == 8) {
    return load_bytes(p + 64 * I);
  } else {
    const bytes64 pair = load_bytes(p + I / 2 * 64), nibbles = I % 2 ? high_nibbles(pair) : low_nibbles(pair);
    if constexpr (format.above() == 0) return nibbles;
    else
      return with_bits<4 - format.above() * I>(nibbles, load_bytes(p + format.step() * 8),
                                               ((1 << format.above()) - 1) << 4);
  }
}

// What is multiplied with them. `low`: the low nibbles of panels in planes.
template <Format F, int I>
inline bytes64 quad(const uint8_t* p, const uint8_t* low = nullptr) {
  if constexpr (traits(F).planes == Planes::both) {
    const bytes64 high = load_bytes(p), rest = load_bytes(low);
    return factors<F>(I ? join_nibbles(high_nibbles(high), high_nibbles(rest))
                        : join_nibbles(low_nibbles(high), low_nibbles(rest)));
  } else {
    return factors<F>(stored_quad<F, I>(p));
  }
}

// Calls f.operator()<I>() for every four columns of a step.
template <Format F, class Each, size_t... I>
[[gnu::always_inline]] inline void for_quads(Each&& f, std::index_sequence<I...>) {
  (f.template operator()<I>(), ...);
}
template <Format F, int Columns = traits(F).step(), class Each>
[[gnu::always_inline]] inline void for_quads(Each&& f) {
  for_quads<F>(f, std::make_index_sequence<Columns / 4>());
}

// Bytes of a column that are read as one stream: planes are two streams.
constexpr int stream_bytes(Format f) {
  return traits(f).planes == Planes::both ? kPanel / 2 : traits(f).bytes_a_column();
}

#if defined(__ARM_FEATURE_DOTPROD)
// `columns` of a quantized panel. A register holds sixteen columns of a row, four of which a product takes as
// they are; so many are a step, and the least that a group has. Two chains of sums for up to two rows.
template <int M, int P, Format F>
[[gnu::always_inline]] inline void dot_columns(const uint8_t* (&data)[P], const uint8_t* (&low)[P],
                                               const int8_t* x, int ld, int columns, const size_t (&far)[P],
                                               const size_t (&far_low)[P], i32x16 (&acc)[P * M],
                                               i32x16 (&more)[P * M]) {
  static_assert(P == 1);
  constexpr bool planes = traits(F).planes == Planes::both;
  constexpr int quads = in_bytes(F) ? 1 : traits(F).step() / 4, bytes = 4 * quads * stream_bytes(F);
  constexpr int step = quads < 4 ? 16 : 4 * quads;
  for (int k = 0; k < columns; k += step) {
    int8x16_t s[M];
    for_quads<F, step>([&]<int I>() __attribute__((always_inline)) {
      if constexpr (I % 4 == 0)
        EACH (int m = 0; m < M; ++m) s[m] = vld1q_s8(x + static_cast<size_t>(m) * ld + k + 4 * I);
      const bytes64 u = quad<F, I % quads>(data[0], low[0]);
      EACH (int m = 0; m < M; ++m) {
        i32x16& sum = I % 2 && M <= 2 ? more[m] : acc[m];
        sum = dot4_of_lane < I % 4, traits(F).small() || is_signed(F) > (sum, u, s[m]);
      }
      if constexpr (I % quads < quads - 1) return;
      EACH (int at = 0; at < bytes; at += 64) fetch<M, F>(data[0] + at, far[0]);
      data[0] += bytes;
      asm("" : "+r"(data[0]));  // or loads would be of sums of addresses, each an instruction
      if constexpr (planes) fetch<M, F>(low[0], far_low[0]), low[0] += bytes;
    });
  }
}
#else
// `columns` (whole steps) of P quantized panels; two chains of sums where registers allow. `low`: the low
// nibbles of panels in planes. `far`, `far_low`: what is prefetched ahead.
template <int M, int P, Format F>
[[gnu::always_inline]] inline void dot_columns(const uint8_t* (&data)[P], const uint8_t* (&low)[P],
                                               const int8_t* x, int ld, int columns, const size_t (&far)[P],
                                               const size_t (&far_low)[P], i32x16 (&acc)[P * M],
                                               i32x16 (&more)[P * M]) {
  constexpr bool planes = traits(F).planes == Planes::both;
  constexpr int step = traits(F).step(), bytes = step * stream_bytes(F);
  for (int k = 0; k < columns; k += step) {
    for_quads<F>([&]<int I>() __attribute__((always_inline)) {
      bytes64 u[P];
      EACH (int i = 0; i < P; ++i) u[i] = quad<F, I>(data[i], low[i]);
#if defined(__AVX512VNNI__)
      if constexpr (by_strides(F, M, P)) {
        add_rows<4 * I>(acc, u[0], x + k, ld, std::make_index_sequence<M>());
        return;
      }
#endif
      EACH (int m = 0; m < M; ++m) {
        const auto s = splat4(x + static_cast<size_t>(m) * ld + k + 4 * I);
        EACH (int i = 0; i < P; ++i) {
          i32x16& sum = I % 2 && M * P <= 4 ? more[i * M + m] : acc[i * M + m];
          sum = dot4_of<F>(sum, u[i], s);
        }
      }
    });
    EACH (int i = 0; i < P; ++i) {
      EACH (int at = 0; at < bytes; at += 64) fetch<M, F>(data[i] + at, far[i]);
      data[i] += bytes;
      if constexpr (planes) fetch<M, F>(low[i], far_low[i]), low[i] += bytes;
    }
  }
}
#endif

// Sums of high nibbles, as two times the sums of what their bytes are on average: 16 n + 7.5 - 128.
inline i32x16 twice_expected(i32x16 sum, int32_t compensation) {
  return sum * 32 + 241 * (compensation / 128);
}

// What the integer sums of one group of a panel become values with.
struct GroupNumbers {
  f32x16 scale, minimum;  // relative to the rows
  i32x16 zero;
};

// number: that of a group's scales, or 1 for its minimums. `at`: the record's scales of groups.
template <Format F>
inline f32x16 of_group(const Matrix& w, const uint8_t* at, int g, int number) {
  constexpr bool units = traits(F).scales == Scales::units;
  if constexpr (traits(F).powers)
    if (w.has_powers())
      return bits_to_float(as<u32x16>(widen(reinterpret_cast<const int8_t*>(at) + g * kPanel)) << 23);
  const int unit = (units ? g * w.group / kUnit : g) + number * w.units();
  const f32x16 found = half_to_float(reinterpret_cast<const uint16_t*>(at) + unit * kPanel);
  if constexpr (!units) return found;
  const auto* multiples = reinterpret_cast<const int8_t*>(at + w.multiples_at());
  return found * to_float(widen(multiples + (g + number * w.groups()) * kPanel));
}

template <Format F, bool Zero>
inline GroupNumbers group_numbers(const Matrix& w, const uint8_t* at, int g) {
  GroupNumbers n = {splat(1.0f), {}, {}};
  if constexpr (traits(F).grouped()) n.scale = of_group<F>(w, at, g, 0);
  if constexpr (traits(F).minimums) n.minimum = of_group<F>(w, at, g, 1);
  if constexpr (Zero) n.zero = widen(reinterpret_cast<const int8_t*>(at + w.groups() * 32) + g * kPanel);
  return n;
}

// Sums that begin at the compensation, unless minimums or `twice_expected` need it, or there is none.
constexpr bool starts_at_zero(Format f) {
  return traits(f).minimums || traits(f).planes == Planes::high || is_signed(f);
}

// A row's integer sums of a group into its float sums.
template <Format F, bool Zero>
inline void add_sum(const GroupNumbers& n, i32x16 sum, int32_t comp, float of_row, f32x16& total) {
  constexpr bool high = traits(F).planes == Planes::high;
  if constexpr (Zero) sum += n.zero * (comp / -traits(F).offset());
  if constexpr (high) sum = twice_expected(sum, comp), of_row *= 0.5f;
  total = fma(to_float(sum), traits(F).grouped() ? n.scale * of_row : splat(of_row), total);
  if constexpr (traits(F).minimums) total = fma(n.minimum, splat(of_row * static_cast<float>(-comp)), total);
}

// M rows by P panels that follow each other from `panel`.
template <int M, int P, Format F, bool Zero>
void panels_quantized(const Matrix& w, int panel, const Act& x, Ahead ahead, float* out, int ldo) {
  constexpr bool planes = traits(F).planes == Planes::both;
  const uint8_t *record[P], *data[P], *low[P] = {};
  for (int i = 0; i < P; ++i) {
    record[i] = w.record(panel + i), data[i] = record[i] + w.head_bytes();
    if constexpr (planes) low[i] = w.low_plane(panel + i);
  }
  if constexpr (traits(F).grouped())
    for (int i = 0; i < P; ++i) fetch_head<M <= stream_rows(F)>(record[i], data[i], ahead.of(i, 0));
  f32x16 total[P * M] = {};
  for (int g = 0, k = 0; k < w.kp; ++g, k += w.group) {
    const int end = k + w.group < w.kp ? k + w.group : w.kp;
    i32x16 acc[P * M], more[P * M] = {};
    size_t far[P], far_low[P];
    for (int i = 0; i < P; ++i) {
      far[i] = ahead.of(i, g);
      far_low[i] = M <= stream_rows(F) || !far[i] ? far[i] : w.plane_bytes() * P;
    }
    EACH (int m = 0; m < M; ++m)
      EACH (int i = 0; i < P; ++i)
        acc[i * M + m] = starts_at_zero(F) ? i32x16{} : splati(x.comp[m * x.groups + g]);
    dot_columns<M, P, F>(data, low, x.q + k, x.ld, end - k, far, far_low, acc, more);
    EACH (int i = 0; i < P; ++i) {
      const GroupNumbers n = group_numbers<F, Zero>(w, record[i] + 64, g);
      EACH (int m = 0; m < M; ++m) {
        const int at = m * x.groups + g;
        add_sum<F, Zero>(n, acc[i * M + m] + more[i * M + m], x.comp[at], x.scale[at], total[i * M + m]);
      }
    }
  }
  for (int i = 0; i < P; ++i) {
    const f32x16 row = load<f32x16>(record[i]);
    EACH (int m = 0; m < M; ++m) store(out + m * ldo + 16 * i, total[i * M + m] * row);
  }
}

typedef void (*PanelKernel)(const Matrix&, int, const Act&, Ahead, float*, int);

template <int M, int P, Format F>
PanelKernel panel_in(const Matrix& w) {
  constexpr FormatTraits format = traits(F);
  if constexpr (format.quantized()) {
    if constexpr (format.zeros() && M <= kByteRows)
      if (w.zero) return panels_quantized<M, P, F, true>;
    return panels_quantized<M, P, F, false>;
  } else {
    return panels_float<M, P, F>;
  }
}

template <int M, int P, size_t... I>
PanelKernel panel_of(const Matrix& w, std::index_sequence<I...>) {
  PanelKernel found = nullptr;
  const auto look = [&]<Format F>() {
    if constexpr (M <= rows_at_once(F) || (P == 1 && M <= long_rows(F)))
      if (w.format == F) found = panel_in<M, P, F>(w);
  };
  (look.template operator()<Format{I}>(), ...);
  return found;
}

template <int P, int M = kRowsAtOnce>
PanelKernel panel_kernel(const Matrix& w, int rows) {
  if constexpr (M > 1)
    if (rows < M) return panel_kernel<P, M - 1>(w, rows);
  return panel_of<M, P>(w, std::make_index_sequence<std::size(kFormats)>());
}

// Rows whose inputs are sums of several integers: `multiply(out, ldo)` takes each of them as a row, and
// their products are added. `Most` products at a time: what waits is on the stack.
template <int Most = kLongRows* kPanelsAtOnce, class Multiply>
[[gnu::always_inline]] inline void add_terms(int terms, int rows, int columns, float* out, int ldo,
                                             Multiply&& multiply) {
  if (terms == 1) return multiply(out, ldo);
  alignas(64) float products[Most * kPanel];
  multiply(products, columns);
  for (int m = 0; m < rows; ++m)
    for (int c = 0; c < columns; c += kPanel) {
      const float* from = products + m * terms * columns + c;
      store(out + m * ldo + c, loadf(from) + loadf(from + columns));
    }
}

// many_rows.inl, cells.inl, fp8_pairs.inl
#if defined(MANY_ROWS)
bool many_rows(const Matrix& w, int panel, int count, const Act& x, int rows, float* out, int ldo);
#endif
void sparse_tile(const Matrix& w, int panel, int count, const Act& x, int rows, float* out, int ldo);
PanelKernel pairs_kernel(int panels, int rows);

void tile(const Matrix& w, int panel, int count, const Act& x, int rows, float* out, int ldo) {
  if (w.sparse) {
    for (int i = 0; i < count; i += kSparsePanels)
      sparse_tile(w, panel + i, count - i < kSparsePanels ? count - i : kSparsePanels, x, rows, out + 16 * i,
                  ldo);
    return;
  }
  const int terms = w.act_terms;
#if defined(MANY_ROWS)
  if (many_rows(w, panel, count, x, rows, out, ldo)) return;
#endif
  const bool stream = rows * terms <= stream_rows(w.format);
  const bool pairs = x.pairs && w.format == Format::fp8;
  // Not where that is no larger: floats and planes.
  const int most = pairs ? kLongRows : long_rows(w.format);
  const bool tall = one_product_a_cycle && rows * terms > kRowsAtOnce && most > kRowsAtOnce && !w.zero;
  const int at_once = (tall ? most : rows_at_once(w.format)) / terms;
  const int blocks = stream ? 1 : (rows + at_once - 1) / at_once;
  const int groups = w.group ? w.groups() : (w.kp + kActGroup - 1) / kActGroup;
  const bool close = stream && rows * terms <= prefetch_distances.rows_of(in_bytes(w.format));
  const size_t distance = prefetch_distances.of(traits(w.format).nibbles());
  PanelKernel kernel = nullptr;
  int before = 0;  // its shape
  for (int i = 0; i < count;) {
    const int together = !stream && !tall && i + kPanelsAtOnce <= count ? kPanelsAtOnce : 1;
    for (int b = 0, m = 0; b < blocks; ++b) {
      const int some = (rows - m + blocks - b - 1) / (blocks - b);
      if (const int shape = some * kPanelsAtOnce + together; shape != before) {
        kernel = pairs           ? pairs_kernel(together, some)
                 : together == 1 ? panel_kernel<1, kLongRows>(w, some * terms)
                                 : panel_kernel<kPanelsAtOnce>(w, some * terms);
        before = shape;
      }
      const int parts = groups * together;
      const Ahead ahead{close ? distance : w.stride * together, parts * b / blocks, parts * (b + 1) / blocks,
                        groups};
      add_terms<kLongRows * kPanelsAtOnce>(
          terms, some, 16 * together, out + static_cast<size_t>(m) * ldo + 16 * i, ldo,
          [&](float* to, int ld) { kernel(w, panel + i, row(x, m), ahead, to, ld); });
      m += some;
    }
    i += together;
  }
}

}  // namespace
}  // namespace farthing

#include "linear/cells.inl"
#include "linear/many_rows.inl"
// It takes definitions of cells.inl.
#include "linear/fp8_pairs.inl"
#undef EACH_BLOCK
