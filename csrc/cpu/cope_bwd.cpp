// Backward attention with contextual positions: one pass, no atomics, every sum in a fixed order.
//
// Positions need the gates to the right of a key, their gradient needs the scores to its left:
//   e_ij = dS_ij (slope of the table at p_ij),   d logit_it = g_it (1 - g_it) sum over j <= t of e_ij.
// The counts saved by the forward pass serve the first, tiles walked from the first key to the diagonal the second. A
// task is a (batch, kv head, split) as in attn_bwd.cpp, with private sums for dK, dV, the gate keys and the table.
// A task, per tile:
//   S = K Qt, dP = V dOt (and gate logits)               products
//   g and p, from the last key to the first              gates
//   P, dS, e, the logits' gradient, first key to last    on a lane group at a time; scores' and gates' parts in one sum
//   dV += P dO, dK += dS Q, dQ^T += K^T dS               products
// and per block dQ += dZ table^T, dtable += Q^T dZ. Along a row p falls by at most 1 per key, so dZ at the two entries
// in use sits in registers and is written once, when p leaves them: no read-modify-write on the table's gradient.
#include "bwd_common.h"
#include "cope_common.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

template <class E>
struct CopeBackward {
  using S = typename E::S;
  using U = typename E::U;
  using V = Vec<S>;
  using Int = LaneInt<S>;
  static constexpr int L = V::kLanes;

  // The two entries of dz a vector of rows adds to, and where they are.
  struct Open {
    alignas(64) Int at[kBM / L];
    alignas(64) S lo[kBM], hi[kBM];
  };

  struct Scratch {
    S *rows, *s, *ds, *gates, *at, *g, *dq, *dgq, *q, *q_t, *z, *dz, *last, *lse, *delta, *ids, *before;
    U *tmp, *qt, *dot, *qr, *dor_room, *gate_qt, *gate_qr, *pa, *dsa, *dsb, *gsa, *gsb;
    const U* dor = nullptr;  // rows of dO: where they lie, or in the room
    Count64<S>* count;
    Open* open;
    int64_t* order;

    static int64_t pad(int64_t d) { return tiles::round_up(d, Vec<S>::kLanes); }
    void carve(Carver& m, const CopeCall<E>& c) {
      const AttnParams& p = c.p;
      constexpr int64_t tile = kBN<E> * kBM, units = tile / E::kPack;
      int64_t most = p.D > p.Dv ? p.D : p.Dv;
      if (c.own_gates && c.c.G > most) most = c.c.G;
      rows = m.take<S>((kBM + 1) * pad(most) + 64);
      tmp = E::kPack == 1 ? nullptr : m.take<U>(kBM * tiles::round_up(most, 16));
      s = m.take<S>(tile);
      ds = m.take<S>(tile);
      at = m.take<S>(tile);
      g = m.take<S>(tile);
      gates = c.own_gates ? m.take<S>(tile) : nullptr;
      dq = m.take<S>(p.D * kBM);
      dgq = c.c.gate_q.p ? m.take<S>(c.c.G * kBM) : nullptr;
      q = m.take<S>(kBM * p.D);
      qt = m.take<U>(p.D / E::kPack * kBM);
      q_t = E::kPack == 1 ? reinterpret_cast<S*>(qt) : c.table ? m.take<S>(p.D * kBM) : nullptr;
      dot = m.take<U>(p.Dv / E::kPack * kBM);
      qr = m.take<U>(kBM / E::kPack * pad(p.D));
      dor_room = m.take<U>(kBM / E::kPack * pad(p.Dv));
      gate_qt = c.own_gates ? m.take<U>(c.c.G / E::kPack * kBM) : nullptr;
      gate_qr = c.own_gates ? m.take<U>(kBM / E::kPack * pad(c.c.G)) : nullptr;
      const bool packed = E::kPack == 2;
      pa = packed ? m.take<U>(units) : nullptr;
      dsa = packed ? m.take<U>(units) : nullptr;
      dsb = packed ? m.take<U>(units) : nullptr;
      gsa = packed && c.own_gates ? m.take<U>(units) : nullptr;
      gsb = packed && c.own_gates ? m.take<U>(units) : nullptr;
      z = c.table ? m.take<S>(kBM * c.ldz) : nullptr;
      dz = c.table ? m.take<S>(kBM * c.ldz) : nullptr;
      count = m.take<Count64<S>>(1);
      open = m.take<Open>(1);
      order = m.take<int64_t>(c.call.nk_tiles);
      S** const lanes[] = {&last, &lse, &delta, &ids, &before};
      for (S** x : lanes) *x = m.take<S>(kBM);
    }
  };

