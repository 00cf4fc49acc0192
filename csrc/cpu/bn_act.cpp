// out = act(bn(x) + residual): training and eval forward, backward.
//
// Both layouts come down to one kind of loop: over tiles of contiguous lanes with per-lane vectors (statistics, coefficients)
// that stay in the L1 cache.
//   rows (channels_last)   lane = channel (several rows side by side if C is small). Chunks of consecutive rows; two parallel
//                          passes with a merge in between.
//   planes (NCHW)          lane = position in a plane. A thread owns whole channels, so both passes over a channel that
//                          fits in the L2 cache read memory once.
// The chunks follow from the shape alone and partial results are merged in a fixed order: results do not depend on the
// number of threads.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <type_traits>
#include <utility>

#include "../checks.h"
#include "parallel.h"

namespace fused_resnet {
namespace {

constexpr int64_t kLanes = 512;       // most lanes of a tile: its vectors fill half of the L1 cache
constexpr int64_t kPlaneLanes = 256;  // less where vectors are made anew for each channel
constexpr int64_t kBlock = 64;        // channels merged together

// ---- kernels: the loops that must vectorise ---------------------------------------------------------------------------

struct Tile { int64_t rows, lanes, stride; };  // stride between rows, in elements

// Asks for a row that is about to be written: x86 commits stores in order, so that one that misses the cache holds up the
// accumulators behind it. (It also keeps the compiler from interleaving rows, whose addresses often differ by a multiple of
// 4 KiB: loads would wait for unrelated stores.)
template <typename T>
FR_HD void prefetch_row(const Tile& t, int64_t row, const T* data) {
#if defined(__GNUC__)
  if (row >= t.rows) return;
  for (int64_t l = 0; l < t.lanes; l += 64 / int64_t(sizeof(T))) __builtin_prefetch(data + row * t.stride + l, 1);
#endif
}

template <typename T>
FR_CLONES void sums(Tile t, const T* __restrict x, const acc_t<T>* __restrict pilot, acc_t<T>* __restrict sum,
                    acc_t<T>* __restrict sum_sq) {
  for (int64_t r = 0; r < t.rows; ++r, x += t.stride) {
    for (int64_t l = 0; l < t.lanes; ++l) {
      const acc_t<T> d = load(x[l]) - pilot[l];
      sum[l] += d;
      sum_sq[l] += d * d;
    }
  }
}

template <typename T>
FR_CLONES void widen(int64_t n, const T* __restrict x, acc_t<T>* __restrict out) {
  for (int64_t l = 0; l < n; ++l) out[l] = load(x[l]);
}

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

enum class Mask { none, out, recompute };  // where backward takes the sign of the ReLU's input from

// g = masked grad; sum += g, sum_x += g*(x - mean). Stores g where the mask is that of `out`; without batch statistics
// (Frozen) stores grad_x = scale*g at once.
template <typename T, Mask M, bool Frozen>
FR_CLONES void grad_sums(Tile t, const T* __restrict grad, const T* __restrict x, const T* __restrict out,
                         T* __restrict grad_residual, T* __restrict grad_x, const acc_t<T>* __restrict mean,
                         const acc_t<T>* __restrict scale, const acc_t<T>* __restrict beta, acc_t<T>* __restrict sum,
                         acc_t<T>* __restrict sum_x) {
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t i = r * t.stride;
    if constexpr (M == Mask::out) prefetch_row(t, r + 1, grad_residual);
    if constexpr (Frozen) prefetch_row(t, r + 1, grad_x);
    for (int64_t l = 0; l < t.lanes; ++l) {
      acc_t<T> g = load(grad[i + l]);
      const acc_t<T> v = load(x[i + l]);
      if constexpr (M == Mask::recompute) g = relu_grad(g, bn(v, mean[l], scale[l], beta[l]));
      if constexpr (M == Mask::out) {
        g = relu_grad(g, load(out[i + l]));
        grad_residual[i + l] = store<T>(g);
      }
      sum[l] += g;
      sum_x[l] += g * (v - mean[l]);
      if constexpr (Frozen) grad_x[i + l] = store<T>(scale[l] * g);
    }
  }
}

template <typename T, bool Recompute>
FR_CLONES void grad_apply(Tile t, const T* __restrict grad, const T* __restrict x, T* __restrict grad_x,
                          const acc_t<T>* __restrict mean, const acc_t<T>* __restrict scale,
                          const acc_t<T>* __restrict beta, const acc_t<T>* __restrict k1, const acc_t<T>* __restrict k2) {
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t i = r * t.stride;
    prefetch_row(t, r + 1, grad_x);
    for (int64_t l = 0; l < t.lanes; ++l) {
      acc_t<T> g = load(grad[i + l]);
      const acc_t<T> v = load(x[i + l]);
      if constexpr (Recompute) g = relu_grad(g, bn(v, mean[l], scale[l], beta[l]));
      grad_x[i + l] = store<T>(bn_grad(g, v, mean[l], scale[l], k1[l], k2[l]));
    }
  }
}

