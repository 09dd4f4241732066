// The operators of the scan, in one direction and in both.
#pragma once

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "scan_backward.h"
#include "scan_forward.h"
#include "tensors.h"

namespace videomamba {

// B or C in float32, the states padded with zeros.
inline Tensor coefficients(const Tensor& x, const Shape& shape) {
  TORCH_CHECK(x.dim() == 3 && x.size(0) == shape.batch && x.size(1) == shape.length && x.size(2) == shape.states,
              "expected B and C as (batch, length, states), got ", x.sizes());
  const Tensor values = x.to(at::kFloat);
  const int64_t missing = shape.padded_states() - shape.states;
  return (missing ? at::constant_pad_nd(values, {0, missing}) : values).contiguous();
}

// A * log2(e) as (block, padded states, WIDTH), so that the recurrence takes powers of two; infinities become values
// that decay as fast, since exp2_finite takes finite ones.
inline Tensor layout_decay(const Tensor& A, const Shape& shape) {
  TORCH_CHECK(A.scalar_type() == at::kFloat, "expected A in float32, got ", A.scalar_type());
  constexpr float LARGEST = 1e20f;
  const Tensor from = A.contiguous();
  Tensor out = at::zeros({shape.blocks.count(), shape.padded_states(), WIDTH}, A.options());
  const float* a = from.const_data_ptr<float>();
  float* decay = out.mutable_data_ptr<float>();
  for (int64_t d = 0; d < shape.channels; ++d)
    for (int64_t n = 0; n < shape.states; ++n) {
      const float value = a[d * shape.states + n] * LOG2_E;
      decay[(d / WIDTH * shape.padded_states() + n) * WIDTH + d % WIDTH] =
          std::isnan(value) ? value : std::clamp(value, -LARGEST, LARGEST);
    }
  return out;
}

// One direction's tensors, kept alive while the kernels run.
struct Direction {
  Shape shape;
  Tensor u, delta, decay, B, C, skip, bias;
  bool softplus, reverse;

  Direction(const Tensor& u_, const Tensor& delta_, const Tensor& A, const Tensor& B_, const Tensor& C_,
            const MaybeTensor& D, const MaybeTensor& delta_bias, bool softplus, bool reverse)
      : shape{u_.size(0), u_.size(1), u_.size(2), A.size(1)},
        u(rows(u_, u_)),
        delta(rows(delta_, u_)),
        decay(layout_decay(A, shape)),
        B(coefficients(B_, shape)),
        C(coefficients(C_, shape)),
        skip(vector(D, shape.channels)),
        bias(vector(delta_bias, shape.channels)),
        softplus(softplus),
        reverse(reverse) {}

  template <typename T>
  ScanInput<T> input() const {
    return {shape,         Rows<const T>(u), Rows<const T>(delta), pointer(decay), pointer(B), pointer(C),
            pointer(skip), pointer(bias),    softplus,             reverse};
  }
};

// What the forward pass of one direction leaves beside y; empty where it is not wanted.
struct Kept {
  Tensor last_state, states;

  Kept(const Shape& s, const at::TensorOptions& floats, bool save_states, bool want_last_state) {
    last_state = want_last_state ? at::empty({s.batch, s.channels, s.states}, floats) : at::empty({0}, floats);
    states = save_states ? at::empty({s.batch, s.chunks() - 1, s.states, s.channels}, floats) : at::empty({0}, floats);
  }

  float* writable(Tensor Kept::*which) {
    return (this->*which).numel() ? (this->*which).mutable_data_ptr<float>() : nullptr;
  }
};

// The gradients of one direction as the kernels sum them up, and as the caller wants them.
struct DirectionGradient {
  const Shape shape;
  Tensor u, delta, A, B, C, skip, bias;

