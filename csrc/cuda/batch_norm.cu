// Batch statistics, and what a small kernel makes of the sums of a backward pass.
#include "batch_norm.h"

namespace fused_resnet {
namespace {

// ---- kernels ------------------------------------------------------------------------------------------------------------

struct Merged {
  __device__ Part<float> operator()(const Part<float>& a, const Part<float>& b) const { return merged(a, b); }
};

// parts (P, C): count, mean and M2 of each block's positions. Reads x once.
template <typename T, int V, bool Rows>
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(Cut cut, const T* __restrict__ x, Part<float>* __restrict__ parts) {
  const Share share(cut, threadIdx.x, blockIdx.x, blockIdx.y);
  float n = 0, mean[V] = {}, m2[V] = {}, sum[V] = {};
  if (share.inside) {
    x += share.base;
#pragma unroll 4
    for (Walk<V, Rows, false> walk(cut, share); walk.left > 0; --walk.left, walk.next()) {
      const auto values = Vector<T, V>::at(x + walk.offset());
      n += 1;
      const float inverse = 1 / n;
      for (int k = 0; k < V; ++k) {
        include(mean[k], m2[k], values[k], inverse);
        sum[k] += values[k];
      }
    }
  }
  Part<float> mine[V];
  for (int k = 0; k < V; ++k) mine[k] = {n, finite_or(mean[k], sum[k]), m2[k]};
  store_part<Rows>(mine, cut, share, parts, Merged{});
}

// A channel and every along-th part from the first on, for each thread of a finishing kernel.
struct Finish {
  int32_t c, first, along;

  __device__ Finish()
      : c(blockIdx.x * kFinished + threadIdx.x % kFinished), first(threadIdx.x / kFinished), along(kThreads / kFinished) {}
  __device__ bool stores(int32_t channels) const { return threadIdx.x < kFinished && c < channels; }
};

// mean and biased var of (P, C) parts; the running statistics.
__global__ void __launch_bounds__(kThreads)
    statistics_finish_kernel(const Part<float>* __restrict__ parts, int32_t count, int32_t channels, double rows,
                             float* __restrict__ mean, float* __restrict__ var, Running running) {
  const Finish finish;
  Part<float> total[1] = {{0, 0, 0}};
  if (finish.c < channels) {
    for (int32_t p = finish.first; p < count; p += finish.along) {
      total[0] = merged(total[0], parts[int64_t(p) * channels + finish.c]);
    }
  }
  merge_block<1>(total, kFinished, Merged{});
  if (!finish.stores(channels)) return;
  const int32_t c = finish.c;
  const double batch_var = total[0].m2 / rows;
  mean[c] = total[0].mean;
  var[c] = float(batch_var);
  if (running.mean) running.mean[c] = update_running(running.mean[c], total[0].mean, running.momentum);
  if (running.var) running.var[c] = update_running(running.var[c], unbiased(batch_var, rows), running.momentum);
}

// grad_beta = sum(g) and grad_gamma = rstd * sum(g * (x - mean)), for one or both batch norms.
template <int N>
__global__ void __launch_bounds__(kThreads)
    gradients_finish_kernel(const Sums<N>* __restrict__ parts, int32_t count, int32_t channels, Norm norm, Norm norm2,
                            float* __restrict__ grad_gamma, float* __restrict__ grad_beta, float* __restrict__ grad_gamma2,
                            float* __restrict__ grad_beta2) {
  const Finish finish;
  Sums<N> total[1] = {};
  if (finish.c < channels) {
    for (int32_t p = finish.first; p < count; p += finish.along) {
      total[0] = total[0] + parts[int64_t(p) * channels + finish.c];
    }
  }
  merge_block<1>(total, kFinished, Added{});
  if (!finish.stores(channels)) return;
  const int32_t c = finish.c;
  grad_beta[c] = total[0].sum[0];
  grad_gamma[c] = total[0].sum[1] * norm.rstd(c);
  if constexpr (N == 3) {
    grad_beta2[c] = total[0].sum[0];
    grad_gamma2[c] = total[0].sum[2] * norm2.rstd(c);
  }
}

}  // namespace

// ---- launches -----------------------------------------------------------------------------------------------------------

std::pair<Tensor, Tensor> batch_statistics(const Device& device, const Tensor& x, const Shape& shape, const Running& running) {
  const int64_t c = shape.c;
  Tensor mean = new_vector(x, c), var = new_vector(x, c);
  dispatch_cut(device, x.scalar_type(), shape, addresses(x), [&](auto tag, const Cut& cut, auto vector, auto rows) {
    using T = decltype(tag);
    const Tensor parts = workspace(x, cut.parts * c * int64_t(sizeof(Part<float>)));
    device.launch("bn statistics", statistics_kernel<T, vector.value, rows.value>, cut.blocks, cut.parts, cut, read<T>(x),
                  write<Part<float>>(parts));
    device.launch("bn statistics, finish", statistics_finish_kernel, ceil_div(c, kFinished), 1, read<Part<float>>(parts),
                  cut.parts, cut.channels, double(shape.count()), write<float>(mean), write<float>(var), running);
  });
  return {mean, var};
}

ParameterGrads finish_gradients(const Device& device, const Tensor& x, const Tensor& parts, int32_t count, int64_t c,
                                const Norm& norm) {
  const ParameterGrads grads{new_vector(x, c), new_vector(x, c)};
  device.launch("bn backward, finish", gradients_finish_kernel<2>, ceil_div(c, kFinished), 1, read<Sums<2>>(parts), count,
                int32_t(c), norm, norm, write<float>(grads.gamma), write<float>(grads.beta), nullptr, nullptr);
  return grads;
}

std::pair<ParameterGrads, ParameterGrads> finish_gradients(const Device& device, const Tensor& x, const Tensor& parts,
                                                           int32_t count, int64_t c, const Norm& norm, const Norm& norm2) {
  const ParameterGrads first{new_vector(x, c), new_vector(x, c)}, second{new_vector(x, c), new_vector(x, c)};
  device.launch("bn + bn backward, finish", gradients_finish_kernel<3>, ceil_div(c, kFinished), 1, read<Sums<3>>(parts),
                count, int32_t(c), norm, norm2, write<float>(first.gamma), write<float>(first.beta),
                write<float>(second.gamma), write<float>(second.beta));
  return {first, second};
}

}  // namespace fused_resnet
