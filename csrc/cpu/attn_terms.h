// Composed scores: softcap, multiplicative kernel, and every bias that is not one of the fused forms.
//
// A pass between the product and the softmax turns the products of a few keys at a time, in L1, into scores
//   x = c <q, k>,  times omega,  softcapped,  plus piecewise linear, mapped table, row, column and dense terms
// (softcapped after the sum under softcap_bias). The softmax then runs as if x were a product with factor 1. The
// backward pass composes again, and takes the gradients of the terms from dS one after the other.
#pragma once

#include "attn_common.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

// t[index] for whole numbers in range.
FASTPE_INLINE VF gather(const float* t, VF index) {
#if defined(__AVX512F__)
  return VF(VF::Raw(_mm512_i32gather_ps(_mm512_cvttps_epi32(__m512(index.v)), t, 4)));
#elif defined(__AVX2__)
  return VF(VF::Raw(_mm256_i32gather_ps(t, _mm256_cvttps_epi32(__m256(index.v)), 4)));
#else
  VF y;
  for (int l = 0; l < VF::kLanes; ++l) y.v[l] = t[int32_t(index.v[l])];
  return y;
#endif
}
FASTPE_INLINE VD gather(const double* t, VD index) {
  VD y;
  for (int l = 0; l < VD::kLanes; ++l) y.v[l] = t[int64_t(index.v[l])];
  return y;
}

// Private sums of the terms' gradients of one (batch, head, split); pieces not wanted are null.
template <class S>
struct TermGrad {
  double* pieces = nullptr;  // slopes (S), then intercepts (S)
  S* mapped = nullptr;       // table_len
  S* cols = nullptr;         // (Nk, R)
  S* key = nullptr;          // Nk: a dense bias that all queries share
  S *factor = nullptr, *pairs = nullptr;  // (Sq, Sk)
  // Written by the one task that owns the block of queries.
  S* rows = nullptr;         // (Nq, R)
  S* dense = nullptr;        // (Nq, Nk)
  S* row = nullptr;          // Nq: a dense bias that all keys share
};

// What the composed parts of a tile can do to a score: the largest factor of its product, and the largest addition to it.
template <class S>
struct Reach {
  S omega = 1, added = 0;
};

// The terms of one head over one block of queries.
template <class E>
struct Terms {
  using S = typename E::S;
  using V = Vec<S>;
  static constexpr int L = V::kLanes;
  static constexpr int64_t kKeys = 32;  // keys of a pass
  static constexpr int64_t kSub = 16;   // keys whose piece is looked for together
  static constexpr int64_t kScratch = 2 * kKeys * kBM + kBM;

  const Call<E>& call;
  const HeadBias<S>& hb;
  const BlockBias<S>& bb;
  int64_t b, h, i0, rows, lanes, I0;
  S* buf;  // kScratch
  StripScratch<E>* strips;

  const AttnParams& p() const { return call.p; }

  // ---- segments -----------------------------------------------------------------------------------------------------

  S* q_seg() const { return buf + 2 * kKeys * kBM; }  // by lane, as a number
  const int32_t* k_seg() const { return p().bias.k_seg + b * p().bias.k_seg_sb; }

  bool has_strips() const {
    if constexpr (E::kPack == 1) return p().bias.row_e || p().bias.col_e;
    return false;
  }
  // Once a block of queries.
  void start() const {
    const Bias& bias = p().bias;
    if constexpr (E::kPack == 1) strips->start_block(p(), b, h, i0, rows);
    for (int64_t l = 0; bias.q_seg && l < kBM; ++l) q_seg()[l] = l < rows ? S(bias.q_seg[b * bias.q_seg_sb + i0 + l]) : S(0);
  }

  // Once a tile that is computed.
  void start_tile(int64_t j0, int64_t js, int64_t je) const {
    if constexpr (E::kPack == 1)
      if (has_strips()) strips->start_tile(p(), call.row_strip, call.col_strip, call.index_lut(), b, h, I0, lanes, j0, js, je);
  }

