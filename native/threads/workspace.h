// Scratch memory of ops.
#pragma once
#include <vector>

#include "pack/matrix.h"

namespace farthing {

// Grow-only memory from which an op takes its scratch buffers; one op runs at a time.
class Workspace {
 public:
  enum class Memory { real, none };  // none: only counts; every pointer it returns is null

  explicit Workspace(Memory memory = Memory::real) : memory_(memory) {}
  Workspace(const Workspace&) = delete;
  ~Workspace();
  void reset() { used_ = 0; }
  template <class T>
  T* take(size_t count) {
    return static_cast<T*>(raw(count * sizeof(T)));
  }
  // Rows in the form that a matrix reads, or each of them in that of any of these matrices of equal width.
  // In blocks if all of them fit.
  Act act(const std::vector<const Matrix*>& ws, int rows, Split split, bool sparse, bool blocks = false);
  Act act(const Matrix& w, int rows, Split split, bool sparse, bool blocks = false) {
    return act(std::vector<const Matrix*>{&w}, rows, split, sparse, blocks);
  }
  // Most bytes that an op has taken so far; pages beyond them have never been written to.
  size_t most_used() const;

 private:
  Act in_blocks(const std::vector<const Matrix*>& ws, int rows);
  void* raw(size_t bytes);
  struct Chunk {
    uint8_t* at;
    size_t size, most_used;
  };
  Memory memory_;
  std::vector<Chunk> chunks_;
  size_t used_ = 0, chunk_ = 0;
};

}  // namespace farthing
