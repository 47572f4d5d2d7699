// Multi-head latent attention as one op over the paged latent cache (DeepSeek-V2 section 2.1), absorbed:
// queries are projected into the latent space, so that keys are never expanded. The tokens of large chunks of
// long prompts take expanded attention instead (expanded.h).
//
// Grouped-query attention takes the same path: a key-value head is a row of the cache whose latent is the
// value and whose rotary part is the key. Its queries have zeros for the latent, and nothing is projected.
// Where keys are values with another norm (K = V), the rotary part has only what rotates of the key, and
// queries read the rest in the latent.
//
// Legend: T tokens, H heads, n nope, r rotary, c latent, v value head size, W padded key width, G key-value
// heads, d their width.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention/chunks.h"
#include "attention/expanded.h"
#include "cache/cache_rows.h"
#include "layers/backend.h"

namespace farthing {
namespace {

constexpr int kMostRows = kTileBlock.rows;  // (token, head) rows of a unit
constexpr int kFetchRows = 4;   // of the next unit, in sixteen, that are prefetched with a block of keys
constexpr int kFewQueries = 8;  // up to which a unit takes one chunk of keys; more queries are work enough
constexpr int kColumns = 64;    // outputs of a unit of projection
constexpr float kNothing = -3.0e38f;

// Query rows of one sequence (tokens x heads) against the keys of chunks [first_chunk, last_chunk).
struct Unit {
  KeyReader::Source from;
  int token, tokens, head, heads;  // tokens are numbered as in WideTokens::others
  int first_key, keys;             // the first that its first token sees; those up to its last token
  int first_chunk, last_chunk;
  int slot;  // of its partial result, or -1 if it has all chunks

  int rows() const { return tokens * heads; }
  int first() const { return Chunks::of(first_key); }
  int begin(int chunk, int block) const { return std::max(Chunks::begin(chunk), first_key / block * block); }
  int end(int chunk) const { return std::min(keys, Chunks::begin(chunk + 1)); }
  int skipped(int at) const { return std::max(0, first_key - at); }  // keys of the block at `at`
};

struct Units {
  std::vector<Unit> list;
  int slots = 0;
  int rows = kTileRows;  // a unit has at most so many

  // As many rows as `form` takes at once, unless threads would be idle then. Results do not depend on it.
  Units(const Batch& batch, const WideTokens& wide, const Attention& w, Kernels::Keys form, int threads) {
    int most = 0;
    for (int b = 0; b < batch.sequences; ++b)
      most = std::max(most, (batch.query_start[b + 1] - batch.query_start[b]) * w.per_group());
    while (rows < std::min(most, Kernels::block(form).rows)) rows *= 2;
    for (;; rows /= 2) {
      divide(batch, wide, w);
      if (rows == kTileRows || static_cast<int>(list.size()) >= 2 * threads) return;
    }
  }

  // The unit among a token's that has a head, and the head's row there.
  int parts(const Attention& w) const { return (w.per_group() + rows - 1) / rows; }
  int part(const Attention& w, int head) const {
    return w.group(head) * parts(w) + head % w.per_group() / rows;
  }
  int row_in_part(const Attention& w, int head) const { return head % w.per_group() % rows; }

 private:
  void divide(const Batch& batch, const WideTokens& wide, const Attention& w) {
    const int heads = w.per_group(), together = std::max(1, rows / heads);  // tokens
    list.clear(), slots = 0;
    int last = 0;
    for (int b = 0; b < batch.sequences; ++b) {
      const int first = last;
      for (int t = batch.query_start[b]; t < batch.query_start[b + 1]; ++t) last += wide.place[t] >= 0;
      for (int g = 0; g < w.groups; ++g)
        for (int t = first; t < last; t += together)
          for (int h = 0; h < heads; h += rows)
            add(batch, wide, w, {b, g}, t, std::min(together, last - t), g * heads + h,
                std::min(rows, heads - h), last - first > kFewQueries);
    }
  }

