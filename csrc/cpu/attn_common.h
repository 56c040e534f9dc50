// What the forward and the backward pass of attention share: the bias of one tile, the bound that skips tiles,
// visibility of one tile, and packing of keys and values.
//
// Orientation: a tile is [keys][queries]. Queries sit in vector lanes, so row maxima, sums, row weights and row
// offsets are vertical, and a key's position is a broadcast. Scores and biases inside a kernel are in units of
// log2 e, so that exp2 serves; lse leaves in natural units.
#pragma once

#include <type_traits>

#include "../core/tiles.h"
#include "../pos/bias.h"
#include "../pos/region.h"
#include "../pos/visible.h"
#include "attn_strips.h"
#include "kernels.h"
#include "scratch.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

constexpr int64_t kMaxBN = 128;
template <class E> constexpr int64_t kBN = tiles::block_k(E::kPack == 2);
constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.6931471805599453094;

template <class S> constexpr S kInf = S(__builtin_inf());

// f(count as a constant, first lane) over a block's vectors, N at a time as long as there are so many, then one by one.
template <class S, int N, class Fn>
FASTPE_INLINE void for_lanes(int64_t lanes, Fn&& f) {
  constexpr int L = Vec<S>::kLanes;
  int64_t l = 0;
  for (; l + N * L <= lanes; l += N * L) f(std::integral_constant<int, N>{}, l);
  for (; l < lanes; l += L) f(std::integral_constant<int, 1>{}, l);
}
// f(count as a constant, first key) over keys with G vectors of queries each, so many at a time that four vectors of powers are
// formed side by side.
template <int G, class Fn>
FASTPE_INLINE void for_keys(int64_t js, int64_t je, Fn&& f) {
  constexpr int J = G < 4 ? 4 / G : 1;
  int64_t j = js;
  for (; j + J <= je; j += J) f(std::integral_constant<int, J>{}, j);
  for (; j < je; ++j) f(std::integral_constant<int, 1>{}, j);
}

// ---- tables over the distance ------------------------------------------------------------------------------------
// A table form is expanded once per head to one number per offset t = I - j (clamps applied, log2 e folded in), with
// room for the lanes a tile reads past the last row. Then the bias of 16 neighbouring queries is one load.

struct TableSpan {
  int64_t lo = 0, len = 0;  // offsets [lo, lo + len)
};
inline TableSpan table_span(const AttnParams& p) {
  const int64_t n = p.Nq > p.Nk ? p.Nq : p.Nk;
  return {-(n + kMaxBN + kBM), n + p.Nk + 2 * (kMaxBN + kBM) + 64};
}

// env[t]: the largest value on the far side of t: over t' >= t for t >= 0, over t' <= t for t < 0.
template <class S>
void expand_table(const Aux& table, const AttnParams& p, int64_t h, S unit, S* e) {
  const TableSpan sp = table_span(p);
  const S* src = at<S>(table, 0, h);
  for (int64_t x = 0; x < sp.len; ++x) e[x] = src[pos::table_index(p.bias.form, x + sp.lo, p.bias.table_len)] * unit;
}
template <class S>
void envelope(const AttnParams& p, const S* e, S* env) {
  const TableSpan sp = table_span(p);
  const int64_t zero = -sp.lo;
  S m = -kInf<S>;
  for (int64_t x = sp.len - 1; x >= zero; --x) { m = e[x] > m ? e[x] : m; env[x] = m; }
  m = -kInf<S>;
  for (int64_t x = 0; x < zero; ++x) { m = e[x] > m ? e[x] : m; env[x] = m; }
}

// A table or fire over position arrays instead of indices.
inline bool is_mapped(const Bias& b) { return b.table && (b.u || b.w); }

// ---- bias of one head and of one tile -----------------------------------------------------------------------------

// rank1: b = g * (u - y), in one multiply-add; steep: the same, with u - y formed first. twin: a tile of two_sided that the
// diagonal crosses; the others are rank1 or steep with the values of their side.
enum class Kind { none, rank1, steep, table, form, twin };

template <class S>
struct HeadBias {
  BiasForm form = BiasForm::none;
  S p0 = 0, p1 = 0;
  const S* gamma = nullptr;  // by local query row
  int64_t gamma_step = 0;
  const S *u = nullptr, *w = nullptr, *w2 = nullptr;  // w2: two_sided's values of the future
  const double *base = nullptr, *base2 = nullptr;
  const S *table = nullptr, *env = nullptr;  // pointing at offset t = 0
  const S* raw_table = nullptr;              // the table as given
  bool mapped = false;                       // a table or fire over position arrays

  void init(const AttnParams& p, int64_t b, int64_t h, const S* expanded, const S* envelope) {
    const Bias& s = p.bias;
    form = s.form;
    if (const S* q = at<S>(s.params, b, h)) { p0 = q[0]; p1 = q[1]; }
    gamma = at<S>(s.gamma, b, h);
    gamma_step = s.gamma.sn;
    u = at<S>(s.u, b, h);
    w = at<S>(s.w, b, h);
    base = at<double>(s.base, b, h);
    if (form == BiasForm::two_sided) {
      w2 = at<S>(s.w, b, h + p.H);
      base2 = at<double>(s.base, b, h + p.H);
    }
    mapped = is_mapped(s);
    raw_table = at<S>(s.table, 0, h);
    if (expanded) {
      const TableSpan sp = table_span(p);
      table = expanded - sp.lo;
      env = envelope - sp.lo;
    }
  }
};

// The part of a rel_fn bias that belongs to a block of queries.
template <class S>
struct BlockBias {
  alignas(64) S gm[kBM];       // row weight
  alignas(64) S uloc[kBM];     // u = ubase + uloc
  alignas(64) double ubase[kBM];
  alignas(64) S uloc2[kBM];    // the same of two_sided's future
  alignas(64) double ubase2[kBM];
  S gm_least, gm_most;

  void init(const HeadBias<S>& hb, int64_t i0, int64_t rows, int64_t I0) {
    if (!(pos::is_rel_fn(hb.form) || hb.form == BiasForm::fire || hb.form == BiasForm::two_sided || hb.mapped)) return;
    for (int64_t l = 0; l < kBM; ++l) {
      const int64_t r = l < rows ? l : rows - 1;
      gm[l] = hb.gamma ? hb.gamma[(i0 + r) * hb.gamma_step] : S(1);
      if (hb.u) { uloc[l] = hb.u[i0 + r]; ubase[l] = 0; }
      else if (hb.w) { uloc[l] = hb.w[I0 + r]; ubase[l] = hb.base ? hb.base[(I0 + r) / kPrefixBlock] : 0; }
      else { uloc[l] = S(l); ubase[l] = double(I0); }
      if (hb.w2) { uloc2[l] = hb.w2[I0 + r]; ubase2[l] = hb.base2 ? hb.base2[(I0 + r) / kPrefixBlock] : 0; }
    }
    gm_least = gm_most = gm[0];
    for (int64_t l = 1; l < kBM; ++l) {
      gm_least = gm[l] < gm_least ? gm[l] : gm_least;
      gm_most = gm[l] > gm_most ? gm[l] : gm_most;
    }
  }
};

template <class S>
struct TileBias {
  Kind kind = Kind::none;
  BiasForm form = BiasForm::none;
  S p0 = 0, p1 = 0;
  alignas(64) S r[kBM];  // u relative to the tile's anchor
  alignas(64) S g[kBM];  // row weight * log2 e; rank1: times the slope, b = g * (r - y)
  alignas(64) S y[kMaxBN];  // key position relative to the anchor, by key of the tile
  alignas(64) S r2[kBM];     // twin: r and y of the future; key j of lane l is past where l + diagonal >= j
  alignas(64) S y2[kMaxBN];
  const S* table = nullptr;  // at offset I0 - j0: lane l, key j reads table[l - j]
  S ymin = 0, ymax = 0;
  int64_t diagonal = 0;

