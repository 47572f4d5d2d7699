// ConvNet in the module farthing._native.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include "vision/conv.h"

namespace nb = nanobind;
using namespace farthing;
using nb::literals::operator""_a;

void bind_conv(nb::module_& module) {
  const auto free = nb::call_guard<nb::gil_scoped_release>();
  nb::class_<ConvNet>(module, "ConvNet")
      .def(nb::init<Backend&>(), nb::keep_alive<1, 2>())
      .def("plane", &ConvNet::plane, "groups"_a, "height"_a, "width"_a, "border"_a, "cell"_a, "fill"_a)
      .def("image", &ConvNet::image, "out"_a, "scale"_a)
      .def(
          "conv",
          [](ConvNet& net, int in, int kernel, int stride, int padding, int outputs, int channels,
             uint64_t weight, uint64_t mult, uint64_t bias, bool small_inputs, int residual,
             float residual_scale, int wide, int narrow, int shift, int top, bool to_floats) {
            net.conv({in, kernel, stride, padding, outputs, channels, reinterpret_cast<const int8_t*>(weight),
                      reinterpret_cast<const float*>(mult), reinterpret_cast<const float*>(bias),
                      small_inputs, residual, residual_scale, wide, narrow, shift, top, to_floats});
          },
          nb::kw_only(), "input"_a, "kernel"_a, "stride"_a, "padding"_a, "outputs"_a, "channels"_a,
          "weight"_a, "mult"_a, "bias"_a, "small_inputs"_a, "residual"_a, "residual_scale"_a, "wide"_a,
          "narrow"_a, "shift"_a, "top"_a, "to_floats"_a)
      .def("max_pool", &ConvNet::max_pool, "input"_a, "out"_a)
      .def("mean", &ConvNet::mean, "input"_a, "out"_a, "mult"_a)
      .def("products", &ConvNet::products)
      .def(
          "run",
          [](ConvNet& net, uint64_t image, uint64_t out) {
            net.run(reinterpret_cast<const float*>(image), reinterpret_cast<float*>(out));
          },
          free)
      .def(
          "profile",
          [](ConvNet& net, uint64_t image, uint64_t out, int repeats) {
            return net.profile(reinterpret_cast<const float*>(image), reinterpret_cast<float*>(out), repeats);
          },
          free);
}
