// Packing and running a program of convolutions; the arithmetic is in conv.inl.
#include "vision/conv.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>

#include "threads/spin.h"

namespace farthing {
namespace {

constexpr int kSlack = 4096;               // bytes a last strip may read past a plane's end
constexpr int64_t kFewWeights = 96 << 10;  // bytes
constexpr int kPixelsPerPass = 16 << 10;   // bytes of input
constexpr int kTilesPerChunk = 4;          // at least

typedef uint8_t bytes16 __attribute__((vector_size(16)));

bytes16 load16(const uint8_t* p) {
  bytes16 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

}  // namespace

int ConvNet::plane(int groups, int height, int width, int border, int cell, int fill) {
  if (groups < 1 || height < 1 || width < 1 || border < 0 || (cell != 4 && cell != kCell))
    throw std::invalid_argument("plane of " + std::to_string(groups) + " x " + std::to_string(height) +
                                " x " + std::to_string(width) + ", border " + std::to_string(border) +
                                ", cells of " + std::to_string(cell) +
                                " bytes; expected positive sizes and cells of 4 or 16");
  Plane p{nullptr, groups, height, width, border, cell};
  const size_t bytes = p.size() * groups + kSlack;
  p.memory = backend_.arena->take(0, bytes);
  std::memset(p.memory, fill, bytes);
  planes_.push_back(std::move(p));
  return static_cast<int>(planes_.size()) - 1;
}

void ConvNet::step(int64_t products, int units, std::function<void(int)> work) {
  products_.push_back(products);
  steps_.push_back({units, std::move(work)});
}

// Thread 0 opens one step after another; the others help with the one that is open. It waits only for those
// that have units of the step in hand, not for one that has lost its core.
void ConvNet::run_steps(int first, int end) {
  open_ = kNone;
  backend_.pool.run([&](Team& team) {
    if (team.id()) return help(team);
    for (int i = first; i < end; ++i) {
      for (auto& part : parts_) part.taken.store(0, std::memory_order_relaxed);
      open_ = i;
      work(i, team);
      open_ = kNone;
      spin([&] { return helpers_ == 0; }, {});
    }
    open_ = kDone;
  });
}

void ConvNet::help(Team& team) {
  for (int last = kNone, now = kNone; now != kDone; last = now) {
    spin([&] { return open_ != last && open_ != kNone; }, {});
    ++helpers_;
    now = open_;  // after the increment: thread 0 either sees this helper or has closed the step before
    if (now >= 0) work(now, team);
    --helpers_;
  }
}

// Each thread begins with its own part of the units, always the same, so that a layer's output is in the
// cache of the thread that reads it next. Others take from the back what a late thread has left.
void ConvNet::work(int step, const Team& team) {
  const Step& s = steps_[step];
  const int64_t units = s.units, size = team.size();
  for (int other = 0; other < size; ++other) {
    const int64_t part = (team.id() + other) % size;
    const int begin = static_cast<int>(units * part / size),
              end = static_cast<int>(units * (part + 1) / size);
    std::atomic<uint64_t>& taken = parts_[part].taken;
    for (uint64_t seen = taken.load(std::memory_order_relaxed);;) {
      const int front = static_cast<int>(seen & 0xffffffffu), back = static_cast<int>(seen >> 32);
      if (front + back >= end - begin) break;
      if (!taken.compare_exchange_weak(seen, seen + (other ? uint64_t{1} << 32 : 1),
                                       std::memory_order_relaxed))
        continue;
      s.work(other ? end - back - 1 : begin + front);
      seen = taken.load(std::memory_order_relaxed);
    }
  }
}

void ConvNet::image(int out, float scale) {
  step(0, planes_[out].height, [this, out, scale](int y) {
    Plane& to = planes_[out];
    const int64_t plane = static_cast<int64_t>(to.height) * to.width;
    backend_.kernels.image_row(image_ + static_cast<int64_t>(y) * to.width, plane, to.width, scale,
                               to.first() + to.at(y, 0));
  });
}

// Non-zero blocks of pairs of groups. A block is a tap's 16 channels, or four taps of a row of 4 channels
// each.
void ConvNet::pack(Weights& w, const Plane& in, const ConvArgs& a) {
  const int groups = (a.outputs + kCell - 1) / kCell;
  const int taps = in.cell == 4 ? 4 : 1;  // of a block
  const int columns = (a.kernel + taps - 1) / taps, depth = (a.channels + in.cell - 1) / in.cell;
  const auto block = [&](int g, int c, int ky, int column, int8_t* to) {  // [4][16 outputs][4 inputs]
    bool any = false;
    for (int j = 0; j < 4; ++j)
      for (int o = 0; o < kCell; ++o)
        for (int i = 0; i < 4; ++i) {
          const int kx = taps == 4 ? 4 * column + j : column, channel = taps == 4 ? i : c * kCell + 4 * j + i,
                    row = g * kCell + o;
          const bool inside = row < a.outputs && channel < a.channels && kx < a.kernel;
          const int8_t v =
              inside ? a.weight[((static_cast<size_t>(row) * a.kernel + ky) * a.kernel + kx) * a.channels +
                                channel]
                     : int8_t{0};
          to[(j * kCell + o) * 4 + i] = v;
          any |= v != 0;
        }
    return any;
  };
  struct Span {
    size_t offsets, blocks;
  };
  std::vector<Span> spans;
  std::vector<int8_t> all;
  for (int g = 0; g < groups; g += 2) {
    ConvPair pair{{g, g + 1 < groups ? g + 1 : -1}, 0, {0, 0}, nullptr, nullptr};
    std::vector<int32_t> offsets[3];
    std::vector<int8_t> blocks[3];
    for (int c = 0; c < depth; ++c)
      for (int ky = 0; ky < a.kernel; ++ky)
        for (int column = 0; column < columns; ++column) {
          int8_t data[2 * kBlockBytes] = {};
          const bool first = block(g, c, ky, column, data),
                     second = g + 1 < groups && block(g + 1, c, ky, column, data + kBlockBytes);
          if (!first && !second) continue;
          const int which = first && second ? 0 : first ? 1 : 2;
          const int64_t at = c * in.size() + static_cast<int64_t>(ky - a.padding) * in.row() +
                             (taps * column - a.padding) * in.cell;
          offsets[which].push_back(static_cast<int32_t>(at));
          const int8_t* from = which == 2 ? data + kBlockBytes : data;
          blocks[which].insert(blocks[which].end(), from, from + (which ? 1 : 2) * kBlockBytes);
        }
    pair.both = static_cast<int>(offsets[0].size());
    pair.only[0] = static_cast<int>(offsets[1].size());
    pair.only[1] = static_cast<int>(offsets[2].size());
    spans.push_back({w.offsets.size(), all.size()});
    for (int i = 0; i < 3; ++i) {
      w.offsets.insert(w.offsets.end(), offsets[i].begin(), offsets[i].end());
      all.insert(all.end(), blocks[i].begin(), blocks[i].end());
    }
    w.pairs.push_back(pair);
  }
  w.bytes = static_cast<int64_t>(all.size());
  w.blocks = reinterpret_cast<int8_t*>(backend_.arena->take(0, all.size() + 64));
  std::memcpy(w.blocks, all.data(), all.size());
  for (size_t i = 0; i < spans.size(); ++i)
    w.pairs[i].offsets = w.offsets.data() + spans[i].offsets, w.pairs[i].weights = w.blocks + spans[i].blocks;
}

void ConvNet::lay_strips(Weights& w, const Plane& in, const Plane& shape, int stride, const Plane* wide,
                         const Plane* narrow, const Plane* residual) {
  for (int y = 0; y < shape.height; ++y)
    for (int x = 0; x < shape.width; x += kStripPixels) {
      const auto at = [&](const Plane* p) { return p ? p->at(y, x) : 0; };
      w.strips.push_back({in.at(y * stride, x * stride), at(wide), at(narrow), at(residual),
                          y * shape.width + x, std::min(kStripPixels, shape.width - x)});
    }
}

void ConvNet::conv(const ConvArgs& a) {
  const Plane& from = planes_.at(a.in);
  if ((a.stride != 1 && a.stride != 2) || a.padding > from.border || a.kernel < 1)
    throw std::invalid_argument("convolution of kernel " + std::to_string(a.kernel) + ", stride " +
                                std::to_string(a.stride) + ", padding " + std::to_string(a.padding) +
                                " on a border of " + std::to_string(from.border) +
                                "; expected stride 1 or 2 and a border as wide as the padding");
  if (a.channels > from.groups * from.cell) throw std::invalid_argument("more channels than the plane holds");
  const int groups = (a.outputs + kCell - 1) / kCell;
  Plane shape{nullptr,
              groups,
              (from.height + 2 * a.padding - a.kernel) / a.stride + 1,
              (from.width + 2 * a.padding - a.kernel) / a.stride + 1,
              0,
              kCell};
  for (int id : {a.residual, a.wide, a.narrow}) {
    if (id < 0) continue;
    const Plane& p = planes_.at(id);
    if (p.groups != groups || p.height != shape.height || p.width != shape.width || p.cell != kCell)
      throw std::invalid_argument("plane " + std::to_string(id) +
                                  " has another shape than the convolution's output");
  }
  auto w = std::make_unique<Weights>();
  pack(*w, from, a);
  const auto at = [&](int id) { return id < 0 ? nullptr : &planes_[id]; };
  lay_strips(*w, from, shape, a.stride, at(a.wide), at(a.narrow), at(a.residual));
  w->mult.assign(a.mult, a.mult + a.outputs);
  w->bias.assign(a.bias, a.bias + a.outputs);
  w->mult.resize(groups * kCell);
  w->bias.resize(groups * kCell);
  ConvLayer& l = w->layer;
  l.in = planes_[a.in].first();
  l.step = a.stride * from.cell;
  l.small_inputs = a.small_inputs;
  l.mult = w->mult.data();
  l.bias = w->bias.data();
  l.residual_scale = a.residual_scale;
  l.shift = a.shift;
  l.top = a.top;
  l.floats_row = groups * kCell;
  if (a.residual >= 0)
    l.residual = planes_[a.residual].first(), l.residual_plane = planes_[a.residual].size();
  if (a.wide >= 0) l.wide = planes_[a.wide].first(), l.wide_plane = planes_[a.wide].size();
  if (a.narrow >= 0) l.narrow = planes_[a.narrow].first(), l.narrow_plane = planes_[a.narrow].size();
  const int strips = static_cast<int>(w->strips.size());
  // Few weights: pixels stay in L1 while the weights stream past them. Many weights: the reverse.
  const int strip_bytes = from.groups * from.cell * kStripPixels * a.stride * a.stride;
  const int tiles = (strips + 1) / 2, threads = backend_.pool.size();
  const int chunks = w->bytes <= kFewWeights ? tiles * 2 * strip_bytes / kPixelsPerPass : 1;
  w->chunks = std::max(1, std::min(round_up(std::max(chunks, 1), threads), tiles / kTilesPerChunk));
  const int64_t products = w->bytes * shape.height * shape.width;
  layers_.push_back(std::move(w));
  const int pairs = static_cast<int>(layers_.back()->pairs.size()), units = layers_.back()->chunks * pairs;
  step(products, units, [this, w = layers_.back().get(), to_floats = a.to_floats, strips, pairs](int unit) {
    ConvLayer layer = w->layer;
    if (to_floats) layer.floats = out_;
    const auto first = [&](int chunk) { return std::min(strips, (strips + 1) / 2 * chunk / w->chunks * 2); };
    const int chunk = unit / pairs;
    backend_.kernels.conv(layer, w->pairs[unit % pairs], w->strips.data() + first(chunk),
                          first(chunk + 1) - first(chunk));
  });
}

void ConvNet::max_pool(int in, int out) {
  const Plane &from = planes_.at(in), &to = planes_.at(out);
  if (from.cell != kCell || to.cell != kCell || from.groups != to.groups || from.border < 1 ||
      to.height != (from.height - 1) / 2 + 1 || to.width != (from.width - 1) / 2 + 1)
    throw std::invalid_argument(
        "max_pool: expected planes of equal groups, a border of 1, and half the size");
  step(0, to.groups * to.height, [this, in, out](int unit) {
    const Plane& from = planes_[in];
    Plane& to = planes_[out];
    const int g = unit % to.groups, y = unit / to.groups;
    const uint8_t* source = from.first() + g * from.size() + from.at(2 * y - 1, -1);
    uint8_t* target = to.first() + g * to.size() + to.at(y, 0);
    const auto column = [&](int x) {
      bytes16 most = load16(source + x * kCell);
      for (int r = 1; r < 3; ++r) {
        const bytes16 v = load16(source + static_cast<int64_t>(r) * from.row() + x * kCell);
        most = most > v ? most : v;
      }
      return most;
    };
    bytes16 last = column(0);
    for (int x = 0; x < to.width; ++x) {
      const bytes16 a = column(2 * x + 1), b = column(2 * x + 2);
      bytes16 most = last > a ? last : a;
      most = most > b ? most : b;
      std::memcpy(target + x * kCell, &most, kCell);
      last = b;
    }
  });
}

void ConvNet::mean(int in, int out, float mult) {
  const Plane &from = planes_.at(in), &to = planes_.at(out);
  if (from.cell != kCell || to.cell != kCell || from.groups != to.groups || to.height != 1 || to.width != 1)
    throw std::invalid_argument("mean: expected planes of equal groups, the second of one pixel");
  step(0, to.groups, [this, in, out, mult](int g) {
    const Plane& from = planes_[in];
    Plane& to = planes_[out];
    int32_t sums[kCell] = {};
    for (int y = 0; y < from.height; ++y) {
      const uint8_t* row = from.first() + g * from.size() + from.at(y, 0);
      for (int x = 0; x < from.width; ++x)
        for (int c = 0; c < kCell; ++c) sums[c] += row[x * kCell + c];
    }
    uint8_t* target = to.first() + g * to.size() + to.at(0, 0);
    for (int c = 0; c < kCell; ++c) {
      const float v =
          std::min(static_cast<float>(sums[c]) * mult, 255.0f) + 12582912.0f;  // to the nearest even integer
      uint32_t bits;
      std::memcpy(&bits, &v, sizeof bits);
      target[c] = static_cast<uint8_t>(bits);
    }
  });
}

void ConvNet::run(const float* image, float* out) {
  image_ = image;
  out_ = out;
  run_steps(0, static_cast<int>(steps_.size()));
}

std::vector<double> ConvNet::profile(const float* image, float* out, int repeats) {
  image_ = image;
  out_ = out;
  std::vector<std::vector<double>> seconds(steps_.size());
  for (int r = 0; r < repeats; ++r)
    for (size_t i = 0; i < steps_.size(); ++i) {
      const auto start = std::chrono::steady_clock::now();
      run_steps(static_cast<int>(i), static_cast<int>(i) + 1);
      seconds[i].push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
  std::vector<double> medians;
  for (auto& s : seconds) {
    std::nth_element(s.begin(), s.begin() + repeats / 2, s.end());
    medians.push_back(s[repeats / 2]);
  }
  return medians;
}

}  // namespace farthing
