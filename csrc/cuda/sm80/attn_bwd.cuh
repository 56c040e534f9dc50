// Backward attention on mma.sync, for sm_80 and newer: two passes that recompute the scores, no atomics, every sum in a
// fixed order.
//
// attn_bwd_q_kernel: one block per (batch, head, 64 queries) walks the key tiles. Rows of fragments are queries.
//   S = Q K^T, dP = dO V^T, P = exp2(S - lse), dS = P (dP - delta), dQ += dS K
//   and what belongs to a query row: gradients of row weight, row scale, query position, and the block's share of the two
//   bias numbers.
// attn_bwd_kv_kernel: one block per (batch, kv head, 64 keys) walks the heads of the group and their blocks of queries.
// Rows of fragments are keys.
//   S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q
//   and the gradient of key positions, one row per head.
// Shared memory: four tiles (Q, dO, K, V) of 64 rows, and 64 numbers of each kind below per query. The accumulators leave
// through it in float32, where the rotation is undone before the only rounding.
//
// delta_i = <dO_i, O_i> - dlse_i. Q and K come rotated. Tiles no pair of which is visible are not touched. With regions
// (pos/region.h) the tiles of one follow those of the other; dQ and dK of each are un-rotated and added in float32.
#pragma once

#include "../strips.cuh"
#include "../plan.h"
#include "../visible_tile.cuh"