  // Keys [j0 + js, j0 + je) of a tile whose anchor is j0.
  void init(const HeadBias<S>& hb, const BlockBias<S>& bb, const AttnParams& p, int64_t I0, int64_t lanes, int64_t j0, int64_t js, int64_t je) {
    form = hb.form;
    kind = Kind::none;
    if (form == BiasForm::none) return;
    if (hb.table) {
      if (form != BiasForm::fire) kind = Kind::table;  // fire is composed (attn_terms.h)
      table = hb.table + (I0 - j0);
      return;
    }
    p0 = hb.p0;
    p1 = hb.p1;
    diagonal = I0 - j0;
    const S* w = hb.w;
    const double* base = hb.base;
    const S* uloc = bb.uloc;
    const double* ubase = bb.ubase;
    const bool future = form == BiasForm::two_sided && js > diagonal + lanes - 1;
    if (form == BiasForm::two_sided) {
      if (future) w = hb.w2, base = hb.base2, uloc = bb.uloc2, ubase = bb.ubase2;
      else if (je - 1 > diagonal) return twin(hb, bb, lanes, j0, js, je);
      form = BiasForm::signed_;
    }
    S w0 = 0;
    double wbase = double(j0);
    if (w) {
      // Positions are taken relative to the tile's first key: large prefixes cancel before any product (bias.md 5.1).
      w0 = w[j0];
      wbase = base ? base[j0 / kPrefixBlock] : 0;
      // Whole vectors where the tile is whole; the last ones overlap instead of running over.
      using V = Vec<S>;
      constexpr int L = V::kLanes;
      V lo(kInf<S>), hi(-kInf<S>);
      if (je - js >= L) {
        for (int64_t j = js; j < je; j += L) {
          const int64_t x = j + L <= je ? j : je - L;
          const V v = V::load(w + j0 + x) - V(w0);
          v.store(y + x);
          lo = min(v, lo);
          hi = max(v, hi);
        }
      } else {
        for (int64_t j = js; j < je; ++j) {
          y[j] = w[j0 + j] - w0;
          lo = min(V(y[j]), lo);
          hi = max(V(y[j]), hi);
        }
      }
      ymin = lo.v[0];
      ymax = hi.v[0];
      for (int l = 1; l < L; ++l) {
        ymin = lo.v[l] < ymin ? lo.v[l] : ymin;
        ymax = hi.v[l] > ymax ? hi.v[l] : ymax;
      }
    } else {
      if (hb.u) wbase = 0, w0 = S(j0);
      for (int64_t j = js; j < je; ++j) y[j] = S(j);
      ymin = S(js);
      ymax = S(je - 1);
    }
    for (int64_t l = 0; l < lanes; ++l) r[l] = S(ubase[l] - wbase) + (uloc[l] - w0);
    if (hb.mapped) return;
    S a = S(future ? -kLog2e : kLog2e);  // rank1: b = a * gm * (u - y)
    kind = form == BiasForm::signed_ ? Kind::rank1 : Kind::form;
    if (form == BiasForm::linear) {
      // One side of the diagonal only: linear in D. Under a causal mask on plain indices D < 0 is invisible.
      if (p.vis.right == 1 && !hb.u && !hb.w) {
        kind = Kind::rank1, a *= -p0;
      } else {
        S umin = kInf<S>, umax = -kInf<S>;
        for (int64_t l = 0; l < lanes; ++l) { umin = r[l] < umin ? r[l] : umin; umax = r[l] > umax ? r[l] : umax; }
        if (umin >= ymax) kind = Kind::rank1, a *= -p0;
        else if (umax <= ymin) kind = Kind::rank1, a *= p1;
      }
    }
    using V = Vec<S>;
    V gmax(S(0));
    for (int64_t l = 0; l < lanes; l += V::kLanes) {
      const V gv = V(a) * V::load(bb.gm + l);
      gv.store(g + l);
      gmax = max(abs(gv), gmax);
    }
    if (kind != Kind::rank1) return;
    // One multiply-add loses |g y| 2^-24 where u - y is small: 4e-6 of a score within this reach.
    const S reach = ymax > -ymin ? ymax : -ymin;  // of |y|
    kind = Kind::steep;
    if (reach * reduce_max(gmax) <= S(64)) kind = Kind::rank1;
  }

  // A tile of two_sided with keys on both sides of the diagonal.
  void twin(const HeadBias<S>& hb, const BlockBias<S>& bb, int64_t lanes, int64_t j0, int64_t js, int64_t je) {
    kind = Kind::twin;
    const auto side = [&](const S* w, const double* base, const S* uloc, const double* ubase, S* r_, S* y_) {
      const double wbase = base ? base[j0 / kPrefixBlock] : 0;
      for (int64_t j = js; j < je; ++j) y_[j] = w[j0 + j] - w[j0];
      for (int64_t l = 0; l < lanes; ++l) r_[l] = S(ubase[l] - wbase) + (uloc[l] - w[j0]);
    };
    side(hb.w, hb.base, bb.uloc, bb.ubase, r, y);
    side(hb.w2, hb.base2, bb.uloc2, bb.ubase2, r2, y2);
    for (int64_t l = 0; l < lanes; ++l) g[l] = S(kLog2e) * bb.gm[l];
  }
  // u_i - w_j where key j is not after query l, else w_j - u_i.
  FASTPE_INLINE Vec<S> twin_distance(int64_t j, int64_t l, Vec<S> r_, Vec<S> r2_) const {
    using V = Vec<S>;
    const Mask<S> past = V::iota() + V(S(l + diagonal)) >= V(S(j));
    return select(past, r_ - V(y[j]), V(y2[j]) - r2_);
  }

  // An upper bound of the bias over the tile's keys, for one vector of queries.
  FASTPE_INLINE Vec<S> upper(const HeadBias<S>& hb, int64_t l, int64_t I0, int64_t j_first, int64_t j_last) const {
    using V = Vec<S>;
    if (kind == Kind::rank1 || kind == Kind::steep) {
      const V gv = V::load(g + l), u = V::load(r + l);
      return max(gv * (u - V(ymin)), gv * (u - V(ymax)));
    }
    if (kind == Kind::table) {
      const int64_t tmin = I0 - j_last, tmax = I0 + kBM - 1 - j_first;
      if (tmin >= 0) return V::load(hb.env + tmin + l);
      if (tmax < 0) return V::load(hb.env + (I0 - j_first) + l);
      return V(kInf<S>);
    }
    if (kind == Kind::twin) return V(kInf<S>);  // the diagonal's tiles are never skipped
    V out = V(S(0));
    if (kind == Kind::form)
      pos::with_form(form, [&](auto phi) {
        const V u = V::load(r + l), gv = V::load(g + l);
        const V hi = pos::phi_max(phi, u - V(ymax), u - V(ymin), V(p0), V(p1));
        const V lo = pos::phi_min(phi, u - V(ymax), u - V(ymin), V(p0), V(p1));
        out = max(gv * hi, gv * lo);
      });
    return out;
  }
};

// score * c + bias + offset (log2 units) of one vector of queries, from lane l on, and any key of the tile. What does not
// depend on the key is formed once.
template <Kind K, class Phi, class S>
struct ScoreAt {
  using V = Vec<S>;
  V c, offset, r, g, r2;

