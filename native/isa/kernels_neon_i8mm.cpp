// The kernels compiled for NEON's products of matrices of bytes; the flags are in CMakeLists.txt.
#include "isa/table.inl"

namespace farthing {
extern constinit const Kernels kernels_neon_i8mm = table("neon_i8mm");
}  // namespace farthing
