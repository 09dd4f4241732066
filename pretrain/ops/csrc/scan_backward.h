// The backward scan: chunks from the last to the first, each one recomputed from its stored state.
//
// The gradients of B and C are sums over channels: a task adds them up over its blocks for one chunk, and writes them
// at the chunk's end.
#pragma once

#include "scan.h"

namespace videomamba {

// What all directions of a call share. z and grad_z are empty where there is no gate.
template <typename T>
struct GatedGradient {
  Rows<const T> grad_y, z;
  Rows<T> grad_z;
};

template <typename T>
struct ScanBackward {
  ScanInput<T> in;
  const float* grad_last_state;  // (batch, channels, states), or null
  const float* states;  // as the forward pass stored them
  // wanted
  Rows<T> u, delta;
  float* A;  // (batch, block, padded states, WIDTH)
  float* B;  // (run, batch, length, padded states)
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

// Gradients at the steps of one chunk: of y before the gate, of delta u, of the exponent; and what grad_z is y times,
// and the slope of softplus. Every field is (CHUNK, WIDTH).
struct StepGradients {
  float *y, *drive, *exponent, *z, *slope;
  static constexpr int64_t FLOATS = 5 * CHUNK * WIDTH;

  explicit StepGradients(Scratch& scratch)
      : y(scratch.take(CHUNK * WIDTH)),
        drive(scratch.take(CHUNK * WIDTH)),
        exponent(scratch.take(CHUNK * WIDTH)),
        z(scratch.take(CHUNK * WIDTH)),
        slope(scratch.take(CHUNK * WIDTH)) {}
};

struct Workspace {
  Steps steps;
  StepGradients gradients;
  float *before, *factor;  // of one tile, see Record
  float *state, *B, *C;  // B and C: (CHUNK, tiles, EIGHT_SUMS)
  float* carried;

  static int64_t sums(const Shape& shape) {
    return shape.padded_states() / TILE * EIGHT_SUMS;
  }
  static int64_t floats(const Shape& shape, int64_t blocks) {
    return Steps::FLOATS + StepGradients::FLOATS + 2 * CHUNK * TILE * WIDTH + shape.block_state() +
        2 * CHUNK * sums(shape) + blocks * Carried::floats(shape);
  }
  Workspace(Scratch& scratch, const Shape& shape, int64_t blocks)
      : steps(scratch),
        gradients(scratch),
        before(scratch.take(CHUNK * TILE * WIDTH)),
        factor(scratch.take(CHUNK * TILE * WIDTH)),
        state(scratch.take(shape.block_state())),
        B(scratch.take(CHUNK * sums(shape))),
        C(scratch.take(CHUNK * sums(shape))),
        carried(scratch.take(blocks * Carried::floats(shape))) {}

