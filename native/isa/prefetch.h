// What loops over weights take from the processor: how far ahead few rows prefetch, and the tile of many
// rows.
//
// A stream that is prefetched D bytes ahead reads at most D bytes per latency of memory and thread: 2 KB are
// 10 GB/s at 200 ns. A greater distance than a machine needs drops lines before they are read. Zen 4 follows
// a stream better by itself as long as little arithmetic interrupts it, and software only helps far ahead or
// hardly at all.
#pragma once

namespace farthing {

struct PrefetchDistances {  // bytes
  int bytes;                // weights of 8 bits and more, into L2
  int nibbles;              // weights of 4 bits, into L2 …
  int nibbles_near;         // … and into L1
  int rows, byte_rows;      // that these hold for, and those of integers in bytes; more: a panel ahead

  int of(bool four_bits) const { return four_bits ? nibbles : bytes; }
  int rows_of(bool in_bytes) const { return in_bytes ? byte_rows : rows; }
};

constexpr int kAnyRows = 1 << 20;

extern PrefetchDistances prefetch_distances;  // of this kind of processor; tests and benchmarks change them

// Whether it starts one product of 512 bits a cycle, which may then load its own operand, or two.
extern bool one_product_a_cycle;

// Whether it starts products of bfloat16 pairs as often as those of floats, which have half the operands.
extern bool fast_pairs;

}  // namespace farthing
