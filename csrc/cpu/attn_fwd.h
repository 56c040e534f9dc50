// Forward attention.
//
// Work: keys (rotated) and values of a wave of (batch, kv head) pairs are packed once, unless they serve where they lie; then
// one task per (head, block of kBM queries) walks the key tiles it can see. A task owns its rows, so the result does not depend
// on how tasks are spread over threads. Where keys and values of a head exceed the processor's own cache, a task takes up to
// kMaxTurns such blocks, which take turns on every tile.
// A block, per tile of kBN keys:
//   S[key][query]  = K Qt                       product, Qt (D x kBM) stays in L1
//   running maximum, P = exp2(S - m), row sums  vertical, on the tile while it is in L1
//   O^T[dv][query] += V^T P                     product into a (Dv x kBM) accumulator
// The reference m of a row need not be its maximum: any number that keeps P and its sums finite gives the same result
// to the last bits, since only the exponent of P moves. So m is raised only when a tile exceeds it by 2^kLazy, and for
// a tile whose largest possible score |q| |k| scale + bias is within 2^kRoom of m the maximum is not formed at all.
#pragma once

#include "attn_terms.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

constexpr double kLazy = 8;
constexpr double kRoom = 50;

// Tile of scores: rows of kBM lanes.
template <class E>
struct FwdScratch {
  using S = typename E::S;
  using U = typename E::U;
  StripScratch<E> strips;
  S *rows, *s, *o, *terms, *other;
  U *tmp, *qt, *pt;
  TileBias<S>* bias;
  BlockBias<S>* block;
  BlockScale<S>* scale;
  Reach<S>* reach;
  S *m, *l, *slack, *ids;

  void carve(Carver& c, const AttnParams& p) {
    const int64_t dmax = p.D > p.Dv ? p.D : p.Dv;
    rows = c.take<S>((kBM > kBN<E> ? kBM : kBN<E>) * dmax + 16);
    tmp = E::kPack == 1 ? nullptr : c.take<U>((kBM > kBN<E> ? kBM : kBN<E>) * tiles::round_up(dmax, 16));
    s = c.take<S>(kBN<E> * kBM);
    terms = pos::is_composed(p) ? c.take<S>(Terms<E>::kScratch) : nullptr;
    other = p.region.kind == RegionKind::none ? nullptr : c.take<S>(kBN<E> * kBM);
    pt = E::kPack == 1 ? nullptr : c.take<U>(kBN<E> / E::kPack * kBM);
    bias = c.take<TileBias<S>>(1);
    reach = c.take<Reach<S>>(1);
    strips.carve(c, p, false);
    o = c.take<S>(p.Dv * kBM);
    qt = c.take<U>(pos::region_count(p.region.kind) * (p.D / E::kPack * kBM));
    block = c.take<BlockBias<S>>(1);
    scale = c.take<BlockScale<S>>(1);
    m = c.take<S>(kBM);
    l = c.take<S>(kBM);
    slack = c.take<S>(kBM);
    ids = c.take<S>(kBM);
  }
};

// Scores of keys [js, je) for G vectors of queries from lane l0 on: leaves x (log2 units) in s and the largest x per
// lane in mx.
template <class E, Kind K, class Phi, bool Masked, int G>
FASTPE_INLINE void score_pass(const TileBias<typename E::S>& t, const TileMask<typename E::S>& mask, const typename E::S* c, typename E::S* s, int64_t js, int64_t je, int64_t l0, typename E::S* mx) {
  using V = Vec<typename E::S>;
  using S = typename E::S;
  constexpr int L = V::kLanes;
  ScoreAt<K, Phi, S> at[G];
  V best[G];
  for (int g = 0; g < G; ++g) {
    at[g] = {t, l0 + g * L, V::load(c + l0 + g * L), V(S(0))};
    best[g] = V(-kInf<S>);
  }
  for (int64_t j = js; j < je; ++j) {
    S* row = s + j * kBM + l0;
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      V x = at[g](t, j, l0 + g * L, V::load(row + g * L));
      if constexpr (Masked) x = select(mask.lanes(j, l0 + g * L), x, V(-kInf<S>));
      x.store(row + g * L);
      best[g] = max(best[g], x);
    }
  }
  for (int g = 0; g < G; ++g) best[g].store(mx + l0 + g * L);
}

