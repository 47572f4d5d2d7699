// Packs 16 rows of a checkpoint into the data of a panel. Rows become lanes by transposition; after that, no
// instruction crosses lanes, and every instruction set computes the same bytes. Included by kernels_*.cpp.
namespace farthing {
namespace {

constexpr int kTileColumns = 64;  // of floats at once: whole groups that are rounded, part of an fp8 block
constexpr float kTiny = 1.17549435e-38f;  // the smallest scale, as in farthing.ops.weights

inline bool is_float(const Matrix& w, Source::Kind kind) {  // converted, not copied
  return kind == Source::f32 || kind == Source::bf16 || (kind == Source::fp8 && w.format != Format::fp8);
}

inline CacheType float_type(Source::Kind kind) {
  return kind == Source::f32 ? CacheType::f32 : kind == Source::bf16 ? CacheType::bf16 : CacheType::fp8;
}

// Columns [at, at + 64) of the float rows: [64][16], zeros after the last column and for other rows.
inline void load_tile(const Matrix& w, const PanelRows& p, int at, float* tile) {
  alignas(64) float rows[kPanel * kTileColumns];
  const int n = w.k - at < kTileColumns ? w.k - at : kTileColumns;
  for (int lane = 0; lane < kPanel; ++lane) {
    float* out = rows + lane * kTileColumns;
    const Source::Kind kind = p.kind[lane];
    if (!p.row[lane] || !is_float(w, kind)) memset(out, 0, sizeof(float) * kTileColumns);
    else expand_part(float_type(kind), p.row[lane], at, n, kTileColumns, 1.0f, out);
    if (p.row[lane] && is_float(w, kind) && kind == Source::fp8)
      for (int i = 0; i < n; ++i) out[i] *= p.scale[lane][(at + i) / p.group[lane]];
  }
  transpose(rows, kTileColumns, kPanel, kTileColumns, tile, kPanel);
}

// Whether no value of a tile is NaN or infinite.
inline bool is_finite(const float* tile) {
  u32x16 any = {};  // an exponent of ones overflows into the sign
  for (int i = 0; i < kTileColumns; ++i) any |= (load<u32x16>(tile + 16 * i) & 0x7fffffffu) + 0x00800000u;
  uint32_t signs = 0;
  for (int lane = 0; lane < 16; ++lane) signs |= any[lane];
  return signs >> 31 == 0;
}

// The next 64 bytes of the rows stored as `kind`, as words [16][16]; zeros after `bytes`, `fill` for others.
inline void load_words(const PanelRows& p, Source::Kind kind, size_t at, int bytes, uint8_t fill,
                       float* words) {
  alignas(64) float rows[kPanel * 16];
  for (int lane = 0; lane < kPanel; ++lane) {
    float* out = rows + lane * 16;
    const bool here = p.row[lane] && p.kind[lane] == kind;
    if (!here || bytes < 64) memset(out, here ? 0 : fill, 64);
    if (here) memcpy(out, p.row[lane] + at, bytes);
  }
  transpose(rows, 16, kPanel, 16, words, 16);
}

// To nearest, ties to even, for magnitudes below 2^22.
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
inline f32x16 nearest(f32x16 v) { return (v + kMagic) - kMagic; }

inline void pack_f32(const Matrix& w, const PanelRows& p, uint8_t* data) {
  alignas(64) float tile[kPanel * kTileColumns];
  for (int at = 0; at < w.kp; at += kTileColumns) {
    load_tile(w, p, at, tile);
    const int n = w.kp - at < kTileColumns ? w.kp - at : kTileColumns;
    memcpy(data + static_cast<size_t>(at) * 64, tile, static_cast<size_t>(n) * 64);
  }
}

inline void pack_bf16(const Matrix& w, const PanelRows& p, uint8_t* data) {
  alignas(64) float tile[kPanel * kTileColumns];
  for (int at = 0; at < w.kp; at += kTileColumns) {
    load_tile(w, p, at, tile);
    for (int i = 0; i < kTileColumns && at + i < w.kp; i += 2) {
      const u32x16 even = widen(float_to_bf16(loadf(tile + 16 * i)));
      const u32x16 odd = widen(float_to_bf16(loadf(tile + 16 * i + 16)));
      store(data + static_cast<size_t>(at + i) * 32, even | odd << 16);
    }
  }
}

inline void pack_fp8(const Matrix& w, const PanelRows& p, uint8_t* data) {
  alignas(64) float words[kPanel * 16];
  for (int at = 0; at < w.kp; at += 64) {
    load_words(p, Source::fp8, at, w.k - at < 64 ? w.k - at : 64, 0, words);
    for (int i = 0; i < 64 && at + i < w.kp; ++i) {
      const u32x16 bytes = load<u32x16>(words + i / 4 * 16) >> (8 * (i % 4));
      store(data + static_cast<size_t>(at + i) * 16, narrow(as<i32x16>(bytes)));
    }
  }
}

// The scales of 16 rows rounded to int8, and their integers + 128: farthing.ops.weights.quantize_int8.
inline void round_rows(const Matrix& w, const PanelRows& p, float* scales, uint8_t* data) {
  alignas(64) float tile[kPanel * kTileColumns];
  f32x16 top = {};
  bool finite = true;
  for (int at = 0; at < w.kp; at += kTileColumns) {
    load_tile(w, p, at, tile);
    finite &= is_finite(tile);
    for (int i = 0; i < kTileColumns; ++i) top = max(top, abs(loadf(tile + 16 * i)));
  }
  const f32x16 scale = max(top / 127.0f, splat(kTiny));
  store(scales, finite ? scale : splat(__builtin_nanf("")));
  for (int at = 0; at < w.kp; at += kTileColumns) {
    load_tile(w, p, at, tile);
    for (int i = 0; i < kTileColumns; i += 4) {
      u32x16 word = {};
      for (int j = 0; j < 4; ++j) {
        const f32x16 r = max(nearest(loadf(tile + 16 * (i + j)) / scale), splat(-127.0f));
        word |= (float_to_bits(min(r, splat(127.0f)) + kMagic) & 255u) << (8 * j);
      }
      store(data + static_cast<size_t>(at + i) * 16, word ^ 0x80808080u);
    }
  }
}

constexpr float kRanges[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f, 0.7f};

// The best of the roundings of 16 groups that were tried.
struct Rounding {
  alignas(64) double gain[16], dot[16], square[16];
  alignas(64) float step[16];

