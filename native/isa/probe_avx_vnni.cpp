#include <immintrin.h>

#include "isa/probe_kernels.h"

namespace farthing {

double avx_vnni_int8_ops(long iterations) {
  __m256i a[12] = {};
  const __m256i x = _mm256_setzero_si256();
  for (long i = 0; i < iterations; ++i)
#pragma GCC unroll 12
    for (__m256i& sum : a) asm volatile("%{vex%} vpdpbusd %1, %1, %0" : "+x"(sum) : "x"(x));
  return static_cast<double>(iterations) * 12 * 64;
}

}  // namespace farthing
