// Online softmax attention over latent keys of 8 bits, read where the cache has them.
//
// Integers are multiplied as such (vpdpbusd): queries have 15 bits and weights 16, each as two bytes of which
// one product per byte is summed, exactly. A query's error is at most 1 / 32,638 of the largest number of its
// part, a weight's 1 / 131,070 of the block's largest. Numbers of FP8 become bfloat16, which is exact, four
// keys at a time; queries and weights are rounded to it, as where the cache has bfloat16 (bf16_attend.inl).
// Included by kernels_avx512*.cpp.
namespace farthing {
namespace {

constexpr int kPiece = 64;  // columns of a vector of keys
constexpr int kQueryBits = 7, kQueryTop = (127 << kQueryBits) + 63, kWeightTop = 0xffff;
constexpr float kLeastTop = 2e-34f;  // numbers below it become 0; kWeightTop / kLeastTop is finite

// The sums of 16 vectors, in their order; add(x, y) on vectors of 32 bits.
template <class F>
inline __m512i sum_lanes(const __m512i* a, F&& add) {
  __m512i four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i* v = a + 4 * i;
    const __m512i x = add(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    const __m512i y = add(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    four[i] = add(_mm512_unpacklo_epi64(x, y), _mm512_unpackhi_epi64(x, y));
  }
  const auto halves = [&](__m512i x, __m512i y) {
    return add(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
  };
  return halves(halves(four[0], four[1]), halves(four[2], four[3]));
}

struct Int8Keys {
  static constexpr int kForms = 1;  // vectors that a vector of keys becomes
  static constexpr int kShift = 8;  // of the first sums of weighted values, before the second are added

  // Keys enter products 128 too large, because that operand has no sign. A query's `minus` starts the sums at
  // -1/128 of what this adds; shifting them makes it whole.
  static __m512i key(const uint8_t* from, int column, int) {
    return _mm512_xor_si512(_mm512_loadu_si512(from + column), _mm512_set1_epi8(-128));
  }
  static __m512i between(__m512i sum) { return _mm512_slli_epi32(sum, kQueryBits); }
  static f32x16 sum_each(const __m512i* a) {
    return to_float((i32x16)sum_lanes(a, [](__m512i x, __m512i y) { return _mm512_add_epi32(x, y); }));
  }
  static void expand(__m512i keys, __m512i* to) { *to = keys; }
  // Compilers move the sums of the intrinsic between registers.
  static void multiply(__m512i& acc, __m512i positive, __m512i by) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(positive), "v"(by));
  }
  static void score(__m512i& acc, __m512i key, __m512i query) { multiply(acc, key, query); }
  static void mix(__m512i& acc, __m512i weights, __m512i values) { multiply(acc, weights, values); }
  static f32x16 total(__m512i sum) { return to_float((i32x16)sum); }

  // A part of a query, n columns: 2^7 high + low. Its scale is NaN where a number is not finite.
  static float take_query(const float* x, int n, uint8_t* high, uint8_t* low, int32_t* minus) {
    f32x16 top = {}, nothing = {};
    for_lanes(n, [&](int i) { top = max(top, abs(loadf(x + i))), nothing += loadf(x + i) * 0.0f; });
    const float amax = reduce_max(top), inverse = amax > kLeastTop ? kQueryTop / amax : 0.0f;
    for (int i = 0; i < n; i += 16) {
      const __m512i v = _mm512_cvtps_epi32(loadf(x + i) * inverse);
      const __m512i up = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(64)), kQueryBits);
      store(high + i, _mm512_cvtepi32_epi8(up));
      store(low + i, _mm512_cvtepi32_epi8(_mm512_sub_epi32(v, _mm512_slli_epi32(up, kQueryBits))));
    }
    __m512i sum = _mm512_setzero_si512(), rest = sum;
    for (int i = 0; i < n; i += kPiece) {  // of what meets in a lane
      multiply(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(high + i));
      multiply(rest, _mm512_set1_epi8(1), _mm512_loadu_si512(low + i));
    }
    sum = _mm512_add_epi32(_mm512_slli_epi32(sum, kQueryBits), rest);
    store(minus, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
    return amax / kQueryTop + reduce_add(nothing);
  }

