/* A GPU that does nothing, for rehearsals on machines without one: see ../stub_gpu.py.

   These files stand in for libcuda, libcudart and the part of the other CUDA libraries that hands something back; stub_gpu.py adds a
   function that succeeds for every other one that torch or Triton call. Device memory is memory of the host, which the system
   provides page by page as it is touched. Copies between host and device are made. Kernels are not run: their results are what
   the memory held. What can be checked without computing is checked as a driver would: pointers given to kernels, sizes of
   launches, shared memory, waits during a capture. */
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
  SHARED_DEFAULT = 48 << 10, /* bytes of shared memory that a block has */
  SHARED_MOST = 227 << 10,   /* and that it may ask for */
};
#define MEMORY (80ull << 30)

extern pthread_mutex_t stub_lock;
extern long stub_nodes; /* that have been enqueued since the last capture began */

/* A new handle of anything; nobody looks behind it. */
void *stub_handle(void);
/* What a function does that has nothing to hand back. */
int stub_succeed(void);
/* A copy whose sides may be on the device. */
cudaError_t stub_copy(void *to, const void *from, size_t size);
