// out = max_pool(act(bn(x))), the window 3x3 with stride 2 and padding 1: training and eval forward, backward.
//
// act's output is never stored. Backward, a thread owns quads of pixels of x, (2a, 2b) to (2a + 1, 2b + 1), as many as there are
// windows: only the windows (a, b), (a, b + 1), (a + 1, b) and (a + 1, b + 1) can have picked one of them, so the gradient is
// gathered.
#include <torch/csrc/stable/library.h>

#include <array>
#include <limits>

#include "batch_norm.h"

namespace fused_resnet {
namespace {

// x is (N, C, H, W), out (N, C, P, Q); strides in elements.
struct Pool {
  int32_t h, w, p, q;
  int64_t image, row, pixel, plane, out_row;
};

// ---- kernels ------------------------------------------------------------------------------------------------------------

// The first of the pixels (2a, 2b), ... of x that belong to a position of out.
struct Place {
  int32_t a, b;
  int64_t x;

  __device__ Place(const Pool& pool, int32_t position, int32_t channel) {
    const int32_t line = position / pool.q, n = line / pool.p;
    b = position - line * pool.q, a = line - n * pool.p;
    x = n * pool.image + 2 * a * pool.row + 2 * b * pool.pixel + channel * pool.plane;
  }
};

// Reads what the windows see of x, writes out and, where wanted, the offsets of the maxima within their windows.
template <typename T, int V, bool Rows>
__global__ void __launch_bounds__(kThreads, kBlocks)
    pool_kernel(Cut cut, Pool pool, const T* __restrict__ x, T* __restrict__ out, uint8_t* __restrict__ offsets, Norm norm,
                bool with_relu) {
  const Share share(cut, threadIdx.x, blockIdx.x, blockIdx.y);
  if (!share.inside) return;
  const Affine<V> bn(norm, share.channel);
  for (Walk<V, Rows, true> walk(cut, share); walk.left > 0; --walk.left, walk.next()) {
    const Place place(pool, walk.position(), share.channel);
    const int32_t first = (place.a == 0 ? 3 : 0) + (place.b == 0 ? 1 : 0);  // the first tap that is no padding
    float best[V];
    int32_t which[V];
    for (int v = 0; v < V; ++v) best[v] = -std::numeric_limits<float>::infinity(), which[v] = first;
#pragma unroll
    for (int32_t tap = 0; tap < 9; ++tap) {
      const int32_t down = tap / 3 - 1, right = tap % 3 - 1, h = 2 * place.a + down, w = 2 * place.b + right;
      if (h < 0 || h >= pool.h || w < 0 || w >= pool.w) continue;
      const auto from = Vector<T, V>::at(x + place.x + down * pool.row + right * pool.pixel);
      for (int v = 0; v < V; ++v) {
        const float y = bn(from[v], v);
        take<true>(rounded<T>(with_relu ? relu(y) : y), tap, best[v], which[v]);  // equal values are those of torch
      }
    }
    const int64_t i = share.base + walk.offset();
    Vector<T, V> to;
    Vector<uint8_t, V> chosen;
    for (int v = 0; v < V; ++v) to.value[v] = store<T>(best[v]), chosen.value[v] = uint8_t(which[v]);
    to.to(out + i);
    if (offsets) chosen.to(offsets + i);
  }
}

// The gradients and offsets of V windows, or of none.
template <typename T, int V>
struct Windows {
  Vector<T, V> grad{};
  Vector<uint8_t, V> offsets{};
  bool exist;

