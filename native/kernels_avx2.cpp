// The kernels compiled for avx2; which flags that means stands in CMakeLists.txt.
#include "table.inl"

namespace farthing {
extern constinit const Kernels kernels_avx2 = table("avx2");
}  // namespace farthing
