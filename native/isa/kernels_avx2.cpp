// The kernels compiled for avx2; the flags are in CMakeLists.txt.
#include "isa/table.inl"

namespace farthing {
extern constinit const Kernels kernels_avx2 = table("avx2");
}  // namespace farthing