  __device__ Windows(const T* g, const uint8_t* o, int64_t i, bool exist) : exist(exist) {
    if (exist) grad = Vector<T, V>::at(g + i), offsets = Vector<uint8_t, V>::at(o + i);
  }
  __device__ float at(int32_t tap, int v) const { return exist ? picked<float, int32_t>(offsets.value[v], tap, grad[v]) : 0.0f; }
};

// f(offset in x, gradient of act's output) for each pixel of a quad that exists.
template <typename T, int V, bool Rows, typename F>
__device__ void quad(const Pool& pool, const Walk<V, Rows, F::kReverse>& walk, const Share& share, const T* grad,
                     const uint8_t* offsets, F&& f) {
  const Place place(pool, walk.position(), share.channel);
  const int64_t i = share.base + walk.offset();
  const bool on_right = place.b + 1 < pool.q, below = place.a + 1 < pool.p;
  const Windows<T, V> here(grad, offsets, i, true), right(grad, offsets, i + pool.pixel, on_right),
      under(grad, offsets, i + pool.out_row, below),
      last(grad, offsets, i + pool.out_row + pool.pixel, on_right && below);
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    if (2 * place.a + corner / 2 >= pool.h || 2 * place.b + corner % 2 >= pool.w) continue;
    float g[V];
    for (int v = 0; v < V; ++v) {
      g[v] = corner == 0   ? here.at(4, v)
             : corner == 1 ? here.at(5, v) + right.at(3, v)
             : corner == 2 ? here.at(7, v) + under.at(1, v)
                           : here.at(8, v) + right.at(6, v) + under.at(2, v) + last.at(0, v);
    }
    f(place.x + corner / 2 * pool.row + corner % 2 * pool.pixel, g);
  }
}

// Sums over pixels of g and g * (x - mean); with given statistics grad_x = scale * g. Reads grad, offsets and x.
template <typename T, int V>
struct Reduce {
  static constexpr bool kReverse = false;
  const T* x;
  T* grad_x;
  const Affine<V>& bn;
  Sums<2> (&sums)[V];
  bool with_relu;

  __device__ void operator()(int64_t i, float (&g)[V]) const {
    const auto from = Vector<T, V>::at(x + i);
    Vector<T, V> to;
    for (int v = 0; v < V; ++v) {
      if (with_relu) g[v] = relu_grad(g[v], rounded<T>(bn(from[v], v)));
      to.value[v] = store<T>(bn.scale[v] * g[v]);
      sums[v].sum[0] += g[v];
      sums[v].sum[1] += g[v] * (from[v] - bn.mean[v]);
    }
    if (grad_x) to.to(grad_x + i);
  }
};

template <typename T, int V, bool Rows>
__global__ void __launch_bounds__(kThreads, kBlocks)
    pool_reduce_kernel(Cut cut, Pool pool, const T* __restrict__ grad, const uint8_t* __restrict__ offsets,
                       const T* __restrict__ x, T* __restrict__ grad_x, Norm norm, bool with_relu,
                       Sums<2>* __restrict__ parts) {
  const Share share(cut, threadIdx.x, blockIdx.x, blockIdx.y);
  Sums<2> sums[V] = {};
  if (share.inside) {
    const Affine<V> bn(norm, share.channel);
    for (Walk<V, Rows, false> walk(cut, share); walk.left > 0; --walk.left, walk.next()) {
      quad<T, V, Rows>(pool, walk, share, grad, offsets, Reduce<T, V>{x, grad_x, bn, sums, with_relu});
    }
  }
  store_part<Rows>(sums, cut, share, parts, Added{});
}

// grad_x in training. Reads grad, offsets and x.
template <typename T, int V>
struct Apply {
  static constexpr bool kReverse = true;
  const T* x;
  T* grad_x;
  const Affine<V>& bn;
  const Slopes<V>& slopes;
  bool with_relu;

  __device__ void operator()(int64_t i, float (&g)[V]) const {
    const auto from = Vector<T, V>::at(x + i);
    Vector<T, V> to;
    for (int v = 0; v < V; ++v) {
      if (with_relu) g[v] = relu_grad(g[v], rounded<T>(bn(from[v], v)));
      to.value[v] = store<T>(bn_grad(g[v], from[v], bn.mean[v], bn.scale[v], slopes.k1[v], slopes.k2[v]));
    }
    to.to(grad_x + i);
  }
};

template <typename T, int V, bool Rows>
__global__ void __launch_bounds__(kThreads, kBlocks)
    pool_apply_kernel(Cut cut, Pool pool, const T* __restrict__ grad, const uint8_t* __restrict__ offsets,
                      const T* __restrict__ x, T* __restrict__ grad_x, Norm norm, const float* __restrict__ grad_gamma,
                      const float* __restrict__ grad_beta, float count, bool with_relu) {
  const Share share(cut, threadIdx.x, blockIdx.x, blockIdx.y);
  if (!share.inside) return;
  const Affine<V> bn(norm, share.channel);
  const Slopes<V> slopes(norm, grad_gamma, grad_beta, count, share.channel);
  for (Walk<V, Rows, true> walk(cut, share); walk.left > 0; --walk.left, walk.next()) {
    quad<T, V, Rows>(pool, walk, share, grad, offsets, Apply<T, V>{x, grad_x, bn, slopes, with_relu});
  }
}

// ---- checks -------------------------------------------------------------------------------------------------------------

struct Geometry {
  Shape shape;  // of x
  Pool pool;