  // f(first key, end, first lane, entries of the table for the vector's rows) for runs of keys of one segment.
  template <class Fn>
  void by_segment(const Aux& table, int64_t j0, int64_t c0, int64_t c1, Fn&& f) const {
    const int32_t* k = k_seg() + j0;
    const S* t = at<S>(table, b, h);
    for (int64_t a = c0, e; a < c1; a = e) {
      for (e = a + 1; e < c1 && k[e] == k[a];) ++e;
      for (int64_t l = 0; l < lanes; l += L) f(a, e, l, gather(t, fma(V::load(q_seg() + l), V(S(table.sn)), V(S(k[a])))));
    }
  }

  // sums[segment of the row][segment of the key] += x of keys [c0, c1); x(j, l) is a vector of rows.
  template <class Fn>
  void sum_pairs(S* sums, int64_t j0, int64_t c0, int64_t c1, Fn&& x) const {
    const Bias& bias = p().bias;
    const int32_t *k = k_seg() + j0, *q = bias.q_seg + b * bias.q_seg_sb + i0;
    for (int64_t a = c0, e; a < c1; a = e) {
      for (e = a + 1; e < c1 && k[e] == k[a];) ++e;
      for (int64_t l = 0; l < lanes; l += L) {
        V acc(S(0));
        for (int64_t j = a; j < e; ++j) acc = acc + x(j, l);
        for (int y = 0; y < L && l + y < rows; ++y) sums[q[l + y] * bias.Sk + k[a]] += acc.v[y];
      }
    }
  }

  void multiply_factor(S* s, int64_t P, int64_t j0, int64_t c0, int64_t c1) const {
    by_segment(p().bias.factor, j0, c0, c1, [&](int64_t a, int64_t e, int64_t l, V f) {
      for (int64_t j = a; j < e; ++j) (V::load(s + j * P + l) * f).store(s + j * P + l);
    });
  }

  // Products s of keys [c0, c1) of the tile at j0 become scores in log2 units. cap: the softcap's slope; may be null.
  void compose(const TileBias<S>& tb, const S* c, S* s, int64_t P, S* cap, int64_t j0, int64_t c0, int64_t c1) const {
    const Bias& bias = p().bias;
    const S* om = call.omega_of(h);
    // Without a step between the two, the pieces are added as the products are scaled.
    const bool at_once = bias.form == BiasForm::fire && !om && !bias.factor && !bias.pairs && !(p().softcap > 0 && !p().softcap_bias);
    for (int64_t j = c0; !at_once && j < c1; ++j)
      for (int64_t l = 0; l < lanes; l += L) {
        V x = V::load(s + j * P + l) * V::load(c + l);
        if (om) x = x * V::load(om + (I0 - j0) + l - j);
        x.store(s + j * P + l);
      }
    if (bias.factor) multiply_factor(s, P, j0, c0, c1);
    if (p().softcap > 0 && !p().softcap_bias) soften(s, P, cap, c0, c1);
    if (bias.pairs)
      by_segment(bias.pairs, j0, c0, c1, [&](int64_t a, int64_t e, int64_t l, V f) {
        for (int64_t j = a; j < e; ++j) fma(f, V(S(kLog2e)), V::load(s + j * P + l)).store(s + j * P + l);
      });
    if (bias.form == BiasForm::fire) add_pieces(tb, at_once ? c : nullptr, s, P, c0, c1);
    if (hb.mapped && pos::is_table(bias.form)) add_mapped(tb, s, P, c0, c1);
    if (bias.rows || bias.cols) add_indexed(s, P, j0, c0, c1);
    if constexpr (E::kPack == 1)
      if (has_strips()) strips->add(s, P, lanes, c0, c1, V(S(kLog2e)), buf);
    if (bias.dense) add_dense(s, P, j0, c0, c1);
    if (p().softcap > 0 && p().softcap_bias) {
      with_kind(tb, [&](auto kind, auto phi) {
        constexpr Kind K = decltype(kind)::value;
        for (int64_t l = 0; l < lanes; l += L) {
          const ScoreAt<K, decltype(phi), S> at(tb, l, V(S(1)), V(S(0)));
          for (int64_t j = c0; j < c1; ++j) at(tb, j, l, V::load(s + j * P + l)).store(s + j * P + l);
        }
      });
      soften(s, P, cap, c0, c1);
    }
  }

  // ---- the bound that skips tiles -------------------------------------------------------------------------------------

