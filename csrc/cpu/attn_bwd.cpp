// Backward attention: five products per tile, no atomics, every sum in a fixed order.
//
// Work: for a wave of (batch, kv head) pairs K and V are packed; then one task per (pair, split), where a split is every
// n-th block of kBM queries of every query head of the group. n depends on shapes alone. A task holds private dK and
// dV sums over all keys; a last pass adds the splits in order, undoes the rotation and stores.
// A task, per block of queries: Q and dO are packed four ways (transposed for scores and dP, by rows for dK and dV); per visible key
// tile, queries in lanes as in the forward pass:
//   S = K Qt, dP = V dOt                         products
//   P = exp2(S - lse), dS = P (dP - delta)       on a few rows at a time, in L1
//   gradients of the bias                        from dS while it is there, only the ones asked for
//   dV += P dO, dK += dS Q, dQ^T += K^T dS       products
// delta_i = <dO_i, O_i> - dlse_i (chunked.md M3).
#include "attn_terms.h"
#include "bwd_common.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

// Rows of dS have a margin of zeros on both sides, so that its diagonals can be summed with plain vector loads.
template <class S> constexpr int64_t kMargin = Vec<S>::kLanes;
template <class S> constexpr int64_t kPitch = kBM + 2 * kMargin<S>;
constexpr int64_t kChunk = 32;  // keys treated at a time between the products

// Private sums of bias gradients of one (batch, head, split); pieces not needed are null.
template <class S>
struct BiasGrad : TermGrad<S> {
  S* params = nullptr;  // 2
  S* w = nullptr;       // Nk
  S* w2 = nullptr;      // Nk: two_sided's future
  S* table = nullptr;   // span, at its first element
  S* omega = nullptr;   // span, at its first element
  S *row_e = nullptr, *col_e = nullptr, *col_k = nullptr;  // strips: by place of the expanded table; by key
};

// A bit for every region whose dQ has been written.
using Touched = uint32_t;

template <class E>
struct BwdScratch {
  using S = typename E::S;
  using U = typename E::U;
  StripScratch<E> strips;
  S *rows, *s, *ds, *cap, *raw, *dq, *terms, *aux;
  S *other, *sum;  // with regions: scores of a second region, or dS of one region; rows of dQ
  U *tmp, *qt, *dot, *qr, *dor_room, *pa, *dsa, *dsb;
  const U* dor = nullptr;  // rows of dO: where they lie, or in the room
  TileBias<S>* bias;
  BlockBias<S>* block;
  BlockScale<S>* scale;
  Reach<S>* reach;
  S *lse, *delta, *slack, *ids, *du, *du2, *dgamma, *drho;
  S *row_ds, *row_p, *row_p0, *row_p1, *row_phi;  // sums over keys that set delta right, see settle_rows

  static int64_t pad(int64_t d) { return tiles::round_up(d, Vec<S>::kLanes); }

  void carve(Carver& c, const AttnParams& p, bool keep_raw) {
    const int64_t dmax = p.D > p.Dv ? p.D : p.Dv;
    rows = c.take<S>(((kBM > kBN<E> ? kBM : kBN<E>) + 1) * dmax + 64);
    tmp = E::kPack == 1 ? nullptr : c.take<U>((kBM > kBN<E> ? kBM : kBN<E>) * tiles::round_up(dmax, 16));
    s = c.take<S>(kBN<E> * kPitch<S>);
    ds = c.take<S>(kBN<E> * kPitch<S>);
    cap = p.softcap > 0 ? c.take<S>(kBN<E> * kPitch<S>) : nullptr;
    raw = keep_raw ? c.take<S>(kBN<E> * kPitch<S>) : nullptr;
    terms = pos::is_composed(p) ? c.take<S>(Terms<E>::kScratch) : nullptr;
    aux = p.bias.omega || p.bias.pieces ? c.take<S>(kChunk * kPitch<S>) : nullptr;
    const int64_t regions = pos::region_count(p.region.kind);
    other = regions > 1 ? c.take<S>(kBN<E> * kPitch<S>) : nullptr;
    sum = regions > 1 ? c.take<S>(kBM * p.D) : nullptr;
    pa = dsa = dsb = nullptr;
    if (E::kPack == 2) {
      pa = c.take<U>(kBN<E> * kBM / E::kPack);
      dsa = c.take<U>(kBN<E> * kBM / E::kPack);
      dsb = c.take<U>(kBN<E> * kBM / E::kPack);
    }
    bias = c.take<TileBias<S>>(1);
    reach = c.take<Reach<S>>(1);
    strips.carve(c, p, true);
    dq = c.take<S>(regions * p.D * kBM);
    qt = c.take<U>(regions * (p.D / E::kPack * kBM));
    dot = c.take<U>(p.Dv / E::kPack * kBM);
    qr = c.take<U>(regions * (kBM / E::kPack * pad(p.D)));
    dor_room = c.take<U>(kBM / E::kPack * pad(p.Dv));
    block = c.take<BlockBias<S>>(1);
    scale = c.take<BlockScale<S>>(1);
    lse = c.take<S>(kBM);
    delta = c.take<S>(kBM);
    slack = c.take<S>(kBM);
    ids = c.take<S>(kBM);
    du = c.take<S>(kBM);
    du2 = c.take<S>(kBM);
    dgamma = c.take<S>(kBM);
    drho = c.take<S>(kBM);
    row_ds = c.take<S>(kBM);
    row_p = c.take<S>(kBM);
    row_p0 = c.take<S>(kBM);
    row_p1 = c.take<S>(kBM);
    row_phi = c.take<S>(kBM);
  }
};

// What becomes of P and dS of a tile. In float32 they serve the products where they stand, and the softmax scale waits: Q
// carries it into dK, dQ takes it at its end. In bf16, where dS is rounded anyhow, dS times the scale is an operand of its own;
// P and dS go straight to that form where nothing else reads them.
template <class E>
struct GradTo {
  const typename E::S* rho;       // the softmax scale by lane
  bool keep, operands;            // bf16: over s and ds, without the scale; to the three below
  typename E::U *pa, *dsa, *dsb;  // P by key, dS by key, dS in pairs of keys
};

// P and dS of keys [js, je), js at a whole unit, one vector of queries after the other.
template <class E, Kind K, class Phi, bool Masked>
FASTPE_INLINE void grad_pass(const TileBias<typename E::S>& t, const TileMask<typename E::S>& mask, const typename E::S* c, const typename E::S* lse, const typename E::S* delta, typename E::S* s, typename E::S* ds, const GradTo<E>& to, int64_t js, int64_t je, int64_t lanes) {
  using V = Vec<typename E::S>;
  using S = typename E::S;
  constexpr int L = V::kLanes;
  // dS = P (dP rho - delta rho): the scale costs nothing in a multiply-add.
  const bool scaled = E::kPack == 2 && !to.keep;
  for_lanes<S, kNV / 2>(lanes, [&](auto vectors, int64_t l0) {
    constexpr int G = decltype(vectors)::value;
    ScoreAt<K, Phi, S> at[G];
    V dv[G], rho[G];
    for (int g = 0; g < G; ++g) {
      at[g] = {t, l0 + g * L, V::load(c + l0 + g * L), V(S(0)) - V::load(lse + l0 + g * L)};
      rho[g] = scaled ? V::load(to.rho + l0 + g * L) : V(S(1));
      dv[g] = V(S(0)) - V::load(delta + l0 + g * L) * rho[g];
    }
    // Vector y of J keys from j on is that of key j + y / G, lanes y % G.
    const auto pairs = [&](auto count, int64_t j, V* pv, V* d) {
      constexpr int n = decltype(count)::value * G;
#pragma GCC unroll 8
      for (int y = 0; y < n; ++y) {
        const int64_t key = j + y / G, l = l0 + y % G * L;
        pv[y] = at[y % G](t, key, l, V::load(s + key * kPitch<S> + l));
        if constexpr (Masked) pv[y] = select(mask.lanes(key, l), pv[y], V(-kInf<S>));
      }
      exp2_each<n>(pv);
#pragma GCC unroll 8
      for (int y = 0; y < n; ++y) {
        d[y] = pv[y] * fma(V::load(ds + (j + y / G) * kPitch<S> + l0 + y % G * L), rho[y % G], dv[y % G]);
        // An infinite dO times a hidden key must not leak: dS is 0 where P is masked.
        if constexpr (Masked) d[y] = select(pv[y] == V(S(0)), V(S(0)), d[y]);
      }
    };
    if constexpr (E::kPack == 1) {
      for_keys<G>(js, je, [&](auto count, int64_t j) {
        constexpr int J = decltype(count)::value;
        V pv[J * G], d[J * G];
        pairs(count, j, pv, d);
#pragma GCC unroll 8
        for (int y = 0; y < J * G; ++y) {
          pv[y].store(s + (j + y / G) * kPitch<S> + l0 + y % G * L);
          d[y].store(ds + (j + y / G) * kPitch<S> + l0 + y % G * L);
        }
      });
    } else {
#if defined(__AVX512BF16__)
      const auto by_key = [](uint16_t* y, __m512i both, bool two) {
        _mm256_storeu_si256((__m256i*)y, (__m256i)__builtin_shufflevector(both, both, 0, 1, 2, 3));
        if (two) _mm256_storeu_si256((__m256i*)(y + kBM), (__m256i)__builtin_shufflevector(both, both, 4, 5, 6, 7));
      };
      for (int64_t j = js; j < je; j += 2) {
        const bool two = j + 1 < je;
        V pv[2 * G], d[2 * G];
        if (two) {
          pairs(std::integral_constant<int, 2>{}, j, pv, d);
        } else {
          pairs(std::integral_constant<int, 1>{}, j, pv, d);
          for (int g = 0; g < G; ++g) pv[G + g] = d[G + g] = V(S(0));
        }
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
          const V p0 = pv[g], p1 = pv[G + g];
          V d0 = d[g], d1 = d[G + g];
          const int64_t l = l0 + g * L, at = j * kPitch<S> + l;
          if (to.keep) {
            p0.store(s + at), d0.store(ds + at);
            if (two) p1.store(s + at + kPitch<S>), d1.store(ds + at + kPitch<S>);
          }
          if (!to.operands) continue;
          if (to.keep) {
            const V r = V::load(to.rho + l);
            d0 = d0 * r, d1 = d1 * r;
          }
          by_key(reinterpret_cast<uint16_t*>(to.pa) + j * kBM + l, two_bf16(p0, p1), two);
          const __m512i dd = two_bf16(d0, d1);
          by_key(reinterpret_cast<uint16_t*>(to.dsa) + j * kBM + l, dd, two);
          _mm512_storeu_si512(to.dsb + j / 2 * kBM + l, zip_halves(dd));
        }
      }
#endif
    }
  });
}

