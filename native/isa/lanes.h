// Sixteen lanes: vectors of the compiler where a register holds them, else pairs of halves down to one
// register each. Compilers keep a vector that exceeds a register in memory, and load and store it around
// every operation.
//
// In an unnamed namespace, as all of vec.h.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

namespace {

#if defined(__AVX512F__)
constexpr size_t kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr size_t kRegisterBytes = 32;
#else
constexpr size_t kRegisterBytes = 16;
#endif

template <class Half, class T>
struct Pair;

template <class T, size_t N, bool Fits = (sizeof(T) * N <= kRegisterBytes)>
struct LanesOf {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
template <class T, size_t N>
struct LanesOf<T, N, false> {
  typedef Pair<typename LanesOf<T, N / 2>::type, T> type;
};
template <class T, size_t N>
using Lanes = typename LanesOf<T, N>::type;

typedef Lanes<float, 16> f32x16;
typedef Lanes<int32_t, 16> i32x16;
typedef Lanes<uint32_t, 16> u32x16;
typedef Lanes<uint16_t, 16> u16x16;
typedef Lanes<double, 16> f64x16;
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

template <class V>
constexpr bool is_pair = false;
template <class Half, class T>
constexpr bool is_pair<Pair<Half, T>> = true;

template <class V>
inline V load(const void* p) {
  if constexpr (is_pair<V>) {
    return {load<decltype(V::a)>(p), load<decltype(V::b)>(static_cast<const char*>(p) + sizeof(V::a))};
  } else {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
  }
}
template <class V>
inline void store(void* p, V v) {
  if constexpr (is_pair<V>) store(p, v.a), store(static_cast<char*>(p) + sizeof v.a, v.b);
  else memcpy(p, &v, sizeof v);
}

// x in every lane. x - 0 is x, of -0 too, and compilers know that.
template <class V, class T>
inline V fill(T x) {
  if constexpr (is_pair<V>) return {fill<decltype(V::a)>(x), fill<decltype(V::b)>(x)};
  else return x - V{};
}

// The same bits as other lanes.
template <class V, class From>
inline V as(const From& x) {
  if constexpr (is_pair<V>) return {as<decltype(V::a)>(x.a), as<decltype(V::b)>(x.b)};
  else return (V)x;
}

// The same values in other lanes of that width; floats lose their fractions as integers.
template <class V, class From>
inline V convert(const From& x) {
  if constexpr (is_pair<V>) return {convert<decltype(V::a)>(x.a), convert<decltype(V::b)>(x.b)};
  else return __builtin_convertvector(x, V);
}

// The lanes of `yes` where the mask has ones, else those of `no`.
template <class Mask, class V>
inline V select(const Mask& mask, const V& yes, const V& no) {
  if constexpr (is_pair<V>) return {select(mask.a, yes.a, no.a), select(mask.b, yes.b, no.b)};
  else return mask ? yes : no;
}

// Lanes converted one by one, where no instruction is named.
template <class V, class T>
inline V of_numbers(const T* p) {
  typename std::remove_reference<decltype(V{}[0])>::type lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = p[i];
  return load<V>(lanes);
}

template <class Half, class T>
struct Pair {
  Half a, b;
  typedef Pair<decltype(Half{} < Half{}), int32_t> Mask;  // of lanes of 32 bits

  T operator[](int i) const {
    T lanes[sizeof(Pair) / sizeof(T)];
    memcpy(lanes, this, sizeof lanes);
    return lanes[i];
  }

#define OPERATOR(op)                                                           \
  friend Pair operator op(Pair x, Pair y) { return {x.a op y.a, x.b op y.b}; } \
  friend Pair operator op(Pair x, T y) { return x op fill<Pair>(y); }          \
  friend Pair operator op(T x, Pair y) { return fill<Pair>(x) op y; }          \
  friend Pair& operator op##=(Pair& x, Pair y) { return x = x op y; }          \
  friend Pair& operator op##=(Pair& x, T y) { return x = x op y; }
  OPERATOR(+)
  OPERATOR(-)
  OPERATOR(*)
  OPERATOR(/)
  OPERATOR(&)
  OPERATOR(|)
  OPERATOR(^)
#undef OPERATOR
  friend Pair operator<<(Pair x, int bits) { return {x.a << bits, x.b << bits}; }
  friend Pair operator>>(Pair x, int bits) { return {x.a >> bits, x.b >> bits}; }
  friend Pair operator-(Pair x) { return {-x.a, -x.b}; }
  friend Pair operator~(Pair x) { return {~x.a, ~x.b}; }
  friend Mask operator<(Pair x, Pair y) { return {x.a < y.a, x.b < y.b}; }
  friend Mask operator>(Pair x, Pair y) { return y < x; }
  friend Mask operator<=(Pair x, Pair y) { return {x.a <= y.a, x.b <= y.b}; }
};

}  // namespace
