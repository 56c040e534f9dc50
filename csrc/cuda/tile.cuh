// Shared-memory tiles of 16-bit numbers and the fragments read from them.
#pragma once

#include "../core/params.h"
#include "../pos/rotate.h"
#include "ptx.cuh"

namespace fastpe::cuda {

// Rows of kD channels in chunks of 16 bytes. The chunks of a row are permuted so that 8 consecutive rows of one chunk
// column lie in 8 different groups of 4 banks, which is what ldmatrix reads at a time. Rows of 192 bytes start at
// alternating bank groups already, so there two bits of the row suffice.
template <int kD>
struct Tile {
  static_assert(kD % 32 == 0);
  static constexpr uint32_t kChunks = kD / 8, kRowBytes = kD * 2;
  static FASTPE_DEVICE uint32_t at(uint32_t row, uint32_t chunk) {
    const uint32_t x = kD % 64 == 0 ? row & 7 : row >> 1 & 3;
    return row * kRowBytes + (chunk ^ x) * 16;
  }
};

// Element p[b, h, n] of an aux array; p is not null.
template <class X>
FASTPE_DEVICE const X* aux_at(const Aux& a, int64_t b, int64_t h, int64_t n = 0) {
  return static_cast<const X*>(a.p) + b * a.sb + h * a.sh + n * a.sn;
}
// float32 as an element type: what the 16-bit types have, without rounding.
struct F32 {
  using Storage = float;
  static FASTPE_DEVICE float load(const float* p) { return *p; }
  static FASTPE_DEVICE void store(float* p, float x) { *p = x; }
  static FASTPE_DEVICE float wide(float x) { return x; }
  static FASTPE_DEVICE float narrow(float x) { return x; }
};
template <class T>
constexpr bool kIsF32 = __is_same(T, F32);
template <bool kWide>
struct StorageOf {
  using type = uint16_t;
};
template <>
struct StorageOf<true> {
  using type = float;
};
template <class T>
using Stored = typename StorageOf<kIsF32<T>>::type;

template <class T = Bf16>
FASTPE_DEVICE const Stored<T>* row_at(const View& v, int64_t b, int64_t h, int64_t n) {
  return static_cast<const Stored<T>*>(v.p) + b * v.sb + h * v.sh + n * v.sn;
}

FASTPE_DEVICE Quad load_chunk(const uint16_t* p) {
  Quad q;
  FASTPE_UNROLL
  for (int i = 0; i < 4; ++i) q.x[i] = p[2 * i] | uint32_t(p[2 * i + 1]) << 16;
  return q;
}

// Channels [8 c, 8 c + 8) of a row whose first 2 J channels are rotated.
template <class T>
FASTPE_DEVICE Quad load_chunk_rotated(const uint16_t* row, uint32_t c, const float* cos, const float* sin, uint32_t J, RopeLayout layout) {
  Quad q;
  FASTPE_UNROLL
  for (uint32_t i = 0; i < 4; ++i) {
    float y[2];
    FASTPE_UNROLL
    for (uint32_t e = 0; e < 2; ++e) {
      const uint32_t d = 8 * c + 2 * i + e;
      y[e] = T::wide(row[d]);
      if (d >= 2 * J) continue;
      const bool half = layout == RopeLayout::half, first = half ? d < J : d % 2 == 0;
      const uint32_t pair = half ? (first ? d : d - J) : d / 2;
      const float other = T::wide(row[half ? (first ? d + J : d - J) : d ^ 1]);
      float a = first ? y[e] : other, b = first ? other : y[e];
      pos::rotate_pair(a, b, cos[pair], sin[pair]);
      y[e] = first ? a : b;
    }
    q.x[i] = T::pack(y[0], y[1]);
  }
  return q;
}

// kRows rows of a tensor, `valid` of them real and D channels wide, to a tile; the rest becomes 0. With `aligned` (every
// row starts at a multiple of 16 bytes) by cp.async, to be committed and waited for; else at once.
template <int kD, int kRows, int kThreads>
FASTPE_DEVICE void load_tile(uint32_t tile, const uint16_t* first, int64_t row_stride, int valid, int D, bool aligned) {
  constexpr uint32_t kChunks = Tile<kD>::kChunks;
  static_assert(kRows * kChunks % kThreads == 0);
  const uint32_t tid = thread_index();
  FASTPE_UNROLL
  for (uint32_t x = 0; x < kRows * kChunks / kThreads; ++x) {
    const uint32_t item = x * kThreads + tid, row = item / kChunks, chunk = item % kChunks;
    const bool inside = int(row) < valid && int(chunk * 8) < D;
    const uint16_t* src = inside ? first + int64_t(row) * row_stride + chunk * 8 : first;
    const uint32_t dst = tile + Tile<kD>::at(row, chunk);
    if (aligned) {
      cp_async_16(dst, src, inside ? 16 : 0);
    } else {
      st_shared_v4(dst, inside ? load_chunk(src) : Quad{});
    }
  }
}

// Fragments by ldmatrix.x4 at row (lane & 15), chunk (lane >> 4) of a block of 16 rows and two chunks:
//   A operand: registers a0..a3
//   B operand, tile rows along n (keys in Q K^T): columns 0-7 are registers 0, 2; columns 8-15 are 1, 3
//   B operand by .trans, tile rows along k (values in P V): columns 0-7 are registers 0, 1; columns 8-15 are 2, 3
template <int kD>
FASTPE_DEVICE uint32_t fragment_at(uint32_t tile, uint32_t row, uint32_t chunk) {
  const uint32_t lane = lane_index();
  return tile + Tile<kD>::at(row + (lane & 15), chunk + (lane >> 4));
}

// Value e of a C fragment belongs to row frag_row(e) and column frag_col(e) of its 16 x 8 tile.
FASTPE_DEVICE uint32_t frag_row(uint32_t half) { return (lane_index() >> 2) + 8 * half; }
FASTPE_DEVICE uint32_t frag_col(uint32_t e) { return 2 * (lane_index() & 3) + (e & 1); }

}  // namespace fastpe::cuda
