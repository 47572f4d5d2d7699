// Products of every format, number of rows and instruction set of this processor against float64, without
// Python: for processors that are emulated (native/test-neon).
//   kernel_test [SET …]
// Records are random bytes, read here as formats.h describes them. Results must be close to the exact ones,
// and those of many rows those of one row, bit for bit. Prints a hash of what each set computes: integers,
// and floats that are not split, have the same one with every set that rounds products and sums once.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "isa/kernels.h"
#include "pack/bits.h"
#include "pack/pack.h"
#include "threads/workspace.h"

namespace farthing {
namespace {

struct Random {  // the same numbers on every machine
  uint64_t state = 1;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
  }
  float uniform(float low, float high) {
    return low + (high - low) * static_cast<float>(next() % 65536) / 65536;
  }
};

struct Case {
  Matrix w;
  std::vector<uint8_t> bytes, cells;
  std::vector<uint64_t> offsets;
};

void put(uint8_t*& at, float value) { std::memcpy(at, &value, 4), at += 4; }
void put_half(uint8_t*& at, float value) {
  const uint16_t bits = half_bits(value);
  std::memcpy(at, &bits, 2), at += 2;
}

// Scales of a record, in the order of formats.h.
void fill_head(const Matrix& w, uint8_t* at, Random& random) {
  const FormatTraits& f = w.format_traits();
  if (f.scales == Scales::none) return;
  const int floats = f.scales == Scales::blocks ? w.groups() * kPanel : kPanel;
  for (int i = 0; i < floats; ++i) put(at, random.uniform(0.01f, 0.02f));
  if (!f.grouped()) return;
  const int numbers = kPanel * (f.minimums ? 2 : 1);
  for (int i = 0; i < w.units() * numbers; ++i)
    if (w.has_powers()) *at++ = static_cast<uint8_t>(120 + random.next() % 8);
    else put_half(at, random.uniform(-1.0f, 1.0f));
  if (f.scales == Scales::units)
    for (int i = 0; i < w.groups() * numbers; ++i) *at++ = static_cast<uint8_t>(random.next() % 64 - 32);
  for (int i = 0; w.zero && i < w.groups() * kPanel; ++i)
    *at++ = static_cast<uint8_t>(random.next() % 16 - 8);
}

void fill_data(const Matrix& w, uint8_t* at, size_t bytes, Random& random) {
  for (size_t i = 0; i < bytes; ++i) at[i] = static_cast<uint8_t>(random.next());
  if (w.format == Format::fp8)  // no NaN
    for (size_t i = 0; i < bytes; ++i) at[i] = (at[i] & 127) == 127 ? 0 : at[i];
  for (size_t i = 0; w.format == Format::bf16 && i < bytes; i += 2) {
    const uint16_t bits = bf16_bits(random.uniform(-1.0f, 1.0f));
    std::memcpy(at + i, &bits, 2);
  }
  for (size_t i = 0; w.format == Format::f32 && i < bytes; i += 4) {
    const float value = random.uniform(-1.0f, 1.0f);
    std::memcpy(at + i, &value, 4);
  }
}

Case make(Format format, int n, int k, int group, bool zero, bool sparse) {
  Random random;
  Case c;
  Matrix& w = c.w = Matrix::describe(format, n, k, group, zero);
  c.bytes.resize(w.dense_bytes() + 64);
  uint8_t* first = c.bytes.data() + (64 - reinterpret_cast<uintptr_t>(c.bytes.data()) % 64) % 64;
  w.base[0] = first, w.first[1] = w.panels;
  for (int panel = 0; panel < w.panels; ++panel) {
    uint8_t* record = first + w.stride * panel;
    fill_head(w, record, random);
    fill_data(w, record + w.head_bytes(), w.data_bytes(), random);
    const auto zeros = w.format_traits().zero_byte();
    for (int b = 0; sparse && b < w.kp / kBlock; ++b)
      if (random.next() % 2)
        std::memset(record + w.head_bytes() + b * w.block_bytes(), zeros, w.block_bytes());
  }
  fill_data(w, first + w.stride * w.panels, w.plane_bytes() * w.panels, random);
  return c;
}

double fp8_value(uint8_t b) {
  const int exponent = b >> 3 & 15, mantissa = b & 7;
  const double a = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return b & 128 ? -a : a;
}

// What is stored of column k of a panel's lane, of formats of integers.
int stored(const Matrix& w, int panel, int lane, int k) {
  const FormatTraits& f = w.format_traits();
  const uint8_t* data = w.record(panel) + w.head_bytes();
  const int place = lane * 4 + k % 4, quad = k % f.step() / 4;
  const auto nibble = [&](const uint8_t* at) { return at[place] >> (k % 8 < 4 ? 0 : 4) & 15; };
  if (f.planes == Planes::both)
    return nibble(data + k / 8 * 64) << 4 | nibble(w.low_plane(panel) + k / 8 * 64);
  if (f.bits == 8) return data[k / 4 * 64 + place];
  const uint8_t* step = data + k / f.step() * f.step() * f.bytes_a_column();
  const int low = nibble(step + quad / 2 * 64);
  return f.above() ? low | (step[f.step() * 8 + place] >> f.above() * quad & ((1 << f.above()) - 1)) << 4
                   : low;
}

double weight(const Matrix& w, int panel, int lane, int k) {
  const FormatTraits& f = w.format_traits();
  const uint8_t* record = w.record(panel);
  const uint8_t* data = record + w.head_bytes();
  const auto number = [](const uint8_t* at) {
    float v;
    std::memcpy(&v, at, 4);
    return static_cast<double>(v);
  };
  const auto half = [](const uint8_t* at) {
    uint16_t v;
    std::memcpy(&v, at, 2);
    return static_cast<double>(half_value(v));
  };
  if (w.format == Format::f32) return number(data + (k * kPanel + lane) * 4);
  if (w.format == Format::bf16) {
    uint16_t v;
    std::memcpy(&v, data + (k / 2 * kPanel + lane) * 4 + k % 2 * 2, 2);
    return bf16_value(v);
  }
  if (w.format == Format::fp8)
    return fp8_value(data[k * kPanel + lane]) * number(record + (k / w.group * kPanel + lane) * 4);
  const int q = stored(w, panel, lane, k), g = k / w.group;
  if (f.planes == Planes::high) return (q * 16 + 7.5 - 128) * number(record + lane * 4);
  const uint8_t* at = record + 64;
  const auto scale = [&](int which) {
    if (!f.grouped()) return 1.0;
    if (w.has_powers()) return std::ldexp(1.0, at[g * kPanel + lane] - 127);
    const bool units = f.scales == Scales::units;
    const double unit = half(at + (((units ? k / kUnit : g) + which * w.units()) * kPanel + lane) * 2);
    const auto* multiples = reinterpret_cast<const int8_t*>(at + w.multiples_at());
    return units ? unit * multiples[(g + which * w.groups()) * kPanel + lane] : unit;
  };
  double value = f.codes ? f.codes->of[q] : q + f.offset();
  if (w.zero) value -= reinterpret_cast<const int8_t*>(at + w.groups() * 32)[g * kPanel + lane];
  return (value * scale(0) + (f.minimums ? scale(1) : 0.0)) * number(record + lane * 4);
}

// Column k of row m, as kernels read it.
double input(const Matrix& w, const Act& x, int m, int k) {
  const size_t at = static_cast<size_t>(m) * x.ld + k;
  if (x.hi) return static_cast<double>(bf16_value(x.hi[at])) + bf16_value(x.lo[at]);
  if (x.pairs) {
    const uint32_t* pairs = x.pairs + static_cast<size_t>(m) * x.ld + k / 2 * 2;
    const auto of = [&](uint32_t p) { return bf16_value(static_cast<uint16_t>(k % 2 ? p >> 16 : p)); };
    return static_cast<double>(of(pairs[0])) + of(pairs[1]);
  }
  if (x.f32) return x.f32[at];
  double sum = 0;
  for (int t = 0; t < x.terms; ++t) {
    const size_t row = static_cast<size_t>(m) * x.terms + t;
    sum += x.q[row * x.ld + k] * static_cast<double>(x.scale[row * x.groups + k / w.group]);
  }
  return sum;
}

struct Result {
  uint64_t hash = 14695981039346656037u;
  int products = 0, failures = 0;
  void add(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    hash = (hash ^ bits) * 1099511628211u;
  }
  void require(bool holds, const char* what, const Kernels& kernels, const Matrix& w, int rows) {
    if (holds) return;
    ++failures;
    std::fprintf(stderr, "%s: %s of %s, %d x %d, groups of %d%s%s, %d rows of %d terms\n", kernels.name, what,
                 w.format_traits().name, w.n, w.k, w.group, w.zero ? " with zero points" : "",
                 w.sparse ? ", sparse" : "", rows, w.act_terms);
  }
};

// Every weight, [panels * 16][k].
std::vector<double> weights_of(const Matrix& w) {
  std::vector<double> all;
  for (int n = 0; n < w.panels * kPanel; ++n)
    for (int k = 0; k < w.k; ++k) all.push_back(weight(w, n / kPanel, n % kPanel, k));
  return all;
}

// `rows` rows times the matrix `w` of these weights.
void check(const Kernels& kernels, const Matrix& w, const std::vector<double>& weights, int rows,
           Result& result) {
  Random random{static_cast<uint64_t>(rows)};
  Workspace work;
  const Matrix acts = w.format == Format::q8_high ? Matrix::describe(Format::q8_planes, w.n, w.k, 0) : w;
  const Act x = work.act(acts, rows, kernels.act_split(), w.sparse);
  std::vector<float> values(w.k), scratch(w.k);
  bool close = true;
  std::vector<double> inputs;
  for (int m = 0; m < rows; ++m) {
    for (float& v : values) v = random.uniform(-1.0f, 1.0f);
    kernels.store_row(acts, x, m, values.data(), scratch.data());
    const double most = x.q ? (x.terms > 1 ? 1e-4 : 4.1e-3) : x.f32 ? 0.0 : 1e-5;
    for (int k = 0; k < w.k; ++k) {
      inputs.push_back(input(w, x, m, k));
      close &= std::fabs(inputs.back() - values[k]) <= most;
    }
  }
  result.require(close, "inputs", kernels, w, rows);
  const int ld = w.panels * kPanel;
  std::vector<float> out(static_cast<size_t>(rows) * ld + 16), one(ld + 16);
  const auto aligned = [](std::vector<float>& v) {
    return v.data() + (64 - reinterpret_cast<uintptr_t>(v.data()) % 64) % 64 / 4;
  };
  float *to = aligned(out), *single = aligned(one);
  kernels.tile(w, 0, w.panels, x, rows, to, ld);
  close = true;
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < ld; ++n) {
      double exact = 0, size = 0;
      for (int k = 0; k < w.k; ++k) {
        const double product = weights[n * w.k + k] * inputs[m * w.k + k];
        exact += product, size += std::fabs(product);
      }
      close &= std::fabs(to[m * ld + n] - exact) <= 1e-6 * size;
      if (!x.hi && !x.pairs) result.add(to[m * ld + n]);
    }
  result.require(close, "the product", kernels, w, rows);
  bool same = true;
  for (int m = 0; m < rows; ++m) {
    kernels.tile(w, 0, w.panels, row(x, m), 1, single, ld);
    same &= std::memcmp(single, to + m * ld, ld * sizeof(float)) == 0;
  }
  result.require(same, "a row alone", kernels, w, rows);
  ++result.products;
}

