// The bias of one tile as a lane of a warp sees it, and which pairs of the tile are visible.
//
// Scores inside the kernels are in units of log2 e, so that ex2 serves. Positions are taken relative to an anchor of the
// tile: large prefix sums cancel before any product, and on the diagonal the difference is 0 whatever their size.
#pragma once

#include "plan.h"
#include "tile.cuh"

namespace fastpe::cuda {

// The value of a form, the same for a warp. Out of line: log and pow, unrolled over a tile's scores, are a hundred kilobytes.
FASTPE_NOINLINE float phi_value(BiasForm form, float d, float p0, float p1) {
  float v = 0;
  pos::with_form(form, [&](auto f) { v = decltype(f)::value(d, p0, p1); });
  return v;
}

// The largest g * phi(d) for d in [lo, hi].
FASTPE_NOINLINE float phi_bound(BiasForm form, float g, float lo, float hi, float p0, float p1) {
  float top = 0, bottom = 0;
  pos::with_form(form, [&](auto f) {
    top = pos::phi_max(f, lo, hi, p0, p1);
    bottom = pos::phi_min(f, lo, hi, p0, p1);
  });
  return max(g * top, g * bottom);
}

// Query rows of a lane: row x of kRows is row_of(x) of the block.
template <Kind kKind, int kRows>
struct RowBias {
  BiasForm form;
  float p0 = 0, p1 = 0;
  float gm[kRows], uloc[kRows];  // row weight; u = ubase + uloc
  double ubase[kRows];
  const float* w = nullptr;      // by key
  const float* w_tile = nullptr; // by key of the tile
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
    if constexpr (kHasPositions<kKind>) {
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
    if constexpr (kHasPositions<kKind>) {
      double wbase = has_u ? 0 : double(j0);
      w0 = has_u ? float(j0) : 0.f;
      w_tile = w ? w + j0 : nullptr;
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

  // Position of key c of the tile relative to the anchor; the tile has `keys` of them, later ones count as the anchor.
  FASTPE_DEVICE float key(int c, int keys) const {
    if (w_tile) return c < keys ? w_tile[c] - w0 : 0.f;
    return float(c);
  }

  // x + bias of row x at relative key position y.
  FASTPE_DEVICE float add(int x, float score, float y) const {
    if constexpr (kKind == Kind::rel)
      return rank1 ? fma(g[x], r[x] - y, score) : fma(g[x], pos::Phi<BiasForm::linear>::value(r[x] - y, p0, p1), score);
    if constexpr (kKind == Kind::form) return fma(g[x], phi_value(form, r[x] - y, p0, p1), score);
    return score;
  }

  // The largest bias row x can have at relative key positions [lo, hi].
  FASTPE_DEVICE float upper(int x, float lo, float hi) const {
    if constexpr (kKind == Kind::rel || kKind == Kind::form) {
      if (rank1) return max(g[x] * (r[x] - lo), g[x] * (r[x] - hi));
      return phi_bound(form, g[x], r[x] - hi, r[x] - lo, p0, p1);
    }
    return 0.f;
  }
};

}  // namespace fastpe::cuda