  FASTPE_INLINE ScoreAt() {}
  FASTPE_INLINE ScoreAt(const TileBias<S>& t, int64_t l, V c_, V offset_) : c(c_), offset(offset_) {
    if constexpr (K == Kind::rank1 || K == Kind::steep || K == Kind::form || K == Kind::twin) { r = V::load(t.r + l); g = V::load(t.g + l); }
    if constexpr (K == Kind::twin) r2 = V::load(t.r2 + l);
    if constexpr (K == Kind::rank1) { r = fma(g, r, offset); g = V(S(0)) - g; }
  }
  FASTPE_INLINE V operator()(const TileBias<S>& t, int64_t j, int64_t l, V score) const {
    if constexpr (K == Kind::none) return fma(score, c, offset);
    if constexpr (K == Kind::rank1) return fma(score, c, fma(g, V(t.y[j]), r));
    if constexpr (K == Kind::steep) return fma(g, r - V(t.y[j]), fma(score, c, offset));
    if constexpr (K == Kind::table) return fma(score, c, V::load(t.table + l - j) + offset);
    if constexpr (K == Kind::twin) return fma(g, t.twin_distance(j, l, r, r2), fma(score, c, offset));
    if constexpr (K == Kind::form) return fma(score, c, fma(g, Phi::value(r - V(t.y[j]), V(t.p0), V(t.p1)), offset));
  }
};

// Calls f(tag of the kind, Phi) for the tile's kind.
template <Kind K> struct KindTag { static constexpr Kind value = K; };
template <class Fn>
FASTPE_INLINE void with_kind(Kind kind, BiasForm form, Fn&& f) {
  switch (kind) {
    case Kind::none: f(KindTag<Kind::none>{}, pos::Phi<BiasForm::signed_>{}); break;
    case Kind::rank1: f(KindTag<Kind::rank1>{}, pos::Phi<BiasForm::signed_>{}); break;
    case Kind::steep: f(KindTag<Kind::steep>{}, pos::Phi<BiasForm::signed_>{}); break;
    case Kind::table: f(KindTag<Kind::table>{}, pos::Phi<BiasForm::signed_>{}); break;
    case Kind::twin: f(KindTag<Kind::twin>{}, pos::Phi<BiasForm::signed_>{}); break;
    case Kind::form: pos::with_form(form, [&](auto phi) { f(KindTag<Kind::form>{}, phi); }); break;
  }
}

template <class S, class Fn>
FASTPE_INLINE void with_kind(const TileBias<S>& t, Fn&& f) { with_kind(t.kind, t.form, f); }

// ---- visibility ---------------------------------------------------------------------------------------------------

template <class S>
struct TileMask {
  using V = Vec<S>;
  using I = typename V::RawInt;
  pos::Band band;
  int64_t I0 = 0, j0 = 0;   // absolute index of lane 0 and of the tile's first key
  bool by_index = false;    // index rules cut through this tile
  alignas(64) S lo[kMaxBN], hi[kMaxBN];  // by key of the tile: those rules let lanes [lo, hi) see it
  const int32_t* k_ids = nullptr;  // by absolute key, when ids cut through this tile
  const S* q_ids = nullptr;        // lanes, bit patterns of integers
  const uint8_t* dense = nullptr;  // at (first row of the block, key 0)
  int64_t dense_sn = 0, dense_sk = 0;
  const int32_t* intervals = nullptr;  // plane a1 by absolute key; planes are interval_step apart
  int64_t interval_step = 0;
  const int32_t* lower = nullptr;      // by lane, as far as there are rows
  const int32_t *q_seg = nullptr, *k_seg = nullptr;  // by lane; by absolute key
  const uint8_t* relation = nullptr;
  int64_t relation_sn = 0;
  const uint8_t* map = nullptr;        // of (batch, head)
  int64_t map_sn = 0, block_q = 1, block_k = 1, i0 = 0;
  int64_t rows = 0;
  int64_t split = 0;  // keys from here on are hidden from the first kBM / 2 lanes: products leave those out

  bool by_more() const { return k_ids || dense || intervals || lower || relation || map; }
  bool partial() const { return by_index || by_more(); }

  void cut_by_index(int64_t js, int64_t je) {
    by_index = true;
    for (int64_t j = js; j < je; ++j) {
      const pos::Range r = pos::rows_of_key(band, j0 + j);
      lo[j] = lane(r.lo);
      hi[j] = lane(r.hi);
    }
  }
  // The lane of an absolute row, those before the first and past the last as one.
  FASTPE_INLINE S lane(int64_t row) const { return S(row < I0 - 1 ? -1 : row > I0 + kBM ? kBM : row - I0); }

  // Lanes whose absolute row lies in r, l: first lane of the vector.
  FASTPE_INLINE Mask<S> in_rows(pos::Range r, int64_t l) const {
    const V at = V::iota() + V(S(l));
    return (at >= V(lane(r.lo))) & (at < V(lane(r.hi)));
  }
  // f(lane) for every lane of the vector that is a row.
  template <class Fn>
  FASTPE_INLINE Mask<S> by_lane(int64_t l, Fn&& f) const {
    I q{};
    for (int x = 0; x < Vec<S>::kLanes; ++x) q[x] = l + x < rows && f(l + x) ? -1 : 0;
    return Mask<S>{q};
  }

  // Lanes that see key j (index in the tile); l: first lane of the vector.
  FASTPE_INLINE Mask<S> lanes(int64_t j, int64_t l) const {
    Mask<S> m{I{} - 1};
    if (by_index) {
      const V at = V::iota() + V(S(l));
      m = (at >= V(lo[j])) & (at < V(hi[j]));
    }
    if (!by_more()) return m;
    if (k_ids) {
      const int32_t id = k_ids[j0 + j];
      if (id < 0) return Mask<S>{I{}};
      I q;
      std::memcpy(&q, q_ids + l, sizeof(q));
      m = m & Mask<S>{q == (I{} + id)};
    }
    if (dense) m = m & by_lane(l, [&](int64_t r) { return dense[r * dense_sn + (j0 + j) * dense_sk]; });
    if (intervals) {
      const int32_t* a = intervals + j0 + j;
      m = m & (in_rows({a[0], a[interval_step]}, l) | in_rows({a[2 * interval_step], a[3 * interval_step]}, l));
    }
    if (lower) m = m & by_lane(l, [&](int64_t r) { return lower[r] <= j0 + j; });
    if (relation) m = m & by_lane(l, [&](int64_t r) { return relation[q_seg[r] * relation_sn + k_seg[j0 + j]]; });
    if (map) {
      const uint8_t* column = map + (j0 + j) / block_k;
      m = m & by_lane(l, [&](int64_t r) { return column[(i0 + r) / block_q * map_sn]; });
    }
    return m;
  }
};

// Smallest and largest id of every key tile and query block; a tile is hidden when the ranges do not meet.
struct IdSpan {
  int32_t lo, hi;
};

// Of the two row intervals of the keys of a tile: rows that some key lists, and rows that every key lists.
struct IntervalSpan {
  pos::Range some[2] = {{INT32_MAX, INT32_MIN}, {INT32_MAX, INT32_MIN}};
  pos::Range every[2] = {{INT32_MIN, INT32_MAX}, {INT32_MIN, INT32_MAX}};

