#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <new>
#include <system_error>

#include "pack/pack.h"
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
  if (node >= 64) return;
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
    if (bind_) prefer_node(at, s.size, nodes_[node]);
    slabs.push_back(s);
  }
  Slab& s = slabs.back();
  uint8_t* at = s.at + s.used;
  s.used += bytes;
  bytes_ += bytes;
  return at;
}

std::vector<std::tuple<int, uint64_t, uint64_t>> Arena::used() const {
  std::vector<std::tuple<int, uint64_t, uint64_t>> found;
  for (size_t node = 0; node < slabs_.size(); ++node)
    for (const Slab& s : slabs_[node])
      found.emplace_back(nodes_[node], reinterpret_cast<uint64_t>(s.at), s.used);
  return found;
}

std::vector<int> nodes_of_pages([[maybe_unused]] const std::vector<uint64_t>& addresses) {
#if defined(__linux__) && defined(SYS_move_pages)
  std::vector<int> nodes(addresses.size(), -ENOENT);
  std::vector<void*> pages;
  for (const uint64_t address : addresses) pages.push_back(reinterpret_cast<void*>(address));
  if (syscall(SYS_move_pages, 0, pages.size(), pages.data(), nullptr, nodes.data(), 0) == 0) return nodes;
  throw std::system_error(errno, std::generic_category(), "move_pages");
#else
  throw std::system_error(ENOSYS, std::generic_category(), "move_pages");
#endif
}

void Arena::give_back(int node, const uint8_t* at) {
  Slab& s = slabs_[node].back();
  const size_t used = static_cast<size_t>(at - s.at);
  bytes_ -= s.used - used;
  s.used = used;
}

}  // namespace farthing
