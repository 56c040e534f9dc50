// The instances of the kernel for few queries; one object file per type (attn_decode_inst.cu.in).
#pragma once

#include "sm80/decode.cuh"

namespace fastpe::cuda {

// Runs the kernel of the head dim class on `blocks` blocks.
template <class T>
int launch_attn_decode(int head_dim, const DecodeArgs& a, int64_t blocks, void* stream);

}  // namespace fastpe::cuda