  explicit Geometry(const Tensor& x) : shape(checked_shape(x)) {
    STD_TORCH_CHECK(x.dim() == 4, "x must be (N, C, H, W), got ", x.dim(), " dimensions");
    const int64_t c = shape.c, h = x.size(2), w = x.size(3), q = (w + 1) / 2;
    const int64_t pixel = shape.rows ? c : 1;
    pool = {int32_t(h), int32_t(w), int32_t((h + 1) / 2), int32_t(q), c * h * w, w * pixel, pixel, shape.rows ? 1 : h * w,
            q * pixel};
  }

  Shape out() const { return {shape.n, shape.c, int64_t(pool.p) * pool.q, shape.rows}; }
  std::array<int64_t, 4> out_size() const { return {shape.n, shape.c, pool.p, pool.q}; }
  std::array<int64_t, 4> out_stride() const {
    const Shape o = out();
    return {o.c * o.s, o.rows ? 1 : o.s, pool.out_row, pool.pixel};
  }

  void check(const Tensor& t, const char* name) const {
    const auto size = out_size(), stride = out_stride();
    STD_TORCH_CHECK(t.dim() == 4, name, " must be (N, C, P, Q)");
    for (int64_t d = 0; d < 4; ++d) {
      STD_TORCH_CHECK(t.size(d) == size[d], name, " must have one value per window");
      STD_TORCH_CHECK(size[d] <= 1 || t.stride(d) == stride[d] || t.numel() == 0, name, " must have the layout of x");
    }
  }
};

// ---- launches -----------------------------------------------------------------------------------------------------------

// As dispatch_cut, over the positions of out, with vectors of Bytes at most. Planes have no vectors: neighbouring windows overlap.
template <int Bytes, typename F>
void dispatch_windows(const Device& device, ScalarType dtype, const Geometry& g, uintptr_t addresses, const F& f) {
  const Shape out = g.out();
  dispatch_storage(dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int kVector = Bytes / sizeof(T);
    const int32_t vector = out.rows ? vector_size(sizeof(T), kVector, out.c, addresses) : 1;
    const auto plan = out.rows ? cut_rows : cut_planes;
    const Cut cut = plan(out.n, out.c, out.s, vector, device.multiprocessors());
    if (!out.rows) f(tag, cut, std::integral_constant<int, 1>{}, std::false_type{});
    else if (vector == kVector) f(tag, cut, std::integral_constant<int, kVector>{}, std::true_type{});
    else f(tag, cut, std::integral_constant<int, 1>{}, std::true_type{});
  });
}

std::pair<Tensor, Tensor> pooled(const Device& device, const Tensor& x, const Geometry& g, const Norm& norm, bool relu,
                                 bool with_offsets) {
  const auto size = g.out_size(), stride = g.out_stride();
  const int64_t none = 0, one = 1;
  Tensor out = new_strided(x, 4, size.data(), stride.data(), dtype_code(x));
  Tensor offsets = with_offsets ? new_strided(x, 4, size.data(), stride.data(), aoti_torch_dtype_uint8())
                                : new_strided(x, 1, &none, &one, aoti_torch_dtype_uint8());
  if (g.shape.numel() == 0) return {out, offsets};
  const uintptr_t all = addresses(x, out) | (with_offsets ? addresses(offsets) : 0);
  dispatch_windows<16>(device, x.scalar_type(), g, all, [&](auto tag, const Cut& cut, auto vector, auto rows) {
    using T = decltype(tag);
    device.launch("bn_act_pool forward", pool_kernel<T, vector.value, rows.value>, cut.blocks, cut.parts, cut, g.pool,
                  read<T>(x), write<T>(out), with_offsets ? write<uint8_t>(offsets) : nullptr, norm, relu);
  });
  return {out, offsets};
}

