// The bias forms that are a function of D = u_i - w_j (rel_fn), each stated once: value, derivative in D and
// derivatives in the two numbers p0, p1. methods: ALiBi, BiPE (linear), Cable and forgetting gates (signed),
// bidirectional Cable (abs), KERPLE on free positions (log, power), kernel Cable (logsq).
//
// V is a float, a double or a SIMD vector; fma, max, abs, log1p, log, pow and select are found next to V.
// The row weight g multiplies outside: b = g * phi(D).
#pragma once

#include "../core/hd.h"
#include "../core/params.h"

namespace fastpe::pos {

template <BiasForm F>
struct Phi;

template <>
struct Phi<BiasForm::linear> {
  template <class V> static FASTPE_HD V value(V d, V p0, V p1) { return p1 * min(d, V(0)) - p0 * max(d, V(0)); }
  template <class V> static FASTPE_HD V slope(V d, V p0, V p1) { return select(d > V(0), V(0) - p0, select(d < V(0), p1, V(0))); }
  template <class V> static FASTPE_HD V d_p0(V d, V, V) { return V(0) - max(d, V(0)); }
  template <class V> static FASTPE_HD V d_p1(V d, V, V) { return min(d, V(0)); }
};

template <>
struct Phi<BiasForm::signed_> {
  template <class V> static FASTPE_HD V value(V d, V, V) { return d; }
  template <class V> static FASTPE_HD V slope(V, V, V) { return V(1); }
  template <class V> static FASTPE_HD V d_p0(V, V, V) { return V(0); }
  template <class V> static FASTPE_HD V d_p1(V, V, V) { return V(0); }
};

template <>
struct Phi<BiasForm::abs> {
  template <class V> static FASTPE_HD V value(V d, V, V) { return V(0) - abs(d); }
  template <class V> static FASTPE_HD V slope(V d, V, V) { return select(d > V(0), V(-1), select(d < V(0), V(1), V(0))); }
  template <class V> static FASTPE_HD V d_p0(V, V, V) { return V(0); }
  template <class V> static FASTPE_HD V d_p1(V, V, V) { return V(0); }
};

// -p0 log(1 + p1 |D|)
template <>
struct Phi<BiasForm::log> {
  template <class V> static FASTPE_HD V value(V d, V p0, V p1) { return V(0) - p0 * log1p(p1 * abs(d)); }
  template <class V> static FASTPE_HD V slope(V d, V p0, V p1) {
    const V s = p0 * p1 / (V(1) + p1 * abs(d));
    return select(d > V(0), V(0) - s, select(d < V(0), s, V(0)));
  }
  template <class V> static FASTPE_HD V d_p0(V d, V, V p1) { return V(0) - log1p(p1 * abs(d)); }
  template <class V> static FASTPE_HD V d_p1(V d, V p0, V p1) { return V(0) - p0 * abs(d) / (V(1) + p1 * abs(d)); }
};

// -p0 |D|^p1; value and derivatives are 0 at D = 0
template <>
struct Phi<BiasForm::power> {
  template <class V> static FASTPE_HD V safe(V d) { return select(abs(d) > V(0), abs(d), V(1)); }
  template <class V> static FASTPE_HD V off_zero(V d, V x) { return select(abs(d) > V(0), x, V(0)); }
  template <class V> static FASTPE_HD V value(V d, V p0, V p1) { return off_zero(d, V(0) - p0 * pow(safe(d), p1)); }
  template <class V> static FASTPE_HD V slope(V d, V p0, V p1) {
    const V s = p0 * p1 * pow(safe(d), p1 - V(1));
    return select(d > V(0), V(0) - s, select(d < V(0), s, V(0)));
  }
  template <class V> static FASTPE_HD V d_p0(V d, V, V p1) { return off_zero(d, V(0) - pow(safe(d), p1)); }
  template <class V> static FASTPE_HD V d_p1(V d, V p0, V p1) { return V(0) - p0 * pow(safe(d), p1) * log(safe(d)) * off_zero(d, V(1)); }
};

template <>
struct Phi<BiasForm::logsq> {
  template <class V> static FASTPE_HD V value(V d, V, V) { return V(0) - log1p(d * d); }
  template <class V> static FASTPE_HD V slope(V d, V, V) { return V(-2) * d / (V(1) + d * d); }
  template <class V> static FASTPE_HD V d_p0(V, V, V) { return V(0); }
  template <class V> static FASTPE_HD V d_p1(V, V, V) { return V(0); }
};

// Calls f(Phi<form>) for a rel_fn form.
template <class Fn>
FASTPE_HD void with_form(BiasForm form, Fn&& f) {
  switch (form) {
    case BiasForm::linear: f(Phi<BiasForm::linear>{}); break;
    case BiasForm::signed_: f(Phi<BiasForm::signed_>{}); break;
    case BiasForm::abs: f(Phi<BiasForm::abs>{}); break;
    case BiasForm::log: f(Phi<BiasForm::log>{}); break;
    case BiasForm::power: f(Phi<BiasForm::power>{}); break;
    case BiasForm::logsq: f(Phi<BiasForm::logsq>{}); break;
    default: break;
  }
}

constexpr FASTPE_HD bool is_rel_fn(BiasForm f) { return f >= BiasForm::linear && f <= BiasForm::logsq; }
constexpr FASTPE_HD bool is_table(BiasForm f) { return f == BiasForm::table || f == BiasForm::table_causal; }

// Scores that a fused form and a scale do not make: they are composed term by term before the softmax, without the bound
// that skips tiles.
constexpr FASTPE_HD bool has_terms(const Bias& b) {
  return b.form == BiasForm::fire || (is_table(b.form) && (b.u.p || b.w.p)) || b.omega.p || b.rows.p || b.cols.p || b.dense.p || b.factor.p || b.pairs.p || b.row_e.p || b.col_e.p;
}
// Biases that the kernel for few queries has.
constexpr FASTPE_HD bool decode_takes(const Bias& b) {
  const bool form = b.form == BiasForm::none || is_rel_fn(b.form) || (is_table(b.form) && !b.u.p && !b.w.p);
  return form && !b.rows.p && !b.cols.p && !b.row_e.p && !b.col_e.p;
}
constexpr FASTPE_HD bool is_composed(const AttnParams& p) { return p.softcap > 0 || has_terms(p.bias); }

// Index into a table form, or into fire's numerator, for the offset t = I - j.
constexpr FASTPE_HD int64_t table_index(BiasForm f, int64_t t, int64_t len) {
  if (f == BiasForm::fire) return t < 0 ? (-t < len ? -t : len - 1) : (t < len ? t : len - 1);
  if (f == BiasForm::table_causal) return t < 0 ? 0 : (t < len ? t : len - 1);
  const int64_t r = (len - 1) / 2;
  return t > r ? 0 : (t < -r ? 2 * r : r - t);
}
static_assert(table_index(BiasForm::table, 0, 5) == 2 && table_index(BiasForm::table, 1, 5) == 1 &&
              table_index(BiasForm::table, -2, 5) == 4 && table_index(BiasForm::table, 9, 5) == 0);
static_assert(table_index(BiasForm::table_causal, -3, 4) == 0 && table_index(BiasForm::table_causal, 3, 4) == 3 &&
              table_index(BiasForm::table_causal, 9, 4) == 3);

// The offsets t whose table_index is `entry`, as a half-open range each for t >= 0 (side 0) and t < 0 (side 1).
struct OffsetRange {
  int64_t lo, hi;
};
constexpr FASTPE_HD OffsetRange offsets_of_entry(BiasForm f, int64_t entry, int64_t len, int side) {
  constexpr int64_t far = int64_t(1) << 60;
  const int64_t r = (len - 1) / 2;
  OffsetRange x{1, 0};
  if (f == BiasForm::table) x = {entry == 2 * r ? -far : r - entry, entry == 0 ? far : r - entry + 1};
  else if (f == BiasForm::table_causal) x = {entry == 0 ? -far : entry, entry == len - 1 ? far : entry + 1};
  else if (side == 0) x = {entry, entry == len - 1 ? far : entry + 1};
  else x = {entry == len - 1 ? -far : -entry, -entry + 1};
  if (side == 0 && x.lo < 0) x.lo = 0;
  if (side == 1 && x.hi > 0) x.hi = 0;
  return x;
}
namespace check {
constexpr bool offsets_agree() {
  constexpr BiasForm forms[] = {BiasForm::table, BiasForm::table_causal, BiasForm::fire};
  for (BiasForm f : forms)
    for (int64_t len = 1; len < 8; len += f == BiasForm::table ? 2 : 1)
      for (int64_t t = -10; t <= 10; ++t)
        for (int64_t e = 0; e < len; ++e) {
          const OffsetRange r = offsets_of_entry(f, e, len, t < 0);
          if ((t >= r.lo && t < r.hi) != (table_index(f, t, len) == e)) return false;
        }
  return true;
}
static_assert(offsets_agree(), "offsets_of_entry is not the inverse of table_index");
}  // namespace check

// Every form is monotone in |D| on either side of 0 (p >= 0 or not), so its largest value on D in [lo, hi] is at an
// end or, when the interval holds it, at D = 0. Used by the bound that skips tiles.
template <class P, class V>
FASTPE_HD V phi_max(P, V lo, V hi, V p0, V p1) {
  const V at_ends = max(P::value(lo, p0, p1), P::value(hi, p0, p1));
  return select((lo < V(0)) & (hi > V(0)), max(at_ends, P::value(V(0), p0, p1)), at_ends);
}
template <class P, class V>
FASTPE_HD V phi_min(P, V lo, V hi, V p0, V p1) {
  const V at_ends = min(P::value(lo, p0, p1), P::value(hi, p0, p1));
  return select((lo < V(0)) & (hi > V(0)), min(at_ends, P::value(V(0), p0, p1)), at_ends);
}

}  // namespace fastpe::pos
