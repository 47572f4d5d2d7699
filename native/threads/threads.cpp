#include "threads/threads.h"

#include <pthread.h>

#include <algorithm>
#include <new>
#include <set>
#include <sstream>
#include <stdexcept>
#include <system_error>
#if defined(__linux__)
#include <sched.h>
#endif

#include "pack/matrix.h"
#include "threads/spin.h"

namespace farthing {
namespace {

// Longer than the Python between two steps, whose caches are cold.
constexpr auto kAwake = std::chrono::milliseconds(2);
// At a barrier. Longer than a turn of the scheduler; a thread that sleeps beside a busy process
// gets its core back late.
constexpr auto kPatience = std::chrono::milliseconds(20);
// How long threads without cores rest before they are tried again; twice as long each time that they still
// have none, as trying costs a few turns of the scheduler.
constexpr Clock::duration kShortRest = std::chrono::milliseconds(100), kLongRest = std::chrono::seconds(2);

// Cores in a list such as "0-3,5+13".
std::vector<std::vector<int>> parse_cores(const std::string& list) {
  std::vector<std::vector<int>> cores;
  std::stringstream in(list);
  for (std::string part; std::getline(in, part, ',');) {
    const size_t dash = part.find('-');
    if (dash == std::string::npos) {
      std::vector<int>& core = cores.emplace_back();
      std::stringstream siblings(part);
      for (std::string cpu; std::getline(siblings, cpu, '+');) core.push_back(std::stoi(cpu));
      continue;
    }
    for (int c = std::stoi(part); c <= std::stoi(part.substr(dash + 1)); ++c) cores.push_back({c});
  }
  return cores;
}

std::vector<Node> parse_topology(const std::string& text) {
  if (text.empty()) return std::vector<Node>(1);
  std::vector<Node> nodes;
  std::stringstream in(text);
  for (std::string part; std::getline(in, part, ';');) {
    const size_t colon = part.find(':');
    Node node{static_cast<int>(nodes.size()), parse_cores(part.substr(colon + 1))};  // npos + 1 is 0
    if (colon != std::string::npos) node.number = std::stoi(part);
    if (!node.cores.empty()) nodes.push_back(std::move(node));
  }
  if (nodes.empty() || nodes.size() > kMaxParts)
    throw std::invalid_argument("topology '" + text + "' has " + std::to_string(nodes.size()) +
                                " nodes with CPUs; expected 1 to " + std::to_string(kMaxParts) +
                                ", such as '0-3;4-7'");
  return nodes;
}

std::vector<int> all_cpus(const Node& node) {
  std::vector<int> cpus;
  for (const auto& core : node.cores) cpus.insert(cpus.end(), core.begin(), core.end());
  return cpus;
}

void pin_to([[maybe_unused]] const std::vector<int>& cpus, [[maybe_unused]] pthread_t thread) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus)
    if (cpu < CPU_SETSIZE) CPU_SET(cpu, &set);
  pthread_setaffinity_np(thread, sizeof set, &set);
#endif
}

