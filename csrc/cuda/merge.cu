#include "merge.cuh"

#include "../core/tiles.h"
#include "launch.cuh"
#include "launch.h"

namespace fastpe::cuda {
namespace {

MergeKernelArgs pack(const MergeParams& p) {
  MergeKernelArgs a{};
  a.P = p.P, a.B = p.B, a.H = p.H, a.N = p.N, a.Dv = p.Dv;
  for (int64_t q = 0; q < p.P; ++q) {
    a.o[q] = p.o[q];
    a.lse[q] = p.lse[q];
    a.factor[q] = float(p.factor[q]);
  }
  a.out = p.out;
  a.out_lse = static_cast<float*>(p.out_lse);
  return a;
}

}  // namespace

int merge_parts() { return kMaxMergeParts; }

int merge_fwd(const MergeParams& p, void* stream) {
  const MergeKernelArgs a = pack(p);
  const int64_t blocks = tiles::ceil_div(p.B * p.H * p.N, 4);
  switch (p.dtype) {
    case DType::f32: return launch(&merge_kernel<F32>, "merge", blocks, 128, 0, stream, a);
    case DType::bf16: return launch(&merge_kernel<Half<Bf16>>, "merge", blocks, 128, 0, stream, a);
    default: return launch(&merge_kernel<Half<F16>>, "merge", blocks, 128, 0, stream, a);
  }
}

int merge_bwd(const MergeBwdParams& b, void* stream) {
  const MergeParams& p = b.fwd;
  MergeBwdArgs a{};
  a.fwd = pack(p);
  a.d_out = b.d_out;
  a.d_lse = static_cast<const float*>(b.d_lse);
  a.d_lse_p = static_cast<float*>(b.d_lse_p);
  for (int64_t q = 0; b.d_o && q < p.P; ++q) a.d_o[q] = b.d_o[q];
  const int64_t blocks = tiles::ceil_div(p.B * p.H * p.N, 4);
  switch (p.dtype) {
    case DType::f32: return launch(&merge_bwd_kernel<F32>, "merge_bwd", blocks, 128, 0, stream, a);
    case DType::bf16: return launch(&merge_bwd_kernel<Half<Bf16>>, "merge_bwd", blocks, 128, 0, stream, a);
    default: return launch(&merge_bwd_kernel<Half<F16>>, "merge_bwd", blocks, 128, 0, stream, a);
  }
}

}  // namespace fastpe::cuda