  // What compose can make of the products of keys [js, je) of the tile at j0. Bounds hold for the numbers as float computes
  // them: `added` is raised by more than their rounding.
  void reach(const TileBias<S>& tb, Reach<S>& r, int64_t j0, int64_t js, int64_t je) const {
    r = {};
    if (const S* om = call.omega_of(h)) {
      V most(S(0));
      const S* t = om + (I0 - j0);
      for (int64_t x = 1 - je; x < lanes - js; x += L) most = max(abs(V::load(t + x)), most);
      r.omega = highest(most);
    }
    const bool fire = p().bias.form == BiasForm::fire;
    if (!fire && !(hb.mapped && pos::is_table(p().bias.form))) return;
    S most;
    if (fire) {
      S n0, n1;
      if (hb.mapped) {
        span_of(tb, js, je, n0, n1);
        const S far = max_of(n0 < 0 ? -n0 : n0, n1 < 0 ? -n1 : n1), near = n0 <= 0 && n1 >= 0 ? S(0) : min_of(n0 < 0 ? -n0 : n0, n1 < 0 ? -n1 : n1);
        extremes(hb.raw_table, near, far, n0, n1);
      } else {
        V least(kInf<S>), top(-kInf<S>);
        for (int64_t x = 1 - je; x < lanes - js; x += L) {
          const V n = V::load(tb.table + x);
          least = min(n, least);
          top = max(n, top);
        }
        n0 = lowest(least), n1 = highest(top);
      }
      most = highest_piece(n0, n1);
    } else {
      S d0, d1, low;
      span_of(tb, js, je, d0, d1);
      const S last = S(p().bias.table_len - 1), mid = p().bias.form == BiasForm::table ? S(int64_t(last) / 2) : S(0);
      if (p().bias.form == BiasForm::table) extremes(hb.raw_table, mid - d1, mid - d0, low, most);
      else extremes(hb.raw_table, d0, d1, low, most);
    }
    r.added = most * S(kLog2e) + (most < 0 ? -most : most) * S(1e-5) + S(1e-5);
  }

  static S max_of(S a, S b2) { return a > b2 ? a : b2; }
  static S min_of(S a, S b2) { return a < b2 ? a : b2; }
  // Smallest and largest difference of positions in the tile.
  void span_of(const TileBias<S>& tb, int64_t js, int64_t je, S& d0, S& d1) const {
    S lo = tb.r[0], hi = tb.r[0];
    for (int64_t l = 1; l < rows; ++l) lo = min_of(lo, tb.r[l]), hi = max_of(hi, tb.r[l]);
    S a = tb.y[js], e = tb.y[js];
    for (int64_t j = js + 1; j < je; ++j) a = min_of(a, tb.y[j]), e = max_of(e, tb.y[j]);
    d0 = lo - e, d1 = hi - a;
  }
  // Smallest and largest entry of the given table between two places, which are clamped to it.
  void extremes(const S* table, S from, S to, S& low, S& high) const {
    const int64_t last = p().bias.table_len - 1;
    const auto place = [&](S x) { return x <= 0 ? int64_t(0) : x >= S(last) ? last : int64_t(x); };
    const int64_t a = place(from), e = place(to);
    low = high = table[a];
    for (int64_t x = a + 1; x <= e; ++x) low = min_of(low, table[x]), high = max_of(high, table[x]);
  }
  // The largest value of the pieces where the numerator lies in [n0, n1]: at an end, or where a piece begins.
  S highest_piece(S n0, S n1) const {
    const S g0 = bb.gm_least, g1 = bb.gm_most;
    S x0 = kInf<S>, x1 = -kInf<S>;
    const S ends[4] = {n0 * g0, n0 * g1, n1 * g0, n1 * g1};
    for (const S x : ends) x0 = min_of(x0, x), x1 = max_of(x1, x);
    const S *t = begin(), *m = slope(), *n = intercept();
    const int64_t count = p().bias.pieces_len;
    int64_t k = 0;
    while (k + 1 < count && x0 > t[k + 1]) ++k;
    S best = m[k] * x0 + n[k];
    for (; k + 1 < count && t[k + 1] < x1; ++k) best = max_of(best, m[k + 1] * t[k + 1] + n[k + 1]);
    return max_of(best, m[k] * x1 + n[k]);
  }

