// The Python module farthing._native: addresses and sizes in, nothing copied, the GIL released while
// computing.
#include <algorithm>
#include <chrono>
#include <climits>
#include <iterator>
#include <thread>

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bindings/address.h"
#include "isa/probe.h"
#include "layers/backend.h"

namespace nb = nanobind;
using namespace farthing;
using nb::literals::operator""_a;

namespace {

// kind, data, scale, zero, n, k, group, minimum, units, minimum units, rows of an FP8 scale
using SourceTuple =
    std::tuple<Source::Kind, uint64_t, uint64_t, uint64_t, int, int, int, uint64_t, uint64_t, uint64_t, int>;

std::shared_ptr<Packed> with_inputs(const Backend& b, std::shared_ptr<Packed> p) {
  if (p->m.quantized()) p->m.act_terms = b.input_terms;
  return p;
}

std::shared_ptr<Packed> pack(Backend& b, Format format, int group, bool zero, bool interleave,
                             const BlockCosts& costs, const std::vector<SourceTuple>& tuples) {
  std::vector<Source> sources;
  for (const auto& [kind, data, scale, zeros, n, k, g, minimum, units, minimum_units, rows] : tuples)
    sources.push_back({kind, at<void>(data), at<float>(scale), at<int8_t>(zeros), n, k, g, at<float>(minimum),
                       at<float>(units), at<float>(minimum_units), rows});
  const nb::gil_scoped_release release;
  return with_inputs(
      b, Packed::pack(b.pool, b.kernels, b.arena, format, group, zero, interleave, costs, sources));
}

// late: milliseconds by which thread 1 comes late, as if it had no core.
std::vector<std::tuple<int, int, int, int>> units_of_threads(Backend& b, int units, int late) {
  std::vector<std::vector<int>> seen(b.pool.size());
  b.pool.run([&](Team& team) {
    if (late && team.id() == 1) std::this_thread::sleep_for(std::chrono::milliseconds(late));
    team.for_units(kOnlyLoop, 1, units, [&](int, int u) { seen[team.id()].push_back(u); });
  });
  std::vector<std::tuple<int, int, int, int>> out;  // thread, node, unit, units of the thread
  for (int t = 0; t < b.pool.size(); ++t)
    for (int u : seen[t]) out.emplace_back(t, b.pool.node_of(t), u, static_cast<int>(seen[t].size()));
  return out;
}

// Seconds of a region with so many barriers, as the mean of many. memory: of each thread, the barriers after
// which it has none left; threads that are not named have enough.
double region_seconds(Backend& b, int barriers, int regions, const std::vector<int>& memory) {
  const auto began = std::chrono::steady_clock::now();
  for (int i = 0; i < regions; ++i)
    b.pool.run([&](Team& team) {
      const size_t me = static_cast<size_t>(team.id());
      const int last = me < memory.size() ? memory[me] : barriers + 1;
      for (int j = 0; j < barriers; ++j) {
        if (j == last) throw std::bad_alloc();
        team.barrier();
      }
      if (last == barriers) throw std::bad_alloc();
    });
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count() / regions;
}

}  // namespace

void bind_compressed(nb::module_& module);
void bind_conv(nb::module_& module);
void bind_calibration(nb::module_& module);
void bind_delta(nb::module_& module);
void bind_indexer(nb::module_& module);
void bind_sizes(nb::module_& module);

