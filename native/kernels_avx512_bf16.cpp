// The kernels compiled for AVX-512 VNNI and BF16; flags in CMakeLists.txt.
#include "kernels.h"
#include "vec.h"

#include "rows.inl"
#include "gemm.inl"
#include "attend.inl"
#include "keys.inl"
#include "bf16_attend.inl"

namespace farthing {
extern const Kernels kernels_avx512_bf16 = {
    .name = "avx512_bf16",
    .tile = tile,
    .rms_norm = rms_norm,
    .store_act = store_act,
    .silu_mul = silu_mul,
    .axpy = axpy,
    .softmax = softmax,
    .exp_sum = exp_sum,
    .attend = bf16_attend,
    .load_key = load_key,
    .split = split,
    .split_act = false,
    .split_rows = 0,
    .keys = Kernels::Keys::rows,
};
}  // namespace farthing