  const CopeBwdParams& a;
  const AttnParams& p;
  CopeCall<E> c;
  const Runtime& rt;
  TileStats* stats;
  const bool want_q, want_k, want_v, want_gate_q, want_gate_k, want_table, want_dz, want_gates;
  const int64_t group, splits, dp, dvp, gp;
  int64_t head0 = 0, heads = 0;
  S *dk = nullptr, *dv = nullptr, *dgk = nullptr;  // (wave, split, Nk, padded channels)
  S *dtable = nullptr, *dtable_sum = nullptr;      // (wave, split, D, ldz); (D, ldz)
  S* table_rows = nullptr;                         // table_scale * table transposed, (npos, dp)
  Workers workers;

  bool needs(int64_t bit) const { return (a.needs & bit) != 0; }

  CopeBackward(const CopeBwdParams& params, const Runtime& runtime, TileStats* st)
      : a(params), p(params.fwd.attn), c(params.fwd), rt(runtime), stats(st),
        want_q(needs(cope_need_q)), want_k(needs(cope_need_k)), want_v(needs(cope_need_v)), want_gate_q(needs(cope_need_gate_q)),
        want_gate_k(needs(cope_need_gate_k)), want_table(c.table && needs(cope_need_table)), want_dz(c.table && (want_q || want_table)),
        want_gates(want_q || want_k || want_gate_q || want_gate_k),
        group(p.H / p.Hk), splits(tiles::backward_splits(p.B * p.Hk, c.call.nq_blocks)),
        dp(Scratch::pad(p.D)), dvp(Scratch::pad(p.Dv)), gp(Scratch::pad(params.fwd.G)) {}

  Scratch scratch(int worker) const {
    Scratch w;
    Carver m = workers.at(worker);
    w.carve(m, c);
    return w;
  }

  void run() {
    workers.measure(bytes_of([&](Carver& m) { Scratch().carve(m, c); }));
    const int64_t per_head = splits * (p.Nk * ((want_k ? dp : 0) + (want_v ? dvp : 0) + (want_gate_k ? gp : 0)) + (want_table ? p.D * c.ldz : 0));
    const int64_t total = p.B * p.Hk;
    const int64_t wave = wave_heads(c.pack_bytes(true) + per_head * int64_t(sizeof(S)), splits, total, rt.threads, int64_t(14) << 20);
    const auto layout = [&](Carver& m) {
      workers.carve(m, rt.threads);
      dk = want_k ? m.take<S>(wave * splits * p.Nk * dp) : nullptr;
      dv = want_v ? m.take<S>(wave * splits * p.Nk * dvp) : nullptr;
      dgk = want_gate_k ? m.take<S>(wave * splits * p.Nk * gp) : nullptr;
      dtable = want_table ? m.take<S>(wave * splits * p.D * c.ldz) : nullptr;
      dtable_sum = want_table ? m.take<S>(p.D * c.ldz) : nullptr;
      table_rows = c.table && want_q ? m.take<S>(c.npos * dp) : nullptr;
      c.carve_packs(m, wave, true);
    };
    const Memory memory(rt, layout);
    c.prepare();
    if (dtable_sum) std::memset(dtable_sum, 0, size_t(p.D * c.ldz) * sizeof(S));
    if (table_rows) {
      const S* e = static_cast<const S*>(c.c.table);
      for (int64_t n = 0; n < c.npos; ++n)
        for (int64_t d = 0; d < dp; ++d) table_rows[n * dp + d] = d < p.D ? e[d * c.npos + n] * S(c.c.table_scale) : S(0);
    }
    using Self = CopeBackward;
    for (head0 = 0; head0 < total; head0 += wave) {
      heads = total - head0 < wave ? total - head0 : wave;
      rt.parallel(heads * c.call.nk_tiles, [](void* self, int64_t t, int w) { static_cast<Self*>(self)->pack_task(t, w); }, this);
      rt.parallel(heads * splits, [](void* self, int64_t t, int w) { static_cast<Self*>(self)->split_task(t, w); }, this);
      if (want_k || want_v || want_gate_k) rt.parallel(heads * c.call.nk_tiles, [](void* self, int64_t t, int w) { static_cast<Self*>(self)->store_task(t, w); }, this);
      if (want_table)
        rt.parallel(p.D, [](void* self, int64_t d, int) { static_cast<Self*>(self)->add_table_row(d); }, this);
    }
    if (want_table) {
      S* out = static_cast<S*>(a.dtable);
      for (int64_t d = 0; d < p.D; ++d)
        for (int64_t n = 0; n < c.npos; ++n) out[d * c.npos + n] = dtable_sum[d * c.ldz + n] * S(c.c.table_scale);
    }
  }

