// What the forward and the backward scan share: the problem, one chunk of positions, and the recurrence itself.
//
// A task is one sample and a run of blocks of WIDTH channels. It walks the positions in chunks of CHUNK, and a chunk
// block by block, so that rows are read as they lie in memory. The state at the start of every chunk but the first is
// stored when a gradient is wanted, and the backward pass recomputes the rest. Inside a chunk the states are taken
// TILE at a time, so that they stay in registers; the number of states is padded to a multiple of TILE with zeros,
// which add nothing.
//
// A call has one direction or two. Two share the gate and the output: the first leaves its y in float32 for the
// second, which adds its own.
#pragma once

#include <ATen/Parallel.h>

#include "rows.h"

namespace videomamba {

constexpr int64_t CHUNK = 16;
constexpr int64_t TILE = 8;

struct Shape {
  int64_t batch, length, channels, states;
  Blocks blocks{channels};

  int64_t padded_states() const {
    return (states + TILE - 1) / TILE * TILE;
  }
  int64_t chunks() const {
    return (length + CHUNK - 1) / CHUNK;
  }
  // Floats of state of one block of channels while it is worked on, (padded states, WIDTH).
  int64_t block_state() const {
    return padded_states() * WIDTH;
  }
  // Where a block's state is stored in (batch, chunks - 1, states, channels); chunk 0 starts from zero.
  int64_t stored_state(int64_t b, int64_t chunk, int64_t block) const {
    return (b * (chunks() - 1) + chunk - 1) * states * channels + block * WIDTH;
  }
};

// One direction of a scan.
template <typename T>
struct ScanInput {
  Shape shape;
  Rows<const T> u, delta;
  const float* decay;  // A * log2(e) as (block, state, WIDTH), finite
  const float* B;  // (batch, length, padded states)
  const float* C;
  const float* skip;  // D, or null
  const float* bias;  // of delta, or null
  bool softplus, reverse;

  // The position visited in the given step.
  int64_t position(int64_t step) const {
    return reverse ? shape.length - 1 - step : step;
  }
  // The coefficients of a step's position, and how far the next step's are.
  int64_t coefficients(int64_t b, int64_t step) const {
    return (b * shape.length + position(step)) * shape.padded_states();
  }
  int64_t coefficient_stride() const {
    return reverse ? -shape.padded_states() : shape.padded_states();
  }
  const float* block_decay(int64_t block) const {
    return decay + block * shape.block_state();
  }
};

// One sample and a run of its blocks, and where this direction stands among those of the call.
struct Task {
  int64_t batch, begin, end;
  float* kept;  // y of the first of two directions, (length, blocks of the run, WIDTH)
  bool first = true, last = true;

  int64_t blocks() const {
    return end - begin;
  }
};

// One block of channels in one chunk of steps.
struct Chunk {
  int64_t batch, block, first, steps, lanes;

  Chunk(const Shape& shape, int64_t batch, int64_t block, int64_t index)
      : batch(batch),
        block(block),
        first(index * CHUNK),
        steps(std::min(CHUNK, shape.length - first)),
        lanes(shape.blocks.lanes(block)) {}