  void add(int which, int64_t a, int64_t b) {
    pos::Range &s = some[which], &e = every[which];
    if (a < b) s = {a < s.lo ? a : s.lo, b > s.hi ? b : s.hi};
    e = {a > e.lo ? a : e.lo, b < e.hi ? b : e.hi};
  }
  bool misses(pos::Range rows) const {
    return !(some[0].lo < rows.hi && rows.lo < some[0].hi) && !(some[1].lo < rows.hi && rows.lo < some[1].hi);
  }
  bool covers(pos::Range rows) const {
    return (every[0].lo <= rows.lo && rows.hi <= every[0].hi) || (every[1].lo <= rows.lo && rows.hi <= every[1].hi);
  }
};

enum class TileClass { hidden, full, partial };

// ---- the call as the kernels see it ------------------------------------------------------------------------------------

template <class E>
struct Call {
  using S = typename E::S;
  using U = typename E::U;
  const AttnParams& p;
  int64_t nq_blocks, nk_tiles, offset;  // offset = Nk - Nq
  pos::Band band;
  IdSpan *q_span = nullptr, *k_span = nullptr;  // (B, blocks), (B, tiles)
  IntervalSpan* interval_span = nullptr;         // (B|1, tiles)
  IdSpan* lower_span = nullptr;                  // (B|1, blocks)
  // Sets of key segments, one bit each: those some row of a block sees, those every row sees, those a key tile has.
  uint64_t *seg_some = nullptr, *seg_every = nullptr, *seg_has = nullptr;
  int64_t seg_words = 0;
  bool same_bias_heads;                          // one expanded table serves all heads
  S *table = nullptr, *env = nullptr;            // (heads, span)
  S* omega = nullptr;                            // (heads, span)
  int32_t* index = nullptr;                      // (span)
  StripTable<S> row_strip, col_strip;

  explicit Call(const AttnParams& params)
      : p(params),
        nq_blocks(tiles::ceil_div(params.Nq, kBM)),
        nk_tiles(tiles::ceil_div(params.Nk, kBN<E>)),
        offset(params.Nk - params.Nq),
        band{params.vis.left, params.vis.right, params.vis.sinks},
        same_bias_heads(params.bias.table.sh == 0) {}

  int64_t table_heads() const { return p.bias.table && !is_mapped(p.bias) ? (same_bias_heads ? 1 : p.H) : 0; }
  int64_t omega_heads() const { return p.bias.omega ? (p.bias.omega.sh ? p.H : 1) : 0; }

  void carve(Carver& c, bool backward = false) {
    if (p.vis.k_ids) {
      q_span = c.take<IdSpan>(p.B * nq_blocks);
      k_span = c.take<IdSpan>(p.B * nk_tiles);
    }
    if (p.vis.intervals) interval_span = c.take<IntervalSpan>((p.vis.intervals_sb ? p.B : 1) * nk_tiles);
    if (p.vis.lower) lower_span = c.take<IdSpan>((p.vis.lower_sb ? p.B : 1) * nq_blocks);
    if (p.vis.relation) {
      seg_words = tiles::ceil_div(p.vis.Sk, 64);
      seg_some = c.take<uint64_t>((p.vis.q_seg_sb ? p.B : 1) * nq_blocks * seg_words);
      seg_every = c.take<uint64_t>((p.vis.q_seg_sb ? p.B : 1) * nq_blocks * seg_words);
      seg_has = c.take<uint64_t>((p.vis.k_seg_sb ? p.B : 1) * nk_tiles * seg_words);
    }
    if (int64_t n = table_heads()) {
      const int64_t len = table_span(p).len;
      table = c.take<S>(n * len);
      env = c.take<S>(n * len);
    }
    if (int64_t n = omega_heads()) omega = c.take<S>(n * table_span(p).len);
    if (p.bias.index) index = c.take<int32_t>(table_span(p).len);
    const TableSpan sp = table_span(p);
    row_strip.carve(c, p, p.bias.row_e, sp.lo, sp.len, true, backward);
    col_strip.carve(c, p, p.bias.col_e, sp.lo, sp.len, false, backward);
  }

  // After prepare: the strips' tables, in parts.
  int64_t strip_tasks() const {
    return (row_strip.e ? row_strip.heads(p) * row_strip.blocks() : 0) + (col_strip.e ? col_strip.heads(p) * col_strip.blocks() : 0);
  }
  void strip_task(int64_t task) const {
    const TableSpan sp = table_span(p);
    const int64_t of_rows = row_strip.e ? row_strip.heads(p) * row_strip.blocks() : 0;
    const StripTable<S>& t = task < of_rows ? row_strip : col_strip;
    if (task >= of_rows) task -= of_rows;
    t.expand(index_lut(), sp.lo, sp.lo + sp.len, task / t.blocks(), task % t.blocks());
  }

  void prepare() {
    const TableSpan sp = table_span(p);
    for (int64_t h = 0; h < table_heads(); ++h) {
      expand_table<S>(p.bias.table, p, h, p.bias.form == BiasForm::fire ? S(1) : S(kLog2e), table + h * sp.len);
      envelope<S>(p, table + h * sp.len, env + h * sp.len);
    }
    for (int64_t h = 0; h < omega_heads(); ++h) expand_table<S>(p.bias.omega, p, h, S(1), omega + h * sp.len);
    if (p.bias.index)
      for (int64_t x = 0; x < sp.len; ++x) {
        const int32_t e = p.bias.index[pos::table_index(BiasForm::table, x + sp.lo, p.bias.index_len)];
        index[x] = e < p.bias.terms_len ? e : int32_t(p.bias.terms_len - 1);
      }
    prepare_spans();
    if (!p.vis.k_ids) return;
    for (int64_t b = 0; b < p.B; ++b) {
      spans(p.vis.q_ids + b * p.vis.q_ids_sb, p.Nq, kBM, q_span + b * nq_blocks);
      spans(p.vis.k_ids + b * p.vis.k_ids_sb, p.Nk, kBN<E>, k_span + b * nk_tiles);
    }
  }
  void prepare_spans() {
    const Visibility& v = p.vis;
    if (v.intervals)
      for (int64_t b = 0; b < (v.intervals_sb ? p.B : 1); ++b)
        for (int64_t t = 0; t < nk_tiles; ++t) {
          IntervalSpan s;
          const int32_t* a = v.intervals + b * v.intervals_sb;
          for (int64_t j = t * kBN<E>; j < p.Nk && j < (t + 1) * kBN<E>; ++j)
            for (int w = 0; w < 2; ++w) s.add(w, a[2 * w * p.Nk + j], a[(2 * w + 1) * p.Nk + j]);
          interval_span[b * nk_tiles + t] = s;
        }
    if (v.lower)
      for (int64_t b = 0; b < (v.lower_sb ? p.B : 1); ++b) spans(v.lower + b * v.lower_sb, p.Nq, kBM, lower_span + b * nq_blocks);
    if (!v.relation) return;
    for (int64_t b = 0; b < (v.q_seg_sb ? p.B : 1); ++b)
      for (int64_t qb = 0; qb < nq_blocks; ++qb) {
        uint64_t *some = seg_some + (b * nq_blocks + qb) * seg_words, *every = seg_every + (b * nq_blocks + qb) * seg_words;
        for (int64_t w = 0; w < seg_words; ++w) some[w] = 0, every[w] = ~uint64_t(0);
        int32_t last = -1;
        for (int64_t i = qb * kBM; i < p.Nq && i < (qb + 1) * kBM; ++i) {
          const int32_t q = v.q_seg[b * v.q_seg_sb + i];
          if (q == last) continue;
          last = q;
          for (int64_t w = 0; w < seg_words; ++w) {
            uint64_t bits = 0;
            for (int64_t x = 0; x < 64 && w * 64 + x < v.Sk; ++x) bits |= uint64_t(v.relation[q * v.Sk + w * 64 + x] != 0) << x;
            some[w] |= bits;
            every[w] &= bits;
          }
        }
      }
    for (int64_t b = 0; b < (v.k_seg_sb ? p.B : 1); ++b)
      for (int64_t t = 0; t < nk_tiles; ++t) {
        uint64_t* has = seg_has + (b * nk_tiles + t) * seg_words;
        for (int64_t w = 0; w < seg_words; ++w) has[w] = 0;
        for (int64_t j = t * kBN<E>; j < p.Nk && j < (t + 1) * kBN<E>; ++j) {
          const int32_t k = v.k_seg[b * v.k_seg_sb + j];
          has[k / 64] |= uint64_t(1) << (k % 64);
        }
      }
  }
  static void spans(const int32_t* id, int64_t n, int64_t block, IdSpan* out) {
    for (int64_t i0 = 0; i0 < n; i0 += block) {
      IdSpan s{INT32_MAX, INT32_MIN};
      for (int64_t i = i0; i < n && i < i0 + block; ++i) {
        if (id[i] < s.lo) s.lo = id[i];
        if (id[i] > s.hi) s.hi = id[i];
      }
      *out++ = s;
    }
  }

