// The largest logit of a head in planes: the high nibbles bound every logit, and only the panels that may
// hold the largest are read whole.
//
// A low nibble is 0 to 15. Replacing all of them by 7.5 changes a logit by the row's scale times the sum of
// activation times deviation, whose standard deviation is kDeviation |x| if the low nibbles of a row are
// spread evenly, as those of rounded weights are. Logits are bounded at kMargin times that. Rows whose low
// nibbles are not (uneven.cpp) are always read whole, and heads with many of them too. Every other row that
// is read whole also tests the assumption: a deviation beyond kDoubt has all rows of the token read whole.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "layers/backend.h"
#include "linear/head.h"

namespace farthing {
namespace {

constexpr float kDeviation = 4.6097722f;  // sqrt((16^2 - 1) / 12)
constexpr float kMargin = 6.0f, kDoubt = 5.0f;
constexpr float kNone = -3.0e38f;  // below every logit
constexpr float kAny = 3.0e38f;    // the width of a row without a bound
constexpr int kFew = 16;           // of so many panels, one with uneven rows is few

// Euclidean length of a row of activations as the kernels read it; second terms add less than 1 % to it.
float length(const Act& x, int k, int group) {
  double total = 0.0;
  for (int g = 0, at = 0; at < k; ++g, at += group) {
    int32_t sum = 0;
    for (int i = at; i < std::min(k, at + group); ++i) sum += x.q[i] * x.q[i];
    total += static_cast<double>(x.scale[g]) * x.scale[g] * sum;
  }
  return static_cast<float>(std::sqrt(total));
}

// Scratch of one call.
struct Space {
  Act x;          // [T], or a row per thread for one token
  float* norms;   // [threads][prepare_floats]
  float* tiles;   // [threads][T][kColumns]
  float* tops;    // [T][panels], a bound on the logits of each panel
  float* spread;  // [T], deviation of a logit relative to its row's scale
  Best* found;    // [threads][T]; its id is a panel at first
  bool* doubted;  // [threads][T]

  Space(Workspace& work, const Matrix& w, int tokens, int threads) {
    const size_t each = threads, T = tokens;
    x = work.act(w, std::max(tokens, threads), Split{}, false);
    norms = work.take<float>(each * prepare_floats(w));
    tiles = work.take<float>(each * T * kColumns);
    tops = work.take<float>(w.panels * T);
    spread = work.take<float>(T);
    found = work.take<Best>(each * T);
    doubted = work.take<bool>(each * T);
  }
};

// One call; a row of `act` per token.
struct Search {
  const Kernels& kernels;
  const Matrix &whole, high;
  const std::vector<uint16_t>& uneven;
  int tokens, threads;
  const Space& space;

  Best best_of(int t) const {  // over threads
    Best best;
    for (int i = 0; i < threads; ++i)
      if (space.found[i * tokens + t] > best) best = space.found[i * tokens + t];
    return best;
  }
  bool doubts(int t) const {
    bool any = false;
    for (int i = 0; i < threads; ++i) any |= space.doubted[i * tokens + t];
    return any;
  }

  int lanes(int panel) const { return std::min(kPanel, whole.n - panel * kPanel); }
  float* tops(int t) const { return space.tops + static_cast<size_t>(t) * whole.panels; }
  const float* scales(int panel) const { return reinterpret_cast<const float*>(whole.record(panel)); }

  // Bounds of chunk c, and in `best` the panel of each token's largest logit by high nibbles alone. False if
  // a logit is not finite.
  bool bound(const Act& act, int c, float* tile, Best* best) const {
    const int first = c * kChunk, count = std::min(kChunk, whole.panels - first);
    const int n = std::min(kColumns, whole.n - first * kPanel);
    float width[kColumns] = {};
    for (int i = 0; i < count; ++i) std::copy_n(scales(first + i), kPanel, width + i * kPanel);
    for (int i = 0; i < count * kPanel; ++i)
      width[i] = uneven[first + i / kPanel] >> i % kPanel & 1 ? kAny : std::fabs(width[i]);
    kernels.tile(high, first, count, act, tokens, tile, kColumns);
    bool finite = true;
    for (int t = 0; t < tokens; ++t) {
      float* row = tile + static_cast<size_t>(t) * kColumns;
      finite &= all_finite(row, n);
      std::fill(row + n, row + count * kPanel, kNone);
      Peak peak{kNone, 0};
      kernels.bounds(row, width, kMargin * space.spread[t], count, tops(t) + first, &peak);
      const Best here{peak.value, first + peak.panel};
      if (here > best[t]) best[t] = here;
    }
    return finite;
  }

