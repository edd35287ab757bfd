/* A GPU that does nothing, for rehearsals on machines without one: see stub_gpu.py.

   Stands in for libcuda, libcudart and the part of the other CUDA libraries that hands something back; stub_gpu.py adds a function
   that succeeds for every other one that torch imports. Device memory is memory of the host, taken from the system page by page
   as it is touched. Copies between host and device are made. Kernels are not: their results are whatever the memory held.
   What can be checked without computing is checked as a driver would: pointers given to kernels, sizes of launches, shared
   memory, waits during a capture. */
#define _GNU_SOURCE
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define MEMORY (80ull << 30)
#define SHARED_OPTIN (227 << 10) /* bytes of a block */
#define SHARED_DEFAULT (48 << 10)
#define SMALL (1 << 20) /* fills and copies within the device that are made: a count that the host reads back is among them */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long nodes; /* of the capture at hand */

/* A function that stub_gpu.py adds. */
int stub_gpu_succeed(void) {
  ++nodes;
  return 0;
}

/* A new handle of anything: never dereferenced. */
static void *handle(void) {
  static uintptr_t last = 0x1000;
  return (void *)__sync_add_and_fetch(&last, 16);
}

/* ---- the device: an H100 ------------------------------------------------------------------------------------------- */

static int attribute(int which) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_PITCH: return INT32_MAX;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return SHARED_DEFAULT;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return SHARED_OPTIN;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return SHARED_OPTIN + 1024;
    case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 2048;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR:
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return 132;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1980000;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 2619000;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 5120;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return 50 << 20;
    case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT: return 512;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return 9;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
    case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH: return 1;
    default: return 0;
  }
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
  *value = attribute(which); /* both enumerations have the same numbers */
  return cudaSuccess;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
  *value = attribute(which);
  return CUDA_SUCCESS;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "stub of an H100");
  p->totalGlobalMem = MEMORY;
  p->major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  p->multiProcessorCount = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  p->maxThreadsPerMultiProcessor = attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR);
  p->maxBlocksPerMultiProcessor = attribute(CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR);
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = INT32_MAX;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->warpSize = 32;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = SHARED_DEFAULT;
  p->sharedMemPerBlockOptin = SHARED_OPTIN;
  p->sharedMemPerMultiprocessor = SHARED_OPTIN + 1024;
  p->reservedSharedMemPerBlock = 1024;
  p->l2CacheSize = attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
  p->memoryBusWidth = attribute(CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
  p->totalConstMem = 65536;
  p->memPitch = INT32_MAX;
  p->textureAlignment = 512;
  p->unifiedAddressing = p->concurrentKernels = p->cooperativeLaunch = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { return *can = 0, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDA_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDA_VERSION, cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) {
  snprintf(id, size, "0000:00:00.0");
  return cudaSuccess;
}
const char *cudaGetErrorName(cudaError_t error) { return error ? "an error of the stub GPU" : "cudaSuccess"; }
const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    default: return "invalid argument";
  }
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = cudaGetErrorString(error == CUDA_ERROR_OUT_OF_MEMORY ? cudaErrorMemoryAllocation : (cudaError_t)error);
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int index) { return *device = index, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit which) { return *value = 1 << 20, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

/* ---- memory -------------------------------------------------------------------------------------------------------- */

static struct Block {
  char *start;
  size_t size;
  int device;
} blocks[1 << 16];
static int count;
static size_t used;

/* The block that holds an address, or NULL; under the lock. */
static struct Block *block_of(const void *address) {
  for (struct Block *b = blocks + count; b-- > blocks;)
    if ((char *)address >= b->start && (char *)address < b->start + b->size) return b;
  return NULL;
}
static int on_device(const void *address) {
  pthread_mutex_lock(&lock);
  const struct Block *b = block_of(address);
  const int found = b && b->device;
  pthread_mutex_unlock(&lock);
  return found;
}
static cudaError_t take(void **start, size_t size, int device) {
  *start = NULL;
  if (!size) return cudaSuccess;
  void *found = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  pthread_mutex_lock(&lock);
  const int full = found == MAP_FAILED || count == sizeof blocks / sizeof *blocks || (device && used + size > MEMORY);
  if (!full) {
    blocks[count++] = (struct Block){*start = found, size, device};
    used += device ? size : 0;
  }
  pthread_mutex_unlock(&lock);
  if (full && found != MAP_FAILED) munmap(found, size);
  return full ? cudaErrorMemoryAllocation : cudaSuccess;
}
static cudaError_t give_back(void *start) {
  if (!start) return cudaSuccess;
  pthread_mutex_lock(&lock);
  struct Block *b = block_of(start);
  if (b) {
    munmap(b->start, b->size);
    used -= b->device ? b->size : 0;
    *b = blocks[--count];
  }
  pthread_mutex_unlock(&lock);
  return b ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaMalloc(void **start, size_t size) { return take(start, size, 1); }
cudaError_t cudaFree(void *start) { return give_back(start); }
cudaError_t cudaHostAlloc(void **start, size_t size, unsigned flags) { return take(start, size, 0); }
cudaError_t cudaFreeHost(void *start) { return give_back(start); }
cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) { return *unused = MEMORY - used, *total = MEMORY, cudaSuccess; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *address) {
  memset(found, 0, sizeof *found);
  pthread_mutex_lock(&lock);
  const struct Block *b = block_of(address);
  found->type = !b ? cudaMemoryTypeUnregistered : b->device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  pthread_mutex_unlock(&lock);
  found->device = found->type == cudaMemoryTypeUnregistered ? -1 : 0;
  found->devicePointer = found->type == cudaMemoryTypeUnregistered ? NULL : (void *)address;
  found->hostPointer = found->type == cudaMemoryTypeDevice ? NULL : (void *)address;
  return cudaSuccess;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr address) {
  pthread_mutex_lock(&lock);
  const int known = block_of((void *)address) != NULL;
  pthread_mutex_unlock(&lock);
  if (!known) return CUDA_ERROR_INVALID_VALUE;
  if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)value = address;
  return CUDA_SUCCESS;
}
static cudaError_t copy(void *to, const void *from, size_t size) {
  ++nodes;
  if (size <= SMALL || !on_device(to) || !on_device(from)) memmove(to, from, size);
  return cudaSuccess;
}
static cudaError_t fill(void *start, int value, size_t size) {
  ++nodes;
  if (size <= SMALL) memset(start, value, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(to, from, size);
}
cudaError_t cudaMemcpy2DAsync(
    void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, enum cudaMemcpyKind kind,
    cudaStream_t stream) {
  for (size_t row = 0; row < height; ++row) copy((char *)to + row * to_pitch, (char *)from + row * from_pitch, width);
  return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t size, cudaStream_t stream) {
  return copy(to, from, size);
}
cudaError_t cudaMemset(void *start, int value, size_t size) { return fill(start, value, size); }
cudaError_t cudaMemsetAsync(void *start, int value, size_t size, cudaStream_t stream) { return fill(start, value, size); }

/* ---- streams, events, captures: what is enqueued is done at once ---------------------------------------------------- */

static struct {
  int active;
  cudaStream_t stream;
  unsigned long long id;
} capture;

static cudaError_t waiting(void) { return capture.active ? cudaErrorStreamCaptureUnsupported : cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return waiting(); }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return waiting(); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return waiting(); }
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  return waiting() ? waiting() : copy(to, from, size);
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return *stream = handle(), cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  return cudaStreamCreate(stream);
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, cudaSuccess; }
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void *with, unsigned flags) {
  call(stream, cudaSuccess, with);
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *with) {
  call(with);
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  *event = calloc(1, sizeof(double)); /* milliseconds */
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return free(event), cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  *(double *)event = now.tv_sec * 1e3 + now.tv_nsec / 1e6;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
  const double elapsed = *(double *)end - *(double *)start;
  *milliseconds = elapsed > 1e-3 ? elapsed : 1e-3;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  if (capture.active || !stream) return cudaErrorStreamCaptureUnsupported;
  capture.active = 1;
  capture.stream = stream;
  ++capture.id;
  nodes = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  if (!capture.active || stream != capture.stream) return cudaErrorIllegalState;
  capture.active = 0;
  *graph = handle();
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges, size_t *number) {
  const int active = capture.active && stream == capture.stream;
  *status = active ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id) *id = active ? capture.id : 0;
  if (graph) *graph = active ? (cudaGraph_t)1 : NULL;
  if (dependencies) *dependencies = NULL;
  if (edges) *edges = NULL;
  if (number) *number = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  return cudaStreamGetCaptureInfo(stream, status, NULL, NULL, NULL, NULL, NULL);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *found, size_t *number) {
  if (!found) *number = nodes; /* torch asks whether there is any, right behind the capture */
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *ready, cudaGraph_t graph, unsigned long long flags) {
  return *ready = handle(), cudaSuccess;
}

