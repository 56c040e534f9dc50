// The CUDA kernels on the emulator as torch.ops.fastpe_emu.*, for CPU tensors, with the schemas of torch.ops.fastpe.
// Only for tests.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <tuple>
#include <vector>

#include "binding/args.h"
#include "cuda/launch.h"

namespace fastpe::binding {
namespace {

// Tiles visited and tiles skipped under the bound, since they were last asked for.
std::atomic<int64_t> g_visited{0}, g_decayed{0};

std::tuple<Tensor, Tensor, Tensor> attn_fwd(Tensor q, Tensor k, Tensor v, FASTPE_ATTN_PARAMS, bool keep_residual) {
  const AttnArgs a{q, k, v, FASTPE_ATTN_VALUES};
  AttnParams p = read_attn("attn_fwd", a);
  check("attn_fwd", cuda::supported(p.dtype), "the kernels take bfloat16 and float16, got ", dtype_name(q.scalar_type()));
  check("attn_fwd", !pos::has_terms(p.bias) && p.bias.form != BiasForm::two_sided && !p.softcap_bias, "the CUDA kernels do not have this bias yet; bias_form is ", a.bias_form);
  Tensor out = empty_in_order(q, p.B, p.H, p.Nq, p.Dv);
  Tensor lse = empty(q, {p.B, p.H, p.Nq}, aux_type(p.dtype));
  Tensor residual = keep_residual ? empty_in_order(q, p.B, p.H, p.Nq, p.Dv) : none(q, q.scalar_type());
  if (lse.numel() == 0) return {out, lse, residual};
  p.o = view(out, out.mutable_data_ptr());
  p.lse = lse.mutable_data_ptr();
  if (keep_residual) p.residual = view(residual, residual.mutable_data_ptr());
  Tensor workspace = empty(q, {int64_t(cuda::attn_fwd_workspace(p)) + 256}, ScalarType::Byte);
  char* base = static_cast<char*>(workspace.mutable_data_ptr());
  base += (256 - reinterpret_cast<uintptr_t>(base) % 256) % 256;
  const int64_t blocks = cuda::attn_fwd_blocks(p);
  Tensor stats = empty(q, {blocks, 2}, ScalarType::Int);
  auto* counts = static_cast<int32_t*>(stats.mutable_data_ptr());
  const int rc = cuda::attn_fwd(p, base, nullptr, reinterpret_cast<uint32_t*>(counts));
  check("attn_fwd", rc == 0, "the kernel could not be started (error ", rc, ")");
  for (int64_t i = 0; i < blocks; ++i) g_visited += counts[2 * i], g_decayed += counts[2 * i + 1];
  return {out, lse, residual};
}

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
Grads attn_bwd(
    Tensor dout, OptTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, OptTensor residual, FASTPE_ATTN_PARAMS,
    int64_t needs) {
  const char* op = "attn_bwd";
  const AttnArgs a{q, k, v, FASTPE_ATTN_VALUES};
  AttnBwdParams b;
  b.fwd = read_attn(op, a);
  AttnParams& p = b.fwd;
  check(op, cuda::supported(p.dtype), "the kernels take bfloat16 and float16, got ", dtype_name(q.scalar_type()));
  check(op, !(needs & ~cuda::kSupportedNeeds), "these kernels have no gradient of a bias table");
  check(op, !pos::has_terms(p.bias) && p.bias.form != BiasForm::two_sided && !p.softcap_bias, "the CUDA kernels do not have this bias yet; bias_form is ", a.bias_form);
  check(op, !beyond_bands(p), "the CUDA kernels do not have regions, intervals, segments or block maps yet");
  const Call c{op, q};
  const ScalarType type = q.scalar_type(), aux = aux_type(p.dtype);
  // Copies live until the kernels have run.
  const Tensor d_o = torch::stable::contiguous(dout), lse_c = torch::stable::contiguous(lse);
  b.d_o = read_view(c, "dout", d_o);
  p.o = read_view(c, "out", out);
  if (residual) p.residual = read_view(c, "residual", *residual);
  p.lse = read_ptr(lse_c);
  OptTensor dlse_c;
  if (dlse) {
    dlse_c = torch::stable::contiguous(*dlse);
    b.dlse = dlse_c->const_data_ptr();
  }
  b.needs = needs;
  const auto like = [&](Needs bit, const Tensor& x, View& g) {
    if (!(needs & bit)) return none(q, type);
    Tensor t = empty_in_order(x, x.size(0), x.size(1), x.size(2), x.size(3));
    g = view(t, t.mutable_data_ptr());
    return t;
  };
  const auto grad_of = [&](Needs bit, const OptTensor& x, void*& g) {
    if (!(needs & bit)) return none(q, aux);
    std::vector<int64_t> shape(x->sizes().begin(), x->sizes().end());
    Tensor t = torch::stable::new_empty(*x, shape, aux);
    g = t.mutable_data_ptr();
    return t;
  };
  Tensor dq = like(need_q, q, b.dq), dk = like(need_k, k, b.dk), dv = like(need_v, v, b.dv);
  Tensor dparams = grad_of(need_params, bias_params, b.dparams), dgamma = grad_of(need_gamma, bias_gamma, b.dgamma);
  Tensor du = grad_of(need_u, bias_u, b.du), dw = grad_of(need_w, bias_w, b.dw), drow_scale = grad_of(need_row_scale, row_scale, b.drow_scale);
  Tensor workspace = empty(q, {int64_t(cuda::attn_bwd_workspace(b)) + 256}, ScalarType::Byte);
  char* base = static_cast<char*>(workspace.mutable_data_ptr());
  base += (256 - reinterpret_cast<uintptr_t>(base) % 256) % 256;
  const int rc = cuda::attn_bwd(b, base, nullptr);
  check(op, rc == 0, "a kernel could not be started (error ", rc, ")");
  const auto absent = [&] { return none(q, aux); };
  return {dq, dk, dv, dparams, dgamma, du, dw, absent(), drow_scale, absent(), absent(), absent(), absent(), absent(), absent(), absent()};
}

Tensor rotate(Tensor x, Tensor table, int64_t layout, bool inverse) {
  RotateParams p = read_rotate("rotate", "x", x, "table", table, layout, inverse);
  check("rotate", p.dtype != DType::f64, "the kernels take float32, bfloat16 and float16, got float64");
  Tensor y = empty_in_order(x, p.B, p.H, p.N, p.D);
  p.y = view(y, y.mutable_data_ptr());
  cuda::rotate(p, nullptr);
  return y;
}

void rotate_(Tensor x, Tensor table, int64_t layout, bool inverse) {
  RotateParams p = read_rotate("rotate_", "x", x, "table", table, layout, inverse);
  check("rotate_", p.dtype != DType::f64, "the kernels take float32, bfloat16 and float16, got float64");
  check_writable("rotate_", "x", x);
  p.x.p = x.mutable_data_ptr();
  p.y = p.x;
  cuda::rotate(p, nullptr);
}

Tensor rope_table(Tensor positions, Tensor inv_freq, double amplitude, bool float32_product, bool out_f64) {
  const Call c{"rope_table", positions};
  check_dtype(c, "positions", positions, ScalarType::Double);
  check_dtype(c, "inv_freq", inv_freq, ScalarType::Double);
  const Tensor x = torch::stable::contiguous(positions), w = torch::stable::contiguous(inv_freq);
  RopeTableParams p;
  p.out_f64 = out_f64;
  p.A = x.size(0), p.B = x.size(1), p.N = x.size(2), p.H = w.size(1), p.J = w.size(2);
  p.positions = static_cast<const double*>(x.const_data_ptr());
  p.inv_freq = static_cast<const double*>(w.const_data_ptr());
  p.float32_product = float32_product;
  p.amplitude = amplitude;
  Tensor table = empty(positions, {2, p.B, p.H, p.N, p.J}, out_f64 ? ScalarType::Double : ScalarType::Float);
  p.cos = table.mutable_data_ptr();
  p.sin = offset(p.cos, table.stride(0), table);
  cuda::rope_table(p, nullptr);
  return table;
}

// Rows along the last axis; base: null for the plain sum.
Tensor run_prefix(const Tensor& x, bool reverse, Tensor* base) {
  const Tensor xc = torch::stable::contiguous(x);
  const ScalarType t = xc.scalar_type();
  check("prefix_sum", t == ScalarType::Float || t == ScalarType::Double, "x must be float32 or float64, got ", dtype_name(t));
  PrefixParams p;
  p.f64 = t == ScalarType::Double;
  p.N = xc.size(xc.dim() - 1);
  p.rows = p.N ? xc.numel() / p.N : 0;
  p.x = xc.const_data_ptr();
  p.reverse = reverse;
  std::vector<int64_t> shape(xc.sizes().begin(), xc.sizes().end());
  Tensor y = torch::stable::new_empty(xc, shape, t);
  p.local = y.mutable_data_ptr();
  if (base) {
    shape.back() = (p.N + kPrefixBlock - 1) / kPrefixBlock;
    *base = torch::stable::new_empty(xc, shape, ScalarType::Double);
    p.base = static_cast<double*>(base->mutable_data_ptr());
  }
  cuda::prefix_sum(p, nullptr);
  return y;
}

std::tuple<Tensor, Tensor> prefix_sum(Tensor x, bool reverse) {
  Tensor base;
  Tensor local = run_prefix(x, reverse, &base);
  return {local, base};
}
Tensor cumsum_exact(Tensor x, bool reverse) { return run_prefix(x, reverse, nullptr); }

std::tuple<int64_t, int64_t> tile_counts() { return {g_visited.exchange(0), g_decayed.exchange(0)}; }

}  // namespace
}  // namespace fastpe::binding

