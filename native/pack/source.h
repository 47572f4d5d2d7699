// Rows of a checkpoint's matrices, as they are stored.
#pragma once
#include <cstdint>

#include "pack/formats.h"

namespace farthing {

// A matrix [n, k]. `kind` is its storage format; see farthing.ops.weights.Weight.
struct Source {
  enum Kind { f32, bf16, int8, int4, fp8 } kind;
  const void* data;
  const float* scale;  // int8 and int4 [n, k / group], fp8 [n / scale_rows, k / group]
  const int8_t* zero;  // int4 and int8 [n, k / group] or null
  int n, k, group;
  const float* minimum = nullptr;        // [n, k / group], of formats that have minimums
  const float* units = nullptr;          // [n, k / 256], of formats that have units: of the scales …
  const float* minimum_units = nullptr;  // … and of the minimums
  int scale_rows = kActGroup;            // fp8: rows that share a scale

  const float* fp8_scales(int row) const {
    return scale + static_cast<size_t>(row / scale_rows) * ((k + group - 1) / group);
  }
};

// The rows of one panel, which may come from several matrices.
struct PanelRows {
  Source::Kind kind[kPanel];
  const uint8_t* row[kPanel];  // null: a row of zeros
  const float* scale[kPanel];  // fp8: of the row's groups of columns …
  int group[kPanel];           // … and their width
};

}  // namespace farthing