  void pack_task(int64_t task, int worker) {
    const int64_t w = task / c.call.nk_tiles;
    const Scratch sc = scratch(worker);
    c.pack(w, head0 + w, task % c.call.nk_tiles, sc.rows);
  }

  // One channel of the table's gradient, heads and splits in order.
  void add_table_row(int64_t d) {
    S* __restrict y = dtable_sum + d * c.ldz;
    for (int64_t x = 0; x < heads * splits; ++x) {
      const S* __restrict src = dtable + (x * p.D + d) * c.ldz;
      for (int64_t n = 0; n < c.npos; ++n) y[n] += src[n];
    }
  }

  struct Sums {
    S *k, *v, *gate_k, *table;
  };

  void split_task(int64_t task, int worker) {
    // Splits with later blocks see more keys under a causal mask: they go first, so that the last tasks to finish are short.
    const int64_t w = task / splits, split = splits - 1 - task % splits, slot = w * splits + split, bk = head0 + w;
    Scratch sc = scratch(worker);
    const auto mine = [&](S* base, int64_t n) {
      if (base) std::memset(base + slot * n, 0, size_t(n) * sizeof(S));
      return base ? base + slot * n : nullptr;
    };
    const Sums sums{mine(dk, p.Nk * dp), mine(dv, p.Nk * dvp), mine(dgk, p.Nk * gp), mine(dtable, p.D * c.ldz)};
    for (int64_t x = 0; x < group; ++x)
      for (int64_t qb = split; qb < c.call.nq_blocks; qb += splits) block(w, bk / p.Hk, bk % p.Hk * group + x, qb, sc, sums);
  }

