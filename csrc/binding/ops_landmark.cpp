// CPU implementations of landmark attention.
#include <torch/csrc/stable/library.h>

#include "landmark.h"
#include "runtime.h"

namespace fastpe::binding {
namespace {

std::tuple<Tensor, Tensor> landmark_fwd(Tensor q, Tensor k, Tensor v, FASTPE_LANDMARK_PARAMS) {
  return landmark_fwd_on(q, k, v, FASTPE_LANDMARK_VALUES, [](const LandmarkParams& p) { cpu::kernels().landmark_fwd(p, runtime()); });
}

std::tuple<Tensor, Tensor, Tensor> landmark_bwd(
    Tensor dout, OptTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, FASTPE_LANDMARK_PARAMS, int64_t needs) {
  return landmark_bwd_on(dout, dlse, q, k, v, out, lse, FASTPE_LANDMARK_VALUES, needs, [](const LandmarkBwdParams& b) { cpu::kernels().landmark_bwd(b, runtime()); });
}

}  // namespace
}  // namespace fastpe::binding

STABLE_TORCH_LIBRARY_IMPL(fastpe, CPU, m) {
  using namespace fastpe::binding;
  m.impl("landmark_fwd", TORCH_BOX(&landmark_fwd));
  m.impl("landmark_bwd", TORCH_BOX(&landmark_bwd));
}
