// out = act(bn(x) + shortcut), the shortcut being nothing, a tensor or a second batch norm: forward and backward.
#include <torch/csrc/stable/library.h>

#include "batch_norm.h"

namespace fused_resnet {
namespace {

enum class Shortcut { none, residual, bn };

// ---- kernels ------------------------------------------------------------------------------------------------------------

// Reads x (and the shortcut), writes out.
template <typename T, int V, bool Rows, Shortcut S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    apply_kernel(Cut cut, const T* __restrict__ x, const T* __restrict__ shortcut, T* __restrict__ out, Norm norm, Norm norm2,
                 bool with_relu) {
  const Share share(cut, threadIdx.x, blockIdx.x, blockIdx.y);
  if (!share.inside) return;
  constexpr int K = Rows ? V : 1;
  const Affine<K> bn(norm, share.channel), bn2(S == Shortcut::bn ? norm2 : Norm{}, share.channel);
#pragma unroll 2
  for (Walk<V, Rows, true> walk(cut, share); walk.left > 0; --walk.left, walk.next()) {
    const int64_t i = share.base + walk.offset();
    const auto from = Vector<T, V>::at(x + i);
    Vector<T, V> other{}, result;
    if constexpr (S != Shortcut::none) other = Vector<T, V>::at(shortcut + i);
    for (int v = 0; v < V; ++v) {
      const int k = Rows ? v : 0;
      float y = bn(from[v], k);
      if constexpr (S == Shortcut::residual) y += other[v];
      if constexpr (S == Shortcut::bn) y += bn2(other[v], k);
      result.value[v] = store<T>(with_relu ? relu(y) : y);
    }
    result.to(out + i);
  }
}

// The gradient through the ReLU of act(bn(x) + bn2(x2)), as its output would be stored.
template <typename T, int K>
__device__ float masked(float g, float x, float x2, const Affine<K>& bn, const Affine<K>& bn2, bool second, int k) {
  float y = bn(x, k);
  if (second) y += bn2(x2, k);
  return relu_grad(g, rounded<T>(y));
}

// Sums over rows of g, g * (x - mean) and, with a second batch norm, g * (x2 - mean2), g being grad masked by `out` (S:
// residual) or by act's input, computed anew. Stores g as grad_shortcut (S: residual, relu); with given statistics, scale * g as
// grad_x. Reads grad, x (and out or x2).
template <typename T, int V, bool Rows, Shortcut S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward_reduce_kernel(Cut cut, const T* __restrict__ grad, const T* __restrict__ x, const T* __restrict__ other,
                           T* __restrict__ grad_shortcut, T* __restrict__ grad_x, Norm norm, Norm norm2, bool with_relu,
                           Sums<S == Shortcut::bn ? 3 : 2>* __restrict__ parts) {
  constexpr int K = Rows ? V : 1, N = S == Shortcut::bn ? 3 : 2;
  const Share share(cut, threadIdx.x, blockIdx.x, blockIdx.y);
  Sums<N> sums[V] = {};
  if (share.inside) {
    const Affine<K> bn(norm, share.channel), bn2(S == Shortcut::bn ? norm2 : Norm{}, share.channel);
#pragma unroll (N == 3 ? 1 : 2)
    for (Walk<V, Rows, false> walk(cut, share); walk.left > 0; --walk.left, walk.next()) {
      const int64_t i = share.base + walk.offset();
      const auto from = Vector<T, V>::at(x + i), above = Vector<T, V>::at(grad + i);
      Vector<T, V> beside{}, to_shortcut, to_x;
      if constexpr (S == Shortcut::residual) {
        if (with_relu) beside = Vector<T, V>::at(other + i);
      }
      if constexpr (S == Shortcut::bn) beside = Vector<T, V>::at(other + i);
      for (int v = 0; v < V; ++v) {
        const int k = Rows ? v : 0;
        float g = above[v];
        if (with_relu) {
          if constexpr (S == Shortcut::residual) g = relu_grad(g, beside[v]);
          else g = masked<T>(g, from[v], beside[v], bn, bn2, S == Shortcut::bn, k);
        }
        to_shortcut.value[v] = store<T>(g);
        to_x.value[v] = store<T>(bn.scale[k] * g);
        sums[v].sum[0] += g;
        sums[v].sum[1] += g * (from[v] - bn.mean[k]);
        if constexpr (N == 3) sums[v].sum[2] += g * (beside[v] - bn2.mean[k]);
      }
      if constexpr (S == Shortcut::residual) {
        if (with_relu) to_shortcut.to(grad_shortcut + i);
      }
      if (grad_x) to_x.to(grad_x + i);
    }
  }
  store_part<Rows>(sums, cut, share, parts, Added{});
}

// What a backward pass gives the parameters; the second pass computes its coefficients from that.
struct Given {
  const float *grad_gamma, *grad_beta;
};

// grad_x, and grad_x2 of a second batch norm, in training. Reads grad, x (and x2).
template <typename T, int V, bool Rows, bool Second>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward_apply_kernel(Cut cut, const T* __restrict__ grad, const T* __restrict__ x, const T* __restrict__ x2,
                          T* __restrict__ grad_x, T* __restrict__ grad_x2, Norm norm, Norm norm2, Given given, Given given2,
                          float count, bool with_relu) {
  const Share share(cut, threadIdx.x, blockIdx.x, blockIdx.y);
  if (!share.inside) return;
  constexpr int K = Rows ? V : 1;
  const int32_t c = share.channel;
  const Affine<K> bn(norm, c), bn2(Second ? norm2 : Norm{}, c);
  const Slopes<K> slopes(norm, given.grad_gamma, given.grad_beta, count, c);
  const Slopes<K> slopes2(Second ? norm2 : norm, (Second ? given2 : given).grad_gamma, given.grad_beta, count, c);
#pragma unroll 2
  for (Walk<V, Rows, true> walk(cut, share); walk.left > 0; --walk.left, walk.next()) {
    const int64_t i = share.base + walk.offset();
    const auto from = Vector<T, V>::at(x + i), above = Vector<T, V>::at(grad + i);
    Vector<T, V> beside{}, to_x, to_x2;
    if constexpr (Second) beside = Vector<T, V>::at(x2 + i);
    for (int v = 0; v < V; ++v) {
      const int k = Rows ? v : 0;
      float g = above[v];
      if (with_relu) g = masked<T>(g, from[v], beside[v], bn, bn2, Second, k);
      to_x.value[v] = store<T>(bn_grad(g, from[v], bn.mean[k], bn.scale[k], slopes.k1[k], slopes.k2[k]));
      if constexpr (Second) {
        to_x2.value[v] = store<T>(bn_grad(g, beside[v], bn2.mean[k], bn2.scale[k], slopes.k1[k], slopes2.k2[k]));
      }
    }
    to_x.to(grad_x + i);
    if constexpr (Second) to_x2.to(grad_x2 + i);
  }
}

// ---- launches -----------------------------------------------------------------------------------------------------------

template <Shortcut S>
void apply(const Device& device, const Tensor& x, const Shape& shape, const OptionalTensor& shortcut, const Tensor& out,
           const Norm& norm, const Norm& norm2, bool relu) {
  const uintptr_t all = addresses(x, out) | address(shortcut);
  dispatch_cut(device, x.scalar_type(), shape, all, [&](auto tag, const Cut& cut, auto vector, auto rows) {
    using T = decltype(tag);
    device.launch("bn_act forward", apply_kernel<T, vector.value, rows.value, S>, cut.blocks, cut.parts, cut, read<T>(x),
                  shortcut ? read<T>(*shortcut) : nullptr, write<T>(out), norm, norm2, relu);
  });
}

void apply(const Device& device, const Tensor& x, const Shape& shape, const OptionalTensor& residual, const Tensor& out,
           const Norm& norm, bool relu) {
  if (residual) apply<Shortcut::residual>(device, x, shape, residual, out, norm, {}, relu);
  else apply<Shortcut::none>(device, x, shape, residual, out, norm, {}, relu);
}

// (parts of the sums, their number); `other` is out or x2.
template <Shortcut S>
std::pair<Tensor, int32_t> reduce(const Device& device, const Tensor& grad, const Tensor& x, const Shape& shape,
                                  const OptionalTensor& other, const Tensor* grad_shortcut, const Tensor* grad_x,
                                  const Norm& norm, const Norm& norm2, bool relu) {
  constexpr int N = S == Shortcut::bn ? 3 : 2;
  uintptr_t all = addresses(grad, x) | address(other);
  if (grad_shortcut) all |= addresses(*grad_shortcut);
  if (grad_x) all |= addresses(*grad_x);
  std::optional<std::pair<Tensor, int32_t>> result;
  dispatch_cut(device, x.scalar_type(), shape, all, [&](auto tag, const Cut& cut, auto vector, auto rows) {
    using T = decltype(tag);
    result.emplace(workspace(x, cut.parts * shape.c * int64_t(sizeof(Sums<N>))), cut.parts);
    device.launch("bn_act backward, sums", backward_reduce_kernel<T, vector.value, rows.value, S>, cut.blocks, cut.parts, cut,
                  read<T>(grad), read<T>(x), other ? read<T>(*other) : nullptr,
                  grad_shortcut ? write<T>(*grad_shortcut) : nullptr, grad_x ? write<T>(*grad_x) : nullptr, norm, norm2, relu,
                  write<Sums<N>>(result->first));
  });
  return *result;
}

Given given_by(const ParameterGrads& grads) { return {read<float>(grads.gamma), read<float>(grads.beta)}; }

// ---- operators ----------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> bn_act_train_forward(
    const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& residual, double momentum, double eps, bool relu) {
  const Shape shape = checked_shape(x);
  const int64_t c = shape.c;
  if (residual) check_like(*residual, x, "residual");
  const Running running = running_of(running_mean, running_var, momentum, c);
  const Device device(x);
  Tensor out = new_like(x);
  if (shape.numel() == 0) return {out, zero_vector(x, c), zero_vector(x, c)};
  const auto [mean, var] = batch_statistics(device, x, shape, running);
  apply(device, x, shape, residual, out, norm_of(mean, var, gamma, beta, eps, c), relu);
  return {out, mean, var};
}

Tensor bn_act_eval_forward(const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta,
                           const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& residual, double eps,
                           bool relu) {
  const Shape shape = checked_shape(x);
  if (residual) check_like(*residual, x, "residual");
  const Norm norm = norm_of(mean, var, gamma, beta, eps, shape.c);
  const Device device(x);
  Tensor out = new_like(x);
  if (shape.numel() != 0) apply(device, x, shape, residual, out, norm, relu);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(
    const Tensor& grad, const Tensor& x, const OptionalTensor& out, const OptionalTensor& gamma, const OptionalTensor& beta,
    const Tensor& mean, const Tensor& var, double eps, bool relu, bool training, bool has_residual) {
  const Shape shape = checked_shape(x);
  const int64_t c = shape.c;
  const bool by_out = relu && has_residual;
  check_like(grad, x, "grad");
  if (by_out) {
    STD_TORCH_CHECK(out.has_value(), "out is needed for the gradient of a ReLU after a residual");
    check_like(*out, x, "out");
  }
  const Norm norm = norm_of(mean, var, gamma, beta, eps, c);
  const Device device(x);
  Tensor grad_x = new_like(x), grad_residual = by_out ? new_like(x) : no_tensor(x);
  if (shape.numel() == 0) return {grad_x, zero_vector(x, c), zero_vector(x, c), grad_residual};
  const Tensor* at_once = training ? nullptr : &grad_x;
  const auto [parts, count] =
      by_out ? reduce<Shortcut::residual>(device, grad, x, shape, out, &grad_residual, at_once, norm, {}, true)
             : reduce<Shortcut::none>(device, grad, x, shape, std::nullopt, nullptr, at_once, norm, {}, relu);
  const ParameterGrads grads = finish_gradients(device, x, parts, count, c, norm);
  if (training) {
    const Tensor& g = by_out ? grad_residual : grad;
    dispatch_cut(device, x.scalar_type(), shape, addresses(g, x, grad_x), [&](auto tag, const Cut& cut, auto vector, auto rows) {
      using T = decltype(tag);
      const Given given = given_by(grads);
      device.launch("bn_act backward", backward_apply_kernel<T, vector.value, rows.value, false>, cut.blocks, cut.parts, cut,
                    read<T>(g), read<T>(x), nullptr, write<T>(grad_x), nullptr, norm, norm, given, given,
                    float(shape.count()), relu && !by_out);
    });
  }
  return {grad_x, grads.gamma, grads.beta, grad_residual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_bn_act_train_forward(
    const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, double momentum, double eps, const Tensor& x2, const OptionalTensor& gamma2,
    const OptionalTensor& beta2, const OptionalTensor& running_mean2, const OptionalTensor& running_var2, double momentum2,
    double eps2, bool relu) {
  const Shape shape = checked_shape(x);
  const int64_t c = shape.c;
  check_like(x2, x, "x2");
  const Running running = running_of(running_mean, running_var, momentum, c);
  const Running running2 = running_of(running_mean2, running_var2, momentum2, c);
  const Device device(x);
  Tensor out = new_like(x);
  if (shape.numel() == 0) return {out, zero_vector(x, c), zero_vector(x, c), zero_vector(x, c), zero_vector(x, c)};
  const auto [mean, var] = batch_statistics(device, x, shape, running);
  const auto [mean2, var2] = batch_statistics(device, x2, shape, running2);
  apply<Shortcut::bn>(device, x, shape, x2, out, norm_of(mean, var, gamma, beta, eps, c),
                      norm_of(mean2, var2, gamma2, beta2, eps2, c), relu);
  return {out, mean, var, mean2, var2};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_bn_act_backward(
    const Tensor& grad, const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta, const Tensor& mean,
    const Tensor& var, double eps, const Tensor& x2, const OptionalTensor& gamma2, const OptionalTensor& beta2,
    const Tensor& mean2, const Tensor& var2, double eps2, bool relu) {
  const Shape shape = checked_shape(x);
  const int64_t c = shape.c;
  check_like(grad, x, "grad");
  check_like(x2, x, "x2");
  const Norm norm = norm_of(mean, var, gamma, beta, eps, c), norm2 = norm_of(mean2, var2, gamma2, beta2, eps2, c);
  const Device device(x);
  Tensor grad_x = new_like(x), grad_x2 = new_like(x);
  if (shape.numel() == 0) return {grad_x, zero_vector(x, c), zero_vector(x, c), grad_x2, zero_vector(x, c), zero_vector(x, c)};
  const auto [parts, count] = reduce<Shortcut::bn>(device, grad, x, shape, x2, nullptr, nullptr, norm, norm2, relu);
  const auto [first, second] = finish_gradients(device, x, parts, count, c, norm, norm2);
  const Given given = given_by(first), given2 = given_by(second);
  dispatch_cut(device, x.scalar_type(), shape, addresses(grad, x, x2, grad_x, grad_x2),
               [&](auto tag, const Cut& cut, auto vector, auto rows) {
                 using T = decltype(tag);
                 device.launch("bn + bn backward", backward_apply_kernel<T, vector.value, rows.value, true>, cut.blocks,
                               cut.parts, cut, read<T>(grad), read<T>(x), read<T>(x2), write<T>(grad_x), write<T>(grad_x2),
                               norm, norm2, given, given2, float(shape.count()), relu);
               });
  return {grad_x, first.gamma, first.beta, grad_x2, second.gamma, second.beta};
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(FR_DEVICE_LIBRARY, FR_DEVICE_KEY, m) {
  m.impl("bn_act_train_forward", TORCH_BOX(&fused_resnet::bn_act_train_forward));
  m.impl("bn_act_eval_forward", TORCH_BOX(&fused_resnet::bn_act_eval_forward));
  m.impl("bn_act_backward", TORCH_BOX(&fused_resnet::bn_act_backward));
  m.impl("bn_bn_act_train_forward", TORCH_BOX(&fused_resnet::bn_bn_act_train_forward));
  m.impl("bn_bn_act_backward", TORCH_BOX(&fused_resnet::bn_bn_act_backward));
}
