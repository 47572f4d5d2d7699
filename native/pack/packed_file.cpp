// Packed matrices as bytes of a file, and back: the file is not trusted.
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

#include "pack/pack.h"

namespace farthing {
namespace {

constexpr uint32_t kMagic = 0x4b435047;  // "GPCK": with the hash of a name
constexpr uint32_t kInCells = 2;         // Header::sparse; 1 had other records
constexpr uint32_t kApart = 1;           // Header::planes; 0 had both planes of a panel in one record

struct Header {
  uint32_t magic, format;
  int32_t n, k, group;
  uint32_t zero, sparse, planes;
  uint64_t bytes;  // of offsets and records
  uint64_t name;   // hash of the matrix's name
  uint64_t unused[2];
};
static_assert(sizeof(Header) == 64);

}  // namespace

size_t Packed::weight_bytes() const { return m.sparse ? offsets_.back() : m.dense_bytes(); }

size_t Packed::serialized_bytes() const {
  return sizeof(Header) + (m.sparse ? round_up(offsets_.size() * 8, size_t{64}) : 0) + weight_bytes();
}

void Packed::serialize(uint8_t* out, uint64_t name) const {
  const uint64_t bytes = serialized_bytes() - sizeof(Header);
  const uint32_t sparse = m.sparse ? kInCells : 0, planes = m.has_planes() ? kApart : 0;
  const Header h{
      kMagic, static_cast<uint32_t>(m.format), m.n, m.k, m.group, m.zero, sparse, planes, bytes, name, {}};
  std::memcpy(out, &h, sizeof h);
  out += sizeof h;
  if (m.sparse) {
    std::memcpy(out, offsets_.data(), offsets_.size() * 8);
    std::memcpy(out + round_up(offsets_.size() * 8, size_t{64}), m.base[0], offsets_.back());
    return;
  }
  uint8_t* low = out + m.stride * static_cast<size_t>(m.panels);
  for (int i = 0; i < m.parts; ++i) {
    const size_t before = m.first[i], count = m.panels_of(i);
    std::memcpy(out + m.stride * before, m.base[i], m.stride * count);
    std::memcpy(low + m.plane_bytes() * before, m.base[i] + m.stride * count, m.plane_bytes() * count);
  }
}

namespace {

constexpr int kMostRows = 1 << 28;

void require(bool ok, const char* what) {
  if (!ok)
    throw std::invalid_argument(std::string("packed matrix is damaged: ") + what + "; pack the model again");
}

void require_cells(const Matrix& m, const uint8_t* records, size_t bytes) {
  try {
    check_cells(m, records, bytes);
  } catch (const std::invalid_argument& error) {
    require(false, error.what());
  }
}

void check_header(const Header& h, size_t size, uint64_t name) {
  require(h.magic == kMagic, "it has no header of this version");
  require(h.format < std::size(kFormats), "unknown format");
  const FormatTraits& format = kFormats[h.format];
  require(format.planes != Planes::high, "a view");
  require(h.planes == (format.planes == Planes::both ? kApart : 0), "planes of an earlier version");
  require(h.n >= 1 && h.n <= kMostRows && h.k >= 1 && h.k <= kMostRows, "rows or columns out of range");
  require(fits_group(format, h.group, h.k), "group size");
  require(h.zero <= 1 && (!h.zero || format.zeros()), "zero points of this format");
  const Matrix m = Matrix::describe(static_cast<Format>(h.format), h.n, h.k, h.group, h.zero);
  require(h.sparse != 1, "sparse blocks of an earlier version; pack the model again");
  require(!h.sparse || (h.sparse == kInCells && has_cells(m)), "sparsity of this format");
  require(h.bytes == size - sizeof h, "size of its section");
  require(h.name == name, "it belongs to another name");
}

}  // namespace

std::shared_ptr<Packed> Packed::view(Pool& pool, std::shared_ptr<Arena> arena, const uint8_t* bytes,
                                     size_t size, uint64_t name) {
  Header h;
  require(size >= sizeof h && reinterpret_cast<uintptr_t>(bytes) % 64 == 0,
          "its section is cut off or not aligned");
  std::memcpy(&h, bytes, sizeof h);
  check_header(h, size, name);
  auto packed = std::make_shared<Packed>();
  Matrix& m = packed->m;
  m = Matrix::describe(static_cast<Format>(h.format), h.n, h.k, h.group, h.zero);
  m.sparse = h.sparse == kInCells;
  const uint8_t* records = bytes + sizeof h;
  if (m.sparse) {
    const size_t count = static_cast<size_t>(m.panels) + 1, table = round_up(count * 8, size_t{64});
    require(table < h.bytes, "panel table");
    packed->offsets_.resize(count);
    std::memcpy(packed->offsets_.data(), records, count * 8);
    m.offsets = packed->offsets_.data();
    records += table;
    require_cells(m, records, h.bytes - table);
  } else {
    require(m.dense_bytes() == h.bytes, "size of its panels");
  }
  packed->arena_ = arena;
  if (pool.nodes() > 1 || arena->copies_files) {
    packed->place(pool, *arena, records);
  } else {
    m.first[1] = m.panels;
    m.base[0] = records;
  }
  return packed;
}

}  // namespace farthing