  int64_t channel() const {
    return block * WIDTH;
  }
  // Its rows of a tensor, one for each step.
  template <typename T, typename Element>
  typename Rows<Element>::Walk rows_of(const Rows<Element>& rows, const ScanInput<T>& in) const {
    return rows.walk(batch, in.position(first), channel(), in.reverse);
  }
  // What a direction leaves for the one after it.
  template <typename T>
  Rows<float>::Walk kept_by(const Task& task, const ScanInput<T>& in) const {
    const int64_t row = task.blocks() * WIDTH;
    float* const first_row = task.kept + in.position(first) * row + (block - task.begin) * WIDTH;
    return {first_row, in.reverse ? -row : row};
  }
};

// Calls work(chunk, next) for all blocks of a task in the chunk of this index; `next` is the one after it, which at the
// end is that of the chunk `then` positions of the index further.
template <typename Work>
void for_each_chunk(const Shape& shape, const Task& task, int64_t index, int64_t then, const Work& work) {
  const int64_t after = std::clamp<int64_t>(index + then, 0, shape.chunks() - 1);
  for (int64_t block = task.begin; block < task.end; ++block) {
    const bool more = block + 1 < task.end;
    work(Chunk(shape, task.batch, block, index),
         Chunk(shape, task.batch, more ? block + 1 : task.begin, more ? index : after));
  }
}

// Into how many runs the blocks of a sample are cut, so that all threads have work to the end. Each run has a part of
// its own, such as the gradients of B and C, that costs about as much as one more block.
inline int64_t choose_runs(const Shape& shape) {
  const int64_t threads = at::get_num_threads(), blocks = shape.blocks.count();
  int64_t best = 1, least = std::numeric_limits<int64_t>::max();
  for (int64_t runs = 1; runs <= std::min(blocks, threads); ++runs) {
    const int64_t tasks = (shape.batch * runs + threads - 1) / threads;
    const int64_t cost = tasks * ((blocks + runs - 1) / runs + 1);
    if (cost < least) least = cost, best = runs;
  }
  return best;
}

// Calls work(task, run, scratch) for every task; each thread has `floats(blocks)` floats of scratch beside `kept`.
template <typename Floats, typename Work>
void for_each_task(const Shape& shape, int64_t runs, bool keep, const Floats& floats, const Work& work) {
  const int64_t blocks = shape.blocks.count(), most = (blocks + runs - 1) / runs;
  at::parallel_for(0, shape.batch * runs, 1, [&](int64_t begin, int64_t end) {
    const int64_t kept = keep ? shape.length * most * WIDTH : 0;
    Scratch scratch(kept + floats(most));
    float* const y = scratch.take(kept);
    float* const rest = scratch.mark();
    for (int64_t index = begin; index < end; ++index) {
      const int64_t run = index % runs;
      scratch.reset(rest);
      work(Task{index / runs, blocks * run / runs, blocks * (run + 1) / runs, y}, run, scratch);
    }
    drain();
  });
}

// What is known of each step of a chunk before the recurrence runs, and y; every field is (CHUNK, WIDTH).
struct Steps {
  float *u, *delta, *drive, *y;
  static constexpr int64_t FLOATS = 4 * CHUNK * WIDTH;

