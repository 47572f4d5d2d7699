// The kernels compiled for portable; which flags that means stands in CMakeLists.txt.
#include "table.inl"

namespace farthing {
extern constinit const Kernels kernels_portable = table("portable");
}  // namespace farthing