template <class E>
struct Backward {
  using S = typename E::S;
  using U = typename E::U;
  using V = Vec<S>;
  static constexpr int L = V::kLanes;

  const AttnBwdParams& a;
  const AttnParams& p;
  Call<E> call;
  const Runtime& rt;
  TileStats* stats;
  const bool want_q, want_k, want_v, want_params, want_gamma, want_u, want_w, want_table, want_rho, settle;
  const bool want_pieces, want_omega, want_rows, want_cols, want_dense, want_factor, want_pairs, want_bias;
  const bool want_row_q, want_row_e, want_col_k, want_col_e, want_strips;
  // A dense gradient of all rows and keys that batch entries or kv heads share: those go one after the other.
  const bool one_by_one;
  const int64_t group, splits, dp, dvp;
  const int regions, copies;  // of the call; sums of dK, one for every rotated copy of the keys
  int64_t head0 = 0, heads = 0;
  KVPack<E>* packs = nullptr;
  S *dk = nullptr, *dv = nullptr;  // (wave, split, copies, Nk, padded channels), (wave, split, Nk, padded channels)
  Workers workers;
  double skip = 0;  // log2 of what a skipped pair may hold
  // Private bias sums: (B, H, split, ...), and per-row sums (B, H, Nq), which one task owns.
  S *g_params = nullptr, *g_w = nullptr, *g_table = nullptr, *g_u = nullptr, *g_gamma = nullptr, *g_rho = nullptr;
  S *g_omega = nullptr, *g_cols = nullptr, *g_key = nullptr, *g_row = nullptr, *g_factor = nullptr, *g_pairs = nullptr;
  double* g_pieces = nullptr;
  // Strips: sums by place of the expanded tables and by key, (wave, group, split, ...), added up after each wave.
  S *g_row_e = nullptr, *g_col_e = nullptr, *g_col_k = nullptr;
  double *t_row_e = nullptr, *t_col_e = nullptr;  // (H|1, R, d)

  bool needs(int64_t bit) const { return (a.needs & bit) != 0; }
  // Planes of w for each head, and where a head's own sums stand among those of all planes.
  int64_t planes() const { return p.bias.form == BiasForm::two_sided ? 2 : 1; }
  int64_t plane_row(int64_t b, int64_t h, int64_t plane) const { return (b * planes() + plane) * p.H + h; }
  // Sums of dS kept for the table: one an offset, or one an entry when positions decide.
  int64_t table_sums() const { return is_mapped(p.bias) ? p.bias.table_len : table_span(p).len; }

  Backward(const AttnBwdParams& params, const Runtime& runtime, TileStats* st)
      : a(params), p(params.fwd), call(params.fwd), rt(runtime), stats(st),
        want_q(needs(need_q)), want_k(needs(need_k)), want_v(needs(need_v)),
        want_params(needs(need_params)), want_gamma(needs(need_gamma)),
        // u taken from w at the query's index: its gradient is part of dw.
        want_u(needs(need_u) || (needs(need_w) && !p.bias.u)), want_w(needs(need_w)), want_table(needs(need_table)), want_rho(needs(need_row_scale)),
        settle((want_params || want_gamma) && pos::is_rel_fn(p.bias.form) && !p.softcap_bias && (params.fwd.dtype == DType::bf16 || params.fwd.dtype == DType::f16)),
        want_pieces(needs(need_pieces)), want_omega(needs(need_omega)), want_rows(needs(need_rows)), want_cols(needs(need_cols)), want_dense(needs(need_dense)),
        want_factor(needs(need_factor)), want_pairs(needs(need_pairs)),
        want_bias(want_params || want_gamma || want_u || want_w || want_table || want_pieces || want_rows || want_cols || want_dense || want_pairs),
        want_row_q(needs(need_row_q)), want_row_e(needs(need_row_e)), want_col_k(needs(need_col_k)), want_col_e(needs(need_col_e)),
        want_strips(want_row_q || want_row_e || want_col_k || want_col_e),
        one_by_one(want_dense && p.bias.dense.sn && p.bias.dense_sk && ((p.B > 1 && !p.bias.dense.sb) || (p.Hk > 1 && !p.bias.dense.sh))),
        group(p.H / p.Hk), splits(tiles::backward_splits(one_by_one ? 1 : p.B * p.Hk, call.nq_blocks)),
        dp(BwdScratch<E>::pad(p.D)), dvp(BwdScratch<E>::pad(p.Dv)),
        regions(pos::region_count(p.region.kind)), copies(KVPack<E>::copies(p)) {}

  // Products before the score's factors are kept where a gradient weighs dS by them.
  bool keep_raw() const { return want_rho || want_omega || want_factor; }
  int64_t qt_step() const { return p.D / E::kPack * kBM; }
  int64_t qr_step() const { return kBM / E::kPack * dp; }

  BwdScratch<E> scratch(int worker) const {
    BwdScratch<E> w;
    Carver c = workers.at(worker);
    w.carve(c, p, keep_raw());
    return w;
  }
  void carve_pack(KVPack<E>& k, Carver& c) const { k.carve(c, p, call.nk_tiles, true, true, false); }

