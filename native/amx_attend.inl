// Online softmax attention on AMX tiles: 64 bfloat16 keys against up to 16 query rows. Included by
// kernels_amx.cpp.
//
// Scores are computed transposed, [key][row]: then the tile's rows are the keys as stored in the cache.
// Queries and weights enter as hi + lo, so that only the cache itself is rounded to bfloat16.
namespace farthing {
namespace {

void score_tiles(const AttendBlock& b, float* scores) {  // [64 keys][16 rows]
  TileConfig c;
  for (int i = 0; i < 8; ++i) c.set(i, 16, 64);
  c.load();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int stride = b.k16_stride * 2;
  for (int k = b.first; k < b.width; k += 32) {
    _tile_loadd(6, b.q_hi + k * 16, 64);
    _tile_loadd(7, b.q_lo + k * 16, 64);
    const uint16_t* keys = b.k16 + k;
    _tile_loadd(4, keys, stride);
    _tile_loadd(5, keys + static_cast<size_t>(16) * b.k16_stride, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(0, 4, 7);
    _tile_dpbf16ps(1, 5, 7);
    _tile_loadd(4, keys + static_cast<size_t>(32) * b.k16_stride, stride);
    _tile_loadd(5, keys + static_cast<size_t>(48) * b.k16_stride, stride);
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(3, 5, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, scores, 64);
  _tile_stored(1, scores + 256, 64);
  _tile_stored(2, scores + 512, 64);
  _tile_stored(3, scores + 768, 64);
}

// 16 x 16 of 32 bits.
inline void transpose(const uint32_t* in, uint32_t* out, int ldo) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(in + 16 * i);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_store_si512(out + (i)*ldo, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_store_si512(out + (i + 8) * ldo, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    _mm512_store_si512(out + (i + 4) * ldo, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_store_si512(out + (i + 12) * ldo, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
  }
}

// scores [64][16] -> weights as tiles hi, lo [16 rows][64 keys] bfloat16; rescales out where a reference
// moved.
void weight_tiles(const AttendBlock& b, float* scores, uint16_t* hi, uint16_t* lo) {
  alignas(64) float top[16], sum[16], shrink[16];
  alignas(64) int32_t visible[16], hidden[16];
  for (int r = 0; r < 16; ++r) {
    const bool live = r < b.rows;
    top[r] = live ? b.max[r] : kLowest;
    sum[r] = live ? b.sum[r] : 0.0f;
    visible[r] = !live ? 0 : b.visible[r] < b.keys ? b.visible[r] : b.keys;
    hidden[r] = live && b.hidden ? b.hidden[r] : 0;
  }
  const __m512i last = _mm512_load_si512(visible), first = _mm512_load_si512(hidden);
  const auto seen = [&](int key) {
    const __m512i at = _mm512_set1_epi32(key);
    return _kand_mask16(_mm512_cmpgt_epi32_mask(last, at), _mm512_cmple_epi32_mask(first, at));
  };
  f32x16 best = loadf(top);
  for (int s = 0; s < kKeyBlock; ++s) {
    const f32x16 v = _mm512_mask_blend_ps(seen(s), splat(kLowest), loadf(scores + 16 * s));
    store(scores + 16 * s, v);
    best = max(best, v);
  }
  best = best > loadf(top) + kSlack ? best : loadf(top);
  store(shrink, exp(loadf(top) - best));
  f32x16 total = loadf(sum) * loadf(shrink);
  alignas(64) uint32_t pairs_hi[32 * 16], pairs_lo[32 * 16];
  for (int s = 0; s < kKeyBlock; s += 2) {
    u32x16 high[2], low[2];
    for (int j = 0; j < 2; ++j) {
      const f32x16 e = _mm512_maskz_mov_ps(seen(s + j), exp(loadf(scores + 16 * (s + j)) - best));
      total += e;
      high[j] = float_to_bits(e) & 0xffff0000u;
      low[j] = float_to_bits(e - bits_to_float(high[j]));
    }
    store(pairs_hi + 8 * s, (high[0] >> 16) | high[1]);
    store(pairs_lo + 8 * s, (low[0] >> 16) | (low[1] & 0xffff0000u));
  }
  for (int i = 0; i < 2; ++i) {
    transpose(pairs_hi + 256 * i, reinterpret_cast<uint32_t*>(hi) + 16 * i, 32);
    transpose(pairs_lo + 256 * i, reinterpret_cast<uint32_t*>(lo) + 16 * i, 32);
  }
  store(top, best);
  store(sum, total);
  for (int r = 0; r < b.rows; ++r) {
    b.max[r] = top[r];
    b.sum[r] = sum[r];
    if (b.fresh || shrink[r] == 1.0f) continue;
    float* o = b.out + static_cast<size_t>(r) * b.latent;
    for (int i = 0; i < b.latent; i += 16) store(o + i, loadf(o + i) * shrink[r]);
  }
}

// Two rows of 32 columns to pairs: [16 columns][2] twice.
alignas(64) const uint16_t kFirst[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

void mix_tiles(const AttendBlock& b, const uint16_t* hi, const uint16_t* lo) {
  TileConfig c;
  for (int i = 0; i < 4; ++i) c.set(4 + i, b.rows, 64);
  for (int i = 0; i < 2; ++i) c.set(i, b.rows, 64), c.set(2 + i, 16, 64);
  c.load();
  _tile_loadd(4, hi, 128);
  _tile_loadd(5, hi + 32, 128);
  _tile_loadd(6, lo, 128);
  _tile_loadd(7, lo + 32, 128);
  const __m512i first = _mm512_load_si512(kFirst), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  alignas(64) uint16_t values[2][2][16 * 32];  // [column block][key half]
  for (int at = 0; at < b.latent; at += 32) {
    for (int s = 0; s < kKeyBlock; s += 2) {
      const uint16_t* k = b.k16 + static_cast<size_t>(s) * b.k16_stride + at;
      const __m512i x = _mm512_loadu_si512(k), y = _mm512_loadu_si512(k + b.k16_stride);
      _mm512_store_si512(values[0][s / 32] + s % 32 * 16, _mm512_permutex2var_epi16(x, first, y));
      _mm512_store_si512(values[1][s / 32] + s % 32 * 16, _mm512_permutex2var_epi16(x, second, y));
    }
    float* o = b.out + at;
    stored();
    if (b.fresh) {
      _tile_zero(0);
      _tile_zero(1);
    } else {
      _tile_loadd(0, o, b.latent * 4);
      _tile_loadd(1, o + 16, b.latent * 4);
    }
    _tile_loadd(2, values[0][0], 64);
    _tile_loadd(3, values[1][0], 64);
    _tile_dpbf16ps(0, 4, 2);
    _tile_dpbf16ps(1, 4, 3);
    _tile_dpbf16ps(0, 6, 2);
    _tile_dpbf16ps(1, 6, 3);
    _tile_loadd(2, values[0][1], 64);
    _tile_loadd(3, values[1][1], 64);
    _tile_dpbf16ps(0, 5, 2);
    _tile_dpbf16ps(1, 5, 3);
    _tile_dpbf16ps(0, 7, 2);
    _tile_dpbf16ps(1, 7, 3);
    _tile_stored(0, o, b.latent * 4);
    _tile_stored(1, o + 16, b.latent * 4);
  }
}

void amx_attend(const AttendBlock& b) {
  if (!b.k16) return attend(b);
  alignas(64) float scores[kKeyBlock * 16];
  alignas(64) uint16_t hi[16 * kKeyBlock], lo[16 * kKeyBlock];
  score_tiles(b, scores);
  weight_tiles(b, scores, hi, lo);
  mix_tiles(b, hi, lo);
  _tile_release();
}

}  // namespace
}  // namespace farthing
