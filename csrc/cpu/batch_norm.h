// What the batch norm kernels share: how a tensor is cut, the loops over its tiles, statistics.
//
// Both layouts come down to one kind of loop: over tiles of contiguous lanes with per-lane vectors (statistics, coefficients)
// that stay in the L1 cache.
//   rows (channels_last)   lane = channel (several rows side by side if C is small). Chunks of consecutive rows; two parallel
//                          passes with a merge in between.
//   planes (NCHW)          lane = position in a plane. A thread owns whole channels, so both passes over a channel that
//                          fits in the L2 cache read memory once.
// The chunks follow from the shape alone and partial results are merged in a fixed order: results do not depend on the
// number of threads.
#pragma once

#include <memory>
#include <type_traits>
#include <utility>

#include "memory.h"
#include "parallel.h"

namespace fused_resnet {
namespace {  // each file that includes this has its own clones

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

enum class Mask { none, out, recompute };  // where backward takes the sign of the ReLU's input from

// g = masked grad (of type G); sum += g, sum_x += g*(x - mean). Stores g where the mask is that of `out`; without batch
// statistics (Frozen) stores grad_x = scale*g at once.
template <typename T, Mask M, bool Frozen, typename G = T>
FR_CLONES void grad_sums(Tile t, const G* __restrict grad, const T* __restrict x, const T* __restrict out,
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

template <typename T, bool Recompute, typename G = T>
FR_CLONES void grad_apply(Tile t, const G* __restrict grad, const T* __restrict x, T* __restrict grad_x,
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

// ---- statistics ------------------------------------------------------------------------------------------------------

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

// ---- gradients -------------------------------------------------------------------------------------------------------

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

}  // namespace
}  // namespace fused_resnet
