// Forward landmark attention. As attn_fwd.h: keys and values of a wave of (batch, kv head) pairs are packed once, one task
// per (head, block of kBM queries) walks its tiles. A task, per tile of whole blocks:
//   S = K Qt                                   product
//   e_j = exp2(x_j - ref), their sum by block   vertical
//   P_j = e_j f                                 the block's share in the outer softmax
//   O^T += V^T P                               product
#include "landmark_common.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

template <class E>
struct LandmarkForward {
  using S = typename E::S;
  using U = typename E::U;
  using V = Vec<S>;
  static constexpr int L = V::kLanes;

  struct Scratch {
    FwdScratch<E> base;  // rows, tmp, s, o, qt, pt, scale, m, l; slack: in bf16 the sum of rounded P
    S* ref;              // (blocks of a tile, kBM)
    void carve(Carver& m, const LandmarkCall<E>& c) {
      const AttnParams& p = c.p;
      const int64_t n = c.scratch_rows(), even = tiles::round_up(c.longest, 2);
      base.rows = m.take<S>(n * c.widest() + 64);
      base.tmp = E::kPack == 1 ? nullptr : m.take<U>(n * tiles::round_up(c.widest(), 16));
      base.s = m.take<S>(even * kBM);
      base.o = m.take<S>(p.Dv * kBM);
      base.qt = m.take<U>(p.D / E::kPack * kBM);
      base.pt = E::kPack == 1 ? nullptr : m.take<U>(even / E::kPack * kBM);
      base.scale = m.take<BlockScale<S>>(1);
      base.m = m.take<S>(kBM);
      base.l = m.take<S>(kBM);
      base.slack = m.take<S>(kBM);
      ref = m.take<S>(c.most_blocks * kBM);
    }
  };

  LandmarkCall<E> c;
  const AttnParams& p;
  Forward<E> plain;
  const Runtime& rt;
  int64_t head0 = 0, heads = 0;
  Workers workers;

  LandmarkForward(const LandmarkParams& params, const Runtime& runtime) : c(params, false), p(params.attn), plain(params.attn, runtime, nullptr), rt(runtime) {}

  Scratch scratch(int worker) const {
    Scratch w;
    Carver m = workers.at(worker);
    w.carve(m, c);
    return w;
  }

  void run() {
    const Memory plans(rt, [&](Carver& m) { c.carve_plans(m); });
    c.make_plans();
    workers.measure(bytes_of([&](Carver& m) { Scratch().carve(m, c); }));
    const int64_t pack_bytes = bytes_of([&](Carver& m) { LandmarkPack<E> k; c.carve_pack(k, m); });
    const int64_t total = p.B * p.Hk, wave = wave_heads(pack_bytes, c.group * c.nq_blocks, total, rt.threads, int64_t(8) << 20);
    const auto layout = [&](Carver& m) {
      workers.carve(m, rt.threads);
      c.packs = carve_packs<LandmarkPack<E>>(m, wave, [&](LandmarkPack<E>& k, Carver& at) { c.carve_pack(k, at); });
    };
    const Memory memory(rt, layout);
    using Self = LandmarkForward;
    for (head0 = 0; head0 < total; head0 += wave) {
      heads = total - head0 < wave ? total - head0 : wave;
      rt.parallel(heads * c.max_tiles, [](void* self, int64_t t, int w) { static_cast<Self*>(self)->pack_task(t, w); }, this);
      rt.parallel(heads * c.group * c.nq_blocks, [](void* self, int64_t t, int w) { static_cast<Self*>(self)->block_task(t, w); }, this);
    }
  }

  void pack_task(int64_t task, int worker) {
    const int64_t w = task / c.max_tiles, bk = head0 + w;
    const Scratch sc = scratch(worker);
    c.pack(w, bk / p.Hk, bk % p.Hk, task % c.max_tiles, sc.base.rows, sc.base.tmp);
  }

  void block_task(int64_t task, int worker) {
    // The longest blocks first, as in attn_fwd.h.
    const int64_t per_head = c.group * c.nq_blocks, w = task / per_head, rest = task % per_head;
    const int64_t qb = c.nq_blocks - 1 - rest / c.group, bk = head0 + w;
    block(c.packs[w], bk / p.Hk, bk % p.Hk * c.group + rest % c.group, qb, scratch(worker));
  }

