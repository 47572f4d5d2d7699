// A sum over the ranks of one host, through memory that they share.
#pragma once
#include <atomic>
#include <cstdint>
#include <stdexcept>

#include "pack/matrix.h"

namespace farthing {

// Another rank has ended, or did not come in time.
struct PeerLost : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One rank's view of a group. The protocol is that of farthing/parallel/shared.py, whose collectives may come
// between.
struct SharedSum {
  using Word = std::atomic<uint64_t>;
  Word* counters;  // of rank 0, the others' a cache line apart: the last collective whose numbers are in the
                   // slot
  uint8_t* slots;  // two per rank, used alternately
  int64_t slot_bytes;
  uint64_t* step;           // collectives that this rank has begun
  const Word* failed;       // not zero: a rank has ended
  int size, index, parent;  // parent: the process whose end is ours too, 0 for none
  bool crowded;             // more ranks than cores: waiting must not hold one
  double timeout;           // seconds

  // x [rows, columns] = residual + the sum of every rank's x, the same bits on all of them: the residual is
  // every rank's own, or null. Throws PeerLost.
  void add(Rows x, int rows, int columns, Rows residual = {nullptr, 0}) const;

 private:
  float* slot(int rank) const;
  void wait(int rank, uint64_t step) const;
  void check(int rank, int naps) const;
  void add_some(Rows x, int rows, int columns, Rows residual) const;
};

}  // namespace farthing
