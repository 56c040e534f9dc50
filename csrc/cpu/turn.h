// One row of channels turned by its row of cosines and sines, from any storage type to any place.
#pragma once

#include "../core/params.h"
#include "../pos/rotate.h"
#include "simd.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

// Element types: how a vector and a scalar of the computing type S come from memory and go back.

struct F32 {
  using T = float;
  using S = float;
  static FASTPE_INLINE VF load(const T* p) { return VF::load(p); }
  static FASTPE_INLINE void store(T* p, VF v) { v.store(p); }
  static FASTPE_INLINE void store_two(T* p, VF v, T* q, VF w) { v.store(p); w.store(q); }
  static FASTPE_INLINE S get(T x) { return x; }
  static FASTPE_INLINE T put(S x) { return x; }
};
struct F64 {
  using T = double;
  using S = double;
  static FASTPE_INLINE VD load(const T* p) { return VD::load(p); }
  static FASTPE_INLINE void store(T* p, VD v) { v.store(p); }
  static FASTPE_INLINE void store_two(T* p, VD v, T* q, VD w) { v.store(p); w.store(q); }
  static FASTPE_INLINE S get(T x) { return x; }
  static FASTPE_INLINE T put(S x) { return x; }
};
struct BF16 {
  using T = uint16_t;
  using S = float;
  static FASTPE_INLINE VF load(const T* p) { return load_bf16(p); }
  static FASTPE_INLINE void store(T* p, VF v) { store_bf16(p, v); }
  static FASTPE_INLINE void store_two(T* p, VF v, T* q, VF w) { store_bf16_two(p, v, q, w); }
  static FASTPE_INLINE S get(T x) { return bf16_to_float(x); }
  static FASTPE_INLINE T put(S x) { return float_to_bf16(x); }
};
struct F16 {
  using T = uint16_t;
  using S = float;
  static FASTPE_INLINE VF load(const T* p) { return load_f16(p); }
  static FASTPE_INLINE void store(T* p, VF v) { store_f16(p, v); }
  static FASTPE_INLINE void store_two(T* p, VF v, T* q, VF w) { store_f16(p, v); store_f16(q, w); }
  static FASTPE_INLINE S get(T x) { return f16_to_float(x); }
  static FASTPE_INLINE T put(S x) { return float_to_f16(x); }
};

// Stores past the caches, for outputs too large to find there later: they save reading what is overwritten. p must be
// aligned to the bytes stored.
#if defined(__AVX512F__)
FASTPE_INLINE void stream(float* p, VF v) { _mm512_stream_ps(p, __m512(v.v)); }
FASTPE_INLINE void stream(double* p, VD v) { _mm512_stream_pd(p, __m512d(v.v)); }
FASTPE_INLINE void stream_half(uint16_t* p, const uint16_t* from) { _mm256_stream_si256((__m256i*)p, _mm256_load_si256((const __m256i*)from)); }
#elif defined(__AVX2__)
FASTPE_INLINE void stream(float* p, VF v) { _mm256_stream_ps(p, __m256(v.v)); }
FASTPE_INLINE void stream(double* p, VD v) { _mm256_stream_pd(p, __m256d(v.v)); }
FASTPE_INLINE void stream_half(uint16_t* p, const uint16_t* from) { _mm_stream_si128((__m128i*)p, _mm_load_si128((const __m128i*)from)); }
#else
FASTPE_INLINE void stream(float* p, VF v) { v.store(p); }
FASTPE_INLINE void stream(double* p, VD v) { v.store(p); }
FASTPE_INLINE void stream_half(uint16_t* p, const uint16_t* from) { std::memcpy(p, from, VF::kLanes * 2); }
#endif
template <class E>
FASTPE_INLINE void stream_to(typename E::T* p, Vec<typename E::S> v) {
  if constexpr (sizeof(typename E::T) == 2) {
    alignas(64) uint16_t part[VF::kLanes];
    E::store(part, v);
    stream_half(p, part);
  } else {
    stream(p, v);
  }
}
FASTPE_INLINE void stream_done() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
// Lane choices for (x0, y0, x1, y1, ...) <-> (x0, x1, ...), (y0, y1, ...); the two vectors count as one of 2 L lanes.
template <class S>
struct Pairs {
  static constexpr int L = Vec<S>::kLanes;
  using V = Vec<S>;
  using I = typename V::RawInt;
  static FASTPE_INLINE V pick(V a, V b, I lanes) {
#if defined(__clang__)
    typename V::Raw r;
    for (int l = 0; l < L; ++l) r[l] = lanes[l] < L ? a.v[lanes[l]] : b.v[lanes[l] - L];
    return V(r);
#else
    return V(__builtin_shuffle(a.v, b.v, lanes));
#endif
  }
  static FASTPE_INLINE V evens(V a, V b) { return pick(a, b, lanes_of<S>([](int l) { return 2 * l; })); }
  static FASTPE_INLINE V odds(V a, V b) { return pick(a, b, lanes_of<S>([](int l) { return 2 * l + 1; })); }
  static FASTPE_INLINE V zip_lo(V x, V y) { return pick(x, y, lanes_of<S>([](int l) { return l / 2 + (l % 2) * L; })); }
  static FASTPE_INLINE V zip_hi(V x, V y) { return pick(x, y, lanes_of<S>([](int l) { return (l + L) / 2 + (l % 2) * L; })); }
};

