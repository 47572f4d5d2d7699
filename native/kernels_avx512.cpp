// The kernels compiled for avx512; which flags that means stands in CMakeLists.txt.
#include "table.inl"

namespace farthing {
extern constinit const Kernels kernels_avx512 = table("avx512_vnni");
}  // namespace farthing
