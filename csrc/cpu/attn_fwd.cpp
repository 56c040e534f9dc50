// Forward attention: the entry point of one instruction set.
#include "attn_fwd.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

template <class E>
void forward(const AttnParams& p, const Runtime& rt, TileStats* stats) {
  Forward<E>(p, rt, stats).run();
}

}  // namespace

void attn_fwd(const AttnParams& p, const Runtime& rt, TileStats* stats) {
  if (p.dtype == DType::f64) return forward<OpF64>(p, rt, stats);
#if defined(__AVX512BF16__)
  if (p.dtype == DType::bf16 && !exact_rows(p)) return forward<OpBF16>(p, rt, stats);
#endif
  forward<OpF32>(p, rt, stats);
}

}  // namespace fastpe::cpu::FASTPE_ISA
