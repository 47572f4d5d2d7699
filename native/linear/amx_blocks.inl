// Panels times many rows on AMX tiles, in blocks of columns. Included by kernels_amx.cpp.
//
// A block of a row's activations shares one scale. 8-bit weights are used in place; others become bytes whose
// unit is 1/127 of the output's largest weight in the block. So tiles sum a whole block in integers, and its
// sums enter the float sums once. Rounding the weights adds a squared error of about 1e-4 of theirs, 4 bits
// have 1e-2. A row's block with outliers is multiplied twice, as integers and what they leave of it. bfloat16
// matrices take the same way with activations rounded to bfloat16.
//
// Tiles multiply for 64 cycles per 64 bytes of 32 rows. Vectors meanwhile scale the sums of the 32 rows
// before and make the next pair of panels' bytes, so that a step takes as long as the longer of both.
namespace farthing {
namespace {

constexpr int kStepBytes = 64;                        // of a row that tiles multiply at once
constexpr int kMostFactors = kBlockColumns / 16 + 1;  // groups of a block
constexpr size_t kCachedRows = size_t{512} << 10;  // bytes of activations that stay in L2 from panel to panel
constexpr int kSumColumns = 2 * kPanel;

// The instructions name their tiles, so these are no template's arguments.
#define DOT(sums, rows, panel)                               \
  do {                                                       \
    if constexpr (Halves) _tile_dpbf16ps(sums, rows, panel); \
    else _tile_dpbsud(sums, rows, panel);                    \
  } while (false)

// What makes 16-bit fixed-point numbers of a group's bytes.
struct Factors {
  __m512i times, plus;
};

// Stored integers or codes as signed bytes: spread * code, or spread * integer - centre.
struct Spread {
  int spread, centre, low, high;
  float middle;  // of a byte 0, in units of the group's scale
  alignas(16) int8_t table[16];
};

constexpr Spread spread_of(const FormatTraits& f) {
  Spread s{};
  if (f.codes) {
    int top = 0;
    for (const int8_t c : f.codes->of) top = c > top ? c : -c > top ? -c : top;
    s.spread = 127 / top;
  } else {
    s.spread = 1 << (8 - f.bits);
    s.centre = 128 - s.spread / 2;
    s.middle = static_cast<float>(s.centre) / static_cast<float>(s.spread) + static_cast<float>(f.offset());
  }
  for (int i = 0; i < 16; ++i)
    s.table[i] = static_cast<int8_t>(f.codes ? f.codes->of[i] * s.spread : i * s.spread - s.centre);
  s.low = -s.centre, s.high = s.spread * ((1 << f.bits) - 1) - s.centre;
  for (int i = 0; i < 16 && f.codes; ++i) {
    if (s.table[i] < s.low) s.low = s.table[i];
    if (i == 0 || s.table[i] > s.high) s.high = s.table[i];
  }
  return s;
}

template <Format F>
constexpr Spread kSpread = spread_of(traits(F));

template <Format F>
inline __m512i spread_bytes(bytes64 stored) {
  constexpr FormatTraits f = traits(F);
  if constexpr (f.bits == 4) return ::look_up(reinterpret_cast<const uint8_t*>(kSpread<F>.table), stored);
  else
    return _mm512_sub_epi8(_mm512_slli_epi16(stored, 8 - f.bits),
                           _mm512_set1_epi8(static_cast<char>(kSpread<F>.centre)));
}

// Unsigned bytes, 128 for 0: in 16 bits twice, as the processor multiplies no bytes.
inline __m512i scale_bytes(__m512i bytes, const Factors& f) {
  const __m512i high = _mm512_set1_epi16(static_cast<short>(0xff00));
  const auto scaled = [&](__m512i v) { return _mm512_add_epi16(_mm512_mulhrs_epi16(v, f.times), f.plus); };
  const __m512i even = scaled(_mm512_slli_epi16(bytes, 8)), odd = scaled(_mm512_and_si512(bytes, high));
  return _mm512_ternarylogic_epi32(_mm512_srli_epi16(even, 8), odd, high, 0xf8);  // even | (odd & high)
}

// Integers of 16 bits in both halves of each lane.
inline __m512i twice(f32x16 v) {
  const __m512i i = _mm512_and_si512(_mm512_cvtps_epi32((__m512)v), _mm512_set1_epi32(0xffff));
  return _mm512_or_si512(i, _mm512_slli_epi32(i, 16));
}

// The factors of the groups of columns [k, k + columns) of a panel, and what a byte of it stands for.
template <Format F, bool Zero>
f32x16 weigh_groups(const Matrix& w, const uint8_t* record, int k, int columns, Factors* factors) {
  constexpr Spread s = kSpread<F>;
  constexpr FormatTraits f = traits(F);
  const int first = k / w.group, count = (k + columns - 1) / w.group + 1 - first;
  f32x16 rate[kMostFactors], shift[kMostFactors], top = {};
  for (int g = 0; g < count; ++g) {
    const GroupNumbers n = group_numbers<F, Zero>(w, record + 64, first + g);
    rate[g] = n.scale * (1.0f / s.spread);
    shift[g] = f.minimums ? fma(n.scale, splat(s.middle), n.minimum) : n.scale * s.middle;
    if constexpr (Zero) shift[g] -= n.scale * to_float(n.zero);
    const f32x16 low = abs(fma(rate[g], splat(s.low), shift[g])),
                 high = abs(fma(rate[g], splat(s.high), shift[g]));
    top = max(top, max(abs(rate[g]) * 127.0f, max(low, high)));  // a rate of at most 1 is a Q15 number
  }
  const f32x16 inverse = 127.0f / max(top, splat(1e-30f));
  for (int g = 0; g < count; ++g) {
    factors[g].times = twice(min(rate[g] * inverse * 32768.0f, splat(32767.0f)));
    factors[g].plus = _mm512_add_epi16(twice(shift[g] * inverse * 256.0f),
                                       _mm512_set1_epi16(static_cast<short>(0x8080)));  // 128, and a half
  }
  return top * (1.0f / 127.0f) * load<f32x16>(record);
}

// Up to 64 columns from column `k` of a panel as a tile. factors: from that of column k on.
template <Format F>
void make_bytes(const Matrix& w, const uint8_t* record, int k, int columns, const Factors* factors,
                uint8_t* out) {
  constexpr int step = traits(F).step(), bytes = step * traits(F).bytes_a_column();
  const uint8_t* p = record + w.head_bytes() + static_cast<size_t>(k) * traits(F).bytes_a_column();
  const int same = w.group < columns ? w.group : columns;
  for (int done = 0; done < columns; done += same, ++factors) {
    const Factors group = *factors;
    for (int i = 0; i < same; i += step, p += bytes, out += step * kPanel)
      for_quads<F>([&]<int I>() __attribute__((always_inline)) {
        _mm512_store_si512(out + 64 * I, scale_bytes(spread_bytes<F>(stored_quad<F, I>(p)), group));
      });
  }
}

// How a format's panels become bytes; null: they are used in place.
struct ToBytes {
  f32x16 (*weigh)(const Matrix& w, const uint8_t* record, int k, int columns, Factors* factors) = nullptr;
  void (*make)(const Matrix& w, const uint8_t* record, int k, int columns, const Factors* factors,
               uint8_t* out) = nullptr;
};

template <size_t... I>
ToBytes to_bytes(const Matrix& w, std::index_sequence<I...>) {
  ToBytes found;
  const auto try_one = [&]<Format F>() {
    if constexpr (traits(F).grouped()) {
      if (w.format == F) found = {weigh_groups<F, false>, make_bytes<F>};
      if constexpr (traits(F).zeros())
        if (w.format == F && w.zero) found.weigh = weigh_groups<F, true>;
    }
  };
  (try_one.template operator()<Format{I}>(), ...);
  return found;
}

// out [rows][ldo] = x times `count` panels. A step is a pair of panels in one block of columns.
template <bool Halves>
class Blocks {
 public:
  Blocks(const Matrix& w, int panel, int count, const Act& x, int rows, float* out, int ldo)
      : w_(w), x_(x), panel_(panel), count_(count), rows_(rows), out_(out), ldo_(ldo) {
    if constexpr (!Halves) to_bytes_ = to_bytes(w, std::make_index_sequence<std::size(kFormats)>());
    blocks_ = (w.kp + columns() - 1) / columns();
    pairs_ = (count + 1) / 2;
    // Panels one after the other are read as streams; but they all need the activations.
    whole_panels_ = static_cast<size_t>(rows) * w.kp * sizeof(Input) <= kCachedRows;
  }