  void run() {
    skip = skip_log2(p) - skip_weight();
    workers.measure(bytes_of([&](Carver& c) { BwdScratch<E>().carve(c, p, keep_raw()); }));
    const int64_t pack_bytes = bytes_of([&](Carver& c) { KVPack<E> k; carve_pack(k, c); });
    bytes_of([&](Carver& c) { call.carve(c, true); });  // how long the strips' tables are
    const int64_t grad_each = splits * (p.Nk * ((want_k ? copies * dp : 0) + (want_v ? dvp : 0)) + group * (row_places() + col_places() + key_places()));
    const int64_t total = p.B * p.Hk;
    const int64_t wave = one_by_one ? 1 : wave_heads(pack_bytes + grad_each * int64_t(sizeof(S)), splits, total, rt.threads, int64_t(14) << 20);
    const int64_t bh = p.B * p.H;
    const auto layout = [&](Carver& c) {
      call.carve(c, true);
      workers.carve(c, rt.threads);
      dk = want_k ? c.take<S>(wave * splits * copies * p.Nk * dp) : nullptr;
      dv = want_v ? c.take<S>(wave * splits * p.Nk * dvp) : nullptr;
      g_params = want_params ? c.take<S>(bh * splits * 2) : nullptr;
      g_w = want_w ? c.take<S>(planes() * bh * splits * p.Nk) : nullptr;
      g_table = want_table ? c.take<S>(bh * splits * table_sums()) : nullptr;
      g_omega = want_omega ? c.take<S>(bh * splits * table_span(p).len) : nullptr;
      g_pieces = want_pieces ? c.take<double>(bh * splits * 2 * p.bias.pieces_len) : nullptr;
      g_cols = want_cols ? c.take<S>(bh * splits * p.Nk * p.bias.terms_len) : nullptr;
      g_factor = want_factor ? c.take<S>(bh * splits * p.bias.Sq * p.bias.Sk) : nullptr;
      g_pairs = want_pairs ? c.take<S>(bh * splits * p.bias.Sq * p.bias.Sk) : nullptr;
      g_key = want_dense && p.bias.dense_sk && !p.bias.dense.sn ? c.take<S>(bh * splits * p.Nk) : nullptr;
      g_row = want_dense && !p.bias.dense_sk ? c.take<S>(bh * p.Nq) : nullptr;
      g_u = want_u ? c.take<S>(planes() * bh * p.Nq) : nullptr;
      g_gamma = want_gamma ? c.take<S>(bh * p.Nq) : nullptr;
      g_rho = want_rho ? c.take<S>(bh * p.Nq) : nullptr;
      g_row_e = want_row_e ? c.take<S>(wave * group * splits * row_places()) : nullptr;
      g_col_e = want_col_e ? c.take<S>(wave * group * splits * col_places()) : nullptr;
      g_col_k = want_col_k ? c.take<S>(wave * group * splits * key_places()) : nullptr;
      t_row_e = want_row_e ? c.take<double>(call.row_strip.heads(p) * p.bias.terms_len * p.bias.strip_d) : nullptr;
      t_col_e = want_col_e ? c.take<double>(call.col_strip.heads(p) * p.bias.terms_len * p.bias.strip_d) : nullptr;
      packs = carve_packs<KVPack<E>>(c, wave, [&](KVPack<E>& k, Carver& at) { carve_pack(k, at); });
    };
    const Memory memory(rt, layout);
    call.prepare();
    if (call.strip_tasks()) rt.parallel(call.strip_tasks(), [](void* self, int64_t t, int) { static_cast<Backward*>(self)->call.strip_task(t); }, this);
    if (t_row_e) std::memset(t_row_e, 0, size_t(call.row_strip.heads(p) * p.bias.terms_len * p.bias.strip_d) * sizeof(double));
    if (t_col_e) std::memset(t_col_e, 0, size_t(call.col_strip.heads(p) * p.bias.terms_len * p.bias.strip_d) * sizeof(double));
    if (want_rows) std::memset(a.drows, 0, size_t(bh * p.Nq * p.bias.terms_len) * sizeof(S));
    if (want_dense && !g_key && !g_row) std::memset(a.ddense, 0, size_t((p.bias.dense.sb ? p.B : 1) * (p.bias.dense.sh ? p.H : 1) * p.Nq * p.Nk) * sizeof(S));
    if (g_row) std::memset(g_row, 0, size_t(bh * p.Nq) * sizeof(S));
    using Self = Backward;
    for (head0 = 0; head0 < total; head0 += wave) {
      heads = total - head0 < wave ? total - head0 : wave;
      rt.parallel(heads * call.nk_tiles, [](void* self, int64_t t, int w) { static_cast<Self*>(self)->pack_task(t, w); }, this);
      rt.parallel(heads * splits, [](void* self, int64_t t, int w) { static_cast<Self*>(self)->split_task(t, w); }, this);
      if (want_k || want_v) rt.parallel(heads * call.nk_tiles, [](void* self, int64_t t, int w) { static_cast<Self*>(self)->store_task(t, w); }, this);
      if (want_strips) add_strips();
    }
    reduce_bias();
  }

  int64_t strip_dp() const { return padded<S>(p.bias.strip_d); }
  int64_t row_places() const { return want_row_e ? call.row_strip.len * strip_dp() : 0; }
  int64_t col_places() const { return want_col_e ? call.col_strip.len * strip_dp() : 0; }
  int64_t key_places() const { return want_col_k ? p.Nk * strip_dp() : 0; }
  int64_t strip_row(int64_t w, int64_t x, int64_t split) const { return (w * group + x) * splits + split; }

  // The wave's sums of the strips, in the order of heads, splits and places whatever the size of a wave.
  void add_strips() {
    const TableSpan sp = table_span(p);
    const int64_t d = p.bias.strip_d, R = p.bias.terms_len, dps = strip_dp();
    const auto by_entry = [&](double* total, const StripTable<S>& t, const S* src, int64_t h) {
      double* y = total + (t.e->sh ? h : 0) * R * d;
      for (int64_t x = 0; x < t.len; ++x) {
        const int64_t offset = t.sign * (t.first + x);
        const int32_t at = offset >= sp.lo && offset < sp.lo + sp.len ? call.index_lut()[offset] : -1;
        if (at < 0) continue;
        for (int64_t c = 0; c < d; ++c) y[at * d + c] += double(src[x * dps + c]);
      }
    };
    for (int64_t w = 0; w < heads; ++w)
      for (int64_t x = 0; x < group; ++x) {
        const int64_t bk = head0 + w, b = bk / p.Hk, h = bk % p.Hk * group + x;
        for (int64_t s = 0; s < splits; ++s) {
          if (g_row_e) by_entry(t_row_e, call.row_strip, g_row_e + strip_row(w, x, s) * row_places(), h);
          if (g_col_e) by_entry(t_col_e, call.col_strip, g_col_e + strip_row(w, x, s) * col_places(), h);
        }
        for (int64_t j = 0; g_col_k && j < p.Nk; ++j) {
          S* y = static_cast<S*>(a.dcol_k) + ((b * p.H + h) * p.Nk + j) * d;
          sum_splits(y, g_col_k + strip_row(w, x, 0) * key_places() + j * dps, splits, key_places(), d);
        }
      }
  }

  void pack_task(int64_t task, int worker) {
    const int64_t w = task / call.nk_tiles, bk = head0 + w;
    const BwdScratch<E> sc = scratch(worker);
    packs[w].pack(p, bk / p.Hk, bk % p.Hk, task % call.nk_tiles, sc.rows);
  }

  void split_task(int64_t task, int worker) {
    // Splits with later blocks see more keys under a causal mask: they go first, so that the last tasks to finish are short.
    const int64_t w = task / splits, split = splits - 1 - task % splits, slot = w * splits + split, bk = head0 + w, b = bk / p.Hk, hk = bk % p.Hk;
    const BwdScratch<E> sc = scratch(worker);
    for (int64_t x = 0; x < kBN<E> * kPitch<S>; ++x) sc.s[x] = sc.ds[x] = 0;
    if (sc.aux) std::memset(sc.aux, 0, size_t(kChunk * kPitch<S>) * sizeof(S));
    S* dk_acc = want_k ? dk + slot * copies * p.Nk * dp : nullptr;
    S* dv_acc = want_v ? dv + slot * p.Nk * dvp : nullptr;
    if (dk_acc) std::memset(dk_acc, 0, size_t(copies * p.Nk * dp) * sizeof(S));
    if (dv_acc) std::memset(dv_acc, 0, size_t(p.Nk * dvp) * sizeof(S));
    for (int64_t x = 0; x < group; ++x) {
      const int64_t h = hk * group + x, row = (b * p.H + h) * splits + split;
      BiasGrad<S> bg;
      if (g_params) { bg.params = g_params + row * 2; bg.params[0] = bg.params[1] = 0; }
      const auto by_key = [&](int64_t plane) {
        S* sums = g_w + (plane_row(b, h, plane) * splits + split) * p.Nk;
        std::memset(sums, 0, size_t(p.Nk) * sizeof(S));
        return sums;
      };
      if (g_w) bg.w = by_key(0);
      if (g_w && planes() == 2) bg.w2 = by_key(1);
      if (g_table) {
        S* sums = g_table + row * table_sums();
        std::memset(sums, 0, size_t(table_sums()) * sizeof(S));
        (is_mapped(p.bias) ? bg.mapped : bg.table) = sums;
      }
      const auto own = [](auto* sums, int64_t at, int64_t n) {
        if (sums) std::memset(sums + at * n, 0, size_t(n) * sizeof(*sums));
        return sums ? sums + at * n : nullptr;
      };
      bg.omega = own(g_omega, row, table_span(p).len);
      bg.pieces = own(g_pieces, row, 2 * p.bias.pieces_len);
      bg.cols = own(g_cols, row, p.Nk * p.bias.terms_len);
      bg.key = own(g_key, row, p.Nk);
      bg.factor = own(g_factor, row, p.bias.Sq * p.bias.Sk);
      bg.pairs = own(g_pairs, row, p.bias.Sq * p.bias.Sk);
      if (g_row) bg.row = g_row + (b * p.H + h) * p.Nq;
      if (want_rows) bg.rows = static_cast<S*>(a.drows) + (b * p.H + h) * p.Nq * p.bias.terms_len;
      if (want_dense && !g_key && !g_row) {
        const int64_t at = (p.bias.dense.sb ? b : 0) * (p.bias.dense.sh ? p.H : 1) + (p.bias.dense.sh ? h : 0);
        bg.dense = static_cast<S*>(a.ddense) + at * p.Nq * p.Nk;
      }
      bg.row_e = own(g_row_e, strip_row(w, x, split), row_places());
      bg.col_e = own(g_col_e, strip_row(w, x, split), col_places());
      bg.col_k = own(g_col_k, strip_row(w, x, split), key_places());
      for (int64_t qb = split; qb < call.nq_blocks; qb += splits) {
        Block block{b, h, qb, sc};
        run_block(packs[w], block, bg, dk_acc, dv_acc);
      }
    }
  }