  // The largest score, in log2 units, of queries whose products are at most `product` in size, for a closed form that adds
  // at most `form`.
  FASTPE_INLINE V upper(const Reach<S>& r, V product, V form) const {
    const auto capped = [&](V x) {  // raised by more than tanh's own error
      return V(S(p().softcap_mul * kLog2e)) * (tanh(x * V(S(kLn2 / p().softcap))) + V(S(2e-6)));
    };
    const V x = product * V(r.omega), add = form + V(r.added);
    if (!(p().softcap > 0)) return x + add;
    return p().softcap_bias ? capped(x + add) : capped(x) + add;
  }

  void soften(S* s, int64_t P, S* cap, int64_t c0, int64_t c1) const {
    const V in(S(kLn2 / p().softcap)), mul(S(p().softcap_mul * kLog2e)), grad(S(p().softcap_mul / p().softcap));
    for (int64_t j = c0; j < c1; ++j)
      for (int64_t l = 0; l < lanes; l += L) {
        const V th = tanh(V::load(s + j * P + l) * in);
        if (cap) (grad * (V(S(1)) - th * th)).store(cap + j * P + l);
        (mul * th).store(s + j * P + l);
      }
  }

  // ---- piecewise linear in the row-normalised distance ------------------------------------------------------------

  // The numerators of keys [a, e), at most kSub, and the pieces [lo, hi] that x can fall into. Near the diagonal those are
  // many; further out a block of keys rarely leaves one piece, since x moves slowly there.
  struct Block {
    const S* n;    // lane l, key j: n[l + (j - a) * step]
    int64_t step;
    int64_t lo, hi;
  };
  const S* begin() const { return static_cast<const S*>(p().bias.pieces.p) + h * p().bias.pieces.sh; }
  const S* slope() const { return begin() + p().bias.pieces.sb; }
  const S* intercept() const { return begin() + 2 * p().bias.pieces.sb; }

  static S lowest(V x) {
    S y = x.v[0];
    for (int l = 1; l < L; ++l) y = x.v[l] < y ? x.v[l] : y;
    return y;
  }
  static S highest(V x) {
    S y = x.v[0];
    for (int l = 1; l < L; ++l) y = x.v[l] > y ? x.v[l] : y;
    return y;
  }

  Block numerators(const TileBias<S>& tb, int64_t a, int64_t e) const {
    V least(kInf<S>), most(-kInf<S>);
    const auto see = [&](V n) {
      least = min(n, least);
      most = max(n, most);
    };
    Block r;
    if (hb.mapped) {
      const V last(S(p().bias.table_len - 1));
      for (int64_t j = a; j < e; ++j)
        for (int64_t l = 0; l < lanes; l += L) {
          const V n = gather(hb.raw_table, min(abs(V::load(tb.r + l) - V(tb.y[j])), last));
          n.store(buf + (j - a) * kBM + l);
          see(n);
        }
      r.n = buf, r.step = kBM;
    } else {
      // Lane l of key j reads entry l - j: together they read one run.
      int64_t t = 1 - e;
      for (; t + L <= lanes - a; t += L) see(V::load(tb.table + t));
      see(V::load(tb.table + lanes - a - L));
      r.n = tb.table - a, r.step = -1;
    }
    const S n0 = lowest(least), n1 = highest(most), g0 = bb.gm_least, g1 = bb.gm_most;
    const S ends[4] = {n0 * g0, n0 * g1, n1 * g0, n1 * g1};
    S lo = ends[0], hi = ends[0];
    for (const S x : ends) {
      lo = x < lo ? x : lo;
      hi = x > hi ? x : hi;
    }
    const S* t = begin();
    const int64_t count = p().bias.pieces_len;
    r.lo = 0;
    while (r.lo + 1 < count && lo > t[r.lo + 1]) ++r.lo;
    r.hi = r.lo;
    while (r.hi + 1 < count && hi > t[r.hi + 1]) ++r.hi;
    return r;
  }

