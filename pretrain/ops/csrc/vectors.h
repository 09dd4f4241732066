// One vector of channels in float32, of whatever width the machine has: loads, stores and the few functions needed.
//
// NaN in must give NaN out, so nothing here is compiled with -ffast-math, and clamps keep their NaN operand.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

namespace videomamba {

using Vec = at::vec::Vectorized<float>;
using c10::BFloat16;

constexpr int64_t WIDTH = Vec::size();
// {f(0), ..., f(COUNT - 1)} and, for its effects alone, f(0), ..., f(COUNT - 1): written out, since only vectors that
// are made in place and indexed by constants stay in registers (an array of Vec would be filled with zeros by a loop).
template <int64_t COUNT, typename F>
C10_ALWAYS_INLINE auto tabulate(const F& f) {
  return [&]<int64_t... N>(std::integer_sequence<int64_t, N...>) C10_ALWAYS_INLINE_ATTRIBUTE {
    return std::array{f(std::integral_constant<int64_t, N>{})...};
  }(std::make_integer_sequence<int64_t, COUNT>{});
}

template <int64_t COUNT, typename F>
C10_ALWAYS_INLINE void unroll(const F& f) {
  [&]<int64_t... N>(std::integer_sequence<int64_t, N...>) C10_ALWAYS_INLINE_ATTRIBUTE {
    (f(std::integral_constant<int64_t, N>{}), ...);
  }(std::make_integer_sequence<int64_t, COUNT>{});
}

constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LN_2 = 0.69314718055994531f;

// The first `lanes` elements at p, zeros after them. `lanes` is below WIDTH only in the last block of channels.
inline Vec load(const float* p, int64_t lanes = WIDTH) {
  return lanes == WIDTH ? Vec::loadu(p) : Vec::loadu(p, lanes);
}

inline Vec load(const BFloat16* p, int64_t lanes = WIDTH) {
  BFloat16 copy[WIDTH] = {};
  if (lanes != WIDTH) {
    std::memcpy(copy, p, lanes * sizeof(BFloat16));
    p = copy;
  }
  Vec out;
  at::vec::load_to_float<BFloat16>(p, out);
  return out;
}

inline void store(float* p, Vec x, int64_t lanes = WIDTH) {
  lanes == WIDTH ? x.store(p) : x.store(p, static_cast<int>(lanes));
}

// Past the caches, for what would not stay in them: a line that is written whole need not be read first, and pushes
// nothing out. `drain` before another thread reads it.
inline void stream(float* p, Vec x, int64_t lanes = WIDTH) {
#if defined(CPU_CAPABILITY_AVX512)
  if (lanes == WIDTH && reinterpret_cast<uintptr_t>(p) % 64 == 0) {
    _mm512_stream_ps(p, x);
    return;
  }
#endif
  store(p, x, lanes);
}

inline void store(BFloat16* p, Vec x, int64_t lanes = WIDTH) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  if (lanes == WIDTH) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
    return;
  }
#elif defined(CPU_CAPABILITY_AVX512)
  if (lanes == WIDTH) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), at::vec::cvtfp32_bf16(x));
    return;
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if (lanes == WIDTH) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), at::vec::cvtfp32_bf16(x));
    return;
  }
#endif
  at::vec::convert_from_float<BFloat16>(x, x).store(p, static_cast<int>(lanes));
}

inline void stream(BFloat16* p, Vec x, int64_t lanes = WIDTH) {
  store(p, x, lanes);  // half a line
}

inline void drain() {
#if defined(CPU_CAPABILITY_AVX512)
  _mm_sfence();
#endif
}

// Several vectors that the same is done to, one operation after another for all of them. Of the long chains of
// operations below the processor sees hardly two at a time: one vector after another, it would wait for each.
template <size_t COUNT>
using Pack = std::array<Vec, COUNT>;

template <typename F, size_t COUNT, typename... Packs>
C10_ALWAYS_INLINE auto each(const F& f, const Pack<COUNT>& x, const Packs&... more) {
  return tabulate<COUNT>([&](auto k) C10_ALWAYS_INLINE_ATTRIBUTE { return f(x[k], more[k]...); });
}

