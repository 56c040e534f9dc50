// Merging partial attentions by their lse. A task is a block of kBM rows of one (batch, head): its weights are formed
// with rows in vector lanes, then every row is one pass over its P partial outputs. Nothing but the weights is kept, so
// both directions read and write each tensor once.
#include "attn_common.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

template <class S>
struct Merge {
  using V = Vec<S>;
  static constexpr int L = V::kLanes;

  const MergeParams& p;
  const MergeBwdParams* back;  // null: forward
  const int64_t blocks;
  Workers workers;

  struct Scratch {
    S *w;         // (P,kBM) weights
    S *m, *sum;   // kBM
    S *x, *y;     // a row
    S *along;     // P: <d_out, o_p> of a row
    void carve(Carver& c, const MergeParams& p) {
      w = c.take<S>(p.P * kBM);
      m = c.take<S>(kBM);
      sum = c.take<S>(kBM);
      x = c.take<S>(p.Dv);
      y = c.take<S>(p.Dv);
      along = c.take<S>(p.P);
    }
  };

  Merge(const MergeParams& params, const MergeBwdParams* b) : p(params), back(b), blocks(tiles::ceil_div(params.N, kBM)) {}

  void run(const Runtime& rt) {
    workers.measure(bytes_of([&](Carver& c) { Scratch().carve(c, p); }));
    const Memory memory(rt, [&](Carver& c) { workers.carve(c, rt.threads); });
    rt.parallel(p.B * p.H * blocks, [](void* self, int64_t task, int worker) { static_cast<Merge*>(self)->block(task, worker); }, this);
  }

  void block(int64_t task, int worker) {
    Scratch s;
    Carver c = workers.at(worker);
    s.carve(c, p);
    const int64_t bh = task / blocks, b = bh / p.H, h = bh % p.H, i0 = task % blocks * kBM;
    const int64_t rows = p.N - i0 < kBM ? p.N - i0 : kBM, row0 = bh * p.N + i0;
    weigh(s, b, h, i0, rows);
    if (back) return split(s, b, h, i0, rows, row0);
    S* lse = static_cast<S*>(p.out_lse) + row0;
    for (int64_t r = 0; r < rows; ++r) lse[r] = s.sum[r] == S(0) ? -kInf<S> : s.m[r] + S(__builtin_log(double(s.sum[r])));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < p.Dv; ++d) s.y[d] = 0;
      for (int64_t q = 0; q < p.P; ++q) {
        const S w = s.w[q * kBM + r];
        if (w == S(0)) continue;
        load_row(s.x, p.o[q], p.dtype, b, h, i0 + r, p.Dv);
        for (int64_t d = 0; d < p.Dv; ++d) s.y[d] += w * s.x[d];
      }
      store_row(s.y, p.out, p.dtype, b, h, i0 + r, p.Dv);
    }
  }

  // Weights of a block of rows; m is the largest c_p L_p of a row (0 where there is none), sum of exp(c_p L_p - m).
  void weigh(Scratch& s, int64_t b, int64_t h, int64_t i0, int64_t rows) const {
    const int64_t lanes = tiles::round_up(rows, L);
    for (int64_t q = 0; q < p.P; ++q) {
      const S* lse = at<S>(p.lse[q], b, h, i0);
      const S c = S(p.factor[q]);
      for (int64_t r = 0; r < lanes; ++r) s.w[q * kBM + r] = r < rows ? c * lse[r * p.lse[q].sn] : -kInf<S>;
    }
    for (int64_t l = 0; l < lanes; l += L) {
      V top(-kInf<S>), sum(S(0));
      for (int64_t q = 0; q < p.P; ++q) top = max(top, V::load(s.w + q * kBM + l));
      const V m = select(top == V(-kInf<S>), V(S(0)), top);
      for (int64_t q = 0; q < p.P; ++q) {
        S* w = s.w + q * kBM + l;
        const V e = exp2((V::load(w) - m) * V(S(kLog2e)));
        e.store(w);
        sum = sum + e;
      }
      m.store(s.m + l);
      sum.store(s.sum + l);
      const V inverse = select(sum == V(S(0)), V(S(0)), V(S(1)) / sum);
      for (int64_t q = 0; q < p.P; ++q) {
        S* w = s.w + q * kBM + l;
        (V::load(w) * inverse).store(w);
      }
    }
  }

  void split(Scratch& s, int64_t b, int64_t h, int64_t i0, int64_t rows, int64_t row0) const {
    const S* d_lse = static_cast<const S*>(back->d_lse);
    S* grad = static_cast<S*>(back->d_lse_p);
    const int64_t all = p.B * p.H * p.N;
    for (int64_t r = 0; r < rows; ++r) {
      const bool has_out = back->d_out.p != nullptr;
      if (has_out) load_row(s.x, back->d_out, p.dtype, b, h, i0 + r, p.Dv);
      if (grad) {
        S mean = 0;
        for (int64_t q = 0; q < p.P; ++q) {
          const S w = s.w[q * kBM + r];
          s.along[q] = 0;
          if (w == S(0) || !has_out) continue;
          load_row(s.y, p.o[q], p.dtype, b, h, i0 + r, p.Dv);
          s.along[q] = dot(s.x, s.y, p.Dv);
          mean += w * s.along[q];
        }
        const S d = d_lse ? d_lse[row0 + r] : S(0);
        for (int64_t q = 0; q < p.P; ++q) {
          const S w = s.w[q * kBM + r];
          grad[q * all + row0 + r] = w == S(0) ? S(0) : S(p.factor[q]) * w * (d + (s.along[q] - mean));
        }
      }
      if (!back->d_o) continue;
      for (int64_t q = 0; q < p.P; ++q) {
        const S w = s.w[q * kBM + r];
        for (int64_t d = 0; d < p.Dv; ++d) s.y[d] = has_out && w != S(0) ? w * s.x[d] : S(0);
        store_row(s.y, back->d_o[q], p.dtype, b, h, i0 + r, p.Dv);
      }
    }
  }
};

}  // namespace

void merge_fwd(const MergeParams& p, const Runtime& rt) {
  if (p.dtype == DType::f64) return Merge<double>(p, nullptr).run(rt);
  Merge<float>(p, nullptr).run(rt);
}
void merge_bwd(const MergeBwdParams& b, const Runtime& rt) {
  if (b.fwd.dtype == DType::f64) return Merge<double>(b.fwd, &b).run(rt);
  Merge<float>(b.fwd, &b).run(rt);
}

}  // namespace fastpe::cpu::FASTPE_ISA
