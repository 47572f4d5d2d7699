#include "latent_cache.h"

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

const uint8_t* KeyReader::row(int sequence, int key, int64_t* slot) const {
  const int32_t* blocks = batch_.block_table + static_cast<int64_t>(sequence) * batch_.max_blocks;
  *slot = static_cast<int64_t>(blocks[key / cache_.block_size]) * cache_.block_size + key % cache_.block_size;
  return cache_.data + *slot * (shape_.latent + shape_.rope) * cell_bytes(cache_.type);
}

// Whether the cache holds keys as the kernel reads them.
bool KeyReader::in_place() const {
  return cache_.type == CacheType::bf16 && shape_.latent_padded == shape_.latent &&
         shape_.width == shape_.latent + shape_.rope;
}

void KeyReader::expand(int sequence, int key, float* to) const {
  int64_t slot;
  const uint8_t* from = row(sequence, key, &slot);
  kernels_.load_key(cache_.type, from, cache_.scale ? cache_.scale + slot * 2 : nullptr, shape_, to);
}

// One key in bfloat16: where it is cached, or in `to`.
const uint16_t* KeyReader::half(int sequence, int key, uint16_t* to) const {
  int64_t slot;
  if (in_place()) return reinterpret_cast<const uint16_t*>(row(sequence, key, &slot));
  expand(sequence, key, keys32_);
  kernels_.split(keys32_, shape_.width, to, rest_);
  return to;
}

void KeyReader::copy(int sequence, int key, bool halves, void* to) const {
  if (!halves) return expand(sequence, key, static_cast<float*>(to));
  const uint16_t* from = half(sequence, key, static_cast<uint16_t*>(to));
  if (from != to) std::memcpy(to, from, sizeof(uint16_t) * shape_.width);
}

void KeyReader::look_ahead(int sequence, int at, int keys) {
  if (form_ != Kernels::Keys::rows || !in_place()) return;
  next_sequence_ = sequence, next_at_ = at, next_keys_ = keys;
  for (int i = 0; i < keys; ++i) rows_[kKeyBlock + i] = half(sequence, at + i, nullptr);
  std::fill(rows_ + kKeyBlock + keys, rows_ + 2 * kKeyBlock, rows_[kKeyBlock + keys - 1]);
}

void KeyReader::fetch(int sequence, int at, AttendBlock& b) {
  const int keys = b.keys;
  const size_t width = shape_.width;
  switch (form_) {
    case Kernels::Keys::f32:
      for (int i = 0; i < keys; ++i) expand(sequence, at + i, keys32_ + i * width);
      b.k32 = keys32_;
      return;
    case Kernels::Keys::rows:
      if (next_sequence_ == sequence && next_at_ == at && next_keys_ >= keys)
        std::copy_n(rows_ + kKeyBlock, keys, rows_);
      else
        for (int i = 0; i < keys; ++i) rows_[i] = half(sequence, at + i, keys16_ + i * width);
      std::fill(rows_ + keys, rows_ + 2 * kKeyBlock, rows_[keys - 1]);
      next_sequence_ = -1;
      b.rows16 = rows_;
      return;
    case Kernels::Keys::tiles:
      b.k16 = keys16_;
      b.k16_stride = shape_.width;
      if (in_place() && cache_.block_size % kKeyBlock == 0 && keys == kKeyBlock) {
        b.k16 = half(sequence, at, keys16_);
        return;
      }
      for (int i = 0; i < keys; ++i) {
        uint16_t* to = keys16_ + i * width;
        const uint16_t* from = half(sequence, at + i, to);
        if (from != to) std::memcpy(to, from, sizeof(uint16_t) * width);
      }
      std::memset(keys16_ + keys * width, 0, sizeof(uint16_t) * width * (kKeyBlock - keys));
  }
}

}  // namespace farthing
