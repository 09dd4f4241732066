// The forward scan: one pass over the positions for each direction.
#pragma once

#include "scan.h"

namespace videomamba {

// What all directions of a call share.
template <typename T>
struct Gated {
  Rows<T> y;
  Rows<const T> z;  // may be empty
};

template <typename T>
struct ScanForward {
  ScanInput<T> in;
  float* last_state;  // (batch, channels, states), or null
  float* states;  // (batch, chunks - 1, states, channels), or null
};

// y, with that of the direction before where there is one; times SiLU(z) where there is a gate.
template <typename T>
void write_output(const ScanInput<T>& in, const Task& task, const Chunk& chunk, const Steps& s, const Gated<T>& out) {
  const int64_t d = chunk.channel();
  for (int64_t k = 0; k < chunk.steps; ++k) {
    const int64_t t = in.position(chunk.first + k);
    Vec y = load(s.y + k * WIDTH);
    if (!task.last) {
      store(task.kept_at(t, chunk.block), y);
      continue;
    }
    if (!task.first) y = y + load(task.kept_at(t, chunk.block));
    if (out.z) {
      const Vec z = load(out.z.at(chunk.batch, t, d), chunk.lanes);
      out.z.prefetch(chunk.batch, t, d + WIDTH);
      y = y * z * sigmoid(z);
    }
    write(out.y, chunk.batch, t, d, y, chunk.lanes);
  }
}

inline void store_state(const Shape& shape, int64_t block, const float* state, float* out, bool large) {
  const int64_t lanes = shape.blocks.lanes(block);
  for (int64_t n = 0; n < shape.states; ++n) {
    const Vec h = load(state + n * WIDTH);
    large ? stream(out + n * shape.channels, h, lanes) : store(out + n * shape.channels, h, lanes);
  }
}

inline void write_last_state(const Shape& shape, int64_t batch, int64_t block, const float* state, float* out) {
  out += (batch * shape.channels + block * WIDTH) * shape.states;
  for (int64_t lane = 0; lane < shape.blocks.lanes(block); ++lane)
    for (int64_t n = 0; n < shape.states; ++n) out[lane * shape.states + n] = state[n * WIDTH + lane];
}

template <typename T>
void scan_forward_pass(const ScanForward<T>& pass, const Gated<T>& out, const Task& task, const Steps& steps,
                       float* states) {
  const ScanInput<T>& in = pass.in;
  const Shape& shape = in.shape;
  const auto state_of = [&](int64_t block) { return states + (block - task.begin) * shape.block_state(); };
  std::fill_n(states, task.blocks() * shape.block_state(), 0.f);
  for (int64_t index = 0; index < shape.chunks(); ++index) {
    for (int64_t block = task.begin; block < task.end; ++block) {
      float* state = state_of(block);
      if (pass.states && index > 0)
        store_state(shape, block, state, pass.states + shape.stored_state(task.batch, index, block), out.y.large);
      const Chunk chunk(in, task.batch, block, index);
      prepare<false>(in, chunk, steps, nullptr);
      for (int64_t tile = 0; tile < shape.padded_states(); tile += TILE)
        scan_tile<false>(in, chunk, steps, tile, state + tile * WIDTH, nullptr);
      write_output(in, task, chunk, steps, out);
    }
  }
  if (!pass.last_state) return;
  for (int64_t block = task.begin; block < task.end; ++block)
    write_last_state(shape, task.batch, block, state_of(block), pass.last_state);
}

// One direction or two, of equal batch, length and channels.
template <typename T>
void scan_forward(const std::vector<ScanForward<T>>& passes, const Gated<T>& out) {
  const Shape& shape = passes.front().in.shape;
  int64_t most_state = 0;
  for (const auto& pass : passes) most_state = std::max(most_state, pass.in.shape.block_state());
  const auto floats = [&](int64_t blocks) { return Steps::FLOATS + blocks * most_state; };
  for_each_task(shape, choose_runs(shape), passes.size() > 1, floats, [&](Task task, int64_t, Scratch& scratch) {
    const Steps steps(scratch);
    float* states = scratch.take(task.blocks() * most_state);
    for (const auto& pass : passes) {
      task.first = &pass == &passes.front();
      task.last = &pass == &passes.back();
      scan_forward_pass(pass, out, task, steps, states);
    }
  });
}

}  // namespace videomamba
