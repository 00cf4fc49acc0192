// mma.sync.m16n8k16 on a CPU, in place of CUTLASS's header of this name; see emulated_cutlass.h.
#pragma once

#include "cutlass/array.h"
#include "cutlass/bfloat16.h"
#include "cutlass/gemm/gemm.h"
#include "cutlass/half.h"
#include "cutlass/layout/matrix.h"

namespace cutlass {
namespace arch {

// PTX ISA, "Matrix Fragments for mma.m16n8k16": where lanes keep the elements of a (16 x 16), b (16 x 8) and c (16 x 8).
template <typename Element>
struct MultiplyEmulated {
  using Shape = gemm::GemmShape<16, 8, 16>;
  using ElementA = Element;
  using LayoutA = layout::RowMajor;
  using FragmentA = Array<Element, 8>;
  using ElementB = Element;
  using LayoutB = layout::ColumnMajor;
  using FragmentB = Array<Element, 4>;
  using ElementC = float;
  using LayoutC = layout::RowMajor;
  using FragmentC = Array<float, 4>;
  using Operator = OpMultiplyAdd;
  using ArchTag = arch::Sm80;

  void operator()(FragmentC& d, FragmentA const& a, FragmentB const& b, FragmentC const& c) const {
    struct Both {
      FragmentA a;
      FragmentB b;
    };
    emulated::Exchange<Both> lanes({a, b});
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = c[i];
      for (int k = 0; k < 16; ++k) {
        const int place = k / 2 % 4, half = k / 8;
        sum += float(lanes.of(row % 8 * 4 + place).a[half * 4 + row / 8 * 2 + k % 2]) *
               float(lanes.of(column * 4 + place).b[half * 2 + k % 2]);
      }
      d[i] = sum;
    }
  }
};

template <>
struct Mma<gemm::GemmShape<16, 8, 16>, 32, half_t, layout::RowMajor, half_t, layout::ColumnMajor, float, layout::RowMajor,
           OpMultiplyAdd> : MultiplyEmulated<half_t> {};
template <>
struct Mma<gemm::GemmShape<16, 8, 16>, 32, bfloat16_t, layout::RowMajor, bfloat16_t, layout::ColumnMajor, float,
           layout::RowMajor, OpMultiplyAdd> : MultiplyEmulated<bfloat16_t> {};

}  // namespace arch
}  // namespace cutlass
