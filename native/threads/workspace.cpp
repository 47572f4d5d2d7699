#include "threads/workspace.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "linear/cells.h"

namespace farthing {
namespace {

constexpr size_t kChunkBytes = size_t{8} << 20;
constexpr int kTileRows = 32;  // that tiles may read behind the last row

}  // namespace

Workspace::~Workspace() {
  for (auto& c : chunks_) std::free(c.at);
}

void* Workspace::raw(size_t bytes) {
  bytes = round_up(bytes, size_t{64}) + 64;
  if (used_ == 0) chunk_ = 0;
  while (chunk_ < chunks_.size() && used_ + bytes > chunks_[chunk_].size) ++chunk_, used_ = 0;
  if (chunk_ == chunks_.size()) {
    const size_t size = round_up(std::max(bytes, kChunkBytes), size_t{64});
    void* at = memory_ == Memory::real ? std::aligned_alloc(64, size) : nullptr;
    if (!at && memory_ == Memory::real) throw std::bad_alloc();
    chunks_.push_back({static_cast<uint8_t*>(at), size, 0});
  }
  Chunk& chunk = chunks_[chunk_];
  uint8_t* at = chunk.at ? chunk.at + used_ : nullptr;
  used_ += bytes;
  chunk.most_used = std::max(chunk.most_used, used_);
  return at;
}

size_t Workspace::most_used() const {
  size_t total = 0;
  for (const Chunk& c : chunks_) total += c.most_used;
  return total;
}

Act Workspace::in_blocks(const std::vector<const Matrix*>& ws, int rows) {
  Act a;
  const int k = ws[0]->k;
  a.ld = block_columns(k);
  a.blocks = (k + a.ld - 1) / a.ld;
  a.block = static_cast<size_t>(rows) * a.ld;
  const size_t cells = a.blocks * a.block + static_cast<size_t>(kTileRows) * a.ld;
  const auto quantized = [](const Matrix* w) { return w->quantized(); };
  if (!std::all_of(ws.begin(), ws.end(), quantized)) a.hi = take<uint16_t>(cells);
  if (std::none_of(ws.begin(), ws.end(), quantized)) return a;
  a.groups = 2 * a.blocks;
  a.q = take<int8_t>(cells);
  a.rest = take<int8_t>(cells);
  a.scale = take<float>(static_cast<size_t>(rows) * a.groups);
  a.comp = take<int32_t>(static_cast<size_t>(rows) * a.groups);
  return a;
}

Act Workspace::act(const std::vector<const Matrix*>& ws, int rows, Split split, bool sparse, bool blocks) {
  const auto fits = [](const Matrix* w) { return w->fits_blocks(); };
  if (blocks && std::all_of(ws.begin(), ws.end(), fits)) return in_blocks(ws, rows);
  Act a;
  bool floats = false, halves = false, pairs = false;
  for (const Matrix* w : ws) {
    a.ld = std::max(a.ld, act_stride(w->k));
    const bool in_pairs = split.pairs && w->format_traits().scales == Scales::blocks;
    pairs |= in_pairs;
    floats |= !w->quantized() && !in_pairs;
    halves |= split.halves && w->format_traits().halves;
    if (!w->quantized()) continue;
    a.groups = std::max(a.groups, w->groups());
    a.terms = std::max(a.terms, w->act_terms);
    if (sparse) a.cell_count = std::max(a.cell_count, round_up(w->k, 64) / cell_columns(*w));
  }
  const size_t cells = static_cast<size_t>(rows) * a.ld, terms = static_cast<size_t>(rows) * a.terms;
  if (halves) a.hi = take<uint16_t>(cells), a.lo = take<uint16_t>(cells);
  if (pairs) a.pairs = take<uint32_t>(cells);
  if (a.groups) {
    a.q = take<int8_t>(terms * a.ld);
    a.scale = take<float>(terms * a.groups);
    a.comp = take<int32_t>(terms * a.groups);
  }
  if (a.cell_count || (a.groups && split.flipped)) a.flipped = take<uint8_t>(terms * a.ld);
  if (a.cell_count) a.cells = take<CellInput>(terms * a.cell_count);
  if (floats) a.f32 = take<float>(cells);
  return a;
}

}  // namespace farthing
