// Mixture of experts as one op: norm, route, sort by expert, gate + up + activation, down, weighted sum.
//
// Legend: T tokens, D hidden size, E routed experts, k experts per token, R = T k routed rows, I expert
// width.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "layers/backend.h"

namespace farthing {
namespace {

constexpr int kRowBlock = 256;  // rows whose intermediate tile stays in cache
constexpr int kPairColumns = 2 * kPanel;
constexpr int kRouteRows = 64;
constexpr int kApart = 16;  // tokens up to which down projections are read expert by expert, then summed
constexpr int kApartColumns = 64;
constexpr int kNarrow = 64;  // tokens up to which a unit of the sum has kNarrowColumns
constexpr int kNarrowColumns = 128;
constexpr int kMostColumns = 256;  // of a unit of the sum with more tokens …
constexpr int kUnitsEach = 4;      // … of which each thread gets as many
constexpr int kGateColumns = 256;  // of gate and up that rows in blocks meet at once

// One part of an expert and its rows. Rows of the routed experts follow each other; the shared expert's are
// the tokens.
struct Job {
  int expert, part, first, rows;
  bool shared;
  int sum;  // that its outputs are added to

  Job part_of(int at, int count) const {  // `count` of its rows
    Job j = *this;
    j.first += at, j.rows = count;
    return j;
  }
};

struct Plan {
  std::vector<Job> jobs;
  std::vector<int> token;     // of a routed row
  std::vector<int> expert;    // of a routed row
  std::vector<float> weight;  // of a routed row
  std::vector<int> start;
  std::vector<float> identity;  // of a token: the weight of the identities it chose; empty without any

