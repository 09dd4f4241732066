// Tensors of a call in the form that the kernels read.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "rows.h"

namespace videomamba {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Calls f with a value of the element type that x holds.
template <typename F>
void dispatch(const Tensor& x, const F& f) {
  if (x.scalar_type() == at::kFloat) {
    f(float{});
  } else {
    TORCH_CHECK(x.scalar_type() == at::kBFloat16, "expected float32 or bfloat16, got ", x.scalar_type());
    f(BFloat16{});
  }
}

// x itself where its channels are adjacent, otherwise a copy; of the element type and shape of `like`.
inline Tensor rows(const Tensor& x, const Tensor& like) {
  TORCH_CHECK(x.sizes() == like.sizes(), "expected shape ", like.sizes(), ", got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == like.scalar_type(), "expected ", like.scalar_type(), ", got ", x.scalar_type());
  return x.stride(2) == 1 ? x : x.contiguous();
}

inline Tensor vector(const MaybeTensor& x, int64_t channels) {
  if (!x) return Tensor();
  TORCH_CHECK(x->scalar_type() == at::kFloat && x->numel() == channels, "expected ", channels, " float32 values");
  return x->contiguous();
}

inline const float* pointer(const Tensor& x) {
  return x.defined() && x.numel() ? x.const_data_ptr<float>() : nullptr;
}

}  // namespace videomamba
