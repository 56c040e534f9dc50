// The instances of the backward kernels; one object file per type and kind of bias (attn_bwd_inst.cu.in).
#pragma once

#include "sm80/attn_bwd_terms.cuh"

namespace fastpe::cuda {

template <class T, Kind kKind>
int launch_attn_bwd_q(int head_dim, const BwdArgs& a, int64_t blocks, void* stream);
template <class T, Kind kKind>
int launch_attn_bwd_kv(int head_dim, const BwdArgs& a, int64_t blocks, void* stream);
// One instance for all kinds of bias.
template <class T>
int launch_attn_bwd_terms(int head_dim, const TermsArgs& a, int64_t blocks, void* stream);

}  // namespace fastpe::cuda