  // Rows by ascending expert, then token: the order of every sum, whatever the batch. Absent experts have
  // none. The two halves of the routed experts are summed separately, and so are the parts of an expert: two
  // ranks that share experts or columns then add the same numbers in the same order as one.
  void build(const Moe& w, const int32_t* ids, const float* weights, int tokens) {
    const int k = w.router.top_k, routed = w.routed();
    const auto here = [&](int i) { return ids[i] >= 0 && w.expert(ids[i]).down; };
    start.assign(routed + 1, 0);
    for (int i = 0; i < tokens * k; ++i)
      if (here(i)) ++start[ids[i] + 1];
    jobs.clear();
    for (int e = 0; e < routed; ++e) {
      for (int p = 0; p < w.parts && start[e + 1]; ++p)
        jobs.push_back({e, p, start[e], start[e + 1], false, w.halves() * p + (2 * e >= w.weighted())});
      start[e + 1] += start[e];
    }
    token.resize(start[routed]);
    expert.resize(start[routed]);
    weight.resize(start[routed]);
    for (int i = 0; i < tokens * k; ++i)
      if (here(i)) {
        const int at = start[ids[i]]++;
        token[at] = i / k;
        expert[at] = ids[i];
        weight[at] = weights[i];
      }
    const int same = w.router.identities;
    identity.assign(same ? tokens : 0, 0.0f);
    for (int i = 0; same && i < tokens * k; ++i)
      if (ids[i] >= w.router.experts - same) identity[i / k] += weights[i];
    for (int p = 0; p < w.parts && w.has_shared; ++p)
      jobs.push_back({routed, p, 0, tokens, true, w.halves() * p});
  }
};

// Activations of one kind of expert: routed, or shared (which may have another format or width).
struct Kind {
  const Matrix* in;  // of the first of these experts
  Act x;             // [T] normed tokens
  Act rows;          // [R] the same in expert order
  Act mid;           // [R] or [T] activation(gate) * up
};

void copy_row(const Act& from, int i, const Act& to, int j) {
  const Act a = row(from, i), b = row(to, j);
  const size_t terms = a.terms;
  const auto columns = [&](auto* x, auto* y, size_t rows = 1) {
    for (int n = 0; x && n < std::max(a.blocks, 1); ++n)
      std::memcpy(y + n * b.block, x + n * a.block, sizeof *x * a.ld * rows);
  };
  columns(a.f32, b.f32);
  columns(a.hi, b.hi);
  columns(a.lo, b.lo);
  columns(a.pairs, b.pairs);
  columns(a.q, b.q, terms);
  columns(a.rest, b.rest);
  columns(a.flipped, b.flipped, terms);
  if (a.q) std::memcpy(b.scale, a.scale, sizeof(float) * a.groups * terms);
  if (a.q) std::memcpy(b.comp, a.comp, sizeof(int32_t) * a.groups * terms);
  if (a.cells) std::memcpy(b.cells, a.cells, sizeof(CellInput) * a.cell_count * terms);
}

// The beginning of a panel that will be read next but does not follow the one being read.
void fetch_start(const Matrix& w, int panel) {
  const uint8_t* p = w.record(panel);
  const int bytes = prefetch_distances.of(traits(w.format).nibbles());
  for (int at = 0; at < bytes; at += 64) __builtin_prefetch(p + at, 0, 2);
}

// Columns of a unit of the sum. Every unit reads the intermediates of all experts, so there are only as many
// units as the threads need for equal shares.
int sum_columns(int hidden, int tokens, int threads) {
  if (tokens <= kNarrow) return kNarrowColumns;
  int columns = kPairColumns;
  while (columns < kMostColumns && hidden >= 2 * columns * kUnitsEach * threads) columns *= 2;
  return columns;
}

// Whether a row in the form that one matrix reads is also in that of the other.
bool read_alike(const Matrix& a, const Matrix& b) {
  return a.format == b.format && a.group == b.group && a.act_top == b.act_top && a.act_clip == b.act_clip &&
         a.act_scale == b.act_scale && !a.order && !b.order;
}

// Columns of an intermediate that are computed at once: those that share a scale.
int unit_columns(const Matrix& down, const Act& mid) {
  return mid.blocks ? mid.ld : std::max(down.quantized() ? down.group : 64, 64);
}

// Columns [at, at + columns) of the intermediate of `rows` rows.
void gate_up(const Kernels& k, const Gate& gate, const Mlp& e, const Act& x, const Act& mid, int rows, int at,
             float* tile, float* hidden) {
  const Matrix &in = e.gate_up->m, &down = e.down->m;
  const float* bias = e.in_bias.empty() ? nullptr : e.in_bias.data();
  const int width = unit_columns(down, mid), columns = std::min(width, down.k - at),
            ld = x.blocks ? kGateColumns : kPairColumns;
  for (int m = 0; m < rows; m += kRowBlock) {
    const int some = std::min(kRowBlock, rows - m);
    for (int c = 0; c < columns; c += kPanel) {
      const int beside = c % (ld / 2) * 2;  // of the tile's columns
      if (beside == 0)
        k.tile(in, (at + c) / kPanel * 2, std::min(ld / kPanel, (columns - c + kPanel - 1) / kPanel * 2),
               row(x, m), some, tile, ld);
      k.gate_mul(gate, tile + beside, bias ? bias + 2 * (at + c) : nullptr, some, ld, hidden + c, width);
    }
    for (int i = 0; i < some; ++i)
      k.store_act(down, mid, m + i, at, hidden + static_cast<size_t>(i) * width, columns);
  }
}

// Scratch of one call. With one token each thread has its own copy of shared results, without a barrier.
struct Space {
  int copies, most, token_rows, experts, score_ld, ld, unit = 64, steps = 0, out_columns, sum_count;
  bool sparse = false;
  bool own_rows = false;             // the routed experts read their input in orders or formats of their own
  float *normed, *scores, *weights;  // [copies][ld], [copies][score_ld], [copies][k]
  int32_t* ids;                      // [copies][k]
  Kind kinds[kMostParts][2];         // routed, shared
  Act gate_x;                        // normed, as the router reads it
  float *tiles, *hiddens, *sums;     // [threads] each
  float* apart = nullptr;            // [parts][R + T][ld]: down projections before they are summed
  float* turned = nullptr;           // [threads][ld] if a matrix has an order
  size_t tile_size, hidden_size, sum_size;

