// Whether packed matrices fit the ops they are given to: a packed file is not trusted.
#include <stdexcept>
#include <string>

#include "layers/backend.h"

namespace farthing {
namespace {

void require(const Packed& p, int n, int k, const char* what) {
  if (p.rows() == n && p.m.inputs() == k) return;
  const auto shape = [](int rows, int columns) {
    return "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
  };
  throw std::invalid_argument(std::string(what) + " is a matrix " + shape(p.rows(), p.m.inputs()) +
                              "; expected " + shape(n, k));
}

bool alike(const Packed& a, const Packed& b) { return a.m.format == b.m.format && a.m.group == b.m.group; }

// Attention with expanded keys reads these by columns.
void require_plain_columns(const Packed& p, const char* what) {
  if (!p.m.has_plain_columns())
    throw std::invalid_argument(std::string(what) + " is stored in " + p.m.format_traits().name +
                                "; expected floats, or integers of 8 bits with a scale per row");
}

}  // namespace

void Moe::check_gate() const {
  if (!gate) return;
  router.check();
  require(*gate, router.experts + shared_gate, gate->m.k, "the router");
  if (gate->m.quantized()) throw std::invalid_argument("the router is stored in integers; expected floats");
}

void Moe::add(std::shared_ptr<Packed> gate_up, std::shared_ptr<Packed> down, const float* in_bias,
              const float* out_bias) {
  std::vector<float> in, out;
  if (down) {
    if (!hidden) hidden = down->m.n;
    const int at = static_cast<int>(experts.size());
    const bool shared = has_shared && at / parts == routed();
    require(*gate_up, 2 * round_up(down->m.k, kPanel), hidden, "gate and up of an expert");
    require(*down, hidden, down->m.k, "down of an expert");
    if (gate) require(*gate, gate->m.n, hidden, "the router");
    if (down->m.order) throw std::invalid_argument("down of an expert has columns in another order");
    const Mlp* other = shared ? nullptr : first(at % parts);
    if (other && down->m.k != other->down->m.k)
      throw std::invalid_argument("experts of one layer differ in width");
    if (at % parts && !alike(*gate_up, *experts.back().gate_up))
      throw std::invalid_argument("parts of an expert differ in format");
    if (in_bias) in.assign(in_bias, in_bias + gate_up->m.n);
    if (out_bias) out.assign(out_bias, out_bias + hidden), out.resize(round_up(hidden, kPanel));
  }
  experts.push_back({std::move(gate_up), std::move(down), std::move(in), std::move(out)});
}

void Attention::add(std::shared_ptr<Packed> uk, std::shared_ptr<Packed> uv) {
  require(*uk, latent, nope, "W_UK of a head");
  require(*uv, value, latent, "W_UV of a head");
  require_plain_columns(*uk, "W_UK of a head");
  require_plain_columns(*uv, "W_UV of a head");
  if (!w_uk.empty() && (!alike(*uk, *w_uk[0]) || !alike(*uv, *w_uv[0])))
    throw std::invalid_argument("heads of one layer differ in format");
  w_uk.push_back(std::move(uk));
  w_uv.push_back(std::move(uv));
}

void Attention::check() const {
  if (groups < 1 || heads % groups) throw std::invalid_argument("groups do not divide the heads");
  if (!grouped()) {
    if (static_cast<int>(w_uk.size()) != heads) throw std::invalid_argument("attention lacks heads");
    return;
  }
  if (window < 0) throw std::invalid_argument("a window is negative");
  if (nope || latent != value || rope > value || rotated > value || rotated % 2 || !w_uk.empty())
    throw std::invalid_argument("grouped attention has heads of other sizes than its keys and values");
  if (shared() && (rope % 2 || rotated != value || interleaved || whole_norm || !k_norm || !v_norm))
    throw std::invalid_argument("keys cannot be computed from values");
}

void Layers::add(Layer l, int kind) {
  if (kind < 0 || kind > static_cast<int>(used.size()))
    throw std::invalid_argument("kind " + std::to_string(kind) + " of a layer; expected 0 to " +
                                std::to_string(used.size()));
  const int hidden = l.o->m.n, rest = l.o_rest ? l.o_rest->m.inputs() : 0;
  int values;
  if (l.delta) {
    const Delta& d = *l.delta;
    values = d.values();
    require(*l.qkv_a, d.channels() + values, hidden, "the projection to queries, keys, values and gates");
    require(*l.gates, 2 * d.value_heads, hidden, "the projection to b and a");
  } else {
    const Attention& a = *l.attention;
    const int key = a.grouped() ? a.value : a.rope, query = a.heads * (a.nope + key),
              cached = a.groups * (a.latent + key) + (a.gated ? query : 0);
    values = a.heads * a.value;
    a.check();
    require(*l.qkv_a, l.q_width + cached, hidden, "the projection to queries and latents");
    if (l.q_b) require(*l.q_b, query, l.q_width, "the projection of the queries");
    else if (l.q_width != query) require(*l.qkv_a, query + cached, hidden, "the projection to queries");
  }
  require(*l.o, hidden, values - rest, "the output projection of attention");
  if (rest) require(*l.o_rest, hidden, rest, "further columns of the output projection");
  if (l.feed->hidden != hidden) throw std::invalid_argument("experts and attention differ in hidden size");
  if (kind == static_cast<int>(used.size())) used.push_back(0);
  l.kind = kind;
  l.row = l.delta ? states++ : used[kind];
  if (!l.delta) used[kind] += l.attention->groups;
  layers.push_back(std::move(l));
}

}  // namespace farthing
