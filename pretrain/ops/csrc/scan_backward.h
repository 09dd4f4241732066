// The backward scan: chunks from the last to the first, each one recomputed from its stored state.
//
// A task is one sample and a group of channel blocks. The gradients of B and C are sums over channels: a group adds
// them up lane by lane for one chunk, and sums the lanes once at the chunk's end.
#pragma once

#include <ATen/Parallel.h>

#include "scan.h"

namespace videomamba {

template <typename T>
struct ScanGradient {
  // given
  Rows<const T> y;
  const float* last_state;  // (batch, channels, states), or null
  const float* states;  // as the forward pass stored them
  int64_t groups;
  // wanted
  Rows<T> u, delta, z;  // z is empty where there is no gate
  float* A;  // (batch, block, padded states, WIDTH)
  float* B;  // (group, batch, length, padded states)
  float* C;
  float* skip;  // (batch, block, WIDTH)
  float* bias;
};

// Sums that one block of channels carries from chunk to chunk.
struct Carried {
  float *state, *A, *skip, *bias;

  static int64_t floats(const Shape& shape) {
    return 2 * shape.block_state() + 2 * WIDTH;
  }
  Carried(float* memory, const Shape& shape)
      : state(memory),
        A(memory + shape.block_state()),
        skip(memory + 2 * shape.block_state()),
        bias(memory + 2 * shape.block_state() + WIDTH) {}
};

// Gradients at the steps of one chunk; y of the output before the gate. Every field is (CHUNK, WIDTH).
struct StepGradients {
  float *y, *drive, *exponent;
  static constexpr int64_t FLOATS = 3 * CHUNK * WIDTH;

  explicit StepGradients(Scratch& scratch)
      : y(scratch.take(CHUNK * WIDTH)), drive(scratch.take(CHUNK * WIDTH)), exponent(scratch.take(CHUNK * WIDTH)) {}
};

struct Workspace {
  Steps steps;
  StepGradients gradients;
  Record record;
  float *state, *B, *C, *carried;  // B and C: (CHUNK, padded states, WIDTH)