  void add(const Batch& batch, const WideTokens& wide, const Attention& w, KeyReader::Source from, int token,
           int tokens, int head, int heads, bool whole) {
    const int keys = batch.keys(wide.others[token + tokens - 1]),
              first_key = w.first_key(batch.keys(wide.others[token]));
    // One even if it has no key, so that something is written.
    const int first = Chunks::of(first_key), last = std::max(first + 1, Chunks::count(keys)),
              step = whole ? last - first : 1;
    for (int c = first; c < last; c += step)
      list.push_back({from, token, tokens, head, heads, first_key, keys, c, c + step,
                      step < last - first ? slots++ : -1});
  }
};

// Running softmax of the rows of a unit: maxima, sums and unnormalized outputs [rows][latent].
struct Running {
  float *max, *sum, *out;

  void clear(int rows) const {  // but not out: the first block of keys overwrites it
    std::fill_n(max, rows, kNothing);
    std::fill_n(sum, rows, 0.0f);
  }
};

// Adds the softmax of the next chunk to that of the chunks before it. Every sum over chunks is made by this.
void fold(const Kernels& kernels, float& max, float& sum, float* out, float next_max, float next_sum,
          const float* next, int n) {
  const bool grows = next_max > max;  // one of the two keeps its scale
  const float a = grows ? std::exp(max - next_max) : 1.0f, b = grows ? 1.0f : std::exp(next_max - max);
  kernels.blend(out, a, next, b, n);
  sum = sum * a + next_sum * b;
  max = std::max(max, next_max);
}

// Scratch of one call.
struct Space {
  Act nope, latent;   // inputs of W_UK and W_UV, a head's tokens together
  float* query;       // [H][T][W]
  Running partial;    // [slots][rows] …
  Running whole;      // [threads][rows] …
  Running chunk;      // [threads][rows] …
  float* keys32;      // [threads][block][W] …
  uint16_t* keys16;   // … or so
  uint16_t* queries;  // [threads][rows + kTileRows][W], or as many bytes of floats
  float* row;         // [threads][row_size]
  float* tile;        // [threads][T][kColumns]
  int *first_slot, *first_row,
      *parts;  // [T][head parts], [T], [T]: where merge finds a row's partial results, if it has any
  int row_size, head_parts;

  Space(Workspace& work, const Kernels& kernels, const Attention& w, int tokens, const Units& units,
        Kernels::Keys form, int threads) {
    const KeyShape shape = w.shape();
    const size_t T = tokens, H = w.heads, W = shape.width, each = threads, rows = units.rows,
                 block = Kernels::block(form).keys, cells = units.slots * rows;
    const Split split = kernels.act_split();
    const bool floats = form == Kernels::Keys::f32;
    head_parts = w.groups * units.parts(w);
    row_size = std::max({w.latent + w.rope, w.nope, shape.latent_padded});
    if (!w.grouped()) {
      const Matrix &uk = w.w_uk[0]->m, &uv = w.w_uv[0]->m;
      nope = work.act(uk, tokens * w.heads, split, uk.sparse);
      latent = work.act(uv, tokens * w.heads, split, uv.sparse);
    }
    query = work.take<float>(T * H * W);
    partial = {work.take<float>(cells), work.take<float>(cells),
               work.take<float>(cells * shape.latent_padded)};
    for (Running* running : {&whole, &chunk})
      *running = {work.take<float>(each * rows), work.take<float>(each * rows),
                  work.take<float>(each * rows * shape.latent_padded)};
    keys32 = work.take<float>(floats ? each * block * W : 0);
    keys16 = work.take<uint16_t>(floats ? 0 : each * block * W);
    queries = work.take<uint16_t>(each * (rows + kTileRows) * W);
    row = work.take<float>(each * row_size);
    tile = work.take<float>(each * std::max<size_t>(T, 1) * kColumns);
    first_slot = work.take<int>(T * head_parts);
    first_row = work.take<int>(T);
    parts = work.take<int>(T);
  }
};

// One call, phase by phase. Phases that share no barrier share no data.
class Mla {
  enum Phase { kPrepare, kAbsorb, kAttend, kMerge, kProject, kExpanded, kGate };