template <typename A>
FR_CLONES A lane_sum(const A* __restrict v, int64_t n) {
  constexpr int64_t w = 16;
  A acc[w] = {};
  int64_t l = 0;
  for (; l + w <= n; l += w) {
    for (int64_t i = 0; i < w; ++i) acc[i] += v[l + i];
  }
  for (int64_t i = 0; l + i < n; ++i) acc[i] += v[l + i];
  for (int64_t half = w / 2; half; half /= 2) {
    for (int64_t i = 0; i < half; ++i) acc[i] += acc[half + i];
  }
  return acc[0];
}

template <typename A>
FR_CLONES void fill(A* v, int64_t n, A value) {
  for (int64_t l = 0; l < n; ++l) v[l] = value;
}

// ---- how a tensor is cut ----------------------------------------------------------------------------------------------

// Tiles that share their per-lane vectors: `repeats` blocks, each of `rows` full rows and, if tail > 0, a last shorter one.
struct Region {
  int64_t base, rows, lanes, stride, tail, repeats, step;

  template <typename F>  // f(offset, tile)
  void each(bool reverse, const F& f) const {
    for (int64_t n = 0; n < repeats; ++n) {
      const int64_t i = base + (reverse ? repeats - 1 - n : n) * step;
      if (rows) f(i, Tile{rows, lanes, stride});
      if (tail) f(i + rows * stride, Tile{1, tail, stride});
    }
  }
};

// Items are chunks of rows times tiles of lanes.
struct Rows {
  int64_t c, m, fold, lanes, rows, tiles, chunks = 1;  // fold: rows of c side by side in a row of lanes

  explicit Rows(const Shape& s)
      : c(s.c), m(s.count()), fold(std::max<int64_t>(1, kLanes / 2 / c)), lanes(fold * c), rows(m / fold),
        tiles(ceil_div(lanes, kLanes)) {
    const int64_t most = std::min(rows / 32, s.numel() / kGrain);
    while (chunks * 2 <= most) chunks *= 2;
  }

  int64_t items() const { return chunks * tiles; }
  int64_t work() const { return m * c / items(); }
  int64_t chunk(int64_t item) const { return item / tiles; }
  int64_t lane(int64_t item) const { return item % tiles * kLanes; }
  int64_t first(int64_t chunk) const { return rows * chunk / chunks; }
  int64_t rest(int64_t chunk) const { return chunk == chunks - 1 ? m % fold : 0; }  // rows of c that fill no row of lanes
  int64_t count(int64_t chunk) const { return (first(chunk + 1) - first(chunk)) * fold + rest(chunk); }

  Region region(int64_t item) const {
    const int64_t i = chunk(item), l = lane(item);
    return {first(i) * lanes + l, first(i + 1) - first(i), std::min(kLanes, lanes - l), lanes, rest(i) * c, 1, 0};
  }

  template <typename F>  // f(first channel, channels): merges partial results, in blocks so that it walks along them
  void channel_blocks(const F& f) const {
    parallel_items(ceil_div(c, kBlock), chunks * kBlock, false,
                   [&](int64_t b) { f(b * kBlock, std::min(kBlock, c - b * kBlock)); });
  }
};

struct Planes {
  int64_t n, c, s, group, groups, width, block;  // channels per group; lanes per channel; planes summed up in one go

  explicit Planes(const Shape& shape)
      : n(shape.n), c(shape.c), s(shape.s), group(std::min(c, std::max<int64_t>(1, kPlaneLanes / s))),
        groups(ceil_div(c, group)), width(std::min(s, kPlaneLanes)), block(std::max<int64_t>(1, 64 * width / s)) {}

