// Bilinear relative terms, <row_q_i, row_e[index(I - j)]> and <col_k_j, col_e[index(I - j)]>, without one number for every
// (token, entry). A tile meets kBM + kBN - 1 offsets at most: one product with that strip of the table gives what it
// needs, and reading the product along its diagonals puts every entry in its place.
//
// The tables are expanded once per head to one vector per offset, so any index is a run of the expanded table. Rows keep
// it by u = j - I, columns by t = I - j, so that the lanes of a key (after a transpose) read ascending addresses:
//   rows  strip[l][u - u0],  u0 = offset of the first key and the last lane;  entry (j, l) at l (P - 1) + kBM - 1 + j
//   cols  strip[j][t - t0],  t0 = offset of the last key and the first lane;  entry (j, l) at j (P - 1) + last key + l
// Always in the score type: gradients of tables cancel as those of all terms do, and bf16 would round the table.
#pragma once

#include "../core/tiles.h"
#include "rows.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

// Queries of a block, and the pitch of most tiles: a constant by its type too, for gemm.
constexpr std::integral_constant<int64_t, tiles::kBlockQ> kBM{};

template <class S> constexpr int64_t padded(int64_t d) { return (d + Vec<S>::kLanes - 1) / Vec<S>::kLanes * Vec<S>::kLanes; }

// The expanded table of one side: as the right operand of a strip, (d, len), and for gradients by rows, (len, padded d).
template <class S>
struct StripTable {
  static constexpr int64_t kBlock = 16;  // offsets that one task expands
  const Aux* e = nullptr;
  int64_t d = 0, first = 0, len = 0, sign = 1;  // place x holds the offset t = sign * (first + x)
  S *cols = nullptr, *rows = nullptr;

  int64_t heads(const AttnParams& p) const { return e->sh ? p.H : 1; }
  int64_t blocks() const { return len / kBlock; }
  template <class Carver>
  void carve(Carver& c, const AttnParams& p, const Aux& table, int64_t lo, int64_t n, bool backwards, bool by_rows) {
    if (!table) return;
    e = &table;
    d = p.bias.strip_d;
    sign = backwards ? -1 : 1;
    first = backwards ? -(lo + n - 1) : lo;
    len = (n + kBlock - 1) / kBlock * kBlock;
    cols = c.template take<S>(heads(p) * d * len);
    if (by_rows) rows = c.template take<S>(heads(p) * len * padded<S>(d));
  }
  // index: entry of the offset t; below 0: none.
  void expand(const int32_t* index, int64_t lo, int64_t hi, int64_t h, int64_t block) const {
    constexpr int64_t kMax = 256;
    alignas(64) S tmp[kBlock * kMax];
    for (int64_t x = 0; x < kBlock; ++x) {
      const int64_t t = sign * (first + block * kBlock + x);
      const int32_t at = t >= lo && t < hi ? index[t] : -1;
      const S* src = static_cast<const S*>(e->p) + h * e->sh + (at < 0 ? 0 : at) * e->sn;
      for (int64_t c = 0; c < d; ++c) tmp[x * d + c] = at < 0 ? S(0) : src[c];
    }
    transpose(cols + h * d * len + block * kBlock, len, tmp, d, kBlock, d);
    const int64_t dp = padded<S>(d);
    for (int64_t x = 0; rows && x < kBlock; ++x) {
      S* y = rows + (h * len + block * kBlock + x) * dp;
      std::memcpy(y, tmp + x * d, size_t(d) * sizeof(S));
      for (int64_t c = d; c < dp; ++c) y[c] = 0;
    }
  }
  const S* cols_of(int64_t h) const { return cols + (e->sh ? h : 0) * d * len; }
  const S* rows_of(int64_t h) const { return rows + (e->sh ? h : 0) * len * padded<S>(d); }
};

// What a worker needs for one tile.
template <class E>
struct StripScratch {
  using S = typename E::S;
  using V = Vec<S>;
  static constexpr int L = V::kLanes;
  static constexpr int64_t kN = 64;           // keys of a tile; strips come with float32 and float64 products only
  static constexpr int64_t P = kN + kBM;      // pitch of a strip
  S *q = nullptr, *k = nullptr;               // (kBM, dp) rows of the block, (kN, dp) keys of the tile; padding 0
  S *strip = nullptr, *band = nullptr;        // (kBM, P), (kN, P)
  S *d_strip = nullptr, *d_band = nullptr, *flat = nullptr, *dq = nullptr;
  // The tile at hand.
  int64_t js = 0, je = 0, u0 = 0, t0 = 0;
  bool none = false, one = false;             // no pair has an entry; all pairs have the same

  template <class Carver>
  void carve(Carver& c, const AttnParams& p, bool backward) {
    const int64_t dp = padded<S>(p.bias.strip_d);
    if (p.bias.row_e) {
      q = c.template take<S>(kBM * dp);
      strip = c.template take<S>(kBM * P);
      if (backward) d_strip = c.template take<S>(kBM * P), dq = c.template take<S>(kBM * dp);
    }
    if (p.bias.col_e) {
      k = c.template take<S>(kN * dp);
      band = c.template take<S>(kN * P);
      if (backward) d_band = c.template take<S>(kN * P);
    }
    if (backward && (p.bias.row_e || p.bias.col_e)) flat = c.template take<S>(P * kBM);
  }

