// What the batch norm kernels share: vectors, per-channel coefficients, merging within a block, statistics, checks.
#pragma once

#include <cstdint>
#include <optional>
#include <type_traits>
#include <utility>

#include "device.h"

namespace fused_resnet {

// ---- device -------------------------------------------------------------------------------------------------------------

// V elements that are loaded and stored at once.
template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T value[V];

  __device__ static Vector at(const T* p) { return *reinterpret_cast<const Vector*>(p); }
  __device__ void to(T* p) const { *reinterpret_cast<Vector*>(p) = *this; }
  __device__ float operator[](int i) const { return load(value[i]); }
};

// A batch norm's vectors; nullptr stands for 0, 1, 1, 0.
struct Norm {
  const float *mean, *var, *gamma, *beta;
  float eps;

  __device__ float rstd(int32_t c) const { return bn_rstd_fast(var ? var[c] : 1.0f, eps); }
};

// bn(x) = scale * (x - mean) + beta for K channels from c on.
template <int K>
struct Affine {
  float mean[K], scale[K], beta[K];

  __device__ Affine(const Norm& norm, int32_t c) {
    for (int k = 0; k < K; ++k) {
      mean[k] = norm.mean ? norm.mean[c + k] : 0.0f;
      scale[k] = norm.gamma ? norm.gamma[c + k] * norm.rstd(c + k) : norm.rstd(c + k);
      beta[k] = norm.beta ? norm.beta[c + k] : 0.0f;
    }
  }
  __device__ float operator()(float x, int k) const { return bn(x, mean[k], scale[k], beta[k]); }
};

// The coefficients of grad_x in training, see bn_grad.
template <int K>
struct Slopes {
  float k1[K], k2[K];

  __device__ Slopes(const Norm& norm, const float* grad_gamma, const float* grad_beta, float count, int32_t c) {
    for (int k = 0; k < K; ++k) {
      k1[k] = grad_beta[c + k] / count;
      k2[k] = grad_gamma[c + k] / count * norm.rstd(c + k);
    }
  }
};

// Sums over rows: of g, g * (x - mean) and, for a second batch norm, g * (x2 - mean2).
template <int N>
struct Sums {
  float sum[N];

  __device__ Sums operator+(const Sums& other) const {
    Sums both;
    for (int i = 0; i < N; ++i) both.sum[i] = sum[i] + other.sum[i];
    return both;
  }
};

struct Added {
  template <int N>
  __device__ Sums<N> operator()(const Sums<N>& a, const Sums<N>& b) const { return a + b; }
};

// What the threads whose numbers agree modulo `across` hold becomes one, in a fixed order; the result is in the first
// `across` threads. Once in a kernel.
template <int K, typename Value, typename Merge>
__device__ void merge_block(Value (&mine)[K], int32_t across, const Merge& merge) {
  __shared__ Value held[K][kThreads];
  const int32_t t = threadIdx.x;
  for (int k = 0; k < K; ++k) held[k][t] = mine[k];
  for (int32_t half = kThreads / 2; half >= across; half /= 2) {
    __syncthreads();
    if (t >= half) continue;
    for (int k = 0; k < K; ++k) held[k][t] = merge(held[k][t], held[k][t + half]);
  }
  for (int k = 0; k < K; ++k) mine[k] = held[k][t];
}

// A block's share of the sums goes to (P, C) parts. In planes a thread's K accumulators belong to one channel.
template <bool Rows, int K, typename Value, typename Merge>
__device__ void store_part(Value (&mine)[K], const Cut& cut, const Share& share, Value* parts, const Merge& merge) {
  constexpr int kChannels = Rows ? K : 1;
  Value channel[kChannels];
  for (int k = 0; k < kChannels; ++k) channel[k] = mine[k];
  for (int k = kChannels; k < K; ++k) channel[0] = merge(channel[0], mine[k]);
  merge_block<kChannels>(channel, cut.across, merge);
  if (int32_t(threadIdx.x) >= cut.across || !share.inside) return;
  for (int k = 0; k < kChannels; ++k) parts[int64_t(blockIdx.y) * cut.channels + share.channel + k] = channel[k];
}

