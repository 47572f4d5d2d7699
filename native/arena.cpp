#include <sys/mman.h>
#include <unistd.h>

#include <new>

#include "pack.h"
#if defined(__linux__)
#include <sys/syscall.h>
#endif

namespace farthing {
namespace {
constexpr size_t kLargePage = size_t{2} << 20;
constexpr size_t kSlab = size_t{64} << 20;
constexpr int kPreferred = 1;  // MPOL_PREFERRED

void prefer_node([[maybe_unused]] void* at, [[maybe_unused]] size_t size, [[maybe_unused]] int node) {
#if defined(__linux__) && defined(SYS_mbind)
  const unsigned long mask = 1ul << node;
  syscall(SYS_mbind, at, size, kPreferred, &mask, sizeof mask * 8, 0);
#endif
}
}  // namespace

Arena::~Arena() {
  for (auto& node : slabs_)
    for (auto& s : node) munmap(s.at, s.size);
}

uint8_t* Arena::take(int node, size_t bytes) {
  bytes = round_up(bytes, size_t{64});
  auto& slabs = slabs_[node];
  if (slabs.empty() || slabs.back().used + bytes > slabs.back().size) {
    Slab s;
    s.size = round_up(bytes < kSlab ? kSlab : bytes, kLargePage);
    void* at = mmap(nullptr, s.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    s.at = static_cast<uint8_t*>(at);
#if defined(MADV_HUGEPAGE)
    madvise(at, s.size, MADV_HUGEPAGE);
#endif
    if (bind_) prefer_node(at, s.size, node);
    slabs.push_back(s);
  }
  Slab& s = slabs.back();
  uint8_t* at = s.at + s.used;
  s.used += bytes;
  bytes_ += bytes;
  return at;
}

void Arena::give_back(int node, const uint8_t* at) {
  Slab& s = slabs_[node].back();
  const size_t used = static_cast<size_t>(at - s.at);
  bytes_ -= s.used - used;
  s.used = used;
}

}  // namespace farthing
