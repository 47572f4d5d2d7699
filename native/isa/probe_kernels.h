// The loops behind probe.h, each compiled with its own instructions.
#pragma once
#include <cstdint>

namespace farthing {

#if defined(__x86_64__)
float read_sum_avx512(const float* x, long n);
double vnni_int8_ops(long iterations);  // operations done
double avx2_int8_ops(long iterations);
double avx_vnni_int8_ops(long iterations);
double amx_int8_ops(long iterations);
#endif

}  // namespace farthing
