// Rows of packed matrices as float32: the values that kernels multiply by, exactly. An embedding is read so.
#include <cmath>
#include <stdexcept>
#include <string>

#include "layers/backend.h"
#include "pack/bits.h"

namespace farthing {
namespace {

// The integer stored for a column of a lane; `low` are the low nibbles of planes.
int stored(const FormatTraits& f, const uint8_t* data, const uint8_t* low, int k, int lane) {
  const int byte = lane * 4 + k % 4;
  if (f.bits == 8 && f.planes == Planes::none) return data[static_cast<size_t>(k) / 4 * 64 + byte];
  const int columns = f.step(), quad = k % columns / 4,
            bytes = columns * (f.above() ? f.bytes_a_column() : 8);
  const size_t at = static_cast<size_t>(k / columns) * bytes + quad / 2 * 64 + byte;
  const int shift = quad % 2 * 4, nibble = data[at] >> shift & 15;
  if (f.planes == Planes::both) return nibble << 4 | (low[at] >> shift & 15);
  if (!f.above()) return nibble;
  const uint8_t* bits = data + static_cast<size_t>(k / columns) * bytes + columns * 8;
  return nibble | (bits[byte] >> f.above() * quad & ((1 << f.above()) - 1)) << 4;
}

// What one group's integers become values with.
struct Numbers {
  float scale, minimum;
  int zero;
};

Numbers numbers(const Matrix& w, const uint8_t* record, int g, int lane) {
  const FormatTraits& f = w.format_traits();
  const float row = reinterpret_cast<const float*>(record)[lane];
  if (!f.grouped()) return {row, 0.0f, 0};
  const uint8_t* at = record + 64;
  const auto one = [&](int number) {
    const bool units = f.scales == Scales::units;
    const int exponent = w.has_powers() ? at[g * kPanel + lane] : 0;
    if (w.has_powers()) return exponent ? row * std::ldexp(1.0f, exponent - 127) : 0.0f;
    const int unit = (units ? g * w.group / kUnit : g) + number * w.units();
    const float found = row * half_value(reinterpret_cast<const uint16_t*>(at)[unit * kPanel + lane]);
    const auto* multiples = reinterpret_cast<const int8_t*>(at + w.multiples_at());
    return units ? found * static_cast<float>(multiples[(g + number * w.groups()) * kPanel + lane]) : found;
  };
  const int zero = w.zero ? reinterpret_cast<const int8_t*>(at + w.scale_bytes())[g * kPanel + lane] : 0;
  return {one(0), f.minimums ? one(1) : 0.0f, zero};
}

float float_value(const Matrix& w, const uint8_t* record, int k, int lane) {
  const uint8_t* data = record + w.head_bytes();
  const size_t at = static_cast<size_t>(k) * kPanel + lane;
  if (w.format == Format::f32) return reinterpret_cast<const float*>(data)[at];
  if (w.format == Format::bf16)
    return bf16_value(reinterpret_cast<const uint16_t*>(data)[k / 2 * 2 * kPanel + lane * 2 + k % 2]);
  const uint8_t b = data[at];
  const float value = half_value(static_cast<uint16_t>((b & 0x80) << 8 | (b & 0x7f) << 7)) * 256.0f;
  return value * reinterpret_cast<const float*>(record)[k / w.group * kPanel + lane];
}

}  // namespace

void read_row(const Matrix& w, int row, float* out) {
  if (w.sparse || row < 0 || row >= w.n)
    throw std::invalid_argument("row " + std::to_string(row) + " of a " + (w.sparse ? "sparse" : "dense") +
                                " matrix with " + std::to_string(w.n) + " rows cannot be read");
  const FormatTraits& f = w.format_traits();
  const int panel = row / kPanel, lane = row % kPanel;
  const uint8_t *record = w.record(panel), *data = record + w.head_bytes();
  const uint8_t* low = w.has_planes() ? w.low_plane(panel) : nullptr;
  if (!w.quantized()) {
    for (int k = 0; k < w.k; ++k) out[k] = float_value(w, record, k, lane);
    return;
  }
  for (int g = 0, k = 0; k < w.k; ++g) {
    const Numbers n = numbers(w, record, g, lane);
    for (; k < w.k && k < (g + 1) * w.group; ++k) {
      const int u = stored(f, data, low, k, lane), q = f.codes ? f.codes->of[u] : u + f.offset();
      const int column = w.order ? w.order[k] : k;
      if (column < 0) continue;
      float& value = out[column];
      value = static_cast<float>(q - n.zero) * n.scale;
      if (f.minimums) value += n.minimum;
    }
  }
}

}  // namespace farthing
