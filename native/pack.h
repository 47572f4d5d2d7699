// Packs checkpoint matrices into panels, in memory on the NUMA node that reads them.
#pragma once
#include <array>
#include <memory>
#include <string>
#include <vector>

#include "cells.h"
#include "matrix.h"
#include "threads.h"

namespace farthing {

// Memory for packed weights: large pages if available, one list of slabs per node.
class Arena {
 public:
  explicit Arena(int nodes, bool bind) : slabs_(nodes), bind_(bind) {}
  ~Arena();
  Arena(const Arena&) = delete;
  uint8_t* take(int node, size_t bytes);
  size_t bytes() const { return bytes_; }

 private:
  struct Slab {
    uint8_t* at = nullptr;
    size_t size = 0, used = 0;
  };
  std::vector<std::vector<Slab>> slabs_;
  bool bind_;
  size_t bytes_ = 0;
};

// Rows of a checkpoint's matrix [n, k]. `kind` is their storage format; see farthing.ops.weights.Weight.
struct Source {
  enum Kind { f32, bf16, int8, int4, fp8 } kind;
  const void* data;
  const float* scale;  // int8 [n, 1], int4 [n, k / group], fp8 [n / 128, k / 128]
  const int8_t* zero;  // int4 [n, k / group] or null
  int n, k, group;
};

// Time of a cell with 1, 2, 3 and 4 blocks relative to the same columns of a dense panel.
using BlockCosts = std::array<double, kCellBlocks>;

// Replaces dense records by block-sparse ones and fills `offsets`, if that saves time.
bool to_cells(const Matrix& w, const BlockCosts& costs, std::vector<uint8_t>& records,
              std::vector<uint64_t>& offsets);

// Throws std::invalid_argument, naming the part, unless kernels can read the records of `w`.
void check_cells(const Matrix& w, const uint8_t* records, size_t bytes);

class Packed {
 public:
  Matrix m;
  // Packs the stacked rows of the sources; with `interleave`, alternates 16 rows of the first and the second.
  // Blocks of zeros are left out where `costs` say that it saves time.
  static std::shared_ptr<Packed> pack(Pool& pool, std::shared_ptr<Arena> arena, Format format, int group,
                                      bool zero, bool interleave, const BlockCosts& costs,
                                      const std::vector<Source>& sources);
  // A view of serialized bytes, which must outlive it. Copied to each node if there are several.
  // Everything that kernels rely on is checked; `name` is a hash of the name it was serialized under. Throws
  // std::invalid_argument.
  static std::shared_ptr<Packed> view(Pool& pool, std::shared_ptr<Arena> arena, const uint8_t* bytes,
                                      size_t size, uint64_t name);
  size_t serialized_bytes() const;
  void serialize(uint8_t* out, uint64_t name) const;
  size_t weight_bytes() const;

 private:
  void place(Pool& pool, Arena& arena, const uint8_t* records);
  std::shared_ptr<Arena> arena_;
  std::vector<uint64_t> offsets_;
};

}  // namespace farthing
