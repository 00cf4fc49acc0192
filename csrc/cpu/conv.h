// A tile of a float32 matrix product in registers (AVX-512), on which the convolutions for inference are built.
#pragma once

#include <torch/csrc/stable/library.h>

#include <array>
#include <memory>
#include <utility>
#include <vector>

#include "memory.h"
#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FR_CONV 1
#include <immintrin.h>
#endif

namespace fused_resnet {

constexpr int64_t kChain = 256;  // products that are added up one after the other
constexpr int64_t kLine = 16;    // floats of a cache line
constexpr int64_t kAhead = 8;    // steps, of the weights asked for

// `rows` x `runs` runs of `length` floats of x, `row_step` and `run_step` apart, the floats of a run `step`; pixels of x are
// `x_stride` apart, and the second half of a tile of two output rows stands `fold` after the first.
struct Reduction { int64_t rows, runs, length, row_step, run_step, x_stride, fold, step = 1; };

struct Target {
  const float *bias, *sum;  // what the tile starts from; nullptr: 0
  float* out;
  int64_t stride, columns;  // of out and sum from pixel to pixel; channels that there are of the panel's
  bool relu;
  const float* ahead;  // what is read later; each step asks for a cache line of it
};

using TileFunction = void (*)(const Reduction&, const float* x, const float* weight, const Target&);

inline bool conv_available() {
#ifdef FR_CONV
  return __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

#ifdef FR_CONV
#pragma GCC push_options
#pragma GCC target("avx512f")
#pragma GCC diagnostic ignored "-Wuninitialized"        // what GCC's own headers pass on where nothing is merged
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // `total`, which is read only where it was written
inline __m512 relu(__m512 v) {  // keeps NaN
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ), v);
}

// to[j][i] = from[i][j] of 16 x 16 floats; Part: of `rows` x `columns`.
template <bool Part = false>
void transpose(const float* from, int64_t from_step, float* to, int64_t to_step, int64_t rows = 16, int64_t columns = 16) {
  __m512 a[16], b[16];
  const __mmask16 across = static_cast<__mmask16>((1u << columns) - 1), down = static_cast<__mmask16>((1u << rows) - 1);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const float* row = from + i * from_step;
    a[i] = !Part ? _mm512_loadu_ps(row) : i < rows ? _mm512_maskz_loadu_ps(across, row) : _mm512_setzero_ps();
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  const auto pair = [](__m512 x, __m512 y, auto high) {
    const __m512d p = _mm512_castps_pd(x), q = _mm512_castps_pd(y);
    return _mm512_castpd_ps(high.value ? _mm512_unpackhi_pd(p, q) : _mm512_unpacklo_pd(p, q));
  };
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // a[i + j]: columns j, 4 + j, 8 + j, 12 + j of rows i to i + 3
    a[i] = pair(b[i], b[i + 2], std::false_type{}), a[i + 1] = pair(b[i], b[i + 2], std::true_type{});
    a[i + 2] = pair(b[i + 1], b[i + 3], std::false_type{}), a[i + 3] = pair(b[i + 1], b[i + 3], std::true_type{});
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), even2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd), odd2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    const auto store = [=](int column, __m512 line) {
      if (!Part) _mm512_storeu_ps(to + column * to_step, line);
      else if (column < columns) _mm512_mask_storeu_ps(to + column * to_step, down, line);
    };
    store(j, _mm512_shuffle_f32x4(even, even2, 0x88));
    store(4 + j, _mm512_shuffle_f32x4(odd, odd2, 0x88));
    store(8 + j, _mm512_shuffle_f32x4(even, even2, 0xdd));
    store(12 + j, _mm512_shuffle_f32x4(odd, odd2, 0xdd));
  }
}

