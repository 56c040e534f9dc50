// One vector of the widest registers of the ISA this file is compiled for, over GCC/Clang vector extensions.
//
// The struct around the raw vector matters twice: unqualified calls on raw vectors are not found at template
// instantiation, and a function that takes the struct by value keeps the value in a register.
// Everything is always_inline and sits in a per-ISA namespace, so nothing compiled for one ISA can be picked by the
// linker for another.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FASTPE_INLINE inline __attribute__((always_inline))

namespace fastpe::cpu::FASTPE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
constexpr int kNV = 4;  // vectors of a micro-kernel's row: 6 x 4 accumulators + 4 operands of 32 registers
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
constexpr int kNV = 2;  // 6 x 2 accumulators + 2 operands of 16 registers
#else
constexpr int kVecBytes = 16;
constexpr int kNV = 2;
#endif

// Concrete vector types: GCC drops vector_size from a type that depends on a template parameter in some signatures.
template <class S> struct RawOf;
template <> struct RawOf<float> {
  typedef float F __attribute__((vector_size(kVecBytes)));
  typedef int32_t I __attribute__((vector_size(kVecBytes)));
  typedef float U __attribute__((vector_size(kVecBytes), aligned(4), may_alias));
};
template <> struct RawOf<double> {
  typedef double F __attribute__((vector_size(kVecBytes)));
  typedef int64_t I __attribute__((vector_size(kVecBytes)));
  typedef double U __attribute__((vector_size(kVecBytes), aligned(8), may_alias));
};

template <class S>
struct Vec {
  using Scalar = S;
  static constexpr int kLanes = kVecBytes / int(sizeof(S));
  using Raw = typename RawOf<S>::F;
  using RawInt = typename RawOf<S>::I;
  using RawU = typename RawOf<S>::U;
  Raw v;

  FASTPE_INLINE Vec() {}
  FASTPE_INLINE Vec(Raw r) : v(r) {}
  FASTPE_INLINE Vec(S x) : v(splat(x)) {}
  // One load with broadcast where x is in memory. (Raw{} + x would add to 0 first, on the units that multiply and add: a
  // product ran at 65 % of the FMA rate so.)
  static FASTPE_INLINE Raw splat(S x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(S) == 4) return Raw(_mm512_set1_ps(x));
    else return Raw(_mm512_set1_pd(x));
#elif defined(__AVX2__)
    if constexpr (sizeof(S) == 4) return Raw(_mm256_set1_ps(x));
    else return Raw(_mm256_set1_pd(x));
#else
    Raw r;
    for (int l = 0; l < kLanes; ++l) r[l] = x;
    return r;
#endif
  }
  static FASTPE_INLINE Vec load(const S* p) { return Vec(Raw(*reinterpret_cast<const RawU*>(p))); }
  FASTPE_INLINE void store(S* p) const { *reinterpret_cast<RawU*>(p) = v; }
  // 0, 1, 2, ...
  static FASTPE_INLINE Vec iota() {
    struct Table {
      alignas(kVecBytes) S at[kLanes];
      constexpr Table() : at{} {
        for (int l = 0; l < kLanes; ++l) at[l] = S(l);
      }
    };
    static constexpr Table table;
    return load(table.at);
  }
  friend FASTPE_INLINE Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
  friend FASTPE_INLINE Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
  friend FASTPE_INLINE Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
  friend FASTPE_INLINE Vec operator/(Vec a, Vec b) { return Vec(a.v / b.v); }
  FASTPE_INLINE Vec operator-() const { return Vec(-v); }
};

// Lane numbers f(0), f(1), ... as a constant in memory: built element by element they became a chain of masked broadcasts, half
// of the time of a transposition.
template <class S, class F>
FASTPE_INLINE typename Vec<S>::RawInt lanes_of(F) {
  constexpr int L = Vec<S>::kLanes;
  using Int = std::conditional_t<sizeof(S) == 8, int64_t, int32_t>;
  struct Table {
    alignas(kVecBytes) Int at[L];
    constexpr Table() : at{} {
      for (int l = 0; l < L; ++l) at[l] = F{}(l);
    }
  };
  static constexpr Table table;
  typename Vec<S>::RawInt r;
  std::memcpy(&r, table.at, sizeof(r));
  return r;
}