STABLE_TORCH_LIBRARY(fastpe_emu, m) {
  m.def("attn_fwd(Tensor q, Tensor k, Tensor v, " FASTPE_ATTN_ARGS ", bool keep_residual) -> (Tensor out, Tensor lse, Tensor residual)");
  m.def(
      "attn_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? residual, " FASTPE_ATTN_ARGS
      ", int needs) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dparams, Tensor dgamma, Tensor du, Tensor dw, Tensor dtable, "
      "Tensor drow_scale, Tensor dpieces, Tensor domega, Tensor drows, Tensor dcols, Tensor ddense, Tensor dfactor, Tensor dpairs)");
  m.def("rope_table(Tensor positions, Tensor inv_freq, float amplitude, bool float32_product, bool out_f64) -> Tensor");
  m.def("rotate(Tensor x, Tensor table, int layout, bool inverse) -> Tensor");
  m.def("rotate_(Tensor(a!) x, Tensor table, int layout, bool inverse) -> ()");
  m.def("prefix_sum(Tensor x, bool reverse) -> (Tensor local, Tensor base)");
  m.def("cumsum_exact(Tensor x, bool reverse) -> Tensor");
  m.def("tile_counts() -> (int visited, int decayed)");
}
STABLE_TORCH_LIBRARY_IMPL(fastpe_emu, CPU, m) {
  using namespace fastpe::binding;
  m.impl("attn_fwd", TORCH_BOX(&attn_fwd));
  m.impl("attn_bwd", TORCH_BOX(&attn_bwd));
  m.impl("rope_table", TORCH_BOX(&fastpe::binding::rope_table));
  m.impl("rotate", TORCH_BOX(&rotate));
  m.impl("rotate_", TORCH_BOX(&rotate_));
  m.impl("prefix_sum", TORCH_BOX(&prefix_sum));
  m.impl("cumsum_exact", TORCH_BOX(&cumsum_exact));
}
STABLE_TORCH_LIBRARY_IMPL(fastpe_emu, CompositeExplicitAutograd, m) { m.impl("tile_counts", TORCH_BOX(&fastpe::binding::tile_counts)); }