// P = exp2(x - m), row sums added to l. Stored: s holds x already, else raw scores. Writes P over s (float) or as bf16
// pairs of keys to pt.
template <class E, Kind K, class Phi, bool Stored, int G>
FASTPE_INLINE void prob_pass(const TileBias<typename E::S>& t, const typename E::S* c, typename E::S* s, typename E::U* pt, int64_t js, int64_t je, int64_t l0, const typename E::S* m, typename E::S* l) {
  using V = Vec<typename E::S>;
  using S = typename E::S;
  constexpr int L = V::kLanes;
  ScoreAt<K, Phi, S> at[G];
  V offset[G], sum[G];
  for (int g = 0; g < G; ++g) {
    offset[g] = V(S(0)) - V::load(m + l0 + g * L);
    if constexpr (!Stored) at[g] = {t, l0 + g * L, V::load(c + l0 + g * L), offset[g]};
    sum[g] = V(S(0));
  }
  const auto power = [&](int64_t j, int g) {
    const V x = V::load(s + j * kBM + l0 + g * L);
    if constexpr (Stored) return x + offset[g];
    else return at[g](t, j, l0 + g * L, x);
  };
  if constexpr (E::kPack == 1) {
    for_keys<G>(js, je, [&](auto count, int64_t j) {
      constexpr int J = decltype(count)::value;
      V x[J * G];
#pragma GCC unroll 8
      for (int y = 0; y < J * G; ++y) x[y] = power(j + y / G, y % G);
      exp2_each<J * G>(x);
#pragma GCC unroll 8
      for (int y = 0; y < J * G; ++y) {
        sum[y % G] = sum[y % G] + x[y];
        x[y].store(s + (j + y / G) * kBM + l0 + y % G * L);
      }
    });
  } else {
#if defined(__AVX512BF16__)
    for (int64_t j = js; j < je; j += 2)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const V a = exp2(power(j, g)), b = j + 1 < je ? exp2(power(j + 1, g)) : V(0.f);
        sum[g] = sum[g] + (a + b);
        _mm512_storeu_si512(pt + j / 2 * kBM + l0 + g * L, interleave_bf16(a, b));
      }
#endif
  }
  for (int g = 0; g < G; ++g) (V::load(l + l0 + g * L) + sum[g]).store(l + l0 + g * L);
}

template <class E>
struct Forward {
  using S = typename E::S;
  using U = typename E::U;
  using V = Vec<S>;
  static constexpr int L = V::kLanes;

  const AttnParams& p;
  Call<E> call;
  const Runtime& rt;
  TileStats* stats;
  int64_t head0 = 0, heads = 0;  // wave: flattened (batch, kv head)
  KVPack<E>* packs = nullptr;
  Workers workers;

  Forward(const AttnParams& params, const Runtime& runtime, TileStats* st) : p(params), call(params), rt(runtime), stats(st) {}

  FwdScratch<E> scratch(int worker) const {
    FwdScratch<E> w;
    Carver c = workers.at(worker);
    w.carve(c, p);
    return w;
  }

  int64_t q_step() const { return p.D / E::kPack * kBM; }

  void run() {
    const auto carve_pack = [&](KVPack<E>& k, Carver& c) { k.carve(c, p, call.nk_tiles, false, false, true); };
    const int64_t pack_bytes = bytes_of([&](Carver& c) { KVPack<E> k; carve_pack(k, c); });
    const int64_t total = p.B * p.Hk;
    const int64_t wave = wave_heads(pack_bytes, p.H / p.Hk * call.nq_blocks, total, rt.threads, int64_t(8) << 20);
    workers.measure(bytes_of([&](Carver& c) { FwdScratch<E>().carve(c, p); }));
    const auto layout = [&](Carver& c) {
      call.carve(c, false);
      workers.carve(c, rt.threads);
      packs = carve_packs<KVPack<E>>(c, wave, carve_pack);
    };
    const Memory memory(rt, layout);
    call.prepare();
    if (call.strip_tasks()) rt.parallel(call.strip_tasks(), [](void* self, int64_t task, int) { static_cast<Forward*>(self)->call.strip_task(task); }, this);
    for (head0 = 0; head0 < total; head0 += wave) {
      heads = total - head0 < wave ? total - head0 : wave;
      rt.parallel(heads * call.nk_tiles, [](void* self, int64_t task, int worker) { static_cast<Forward*>(self)->pack_task(task, worker); }, this);
      rt.parallel(heads * (p.H / p.Hk * call.nq_blocks), [](void* self, int64_t task, int worker) { static_cast<Forward*>(self)->block_task(task, worker); }, this);
    }
  }

