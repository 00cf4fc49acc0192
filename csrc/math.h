// Every formula of the kernels, once: storage types, activation, batch norm. Host and device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define FR_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define FR_HD __attribute__((always_inline)) inline  // so that it is compiled anew inside every target clone
#else
#define FR_HD inline
#endif

namespace fused_resnet {

// ---- storage types; arithmetic is done in acc_t<T> --------------------------------------------------------------------

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

template <typename T> struct Acc { using type = float; };
template <> struct Acc<double> { using type = double; };
template <typename T> using acc_t = typename Acc<T>::type;

template <typename To, typename From>
FR_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

FR_HD double load(double v) { return v; }
FR_HD float load(float v) { return v; }
FR_HD float load(bf16 v) { return bit_cast<float>(uint32_t(v.bits) << 16); }

// All ones for NaN. Integer arithmetic, because compilers thread a comparison into the code before it and leave a tangle.
FR_HD uint32_t nan_mask(uint32_t bits) { return uint32_t(int32_t(0x7f800000u - (bits & 0x7fffffffu)) >> 31); }

// store<T>: round to nearest even; NaN stays NaN.
template <typename T> FR_HD T store(acc_t<T> v);
template <> FR_HD double store<double>(double v) { return v; }
template <> FR_HD float store<float>(float v) { return v; }

#if defined(__CUDA_ARCH__)

FR_HD float load(fp16 v) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
  return wide;
}

template <> FR_HD bf16 store<bf16>(float v) {
  bf16 narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(v));
  return narrow;
}

template <> FR_HD fp16 store<fp16>(float v) {
  fp16 narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(v));
  return narrow;
}

#else

// Branch-free both ways (Maratyszcza's FP16 library), because compilers do not vectorise _Float16 conversions everywhere.
FR_HD float load(fp16 v) {
  const uint32_t w = uint32_t(v.bits) << 16, magnitude = w + w;
  const float normal = bit_cast<float>((magnitude >> 4) + 0x70000000u) * 0x1.0p-112f;
  const float subnormal = bit_cast<float>((magnitude >> 17) | 0x3f000000u) - 0.5f;
  const uint32_t bits = magnitude < 0x08000000u ? bit_cast<uint32_t>(subnormal) : bit_cast<uint32_t>(normal);
  return bit_cast<float>((w & 0x80000000u) | bits);
}

template <> FR_HD bf16 store<bf16>(float v) {
  const uint32_t u = bit_cast<uint32_t>(v), nan = nan_mask(u);
  return bf16{uint16_t((u + ((0x7fffu + (u >> 16 & 1u)) & ~nan)) >> 16 | (nan & 0x40u))};
}

template <> FR_HD fp16 store<fp16>(float v) {
  const uint32_t w = bit_cast<uint32_t>(v), nan = nan_mask(w);
  const float clipped = (bit_cast<float>(w & 0x7fffffffu) * 0x1.0p+112f) * 0x1.0p-110f;  // past the range: infinity
  uint32_t bias = (w + w) & 0xff000000u;
  bias = bias < 0x71000000u ? 0x71000000u : bias;
  const uint32_t u = bit_cast<uint32_t>(bit_cast<float>((bias >> 1) + 0x07800000u) + clipped);
  const uint32_t bits = ((u >> 13) & 0x7c00u) + (u & 0x0fffu);
  return fp16{uint16_t((w >> 16 & 0x8000u) | (bits & ~nan) | (nan & 0x7e00u))};
}

#endif

template <typename T> FR_HD acc_t<T> rounded(acc_t<T> v) { return load(store<T>(v)); }  // as it would be stored

// ---- activation -------------------------------------------------------------------------------------------------------

template <typename A> FR_HD A relu(A v) { return v < A(0) ? A(0) : v; }  // NaN passes

// Gradient g through a ReLU whose output (or input) was v; a NaN lets it pass.
template <typename A> FR_HD A relu_grad(A g, A v) { return v <= A(0) ? A(0) : g; }

// ---- batch norm -------------------------------------------------------------------------------------------------------

// scale*(x - mean) + beta with scale = gamma*rstd, never scale*x + shift: that cancels when |mean| >> std.
template <typename A> FR_HD A bn(A x, A mean, A scale, A beta) { return scale * (x - mean) + beta; }

