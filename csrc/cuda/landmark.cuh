// What the passes of landmark attention share: tiles of whole blocks, which keys of a tile a row meets in which softmax, and
// the inner softmax of one block. chunked.md 3.10 and cpu/landmark_common.h state the method; arXiv 2305.16300.
//
// A landmark closes its block. For a row in block b, an earlier block is one key of the outer softmax, its landmark, whose
// share the inner softmax hands on to the block's ordinary keys; the ordinary keys of b up to the row are outer keys
// themselves. With e_j = exp2(x_j - top) and M the reference of the outer softmax:
//   P_j = exp2(x_j - M)                          in the row's own block
//   P_j = e_j exp2(x_landmark - M) / sum e       in a block the row is past
// A tile is a run of whole blocks of at most kBlockN keys together, so the sums of a row are complete when its tile has been
// read. A longer block has tiles of its own, which the rows past it read twice: for the sums, then for P.
#pragma once

#include "plan.h"
#include "visible_tile.cuh"

namespace fastpe::cuda {

struct LandmarkTile {
  uint64_t ordinary;     // keys that are neither landmarks nor padding, by their place in the tile
  uint64_t landmark;     // landmarks that are not padding
  uint64_t closing;      // landmarks, padding or not
  int32_t begin, end;    // keys
  int32_t first, last;   // tiles [first, last) of a long closed block; else the tile itself

  FASTPE_HD bool long_block() const { return last - first > 1; }
};
// Made on the device (landmark_plan.cuh): the host knows no more than how many tiles there may be.
struct LandmarkPlan {
  LandmarkTile* tile = nullptr;  // (plans, most)
  int32_t* count = nullptr;      // (plans)
  int32_t* own = nullptr;        // (plans, Nk) first key of a key's block
  int32_t* tile_of = nullptr;    // (plans, Nk)
  int64_t most = 0, Nk = 0;
  bool by_batch = false;         // one plan for each batch entry, or one for all

  FASTPE_HD int64_t plan(int64_t b) const { return by_batch ? b : 0; }
};
// Two neighbouring tiles of short blocks hold more than kBlockN keys together; a long block has one tile that is not full and
// can cut a run of short ones in two.
constexpr int64_t most_landmark_tiles(int64_t nk) { return 3 * tiles::ceil_div(nk, kBlockN) + 2; }

// ---- which tiles a block of queries visits ------------------------------------------------------------------------------

// From the last tile of [lo, hi) back to the first. The tiles of a long block that some row is past come twice in a row,
// at first for its sums.
struct LandmarkWalk {
  const LandmarkTile* tile;
  int32_t lo, own_last;  // own_last: first key of the last row's block
  int32_t t;
  bool sums = false;

  FASTPE_DEVICE LandmarkWalk(const LandmarkTile* tile_, int32_t lo_, int32_t hi, int32_t own_last_) : tile(tile_), lo(lo_), own_last(own_last_), t(hi) {}
  // Goes to the next tile; t is -1 after the last one.
  FASTPE_DEVICE void next() {
    if (t < 0) return;
    if (sums) {
      if (t > tile[t].first) {
        --t;
      } else {
        t = tile[t].last - 1;
        sums = false;
      }
      return;
    }
    if (--t < lo) {
      t = -1;
      return;
    }
    sums = tile[t].long_block() && t == tile[t].last - 1 && own_last >= tile[t].end;
  }
};

// The two rows of a lane among the keys, and the first keys of their blocks. A row that sees nothing: -1, 0.
struct LandmarkRows {
  int32_t index[2], own[2];

