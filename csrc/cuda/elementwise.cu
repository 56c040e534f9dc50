#include "../core/tiles.h"
#include "elementwise.cuh"
#include "launch.cuh"
#include "launch.h"

namespace fastpe::cuda {
namespace {
int64_t blocks_for(int64_t items) { return tiles::ceil_div(items, int64_t(kElementThreads)); }
}  // namespace

int rotate(const RotateParams& p, void* stream) {
  const int64_t blocks = blocks_for(p.B * p.H * p.N * (p.D / 2));
  switch (p.dtype) {
    case DType::f32: return launch(&rotate_kernel<F32>, "rotate", blocks, kElementThreads, 0, stream, p);
    case DType::bf16: return launch(&rotate_kernel<Half<Bf16>>, "rotate", blocks, kElementThreads, 0, stream, p);
    default: return launch(&rotate_kernel<Half<F16>>, "rotate", blocks, kElementThreads, 0, stream, p);
  }
}

int rope_table(const RopeTableParams& p, void* stream) {
  const int64_t blocks = blocks_for(p.B * p.H * p.N * p.J);
  if (p.out_f64) return launch(&rope_table_kernel<double>, "rope_table", blocks, kElementThreads, 0, stream, p);
  return launch(&rope_table_kernel<float>, "rope_table", blocks, kElementThreads, 0, stream, p);
}

int prefix_sum(const PrefixParams& p, void* stream) {
  const int64_t blocks = tiles::ceil_div(p.rows, 4);
  if (p.f64) return launch(&prefix_kernel<double>, "prefix_sum", blocks, 128, 0, stream, p);
  return launch(&prefix_kernel<float>, "prefix_sum", blocks, 128, 0, stream, p);
}

}  // namespace fastpe::cuda
