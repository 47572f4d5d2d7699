#include "pack/pack.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "pack/bits.h"

namespace farthing {
namespace {

size_t row_bytes(const Source& s) {
  const size_t k = s.k;
  switch (s.kind) {
    case Source::f32: return k * 4;
    case Source::bf16: return k * 2;
    case Source::int4: return k / 2;
    default: return k;
  }
}

// Scales, zero points and minimums of a panel: [16], or [groups][16]; and their units [units][16].
struct PanelScales {
  int count;  // per row
  std::vector<float> scales, minimums, units, minimum_units;
  std::vector<int8_t> zeros;
  explicit PanelScales(const Matrix& m)
      : count(m.format_traits().scales == Scales::rows ? 1 : m.groups()),
        scales(static_cast<size_t>(count) * kPanel),
        minimums(m.format_traits().minimums ? scales.size() : 0),
        units(m.format_traits().scales == Scales::units ? m.units() * kPanel : 0),
        minimum_units(m.format_traits().minimums ? units.size() : 0),
        zeros(m.zero ? scales.size() : 0) {}
};

struct RowRef {
  const Source* source = nullptr;
  int row = 0;
};

// Row `row` of [n, count] numbers, zeros if there are none, to a lane of [count][16].
template <class T>
void set_lane(std::vector<T>& out, int lane, const T* numbers, int row) {
  const size_t count = out.size() / kPanel;
  for (size_t i = 0; i < count; ++i) out[i * kPanel + lane] = numbers ? numbers[row * count + i] : T{0};
}

// The scales of one row: its stored ones, or those that the kernel found when it rounded the row.
void read_scales(const Matrix& m, const RowRef& ref, int lane, PanelScales& out) {
  static constexpr Source kNone = {};
  const Source& s = ref.source ? *ref.source : kNone;
  const bool stored = s.kind == Source::int8 || s.kind == Source::int4;
  if (!ref.source || stored) set_lane(out.scales, lane, s.scale, ref.row);
  else if (m.format == Format::fp8) set_lane(out.scales, lane, s.fp8_scales(ref.row), 0);
  set_lane(out.zeros, lane, s.zero, ref.row);
  set_lane(out.minimums, lane, s.minimum, ref.row);
  set_lane(out.units, lane, s.units, ref.row);
  set_lane(out.minimum_units, lane, s.minimum_units, ref.row);
}

// Whether the numbers of a lane divided by this are float16, but for the rounding of float32.
bool fits_halves(const std::vector<float>& numbers, int lane, float by) {
  for (size_t i = lane; i < numbers.size(); i += kPanel) {
    const float x = numbers[i], size = std::fabs(x);
    if (size > 65504 * by || std::fabs(half_value(half_bits(x / by)) * by - x) > 0x1p-22f * size)
      return false;
  }
  return true;
}

// What a lane of numbers is divided by before they become float16: one that makes them exact, else the
// largest magnitude. Of 16-bit files, a power of two is exact; of NVFP4, whose scales are a float32 times
// e4m3, the largest magnitude divided by a significand of 8 to 15. Group scales may be negative (AutoRound's
// symmetric format).
float row_scale(const std::vector<float>& numbers, const std::vector<float>& more, int lane) {
  float top = 0.0f;
  for (const auto* v : {&numbers, &more})
    for (size_t i = lane; i < v->size(); i += kPanel) top = std::max(top, std::fabs((*v)[i]));
  if (top < 0x1p-100f) return top;
  const auto fits = [&](float by) { return fits_halves(numbers, lane, by) && fits_halves(more, lane, by); };
  const float power = std::ldexp(1.0f, std::ilogb(top) - 15);  // float16 reaches 2^16, and 2^-24 below
  if (fits(power)) return power;
  for (int significand = 8; significand < 16; ++significand) {
    const float by = std::ldexp(top / static_cast<float>(significand), -11);
    if (fits(by)) return by;
  }
  return top;
}

void write_halves(uint16_t* out, const std::vector<float>& numbers, const float* rows) {
  for (size_t i = 0; i < numbers.size(); ++i)
    out[i] = rows[i % kPanel] > 0.0f ? half_bits(numbers[i] / rows[i % kPanel]) : uint16_t{0};
}

// The exponents of scales relative to the largest of their row, which all are powers of two (require_powers).
void write_powers(uint8_t* out, const std::vector<float>& numbers, float* rows) {
  std::fill_n(rows, kPanel, 0.0f);
  for (size_t i = 0; i < numbers.size(); ++i) rows[i % kPanel] = std::max(rows[i % kPanel], numbers[i]);
  for (size_t i = 0; i < numbers.size(); ++i) {
    const float x = numbers[i];
    out[i] = x > 0.0f ? static_cast<uint8_t>(std::max(127 + std::ilogb(x) - std::ilogb(rows[i % kPanel]), 0))
                      : uint8_t{0};
  }
}

void write_multiples(int8_t* out, const Matrix& m, const std::vector<float>& numbers,
                     const std::vector<float>& units) {
  for (size_t i = 0; i < numbers.size(); ++i) {
    const float unit = units[i / kPanel * m.group / kUnit * kPanel + i % kPanel];
    out[i] = static_cast<int8_t>(unit != 0.0f ? std::lround(numbers[i] / unit) : 0);
  }
}

void write_groups(uint8_t* record, const Matrix& m, const PanelScales& s) {
  const bool units = m.format_traits().scales == Scales::units;
  const std::vector<float>&first = units ? s.units : s.scales, &second = units ? s.minimum_units : s.minimums;
  float* rows = reinterpret_cast<float*>(record);
  if (m.has_powers()) return write_powers(record + 64, s.scales, rows);
  for (int lane = 0; lane < kPanel; ++lane) rows[lane] = row_scale(first, second, lane);
  uint16_t* halves = reinterpret_cast<uint16_t*>(record + 64);
  write_halves(halves, first, rows);
  write_halves(halves + first.size(), second, rows);
  if (units) {
    int8_t* multiples = reinterpret_cast<int8_t*>(record + 64 + m.multiples_at());
    write_multiples(multiples, m, s.scales, s.units);
    write_multiples(multiples + s.scales.size(), m, s.minimums, s.minimum_units);
  }
  if (m.zero) std::memcpy(record + 64 + m.scale_bytes(), s.zeros.data(), s.zeros.size());
}

void write_scales(uint8_t* record, const Matrix& m, const PanelScales& s) {
  std::memset(record, 0, m.head_bytes());
  switch (m.format_traits().scales) {
    case Scales::none: break;
    case Scales::blocks:
    case Scales::rows: std::memcpy(record, s.scales.data(), s.scales.size() * sizeof(float)); break;
    case Scales::groups:
    case Scales::units: write_groups(record, m, s);
  }
}

// Number of scales stored in a source.
size_t scale_count(const Source& s) {
  const size_t n = s.n, k = s.k;
  switch (s.kind) {
    case Source::int8:
    case Source::int4: return n * (k / s.group);
    case Source::fp8: return (n + s.scale_rows - 1) / s.scale_rows * ((k + s.group - 1) / s.group);
    default: return 0;
  }
}

void require_finite(const char* what, const float* numbers, size_t count) {
  for (size_t i = 0; numbers && i < count; ++i)
    if (!std::isfinite(numbers[i]))
      throw std::invalid_argument(std::string(what) + " " + std::to_string(i) + " of " +
                                  std::to_string(count) + " is " + std::to_string(numbers[i]) +
                                  "; expected finite " + what + "s");
}

void require_finite_scales(const std::vector<Source>& sources) {
  for (const Source& s : sources) {
    const size_t units = static_cast<size_t>(s.n) * (s.k / kUnit);
    require_finite("scale", s.scale, scale_count(s));
    require_finite("minimum", s.minimum, scale_count(s));
    require_finite("unit", s.units, units);
    require_finite("unit", s.minimum_units, units);
  }
}

// E4M3 has no infinity, and NaN where all bits but the sign's are ones. Kernels would read it as 480.
bool has_nan(const uint8_t* e4m3, int n) {
  uint8_t any = 0;
  for (int i = 0; i < n; ++i) any |= static_cast<uint8_t>((e4m3[i] & 0x7f) + 1);
  return any & 0x80;
}

// Positive numbers that are powers of two times each other have the same significand. Subnormal ones are as
// good as zero.
void require_powers(const Matrix& m, const std::vector<Source>& sources) {
  if (!m.has_powers()) return;
  const auto counts = [](float x) { return std::fabs(x) >= 0x1p-126f; };
  const auto rest = [](float x) { return std::bit_cast<uint32_t>(x) & 0x807fffffu; };
  for (const Source& s : sources) {
    const size_t count = s.k / s.group;
    for (const float* row = s.scale; row < s.scale + s.n * count; row += count) {
      const float* first = std::find_if(row, row + count, counts);
      for (const float* x = first; x < row + count; ++x)
        if (counts(*x) && (*x < 0.0f || rest(*x) != rest(*first)))
          throw std::invalid_argument("scale: got " + std::to_string(*x) + " beside " +
                                      std::to_string(*first) + "; expected powers of two in groups of " +
                                      std::to_string(m.group) + " of " + m.format_traits().name);
    }
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

// Kernels round groups of up to 64 columns, to formats that may be block-sparse.
void require_roundable(const Matrix& m, const std::vector<Source>& sources) {
  const FormatTraits& format = m.format_traits();
  for (const Source& s : sources) {
    const bool stored = s.kind == Source::int4 || s.kind == Source::int8;
    if (format.grouped() && !format.cells && !stored)
      throw std::invalid_argument(std::string("format: got float rows for ") + format.name +
                                  "; expected integers");
    if (format.grouped() && !stored && m.group > 64)
      throw std::invalid_argument("group: got " + std::to_string(m.group) +
                                  " for float rows; expected 32 or 64");
  }
}

// Bytes of q8 to planes of `bytes` high and as many low nibbles.
void split_nibbles(const uint8_t* data, size_t bytes, uint8_t* high, uint8_t* low) {
  for (size_t i = 0; i < bytes; ++i) {
    const size_t at = i / 64 * 128 + i % 64;  // of columns k % 8 < 4; those of the rest follow
    low[i] = static_cast<uint8_t>((data[at] & 15) | data[at + 64] << 4);
    high[i] = static_cast<uint8_t>(data[at] >> 4 | (data[at + 64] & 0xf0));
  }
}

// False if a value of FP8, or one that is rounded, is not finite.
bool write_panel(const Matrix& m, const Kernels& kernels, const RowRef* refs, int count, PanelScales& scales,
                 uint8_t* record, uint8_t* low) {
  PanelRows rows = {};
  for (int lane = 0; lane < count; ++lane) {
    const auto& [source, row] = refs[lane];
    if (!source) continue;
    rows.kind[lane] = source->kind;
    rows.row[lane] = static_cast<const uint8_t*>(source->data) + row_bytes(*source) * row;
    if (source->kind == Source::fp8) rows.scale[lane] = source->fp8_scales(row);
    rows.group[lane] = source->group;
    if (source->kind == Source::fp8 && has_nan(rows.row[lane], source->k)) return false;
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
  require_powers(m, sources);
  packed->reserve(pool, *arena);
  std::atomic<bool> finite{true};
  pool.run([&](Team& team) {
    PanelScales scales(m);
    team.for_units(kOnlyLoop, 1, m.panels, [&](int, int panel) {
      const int first = panel * kPanel;
      if (!write_panel(m, kernels, rows.data() + first, std::min(kPanel, count - first), scales,
                       const_cast<uint8_t*>(m.record(panel)), const_cast<uint8_t*>(m.low_plane(panel))))
        finite.store(false, std::memory_order_relaxed);
    });
  });
  if (!finite)
    throw std::invalid_argument(
        "got NaN or infinity; expected finite values of FP8, and where they are rounded to integers");
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

void Packed::reorder(const int64_t* order) {
  m.ordered =
      static_cast<int>(std::count_if(order, order + m.k, [](int64_t column) { return column != -1; }));
  order_.assign(order, order + m.k);
  std::vector<bool> found(m.ordered);
  for (int i = 0; i < m.k; ++i) {
    if (order[i] == -1) continue;
    if (order[i] < 0 || order[i] >= m.ordered || found[order[i]])
      throw std::invalid_argument("order: got column " + std::to_string(order[i]) + " at " +
                                  std::to_string(i) + "; expected each of " + std::to_string(m.ordered) +
                                  " once");
    found[order[i]] = true;
  }
  m.order = order_.data();
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
    pool.run([&](Team& team) {  // written first by the node's threads, which puts it into its memory
      team.for_units(kOnlyLoop, 1, m.panels, [&](int, int panel) {
        std::memcpy(const_cast<uint8_t*>(m.record(panel)), records + m.stride * panel, m.stride);
        std::memcpy(const_cast<uint8_t*>(m.low_plane(panel)), low + m.plane_bytes() * panel, m.plane_bytes());
      });
    });
    return;
  }
  m.parts = 1;
  m.first[1] = m.panels;
  uint8_t* to = arena.take(0, offsets_.back() + kActGroup * 64);
  std::memcpy(to, records, offsets_.back());
  m.base[0] = to;
}

}  // namespace farthing
