#include "isa/probe.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "isa/kernels.h"
#include "isa/probe_kernels.h"

namespace farthing {
namespace {

constexpr int kPasses = 9;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

bool has(const char* isa) {
  return (" " + std::string(supported_kernels()) + " ").find(" " + std::string(isa) + " ") !=
         std::string::npos;
}

float read_sum(const float* x, long n) {
#if defined(__x86_64__)
  if (has("avx512_vnni")) return read_sum_avx512(x, n);
#endif
  float sums[16] = {};
  for (long i = 0; i < n; i += 16)
    for (int j = 0; j < 16; ++j) sums[j] += x[i + j];
  return sums[0] + sums[15];
}

template <class F>
double timed(int threads, F&& f) {
  std::vector<std::thread> team;
  const auto start = std::chrono::steady_clock::now();
  for (int t = 1; t < threads; ++t) team.emplace_back([&, t] { f(t); });
  f(0);
  for (auto& t : team) t.join();
  return seconds_since(start);
}

struct Unit {
  const char *name, *isa;
  double (*loop)(long);
};

#if defined(__x86_64__)
constexpr Unit kUnits[] = {{"avx2_int8", "avx2", avx2_int8_ops},
                           {"avx_vnni_int8", "avx_vnni", avx_vnni_int8_ops},
                           {"vnni_int8", "avx512_vnni", vnni_int8_ops},
                           {"amx_int8", "amx", amx_int8_ops}};
#else
constexpr Unit kUnits[] = {{"avx2_int8", "", nullptr},
                           {"avx_vnni_int8", "", nullptr},
                           {"vnni_int8", "", nullptr},
                           {"amx_int8", "", nullptr}};
#endif

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

}  // namespace

double read_bandwidth(int threads, size_t bytes) {
  const size_t n = bytes / sizeof(float) / (256 * threads) * (256 * threads);
  void* at = mmap(nullptr, n * sizeof(float), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(at, n * sizeof(float), MADV_HUGEPAGE);
#endif
  float* x = static_cast<float*>(at);
  const long share = static_cast<long>(n) / threads;
  std::vector<float> sums(threads);  // so that the reads are not dead
  timed(threads, [&](int t) { std::fill_n(x + t * share, share, 1.0f); });
  std::vector<double> rates;
  for (int pass = 0; pass < kPasses; ++pass)
    rates.push_back(static_cast<double>(n) * sizeof(float) /
                    timed(threads, [&](int t) { sums[t] = read_sum(x + t * share, share); }) / 1e9);
  munmap(at, n * sizeof(float));
  return sums[0] > 0.0f ? median(rates) : 0.0;
}

double peak_ops(const char* what, int threads) {
  const auto unit = std::find_if(std::begin(kUnits), std::end(kUnits),
                                 [&](const Unit& u) { return std::string(u.name) == what; });
  if (unit == std::end(kUnits))
    throw std::invalid_argument(
        "peak '" + std::string(what) +
        "' is unknown; expected 'avx2_int8', 'avx_vnni_int8', 'vnni_int8' or 'amx_int8'");
  if (!unit->loop || !has(unit->isa)) return 0.0;
  const long iterations = 4000000;
  std::vector<double> rates;
  for (int pass = 0; pass < kPasses; ++pass) {
    std::vector<double> done(threads);
    const double time = timed(threads, [&](int t) { done[t] = unit->loop(iterations); });
    double total = 0.0;
    for (double d : done) total += d;
    rates.push_back(total / time / 1e9);
  }
  return median(rates);
}

}  // namespace farthing
