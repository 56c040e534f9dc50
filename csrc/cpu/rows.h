// Rows in and out: any storage type to the score type and back, rotation, and the packed operand forms of gemm.h.
#pragma once

#include "../core/params.h"
#include "../pos/rotate.h"
#include "gemm.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

template <class S>
FASTPE_INLINE void load_row(S* __restrict y, const View& x, DType t, int64_t b, int64_t h, int64_t n, int64_t D) {
  const int64_t off = b * x.sb + h * x.sh + n * x.sn;
  if constexpr (sizeof(S) == 8) {
    std::memcpy(y, static_cast<const double*>(x.p) + off, size_t(D) * 8);
  } else {
    constexpr int L = VF::kLanes;
    const int64_t D0 = D / L * L;
    if (t == DType::f32) {
      std::memcpy(y, static_cast<const float*>(x.p) + off, size_t(D) * 4);
    } else if (t == DType::bf16) {
      const uint16_t* p = static_cast<const uint16_t*>(x.p) + off;
      for (int64_t d = 0; d < D0; d += L) load_bf16(p + d).store(y + d);
      for (int64_t d = D0; d < D; ++d) y[d] = bf16_to_float(p[d]);
    } else {
      const uint16_t* p = static_cast<const uint16_t*>(x.p) + off;
      for (int64_t d = 0; d < D0; d += L) load_f16(p + d).store(y + d);
      for (int64_t d = D0; d < D; ++d) y[d] = f16_to_float(p[d]);
    }
  }
}

template <class S>
FASTPE_INLINE void store_row(const S* __restrict y, const View& x, DType t, int64_t b, int64_t h, int64_t n, int64_t D) {
  const int64_t off = b * x.sb + h * x.sh + n * x.sn;
  if constexpr (sizeof(S) == 8) {
    std::memcpy(static_cast<double*>(x.p) + off, y, size_t(D) * 8);
  } else {
    constexpr int L = VF::kLanes;
    const int64_t D0 = D / L * L;
    if (t == DType::f32) {
      std::memcpy(static_cast<float*>(x.p) + off, y, size_t(D) * 4);
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

// Rotates one row in place with the tables' row (b, h, n).
template <class S>
FASTPE_INLINE void rotate_row(S* __restrict x, const Rope& rope, int64_t J, RopeLayout layout, bool inverse, int64_t b, int64_t h, int64_t n) {
  const int64_t co = b * rope.cos.sb + h * rope.cos.sh + n * rope.cos.sn;
  const int64_t so = b * rope.sin.sb + h * rope.sin.sh + n * rope.sin.sn;
  const S* __restrict c = static_cast<const S*>(rope.cos.p) + co;
  const S* __restrict s = static_cast<const S*>(rope.sin.p) + so;
  const S sign = inverse ? S(-1) : S(1);
  if (layout == RopeLayout::half) {
    S* __restrict y = x + J;
    for (int64_t j = 0; j < J; ++j) pos::rotate_pair(x[j], y[j], c[j], sign * s[j]);
  } else {
    for (int64_t j = 0; j < J; ++j) pos::rotate_pair(x[2 * j], x[2 * j + 1], c[j], sign * s[j]);
  }
}

template <class S>
FASTPE_INLINE S norm2(const S* x, int64_t D) {
  S s = 0;
  for (int64_t d = 0; d < D; ++d) s += x[d] * x[d];
  return s;
}

// ---- packed operands --------------------------------------------------------------------------------------------
// Units of E along the packed axis; K is padded with zeros to a whole unit by the callers' buffers.

// One A row from a row of scalars: n scalars, n a multiple of kPack.
template <class E>
FASTPE_INLINE void pack_row(typename E::U* __restrict a, const typename E::S* __restrict x, int64_t n) {
  if constexpr (E::kPack == 1) {
    std::memcpy(a, x, size_t(n) * sizeof(*a));
  } else {
    uint16_t* p = reinterpret_cast<uint16_t*>(a);
    int64_t i = 0;
    for (; i + VF::kLanes <= n; i += VF::kLanes) store_bf16(p + i, VF::load(x + i));
    for (; i < n; ++i) p[i] = float_to_bf16(x[i]);
  }
}

// The transpose of R rows of n scalars (pitch ldx) as a B operand: b[k][r], k in units, pitch ldb, rows >= R zero.
template <class E>
FASTPE_INLINE void pack_transposed(typename E::U* __restrict b, int64_t ldb, const typename E::S* __restrict x, int64_t ldx, int64_t R, int64_t lanes, int64_t n) {
  for (int64_t k = 0; k < n / E::kPack; ++k) {
    typename E::U* row = b + k * ldb;
    if constexpr (E::kPack == 1) {
      for (int64_t r = 0; r < R; ++r) row[r] = x[r * ldx + k];
    } else {
      for (int64_t r = 0; r < R; ++r)
        row[r] = uint32_t(float_to_bf16(x[r * ldx + 2 * k])) | uint32_t(float_to_bf16(x[r * ldx + 2 * k + 1])) << 16;
    }
    for (int64_t r = R; r < lanes; ++r) row[r] = 0;
  }
}

#if defined(__AVX512BF16__)
// Two vectors to interleaved bf16 pairs: lane l of the result holds (lo[l], hi[l]).
FASTPE_INLINE __m512i interleave_bf16(VF lo, VF hi) {
  const __m512i l = _mm512_cvtepu16_epi32(to_bf16(lo));
  const __m512i h = _mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(hi)), 16);
  return _mm512_or_si512(l, h);
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
      std::memcpy(b + r * ldb, x + r * ldx, size_t(n) * sizeof(*b));
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

// The transpose of R rows as an A operand: a[d][r / kPack], pitch lda units; r beyond R up to `cols` units is zero.
template <class E>
FASTPE_INLINE void pack_columns(typename E::U* __restrict a, int64_t lda, const typename E::S* __restrict x, int64_t ldx, int64_t R, int64_t cols, int64_t n) {
  for (int64_t d = 0; d < n; ++d) {
    typename E::U* row = a + d * lda;
    if constexpr (E::kPack == 1) {
      for (int64_t r = 0; r < R; ++r) row[r] = x[r * ldx + d];
      for (int64_t r = R; r < cols; ++r) row[r] = 0;
    } else {
      uint16_t* p = reinterpret_cast<uint16_t*>(row);
      for (int64_t r = 0; r < R; ++r) p[r] = float_to_bf16(x[r * ldx + d]);
      for (int64_t r = R; r < 2 * cols; ++r) p[r] = 0;
    }
  }
}

}  // namespace
}  // namespace fastpe::cpu::FASTPE_ISA
