// The causal depthwise convolution over four positions, with SiLU: of one direction or of both, forward and backward.
//
// A task is one sample and one block of channels; it walks the positions once, from the first to the last, and keeps
// the last four in registers. The four that end at step s are what `ahead` needs for its output at s, and what `back`,
// which sees the three positions after its own, needs for its output at s - 3. So both read x once.
#pragma once

#include <ATen/Parallel.h>

#include "rows.h"

namespace videomamba {

constexpr int64_t TAPS = 4;
constexpr int64_t REACH = TAPS - 1;
constexpr int64_t ROWS_AHEAD = 8;  // that are asked for before they are needed

using Window = std::array<Vec, TAPS>;

inline void push(Window& window, Vec newest) {
  window = {window[1], window[2], window[3], newest};
}

inline Window no_rows() {
  return {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)};
}

// The weights of one direction, (channels, TAPS), and its bias, or null.
struct Filter {
  const float *weight, *bias;
};

// One block of a filter, in the order in which it meets the window: `ahead` has its last weight at the newest
// position, `back` at the oldest.
struct Taps {
  Window w;
  Vec bias;

  Taps(const Filter& filter, bool back, const Blocks& blocks, int64_t block)
      : w(no_rows()), bias(filter.bias ? load(filter.bias + block * WIDTH, blocks.lanes(block)) : Vec(0.f)) {
    const int64_t lanes = blocks.lanes(block);
    for (int64_t k = 0; k < TAPS; ++k) {
      float column[WIDTH] = {};
      for (int64_t lane = 0; lane < lanes; ++lane) column[lane] = filter.weight[(block * WIDTH + lane) * TAPS + k];
      w[back ? REACH - k : k] = load(column);
    }
  }
  Vec over(const Window& x) const {
    const Vec older = at::vec::fmadd(w[1], x[1], at::vec::fmadd(w[0], x[0], bias));
    return at::vec::fmadd(w[3], x[3], at::vec::fmadd(w[2], x[2], older));
  }
  // The same weights from an output's gradient back to the position that entered it: the oldest of a window with
  // three steps to come for `ahead`, the newest of those three steps behind for `back`.
  Vec onto(const Window& grad) const {
    const Vec older = at::vec::fmadd(w[2], grad[1], w[3] * grad[0]);
    return at::vec::fmadd(w[0], grad[3], at::vec::fmadd(w[1], grad[2], older));
  }
};

template <typename T>
struct ConvInput {
  int64_t batch, length;
  Blocks blocks;
  Rows<const T> x;
  Filter ahead, back;
  bool silu;
};

template <typename T>
struct ConvOutput {
  Rows<T> ahead, back;
};

template <bool AHEAD, bool BACK, typename T>
void conv_forward_block(const ConvInput<T>& in, const ConvOutput<T>& y, int64_t b, int64_t block) {
  const Taps ahead(AHEAD ? in.ahead : in.back, false, in.blocks, block);
  const Taps back(BACK ? in.back : in.ahead, true, in.blocks, block);
  const int64_t lanes = in.blocks.lanes(block), d = block * WIDTH;
  const auto activate = [&](Vec a) { return in.silu ? a * sigmoid(a) : a; };
  Window x = no_rows();
  for (int64_t step = 0; step < in.length + (BACK ? REACH : 0); ++step) {
    in.x.prefetch(b, step + ROWS_AHEAD, d);
    push(x, step < in.length ? load(in.x.at(b, step, d), lanes) : Vec(0.f));
    if constexpr (AHEAD)
      if (step < in.length) store(y.ahead.at(b, step, d), activate(ahead.over(x)), lanes);
    if constexpr (BACK)
      if (step >= REACH) store(y.back.at(b, step - REACH, d), activate(back.over(x)), lanes);
  }
}

