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

struct Int8Keys {
  static constexpr int kForms = 1;  // vectors that a vector of keys becomes
  static constexpr int kShift = 8;  // of the first sums of weighted values, before the second are added

  // Keys enter products 128 too large, because that operand has no sign. A query's `minus` starts the sums at
  // -1/128 of what this adds; shifting them makes it whole.
  static __m512i unsign(__m512i keys) { return _mm512_xor_si512(keys, _mm512_set1_epi8(-128)); }
  static __m512i between(__m512i sum) { return _mm512_slli_epi32(sum, kQueryBits); }
  static __m512i add(__m512i x, __m512i y) { return _mm512_add_epi32(x, y); }
  static void expand(__m512i keys, __m512i* to) { *to = keys; }
  // Compilers move the sums of the intrinsic between registers.
  static void multiply(__m512i& acc, __m512i positive, __m512i by) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(positive), "v"(by));
  }
  static void score(__m512i& acc, __m512i key, __m512i query) { multiply(acc, key, query); }
  static void mix(__m512i& acc, __m512i weights, __m512i values) { multiply(acc, weights, values); }
  static f32x16 total(__m512i sum) { return to_float((i32x16)sum); }

  // A part of a query, n columns: 2^7 high + low. Its scale is NaN where a number is not finite.
  static float take_query(const float* x, int n, uint8_t* high, uint8_t* low, int32_t& minus) {
    f32x16 top = {}, nothing = {};
    for_lanes(n, [&](int i) { top = max(top, abs(loadf(x + i))), nothing += loadf(x + i) * 0.0f; });
    const float amax = reduce_max(top), inverse = amax > kLeastTop ? kQueryTop / amax : 0.0f;
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < n; i += 16) {
      const __m512i v = _mm512_cvtps_epi32(loadf(x + i) * inverse);
      const __m512i up = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(64)), kQueryBits);
      store(high + i, _mm512_cvtepi32_epi8(up));
      store(low + i, _mm512_cvtepi32_epi8(_mm512_sub_epi32(v, _mm512_slli_epi32(up, kQueryBits))));
      sum = _mm512_add_epi32(sum, v);
    }
    minus = -reduce_add((i32x16)sum);
    return amax / kQueryTop + reduce_add(nothing);
  }

  // Weights of a row [kKeyBlock] as high bytes and low bytes. Returns their scale.
  static float take_weights(const f32x16 (&x)[kKeyBlock / 16], uint32_t* high, uint32_t* low) {
    f32x16 top = {}, nothing = {};
    for (const f32x16& v : x) top = max(top, v), nothing += v * 0.0f;
    const float most = reduce_max(top), inverse = most > kLeastTop ? kWeightTop / most : 0.0f;
    const auto pair = [&](int i) {
      return _mm512_packus_epi32(_mm512_cvtps_epi32(x[i] * inverse), _mm512_cvtps_epi32(x[i + 1] * inverse));
    };
    const __m512i a = pair(0), b = pair(2), lowest = _mm512_set1_epi16(0xff);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const auto put = [&](uint32_t* to, __m512i first, __m512i second) {
      store(to, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(first, second)));
    };
    put(high, _mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
    put(low, _mm512_and_si512(a, lowest), _mm512_and_si512(b, lowest));
    return most / kWeightTop + reduce_add(nothing);
  }
};
static_assert(kKeyBlock == 64);

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
struct Fp8Keys {
  static constexpr int kForms = 2;
  static constexpr int kShift = 0;

  static __m512i unsign(__m512i keys) { return keys; }
  static __m512i between(__m512i sum) { return sum; }
  static __m512i add(__m512i x, __m512i y) { return (__m512i)((f32x16)x + (f32x16)y); }

