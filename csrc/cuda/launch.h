// The CUDA kernels as the binding sees them. No CUDA header, no torch.
//
// A call takes a workspace of the size it asks for, 256-byte aligned, and a stream; nothing waits for the device. The
// result is 0 or a cudaError_t.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/params.h"

namespace fastpe::cuda {

// Types the kernels take.
constexpr bool supported(DType t) { return t == DType::bf16 || t == DType::f16; }

// stats: (attn_fwd_blocks, 2) tiles visited and tiles skipped under the bound, on the device; may be null.
int64_t attn_fwd_blocks(const AttnParams& p);
size_t attn_fwd_workspace(const AttnParams& p);
int attn_fwd(const AttnParams& p, void* workspace, void* stream, uint32_t* stats = nullptr);

// Gradients of q, k, v, row scale and everything of the forms of a distance; not of tables.
constexpr int64_t kSupportedNeeds = need_q | need_k | need_v | need_params | need_gamma | need_u | need_w | need_row_scale;
size_t attn_bwd_workspace(const AttnBwdParams& a);
int attn_bwd(const AttnBwdParams& a, void* workspace, void* stream);

// float32 and the two 16-bit types.
int rotate(const RotateParams& p, void* stream);
int rope_table(const RopeTableParams& p, void* stream);
int prefix_sum(const PrefixParams& p, void* stream);

}  // namespace fastpe::cuda