  template <class RowOf>
  FASTPE_DEVICE LandmarkRows(const AttnParams& p, const LandmarkPlan& plan, int64_t b, RowOf&& row_of) {
    FASTPE_UNROLL
    for (int x = 0; x < 2; ++x) {
      const int64_t i = row_of(x), I = i + p.Nk - p.Nq;
      const bool real = i < p.Nq && I >= 0;
      index[x] = real ? int32_t(I) : -1;
      own[x] = real ? plan.own[plan.plan(b) * p.Nk + I] : 0;
    }
  }
};
// First key of the block of row I, 0 for a row before the first key.
FASTPE_DEVICE int32_t landmark_own(const LandmarkPlan& plan, int64_t b, int64_t I) { return I < 0 ? 0 : plan.own[plan.plan(b) * plan.Nk + I]; }

// Keys of a tile as one row meets them; bit 8 n + e is that of the lane's column 8 n + 2 t + e (visible_tile.cuh).
struct LandmarkBits {
  uint64_t own, inner, landmark;  // outer keys of its block; ordinary keys, and landmarks, of blocks it is past
};
FASTPE_DEVICE LandmarkBits landmark_bits(const LandmarkTile& t, const LandmarkRows& r, int x) {
  const uint64_t past = bits_between(0, r.own[x], t.begin);
  const uint32_t first = frag_col(0);
  return {(t.ordinary & bits_between(r.own[x], int64_t(r.index[x]) + 1, t.begin)) >> first, (t.ordinary & past) >> first, (t.landmark & past) >> first};
}

// Calls f(a, z) for the blocks [a, z] of a tile of whole blocks, z their landmark's place, that some row is past.
template <class F>
FASTPE_DEVICE void for_blocks(const LandmarkTile& t, int32_t own_last, F&& f) {
  int a = 0;
  FASTPE_NO_UNROLL
  for (uint64_t left = t.closing; left; left &= left - 1) {
    const uint32_t low = uint32_t(left), word = low ? low : uint32_t(left >> 32);
    const int z = (low ? 31 : 63) - int(count_leading_zeros(word & (~word + 1)));
    if (t.begin + z >= own_last) break;
    f(a, z);
    a = z + 1;
  }
}

// ---- loads --------------------------------------------------------------------------------------------------------------

// 64 rows of keys or values to a tile, as load_tile. Those not in `real` become 0: they may hold anything, and 0 times
// anything must be 0.
template <int kD, int kThreads>
FASTPE_DEVICE void load_keys(uint32_t tile, const uint16_t* first, int64_t row_stride, uint64_t real, int D, bool aligned) {
  constexpr uint32_t kChunks = Tile<kD>::kChunks;
  static_assert(kBlockN * kChunks % kThreads == 0);
  FASTPE_UNROLL
  for (uint32_t x = 0; x < kBlockN * kChunks / kThreads; ++x) {
    const uint32_t item = x * kThreads + thread_index(), row = item / kChunks, chunk = item % kChunks;
    const bool inside = (real >> row & 1) && int(chunk * 8) < D;
    const uint16_t* src = inside ? first + int64_t(row) * row_stride + chunk * 8 : first;
    const uint32_t dst = tile + Tile<kD>::at(row, chunk);
    if (aligned) cp_async_16(dst, src, inside ? 16 : 0);
    else st_shared_v4(dst, inside ? load_chunk(src) : Quad{});
  }
}

// ---- the inner softmax of one row ---------------------------------------------------------------------------------------

FASTPE_DEVICE float quad_max(float x) {
  x = max(shfl_xor(x, 1), x);
  return max(shfl_xor(x, 2), x);
}
FASTPE_DEVICE float quad_sum(float x) {
  x += shfl_xor(x, 1);
  return x + shfl_xor(x, 2);
}

constexpr int kLandmarkN = kBlockN / 8;

struct InnerSoftmax {
  float top = -__builtin_inff();       // largest score
  float sum = 0, along = 0;            // of e, of e dP
  float landmark = -__builtin_inff();  // score of the landmark; -inf: padding, or a block the row is not past

  // Adds the keys `bits` of row x, whose scores become e relative to the new top. dP counts with kAlong only.
  template <bool kAlong>
  FASTPE_DEVICE void add(float (&s)[kLandmarkN][4], const float (&dp)[kLandmarkN][4], int x, uint64_t bits) {
    float high = top;
    FASTPE_UNROLL
    for (int n = 0; n < kLandmarkN; ++n)
      FASTPE_UNROLL
      for (int e = 0; e < 2; ++e)
        if (bits >> (8 * n + e) & 1) high = max(s[n][2 * x + e], high);  // a NaN stays out of it and reaches the sum
    high = quad_max(high);
    const float safe = high == -__builtin_inff() ? 0.f : high, alpha = ex2_approx(top - safe);
    float plus = 0, plus_along = 0;
    FASTPE_UNROLL
    for (int n = 0; n < kLandmarkN; ++n)
      FASTPE_UNROLL
      for (int e = 0; e < 2; ++e) {
        if (!(bits >> (8 * n + e) & 1)) continue;
        const float y = ex2_approx(s[n][2 * x + e] - safe);
        s[n][2 * x + e] = y;
        plus += y;
        // An infinite dP of a key without weight must not leak.
        if constexpr (kAlong) plus_along += y == 0 ? 0.f : y * dp[n][2 * x + e];
      }
    top = high;
    sum = sum * alpha + quad_sum(plus);
    if constexpr (kAlong) along = along * alpha + quad_sum(plus_along);
  }
};

// Score of row x in the column whose bit is `mark` in the lane that has it, 0 in the others.
FASTPE_DEVICE float score_of(const float (&s)[kLandmarkN][4], int x, uint64_t mark) {
  float v = 0;
  FASTPE_UNROLL
  for (int n = 0; n < kLandmarkN; ++n)
    FASTPE_UNROLL
    for (int e = 0; e < 2; ++e)
      if (mark >> (8 * n + e) & 1) v = s[n][2 * x + e];
  return quad_sum(v);
}

// One tile of a long block joins the sums of its rows.
template <bool kAlong>
FASTPE_DEVICE void add_tile(InnerSoftmax (&inner)[2], float (&s)[kLandmarkN][4], const float (&dp)[kLandmarkN][4], const LandmarkTile& t, const LandmarkRows& r, const LandmarkBits (&bits)[2]) {
  FASTPE_UNROLL
  for (int x = 0; x < 2; ++x) {
    if (t.landmark) {
      const float v = score_of(s, x, t.landmark >> frag_col(0));
      if (r.own[x] >= t.end) inner[x].landmark = v;
    }
    inner[x].template add<kAlong>(s, dp, x, bits[x].inner);
  }
}

}  // namespace fastpe::cuda
