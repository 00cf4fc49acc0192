// What the CUDA kernels need of their surroundings: device, stream, launch. Tests emulate it on a CPU.
#pragma once

#include "../checks.h"
#include "plan.h"

#ifdef FUSED_RESNET_EMULATED
#include "emulated.h"
#else

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <atomic>
#include <tuple>
#include <utility>

#define FR_DEVICE_KEY CUDA
#define FR_DEVICE_LIBRARY fused_resnet_cpp

namespace fused_resnet {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // ours alone: this runtime is linked statically
  STD_TORCH_CHECK(false, what, ": ", cudaGetErrorString(status));
}

// The device of a tensor becomes the current one; kernels go to torch's current stream there.
class Device {
 public:
  explicit Device(const Tensor& x) : index_(x.get_device_index()), guard_(index_) {}

  int32_t multiprocessors() const { return attribute<cudaDevAttrMultiProcessorCount>(); }

  // 9 and 0, say.
  int32_t major_capability() const { return attribute<cudaDevAttrComputeCapabilityMajor>(); }
  int32_t minor_capability() const { return attribute<cudaDevAttrComputeCapabilityMinor>(); }

  // kernel<<<(blocks, parts), kThreads>>>(args...)
  template <typename... P, typename... A>
  void launch(const char* name, void (*kernel)(P...), int64_t blocks, int64_t parts, A&&... args) const {
    std::tuple<P...> values(std::forward<A>(args)...);
    std::apply(
        [&](auto&... value) {
          void* pointers[] = {const_cast<void*>(static_cast<const void*>(&value))...};
          const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(parts));
          check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(kThreads), pointers, 0, stream()), name);
        },
        values);
  }

  // torch has no header for it that a build without its CUDA libraries could link.
  cudaStream_t stream() const {
    using Function = AOTITorchError (*)(int32_t, void**);
    static const Function current = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    STD_TORCH_CHECK(current, "libtorch_cuda.so is not loaded or has no aoti_torch_get_current_cuda_stream");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(current(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  template <cudaDeviceAttr Attribute>
  int32_t attribute() const {
    static std::array<std::atomic<int32_t>, 64> known{};  // plus 1: 0 is unknown
    int32_t value = index_ < 64 ? known[index_].load(std::memory_order_relaxed) - 1 : -1;
    if (value < 0) {
      check(cudaDeviceGetAttribute(&value, Attribute, index_), "cudaDeviceGetAttribute");
      if (index_ < 64) known[index_].store(value + 1, std::memory_order_relaxed);
    }
    return value;
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace fused_resnet
#endif
