// What the convolution kernels read: plain structs, included by sources compiled for newer processors too.
//
// Activations are uint8 planes [C / 16][H][W][16] with a border; 16 channels of neighbouring pixels are
// neighbouring bytes, so a tile's addresses are constants. Weights are 16 x 16 blocks (16 outputs, 16 inputs
// of one tap); blocks of zeros are not stored and not computed. Sums are exact integers; what follows is
// float32 with fused roundings, so every instruction set gives the same bytes.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace farthing {

constexpr int kCell = 16;        // adjacent channels, and outputs of a block
constexpr int kStripPixels = 7;  // pixels of a row that are computed together: 224 / 32, and its multiples
constexpr int kBlockBytes = kCell * kCell;

// Up to kStripPixels neighbours of a row: byte offsets from the first cell of a plane.
struct Strip {
  int32_t in, wide, narrow, residual, pixel, count;
};

// Two groups of 16 outputs: blocks both have (interleaved), then those only one has. Offsets are from a
// pixel's window.
struct ConvPair {
  int group[2];  // the second is -1 where there is none
  int both, only[2];
  const int32_t* offsets;
  const int8_t* weights;
};

struct ConvLayer {
  const uint8_t* in = nullptr;
  int step = 0;                                  // bytes between the windows of neighbouring pixels
  bool small_inputs = false;                     // at most 15, so that pairs of products fit 16 bits
  const float *mult = nullptr, *bias = nullptr;  // [groups * 16]
  const uint8_t* residual = nullptr;
  float residual_scale = 0.0f;
  uint8_t *wide = nullptr, *narrow = nullptr;  // round(v) to 8 bits; (wide + half) >> shift, at most top
  float* floats = nullptr;                     // v itself, [pixels][groups * 16]
  int shift = 0, top = 255;
  int64_t residual_plane = 0, wide_plane = 0, narrow_plane = 0, floats_row = 0;
};

}  // namespace farthing