// One token of G heads that share their row of the table, dx and dy elements apart; y may be x where To is E. The inverse
// rotation is the rotation with the two channels of a pair in each other's place.
template <class E, class To, RopeLayout L, bool Inverse, bool Stream, int G>
FASTPE_INLINE void rotate_rows_to(const typename E::T* x, int64_t dx, typename To::T* y, int64_t dy, const typename E::S* c, const typename E::S* s, int64_t J) {
  using S = typename E::S;
  using V = Vec<S>;
  using P = Pairs<S>;
  constexpr bool half = L == RopeLayout::half;
  const auto turn = [](auto& u, auto& v, auto cj, auto sj) {
    if constexpr (Inverse) pos::rotate_pair(v, u, cj, sj);
    else pos::rotate_pair(u, v, cj, sj);
  };
  const auto put_two = [](typename To::T* p, V v, typename To::T* q, V w) {
    if constexpr (Stream) stream_to<To>(p, v), stream_to<To>(q, w);
    else To::store_two(p, v, q, w);
  };
  int64_t j = 0;
#pragma GCC unroll 2
  for (; j + V::kLanes <= J; j += V::kLanes) {
    const V cj = V::load(c + j), sj = V::load(s + j);
    for (int g = 0; g < G; ++g) {
      const typename E::T* from = x + g * dx;
      typename To::T* to = y + g * dy;
      if constexpr (half) {
        V u = E::load(from + j), v = E::load(from + J + j);
        turn(u, v, cj, sj);
        put_two(to + j, u, to + J + j, v);
      } else {
        const V a = E::load(from + 2 * j), b = E::load(from + 2 * j + V::kLanes);
        V u = P::evens(a, b), v = P::odds(a, b);
        turn(u, v, cj, sj);
        put_two(to + 2 * j, P::zip_lo(u, v), to + 2 * j + V::kLanes, P::zip_hi(u, v));
      }
    }
  }
  for (; j < J; ++j) {
    const int64_t first = half ? j : 2 * j, second = half ? J + j : 2 * j + 1;
    for (int g = 0; g < G; ++g) {
      S u = E::get(x[g * dx + first]), v = E::get(x[g * dx + second]);
      turn(u, v, c[j], s[j]);
      y[g * dy + first] = To::put(u);
      y[g * dy + second] = To::put(v);
    }
  }
}

}  // namespace
}  // namespace fastpe::cpu::FASTPE_ISA
