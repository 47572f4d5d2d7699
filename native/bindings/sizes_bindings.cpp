// The sizes' part of the Python module: scratch memory of ops on matrices that are only described.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <climits>
#include <stdexcept>

#include "attention/indexer.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

using namespace farthing;

namespace {

using Storage = std::tuple<Format, int>;  // and the group, if matrices choose it
// Of an MLP that is summed in parts, each of them: the storage of its down projection, and its width.
using Parts = std::vector<std::tuple<Storage, int>>;

std::shared_ptr<Packed> packed(const Sizes& s, const Storage& storage, int n, int k) {
  auto p = std::make_shared<Packed>();
  p->m = Matrix::describe(std::get<0>(storage), n, k, std::get<1>(storage));
  if (p->m.quantized()) p->m.act_terms = s.input_terms;
  return p;
}

std::vector<Mlp> mlp(const Sizes& s, const Storage& storage, const Parts& parts, int hidden) {
  std::vector<Mlp> all;
  for (const auto& [down, width] : parts)
    all.push_back(
        {packed(s, storage, 2 * round_up(width, kPanel), hidden), packed(s, down, hidden, width), {}, {}});
  return all;
}

// storage: of gate and up. routed: a routed expert; shared: the shared expert, or a dense MLP without a
// router; empty: none.
void size_moe(Sizes& s, const Storage& storage, int hidden, int experts, int top_k, const Parts& routed,
              const Parts& shared, int tokens, int rows) {
  Moe m;
  m.hidden = hidden;
  m.parts = static_cast<int>((experts ? routed : shared).size());
  if (m.parts < 1 || m.parts > kMostParts || (experts && !shared.empty() && shared.size() != routed.size()))
    throw std::invalid_argument("experts have one part or two, and all of them as many");
  m.has_shared = !shared.empty();
  if (experts) {
    m.router.experts = experts;
    m.router.top_k = top_k;
    m.gate = packed(s, {Format::f32, 0}, experts, hidden);
    const std::vector<Mlp> one = mlp(s, storage, routed, hidden);
    for (int e = 0; e < experts; ++e) m.experts.insert(m.experts.end(), one.begin(), one.end());
  }
  const std::vector<Mlp> beside = mlp(s, storage, shared, hidden);
  m.experts.insert(m.experts.end(), beside.begin(), beside.end());
  s.moe(m, tokens, rows);
}

// `sequences` of `tokens` each, the last of which sees `keys` cached tokens. groups: key-value heads of
// grouped-query attention, or 0.
void size_mla(Sizes& s, const Storage& storage, int heads, int nope, int rope, int value, int latent,
              int sequences, int tokens, int keys, int groups) {
  Attention a{heads, nope, rope, value, latent};
  if (groups) {
    a.groups = groups, a.rotated = rope;
  } else {
    a.w_uk.push_back(packed(s, storage, latent, nope));
    a.w_uv.push_back(packed(s, storage, value, latent));
  }
  std::vector<int32_t> start, positions;
  for (int i = 0; i <= sequences; ++i) start.push_back(i * tokens);
  for (int i = 0; i < sequences * tokens; ++i) positions.push_back(keys - tokens + i % tokens);
  Batch batch{};
  batch.positions = positions.data();
  batch.query_start = start.data();
  batch.sequences = sequences;
  s.mla(a, batch);
}

}  // namespace

void bind_sizes(nb::module_& module) {
  nb::class_<Sizes>(module, "Sizes")
      .def(
          "__init__",
          [](Sizes* self, int threads, CacheType cache, bool invariant, const std::string& isa,
             int input_terms) {
            new (self) Sizes{select_kernels(isa.c_str()), threads, cache, invariant, input_terms};
          },
          "threads"_a, "cache"_a, "invariant"_a = false, "isa"_a = "auto", "input_terms"_a = 1)
      .def_prop_ro("workspace_bytes", [](const Sizes& s) { return s.work.most_used(); })
      .def(
          "linear",
          [](Sizes& s, const Storage& storage, int n, int k, int tokens, bool halved) {
            const auto w = packed(s, storage, n, k);
            s.linear(w->m, halved ? &w->m : nullptr, tokens);
          },
          "storage"_a, "n"_a, "k"_a, "tokens"_a, "halved"_a = false)  // halved: k are the columns of a half
      .def("moe", &size_moe, "storage"_a, "hidden"_a, "experts"_a, "top_k"_a, "routed"_a, "shared"_a,
           "tokens"_a, "rows"_a = INT_MAX)
      .def("mla", &size_mla, "storage"_a, "heads"_a, "nope"_a, "rope"_a, "value"_a, "latent"_a, "sequences"_a,
           "tokens"_a, "keys"_a, "groups"_a = 0)
      .def(
          "index",
          [](Sizes& s, int heads, int dim, int top_k, int tokens, int keys) {
            s.index({heads, dim, 0, top_k}, tokens, keys);
          },
          "heads"_a, "dim"_a, "top_k"_a, "tokens"_a, "keys"_a)
      .def(
          "top_logits",
          [](Sizes& s, const Storage& storage, int n, int k, int tokens, int top) {
            s.top_logits(packed(s, storage, n, k)->m, tokens, top);
          },
          "storage"_a, "n"_a, "k"_a, "tokens"_a, "top"_a)
      .def(
          "greedy",
          [](Sizes& s, const Storage& storage, int n, int k, int tokens) {
            s.greedy(packed(s, storage, n, k)->m, tokens);
          },
          "storage"_a, "n"_a, "k"_a, "tokens"_a);
}
