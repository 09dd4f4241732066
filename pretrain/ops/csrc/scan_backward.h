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

// The gradient before the gate, and the sum for D.
template <typename T>
void prepare_gradients(const ScanInput<T>& in, const GatedGradient<T>& gate, const Chunk& chunk, const Workspace& w,
                       const Carried& carried) {
  const int64_t lanes = chunk.lanes;
  const auto y_rows = chunk.rows_of(gate.grad_y, in), z_rows = chunk.rows_of(gate.z, in);
  const bool gated(gate.z);
  const StepGradients g = w.gradients;  // a copy, which no store of a vector can change
  const float* const u_of = w.steps.u;
  Vec grad_skip = load(carried.skip);
  in_groups(chunk.steps, [&](int64_t k, auto size) C10_ALWAYS_INLINE_ATTRIBUTE {
    auto y = load_rows<size()>(y_rows, k, lanes);
    if (gated) {
      const auto z = load_rows<size()>(z_rows, k, lanes), open = sigmoid(z);
      const auto slope = [](Vec z, Vec open) { return open * at::vec::fmadd(z, Vec(1.f) - open, Vec(1.f)); };
      store_steps(g.z, k, each([&](Vec y, Vec z, Vec open) { return y * slope(z, open); }, y, z, open));
      y = each([](Vec y, Vec z, Vec open) { return y * z * open; }, y, z, open);
    }
    store_steps(g.y, k, y);
    unroll<size()>([&](auto i) C10_ALWAYS_INLINE_ATTRIBUTE {
      grad_skip = at::vec::fmadd(y[i], load(u_of + (k + i) * WIDTH), grad_skip);
    });
  });
  store(carried.skip, grad_skip);
}

// The recurrence of `scan_tile`, backwards. `state`: gradient of the state after the chunk on entry, before it on exit.
// The first tile of a chunk begins the sums over states, the others add to them; after(k, ...) takes those of a step.
template <typename T, typename After>
C10_ALWAYS_INLINE void scan_tile_backward(const ScanInput<T>& in, const Chunk& chunk, const Workspace& space,
                                          int64_t tile, float* state, float* A, const After& after) {
  const int64_t stride = in.coefficient_stride();
  const float* decay = in.block_decay(chunk.block) + tile * WIDTH;
  const int64_t last = in.coefficients(chunk.batch, chunk.first) + (chunk.steps - 1) * stride + tile;
  const float *b = in.B + last, *c = in.C + last;
  const Workspace w = space;  // a copy, which no store of a vector can change
  float* const sums = w.B_at(in.shape, 0, tile);
  const int64_t sums_stride = Workspace::sums(in.shape);
  auto q = load_tile(state), grad_A = load_tile(A);
  for (int64_t k = chunk.steps - 1; k >= 0; --k, b -= stride, c -= stride) {
    const Vec grad_y = load(w.gradients.y + k * WIDTH);
    const Vec delta = load(w.steps.delta + k * WIDTH), drive = load(w.steps.drive + k * WIDTH);
    Vec grad_drive = tile ? load(w.gradients.drive + k * WIDTH) : Vec(0.f);
    Vec grad_exponent = tile ? load(w.gradients.exponent + k * WIDTH) : Vec(0.f);
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
    add_eight_sums(grad_B, sums + k * sums_stride);
    after(k, grad_drive, grad_exponent);
  }
  store_tile(state, q);
  store_tile(A, grad_A);
}

// The gradients of u and delta, and the sum for the bias.
template <typename T>
auto finish_gradients(const ScanBackward<T>& pass, const Chunk& chunk, const Workspace& w, const Carried& carried) {
  const ScanInput<T>& in = pass.in;
  const auto u_rows = chunk.rows_of(pass.u, in), delta_rows = chunk.rows_of(pass.delta, in);
  const bool soft = in.softplus, large = pass.u.large;
  const int64_t lanes = chunk.lanes;
  const Vec skip = in.skip ? load(in.skip + chunk.channel(), lanes) : Vec(0.f);
  const float *const u = w.steps.u, *const delta = w.steps.delta;
  const float *const y = w.gradients.y, *const slope = w.gradients.slope;
  float* const bias = carried.bias;
  return [=](int64_t k, Vec grad_drive, Vec grad_exponent) C10_ALWAYS_INLINE_ATTRIBUTE {
    const int64_t at = k * WIDTH;
    const Vec grad_u = at::vec::fmadd(grad_drive, load(delta + at), load(y + at) * skip);
    Vec grad_delta = at::vec::fmadd(grad_drive, load(u + at), grad_exponent * Vec(LN_2));
    if (soft) grad_delta = grad_delta * load(slope + at);
    write(u_rows[k], grad_u, lanes, large);
    write(delta_rows[k], grad_delta, lanes, large);
    store(bias, load(bias) + grad_delta);
  };
}