  void run() {
    const int steps = blocks_ * pairs_, row_blocks = (rows_ + 31) / 32;
    configure();
    begin(0);
    ready(tiles_);
    for (int i = 0; i < steps; ++i) {
      const Step s = step(i);
      const Panels now = next_;
      if (i + 1 < steps) begin(i + 1);
      else tiles_ = done_ = 0;
      for (int r = 0; r < row_blocks; ++r) {
        multiply(s, now, r, false);
        if (has_rest(s, r)) multiply(s, now, r, true);
        ready(tiles_ * (r + 1) / row_blocks);
      }
    }
    flush(pending_, 0, pending_.rows);
  }

 private:
  using Input = std::conditional_t<Halves, uint16_t, int8_t>;
  using Sum = std::conditional_t<Halves, float, int32_t>;
  static constexpr int kStepColumns = kStepBytes / static_cast<int>(sizeof(Input));
  static constexpr int kParts =
      static_cast<int>(sizeof(Input));  // steps of a block, whose rows have as many bytes

  struct Step {
    int panel, panels, k, columns, block;
  };
  struct Panels {  // of a step, as tiles read them
    const uint8_t* data[2];
    f32x16 scale[2];
  };
  struct Pending {  // sums that are not in `out` yet
    int rows = 0, panels = 0, ldo = 0, groups = 0;
    bool fresh = false;
    const Sum* sums = nullptr;
    const float* scale = nullptr;
    const int32_t* comp = nullptr;
    float* out = nullptr;
    f32x16 of[2] = {};
  };

