// Addresses that Python passes as integers.
#pragma once
#include <cstdint>

namespace farthing {

template <class T>
T* at(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace farthing