  const S* table_of(int64_t h) const { return table ? table + (same_bias_heads ? 0 : h) * table_span(p).len : nullptr; }
  // At offset 0.
  const S* omega_of(int64_t h) const { return omega ? omega + (p.bias.omega.sh ? h : 0) * table_span(p).len - table_span(p).lo : nullptr; }
  const int32_t* index_lut() const { return index - table_span(p).lo; }
  const S* env_of(int64_t h) const { return env ? env + (same_bias_heads ? 0 : h) * table_span(p).len : nullptr; }

  // Keys [js, je) of tile t (relative to its start, js at a whole operand unit) that block qb may see, and how.
  TileClass classify(int64_t b, int64_t h, int64_t qb, int64_t t, int64_t& js, int64_t& je, TileMask<S>& m) const {
    const int64_t i0 = qb * kBM, rows = p.Nq - i0 < kBM ? p.Nq - i0 : kBM;
    const int64_t I0 = i0 + offset, j0 = t * kBN<E>, j1 = j0 + kBN<E> < p.Nk ? j0 + kBN<E> : p.Nk;
    const pos::Range r = pos::keys_in_tile(band, I0, I0 + rows, j0, j1);
    if (r.lo >= r.hi) return TileClass::hidden;
    js = (r.lo - j0) / E::kPack * E::kPack;
    je = r.hi - j0;
    m.band = band;
    m.I0 = I0;
    m.j0 = j0;
    m.rows = rows;
    m.by_index = false;
    if (!pos::tile_full(band, I0, I0 + rows, j0 + js, r.hi)) m.cut_by_index(js, je);
    m.k_ids = nullptr;
    m.dense = nullptr;
    m.split = je;
    if (m.by_index && band.right > 0) {
      const int64_t s = tiles::round_up(I0 + kBM / 2 + band.right - 1 - j0, E::kPack);
      m.split = s < js ? js : s < je ? s : je;
    }
    if (p.vis.k_ids) {
      const IdSpan q = q_span[b * nq_blocks + qb], k = k_span[b * nk_tiles + t];
      if (q.hi < k.lo || k.hi < q.lo || k.hi < 0) return TileClass::hidden;
      if (!(q.lo == q.hi && k.lo == k.hi && k.lo >= 0)) m.k_ids = p.vis.k_ids + b * p.vis.k_ids_sb;
    }
    if (p.vis.mask) {
      m.dense = p.vis.mask + b * p.vis.mask_sb + h * p.vis.mask_sh + i0 * p.vis.mask_sn;
      m.dense_sn = p.vis.mask_sn;
      m.dense_sk = p.vis.mask_sk;
    }
    if (!beyond(b, h, qb, t, rows, js, je, m)) return TileClass::hidden;
    return m.partial() ? TileClass::partial : TileClass::full;
  }

  // Intervals, lower bounds, segments and block maps: whether some pair of the tile may be visible, and what m must test.
  bool beyond(int64_t b, int64_t h, int64_t qb, int64_t t, int64_t rows, int64_t& js, int64_t je, TileMask<S>& m) const {
    const Visibility& v = p.vis;
    m.intervals = nullptr, m.lower = nullptr, m.relation = nullptr, m.map = nullptr;
    const int64_t i0 = qb * kBM;
    if (v.lower) {
      const IdSpan s = lower_span[(v.lower_sb ? b * nq_blocks : 0) + qb];
      const int64_t first = (s.lo - m.j0) / E::kPack * E::kPack;
      if (first > js) js = first;
      if (js >= je) return false;
      if (m.split < js) m.split = js;
      if (s.hi > m.j0 + js) m.lower = v.lower + b * v.lower_sb + i0;
    }
    if (v.intervals) {
      const IntervalSpan& s = interval_span[(v.intervals_sb ? b * nk_tiles : 0) + t];
      const pos::Range r{m.I0, m.I0 + rows};
      if (s.misses(r)) return false;
      if (!s.covers(r)) m.intervals = v.intervals + b * v.intervals_sb, m.interval_step = p.Nk;
    }
    if (v.relation) {
      const uint64_t* some = seg_some + ((v.q_seg_sb ? b * nq_blocks : 0) + qb) * seg_words;
      const uint64_t* every = seg_every + ((v.q_seg_sb ? b * nq_blocks : 0) + qb) * seg_words;
      const uint64_t* has = seg_has + ((v.k_seg_sb ? b * nk_tiles : 0) + t) * seg_words;
      bool any = false, all = true;
      for (int64_t w = 0; w < seg_words; ++w) {
        any |= (some[w] & has[w]) != 0;
        all &= (has[w] & ~every[w]) == 0;
      }
      if (!any) return false;
      if (!all) {
        m.relation = v.relation, m.relation_sn = v.Sk;
        m.q_seg = v.q_seg + b * v.q_seg_sb + i0, m.k_seg = v.k_seg + b * v.k_seg_sb;
      }
    }
    if (v.map) {
      const uint8_t* map = v.map + b * v.map_sb + h * v.map_sh;
      bool any = false, all = true;
      for (int64_t x = i0 / v.block_q; x <= (i0 + rows - 1) / v.block_q; ++x)
        for (int64_t y = (m.j0 + js) / v.block_k; y <= (m.j0 + je - 1) / v.block_k; ++y) {
          any |= map[x * v.map_sn + y] != 0;
          all &= map[x * v.map_sn + y] != 0;
        }
      if (!any) return false;
      if (!all) m.map = map, m.map_sn = v.map_sn, m.block_q = v.block_q, m.block_k = v.block_k, m.i0 = i0;
    }
    return true;
  }

  // Ids of the block's rows as lane bit patterns; lanes past the last row get an id no visible key has.
  void load_q_ids(int64_t b, int64_t i0, int64_t rows, S* out) const {
    using Int = std::conditional_t<sizeof(S) == 8, int64_t, int32_t>;
    for (int64_t l = 0; l < kBM; ++l) {
      Int id = p.vis.q_ids && l < rows ? p.vis.q_ids[b * p.vis.q_ids_sb + i0 + l] : -1;
      std::memcpy(out + l, &id, sizeof(S));
    }
  }
};

// Order in which a block of queries walks the key tiles: from its last visible tile back to the first one (near to
// far for causal calls, which lets a decaying bias skip the far ones), then forward through what lies after the
// diagonal, then back through the sinks before the window.
struct Walk {
  int64_t lo = 0, mid = 0, hi = 0, sinks = 0;  // [lo, mid) back, [mid, hi) forward, [0, sinks) back

