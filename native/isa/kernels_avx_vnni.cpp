// The kernels compiled for AVX2 with AVX-VNNI; the flags are in CMakeLists.txt.
#include "isa/table.inl"

namespace farthing {
extern constinit const Kernels kernels_avx_vnni = table("avx_vnni");
}  // namespace farthing