  // rows: of the routed experts, T k unless other ranks have some of them.
  Space(Workspace& work, const Kernels& kernels, const Moe& w, int T, int rows, int threads,
        int tile_tokens) {
    const int k = w.gate ? w.router.top_k : 0;
    copies = T == 1 ? threads : T;
    most = rows;
    token_rows = most + T;
    experts = w.gate ? w.router.experts : 0;
    score_ld = round_up(experts + w.shared_gate, kPanel);
    ld = act_stride(w.hidden);
    out_columns = sum_columns(w.hidden, T, threads);
    bool ordered = w.has_shared && w.expert(w.routed()).gate_up->m.order;
    for (const Mlp& e : w.experts) sparse |= e.down && (e.gate_up->m.sparse || e.down->m.sparse);
    for (int e = 0; e < w.routed(); ++e) {
      const Mlp& mlp = w.expert(e);
      if (!mlp.down) continue;
      ordered |= mlp.gate_up->m.order != nullptr;
      own_rows |= !read_alike(mlp.gate_up->m, w.first(0)->gate_up->m);
    }
    if (ordered) turned = work.take<float>(static_cast<size_t>(threads) * ld);
    normed = work.take<float>(static_cast<size_t>(copies) * ld);
    scores = work.take<float>(static_cast<size_t>(copies) * score_ld);
    ids = work.take<int32_t>(static_cast<size_t>(copies) * std::max(k, 1));
    weights = work.take<float>(static_cast<size_t>(copies) * std::max(k, 1));
    gate_x.ld = ld;
    gate_x.f32 = normed;
    // All experts of a step take one form, however many tokens choose each.
    const bool blocks = takes_blocks(kernels, T, tile_tokens),
               many = blocks && T * k >= std::min(kTileExpertRows, tile_tokens) * w.routed();
    for (int p = 0; p < w.parts; ++p) {
      if (k) add(work, kernels, w, {0, w.routed()}, p, 0, T, many);
      if (w.has_shared) add(work, kernels, w, {w.routed(), w.routed() + 1}, p, 1, T, blocks);
    }
    tile_size = static_cast<size_t>(kRowBlock) * (blocks ? std::max(out_columns, kGateColumns) : out_columns);
    hidden_size = static_cast<size_t>(kRowBlock) * unit;
    sum_size = static_cast<size_t>(T) * out_columns;
    sum_count = w.parts * w.halves();
    tiles = work.take<float>(threads * tile_size);
    hiddens = work.take<float>(threads * hidden_size);
    sums = work.take<float>(static_cast<size_t>(threads) * sum_count * sum_size);
    if (T <= kApart) apart = work.take<float>(static_cast<size_t>(w.parts) * token_rows * ld);
  }

 private:
  // Parts of an expert read the same input.
  void add(Workspace& work, const Kernels& kernels, const Moe& w, std::pair<int, int> experts, int part,
           int i, int T, bool blocks) {
    const Split split = kernels.act_split();
    std::vector<const Matrix*> ins, downs;  // one of each form
    const auto note = [](std::vector<const Matrix*>& forms, const Matrix& m) {
      for (const Matrix* f : forms)
        if (f->format == m.format && f->group == m.group && f->fits_blocks() == m.fits_blocks()) return;
      forms.push_back(&m);
    };
    for (int e = experts.first; e < experts.second; ++e) {
      const Mlp& mlp = w.expert(e, part);
      if (!mlp.down) continue;
      note(ins, mlp.gate_up->m);
      note(downs, mlp.down->m);
    }
    Kind& kind = kinds[part][i];
    kind.in = ins[0];
    kind.x = part ? kinds[0][i].x : work.act(ins, copies, split, sparse, blocks);
    kind.rows = part                            ? kinds[0][i].rows
                : i == 0 && (T > 1 || own_rows) ? work.act(ins, most, split, sparse, blocks)
                                                : kind.x;
    kind.mid = work.act(downs, i == 0 ? most : T, split, sparse, blocks);
    for (const Matrix* down : downs) {
      const int columns = unit_columns(*down, kind.mid);
      unit = std::max(unit, columns);
      steps = std::max(steps, (down->k + columns - 1) / columns);
    }
  }
};

// One call, phase by phase.
class Experts {
  enum Phase { kNormalize, kScore, kRoute, kGather, kGateAndUp, kDown, kCombine };

