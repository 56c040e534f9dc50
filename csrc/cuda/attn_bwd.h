// The instances of the backward kernels; one object file per type and kind of bias (attn_bwd_inst.cu.in).
#pragma once

#include "sm80/attn_bwd.cuh"

namespace fastpe::cuda {

template <class T, Kind kKind>
int launch_attn_bwd_q(int head_dim, const BwdArgs& a, uint32_t blocks, void* stream);
template <class T, Kind kKind>
int launch_attn_bwd_kv(int head_dim, const BwdArgs& a, uint32_t blocks, void* stream);

}  // namespace fastpe::cuda