  // Weights of a row [kKeyBlock], of four keys high bytes and low bytes. Returns their scale.
  static float take_weights(const f32x16 (&x)[kKeyBlock / 16], int row, uint32_t (*to)[8][2]) {
    f32x16 top = {}, nothing = {};
    for (const f32x16& v : x) top = max(top, v), nothing += v * 0.0f;
    const float most = reduce_max(top), inverse = most > kLeastTop ? kWeightTop / most : 0.0f;
    alignas(64) uint8_t bytes[2][kKeyBlock];
    for (int i = 0; i < kKeyBlock / 16; ++i) {
      const __m512i v = _mm512_cvtps_epi32(x[i] * inverse);
      store(bytes[0] + 16 * i, _mm512_cvtepi32_epi8(_mm512_srli_epi32(v, 8)));
      store(bytes[1] + 16 * i, _mm512_cvtepi32_epi8(v));
    }
    for (int g = 0; g < kKeyBlock / 4; ++g)
      for (int p = 0; p < 2; ++p) memcpy(&to[g][row][p], bytes[p] + 4 * g, 4);
    return most / kWeightTop + reduce_add(nothing);
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
constexpr Fp8Table kFp8Keys(0);

struct Fp8Keys {
  static constexpr int kForms = 2;
  static constexpr int kShift = 0;

  static __m512i key(const uint8_t* from, int column, int form) {  // of expanded keys
    return _mm512_load_si512(from + 2 * column + kPiece * form);
  }
  static __m512i between(__m512i sum) { return sum; }
  static f32x16 sum_each(const __m512i* a) {
    return (f32x16)sum_lanes(a, [](__m512i x, __m512i y) { return (__m512i)((f32x16)x + (f32x16)y); });
  }

  // Bytes 0 and 2 of dwords, then bytes 1 and 3.
  static void expand(__m512i x, __m512i* to) {
    constexpr int merge = 0xf8;  // a | b & c
    __m512i low, high;
    kFp8Keys.look_up(x, low, high);
    to[0] = _mm512_ternarylogic_epi32(_mm512_slli_epi16(high, 8), low, _mm512_set1_epi16(0xff), merge);
    to[1] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(low, 8), high, _mm512_set1_epi16(-256), merge);
  }
  static void score(__m512i& acc, __m512i key, __m512i query) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(key), "v"(query));
  }
  static void mix(__m512i& acc, __m512i weights, __m512i values) { score(acc, weights, values); }
  static f32x16 total(__m512i sum) { return (f32x16)sum; }

  static float take_query(const float* x, int n, uint8_t* first, uint8_t* second, int32_t* minus) {
    for (int i = 0; i < n; i += 16) {
      const __m256i pairs = in_pairs(loadf(x + i));
      store(first + i, _mm256_castsi256_si128(pairs));
      store(second + i, _mm256_extracti128_si256(pairs, 1));
    }
    store(minus, _mm512_setzero_si512());
    return 1.0f;
  }
  static float take_weights(const f32x16 (&x)[kKeyBlock / 16], int row, uint32_t (*to)[8][2]) {
    alignas(64) uint32_t pairs[kKeyBlock / 16][2][4];
    for (int i = 0; i < kKeyBlock / 16; ++i) store(pairs[i], in_pairs(x[i]));
    for (int g = 0; g < kKeyBlock / 4; ++g)
      for (int p = 0; p < 2; ++p) to[g][row][p] = pairs[g / 4][p][g % 4];
    return 1.0f;
  }

 private:
  // Of every four numbers the pairs (0, 2), then (1, 3) of every four.
  static __m256i in_pairs(f32x16 x) {
    const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    return (__m256i)_mm512_cvtneps_pbh(_mm512_permutexvar_ps(order, x));
  }
};
#endif

template <class Keys>
void take_query(const float* x, int latent, int width, ByteQuery& q) {
  for (int part = 0; part < 2; ++part) {
    const int from = part ? latent : 0, n = part ? width - latent : latent;
    q.scale[part] = Keys::take_query(x + from, n, q.bytes + from, q.bytes + width + from, q.minus[part]);
  }
}

