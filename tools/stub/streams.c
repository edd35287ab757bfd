/* Streams, events, captures: what is enqueued is done at once. */
#include "stub.h"
#include <time.h>

long stub_nodes;
int stub_succeed(void) {
  ++stub_nodes;
  return 0;
}
void *stub_handle(void) {
  static uintptr_t last = 0x1000;
  return (void *)__sync_add_and_fetch(&last, 16);
}

static struct {
  int active;
  cudaStream_t stream;
  unsigned long long id;
} capture;

static cudaError_t waiting(void) { return capture.active ? cudaErrorStreamCaptureUnsupported : cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return waiting(); }
static __thread enum cudaStreamCaptureMode strictness; /* of this thread: torch 2.13 relaxes it, to wait for other streams */
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  const enum cudaStreamCaptureMode before = strictness;
  strictness = *mode;
  return *mode = before, cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return strictness == cudaStreamCaptureModeRelaxed && stream != capture.stream ? cudaSuccess : waiting();
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return waiting(); }
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  return waiting() ? waiting() : stub_copy(to, from, size);
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return *stream = stub_handle(), cudaSuccess; }
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
  stub_nodes = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  if (!capture.active || stream != capture.stream) return cudaErrorIllegalState;
  capture.active = 0;
  *graph = stub_handle();
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
  if (!found) *number = stub_nodes; /* torch asks whether there is any, right behind the capture */
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *ready, cudaGraph_t graph, unsigned long long flags) {
  return *ready = stub_handle(), cudaSuccess;
}
