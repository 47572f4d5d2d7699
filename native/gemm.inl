// Panels times rows, in every format. Included by kernels_*.cpp, compiled once a set of instructions.
//
// Sums run over K in the same order for every number of rows and every set of instructions (the quantized
// formats are exact integers within a group), so a token's result does not depend on its company.
namespace farthing {
namespace {

constexpr int kAhead = 4096;  // bytes of prefetch: what one core needs in flight

template <int M>
void panel_f32(const Matrix& w, const uint8_t* p, const Act& x, float* out, int ldo) {
  f32x16 acc[M] = {};
  for (int k = 0; k < w.k; ++k, p += 64) {
    const f32x16 v = load<f32x16>(p);
    prefetch(p + kAhead);
    for (int m = 0; m < M; ++m) acc[m] = fma(v, splat(x.f32[m * x.ld + k]), acc[m]);
  }
  for (int m = 0; m < M; ++m) store(out + m * ldo, acc[m]);
}

template <int M>
void panel_bf16(const Matrix& w, const uint8_t* p, const Act& x, float* out, int ldo) {
  f32x16 even[M] = {}, odd[M] = {};
  for (int k = 0; k < w.k; k += 2, p += 64) {
    const u32x16 v = load<u32x16>(p);
    prefetch(p + kAhead);
    const f32x16 a = bits_to_float(v << 16), b = bits_to_float(v & 0xffff0000u);
    for (int m = 0; m < M; ++m) {
      even[m] = fma(a, splat(x.f32[m * x.ld + k]), even[m]);
      odd[m] = fma(b, splat(x.f32[m * x.ld + k + 1]), odd[m]);
    }
  }
  for (int m = 0; m < M; ++m) store(out + m * ldo, even[m] + odd[m]);
}

// e4m3 moved into a float16 is the value times 2^-8, subnormals included; the scale carries the 2^8.
inline f32x16 fp8_to_float(const uint8_t* p) {
  const u16x16 b = __builtin_convertvector(load<u8x16>(p), u16x16);
  const u16x16 half = (b & 0x80) << 8 | (b & 0x7f) << 7;
  return half_to_float(reinterpret_cast<const uint16_t*>(&half));
}

template <int M>
void panel_fp8(const Matrix& w, const uint8_t* p, const Act& x, float* out, int ldo) {
  const uint8_t* scales = p;
  p += w.head_bytes();
  f32x16 total[M] = {};
  for (int k0 = 0; k0 < w.kp; k0 += kActGroup, scales += 64) {
    f32x16 acc[M] = {};
    const int end = k0 + kActGroup < w.kp ? k0 + kActGroup : w.kp;
    for (int k = k0; k < end; ++k, p += 16) {
      const f32x16 v = fp8_to_float(p);
      if (k % 4 == 0) prefetch(p + kAhead);
      for (int m = 0; m < M; ++m) acc[m] = fma(v, splat(x.f32[m * x.ld + k]), acc[m]);
    }
    const f32x16 scale = load<f32x16>(scales) * 256.0f;
    for (int m = 0; m < M; ++m) total[m] = fma(acc[m], scale, total[m]);
  }
  for (int m = 0; m < M; ++m) store(out + m * ldo, total[m]);
}

// `columns` (a multiple of 8) of a quantized panel; two chains of sums where registers allow.
template <int M, Format F>
inline const uint8_t* dot_columns(const uint8_t* p, const int8_t* x, int ld, int columns, i32x16* acc, i32x16* more) {
  for (int k = 0; k < columns; k += 8) {
    bytes64 a = load_bytes(p), b;
    prefetch(p + kAhead);
    if constexpr (F == Format::q4) {
      b = high_nibbles(a);
      a = low_nibbles(a);
      p += 64;
    } else {
      b = load_bytes(p + 64);
      prefetch(p + kAhead + 64);
      p += 128;
    }
    for (int m = 0; m < M; ++m) {
      const int8_t* s = x + static_cast<size_t>(m) * ld + k;
      i32x16& second = M <= 4 ? more[m] : acc[m];
      acc[m] = F == Format::q4 ? dot4_nibble(acc[m], a, s) : dot4(acc[m], a, s);
      second = F == Format::q4 ? dot4_nibble(second, b, s + 4) : dot4(second, b, s + 4);
    }
  }
  return p;
}

// The blocks of one group that are not zero; each takes its own offset back out.
template <int M, Format F>
inline const uint8_t* dot_blocks(const uint8_t* p, const uint8_t* mask, const Act& x, int k, int end, i32x16* acc, i32x16* more) {
  for (; k < end; k += kBlock) {
    if (!(mask[k / 64] >> (k % 64 / kBlock) & 1)) continue;
    p = dot_columns<M, F>(p, x.q + k, x.ld, kBlock, acc, more);
    for (int m = 0; m < M; ++m) acc[m] += x.block_comp[m * x.blocks + k / kBlock];
  }
  return p;
}

template <int M, Format F>
void panel_quantized(const Matrix& w, const uint8_t* p, const Act& x, float* out, int ldo) {
  const uint8_t *mask = p, *rows = p + w.mask_bytes(), *scales = rows + 64;
  const int8_t* zeros = reinterpret_cast<const int8_t*>(scales + w.groups() * 32);
  p += w.head_bytes();
  f32x16 total[M] = {};
  for (int g = 0, k = 0; k < w.kp; ++g, k += w.group) {
    const int end = k + w.group < w.kp ? k + w.group : w.kp;
    i32x16 acc[M], more[M] = {};
    for (int m = 0; m < M; ++m) acc[m] = splati(w.sparse ? 0 : x.comp[m * x.groups + g]);
    if (w.sparse) p = dot_blocks<M, F>(p, mask, x, k, end, acc, more);
    else p = dot_columns<M, F>(p, x.q + k, x.ld, end - k, acc, more);
    const f32x16 scale = F == Format::q4 ? half_to_float(reinterpret_cast<const uint16_t*>(scales) + g * 16) : splat(1.0f);
    for (int m = 0; m < M; ++m) {
      i32x16 sum = acc[m] + more[m];
      if (w.zero) sum += __builtin_convertvector(load<i8x16>(zeros + g * 16), i32x16) * (x.comp[m * x.groups + g] / 8);
      const f32x16 s = F == Format::q4 ? scale * x.scale[m * x.groups + g] : splat(x.scale[m * x.groups + g]);
      total[m] = fma(to_float(sum), s, total[m]);
    }
  }
  const f32x16 row = load<f32x16>(rows);
  for (int m = 0; m < M; ++m) store(out + m * ldo, total[m] * row);
}

typedef void (*PanelKernel)(const Matrix&, const uint8_t*, const Act&, float*, int);

template <int M>
PanelKernel panel_kernel(Format f) {
  switch (f) {
    case Format::f32: return panel_f32<M>;
    case Format::bf16: return panel_bf16<M>;
    case Format::fp8: return panel_fp8<M>;
    case Format::q8: return panel_quantized<M, Format::q8>;
    default: return panel_quantized<M, Format::q4>;
  }
}

PanelKernel panel_kernel(Format f, int rows) {
  switch (rows) {
    case 1: return panel_kernel<1>(f);
    case 2: return panel_kernel<2>(f);
    case 3: return panel_kernel<3>(f);
    case 4: return panel_kernel<4>(f);
    case 5: return panel_kernel<5>(f);
    case 6: return panel_kernel<6>(f);
    case 7: return panel_kernel<7>(f);
    default: return panel_kernel<8>(f);
  }
}

void tile(const Matrix& w, int panel, int count, const Act& x, int rows, float* out, int ldo) {
  for (int i = 0; i < count; ++i) {
    const uint8_t* p = w.record(panel + i);
    for (int m = 0; m < rows; m += 8) {
      const int some = rows - m < 8 ? rows - m : 8;
      panel_kernel(w.format, some)(w, p, row(x, m), out + static_cast<size_t>(m) * ldo + 16 * i, ldo);
    }
  }
}

}  // namespace
}  // namespace farthing
