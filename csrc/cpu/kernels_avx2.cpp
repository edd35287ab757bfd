// AVX2 and FMA (Haswell, Zen and later): 16 registers of 32 bytes.
#include "standard.h"

#if defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi2")
#endif

#define GLF_ISA avx2
#define GLF_VECTOR_BYTES 32
#include "instantiate.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