  void pack_task(int64_t task, int worker) {
    const int64_t w = task / call.nk_tiles, t = task % call.nk_tiles;
    const int64_t bk = head0 + w;
    const FwdScratch<E> sc = scratch(worker);
    packs[w].pack(p, bk / p.Hk, bk % p.Hk, t, sc.rows);
  }

  void block_task(int64_t task, int worker) {
    // Later blocks see more keys under a causal mask: they go first, so that the last tasks to finish are short.
    const int64_t group = p.H / p.Hk, per_head = group * call.nq_blocks, w = task / per_head, x = task % per_head;
    const int64_t bk = head0 + w;
    Block block{bk / p.Hk, bk % p.Hk * group + x % group, call.nq_blocks - 1 - x / group, scratch(worker)};
    run_block(packs[w], block);
  }

  // The rows of a block as operands, turned once for every region they can reach, with their scale and length.
  void load_queries(int64_t b, int64_t h, int64_t i0, int64_t rows, int64_t lanes, const FwdScratch<E>& w) const {
    const int64_t I0 = i0 + call.offset;
    const S* rho = at<S>(p.row_scale, b, h);
    for (int64_t r = 0; r < lanes; ++r) {
      w.scale->c[r] = r < rows ? S(p.scale) * (rho ? rho[(i0 + r) * p.row_scale.sn] : S(1)) * S(kLog2e) : S(0);
      w.scale->qn[r] = 0;
    }
    bool measured = false;  // turning keeps a row's length, and all regions share their amplitude
    for (int x = 0; x < pos::region_count(p.region.kind); ++x) {
      if (!reaches(call, x, I0, lanes)) continue;
      U* qt = w.qt + x * q_step();
      pack_queries<E>(qt, p, region_rope<S>(p.q_rope, x), b, h, i0, rows, lanes, w.rows, w.tmp);
      if (!measured) w.scale->template measure<E>(qt, p.D / E::kPack, lanes);
      measured = true;
    }
  }

  // A block of queries on its way through the key tiles.
  struct Block {
    int64_t b = 0, h = 0, qb = 0;
    FwdScratch<E> w;
    int64_t i0 = 0, rows = 0, lanes = 0, I0 = 0;
    HeadBias<S> hb{};
    bool empty = true;
    int64_t visited = 0, decayed = 0;
  };

  void run_block(const KVPack<E>& kv, Block& x) {
    const double skip = skip_log2(p);
    start(x, skip);
    const Terms<E> terms{call, x.hb, *x.w.block, x.b, x.h, x.i0, x.rows, x.lanes, x.I0, x.w.terms, &x.w.strips};
    if (x.w.terms) terms.start();
    walk_tiles(call, x.qb, [&](int64_t t) { visit(kv, t, x, terms, skip); });
    finish(x.b, x.h, x.i0, x.rows, x.lanes, x.empty, x.w);
    if (!stats) return;
    stats->add(x.visited, call.nk_tiles - x.visited - x.decayed, x.decayed);
    stats->block_q = kBM;
    stats->block_k = kBN<E>;
  }

  void start(Block& x, double skip) const {
    x.i0 = x.qb * kBM;
    x.rows = p.Nq - x.i0 < kBM ? p.Nq - x.i0 : kBM;
    x.I0 = x.i0 + call.offset;
    x.lanes = tiles::round_up(x.rows, L);
    load_queries(x.b, x.h, x.i0, x.rows, x.lanes, x.w);
    x.hb.init(p, x.b, x.h, call.table_of(x.h), call.env_of(x.h));
    x.w.block->init(x.hb, x.i0, x.rows, x.I0);
    if (p.vis.q_ids) call.load_q_ids(x.b, x.i0, x.rows, x.w.ids);
    for (int64_t l = 0; l < x.lanes; ++l) {
      x.w.m[l] = -kInf<S>;
      x.w.l[l] = 0;  // lanes past the last row see the same keys with q = 0
      x.w.slack[l] = l < x.rows ? S(skip) : kInf<S>;
    }
  }

