// What attention gives every key, and rows of its probabilities or logits, from the lse of a finished call: the products and
// scores of the forward pass once more, without values. Nothing is skipped because it decays, since small shares are what
// such scores rank.
//
// mass: one task per (batch, head, split), a split being every n-th block of queries as in attn_bwd.cpp; private sums over
// all keys, added up in order. rows: one task per (batch, head, block of queries), which owns its rows.
#include "attn_fwd.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

template <class E>
struct Mass {
  using S = typename E::S;
  using U = typename E::U;
  using V = Vec<S>;
  static constexpr int L = V::kLanes;

  const MassParams& a;
  const AttnParams& p;
  Forward<E> plain;
  const Call<E>& call;
  const Runtime& rt;
  const int64_t group, first_block, parts;
  int64_t head0 = 0, heads = 0;
  S* sums = nullptr;    // (wave, group, splits, Nk)
  S* turned = nullptr;  // a tile by rows, one for each worker

  Mass(const MassParams& params, const Runtime& runtime)
      : a(params), p(params.fwd), plain(params.fwd, runtime, nullptr), call(plain.call), rt(runtime), group(p.H / p.Hk),
        first_block(a.mass ? 0 : (p.Nq - a.rows) / kBM), parts(a.mass ? tiles::backward_splits(p.B * p.H, call.nq_blocks) : call.nq_blocks - first_block) {}

  void run() {
    plain.workers.measure(bytes_of([&](Carver& c) { FwdScratch<E>().carve(c, p); }));
    const auto carve_pack = [&](KVPack<E>& k, Carver& c) { k.carve(c, p, call.nk_tiles, false, false, false); };
    const int64_t pack_bytes = bytes_of([&](Carver& c) { KVPack<E> k; carve_pack(k, c); });
    const int64_t total = p.B * p.Hk, wave = wave_heads(pack_bytes, group * parts, total, rt.threads, int64_t(8) << 20);
    const auto layout = [&](Carver& c) {
      plain.call.carve(c);
      plain.workers.carve(c, rt.threads);
      plain.packs = carve_packs<KVPack<E>>(c, wave, carve_pack);
      sums = a.mass ? c.take<S>(wave * group * parts * p.Nk) : nullptr;
      turned = a.mass ? nullptr : c.take<S>(int64_t(rt.threads) * kBM * kBN<E>);
    };
    const Memory memory(rt, layout);
    plain.call.prepare();
    using Self = Mass;
    if (call.strip_tasks()) rt.parallel(call.strip_tasks(), [](void* self, int64_t t, int) { static_cast<Self*>(self)->call.strip_task(t); }, this);
    for (head0 = 0; head0 < total; head0 += wave) {
      heads = total - head0 < wave ? total - head0 : wave;
      plain.head0 = head0;
      rt.parallel(heads * call.nk_tiles, [](void* self, int64_t t, int w) { static_cast<Self*>(self)->plain.pack_task(t, w); }, this);
      rt.parallel(heads * group * parts, [](void* self, int64_t t, int w) { static_cast<Self*>(self)->part_task(t, w); }, this);
      if (a.mass) rt.parallel(heads * group, [](void* self, int64_t t, int w) { static_cast<Self*>(self)->sum_task(t); }, this);
    }
  }

  int64_t flat_head(int64_t x) const { return (head0 + x / group) * group + x % group; }  // b * H + h

  void part_task(int64_t task, int worker) {
    const int64_t x = task / parts, part = task % parts, bh = flat_head(x), b = bh / p.H, h = bh % p.H;
    const FwdScratch<E> w = plain.scratch(worker);
    const KVPack<E>& kv = plain.packs[x / group];
    if (!a.mass) return block(kv, b, h, first_block + part, w, nullptr, turned + int64_t(worker) * kBM * kBN<E>);
    S* own = sums + task * p.Nk;
    std::memset(own, 0, size_t(p.Nk) * sizeof(S));
    for (int64_t qb = part; qb < call.nq_blocks; qb += parts) block(kv, b, h, qb, w, own, nullptr);
  }

  void sum_task(int64_t x) {
    S* out = static_cast<S*>(a.mass) + flat_head(x) * p.Nk;
    const S* own = sums + x * parts * p.Nk;
    for (int64_t j = 0; j < p.Nk; ++j) {
      double s = 0;
      for (int64_t q = 0; q < parts; ++q) s += double(own[q * p.Nk + j]);
      out[j] = S(s);
    }
  }