  int columns() const { return x_.ld / kParts; }
  Step step(int i) const {
    const int pair = whole_panels_ ? i / blocks_ : i % pairs_, b = whole_panels_ ? i % blocks_ : i / pairs_;
    const int k = b * columns(), left = w_.kp - k;
    return {panel_ + 2 * pair, count_ - 2 * pair < 2 ? 1 : 2, k, left < columns() ? left : columns(), b};
  }
  const Input* rows(const Step& s, int row_block, bool rest = false) const {
    const Input* x;
    if constexpr (Halves) x = x_.hi;
    else x = rest ? x_.rest : x_.q;
    return x + s.block / kParts * x_.block + static_cast<size_t>(row_block) * 32 * x_.ld +
           s.block % kParts * columns();
  }
  bool has_rest(const Step& s, int row_block) const {
    if constexpr (!Halves)
      for (int m = row_block * 32; m < rows_ && m < row_block * 32 + 32; ++m)
        if (x_.scale[static_cast<size_t>(m) * x_.groups + x_.blocks + s.block] != 0.0f) return true;
    return false;
  }
  static void configure() {
    TileConfig c;
    for (int i = 0; i < 8; ++i) c.set(i, 16, 64);
    c.load();
  }

  // The first step of the next panels, if this matrix has some.
  Step behind() const {
    const int panel = panel_ + count_, left = w_.panels - panel;
    return {panel, left < 2 ? left : 2, 0, columns() < w_.kp ? columns() : w_.kp, 0};
  }

  // The next step's panels, which `ready` makes tile by tile, prefetching those of the step after.
  void begin(int i) {
    making_ = step(i);
    after_ = i + 1 < blocks_ * pairs_ ? step(i + 1) : behind();
    made_ = made_ == bytes_ ? bytes_ + sizeof bytes_ / 2 : bytes_;
    tiles_ = making_.panels * ((making_.columns + kStepColumns - 1) / kStepColumns);
    done_ = 0;
    for (int p = 0; p < making_.panels; ++p) {
      const uint8_t* record = w_.record(making_.panel + p);
      if (to_bytes_.make) {
        next_.data[p] = made_ + p * (sizeof bytes_ / 4);
        next_.scale[p] = to_bytes_.weigh(w_, record, making_.k, making_.columns, factors_[p]);
      } else {
        next_.data[p] =
            record + w_.head_bytes() + static_cast<size_t>(making_.k) * w_.format_traits().bytes_a_column();
        if constexpr (!Halves) next_.scale[p] = load<f32x16>(record);
      }
    }
  }

