// The formats of packed weights, each declared once: kernels, scratch memory, packed files, `farthing plan`
// and Python read this table.
//
// Legend: K input columns, G columns that share a scale. A panel holds 16 output rows in one record, so that
// a matrix-vector product reads memory as one stream:
//
//   f32   [K][16] float
//   bf16  [K/2][16][2] bfloat16                                   (so a 16 x 32 block is an AMX tile)
//   fp8   [K/128][16] float scales, then [K][16] e4m3
//   q8    [16] float row scales, then [K/4][16][4] uint8 = q + 128 (so a 16 x 64 block is an AMX tile)
//   q4    [16] float row scales; [K/G][16] float16 scales relative to the row's largest magnitude, which may
//         be negative; with zero points [K/G][16] int8; then [K/8][16][4] bytes: low nibble k % 8 < 4, high
//         nibble the rest, each q + 8
//   nl4   as q4 without zero points; a nibble is an index into kCodes
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
  q8_high = 7
};

// The values of nl4, as multiples of a group's scale: Lloyd-Max levels of groups of 64 normal numbers divided
// by the one with the largest magnitude, which thus becomes 127, and zero, so that pruned weights stay zero.
// 16 evenly spaced values have 23 % more squared error.
constexpr int8_t kCodes[16] = {-109, -85, -67, -51, -37, -24, -12, 0, 11, 23, 35, 48, 62, 78, 99, 127};
constexpr int kCodeOfZero = 7;
struct CodeBytes {
  uint8_t of[16];  // kCodes + 128
};
constexpr CodeBytes code_bytes() {
  CodeBytes bytes{};
  for (int i = 0; i < 16; ++i) bytes.of[i] = static_cast<uint8_t>(kCodes[i] + 128);
  return bytes;
}
alignas(16) constexpr CodeBytes kCodeBytes = code_bytes();

// Scales before the data of a record. blocks: float [K/128][16]; rows: float [16]; groups: rows, then float16
// [K/G][16] relative to them, of a group that each matrix chooses, and maybe int8 zero points.
enum class Scales { none, blocks, rows, groups };

// Nibbles that are stored apart: both halves of each byte, or the view of the high ones.
enum class Planes { none, both, high };

struct FormatTraits {
  const char* name;   // in farthing._native.Format
  const char* holds;  // the stored format (farthing.planner.footprint.Kind) that it holds without rounding
  int bits;           // of a weight
  int multiple;       // of columns that K is padded to
  bool quantized;     // integers q, stored as q + 2^(bits - 1); the activations are integers too
  Scales scales;
  int group;            // columns that share a scale of the activations, where it is not chosen; 0: no scales
  bool halves = false;  // AMX tiles multiply it by bfloat16 activations, x = hi + lo
  bool codes = false;   // nibbles are indices into kCodes; kernels multiply by code + 128
  Planes planes = Planes::none;

  constexpr bool grouped() const { return scales == Scales::groups; }
  constexpr bool nibbles() const { return bits == 4; }
  constexpr int bytes_a_column() const { return kPanel * bits / 8; }  // of a panel's data
  // q minus what kernels multiply by.
  constexpr int offset() const { return codes ? -128 : quantized ? -(1 << (bits - 1)) : 0; }
  // What is stored for q = 0, and the byte of such zeros.
  constexpr int zero() const { return codes ? kCodeOfZero : -offset(); }
  constexpr uint8_t zero_byte() const { return static_cast<uint8_t>(nibbles() ? zero() * 0x11 : zero()); }
};

constexpr FormatTraits kFormats[] = {
    {"F32", "float32", 32, 2, false, Scales::none, 0},
    {"BF16", "bfloat16", 16, 32, false, Scales::none, 0, true},
    {"FP8", "fp8", 8, 32, false, Scales::blocks, kActGroup},
    {"Q8", "int8", 8, 64, true, Scales::rows, kActGroup},
    {"Q4", "int4", 4, 1, true, Scales::groups, 0},
    {"NL4", "nl4", 4, 1, true, Scales::groups, 0, false, true},
    {"Q8_PLANES", "int8", 8, 64, true, Scales::rows, kActGroup, false, false, Planes::both},
    {"Q8_HIGH", "", 4, 64, true, Scales::rows, kActGroup, false, false, Planes::high},
};
constexpr const FormatTraits& traits(Format format) { return kFormats[static_cast<int>(format)]; }

// Whether kernels can read groups of this many columns: they divide 64 or are a multiple of it.
constexpr bool fits_group(const FormatTraits& format, int group, int columns) {
  if (!format.grouped()) return group == format.group;
  return group >= 32 && group % 32 == 0 && (group == 32 || group % 64 == 0) && group <= columns &&
         columns % group == 0;
}

}  // namespace farthing
