// The operands of attention's products. 16-bit numbers lie in swizzled shared tiles. float32 (F32) goes through the same
// tensor-core instruction: a number is the sum of bf16 numbers, and a product that of their products down to the size that
// is left out. Two parts are exact to 2^-17 (3 products), three to 2^-25 (6 products), which is float32 itself; tf32 would be
// 2^-11. Such operands stay in global memory and are split on the way to fragments: the warps of a block share the
// cache lines, and no head size meets the limit of shared memory.
#pragma once

#include "plan.h"
#include "tile.cuh"

namespace fastpe::cuda {

// Parts of a float32 number: all of it in calls of float32; beside 16-bit operands two.
template <class T>
constexpr int kParts = kIsF32<T> ? 3 : 2;

template <int kN>
struct Split {
  uint32_t part[kN];  // of two numbers, the largest first
};
template <int kN>
FASTPE_DEVICE Split<kN> split(float x, float y) {
  Split<kN> s;
  FASTPE_UNROLL
  for (int i = 0; i < kN; ++i) {
    s.part[i] = Bf16::pack(x, y);
    x -= wide_low<Bf16>(s.part[i]);
    y -= wide_high<Bf16>(s.part[i]);
  }
  return s;
}
template <int kN>
struct SplitRows {
  uint32_t part[kN][4];  // an A operand
  FASTPE_DEVICE void set(int i, Split<kN> s) {
    FASTPE_UNROLL
    for (int x = 0; x < kN; ++x) part[x][i] = s.part[x];
  }
};
// Small products first.
template <int kN>
FASTPE_DEVICE void mma_split(float (&c)[4], const SplitRows<kN>& a, Split<kN> b0, Split<kN> b1) {
  FASTPE_UNROLL
  for (int sum = kN - 1; sum >= 0; --sum)
    FASTPE_UNROLL
    for (int i = 0; i <= sum; ++i) mma<Bf16>(c, a.part[i], b0.part[sum - i], b1.part[sum - i]);
}
// Number c of a vector of d; null: a vector of zeros.
FASTPE_DEVICE float channel(const float* x, int c, int d) { return x && c < d ? x[c] : 0.f; }

// 64 rows of kD channels, `valid` of them real and D channels wide.
template <class T, int kD>
struct Operand {
  uint32_t tile;
  template <int kThreads>
  FASTPE_DEVICE void load(const uint16_t* first, int64_t stride, int valid, int D, bool aligned) { load_tile<kD, 64, kThreads>(tile, first, stride, valid, D, aligned); }
};
template <int kD>
struct Operand<F32, kD> {
  uint32_t tile;
  const float* first = nullptr;
  int64_t stride = 0;
  int valid = 0, D = 0;
  template <int kThreads>
  FASTPE_DEVICE void load(const float* x, int64_t row_stride, int rows, int channels, bool) { first = x, stride = row_stride, valid = rows, D = channels; }
  FASTPE_DEVICE const float* row(int n) const { return n < valid ? first + n * stride : nullptr; }
};

// C fragments of A B^T over kD channels: rows of A from warp * 16, 64 rows of B. Tiles in shared memory.
template <class T, int kD>
FASTPE_DEVICE void product_nt(float (&c)[8][4], uint32_t a, uint32_t b) {
  FASTPE_UNROLL
  for (int n = 0; n < 8; ++n)
    FASTPE_UNROLL
    for (int e = 0; e < 4; ++e) c[n][e] = 0;
  FASTPE_UNROLL
  for (int k = 0; k < kD / 16; ++k) {
    uint32_t fa[4], fb[4];
    ldmatrix_x4(fa, fragment_at<kD>(a, warp_index() * 16, 2 * k));
    FASTPE_UNROLL
    for (int n = 0; n < 4; ++n) {
      ldmatrix_x4(fb, fragment_at<kD>(b, 16 * n, 2 * k));
      mma<T>(c[2 * n], fa, fb[0], fb[2]);
      mma<T>(c[2 * n + 1], fa, fb[1], fb[3]);
    }
  }
}
// acc += C B, C as the C fragments of an earlier product, B 64 rows of kD channels.
template <class T, int kD>
FASTPE_DEVICE void product_nn(float (&acc)[kD / 8][4], const float (&c)[8][4], uint32_t b) {
  FASTPE_UNROLL
  for (int k = 0; k < 4; ++k) {
    uint32_t fa[4], fb[4];
    FASTPE_UNROLL
    for (int r = 0; r < 4; ++r) fa[r] = T::pack(c[2 * k + (r >> 1)][2 * (r & 1)], c[2 * k + (r >> 1)][2 * (r & 1) + 1]);
    FASTPE_UNROLL
    for (int d = 0; d < kD / 16; ++d) {
      ldmatrix_x4_trans(fb, fragment_at<kD>(b, 16 * k, 2 * d));
      mma<T>(acc[2 * d], fa, fb[0], fb[1]);
      mma<T>(acc[2 * d + 1], fa, fb[2], fb[3]);
    }
  }
}

// The same of operands of any type.
template <class T, int kD>
FASTPE_DEVICE void product_nt(float (&c)[8][4], const Operand<T, kD>& a, const Operand<T, kD>& b) {
  if constexpr (!kIsF32<T>) {
    product_nt<T, kD>(c, a.tile, b.tile);
  } else {
    FASTPE_UNROLL
    for (int n = 0; n < 8; ++n)
      FASTPE_UNROLL
      for (int e = 0; e < 4; ++e) c[n][e] = 0;
    const float* mine[2] = {a.row(int(warp_index() * 16 + frag_row(0))), a.row(int(warp_index() * 16 + frag_row(1)))};
    FASTPE_NO_UNROLL
    for (int k = 0; k < a.D; k += 16) {
      const int c0 = k + int(frag_col(0));
      SplitRows<3> x;
      FASTPE_UNROLL
      for (int r = 0; r < 4; ++r) {
        const int at = c0 + 8 * (r >> 1);
        x.set(r, split<3>(channel(mine[r & 1], at, a.D), channel(mine[r & 1], at + 1, a.D)));
      }
      FASTPE_UNROLL
      for (int n = 0; n < 8; ++n) {
        const float* y = b.row(8 * n + int(lane_index() >> 2));
        mma_split(c[n], x, split<3>(channel(y, c0, b.D), channel(y, c0 + 1, b.D)), split<3>(channel(y, c0 + 8, b.D), channel(y, c0 + 9, b.D)));
      }
    }
  }
}
template <class T, int kD>
FASTPE_DEVICE void product_nn(float (&acc)[kD / 8][4], const float (&c)[8][4], const Operand<T, kD>& b) {
  if constexpr (!kIsF32<T>) {
    product_nn<T, kD>(acc, c, b.tile);
  } else {
    FASTPE_UNROLL
    for (int k = 0; k < 4; ++k) {
      SplitRows<3> x;
      const float* y[4];
      FASTPE_UNROLL
      for (int r = 0; r < 4; ++r) {
        x.set(r, split<3>(c[2 * k + (r >> 1)][2 * (r & 1)], c[2 * k + (r >> 1)][2 * (r & 1) + 1]));
        y[r] = b.row(16 * k + int(frag_col(uint32_t(r & 1))) + 8 * (r >> 1));
      }
      FASTPE_UNROLL
      for (int d = 0; d < kD / 8; ++d) {
        const int at = 8 * d + int(lane_index() >> 2);
        if (8 * d < b.D) mma_split(acc[d], x, split<3>(channel(y[0], at, b.D), channel(y[1], at, b.D)), split<3>(channel(y[2], at, b.D), channel(y[3], at, b.D)));
      }
    }
  }
}

}  // namespace fastpe::cuda