  void block(const LandmarkPack<E>& kv, int64_t b, int64_t h, int64_t qb, Scratch w) {
    FwdScratch<E>& f = w.base;
    const LandmarkPlan& x = c.plan(b);
    const int64_t i0 = qb * kBM, rows = p.Nq - i0 < kBM ? p.Nq - i0 : kBM, I0 = i0 + c.offset;
    const int64_t lanes = tiles::round_up(rows, L);
    S largest = 0;
    for (int64_t r = 0; r < rows; ++r) {
      S* row = f.rows + r * p.D;
      load_turned(row, p.q, p.dtype, p.D, p.q_rope, p.rope_pairs, p.rope_layout, b, h, i0 + r);
      f.scale->c[r] = S(p.scale * kLog2e);
      const S q = norm2(row, p.D);
      if (!(q <= largest)) largest = q == q ? q : kInf<S>;
    }
    for (int64_t r = rows; r < lanes; ++r) f.scale->c[r] = 0;
    pack_transposed<E>(f.qt, kBM, f.rows, p.D, rows, lanes, p.D, f.tmp);

    S k_norm = 0;
    int64_t last = 0;  // tiles that some row of the block sees
    for (; last < x.tiles && x.begin(last) < I0 + rows; ++last) k_norm = kv.k_norm[last] > k_norm ? kv.k_norm[last] : k_norm;
    const bool calm = __builtin_sqrt(double(largest)) * double(k_norm) * __builtin_fabs(p.scale) * kLog2e * 1.01 <= kCalm;
    for (int64_t l = 0; l < lanes; ++l) {
      f.m[l] = calm ? S(0) : -kInf<S>;
      f.l[l] = f.slack[l] = 0;
    }
    for (int64_t t = 0; t < last; ++t) tile(kv, x, b, t, LandmarkTile(x, t, I0, rows, lanes, E::kPack), w, lanes, calm, t == 0);
    if (E::kPack == 2 && last > 0) {
      for (int64_t l = 0; l < lanes; ++l) f.slack[l] = f.slack[l] == S(0) ? S(1) : f.l[l] / f.slack[l];
      times(f.o, f.slack, lanes);
    }
    plain.finish(b, h, i0, rows, lanes, last == 0, f);
  }

  // In bf16 a row is divided by the sum of its rounded P, so that one that sees a single key returns its value exactly; lse
  // is that of the exact sum.
  template <bool Mixed> static constexpr bool kTwoSums = Mixed && E::kPack == 2;
  static FASTPE_INLINE V rounded(V x) {
#if defined(__AVX512BF16__)
    if constexpr (E::kPack == 2) return V(typename V::Raw(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(x)), 16))));
