// Gradients of what a bias looks up: tables, pieces, row and column terms, dense numbers. One kernel that recomputes dS
// of a tile and adds it up where it belongs; which block walks which tiles decides what stays private to it, so that
// there are no atomics and every sum has one order.
//
//   walk        one block per                          keeps
//   diagonals   (batch, head, tile diagonal)           a sum by offset I - j, 127 of them
//   bins        (batch, head, part of the queries)     a sum by entry, in global memory, for each of its warps
//   rows        (batch, head, block of queries)        what belongs to a query
//   columns     (batch, head, tile of keys)            what belongs to a key
//   pairs       (entry of the gradient: batch, head, block of queries, tile of keys)   every pair's own number
//
// It forms two of the backward pass's seven products again. What leaves it by diagonals, bins, rows and columns is
// linear in the length; sum.cuh adds up what blocks share.
#pragma once

#include "attn_bwd.cuh"

namespace fastpe::cuda {

// The same kernel without dO makes what is asked of probabilities alone (chunked.md M6): their weighted sums by key, and
// rows of probabilities or scores.
enum class Walk : int32_t { diagonals, bins, rows, columns, pairs };
// What is added up: dS of the table's entry, of the multiplicative kernel, of the pieces (times x, and alone), of row and
// column entries, of the dense bias, of factor and addend of a pair of segments; delta itself, as sum of P dP by row. That one is free of what rounding P to 16 bits
// put into out, which leaves row sums of dS that are not zero (FIRE's weights lose two digits in bf16).
// Of products with tables: a row's vector by rows, a key's by columns, and the vectors of a table by diagonals, where all tiles
// of a block have the same 127 offsets.
enum class Target : int32_t { table, omega, pieces, entries, dense, factor, segments, delta, mass, probabilities, logits, row_q, col_k, row_e, col_e };
constexpr FASTPE_HD bool of_products(Target t) { return t >= Target::row_q; }

struct TermsArgs {
  BwdArgs g;
  Walk walk;
  Target target;
  float* out;
  int64_t width;  // bins: sums of a warp. rows, columns: numbers of a token. Products by diagonals: numbers of an offset
  int parts;      // bins
  bool all_b, all_h;  // pairs: the gradient has one entry for all batches, heads
  int64_t first_row = 0;  // pairs: `out` holds the queries from this one on
  Aux weights;            // mass: (B|1,H|1,Nq); may be null
};

// Parts of the queries of one (batch, head) that add into bins of their own. Of shapes alone.
constexpr int64_t bin_parts(int64_t query_blocks) { return query_blocks < 8 ? query_blocks : 8; }
constexpr int kBinWarps = kBwdThreads / 32;

// What a tile adds to the gradients of products with tables; scores: dS by (query, key), 0 where there is none.
//   dx_m += sum over o of dS e[index]            own tokens of a warp: a strip as in strips.cuh
//   de[offset] += sum over m of dS x_m           32 offsets a warp: offset I0 - j0 - 63 + v at v
template <class T>
FASTPE_DEVICE void add_tile_products(const TermsArgs& a, int64_t b, int64_t h, int64_t i0, int64_t j0, int rows, int keys, uint32_t scores, float* out) {
  const AttnParams& p = a.g.a.fwd;
  const Bias& s = p.bias;
  const bool by_offset = a.walk == Walk::diagonals, by_row = a.target == Target::row_q || a.target == Target::row_e;
  const int d = int(s.strip_d), warp = int(warp_index());
  const Aux e = by_row ? s.row_e : s.col_e, x = by_row ? s.row_q : s.col_k;
  const float *table = aux_at<float>(e, 0, h), *vectors = aux_at<float>(x, b, h, by_row ? i0 : j0);
  const int tokens = by_row ? rows : keys;
  FASTPE_NO_UNROLL
  for (int part = 0; part < (by_offset ? 2 : 1); ++part) {
    const int own = by_offset ? 32 * warp + 16 * part : 16 * warp;
    const int64_t t0 = i0 + p.Nk - p.Nq - j0 + (by_row ? own + 15 : -own - 15);
    // dS of offset or token m and token or place k.
    const auto ds = [&](int m, int k) {
      int one, other;  // of the side of x, of the other side
      if (by_offset) {
        const int v = own + m - (kBwdBlock - 1);  // query less key
        one = k, other = by_row ? k - v : k + v;
      } else {
        one = own + m, other = k + m - 15;
      }
      if (other < 0 || other >= kBwdBlock) return 0.f;
      return ld_shared_f32(by_row ? score_at(scores, one, other) : score_at(scores, other, one));
    };
    const auto vector = [&](int k) -> const float* {
      if (by_offset) return k < tokens ? vectors + k * x.sn : nullptr;
      const int32_t id = term_entry(s, by_row ? t0 - k : t0 + k);
      return id < 0 ? nullptr : table + id * e.sn;
    };
    add_products<T>(out + int64_t(own) * d, by_offset ? 16 : tokens - own, d, by_offset ? kBwdBlock : kPlaces, ds, vector);
  }
}

template <class T, int kD>
FASTPE_KERNEL(kBwdThreads, 1) attn_bwd_terms_kernel(const FASTPE_GRID_CONSTANT TermsArgs a) {
  using Shape = BwdTile<kD>;
  constexpr int kNt = kBwdBlock / 8, kItems = kBwdBlock * kBwdBlock / kBwdThreads;
  const BwdArgs& g = a.g;
  const AttnParams& p = g.a.fwd;
  const float kInf = __builtin_inff();
  const int64_t nqb = tiles::ceil_div(p.Nq, kBwdBlock), nkt = tiles::ceil_div(p.Nk, kBlockN), offset = p.Nk - p.Nq;
  const pos::Band band{p.vis.left, p.vis.right, p.vis.sinks};
  const uint32_t smem = shared_base(), sQ = smem + Shape::kQ, sO = smem + Shape::kDo, sK = smem + Shape::kK, sV = smem + Shape::kV;
  const uint32_t s1 = smem + Shape::kS, s2 = Shape::kOverlay ? sV : smem + Shape::kDp;
  Operand<T, kD> q_rows{sQ}, o_rows{sO}, k_rows{sK}, v_rows{sV};
  const int tid = int(thread_index());

  // ---- which tiles ----------------------------------------------------------------------------------------------------
  int64_t b0 = 0, b1 = 0, h0 = 0, h1 = 0, q0 = 0, q1 = nqb, step = 1, k0 = 0, k1 = nkt, diagonal = 0;
  const int64_t block = block_index();
  const auto one_head = [&](int64_t bh) { b0 = bh / p.H, b1 = b0 + 1, h0 = bh % p.H, h1 = h0 + 1; };
  if (a.walk == Walk::diagonals) {
    one_head(block / (nqb + nkt - 1));
    diagonal = block % (nqb + nkt - 1) - (nkt - 1);
    q0 = diagonal > 0 ? diagonal : 0;
    q1 = nkt + diagonal < nqb ? nkt + diagonal : nqb;
  } else if (a.walk == Walk::bins) {
    one_head(block / a.parts);
    q0 = block % a.parts;
    step = a.parts;
  } else if (a.walk == Walk::rows) {
    one_head(block / nqb);
    q0 = block % nqb;
    q1 = q0 + 1;
  } else if (a.walk == Walk::columns) {
    one_head(block / nkt);
    k0 = block % nkt;
    k1 = k0 + 1;
  } else {
    const int64_t first = a.first_row / kBwdBlock;
    k0 = block % nkt;
    k1 = k0 + 1;
    q0 = first + block / nkt % (nqb - first);
    q1 = q0 + 1;
    const int64_t rest = block / nkt / (nqb - first), heads = a.all_h ? 1 : p.H;
    b0 = a.all_b ? 0 : rest / heads, b1 = a.all_b ? p.B : b0 + 1;
    h0 = a.all_h ? 0 : rest % heads, h1 = a.all_h ? p.H : h0 + 1;
  }

  // ---- where the sums are -----------------------------------------------------------------------------------------------
  float sum = 0;         // of a thread: an offset, a row, a column
  // pairs: number x of this thread, null outside the array. In global memory: registers are short.
  const auto own_pair = [&](int x) -> float* {
    const int item = x * kBwdThreads + tid;
    const int64_t i = q0 * kBwdBlock + item / kBwdBlock, j = k0 * kBlockN + item % kBwdBlock;
    const int64_t plane = block / nkt / (nqb - a.first_row / kBwdBlock);
    return i >= a.first_row && i < p.Nq && j < p.Nk ? a.out + (plane * (p.Nq - a.first_row) + i - a.first_row) * p.Nk + j : nullptr;
  };
  const float nothing = a.target == Target::logits ? -kInf : 0.f;  // of a pair that is not visible
  const bool backward = g.a.d_o.p != nullptr;
  if (a.walk == Walk::pairs)
    FASTPE_NO_UNROLL
    for (int x = 0; x < kItems; ++x)
      if (float* to = own_pair(x)) *to = nothing;
  float* bins = a.out + (int64_t(block) * kBinWarps + warp_index()) * a.width;
  if (a.walk == Walk::bins) {
    for (int64_t x = lane_index(); x < a.width; x += 32) bins[x] = 0;
    sync_warp();
  }
  // The numbers of this thread's row or column of entries.
  float* entries = nullptr;
  if (a.target == Target::entries && tid < kBwdBlock) {
    const bool rows = a.walk == Walk::rows;
    const int64_t n = rows ? q0 * kBwdBlock + tid : k0 * kBlockN + tid, N = rows ? p.Nq : p.Nk;
    if (n < N) {
      entries = a.out + ((b0 * p.H + h0) * N + n) * a.width;
      for (int64_t x = 0; x < a.width; ++x) entries[x] = 0;
    }
  }

  // Products: vectors of the block's own tokens or offsets, added to at every tile.
  float* vectors = nullptr;
  if (of_products(a.target)) {
    const bool rows = a.walk == Walk::rows;
    const int64_t n0 = rows ? q0 * kBwdBlock : k0 * kBlockN, N = rows ? p.Nq : p.Nk;
    int64_t count = 2 * kBwdBlock;
    if (a.walk == Walk::diagonals) {
      vectors = a.out + block * count * a.width;
    } else {
      vectors = a.out + ((b0 * p.H + h0) * N + n0) * a.width;
      count = N - n0 < kBwdBlock ? N - n0 : kBwdBlock;
    }
    for (int64_t x = tid; x < count * a.width; x += kBwdThreads) vectors[x] = 0;
  }

  const Softcap cap(p);
  float c[2] = {}, scale[2] = {}, lse[2] = {}, delta[2] = {};
  RowBias<Kind::composed, 2> rb;
  FASTPE_NO_UNROLL
  for (int64_t b = b0; b < b1; ++b)
    FASTPE_NO_UNROLL
    for (int64_t h = h0; h < h1; ++h)
      FASTPE_NO_UNROLL
      for (int64_t qb = q0; qb < q1; qb += step) {
        const int64_t hk = h / (p.H / p.Hk), i0 = qb * kBwdBlock, I0 = i0 + offset;
        const int rows = int(p.Nq - i0 < kBwdBlock ? p.Nq - i0 : kBwdBlock);
        const int64_t I1 = I0 + rows;
        const auto row_of = [&](int x) { return i0 + int(warp_index() * 16 + frag_row(uint32_t(x))); };
        bool fresh = true;  // Q and dO are to be loaded
        const int64_t first = a.walk == Walk::diagonals ? qb - diagonal : k0, last = a.walk == Walk::diagonals ? first + 1 : k1;
        FASTPE_NO_UNROLL
        for (int64_t t = first; t < last; ++t) {
          const int64_t j0 = t * kBlockN, j1 = j0 + kBlockN < p.Nk ? j0 + kBlockN : p.Nk;
          const pos::Range see = pos::keys_in_tile(band, I0, I1, j0, j1);
          if (see.lo >= see.hi || !tile_may_see(p, g.spans, b, h, qb, i0, i0 + rows, t, j0, j1)) continue;
          const int keys = int(j1 - j0);
          sync_block();
          if (has_products(p)) make_terms_apart<T, 5>(p, b, h, i0, j0, rows, keys, smem + Shape::kTerms);
          if (fresh) {
            if (backward) o_rows.template load<kBwdThreads>(row_at<T>(g.a.d_o, b, h, i0), g.a.d_o.sn, rows, int(p.Dv), g.aligned_do);
            rb.start(p, b, h, offset, row_of);
            FASTPE_UNROLL
            for (int x = 0; x < 2; ++x) {
              const int64_t i = row_of(x) < p.Nq ? row_of(x) : p.Nq - 1, at = (b * p.H + h) * p.Nq + i;
              scale[x] = float(p.scale) * (p.row_scale.p ? *aux_at<float>(p.row_scale, b, h, i) : 1.f);
              c[x] = scale[x] * float(kLog2e);
              const float v = p.lse ? static_cast<const float*>(p.lse)[at] : 0.f;
              lse[x] = v == -kInf ? kInf : v * float(kLog2e);
              delta[x] = backward ? g.delta[at] : 0.f;
            }
            fresh = false;
          }
          if (backward) v_rows.template load<kBwdThreads>(row_at<T>(p.v, b, hk, j0), p.v.sn, keys, int(p.Dv), g.aligned_v);
          // Scores of every region the tile has, each on its own pairs.
          bool first_region = true;
          float s[kNt][4];
          FASTPE_NO_UNROLL
          for (int region = 0; region < pos::region_count(p.region.kind); ++region) {
            if (!tile_has_region(p, region, I0, I1, j0, j1)) continue;
            if (!first_region) sync_block();
            q_rows.template load<kBwdThreads>(row_at<T>(g.q, b, h, i0) + region * g.q_copy, g.q.sn, rows, int(p.D), g.aligned_q);
            k_rows.template load<kBwdThreads>(row_at<T>(g.k, b, hk, j0) + region * g.k_copy, g.k.sn, keys, int(p.D), g.aligned_k);
            cp_async_commit();
            cp_async_wait<0>();
            sync_block();
            product_nt(s, q_rows, k_rows);
            FASTPE_UNROLL
            for (int x = 0; x < 2; ++x) {
              const int64_t I = row_of(x) + offset;
              const pos::Range r = pos::keys_of_region(p.region, region, I, I + 1, j0, j0 + kBlockN);
              const int lo = int(r.lo - j0), hi = int(r.hi - j0), row = int(warp_index() * 16 + frag_row(uint32_t(x)));
              FASTPE_UNROLL
              for (int n = 0; n < kNt; ++n)
                FASTPE_UNROLL
                for (int e = 0; e < 2; ++e) {
                  const int col = int(8 * n + frag_col(uint32_t(e)));
                  if (col >= lo && col < hi) st_shared_f32(score_at(s1, row, col), s[n][2 * x + e]);
                }
            }
            first_region = false;
          }
          if (backward) {
            product_nt(s, o_rows, v_rows);
            if constexpr (Shape::kOverlay) sync_block();
            fragments_to(s2, s);
          }
          sync_warp();

          rb.tile(j0, j1, I0, I1, false);
          const bool data = has_data(p.vis);
          for_own_rows([&](int x, int row, int col) {
            const uint32_t at = score_at(s1, row, col), at2 = score_at(s2, row, col);
            const int64_t i = i0 + row, j = j0 + col, I = I0 + row;
            float value = nothing, second = 0;
            bool visible = row < rows && col < keys && pos::visible(band, I, j);
            if (visible && data) visible = sees(p, b, h, i, j);
            if (visible) {
              const float raw = ld_shared_f32(at), d = rb.r[x] - rb.key(col, keys);
              const float term = has_products(p) ? ld_shared_f32(term_at(smem + Shape::kTerms, row, col)) : 0.f;
              const Composed made = compose(p, cap, b, h, i, j, raw * c[x], d, rb.gm[x], rb.p0, rb.p1, term);
              const float prob = ex2_approx(made.x - lse[x]), dp = backward ? ld_shared_f32(at2) : 0.f, ds = prob == 0 ? 0.f : prob * (dp - delta[x]);
              value = ds * made.outer;
              if (a.target == Target::delta) value = prob * dp;
              if (a.target == Target::mass) value = prob * (a.weights.p ? aux_at<float>(a.weights, b, h)[i] : 1.f);
              if (a.target == Target::probabilities) value = prob;
              if (a.target == Target::logits) value = made.x * float(kLn2);
              if (a.target == Target::omega) value = ds * made.inner * scale[x] * raw * factor_at(p, b, h, i, j);
              if (a.target == Target::factor) value = ds * made.inner * scale[x] * raw * omega_at(p, h, i, j);
              if (p.bias.form == BiasForm::fire && (a.target == Target::table || a.target == Target::pieces)) {
                const FireAt f = fire_at(p, h, d, I - j, rb.gm[x]);
                if (a.target == Target::pieces) second = value * f.x;
                else value *= f.slope * rb.gm[x];
              }
            }
            st_shared_f32(at, value);
            if (a.target == Target::pieces) st_shared_f32(at2, second);
          });

          if (a.walk == Walk::bins) {
            // A warp's own rows, 32 columns at a time. Lanes with the same entry: the first adds all of them, in order.
            sync_warp();
            FASTPE_NO_UNROLL
            for (int group = 0; group < 32; ++group) {
              const int row = int(warp_index()) * 16 + group / 2, col = 32 * (group & 1) + int(lane_index());
              int64_t entry = -1;
              if (row < rows && col < keys) {
                const int64_t i = i0 + row, j = j0 + col, tt = I0 + row - j;
                const float d = position_difference(p, b, h, i, j);
                if (a.target == Target::pieces) {
                  const float gm = p.bias.gamma.p ? *aux_at<float>(p.bias.gamma, b, h, i) : 1.f;
                  entry = fire_at(p, h, d, tt, gm).piece;
                } else if (a.target == Target::table) {
                  entry = table_entry(p.bias, d, tt);
                } else {
                  entry = segments_at(p.bias, b, i, j, p.bias.Sk);
                }
              }
              const uint32_t same = match_any(uint32_t(int32_t(entry)));
              if (entry >= 0 && (same & ((1u << lane_index()) - 1)) == 0) {
                float v = 0, w = 0;
                for (int l = 0; l < 32; ++l)
                  if (same >> l & 1) {
                    v += ld_shared_f32(score_at(s1, row, 32 * (group & 1) + l));
                    if (a.target == Target::pieces) w += ld_shared_f32(score_at(s2, row, 32 * (group & 1) + l));
                  }
                if (a.target == Target::pieces) {
                  bins[entry] += w;
                  bins[p.bias.pieces_len + entry] += v;
                } else {
                  bins[entry] += v;
                }
              }
              sync_warp();
            }
            continue;
          }
          sync_block();
          if (of_products(a.target)) {
            add_tile_products<T>(a, b, h, i0, j0, rows, keys, s1, vectors);
          } else if (a.walk == Walk::pairs) {
            FASTPE_NO_UNROLL
            for (int x = 0; x < kItems; ++x) {
              const int item = x * kBwdThreads + tid;
              const float v = ld_shared_f32(score_at(s1, item / kBwdBlock, item % kBwdBlock));
              if (float* to = own_pair(x)) *to = backward ? *to + v : v;
            }
          } else if (a.walk == Walk::diagonals) {
            // Thread x: offset I0 - j0 - 63 + x.
            if (tid < 2 * kBwdBlock - 1)
              for (int row = tid < kBwdBlock ? 0 : tid - (kBwdBlock - 1); row < kBwdBlock && row <= tid; ++row) sum += ld_shared_f32(score_at(s1, row, row + kBwdBlock - 1 - tid));
          } else if (tid < kBwdBlock) {
            // A run of one entry is added at once.
            int32_t entry = -1;
            float run = 0;
            const auto put = [&] {
              if (entries && entry >= 0) entries[entry] += run;
            };
            for (int x = 0; x < kBwdBlock; ++x) {
              const int row = a.walk == Walk::rows ? tid : x, col = a.walk == Walk::rows ? x : tid;
              const float v = ld_shared_f32(score_at(s1, row, col));
              if (a.target != Target::entries) {
                sum += v;
                continue;
              }
              const int32_t id = term_entry(p.bias, I0 + row - j0 - col);
              if (id != entry) {
                put();
                entry = id;
                run = 0;
              }
              run += v;
            }
            put();
          }
        }
      }
  cp_async_wait<0>();

  if (of_products(a.target)) return;
  if (a.walk == Walk::diagonals) {
    a.out[int64_t(block) * 2 * kBwdBlock + tid] = sum;
  } else if (a.walk != Walk::bins && a.walk != Walk::pairs && a.target != Target::entries && tid < kBwdBlock) {
    const bool rows = a.walk == Walk::rows;
    const int64_t n = rows ? q0 * kBwdBlock + tid : k0 * kBlockN + tid, N = rows ? p.Nq : p.Nk;
    if (n >= N) return;
    const int64_t at = (b0 * p.H + h0) * N + n;
    if (a.target == Target::delta && g.a.dlse && static_cast<const float*>(p.lse)[at] != -kInf) sum -= static_cast<const float*>(g.a.dlse)[at];
    a.out[at] = sum;
  }
}

// Sums by offset to sums by entry of the table, one warp per (head or all heads, entry).
struct DiagonalArgs {
  const float* x;  // (B,H,diagonals,128)
  float* out;      // (H|1,len)
  BiasForm form;
  int64_t B, H, Nq, Nk, len;
  bool all_h;
};
FASTPE_KERNEL(128, 1) diagonal_sum_kernel(const FASTPE_GRID_CONSTANT DiagonalArgs a) {
  const int64_t at = int64_t(block_index()) * 4 + warp_index();
  if (at >= (a.all_h ? 1 : a.H) * a.len) return;
  const int64_t entry = at % a.len, h0 = a.all_h ? 0 : at / a.len, h1 = a.all_h ? a.H : h0 + 1;
  const int64_t nqb = tiles::ceil_div(a.Nq, kBwdBlock), nkt = tiles::ceil_div(a.Nk, kBlockN), diagonals = nqb + nkt - 1, offset = a.Nk - a.Nq;
  double sum = 0;
  FASTPE_NO_UNROLL
  for (int side = 0; side < 2; ++side) {
    const pos::OffsetRange r = pos::offsets_of_entry(a.form, entry, a.len, side);
    const int64_t lo = r.lo > 1 - a.Nk + offset ? r.lo : 1 - a.Nk + offset, hi = r.hi < offset + a.Nq ? r.hi : offset + a.Nq;
    for (int64_t t = lo + lane_index(); t < hi; t += 32) {
      // Tile diagonal d holds the offsets from 64 d + offset - 63 on.
      const int64_t from = t - offset + (kBwdBlock - 1) + (nkt - 1) * kBwdBlock, d = from / kBwdBlock, x = from % kBwdBlock;
      for (int64_t b = 0; b < a.B; ++b)
        for (int64_t h = h0; h < h1; ++h) {
          const float* v = a.x + (b * a.H + h) * diagonals * 2 * kBwdBlock;
          if (d < diagonals) sum += v[d * 2 * kBwdBlock + x];
          if (d > 0 && x < kBwdBlock - 1) sum += v[(d - 1) * 2 * kBwdBlock + x + kBwdBlock];
        }
    }
  }
  float total = float(sum);
  FASTPE_UNROLL
  for (uint32_t s = 1; s < 32; s *= 2) total += shfl_xor(total, s);
  if (lane_index() == 0) a.out[at] = total;
}

// Vectors by offset to vectors by entry, one block per (batch, head, entry).
struct OffsetArgs {
  const float* x;  // (B,H,diagonals,128,d)
  float* out;      // (B,H,R,d)
  Bias bias;
  int64_t Nq, Nk;
};
FASTPE_KERNEL(128, 1) offset_sum_kernel(const FASTPE_GRID_CONSTANT OffsetArgs a) {
  constexpr int kParts = 8;  // of 32 channels: strip_d <= 256
  const int64_t d = a.bias.strip_d, R = a.bias.terms_len, entry = block_index() % R, bh = block_index() / R;
  const int64_t nkt = tiles::ceil_div(a.Nk, kBlockN), diagonals = tiles::ceil_div(a.Nq, kBwdBlock) + nkt - 1, offset = a.Nk - a.Nq;
  const float* x = a.x + bh * diagonals * 2 * kBwdBlock * d;
  const uint32_t lane = lane_index(), warp = warp_index(), smem = shared_base();
  double sum[kParts] = {};
  // Offset n of all: that of the first query and the last key, plus n. A warp looks at every fourth 32 of them.
  const int64_t count = a.Nq + a.Nk - 1;
  FASTPE_NO_UNROLL
  for (int64_t n0 = int64_t(warp) * 32; n0 < count; n0 += 128) {
    const int64_t mine = n0 + lane;
    uint32_t found = ballot(mine < count && term_entry(a.bias, offset + 1 - a.Nk + mine) == entry);
    FASTPE_NO_UNROLL
    for (int n = 0; n < 32; ++n) {
      if (!(found >> n & 1)) continue;
      // Tile diagonal q holds the offsets from 64 (q - nkt + 1) + offset - 63 on.
      const int64_t from = n0 + n + nkt * kBlockN - a.Nk, q = from / kBwdBlock, at = from % kBwdBlock;
      FASTPE_UNROLL
      for (int c = 0; c < kParts; ++c) {
        const int64_t channel = 32 * c + lane;
        if (channel >= d) continue;
        if (q < diagonals) sum[c] += x[(q * 2 * kBwdBlock + at) * d + channel];
        if (q > 0 && at < kBwdBlock - 1) sum[c] += x[((q - 1) * 2 * kBwdBlock + at + kBwdBlock) * d + channel];
      }
    }
  }
  FASTPE_UNROLL
  for (int c = 0; c < kParts; ++c) st_shared_f32(smem + (warp * 256 + 32 * c + lane) * 4, float(sum[c]));
  sync_block();
  for (uint32_t c = thread_index(); c < d; c += 128) {
    float total = 0;
    for (uint32_t w = 0; w < 4; ++w) total += ld_shared_f32(smem + (w * 256 + c) * 4);
    a.out[int64_t(block_index()) * d + c] = total;
  }
}

struct ZeroArgs {
  float* out;
  int64_t n;
};
FASTPE_KERNEL(128, 1) zero_kernel(const FASTPE_GRID_CONSTANT ZeroArgs a) {
  const int64_t at = int64_t(block_index()) * 128 + thread_index();
  if (at < a.n) a.out[at] = 0;
}

}  // namespace fastpe::cuda
