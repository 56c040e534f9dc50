// The AVX-512 instructions of the CPU kernels on a processor with AVX2: included before any source of an instruction set that
// FASTPE_EMULATE_AVX512 builds (CMakeLists.txt), so that the kernels for AVX-512, with and without bf16 dot products, are executed
// where no such processor is at hand. Numbers are those of the processor to the bit, but for rcp14, which is exact here.
//
// The kernels' arithmetic on whole vectors is the compiler's own and needs nothing; what follows are the intrinsics. A kernel
// that takes one more does not compile until it is added.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
// Before the features are claimed: libraries choose by them too.
#include <algorithm>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include <immintrin.h>

namespace fastpe::emu512 {

#define FASTPE_EMU static inline __attribute__((always_inline))

typedef float F32 __attribute__((vector_size(64)));
typedef double F64 __attribute__((vector_size(64)));
typedef int32_t I32 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(64)));
typedef uint16_t U16x16 __attribute__((vector_size(32)));
typedef int64_t I64 __attribute__((vector_size(64)));

template <class Half> struct Two { Half at[2]; };
template <class Half, class V> FASTPE_EMU Two<Half> halves(V v) { return std::bit_cast<Two<Half>>(v); }
template <class V, class Half> FASTPE_EMU V whole(Half lo, Half hi) { return std::bit_cast<V>(Two<Half>{{lo, hi}}); }

template <class V, class F> FASTPE_EMU V each(F f) {
  V r;
  for (int l = 0; l < int(sizeof(V) / sizeof(r[0])); ++l) r[l] = f(l);
  return r;
}

// ---- memory -----------------------------------------------------------------------------------------------------------

FASTPE_EMU __m512i loadu_si512(const void* p) {
  __m512i r;
  std::memcpy(&r, p, 64);
  return r;
}
FASTPE_EMU void storeu_si512(void* p, __m512i v) { std::memcpy(p, &v, 64); }
FASTPE_EMU void stream_ps(float* p, __m512 v) { std::memcpy(p, &v, 64); }
FASTPE_EMU void stream_pd(double* p, __m512d v) { std::memcpy(p, &v, 64); }
FASTPE_EMU __m512 i32gather_ps(__m512i at, const void* p, int scale) {
  const I32 x = (I32)at;
  return (__m512)each<F32>([&](int l) {
    float f;
    std::memcpy(&f, static_cast<const char*>(p) + int64_t(x[l]) * scale, 4);
    return f;
  });
}
FASTPE_EMU void mask_i32scatter_ps(void* p, __mmask16 m, __m512i at, __m512 v, int scale) {
  const I32 x = (I32)at;
  for (int l = 0; l < 16; ++l)
    if (m >> l & 1) {
      const float f = v[l];
      std::memcpy(static_cast<char*>(p) + int64_t(x[l]) * scale, &f, 4);
    }
}

// ---- constants, halves, casts -----------------------------------------------------------------------------------------------

