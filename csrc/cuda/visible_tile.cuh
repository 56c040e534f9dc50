// Which pairs of a tile are visible by data, and which belong to a region. What follows from indices alone is in
// pos/visible.h and pos/region.h.
#pragma once

#include "plan.h"
#include "tile.cuh"

namespace fastpe::cuda {

// Whether some pair of queries [i0, i1), the block qb, and keys [j0, j1), the tile t, may be visible by data.
FASTPE_DEVICE bool tile_may_see(const AttnParams& p, const Spans& s, int64_t b, int64_t h, int64_t qb, int64_t i0, int64_t i1, int64_t t, int64_t j0, int64_t j1) {
  if (s.k_id) {
    const int32_t *q = s.q_id + b * s.q_id_sb + 2 * qb, *k = s.k_id + b * s.k_id_sb + 2 * t;
    if (q[1] < k[0] || k[1] < q[0] || k[1] < 0) return false;
  }
  if (s.lower && s.lower[b * s.lower_sb + 2 * qb] >= j1) return false;
  if (s.interval) {
    const int64_t plane = tiles::ceil_div(p.Nk, kBlockN) * 2, I0 = i0 + p.Nk - p.Nq, I1 = i1 + p.Nk - p.Nq;
    const int32_t* a = s.interval + b * s.interval_sb + 2 * t;
    if (!(a[0] < I1 && I0 < a[plane + 1]) && !(a[2 * plane] < I1 && I0 < a[3 * plane + 1])) return false;
  }
  if (p.vis.map) {
    const int64_t q0 = i0 / p.vis.block_q, q1 = (i1 - 1) / p.vis.block_q, k0 = j0 / p.vis.block_k, k1 = (j1 - 1) / p.vis.block_k;
    // Many small blocks cost more to look at than they save.
    if ((q1 - q0 + 1) * (k1 - k0 + 1) > 32) return true;
    const uint8_t* map = p.vis.map + b * p.vis.map_sb + h * p.vis.map_sh;
    for (int64_t q = q0; q <= q1; ++q)
      for (int64_t k = k0; k <= k1; ++k)
        if (map[q * p.vis.map_sn + k]) return true;
    return false;
  }
  return true;
}

// Whether every pair of a tile that tile_may_see lets pass has the one answer of its block.
FASTPE_DEVICE bool map_is_by_tile(const Visibility& v) { return v.block_q % 64 == 0 && v.block_k % kBlockN == 0; }
FASTPE_DEVICE bool sees_by_rules(const Visibility& v) { return v.intervals || v.lower || v.relation || (v.map && !map_is_by_tile(v)); }

// Intervals, lower bounds, segments, block map. Out of line: it would stand at every score of a fragment. The host cannot
// look at ids on a device: one out of range sees nothing. shift: what a batch entry of fewer keys than Nk adds to its absolute
// rows.
FASTPE_NOINLINE bool rules_allow(const AttnParams& p, int64_t b, int64_t i, int64_t j, int64_t h, int64_t shift = 0) {
  const Visibility& v = p.vis;
  const int64_t I = i + p.Nk - p.Nq + shift;
  if (v.lower && j < v.lower[b * v.lower_sb + i]) return false;
  if (v.intervals) {
    const int32_t* a = v.intervals + b * v.intervals_sb + j;
    if (!(I >= a[0] && I < a[p.Nk]) && !(I >= a[2 * p.Nk] && I < a[3 * p.Nk])) return false;
  }
  if (v.relation) {
    const int64_t q = v.q_seg[b * v.q_seg_sb + i], k = v.k_seg[b * v.k_seg_sb + j];
    if (q < 0 || q >= v.Sq || k < 0 || k >= v.Sk || !v.relation[q * v.Sk + k]) return false;
  }
  return !v.map || v.map[b * v.map_sb + h * v.map_sh + i / v.block_q * v.map_sn + j / v.block_k];
}

// Whether query i sees key j by data. Indices are in range.
FASTPE_DEVICE bool has_data(const Visibility& v) { return v.k_ids || v.mask || sees_by_rules(v); }
FASTPE_DEVICE bool sees(const AttnParams& p, int64_t b, int64_t h, int64_t i, int64_t j, int64_t shift = 0) {
  const Visibility& v = p.vis;
  if (v.k_ids) {
    const int32_t id = v.k_ids[b * v.k_ids_sb + j];
    if (id < 0 || id != v.q_ids[b * v.q_ids_sb + i]) return false;
  }
  if (v.mask && !v.mask[b * v.mask_sb + h * v.mask_sh + i * v.mask_sn + j * v.mask_sk]) return false;
  return !sees_by_rules(v) || rules_allow(p, b, i, j, h, shift);
}

// ---- regions ----------------------------------------------------------------------------------------------------------

// The table of region x, and the one that turns key j in copy x of the keys.
FASTPE_DEVICE Rope region_rope(Rope r, int x) {
  r.cos.p = static_cast<float*>(r.cos.p) + x * r.sr;
  r.sin.p = static_cast<float*>(r.sin.p) + x * r.sr;
  return r;
}
FASTPE_DEVICE Rope key_rope(const AttnParams& p, int x, int64_t j) {
  return region_rope(p.k_rope, pos::region_by_key(p.region.kind) ? pos::region_of(p.region, 0, j) : x);
}
// Some pair, or every pair, of a tile is in region x.
FASTPE_DEVICE bool tile_has_region(const AttnParams& p, int x, int64_t I0, int64_t I1, int64_t j0, int64_t j1) {
  if (p.region.kind == RegionKind::none) return true;
  const pos::Range r = pos::keys_of_region(p.region, x, I0, I1, j0, j1);
  return r.lo < r.hi;
}
FASTPE_DEVICE bool tile_has_one_region(const AttnParams& p, int64_t I0, int64_t I1, int64_t j0, int64_t j1) {
  int n = 0;
  for (int x = 0; x < pos::region_count(p.region.kind); ++x) n += tile_has_region(p, x, I0, I1, j0, j1);
  return n <= 1;
}

// ---- what a lane may see, as bits --------------------------------------------------------------------------------------
// Found before the products, while registers are free, and two registers a row afterwards. A lane has the columns
// 8 n + 2 t + e of a fragment, t its lane modulo 4: what is returned is shifted by 2 t, so that bit 8 n + e is theirs.

// Bits c of 64 with lo <= base + c < hi.
FASTPE_DEVICE uint64_t bits_between(int64_t lo, int64_t hi, int64_t base) {
  lo = lo > base ? lo - base : 0;
  hi = hi > base ? hi - base : 0;
  if (lo >= hi || lo >= 64) return 0;
  return (~uint64_t(0) << lo) & (hi >= 64 ? ~uint64_t(0) : (uint64_t(1) << hi) - 1);
}
// Clears the lane's bits of pairs that `see(column)` denies.
template <class See>
FASTPE_DEVICE uint64_t lane_bits(uint64_t bits, bool data, See&& see) {
  const uint32_t first = frag_col(0);
  if (data)
    FASTPE_NO_UNROLL
    for (uint32_t c = 0; c < 16; ++c) {
      const uint32_t col = 8 * (c >> 1) + first + (c & 1);
      if ((bits >> col & 1) && !see(int(col))) bits &= ~(uint64_t(1) << col);
    }
  return bits >> first;
}

// Keys of the tile at j0 that query i, absolute row I, sees in a region. shared: the tile has another region too.
FASTPE_DEVICE uint64_t keys_seen(const AttnParams& p, pos::Band band, int region, bool shared, bool data, int64_t b, int64_t h, int64_t i, int64_t j0) {
  const int64_t I = i + p.Nk - p.Nq;
  const pos::Range w = pos::window_of_rows(band, I, I + 1, p.Nk), causal = pos::window_of_rows({0, band.right, 0}, I, I + 1, p.Nk);
  uint64_t bits = bits_between(w.lo, w.hi, j0) | bits_between(0, band.sinks < causal.hi ? band.sinks : causal.hi, j0);
  if (shared) {
    const pos::Range r = pos::keys_of_region(p.region, region, I, I + 1, j0, j0 + kBlockN);
    bits &= bits_between(r.lo, r.hi, j0);
  }
  if (data && i >= p.Nq) return 0;
  return lane_bits(bits, data, [&](int col) { return sees(p, b, h, i, j0 + col); });
}
// Queries of the block at i0, `rows` of them, that see key j in a region.
FASTPE_DEVICE uint64_t queries_seen(const AttnParams& p, pos::Band band, int region, bool shared, bool data, int64_t b, int64_t h, int64_t i0, int rows, int64_t j) {
  const int64_t I0 = i0 + p.Nk - p.Nq;
  const pos::Range w = pos::rows_of_key(band, j);
  uint64_t bits = bits_between(w.lo, w.hi, I0) & bits_between(I0, I0 + rows, I0);
  if (shared) {
    const pos::Range r = pos::rows_of_region(p.region, region, j);
    bits &= bits_between(r.lo, r.hi, I0);
  }
  if (j >= p.Nk) return 0;
  return lane_bits(bits, data, [&](int row) { return sees(p, b, h, i0 + row, j); });
}

}  // namespace fastpe::cuda
