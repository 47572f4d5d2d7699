// Online softmax attention on AMX tiles: up to 128 bfloat16 keys against up to 64 query rows. Keys are exact;
// queries and weights are rounded to bfloat16, sums are float32. Included by kernels_amx.cpp.
//
// Scores are computed transposed, [key][row]: then the rows of a tile are 16 keys where the cache has them.
// Weights become tiles of [row][key], and the values of 32 columns are interleaved by pairs of keys once for
// all rows.
namespace farthing {
namespace {

constexpr int kAmxKeys = kTileBlock.keys;  // of a block
constexpr int kTileCells = 256;            // floats of a tile, or pairs
constexpr int kScoreColumns = 192;         // of two tiles of queries that stay in L1 while keys pass

// Prefetches the next block's rows into L2 at an even rate while this one is computed.
class NextRows {
 public:
  NextRows(const AttendBlock& b, int steps)
      : rows_(b.rows16 + kAmxKeys), bytes_(b.row_bytes), rate_((kAmxKeys << 16) / steps + 1) {}

  void advance(int steps) {
    due_ += rate_ * steps;
    for (; done_ < kAmxKeys && done_ < due_ >> 16; ++done_) {
      const auto* row = reinterpret_cast<const uint8_t*>(rows_[done_]);
      for (int i = 0; i < bytes_; i += 64) prefetch_far(row + i);
    }
  }