namespace fastpe::cuda {

struct BwdArgs {
  AttnBwdParams a;
  View q, k;      // rotated; a copy for every region
  int64_t q_copy, k_copy;  // from one region's to the next; 0: one for all
  float *dq_sum, *dk_sum;  // (B,H,Nq,D), (B,Hk,Nk,D): with regions, what they have added up; else null
  Spans spans;
  float* delta;   // (B,H,Nq)
  // Sums of one row or one block, float, dense; null: not asked for.
  float *dgamma, *drho;       // (B,H,Nq)
  float* du;                  // (B,planes * H,Nq)
  float* dparams;             // (B,H,query blocks,2)
  float* dw;                  // (B,planes * H,Nk)
  int planes;                 // 2: two_sided, the past's and the future's; else 1
  float* term_sums;           // of one term after the other: attn_bwd_terms.cuh
  bool aligned_q, aligned_k, aligned_v, aligned_do;
};

constexpr int kBwdBlock = 64, kBwdThreads = 128;
template <int kD>
struct BwdTile {
  static constexpr uint32_t kTileBytes = kBwdBlock * kD * 2;
  static constexpr uint32_t kQ = 0, kDo = kTileBytes, kK = 2 * kTileBytes, kV = 3 * kTileBytes;
  static constexpr uint32_t kRow = 4 * kTileBytes, kTable = kRow + 8 * kBwdBlock * 4, kBytes = kTable + 2 * kBwdBlock * 4;
  // Composed scores: a tile of S, in the place of the table, and one of dP. Above 128 channels they do not both fit beside
  // the operands; dP then takes the place of the operand that is loaded anew every round and no longer needed.
  static constexpr bool kOverlay = kD > 128;
  static constexpr uint32_t kS = kTable, kDp = kS + kScoreBytes;
  static constexpr uint32_t kTerms = kOverlay ? kDp : kDp + kScoreBytes;  // where there are products with tables
  static constexpr uint32_t bytes(Kind k, bool products) { return k != Kind::composed ? kBytes : products ? kTerms + kTermBytes : kTerms; }
};
static_assert(BwdTile<256>::bytes(Kind::composed, true) <= 163 * 1024, "more than a block of compute capability 8.0 may have");

// delta, one warp per row.
template <class T>
FASTPE_KERNEL(128, 1) delta_kernel(const FASTPE_GRID_CONSTANT BwdArgs g) {
  const AttnParams& p = g.a.fwd;
  const int64_t row = int64_t(block_index()) * 4 + warp_index();
  if (row >= p.B * p.H * p.Nq) return;
  const int64_t i = row % p.Nq, h = row / p.Nq % p.H, b = row / p.Nq / p.H;
  const Stored<T> *x = row_at<T>(g.a.d_o, b, h, i), *y = row_at<T>(p.o, b, h, i), *z = p.residual.p ? row_at<T>(p.residual, b, h, i) : nullptr;
  float sum = 0;
  for (int64_t d = lane_index(); d < p.Dv; d += 32) sum += T::wide(x[d]) * (T::wide(y[d]) + (z ? T::wide(z[d]) : 0.f));
  FASTPE_UNROLL
  for (uint32_t step = 16; step > 0; step /= 2) sum += shfl_xor(sum, step);
  const bool empty = static_cast<const float*>(p.lse)[row] == -__builtin_inff();
  if (lane_index() == 0) g.delta[row] = sum - (g.a.dlse && !empty ? static_cast<const float*>(g.a.dlse)[row] : 0.f);
}

// Value of a form at d and its derivatives.
struct PhiGrad {
  float value, slope, p0, p1;
};
FASTPE_NOINLINE PhiGrad phi_grad(BiasForm form, float d, float p0, float p1) {
  PhiGrad r{0, 0, 0, 0};
  pos::with_form(form, [&](auto f) {
    using F = decltype(f);
    r = {F::value(d, p0, p1), F::slope(d, p0, p1), F::d_p0(d, p0, p1), F::d_p1(d, p0, p1)};
  });
  return r;
}

// acc[d][e] of each warp's 16 rows, times `factor`, to global memory with the rotation undone. rope_of(token): its table, or
// null tables. `sums`, if not null, holds (token, D) numbers of the same head: added to unless `first`, and written instead of
// `out` unless `last`. The whole block calls it; shared memory of two operand tiles is overwritten.
template <class T, int kD, class RopeOf>
FASTPE_DEVICE void store_unrotated(float (&acc)[kD / 8][4], float factor, uint32_t smem, const View& out, int64_t b, int64_t h, int64_t n0, int rows, int64_t D, RopeOf&& rope_of, int64_t J, RopeLayout layout, float* sums = nullptr, bool first = true, bool last = true) {
  constexpr uint32_t kPitch = kD * 4;
  sync_block();
  FASTPE_UNROLL
  for (int d = 0; d < kD / 8; ++d)
    FASTPE_UNROLL
    for (int e = 0; e < 4; ++e) st_shared_f32(smem + (warp_index() * 16 + frag_row(e >> 1)) * kPitch + (8 * d + frag_col(e & 1)) * 4, acc[d][e] * factor);
  sync_block();
  const int slots = int(D / 2);
  FASTPE_NO_UNROLL
  for (int item = int(thread_index()); item < rows * slots; item += kBwdThreads) {
    const int row = item / slots, slot = item % slots;
    const Rope rope = rope_of(n0 + row);
    const bool rotated = rope.cos.p && slot < J, half = rotated && layout == RopeLayout::half;
    const int one = half ? slot : 2 * slot, two = half ? slot + int(J) : 2 * slot + 1;
    float x = ld_shared_f32(smem + uint32_t(row) * kPitch + one * 4), y = ld_shared_f32(smem + uint32_t(row) * kPitch + two * 4);
    if (rotated) pos::rotate_pair(x, y, aux_at<float>(rope.cos, b, h, n0 + row)[slot], -aux_at<float>(rope.sin, b, h, n0 + row)[slot]);
    if (sums) {
      float* s = sums + (n0 + row) * D;
      if (!first) x += s[one], y += s[two];
      s[one] = x, s[two] = y;
    }
    if (!last) continue;
    Stored<T>* to = static_cast<Stored<T>*>(out.p) + b * out.sb + h * out.sh + (n0 + row) * out.sn;
    to[one] = T::narrow(x);
    to[two] = T::narrow(y);
  }
}

// What the gradients of a row's weight, of positions and of the two numbers weigh dS with. d: difference of positions.
template <Kind kKind>
FASTPE_DEVICE PhiGrad bias_gradient(const AttnParams& p, int64_t b, int64_t h, int64_t I, int64_t j, float d, float gm, float p0, float p1) {
  if constexpr (kKind == Kind::composed) {
    if (p.bias.form == BiasForm::fire) {
      const FireAt f = fire_at(p, h, d, I - j, gm);
      return {f.slope * f.n, 0, 0, 0};
    }
    if (p.bias.form == BiasForm::two_sided) {
      const SideAt side = side_at(p, b, h, I, j);
      return {side.sign * side.d, side.sign, 0, 0};
    }
  }
  return phi_grad(p.bias.form, d, p0, p1);
}

template <class T, int kD, Kind kKind>
FASTPE_KERNEL(kBwdThreads, 1) attn_bwd_q_kernel(const FASTPE_GRID_CONSTANT BwdArgs g) {
  using Shape = BwdTile<kD>;
  constexpr int kNt = kBwdBlock / 8;
  const AttnParams& p = g.a.fwd;
  const float kInf = __builtin_inff();
  const int64_t nqb = tiles::ceil_div(p.Nq, kBwdBlock), bh = block_index() / nqb, qb = nqb - 1 - block_index() % nqb;
  const int64_t b = bh / p.H, h = bh % p.H, hk = h / (p.H / p.Hk);
  const int64_t offset = p.Nk - p.Nq, i0 = qb * kBwdBlock, I0 = i0 + offset;
  const int rows = int(p.Nq - i0 < kBwdBlock ? p.Nq - i0 : kBwdBlock);
  const int64_t I1 = I0 + rows;
  const pos::Band band{p.vis.left, p.vis.right, p.vis.sinks};
  const uint32_t smem = shared_base(), sQ = smem + Shape::kQ, sO = smem + Shape::kDo, sK = smem + Shape::kK, sV = smem + Shape::kV, sT = smem + Shape::kTable;
  Operand<T, kD> q_rows{sQ}, o_rows{sO}, k_rows{sK}, v_rows{sV};
  const auto local_row = [&](int x) { return int(warp_index() * 16 + frag_row(uint32_t(x))); };
  const auto row_of = [&](int x) { return i0 + local_row(x); };

  RowBias<kKind, 2> rb;
  rb.start(p, b, h, offset, row_of);
  const Softcap cap(p);
  float c[2], rho[2], lse[2], delta[2], drho[2] = {}, dgamma[2] = {}, du[2] = {}, du_future[2] = {}, dp0 = 0, dp1 = 0;
  FASTPE_UNROLL
  for (int x = 0; x < 2; ++x) {
    const int64_t i = row_of(x) < p.Nq ? row_of(x) : p.Nq - 1, at = bh * p.Nq + i;
    rho[x] = p.row_scale.p ? *aux_at<float>(p.row_scale, b, h, i) : 1.f;
    c[x] = float(p.scale) * rho[x] * float(kLog2e);
    const float v = static_cast<const float*>(p.lse)[at];
    // Rows that see nothing, and rows past the last one, have P = 0.
    lse[x] = v == -kInf || row_of(x) >= p.Nq ? kInf : v * float(kLog2e);
    delta[x] = g.delta[at];
  }
  const bool bias_grad = kHasPositions<kKind> && (g.du || g.dgamma || g.dparams);

  // One region after the other; without regions there is one.
  const int regions = pos::region_count(p.region.kind);
  FASTPE_NO_UNROLL
  for (int region = 0; region < regions; ++region) {
  // Shared memory is free: of the region before, or never used.
  q_rows.template load<kBwdThreads>(row_at<T>(g.q, b, h, i0) + region * g.q_copy, g.q.sn, rows, int(p.D), g.aligned_q);
  o_rows.template load<kBwdThreads>(row_at<T>(g.a.d_o, b, h, i0), g.a.d_o.sn, rows, int(p.Dv), g.aligned_do);
  cp_async_commit();
  float dq[kD / 8][4];
  FASTPE_UNROLL
  for (int d = 0; d < kD / 8; ++d)
    FASTPE_UNROLL
    for (int e = 0; e < 4; ++e) dq[d][e] = 0;

  TileWalk walk(band, I0, I1, p.Nk);
  FASTPE_NO_UNROLL
  for (int t = walk.next(); t >= 0; t = walk.next()) {
    const int64_t j0 = int64_t(t) * kBlockN, j1 = j0 + kBlockN < p.Nk ? j0 + kBlockN : p.Nk;
    const pos::Range see = pos::keys_in_tile(band, I0, I1, j0, j1);
    if (see.lo >= see.hi || !tile_has_region(p, region, I0, I1, j0, j1) || !tile_may_see(p, g.spans, b, h, qb, i0, i0 + rows, t, j0, j1)) continue;
    const int keys = int(j1 - j0);
    // Everyone has finished with the tiles of the round before.
    sync_block();
    k_rows.template load<kBwdThreads>(row_at<T>(g.k, b, hk, j0) + region * g.k_copy, g.k.sn, keys, int(p.D), g.aligned_k);
    v_rows.template load<kBwdThreads>(row_at<T>(p.v, b, hk, j0), p.v.sn, keys, int(p.Dv), g.aligned_v);
    cp_async_commit();
    if constexpr (kKind == Kind::table) {
      const float* table = aux_at<float>(p.bias.table, 0, h);
      const int x = int(thread_index());
      if (x < 2 * kBwdBlock - 1) st_shared_f32(sT + 4 * x, table[pos::table_index(p.bias.form, I0 - j0 - (kBlockN - 1) + x, p.bias.table_len)] * float(kLog2e));
    }
    if constexpr (kKind == Kind::composed)
      if (has_products(p)) make_terms<T, (kD > 64 ? 2 : 5)>(p, b, h, i0, j0, rows, keys, smem + Shape::kTerms);
    cp_async_wait<0>();
    sync_block();
    const bool data = has_data(p.vis), shared = regions > 1 && !tile_has_one_region(p, I0, I1, j0, j1);
    const bool partial = keys < kBlockN || data || shared || !pos::tile_full(band, I0, I1, j0, j1);
    uint64_t seen[2] = {};
    if (partial) {
      FASTPE_UNROLL
      for (int x = 0; x < 2; ++x) seen[x] = keys_seen(p, band, region, shared, data, b, h, row_of(x), j0);
    }
    float s[kNt][4], dp[kNt][4];
    product_nt(s, q_rows, k_rows);
    product_nt(dp, o_rows, v_rows);

    rb.tile(j0, j1, I0, I1, band.right == 1);
    // From the product and dP of row x and a column of the tile to dS times what the product is multiplied by.
    const auto element = [&](int x, int col, float y, float raw, float dpv) {
      float v = raw * c[x], slope, outer = 1;
      if constexpr (kKind == Kind::composed) {
        if (col >= keys || row_of(x) >= p.Nq) return 0.f;
        const float term = has_products(p) ? ld_shared_f32(term_at(smem + Shape::kTerms, local_row(x), col)) : 0.f;
        const Composed made = compose(p, cap, b, h, row_of(x), j0 + col, v, rb.r[x] - y, rb.gm[x], rb.p0, rb.p1, term);
        v = made.x, slope = made.slope, outer = made.outer;
      } else {
        slope = cap.apply(v);
        if constexpr (kKind == Kind::table) v += ld_shared_f32(sT + 4 * uint32_t(local_row(x) + (kBlockN - 1) - col));
        else v = rb.add(x, v, y);
      }
      const bool visible = !partial || (seen[x] >> (uint32_t(col) - frag_col(0)) & 1);
      const float prob = visible ? ex2_approx(v - lse[x]) : 0.f;
      // An infinite dO times a hidden key must not leak.
      const float ds = prob == 0 ? 0.f : prob * (dpv - delta[x]);
      drho[x] += ds * slope * raw;
      if (bias_grad) {
        const PhiGrad f = bias_gradient<kKind>(p, b, h, row_of(x) + offset, j0 + col, rb.r[x] - y, rb.gm[x], rb.p0, rb.p1);
        const float db = ds * outer;
        dgamma[x] += db * f.value;
        if (kKind == Kind::composed && g.planes == 2 && j0 + col > row_of(x) + offset) du_future[x] += db * rb.gm[x] * f.slope;
        else du[x] += db * rb.gm[x] * f.slope;
        dp0 += db * rb.gm[x] * f.p0;
        dp1 += db * rb.gm[x] * f.p1;
      }
      return ds * slope * rho[x];
    };
    if constexpr (kKind == Kind::composed) {
      const uint32_t s1 = smem + Shape::kS, s2 = Shape::kOverlay ? sV : smem + Shape::kDp;
      if constexpr (Shape::kOverlay) sync_block();
      fragments_to(s1, s);
      fragments_to(s2, dp);
      sync_warp();
      for_own_rows([&](int x, int row, int col) {
        const uint32_t at = score_at(s1, row, col);
        st_shared_f32(at, element(x, col, rb.key(col, keys), ld_shared_f32(at), ld_shared_f32(score_at(s2, row, col))));
      });
      sync_warp();
      fragments_from(s1, s);
    } else {
      FASTPE_UNROLL
      for (int n = 0; n < kNt; ++n)
        FASTPE_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int col = int(8 * n + frag_col(uint32_t(e)));
          float y = 0;
          if constexpr (kHasPositions<kKind>) y = rb.key(col, keys);
          FASTPE_UNROLL
          for (int x = 0; x < 2; ++x) s[n][2 * x + e] = element(x, col, y, s[n][2 * x + e], dp[n][2 * x + e]);
        }
    }
    product_nn(dq, s, k_rows);
  }
  cp_async_wait<0>();
  if (g.a.dq.p) {
    const auto rope_of = [&](int64_t) { return region_rope(p.q_rope, region); };
    store_unrotated<T, kD>(dq, float(p.scale), smem, g.a.dq, b, h, i0, rows, p.D, rope_of, p.rope_pairs, p.rope_layout, g.dq_sum ? g.dq_sum + bh * p.Nq * p.D : nullptr, region == 0, region == regions - 1);
  }
  sync_block();
  }  // regions
  FASTPE_UNROLL
  for (int x = 0; x < 2; ++x) {
    const int64_t at = bh * p.Nq + row_of(x);
    FASTPE_UNROLL
    for (uint32_t step = 1; step < 4; step *= 2) {
      drho[x] += shfl_xor(drho[x], step);
      dgamma[x] += shfl_xor(dgamma[x], step);
      du[x] += shfl_xor(du[x], step);
      if constexpr (kKind == Kind::composed) du_future[x] += shfl_xor(du_future[x], step);
    }
    if ((lane_index() & 3) != 0 || row_of(x) >= p.Nq) continue;
    if (g.drho) g.drho[at] = drho[x] * float(p.scale);
    if (g.dgamma) g.dgamma[at] = dgamma[x];
    if (g.du) g.du[(b * g.planes * p.H + h) * p.Nq + row_of(x)] = du[x];
    if (kKind == Kind::composed && g.du && g.planes == 2) g.du[((b * 2 + 1) * p.H + h) * p.Nq + row_of(x)] = du_future[x];
  }
  if (g.dparams) {
    FASTPE_UNROLL
    for (uint32_t step = 1; step < 32; step *= 2) {
      dp0 += shfl_xor(dp0, step);
      dp1 += shfl_xor(dp1, step);
    }
    const uint32_t at = smem + Shape::kRow;
    if (lane_index() == 0) {
      st_shared_f32(at + warp_index() * 8, dp0);
      st_shared_f32(at + warp_index() * 8 + 4, dp1);
    }
    sync_block();
    if (thread_index() < 2) {
      float sum = 0;
      for (uint32_t w = 0; w < 4; ++w) sum += ld_shared_f32(at + w * 8 + thread_index() * 4);
      g.dparams[(bh * nqb + qb) * 2 + thread_index()] = sum;
    }
  }
}