// Lane masks: all bits of a lane set or clear.
template <class S>
struct Mask {
  using RawInt = typename Vec<S>::RawInt;
  RawInt m;
  friend FASTPE_INLINE Mask operator&(Mask a, Mask b) { return {a.m & b.m}; }
  friend FASTPE_INLINE Mask operator|(Mask a, Mask b) { return {a.m | b.m}; }
};
template <class S> FASTPE_INLINE Mask<S> operator<(Vec<S> a, Vec<S> b) { return {a.v < b.v}; }
template <class S> FASTPE_INLINE Mask<S> operator>(Vec<S> a, Vec<S> b) { return {a.v > b.v}; }
template <class S> FASTPE_INLINE Mask<S> operator>=(Vec<S> a, Vec<S> b) { return {a.v >= b.v}; }
template <class S> FASTPE_INLINE Mask<S> operator==(Vec<S> a, Vec<S> b) { return {a.v == b.v}; }
template <class S> FASTPE_INLINE Vec<S> select(Mask<S> m, Vec<S> a, Vec<S> b) { return Vec<S>(m.m ? a.v : b.v); }
// A bit for every lane that is set.
template <class S> FASTPE_INLINE uint32_t bits(Mask<S> m) {
#if defined(__AVX512DQ__)
  if constexpr (sizeof(S) == 4) return _mm512_movepi32_mask((__m512i)m.m);
  else return _mm512_movepi64_mask((__m512i)m.m);
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) return uint32_t(_mm256_movemask_ps((__m256)m.m));
  else return uint32_t(_mm256_movemask_pd((__m256d)m.m));
#else
  uint32_t r = 0;
  for (int l = 0; l < Vec<S>::kLanes; ++l) r |= uint32_t(m.m[l] != 0) << l;
  return r;
#endif
}
template <class S> FASTPE_INLINE bool any(Mask<S> m) { return bits(m) != 0; }
template <class S> FASTPE_INLINE bool all(Mask<S> m) { return bits(m) == (uint32_t(1) << Vec<S>::kLanes) - 1; }

using VF = Vec<float>;
using VD = Vec<double>;

// a * b + c
FASTPE_INLINE VF fma(VF a, VF b, VF c) {
#if defined(__AVX512F__)
  return VF(VF::Raw(_mm512_fmadd_ps(__m512(a.v), __m512(b.v), __m512(c.v))));
#elif defined(__FMA__)
  return VF(VF::Raw(_mm256_fmadd_ps(__m256(a.v), __m256(b.v), __m256(c.v))));
#else
  return VF(a.v * b.v + c.v);
#endif
}
FASTPE_INLINE VD fma(VD a, VD b, VD c) {
#if defined(__AVX512F__)
  return VD(VD::Raw(_mm512_fmadd_pd(__m512d(a.v), __m512d(b.v), __m512d(c.v))));
#elif defined(__FMA__)
  return VD(VD::Raw(_mm256_fmadd_pd(__m256d(a.v), __m256d(b.v), __m256d(c.v))));
#else
  return VD(a.v * b.v + c.v);
#endif
}