  // s of keys [c0, c1) times c (null: 1), plus the pieces.
  void add_pieces(const TileBias<S>& tb, const S* c, S* s, int64_t P, int64_t c0, int64_t c1) const {
    const S *t = begin(), *m = slope(), *n = intercept();
    const V unit{S(kLog2e)};
    for (int64_t a = c0; a < c1; a += kSub) {
      const int64_t e = a + kSub < c1 ? a + kSub : c1;
      const Block r = numerators(tb, a, e);
      for (int64_t l = 0; l < lanes; l += L) {
        const V gm = V::load(bb.gm + l), scale = c ? V::load(c + l) : V(S(1));
        const S* num = r.n + l;
        S* row = s + a * P + l;
        if (r.lo == r.hi) {
          const V sl = gm * V(m[r.lo]) * unit, in = V(n[r.lo]) * unit;
          for (int64_t j = a; j < e; ++j, num += r.step, row += P) fma(V::load(row), scale, fma(sl, V::load(num), in)).store(row);
          continue;
        }
        for (int64_t j = a; j < e; ++j, num += r.step, row += P) {
          const V x = V::load(num) * gm;
          V sl(m[r.lo]), in(n[r.lo]);
          for (int64_t k = r.lo + 1; k <= r.hi; ++k) {
            const Mask<S> past = x > V(t[k]);
            sl = select(past, V(m[k]), sl);
            in = select(past, V(n[k]), in);
          }
          fma(V::load(row), scale, fma(sl, x, in) * unit).store(row);
        }
      }
    }
  }

  // dS of keys [c0, c1) -> sums by piece, d gamma by row (lane), and d numerator into aux (pitch P, from key c0 on); null:
  // not wanted.
  void pieces_grads(const TileBias<S>& tb, const S* ds, int64_t P, S* aux, S* dgamma, double* sums, int64_t c0, int64_t c1) const {
    const S *t = begin(), *m = slope();
    const int64_t count = p().bias.pieces_len;
    for (int64_t a = c0; a < c1; a += kSub) {
      const int64_t e = a + kSub < c1 ? a + kSub : c1;
      const Block r = numerators(tb, a, e);
      if (r.lo == r.hi) {  // one slope: every sum comes from dS and dS times the numerator
        V all0(S(0)), all1(S(0));
        for (int64_t l = 0; l < lanes; l += L) {
          const V gm = V::load(bb.gm + l), dn = gm * V(m[r.lo]);
          const S *num = r.n + l, *d = ds + a * P + l;
          V sum(S(0)), weighted(S(0));
          for (int64_t j = a; j < e; ++j, num += r.step, d += P) {
            const V dv = V::load(d);
            sum = sum + dv;
            weighted = fma(dv, V::load(num), weighted);
            if (aux) (dv * dn).store(aux + (j - c0) * P + l);
          }
          if (dgamma) fma(weighted, V(m[r.lo]), V::load(dgamma + l)).store(dgamma + l);
          all0 = all0 + sum;
          all1 = fma(weighted, gm, all1);
        }
        if (sums) {
          sums[r.lo] += double(reduce_add(all1));
          sums[count + r.lo] += double(reduce_add(all0));
        }
        continue;
      }
      if (aux || dgamma)
        for (int64_t l = 0; l < lanes; l += L) {
          const V gm = V::load(bb.gm + l);
          const S* num = r.n + l;
          V acc(S(0));
          for (int64_t j = a; j < e; ++j, num += r.step) {
            const V nv = V::load(num), x = nv * gm;
            V sl(m[r.lo]);
            for (int64_t k = r.lo + 1; k <= r.hi; ++k) sl = select(x > V(t[k]), V(m[k]), sl);
            const V dx = V::load(ds + j * P + l) * sl;
            acc = fma(dx, nv, acc);
            if (aux) (dx * gm).store(aux + (j - c0) * P + l);
          }
          if (dgamma) (V::load(dgamma + l) + acc).store(dgamma + l);
        }
      if (!sums) continue;
      // Sums over x beyond the start of a piece; a piece's own is the difference to the next.
      double s0 = 0, s1 = 0;
      for (int64_t k = r.hi; k >= r.lo; --k) {
        V a0(S(0)), a1(S(0));
        const V from(k > r.lo ? t[k] : -kInf<S>);
        for (int64_t l = 0; l < lanes; l += L) {
          const V gm = V::load(bb.gm + l);
          const S* num = r.n + l;
          for (int64_t j = a; j < e; ++j, num += r.step) {
            const V x = V::load(num) * gm;
            V d = V::load(ds + j * P + l);
            if (k > r.lo) d = select(x > from, d, V(S(0)));
            a0 = a0 + d;
            a1 = fma(d, x, a1);
          }
        }
        const double u0 = double(reduce_add(a0)), u1 = double(reduce_add(a1));
        sums[k] += u1 - s1;
        sums[count + k] += u0 - s0;
        s0 = u0;
        s1 = u1;
      }
    }
  }