void check_format(const Kernels& kernels, Format format, int group, bool zero, bool sparse, Result& result) {
  Case c = make(format, 32, 256, group, zero, sparse);
  const std::vector<double> weights = weights_of(c.w);
  Matrix w = c.w;
  if (sparse) {
    if (!to_cells(c.w, {}, c.cells, c.offsets)) return;
    w.sparse = true, w.base[0] = c.cells.data(), w.offsets = c.offsets.data();
  }
  for (const int rows : {1, 2, 3, 4, 5, 7, 12, 13, 33, 67}) {
    w.act_terms = 1;
    check(kernels, w, weights, rows, result);
    w.act_terms = 2;
    if (rows % 4 == 1 && w.quantized() && format != Format::q8_high) check(kernels, w, weights, rows, result);
  }
}

// C = A B and C += A B of expanded attention, in floats or pairs of bfloat16.
void check_wide(const Kernels& kernels, const Wide& wide, bool halves, Result& result) {
  constexpr int rows = 32, depth = 64, columns = 48;
  if (!wide.product) return;
  Random random;
  alignas(64) static float a[rows * depth], b[depth * columns], packed[depth * columns], c[rows * columns];
  alignas(64) static uint16_t a16[rows * depth];
  for (float& v : a) v = bf16_value(bf16_bits(random.uniform(-1.0f, 1.0f)));
  for (float& v : b) v = bf16_value(bf16_bits(random.uniform(-1.0f, 1.0f)));
  kernels.round_bf16(a, rows * depth, a16);
  wide.pack(b, depth, columns, packed);
  Product p = {
      halves ? static_cast<const void*>(a16) : a, depth, packed, columns, c, columns, rows, depth, false};
  wide.product(p);
  p.add = true;
  wide.product(p);
  bool close = true;
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n) {
      double exact = 0;
      for (int k = 0; k < depth; ++k) exact += 2.0 * a[m * depth + k] * b[k * columns + n];
      close &= std::fabs(c[m * columns + n] - exact) <= 1e-4;
    }
  result.require(close, "a wide product, not", kernels, Matrix::describe(Format::bf16, columns, depth, 0),
                 rows);
}

