// What the forward and the backward pass of landmark attention share: the plan of blocks and tiles, packing, and the
// two-level softmax of one tile. chunked.md 3.10 states the method; arXiv 2305.16300.
//
// A landmark closes its block. For row I with own block b, an earlier block is one key of the outer softmax (its landmark's
// logit) whose value is the inner softmax over the block's ordinary keys; the ordinary keys of b up to I are outer keys
// themselves. A tile is a run of whole blocks, so the inner sums of a row are complete when its tile has been read, and the
// keys of a block share two numbers per row:
//   e_j = exp2(x_j - ref), P_j = e_j f     f = exp2(x_landmark - M) / sum e   for an earlier block
//                                          f = exp2(ref - M)                  for the own one
// Both kinds can meet in one tile, in different lanes. Where |q| |k| scale is small enough for exp2, ref = M = 0 and no
// maximum is formed at all.
#pragma once

#include "attn_fwd.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

// |x| up to here: exp2(x), sums of 2^40 of them and quotients of such sums stay within float.
constexpr double kCalm = 40;

struct LandmarkPlan {
  int32_t* first = nullptr;  // (blocks + 1) first key of a block
  int32_t* tile = nullptr;   // (tiles + 1) first block of a tile
  int32_t* unit = nullptr;   // (tiles + 1) first operand unit of a tile in arrays by column
  int64_t blocks = 0, tiles = 0;
  bool open = false;         // the last block has no landmark

  int64_t begin(int64_t t) const { return first[tile[t]]; }
  int64_t end(int64_t t) const { return first[tile[t + 1]]; }

  void make(const uint8_t* is_landmark, int64_t n, int64_t keys, int pack) {
    blocks = tiles = 0;
    first[0] = 0;
    for (int64_t j = 0; j < n; ++j)
      if (is_landmark[j]) first[++blocks] = int32_t(j + 1);
    open = first[blocks] < n;
    if (open) first[++blocks] = int32_t(n);
    tile[0] = unit[0] = 0;
    for (int64_t b = 0; b < blocks;) {
      const int64_t b0 = b++;
      while (b < blocks && first[b + 1] - first[b0] <= keys) ++b;
      unit[tiles + 1] = unit[tiles] + int32_t(tiles::ceil_div(first[b] - first[b0], pack));
      tile[++tiles] = int32_t(b);
    }
  }
};

// Keys and values of one (batch, kv head). Hidden keys are zeros, and so are the values of landmarks.
template <class E>
struct LandmarkPack : FromAfar {
  using U = typename E::U;
  using S = typename E::S;
  U* k_rows = nullptr;  // A: (Nk, D/kPack)
  U* v_rows = nullptr;  // A: (Nk, Dv/kPack)
  U* k_cols = nullptr;  // A: tile by tile (D, units of the tile)
  U* v_cols = nullptr;
  S* k_norm = nullptr;  // (tiles) upper bound of |k_j|
};

template <class E>
struct LandmarkCall {
  using S = typename E::S;
  using U = typename E::U;
  using V = Vec<S>;
  static constexpr int L = V::kLanes;

  const LandmarkParams& c;
  const AttnParams& p;
  const bool backward;
  const int64_t offset, nq_blocks, group;
  LandmarkPlan* plans = nullptr;  // one for each batch entry, or one for all
  int64_t plan_count, max_tiles = 0, max_units = 0, longest = 0, most_blocks = 0;
  LandmarkPack<E>* packs = nullptr;

  LandmarkCall(const LandmarkParams& params, bool bwd)
      : c(params), p(params.attn), backward(bwd), offset(p.Nk - p.Nq), nq_blocks(tiles::ceil_div(p.Nq, kBM)), group(p.H / p.Hk),
        plan_count(params.landmark_sb ? p.B : 1) {}

