// Rows in and out: any storage type to the score type and back, rotation, and the packed operand forms of gemm.h.
#pragma once

#include <type_traits>

#include "gemm.h"
#include "turn.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

// A row is short: vectors in a loop take half the time of a call of memcpy.
template <class S>
FASTPE_INLINE void copy_row(S* __restrict y, const S* __restrict x, int64_t n) {
  constexpr int L = Vec<S>::kLanes;
  int64_t d = 0;
  for (; d + L <= n; d += L) Vec<S>::load(x + d).store(y + d);
  for (; d < n; ++d) y[d] = x[d];
}

// f with the element type of a tensor whose scores are of type S.
template <class S, class Fn>
FASTPE_INLINE void with_elements(DType t, Fn&& f) {
  if constexpr (sizeof(S) == 8) f(F64{});
  else if (t == DType::f32) f(F32{});
  else if (t == DType::bf16) f(BF16{});
  else f(F16{});
}

template <class E>
FASTPE_INLINE void load_channels(typename E::S* __restrict y, const typename E::T* __restrict x, int64_t n) {
  constexpr int L = Vec<typename E::S>::kLanes;
  int64_t d = 0;
  for (; d + L <= n; d += L) E::load(x + d).store(y + d);
  for (; d < n; ++d) y[d] = E::get(x[d]);
}

template <class S>
FASTPE_INLINE void load_row(S* __restrict y, const View& x, DType t, int64_t b, int64_t h, int64_t n, int64_t D) {
  with_elements<S>(t, [&]<class E>(E) __attribute__((always_inline)) { load_channels<E>(y, static_cast<const typename E::T*>(x.p) + b * x.sb + h * x.sh + n * x.sn, D); });
}

template <class S>
FASTPE_INLINE void store_row(const S* __restrict y, const View& x, DType t, int64_t b, int64_t h, int64_t n, int64_t D) {
  const int64_t off = b * x.sb + h * x.sh + n * x.sn;
  if constexpr (sizeof(S) == 8) {
    copy_row(static_cast<double*>(x.p) + off, y, D);
  } else {
    constexpr int L = VF::kLanes;
    const int64_t D0 = D / L * L;
    if (t == DType::f32) {
      copy_row(static_cast<float*>(x.p) + off, y, D);
    } else if (t == DType::bf16) {
      uint16_t* p = static_cast<uint16_t*>(x.p) + off;
      for (int64_t d = 0; d < D0; d += L) store_bf16(p + d, VF::load(y + d));
      for (int64_t d = D0; d < D; ++d) p[d] = float_to_bf16(y[d]);
    } else {
      uint16_t* p = static_cast<uint16_t*>(x.p) + off;
      for (int64_t d = 0; d < D0; d += L) store_f16(p + d, VF::load(y + d));
      for (int64_t d = D0; d < D; ++d) p[d] = float_to_f16(y[d]);
    }
  }
}

template <class S>
FASTPE_INLINE const S* at(const Aux& a, int64_t b, int64_t h, int64_t n = 0) {
  return a.p ? static_cast<const S*>(a.p) + b * a.sb + h * a.sh + n * a.sn : nullptr;
}

// Row (b, h, n) of x, its first 2 J channels turned by that row of `turn` if there is one. Turned while it is converted: a
// pass of its own over the row cost as much again as the turn.
template <class S>
FASTPE_INLINE void load_turned(S* __restrict y, const View& x, DType t, int64_t D, const Rope& turn, int64_t J, RopeLayout layout, int64_t b, int64_t h, int64_t n) {
  if (!turn.cos) return load_row(y, x, t, b, h, n, D);
  const S *c = at<S>(turn.cos, b, h, n), *s = at<S>(turn.sin, b, h, n);
  with_elements<S>(t, [&]<class E>(E) __attribute__((always_inline)) {
    using To = std::conditional_t<sizeof(S) == 8, F64, F32>;
    const auto* from = static_cast<const typename E::T*>(x.p) + b * x.sb + h * x.sh + n * x.sn;
    if (layout == RopeLayout::half) rotate_rows_to<E, To, RopeLayout::half, false, false, 1>(from, 0, y, 0, c, s, J);
    else rotate_rows_to<E, To, RopeLayout::interleaved, false, false, 1>(from, 0, y, 0, c, s, J);
    load_channels<E>(y + 2 * J, from + 2 * J, D - 2 * J);
  });
}

