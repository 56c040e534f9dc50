// Scores that a fused form and a scale do not make, composed one pair at a time (cpu/attn_terms.h does it by vectors).
//
// Composing is many instructions, so it must not be unrolled over a fragment: scores go through shared memory and come
// back. A lane keeps the two rows it has in a fragment, so whatever is summed by row stays in its registers.
#pragma once

#include "bias_tile.cuh"

namespace fastpe::cuda {

// 64 x 64 floats. The pitch leaves two lanes a bank where a warp stores fragments, and none where it reads along a row.
constexpr uint32_t kScorePitch = 68, kScoreBytes = 64 * kScorePitch * 4;
FASTPE_DEVICE uint32_t score_at(uint32_t tile, int row, int col) { return tile + (uint32_t(row) * kScorePitch + uint32_t(col)) * 4; }

// The C fragments of a warp, 16 rows from warp * 16, to and from a tile.
template <int kN>
FASTPE_DEVICE void fragments_to(uint32_t tile, const float (&s)[kN][4]) {
  FASTPE_UNROLL
  for (int n = 0; n < kN; ++n)
    FASTPE_UNROLL
    for (int e = 0; e < 4; ++e) st_shared_f32(score_at(tile, int(warp_index() * 16 + frag_row(uint32_t(e >> 1))), int(8 * n + frag_col(uint32_t(e & 1)))), s[n][e]);
}
template <int kN>
FASTPE_DEVICE void fragments_from(uint32_t tile, float (&s)[kN][4]) {
  FASTPE_UNROLL
  for (int n = 0; n < kN; ++n)
    FASTPE_UNROLL
    for (int e = 0; e < 4; ++e) s[n][e] = ld_shared_f32(score_at(tile, int(warp_index() * 16 + frag_row(uint32_t(e >> 1))), int(8 * n + frag_col(uint32_t(e & 1)))));
}
// Calls f(x, row, col) for the scores of a lane's fragments: rows x = 0 and 1, 16 columns each.
template <class F>
FASTPE_DEVICE void for_own_rows(F&& f) {
  FASTPE_UNROLL
  for (int x = 0; x < 2; ++x) {
    const int row = int(warp_index() * 16 + frag_row(uint32_t(x)));
    FASTPE_NO_UNROLL
    for (int c = 0; c < 16; ++c) f(x, row, int(8 * (c >> 1) + frag_col(uint32_t(c & 1))));
  }
}

struct Softcap {
  float in, mul, grad;  // 2 / C; multiplier with log2 e; multiplier / C. in = 0: none
  FASTPE_DEVICE explicit Softcap(const AttnParams& p)
      : in(p.softcap > 0 ? float(2 / p.softcap) : 0.f), mul(float(p.softcap_mul * kLog2e)), grad(p.softcap > 0 ? float(p.softcap_mul / p.softcap) : 1.f) {}
  // Caps x and returns the derivative. C tanh(x / C) as C (1 - 2 / (1 + exp(2 x / C))); x carries log2 e.
  FASTPE_DEVICE float apply(float& x) const {
    if (in == 0) return 1.f;
    const float th = 1.f - 2.f / (1.f + ex2_approx(x * in));
    x = mul * th;
    return grad * (1.f - th * th);
  }
};

// ---- what a bias looks up ---------------------------------------------------------------------------------------------

FASTPE_DEVICE bool is_mapped(const Bias& s) { return s.table.p && (s.u.p || s.w.p); }

// Entry of a table form or of fire's numerator. d: difference of positions, whole where the table is mapped; t: I - j.
FASTPE_DEVICE int64_t table_entry(const Bias& s, float d, int64_t t) {
  return pos::table_index(s.form, is_mapped(s) ? int64_t(d) : t, s.table_len);
}
// The piece that x falls into: the last that begins below it.
FASTPE_DEVICE int piece_of(const AttnParams& p, int64_t h, float x) {
  const float* begin = aux_at<float>(p.bias.pieces, 0, h);
  int lo = 0, hi = int(p.bias.pieces_len);
  while (hi - lo > 1) {
    const int mid = (lo + hi) / 2;
    if (x > begin[mid]) lo = mid;
    else hi = mid;
  }
  return lo;
}
// u_i - w_j of the mapped tables: whole numbers.
FASTPE_DEVICE float position_difference(const AttnParams& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  const Bias& s = p.bias;
  const int64_t I = i + p.Nk - p.Nq;
  const float u = s.u.p ? aux_at<float>(s.u, b, h)[i] : s.w.p ? aux_at<float>(s.w, b, h)[I] : float(I);
  return u - (s.w.p ? aux_at<float>(s.w, b, h)[j] : float(j));
}
// Entry of rows and cols for the offset t, below 0: none.
FASTPE_DEVICE int32_t term_entry(const Bias& s, int64_t t) {
  const int64_t m = (s.index_len - 1) / 2, r = t > m ? -m : t < -m ? m : -t;
  return s.index[r + m];
}

// Element of a (Sq, Sk) array with rows `pitch` apart. The host cannot look at ids on a device: one out of range counts as
// the nearest.
FASTPE_DEVICE int64_t segments_at(const Bias& s, int64_t b, int64_t i, int64_t j, int64_t pitch) {
  const int64_t q = s.q_seg[b * s.q_seg_sb + i], k = s.k_seg[b * s.k_seg_sb + j];
  return (q < 0 ? 0 : q < s.Sq ? q : s.Sq - 1) * pitch + (k < 0 ? 0 : k < s.Sk ? k : s.Sk - 1);
}

// A pair of fire: numerator, x = gamma * numerator, its piece.
struct FireAt {
  float n, x;
  int piece;
  float slope, intercept;
};
FASTPE_DEVICE FireAt fire_at(const AttnParams& p, int64_t h, float d, int64_t t, float gm) {
  FireAt r;
  r.n = aux_at<float>(p.bias.table, 0, h)[table_entry(p.bias, d, t)];
  r.x = r.n * gm;
  r.piece = piece_of(p, h, r.x);
  const float* slopes = aux_at<float>(p.bias.pieces, 1, h);
  r.slope = slopes[r.piece];
  r.intercept = slopes[p.bias.pieces.sb + r.piece];
  return r;
}

// two_sided: D of the plane of the pair's side, and the sign it is added with.
struct SideAt {
  float d, sign;
};
FASTPE_DEVICE SideAt side_at(const AttnParams& p, int64_t b, int64_t h, int64_t I, int64_t j) {
  const Bias& s = p.bias;
  const int64_t plane = j <= I ? h : h + p.H;
  const float* w = aux_at<float>(s.w, b, plane);
  float d = w[I] - w[j];
  if (s.base.p) {
    const double* base = aux_at<double>(s.base, b, plane);
    d += float(base[I / kPrefixBlock] - base[j / kPrefixBlock]);
  }
  return {d, j <= I ? 1.f : -1.f};
}

// shift, here and below: what a batch entry of fewer keys than Nk adds to its absolute rows.
FASTPE_DEVICE float bias_at(const AttnParams& p, int64_t b, int64_t h, int64_t i, int64_t j, float d, float gm, float p0, float p1, int64_t shift = 0) {
  const Bias& s = p.bias;
  const int64_t t = i + p.Nk - p.Nq + shift - j;
  float v = 0;
  if (pos::is_rel_fn(s.form)) {
    v = gm * phi_value(s.form, d, p0, p1);
  } else if (pos::is_table(s.form)) {
    v = aux_at<float>(s.table, 0, h)[table_entry(s, d, t)];
  } else if (s.form == BiasForm::fire) {
    const FireAt f = fire_at(p, h, d, t, gm);
    v = fma(f.slope, f.x, f.intercept);
  }
  if (s.form == BiasForm::two_sided) {
    const SideAt side = side_at(p, b, h, i + p.Nk - p.Nq, j);
    v = gm * side.sign * side.d;
  }
  if (s.index) {
    const int32_t id = term_entry(s, t);
    if (id >= 0 && s.rows.p) v += aux_at<float>(s.rows, b, h, i)[id];
    if (id >= 0 && s.cols.p) v += aux_at<float>(s.cols, b, h, j)[id];
  }
  if (s.dense.p) v += aux_at<float>(s.dense, b, h, i)[j * s.dense_sk];
  if (s.pairs.p) v += aux_at<float>(s.pairs, b, h)[segments_at(s, b, i, j, s.pairs.sn)];
  return v;
}

// What multiplies the product beside its scale.
FASTPE_DEVICE float omega_at(const AttnParams& p, int64_t h, int64_t i, int64_t j, int64_t shift = 0) {
  const Bias& s = p.bias;
  return s.omega.p ? aux_at<float>(s.omega, 0, h)[pos::table_index(s.form, i + p.Nk - p.Nq + shift - j, s.table_len)] : 1.f;
}
FASTPE_DEVICE float factor_at(const AttnParams& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  const Bias& s = p.bias;
  return s.factor.p ? aux_at<float>(s.factor, b, h)[segments_at(s, b, i, j, s.factor.sn)] : 1.f;
}

// A score in log2 units and its derivatives by the scaled product and by the bias.
struct Composed {
  float x, slope, outer;
  float inner;  // slope without the multiplier
};
// term: of the products with tables (strips.cuh).
FASTPE_DEVICE Composed compose(const AttnParams& p, const Softcap& cap, int64_t b, int64_t h, int64_t i, int64_t j, float product, float d, float gm, float p0, float p1, float term, int64_t shift = 0) {
  Composed r{product, 1, 1, 1};
  const float multiplier = factor_at(p, b, h, i, j) * omega_at(p, h, i, j, shift);
  r.x *= multiplier;
  if (!p.softcap_bias) r.inner = cap.apply(r.x);
  r.x = fma(bias_at(p, b, h, i, j, d, gm, p0, p1, shift) + term, float(kLog2e), r.x);
  if (p.softcap_bias) r.inner = r.outer = cap.apply(r.x);
  r.slope = r.inner * multiplier;
  return r;
}

}  // namespace fastpe::cuda