  void carve_plans(Carver& m) {
    plans = m.take<LandmarkPlan>(plan_count);
    for (int64_t b = 0; b < plan_count; ++b) {
      LandmarkPlan plan;
      plan.first = m.take<int32_t>(p.Nk + 2);
      plan.tile = m.take<int32_t>(p.Nk + 2);
      plan.unit = m.take<int32_t>(p.Nk + 2);
      if (m.base) plans[b] = plan;
    }
  }
  void make_plans() {
    const auto raise = [](int64_t& a, int64_t b) { a = a < b ? b : a; };
    for (int64_t b = 0; b < plan_count; ++b) {
      LandmarkPlan& x = plans[b];
      x.make(c.is_landmark + b * c.landmark_sb, p.Nk, kBN<E>, E::kPack);
      raise(max_tiles, x.tiles);
      raise(max_units, x.unit[x.tiles]);
      for (int64_t t = 0; t < x.tiles; ++t) {
        raise(longest, x.end(t) - x.begin(t));
        raise(most_blocks, x.tile[t + 1] - x.tile[t]);
      }
    }
  }
  const LandmarkPlan& plan(int64_t b) const { return plans[plan_count == 1 ? 0 : b]; }
  const uint8_t* seen(int64_t b) const { return c.visible ? c.visible + b * c.visible_sb : nullptr; }
  // Rows of scratch that hold a block of queries or a tile of keys.
  int64_t scratch_rows() const { return longest > kBM ? longest : kBM; }
  int64_t widest() const { return p.D > p.Dv ? p.D : p.Dv; }

  void carve_pack(LandmarkPack<E>& k, Carver& m) const {
    k.k_rows = m.take<U>(p.Nk * (p.D / E::kPack));
    if (backward) {
      k.v_rows = m.take<U>(p.Nk * (p.Dv / E::kPack));
      k.k_cols = m.take<U>(max_units * p.D);
    } else {
      k.v_cols = m.take<U>(max_units * p.Dv);
    }
    k.k_norm = m.take<S>(max_tiles);
    k.measure(p.Nk * (p.D + p.Dv) * int64_t(sizeof(U)) / E::kPack);
  }

  void pack(int64_t w, int64_t b, int64_t hk, int64_t t, S* rows, U* tmp) const {
    const LandmarkPlan& x = plan(b);
    if (t >= x.tiles) return;
    const LandmarkPack<E>& to = packs[w];
    const uint8_t* visible = seen(b);
    const uint8_t* landmark = c.is_landmark + b * c.landmark_sb;
    const int64_t j0 = x.begin(t), n = x.end(t) - j0, units = x.unit[t + 1] - x.unit[t];
    S biggest = 0;
    bool nan = false;
    for (int64_t j = 0; j < n; ++j) {
      S* row = rows + j * p.D;
      if (visible && !visible[j0 + j]) {
        std::memset(row, 0, size_t(p.D) * sizeof(S));
      } else {
        load_turned(row, p.k, p.dtype, p.D, p.k_rope, p.rope_pairs, p.rope_layout, b, hk, j0 + j);
      }
      const S q = norm2(row, p.D);
      if (q > biggest) biggest = q;
      nan |= q != q;
      pack_row<E>(to.k_rows + (j0 + j) * (p.D / E::kPack), row, p.D);
    }
    // Rounding of operands to bf16 moves a norm by less than 2^-8.
    to.k_norm[t] = nan ? kInf<S> : S(__builtin_sqrt(double(biggest))) * S(E::kPack == 2 ? 1.01 : 1.0001);
    if (to.k_cols) pack_columns<E>(to.k_cols + x.unit[t] * p.D, units, rows, p.D, n, units, p.D, tmp);
    for (int64_t j = 0; j < n; ++j) {
      S* row = rows + j * p.Dv;
      if (landmark[j0 + j] || (visible && !visible[j0 + j])) std::memset(row, 0, size_t(p.Dv) * sizeof(S));
      else load_row(row, p.v, p.dtype, b, hk, j0 + j, p.Dv);
      if (to.v_rows) pack_row<E>(to.v_rows + (j0 + j) * (p.Dv / E::kPack), row, p.Dv);
    }
    if (to.v_cols) pack_columns<E>(to.v_cols + x.unit[t] * p.Dv, units, rows, p.Dv, n, units, p.Dv, tmp);
  }
};

