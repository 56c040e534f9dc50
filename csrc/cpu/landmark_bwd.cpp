// Backward landmark attention. As attn_bwd.cpp: one task per (batch, kv head, split), private sums of dK and dV, no atomics,
// every sum in a fixed order. Per tile of whole blocks:
//   S = K Qt, dP = V dOt                               products
//   e_j = exp2(x_j - ref), sums of e_j and e_j dP_j by block
//   P_j = e_j f,  dS_j = P_j (dP_j - t)                earlier block: t = g = sum p_j dP_j; own block: t = delta
//   dS of the landmark = a (g - delta)                 a: its share in the outer softmax
//   dV += P dO, dK += dS Q, dQ^T += K^T dS             products
// Only the outer lse is saved; the inner sums are formed again from the scores of the tile.
#include "bwd_common.h"
#include "landmark_common.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

template <class E>
struct LandmarkBackward {
  using S = typename E::S;
  using U = typename E::U;
  using V = Vec<S>;
  static constexpr int L = V::kLanes;

  struct Scratch {
    S *rows, *s, *ds, *dq, *c, *lse, *delta;
    U *tmp, *qt, *dot, *qr, *dor_room, *pa, *dsa, *dsb;
    const U* dor = nullptr;  // rows of dO: where they lie, or in the room
    void carve(Carver& m, const LandmarkCall<E>& c_) {
      const AttnParams& p = c_.p;
      const int64_t n = c_.scratch_rows(), even = tiles::round_up(c_.longest, 2);
      rows = m.take<S>((n + 1) * c_.widest() + 64);
      tmp = E::kPack == 1 ? nullptr : m.take<U>(n * tiles::round_up(c_.widest(), 16));
      s = m.take<S>(even * kBM);
      ds = m.take<S>(even * kBM);
      dq = m.take<S>(p.D * kBM);
      qt = m.take<U>(p.D / E::kPack * kBM);
      dot = m.take<U>(p.Dv / E::kPack * kBM);
      qr = m.take<U>(kBM / E::kPack * tiles::round_up(p.D, L));
      dor_room = m.take<U>(kBM / E::kPack * tiles::round_up(p.Dv, L));
      pa = dsa = dsb = nullptr;
      if (E::kPack == 2) {
        pa = m.take<U>(even * kBM / E::kPack);
        dsa = m.take<U>(even * kBM / E::kPack);
        dsb = m.take<U>(even * kBM / E::kPack);
      }
      c = m.take<S>(kBM);
      lse = m.take<S>(kBM);
      delta = m.take<S>(kBM);
    }
  };

  const LandmarkBwdParams& a;
  LandmarkCall<E> c;
  const AttnParams& p;
  const Runtime& rt;
  const bool want_q, want_k, want_v;
  const int64_t splits, dp, dvp;
  int64_t head0 = 0, heads = 0;
  S *dk = nullptr, *dv = nullptr;  // (wave, split, Nk, padded channels)
  Workers workers;