FASTPE_EMU __m512 set1_ps(float x) { return whole<__m512>(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
FASTPE_EMU __m512d set1_pd(double x) { return whole<__m512d>(_mm256_set1_pd(x), _mm256_set1_pd(x)); }
FASTPE_EMU __m512i set1_epi32(int x) { return whole<__m512i>(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
FASTPE_EMU __m512 setzero_ps() { return __m512{}; }
FASTPE_EMU __m512i setzero_si512() { return __m512i{}; }
template <class... X> FASTPE_EMU __m512i setr_epi32(X... x) { return (__m512i)I32{x...}; }
FASTPE_EMU __m512 castps128_ps512(__m128 x) { return whole<__m512>(_mm256_castps128_ps256(x), _mm256_setzero_ps()); }
FASTPE_EMU __m256 castps512_ps256(__m512 x) { return halves<__m256>(x).at[0]; }
FASTPE_EMU __m256i castsi512_si256(__m512i x) { return halves<__m256i>(x).at[0]; }
FASTPE_EMU __m512 castsi512_ps(__m512i x) { return (__m512)x; }
FASTPE_EMU __m512i castps_si512(__m512 x) { return (__m512i)x; }
FASTPE_EMU __m256i extracti64x4_epi64(__m512i x, int half) { return halves<__m256i>(x).at[half]; }
FASTPE_EMU __m512 insertf32x8(__m512 x, __m256 y, int half) {
  auto t = halves<__m256>(x);
  t.at[half] = y;
  return std::bit_cast<__m512>(t);
}
FASTPE_EMU __m512 insertf32x4(__m512 x, __m128 y, int quarter) {
  std::memcpy(reinterpret_cast<char*>(&x) + 16 * quarter, &y, 16);
  return x;
}

// ---- arithmetic -------------------------------------------------------------------------------------------------------

FASTPE_EMU __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const auto x = halves<__m256>(a), y = halves<__m256>(b), z = halves<__m256>(c);
  return whole<__m512>(_mm256_fmadd_ps(x.at[0], y.at[0], z.at[0]), _mm256_fmadd_ps(x.at[1], y.at[1], z.at[1]));
}
FASTPE_EMU __m512d fmadd_pd(__m512d a, __m512d b, __m512d c) {
  const auto x = halves<__m256d>(a), y = halves<__m256d>(b), z = halves<__m256d>(c);
  return whole<__m512d>(_mm256_fmadd_pd(x.at[0], y.at[0], z.at[0]), _mm256_fmadd_pd(x.at[1], y.at[1], z.at[1]));
}
FASTPE_EMU __m512 max_ps(__m512 a, __m512 b) {
  const auto x = halves<__m256>(a), y = halves<__m256>(b);
  return whole<__m512>(_mm256_max_ps(x.at[0], y.at[0]), _mm256_max_ps(x.at[1], y.at[1]));
}
FASTPE_EMU __m512 sqrt_ps(__m512 a) {
  const auto x = halves<__m256>(a);
  return whole<__m512>(_mm256_sqrt_ps(x.at[0]), _mm256_sqrt_ps(x.at[1]));
}
FASTPE_EMU __m512 rcp14_ps(__m512 a) { return (__m512)(1.f / (F32)a); }
// x less the largest whole number not above it; 0 for an infinity. The kernels ask for no digits after the point.
FASTPE_EMU __m512 reduce_ps(__m512 a, int) {
  return (__m512)each<F32>([&](int l) { return std::isinf(a[l]) ? 0.f : a[l] - std::floor(a[l]); });
}
// a * 2^floor(b), rounded once; subnormal results by the mode of the processor.
FASTPE_EMU __m512 scalef_ps(__m512 a, __m512 b) {
  return (__m512)each<F32>([&](int l) {
    if (std::isnan(a[l]) || std::isnan(b[l])) return std::numeric_limits<float>::quiet_NaN();
    const double n = std::floor(double(b[l]));
    return float(std::ldexp(double(a[l]), int(n < -400 ? -400 : n > 400 ? 400 : n)));
  });
}
FASTPE_EMU float reduce_add_ps(__m512 a) {
  const auto x = halves<__m256>(a);
  const __m256 four = _mm256_add_ps(x.at[1], x.at[0]);
  const __m128 y = _mm_add_ps(_mm256_extractf128_ps(four, 1), _mm256_castps256_ps128(four));
  const __m128 z = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return z[0] + z[1];
}
FASTPE_EMU double reduce_add_pd(__m512d a) {
  const auto x = halves<__m256d>(a);
  const __m256d four = _mm256_add_pd(x.at[1], x.at[0]);
  const __m128d y = _mm_add_pd(_mm256_extractf128_pd(four, 1), _mm256_castpd256_pd128(four));
  return y[0] + y[1];
}
FASTPE_EMU float reduce_max_ps(__m512 a) {
  float m = a[0];
  for (int l = 1; l < 16; ++l) m = m > a[l] ? m : a[l];
  return m;
}

// ---- whole numbers ----------------------------------------------------------------------------------------------------

FASTPE_EMU __m512i add_epi32(__m512i a, __m512i b) { return (__m512i)((U32)a + (U32)b); }
FASTPE_EMU __m512i sub_epi32(__m512i a, __m512i b) { return (__m512i)((U32)a - (U32)b); }
FASTPE_EMU __m512i and_si512(__m512i a, __m512i b) { return a & b; }
FASTPE_EMU __m512i or_si512(__m512i a, __m512i b) { return a | b; }
FASTPE_EMU __m512i slli_epi32(__m512i a, unsigned n) { return (__m512i)((U32)a << n); }
FASTPE_EMU __m512i srli_epi32(__m512i a, unsigned n) { return (__m512i)((U32)a >> n); }
FASTPE_EMU __m512i cvtepu16_epi32(__m256i a) { return (__m512i)__builtin_convertvector((U16x16)a, U32); }
FASTPE_EMU __m512i cvttps_epi32(__m512 a) {
  const auto x = halves<__m256>(a);
  return whole<__m512i>(_mm256_cvttps_epi32(x.at[0]), _mm256_cvttps_epi32(x.at[1]));
}

// ---- lanes ------------------------------------------------------------------------------------------------------------

FASTPE_EMU __m512 permutex2var_ps(__m512 a, __m512i at, __m512 b) { return (__m512)__builtin_shuffle((F32)a, (F32)b, (I32)at); }
FASTPE_EMU __m512i permutexvar_epi16(__m512i at, __m512i a) { return (__m512i)__builtin_shuffle((U16)a, (U16)at); }
FASTPE_EMU __m512i permutex2var_epi16(__m512i a, __m512i at, __m512i b) { return (__m512i)__builtin_shuffle((U16)a, (U16)b, (U16)at); }
FASTPE_EMU __m512i unpacklo_epi16(__m512i a, __m512i b) {
  const auto x = halves<__m256i>(a), y = halves<__m256i>(b);
  return whole<__m512i>(_mm256_unpacklo_epi16(x.at[0], y.at[0]), _mm256_unpacklo_epi16(x.at[1], y.at[1]));
}
FASTPE_EMU __m512i unpackhi_epi16(__m512i a, __m512i b) {
  const auto x = halves<__m256i>(a), y = halves<__m256i>(b);
  return whole<__m512i>(_mm256_unpackhi_epi16(x.at[0], y.at[0]), _mm256_unpackhi_epi16(x.at[1], y.at[1]));
}

// ---- masks ------------------------------------------------------------------------------------------------------------

// Lane l's bit where f(l).
template <int N, class F> FASTPE_EMU unsigned mask_of(F f) {
  unsigned m = 0;
  for (int l = 0; l < N; ++l) m |= unsigned(bool(f(l))) << l;
  return m;
}
FASTPE_EMU __mmask16 movepi32_mask(__m512i a) { return __mmask16(mask_of<16>([&](int l) { return ((I32)a)[l] < 0; })); }
FASTPE_EMU __mmask8 movepi64_mask(__m512i a) { return __mmask8(mask_of<8>([&](int l) { return ((I64)a)[l] < 0; })); }
FASTPE_EMU __mmask16 test_epi32_mask(__m512i a, __m512i b) { return __mmask16(mask_of<16>([&](int l) { return (((I32)a)[l] & ((I32)b)[l]) != 0; })); }
FASTPE_EMU __mmask16 mask_cmpneq_epi32_mask(__mmask16 m, __m512i a, __m512i b) { return __mmask16(m & mask_of<16>([&](int l) { return ((I32)a)[l] != ((I32)b)[l]; })); }
FASTPE_EMU __mmask16 unordered_ps_mask(__m512 a, __m512 b) { return __mmask16(mask_of<16>([&](int l) { return std::isnan(a[l]) || std::isnan(b[l]); })); }
FASTPE_EMU __m512 mask_mov_ps(__m512 other, __mmask16 m, __m512 a) {
  return (__m512)each<F32>([&](int l) { return m >> l & 1 ? a[l] : other[l]; });
}
FASTPE_EMU __m512 maskz_mov_ps(__mmask16 m, __m512 a) { return mask_mov_ps(__m512{}, m, a); }
FASTPE_EMU __m512i mask_or_epi32(__m512i other, __mmask16 m, __m512i a, __m512i b) {
  return (__m512i)each<I32>([&](int l) { return m >> l & 1 ? ((I32)a)[l] | ((I32)b)[l] : ((I32)other)[l]; });
}

// ---- 16-bit numbers ---------------------------------------------------------------------------------------------------

FASTPE_EMU __m256i cvtps_ph(__m512 a, int) {
  const auto x = halves<__m256>(a);
  return whole<__m256i>(_mm256_cvtps_ph(x.at[0], _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(x.at[1], _MM_FROUND_TO_NEAREST_INT));
}
FASTPE_EMU __m512 cvtph_ps(__m256i a) {
  const auto x = halves<__m128i>(a);
  return whole<__m512>(_mm256_cvtph_ps(x.at[0]), _mm256_cvtph_ps(x.at[1]));
}
// Nearest, ties to even; subnormal numbers are 0, a NaN becomes a quiet one.
FASTPE_EMU uint16_t to_bf16(float f) {
  const uint32_t u = std::bit_cast<uint32_t>(f), mag = u & 0x7fffffffu;
  if (mag > 0x7f800000u) return uint16_t(u >> 16 | 0x40);
  if (mag < 0x00800000u) return uint16_t(u >> 16 & 0x8000u);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
FASTPE_EMU __m256i cvtneps_pbh(__m512 a) {
  return (__m256i)each<U16x16>([&](int l) { return to_bf16(a[l]); });
}
FASTPE_EMU __m512i cvtne2ps_pbh(__m512 high, __m512 low) { return whole<__m512i>(cvtneps_pbh(low), cvtneps_pbh(high)); }
// acc + odd * odd + even * even, each step rounded once, subnormal numbers taken and left as 0.
FASTPE_EMU __m512 dpbf16_ps(__m512 acc, __m512bh a, __m512bh b) {
  const unsigned mode = _mm_getcsr();
  _mm_setcsr((mode & ~0x6000u) | 0x8040u);
  const U32 high = each<U32>([](int) { return 0xffff0000u; });
  __m512 r = fmadd_ps((__m512)((U32)a & high), (__m512)((U32)b & high), acc);
  r = fmadd_ps((__m512)((U32)a << 16), (__m512)((U32)b << 16), r);
  asm volatile("" : "+m"(r));  // computed before the mode is taken back
  _mm_setcsr(mode);
  return r;
}

#undef FASTPE_EMU

}  // namespace fastpe::emu512

#define _mm512_loadu_si512 ::fastpe::emu512::loadu_si512
#define _mm512_load_si512 ::fastpe::emu512::loadu_si512
#define _mm512_storeu_si512 ::fastpe::emu512::storeu_si512
#define _mm512_store_si512 ::fastpe::emu512::storeu_si512
#define _mm512_stream_ps ::fastpe::emu512::stream_ps
#define _mm512_stream_pd ::fastpe::emu512::stream_pd
#undef _mm512_i32gather_ps
#define _mm512_i32gather_ps ::fastpe::emu512::i32gather_ps
#undef _mm512_mask_i32scatter_ps
#define _mm512_mask_i32scatter_ps ::fastpe::emu512::mask_i32scatter_ps
#define _mm512_set1_ps ::fastpe::emu512::set1_ps
#define _mm512_set1_pd ::fastpe::emu512::set1_pd
#define _mm512_set1_epi32 ::fastpe::emu512::set1_epi32
#define _mm512_setzero_ps ::fastpe::emu512::setzero_ps
#define _mm512_setzero_si512 ::fastpe::emu512::setzero_si512
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 ::fastpe::emu512::setr_epi32
#define _mm512_castps128_ps512 ::fastpe::emu512::castps128_ps512
#define _mm512_castps512_ps256 ::fastpe::emu512::castps512_ps256
#define _mm512_castsi512_si256 ::fastpe::emu512::castsi512_si256
#define _mm512_castsi512_ps ::fastpe::emu512::castsi512_ps
#define _mm512_castps_si512 ::fastpe::emu512::castps_si512
#undef _mm512_extracti64x4_epi64
#define _mm512_extracti64x4_epi64 ::fastpe::emu512::extracti64x4_epi64
#undef _mm512_insertf32x8
#define _mm512_insertf32x8 ::fastpe::emu512::insertf32x8
#undef _mm512_insertf32x4
#define _mm512_insertf32x4 ::fastpe::emu512::insertf32x4
#define _mm512_fmadd_ps ::fastpe::emu512::fmadd_ps
#define _mm512_fmadd_pd ::fastpe::emu512::fmadd_pd
#define _mm512_max_ps ::fastpe::emu512::max_ps
#define _mm512_sqrt_ps ::fastpe::emu512::sqrt_ps
#define _mm512_rcp14_ps ::fastpe::emu512::rcp14_ps
#undef _mm512_reduce_ps
#define _mm512_reduce_ps ::fastpe::emu512::reduce_ps
#define _mm512_scalef_ps ::fastpe::emu512::scalef_ps
#define _mm512_reduce_add_ps ::fastpe::emu512::reduce_add_ps
#define _mm512_reduce_add_pd ::fastpe::emu512::reduce_add_pd
#define _mm512_reduce_max_ps ::fastpe::emu512::reduce_max_ps
#define _mm512_add_epi32 ::fastpe::emu512::add_epi32
#define _mm512_sub_epi32 ::fastpe::emu512::sub_epi32
#define _mm512_and_si512 ::fastpe::emu512::and_si512
#define _mm512_or_si512 ::fastpe::emu512::or_si512
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 ::fastpe::emu512::slli_epi32
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 ::fastpe::emu512::srli_epi32
#define _mm512_cvtepu16_epi32 ::fastpe::emu512::cvtepu16_epi32
#define _mm512_cvttps_epi32 ::fastpe::emu512::cvttps_epi32
#define _mm512_permutex2var_ps ::fastpe::emu512::permutex2var_ps
#define _mm512_permutexvar_epi16 ::fastpe::emu512::permutexvar_epi16
#define _mm512_permutex2var_epi16 ::fastpe::emu512::permutex2var_epi16
#define _mm512_unpacklo_epi16 ::fastpe::emu512::unpacklo_epi16
#define _mm512_unpackhi_epi16 ::fastpe::emu512::unpackhi_epi16
#define _mm512_movepi32_mask ::fastpe::emu512::movepi32_mask
#define _mm512_movepi64_mask ::fastpe::emu512::movepi64_mask
#define _mm512_test_epi32_mask ::fastpe::emu512::test_epi32_mask
#define _mm512_mask_cmpneq_epi32_mask ::fastpe::emu512::mask_cmpneq_epi32_mask
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, test) ::fastpe::emu512::unordered_ps_mask(a, b)
#define _mm512_mask_mov_ps ::fastpe::emu512::mask_mov_ps
#define _mm512_maskz_mov_ps ::fastpe::emu512::maskz_mov_ps
#define _mm512_mask_or_epi32 ::fastpe::emu512::mask_or_epi32
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph ::fastpe::emu512::cvtps_ph
#define _mm512_cvtph_ps ::fastpe::emu512::cvtph_ps
#define _mm512_cvtneps_pbh ::fastpe::emu512::cvtneps_pbh
#define _mm512_cvtne2ps_pbh ::fastpe::emu512::cvtne2ps_pbh
#define _mm512_dpbf16_ps ::fastpe::emu512::dpbf16_ps

#define FASTPE_EMULATED_AVX512 1  // vectors are wider than a register
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#if FASTPE_EMULATED_BF16
#define __AVX512BF16__ 1
#endif
