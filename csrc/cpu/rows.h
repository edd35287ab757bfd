// Rows of numbers in memory.
#pragma once

#include "vec.h"

namespace glf::GLF_ISA {

// A (rows, n) view of memory.
template <class T>
struct Rows {
  T* data;
  idx ld;
  T* operator[](idx m) const { return data + m * ld; }
};

}  // namespace glf::GLF_ISA