  template <class E>
  Walk(const Call<E>& c, int64_t qb) {
    const int64_t i0 = qb * kBM, rows = c.p.Nq - i0 < kBM ? c.p.Nq - i0 : kBM;
    const int64_t I0 = i0 + c.offset, I1 = I0 + rows;
    const pos::Range w = pos::window_of_rows(c.band, I0, I1, c.p.Nk);
    hi = w.hi > w.lo ? tiles::ceil_div(w.hi, kBN<E>) : 0;
    if (hi > 0) {
      lo = w.lo / kBN<E>;
      mid = I1 <= 0 ? 0 : (I1 - 1) / kBN<E> + 1;
      if (mid > hi) mid = hi;
      if (mid < lo) mid = lo;
    }
    if (c.band.left > 0 && c.band.sinks > 0) {
      sinks = tiles::ceil_div(c.band.sinks < c.p.Nk ? c.band.sinks : c.p.Nk, kBN<E>);
      if (hi > 0 && sinks > lo) sinks = lo;
    }
  }
};

// f(tile) for each tile of a block.
template <class E, class Fn>
FASTPE_INLINE void walk_tiles(const Call<E>& c, int64_t qb, Fn&& f) {
  const Walk w(c, qb);
  for (int64_t t = w.mid - 1; t >= w.lo; --t) f(t);
  for (int64_t t = w.mid; t < w.hi; ++t) f(t);
  for (int64_t t = w.sinks - 1; t >= 0; --t) f(t);
}

// ---- keys and values -----------------------------------------------------------------------------------------------------

// The table of one region.
template <class S>
FASTPE_INLINE Rope region_rope(const Rope& r, int x) {
  if (!r.sr) return r;
  Rope y = r;
  y.cos.p = static_cast<S*>(r.cos.p) + x * r.sr;
  y.sin.p = static_cast<S*>(r.sin.p) + x * r.sr;
  return y;
}
// Whether rows from I0 on may see a key in region x.
template <class E>
FASTPE_INLINE bool reaches(const Call<E>& c, int x, int64_t I0, int64_t lanes) {
  const AttnParams& p = c.p;
  if (p.region.kind == RegionKind::none) return true;
  pos::Range w = pos::window_of_rows(c.band, I0, I0 + lanes, p.Nk);
  // A tile starts at a whole operand unit.
  w.lo = c.band.left > 0 && c.band.sinks > 0 ? 0 : w.lo / E::kPack * E::kPack;
  const pos::Range r = pos::keys_of_region(p.region, x, I0, I0 + lanes, w.lo, w.hi);
  return r.lo < r.hi;
}
// The table that turns key j in copy x of the keys.
template <class S>
FASTPE_INLINE Rope key_rope(const AttnParams& p, int x, int64_t j) {
  return region_rope<S>(p.k_rope, pos::region_by_key(p.region.kind) ? pos::region_of(p.region, 0, j) : x);
}

// Whether turn_operand turns the rows.
template <class E>
FASTPE_INLINE bool turns_whole(const AttnParams& p, const Rope& turn) {
  return turn.cos && p.rope_layout == RopeLayout::half && p.rope_pairs % turn_step<E>() == 0 && p.D % turn_step<E>() == 0;
}

// The type whose rows are operands as they are.
template <class E>
constexpr DType kOwnType = E::kPack == 2 ? DType::bf16 : sizeof(typename E::S) == 8 ? DType::f64 : DType::f32;
// Whether rows of x serve as A operands where they lie: of the operand's own type, one after the other. (Rows a power of two
// apart would share few sets of a cache.)
template <class E>
FASTPE_INLINE bool in_place(const View& x, DType type, int64_t n) { return x.sn == n && n % E::kPack == 0 && type == kOwnType<E>; }
template <class E>
FASTPE_INLINE const typename E::U* operand_rows(const View& x, int64_t b, int64_t h) {
  constexpr int64_t size = int64_t(sizeof(typename E::U)) / E::kPack;
  return reinterpret_cast<const typename E::U*>(static_cast<const char*>(x.p) + (b * x.sb + h * x.sh) * size);
}

// Rows [n, n + rows) of y from x[channel][row], straight where y holds the scalars of x; false, and nothing, elsewhere.
template <class E>
FASTPE_INLINE bool store_columns(const View& y, DType type, int64_t b, int64_t h, int64_t n, const typename E::S* x, int64_t channels, int64_t rows) {
  using S = typename E::S;
  if (E::kPack != 1 || type != kOwnType<E>) return false;
  transpose(static_cast<S*>(y.p) + b * y.sb + h * y.sh + n * y.sn, y.sn, x, kBM, channels, rows);
  return true;
}

// Queries [i0, i0 + rows) of head h turned, as a B operand qt[unit][query] with zeros up to `lanes`. scalars and units: room for
// all rows in either form.
template <class E>
FASTPE_INLINE void pack_queries(typename E::U* qt, const AttnParams& p, const Rope& turn, int64_t b, int64_t h, int64_t i0, int64_t rows, int64_t lanes, typename E::S* scalars, typename E::U* units) {
  using S = typename E::S;
  using U = typename E::U;
  const int64_t ku = p.D / E::kPack;
  if (!turn.cos && p.dtype == kOwnType<E> && p.q.sn % E::kPack == 0) {
    transpose_units(qt, kBM, operand_rows<E>(p.q, b, h) + i0 * (p.q.sn / E::kPack), p.q.sn / E::kPack, rows, lanes, ku);
  } else if (turns_whole<E>(p, turn)) {
    U* turned = E::kPack == 1 ? reinterpret_cast<U*>(scalars) : units;
    with_elements<S>(p.dtype, [&]<class From>(From) {
      const auto* q = static_cast<const typename From::T*>(p.q.p) + b * p.q.sb + h * p.q.sh;
      for (int64_t r = 0; r < rows; ++r)
        turn_operand<E, From>(turned + r * ku, q + (i0 + r) * p.q.sn, at<S>(turn.cos, b, h, i0 + r), at<S>(turn.sin, b, h, i0 + r), p.rope_pairs, p.D);
    });
    transpose_units(qt, kBM, turned, ku, rows, lanes, ku);
  } else {
    for (int64_t r = 0; r < rows; ++r) load_turned(scalars + r * p.D, p.q, p.dtype, p.D, turn, p.rope_pairs, p.rope_layout, b, h, i0 + r);
    pack_transposed<E>(qt, kBM, scalars, p.D, rows, lanes, p.D, units);
  }
}

// What a product that comes before may ask for; nothing unless a head's keys and values do not stay in a processor's own cache.
struct FromAfar {
  bool far = false;
  void measure(int64_t bytes) { far = bytes >= int64_t(256) << 10; }
  template <class T>
  Upcoming next(const T* from, int64_t n) const { return far && from ? Upcoming(from, n * int64_t(sizeof(T))) : Upcoming(); }
};

// Operand forms of keys and values of one (batch, kv head). Rows serve scores and dP; keys on the summed axis (At of gemm.h)
// serve O and dQ: where a unit is one scalar those are the rows again, else pairs of rows tile by tile.
template <class E>
struct KVPack : FromAfar {
  using U = typename E::U;
  using S = typename E::S;
  static constexpr int64_t kUnits = kBN<E> / E::kPack;
  const U *k_rows = nullptr, *v_rows = nullptr;  // (copies, Nk, D/kPack), (Nk, Dv/kPack)
  U *k_own = nullptr, *v_own = nullptr;          // room for them, unless they serve in place
  U *k_pairs = nullptr, *v_pairs = nullptr;      // (copies, tiles, kUnits, padded D), (tiles, kUnits, padded Dv)
  S* k_norm = nullptr;                           // (tiles) upper bound of |k_j| over the tile

