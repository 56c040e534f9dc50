// The ops on NVIDIA GPUs: torch's current stream of the tensors' device, torch's allocator, no wait for the device.
//
// The only symbol used beyond torch's stable C++ interface is aoti_torch_get_current_cuda_stream, which is part of its
// stable C interface but exists in a torch built with CUDA alone: this library is loaded only there (python/fastpe/_load.py).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "ops_device.h"

namespace fastpe::binding {
namespace {

class GpuQueue {
 public:
  explicit GpuQueue(const Tensor& lead) : guard_(lead.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(lead.get_device_index(), &stream_));
    const int capability = cuda::device_capability();
    check("device", capability >= 80, "the CUDA kernels need compute capability 8.0 or newer, this GPU has ", capability / 10, ".", capability % 10);
  }
  void* stream() const { return stream_; }
  uint32_t* tile_counts(const Tensor&, int64_t) { return nullptr; }
  void count_tiles() {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace
}  // namespace fastpe::binding

STABLE_TORCH_LIBRARY_IMPL(fastpe, CUDA, m) { fastpe::binding::implement_device_ops<fastpe::binding::GpuQueue>(m); }
