// The instances of the kernels of contextual positions; one object file per type (cope_inst.cu.in).
#pragma once

#include "sm80/cope_bwd.cuh"
#include "sm80/cope_fwd.cuh"

namespace fastpe::cuda {

// Channels of the tiles: of queries and keys, of values, of gates.
inline int cope_class_of(const CopeParams& c) {
  const int64_t d = c.attn.D > c.attn.Dv ? c.attn.D : c.attn.Dv;
  return head_dim_class(c.G > d ? c.G : d);
}

template <class T>
int launch_cope_fwd(const CopeArgs& a, int64_t blocks, void* stream);
template <class T>
int launch_cope_bwd_q(const CopeArgs& a, int64_t blocks, void* stream);
template <class T>
int launch_cope_bwd_kv(const CopeArgs& a, int64_t blocks, void* stream);

}  // namespace fastpe::cuda