  // A block of queries on its way through the key tiles.
  struct Block {
    int64_t b = 0, h = 0, qb = 0;
    BwdScratch<E> w;
    int64_t i0 = 0, rows = 0, lanes = 0, I0 = 0;
    HeadBias<S> hb{};
    Touched touched = 0;
    int64_t visited = 0, decayed = 0;
  };

  void run_block(const KVPack<E>& kv, Block& x, BiasGrad<S>& bg, S* dk_acc, S* dv_acc) {
    start(x);
    const Terms<E> terms{call, x.hb, *x.w.block, x.b, x.h, x.i0, x.rows, x.lanes, x.I0, x.w.terms, &x.w.strips};
    if (x.w.terms) terms.start();
    walk_tiles(call, x.qb, [&](int64_t t) { visit(kv, t, x, terms, bg, dk_acc, dv_acc); });
    finish(x, bg);
  }

  void start(Block& x) {
    BwdScratch<E>& w = x.w;
    const int64_t b = x.b, h = x.h;
    const int64_t i0 = x.i0 = x.qb * kBM, rows = x.rows = p.Nq - i0 < kBM ? p.Nq - i0 : kBM, I0 = x.I0 = i0 + call.offset;
    const int64_t lanes = x.lanes = tiles::round_up(rows, L);
    const bool may_skip = skip > -1e300;

    w.dor = load_upstream<E>(a, p, b, h, i0, rows, lanes, w.lse, w.delta, w.dot, want_v ? w.dor_room : nullptr, dvp, w.rows, w.tmp);
    for (int64_t r = 0; r < lanes; ++r) w.slack[r] = r < rows ? S(skip) : kInf<S>;
    const S* rho = at<S>(p.row_scale, b, h);
    for (int64_t r = 0; r < lanes; ++r) {
      w.scale->rho[r] = r < rows ? S(p.scale) * (rho ? rho[(i0 + r) * p.row_scale.sn] : S(1)) : S(0);
      w.scale->c[r] = w.scale->rho[r] * S(kLog2e);
      w.scale->qn[r] = 0;
    }
    bool measured = !may_skip;
    for (int part = 0; part < regions; ++part) {
      if (!reaches(call, part, I0, lanes)) continue;
      const Rope turn = region_rope<S>(p.q_rope, part);
      U* qt = w.qt + part * qt_step();
      const bool here = E::kPack == 1 && p.dtype == kOwnType<E> && !turn.cos;
      if (want_k && !here) {
        for (int64_t r = 0; r < rows; ++r) load_turned(w.rows + r * p.D, p.q, p.dtype, p.D, turn, p.rope_pairs, p.rope_layout, b, h, i0 + r);
        pack_transposed<E>(qt, kBM, w.rows, p.D, rows, lanes, p.D, w.tmp);
      } else {
        pack_queries<E>(qt, p, turn, b, h, i0, rows, lanes, w.rows, w.tmp);
      }
      const S* q = here ? static_cast<const S*>(p.q.p) + b * p.q.sb + h * p.q.sh + i0 * p.q.sn : w.rows;
      if (want_k) pack_block_rows<E>(w.qr + part * qr_step(), dp, q, here ? p.q.sn : p.D, p.D, rows, lanes, E::kPack == 1 ? w.scale->rho : nullptr);
      if (!measured) w.scale->template measure<E>(qt, p.D / E::kPack, lanes);
      measured = true;
    }

    x.hb.init(p, b, h, call.table_of(h), call.env_of(h));
    w.block->init(x.hb, i0, rows, I0);
    if (p.vis.q_ids) call.load_q_ids(b, i0, rows, w.ids);
    for (int64_t l = 0; l < kBM; ++l) {
      w.du[l] = w.du2[l] = w.dgamma[l] = w.drho[l] = 0;
      w.row_ds[l] = w.row_p[l] = w.row_p0[l] = w.row_p1[l] = w.row_phi[l] = 0;
    }
  }

  void visit(const KVPack<E>& kv, int64_t t, Block& x, const Terms<E>& terms, BiasGrad<S>& bg, S* dk_acc, S* dv_acc) {
    BwdScratch<E>& w = x.w;
    const int64_t lanes = x.lanes;
    int64_t js, je;
    TileMask<S> mask;
    if (call.classify(x.b, x.h, x.qb, t, js, je, mask) == TileClass::hidden) return;
    const int64_t j0 = t * kBN<E>;
    TileBias<S>& tb = *w.bias;
    tb.init(x.hb, *w.block, p, x.I0, lanes, j0, js, je);
    if (skip > -1e300) {
      if (w.terms) terms.reach(tb, *w.reach, j0, js, je);
      if (forgettable(tb, x.hb, kv.k_norm[t], w, terms, x.I0, j0 + js, j0 + je - 1, lanes)) { ++x.decayed; return; }
    }
    ++x.visited;
    mask.q_ids = w.ids;
    // Diagonals are read one vector past the last lane: columns a shorter block does not write must be zero.
    for (int64_t j = 0; want_table && lanes < kBM && j < kBN<E>; ++j)
      for (int64_t l = lanes; l < kBM; ++l) w.ds[j * kPitch<S> + kMargin<S> + l] = 0;
    for (int64_t j = 0; w.aux && lanes < kBM && j < kChunk; ++j)
      for (int64_t l = lanes; l < kBM; ++l) w.aux[j * kPitch<S> + kMargin<S> + l] = 0;
    tile(kv, t, j0, js, je, tb, mask, terms, w, bg, lanes, x.I0, dk_acc, dv_acc, x.touched);
  }

  void finish(Block& x, BiasGrad<S>& bg) {
    BwdScratch<E>& w = x.w;
    const int64_t b = x.b, h = x.h, i0 = x.i0, rows = x.rows, row0 = (b * p.H + h) * p.Nq + i0;
    if (settle) settle_rows(w, bg, b, h, i0, rows);
    if (want_row_q)
      for (int64_t r = 0; r < rows; ++r) std::memcpy(static_cast<S*>(a.drow_q) + (row0 + r) * p.bias.strip_d, w.strips.dq + r * strip_dp(), size_t(p.bias.strip_d) * sizeof(S));
    if (needs(need_q)) store_dq(w, x.touched, b, h, i0, rows);
    if (g_u)
      for (int64_t plane = 0; plane < planes(); ++plane) std::memcpy(g_u + plane_row(b, h, plane) * p.Nq + i0, plane ? w.du2 : w.du, size_t(rows) * sizeof(S));
    if (g_gamma) for (int64_t r = 0; r < rows; ++r) g_gamma[row0 + r] = w.dgamma[r];
    if (g_rho) for (int64_t r = 0; r < rows; ++r) g_rho[row0 + r] = w.drho[r];
    if (!stats) return;
    stats->add(x.visited, call.nk_tiles - x.visited - x.decayed, x.decayed);
    stats->block_q = kBM;
    stats->block_k = kBN<E>;
  }

  // Every region's part of dQ is turned back by its own angles.
  void store_dq(BwdScratch<E>& w, Touched touched, int64_t b, int64_t h, int64_t i0, int64_t rows) const {
    S* sum = regions > 1 ? w.sum : w.rows;
    if (regions > 1 || !touched) std::memset(sum, 0, size_t(rows * p.D) * sizeof(S));
    for (int x = 0; x < regions; ++x) {
      if (!(touched >> x & 1)) continue;
      const Rope turn = region_rope<S>(p.q_rope, x);
      S* dq = w.dq + x * p.D * kBM;
      for (int64_t d = 0; E::kPack == 1 && d < p.D; ++d)
        for (int64_t l = 0; l < rows; l += L) (V::load(dq + d * kBM + l) * V::load(w.scale->rho + l)).store(dq + d * kBM + l);
      if (regions == 1 && !turn.cos && store_columns<E>(a.dq, p.dtype, b, h, i0, dq, p.D, rows)) return;
      transpose(w.rows, p.D, dq, kBM, p.D, rows);
      for (int64_t r = 0; r < rows; ++r) {
        S* row = w.rows + r * p.D;
        turn_back(row, turn, p.rope_pairs, p.rope_layout, b, h, i0 + r);
        if (regions > 1)
          for (int64_t d = 0; d < p.D; ++d) sum[r * p.D + d] += row[d];
      }
    }
    for (int64_t r = 0; r < rows; ++r) store_row(sum + r * p.D, a.dq, p.dtype, b, h, i0 + r, p.D);
  }

