// The CUDA kernels on the emulator as torch.ops.fastpe_emu.*, for CPU tensors, with the schemas of torch.ops.fastpe.
// Only for tests.
#include "binding/ops_device.h"

#include <atomic>

namespace fastpe::binding {
namespace {

// Tiles visited and tiles skipped under the bound, since they were last asked for.
std::atomic<int64_t> g_visited{0}, g_decayed{0};

class EmuQueue {
 public:
  explicit EmuQueue(const Tensor&) {}
  void* stream() const { return nullptr; }
  uint32_t* tile_counts(const Tensor& lead, int64_t blocks) {
    blocks_ = blocks;
    counts_ = empty(lead, {blocks, 2}, ScalarType::Int);
    return static_cast<uint32_t*>(counts_->mutable_data_ptr());
  }
  void count_tiles() {
    const auto* n = static_cast<const uint32_t*>(counts_->const_data_ptr());
    for (int64_t i = 0; i < blocks_; ++i) g_visited += n[2 * i], g_decayed += n[2 * i + 1];
  }

 private:
  int64_t blocks_ = 0;
  OptTensor counts_;
};

std::tuple<int64_t, int64_t> tile_counts() { return {g_visited.exchange(0), g_decayed.exchange(0)}; }

}  // namespace
}  // namespace fastpe::binding

STABLE_TORCH_LIBRARY(fastpe_emu, m) {
  m.def("attn_fwd(Tensor q, Tensor k, Tensor v, " FASTPE_ATTN_ARGS ", bool keep_residual) -> (Tensor out, Tensor lse, Tensor residual)");
  m.def(
      "attn_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? residual, " FASTPE_ATTN_ARGS
      ", int needs) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dparams, Tensor dgamma, Tensor du, Tensor dw, Tensor dtable, "
      "Tensor drow_scale, Tensor dpieces, Tensor domega, Tensor drows, Tensor dcols, Tensor ddense, Tensor dfactor, Tensor dpairs, Tensor drow_q, "
      "Tensor drow_e, Tensor dcol_k, Tensor dcol_e)");
  m.def("attn_decode(Tensor q, Tensor k, Tensor v, " FASTPE_ATTN_ARGS ", Tensor? pages, Tensor? lengths, Tensor? list, Tensor? turn, Tensor[] k_more) -> (Tensor out, Tensor lse)");
  m.def(
      "landmark_fwd(Tensor q, Tensor k, Tensor v, Tensor is_landmark, Tensor? visible, Tensor? q_rope, Tensor? k_rope, "
      "int rope_layout, float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "landmark_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor is_landmark, "
      "Tensor? visible, Tensor? q_rope, Tensor? k_rope, int rope_layout, float scale, int needs) -> "
      "(Tensor dq, Tensor dk, Tensor dv)");
  m.def("attn_mass(Tensor q, Tensor k, Tensor lse, Tensor? weights, " FASTPE_ATTN_ARGS ") -> Tensor");
  m.def("attn_rows(Tensor q, Tensor k, Tensor? lse, int rows, bool logits, " FASTPE_ATTN_ARGS ") -> Tensor");
  m.def(
      "cope_fwd(Tensor q, Tensor k, Tensor v, " FASTPE_COPE_ARGS
      ", bool training) -> (Tensor out, Tensor lse, Tensor carry, Tensor residual)");
  m.def(
      "cope_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor carry, "
      "Tensor? residual, " FASTPE_COPE_ARGS
      ", int needs) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dgate_q, Tensor dgate_k, Tensor dtable)");
  m.def("merge_fwd(Tensor[] outs, Tensor[] lses, float[] factors) -> (Tensor out, Tensor lse)");
  m.def(
      "merge_bwd(Tensor? dout, Tensor? dlse, Tensor[] outs, Tensor[] lses, float[] factors, int needs) -> "
      "(Tensor[] douts, Tensor dlses)");
  m.def("rope_table(Tensor positions, Tensor inv_freq, float amplitude, bool float32_product, bool out_f64) -> Tensor");
  m.def("rotate(Tensor x, Tensor table, int layout, bool inverse) -> Tensor");
  m.def("rotate_(Tensor(a!) x, Tensor table, int layout, bool inverse) -> ()");
  m.def("rotate_pair(Tensor q, Tensor k, Tensor q_table, Tensor k_table, int layout, bool inverse) -> (Tensor, Tensor)");
  m.def("rotate_pair_(Tensor(a!) q, Tensor(b!) k, Tensor q_table, Tensor k_table, int layout, bool inverse) -> ()");
  m.def("prefix_sum(Tensor x, bool reverse) -> (Tensor local, Tensor base)");
  m.def("cumsum_exact(Tensor x, bool reverse) -> Tensor");
  m.def("tile_counts() -> (int visited, int decayed)");
}
STABLE_TORCH_LIBRARY_IMPL(fastpe_emu, CPU, m) { fastpe::binding::implement_device_ops<fastpe::binding::EmuQueue>(m); }
STABLE_TORCH_LIBRARY_IMPL(fastpe_emu, CompositeExplicitAutograd, m) { m.impl("tile_counts", TORCH_BOX(&fastpe::binding::tile_counts)); }
