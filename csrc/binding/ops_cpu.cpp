// CPU implementations: check, allocate, fill, call.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "args.h"
#include "core/tiles.h"
#include "runtime.h"

namespace fastpe::binding {
namespace {

// ---- attention --------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> attn_fwd(Tensor q, Tensor k, Tensor v, FASTPE_ATTN_PARAMS, bool keep_residual) {
  const AttnArgs a{q, k, v, FASTPE_ATTN_VALUES};
  AttnParams p = read_attn("attn_fwd", a);
  Tensor out = empty_in_order(q, p.B, p.H, p.Nq, p.Dv);
  Tensor lse = empty(q, {p.B, p.H, p.Nq}, aux_type(p.dtype));
  keep_residual = keep_residual && (p.dtype == DType::bf16 || p.dtype == DType::f16);
  Tensor residual = keep_residual ? empty_in_order(q, p.B, p.H, p.Nq, p.Dv) : none(q, q.scalar_type());
  if (lse.numel() > 0) {
    if (keep_residual) p.residual = view(residual, residual.mutable_data_ptr());
    p.o = view(out, out.mutable_data_ptr());
    p.lse = lse.mutable_data_ptr();
    Stats stats;
    if (p.Nq <= tiles::kFewQueries && pos::decode_takes(p.bias)) {
      DecodeParams d;
      d.attn = p;
      cpu::kernels().attn_decode(d, runtime(), stats.get());
    } else {
      cpu::kernels().attn_fwd(p, runtime(), stats.get());
    }
  }
  return {out, lse, residual};
}

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
Grads attn_bwd(
    Tensor dout, OptTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, OptTensor residual, FASTPE_ATTN_PARAMS,
    int64_t needs) {
  const char* op = "attn_bwd";
  const AttnArgs a{q, k, v, FASTPE_ATTN_VALUES};
  AttnBwdParams b;
  b.fwd = read_attn(op, a);
  AttnParams& p = b.fwd;
  const Call c{op, q};
  const ScalarType type = q.scalar_type(), aux = aux_type(p.dtype);

  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"dout", dout}, {"out", out}}) {
    check_device(c, name, t);
    check_dtype(c, name, t, type);
    check_shape(c, name, t, {{p.B}, {p.H}, {p.Nq}, {p.Dv}});
  }
  // Autograd hands over gradients in any layout, expanded ones among them.
  const Tensor d_o = dout.stride(3) == 1 ? dout : torch::stable::contiguous(dout);
  b.d_o = read_view(c, "dout", d_o);
  p.o = read_view(c, "out", out);
  if (residual) {
    check_device(c, "residual", *residual);
    check_dtype(c, "residual", *residual, type);
    check_shape(c, "residual", *residual, {{p.B}, {p.H}, {p.Nq}, {p.Dv}});
    p.residual = read_view(c, "residual", *residual);
  }
  check_device(c, "lse", lse);
  check_dtype(c, "lse", lse, aux);
  check_shape(c, "lse", lse, {{p.B}, {p.H}, {p.Nq}});
  const Tensor lse_c = torch::stable::contiguous(lse);
  p.lse = read_ptr(lse_c);
  OptTensor dlse_c;
  if (dlse) {
    check_device(c, "dlse", *dlse);
    check_dtype(c, "dlse", *dlse, aux);
    check_shape(c, "dlse", *dlse, {{p.B}, {p.H}, {p.Nq}});
    dlse_c = torch::stable::contiguous(*dlse);
    b.dlse = dlse_c->const_data_ptr();
  }

  b.needs = needs;
  const auto grad_in_order = [&](Needs bit, const Tensor& x, View& g) {
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
  Tensor dq = grad_in_order(need_q, q, b.dq);
  Tensor dk = grad_in_order(need_k, k, b.dk);
  Tensor dv = grad_in_order(need_v, v, b.dv);
  Tensor dparams = grad_of(need_params, "bias_params", bias_params, b.dparams);
  Tensor dgamma = grad_of(need_gamma, "bias_gamma", bias_gamma, b.dgamma);
  Tensor du = grad_of(need_u, "bias_u", bias_u, b.du);
  Tensor dw = grad_of(need_w, "bias_w", bias_w, b.dw);
  Tensor dtable = grad_of(need_table, "bias_table", bias_table, b.dtable);
  Tensor drow_scale = grad_of(need_row_scale, "row_scale", row_scale, b.drow_scale);
  Tensor dpieces = grad_of(need_pieces, "bias_pieces", bias_pieces, b.dpieces);
  Tensor domega = grad_of(need_omega, "bias_omega", bias_omega, b.domega);
  Tensor drows = grad_of(need_rows, "bias_rows", bias_rows, b.drows);
  Tensor dcols = grad_of(need_cols, "bias_cols", bias_cols, b.dcols);
  Tensor ddense = grad_of(need_dense, "bias_dense", bias_dense, b.ddense);
  Tensor dfactor = grad_of(need_factor, "bias_factor", bias_factor, b.dfactor);
  Tensor dpairs = grad_of(need_pairs, "bias_pairs", bias_pairs, b.dpairs);
  Tensor drow_q = grad_of(need_row_q, "bias_row_q", bias_row_q, b.drow_q);
  Tensor drow_e = grad_of(need_row_e, "bias_row_e", bias_row_e, b.drow_e);
  Tensor dcol_k = grad_of(need_col_k, "bias_col_k", bias_col_k, b.dcol_k);
  Tensor dcol_e = grad_of(need_col_e, "bias_col_e", bias_col_e, b.dcol_e);

  if (p.B > 0 && p.H > 0 && p.Nq > 0 && p.Nk > 0) {
    if (needs) {
      Stats stats;
      cpu::kernels().attn_bwd(b, runtime(), stats.get());
    }
  } else {
    for (Tensor* t : {&dq, &dk, &dv, &dparams, &dgamma, &du, &dw, &dtable, &drow_scale, &dpieces, &domega, &drows, &dcols, &ddense, &dfactor, &dpairs, &drow_q, &drow_e, &dcol_k, &dcol_e}) torch::stable::zero_(*t);
  }
  return {dq, dk, dv, dparams, dgamma, du, dw, dtable, drow_scale, dpieces, domega, drows, dcols, ddense, dfactor, dpairs, drow_q, drow_e, dcol_k, dcol_e};
}