// Gradients of one direction's output (given), of its weights and bias (wanted).
template <typename T>
struct FilterGradient {
  Rows<const T> y;
  float* weight;  // (batch, block, TAPS, WIDTH)
  float* bias;  // (batch, block, WIDTH)
};

template <typename T>
struct ConvGradient {
  FilterGradient<T> ahead, back;
  Rows<T> x;
};

// One direction's sums over a walk, and the last gradients before the activation.
struct ConvSums {
  Window recent = no_rows(), weight = no_rows();
  Vec bias = Vec(0.f);

  void add(const Window& x, Vec grad) {
    push(recent, grad);
    unroll<TAPS>([&](auto k) C10_ALWAYS_INLINE_ATTRIBUTE { weight[k] = at::vec::fmadd(grad, x[k], weight[k]); });
    bias = bias + grad;
  }
  void write(float* grad_weight, float* grad_bias, bool back, int64_t row) const {
    for (int64_t k = 0; k < TAPS; ++k)
      store(grad_weight + (row * TAPS + k) * WIDTH, weight[back ? REACH - k : k]);
    store(grad_bias + row * WIDTH, bias);
  }
};

// From the gradient of SiLU's output to that of its input.
template <size_t COUNT>
C10_ALWAYS_INLINE Pack<COUNT> through_silu(const Pack<COUNT>& input, const Pack<COUNT>& grad) {
  const auto slope = [](Vec a, Vec open) { return open * at::vec::fmadd(a, Vec(1.f) - open, Vec(1.f)); };
  return each([&](Vec g, Vec a, Vec open) { return g * slope(a, open); }, grad, input, sigmoid(input));
}

template <bool AHEAD, bool BACK, typename T>
void conv_backward_block(const ConvInput<T>& in, const ConvGradient<T>& grad, int64_t b, int64_t block) {
  const Taps ahead(AHEAD ? in.ahead : in.back, false, in.blocks, block);
  const Taps back(BACK ? in.back : in.ahead, true, in.blocks, block);
  const int64_t lanes = in.blocks.lanes(block), d = block * WIDTH;
  Window x = no_rows();
  ConvSums sums_ahead, sums_back;
  const auto read = [&](const Rows<const T>& grad_y, int64_t t) {
    grad_y.prefetch(b, t + ROWS_AHEAD, d);
    return load(grad_y.at(b, t, d), lanes);
  };
  for (int64_t step = 0; step < in.length + REACH; ++step) {
    const int64_t t = step - REACH;
    const bool inside = step < in.length;
    in.x.prefetch(b, step + ROWS_AHEAD, d);
    push(x, inside ? load(in.x.at(b, step, d), lanes) : Vec(0.f));
    Pack<2> g{AHEAD && inside ? read(grad.ahead.y, step) : Vec(0.f), BACK && t >= 0 ? read(grad.back.y, t) : Vec(0.f)};
    if (in.silu) g = through_silu(Pack<2>{ahead.over(x), back.over(x)}, g);
    if constexpr (AHEAD) sums_ahead.add(x, g[0]);
    if (t < 0) continue;
    if constexpr (BACK) sums_back.add(x, g[1]);
    Vec grad_x(0.f);
    if constexpr (AHEAD) grad_x = ahead.onto(sums_ahead.recent);
    if constexpr (BACK) grad_x = grad_x + back.onto(sums_back.recent);
    store(grad.x.at(b, t, d), grad_x, lanes);
  }
  const int64_t row = b * in.blocks.count() + block;
  if constexpr (AHEAD) sums_ahead.write(grad.ahead.weight, grad.ahead.bias, false, row);
  if constexpr (BACK) sums_back.write(grad.back.weight, grad.back.bias, true, row);
}

// Calls work(sample, block) for all of them, on all threads.
template <typename T, typename Work>
void for_each_block(const ConvInput<T>& in, const Work& work) {
  const int64_t blocks = in.blocks.count();
  at::parallel_for(0, in.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) work(task / blocks, task % blocks);
  });
}

}  // namespace videomamba
