// How far ahead loops over few rows prefetch their weights: a property of the machine.
//
// A stream that is prefetched D bytes ahead reads at most D bytes per latency of memory and thread: 2 KB are
// 10 GB/s at 200 ns. A greater distance than a machine needs drops lines before they are read.
#pragma once

namespace farthing {

struct PrefetchDistances {  // bytes
  int bytes;                // weights of 8 bits and more, into L2
  int nibbles;              // weights of 4 bits, into L2 …
  int nibbles_near;         // … and into L1

  int of(bool four_bits) const { return four_bits ? nibbles : bytes; }
};

extern PrefetchDistances prefetch_distances;  // of this processor's vendor; benchmarks change them

}  // namespace farthing