  int64_t work() const { return n * group * s; }
  int64_t channels(int64_t g) const { return std::min(group, c - g * group); }

  Region region(int64_t g, int64_t first, int64_t planes) const {
    const int64_t base = (first * c + g * group) * s;
    if (s <= kPlaneLanes) return {base, planes, channels(g) * s, c * s, 0, 1, 0};
    return {base, s / kPlaneLanes, kPlaneLanes, kPlaneLanes, s % kPlaneLanes, planes, c * s};
  }
  Region region(int64_t g) const { return region(g, 0, n); }

  // total[j] = sum over channel j of the group, for two sums at once: add(region, sum, other) adds up lanes. Lanes are added
  // to a double every `block` planes, so that rounding errors do not grow with the batch.
  template <typename A, typename F>
  void channel_sums(int64_t g, double (&total)[kPlaneLanes], double (&other_total)[kPlaneLanes], const F& add) const {
    std::fill_n(total, channels(g), 0.0);
    std::fill_n(other_total, channels(g), 0.0);
    for (int64_t first = 0; first < n; first += block) {
      A sum[kPlaneLanes] = {}, other[kPlaneLanes] = {};
      add(region(g, first, std::min(block, n - first)), sum, other);
      for (int64_t j = 0; j < channels(g); ++j) {
        total[j] += double(lane_sum(sum + j * width, width));
        other_total[j] += double(lane_sum(other + j * width, width));
      }
    }
  }
};

// ---- per-channel vectors and per-lane coefficients --------------------------------------------------------------------

template <typename A>
struct Vectors {
  const A *gamma, *beta, *mean, *var;  // nullptr: 1, 0, 0, 1
  double eps;

  A rstd(int64_t c) const { return bn_rstd(var ? var[c] : A(1), eps); }
};

template <typename A>
struct Lanes {
  A *mean, *scale, *beta, *k1, *k2;

  static constexpr int64_t kVectors = 5;
  Lanes(A* memory, int64_t lanes)
      : mean(memory), scale(mean + lanes), beta(scale + lanes), k1(beta + lanes), k2(k1 + lanes) {}

  // Channel c at n lanes from begin, `step` apart.
  void set(const Vectors<A>& v, int64_t c, int64_t begin, int64_t n, int64_t step) const {
    const A r = v.rstd(c);
    put(mean + begin, v.mean ? v.mean[c] : A(0), n, step);
    put(scale + begin, v.gamma ? v.gamma[c] * r : r, n, step);
    put(beta + begin, v.beta ? v.beta[c] : A(0), n, step);
  }
  void set_grad(const std::pair<A, A>& k, int64_t begin, int64_t n, int64_t step) const {
    put(k1 + begin, k.first, n, step);
    put(k2 + begin, k.second, n, step);
  }
  static void put(A* v, A value, int64_t n, int64_t step) {
    if (step == 1) return fill(v, n, value);
    for (int64_t i = 0; i < n; ++i) v[i * step] = value;
  }
};

template <typename A>
std::unique_ptr<A[]> scratch(int64_t n) { return std::unique_ptr<A[]>(new A[n]); }

// A pilot as short as the data, so that differences of 16-bit data are exact and their rounding errors cannot add up; and
// a finite one, so that they are not all NaN.
template <typename T>
acc_t<T> pilot_value(acc_t<T> v) {
  v = load(store<T>(v));
  return v - v == acc_t<T>(0) ? v : acc_t<T>(0);
}

template <typename A>
double strided_sum(const A* v, int64_t begin, int64_t end, int64_t step) {
  double total = 0;
  for (int64_t l = begin; l < end; l += step) total += double(v[l]);
  return total;
}

// ---- forward ----------------------------------------------------------------------------------------------------------

// Where the batch statistics go.
template <typename A>
struct Statistics {
  A *mean, *var, *running_mean, *running_var;
  double momentum, count;

  void set(int64_t c, double batch_mean, double m2) const {
    const double batch_var = m2 / count;
    mean[c] = A(batch_mean);
    var[c] = A(batch_var);
    if (running_mean) running_mean[c] = update_running(running_mean[c], batch_mean, momentum);
    if (running_var) running_var[c] = update_running(running_var[c], unbiased(batch_var, count), momentum);
  }
};