  DirectionGradient(const Direction& in, int64_t runs)
      : shape(in.shape), u(at::empty(in.u.sizes(), in.u.options())), delta(at::empty(in.u.sizes(), in.u.options())) {
    const auto floats = in.decay.options();
    const int64_t blocks = shape.blocks.count(), padded = shape.padded_states();
    A = at::empty({shape.batch, blocks, padded, WIDTH}, floats);
    B = at::empty({runs, shape.batch, shape.length, padded}, floats);
    C = at::empty({runs, shape.batch, shape.length, padded}, floats);
    skip = at::empty({shape.batch, blocks * WIDTH}, floats);
    bias = at::empty({shape.batch, blocks * WIDTH}, floats);
  }

  template <typename T>
  ScanBackward<T> pass(const Direction& in, const Tensor& grad_last_state, const Tensor& states) {
    return {in.input<T>(),
            pointer(grad_last_state),
            pointer(states),
            Rows<T>(u),
            Rows<T>(delta),
            A.mutable_data_ptr<float>(),
            B.mutable_data_ptr<float>(),
            C.mutable_data_ptr<float>(),
            skip.mutable_data_ptr<float>(),
            bias.mutable_data_ptr<float>()};
  }
  Tensor of_A() const {  // (batch, block, state, WIDTH) -> (channels, states)
    const Tensor by_channel = A.sum(0).permute({0, 2, 1}).reshape({-1, A.size(2)});
    return by_channel.narrow(0, 0, shape.channels).narrow(1, 0, shape.states).contiguous();
  }
  Tensor of_coefficients(const Tensor& summed, const Tensor& like) const {
    const Tensor total = summed.size(0) > 1 ? summed.sum(0) : summed.select(0, 0);
    return total.narrow(2, 0, shape.states).contiguous().to(like.scalar_type());
  }
  Tensor of_vector(const Tensor& summed, const MaybeTensor& like) const {
    return like ? summed.sum(0).narrow(0, 0, shape.channels).contiguous() : at::empty({0}, summed.options());
  }
};

inline std::tuple<Tensor, Tensor, Tensor> scan_forward_cpu(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const MaybeTensor& D,
    const MaybeTensor& z, const MaybeTensor& delta_bias, bool softplus, bool reverse, bool save_states,
    bool want_last_state) {
  const Direction in(u, delta, A, B, C, D, delta_bias, softplus, reverse);
  const Tensor gate = z ? rows(*z, u) : Tensor();
  Tensor y = at::empty(u.sizes(), u.options());
  Kept kept(in.shape, A.options(), save_states, want_last_state);
  dispatch(u, [&](auto element) {
    using T = decltype(element);
    scan_forward<T>({{in.input<T>(), kept.writable(&Kept::last_state), kept.writable(&Kept::states)}},
                    {Rows<T>(y), z ? Rows<const T>(gate) : Rows<const T>()});
  });
  return {y, kept.last_state, kept.states};
}

using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline EightTensors scan_backward_cpu(const Tensor& grad_y, const MaybeTensor& grad_last_state, const Tensor& states,
                                      const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                      const Tensor& C, const MaybeTensor& D, const MaybeTensor& z,
                                      const MaybeTensor& delta_bias, bool softplus, bool reverse) {
  const Direction in(u, delta, A, B, C, D, delta_bias, softplus, reverse);
  const int64_t runs = choose_runs(in.shape);
  const Tensor outer = rows(grad_y, u), gate = z ? rows(*z, u) : Tensor();
  const Tensor last = grad_last_state ? grad_last_state->contiguous() : Tensor();
  Tensor grad_z = z ? at::empty(u.sizes(), u.options()) : at::empty({0}, A.options());
  DirectionGradient grad(in, runs);
  dispatch(u, [&](auto element) {
    using T = decltype(element);
    GatedGradient<T> shared{Rows<const T>(outer), {}, {}};
    if (z) shared.z = Rows<const T>(gate), shared.grad_z = Rows<T>(grad_z);
    scan_backward<T>({grad.pass<T>(in, last, states)}, shared, runs);
  });
  return {grad.u, grad.delta, grad.of_A(), grad.of_coefficients(grad.B, B), grad.of_coefficients(grad.C, C),
          grad.of_vector(grad.skip, D), grad_z, grad.of_vector(grad.bias, delta_bias)};
}

inline std::tuple<Tensor, Tensor, Tensor> bidirectional_scan_forward_cpu(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const MaybeTensor& D,
    const MaybeTensor& delta_bias, const Tensor& u_b, const Tensor& delta_b, const Tensor& A_b, const Tensor& B_b,
    const Tensor& C_b, const MaybeTensor& D_b, const MaybeTensor& delta_bias_b, const MaybeTensor& z, bool softplus,
    bool save_states) {
  const Direction ahead(u, delta, A, B, C, D, delta_bias, softplus, false);
  const Direction back(rows(u_b, u), delta_b, A_b, B_b, C_b, D_b, delta_bias_b, softplus, true);
  const Tensor gate = z ? rows(*z, u) : Tensor();
  Tensor y = at::empty(u.sizes(), u.options());
  Kept kept(ahead.shape, A.options(), save_states, false), kept_b(back.shape, A.options(), save_states, false);
  dispatch(u, [&](auto element) {
    using T = decltype(element);
    scan_forward<T>({{ahead.input<T>(), nullptr, kept.writable(&Kept::states)},
                     {back.input<T>(), nullptr, kept_b.writable(&Kept::states)}},
                    {Rows<T>(y), z ? Rows<const T>(gate) : Rows<const T>()});
  });
  return {y, kept.states, kept_b.states};
}

inline std::vector<Tensor> bidirectional_scan_backward_cpu(
    const Tensor& grad_y, const Tensor& states, const Tensor& states_b, const Tensor& u, const Tensor& delta,
    const Tensor& A, const Tensor& B, const Tensor& C, const MaybeTensor& D, const MaybeTensor& delta_bias,
    const Tensor& u_b, const Tensor& delta_b, const Tensor& A_b, const Tensor& B_b, const Tensor& C_b,
    const MaybeTensor& D_b, const MaybeTensor& delta_bias_b, const MaybeTensor& z, bool softplus) {
  const Direction ahead(u, delta, A, B, C, D, delta_bias, softplus, false);
  const Direction back(rows(u_b, u), delta_b, A_b, B_b, C_b, D_b, delta_bias_b, softplus, true);
  const int64_t runs = choose_runs(ahead.shape);
  const Tensor outer = rows(grad_y, u), gate = z ? rows(*z, u) : Tensor();
  Tensor grad_z = z ? at::empty(u.sizes(), u.options()) : at::empty({0}, A.options());
  DirectionGradient grad(ahead, runs), grad_b(back, runs);
  dispatch(u, [&](auto element) {
    using T = decltype(element);
    GatedGradient<T> shared{Rows<const T>(outer), {}, {}};
    if (z) shared.z = Rows<const T>(gate), shared.grad_z = Rows<T>(grad_z);
    scan_backward<T>({grad.pass<T>(ahead, Tensor(), states), grad_b.pass<T>(back, Tensor(), states_b)}, shared, runs);
  });
  return {grad.u,
          grad.delta,
          grad.of_A(),
          grad.of_coefficients(grad.B, B),
          grad.of_coefficients(grad.C, C),
          grad.of_vector(grad.skip, D),
          grad.of_vector(grad.bias, delta_bias),
          grad_b.u,
          grad_b.delta,
          grad_b.of_A(),
          grad_b.of_coefficients(grad_b.B, B_b),
          grad_b.of_coefficients(grad_b.C, C_b),
          grad_b.of_vector(grad_b.skip, D_b),
          grad_b.of_vector(grad_b.bias, delta_bias_b),
          grad_z};
}

}  // namespace videomamba