// ---- operators ----------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_pool_train_forward(
    const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, double momentum, double eps, bool relu, bool with_offsets) {
  const Geometry g(x);
  const int64_t c = g.shape.c;
  const Running running = running_of(running_mean, running_var, momentum, c);
  const Device device(x);
  const auto [mean, var] = g.shape.numel() ? batch_statistics(device, x, g.shape, running)
                                           : std::pair(zero_vector(x, c), zero_vector(x, c));
  const auto [out, offsets] = pooled(device, x, g, norm_of(mean, var, gamma, beta, eps, c), relu, with_offsets);
  return {out, offsets, mean, var};
}

std::tuple<Tensor, Tensor> bn_act_pool_eval_forward(const Tensor& x, const OptionalTensor& gamma,
                                                    const OptionalTensor& beta, const Tensor& mean, const Tensor& var,
                                                    double eps, bool relu, bool with_offsets) {
  const Geometry g(x);
  const Norm norm = norm_of(mean, var, gamma, beta, eps, g.shape.c);
  const Device device(x);
  const auto [out, offsets] = pooled(device, x, g, norm, relu, with_offsets);
  return {out, offsets};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_pool_backward(const Tensor& grad, const Tensor& offsets, const Tensor& x,
                                                        const OptionalTensor& gamma, const OptionalTensor& beta,
                                                        const Tensor& mean, const Tensor& var, double eps, bool relu,
                                                        bool training) {
  const Geometry g(x);
  const int64_t c = g.shape.c;
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad must have the dtype of x");
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Byte, "offsets must be uint8");
  g.check(grad, "grad");
  g.check(offsets, "offsets");
  const Norm norm = norm_of(mean, var, gamma, beta, eps, c);
  const Device device(x);
  Tensor grad_x = new_like(x);
  if (g.shape.numel() == 0) return {grad_x, zero_vector(x, c), zero_vector(x, c)};
  std::optional<ParameterGrads> grads;
  const uintptr_t all = addresses(grad, offsets, x, grad_x);
  dispatch_windows<8>(device, x.scalar_type(), g, all, [&](auto tag, const Cut& cut, auto vector, auto rows) {
    using T = decltype(tag);
    const Tensor parts = workspace(x, cut.parts * c * int64_t(sizeof(Sums<2>)));
    device.launch("bn_act_pool backward, sums", pool_reduce_kernel<T, vector.value, rows.value>, cut.blocks, cut.parts, cut,
                  g.pool, read<T>(grad), read<uint8_t>(offsets), read<T>(x), training ? nullptr : write<T>(grad_x), norm, relu,
                  write<Sums<2>>(parts));
    grads = finish_gradients(device, x, parts, cut.parts, c, norm);
    if (training) {
      device.launch("bn_act_pool backward", pool_apply_kernel<T, vector.value, rows.value>, cut.blocks, cut.parts, cut, g.pool,
                    read<T>(grad), read<uint8_t>(offsets), read<T>(x), write<T>(grad_x), norm, read<float>(grads->gamma),
                    read<float>(grads->beta), float(g.shape.count()), relu);
    }
  });
  return {grad_x, grads->gamma, grads->beta};
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(FR_DEVICE_LIBRARY, FR_DEVICE_KEY, m) {
  m.impl("bn_act_pool_train_forward", TORCH_BOX(&fused_resnet::bn_act_pool_train_forward));
  m.impl("bn_act_pool_eval_forward", TORCH_BOX(&fused_resnet::bn_act_pool_eval_forward));
  m.impl("bn_act_pool_backward", TORCH_BOX(&fused_resnet::bn_act_pool_backward));
}
