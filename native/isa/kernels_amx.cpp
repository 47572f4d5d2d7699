// The kernels compiled for AMX (int8 and bfloat16 tiles) on top of AVX-512 VNNI; flags in CMakeLists.txt.
#include "isa/table.inl"

#include "isa/tiles.h"

#include "linear/amx_blocks.inl"

#include "linear/amx_gemm.inl"

#include "attention/bf16_expand.inl"

#include "attention/amx_attend.inl"

#include "attention/amx_expand.inl"

#include "attention/bf16_index.inl"

namespace farthing {
namespace {
constexpr Kernels better() {
  Kernels kernels = table("amx");
  kernels.tile = amx_tile;
  kernels.store_act = amx_store_act;
  kernels.blocks = true;
  kernels.attend = amx_attend;
  kernels.splits.halves = true;
  kernels.attend_int8 = {};  // tiles take converted keys
  kernels.keys = Kernels::Keys::tiles;
  kernels.wide_halves = {amx_product, pack_pairs, weigh_pairs};
  kernels.index_scores = bf16_index_scores;
  kernels.index_halves = true;
  return kernels;
}
}  // namespace

extern constinit const Kernels kernels_amx = better();
}  // namespace farthing
