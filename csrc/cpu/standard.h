// Every standard header that the kernels need: included before an instruction set is chosen, since an inline function of
// the standard library compiled for AVX-512 could be the copy that the linker keeps for everyone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
