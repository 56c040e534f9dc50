// Backward landmark attention on mma.sync, for sm_80 and newer: two passes that recompute the scores, as attn_bwd.cuh, with
// the tiles of landmark.cuh. Only the outer lse is saved. With g = sum_j p_j dP_j over an earlier block, p its inner softmax
// and a its landmark's share:
//   P_j = a p_j,  dS_j = P_j (dP_j - g)         keys of an earlier block
//   dS = a (g - delta)                          its landmark
//   P_j = exp2(S_j - lse), dS_j = P_j (dP_j - delta)   keys of the own block
//
// landmark_bwd_q_kernel: one block per (batch, head, 64 queries) walks the tiles: dQ += dS K.
// landmark_bwd_kv_kernel: one block per (batch, kv head, tile) walks the heads of the group and their blocks of queries:
// dV += P^T dO, dK += dS^T Q. The sums of a block run along a row, so here too the rows of fragments are queries, and P and dS
// go through shared memory to be transposed. A tile of a long block reads the other tiles of that block for its sums.
#pragma once

#include "../landmark.cuh"
#include "attn_bwd.cuh"

namespace fastpe::cuda {

struct LandmarkBwdArgs {
  BwdArgs g;
  LandmarkPlan plan;
};

template <int kD>
struct LandmarkBwdTile {
  using Bwd = BwdTile<kD>;
  static constexpr uint32_t kQueryBytes = 4 * Bwd::kTileBytes;                            // of the query pass
  static constexpr uint32_t kP = kQueryBytes, kDs = kP + kBwdBlock * kBlockN * 2, kBytes = kDs + kBwdBlock * kBlockN * 2;
};

// What stays with the two rows of a lane.
struct LandmarkBwdRows {
  LandmarkRows r;
  float lse[2], delta[2];

