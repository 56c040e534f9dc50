// Merging partial attentions by their lse, one warp a row: lane q of the first P has part q's weight, then all lanes go over
// the channels. Formed in float32, one rounding.
#pragma once

#include "elementwise.cuh"
#include "plan.h"

namespace fastpe::cuda {

// Views travel as kernel arguments, of which there are 4 KB.
constexpr int kMaxMergeParts = 32;

struct MergeKernelArgs {
  int64_t P, B, H, N, Dv;
  View o[kMaxMergeParts];
  Aux lse[kMaxMergeParts];
  float factor[kMaxMergeParts];
  View out;       // forward
  float* out_lse;
};
struct MergeBwdArgs {
  MergeKernelArgs fwd;  // out, out_lse: not read
  View d_out;           // p may be null
  const float* d_lse;   // may be null
  float* d_lse_p;       // (P,B,H,N); may be null
  View d_o[kMaxMergeParts];  // p may be null
};
static_assert(sizeof(MergeBwdArgs) < 4096);

// Lane q's weight, 0 for lanes past the last part; m and the sum of exponentials, the same for all lanes.
struct MergeWeight {
  float w, m, sum;
};
FASTPE_DEVICE MergeWeight merge_weight(const MergeKernelArgs& a, int64_t b, int64_t h, int64_t n) {
  const uint32_t q = lane_index();
  const float kInf = __builtin_inff();
  const float x = int64_t(q) < a.P ? a.factor[q] * *aux_at<float>(a.lse[q], b, h, n) : -kInf;
  float top = x;
  FASTPE_UNROLL
  for (uint32_t s = 1; s < 32; s *= 2) top = max(shfl_xor(top, s), top);
  const float m = top == -kInf ? 0.f : top, e = ex2_approx((x - m) * float(kLog2e));
  float sum = e;
  FASTPE_UNROLL
  for (uint32_t s = 1; s < 32; s *= 2) sum += shfl_xor(sum, s);
  return {sum == 0 ? 0.f : e / sum, m, sum};
}

template <class E>
FASTPE_KERNEL(128, 1) merge_kernel(const FASTPE_GRID_CONSTANT MergeKernelArgs a) {
  using S = typename E::Storage;
  const int64_t row = int64_t(block_index()) * 4 + warp_index();
  if (row >= a.B * a.H * a.N) return;
  const int64_t n = row % a.N, h = row / a.N % a.H, b = row / a.N / a.H;
  const MergeWeight x = merge_weight(a, b, h, n);
  if (lane_index() == 0) a.out_lse[row] = x.sum == 0 ? -__builtin_inff() : x.m + lg2_approx(x.sum) * float(kLn2);
  S* out = static_cast<S*>(a.out.p) + b * a.out.sb + h * a.out.sh + n * a.out.sn;
  for (int64_t d0 = 0; d0 < a.Dv; d0 += 32) {
    const int64_t d = d0 + lane_index();
    float y = 0;
    for (int64_t q = 0; q < a.P; ++q) {
      const float w = shfl_idx(x.w, uint32_t(q));
      // A part that saw nothing may hold anything.
      if (w != 0 && d < a.Dv) y = fma(w, E::load(static_cast<const S*>(a.o[q].p) + b * a.o[q].sb + h * a.o[q].sh + n * a.o[q].sn + d), y);
    }
    if (d < a.Dv) E::store(out + d, y);
  }
}

template <class E>
FASTPE_KERNEL(128, 1) merge_bwd_kernel(const FASTPE_GRID_CONSTANT MergeBwdArgs g) {
  using S = typename E::Storage;
  const MergeKernelArgs& a = g.fwd;
  const int64_t row = int64_t(block_index()) * 4 + warp_index();
  if (row >= a.B * a.H * a.N) return;
  const int64_t n = row % a.N, h = row / a.N % a.H, b = row / a.N / a.H;
  const float weight = merge_weight(a, b, h, n).w;
  const S* d_out = static_cast<const S*>(g.d_out.p) + (g.d_out.p ? b * g.d_out.sb + h * g.d_out.sh + n * g.d_out.sn : 0);
  if (g.d_lse_p) {
    float mine = 0, mean = 0;  // <d_out, o_q> of lane q, and the weighted sum of all
    for (int64_t q = 0; q < a.P; ++q) {
      const float w = shfl_idx(weight, uint32_t(q));
      float along = 0;
      if (g.d_out.p && w != 0) {
        const S* o = static_cast<const S*>(a.o[q].p) + b * a.o[q].sb + h * a.o[q].sh + n * a.o[q].sn;
        for (int64_t d = lane_index(); d < a.Dv; d += 32) along = fma(E::load(d_out + d), E::load(o + d), along);
      }
      FASTPE_UNROLL
      for (uint32_t s = 1; s < 32; s *= 2) along += shfl_xor(along, s);
      mean = fma(w, along, mean);
      if (int64_t(lane_index()) == q) mine = along;
    }
    const int64_t q = lane_index();
    if (q < a.P) g.d_lse_p[q * a.B * a.H * a.N + row] = weight == 0 ? 0.f : a.factor[q] * weight * ((g.d_lse ? g.d_lse[row] : 0.f) + (mine - mean));
  }
  for (int64_t q = 0; q < a.P; ++q) {
    const float w = shfl_idx(weight, uint32_t(q));
    if (!g.d_o[q].p) continue;
    S* to = static_cast<S*>(g.d_o[q].p) + b * g.d_o[q].sb + h * g.d_o[q].sh + n * g.d_o[q].sn;
    for (int64_t d = lane_index(); d < a.Dv; d += 32) E::store(to + d, g.d_out.p && w != 0 ? w * E::load(d_out + d) : 0.f);
  }
}

}  // namespace fastpe::cuda
