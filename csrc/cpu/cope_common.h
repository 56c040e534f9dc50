// Contextual positions: what the forward and the backward pass share.
//
// A row counts gates from its last visible key to the first. Queries sit in lanes, so the count over the keys of a tile
// is a running vertical sum, and the count to the right of a tile is one number per lane, carried from tile to tile.
// A carry is a sum and its rounding error: counts stay exact to the last bit of their own size, and what backward
// recomputes from a saved carry is what forward had, to the bit.
#pragma once

#include "../pos/gate.h"
#include "attn_common.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

// Carries are kept per 64 keys for every type, so the bf16 kernels use tiles of 64 here.
#if defined(__AVX512BF16__)
struct CopeBF16 : OpBF16 {};
template <> constexpr int64_t kBN<CopeBF16> = kCopeBlockK;
#endif
static_assert(kBN<OpF32> == kCopeBlockK && kBN<OpF64> == kCopeBlockK);

// Products with a table go through its entries so many at a time: what all rows of a block read again stays in the L1.
constexpr int64_t kTableStep = 64;

// The table product is formed in the score type, whatever the storage type.
template <class S> using TableOp = std::conditional_t<sizeof(S) == 8, OpF64, OpF32>;

// ---- lanes ------------------------------------------------------------------------------------------------------------

template <class S> using LaneInt = typename Vec<S>::RawInt;

// x truncated; 0 <= x < 2^24.
template <class S> FASTPE_INLINE LaneInt<S> to_int(Vec<S> x) { return __builtin_convertvector(x.v, LaneInt<S>); }
template <class S> FASTPE_INLINE Vec<S> to_real(LaneInt<S> n) { return Vec<S>(__builtin_convertvector(n, typename Vec<S>::Raw)); }

// step, 2 step, ... by lane, from 0.
template <class S>
FASTPE_INLINE LaneInt<S> lane_steps(int64_t step) {
  LaneInt<S> r;
  for (int l = 0; l < Vec<S>::kLanes; ++l) r[l] = l * step;
  return r;
}

template <class S>
FASTPE_INLINE bool any_nonzero(LaneInt<S> x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#else
  bool r = false;
  for (int l = 0; l < Vec<S>::kLanes; ++l) r |= x[l] != 0;
  return r;
#endif
}

#if defined(__AVX2__) || defined(__AVX512F__)
// (z[i[0]], z[i[0] + 1], z[i[1]], z[i[1] + 1])
FASTPE_INLINE __m128 two_pairs(const float* z, const int32_t* i) {
  // The integer types may alias floats, double may not.
  const __m128 first = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(z + i[0])));
  return _mm_loadh_pi(first, reinterpret_cast<const __m64*>(z + i[1]));
}
#endif

// lo = z[at], hi = z[at + 1] for every lane. Neighbours come with one 64-bit load each; put together by hand they take two
// thirds of the time of the gather instruction on processors that run it as microcode.
FASTPE_INLINE void load_pairs(const float* z, LaneInt<float> at, VF& lo, VF& hi) {
#if defined(__AVX512F__)
  alignas(64) int32_t i[16];
  _mm512_store_si512(i, (__m512i)at);
  const auto quarter = [&](int l) {
    __m512 r = _mm512_castps128_ps512(two_pairs(z, i + l));
    r = _mm512_insertf32x4(r, two_pairs(z, i + l + 2), 1);
    return r;
  };
  const __m512 a = _mm512_insertf32x8(quarter(0), _mm512_castps512_ps256(quarter(4)), 1);
  const __m512 b = _mm512_insertf32x8(quarter(8), _mm512_castps512_ps256(quarter(12)), 1);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  lo = VF(VF::Raw(_mm512_permutex2var_ps(a, even, b)));
  hi = VF(VF::Raw(_mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b)));
#elif defined(__AVX2__)
  alignas(32) int32_t i[8];
  _mm256_store_si256((__m256i*)i, (__m256i)at);
  const __m256 a = _mm256_insertf128_ps(_mm256_castps128_ps256(two_pairs(z, i)), two_pairs(z, i + 4), 1);
  const __m256 b = _mm256_insertf128_ps(_mm256_castps128_ps256(two_pairs(z, i + 2)), two_pairs(z, i + 6), 1);
  lo = VF(VF::Raw(_mm256_shuffle_ps(a, b, 0x88)));
  hi = VF(VF::Raw(_mm256_shuffle_ps(a, b, 0xdd)));
#else
  for (int l = 0; l < VF::kLanes; ++l) {
    lo.v[l] = z[at[l]];
    hi.v[l] = z[at[l] + 1];
  }
