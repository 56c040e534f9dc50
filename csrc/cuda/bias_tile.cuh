// The bias of one tile as a lane of a warp sees it, and which pairs of the tile are visible.
//
// Scores inside the kernels are in units of log2 e, so that ex2 serves. Positions are taken relative to an anchor of the
// tile: large prefix sums cancel before any product, and on the diagonal the difference is 0 whatever their size.
#pragma once

#include "plan.h"
#include "tile.cuh"

namespace fastpe::cuda {

// Query rows of a lane: row x of kRows is row_of(x) of the block.
template <Kind kKind, int kRows>
struct RowBias {
  BiasForm form;
  float p0 = 0, p1 = 0;
  float gm[kRows], uloc[kRows];  // row weight; u = ubase + uloc
  double ubase[kRows];
  const float* w = nullptr;      // by key
  const double* base = nullptr;  // by block of kPrefixBlock keys
  bool has_u = false, indices = false;
  // of the present tile:
  float r[kRows];       // u relative to the tile's anchor
  float g[kRows];       // row weight * log2 e; rank 1: times the slope, b = g * (r - y)
  float w0 = 0;
  bool rank1 = false;

  template <class RowOf>
  FASTPE_DEVICE void start(const AttnParams& p, int64_t b, int64_t h, int64_t offset, RowOf&& row_of) {
    form = p.bias.form;
    if constexpr (kKind == Kind::rel || kKind == Kind::form) {
      if (p.bias.params.p) {
        const float* q = aux_at<float>(p.bias.params, b, h);
        p0 = q[0];
        p1 = q[1];
      }
      if (p.bias.w.p) w = aux_at<float>(p.bias.w, b, h);
      if (p.bias.base.p) base = aux_at<double>(p.bias.base, b, h);
      has_u = p.bias.u.p != nullptr;
      indices = !has_u && !w;
      FASTPE_UNROLL
      for (int x = 0; x < kRows; ++x) {
        const int64_t last = p.Nq - 1, i = row_of(x) < last ? row_of(x) : last, I = i + offset;
        gm[x] = p.bias.gamma.p ? *aux_at<float>(p.bias.gamma, b, h, i) : 1.f;
        ubase[x] = 0;
        if (has_u) {
          uloc[x] = aux_at<float>(p.bias.u, b, h)[i];
        } else if (w) {
          uloc[x] = w[I];
          if (base) ubase[x] = base[I / kPrefixBlock];
        } else {
          uloc[x] = 0;
          ubase[x] = double(I);
        }
      }
    }
  }

  // Moves to the tile of keys that starts at j0; the block's rows have absolute indices [I0, I1).
  FASTPE_DEVICE void tile(int64_t j0, int64_t j1, int64_t I0, int64_t I1, bool causal) {
    if constexpr (kKind == Kind::rel || kKind == Kind::form) {
      double wbase = has_u ? 0 : double(j0);
      w0 = has_u ? float(j0) : 0.f;
      if (w) {
        w0 = w[j0];
        wbase = base ? base[j0 / kPrefixBlock] : 0;
      }
      float a = float(kLog2e);
      rank1 = false;
      if constexpr (kKind == Kind::rel) {
        // On one side of the diagonal the linear form is a single slope. Under a causal mask the other side is invisible.
        rank1 = true;
        if (form == BiasForm::signed_) a *= pos::Phi<BiasForm::signed_>::slope(1.f, p0, p1);
        else if (indices && (causal || I0 >= j1 - 1)) a *= pos::Phi<BiasForm::linear>::slope(1.f, p0, p1);
        else if (indices && I1 - 1 <= j0) a *= pos::Phi<BiasForm::linear>::slope(-1.f, p0, p1);
        else rank1 = false;
      }
      FASTPE_UNROLL
      for (int x = 0; x < kRows; ++x) {
        r[x] = float(ubase[x] - wbase) + (uloc[x] - w0);
        g[x] = a * gm[x];
      }
    }
  }

  // Position of key j0 + c relative to the anchor; keys past nk count as the anchor.
  FASTPE_DEVICE float key(int64_t j0, uint32_t c, int64_t nk) const {
    if (w) return j0 + c < nk ? w[j0 + c] - w0 : 0.f;
    return float(c);
  }

  // x + bias of row x at relative key position y.
  FASTPE_DEVICE float add(int x, float score, float y) const {
    if constexpr (kKind == Kind::rel)
      return rank1 ? fma(g[x], r[x] - y, score) : fma(g[x], pos::Phi<BiasForm::linear>::value(r[x] - y, p0, p1), score);
    if constexpr (kKind == Kind::form) {
      float phi = 0;
      const float d = r[x] - y, q0 = p0, q1 = p1;
      pos::with_form(form, [&](auto f) { phi = decltype(f)::value(d, q0, q1); });
      return fma(g[x], phi, score);
    }
    return score;
  }

  // The largest bias row x can have at relative key positions [lo, hi].
  FASTPE_DEVICE float upper(int x, float lo, float hi) const {
    if constexpr (kKind == Kind::rel || kKind == Kind::form) {
      if (rank1) return max(g[x] * (r[x] - lo), g[x] * (r[x] - hi));
      float top = 0, bottom = 0;
      const float a = r[x] - hi, b = r[x] - lo, q0 = p0, q1 = p1;
      pos::with_form(form, [&](auto f) {
        top = pos::phi_max(f, a, b, q0, q1);
        bottom = pos::phi_min(f, a, b, q0, q1);
      });
      return max(g[x] * top, g[x] * bottom);
    }
    return 0.f;
  }
};

// Visibility of one tile. Everything but the lane's ids is the same for the whole block.
struct TileMask {
  pos::Band band;
  int64_t I0, j0, j1;          // j1: end of the keys
  bool by_index = false;       // index rules, or the end of the keys, cut through this tile
  const int32_t* k_ids = nullptr;
  const uint8_t* dense = nullptr;  // at (b, h)
  int64_t dense_sn = 0, dense_sk = 0;

  FASTPE_DEVICE bool partial() const { return by_index || k_ids || dense; }
  // Row i of the call at index I, with id q_id; key j.
  FASTPE_DEVICE bool visible(int64_t i, int64_t I, int32_t q_id, int64_t j, int64_t nq) const {
    if (j >= j1) return false;
    if (by_index && !pos::visible(band, I, j)) return false;
    if (k_ids) {
      const int32_t id = k_ids[j];
      if (id < 0 || id != q_id) return false;
    }
    if (dense && (i >= nq || !dense[i * dense_sn + j * dense_sk])) return false;
    return true;
  }
};

}  // namespace fastpe::cuda