  void block(int64_t pack, int64_t b, int64_t h, int64_t qb, Scratch& w, const Sums& sums) {
    const int64_t i0 = qb * kBM, rows = p.Nq - i0 < kBM ? p.Nq - i0 : kBM;
    const int64_t lanes = tiles::round_up(rows, L);
    w.dor = load_upstream<E>(a, p, b, h, i0, rows, lanes, w.lse, w.delta, w.dot, want_v ? w.dor_room : nullptr, dvp, w.rows, w.tmp);

    for (int64_t r = 0; r < kBM; ++r) {
      S* row = w.q + r * p.D;
      if (r >= rows) {
        std::memset(row, 0, size_t(p.D) * sizeof(S));
        continue;
      }
      load_turned(row, p.q, p.dtype, p.D, p.q_rope, p.rope_pairs, p.rope_layout, b, h, i0 + r);
    }
    pack_transposed<E>(w.qt, kBM, w.q, p.D, rows, lanes, p.D, w.tmp);
    // pack_rows reads whole vectors past the last row's channels.
    std::memcpy(w.rows, w.q, size_t(rows * p.D) * sizeof(S));
    if (want_k) pack_block_rows<E>(w.qr, dp, w.rows, p.D, p.D, rows, lanes);
    if (E::kPack == 2 && c.table) transpose(w.q_t, kBM, w.q, p.D, lanes, p.D);
    if (c.own_gates) {
      if (c.c.gate_q.p)
        for (int64_t r = 0; r < rows; ++r) load_row(w.rows + r * c.c.G, c.c.gate_q, p.dtype, b, h, i0 + r, c.c.G);
      pack_transposed<E>(w.gate_qt, kBM, w.rows, c.c.G, rows, lanes, c.c.G, w.tmp);
      if (want_gate_k) pack_block_rows<E>(w.gate_qr, gp, w.rows, c.c.G, c.c.G, rows, lanes);
    }
    if (p.vis.q_ids) c.call.load_q_ids(b, i0, rows, w.ids);

    int64_t visited = 0, z_done = 0, dz_done = 0;
    for (int64_t l = 0; l < kBM; ++l) w.before[l] = w.open->lo[l] = w.open->hi[l] = 0;
    for (int64_t g = 0; g < kBM / L; ++g) w.open->at[g] = to_int(V(c.top));
    walk_tiles(c.call, qb, [&](int64_t t) { w.order[visited++] = t; });
    int64_t found = 0;
    bool first = true;
    for (int64_t x = visited - 1; x >= 0; --x) {
      int64_t js, je;
      TileMask<S> mask;
      if (c.call.classify(b, h, qb, w.order[x], js, je, mask) == TileClass::hidden) continue;
      mask.q_ids = w.ids;
      ++found;
      tile(pack, b, h, qb, w.order[x], js, je, mask, w, sums, lanes, first, z_done, dz_done);
      first = false;
    }
    finish(b, h, i0, rows, lanes, first, w, sums, dz_done);
    if (stats) {
      stats->add(found, c.call.nk_tiles - found, 0);
      stats->block_q = kBM;
      stats->block_k = kBN<E>;
    }
  }

  // z, and zeros in dz, as far as this tile reaches; later tiles reach less far.
  void prepare_z(Scratch& w, int64_t lanes, S reach, int64_t& z_done, int64_t& dz_done) const {
    c.fill_z(w.z, w.q, lanes, z_done, reach);
    if (!want_dz || dz_done >= z_done) return;
    for (int64_t l = 0; l < lanes; ++l) std::memset(w.dz + l * c.ldz + dz_done, 0, size_t(z_done - dz_done) * sizeof(S));
    dz_done = z_done;
  }