// Products of 4 rows and 4 keys from column `from` to `to` of a part. Prefetches the same columns of N keys
// of `next`.
template <class Keys, int N>
inline f32x16 byte_dots(const ByteQuery* const* row, const uint8_t* const* keys, int part, int from, int to,
                        int width, const uint8_t* const* next) {
  __m512i acc[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) acc[i] = _mm512_loadu_si512(row[i / 4]->minus[part]);
  const auto pass = [&](int form) __attribute__((always_inline)) {
    for (int k = from; k < to; k += kPiece) {
      __m512i key[4];
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) key[s] = Keys::key(keys[s], k, form);
      for (int n = 0; n < N && form == 0; ++n) prefetch_far(next[n] + k);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const __m512i v = _mm512_loadu_si512(row[r]->bytes + form * width + k);
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) Keys::score(acc[4 * r + s], key[s], v);
      }
    }
  };
  pass(0);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) acc[i] = Keys::between(acc[i]);
  pass(1);
  return Keys::sum_each(acc);
}

// Four queries; missing ones repeat the first.
struct FourQueries {
  const ByteQuery* row[4];
  alignas(64) float scale[2][16];  // of each part, every row's four times

  FourQueries() = default;
  FourQueries(const AttendBlock& b, int first) {
    for (int i = 0; i < 16; ++i) {
      row[i / 4] = b.q_bytes->row(first + i / 4 < b.rows ? first + i / 4 : first, b.width);
      for (int part = 0; part < 2; ++part) scale[part][i] = row[i / 4]->scale[part];
    }
  }
};

// Scores of four rows from r on against 4 keys from s on. The next block's keys are prefetched at an even
// rate (see bf16_attend.inl): the scores prefetch two of four keys' latents and all that follows them; where
// they read no latents, the weighted sum prefetches all.
template <class Keys>
inline void byte_scores(const AttendBlock& b, const FourQueries& q, int r, const uint8_t* const* keys, int s,
                        float* scores) {
  const auto* const* next = reinterpret_cast<const uint8_t* const*>(b.rows16) + kKeyBlock + s;
  const auto scaled = [&](int part, f32x16 dots) {
    const f32x16 by = _mm512_broadcast_f32x4(_mm_loadu_ps(b.key_scales + part * kKeyBlock + s));
    return dots * (by * loadf(q.scale[part]));  // with one scale alone, dots may overflow
  };
  f32x16 sum = {};
  if (b.first == 0)
    sum = scaled(0, r ? byte_dots<Keys, 0>(q.row, keys, 0, 0, b.latent, b.width, next)
                      : byte_dots<Keys, 2>(q.row, keys, 0, 0, b.latent, b.width, next));
  if (b.latent < b.width)
    sum += scaled(1, r ? byte_dots<Keys, 0>(q.row, keys, 1, b.latent, b.width, b.width, next)
                       : byte_dots<Keys, 4>(q.row, keys, 1, b.latent, b.width, b.width, next));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)  // there is room for those of missing rows
    _mm_store_ps(scores + (r + i) * kKeyBlock + s, _mm512_extractf32x4_ps(sum, i));
}

// Four keys of 64 columns to [4][16 columns][4 keys], a form kKeyBlock vectors after the other.
template <class Keys>
inline void interleave(const uint8_t* const* keys, int at, __m512i* to) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const auto row = [&](int i) { return _mm512_permutexvar_epi32(order, _mm512_loadu_si512(keys[i] + at)); };
  const __m512i a = row(0), b = row(1), c = row(2), d = row(3);
  const __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
  const __m512i ab_up = _mm512_unpackhi_epi8(a, b), cd_up = _mm512_unpackhi_epi8(c, d);
  const __m512i all[] = {_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd),
                         _mm512_unpacklo_epi16(ab_up, cd_up), _mm512_unpackhi_epi16(ab_up, cd_up)};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512i forms[Keys::kForms];
    Keys::expand(all[i], forms);
    for (int f = 0; f < Keys::kForms; ++f) to[f * kKeyBlock + i] = forms[f];
  }
}

struct ByteWeights {
  alignas(64) uint32_t dwords[2][kKeyBlock / 4][8][2];  // of rows 0 … 7 and 8 … 15
  float scale[16];
};