 public:
  Mla(const Kernels& kernels, const Attention& w, const MlaArgs& in, const WideTokens& wide,
      const Units& units, const Space& space, const Expanded& expanded)
      : kernels_(kernels),
        w_(w),
        in_(in),
        wide_(wide),
        tokens_(static_cast<int>(wide.others.size())),
        units_(units),
        space_(space),
        expanded_(expanded),
        shape_(w.shape()),
        form_(KeyReader::form(kernels, in.cache, shape_)),
        bytes_(KeyReader::in_bytes(kernels, in.cache, shape_)),
        block_(Kernels::block(form_).keys) {
    for (const Unit& u : units.list) {
      const int chunks = Chunks::count(u.keys) - u.first();
      for (int i = 0; i < u.tokens && u.first_chunk == u.first(); ++i) {
        space.first_slot[(u.token + i) * space.head_parts + units.part(w, u.head)] = u.slot;
        space.first_row[u.token + i] = i * u.heads;
        space.parts[u.token + i] = u.slot < 0 ? 0 : chunks;
      }
    }
  }

  void run(Team& team) const {
    if (w_.prepared) {
      team.for_units(kPrepare, in_.tokens, w_.heads, [&](int t, int h) {
        if (wide_.place[t] >= 0)
          scale_query(in_.q.row(t) + static_cast<int64_t>(h) * w_.latent, query(wide_.place[t], h));
      });
    } else if (w_.grouped()) {
      prepare_and_cache(team);
    } else {
      rotate_and_cache(team);
      team.barrier();
      absorb(team);
    }
    team.barrier();
    attend(team);
    expanded_.run(team, kExpanded);
    team.barrier();
    merge(team);
    if (w_.grouped() && !w_.gated) return;
    team.barrier();
    if (w_.gated) return gate(team);
    project(team);
  }

 private:
  // Rotates the queries and takes their other part to the form W_UK reads; norms, rotates and caches the
  // keys.
  void rotate_and_cache(Team& team) const {
    const int H = w_.heads;
    float* scratch = space_.row + static_cast<size_t>(team.id()) * space_.row_size;
    team.for_units(kPrepare, in_.tokens, H + 1, [&](int t, int h) {
      const int64_t at = static_cast<int64_t>(in_.batch.positions[t]) * (w_.rope / 2);
      if (h == H) return cache_key(t, w_.cos + at, w_.sin + at, scratch);
      const int place = wide_.place[t];
      if (place < 0) return;
      const float* head = in_.q.row(t) + static_cast<int64_t>(h) * (w_.nope + w_.rope);
      float* to = query(place, h);
      for (int i = 0; i < w_.nope; ++i) scratch[i] = head[i] * w_.scale;
      kernels_.store_act(w_.w_uk[0]->m, space_.nope, h * tokens_ + place, 0, scratch, w_.nope);
      std::fill(to + w_.latent, to + shape_.width, 0.0f);
      rotate_row(head + w_.nope, w_.rope, w_.cos + at, w_.sin + at, w_.interleaved, w_.scale,
                 to + shape_.latent_padded);
    });
  }

  void cache_key(int t, const float* cos, const float* sin, float* scratch) const {
    float* k_pe = scratch + w_.latent;
    kernels_.rms_norm(in_.kv.row(t), w_.norm, in_.eps, w_.latent, scratch);
    rotate_row(in_.kv.row(t) + w_.latent, w_.rope, cos, sin, w_.interleaved, 1.0f, k_pe);
    write_latent(kernels_, in_.cache, in_.batch.slots[t], scratch, w_.latent, k_pe, w_.rope);
  }

