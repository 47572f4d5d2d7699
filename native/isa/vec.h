// Arithmetic of sixteen lanes (lanes.h): zmm, pairs of ymm, or four xmm or NEON registers.
//
// Included by the kernel sources only, each compiled for one instruction set; all in an unnamed
// namespace, so that no copy compiled for a newer processor can be linked into code for an older one.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#include "isa/lanes.h"

namespace {

// Loops over vectors that are unrolled early, so that arrays of them stay in registers.
#define EACH _Pragma("GCC unroll 16") for

inline f32x16 loadf(const float* p) { return load<f32x16>(p); }
inline f32x16 splat(float x) { return fill<f32x16>(x); }
inline i32x16 splati(int32_t x) { return fill<i32x16>(x); }
inline f32x16 to_float(i32x16 v) { return convert<f32x16>(v); }
inline f32x16 bits_to_float(u32x16 v) { return as<f32x16>(v); }
inline u32x16 float_to_bits(f32x16 v) { return as<u32x16>(v); }
inline u32x16 above(f32x16 a, f32x16 b) { return as<u32x16>(a > b); }  // all ones where a > b
inline f32x16 abs(f32x16 a) { return bits_to_float(float_to_bits(a) & 0x7fffffffu); }

// Of two operands, max and min return the second if one is NaN. fma: a * b + c, rounded once wherever the
// machine can. Intrinsics, because compilers do not always find these.
#if defined(__AVX512F__)
inline f32x16 max(f32x16 a, f32x16 b) { return _mm512_max_ps(a, b); }
inline f32x16 min(f32x16 a, f32x16 b) { return _mm512_min_ps(a, b); }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__)
inline f32x16 max(f32x16 a, f32x16 b) { return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
inline f32x16 min(f32x16 a, f32x16 b) { return {_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)}; }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
}
#else
inline f32x16 max(f32x16 a, f32x16 b) { return select(a > b, a, b); }
inline f32x16 min(f32x16 a, f32x16 b) { return select(a < b, a, b); }
#if !defined(__ARM_FEATURE_DOTPROD)  // as of all below that neon.h replaces
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return a * b + c; }
#endif
#endif

// Sixteen bytes, or numbers of two, to wider lanes; narrow and low_halves: the low bytes of wider ones.
#if defined(__AVX512F__)
inline i32x16 widen(const int8_t* p) { return (i32x16)_mm512_cvtepi8_epi32(load<__m128i>(p)); }
inline i32x16 widen(const uint8_t* p) { return (i32x16)_mm512_cvtepu8_epi32(load<__m128i>(p)); }
inline u32x16 widen(u16x16 v) { return __builtin_convertvector(v, u32x16); }
inline i8x16 narrow(i32x16 v) { return (i8x16)_mm512_cvtepi32_epi8((__m512i)v); }
inline u16x16 low_halves(u32x16 v) { return __builtin_convertvector(v, u16x16); }
#elif defined(__AVX2__)
inline __m128i eight_bytes(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
template <class V>
inline V joined(__m256i a, __m256i b) {
  return {(decltype(V::a))a, (decltype(V::b))b};
}
inline i32x16 widen(const int8_t* p) {
  return joined<i32x16>(_mm256_cvtepi8_epi32(eight_bytes(p)), _mm256_cvtepi8_epi32(eight_bytes(p + 8)));
}
inline i32x16 widen(const uint8_t* p) {
  return joined<i32x16>(_mm256_cvtepu8_epi32(eight_bytes(p)), _mm256_cvtepu8_epi32(eight_bytes(p + 8)));
}
inline u32x16 widen(u16x16 v) {
  return joined<u32x16>(_mm256_cvtepu16_epi32(_mm256_castsi256_si128((__m256i)v)),
                        _mm256_cvtepu16_epi32(_mm256_extracti128_si256((__m256i)v, 1)));
}
inline u16x16 low_halves(u32x16 v) {
  v &= 0xffffu;
  return (u16x16)_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)v.a, (__m256i)v.b), 0xd8);
}
inline i8x16 narrow(i32x16 v) {
  const __m256i halves = (__m256i)low_halves(as<u32x16>(v & 255));
  return (i8x16)_mm_packus_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}