  void tile(int64_t pack, int64_t b, int64_t h, int64_t qb, int64_t t, int64_t js, int64_t je, const TileMask<S>& mask, Scratch& w, const Sums& sums, int64_t lanes, bool first, int64_t& z_done, int64_t& dz_done) {
    constexpr int64_t half = kBM / 2;
    const KVPack<E>& kv = c.packs[pack];
    const int64_t j0 = t * kBN<E>, jm = lanes > half ? mask.split : je;
    // Each product asks for what the next one reads from afar.
    c.products(kv.k_rows, p.D / E::kPack, w.qt, w.s, j0, js, jm, je, lanes, kv.next_values(p, t));
    c.products(kv.v_rows, p.Dv / E::kPack, w.dot, w.ds, j0, js, jm, je, lanes, kv.next_sum(sums.v, j0, dvp));
    const S* saved = c.carry(b, h, qb, t);
    std::memcpy(w.count->sum, saved, kBM * sizeof(S));
    std::memcpy(w.count->rest, saved + kBM, kBM * sizeof(S));
    const bool saturated = c.table && w.count->reached(c.top, mask.rows);
    const bool gates = want_gates && !saturated;
    if (saturated) {
      if (z_done == 0) {
        prepare_z(w, lanes, c.top, z_done, dz_done);
        for (int64_t l = 0; l < lanes; ++l) w.last[l] = w.z[l * c.ldz + c.npos - 1];
      }
      with_bool(mask.partial(), [&](auto tested) {
        for (int64_t l = 0; l < lanes; l += L) grads_saturated<decltype(tested)::value>(mask, w, js, je, l);
      });
    } else {
      if (c.own_gates) c.products(c.gate_packs[pack].k_rows, c.c.G / E::kPack, w.gate_qt, w.gates, j0, js, jm, je, lanes);
      if (c.table) prepare_z(w, lanes, w.count->largest() + S(je - js), z_done, dz_done);
      with_bool(tests_elements(mask, c.table, je), [&](auto tested) {
        with_bool(c.table, [&](auto table) {
          for (int64_t l = 0; l < lanes; l += L) {
            constexpr bool Table = decltype(table)::value, Tested = decltype(tested)::value;
            count_gates<Table, Tested>(mask, w, js, je, l);
            if (c.own_gates) grads<Table, Tested, true>(mask, w, js, je, l);
            else grads<Table, Tested, false>(mask, w, js, je, l);
          }
        });
      });
    }

    const U *pa = operand(w.s), *dsa = operand(w.ds), *dsb = dsa, *gsa = nullptr, *gsb = nullptr;
    const bool own = gates && c.own_gates;
    if (own) gsa = gsb = operand(w.gates);
    if constexpr (E::kPack == 2) {
      to_operands(w.s, w.pa, nullptr, js, je, lanes);
      to_operands(w.ds, w.dsa, w.dsb, js, je, lanes);
      pa = w.pa, dsa = w.dsa, dsb = w.dsb;
      if (own) {
        to_operands(w.gates, w.gsa, w.gsb, js, je, lanes);
        gsa = w.gsa, gsb = w.gsb;
      }
    }
    const int64_t lda = kBM / E::kPack, qu = tiles::ceil_div(lanes, E::kPack), hu = half / E::kPack;
    const auto by_key = [&](S* acc, int64_t ld, const U* left, const U* right, const Upcoming& next = {}) {
      if (!acc) return;
      gemm<E, true>(left + js * lda, lda, right, ld, acc + (j0 + js) * ld, ld, jm - js, ld, qu, next);
      if (jm < je) gemm<E, true>(left + jm * lda + hu, lda, right + hu * ld, ld, acc + (j0 + jm) * ld, ld, je - jm, ld, qu - hu);
    };
    by_key(sums.v, dvp, pa, w.dor, kv.next_sum(sums.k, j0, dp));
    by_key(sums.k, dp, dsa, w.qr);
    if (own) by_key(sums.gate_k, gp, gsa, w.gate_qr);
    const auto by_query = [&](S* acc, int64_t channels, typename KVPack<E>::Summed keys, const U* right, bool clear, const Upcoming& next = {}) {
      sum_keys<E>(keys, right, kBM, acc, channels, js, jm, je, lanes, clear, next);
    };
    if (want_q) by_query(w.dq, p.D, kv.keys(p, 0, t), dsb, first, kv.next_keys(p, t + 1));
    if (first && want_gate_q) std::memset(w.dgq, 0, size_t(c.c.G * kBM) * sizeof(S));
    if (own && c.c.gate_q.p && want_gate_q) by_query(w.dgq, c.c.G, c.gate_packs[pack].keys(c.gate, 0, t), gsb, false);
    if (own && !c.c.gate_q.p && want_q) by_query(w.dq, p.D, c.gate_packs[pack].keys(c.gate, 0, t), gsb, false);
  }

  static const U* operand(const S* x) { return E::kPack == 1 ? reinterpret_cast<const U*>(x) : nullptr; }