 public:
  Experts(const Kernels& kernels, const Moe& w, const MoeArgs& in, const Space& space, int threads)
      : kernels_(kernels),
        w_(w),
        in_(in),
        s_(space),
        k_(w.gate ? w.router.top_k : 0),
        plans_(in.tokens == 1 ? threads : 1) {}

  void run(Team& team) {
    normalize(team);
    if (w_.gate && (!in_.chosen_weights || w_.shared_gate)) score(team);
    if (in_.chosen_weights) take_choice(team);
    else if (k_) route(team);
    Plan& plan = plans_[in_.tokens == 1 ? team.id() : 0];
    gather(team, plan);
    gate_and_up(team, plan);
    team.barrier();
    if (s_.apart) {
      down(team, plan);
      team.barrier();
    }
    combine(team, plan);
  }

  void count() const {  // absent experts too
    for (int i = 0; i < s_.most; ++i)
      if (s_.ids[i] >= 0) ++in_.counts[s_.ids[i]];
  }

 private:
  bool alone() const { return in_.tokens == 1; }

  void normalize(Team& team) const {
    const auto one = [&](int t, int to) {
      float* n = s_.normed + static_cast<size_t>(to) * s_.ld;
      kernels_.rms_norm(in_.x.row(t), in_.norm, in_.eps, w_.hidden, n);
      std::fill(n + w_.hidden, n + s_.ld, 0.0f);
      for (const Kind& kind : s_.kinds[0])
        if (kind.x.ld && !(s_.own_rows && &kind == s_.kinds[0]))
          kernels_.store_row(*kind.in, kind.x, to, n, turned(team));
    };
    if (alone()) return one(0, team.id());
    team.for_units(kNormalize, 1, in_.tokens, [&](int, int t) { one(t, t); });
    team.barrier();
  }

  // The caller's choice, where a plan is built from it. An id without an expert is no choice.
  void take_choice(Team& team) const {
    if (!alone() && team.id() != 0) return;
    const size_t at = alone() ? static_cast<size_t>(team.id()) * k_ : 0;
    for (int i = 0; i < s_.most; ++i) {
      const bool exists = in_.chosen[i] >= 0 && in_.chosen[i] < w_.routed();
      s_.ids[at + i] = exists ? static_cast<int32_t>(in_.chosen[i]) : -1;
    }
    std::copy_n(in_.chosen_weights, s_.most, s_.weights + at);
  }

  // The product with the router, and with the shared expert's gate.
  void score(Team& team) const {
    const int T = in_.tokens, blocks = (T + kRouteRows - 1) / kRouteRows, me = team.id();
    const Matrix& gate = w_.gate->m;
    team.for_units(kScore, blocks, (gate.panels + 1) / 2, [&](int b, int pair) {
      const int t0 = b * kRouteRows, panel = 2 * pair;
      kernels_.tile(gate, panel, std::min(2, gate.panels - panel), row(s_.gate_x, alone() ? me : t0),
                    std::min(kRouteRows, T - t0),
                    s_.scores + static_cast<size_t>(t0) * s_.score_ld + panel * kPanel, s_.score_ld);
    });
    team.barrier();
  }

  void route(Team& team) const {
    const int T = in_.tokens, me = team.id();
    const auto choose = [&](int t, int to) {
      float scores[kMostExperts];
      std::copy_n(s_.scores + static_cast<size_t>(t) * s_.score_ld, s_.experts, scores);
      int32_t* ids = s_.ids + static_cast<size_t>(to) * k_;
      float* weights = s_.weights + static_cast<size_t>(to) * k_;
      if (in_.chosen) return weigh_experts(w_.router, scores, in_.chosen + int64_t{t} * k_, ids, weights);
      choose_experts(w_.router, scores, ids, weights);
    };
    if (alone()) return choose(0, me);
    team.for_units(kRoute, 1, T, [&](int, int t) { choose(t, t); });
    team.barrier();
  }