// ---- rotation ---------------------------------------------------------------------------------------------------

Tensor rope_table(Tensor positions, Tensor inv_freq, double amplitude, bool float32_product, bool out_f64) {
  const Tensor x = torch::stable::contiguous(positions), w = torch::stable::contiguous(inv_freq);
  RopeTableParams p = read_rope_table("rope_table", x, w, amplitude, float32_product, out_f64);
  Tensor table = empty(positions, {2, p.B, p.H, p.N, p.J}, out_f64 ? ScalarType::Double : ScalarType::Float);
  if (table.numel() > 0) {
    p.cos = table.mutable_data_ptr();
    p.sin = offset(p.cos, table.stride(0), table);
    cpu::kernels().rope_table(p, runtime());
  }
  return table;
}

void run_rotate(const RotateParams* p, int count) {
  RotateParams some[2];
  int n = 0;
  for (int i = 0; i < count; ++i)
    if (p[i].B > 0 && p[i].H > 0 && p[i].N > 0 && p[i].D > 0) some[n++] = p[i];
  if (n) cpu::kernels().rotate(some, n, runtime());
}

// x in its own order, written to a new tensor.
RotateParams to_new(RotateParams p, const Tensor& y) {
  p.y = view(y, y.mutable_data_ptr());
  return p;
}
RotateParams in_place(RotateParams p, const Tensor& x) {
  p.x.p = x.mutable_data_ptr();
  p.y = p.x;
  return p;
}

