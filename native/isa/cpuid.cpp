// Which kernels this processor and this operating system can run, how far they prefetch, and their tiles.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "isa/kernels.h"
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace farthing {
namespace {

#if defined(__x86_64__)
constexpr int kRequestTilePermission = 0x1023;  // arch_prctl(ARCH_REQ_XCOMP_PERM)
constexpr int kTileData = 18;

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx_vnni() {
  unsigned a, b, c, d;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}

#if defined(FARTHING_EMULATE_AMX)
bool has_amx() { return has_avx512_bf16(); }
#else
bool has_amx() {
  unsigned a, b, c, d;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;  // its kernels use both
  const bool bf16 = d >> 22 & 1, tile = d >> 24 & 1, int8 = d >> 25 & 1;
  // Linux gives tile state only to processes that ask; threads started later inherit the permission.
  return bf16 && tile && int8 && syscall(SYS_arch_prctl, kRequestTilePermission, kTileData) == 0;
}
#endif
#elif defined(__APPLE__)
bool has_feature(const char* name) {
  int found = 0;
  size_t size = sizeof found;
  return sysctlbyname((std::string("hw.optional.arm.") + name).c_str(), &found, &size, nullptr, 0) == 0 &&
         found;
}

bool has_dotprod() { return has_feature("FEAT_DotProd"); }
bool has_i8mm() { return has_dotprod() && has_feature("FEAT_I8MM"); }
bool has_bf16() { return has_i8mm() && has_feature("FEAT_BF16"); }
#elif defined(__aarch64__)
// Bits of the kernel's interface, which older headers do not name.
constexpr unsigned long kDotProducts = 1ul << 20;              // HWCAP_ASIMDDP
constexpr unsigned long kI8mm = 1ul << 13, kBf16 = 1ul << 14;  // HWCAP2_I8MM, HWCAP2_BF16

bool has_dotprod() { return getauxval(AT_HWCAP) & kDotProducts; }
bool has_i8mm() { return has_dotprod() && (getauxval(AT_HWCAP2) & kI8mm); }
bool has_bf16() { return has_i8mm() && (getauxval(AT_HWCAP2) & kBf16); }
#endif

struct Choice {
  const Kernels* kernels;
  bool (*runs)();
};

const Choice kChoices[] = {
#if defined(__x86_64__)
    {&kernels_amx, has_amx},
    {&kernels_avx512_bf16, has_avx512_bf16},
    {&kernels_avx512, has_avx512},
    {&kernels_avx_vnni, has_avx_vnni},
    {&kernels_avx2, has_avx2},
#elif defined(__aarch64__)
    {&kernels_neon_bf16, has_bf16},
    {&kernels_neon_i8mm, has_i8mm},
    {&kernels_neon_dotprod, has_dotprod},
#endif
    {&kernels_portable, [] { return true; }},
};

bool is_intel() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  return __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx;
#else
  return false;
#endif
}

struct Amd {                       // of Hygon, whose cores are Zen's, too
  unsigned family = 0, model = 0;  // 0: another vendor's

  bool is_zen4_or_older() const { return family && family < 0x1a; }
  // Strix Point and Krackan Point have Zen 5 cores whose vector units are 256 bits wide, as Zen 4's.
  bool has_half_units() const {
    return is_zen4_or_older() || (family == 0x1a && (model >> 4 == 2 || model >> 4 == 6));
  }
};

Amd amd() {
  Amd found;
#if defined(__x86_64__)
  constexpr unsigned hygon = 0x6f677948;  // "Hygo"
  unsigned a, b, c, d;
  if (!__get_cpuid(0, &a, &b, &c, &d) || (b != signature_AMD_ebx && b != hygon) ||
      !__get_cpuid(1, &a, &b, &c, &d))
    return found;
  const unsigned family = a >> 8 & 15;
  found.family = family + (family == 15 ? a >> 20 & 255 : 0);
  found.model = (a >> 4 & 15) | (a >> 12 & 0xf0);
#endif
  return found;
}

// Intel: measured on Emerald Rapids, whose memory takes 180 to 200 ns: 1.1x at 1, 8 and 16 rows. Zen 5: where
// memory read fast enough to tell; 512 bytes and more into L1 are slower there. Zen 4 loses a quarter of the
// bandwidth of one row at 4 KB, in all but bytes, which both distances suit alike.
PrefetchDistances distances_of_processor() {
  if (is_intel()) return {4096, 8192, 1024, kAnyRows, kAnyRows};
  if (amd().is_zen4_or_older()) return {512, 512, 256, 1, 4};
  return {4096, 8192, 256, kAnyRows, kAnyRows};
}

// The one instruction set that tests leave (make test-isa), or nothing.
std::string only_one() {
  const char* name = std::getenv("FARTHING_ISA");
  return name ? name : "";
}

bool offered(const Choice& c) {
  const std::string only = only_one();
  return (only.empty() || only == c.kernels->name) && c.runs();
}

}  // namespace

PrefetchDistances prefetch_distances = distances_of_processor();
bool one_product_a_cycle = amd().has_half_units();
bool fast_pairs = !is_intel();

const char* supported_kernels() {
  static const std::string names = [] {
    std::string s;
    for (const Choice& c : kChoices)
      if (offered(c)) s += (s.empty() ? "" : " ") + std::string(c.kernels->name);
    if (s.empty())
      throw std::invalid_argument("FARTHING_ISA: got '" + only_one() +
                                  "'; expected an instruction set of this processor");
    return s;
  }();
  return names.c_str();
}

const Kernels& select_kernels(const char* name) {
  const std::string wanted = name;
  for (const Choice& c : kChoices)
    if ((wanted == "auto" || wanted == c.kernels->name) && offered(c)) return *c.kernels;
  throw std::invalid_argument(
      "instruction set '" + wanted +
      "' is unknown or not supported by this processor; expected 'auto' or one of: " + supported_kernels());
}

}  // namespace farthing
