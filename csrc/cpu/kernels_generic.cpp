// What every processor of the architecture has: SSE2 on x86-64, NEON on ARM.
#include "standard.h"

#define GLF_ISA generic
#define GLF_VECTOR_BYTES 16
#include "instantiate.h"
