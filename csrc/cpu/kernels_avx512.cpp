// AVX-512 (Skylake-X, Ice Lake, Zen 4 and later): 32 registers of 64 bytes.
#include "standard.h"

#if defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,bmi2")
#endif

#define GLF_ISA avx512
#define GLF_VECTOR_BYTES 64
#include "instantiate.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
