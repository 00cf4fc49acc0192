// ldmatrix on a CPU, in place of CUTLASS's header of this name; see emulated_cutlass.h.
#pragma once

#include "cutlass/array.h"
#include "cutlass/layout/matrix.h"

namespace cutlass {
namespace arch {

// Eight lanes after another give the rows' addresses of a matrix of 8 x 8; lane i gets elements 2 i and 2 i + 1 of each.
template <typename Layout, int MatrixCount>
void ldsm(Array<unsigned, MatrixCount>& D, void const* ptr) {
  static_assert(platform::is_same<Layout, layout::RowMajor>::value, "no transposed matrices here");
  emulated::Exchange<void const*> rows(ptr);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < MatrixCount; ++i) {
    D[i] = static_cast<unsigned const*>(rows.of(8 * i + lane / 4))[lane % 4];
  }
}

}  // namespace arch
}  // namespace cutlass