// kDk, kDv: which of the two gradients this launch forms. Above 128 channels both accumulators do not fit the registers
// (2 KB spilled a thread), so there are two launches.
template <class T, int kD, Kind kKind, bool kDk, bool kDv>
FASTPE_KERNEL(kBwdThreads, 1) attn_bwd_kv_kernel(const FASTPE_GRID_CONSTANT BwdArgs g) {
  using Shape = BwdTile<kD>;
  constexpr int kNt = kBwdBlock / 8;
  const AttnParams& p = g.a.fwd;
  const float kInf = __builtin_inff();
  const int64_t nkt = tiles::ceil_div(p.Nk, kBlockN), nqb = tiles::ceil_div(p.Nq, kBwdBlock), group = p.H / p.Hk;
  const int64_t bk = block_index() / nkt, b = bk / p.Hk, hk = bk % p.Hk, j0 = block_index() % nkt * kBlockN;
  const int64_t offset = p.Nk - p.Nq, j1 = j0 + kBlockN < p.Nk ? j0 + kBlockN : p.Nk;
  const int keys = int(j1 - j0);
  const pos::Band band{p.vis.left, p.vis.right, p.vis.sinks};
  const uint32_t smem = shared_base(), sQ = smem + Shape::kQ, sO = smem + Shape::kDo, sK = smem + Shape::kK, sV = smem + Shape::kV, sT = smem + Shape::kTable;
  Operand<T, kD> q_rows{sQ}, o_rows{sO}, k_rows{sK}, v_rows{sV};
  // By query of the tile: scale with log2 e, row scale, lse, delta, position relative to the anchor, weight, weight * log2 e.
  const auto row_data = [&](int kind, int query) { return smem + Shape::kRow + uint32_t(kind * kBwdBlock + query) * 4; };
  const auto local_key = [&](int x) { return int(warp_index() * 16 + frag_row(uint32_t(x))); };

  const Softcap cap(p);
  constexpr int kDkTiles = kDk ? kD / 8 : 1, kDvTiles = kDv ? kD / 8 : 1;
  float dk[kDkTiles][4], dv[kDvTiles][4];
  FASTPE_UNROLL
  for (int e = 0; e < 4; ++e) {
    FASTPE_UNROLL
    for (int d = 0; d < kDvTiles; ++d) dv[d][e] = 0;
  }
  v_rows.template load<kBwdThreads>(row_at<T>(p.v, b, hk, j0), p.v.sn, keys, int(p.Dv), g.aligned_v);

  const int regions = pos::region_count(p.region.kind);
  FASTPE_NO_UNROLL
  for (int region = 0; region < regions; ++region) {
  k_rows.template load<kBwdThreads>(row_at<T>(g.k, b, hk, j0) + region * g.k_copy, g.k.sn, keys, int(p.D), g.aligned_k);
  cp_async_commit();
  FASTPE_UNROLL
  for (int e = 0; e < 4; ++e) {
    FASTPE_UNROLL
    for (int d = 0; d < kDkTiles; ++d) dk[d][e] = 0;
  }

  FASTPE_NO_UNROLL
  for (int64_t x = 0; x < group; ++x) {
    const int64_t h = hk * group + x, bh = b * p.H + h;
    float dw[2] = {}, dw_future[2] = {};
    FASTPE_NO_UNROLL
    for (int64_t qb = 0; qb < nqb; ++qb) {
      const int64_t i0 = qb * kBwdBlock, I0 = i0 + offset;
      const int rows = int(p.Nq - i0 < kBwdBlock ? p.Nq - i0 : kBwdBlock);
      const int64_t I1 = I0 + rows;
      const pos::Range see = pos::keys_in_tile(band, I0, I1, j0, j1);
      if (see.lo >= see.hi || !tile_has_region(p, region, I0, I1, j0, j1) || !tile_may_see(p, g.spans, b, h, qb, i0, i0 + rows, j0 / kBlockN, j0, j1)) continue;
      sync_block();
      q_rows.template load<kBwdThreads>(row_at<T>(g.q, b, h, i0) + region * g.q_copy, g.q.sn, rows, int(p.D), g.aligned_q);
      o_rows.template load<kBwdThreads>(row_at<T>(g.a.d_o, b, h, i0), g.a.d_o.sn, rows, int(p.Dv), g.aligned_do);
      cp_async_commit();
      // One query a thread: RowBias of that query alone.
      RowBias<kKind, 1> rb;
      const int mine = int(thread_index() % kBwdBlock);
      rb.start(p, b, h, offset, [&](int) { return i0 + mine; });
      rb.tile(j0, j1, I0, I1, band.right == 1);
      if (thread_index() < kBwdBlock) {
        const int64_t i = mine < rows ? i0 + mine : p.Nq - 1, at = bh * p.Nq + i;
        const float rho = p.row_scale.p ? *aux_at<float>(p.row_scale, b, h, i) : 1.f, lse = static_cast<const float*>(p.lse)[at];
        st_shared_f32(row_data(0, mine), float(p.scale) * rho * float(kLog2e));
        st_shared_f32(row_data(1, mine), rho);
        st_shared_f32(row_data(2, mine), lse == -kInf || mine >= rows ? kInf : lse * float(kLog2e));
        st_shared_f32(row_data(3, mine), g.delta[at]);
        if constexpr (kHasPositions<kKind>) {
          st_shared_f32(row_data(4, mine), rb.r[0]);
          st_shared_f32(row_data(5, mine), rb.gm[0]);
          st_shared_f32(row_data(6, mine), rb.g[0]);
        }
      }
      if constexpr (kKind == Kind::table) {
        const float* table = aux_at<float>(p.bias.table, 0, h);
        const int at = int(thread_index());
        if (at < 2 * kBwdBlock - 1) st_shared_f32(sT + 4 * at, table[pos::table_index(p.bias.form, I0 - j0 - (kBlockN - 1) + at, p.bias.table_len)] * float(kLog2e));
      }
      if constexpr (kKind == Kind::composed)
        if (has_products(p)) make_terms_apart<T, 5>(p, b, h, i0, j0, rows, keys, smem + Shape::kTerms);
      const bool data = has_data(p.vis), shared = regions > 1 && !tile_has_one_region(p, I0, I1, j0, j1);
      const bool partial = keys < kBlockN || rows < kBwdBlock || data || shared || !pos::tile_full(band, I0, I1, j0, j1);
      uint64_t seen[2] = {};
      if (partial) {
        FASTPE_UNROLL
        for (int z = 0; z < 2; ++z) seen[z] = queries_seen(p, band, region, shared, data, b, h, i0, rows, j0 + local_key(z));
      }
      cp_async_wait<0>();
      sync_block();
      float s[kNt][4], ds[kNt][4];
      product_nt(s, k_rows, q_rows);
      if constexpr (kDk) product_nt(ds, v_rows, o_rows);

      float y[2] = {};
      if constexpr (kHasPositions<kKind>) {
        y[0] = rb.key(local_key(0), keys);
        y[1] = rb.key(local_key(1), keys);
      }
      // From the product and dP of key z and a query of the tile to P and to dS times what the product is multiplied by.
      const auto element = [&](int z, int query, float& pv, float& dsv) {
        const float c = ld_shared_f32(row_data(0, query)), lse = ld_shared_f32(row_data(2, query));
        float weight = 0;
        if constexpr (kHasPositions<kKind>) {
          rb.r[0] = ld_shared_f32(row_data(4, query));
          weight = ld_shared_f32(row_data(5, query));
          rb.g[0] = ld_shared_f32(row_data(6, query));
        }
        const int64_t j = j0 + local_key(z);
        float v = pv * c, slope, outer = 1;
        if constexpr (kKind == Kind::composed) {
          if (j >= j1 || query >= rows) {
            pv = dsv = 0;
            return;
          }
          const float term = has_products(p) ? ld_shared_f32(term_at(smem + Shape::kTerms, query, local_key(z))) : 0.f;
          const Composed made = compose(p, cap, b, h, i0 + query, j, v, rb.r[0] - y[z], weight, rb.p0, rb.p1, term);
          v = made.x, slope = made.slope, outer = made.outer;
        } else {
          slope = cap.apply(v);
          if constexpr (kKind == Kind::table) v += ld_shared_f32(sT + 4 * uint32_t(query + (kBlockN - 1) - local_key(z)));
          else v = rb.add(0, v, y[z]);
        }
        const bool visible = !partial || (seen[z] >> (uint32_t(query) - frag_col(0)) & 1);
        pv = visible ? ex2_approx(v - lse) : 0.f;
        if constexpr (kDk) {
          const float rho = ld_shared_f32(row_data(1, query)), delta = ld_shared_f32(row_data(3, query));
          const float d = pv == 0 ? 0.f : pv * (dsv - delta);
          if constexpr (kHasPositions<kKind>)
            if (g.dw) {
              const float dy = d * outer * weight * bias_gradient<kKind>(p, b, h, I0 + query, j, rb.r[0] - y[z], weight, rb.p0, rb.p1).slope;
              if (kKind == Kind::composed && g.planes == 2 && j > I0 + query) dw_future[z] -= dy;
              else dw[z] -= dy;
            }
          dsv = d * slope * rho;
        }
      };
      if constexpr (kKind == Kind::composed) {
        // The keys' own tiles stay for all rounds; of the queries' tiles dO is read before dP is written only where dV is
        // not formed.
        const uint32_t s1 = smem + Shape::kS, s2 = Shape::kOverlay ? sO : smem + Shape::kDp;
        static_assert(!Shape::kOverlay || !(kDk && kDv));
        if constexpr (Shape::kOverlay && kDk) sync_block();
        fragments_to(s1, s);
        if constexpr (kDk) fragments_to(s2, ds);
        sync_warp();
        for_own_rows([&](int z, int key, int query) {
          float pv = ld_shared_f32(score_at(s1, key, query)), dsv = 0;
          if constexpr (kDk) dsv = ld_shared_f32(score_at(s2, key, query));
          element(z, query, pv, dsv);
          st_shared_f32(score_at(s1, key, query), pv);
          if constexpr (kDk) st_shared_f32(score_at(s2, key, query), dsv);
        });
        sync_warp();
        fragments_from(s1, s);
        if constexpr (kDk) fragments_from(s2, ds);
      } else {
        FASTPE_UNROLL
        for (int n = 0; n < kNt; ++n)
          FASTPE_UNROLL
          for (int e = 0; e < 2; ++e)
            FASTPE_UNROLL
            for (int z = 0; z < 2; ++z) element(z, int(8 * n + frag_col(uint32_t(e))), s[n][2 * z + e], ds[n][2 * z + e]);
      }
      if constexpr (kDv) product_nn(dv, s, o_rows);
      if constexpr (kDk) product_nn(dk, ds, q_rows);
    }
    if (kDk && g.dw) {
      FASTPE_UNROLL
      for (int z = 0; z < 2; ++z) {
        const auto put = [&](float v, int64_t plane) {
          v += shfl_xor(v, 1);
          v += shfl_xor(v, 2);
          if ((lane_index() & 3) != 0 || local_key(z) >= keys) return;
          float& to = g.dw[((b * g.planes + plane) * p.H + h) * p.Nk + j0 + local_key(z)];
          to = region == 0 ? v : to + v;
        };
        put(dw[z], 0);
        if (kKind == Kind::composed && g.planes == 2) put(dw_future[z], 1);
      }
    }
  }
  cp_async_wait<0>();
  if constexpr (kDk)
    if (g.a.dk.p) {
      const auto rope_of = [&](int64_t j) { return key_rope(p, region, j); };
      store_unrotated<T, kD>(dk, float(p.scale), smem, g.a.dk, b, hk, j0, keys, p.D, rope_of, p.rope_pairs, p.rope_layout, g.dk_sum ? g.dk_sum + bk * p.Nk * p.D : nullptr, region == 0, region == regions - 1);
    }
  sync_block();
  }  // regions
  if constexpr (kDv)
    if (g.a.dv.p) store_unrotated<T, kD>(dv, 1.f, smem, g.a.dv, b, hk, j0, keys, p.Dv, [](int64_t) { return Rope{}; }, 0, p.rope_layout);
}

}  // namespace fastpe::cuda