 private:
  const uint16_t* const* rows_;
  const int bytes_, rate_;  // rows a step, in 1 / 65536
  int due_ = 0, done_ = 0;
};

// Scores of K x 16 keys and R x 16 rows, added up from column `from` to `to`. Row tiles are kAmxKeys apart.
template <int K, int R>
inline void score_tiles(const AttendBlock& b, const uint16_t* const* keys, const uint16_t* q, int from,
                        int to, float* scores, NextRows& next) {
  static_assert(R == 1 ? K <= 4 : R == 2 && K <= 2);
  constexpr int kOther =
      R == 2 ? kAmxKeys * 16 : 2 * kTileCells;  // from scores of tiles 0, 1 to those of 2, 3
  float *second = scores + kTileCells, *third = scores + kOther, *fourth = third + kTileCells;
  const int stride = b.width * 2;
  if (from > b.first) {
    _tile_loadd(0, scores, 64);
    if constexpr (K > 1) _tile_loadd(1, second, 64);
    if constexpr (K > 2 || R > 1) _tile_loadd(2, third, 64);
    if constexpr (K > 3 || R * K > 2) _tile_loadd(3, fourth, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int k = from; k < to; k += 32) {
    _tile_loadd(4, keys[0] + k, stride);
    _tile_loadd(6, q + k * 16, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (R > 1) {
      _tile_loadd(7, q + static_cast<size_t>(16) * b.width + k * 16, 64);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (K > 1) {
      _tile_loadd(5, keys[16] + k, stride);
      _tile_dpbf16ps(1, 5, 6);
      if constexpr (R > 1) _tile_dpbf16ps(3, 5, 7);
    }
    if constexpr (K > 2) {
      _tile_loadd(4, keys[32] + k, stride);
      _tile_dpbf16ps(2, 4, 6);
    }
    if constexpr (K > 3) {
      _tile_loadd(5, keys[48] + k, stride);
      _tile_dpbf16ps(3, 5, 6);
    }
    next.advance(K * R);
  }
  _tile_stored(0, scores, 64);
  if constexpr (K > 1) _tile_stored(1, second, 64);
  if constexpr (K > 2 || R > 1) _tile_stored(2, third, 64);
  if constexpr (K > 3 || R * K > 2) _tile_stored(3, fourth, 64);
}

// scores [R][kAmxKeys][16]
template <int R>
void score_rows(const AttendBlock& b, const uint16_t* q, float* scores, NextRows& next) {
  constexpr int kMost = R == 1 ? 4 : 2;
  const int groups = (b.keys + 15) / 16;
  for (int from = b.first; from < b.width; from += kScoreColumns) {
    const int to = from + kScoreColumns < b.width ? from + kScoreColumns : b.width;
    const auto some = [&]<int K>(int g) {
      score_tiles<K, R>(b, b.rows16 + 16 * g, q, from, to, scores + g * kTileCells, next);
    };
    int g = 0;
    for (; g + kMost <= groups; g += kMost) some.template operator()<kMost>(g);
    if constexpr (R == 1)
      if (g + 2 <= groups) some.template operator()<2>(g), g += 2;
    if (g < groups) some.template operator()<1>(g);
  }
}

struct RowsSeen {  // keys of the block that each of 16 rows sees
  __m512i last, first;
  bool all;

  __mmask16 at(int key) const {
    const __m512i k = _mm512_set1_epi32(key);
    return _kand_mask16(_mm512_cmpgt_epi32_mask(last, k), _mm512_cmple_epi32_mask(first, k));
  }
};

inline RowsSeen rows_seen(const AttendBlock& b, int row, int rows, int keys) {
  alignas(64) int32_t visible[16] = {}, hidden[16] = {};
  bool all = rows == 16;
  for (int r = 0; r < rows; ++r) {
    visible[r] = b.visible[row + r] < b.keys ? b.visible[row + r] : b.keys;
    hidden[r] = b.hidden ? b.hidden[row + r] : 0;
    all = all && visible[r] >= keys && hidden[r] <= 0;
  }
  return {_mm512_load_si512(visible), _mm512_load_si512(hidden), all};
}

// The largest of `best` and of the scores that each row sees; those of other keys are hidden.
template <bool All>
inline f32x16 largest_seen(const RowsSeen& seen, float* scores, int keys, f32x16 best) {
  f32x16 most[4] = {best, best, best, best};
  for (int s = 0; s < keys; s += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* at = scores + 16 * (s + i);
      f32x16 v = loadf(at);
      if (!All) store(at, v = _mm512_mask_blend_ps(seen.at(s + i), splat(kHidden), v));
      most[i] = max(most[i], v);
    }
  return max(max(most[0], most[1]), max(most[2], most[3]));
}

// scores [keys][16] of rows from `row` on -> weights as tiles [keys / 32][16 rows][32 keys] of bfloat16, keys
// rounded up to 32; rescales out where a reference moved.
void weight_tiles(const AttendBlock& b, int row, float* scores, uint16_t* weights) {
  const int rows = b.rows - row < 16 ? b.rows - row : 16, keys = round_up(b.keys, 32);
  const __mmask16 live = static_cast<__mmask16>((1u << rows) - 1);
  const f32x16 before = max(splat(kUnseen), _mm512_mask_loadu_ps(splat(kUnseen), live, b.max + row));
  const RowsSeen seen = rows_seen(b, row, rows, keys);
  const f32x16 largest = (seen.all ? largest_seen<true> : largest_seen<false>)(seen, scores, keys, before);
  const f32x16 best = largest > before + kSlack ? largest : before;
  const f32x16 shrink = exp(before - best), log2e = splat(1.44269504f), offset = best * log2e;
  f32x16 total = f32x16(_mm512_maskz_loadu_ps(live, b.sum + row)) * shrink;
  alignas(64) float pairs[kTileCells];  // [16 pairs of keys][16 rows]
  for (int s = 0; s < keys; s += 32) {
    for (int i = 0; i < 32; i += 2) {
      const float* at = scores + 16 * (s + i);
      const __m512 even = exp2_short(_mm512_fmsub_ps(loadf(at), log2e, offset)),
                   odd = exp2_short(_mm512_fmsub_ps(loadf(at + 16), log2e, offset));
      total += f32x16(even) + f32x16(odd);
      _mm512_store_si512(pairs + 8 * i, pair_up(even, odd));
    }
    transpose16(pairs, 16, reinterpret_cast<float*>(weights) + 8 * s, 16);
  }
  _mm512_mask_storeu_ps(b.max + row, live, best);
  _mm512_mask_storeu_ps(b.sum + row, live, total);
  if (b.fresh || !_mm512_mask_cmp_ps_mask(live, shrink, splat(1.0f), _CMP_NEQ_UQ)) return;
  alignas(64) float by[16];
  store(by, shrink);
  for (int r = 0; r < rows; ++r) {
    if (by[r] == 1.0f) continue;
    float* o = b.out + static_cast<size_t>(row + r) * b.latent;
    for (int i = 0; i < b.latent; i += 16) store(o + i, loadf(o + i) * by[r]);
  }
}

// 32 columns of values [begin, end) to tiles of pairs: [2 x 16 columns][kAmxKeys / 32][16 pairs][16][2].
inline void interleave(const uint16_t* const* rows, int at, int begin, int end, uint16_t* values) {
  alignas(64) static constexpr uint16_t low[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                   37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                   11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(low), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  for (int s = begin; s < end; s += 2) {
    const __m512i x = _mm512_loadu_si512(rows[s] + at), y = _mm512_loadu_si512(rows[s + 1] + at);
    _mm512_store_si512(values + 16 * s, _mm512_permutex2var_epi16(x, first, y));
    _mm512_store_si512(values + 16 * (kAmxKeys + s), _mm512_permutex2var_epi16(x, second, y));
  }
}

// out [R x 16 rows][32 columns] += weights x values; each row tile has 16 kAmxKeys weights.
template <int R>
inline void mix_tiles(const AttendBlock& b, const uint16_t* weights, const uint16_t* values, int keys,
                      float* out) {
  const int stride = b.latent * 4;
  float* other = out + static_cast<size_t>(16) * b.latent;
  if (b.fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, out, stride);
    _tile_loadd(1, out + 16, stride);
    if constexpr (R > 1) _tile_loadd(2, other, stride);
    if constexpr (R > 1) _tile_loadd(3, other + 16, stride);
  }
  for (int s = 0; s < keys; s += 32) {
    _tile_loadd(4, weights + 16 * s, 64);
    _tile_loadd(6, values + 16 * s, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, values + 16 * (kAmxKeys + s), 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (R > 1) {
      _tile_loadd(5, weights + 16 * (kAmxKeys + s), 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, stride);
  _tile_stored(1, out + 16, stride);
  if constexpr (R > 1) _tile_stored(2, other, stride);
  if constexpr (R > 1) _tile_stored(3, other + 16, stride);
}

// The values of the next 32 columns are interleaved between the products of these.
void mix_rows(const AttendBlock& b, const uint16_t* weights, int steps, NextRows& next) {
  alignas(64) uint16_t values[2][2 * kAmxKeys * 16];
  const int tiles = (b.rows + 15) / 16, keys = round_up(b.keys, 32),
            part = round_up(keys / ((tiles + 1) / 2), 2);
  interleave(b.rows16, 0, 0, keys, values[0]);
  for (int at = 0, side = 0; at < b.latent; at += 32, side ^= 1) {
    for (int t = 0, from = 0; t < tiles; t += 2, from += part) {
      const int to = from + part < keys ? from + part : keys;
      if (at + 32 < b.latent) interleave(b.rows16, at + 32, from, to, values[side ^ 1]);
      stored();
      const uint16_t* w = weights + 16 * t * kAmxKeys;
      float* out = b.out + static_cast<size_t>(16 * t) * b.latent + at;
      if (t + 1 < tiles) mix_tiles<2>(b, w, values[side], keys, out);
      else mix_tiles<1>(b, w, values[side], keys, out);
    }
    next.advance(steps);
  }
}

void amx_attend(const AttendBlock& b) {
  if (!b.rows16) return attend(b);
  alignas(64) float scores[2 * kAmxKeys * 16];
  alignas(64) uint16_t weights[kTileBlock.rows * kAmxKeys];
  TileConfig c;
  for (int i = 0; i < 8; ++i) c.set(i, 16, 64);
  c.load();
  // In products; interleaving the values of 32 columns takes about as long as 16.
  const int tiles = (b.rows + 15) / 16, groups = (b.keys + 15) / 16, steps = groups * tiles + 16;
  NextRows next(b, groups * tiles * ((b.width - b.first) / 32) + steps * (b.latent / 32));
  for (int t = 0; t < tiles; t += 2) {
    const uint16_t* q = b.q16 + static_cast<size_t>(16 * t) * b.width;
    const bool both = t + 1 < tiles;
    if (both) score_rows<2>(b, q, scores, next);
    else score_rows<1>(b, q, scores, next);
    for (int i = 0; i <= both; ++i)
      weight_tiles(b, 16 * (t + i), scores + i * kAmxKeys * 16, weights + 16 * (t + i) * kAmxKeys);
  }
  mix_rows(b, weights, steps, next);
  _tile_release();
}

}  // namespace
}  // namespace farthing