#endif
}
FASTPE_INLINE void load_pairs(const double* z, LaneInt<double> at, VD& lo, VD& hi) {
  for (int l = 0; l < VD::kLanes; ++l) {
    lo.v[l] = z[at[l]];
    hi.v[l] = z[at[l] + 1];
  }
}

// z[at] = x in the lanes where m is set.
template <class S>
FASTPE_INLINE void store_lanes(S* z, LaneInt<S> at, LaneInt<S> m, Vec<S> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    _mm512_mask_i32scatter_ps(z, _mm512_test_epi32_mask((__m512i)m, (__m512i)m), (__m512i)at, __m512(x.v), 4);
    return;
  }
#endif
  for (int l = 0; l < Vec<S>::kLanes; ++l)
    if (m[l]) z[at[l]] = x.v[l];
}

// ---- gates ------------------------------------------------------------------------------------------------------------

// 1 / x for 1 <= x <= 2^126.
FASTPE_INLINE VD inverse(VD x) { return VD(1.0) / x; }
FASTPE_INLINE VF inverse(VF x) {
#if defined(__AVX512F__)
  // 14 bits and one Newton step: a division would cost a third of the whole gate.
  const VF r(VF::Raw(_mm512_rcp14_ps(__m512(x.v))));
  return fma(fma(-x, r, VF(1.f)), r, r);
#else
  return VF(1.f) / x;
#endif
}

// Of a logit x in units of ln 2. NaN stays NaN.
template <class S>
FASTPE_INLINE Vec<S> sigmoid2(Vec<S> x) {
  using V = Vec<S>;
  return inverse(V(S(1)) + exp2(min(V(S(125)), -x)));
}

FASTPE_INLINE VF log2_1p(VF t) { return pos::log2_1p(t); }
FASTPE_INLINE VD log2_1p(VD t) { return log1p(t) * VD(kLog2e); }

// log2 of sigmoid2(x).
template <class S>
FASTPE_INLINE Vec<S> log_sigmoid2(Vec<S> x) {
  using V = Vec<S>;
  const V size = abs(x);
  return min(V(S(0)), x) - log2_1p(exp2(-size));
}

// What one key adds to the count of a row: of a table's position, or of the bias itself (log2 units).
template <bool Table, class S>
FASTPE_INLINE Vec<S> gate_value(Vec<S> x) {
  if constexpr (Table) return sigmoid2(x);
  else return log_sigmoid2(x);
}

// Count of a block of rows.
template <class S>
struct Count64 {
  alignas(64) S sum[kBM];
  alignas(64) S rest[kBM];  // sum + rest is exact to the rounding of rest

  // Lanes past the last row start every tile at 0, so that no count passes those of the rows by more than a tile.
  void clear(int64_t first = 0) {
    for (int64_t l = first; l < kBM; ++l) sum[l] = rest[l] = 0;
  }
  // run: rest plus what a tile added. Two-sum: the new rest is the rounding error of the new sum.
  FASTPE_INLINE void add(int64_t l, Vec<S> run) {
    using V = Vec<S>;
    const V c = V::load(sum + l);
    const V s = c + run, b = s - c;
    s.store(sum + l);
    ((c - (s - b)) + (run - b)).store(rest + l);
  }
  bool reached(S top, int64_t rows) const {
    bool r = true;
    for (int64_t l = 0; l < rows; ++l) r &= sum[l] >= top;
    return r;
  }
  S largest() const {
    S m = 0;
    for (int64_t l = 0; l < kBM; ++l) m = sum[l] > m ? sum[l] : m;
    return m;
  }
};

// ---- the call -----------------------------------------------------------------------------------------------------------

// Keys of the separate gates, seen as the keys of an attention call of their own.
inline AttnParams gate_view(const CopeParams& c) {
  AttnParams g = c.attn;
  g.k = g.v = c.gate_k;
  g.D = g.Dv = c.G;
  g.k_rope = {};
  return g;
}

template <class E>
struct CopeCall {
  using S = typename E::S;
  using U = typename E::U;
  using V = Vec<S>;
  static constexpr int L = V::kLanes;

  const CopeParams& c;
  const AttnParams& p;
  AttnParams gate;
  Call<E> call;
  const bool table, own_gates;  // own_gates: the gate logits are not the scores' products
  const int64_t npos, ldz;      // ldz: pitch of a row of z, an odd number of cache lines, npos + 1 entries at least
  const S top;
  S* packed = nullptr;          // table * table_scale * log2 e, (D, ldz), zero past npos
  KVPack<E>*packs = nullptr, *gate_packs = nullptr;

