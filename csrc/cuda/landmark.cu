// Landmark attention: the plan of tiles and the rotation of keys first, then the passes.
#include "landmark.h"

#include "host.h"
#include "landmark_plan.cuh"
#include "launch.cuh"
#include "launch.h"

namespace fastpe::cuda {
namespace {

int64_t plans_of(const LandmarkParams& c) { return c.landmark_sb || c.visible_sb ? c.attn.B : 1; }

LandmarkPlan carve_plan(const LandmarkParams& params, Carver& c) {
  const int64_t nk = params.attn.Nk, plans = plans_of(params);
  LandmarkPlan x;
  x.most = most_landmark_tiles(nk);
  x.Nk = nk;
  x.by_batch = plans > 1;
  x.tile = c.take<LandmarkTile>(plans * x.most);
  x.count = c.take<int32_t>(plans);
  x.own = c.take<int32_t>(plans * nk);
  x.tile_of = c.take<int32_t>(plans * nk);
  return x;
}

int make_plan(const LandmarkParams& c, const LandmarkPlan& x, void* stream) {
  const LandmarkPlanArgs a{c.is_landmark, c.visible, c.landmark_sb, c.visible_sb, plans_of(c), x};
  const int rc = launch(&landmark_plan_kernel, "landmark_plan", a.plans, 32, 0, stream, a);
  return rc ? rc : launch(&landmark_tile_kernel, "landmark_tile", tiles::ceil_div(a.plans * x.most, 4), 128, 0, stream, a);
}

// Keys: rotated into the workspace, or the call's own.
View carve_keys(const AttnParams& p, Carver& c) { return p.k_rope.cos.p ? dense(c.take<uint16_t>(p.B * p.Hk * p.Nk * p.D), p.Hk, p.Nk, p.D) : p.k; }
int turn_keys(const AttnParams& p, const View& k, void* stream) { return p.k_rope.cos.p ? prepare_keys(p, static_cast<uint16_t*>(k.p), nullptr, stream) : 0; }

LandmarkFwdArgs carve(const LandmarkParams& params, Carver& c) {
  const AttnParams& p = params.attn;
  LandmarkFwdArgs a{};
  a.f.p = p;
  a.plan = carve_plan(params, c);
  a.f.pre.k = carve_keys(p, c);
  a.f.splits = int(fwd_splits(p));
  if (a.f.splits > 1) {
    const int64_t rows = a.f.splits * p.B * p.H * p.Nq;
    a.f.part_o = c.take<float>(rows * p.Dv);
    a.f.part_ml = c.take<float>(rows * 2);
  }
  return a;
}

LandmarkBwdArgs carve(const LandmarkBwdParams& params, Carver& c) {
  const AttnParams& p = params.fwd.attn;
  LandmarkBwdArgs a{};
  a.plan = carve_plan(params.fwd, c);
  BwdArgs& g = a.g;
  g.a.fwd = p;
  g.a.d_o = params.d_o;
  g.a.dlse = params.dlse;
  g.a.dq = params.dq, g.a.dk = params.dk, g.a.dv = params.dv;
  g.q = p.q_rope.cos.p ? dense(c.take<uint16_t>(p.B * p.H * p.Nq * p.D), p.H, p.Nq, p.D) : p.q;
  g.k = carve_keys(p, c);
  g.delta = c.take<float>(p.B * p.H * p.Nq);
  return a;
}

template <class T>
int run(const LandmarkFwdArgs& a, void* stream) {
  const AttnParams& p = a.f.p;
  const int64_t blocks = a.f.splits * p.B * p.H * tiles::ceil_div(p.Nq, fwd_block_m(class_of(p)));
  const int rc = launch_landmark_fwd<T>(class_of(p), a, blocks, stream);
  if (rc || a.f.splits == 1) return rc;
  return launch(&attn_join_kernel<T>, "attn_join", tiles::ceil_div(p.B * p.H * p.Nq, 4), 128, 0, stream, a.f);
}

template <class T>
int run(const LandmarkBwdArgs& a, void* stream) {
  const AttnParams& p = a.g.a.fwd;
  int rc = launch(&delta_kernel<T>, "delta", tiles::ceil_div(p.B * p.H * p.Nq, 4), 128, 0, stream, a.g);
  if (!rc && a.g.a.dq.p) rc = launch_landmark_bwd_q<T>(class_of(p), a, p.B * p.H * tiles::ceil_div(p.Nq, kBwdBlock), stream);
  if (!rc && (a.g.a.dk.p || a.g.a.dv.p)) rc = launch_landmark_bwd_kv<T>(class_of(p), a, p.B * p.Hk * a.plan.most, stream);
  return rc;
}

}  // namespace

size_t landmark_fwd_workspace(const LandmarkParams& params) {
  Carver c{nullptr};
  carve(params, c);
  return c.used;
}

int landmark_fwd(const LandmarkParams& params, void* workspace, void* stream) {
  const AttnParams& p = params.attn;
  Carver c{static_cast<char*>(workspace)};
  LandmarkFwdArgs a = carve(params, c);
  a.f.aligned_q = aligned(p.q);
  a.f.aligned_k = aligned(a.f.pre.k);
  a.f.aligned_v = aligned(p.v);
  int rc = make_plan(params, a.plan, stream);
  if (!rc) rc = turn_keys(p, a.f.pre.k, stream);
  if (rc) return rc;
  return p.dtype == DType::bf16 ? run<Bf16>(a, stream) : run<F16>(a, stream);
}

size_t landmark_bwd_workspace(const LandmarkBwdParams& params) {
  Carver c{nullptr};
  carve(params, c);
  return c.used;
}

int landmark_bwd(const LandmarkBwdParams& params, void* workspace, void* stream) {
  const AttnParams& p = params.fwd.attn;
  Carver c{static_cast<char*>(workspace)};
  LandmarkBwdArgs a = carve(params, c);
  BwdArgs& g = a.g;
  g.aligned_q = aligned(g.q);
  g.aligned_k = aligned(g.k);
  g.aligned_v = aligned(p.v);
  g.aligned_do = aligned(g.a.d_o);
  int rc = make_plan(params.fwd, a.plan, stream);
  if (!rc) rc = turn_keys(p, g.k, stream);
  if (!rc && p.q_rope.cos.p) rc = rotate_to(p, p.q, g.q, p.q_rope, p.H, p.Nq, stream);
  if (rc) return rc;
  return p.dtype == DType::bf16 ? run<Bf16>(a, stream) : run<F16>(a, stream);
}

}  // namespace fastpe::cuda
