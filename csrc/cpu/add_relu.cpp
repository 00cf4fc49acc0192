// out = relu(x + residual) and its gradient, over dense memory of any layout.
#include <torch/csrc/stable/library.h>

#include "memory.h"
#include "parallel.h"

namespace fused_resnet {
namespace {

// 3 B: reads x and residual, writes out (B = bytes of x).
template <typename T>
FR_CLONES void add_relu(int64_t n, const T* __restrict x, const T* __restrict residual, T* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = store<T>(relu(load(x[i]) + load(residual[i])));
}

// 3 B: reads grad and out, writes grad_x, which is the residual's gradient too.
template <typename T>
FR_CLONES void add_relu_grad(int64_t n, const T* __restrict grad, const T* __restrict out, T* __restrict grad_x) {
  for (int64_t i = 0; i < n; ++i) grad_x[i] = store<T>(relu_grad(load(grad[i]), load(out[i])));
}

template <typename F>
void for_blocks(int64_t n, const F& f) {
  parallel_items(ceil_div(n, kGrain), kGrain, false, [&](int64_t i) { f(i * kGrain, std::min(kGrain, n - i * kGrain)); });
}

Tensor add_relu_forward(const Tensor& x, const Tensor& residual) {
  STD_TORCH_CHECK(is_dense(x), "x must be dense");
  check_like(residual, x, "residual");
  Tensor out = new_large_like(x);
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T *px = read<T>(x), *pr = read<T>(residual);
    T* po = write<T>(out);
    for_blocks(x.numel(), [=](int64_t i, int64_t n) { add_relu<T>(n, px + i, pr + i, po + i); });
  });
  return out;
}

Tensor add_relu_backward(const Tensor& grad, const Tensor& out) {
  STD_TORCH_CHECK(is_dense(out), "out must be dense");
  check_like(grad, out, "grad");
  Tensor grad_x = new_large_like(out);
  dispatch_dtype(out.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T *pg = read<T>(grad), *po = read<T>(out);
    T* px = write<T>(grad_x);
    for_blocks(out.numel(), [=](int64_t i, int64_t n) { add_relu_grad<T>(n, pg + i, po + i, px + i); });
  });
  return grad_x;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpp, CPU, m) {
  m.impl("add_relu_forward", TORCH_BOX(&fused_resnet::add_relu_forward));
  m.impl("add_relu_backward", TORCH_BOX(&fused_resnet::add_relu_backward));
}