Tensor rotate(Tensor x, Tensor table, int64_t layout, bool inverse) {
  const RotateParams p = read_rotate("rotate", "x", x, "table", table, layout, inverse);
  Tensor y = empty_in_order(x, p.B, p.H, p.N, p.D);
  const RotateParams r = to_new(p, y);
  run_rotate(&r, 1);
  return y;
}

void rotate_(Tensor x, Tensor table, int64_t layout, bool inverse) {
  const RotateParams p = read_rotate("rotate_", "x", x, "table", table, layout, inverse);
  check_writable("rotate_", "x", x);
  const RotateParams r = in_place(p, x);
  run_rotate(&r, 1);
}

std::tuple<Tensor, Tensor> rotate_pair(Tensor q, Tensor k, Tensor q_table, Tensor k_table, int64_t layout, bool inverse) {
  const char* op = "rotate_pair";
  const RotateParams pq = read_rotate(op, "q", q, "q_table", q_table, layout, inverse);
  const RotateParams pk = read_rotate(op, "k", k, "k_table", k_table, layout, inverse);
  Tensor yq = empty_in_order(q, pq.B, pq.H, pq.N, pq.D);
  Tensor yk = empty_in_order(k, pk.B, pk.H, pk.N, pk.D);
  const RotateParams both[2] = {to_new(pq, yq), to_new(pk, yk)};
  run_rotate(both, 2);
  return {yq, yk};
}

void rotate_pair_(Tensor q, Tensor k, Tensor q_table, Tensor k_table, int64_t layout, bool inverse) {
  const char* op = "rotate_pair_";
  const RotateParams pq = read_rotate(op, "q", q, "q_table", q_table, layout, inverse);
  const RotateParams pk = read_rotate(op, "k", k, "k_table", k_table, layout, inverse);
  check_writable(op, "q", q);
  check_writable(op, "k", k);
  const RotateParams both[2] = {in_place(pq, q), in_place(pk, k)};
  run_rotate(both, 2);
}

// ---- sums along the sequence ------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> prefix_sum(Tensor x, bool reverse) {
  const Tensor xc = torch::stable::contiguous(x);
  PrefixParams p = read_prefix("prefix_sum", xc, reverse);
  Tensor local = empty_contiguous(xc);
  std::vector<int64_t> shape(xc.sizes().begin(), xc.sizes().end());
  shape.back() = (p.N + kPrefixBlock - 1) / kPrefixBlock;
  Tensor base = torch::stable::new_empty(xc, shape, ScalarType::Double);
  if (local.numel() > 0) {
    p.local = local.mutable_data_ptr();
    p.base = static_cast<double*>(base.mutable_data_ptr());
    cpu::kernels().prefix_sum(p, runtime());
  }
  return {local, base};
}

Tensor cumsum_exact(Tensor x, bool reverse) {
  const Tensor xc = torch::stable::contiguous(x);
  PrefixParams p = read_prefix("cumsum_exact", xc, reverse);
  Tensor y = empty_contiguous(xc);
  if (y.numel() > 0) {
    p.local = y.mutable_data_ptr();
    cpu::kernels().prefix_sum(p, runtime());
  }
  return y;
}

}  // namespace
}  // namespace fastpe::binding

STABLE_TORCH_LIBRARY_IMPL(fastpe, CPU, m) {
  using namespace fastpe::binding;
  m.impl("attn_fwd", TORCH_BOX(&attn_fwd));
  m.impl("attn_bwd", TORCH_BOX(&attn_bwd));
  m.impl("rope_table", TORCH_BOX(&rope_table));
  m.impl("rotate", TORCH_BOX(&rotate));
  m.impl("rotate_", TORCH_BOX(&rotate_));
  m.impl("rotate_pair", TORCH_BOX(&rotate_pair));
  m.impl("rotate_pair_", TORCH_BOX(&rotate_pair_));
  m.impl("prefix_sum", TORCH_BOX(&prefix_sum));
  m.impl("cumsum_exact", TORCH_BOX(&cumsum_exact));
}
