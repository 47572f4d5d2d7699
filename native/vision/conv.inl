// Strips of pixels times pairs of output groups. Included by the kernel sources; see conv_layer.h for the
// layouts.
#include "vision/layer.h"

namespace farthing {
namespace {

#define EACH_ _Pragma("GCC unroll 16") for

#if defined(__AVX512F__)
constexpr int kGroupsAtOnce = 2, kStripsAtOnce = 2, kPixelsAtOnce = kStripPixels;  // 28 registers of sums
#elif defined(__AVX2__)
constexpr int kGroupsAtOnce = 1, kStripsAtOnce = 1, kPixelsAtOnce = 4;
#else
constexpr int kGroupsAtOnce = 1, kStripsAtOnce = 1, kPixelsAtOnce = 2;
#endif

// acc[o] += sum over j of x[j] * w[4 o + j]: x unsigned, the same four in every lane; w signed.
#if defined(__AVX512VNNI__)
inline __m512i pixel4(const uint8_t* p) { return _mm512_set1_epi32(load<int32_t>(p)); }
inline __m512i weights64(const int8_t* p) { return _mm512_loadu_si512(p); }
template <bool Small>
inline i32x16 dot_pixel(i32x16 acc, __m512i x, __m512i w) {
  return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, x, w);
}
#elif defined(__AVX2__)
struct signed64 {
  __m256i a, b;
};
inline __m256i pixel4(const uint8_t* p) { return _mm256_set1_epi32(load<int32_t>(p)); }
inline signed64 weights64(const int8_t* p) { return {load<__m256i>(p), load<__m256i>(p + 32)}; }
template <bool Small>
inline i32x16 dot_pixel(i32x16 acc, __m256i x, signed64 w) {
  return dot4_halves<Small>(acc, x, x, w.a, w.b);
}
#else
inline const uint8_t* pixel4(const uint8_t* p) { return p; }
inline u32x16 weights64(const int8_t* p) { return load<u32x16>(p); }
template <bool Small>
inline i32x16 dot_pixel(i32x16 acc, const uint8_t* x, u32x16 w) {
  for (int j = 0; j < 4; ++j) acc += (as<i32x16>(w << (24 - 8 * j)) >> 24) * static_cast<int32_t>(x[j]);
  return acc;
}
#endif

// a * b + c rounded once on every machine, so that all give the same bytes.
inline f32x16 fma_exact(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__FMA__)
  return fma(a, b, c);
#else
  float sums[16];
  for (int i = 0; i < 16; ++i) sums[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return loadf(sums);
#endif
}

inline f32x16 bytes_to_float(const uint8_t* p) { return to_float(widen(p)); }

inline i32x16 round_clamped(f32x16 v, float top) {
  v = min(max(v, splat(0.0f)), splat(top)) + splat(12582912.0f);  // 1.5 * 2^23: to the nearest even integer
  return as<i32x16>(v) - 0x4b400000;
}

// Where pixels of one strip and one group go; either may be null.
struct Target {
  uint8_t *wide, *narrow;
};

// wide: round(v) to 8 bits. narrow: (wide + half) >> shift, at most top. 16 bytes per pixel,
// contiguous.
template <int Q>
[[gnu::always_inline]] inline void store_pixels(const ConvLayer& l, Target to, const f32x16 (&v)[Q],
                                                int count) {
  const int half = (1 << l.shift) >> 1;
#if defined(__AVX512F__)
  const __m512i most = _mm512_set1_epi8(static_cast<char>(l.top)),
                add = _mm512_set1_epi8(static_cast<char>(half));
  const __m512i kept = _mm512_set1_epi8(static_cast<char>(255 >> l.shift));
  const __m128i shift = _mm_cvtsi32_si128(l.shift);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  EACH_(int p = 0; p < Q; p += 4) {
    __m512i q[4];
    EACH_(int i = 0; i < 4; ++i)
    q[i] = p + i < Q ? _mm512_cvtps_epi32(v[p + i < Q ? p + i : 0]) : _mm512_setzero_si512();
    const __m512i packed =
        _mm512_packus_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
    const __m512i bytes = _mm512_permutexvar_epi32(order, packed);
    const int n = count - p < 0 ? 0 : count - p > 4 ? 4 : count - p;
    const __mmask16 lanes = static_cast<__mmask16>((1u << (4 * n)) - 1);
    if (to.wide) _mm512_mask_storeu_epi32(to.wide + 16 * p, lanes, bytes);
    if (!to.narrow) continue;
    const __m512i shifted = _mm512_and_si512(_mm512_srl_epi16(_mm512_adds_epu8(bytes, add), shift), kept);
    _mm512_mask_storeu_epi32(to.narrow + 16 * p, lanes, _mm512_min_epu8(shifted, most));
  }
#else
  for (int p = 0; p < Q && p < count; ++p) {
    const i32x16 bytes = round_clamped(v[p], 255.0f);
    if (to.wide) store(to.wide + 16 * p, narrow(bytes));
    if (!to.narrow) continue;
    i32x16 shifted = bytes + half;
    const i32x16 most = splati(255), top = splati(l.top);
    shifted = select(shifted > most, most, shifted) >> l.shift;
    store(to.narrow + 16 * p, narrow(select(shifted > top, top, shifted)));
  }
#endif
}

// Q pixels of one strip and one group, from the pixel `first`.
template <int Q>
[[gnu::always_inline]] inline void finish(const ConvLayer& l, int group, const Strip& s, int first,
                                          const i32x16* acc) {
  const int count = s.count - first;
  if (count <= 0) return;
  const f32x16 mult = loadf(l.mult + group * 16), bias = loadf(l.bias + group * 16);
  f32x16 v[Q];
  EACH_(int p = 0; p < Q; ++p) v[p] = fma_exact(to_float(acc[p]), mult, bias);
  if (l.residual) {
    const uint8_t* from = l.residual + group * l.residual_plane + s.residual + 16 * first;
    const f32x16 scale = splat(l.residual_scale);
    EACH_(int p = 0; p < Q; ++p) v[p] = fma_exact(bytes_to_float(from + 16 * p), scale, v[p]);
  }
  if (l.floats)
    for (int p = 0; p < Q && p < count; ++p)
      store(l.floats + (s.pixel + first + p) * l.floats_row + group * 16, v[p]);
  if (!l.wide && !l.narrow) return;
  store_pixels(l,
               {l.wide ? l.wide + group * l.wide_plane + s.wide + 16 * first : nullptr,
                l.narrow ? l.narrow + group * l.narrow_plane + s.narrow + 16 * first : nullptr},
               v, count);
}

// `count` blocks of G groups into the sums of S strips of Q pixels, acc [G][S][Q].
template <int Step, bool Small, int G, int S, int Q>
[[gnu::always_inline]] inline void add_blocks(const int32_t* offsets, int count, const int8_t* w, int stride,
                                              const uint8_t* const (&in)[S], i32x16* acc) {
  for (int i = 0; i < count; ++i, w += stride) {
    const uint8_t* at[S];
    EACH_(int s = 0; s < S; ++s) at[s] = in[s] + offsets[i];
    EACH_(int j = 0; j < 4; ++j) {
      // Windows overlap: a compiler that keeps what it read for the next pixel has no registers left for
      // sums.
      EACH_(int s = 0; s < S; ++s) asm("" : "+r"(at[s]));
      decltype(weights64(w)) v[G];
      EACH_(int g = 0; g < G; ++g) v[g] = weights64(w + g * kBlockBytes + 64 * j);
      EACH_(int s = 0; s < S; ++s) {
        EACH_(int p = 0; p < Q; ++p) {
          const auto x = pixel4(at[s] + p * Step + 4 * j);
          EACH_(int g = 0; g < G; ++g)
          acc[(g * S + s) * Q + p] = dot_pixel<Small>(acc[(g * S + s) * Q + p], x, v[g]);
        }
      }
    }
  }
}

// S strips of one pair; two groups at once where the registers allow.
template <int Step, bool Small, int S, int Q>
inline void pair_strips(const ConvLayer& l, const ConvPair& pair, const Strip* strip, int first) {
  const uint8_t* in[S];
  for (int s = 0; s < S; ++s) in[s] = l.in + strip[s].in + first * Step;
  const int32_t* const only = pair.offsets + pair.both;
  const int8_t* const rest = pair.weights + static_cast<size_t>(2 * kBlockBytes) * pair.both;
  const int8_t* const last = rest + static_cast<size_t>(kBlockBytes) * pair.only[0];
  if constexpr (kGroupsAtOnce == 2) {
    i32x16 acc[2 * S * Q] = {};
    add_blocks<Step, Small, 2, S, Q>(pair.offsets, pair.both, pair.weights, 2 * kBlockBytes, in, acc);
    add_blocks<Step, Small, 1, S, Q>(only, pair.only[0], rest, kBlockBytes, in, acc);
    add_blocks<Step, Small, 1, S, Q>(only + pair.only[0], pair.only[1], last, kBlockBytes, in, acc + S * Q);
    EACH_(int g = 0; g < 2; ++g)
    EACH_(int s = 0; s < S; ++s)
    if (pair.group[g] >= 0) finish<Q>(l, pair.group[g], strip[s], first, acc + (g * S + s) * Q);
    return;
  }
  for (int g = 0; g < 2 && pair.group[g] >= 0; ++g) {
    i32x16 acc[S * Q] = {};
    add_blocks<Step, Small, 1, S, Q>(pair.offsets, pair.both, pair.weights + g * kBlockBytes, 2 * kBlockBytes,
                                     in, acc);
    add_blocks<Step, Small, 1, S, Q>(only + (g ? pair.only[0] : 0), pair.only[g], g ? last : rest,
                                     kBlockBytes, in, acc);
    for (int s = 0; s < S; ++s) finish<Q>(l, pair.group[g], strip[s], first, acc + s * Q);
  }
}

template <int Step, bool Small>
void conv_pair(const ConvLayer& l, const ConvPair& pair, const Strip* strips, int count) {
  int i = 0;
  for (; i + kStripsAtOnce <= count; i += kStripsAtOnce)
    for (int first = 0; first < kStripPixels; first += kPixelsAtOnce)
      pair_strips<Step, Small, kStripsAtOnce, kPixelsAtOnce>(l, pair, strips + i, first);
  if constexpr (kStripsAtOnce > 1)
    for (; i < count; ++i) pair_strips<Step, Small, 1, kPixelsAtOnce>(l, pair, strips + i, 0);
}

template <bool Small>
void conv_step(const ConvLayer& l, const ConvPair& pair, const Strip* strips, int count) {
  switch (l.step) {
    case 4: return conv_pair<4, Small>(l, pair, strips, count);
    case 8: return conv_pair<8, Small>(l, pair, strips, count);
    case 16: return conv_pair<16, Small>(l, pair, strips, count);
    default: return conv_pair<32, Small>(l, pair, strips, count);
  }
}

void conv(const ConvLayer& l, const ConvPair& pair, const Strip* strips, int count) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
  if (l.small_inputs) return conv_step<true>(l, pair, strips, count);
#endif
  conv_step<false>(l, pair, strips, count);
}

// Rows of three float planes to cells of four bytes, round(x * scale) + 128; the fourth is 0.
void image_row(const float* x, int64_t plane, int width, float scale, uint8_t* out) {
  const auto cells = [&](const float* from, int64_t apart) {
    i32x16 v = {};
    for (int c = 0; c < 3; ++c)
      v |= round_clamped(fma_exact(loadf(from + c * apart), splat(scale), splat(128.0f)), 255.0f) << (8 * c);
    return v;
  };
  int i = 0;
  for (; i + 16 <= width; i += 16) store(out + 4 * i, cells(x + i, plane));
  if (i == width) return;
  float rest[3 * 16] = {};
  for (int c = 0; c < 3; ++c) memcpy(rest + 16 * c, x + c * plane + i, sizeof(float) * (width - i));
  const i32x16 last = cells(rest, 16);
  memcpy(out + 4 * i, &last, 4 * (width - i));
}

#undef EACH_

}  // namespace
}  // namespace farthing