std::vector<int> affinity() {
  std::vector<int> cpus;
#if defined(__linux__)
  cpu_set_t set;
  if (pthread_getaffinity_np(pthread_self(), sizeof set, &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
#endif
  return cpus;
}

// A thread that calls a pool is bound by its first region, and free again once it says so or the pool is
// gone, whichever thread destroys it: binding and freeing it takes the kernel longer than a barrier, and a
// step has hundreds of regions.
struct Caller {
  std::atomic<const Pool*> pool{nullptr};
  std::vector<int> cpus;  // before
  const pthread_t thread = pthread_self();

  Caller();
  ~Caller();
  void bind(const Pool* to, const std::vector<int>& to_cpus);
  void free(const Pool* from);
};

// Those of all threads that live. Never destroyed: threads may end after static objects.
struct Callers {
  std::mutex changing;
  std::set<Caller*> all;
};
Callers& callers() {
  static Callers& found = *new Callers;
  return found;
}

Caller::Caller() {
  const std::lock_guard<std::mutex> one_at_a_time(callers().changing);
  callers().all.insert(this);
}

Caller::~Caller() {
  const std::lock_guard<std::mutex> one_at_a_time(callers().changing);
  callers().all.erase(this);
}

void Caller::bind(const Pool* to, const std::vector<int>& to_cpus) {
  const std::lock_guard<std::mutex> one_at_a_time(callers().changing);
  if (!pool) cpus = affinity();
  pin_to(to_cpus, thread);
  pool = to;
}

void Caller::free(const Pool* from) {  // while callers().changing is held: its thread lives
  if (pool != from) return;
  pin_to(cpus, thread);
  pool = nullptr;
}

thread_local Caller caller;

}  // namespace

std::atomic<int> Pool::forks_{0};

void Pool::throw_forked() {
  throw std::runtime_error("the threads of the CPU kernels do not survive a fork; load the model after it");
}

Pool::Pool(int threads, const std::string& topology, bool pin) : size_(threads), pin_(pin) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
  [[maybe_unused]] static const int counting = pthread_atfork(nullptr, nullptr, [] {
    ++forks_;
    new (&callers()) Callers;  // one thread is left, and another may have held the old one's mutex
    callers().all.insert(&caller);
  });
  nodes_ = parse_topology(topology);
  if (nodes() > threads) nodes_.resize(threads);
  size_t total = 0, before = 0;
  for (const Node& node : nodes_) total += std::max<size_t>(node.cores.size(), 1);
  int given = 0;
  for (const Node& node : nodes_) {  // threads in proportion to a node's cores, at least one each
    before += std::max<size_t>(node.cores.size(), 1);
    const int left = nodes() - static_cast<int>(node_threads_.size()) - 1;
    int until = static_cast<int>(before * threads / total);
    until = std::min(std::max(until, given + 1), threads - left);
    first_thread_.push_back(given);
    node_threads_.push_back(until - given);
    for (; given < until; ++given) node_of_.push_back(static_cast<int>(node_threads_.size()) - 1);
  }
  for (auto& set : counters_) set = std::vector<Counters>(size_);
  progress_ = std::vector<Progress>(size_);
  active_ = size_;
  starts_ = std::vector<Gate>(nodes());
  barriers_ = std::vector<Gate>(nodes());
  node_groups_ = std::vector<Arrivals>(nodes());
  all_nodes_.expected = nodes();
  int groups = 0;
  for (int t = 0; t < size_; ++t) {
    const int node = node_of_[t];
    if ((t - first_thread_[node]) % kGroup == 0) ++groups, ++node_groups_[node].expected;
    group_of_.push_back(groups - 1);
  }
  groups_ = std::vector<Arrivals>(groups);
  for (const int g : group_of_) ++groups_[g].expected;
  size_t cpus = 0;
  for (const Node& node : nodes_) cpus += all_cpus(node).size();
  if (cpus == 0) cpus = affinity().size();
  if (cpus == 0) cpus = std::thread::hardware_concurrency();  // the machine's
  if (threads > static_cast<int>(cpus)) impatient_ = Clock::duration::zero();
  try {
    for (int t = 1; t < size_; ++t)
      workers_.emplace_back([this, t] {
        const Node& node = nodes_[node_of_[t]];
        const bool alone = static_cast<int>(node.cores.size()) == node_threads_[node_of_[t]];
        if (pin_) pin_to(alone ? node.cores[t - first_thread_[node_of_[t]]] : all_cpus(node), pthread_self());
        loop(t);
      });
  } catch (const std::system_error& error) {
    const size_t started = workers_.size() + 1;
    end();
    throw std::invalid_argument("threads: got " + std::to_string(size_) + "; expected at most " +
                                std::to_string(started) + ", as the system starts no more (" + error.what() +
                                ")");
  }
}

