#include "pack.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "bits.h"

namespace farthing {
namespace {

const float* block_scales(const Source& s, int row) {
  return s.scale + static_cast<size_t>(row / kActGroup) * ((s.k + kActGroup - 1) / kActGroup);
}

size_t row_bytes(const Source& s) {
  const size_t k = s.k;
  switch (s.kind) {
    case Source::f32: return k * 4;
    case Source::bf16: return k * 2;
    case Source::int4: return k / 2;
    default: return k;
  }
}

// Scales and zero points of a panel: [16], or [groups][16].
struct PanelScales {
  int count;  // per row
  std::vector<float> scales;
  std::vector<int8_t> zeros;
  explicit PanelScales(const Matrix& m)
      : count(m.format_traits().scales == Scales::rows ? 1 : m.groups()),
        scales(static_cast<size_t>(count) * kPanel),
        zeros(m.zero ? scales.size() : 0) {}
  void set(int g, int lane, float scale, int8_t zero = 0) {
    scales[g * kPanel + lane] = scale;
    if (!zeros.empty()) zeros[g * kPanel + lane] = zero;
  }
};

struct RowRef {
  const Source* source = nullptr;
  int row = 0;
};

// The scales of one row: its stored ones, or those that the kernel found when it rounded the row.
void read_scales(const Matrix& m, const RowRef& ref, int lane, PanelScales& out) {
  if (!ref.source) {
    for (int g = 0; g < out.count; ++g) out.set(g, lane, 0.0f);
    return;
  }
  const Source& s = *ref.source;
  const size_t at = static_cast<size_t>(ref.row) * out.count;
  const bool stored = s.kind == Source::int8 || s.kind == Source::int4;
  for (int g = 0; g < out.count; ++g) {
    if (stored) out.set(g, lane, s.scale[at + g], s.zero ? s.zero[at + g] : int8_t{0});
    else if (m.format == Format::fp8) out.set(g, lane, block_scales(s, ref.row)[g]);
    else out.set(g, lane, out.scales[g * kPanel + lane]);
  }
}

// Group scales may be negative (AutoRound's symmetric format): the row scale is the largest magnitude.
void write_groups(uint8_t* record, const Matrix& m, const PanelScales& s) {
  const int groups = m.groups();
  float* rows = reinterpret_cast<float*>(record);
  uint16_t* relative = reinterpret_cast<uint16_t*>(record + 64);
  for (int lane = 0; lane < kPanel; ++lane) {
    float row = 0.0f;
    for (int g = 0; g < groups; ++g) row = std::max(row, std::fabs(s.scales[g * kPanel + lane]));
    rows[lane] = row;
    for (int g = 0; g < groups; ++g)
      relative[g * kPanel + lane] = row > 0.0f ? half_bits(s.scales[g * kPanel + lane] / row) : 0;
  }
  if (m.zero) std::memcpy(record + 64 + groups * 32, s.zeros.data(), s.zeros.size());
}

void write_scales(uint8_t* record, const Matrix& m, const PanelScales& s) {
  std::memset(record, 0, m.head_bytes());
  switch (m.format_traits().scales) {
    case Scales::none: break;
    case Scales::blocks:
    case Scales::rows: std::memcpy(record, s.scales.data(), s.scales.size() * sizeof(float)); break;
    case Scales::groups: write_groups(record, m, s);
  }
}

// Number of scales stored in a source.
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

// Kernels round groups of up to 64 columns.
void require_roundable(const Matrix& m, const std::vector<Source>& sources) {
  for (const Source& s : sources)
    if (m.format_traits().grouped() && s.kind != Source::int4 && m.group > 64)
      throw std::invalid_argument("group: got " + std::to_string(m.group) +
                                  " for float rows; expected 32 or 64");
}

// Bytes of q8 to planes of `bytes` high and as many low nibbles.
void split_nibbles(const uint8_t* data, size_t bytes, uint8_t* high, uint8_t* low) {
  for (size_t i = 0; i < bytes; ++i) {
    const size_t at = i / 64 * 128 + i % 64;  // of columns k % 8 < 4; those of the rest follow
    low[i] = static_cast<uint8_t>((data[at] & 15) | data[at + 64] << 4);
    high[i] = static_cast<uint8_t>(data[at] >> 4 | (data[at + 64] & 0xf0));
  }
}

// False if a value that is rounded is not finite.
bool write_panel(const Matrix& m, const Kernels& kernels, const RowRef* refs, int count, PanelScales& scales,
                 uint8_t* record, uint8_t* low) {
  PanelRows rows = {};
  for (int lane = 0; lane < count; ++lane) {
    const auto& [source, row] = refs[lane];
    if (!source) continue;
    rows.kind[lane] = source->kind;
    rows.row[lane] = static_cast<const uint8_t*>(source->data) + row_bytes(*source) * row;
    if (source->kind == Source::fp8) rows.scale[lane] = block_scales(*source, row);
  }
  uint8_t* data = record + m.head_bytes();
  if (m.has_planes()) {
    std::vector<uint8_t> bytes(2 * m.plane_bytes());
    kernels.pack(m, rows, scales.scales.data(), bytes.data());
    split_nibbles(bytes.data(), m.plane_bytes(), data, low);
  } else {
    kernels.pack(m, rows, scales.scales.data(), data);
  }
  for (int lane = 0; lane < kPanel; ++lane)
    read_scales(m, lane < count ? refs[lane] : RowRef{}, lane, scales);
  write_scales(record, m, scales);
  return !m.quantized() || std::all_of(scales.scales.begin(), scales.scales.end(),
                                       [](float scale) { return std::isfinite(scale); });
}

}  // namespace

std::shared_ptr<Packed> Packed::pack(Pool& pool, const Kernels& kernels, std::shared_ptr<Arena> arena,
                                     Format format, int group, bool zero, bool interleave,
                                     const BlockCosts& costs, const std::vector<Source>& sources) {
  require_finite_scales(sources);
  auto packed = std::make_shared<Packed>();
  Matrix& m = packed->m;
  const std::vector<RowRef> rows = row_order(sources, interleave);
  const int count = static_cast<int>(rows.size());
  m = Matrix::describe(format, count, sources[0].k, group, zero);
  require_roundable(m, sources);
  packed->reserve(pool, *arena);
  std::atomic<bool> finite{true};
  pool.run([&](Team& team) {
    PanelScales scales(m);
    team.for_units(0, 1, m.panels, [&](int, int panel) {
      const int first = panel * kPanel;
      if (!write_panel(m, kernels, rows.data() + first, std::min(kPanel, count - first), scales,
                       const_cast<uint8_t*>(m.record(panel)), const_cast<uint8_t*>(m.low_plane(panel))))
        finite.store(false, std::memory_order_relaxed);
    });
  });
  if (!finite)
    throw std::invalid_argument(
        "got NaN or infinity; expected finite values, because they are rounded to integers");
  if (has_cells(m)) {
    std::vector<uint8_t> cells;
    if (to_cells(m, costs, cells, packed->offsets_)) {
      for (int node = 0; node < m.parts; ++node) arena->give_back(node, m.base[node]);
      m.sparse = true;
      m.offsets = packed->offsets_.data();
      packed->place(pool, *arena, cells.data());
    }
  }
  packed->arena_ = std::move(arena);
  return packed;
}

void Packed::reserve(Pool& pool, Arena& arena) {
  m.parts = pool.nodes();
  for (int node = 0; node < m.parts; ++node) {
    const Share s = pool.share(node, m.panels);
    m.first[node] = s.begin;
    m.first[node + 1] = s.end;
    m.base[node] = arena.take(node, m.part_bytes(node));
  }
}

void Packed::place(Pool& pool, Arena& arena, const uint8_t* records) {
  if (!m.sparse) {
    reserve(pool, arena);
    const uint8_t* low = records + m.stride * static_cast<size_t>(m.panels);
    for (int node = 0; node < m.parts; ++node) {
      const size_t before = m.first[node], count = m.panels_of(node);
      uint8_t* to = const_cast<uint8_t*>(m.base[node]);
      std::memcpy(to, records + m.stride * before, m.stride * count);
      std::memcpy(to + m.stride * count, low + m.plane_bytes() * before, m.plane_bytes() * count);
    }
    return;
  }
  m.parts = 1;
  m.first[1] = m.panels;
  uint8_t* to = arena.take(0, offsets_.back() + kActGroup * 64);
  std::memcpy(to, records, offsets_.back());
  m.base[0] = to;
}

}  // namespace farthing
