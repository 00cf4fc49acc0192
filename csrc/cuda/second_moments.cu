// mean and sum of (row - mean)(row - mean)^T of (M, w) rows, in float32: what a 1x1 conv's batch statistics follow from.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "batch_norm.h"

namespace fused_resnet {
namespace {

constexpr int kSide = 4;  // a thread's elements: kSide x kSide of a tile
constexpr int64_t kSummed = 8 * kDepth;  // rows whose products are added up before they join the others: smaller errors
static_assert(kTile * kTile == kThreads * kSide * kSide, "a block computes one tile");

// ---- kernels ------------------------------------------------------------------------------------------------------------

// Rows [first, first + kDepth) of a tile's columns, centred; 0 beyond the edges.
template <typename T, int V>
__device__ void fill_tile(float (&to)[kDepth][kTile], const Gram& gram, const T* x, const float* mean, int64_t first,
                          int64_t end, int32_t tile) {
  for (int32_t e = threadIdx.x; e < kDepth * kTile / V; e += kThreads) {
    const int32_t depth = e * V / kTile, at = e * V % kTile, column = tile * kTile + at;
    const bool exist = first + depth < end && column < gram.width;
    Vector<T, V> from{};
    if (exist) from = Vector<T, V>::at(x + (first + depth) * gram.width + column);
    for (int v = 0; v < V; ++v) to[depth][at + v] = exist ? from[v] - mean[column + v] : 0.0f;
  }
}

// parts (P, pairs, kTile, kTile): the products of a part of the rows, for the tiles (i, j) with i <= j.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    products_kernel(Gram gram, const T* __restrict__ x, const float* __restrict__ mean, float* __restrict__ parts) {
  __shared__ float left[kDepth][kTile], right[kDepth][kTile];
  int32_t i, j;
  tile_pair(blockIdx.x, i, j);
  const int32_t across = kTile / kSide, row = threadIdx.x / across * kSide, column = threadIdx.x % across * kSide;
  const int64_t begin = gram.first(blockIdx.y), last = gram.first(blockIdx.y + 1), end = last < gram.rows ? last : gram.rows;
  float total[kSide][kSide] = {}, sum[kSide][kSide] = {};
  for (int64_t r = begin; r < end; r += kDepth) {
    fill_tile<T, V>(left, gram, x, mean, r, end, i);
    fill_tile<T, V>(right, gram, x, mean, r, end, j);
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      for (int a = 0; a < kSide; ++a) {
        for (int b = 0; b < kSide; ++b) sum[a][b] = fmaf(left[d][row + a], right[d][column + b], sum[a][b]);
      }
    }
    __syncthreads();
    if ((r - begin) % kSummed != kSummed - kDepth && r + kDepth < end) continue;
    for (int a = 0; a < kSide; ++a) {
      for (int b = 0; b < kSide; ++b) total[a][b] += sum[a][b], sum[a][b] = 0;
    }
  }
  float* to = parts + (int64_t(blockIdx.y) * gram.pairs + blockIdx.x) * (kTile * kTile);
  for (int a = 0; a < kSide; ++a) {
    for (int b = 0; b < kSide; ++b) to[(row + a) * kTile + column + b] = total[a][b];
  }
}

// moments (w, w) from the parts, added up in their order.
__global__ void __launch_bounds__(kThreads)
    moments_kernel(Gram gram, const float* __restrict__ parts, float* __restrict__ moments) {
  int32_t i, j;
  tile_pair(blockIdx.x, i, j);
  const int32_t e = blockIdx.y * kThreads + threadIdx.x, row = i * kTile + e / kTile, column = j * kTile + e % kTile;
  if (row >= gram.width || column >= gram.width) return;
  float sum = 0;
#pragma unroll 4
  for (int64_t p = 0; p < gram.parts; ++p) sum += parts[(p * gram.pairs + blockIdx.x) * (kTile * kTile) + e];
  moments[int64_t(row) * gram.width + column] = sum;
  moments[int64_t(column) * gram.width + row] = sum;
}

// ---- operator -----------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> second_moments(const Tensor& rows) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.numel() > 0, "rows must be (M, w), and not empty");
  const Shape shape = checked_shape(rows);
  STD_TORCH_CHECK(shape.rows || shape.c == 1, "rows must be contiguous");
  const int64_t w = shape.c, size[] = {w, w}, stride[] = {w, 1};
  const Device device(rows);
  const Tensor mean = batch_statistics(device, rows, shape, {nullptr, nullptr, 0.0}).first;
  Tensor moments = new_strided(rows, 2, size, stride, aoti_torch_dtype_float32());
  const Gram plan = gram(shape.n, w, device.multiprocessors());
  const Tensor parts = workspace(rows, int64_t(plan.parts) * plan.pairs * kTile * kTile * int64_t(sizeof(float)));
  dispatch_storage(rows.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    constexpr int kVector = 16 / sizeof(T);
    const int32_t vector = vector_size(sizeof(T), kVector, w, addresses(rows));
    const auto kernel = vector == kVector ? products_kernel<T, kVector> : products_kernel<T, 1>;
    device.launch("second moments, products", kernel, plan.pairs, plan.parts, plan, read<T>(rows), read<float>(mean),
                  write<float>(parts));
  });
  device.launch("second moments", moments_kernel, plan.pairs, kTile * kTile / kThreads, plan, read<float>(parts),
                write<float>(moments));
  return {mean, moments};
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(FR_DEVICE_LIBRARY, FR_DEVICE_KEY, m) {
  m.impl("second_moments", TORCH_BOX(&fused_resnet::second_moments));
}
