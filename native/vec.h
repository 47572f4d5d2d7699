// Sixteen lanes in the compiler's own vectors: zmm, pairs of ymm, or four xmm or NEON registers.
//
// Included by the kernel sources only, each compiled for one instruction set; all in an unnamed
// namespace, so that no copy compiled for a newer processor can be linked into code for an older one.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

template <class V>
inline V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline void store(void* p, V v) {
  memcpy(p, &v, sizeof v);
}
inline f32x16 loadf(const float* p) { return load<f32x16>(p); }
inline f32x16 splat(float x) { return f32x16{} + x; }
inline i32x16 splati(int32_t x) { return i32x16{} + x; }
inline f32x16 to_float(i32x16 v) { return __builtin_convertvector(v, f32x16); }
inline f32x16 bits_to_float(u32x16 v) { return load<f32x16>(&v); }
inline u32x16 float_to_bits(f32x16 v) { return load<u32x16>(&v); }
#if defined(__AVX512F__)  // GCC does not always find these
inline f32x16 max(f32x16 a, f32x16 b) { return _mm512_max_ps(a, b); }
inline f32x16 min(f32x16 a, f32x16 b) { return _mm512_min_ps(a, b); }
#elif defined(__AVX__)  // and compares vectors wider than a register lane by lane
template <class F>
inline f32x16 by_halves(f32x16 a, f32x16 b, F&& f) {
  const float *pa = (const float*)&a, *pb = (const float*)&b;
  const __m256 low = f(load<__m256>(pa), load<__m256>(pb)),
               high = f(load<__m256>(pa + 8), load<__m256>(pb + 8));
  f32x16 r;
  memcpy(&r, &low, 32);
  memcpy((char*)&r + 32, &high, 32);
  return r;
}
inline f32x16 max(f32x16 a, f32x16 b) {
  return by_halves(a, b, [](__m256 x, __m256 y) { return _mm256_max_ps(x, y); });
}
inline f32x16 min(f32x16 a, f32x16 b) {
  return by_halves(a, b, [](__m256 x, __m256 y) { return _mm256_min_ps(x, y); });
}
inline u32x16 above(f32x16 a, f32x16 b) {
  return (u32x16)by_halves(a, b, [](__m256 x, __m256 y) { return _mm256_cmp_ps(x, y, _CMP_GT_OQ); });
}
#else
inline f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }
inline f32x16 min(f32x16 a, f32x16 b) { return a < b ? a : b; }
#endif
#if !defined(__AVX__) || defined(__AVX512F__)
inline u32x16 above(f32x16 a, f32x16 b) { return (u32x16)(a > b); }  // all ones where a > b
#endif
inline f32x16 abs(f32x16 a) { return bits_to_float(float_to_bits(a) & 0x7fffffffu); }

// a * b + c, rounded once wherever the machine can.
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  const float *pa = (const float*)&a, *pb = (const float*)&b, *pc = (const float*)&c;
  const __m256 low = _mm256_fmadd_ps(load<__m256>(pa), load<__m256>(pb), load<__m256>(pc));
  const __m256 high = _mm256_fmadd_ps(load<__m256>(pa + 8), load<__m256>(pb + 8), load<__m256>(pc + 8));
  f32x16 r;
  memcpy(&r, &low, 32);
  memcpy((char*)&r + 32, &high, 32);
  return r;
#else
  return a * b + c;
#endif
}

inline f32x16 bf16_to_float(const uint16_t* p) {
  return bits_to_float(__builtin_convertvector(load<u16x16>(p), u32x16) << 16);
}

inline u16x16 float_to_bf16(f32x16 v) {  // to nearest even; what is not finite stays so
  const u32x16 b = float_to_bits(v);
  // All ones if the exponent is: rounding would carry a NaN with many ones into the sign, to 0.
  const i32x16 special = (i32x16)((b & 0x7fffffffu) + 0x00800000u) >> 31;
  return __builtin_convertvector((b + ((0x7fffu + ((b >> 16) & 1u)) & ~(u32x16)special)) >> 16, u16x16);
}

inline f32x16 half_to_float(const uint16_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(load<__m256i>(p));
#elif defined(__F16C__)
  const __m256 low = _mm256_cvtph_ps(load<__m128i>(p)), high = _mm256_cvtph_ps(load<__m128i>(p + 8));
  f32x16 r;
  memcpy(&r, &low, 32);
  memcpy(reinterpret_cast<char*>(&r) + 32, &high, 32);
  return r;
#else
  // Exponent rebased by a multiplication, which also puts subnormals right.
  const u32x16 h = __builtin_convertvector(load<u16x16>(p), u32x16);
  const f32x16 magnitude = bits_to_float((h & 0x7fffu) << 13) * 0x1p112f;
  return bits_to_float(float_to_bits(magnitude) | (h & 0x8000u) << 16);
#endif
}