  explicit CopeCall(const CopeParams& params)
      : c(params), p(params.attn), gate(gate_view(params)), call(params.attn), table(params.table), own_gates(params.gate_q.p || params.gate_k.p),
        npos(params.npos), ldz(table ? (tiles::ceil_div(params.npos + 1, 16) | 1) * 16 : 0), top(S(params.npos - 1)) {}

  void carve_packs(Carver& m, int64_t wave, bool backward) {
    packs = m.take<KVPack<E>>(wave);
    gate_packs = own_gates ? m.take<KVPack<E>>(wave) : nullptr;
    if (table) packed = m.take<S>(p.D * ldz);
    call.carve(m);
    for (int64_t i = 0; i < wave; ++i) {
      KVPack<E> k;
      k.carve(m, p, call.nk_tiles, backward, backward, !backward);
      if (m.base) packs[i] = k;
      if (own_gates) {
        KVPack<E> g;
        g.carve(m, gate, call.nk_tiles, false, backward, false);
        if (m.base) gate_packs[i] = g;
      }
      m.used = (m.used + 63) / 64 * 64;
    }
  }
  int64_t pack_bytes(bool backward) const {
    return bytes_of([&](Carver& m) {
      KVPack<E> k;
      k.carve(m, p, call.nk_tiles, backward, backward, !backward);
      if (own_gates) k.carve(m, gate, call.nk_tiles, false, backward, false);
    });
  }

  void prepare() {
    call.prepare();
    if (!table) return;
    const S* e = static_cast<const S*>(c.table);
    const S f = S(c.table_scale * kLog2e);
    for (int64_t d = 0; d < p.D; ++d)
      for (int64_t n = 0; n < ldz; ++n) packed[d * ldz + n] = n < npos ? e[d * npos + n] * f : S(0);
  }

  void pack(int64_t w, int64_t bk, int64_t t, S* rows) const {
    packs[w].pack(p, bk / p.Hk, bk % p.Hk, t, rows);
    if (own_gates) gate_packs[w].pack(gate, bk / p.Hk, bk % p.Hk, t, rows);
  }

  S* carry(int64_t b, int64_t h, int64_t qb, int64_t t) const {
    return c.carry ? static_cast<S*>(c.carry) + (((b * p.H + h) * call.nq_blocks + qb) * call.nk_tiles + t) * 2 * kBM : nullptr;
  }

  // Entries of z up to `reach` (exclusive) for all rows of a block; `done` of them are there. A row's count grows by at
  // most 1 per key, so the far end of a long table is often never needed.
  void fill_z(S* z, const S* q, int64_t lanes, int64_t& done, S reach) const {
    int64_t want = reach < top ? int64_t(reach) + 2 : npos + 1;
    want = tiles::round_up(want, 64);
    if (want > ldz) want = ldz;
    if (want <= done) return;
    for (; done < want; done += kTableStep) gemm<TableOp<S>, false>(q, p.D, packed + done, ldz, z + done, ldz, lanes, want - done < kTableStep ? want - done : kTableStep, p.D);
    done = want;
  }

  // Gate products to logits in units of ln 2.
  S gate_factor() const { return S(c.gate_scale * kLog2e); }

  // The scores (and gate products) of a tile.
  FASTPE_INLINE void products(const U* a, int64_t ku, const U* bt, S* out, int64_t j0, int64_t js, int64_t jm, int64_t je, int64_t lanes, const Upcoming& next = {}) const {
    constexpr int64_t half = kBM / 2;
    gemm<E, false>(a + (j0 + js) * ku, ku, bt, kBM, out + js * kBM, kBM, jm - js, lanes, ku, next);
    if (jm < je) gemm<E, false>(a + (j0 + jm) * ku, ku, bt + half, kBM, out + jm * kBM + half, kBM, je - jm, lanes - half, ku);
  }
};

// Lanes of key j whose gate counts: those that see it, for a bias without table only keys before the query.
template <bool Table, class S>
FASTPE_INLINE Mask<S> gate_lanes(const TileMask<S>& m, Mask<S> seen, int64_t j, int64_t l) {
  if constexpr (Table) return seen;
  else return seen & (Vec<S>::iota() > Vec<S>(S(m.j0 + j - m.I0 - l)));
}

// Calls f with true_type or false_type.
template <class Fn>
FASTPE_INLINE void with_bool(bool x, Fn&& f) {
  if (x) f(std::true_type{});
  else f(std::false_type{});
}

// Whether a tile needs its elements tested.
template <class S>
FASTPE_INLINE bool tests_elements(const TileMask<S>& m, bool table, int64_t je) {
  return m.partial() || (!table && m.j0 + je - 1 >= m.I0);
}

}  // namespace
}  // namespace fastpe::cpu::FASTPE_ISA
