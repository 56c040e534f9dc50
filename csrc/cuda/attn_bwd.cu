// Backward attention: rotation and delta first, then the two passes, then the sums of parameter gradients.
#include "attn_bwd.h"
#include "host.h"
#include "launch.cuh"
#include "launch.h"
#include "sum.cuh"

namespace fastpe::cuda {
namespace {

bool needs(const AttnBwdParams& a, int64_t bits) { return (a.needs & bits) != 0; }

BwdArgs carve(const AttnBwdParams& a, Carver& c) {
  const AttnParams& p = a.fwd;
  const int64_t rows = p.B * p.H * p.Nq;
  BwdArgs g{};
  g.a = a;
  g.q = p.q_rope.cos.p ? dense(c.take<uint16_t>(rows * p.D), p.H, p.Nq, p.D) : p.q;
  g.k = p.k_rope.cos.p ? dense(c.take<uint16_t>(p.B * p.Hk * p.Nk * p.D), p.Hk, p.Nk, p.D) : p.k;
  g.delta = c.take<float>(rows);
  // A query position that is the key position at the query's index: its gradient is part of dw.
  if (needs(a, need_u) || (needs(a, need_w) && !p.bias.u.p)) g.du = c.take<float>(rows);
  if (needs(a, need_gamma)) g.dgamma = c.take<float>(rows);
  if (needs(a, need_row_scale)) g.drho = c.take<float>(rows);
  if (needs(a, need_params)) g.dparams = c.take<float>(p.B * p.H * tiles::ceil_div(p.Nq, kBwdBlock) * 2);
  if (needs(a, need_w)) g.dw = c.take<float>(p.B * p.H * p.Nk);
  return g;
}

int rotate_to(const AttnParams& p, const View& x, const View& y, const Rope& rope, int64_t H, int64_t N, void* stream) {
  RotateParams r;
  r.dtype = p.dtype;
  r.B = p.B, r.H = H, r.N = N, r.D = p.D, r.J = p.rope_pairs;
  r.x = x, r.y = y;
  r.rope = rope;
  r.layout = p.rope_layout;
  return rotate(r, stream);
}

template <class T>
int run(const BwdArgs& g, void* stream) {
  const AttnParams& p = g.a.fwd;
  const int dim = class_of(p);
  const int64_t rows = p.B * p.H * p.Nq;
  const uint32_t q_blocks = uint32_t(p.B * p.H * tiles::ceil_div(p.Nq, kBwdBlock)), k_blocks = uint32_t(p.B * p.Hk * tiles::ceil_div(p.Nk, kBlockN));
  if (const int rc = launch(&delta_kernel<T>, "delta", uint32_t(tiles::ceil_div(rows, 4)), 128, 0, stream, g)) return rc;
  const bool by_query = g.a.dq.p || g.du || g.dgamma || g.drho || g.dparams, by_key = g.a.dk.p || g.a.dv.p || g.dw;
  const auto passes = [&](auto kind) {
    constexpr Kind kKind = decltype(kind)::value;
    int rc = by_query ? launch_attn_bwd_q<T, kKind>(dim, g, q_blocks, stream) : 0;
    if (!rc && by_key) rc = launch_attn_bwd_kv<T, kKind>(dim, g, k_blocks, stream);
    return rc;
  };
  switch (kind_of(p.bias.form)) {
    case Kind::none: return passes(KindTag<Kind::none>{});
    case Kind::rel: return passes(KindTag<Kind::rel>{});
    case Kind::table: return passes(KindTag<Kind::table>{});
    default: return passes(KindTag<Kind::form>{});
  }
}

int sum(SumArgs s, void* stream) {
  const int64_t n = (s.sum_b ? 1 : s.B) * (s.sum_h ? 1 : s.H) * (s.sum_n ? 1 : s.N) * s.inner;
  return launch(&sum_kernel, "sum", uint32_t(tiles::ceil_div(n, 128)), 128, 0, stream, s);
}

}  // namespace

size_t attn_bwd_workspace(const AttnBwdParams& a) {
  Carver c{nullptr};
  carve(a, c);
  return c.used;
}

int attn_bwd(const AttnBwdParams& a, void* workspace, void* stream) {
  const AttnParams& p = a.fwd;
  Carver c{static_cast<char*>(workspace)};
  BwdArgs g = carve(a, c);
  int rc = 0;
  if (p.q_rope.cos.p) {
    if ((rc = rotate_to(p, p.q, g.q, p.q_rope, p.H, p.Nq, stream))) return rc;
    if ((rc = rotate_to(p, p.k, g.k, p.k_rope, p.Hk, p.Nk, stream))) return rc;
  }
  g.aligned_q = aligned(g.q);
  g.aligned_k = aligned(g.k);
  g.aligned_v = aligned(p.v);
  g.aligned_do = aligned(a.d_o);
  if ((rc = p.dtype == DType::bf16 ? run<Bf16>(g, stream) : run<F16>(g, stream))) return rc;

  const auto rows = [&](const float* x, const Aux& like, void* out) {
    return sum({x, nullptr, static_cast<float*>(out), p.B, p.H, p.Nq, 1, 0, like.sb == 0, like.sh == 0, like.sn == 0}, stream);
  };
  // The token axis of u and w is never broadcast; the stride of a contiguous axis is not stored.
  if (a.du && (rc = sum({g.du, nullptr, static_cast<float*>(a.du), p.B, p.H, p.Nq, 1, 0, p.bias.u.sb == 0, p.bias.u.sh == 0, false}, stream))) return rc;
  if (a.dgamma && (rc = rows(g.dgamma, p.bias.gamma, a.dgamma))) return rc;
  if (a.drow_scale && (rc = rows(g.drho, p.row_scale, a.drow_scale))) return rc;
  if (a.dparams && (rc = sum({g.dparams, nullptr, static_cast<float*>(a.dparams), p.B, p.H, tiles::ceil_div(p.Nq, kBwdBlock), 2, 0, p.bias.params.sb == 0, p.bias.params.sh == 0, true}, stream))) return rc;
  if (a.dw) rc = sum({g.dw, p.bias.u.p ? nullptr : g.du, static_cast<float*>(a.dw), p.B, p.H, p.Nk, 1, p.Nk - p.Nq, p.bias.w.sb == 0, p.bias.w.sh == 0, false}, stream);
  return rc;
}

}  // namespace fastpe::cuda
