// Arithmetic of sixteen lanes in NEON registers of four, and dot products of bytes: what vec.h has for
// processors with the dot products of Armv8.2 (sdot), and, where the compiler may use them, the mixed ones of
// Armv8.6 (usdot). Included by vec.h, within its unnamed namespace.
#pragma once

// V of f for each register of the vectors.
template <class V, class F, class... From>
inline V each_register(F&& f, const From&... x) {
  if constexpr (is_pair<V>)
    return {each_register<decltype(V::a)>(f, x.a...), each_register<decltype(V::b)>(f, x.b...)};
  else return (V)f(x...);
}

inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return each_register<f32x16>(
      [](auto x, auto y, auto z) { return vfmaq_f32((float32x4_t)z, (float32x4_t)x, (float32x4_t)y); }, a, b,
      c);
}

inline i32x16 widen(const int8_t* p) {
  const int8x16_t v = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(v)), high = vmovl_high_s8(v);
  typedef decltype(i32x16::a.a) four;
  return {{(four)vmovl_s16(vget_low_s16(low)), (four)vmovl_high_s16(low)},
          {(four)vmovl_s16(vget_low_s16(high)), (four)vmovl_high_s16(high)}};
}
inline u16x16 widen16(const uint8_t* p) {
  const uint8x16_t v = vld1q_u8(p);
  typedef decltype(u16x16::a) eight;
  return {(eight)vmovl_u8(vget_low_u8(v)), (eight)vmovl_high_u8(v)};
}
inline u32x16 widen(u16x16 v) {
  typedef decltype(u32x16::a.a) four;
  const auto low = [](auto x) { return (four)vmovl_u16(vget_low_u16((uint16x8_t)x)); };
  const auto high = [](auto x) { return (four)vmovl_high_u16((uint16x8_t)x); };
  return {{low(v.a), high(v.a)}, {low(v.b), high(v.b)}};
}
inline i32x16 widen(const uint8_t* p) { return as<i32x16>(widen(widen16(p))); }
inline u16x16 low_halves(u32x16 v) {
  typedef decltype(u16x16::a) eight;
  const auto joined = [](auto x, auto y) { return (eight)vuzp1q_u16((uint16x8_t)x, (uint16x8_t)y); };
  return {joined(v.a.a, v.a.b), joined(v.b.a, v.b.b)};
}
inline i8x16 narrow(i32x16 v) {
  const u16x16 halves = low_halves(as<u32x16>(v));
  return (i8x16)vuzp1q_s8((int8x16_t)halves.a, (int8x16_t)halves.b);
}
inline f64x16 to_double(f32x16 v) {
  typedef decltype(f64x16::a.a.a) two;
  const auto low = [](auto x) { return (two)vcvt_f64_f32(vget_low_f32((float32x4_t)x)); };
  const auto high = [](auto x) { return (two)vcvt_high_f64_f32((float32x4_t)x); };
  return {{{low(v.a.a), high(v.a.a)}, {low(v.a.b), high(v.a.b)}},
          {{low(v.b.a), high(v.b.a)}, {low(v.b.b), high(v.b.b)}}};
}
inline f32x16 half_to_float(const uint16_t* p) {
  typedef decltype(f32x16::a.a) four;
  const auto at = [&](int i) { return (four)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + i))); };
  return {{at(0), at(4)}, {at(8), at(12)}};
}

inline bytes64 load_bytes(const uint8_t* p) {
  const uint8x16x4_t v = vld1q_u8_x4(p);
  typedef decltype(bytes64::a.a) quarter;
  return {{(quarter)v.val[0], (quarter)v.val[1]}, {(quarter)v.val[2], (quarter)v.val[3]}};
}
inline bytes64 look_up(const uint8_t* table, bytes64 nibbles) {
  const uint8x16_t t = vld1q_u8(table);
  return each_register<bytes64>([&](auto v) { return vqtbl1q_u8(t, (uint8x16_t)v); }, nibbles);
}

// Four dot products of four: u unsigned, s signed. `Small`: u is at most 127, which is the same number
// signed; other bytes cost sdot two products more, for the 128 that it takes from each of them.
template <bool Small>
inline int32x4_t dot_register(int32x4_t acc, uint8x16_t u, int8x16_t s) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  return vusdotq_s32(acc, u, s);
#else
  if constexpr (Small) return vdotq_s32(acc, vreinterpretq_s8_u8(u), s);
  acc = vdotq_s32(acc, vreinterpretq_s8_u8(veorq_u8(u, vdupq_n_u8(128))), s);
  return vdotq_s32(vdotq_s32(acc, s, vdupq_n_s8(64)), s, vdupq_n_s8(64));
#endif
}
template <bool Small>
inline i32x16 dot_registers(i32x16 acc, bytes64 u, int8x16_t s) {
  return each_register<i32x16>(
      [&](auto sum, auto v) { return dot_register<Small>((int32x4_t)sum, (uint8x16_t)v, s); }, acc, u);
}
inline int8x16_t splat4(const int8_t* s) { return vreinterpretq_s8_s32(vdupq_n_s32(load<int32_t>(s))); }
inline i32x16 dot4(i32x16 acc, bytes64 u, int8x16_t s) { return dot_registers<false>(acc, u, s); }
inline i32x16 dot4_nibble(i32x16 acc, bytes64 u, int8x16_t s) { return dot_registers<true>(acc, u, s); }

// dot4 with the bytes 4 I … 4 I + 3 of s, which thus serve sixteen columns. `Signed`: u is small or signed.
template <int I, bool Signed>
inline i32x16 dot4_of_lane(i32x16 acc, bytes64 u, int8x16_t s) {
  return each_register<i32x16>(
      [&](auto sum, auto v) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
        return vusdotq_laneq_s32((int32x4_t)sum, (uint8x16_t)v, s, I);
#else
        static_assert(Signed);
        return vdotq_laneq_s32((int32x4_t)sum, (int8x16_t)v, s, I);
#endif
      },
      acc, u);
}