  static void load(S* y, const Aux& x, int64_t b, int64_t h, int64_t n0, int64_t n, int64_t whole, int64_t d) {
    const int64_t dp = padded<S>(d);
    const S* src = static_cast<const S*>(x.p) + b * x.sb + h * x.sh + n0 * x.sn;
    for (int64_t r = 0; r < n; ++r) {
      std::memcpy(y + r * dp, src + r * x.sn, size_t(d) * sizeof(S));
      for (int64_t c = d; c < dp; ++c) y[r * dp + c] = 0;
    }
    std::memset(y + n * dp, 0, size_t((whole - n) * dp) * sizeof(S));
  }

  void start_block(const AttnParams& p, int64_t b, int64_t h, int64_t i0, int64_t rows) {
    if (!p.bias.row_e) return;
    load(q, p.bias.row_q, b, h, i0, rows, kBM, p.bias.strip_d);
    if (dq) std::memset(dq, 0, size_t(kBM * padded<S>(p.bias.strip_d)) * sizeof(S));
  }

  // Keys [js, je) of the tile at j0 against the block at I0; index by offset t.
  void start_tile(const AttnParams& p, const StripTable<S>& row, const StripTable<S>& col, const int32_t* index, int64_t b, int64_t h, int64_t I0, int64_t lanes, int64_t j0, int64_t first, int64_t end) {
    js = first, je = end;
    u0 = j0 + js - I0 - (kBM - 1);
    t0 = I0 - (j0 + je - 1);
    const int64_t d = p.bias.strip_d, dp = padded<S>(d), n = je - js;
    one = true;
    for (int64_t t = t0; t < t0 + n + lanes - 1 && one; ++t) one = index[t] == index[t0];
    none = one && index[t0] < 0;
    if (d_strip) std::memset(d_strip, 0, size_t(kBM * P) * sizeof(S));
    if (d_band) std::memset(d_band, 0, size_t(kN * P) * sizeof(S));
    if (none) return;
    if (k) load(k, p.bias.col_k, b, h, j0 + js, n, kN, d);
    const int64_t wide = one ? L : padded<S>(n + kBM - 1);
    if (q) gemm<E, false>(q, dp, row.cols_of(h) + (u0 - row.first), row.len, strip, P, lanes, wide, d);
    if (k) gemm<E, false>(k, dp, col.cols_of(h) + (t0 - col.first), col.len, band, P, n, wide, d);
  }

  // Adds the terms of keys [c0, c1), times unit, to s; buf: room for (c1 - c0) rows of kBM.
  void add(S* s, int64_t pitch, int64_t lanes, int64_t c0, int64_t c1, V unit, S* buf) const {
    if (none) return;
    if (q && one)
      for (int64_t l = 0; l < lanes; ++l) buf[l] = strip[l * P];
    else if (q)
      transpose(buf, kBM, strip + kBM - 1 + (c0 - js), P - 1, lanes, c1 - c0);
    for (int64_t j = c0; j < c1; ++j) {
      const S* z = buf + (one ? 0 : (j - c0) * kBM);
      const S* w = band + (j - js) * (P - 1) + (je - 1 - js);
      for (int64_t l = 0; l < lanes; l += L) {
        V x = V::load(s + j * pitch + l);
        if (q) x = fma(V::load(z + l), unit, x);
        if (k) x = fma(one ? V(band[(j - js) * P]) : V::load(w + l), unit, x);
        x.store(s + j * pitch + l);
      }
    }
  }

  // dS of keys [c0, c1) to the strips' places.
  void keep(const S* ds, int64_t pitch, int64_t lanes, int64_t c0, int64_t c1) const {
    if (none) return;
    if (d_strip) transpose(d_strip + kBM - 1 + (c0 - js), P - 1, ds + c0 * pitch, pitch, c1 - c0, lanes);
    if (d_band)
      for (int64_t j = c0; j < c1; ++j) std::memcpy(d_band + (j - js) * (P - 1) + (je - 1 - js), ds + j * pitch, size_t(lanes) * sizeof(S));
  }

  // The tile's part of every gradient that is not null. d_row_e, d_col_e: sums by place of the expanded tables; d_k: by key.
  void finish_tile(const StripTable<S>& row, const StripTable<S>& col, int64_t h, int64_t lanes, int64_t j0, bool want_q, S* d_row_e, S* d_k, S* d_col_e) const {
    if (none) return;
    const int64_t n = je - js, places = n + kBM - 1;
    if (q) {
      const int64_t dp = padded<S>(row.d);
      if (want_q) gemm<E, true>(d_strip, P, row.rows_of(h) + (u0 - row.first) * dp, dp, dq, dp, lanes, dp, places);
      if (d_row_e) {
        transpose(flat, kBM, d_strip, P, lanes, places);
        gemm<E, true>(flat, kBM, q, dp, d_row_e + (u0 - row.first) * dp, dp, places, dp, lanes);
      }
    }
    if (k) {
      const int64_t dp = padded<S>(col.d);
      if (d_k) gemm<E, true>(d_band, P, col.rows_of(h) + (t0 - col.first) * dp, dp, d_k + (j0 + js) * dp, dp, n, dp, places);
      if (d_col_e) {
        transpose(flat, kBM, d_band, P, n, places);
        gemm<E, true>(flat, kBM, k, dp, d_col_e + (t0 - col.first) * dp, dp, places, dp, n);
      }
    }
  }
};

}  // namespace
}  // namespace fastpe::cpu::FASTPE_ISA