// Sixteen bytes to wider lanes. Written so that compilers do not split the conversion lane by lane.
inline i32x16 widen(const int8_t* p) {
#if defined(__AVX512F__)
  return (i32x16)_mm512_cvtepi8_epi32(load<__m128i>(p));
#elif defined(__AVX2__)
  const __m256i a = _mm256_cvtepi8_epi32(load<__m128i>(p)),
                b = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)));
  i32x16 r;
  memcpy(&r, &a, 32);
  memcpy(reinterpret_cast<char*>(&r) + 32, &b, 32);
  return r;
#else
  return __builtin_convertvector(load<i8x16>(p), i32x16);
#endif
}
inline u16x16 widen16(const uint8_t* p) {
#if defined(__AVX2__)
  return (u16x16)_mm256_cvtepu8_epi16(load<__m128i>(p));
#else
  return __builtin_convertvector(load<u8x16>(p), u16x16);
#endif
}
// The low bytes of sixteen integers.
inline i8x16 narrow(i32x16 v) {
#if defined(__AVX512F__)
  return (i8x16)_mm512_cvtepi32_epi8((__m512i)v);
#else
  return __builtin_convertvector(v, i8x16);
#endif
}

// Sums and maxima in one fixed tree, the same on every machine: halves are added until one lane is left.
#if defined(__AVX512F__)
inline float reduce_add(f32x16 v) { return _mm512_reduce_add_ps((__m512)v); }
inline float reduce_max(f32x16 v) { return _mm512_reduce_max_ps((__m512)v); }
inline int reduce_add(i32x16 v) { return _mm512_reduce_add_epi32((__m512i)v); }
#else
template <class T, class V, class F>
inline T reduce(const V& v, F&& f) {
  T a[16];
  memcpy(a, &v, 64);
  for (int n = 8; n; n >>= 1)
    for (int i = 0; i < n; ++i) a[i] = f(a[i], a[i + n]);
  return a[0];
}
inline float reduce_add(f32x16 v) {
  return reduce<float>(v, [](float a, float b) { return a + b; });
}
inline float reduce_max(f32x16 v) {
  return reduce<float>(v, [](float a, float b) { return a > b ? a : b; });
}
inline int reduce_add(i32x16 v) {
  return reduce<int>(v, [](int a, int b) { return a + b; });
}
#endif

// e^x, relative error 2e-7: 2^n times a polynomial on [-ln2/2, ln2/2]. x below -87 gives 0, NaN NaN: of two
// operands, max and min return the second if one is NaN.
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
  return bits_to_float(float_to_bits(y) & ~reinterpret_cast<const u32x16&>(dead));
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
  return bits_to_float(float_to_bits(y) & ~reinterpret_cast<const u32x16&>(dead));
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
inline i32x16 join(__m256i a, __m256i b) {
  i32x16 r;
  memcpy(&r, &a, 32);
  memcpy(reinterpret_cast<char*>(&r) + 32, &b, 32);
  return r;
}
// 127 * 127 * 2 fits 16 bits; 255 * 127 * 2 does not, so there the bytes are widened.
inline __m256i splat4(const int8_t* s) { return _mm256_set1_epi32(load<int32_t>(s)); }
inline i32x16 dot4_nibble(i32x16 acc, bytes64 u, __m256i x) {
  const __m256i one = _mm256_set1_epi16(1);
  return acc + join(_mm256_madd_epi16(_mm256_maddubs_epi16(u.a, x), one),
                    _mm256_madd_epi16(_mm256_maddubs_epi16(u.b, x), one));
}
inline __m256i dot4_wide(__m256i u, __m256i x) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  return _mm256_add_epi32(even, _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(x, 8)));
}
inline i32x16 dot4(i32x16 acc, bytes64 u, __m256i x) {
  return acc + join(dot4_wide(u.a, x), dot4_wide(u.b, x));
}
#else
typedef uint8_t bytes64 __attribute__((vector_size(64)));
inline bytes64 load_bytes(const uint8_t* p) { return load<bytes64>(p); }
inline bytes64 low_nibbles(bytes64 v) { return v & 15; }
inline bytes64 high_nibbles(bytes64 v) { return v >> 4; }
inline bytes64 join_nibbles(bytes64 high, bytes64 low) { return high << 4 | low; }
template <int Left>
inline bytes64 with_bits(bytes64 nibbles, bytes64 more, uint8_t bits) {
  return nibbles | ((Left > 0 ? more << (Left > 0 ? Left : 0) : more >> (Left < 0 ? -Left : 0)) & bits);
}
inline bytes64 look_up(const uint8_t* table, bytes64 nibbles) {
  bytes64 found;
  for (int i = 0; i < 64; ++i) found[i] = table[nibbles[i]];
  return found;
}
inline const int8_t* splat4(const int8_t* s) { return s; }
inline i32x16 dot4(i32x16 acc, bytes64 u, const int8_t* s) {
  const u32x16 w = load<u32x16>(&u);
  for (int j = 0; j < 4; ++j) acc += (i32x16)((w >> (8 * j)) & 255u) * static_cast<int32_t>(s[j]);
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
  _mm256_stream_ps(p, load<__m256>(&v));
  _mm256_stream_ps(p + 8, load<__m256>(reinterpret_cast<const float*>(&v) + 8));
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
