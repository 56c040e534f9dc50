// Forward attention on mma.sync, for sm_80 and newer.
//
// Tiles: kBlockM queries x kBlockN keys, kD channels for q, k and v (plan.h); D and Dv below kD are padded with zeros.
// Work: one block per (batch, head, block of queries); where that is too little for a GPU, one per split of the keys too. Blocks of the heads that share keys are neighbours, and blocks
// with later rows, which see more under a causal mask, come first.
// Shared memory: Q | K | V | table values of the tile, or its scores where they are composed; one stage each.
// A round for one key tile; K of the round is under way when it starts:
//   wait, barrier              K is there; everyone has finished with V and the table
//   start V; stage the table; find what is visible; choose the next tile
//   S = Q K^T
//   wait, barrier              V is there; everyone has finished with K
//   start K of the next tile
//   scale, bias, mask, online softmax; O += P V
// The copies of V run under the first product, those of the next K under the softmax and the second product.
// Q is rotated between its load and shared memory; keys come rotated from prepare.cuh. With regions (pos/region.h) the
// rounds of one follow those of the other, with Q rotated anew; a tile that two share is visited by both, each hiding what
// is the other's.
//
// The next tile is chosen with the row maxima of the rounds before, which only grow: a tile that cannot matter then
// cannot matter later (cpu/attn_fwd.cpp states the bound).
#pragma once

#include "../strips.cuh"
#include "../plan.h"
#include "../softmax.cuh"
#include "../visible_tile.cuh"