  // Rows of keys [js, je) as bf16: an A operand (pairs of queries) and, if asked for, a B operand (pairs of keys).
  void to_operands(const S* x, U* by_row, U* by_pair, int64_t js, int64_t je, int64_t lanes) const {
#if defined(__AVX512BF16__)
    if constexpr (E::kPack == 2)
      for (int64_t l = 0; l < lanes; l += L)
        for (int64_t j = js; j < je; j += 2) {
          const bool two = j + 1 < je;
          const VF x0 = VF::load(x + j * kBM + l), x1 = two ? VF::load(x + (j + 1) * kBM + l) : VF(0.f);
          store_bf16(reinterpret_cast<uint16_t*>(by_row) + j * kBM + l, x0);
          if (two) store_bf16(reinterpret_cast<uint16_t*>(by_row) + (j + 1) * kBM + l, x1);
          if (by_pair) _mm512_storeu_si512(by_pair + j / 2 * kBM + l, interleave_bf16(x0, x1));
        }
#endif
  }

  // Positions (not yet clamped) over w.at and gates over w.g; without a table the bias and the gates' derivative.
  template <bool Table, bool Tested>
  FASTPE_INLINE void count_gates(const TileMask<S>& mask, Scratch& w, int64_t js, int64_t je, int64_t l) const {
    const S* x = c.own_gates ? w.gates : w.s;
    const V gate_scale(c.gate_factor()), count = V::load(w.count->sum + l);
    V run = V::load(w.count->rest + l);
    for (int64_t j = je - 1; j >= js; --j) {
      const V logit = V::load(x + j * kBM + l) * gate_scale;
      V gate = gate_value<Table>(logit), slope = gate;
      if constexpr (!Table) slope = sigmoid2(-logit);
      if constexpr (Tested) {
        const Mask<S> counts = gate_lanes<Table>(mask, mask.lanes(j, l), j, l);
        gate = select(counts, gate, V(S(0)));
        slope = select(counts, slope, V(S(0)));
      }
      run = run + gate;
      (count + run).store(w.at + j * kBM + l);
      slope.store(w.g + j * kBM + l);
    }
  }

  // The open entries of dz move from `at` to `n`; what is left behind is written. One step down, the lower entry becomes the
  // upper one. A jump (the first tile, NaN) leaves both.
  static FASTPE_INLINE void step(S* dz, Int rows, Int& at, Int n, V& lo, V& hi) {
#if defined(__AVX512F__)
    if constexpr (sizeof(S) == 4) {
      const __m512i old = (__m512i)at, place = (__m512i)(rows + at);
      const __m512i one = _mm512_set1_epi32(1), moved = _mm512_sub_epi32(old, (__m512i)n);
      const __mmask16 any = _mm512_test_epi32_mask(moved, moved);
      if (any == 0) return;
      const __mmask16 jumped = _mm512_mask_cmpneq_epi32_mask(any, moved, one);
      _mm512_mask_i32scatter_ps(dz, any, _mm512_add_epi32(place, one), __m512(hi.v), 4);
      __m512 next = _mm512_mask_mov_ps(__m512(hi.v), any, __m512(lo.v));
      if (jumped) [[unlikely]] {
        _mm512_mask_i32scatter_ps(dz, jumped, place, __m512(lo.v), 4);
        next = _mm512_mask_mov_ps(next, jumped, _mm512_setzero_ps());
      }
      hi = V(typename V::Raw(next));
      lo = V(typename V::Raw(_mm512_maskz_mov_ps(__mmask16(~any), __m512(lo.v))));
      at = n;
      return;
    }
#endif
    const Int moved = at - n;
    if (!any_nonzero<S>(moved)) return;
    const Int jumped = (moved != 0) & (moved != 1);
    // All lanes: an entry that stays open is written again when it closes, and branches a lane could not be foreseen.
    store_lanes(dz, rows + at + 1, ~Int{}, hi);
    if (any_nonzero<S>(jumped)) store_lanes(dz, rows + at, jumped, lo);
    hi = select(Mask<S>{Int(moved == 0)}, hi, select(Mask<S>{jumped}, V(S(0)), lo));
    lo = select(Mask<S>{Int(moved == 0)}, lo, V(S(0)));
    at = n;
  }

