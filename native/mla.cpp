// Multi-head latent attention as one op over the paged latent cache (DeepSeek-V2 section 2.1), absorbed:
// queries are taken into the latent space, so that keys are never expanded.
//
// Legend: T tokens, H heads, n nope, r rotary, c latent, v value head size, W padded key width.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "backend.h"

namespace farthing {
namespace {

constexpr int kRows = 16;    // (token, head) rows of a unit
constexpr int kSplit = 256;  // keys of a unit, at most, where a sequence has few queries
constexpr int kHalve =
    64;  // … which takes two units from here on: a sequence alone then has work for two threads
constexpr int kFewQueries = 8;
constexpr int kColumns = 64;  // outputs of a unit of projection
constexpr float kNothing = -3.0e38f;

// Some query rows of one sequence against some of its keys.
struct Unit {
  int sequence, token, tokens, head, heads;
  int begin, end;   // keys
  int part, parts;  // of a split sequence
  int slot;         // where its partial result goes
};

void rotate(const float* x, int r, const float* cos, const float* sin, bool interleaved, float scale,
            float* out) {
  const int half = r / 2;
  for (int i = 0; i < half; ++i) {
    const int a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + half;
    const float xa = x[a] * scale, xb = x[b] * scale;
    out[a] = xa * cos[i] - xb * sin[i];
    out[b] = xb * cos[i] + xa * sin[i];
  }
}

uint8_t to_e4m3(float f) {  // to nearest even; |f| <= 448
  const uint8_t sign = std::signbit(f) ? 0x80 : 0;
  const float a = std::min(std::fabs(f), 448.0f);
  if (a < 0x1p-6f) return static_cast<uint8_t>(sign | static_cast<int>(std::nearbyint(a * 512.0f)));
  uint32_t b;
  std::memcpy(&b, &a, 4);
  b += 0x7ffffu + (b >> 20 & 1u);
  return static_cast<uint8_t>(sign | ((b >> 20) - (120u << 3)));
}

void write_part(const Kernels& kernels, const Cache& cache, int64_t slot, int width, int at, const float* x,
                int n, int part) {
  uint8_t* row = cache.data;
  const size_t first = static_cast<size_t>(slot) * width + at;
  if (cache.type == CacheType::f32)
    return static_cast<void>(std::memcpy(reinterpret_cast<float*>(row) + first, x, sizeof(float) * n));
  if (cache.type == CacheType::bf16)
    return kernels.round_bf16(x, n, reinterpret_cast<uint16_t*>(row) + first);
  const bool fp8 = cache.type == CacheType::fp8;
  const float top = fp8 ? 448.0f : 127.0f;
  float amax = 0.0f;
  for (int i = 0; i < n; ++i) amax = std::max(amax, std::fabs(x[i]));
  const float scale = std::max(amax / top, 1e-20f);
  cache.scale[slot * 2 + part] = scale;
  for (int i = 0; i < n; ++i)
    row[first + i] = fp8 ? to_e4m3(x[i] / scale)
                         : static_cast<uint8_t>(static_cast<int8_t>(
                               std::clamp(std::nearbyint(x[i] / scale), -127.0f, 127.0f)));
}

std::vector<Unit> plan_units(const Batch& batch, int heads, int* slots) {
  std::vector<Unit> units;
  const int together = std::max(1, kRows / heads);  // tokens of a unit
  *slots = 0;
  for (int b = 0; b < batch.sequences; ++b) {
    const int first = batch.query_start[b], last = batch.query_start[b + 1];
    for (int t = first; t < last; t += together)
      for (int h = 0; h < heads; h += kRows) {
        const int tokens = std::min(together, last - t);
        const int keys = batch.keys(t + tokens - 1);
        int parts = 1, split = keys;
        if (last - first <= kFewQueries) {
          parts = keys < kHalve ? 1 : std::max(2, (keys + kSplit - 1) / kSplit);
          split = round_up((keys + parts - 1) / parts, kRows);
          parts = (keys + split - 1) / split;
        }
        for (int p = 0; p < parts; ++p)
          units.push_back({b, t, tokens, h, std::min(kRows, heads - h), p * split,
                           std::min(keys, (p + 1) * split), p, parts, (*slots)++});
      }
  }
  return units;
}

// The cached keys of a unit, block by block, in the form the kernel reads.
struct Reader {
  const Kernels& kernels;
  const Cache& cache;
  const Batch& batch;
  KeyShape shape;
  Kernels::Keys form;
  float* k32;
  uint16_t* k16;
  uint16_t* rest;                            // what the split of float keys leaves, not used further
  const uint16_t* rows[2 * kKeyBlock] = {};  // keys of a block, and of the one after it
  const Unit* next = nullptr;                // whose keys [next_at, …) those are
  int next_at = 0;

