#include "latent_cache.h"

#include <algorithm>
#include <cstring>

#include "cache_rows.h"

namespace farthing {

void write_latent(const Kernels& kernels, const Cache& cache, int64_t slot, const float* latent, int c,
                  const float* k_pe, int r, FixedScales fixed) {
  const size_t first = static_cast<size_t>(slot) * (c + r);
  float* scale = cache.scale + (cache.scale ? slot * 2 : 0);
  write_row(kernels, cache.type, cache.data, first, latent, c, scale, fixed.latent);
  write_row(kernels, cache.type, cache.data, first + c, k_pe, r, scale + (cache.scale ? 1 : 0), fixed.key);
}

KeyReader::KeyReader(const Kernels& kernels, const Cache& cache, const Batch& batch, KeyShape shape,
                     float* keys32, uint16_t* keys16)
    : kernels_(kernels),
      cache_(cache),
      batch_(batch),
      shape_(shape),
      form_(form(kernels, cache)),
      keys32_(keys32),
      keys16_(keys16) {}

// f(key, data, scale) for keys [begin, end): where the cache has them, with one division per block.
template <class F>
void KeyReader::for_rows(Source from, int begin, int end, F&& f) const {
  const int32_t* blocks = batch_.block_table + static_cast<int64_t>(from.sequence) * batch_.max_blocks;
  const uint8_t* data = cache_.data + from.group * cache_.layer_bytes;
  const float* scale = cache_.scale ? cache_.scale + from.group * cache_.layer_scales : nullptr;
  const int64_t bytes = (shape_.latent + shape_.rope) * cell_bytes(cache_.type), size = cache_.block_size;
  for (int key = begin; key < end;) {
    int64_t slot = blocks[key / size] * size + key % size;
    for (const int last = std::min<int64_t>(end, (key / size + 1) * size); key < last; ++key, ++slot)
      f(key, data + slot * bytes, scale ? scale + slot * 2 : nullptr);
  }
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

void KeyReader::copy(Source from, int key, bool halves, void* to) const {
  for_rows(from, key, key + 1, [&](int, const uint8_t* data, const float* scale) {
    if (!halves) return kernels_.load_key(cache_.type, data, scale, shape_, static_cast<float*>(to));
    const uint16_t* found = half(data, scale, static_cast<uint16_t*>(to));
    if (found != to) std::memcpy(to, found, sizeof(uint16_t) * shape_.width);
  });
}

void KeyReader::look_ahead(Source from, int at, int keys, int skipped) {
  if (form_ != Kernels::Keys::rows) return;
  next_ = from, next_at_ = at, next_keys_ = keys, next_skipped_ = skipped;
  const uint16_t** rows = rows_ + kKeyBlock;
  for_rows(from, at + skipped, at + keys, [&](int key, const uint8_t* data, const float*) {
    rows[key - at] = reinterpret_cast<const uint16_t*>(data);
  });
  std::fill_n(rows, skipped, rows[skipped]);
  std::fill(rows + keys, rows + kKeyBlock, rows[keys - 1]);
}

void KeyReader::fetch(Source from, int at, AttendBlock& b) {
  const int keys = b.keys, skipped = b.skipped;
  const size_t width = shape_.width;
  const auto each = [&](auto&& f) {  // f(i, data, scale): i-th key of the block, but for skipped ones
    for_rows(from, at + skipped, at + keys,
             [&](int key, const uint8_t* data, const float* scale) { f(key - at, data, scale); });
  };
  switch (form_) {
    case Kernels::Keys::f32:
      each([&](int i, const uint8_t* data, const float* scale) {
        kernels_.load_key(cache_.type, data, scale, shape_, keys32_ + i * width);
      });
      for (int i = 0; i < skipped; ++i)
        std::memcpy(keys32_ + i * width, keys32_ + skipped * width, sizeof(float) * width);
      b.k32 = keys32_;
      return;
    case Kernels::Keys::rows:
      if (in_place() && next_ == from && next_at_ == at && next_keys_ >= keys && next_skipped_ <= skipped)
        std::copy_n(rows_ + kKeyBlock, keys, rows_);
      else
        each([&](int i, const uint8_t* data, const float* scale) {
          rows_[i] = half(data, scale, keys16_ + i * width);
        });
      std::fill_n(rows_, skipped, rows_[skipped]);
      std::fill(rows_ + keys, rows_ + 2 * kKeyBlock, rows_[keys - 1]);
      next_.sequence = -1;
      b.rows16 = rows_;
      return;
    case Kernels::Keys::tiles:
      b.k16 = keys16_;
      b.k16_stride = shape_.width;
      const bool whole = in_place() && cache_.block_size % kKeyBlock == 0 && keys == kKeyBlock;
      each([&](int i, const uint8_t* data, const float* scale) {
        if (whole) {
          if (i == skipped) b.k16 = reinterpret_cast<const uint16_t*>(data) - skipped * width;
          return;
        }
        uint16_t* to = keys16_ + i * width;
        const uint16_t* found = half(data, scale, to);
        if (found != to) std::memcpy(to, found, sizeof(uint16_t) * width);
      });
      if (whole) return;
      for (int i = 0; i < skipped; ++i)
        std::memcpy(keys16_ + i * width, keys16_ + skipped * width, sizeof(uint16_t) * width);
      std::memset(keys16_ + keys * width, 0, sizeof(uint16_t) * width * (kKeyBlock - keys));
  }
}

}  // namespace farthing
