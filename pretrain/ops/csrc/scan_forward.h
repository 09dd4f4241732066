// The forward scan: one pass over the positions per sample and block of channels.
#pragma once

#include <ATen/Parallel.h>

#include "scan.h"

namespace videomamba {

template <typename T>
struct ScanOutput {
  Rows<T> y;
  float* last_state;  // (batch, channels, states), or null
  float* states;  // (batch, chunks - 1, states, channels), or null
};

// y, times SiLU(z) where there is a gate.
template <typename T>
void write_output(const ScanInput<T>& in, const Chunk& chunk, const Steps& s, const Rows<T>& out) {
  const int64_t d = chunk.block * WIDTH;
  for (int64_t k = 0; k < chunk.steps; ++k) {
    const int64_t t = in.position(chunk.first + k);
    Vec y = load(s.y + k * WIDTH);
    if (in.z) {
      const Vec z = load(in.z.at(chunk.batch, t, d), chunk.lanes);
      y = y * z * sigmoid(z);
    }
    store(out.at(chunk.batch, t, d), y, chunk.lanes);
  }
}

inline void store_state(const Shape& shape, int64_t block, const float* state, float* out) {
  const int64_t lanes = shape.blocks.lanes(block);
  for (int64_t n = 0; n < shape.states; ++n) store(out + n * shape.channels, load(state + n * WIDTH), lanes);
}

inline void write_last_state(const Shape& shape, int64_t batch, int64_t block, const float* state, float* out) {
  out += (batch * shape.channels + block * WIDTH) * shape.states;
  for (int64_t lane = 0; lane < shape.blocks.lanes(block); ++lane)
    for (int64_t n = 0; n < shape.states; ++n) out[lane * shape.states + n] = state[n * WIDTH + lane];
}

template <typename T>
void scan_forward_block(const ScanInput<T>& in, const ScanOutput<T>& out, int64_t batch, int64_t block,
                        const Steps& steps, float* state) {
  const Shape& shape = in.shape;
  std::fill_n(state, shape.block_state(), 0.f);
  for (int64_t index = 0; index < shape.chunks(); ++index) {
    if (out.states && index > 0) store_state(shape, block, state, out.states + shape.stored_state(batch, index, block));
    const Chunk chunk(in, batch, block, index);
    prepare(in, chunk, steps);
    for (int64_t tile = 0; tile < shape.padded_states(); tile += TILE)
      scan_tile<false>(in, chunk, steps, tile, state + tile * WIDTH, nullptr);
    write_output(in, chunk, steps, out.y);
  }
  if (out.last_state) write_last_state(shape, batch, block, state, out.last_state);
}

template <typename T>
void scan_forward(const ScanInput<T>& in, const ScanOutput<T>& out) {
  const int64_t blocks = in.shape.blocks.count();
  at::parallel_for(0, in.shape.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(Steps::FLOATS + in.shape.block_state());
    const Steps steps(scratch);
    float* state = scratch.take(in.shape.block_state());
    for (int64_t task = begin; task < end; ++task)
      scan_forward_block(in, out, task / blocks, task % blocks, steps, state);
  });
}

}  // namespace videomamba
