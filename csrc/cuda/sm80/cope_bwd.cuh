// Backward attention with contextual positions on mma.sync, for sm_80 and newer: two passes, no atomics, every sum in a
// fixed order.
//
// Positions need the gates to the right of a key, their gradient needs the scores to its left:
//   e_ij = dS_ij (slope of the table at p_ij),   d logit_it = g_it (1 - g_it) sum over j <= t of e_ij.
// The counts saved by the forward pass serve the first. The second is carried by cope_bwd_q_kernel, one block per (batch,
// head, 64 queries), which walks the tiles from the first key to the diagonal and leaves what it has at every tile:
//   S = Q K^T, dP = dO V^T (and the gates' products), P, dS, e, the logits' gradient; dQ += dS K; dZ
// cope_bwd_kv_kernel, one block per (batch, kv head, 64 keys), starts from both and takes the blocks of queries in any order:
//   dV += P^T dO, dK += dS^T Q
// Rows of fragments are queries in both, since counts run along them; the second pass turns P and dS round through shared
// memory. Gradients of the gates' products go with dS where those are the scores' own products.
//
// Accumulators of two results fit the registers with 64 channels only; larger heads take one launch for each.
#pragma once

#include "../cope.cuh"
#include "attn_bwd.cuh"

namespace fastpe::cuda {

template <int kD>
struct CopeBwdTile {
  static constexpr int kAcc = kD == 64 ? 2 : 1;
  static constexpr uint32_t kTileBytes = 64 * kD * 2;
  // Query pass: Q | dO | K | V, then the gates' keys in its place | the gates' queries | dS and positions for dZ.
  static constexpr uint32_t kQ = 0, kDo = kTileBytes, kK = 2 * kTileBytes, kV = 3 * kTileBytes;
  static constexpr int kPitch = 65;
  static constexpr uint32_t kStageBytes = 64 * kPitch * 4;
  static uint32_t stage(const CopeParams& c) { return (c.gate_q.p ? 5 : 4) * kTileBytes; }
  static uint32_t query_bytes(const CopeArgs& g) { return stage(g.c) + (g.dz ? 2 * kStageBytes : 0); }
  // Key pass: Q | dO or the gates' queries | K | V or the gates' keys | P and dS in 16 bits.
  static constexpr uint32_t kTurned = 4 * kTileBytes, kTurnedBytes = 64 * 64 * 2, kKeyBytes = kTurned + kAcc * kTurnedBytes;
};

// The rows of a block of queries as a thread of the two passes has them.
struct CopeRows {
  float lse[2], delta[2];
  const float* z[2];
  Count count[2];
  float before[2];
};

// From the products of a tile to gradients. s, a: products of scores and gates (a is not read where the scores' products are
// the gates'). dp: dP, then the gradient of the scores' products; a: that of the gates' products where they are their own; both
// times unit. visit(x, n, P of two columns, dS, positions).
template <class Visit>
FASTPE_DEVICE void cope_gradients(const CopeArgs& g, const CopeScales& k, const CopeTile& tile, bool saturated, CopeRows& r, const float (&s)[kCopeNt][4], float (&dp)[kCopeNt][4], float (&a)[kCopeNt][4], Visit&& visit) {
  FASTPE_UNROLL
  for (int x = 0; x < 2; ++x) {
    float at[kCopeNt][2];
    const auto product = [&](int n, int e) { return k.own ? a[n][2 * x + e] : s[n][2 * x + e]; };
    if (saturated) {
      FASTPE_UNROLL
      for (int n = 0; n < kCopeNt; ++n) at[n][0] = at[n][1] = k.top;
    } else {
      count_row(at, r.count[x], [&](int n, int e) { return tile.gates(x, n, e) ? k.value(product(n, e)) : 0.f; });
    }
    FASTPE_UNROLL
    for (int n = 0; n < kCopeNt; ++n) {
      float prob[2], ds[2], count[2];
      FASTPE_UNROLL
      for (int e = 0; e < 2; ++e) {
        float v = s[n][2 * x + e], slope = 1;
        count[e] = at[n][e];
        if (k.table) {
          const Position w(at[n][e], k.top);
          const float lo = r.z[x][w.n], hi = r.z[x][w.n + 1];
          v = fma(v, k.score, fma(w.frac, hi - lo, lo)) - r.lse[x];
          // At a whole position both neighbours are one entry in the definition: no slope. The end of the table is one.
          slope = w.frac > 0 ? hi - lo : 0.f;
        } else {
          v = fma(v, k.score, at[n][e] * k.bias) - r.lse[x];
        }
        prob[e] = tile.sees(x, n, e) ? ex2_approx(v) : 0.f;
        // An infinite dO times a hidden key must not leak.
        ds[e] = prob[e] == 0 ? 0.f : prob[e] * (dp[n][2 * x + e] - r.delta[x]);
        dp[n][2 * x + e] = ds[e];
        at[n][e] = ds[e] == 0 ? 0.f : ds[e] * slope;
      }
      visit(x, n, prob, ds, count);
    }
    const float score = float(g.c.attn.scale) * g.unit, gate = k.gate_grad * g.unit;
    if (!saturated) prefix_row(at, r.before[x]);
    FASTPE_UNROLL
    for (int n = 0; n < kCopeNt; ++n)
      FASTPE_UNROLL
      for (int e = 0; e < 2; ++e) {
        // Gates that do not count must not spread the NaN or infinity of another key.
        const float da = !saturated && tile.gates(x, n, e) ? at[n][e] * k.slope(product(n, e)) * gate : 0.f;
        float& d = dp[n][2 * x + e];
        d = k.own ? d * score : fma(d, score, da);
        if (k.own) a[n][2 * x + e] = da;
      }
  }
}

// What a thread knows of row x, which stands for the last row where it is past it.
FASTPE_DEVICE void start_rows(CopeRows& r, const CopeArgs& g, int64_t b, int64_t h, int64_t head, int64_t qb, int local, int x) {
  const AttnParams& p = g.c.attn;
  const int64_t i = qb * 64 + local, row = (b * p.H + h) * p.Nq + (i < p.Nq ? i : p.Nq - 1), nqb = tiles::ceil_div(p.Nq, 64);
  const float lse = static_cast<const float*>(p.lse)[row];
  // Rows that see nothing, and rows past the last one, have P = 0.
  r.lse[x] = lse == -__builtin_inff() || i >= p.Nq ? __builtin_inff() : lse * float(kLog2e);
  r.delta[x] = g.delta[row];
  r.z[x] = g.z ? g.z + ((head * nqb + qb) * 64 + local) * g.ldz : nullptr;
}
FASTPE_DEVICE Count saved_count(const CopeParams& c, int64_t b, int64_t h, int64_t qb, int64_t t, int local) {
  const float* from = carry_at(c, b, h, qb, t) + local;
  Count r;
  r.sum = from[0];
  r.rest = from[64];
  return r;
}

template <class T, int kD>
FASTPE_KERNEL(kBwdThreads, 1) cope_bwd_q_kernel(const FASTPE_GRID_CONSTANT CopeArgs g) {
  using Shape = CopeBwdTile<kD>;
  constexpr int kNt = kCopeNt, kDt = kD / 8, kAcc = Shape::kAcc, kPitch = Shape::kPitch;
  const CopeParams& c = g.c;
  const AttnParams& p = c.attn;
  const CopeScales k(c);
  const int64_t group = p.H / p.Hk, nqb = tiles::ceil_div(p.Nq, 64), nkt = tiles::ceil_div(p.Nk, kBlockN), per_bk = nqb * group;
  const int64_t in_wave = block_index() / per_bk, rest = block_index() % per_bk, bk = g.first + in_wave;
  const int64_t b = bk / p.Hk, hk = bk % p.Hk, h = hk * group + rest % group, qb = nqb - 1 - rest / group, head = in_wave * group + rest % group;
  const int64_t i0 = qb * 64, I0 = i0 + p.Nk - p.Nq;
  const int rows = int(p.Nq - i0 < 64 ? p.Nq - i0 : 64);
  const int64_t I1 = I0 + rows;
  const pos::Band band{p.vis.left, p.vis.right, p.vis.sinks};
  const uint32_t smem = shared_base(), sQ = smem + Shape::kQ, sO = smem + Shape::kDo, sK = smem + Shape::kK, sV = smem + Shape::kV;
  const uint32_t sGq = c.gate_q.p ? smem + 4 * Shape::kTileBytes : sQ, sDs = smem + (c.gate_q.p ? 5 : 4) * Shape::kTileBytes, sAt = sDs + Shape::kStageBytes;
  const auto local_row = [&](int x) { return int(warp_index() * 16 + frag_row(uint32_t(x))); };
  const auto row_of = [&](int x) { return i0 + local_row(x); };

  load_tile<kD, 64, kBwdThreads>(sQ, row_at(p.q, b, h, i0), p.q.sn, rows, int(p.D), g.aligned_q);
  load_tile<kD, 64, kBwdThreads>(sO, row_at(g.d_o, b, h, i0), g.d_o.sn, rows, int(p.Dv), g.aligned_do);
  if (c.gate_q.p) load_tile<kD, 64, kBwdThreads>(sGq, row_at(c.gate_q, b, h, i0), c.gate_q.sn, rows, int(c.G), g.aligned_gate_q);
  cp_async_commit();

  CopeRows r;
  FASTPE_UNROLL
  for (int x = 0; x < 2; ++x) {
    start_rows(r, g, b, h, head, qb, local_row(x), x);
    r.before[x] = 0;
  }
  // A lane of the first half of a warp walks one row of the warp: the two entries of dz in use, and where they are. Along a row
  // positions fall, by at most 1 per key, so most entries are touched once.
  float* dz = g.dz ? g.dz + (head * nqb + qb) * 64 * g.ldz : nullptr;
  float* my_dz = g.dz && lane_index() < 16 ? dz + (warp_index() * 16 + lane_index()) * g.ldz : nullptr;
  int open = int(k.top);
  float open_lo = 0, open_hi = 0;
  const auto close = [&] {
    my_dz[open] += open_lo;
    my_dz[open + 1] += open_hi;
    open_lo = open_hi = 0;
  };
  if (dz) {
    for (int64_t x = thread_index(); x < 64 * g.ldz; x += kBwdThreads) dz[x] = 0;
    sync_block();
  }

  float acc[kAcc][kDt][4];
  FASTPE_UNROLL
  for (int x = 0; x < kAcc; ++x)
    FASTPE_UNROLL
    for (int d = 0; d < kDt; ++d)
      FASTPE_UNROLL
      for (int e = 0; e < 4; ++e) acc[x][d][e] = 0;

  const TileWalk range(band, I0, I1, p.Nk);
  const int end = range.hi > range.sinks_hi ? range.hi : range.sinks_hi;
  FASTPE_NO_UNROLL
  for (int t = 0; t < end; ++t) {
    if (t >= range.sinks_hi && t < range.lo) continue;
    const int64_t j0 = int64_t(t) * kBlockN, j1 = j0 + kBlockN < p.Nk ? j0 + kBlockN : p.Nk;
    const pos::Range see = pos::keys_in_tile(band, I0, I1, j0, j1);
    if (see.lo >= see.hi || !tile_may_see(p, g.spans, b, h, qb, i0, i0 + rows, t, j0, j1)) continue;
    const int keys = int(j1 - j0);
    bool full = k.table;
    FASTPE_UNROLL
    for (int x = 0; x < 2; ++x) {
      r.count[x] = saved_count(c, b, h, qb, t, local_row(x));
      full = full && (r.count[x].sum >= k.top || row_of(x) >= p.Nq);
    }
    // Everyone has finished with the tiles of the round before.
    const bool saturated = sync_block_and(full), gates = k.own && !saturated;
    load_tile<kD, 64, kBwdThreads>(sK, row_at(p.k, b, hk, j0), p.k.sn, keys, int(p.D), g.aligned_k);
    load_tile<kD, 64, kBwdThreads>(sV, row_at(p.v, b, hk, j0), p.v.sn, keys, int(p.Dv), g.aligned_v);
    cp_async_commit();
    const CopeTile tile(p, k.table, band, b, h, I0, rows, j0, keys, row_of);
    if (g.before && (lane_index() & 3) == 0) {
      float* to = g.before + ((head * nqb + qb) * nkt + t) * 64;
      FASTPE_UNROLL
      for (int x = 0; x < 2; ++x) to[local_row(x)] = r.before[x];
    }
    cp_async_wait<0>();
    sync_block();
    float s[kNt][4], dp[kNt][4], a[kNt][4];
    product_nt<T, kD>(s, sQ, sK);
    product_nt<T, kD>(dp, sO, sV);
    if (gates) {
      sync_block();
      load_tile<kD, 64, kBwdThreads>(sV, row_at(c.gate_k, b, hk, j0), c.gate_k.sn, keys, int(c.G), g.aligned_gate_k);
      cp_async_commit();
      cp_async_wait<0>();
      sync_block();
      product_nt<T, kD>(a, sGq, sV);
    }
    if (dz) sync_warp();
    cope_gradients(g, k, tile, saturated, r, s, dp, a, [&](int x, int n, const float (&)[2], const float (&ds)[2], const float (&at)[2]) {
      if (!dz) return;
      FASTPE_UNROLL
      for (int e = 0; e < 2; ++e) {
        const uint32_t to = uint32_t(local_row(x) * kPitch + 8 * n) * 4 + frag_col(uint32_t(e)) * 4;
        st_shared_f32(sDs + to, ds[e]);
        st_shared_f32(sAt + to, at[e]);
      }
    });
    if (dz) {
      sync_warp();
      if (my_dz)
        FASTPE_NO_UNROLL
        for (int col = 0; col < keys; ++col) {
          const uint32_t from = (warp_index() * 16 + lane_index()) * kPitch * 4 + uint32_t(col) * 4;
          const float d = ld_shared_f32(sDs + from);
          const Position w(ld_shared_f32(sAt + from), k.top);
          if (d == 0) continue;
          if (w.n != open) {
            close();
            open = w.n;
          }
          const float part = d * w.frac;
          open_hi += part;
          open_lo += d - part;
        }
    }
    if (g.outputs & cope_need_q) {
      product_nn<T, kD>(acc[0], dp, sK);
      if (gates && !c.gate_q.p) product_nn<T, kD>(acc[0], a, sV);
    }
    if (gates && (g.outputs & cope_need_gate_q)) product_nn<T, kD>(acc[kAcc - 1], a, sV);
  }
  cp_async_wait<0>();
  if (dz) {
    if (my_dz) close();
    sync_block();
  }
  if (g.outputs & cope_need_q) {
    if (dz) {
      // dQ += dZ table^T; z is a product of the turned queries.
      const float factor = g.unit * float(c.table_scale), *table = static_cast<const float*>(c.table);
      const float *dz0 = dz + local_row(0) * g.ldz, *dz1 = dz + local_row(1) * g.ldz;
      FASTPE_NO_UNROLL
      for (int64_t n = 0; n < c.npos; ++n) {
        const float d0 = dz0[n] * factor, d1 = dz1[n] * factor;
        FASTPE_UNROLL
        for (int d = 0; d < kDt; ++d)
          FASTPE_UNROLL
          for (int e = 0; e < 2; ++e) {
            const int64_t channel = 8 * d + frag_col(uint32_t(e));
            const float w = channel < p.D ? table[channel * c.npos + n] : 0.f;
            acc[0][d][e] = fma(d0, w, acc[0][d][e]);
            acc[0][d][2 + e] = fma(d1, w, acc[0][d][2 + e]);
          }
      }
    }
    store_unrotated<T, kD>(acc[0], 1.f / g.unit, smem, g.dq, b, h, i0, rows, p.D, [&](int64_t) { return p.q_rope; }, p.rope_pairs, p.rope_layout);
  }
  if (g.outputs & cope_need_gate_q)
    store_unrotated<T, kD>(acc[kAcc - 1], 1.f / g.unit, smem, g.dgate_q, b, h, i0, rows, c.G, [](int64_t) { return Rope{}; }, 0, p.rope_layout);
}

// acc += C^T B: C 64 queries x 64 keys of 16 bits, the warp's 16 keys; B 64 queries of kD channels.
template <class T, int kD>
FASTPE_DEVICE void product_tn(float (&acc)[kD / 8][4], uint32_t c, uint32_t b) {
  FASTPE_UNROLL
  for (int k = 0; k < kBwdBlock / 16; ++k) {
    uint32_t f[4], fb[4];
    ldmatrix_x4_trans(f, fragment_at<64>(c, 16 * k, 2 * warp_index()));
    const uint32_t fa[4] = {f[0], f[2], f[1], f[3]};
    FASTPE_UNROLL
    for (int d = 0; d < kD / 16; ++d) {
      ldmatrix_x4_trans(fb, fragment_at<kD>(b, 16 * k, 2 * d));
      mma<T>(acc[2 * d], fa, fb[0], fb[1]);
      mma<T>(acc[2 * d + 1], fa, fb[2], fb[3]);
    }
  }
}

template <class T, int kD>
FASTPE_KERNEL(kBwdThreads, 1) cope_bwd_kv_kernel(const FASTPE_GRID_CONSTANT CopeArgs g) {
  using Shape = CopeBwdTile<kD>;
  constexpr int kNt = kCopeNt, kDt = kD / 8, kAcc = Shape::kAcc;
  const CopeParams& c = g.c;
  const AttnParams& p = c.attn;
  const CopeScales k(c);
  const int64_t group = p.H / p.Hk, nqb = tiles::ceil_div(p.Nq, 64), nkt = tiles::ceil_div(p.Nk, kBlockN);
  const int64_t in_wave = block_index() / nkt, t = block_index() % nkt, bk = g.first + in_wave, b = bk / p.Hk, hk = bk % p.Hk, j0 = t * kBlockN;
  const int64_t j1 = j0 + kBlockN < p.Nk ? j0 + kBlockN : p.Nk;
  const int keys = int(j1 - j0);
  const pos::Band band{p.vis.left, p.vis.right, p.vis.sinks};
  const uint32_t smem = shared_base(), sQ = smem + Shape::kQ, sY = smem + Shape::kDo, sK = smem + Shape::kK, sX = smem + Shape::kV, sC = smem + Shape::kTurned;
  const auto local_row = [&](int x) { return int(warp_index() * 16 + frag_row(uint32_t(x))); };
  const bool want_k = g.outputs & cope_need_k, want_v = g.outputs & cope_need_v, want_gate_k = g.outputs & cope_need_gate_k;
  // Which of two pairs of tiles is in shared memory when the products with P or dS are formed: V and dO, or the gates'.
  const bool gates_last = want_gate_k && c.gate_q.p;
  const auto load_gates = [&](int64_t h, int64_t i0, int rows) {
    load_tile<kD, 64, kBwdThreads>(sX, row_at(c.gate_k, b, hk, j0), c.gate_k.sn, keys, int(c.G), g.aligned_gate_k);
    if (c.gate_q.p) load_tile<kD, 64, kBwdThreads>(sY, row_at(c.gate_q, b, h, i0), c.gate_q.sn, rows, int(c.G), g.aligned_gate_q);
    cp_async_commit();
    cp_async_wait<0>();
    sync_block();
  };

  load_tile<kD, 64, kBwdThreads>(sK, row_at(p.k, b, hk, j0), p.k.sn, keys, int(p.D), g.aligned_k);
  bool have_v = false;
  float acc[kAcc][kDt][4];
  FASTPE_UNROLL
  for (int x = 0; x < kAcc; ++x)
    FASTPE_UNROLL
    for (int d = 0; d < kDt; ++d)
      FASTPE_UNROLL
      for (int e = 0; e < 4; ++e) acc[x][d][e] = 0;

  FASTPE_NO_UNROLL
  for (int64_t x = 0; x < group; ++x) {
    const int64_t h = hk * group + x, head = in_wave * group + x;
    FASTPE_NO_UNROLL
    for (int64_t qb = 0; qb < nqb; ++qb) {
      const int64_t i0 = qb * 64, I0 = i0 + p.Nk - p.Nq;
      const int rows = int(p.Nq - i0 < 64 ? p.Nq - i0 : 64);
      const int64_t I1 = I0 + rows;
      const pos::Range see = pos::keys_in_tile(band, I0, I1, j0, j1);
      if (see.lo >= see.hi || !tile_may_see(p, g.spans, b, h, qb, i0, i0 + rows, t, j0, j1)) continue;
      CopeRows r;
      bool full = k.table;
      FASTPE_UNROLL
      for (int y = 0; y < 2; ++y) {
        start_rows(r, g, b, h, head, qb, local_row(y), y);
        r.count[y] = saved_count(c, b, h, qb, t, local_row(y));
        r.before[y] = g.before ? g.before[((head * nqb + qb) * nkt + t) * 64 + local_row(y)] : 0.f;
        full = full && (r.count[y].sum >= k.top || i0 + local_row(y) >= p.Nq);
      }
      // Everyone has finished with the tiles of the round before.
      const bool saturated = sync_block_and(full), gates = k.own && !saturated;
      load_tile<kD, 64, kBwdThreads>(sQ, row_at(p.q, b, h, i0), p.q.sn, rows, int(p.D), g.aligned_q);
      const CopeTile tile(p, k.table, band, b, h, I0, rows, j0, keys, [&](int y) { return i0 + local_row(y); });
      float s[kNt][4], dp[kNt][4], a[kNt][4];
      if (gates && !gates_last) {
        load_gates(h, i0, rows);
        product_nt<T, kD>(a, c.gate_q.p ? sY : sQ, sX);
        sync_block();
        have_v = false;
      }
      if (!have_v) load_tile<kD, 64, kBwdThreads>(sX, row_at(p.v, b, hk, j0), p.v.sn, keys, int(p.Dv), g.aligned_v);
      have_v = true;
      load_tile<kD, 64, kBwdThreads>(sY, row_at(g.d_o, b, h, i0), g.d_o.sn, rows, int(p.Dv), g.aligned_do);
      cp_async_commit();
      cp_async_wait<0>();
      sync_block();
      product_nt<T, kD>(s, sQ, sK);
      product_nt<T, kD>(dp, sY, sX);
      if (gates && gates_last) {
        sync_block();
        load_gates(h, i0, rows);
        product_nt<T, kD>(a, sY, sX);
        have_v = false;
      }
      const auto turn = [&](uint32_t to, int y, int n, float lo, float hi) { st_shared_b32(to + Tile<64>::at(uint32_t(local_row(y)), uint32_t(n)) + 4 * (lane_index() & 3), T::pack(lo, hi)); };
      cope_gradients(g, k, tile, saturated, r, s, dp, a, [&](int y, int n, const float (&prob)[2], const float (&)[2], const float (&)[2]) {
        if (want_v) turn(sC, y, n, prob[0], prob[1]);
      });
      const uint32_t second = sC + (kAcc - 1) * Shape::kTurnedBytes;
      FASTPE_UNROLL
      for (int n = 0; n < kNt; ++n)
        FASTPE_UNROLL
        for (int y = 0; y < 2; ++y) {
          if (want_k) turn(second, y, n, dp[n][2 * y], dp[n][2 * y + 1]);
          if (want_gate_k && gates) turn(second, y, n, a[n][2 * y], a[n][2 * y + 1]);
        }
      sync_block();
      if (want_v) product_tn<T, kD>(acc[0], sC, sY);
      if (want_k) product_tn<T, kD>(acc[kAcc - 1], second, sQ);
      if (want_gate_k && gates) product_tn<T, kD>(acc[kAcc - 1], second, c.gate_q.p ? sY : sQ);
    }
  }
  cp_async_commit();
  cp_async_wait<0>();
  if (want_v) store_unrotated<T, kD>(acc[0], 1.f, smem, g.dv, b, hk, j0, keys, p.Dv, [](int64_t) { return Rope{}; }, 0, p.rope_layout);
  if (want_k) store_unrotated<T, kD>(acc[kAcc - 1], 1.f / g.unit, smem, g.dk, b, hk, j0, keys, p.D, [&](int64_t) { return p.k_rope; }, p.rope_pairs, p.rope_layout);
  if (want_gate_k) store_unrotated<T, kD>(acc[kAcc - 1], 1.f / g.unit, smem, g.dgate_k, b, hk, j0, keys, c.G, [](int64_t) { return Rope{}; }, 0, p.rope_layout);
}

}  // namespace fastpe::cuda
