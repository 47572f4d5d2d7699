#include "cache/latent_cache.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "cache/cache_rows.h"

namespace farthing {

void write_latent(const Kernels& kernels, const Cache& cache, int64_t slot, const float* latent, int c,
                  const float* k_pe, int r, FixedScales fixed) {
  const size_t first = static_cast<size_t>(slot) * (c + r);
  float* scale = cache.scale + (cache.scale ? slot * 2 : 0);
  write_row(kernels, cache.type, cache.data, first, latent, c, scale, fixed.latent);
  write_row(kernels, cache.type, cache.data, first + c, k_pe, r, scale + (cache.scale ? 1 : 0), fixed.key);
}

const ByteAttend* KeyReader::in_bytes(const Kernels& kernels, const Cache& cache, const KeyShape& shape) {
  for (const int n : {shape.latent, shape.rope})  // products of half of kMostByteColumns fit 32 bits
    if (n % 64 || n > kMostByteColumns / 2) return nullptr;
  const ByteAttend& found = cache.type == CacheType::int8 ? kernels.attend_int8 : kernels.attend_fp8;
  return cell_bytes(cache.type) == 1 && found.attend && shape.width >= kLeastByteColumns ? &found : nullptr;
}

KeyReader::KeyReader(const Kernels& kernels, const Cache& cache, const Batch& batch, KeyShape shape,
                     float* keys32, uint16_t* keys16)
    : kernels_(kernels),
      cache_(cache),
      batch_(batch),
      shape_(shape),
      form_(form(kernels, cache, shape)),
      block_(Kernels::block(form_).keys),
      keys32_(keys32),
      keys16_(keys16) {}

// f(key, count, data, scale) for keys [begin, end), those of a block together: where the cache has them.
template <class F>
void KeyReader::for_runs(Source from, int begin, int end, F&& f) const {
  const int32_t* blocks = batch_.block_table + static_cast<int64_t>(from.sequence) * batch_.max_blocks;
  const uint8_t* data = cache_.data + from.group * cache_.layer_bytes;
  const float* scale = cache_.scale ? cache_.scale + from.group * cache_.layer_scales : nullptr;
  const int64_t bytes = (shape_.latent + shape_.rope) * cell_bytes(cache_.type);
  const unsigned size = cache_.block_size;
  unsigned block = begin / size;
  for (int key = begin; key < end; ++block) {
    const unsigned skipped = key - block * size;
    const int64_t slot = static_cast<int64_t>(blocks[block]) * size + skipped;
    const int count = std::min<int>(end - key, size - skipped);
    f(key, count, data + slot * bytes, scale ? scale + slot * 2 : nullptr);
    key += count;
  }
}

// f(key, data, scale) for each of them.
template <class F>
void KeyReader::for_rows(Source from, int begin, int end, F&& f) const {
  const int64_t bytes = (shape_.latent + shape_.rope) * cell_bytes(cache_.type);
  for_runs(from, begin, end, [&](int key, int count, const uint8_t* data, const float* scale) {
    for (int i = 0; i < count; ++i) f(key + i, data + i * bytes, scale ? scale + 2 * i : nullptr);
  });
}

// Whether the cache holds keys as the kernel reads them.
bool KeyReader::in_place() const {
  return cache_.type == CacheType::bf16 && shape_.latent_padded == shape_.latent &&
         shape_.width == shape_.latent + shape_.rope;
}

// One key in bfloat16: where it is cached, or in `to`.
const uint16_t* KeyReader::half(const uint8_t* data, const float* scale, uint16_t* to) const {
  if (in_place()) return reinterpret_cast<const uint16_t*>(data);
  kernels_.load_key16(cache_.type, data, scale, shape_, to);
  return to;
}

void KeyReader::copy(Source from, int begin, int end, bool halves, void* to) const {
  for_rows(from, begin, end, [&](int key, const uint8_t* data, const float* scale) {
    const size_t at = static_cast<size_t>(key - begin) * shape_.width;
    if (!halves) return kernels_.load_key(cache_.type, data, scale, shape_, static_cast<float*>(to) + at);
    uint16_t* row = static_cast<uint16_t*>(to) + at;
    const uint16_t* found = half(data, scale, row);
    if (found != row) std::memcpy(row, found, sizeof(uint16_t) * shape_.width);
  });
}

void KeyReader::look_ahead(Source from, int at, int keys, int skipped) {
  if (form_ == Kernels::Keys::f32) return;
  next_ = from, next_at_ = at, next_keys_ = keys, next_skipped_ = skipped;
  const uint16_t** rows = rows_ + block_;
  find_addresses(from, at, keys, skipped, rows);
  std::fill_n(rows, skipped, rows[skipped]);
  std::fill(rows + keys, rows + block_, rows[keys - 1]);
}

// Addresses of cached keys [at + skipped, at + keys).
void KeyReader::find_addresses(Source from, int at, int keys, int skipped, const uint16_t** rows) const {
  const int64_t bytes = (shape_.latent + shape_.rope) * cell_bytes(cache_.type);
  for_runs(from, at + skipped, at + keys, [&](int key, int count, const uint8_t* data, const float*) {
    for (int i = 0; i < count; ++i, data += bytes)
      rows[key - at + i] = reinterpret_cast<const uint16_t*>(data);
  });
}

// damaged(key) says whether a key of the block that some rows do not see has such values, and clears it.
template <class F>
void KeyReader::clear_damaged(const AttendBlock& b, F&& damaged) const {
  const int all_from = b.hidden ? b.hidden[b.rows - 1] : 0, all_to = b.visible[0];
  for (int key = b.skipped; key < b.keys; ++key) {
    if ((key >= all_from && key < all_to) || !damaged(key)) continue;
    for (int r = 0; r < b.rows; ++r)
      if (key < b.visible[r] && (!b.hidden || key >= b.hidden[r]))
        b.sum[r] = std::numeric_limits<float>::quiet_NaN();
  }
}

void KeyReader::fetch(Source from, int at, AttendBlock& b) {
  b.row_bytes = (shape_.latent + shape_.rope) * cell_bytes(cache_.type);
  if (form_ != Kernels::Keys::f32) {
    form_ == Kernels::Keys::bytes ? find_bytes(from, at, b) : find_rows(from, at, b);
    if (!rows_[block_]) std::fill_n(rows_ + block_, block_, rows_[0]);  // nothing to be prefetched yet
    b.key_scales = scales_;
    if (form_ == Kernels::Keys::tiles) align_groups(b.keys);
    b.rows16 = rows_;
    return;
  }
  const size_t width = shape_.width;
  for_rows(from, at + b.skipped, at + b.keys, [&](int key, const uint8_t* data, const float* scale) {
    kernels_.load_key(cache_.type, data, scale, shape_, keys32_ + (key - at) * width);
  });
  clear_damaged(b, [&](int key) {
    float* row = keys32_ + key * width;
    if (!has_overflow(row, b.latent)) return false;
    std::fill_n(row, width, 0.0f);
    return true;
  });
  for (int i = 0; i < b.skipped; ++i)
    std::memcpy(keys32_ + i * width, keys32_ + b.skipped * width, sizeof(float) * width);
  b.k32 = keys32_;
}

// The addresses of a block's keys in bfloat16.
void KeyReader::find_rows(Source from, int at, const AttendBlock& b) {
  const int keys = b.keys, skipped = b.skipped;
  if (in_place() && next_ == from && next_at_ == at && next_keys_ >= keys && next_skipped_ <= skipped)
    std::copy_n(rows_ + block_, keys, rows_);
  else
    for_rows(from, at + skipped, at + keys, [&](int key, const uint8_t* data, const float* scale) {
      rows_[key - at] = half(data, scale, keys16_ + static_cast<size_t>(key - at) * shape_.width);
    });
  clear_damaged(b, [&](int key) {
    if (!has_overflow(rows_[key], b.latent)) return false;
    uint16_t* row = keys16_ + static_cast<size_t>(key) * shape_.width;
    std::fill_n(row, shape_.width, uint16_t{0});
    rows_[key] = row;
    return true;
  });
  std::fill_n(rows_, skipped, rows_[skipped]);
  std::fill(rows_ + keys, rows_ + block_, rows_[keys - 1]);
  next_.sequence = -1;
}

// The addresses of a block's keys of 8 bits, and their scales.
void KeyReader::find_bytes(Source from, int at, const AttendBlock& b) {
  const int keys = b.keys, skipped = b.skipped;
  float *latent = scales_, *rotary = scales_ + kKeyBlock;
  const bool found = next_ == from && next_at_ == at && next_keys_ >= keys && next_skipped_ <= skipped;
  if (found) std::copy_n(rows_ + kKeyBlock, keys, rows_);
  else find_addresses(from, at, keys, skipped, rows_);
  for_runs(from, at + skipped, at + keys, [&](int key, int count, const uint8_t*, const float* scale) {
    for (int i = 0, to = key - at; i < count; ++i, ++to)
      latent[to] = scale[2 * i], rotary[to] = scale[2 * i + 1];
  });
  const auto repeat = [&](auto* x) {  // where no key is read
    std::fill_n(x, skipped, x[skipped]);
    std::fill(x + keys, x + kKeyBlock, x[keys - 1]);
  };
  repeat(rows_), repeat(latent), repeat(rotary);
  next_.sequence = -1;
}

// Copies groups of 16 keys whose rows do not follow each other; blocks of the cache with a multiple of 16
// tokens have such groups only at the ends of what a sequence sees.
void KeyReader::align_groups(int keys) {
  const size_t width = shape_.width;
  for (int g = 0; g < keys; g += 16) {
    int i = 1;
    while (i < 16 && rows_[g + i] == rows_[g] + i * width) ++i;
    if (i == 16) continue;
    for (i = g; i < g + 16; ++i) {
      uint16_t* to = keys16_ + i * width;
      if (rows_[i] != to) std::memcpy(to, rows_[i], sizeof(uint16_t) * width);
      rows_[i] = to;
    }
  }
}

}  // namespace farthing
