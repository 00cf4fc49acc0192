// Of CUTLASS's convolutions, for Python: the implicit GEMM for sm_80; for sm_90a what each thread of a block does with its
// part of a tile in the end, and the tensor maps by which operands are read and written.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cuda.h>
#include <cuda_runtime.h>

// What CUTLASS's headers name, and nothing here calls.
extern const uint3 threadIdx, blockIdx, blockDim, gridDim;
void __syncthreads();
int __syncthreads_and(int);

#include <cutlass/arch/wmma.h>
#include <cutlass/conv/convolution.h>
#define __CUDACC_VER_MAJOR__ 13  // of the features of a toolkit those that are a host's
#define __CUDACC_VER_MINOR__ 0
#include "cuda/conv_problem.h"
#include "cuda/conv_sm90.h"

namespace py = pybind11;
using namespace fused_resnet;

Conv conv_of(const std::vector<int64_t>& v) {
  return with_output({v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12]});
}

// (rows, columns, depth) of the implicit GEMM, and every geometric member.
auto sm80(const std::vector<int64_t>& sizes) {
  const auto problem = problem_sm80(conv_of(sizes));
  const auto size = cutlass::conv::implicit_gemm_problem_size(cutlass::conv::Operator::kFprop, problem);
  const std::vector<int> members{problem.N, problem.C, problem.H, problem.W, problem.K, problem.R, problem.S, problem.stride_h,
                                 problem.stride_w, problem.pad_h, problem.pad_w, problem.dilation_h, problem.dilation_w};
  return std::make_tuple(std::vector<int>{size.m(), size.n(), size.k()}, members);
}

// act(bn(sums) + residual) of a tile of (128, Columns) in a matrix of `channels` columns; column `first` is the tile's first.
template <typename T, int Columns>
std::vector<float> end(const std::vector<float>& sums, const std::vector<float>& mean, const std::vector<float>& var,
                       const std::vector<float>& residual, int first, int channels, bool with_relu) {
  using Kernel = KernelSm90<T, Columns, cutlass::conv::collective::StageCount<3>>;
  using Epilogue = typename Kernel::Epilogue;
  using E = typename Kernel::E;
  using End = Finish<T, Columns>;
  constexpr int kFragment = Epilogue::DispatchPolicy::FragmentSize;
  const typename End::Params params{{{}, {mean.data(), true}, {var.data(), true}, {}, {}, 0.0f}, !residual.empty(), with_relu};
  typename End::SharedStorage shared;
  typename Kernel::Mainloop::TiledMma mma;
  const typename Epilogue::EpilogueTile epilogue_tile{};
  const auto problem = make_shape(int(kConvTileRows), channels, 1, 1);
  const auto tile = make_coord(0, first / Columns, 0, 0);
  std::vector<float> out(sums.size(), -1e30f);
  // As CUTLASS's collective epilogue calls the node, `step` 0 and 1 being before and after its threads have waited.
  const auto thread_does = [&](int thread, int step) {
    const auto atom = make_tiled_copy_C_atom(typename Epilogue::CopyAtomC{}, mma);
    const auto copy = make_tiled_copy_S(Copy_Atom<typename Epilogue::CopyOpR2S, E>{}, atom);
    const auto mine = copy.get_slice(thread);
    const auto places = local_tile(make_identity_tensor(make_shape(int(kConvTileRows), channels)),
                                   take<0, 2>(typename Kernel::Tile{}), make_coord(0, first / Columns));
    const auto at = mine.partition_S(flat_divide(places, epilogue_tile));  // (R2S, R2S_M, R2S_N, EPI_M, EPI_N) -> (m, n)
    const auto tile_at = make_coord_tensor(places.layout()), mine_at = make_coord_tensor(at.layout());
    const auto limits = make_coord(int(kConvTileRows), channels);
    Tensor beside = make_tensor<E>(take<0, 3>(shape(at)));
    const fusion::detail::ConsumerStoreArgs args(problem, typename Kernel::Tile{}, tile, mma, epilogue_tile, copy, tile_at,
                                                 limits - places(_0{}), mine_at, limits - at(_0{}), beside, thread);
    End node(params, shared);
    auto callbacks = node.template get_consumer_store_callbacks<true>(args);
    if (step == 0) return callbacks.begin();
    for (int n = 0; n < size<4>(at); ++n) {
      for (int m = 0; m < size<3>(at); ++m) {
        const auto here = at(_, _, _, m, n);
        const auto index = [&](int i) { return get<0>(here(i)) * Columns + get<1>(here(i)) - first; };
        callbacks.begin_loop(m, n);
        for (int i = 0; i < size(beside) && !residual.empty(); ++i) beside(i) = E(residual.at(index(i)));
        for (int v = 0; v < size(here) / kFragment; ++v) {
          cutlass::Array<float, kFragment> sum;
          for (int i = 0; i < kFragment; ++i) sum[i] = sums.at(index(v * kFragment + i));
          const auto y = callbacks.visit(sum, v, m, n);
          for (int i = 0; i < kFragment; ++i) out.at(index(v * kFragment + i)) = y[i];
        }
      }
    }
  };
  for (int step = 0; step < 2; ++step) {
    for (int thread = 0; thread < size(mma); ++thread) thread_does(thread, step);
  }
  return out;
}

