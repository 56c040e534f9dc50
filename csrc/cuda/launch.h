// The CUDA kernels as the binding sees them. No CUDA header, no torch.
//
// A call takes a workspace of the size it asks for, 256-byte aligned, and a stream; nothing waits for the device. The
// result is 0 or a cudaError_t.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/params.h"

namespace fastpe::cuda {

const char* error_text(int error);
// Of the current device, 10 major + minor.
int device_capability();

// stats: (attn_fwd_blocks, 2) tiles visited and tiles skipped under the bound, on the device; may be null.
int64_t attn_fwd_blocks(const AttnParams& p);
size_t attn_fwd_workspace(const AttnParams& p);
int attn_fwd(const AttnParams& p, void* workspace, void* stream, uint32_t* stats = nullptr);

// Few queries, pages, lists of keys. The contents of lengths, pages, list and turn are not known here: page_count (pages of the
// pools) and turns (rows of k_rope, with turn) bound what the kernel reads.
size_t attn_decode_workspace(const DecodeParams& d);
int attn_decode(const DecodeParams& d, int64_t page_count, int64_t turns, void* workspace, void* stream);

size_t attn_bwd_workspace(const AttnBwdParams& a);
int attn_bwd(const AttnBwdParams& a, void* workspace, void* stream);

size_t cope_fwd_workspace(const CopeParams& c);
int cope_fwd(const CopeParams& c, void* workspace, void* stream);
size_t cope_bwd_workspace(const CopeBwdParams& a);
int cope_bwd(const CopeBwdParams& a, void* workspace, void* stream);

// float32 and the two 16-bit types.
int rotate(const RotateParams& p, void* stream);
int rope_table(const RopeTableParams& p, void* stream);
int prefix_sum(const PrefixParams& p, void* stream);

size_t landmark_fwd_workspace(const LandmarkParams& p);
int landmark_fwd(const LandmarkParams& p, void* workspace, void* stream);
size_t landmark_bwd_workspace(const LandmarkBwdParams& a);
int landmark_bwd(const LandmarkBwdParams& a, void* workspace, void* stream);

// fwd.v: k, for its shape.
size_t attn_mass_workspace(const MassParams& m);
int attn_mass(const MassParams& m, void* workspace, void* stream);

// float32 and the two 16-bit types; at most merge_parts() parts.
int merge_parts();
int merge_fwd(const MergeParams& p, void* stream);
int merge_bwd(const MergeBwdParams& b, void* stream);

}  // namespace fastpe::cuda