#elif !defined(__ARM_FEATURE_DOTPROD)
inline i32x16 widen(const int8_t* p) { return of_numbers<i32x16>(p); }
inline i32x16 widen(const uint8_t* p) { return of_numbers<i32x16>(p); }
inline u32x16 widen(u16x16 v) { return of_numbers<u32x16>(reinterpret_cast<const uint16_t*>(&v)); }
inline i8x16 narrow(i32x16 v) { return of_numbers<i8x16>(reinterpret_cast<const int32_t*>(&v)); }
inline u16x16 low_halves(u32x16 v) { return of_numbers<u16x16>(reinterpret_cast<const uint32_t*>(&v)); }
#endif
#if !defined(__AVX2__)  // 64 bytes without instructions of their own for nibbles
typedef Lanes<uint8_t, 64> bytes64;
inline bytes64 low_nibbles(bytes64 v) { return v & 15; }
inline bytes64 high_nibbles(bytes64 v) { return v >> 4; }
inline bytes64 join_nibbles(bytes64 high, bytes64 low) { return high << 4 | low; }
template <int Left>
inline bytes64 with_bits(bytes64 nibbles, bytes64 more, uint8_t bits) {
  return nibbles | ((Left > 0 ? more << (Left > 0 ? Left : 0) : more >> (Left < 0 ? -Left : 0)) & bits);
}
#endif
#if defined(__ARM_FEATURE_DOTPROD)
#include "isa/neon.h"
#else
inline u16x16 widen16(const uint8_t* p) {
#if defined(__AVX2__)
  return (u16x16)_mm256_cvtepu8_epi16(load<__m128i>(p));
#else
  return of_numbers<u16x16>(p);
#endif
}
inline f64x16 to_double(f32x16 v) {
#if defined(__AVX512F__)
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))};
#else
  return of_numbers<f64x16>(reinterpret_cast<const float*>(&v));
#endif
}
#endif

inline f32x16 bf16_to_float(const uint16_t* p) { return bits_to_float(widen(load<u16x16>(p)) << 16); }

inline u16x16 float_to_bf16(f32x16 v) {  // to nearest even; what is not finite stays so
  const u32x16 b = float_to_bits(v);
  // All ones if the exponent is: rounding would carry a NaN with many ones into the sign, to 0.
  const i32x16 special = as<i32x16>((b & 0x7fffffffu) + 0x00800000u) >> 31;
  return low_halves((b + ((0x7fffu + ((b >> 16) & 1u)) & ~as<u32x16>(special))) >> 16);
}

#if !defined(__ARM_FEATURE_DOTPROD)
inline f32x16 half_to_float(const uint16_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(load<__m256i>(p));
#elif defined(__F16C__)
  return {_mm256_cvtph_ps(load<__m128i>(p)), _mm256_cvtph_ps(load<__m128i>(p + 8))};
#else
  // Exponent rebased by a multiplication, which also puts subnormals right.
  const u32x16 h = widen(load<u16x16>(p));
  const f32x16 magnitude = bits_to_float((h & 0x7fffu) << 13) * 0x1p112f;
  return bits_to_float(float_to_bits(magnitude) | (h & 0x8000u) << 16);
#endif
}
#endif

// Sums and maxima in one fixed tree, the same on every machine: halves are added until one lane is left.
#if defined(__AVX512F__)
inline float reduce_add(f32x16 v) { return _mm512_reduce_add_ps((__m512)v); }
inline float reduce_max(f32x16 v) { return _mm512_reduce_max_ps((__m512)v); }
inline int reduce_add(i32x16 v) { return _mm512_reduce_add_epi32((__m512i)v); }
#else
template <class V, class F>
inline auto reduce(const V& v, F&& f) {
  if constexpr (is_pair<V>) {
    return reduce(f(v.a, v.b), f);
#if defined(__AVX2__)
  } else if constexpr (sizeof(V) == 32) {
    const __m256i bits = (__m256i)v;
    typedef decltype(v[0] + 0) T;
    typedef T half __attribute__((vector_size(16)));
    return reduce((half)f((half)_mm256_castsi256_si128(bits), (half)_mm256_extracti128_si256(bits, 1)), f);
#endif
  } else {
    const V two = f(v, __builtin_shufflevector(v, v, 2, 3, 2, 3));
    return f(two, __builtin_shufflevector(two, two, 1, 1, 1, 1))[0];
  }
}
inline float reduce_add(f32x16 v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}
inline float reduce_max(f32x16 v) {
  return reduce(v, [](auto a, auto b) { return select(a > b, a, b); });
}
inline int reduce_add(i32x16 v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}
#endif

