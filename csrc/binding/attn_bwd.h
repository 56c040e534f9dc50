// The backward op of attention on any device: what is checked, what is allocated, and the call of the kernels in between.
#pragma once

#include <tuple>

#include "args.h"
#include "backward.h"

namespace fastpe::binding {

using AttnGrads =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// run(params) fills the gradients; it is not called when there is nothing to compute.
template <class Run>
AttnGrads attn_bwd_on(
    const Tensor& dout, const OptTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const OptTensor& residual, FASTPE_ATTN_PARAMS, int64_t needs, Run&& run) {
  const char* op = "attn_bwd";
  const AttnArgs a{q, k, v, FASTPE_ATTN_VALUES};
  AttnBwdParams b;
  b.fwd = read_attn(op, a);
  AttnParams& p = b.fwd;
  const Call c{op, q};
  const ScalarType type = q.scalar_type(), aux = aux_type(p.dtype);
  const BackwardInputs inputs(c, p, b, dout, dlse, out, lse, residual);
  b.needs = needs;
  const auto like = [&](Needs bit, const Tensor& x, View& g) {
    if (!(needs & bit)) return none(q, type);
    Tensor t = empty_in_order(x, x.size(0), x.size(1), x.size(2), x.size(3));
    g = view(t, t.mutable_data_ptr());
    return t;
  };
  const auto grad_of = [&](Needs bit, const char* name, const OptTensor& x, void*& g) {
    if (!(needs & bit)) return none(q, aux);
    check(op, x.has_value(), "the gradient of ", name, " is asked for, but the call has no ", name);
    Tensor t = empty_contiguous(*x);
    g = t.mutable_data_ptr();
    return t;
  };
  // Their gradients come for every batch entry and head.
  if ((needs & need_row_q) && bias_row_q) check_shape(c, "bias_row_q", *bias_row_q, {{p.B}, {p.H}, {p.Nq}, {p.bias.strip_d}});
  if ((needs & need_col_k) && bias_col_k) check_shape(c, "bias_col_k", *bias_col_k, {{p.B}, {p.H}, {p.Nk}, {p.bias.strip_d}});
  AttnGrads g{
      like(need_q, q, b.dq), like(need_k, k, b.dk), like(need_v, v, b.dv),
      grad_of(need_params, "bias_params", bias_params, b.dparams), grad_of(need_gamma, "bias_gamma", bias_gamma, b.dgamma),
      grad_of(need_u, "bias_u", bias_u, b.du), grad_of(need_w, "bias_w", bias_w, b.dw),
      grad_of(need_table, "bias_table", bias_table, b.dtable), grad_of(need_row_scale, "row_scale", row_scale, b.drow_scale),
      grad_of(need_pieces, "bias_pieces", bias_pieces, b.dpieces), grad_of(need_omega, "bias_omega", bias_omega, b.domega),
      grad_of(need_rows, "bias_rows", bias_rows, b.drows), grad_of(need_cols, "bias_cols", bias_cols, b.dcols),
      grad_of(need_dense, "bias_dense", bias_dense, b.ddense),
      grad_of(need_factor, "bias_factor", bias_factor, b.dfactor), grad_of(need_pairs, "bias_pairs", bias_pairs, b.dpairs),
      grad_of(need_row_q, "bias_row_q", bias_row_q, b.drow_q), grad_of(need_row_e, "bias_row_e", bias_row_e, b.drow_e),
      grad_of(need_col_k, "bias_col_k", bias_col_k, b.dcol_k), grad_of(need_col_e, "bias_col_e", bias_col_e, b.dcol_e)};
  if (!needs) return g;
  if (p.B > 0 && p.H > 0 && p.Nq > 0 && p.Nk > 0) run(b);
  else std::apply([](auto&... t) { (torch::stable::zero_(t), ...); }, g);
  return g;
}

}  // namespace fastpe::binding
