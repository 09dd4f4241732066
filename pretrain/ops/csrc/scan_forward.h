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

// Scratch of one task: what is known of a chunk's steps, the gate at each of them, and the states of all its blocks.
struct ForwardSpace {
  Steps steps;
  float *gate, *states;

  static int64_t floats(const Shape& shape, int64_t blocks) {
    return Steps::FLOATS + CHUNK * WIDTH + blocks * shape.block_state();
  }
  ForwardSpace(Scratch& scratch, const Shape& shape, int64_t blocks)
      : steps(scratch), gate(scratch.take(CHUNK * WIDTH)), states(scratch.take(blocks * shape.block_state())) {}
};

// SiLU(z).
template <typename T>
void prepare_gate(const ScanInput<T>& in, const Gated<T>& out, const Chunk& chunk, float* gate) {
  const auto rows = chunk.rows_of(out.z, in);
  const int64_t lanes = chunk.lanes;
  in_groups(chunk.steps, [&](int64_t k, auto size) C10_ALWAYS_INLINE_ATTRIBUTE {
    const auto z = load_rows<size()>(rows, k, lanes);
    store_steps(gate, k, each([](Vec v, Vec open) { return v * open; }, z, sigmoid(z)));
  });
}

// y, with that of the direction before where there is one, times the gate where there is one.
template <typename T>
auto finish(const ScanInput<T>& in, const Gated<T>& out, const Task& task, const Chunk& chunk, const float* gate) {
  const auto kept = chunk.kept_by(task, in);
  const auto rows = chunk.rows_of(out.y, in);
  const bool gated(out.z), adds = !task.first, ends = task.last, large = out.y.large;
  const int64_t lanes = chunk.lanes;
  return [=](int64_t k, Vec y) C10_ALWAYS_INLINE_ATTRIBUTE {
    if (!ends) return store(kept[k], y);
    if (adds) y = y + load(kept[k]);
    if (gated) y = y * load(gate + k * WIDTH);
    write(rows[k], y, lanes, large);
  };
}

// The states of one tile after a chunk, where the backward pass will begin the next one.
inline void store_states(const Shape& shape, const Chunk& chunk, int64_t tile, const float* state, float* out,
                         bool large) {
  for (int64_t n = tile; n < std::min(tile + TILE, shape.states); ++n)
    write(out + n * shape.channels, load(state + n * WIDTH), chunk.lanes, large);
}

template <typename T>
void scan_forward_chunk(const ScanForward<T>& pass, const Gated<T>& out, const Task& task, const Chunk& chunk,
                        const Chunk& next, const ForwardSpace& space, float* state) {
  const ScanInput<T>& in = pass.in;
  const Shape& shape = in.shape;
  prepare<false>(in, chunk, space.steps, nullptr);
  if (out.z && task.last) prepare_gate(in, out, chunk, space.gate);
  const auto u = next.rows_of(in.u, in), delta = next.rows_of(in.delta, in);
  const auto z = out.z ? next.rows_of(out.z, in) : u;
  const auto last = finish(in, out, task, chunk, space.gate);
  float* const y = space.steps.y;
  const auto ahead = [=](int64_t k) C10_ALWAYS_INLINE_ATTRIBUTE {
    __builtin_prefetch(u[k]), __builtin_prefetch(delta[k]), __builtin_prefetch(z[k]);
  };
  const int64_t index = chunk.first / CHUNK, tiles = shape.padded_states();
  float* const stored = pass.states && index + 1 < shape.chunks()
      ? pass.states + shape.stored_state(task.batch, index + 1, chunk.block)
      : nullptr;
  for (int64_t tile = 0; tile < tiles; tile += TILE) {
    float* const h = state + tile * WIDTH;
    if (tile + TILE < tiles) {
      scan_tile<false>(in, chunk, space.steps, tile, h, {}, [=](int64_t k, Vec sum) C10_ALWAYS_INLINE_ATTRIBUTE {
        store(y + k * WIDTH, sum);
      });
    } else {
      scan_tile<false>(in, chunk, space.steps, tile, h, {}, [=](int64_t k, Vec sum) C10_ALWAYS_INLINE_ATTRIBUTE {
        last(k, sum);
        ahead(k);
      });
    }
    if (stored) store_states(shape, chunk, tile, state, stored, out.y.large);
  }
}

inline void write_last_state(const Shape& shape, int64_t batch, int64_t block, const float* state, float* out) {
  out += (batch * shape.channels + block * WIDTH) * shape.states;
  for (int64_t lane = 0; lane < shape.blocks.lanes(block); ++lane)
    for (int64_t n = 0; n < shape.states; ++n) out[lane * shape.states + n] = state[n * WIDTH + lane];
}

template <typename T>
void scan_forward_pass(const ScanForward<T>& pass, const Gated<T>& out, const Task& task, const ForwardSpace& space) {
  const Shape& shape = pass.in.shape;
  const auto state_of = [&](int64_t block) { return space.states + (block - task.begin) * shape.block_state(); };
  std::fill_n(space.states, task.blocks() * shape.block_state(), 0.f);
  for (int64_t index = 0; index < shape.chunks(); ++index)
    for_each_chunk(shape, task, index, 1, [&](const Chunk& chunk, const Chunk& next) {
      scan_forward_chunk(pass, out, task, chunk, next, space, state_of(chunk.block));
    });
  if (!pass.last_state) return;
  for (int64_t block = task.begin; block < task.end; ++block)
    write_last_state(shape, task.batch, block, state_of(block), pass.last_state);
}

// One direction or two, of equal batch, length and channels.
template <typename T>
void scan_forward(const std::vector<ScanForward<T>>& passes, const Gated<T>& out) {
  const auto floats = [&](int64_t blocks) {
    int64_t most = 0;
    for (const auto& pass : passes) most = std::max(most, ForwardSpace::floats(pass.in.shape, blocks));
    return most;
  };
  const Shape& shape = passes.front().in.shape;
  for_each_task(shape, choose_runs(shape), passes.size() > 1, floats, [&](Task task, int64_t, Scratch& scratch) {
    float* const mark = scratch.mark();
    for (const auto& pass : passes) {
      task.first = &pass == &passes.front();
      task.last = &pass == &passes.back();
      scratch.reset(mark);
      scan_forward_pass(pass, out, task, ForwardSpace(scratch, pass.in.shape, task.blocks()));
    }
  });
}

}  // namespace videomamba