  Rounding() {
    for (double& g : gain) g = -1.0;
  }

  void compare(f32x16 tried, f64x16 dots, f32x16 squares) {
    alignas(64) double products[16];
    alignas(64) float t[16], s[16];
    store(products, dots), store(t, tried), store(s, squares);
    for (int i = 0; i < 16; ++i) {
      const double d = products[i], sq = static_cast<double>(s[i]);
      const double g = sq > 0.0 ? d * d / sq : 0.0;
      const bool better = g > gain[i];
      gain[i] = better ? g : gain[i];
      dot[i] = better ? d : dot[i];
      square[i] = better ? sq : square[i];
      step[i] = better ? t[i] : step[i];
    }
  }

  // Stores the scales of least squared error. unit: of the products.
  void fit(f32x16 unit, float* scales) const {
    for (int i = 0; i < 16; ++i) {
      const float fitted =
          square[i] > 0.0 ? static_cast<float>(dot[i] / square[i] * static_cast<double>(unit[i])) : step[i];
      scales[i] = __builtin_fabsf(fitted) < kTiny ? step[i] : fitted;
    }
  }
};

constexpr float kLeast = 0x1.ep-6f;  // every range rounds smaller values to 0; the largest is 1 to 2

// A group of columns of 16 rows. With x scaled by a power of two so that the largest magnitude is 1 to 2,
// high + low = x, and sums of up to 64 products with 4-bit integers are exact in float32: high is a multiple
// of 2^-13, and low one of 2^-29, at most 2^-14. Values below kLeast are left out.
struct Group {
  const float* x;
  int n;
  f32x16 top, power;
  bool rest;  // whether any low is not 0
  alignas(64) float high[kPanel * kTileColumns], low[kPanel * kTileColumns];

