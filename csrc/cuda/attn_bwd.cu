// Backward attention: rotation and delta first, then the two passes, then the gradients of what the bias looks up, then
// the sums of parameter gradients.
#include "attn_bwd.h"
#include "host.h"
#include "launch.cuh"
#include "launch.h"
#include "sum.cuh"

namespace fastpe::cuda {
namespace {

bool needs(const AttnBwdParams& a, int64_t bits) { return (a.needs & bits) != 0; }

bool is_mapped_table(const Bias& s) { return s.u.p || s.w.p; }

// Sums by tile diagonal, by bins, by row and by column, of one gradient after the other: floats of the largest.
int64_t term_sums(const AttnBwdParams& a) {
  const AttnParams& p = a.fwd;
  const int64_t nqb = tiles::ceil_div(p.Nq, kBwdBlock), nkt = tiles::ceil_div(p.Nk, kBlockN), bh = p.B * p.H;
  const int64_t diagonals = (nqb + nkt - 1) * 2 * kBwdBlock, bins = bin_parts(nqb) * kBinWarps;
  int64_t most = 0;
  const auto want = [&](bool asked, int64_t n) { most = asked && n > most ? n : most; };
  want(needs(a, need_table) && !is_mapped_table(p.bias), diagonals);
  want(needs(a, need_omega), diagonals);
  want(needs(a, need_table) && is_mapped_table(p.bias), bins * p.bias.table_len);
  want(needs(a, need_pieces), bins * 2 * p.bias.pieces_len);
  want(needs(a, need_factor | need_pairs), bins * p.bias.Sq * p.bias.Sk);
  want(needs(a, need_row_e | need_col_e), (diagonals + p.bias.terms_len) * p.bias.strip_d);
  want(needs(a, need_dense) && (p.bias.dense.sn == 0 || p.bias.dense_sk == 0), p.Nq > p.Nk ? p.Nq : p.Nk);
  return bh * most;
}

BwdArgs carve(const AttnBwdParams& a, Carver& c) {
  const AttnParams& p = a.fwd;
  const int64_t rows = p.B * p.H * p.Nq;
  BwdArgs g{};
  if (const int64_t n = term_sums(a)) g.term_sums = c.take<float>(n);
  g.a = a;
  const int64_t regions = pos::region_count(p.region.kind), q_all = rows * p.D, k_all = p.B * p.Hk * p.Nk * p.D;
  g.q = p.q_rope.cos.p ? dense(c.take<char>(regions * q_all * element_size(p)), p.H, p.Nq, p.D) : p.q;
  g.k = p.k_rope.cos.p ? dense(c.take<char>(key_copies(p) * k_all * element_size(p)), p.Hk, p.Nk, p.D) : p.k;
  g.q_copy = regions > 1 ? q_all : 0;
  g.k_copy = key_copies(p) > 1 ? k_all : 0;
  if (regions > 1 && needs(a, need_q)) g.dq_sum = c.take<float>(q_all);
  if (regions > 1 && needs(a, need_k)) g.dk_sum = c.take<float>(k_all);
  g.spans = carve_spans(p, c);
  g.delta = c.take<float>(rows);
  g.planes = p.bias.form == BiasForm::two_sided ? 2 : 1;
  // A query position that is the key position at the query's index: its gradient is part of dw.
  if (needs(a, need_u) || (needs(a, need_w) && !p.bias.u.p)) g.du = c.take<float>(g.planes * rows);
  if (needs(a, need_gamma)) g.dgamma = c.take<float>(rows);
  if (needs(a, need_row_scale)) g.drho = c.take<float>(rows);
  if (needs(a, need_params)) g.dparams = c.take<float>(p.B * p.H * tiles::ceil_div(p.Nq, kBwdBlock) * 2);
  if (needs(a, need_w)) g.dw = c.take<float>(g.planes * p.B * p.H * p.Nk);
  return g;
}

int sum(SumArgs s, void* stream);

template <class T>
int run(const BwdArgs& g, void* stream) {
  const AttnParams& p = g.a.fwd;
  const int dim = class_of(p);
  const int64_t rows = p.B * p.H * p.Nq;
  const int64_t q_blocks = p.B * p.H * tiles::ceil_div(p.Nq, kBwdBlock), k_blocks = p.B * p.Hk * tiles::ceil_div(p.Nk, kBlockN);
  if (const int rc = launch(&delta_kernel<T>, "delta", tiles::ceil_div(rows, 4), 128, 0, stream, g)) return rc;
  // Gradients of parameters that many small differences make up need row sums of dS that are zero, as on the CPU
  // (cpu/attn_common.h: exact_rows, cpu/attn_bwd.cpp: settle_rows).
  if (p.residual.p && (pos::has_terms(p.bias) || needs(g.a, need_params | need_gamma))) {
    const TermsArgs exact{g, Walk::rows, Target::delta, g.delta, 1, 1, false, false};
    if (const int rc = launch_attn_bwd_terms<T>(dim, exact, p.B * p.H * tiles::ceil_div(p.Nq, kBwdBlock), stream)) return rc;
  }
  const bool by_query = g.a.dq.p || g.du || g.dgamma || g.drho || g.dparams, by_key = g.a.dk.p || g.a.dv.p || g.dw;
  const auto passes = [&](auto kind) {
    constexpr Kind kKind = decltype(kind)::value;
    int rc = by_query ? launch_attn_bwd_q<T, kKind>(dim, g, q_blocks, stream) : 0;
    if (!rc && by_key) rc = launch_attn_bwd_kv<T, kKind>(dim, g, k_blocks, stream);
    return rc;
  };
  // float32 composes every score: one instance does for all biases.
  if constexpr (kIsF32<T>) return passes(KindTag<Kind::composed>{});
  else switch (kind_of(p)) {
    case Kind::none: return passes(KindTag<Kind::none>{});
    case Kind::rel: return passes(KindTag<Kind::rel>{});
    case Kind::table: return passes(KindTag<Kind::table>{});
    case Kind::composed: return passes(KindTag<Kind::composed>{});
    default: return passes(KindTag<Kind::form>{});
  }
}

template <class T>
int run_terms(const BwdArgs& g, void* stream) {
  const AttnBwdParams& a = g.a;
  const AttnParams& p = a.fwd;
  const Bias& s = p.bias;
  const int64_t nqb = tiles::ceil_div(p.Nq, kBwdBlock), nkt = tiles::ceil_div(p.Nk, kBlockN), bh = p.B * p.H;
  int rc = 0;
  const auto walk = [&](Walk w, Target target, void* out, int64_t width, bool all_b = false, bool all_h = false) {
    const TermsArgs t{g, w, target, static_cast<float*>(out), width, int(bin_parts(nqb)), all_b, all_h};
    const int64_t shared = (all_b ? 1 : p.B) * (all_h ? 1 : p.H);
    const int64_t blocks = w == Walk::diagonals ? bh * (nqb + nkt - 1) : w == Walk::bins ? bh * t.parts : w == Walk::rows ? bh * nqb : w == Walk::columns ? bh * nkt : shared * nqb * nkt;
    if (!rc) rc = launch_attn_bwd_terms<T>(class_of(p), t, blocks, stream);
  };
  const auto by_diagonal = [&](Target target, void* out, const Aux& like) {
    walk(Walk::diagonals, target, g.term_sums, 0);
    const DiagonalArgs d{g.term_sums, static_cast<float*>(out), s.form, p.B, p.H, p.Nq, p.Nk, s.table_len, like.sh == 0};
    if (!rc) rc = launch(&diagonal_sum_kernel, "diagonal_sum", tiles::ceil_div((d.all_h ? 1 : p.H) * d.len, 4), 128, 0, stream, d);
  };
  // The numbers [from, from + n) of every bin row of `width`.
  const auto fold_bins = [&](void* out, const Aux& like, int64_t width, int64_t from, int64_t n) {
    if (!rc) rc = sum({g.term_sums + from, nullptr, static_cast<float*>(out), p.B, p.H, bin_parts(nqb) * kBinWarps, n, 0, like.sb == 0, like.sh == 0, true, width}, stream);
  };
  if (a.dtable && !is_mapped_table(s)) by_diagonal(Target::table, a.dtable, s.table);
  if (a.dtable && is_mapped_table(s)) {
    walk(Walk::bins, Target::table, g.term_sums, s.table_len);
    fold_bins(a.dtable, {nullptr, 0, s.table.sh}, s.table_len, 0, s.table_len);
  }
  if (a.domega) by_diagonal(Target::omega, a.domega, s.omega);
  if (a.dpieces) {
    const int64_t n = s.pieces_len, heads = s.pieces.sh ? p.H : 1;
    float* out = static_cast<float*>(a.dpieces);
    // Where a piece begins has no gradient: the function is continuous there.
    if (!rc) rc = launch(&zero_kernel, "zero", tiles::ceil_div(heads * n, 128), 128, 0, stream, ZeroArgs{out, heads * n});
    walk(Walk::bins, Target::pieces, g.term_sums, 2 * n);
    fold_bins(out + heads * n, {nullptr, 0, s.pieces.sh}, 2 * n, 0, n);
    fold_bins(out + 2 * heads * n, {nullptr, 0, s.pieces.sh}, 2 * n, n, n);
  }
  const auto by_segments = [&](Target target, void* out, const Aux& like) {
    walk(Walk::bins, target, g.term_sums, s.Sq * s.Sk);
    fold_bins(out, like, s.Sq * s.Sk, 0, s.Sq * s.Sk);
  };
  if (a.dfactor) by_segments(Target::factor, a.dfactor, s.factor);
  if (a.dpairs) by_segments(Target::segments, a.dpairs, s.pairs);
  if (a.drows) walk(Walk::rows, Target::entries, a.drows, s.terms_len);
  if (a.dcols) walk(Walk::columns, Target::entries, a.dcols, s.terms_len);
  // Vectors of a table: by offset of every tile diagonal, by entry, summed over the heads that share it.
  const auto by_offset = [&](Target target, void* out, const Aux& like) {
    walk(Walk::diagonals, target, g.term_sums, s.strip_d);
    float* entries = g.term_sums + bh * (nqb + nkt - 1) * 2 * kBwdBlock * s.strip_d;
    const OffsetArgs o{g.term_sums, entries, s, p.Nq, p.Nk};
    if (!rc) rc = launch(&offset_sum_kernel, "offset_sum", bh * s.terms_len, 128, 4 * 256 * 4, stream, o);
    if (!rc) rc = sum({entries, nullptr, static_cast<float*>(out), p.B, p.H, s.terms_len, s.strip_d, 0, true, like.sh == 0, false}, stream);
  };
  if (a.drow_q) walk(Walk::rows, Target::row_q, a.drow_q, s.strip_d);
  if (a.dcol_k) walk(Walk::columns, Target::col_k, a.dcol_k, s.strip_d);
  if (a.drow_e) by_offset(Target::row_e, a.drow_e, s.row_e);
  if (a.dcol_e) by_offset(Target::col_e, a.dcol_e, s.col_e);
  if (a.ddense) {
    const bool all_b = s.dense.sb == 0, all_h = s.dense.sh == 0;
    if (s.dense.sn != 0 && s.dense_sk != 0) {
      walk(Walk::pairs, Target::dense, a.ddense, 1, all_b, all_h);
    } else {
      const bool by_key = s.dense_sk != 0;
      walk(by_key ? Walk::columns : Walk::rows, Target::dense, g.term_sums, 1);
      if (!rc) rc = sum({g.term_sums, nullptr, static_cast<float*>(a.ddense), p.B, p.H, by_key ? p.Nk : p.Nq, 1, 0, all_b, all_h, !by_key && s.dense.sn == 0}, stream);
    }
  }
  return rc;
}

int sum(SumArgs s, void* stream) {
  const int64_t n = (s.sum_b ? 1 : s.B) * (s.sum_h ? 1 : s.H) * (s.sum_n ? 1 : s.N) * s.inner;
  return launch(&sum_kernel, "sum", tiles::ceil_div(n, 128), 128, 0, stream, s);
}

}  // namespace

size_t attn_bwd_workspace(const AttnBwdParams& a) {
  Carver c{nullptr};
  carve(a, c);
  return c.used;
}

namespace {

// Rotated operands and spans, as carved.
int prepare(BwdArgs& g, void* stream) {
  const AttnParams& p = g.a.fwd;
  int rc = 0;
  if (p.q_rope.cos.p) {
    if ((rc = prepare_queries(p, g.q, g.q_copy, stream))) return rc;
    if ((rc = prepare_keys(p, g.k.p, nullptr, stream))) return rc;
  }
  g.aligned_q = aligned(g.q);
  g.aligned_k = aligned(g.k);
  g.aligned_v = aligned(p.v);
  g.aligned_do = aligned(g.a.d_o);
  return prepare_spans(p, g.spans, stream);
}

}  // namespace

size_t attn_mass_workspace(const MassParams& m) {
  AttnBwdParams a;
  a.fwd = m.fwd;
  return attn_bwd_workspace(a);
}

int attn_mass(const MassParams& m, void* workspace, void* stream) {
  AttnBwdParams a;
  a.fwd = m.fwd;
  const AttnParams& p = a.fwd;
  Carver c{static_cast<char*>(workspace)};
  BwdArgs g = carve(a, c);
  if (const int rc = prepare(g, stream)) return rc;
  TermsArgs t{g, Walk::columns, Target::mass, static_cast<float*>(m.mass), 1, 1, false, false, 0, m.weights};
  const int64_t nkt = tiles::ceil_div(p.Nk, kBlockN), nqb = tiles::ceil_div(p.Nq, kBwdBlock);
  int64_t blocks = p.B * p.H * nkt;
  if (!m.mass) {
    t.walk = Walk::pairs;
    t.target = m.logits ? Target::logits : Target::probabilities;
    t.out = static_cast<float*>(m.rows_out);
    t.first_row = p.Nq - m.rows;
    blocks *= nqb - t.first_row / kBwdBlock;
  }
  const int dim = class_of(p);
  return with_type(p.dtype, [&](auto type) { return launch_attn_bwd_terms<decltype(type)>(dim, t, blocks, stream); });
}

int attn_bwd(const AttnBwdParams& a, void* workspace, void* stream) {
  const AttnParams& p = a.fwd;
  Carver c{static_cast<char*>(workspace)};
  BwdArgs g = carve(a, c);
  int rc = prepare(g, stream);
  if (rc) return rc;
  if ((rc = with_type(p.dtype, [&](auto type) { return run<decltype(type)>(g, stream); }))) return rc;
  if ((rc = with_type(p.dtype, [&](auto type) { return run_terms<decltype(type)>(g, stream); }))) return rc;

  const auto rows = [&](const float* x, const Aux& like, void* out) {
    return sum({x, nullptr, static_cast<float*>(out), p.B, p.H, p.Nq, 1, 0, like.sb == 0, like.sh == 0, like.sn == 0}, stream);
  };
  // The token axis of u and w is never broadcast; the stride of a contiguous axis is not stored.
  if (a.du && (rc = sum({g.du, nullptr, static_cast<float*>(a.du), p.B, p.H, p.Nq, 1, 0, p.bias.u.sb == 0, p.bias.u.sh == 0, false}, stream))) return rc;
  if (a.dgamma && (rc = rows(g.dgamma, p.bias.gamma, a.dgamma))) return rc;
  if (a.drow_scale && (rc = rows(g.drho, p.row_scale, a.drow_scale))) return rc;
  if (a.dparams && (rc = sum({g.dparams, nullptr, static_cast<float*>(a.dparams), p.B, p.H, tiles::ceil_div(p.Nq, kBwdBlock), 2, 0, p.bias.params.sb == 0, p.bias.params.sh == 0, true}, stream))) return rc;
  if (a.dw) rc = sum({g.dw, p.bias.u.p ? nullptr : g.du, static_cast<float*>(a.dw), p.B, g.planes * p.H, p.Nk, 1, p.Nk - p.Nq, p.bias.w.sb == 0, p.bias.w.sh == 0, false}, stream);
  return rc;
}

}  // namespace fastpe::cuda
