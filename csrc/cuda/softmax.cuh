// What the forward kernels do with the rows of C fragments: online softmax, its end, and the accumulator's way to memory.
#pragma once

#include "tile.cuh"

namespace fastpe::cuda {

// One row of a tile's scores (log2 units) becomes P = exp2(s - m): at(n, e) is the lane's score in column 8 n + frag_col(e). m and
// the lane's share l of the row's sum take the tile in. Returns what sums of earlier tiles are to be multiplied by.
template <int kNt, class At>
FASTPE_DEVICE float online_softmax(float& m, float& l, At&& at) {
  float top = m;
  FASTPE_UNROLL
  for (int n = 0; n < kNt; ++n) top = max(max(at(n, 0), at(n, 1)), top);
  top = max(shfl_xor(top, 1), top);
  top = max(shfl_xor(top, 2), top);
  // A row that has seen nothing keeps -inf; its masked scores must give 0, not NaN.
  const float safe = top == -__builtin_inff() ? 0.f : top;
  const float alpha = ex2_approx(m - safe);
  m = top;
  float sum = 0;
  FASTPE_UNROLL
  for (int n = 0; n < kNt; ++n)
    FASTPE_UNROLL
    for (int e = 0; e < 2; ++e) {
      float& v = at(n, e);
      v = ex2_approx(v - safe);
      sum += v;
    }
  l = l * alpha + sum;
  return alpha;
}

// The lse of the lane's row x, from its maximum m and the whole row's sum l; the sink takes its part. Returns what the accumulator is
// to be multiplied by. row_of(x): the query, formed where it is needed; handed over as a number it makes cope_fwd spill 128 bytes more.
template <class RowOf>
FASTPE_DEVICE float finish_row(const AttnParams& p, int64_t b, int64_t h, RowOf&& row_of, int x, float m, float l) {
  const float kInf = __builtin_inff();
  float top = m, weight = 1;
  if (p.sink.p) {
    const float sink = *aux_at<float>(p.sink, 0, h) * float(kLog2e);
    top = max(m, sink);
    if (top > -kInf) {
      weight = m > -kInf ? ex2_approx(m - top) : 0.f;
      l = l * weight + ex2_approx(sink - top);
    }
  }
  // l = 0 only where no key was visible; NaN keeps its way.
  const float inv = l == 0 ? 0.f : weight / l, lse = l == 0 ? -kInf : (top + lg2_approx(l)) * float(kLn2);
  if ((lane_index() & 3) == 0 && row_of(x) < p.Nq) static_cast<float*>(p.lse)[(b * p.H + h) * p.Nq + row_of(x)] = lse;
  return inv;
}

// The rows of a block to out and, where it is kept, residual: value(x, d, e) is the lane's number in its row x and channel
// 8 d + frag_col(e). They go through the warp's own rows of the tile at `smem`, so that stores to global memory are 16 bytes. A block
// without key tiles has not met since its warps loaded that tile together.
template <class T, int kD, int kMt, class Value>
FASTPE_DEVICE void store_rows(const AttnParams& p, uint32_t smem, int64_t b, int64_t h, int64_t i0, int rows, Value&& value) {
  const uint32_t warp_row = warp_index() * 16 * kMt;
  sync_block();
  FASTPE_NO_UNROLL
  for (int pass = 0; pass < 2; ++pass) {
    const View& out = pass == 0 ? p.o : p.residual;
    if (!out.p) break;
    FASTPE_UNROLL
    for (int x = 0; x < 2 * kMt; ++x)
      FASTPE_UNROLL
      for (int d = 0; d < kD / 8; ++d) {
        const float lo = value(x, d, 0), hi = value(x, d, 1);
        uint32_t v = T::pack(lo, hi);
        if (pass == 1) v = T::pack(lo - wide_low<T>(v), hi - wide_high<T>(v));
        st_shared_b32(smem + Tile<kD>::at(warp_row + 16 * (x >> 1) + frag_row(x & 1), uint32_t(d)) + 4 * (lane_index() & 3), v);
      }
    sync_warp();
    for (uint32_t item = lane_index(); item < 16 * kMt * Tile<kD>::kChunks; item += 32) {
      const uint32_t row = warp_row + item / Tile<kD>::kChunks, chunk = item % Tile<kD>::kChunks;
      if (int(row) >= rows || int64_t(chunk * 8) >= p.Dv) continue;
      *reinterpret_cast<Quad*>(static_cast<uint16_t*>(out.p) + b * out.sb + h * out.sh + (i0 + row) * out.sn + chunk * 8) = ld_shared_v4(smem + Tile<kD>::at(row, chunk));
    }
    sync_warp();
  }
}

}  // namespace fastpe::cuda
