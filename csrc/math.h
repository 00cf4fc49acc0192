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

// Branch-free both ways (Maratyszcza's FP16 library), because compilers do not vectorise _Float16 conversions everywhere.
FR_HD float load(fp16 v) {
  const uint32_t w = uint32_t(v.bits) << 16, magnitude = w + w;
  const float normal = bit_cast<float>((magnitude >> 4) + 0x70000000u) * 0x1.0p-112f;
  const float subnormal = bit_cast<float>((magnitude >> 17) | 0x3f000000u) - 0.5f;
  const uint32_t bits = magnitude < 0x08000000u ? bit_cast<uint32_t>(subnormal) : bit_cast<uint32_t>(normal);
  return bit_cast<float>((w & 0x80000000u) | bits);
}

// All ones for NaN. Integer arithmetic, because compilers thread a comparison into the code before it and leave a tangle.
FR_HD uint32_t nan_mask(uint32_t bits) { return uint32_t(int32_t(0x7f800000u - (bits & 0x7fffffffu)) >> 31); }

// store<T>: round to nearest even; NaN stays NaN.
template <typename T> FR_HD T store(acc_t<T> v);
template <> FR_HD double store<double>(double v) { return v; }
template <> FR_HD float store<float>(float v) { return v; }

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

// ---- activation -------------------------------------------------------------------------------------------------------

template <typename A> FR_HD A relu(A v) { return v < A(0) ? A(0) : v; }  // NaN passes

// Gradient g through a ReLU whose output (or input) was v; a NaN lets it pass.
template <typename A> FR_HD A relu_grad(A g, A v) { return v <= A(0) ? A(0) : g; }

// ---- batch norm -------------------------------------------------------------------------------------------------------

// scale*(x - mean) + beta with scale = gamma*rstd, never scale*x + shift: that cancels when |mean| >> std.
template <typename A> FR_HD A bn(A x, A mean, A scale, A beta) { return scale * (x - mean) + beta; }

template <typename A> FR_HD A bn_rstd(A var, double eps) { return A(1.0 / std::sqrt(double(var) + eps)); }

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

FR_HD double unbiased(double var, double count) { return count > 1 ? var * (count / (count - 1)) : var; }

template <typename A> FR_HD A update_running(A running, double value, double momentum) {
  return A(running + momentum * (value - running));
}

// With S1 = sum(g), S2 = sum(g*xhat): grad_x = scale*(g - k1 - (x - mean)*k2), k1 = S1/M, k2 = rstd*S2/M.
template <typename A> FR_HD A bn_grad(A g, A x, A mean, A scale, A k1, A k2) {
  return scale * ((g - k1) - (x - mean) * k2);
}

}  // namespace fused_resnet
