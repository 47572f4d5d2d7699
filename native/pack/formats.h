// The formats of packed weights, each declared once: kernels, scratch memory, packed files, `farthing plan`
// and Python read this table.
//
// Legend: K input columns, G columns that share a scale. A panel holds 16 output rows in one record, so that
// a matrix-vector product reads memory as one stream:
//
//   f32   [K][16] float
//   bf16  [K/2][16][2] bfloat16                                   (so a 16 x 32 block is an AMX tile)
//   fp8   [K/G][16] float scales, then [K][16] e4m3
//   q8    [16] float row scales, then [K/4][16][4] uint8 = q + 128 (so a 16 x 64 block is an AMX tile)
//   q4    [16] float row scales; [K/G][16] float16 scales relative to the row's largest magnitude, which may
//         be negative; with zero points [K/G][16] int8; then [K/8][16][4] bytes: low nibble k % 8 < 4, high
//         nibble the rest, each q + 8
//   nl4   as q4 without zero points; a nibble is an index into the format's codes, as in mxfp4 and iq4_nl
//   mxfp4  with groups of 32: [K/32][16] uint8, not float16: exponents of powers of two plus 127; 0 is 0
//   q8_groups  as q4, zero points included, with [K/4][16][4] uint8 = q + 128
//   q4_1  as q4, a nibble is q; after the scales come [K/G][16] float16 minimums, also relative to the row
//   q4_k  [16] float row scales; [K/256][16] float16 units of the scales and as many of the minimums;
//   [K/G][16]
//         int8 scales in these units, and minimums; then nibbles as in q4
//   iq4_xs  as q4_k without minimums, with codes
//   q5_0, q5_1, q5_k, q6_k  as q4, q4_1 and q4_k, q6_k without minimums. A step of 32 or 16 columns has its
//   nibbles, then 64 bytes
//         [16][4] of the bits above: the first four columns have the lowest ones
//   q8_planes  the bytes of q8 as nibbles: [16] float row scales, then the high ones [K/8][16][4] in the
//         order of q4. The low ones of all panels follow the last record. q8_high is a view without them.
//
// The bytes before the data are padded to 64.
#pragma once
#include <cstddef>
#include <cstdint>
#include <iterator>

namespace farthing {

constexpr int kPanel = 16;
constexpr int kActGroup = 128;  // columns of activations that share a scale if the weights have no groups

enum class Format : uint32_t {
  f32 = 0,
  bf16 = 1,
  fp8 = 2,
  q8 = 3,
  q4 = 4,
  nl4 = 5,
  q8_planes = 6,
  q8_high = 7,
  q8_groups = 8,
  mxfp4 = 9,
  iq4_nl = 10,
  q4_1 = 11,
  q4_k = 12,
  q5_k = 13,
  q6_k = 14,
  iq4_xs = 15,
  q5_1 = 16,
  q5_0 = 17
};

// The values of a format's nibbles, as multiples of a group's scale.
struct Codes {
  int8_t of[16];
  int bias;             // what makes them unsigned …
  uint8_t factors[16];  // … for the dot products
  int zero;             // a nibble that stands for 0, or -1
  constexpr Codes(const int8_t (&values)[16], int added) : of{}, bias(added), factors{}, zero(-1) {
    for (int i = 15; i >= 0; --i) {
      of[i] = values[i];
      factors[i] = static_cast<uint8_t>(values[i] + added);
      if (values[i] == 0) zero = i;
    }
  }
  constexpr int largest() const {
    int top = 0;
    for (const uint8_t f : factors) top = f > top ? f : top;
    return top;
  }
};

// Lloyd-Max levels of groups of 64 normal numbers divided by the one with the largest magnitude, which thus
// becomes 127, and zero, so that pruned weights stay zero. 16 evenly spaced values have 23 % more squared
// error.
constexpr Codes kNl4({-109, -85, -67, -51, -37, -24, -12, 0, 11, 23, 35, 48, 62, 78, 99, 127}, 128);
// Twice the values of E2M1.
constexpr Codes kE2m1({0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}, 12);
// The values of llama.cpp's IQ4_NL.
constexpr Codes kIq4({-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}, 127);

// Scales before the data of a record. blocks: float [K/G][16]; rows: float [16]; groups: rows, then float16
// [K/G][16] relative to them, of a group that each matrix chooses, and maybe int8 zero points; units: rows,
// float16 [K/256][16] relative to them, and int8 [K/G][16] as multiples of these.
enum class Scales { none, blocks, rows, groups, units };
constexpr int kUnit = 256;  // columns that share a unit

// Nibbles that are stored apart: both halves of each byte, or the view of the high ones.
enum class Planes { none, both, high };

struct FormatTraits {
  const char* name;   // in farthing._native.Format
  const char* holds;  // the stored format (farthing.ops.weights.Format, or a float) that it holds exactly
  int bits;           // of a weight
  int multiple = 1;   // of columns that K is padded to
  Scales scales = Scales::none;
  int group = 0;                 // columns that share a scale of the activations, if no matrix chooses it
  bool halves = false;           // AMX tiles multiply it by bfloat16 activations, x = hi + lo
  bool cells = false;            // may be block-sparse (cells.h), and float rows are rounded to it
  bool minimums = false;         // stored as q >= 0; groups have a number that is added to their values
  const Codes* codes = nullptr;  // what nibbles are indices into
  Planes planes = Planes::none;
  int powers = 0;  // columns of groups whose scales are powers of two, held as their exponents