  void visit(const KVPack<E>& kv, int64_t t, Block& x, const Terms<E>& terms, double skip) const {
    FwdScratch<E>& w = x.w;
    int64_t js, je;
    TileMask<S> mask;
    if (call.classify(x.b, x.h, x.qb, t, js, je, mask) == TileClass::hidden) return;
    const int64_t j0 = t * kBN<E>;
    TileBias<S>& tb = *w.bias;
    tb.init(x.hb, *w.block, p, x.I0, x.lanes, j0, js, je);
    mask.q_ids = w.ids;
    bool exact = true;
    if (!x.empty && (!w.terms || is_bounded(p.bias))) {
      if (w.terms) terms.reach(tb, *w.reach, j0, js, je);
      const Bound bound = judge(tb, x.hb, kv.k_norm[t], w, terms, x.I0, j0 + js, j0 + je - 1, x.lanes);
      if (skip > -1e300 && bound.forgettable) { ++x.decayed; return; }
      exact = !bound.harmless;
    }
    ++x.visited;
    tile(kv, t, j0, js, je, tb, mask, terms, w, x.lanes, x.empty, exact);
    x.empty = false;
  }

  // What the largest possible scores of a tile, |q| |k|max scale + (largest bias), allow.
  struct Bound {
    bool forgettable;  // no row loses more than skip_eps by leaving the tile out: for every row the bound is at most
                       // lse so far + log2(eps / Nk), lse only grows, and a row has at most Nk skipped keys
    bool harmless;     // P = exp2(x - m) cannot pass 2^kRoom with the m the rows have
  };
  static Bound judge(const TileBias<S>& tb, const HeadBias<S>& hb, S k_norm, const FwdScratch<E>& w, const Terms<E>& terms, int64_t I0, int64_t j_first, int64_t j_last, int64_t lanes) {
    bool skip = true, calm = true;
    for (int64_t l = 0; l < lanes; l += L) {
      const V m = V::load(w.m + l);
      const V product = V::load(w.scale->qn + l) * V(k_norm);
      const V bound = w.terms ? terms.upper(*w.reach, product, tb.upper(hb, l, I0, j_first, j_last)) : product + tb.upper(hb, l, I0, j_first, j_last);
      // A row's sum holds at least one P of 1 as soon as it has seen a key, so its lse is at least m.
      const Mask<S> a = m + V::load(w.slack + l) >= bound, b = m + V(S(kRoom)) >= bound;
      skip &= all(a);  // NaN is on neither side
      calm &= all(b);
    }
    return {skip, calm};
  }

  void tile(const KVPack<E>& kv, int64_t t, int64_t j0, int64_t js, int64_t je, const TileBias<S>& tb, const TileMask<S>& mask, const Terms<E>& terms, FwdScratch<E>& w, int64_t lanes, bool first, bool exact) const {
    constexpr int64_t half = kBM / 2;
    const int64_t jm = lanes > half ? mask.split : je;
    tile_scores(p, kv, w.qt, q_step(), mask, js, jm, je, lanes, w.s, kBM, w.other, kv.next_summed(kv.values(p, t)));
    const S* c = w.scale->c;
    alignas(64) S ones[kBM];
    if (w.terms) {
      constexpr int64_t step = Terms<E>::kKeys;
      terms.start_tile(j0, js, je);
      for (int64_t j = js; j < je; j += step) terms.compose(tb, c, w.s, kBM, nullptr, j0, j, j + step < je ? j + step : je);
      for (int64_t l = 0; l < lanes; ++l) ones[l] = 1;
      c = ones;
    }
    alignas(64) S mx[kBM], alpha[kBM];
    const bool masked = mask.partial();
    with_kind(p.softcap_bias ? Kind::none : tb.kind, tb.form, [&](auto kind, auto phi) {
      constexpr Kind K = decltype(kind)::value;
      using Phi = decltype(phi);
      if (!exact && !masked) {
        for_lanes<S, kNV>(lanes, [&](auto g, int64_t l) { prob_pass<E, K, Phi, false, decltype(g)::value>(tb, c, w.s, w.pt, js, je, l, w.m, w.l); });
        return;
      }
      for_lanes<S, kNV>(lanes, [&](auto g, int64_t l) {
        if (masked) score_pass<E, K, Phi, true, decltype(g)::value>(tb, mask, c, w.s, js, je, l, mx);
        else score_pass<E, K, Phi, false, decltype(g)::value>(tb, mask, c, w.s, js, je, l, mx);
      });
      bool rescale = false;
      for (int64_t l = 0; l < lanes; l += L) {
        const V old = V::load(w.m + l), best = V::load(mx + l);
        const Mask<S> up = best > old + V(S(kLazy));
        // NaN scores must reach the sum: exp2(NaN - m) does that without touching m.
        const V now = select(up, best, old);
        const V a = select(up, exp2(old - now), V(S(1)));
        rescale |= any(up);
        now.store(w.m + l);
        a.store(alpha + l);
        (V::load(w.l + l) * a).store(w.l + l);
      }
      if (rescale && !first)
        for (int64_t d = 0; d < p.Dv; ++d)
          for (int64_t l = 0; l < lanes; l += L) (V::load(w.o + d * kBM + l) * V::load(alpha + l)).store(w.o + d * kBM + l);
      // A row that has seen nothing yet has m = -inf; its masked scores must give exp2(-inf), not NaN.
      alignas(64) S m_safe[kBM];
      for (int64_t l = 0; l < lanes; ++l) m_safe[l] = w.m[l] == -kInf<S> ? S(0) : w.m[l];
      for_lanes<S, kNV>(lanes, [&](auto g, int64_t l) {
        prob_pass<E, K, Phi, true, decltype(g)::value>(tb, c, w.s, w.pt, js, je, l, m_safe, w.l);
      });
    });
    const U* pb = E::kPack == 1 ? reinterpret_cast<const U*>(w.s) : w.pt;
    sum_keys<E>(kv.values(p, t), pb, kBM, w.o, p.Dv, js, jm, je, lanes, first, kv.next_keys(p, t - 1));
  }