NB_MODULE(_native, module) {
  module.attr("MOST_NODES") = kMaxParts;
  module.def("instruction_sets", [] { return std::string(supported_kernels()); });
  module.def("read_bandwidth", &read_bandwidth, "threads"_a, "bytes"_a,
             nb::call_guard<nb::gil_scoped_release>());
  module.def(
      "peak_ops", [](const std::string& what, int threads) { return peak_ops(what.c_str(), threads); },
      "what"_a, "threads"_a, nb::call_guard<nb::gil_scoped_release>());

  module.def("nodes_of_pages", &nodes_of_pages, "addresses"_a);
  module.def("prefetch_distances", [] {
    const PrefetchDistances& d = prefetch_distances;
    return std::tuple(d.bytes, d.nibbles, d.nibbles_near, d.rows, d.byte_rows);
  });
  module.def(
      "set_prefetch_distances",
      [](int bytes, int nibbles, int nibbles_near, int rows, int byte_rows) {
        prefetch_distances = {bytes, nibbles, nibbles_near, rows, byte_rows};
      },
      "bytes"_a, "nibbles"_a, "nibbles_near"_a, "rows"_a, "byte_rows"_a);
  module.def("one_product_a_cycle", [] { return one_product_a_cycle; });
  module.def(
      "set_one_product_a_cycle", [](bool one) { one_product_a_cycle = one; }, "one"_a);
  module.def("fast_pairs", [] { return fast_pairs; });
  module.def(
      "set_fast_pairs", [](bool fast) { fast_pairs = fast; }, "fast"_a);

  nb::enum_<Format> formats(module, "Format");
  for (size_t i = 0; i < std::size(kFormats); ++i) formats.value(kFormats[i].name, static_cast<Format>(i));
  module.def("held_formats", [] {  // the stored format that each holds without rounding
    std::vector<std::pair<std::string, Format>> held;
    for (size_t i = 0; i < std::size(kFormats); ++i)
      if (kFormats[i].planes == Planes::none) held.emplace_back(kFormats[i].holds, static_cast<Format>(i));
    return held;
  });
  module.def(
      "is_grouped", [](Format format) { return traits(format).grouped(); }, "format"_a);
  module.def(
      "fits_group",
      [](Format format, int group, int columns) { return fits_group(traits(format), group, columns); },
      "format"_a, "group"_a, "columns"_a);
  module.def(
      "matrix_bytes",
      [](Format format, int group, bool zero, int n, int k) {
        const Matrix m = Matrix::describe(format, n, k, group, zero);
        return m.dense_bytes();
      },
      "format"_a, "group"_a, "zero"_a, "n"_a, "k"_a);
  nb::enum_<Source::Kind>(module, "Kind")
      .value("F32", Source::f32)
      .value("BF16", Source::bf16)
      .value("INT8", Source::int8)
      .value("INT4", Source::int4)
      .value("FP8", Source::fp8);
  nb::enum_<CacheType>(module, "CacheType")
      .value("F32", CacheType::f32)
      .value("BF16", CacheType::bf16)
      .value("FP8", CacheType::fp8)
      .value("INT8", CacheType::int8);
  module.attr("MOST_EXPERTS") = kMostExperts;

  nb::class_<Rows>(module, "Rows")
      .def(
          "__init__",
          [](Rows* self, uint64_t address, int64_t stride) {
            new (self) Rows{at<float>(address), stride};
          },
          "address"_a, "stride"_a);
  nb::class_<Cache>(module, "Cache")
      .def(
          "__init__",
          [](Cache* self, CacheType type, uint64_t data, uint64_t scale, int block_size, int64_t layer_bytes,
             int64_t layer_scales) {
            new (self)
                Cache{type, at<uint8_t>(data), at<float>(scale), block_size, layer_bytes, layer_scales};
          },
          "type"_a, "data"_a, "scale"_a, "block_size"_a, "layer_bytes"_a = 0, "layer_scales"_a = 0);
  nb::class_<Batch>(module, "Batch")
      .def(
          "__init__",
          [](Batch* self, uint64_t positions, uint64_t slots, uint64_t query_start, uint64_t context_lens,
             uint64_t block_table, int sequences, int max_blocks, uint64_t visible) {
            new (self) Batch{at<int32_t>(positions),
                             at<int64_t>(slots),
                             at<int32_t>(query_start),
                             at<int32_t>(context_lens),
                             at<int32_t>(block_table),
                             sequences,
                             max_blocks,
                             at<int32_t>(visible)};
          },
          "positions"_a, "slots"_a, "query_start"_a, "context_lens"_a, "block_table"_a, "sequences"_a,
          "max_blocks"_a, "visible"_a = 0);

  nb::class_<Packed>(module, "Packed")
      .def_prop_ro("format", [](const Packed& p) { return p.m.format; })
      .def_prop_ro("group", [](const Packed& p) { return p.m.group; })
      .def_prop_ro("shape", [](const Packed& p) { return std::make_tuple(p.rows(), p.m.inputs()); })
      .def("follow",
           [](Packed& p, std::shared_ptr<Packed> next) {
             if (next->m.inputs() != p.m.inputs() || p.next)
               throw std::invalid_argument("rows that follow have other columns");
             p.next = std::move(next);
           })
      .def_prop_ro("sparse", [](const Packed& p) { return p.m.sparse; })
      .def_prop_ro("ordered", [](const Packed& p) { return p.m.order != nullptr; })
      .def(
          "reorder", [](Packed& p, uint64_t order) { p.reorder(at<int64_t>(order)); }, "order"_a)
      // How rows multiplied by it are rounded: (largest integer, share of a group's largest magnitude).
      .def("round_inputs", [](Packed& p, float top, float clip) { p.m.act_top = top, p.m.act_clip = clip; })
      .def("fix_input_scale", [](Packed& p, float scale) { p.m.act_scale = scale; })
      .def_prop_ro("input_top", [](const Packed& p) { return p.m.act_top; })
      .def_prop_ro("input_scale", [](const Packed& p) { return p.m.act_scale; })
      .def_prop_ro("nbytes", &Packed::weight_bytes)
      .def(
          "read_rows",  // int64 ids [count] -> float32 [count, k]
          [](const Packed& p, uint64_t ids, int count, uint64_t out) {
            for (int i = 0; i < count; ++i)
              read_row(p.m, static_cast<int>(std::clamp<int64_t>(at<int64_t>(ids)[i], -1, INT_MAX)),
                       at<float>(out) + static_cast<size_t>(i) * p.m.inputs());
          },
          "ids"_a, "count"_a, "out"_a, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("serialized_bytes", &Packed::serialized_bytes)
      .def("parts", [](const Packed& p) { return std::vector<int>(p.m.first, p.m.first + p.m.parts + 1); })
      .def(
          "serialize",
          [](const Packed& p, uint64_t out, uint64_t name) { p.serialize(at<uint8_t>(out), name); }, "out"_a,
          "name"_a, nb::call_guard<nb::gil_scoped_release>());

  nb::class_<Router>(module, "Router")
      .def(nb::init<>())
      .def_rw("experts", &Router::experts)
      .def_rw("top_k", &Router::top_k)
      .def_rw("identities", &Router::identities)
      .def_rw("groups", &Router::groups)
      .def_rw("top_k_groups", &Router::top_k_groups)
      .def_prop_rw(
          "scoring", [](const Router& r) { return static_cast<int>(r.scoring); },
          [](Router& r, int scoring) { r.scoring = static_cast<Router::Scoring>(scoring); })
      .def_rw("top2_sum", &Router::top2_sum)
      .def_rw("normalize", &Router::normalize)
      .def_rw("scale", &Router::scale)
      .def_rw("mass", &Router::mass)
      .def_rw("min_experts", &Router::min_experts)
      .def_rw("bias", &Router::bias)
      .def_rw("logit_bias", &Router::logit_bias)
      .def_rw("expert_scale", &Router::expert_scale);

  nb::class_<Moe>(module, "Moe")
      .def(
          "__init__",
          [](Moe* self, const Router& router, std::shared_ptr<Packed> gate, bool has_shared, int parts) {
            if (parts < 1 || parts > kMostParts) throw std::invalid_argument("an expert has one part or two");
            const bool shared_gate = gate && gate->m.n == router.experts + 1;
            new (self) Moe{router, std::move(gate), has_shared, parts, shared_gate, 0, {}};
            self->check_gate();
          },
          "router"_a, "gate"_a.none(), "has_shared"_a, "parts"_a = 1)
      .def_rw("router", &Moe::router)
      .def(
          "add",
          [](Moe& m, std::shared_ptr<Packed> gate_up, std::shared_ptr<Packed> down, uint64_t in_bias,
             uint64_t out_bias) {
            m.add(std::move(gate_up), std::move(down), at<float>(in_bias), at<float>(out_bias));
          },
          "gate_up"_a.none(), "down"_a.none(), "in_bias"_a = 0, "out_bias"_a = 0)
      .def(
          "activate",
          [](Moe& m, float alpha, float cubic, float limit, float shift) {
            m.activation = {alpha, cubic, limit, shift};
          },
          "alpha"_a, "cubic"_a, "limit"_a, "shift"_a);

  nb::class_<Attention>(module, "Attention")
      .def("__init__",
           [](Attention* self, int heads, int nope, int rope, int value, int latent, float scale,
              bool interleaved, uint64_t norm, uint64_t cos, uint64_t sin) {
             new (self) Attention{heads,       nope, rope, value,           latent,         scale,
                                  interleaved, {},   {},   at<float>(norm), at<float>(cos), at<float>(sin)};
           })
      .def(
          "prepare", [](Attention& a, uint64_t sinks) { a.prepared = true, a.sinks = at<float>(sinks); },
          "sinks"_a)
      .def("add", [](Attention& a, std::shared_ptr<Packed> uk,
                     std::shared_ptr<Packed> uv) { a.add(std::move(uk), std::move(uv)); })
      .def(
          "group",
          [](Attention& a, int groups, int rotated, uint64_t bias, uint64_t q_norm, uint64_t k_norm,
             bool whole_norm, bool gated, int window, uint64_t sinks, uint64_t v_norm, float value_scale,
             float key_scale) {
            a.groups = groups, a.rotated = rotated, a.whole_norm = whole_norm, a.gated = gated;
            a.window = window;
            a.bias = at<float>(bias), a.q_norm = at<float>(q_norm), a.k_norm = at<float>(k_norm);
            a.sinks = at<float>(sinks), a.v_norm = at<float>(v_norm);
            a.fixed = {value_scale, key_scale};
            a.check();
          },
          "groups"_a, "rotated"_a, "bias"_a, "q_norm"_a, "k_norm"_a, "whole_norm"_a, "gated"_a, "window"_a,
          "sinks"_a, "v_norm"_a, "value_scale"_a, "key_scale"_a);

  nb::exception<NotFinite>(module, "NotFinite", PyExc_ArithmeticError);
  nb::exception<PeerLost>(module, "PeerLost", PyExc_RuntimeError);
  nb::class_<SharedSum>(module, "SharedSum")
      .def("__init__",
           [](SharedSum* self, uint64_t counters, uint64_t slots, int64_t slot_bytes, uint64_t step,
              uint64_t failed, int size, int index, int parent, bool crowded, double timeout) {
             new (self) SharedSum{at<SharedSum::Word>(counters),
                                  at<uint8_t>(slots),
                                  slot_bytes,
                                  at<uint64_t>(step),
                                  at<SharedSum::Word>(failed),
                                  size,
                                  index,
                                  parent,
                                  crowded,
                                  timeout};
           })
      .def(
          "add",
          [](const SharedSum& self, uint64_t x, int64_t ldx, int rows, int columns) {
            self.add({at<float>(x), ldx}, rows, columns);
          },
          nb::call_guard<nb::gil_scoped_release>());

  nb::class_<Layers>(module, "Layers")
      .def(nb::init<>())
      .def(
          "add",
          [](Layers& self, uint64_t norm, std::shared_ptr<Packed> qkv_a, int q_width, uint64_t q_norm,
             std::shared_ptr<Packed> q_b, const Attention& attention, std::shared_ptr<Packed> o,
             std::shared_ptr<Packed> o_rest, uint64_t feed_norm, const Moe& feed,
             std::shared_ptr<SharedSum> o_sum, std::shared_ptr<SharedSum> feed_sum, uint64_t o_bias,
             float inner_eps, int kind) {
            self.add({at<float>(norm), at<float>(q_norm), at<float>(feed_norm), std::move(qkv_a),
                      std::move(q_b), std::move(o), std::move(o_rest), &attention, &feed, q_width, inner_eps,
                      at<float>(o_bias), std::move(o_sum), std::move(feed_sum)},
                     kind);
          },
          "norm"_a, "qkv_a"_a, "q_width"_a, "q_norm"_a, "q_b"_a.none(), "attention"_a, "o"_a,
          "o_rest"_a.none(), "feed_norm"_a, "feed"_a, "o_sum"_a.none(), "feed_sum"_a.none(), "o_bias"_a,
          "inner_eps"_a, "kind"_a)
      .def(
          "post",  // of the layer that was added last; no addresses: it has none
          [](Layers& self, uint64_t attention, uint64_t feed, const Moe* beside, uint64_t input_norm,
             uint64_t norm, uint64_t feed_norm, float scale) {
            self.layers.back().post = {
                at<float>(attention), at<float>(feed),      beside, at<float>(input_norm),
                at<float>(norm),      at<float>(feed_norm), scale};
          },
          "attention"_a, "feed"_a, "beside"_a.none(), "input_norm"_a, "norm"_a, "feed_norm"_a, "scale"_a)
      .def(
          "add_recurrent",
          [](Layers& self, uint64_t norm, std::shared_ptr<Packed> qkvz, std::shared_ptr<Packed> gates,
             const Delta& delta, std::shared_ptr<Packed> o, std::shared_ptr<Packed> o_rest,
             uint64_t feed_norm, const Moe& feed, std::shared_ptr<SharedSum> o_sum,
             std::shared_ptr<SharedSum> feed_sum, int kind) {
            self.add({at<float>(norm), nullptr, at<float>(feed_norm), std::move(qkvz), nullptr, std::move(o),
                      std::move(o_rest), nullptr, &feed, 0, 0.0f, nullptr, std::move(o_sum),
                      std::move(feed_sum), &delta, std::move(gates)},
                     kind);
          },
          "norm"_a, "qkvz"_a, "gates"_a, "delta"_a, "o"_a, "o_rest"_a.none(), "feed_norm"_a, "feed"_a,
          "o_sum"_a.none(), "feed_sum"_a.none(), "kind"_a);

  const auto free = nb::call_guard<nb::gil_scoped_release>();
  nb::class_<Backend>(module, "Backend")
      .def(
          "__init__",
          [](Backend* self, int threads, const std::string& isa, const std::string& topology, bool pin) {
            new (self) Backend(threads, isa.c_str(), topology, pin);
          },
          "threads"_a, "isa"_a = "auto", "topology"_a = "", "pin"_a = false)
      .def_prop_ro("isa", [](const Backend& b) { return std::string(b.kernels.name); })
      .def_prop_ro("threads", [](const Backend& b) { return b.pool.size(); })
      .def_prop_ro("nodes", [](const Backend& b) { return b.pool.nodes(); })
      .def_rw("expand_tokens", &Backend::expand_tokens)
      .def_rw("tile_tokens", &Backend::tile_tokens)
      .def_prop_rw(
          "input_terms", [](const Backend& b) { return b.input_terms; },
          [](Backend& b, int terms) {
            if (terms != 1 && terms != 2) throw std::invalid_argument("an input is one integer or two");
            b.input_terms = terms;
          })
      .def_prop_ro("workspace_bytes", &Backend::workspace_bytes)
      .def_prop_ro("node_memory", [](const Backend& b) { return b.arena->used(); })
      .def_prop_rw(
          "copies_files", [](const Backend& b) { return b.arena->copies_files; },
          [](Backend& b, bool copies) { b.arena->copies_files = copies; })
      .def_prop_ro("packed_bytes", [](const Backend& b) { return b.arena->bytes(); })
      .def("pack", &pack)
      .def(
          "view",
          [](Backend& b, uint64_t address, uint64_t size, uint64_t name) {
            return with_inputs(b, Packed::view(b.pool, b.arena, at<uint8_t>(address), size, name));
          },
          "address"_a, "size"_a, "name"_a)
      .def_prop_ro("yields_at_once", [](const Backend& b) { return b.pool.yields_at_once(); })
      .def_prop_ro("active", [](const Backend& b) { return b.pool.active(); })
      .def("set_active", [](Backend& b, int threads) { b.pool.set_active(threads); })
      .def_prop_ro("meetings", [](const Backend& b) { return b.pool.meetings(); })
      .def("free_caller", [](const Backend& b) { b.pool.free_caller(); })
      .def("region_seconds", &region_seconds, "barriers"_a, "regions"_a, "memory"_a = std::vector<int>(),
           nb::call_guard<nb::gil_scoped_release>())
      .def("units_of_threads", &units_of_threads, "units"_a, "late"_a = 0)
      .def(
          "rms_norm",
          [](Backend& b, Rows x, int tokens, int k, uint64_t weight, float eps, Rows out) {
            b.rms_norm(x, tokens, k, at<float>(weight), eps, out);
          },
          "x"_a, "tokens"_a, "k"_a, "weight"_a, "eps"_a, "out"_a, free)
      .def(
          "linear",
          [](Backend& b, const Packed& w, Rows x, int tokens, uint64_t norm, float eps, Rows residual,
             Rows out, const Packed* rest) {
            b.linear(w, {x, tokens, at<float>(norm), eps, residual, out, rest});
          },
          "weight"_a, "x"_a, "tokens"_a, "norm"_a, "eps"_a, "residual"_a, "out"_a,
          "rest"_a.none() = nb::none(), free)
      .def(
          "moe",
          [](Backend& b, const Moe& w, Rows x, int tokens, uint64_t norm, float eps, Rows out,
             uint64_t counts, uint64_t ids, uint64_t weights, bool residual) {
            b.moe(w, {x, tokens, at<float>(norm), eps, out, at<int64_t>(counts), at<int64_t>(ids),
                      at<float>(weights), residual});
          },
          "moe"_a, "x"_a, "tokens"_a, "norm"_a, "eps"_a, "out"_a, "counts"_a, "ids"_a, "weights"_a,
          "residual"_a, free)
      .def(
          "route",
          [](Backend& b, const Moe& w, Rows n, int tokens, uint64_t ids, uint64_t weights) {
            b.route(w, n, tokens, at<int64_t>(ids), at<float>(weights));
          },
          "moe"_a, "n"_a, "tokens"_a, "ids"_a, "weights"_a, free)
      .def(
          "mla",
          [](Backend& b, const Attention& w, Rows q, Rows kv, int tokens, const Cache& cache,
             const Batch& batch, float eps, Rows out) {
            b.mla(w, {q, kv, tokens, cache, batch, eps, out});
          },
          "attention"_a, "q"_a, "kv"_a, "tokens"_a, "cache"_a, "batch"_a, "eps"_a, "out"_a, free)
      .def(
          "layers",
          [](Backend& b, Layers& model, int first, int last, Rows x, int tokens, std::vector<Cache> caches,
             std::vector<Batch> batches, float eps, uint64_t counts, int64_t counts_stride, Rows out,
             const DeltaState* state) {
            b.layers(model, {x, tokens, first, last, std::move(caches), std::move(batches),
                             state ? *state : DeltaState{}, eps, at<int64_t>(counts), counts_stride, out});
          },
          "layers"_a, "first"_a, "last"_a, "x"_a, "tokens"_a, "caches"_a, "batches"_a, "eps"_a, "counts"_a,
          "counts_stride"_a, "out"_a, "state"_a.none() = nb::none(), free)
      .def(
          "top_logits",
          [](Backend& b, const Packed& head, Rows x, int tokens, uint64_t norm, float eps, float cap, int k,
             uint64_t values, uint64_t ids, uint64_t logsumexp) {
            b.top_logits(head, x, tokens, at<float>(norm), eps, cap, k, at<float>(values), at<int64_t>(ids),
                         at<float>(logsumexp));
          },
          "head"_a, "x"_a, "tokens"_a, "norm"_a, "eps"_a, "cap"_a, "k"_a, "values"_a, "ids"_a, "logsumexp"_a,
          free)
      .def(
          "greedy",
          [](Backend& b, const Packed& head, Rows x, int tokens, uint64_t norm, float eps) {
            std::vector<int64_t> ids(tokens);
            const nb::gil_scoped_release released;
            b.greedy(head, x, tokens, at<float>(norm), eps, ids.data());
            return ids;
          },
          "head"_a, "x"_a, "tokens"_a, "norm"_a, "eps"_a)
      .def("embed",
           [](const Backend&, uint64_t table, bool half, int64_t ld, int64_t rows, uint64_t ids, int tokens,
              int hidden, uint64_t out) {
             embed(at<uint8_t>(table), half, ld, rows, at<int64_t>(ids), tokens, hidden, at<float>(out));
           })
      .def(
          "softmax", [](Backend& b, Rows x, int rows, int n, Rows out) { b.softmax(x, rows, n, out); }, "x"_a,
          "rows"_a, "n"_a, "out"_a, free);
  bind_compressed(module);
  bind_conv(module);
  bind_calibration(module);
  bind_delta(module);
  bind_indexer(module);
  bind_sizes(module);
}
