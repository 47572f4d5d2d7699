// Panels of FP8 times rows of bfloat16 pairs (Act::pairs): every weight is a bfloat16, every activation the
// sum of two. As many products as with floats, but weights become two registers of pairs instead of four of
// floats. Included by gemm.inl.
namespace farthing {
namespace {

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
constexpr bool kPairs = true;

// Four columns of 16 rows in the order in which unpacking them in lanes of 16 bytes makes pairs of columns.
struct Fp8Order {
  alignas(64) uint8_t at[64];
  constexpr Fp8Order() : at() {
    for (int row = 0; row < kPanel; ++row)
      for (int column = 0; column < 4; ++column)
        at[row / 4 * 16 + column / 2 * 8 + row % 4 * 2 + column % 2] =
            static_cast<uint8_t>(column * kPanel + row);
  }
};
constexpr Fp8Order kFp8Order;

struct Pairs {
  __m512i first, second;  // of columns 0, 1 and 2, 3
};

inline Pairs pairs_of(const uint8_t* p) {
  __m512i low, high;
  kFp8.look_up(_mm512_permutexvar_epi8(_mm512_load_si512(kFp8Order.at), load<__m512i>(p)), low, high);
  return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
}

// acc += products of pairs with the pair at p, or with one that several panels share.
inline void add_pairs(f32x16& acc, __m512i w, const uint8_t* p) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*reinterpret_cast<const char(*)[4]>(p)));
}
inline void add_pairs(f32x16& acc, __m512i w, __m512i x) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
}

// M rows by P panels: two chains of sums each, of every second pair of columns.
template <int M, int P>
struct PairSums {
  f32x16 first[P * M] = {}, second[P * M] = {};

  // Four columns of the panels by those of rows at `row`: hi, lo, hi, lo.
  [[gnu::always_inline]] void add(const Pairs (&w)[P], const uint8_t* row, const Strides& by) {
    const RowsAt<M> rows(row, by);
    EACH (int m = 0; m < M; ++m)
      EACH (int half = 0; half < 2; ++half) {
        const uint8_t *one = rows[m] + 4 * half, *two = one + 8;
        if constexpr (P == 1) {
          add_pairs(first[m], w[0].first, one);
          add_pairs(second[m], w[0].second, two);
        } else {
          const __m512i s = _mm512_set1_epi32(load<int32_t>(one)), t = _mm512_set1_epi32(load<int32_t>(two));
          EACH (int i = 0; i < P; ++i) {
            add_pairs(first[i * M + m], w[i].first, s);
            add_pairs(second[i * M + m], w[i].second, t);
          }
        }
      }
  }
};

// Columns become pairs while those before them are multiplied: otherwise one row would wait for them.
template <int M, int P>
void panels_pairs(const Matrix& w, int panel, const Act& x, Ahead ahead, float* out, int ldo) {
  const uint8_t *record[P], *data[P];
  Pairs pairs[2][P];
  EACH (int i = 0; i < P; ++i) {
    record[i] = w.record(panel + i), data[i] = record[i] + w.head_bytes();
    fetch_head<false>(record[i], data[i], ahead.of(i, 0));
    pairs[0][i] = pairs_of(data[i]);
  }
  const Strides by(x.ld * sizeof *x.pairs);
  const auto* row = reinterpret_cast<const uint8_t*>(x.pairs);
  f32x16 total[P * M] = {};
  for (int g = 0, k = 0; k < w.kp; ++g) {
    size_t far[P];
    for (int i = 0; i < P; ++i) far[i] = ahead.of(i, g);
    PairSums<M, P> sums;
    for (const int end = k + w.group < w.kp ? k + w.group : w.kp; k < end; k += 8)
      EACH (int half = 0; half < 2; ++half, row += 16) {
        const size_t step = half == 0 || k + 8 < w.kp ? 64 : 0;
        EACH (int i = 0; i < P; ++i) {
          prefetch_far(data[i] + far[i]);
          data[i] += step;
          pairs[1 - half][i] = pairs_of(data[i]);
        }
        sums.add(pairs[half], row, by);
      }
    EACH (int i = 0; i < P; ++i) {
      const f32x16 scale = load<f32x16>(record[i] + g * 64);
      EACH (int m = 0; m < M; ++m) {
        const int at = i * M + m;
        total[at] = fma(sums.first[at] + sums.second[at], scale, total[at]);
      }
    }
  }
  EACH (int i = 0; i < P; ++i)
    EACH (int m = 0; m < M; ++m) store(out + m * ldo + 16 * i, total[i * M + m]);
}

template <int P, int M>
PanelKernel pairs_of_rows(int rows) {
  if constexpr (M > 1)
    if (rows < M) return pairs_of_rows<P, M - 1>(rows);
  return panels_pairs<M, P>;
}

PanelKernel pairs_kernel(int panels, int rows) {
  return panels == 1 ? pairs_of_rows<1, kLongRows>(rows) : pairs_of_rows<kPanelsAtOnce, kRowsAtOnce>(rows);
}
#else
constexpr bool kPairs = false;
PanelKernel pairs_kernel(int, int) { return nullptr; }
#endif

}  // namespace
}  // namespace farthing