  void ready(int until) {
    for (; done_ < until; ++done_) {
      const int p = done_ % making_.panels, at = done_ / making_.panels * kStepColumns;
      if (!to_bytes_.make) {
        fetch(making_, p, at);
        continue;
      }
      if (p < after_.panels && at < after_.columns) fetch(after_, p, at);
      const uint8_t* record = w_.record(making_.panel + p);
      const int left = making_.columns - at, some = left < kStepColumns ? left : kStepColumns;
      const int first = making_.k / w_.group, group = (making_.k + at) / w_.group - first;
      to_bytes_.make(w_, record, making_.k + at, some, factors_[p] + group,
                     made_ + p * (sizeof bytes_ / 4) + at * kPanel);
    }
  }

  // A tile of a panel, and with the first one the block's scales of groups.
  void fetch(const Step& s, int p, int at) const {
    const uint8_t* record = w_.record(s.panel + p);
    const int column = w_.format_traits().bytes_a_column();
    const uint8_t* data = record + w_.head_bytes() + static_cast<size_t>(s.k + at) * column;
    for (int i = 0; i < kStepColumns * column; i += 64) prefetch_far(data + i);
    if (at || !to_bytes_.make) return;
    for (int i = 0; i < s.columns / w_.group * 32; i += 64)
      prefetch_far(record + 64 + s.k / w_.group * 32 + i);
  }

  // Products of 32 rows, and meanwhile the sums of the rows before.
  void multiply(const Step& s, const Panels& w, int row_block, bool rest) {
    const bool both = rows_ - row_block * 32 > 16;
    if (s.panels == 2)
      both ? multiply_rows<2, 2>(s, w, row_block, rest) : multiply_rows<1, 2>(s, w, row_block, rest);
    else both ? multiply_rows<2, 1>(s, w, row_block, rest) : multiply_rows<1, 1>(s, w, row_block, rest);
  }

  template <int M, int N>
  void multiply_rows(const Step& s, const Panels& w, int row_block, bool rest) {
    const Pending before = pending_;
    const size_t ld = x_.ld, stride = ld * sizeof(Input);
    const int steps = (s.columns + kStepColumns - 1) / kStepColumns, left = rows_ - row_block * 32;
    const int share = (before.rows + steps - 1) / steps;
    const uint8_t *b = w.data[0], *c = w.data[N - 1];
    const Input* a = rows(s, row_block, rest);
    stored();
    _tile_zero(0);
    if (N == 2) _tile_zero(1);
    if (M == 2) _tile_zero(2);
    if (M == 2 && N == 2) _tile_zero(3);
    for (int i = 0, flushed = 0; i < steps; ++i, a += kStepColumns, b += 1024, c += 1024) {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, a, stride);
      DOT(0, 4, 6);
      if (N == 2) _tile_loadd(7, c, 64);
      if (N == 2) DOT(1, 4, 7);
      if (M == 2) _tile_loadd(5, a + 16 * ld, stride);
      if (M == 2) DOT(2, 5, 6);
      if (M == 2 && N == 2) DOT(3, 5, 7);
      const int until = flushed + share < before.rows ? flushed + share : before.rows;
      flush(before, flushed, until);
      flushed = until;
    }
    Sum* sums = before.sums == sums_[0] ? sums_[1] : sums_[0];
    _tile_stored(0, sums, kSumColumns * 4);
    if (N == 2) _tile_stored(1, sums + 16, kSumColumns * 4);
    if (M == 2) _tile_stored(2, sums + 16 * kSumColumns, kSumColumns * 4);
    if (M == 2 && N == 2) _tile_stored(3, sums + 16 * kSumColumns + 16, kSumColumns * 4);
    const size_t m = static_cast<size_t>(row_block) * 32,
                 at = m * x_.groups + s.block + (rest ? x_.blocks : 0);
    pending_ = {left < 32 ? left : 32,
                N,
                ldo_,
                x_.groups,
                s.block == 0 && !rest,
                sums,
                x_.scale + at,
                x_.comp + at,
                out_ + m * ldo_ + (s.panel - panel_) * kPanel,
                {w.scale[0], w.scale[1]}};
  }

