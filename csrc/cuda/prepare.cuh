// What attention wants to know about keys before it starts, one pass over them each: rotated keys and their norms, the
// ranges of ids and positions of every tile, the envelope of a table.
#pragma once

#include "plan.h"
#include "visible_tile.cuh"

namespace fastpe::cuda {

struct KeysArgs {
  AttnParams p;
  void* rotated;      // (copies,B,Hk,Nk,D) dense; may be null: keys are not rotated
  float* k_norm;      // (B*Hk, tiles); may be null
  int64_t copies = 1; // float32
};

// One block per (copy, batch, kv head, tile of keys). The lanes of a warp share rows: as many per row as hold its chunks.
template <class T>
FASTPE_KERNEL(128, 1) keys_kernel(const FASTPE_GRID_CONSTANT KeysArgs a) {
  const AttnParams& p = a.p;
  const int64_t tiles = tiles::ceil_div(p.Nk, kBlockN), row0 = block_index() / tiles, tile = block_index() % tiles;
  const int64_t bk = row0 % (p.B * p.Hk);
  const int copy = int(row0 / (p.B * p.Hk));
  const int64_t b = bk / p.Hk, hk = bk % p.Hk;
  const uint32_t lane = lane_index(), warp = warp_index(), base = shared_base();
  const uint32_t chunks = uint32_t(p.D / 8);
  uint32_t per_row = 1;
  while (per_row < chunks) per_row *= 2;
  const uint32_t rows = 32 / per_row, chunk = lane % per_row;
  float biggest = 0;
  for (uint32_t r0 = warp * rows; r0 < kBlockN; r0 += 4 * rows) {
    const int64_t j = tile * kBlockN + r0 + lane / per_row;
    float norm = 0;
    if (j < p.Nk && chunk < chunks) {
      const uint16_t* row = row_at<T>(p.k, b, hk, j);
      Quad q;
      if (a.rotated) {
        const Rope rope = key_rope(p, copy, j);
        q = load_chunk_rotated<T>(row, chunk, aux_at<float>(rope.cos, b, hk, j), aux_at<float>(rope.sin, b, hk, j), uint32_t(p.rope_pairs), p.rope_layout);
        *reinterpret_cast<Quad*>(static_cast<uint16_t*>(a.rotated) + (row0 * p.Nk + j) * p.D + chunk * 8) = q;
      } else {
        q = load_chunk(row + chunk * 8);
      }
      FASTPE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float x = wide_low<T>(q.x[i]), y = wide_high<T>(q.x[i]);
        norm += x * x + y * y;
      }
    }
    for (uint32_t step = 1; step < per_row; step *= 2) norm += shfl_xor(norm, step);
    // A NaN bounds nothing.
    if (!(norm >= 0)) norm = __builtin_inff();
    biggest = max(biggest, norm);
  }
  if (!a.k_norm) return;
  for (uint32_t step = per_row; step < 32; step *= 2) biggest = max(biggest, shfl_xor(biggest, step));
  if (lane == 0) st_shared_f32(base + 4 * warp, biggest);
  sync_block();
  if (thread_index() == 0) {
    for (uint32_t w = 1; w < 4; ++w) biggest = max(biggest, ld_shared_f32(base + 4 * w));
    a.k_norm[block_index()] = sqrtf(biggest) * 1.0001f;
  }
}

// float32 keys in every copy, one thread per two channels.
FASTPE_KERNEL(128, 1) keys_f32_kernel(const FASTPE_GRID_CONSTANT KeysArgs a) {
  const AttnParams& p = a.p;
  const int64_t slots = p.D / 2, one = p.B * p.Hk * p.Nk * slots, at = int64_t(block_index()) * 128 + thread_index(), all = at % one;
  const int copy = int(at / one);
  if (copy >= a.copies) return;
  const int64_t slot = all % slots, j = all / slots % p.Nk, bk = all / slots / p.Nk, b = bk / p.Hk, hk = bk % p.Hk;
  const float* x = row_at<F32>(p.k, b, hk, j);
  float* y = static_cast<float*>(a.rotated) + ((copy * p.B * p.Hk + bk) * p.Nk + j) * p.D;
  const bool turned = slot < p.rope_pairs, half = turned && p.rope_layout == RopeLayout::half;
  const int64_t first = half ? slot : 2 * slot, second = half ? slot + p.rope_pairs : 2 * slot + 1;
  float u = x[first], v = x[second];
  if (turned) {
    const Rope rope = key_rope(p, copy, j);
    pos::rotate_pair(u, v, aux_at<float>(rope.cos, b, hk, j)[slot], aux_at<float>(rope.sin, b, hk, j)[slot]);
  }
  y[first] = u;
  y[second] = v;
}

