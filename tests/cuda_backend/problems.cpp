// What CUTLASS makes of a convolution before it is launched, for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cute/tensor.hpp>  // before what needs it

#include <cutlass/detail/dependent_false.hpp>
#include <cutlass/conv/convolution.h>
#include <cutlass/conv/collective/detail.hpp>

#include <array>
#include <vector>

#include "cuda/conv_problem.h"

namespace py = pybind11;
using namespace fused_resnet;

Conv conv_of(const std::vector<int64_t>& v) {
  Conv conv{v[0], v[1], v[2], v[3], v[4], v[5], v[6], 0, 0, v[7], v[8], v[9], v[10], v[11], v[12]};
  conv.p = conv_extent(conv.h, conv.pad_h, conv.dilation_h, conv.r, conv.stride_h);
  conv.q = conv_extent(conv.w, conv.pad_w, conv.dilation_w, conv.s, conv.stride_w);
  return conv;
}

// (rows, columns, depth) of the implicit GEMM, and every geometric member.
auto sm80(const std::vector<int64_t>& sizes) {
  const auto problem = problem_sm80(conv_of(sizes));
  const auto size = cutlass::conv::implicit_gemm_problem_size(cutlass::conv::Operator::kFprop, problem);
  const std::vector<int> members{problem.N, problem.C, problem.H, problem.W, problem.K, problem.R, problem.S, problem.stride_h,
                                 problem.stride_w, problem.pad_h, problem.pad_w, problem.dilation_h, problem.dilation_w};
  return std::make_tuple(std::array<int, 3>{size.m(), size.n(), size.k()}, members);
}

// Output sizes (n, p, q, k), strides of x and the output, and the corners of the pixels that the first tap reads: (h, w).
auto sm90(const std::vector<int64_t>& sizes) {
  using namespace cutlass::conv::collective::detail;
  const ProblemSm90 problem = problem_sm90(conv_of(sizes));
  const auto flat = [](const auto& values) {
    std::vector<int64_t> result;
    for (size_t i = 0; i < values.size(); ++i) result.push_back(values[i]);
    return result;
  };
  auto lower = flat(compute_lower_corner_whd(problem)), upper = flat(compute_upper_corner_whd(problem));
  std::swap(lower[0], lower[1]), std::swap(upper[0], upper[1]);
  return std::make_tuple(flat(problem.shape_C), flat(problem.stride_A), flat(problem.stride_C), lower, upper);
}

PYBIND11_MODULE(problems, m) {
  m.def("sm80", sm80);
  m.def("sm90", sm90);
}