  // ---- tables over differences of integer positions ---------------------------------------------------------------

  FASTPE_INLINE V map_index(const TileBias<S>& tb, int64_t j, int64_t l) const {
    const V d = V::load(tb.r + l) - V(tb.y[j]);
    const S last = S(p().bias.table_len - 1);
    const V x = p().bias.form == BiasForm::table ? V(last / 2) - d : d;
    return min(max(V(S(0)), x), V(last));
  }
  void add_mapped(const TileBias<S>& tb, S* s, int64_t P, int64_t c0, int64_t c1) const {
    for (int64_t j = c0; j < c1; ++j)
      for (int64_t l = 0; l < lanes; l += L)
        fma(gather(hb.raw_table, map_index(tb, j, l)), V(S(kLog2e)), V::load(s + j * P + l)).store(s + j * P + l);
  }
  void mapped_grads(const TileBias<S>& tb, const S* ds, int64_t P, S* sums, int64_t c0, int64_t c1) const {
    for (int64_t j = c0; j < c1; ++j)
      for (int64_t l = 0; l < lanes; l += L) {
        const V at = map_index(tb, j, l), d = V::load(ds + j * P + l);
        for (int x = 0; x < L && l + x < rows; ++x) sums[int64_t(at.v[x])] += d.v[x];
      }
  }
  // As mapped_grads for a numerator: dx (rows from c0 on) at min(|D|, L - 1).
  void numerator_grads(const TileBias<S>& tb, const S* dx, int64_t P, S* sums, int64_t c0, int64_t c1) const {
    const V last(S(p().bias.table_len - 1));
    for (int64_t j = c0; j < c1; ++j)
      for (int64_t l = 0; l < lanes; l += L) {
        const V at = min(abs(V::load(tb.r + l) - V(tb.y[j])), last), d = V::load(dx + (j - c0) * P + l);
        for (int x = 0; x < L && l + x < rows; ++x) sums[int64_t(at.v[x])] += d.v[x];
      }
  }

  // ---- rows and columns: one entry of a query's or a key's own table -----------------------------------------------

  // Entries of offsets; lane l, key j reads [l - j].
  const int32_t* entries(int64_t j0) const { return call.index_lut() + (I0 - j0); }
  // True when all pairs of the block take one entry, as beyond a clip.
  bool one_entry(const int32_t* ix, int64_t c0, int64_t c1) const {
    for (int64_t t = 1 - c1; t < lanes - c0; ++t)
      if (ix[t] != ix[-c0]) return false;
    return true;
  }
  const S* row_terms() const { return at<S>(p().bias.rows, b, h, i0); }
  const S* col_terms(int64_t j0) const { return at<S>(p().bias.cols, b, h, j0); }

  void add_indexed(S* s, int64_t P, int64_t j0, int64_t c0, int64_t c1) const {
    const int32_t* ix = entries(j0);
    const S *zr = row_terms(), *zc = col_terms(j0);
    const int64_t rs = p().bias.rows.sn, cs = p().bias.cols.sn;
    const V unit{S(kLog2e)};
    if (one_entry(ix, c0, c1)) {
      const int32_t id = ix[-c0];
      if (id < 0) return;
      for (int64_t l = 0; l < lanes; ++l) buf[l] = zr && l < rows ? zr[l * rs + id] : S(0);
      for (int64_t j = c0; j < c1; ++j) {
        const V col(zc ? zc[j * cs + id] : S(0));
        for (int64_t l = 0; l < lanes; l += L) fma(V::load(buf + l) + col, unit, V::load(s + j * P + l)).store(s + j * P + l);
      }
      return;
    }
    for (int64_t j = c0; j < c1; ++j) {
      for (int64_t l = 0; l < lanes; ++l) buf[l] = 0;
      for (int64_t l = 0; l < rows; ++l) {
        const int32_t id = ix[l - j];
        if (id < 0) continue;
        if (zr) buf[l] += zr[l * rs + id];
        if (zc) buf[l] += zc[j * cs + id];
      }
      for (int64_t l = 0; l < lanes; l += L) fma(V::load(buf + l), unit, V::load(s + j * P + l)).store(s + j * P + l);
    }
  }

