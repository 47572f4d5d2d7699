#include "threads.h"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <stdexcept>
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include "spin.h"

namespace farthing {
namespace {

constexpr auto kAwake =
    std::chrono::milliseconds(2);  // longer than the Python between two steps, whose caches are cold

std::vector<int> parse_cpus(const std::string& list) {
  std::vector<int> cpus;
  std::stringstream in(list);
  for (std::string part; std::getline(in, part, ',');) {
    if (part.empty() || part == "\n") continue;
    const size_t dash = part.find('-');
    const int low = std::stoi(part),
              high = dash == std::string::npos ? low : std::stoi(part.substr(dash + 1));
    for (int c = low; c <= high; ++c) cpus.push_back(c);
  }
  return cpus;
}

std::vector<std::vector<int>> parse_topology(const std::string& text) {
  std::vector<std::vector<int>> nodes;
  std::stringstream in(text);
  for (std::string part; std::getline(in, part, ';');)
    if (auto cpus = parse_cpus(part); !cpus.empty()) nodes.push_back(cpus);
  if (nodes.empty())
    throw std::invalid_argument("topology '" + text + "' names no CPU; expected lists such as '0-3;4-7'");
  return nodes;
}

bool allowed(int cpu) {
#if defined(__linux__)
  static const cpu_set_t set = [] {
    cpu_set_t s;
    CPU_ZERO(&s);
    sched_getaffinity(0, sizeof s, &s);
    return s;
  }();
  return cpu < CPU_SETSIZE && CPU_ISSET(cpu, &set);
#else
  return true;
#endif
}

std::vector<std::vector<int>> machine_topology() {
  std::vector<std::vector<int>> nodes;
  for (int i = 0; i < 8; ++i) {
    std::ifstream file("/sys/devices/system/node/node" + std::to_string(i) + "/cpulist");
    std::string text;
    if (!file || !std::getline(file, text)) break;
    std::vector<int> cpus;
    for (int c : parse_cpus(text))
      if (allowed(c)) cpus.push_back(c);
    if (!cpus.empty()) nodes.push_back(cpus);
  }
  if (nodes.empty()) {
    nodes.emplace_back();
    for (unsigned c = 0; c < std::max(1u, std::thread::hardware_concurrency()); ++c)
      nodes[0].push_back(static_cast<int>(c));
  }
  return nodes;
}

void pin_to([[maybe_unused]] const std::vector<int>& cpus) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus)
    if (cpu < CPU_SETSIZE) CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
#endif
}

}  // namespace

Pool::Pool(int threads, const std::string& topology, bool pin) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
  real_ = topology.empty();
  cpus_ = real_ ? machine_topology() : parse_topology(topology);
  if (static_cast<int>(cpus_.size()) > threads) cpus_.resize(threads);
  size_ = threads;
  size_t total = 0;
  for (auto& c : cpus_) total += c.size();
  int given = 0;
  size_t before = 0;
  for (auto& c : cpus_) {  // threads in proportion to a node's CPUs, at least one each
    before += c.size();
    const int left = static_cast<int>(cpus_.size() - node_threads_.size()) - 1;
    int until = static_cast<int>(before * threads / total);
    until = std::min(std::max(until, given + 1), threads - left);
    first_thread_.push_back(given);
    node_threads_.push_back(until - given);
    for (; given < until; ++given) node_of_.push_back(static_cast<int>(node_threads_.size()) - 1);
  }
  counters_ = std::vector<Counter>(static_cast<size_t>(kPhases) * size_);
  int groups = 0;
  for (const int threads : node_threads_)
    for (int t = 0; t < threads; ++t) {
      if (t % kGroup == 0) ++groups;
      group_of_.push_back(groups - 1);
    }
  groups_ = std::vector<Group>(groups);
  for (const int g : group_of_) ++groups_[g].threads;
  pin_ = pin || (real_ && nodes() > 1);
  for (int t = 1; t < size_; ++t)
    workers_.emplace_back([this, t] {
      if (pin_) pin_to(cpus_[node_of_[t]]);
      loop(t);
    });
}

Pool::~Pool() {
  stop_ = true;
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (auto& w : workers_) w.join();
}

Share Pool::share(int node, int units) const {
  const int64_t u = units, before = first_thread_[node];
  return {static_cast<int>(u * before / size_), static_cast<int>(u * (before + node_threads_[node]) / size_)};
}

bool Pool::take(int phase, int id, int units, Taken& t) {
  const int node = node_of_[id], first = first_thread_[node], threads = node_threads_[node];
  for (; t.other < threads; ++t.other) {
    const int part = (id - first + t.other) % threads;
    const int64_t u = units;
    const int begin = static_cast<int>(u * part / threads), end = static_cast<int>(u * (part + 1) / threads);
    std::atomic<uint64_t>& taken = counters_[static_cast<size_t>(phase) * size_ + first + part].taken;
    uint64_t seen = taken.load(std::memory_order_relaxed);
    for (;;) {
      const int front = static_cast<int>(seen & 0xffffffffu), back = static_cast<int>(seen >> 32);
      const int left = end - begin - front - back;
      if (left <= 0) break;
      const uint64_t chunk = std::max(1, left / 4);
      if (!taken.compare_exchange_weak(seen, seen + (t.other ? chunk << 32 : chunk),
                                       std::memory_order_relaxed))
        continue;
      t.begin = t.other ? end - back - static_cast<int>(chunk) : begin + front;
      t.end = t.begin + static_cast<int>(chunk);
      return true;
    }
  }
  return false;
}

void Pool::start(void (*call)(void*, Team&), void* data) {
  for (auto& c : counters_) c.taken.store(0, std::memory_order_relaxed);
  Team team(*this, 0);
  static thread_local const Pool* pinned = nullptr;  // callers are not known before they call
  if (pin_ && pinned != this) {
    pin_to(cpus_[0]);
    pinned = this;
  }
  if (size_ == 1) return call(data, team);
  call_ = call;
  data_ = data;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  call(data, team);
  team.barrier();
}

void Pool::wait_epoch(uint32_t seen) {
  if (!spin([&] { return epoch_.load(std::memory_order_acquire) != seen; }, kAwake))
    epoch_.wait(seen, std::memory_order_acquire);
}

void Pool::loop(int id) {
  Team team(*this, id);
  for (uint32_t seen = 0;; ++seen) {
    wait_epoch(seen);
    if (stop_) return;
    call_(data_, team);
    arrive(id);  // thread 0 alone waits for the others
  }
}

void Pool::arrive(int id) {
  Group& group = groups_[group_of_[id]];
  if (group.arrived.fetch_add(1, std::memory_order_acq_rel) != group.threads - 1) return;
  group.arrived.store(0, std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) != static_cast<int>(groups_.size()) - 1) return;
  arrived_.store(0, std::memory_order_relaxed);
  sense_.fetch_add(1, std::memory_order_release);
}

void Team::barrier() {
  if (pool_.size_ == 1) return;
  const uint32_t sense = pool_.sense_.load(std::memory_order_acquire);
  pool_.arrive(id_);
  spin([&] { return pool_.sense_.load(std::memory_order_acquire) != sense; }, {});
}

}  // namespace farthing
