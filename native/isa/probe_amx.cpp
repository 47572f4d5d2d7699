#include <immintrin.h>

#include "isa/probe_kernels.h"

namespace farthing {

#if defined(FARTHING_EMULATE_AMX)
double amx_int8_ops(long) { return 0.0; }
#else
double amx_int8_ops(long iterations) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t columns[16];
    uint8_t rows[16];
  } config;
  for (int i = 0; i < 16; ++i) config.columns[i] = i < 8 ? 64 : 0, config.rows[i] = i < 8 ? 16 : 0;
  asm volatile("" ::: "memory");  // the compiler does not know that it is read
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (long i = 0; i < iterations / 16; ++i) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
  return static_cast<double>(iterations / 16) * 4 * 2 * 16 * 16 * 64;
}
#endif

}  // namespace farthing
