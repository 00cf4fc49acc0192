// out = act(bn(x) + residual): training and eval forward, backward.
#include <torch/csrc/stable/library.h>

#include "batch_norm.h"

namespace fused_resnet {
namespace {

// ---- forward ----------------------------------------------------------------------------------------------------------

template <typename T, bool Relu, bool Residual>
FR_CLONES void apply(Tile t, const T* __restrict x, const T* __restrict residual, T* __restrict out,
                     const acc_t<T>* __restrict mean, const acc_t<T>* __restrict scale, const acc_t<T>* __restrict beta) {
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t i = r * t.stride;
    prefetch_row(t, r + 1, out);
    for (int64_t l = 0; l < t.lanes; ++l) {
      acc_t<T> y = bn(load(x[i + l]), mean[l], scale[l], beta[l]);
      if constexpr (Residual) y += load(residual[i + l]);
      if constexpr (Relu) y = relu(y);
      out[i + l] = store<T>(y);
    }
  }
}

// Training: x + x + out (+ residual), or x + out (+ residual) for planes whose channels fit in the L2 cache. Eval: the latter.
template <typename T, bool Relu, bool Residual>
void forward(const Shape& shape, const T* x, const T* residual, T* out, const Vectors<acc_t<T>>& vectors,
             const Statistics<acc_t<T>>* stats) {
  using A = acc_t<T>;
  const auto apply_tile = [=](int64_t i, Tile t, const Lanes<A>& k, int64_t lane) {
    apply<T, Relu, Residual>(t, x + i, Residual ? residual + i : nullptr, out + i, k.mean + lane, k.scale + lane,
                             k.beta + lane);
  };
  if (shape.rows) {
    const Rows plan(shape);
    if (stats) rows_statistics<T>(plan, x, *stats);
    auto memory = scratch<A>(plan.lanes * Lanes<A>::kVectors);
    const Lanes<A> k(memory.get(), plan.lanes);
    for (int64_t c = 0; c < plan.c; ++c) k.set(vectors, c, c, plan.fold, plan.c);
    return parallel_items(plan.items(), plan.work(), true, [&](int64_t item) {
      plan.region(item).each(true, [&](int64_t i, Tile t) { apply_tile(i, t, k, plan.lane(item)); });
    });
  }
  const Planes plan(shape);
  parallel_items(plan.groups, plan.work(), false, [&](int64_t g) {
    if (stats) planes_statistics<T>(plan, g, x, *stats);
    A memory[kPlaneLanes * Lanes<A>::kVectors];
    const Lanes<A> k(memory, kPlaneLanes);
    for (int64_t j = 0; j < plan.channels(g); ++j) {
      k.set(vectors, g * plan.group + j, j * plan.width, plan.width, 1);
    }
    plan.region(g).each(true, [&](int64_t i, Tile t) { apply_tile(i, t, k, 0); });
  });
}

// ---- backward ---------------------------------------------------------------------------------------------------------

// Pass 1 reads grad, x (and out, and writes grad_residual), pass 2 reads grad (or grad_residual), x and writes grad_x: 5 B, or
// 7 B with a residual; 3 B and 5 B for planes whose channels fit in the L2 cache, and with frozen statistics, which need one pass.
template <typename T, Mask M, bool Frozen>
void backward(const Shape& shape, const T* grad, const T* x, const T* out, T* grad_residual, T* grad_x,
              const Vectors<acc_t<T>>& vectors, const ParameterGrads<acc_t<T>>& grads) {
  using A = acc_t<T>;
  constexpr bool masked = M == Mask::out;
  const T* g = masked ? grad_residual : grad;
  const auto sum_tile = [=](int64_t i, Tile t, const Lanes<A>& k, int64_t lane, A* sum, A* sum_x) {
    grad_sums<T, M, Frozen>(t, grad + i, x + i, masked ? out + i : nullptr, masked ? grad_residual + i : nullptr,
                            grad_x + i, k.mean + lane, k.scale + lane, k.beta + lane, sum, sum_x);
  };
  const auto apply_tile = [=](int64_t i, Tile t, const Lanes<A>& k, int64_t lane) {
    grad_apply<T, M == Mask::recompute>(t, g + i, x + i, grad_x + i, k.mean + lane, k.scale + lane, k.beta + lane,
                                        k.k1 + lane, k.k2 + lane);
  };

  if (shape.rows) {
    const Rows plan(shape);
    const int64_t c = plan.c;
    auto memory = scratch<A>(plan.lanes * Lanes<A>::kVectors);
    auto parts = scratch<GradSums>(plan.chunks * c);
    const Lanes<A> k(memory.get(), plan.lanes);
    for (int64_t i = 0; i < c; ++i) k.set(vectors, i, i, plan.fold, c);
    parallel_items(plan.items(), plan.work(), false, [&](int64_t item) {
      const Region region = plan.region(item);
      A sum[kLanes] = {}, sum_x[kLanes] = {};
      region.each(false, [&](int64_t i, Tile t) { sum_tile(i, t, k, plan.lane(item), sum, sum_x); });
      GradSums* part = &parts[plan.chunk(item) * c + plan.lane(item)];
      for (int64_t i = 0; i < std::min(region.lanes, c); ++i) {
        part[i] = {strided_sum(sum, i, region.lanes, c), strided_sum(sum_x, i, region.lanes, c)};
      }
    });
    plan.channel_blocks([&](int64_t first, int64_t n) {
      GradSums s[kBlock] = {};
      for (int64_t p = 0; p < plan.chunks; ++p) {
        for (int64_t i = 0; i < n; ++i) s[i].g += parts[p * c + first + i].g, s[i].gx += parts[p * c + first + i].gx;
      }
      for (int64_t i = 0; i < n; ++i) {
        k.set_grad(grads.set(first + i, s[i], vectors.rstd(first + i)), first + i, plan.fold, c);
      }
    });
    if constexpr (!Frozen) {
      parallel_items(plan.items(), plan.work(), true, [&](int64_t item) {
        plan.region(item).each(true, [&](int64_t i, Tile t) { apply_tile(i, t, k, plan.lane(item)); });
      });
    }
    return;
  }

  const Planes plan(shape);
  parallel_items(plan.groups, plan.work(), false, [&](int64_t group) {
    const Region region = plan.region(group);
    const int64_t w = plan.width;
    A memory[kPlaneLanes * Lanes<A>::kVectors];
    const Lanes<A> k(memory, kPlaneLanes);
    for (int64_t j = 0; j < plan.channels(group); ++j) k.set(vectors, group * plan.group + j, j * w, w, 1);
    double sum[kPlaneLanes], sum_x[kPlaneLanes];
    plan.channel_sums<A>(group, sum, sum_x, [&](const Region& part, A* g, A* gx) {
      part.each(false, [&](int64_t i, Tile t) { sum_tile(i, t, k, 0, g, gx); });
    });
    for (int64_t j = 0; j < plan.channels(group); ++j) {
      const int64_t c = group * plan.group + j;
      k.set_grad(grads.set(c, {sum[j], sum_x[j]}, vectors.rstd(c)), j * w, w, 1);
    }
    if constexpr (!Frozen) region.each(true, [&](int64_t i, Tile t) { apply_tile(i, t, k, 0); });
  });
}

// ---- operators --------------------------------------------------------------------------------------------------------

template <typename T>
void dispatch_forward(const Shape& shape, const Tensor& x, const OptionalTensor& residual, const Tensor& out,
                      const Vectors<acc_t<T>>& vectors, const Statistics<acc_t<T>>* stats, bool relu) {
  dispatch_bool(relu, [&](auto relu) {
    dispatch_bool(residual.has_value(), [&](auto has_residual) {
      forward<T, relu.value, has_residual.value>(shape, read<T>(x), residual ? read<T>(*residual) : nullptr, write<T>(out),
                                                 vectors, stats);
    });
  });
}

std::tuple<Tensor, Tensor, Tensor> bn_act_train_forward(
    const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& residual, double momentum, double eps, bool relu) {
  const Shape shape = shape_of(x);
  const int64_t c = shape.c;
  const ScalarType acc = acc_dtype(x.scalar_type());
  if (residual) check_like(*residual, x, "residual");
  Tensor out = new_large_like(x);
  if (shape.numel() == 0) return {out, new_zero_vector(x, c), new_zero_vector(x, c)};
  Tensor mean = new_vector(x, c), var = new_vector(x, c);
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Vectors<A> vectors{vector_data<const A>(gamma, c, acc, "gamma"), vector_data<const A>(beta, c, acc, "beta"), write<A>(mean),
                             write<A>(var), eps};
    const Statistics<A> stats{write<A>(mean), write<A>(var), vector_data<A>(running_mean, c, acc, "running_mean"),
                              vector_data<A>(running_var, c, acc, "running_var"), momentum, double(shape.count())};
    dispatch_forward<T>(shape, x, residual, out, vectors, &stats, relu);
  });
  return {out, mean, var};
}