// The inverse turn, in place, if there is one: what the gradient of a turned row goes through.
template <class S>
FASTPE_INLINE void turn_back(S* x, const Rope& turn, int64_t J, RopeLayout layout, int64_t b, int64_t h, int64_t n) {
  if (!turn.cos) return;
  using E = std::conditional_t<sizeof(S) == 8, F64, F32>;
  const S *c = at<S>(turn.cos, b, h, n), *s = at<S>(turn.sin, b, h, n);
  if (layout == RopeLayout::half) rotate_rows_to<E, E, RopeLayout::half, true, false, 1>(x, 0, x, 0, c, s, J);
  else rotate_rows_to<E, E, RopeLayout::interleaved, true, false, 1>(x, 0, x, 0, c, s, J);
}

template <class S>
FASTPE_INLINE S dot(const S* x, const S* y, int64_t n) {
  constexpr int L = Vec<S>::kLanes;
  Vec<S> acc(S(0));
  int64_t d = 0;
  for (; d + L <= n; d += L) acc = fma(Vec<S>::load(x + d), Vec<S>::load(y + d), acc);
  S s = reduce_add(acc);
  for (; d < n; ++d) s += x[d] * y[d];
  return s;
}
template <class S>
FASTPE_INLINE S norm2(const S* x, int64_t n) {
  return dot(x, x, n);
}

// y[c][r] = x[r][c] for R x C elements of 4 or 8 bytes. Whole blocks of L x L go through registers in log2 L rounds
// of two-input shuffles, a quarter of the time of element-wise stores.
template <class S, int Step>
FASTPE_INLINE void transpose_round(typename Vec<S>::Raw* v) {
  constexpr int L = Vec<S>::kLanes;
  if constexpr (Step < L) {
    using Raw = typename Vec<S>::Raw;
    const auto lo = lanes_of<S>([](int l) { return l & Step ? L + l - Step : l; });
    const auto hi = lanes_of<S>([](int l) { return l & Step ? L + l : l + Step; });
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r) {
      if (r & Step) continue;
      const Raw a = v[r], b = v[r + Step];
      v[r] = __builtin_shuffle(a, b, lo);
      v[r + Step] = __builtin_shuffle(a, b, hi);
    }
    transpose_round<S, 2 * Step>(v);
  }
}
template <class T, class S>
FASTPE_INLINE void transpose_block(T* __restrict y, int64_t ldy, const T* __restrict x, int64_t ldx) {
  constexpr int L = Vec<S>::kLanes;
  using V = Vec<S>;
  typename V::Raw v[L];
#pragma GCC unroll 16
  for (int r = 0; r < L; ++r) v[r] = V::load(reinterpret_cast<const S*>(x + r * ldx)).v;
  transpose_round<S, 1>(v);
#pragma GCC unroll 16
  for (int r = 0; r < L; ++r) V(v[r]).store(reinterpret_cast<S*>(y + r * ldy));
}

template <class T>
FASTPE_INLINE void transpose(T* __restrict y, int64_t ldy, const T* __restrict x, int64_t ldx, int64_t R, int64_t C) {
  using S = std::conditional_t<sizeof(T) == 8, double, float>;
  constexpr int L = Vec<S>::kLanes;
  const int64_t R0 = R / L * L, C0 = C / L * L;
  for (int64_t c = 0; c < C0; c += L)
    for (int64_t r = 0; r < R0; r += L) transpose_block<T, S>(y + c * ldy + r, ldy, x + r * ldx + c, ldx);
  for (int64_t c = 0; c < C; ++c)
    for (int64_t r = c < C0 ? R0 : 0; r < R; ++r) y[c * ldy + r] = x[r * ldx + c];
}

