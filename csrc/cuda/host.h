// What the host code of the attention kernels shares.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan.h"

namespace fastpe::cuda {

// Pieces of the workspace; a null base measures.
struct Carver {
  char* base;
  size_t used = 0;
  template <class X>
  X* take(int64_t n) {
    used = (used + 255) / 256 * 256;
    X* p = base ? reinterpret_cast<X*>(base + used) : nullptr;
    used += size_t(n) * sizeof(X);
    return p;
  }
};

// Every row starts at a multiple of 16 bytes.
inline bool aligned(const View& v) {
  return reinterpret_cast<uintptr_t>(v.p) % 16 == 0 && v.sb % 8 == 0 && v.sh % 8 == 0 && v.sn % 8 == 0;
}

inline int class_of(const AttnParams& p) { return head_dim_class(p.D > p.Dv ? p.D : p.Dv); }

// (B,H,N,D) dense, channels contiguous.
inline View dense(uint16_t* p, int64_t H, int64_t N, int64_t D) { return {p, H * N * D, N * D, D}; }

}  // namespace fastpe::cuda
