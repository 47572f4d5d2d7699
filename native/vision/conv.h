// Quantized convolutions without im2col, and a small program of them: a folded CNN at batch 1.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "layers/backend.h"
#include "vision/layer.h"

namespace farthing {

// One convolution. weight int8 [outputs][kernel][kernel][channels]; mult, bias [outputs] give
// v = sum * mult + bias, to which residual * residual_scale is added. Planes are numbers; -1: none.
struct ConvArgs {
  int in, kernel, stride, padding, outputs, channels;
  const int8_t* weight;
  const float *mult, *bias;
  bool small_inputs;  // see ConvLayer, as for wide, narrow, shift and top
  int residual;
  float residual_scale;
  int wide, narrow, shift, top;
  bool to_floats;  // v goes to the net's result
};

class ConvNet {
 public:
  explicit ConvNet(Backend& backend) : backend_(backend), parts_(backend.pool.size()) {}
  ConvNet(const ConvNet&) = delete;

  // A plane of `groups` cells of `cell` bytes a pixel, border and all filled; its number.
  int plane(int groups, int height, int width, int border, int cell, int fill);
  // The image's step: float32 [3][H][W] to bytes round(x * scale) + 128.
  void image(int out, float scale);
  void conv(const ConvArgs& a);
  void max_pool(int in, int out);            // 3 x 3, stride 2, border 1 that is never the largest
  void mean(int in, int out, float mult);    // over all pixels: round(sum * mult) to 8 bits
  void run(const float* image, float* out);  // out: what the convolution `to_floats` gives
  std::vector<int64_t> products() const { return products_; }  // of 8-bit integers, that each step computes
  std::vector<double> profile(const float* image, float* out, int repeats);  // median seconds of each step

 private:
  struct Plane {
    uint8_t* memory;
    int groups, height, width, border, cell;
    int row() const { return (width + 2 * border) * cell; }
    int64_t size() const { return static_cast<int64_t>(height + 2 * border) * row(); }
    int at(int y, int x) const { return (y + border) * row() + (x + border) * cell; }
    uint8_t* first() { return memory; }
    const uint8_t* first() const { return memory; }
  };
  struct Weights {  // of one layer, what ConvPair points into
    std::vector<int32_t> offsets;
    int8_t* blocks;
    int64_t bytes;  // of blocks
    std::vector<ConvPair> pairs;
    std::vector<Strip> strips;
    std::vector<float> mult, bias;
    ConvLayer layer;
    int chunks;  // of the strips
  };
  struct Step {
    int units;  // independent of each other
    std::function<void(int)> work;
  };
  struct alignas(64) Part {
    std::atomic<uint64_t> taken{0};  // units of a thread's part: low half from the front, high from the back
  };
  static constexpr int kNone = -1, kDone = -2;
  void step(int64_t products, int units, std::function<void(int)> work);
  void run_steps(int first, int end);
  void help(Team& team);
  void work(int step, const Team& team);
  void pack(Weights& w, const Plane& in, const ConvArgs& a);
  void lay_strips(Weights& w, const Plane& in, const Plane& shape, int stride, const Plane* wide,
                  const Plane* narrow, const Plane* residual);

  Backend& backend_;
  std::vector<Plane> planes_;
  std::vector<std::unique_ptr<Weights>> layers_;
  std::vector<Step> steps_;
  std::vector<Part> parts_;
  alignas(64) std::atomic<int> open_{kNone};  // the step whose units may be taken
  alignas(64) std::atomic<int> helpers_{0};   // threads that may be working on it
  const float* image_ = nullptr;
  float* out_ = nullptr;
  std::vector<int64_t> products_;
};

}  // namespace farthing
