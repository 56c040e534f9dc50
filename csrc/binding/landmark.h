// Landmark attention: the checks and allocations that the bindings of all devices share. `run` starts the work.
#pragma once

#include <limits>
#include <tuple>
#include <utility>

#include "args.h"
#include "backward.h"

namespace fastpe::binding {

#define FASTPE_LANDMARK_PARAMS \
  Tensor is_landmark, OptTensor visible, OptTensor q_rope, OptTensor k_rope, int64_t rope_layout, double scale
#define FASTPE_LANDMARK_VALUES is_landmark, visible, q_rope, k_rope, rope_layout, scale

// Everything but the outputs.
inline LandmarkParams read_landmark(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, FASTPE_LANDMARK_PARAMS) {
  AttnArgs a{};
  a.q = q, a.k = k, a.v = v;
  a.q_rope = q_rope, a.k_rope = k_rope, a.rope_layout = rope_layout;
  a.right = 1, a.scale = scale;
  LandmarkParams p;
  p.attn = read_attn(op, a);
  const Call c{op, q};
  check(op, p.attn.Nk < std::numeric_limits<int32_t>::max(), "k has ", p.attn.Nk, " tokens, more than 2^31 - 2");
  const auto keys = [&](const char* name, const Tensor& t, const uint8_t*& to, int64_t& sb) {
    check_device(c, name, t);
    check_dtype(c, name, t, ScalarType::Bool);
    check_shape(c, name, t, {broadcast(p.attn.B), {p.attn.Nk}});
    check_last_contiguous(c, name, t);
    to = static_cast<const uint8_t*>(t.const_data_ptr());
    sb = step(t, 0);
  };
  keys("is_landmark", is_landmark, p.is_landmark, p.landmark_sb);
  if (visible) keys("visible", *visible, p.visible, p.visible_sb);
  return p;
}

template <class Run>
std::tuple<Tensor, Tensor> landmark_fwd_on(const Tensor& q, const Tensor& k, const Tensor& v, FASTPE_LANDMARK_PARAMS, Run&& run) {
  LandmarkParams c = read_landmark("landmark_fwd", q, k, v, FASTPE_LANDMARK_VALUES);
  AttnParams& p = c.attn;
  Tensor out = empty_in_order(q, p.B, p.H, p.Nq, p.Dv);
  Tensor lse = empty(q, {p.B, p.H, p.Nq}, aux_type(p.dtype));
  if (lse.numel() > 0) {
    p.o = view(out, out.mutable_data_ptr());
    p.lse = lse.mutable_data_ptr();
    run(c);
  }
  return {out, lse};
}

template <class Run>
std::tuple<Tensor, Tensor, Tensor> landmark_bwd_on(
    const Tensor& dout, const OptTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    FASTPE_LANDMARK_PARAMS, int64_t needs, Run&& run) {
  const char* op = "landmark_bwd";
  LandmarkBwdParams b;
  b.fwd = read_landmark(op, q, k, v, FASTPE_LANDMARK_VALUES);
  AttnParams& p = b.fwd.attn;
  const Call c{op, q};
  const BackwardInputs inputs(c, p, b, dout, dlse, out, lse);
  b.needs = needs;
  const auto grad = [&](Needs bit, const Tensor& x, View& g) {
    if (!(needs & bit)) return none(q, q.scalar_type());
    Tensor t = empty_in_order(x, x.size(0), x.size(1), x.size(2), x.size(3));
    g = view(t, t.mutable_data_ptr());
    return t;
  };
  Tensor dq = grad(need_q, q, b.dq), dk = grad(need_k, k, b.dk), dv = grad(need_v, v, b.dv);
  if (p.B > 0 && p.H > 0 && p.Nq > 0 && p.Nk > 0) {
    if (needs) run(b);
  } else {
    for (Tensor* t : {&dq, &dk, &dv}) torch::stable::zero_(*t);
  }
  return {dq, dk, dv};
}

}  // namespace fastpe::binding
