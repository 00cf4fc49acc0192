// Convolution for sm_80 to sm_89: an implicit GEMM on tensor cores, from CUTLASS, with an end of our own.
#include "conv_run.h"

#ifdef FUSED_RESNET_EMULATED
#include "emulated_cutlass.h"
#endif

#include <cute/tensor.hpp>
#include <cutlass/conv/kernel/default_conv2d_fprop.h>
#include <cutlass/epilogue/threadblock/epilogue_with_visitor_callbacks.h>
#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include "conv_problem.h"

namespace fused_resnet {
namespace {

using cutlass::gemm::GemmCoord;
using cutlass::gemm::GemmShape;
namespace threadblock = cutlass::epilogue::threadblock;

// ---- kernels ------------------------------------------------------------------------------------------------------------

// What CUTLASS's epilogue calls: bias or batch norm, residual and ReLU, and the store. A thread works on 8 channels of a row.
template <typename T, typename ThreadMap>
struct Finish {
  struct Arguments {
    Channels channels;
    const T* residual;  // or nullptr
    T* out;
    bool with_relu;
  };
  using Params = Arguments;
  struct SharedStorage {};

  static constexpr int kVector = ThreadMap::kElementsPerAccess, kAcross = ThreadMap::Iterations::kColumn;
  static constexpr int kAccesses = ThreadMap::Iterations::kCount;  // of a step
  struct alignas(16) Vector {
    T value[kVector];
  };
  static_assert(sizeof(Vector) == 16, "accesses of 16 bytes");

  CUTLASS_HOST_DEVICE Finish(const Params& params, const SharedStorage&) : params(params) {}

  template <typename Coordinates>
  struct Callbacks : threadblock::detail::EmptyCallbacks {
    CUTLASS_DEVICE Callbacks(const Params& params, const Coordinates& at, int rows, int channels)
        : params(params), at(at), rows(rows), channels(channels) {}

    const Params& params;
    Coordinates at;  // (vector, across, row, step) -> (row, channel)
    int rows, channels;
    Channel channel[kAcross][kVector];
    Vector residual[kAccesses];

    CUTLASS_DEVICE int row(int access, int step) const {
      return cute::get<0>(at(0, access % kAcross, access / kAcross, step));
    }
    CUTLASS_DEVICE int column(int access) const { return cute::get<1>(at(0, access % kAcross, 0, 0)); }
    CUTLASS_DEVICE bool inside(int access, int step) const { return row(access, step) < rows && column(access) < channels; }
    CUTLASS_DEVICE int64_t offset(int access, int step) const {
      return int64_t(row(access, step)) * channels + column(access);
    }

    CUTLASS_DEVICE void begin_epilogue() {
      CUTLASS_PRAGMA_UNROLL
      for (int a = 0; a < kAcross; ++a) {
        CUTLASS_PRAGMA_UNROLL
        for (int v = 0; v < kVector; ++v) {
          channel[a][v] = column(a) < channels ? params.channels.template at<T>(column(a) + v) : Channel{};
        }
      }
    }

    CUTLASS_DEVICE void begin_step(int step) {
      if (!params.residual) return;
      CUTLASS_PRAGMA_UNROLL
      for (int a = 0; a < kAccesses; ++a) {
        if (inside(a, step)) residual[a] = *reinterpret_cast<const Vector*>(params.residual + offset(a, step));
      }
    }

    template <typename Sum>
    CUTLASS_DEVICE auto visit(int step, int, int across, int access, const cutlass::Array<Sum, kVector>& sum) {
      Vector result;
      CUTLASS_PRAGMA_UNROLL
      for (int v = 0; v < kVector; ++v) {
        const float add = params.residual ? load(residual[access].value[v]) : 0.0f;
        result.value[v] = store<T>(finished(sum[v], channel[across][v], add, params.with_relu));
      }
      if (inside(access, step)) *reinterpret_cast<Vector*>(params.out + offset(access, step)) = result;
      return sum;
    }
  };

  template <typename Problem>
  CUTLASS_DEVICE auto get_callbacks(GemmCoord tile, int thread, const Problem& problem) {
    // (vector, across, row, steps...), the steps as one mode
    const auto at = cute::group_modes<3, 6>(ThreadMap::partition(cute::make_identity_tensor(problem), thread, tile));
    return Callbacks<cute::remove_cvref_t<decltype(at)>>(params, at, cute::get<0>(problem), cute::get<1>(problem));
  }

  const Params& params;
};

// A tile of 128 pixels and `Columns` channels, by four warps.
template <typename T, int Columns, int Depth, int Stages>
struct Kernel {
  using E = typename Element<T>::type;
  using Layout = cutlass::layout::TensorNHWC;
  using Tile = GemmShape<kConvTileRows, Columns, Depth>;
  using Warp = GemmShape<64, Columns / 2, Depth>;
  using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<4>;
  using Default = typename cutlass::conv::kernel::DefaultConv2dFprop<
      E, Layout, E, Layout, E, Layout, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Tile, Warp,
      GemmShape<16, 8, 16>, cutlass::epilogue::thread::LinearCombination<E, kConvChannels, float, float>, Swizzle, Stages,
      cutlass::arch::OpMultiplyAdd, cutlass::conv::IteratorAlgorithm::kOptimized>::Kernel;
  using Mma = typename Default::Mma;
  using ThreadMap = threadblock::OutputTileThreadLayout<Tile, Warp, E, kConvChannels>;
  using End = Finish<T, ThreadMap>;
  using Epilogue = threadblock::EpilogueWithVisitorCallbacks<typename Default::Epilogue, End, 1>;
  using Problem = cutlass::conv::Conv2dProblemSize;
  static constexpr int kThreads = 32 * Mma::WarpCount::kCount;

