// Runs CUTLASS's kernels for sm_80 on a CPU: the folder emulated_cutlass has what stands for ldmatrix and mma.sync, whose
// warps exchange operands here; everything else of CUTLASS's headers is plain C++ off a GPU. See emulated.h.
#pragma once

#define __DEVICE_LAUNCH_PARAMETERS_H__  // of the toolkit: threadIdx and the like are emulated.h's
#include <cuda_runtime.h>
#undef __device__
#undef __global__
#undef __grid_constant__
#undef __launch_bounds__
#undef __shared__
#define __grid_constant__

#include "checks.h"
#include "cuda/plan.h"
#include "emulated.h"

using fused_resnet::blockIdx;
using fused_resnet::threadIdx;
inline void __syncthreads() { fused_resnet::__syncthreads(); }

// Named by headers, called by nothing here.
extern fused_resnet::Index blockDim, gridDim;
int __syncthreads_and(int);
namespace cutlass::arch {
int LaneId();
unsigned cutlass_get_smem_pointer(void const*);
}  // namespace cutlass::arch

namespace emulated {

constexpr int kMostThreads = 256;
alignas(128) inline char shared[256 * 1024];

// A value of every thread of the block; `of` gives those of the warp's lanes. All threads of a block come by.
template <typename T>
class Exchange {
 public:
  explicit Exchange(const T& mine) {
    values()[threadIdx.x] = mine;
    __syncthreads();
  }
  ~Exchange() { __syncthreads(); }
  const T& of(int lane) const { return values()[threadIdx.x / 32 * 32 + lane]; }

 private:
  static T* values() {
    static T all[kMostThreads];
    return all;
  }
};

template <typename P>
void launch(void (*kernel)(P), dim3 grid, int threads, const P& params) {
  static fused_resnet::Block block;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = {x, y, 0};
      block.run(threads, [&] { kernel(params); });
    }
  }
}

}  // namespace emulated
