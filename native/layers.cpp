// Every layer of a model in one call: between the ops nothing but memory that is already there.
#include "backend.h"

namespace farthing {

Rows Layers::rows(std::vector<float>& memory, int tokens, int width) {
  const auto stride = static_cast<int64_t>(round_up(static_cast<size_t>(width), size_t{16}));
  if (memory.size() < static_cast<size_t>(tokens) * stride) memory.resize(static_cast<size_t>(tokens) * stride);
  return {memory.data(), stride};
}

void Backend::layers(Layers& model, Rows x, int tokens, const Cache& cache, const Batch& batch, float eps, int64_t* counts,
                     int64_t counts_stride, Rows out) {
  const Rows none{nullptr, 0};
  Cache at = cache;
  for (const Layer& l : model.layers) {
    const Rows qkv = Layers::rows(model.qkv, tokens, l.qkv_a->m.n);
    linear(*l.qkv_a, x, tokens, l.norm, eps, none, qkv);
    Rows q = qkv;
    if (l.q_b) {
      q = Layers::rows(model.q, tokens, l.q_b->m.n);
      linear(*l.q_b, qkv, tokens, l.q_norm, eps, none, q);
    }
    const Rows heads = Layers::rows(model.heads, tokens, l.o->m.k);
    mla(*l.attention, q, {qkv.at + l.q_width, qkv.stride}, tokens, at, batch, eps, heads);
    const Rows h = Layers::rows(model.hidden, tokens, l.o->m.n);
    linear(*l.o, heads, tokens, nullptr, eps, x, h);
    moe(*l.feed, h, tokens, l.feed_norm, eps, counts, out);
    x = out;
    at.data += cache.layer_bytes;
    if (at.scale) at.scale += cache.layer_scales;
    if (counts) counts += counts_stride;
  }
}

}  // namespace farthing