// max(a, b) is b when either is NaN: max(constant, x) and max(state, x) keep a NaN of x.
FASTPE_INLINE VF max(VF a, VF b) {
#if defined(__AVX512F__)
  return VF(VF::Raw(_mm512_max_ps(__m512(a.v), __m512(b.v))));
#elif defined(__AVX2__)
  return VF(VF::Raw(_mm256_max_ps(__m256(a.v), __m256(b.v))));
#elif defined(__SSE2__)
  return VF(VF::Raw(_mm_max_ps(__m128(a.v), __m128(b.v))));
#else
  return VF(a.v > b.v ? a.v : b.v);
#endif
}
FASTPE_INLINE VD max(VD a, VD b) { return VD(a.v > b.v ? a.v : b.v); }
template <class S> FASTPE_INLINE Vec<S> min(Vec<S> a, Vec<S> b) { return Vec<S>(a.v < b.v ? a.v : b.v); }
FASTPE_INLINE VF abs(VF a) {
  return VF(VF::Raw(VF::RawInt(a.v) & 0x7fffffff));
}
FASTPE_INLINE VD abs(VD a) { return VD(VD::Raw(VD::RawInt(a.v) & 0x7fffffffffffffffll)); }

FASTPE_INLINE VF sqrt(VF a) {
#if defined(__AVX512F__)
  return VF(VF::Raw(_mm512_sqrt_ps(__m512(a.v))));
#elif defined(__AVX2__)
  return VF(VF::Raw(_mm256_sqrt_ps(__m256(a.v))));
#else
  for (int l = 0; l < VF::kLanes; ++l) a.v[l] = __builtin_sqrtf(a.v[l]);
  return a;
#endif
}
FASTPE_INLINE VD sqrt(VD a) {
  for (int l = 0; l < VD::kLanes; ++l) a.v[l] = __builtin_sqrt(a.v[l]);
  return a;
}

template <class S> FASTPE_INLINE S reduce_max(Vec<S> a) {
  S m = a.v[0];
  for (int l = 1; l < Vec<S>::kLanes; ++l) m = m > a.v[l] ? m : a.v[l];
  return m;
}
template <class S> FASTPE_INLINE S reduce_add(Vec<S> a) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return _mm512_reduce_add_ps(__m512(a.v));
  else return _mm512_reduce_add_pd(__m512d(a.v));
#else
#if defined(__AVX2__)
  if constexpr (sizeof(S) == 4) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(__m256(a.v)), _mm256_extractf128_ps(__m256(a.v), 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
#endif
  S s = 0;
  for (int l = 0; l < Vec<S>::kLanes; ++l) s += a.v[l];
  return s;
#endif
}

// 2^x of N vectors, for x < 127.5; NaN for NaN, 0 for -inf. Below -126 the result is 0 where subnormals are flushed (subnormal.h).
// Relative error 2e-7. Step by step for all vectors: a processor sees further ahead in so many short chains than in long ones.
template <int N>
FASTPE_INLINE void exp2_each(VF* x) {
  VF p[N];
#if defined(__AVX512DQ__)
  // vreduceps leaves x - floor(x) (0 for -inf), vscalefps multiplies by 2^floor(x): no rounding steps of our own.
  // Minimax polynomial of degree 5 with c0 = 1 on [0, 1], relative error 8.3e-8.
  constexpr float c[] = {1.f, 6.931513118e-1f, 2.401644501e-1f, 5.579991332e-2f, 9.017030019e-3f, 1.867130213e-3f};
  VF f[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) f[n] = VF(VF::Raw(_mm512_reduce_ps(__m512(x[n].v), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)));
#else
  // Minimax polynomial of degree 5 with c0 = 1 for 2^f on [-1/2, 1/2], relative error 9.2e-8.
  constexpr float c[] = {1.f, 6.931469776e-1f, 2.402224208e-1f, 5.550733744e-2f, 9.671512688e-3f, 1.326472725e-3f};
  // 1.5 * 2^23 + 127: its sum with x holds round(x) + 127 in the low bits, where a shift makes an exponent of it; that of -127 is
  // the number 0. A NaN passes through the polynomial.
  const VF magic(12583039.f);
  VF t[N], f[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) f[n] = max(VF(-127.f), x[n]);
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) t[n] = f[n] + magic;
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) f[n] = f[n] - (t[n] - magic);
#endif
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) p[n] = fma(VF(c[5]), f[n], VF(c[4]));
#pragma GCC unroll 4
  for (int k = 3; k >= 0; --k)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) p[n] = fma(p[n], f[n], VF(c[k]));
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
#if defined(__AVX512DQ__)
    x[n] = VF(VF::Raw(_mm512_scalef_ps(__m512(p[n].v), __m512(x[n].v))));