// out[R][16 C] += weights * values, `groups` of four keys; out is not read where it is fresh. Not inlined:
// compilers then keep the sums in memory.
template <class Keys, int R, int C>
[[gnu::noinline]] void mix_bytes(const uint32_t (*weights)[8][2], const float* scale, const __m512i* values,
                                 int groups, float* out, int latent, bool fresh) {
  __m512i acc[R * C];
#pragma GCC unroll 16
  for (int i = 0; i < R * C; ++i) acc[i] = _mm512_setzero_si512();
  const auto pass = [&](int i, const __m512i* from) __attribute__((always_inline)) {
    for (int g = 0; g < groups; ++g) {
      __m512i v[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) v[c] = from[4 * g + c];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i by = _mm512_set1_epi32(static_cast<int>(weights[g][r][i]));
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) Keys::mix(acc[C * r + c], by, v[c]);
      }
    }
  };
  pass(0, values);
  if constexpr (Keys::kShift > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < R * C; ++i) acc[i] = _mm512_slli_epi32(acc[i], Keys::kShift);
  }
  pass(1, values + (Keys::kForms - 1) * kKeyBlock);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      float* to = out + r * latent + 16 * c;
      store(to, fma(Keys::total(acc[C * r + c]), splat(scale[r]), fresh ? f32x16{} : loadf(to)));
    }
}

template <class Keys, int R = 8>
inline void mix_strip(const AttendBlock& b, const ByteWeights& w, int row, const __m512i* values, int groups,
                      float* out) {
  if constexpr (R > 1)
    if (b.rows - row < R) return mix_strip<Keys, R - 1>(b, w, row, values, groups, out);
  constexpr int C = R > 4 ? 2 : 4;
  for (int c = 0; c < 4; c += C)
    mix_bytes<Keys, R, C>(w.dwords[row / 8], w.scale + row, values + c, groups,
                          out + static_cast<size_t>(row) * b.latent + 16 * c, b.latent, b.fresh);
}

template <class Keys>
void attend_bytes(const AttendBlock& b) {
  alignas(64) float scores[16 * kKeyBlock];
  alignas(64) uint8_t expanded[Keys::kForms > 1 ? 4 * Keys::kForms * kMostByteColumns : 1];
  const auto* const* key = reinterpret_cast<const uint8_t* const*>(b.rows16);
  const auto* const* next = key + kKeyBlock;
  FourQueries queries[4];
  for (int r = 0; r < b.rows; r += 4) queries[r / 4] = FourQueries(b, r);
  for (int s = 0; s < b.keys; s += 4) {
    const uint8_t* keys[4];
    for (int i = 0; i < 4; ++i) {
      keys[i] = Keys::kForms > 1 ? expanded + i * Keys::kForms * b.width : key[s + i];
      for (int at = b.first; at < b.width && Keys::kForms > 1; at += kPiece)
        Keys::expand(_mm512_loadu_si512(key[s + i] + at),
                     reinterpret_cast<__m512i*>(expanded + (i * b.width + at) * Keys::kForms));
    }
    for (int r = 0; r < b.rows; r += 4) byte_scores<Keys>(b, queries[r / 4], r, keys, s, scores);
  }
  online_softmax(b, scores);
  ByteWeights weights;
  for (int r = 0; r < b.rows; ++r) {  // times the scales of latents, which may be NaN where the weight is 0
    f32x16 x[kKeyBlock / 16];
    for (int i = 0; i < kKeyBlock / 16; ++i) {
      const f32x16 w = loadf(scores + r * kKeyBlock + 16 * i);
      x[i] = _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(w, splat(0.0f), _CMP_NEQ_UQ), w,
                                 loadf(b.key_scales + 16 * i));
    }
    weights.scale[r] = Keys::take_weights(x, r % 8, weights.dwords[r / 8]);
  }
  const int groups = (b.keys + 3) / 4;
  alignas(64) __m512i values[Keys::kForms * kKeyBlock];
  for (int at = 0; at < b.latent; at += kPiece) {
    for (int g = 0; g < groups; ++g) {
      for (int n = b.first ? 0 : 2; n < 4; ++n) prefetch_far(next[4 * g + n] + at);
      interleave<Keys>(key + 4 * g, at, values + 4 * g);
    }
    for (int r = 0; r < b.rows; r += 8) mix_strip<Keys>(b, weights, r, values, groups, b.out + at);
  }
}

}  // namespace
}  // namespace farthing