  // Grouped-query attention: adds biases, norms and rotates queries and keys in place; caches keys and
  // values.
  void prepare_and_cache(Team& team) const {
    const int heads = w_.heads + w_.groups, d = w_.value;
    float* scratch = space_.row + static_cast<size_t>(team.id()) * space_.row_size;
    if (!w_.whole_norm)
      return team.for_units(kPrepare, in_.tokens, heads, [&](int t, int h) {
        add_bias(t, h);
        prepare_head(t, h, w_.q_norm, w_.k_norm, scratch);
      });
    team.for_units(kPrepare, 1, in_.tokens, [&](int, int t) {
      for (int h = 0; h < heads; ++h) add_bias(t, h);
      kernels_.rms_norm(in_.q.row(t), w_.q_norm, in_.eps, w_.heads * d, in_.q.row(t));
      kernels_.rms_norm(in_.kv.row(t), w_.k_norm, in_.eps, w_.groups * d, in_.kv.row(t));
      for (int h = 0; h < heads; ++h) prepare_head(t, h, nullptr, nullptr, scratch);
    });
  }

  // A query head, or with H <= head the key and the value of a group.
  float* prepared(int t, int head) const {
    return head < w_.heads ? in_.q.row(t) + static_cast<int64_t>(head) * w_.value
                           : in_.kv.row(t) + static_cast<int64_t>(head - w_.heads) * w_.value;
  }

  void add_bias(int t, int head) const {
    if (!w_.bias) return;
    const int d = w_.value;
    float* to = prepared(t, head);
    const float* bias = w_.bias + static_cast<int64_t>(head) * d;
    for (int i = 0; i < d; ++i) to[i] += bias[i];
    if (head < w_.heads) return;
    to += static_cast<int64_t>(w_.groups) * d, bias += static_cast<int64_t>(w_.groups) * d;
    for (int i = 0; i < d; ++i) to[i] += bias[i];
  }

  void prepare_head(int t, int head, const float* q_norm, const float* k_norm, float* scratch) const {
    const int d = w_.value, g = head - w_.heads;
    const float* norm = g < 0 ? q_norm : k_norm;
    float* row = prepared(t, head);
    if (norm) kernels_.rms_norm(row, norm, in_.eps, d, row);
    const int64_t at = static_cast<int64_t>(in_.batch.positions[t]) * (w_.rotated / 2);
    rotate_row(row, w_.rotated, w_.cos + at, w_.sin + at, w_.interleaved, 1.0f, row);
    if (g >= 0) {
      float* value = row + static_cast<int64_t>(w_.groups) * d;
      if (w_.v_norm) kernels_.rms_norm(value, w_.v_norm, in_.eps, d, value);
      for (int i = 0; i < w_.rope && w_.shared(); ++i) scratch[i] = row[w_.turning(i)];
      return write_latent(kernels_, in_.cache.row(g), in_.batch.slots[t], value, d,
                          w_.shared() ? scratch : row, w_.rope, w_.fixed);
    }
    const int place = wide_.place[t];
    if (place < 0) return;
    float* to = query(place, head);
    std::fill(to, to + shape_.width, 0.0f);
    w_.put_query(row, to, shape_.latent_padded);
  }

  // A query as scores read it where a latent is the whole key.
  void scale_query(const float* row, float* to) const {
    std::fill(to, to + shape_.width, 0.0f);
    for (int i = 0; i < w_.latent; ++i) to[i] = row[i] * w_.scale;
  }

  // [T, n] W_UK -> [T, c] of each head. A ragged last panel is written after the latent, where zeros are.
  void absorb(Team& team) const {
    const int T = tokens_;
    if (T == 0) return;
    team.for_units(kAbsorb, w_.heads, (w_.latent + kColumns - 1) / kColumns, [&](int h, int u) {
      const int n0 = u * kColumns, panels = (std::min(kColumns, w_.latent - n0) + kPanel - 1) / kPanel;
      kernels_.tile(w_.w_uk[h]->m, n0 / kPanel, panels, row(space_.nope, h * T), T, query(0, h) + n0,
                    shape_.width);
    });
  }

