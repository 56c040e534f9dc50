// Products with tables, <row_q_i, row_e[index(I - j)]> and <col_k_j, col_e[index(I - j)]>, without one number for every
// (token, entry): cpu/attn_strips.h on tensor cores.
//
// The 16 tokens m of one side that a warp has (queries for row_q, keys for col_k) and the 64 tokens o of the other meet 79
// offsets. One product of their vectors with that strip of the table holds every term: that of m and o stands at place
// o - m + 15. A tile reads 80 rows of the table a warp, however long the table is, and a single one where all places have
// the same entry, as everywhere beyond the reach of a clipped table.
//
// Vectors and tables are float32, split as operand.cuh says: bf16 alone would round the tables, whose gradients cancel. All
// the shared memory this takes is the tile that the terms go to.
#pragma once

#include "compose.cuh"
#include "operand.cuh"

namespace fastpe::cuda {

// Terms by (query, key), without a margin: with it they would not fit beside the tiles of 256 channels. The permutation
// puts what a warp reads along its rows into 32 banks.
FASTPE_DEVICE uint32_t term_at(uint32_t tile, int query, int key) {
  const int x = (query & 3) * 8 | (query >> 2 & 1);
  return tile + uint32_t(query * 64 + (key ^ x)) * 4;
}

constexpr int kPlaces = 80;  // of a strip: 79 offsets and one unused

// The terms of a tile, by the whole block. What was read of the tile before lies behind a barrier; another one comes
// before it is read. kGroup: 8-place columns whose accumulators are held at a time.
template <class T, int kGroup>
FASTPE_DEVICE void make_terms(const AttnParams& p, int64_t b, int64_t h, int64_t i0, int64_t j0, int rows, int keys, uint32_t tile) {
  static_assert(kPlaces / 8 % kGroup == 0);
  const Bias& s = p.bias;
  const int own = int(warp_index()) * 16, d = int(s.strip_d);
  FASTPE_NO_UNROLL
  for (int side = 0; side < 2; ++side) {
    const bool by_row = side == 0;
    const Aux x = by_row ? s.row_q : s.col_k, e = by_row ? s.row_e : s.col_e;
    if (!e.p) continue;
    const bool add = !by_row && s.row_e.p;
    if (add) sync_block();
    const int tokens = by_row ? rows : keys;
    const float *vectors = aux_at<float>(x, b, h, by_row ? i0 : j0), *table = aux_at<float>(e, 0, h);
    const float* mine[2];
    FASTPE_UNROLL
    for (int z = 0; z < 2; ++z) {
      const int m = own + int(frag_row(uint32_t(z)));
      mine[z] = m < tokens ? vectors + m * x.sn : nullptr;
    }
    // Place v holds the offset t0 - v of a row, t0 + v of a column.
    const int64_t t0 = i0 + p.Nk - p.Nq - j0 + (by_row ? own + 15 : -own - 15);
    const auto entry_of = [&](int v) { return term_entry(s, by_row ? t0 - v : t0 + v); };
    const int32_t first = entry_of(0);
    bool same = true;
    for (int v = int(lane_index()); v < kPlaces - 1; v += 32) same = same && entry_of(v) == first;
    const bool one = vote_all(same);
    const auto put = [&](int m, int o, float v) {
      const uint32_t at = by_row ? term_at(tile, own + m, o) : term_at(tile, o, own + m);
      st_shared_f32(at, add ? ld_shared_f32(at) + v : v);
    };
    FASTPE_NO_UNROLL
    for (int g0 = 0; g0 < (one ? 1 : kPlaces / 8); g0 += kGroup) {
      float acc[kGroup][4];
      const float* rows_of[kGroup];
      FASTPE_UNROLL
      for (int n = 0; n < kGroup; ++n) {
        const int32_t id = one ? first : entry_of(8 * (g0 + n) + int(lane_index() >> 2));
        rows_of[n] = id < 0 ? nullptr : table + id * e.sn;
        FASTPE_UNROLL
        for (int z = 0; z < 4; ++z) acc[n][z] = 0;
      }
      FASTPE_NO_UNROLL
      for (int k0 = 0; k0 < d; k0 += 16) {
        const int c0 = k0 + int(frag_col(0));
        SplitRows<kParts<T>> a;
        FASTPE_UNROLL
        for (int z = 0; z < 4; ++z) {
          const int c = c0 + 8 * (z >> 1);
          a.set(z, split<kParts<T>>(channel(mine[z & 1], c, d), channel(mine[z & 1], c + 1, d)));
        }
        FASTPE_UNROLL
        for (int n = 0; n < kGroup; ++n) {
          if (one && n > 0) continue;
          const auto b0 = split<kParts<T>>(channel(rows_of[n], c0, d), channel(rows_of[n], c0 + 1, d));
          const auto b1 = split<kParts<T>>(channel(rows_of[n], c0 + 8, d), channel(rows_of[n], c0 + 9, d));
          mma_split(acc[n], a, b0, b1);
        }
      }
      if (one) {
        // All columns are alike.
        FASTPE_NO_UNROLL
        for (int n = 0; n < 8; ++n)
          FASTPE_UNROLL
          for (int z = 0; z < 4; ++z) put(int(frag_row(uint32_t(z >> 1))), 8 * n + int(frag_col(uint32_t(z & 1))), acc[0][z]);
        continue;
      }
      FASTPE_UNROLL
      for (int n = 0; n < kGroup; ++n)
        FASTPE_UNROLL
        for (int z = 0; z < 4; ++z) {
          const int m = int(frag_row(uint32_t(z >> 1))), o = 8 * (g0 + n) + int(frag_col(uint32_t(z & 1))) + m - 15;
          if (o >= 0 && o < 64) put(m, o, acc[n][z]);
        }
    }
  }
}

// The same out of line: where two passes' accumulators are held meanwhile, its registers would spill them in calls that have
// no products too.
template <class T, int kGroup>
FASTPE_NOINLINE void make_terms_apart(const AttnParams& p, int64_t b, int64_t h, int64_t i0, int64_t j0, int rows, int keys, uint32_t tile) {
  make_terms<T, kGroup>(p, b, h, i0, j0, rows, keys, tile);
}

// out[m][c] += sum over k of a(m, k) * row(k)[c] for the first `valid` of 16 rows m and d channels c, by one warp. k < count, a
// multiple of 16; row(k) is null where it is zero. A lane always has the same entries of `out`.
template <class T, class A, class Row>
FASTPE_DEVICE void add_products(float* out, int valid, int d, int count, A&& a, Row&& row) {
  constexpr int kColumns = 4;
  const int g = int(lane_index() >> 2), t = int(frag_col(0));
  FASTPE_NO_UNROLL
  for (int c0 = 0; c0 < d; c0 += 8 * kColumns) {
    float acc[kColumns][4];
    FASTPE_UNROLL
    for (int n = 0; n < kColumns; ++n)
      FASTPE_UNROLL
      for (int z = 0; z < 4; ++z) acc[n][z] = 0;
    FASTPE_NO_UNROLL
    for (int k1 = 0; k1 < count; k1 += 16) {
      const int k0 = k1 + t;
      SplitRows<kParts<T>> x;
      const float* r[4];
      FASTPE_UNROLL
      for (int z = 0; z < 4; ++z) {
        const int m = g + 8 * (z & 1), k = k0 + 8 * (z >> 1);
        x.set(z, split<kParts<T>>(a(m, k), a(m, k + 1)));
        r[z] = row(k0 + 8 * (z >> 1) + (z & 1));
      }
      FASTPE_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        const int c = c0 + 8 * n + g;
        mma_split(acc[n], x, split<kParts<T>>(channel(r[0], c, d), channel(r[1], c, d)), split<kParts<T>>(channel(r[2], c, d), channel(r[3], c, d)));
      }
    }
    FASTPE_UNROLL
    for (int n = 0; n < kColumns; ++n)
      FASTPE_UNROLL
      for (int z = 0; z < 4; ++z) {
        const int m = g + 8 * (z >> 1), c = c0 + 8 * n + t + (z & 1);
        if (m < valid && c < d) out[int64_t(m) * d + c] += acc[n][z];
      }
  }
}

}  // namespace fastpe::cuda
