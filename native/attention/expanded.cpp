// Expanded attention: the keys and values of a head are computed from the cached latents, a block of keys at
// a time, and shared by all queries of a prompt's chunk. Absorbed attention takes 2 c + r multiplications per
// head, query and key; this takes n + r + v, and c (n + v) per head and key.
//
// A unit is one head of one sequence. Its block of keys stays in L2, its queries and sums are read from L2 or
// L3 once per block. Results depend neither on the number of queries nor on that of threads.
//
// Legend: c latent, n nope, r rotary, v value head size, W key width; all padded to 32 here.
#include "attention/expanded.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "cache/cache_rows.h"

namespace farthing {
namespace {

constexpr int kLeastQueries = 256;  // of a unit, if there are fewer heads than threads
static_assert(kWideBlock % 32 == 0 && kTileQueries % 16 == 0);

}  // namespace

WideTokens::WideTokens(const Batch& batch, int tokens, int least) : place(tokens) {
  for (int b = 0; b < batch.sequences; ++b) {
    const int first = batch.query_start[b], last = batch.query_start[b + 1];
    int wide = last;
    if (least > 0 && !batch.visible && last > first) {
      wide = std::clamp(first + kExpandFrom - batch.positions[first], first, last);
      if (last - wide < least) wide = last;
    }
    for (int t = first; t < last; ++t) {
      place[t] = t < wide ? static_cast<int>(others.size()) : -1;
      if (t < wide) others.push_back(t);
    }
    if (wide < last) parts.push_back({b, wide, last});
  }
}

// Scratch of one thread. Elements are float or bfloat16.
struct Expanded::Space {
  uint8_t* weights;        // [c][n + v], the B of a product
  uint8_t* latents;        // [kWideBlock][W]
  uint8_t* keys;           // [kWideBlock][n + r]
  uint8_t* values;         // [v][kWideBlock]
  uint8_t* weighed;        // [kWideBlock][kTileQueries], the B of a product
  uint8_t* queries;        // [tiles][n + r][kTileQueries], the same
  float* out;              // [tiles][v][kTileQueries]
  float *max, *sum;        // [tiles][kTileQueries]
  float* scores;           // [kWideBlock][kTileQueries]
  float *floats, *turned;  // weights, a tile's queries, or a block's keys and values before they are rounded
  size_t bytes;
};

Expanded::Expanded(Workspace& work, const Kernels& kernels, const Attention& w, const MlaArgs& in,
                   const WideTokens& tokens, int threads)
    : kernels_(kernels),
      w_(w),
      in_(in),
      halves_(in.cache.type != CacheType::f32 && kernels.wide_halves.product),
      wide_(halves_ ? kernels.wide_halves : kernels.wide),
      shape_(w.shape()),
      nope_(w.shared() ? shape_.latent_padded : round_up(w.nope, 32)),
      value_(round_up(w.value, 32)),
      query_(nope_ + shape_.width - shape_.latent_padded) {
  if (tokens.parts.empty()) return;
  const int heads = w.heads * static_cast<int>(tokens.parts.size());
  const int pieces = threads > 1 ? std::max(1, 2 * threads / heads) : 1;
  for (const auto& p : tokens.parts) {
    const int all = p.last - p.first, some = std::min(pieces, std::max(1, all / kLeastQueries));
    const int step = round_up((all + some - 1) / some, kTileQueries);
    for (int h = 0; h < w.heads; ++h)
      for (int t = p.first; t < p.last; t += step)
        units_.push_back({p.sequence, h, t, std::min(p.last, t + step)});
    most_tiles_ = std::max(most_tiles_, step / kTileQueries);
  }
  memory_ = work.take<uint8_t>(space(nullptr).bytes * threads);
}

Expanded::Space Expanded::space(uint8_t* at) const {
  const size_t element = halves_ ? 2 : 4, block = kWideBlock, tile = kTileQueries, tiles = most_tiles_;
  const size_t columns = nope_ + value_, c = w_.grouped() ? 0 : shape_.latent_padded;
  size_t used = 0;
  const auto take = [&](size_t bytes) {
    uint8_t* found = at ? at + used : nullptr;
    used += round_up(bytes, size_t{64});
    return found;
  };
  const auto floats = [&](size_t count) { return reinterpret_cast<float*>(take(count * sizeof(float))); };
  Space s;
  s.weights = take(c * columns * element);
  s.latents = take(block * shape_.width * element);
  s.keys = take(block * query_ * element);
  s.values = take(value_ * block * element);
  s.weighed = take(block * tile * element);
  s.queries = take(tiles * query_ * tile * element);
  s.out = floats(tiles * value_ * tile);
  s.max = floats(tiles * tile);
  s.sum = floats(tiles * tile);
  s.scores = floats(block * tile);
  s.floats = floats(std::max({c * columns, block * columns, tile * query_}));
  s.turned = floats(std::max({nope_ * c, value_ * block, query_ * tile}));
  s.bytes = used;
  return s;
}

void Expanded::run(Team& team, int phase) const {
  if (units_.empty()) return;
  const Space s = space(memory_ + space(nullptr).bytes * team.id());
  team.for_units(phase, 1, static_cast<int>(units_.size()), [&](int, int i) { attend(units_[i], s); });
}

void Expanded::attend(const Unit& u, const Space& s) const {
  const size_t lanes = static_cast<size_t>(tiles(u)) * kTileQueries;
  if (!w_.grouped()) take_weights(u.head, s);
  take_queries(u, s);
  std::fill_n(s.max, lanes, kUnseen);
  std::fill_n(s.sum, lanes, 0.0f);
  std::fill_n(s.out, lanes * value_, 0.0f);
  const int end = in_.batch.keys(u.last - 1), first = w_.first_key(in_.batch.keys(u.first));
  for (int at = first / kWideBlock * kWideBlock; at < end; at += kWideBlock) {
    const int keys = std::min(kWideBlock, end - at);
    expand(u, at, keys, std::max(0, first - at), s);
    for (int tile = 0; tile < tiles(u); ++tile) attend_tile(u, tile, at, keys, s);
  }
  put_out(u, s);
}

// W_UK [c, n] and W_UV [v, c] next to each other, columns by columns of the latent.
void Expanded::take_weights(int head, const Space& s) const {
  const int c = shape_.latent_padded, columns = nope_ + value_;
  std::fill_n(s.floats, static_cast<size_t>(c) * columns, 0.0f);
  std::fill_n(s.turned, static_cast<size_t>(nope_) * c, 0.0f);
  kernels_.unpack(w_.w_uk[head]->m, s.turned, c);
  kernels_.transpose(s.turned, c, nope_, c, s.floats, columns);
  kernels_.unpack(w_.w_uv[head]->m, s.floats + nope_, columns);
  wide_.pack(s.floats, c, columns, s.weights);
}

// Scaled and rotated queries of the head, a tile at a time.
void Expanded::take_queries(const Unit& u, const Space& s) const {
  const size_t tile_bytes = static_cast<size_t>(query_) * kTileQueries * (halves_ ? 2 : 4);
  const int width = w_.grouped() ? w_.value : w_.nope + w_.rope;
  for (int tile = 0; tile < tiles(u); ++tile) {
    const int first = u.first + tile * kTileQueries, count = std::min(kTileQueries, u.last - first);
    std::fill_n(s.floats, kTileQueries * query_, 0.0f);
    for (int i = 0; i < count; ++i) {
      const float* from = in_.q.row(first + i) + static_cast<int64_t>(u.head) * width;
      float* to = s.floats + i * query_;
      if (w_.grouped()) {  // rotated already
        w_.put_query(from, to, nope_);
        continue;
      }
      const int64_t at = static_cast<int64_t>(in_.batch.positions[first + i]) * (w_.rope / 2);
      for (int k = 0; k < w_.nope; ++k) to[k] = from[k] * w_.scale;
      rotate_row(from + w_.nope, w_.rope, w_.cos + at, w_.sin + at, w_.interleaved, w_.scale, to + nope_);
    }
    kernels_.transpose(s.floats, query_, kTileQueries, query_, s.turned, kTileQueries);
    wide_.pack(s.turned, query_, kTileQueries, s.queries + tile * tile_bytes);
  }
}

// Keys [at, at + keys) of the head and their values; zeros for the first `skipped`, which are not read, and
// up to a multiple of 32.
void Expanded::expand(const Unit& u, int at, int keys, int skipped, const Space& s) const {
  const size_t element = halves_ ? 2 : 4;
  const int nope = w_.grouped() ? 0 : nope_, rows = round_up(keys, 32), columns = nope + value_;
  const KeyReader reader(kernels_, in_.cache, in_.batch, shape_, nullptr, nullptr);
  const size_t row = shape_.width * element, rest = (query_ - nope) * element;  // of a key, as cached
  std::memset(s.latents, 0, skipped * row);
  reader.copy({u.sequence, w_.group(u.head)}, at + skipped, at + keys, halves_, s.latents + skipped * row);
  std::memset(s.latents + keys * row, 0, (rows - keys) * row);
  if (w_.grouped()) take_values(rows, s);
  else
    wide_.product(
        {s.latents, shape_.width, s.weights, columns, s.floats, columns, rows, shape_.latent_padded, false});
  clear_damaged(u, at, keys, s);
  for (int i = 0; i < rows; ++i) {
    uint8_t* to = s.keys + i * query_ * element;
    const float* from = s.floats + static_cast<size_t>(i) * columns;
    if (halves_) kernels_.round_bf16(from, nope, reinterpret_cast<uint16_t*>(to));
    else std::memcpy(to, from, nope * element);
    std::memcpy(to + nope * element, s.latents + (i + 1) * row - rest, rest);
  }
  float* turned = halves_ ? s.turned : reinterpret_cast<float*>(s.values);
  kernels_.transpose(s.floats + nope, columns, rows, value_, turned, kWideBlock);
  if (!halves_) return;
  for (int i = 0; i < value_; ++i)
    kernels_.round_bf16(turned + i * kWideBlock, rows,
                        reinterpret_cast<uint16_t*>(s.values) + i * kWideBlock);
}

// As in KeyReader::fetch: values that are not finite become zeros where some queries of the unit do not see
// them, and the sums of those that do NaN.
void Expanded::clear_damaged(const Unit& u, int at, int keys, const Space& s) const {
  const int nope = w_.grouped() ? 0 : nope_;
  const int all_from = w_.first_key(in_.batch.keys(u.last - 1)) - at, all_to = in_.batch.keys(u.first) - at;
  for (int i = 0; i < keys; ++i) {
    float* values = s.floats + static_cast<size_t>(i) * (nope + value_) + nope;
    if ((i >= all_from && i < all_to) || !has_overflow(values, value_)) continue;
    std::fill_n(values, value_, 0.0f);
    for (int t = u.first; t < u.last; ++t) {
      const int seen = in_.batch.keys(t);
      if (at + i < seen && at + i >= w_.first_key(seen))
        s.sum[t - u.first] = std::numeric_limits<float>::quiet_NaN();
    }
  }
}

// The latents of a block, which are the values of grouped-query attention, in float32.
void Expanded::take_values(int rows, const Space& s) const {
  for (int i = 0; i < rows; ++i) {
    float* to = s.floats + static_cast<size_t>(i) * value_;
    if (!halves_) {
      std::memcpy(to, s.latents + sizeof(float) * i * shape_.width, sizeof(float) * value_);
      continue;
    }
    const auto* from = reinterpret_cast<const uint16_t*>(s.latents) + static_cast<size_t>(i) * shape_.width;
    for (int k = 0; k < value_; ++k) {
      const uint32_t bits = static_cast<uint32_t>(from[k]) << 16;
      std::memcpy(to + k, &bits, sizeof bits);
    }
  }
}

void Expanded::attend_tile(const Unit& u, int tile, int at, int keys, const Space& s) const {
  const int first = u.first + tile * kTileQueries, last = std::min(u.last, first + kTileQueries) - 1;
  const int seen = std::min(keys, in_.batch.keys(last) - at), rows = round_up(seen, 32);
  int visible[kTileQueries], hidden[kTileQueries];
  for (int i = 0; i < kTileQueries; ++i) {
    const int all = in_.batch.keys(std::min(first + i, last));
    visible[i] = all - at, hidden[i] = w_.first_key(all) - at;
  }
  if (seen <= std::max(0, hidden[0])) return;
  const size_t lanes = static_cast<size_t>(tile) * kTileQueries;
  float* out = s.out + lanes * value_;
  const uint8_t* queries = s.queries + lanes * query_ * (halves_ ? 2 : 4);
  wide_.product({s.keys, query_, queries, kTileQueries, s.scores, kTileQueries, rows, query_, false});
  const bool masked = visible[0] < rows || hidden[kTileQueries - 1] > 0;
  wide_.weigh(
      {s.scores, rows, visible, hidden, masked, s.max + lanes, s.sum + lanes, out, value_, s.weighed});
  wide_.product({s.values, kWideBlock, s.weighed, kTileQueries, out, kTileQueries, value_, rows, true});
}

void Expanded::put_out(const Unit& u, const Space& s) const {
  for (int tile = 0; tile < tiles(u); ++tile) {
    const int first = u.first + tile * kTileQueries, count = std::min(kTileQueries, u.last - first);
    const size_t lanes = static_cast<size_t>(tile) * kTileQueries;
    kernels_.transpose(s.out + lanes * value_, kTileQueries, value_, kTileQueries, s.turned, value_);
    for (int i = 0; i < count; ++i) {
      const float* from = s.turned + static_cast<size_t>(i) * value_;
      float* to = in_.out.row(first + i) + static_cast<int64_t>(u.head) * w_.value;
      const float inverse = 1.0f / w_.with_sink(u.head, s.max[lanes + i], s.sum[lanes + i]);
      for (int k = 0; k < w_.value; ++k) to[k] = from[k] * inverse;
    }
  }
}

}  // namespace farthing