  template <class RowOf>
  FASTPE_DEVICE LandmarkBwdRows(const LandmarkBwdArgs& a, int64_t b, int64_t h, RowOf&& row_of) : r(a.g.a.fwd, a.plan, b, row_of) {
    const AttnParams& p = a.g.a.fwd;
    const float kInf = __builtin_inff();
    FASTPE_UNROLL
    for (int x = 0; x < 2; ++x) {
      const int64_t at = (b * p.H + h) * p.Nq + (row_of(x) < p.Nq ? row_of(x) : p.Nq - 1);
      const float v = static_cast<const float*>(p.lse)[at];
      // Rows that see nothing, and rows past the last one, have P = 0.
      lse[x] = v == -kInf || row_of(x) >= p.Nq ? kInf : v * float(kLog2e);
      delta[x] = a.g.delta[at];
    }
  }
};

// From scores and dP to P and dS. `inner`: sums of a long block, for whose tiles s holds e instead of the scores where a row is
// past it. Without kDs, dp is neither read nor written.
template <bool kDs>
FASTPE_DEVICE void landmark_gradient(float (&s)[kLandmarkN][4], float (&dp)[kLandmarkN][4], const LandmarkTile& t, const LandmarkBwdRows& q, const LandmarkBits (&bits)[2], int32_t own_last, const InnerSoftmax (&inner)[2]) {
  // The keys and the landmark of a block, whose share is `outer`.
  const auto hand_on = [&](int x, uint64_t keys, uint64_t mark, const InnerSoftmax& in, float outer) {
    const float inverse = in.sum == 0 ? 0.f : 1.f / in.sum, factor = outer * inverse, mean = in.along * inverse;
    const float of_landmark = outer == 0 ? 0.f : outer * (mean - q.delta[x]);
    FASTPE_UNROLL
    for (int n = 0; n < kLandmarkN; ++n)
      FASTPE_UNROLL
      for (int e = 0; e < 2; ++e) {
        float &v = s[n][2 * x + e], &d = dp[n][2 * x + e];
        if (keys >> (8 * n + e) & 1) {
          v *= factor;
          if constexpr (kDs) d = v == 0 ? 0.f : v * (d - mean);
        } else if (kDs && (mark >> (8 * n + e) & 1)) {
          d = of_landmark;
        }
      }
  };
  if (t.long_block()) {
    FASTPE_UNROLL
    for (int x = 0; x < 2; ++x) hand_on(x, bits[x].inner, bits[x].landmark, inner[x], q.r.own[x] > t.begin ? ex2_approx(inner[x].landmark - q.lse[x]) : 0.f);
  } else {
    for_blocks(t, own_last, [&](int begin, int z) {
      const uint64_t keys = (t.ordinary & bits_between(begin, z, 0)) >> frag_col(0), mark = (t.landmark & uint64_t(1) << z) >> frag_col(0);
      FASTPE_UNROLL
      for (int x = 0; x < 2; ++x) {
        const bool past = q.r.own[x] > t.begin + z;
        const float score = score_of(s, x, mark);
        InnerSoftmax in;
        in.add<kDs>(s, dp, x, past ? keys : 0);
        hand_on(x, past ? keys : 0, past ? mark : 0, in, past && (t.landmark >> z & 1) ? ex2_approx(score - q.lse[x]) : 0.f);
      }
    });
  }
  // The rows' own keys; everything else is 0.
  FASTPE_UNROLL
  for (int x = 0; x < 2; ++x)
    FASTPE_UNROLL
    for (int n = 0; n < kLandmarkN; ++n)
      FASTPE_UNROLL
      for (int e = 0; e < 2; ++e) {
        float &v = s[n][2 * x + e], &d = dp[n][2 * x + e];
        const bool past = bits[x].inner >> (8 * n + e) & 1;
        if (bits[x].own >> (8 * n + e) & 1) {
          v = ex2_approx(v - q.lse[x]);
          // An infinite dO times a hidden key must not leak.
          if constexpr (kDs) d = v == 0 ? 0.f : v * (d - q.delta[x]);
        } else {
          if (!past) v = 0;
          if (kDs && !past && !(bits[x].landmark >> (8 * n + e) & 1)) d = 0;
        }
      }
}

template <class T, int kD>
FASTPE_KERNEL(kBwdThreads, 1) landmark_bwd_q_kernel(const FASTPE_GRID_CONSTANT LandmarkBwdArgs a) {
  using Shape = BwdTile<kD>;
  const BwdArgs& g = a.g;
  const AttnParams& p = g.a.fwd;
  const int64_t nqb = tiles::ceil_div(p.Nq, kBwdBlock), bh = block_index() / nqb, qb = nqb - 1 - block_index() % nqb;
  const int64_t b = bh / p.H, h = bh % p.H, hk = h / (p.H / p.Hk);
  const int64_t i0 = qb * kBwdBlock;
  const int rows = int(p.Nq - i0 < kBwdBlock ? p.Nq - i0 : kBwdBlock);
  const int64_t I1 = i0 + p.Nk - p.Nq + rows;
  const uint32_t smem = shared_base(), sQ = smem + Shape::kQ, sO = smem + Shape::kDo, sK = smem + Shape::kK, sV = smem + Shape::kV;
  const LandmarkBwdRows q(a, b, h, [&](int x) { return i0 + int64_t(warp_index() * 16 + frag_row(uint32_t(x))); });
  const float c = float(p.scale) * float(kLog2e);

  load_tile<kD, kBwdBlock, kBwdThreads>(sQ, row_at(g.q, b, h, i0), g.q.sn, rows, int(p.D), g.aligned_q);
  load_tile<kD, kBwdBlock, kBwdThreads>(sO, row_at(g.a.d_o, b, h, i0), g.a.d_o.sn, rows, int(p.Dv), g.aligned_do);
  cp_async_commit();
  float dq[kD / 8][4];
  FASTPE_UNROLL
  for (int d = 0; d < kD / 8; ++d)
    FASTPE_UNROLL
    for (int e = 0; e < 4; ++e) dq[d][e] = 0;
  InnerSoftmax inner[2];  // of a long block

  const LandmarkTile* tile = a.plan.tile + a.plan.plan(b) * a.plan.most;
  const int32_t own_last = landmark_own(a.plan, b, I1 - 1);
  LandmarkWalk walk(tile, 0, I1 > 0 ? a.plan.tile_of[a.plan.plan(b) * p.Nk + I1 - 1] + 1 : 0, own_last);
  FASTPE_NO_UNROLL
  for (walk.next(); walk.t >= 0; walk.next()) {
    const LandmarkTile t = tile[walk.t];
    // Everyone has finished with the tiles of the round before.
    sync_block();
    load_keys<kD, kBwdThreads>(sK, row_at(g.k, b, hk, t.begin), g.k.sn, t.ordinary | t.landmark, int(p.D), g.aligned_k);
    load_keys<kD, kBwdThreads>(sV, row_at(p.v, b, hk, t.begin), p.v.sn, t.ordinary, int(p.Dv), g.aligned_v);
    cp_async_commit();
    LandmarkBits bits[2];
    FASTPE_UNROLL
    for (int x = 0; x < 2; ++x) bits[x] = landmark_bits(t, q.r, x);
    cp_async_wait<0>();
    sync_block();
    float s[kLandmarkN][4], dp[kLandmarkN][4];
    product_nt<T, kD>(s, sQ, sK);
    product_nt<T, kD>(dp, sO, sV);
    FASTPE_UNROLL
    for (int n = 0; n < kLandmarkN; ++n)
      FASTPE_UNROLL
      for (int e = 0; e < 4; ++e) s[n][e] *= c;
    if (walk.sums) {
      // From the last tile of the block to its first.
      if (walk.t == t.last - 1) inner[0] = inner[1] = InnerSoftmax{};
      add_tile<true>(inner, s, dp, t, q.r, bits);
      continue;
    }
    if (t.long_block()) {
      FASTPE_UNROLL
      for (int x = 0; x < 2; ++x) {
        InnerSoftmax tile_alone;
        tile_alone.top = inner[x].top;
        tile_alone.add<false>(s, dp, x, bits[x].inner);
      }
    }
    landmark_gradient<true>(s, dp, t, q, bits, own_last, inner);
    product_nn<T, kD>(dq, dp, sK);
  }
  cp_async_wait<0>();
  store_unrotated<T, kD>(dq, float(p.scale), smem, g.a.dq, b, h, i0, rows, p.D, [&](int64_t) { return p.q_rope; }, p.rope_pairs, p.rope_layout);
}

// C fragments to a 16-bit tile, and acc += A^T B: A such a tile, queries along its rows, B 64 rows of kD channels.
template <class T>
FASTPE_DEVICE void fragments_to_tile(uint32_t tile, const float (&c)[kLandmarkN][4]) {
  FASTPE_UNROLL
  for (int n = 0; n < kLandmarkN; ++n)
    FASTPE_UNROLL
    for (int x = 0; x < 2; ++x) st_shared_b32(tile + Tile<kBlockN>::at(warp_index() * 16 + frag_row(uint32_t(x)), uint32_t(n)) + 2 * frag_col(0), T::pack(c[n][2 * x], c[n][2 * x + 1]));
}
template <class T, int kD>
FASTPE_DEVICE void product_tn(float (&acc)[kD / 8][4], uint32_t a, uint32_t b) {
  FASTPE_UNROLL
  for (int k = 0; k < kBwdBlock / 16; ++k) {
    uint32_t fa[4], fb[4];
    // .trans of the pattern for B: rows of the tile along k, so registers 1 and 2 of an A operand change places.
    ldmatrix_x4_trans(fb, fragment_at<kBlockN>(a, 16 * k, 2 * warp_index()));
    fa[0] = fb[0], fa[1] = fb[2], fa[2] = fb[1], fa[3] = fb[3];
    FASTPE_UNROLL
    for (int d = 0; d < kD / 16; ++d) {
      ldmatrix_x4_trans(fb, fragment_at<kD>(b, 16 * k, 2 * d));
      mma<T>(acc[2 * d], fa, fb[0], fb[1]);
      mma<T>(acc[2 * d + 1], fa, fb[2], fb[3]);
    }
  }
}

// kDk, kDv: which of the two gradients this launch forms, as in attn_bwd.cuh.
template <class T, int kD, bool kDk, bool kDv>
FASTPE_KERNEL(kBwdThreads, 1) landmark_bwd_kv_kernel(const FASTPE_GRID_CONSTANT LandmarkBwdArgs a) {
  using Shape = BwdTile<kD>;
  const BwdArgs& g = a.g;
  const AttnParams& p = g.a.fwd;
  const int64_t bk = block_index() / a.plan.most, mine = block_index() % a.plan.most, b = bk / p.Hk, hk = bk % p.Hk;
  if (mine >= a.plan.count[a.plan.plan(b)]) return;
  const LandmarkTile* tile = a.plan.tile + a.plan.plan(b) * a.plan.most;
  const LandmarkTile own = tile[mine];
  const int64_t offset = p.Nk - p.Nq, nqb = tiles::ceil_div(p.Nq, kBwdBlock), group = p.H / p.Hk;
  const uint32_t smem = shared_base(), sQ = smem + Shape::kQ, sO = smem + Shape::kDo, sK = smem + Shape::kK, sV = smem + Shape::kV;
  const uint32_t sP = smem + LandmarkBwdTile<kD>::kP, sDs = smem + LandmarkBwdTile<kD>::kDs;
  const float c = float(p.scale) * float(kLog2e);

  constexpr int kDkTiles = kDk ? kD / 8 : 1, kDvTiles = kDv ? kD / 8 : 1;
  float dk[kDkTiles][4], dv[kDvTiles][4];
  FASTPE_UNROLL
  for (int e = 0; e < 4; ++e) {
    FASTPE_UNROLL
    for (int d = 0; d < kDkTiles; ++d) dk[d][e] = 0;
    FASTPE_UNROLL
    for (int d = 0; d < kDvTiles; ++d) dv[d][e] = 0;
  }
  int32_t loaded = -1;  // tile whose keys and values are in shared memory
  const auto load = [&](int32_t t) {
    if (loaded == t) return;
    loaded = t;
    const LandmarkTile& u = tile[t];
    load_keys<kD, kBwdThreads>(sK, row_at(g.k, b, hk, u.begin), g.k.sn, u.ordinary | u.landmark, int(p.D), g.aligned_k);
    if constexpr (kDk) load_keys<kD, kBwdThreads>(sV, row_at(p.v, b, hk, u.begin), p.v.sn, u.ordinary, int(p.Dv), g.aligned_v);
  };

  FASTPE_NO_UNROLL
  for (int64_t x = 0; x < group; ++x) {
    const int64_t h = hk * group + x;
    FASTPE_NO_UNROLL
    for (int64_t qb = 0; qb < nqb; ++qb) {
      const int64_t i0 = qb * kBwdBlock;
      const int rows = int(p.Nq - i0 < kBwdBlock ? p.Nq - i0 : kBwdBlock);
      const int64_t I1 = i0 + offset + rows;
      if (I1 <= own.begin) continue;
      const int32_t own_last = landmark_own(a.plan, b, I1 - 1);
      const bool sums = own.long_block() && own_last > own.begin;
      // Everyone has finished with the tiles of the round before.
      sync_block();
      load_tile<kD, kBwdBlock, kBwdThreads>(sQ, row_at(g.q, b, h, i0), g.q.sn, rows, int(p.D), g.aligned_q);
      load_tile<kD, kBwdBlock, kBwdThreads>(sO, row_at(g.a.d_o, b, h, i0), g.a.d_o.sn, rows, int(p.Dv), g.aligned_do);
      const LandmarkBwdRows q(a, b, h, [&](int z) { return i0 + int64_t(warp_index() * 16 + frag_row(uint32_t(z))); });
      InnerSoftmax inner[2];
      float s[kLandmarkN][4], dp[kLandmarkN][4];
      LandmarkBits bits[2];
      // The other tiles of the block for their sums, then the own one.
      FASTPE_NO_UNROLL
      for (int32_t t = sums ? own.first : int32_t(mine);;) {
        const bool last = !sums || t == own.last;
        if (sums && t == mine) {
          ++t;
          continue;
        }
        const int32_t at = last ? int32_t(mine) : t;
        if (loaded >= 0 && loaded != at) sync_block();
        load(at);
        cp_async_commit();
        const LandmarkTile u = tile[at];
        FASTPE_UNROLL
        for (int z = 0; z < 2; ++z) bits[z] = landmark_bits(u, q.r, z);
        cp_async_wait<0>();
        sync_block();
        product_nt<T, kD>(s, sQ, sK);
        if constexpr (kDk) product_nt<T, kD>(dp, sO, sV);
        FASTPE_UNROLL
        for (int n = 0; n < kLandmarkN; ++n)
          FASTPE_UNROLL
          for (int e = 0; e < 4; ++e) s[n][e] *= c;
        if (sums) add_tile<kDk>(inner, s, dp, u, q.r, bits);
        if (last) break;
        ++t;
      }
      landmark_gradient<kDk>(s, dp, own, q, bits, own_last, inner);
      if constexpr (kDv) fragments_to_tile<T>(sP, s);
      if constexpr (kDk) fragments_to_tile<T>(sDs, dp);
      sync_block();
      if constexpr (kDv) product_tn<T, kD>(dv, sP, sO);
      if constexpr (kDk) product_tn<T, kD>(dk, sDs, sQ);
    }
  }
  cp_async_wait<0>();
  const int keys = int(own.end - own.begin);
  if constexpr (kDk)
    if (g.a.dk.p) store_unrotated<T, kD>(dk, float(p.scale), smem, g.a.dk, b, hk, own.begin, keys, p.D, [&](int64_t) { return p.k_rope; }, p.rope_pairs, p.rope_layout);
  if constexpr (kDv)
    if (g.a.dv.p) store_unrotated<T, kD>(dv, 1.f, smem, g.a.dv, b, hk, own.begin, keys, p.Dv, [](int64_t) { return Rope{}; }, 0, p.rope_layout);
}

}  // namespace fastpe::cuda