  // Scores, softmax and weighted sums of keys, unit by unit.
  void attend(Team& team) const {
    const size_t me = team.id(), W = shape_.width;
    KeyReader reader(kernels_, in_.cache, in_.batch, shape_, space_.keys32 + me * block_ * W,
                     space_.keys16 + me * block_ * W);
    uint16_t* queries = space_.queries + me * (units_.rows + kTileRows) * W;
    team.for_units(kAttend, 1, static_cast<int>(units_.list.size()), [&](int, int i) {
      const Unit& u = units_.list[i];
      AttendBlock b{};
      b.rows = u.rows();
      b.width = shape_.width;
      b.latent = shape_.latent_padded;
      b.first = w_.grouped() && !w_.prepared && !w_.shared() ? b.latent : 0;
      take_query(u, queries, b);
      const Running sums = u.slot < 0 ? at(space_.whole, me) : at(space_.partial, u.slot),
                    next = at(space_.chunk, me);
      for (int c = u.first_chunk; c < u.last_chunk; ++c) {
        const Running& to = c == u.first_chunk ? sums : next;
        attend_chunk(u, i, c, to, reader, b);
        if (c == u.first_chunk) continue;
        for (int r = 0; r < b.rows; ++r)
          fold(kernels_, sums.max[r], sums.sum[r], sums.out + static_cast<size_t>(r) * b.latent, next.max[r],
               next.sum[r], next.out + static_cast<size_t>(r) * b.latent, b.latent);
      }
      for (int r = 0; u.slot < 0 && r < b.rows; ++r)
        put_latent(u.token + r / u.heads, u.head + r % u.heads, sums.out + static_cast<size_t>(r) * b.latent,
                   sums.max[r], sums.sum[r]);
    });
  }

  float* query(int place, int head) const {
    return space_.query + (static_cast<size_t>(head) * tokens_ + place) * shape_.width;
  }

  // A unit's rows in the form that the kernel reads.
  void take_query(const Unit& u, uint16_t* to, AttendBlock& b) const {
    const size_t W = shape_.width;
    auto* floats = reinterpret_cast<float*>(to);
    b.q = floats, b.q16 = to, b.q_bytes = reinterpret_cast<const ByteQuery*>(to);
    for (int r = 0; r < b.rows && bytes_; ++r)
      bytes_->take_query(query(u.token + r / u.heads, u.head + r % u.heads), b.latent, shape_.width,
                         const_cast<ByteQuery&>(*b.q_bytes->row(r, shape_.width)));
    if (bytes_) return;
    // Rows of pairs are transposed for tiles, 16 at a time, from behind the tiles.
    const bool tiles = form_ == Kernels::Keys::tiles;
    uint16_t* plain = tiles ? to + units_.rows * W : to;
    for (int r = 0; r < b.rows; ++r) {
      const float* row = query(u.token + r / u.heads, u.head + r % u.heads);
      if (form_ == Kernels::Keys::f32) std::copy_n(row, W, floats + r * W);
      else kernels_.round_bf16(row, shape_.width, plain + (tiles ? r % kTileRows : r) * W);
      if (!tiles || ((r + 1) % kTileRows && r + 1 < b.rows)) continue;
      const int tile = r / kTileRows * kTileRows, some = r + 1 - tile;
      std::fill(plain + some * W, plain + kTileRows * W, uint16_t{0});
      kernels_.transpose(reinterpret_cast<const float*>(plain), shape_.width / 2, kTileRows, shape_.width / 2,
                         reinterpret_cast<float*>(to + tile * W), kTileRows);
    }
  }

