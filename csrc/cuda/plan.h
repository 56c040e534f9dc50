// Tile sizes of the CUDA kernels and the order in which a block of queries walks the key tiles. Host and device.
#pragma once

#include "../core/params.h"
#include "../core/tiles.h"
#include "../pos/bias.h"
#include "../pos/region.h"
#include "../pos/visible.h"

namespace fastpe::cuda {

constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.6931471805599453094;

// Channels are padded to one of these inside the tiles.
constexpr int kHeadDims[] = {64, 96, 128, 256};
constexpr int head_dim_class(int64_t d) { return d <= 64 ? 64 : d <= 96 ? 96 : d <= 128 ? 128 : 256; }

// Keys of a tile, for every kernel: divides kPrefixBlock, so a tile has one prefix base.
constexpr int kBlockN = 64;
static_assert(kPrefixBlock % kBlockN == 0);

// How the kernels treat the bias forms; one instance of a kernel each.
enum class Kind { none, rel, table, form, composed };
template <Kind k>
struct KindTag {
  static constexpr Kind value = k;
};
template <Kind k>
constexpr bool kHasPositions = k == Kind::rel || k == Kind::form || k == Kind::composed;
constexpr Kind kind_of(const AttnParams& p) {
  const BiasForm f = p.bias.form;
  if (pos::has_terms(p.bias) || p.softcap_bias || f == BiasForm::two_sided) return Kind::composed;
  if (f == BiasForm::none) return Kind::none;
  if (pos::is_table(f)) return Kind::table;
  return f == BiasForm::linear || f == BiasForm::signed_ ? Kind::rel : Kind::form;
}
constexpr FASTPE_HD bool has_products(const AttnParams& p) { return p.bias.row_e.p || p.bias.col_e.p; }
constexpr uint32_t kTermBytes = 64 * 64 * 4;  // their terms of a tile

// Forward: 4 warps of kMt fragments of 16 rows. Two fragments would halve the shared-memory reads per product, but the
// bias state of 4 rows a lane then spills at every head size.
template <int kD>
struct FwdTile {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kMt = 1;
  static constexpr int kBlockM = 16 * kWarps * kMt;
  static constexpr uint32_t kQ = 0, kK = kQ + kBlockM * kD * 2, kV = kK + kBlockN * kD * 2, kTable = kV + kBlockN * kD * 2;
  static constexpr uint32_t kBytes = kTable + (kBlockM + kBlockN) * 4;
  static constexpr uint32_t kScores = kTable;  // composed: a tile of scores in the place of the table
  static constexpr uint32_t kTerms = kScores + 64 * 68 * 4;  // where there are products with tables
  static constexpr uint32_t bytes(Kind k, bool products) { return k != Kind::composed ? kBytes : products ? kTerms + kTermBytes : kTerms; }
};
constexpr int fwd_block_m(int head_dim) { return head_dim <= 64 ? FwdTile<64>::kBlockM : FwdTile<128>::kBlockM; }

// Key tiles of the rows [I0, I1) in the order of the walk: from the last tile at or before the diagonal back to the first
// visible one (near to far, so that a decaying bias lets the far ones be skipped), then what lies after the diagonal, then
// the sinks.
struct TileWalk {
  int t, lo, mid, hi, sinks_hi;  // tiles
  int phase = 0;

  FASTPE_HD TileWalk(pos::Band band, int64_t I0, int64_t I1, int64_t nk) {
    const pos::Range w = pos::window_of_rows(band, I0, I1, nk);
    hi = w.hi > w.lo ? int((w.hi + kBlockN - 1) / kBlockN) : 0;
    lo = hi > 0 ? int(w.lo / kBlockN) : 0;
    mid = I1 <= 0 ? 0 : I1 > nk ? hi : int((I1 - 1) / kBlockN) + 1;
    if (mid > hi) mid = hi;
    if (mid < lo) mid = lo;
    sinks_hi = 0;
    if (band.left > 0 && band.sinks > 0) {
      sinks_hi = int(((band.sinks < nk ? band.sinks : nk) + kBlockN - 1) / kBlockN);
      if (hi > 0 && sinks_hi > lo) sinks_hi = lo;
    }
    t = mid;
  }
  // The next tile, -1 after the last one.
  FASTPE_HD int next() {
    if (phase == 0) {
      if (t > lo) return --t;
      phase = 1;
      t = mid;
    }
    if (phase == 1) {
      if (t < hi) return t++;
      phase = 2;
      t = sinks_hi;
    }
    return t > 0 ? --t : -1;
  }
};

// Smallest and largest number of every 64 queries or keys, as pairs in the workspace; null: not made.
struct Spans {
  int32_t *q_id = nullptr, *k_id = nullptr;  // (B|1, blocks or tiles, 2)
  int32_t* lower = nullptr;                  // (B|1, blocks, 2)
  int32_t* interval = nullptr;               // (B|1, 4, tiles, 2)
  int64_t q_id_sb = 0, k_id_sb = 0, lower_sb = 0, interval_sb = 0;
};

// Rotated copies of the keys: one a region, unless all turn keys alike or the key alone decides.
inline int64_t key_copies(const AttnParams& p) { return p.k_rope.sr && !pos::region_by_key(p.region.kind) ? pos::region_count(p.region.kind) : 1; }

// Parts the keys of a call with one block of queries are cut into, so that decoding one token fills a GPU. Of shapes alone.
constexpr int kMaxSplits = 32;
inline int64_t fwd_splits(const AttnParams& p) {
  if (p.Nq > 64) return 1;
  const int64_t want = 256 / (p.B * p.H > 0 ? p.B * p.H : 1), most = tiles::ceil_div(p.Nk, kBlockN) / 4, n = want < most ? want : most;
  return n < 1 ? 1 : n < kMaxSplits ? n : kMaxSplits;
}

// What the kernels in front of the forward and backward pass leave in the workspace; null: not made.
struct Prepared {
  View q;                     // float32: queries, rotated as the keys are; else the call's own, which the kernel turns
  int64_t q_copy = 0;
  View k;                     // keys: rotated, dense (B,Hk,Nk,D); or the call's own
  int64_t k_copy = 0;         // from one region's keys to the next; 0: one copy for all
  Spans spans;
  float* k_norm = nullptr;    // (B*Hk, tiles) largest |k_j| of a tile
  float* w_span = nullptr;    // (B|1, H|1, tiles, 2) smallest and largest key position of a tile
  float* env = nullptr;       // (H|1, L) largest table entry on the far side of an offset
  int64_t w_sb = 0, w_sh = 0, env_sh = 0;
};

}  // namespace fastpe::cuda