// c[0] x^n + ... + c[n].
template <size_t COUNT, size_t TERMS>
C10_ALWAYS_INLINE Pack<COUNT> polynomial(const std::array<float, TERMS>& c, const Pack<COUNT>& x) {
  Pack<COUNT> p = each([&](Vec) { return Vec(c[0]); }, x);
  unroll<TERMS - 1>([&](auto i) C10_ALWAYS_INLINE_ATTRIBUTE {
    p = each([&](Vec sum, Vec v) { return at::vec::fmadd(sum, v, Vec(c[i + 1])); }, p, x);
  });
  return p;
}

template <size_t TERMS>
C10_ALWAYS_INLINE Vec polynomial(const std::array<float, TERMS>& c, Vec x) {
  Vec p(c[0]);
  unroll<TERMS - 1>([&](auto i) C10_ALWAYS_INLINE_ATTRIBUTE { p = at::vec::fmadd(p, x, Vec(c[i + 1])); });
  return p;
}

// 2^r on [-1/2, 1/2], relative error below 1e-7, and below 3e-9 near r = 0: decays close to 1 carry a state furthest.
constexpr std::array EXP2_FRACTION{0.00132647323f, 0.00967151444f, 0.0555073375f, 0.240222421f, 0.693146978f, 1.f};

// x less the nearest integer, 0 at the infinities; and p times 2 to that integer.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int NEAREST = 0x8;  // raising no exception

C10_ALWAYS_INLINE Vec fraction(Vec x) {
  return _mm512_reduce_ps(x, NEAREST);
}

C10_ALWAYS_INLINE Vec times_exp2(Vec p, Vec x) {
  return _mm512_scalef_ps(p, _mm512_roundscale_ps(x, NEAREST));
}
#elif defined(CPU_CAPABILITY_AVX2)
C10_ALWAYS_INLINE Vec within_floats(Vec x) {
  return _mm256_min_ps(_mm256_set1_ps(128.f), _mm256_max_ps(_mm256_set1_ps(-127.f), x));
}

C10_ALWAYS_INLINE Vec nearest(Vec x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

C10_ALWAYS_INLINE Vec fraction(Vec x) {
  return within_floats(x) - nearest(within_floats(x));
}

C10_ALWAYS_INLINE Vec times_exp2(Vec p, Vec x) {
  // The integer as an exponent field: 0 gives zero, 255 infinity; a NaN stays in p.
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(nearest(within_floats(x))), _mm256_set1_epi32(127));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
#else
C10_ALWAYS_INLINE Vec fraction(Vec x) {
  return x;
}

C10_ALWAYS_INLINE Vec times_exp2(Vec, Vec x) {
  return x.exp2();  // the whole of it
}
#endif

// 2^x, at the infinities as well.
template <size_t COUNT>
C10_ALWAYS_INLINE Pack<COUNT> exp2(const Pack<COUNT>& x) {
  return each(times_exp2, polynomial(EXP2_FRACTION, each(fraction, x)), x);
}

C10_ALWAYS_INLINE Vec exp2(Vec x) {
  return times_exp2(polynomial(EXP2_FRACTION, fraction(x)), x);
}

// 2^x for finite x; NaN at the infinities. The scan takes one for every channel, state and position: it is what the
// time goes into, and the subtraction costs half of what `reduce` does.
C10_ALWAYS_INLINE Vec exp2_finite(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 nearest = _mm512_roundscale_ps(x, NEAREST);
  return _mm512_scalef_ps(polynomial(EXP2_FRACTION, Vec(_mm512_sub_ps(x, nearest))), nearest);
#else
  return exp2(x);
#endif
}

// 1 / x for x from 1 to 2^126; a division takes several times as long.
C10_ALWAYS_INLINE Vec inverse(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  const Vec near = _mm512_rcp14_ps(x);  // to 2^-14, which one step of Newton's squares
  return at::vec::fmadd(near, at::vec::fnmadd(x, near, Vec(1.f)), near);
#else
  return Vec(1.f) / x;
#endif
}

// x, or the bound that it is above; a NaN stays.
C10_ALWAYS_INLINE Vec at_most(Vec x, float bound) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_min_ps(Vec(bound), x);
#else
  return at::vec::minimum(x, Vec(bound));
#endif
}