  const uint8_t* row(int sequence, int key, int64_t* slot) const {
    const int32_t block =
        batch.block_table[static_cast<int64_t>(sequence) * batch.max_blocks + key / cache.block_size];
    *slot = static_cast<int64_t>(block) * cache.block_size + key % cache.block_size;
    static constexpr int bytes[] = {4, 2, 1, 1};
    return cache.data + *slot * (shape.latent + shape.rope) * bytes[static_cast<int>(cache.type)];
  }

  // Rows lie in the cache as the kernel reads them.
  bool exact() const {
    return cache.type == CacheType::bf16 && shape.latent_padded == shape.latent &&
           shape.width == shape.latent + shape.rope;
  }

  void expand(int sequence, int key, float* to) const {
    int64_t slot;
    const uint8_t* from = row(sequence, key, &slot);
    kernels.load_key(static_cast<int>(cache.type), from, cache.scale ? cache.scale + slot * 2 : nullptr,
                     shape, to);
  }

  // One key in bfloat16: where it lies, or in `to`.
  const uint16_t* half(int sequence, int key, uint16_t* to) const {
    int64_t slot;
    if (exact()) return reinterpret_cast<const uint16_t*>(row(sequence, key, &slot));
    expand(sequence, key, k32);
    kernels.split(k32, shape.width, to, rest);
    return to;
  }

  // Where the keys of the block after this one lie, for the kernel to ask for them ahead.
  void look_ahead(const Unit& u, int at) {
    if (form != Kernels::Keys::rows || !exact()) return;
    next = &u, next_at = at;
    const int keys = std::min(kKeyBlock, u.end - at);
    for (int i = 0; i < keys; ++i) rows[kKeyBlock + i] = half(u.sequence, at + i, nullptr);
    std::fill(rows + kKeyBlock + keys, rows + 2 * kKeyBlock, rows[kKeyBlock + keys - 1]);
  }