  // A gradient that weighs dS by a distance-like factor loses up to that factor more than the probability does: log2
  // of the largest factor comes off the allowance. Position arrays and row weights use the largest |D| a row can see.
  double skip_weight() const {
    if (!(want_params || want_table || want_gamma)) return 0;
    const double reach = double(p.Nk > p.Nq ? p.Nk : p.Nq);
    return __builtin_log2(reach > 1 ? reach : 1);
  }

  // As in the forward pass, with the final lse: P of every pair of the tile is below eps / (Nk * weight).
  bool forgettable(const TileBias<S>& tb, const HeadBias<S>& hb, S k_norm, const BwdScratch<E>& w, const Terms<E>& terms, int64_t I0, int64_t j_first, int64_t j_last, int64_t lanes) const {
    S score = 0;  // gradients that weigh dS by the product itself lose that much more
    if (keep_raw()) {
      for (int64_t l = 0; l < lanes; ++l) score = w.scale->qn[l] > score ? w.scale->qn[l] : score;
      score = S(__builtin_log2(1 + double(score) * double(k_norm)));
    }
    for (int64_t l = 0; l < lanes; l += L) {
      const V product = V::load(w.scale->qn + l) * V(k_norm);
      const V form = tb.upper(hb, l, I0, j_first, j_last) + V(score);
      const V bound = w.terms ? terms.upper(*w.reach, product, form) : product + form;
      const Mask<S> proven = V::load(w.lse + l) + V::load(w.slack + l) >= bound;
      if (!all(proven)) return false;
    }
    return true;
  }

  void tile(const KVPack<E>& kv, int64_t t, int64_t j0, int64_t js, int64_t je, const TileBias<S>& tb, const TileMask<S>& mask, const Terms<E>& terms, BwdScratch<E>& w, BiasGrad<S>& bg, int64_t lanes, int64_t I0, S* dk_acc, S* dv_acc, Touched& touched) {
    constexpr int64_t P = kPitch<S>;
    const int64_t vu = p.Dv / E::kPack;
    const bool masked = mask.partial();
    S *s = w.s + kMargin<S>, *ds = w.ds + kMargin<S>;
    constexpr int64_t half = kBM / 2;
    const int64_t jm = lanes > half ? mask.split : je;
    // Each product asks for what the next one reads from afar.
    tile_scores(p, kv, w.qt, qt_step(), mask, js, jm, je, lanes, s, P, w.other + kMargin<S>, kv.next_values(p, t));
    gemm<E, false>(kv.v_rows + (j0 + js) * vu, vu, w.dot, kBM, ds + js * P, P, jm - js, lanes, vu, kv.next_sum(dv_acc, j0, dvp));
    if (jm < je) gemm<E, false>(kv.v_rows + (j0 + jm) * vu, vu, w.dot + half, kBM, ds + jm * P + half, P, je - jm, lanes - half, vu);
    const S* c = w.scale->c;
    alignas(64) S ones[kBM];
    if (w.terms)
      for (int64_t l = 0; l < kBM; ++l) ones[l] = 1;
    const int only = only_region(mask, j0 + js, j0 + je, lanes);

    // dS is what the products take as soon as it is formed, unless a factor of the score comes between.
    const bool last = !(p.softcap > 0) && !p.bias.factor && !p.bias.omega;
    const bool read = !last || want_bias || want_strips || want_rho || only < 0;
    const bool finished = E::kPack == 1 || (last && only >= 0);
    const GradTo<E> to{w.scale->rho, read, finished, w.pa, w.dsa, w.dsb};
    if (w.terms) terms.start_tile(j0, js, je);
    for (int64_t c0 = js; c0 < je; c0 += kChunk) {
      const int64_t c1 = c0 + kChunk < je ? c0 + kChunk : je;
      if (w.raw)
        for (int64_t j = c0; j < c1; ++j) std::memcpy(w.raw + j * P, s + j * P, size_t(lanes) * sizeof(S));
      if (w.terms) terms.compose(tb, c, s, P, w.cap, j0, c0, c1);
      const S* ce = w.terms ? ones : c;
      with_kind(p.softcap_bias ? Kind::none : tb.kind, tb.form, [&](auto kind, auto phi) {
        constexpr Kind K = decltype(kind)::value;
        using Phi = decltype(phi);
        if (masked) grad_pass<E, K, Phi, true>(tb, mask, ce, w.lse, w.delta, s, ds, to, c0, c1, lanes);
        else grad_pass<E, K, Phi, false>(tb, mask, ce, w.lse, w.delta, s, ds, to, c0, c1, lanes);
      });
      // dS -> gradient of what each step of the score put out, back to the product.
      if (p.softcap_bias) times(ds, w.cap, c0, c1, lanes);
      if (want_strips) terms.strip_grads(ds, P, c0, c1);
      if (want_bias) bias_grads(tb, terms, w, bg, s, ds, c0, c1, lanes, I0, j0);
      if (p.softcap > 0 && !p.softcap_bias) times(ds, w.cap, c0, c1, lanes);
      if (p.bias.factor) factor_grads(terms, w, bg, ds, c0, c1, I0, j0);
      if (p.bias.omega) omega_grads(terms, w, bg, ds, c0, c1, lanes, I0, j0);
      if (want_rho) rho_grads(w, ds, c0, c1, lanes);
      if (!finished) finish_ds(w, s, ds, c0, c1, lanes, only < 0);
    }
    if constexpr (E::kPack == 1)
      if (want_strips) w.strips.finish_tile(call.row_strip, call.col_strip, terms.h, lanes, j0, want_row_q, bg.row_e, bg.col_k, bg.col_e);
    const U* pa = E::kPack == 1 ? reinterpret_cast<const U*>(s) : w.pa;
    if (dv_acc) by_key(dv_acc + j0 * dvp, dvp, pa, w.dor, js, jm, je, lanes, kv.next_sum(dk_acc, j0, dp));
    if (!want_q && !want_k) return;
    if (only >= 0) return by_region(kv, t, j0, only, ds, w, js, jm, je, lanes, dk_acc, touched);
    for (int x = 0; x < regions; ++x) {
      const pos::Range r = pos::keys_of_region(p.region, x, I0, I0 + lanes, j0 + js, j0 + je);
      if (r.lo == r.hi) continue;
      const int64_t a = (r.lo - j0) / E::kPack * E::kPack, e = r.hi - j0;
      const S* own = dS_of_region(w, mask, x, s, ds, a, e, lanes);
      by_region(kv, t, j0, x, own, w, a, jm < a ? a : jm < e ? jm : e, e, lanes, dk_acc, touched);
    }
  }

  // The one region all pairs of the tile are in, or -1.
  int only_region(const TileMask<S>& m, int64_t j_first, int64_t j_end, int64_t lanes) const {
    int only = -1;
    for (int x = 0; x < regions; ++x) {
      const pos::Range r = pos::keys_of_region(p.region, x, m.I0, m.I0 + lanes, j_first, j_end);
      if (r.lo == r.hi) continue;
      if (only >= 0) return -1;
      only = x;
    }
    return only;
  }

  // acc[key] += left^T right over the rows of the block; keys from jm on belong to the second half of the lanes.
  void by_key(S* acc, int64_t ld, const U* left, const U* right, int64_t js, int64_t jm, int64_t je, int64_t lanes, const Upcoming& next) const {
    const int64_t lda = E::kPack == 1 ? kPitch<S> : kBM / E::kPack, qu = tiles::ceil_div(lanes, E::kPack), hu = kBM / 2 / E::kPack;
    gemm<E, true>(left + js * lda, lda, right, ld, acc + js * ld, ld, jm - js, ld, qu, next);
    if (jm < je) gemm<E, true>(left + jm * lda + hu, lda, right + hu * ld, ld, acc + jm * ld, ld, je - jm, ld, qu - hu);
  }