template <size_t COUNT>
C10_ALWAYS_INLINE Pack<COUNT> sigmoid(const Pack<COUNT>& x) {
  const auto e = exp2(each([](Vec v) { return at_most(v * Vec(-LOG2_E), 126.f); }, x));
  return each([](Vec v) { return inverse(Vec(1.f) + v); }, e);
}

// Of one vector by itself, which waits less for a division than for Newton's step.
inline Vec sigmoid(Vec x) {
  return Vec(1.f) / (Vec(1.f) + exp2(x * Vec(-LOG2_E)));
}

// log(1 + e) / e on [0, 1], relative error below 2e-7.
constexpr std::array LOG1P_RATIO{0.0053647585f,  -0.0300655472f, 0.0792041675f, -0.137537738f, 0.191536428f,
                                 -0.248571609f, 0.333213223f,   -0.49999648f,  1.f};

template <size_t COUNT>
struct Softplus {
  Pack<COUNT> value, slope;
};

// log(1 + e^x) without overflow, and its derivative where it is wanted, from one exponential.
template <bool SLOPE, size_t COUNT>
C10_ALWAYS_INLINE Softplus<COUNT> softplus(const Pack<COUNT>& x) {
  const auto e = exp2(each([](Vec v) { return v.abs() * Vec(-LOG2_E); }, x));
  const auto value = [](Vec v, Vec e, Vec ratio) { return at::vec::fmadd(e, ratio, at::vec::maximum(v, Vec(0.f))); };
  const auto slope = [](Vec v, Vec e) {
    return Vec::blendv(e, Vec(1.f), v >= Vec(0.f)) * inverse(Vec(1.f) + e);
  };
  Softplus<COUNT> out{each(value, x, e, polynomial(LOG1P_RATIO, e)), x};
  if constexpr (SLOPE) out.slope = each(slope, x, e);
  return out;
}

inline float sum(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_reduce_add_ps(x);
#else
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, x);
#endif
}

// Where the lanes of eight vectors are summed, each vector by itself: two partial sums a vector with AVX-512, one
// elsewhere. A tree of shuffles does it for the price of less than three instructions a vector.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t EIGHT_SUMS = 16;

inline void add_eight_sums(const std::array<Vec, 8>& v, float* sums) {
  const auto pair = [](__m512 a, __m512 b) {
    return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  };
  const auto quad = [](__m512d a, __m512d b) {
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  };
  const __m512 low = quad(pair(v[0], v[1]), pair(v[2], v[3])), high = quad(pair(v[4], v[5]), pair(v[6], v[7]));
  const __m512 even = _mm512_shuffle_f32x4(low, high, 0x88), odd = _mm512_shuffle_f32x4(low, high, 0xdd);
  _mm512_store_ps(sums, _mm512_add_ps(_mm512_load_ps(sums), _mm512_add_ps(even, odd)));
}

inline float eight_sums(const float* sums, int64_t i) {
  return sums[i / 4 * 8 + i % 4] + sums[i / 4 * 8 + 4 + i % 4];
}
#else
constexpr int64_t EIGHT_SUMS = 8;

inline void add_eight_sums(const std::array<Vec, 8>& v, float* sums) {
#if defined(CPU_CAPABILITY_AVX2)
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  const __m256 even = _mm256_permute2f128_ps(low, high, 0x20), odd = _mm256_permute2f128_ps(low, high, 0x31);
  _mm256_store_ps(sums, _mm256_add_ps(_mm256_load_ps(sums), _mm256_add_ps(even, odd)));
#else
  for (int i = 0; i < 8; ++i) sums[i] += sum(v[i]);
#endif
}

inline float eight_sums(const float* sums, int64_t i) {
  return sums[i];
}
#endif

}  // namespace videomamba