// e^x, relative error 2e-7: 2^n times a polynomial on [-ln2/2, ln2/2]. x below -87 gives 0, NaN NaN.
inline f32x16 exp(f32x16 x) {
  const f32x16 floor = splat(-87.0f);
  const i32x16 dead = x < floor;
  x = min(splat(88.0f), max(floor, x));
  const f32x16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const f32x16 shifted = fma(x, splat(1.44269504f), magic);
  const f32x16 n = shifted - magic;
  f32x16 r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  f32x16 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  const u32x16 power = (float_to_bits(shifted) - 0x4b400000u + 127u) << 23;
  const f32x16 y = p * bits_to_float(power);
  return bits_to_float(float_to_bits(y) & ~as<u32x16>(dead));
}

// e^x for x <= 0, relative error 4e-7 (2e-6 without FMA); x below -104 (-87 without AVX-512) gives 0, NaN
// NaN. About half the instructions of exp.
inline f32x16 exp_below(f32x16 x) {
  const f32x16 log2e = splat(1.44269504f);
#if defined(__AVX512F__)
  x = max(splat(-120.0f), x);  // the second operand if one is NaN
  const f32x16 n = _mm512_roundscale_ps(x * log2e, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const f32x16 floor = splat(-87.0f);
  const i32x16 dead = x < floor;
  x = max(floor, x);
  const f32x16 shifted = fma(x, log2e, splat(12582912.0f)), n = shifted - splat(12582912.0f);
#endif
  const f32x16 r = fma(x, log2e, -n);
  const f32x16 square = r * r;  // in three short chains: a processor's schedulers hold few iterations
  const f32x16 high = fma(splat(1.3276466634124517e-3f), r, splat(9.675540961325169e-3f));
  const f32x16 middle = fma(splat(5.550713464617729e-2f), r, splat(2.4022120237350464e-1f));
  const f32x16 low = fma(splat(6.931469440460205e-1f), r, splat(1.0000001192092896f));
  const f32x16 p = fma(fma(high, square, middle), square, low);
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  const u32x16 power = (float_to_bits(shifted) - 0x4b400000u + 127u) << 23;
  const f32x16 y = p * bits_to_float(power);
  return bits_to_float(float_to_bits(y) & ~as<u32x16>(dead));
#endif
}

// Dot products of four: acc[i] += sum over j of u[4 i + j] * s[j]; u unsigned, s signed, no saturation.
// splat4: the four of s in every lane.
#if defined(__AVX512VNNI__)
typedef __m512i bytes64;
inline bytes64 load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline bytes64 low_nibbles(bytes64 v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline bytes64 high_nibbles(bytes64 v) {
  return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15));
}
inline bytes64 join_nibbles(bytes64 high, bytes64 low) {
  return _mm512_or_si512(_mm512_slli_epi16(high, 4), low);
}
// Nibbles with more bits above them: those that a shift to the left by Left moves to where `bits` has ones.
template <int Left>
inline bytes64 with_bits(bytes64 nibbles, bytes64 more, uint8_t bits) {
  const __m512i at =
      Left > 0 ? _mm512_slli_epi16(more, Left > 0 ? Left : 0) : _mm512_srli_epi16(more, Left < 0 ? -Left : 0);
  return _mm512_or_si512(nibbles, _mm512_and_si512(at, _mm512_set1_epi8(static_cast<char>(bits))));
}
// Nibbles as the bytes of a table of 16.
inline bytes64 look_up(const uint8_t* table, bytes64 nibbles) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load<__m128i>(table)), nibbles);
}
inline __m512i splat4(const int8_t* s) { return _mm512_set1_epi32(load<int32_t>(s)); }
inline i32x16 dot4(i32x16 acc, bytes64 u, __m512i s) {
  return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, u, s);
}
inline i32x16 dot4_nibble(i32x16 acc, bytes64 u, __m512i s) { return dot4(acc, u, s); }
#elif defined(__AVX2__)
#if defined(__AVXVNNI__)
constexpr bool kVnni = true;
#else
constexpr bool kVnni = false;
#endif
struct bytes64 {
  __m256i a, b;
};
inline bytes64 load_bytes(const uint8_t* p) { return {load<__m256i>(p), load<__m256i>(p + 32)}; }
inline bytes64 low_nibbles(bytes64 v) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(v.a, m), _mm256_and_si256(v.b, m)};
}
inline bytes64 high_nibbles(bytes64 v) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(v.a, 4), m), _mm256_and_si256(_mm256_srli_epi16(v.b, 4), m)};
}
inline bytes64 join_nibbles(bytes64 high, bytes64 low) {
  return {_mm256_or_si256(_mm256_slli_epi16(high.a, 4), low.a),
          _mm256_or_si256(_mm256_slli_epi16(high.b, 4), low.b)};
}
template <int Left>
inline bytes64 with_bits(bytes64 nibbles, bytes64 more, uint8_t bits) {
  const __m256i ones = _mm256_set1_epi8(static_cast<char>(bits));
  const auto at = [&](__m256i v) {
    return _mm256_and_si256(ones, Left > 0 ? _mm256_slli_epi16(v, Left > 0 ? Left : 0)
                                           : _mm256_srli_epi16(v, Left < 0 ? -Left : 0));
  };
  return {_mm256_or_si256(nibbles.a, at(more.a)), _mm256_or_si256(nibbles.b, at(more.b))};
}
inline bytes64 look_up(const uint8_t* table, bytes64 nibbles) {
  const __m256i t = _mm256_broadcastsi128_si256(load<__m128i>(table));
  return {_mm256_shuffle_epi8(t, nibbles.a), _mm256_shuffle_epi8(t, nibbles.b)};
}
inline __m256i splat4(const int8_t* s) { return _mm256_set1_epi32(load<int32_t>(s)); }
// Eight dot products of four. `Small`: u is at most 127; then two products fit in 16 bits, else the bytes are
// widened.
template <bool Small>
inline __m256i dot4_half(__m256i acc, __m256i u, __m256i s) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(acc, u, s);
#else
  if constexpr (Small)
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
#endif
}
template <bool Small>
inline i32x16 dot4_halves(i32x16 acc, __m256i u0, __m256i u1, __m256i s0, __m256i s1) {
  return joined<i32x16>(dot4_half<Small>((__m256i)acc.a, u0, s0), dot4_half<Small>((__m256i)acc.b, u1, s1));
}
inline i32x16 dot4_nibble(i32x16 acc, bytes64 u, __m256i s) { return dot4_halves<true>(acc, u.a, u.b, s, s); }
inline i32x16 dot4(i32x16 acc, bytes64 u, __m256i s) { return dot4_halves<false>(acc, u.a, u.b, s, s); }
#elif !defined(__ARM_FEATURE_DOTPROD)
inline bytes64 load_bytes(const uint8_t* p) { return load<bytes64>(p); }
inline bytes64 look_up(const uint8_t* table, bytes64 nibbles) {
  uint8_t found[64];
  store(found, nibbles);
  for (uint8_t& f : found) f = table[f];
  return load_bytes(found);
}
inline const int8_t* splat4(const int8_t* s) { return s; }
inline i32x16 dot4(i32x16 acc, bytes64 u, const int8_t* s) {
  const u32x16 w = as<u32x16>(u);
  for (int j = 0; j < 4; ++j) acc += as<i32x16>((w >> (8 * j)) & 255u) * static_cast<int32_t>(s[j]);
  return acc;
}
inline i32x16 dot4_nibble(i32x16 acc, bytes64 u, const int8_t* s) { return dot4(acc, u, s); }
#endif

