// Packs checkpoint matrices into panels, in memory on the NUMA node that reads them.
#pragma once
#include <array>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "isa/kernels.h"
#include "linear/cells.h"
#include "pack/matrix.h"
#include "pack/source.h"
#include "threads/threads.h"

namespace farthing {

// Memory for packed weights: large pages if available, one list of slabs per node.
class Arena {
 public:
  // nodes: their numbers. bind: whether memory is requested from them, in vain in many containers: what is
  // written first by a node's threads is on it anyway.
  Arena(const std::vector<int>& nodes, bool bind) : nodes_(nodes), slabs_(nodes.size()), bind_(bind) {}
  ~Arena();
  Arena(const Arena&) = delete;
  uint8_t* take(int node, size_t bytes);
  void give_back(int node, const uint8_t* at);  // what was taken last; its bytes are not cleared
  size_t bytes() const { return bytes_; }
  // (number of the node, address, bytes) of what is used.
  std::vector<std::tuple<int, uint64_t, uint64_t>> used() const;

  // Whether matrices of a mapped file are copied here even for one node. The page cache, which processes
  // share, has each page on the node whose process read it first.
  bool copies_files = false;

 private:
  struct Slab {
    uint8_t* at = nullptr;
    size_t size = 0, used = 0;
  };
  std::vector<int> nodes_;
  std::vector<std::vector<Slab>> slabs_;
  bool bind_;
  size_t bytes_ = 0;
};

// The memory node of each page, without moving any; negative: an errno, ENOENT of a page that was never
// touched. Throws std::system_error if the system does not tell.
std::vector<int> nodes_of_pages(const std::vector<uint64_t>& addresses);

// Time of a cell with 1, 2, 3 and 4 blocks relative to the same columns of a dense panel.
using BlockCosts = std::array<double, kCellBlocks>;

// Block-sparse records of a dense matrix and their offsets; false and nothing if that would not save time.
bool to_cells(const Matrix& w, const BlockCosts& costs, std::vector<uint8_t>& cells,
              std::vector<uint64_t>& offsets);

// Throws std::invalid_argument, naming the part, unless kernels can read the records of `w`.
void check_cells(const Matrix& w, const uint8_t* records, size_t bytes);

class Packed {
 public:
  Matrix m;
  std::shared_ptr<Packed> next;          // a matrix of another format whose rows follow; of projections only
  mutable std::vector<uint16_t> uneven;  // of a head in planes (head.h); empty until greedy decoding needs it
  // Packs the stacked rows of the sources; with `interleave`, alternates 16 rows of the first and the second.
  // Blocks of zeros are left out where `costs` say that it saves time; never if they are infinite.
  static std::shared_ptr<Packed> pack(Pool& pool, const Kernels& kernels, std::shared_ptr<Arena> arena,
                                      Format format, int group, bool zero, bool interleave,
                                      const BlockCosts& costs, const std::vector<Source>& sources);
  // A view of serialized bytes, which must outlive it. Copied to each node if there are several.
  // Everything that kernels rely on is checked; `name` is a hash of the name it was serialized under. Throws
  // std::invalid_argument.
  static std::shared_ptr<Packed> view(Pool& pool, std::shared_ptr<Arena> arena, const uint8_t* bytes,
                                      size_t size, uint64_t name);
  // The input's column that each column multiplies, [k]: every one once, and -1 for none. Throws
  // std::invalid_argument.
  void reorder(const int64_t* order);
  size_t serialized_bytes() const;
  void serialize(uint8_t* out, uint64_t name) const;
  size_t weight_bytes() const;
  int rows() const { return m.n + (next ? next->rows() : 0); }

 private:
  void reserve(Pool& pool, Arena& arena);  // memory of dense records
  void place(Pool& pool, Arena& arena, const uint8_t* records);
  std::shared_ptr<Arena> arena_;
  std::vector<uint64_t> offsets_;
  std::vector<int32_t> order_;
};

}  // namespace farthing