  // dK and dQ of keys [js, je), js at a whole unit, which all belong to region x as far as dS is not 0.
  void by_region(const KVPack<E>& kv, int64_t t, int64_t j0, int x, const S* ds, BwdScratch<E>& w, int64_t js, int64_t jm, int64_t je, int64_t lanes, S* dk_acc, Touched& touched) const {
    constexpr int64_t P = kPitch<S>;
    if (dk_acc) by_key(dk_acc + ((copies > 1 ? x : 0) * p.Nk + j0) * dp, dp, E::kPack == 1 ? reinterpret_cast<const U*>(ds) : w.dsa, w.qr + x * qr_step(), js, jm, je, lanes, want_q && E::kPack != 1 ? kv.next_summed(kv.keys(p, x, t)) : Upcoming());
    if (!want_q) return;
    const U* dsb = E::kPack == 1 ? reinterpret_cast<const U*>(ds) : w.dsb;
    constexpr std::integral_constant<int64_t, E::kPack == 1 ? P : kBM> ldb{};
    // The split is at a whole unit (Call::classify); a range cut by a region may end inside one.
    sum_keys<E>(kv.keys(p, x, t), dsb, ldb, w.dq + x * p.D * kBM, p.D, js, jm, je, lanes, !(touched >> x & 1), kv.next_keys(p, t - 1));
    touched |= Touched(1) << x;
  }

  // dS with the pairs of other regions set to 0, as the operands of the products need it.
  const S* dS_of_region(BwdScratch<E>& w, const TileMask<S>& mask, int x, const S* s, const S* ds, int64_t a, int64_t e, int64_t lanes) const {
    constexpr int64_t P = kPitch<S>;
    S* own = w.other + kMargin<S>;
    for (int64_t j = a; j < e; ++j) {
      const pos::Range rows = pos::rows_of_region(p.region, x, mask.j0 + j);
      for (int64_t l = 0; l < lanes; l += L) select(mask.in_rows(rows, l), V::load(ds + j * P + l), V(S(0))).store(own + j * P + l);
    }
    if constexpr (E::kPack == 2) operands_of_ds(w, own, a, e, lanes);
    return own;
  }

  // d rho_i = sum_j scale <q_i, k_j> dx_ij; the raw product was kept because P overwrites it.
  void rho_grads(BwdScratch<E>& w, const S* ds, int64_t c0, int64_t c1, int64_t lanes) const {
    constexpr int64_t P = kPitch<S>;
    for (int64_t l = 0; l < lanes; l += L) {
      V acc(S(0));
      for (int64_t j = c0; j < c1; ++j) {
        acc = fma(V::load(ds + j * P + l), V::load(w.raw + j * P + l), acc);
      }
      fma(acc, V(S(p.scale)), V::load(w.drho + l)).store(w.drho + l);
    }
  }

  // bf16: P and dS as operands, where grad_pass has not made them.
  void finish_ds(BwdScratch<E>& w, S* s, S* ds, int64_t c0, int64_t c1, int64_t lanes, bool mixed) {
#if defined(__AVX512BF16__)
    constexpr int64_t P = kPitch<S>;
    if constexpr (E::kPack == 2) {
      for (int64_t l = 0; l < lanes; l += L)
        for (int64_t j = c0; j < c1; ++j) store_bf16(reinterpret_cast<uint16_t*>(w.pa) + j * kBM + l, V::load(s + j * P + l));
      if ((want_q || want_k) && !mixed) operands_of_ds(w, ds, c0, c1, lanes);
    }
#endif
  }

  // bf16: dx times the softmax scale by key, and in pairs of keys; c0 at a whole pair.
  void operands_of_ds(BwdScratch<E>& w, const S* ds, int64_t c0, int64_t c1, int64_t lanes) const {
#if defined(__AVX512BF16__)
    constexpr int64_t P = kPitch<S>;
    if constexpr (E::kPack == 2)
      for (int64_t l = 0; l < lanes; l += L) {
        const V rho = V::load(w.scale->rho + l);
        for (int64_t j = c0; j < c1; j += 2) {
          const bool two = j + 1 < c1;
          const V d0 = V::load(ds + j * P + l) * rho, d1 = two ? V::load(ds + (j + 1) * P + l) * rho : V(0.f);
          const __m256i b0 = to_bf16(d0), b1 = to_bf16(d1);
          _mm256_storeu_si256((__m256i*)(reinterpret_cast<uint16_t*>(w.dsa) + j * kBM + l), b0);
          if (two) _mm256_storeu_si256((__m256i*)(reinterpret_cast<uint16_t*>(w.dsa) + (j + 1) * kBM + l), b1);
          const __m512i pair = _mm512_or_si512(_mm512_cvtepu16_epi32(b0), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b1), 16));
          _mm512_storeu_si512(w.dsb + j / 2 * kBM + l, pair);
        }
      }