  void block(const KVPack<E>& kv, int64_t b, int64_t h, int64_t qb, const FwdScratch<E>& w, S* own, S* turned) const {
    const int64_t i0 = qb * kBM, rows = p.Nq - i0 < kBM ? p.Nq - i0 : kBM, I0 = i0 + call.offset;
    const int64_t lanes = tiles::round_up(rows, L);
    // l: weights of rows; m: lse in log2 units, +inf where a row has no share.
    const S* weights = at<S>(a.weights, b, h, i0);
    const S* lse = p.lse ? static_cast<const S*>(p.lse) + (b * p.H + h) * p.Nq + i0 : nullptr;
    bool any = false;
    for (int64_t r = 0; r < lanes; ++r) {
      w.l[r] = r >= rows ? S(0) : weights ? weights[r * a.weights.sn] : S(1);
      w.m[r] = a.logits ? S(0) : w.l[r] == S(0) || lse[r] == -kInf<S> ? kInf<S> : lse[r] * S(kLog2e);
      any |= w.l[r] != S(0);
    }
    if (own && !any) return;
    // Rows of the block that are wanted: [skip, rows) are rows [to, ...) of the result.
    const int64_t skip = own ? 0 : p.Nq - a.rows > i0 ? p.Nq - a.rows - i0 : 0;
    S* out = own ? nullptr : static_cast<S*>(a.rows_out) + ((b * p.H + h) * a.rows + i0 + skip - (p.Nq - a.rows)) * p.Nk;
    for (int64_t x = 0; out && x < (rows - skip) * p.Nk; ++x) out[x] = a.logits ? -kInf<S> : S(0);

    plain.load_queries(b, h, i0, rows, lanes, w);
    HeadBias<S> hb;
    hb.init(p, b, h, call.table_of(h), call.env_of(h));
    w.block->init(hb, i0, rows, I0);
    StripScratch<E> strips = w.strips;
    const Terms<E> terms{call, hb, *w.block, b, h, i0, rows, lanes, I0, w.terms, &strips};
    if (w.terms) terms.start();
    if (p.vis.q_ids) call.load_q_ids(b, i0, rows, w.ids);
    alignas(64) S ones[kBM];
    for (int64_t l = 0; l < kBM; ++l) ones[l] = 1;
    walk_tiles(call, qb, [&](int64_t t) {
      int64_t js, je;
      TileMask<S> mask;
      if (call.classify(b, h, qb, t, js, je, mask) == TileClass::hidden) return;
      const int64_t j0 = t * kBN<E>, jm = lanes > kBM / 2 ? mask.split : je;
      TileBias<S>& tb = *w.bias;
      tb.init(hb, *w.block, p, I0, lanes, j0, js, je);
      mask.q_ids = w.ids;
      tile_scores(p, kv, w.qt, plain.q_step(), mask, js, jm, je, lanes, w.s, kBM, w.other);
      constexpr int64_t step = Terms<E>::kKeys;
      if (w.terms) terms.start_tile(j0, js, je);
      for (int64_t j = js; w.terms && j < je; j += step) terms.compose(tb, w.scale->c, w.s, kBM, nullptr, j0, j, j + step < je ? j + step : je);
      const S* c = w.terms ? ones : w.scale->c;
      const bool masked = mask.partial();
      with_kind(p.softcap_bias ? Kind::none : tb.kind, tb.form, [&](auto kind, auto phi) {
        constexpr Kind K = decltype(kind)::value;
        using Phi = decltype(phi);
        S* sums_at = own ? own + j0 : nullptr;
        for_lanes<S, kNV>(lanes, [&](auto g, int64_t l) {
          if (masked) shares<K, Phi, true, decltype(g)::value>(tb, mask, c, w, js, je, l, sums_at);
          else shares<K, Phi, false, decltype(g)::value>(tb, mask, c, w, js, je, l, sums_at);
        });
      });
      if (!out) return;
      // Lanes to rows.
      transpose(turned, kBN<E>, w.s + js * kBM, kBM, je - js, rows);
      for (int64_t r = skip; r < rows; ++r) std::memcpy(out + (r - skip) * p.Nk + j0 + js, turned + r * kBN<E>, size_t(je - js) * sizeof(S));
    });
  }

  // Probabilities (or logits) of keys [js, je) over s, or their weighted sums by key into own, for G vectors of queries.
  template <Kind K, class Phi, bool Masked, int G>
  FASTPE_INLINE void shares(const TileBias<S>& tb, const TileMask<S>& mask, const S* c, const FwdScratch<E>& w, int64_t js, int64_t je, int64_t l0, S* own) const {
    ScoreAt<K, Phi, S> score[G];
    V weight[G];
    for (int g = 0; g < G; ++g) {
      score[g] = {tb, l0 + g * L, V::load(c + l0 + g * L), V(S(0)) - V::load(w.m + l0 + g * L)};
      weight[g] = V::load(w.l + l0 + g * L);
    }
    const auto at = [&](int64_t j, int g) {
      V x = score[g](tb, j, l0 + g * L, V::load(w.s + j * kBM + l0 + g * L));
      if constexpr (Masked) x = select(mask.lanes(j, l0 + g * L), x, V(-kInf<S>));
      return x;
    };
    if (own) {
      for (int64_t j = js; j < je; ++j) {
        V sum(S(0));
        for (int g = 0; g < G; ++g) sum = fma(exp2(at(j, g)), weight[g], sum);
        own[j] += reduce_add(sum);
      }
      return;
    }
    for (int64_t j = js; j < je; ++j)
      for (int g = 0; g < G; ++g) (a.logits ? at(j, g) * V(S(kLn2)) : exp2(at(j, g))).store(w.s + j * kBM + l0 + g * L);
  }
};

}  // namespace

void attn_mass(const MassParams& a, const Runtime& rt) {
  if (a.fwd.dtype == DType::f64) return Mass<OpF64>(a, rt).run();
#if defined(__AVX512BF16__)
  if (a.fwd.dtype == DType::bf16 && !exact_rows(a.fwd)) return Mass<OpBF16>(a, rt).run();
#endif
  Mass<OpF32>(a, rt).run();
}

}  // namespace fastpe::cpu::FASTPE_ISA