  // Sorts the rows by expert and copies their activations in that order, or each as its expert reads it.
  void gather(Team& team, Plan& plan) const {
    if (alone()) {
      const size_t at = static_cast<size_t>(team.id()) * k_;
      plan.build(w_, s_.ids + at, s_.weights + at, 1);
      if (!s_.own_rows) return;
    } else {
      if (team.id() == 0) plan.build(w_, s_.ids, s_.weights, in_.tokens);
      team.barrier();
    }
    const Kind& kind = s_.kinds[0][0];
    team.for_units(kGather, 1, static_cast<int>(plan.token.size()), [&](int, int r) {
      if (!s_.own_rows) return copy_row(kind.x, plan.token[r], kind.rows, r);
      const size_t token = alone() ? team.id() : plan.token[r];
      kernels_.store_row(w_.expert(plan.expert[r]).gate_up->m, kind.rows, r, s_.normed + token * s_.ld,
                         turned(team));
    });
    team.barrier();
  }

  void gate_and_up(Team& team, const Plan& plan) const {
    const int jobs = static_cast<int>(plan.jobs.size()), me = team.id();
    team.for_units(kGateAndUp, jobs, s_.steps, [&](int j, int step) {
      const Job& job = plan.jobs[j];
      const Mlp& e = mlp(job);
      const Kind& kind = s_.kinds[job.part][job.shared];
      const int at = step * unit_columns(e.down->m, kind.mid);
      if (at >= e.down->m.k) return;
      if (step + 1 == s_.steps && j + 1 < jobs) fetch_start(mlp(plan.jobs[j + 1]).gate_up->m, 0);
      const bool own = alone() && (job.shared || !s_.own_rows);
      const int some = own ? 1 : job.rows;  // an expert that a token alone has twice reads its one row twice
      for (int r = 0; r < job.rows; r += some)
        gate_up(kernels_, w_.activation, e, own ? row(kind.x, me) : row(kind.rows, job.first),
                row(kind.mid, job.first + r), some, at, s_.tiles + me * s_.tile_size,
                s_.hiddens + me * s_.hidden_size);
    });
  }

  // Few tokens: each expert's weights are one stream; outputs wait in `apart` and are summed in the same
  // order.
  void down(Team& team, const Plan& plan) const {
    const int jobs = static_cast<int>(plan.jobs.size()), D = w_.hidden;
    team.for_units(kDown, jobs, (D + kApartColumns - 1) / kApartColumns, [&](int j, int u) {
      const Job& job = plan.jobs[j];
      const int n0 = u * kApartColumns, columns = std::min(kApartColumns, D - n0);
      if (n0 + columns == D && j + 1 < jobs) fetch_start(mlp(plan.jobs[j + 1]).down->m, 0);
      kernels_.tile(mlp(job).down->m, n0 / kPanel, (columns + kPanel - 1) / kPanel, mid(job), job.rows,
                    apart(job) + n0, s_.ld);
    });
  }

  void combine(Team& team, const Plan& plan) const {
    const int D = w_.hidden, T = in_.tokens, jobs = static_cast<int>(plan.jobs.size()), wide = s_.out_columns;
    team.for_units(kCombine, 1, (D + wide - 1) / wide, [&](int, int u) {
      const int n0 = u * wide, columns = std::min(wide, D - n0), panels = (columns + kPanel - 1) / kPanel;
      float *sums = s_.sums + team.id() * s_.sum_count * s_.sum_size,
            *tile = s_.tiles + team.id() * s_.tile_size;
      std::fill_n(sums, s_.sum_count * s_.sum_size, 0.0f);
      for (int j = 0; j < jobs; ++j) {
        const Job& job = plan.jobs[j];
        float* sum = sums + job.sum * s_.sum_size;
        if (s_.apart) {
          add_rows(plan, job, apart(job) + n0, s_.ld, n0, panels, sum);
          continue;
        }
        if (j + 1 < jobs) fetch_start(mlp(plan.jobs[j + 1]).down->m, n0 / kPanel);
        for (int m = 0; m < job.rows; m += kRowBlock) {
          const Job some = job.part_of(m, std::min(kRowBlock, job.rows - m));
          kernels_.tile(mlp(job).down->m, n0 / kPanel, panels, mid(some), some.rows, tile, wide);
          add_rows(plan, some, tile, wide, n0, panels, sum);
        }
      }
      for (size_t t = 0; t < plan.identity.size(); ++t)
        kernels_.axpy(sums + t * wide, s_.normed + (alone() ? team.id() : t) * s_.ld + n0, plan.identity[t],
                      panels * kPanel);
      for (int i = 1; i < s_.sum_count; i *= 2)  // (0 + 1) + (2 + 3)
        for (int a = 0; a + i < s_.sum_count; a += 2 * i)
          kernels_.add(sums + a * s_.sum_size, sums + (a + i) * s_.sum_size, static_cast<int>(s_.sum_size));
      for (int t = 0; t < T; ++t) {
        const float *x = in_.x.row(t) + n0, *y = sums + static_cast<size_t>(t) * wide;
        float* to = in_.out.row(t) + n0;
        for (int i = 0; i < columns; ++i) to[i] = in_.residual ? x[i] + y[i] : y[i];
      }
    });
  }