  struct Params {
    Problem problem;
    GemmCoord size, tiles;
    int swizzle, steps, channel_steps;
    typename Mma::IteratorA::Params x_params;
    typename Mma::IteratorB::Params weight_params;
    const E *x, *weight;
    typename End::Params end;
  };

  union Shared {
    typename Mma::SharedStorage loop;
    typename Epilogue::SharedStorage end;
  };

  static Params params(const Problem& problem, const E* x, const E* weight, const typename End::Params& end) {
    using namespace cutlass::conv;
    const auto layout = [](int h, int w, int c) { return Layout::packed({1, h, w, c}); };
    const auto forward = Operator::kFprop;
    const GemmCoord size = implicit_gemm_problem_size(forward, problem);
    const GemmCoord tiles = Swizzle::get_tiled_shape(size, {Tile::kM, Tile::kN, Tile::kK}, 1);
    return {problem, size, tiles, Swizzle::get_log_tile(tiles),
            implicit_gemm_k_iterations(forward, Tile::kK, problem, IteratorAlgorithm::kOptimized, GroupMode::kNone, Tile::kN),
            implicit_gemm_k_iterations_per_channel(forward, problem, IteratorAlgorithm::kOptimized),
            Mma::IteratorA::getParams(problem, layout(problem.H, problem.W, problem.C)),
            typename Mma::IteratorB::Params(problem, layout(problem.R, problem.S, problem.C)), x, weight, end};
  }
};

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads)
    conv_kernel(const __grid_constant__ typename Kernel::Params params) {
  using Mma = typename Kernel::Mma;
#ifdef FUSED_RESNET_EMULATED
  char* memory = emulated::shared;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
#else
  extern __shared__ __align__(16) char memory[];
  const int thread = threadIdx.x, lane = thread % 32, warp = cutlass::canonical_warp_idx_sync();
#endif
  auto& shared = *reinterpret_cast<typename Kernel::Shared*>(memory);
  const GemmCoord tile = typename Kernel::Swizzle().get_tile_offset(params.swizzle);
  if (tile.m() >= params.tiles.m() || tile.n() >= params.tiles.n()) return;
  typename Mma::IteratorA x(params.x_params, params.problem, params.x, thread, {tile.m() * Mma::Shape::kM, 0});
  typename Mma::IteratorB weight(params.weight_params, params.problem, params.weight, thread, {0, tile.n() * Mma::Shape::kN});
  typename Mma::FragmentC sums;
  sums.clear();
  Mma mma(shared.loop, thread, warp, lane);
  mma(params.steps, sums, x, weight, sums, params.channel_steps);
  typename Kernel::Epilogue epilogue(params.end, shared.end, thread, warp, lane);
  epilogue(sums, tile, cute::make_shape(params.size.m(), params.size.n(), 1), thread);
}

// ---- host ---------------------------------------------------------------------------------------------------------------

template <typename Kernel, typename T>
const char* run(const Conv& conv, const ConvOperands& operands, cudaStream_t stream) {
  using E = typename Kernel::E;
  const auto problem = problem_sm80(conv);
  const cutlass::Status status = Kernel::Mma::IteratorA::can_implement(problem);
  if (status != cutlass::Status::kSuccess) return cutlass::cutlassGetStatusString(status);
  const auto params = Kernel::params(problem, static_cast<const E*>(operands.x), static_cast<const E*>(operands.weight),
                                     {operands.channels, static_cast<const T*>(operands.residual),
                                      static_cast<T*>(operands.out), operands.with_relu});
  const dim3 grid = Kernel::Swizzle::get_grid_shape(params.tiles);
  constexpr int kShared = sizeof(typename Kernel::Shared);
#ifdef FUSED_RESNET_EMULATED
  static_assert(kShared <= sizeof(emulated::shared) && Kernel::kThreads <= emulated::kMostThreads);
  emulated::launch(conv_kernel<Kernel>, grid, Kernel::kThreads, params);
  return nullptr;
#else
  cudaError_t error = cudaFuncSetAttribute(conv_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error == cudaSuccess) {
    conv_kernel<Kernel><<<grid, Kernel::kThreads, kShared, stream>>>(params);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

}  // namespace

template <typename T>
const char* run_conv_sm80(const Conv& conv, const ConvOperands& operands, ConvTile tile, cudaStream_t stream) {
  if (tile == ConvTile::wide) return run<Kernel<T, 128, 32, 4>, T>(conv, operands, stream);
  return run<Kernel<T, 64, 64, 3>, T>(conv, operands, stream);
}

template const char* run_conv_sm80<bf16>(const Conv&, const ConvOperands&, ConvTile, cudaStream_t);
template const char* run_conv_sm80<fp16>(const Conv&, const ConvOperands&, ConvTile, cudaStream_t);

}  // namespace fused_resnet