template <typename T>
void rows_statistics(const Rows& plan, const T* x, const Statistics<acc_t<T>>& stats) {
  using A = acc_t<T>;
  const int64_t c = plan.c;
  auto parts = scratch<Moments>(plan.chunks * c);
  parallel_items(plan.items(), plan.work(), false, [&](int64_t item) {
    const Region region = plan.region(item);
    const int64_t count = plan.count(plan.chunk(item)), pilots = std::min<int64_t>(4, count);
    const int64_t channels = std::min(region.lanes, c);
    A pilot[kLanes] = {}, sum[kLanes] = {}, sum_sq[kLanes] = {};
    for (int64_t r = 0; r < pilots; ++r) {
      for (int64_t i = 0; i < channels; ++i) pilot[i] += load(x[region.base + r * c + i]);
    }
    for (int64_t i = 0; i < channels; ++i) pilot[i] = pilot_value<T>(pilot[i] / A(pilots));
    for (int64_t l = channels; l < region.lanes; ++l) pilot[l] = pilot[l - c];
    region.each(false, [&](int64_t i, Tile t) { sums<T>(t, x + i, pilot, sum, sum_sq); });
    Moments* part = &parts[plan.chunk(item) * c + plan.lane(item)];
    for (int64_t i = 0; i < channels; ++i) {
      part[i] = moments(double(count), pilot[i], strided_sum(sum, i, region.lanes, c),
                        strided_sum(sum_sq, i, region.lanes, c));
    }
  });
  plan.channel_blocks([&](int64_t first, int64_t n) {
    double mean[kBlock] = {}, m2[kBlock] = {};
    for (int64_t p = 0; p < plan.chunks; ++p) {
      const double weight = double(plan.count(p)) / stats.count;
      for (int64_t i = 0; i < n; ++i) mean[i] += weight * parts[p * c + first + i].mean;
    }
    for (int64_t p = 0; p < plan.chunks; ++p) {
      const double count = double(plan.count(p));
      for (int64_t i = 0; i < n; ++i) m2[i] += m2_about(count, parts[p * c + first + i], mean[i]);
    }
    for (int64_t i = 0; i < n; ++i) stats.set(first + i, mean[i], m2[i]);
  });
}

// The statistics of a group's channels; the group is then still in the cache.
template <typename T>
void planes_statistics(const Planes& plan, int64_t g, const T* x, const Statistics<acc_t<T>>& stats) {
  using A = acc_t<T>;
  const int64_t w = plan.width, lanes = plan.channels(g) * w;
  const T* first = x + g * plan.group * plan.s;
  A pilot[kPlaneLanes];
  widen(lanes, first, pilot);
  for (int64_t l = 0; l < lanes; l += w) {
    fill(pilot + l, w, pilot_value<T>(lane_sum(pilot + l, w) / A(w)));
  }
  double sum[kPlaneLanes], sum_sq[kPlaneLanes];
  plan.channel_sums<A>(g, sum, sum_sq, [&](const Region& region, A* sums_of_lanes, A* squares) {
    region.each(false, [&](int64_t i, Tile t) { sums<T>(t, x + i, pilot, sums_of_lanes, squares); });
  });
  for (int64_t j = 0; j < plan.channels(g); ++j) {
    const Moments m = moments(stats.count, pilot[j * w], sum[j], sum_sq[j]);
    stats.set(g * plan.group + j, m.mean, m.m2);
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

struct GradSums { double g, gx; };  // sum(g), sum(g*(x - mean))

// Where the parameters' gradients go; returns the coefficients of grad_x.
template <typename A>
struct ParameterGrads {
  A *gamma, *beta;
  double count;

  std::pair<A, A> set(int64_t c, GradSums s, double rstd) const {
    gamma[c] = A(s.gx * rstd);
    beta[c] = A(s.g);
    return {A(s.g / count), A(s.gx * rstd * rstd / count)};
  }
};

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
  Tensor out = new_like(x);
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
  Tensor out = new_like(x);
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
  Tensor grad_x = new_like(x), grad_residual = mask == Mask::out ? new_like(x) : no_tensor(x);
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
