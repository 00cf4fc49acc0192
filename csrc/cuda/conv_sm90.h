// What the convolution for sm_90a is put together from: CUTLASS's main loop, and an end of our own. See conv_sm90.cu.
#pragma once

#include <cutlass/kernel_hardware_info.hpp>  // before what needs it

#include <cute/tensor.hpp>
#include <cutlass/conv/collective/collective_builder.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>

#include "conv_problem.h"
#include "conv_run.h"

namespace fused_resnet {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

// A node of CUTLASS's epilogue: bias or batch norm, residual and ReLU. The tile's channels wait in shared memory.
template <typename T, int Columns>
struct Finish {
  struct SharedStorage {
    Channel channel[Columns];
  };
  struct Arguments {
    Channels channels;
    bool with_residual, with_relu;
  };
  using Params = Arguments;

  template <typename Problem>
  static Params to_underlying_arguments(const Problem&, const Arguments& arguments, void*) { return arguments; }
  template <typename Problem>
  static bool can_implement(const Problem&, const Arguments&) { return true; }
  template <typename Problem>
  static size_t get_workspace_size(const Problem&, const Arguments&) { return 0; }
  template <typename Problem>
  static cutlass::Status initialize_workspace(const Problem&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE Finish() {}
  CUTLASS_HOST_DEVICE Finish(const Params& params, const SharedStorage& shared)
      : params(&params), channel(const_cast<Channel*>(shared.channel)) {}

  CUTLASS_DEVICE bool is_C_load_needed() const { return params->with_residual; }
  CUTLASS_DEVICE bool is_producer_load_needed() const { return params->with_residual; }
  CUTLASS_DEVICE bool is_zero() const { return false; }

  template <typename... A>
  CUTLASS_DEVICE auto get_producer_load_callbacks(const fusion::detail::ProducerLoadArgs<A...>&) {
    return fusion::detail::EmptyProducerLoadCallbacks{};
  }

  template <typename Shared, typename Registers, typename Residual>
  struct Callbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE Callbacks(const Finish& node, Shared shared, Registers registers, const Residual& residual, int thread,
                             int threads, int first, int channels)
        : node(node), shared(shared), registers(registers), residual(residual), thread(thread), threads(threads), first(first),
          channels(channels) {}

    const Finish& node;
    Shared shared;        // (CPY, CPY_M, CPY_N, EPI_M, EPI_N)
    Registers registers;  // (CPY, CPY_M, CPY_N), those of one column of subtiles
    const Residual& residual;
    int thread, threads, first, channels;

    CUTLASS_DEVICE void begin() {
      for (int n = thread; n < Columns; n += threads) {
        node.channel[n] = first + n < channels ? node.params->channels.template at<T>(first + n) : Channel{};
      }
    }
    CUTLASS_DEVICE bool begin_sync_needed() const { return true; }

    CUTLASS_DEVICE void begin_loop(int epi_m, int epi_n) {
      if (epi_m == 0) copy(filter_zeros(shared(_, _, _, epi_m, epi_n)), filter_zeros(registers));
    }

    template <typename Sum, int Size>
    CUTLASS_DEVICE auto visit(const cutlass::Array<Sum, Size>& sum, int v, int, int) {
      using Source = typename Residual::value_type;
      cutlass::Array<float, Size> y;
      const auto beside = recast<cutlass::Array<Source, Size>>(residual)(v);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Size; ++i) {
        const float add = node.params->with_residual ? float(beside[i]) : 0.0f;
        y[i] = finished(sum[i], registers(v * Size + i), add, node.params->with_relu);
      }
      return y;
    }
  };

  template <bool ReferenceSource, typename... A>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::detail::ConsumerStoreArgs<A...>& args) {
    const Tensor tile = make_tensor(make_smem_ptr(channel),
                                    make_layout(take<0, 2>(args.tile_shape_mnk), make_stride(_0{}, _1{})));  // (M, N)
    const Tensor shared = fusion::sm90_partition_for_epilogue<ReferenceSource>(tile, args.epi_tile, args.tiled_copy,
                                                                              args.thread_idx);
    const Tensor registers = make_tensor_like<Channel>(take<0, 3>(shared));
    return Callbacks<remove_cvref_t<decltype(shared)>, remove_cvref_t<decltype(registers)>,
                     remove_cvref_t<decltype(args.tCrC)>>(
        *this, shared, registers, args.tCrC, args.thread_idx, int(size(args.tiled_copy)),
        int(get<1>(args.tile_coord_mnkl)) * Columns, int(get<1>(args.problem_shape_mnkl)));
  }

  const Params* params = nullptr;
  Channel* channel = nullptr;
};

// A tile of 128 pixels and `Columns` channels; `Stages` steps of 64 reduced values are on their way.
template <typename T, int Columns, typename Stages>
struct KernelSm90 {
  using E = typename Element<T>::type;
  using Layout = cutlass::layout::TensorNHWC;
  using Tile = Shape<Int<kConvTileRows>, Int<Columns>, Shape<_64>>;
  using Cluster = Shape<_1, _1, _1>;
  static constexpr auto kForward = cutlass::conv::Operator::kFprop;
  static constexpr int kBlocks = Columns > 64 ? 1 : 2;  // in a multiprocessor: one's end while the other multiplies

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float,
      float, E, Layout, kConvChannels, E, Layout, kConvChannels, cutlass::epilogue::TmaWarpSpecialized,
      Finish<T, Columns>>::CollectiveOp;
  using Mainloop = typename cutlass::conv::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, kForward, E, Layout, kConvChannels, E, Layout, kConvChannels, float,
      Tile, Cluster, Stages, cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;
};

// What the main loop and the end are called with.
template <typename Kernel>
auto arguments_sm90(const ProblemSm90& problem, const ConvOperands& operands) {
  using E = typename Kernel::E;
  typename Kernel::Epilogue::StrideD stride{};  // ((q, p, n), k, _)
  for_each(make_seq<3>{}, [&](auto d) { get<0, d>(stride) = problem.stride_C[2 - d]; });
  E* out = static_cast<E*>(operands.out);
  const E* residual = operands.residual ? static_cast<const E*>(operands.residual) : out;  // out is not read: a valid address
  return std::make_pair(
      typename Kernel::Mainloop::Arguments{static_cast<const E*>(operands.x), static_cast<const E*>(operands.weight)},
      typename Kernel::Epilogue::Arguments{
          {operands.channels, operands.residual != nullptr, operands.with_relu}, residual, stride, out, stride});
}

}  // namespace fused_resnet
