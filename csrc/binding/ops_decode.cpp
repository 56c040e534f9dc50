// CPU implementation of attention over pages and lists of keys.
#include <torch/csrc/stable/library.h>

#include "decode.h"
#include "runtime.h"

namespace fastpe::binding {
namespace {

std::tuple<Tensor, Tensor> attn_decode(Tensor q, Tensor k, Tensor v, FASTPE_ATTN_PARAMS, OptTensor pages, OptTensor lengths, OptTensor list, OptTensor turn, std::vector<Tensor> more) {
  return attn_decode_on(q, k, v, FASTPE_ATTN_VALUES, pages, lengths, list, turn, more, true, [](const DecodeParams& d, int64_t) {
    Stats stats;
    cpu::kernels().attn_decode(d, runtime(), stats.get());
  });
}

}  // namespace
}  // namespace fastpe::binding

STABLE_TORCH_LIBRARY_IMPL(fastpe, CPU, m) { m.impl("attn_decode", TORCH_BOX(&fastpe::binding::attn_decode)); }
