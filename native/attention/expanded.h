// Attention of prompts with expanded keys and values: see expanded.cpp.
#pragma once
#include <vector>

#include "layers/backend.h"

namespace farthing {

// Tokens before this position always take absorbed attention, so that answers to shorter prompts do not
// depend on how prompts are divided into chunks.
constexpr int kExpandFrom = 1024;

// Which tokens of a step take expanded attention: those of a sequence that come at kExpandFrom or later, if
// they are at least `least`. 0: none do.
struct WideTokens {
  struct Part {
    int sequence, first, last;  // tokens
  };
  std::vector<Part> parts;
  std::vector<int> others;  // tokens, in their order, that take absorbed attention
  std::vector<int> place;   // [T] of a token in `others`, or -1

  WideTokens(const Batch& batch, int tokens, int least);
};

// Attention of WideTokens::parts, written to the output.
class Expanded {
 public:
  Expanded(Workspace& work, const Kernels& kernels, const Attention& w, const MlaArgs& in,
           const WideTokens& tokens, int threads);

  void run(Team& team, int phase) const;  // once the step's keys are cached

 private:
  struct Unit {
    int sequence, head, first, last;  // tokens
  };
  struct Space;

  Space space(uint8_t* at) const;
  void attend(const Unit& u, const Space& s) const;
  void take_weights(int head, const Space& s) const;
  void take_queries(const Unit& u, const Space& s) const;
  void expand(const Unit& u, int at, int keys, int skipped, const Space& s) const;
  void take_values(int rows, const Space& s) const;
  void clear_damaged(const Unit& u, int at, int keys, const Space& s) const;
  void attend_tile(const Unit& u, int tile, int at, int keys, const Space& s) const;
  void put_out(const Unit& u, const Space& s) const;
  int tiles(const Unit& u) const { return (u.last - u.first + kTileQueries - 1) / kTileQueries; }

  const Kernels& kernels_;
  const Attention& w_;
  const MlaArgs& in_;
  const bool halves_;
  const Wide& wide_;
  const KeyShape shape_;
  const int nope_, value_, query_;  // columns, padded to 32; a query is [n, r]
  std::vector<Unit> units_;
  int most_tiles_ = 0;  // of a unit
  uint8_t* memory_ = nullptr;
};

}  // namespace farthing
