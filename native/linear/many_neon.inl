// How many rows are multiplied with NEON, for many_rows.inl.
//
// Where the processor multiplies matrices of bytes (usmmla), a product takes eight columns of two rows and of
// two outputs, twice the work of usdot: weights are unpacked in this order, and pairs of rows are brought
// into it. Elsewhere products are those of few rows.
namespace farthing {
namespace {

#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int kTogether = 6;  // rows whose sums fit in registers
constexpr int kRowStep = 2;   // rows that a product takes at once
#else
constexpr int kTogether = 4, kRowStep = 1;
#endif
constexpr bool kStartsAtComp = true;  // sums, at the compensation of a row, unless starts_at_zero
constexpr bool makes_rows(Format) { return kRowStep > 1; }
constexpr size_t kMadeBytes = kMostGroup;  // of a row that is brought into another form

// A group of a panel: bytes [K/4][16][4], or [K/8][8][2][8]; nothing that sums start at.
struct Unpacked {
  alignas(64) uint8_t w[kMostGroup * kPanel];
  const int16_t* start = nullptr;
};

// The registers of 64 bytes, in their order.
struct Quarters {
  uint8x16_t of[4];
  explicit Quarters(const bytes64& v)
      : of{(uint8x16_t)v.a.a, (uint8x16_t)v.a.b, (uint8x16_t)v.b.a, (uint8x16_t)v.b.b} {}
};

// `columns` of a panel, from `data`: the bytes that products take.
template <Format F>
inline const uint8_t* unpack_group(const uint8_t* data, int columns, Unpacked& to) {
  constexpr int step = traits(F).step(), bytes = step * stream_bytes(F);
  if constexpr (kRowStep == 1 && in_bytes(F) && !is_signed(F)) return data;
  uint8_t* w = to.w;
  for (int k = 0; k < columns; k += step, data += bytes, w += step * kPanel)
    for_quads<F>([&]<int I>() __attribute__((always_inline)) {
      if constexpr (kRowStep == 1) {
        store(w + 64 * I, quad<F, I>(data));
      } else if constexpr (I % 2 == 0) {
        const Quarters first(quad<F, I>(data)), second(quad<F, I + 1>(data));
        EACH (int i = 0; i < 4; ++i) {
          const uint32x4_t a = vreinterpretq_u32_u8(first.of[i]), b = vreinterpretq_u32_u8(second.of[i]);
          vst1q_u8(w + 64 * I + 32 * i, vreinterpretq_u8_u32(vzip1q_u32(a, b)));
          vst1q_u8(w + 64 * I + 32 * i + 16, vreinterpretq_u8_u32(vzip2q_u32(a, b)));
        }
      }
    });
  return to.w;
}

// Pairs of rows at a group, [K/8][2][8]; the last one's second is zeros where rows are odd.
inline void make_rows(const Act& x, int rows, int k, int columns, uint8_t* to) {
  for (int m = 0; m < rows; m += 2, to += 2 * kMadeBytes) {
    const int8_t* q = x.q + static_cast<size_t>(m) * x.ld + k;
    for (int i = 0; i < columns; i += 16) {
      const int64x2_t a = vreinterpretq_s64_s8(vld1q_s8(q + i));
      const int64x2_t b = m + 1 < rows ? vreinterpretq_s64_s8(vld1q_s8(q + x.ld + i)) : vdupq_n_s64(0);
      vst1q_u8(to + 2 * i, vreinterpretq_u8_s64(vzip1q_s64(a, b)));
      vst1q_u8(to + 2 * i + 16, vreinterpretq_u8_s64(vzip2q_s64(a, b)));
    }
  }
}

template <Format F>
inline const uint8_t* rows_at(const Act& x, int k) {
  return reinterpret_cast<const uint8_t*>(x.q) + k;
}
inline bool has_rows(const Act&) { return true; }

// Sums of M rows over the columns of a group. x: bytes of the rows, or pairs of them. next: what is
// prefetched into L2 meanwhile, at an even rate.
#if defined(__ARM_FEATURE_MATMUL_INT8)
template <int M, Format F>
[[gnu::always_inline]] inline void sum_group(const uint8_t* w, const int16_t*, int columns, const uint8_t* x,
                                             size_t ld, const uint8_t* next, i32x16 (&sums)[M]) {
  constexpr int pairs = (M + 1) / 2;
  int32x4_t acc[pairs * 8] = {};  // of two outputs, each two rows
  for (int k = 0; k < columns; k += 8, w += 128) {
    prefetch_far(next + k * stream_bytes(F));
    int8x16_t of_rows[pairs];
    EACH (int p = 0; p < pairs; ++p) of_rows[p] = vreinterpretq_s8_u8(vld1q_u8(x + 2 * (p * ld + k)));
    EACH (int i = 0; i < 8; ++i) {
      const uint8x16_t u = vld1q_u8(w + 16 * i);
      EACH (int p = 0; p < pairs; ++p) acc[8 * p + i] = vusmmlaq_s32(acc[8 * p + i], u, of_rows[p]);
    }
  }
  typedef decltype(i32x16::a.a) four;
  EACH (int m = 0; m < M; ++m) {
    const auto at = [&](int i) __attribute__((always_inline)) {
      const int32x4_t a = acc[m / 2 * 8 + 2 * i], b = acc[m / 2 * 8 + 2 * i + 1];
      return (four)(m % 2 ? vuzp2q_s32(a, b) : vuzp1q_s32(a, b));
    };
    sums[m] += i32x16{{at(0), at(1)}, {at(2), at(3)}};
  }
}
#else
template <int M, Format F>
[[gnu::always_inline]] inline void sum_group(const uint8_t* w, const int16_t*, int columns, const uint8_t* x,
                                             size_t ld, const uint8_t* next, i32x16 (&sums)[M]) {
  for (int k = 0; k < columns; k += 16) {
    int8x16_t s[M];
    EACH (int m = 0; m < M; ++m) s[m] = vreinterpretq_s8_u8(vld1q_u8(x + m * ld + k));
    for_quads<F, 16>([&]<int I>() __attribute__((always_inline)) {
      prefetch_far(next + (k + 4 * I) * stream_bytes(F));
      const bytes64 v = load_bytes(w);
      w += 64;
      asm("" : "+r"(w));
      EACH (int m = 0; m < M; ++m) sums[m] = dot4_of_lane<I, true>(sums[m], v, s[m]);
    });
  }
}
#endif

}  // namespace
}  // namespace farthing