Tensor bn_act_eval_forward(const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta,
                           const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& residual, double eps,
                           bool relu) {
  const Shape shape = shape_of(x);
  const int64_t c = shape.c;
  const ScalarType acc = acc_dtype(x.scalar_type());
  if (residual) check_like(*residual, x, "residual");
  Tensor out = new_large_like(x);
  if (shape.numel() == 0) return out;
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Vectors<A> vectors{vector_data<const A>(gamma, c, acc, "gamma"), vector_data<const A>(beta, c, acc, "beta"),
                             vector_data<const A>(mean, c, acc, "mean"), vector_data<const A>(var, c, acc, "var"), eps};
    dispatch_forward<T>(shape, x, residual, out, vectors, nullptr, relu);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(
    const Tensor& grad, const Tensor& x, const OptionalTensor& out, const OptionalTensor& gamma, const OptionalTensor& beta,
    const Tensor& mean, const Tensor& var, double eps, bool relu, bool training, bool has_residual) {
  const Shape shape = shape_of(x);
  const int64_t c = shape.c;
  const ScalarType acc = acc_dtype(x.scalar_type());
  const Mask mask = !relu ? Mask::none : has_residual ? Mask::out : Mask::recompute;
  check_like(grad, x, "grad");
  if (mask == Mask::out) {
    STD_TORCH_CHECK(out.has_value(), "out is needed for the gradient of a ReLU after a residual");
    check_like(*out, x, "out");
  }
  check_vector(mean, c, acc, "mean");
  check_vector(var, c, acc, "var");
  Tensor grad_x = new_large_like(x), grad_residual = mask == Mask::out ? new_large_like(x) : no_tensor(x);
  if (shape.numel() == 0) return {grad_x, new_zero_vector(x, c), new_zero_vector(x, c), grad_residual};
  Tensor grad_gamma = new_vector(x, c), grad_beta = new_vector(x, c);
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Vectors<A> vectors{vector_data<const A>(gamma, c, acc, "gamma"), vector_data<const A>(beta, c, acc, "beta"), read<A>(mean),
                             read<A>(var), eps};
    const ParameterGrads<A> grads{write<A>(grad_gamma), write<A>(grad_beta), double(shape.count())};
    const auto run = [&](auto mask) {
      dispatch_bool(!training, [&](auto frozen) {
        backward<T, mask.value, frozen.value>(shape, read<T>(grad), read<T>(x), out ? read<T>(*out) : nullptr,
                                              write<T>(grad_residual), write<T>(grad_x), vectors, grads);
      });
    };
    switch (mask) {
      case Mask::none: return run(std::integral_constant<Mask, Mask::none>{});
      case Mask::out: return run(std::integral_constant<Mask, Mask::out>{});
      case Mask::recompute: return run(std::integral_constant<Mask, Mask::recompute>{});
    }
  });
  return {grad_x, grad_gamma, grad_beta, grad_residual};
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpp, CPU, m) {
  m.impl("bn_act_train_forward", TORCH_BOX(&fused_resnet::bn_act_train_forward));
  m.impl("bn_act_eval_forward", TORCH_BOX(&fused_resnet::bn_act_eval_forward));
  m.impl("bn_act_backward", TORCH_BOX(&fused_resnet::bn_act_backward));
}