  static void flush(const Pending& s, int from, int to) {
    const Sum* sum = s.sums + from * kSumColumns;
    float* out = s.out + static_cast<size_t>(from) * s.ldo;
    size_t at = static_cast<size_t>(from) * s.groups;
    for (int m = from; m < to; ++m, sum += kSumColumns, out += s.ldo, at += s.groups)
      for (int p = 0; p < s.panels; ++p) {
        const f32x16 total = s.fresh ? f32x16{} : loadf(out + 16 * p);
        if constexpr (Halves) store(out + 16 * p, total + loadf(sum + 16 * p));
        else
          store(out + 16 * p,
                fma(to_float(load<i32x16>(sum + 16 * p) + s.comp[at]), s.of[p] * s.scale[at], total));
      }
  }

  const Matrix& w_;
  const Act& x_;
  const int panel_, count_, rows_;
  float* out_;
  const int ldo_;
  int blocks_, pairs_;
  bool whole_panels_;
  ToBytes to_bytes_;
  Step making_{}, after_{};
  Panels next_{};
  int tiles_ = 0, done_ = 0;
  Pending pending_;
  uint8_t* made_ = nullptr;
  alignas(64) uint8_t bytes_[4 * kBlockColumns * kPanel];  // of two panels, and of the next two
  alignas(64) Sum sums_[2][32 * kSumColumns];
  Factors factors_[2][kMostFactors];
};

#undef DOT

// What is left of `columns` values whose integers are in x.q, if they have outliers: then one scale would
// round the others away.
void store_rest(const Act& x, size_t start, size_t number, const float* values, int columns) {
  constexpr float most = 8.0f;  // the largest value as a multiple of the root of the mean square
  const float scale = x.scale[number], top = 127.0f * scale;
  f32x16 squares = {};
  for_lanes(columns, [&](int i) { squares = fma(loadf(values + i), loadf(values + i), squares); });
  float left[kBlockColumns];
  x.scale[number + x.blocks] = 0.0f;
  x.comp[number + x.blocks] = 0;
  if (!(top * top * static_cast<float>(columns) > most * most * reduce_add(squares))) return;
  for_lanes(columns, [&](int i) {
    store(left + i, fma(to_float(widen(x.q + start + i)), splat(-scale), loadf(values + i)));
  });
  x.scale[number + x.blocks] = quantize_group(left, columns, x.rest + start, 127.0f, 1.0f);
  x.comp[number + x.blocks] = -128 * sum_bytes(x.rest + start, columns);
  pad(x.rest + start, columns, round_up(columns, 64));
}

// Whole blocks of columns of a row, from column `at`.
void store_blocks(const Matrix& w, const Act& x, int row, int at, const float* values, int k) {
  for (int done = 0; done < k; done += x.ld, values += x.ld) {
    const int n = k - done < x.ld ? k - done : x.ld, padded = round_up(n, 16), b = (at + done) / x.ld;
    const size_t start = b * x.block + static_cast<size_t>(row) * x.ld;
    float tail[kBlockColumns];
    const float* from = values;
    if (padded != n) {
      for (int i = 0; i < padded; ++i) tail[i] = i < n ? values[i] : 0.0f;
      from = tail;
    }
    if (!w.quantized()) {
      round_to_bf16(from, padded, x.hi + start);
      pad(x.hi + start, padded, round_up(n, 64));
      continue;
    }
    const size_t number = static_cast<size_t>(row) * x.groups + b;
    x.scale[number] = quantize_input(w, from, padded, x.q + start);
    x.comp[number] = -128 * sum_bytes(x.q + start, padded);
    pad(x.q + start, padded, round_up(n, 64));
    if (w.act_scale > 0.0f) x.scale[number + x.blocks] = 0.0f, x.comp[number + x.blocks] = 0;
    else store_rest(x, start, number, from, padded);
  }
}

void amx_store_act(const Matrix& w, const Act& x, int row, int at, const float* values, int k) {
  x.blocks ? store_blocks(w, x, row, at, values, k) : store_act(w, x, row, at, values, k);
}

}  // namespace
}  // namespace farthing