  LandmarkBackward(const LandmarkBwdParams& params, const Runtime& runtime)
      : a(params), c(params.fwd, true), p(params.fwd.attn), rt(runtime), want_q(params.needs & need_q), want_k(params.needs & need_k), want_v(params.needs & need_v),
        splits(tiles::backward_splits(p.B * p.Hk, c.nq_blocks)), dp(tiles::round_up(p.D, L)), dvp(tiles::round_up(p.Dv, L)) {}

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
    const int64_t grad_each = splits * p.Nk * ((want_k ? dp : 0) + (want_v ? dvp : 0));
    const int64_t total = p.B * p.Hk;
    const int64_t wave = wave_heads(pack_bytes + grad_each * int64_t(sizeof(S)), splits, total, rt.threads, int64_t(14) << 20);
    const auto layout = [&](Carver& m) {
      workers.carve(m, rt.threads);
      dk = want_k ? m.take<S>(wave * splits * p.Nk * dp) : nullptr;
      dv = want_v ? m.take<S>(wave * splits * p.Nk * dvp) : nullptr;
      c.packs = carve_packs<LandmarkPack<E>>(m, wave, [&](LandmarkPack<E>& k, Carver& at) { c.carve_pack(k, at); });
    };
    const Memory memory(rt, layout);
    using Self = LandmarkBackward;
    for (head0 = 0; head0 < total; head0 += wave) {
      heads = total - head0 < wave ? total - head0 : wave;
      rt.parallel(heads * c.max_tiles, [](void* self, int64_t t, int w) { static_cast<Self*>(self)->pack_task(t, w); }, this);
      rt.parallel(heads * splits, [](void* self, int64_t t, int w) { static_cast<Self*>(self)->split_task(t, w); }, this);
      if (want_k || want_v) rt.parallel(heads * store_blocks(), [](void* self, int64_t t, int w) { static_cast<Self*>(self)->store_task(t, w); }, this);
    }
  }

  void pack_task(int64_t task, int worker) {
    const int64_t w = task / c.max_tiles, bk = head0 + w;
    const Scratch sc = scratch(worker);
    c.pack(w, bk / p.Hk, bk % p.Hk, task % c.max_tiles, sc.rows, sc.tmp);
  }

  void split_task(int64_t task, int worker) {
    // Splits with later blocks see more keys under a causal mask: they go first, so that the last tasks to finish are short.
    const int64_t w = task / splits, split = splits - 1 - task % splits, slot = w * splits + split, bk = head0 + w, b = bk / p.Hk, hk = bk % p.Hk;
    Scratch sc = scratch(worker);
    S* dk_acc = want_k ? dk + slot * p.Nk * dp : nullptr;
    S* dv_acc = want_v ? dv + slot * p.Nk * dvp : nullptr;
    if (dk_acc) std::memset(dk_acc, 0, size_t(p.Nk * dp) * sizeof(S));
    if (dv_acc) std::memset(dv_acc, 0, size_t(p.Nk * dvp) * sizeof(S));
    for (int64_t x = 0; x < c.group; ++x)
      for (int64_t qb = split; qb < c.nq_blocks; qb += splits) block(c.packs[w], b, hk * c.group + x, qb, sc, dk_acc, dv_acc);
  }

  void block(const LandmarkPack<E>& kv, int64_t b, int64_t h, int64_t qb, Scratch& w, S* dk_acc, S* dv_acc) const {
    const LandmarkPlan& x = c.plan(b);
    const int64_t i0 = qb * kBM, rows = p.Nq - i0 < kBM ? p.Nq - i0 : kBM, I0 = i0 + c.offset;
    const int64_t lanes = tiles::round_up(rows, L);
    w.dor = load_upstream<E>(a, p, b, h, i0, rows, lanes, w.lse, w.delta, w.dot, want_v ? w.dor_room : nullptr, dvp, w.rows, w.tmp);
    S largest = 0;
    for (int64_t r = 0; r < rows; ++r) {
      S* row = w.rows + r * p.D;
      load_turned(row, p.q, p.dtype, p.D, p.q_rope, p.rope_pairs, p.rope_layout, b, h, i0 + r);
      w.c[r] = S(p.scale * kLog2e);
      const S q = norm2(row, p.D);
      if (!(q <= largest)) largest = q == q ? q : kInf<S>;
    }
    for (int64_t r = rows; r < lanes; ++r) w.c[r] = 0;
    pack_transposed<E>(w.qt, kBM, w.rows, p.D, rows, lanes, p.D, w.tmp);
    if (want_k) pack_block_rows<E>(w.qr, dp, w.rows, p.D, p.D, rows, lanes);

    S k_norm = 0;
    int64_t last = 0;
    for (; last < x.tiles && x.begin(last) < I0 + rows; ++last) k_norm = kv.k_norm[last] > k_norm ? kv.k_norm[last] : k_norm;
    const bool calm = __builtin_sqrt(double(largest)) * double(k_norm) * __builtin_fabs(p.scale) * kLog2e * 1.01 <= kCalm;
    for (int64_t t = 0; t < last; ++t) tile(kv, x, b, t, LandmarkTile(x, t, I0, rows, lanes, E::kPack), w, lanes, calm, dk_acc, dv_acc, t == 0);
    if (!want_q) return;
    if (last == 0) std::memset(w.rows, 0, size_t(rows * p.D) * sizeof(S));
    else transpose(w.rows, p.D, w.dq, kBM, p.D, rows);
    for (int64_t r = 0; r < rows; ++r) {
      S* row = w.rows + r * p.D;
      turn_back(row, p.q_rope, p.rope_pairs, p.rope_layout, b, h, i0 + r);
      store_row(row, a.dq, p.dtype, b, h, i0 + r, p.D);
    }
  }

  // P and dS of one block for G vectors of queries from lane l0 on.
  template <bool Mixed, bool Calm, int G>
  FASTPE_INLINE void share(const LandmarkBlock& k, const Scratch& w, int64_t l0) const {
    V cv[G], shift[G], sum[G], along[G], factor[G], level[G], landmark[G];
    for (int g = 0; g < G; ++g) {
      const int64_t l = l0 + g * L;
      cv[g] = V::load(w.c + l);
      shift[g] = V(S(0));
      if constexpr (!Calm) {
        const V top = landmark_max<Mixed>(k, w.s, kBM, w.c, l);
        shift[g] = select(top == V(-kInf<S>), V(S(0)), V(S(0)) - top);
      }
      sum[g] = along[g] = V(S(0));
    }
    const int64_t e = Mixed && k.reach + l0 + G * L - 1 < k.e ? (k.reach + l0 + G * L - 1 > k.a ? k.reach + l0 + G * L - 1 : k.a) : k.e;
    for (int64_t j = k.a; j < e; ++j) {
      S *row = w.s + j * kBM + l0, *d = w.ds + j * kBM + l0;
      V y[G], dp_[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        y[g] = fma(V::load(row + g * L), cv[g], shift[g]);
        dp_[g] = V::load(d + g * L);
        if (k.hidden(j)) y[g] = V(-kInf<S>), dp_[g] = V(S(0));
        if constexpr (Mixed) {
          const Mask<S> sees = landmark_sees<S>(k, j, l0 + g * L);
          y[g] = select(sees, y[g], V(-kInf<S>));
          dp_[g] = select(sees, dp_[g], V(S(0)));  // nothing was computed there
          dp_[g].store(d + g * L);
        }
      }
      exp2_each<G>(y);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        sum[g] = sum[g] + y[g];
        along[g] = fma(y[g], dp_[g], along[g]);
        y[g].store(row + g * L);
      }
    }
    const bool counts = k.landmark >= 0 && !k.hidden(k.landmark);
    const V scale{S(p.scale)};
    for (int g = 0; g < G; ++g) {
      const int64_t l = l0 + g * L;
      const V lse = V::load(w.lse + l), delta = V::load(w.delta + l);
      V outer(S(0));
      if (counts) outer = exp2(fma(V::load(w.s + k.landmark * kBM + l), cv[g], V(S(0)) - lse));
      const V inverse = select(sum[g] == V(S(0)), V(S(0)), V(S(1)) / sum[g]);
      const V mean = along[g] * inverse;
      factor[g] = outer * inverse;
      level[g] = mean;
      landmark[g] = outer * (mean - delta) * scale;
      if constexpr (Mixed) {
        const Mask<S> past = landmark_past<S>(k, l);
        const V own = select(sum[g] == V(S(0)), V(S(0)), exp2(V(S(0)) - shift[g] - lse));
        factor[g] = select(past, factor[g], own);
        level[g] = select(past, mean, delta);
        landmark[g] = select(past, landmark[g], V(S(0)));
      }
    }
    for (int64_t j = k.a; j < e; ++j)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const int64_t at = j * kBM + l0 + g * L;
        const V y = V::load(w.s + at) * factor[g];
        V d = y * (V::load(w.ds + at) - level[g]) * scale;
        // An infinite dO times a hidden key must not leak.
        if (Mixed || k.seen) d = select(y == V(S(0)), V(S(0)), d);
        put(w, j, l0 + g * L, y, d);
      }
    for (int64_t j = e; j < k.end; ++j)
      for (int g = 0; g < G; ++g) put(w, j, l0 + g * L, V(S(0)), j == k.landmark ? landmark[g] : V(S(0)));
  }

  // P and dS of one key as the operands of the products.
  FASTPE_INLINE void put(const Scratch& w, int64_t j, int64_t l, V prob, V d) const {
    if constexpr (E::kPack == 1) {
      prob.store(w.s + j * kBM + l);
      d.store(w.ds + j * kBM + l);
    } else {
#if defined(__AVX512BF16__)
      store_bf16(reinterpret_cast<uint16_t*>(w.pa) + j * kBM + l, prob);
      const __m256i half = to_bf16(d);
      _mm256_storeu_si256((__m256i*)(reinterpret_cast<uint16_t*>(w.dsa) + j * kBM + l), half);
      // Keys pair up by their place in the tile, and come in order.
      U* word = w.dsb + j / 2 * kBM + l;
      const __m512i x = _mm512_cvtepu16_epi32(half);
      _mm512_storeu_si512(word, j % 2 ? _mm512_or_si512(_mm512_loadu_si512(word), _mm512_slli_epi32(x, 16)) : x);
#endif
    }
  }

  void tile(const LandmarkPack<E>& kv, const LandmarkPlan& x, int64_t b, int64_t t, const LandmarkTile& at, const Scratch& w, int64_t lanes, bool calm, S* dk_acc, S* dv_acc, bool first) const {
    constexpr int64_t half = kBM / 2;
    const int64_t ku = p.D / E::kPack, vu = p.Dv / E::kPack, n = at.n, jm = at.jm, j0 = at.j0;
    // Each product asks for what the next one reads from afar.
    const auto sums = [&](const S* acc, int64_t ld) { return acc ? kv.next(acc + j0 * ld, n * ld) : Upcoming(); };
    gemm<E, false>(kv.k_rows + j0 * ku, ku, w.qt, kBM, w.s, kBM, jm, lanes, ku, kv.next(kv.v_rows + j0 * vu, n * vu));
    gemm<E, false>(kv.v_rows + j0 * vu, vu, w.dot, kBM, w.ds, kBM, jm, lanes, vu, sums(dv_acc, dvp));
    if (jm < n) {
      gemm<E, false>(kv.k_rows + (j0 + jm) * ku, ku, w.qt + half, kBM, w.s + jm * kBM + half, kBM, n - jm, lanes - half, ku);
      gemm<E, false>(kv.v_rows + (j0 + jm) * vu, vu, w.dot + half, kBM, w.ds + jm * kBM + half, kBM, n - jm, lanes - half, vu);
    }
    for (int64_t y = x.tile[t]; y < x.tile[t + 1] && x.first[y] - j0 < n; ++y) {
      const LandmarkBlock k = at.block(x, y, c.seen(b));
      const auto go = [&](auto mixed, auto is_calm) {
        constexpr bool M = decltype(mixed)::value, C = decltype(is_calm)::value;
        for_lanes<S, kNV / 2>(lanes, [&](auto g, int64_t l) { share<M, C, decltype(g)::value>(k, w, l); });
      };
      if (at.mixed) calm ? go(std::true_type{}, std::true_type{}) : go(std::true_type{}, std::false_type{});
      else calm ? go(std::false_type{}, std::true_type{}) : go(std::false_type{}, std::false_type{});
    }
    const U* pa = E::kPack == 1 ? reinterpret_cast<const U*>(w.s) : w.pa;
    const U* dsa = E::kPack == 1 ? reinterpret_cast<const U*>(w.ds) : w.dsa;
    const U* dsb = E::kPack == 1 ? reinterpret_cast<const U*>(w.ds) : w.dsb;
    const int64_t lda = kBM / E::kPack, qu = tiles::ceil_div(lanes, E::kPack), hu = half / E::kPack;
    const auto by_key = [&](S* acc, int64_t ld, const U* left, const U* right, const Upcoming& next) {
      gemm<E, true>(left, lda, right, ld, acc + j0 * ld, ld, jm, ld, qu, next);
      if (jm < n) gemm<E, true>(left + jm * lda + hu, lda, right + hu * ld, ld, acc + (j0 + jm) * ld, ld, n - jm, ld, qu - hu);
    };
    const int64_t units = x.unit[t + 1] - x.unit[t];
    const U* kc = kv.k_cols + x.unit[t] * p.D;
    if (dv_acc) by_key(dv_acc, dvp, pa, w.dor, sums(dk_acc, dp));
    if (dk_acc) by_key(dk_acc, dp, dsa, w.qr, kv.next(kc, units * p.D));
    if (want_q) {
      const int64_t um = jm / E::kPack, u1 = tiles::ceil_div(n, E::kPack), u_end = jm < n ? um : u1;
      const Upcoming keys = kv.next(kv.k_rows + (j0 + n) * ku, (x.end(t + 1 < x.tiles ? t + 1 : t) - j0 - n) * ku);
      if (first) gemm<E, false>(kc, units, dsb, kBM, w.dq, kBM, p.D, lanes, u_end, keys);
      else gemm<E, true>(kc, units, dsb, kBM, w.dq, kBM, p.D, lanes, u_end, keys);
      if (jm < n) gemm<E, true>(kc + um, units, dsb + um * kBM + half, kBM, w.dq + half, kBM, p.D, lanes - half, u1 - um);
    }
  }

  int64_t store_blocks() const { return tiles::ceil_div(p.Nk, kBM); }
  void store_task(int64_t task, int worker) {
    const int64_t w = task / store_blocks(), t = task % store_blocks(), bk = head0 + w, b = bk / p.Hk, hk = bk % p.Hk;
    const int64_t j0 = t * kBM, j1 = j0 + kBM < p.Nk ? j0 + kBM : p.Nk;
    S* row = scratch(worker).rows;
    if (want_k) store_sums<E>(a.dk, p, dk + w * splits * p.Nk * dp, splits, dp, p.D, [&](int64_t) { return p.k_rope; }, b, hk, j0, j1, row);
    if (want_v) store_sums<E>(a.dv, p, dv + w * splits * p.Nk * dvp, splits, dvp, p.Dv, no_turn, b, hk, j0, j1, row);
  }
};

}  // namespace

void landmark_bwd(const LandmarkBwdParams& a, const Runtime& rt) {
  if (a.fwd.attn.dtype == DType::f64) return LandmarkBackward<OpF64>(a, rt).run();
#if defined(__AVX512BF16__)
  if (a.fwd.attn.dtype == DType::bf16) return LandmarkBackward<OpBF16>(a, rt).run();
#endif
  LandmarkBackward<OpF32>(a, rt).run();
}

}  // namespace fastpe::cpu::FASTPE_ISA