  void finish(int64_t b, int64_t h, int64_t i0, int64_t rows, int64_t lanes, bool empty, FwdScratch<E>& w) const {
    const S* sink = at<S>(p.sink, 0, h);
    S* lse = static_cast<S*>(p.lse) + (b * p.H + h) * p.Nq + i0;
    alignas(64) S inv[kBM];
    for (int64_t r = 0; r < lanes; ++r) {
      double m = double(w.m[r]), l = double(w.l[r]);
      if (empty) m = -__builtin_inf(), l = 0;
      if (sink) {
        const double x = double(*sink) * kLog2e;
        const double top = m > x ? m : x;
        if (top > -__builtin_inf()) {
          l = l * (m > -__builtin_inf() ? __builtin_exp2(m - top) : 0);
          const double o_scale = m > -__builtin_inf() ? __builtin_exp2(m - top) : 0;
          l += __builtin_exp2(x - top);
          inv[r] = S(o_scale / l);
          if (r < rows) lse[r] = S((top + __builtin_log2(l)) * kLn2);
          continue;
        }
      }
      // l = 0 only where no key was visible; NaN keeps its way.
      inv[r] = l == 0 ? S(0) : S(1 / l);
      if (r < rows) lse[r] = l == 0 ? -kInf<S> : S((m + __builtin_log2(l)) * kLn2);
    }
    for (int64_t d = 0; d < p.Dv; ++d)
      for (int64_t l = 0; l < lanes; l += L) {
        // Not a product in empty blocks: the accumulator was never written.
        const V x = empty ? V(S(0)) : V::load(w.o + d * kBM + l) * V::load(inv + l);
        x.store(w.o + d * kBM + l);
      }
    if (!p.residual.p && store_columns<E>(p.o, p.dtype, b, h, i0, w.o, p.Dv, rows)) return;
    transpose(w.rows, p.Dv, w.o, kBM, p.Dv, rows);
    for (int64_t r = 0; r < rows; ++r) {
      S* row = w.rows + r * p.Dv;
      store_row(row, p.o, p.dtype, b, h, i0 + r, p.Dv);
      if (p.residual.p) {
        S* rounded = w.o;
        load_row(rounded, p.o, p.dtype, b, h, i0 + r, p.Dv);
        for (int64_t d = 0; d < p.Dv; ++d) row[d] -= rounded[d];
        store_row(row, p.residual, p.dtype, b, h, i0 + r, p.Dv);
      }
    }
  }
};

}  // namespace
}  // namespace fastpe::cpu::FASTPE_ISA