// y = bias + sum + x w over a Reduction, for M pixels and a panel's channels.
template <int M, int V, bool Folded>
void tile(const Reduction& sum, const float* x, const float* w, const Target& to) {
  __m512 y[M][V];
  __mmask16 mask[V];
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) {
    const int64_t first = 16 * j, columns = std::clamp<int64_t>(to.columns - first, 0, 16);
    mask[j] = __mmask16((1u << columns) - 1);
    const __m512 bias = to.bias ? _mm512_maskz_loadu_ps(mask[j], to.bias + first) : _mm512_setzero_ps();
#pragma GCC unroll 14
    for (int i = 0; i < M; ++i) {
      y[i][j] = bias;
      if (to.sum) y[i][j] = _mm512_add_ps(bias, _mm512_maskz_loadu_ps(mask[j], to.sum + i * to.stride + first));
    }
  }
  const int64_t stride = sum.x_stride, fold = Folded ? sum.fold - M / 2 * stride : 0;
  __m512 total[M][V];  // rounding errors grow with the length of a chain of additions, so that none is long
  bool chained = false;
  const auto add_up = [&] {
#pragma GCC unroll 14
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        total[i][j] = chained ? _mm512_add_ps(total[i][j], y[i][j]) : y[i][j];
        y[i][j] = _mm512_setzero_ps();
      }
    }
    chained = true;
  };
  int64_t left = kChain;
  const float* ahead = to.ahead;
  for (int64_t row = 0; row < sum.rows; ++row) {
    for (int64_t run = 0; run < sum.runs; ++run) {
      const float* v = x + row * sum.row_step + run * sum.run_step;
      for (int64_t begin = 0; begin < sum.length; begin += kChain) {
        const int64_t length = std::min(kChain, sum.length - begin);
        if (length > left) add_up(), left = kChain;
        left -= length;
        for (int64_t k = 0; k < length; ++k, v += sum.step, w += V * kLine, ahead += kLine) {
          __m512 weight[V];
          _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
#pragma GCC unroll 4
          for (int j = 0; j < V; ++j) {
            weight[j] = _mm512_loadu_ps(w + j * kLine);
            _mm_prefetch(reinterpret_cast<const char*>(w + (kAhead * V + j) * kLine), _MM_HINT_T0);
          }
#pragma GCC unroll 14
          for (int i = 0; i < M; ++i) {
            const __m512 a = _mm512_set1_ps(v[i * stride + (Folded && i >= M / 2 ? fold : 0)]);
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) y[i][j] = _mm512_fmadd_ps(a, weight[j], y[i][j]);
          }
        }
      }
    }
  }
  if (chained) add_up();
#pragma GCC unroll 4
  for (int j = 0; j < V; ++j) {
#pragma GCC unroll 14
    for (int i = 0; i < M; ++i) {
      __m512 v = chained ? total[i][j] : y[i][j];
      if (to.relu) v = relu(v);
      _mm512_mask_storeu_ps(to.out + i * to.stride + 16 * j, mask[j], v);
    }
  }
}

#pragma GCC pop_options

template <int V, bool Folded, int... I>
constexpr std::array<TileFunction, sizeof...(I)> tiles(std::integer_sequence<int, I...>) {
  return {tile<Folded ? 2 * (I + 1) : I + 1, V, Folded>...};
}
template <int V, int Most>
constexpr auto kTiles = tiles<V, false>(std::make_integer_sequence<int, Most>{});  // of 1 to Most pixels
template <int V, int Most>
constexpr auto kFoldedTiles = tiles<V, true>(std::make_integer_sequence<int, Most / 2>{});  // of 2, 4, ... pixels
#else
template <int V, int Most>
constexpr TileFunction kTiles[Most] = {}, kFoldedTiles[Most] = {};
#endif

// Output channels of packed weights that stand together, and the tiles that read them. Tiles of 6 pixels x 64 channels load
// least for each product; those of 14 x 32 fit rows of 28 and 56 pixels.
struct Panel {
  int64_t channels, pixels;  // pixels: at most
  const TileFunction *tiles, *folded;
};

inline Panel panel_of(int64_t channels) {
  STD_TORCH_CHECK(channels == 32 || channels == 64, "weights are packed in panels of 32 or 64 channels");
  if (channels == 32) return {32, 14, &kTiles<2, 14>[0], &kFoldedTiles<2, 14>[0]};
  return {64, 6, &kTiles<4, 6>[0], &kFoldedTiles<4, 6>[0]};
}

// Floats from a row to the next of what tiles walk across: an odd number of cache lines, which the L1 cache keeps apart.
inline int64_t apart(int64_t columns) { return (ceil_div(columns, kLine) | 1) * kLine; }

// to[k][c] (+)= sum of u[.][k] v[.][c] over `count` rows; v is one panel, `rows` of u's columns are taken, rows `step` apart.
inline void multiply_transposed(const Panel& panel, int64_t count, int64_t rows, const float* u, int64_t step, const float* v,
                                float* to, int64_t stride, int64_t columns, bool add) {
  const Reduction sum{1, 1, count, 0, 0, 1, 0, step};
  const int64_t tiles = ceil_div(rows, panel.pixels);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = rows * t / tiles, size = rows * (t + 1) / tiles - begin;
    float* out = to + begin * stride;
    panel.tiles[size - 1](sum, u + begin, v, {nullptr, add ? out : nullptr, out, stride, columns, false, v});
  }
}

