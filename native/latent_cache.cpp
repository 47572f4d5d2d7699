#include "latent_cache.h"

#include <algorithm>
#include <cstring>

#include "cache_rows.h"

namespace farthing {

void write_latent(const Kernels& kernels, const Cache& cache, int64_t slot, const float* latent, int c,
                  const float* k_pe, int r) {
  const size_t first = static_cast<size_t>(slot) * (c + r);
  float* scale = cache.scale + (cache.scale ? slot * 2 : 0);
  write_row(kernels, cache.type, cache.data, first, latent, c, scale);
  write_row(kernels, cache.type, cache.data, first + c, k_pe, r, scale + (cache.scale ? 1 : 0));
}

KeyReader::KeyReader(const Kernels& kernels, const Cache& cache, const Batch& batch, KeyShape shape,
                     float* keys32, uint16_t* keys16)
    : kernels_(kernels),
      cache_(cache),
      batch_(batch),
      shape_(shape),
      form_(form(kernels, cache)),
      keys32_(keys32),
      keys16_(keys16),
      rest_(keys16 + static_cast<size_t>(kKeyBlock) * shape.width) {}

const uint8_t* KeyReader::row(Source from, int key, int64_t* slot) const {
  const int32_t* blocks = batch_.block_table + static_cast<int64_t>(from.sequence) * batch_.max_blocks;
  *slot = static_cast<int64_t>(blocks[key / cache_.block_size]) * cache_.block_size + key % cache_.block_size;
  return cache_.data + from.group * cache_.layer_bytes +
         *slot * (shape_.latent + shape_.rope) * cell_bytes(cache_.type);
}

// Whether the cache holds keys as the kernel reads them.
bool KeyReader::in_place() const {
  return cache_.type == CacheType::bf16 && shape_.latent_padded == shape_.latent &&
         shape_.width == shape_.latent + shape_.rope;
}

void KeyReader::expand(Source from, int key, float* to) const {
  int64_t slot;
  const uint8_t* data = row(from, key, &slot);
  const float* scale = cache_.scale ? cache_.scale + from.group * cache_.layer_scales + slot * 2 : nullptr;
  kernels_.load_key(cache_.type, data, scale, shape_, to);
}

// One key in bfloat16: where it is cached, or in `to`.
const uint16_t* KeyReader::half(Source from, int key, uint16_t* to) const {
  int64_t slot;
  if (in_place()) return reinterpret_cast<const uint16_t*>(row(from, key, &slot));
  expand(from, key, keys32_);
  kernels_.split(keys32_, shape_.width, to, rest_);
  return to;
}

void KeyReader::copy(Source from, int key, bool halves, void* to) const {
  if (!halves) return expand(from, key, static_cast<float*>(to));
  const uint16_t* found = half(from, key, static_cast<uint16_t*>(to));
  if (found != to) std::memcpy(to, found, sizeof(uint16_t) * shape_.width);
}

void KeyReader::look_ahead(Source from, int at, int keys, int skipped) {
  if (form_ != Kernels::Keys::rows || !in_place()) return;
  next_ = from, next_at_ = at, next_keys_ = keys, next_skipped_ = skipped;
  for (int i = skipped; i < keys; ++i) rows_[kKeyBlock + i] = half(from, at + i, nullptr);
  std::fill_n(rows_ + kKeyBlock, skipped, rows_[kKeyBlock + skipped]);
  std::fill(rows_ + kKeyBlock + keys, rows_ + 2 * kKeyBlock, rows_[kKeyBlock + keys - 1]);
}

void KeyReader::fetch(Source from, int at, AttendBlock& b) {
  const int keys = b.keys, skipped = b.skipped;
  const size_t width = shape_.width;
  const auto key = [&](int i) { return at + std::max(i, skipped); };
  switch (form_) {
    case Kernels::Keys::f32:
      for (int i = 0; i < keys; ++i) expand(from, key(i), keys32_ + i * width);
      b.k32 = keys32_;
      return;
    case Kernels::Keys::rows:
      if (next_ == from && next_at_ == at && next_keys_ >= keys && next_skipped_ <= skipped)
        std::copy_n(rows_ + kKeyBlock, keys, rows_);
      else
        for (int i = 0; i < keys; ++i) rows_[i] = half(from, key(i), keys16_ + i * width);
      std::fill(rows_ + keys, rows_ + 2 * kKeyBlock, rows_[keys - 1]);
      next_.sequence = -1;
      b.rows16 = rows_;
      return;
    case Kernels::Keys::tiles:
      b.k16 = keys16_;
      b.k16_stride = shape_.width;
      if (in_place() && cache_.block_size % kKeyBlock == 0 && keys == kKeyBlock) {
        b.k16 = half(from, at, keys16_);
        return;
      }
      for (int i = 0; i < keys; ++i) {
        uint16_t* to = keys16_ + i * width;
        const uint16_t* found = half(from, key(i), to);
        if (found != to) std::memcpy(to, found, sizeof(uint16_t) * width);
      }
      std::memset(keys16_ + keys * width, 0, sizeof(uint16_t) * width * (kKeyBlock - keys));
  }
}

}  // namespace farthing