  Group(const float* values, int columns) : x(values), n(columns), top{} {
    for (int i = 0; i < n; ++i) top = max(top, abs(loadf(x + 16 * i)));
    const u32x16 exponent = float_to_bits(top) >> 23, least = u32x16{} + 1u, most = u32x16{} + 253u;
    const u32x16 kept = select(exponent < least, least, select(exponent > most, most, exponent));
    power = bits_to_float(kept << 23);
    const f32x16 inverse = bits_to_float((254u - kept) << 23);
    u32x16 any = {};
    for (int i = 0; i < n; ++i) {
      const f32x16 scaled = loadf(x + 16 * i) * inverse, coarse = (scaled + 1536.0f) - 1536.0f;
      const u32x16 mask = above(abs(scaled), splat(kLeast));
      const u32x16 fine = float_to_bits(scaled - coarse) & mask;
      store(high + 16 * i, float_to_bits(coarse) & mask);
      store(low + 16 * i, fine);
      any |= fine;
    }
    rest = false;
    for (int i = 0; i < 16; ++i) rest |= any[i] != 0;
  }

  // Tries both signs of a step, because -8 reaches further than 7.
  template <bool Rest>
  void attempt(f32x16 step, Rounding& best) const {
    f32x16 dot[2] = {}, fine[2] = {}, square[2] = {};
    for (int i = 0; i < n; ++i) {
      const f32x16 r = nearest(loadf(x + 16 * i) / step);
      const f32x16 q[2] = {max(min(r, splat(7.0f)), splat(-8.0f)), max(min(r, splat(8.0f)), splat(-7.0f))};
      for (int s = 0; s < 2; ++s) {
        dot[s] = fma(loadf(high + 16 * i), q[s], dot[s]);
        if constexpr (Rest) fine[s] = fma(loadf(low + 16 * i), q[s], fine[s]);
        square[s] = fma(q[s], q[s], square[s]);
      }
    }
    best.compare(step, to_double(dot[0]) + to_double(fine[0]), square[0]);
    best.compare(-step, -to_double(dot[1]) - to_double(fine[1]), square[1]);
  }
};

// 4-bit rounding, the same as farthing.ops.weights.round_to_grid. `find` returns the signed steps of least
// squared error of a group of 16 rows [n][16] and stores the scales; `stored` are the nibbles of values with
// these steps.
struct EvenGrid {
  static f32x16 find(const float* x, int n, float* scales) {
    const Group group(x, n);
    Rounding best;
    for (const float range : kRanges) {
      const f32x16 step = max(group.top * range / 7.5f, splat(kTiny));
      if (group.rest) group.attempt<true>(step, best);
      else group.attempt<false>(step, best);
    }
    best.fit(group.power, scales);
    return loadf(best.step);
  }
  static u32x16 stored(f32x16 x, f32x16 step) {
    const f32x16 r = max(nearest(x / step), splat(-8.0f));
    return float_to_bits(min(r, splat(7.0f)) + (kMagic + 8.0f)) & 15u;
  }
};

constexpr const int8_t* kCodes = kNl4.of;

// The nearest of kCodes to each value.
struct Nearest {
  u32x16 index;
  f32x16 code;
};

#if defined(__AVX512F__)
// Values in cells narrower than the distance of any two thresholds between codes. So a cell has at most one
// threshold, above which values have the code of the next cell.
struct CodeCells {
  static constexpr float kWidth = 11.4f;  // 32 cells reach further than the largest value, 127 / 0.7
  alignas(64) float threshold[32], code[32];
  alignas(64) uint32_t index[32];
  constexpr CodeCells() : threshold{}, code{}, index{} {
    for (int cell = 0, at = 0; cell < 32; ++cell) {
      index[cell] = static_cast<uint32_t>(at);
      code[cell] = kCodes[at];
      threshold[cell] = at < 15 ? 0.5f * static_cast<float>(kCodes[at] + kCodes[at + 1]) : 1e9f;
      if (threshold[cell] < kWidth * static_cast<float>(cell - 15)) ++at;
    }
  }
};
constexpr CodeCells kCells;

inline Nearest nearest_code(f32x16 v) {
  const f32x16 at = _mm512_fmadd_round_ps(v, splat(1.0f / CodeCells::kWidth), splat(kMagic + 16.0f),
                                          _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512i cell = _mm512_castps_si512(at);
  const auto look_up = [&](const float* table) {
    return _mm512_permutex2var_ps(loadf(table), cell, loadf(table + 16));
  };
  const __mmask16 above = _mm512_cmp_ps_mask(v, look_up(kCells.threshold), _CMP_GT_OQ);
  cell = _mm512_mask_add_epi32(cell, above, cell, _mm512_set1_epi32(1));
  const u32x16 index =
      (u32x16)_mm512_permutex2var_epi32(load<__m512i>(kCells.index), cell, load<__m512i>(kCells.index + 16));
  return {index, look_up(kCells.code)};
}
#else
inline Nearest nearest_code(f32x16 v) {
  Nearest found = {{}, splat(kCodes[0])};
#pragma GCC unroll 15
  for (int c = 0; c < 15; ++c) {
    const u32x16 mask = above(v, splat(0.5f * static_cast<float>(kCodes[c] + kCodes[c + 1])));
    found.index -= mask;
    found.code += bits_to_float(mask & float_to_bits(splat(static_cast<float>(kCodes[c + 1] - kCodes[c]))));
  }
  return found;
}
#endif

struct CodeGrid {
  // Sums of few products with 8-bit integers are exact.
  template <bool Rest>
  static void attempt(const Group& g, f32x16 step, Rounding& best) {
    constexpr int kExact = Rest ? 4 : 8;
    f64x16 dot = {};
    f32x16 square = {};
    const f32x16 inverse = 1.0f / step;
    for (int at = 0; at < g.n; at += kExact) {
      f32x16 high = {}, low = {};
      for (int i = at; i < at + kExact; ++i) {
        const f32x16 q = nearest_code(loadf(g.x + 16 * i) * inverse).code;
        high = fma(loadf(g.high + 16 * i), q, high);
        if constexpr (Rest) low = fma(loadf(g.low + 16 * i), q, low);
        square = fma(q, q, square);
      }
      dot += to_double(high);
      if constexpr (Rest) dot += to_double(low);
    }
    best.compare(step, dot, square);
  }
  static f32x16 find(const float* x, int n, float* scales) {
    const Group group(x, n);
    Rounding best;
    for (const float range : kRanges)
      for (const float reach : {static_cast<float>(kCodes[15]), static_cast<float>(kCodes[0])}) {
        const f32x16 size = max(group.top * range / __builtin_fabsf(reach), splat(kTiny));
        const f32x16 step = reach < 0.0f ? -size : size;
        if (group.rest) attempt<true>(group, step, best);
        else attempt<false>(group, step, best);
      }
    best.fit(group.power, scales);
    return loadf(best.step);
  }
  static u32x16 stored(f32x16 x, f32x16 step) { return nearest_code(x * (1.0f / step)).index; }
};

template <class Grid>
void round_groups(const Matrix& w, const PanelRows& p, float* scales, uint8_t* data) {
  alignas(64) float tile[kPanel * kTileColumns];
  bool finite = true;
  for (int k = 0; k < w.kp; k += w.group) {  // 32 or 64 columns
    if (k % kTileColumns == 0) load_tile(w, p, k, tile), finite &= is_finite(tile);
    const float* x = tile + static_cast<size_t>(k % kTileColumns) * 16;
    float* found = scales + static_cast<size_t>(k / w.group) * 16;
    const f32x16 step = Grid::find(x, w.group, found);
    if (!finite) store(found, splat(__builtin_nanf("")));
    for (int i = 0; i < w.group; i += 8) {
      u32x16 word = {};
      for (int j = 0; j < 8; ++j)
        word |= Grid::stored(loadf(x + 16 * (i + j)), step) << (j < 4 ? 8 * j : 8 * j - 28);
      store(data + static_cast<size_t>(k + i) * 8, word);
    }
  }
}

// Lanes of rows that were rounded keep what is stored.
inline void store_lanes(uint8_t* at, u32x16 word, u32x16 rounded) {
  store(at, (word & ~rounded) | (load<u32x16>(at) & rounded));
}

inline void copy_int8(const Matrix& w, const PanelRows& p, u32x16 rounded, uint8_t* data) {
  alignas(64) float words[kPanel * 16];
  for (int at = 0; at < w.kp; at += 64) {
    load_words(p, Source::int8, at, w.k - at < 64 ? w.k - at : 64, 0, words);
    for (int i = 0; i < 16 && at + 4 * i < w.kp; ++i)
      store_lanes(data + static_cast<size_t>(at) * 16 + 64 * i, load<u32x16>(words + 16 * i) ^ 0x80808080u,
                  rounded);
  }
}

inline u32x16 spread(u32x16 v) {  // 4 nibbles to 4 bytes
  v = (v | v << 8) & 0x00ff00ffu;
  return (v | v << 4) & 0x0f0f0f0fu;
}

inline void copy_int4(const Matrix& w, const PanelRows& p, u32x16 rounded, uint8_t* data) {
  const uint8_t fill = w.format_traits().cells ? w.format_traits().zero_byte() : 0;
  alignas(64) float words[kPanel * 16];
  for (int at = 0; at < w.kp; at += 128) {
    const int bytes = w.k - at < 128 ? (w.k - at) / 2 : 64;
    load_words(p, Source::int4, static_cast<size_t>(at) / 2, bytes, fill, words);
    for (int i = 0; i < bytes / 4; ++i) {
      const u32x16 v = load<u32x16>(words + 16 * i);
      store_lanes(data + static_cast<size_t>(at) * 8 + 64 * i, spread(v & 0xffffu) | spread(v >> 16) << 4,
                  rounded);
    }
  }
}

// Integers of more bits than nibbles: see formats.h.
inline void copy_bits(const Matrix& w, const PanelRows& p, uint8_t* data) {
  const FormatTraits& format = w.format_traits();
  const int quads = format.step() / 4, above = format.above();
  const uint32_t low = 0x0f0f0f0fu, mask = 0x01010101u * ((1u << above) - 1);
  alignas(64) float words[kPanel * 16];
  for (int at = 0; at < w.kp; at += 64) {
    load_words(p, Source::int8, at, w.k - at < 64 ? w.k - at : 64, 0, words);
    for (int first = 0; first < 16 && at + 4 * first < w.kp; first += quads) {
      u32x16 bits = {};
      for (int i = 0; i < quads; ++i) {
        // + 2^(bits - 1) or 0 in every byte, without carries: integers of a format with an offset are signed.
        u32x16 v = load<u32x16>(words + 16 * (first + i));
        if (format.offset())
          v = (v ^ 0x01010101u * static_cast<uint32_t>(-format.offset())) & (low | mask << 4);
        store(words + 16 * (first + i), v);
        bits |= (v >> 4 & mask) << (above * i);
      }
      for (int i = 0; i < quads; i += 2, data += 64)
        store(data, (load<u32x16>(words + 16 * (first + i)) & low) |
                        (load<u32x16>(words + 16 * (first + i + 1)) & low) << 4);
      store(data, bits);
      data += 64;
    }
  }
}

// Writes the data of a panel, and the scales of rows that it rounds: [16] or [K / G][16]. Some are NaN if a
// value is not finite.
void pack_panel(const Matrix& w, const PanelRows& p, float* scales, uint8_t* data) {
  if (w.format == Format::f32) return pack_f32(w, p, data);
  if (w.format == Format::bf16) return pack_bf16(w, p, data);
  if (w.format == Format::fp8) return pack_fp8(w, p, data);
  uint32_t lanes[kPanel];
  bool any = false, all = true;
  for (int lane = 0; lane < kPanel; ++lane) {
    const bool is_rounded = p.row[lane] && is_float(w, p.kind[lane]);
    lanes[lane] = is_rounded ? ~0u : 0u;
    any |= is_rounded;
    all &= is_rounded;
  }
  const u32x16 rounded = load<u32x16>(lanes);
  const FormatTraits& format = w.format_traits();
  if (format.above()) return copy_bits(w, p, data);
  const bool nibbles = format.nibbles();
  if (any) {
    const auto round = !nibbles ? round_rows : format.codes ? round_groups<CodeGrid> : round_groups<EvenGrid>;
    round(w, p, scales, data);
  }
  if (!all) nibbles ? copy_int4(w, p, rounded, data) : copy_int8(w, p, rounded, data);
}

}  // namespace
}  // namespace farthing
