// Forward attention with contextual positions on mma.sync, for sm_80 and newer.
//
// As attn_fwd.cuh: one block per (batch, head, 64 queries), the copies of V under the first product, those of the next
// keys under the softmax and the second product. Tiles go from the diagonal to the first key, so that the count of a row is
// known when a tile needs it. Once every row of a block has counted past the table's end, gates have no say any more: the rest
// of the row gets the last entry.
// Shared memory: Q | K | V, then the gates' keys and queries where they are tensors of their own.
#pragma once

#include "../cope.cuh"
#include "../softmax.cuh"
#include "attn_bwd.cuh"

namespace fastpe::cuda {

template <int kD>
struct CopeFwdTile {
  static constexpr uint32_t kTileBytes = 64 * kD * 2, kQ = 0, kK = kTileBytes, kV = 2 * kTileBytes, kGateK = 3 * kTileBytes, kGateQ = 4 * kTileBytes;
  static uint32_t bytes(const CopeParams& c) { return (c.gate_q.p ? 5 : c.gate_k.p ? 4 : 3) * kTileBytes; }
};

template <class T, int kD>
FASTPE_KERNEL(kBwdThreads, 1) cope_fwd_kernel(const FASTPE_GRID_CONSTANT CopeArgs g) {
  using Shape = CopeFwdTile<kD>;
  constexpr int kNt = kCopeNt, kDt = kD / 8;
  const CopeParams& c = g.c;
  const AttnParams& p = c.attn;
  const float kInf = __builtin_inff();
  const CopeScales k(c);

  // Blocks of the heads that share keys are neighbours; blocks with later rows, which see more, come first.
  const int64_t group = p.H / p.Hk, nqb = tiles::ceil_div(p.Nq, 64), nkt = tiles::ceil_div(p.Nk, kBlockN), per_bk = nqb * group;
  const int64_t in_wave = block_index() / per_bk, rest = block_index() % per_bk, bk = g.first + in_wave;
  const int64_t b = bk / p.Hk, hk = bk % p.Hk, h = hk * group + rest % group, qb = nqb - 1 - rest / group;
  const int64_t i0 = qb * 64, I0 = i0 + p.Nk - p.Nq;
  const int rows = int(p.Nq - i0 < 64 ? p.Nq - i0 : 64);
  const int64_t I1 = I0 + rows;
  const pos::Band band{p.vis.left, p.vis.right, p.vis.sinks};
  const uint32_t smem = shared_base(), sQ = smem + Shape::kQ, sK = smem + Shape::kK, sV = smem + Shape::kV, sGk = smem + Shape::kGateK;
  const uint32_t sGq = c.gate_q.p ? smem + Shape::kGateQ : sQ;
  const auto local_row = [&](int x) { return int(warp_index() * 16 + frag_row(uint32_t(x))); };
  const auto row_of = [&](int x) { return i0 + local_row(x); };

  // Tiles that are not visited have a carry too: a result of the op is the same numbers every time.
  if (c.carry) {
    float* mine = carry_at(c, b, h, qb, 0);
    for (int64_t x = thread_index(); x < nkt * 2 * 64; x += kBwdThreads) mine[x] = 0;
    sync_block();
  }

  load_tile<kD, 64, kBwdThreads>(sQ, row_at(p.q, b, h, i0), p.q.sn, rows, int(p.D), g.aligned_q);
  if (c.gate_q.p) load_tile<kD, 64, kBwdThreads>(sGq, row_at(c.gate_q, b, h, i0), c.gate_q.sn, rows, int(c.G), g.aligned_gate_q);

  const float* z[2];
  float m[2], l[2];
  Count count[2];
  FASTPE_UNROLL
  for (int x = 0; x < 2; ++x) {
    z[x] = k.table ? g.z + (((in_wave * group + rest % group) * nqb + qb) * 64 + local_row(x)) * g.ldz : nullptr;
    m[x] = -kInf;
    l[x] = 0;
  }
  float o[kDt][4];
  FASTPE_UNROLL
  for (int d = 0; d < kDt; ++d)
    FASTPE_UNROLL
    for (int e = 0; e < 4; ++e) o[d][e] = 0;

  TileWalk walk(band, I0, I1, p.Nk);
  const auto next_tile = [&]() -> int {
    FASTPE_NO_UNROLL
    for (;;) {
      const int t = walk.next();
      if (t < 0) return -1;
      const int64_t j0 = int64_t(t) * kBlockN, j1 = j0 + kBlockN < p.Nk ? j0 + kBlockN : p.Nk;
      const pos::Range see = pos::keys_in_tile(band, I0, I1, j0, j1);
      if (see.lo < see.hi && tile_may_see(p, g.spans, b, h, qb, i0, i0 + rows, t, j0, j1)) return t;
    }
  };
  bool saturated = false;
  const auto start_keys = [&](int t) {
    const int64_t j0 = int64_t(t) * kBlockN;
    const int keys = int(p.Nk - j0 < kBlockN ? p.Nk - j0 : kBlockN);
    load_tile<kD, 64, kBwdThreads>(sK, row_at(p.k, b, hk, j0), p.k.sn, keys, int(p.D), g.aligned_k);
    if (k.own && !saturated) load_tile<kD, 64, kBwdThreads>(sGk, row_at(c.gate_k, b, hk, j0), c.gate_k.sn, keys, int(c.G), g.aligned_gate_k);
  };
  int t = next_tile();
  if (t >= 0) start_keys(t);
  cp_async_commit();

  FASTPE_NO_UNROLL
  while (t >= 0) {
    const int64_t j0 = int64_t(t) * kBlockN;
    const int keys = int(p.Nk - j0 < kBlockN ? p.Nk - j0 : kBlockN);
    cp_async_wait<0>();
    sync_block();
    load_tile<kD, 64, kBwdThreads>(sV, row_at(p.v, b, hk, j0), p.v.sn, keys, int(p.Dv), g.aligned_v);
    cp_async_commit();
    const CopeTile tile(p, k.table, band, b, h, I0, rows, j0, keys, row_of);
    if (c.carry && (lane_index() & 3) == 0) {
      float* to = carry_at(c, b, h, qb, t);
      FASTPE_UNROLL
      for (int x = 0; x < 2; ++x) {
        to[local_row(x)] = count[x].sum;
        to[64 + local_row(x)] = count[x].rest;
      }
    }
    if (k.table && !saturated) saturated = sync_block_and((count[0].sum >= k.top || row_of(0) >= p.Nq) && (count[1].sum >= k.top || row_of(1) >= p.Nq));
    const int next = next_tile();

    float s[kNt][4], a[kNt][4];
    product_nt<T, kD>(s, sQ, sK);
    if (k.own && !saturated) product_nt<T, kD>(a, sGq, sGk);
    cp_async_wait<0>();
    sync_block();
    t = next;
    if (t >= 0) start_keys(t);
    cp_async_commit();

    // ---- scale, bias, mask ---------------------------------------------------------------------------------------------------
    FASTPE_UNROLL
    for (int x = 0; x < 2; ++x) {
      float at[kNt][2];
      if (saturated) {
        FASTPE_UNROLL
        for (int n = 0; n < kNt; ++n) at[n][0] = at[n][1] = k.top;
      } else {
        count[x].add(count_row(at, count[x], [&](int n, int e) {
          const float product = k.own ? a[n][2 * x + e] : s[n][2 * x + e];
          return tile.gates(x, n, e) ? k.value(product) : 0.f;
        }));
      }
      FASTPE_UNROLL
      for (int n = 0; n < kNt; ++n)
        FASTPE_UNROLL
        for (int e = 0; e < 2; ++e) {
          float& v = s[n][2 * x + e];
          if (k.table) {
            const Position w(at[n][e], k.top);
            const float lo = z[x][w.n], hi = z[x][w.n + 1];
            v = fma(v, k.score, fma(w.frac, hi - lo, lo));
          } else {
            v = fma(v, k.score, at[n][e] * k.bias);
          }
          if (!tile.sees(x, n, e)) v = -kInf;
        }
    }

    // ---- online softmax ------------------------------------------------------------------------------------------------------
    FASTPE_UNROLL
    for (int x = 0; x < 2; ++x) {
      const float alpha = online_softmax<kNt>(m[x], l[x], [&](int n, int e) -> float& { return s[n][2 * x + e]; });
      FASTPE_UNROLL
      for (int d = 0; d < kDt; ++d) {
        o[d][2 * x] *= alpha;
        o[d][2 * x + 1] *= alpha;
      }
    }
    product_nn<T, kD>(o, s, sV);
  }

  // ---- normalise and store -------------------------------------------------------------------------------------------------------
  cp_async_wait<0>();
  float inv[2];
  FASTPE_UNROLL
  for (int x = 0; x < 2; ++x) {
    l[x] += shfl_xor(l[x], 1);
    l[x] += shfl_xor(l[x], 2);
    inv[x] = finish_row(p, b, h, row_of, x, m[x], l[x]);
  }
  store_rows<T, kD, 1>(p, sQ, b, h, i0, rows, [&](int x, int d, int e) { return o[d][2 * x + e] * inv[x]; });
}

}  // namespace fastpe::cuda
