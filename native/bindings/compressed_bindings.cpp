// The part of the Python module for compressed pasts and hyper-connections: addresses and sizes in, the GIL
// released while computing.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "attention/indexer.h"
#include "bindings/address.h"
#include "layers/backend.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

using namespace farthing;

void bind_compressed(nb::module_& module) {
  const auto free = nb::call_guard<nb::gil_scoped_release>();
  nb::class_<Compressed>(module, "Compressed")
      .def(
          "__init__",
          [](Compressed* self, int heads, int dim, int rope, int index_heads, int index_dim, int window,
             int rate, bool overlapped, float eps, uint64_t norm, uint64_t cos, uint64_t sin,
             const Attention& attention, const Indexer* index,
             const std::vector<std::tuple<int, uint64_t, uint64_t>>& pools) {
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
                                  &attention,
                                  index,
                                  std::vector<float>(dim, 1.0f),
                                  {}};
            for (const auto& [width, bias, weight] : pools)
              self->pools.push_back({width, at<const float>(bias), at<const float>(weight)});
            self->check();
          },
          "heads"_a, "dim"_a, "rope"_a, "index_heads"_a, "index_dim"_a, "window"_a, "rate"_a, "overlapped"_a,
          "eps"_a, "norm"_a, "cos"_a, "sin"_a, "attention"_a, "index"_a.none(), "pools"_a);
  nb::class_<Past>(module, "Past")
      .def("__init__", [](Past* self, const Cache& own, const std::vector<Cache>& entries, uint64_t open,
                          int64_t layer_open, int64_t own_total) {
        new (self) Past{own, {}, at<float>(open), layer_open, own_total};
        for (size_t i = 0; i < entries.size() && i < kMostPools; ++i) self->entries[i] = entries[i];
      });
  nb::class_<PastBatch>(module, "PastBatch")
      .def("__init__", [](PastBatch* self, const Batch& batch, uint64_t slots, uint64_t own_slots,
                          uint64_t own_table, int own_blocks) {
        new (self) PastBatch{batch, at<const int32_t>(slots), at<const int64_t>(own_slots),
                             at<const int32_t>(own_table), own_blocks};
      });
  module.def(
      "compressed",
      [](Backend& b, const Compressed& w, Rows q, Rows x, Rows index_q, int tokens, const Past& past, int row,
         const PastBatch& batch, Rows out) {
        b.compressed(w, {q, x, index_q, tokens, past.row(row), batch, out});
      },
      "backend"_a, "heads"_a, "q"_a, "x"_a, "index_q"_a, "tokens"_a, "past"_a, "row"_a, "batch"_a, "out"_a,
      free);
  nb::class_<Streams>(module, "Streams")
      .def("__init__",
           [](Streams* self, int count, int hidden, int columns, int steps, float eps, float norm_eps,
              bool ends, std::shared_ptr<Packed> product, uint64_t base, uint64_t scale) {
             new (self) Streams{count,
                                hidden,
                                columns,
                                steps,
                                eps,
                                norm_eps,
                                ends,
                                std::move(product),
                                at<const float>(base),
                                at<const float>(scale)};
             self->check();
           });
  module.def(
      "streams",
      [](Backend& b, const Streams& s, Rows x, Rows y, Rows mix, int tokens, Rows out) {
        b.streams(s, {x, y, mix, tokens, out});
      },
      "backend"_a, "streams"_a, "x"_a, "y"_a, "mix"_a, "tokens"_a, "out"_a, free);
  nb::class_<StreamedLayers>(module, "StreamedLayers")
      .def(nb::init<>())
      .def(
          "add",
          [](StreamedLayers& self, const Streams& attention, const Streams& feed_streams, uint64_t norm,
             uint64_t q_norm, uint64_t feed_norm, std::shared_ptr<Packed> first, std::shared_ptr<Packed> q,
             std::shared_ptr<Packed> index_q, const std::vector<std::shared_ptr<Packed>>& o_a,
             std::shared_ptr<Packed> o_b, const Compressed& heads, const Moe& feed, uint64_t chosen, int past,
             int row, std::shared_ptr<SharedSum> o_sum, std::shared_ptr<SharedSum> feed_sum) {
            self.layers.push_back({&attention, &feed_streams, at<const float>(norm), at<const float>(q_norm),
                                   at<const float>(feed_norm), std::move(first), std::move(q),
                                   std::move(index_q), o_a, std::move(o_b), &heads, &feed,
                                   at<const int64_t>(chosen), past, row, std::move(o_sum),
                                   std::move(feed_sum)});
          },
          "attention_streams"_a, "feed_streams"_a, "norm"_a, "q_norm"_a, "feed_norm"_a, "first"_a, "q"_a,
          "index_q"_a.none(), "o_a"_a, "o_b"_a, "heads"_a, "feed"_a, "chosen"_a, "past"_a, "row"_a,
          "o_sum"_a.none(), "feed_sum"_a.none())
      .def("end", [](StreamedLayers& self, const Streams& ends) { self.ends = &ends; });
  module.def(
      "streamed_layers",
      [](Backend& b, StreamedLayers& model, int first, int last, Rows x, int tokens, uint64_t ids,
         int64_t vocabulary, const std::vector<Past>& pasts, const PastBatch& batch, float eps,
         uint64_t counts, int64_t counts_stride, Rows out) {
        b.layers(model, {x, tokens, first, last, at<const int64_t>(ids), vocabulary, pasts, batch, eps,
                         at<int64_t>(counts), counts_stride, out});
      },
      "backend"_a, "layers"_a, "first"_a, "last"_a, "x"_a, "tokens"_a, "ids"_a, "vocabulary"_a, "pasts"_a,
      "batch"_a, "eps"_a, "counts"_a, "counts_stride"_a, "out"_a, free);
}