// ---- host ---------------------------------------------------------------------------------------------------------------

inline Shape checked_shape(const Tensor& x) {
  const Shape shape = shape_of(x);
  STD_TORCH_CHECK(shape.count() < kMostPositions, "x has ", shape.count(), " values per channel, the kernels take fewer than ",
                  kMostPositions);
  return shape;
}

inline Tensor zero_vector(const Tensor& x, int64_t c) {
  Tensor t = new_vector(x, c);
  torch::stable::zero_(t);
  return t;
}

// Uninitialised bytes on x's device.
inline Tensor workspace(const Tensor& x, int64_t bytes) {
  const int64_t stride = 1;
  return new_strided(x, 1, &bytes, &stride, aoti_torch_dtype_uint8());
}

template <typename... Tensors>
uintptr_t addresses(const Tensors&... tensors) {
  return (uintptr_t(0) | ... | reinterpret_cast<uintptr_t>(tensors.const_data_ptr()));
}
inline uintptr_t address(const OptionalTensor& t) { return t ? addresses(*t) : 0; }

inline Norm norm_of(const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& gamma,
                    const OptionalTensor& beta, double eps, int64_t c) {
  const auto vector = [c](const OptionalTensor& t, const char* name) {
    return vector_data<const float>(t, c, ScalarType::Float, name);
  };
  return {vector(mean, "mean"), vector(var, "var"), vector(gamma, "gamma"), vector(beta, "beta"), float(eps)};
}

// f(T{}) with the storage type of dtype.
template <typename F>
void dispatch_storage(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(bf16{});
    case ScalarType::Half: return f(fp16{});
    default: STD_TORCH_CHECK(false, "dtype must be float32, bfloat16 or float16");
  }
}

// f(T{}, cut, vector, rows): the storage type and how the tensor is cut; `vector` and `rows` are constants of the type, by
// which kernels are instantiated. `addresses`: of all tensors that are accessed by vectors, or-ed.
template <typename F>
void dispatch_cut(const Device& device, ScalarType dtype, const Shape& shape, uintptr_t addresses, const F& f) {
  dispatch_storage(dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int kVector = 16 / sizeof(T);
    const int32_t vector = vector_size(sizeof(T), kVector, shape.rows ? shape.c : shape.s, addresses);
    dispatch_bool(shape.rows, [&](auto rows) {
      const auto plan = rows.value ? cut_rows : cut_planes;
      const Cut cut = plan(shape.n, shape.c, shape.s, vector, device.multiprocessors());
      if (vector == kVector) f(tag, cut, std::integral_constant<int, kVector>{}, rows);
      else f(tag, cut, std::integral_constant<int, 1>{}, rows);
    });
  });
}

struct Running {
  float *mean, *var;
  double momentum;
};

inline Running running_of(const OptionalTensor& mean, const OptionalTensor& var, double momentum, int64_t c) {
  return {vector_data<float>(mean, c, ScalarType::Float, "running_mean"),
          vector_data<float>(var, c, ScalarType::Float, "running_var"), momentum};
}

// (mean, biased var) of each channel; updates the running statistics.
std::pair<Tensor, Tensor> batch_statistics(const Device& device, const Tensor& x, const Shape& shape, const Running& running);

struct ParameterGrads {
  Tensor gamma, beta;
};

// From (parts, C) Sums<2>; of two batch norms from Sums<3>, with var2.
ParameterGrads finish_gradients(const Device& device, const Tensor& x, const Tensor& parts, int32_t count, int64_t c,
                                const Norm& norm);
std::pair<ParameterGrads, ParameterGrads> finish_gradients(const Device& device, const Tensor& x, const Tensor& parts,
                                                           int32_t count, int64_t c, const Norm& norm, const Norm& norm2);

}  // namespace fused_resnet
