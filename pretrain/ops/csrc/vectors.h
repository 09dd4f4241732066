// One vector of channels in float32, of whatever width the machine has: loads, stores and the few functions needed.
//
// NaN in must give NaN out, so nothing here is compiled with -ffast-math, and clamps keep their NaN operand.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>

namespace videomamba {

using Vec = at::vec::Vectorized<float>;
using c10::BFloat16;

constexpr int64_t WIDTH = Vec::size();
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

inline void store(BFloat16* p, Vec x, int64_t lanes = WIDTH) {
#if defined(CPU_CAPABILITY_AVX512)
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

// 2^r on [-1/2, 1/2], relative error below 1e-7, and below 3e-9 near r = 0: decays close to 1 carry a state furthest.
inline Vec exp2_fraction(Vec r) {
  Vec p(0.00132647323f);
  p = at::vec::fmadd(p, r, Vec(0.00967151444f));
  p = at::vec::fmadd(p, r, Vec(0.0555073375f));
  p = at::vec::fmadd(p, r, Vec(0.240222421f));
  p = at::vec::fmadd(p, r, Vec(0.693146978f));
  return at::vec::fmadd(p, r, Vec(1.f));
}

// 2^x. The scan takes one for every channel, state and position: it is what the time goes into.
inline Vec exp2(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  constexpr int NEAREST = 0x8;  // to the nearest integer, raising no exception
  const Vec p = exp2_fraction(_mm512_reduce_ps(x, NEAREST));  // of x less the nearest integer; 0 at the infinities
  return _mm512_scalef_ps(p, _mm512_roundscale_ps(x, NEAREST));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256 clamped = _mm256_min_ps(_mm256_set1_ps(128.f), _mm256_max_ps(_mm256_set1_ps(-127.f), x));
  const __m256 nearest = _mm256_round_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec p = exp2_fraction(_mm256_sub_ps(clamped, nearest));
  // 2^nearest from its exponent field: 0 gives zero, 255 infinity; a NaN stays in p.
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(nearest), _mm256_set1_epi32(127));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
#else
  return x.exp2();
#endif
}

inline Vec exp(Vec x) {
  return exp2(x * Vec(LOG2_E));
}

inline Vec sigmoid(Vec x) {
  return Vec(1.f) / (Vec(1.f) + exp(x.neg()));
}

// log(1 + e) for e in [0, 1], relative error below 2e-7 also where e is tiny.
inline Vec log1p_fraction(Vec e) {
  constexpr float COEFFICIENTS[] = {-0.0300655472f, 0.0792041675f, -0.137537738f, 0.191536428f,
                                    -0.248571609f,  0.333213223f,  -0.49999648f,  1.f};
  Vec p(0.0053647585f);
  for (float coefficient : COEFFICIENTS) p = at::vec::fmadd(p, e, Vec(coefficient));
  return p * e;
}

// log(1 + e^x) without overflow.
inline Vec softplus(Vec x) {
  return at::vec::maximum(x, Vec(0.f)) + log1p_fraction(exp(x.abs().neg()));
}

inline float sum(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_reduce_add_ps(x);
#else
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, x);
#endif
}

}  // namespace videomamba