  static int64_t floats(const Shape& shape, int64_t blocks) {
    return Steps::FLOATS + StepGradients::FLOATS + Record::FLOATS + (1 + 2 * CHUNK) * shape.block_state() +
        blocks * Carried::floats(shape);
  }
  Workspace(Scratch& scratch, const Shape& shape, int64_t blocks)
      : steps(scratch),
        gradients(scratch),
        record(scratch),
        state(scratch.take(shape.block_state())),
        B(scratch.take(CHUNK * shape.block_state())),
        C(scratch.take(CHUNK * shape.block_state())),
        carried(scratch.take(blocks * Carried::floats(shape))) {}
};

// The gradient before the gate.
template <typename T>
void prepare_gradients(const ScanInput<T>& in, const ScanGradient<T>& grad, const Chunk& chunk,
                       const StepGradients& g) {
  const int64_t d = chunk.block * WIDTH;
  for (int64_t k = 0; k < chunk.steps; ++k) {
    const int64_t t = in.position(chunk.first + k);
    Vec y = load(grad.y.at(chunk.batch, t, d), chunk.lanes);
    if (in.z) {
      const Vec z = load(in.z.at(chunk.batch, t, d), chunk.lanes);
      y = y * z * sigmoid(z);
    }
    store(g.y + k * WIDTH, y);
    store(g.drive + k * WIDTH, Vec(0.f));
    store(g.exponent + k * WIDTH, Vec(0.f));
  }
}

// The recurrence of `scan_tile`, backwards. `state`: gradient of the state after the chunk on entry, before it on exit.
template <typename T>
void scan_tile_backward(const ScanInput<T>& in, const Chunk& chunk, const Workspace& w, int64_t tile, float* state,
                        float* A) {
  const int64_t states = in.shape.padded_states(), stride = in.coefficient_stride();
  const float* decay = in.block_decay(chunk.block) + tile * WIDTH;
  const int64_t last = in.coefficients(chunk.batch, chunk.first) + (chunk.steps - 1) * stride + tile;
  const float *b = in.B + last, *c = in.C + last;
  Vec q[TILE], grad_A[TILE];
  for (int64_t n = 0; n < TILE; ++n) {
    q[n] = load(state + n * WIDTH);
    grad_A[n] = load(A + n * WIDTH);
  }
  for (int64_t k = chunk.steps - 1; k >= 0; --k, b -= stride, c -= stride) {
    const Vec grad_y = load(w.gradients.y + k * WIDTH);
    const Vec delta = load(w.steps.delta + k * WIDTH), drive = load(w.steps.drive + k * WIDTH);
    Vec grad_drive = load(w.gradients.drive + k * WIDTH), grad_exponent = load(w.gradients.exponent + k * WIDTH);
    const float* before = w.record.before + k * TILE * WIDTH;
    const float* after = before + TILE * WIDTH;
    const float* factor = w.record.factor + k * TILE * WIDTH;
    float *grad_B = w.B + (k * states + tile) * WIDTH, *grad_C = w.C + (k * states + tile) * WIDTH;
#pragma GCC unroll 8
    for (int64_t n = 0; n < TILE; ++n) {
      const int64_t at = n * WIDTH;
      q[n] = at::vec::fmadd(grad_y, Vec(c[n]), q[n]);
      store(grad_C + at, at::vec::fmadd(grad_y, load(after + at), load(grad_C + at)));
      store(grad_B + at, at::vec::fmadd(q[n], drive, load(grad_B + at)));
      grad_drive = at::vec::fmadd(q[n], Vec(b[n]), grad_drive);
      q[n] = q[n] * load(factor + at);
      const Vec grad_log = q[n] * load(before + at);  // of the logarithm of the factor
      grad_exponent = at::vec::fmadd(grad_log, load(decay + at), grad_exponent);
      grad_A[n] = at::vec::fmadd(grad_log, delta, grad_A[n]);
    }
    store(w.gradients.drive + k * WIDTH, grad_drive);
    store(w.gradients.exponent + k * WIDTH, grad_exponent);
  }
  for (int64_t n = 0; n < TILE; ++n) {
    store(state + n * WIDTH, q[n]);
    store(A + n * WIDTH, grad_A[n]);
  }
}

// The gradients of u, delta and z, and the sums for D and the bias.
template <typename T>
void write_gradients(const ScanInput<T>& in, const ScanGradient<T>& grad, const Chunk& chunk, const Workspace& w,
                     const Carried& carried) {
  const int64_t d = chunk.block * WIDTH;
  const Vec skip = in.skip ? load(in.skip + d, chunk.lanes) : Vec(0.f);
  Vec grad_skip = load(carried.skip), grad_bias = load(carried.bias);
  for (int64_t k = 0; k < chunk.steps; ++k) {
    const int64_t t = in.position(chunk.first + k), at = k * WIDTH;
    const Vec u = load(w.steps.u + at), delta = load(w.steps.delta + at), grad_y = load(w.gradients.y + at);
    const Vec grad_drive = load(w.gradients.drive + at);
    Vec grad_u = grad_drive * delta;
    if (in.skip) grad_u = at::vec::fmadd(grad_y, skip, grad_u);
    const Vec by_exponent = load(w.gradients.exponent + at) * Vec(LN_2);
    Vec grad_delta = at::vec::fmadd(grad_drive, u, by_exponent);
    if (in.softplus) grad_delta = grad_delta * sigmoid(load(w.steps.raw + at));
    store(grad.u.at(chunk.batch, t, d), grad_u, chunk.lanes);
    store(grad.delta.at(chunk.batch, t, d), grad_delta, chunk.lanes);
    grad_skip = at::vec::fmadd(grad_y, u, grad_skip);
    grad_bias = grad_bias + grad_delta;
    if (in.z) {
      const Vec z = load(in.z.at(chunk.batch, t, d), chunk.lanes), gate = sigmoid(z);
      const Vec slope = gate * at::vec::fmadd(z, Vec(1.f) - gate, Vec(1.f));
      const Vec outer = load(grad.y.at(chunk.batch, t, d), chunk.lanes);
      store(grad.z.at(chunk.batch, t, d), outer * load(w.steps.y + at) * slope, chunk.lanes);
    }
  }
  store(carried.skip, grad_skip);
  store(carried.bias, grad_bias);
}

inline void load_state(const Shape& shape, int64_t block, const float* from, float* state) {
  const int64_t lanes = shape.blocks.lanes(block);
  for (int64_t n = 0; n < shape.states; ++n) store(state + n * WIDTH, load(from + n * shape.channels, lanes));
}

template <typename T>
void scan_backward_chunk(const ScanInput<T>& in, const ScanGradient<T>& grad, const Chunk& chunk, const Workspace& w,
                         const Carried& carried) {
  const Shape& shape = in.shape;
  const int64_t index = chunk.first / CHUNK;
  std::fill_n(w.state, shape.block_state(), 0.f);
  if (index > 0) {
    load_state(shape, chunk.block, grad.states + shape.stored_state(chunk.batch, index, chunk.block), w.state);
  }
  prepare(in, chunk, w.steps);
  prepare_gradients(in, grad, chunk, w.gradients);
  for (int64_t tile = 0; tile < shape.padded_states(); tile += TILE) {
    scan_tile<true>(in, chunk, w.steps, tile, w.state + tile * WIDTH, &w.record);
    scan_tile_backward(in, chunk, w, tile, carried.state + tile * WIDTH, carried.A + tile * WIDTH);
  }
  write_gradients(in, grad, chunk, w, carried);
}

// Sum the lanes of a chunk's gradients of B and C into their rows.
template <typename T>
void write_coefficients(const ScanInput<T>& in, const ScanGradient<T>& grad, int64_t group, int64_t batch,
                        int64_t first, int64_t steps, const Workspace& w) {
  const Shape& shape = in.shape;
  const int64_t states = shape.padded_states(), offset = group * shape.batch * shape.length * states;
  for (int64_t k = 0; k < steps; ++k) {
    const int64_t row = offset + in.coefficients(batch, first + k);
    for (int64_t n = 0; n < states; ++n) {
      grad.B[row + n] = sum(load(w.B + (k * states + n) * WIDTH));
      grad.C[row + n] = sum(load(w.C + (k * states + n) * WIDTH));
    }
  }
}

// The gradient that arrives at the last state, where one does.
template <typename T>
void start_carried(const Shape& shape, const ScanGradient<T>& grad, int64_t batch, int64_t block,
                   const Carried& carried) {
  std::fill_n(carried.state, Carried::floats(shape), 0.f);
  if (!grad.last_state) return;
  const float* from = grad.last_state + (batch * shape.channels + block * WIDTH) * shape.states;
  for (int64_t lane = 0; lane < shape.blocks.lanes(block); ++lane)
    for (int64_t n = 0; n < shape.states; ++n) carried.state[n * WIDTH + lane] = from[lane * shape.states + n];
}

template <typename T>
void scan_backward_group(const ScanInput<T>& in, const ScanGradient<T>& grad, int64_t batch, int64_t group,
                         const Workspace& w) {
  const Shape& shape = in.shape;
  const int64_t blocks = shape.blocks.count(), floats = Carried::floats(shape);
  const int64_t begin = blocks * group / grad.groups, end = blocks * (group + 1) / grad.groups;
  const auto carried = [&](int64_t block) { return Carried(w.carried + (block - begin) * floats, shape); };
  for (int64_t block = begin; block < end; ++block) start_carried(shape, grad, batch, block, carried(block));
  for (int64_t index = shape.chunks() - 1; index >= 0; --index) {
    const int64_t first = index * CHUNK, steps = std::min(CHUNK, shape.length - first);
    std::fill_n(w.B, steps * shape.block_state(), 0.f);
    std::fill_n(w.C, steps * shape.block_state(), 0.f);
    for (int64_t block = begin; block < end; ++block)
      scan_backward_chunk(in, grad, Chunk(in, batch, block, index), w, carried(block));
    write_coefficients(in, grad, group, batch, first, steps, w);
  }
  for (int64_t block = begin; block < end; ++block) {
    const Carried sums = carried(block);
    const int64_t row = batch * blocks + block;
    std::copy_n(sums.A, shape.block_state(), grad.A + row * shape.block_state());
    std::copy_n(sums.skip, WIDTH, grad.skip + row * WIDTH);
    std::copy_n(sums.bias, WIDTH, grad.bias + row * WIDTH);
  }
}

template <typename T>
void scan_backward(const ScanInput<T>& in, const ScanGradient<T>& grad) {
  const int64_t most_blocks = (in.shape.blocks.count() + grad.groups - 1) / grad.groups;
  at::parallel_for(0, in.shape.batch * grad.groups, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(Workspace::floats(in.shape, most_blocks));
    const Workspace workspace(scratch, in.shape, most_blocks);
    for (int64_t task = begin; task < end; ++task)
      scan_backward_group(in, grad, task / grad.groups, task % grad.groups, workspace);
  });
}

}  // namespace videomamba
