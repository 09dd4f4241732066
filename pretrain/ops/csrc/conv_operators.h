// The operators of the causal convolution, in one direction and in both.
#pragma once

#include <ATen/ops/empty.h>

#include <tuple>

#include "conv.h"
#include "tensors.h"

namespace videomamba {

// One direction's weights, kept alive while the kernels run.
struct FilterTensors {
  Tensor weight, bias;

  FilterTensors(const Tensor& weight_, const MaybeTensor& bias_, int64_t channels)
      : weight(vector(weight_, channels * TAPS)), bias(vector(bias_, channels)) {}

  Filter filter() const {
    return {pointer(weight), pointer(bias)};
  }
};

// The sums of one direction's gradients, one for each sample and block.
struct FilterSums {
  int64_t channels;
  Tensor weight, bias;

  FilterSums(const Tensor& x, const at::TensorOptions& floats) : channels(x.size(2)) {
    const int64_t batch = x.size(0), blocks = Blocks{channels}.count();
    weight = at::empty({batch, blocks, TAPS, WIDTH}, floats);
    bias = at::empty({batch, blocks * WIDTH}, floats);
  }
  template <typename T>
  FilterGradient<T> gradient(const Tensor& grad_y) {
    return {Rows<const T>(grad_y), weight.mutable_data_ptr<float>(), bias.mutable_data_ptr<float>()};
  }
  Tensor of_weight() const {
    return weight.sum(0).permute({0, 2, 1}).reshape({-1, TAPS}).narrow(0, 0, channels).contiguous();
  }
  Tensor of_bias(const MaybeTensor& like) const {
    return like ? bias.sum(0).narrow(0, 0, channels).contiguous() : at::empty({0}, bias.options());
  }
};

template <typename T>
ConvInput<T> conv_input(const Tensor& x, const Filter& ahead, const Filter& back, bool silu) {
  return {x.size(0), x.size(1), Blocks{x.size(2)}, Rows<const T>(x), ahead, back, silu};
}

inline Tensor conv_forward_cpu(const Tensor& x_, const Tensor& weight, const MaybeTensor& bias, bool reverse,
                               bool silu) {
  const Tensor x = rows(x_, x_);
  const FilterTensors tensors(weight, bias, x.size(2));
  Tensor y = at::empty(x.sizes(), x.options());
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    const ConvInput<T> in = conv_input<T>(x, tensors.filter(), tensors.filter(), silu);
    const ConvOutput<T> out{Rows<T>(y), Rows<T>(y)};
    for_each_block(in, [&](int64_t b, int64_t block) {
      if (reverse) {
        conv_forward_block<false, true>(in, out, b, block);
      } else {
        conv_forward_block<true, false>(in, out, b, block);
      }
    });
  });
  return y;
}

inline std::tuple<Tensor, Tensor, Tensor> conv_backward_cpu(const Tensor& grad_y, const Tensor& x_,
                                                            const Tensor& weight, const MaybeTensor& bias,
                                                            bool reverse, bool silu) {
  const Tensor x = rows(x_, x_), outer = rows(grad_y, x);
  const FilterTensors tensors(weight, bias, x.size(2));
  FilterSums sums(x, tensors.weight.options());
  Tensor grad_x = at::empty(x.sizes(), x.options());
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    const ConvInput<T> in = conv_input<T>(x, tensors.filter(), tensors.filter(), silu);
    const FilterGradient<T> own = sums.gradient<T>(outer);
    const ConvGradient<T> grad{own, own, Rows<T>(grad_x)};
    for_each_block(in, [&](int64_t b, int64_t block) {
      if (reverse) {
        conv_backward_block<false, true>(in, grad, b, block);
      } else {
        conv_backward_block<true, false>(in, grad, b, block);
      }
    });
  });
  return {grad_x, sums.of_weight(), sums.of_bias(bias)};
}

inline std::tuple<Tensor, Tensor> bidirectional_conv_forward_cpu(const Tensor& x_, const Tensor& weight,
                                                                 const MaybeTensor& bias, const Tensor& weight_b,
                                                                 const MaybeTensor& bias_b, bool silu) {
  const Tensor x = rows(x_, x_);
  const FilterTensors ahead(weight, bias, x.size(2)), back(weight_b, bias_b, x.size(2));
  Tensor y = at::empty(x.sizes(), x.options()), y_b = at::empty(x.sizes(), x.options());
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    const ConvInput<T> in = conv_input<T>(x, ahead.filter(), back.filter(), silu);
    const ConvOutput<T> out{Rows<T>(y), Rows<T>(y_b)};
    for_each_block(in, [&](int64_t b, int64_t block) { conv_forward_block<true, true>(in, out, b, block); });
  });
  return {y, y_b};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bidirectional_conv_backward_cpu(
    const Tensor& grad_y, const Tensor& grad_y_b, const Tensor& x_, const Tensor& weight, const MaybeTensor& bias,
    const Tensor& weight_b, const MaybeTensor& bias_b, bool silu) {
  const Tensor x = rows(x_, x_), outer = rows(grad_y, x), outer_b = rows(grad_y_b, x);
  const FilterTensors ahead(weight, bias, x.size(2)), back(weight_b, bias_b, x.size(2));
  FilterSums sums(x, ahead.weight.options()), sums_b(x, back.weight.options());
  Tensor grad_x = at::empty(x.sizes(), x.options());
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    const ConvInput<T> in = conv_input<T>(x, ahead.filter(), back.filter(), silu);
    const ConvGradient<T> grad{sums.gradient<T>(outer), sums_b.gradient<T>(outer_b), Rows<T>(grad_x)};
    for_each_block(in, [&](int64_t b, int64_t block) { conv_backward_block<true, true>(in, grad, b, block); });
  });
  return {grad_x, sums.of_weight(), sums.of_bias(bias), sums_b.of_weight(), sums_b.of_bias(bias_b)};
}

}  // namespace videomamba
