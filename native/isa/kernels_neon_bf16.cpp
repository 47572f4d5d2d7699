// The kernels compiled for NEON's products of matrices of bytes and of bfloat16; flags in CMakeLists.txt.
#include "isa/table.inl"

#include "linear/neon_bf16.inl"

namespace farthing {
namespace {
constexpr Kernels better() {
  Kernels kernels = table("neon_bf16");
  kernels.tile = bf16_tile;
  kernels.splits.halves = true;
  kernels.wide_halves = {product_matrices, pack_pairs, weigh_pairs};
  return kernels;
}
}  // namespace

extern constinit const Kernels kernels_neon_bf16 = better();
}  // namespace farthing
