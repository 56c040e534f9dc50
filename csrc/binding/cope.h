// Attention with contextual positions: the checks and allocations that the bindings of all devices share. `run` starts the
// work.
#pragma once

#include <tuple>

#include "args.h"
#include "backward.h"
#include "core/tiles.h"

// What the schemas of cope_fwd and cope_bwd have in common.
#define FASTPE_COPE_ARGS \
  "Tensor? gate_q, Tensor? gate_k, Tensor? table, Tensor? q_rope, Tensor? k_rope, int rope_layout, int left, int right, " \
  "int sinks, Tensor? q_ids, Tensor? k_ids, Tensor? mask, Tensor? sink, float scale, float gate_scale, float table_scale"

namespace fastpe::binding {

#define FASTPE_COPE_PARAMS \
  OptTensor gate_q, OptTensor gate_k, OptTensor table, OptTensor q_rope, OptTensor k_rope, int64_t rope_layout, int64_t left, \
      int64_t right, int64_t sinks, OptTensor q_ids, OptTensor k_ids, OptTensor mask, OptTensor sink, double scale, \
      double gate_scale, double table_scale

struct CopeArgs {
  OptTensor gate_q, gate_k, table;
  double gate_scale, table_scale;
};

// Everything but the outputs and the carries.
inline CopeParams read_cope(const char* op, const AttnArgs& attn, const CopeArgs& a) {
  const Call c{op, attn.q};
  CopeParams p;
  p.attn = read_attn(op, attn);
  const AttnParams& t = p.attn;
  check(op, t.vis.right == 1, "right must be 1 (causal), got ", t.vis.right);
  check(op, a.gate_k.has_value() || !a.gate_q.has_value(), "gate_q needs gate_k");
  if (a.gate_k) {
    check_device(c, "gate_k", *a.gate_k);
    check_dtype(c, "gate_k", *a.gate_k, attn.q.scalar_type());
    check(op, a.gate_k->dim() == 4, "gate_k must have 4 axes, got ", shape_of(*a.gate_k));
    p.G = a.gate_q ? a.gate_k->size(3) : t.D;
    check_shape(c, "gate_k", *a.gate_k, {{t.B}, {t.Hk}, {t.Nk}, {p.G}});
    check(op, p.G >= 8 && p.G <= 256 && p.G % 8 == 0, "gate_k must have 8 to 256 channels in steps of 8, got ", p.G);
    p.gate_k = read_view(c, "gate_k", *a.gate_k);
  }
  if (a.gate_q) {
    check_device(c, "gate_q", *a.gate_q);
    check_dtype(c, "gate_q", *a.gate_q, attn.q.scalar_type());
    check_shape(c, "gate_q", *a.gate_q, {{t.B}, {t.H}, {t.Nq}, {p.G}});
    p.gate_q = read_view(c, "gate_q", *a.gate_q);
  }
  if (a.table) {
    check_device(c, "table", *a.table);
    check_dtype(c, "table", *a.table, aux_type(t.dtype));
    check(op, a.table->dim() == 2 && a.table->size(0) == t.D && a.table->size(1) >= 1 && a.table->size(1) < (int64_t(1) << 24),
          "table must be of shape (", t.D, ", entries) with 1 to 2^24 - 1 entries, got ", shape_of(*a.table));
    check(op, a.table->is_contiguous(), "table must be contiguous");
    p.table = a.table->const_data_ptr();
    p.npos = a.table->size(1);
  }
  p.gate_scale = a.gate_scale;
  p.table_scale = a.table_scale;
  return p;
}

inline AttnArgs cope_attn_args(const Tensor& q, const Tensor& k, const Tensor& v, FASTPE_COPE_PARAMS) {
  AttnArgs a{};  // no bias, no row scale, no softcap
  a.q = q, a.k = k, a.v = v;
  a.q_rope = q_rope, a.k_rope = k_rope, a.rope_layout = rope_layout;
  a.left = left, a.right = right, a.sinks = sinks;
  a.q_ids = q_ids, a.k_ids = k_ids, a.mask = mask;
  a.sink = sink, a.scale = scale;
  return a;
}

#define FASTPE_COPE_VALUES \
  gate_q, gate_k, table, q_rope, k_rope, rope_layout, left, right, sinks, q_ids, k_ids, mask, sink, scale, gate_scale, table_scale

inline int64_t cope_blocks(int64_t n, int64_t of) { return tiles::ceil_div(n, of); }

// run(params) fills the results; it is not called when there are none.
template <class Run>
std::tuple<Tensor, Tensor, Tensor, Tensor> cope_fwd_on(const Tensor& q, const Tensor& k, const Tensor& v, FASTPE_COPE_PARAMS, bool training, Run&& run) {
  CopeParams c = read_cope("cope_fwd", cope_attn_args(q, k, v, FASTPE_COPE_VALUES), {gate_q, gate_k, table, gate_scale, table_scale});
  AttnParams& p = c.attn;
  const ScalarType aux = aux_type(p.dtype);
  Tensor out = empty_in_order(q, p.B, p.H, p.Nq, p.Dv);
  Tensor lse = empty(q, {p.B, p.H, p.Nq}, aux);
  const bool keep_residual = training && (p.dtype == DType::bf16 || p.dtype == DType::f16);
  Tensor residual = keep_residual ? empty_in_order(q, p.B, p.H, p.Nq, p.Dv) : none(q, q.scalar_type());
  Tensor carry = training ? empty(q, {p.B, p.H, cope_blocks(p.Nq, tiles::kBlockQ), cope_blocks(p.Nk, kCopeBlockK), 2, tiles::kBlockQ}, aux) : none(q, aux);
  if (lse.numel() > 0) {
    if (keep_residual) p.residual = view(residual, residual.mutable_data_ptr());
    if (carry.numel() > 0) c.carry = carry.mutable_data_ptr();
    p.o = view(out, out.mutable_data_ptr());
    p.lse = lse.mutable_data_ptr();
    run(c);
  }
  return {out, lse, carry, residual};
}

template <class Run>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cope_bwd_on(
    const Tensor& dout, const OptTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const Tensor& carry, const OptTensor& residual, FASTPE_COPE_PARAMS, int64_t needs, Run&& run) {
  const char* op = "cope_bwd";
  CopeBwdParams b;
  b.fwd = read_cope(op, cope_attn_args(q, k, v, FASTPE_COPE_VALUES), {gate_q, gate_k, table, gate_scale, table_scale});
  AttnParams& p = b.fwd.attn;
  const Call c{op, q};
  const ScalarType type = q.scalar_type(), aux = aux_type(p.dtype);
  const BackwardInputs inputs(c, p, b, dout, dlse, out, lse, residual);
  check_device(c, "carry", carry);
  check_dtype(c, "carry", carry, aux);
  check_shape(c, "carry", carry, {{p.B}, {p.H}, {cope_blocks(p.Nq, tiles::kBlockQ)}, {cope_blocks(p.Nk, kCopeBlockK)}, {2}, {tiles::kBlockQ}});
  const Tensor carry_c = torch::stable::contiguous(carry);
  b.fwd.carry = read_ptr(carry_c);

  b.needs = needs;
  const auto grad = [&](CopeNeeds bit, const char* name, const OptTensor& x, View& g) {
    if (!(needs & bit)) return none(q, type);
    check(op, x.has_value(), "the gradient of ", name, " is asked for, but the call has no ", name);
    Tensor t = empty_in_order(*x, x->size(0), x->size(1), x->size(2), x->size(3));
    g = view(t, t.mutable_data_ptr());
    return t;
  };
  Tensor dq = grad(cope_need_q, "q", q, b.dq);
  Tensor dk = grad(cope_need_k, "k", k, b.dk);
  Tensor dv = grad(cope_need_v, "v", v, b.dv);
  Tensor dgate_q = grad(cope_need_gate_q, "gate_q", gate_q, b.dgate_q);
  Tensor dgate_k = grad(cope_need_gate_k, "gate_k", gate_k, b.dgate_k);
  check(op, !(needs & cope_need_table) || table.has_value(), "the gradient of table is asked for, but the call has no table");
  Tensor dtable = needs & cope_need_table ? empty_contiguous(*table) : none(q, aux);
  if (dtable.numel() > 0) b.dtable = dtable.mutable_data_ptr();

  if (p.B > 0 && p.H > 0 && p.Nq > 0 && p.Nk > 0) {
    if (needs) run(b);
  } else {
    for (Tensor* t : {&dq, &dk, &dv, &dgate_q, &dgate_k, &dtable}) torch::stable::zero_(*t);
  }
  return {dq, dk, dv, dgate_q, dgate_k, dtable};
}

}  // namespace fastpe::binding
