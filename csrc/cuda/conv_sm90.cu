// Convolution for sm_90a: TMA reads x in im2col mode, warp groups multiply (wgmma). From CUTLASS, with an end of our own.
#include "conv_sm90.h"

#include <cutlass/conv/device/conv_universal_adapter.hpp>
#include <cutlass/conv/kernel/conv_universal.hpp>

namespace fused_resnet {
namespace {

template <typename Kernel>
const char* run(const Conv& conv, const ConvOperands& operands, cudaStream_t stream) {
  const ProblemSm90 problem = problem_sm90(conv);
  const auto [mainloop, epilogue] = arguments_sm90<Kernel>(problem, operands);
  using Adapter = cutlass::conv::device::ConvUniversalAdapter<
      cutlass::conv::kernel::ConvUniversal<ProblemSm90, typename Kernel::Mainloop, typename Kernel::Epilogue>>;
  constexpr int kShared = Adapter::ConvKernel::SharedStorageSize + 1024;  // the last KiB is the system's
  static_assert(Kernel::kBlocks * kShared <= 228 * 1024, "they do not fit into a multiprocessor");
  const typename Adapter::Arguments arguments{problem, mainloop, epilogue};
  Adapter kernel;
  cutlass::Status status = kernel.can_implement(arguments);
  if (status == cutlass::Status::kSuccess) status = kernel.run(arguments, nullptr, stream);
  return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
}

}  // namespace

template <typename T>
const char* run_conv_sm90(const Conv& conv, const ConvOperands& operands, ConvTile tile, cudaStream_t stream) {
  using namespace cutlass::conv::collective;
  if (tile == ConvTile::wide) return run<KernelSm90<T, 128, StageCount<6>>>(conv, operands, stream);
  return run<KernelSm90<T, 64, StageCount<4>>>(conv, operands, stream);
}

template const char* run_conv_sm90<bf16>(const Conv&, const ConvOperands&, ConvTile, cudaStream_t);
template const char* run_conv_sm90<fp16>(const Conv&, const ConvOperands&, ConvTile, cudaStream_t);

}  // namespace fused_resnet