// The same with four bytes in memory, and sums with a number in memory in every lane. `Small`: u is at
// most 127.
#if defined(__AVX512VNNI__)  // compilers would load and multiply in two instructions
template <bool Small>
inline i32x16 dot4_at(i32x16 acc, bytes64 u, const void* s) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(u), "m"(*static_cast<const char(*)[4]>(s)));
  return acc;
}
inline i32x16 add_at(i32x16 a, const int32_t* b) {
  asm("vpaddd %1%{1to16%}, %0, %0" : "+v"(a) : "m"(*b));
  return a;
}
inline i32x16 sub_at(i32x16 a, const int32_t* b) {
  asm("vpsubd %1%{1to16%}, %0, %0" : "+v"(a) : "m"(*b));
  return a;
}
#else
template <bool Small>
inline i32x16 dot4_at(i32x16 acc, bytes64 u, const void* s) {
  const auto of = splat4(static_cast<const int8_t*>(s));
  return Small ? dot4_nibble(acc, u, of) : dot4(acc, u, of);
}
inline i32x16 add_at(i32x16 a, const int32_t* b) { return a + splati(*b); }
inline i32x16 sub_at(i32x16 a, const int32_t* b) { return a - splati(*b); }
#endif

// Stores to aligned memory that need not read it first and leave the caches alone, and their completion.
inline void store_past_caches(float* p, f32x16 v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX__)
  _mm256_stream_ps(p, v.a);
  _mm256_stream_ps(p + 8, v.b);
#else
  store(p, v);
#endif
}
inline void stores_past_caches_done() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }  // into L2

}  // namespace
