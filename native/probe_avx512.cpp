#include <immintrin.h>

#include "probe_kernels.h"

namespace farthing {

float read_sum_avx512(const float* x, long n) {  // n a multiple of 128
  __m512 s[8];
  for (auto& v : s) v = _mm512_setzero_ps();
  for (long i = 0; i < n; i += 128)
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) s[j] = _mm512_add_ps(s[j], _mm512_load_ps(x + i + 16 * j));
  for (int j = 1; j < 8; ++j) s[0] = _mm512_add_ps(s[0], s[j]);
  return _mm512_reduce_add_ps(s[0]);
}

double vnni_int8_ops(long iterations) {
  __m512i a[16];
  for (auto& v : a) v = _mm512_setzero_si512();
  const __m512i x = _mm512_set1_epi32(0x01010101), y = _mm512_set1_epi32(0x01020102);
  for (long i = 0; i < iterations; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) asm volatile("vpdpbusd %1, %2, %0" : "+v"(a[j]) : "v"(x), "v"(y));
  return static_cast<double>(iterations) * 16 * 128;
}

}  // namespace farthing
