// Norm, quantize, project, add; and the output head.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "layers/backend.h"

namespace farthing {

Backend::Backend(int threads, const char* isa, const std::string& topology, bool pin)
    : pool(threads, topology, pin),
      kernels(select_kernels(isa)),
      arena(std::make_shared<Arena>(pool.numbers(), pool.pinned() && pool.nodes() > 1)) {}

// Rows into the form the kernels of `w` read. One token: every thread its own copy, no barrier.
// `scratch` has prepare_floats per thread.
Act Backend::prepare(Team& team, int phase, const Matrix& w, const Act& act, Rows x, int tokens,
                     const float* norm, float eps, float* scratch) {
  float* mine = scratch + static_cast<size_t>(team.id()) * prepare_floats(w);
  const auto one = [&](int t, int to) {
    const float* from = x.row(t);
    if (norm) kernels.rms_norm(from, norm, eps, w.inputs(), mine), from = mine;
    kernels.store_row(w, act, to, from, mine + act_stride(w.k));
  };
  if (tokens == 1) {
    one(0, team.id());
    return row(act, team.id());
  }
  team.for_units(phase, 1, tokens, [&](int, int t) { one(t, t); });
  team.barrier();
  return act;
}

namespace {

// What a kernel call computes: a tile of outputs that stays in cache. Rows in blocks take more, as the panels
// of a call share what is read of the rows, and all rows share what the panels' bytes are made from.
struct Shape {
  int panels = 2, rows = 256;

  int width() const { return panels * kPanel; }
  size_t size() const { return static_cast<size_t>(rows) * width(); }
  static Shape of(const Act& x, const Matrix& w, int threads) {
    constexpr int most = 16, units = 4;  // panels; calls that each thread should get
    Shape s;
    if (!x.blocks) return s;
    s.rows = 512;
    while (s.panels < most && w.panels >= 2 * s.panels * units * threads) s.panels *= 2;
    return s;
  }
};

}  // namespace

void Backend::rms_norm(Rows x, int tokens, int k, const float* weight, float eps, Rows out) {
  auto all = [&](Team& team) {
    team.for_units(kOnlyLoop, 1, tokens,
                   [&](int, int t) { kernels.rms_norm(x.row(t), weight, eps, k, out.row(t)); });
  };
  if (tokens > 8) return pool.run(all);
  for (int t = 0; t < tokens; ++t) kernels.rms_norm(x.row(t), weight, eps, k, out.row(t));
}

namespace {

// Columns [n0, n0 + columns) of a tile's rows to the output, with the residual added.
void write_tile(const LinearArgs& in, const float* tile, int ld, int n0, int columns, int m0, int rows) {
  for (int m = 0; m < rows; ++m) {
    const float* from = tile + static_cast<size_t>(m) * ld;
    float* to = in.out.row(m0 + m) + n0;
    if (!in.residual.at) {
      std::memcpy(to, from, sizeof(float) * columns);
      continue;
    }
    const float* add = in.residual.row(m0 + m) + n0;
    for (int i = 0; i < columns; ++i) to[i] = add[i] + from[i];
  }
}

// Scratch of one call.
struct Space {
  Act x, rest;            // [T], or a row per thread for one token
  float *norms, *turned;  // [threads][prepare_floats], of the matrix and of further columns
  Shape shape;
  float* tiles;  // [threads] of that shape, twice with further columns

  Space(Workspace& work, const Kernels& kernels, const Matrix& w, const Matrix* further, int tokens,
        int threads, int tile_tokens) {
    const int copies = std::max(tokens, threads);
    const Split split = kernels.act_split();
    const bool blocks = takes_blocks(kernels, tokens, tile_tokens);
    x = work.act(w, copies, split, w.sparse, blocks);
    if (further) rest = work.act(*further, copies, split, further->sparse, blocks);
    shape = Shape::of(x, w, threads);
    norms = work.take<float>(static_cast<size_t>(threads) * prepare_floats(w));
    turned = work.take<float>(further && further->order ? threads * prepare_floats(*further) : 0);
    tiles = work.take<float>(threads * shape.size() * (further ? 2 : 1));
  }
};

}  // namespace

void Sizes::linear(const Matrix& w, const Matrix* further, int tokens) {
  for (const int least : {0, kTileTokens}) {
    if (least && !blocks()) continue;
    work.reset();
    Space(work, kernels, w, further, tokens, threads, least);
  }
}

void Backend::linear(const Packed& packed, const LinearArgs& in) {
  LinearArgs part = in;
  for (const Packed* p = &packed; p; p = p->next.get()) {
    product(*p, part);
    part.out.at += p->m.n;
    if (part.residual.at) part.residual.at += p->m.n;
  }
}

void Backend::product(const Packed& packed, const LinearArgs& in) {
  const Matrix& w = packed.m;
  const Matrix* rest = in.rest ? &in.rest->m : nullptr;
  if (rest && (in.norm || rest->n != w.n)) throw std::invalid_argument("further columns do not fit a matrix");
  const int T = in.tokens;
  work_.reset();
  const Space space(work_, kernels, w, rest, T, pool.size(), tile_tokens);
  const Shape shape = space.shape;
  enum Phase { kPrepare, kPrepareRest, kMultiply };
  pool.run([&](Team& team) {
    const Act act = prepare(team, kPrepare, w, space.x, in.x, T, in.norm, in.eps, space.norms);
    const Rows right{in.x.at + w.inputs(), in.x.stride};
    const Act act_rest =
        rest ? prepare(team, kPrepareRest, *rest, space.rest, right, T, nullptr, in.eps, space.turned)
             : Act{};
    float *tile = space.tiles + team.id() * shape.size(),
          *more = space.tiles + (pool.size() + team.id()) * shape.size();
    team.for_units(kMultiply, 1, (w.panels + shape.panels - 1) / shape.panels, [&](int, int unit) {
      const int panel = unit * shape.panels, count = std::min(shape.panels, w.panels - panel);
      const int n0 = panel * kPanel, columns = std::min(shape.width(), w.n - n0);
      for (int m = 0; m < T; m += shape.rows) {
        const int rows = std::min(shape.rows, T - m);
        kernels.tile(w, panel, count, row(act, m), rows, tile, shape.width());
        if (rest) {
          kernels.tile(*rest, panel, count, row(act_rest, m), rows, more, shape.width());
          kernels.add(tile, more, rows * shape.width());
        }
        write_tile(in, tile, shape.width(), n0, columns, m, rows);
      }
    });
  });
}

void Backend::softmax(Rows x, int rows, int n, Rows out) {
  // Half of a large L3. Stores of less are faster through the caches, and their reader finds them there.
  constexpr size_t kMostCached = size_t{16} << 20;
  const size_t row_bytes = round_up(sizeof(float) * n, size_t{64});
  const bool aligned = reinterpret_cast<uintptr_t>(out.at) % 64 == 0 && out.stride % 16 == 0;
  const bool stream = aligned && rows * row_bytes >= kMostCached;
  work_.reset();
  float* scratch = stream ? work_.take<float>(pool.size() * row_bytes / sizeof(float)) : nullptr;
  pool.run([&](Team& team) {
    float* own = stream ? scratch + team.id() * row_bytes / sizeof(float) : nullptr;
    team.for_units(kOnlyLoop, 1, rows, [&](int, int r) {
      kernels.softmax(x.row(r), x.row(std::min(r + 1, rows - 1)), n, own, out.row(r));
    });
  });
}

}  // namespace farthing
