// The part of the Python module for compressed pasts and hyper-connections: addresses and sizes in, the GIL
// released while computing.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "backend.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

using namespace farthing;

namespace {
template <class T>
T* at(uint64_t address) {
  return reinterpret_cast<T*>(address);
}
}  // namespace

void bind_compressed(nb::module_& module) {
  const auto free = nb::call_guard<nb::gil_scoped_release>();
  nb::class_<Compressed>(module, "Compressed")
      .def("__init__", [](Compressed* self, int heads, int dim, int rope, int index_heads, int index_dim,
                          int window, int rate, bool overlapped, float eps, uint64_t norm, uint64_t cos,
                          uint64_t sin, const std::vector<std::tuple<int, uint64_t, uint64_t>>& pools) {
        new (self) Compressed{heads,
                              dim,
                              rope,
                              index_heads,
                              index_dim,
                              window,
                              rate,
                              overlapped,
                              eps,
                              at<const float>(norm),
                              at<const float>(cos),
                              at<const float>(sin),
                              std::vector<float>(dim, 1.0f),
                              {}};
        for (const auto& [width, bias, weight] : pools)
          self->pools.push_back({width, at<const float>(bias), at<const float>(weight)});
        self->check();
      });
  nb::class_<CompressedArgs>(module, "CompressedArgs")
      .def("__init__",
           [](CompressedArgs* self, Rows q, Rows x, Rows index_q, int tokens, const Cache& own,
              const std::vector<Cache>& entries, uint64_t open, uint64_t slots, const Batch& batch,
              uint64_t own_slots, uint64_t own_table, int own_blocks, int64_t own_total) {
             new (self) CompressedArgs{q,
                                       x,
                                       index_q,
                                       tokens,
                                       own,
                                       {},
                                       at<float>(open),
                                       at<const int32_t>(slots),
                                       batch,
                                       at<const int64_t>(own_slots),
                                       at<const int32_t>(own_table),
                                       own_blocks,
                                       own_total};
             for (size_t i = 0; i < entries.size() && i < kMostPools; ++i) self->entries[i] = entries[i];
           });
  module.def(
      "prepare_compressed",
      [](Backend& b, const Compressed& w, const CompressedArgs& in) { b.prepare_compressed(w, in); },
      "backend"_a, "heads"_a, "args"_a, free);
  module.def(
      "compressed_reads",
      [](const Compressed& w, const CompressedArgs& in, uint64_t select, int selected, uint64_t slots,
         int most, uint64_t counts) {
        compressed_reads(w, in, at<const int32_t>(select), selected, at<int32_t>(slots), most,
                         at<int32_t>(counts));
      },
      "heads"_a, "args"_a, "select"_a, "selected"_a, "slots"_a, "most"_a, "counts"_a, free);
  module.def(
      "turn_back",
      [](Backend& b, const Compressed& w, uint64_t positions, Rows out, int tokens) {
        b.turn_back(w, at<const int32_t>(positions), out, tokens);
      },
      "backend"_a, "heads"_a, "positions"_a, "out"_a, "tokens"_a, free);
  nb::class_<Streams>(module, "Streams")
      .def("__init__", [](Streams* self, int count, int hidden, int steps, float eps, bool ends,
                          uint64_t base, uint64_t scale) {
        new (self) Streams{count, hidden, steps, eps, ends, at<const float>(base), at<const float>(scale)};
      });
  module.def(
      "collapse",
      [](Backend& b, const Streams& s, Rows x, Rows found, int tokens, Rows out, Rows mix) {
        b.collapse(s, x, found, tokens, out, mix);
      },
      "backend"_a, "streams"_a, "x"_a, "found"_a, "tokens"_a, "out"_a, "mix"_a, free);
  module.def(
      "spread",
      [](Backend& b, int count, int hidden, Rows x, Rows y, Rows mix, int tokens, Rows out) {
        b.spread(count, hidden, x, y, mix, tokens, out);
      },
      "backend"_a, "count"_a, "hidden"_a, "x"_a, "y"_a, "mix"_a, "tokens"_a, "out"_a, free);
}