int run(const char* name) {
  const Kernels& kernels = select_kernels(name);
  Result result;
  for (int i = 0; i < static_cast<int>(std::size(kFormats)); ++i) {
    const FormatTraits& f = kFormats[i];
    for (const int group : {16, 32, 64, 128, 256}) {
      if (!fits_group(f, group, 256)) continue;
      check_format(kernels, static_cast<Format>(i), group, false, false, result);
      if (f.zeros()) check_format(kernels, static_cast<Format>(i), group, true, false, result);
      if (f.cells && group >= 32) check_format(kernels, static_cast<Format>(i), group, false, true, result);
    }
    if (f.group == 0 && !f.grouped()) check_format(kernels, static_cast<Format>(i), 0, false, false, result);
  }
  check_wide(kernels, kernels.wide, false, result);
  check_wide(kernels, kernels.wide_halves, true, result);
  std::printf("%s: %d products, %d failures, hash %016llx\n", kernels.name, result.products, result.failures,
              static_cast<unsigned long long>(result.hash));
  return result.failures;
}

}  // namespace
}  // namespace farthing

int main(int count, char** names) {
  if (count < 2) return std::puts(farthing::supported_kernels()), 0;
  int failures = 0;
  for (int i = 1; i < count; ++i) failures += farthing::run(names[i]);
  return failures != 0;
}
