// CPU implementations of merging partial attentions.
#include <torch/csrc/stable/library.h>

#include "merge.h"
#include "runtime.h"

namespace fastpe::binding {
namespace {

std::tuple<Tensor, Tensor> merge_fwd(Parts outs, Parts lses, std::vector<double> factors) {
  return merge_fwd_on(outs, lses, factors, [](const MergeParams& p) { cpu::kernels().merge_fwd(p, runtime()); });
}

std::tuple<Parts, Tensor> merge_bwd(OptTensor dout, OptTensor dlse, Parts outs, Parts lses, std::vector<double> factors, int64_t needs) {
  return merge_bwd_on(dout, dlse, outs, lses, factors, needs, [](const MergeBwdParams& b) { cpu::kernels().merge_bwd(b, runtime()); });
}

}  // namespace
}  // namespace fastpe::binding

STABLE_TORCH_LIBRARY_IMPL(fastpe, CPU, m) {
  using namespace fastpe::binding;
  m.impl("merge_fwd", TORCH_BOX(&merge_fwd));
  m.impl("merge_bwd", TORCH_BOX(&merge_bwd));
}