namespace fastpe::cuda {

struct FwdArgs {
  AttnParams p;
  Prepared pre;
  float skip;          // log2 of the probability a skipped key may have; -inf: skip nothing
  bool aligned_q, aligned_k, aligned_v;
  uint32_t* stats;     // (blocks, 2) tiles visited and tiles skipped under the bound; may be null
  // With several splits a block takes a run of the key tiles and leaves what it has: (splits,B,H,Nq,Dv) sums of P V,
  // (splits,B,H,Nq,2) row maximum in log2 units and sum of P.
  int splits;
  float *part_o, *part_ml;
};

template <class T, int kD, Kind kKind>
FASTPE_KERNEL(FwdTile<kD>::kThreads, 1) attn_fwd_kernel(const FASTPE_GRID_CONSTANT FwdArgs a) {
  using Shape = FwdTile<kD>;
  constexpr int kMt = Shape::kMt, kRows = 2 * kMt, kBlockM = Shape::kBlockM, kThreads = Shape::kThreads;
  constexpr int kNt = kBlockN / 8, kDt = kD / 8;
  const AttnParams& p = a.p;
  const float kInf = __builtin_inff();

  const int64_t group = p.H / p.Hk, nqb = tiles::ceil_div(p.Nq, kBlockM), per_bk = nqb * group;
  const int64_t all = p.B * p.Hk * per_bk, split = block_index() / all, in_split = block_index() % all;
  const int64_t bk = in_split / per_bk, rest = in_split % per_bk;
  const int64_t b = bk / p.Hk, hk = bk % p.Hk, h = hk * group + rest % group, qb = nqb - 1 - rest / group;
  const int64_t offset = p.Nk - p.Nq, i0 = qb * kBlockM, I0 = i0 + offset;
  const int rows = int(p.Nq - i0 < kBlockM ? p.Nq - i0 : kBlockM);
  const int64_t I1 = I0 + rows;
  const pos::Band band{p.vis.left, p.vis.right, p.vis.sinks};
  const int64_t nkt = tiles::ceil_div(p.Nk, kBlockN);
  const int first_tile = int(nkt * split / a.splits), end_tile = int(nkt * (split + 1) / a.splits);

  const uint32_t smem = shared_base(), sQ = smem + Shape::kQ, sK = smem + Shape::kK, sV = smem + Shape::kV, sT = smem + Shape::kTable;
  const uint32_t warp_row = warp_index() * 16 * kMt;
  const auto local_row = [&](int x) { return warp_row + 16 * (x >> 1) + frag_row(x & 1); };
  const auto row_of = [&](int x) { return i0 + int64_t(local_row(x)); };

  static_assert(kMt == 1 && kBlockM == 64);
  Operand<T, kD> q_rows{sQ}, k_rows{sK}, v_rows{sV};

  const auto load_queries = [&](int region) {
    const Stored<T>* q0 = row_at<T>(a.pre.q, b, h, i0) + region * a.pre.q_copy;
    const bool turn = !kIsF32<T> && p.q_rope.cos.p;
    if constexpr (!kIsF32<T>)
      if (turn) {
        constexpr uint32_t kChunks = Tile<kD>::kChunks;
        const Rope rope = region_rope(p.q_rope, region);
        for (uint32_t item = thread_index(); item < kBlockM * kChunks; item += kThreads) {
          const uint32_t row = item / kChunks, chunk = item % kChunks;
          Quad v{};
          if (int(row) < rows && int64_t(chunk * 8) < p.D)
            v = load_chunk_rotated<T>(q0 + int64_t(row) * p.q.sn, chunk, aux_at<float>(rope.cos, b, h, i0 + row), aux_at<float>(rope.sin, b, h, i0 + row), uint32_t(p.rope_pairs), p.rope_layout);
          st_shared_v4(sQ + Tile<kD>::at(row, chunk), v);
        }
      }
    if (!turn) q_rows.template load<kThreads>(q0, a.pre.q.sn, rows, int(p.D), a.aligned_q);
    cp_async_commit();
  };

  // ---- what stays with a row ---------------------------------------------------------------------------------------------
  float c[kRows], m[kRows], l[kRows], qn[kRows];
  RowBias<kKind, kRows> rb;
  rb.start(p, b, h, offset, row_of);
  FASTPE_UNROLL
  for (int x = 0; x < kRows; ++x) {
    const int64_t i = row_of(x) < p.Nq ? row_of(x) : p.Nq - 1;
    c[x] = float(p.scale) * (p.row_scale.p ? *aux_at<float>(p.row_scale, b, h, i) : 1.f) * float(kLog2e);
    m[x] = -kInf;
    l[x] = 0;
    qn[x] = 0;
  }
  const bool may_skip = kKind != Kind::none && kKind != Kind::composed && a.skip > -kInf;
  const auto query_norms = [&] {
    cp_async_wait<0>();
    sync_block();
    FASTPE_UNROLL
    for (int x = 0; x < kRows; ++x) {
      float n = 0;
      for (uint32_t chunk = lane_index() & 3; chunk < Tile<kD>::kChunks; chunk += 4) {
        const Quad v = ld_shared_v4(sQ + Tile<kD>::at(local_row(x), chunk));
        FASTPE_UNROLL
        for (int e = 0; e < 4; ++e) {
          const float lo = wide_low<T>(v.x[e]), hi = wide_high<T>(v.x[e]);
          n += lo * lo + hi * hi;
        }
      }
      n += shfl_xor(n, 1);
      n += shfl_xor(n, 2);
      qn[x] = sqrtf(n) * abs(c[x]) * 1.0001f;
    }
  };

  // ---- choice of tiles ------------------------------------------------------------------------------------------------------
  const int regions = pos::region_count(p.region.kind);
  int region = 0;
  TileWalk walk(band, I0, I1, p.Nk);
  uint32_t visited = 0, decayed = 0;
  // Largest bias of row x in keys [first, last]; rb stands at the tile.
  const auto bias_bound = [&](int x, int64_t tile, int64_t first, int64_t last) {
    if constexpr (kKind == Kind::table) {
      const int64_t t_min = I0 - last, t_max = I1 - 1 - first, I = I0 + int64_t(local_row(x));
      if (t_min < 0 && t_max >= 0) return kInf;
      const int64_t t = t_min >= 0 ? I - last : I - first;
      return a.pre.env[h * a.pre.env_sh + pos::table_index(p.bias.form, t, p.bias.table_len)] * float(kLog2e);
    } else {
      float lo = float(first - tile * kBlockN), hi = float(last - tile * kBlockN);
      if (rb.w) {
        const float* span = a.pre.w_span + b * a.pre.w_sb + h * a.pre.w_sh + tile * 2;
        lo = span[0] - rb.w0;
        hi = span[1] - rb.w0;
      }
      return rb.upper(x, lo, hi);
    }
  };
  // The next tile that can matter, -1 after the last. Uniform over the block.
  const auto next_tile = [&]() -> int {
    FASTPE_NO_UNROLL
    for (;;) {
      const int t = walk.next();
      if (t < 0) return -1;
      if (t < first_tile || t >= end_tile) continue;
      const int64_t j0 = int64_t(t) * kBlockN, j1 = j0 + kBlockN < p.Nk ? j0 + kBlockN : p.Nk;
      const pos::Range see = pos::keys_in_tile(band, I0, I1, j0, j1);
      if (see.lo >= see.hi) continue;
      if (!tile_has_region(p, region, I0, I1, j0, j1) || !tile_may_see(p, a.pre.spans, b, h, qb, i0, i0 + rows, t, j0, j1)) continue;
      if (may_skip) {
        rb.tile(j0, j1, I0, I1, band.right == 1);
        const float k_norm = a.pre.k_norm[bk * nkt + t];
        bool forgettable = true;
        FASTPE_UNROLL
        for (int x = 0; x < kRows; ++x)
          if (row_of(x) < p.Nq) forgettable = forgettable && m[x] + a.skip >= fma(qn[x], k_norm, bias_bound(x, t, see.lo, see.hi - 1));
        if (sync_block_and(forgettable)) {
          ++decayed;
          continue;
        }
      }
      return t;
    }
  };
  const auto start_keys = [&](int t) {
    const int64_t j0 = int64_t(t) * kBlockN;
    k_rows.template load<kThreads>(row_at<T>(a.pre.k, b, hk, j0) + region * a.pre.k_copy, a.pre.k.sn, int(p.Nk - j0 < kBlockN ? p.Nk - j0 : kBlockN), int(p.D), a.aligned_k);
  };

  float o[kMt][kDt][4];
  FASTPE_UNROLL
  for (int mt = 0; mt < kMt; ++mt)
    FASTPE_UNROLL
    for (int d = 0; d < kDt; ++d)
      FASTPE_UNROLL
      for (int e = 0; e < 4; ++e) o[mt][d][e] = 0;

  // One region after the other, each with its own rotation, under one softmax; without regions there is one.
  FASTPE_NO_UNROLL
  for (; region < regions; ++region) {
  int t = -1;
  if (regions > 1) {
    walk = TileWalk(band, I0, I1, p.Nk);
    t = next_tile();
    if (t < 0) continue;
    // Everyone has finished with the queries of the region before.
    cp_async_wait<0>();
    sync_block();
  }
  load_queries(region);
  if (may_skip) query_norms();
  if (regions == 1) t = next_tile();
  if (t >= 0) start_keys(t);
  cp_async_commit();

  FASTPE_NO_UNROLL
  while (t >= 0) {
    const int64_t j0 = int64_t(t) * kBlockN, j1 = j0 + kBlockN < p.Nk ? j0 + kBlockN : p.Nk;
    ++visited;
    cp_async_wait<0>();
    sync_block();
    v_rows.template load<kThreads>(row_at<T>(p.v, b, hk, j0), p.v.sn, int(j1 - j0), int(p.Dv), a.aligned_v);
    cp_async_commit();
    if constexpr (kKind == Kind::table) {
      // Entry x: offset I - j = I0 - j0 - (kBlockN - 1) + x.
      const float* table = aux_at<float>(p.bias.table, 0, h);
      for (int x = int(thread_index()); x < kBlockM + kBlockN - 1; x += kThreads)
        st_shared_f32(sT + 4 * x, table[pos::table_index(p.bias.form, I0 - j0 - (kBlockN - 1) + x, p.bias.table_len)] * float(kLog2e));
    }

    const int keys = int(j1 - j0);
    if constexpr (kKind == Kind::composed)
      if (has_products(p)) make_terms<T, (kD > 64 ? 2 : 5)>(p, b, h, i0, j0, rows, keys, smem + Shape::kTerms);
    bool data = has_data(p.vis);
    if (p.vis.k_ids && !p.vis.mask && !sees_by_rules(p.vis)) {
      const int32_t *q_span = a.pre.spans.q_id + b * a.pre.spans.q_id_sb + 2 * qb, *span = a.pre.spans.k_id + b * a.pre.spans.k_id_sb + 2 * t;
      // One document.
      data = !(q_span[0] == q_span[1] && span[0] == span[1] && span[0] == q_span[0] && span[0] >= 0);
    }
    const bool shared = regions > 1 && !tile_has_one_region(p, I0, I1, j0, j1);
    // Full tiles, nearly all of a long call, hide nothing.
    const bool partial = keys < kBlockN || data || shared || !pos::tile_full(band, I0, I1, j0, j1);
    uint64_t seen[kRows] = {};
    if (partial) {
      FASTPE_UNROLL
      for (int x = 0; x < kRows; ++x) seen[x] = keys_seen(p, band, region, shared, data, b, h, row_of(x), j0);
    }
    const int next = next_tile();

    // ---- S = Q K^T ------------------------------------------------------------------------------------------------------------
    float s[kMt][kNt][4];
    product_nt(s[0], q_rows, k_rows);
    cp_async_wait<0>();
    sync_block();
    t = next;
    if (t >= 0) start_keys(t);
    cp_async_commit();

    // ---- scale, bias, mask ---------------------------------------------------------------------------------------------------
    rb.tile(j0, j1, I0, I1, band.right == 1);
    const Softcap cap(p);
    if constexpr (kKind == Kind::composed) {
      const uint32_t sS = smem + Shape::kScores;
      fragments_to(sS, s[0]);
      sync_warp();
      for_own_rows([&](int x, int row, int col) {
        if (row >= rows || col >= keys) return;
        const uint32_t at = score_at(sS, row, col);
        const float term = has_products(p) ? ld_shared_f32(term_at(smem + Shape::kTerms, row, col)) : 0.f;
        st_shared_f32(at, compose(p, cap, b, h, i0 + row, j0 + col, ld_shared_f32(at) * c[x], rb.r[x] - rb.key(col, keys), rb.gm[x], rb.p0, rb.p1, term).x);
      });
      sync_warp();
      fragments_from(sS, s[0]);
    } else {
      FASTPE_UNROLL
      for (int n = 0; n < kNt; ++n)
        FASTPE_UNROLL
        for (int e = 0; e < 2; ++e) {
          const uint32_t col = 8 * n + frag_col(e);
          float y = 0;
          if constexpr (kHasPositions<kKind>) y = rb.key(int(col), keys);
          FASTPE_UNROLL
          for (int x = 0; x < kRows; ++x) {
            float& v = s[x >> 1][n][2 * (x & 1) + e];
            v = v * c[x];
            cap.apply(v);
            if constexpr (kKind == Kind::table) v += ld_shared_f32(sT + 4 * (local_row(x) + (kBlockN - 1) - col));
            else v = rb.add(x, v, y);
          }
        }
    }
    if (partial) {
      FASTPE_UNROLL
      for (int n = 0; n < kNt; ++n)
        FASTPE_UNROLL
        for (int e = 0; e < 2; ++e)
          FASTPE_UNROLL
          for (int x = 0; x < kRows; ++x)
            if (!(seen[x] >> (8 * n + e) & 1)) s[x >> 1][n][2 * (x & 1) + e] = -kInf;
    }

    // ---- online softmax ----------------------------------------------------------------------------------------------------------
    FASTPE_UNROLL
    for (int x = 0; x < kRows; ++x) {
      const float alpha = online_softmax<kNt>(m[x], l[x], [&](int n, int e) -> float& { return s[x >> 1][n][2 * (x & 1) + e]; });
      FASTPE_UNROLL
      for (int d = 0; d < kDt; ++d) {
        o[x >> 1][d][2 * (x & 1)] *= alpha;
        o[x >> 1][d][2 * (x & 1) + 1] *= alpha;
      }
    }

    // ---- O += P V -------------------------------------------------------------------------------------------------------------------
    product_nn(o[0], s[0], v_rows);
  }

  }  // regions

  // ---- normalise and store -------------------------------------------------------------------------------------------------------------
  cp_async_wait<0>();
  FASTPE_UNROLL
  for (int x = 0; x < kRows; ++x) {
    l[x] += shfl_xor(l[x], 1);
    l[x] += shfl_xor(l[x], 2);
  }
  if (a.stats && thread_index() == 0) {
    a.stats[2 * block_index()] = visited;
    a.stats[2 * block_index() + 1] = decayed;
  }
  if (a.splits > 1) {
    FASTPE_UNROLL
    for (int x = 0; x < kRows; ++x) {
      if (row_of(x) >= p.Nq) continue;
      const int64_t row = ((split * p.B + b) * p.H + h) * p.Nq + row_of(x);
      if ((lane_index() & 3) == 0) {
        a.part_ml[2 * row] = m[x];
        a.part_ml[2 * row + 1] = l[x];
      }
      FASTPE_UNROLL
      for (int d = 0; d < kDt; ++d)
        FASTPE_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int64_t channel = 8 * d + frag_col(e);
          if (channel < p.Dv) a.part_o[row * p.Dv + channel] = o[x >> 1][d][2 * (x & 1) + e];
        }
    }
    return;
  }
  float inv[kRows];
  FASTPE_UNROLL
  for (int x = 0; x < kRows; ++x) inv[x] = finish_row(p, b, h, row_of, x, m[x], l[x]);
  if constexpr (kIsF32<T>) {
    FASTPE_UNROLL
    for (int x = 0; x < kRows; ++x)
      FASTPE_UNROLL
      for (int d = 0; d < kDt; ++d)
        FASTPE_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int64_t channel = 8 * d + frag_col(e);
          if (row_of(x) < p.Nq && channel < p.Dv) (static_cast<float*>(p.o.p) + b * p.o.sb + h * p.o.sh + row_of(x) * p.o.sn)[channel] = o[0][d][2 * (x & 1) + e] * inv[x];
        }
  } else {
    store_rows<T, kD, kMt>(p, sQ, b, h, i0, rows, [&](int x, int d, int e) { return o[x >> 1][d][2 * (x & 1) + e] * inv[x]; });
  }
}

