// The kernels compiled for portable; the flags are in CMakeLists.txt.
#include "isa/table.inl"

namespace farthing {
extern constinit const Kernels kernels_portable = table("portable");
}  // namespace farthing
