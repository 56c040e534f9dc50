// The CUDA kernels on the emulator as torch.ops.fastpe_emu.*, for CPU tensors, with the schemas of torch.ops.fastpe.
// Only for tests.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <tuple>

#include "binding/args.h"
#include "cuda/launch.h"

namespace fastpe::binding {
namespace {

#define FASTPE_ATTN_PARAMS \
  OptTensor q_rope, OptTensor k_rope, int64_t rope_layout, int64_t bias_form, OptTensor bias_params, OptTensor bias_gamma, \
      OptTensor bias_u, OptTensor bias_w, OptTensor bias_base, OptTensor bias_table, int64_t left, int64_t right, \
      int64_t sinks, OptTensor q_ids, OptTensor k_ids, OptTensor mask, OptTensor row_scale, OptTensor sink, double scale, \
      double softcap, double softcap_mul, double skip_eps
#define FASTPE_ATTN_VALUES \
  q_rope, k_rope, rope_layout, bias_form, bias_params, bias_gamma, bias_u, bias_w, bias_base, bias_table, left, right, \
      sinks, q_ids, k_ids, mask, row_scale, sink, scale, softcap, softcap_mul, skip_eps

// Tiles visited and tiles skipped under the bound, since they were last asked for.
std::atomic<int64_t> g_visited{0}, g_decayed{0};

std::tuple<Tensor, Tensor, Tensor> attn_fwd(Tensor q, Tensor k, Tensor v, FASTPE_ATTN_PARAMS, bool keep_residual) {
  const AttnArgs a{q, k, v, FASTPE_ATTN_VALUES};
  AttnParams p = read_attn("attn_fwd", a);
  check("attn_fwd", cuda::supported(p.dtype), "the kernels take bfloat16 and float16, got ", dtype_name(q.scalar_type()));
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

std::tuple<int64_t, int64_t> tile_counts() { return {g_visited.exchange(0), g_decayed.exchange(0)}; }

}  // namespace
}  // namespace fastpe::binding

#define FASTPE_ATTN_ARGS \
  "Tensor? q_rope, Tensor? k_rope, int rope_layout, int bias_form, Tensor? bias_params, Tensor? bias_gamma, " \
  "Tensor? bias_u, Tensor? bias_w, Tensor? bias_base, Tensor? bias_table, int left, int right, int sinks, " \
  "Tensor? q_ids, Tensor? k_ids, Tensor? mask, Tensor? row_scale, Tensor? sink, float scale, float softcap, " \
  "float softcap_mul, float skip_eps"

STABLE_TORCH_LIBRARY(fastpe_emu, m) {
  m.def("attn_fwd(Tensor q, Tensor k, Tensor v, " FASTPE_ATTN_ARGS ", bool keep_residual) -> (Tensor out, Tensor lse, Tensor residual)");
  m.def("tile_counts() -> (int visited, int decayed)");
}
STABLE_TORCH_LIBRARY_IMPL(fastpe_emu, CPU, m) { m.impl("attn_fwd", TORCH_BOX(&fastpe::binding::attn_fwd)); }
STABLE_TORCH_LIBRARY_IMPL(fastpe_emu, CompositeExplicitAutograd, m) { m.impl("tile_counts", TORCH_BOX(&fastpe::binding::tile_counts)); }
