#define _GNU_SOURCE
/* Memory: blocks of the host, each known as the device's or as pinned. */
#include "stub.h"
#include <sys/mman.h>

enum { SMALL = 1 << 20 }; /* bytes of a fill or a copy within the device that is made: a count that the host reads back is one */

pthread_mutex_t stub_lock = PTHREAD_MUTEX_INITIALIZER;

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
  pthread_mutex_lock(&stub_lock);
  const struct Block *b = block_of(address);
  const int found = b && b->device;
  pthread_mutex_unlock(&stub_lock);
  return found;
}
static cudaError_t take(void **start, size_t size, int device) {
  *start = NULL;
  if (!size) return cudaSuccess;
  void *found = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  pthread_mutex_lock(&stub_lock);
  const int full = found == MAP_FAILED || count == sizeof blocks / sizeof *blocks || (device && used + size > MEMORY);
  if (!full) {
    blocks[count++] = (struct Block){*start = found, size, device};
    used += device ? size : 0;
  }
  pthread_mutex_unlock(&stub_lock);
  if (full && found != MAP_FAILED) munmap(found, size);
  return full ? cudaErrorMemoryAllocation : cudaSuccess;
}
static cudaError_t give_back(void *start) {
  if (!start) return cudaSuccess;
  pthread_mutex_lock(&stub_lock);
  struct Block *b = block_of(start);
  if (b) {
    munmap(b->start, b->size);
    used -= b->device ? b->size : 0;
    *b = blocks[--count];
  }
  pthread_mutex_unlock(&stub_lock);
  return b ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaMalloc(void **start, size_t size) { return take(start, size, 1); }
cudaError_t cudaFree(void *start) { return give_back(start); }
cudaError_t cudaHostAlloc(void **start, size_t size, unsigned flags) { return take(start, size, 0); }
cudaError_t cudaFreeHost(void *start) { return give_back(start); }
cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) { return *unused = MEMORY - used, *total = MEMORY, cudaSuccess; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *address) {
  memset(found, 0, sizeof *found);
  pthread_mutex_lock(&stub_lock);
  const struct Block *b = block_of(address);
  found->type = !b ? cudaMemoryTypeUnregistered : b->device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  pthread_mutex_unlock(&stub_lock);
  found->device = found->type == cudaMemoryTypeUnregistered ? -1 : 0;
  found->devicePointer = found->type == cudaMemoryTypeUnregistered ? NULL : (void *)address;
  found->hostPointer = found->type == cudaMemoryTypeDevice ? NULL : (void *)address;
  return cudaSuccess;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr address) {
  pthread_mutex_lock(&stub_lock);
  const int known = block_of((void *)address) != NULL;
  pthread_mutex_unlock(&stub_lock);
  if (!known) return CUDA_ERROR_INVALID_VALUE;
  if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)value = address;
  return CUDA_SUCCESS;
}
cudaError_t stub_copy(void *to, const void *from, size_t size) {
  ++stub_nodes;
  if (size <= SMALL || !on_device(to) || !on_device(from)) memmove(to, from, size);
  return cudaSuccess;
}
static cudaError_t fill(void *start, int value, size_t size) {
  ++stub_nodes;
  if (size <= SMALL) memset(start, value, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return stub_copy(to, from, size);
}
cudaError_t cudaMemcpy2DAsync(
    void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, enum cudaMemcpyKind kind,
    cudaStream_t stream) {
  for (size_t row = 0; row < height; ++row) stub_copy((char *)to + row * to_pitch, (char *)from + row * from_pitch, width);
  return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t size, cudaStream_t stream) {
  return stub_copy(to, from, size);
}
cudaError_t cudaMemset(void *start, int value, size_t size) { return fill(start, value, size); }
cudaError_t cudaMemsetAsync(void *start, int value, size_t size, cudaStream_t stream) { return fill(start, value, size); }
