#include <immintrin.h>

#include "isa/probe_kernels.h"

namespace farthing {

// Products of short codes: vpmaddubsw and sums in 16 bits, before an addition in 32 bits every few steps.
double avx2_int8_ops(long iterations) {
  __m256i a[8] = {};
  const __m256i x = _mm256_setzero_si256();
  __m256i product;
  for (long i = 0; i < iterations; ++i)
#pragma GCC unroll 8
    for (__m256i& sum : a)
      asm volatile("vpmaddubsw %2, %2, %1\n vpaddw %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(x));
  return static_cast<double>(iterations) * 8 * 64;
}

}  // namespace farthing