  // Keys [at, at + b.keys) of a unit; those that were looked ahead to are where they were found.
  void fetch(const Unit& u, int at, AttendBlock& b) {
    const int keys = b.keys, sequence = u.sequence;
    const size_t width = shape.width;
    switch (form) {
      case Kernels::Keys::f32:
        for (int i = 0; i < keys; ++i) expand(sequence, at + i, k32 + i * width);
        b.k32 = k32;
        return;
      case Kernels::Keys::rows:
        if (next == &u && next_at == at) std::copy_n(rows + kKeyBlock, keys, rows);
        else
          for (int i = 0; i < keys; ++i) rows[i] = half(sequence, at + i, k16 + i * width);
        std::fill(rows + keys, rows + 2 * kKeyBlock, rows[keys - 1]);
        next = nullptr;
        b.rows16 = rows;
        return;
      case Kernels::Keys::tiles:
        b.k16 = k16;
        b.k16_stride = shape.width;
        if (exact() && cache.block_size % kKeyBlock == 0 && keys == kKeyBlock) {
          b.k16 = half(sequence, at, k16);
          return;
        }
        for (int i = 0; i < keys; ++i) {
          uint16_t* to = k16 + i * width;
          const uint16_t* from = half(sequence, at + i, to);
          if (from != to) std::memcpy(to, from, sizeof(uint16_t) * width);
        }
        std::memset(k16 + keys * width, 0, sizeof(uint16_t) * width * (kKeyBlock - keys));
    }
  }
};

// [rows][W] to tile order [W / 2][16][2], high and low halves.
void tile_query(const Kernels& kernels, const float* q, int rows, int width, uint16_t* hi, uint16_t* lo,
                uint16_t* row_hi, uint16_t* row_lo) {
  std::memset(hi, 0, sizeof(uint16_t) * width * kRows);
  std::memset(lo, 0, sizeof(uint16_t) * width * kRows);
  for (int r = 0; r < rows; ++r) {
    kernels.split(q + static_cast<size_t>(r) * width, width, row_hi, row_lo);
    for (int k = 0; k < width; k += 2) {
      std::memcpy(hi + (k / 2 * kRows + r) * 2, row_hi + k, 4);
      std::memcpy(lo + (k / 2 * kRows + r) * 2, row_lo + k, 4);
    }
  }
}

struct Partial {  // [slots][rows]
  float* max;
  float* sum;
  float* out;  // [slots][rows][latent_padded]
};

}  // namespace

void Backend::mla(const Attention& w, Rows q, Rows kv, int tokens, const Cache& cache, const Batch& batch,
                  float eps, Rows out) {
  const int T = tokens, H = w.heads, c = w.latent, r = w.rope, threads = pool.size();
  const int lp = round_up(c, 32), W = lp + round_up(r, 32);
  const KeyShape shape{c, r, lp, W};
  const Matrix &uk = w.w_uk[0]->m, &uv = w.w_uv[0]->m;
  const bool split = kernels.split_act && T >= kernels.split_rows;
  const Kernels::Keys form = cache.type == CacheType::f32 ? Kernels::Keys::f32 : kernels.keys;
  int slots = 0;
  const std::vector<Unit> units = plan_units(batch, H, &slots);
  work_.reset();
  const Act nope = work_.act(uk, T * H, split, uk.sparse), latent = work_.act(uv, T * H, split, uv.sparse);
  float* query = work_.take<float>(static_cast<size_t>(T) * H * W);  // [T][H][W]
  const Partial partial{work_.take<float>(slots * kRows), work_.take<float>(slots * kRows),
                        work_.take<float>(static_cast<size_t>(slots) * kRows * lp)};
  float* keys32 = work_.take<float>(static_cast<size_t>(threads) * kKeyBlock * W);
  uint16_t* keys16 = work_.take<uint16_t>(static_cast<size_t>(threads) * kKeyBlock * W);
  uint16_t* tiles = work_.take<uint16_t>(static_cast<size_t>(threads) * (2 * kRows + 4) * W);
  float* rows = work_.take<float>(static_cast<size_t>(threads) * std::max(c, w.nope));
  float* ragged = work_.take<float>(static_cast<size_t>(threads) * std::max(T, 1) * kColumns);
  int* first_slot =
      work_.take<int>(static_cast<size_t>(T) * ((H + kRows - 1) / kRows));  // of a token's group of heads
  int* first_row = work_.take<int>(static_cast<size_t>(T));
  int* parts_of = work_.take<int>(static_cast<size_t>(T));
  const int head_groups = (H + kRows - 1) / kRows;
  for (const Unit& u : units) {
    if (u.part) continue;
    for (int i = 0; i < u.tokens; ++i) {
      first_slot[(u.token + i) * head_groups + u.head / kRows] = u.slot;
      first_row[u.token + i] = i * u.heads;
      parts_of[u.token + i] = u.parts;
    }
  }

  pool.run([&](Team& team) {
    const int me = team.id();
    float* scratch = rows + static_cast<size_t>(me) * std::max(c, w.nope);
    // Rotate the queries and take their other part to the form W_UK reads; norm, rotate and cache the keys.
    team.for_units(0, T, H + 1, [&](int t, int h) {
      const float *cos = w.cos + static_cast<int64_t>(batch.positions[t]) * (r / 2),
                  *sin = w.sin + static_cast<int64_t>(batch.positions[t]) * (r / 2);
      if (h == H) {
        float k_pe[1024];
        kernels.rms_norm(kv.row(t), w.norm, eps, c, scratch);
        rotate(kv.row(t) + c, r, cos, sin, w.interleaved, 1.0f, k_pe);
        write_part(kernels, cache, batch.slots[t], c + r, 0, scratch, c, 0);
        write_part(kernels, cache, batch.slots[t], c + r, c, k_pe, r, 1);
        return;
      }
      const float* head = q.row(t) + static_cast<int64_t>(h) * (w.nope + r);
      float* to = query + (static_cast<size_t>(t) * H + h) * W;
      for (int i = 0; i < w.nope; ++i) scratch[i] = head[i] * w.scale;
      kernels.store_act(uk, nope, h * T + t, 0, scratch, w.nope);
      std::fill(to + c, to + W, 0.0f);
      rotate(head + w.nope, r, cos, sin, w.interleaved, w.scale, to + lp);
    });
    team.barrier();
    // [T, n] W_UK -> [T, c] for each head. A ragged last panel is written behind the latent, where zeros
    // stand.
    team.for_units(1, H, (c + kColumns - 1) / kColumns, [&](int h, int u) {
      const int n0 = u * kColumns, panels = (std::min(kColumns, c - n0) + kPanel - 1) / kPanel;
      kernels.tile(w.w_uk[h]->m, n0 / kPanel, panels, row(nope, h * T), T,
                   query + static_cast<size_t>(h) * W + n0, H * W);
    });
    team.barrier();
    Reader reader{kernels,
                  cache,
                  batch,
                  shape,
                  form,
                  keys32 + static_cast<size_t>(me) * kKeyBlock * W,
                  keys16 + static_cast<size_t>(me) * kKeyBlock * W,
                  tiles + (static_cast<size_t>(me) * (2 * kRows + 4) + 2 * kRows + 2) * W};
    team.for_units(2, 1, static_cast<int>(units.size()), [&](int, int i) {
      const Unit& u = units[i];
      AttendBlock b{};
      b.rows = u.tokens * u.heads;
      b.width = W;
      b.latent = lp;
      b.q = query + (static_cast<size_t>(u.token) * H + u.head) *
                        W;  // tokens x heads are contiguous: one of them is whole
      b.max = partial.max + u.slot * kRows;
      b.sum = partial.sum + u.slot * kRows;
      b.out = partial.out + static_cast<size_t>(u.slot) * kRows * lp;
      std::fill_n(b.max, b.rows, kNothing);
      std::fill_n(b.sum, b.rows, 0.0f);
      std::fill_n(b.out, static_cast<size_t>(b.rows) * lp, 0.0f);
      uint16_t* mine = tiles + static_cast<size_t>(me) * (2 * kRows + 4) * W;
      if (form == Kernels::Keys::tiles)
        tile_query(kernels, b.q, b.rows, W, mine, mine + kRows * W, mine + 2 * kRows * W,
                   mine + (2 * kRows + 1) * W);
      if (form == Kernels::Keys::rows) kernels.round_bf16(b.q, b.rows * W, mine);
      b.q_hi = mine;
      b.q_lo = mine + kRows * W;  // tiles alone
      int visible[kRows];
      b.visible = visible;
      for (int at = u.begin; at < u.end; at += kKeyBlock) {
        b.keys = std::min(kKeyBlock, u.end - at);
        for (int j = 0; j < b.rows; ++j) visible[j] = batch.keys(u.token + j / u.heads) - at;
        reader.fetch(u, at, b);
        if (at + kKeyBlock < u.end) reader.look_ahead(u, at + kKeyBlock);
        else if (i + 1 < static_cast<int>(units.size())) reader.look_ahead(units[i + 1], units[i + 1].begin);
        kernels.attend(b);
      }
    });
    team.barrier();
    // Merge the parts of a split sequence, divide, and take to the form W_UV reads.
    team.for_units(3, T, H, [&](int t, int h) {
      const int parts = parts_of[t], at = first_row[t] + h % kRows,
                slot = first_slot[t * head_groups + h / kRows];
      float top = kNothing, sum = 0.0f;
      for (int p = 0; p < parts; ++p) top = std::max(top, partial.max[(slot + p) * kRows + at]);
      std::fill_n(scratch, c, 0.0f);
      for (int p = 0; p < parts; ++p) {
        const int cell = (slot + p) * kRows + at;
        const float weight = std::exp(partial.max[cell] - top);
        sum += partial.sum[cell] * weight;
        kernels.axpy(scratch, partial.out + static_cast<size_t>(cell) * lp, weight, c);
      }
      const float inverse = 1.0f / sum;
      for (int i = 0; i < c; ++i) scratch[i] *= inverse;
      kernels.store_act(uv, latent, h * T + t, 0, scratch, c);
    });
    team.barrier();
    team.for_units(4, H, (w.value + kColumns - 1) / kColumns, [&](int h, int u) {
      const int n0 = u * kColumns, columns = std::min(kColumns, w.value - n0),
                panels = (columns + kPanel - 1) / kPanel;
      float* tile = ragged + static_cast<size_t>(me) * T * kColumns;
      kernels.tile(w.w_uv[h]->m, n0 / kPanel, panels, row(latent, h * T), T, tile, kColumns);
      for (int t = 0; t < T; ++t)
        std::memcpy(out.row(t) + static_cast<int64_t>(h) * w.value + n0,
                    tile + static_cast<size_t>(t) * kColumns, sizeof(float) * columns);
    });
  });
}

}  // namespace farthing
