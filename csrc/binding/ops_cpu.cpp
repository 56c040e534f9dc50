// CPU implementations: check, allocate, fill, call.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "args.h"
#include "attn_bwd.h"
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

AttnGrads attn_bwd(
    Tensor dout, OptTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, OptTensor residual, FASTPE_ATTN_PARAMS,
    int64_t needs) {
  return attn_bwd_on(dout, dlse, q, k, v, out, lse, residual, FASTPE_ATTN_VALUES, needs, [](const AttnBwdParams& b) {
    Stats stats;
    cpu::kernels().attn_bwd(b, runtime(), stats.get());
  });
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
