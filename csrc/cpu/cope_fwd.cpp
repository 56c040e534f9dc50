// Forward attention with contextual positions. Tiles go from the diagonal to the first key, so that the count of a row
// is known when a tile needs it. Once every row of a block has counted past the table's end, gates have no say any more:
// the rest of the row gets the last entry, one number per lane.
#include "attn_fwd.h"
#include "cope_common.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

template <class E>
struct CopeForward {
  using S = typename E::S;
  using U = typename E::U;
  using V = Vec<S>;
  static constexpr int L = V::kLanes;

  struct Scratch {
    FwdScratch<E> base;
    Count64<S>* count;
    S *q, *z, *gates, *last;
    U* gate_qt;

    void carve(Carver& m, const CopeCall<E>& c) {
      const AttnParams& wide = c.own_gates && c.gate.D > c.p.D ? c.gate : c.p;
      AttnParams largest = c.p;
      largest.D = wide.D > largest.D ? wide.D : largest.D;
      base.carve(m, largest);
      count = m.take<Count64<S>>(1);
      q = m.take<S>(kBM * c.p.D);
      last = m.take<S>(kBM);
      z = c.table ? m.take<S>(kBM * c.ldz) : nullptr;
      gates = c.own_gates ? m.take<S>(kBN<E> * kBM) : nullptr;
      gate_qt = c.own_gates ? m.take<U>(c.c.G / E::kPack * kBM) : nullptr;
    }
  };

  CopeCall<E> c;
  const AttnParams& p;
  Forward<E> plain;
  const Runtime& rt;
  TileStats* stats;
  int64_t head0 = 0, heads = 0;
  Workers workers;

  CopeForward(const CopeParams& params, const Runtime& runtime, TileStats* st) : c(params), p(params.attn), plain(params.attn, runtime, nullptr), rt(runtime), stats(st) {}

  Scratch scratch(int worker) const {
    Scratch w;
    Carver m = workers.at(worker);
    w.carve(m, c);
    return w;
  }

  void run() {
    workers.measure(bytes_of([&](Carver& m) { Scratch().carve(m, c); }));
    const int64_t total = p.B * p.Hk, wave = wave_heads(c.pack_bytes(false), p.H / p.Hk * c.call.nq_blocks, total, rt.threads, int64_t(8) << 20);
    const auto layout = [&](Carver& m) {
      workers.carve(m, rt.threads);
      c.carve_packs(m, wave, false);
    };
    const Memory memory(rt, layout);
    c.prepare();
    for (head0 = 0; head0 < total; head0 += wave) {
      heads = total - head0 < wave ? total - head0 : wave;
      rt.parallel(heads * c.call.nk_tiles, [](void* self, int64_t t, int w) { static_cast<CopeForward*>(self)->pack_task(t, w); }, this);
      rt.parallel(heads * (p.H / p.Hk) * c.call.nq_blocks, [](void* self, int64_t t, int w) { static_cast<CopeForward*>(self)->block_task(t, w); }, this);
    }
  }

  void pack_task(int64_t task, int worker) {
    const int64_t w = task / c.call.nk_tiles;
    const Scratch sc = scratch(worker);
    c.pack(w, head0 + w, task % c.call.nk_tiles, sc.base.rows);
  }

  void block_task(int64_t task, int worker) {
    // The longest blocks first, as in attn_fwd.cpp.
    const int64_t group = p.H / p.Hk, per_head = group * c.call.nq_blocks;
    const int64_t w = task / per_head, rest = task % per_head, qb = c.call.nq_blocks - 1 - rest / group;
    const int64_t bk = head0 + w;
    block(w, bk / p.Hk, bk % p.Hk * group + rest % group, qb, scratch(worker));
  }