// One block of keys of a tile as the rows of a query block meet it. Keys count from the tile's first.
struct LandmarkBlock {
  int64_t a, e;         // ordinary keys [a, e) that some row may see
  int64_t landmark;     // its key, or -1: none that any row has passed
  int64_t end;          // keys [e, end) get probability 0
  int64_t reach;        // lane l sees keys below reach + l
  const uint8_t* seen;  // by key, null: all

  bool hidden(int64_t j) const { return seen && !seen[j]; }
};

// Keys [0, n) of a tile whose first key is j0, as rows from I0 on see them.
struct LandmarkTile {
  int64_t j0, n, I0;
  bool mixed;   // some lanes are inside or before a block of this tile
  int64_t jm;   // keys from here on are hidden from the first kBM / 2 lanes: products leave those out

  LandmarkTile(const LandmarkPlan& x, int64_t t, int64_t I0_, int64_t rows, int64_t lanes, int pack) : j0(x.begin(t)), I0(I0_) {
    const int64_t last = I0 + rows;
    n = (x.end(t) < last ? x.end(t) : last) - j0;
    mixed = x.end(t) > I0 || (x.open && t == x.tiles - 1);
    jm = n;
    if (mixed && lanes > kBM / 2) {
      jm = tiles::round_up(I0 + kBM / 2 > j0 ? I0 + kBM / 2 - j0 : 0, pack);
      if (jm > n) jm = n;
    }
  }
  LandmarkBlock block(const LandmarkPlan& x, int64_t b, const uint8_t* seen) const {
    LandmarkBlock k;
    const bool closed = !(x.open && b == x.blocks - 1);
    const int64_t end = x.first[b + 1] - j0;
    k.a = x.first[b] - j0;
    k.e = closed ? end - 1 : end;
    k.landmark = closed && k.e < n ? k.e : -1;
    if (k.e > n) k.e = n;
    k.end = end < n ? end : n;
    k.reach = I0 - j0 + 1;
    k.seen = seen ? seen + j0 : nullptr;
    return k;
  }
};

// Lanes from l on that see key j, and those that have passed the block's landmark.
template <class S>
FASTPE_INLINE Mask<S> landmark_sees(const LandmarkBlock& k, int64_t j, int64_t l) {
  const int64_t from = j + 1 - k.reach - l;
  return Vec<S>::iota() >= Vec<S>(S(from < 0 ? 0 : from > kBM ? kBM : from));
}
template <class S>
FASTPE_INLINE Mask<S> landmark_past(const LandmarkBlock& k, int64_t l) {
  if (k.landmark < 0) return Mask<S>{typename Vec<S>::RawInt{}};
  return landmark_sees<S>(k, k.landmark + 1, l);
}

// The largest x of a block's keys per lane, -inf where a lane sees none.
template <bool Mixed, class S>
FASTPE_INLINE Vec<S> landmark_max(const LandmarkBlock& k, const S* s, int64_t P, const S* c, int64_t l) {
  using V = Vec<S>;
  V best(-kInf<S>);
  for (int64_t j = k.a; j < k.e; ++j) {
    if (k.hidden(j)) continue;
    V x = V::load(s + j * P + l) * V::load(c + l);
    if constexpr (Mixed) x = select(landmark_sees<S>(k, j, l), x, V(-kInf<S>));
    best = max(x, best);  // a NaN stays out of it and reaches the sum
  }
  return best;
}

}  // namespace
}  // namespace fastpe::cpu::FASTPE_ISA