  static int64_t pad(int64_t n) { return tiles::round_up(n, Vec<S>::kLanes); }
  // Rotated copies of the keys: one a region, unless all turn keys alike or the key alone decides.
  static int copies(const AttnParams& p) { return p.k_rope.sr && !pos::region_by_key(p.region.kind) ? pos::region_count(p.region.kind) : 1; }
  const U* rows_of(const AttnParams& p, int x) const { return k_rows + (copies(p) > 1 ? x : 0) * p.Nk * (p.D / E::kPack); }
  // Tile t on the summed axis, with its pitch.
  struct Summed {
    const U* at;
    int64_t ld;
  };
  Summed keys(const AttnParams& p, int x, int64_t t) const {
    if constexpr (E::kPack == 1) return {rows_of(p, x) + t * kBN<E> * p.D, p.D};
    else return {k_pairs + ((copies(p) > 1 ? x : 0) * tiles::ceil_div(p.Nk, kBN<E>) + t) * kUnits * pad(p.D), pad(p.D)};
  }
  Summed values(const AttnParams& p, int64_t t) const {
    if constexpr (E::kPack == 1) return {v_rows + t * kBN<E> * p.Dv, p.Dv};
    else return {v_pairs + t * kUnits * pad(p.Dv), pad(p.Dv)};
  }

  // What a product may ask for: tile t of the rows of keys and values, a tile on the summed axis, the tile at j0 of a sum over keys
  // (or null).
  Upcoming next_keys(const AttnParams& p, int64_t t) const { return t < 0 ? Upcoming() : next_rows(rows_of(p, 0), p.D, t); }
  Upcoming next_values(const AttnParams& p, int64_t t) const { return next_rows(v_rows, p.Dv, t); }
  Upcoming next_summed(Summed x) const { return next(x.at, kUnits * x.ld); }
  Upcoming next_sum(const S* acc, int64_t j0, int64_t ld) const { return acc ? next(acc + j0 * ld, kBN<E> * ld) : Upcoming(); }

  void carve(Carver& c, const AttnParams& p, int64_t nt, bool rows_v, bool keys_summed, bool values_summed) {
    constexpr bool same = E::kPack == 1;
    if (p.k_rope.cos || !in_place<E>(p.k, p.dtype, p.D)) k_own = c.take<U>(copies(p) * p.Nk * (p.D / E::kPack));
    if ((rows_v || (same && values_summed)) && !in_place<E>(p.v, p.dtype, p.Dv)) v_own = c.take<U>(p.Nk * (p.Dv / E::kPack));
    if (!same && keys_summed) k_pairs = c.take<U>(copies(p) * nt * kUnits * pad(p.D));
    if (!same && values_summed) v_pairs = c.take<U>(nt * kUnits * pad(p.Dv));
    k_norm = c.take<S>(nt);
    measure(p.Nk * (p.D + p.Dv) * int64_t(sizeof(U)) / E::kPack);
  }

  // Packs tile t; rows: scratch of BN x max(D, Dv) scalars and a vector.
  void pack(const AttnParams& p, int64_t b, int64_t hk, int64_t t, S* rows) {
    const int64_t j0 = t * kBN<E>, n = p.Nk - j0 < kBN<E> ? p.Nk - j0 : kBN<E>;
    if (t == 0) {
      k_rows = k_own || p.k_rope.cos ? k_own : operand_rows<E>(p.k, b, hk);
      v_rows = in_place<E>(p.v, p.dtype, p.Dv) ? operand_rows<E>(p.v, b, hk) : v_own;
    }
    S biggest = 0;
    bool nan = false;
    const auto measure = [&](S squares) {
      if (squares > biggest) biggest = squares;
      nan |= squares != squares;
    };
    for (int x = copies(p) - 1; x >= 0; --x) {
      U* packed = k_own ? k_own + x * p.Nk * (p.D / E::kPack) : nullptr;
      U* pairs = k_pairs ? k_pairs + (x * tiles::ceil_div(p.Nk, kBN<E>) + t) * kUnits * pad(p.D) : nullptr;
      if (packed && !pairs && turns_whole<E>(p, p.k_rope)) {
        with_elements<S>(p.dtype, [&]<class From>(From) {
          const auto* k = static_cast<const typename From::T*>(p.k.p) + b * p.k.sb + hk * p.k.sh;
          for (int64_t j = j0; j < j0 + n; ++j) {
            const Rope turn = key_rope<S>(p, x, j);
            measure(reduce_add(turn_operand<E, From>(packed + j * (p.D / E::kPack), k + j * p.k.sn, at<S>(turn.cos, b, hk, j), at<S>(turn.sin, b, hk, j), p.rope_pairs, p.D)));
          }
        });
        continue;
      }
      if (!p.k_rope.cos && repack(p.k, p.dtype, b, hk, j0, n, p.D, packed, pairs, measure)) continue;
      for (int64_t j = 0; j < n; ++j) {
        const S* row = rows + j * p.D;
        if constexpr (E::kPack == 1) {
          if (packed) load_key(packed + (j0 + j) * p.D, p, x, b, hk, j0 + j);
          row = (packed ? packed : operand_rows<E>(p.k, b, hk)) + (j0 + j) * p.D;
        } else {
          load_key(rows + j * p.D, p, x, b, hk, j0 + j);
          if (packed) pack_row<E>(packed + (j0 + j) * (p.D / E::kPack), row, p.D);
        }
        measure(norm2(row, p.D));
      }
      if (pairs) pack_rows<E>(pairs, pad(p.D), rows, p.D, n, p.D);
    }
    // Rounding of operands to bf16 moves a norm by less than 2^-8.
    k_norm[t] = nan ? kInf<S> : S(__builtin_sqrt(double(biggest))) * S(E::kPack == 2 ? 1.01 : 1.0001);
    if (!v_own && !v_pairs) return;
    U* pairs = v_pairs ? v_pairs + t * kUnits * pad(p.Dv) : nullptr;
    if (repack(p.v, p.dtype, b, hk, j0, n, p.Dv, v_own, pairs, [](S) {})) return;
    for (int64_t j = 0; j < n; ++j) {
      S* row = E::kPack == 1 ? reinterpret_cast<S*>(v_own) + (j0 + j) * p.Dv : rows + j * p.Dv;
      load_row(row, p.v, p.dtype, b, hk, j0 + j, p.Dv);
      if (E::kPack != 1 && v_own) pack_row<E>(v_own + (j0 + j) * (p.Dv / E::kPack), row, p.Dv);
    }
    if (pairs) pack_rows<E>(pairs, pad(p.Dv), rows, p.Dv, n, p.Dv);
  }

 private:
  Upcoming next_rows(const U* rows, int64_t channels, int64_t t) const {
    const int64_t units = kBN<E> * (channels / E::kPack);
    return next(rows + t * units, units);
  }
  // Tile [j0, j0 + n) of rows that hold bf16 pairs already: copies and zips them without a way through float32.
  template <class Fn>
  static bool repack(const View& x, DType type, int64_t b, int64_t hk, int64_t j0, int64_t n, int64_t D, U* packed, U* pairs, Fn&& measure) {
#if defined(__AVX512BF16__)
    if constexpr (E::kPack == 2) {
      if (type != DType::bf16) return false;
      const uint16_t* from = static_cast<const uint16_t*>(x.p) + b * x.sb + hk * x.sh + j0 * x.sn;
      for (int64_t j = 0; j < n; ++j) {
        if (packed) copy_row(reinterpret_cast<float*>(packed + (j0 + j) * (D / 2)), reinterpret_cast<const float*>(from + j * x.sn), D / 2);
        measure(norm2_bf16(from + j * x.sn, D));
      }
      for (int64_t j = 0; pairs && j < n; j += 2) zip_bf16(pairs + j / 2 * pad(D), from + j * x.sn, j + 1 < n ? from + (j + 1) * x.sn : nullptr, D);
      return true;
    }
#endif
    return false;
  }
  static void load_key(S* row, const AttnParams& p, int x, int64_t b, int64_t hk, int64_t j) {
    load_turned(row, p.k, p.dtype, p.D, key_rope<S>(p, x, j), p.rope_pairs, p.rope_layout, b, hk, j);
  }
};