struct SpanArgs {
  const void* x;      // (rows, Nk) int32 or float
  int64_t stride;     // of rows, in elements; two levels: row = outer * inner_rows + inner
  int64_t outer_stride, inner_rows, n, tiles, total;
  void* out;          // (rows, tiles, 2)
};

// Smallest and largest of every tile of kBlockN numbers, one warp each. NaN gives NaN as the largest.
template <class X>
FASTPE_KERNEL(128, 1) span_kernel(const FASTPE_GRID_CONSTANT SpanArgs a) {
  const int64_t task = int64_t(block_index()) * 4 + warp_index();
  const uint32_t lane = lane_index();
  if (task >= a.total) return;
  const int64_t row = task / a.tiles, tile = task % a.tiles;
  const X* x = static_cast<const X*>(a.x) + row / a.inner_rows * a.outer_stride + row % a.inner_rows * a.stride;
  const int64_t j0 = tile * kBlockN, j1 = j0 + kBlockN < a.n ? j0 + kBlockN : a.n;
  X lo = x[j0], hi = x[j0];
  for (int64_t j = j0 + lane; j < j1; j += 32) {
    lo = x[j] < lo ? x[j] : lo;
    hi = x[j] > hi || x[j] != x[j] ? x[j] : hi;
  }
  for (uint32_t step = 1; step < 32; step *= 2) {
    const X l = __builtin_bit_cast(X, shfl_xor(__builtin_bit_cast(uint32_t, lo), step));
    const X h = __builtin_bit_cast(X, shfl_xor(__builtin_bit_cast(uint32_t, hi), step));
    lo = l < lo ? l : lo;
    hi = h > hi || h != h ? h : hi;
  }
  if (lane == 0) {
    X* out = static_cast<X*>(a.out) + task * 2;
    out[0] = lo;
    out[1] = hi;
  }
}

struct EnvelopeArgs {
  const float* table;  // (rows, L)
  int64_t stride, len;
  bool two_sided;      // [0, L/2] holds offsets t >= 0 in falling order, the rest t < 0
  float* env;          // (rows, L) dense
};

// env at offset t: the largest entry at offsets t' >= t for t >= 0, t' <= t for t < 0. One warp per row.
FASTPE_KERNEL(32, 1) envelope_kernel(const FASTPE_GRID_CONSTANT EnvelopeArgs a) {
  const uint32_t lane = lane_index();
  const float* x = a.table + int64_t(block_index()) * a.stride;
  float* y = a.env + int64_t(block_index()) * a.len;
  // Running maximum of n entries, entry k at first + k * step.
  const auto scan = [&](int64_t first, int64_t step, int64_t n) {
    float top = -__builtin_inff();
    for (int64_t k0 = 0; k0 < n; k0 += 32) {
      const int64_t at = first + (k0 + lane) * step;
      float v = k0 + lane < n ? x[at] : -__builtin_inff();
      for (uint32_t s = 1; s < 32; s *= 2) {
        const float o = shfl_up(v, s);
        if (lane >= s) v = v > o || v != v ? v : o;
      }
      v = v > top || v != v ? v : top;
      if (k0 + lane < n) y[at] = v;
      top = shfl_idx(v, 31);
    }
  };
  const int64_t r = (a.len - 1) / 2;
  if (a.two_sided) {
    scan(0, 1, r + 1);
    scan(a.len - 1, -1, r);
  } else {
    scan(a.len - 1, -1, a.len);
  }
}

}  // namespace fastpe::cuda
