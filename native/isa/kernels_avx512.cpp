// The kernels compiled for avx512; the flags are in CMakeLists.txt.
#include "isa/table.inl"

namespace farthing {
extern constinit const Kernels kernels_avx512 = table("avx512_vnni");
}  // namespace farthing