#endif
  }

  static void times(S* ds, const S* factor, int64_t c0, int64_t c1, int64_t lanes) {
    constexpr int64_t P = kPitch<S>;
    for (int64_t j = c0; j < c1; ++j)
      for (int64_t l = 0; l < lanes; l += L) (V::load(ds + j * P + l) * V::load(factor + j * P + l)).store(ds + j * P + l);
  }

  // d factor = sum of dx times the product it multiplied; dx becomes the gradient of that product.
  void factor_grads(const Terms<E>& terms, BwdScratch<E>& w, BiasGrad<S>& bg, S* ds, int64_t c0, int64_t c1, int64_t I0, int64_t j0) const {
    constexpr int64_t P = kPitch<S>;
    const S* om = p.bias.omega ? call.omega_of(terms.h) + (I0 - j0) : nullptr;
    if (bg.factor)
      terms.sum_pairs(bg.factor, j0, c0, c1, [&](int64_t j, int64_t l) {
        const V x = V::load(ds + j * P + l) * V::load(w.raw + j * P + l) * V::load(w.scale->rho + l);
        return om ? x * V::load(om + l - j) : x;
      });
    terms.multiply_factor(ds, P, j0, c0, c1);
  }

  // d omega = sum of dx times the product it multiplied, along the diagonals; dx becomes the gradient of that product.
  void omega_grads(const Terms<E>& terms, BwdScratch<E>& w, BiasGrad<S>& bg, S* ds, int64_t c0, int64_t c1, int64_t lanes, int64_t I0, int64_t j0) const {
    constexpr int64_t P = kPitch<S>;
    S* aux = w.aux + kMargin<S> - c0 * P;
    if (bg.omega) {
      for (int64_t j = c0; j < c1; ++j)
        for (int64_t l = 0; l < lanes; l += L) (V::load(ds + j * P + l) * V::load(w.raw + j * P + l) * V::load(w.scale->rho + l)).store(aux + j * P + l);
      diagonals(bg.omega, aux, c0, c1, lanes, I0, j0);
    }
    const S* om = call.omega_of(terms.h) + (I0 - j0);
    for (int64_t j = c0; j < c1; ++j)
      for (int64_t l = 0; l < lanes; l += L) (V::load(ds + j * P + l) * V::load(om + l - j)).store(ds + j * P + l);
  }

  void bias_grads(const TileBias<S>& t, const Terms<E>& terms, BwdScratch<E>& w, BiasGrad<S>& bg, const S* prob, const S* ds, int64_t c0, int64_t c1, int64_t lanes, int64_t I0, int64_t j0) {
    constexpr int64_t P = kPitch<S>;
    if (bg.dense || bg.key || bg.row) terms.dense_grads(ds, P, bg, j0, c0, c1);
    if (bg.rows || bg.cols) terms.indexed_grads(ds, P, bg, j0, c0, c1);
    if (bg.pairs) terms.sum_pairs(bg.pairs, j0, c0, c1, [&](int64_t j, int64_t l) { return V::load(ds + j * P + l); });
    if (t.form == BiasForm::fire) {
      if (!(bg.pieces || bg.table || bg.mapped || want_gamma)) return;
      S* aux = want_table ? w.aux + kMargin<S> : nullptr;
      terms.pieces_grads(t, ds, P, aux, want_gamma ? w.dgamma : nullptr, bg.pieces, c0, c1);
      if (bg.table) diagonals(bg.table, aux - c0 * P, c0, c1, lanes, I0, j0);
      if (bg.mapped) terms.numerator_grads(t, aux, P, bg.mapped, c0, c1);
      return;
    }
    if (bg.mapped) return terms.mapped_grads(t, ds, P, bg.mapped, c0, c1);
    if (bg.table) return diagonals(bg.table, ds, c0, c1, lanes, I0, j0);
    if (!(want_params || want_gamma || want_u || want_w)) return;
    if (p.bias.form == BiasForm::two_sided) return two_sided_grads(t, w, bg, ds, c0, c1, lanes, j0);
    if (p.bias.form == BiasForm::signed_ && !want_params && !want_gamma) return position_grads(w, bg, ds, c0, c1, lanes, j0);
    pos::with_form(t.form, [&](auto phi) { rel_grads<decltype(phi)>(t, w, bg, prob, ds, c0, c1, lanes, j0); });
  }

  // b = g (u_i - w_j) of the past or g (w2_j - u2_i) of the future.
  void two_sided_grads(const TileBias<S>& t, BwdScratch<E>& w, BiasGrad<S>& bg, const S* ds, int64_t c0, int64_t c1, int64_t lanes, int64_t j0) const {
    constexpr int64_t P = kPitch<S>;
    alignas(64) S past[kChunk * L], future[kChunk * L];
    for (int64_t x = 0; x < kChunk * L; ++x) past[x] = future[x] = 0;
    for (int64_t l = 0; l < lanes; l += L) {
      const V gm = V::load(w.block->gm + l), r = V::load(t.r + l), at = V::iota() + V(S(l + t.diagonal));
      const V r2 = t.kind == Kind::twin ? V::load(t.r2 + l) : r;
      V du(S(0)), du2(S(0)), dg(S(0));
      for (int64_t j = c0; j < c1; ++j) {
        const V d = V::load(ds + j * P + l), x = d * gm;
        const Mask<S> behind = at >= V(S(j));
        const V xp = select(behind, x, V(S(0))), xf = x - xp;
        du = du + xp;
        du2 = du2 - xf;
        S *kp = past + (j - c0) * L, *kf = future + (j - c0) * L;
        (V::load(kp) + xp).store(kp);
        (V::load(kf) + xf).store(kf);
        const V D = t.kind == Kind::twin ? t.twin_distance(j, l, r, r2) : select(behind, r - V(t.y[j]), V(t.y[j]) - r);
        dg = fma(d, D, dg);
      }
      (V::load(w.du + l) + du).store(w.du + l);
      (V::load(w.du2 + l) + du2).store(w.du2 + l);
      if (want_gamma) (V::load(w.dgamma + l) + dg).store(w.dgamma + l);
    }
    if (!bg.w) return;
    add_sums(bg.w + j0 + c0, V(S(-1)), past, c1 - c0);
    add_sums(bg.w2 + j0 + c0, V(S(1)), future, c1 - c0);
  }

  // b = g (u_i - w_j): du_i and -dw_j are sums of dS g.
  void position_grads(BwdScratch<E>& w, BiasGrad<S>& bg, const S* ds, int64_t c0, int64_t c1, int64_t lanes, int64_t j0) const {
    alignas(64) S key[kChunk * L];
    for (int64_t x = 0; x < kChunk * L; ++x) key[x] = 0;
    for_lanes<S, 4>(lanes, [&](auto count, int64_t l0) {
      constexpr int G = decltype(count)::value;
      V gm[G], du[G];
      for (int g = 0; g < G; ++g) gm[g] = V::load(w.block->gm + l0 + g * L), du[g] = V(S(0));
      for (int64_t j = c0; j < c1; ++j) {
        V sum = V::load(key + (j - c0) * L);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
          const V x = V::load(ds + j * kPitch<S> + l0 + g * L) * gm[g];
          du[g] = du[g] + x;
          sum = sum + x;
        }
        sum.store(key + (j - c0) * L);
      }
      if (want_u)
        for (int g = 0; g < G; ++g) (V::load(w.du + l0 + g * L) + du[g]).store(w.du + l0 + g * L);
    });
    if (bg.w) add_sums(bg.w + j0 + c0, V(S(-1)), key, c1 - c0);
  }

  // y[r] += factor * the sum of row r, of n rows of a vector each in room for kChunk.
  static void add_sums(S* y, V factor, const S* rows, int64_t n) {
    for (int64_t r = 0; r < n; r += L) {
      V v[L];
#pragma GCC unroll 16
      for (int x = 0; x < L; ++x) v[x] = V::load(rows + (r + x) * L);
      sum_each(v);
      v[0] = v[0] * factor;
      if (r + L <= n) (V::load(y + r) + v[0]).store(y + r);
      else for (int64_t x = r; x < n; ++x) y[x] += v[0].v[x - r];
    }
  }

  // dT[t] += sum of dS along the diagonal I - j = t: vectors of neighbouring diagonals, rows of dS shifted by one each.
  void diagonals(S* table, const S* ds, int64_t c0, int64_t c1, int64_t lanes, int64_t I0, int64_t j0) const {
    constexpr int64_t P = kPitch<S>;
    S* out = table - table_span(p).lo + (I0 - j0);
    for (int64_t d0 = -(tiles::round_up(c1, L)); d0 < lanes - c0; d0 += L) {
      int64_t ja = -d0 - L + 1 > c0 ? -d0 - L + 1 : c0;
      int64_t jb = lanes - d0 < c1 ? lanes - d0 : c1;
      if (ja >= jb) continue;
      V acc(S(0)), acc2(S(0));
      int64_t j = ja;
      for (; j + 1 < jb; j += 2) {
        acc = acc + V::load(ds + j * P + d0 + j);
        acc2 = acc2 + V::load(ds + (j + 1) * P + d0 + j + 1);
      }
      if (j < jb) acc = acc + V::load(ds + j * P + d0 + j);
      (V::load(out + d0) + (acc + acc2)).store(out + d0);
    }
  }

  template <class Phi>
  void rel_grads(const TileBias<S>& t, BwdScratch<E>& w, BiasGrad<S>& bg, const S* prob, const S* ds, int64_t c0, int64_t c1, int64_t lanes, int64_t j0) {
    constexpr int64_t P = kPitch<S>;
    const BlockBias<S>& bb = *w.block;
    const V p0(t.p0), p1(t.p1);
    V a0(S(0)), a1(S(0));
    const bool positions = want_u || want_w;
    alignas(64) S key[kChunk * L];
    if (bg.w)
      for (int64_t x = 0; x < kChunk * L; ++x) key[x] = 0;
    for (int64_t l = 0; l < lanes; l += L) {
      const V uv = V::load(t.r + l), gm = V::load(bb.gm + l);
      V du(S(0)), dg(S(0)), sum_ds(S(0)), sum_p(S(0)), sum_p0(S(0)), sum_p1(S(0)), sum_phi(S(0));
      for (int64_t j = c0; j < c1; ++j) {
        const V d = V::load(ds + j * P + l);
        const V D = uv - V(t.y[j]);
        if (want_gamma) dg = fma(d, Phi::value(D, p0, p1), dg);
        const V dg_ = d * gm;
        if (want_params) {
          a0 = fma(dg_, Phi::d_p0(D, p0, p1), a0);
          a1 = fma(dg_, Phi::d_p1(D, p0, p1), a1);
        }
        if (settle) {
          const V pv = V::load(prob + j * P + l);
          sum_ds = sum_ds + d;
          sum_p = sum_p + pv;
          if (want_params) {
            sum_p0 = fma(pv, Phi::d_p0(D, p0, p1), sum_p0);
            sum_p1 = fma(pv, Phi::d_p1(D, p0, p1), sum_p1);
          }
          if (want_gamma) sum_phi = fma(pv, Phi::value(D, p0, p1), sum_phi);
        }
        if (positions) {
          const V x = dg_ * Phi::slope(D, p0, p1);
          du = du + x;
          if (bg.w) (V::load(key + (j - c0) * L) + x).store(key + (j - c0) * L);
        }
      }
      if (want_u) (V::load(w.du + l) + du).store(w.du + l);
      if (want_gamma) (V::load(w.dgamma + l) + dg).store(w.dgamma + l);
      if (settle) {
        (V::load(w.row_ds + l) + sum_ds).store(w.row_ds + l);
        (V::load(w.row_p + l) + sum_p).store(w.row_p + l);
        (V::load(w.row_p0 + l) + sum_p0).store(w.row_p0 + l);
        (V::load(w.row_p1 + l) + sum_p1).store(w.row_p1 + l);
        (V::load(w.row_phi + l) + sum_phi).store(w.row_phi + l);
      }
    }
    if (want_params) { bg.params[0] += reduce_add(a0); bg.params[1] += reduce_add(a1); }
    if (bg.w) add_sums(bg.w + j0 + c0, V(S(-1)), key, c1 - c0);
  }

  // In 16 bits O was formed from rounded P, so delta = <dO, O> misses sum_j P dP by rho_i, and a gradient that weighs dS
  // by distance amplifies the miss (4 times the error of eager torch was seen). The exact row sums are known now:
  //   rho_i = sum_j dS_ij + delta_i (sum_j P_ij - 1) - dlse_i,   dp -= g_i rho_i sum_j P_ij dphi/dp,   dg_i -= rho_i sum_j P_ij phi.
  void settle_rows(BwdScratch<E>& w, BiasGrad<S>& bg, int64_t b, int64_t h, int64_t i0, int64_t rows) const {
    const S* dlse = a.dlse ? static_cast<const S*>(a.dlse) + (b * p.H + h) * p.Nq + i0 : nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      if (w.lse[r] == kInf<S>) continue;
      const S rho = w.row_ds[r] + w.delta[r] * (w.row_p[r] - S(1)) - (dlse ? dlse[r] : S(0));
      if (want_params) {
        bg.params[0] -= w.block->gm[r] * rho * w.row_p0[r];
        bg.params[1] -= w.block->gm[r] * rho * w.row_p1[r];
      }
      if (want_gamma) w.dgamma[r] -= rho * w.row_phi[r];
    }
  }

  void store_task(int64_t task, int worker) {
    const int64_t w = task / call.nk_tiles, t = task % call.nk_tiles, bk = head0 + w, b = bk / p.Hk, hk = bk % p.Hk;
    const int64_t j0 = t * kBN<E>, j1 = j0 + kBN<E> < p.Nk ? j0 + kBN<E> : p.Nk;
    S* row = scratch(worker).rows;
    if (needs(need_v)) store_sums<E>(a.dv, p, dv + w * splits * p.Nk * dvp, splits, dvp, p.Dv, no_turn, b, hk, j0, j1, row);
    if (!needs(need_k)) return;
    const S* sums = dk + w * splits * copies * p.Nk * dp;
    if (copies == 1) return store_sums<E>(a.dk, p, sums, splits, dp, p.D, [&](int64_t j) { return key_rope<S>(p, 0, j); }, b, hk, j0, j1, row);
    // Every region's part is turned back by its own angles.
    S* part = row + p.D;
    for (int64_t j = j0; j < j1; ++j) {
      for (int x = copies - 1; x >= 0; --x) {
        sum_splits(part, sums + x * p.Nk * dp + j * dp, splits, copies * p.Nk * dp, p.D);
        turn_back(part, key_rope<S>(p, x, j), p.rope_pairs, p.rope_layout, b, hk, j);
        for (int64_t d = 0; d < p.D; ++d) row[d] = part[d] + (x == copies - 1 ? S(0) : row[d]);
      }
      store_row(row, a.dk, p.dtype, b, hk, j, p.D);
    }
  }

  // Adds private sums into the gradients' broadcast shapes, in index order.
  void reduce_bias() {
    const int64_t bh = p.B * p.H;
    const Bias& bi = p.bias;
    const auto clear = [](void* x, int64_t n) { std::memset(x, 0, size_t(n) * sizeof(S)); };
    const auto shape = [&](const Aux& x, int64_t n, int64_t& b, int64_t& h, int64_t& len) {
      b = x.sb ? p.B : 1;
      h = x.sh ? p.H : 1;
      len = n;
    };
    // Adds rows (bh, n) with `parts` parts each to (B|1, H|1, n or 1).
    const auto fold = [&](void* out, const Aux& like, const S* src, int64_t parts, int64_t n, bool one, int64_t of_heads = 1) {
      int64_t nb, nh, len;
      shape(like, one ? 1 : n, nb, nh, len);
      const int64_t H = p.H * of_heads;
      if (like.sh) nh = H;
      S* y = static_cast<S*>(out);
      for (int64_t b = 0; b < nb; ++b)
        for (int64_t h = 0; h < nh; ++h)
          for (int64_t x = 0; x < len; ++x) {
            double sum = 0;
            for (int64_t bb = b; bb < (nb == 1 ? p.B : b + 1); ++bb)
              for (int64_t hh = h; hh < (nh == 1 ? H : h + 1); ++hh)
                for (int64_t q = 0; q < parts; ++q) {
                  const S* r = src + ((bb * H + hh) * parts + q) * n;
                  if (one) for (int64_t i = 0; i < n; ++i) sum += double(r[i]);
                  else sum += double(r[x]);
                }
            y[(b * nh + h) * len + x] = S(sum);
          }
    };
    if (a.dparams) fold(a.dparams, bi.params, g_params, splits, 2, false);
    if (a.dgamma) fold(a.dgamma, bi.gamma, g_gamma, 1, p.Nq, bi.gamma.sn == 0);
    if (a.du) fold(a.du, bi.u, g_u, 1, p.Nq, false);
    if (a.drow_scale) fold(a.drow_scale, p.row_scale, g_rho, 1, p.Nq, p.row_scale.sn == 0);
    if (a.dw) {
      if (!bi.u)  // u_i is w at the query's index
        for (int64_t r = 0; r < planes() * bh; ++r)
          for (int64_t i = 0; i < p.Nq; ++i) g_w[r * splits * p.Nk + call.offset + i] += g_u[r * p.Nq + i];
      fold(a.dw, bi.w, g_w, splits, p.Nk, false, planes());
    }
    if (a.dfactor) fold(a.dfactor, bi.factor, g_factor, splits, bi.Sq * bi.Sk, false);
    if (a.dpairs) fold(a.dpairs, bi.pairs, g_pairs, splits, bi.Sq * bi.Sk, false);
    const auto entries = [&](void* out, const double* total, int64_t n) {
      for (int64_t x = 0; x < n; ++x) static_cast<S*>(out)[x] = S(total[x]);
    };
    if (a.drow_e) entries(a.drow_e, t_row_e, call.row_strip.heads(p) * bi.terms_len * bi.strip_d);
    if (a.dcol_e) entries(a.dcol_e, t_col_e, call.col_strip.heads(p) * bi.terms_len * bi.strip_d);
    if (a.dcols) fold(a.dcols, {nullptr, 1, 1, 1}, g_cols, splits, p.Nk * bi.terms_len, false);
    if (a.ddense && g_key) fold(a.ddense, bi.dense, g_key, splits, p.Nk, false);
    if (a.ddense && g_row) fold(a.ddense, bi.dense, g_row, 1, p.Nq, bi.dense.sn == 0);
    if (a.dpieces) {
      const int64_t n = bi.pieces_len, heads_out = bi.pieces.sh ? p.H : 1;
      S* y = static_cast<S*>(a.dpieces);
      clear(y, heads_out * n);  // where a piece begins has no gradient: the function is continuous there
      for (int64_t what = 0; what < 2; ++what)
        for (int64_t h = 0; h < heads_out; ++h)
          for (int64_t k = 0; k < n; ++k) {
            double sum = 0;
            for (int64_t b = 0; b < p.B; ++b)
              for (int64_t hh = h; hh < (heads_out == 1 ? p.H : h + 1); ++hh)
                for (int64_t q = 0; q < splits; ++q) sum += g_pieces[(((b * p.H + hh) * splits + q) * 2 + what) * n + k];
            y[((1 + what) * heads_out + h) * n + k] = S(sum);
          }
    }
    if (a.dtable && is_mapped(bi)) fold(a.dtable, bi.table, g_table, splits, bi.table_len, false);
    const auto fold_offsets = [&](void* out, const S* src, bool one_head) {
      const TableSpan sp = table_span(p);
      const int64_t heads_out = one_head ? 1 : p.H;
      clear(out, heads_out * bi.table_len);
      // Offsets clamped to one entry add up there; doubles hold the sum.
      for (int64_t h = 0; h < heads_out; ++h) {
        S* y = static_cast<S*>(out) + h * bi.table_len;
        double sum = 0;
        int64_t entry = -1;
        for (int64_t x = 0; x < sp.len; ++x) {
          const int64_t e = pos::table_index(bi.form, x + sp.lo, bi.table_len);
          if (e != entry) {
            if (entry >= 0) y[entry] = S(double(y[entry]) + sum);
            entry = e;
            sum = 0;
          }
          for (int64_t b = 0; b < p.B; ++b)
            for (int64_t hh = h; hh < (heads_out == 1 ? p.H : h + 1); ++hh)
              for (int64_t q = 0; q < splits; ++q) sum += double(src[((b * p.H + hh) * splits + q) * sp.len + x]);
        }
        if (entry >= 0) y[entry] = S(double(y[entry]) + sum);
      }
    };
    if (a.dtable && !is_mapped(bi)) fold_offsets(a.dtable, g_table, call.same_bias_heads);
    if (a.domega) fold_offsets(a.domega, g_omega, bi.omega.sh == 0);
  }
};

template <class E>
void backward(const AttnBwdParams& a, const Runtime& rt, TileStats* stats) {
  Backward<E>(a, rt, stats).run();
}

}  // namespace

void attn_bwd(const AttnBwdParams& a, const Runtime& rt, TileStats* stats) {
  if (a.fwd.dtype == DType::f64) return backward<OpF64>(a, rt, stats);
#if defined(__AVX512BF16__)
  if (a.fwd.dtype == DType::bf16 && !exact_rows(a.fwd)) return backward<OpBF16>(a, rt, stats);
#endif
  backward<OpF32>(a, rt, stats);
}

}  // namespace fastpe::cpu::FASTPE_ISA
