// Second step of parameter gradients: sums of private parts, in a fixed order.
#pragma once

#include "ptx.cuh"

namespace fastpe::cuda {

// out[b', h', n'] = sum over the axes that were broadcast, in order, in float64.
struct SumArgs {
  const float *x, *also;             // (B,H,N,pitch); also: (B,H,N - shift), added at n - shift; may be null
  float* out;                        // (B|1,H|1,N|1,inner), inner <= pitch
  int64_t B, H, N, inner, shift;
  bool sum_b, sum_h, sum_n;
  int64_t pitch = 0;                 // 0: inner
};
FASTPE_KERNEL(128, 1) sum_kernel(const FASTPE_GRID_CONSTANT SumArgs a) {
  const int64_t nb = a.sum_b ? 1 : a.B, nh = a.sum_h ? 1 : a.H, nn = a.sum_n ? 1 : a.N;
  const int64_t at = int64_t(block_index()) * 128 + thread_index();
  if (at >= nb * nh * nn * a.inner) return;
  const int64_t e = at % a.inner, n0 = at / a.inner % nn, h0 = at / a.inner / nn % nh, b0 = at / a.inner / nn / nh;
  const int64_t pitch = a.pitch ? a.pitch : a.inner;
  double sum = 0;
  for (int64_t b = b0; b < (a.sum_b ? a.B : b0 + 1); ++b)
    for (int64_t h = h0; h < (a.sum_h ? a.H : h0 + 1); ++h)
      for (int64_t n = n0; n < (a.sum_n ? a.N : n0 + 1); ++n) {
        sum += a.x[((b * a.H + h) * a.N + n) * pitch + e];
        if (a.also && n >= a.shift) sum += a.also[(b * a.H + h) * (a.N - a.shift) + n - a.shift];
      }
  a.out[at] = float(sum);
}

}  // namespace fastpe::cuda