// Memory that a thread keeps, for the pages of a new buffer cost as much as what is done with them. `Shared`: by all threads
// of an operator, whose own buffers are others.
template <bool Shared = false>
class Buffer {
 public:
  explicit Buffer(int64_t size) {
    constexpr int64_t kMost = 4 << 20;  // 16 MiB
    thread_local std::vector<float> kept;
    if (size > kMost) own_.reset(new float[size]);
    else if (size > int64_t(kept.size())) kept = std::vector<float>(size);
    data_ = own_ ? own_.get() : kept.data();
  }
  float* data() const { return data_; }

 private:
  std::unique_ptr<float[]> own_;
  float* data_;
};

// A weight (K, C, R, S) as a packing function reads it. `backward`: that of the convolution that takes a stride-1 conv's
// gradient from its output to its input: channels exchanged, taps in reverse.
struct WeightView {
  const float* first;
  int64_t k, c, r, s, step_k, step_c, step_r, step_s;

  WeightView(const Tensor& weight, bool backward) {
    STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == ScalarType::Float, "weight must be (K, C, R, S), float32");
    k = weight.size(0), c = weight.size(1), r = weight.size(2), s = weight.size(3), first = read<float>(weight);
    step_k = weight.stride(0), step_c = weight.stride(1), step_r = weight.stride(2), step_s = weight.stride(3);
    if (!backward) return;
    first += (r - 1) * step_r + (s - 1) * step_s;
    std::swap(k, c), std::swap(step_k, step_c), step_r = -step_r, step_s = -step_s;
  }

  // to[tap][j][i] = weight[i0 + i][j0 + j][tap], i < wide, zeros from k on, and j < count <= 16; taps of `to` are `tap_step`
  // apart, rows `step`.
  void panels(int64_t i0, int64_t wide, int64_t j0, int64_t count, float* to, int64_t tap_step, int64_t step) const {
    const int64_t there = std::clamp<int64_t>(k - i0, 0, wide), taps = r * s;
    const float* from = first + i0 * step_k + j0 * step_c;
    int64_t done = 0;
#ifdef FR_CONV
    const bool planes = step_c != 1 && taps > 1 && taps <= kLine && std::abs(step_s) == 1 && step_r == s * step_s;
    for (; conv_available() && done + kLine <= there; done += kLine) {
      const float* lines = from + done * step_k;
      if (step_c == 1 && count == kLine) {
        for (int64_t tap = 0; tap < taps; ++tap) transpose(lines + at(tap), step_k, to + tap * tap_step + done, step);
      } else if (planes) {
        const int64_t lowest = step_s > 0 ? 0 : taps - 1;
        for (int64_t j = 0; j < count; ++j) {
          float* column = to + lowest * tap_step + j * step + done;
          transpose<true>(lines + j * step_c + at(lowest), step_k, column, step_s * tap_step, kLine, taps);
        }
      } else {
        break;
      }
    }
#endif
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t j = 0; j < count; ++j) {
        float* row = to + tap * tap_step + j * step;
        const float* column = from + at(tap) + j * step_c;
        if (step_k == 1) std::memcpy(row, column, there * sizeof(float));
        else for (int64_t i = done; i < there; ++i) row[i] = column[i * step_k];
        std::memset(row + there, 0, (wide - there) * sizeof(float));
      }
    }
  }

 private:
  int64_t at(int64_t tap) const { return tap / s * step_r + tap % s * step_s; }
};

struct Operands {
  const float *x, *weight, *bias, *residual;
  float* out;
  bool relu;
};

// winograd.cpp; shapes are checked, and out is not empty.
void winograd(const Tensor& x, const Tensor& packed, const Tensor& out, int64_t pad_h, int64_t pad_w, const Operands& op);

namespace {  // each file that includes this has its own clones
template <typename T>
FR_CLONES void add_to(int64_t n, const float* __restrict from, T* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}
}  // namespace

// What is checked

inline void check_geometry(int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h,
                           int64_t dilation_w) {
  STD_TORCH_CHECK(stride_h > 0 && stride_w > 0 && pad_h >= 0 && pad_w >= 0 && dilation_h > 0 && dilation_w > 0,
                  "strides and dilations must be positive, paddings not negative");
}

inline void check_nhwc(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.scalar_type() == ScalarType::Float, name, " must be (N, C, H, W), float32");
  STD_TORCH_CHECK(is_rows(shape_of(t)), name, " must be channels_last");
}

}  // namespace fused_resnet
