// What the machine can do at most: the limits that benchmarks are held against.
#pragma once
#include <cstddef>

namespace farthing {

double read_bandwidth(int threads, size_t bytes);  // GB/s, the best of some passes over `bytes` of memory
double peak_ops(const char* what, int threads);    // GOP/s of "avx2_int8" (of short codes), "avx_vnni_int8",
                                                   // "vnni_int8" or "amx_int8"; 0 if unsupported

}  // namespace farthing