#endif
    return x;
  }

  // P of one block over s or pt, for G vectors of queries from lane l0 on.
  template <bool Mixed, bool Calm, int G>
  FASTPE_INLINE void share(const LandmarkBlock& k, FwdScratch<E>& f, const S* ref, int64_t l0) const {
    V cv[G], shift[G], sum[G], exact[G], factor[G];  // exact: of e before it became an operand
    for (int g = 0; g < G; ++g) {
      cv[g] = V::load(f.scale->c + l0 + g * L);
      shift[g] = Calm ? V(S(0)) : V(S(0)) - V::load(ref + l0 + g * L);
      sum[g] = exact[g] = V(S(0));
    }
    // Keys no lane of this group sees.
    const int64_t e = Mixed && k.reach + l0 + G * L - 1 < k.e ? (k.reach + l0 + G * L - 1 > k.a ? k.reach + l0 + G * L - 1 : k.a) : k.e;
    for (int64_t j = k.a; j < e; ++j) {
      S* row = f.s + j * kBM + l0;
      if (k.hidden(j)) {
        for (int g = 0; g < G; ++g) V(S(0)).store(row + g * L);
        continue;
      }
      V y[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        y[g] = fma(V::load(row + g * L), cv[g], shift[g]);
        if constexpr (Mixed) y[g] = select(landmark_sees<S>(k, j, l0 + g * L), y[g], V(-kInf<S>));
      }
      exp2_each<G>(y);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        if constexpr (kTwoSums<Mixed>) {
          exact[g] = exact[g] + y[g];
          y[g] = rounded(y[g]);
        }
        sum[g] = sum[g] + y[g];
        y[g].store(row + g * L);
      }
    }
    const bool counts = k.landmark >= 0 && !k.hidden(k.landmark);
    for (int g = 0; g < G; ++g) {
      const int64_t l = l0 + g * L;
      const V m = V::load(f.m + l);
      V outer(S(0));
      if (counts) {
        const V x = V::load(f.s + k.landmark * kBM + l) * cv[g];
        outer = exp2(Calm ? x : x - m);
      }
      const V inner = select(sum[g] == V(S(0)), V(S(0)), outer / sum[g]);
      if constexpr (Mixed) {
        const Mask<S> past = landmark_past<S>(k, l);
        // Where a lane sees nothing of the block, ref says nothing either.
        const V own = Calm ? V(S(1)) : select(sum[g] == V(S(0)), V(S(0)), exp2(V(S(0)) - shift[g] - m));
        factor[g] = select(past, inner, own);
        if constexpr (kTwoSums<Mixed>) {
          (V::load(f.slack + l) + select(past, outer, sum[g] * own)).store(f.slack + l);
          sum[g] = exact[g];
        }
        (V::load(f.l + l) + select(past, outer, sum[g] * own)).store(f.l + l);
      } else {
        factor[g] = inner;
        (V::load(f.l + l) + outer).store(f.l + l);
        if constexpr (E::kPack == 2) (V::load(f.slack + l) + outer).store(f.slack + l);
      }
    }
    if constexpr (E::kPack == 1) {
      for (int64_t j = k.a; j < e; ++j)
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
          S* at = f.s + j * kBM + l0 + g * L;
          (V::load(at) * factor[g]).store(at);
        }
      for (int64_t j = e; j < k.end; ++j)
        for (int g = 0; g < G; ++g) V(S(0)).store(f.s + j * kBM + l0 + g * L);
    } else {
#if defined(__AVX512BF16__)
      const auto prob = [&](int64_t j, int g) { return V::load(f.s + j * kBM + l0 + g * L) * factor[g]; };
      const auto word = [&](int64_t j, int g) { return f.pt + j / 2 * kBM + l0 + g * L; };
      // Keys pair up by their place in the tile: a block may begin in the middle of a pair.
      int64_t j = k.a;
      if (j % 2 && j < e) {
        for (int g = 0; g < G; ++g) {
          const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(prob(j, g))), 16);
          _mm512_storeu_si512(word(j, g), _mm512_or_si512(_mm512_loadu_si512(word(j, g)), high));
        }
        ++j;
      }
      for (; j + 1 < e; j += 2)
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) _mm512_storeu_si512(word(j, g), interleave_bf16(prob(j, g), prob(j + 1, g)));
      if (j < e) {
        for (int g = 0; g < G; ++g) _mm512_storeu_si512(word(j, g), _mm512_cvtepu16_epi32(to_bf16(prob(j, g))));
        ++j;
      }
      // The upper half of a word is 0 since its lower half was written.
      for (j = j > e ? j : e; j < k.end; ++j)
        if (j % 2 == 0)
          for (int g = 0; g < G; ++g) _mm512_storeu_si512(word(j, g), _mm512_setzero_si512());