// Lane i of v[0] becomes the sum of v[i]: log2 L rounds that halve the vectors. The first two interleave numbers within 16 bytes,
// one instruction a shuffle; the next ones move 16 bytes and more.
template <int Step = 1, class S>
FASTPE_INLINE void sum_each(Vec<S>* v) {
  constexpr int L = Vec<S>::kLanes, W = 16 / int(sizeof(S));
  if constexpr (Step < L) {
    typename Vec<S>::RawInt lo, hi;
    for (int l = 0; l < L; ++l) {
      if (Step < W) {  // W = 4: a0 b0 a1 b1 and a2 b2 a3 b3, then a0 a1 b0 b1 and a2 a3 b2 b3
        const int at = l % W / Step % 2 * L + l / W * W + l % W / (2 * Step) * Step + l % Step;
        lo[l] = at;
        hi[l] = at + W / 2;
      } else {
        lo[l] = l & Step ? L + l - Step : l;
        hi[l] = l & Step ? L + l : l + Step;
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < L; r += 2 * Step) v[r].v = __builtin_shuffle(v[r].v, v[r + Step].v, lo) + __builtin_shuffle(v[r].v, v[r + Step].v, hi);
    sum_each<2 * Step>(v);
  }
}

// ---- packed operands --------------------------------------------------------------------------------------------
// Units of E along the packed axis; K is padded with zeros to a whole unit by the callers' buffers.

// One A row from a row of scalars: n scalars, n a multiple of kPack.
template <class E>
FASTPE_INLINE void pack_row(typename E::U* __restrict a, const typename E::S* __restrict x, int64_t n) {
  if constexpr (E::kPack == 1) {
    copy_row(a, x, n);
  } else {
    uint16_t* p = reinterpret_cast<uint16_t*>(a);
    int64_t i = 0;
    for (; i + VF::kLanes <= n; i += VF::kLanes) store_bf16(p + i, VF::load(x + i));
    for (; i < n; ++i) p[i] = float_to_bf16(x[i]);
  }
}

// A row turned straight into an A row, in one pass: pairs (j, j + J), J and D multiples of `turn_step`. The lanes of the
// result add up to the turned row's squared length.
template <class Op>
constexpr int64_t turn_step() { return Vec<typename Op::S>::kLanes * Op::kPack; }
template <class Op>
FASTPE_INLINE void store_operand(typename Op::U* out, const Vec<typename Op::S>* x) {
  if constexpr (Op::kPack == 1) x[0].store(out);
#if defined(__AVX512BF16__)
  else _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(__m512(x[1].v), __m512(x[0].v)));
#endif
}
template <class Op, class E>
FASTPE_INLINE Vec<typename Op::S> turn_operand(typename Op::U* __restrict out, const typename E::T* __restrict x, const typename E::S* __restrict c, const typename E::S* __restrict s, int64_t J, int64_t D) {
  using V = Vec<typename Op::S>;
  constexpr int L = V::kLanes, P = Op::kPack;
  V squares(typename Op::S(0));
  for (int64_t e = 0; e < J; e += L * P) {
    V lo[P], hi[P];
    for (int y = 0; y < P; ++y) {
      lo[y] = E::load(x + e + y * L), hi[y] = E::load(x + J + e + y * L);
      pos::rotate_pair(lo[y], hi[y], V::load(c + e + y * L), V::load(s + e + y * L));
      squares = fma(lo[y], lo[y], fma(hi[y], hi[y], squares));
    }
    store_operand<Op>(out + e / P, lo);
    store_operand<Op>(out + (J + e) / P, hi);
  }
  for (int64_t e = 2 * J; e < D; e += L * P) {
    V part[P];
    for (int y = 0; y < P; ++y) {
      part[y] = E::load(x + e + y * L);
      squares = fma(part[y], part[y], squares);
    }
    store_operand<Op>(out + e / P, part);
  }
  return squares;
}

// The transpose of R rows of ku units as a B operand: b[k][r], pitch ldb, rows from R to `lanes` zero.
template <class U>
FASTPE_INLINE void transpose_units(U* __restrict b, int64_t ldb, const U* __restrict x, int64_t ldx, int64_t R, int64_t lanes, int64_t ku) {
  transpose(b, ldb, x, ldx, R, ku);
  for (int64_t k = 0; k < ku; ++k)
    for (int64_t r = R; r < lanes; ++r) b[k * ldb + r] = 0;
}
// The same of n scalars a row (pitch ldx). tmp: room for one row of units per row of x.
template <class E>
FASTPE_INLINE void pack_transposed(typename E::U* __restrict b, int64_t ldb, const typename E::S* __restrict x, int64_t ldx, int64_t R, int64_t lanes, int64_t n, typename E::U* tmp) {
  const int64_t ku = n / E::kPack;
  if constexpr (E::kPack == 1) {
    transpose_units(b, ldb, x, ldx, R, lanes, ku);
  } else {
    for (int64_t r = 0; r < R; ++r) pack_row<E>(tmp + r * ku, x + r * ldx, n);
    transpose_units(b, ldb, tmp, ku, R, lanes, ku);
  }
}

