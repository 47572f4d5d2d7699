#include "pack.h"

#include <cfloat>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "bits.h"

namespace farthing {
namespace {

constexpr float kTiny = FLT_MIN;  // the smallest scale, as in farthing.ops.weights

// One row of the packed matrix before layout.
struct Line {
  std::vector<float> values;   // f32, bf16
  std::vector<int8_t> q;       // q8, q4
  std::vector<uint8_t> bytes;  // fp8
  std::vector<float> scales;   // [groups]
  std::vector<int8_t> zeros;   // [groups]
};

void clear(Line& l, const Matrix& m) {
  l.values.assign(m.kp, 0.0f);
  l.q.assign(m.kp, 0);
  l.bytes.assign(m.kp, 0);
  l.scales.assign(m.groups(), 0.0f);
  l.zeros.assign(m.groups(), 0);
}

float amax(const float* x, int n) {
  float a = 0.0f;
  for (int i = 0; i < n; ++i) a = std::max(a, std::fabs(x[i]));
  return a;
}

// Quantizes a group to 4 bits with the range of least squared error, exactly as
// farthing.ops.weights.quantize_int4 does. Returns the scale.
float round_group(const float* x, int n, int8_t* out) {
  static constexpr float kRanges[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f, 0.7f};
  const float top = amax(x, n);
  std::vector<int8_t> q(n);
  float scale = std::max(top / 7.5f, kTiny);
  double best = -1.0;
  for (const float range : kRanges)
    for (const float sign : {1.0f, -1.0f}) {
      const float step = std::max(top * range / 7.5f, kTiny) * sign;
      double dot = 0.0;
      int square = 0;
      for (int i = 0; i < n; ++i) {
        const float r = std::min(std::max(std::nearbyint(x[i] / step), -8.0f), 7.0f);
        q[i] = static_cast<int8_t>(r);
        dot += static_cast<double>(x[i]) * static_cast<double>(r);
        square += q[i] * q[i];
      }
      const double gain = square ? dot * dot / square : 0.0;
      if (gain <= best) continue;
      best = gain;
      const float fitted = square ? static_cast<float>(dot / square) : step;
      scale = std::fabs(fitted) < kTiny ? step : fitted;
      std::copy(q.begin(), q.end(), out);
    }
  return scale;
}

// Rounds as farthing.ops.weights.quantize_int8 and quantize_int4 do.
void round_dense(Line& l, const Matrix& m) {
  if (m.format_traits().grouped()) {
    for (int g = 0; g * m.group < m.k; ++g)
      l.scales[g] = round_group(l.values.data() + g * m.group, m.group, l.q.data() + g * m.group);
    return;
  }
  const float scale = std::max(amax(l.values.data(), m.k) / 127.0f, kTiny);
  for (int i = 0; i < m.k; ++i)
    l.q[i] = static_cast<int8_t>(std::min(std::max(std::nearbyint(l.values[i] / scale), -127.0f), 127.0f));
  l.scales[0] = scale;
}

void read_row(Line& l, const Matrix& m, const Source& s, int r) {
  const size_t at = static_cast<size_t>(r) * s.k;
  const int groups = s.kind == Source::int4 ? s.k / s.group : 1;
  switch (s.kind) {
    case Source::f32:
      std::memcpy(l.values.data(), static_cast<const float*>(s.data) + at, sizeof(float) * s.k);
      break;
    case Source::bf16:
      for (int k = 0; k < s.k; ++k) l.values[k] = bf16_value(static_cast<const uint16_t*>(s.data)[at + k]);
      break;
    case Source::int8:
      std::memcpy(l.q.data(), static_cast<const int8_t*>(s.data) + at, s.k);
      l.scales[0] = s.scale[r];
      return;
    case Source::int4:
      for (int k = 0; k < s.k; ++k)
        l.q[k] =
            static_cast<int8_t>((static_cast<const uint8_t*>(s.data)[(at + k) / 2] >> (k % 2 * 4) & 15) - 8);
      for (int g = 0; g < groups; ++g) {
        l.scales[g] = s.scale[static_cast<size_t>(r) * groups + g];
        if (s.zero) l.zeros[g] = s.zero[static_cast<size_t>(r) * groups + g];
      }
      return;
    case Source::fp8: {
      std::memcpy(l.bytes.data(), static_cast<const uint8_t*>(s.data) + at, s.k);
      const int blocks = (s.k + 127) / 128;
      for (int g = 0; g < blocks; ++g) l.scales[g] = s.scale[static_cast<size_t>(r / 128) * blocks + g];
      return;
    }
  }
  if (m.quantized()) round_dense(l, m);
}

void write_integers(uint8_t* p, const Matrix& m, int lane, const std::vector<int8_t>& q) {
  const FormatTraits& format = m.format_traits();
  const int offset = format.offset();
  if (!format.nibbles()) {
    for (int k = 0; k < m.kp; ++k) p[(k / 4 * 16 + lane) * 4 + k % 4] = static_cast<uint8_t>(q[k] - offset);
    return;
  }
  for (int k = 0; k < m.kp; k += 8)
    for (int j = 0; j < 4; ++j)
      p[k / 8 * 64 + lane * 4 + j] = static_cast<uint8_t>((q[k + j] - offset) | (q[k + j + 4] - offset) << 4);
}

void write_data(uint8_t* p, const Matrix& m, const Line* lines) {
  for (int lane = 0; lane < kPanel; ++lane) {
    const Line& l = lines[lane];
    switch (m.format) {
      case Format::f32:
        for (int k = 0; k < m.kp; ++k) reinterpret_cast<float*>(p)[k * 16 + lane] = l.values[k];
        break;
      case Format::bf16:
        for (int k = 0; k < m.kp; ++k)
          reinterpret_cast<uint16_t*>(p)[(k / 2 * 16 + lane) * 2 + k % 2] = bf16_bits(l.values[k]);
        break;
      case Format::fp8:
        for (int k = 0; k < m.kp; ++k) p[k * 16 + lane] = l.bytes[k];
        break;
      default: write_integers(p, m, lane, l.q);
    }
  }
}

// Group scales may be negative (AutoRound's symmetric format): the row scale is the largest magnitude.
void write_groups(uint8_t* record, const Matrix& m, int lane, const Line& l) {
  const int groups = m.groups();
  float& row = reinterpret_cast<float*>(record)[lane];
  uint16_t* relative = reinterpret_cast<uint16_t*>(record + 64);
  int8_t* zeros = reinterpret_cast<int8_t*>(record + 64 + groups * 32);
  row = amax(l.scales.data(), groups);
  for (int g = 0; g < groups; ++g) {
    relative[g * 16 + lane] = row > 0.0f ? half_bits(l.scales[g] / row) : 0;
    if (m.zero) zeros[g * 16 + lane] = l.zeros[g];
  }
}

void write_scales(uint8_t* record, const Matrix& m, const Line* lines) {
  float* scales = reinterpret_cast<float*>(record);
  for (int lane = 0; lane < kPanel; ++lane) {
    const Line& l = lines[lane];
    switch (m.format_traits().scales) {
      case Scales::none: break;
      case Scales::blocks:
        for (int g = 0; g < m.groups(); ++g) scales[g * 16 + lane] = l.scales[g];
        break;
      case Scales::rows: scales[lane] = l.scales[0]; break;
      case Scales::groups: write_groups(record, m, lane, l);
    }
  }
}

// Number of scales stored in a source. Scales computed while packing are finite if the values are.
size_t scale_count(const Source& s) {
  const size_t n = s.n, k = s.k;
  switch (s.kind) {
    case Source::int8: return n;
    case Source::int4: return n * (k / s.group);
    case Source::fp8: return (n + 127) / 128 * ((k + 127) / 128);
    default: return 0;
  }
}

void require_finite_scales(const std::vector<Source>& sources) {
  for (const Source& s : sources) {
    const size_t count = scale_count(s);
    for (size_t i = 0; i < count; ++i)
      if (!std::isfinite(s.scale[i]))
        throw std::invalid_argument("scale " + std::to_string(i) + " of " + std::to_string(count) + " is " +
                                    std::to_string(s.scale[i]) + "; expected finite scales");
  }
}

struct RowRef {
  const Source* source = nullptr;
  int row = 0;
};

std::vector<RowRef> row_order(const std::vector<Source>& sources, bool interleave) {
  std::vector<RowRef> rows;
  if (interleave) {
    const int panels = (sources[0].n + kPanel - 1) / kPanel;
    rows.resize(static_cast<size_t>(panels) * 2 * kPanel);
    for (int i = 0; i < 2; ++i)
      for (int r = 0; r < sources[i].n; ++r)
        rows[r / kPanel * 2 * kPanel + i * kPanel + r % kPanel] = {&sources[i], r};
    return rows;
  }
  for (const Source& s : sources)
    for (int r = 0; r < s.n; ++r) rows.push_back({&s, r});
  return rows;
}

}  // namespace

std::shared_ptr<Packed> Packed::pack(Pool& pool, std::shared_ptr<Arena> arena, Format format, int group,
                                     bool zero, bool interleave, const BlockCosts& costs,
                                     const std::vector<Source>& sources) {
  require_finite_scales(sources);
  auto packed = std::make_shared<Packed>();
  Matrix& m = packed->m;
  const std::vector<RowRef> rows = row_order(sources, interleave);
  m = Matrix::describe(format, static_cast<int>(rows.size()), sources[0].k, group, zero);
  std::vector<uint8_t> records(m.stride * m.panels);
  pool.run([&](Team& team) {
    std::vector<Line> lines(kPanel);
    team.for_units(0, 1, m.panels, [&](int, int panel) {
      for (int lane = 0; lane < kPanel; ++lane) {
        clear(lines[lane], m);
        const size_t r = static_cast<size_t>(panel) * kPanel + lane;
        if (r < rows.size() && rows[r].source) read_row(lines[lane], m, *rows[r].source, rows[r].row);
      }
      uint8_t* record = records.data() + m.stride * panel;
      write_scales(record, m, lines.data());
      write_data(record + m.head_bytes(), m, lines.data());
    });
  });
  if (has_cells(m) && to_cells(m, costs, records, packed->offsets_)) {
    m.sparse = true;
    m.offsets = packed->offsets_.data();
  }
  packed->place(pool, *arena, records.data());
  packed->arena_ = std::move(arena);
  return packed;
}

void Packed::place(Pool& pool, Arena& arena, const uint8_t* records) {
  m.parts = m.sparse ? 1 : pool.nodes();
  if (m.sparse) {
    m.first[1] = m.panels;
    uint8_t* to = arena.take(0, offsets_.back() + kActGroup * 64);
    std::memcpy(to, records, offsets_.back());
    m.base[0] = to;
    return;
  }
  for (int node = 0; node < m.parts; ++node) {
    const Share s = pool.share(node, m.panels);
    const size_t bytes = m.stride * (s.end - s.begin);
    uint8_t* to = arena.take(node, bytes);
    std::memcpy(to, records + m.stride * s.begin, bytes);
    m.first[node] = s.begin;
    m.first[node + 1] = s.end;
    m.base[node] = to;
  }
}

}  // namespace farthing
