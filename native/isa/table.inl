// Table of the kernels that are compiled for every instruction set; a set with better ones replaces them.
// The order matters: each file uses definitions of the ones above.
// clang-format off
#include <utility>

#include "isa/kernels.h"
#include "isa/vec.h"

#include "linear/rows.inl"
#include "attention/softmax.inl"
#include "linear/gemm.inl"
#include "attention/attend.inl"
#if defined(__AVX512VNNI__)
#include "attention/byte_attend.inl"
#endif
#include "cache/keys.inl"
#include "attention/index.inl"
#include "attention/delta.inl"
#include "attention/expand.inl"
#include "pack/pack.inl"
#include "pack/calibrate.inl"
#include "vision/conv.inl"
// clang-format on

namespace farthing {
namespace {
#if defined(__AVX512VNNI__)
constexpr ByteAttend kAttendInt8 = {attend_bytes<Int8Keys>, take_query<Int8Keys>};
#else
constexpr ByteAttend kAttendInt8 = {};
#endif

constexpr Kernels table(const char* name) {
  return {
      .name = name,
      .tile = tile,
      .rms_norm = rms_norm,
      .store_act = store_act,
      .gate_mul = gate_mul,
      .axpy = axpy,
      .add = add,
      .blend = blend,
      .softmax = softmax,
      .bounds = bounds,
      .exp_sum = exp_sum,
      .attend = attend,
      .attend_int8 = kAttendInt8,
      .attend_fp8 = {},
      .load_key = load_key<float>,
      .load_key16 = load_key16,
      .split = split,
      .round_bf16 = round_to_bf16,
      .transpose = transpose,
      .pack = pack_panel,
      .unpack = unpack,
      .conv = conv,
      .image_row = image_row,
      .index_scores = index_scores,
      .convolve = convolve,
      .gate = gate,
      .delta = delta,
      .rounding_error = rounding_error,
      .sweep_block = sweep_block,
      .wide = {product, pack_rows, weigh},
      .wide_halves = {},
      .index_halves = false,
      .splits = {.halves = false, .pairs = kPairs, .flipped = kFlipped},
      .blocks = false,
      .keys = Kernels::Keys::f32,
  };
}
}  // namespace
}  // namespace farthing