  float* B_at(const Shape& shape, int64_t k, int64_t tile) const {
    return B + k * sums(shape) + tile / TILE * EIGHT_SUMS;
  }
  float* C_at(const Shape& shape, int64_t k, int64_t tile) const {
    return C + k * sums(shape) + tile / TILE * EIGHT_SUMS;
  }
};

// The gradient before the gate.
template <typename T>
void prepare_gradients(const ScanInput<T>& in, const GatedGradient<T>& gate, const Chunk& chunk,
                       const StepGradients& g) {
  const int64_t d = chunk.channel();
  for (int64_t k = 0; k < chunk.steps; ++k) {
    const int64_t t = in.position(chunk.first + k), at = k * WIDTH;
    gate.grad_y.prefetch(chunk.batch, t, d + WIDTH);
    Vec y = load(gate.grad_y.at(chunk.batch, t, d), chunk.lanes);
    if (gate.z) {
      gate.z.prefetch(chunk.batch, t, d + WIDTH);
      const Vec z = load(gate.z.at(chunk.batch, t, d), chunk.lanes), open = sigmoid(z);
      store(g.z + at, y * open * at::vec::fmadd(z, Vec(1.f) - open, Vec(1.f)));
      y = y * z * open;
    }
    store(g.y + at, y);
    store(g.drive + at, Vec(0.f));
    store(g.exponent + at, Vec(0.f));
  }
}

// The recurrence of `scan_tile`, backwards. `state`: gradient of the state after the chunk on entry, before it on exit.
template <typename T>
void scan_tile_backward(const ScanInput<T>& in, const Chunk& chunk, const Workspace& w, int64_t tile, float* state,
                        float* A) {
  const int64_t stride = in.coefficient_stride();
  const float* decay = in.block_decay(chunk.block) + tile * WIDTH;
  const int64_t last = in.coefficients(chunk.batch, chunk.first) + (chunk.steps - 1) * stride + tile;
  const float *b = in.B + last, *c = in.C + last;
  auto q = load_tile(state), grad_A = load_tile(A);
  for (int64_t k = chunk.steps - 1; k >= 0; --k, b -= stride, c -= stride) {
    const Vec grad_y = load(w.gradients.y + k * WIDTH);
    const Vec delta = load(w.steps.delta + k * WIDTH), drive = load(w.steps.drive + k * WIDTH);
    Vec grad_drive = load(w.gradients.drive + k * WIDTH), grad_exponent = load(w.gradients.exponent + k * WIDTH);
    const float *before = w.before + k * TILE * WIDTH, *factor = w.factor + k * TILE * WIDTH;
    const auto grad_B = tabulate<TILE>([&](auto n) C10_ALWAYS_INLINE_ATTRIBUTE {
      const int64_t at = n * WIDTH;
      q[n] = at::vec::fmadd(grad_y, Vec(c[n]), q[n]);
      const Vec product = q[n] * drive;
      grad_drive = at::vec::fmadd(q[n], Vec(b[n]), grad_drive);
      q[n] = q[n] * load(factor + at);
      const Vec grad_log = q[n] * load(before + at);  // of the logarithm of the factor
      grad_exponent = at::vec::fmadd(grad_log, load(decay + at), grad_exponent);
      grad_A[n] = at::vec::fmadd(grad_log, delta, grad_A[n]);
      return product;
    });
    add_eight_sums(grad_B, w.B_at(in.shape, k, tile));
    store(w.gradients.drive + k * WIDTH, grad_drive);
    store(w.gradients.exponent + k * WIDTH, grad_exponent);
  }
  store_tile(state, q);
  store_tile(A, grad_A);
}

// The gradients of u and delta, and the sums for D and the bias.
template <typename T>
void write_gradients(const ScanBackward<T>& pass, const Chunk& chunk, const Workspace& w, const Carried& carried) {
  const ScanInput<T>& in = pass.in;
  const int64_t d = chunk.channel();
  const Vec skip = in.skip ? load(in.skip + d, chunk.lanes) : Vec(0.f);
  Vec grad_skip = load(carried.skip), grad_bias = load(carried.bias);
  for (int64_t k = 0; k < chunk.steps; ++k) {
    const int64_t t = in.position(chunk.first + k), at = k * WIDTH;
    const Vec u = load(w.steps.u + at), grad_y = load(w.gradients.y + at), grad_drive = load(w.gradients.drive + at);
    Vec grad_u = grad_drive * load(w.steps.delta + at);
    if (in.skip) grad_u = at::vec::fmadd(grad_y, skip, grad_u);
    Vec grad_delta = at::vec::fmadd(grad_drive, u, load(w.gradients.exponent + at) * Vec(LN_2));
    if (in.softplus) grad_delta = grad_delta * load(w.gradients.slope + at);
    write(pass.u, chunk.batch, t, d, grad_u, chunk.lanes);
    write(pass.delta, chunk.batch, t, d, grad_delta, chunk.lanes);
    grad_skip = at::vec::fmadd(grad_y, u, grad_skip);
    grad_bias = grad_bias + grad_delta;
  }
  store(carried.skip, grad_skip);
  store(carried.bias, grad_bias);
}

// The gradient of z, once the y of every direction is known.
template <typename T>
void write_gate_gradient(const ScanInput<T>& in, const GatedGradient<T>& gate, const Task& task, const Chunk& chunk,
                         const Workspace& w) {
  for (int64_t k = 0; k < chunk.steps; ++k) {
    const int64_t t = in.position(chunk.first + k);
    Vec y = load(w.steps.y + k * WIDTH);
    if (!task.last) {
      store(task.kept_at(t, chunk.block), y);
      continue;
    }
    if (!task.first) y = y + load(task.kept_at(t, chunk.block));
    write(gate.grad_z, chunk.batch, t, chunk.channel(), y * load(w.gradients.z + k * WIDTH), chunk.lanes);
  }
}

inline void load_state(const Shape& shape, int64_t block, const float* from, float* state) {
  const int64_t lanes = shape.blocks.lanes(block);
  for (int64_t n = 0; n < shape.states; ++n) store(state + n * WIDTH, load(from + n * shape.channels, lanes));
}

template <typename T>
void scan_backward_chunk(const ScanBackward<T>& pass, const GatedGradient<T>& gate, const Task& task,
                         const Chunk& chunk, const Workspace& w, const Carried& carried) {
  const ScanInput<T>& in = pass.in;
  const Shape& shape = in.shape;
  const int64_t index = chunk.first / CHUNK;
  std::fill_n(w.state, shape.block_state(), 0.f);
  if (index > 0)
    load_state(shape, chunk.block, pass.states + shape.stored_state(chunk.batch, index, chunk.block), w.state);
  prepare<true>(in, chunk, w.steps, w.gradients.slope);
  prepare_gradients(in, gate, chunk, w.gradients);
  for (int64_t tile = 0; tile < shape.padded_states(); tile += TILE) {
    const Record record{w.before, w.factor, w.gradients.y, w.C_at(shape, 0, tile), Workspace::sums(shape)};
    scan_tile<true>(in, chunk, w.steps, tile, w.state + tile * WIDTH, &record);
    scan_tile_backward(in, chunk, w, tile, carried.state + tile * WIDTH, carried.A + tile * WIDTH);
  }
  write_gradients(pass, chunk, w, carried);
  if (gate.z) write_gate_gradient(in, gate, task, chunk, w);
}

// A chunk's gradients of B and C into their rows.
template <typename T>
void write_coefficients(const ScanBackward<T>& pass, int64_t run, int64_t batch, int64_t index, const Workspace& w) {
  const Shape& shape = pass.in.shape;
  const int64_t states = shape.padded_states(), offset = run * shape.batch * shape.length * states;
  const int64_t first = index * CHUNK, steps = std::min(CHUNK, shape.length - first);
  for (int64_t k = 0; k < steps; ++k) {
    const int64_t row = offset + pass.in.coefficients(batch, first + k);
    for (int64_t n = 0; n < states; ++n) {
      pass.B[row + n] = eight_sums(w.B_at(shape, k, n), n % TILE);
      pass.C[row + n] = eight_sums(w.C_at(shape, k, n), n % TILE);
    }
  }
}

// The gradient that arrives at the last state, where one does.
template <typename T>
void start_carried(const ScanBackward<T>& pass, int64_t batch, int64_t block, const Carried& carried) {
  const Shape& shape = pass.in.shape;
  std::fill_n(carried.state, Carried::floats(shape), 0.f);
  if (!pass.grad_last_state) return;
  const float* from = pass.grad_last_state + (batch * shape.channels + block * WIDTH) * shape.states;
  for (int64_t lane = 0; lane < shape.blocks.lanes(block); ++lane)
    for (int64_t n = 0; n < shape.states; ++n) carried.state[n * WIDTH + lane] = from[lane * shape.states + n];
}

template <typename T>
void scan_backward_pass(const ScanBackward<T>& pass, const GatedGradient<T>& gate, const Task& task, int64_t run,
                        const Workspace& w) {
  const Shape& shape = pass.in.shape;
  const int64_t floats = Carried::floats(shape), sums = CHUNK * Workspace::sums(shape);
  const auto carried = [&](int64_t block) { return Carried(w.carried + (block - task.begin) * floats, shape); };
  for (int64_t block = task.begin; block < task.end; ++block) start_carried(pass, task.batch, block, carried(block));
  for (int64_t index = shape.chunks() - 1; index >= 0; --index) {
    std::fill_n(w.B, sums, 0.f);
    std::fill_n(w.C, sums, 0.f);
    for (int64_t block = task.begin; block < task.end; ++block)
      scan_backward_chunk(pass, gate, task, Chunk(pass.in, task.batch, block, index), w, carried(block));
    write_coefficients(pass, run, task.batch, index, w);
  }
  for (int64_t block = task.begin; block < task.end; ++block) {
    const Carried total = carried(block);
    const int64_t row = task.batch * shape.blocks.count() + block;
    std::copy_n(total.A, shape.block_state(), pass.A + row * shape.block_state());
    std::copy_n(total.skip, WIDTH, pass.skip + row * WIDTH);
    std::copy_n(total.bias, WIDTH, pass.bias + row * WIDTH);
  }
}

// One direction or two, of equal batch, length and channels.
template <typename T>
void scan_backward(const std::vector<ScanBackward<T>>& passes, const GatedGradient<T>& gate, int64_t runs) {
  const auto floats = [&](int64_t blocks) {
    int64_t most = 0;
    for (const auto& pass : passes) most = std::max(most, Workspace::floats(pass.in.shape, blocks));
    return most;
  };
  const bool keep = passes.size() > 1 && gate.z;
  for_each_task(passes.front().in.shape, runs, keep, floats, [&](Task task, int64_t run, Scratch& scratch) {
    float* const mark = scratch.mark();
    for (const auto& pass : passes) {
      task.first = &pass == &passes.front();
      task.last = &pass == &passes.back();
      scratch.reset(mark);
      scan_backward_pass(pass, gate, task, run, Workspace(scratch, pass.in.shape, task.blocks()));
    }
  });
}

}  // namespace videomamba
