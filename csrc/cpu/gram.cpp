// What the Gram form of a 1x1 conv asks of its narrow input and of its output's gradient (fused_resnet/ops/block_units.py):
// second moments over pixels, and the sums of a gradient behind a ReLU. float32, channels side by side.
#include "conv.h"

namespace fused_resnet {
namespace {

constexpr int64_t kChunk = 64;        // rows that stay in the L1 cache
constexpr int64_t kSplitRows = 1024;  // at least, of a split; splits are added up in a fixed order
constexpr int64_t kMostSplits = 32;

int64_t splits_of(int64_t rows) { return std::clamp<int64_t>(rows / kSplitRows, 1, kMostSplits); }

FR_CLONES void add_difference(int64_t n, const float* __restrict x, const float* __restrict pivot, float* __restrict to,
                              float* __restrict sum) {
  for (int64_t i = 0; i < n; ++i) {
    const float d = x[i] - pivot[i];
    to[i] = d, sum[i] += d;
  }
}

// ---- second moments ---------------------------------------------------------------------------------------------------

// sums[c] = sum of d and squares[i][j] = sum of d_i d_j (panels i <= j alone), d = row - pivot, over rows [first, last). The
// buffer has room for a chunk's d and their sums: no chain of additions is long.
void moments_of(const Panel& panel, int64_t c, const float* rows, const float* pivot, int64_t first, int64_t last, float* buffer,
                double* sums, float* squares) {
  const int64_t wide = panel.channels, panels = c / wide;
  float* sum = buffer + kChunk * c;
  for (int64_t begin = first; begin < last; begin += kChunk) {
    const int64_t count = std::min(kChunk, last - begin);
    std::memset(sum, 0, c * sizeof(float));
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t p = 0; p < panels; ++p) {
        add_difference(wide, rows + (begin + r) * c + p * wide, pivot + p * wide, buffer + (p * count + r) * wide, sum + p * wide);
      }
    }
    add_to(c, sum, sums);
    for (int64_t i = 0; i < panels; ++i) {
      for (int64_t j = i; j < panels; ++j) {
        multiply_transposed(panel, count, wide, buffer + i * count * wide, wide, buffer + j * count * wide,
                            squares + i * wide * c + j * wide, c, wide, begin > first);
      }
    }
  }
}

// (M, C) to (mean, sum of (row - mean)(row - mean)'). Taken about the mean of the first rows, so that no digits are lost where
// means are large.
std::tuple<Tensor, Tensor> second_moments(const Tensor& rows) {
  STD_TORCH_CHECK(conv_available(), "this CPU has no AVX-512");
  STD_TORCH_CHECK(rows.dim() == 2 && rows.scalar_type() == ScalarType::Float && rows.size(0) > 0 && rows.size(1) % 32 == 0 &&
                      rows.stride(1) == 1 && rows.stride(0) == rows.size(1),
                  "rows must be (M, C), contiguous, float32, M positive and C a multiple of 32");
  const int64_t m = rows.size(0), c = rows.size(1), splits = splits_of(m), size = c * c;
  const Panel panel = panel_of(c % 64 ? 32 : 64);
  const int64_t matrix[] = {c, c}, step[] = {c, 1};
  Tensor mean = new_vector(rows, c), moments = new_strided(rows, 2, matrix, step, dtype_code(rows));
  const float* x = read<float>(rows);
  float *mu = write<float>(mean), *k = write<float>(moments);
  std::vector<float> pivot(c, 0.0f);
  const int64_t first = std::min(m, kChunk);
  for (int64_t r = 0; r < first; ++r) add_to(c, x + r * c, pivot.data());
  for (float& p : pivot) p /= float(first);
  const Buffer<true> parts(splits * size);
  std::vector<double> sums(splits * c, 0.0);
  parallel_dynamic(splits, m / splits * c * c / 32, [&](const auto& next) {
    const Buffer<> buffer(kChunk * c + c);
    for (int64_t s = next(); s >= 0; s = next()) {
      moments_of(panel, c, x, pivot.data(), m * s / splits, m * (s + 1) / splits, buffer.data(), &sums[s * c],
                 parts.data() + s * size);
    }
  });
  std::vector<double> off(c, 0.0);  // mean - pivot
  for (int64_t s = 0; s < splits; ++s) {
    for (int64_t i = 0; i < c; ++i) off[i] += sums[s * c + i];
  }
  for (int64_t i = 0; i < c; ++i) off[i] /= double(m), mu[i] = float(double(pivot[i]) + off[i]);
  parallel_items(c, c * splits, false, [&](int64_t i) {
    const int64_t begin = i / panel.channels * panel.channels;
    float* row = parts.data() + i * c;
    for (int64_t s = 1; s < splits; ++s) add_to(c - begin, row + s * size + begin, row + begin);
    for (int64_t j = i; j < c; ++j) k[i * c + j] = k[j * c + i] = float(row[j] - double(m) * off[i] * off[j]);
  });
  return {mean, moments};
}

// ---- sums of a gradient behind a ReLU ---------------------------------------------------------------------------------

FR_CLONES void masked_row(int64_t c, const float* __restrict grad, const float* __restrict out, float* __restrict g,
                          float* __restrict sum) {
  for (int64_t i = 0; i < c; i += kLine) __builtin_prefetch(g + c + i, 1);  // stores that miss hold up what follows
  for (int64_t i = 0; i < c; ++i) {
    const float v = relu_grad(grad[i], out[i]);
    g[i] = v, sum[i] += v;
  }
}

// (g, its sum per channel), g = grad where out is positive or NaN.
std::tuple<Tensor, Tensor> masked_sums(const Tensor& grad, const Tensor& out) {
  check_nhwc(out, "out");
  check_like(grad, out, "grad");
  const int64_t c = out.size(1), m = c ? out.numel() / c : 0, splits = splits_of(m);
  Tensor g = new_large_like(out), total = new_zero_vector(out, c);
  const float *pg = read<float>(grad), *po = read<float>(out);
  float *to = write<float>(g), *sum = write<float>(total);
  const Buffer<true> parts(splits * c);
  std::memset(parts.data(), 0, splits * c * sizeof(float));
  parallel_items(splits, m * c / splits, false, [&](int64_t s) {
    std::vector<float> block(c);  // no chain of additions is long
    for (int64_t first = m * s / splits, last = m * (s + 1) / splits; first < last; first += kChunk) {
      std::fill(block.begin(), block.end(), 0.0f);
      for (int64_t r = first; r < std::min(first + kChunk, last); ++r) {
        masked_row(c, pg + r * c, po + r * c, to + r * c, block.data());
      }
      add_to(c, block.data(), parts.data() + s * c);
    }
  });
  for (int64_t s = 0; s < splits; ++s) add_to(c, parts.data() + s * c, sum);
  return {g, total};
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpp, CPU, m) {
  m.impl("second_moments", TORCH_BOX(&fused_resnet::second_moments));
  m.impl("masked_sums", TORCH_BOX(&fused_resnet::masked_sums));
}