  void block(int64_t pack, int64_t b, int64_t h, int64_t qb, Scratch w) {
    FwdScratch<E>& f = w.base;
    const int64_t i0 = qb * kBM, rows = p.Nq - i0 < kBM ? p.Nq - i0 : kBM;
    const int64_t lanes = tiles::round_up(rows, L);
    for (int64_t r = 0; r < kBM; ++r) {
      S* row = w.q + r * p.D;
      if (r >= rows) {
        std::memset(row, 0, size_t(p.D) * sizeof(S));
        continue;
      }
      load_turned(row, p.q, p.dtype, p.D, p.q_rope, p.rope_pairs, p.rope_layout, b, h, i0 + r);
    }
    pack_transposed<E>(f.qt, kBM, w.q, p.D, rows, lanes, p.D, f.tmp);
    if (c.own_gates) {
      const S* x = w.q;
      if (c.c.gate_q.p) {
        for (int64_t r = 0; r < rows; ++r) load_row(f.rows + r * c.c.G, c.c.gate_q, p.dtype, b, h, i0 + r, c.c.G);
        x = f.rows;
      }
      pack_transposed<E>(w.gate_qt, kBM, x, c.c.G, rows, lanes, c.c.G, f.tmp);
    }
    if (p.vis.q_ids) c.call.load_q_ids(b, i0, rows, f.ids);
    for (int64_t l = 0; l < lanes; ++l) {
      f.m[l] = -kInf<S>;
      f.l[l] = 0;
    }
    w.count->clear();
    S* carry = c.carry(b, h, qb, 0);
    if (carry) std::memset(carry, 0, size_t(c.call.nk_tiles * 2 * kBM) * sizeof(S));
    bool empty = true, saturated = false;
    int64_t visited = 0, z_done = 0;

    walk_tiles(c.call, qb, [&](int64_t t) {
      int64_t js, je;
      TileMask<S> mask;
      if (c.call.classify(b, h, qb, t, js, je, mask) == TileClass::hidden) return;
      mask.q_ids = f.ids;
      ++visited;
      w.count->clear(rows);
      if (carry) {
        std::memcpy(carry + t * 2 * kBM, w.count->sum, kBM * sizeof(S));
        std::memcpy(carry + t * 2 * kBM + kBM, w.count->rest, kBM * sizeof(S));
      }
      if (c.table && !saturated && w.count->reached(c.top, rows)) {
        saturated = true;
        c.fill_z(w.z, w.q, lanes, z_done, c.top);
        for (int64_t l = 0; l < lanes; ++l) w.last[l] = w.z[l * c.ldz + c.npos - 1];
      }
      tile(pack, t, js, je, mask, w, lanes, empty, saturated, z_done);
      empty = false;
    });
    plain.finish(b, h, i0, rows, lanes, empty, f);
    if (stats) {
      stats->add(visited, c.call.nk_tiles - visited, 0);
      stats->block_q = kBM;
      stats->block_k = kBN<E>;
    }
  }