  // Integers q, stored as q + 2^(bits - 1); the activations are integers too.
  constexpr bool quantized() const { return scales == Scales::rows || grouped(); }
  constexpr bool grouped() const { return scales == Scales::groups || scales == Scales::units; }
  constexpr bool zeros() const { return scales == Scales::groups && !codes && !minimums; }  // zero points
  constexpr bool nibbles() const { return bits == 4; }
  constexpr int above() const { return bits > 4 && bits < 8 ? bits - 4 : 0; }  // bits beside the nibbles
  constexpr int step() const { return above() ? 32 / above() : 8; }            // columns unpacked at once
  constexpr int bytes_a_column() const { return kPanel * bits / 8; }           // of a panel's data
  // q minus what kernels multiply by.
  constexpr int offset() const {
    return codes ? -codes->bias : quantized() && !minimums ? -(1 << (bits - 1)) : 0;
  }
  // Times the sum of a group of activations: what takes the offset back out, or the sum itself.
  constexpr int compensation() const { return minimums ? -1 : offset(); }
  // Whether what is multiplied is so small that two products with int8 fit in 16 bits.
  constexpr bool small() const { return codes ? codes->largest() < 128 : bits < 8; }
  // What is stored for q = 0, and the byte of such zeros.
  constexpr int zero() const { return codes ? codes->zero : -offset(); }
  constexpr uint8_t zero_byte() const { return static_cast<uint8_t>(nibbles() ? zero() * 0x11 : zero()); }
};

constexpr FormatTraits kFormats[] = {
    {.name = "F32", .holds = "float32", .bits = 32, .multiple = 2},
    {.name = "BF16", .holds = "bfloat16", .bits = 16, .multiple = 32, .halves = true},
    {.name = "FP8", .holds = "fp8", .bits = 8, .multiple = 32, .scales = Scales::blocks, .group = kActGroup},
    {.name = "Q8",
     .holds = "int8",
     .bits = 8,
     .multiple = 64,
     .scales = Scales::rows,
     .group = kActGroup,
     .cells = true},
    {.name = "Q4", .holds = "int4", .bits = 4, .scales = Scales::groups, .cells = true},
    {.name = "NL4", .holds = "nl4", .bits = 4, .scales = Scales::groups, .cells = true, .codes = &kNl4},
    {.name = "Q8_PLANES",
     .holds = "int8",
     .bits = 8,
     .multiple = 64,
     .scales = Scales::rows,
     .group = kActGroup,
     .planes = Planes::both},
    {.name = "Q8_HIGH",
     .holds = "",
     .bits = 4,
     .multiple = 64,
     .scales = Scales::rows,
     .group = kActGroup,
     .planes = Planes::high},
    {.name = "Q8_GROUPS", .holds = "int8_groups", .bits = 8, .scales = Scales::groups},
    {.name = "MXFP4", .holds = "mxfp4", .bits = 4, .scales = Scales::groups, .codes = &kE2m1, .powers = 32},
    {.name = "IQ4_NL", .holds = "iq4_nl", .bits = 4, .scales = Scales::groups, .codes = &kIq4},
    {.name = "Q4_1", .holds = "q4_1", .bits = 4, .scales = Scales::groups, .minimums = true},
    {.name = "Q4_K", .holds = "q4_k", .bits = 4, .scales = Scales::units, .minimums = true},
    {.name = "Q5_K", .holds = "q5_k", .bits = 5, .scales = Scales::units, .minimums = true},
    {.name = "Q6_K", .holds = "q6_k", .bits = 6, .scales = Scales::units},
    {.name = "IQ4_XS", .holds = "iq4_xs", .bits = 4, .scales = Scales::units, .codes = &kIq4},
    {.name = "Q5_1", .holds = "q5_1", .bits = 5, .scales = Scales::groups, .minimums = true},
    {.name = "Q5_0", .holds = "q5_0", .bits = 5, .scales = Scales::groups},
};
constexpr const FormatTraits& traits(Format format) { return kFormats[static_cast<int>(format)]; }

// Whether kernels can read groups of this many columns: they divide 64 or are a multiple of it.
constexpr bool fits_group(const FormatTraits& format, int group, int columns) {
  if (format.scales == Scales::blocks && (group == 32 || group == 64)) return columns % group == 0;
  if (!format.grouped()) return group == format.group;
  if (format.scales == Scales::units && (columns % kUnit || group > kUnit)) return false;
  return group >= 16 && group % format.step() == 0 && (64 % group == 0 || group % 64 == 0) &&
         columns % group == 0;
}

}  // namespace farthing
