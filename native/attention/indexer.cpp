// The lightning indexer as one op: cache the step's index keys, score every cached key, choose.
//
// Legend: T tokens, H index heads (HP padded to 16), d their size (DP padded to 32), r rotated, S cached
// keys.
#include "attention/indexer.h"

#include "cache/cache_rows.h"

namespace farthing {
namespace {

constexpr int kTogether = 8;  // tokens that share a block of keys
constexpr int kChunk = 512;   // keys of a unit: enough units for all threads where one token decodes
constexpr int kHead = 16;
constexpr float kUnscaled[2] = {1.0f, 1.0f};  // scores are scaled instead

struct Unit {
  int token, tokens, begin, end;  // against keys [begin, end)
};

struct Layout {
  int heads, dim;  // padded
  bool halves;     // bfloat16 queries and keys
  size_t query() const { return static_cast<size_t>(heads) * dim; }
};

void layer_norm(const float* x, const Indexer& s, float* out) {
  double sum = 0.0, squares = 0.0;
  for (int i = 0; i < s.dim; ++i) sum += x[i];
  const double mean = sum / s.dim;
  for (int i = 0; i < s.dim; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const double inverse = 1.0 / std::sqrt(squares / s.dim + s.eps);
  for (int i = 0; i < s.dim; ++i)
    out[i] = static_cast<float>((x[i] - mean) * inverse) * s.norm[i] + s.bias[i];
}

// One rotated head into column h of [d][HP], or of [d / 2][HP][2] in bfloat16.
void place_head(const float* head, const uint16_t* half, const Layout& l, int h, float* q32, uint16_t* q16) {
  if (!l.halves) {
    for (int i = 0; i < l.dim; ++i) q32[static_cast<size_t>(i) * l.heads + h] = head[i];
    return;
  }
  for (int i = 0; i < l.dim; i += 2)
    std::memcpy(q16 + (static_cast<size_t>(i) / 2 * l.heads + h) * 2, half + i, 4);
}

std::vector<Unit> plan_units(const Indexer& s, const IndexBatch& batch, int tokens) {
  std::vector<Unit> units;
  for (int t = 0; t < tokens;) {
    int end = t + 1;
    while (end < tokens && end - t < kTogether && batch.sequences[end] == batch.sequences[t]) ++end;
    const int keys = batch.positions[end - 1] + 1;
    if (keys > s.top_k)
      for (int k = 0; k < keys; k += kChunk) units.push_back({t, end - t, k, std::min(keys, k + kChunk)});
    t = end;
  }
  return units;
}

// The cached keys [at, at + count) of a sequence as the kernel reads them.
struct Reader {
  const Kernels& kernels;
  const Cache& cache;
  const IndexBatch& batch;
  const Layout& layout;
  int dim;
  float* k32;     // [kKeyBlock][DP]
  uint16_t* k16;  // [kKeyBlock][DP]
  float* scale;   // [kKeyBlock]

  void fetch(int sequence, int at, int count) const {
    const KeyShape shape{dim, 0, layout.dim, layout.dim};
    for (int i = 0; i < count; ++i) {
      const int key = at + i;
      const int64_t block =
          batch.block_table[static_cast<int64_t>(sequence) * batch.max_blocks + key / cache.block_size];
      const int64_t slot = block * cache.block_size + key % cache.block_size;
      const uint8_t* row = cache.data + slot * dim * cell_bytes(cache.type);
      scale[i] = cache.scale ? cache.scale[slot] : 1.0f;
      if (layout.halves && cache.type == CacheType::bf16 && dim == layout.dim) {
        std::memcpy(k16 + static_cast<size_t>(i) * dim, row, sizeof(uint16_t) * dim);
        continue;
      }
      const size_t to = static_cast<size_t>(i) * layout.dim;
      if (layout.halves) kernels.load_key16(cache.type, row, kUnscaled, shape, k16 + to);
      else kernels.load_key(cache.type, row, nullptr, shape, k32 + to);
    }
  }
};

bool reads_halves(const Kernels& kernels, CacheType cache) {
  return kernels.index_halves && cache != CacheType::f32;
}

// Scratch of one call.
struct Space {
  Layout layout;
  size_t ld;        // keys, padded
  float* q32;       // [T][DP][HP], or null
  uint16_t* q16;    // [T][DP][HP] bfloat16, or null
  float* weights;   // [T][HP]
  float* scores;    // [T][ld]
  float* row;       // [threads][DP]
  uint16_t* half;   // [threads][DP]
  float* k32;       // [threads][kKeyBlock][DP]
  uint16_t* k16;    // [threads][kKeyBlock][DP]
  float* scale;     // [threads][kKeyBlock]
  uint32_t* order;  // [threads][2][ld]

  // tokens: that are scored; most: keys that one of them sees.
  Space(Workspace& work, const Indexer& s, bool halves, int tokens, int most, int threads)
      : layout{round_up(s.heads, kHead), round_up(s.dim, 32), halves},
        ld(round_up(static_cast<size_t>(most), size_t{kKeyBlock})) {
    const size_t T = tokens, each = threads, dim = layout.dim;
    q32 = work.take<float>(halves ? 0 : T * layout.query());
    q16 = work.take<uint16_t>(halves ? T * layout.query() : 0);
    weights = work.take<float>(T * layout.heads);
    scores = work.take<float>(T * ld);
    row = work.take<float>(each * dim);
    half = work.take<uint16_t>(each * dim);
    k32 = work.take<float>(each * kKeyBlock * dim);
    k16 = work.take<uint16_t>(each * kKeyBlock * dim);
    scale = work.take<float>(each * kKeyBlock);
    order = work.take<uint32_t>(T ? each * 2 * ld : 0);
  }
};

}  // namespace

void Sizes::index(const Indexer& s, int tokens, int keys) {
  work.reset();
  Space(work, s, reads_halves(kernels, cache), keys > s.top_k ? tokens : 0, keys, threads);
}

void Backend::index(const Indexer& s, Rows q, Rows k, Rows w, int tokens, const Cache& cache,
                    const IndexBatch& batch, int32_t* out) {
  const int T = tokens;
  const bool halves = reads_halves(kernels, cache.type);
  const std::vector<Unit> units = out ? plan_units(s, batch, T) : std::vector<Unit>{};
  int most = 1;
  for (int t = 0; t < T; ++t) most = std::max(most, batch.positions[t] + 1);
  work_.reset();
  const Space space(work_, s, halves, units.empty() ? 0 : T, most, pool.size());
  const Layout& l = space.layout;
  const float share = 1.0f / std::sqrt(static_cast<float>(s.heads) * static_cast<float>(s.dim));

  enum Phase { kRotate, kScore, kSelect };
  pool.run([&](Team& team) {
    const size_t me = static_cast<size_t>(team.id());
    float* row = space.row + me * l.dim;
    team.for_units(kRotate, T, units.empty() ? 1 : 2, [&](int t, int part) {
      const int64_t angle = static_cast<int64_t>(batch.positions[t]) * (s.rope / 2);
      const float *cos = s.cos + angle, *sin = s.sin + angle;
      if (part == 0) {
        if (!k.at) return;  // keys are cached
        layer_norm(k.row(t), s, row);
        rotate_row(row, s.rope, cos, sin, s.interleaved, 1.0f, row);
        float* scale = cache.scale ? cache.scale + batch.slots[t] : nullptr;
        return write_row(kernels, cache.type, cache.data, static_cast<size_t>(batch.slots[t]) * s.dim, row,
                         s.dim, scale);
      }
      if (batch.positions[t] < s.top_k) return;
      uint16_t* rounded = space.half + me * l.dim;
      float* to32 = space.q32 + (l.halves ? 0 : t * l.query());
      uint16_t* to16 = space.q16 + (l.halves ? t * l.query() : 0);
      for (int h = 0; h < l.heads; ++h) {
        std::fill(row, row + l.dim, 0.0f);
        if (h < s.heads) {
          std::memcpy(row, q.row(t) + static_cast<int64_t>(h) * s.dim, sizeof(float) * s.dim);
          rotate_row(row, s.rope, cos, sin, s.interleaved, 1.0f, row);
        }
        if (l.halves) kernels.round_bf16(row, l.dim, rounded);
        place_head(row, rounded, l, h, to32, to16);
        space.weights[static_cast<size_t>(t) * l.heads + h] = h < s.heads ? w.row(t)[h] * share : 0.0f;
      }
    });
    team.barrier();
    if (!out) return;
    const Reader reader{kernels,
                        cache,
                        batch,
                        l,
                        s.dim,
                        space.k32 + me * kKeyBlock * l.dim,
                        space.k16 + me * kKeyBlock * l.dim,
                        space.scale + me * kKeyBlock};
    team.for_units(kScore, 1, static_cast<int>(units.size()), [&](int, int i) {
      const Unit& u = units[i];
      IndexBlock b{nullptr, nullptr, nullptr, l.heads, l.dim, reader.k32, reader.k16, 0, nullptr};
      for (int at = u.begin; at < u.end; at += kKeyBlock) {
        b.keys = std::min(kKeyBlock, u.end - at);
        reader.fetch(batch.sequences[u.token], at, b.keys);
        for (int j = 0; j < u.tokens; ++j) {
          const size_t t = static_cast<size_t>(u.token) + j;
          if (batch.positions[t] < s.top_k || batch.positions[t] < at) continue;
          b.q32 = l.halves ? nullptr : space.q32 + t * l.query();
          b.q16 = l.halves ? space.q16 + t * l.query() : nullptr;
          b.w = space.weights + t * l.heads;
          b.out = space.scores + t * space.ld + at;
          kernels.index_scores(b);
          if (cache.scale)
            for (int n = 0; n < b.keys; ++n) b.out[n] *= reader.scale[n];
        }
      }
    });
    team.barrier();
    team.for_units(kSelect, 1, T, [&](int, int t) {
      int32_t* to = out + static_cast<int64_t>(t) * s.top_k;
      const int seen = batch.positions[t] + 1;
      if (seen <= s.top_k) {
        for (int n = 0; n < s.top_k; ++n) to[n] = n < seen ? n : -1;
        return;
      }
      top_positions(space.scores + static_cast<size_t>(t) * space.ld, seen, s.top_k,
                    space.order + me * 2 * space.ld, space.order + (me * 2 + 1) * space.ld, to);
    });
  });
}

}  // namespace farthing