  explicit Steps(Scratch& scratch)
      : u(scratch.take(CHUNK * WIDTH)),
        delta(scratch.take(CHUNK * WIDTH)),
        drive(scratch.take(CHUNK * WIDTH)),
        y(scratch.take(CHUNK * WIDTH)) {}
};

// Calls f(k, size) for the steps k of a chunk, GROUP of them at once and the rest one by one; size is a constant.
template <typename F>
C10_ALWAYS_INLINE void in_groups(int64_t steps, const F& f) {
  constexpr int64_t GROUP = 4;
  int64_t k = 0;
  for (; k + GROUP <= steps; k += GROUP) f(k, std::integral_constant<int64_t, GROUP>{});
  for (; k < steps; ++k) f(k, std::integral_constant<int64_t, 1>{});
}

// SIZE rows of a chunk from step k on.
template <int64_t SIZE, typename Walk>
C10_ALWAYS_INLINE Pack<SIZE> load_rows(const Walk& rows, int64_t k, int64_t lanes) {
  return tabulate<SIZE>([&](auto i) C10_ALWAYS_INLINE_ATTRIBUTE { return load(rows[k + i], lanes); });
}

// SIZE vectors of scratch, of which each step has one.
template <int64_t SIZE>
C10_ALWAYS_INLINE Pack<SIZE> load_steps(const float* from, int64_t k) {
  return tabulate<SIZE>([&](auto i) C10_ALWAYS_INLINE_ATTRIBUTE { return load(from + (k + i) * WIDTH); });
}

template <size_t SIZE>
C10_ALWAYS_INLINE void store_steps(float* to, int64_t k, const Pack<SIZE>& x) {
  unroll<SIZE>([&](auto i) C10_ALWAYS_INLINE_ATTRIBUTE { store(to + (k + i) * WIDTH, x[i]); });
}

// Read u and delta, apply bias and softplus, and start y with D u. For the backward pass u is kept, and the slope of
// the softplus, if there is one, in `slope`.
template <bool BACKWARD, typename T>
void prepare(const ScanInput<T>& in, const Chunk& chunk, const Steps& steps, float* slope) {
  const int64_t d = chunk.channel(), lanes = chunk.lanes;
  const Vec bias = in.bias ? load(in.bias + d, lanes) : Vec(0.f);
  const Vec skip = in.skip ? load(in.skip + d, lanes) : Vec(0.f);
  const auto u_rows = chunk.rows_of(in.u, in), delta_rows = chunk.rows_of(in.delta, in);
  const bool soft = in.softplus, skips = in.skip;
  const Steps s = steps;  // a copy, which no store of a vector can change
  in_groups(chunk.steps, [&](int64_t k, auto size) C10_ALWAYS_INLINE_ATTRIBUTE {
    const auto u = load_rows<size()>(u_rows, k, lanes);
    auto delta = each([&](Vec v) { return v + bias; }, load_rows<size()>(delta_rows, k, lanes));
    if (soft) {
      const auto through = softplus<BACKWARD>(delta);
      delta = through.value;
      if constexpr (BACKWARD) store_steps(slope, k, through.slope);
    }
    if constexpr (BACKWARD) store_steps(s.u, k, u);
    store_steps(s.delta, k, delta);
    store_steps(s.drive, k, each([](Vec v, Vec w) { return v * w; }, delta, u));
    store_steps(s.y, k, each([&](Vec v) { return skips ? v * skip : Vec(0.f); }, u));
  });
}

// What the backward pass wants of one tile again: the state before each step and the factor that the step multiplied
// it by, both (CHUNK, TILE, WIDTH); and the sums over channels of grad_y times the state after it.
struct Record {
  float *before, *factor;
  const float* grad_y;
  float* grad_C;  // (CHUNK, EIGHT_SUMS), `stride` floats from one step to the next
  int64_t stride;
};

// Of TILE states, (TILE, WIDTH).
C10_ALWAYS_INLINE std::array<Vec, TILE> load_tile(const float* from) {
  return tabulate<TILE>([&](auto n) C10_ALWAYS_INLINE_ATTRIBUTE { return load(from + n * WIDTH); });
}

C10_ALWAYS_INLINE void store_tile(float* to, const std::array<Vec, TILE>& x) {
  unroll<TILE>([&](auto n) C10_ALWAYS_INLINE_ATTRIBUTE { store(to + n * WIDTH, x[n]); });
}

// h = 2^(delta a) h + drive B ;  y += C h, for TILE states over the steps of a chunk. `state` is read and written.
//
// after(k, y) takes a step's y, and whatever else is to be done while the next steps compute: memory is read ahead and
// written there, a little at every step, because a processor waits for many lines at once.
template <bool RECORD, typename T, typename After>
C10_ALWAYS_INLINE void scan_tile(const ScanInput<T>& in, const Chunk& chunk, const Steps& steps, int64_t tile,
                                 float* state, const Record& wanted, const After& after) {
  const float* decay = in.block_decay(chunk.block) + tile * WIDTH;
  const int64_t stride = in.coefficient_stride(), count = chunk.steps;
  const float* b = in.B + in.coefficients(chunk.batch, chunk.first) + tile;
  const float* c = in.C + in.coefficients(chunk.batch, chunk.first) + tile;
  const Steps s = steps;  // copies, which no store of a vector can change
  const Record record = wanted;
  auto h = load_tile(state);
  const auto a = load_tile(decay);
  for (int64_t k = 0; k < count; ++k, b += stride, c += stride) {
    const Vec delta = load(s.delta + k * WIDTH), drive = load(s.drive + k * WIDTH);
    Vec y = load(s.y + k * WIDTH);
    unroll<TILE>([&](auto n) C10_ALWAYS_INLINE_ATTRIBUTE {
      const Vec factor = exp2_finite(delta * a[n]);
      if constexpr (RECORD) {
        store(record.before + (k * TILE + n) * WIDTH, h[n]);
        store(record.factor + (k * TILE + n) * WIDTH, factor);
      }
      h[n] = at::vec::fmadd(factor, h[n], drive * Vec(b[n]));
      y = at::vec::fmadd(h[n], Vec(c[n]), y);
    });
    if constexpr (RECORD) {
      const Vec grad_y = load(record.grad_y + k * WIDTH);
      const auto grad_C = tabulate<TILE>([&](auto n) C10_ALWAYS_INLINE_ATTRIBUTE { return grad_y * h[n]; });
      add_eight_sums(grad_C, record.grad_C + k * record.stride);
    }
    after(k, y);
  }
  store_tile(state, h);
}

static_assert(TILE == 8, "add_eight_sums takes one tile");

}  // namespace videomamba