  // Prefetches a part of a unit's rows with each block of keys of the one before it.
  void fetch_query(int index, int block) const {
    if (index == static_cast<int>(units_.list.size())) return;
    const Unit& u = units_.list[index];
    const int some = kFetchRows * units_.rows / kTileRows;
    for (int r = block * some; r < std::min((block + 1) * some, u.rows()); ++r) {
      const float* row = query(u.token + r / u.heads, u.head + r % u.heads);
      for (int i = 0; i < shape_.width; i += 16) __builtin_prefetch(row + i, 0, 2);
    }
  }

  // Divides a row by the sum of its weights and takes it to the form W_UV reads; grouped: to the output. A
  // token without keys, as where every score that selects them is NaN, has a sum of 0, no row, and an output
  // of 0.
  void put_latent(int token, int head, float* row, float max, float sum) const {
    const float inverse = 1.0f / w_.with_sink(head, max, sum);
    for (int i = 0; i < w_.latent; ++i) row[i] = sum == 0.0f ? 0.0f : row[i] * inverse;
    if (w_.grouped()) {
      std::memcpy(in_.out.row(wide_.others[token]) + static_cast<int64_t>(head) * w_.value, row,
                  sizeof(float) * w_.value);
      return;
    }
    kernels_.store_act(w_.w_uv[0]->m, space_.latent, head * tokens_ + token, 0, row, w_.latent);
  }

  void attend_chunk(const Unit& u, int index, int chunk, const Running& to, KeyReader& reader,
                    AttendBlock& b) const {
    int visible[kMostRows], hidden[kMostRows];
    b.visible = visible;
    b.hidden = w_.window ? hidden : nullptr;
    b.max = to.max, b.sum = to.sum, b.out = to.out;
    to.clear(b.rows);
    const int begin = u.begin(chunk, block_), end = u.end(chunk);
    for (int at = begin; at < end; at += block_) {
      b.keys = std::min(block_, end - at);
      b.skipped = u.skipped(at);
      for (int j = 0; j < b.rows; ++j) {
        const int keys = in_.batch.keys(wide_.others[u.token + j / u.heads]);
        visible[j] = keys - at, hidden[j] = w_.first_key(keys) - at;
      }
      reader.fetch(u.from, at, b);
      look_ahead(u, index, chunk, at + block_, reader);
      fetch_query(index + 1, (at - begin) / block_);
      b.fresh = at == begin;
      (bytes_ ? bytes_->attend : kernels_.attend)(b);
    }
  }

  // The keys that are read after those before `at`: of this unit, or of the next.
  void look_ahead(const Unit& u, int index, int chunk, int at, KeyReader& reader) const {
    if (at < u.end(chunk)) return reader.look_ahead(u.from, at, std::min(block_, u.end(chunk) - at), 0);
    const bool last = chunk + 1 == u.last_chunk;
    if (last && index + 1 == static_cast<int>(units_.list.size())) return;
    const Unit& next = last ? units_.list[index + 1] : u;
    if (next.keys == 0) return;
    const int c = last ? next.first_chunk : chunk + 1;
    const int first = next.begin(c, block_);
    reader.look_ahead(next.from, first, std::min(block_, next.end(c) - first), next.skipped(first));
  }

  // Folds the chunks of split sequences.
  void merge(Team& team) const {
    if (units_.slots == 0) return;
    const int T = tokens_, lp = shape_.latent_padded;
    float* scratch = space_.row + static_cast<size_t>(team.id()) * space_.row_size;
    team.for_units(kMerge, T, w_.heads, [&](int t, int h) {
      if (space_.parts[t] == 0) return;
      const int slot = space_.first_slot[t * space_.head_parts + units_.part(w_, h)],
                at = space_.first_row[t] + units_.row_in_part(w_, h);
      size_t cell = static_cast<size_t>(slot) * units_.rows + at;
      float max = space_.partial.max[cell], sum = space_.partial.sum[cell];
      std::copy_n(space_.partial.out + cell * lp, lp, scratch);
      for (int p = 1; p < space_.parts[t]; ++p) {
        cell += units_.rows;
        fold(kernels_, max, sum, scratch, space_.partial.max[cell], space_.partial.sum[cell],
             space_.partial.out + cell * lp, lp);
      }
      put_latent(t, h, scratch, max, sum);
    });
  }