#if defined(__AVX512BF16__)
// Two vectors as bf16, one after the other; their lanes as pairs: lane l of the result holds (lo[l], hi[l]).
FASTPE_INLINE __m512i two_bf16(VF lo, VF hi) { return (__m512i)_mm512_cvtne2ps_pbh(__m512(hi.v), __m512(lo.v)); }
FASTPE_INLINE __m512i zip_halves(__m512i x) {
  alignas(64) static constexpr uint16_t kZip[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kZip), x);
}
FASTPE_INLINE __m512i interleave_bf16(VF lo, VF hi) { return zip_halves(two_bf16(lo, hi)); }
#endif

// Squared length of a row of n bf16 numbers, and two such rows as one of n pairs, zeros up to a vector's multiple; hi may be
// null.
#if defined(__AVX512BF16__)
FASTPE_INLINE float norm2_bf16(const uint16_t* x, int64_t n) {
  VF acc(0.f);
  int64_t d = 0;
  for (; d + 2 * VF::kLanes <= n; d += 2 * VF::kLanes) {
    const OpBF16::BVec v = OpBF16::load_b(reinterpret_cast<const uint32_t*>(x + d));
    acc = OpBF16::mac(acc, v, v);
  }
  float sum = reduce_add(acc);
  for (; d < n; ++d) sum += bf16_to_float(x[d]) * bf16_to_float(x[d]);
  return sum;
}
FASTPE_INLINE void zip_bf16(uint32_t* __restrict out, const uint16_t* __restrict lo, const uint16_t* __restrict hi, int64_t n) {
  constexpr int L = VF::kLanes;
  int64_t d = 0;
  for (; d + L <= n; d += L) {
    const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(lo + d)));
    const __m512i b = hi ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(hi + d))) : _mm512_setzero_si512();
    _mm512_storeu_si512(out + d, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
  }
  if (d == n) return;
  for (int64_t e = d; e < d + L; ++e) out[e] = e < n ? uint32_t(lo[e]) | (hi ? uint32_t(hi[e]) << 16 : 0) : 0;
}
#endif

// R rows of n scalars as a B operand whose k axis is the row: b[r / kPack][d], pitch ldb; columns n.. up to a vector
// multiple and the missing row of an odd R are zero. x must be readable up to the vector multiple of n.
template <class E>
FASTPE_INLINE void pack_rows(typename E::U* __restrict b, int64_t ldb, const typename E::S* __restrict x, int64_t ldx, int64_t R, int64_t n) {
  constexpr int L = Vec<typename E::S>::kLanes;
  const int64_t np = (n + L - 1) / L * L;
  if constexpr (E::kPack == 1) {
    for (int64_t r = 0; r < R; ++r) {
      copy_row(b + r * ldb, x + r * ldx, n);
      for (int64_t d = n; d < np; ++d) b[r * ldb + d] = 0;
    }
  } else {
#if defined(__AVX512BF16__)
    for (int64_t r = 0; r < R; r += 2)
      for (int64_t d = 0; d < np; d += L) {
        VF lo = VF::load(x + r * ldx + d), hi = r + 1 < R ? VF::load(x + (r + 1) * ldx + d) : VF(0.f);
        if (d + L > n) {
          const VF idx = VF::iota() + VF(float(d));
          lo = select(idx < VF(float(n)), lo, VF(0.f));
          hi = select(idx < VF(float(n)), hi, VF(0.f));
        }
        _mm512_storeu_si512(b + r / 2 * ldb + d, interleave_bf16(lo, hi));
      }
#endif
  }
}

// The transpose of R rows as an A operand: a[d][r / kPack], pitch lda units; units past the last row up to `cols` are
// zero. tmp: room for R / kPack rows of n units, n rounded up to a vector.
template <class E>
FASTPE_INLINE void pack_columns(typename E::U* __restrict a, int64_t lda, const typename E::S* __restrict x, int64_t ldx, int64_t R, int64_t cols, int64_t n, typename E::U* tmp) {
  const int64_t units = (R + E::kPack - 1) / E::kPack;
  if constexpr (E::kPack == 1) {
    transpose(a, lda, x, ldx, R, n);
  } else {
    const int64_t np = (n + VF::kLanes - 1) / VF::kLanes * VF::kLanes;
    pack_rows<E>(tmp, np, x, ldx, R, n);
    transpose(a, lda, tmp, np, units, n);
  }
  for (int64_t d = 0; d < n; ++d)
    for (int64_t r = units; r < cols; ++r) a[d * lda + r] = 0;
}

}  // namespace
}  // namespace fastpe::cpu::FASTPE_ISA
