/* Kernels: how they are found, what they may ask for, and launches that are checked and not made. */
#include "stub.h"

static struct {
  const void *function;
  size_t shared; /* bytes that it was allowed, above what all are */
} allowed[4096];
static int allowances;

static int allow(const void *function, size_t shared) {
  if (shared > SHARED_MOST) return cudaErrorInvalidValue;
  pthread_mutex_lock(&stub_lock);
  int i = 0;
  while (i < allowances && allowed[i].function != function) ++i;
  const int full = i == sizeof allowed / sizeof *allowed;
  if (!full) {
    allowed[i].function = function;
    allowed[i].shared = shared;
    if (i == allowances) ++allowances;
  }
  pthread_mutex_unlock(&stub_lock);
  return full ? cudaErrorMemoryAllocation : cudaSuccess;
}
static int start(const void *function, dim3 grid, dim3 block, size_t shared) {
  ++stub_nodes;
  size_t most = SHARED_DEFAULT;
  pthread_mutex_lock(&stub_lock);
  for (int i = 0; i < allowances; ++i)
    if (allowed[i].function == function && allowed[i].shared > most) most = allowed[i].shared;
  pthread_mutex_unlock(&stub_lock);
  if (shared > most) return cudaErrorInvalidValue;
  const int blocks_fit = grid.x && grid.y && grid.z && grid.x <= INT32_MAX && grid.y <= 65535 && grid.z <= 65535;
  const unsigned long long threads = (unsigned long long)block.x * block.y * block.z;
  return blocks_fit && threads && threads <= 1024 && block.z <= 64 ? cudaSuccess : cudaErrorInvalidConfiguration;
}
void **__cudaRegisterFatBinary(void *binary) {
  static void *registered;
  return &registered;
}
char __cudaInitModule(void **registered) { return 1; }
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  return *kernel = (cudaKernel_t)function, cudaSuccess;
}

/* What <<<…>>> pushed, popped by the kernel's own host function right behind it. */
static __thread struct {
  dim3 grid, block;
  size_t shared;
  void *stream;
} pushed;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
  pushed.grid = grid, pushed.block = block, pushed.shared = shared, pushed.stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *(void **)stream = pushed.stream;
  return cudaSuccess;
}
static __thread cudaError_t failed; /* what cudaGetLastError says */
cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
  return failed = start(kernel, grid, block, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *function, void **arguments) {
  return failed = start(function, how->gridDim, how->blockDim, how->dynamicSmemBytes);
}
cudaError_t cudaPeekAtLastError(void) { return failed; }
cudaError_t cudaGetLastError(void) {
  const cudaError_t error = failed;
  failed = cudaSuccess;
  return error;
}
cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute which, int value) {
  return which == cudaFuncAttributeMaxDynamicSharedMemorySize ? allow(function, value) : cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->ptxVersion = found->binaryVersion = 90;
  found->maxDynamicSharedSizeBytes = SHARED_MOST;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *number, const void *function, int threads, size_t shared, unsigned flags) {
  return *number = 2, cudaSuccess;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = stub_handle(), CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  return *function = stub_handle(), CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
  return which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES ? (CUresult)allow(function, value) : CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *how, CUfunction function, void **arguments, void **extra) {
  const dim3 grid = {how->gridDimX, how->gridDimY, how->gridDimZ}, block = {how->blockDimX, how->blockDimY, how->blockDimZ};
  return (CUresult)start(function, grid, block, how->sharedMemBytes);
}