  // Bytes 0 and 2 of dwords, then bytes 1 and 3.
  static void expand(__m512i x, __m512i* to) {
    constexpr int merge = 0xf8;  // a | b & c
    __m512i low, high;
    kFp8.look_up(x, low, high);
    to[0] = _mm512_ternarylogic_epi32(_mm512_slli_epi16(high, 8), low, _mm512_set1_epi16(0xff), merge);
    to[1] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(low, 8), high, _mm512_set1_epi16(-256), merge);
  }
  static void score(__m512i& acc, __m512i key, __m512i query) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(key), "v"(query));
  }
  static void mix(__m512i& acc, __m512i weights, __m512i values) { score(acc, weights, values); }
  static f32x16 total(__m512i sum) { return (f32x16)sum; }

  static float take_query(const float* x, int n, uint8_t* first, uint8_t* second, int32_t& minus) {
    for (int i = 0; i < n; i += 16) {
      const __m256i pairs = in_pairs(loadf(x + i));
      store(first + i, _mm256_castsi256_si128(pairs));
      store(second + i, _mm256_extracti128_si256(pairs, 1));
    }
    minus = 0;
    return 1.0f;
  }
  static float take_weights(const f32x16 (&x)[kKeyBlock / 16], uint32_t* first, uint32_t* second) {
    for (int i = 0; i < kKeyBlock / 16; ++i) {
      const __m256i pairs = in_pairs(x[i]);
      store(first + 4 * i, _mm256_castsi256_si128(pairs));
      store(second + 4 * i, _mm256_extracti128_si256(pairs, 1));
    }
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

constexpr int kScored = 32;  // keys that are scored together, each in a lane: no sum crosses lanes
constexpr int kStrip = 256;  // their columns that are transposed together
constexpr int kRows = 8;     // queries that are multiplied together

// A piece of 16 keys to [kPiece / 4] vectors of four columns of each key, two vectors apart; other forms
// follow a strip later.
template <class Keys>
inline void transpose_keys(const uint8_t* const* keys, int at, __m512i* to) {
  __m512i of[4][4];  // [4 columns in 4][4 keys]: keys in lanes of 128 bits
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const auto row = [&](int i) { return Keys::unsign(_mm512_loadu_si512(keys[4 * j + i] + at)); };
    const __m512i a = row(0), b = row(1), c = row(2), d = row(3);
    const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
    const __m512i ab_up = _mm512_unpackhi_epi32(a, b), cd_up = _mm512_unpackhi_epi32(c, d);
    of[0][j] = _mm512_unpacklo_epi64(ab, cd), of[1][j] = _mm512_unpackhi_epi64(ab, cd);
    of[2][j] = _mm512_unpacklo_epi64(ab_up, cd_up), of[3][j] = _mm512_unpackhi_epi64(ab_up, cd_up);
  }
  const auto put = [&](int i, __m512i x) {
    __m512i forms[Keys::kForms];
    Keys::expand(x, forms);
    for (int f = 0; f < Keys::kForms; ++f) to[(f * kStrip / 4 + i) * 2] = forms[f];
  };
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const auto& x = of[k];
    const __m512i even = _mm512_shuffle_i32x4(x[0], x[1], 0x88), odd = _mm512_shuffle_i32x4(x[0], x[1], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(x[2], x[3], 0x88),
                  odd2 = _mm512_shuffle_i32x4(x[2], x[3], 0xdd);
    put(k, _mm512_shuffle_i32x4(even, even2, 0x88)), put(4 + k, _mm512_shuffle_i32x4(odd, odd2, 0x88));
    put(8 + k, _mm512_shuffle_i32x4(even, even2, 0xdd)), put(12 + k, _mm512_shuffle_i32x4(odd, odd2, 0xdd));
  }
}

// What the scores of a group prefetch meanwhile.
struct NextKeys {
  const uint8_t* const* keys;  // [kScored] of the next block, or null
  int at;                      // the first column
  bool all;                    // or every second key
};

// total[R][2] (+)= products of R rows and a group's columns. Not inlined: compilers then keep the sums in
// memory.
template <class Keys, int R>
[[gnu::noinline]] void score_strip(const ByteQuery* q, int width, int part, int at, const __m512i* keys,
                                   int dwords, __m512i* total, bool fresh, NextKeys ahead) {
  __m512i acc[R][2];
  const size_t stride = ByteQuery::size(width);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    acc[r][0] = acc[r][1] = _mm512_set1_epi32(fresh ? q->row(r, width)->minus[part] : 0);
  const auto pass = [&](int form) __attribute__((always_inline)) {
    const __m512i* key = keys + (Keys::kForms > 1 ? form * kStrip / 2 : 0);
    const uint8_t* from = q->bytes + form * width + at;
    for (int i = 0; i < dwords; ++i, key += 2, from += 4) {
      if (ahead.keys && (form == 0 || ahead.all))
        prefetch_far(ahead.keys[2 * (i % 16) + form] + ahead.at + i / 16 * kPiece);
      const __m512i first = key[0], second = key[1];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i by = _mm512_set1_epi32(load<int32_t>(from + r * stride));
        Keys::score(acc[r][0], first, by), Keys::score(acc[r][1], second, by);
      }
    }
  };
  pass(0);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) acc[r][0] = Keys::between(acc[r][0]), acc[r][1] = Keys::between(acc[r][1]);
  pass(1);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < 2; ++g) total[2 * r + g] = fresh ? acc[r][g] : Keys::add(total[2 * r + g], acc[r][g]);
}

template <class Keys, int R = kRows, class... A>
inline void score_rows(int rows, A... a) {
  if constexpr (R > 1)
    if (rows < R) return score_rows<Keys, R - 1>(rows, a...);
  score_strip<Keys, R>(a...);
}