  // A token's largest logit of one panel; false if the high nibbles were further off than they should be.
  bool read(const Act& x, int t, int panel, Best& best) const {
    float exact[kPanel], coarse[kPanel];
    kernels.tile(whole, panel, 1, x, 1, exact, kPanel);
    kernels.tile(high, panel, 1, x, 1, coarse, kPanel);
    bool trusted = true;
    for (int lane = 0; lane < lanes(panel); ++lane) {
      const float most = kDoubt * space.spread[t] * std::fabs(scales(panel)[lane]);
      trusted &= (uneven[panel] >> lane & 1) || std::fabs(exact[lane] - coarse[lane]) <= most;
      const Best here{exact[lane], static_cast<int64_t>(panel) * kPanel + lane};
      if (here > best) best = here;
    }
    return trusted;
  }
};

}  // namespace

void Sizes::greedy(const Matrix& head, int tokens) {
  work.reset();
  Space(work, head, tokens, threads);
}

void Backend::greedy(const Packed& head, Rows x, int tokens, const float* norm, float eps, int64_t* ids) {
  if (head.m.has_planes()) {
    if (head.uneven.empty()) head.uneven = uneven_rows(pool, head.m);
    const auto many =
        std::count_if(head.uneven.begin(), head.uneven.end(), [](uint16_t rows) { return rows; });
    if (many * kFew <= head.m.panels) return greedy_by_planes(head, x, tokens, norm, eps, ids);
  }
  std::vector<float> values(tokens), logsumexp(tokens);
  top_logits(head, x, tokens, norm, eps, 0.0f, 1, values.data(), ids, logsumexp.data());
}

void Backend::greedy_by_planes(const Packed& head, Rows x, int tokens, const float* norm, float eps,
                               int64_t* ids) {
  const Matrix& w = head.m;
  work_.reset();
  const Space space(work_, w, tokens, pool.size());
  const Search search{kernels, w, w.high_plane(), head.uneven, tokens, pool.size(), space};
  std::fill_n(space.doubted, static_cast<size_t>(pool.size()) * tokens, false);
  std::fill_n(space.found, static_cast<size_t>(pool.size()) * tokens, Best{});  // of threads that rest, too
  std::vector<Best> first(tokens);
  std::atomic<bool> finite{true};
  enum Phase { kPrepare, kMeasure, kBound, kReadBest, kReadDoubted };
  pool.run([&](Team& team) {
    const Act act = prepare(team, kPrepare, w, space.x, x, tokens, norm, eps, space.norms);
    const auto of = [&](int t) { return tokens == 1 ? act : row(act, t); };
    team.for_units(kMeasure, 1, tokens,
                   [&](int, int t) { space.spread[t] = kDeviation * length(of(t), w.kp, w.group); });
    Best* mine = space.found + team.id() * tokens;
    bool* doubted = space.doubted + team.id() * tokens;
    team.barrier();
    float* tile = space.tiles + static_cast<size_t>(team.id()) * tokens * kColumns;
    team.for_units(kBound, 1, (w.panels + kChunk - 1) / kChunk, [&](int, int c) {
      if (!search.bound(act, c, tile, mine)) finite.store(false, std::memory_order_relaxed);
    });
    team.barrier();
    team.for_units(kReadBest, 1, tokens, [&](int, int t) {
      const int64_t panel = std::min<int64_t>(search.best_of(t).id, w.panels - 1);  // none if NaN
      doubted[t] |= !search.read(of(t), t, static_cast<int>(panel), first[t]);
    });
    team.barrier();
    std::copy(first.begin(), first.end(), mine);
    team.for_units(kReadDoubted, 1, w.panels, [&](int, int panel) {
      for (int t = 0; t < tokens; ++t)
        if (search.tops(t)[panel] >= first[t].value) doubted[t] |= !search.read(of(t), t, panel, mine[t]);
    });
  });
  if (!finite) throw NotFinite("logits are NaN or infinite: the weights are broken, or the model overflows");
  std::vector<int> unsure;
  for (int t = 0; t < tokens; ++t) {
    ids[t] = search.best_of(t).id;
    if (search.doubts(t)) unsure.push_back(t);
  }
  float value, logsumexp;
  for (const int t : unsure)
    top_logits(head, {x.row(t), x.stride}, 1, norm, eps, 0.0f, 1, &value, ids + t, &logsumexp);
}

}  // namespace farthing
