// What the forward and the backward scan share: the problem, one chunk of positions, and the recurrence itself.
//
// A task is one sample and one block of WIDTH channels. It walks the positions in chunks of CHUNK; the state at the
// start of every chunk but the first is stored when a gradient is wanted, and the backward pass recomputes the rest.
// Inside a chunk the states are taken TILE at a time, so that they stay in registers; the number of states is padded
// to a multiple of TILE with zeros, which add nothing.
#pragma once

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

template <typename T>
struct ScanInput {
  Shape shape;
  Rows<const T> u, delta, z;  // z may be empty
  const float* decay;  // A * log2(e) as (block, state, WIDTH)
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

// One block of channels in one chunk of steps.
struct Chunk {
  int64_t batch, block, first, steps, lanes;

  template <typename T>
  Chunk(const ScanInput<T>& in, int64_t batch, int64_t block, int64_t index)
      : batch(batch),
        block(block),
        first(index * CHUNK),
        steps(std::min(CHUNK, in.shape.length - first)),
        lanes(in.shape.blocks.lanes(block)) {}
};

// What is known of each step of a chunk before the recurrence runs; every field is (CHUNK, WIDTH). `raw` is delta
// before softplus.
struct Steps {
  float *u, *raw, *delta, *drive, *y;
  static constexpr int64_t FLOATS = 5 * CHUNK * WIDTH;

  explicit Steps(Scratch& scratch)
      : u(scratch.take(CHUNK * WIDTH)),
        raw(scratch.take(CHUNK * WIDTH)),
        delta(scratch.take(CHUNK * WIDTH)),
                drive(scratch.take(CHUNK * WIDTH)),
        y(scratch.take(CHUNK * WIDTH)) {}
};

// Read u and delta, apply bias and softplus, and start y with D u.
template <typename T>
void prepare(const ScanInput<T>& in, const Chunk& chunk, const Steps& s) {
  const int64_t d = chunk.block * WIDTH;
  const Vec bias = in.bias ? load(in.bias + d, chunk.lanes) : Vec(0.f);
  const Vec skip = in.skip ? load(in.skip + d, chunk.lanes) : Vec(0.f);
  for (int64_t k = 0; k < chunk.steps; ++k) {
    const int64_t t = in.position(chunk.first + k);
    const Vec u = load(in.u.at(chunk.batch, t, d), chunk.lanes);
    const Vec raw = load(in.delta.at(chunk.batch, t, d), chunk.lanes) + bias;
    const Vec delta = in.softplus ? softplus(raw) : raw;
    store(s.u + k * WIDTH, u);
    store(s.raw + k * WIDTH, raw);
    store(s.delta + k * WIDTH, delta);
    store(s.drive + k * WIDTH, delta * u);
    store(s.y + k * WIDTH, in.skip ? u * skip : Vec(0.f));
  }
}

// What the backward pass wants to see again of one tile: the state before each step (and after the last), (CHUNK + 1,
// TILE, WIDTH), and the factor that each step multiplied it by, (CHUNK, TILE, WIDTH).
struct Record {
  float *before, *factor;
  static constexpr int64_t FLOATS = (2 * CHUNK + 1) * TILE * WIDTH;

  explicit Record(Scratch& scratch)
      : before(scratch.take((CHUNK + 1) * TILE * WIDTH)), factor(scratch.take(CHUNK * TILE * WIDTH)) {}
};

// h = 2^(delta a) h + drive B ;  y += C h, for TILE states over the steps of a chunk. `state` is read and written.
template <bool RECORD, typename T>
void scan_tile(const ScanInput<T>& in, const Chunk& chunk, const Steps& s, int64_t tile, float* state,
               const Record* record) {
  const float* decay = in.block_decay(chunk.block) + tile * WIDTH;
  const int64_t stride = in.coefficient_stride();
  const float* b = in.B + in.coefficients(chunk.batch, chunk.first) + tile;
  const float* c = in.C + in.coefficients(chunk.batch, chunk.first) + tile;
  Vec h[TILE], a[TILE];
  for (int64_t n = 0; n < TILE; ++n) {
    h[n] = load(state + n * WIDTH);
    a[n] = load(decay + n * WIDTH);
  }
  for (int64_t k = 0; k < chunk.steps; ++k, b += stride, c += stride) {
    const Vec delta = load(s.delta + k * WIDTH), drive = load(s.drive + k * WIDTH);
    Vec y = load(s.y + k * WIDTH);
#pragma GCC unroll 8
    for (int64_t n = 0; n < TILE; ++n) {
      const Vec factor = exp2(delta * a[n]);
      if constexpr (RECORD) {
        store(record->before + (k * TILE + n) * WIDTH, h[n]);
        store(record->factor + (k * TILE + n) * WIDTH, factor);
      }
      h[n] = at::vec::fmadd(factor, h[n], drive * Vec(b[n]));
      y = at::vec::fmadd(h[n], Vec(c[n]), y);
    }
    store(s.y + k * WIDTH, y);
  }
  for (int64_t n = 0; n < TILE; ++n) {
    store(state + n * WIDTH, h[n]);
    if constexpr (RECORD) store(record->before + (chunk.steps * TILE + n) * WIDTH, h[n]);
  }
}

}  // namespace videomamba