  // P over s, the gradient of the products over ds (and of the gates' own products over gates), dz, and the sum of e.
  template <bool Table, bool Tested, bool Own>
  FASTPE_INLINE void grads(const TileMask<S>& mask, Scratch& w, int64_t js, int64_t je, int64_t l) const {
    const V scale2(S(p.scale * kLog2e)), scale(S(p.scale)), top(c.top), zero(S(0)), one(S(1));
    // A table slope is in log2 units; without a table, b = table_scale * sum of log gates.
    const V gate_grad(S(c.c.gate_scale * (Table ? kLn2 : c.c.table_scale))), factor(S(c.c.table_scale));
    const V offset = zero - V::load(w.lse + l), delta = V::load(w.delta + l), before = V::load(w.before + l);
    const S* z = w.z + l * c.ldz;
    S* dz = w.dz + l * c.ldz;
    const Int rows = lane_steps<S>(c.ldz);
    Int at = w.open->at[l / L];
    V open_lo = V::load(w.open->lo + l), open_hi = V::load(w.open->hi + l), sum(S(0));
    for (int64_t j = js; j < je; ++j) {
      const int64_t o = j * kBM + l;
      const V raw = V::load(w.s + o), here = V::load(w.at + o);
      V lo, hi, frac, x;
      Int n;
      if constexpr (Table) {
        const V pos = min(top, here);
        n = to_int(max(pos, zero));
        frac = pos - to_real<S>(n);
        load_pairs(z, rows + n, lo, hi);
        hi = hi - lo;
        x = fma(raw, scale2, fma(frac, hi, lo)) + offset;
      } else {
        x = fma(raw, scale2, fma(here, factor, offset));
      }
      if constexpr (Tested) x = select(mask.lanes(j, l), x, V(-kInf<S>));
      const V prob = exp2(x);
      prob.store(w.s + o);
      V d = prob * (V::load(w.ds + o) - delta);
      // An infinite dO times a hidden key must not leak: dS is 0 where P is masked.
      if constexpr (Tested) d = select(prob == zero, zero, d);
      if constexpr (Table) {
        // At a whole position hi = lo in the definition: no slope. The end of the table is one.
        sum = fma(d, select(frac > zero, hi, zero), sum);
        if (want_dz) {
          step(dz, rows, at, n, open_lo, open_hi);
          const V part = d * frac;
          open_hi = open_hi + part;
          open_lo = open_lo + (d - part);
        }
      } else {
        sum = sum + d;
      }
      const V g = V::load(w.g + o);
      V da = (before + sum) * g * gate_grad;
      if constexpr (Table) da = da * (one - g);
      // Gates that do not count must not spread the NaN or infinity of another key.
      if constexpr (Tested) da = select(g == zero, zero, da);
      if constexpr (Own) {
        (d * scale).store(w.ds + o);
        da.store(w.gates + o);
      } else {
        fma(d, scale, da).store(w.ds + o);
      }
    }
    (before + sum).store(w.before + l);
    w.open->at[l / L] = at;
    open_lo.store(w.open->lo + l);
    open_hi.store(w.open->hi + l);
  }

  // The same where every row is past the table's end; such tiles come first.
  template <bool Tested>
  FASTPE_INLINE void grads_saturated(const TileMask<S>& mask, Scratch& w, int64_t js, int64_t je, int64_t l) const {
    const V scale2(S(p.scale * kLog2e)), scale(S(p.scale)), zero(S(0));
    const V offset = V::load(w.last + l) - V::load(w.lse + l), delta = V::load(w.delta + l);
    V sum = V::load(w.open->lo + l);
    for (int64_t j = js; j < je; ++j) {
      const int64_t o = j * kBM + l;
      V x = fma(V::load(w.s + o), scale2, offset);
      if constexpr (Tested) x = select(mask.lanes(j, l), x, V(-kInf<S>));
      const V prob = exp2(x);
      prob.store(w.s + o);
      V d = prob * (V::load(w.ds + o) - delta);
      if constexpr (Tested) d = select(prob == zero, zero, d);
      sum = sum + d;
      (d * scale).store(w.ds + o);
    }
    sum.store(w.open->lo + l);
  }

