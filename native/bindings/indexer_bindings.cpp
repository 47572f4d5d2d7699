// The indexer's part of the Python module: addresses and sizes in, the GIL released while computing.
#include <nanobind/nanobind.h>

#include "attention/indexer.h"
#include "bindings/address.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

using namespace farthing;

void bind_indexer(nb::module_& module) {
  nb::class_<Indexer>(module, "Indexer")
      .def("__init__", [](Indexer* self, int heads, int dim, int rope, int top_k, float eps, bool interleaved,
                          uint64_t norm, uint64_t bias, uint64_t cos, uint64_t sin) {
        new (self) Indexer{heads,
                           dim,
                           rope,
                           top_k,
                           eps,
                           interleaved,
                           at<const float>(norm),
                           at<const float>(bias),
                           at<const float>(cos),
                           at<const float>(sin)};
      });
  nb::class_<IndexBatch>(module, "IndexBatch")
      .def(
          "__init__",
          [](IndexBatch* self, uint64_t positions, uint64_t slots, uint64_t sequences, uint64_t block_table,
             int max_blocks) {
            new (self) IndexBatch{at<const int32_t>(positions), at<const int64_t>(slots),
                                  at<const int32_t>(sequences), at<const int32_t>(block_table), max_blocks};
          },
          "positions"_a, "slots"_a, "sequences"_a, "block_table"_a, "max_blocks"_a);
  module.def(
      "index",
      [](Backend& b, const Indexer& s, Rows q, Rows k, Rows w, int tokens, const Cache& cache,
         const IndexBatch& batch,
         uint64_t out) { b.index(s, q, k, w, tokens, cache, batch, at<int32_t>(out)); },
      "backend"_a, "indexer"_a, "q"_a, "k"_a, "w"_a, "tokens"_a, "cache"_a, "batch"_a, "out"_a,
      nb::call_guard<nb::gil_scoped_release>());
  module.def("top_positions", [](uint64_t scores, int n, int k, uint64_t out) {
    std::vector<uint32_t> keys(n), near(n);
    top_positions(at<const float>(scores), n, k, keys.data(), near.data(), at<int32_t>(out));
  });
}
