// The causal depthwise convolution over four positions, with SiLU, forward and backward.
//
// A task is one sample and one block of channels; the four weights and the last positions stay in registers.
// Reversed, the walk starts at the last position, and "earlier" means later in the clip.
#pragma once

#include <ATen/Parallel.h>

#include "rows.h"

namespace videomamba {

constexpr int64_t TAPS = 4;

template <typename T>
struct ConvInput {
  int64_t batch, length;
  Blocks blocks;
  Rows<const T> x;
  const float* weight;  // (channels, TAPS)
  const float* bias;  // or null
  bool reverse, silu;

  int64_t position(int64_t step) const {
    return reverse ? length - 1 - step : step;
  }
};

// The taps of one block of channels: w[3] meets the position itself, w[0] the one three before.
template <typename T>
struct Taps {
  Vec w[TAPS], bias;

  Taps(const ConvInput<T>& in, int64_t block) : bias(0.f) {
    const int64_t lanes = in.blocks.lanes(block), d = block * WIDTH;
    for (int64_t k = 0; k < TAPS; ++k) {
      float column[WIDTH] = {};
      for (int64_t lane = 0; lane < lanes; ++lane) column[lane] = in.weight[(d + lane) * TAPS + k];
      w[k] = load(column);
    }
    if (in.bias) bias = load(in.bias + d, lanes);
  }
  Vec operator()(const Vec x[TAPS]) const {
    Vec a = bias;
    for (int64_t k = 0; k < TAPS; ++k) a = at::vec::fmadd(w[k], x[k], a);
    return a;
  }
};

inline void push(Vec window[TAPS], Vec newest) {
  for (int64_t k = 0; k + 1 < TAPS; ++k) window[k] = window[k + 1];
  window[TAPS - 1] = newest;
}

template <typename T>
void conv_forward_block(const ConvInput<T>& in, const Rows<T>& y, int64_t b, int64_t block) {
  const Taps<T> taps(in, block);
  const int64_t lanes = in.blocks.lanes(block), d = block * WIDTH;
  Vec window[TAPS] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)};
  for (int64_t step = 0; step < in.length; ++step) {
    const int64_t t = in.position(step);
    push(window, load(in.x.at(b, t, d), lanes));
    const Vec a = taps(window);
    store(y.at(b, t, d), in.silu ? a * sigmoid(a) : a, lanes);
  }
}

template <typename T>
void conv_forward(const ConvInput<T>& in, const Rows<T>& y) {
  const int64_t blocks = in.blocks.count();
  at::parallel_for(0, in.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) conv_forward_block(in, y, task / blocks, task % blocks);
  });
}

template <typename T>
struct ConvGradient {
  Rows<const T> y;
  Rows<T> x;
  float* weight;  // (batch, block, TAPS, WIDTH)
  float* bias;  // (batch, block, WIDTH)
};

// The gradient of x at a position needs those of the three positions after it, so x follows y at a distance of three.
template <typename T>
void conv_backward_block(const ConvInput<T>& in, const ConvGradient<T>& grad, int64_t b, int64_t block) {
  const Taps<T> taps(in, block);
  const int64_t lanes = in.blocks.lanes(block), d = block * WIDTH;
  const Vec zero(0.f);
  Vec window[TAPS] = {zero, zero, zero, zero}, later[TAPS] = {zero, zero, zero, zero};
  Vec weight[TAPS] = {zero, zero, zero, zero}, bias(0.f);
  for (int64_t step = 0; step < in.length + TAPS - 1; ++step) {
    Vec g(0.f);
    if (step < in.length) {
      const int64_t t = in.position(step);
      push(window, load(in.x.at(b, t, d), lanes));
      g = load(grad.y.at(b, t, d), lanes);
      if (in.silu) {
        const Vec a = taps(window), gate = sigmoid(a);
        g = g * gate * at::vec::fmadd(a, Vec(1.f) - gate, Vec(1.f));
      }
      for (int64_t k = 0; k < TAPS; ++k) weight[k] = at::vec::fmadd(g, window[k], weight[k]);
      bias = bias + g;
    }
    push(later, g);
    if (step < TAPS - 1) continue;
    Vec grad_x(0.f);
    for (int64_t k = 0; k < TAPS; ++k) grad_x = at::vec::fmadd(later[k], taps.w[TAPS - 1 - k], grad_x);
    store(grad.x.at(b, in.position(step - (TAPS - 1)), d), grad_x, lanes);
  }
  const int64_t row = b * in.blocks.count() + block;
  for (int64_t k = 0; k < TAPS; ++k) store(grad.weight + (row * TAPS + k) * WIDTH, weight[k]);
  store(grad.bias + row * WIDTH, bias);
}

template <typename T>
void conv_backward(const ConvInput<T>& in, const ConvGradient<T>& grad) {
  const int64_t blocks = in.blocks.count();
  at::parallel_for(0, in.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) conv_backward_block(in, grad, task / blocks, task % blocks);
  });
}

}  // namespace videomamba