  void finish(int64_t b, int64_t h, int64_t i0, int64_t rows, int64_t lanes, bool empty, Scratch& w, const Sums& sums, int64_t dz_done) {
    const bool table = want_dz && dz_done > 0;
    if (table) {
      for (int64_t l = 0; l < lanes; l += L) {
        const Int at = lane_steps<S>(c.ldz) + w.open->at[l / L];
        store_lanes(w.dz + l * c.ldz, at, ~Int{}, V::load(w.open->lo + l));
        store_lanes(w.dz + l * c.ldz, at + 1, ~Int{}, V::load(w.open->hi + l));
      }
      for (int64_t n = 0; sums.table && n < dz_done; n += kTableStep)
        gemm<TableOp<S>, true>(w.q_t, kBM, w.dz + n, c.ldz, sums.table + n, c.ldz, p.D, dz_done - n < kTableStep ? dz_done - n : kTableStep, lanes);
    }
    if (want_q) {
      if (empty) std::memset(w.rows, 0, size_t(rows * dp) * sizeof(S));
      else transpose(w.rows, dp, w.dq, kBM, p.D, rows);
      if (table) {
        for (int64_t r = 0; dp > p.D && r < rows; ++r)
          for (int64_t d = p.D; d < dp; ++d) w.rows[r * dp + d] = 0;
        const int64_t entries = dz_done < c.npos ? dz_done : c.npos;
        for (int64_t n = 0; n < entries; n += kTableStep)
          gemm<TableOp<S>, true>(w.dz + n, c.ldz, table_rows + n * dp, dp, w.rows, dp, rows, dp, entries - n < kTableStep ? entries - n : kTableStep);
      }
      for (int64_t r = 0; r < rows; ++r) {
        S* row = w.rows + r * dp;
        turn_back(row, p.q_rope, p.rope_pairs, p.rope_layout, b, h, i0 + r);
        store_row(row, a.dq, p.dtype, b, h, i0 + r, p.D);
      }
    }
    if (want_gate_q) {
      if (empty) std::memset(w.rows, 0, size_t(rows * c.c.G) * sizeof(S));
      else transpose(w.rows, c.c.G, w.dgq, kBM, c.c.G, rows);
      for (int64_t r = 0; r < rows; ++r) store_row(w.rows + r * c.c.G, a.dgate_q, p.dtype, b, h, i0 + r, c.c.G);
    }
  }

  void store_task(int64_t task, int worker) {
    const int64_t w = task / c.call.nk_tiles, t = task % c.call.nk_tiles, bk = head0 + w, b = bk / p.Hk, hk = bk % p.Hk;
    const int64_t j0 = t * kBN<E>, j1 = j0 + kBN<E> < p.Nk ? j0 + kBN<E> : p.Nk;
    S* row = scratch(worker).rows;
    const auto store = [&](const View& y, const S* sums, int64_t ld, int64_t n, const auto& turn) {
      store_sums<E>(y, p, sums + w * splits * p.Nk * ld, splits, ld, n, turn, b, hk, j0, j1, row);
    };
    if (want_k) store(a.dk, dk, dp, p.D, [&](int64_t) { return p.k_rope; });
    if (want_v) store(a.dv, dv, dvp, p.Dv, no_turn);
    if (want_gate_k) store(a.dgate_k, dgk, gp, c.c.G, no_turn);
  }
};

template <class E>
void cope_backward(const CopeBwdParams& a, const Runtime& rt, TileStats* stats) {
  CopeBackward<E>(a, rt, stats).run();
}

}  // namespace

void cope_bwd(const CopeBwdParams& a, const Runtime& rt, TileStats* stats) {
  if (a.fwd.attn.dtype == DType::f64) return cope_backward<OpF64>(a, rt, stats);
#if defined(__AVX512BF16__)
  if (a.fwd.attn.dtype == DType::bf16) return cope_backward<CopeBF16>(a, rt, stats);
#endif
  cope_backward<OpF32>(a, rt, stats);
}

}  // namespace fastpe::cpu::FASTPE_ISA