  float shared_weight(int t) const {
    return w_.shared_gate
               ? 1.0f / (1.0f + std::exp(-s_.scores[static_cast<size_t>(t) * s_.score_ld + s_.experts]))
               : 1.0f;
  }

  // The outputs of one expert from column n0 on, weighted, into the sums of their tokens.
  void add_rows(const Plan& plan, const Job& job, const float* from, int ld, int n0, int panels,
                float* sum) const {
    const std::vector<float>& bias = mlp(job).out_bias;
    for (int m = 0; m < job.rows; ++m) {
      const int token = job.shared ? job.first + m : plan.token[job.first + m];
      const float weight = job.shared ? shared_weight(token) : plan.weight[job.first + m];
      float* to = sum + static_cast<size_t>(token) * s_.out_columns;
      kernels_.axpy(to, from + static_cast<size_t>(m) * ld, weight, panels * kPanel);
      if (!bias.empty()) kernels_.axpy(to, bias.data() + n0, weight, panels * kPanel);
    }
  }

  float* turned(const Team& team) const { return s_.turned + (s_.turned ? team.id() * size_t(s_.ld) : 0); }
  const Mlp& mlp(const Job& job) const { return w_.expert(job.expert, job.part); }
  Act mid(const Job& job) const { return row(s_.kinds[job.part][job.shared].mid, job.first); }
  float* apart(const Job& job) const {
    const int at = job.part * s_.token_rows + job.first + (job.shared ? s_.most : 0);
    return s_.apart + static_cast<size_t>(at) * s_.ld;
  }

  const Kernels& kernels_;
  const Moe& w_;
  const MoeArgs& in_;
  const Space& s_;
  const int k_;
  std::vector<Plan> plans_;
};

int routed_rows(const Moe& w, int tokens) { return w.gate ? tokens * w.router.top_k : 0; }

}  // namespace

void Sizes::moe(const Moe& w, int tokens, int rows) {
  for (const int least : {0, kTileTokens}) {
    if (least && !blocks()) continue;
    work.reset();
    Space(work, kernels, w, tokens, std::min(rows, routed_rows(w, tokens)), threads, least);
  }
}

void Backend::route(const Moe& w, Rows n, int tokens, int64_t* ids, float* weights) {
  w.router.check();
  const int k = w.router.top_k;
  const size_t columns = w.gate->m.n;
  std::vector<float> scores(tokens * columns);
  linear(*w.gate, {n, tokens, nullptr, 0.0f, {nullptr, 0}, {scores.data(), static_cast<int64_t>(columns)}});
  std::vector<int32_t> chosen(k);
  for (int t = 0; t < tokens; ++t) {
    choose_experts(w.router, scores.data() + t * columns, chosen.data(),
                   weights + static_cast<size_t>(t) * k);
    std::copy(chosen.begin(), chosen.end(), ids + static_cast<size_t>(t) * k);
  }
}

void Backend::moe(const Moe& w, const MoeArgs& in) {
  if (w.gate) w.router.check();
  work_.reset();
  const Space space(work_, kernels, w, in.tokens, routed_rows(w, in.tokens), pool.size(), tile_tokens);
  Experts call(kernels, w, in, space, pool.size());
  pool.run([&](Team& team) { call.run(team); });
  if (in.counts) call.count();
}

}  // namespace farthing