  // Scores with their bias over s, in log2 units; the largest per lane in mx. Keys from the last to the first.
  template <bool Table, bool Tested, int G>
  FASTPE_INLINE void scan(const TileMask<S>& mask, Scratch& w, int64_t js, int64_t je, int64_t l0, S* mx) const {
    S* s = w.base.s;
    const S* a = c.own_gates ? w.gates : s;
    const V scale(S(p.scale * kLog2e)), gate_scale(c.gate_factor()), top(c.top), factor(S(c.c.table_scale));
    const S* z = w.z + l0 * c.ldz;
    V run[G], count[G], best[G];
    for (int g = 0; g < G; ++g) {
      count[g] = V::load(w.count->sum + l0 + g * L);
      run[g] = V::load(w.count->rest + l0 + g * L);
      best[g] = V(-kInf<S>);
    }
    const LaneInt<S> rows = lane_steps<S>(c.ldz);
    for (int64_t j = je - 1; j >= js; --j) {
      S* row = s + j * kBM + l0;
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const V raw = V::load(row + g * L);
        V gate = gate_value<Table>(V::load(a + j * kBM + l0 + g * L) * gate_scale);
        Mask<S> seen{};
        if constexpr (Tested) {
          seen = mask.lanes(j, l0 + g * L);
          gate = select(gate_lanes<Table>(mask, seen, j, l0 + g * L), gate, V(S(0)));
        }
        run[g] = run[g] + gate;
        V x;
        if constexpr (Table) {
          const V at = min(top, count[g] + run[g]);
          const LaneInt<S> n = to_int(max(at, V(S(0))));
          V lo, hi;
          load_pairs(z + g * L * c.ldz, rows + n, lo, hi);
          x = fma(raw, scale, fma(at - to_real<S>(n), hi - lo, lo));
        } else {
          x = fma(raw, scale, (count[g] + run[g]) * factor);
        }
        if constexpr (Tested) x = select(seen, x, V(-kInf<S>));
        x.store(row + g * L);
        best[g] = max(best[g], x);
      }
    }
    for (int g = 0; g < G; ++g) {
      best[g].store(mx + l0 + g * L);
      w.count->add(l0 + g * L, run[g]);
    }
  }

  // The same with every count past the table's end.
  template <bool Tested>
  FASTPE_INLINE void scan_saturated(const TileMask<S>& mask, Scratch& w, int64_t js, int64_t je, int64_t l, S* mx) const {
    const V scale(S(p.scale * kLog2e)), last = V::load(w.last + l);
    V best(-kInf<S>);
    for (int64_t j = js; j < je; ++j) {
      S* row = w.base.s + j * kBM + l;
      V x = fma(V::load(row), scale, last);
      if constexpr (Tested) x = select(mask.lanes(j, l), x, V(-kInf<S>));
      x.store(row);
      best = max(best, x);
    }
    best.store(mx + l);
  }

  void tile(int64_t pack, int64_t t, int64_t js, int64_t je, const TileMask<S>& mask, Scratch& w, int64_t lanes, bool first, bool saturated, int64_t& z_done) {
    FwdScratch<E>& f = w.base;
    const KVPack<E>& kv = c.packs[pack];
    constexpr int64_t half = kBM / 2;
    const int64_t j0 = t * kBN<E>, jm = lanes > half ? mask.split : je;
    c.products(kv.k_rows, p.D / E::kPack, f.qt, f.s, j0, js, jm, je, lanes, kv.next_summed(kv.values(p, t)));
    alignas(64) S mx[kBM], alpha[kBM], m_safe[kBM];
    if (saturated) {
      with_bool(mask.partial(), [&](auto tested) {
        for (int64_t l = 0; l < lanes; l += L) scan_saturated<decltype(tested)::value>(mask, w, js, je, l, mx);
      });
    } else {
      if (c.own_gates) c.products(c.gate_packs[pack].k_rows, c.c.G / E::kPack, w.gate_qt, w.gates, j0, js, jm, je, lanes);
      if (c.table) c.fill_z(w.z, w.q, lanes, z_done, w.count->largest() + S(je - js));
      with_bool(tests_elements(mask, c.table, je), [&](auto tested) {
        with_bool(c.table, [&](auto table) {
          for_lanes<S, 2>(lanes, [&](auto g, int64_t l) { scan<decltype(table)::value, decltype(tested)::value, decltype(g)::value>(mask, w, js, je, l, mx); });
        });
      });
    }
    bool rescale = false;
    for (int64_t l = 0; l < lanes; l += L) {
      const V old = V::load(f.m + l), best = V::load(mx + l);
      // A NaN score must reach the sum: exp2(NaN - m) does that without touching m.
      const V now = select(best > old + V(S(kLazy)), best, old);
      const V a = select(best > old + V(S(kLazy)), exp2(old - now), V(S(1)));
      rescale |= any(now > old);
      now.store(f.m + l);
      a.store(alpha + l);
      (V::load(f.l + l) * a).store(f.l + l);
    }
    if (rescale && !first)
      for (int64_t d = 0; d < p.Dv; ++d)
        for (int64_t l = 0; l < lanes; l += L) (V::load(f.o + d * kBM + l) * V::load(alpha + l)).store(f.o + d * kBM + l);
    // A row that has seen nothing yet has m = -inf; its hidden scores must give exp2(-inf), not NaN.
    for (int64_t l = 0; l < lanes; ++l) m_safe[l] = f.m[l] == -kInf<S> ? S(0) : f.m[l];
    const TileBias<S>& none = *f.bias;
    for_lanes<S, kNV>(lanes, [&](auto g, int64_t l) {
      prob_pass<E, Kind::none, pos::Phi<BiasForm::signed_>, true, decltype(g)::value>(none, alpha, f.s, f.pt, js, je, l, m_safe, f.l);
    });
    const U* pb = E::kPack == 1 ? reinterpret_cast<const U*>(f.s) : f.pt;
    sum_keys<E>(kv.values(p, t), pb, kBM, f.o, p.Dv, js, jm, je, lanes, first, kv.next_keys(p, t - 1));
  }
};

template <class E>
void cope_forward(const CopeParams& c, const Runtime& rt, TileStats* stats) {
  CopeForward<E>(c, rt, stats).run();
}

}  // namespace

void cope_fwd(const CopeParams& c, const Runtime& rt, TileStats* stats) {
  if (c.attn.dtype == DType::f64) return cope_forward<OpF64>(c, rt, stats);
#if defined(__AVX512BF16__)
  if (c.attn.dtype == DType::bf16) return cope_forward<CopeBF16>(c, rt, stats);
#endif
  cope_forward<OpF32>(c, rt, stats);
}

}  // namespace fastpe::cpu::FASTPE_ISA
