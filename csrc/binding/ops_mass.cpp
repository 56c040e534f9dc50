// CPU implementations of attention mass and rows of probabilities.
#include <torch/csrc/stable/library.h>

#include "mass.h"
#include "runtime.h"

namespace fastpe::binding {
namespace {

void run(const MassParams& p) { cpu::kernels().attn_mass(p, runtime()); }

Tensor attn_mass(Tensor q, Tensor k, Tensor lse, OptTensor weights, FASTPE_ATTN_PARAMS) {
  return attn_mass_on(q, k, lse, weights, FASTPE_ATTN_VALUES, run);
}

Tensor attn_rows(Tensor q, Tensor k, OptTensor lse, int64_t rows, bool logits, FASTPE_ATTN_PARAMS) {
  return attn_rows_on(q, k, lse, rows, logits, FASTPE_ATTN_VALUES, run);
}

}  // namespace
}  // namespace fastpe::binding

STABLE_TORCH_LIBRARY_IMPL(fastpe, CPU, m) {
  using namespace fastpe::binding;
  m.impl("attn_mass", TORCH_BOX(&attn_mass));
  m.impl("attn_rows", TORCH_BOX(&attn_rows));
}