// The splits of a call put together, one warp a row: lane x of the first `splits` has split x's weight.
template <class T>
FASTPE_KERNEL(128, 1) attn_join_kernel(const FASTPE_GRID_CONSTANT FwdArgs a) {
  const AttnParams& p = a.p;
  const float kInf = __builtin_inff();
  const int64_t rows = p.B * p.H * p.Nq, row = int64_t(block_index()) * 4 + warp_index();
  if (row >= rows) return;
  const int64_t i = row % p.Nq, h = row / p.Nq % p.H, b = row / p.Nq / p.H;
  const int lane = int(lane_index());
  const float* ml = a.part_ml + 2 * (lane * rows + row);
  const float m = lane < a.splits ? ml[0] : -kInf;
  float top = m;
  FASTPE_UNROLL
  for (uint32_t s = 1; s < 32; s *= 2) top = max(shfl_xor(top, s), top);
  const float sink = p.sink.p ? *aux_at<float>(p.sink, 0, h) * float(kLog2e) : -kInf;
  top = max(sink, top);
  const float safe = top == -kInf ? 0.f : top;
  // Weight of a split that saw nothing: 0, whatever its sums; of one that saw NaN alone, which no maximum keeps: NaN.
  const float w = m == -kInf ? (lane < a.splits && ml[1] != ml[1] ? ml[1] : 0.f) : ex2_approx(m - safe);
  float l = w == 0 ? 0.f : w * ml[1];
  FASTPE_UNROLL
  for (uint32_t s = 1; s < 32; s *= 2) l += shfl_xor(l, s);
  l += sink == -kInf ? 0.f : ex2_approx(sink - safe);
  const float inv = l == 0 ? 0.f : 1.f / l;
  if (lane == 0) static_cast<float*>(p.lse)[row] = l == 0 ? -kInf : (safe + lg2_approx(l)) * float(kLn2);
  Stored<T>* out = static_cast<Stored<T>*>(p.o.p) + b * p.o.sb + h * p.o.sh + i * p.o.sn;
  Stored<T>* residual = p.residual.p ? static_cast<Stored<T>*>(p.residual.p) + b * p.residual.sb + h * p.residual.sh + i * p.residual.sn : nullptr;
  for (int64_t d0 = 0; d0 < p.Dv; d0 += 32) {
    const int64_t d = d0 + lane;
    float y = 0;
    for (int s = 0; s < a.splits; ++s) {
      const float ws = shfl_idx(w, uint32_t(s));
      if (ws != 0 && d < p.Dv) y = fma(ws, a.part_o[(s * rows + row) * p.Dv + d], y);
    }
    if (d >= p.Dv) continue;
    y *= inv;
    const Stored<T> rounded = T::narrow(y);
    out[d] = rounded;
    if (residual) residual[d] = T::narrow(y - T::wide(rounded));
  }
}

}  // namespace fastpe::cuda
