// Calibration's inner loops (calibrate.h), and their part of the Python module: addresses and sizes in, the
// GIL released while computing.
#include "pack/calibrate.h"

#include <nanobind/nanobind.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "bindings/address.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace farthing {
namespace {

// make()(unit) for every unit; each thread makes a function of its own.
template <class F>
void spread(int threads, int units, F&& make) {
  std::atomic<int> next{0};
  auto work = [&] {
    auto f = make();
    for (int unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) f(unit);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < std::min(threads, units); ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

inline int panels(int n, int of) { return (n + of - 1) / of; }

constexpr int kTokens = 512;  // that are multiplied at a time
constexpr int kLines = 32;    // tokens that are packed at a time
constexpr int kSide = 48;     // columns of a product

// At most kTokens inputs of k columns, in units of 32 bits: a float, or a pair of bfloat16.
class Tokens {
 public:
  Tokens(const Kernels& kernels, int k, bool halves)
      : kernels_(kernels),
        halves_(halves && kernels.wide_halves.product),
        wide_(halves_ ? kernels.wide_halves : kernels.wide),
        k_(k),
        b_(static_cast<size_t>(units(kTokens)) * k),
        a_(b_.size()) {}

  // moments += x^T x, from the diagonal down.
  void add(const float* x, int tokens, float* moments, int threads) {
    const int lines = panels(tokens, kLines), depth = lines * kLines;
    spread(threads, lines, [&] { return [&](int line) { pack(x, tokens, line); }; });
    spread(threads, panels(k_, kSide), [&] {
      return [&](int panel) {
        const int at = panel * kSide, columns = std::min(kSide, k_ - at);
        kernels_.transpose(b_.data() + at, k_, units(depth), columns, a_.data() + at * size_t(units(depth)),
                           units(depth));
      };
    });
    spread(threads, panels(k_, kSide), [&] {
      return [&, b = std::vector<float>(static_cast<size_t>(units(depth)) * kSide)](int panel) mutable {
        multiply(panel * kSide, depth, b.data(), moments);
      };
    });
  }

 private:
  int units(int tokens) const { return halves_ ? tokens / 2 : tokens; }

  // kLines tokens, the last ones zeros, to B of a product.
  void pack(const float* x, int tokens, int line) {
    const int first = line * kLines, held = std::min(kLines, tokens - first);
    const float* from = x + static_cast<size_t>(first) * k_;
    std::vector<float> padded;
    if (held < kLines) {
      padded.resize(static_cast<size_t>(kLines) * k_);
      memcpy(padded.data(), from, sizeof(float) * held * k_);
      from = padded.data();
    }
    wide_.pack(from, kLines, k_, b_.data() + static_cast<size_t>(units(first)) * k_);
  }

  void multiply(int at, int depth, float* b, float* moments) const {
    const int columns = std::min(kSide, k_ - at), n = units(depth);
    for (int i = 0; i < n; ++i)
      memcpy(b + static_cast<size_t>(i) * columns, b_.data() + static_cast<size_t>(i) * k_ + at,
             sizeof(float) * columns);
    wide_.product({.a = a_.data() + static_cast<size_t>(at) * n,
                   .lda = halves_ ? 2 * n : n,
                   .b = b,
                   .columns = columns,
                   .c = moments + static_cast<size_t>(at) * k_ + at,
                   .ldc = k_,
                   .rows = k_ - at,
                   .depth = depth,
                   .add = true});
  }

  const Kernels& kernels_;
  const bool halves_;
  const Wide wide_;
  const int k_;
  std::vector<float> b_, a_;  // [units][k], [k][units]
};

// A strip of rows in columns, which the sweep processes side by side.
class SweepStrip {
 public:
  SweepStrip(const Kernels& kernels, const Sweep& in)
      : kernels_(kernels),
        in_(in),
        own_(static_cast<size_t>(in.k) * kSweepRows),
        errors_(own_.size()),
        values_(own_.size()),
        scales_(static_cast<size_t>(in.groups) * kSweepRows),
        lines_(own_.size()) {}

  void operator()(int strip) {
    const int first = strip * kSweepRows, rows = std::min(kSweepRows, in_.rows - first);
    read(first, rows);
    alignas(64) float squared[kSweepRows] = {};
    for (int start = 0; start < in_.k; start += kSweepBlock) block(start, squared);
    kernels_.transpose(values_.data(), kSweepRows, in_.k, kSweepRows, lines_.data(), in_.k);
    memcpy(in_.value + static_cast<size_t>(first) * in_.k, lines_.data(), sizeof(float) * rows * in_.k);
    memcpy(in_.squared + first, squared, sizeof(float) * rows);
  }

 private:
  void read(int first, int rows) {
    memcpy(lines_.data(), in_.w + static_cast<size_t>(first) * in_.k, sizeof(float) * rows * in_.k);
    std::fill(lines_.begin() + static_cast<size_t>(rows) * in_.k, lines_.end(), 0.0f);
    kernels_.transpose(lines_.data(), in_.k, kSweepRows, in_.k, own_.data(), kSweepRows);
    std::fill(scales_.begin(), scales_.end(), 1.0f);
    for (int row = 0; row < rows; ++row)
      for (int group = 0; group < in_.groups; ++group)
        scales_[group * kSweepRows + row] = in_.scales[static_cast<size_t>(first + row) * in_.groups + group];
  }

  void block(int start, float* squared) {
    const int columns = std::min(kSweepBlock, in_.k - start), size = in_.k / in_.groups;
    const float *own[kSweepBlock], *scales[kSweepBlock];
    float* values[kSweepBlock];
    alignas(64) float left[kSweepBlock * kSweepRows];
    for (int i = 0; i < columns; ++i) {
      const int64_t column = in_.order[start + i];
      own[i] = own_.data() + column * kSweepRows;
      values[i] = values_.data() + column * kSweepRows;
      scales[i] = scales_.data() + column / size * kSweepRows;
      memcpy(left + i * kSweepRows, own[i], sizeof(float) * kSweepRows);
    }
    const float* lower = in_.lower + static_cast<size_t>(start) * in_.k;
    if (start)
      kernels_.wide.product({.a = lower,
                             .lda = in_.k,
                             .b = errors_.data(),
                             .columns = kSweepRows,
                             .c = left,
                             .ldc = kSweepRows,
                             .rows = columns,
                             .depth = start,
                             .add = true});
    kernels_.sweep_block({in_.levels, columns, left, own, scales, lower + start, in_.k, in_.pivots + start,
                          in_.damping, errors_.data() + static_cast<size_t>(start) * kSweepRows, values,
                          squared});
  }

  const Kernels& kernels_;
  const Sweep& in_;
  std::vector<float> own_, errors_, values_;  // [k][kSweepRows], errors in the order of processing
  std::vector<float> scales_;                 // [groups][kSweepRows]
  std::vector<float> lines_;                  // [kSweepRows][k]
};

struct NearestCodes {
  float of[2 * kHalves];
  constexpr explicit NearestCodes(const Codes& codes) : of{} {
    for (int i = 0; i < 2 * kHalves; ++i) {
      const float x = (i - kHalves + 0.5f) / 2;
      float least = 1e9f;
      for (const int8_t code : codes.of) {
        const float distance = x < code ? code - x : x - code;
        if (distance < least) least = distance, of[i] = code;
      }
    }
  }
};
constexpr NearestCodes kNearestNl4{kNl4};

}  // namespace

void add_moments(const Kernels& kernels, const float* x, int tokens, int k, bool halves, float* moments,
                 int threads) {
  Tokens packed(kernels, k, halves);
  for (int at = 0; at < tokens; at += kTokens)
    packed.add(x + static_cast<size_t>(at) * k, std::min(kTokens, tokens - at), moments, threads);
}

void search_ranges(const Kernels& kernels, const RangeSearch& in, int threads) {
  const int k = in.groups * in.columns;
  spread(threads, panels(in.rows, kLines), [&] {
    return [&](int unit) {
      for (int row = unit * kLines; row < std::min(in.rows, (unit + 1) * kLines); ++row)
        for (int group = 0; group < in.groups; ++group) {
          const int at = group * in.columns;
          float& scale = in.scales[static_cast<size_t>(row) * in.groups + group];
          float best = scale, least = __builtin_inff();
          for (int i = 0; i < in.count; ++i) {
            const float tried = scale * in.factors[i];
            const float error = kernels.rounding_error(in.levels, in.w + static_cast<size_t>(row) * k + at,
                                                       in.energy + at, tried, in.columns);
            if (error < least) least = error, best = tried;
          }
          scale = best;
        }
    };
  });
}

void sweep(const Kernels& kernels, const Sweep& in, int threads) {
  spread(threads, panels(in.rows, kSweepRows), [&] { return SweepStrip(kernels, in); });
}

namespace {

const Kernels& best_kernels() {
  static const Kernels& best = select_kernels("auto");
  return best;
}

Levels levels(float low, float high, bool codes) { return {low, high, codes ? kNearestNl4.of : nullptr}; }

}  // namespace
}  // namespace farthing

using namespace farthing;

void bind_calibration(nb::module_& module) {
  const auto release = nb::call_guard<nb::gil_scoped_release>();
  module.def(
      "add_moments",
      [](uint64_t x, int tokens, int k, bool halves, uint64_t moments, int threads) {
        add_moments(best_kernels(), at<float>(x), tokens, k, halves, at<float>(moments), threads);
      },
      "x"_a, "tokens"_a, "k"_a, "halves"_a, "moments"_a, "threads"_a, release);
  module.def(
      "search_ranges",
      [](uint64_t w, uint64_t energy, uint64_t scales, int rows, int groups, int columns, uint64_t factors,
         int count, float low, float high, bool codes, int threads) {
        search_ranges(best_kernels(),
                      {at<float>(w), at<float>(energy), at<float>(scales), rows, groups, columns,
                       at<float>(factors), count, levels(low, high, codes)},
                      threads);
      },
      "w"_a, "energy"_a, "scales"_a, "rows"_a, "groups"_a, "columns"_a, "factors"_a, "count"_a, "low"_a,
      "high"_a, "codes"_a, "threads"_a, release);
  module.def(
      "sweep",
      [](uint64_t w, uint64_t lower, uint64_t pivots, uint64_t order, float damping, uint64_t scales,
         int rows, int k, int groups, float low, float high, bool codes, uint64_t value, uint64_t squared,
         int threads) {
        sweep(best_kernels(),
              {at<float>(w), at<float>(lower), at<float>(pivots), at<int64_t>(order), damping,
               at<float>(scales), rows, k, groups, levels(low, high, codes), at<float>(value),
               at<float>(squared)},
              threads);
      },
      "w"_a, "lower"_a, "pivots"_a, "order"_a, "damping"_a, "scales"_a, "rows"_a, "k"_a, "groups"_a, "low"_a,
      "high"_a, "codes"_a, "value"_a, "squared"_a, "threads"_a, release);
}