// Scores of all rows against the group of keys from s on. The next block's keys are prefetched at an even
// rate (see bf16_attend.inl): the scores prefetch every second key's latents and all that follows them; where
// they read no latents, the weighted sum prefetches all.
template <class Keys>
inline void byte_scores(const AttendBlock& b, int s, float* scores) {
  const auto* const* keys = reinterpret_cast<const uint8_t* const*>(b.rows16) + s;
  const auto* const* next = keys + kKeyBlock;
  alignas(64) __m512i strip[Keys::kForms * kStrip / 2], total[2 * kTileRows];
  for (int part = b.first ? 1 : 0; part < 2; ++part) {
    const int begin = part ? b.latent : 0, end = part ? b.width : b.latent;
    for (int at = begin; at < end; at += kStrip) {
      const int columns = end - at < kStrip ? end - at : kStrip;
      for (int i = 0; i < columns; i += kPiece)
        for (int g = 0; g < 2; ++g) transpose_keys<Keys>(keys + 16 * g, at + i, strip + i / 2 + g);
      for (int r = 0; r < b.rows; r += kRows)
        score_rows<Keys>(b.rows - r, b.q_bytes->row(r, b.width), b.width, part, at, strip, columns / 4,
                         total + 2 * r, at == begin, NextKeys{r ? nullptr : next, at, part == 1});
    }
    for (int i = 0; i < 2 * b.rows && begin < end; ++i) {
      float* to = scores + i / 2 * kKeyBlock + s + i % 2 * 16;
      const f32x16 by = loadf(b.key_scales + part * kKeyBlock + s + i % 2 * 16) *
                        b.q_bytes->row(i / 2, b.width)->scale[part];
      const f32x16 dots = Keys::total(total[i]) * by;  // with one scale alone, dots may overflow
      store(to, part && !b.first ? loadf(to) + dots : dots);
    }
  }
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
  alignas(64) uint32_t dwords[2][2][kRows][kKeyBlock / 4];  // of the first kRows, and the others
  float scale[16];
};

// out[R][16 C] += weights * values, `groups` of four keys; out is not read where it is fresh. Not inlined:
// compilers then keep the sums in memory.
template <class Keys, int R, int C>
[[gnu::noinline]] void mix_bytes(const uint32_t (*weights)[kRows][kKeyBlock / 4], const float* scale,
                                 const __m512i* values, int groups, float* out, int latent, bool fresh) {
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
        const __m512i by = _mm512_set1_epi32(static_cast<int>(weights[i][r][g]));
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

template <class Keys, int R = kRows>
inline void mix_strip(const AttendBlock& b, const ByteWeights& w, int row, const __m512i* values, int groups,
                      float* out) {
  if constexpr (R > 1)
    if (b.rows - row < R) return mix_strip<Keys, R - 1>(b, w, row, values, groups, out);
  constexpr int C = R > 4 ? 2 : 4;
  for (int c = 0; c < 4; c += C)
    mix_bytes<Keys, R, C>(w.dwords[row / kRows], w.scale + row, values + c, groups,
                          out + static_cast<size_t>(row) * b.latent + 16 * c, b.latent, b.fresh);
}

template <class Keys>
void attend_bytes(const AttendBlock& b) {
  alignas(64) float scores[kTileRows * kKeyBlock];
  const auto* const* key = reinterpret_cast<const uint8_t* const*>(b.rows16);
  const auto* const* next = key + kKeyBlock;
  for (int s = 0; s < b.keys; s += kScored) byte_scores<Keys>(b, s, scores);
  online_softmax(b, scores);
  ByteWeights weights;
  for (int r = 0; r < b.rows; ++r) {  // times the scales of latents, which may be NaN where the weight is 0
    f32x16 x[kKeyBlock / 16];
    for (int i = 0; i < kKeyBlock / 16; ++i) {
      const f32x16 w = loadf(scores + r * kKeyBlock + 16 * i);
      x[i] = _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(w, splat(0.0f), _CMP_NEQ_UQ), w,
                                 loadf(b.key_scales + 16 * i));
    }
    auto& to = weights.dwords[r / kRows];
    weights.scale[r] = Keys::take_weights(x, to[0][r % kRows], to[1][r % kRows]);
  }
  const int groups = (b.keys + 3) / 4;
  alignas(64) __m512i values[Keys::kForms * kKeyBlock];
  for (int at = 0; at < b.latent; at += kPiece) {
    for (int g = 0; g < groups; ++g) {
      for (int n = b.first ? 0 : 1; n < 4; n += b.first ? 1 : 2) prefetch_far(next[4 * g + n] + at);
      interleave<Keys>(key + 4 * g, at, values + 4 * g);
    }
    for (int r = 0; r < b.rows; r += kRows) mix_strip<Keys>(b, weights, r, values, groups, b.out + at);
  }
}

}  // namespace
}  // namespace farthing