// In double for the CPU, where it costs nothing; GPUs have few units for that.
template <typename A> FR_HD A bn_rstd(A var, double eps) { return A(1.0 / std::sqrt(double(var) + eps)); }
FR_HD float bn_rstd_fast(float var, float eps) { return 1.0f / std::sqrt(var + eps); }

// Statistics of n values from the sums of (x - pilot) and (x - pilot)^2. The cancellation in M2 is bounded: a pilot that is
// the mean of a fraction f of the values costs at most a factor 1/f in relative error.
struct Moments { double mean, m2; };

FR_HD Moments moments(double n, double pilot, double sum, double sum_sq) {
  const double m2 = sum_sq - sum * sum / n;
  return {pilot + sum / n, m2 < 0 ? 0 : m2};
}

// A part of n values adds this to M2 about the mean of the whole (Chan, Golub, LeVeque 1983).
FR_HD double m2_about(double n, Moments part, double mean) {
  const double d = part.mean - mean;
  return part.m2 + n * (d * d);
}

// n values with this mean, M2 being the sum of their squared distances from it.
template <typename A> struct Part { A n, mean, m2; };

// A mean from differences is NaN where a value is infinite; their sum is infinite then, as the mean should be.
template <typename A> FR_HD A finite_or(A mean, A sum) { return mean - mean == A(0) ? mean : sum; }

// Both together (Chan, Golub, LeVeque 1983); either may be empty.
template <typename A>
FR_HD Part<A> merged(Part<A> a, Part<A> b) {
  const A n = a.n + b.n, weight = n > A(0) ? b.n / n : A(0), d = b.mean - a.mean;
  return {n, finite_or(a.mean + d * weight, a.mean + b.mean), a.m2 + b.m2 + d * d * (a.n * weight)};
}

// One value x more; inverse is 1/n, x included (Welford 1962).
template <typename A>
FR_HD void include(A& mean, A& m2, A x, A inverse) {
  const A d = x - mean;
  mean += d * inverse;
  m2 += d * (x - mean);
}

FR_HD double unbiased(double var, double count) { return count > 1 ? var * (count / (count - 1)) : var; }

template <typename A> FR_HD A update_running(A running, double value, double momentum) {
  return A(running + momentum * (value - running));
}

// With S1 = sum(g), S2 = sum(g*xhat): grad_x = scale*(g - k1 - (x - mean)*k2), k1 = S1/M, k2 = rstd*S2/M.
template <typename A> FR_HD A bn_grad(A g, A x, A mean, A scale, A k1, A k2) {
  return scale * ((g - k1) - (x - mean) * k2);
}

// ---- max pool ---------------------------------------------------------------------------------------------------------

// A tap of a window: NaN counts as largest, and the last one wins; among equals the first.
template <bool Offsets, typename A, typename Index>
FR_HD void take(A y, Index tap, A& best, Index& which) {
  const bool larger = (y > best) | (y != y);
  best = larger ? y : best;
  if constexpr (Offsets) which = larger ? tap : which;
}

template <typename A, typename Index>
FR_HD A picked(Index offset, Index tap, A g) { return offset == tap ? g : A(0); }

// ---- convolution ------------------------------------------------------------------------------------------------------

// The output's size along one dimension.
FR_HD int64_t conv_extent(int64_t in, int64_t pad, int64_t dilation, int64_t kernel, int64_t stride) {
  return (in + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
}

// ---- second moments ---------------------------------------------------------------------------------------------------

// A kernel that computes only the tiles (i, j), i <= j, of a symmetric matrix numbers them by columns of tiles: j is the
// largest number with j (j + 1) / 2 <= pair.
FR_HD void tile_pair(int32_t pair, int32_t& i, int32_t& j) {
  j = int32_t((std::sqrt(8.0f * float(pair) + 1.0f) - 1.0f) / 2.0f);
  while (j * (j + 1) / 2 > pair) --j;
  while ((j + 1) * (j + 2) / 2 <= pair) ++j;
  i = pair - j * (j + 1) / 2;
}

FR_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fused_resnet
