// The instances of the forward kernel; one object file per type and kind of bias (attn_fwd_inst.cu.in).
#pragma once

#include "sm80/attn_fwd.cuh"

namespace fastpe::cuda {

// Runs the kernel of the head dim class on `blocks` blocks.
template <class T, Kind kKind>
int launch_attn_fwd(int head_dim, const FwdArgs& a, int64_t blocks, void* stream);

}  // namespace fastpe::cuda
