// Numbers in float and bf16, memory, and oneDNN's product of small matrices.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace c10 {
struct BFloat16 {
  uint16_t x;
};
}  // namespace c10
using bf16 = c10::BFloat16;

namespace at::native::cpublas {  // of libtorch_cpu: C (M, N) = A (M, K) B (K, N) [+ C], sums in fp32
void brgemm(int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add, const bf16* a,
            const bf16* b, float* c, bool vnni);
void brgemm(int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add, const float* a,
            const float* b, float* c, bool vnni);
void brgemm_release(bool vnni);
}  // namespace at::native::cpublas

namespace {

template <class T>
constexpr int64_t PAIR = sizeof(uint32_t) / sizeof(T);  // entries of T in 32 bits

float wide(float v) { return v; }
float wide(bf16 v) {
  const uint32_t bits = uint32_t(v.x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
uint32_t bits(bf16 v) { return v.x; }
uint32_t bits(float v) {  // of its bf16: to nearest, ties to even; NaN stays NaN
  uint32_t all;
  std::memcpy(&all, &v, 4);
  const uint32_t rounded = (all + 0x7fffu + ((all >> 16) & 1u)) >> 16;
  return (all & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded;
}
void narrow(float v, float& out) { out = v; }
void narrow(float v, bf16& out) { out.x = uint16_t(bits(v)); }

void narrow(const float* in, int64_t n, float* out) { std::memcpy(out, in, n * sizeof(float)); }
void narrow(const float* in, int64_t n, bf16* out) {
  int64_t i = 0;
#ifdef __AVX512BF16__
  for (; i + 32 <= n; i += 32) {
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(in + i + 16), _mm512_loadu_ps(in + i));
    std::memcpy(out + i, &both, 64);
  }
#endif
  for (; i < n; ++i) narrow(in[i], out[i]);
}

template <class T>
void product(int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add, const T* a,
             const T* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, ld_a, ld_b, ld_c, add, a, b, c, PAIR<T> == 2);
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
struct Buffer : std::unique_ptr<T[], Free> {
  explicit Buffer(int64_t n)
      : std::unique_ptr<T[], Free>(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) / 64 + 1) * 64))) {
    if (!*this) throw std::bad_alloc();
  }
};

template <class T>
class Scratch {  // a thread's own, kept for its next job
  std::unique_ptr<Buffer<T>> held;
  int64_t size = 0;

 public:
  T* get(int64_t n) {
    if (n > size) held = std::make_unique<Buffer<T>>(size = n);
    return held->get();
  }
};

// e^y for y <= 0
inline float exponential(float y) {
  y = y < -87.0f ? -87.0f : y;
  const float n = std::nearbyint(y * 1.44269504f);
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}

// The normal distribution function and e^(-x^2/2): Abramowitz and Stegun 7.1.26, within 8e-8
inline void normal(float x, float& below, float& bell) {
  const float z = std::fabs(x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
  bell = exponential(-z * z);
  float sum = -1.453152027f + t * 1.061405429f;
  sum = 1.421413741f + t * sum;
  sum = -0.284496736f + t * sum;
  sum = 0.254829592f + t * sum;
  const float above = 0.5f * t * sum * bell;
  below = x < 0.0f ? above : 1.0f - above;
}

}  // namespace
