// Forward landmark attention on mma.sync, for sm_80 and newer.
//
// Tiles: 64 queries x up to 64 keys, whole blocks of them (landmark.cuh). One block per (batch, head, 64 queries), and per
// split of the tiles where that is too little for a GPU; order, shared memory and the rounds are those of attn_fwd.cuh.
// A round for one tile:
//   S = Q K^T
//   top and alpha of the outer softmax: over the rows' own keys and the landmarks they are past
//   by block: inner softmax, times the landmark's share
//   O += P V
// A round for the sums of a long block ends after the inner sums and reads no values.
#pragma once

#include "../landmark.cuh"
#include "attn_bwd.cuh"
#include "attn_fwd.cuh"

namespace fastpe::cuda {

struct LandmarkFwdArgs {
  FwdArgs f;  // p, pre.k, splits and their parts, aligned
  LandmarkPlan plan;
};

template <class T, int kD>
FASTPE_KERNEL(FwdTile<kD>::kThreads, 1) landmark_fwd_kernel(const FASTPE_GRID_CONSTANT LandmarkFwdArgs a) {
  using Shape = FwdTile<kD>;
  constexpr int kBlockM = Shape::kBlockM, kThreads = Shape::kThreads, kDt = kD / 8;
  static_assert(kBlockM == 64 && kThreads == 128);
  const AttnParams& p = a.f.p;
  const float kInf = __builtin_inff();

  const int64_t group = p.H / p.Hk, nqb = tiles::ceil_div(p.Nq, kBlockM), per_bk = nqb * group;
  const int64_t all = p.B * p.Hk * per_bk, split = block_index() / all, in_split = block_index() % all;
  const int64_t bk = in_split / per_bk, rest = in_split % per_bk;
  const int64_t b = bk / p.Hk, hk = bk % p.Hk, h = hk * group + rest % group, qb = nqb - 1 - rest / group;
  const int64_t offset = p.Nk - p.Nq, i0 = qb * kBlockM, I0 = i0 + offset;
  const int rows = int(p.Nq - i0 < kBlockM ? p.Nq - i0 : kBlockM);
  const int64_t I1 = I0 + rows;
  const uint32_t smem = shared_base(), sQ = smem + Shape::kQ, sK = smem + Shape::kK, sV = smem + Shape::kV, warp_row = warp_index() * 16;
  const auto local_row = [&](int x) { return warp_row + frag_row(uint32_t(x)); };
  const auto row_of = [&](int x) { return i0 + int64_t(local_row(x)); };

  // ---- which tiles -------------------------------------------------------------------------------------------------------
  const LandmarkTile* tile = a.plan.tile + a.plan.plan(b) * a.plan.most;
  const int32_t own_first = landmark_own(a.plan, b, I0), own_last = landmark_own(a.plan, b, I1 - 1);
  int32_t lo = 0, hi = I1 > 0 ? a.plan.tile_of[a.plan.plan(b) * p.Nk + I1 - 1] + 1 : 0;
  if (a.f.splits > 1) {
    // A long block stays in one split.
    const int64_t n = a.plan.count[a.plan.plan(b)], from = n * split / a.f.splits, to = n * (split + 1) / a.f.splits;
    lo = from < n ? tile[from].first : int32_t(n);
    const int32_t end = to < n ? tile[to].first : int32_t(n);
    hi = hi < end ? hi : end;
  }
  LandmarkWalk walk(tile, lo, hi, own_last);
  walk.next();

  const auto start_keys = [&] {
    if (walk.t >= 0) {
      const LandmarkTile& t = tile[walk.t];
      load_keys<kD, kThreads>(sK, row_at(a.f.pre.k, b, hk, t.begin), a.f.pre.k.sn, t.ordinary | t.landmark, int(p.D), a.f.aligned_k);
    }
    cp_async_commit();
  };

  // ---- what stays with a row ---------------------------------------------------------------------------------------------
  const LandmarkRows r(p, a.plan, b, row_of);
  const float c = float(p.scale) * float(kLog2e);
  float m[2] = {-kInf, -kInf}, l[2] = {}, o[kDt][4];
  FASTPE_UNROLL
  for (int d = 0; d < kDt; ++d)
    FASTPE_UNROLL
    for (int e = 0; e < 4; ++e) o[d][e] = 0;
  InnerSoftmax inner[2];  // of a long block

  const uint16_t* q0 = row_at(p.q, b, h, i0);
  if (p.q_rope.cos.p) {
    constexpr uint32_t kChunks = Tile<kD>::kChunks;
    for (uint32_t item = thread_index(); item < kBlockM * kChunks; item += kThreads) {
      const uint32_t row = item / kChunks, chunk = item % kChunks;
      Quad v{};
      if (int(row) < rows && int64_t(chunk * 8) < p.D)
        v = load_chunk_rotated<T>(q0 + int64_t(row) * p.q.sn, chunk, aux_at<float>(p.q_rope.cos, b, h, i0 + row), aux_at<float>(p.q_rope.sin, b, h, i0 + row), uint32_t(p.rope_pairs), p.rope_layout);
      st_shared_v4(sQ + Tile<kD>::at(row, chunk), v);
    }
  } else {
    load_tile<kD, kBlockM, kThreads>(sQ, q0, p.q.sn, rows, int(p.D), a.f.aligned_q);
  }
  start_keys();

  FASTPE_NO_UNROLL
  while (walk.t >= 0) {
    const LandmarkTile t = tile[walk.t];
    const bool sums = walk.sums;
    cp_async_wait<0>();
    sync_block();
    if (!sums) load_keys<kD, kThreads>(sV, row_at(p.v, b, hk, t.begin), p.v.sn, t.ordinary, int(p.Dv), a.f.aligned_v);
    cp_async_commit();
    walk.next();

    float s[kLandmarkN][4];
    product_nt<T, kD>(s, sQ, sK);
    cp_async_wait<0>();
    sync_block();
    start_keys();

    FASTPE_UNROLL
    for (int n = 0; n < kLandmarkN; ++n)
      FASTPE_UNROLL
      for (int e = 0; e < 4; ++e) s[n][e] *= c;
    LandmarkBits bits[2];
    FASTPE_UNROLL
    for (int x = 0; x < 2; ++x) bits[x] = landmark_bits(t, r, x);
    if (sums) {
      // From the last tile of the block to its first.
      if (t.end == tile[t.last - 1].end) inner[0] = inner[1] = InnerSoftmax{};
      add_tile<false>(inner, s, s, t, r, bits);
      continue;
    }

    // ---- outer softmax: reference ------------------------------------------------------------------------------------------
    float safe[2];
    FASTPE_UNROLL
    for (int x = 0; x < 2; ++x) {
      float top = m[x];
      const uint64_t outer = bits[x].own | bits[x].landmark;
      FASTPE_UNROLL
      for (int n = 0; n < kLandmarkN; ++n)
        FASTPE_UNROLL
        for (int e = 0; e < 2; ++e)
          if (outer >> (8 * n + e) & 1) top = max(s[n][2 * x + e], top);
      top = quad_max(top);
      safe[x] = top == -kInf ? 0.f : top;
      const float alpha = ex2_approx(m[x] - safe[x]);
      m[x] = top;
      l[x] *= alpha;
      FASTPE_UNROLL
      for (int d = 0; d < kDt; ++d) {
        o[d][2 * x] *= alpha;
        o[d][2 * x + 1] *= alpha;
      }
    }

    // ---- blocks that rows are past ---------------------------------------------------------------------------------------------
    // e of the keys becomes P; `outer` is the landmark's share.
    const auto hand_on = [&](int x, uint64_t keys, const InnerSoftmax& in, float outer) {
      const float factor = in.sum == 0 ? 0.f : outer / in.sum;
      FASTPE_UNROLL
      for (int n = 0; n < kLandmarkN; ++n)
        FASTPE_UNROLL
        for (int e = 0; e < 2; ++e)
          if (keys >> (8 * n + e) & 1) s[n][2 * x + e] *= factor;
    };
    const auto count_landmark = [&](int x, float outer) {
      if ((lane_index() & 3) == 0) l[x] += outer;
    };
    if (t.long_block()) {
      FASTPE_UNROLL
      for (int x = 0; x < 2; ++x) {
        InnerSoftmax tile_alone;
        tile_alone.top = inner[x].top;
        tile_alone.add<false>(s, s, x, bits[x].inner);
        const float outer = r.own[x] > t.begin ? ex2_approx(inner[x].landmark - safe[x]) : 0.f;
        hand_on(x, bits[x].inner, inner[x], outer);
        if (t.closing) count_landmark(x, outer);
      }
    } else {
      for_blocks(t, own_last, [&](int begin, int z) {
        const uint64_t keys = (t.ordinary & bits_between(begin, z, 0)) >> frag_col(0), mark = (t.landmark & uint64_t(1) << z) >> frag_col(0);
        FASTPE_UNROLL
        for (int x = 0; x < 2; ++x) {
          const bool past = r.own[x] > t.begin + z;
          const float score = score_of(s, x, mark);
          const float outer = past && (t.landmark >> z & 1) ? ex2_approx(score - safe[x]) : 0.f;
          InnerSoftmax in;
          in.add<false>(s, s, x, past ? keys : 0);
          hand_on(x, past ? keys : 0, in, outer);
          count_landmark(x, outer);
        }
      });
    }

    // ---- the rows' own keys; everything else is 0 ------------------------------------------------------------------------------
    const bool has_own = t.end > own_first;
    FASTPE_UNROLL
    for (int x = 0; x < 2; ++x)
      FASTPE_UNROLL
      for (int n = 0; n < kLandmarkN; ++n)
        FASTPE_UNROLL
        for (int e = 0; e < 2; ++e) {
          float& v = s[n][2 * x + e];
          if (has_own && (bits[x].own >> (8 * n + e) & 1)) {
            v = ex2_approx(v - safe[x]);
            l[x] += v;
          } else if (!(bits[x].inner >> (8 * n + e) & 1)) {
            v = 0;
          }
        }
    product_nn<T, kD>(o, s, sV);
  }

  // ---- normalise and store -------------------------------------------------------------------------------------------------
  cp_async_wait<0>();
  FASTPE_UNROLL
  for (int x = 0; x < 2; ++x) l[x] = quad_sum(l[x]);
  if (a.f.splits > 1) {
    FASTPE_UNROLL
    for (int x = 0; x < 2; ++x) {
      if (row_of(x) >= p.Nq) continue;
      const int64_t row = ((split * p.B + b) * p.H + h) * p.Nq + row_of(x);
      if ((lane_index() & 3) == 0) {
        a.f.part_ml[2 * row] = m[x];
        a.f.part_ml[2 * row + 1] = l[x];
      }
      FASTPE_UNROLL
      for (int d = 0; d < kDt; ++d)
        FASTPE_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int64_t channel = 8 * d + frag_col(uint32_t(e));
          if (channel < p.Dv) a.f.part_o[row * p.Dv + channel] = o[d][2 * x + e];
        }
    }
    return;
  }
  float inv[2];
  FASTPE_UNROLL
  for (int x = 0; x < 2; ++x) inv[x] = finish_row(p, b, h, row_of, x, m[x], l[x]);
  store_rows<T, kD, 1>(p, sQ, b, h, i0, rows, [&](int x, int d, int e) { return o[d][2 * x + e] * inv[x]; });
}

}  // namespace fastpe::cuda
