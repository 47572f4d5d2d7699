// The kernels compiled for avx2; which flags that means stands in CMakeLists.txt.
#include "kernels.h"
#include "vec.h"

#include "rows.inl"
#include "gemm.inl"
#include "attend.inl"
#include "keys.inl"

namespace farthing {
extern const Kernels kernels_avx2 = {
    .name = "avx2",
    .tile = tile,
    .rms_norm = rms_norm,
    .store_act = store_act,
    .silu_mul = silu_mul,
    .axpy = axpy,
    .softmax = softmax,
    .exp_sum = exp_sum,
    .attend = attend,
    .load_key = load_key,
    .split = split,
    .split_act = false,
    .split_rows = 0,
    .keys = Kernels::Keys::f32,
};
}  // namespace farthing