#endif
    }
  }

  // The maxima of a tile: ref of every block, and the rows' reference m, with what has been summed so far.
  template <bool Mixed>
  void raise(const LandmarkPlan& x, int64_t b, int64_t t, const LandmarkTile& at, Scratch& w, int64_t lanes, bool first) const {
    FwdScratch<E>& f = w.base;
    const int64_t b0 = x.tile[t];
    alignas(64) S alpha[kBM];
    bool rescale = false;
    for (int64_t l = 0; l < lanes; l += L) {
      const V old = V::load(f.m + l);
      V best = old;
      for (int64_t n = b0; n < x.tile[t + 1] && x.first[n] - at.j0 < at.n; ++n) {
        const LandmarkBlock k = at.block(x, n, c.seen(b));
        const V own = landmark_max<Mixed>(k, f.s, kBM, f.scale->c, l);
        V outer(-kInf<S>);
        if (k.landmark >= 0 && !k.hidden(k.landmark)) outer = V::load(f.s + k.landmark * kBM + l) * V::load(f.scale->c + l);
        if constexpr (Mixed) outer = select(landmark_past<S>(k, l), outer, own);
        best = max(outer, best);
        select(own == V(-kInf<S>), V(S(0)), own).store(w.ref + (n - b0) * kBM + l);
      }
      const Mask<S> up = best > old;
      const V a = select(up, exp2(old - best), V(S(1)));
      rescale |= any(up);
      select(up, best, old).store(f.m + l);
      a.store(alpha + l);
      (V::load(f.l + l) * a).store(f.l + l);
      (V::load(f.slack + l) * a).store(f.slack + l);
    }
    if (rescale && !first) times(f.o, alpha, lanes);
  }
  void times(S* o, const S* factor, int64_t lanes) const {
    for (int64_t d = 0; d < p.Dv; ++d)
      for (int64_t l = 0; l < lanes; l += L) (V::load(o + d * kBM + l) * V::load(factor + l)).store(o + d * kBM + l);
  }

  void tile(const LandmarkPack<E>& kv, const LandmarkPlan& x, int64_t b, int64_t t, const LandmarkTile& at, Scratch& w, int64_t lanes, bool calm, bool first) {
    FwdScratch<E>& f = w.base;
    constexpr int64_t half = kBM / 2;
    const int64_t ku = p.D / E::kPack, n = at.n, jm = at.jm;
    gemm<E, false>(kv.k_rows + at.j0 * ku, ku, f.qt, kBM, f.s, kBM, jm, lanes, ku);
    if (jm < n) gemm<E, false>(kv.k_rows + (at.j0 + jm) * ku, ku, f.qt + half, kBM, f.s + jm * kBM + half, kBM, n - jm, lanes - half, ku);

    alignas(64) S m[kBM];  // of a row that has seen nothing yet: 0, so that exp2(-inf - m) is 0
    if (!calm) {
      if (at.mixed) raise<true>(x, b, t, at, w, lanes, first);
      else raise<false>(x, b, t, at, w, lanes, first);
      std::memcpy(m, f.m, sizeof(m));
      for (int64_t l = 0; l < lanes; ++l) f.m[l] = m[l] == -kInf<S> ? S(0) : m[l];
    }
    for (int64_t b0 = x.tile[t], y = b0; y < x.tile[t + 1] && x.first[y] - at.j0 < n; ++y) {
      const LandmarkBlock k = at.block(x, y, c.seen(b));
      const S* ref = w.ref + (y - b0) * kBM;
      const auto go = [&](auto mixed, auto is_calm) {
        // Half a row of vectors at a time near the diagonal, where the first lanes see fewer keys.
        constexpr bool M = decltype(mixed)::value, C = decltype(is_calm)::value;
        for_lanes<S, M ? kNV / 2 : kNV>(lanes, [&](auto g, int64_t l) { share<M, C, decltype(g)::value>(k, f, ref, l); });
      };
      if (at.mixed) calm ? go(std::true_type{}, std::true_type{}) : go(std::true_type{}, std::false_type{});
      else calm ? go(std::false_type{}, std::true_type{}) : go(std::false_type{}, std::false_type{});
    }
    if (!calm) std::memcpy(f.m, m, sizeof(m));

    const U* pb = E::kPack == 1 ? reinterpret_cast<const U*>(f.s) : f.pt;
    const int64_t units = x.unit[t + 1] - x.unit[t];
    const U* va = kv.v_cols + x.unit[t] * p.Dv;
    const int64_t um = jm / E::kPack, u1 = tiles::ceil_div(n, E::kPack), u_end = jm < n ? um : u1;
    if (first) gemm<E, false>(va, units, pb, kBM, f.o, kBM, p.Dv, lanes, u_end);
    else gemm<E, true>(va, units, pb, kBM, f.o, kBM, p.Dv, lanes, u_end);
    if (jm < n) gemm<E, true>(va + um, units, pb + um * kBM + half, kBM, f.o + half, kBM, p.Dv, lanes - half, u1 - um);
  }
};

}  // namespace

void landmark_fwd(const LandmarkParams& c, const Runtime& rt) {
  if (c.attn.dtype == DType::f64) return LandmarkForward<OpF64>(c, rt).run();
#if defined(__AVX512BF16__)
  if (c.attn.dtype == DType::bf16) return LandmarkForward<OpBF16>(c, rt).run();
#endif
  LandmarkForward<OpF32>(c, rt).run();
}

}  // namespace fastpe::cpu::FASTPE_ISA
