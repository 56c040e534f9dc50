// CPU implementations of attention with contextual positions.
#include <torch/csrc/stable/library.h>

#include "cope.h"
#include "runtime.h"

namespace fastpe::binding {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> cope_fwd(Tensor q, Tensor k, Tensor v, FASTPE_COPE_PARAMS, bool training) {
  return cope_fwd_on(q, k, v, FASTPE_COPE_VALUES, training, [](const CopeParams& c) {
    Stats stats;
    cpu::kernels().cope_fwd(c, runtime(), stats.get());
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cope_bwd(
    Tensor dout, OptTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor carry, OptTensor residual, FASTPE_COPE_PARAMS,
    int64_t needs) {
  return cope_bwd_on(dout, dlse, q, k, v, out, lse, carry, residual, FASTPE_COPE_VALUES, needs, [](const CopeBwdParams& b) {
    Stats stats;
    cpu::kernels().cope_bwd(b, runtime(), stats.get());
  });
}

}  // namespace
}  // namespace fastpe::binding

STABLE_TORCH_LIBRARY_IMPL(fastpe, CPU, m) {
  using namespace fastpe::binding;
  m.impl("cope_fwd", TORCH_BOX(&cope_fwd));
  m.impl("cope_bwd", TORCH_BOX(&cope_bwd));
}
