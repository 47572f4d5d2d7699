// What calibrated rounding of weights (farthing.compress.quantize) takes most time for: second moments of
// inputs, the ranges of groups, and GPTQ's sweep over columns.
//
// No function keeps threads. Each starts as many as it is given, which take one unit after the other, so that
// a core that other programs use delays nobody but its own unit.
#pragma once
#include <cstdint>

#include "isa/kernels.h"

namespace farthing {

// [tokens][k] inputs are added to the lower half of their second moments, [k][k]; k is a multiple of 16.
// halves: the factors are rounded to bfloat16 where there are such products; sums are floats.
void add_moments(const Kernels& kernels, const float* x, int tokens, int k, bool halves, float* moments,
                 int threads);

// The multiples `factors` of the scales [rows][groups] with which w [rows][groups * columns] has the least
// squared rounding error, weighted by the columns' `energy`; scales are replaced. columns: multiple of 16.
struct RangeSearch {
  const float *w, *energy;
  float* scales;
  int rows, groups, columns;
  const float* factors;
  int count;
  Levels levels;
};
void search_ranges(const Kernels& kernels, const RangeSearch& in, int threads);

// GPTQ of w [rows][k] with second moments U D U^T, U upper triangular with a unit diagonal; k is a multiple
// of 16.
struct Sweep {
  const float* w;
  const float* lower;    // [k][k] the transpose of U, in the order of processing
  const float* pivots;   // [k] D
  const int64_t* order;  // [k] columns in the order of processing
  float damping;         // of the moments, which does not count as an error
  const float* scales;   // [rows][groups]
  int rows, k, groups;
  Levels levels;
  float* value;    // [rows][k]
  float* squared;  // [rows] error of the outputs
};
void sweep(const Kernels& kernels, const Sweep& in, int threads);

}  // namespace farthing
