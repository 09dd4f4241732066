// How a (batch, length, channels) tensor is read: rows of adjacent channels, whatever the strides above them.
#pragma once

#include <ATen/core/Tensor.h>

#include "vectors.h"

namespace videomamba {

constexpr size_t OWN_CACHE = 1 << 20;

template <typename T>
struct Rows {
  T* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0;
  bool large = false;  // beyond what the core's own cache holds

  Rows() = default;
  explicit Rows(const at::Tensor& x_BLD)
      : data(static_cast<T*>(x_BLD.data_ptr())),
        batch_stride(x_BLD.stride(0)),
        row_stride(x_BLD.stride(1)),
        large(x_BLD.nbytes() > OWN_CACHE) {
    TORCH_CHECK(x_BLD.stride(2) == 1 || x_BLD.size(2) == 1, "expected adjacent channels, not strides ", x_BLD.strides());
  }

  explicit operator bool() const {
    return data != nullptr;
  }
  T* at(int64_t b, int64_t t, int64_t d) const {
    return data + b * batch_stride + t * row_stride + d;
  }
  // Rows one after another from one of them, forwards or back.
  struct Walk {
    T* first;
    int64_t stride;

    T* operator[](int64_t k) const {
      return first + k * stride;
    }
  };
  Walk walk(int64_t b, int64_t t, int64_t d, bool reverse) const {
    return {at(b, t, d), reverse ? -row_stride : row_stride};
  }
  // Rows lie far apart, so that the processor does not foresee which it will be asked for; any address is harmless.
  void prefetch(int64_t b, int64_t t, int64_t d) const {
    __builtin_prefetch(at(b, t, d));
  }
};

template <typename T>
C10_ALWAYS_INLINE void write(T* p, Vec x, int64_t lanes, bool large) {
  large ? stream(p, x, lanes) : store(p, x, lanes);
}

// The blocks of WIDTH channels that a tensor's last dimension is cut into.
struct Blocks {
  int64_t channels;

  int64_t count() const {
    return (channels + WIDTH - 1) / WIDTH;
  }
  int64_t lanes(int64_t block) const {
    return std::min(WIDTH, channels - block * WIDTH);
  }
};

// Floats aligned to a cache line, not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : memory_(new float[floats + 16]) {
    auto address = reinterpret_cast<uintptr_t>(memory_.get());
    next_ = memory_.get() + ((64 - address % 64) % 64) / sizeof(float);
  }
  float* take(int64_t floats) {
    float* taken = next_;
    next_ += floats;
    return taken;
  }
  // What was taken after a mark is given back by a reset to it.
  float* mark() const {
    return next_;
  }
  void reset(float* mark) {
    next_ = mark;
  }

 private:
  std::unique_ptr<float[]> memory_;
  float* next_;
};

}  // namespace videomamba
