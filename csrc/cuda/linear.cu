// Launches. The grid's first dimension is the batch, up to 2³¹ − 1; D decides the scheme.
#include "kernels.cuh"
#include "linear.h"
#include "outcome.h"

namespace glf::device {

namespace {

template <class T>
size_t workspace_bytes(int D) {
  return D * sizeof(T) + (2 * D + 2) * sizeof(int);
}

// Whether a matrix fits the shared memory that a block of this kernel may ask for, and how much to ask for.
template <class T, class Kernel>
bool fits(Kernel kernel, int D, size_t& bytes) {
  int device = 0, most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const size_t wish = static_cast<size_t>(D) * (D | 1) * sizeof(T) + workspace_bytes<T>(D);
  const bool room = wish <= static_cast<size_t>(most);
  bytes = room ? wish : workspace_bytes<T>(D);
  // As much as there is, whatever this matrix needs: another thread may be between its own attribute and its launch.
  if (bytes > 48 * 1024) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  return room;
}

template <int N, class T>
const char* launch_warps(cudaStream_t stream, long long count, int D, const T* A, T* sign, T* logabsdet, T* inverse,
                         int* info) {
  constexpr int matrices = warp_threads / lanes_of<N>;
  slogdet_inverse_warp_kernel<N><<<static_cast<unsigned>((count + matrices - 1) / matrices), warp_threads, 0, stream>>>(
      count, D, A, sign, logabsdet, inverse, info);
  return outcome();
}

template <int M, class T>
const char* launch_tiles(cudaStream_t stream, long long count, int D, const T* A, T* sign, T* logabsdet, T* inverse,
                         int* info) {
  slogdet_inverse_tile_kernel<M><<<static_cast<unsigned>(count), block_threads, tile_bytes<M, T>, stream>>>(
      D, A, sign, logabsdet, inverse, info);
  return outcome();
}

}  // namespace

template <class T>
const char* slogdet_inverse(Stream stream, long long count, int D, const T* A, T* sign, T* logabsdet, T* inverse,
                            int* info) {
  if (!count) return nullptr;
  const auto s = static_cast<cudaStream_t>(stream);
  if (D <= 4) return launch_warps<4>(s, count, D, A, sign, logabsdet, inverse, info);
  if (D <= 8) return launch_warps<8>(s, count, D, A, sign, logabsdet, inverse, info);
  if (D <= 16) return launch_warps<16>(s, count, D, A, sign, logabsdet, inverse, info);
  if (D <= 24) return launch_warps<24>(s, count, D, A, sign, logabsdet, inverse, info);
  if (D <= 32) return launch_warps<32>(s, count, D, A, sign, logabsdet, inverse, info);
  if constexpr (sizeof(T) == 4) {  // two rows of doubles fill a lane's registers
    if (D <= 48) return launch_warps<48>(s, count, D, A, sign, logabsdet, inverse, info);
    if (D <= 64) return launch_warps<64>(s, count, D, A, sign, logabsdet, inverse, info);
  } else {
    if (D <= 64) return launch_tiles<4>(s, count, D, A, sign, logabsdet, inverse, info);
  }
  if (D <= 96) return launch_tiles<6>(s, count, D, A, sign, logabsdet, inverse, info);
  if (D <= 128) return launch_tiles<8>(s, count, D, A, sign, logabsdet, inverse, info);
  if constexpr (sizeof(T) == 4)
    if (D <= 192) return launch_tiles<12>(s, count, D, A, sign, logabsdet, inverse, info);
  size_t bytes;
  const bool room = fits<T>(slogdet_inverse_kernel<T>, D, bytes);
  slogdet_inverse_kernel<<<static_cast<unsigned>(count), block_threads, bytes, s>>>(D, room, A, sign, logabsdet, inverse,
                                                                                  info);
  return outcome();
}

template <class T>
const char* plu_assemble(Stream stream, long long count, const Layer<T>& first, T* A, T* A_inv, T* c, T* logabsdet) {
  if (!count) return nullptr;
  plu_assemble_kernel<<<static_cast<unsigned>(count * slices_of(first.D)), block_threads, plu_assemble_bytes<T>(first.D),
                        static_cast<cudaStream_t>(stream)>>>(first, A, A_inv, c, logabsdet);
  return outcome();
}

template <class T>
const char* plu_assemble_backward(Stream stream, long long count, const Layer<T>& first, const T* A, const T* A_inv,
                                  const T* grad_A, const T* grad_A_inv, const T* grad_c, const T* grad_logabsdet,
                                  const LayerGradients<T>& grad, T* work) {
  if (!count) return nullptr;
  const auto s = static_cast<cudaStream_t>(stream);
  const int D = first.D;
  if (grad_A_inv) {  // grad.lower is room for it until it gets its values
    plu_inverse_gradient_kernel<<<static_cast<unsigned>(count * strips_of(D)), block_threads, product_bytes<T>(), s>>>(
        D, A_inv, grad_A, grad_A_inv, grad.lower, work);
    if (const char* error = outcome()) return error;
  }
  const long long blocks = count * backward_jobs(D, first.log_scale);
  plu_assemble_backward_kernel<<<static_cast<unsigned>(blocks), block_threads, plu_backward_bytes<T>(D), s>>>(
      first, A, grad_A_inv ? work : grad_A, grad_c, grad_logabsdet, grad);
  return outcome();
}

#define GLF_INSTANTIATE(T)                                                                                             \
  template const char* slogdet_inverse(Stream, long long, int, const T*, T*, T*, T*, int*);                            \
  template const char* plu_assemble(Stream, long long, const Layer<T>&, T*, T*, T*, T*);                               \
  template const char* plu_assemble_backward(Stream, long long, const Layer<T>&, const T*, const T*, const T*,         \
                                             const T*, const T*, const T*, const LayerGradients<T>&, T*);
GLF_INSTANTIATE(float)
GLF_INSTANTIATE(double)

}  // namespace glf::device
