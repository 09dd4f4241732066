// The CPU kernels behind the operators of pretrain/ops/operators.py, where their schemas are.
//
// Free of Python.h: the library is compiled with torch's own headers and loaded by torch.ops.load_library.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>

#include "conv.h"
#include "scan_backward.h"
#include "scan_forward.h"

namespace videomamba {
namespace {

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
Tensor rows(const Tensor& x, const Tensor& like) {
  TORCH_CHECK(x.sizes() == like.sizes(), "expected shape ", like.sizes(), ", got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == like.scalar_type(), "expected ", like.scalar_type(), ", got ", x.scalar_type());
  return x.stride(2) == 1 ? x : x.contiguous();
}

Tensor vector(const MaybeTensor& x, int64_t channels) {
  if (!x) return Tensor();
  TORCH_CHECK(x->scalar_type() == at::kFloat && x->numel() == channels, "expected ", channels, " float32 values");
  return x->contiguous();
}

const float* pointer(const Tensor& x) {
  return x.defined() && x.numel() ? x.const_data_ptr<float>() : nullptr;
}

// B or C in float32, the states padded with zeros.
Tensor coefficients(const Tensor& x, const Shape& shape) {
  TORCH_CHECK(x.dim() == 3 && x.size(0) == shape.batch && x.size(1) == shape.length && x.size(2) == shape.states,
              "expected B and C as (batch, length, states), got ", x.sizes());
  const Tensor values = x.to(at::kFloat);
  const int64_t missing = shape.padded_states() - shape.states;
  return (missing ? at::constant_pad_nd(values, {0, missing}) : values).contiguous();
}

// A * log2(e) as (block, padded states, WIDTH), so that the recurrence takes powers of two.
Tensor layout_decay(const Tensor& A, const Shape& shape) {
  TORCH_CHECK(A.scalar_type() == at::kFloat, "expected A in float32, got ", A.scalar_type());
  const Tensor from = A.contiguous();
  Tensor out = at::zeros({shape.blocks.count(), shape.padded_states(), WIDTH}, A.options());
  const float* a = from.const_data_ptr<float>();
  float* decay = out.mutable_data_ptr<float>();
  for (int64_t d = 0; d < shape.channels; ++d)
    for (int64_t n = 0; n < shape.states; ++n)
      decay[(d / WIDTH * shape.padded_states() + n) * WIDTH + d % WIDTH] = a[d * shape.states + n] * LOG2_E;
  return out;
}

// The tensors of one call in the form that the kernels read, kept alive while they run.
struct ScanTensors {
  Shape shape;
  Tensor u, delta, decay, B, C, skip, z, bias;
  bool softplus, reverse;

  ScanTensors(const Tensor& u_, const Tensor& delta_, const Tensor& A, const Tensor& B_, const Tensor& C_,
              const MaybeTensor& D, const MaybeTensor& z_, const MaybeTensor& delta_bias, bool softplus, bool reverse)
      : shape{u_.size(0), u_.size(1), u_.size(2), A.size(1)},
        u(rows(u_, u_)),
        delta(rows(delta_, u_)),
        decay(layout_decay(A, shape)),
        B(coefficients(B_, shape)),
        C(coefficients(C_, shape)),
        skip(vector(D, shape.channels)),
        z(z_ ? rows(*z_, u_) : Tensor()),
        bias(vector(delta_bias, shape.channels)),
        softplus(softplus),
        reverse(reverse) {}

  template <typename T>
  ScanInput<T> input() const {
    return {shape,      Rows<const T>(u), Rows<const T>(delta), z.defined() ? Rows<const T>(z) : Rows<const T>(),
            pointer(decay), pointer(B),   pointer(C),           pointer(skip),
            pointer(bias),  softplus,     reverse};
  }
};

std::tuple<Tensor, Tensor, Tensor> scan_forward_cpu(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const MaybeTensor& D,
    const MaybeTensor& z, const MaybeTensor& delta_bias, bool softplus, bool reverse, bool save_states,
    bool want_last_state) {
  const ScanTensors in(u, delta, A, B, C, D, z, delta_bias, softplus, reverse);
  const Shape& s = in.shape;
  const auto floats = A.options();
  Tensor y = at::empty(u.sizes(), u.options());
  Tensor last_state = want_last_state ? at::empty({s.batch, s.channels, s.states}, floats) : at::empty({0}, floats);
  Tensor states = save_states ? at::empty({s.batch, std::max<int64_t>(s.chunks() - 1, 0), s.states, s.channels}, floats)
                              : at::empty({0}, floats);
  dispatch(u, [&](auto element) {
    using T = decltype(element);
    scan_forward<T>(in.input<T>(), {Rows<T>(y), want_last_state ? last_state.mutable_data_ptr<float>() : nullptr,
                                    states.numel() ? states.mutable_data_ptr<float>() : nullptr});
  });
  return {y, last_state, states};
}

// Into how many groups the channel blocks of a sample are cut, so that all threads have work to the end. Each group
// sums its own gradients of B and C, which costs about as much as one more block.
int64_t choose_groups(const Shape& shape) {
  const int64_t threads = at::get_num_threads(), blocks = shape.blocks.count();
  int64_t best = 1, least = std::numeric_limits<int64_t>::max();
  for (int64_t groups = 1; groups <= std::min(blocks, threads); ++groups) {
    const int64_t tasks = (shape.batch * groups + threads - 1) / threads;
    const int64_t cost = tasks * ((blocks + groups - 1) / groups + 1);
    if (cost < least) least = cost, best = groups;
  }
  return best;
}

Tensor unblock(const Tensor& x, const Shape& shape) {  // (block, state, WIDTH) -> (channels, states)
  return x.permute({0, 2, 1}).reshape({-1, x.size(1)}).narrow(0, 0, shape.channels).narrow(1, 0, shape.states)
      .contiguous();
}

using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

EightTensors scan_backward_cpu(const Tensor& grad_y, const MaybeTensor& grad_last_state, const Tensor& states,
                               const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                               const MaybeTensor& D, const MaybeTensor& z, const MaybeTensor& delta_bias,
                               bool softplus, bool reverse) {
  const ScanTensors in(u, delta, A, B, C, D, z, delta_bias, softplus, reverse);
  const Shape& s = in.shape;
  const auto floats = A.options();
  const int64_t blocks = s.blocks.count(), padded = s.padded_states(), groups = choose_groups(s);
  const Tensor outer = rows(grad_y, u), last = grad_last_state ? grad_last_state->contiguous() : Tensor();
  const Tensor none = at::empty({0}, floats);
  Tensor grad_u = at::empty(u.sizes(), u.options()), grad_delta = at::empty(u.sizes(), u.options());
  Tensor grad_z = z ? at::empty(u.sizes(), u.options()) : none;
  Tensor grad_A = at::empty({s.batch, blocks, padded, WIDTH}, floats);
  Tensor grad_B = at::empty({groups, s.batch, s.length, padded}, floats), grad_C = at::empty_like(grad_B);
  Tensor grad_D = at::empty({s.batch, blocks * WIDTH}, floats), grad_bias = at::empty_like(grad_D);
  dispatch(u, [&](auto element) {
    using T = decltype(element);
    ScanGradient<T> grad{Rows<const T>(outer), pointer(last), pointer(states), groups, Rows<T>(grad_u),
                         Rows<T>(grad_delta), z ? Rows<T>(grad_z) : Rows<T>(), grad_A.mutable_data_ptr<float>(),
                         grad_B.mutable_data_ptr<float>(), grad_C.mutable_data_ptr<float>(),
                         grad_D.mutable_data_ptr<float>(), grad_bias.mutable_data_ptr<float>()};
    scan_backward<T>(in.input<T>(), grad);
  });
  const auto over_groups = [&](const Tensor& x, const Tensor& like) {
    return (groups > 1 ? x.sum(0) : x.select(0, 0)).narrow(2, 0, s.states).contiguous().to(like.scalar_type());
  };
  const auto over_batch = [&](const MaybeTensor& asked, const Tensor& x) {
    return asked ? x.sum(0).narrow(0, 0, s.channels).contiguous() : none;
  };
  return {grad_u, grad_delta, unblock(grad_A.sum(0), s), over_groups(grad_B, B), over_groups(grad_C, C),
          over_batch(D, grad_D), grad_z, over_batch(delta_bias, grad_bias)};
}

struct ConvTensors {
  Tensor x, weight, bias;
  bool reverse, silu;

  ConvTensors(const Tensor& x_, const Tensor& weight_, const MaybeTensor& bias_, bool reverse, bool silu)
      : x(rows(x_, x_)),
        weight(vector(weight_, x_.size(2) * TAPS)),
        bias(vector(bias_, x_.size(2))),
        reverse(reverse),
        silu(silu) {}

  template <typename T>
  ConvInput<T> input() const {
    return {x.size(0), x.size(1), Blocks{x.size(2)}, Rows<const T>(x), pointer(weight), pointer(bias), reverse, silu};
  }
};

Tensor conv_forward_cpu(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, bool reverse, bool silu) {
  const ConvTensors in(x, weight, bias, reverse, silu);
  Tensor y = at::empty(x.sizes(), x.options());
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    conv_forward<T>(in.input<T>(), Rows<T>(y));
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> conv_backward_cpu(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                                     const MaybeTensor& bias, bool reverse, bool silu) {
  const ConvTensors in(x, weight, bias, reverse, silu);
  const int64_t batch = x.size(0), channels = x.size(2), blocks = Blocks{channels}.count();
  const Tensor outer = rows(grad_y, x);
  Tensor grad_x = at::empty(x.sizes(), x.options());
  Tensor grad_weight = at::empty({batch, blocks, TAPS, WIDTH}, weight.options());
  Tensor grad_bias = at::empty({batch, blocks * WIDTH}, weight.options());
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    conv_backward<T>(in.input<T>(), {Rows<const T>(outer), Rows<T>(grad_x), grad_weight.mutable_data_ptr<float>(),
                                     grad_bias.mutable_data_ptr<float>()});
  });
  const Tensor summed = grad_weight.sum(0).permute({0, 2, 1}).reshape({-1, TAPS}).narrow(0, 0, channels).contiguous();
  return {grad_x, summed, bias ? grad_bias.sum(0).narrow(0, 0, channels).contiguous() : at::empty({0}, weight.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(videomamba, CPU, m) {
  m.impl("scan_forward", scan_forward_cpu);
  m.impl("scan_backward", scan_backward_cpu);
  m.impl("conv_forward", conv_forward_cpu);
  m.impl("conv_backward", conv_backward_cpu);
}

}  // namespace videomamba