// acc[channel][query] (+)= sum of a[key][channel] b[key][query] over keys [js, je), js and jm at whole units; keys from jm on
// leave out the first half of the lanes. a and b begin at the tile's first key.
template <class E, class Ld>
FASTPE_INLINE void sum_keys(typename KVPack<E>::Summed a, const typename E::U* b, Ld ldb, typename E::S* acc, int64_t channels, int64_t js, int64_t jm, int64_t je, int64_t lanes, bool clear, const Upcoming& next = {}) {
  constexpr int64_t half = kBM / 2;
  const int64_t u0 = js / E::kPack, um = jm / E::kPack, u1 = tiles::ceil_div(je, E::kPack), u_end = jm < je ? um : u1;
  if (clear) gemm<E, false, true>(a.at + u0 * a.ld, a.ld, b + u0 * ldb, ldb, acc, kBM, channels, lanes, u_end - u0, next);
  else gemm<E, true, true>(a.at + u0 * a.ld, a.ld, b + u0 * ldb, ldb, acc, kBM, channels, lanes, u_end - u0, next);
  if (jm < je) gemm<E, true, true>(a.at + um * a.ld, a.ld, b + um * ldb + half, ldb, acc + half, kBM, channels, lanes - half, u1 - um);
}

// Products K Qt of keys [js, je) of the tile at j0 with lanes rows from I0 on; keys from jm on leave out the first half of
// the lanes. With regions (qt holds one turned copy of the queries after the other, q_step apart) there is one product a
// region on the keys it has, and where regions overlap in the tile the second is put over the first by lane.
template <class E>
FASTPE_INLINE void tile_scores(const AttnParams& p, const KVPack<E>& kv, const typename E::U* qt, int64_t q_step, const TileMask<typename E::S>& rows, int64_t js, int64_t jm, int64_t je, int64_t lanes, typename E::S* s, int64_t pitch, typename E::S* other, const Upcoming& next = {}) {
  using S = typename E::S;
  using V = Vec<S>;
  constexpr int64_t half = kBM / 2;
  const int64_t ku = p.D / E::kPack, j0 = rows.j0, I0 = rows.I0;
  const auto product = [&](int x, S* y, int64_t a, int64_t e) {
    const typename E::U *k = kv.rows_of(p, x) + j0 * ku, *q = qt + x * q_step;
    const int64_t m = jm < a ? a : jm < e ? jm : e;
    gemm<E, false>(k + a * ku, ku, q, kBM, y + a * pitch, pitch, m - a, lanes, ku, next);
    if (m < e) gemm<E, false>(k + m * ku, ku, q + half, kBM, y + m * pitch + half, pitch, e - m, lanes - half, ku);
  };
  if (p.region.kind == RegionKind::none) return product(0, s, js, je);
  int64_t lo = 0, hi = 0;  // keys that have scores
  for (int x = 0; x < pos::region_count(p.region.kind); ++x) {
    const pos::Range r = pos::keys_of_region(p.region, x, I0, I0 + lanes, j0 + js, j0 + je);
    if (r.lo == r.hi) continue;
    const int64_t a = r.lo - j0, e = r.hi - j0;
    if (lo == hi) {
      product(x, s, lo = a, hi = e);
      continue;
    }
    if (a < lo) product(x, s, a, e < lo ? e : lo);
    if (e > hi) product(x, s, a > hi ? a : hi, e);
    const int64_t both = a > lo ? a : lo, end = e < hi ? e : hi;
    if (both < end) {
      product(x, other, both, end);
      for (int64_t j = both; j < end; ++j) {
        const pos::Range own = pos::rows_of_region(p.region, x, j0 + j);
        for (int64_t l = j >= jm ? half : 0; l < lanes; l += V::kLanes)
          select(rows.in_rows(own, l), V::load(other + j * pitch + l), V::load(s + j * pitch + l)).store(s + j * pitch + l);
      }
    }
    lo = a < lo ? a : lo;
    hi = e > hi ? e : hi;
  }
}

// How many kv heads to pack at a time: as few as leave what a worker packs and sums in its own cache until it is read, as many as
// give every worker 16 tasks (one has nobody to wait for) and fit a budget, at least one per worker.
inline int64_t wave_heads(int64_t bytes_each, int64_t tasks_each, int64_t total, int threads, int64_t budget) {
  const int64_t near = (int64_t(threads) << 18) / (bytes_each > 0 ? bytes_each : 1), most = budget / (bytes_each > 0 ? bytes_each : 1);
  int64_t n = threads > 1 ? tiles::ceil_div(16 * threads, tasks_each > 0 ? tasks_each : 1) : 1;
  if (n < near) n = near;
  if (n > most) n = most;
  if (n < threads) n = threads;
  return n < total ? n : total;
}

// Softmax-scale of the block's rows in log2 units, and the rows' |q| times that: what |score| cannot exceed per |k|.
template <class S>
struct BlockScale {
  alignas(64) S c[kBM];    // scale * row_scale * log2 e
  alignas(64) S rho[kBM];  // scale * row_scale
  alignas(64) S qn[kBM];   // |q| * |c|

  // qn from the packed queries and c; lanes whose c is 0 get 0.
  template <class E>
  FASTPE_INLINE void measure(const typename E::U* qt, int64_t ku, int64_t lanes) {
    using V = Vec<S>;
    for (int64_t l = 0; l < lanes; l += V::kLanes) {
      V squares(S(0));
      for (int64_t k = 0; k < ku; ++k) {
        const auto q = E::load_b(qt + k * kBM + l);
        squares = E::mac(squares, q, q);
      }
      (sqrt(squares) * abs(V::load(c + l)) * V(S(1.0001))).store(qn + l);
    }
  }
};

// Products in float32 although the inputs are bf16: sums of dS over many keys cancel to a small part of their terms, and P
// rounded as an operand leaves row sums of dS that do not (3 to 30 times the error of eager torch was seen). Only where a
// parameter learns, which is when the residual is kept.
// Strips know float32 alone.
inline bool exact_rows(const AttnParams& p) { return pos::has_terms(p.bias) && (p.residual.p || p.bias.row_e || p.bias.col_e); }

// Whether Terms::reach knows what the terms of a tile can add to a score.
inline bool is_bounded(const Bias& b) { return !(b.rows || b.cols || b.row_e || b.col_e || b.dense || b.factor || b.pairs); }

// log2 of the probability all skipped tiles of a row may hold, spread over the keys.
inline double skip_log2(const AttnParams& p) {
  if (!(p.skip_eps > 0) || p.bias.form == BiasForm::none || !is_bounded(p.bias)) return -__builtin_inf();
  return __builtin_log2(p.skip_eps) - __builtin_log2(double(p.Nk > 1 ? p.Nk : 1));
}

}  // namespace
}  // namespace fastpe::cpu::FASTPE_ISA