// ---- tensor maps --------------------------------------------------------------------------------------------------------

// What the driver would be asked for; `lower` and `upper` are of im2col mode alone.
struct Map {
  uintptr_t address;
  std::vector<uint64_t> sizes, strides;
  std::vector<int> lower, upper;
  std::vector<uint32_t> box, steps;
};
std::vector<Map> maps;

CUresult im2col(CUtensorMap*, CUtensorMapDataType, cuuint32_t rank, void* address, const cuuint64_t* sizes,
                const cuuint64_t* strides, const int* lower, const int* upper, cuuint32_t channels, cuuint32_t pixels,
                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill) {
  maps.push_back({uintptr_t(address), {sizes, sizes + rank}, {strides, strides + rank - 1}, {lower, lower + rank - 2},
                  {upper, upper + rank - 2}, {channels, pixels}, {steps, steps + rank}});
  return CUDA_SUCCESS;
}

CUresult tiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t rank, void* address, const cuuint64_t* sizes,
               const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
               CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  maps.push_back({uintptr_t(address), {sizes, sizes + rank}, {strides, strides + rank - 1}, {}, {}, {box, box + rank},
                  {steps, steps + rank}});
  return CUDA_SUCCESS;
}

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                       cudaDriverEntryPointQueryResult* result) {
  const bool is_tiled = std::string(name) == "cuTensorMapEncodeTiled";
  *function = is_tiled ? reinterpret_cast<void*>(tiled) : reinterpret_cast<void*>(im2col);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
extern "C" cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }

// (whether CUTLASS takes it, the maps of x, the weight, the residual and the output), for the narrow tile.
auto tensor_maps(const std::vector<int64_t>& v) {
  using Kernel = KernelSm90<bf16, 64, cutlass::conv::collective::StageCount<3>>;
  const Conv conv = conv_of(v);
  const ProblemSm90 problem = problem_sm90(conv);
  const auto at = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
  const ConvOperands operands{at(16), at(32), at(48), at(64), {}, true};
  const auto [mainloop, epilogue] = arguments_sm90<Kernel>(problem, operands);
  const auto shape = cutlass::conv::detail::get_transformed_problem_shape_MNKL(problem);
  const bool served = Kernel::Mainloop::can_implement(problem, mainloop) && Kernel::Epilogue::can_implement(shape, epilogue);
  maps.clear();
  if (served) {
    Kernel::Mainloop::to_underlying_arguments(problem, mainloop, nullptr);
    Kernel::Epilogue::to_underlying_arguments(shape, epilogue, nullptr);
  }
  py::list found;
  for (const Map& map : maps) {
    found.append(py::make_tuple(map.address, map.sizes, map.strides, map.lower, map.upper, map.box, map.steps));
  }
  return py::make_tuple(served, found);
}

PYBIND11_MODULE(cutlass_host, m) {
  m.def("sm80", sm80);
  m.def("tensor_maps", tensor_maps);
  m.def("end_bf16_128", end<bf16, 128>);
  m.def("end_bf16_64", end<bf16, 64>);
  m.def("end_fp16_128", end<fp16, 128>);
  m.def("end_fp16_64", end<fp16, 64>);
}
