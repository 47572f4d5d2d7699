// The kernels compiled for AVX-512 VNNI and BF16; flags in CMakeLists.txt.
#include "isa/table.inl"

#include "attention/bf16_attend.inl"

#include "attention/bf16_expand.inl"

#include "attention/bf16_index.inl"

namespace farthing {
namespace {
constexpr Kernels better() {
  Kernels kernels = table("avx512_bf16");
  kernels.attend = bf16_attend;
  kernels.attend_fp8 = {attend_bytes<Fp8Keys>, take_query<Fp8Keys>};
  kernels.keys = Kernels::Keys::rows;
  kernels.wide_halves = wide_pairs;
  kernels.index_scores = bf16_index_scores;
  kernels.index_halves = true;
  return kernels;
}
}  // namespace

extern constinit const Kernels kernels_avx512_bf16 = better();
}  // namespace farthing
