// What the kernels demand of their tensors, and how they make new ones.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>

#include "math.h"

namespace fused_resnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline ScalarType acc_dtype(ScalarType t) { return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// x of N, C, *spatial; S is the product of the spatial sizes.
struct Shape {
  int64_t n, c, s;
  bool rows;  // channels_last: an (N*S, C) matrix; otherwise planes: (N, C, S)
  int64_t numel() const { return n * c * s; }
  int64_t count() const { return n * s; }  // elements per channel
};

// Strides of dimensions of size 1 mean nothing and are not looked at.
inline Shape shape_of(const Tensor& x) {
  const auto size = x.sizes(), stride = x.strides();
  const int64_t dim = static_cast<int64_t>(size.size());
  STD_TORCH_CHECK(dim >= 2, "x must have 2 or more dimensions (N, C, *spatial), got ", dim);
  Shape shape{size[0], size[1], 1, false};
  bool planes = true, rows = size[1] == 1 || stride[1] == 1;
  for (int64_t d = dim - 1; d >= 2; --d) {
    planes &= size[d] == 1 || stride[d] == shape.s;
    rows &= size[d] == 1 || stride[d] == shape.s * shape.c;
    shape.s *= size[d];
  }
  planes &= shape.c == 1 || stride[1] == shape.s;
  const bool batch = shape.n == 1 || stride[0] == shape.c * shape.s;
  STD_TORCH_CHECK(shape.numel() == 0 || (batch && (planes || rows)), "x must be dense: contiguous or channels_last");
  shape.rows = rows && shape.c > 1;
  return shape;
}

// Channels lie side by side, or it makes no difference.
inline bool is_rows(const Shape& shape) { return shape.rows || shape.c == 1 || shape.s == 1 || shape.numel() == 0; }

inline bool is_dense(const Tensor& x) {
  const auto size = x.sizes(), stride = x.strides();
  int64_t extent = 1, elements = 1;
  for (size_t d = 0; d < size.size(); ++d) {
    elements *= size[d];
    if (size[d] > 1) extent += (size[d] - 1) * stride[d];
  }
  return elements == 0 || extent == elements;
}

inline void check_like(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  const auto size = x.sizes(), stride = x.strides(), t_size = t.sizes(), t_stride = t.strides();
  STD_TORCH_CHECK(t_size.size() == size.size(), name, " must have the sizes of x");
  for (size_t d = 0; d < size.size(); ++d) {
    STD_TORCH_CHECK(t_size[d] == size[d], name, " must have the sizes of x");
    STD_TORCH_CHECK(size[d] <= 1 || t_stride[d] == stride[d] || x.numel() == 0, name, " must have the strides of x");
  }
}

inline void check_vector(const Tensor& t, int64_t c, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == c && (c <= 1 || t.stride(0) == 1), name,
                  " must be a contiguous vector with one element per channel");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be float64 for float64 x, float32 otherwise");
}

template <typename T>
const T* read(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
template <typename T>
T* write(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

// The data of an optional per-channel vector; nullptr stands for None. A is const unless it is written.
template <typename A>
A* vector_data(const OptionalTensor& t, int64_t c, ScalarType dtype, const char* name) {
  if (!t) return nullptr;
  check_vector(*t, c, dtype, name);
  if constexpr (std::is_const_v<A>) return read<A>(*t);
  else return write<A>(*t);
}

inline int32_t dtype_code(const Tensor& x) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

inline Tensor new_strided(const Tensor& like, int64_t dim, const int64_t* size, const int64_t* stride, int32_t dtype) {
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, size, stride, dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

// Sizes, strides and dtype of x.
inline Tensor new_like(const Tensor& x) {
  return new_strided(x, x.dim(), x.sizes().data(), x.strides().data(), dtype_code(x));
}

// One value per channel, in the accumulate type.
inline Tensor new_vector(const Tensor& x, int64_t c) {
  const int64_t stride = 1;
  const int32_t wide = aoti_torch_dtype_float64();
  return new_strided(x, 1, &c, &stride, dtype_code(x) == wide ? wide : aoti_torch_dtype_float32());
}

inline Tensor new_zero_vector(const Tensor& x, int64_t c) {
  Tensor t = new_vector(x, c);
  if (c) std::memset(t.mutable_data_ptr(), 0, c * t.element_size());
  return t;
}

// Size 0, dtype of x: "no such gradient".
inline Tensor no_tensor(const Tensor& x) {
  const int64_t size = 0, stride = 1;
  return new_strided(x, 1, &size, &stride, dtype_code(x));
}

// f(T{}) with the storage type of dtype.
template <typename F>
void dispatch_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Double: return f(double{});
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(bf16{});
    case ScalarType::Half: return f(fp16{});
    default: STD_TORCH_CHECK(false, "dtype must be float64, float32, bfloat16 or float16");
  }
}

// f(std::true_type{} or std::false_type{})
template <typename F>
void dispatch_bool(bool value, const F& f) {
  value ? f(std::true_type{}) : f(std::false_type{});
}

}  // namespace fused_resnet
