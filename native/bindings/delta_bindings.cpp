// Gated DeltaNet's part of the Python module: addresses and sizes in, the GIL released while computing.
#include <nanobind/nanobind.h>

#include "bindings/address.h"
#include "layers/backend.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

using namespace farthing;

void bind_delta(nb::module_& module) {
  nb::class_<Delta>(module, "Delta")
      .def(
          "__init__",
          [](Delta* self, int key_heads, int value_heads, int key_dim, int value_dim, int width,
             uint64_t conv, uint64_t rate, uint64_t shift, uint64_t norm) {
            new (self) Delta{key_heads,       value_heads,     key_dim,          value_dim,      width,
                             at<float>(conv), at<float>(rate), at<float>(shift), at<float>(norm)};
            self->check();
          },
          "key_heads"_a, "value_heads"_a, "key_dim"_a, "value_dim"_a, "width"_a, "conv"_a = 0, "rate"_a = 0,
          "shift"_a = 0, "norm"_a = 0);
  nb::class_<DeltaState>(module, "DeltaState")
      .def(
          "__init__",
          [](DeltaState* self, uint64_t data, uint64_t tail, int64_t layer_data, int64_t layer_tail,
             uint64_t slots, uint64_t sources) {
            new (self) DeltaState{at<float>(data), at<float>(tail),    layer_data,
                                  layer_tail,      at<int32_t>(slots), at<int32_t>(sources)};
          },
          "data"_a, "tail"_a, "layer_data"_a, "layer_tail"_a, "slots"_a, "sources"_a);
  module.def(
      "delta",
      [](Backend& b, const Delta& w, Rows x, Rows gates, int tokens, const DeltaState& state,
         const Batch& batch, float eps, Rows out) {
        b.delta(w, {x, gates, tokens, state, batch, eps, out});
      },
      "backend"_a, "delta"_a, "x"_a, "gates"_a, "tokens"_a, "state"_a, "batch"_a, "eps"_a, "out"_a,
      nb::call_guard<nb::gil_scoped_release>());
}
