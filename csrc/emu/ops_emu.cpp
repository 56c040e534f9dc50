// The CUDA kernels on the emulator as torch.ops.fastpe_emu.*, for CPU tensors, with the schemas of torch.ops.fastpe.
// Only for tests.
#include "binding/ops_device.h"
#include "binding/schema.h"

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
  fastpe::binding::define_ops(m);
  m.def("tile_counts() -> (int visited, int decayed)");
}
STABLE_TORCH_LIBRARY_IMPL(fastpe_emu, CPU, m) { fastpe::binding::implement_device_ops<fastpe::binding::EmuQueue>(m); }
STABLE_TORCH_LIBRARY_IMPL(fastpe_emu, CompositeExplicitAutograd, m) { m.impl("tile_counts", TORCH_BOX(&fastpe::binding::tile_counts)); }