#else
    x[n] = p[n] * VF(VF::Raw(VF::RawInt(t[n].v) << 23));
#endif
  }
}
template <int N>
FASTPE_INLINE void exp2_each(VD* x) {
  for (int n = 0; n < N; ++n)
    for (int l = 0; l < VD::kLanes; ++l) x[n].v[l] = __builtin_exp2(x[n].v[l]);
}
template <class S>
FASTPE_INLINE Vec<S> exp2(Vec<S> x) {
  exp2_each<1>(&x);
  return x;
}

template <class S> FASTPE_INLINE Vec<S> map_scalar(Vec<S> x, S (*f)(S)) {
  for (int l = 0; l < Vec<S>::kLanes; ++l) x.v[l] = f(x.v[l]);
  return x;
}
// log(1 + x), relative error 3e-7 for x > -1/2. u = 1 + x = 2^e (1 + f) with |f| < 0.42; what rounding took from u comes back
// at first order. log(1 + f) = f - f^2/2 + f^3 P(f), P a minimax polynomial (5.9e-9 of f).
FASTPE_INLINE VF log1p(VF x) {
  using I = VF::RawInt;
  constexpr int32_t kRoot = 0x3f3504f3;  // sqrt(1/2)
  const VF u = VF(1.f) + x;
  const I bits = I(u.v) - kRoot, e = bits >> 23;
  const VF f = VF(VF::Raw((bits & 0x7fffff) + kRoot)) - VF(1.f), n(__builtin_convertvector(e, VF::Raw));
  VF p = fma(VF(-7.859562126e-2f), f, VF(1.288164727e-1f));
  p = fma(p, f, VF(-1.312877284e-1f));
  p = fma(p, f, VF(1.418119297e-1f));
  p = fma(p, f, VF(-1.662455235e-1f));
  p = fma(p, f, VF(2.000228620e-1f));
  p = fma(p, f, VF(-2.500081045e-1f));
  p = fma(p, f, VF(3.333331673e-1f));
  const VF f2 = f * f;
  // log 2 in two parts, the first with zeros at its end: n times it is exact.
  VF r = fma(n, VF(1.42860677e-6f), fma(f2 * f, p, VF(-0.5f) * f2));
  r = fma(n, VF(0.693145751953125f), r + f);
  r = r + (x - (u - VF(1.f))) / u;
  r = select(x == VF(__builtin_inff()), x, r);
  r = select(u == VF(0.f), VF(-__builtin_inff()), r);
  return select(u < VF(0.f), VF(__builtin_nanf("")), r);
}
// Relative error 3e-7: x + x z P(z), z = x^2, up to 0.6 (2.6e-9); beyond it 1 - 2 / (exp(2 x) + 1), which is 1 from 10 on.
FASTPE_INLINE VF tanh(VF x) {
  const VF a = min(VF(10.f), abs(x)), z = x * x;
  const VF far = VF(1.f) - VF(2.f) / (exp2(a * VF(2.885390082f)) + VF(1.f));
  VF p = fma(VF(-5.905852969e-3f), z, VF(2.080537154e-2f));
  p = fma(p, z, VF(-5.378667975e-2f));
  p = fma(p, z, VF(1.333195820e-1f));
  p = fma(p, z, VF(-3.333329927e-1f));
  return select(a < VF(0.6f), fma(x * z, p, x), select(x < VF(0.f), -far, far));
}
// Only forms that no table serves (arbitrary positions) reach these; they go through libm lane by lane.
FASTPE_INLINE VD log1p(VD x) { return map_scalar<double>(x, __builtin_log1p); }
FASTPE_INLINE VD tanh(VD x) { return map_scalar<double>(x, __builtin_tanh); }
FASTPE_INLINE VF log(VF x) { return map_scalar<float>(x, __builtin_logf); }
FASTPE_INLINE VD log(VD x) { return map_scalar<double>(x, __builtin_log); }
FASTPE_INLINE VF pow(VF x, VF y) {
  for (int l = 0; l < VF::kLanes; ++l) x.v[l] = __builtin_powf(x.v[l], y.v[l]);
  return x;
}
FASTPE_INLINE VD pow(VD x, VD y) {
  for (int l = 0; l < VD::kLanes; ++l) x.v[l] = __builtin_pow(x.v[l], y.v[l]);
  return x;
}

