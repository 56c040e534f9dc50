// The instances of the landmark kernels; one object file per type and pass (landmark_*_inst.cu.in).
#pragma once

#include "sm80/landmark_bwd.cuh"
#include "sm80/landmark_fwd.cuh"

namespace fastpe::cuda {

// Runs the kernel of the head dim class on `blocks` blocks.
template <class T>
int launch_landmark_fwd(int head_dim, const LandmarkFwdArgs& a, int64_t blocks, void* stream);
template <class T>
int launch_landmark_bwd_q(int head_dim, const LandmarkBwdArgs& a, int64_t blocks, void* stream);
template <class T>
int launch_landmark_bwd_kv(int head_dim, const LandmarkBwdArgs& a, int64_t blocks, void* stream);

}  // namespace fastpe::cuda
