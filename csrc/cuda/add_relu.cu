// out = relu(x + residual) and its gradient, over dense memory of any layout.
#include <torch/csrc/stable/library.h>

#include "batch_norm.h"

namespace fused_resnet {
namespace {

// ---- kernels ------------------------------------------------------------------------------------------------------------

// out = relu(a + b); Backward: a where b > 0 or b is NaN, else 0. Reads both, writes out.
template <typename T, int V, bool Backward>
__global__ void __launch_bounds__(kThreads)
    add_relu_kernel(int64_t n, const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ out) {
  const auto result = [](float a, float b) { return store<T>(Backward ? relu_grad(a, b) : relu(a + b)); };
  const int64_t vectors = n / V, first = int64_t(blockIdx.x) * (kThreads * kFlat) + threadIdx.x;
  Vector<T, V> from_a[kFlat], from_b[kFlat];
#pragma unroll
  for (int u = 0; u < kFlat; ++u) {
    const int64_t i = first + u * kThreads;
    if (i < vectors) from_a[u] = Vector<T, V>::at(a + i * V), from_b[u] = Vector<T, V>::at(b + i * V);
  }
#pragma unroll
  for (int u = 0; u < kFlat; ++u) {
    const int64_t i = first + u * kThreads;
    if (i >= vectors) continue;
    Vector<T, V> to;
    for (int v = 0; v < V; ++v) to.value[v] = result(from_a[u][v], from_b[u][v]);
    to.to(out + i * V);
  }
  const int64_t rest = vectors * V + threadIdx.x;
  if (blockIdx.x == 0 && rest < n) out[rest] = result(load(a[rest]), load(b[rest]));
}

// ---- launch -------------------------------------------------------------------------------------------------------------

template <bool Backward>
void run(const Device& device, const char* name, const Tensor& a, const Tensor& b, const Tensor& out) {
  dispatch_storage(a.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    constexpr int kVector = 16 / sizeof(T);
    const int64_t n = a.numel();
    const int32_t vector = vector_size(sizeof(T), kVector, kVector, addresses(a, b, out));
    const auto kernel = vector == kVector ? add_relu_kernel<T, kVector, Backward> : add_relu_kernel<T, 1, Backward>;
    device.launch(name, kernel, flat_blocks(n, vector), 1, n, read<T>(a), read<T>(b), write<T>(out));
  });
}

// ---- operators ----------------------------------------------------------------------------------------------------------

Tensor add_relu_forward(const Tensor& x, const Tensor& residual) {
  STD_TORCH_CHECK(is_dense(x), "x must be dense");
  check_like(residual, x, "residual");
  const Device device(x);
  Tensor out = new_like(x);
  if (x.numel() != 0) run<false>(device, "add_relu", x, residual, out);
  return out;
}

Tensor add_relu_backward(const Tensor& grad, const Tensor& out) {
  STD_TORCH_CHECK(is_dense(out), "out must be dense");
  check_like(grad, out, "grad");
  const Device device(out);
  Tensor grad_x = new_like(out);
  if (out.numel() != 0) run<true>(device, "add_relu backward", grad, out, grad_x);
  return grad_x;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(FR_DEVICE_LIBRARY, FR_DEVICE_KEY, m) {
  m.impl("add_relu_forward", TORCH_BOX(&fused_resnet::add_relu_forward));
  m.impl("add_relu_backward", TORCH_BOX(&fused_resnet::add_relu_backward));
}