  // Scales the outputs of grouped-query attention by the sigmoid of their gates.
  void gate(Team& team) const {
    const int d = w_.value, before = 2 * w_.groups * d;
    team.for_units(kGate, in_.tokens, w_.heads, [&](int t, int h) {
      float* gates = in_.kv.row(t) + before + static_cast<int64_t>(h) * d;
      if (w_.bias)
        kernels_.axpy(gates, w_.bias + w_.heads * d + before + static_cast<int64_t>(h) * d, 1.0f, d);
      kernels_.gate(in_.out.row(t) + static_cast<int64_t>(h) * d, gates, d, false);
    });
  }

  // [T, c] W_UV -> [T, v] of each head.
  void project(Team& team) const {
    const int T = tokens_;
    if (T == 0) return;
    float* tile = space_.tile + static_cast<size_t>(team.id()) * T * kColumns;
    team.for_units(kProject, w_.heads, (w_.value + kColumns - 1) / kColumns, [&](int h, int u) {
      const int n0 = u * kColumns, columns = std::min(kColumns, w_.value - n0);
      kernels_.tile(w_.w_uv[h]->m, n0 / kPanel, (columns + kPanel - 1) / kPanel, row(space_.latent, h * T), T,
                    tile, kColumns);
      for (int t = 0; t < T; ++t)
        std::memcpy(in_.out.row(wide_.others[t]) + static_cast<int64_t>(h) * w_.value + n0,
                    tile + static_cast<size_t>(t) * kColumns, sizeof(float) * columns);
    });
  }

  Running at(const Running& all, size_t slot) const {
    const size_t cell = slot * units_.rows;
    return {all.max + cell, all.sum + cell, all.out + cell * shape_.latent_padded};
  }

  const Kernels& kernels_;
  const Attention& w_;
  const MlaArgs& in_;
  const WideTokens& wide_;
  const int tokens_;  // of wide_.others
  const Units& units_;
  const Space& space_;
  const Expanded& expanded_;
  const KeyShape shape_;
  const Kernels::Keys form_;
  const ByteAttend* const bytes_;  // where keys are read as cached
  const int block_;                // keys
};

}  // namespace

void Sizes::mla(const Attention& w, const Batch& batch) {
  MlaArgs in{};
  in.tokens = batch.query_start[batch.sequences];
  in.batch = batch;
  in.cache.type = cache;
  const Kernels::Keys form = KeyReader::form(kernels, in.cache, w.shape());
  for (const int least : {0, kExpandTokens}) {  // a step of as many tokens may take either attention
    if (invariant && least) continue;
    const WideTokens wide(batch, in.tokens, least);
    const Units units(batch, wide, w, form, threads);
    work.reset();
    const Space space(work, kernels, w, static_cast<int>(wide.others.size()), units, form, threads);
    const Expanded expanded(work, kernels, w, in, wide, threads);
  }
}

void Backend::mla(const Attention& w, const MlaArgs& in) {
  const WideTokens wide(in.batch, in.tokens, expand_tokens);
  const Kernels::Keys form = KeyReader::form(kernels, in.cache, w.shape());
  const Units units(in.batch, wide, w, form, pool.size());
  work_.reset();
  const Space space(work_, kernels, w, static_cast<int>(wide.others.size()), units, form, pool.size());
  const Expanded expanded(work_, kernels, w, in, wide, pool.size());
  const Mla call(kernels, w, in, wide, units, space, expanded);
  pool.run([&](Team& team) { call.run(team); });
}

}  // namespace farthing