void Pool::end() {
  stop_ = true;
  for (Gate& gate : starts_) gate.open();
  resume_gate_.open();
  for (auto& w : workers_) w.join();
}

Pool::~Pool() {
  end();
  if (forks_before_ != forks_) return;  // the other callers are threads of the process before
  const std::lock_guard<std::mutex> one_at_a_time(callers().changing);
  for (Caller* each : callers().all) each->free(this);
}

void Pool::free_caller() const {
  Caller& mine = caller;  // before the lock, which its constructor takes
  const std::lock_guard<std::mutex> one_at_a_time(callers().changing);
  mine.free(this);
}

Share Pool::share(int node, int units) const {
  const int64_t u = units, before = first_thread_[node];
  return {static_cast<int>(u * before / size_), static_cast<int>(u * (before + node_threads_[node]) / size_)};
}

bool Pool::take(int phase, int id, int set, int units, Taken& t) {
  const int node = node_of_[id], first = first_thread_[node], threads = node_threads_[node];
  for (; t.other < threads; ++t.other) {
    const int part = (id - first + t.other) % threads;
    const int64_t u = units;
    const int begin = static_cast<int>(u * part / threads), end = static_cast<int>(u * (part + 1) / threads);
    std::atomic<uint64_t>& taken = counters_[set][first + part].taken[phase];
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

// Every thread clears the counters that it uses in the next region, which nothing reads in this one. One
// thread would wait for the lines of all.
void Pool::work(int id, uint32_t region) {
  Team team(*this, id, region);
  for (auto& taken : counters_[1 - team.set_][id].taken) taken.store(0, std::memory_order_relaxed);
  for (int t = active_; id == 0 && t < size_; ++t)  // of those that rest
    for (auto& taken : counters_[1 - team.set_][t].taken) taken.store(0, std::memory_order_relaxed);
  try {
    call_(data_, team);
    progress_[id].set(region, Progress::kDone);
  } catch (const Left&) {
  } catch (...) {
    fail(team);
  }
}

// In the handler of an exception between two barriers, or after the last. Threads that do not fail come to
// the same next barrier, or to the end, and wait there for this one: none is further, and none that is behind
// can leave earlier. So this one finds out which it is, and if it is a barrier meets the others there once
// more.
void Pool::fail(const Team& team) {
  {
    const std::lock_guard<std::mutex> one_at_a_time(failing_);
    if (!failure_) failure_ = std::current_exception();
  }
  progress_[team.id_].set(team.region_, Progress::kFailed);
  leave_at_.store(team.barriers_ + 1, std::memory_order_relaxed);  // seen by all who meet this thread there
  if (at_barrier(team)) meet(team.id_);
}

// Waits for a thread that does not fail. If all do, it is the end.
bool Pool::at_barrier(const Team& team) const {
  for (;; std::this_thread::yield()) {
    bool all_failed = true;
    for (int t = 0, active = active_; t < active; ++t) {
      const uint64_t at = progress_[t].at.load(std::memory_order_acquire);
      const uint32_t region = static_cast<uint32_t>(at >> 32), barriers = static_cast<uint32_t>(at);
      const bool failed = region == team.region_ && barriers == Progress::kFailed;
      all_failed &= failed;
      if (region != team.region_ || failed || barriers == team.barriers_) continue;  // not there yet
      return barriers != Progress::kDone;
    }
    if (all_failed) return false;
  }
}

void Pool::start(void (*call)(void*, Team&), void* data) {
  if (pin_ && caller.pool != this)  // to the node alone: what the caller starts later inherits it
    caller.bind(this, all_cpus(nodes_[0]));
  adapt();
  call_ = call;
  data_ = data;
  const uint32_t region = starts_[0].opened.load(std::memory_order_relaxed) + 1;
  for (Gate& gate : starts_) gate.open();
  work(0, region);
  meet(0);
  if (!failure_) return;
  leave_at_.store(0, std::memory_order_relaxed);
  std::rethrow_exception(std::exchange(failure_, nullptr));
}

void Pool::loop(int id) {
  for (uint32_t region = 0;;) {
    starts_[node_of_[id]].wait(region, kAwake, impatient_);
    if (stop_) return;
    if (id >= active_.load(std::memory_order_relaxed)) {
      region = rest();
      continue;
    }
    work(id, ++region);
    arrive(id);  // thread 0 alone waits for the others
  }
}

// Sleeps until the thread is wanted again; the region before that one.
uint32_t Pool::rest() {
  const uint32_t seen = resume_gate_.opened.load(std::memory_order_acquire);
  resting_.fetch_add(1, std::memory_order_release);
  while (!stop_ && resume_gate_.opened.load(std::memory_order_acquire) == seen)
    resume_gate_.opened.wait(seen, std::memory_order_acquire);
  return resume_;
}

void Pool::set_active(int threads) {
  const int now = active_;
  threads = nodes() > 1 ? size_ : std::min(std::max(threads, 1), size_);
  if (threads == now || (threads > now && resting_.load(std::memory_order_acquire) < size_ - now)) return;
  for (int g = 0; g < static_cast<int>(groups_.size()); ++g)
    groups_[g].expected = std::min(std::max(threads - g * kGroup, 0), kGroup);
  node_groups_[0].expected = (threads + kGroup - 1) / kGroup;
  active_ = threads;
  if (threads < now) return;
  // Those that are still too many go back to rest at the next region.
  resting_ = 0;
  resume_ = starts_[0].opened.load(std::memory_order_relaxed);
  resume_gate_.open();
}

// Between two regions.
void Pool::adapt() {
  const int now = active_;
  if (now < size_ && Clock::now() >= rest_until_) return set_active(size_);
  const int starved = nodes() == 1 ? starved_.count(workers_, now) : 0;
  if (!starved) return;
  const Clock::time_point time = Clock::now();
  rest_ = time - rest_until_ > kLongRest ? kShortRest : std::min(2 * rest_, kLongRest);
  rest_until_ = time + rest_;
  set_active(now - starved);
}

bool Pool::Arrivals::last() {
  const int before_last = expected - 1;  // which may change once all have arrived
  if (arrived.fetch_add(1, std::memory_order_acq_rel) != before_last) return false;
  arrived.store(0, std::memory_order_relaxed);
  return true;
}

// Until the gate has opened since it was seen; after `most` the thread sleeps.
void Pool::Gate::wait(uint32_t seen, Clock::duration most, Clock::duration impatient,
                      Clock::duration* late) const {
  if (spin([&] { return opened.load(std::memory_order_acquire) != seen; }, most, impatient, late)) return;
  const Clock::time_point asleep = Clock::now();
  opened.wait(seen, std::memory_order_acquire);
  if (late) *late += Clock::now() - asleep;
}

void Pool::Gate::open() {
  opened.fetch_add(1);
  opened.notify_all();
}

void Pool::arrive(int id) {
  if (!groups_[group_of_[id]].last() || !node_groups_[node_of_[id]].last() || !all_nodes_.last()) return;
  // The caller's last: it may start a region as soon as its own is open, in which others read these gates.
  for (auto gate = barriers_.rbegin(); gate != barriers_.rend(); ++gate) gate->open();
}

void Pool::meet(int id) {
  if (size_ == 1) return;
  const Gate& gate = barriers_[node_of_[id]];
  const uint32_t seen = gate.opened.load(std::memory_order_acquire);
  arrive(id);
  if (id) return gate.wait(seen, kPatience, impatient_);
  Clock::duration late{};
  gate.wait(seen, kPatience, impatient_, &late);
  if (late > kImpatient) starved_.waited(late);
}

void Team::barrier() {
  pool_.progress_[id_].set(region_, ++barriers_);
  pool_.meet(id_);
  if (pool_.leave_at_.load(std::memory_order_relaxed) == barriers_) throw Pool::Left();
}

}  // namespace farthing