// ---- 16-bit storage types ------------------------------------------------------------------------------------

FASTPE_INLINE float bf16_to_float(uint16_t h) {
  const uint32_t u = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
FASTPE_INLINE uint16_t float_to_bf16(float f) {  // nearest, ties to even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
FASTPE_INLINE float f16_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = uint32_t(h & 0x8000) << 16, mag = h & 0x7fff;
  uint32_t u;
  if (mag >= 0x7c00) u = sign | 0x7f800000u | (mag & 0x3ff) << 13;
  else if (mag >= 0x400) u = sign | ((mag << 13) + 0x38000000u);
  else {
    // A subnormal half counts units of 2^-24. No float on the way is subnormal: those are flushed (subnormal.h).
    const float f = float(int(mag)) * 5.9604644775390625e-8f;
    std::memcpy(&u, &f, 4);
    u |= sign;
  }
  float r;
  std::memcpy(&r, &u, 4);
  return r;
#endif
}
FASTPE_INLINE uint16_t float_to_f16(float f) {
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t u;
  std::memcpy(&u, &f, 4);
  const uint32_t sign = (u >> 16) & 0x8000;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (u >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // rounds to 65520 or more
  if (u < 0x38800000u) {  // subnormal half: adding 0.5 leaves the rounded mantissa in the low bits
    float a;
    std::memcpy(&a, &u, 4);
    a += 0.5f;
    uint32_t b;
    std::memcpy(&b, &a, 4);
    return uint16_t(sign | (b - 0x3f000000u));
  }
  return uint16_t(sign | ((u - 0x38000000u + 0xfff + ((u >> 13) & 1)) >> 13));
#endif
}

#if defined(__AVX512F__)
FASTPE_INLINE VF load_bf16(const uint16_t* p) {
  return VF(VF::Raw(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))));
}
FASTPE_INLINE VF load_f16(const uint16_t* p) { return VF(VF::Raw(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)))); }
#if !defined(__AVX512BF16__)
// The rounded number in the upper half of every lane: nearest, ties to even; NaN stays NaN.
FASTPE_INLINE __m512i rounded_bf16(VF x) {
  const __m512i u = _mm512_castps_si512(__m512(x.v));
  const __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1))));
  const __mmask16 nan = _mm512_cmp_ps_mask(__m512(x.v), __m512(x.v), _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
}
// The upper halves of a, then those of b.
FASTPE_INLINE __m512i upper_halves(__m512i a, __m512i b) {
  alignas(64) static constexpr uint16_t kUpper[32] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(a, _mm512_load_si512(kUpper), b);
}
#endif
FASTPE_INLINE __m256i to_bf16(VF x) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(__m512(x.v));
#else
  const __m512i r = rounded_bf16(x);
  return _mm512_castsi512_si256(upper_halves(r, r));
