// What the backward passes of attention, CoPE and landmarks read alike: the upstream gradient, and rows of a block as operands.
#pragma once

#include "attn_common.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

// n channels of a block's rows (pitch ldx, as in pack_rows) as a B operand with the row on the k axis; rows up to the last whole
// lane group are zero. `factor`, by row, is for operands of single scalars.
template <class E>
FASTPE_INLINE void pack_block_rows(typename E::U* __restrict dst, int64_t ld, const typename E::S* __restrict x, int64_t ldx, int64_t n, int64_t rows, int64_t lanes, const typename E::S* factor = nullptr) {
  using V = Vec<typename E::S>;
  constexpr int L = V::kLanes;
  if constexpr (E::kPack == 1) {
    for (int64_t r = 0; factor && r < rows; ++r) {
      int64_t d = 0;
      for (; d + L <= n; d += L) (V::load(x + r * ldx + d) * V(factor[r])).store(dst + r * ld + d);
      for (; d < n; ++d) dst[r * ld + d] = x[r * ldx + d] * factor[r];
      for (; d < ld; ++d) dst[r * ld + d] = 0;
    }
  }
  if (E::kPack != 1 || !factor) pack_rows<E>(dst, ld, x, ldx, rows, n);
  for (int64_t r = tiles::ceil_div(rows, E::kPack); r < tiles::ceil_div(lanes, E::kPack); ++r)
    for (int64_t d = 0; d < ld; ++d) dst[r * ld + d] = 0;
}

// For rows [i0, i0 + rows) of head h: lse in log2 units and delta_i = <dO_i, O_i> - dlse_i by lane, so that P = exp2(x - lse) is 0 in
// rows that see nothing and in lanes past the last row; dO transposed (dot, pitch kBM); and dO by rows as a B operand of pitch ld,
// which is the result: where dO lies, or packed in `by_row` (null: not wanted). Args: AttnBwdParams and its like.
// room: kBM + 1 rows of Dv scalars and a vector; units: kBM rows of operand units.
template <class E, class Args>
FASTPE_INLINE const typename E::U* load_upstream(const Args& a, const AttnParams& p, int64_t b, int64_t h, int64_t i0, int64_t rows, int64_t lanes, typename E::S* lse, typename E::S* delta, typename E::U* dot_t,
                                                 typename E::U* by_row, int64_t ld, typename E::S* room, typename E::U* units) {
  using S = typename E::S;
  const bool here = E::kPack == 1 && p.dtype == kOwnType<E>;  // rows are read where they lie
  const auto row = [&](const View& x, int64_t r, S* copy) -> const S* {
    if (here) return static_cast<const S*>(x.p) + b * x.sb + h * x.sh + (i0 + r) * x.sn;
    load_row(copy, x, p.dtype, b, h, i0 + r, p.Dv);
    return copy;
  };
  const int64_t row0 = (b * p.H + h) * p.Nq + i0;
  const S* lse_in = static_cast<const S*>(p.lse) + row0;
  const S* dlse = a.dlse ? static_cast<const S*>(a.dlse) + row0 : nullptr;
  S* spare = room + kBM * p.Dv;
  for (int64_t r = 0; r < rows; ++r) {
    const S* g = row(a.d_o, r, room + r * p.Dv);
    S d = dot(g, row(p.o, r, spare), p.Dv);
    if (p.residual.p) d += dot(g, row(p.residual, r, spare), p.Dv);
    const bool empty = lse_in[r] == -kInf<S>;
    delta[r] = d - (dlse && !empty ? dlse[r] : S(0));
    lse[r] = empty ? kInf<S> : lse_in[r] * S(kLog2e);
  }
  for (int64_t r = rows; r < lanes; ++r) delta[r] = 0, lse[r] = kInf<S>;
  const S* first = row(a.d_o, 0, room);
  const int64_t pitch = here ? a.d_o.sn : p.Dv;
  pack_transposed<E>(dot_t, kBM, first, pitch, rows, lanes, p.Dv, units);
  if (!by_row) return nullptr;
  if constexpr (E::kPack == 1)
    if (here && pitch == ld && rows == lanes) return first;
  pack_block_rows<E>(by_row, ld, first, pitch, p.Dv, rows, lanes);
  return by_row;
}

// y = the sum of `splits` rows of n, each `step` from the one before, in their order.
template <class S>
FASTPE_INLINE void sum_splits(S* __restrict y, const S* __restrict src, int64_t splits, int64_t step, int64_t n) {
  copy_row(y, src, n);
  for (int64_t s = 1; s < splits; ++s)
    for (int64_t d = 0; d < n; ++d) y[d] += src[s * step + d];
}

inline Rope no_turn(int64_t) { return {}; }

// Rows [j0, j1) of the gradient y of one (batch, kv head), n channels, from the sums of its splits (splits, Nk, ld), row j turned back
// by turn(j). row: room for one.
template <class E, class Turn>
FASTPE_INLINE void store_sums(const View& y, const AttnParams& p, const typename E::S* sums, int64_t splits, int64_t ld, int64_t n, const Turn& turn, int64_t b, int64_t hk, int64_t j0, int64_t j1, typename E::S* row) {
  using S = typename E::S;
  const bool here = E::kPack == 1 && p.dtype == kOwnType<E>;  // summed where they belong
  for (int64_t j = j0; j < j1; ++j) {
    S* to = here ? static_cast<S*>(y.p) + b * y.sb + hk * y.sh + j * y.sn : row;
    sum_splits(to, sums + j * ld, splits, p.Nk * ld, n);
    turn_back(to, turn(j), p.rope_pairs, p.rope_layout, b, hk, j);
    if (!here) store_row(row, y, p.dtype, b, hk, j, n);
  }
}

}  // namespace
}  // namespace fastpe::cpu::FASTPE_ISA
