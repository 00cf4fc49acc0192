// Whether the kernels can run here at all: the driver, and code for the GPU.
#include <torch/csrc/stable/library.h>

#include "device.h"

namespace fused_resnet {
namespace {

__global__ void probe_kernel() {}

// Raises the reason why no kernel could be launched on the current device.
void cuda_check() {
  int driver = 0, built = 0;
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (status == cudaErrorInsufficientDriver) {
    cudaDriverGetVersion(&driver), cudaRuntimeGetVersion(&built);
    cudaGetLastError();
    STD_TORCH_CHECK(false, "the NVIDIA driver is too old: it is for CUDA ", driver / 1000, ".", driver % 1000 / 10,
                    ", they were built with CUDA ", built / 1000, ".", built % 1000 / 10);
  }
  check(status, "no kernel can be loaded");
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpp, CompositeExplicitAutograd, m) {
  m.impl("cuda_check", TORCH_BOX(&fused_resnet::cuda_check));
}
