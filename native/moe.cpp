// Mixture of experts as one op: norm, route, sort by expert, gate + up + SiLU, down, weighted sum.
#include <algorithm>
#include <cstring>

#include "backend.h"

namespace farthing {
namespace {

constexpr int kRowBlock = 256;  // rows whose intermediate tile stays in cache
constexpr int kPairColumns = 2 * kPanel;
constexpr int kRouteRows = 64;
constexpr int kFetchStart = 2048;  // bytes, what the kernels ask for ahead
constexpr int kApart = 16;  // tokens up to which down projections are read expert by expert, then summed
constexpr int kApartColumns = 64;

// One expert and its rows. Rows of the routed experts follow each other; the shared expert's are the tokens.
struct Job {
  int expert, first, rows;
};

struct Plan {
  std::vector<Job> jobs;
  std::vector<int> token;     // of a routed row
  std::vector<float> weight;  // of a routed row
  std::vector<int> start;

  // Rows by ascending expert, then token: the order of every sum, whatever the batch. Absent experts have
  // none.
  void build(const Moe& w, const int32_t* ids, const float* weights, int tokens) {
    const int k = w.router.top_k, routed = static_cast<int>(w.experts.size()) - w.has_shared;
    const auto here = [&](int i) { return ids[i] >= 0 && w.experts[ids[i]].down; };
    start.assign(routed + 1, 0);
    for (int i = 0; i < tokens * k; ++i)
      if (here(i)) ++start[ids[i] + 1];
    jobs.clear();
    for (int e = 0; e < routed; ++e) {
      if (start[e + 1]) jobs.push_back({e, start[e], start[e + 1]});
      start[e + 1] += start[e];
    }
    token.resize(start[routed]);
    weight.resize(start[routed]);
    for (int i = 0; i < tokens * k; ++i)
      if (here(i)) {
        const int at = start[ids[i]]++;
        token[at] = i / k;
        weight[at] = weights[i];
      }
    if (w.has_shared) jobs.push_back({routed, 0, tokens});
  }
};

// Activations of one kind of expert: routed, or shared (which may have another format or width).
struct Kind {
  const Matrix *in, *down;
  Act x;     // [T] normed tokens
  Act rows;  // [R] the same in expert order
  Act mid;   // [R] or [T] SiLU(gate) * up
};

void copy_row(const Act& from, int i, const Act& to, int j) {
  const Act a = row(from, i), b = row(to, j);
  if (a.f32) std::memcpy(b.f32, a.f32, sizeof(float) * a.ld);
  if (a.hi) std::memcpy(b.hi, a.hi, 2 * a.ld);
  if (a.lo) std::memcpy(b.lo, a.lo, 2 * a.ld);
  if (!a.q) return;
  std::memcpy(b.q, a.q, a.ld);
  std::memcpy(b.scale, a.scale, sizeof(float) * a.groups);
  std::memcpy(b.comp, a.comp, sizeof(int32_t) * a.groups);
  if (a.block_comp) std::memcpy(b.block_comp, a.block_comp, sizeof(int32_t) * a.blocks);
}

// The beginning of a panel that will be read next but does not follow the one being read.
void fetch_start(const Matrix& w, int panel) {
  const uint8_t* p = w.record(panel);
  for (int at = 0; at < kFetchStart; at += 64) __builtin_prefetch(p + at, 0, 2);
}

int unit_columns(const Matrix& down) { return std::max(down.quantized() ? down.group : 64, 64); }

// Columns [at, at + columns) of the intermediate of `rows` rows.
void gate_up(const Kernels& k, const Matrix& in, const Matrix& down, const Act& x, const Act& mid, int rows,
             int at, float* tile, float* hidden) {
  const int columns = std::min(unit_columns(down), down.k - at), width = unit_columns(down);
  for (int m = 0; m < rows; m += kRowBlock) {
    const int some = std::min(kRowBlock, rows - m);
    for (int c = 0; c < columns; c += kPanel) {
      k.tile(in, (at + c) / kPanel * 2, 2, row(x, m), some, tile, kPairColumns);
      k.silu_mul(tile, some, kPairColumns, hidden + c, width);
    }
    for (int i = 0; i < some; ++i)
      k.store_act(down, mid, m + i, at, hidden + static_cast<size_t>(i) * width, columns);
  }
}

}  // namespace

void Backend::route(const Moe& w, Rows n, int tokens, int64_t* ids, float* weights) {
  const int experts = w.router.experts, k = w.router.top_k;
  std::vector<float> scores(static_cast<size_t>(tokens) * experts);
  linear(*w.gate, n, tokens, nullptr, 0.0f, {nullptr, 0}, {scores.data(), experts});
  std::vector<int32_t> chosen(k);
  for (int t = 0; t < tokens; ++t) {
    choose_experts(w.router, scores.data() + static_cast<size_t>(t) * experts, chosen.data(),
                   weights + static_cast<size_t>(t) * k);
    std::copy(chosen.begin(), chosen.end(), ids + static_cast<size_t>(t) * k);
  }
}

void Backend::moe(const Moe& w, Rows x, int tokens, const float* norm, float eps, int64_t* counts, Rows out,
                  const int64_t* chosen, const float* chosen_weights, bool residual) {
  const int T = tokens, D = w.hidden, k = w.gate ? w.router.top_k : 0, threads = pool.size();
  const int copies = T == 1 ? threads : T, most = T * k;
  const int E = w.gate ? w.router.experts : 0, score_ld = round_up(E, kPanel);
  const auto split = [&](const Matrix&, int rows) { return kernels.split_act && rows >= kernels.split_rows; };
  work_.reset();
  bool sparse = false;
  for (const Mlp& e : w.experts) sparse |= e.down && (e.gate_up->m.sparse || e.down->m.sparse);
  const int ld = act_stride(D);
  float* normed = work_.take<float>(static_cast<size_t>(copies) * ld);
  float* scores = work_.take<float>(static_cast<size_t>(copies) * score_ld);
  int32_t* ids = work_.take<int32_t>(static_cast<size_t>(copies) * std::max(k, 1));
  float* weights = work_.take<float>(static_cast<size_t>(copies) * std::max(k, 1));
  Kind kinds[2];
  for (int i = 0; i < 2; ++i) {
    if (i == 0 ? k == 0 : !w.has_shared) continue;
    const Mlp& e =
        i == 0 ? *std::find_if(w.experts.begin(), w.experts.end(), [](const Mlp& m) { return !!m.down; })
               : w.experts.back();
    kinds[i].in = &e.gate_up->m;
    kinds[i].down = &e.down->m;
    kinds[i].x = work_.act(*kinds[i].in, copies, split(*kinds[i].in, T), sparse);
    kinds[i].rows =
        i == 0 && T > 1 ? work_.act(*kinds[i].in, most, split(*kinds[i].in, T), sparse) : kinds[i].x;
    kinds[i].mid = work_.act(*kinds[i].down, i == 0 ? most : T, split(*kinds[i].down, T), sparse);
  }
  Act gate_x;
  gate_x.ld = ld;
  gate_x.f32 = normed;
  int unit = 64, steps = 0;
  for (const Kind& kind : kinds)
    if (kind.x.ld)
      unit = std::max(unit, unit_columns(*kind.down)),
      steps = std::max(steps, (kind.down->k + unit_columns(*kind.down) - 1) / unit_columns(*kind.down));
  const int out_columns = T <= 64 ? 128 : 32;
  const size_t tile_size =
      static_cast<size_t>(std::max(kRowBlock * kPairColumns, std::max(most, T) * out_columns));
  float* tiles = work_.take<float>(threads * tile_size);
  float* hiddens = work_.take<float>(static_cast<size_t>(threads) * kRowBlock * unit);
  float* sums = work_.take<float>(static_cast<size_t>(threads) * T * out_columns);
  const int apart_ld = act_stride(D);
  float* apart = T <= kApart ? work_.take<float>(static_cast<size_t>(most + T) * apart_ld) : nullptr;
  std::vector<Plan> plans(T == 1 ? threads : 1);

  pool.run([&](Team& team) {
    const int me = team.id();
    const auto normalize = [&](int t, int to) {
      float* n = normed + static_cast<size_t>(to) * ld;
      kernels.rms_norm(x.row(t), norm, eps, D, n);
      std::fill(n + D, n + ld, 0.0f);
      for (const Kind& kind : kinds)
        if (kind.x.ld) kernels.store_act(*kind.in, kind.x, to, 0, n, D);
    };
    Plan& plan = plans[T == 1 ? me : 0];
    if (T == 1) {
      normalize(0, me);
    } else {
      team.for_units(0, 1, T, [&](int, int t) { normalize(t, t); });
      team.barrier();
    }
    if (chosen) {               // by the caller; a negative id is no choice
      if (T == 1 || me == 0) {  // who builds a plan
        const size_t at = T == 1 ? static_cast<size_t>(me) * k : 0;
        for (int i = 0; i < most; ++i) ids[at + i] = static_cast<int32_t>(chosen[i]);
        std::copy_n(chosen_weights, most, weights + at);
      }
    } else if (k) {
      const int blocks = (T + kRouteRows - 1) / kRouteRows;
      team.for_units(1, blocks, w.gate->m.panels, [&](int b, int panel) {
        const int t0 = b * kRouteRows;
        kernels.tile(w.gate->m, panel, 1, row(gate_x, T == 1 ? me : t0), std::min(kRouteRows, T - t0),
                     scores + static_cast<size_t>(t0) * score_ld + panel * kPanel, score_ld);
      });
      team.barrier();
      const auto choose = [&](int t, int to) {
        float mine[1024];
        std::copy_n(scores + static_cast<size_t>(t) * score_ld, E, mine);
        choose_experts(w.router, mine, ids + static_cast<size_t>(to) * k,
                       weights + static_cast<size_t>(to) * k);
      };
      if (T == 1) choose(0, me);
      else team.for_units(2, 1, T, [&](int, int t) { choose(t, t); });
      if (T > 1) team.barrier();
    }
    if (T == 1) {
      plan.build(w, ids + static_cast<size_t>(me) * k, weights + static_cast<size_t>(me) * k, 1);
    } else {
      if (me == 0) plan.build(w, ids, weights, T);
      team.barrier();
      team.for_units(3, 1, static_cast<int>(plan.token.size()),
                     [&](int, int r) { copy_row(kinds[0].x, plan.token[r], kinds[0].rows, r); });
      team.barrier();
    }
    const int jobs = static_cast<int>(plan.jobs.size()),
              routed = static_cast<int>(w.experts.size()) - w.has_shared;
    team.for_units(4, jobs, steps, [&](int j, int step) {
      const Job& job = plan.jobs[j];
      const Mlp& e = w.experts[job.expert];
      const Kind& kind = kinds[job.expert == routed];
      const int at = step * unit_columns(e.down->m);
      if (at >= e.down->m.k) return;
      if (step + 1 == steps && j + 1 < jobs) fetch_start(w.experts[plan.jobs[j + 1].expert].gate_up->m, 0);
      gate_up(kernels, e.gate_up->m, e.down->m, T == 1 ? row(kind.x, me) : row(kind.rows, job.first),
              row(kind.mid, job.first), job.rows, at, tiles + me * tile_size,
              hiddens + static_cast<size_t>(me) * kRowBlock * unit);
    });
    team.barrier();
    if (T <= kApart) {
      // Each expert's weights are one stream; what it gives waits for the sum, whose order is the same as
      // below.
      team.for_units(5, jobs, (D + kApartColumns - 1) / kApartColumns, [&](int j, int u) {
        const Job& job = plan.jobs[j];
        const bool shared = job.expert == routed;
        const Matrix& down = w.experts[job.expert].down->m;
        const int n0 = u * kApartColumns, columns = std::min(kApartColumns, D - n0);
        if (n0 + columns == D && j + 1 < jobs) fetch_start(w.experts[plan.jobs[j + 1].expert].down->m, 0);
        kernels.tile(down, n0 / kPanel, (columns + kPanel - 1) / kPanel, row(kinds[shared].mid, job.first),
                     job.rows, apart + static_cast<size_t>(job.first + (shared ? most : 0)) * apart_ld + n0,
                     apart_ld);
      });
      team.barrier();
    }
    team.for_units(6, 1, (D + out_columns - 1) / out_columns, [&](int, int u) {
      const int n0 = u * out_columns, columns = std::min(out_columns, D - n0),
                padded = round_up(columns, kPanel);
      float *y = sums + static_cast<size_t>(me) * T * out_columns, *tile = tiles + me * tile_size;
      std::fill_n(y, static_cast<size_t>(T) * out_columns, 0.0f);
      for (int j = 0; j < jobs; ++j) {
        const Job& job = plan.jobs[j];
        const bool shared = job.expert == routed;
        const float* from = tile;
        int ld = out_columns;
        if (T <= kApart) {
          from = apart + static_cast<size_t>(job.first + (shared ? most : 0)) * apart_ld + n0, ld = apart_ld;
        } else {
          if (j + 1 < jobs) fetch_start(w.experts[plan.jobs[j + 1].expert].down->m, n0 / kPanel);
          kernels.tile(w.experts[job.expert].down->m, n0 / kPanel, padded / kPanel,
                       row(kinds[shared].mid, job.first), job.rows, tile, out_columns);
        }
        for (int m = 0; m < job.rows; ++m)
          kernels.axpy(y + static_cast<size_t>(shared ? m : plan.token[job.first + m]) * out_columns,
                       from + static_cast<size_t>(m) * ld, shared ? 1.0f : plan.weight[job.first + m],
                       padded);
      }
      for (int t = 0; t < T; ++t) {
        const float* from = x.row(t) + n0;
        float* to = out.row(t) + n0;
        const float* sum = y + static_cast<size_t>(t) * out_columns;
        for (int i = 0; i < columns; ++i) to[i] = residual ? from[i] + sum[i] : sum[i];
      }
    });
  });
  if (counts)  // absent experts are counted too
    for (int i = 0; i < most; ++i)
      if (ids[i] >= 0) ++counts[ids[i]];
}

}  // namespace farthing