#endif
}
FASTPE_INLINE void store_bf16(uint16_t* p, VF x) { _mm256_storeu_si256((__m256i*)p, to_bf16(x)); }
// x to p and y to q.
FASTPE_INLINE void store_bf16_two(uint16_t* p, VF x, uint16_t* q, VF y) {
#if defined(__AVX512BF16__)
  const __m512i r = (__m512i)_mm512_cvtne2ps_pbh(__m512(y.v), __m512(x.v));
#else
  const __m512i r = upper_halves(rounded_bf16(x), rounded_bf16(y));
#endif
  _mm256_storeu_si256((__m256i*)p, _mm512_castsi512_si256(r));
  _mm256_storeu_si256((__m256i*)q, _mm512_extracti64x4_epi64(r, 1));
}
FASTPE_INLINE void store_f16(uint16_t* p, VF x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(__m512(x.v), _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__AVX2__)
FASTPE_INLINE VF load_bf16(const uint16_t* p) {
  return VF(VF::Raw(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16))));
}
FASTPE_INLINE VF load_f16(const uint16_t* p) { return VF(VF::Raw(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)))); }
// The rounded number in the upper half of every lane: nearest, ties to even. Not for NaN, which could overflow to a number.
FASTPE_INLINE __m256i rounded_bf16(VF x) {
  const __m256i u = _mm256_castps_si256(__m256(x.v));
  return _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1)));
}
FASTPE_INLINE void store_bf16(uint16_t* p, VF x) {
  const __m256i u = _mm256_castps_si256(__m256(x.v));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(__m256(x.v), __m256(x.v), _CMP_UNORD_Q));
  const __m256i y = _mm256_srli_epi32(_mm256_blendv_epi8(rounded_bf16(x), _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan), 16);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1)));
}
// x to p and y to q: one test for NaN, and the upper halves of both sorted at once.
FASTPE_INLINE void store_bf16_two(uint16_t* p, VF x, uint16_t* q, VF y) {
  if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(__m256(x.v), __m256(y.v), _CMP_UNORD_Q)), 0)) {
    store_bf16(p, x);
    store_bf16(q, y);
    return;
  }
  const __m256i both = _mm256_blend_epi16(_mm256_srli_epi32(rounded_bf16(x), 16), rounded_bf16(y), 0xaa);
  const __m256i by_lane = _mm256_shuffle_epi8(both, _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  const __m256i sorted = _mm256_permute4x64_epi64(by_lane, 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(sorted));
  _mm_storeu_si128((__m128i*)q, _mm256_extracti128_si256(sorted, 1));
}
FASTPE_INLINE void store_f16(uint16_t* p, VF x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(__m256(x.v), _MM_FROUND_TO_NEAREST_INT)); }
#else
FASTPE_INLINE VF load_bf16(const uint16_t* p) { VF x; for (int l = 0; l < VF::kLanes; ++l) x.v[l] = bf16_to_float(p[l]); return x; }
FASTPE_INLINE VF load_f16(const uint16_t* p) { VF x; for (int l = 0; l < VF::kLanes; ++l) x.v[l] = f16_to_float(p[l]); return x; }
FASTPE_INLINE void store_bf16(uint16_t* p, VF x) { for (int l = 0; l < VF::kLanes; ++l) p[l] = float_to_bf16(x.v[l]); }
FASTPE_INLINE void store_bf16_two(uint16_t* p, VF x, uint16_t* q, VF y) { store_bf16(p, x); store_bf16(q, y); }
FASTPE_INLINE void store_f16(uint16_t* p, VF x) { for (int l = 0; l < VF::kLanes; ++l) p[l] = float_to_f16(x.v[l]); }
#endif

// 2 L numbers in bf16 from p on: the even ones, which are the lower halves of words, and the odd ones.
FASTPE_INLINE void load_bf16_even_odd(const uint16_t* p, VF& even, VF& odd) {
  VF::RawInt words;
  std::memcpy(&words, p, sizeof(words));
  even.v = VF::Raw(words << 16);
  odd.v = VF::Raw(words & int32_t(0xffff0000));
}

}  // namespace
}  // namespace fastpe::cpu::FASTPE_ISA
