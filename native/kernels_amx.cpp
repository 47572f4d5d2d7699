// The kernels compiled for AMX (int8 and bfloat16 tiles) on top of AVX-512 VNNI; flags in CMakeLists.txt.
#include "kernels.h"
#include "vec.h"

#include "rows.inl"
#include "gemm.inl"
#include "attend.inl"
#include "keys.inl"

#include "amx_gemm.inl"
#include "amx_attend.inl"

namespace farthing {
extern const Kernels kernels_amx = {
    .name = "amx",
    .tile = amx_tile,
    .rms_norm = rms_norm,
    .store_act = store_act,
    .silu_mul = silu_mul,
    .axpy = axpy,
    .softmax = softmax,
    .exp_sum = exp_sum,
    .attend = amx_attend,
    .load_key = load_key,
    .split = split,
    .split_act = true,
    .split_rows = kTileRows,
    .keys = Kernels::Keys::tiles,
};
}  // namespace farthing
