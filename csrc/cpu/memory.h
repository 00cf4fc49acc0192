// Memory of large tensors that a network keeps from call to call: new pages cost as much time as what fills them.
#pragma once

#include "../checks.h"

namespace fused_resnet {

// As `new_strided`, of memory from the pool that is active in this thread, if there is one. It goes back there when the last
// tensor that uses it is gone.
Tensor new_large(const Tensor& like, int64_t dim, const int64_t* size, const int64_t* stride, int32_t dtype);

// Sizes, strides and dtype of x.
inline Tensor new_large_like(const Tensor& x) {
  return new_large(x, x.dim(), x.sizes().data(), x.strides().data(), dtype_code(x));
}

}  // namespace fused_resnet