  void strip_grads(const S* ds, int64_t P, int64_t c0, int64_t c1) const {
    if constexpr (E::kPack == 1) strips->keep(ds, P, lanes, c0, c1);
  }

  void indexed_grads(const S* ds, int64_t P, const TermGrad<S>& g, int64_t j0, int64_t c0, int64_t c1) const {
    const int32_t* ix = entries(j0);
    const int64_t R = p().bias.terms_len;
    S* dr = g.rows ? g.rows + i0 * R : nullptr;
    S* dc = g.cols ? g.cols + j0 * R : nullptr;
    if (one_entry(ix, c0, c1)) {
      const int32_t id = ix[-c0];
      if (id < 0) return;
      if (dr)
        for (int64_t l = 0; l < lanes; l += L) {
          V acc(S(0));
          for (int64_t j = c0; j < c1; ++j) acc = acc + V::load(ds + j * P + l);
          for (int x = 0; x < L && l + x < rows; ++x) dr[(l + x) * R + id] += acc.v[x];
        }
      if (dc)
        for (int64_t j = c0; j < c1; ++j) {
          V acc(S(0));
          for (int64_t l = 0; l < lanes; l += L) acc = acc + V::load(ds + j * P + l);
          dc[j * R + id] += reduce_add(acc);
        }
      return;
    }
    for (int64_t j = c0; j < c1; ++j)
      for (int64_t l = 0; l < rows; ++l) {
        const int32_t id = ix[l - j];
        if (id < 0) continue;
        if (dr) dr[l * R + id] += ds[j * P + l];
        if (dc) dc[j * R + id] += ds[j * P + l];
      }
  }

  // ---- dense --------------------------------------------------------------------------------------------------------

  void add_dense(S* s, int64_t P, int64_t j0, int64_t c0, int64_t c1) const {
    const Bias& bias = p().bias;
    const S* d = at<S>(bias.dense, b, h, i0);
    const V unit{S(kLog2e)};
    if (bias.dense_sk == 0)
      for (int64_t l = 0; l < lanes; ++l) buf[l] = l < rows ? d[l * bias.dense.sn] : S(0);
    else if (bias.dense.sn != 0) {
      transpose(buf, kBM, d + j0 + c0, bias.dense.sn, rows, c1 - c0);
      for (int64_t j = 0; j < c1 - c0; ++j)
        for (int64_t l = rows; l < lanes; ++l) buf[j * kBM + l] = 0;
    }
    for (int64_t j = c0; j < c1; ++j)
      for (int64_t l = 0; l < lanes; l += L) {
        const V x = bias.dense_sk == 0 ? V::load(buf + l) : bias.dense.sn == 0 ? V(d[j0 + j]) : V::load(buf + (j - c0) * kBM + l);
        fma(x, unit, V::load(s + j * P + l)).store(s + j * P + l);
      }
  }

  void dense_grads(const S* ds, int64_t P, const TermGrad<S>& g, int64_t j0, int64_t c0, int64_t c1) const {
    if (g.dense) {
      transpose(buf, kKeys, ds + c0 * P, P, c1 - c0, rows);
      for (int64_t r = 0; r < rows; ++r) {
        S* __restrict y = g.dense + (i0 + r) * p().Nk + j0 + c0;
        for (int64_t j = 0; j < c1 - c0; ++j) y[j] += buf[r * kKeys + j];
      }
    }
    if (g.key)
      for (int64_t j = c0; j < c1; ++j) {
        V acc(S(0));
        for (int64_t l = 0; l < lanes; l += L) acc = acc + V::load(ds + j * P + l);
        g.key[j0 + j] += reduce_add(acc);
      }
    if (g.row)
      for (int64_t l = 0; l < lanes; l += L) {
        V acc(S(0));
        for (int64_t j = c0; j < c1; ++j) acc = acc + V::load(ds + j * P + l);
        for (int x = 0; x < L && l + x < rows; ++x) g.row[i0 + l + x] += acc.v[x];
      }
  }
};

}  // namespace
}  // namespace fastpe::cpu::FASTPE_ISA