/* ---- kernels ------------------------------------------------------------------------------------------------------- */

static struct {
  const void *function;
  size_t shared; /* bytes that it was allowed, above what all are */
} allowed[4096];
static int allowances;

static int allow(const void *function, size_t shared) {
  if (shared > SHARED_OPTIN) return cudaErrorInvalidValue;
  pthread_mutex_lock(&lock);
  int i = 0;
  while (i < allowances && allowed[i].function != function) ++i;
  const int full = i == sizeof allowed / sizeof *allowed;
  if (!full) {
    allowed[i].function = function;
    allowed[i].shared = shared;
    if (i == allowances) ++allowances;
  }
  pthread_mutex_unlock(&lock);
  return full ? cudaErrorMemoryAllocation : cudaSuccess;
}
static int start(const void *function, dim3 grid, dim3 block, size_t shared) {
  ++nodes;
  size_t most = SHARED_DEFAULT;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < allowances; ++i)
    if (allowed[i].function == function && allowed[i].shared > most) most = allowed[i].shared;
  pthread_mutex_unlock(&lock);
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
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) { return *kernel = (cudaKernel_t)function, cudaSuccess; }

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
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
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
  found->maxDynamicSharedSizeBytes = SHARED_OPTIN;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *number, const void *function, int threads, size_t shared, unsigned flags) {
  return *number = 2, cudaSuccess;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = handle(), CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  return *function = handle(), CUDA_SUCCESS;
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

/* ---- libraries ----------------------------------------------------------------------------------------------------- */

cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *found) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = (void *)stub_gpu_succeed;
  if (found) *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cublasStatus_t cublasCreate_v2(cublasHandle_t *library) { return *library = handle(), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtCreate(cublasLtHandle_t *library) { return *library = handle(), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t library, cublasLtMatmulDesc_t product, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
    cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int most,
    cublasLtMatmulHeuristicResult_t *algorithms, int *number) {
  memset(algorithms, 0, sizeof *algorithms);
  return *number = 1, CUBLAS_STATUS_SUCCESS;
}
