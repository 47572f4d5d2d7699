// The kernels compiled for Armv8.2 with the dot products of bytes; the flags are in CMakeLists.txt.
#include "isa/table.inl"

namespace farthing {
extern constinit const Kernels kernels_neon_dotprod = table("neon_dotprod");
}  // namespace farthing