// The gradient of z, once the y of every direction is known.
template <typename T>
auto finish_gate(const ScanInput<T>& in, const GatedGradient<T>& gate, const Task& task, const Chunk& chunk,
                 const Workspace& w) {
  const auto kept = chunk.kept_by(task, in);
  const auto rows = chunk.rows_of(gate.grad_z, in);
  const float* const slope = w.gradients.z;
  const bool gated(gate.z), adds = !task.first, ends = task.last, large = gate.grad_z.large;
  const int64_t lanes = chunk.lanes;
  return [=](int64_t k, Vec y) C10_ALWAYS_INLINE_ATTRIBUTE {
    if (!gated) return;
    if (!ends) return store(kept[k], y);
    if (adds) y = y + load(kept[k]);
    write(rows[k], y * load(slope + k * WIDTH), lanes, large);
  };
}

// The states at the start of a chunk.
inline void load_states(const Shape& shape, const Chunk& chunk, const float* stored, float* state) {
  std::fill_n(state, shape.block_state(), 0.f);
  const int64_t index = chunk.first / CHUNK;
  if (index == 0) return;
  const float* from = stored + shape.stored_state(chunk.batch, index, chunk.block);
  for (int64_t n = 0; n < shape.states; ++n) store(state + n * WIDTH, load(from + n * shape.channels, chunk.lanes));
}

// A tile of a chunk forwards and back, the last one of them or not; `next` is read ahead.
template <bool LAST, typename T>
void scan_backward_tile(const ScanBackward<T>& pass, const GatedGradient<T>& gate, const Task& task,
                        const Chunk& chunk, const Chunk& next, const Workspace& w, const Carried& carried,
                        int64_t tile) {
  const ScanInput<T>& in = pass.in;
  const Shape& shape = in.shape;
  const Record record{w.before, w.factor, w.gradients.y, w.C_at(shape, 0, tile), Workspace::sums(shape)};
  float *const h = w.state + tile * WIDTH, *const q = carried.state + tile * WIDTH, *const A = carried.A + tile * WIDTH;
  if constexpr (LAST) {
    const auto u = next.rows_of(in.u, in), delta = next.rows_of(in.delta, in), y = next.rows_of(gate.grad_y, in);
    const auto z = gate.z ? next.rows_of(gate.z, in) : y;
    const float* const states = pass.states + shape.stored_state(next.batch, next.first / CHUNK, next.block);
    const auto last = finish_gate(in, gate, task, chunk, w);
    const auto last_gradients = finish_gradients(pass, chunk, w, carried);
    scan_tile<true>(in, chunk, w.steps, tile, h, record, [=](int64_t k, Vec sum) C10_ALWAYS_INLINE_ATTRIBUTE {
      last(k, sum);
      __builtin_prefetch(u[k]), __builtin_prefetch(delta[k]), __builtin_prefetch(states + k * shape.channels);
    });
    scan_tile_backward(in, chunk, w, tile, q, A, [=](int64_t k, Vec drive, Vec exponent) C10_ALWAYS_INLINE_ATTRIBUTE {
      last_gradients(k, drive, exponent);
      __builtin_prefetch(y[k]), __builtin_prefetch(z[k]);
    });
  } else {
    float *const y = w.steps.y, *const grad_drive = w.gradients.drive, *const grad_exponent = w.gradients.exponent;
    scan_tile<true>(in, chunk, w.steps, tile, h, record, [=](int64_t k, Vec sum) C10_ALWAYS_INLINE_ATTRIBUTE {
      store(y + k * WIDTH, sum);
    });
    scan_tile_backward(in, chunk, w, tile, q, A, [=](int64_t k, Vec drive, Vec exponent) C10_ALWAYS_INLINE_ATTRIBUTE {
      store(grad_drive + k * WIDTH, drive);
      store(grad_exponent + k * WIDTH, exponent);
    });
  }
}

template <typename T>
void scan_backward_chunk(const ScanBackward<T>& pass, const GatedGradient<T>& gate, const Task& task,
                         const Chunk& chunk, const Chunk& next, const Workspace& w, const Carried& carried) {
  load_states(pass.in.shape, chunk, pass.states, w.state);
  prepare<true>(pass.in, chunk, w.steps, w.gradients.slope);
  prepare_gradients(pass.in, gate, chunk, w, carried);
  const int64_t last = pass.in.shape.padded_states() - TILE;
  for (int64_t tile = 0; tile < last; tile += TILE)
    scan_backward_tile<false>(pass, gate, task, chunk, next, w, carried, tile);
  scan_backward_tile<true>(pass, gate, task, chunk, next, w, carried, last);
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
    for_each_chunk(shape, task, index, -1, [&](const Chunk& chunk, const Chunk& next) {
      scan_backward_chunk(pass, gate, task, chunk, next, w, carried(chunk.block));
    });
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
