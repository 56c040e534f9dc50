// Attention of few queries: decoding, and lists of keys.
//
// Bound by reading K and V once, straight from where they are stored. All rows of a (batch, kv head), its group's heads
// times Nq, share each row read. Orientation: scores are [row][key], keys in lanes.
// Work: keys are cut into splits of tiles::decode_split, a function of shapes alone, so the result is the same for every
// thread count. One task per (split, batch, kv head), splits outermost: cos and sin of a split's keys then serve all heads
// from cache. A task walks its tiles of kKeys keys as they lie in memory
// (from the last to the first, which would let it leave out the values of a bias that fades, costs 1.15 times as much),
//   s[row][key] = <q, k>           several keys and rows at once, one vector sum for all of them
//   x, m, P = exp2(x - m), l       one online softmax a row
//   o[row][:] += P v
// and leaves (m, l, o) of every row; a second step joins the splits in their order.
#include "attn_common.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

constexpr int64_t kKeys = tiles::kDecodeKeys;
constexpr int64_t kChunk = 16;  // keys whose operands are prepared together
constexpr int64_t kChunks = kKeys / kChunk;
static_assert(kKeys == 64, "the keys a row sees in a tile are one 64-bit number");
// How far ahead rows are asked for. 1 KiB takes 1.06 times as long, 4 KiB the same (AMD Zen 3).
constexpr int64_t kAheadBytes = 2048;

// Bits [lo, hi) of a tile.
FASTPE_INLINE uint64_t range_bits(int64_t lo, int64_t hi) {
  lo = lo < 0 ? 0 : lo;
  hi = hi > kKeys ? kKeys : hi;
  return lo < hi ? (~uint64_t(0) >> (kKeys - (hi - lo))) << lo : 0;
}

// Lanes of the vector at l whose bit is set.
template <class S>
FASTPE_INLINE Mask<S> lane_mask(uint64_t bits, int64_t l) {
  using V = Vec<S>;
  using I = typename V::RawInt;
  using Int = std::conditional_t<sizeof(S) == 8, int64_t, int32_t>;
  I one;
  for (int x = 0; x < V::kLanes; ++x) one[x] = Int(1) << x;
  const I b = I{} + Int(uint32_t(bits >> l));
  return {(b & one) != 0};
}

// f(tag of the count, first row) over R rows in blocks of 4, 2 and 1 (no more than a vector has lanes).
template <int N> struct Rows { static constexpr int value = N; };
template <class S, class Fn>
FASTPE_INLINE void by_rows(int64_t R, Fn&& f) {
  constexpr int most = Vec<S>::kLanes < 4 ? 2 : 4;
  int64_t r = 0;
  for (; r + most <= R; r += most) f(Rows<most>{}, r);
  if constexpr (most > 2)
    if (r + 2 <= R) { f(Rows<2>{}, r); r += 2; }
  if (r < R) f(Rows<1>{}, r);
}

// What stands for a row that is not there: the widest row of zeros in any type.
alignas(64) constexpr char kNothing[256 * 8] = {};

// Vectors of operands in the piece of a row that is loaded at once. Where operands are float, a piece in bf16 holds two: the even
// numbers and the odd, one shift or mask each; numbers in a row would take a shuffle too.
template <class E, DType T>
constexpr int kPieceVecs = E::kPack == 1 && T == DType::bf16 ? 2 : 1;
template <class E, DType T>
constexpr int kPieceBytes = E::kPack == 1 && T == DType::f16 ? kVecBytes / 2 : kVecBytes;

// The piece of a row stored as T that starts at unit u.
template <class E, DType T>
FASTPE_INLINE void load_piece(const char* row, int64_t u, typename E::BVec* x) {
  if constexpr (kPieceVecs<E, T> == 2) load_bf16_even_odd(reinterpret_cast<const uint16_t*>(row) + u, x[0], x[1]);
  else if constexpr (E::kPack == 1 && T == DType::f16) x[0] = load_f16(reinterpret_cast<const uint16_t*>(row) + u);
  else x[0] = E::load_b(reinterpret_cast<const typename E::U*>(row) + u);
}

// Rows that will be wanted soon. The rows of a tile come as one stream (keys, values, keys of the next tile), and who reads row x
// asks for row x + distance: processors follow rows in order, but not the change from keys to values.
struct Ahead {
  const char* const* row = nullptr;  // null: nothing
  int64_t bytes = 0;                 // of a row
};

// Asks for `rows` rows from row x on, line after line in the order of memory, `Bytes` a step. (AMD Zen 3 drops what exceeds 24
// requests under way and then meets lines in the order of the products: reading 512 MiB takes 1.1 times as long where whole rows
// are asked for at once, and another 1.1 where a product goes through four rows side by side, not two.)
template <int Bytes>
struct Pace {
  const char* const* row;
  const char *at = nullptr, *end = nullptr;
  int64_t bytes, left;
  FASTPE_INLINE Pace(const Ahead& ahead, int64_t x, int64_t rows) : row(ahead.row + x), bytes(ahead.bytes), left(rows) {
    if (!ahead.row || left <= 0) return;
    at = *row;
    end = at + bytes;
  }
  FASTPE_INLINE void step() {
    if (!at) return;
#pragma GCC unroll 16
    for (int n = 0; n < Bytes; n += 64) {
      __builtin_prefetch(at, 0, 2);
      at += Bytes < 64 ? Bytes : 64;
      if (at >= end) {
        if (--left <= 0) { at = nullptr; return; }
        at = *++row;
        end = at + bytes;
      }
    }
  }
};

// Reads a word of every line of kKeys rows. Rows that lie anywhere come at the rate of the requests that are under way together:
// with nothing between these loads there are as many as the processor holds. The products, which load 6 times for every 8
// of their steps, reach two rows ahead, with prefetches too (random rows on AMD Zen 3 take 0.69 of their time so). A prefetch
// kBeyond rows further on beside every load takes another 4 % off: translations of addresses start earlier. The list of rows goes on
// so far.
constexpr int64_t kBeyond = 8;
template <int Lines>
FASTPE_INLINE void bring_lines(const char* const* row) {
  for (int64_t x = 0; x < kKeys; ++x)
#pragma GCC unroll 16
    for (int n = 0; n < Lines; ++n) {
      __builtin_prefetch(row[x + kBeyond] + n * 64);
      (void)static_cast<const volatile char*>(row[x])[n * 64];
    }
}
// The number of lines is known where it is usual: a loop over it takes 1.2 times as long.
inline void bring(const char* const* row, int64_t bytes) {
  switch (bytes) {
    case 128: return bring_lines<2>(row);
    case 256: return bring_lines<4>(row);
    case 512: return bring_lines<8>(row);
    case 1024: return bring_lines<16>(row);
  }
  for (int64_t x = 0; x < kKeys; ++x)
    for (int64_t e = 0; e < bytes; e += 64) {
      __builtin_prefetch(row[x + kBeyond] + e);
      (void)static_cast<const volatile char*>(row[x])[e];
    }
}

// x in a register. The compiler would load what two products use once for each.
template <class B>
FASTPE_INLINE B held(B x) {
#if defined(__AVX2__) && !defined(FASTPE_EMULATED_AVX512)
  asm("" : "+v"(x.v));
#endif
  return x;
}

// s[r][x] = <q[r], k[x]> for RB rows and the kChunk keys of a chunk, no more than two keys at a time.
template <class E, DType T, int RB>
FASTPE_INLINE void dots(const char* const* k, const typename E::U* q, int64_t units, typename E::S* s, int64_t pitch, const Ahead& ahead) {
  using S = typename E::S;
  using V = Vec<S>;
  constexpr int L = V::kLanes, KB = L / RB, KI = KB < 2 ? KB : 2, P = kPieceVecs<E, T>;
  for (int64_t x = 0; x < kChunk; x += KB) {
    V acc[L];
#pragma GCC unroll 8
    for (int y = 0; y < KB; y += KI) {
      Pace<KI * kPieceBytes<E, T>> pace(ahead, x + y, KI);
      const char* at[KI];
      for (int i = 0; i < KI; ++i) at[i] = k[x + y + i];
#pragma GCC unroll 4
      for (int r = 0; r < RB; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < KI; ++i) acc[r * KB + y + i] = V(S(0));
      for (int64_t u = 0; u < units; u += L * P) {
        typename E::BVec kv[KI][P];
#pragma GCC unroll 4
        for (int i = 0; i < KI; ++i) load_piece<E, T>(at[i], u, kv[i]);
        pace.step();
#pragma GCC unroll 2
        for (int e = 0; e < P; ++e)
#pragma GCC unroll 4
          for (int r = 0; r < RB; ++r) {
            const typename E::BVec qv = held(E::load_b(q + r * units + u + e * L));
#pragma GCC unroll 4
            for (int i = 0; i < KI; ++i) acc[r * KB + y + i] = E::mac(acc[r * KB + y + i], kv[i][e], qv);
          }
      }
    }
    alignas(64) S t[L];
    sum_each(acc);
    acc[0].store(t);
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) std::memcpy(s + r * pitch + x, t + r * KB, KB * sizeof(S));
  }
}

// o[r] += P v over the chunks of `live`, all channels of two units of keys at a time, so that a row of values is read whole.
// In bf16 two keys are interleaved in registers, which leaves the channels in the order of channel_of.
template <class E, DType T, int RB>
FASTPE_INLINE void weigh(const char* const* v, uint32_t live, int64_t units, const typename E::U* pt, typename E::S* o, int64_t pitch, const Ahead& ahead) {
  using S = typename E::S;
  using V = Vec<S>;
  constexpr int L = V::kLanes, G = 2, P = kPieceVecs<E, T>, kRows = G * E::kPack;
  constexpr int64_t pt_row = kKeys / E::kPack;
  for (int c = 0; c < kChunks; ++c) {
    if (!(live >> c & 1)) continue;
    for (int64_t x = c * kChunk; x < (c + 1) * kChunk; x += kRows) {
      Pace<kRows * kPieceBytes<E, T>> pace(ahead, x, kRows);
      const char* at[kRows];
      for (int g = 0; g < kRows; ++g) at[g] = v[x + g];
      typename E::BVec w[RB][G];
#pragma GCC unroll 4
      for (int r = 0; r < RB; ++r)
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) w[r][g] = E::bcast(pt + r * pt_row + x / E::kPack + g);
      if constexpr (E::kPack == 1) {
        for (int64_t u = 0; u < units; u += L * P) {
          typename E::BVec vv[G][P];
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) load_piece<E, T>(at[g], u, vv[g]);
          pace.step();
#pragma GCC unroll 4
          for (int r = 0; r < RB; ++r)
#pragma GCC unroll 2
            for (int e = 0; e < P; ++e) {
              S* to = o + r * pitch + u + e * L;
              V acc = V::load(to);
#pragma GCC unroll 4
              for (int g = 0; g < G; ++g) acc = E::mac(acc, w[r][g], vv[g][e]);
              acc.store(to);
            }
        }
      } else {
#if defined(__AVX512BF16__)
        for (int64_t u = 0; u < units; u += L) {
          typename E::BVec lo[G], hi[G];
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) {
            const __m512i a = E::load_b(reinterpret_cast<const typename E::U*>(at[2 * g]) + u).v, b = E::load_b(reinterpret_cast<const typename E::U*>(at[2 * g + 1]) + u).v;
            lo[g].v = _mm512_unpacklo_epi16(a, b);
            hi[g].v = _mm512_unpackhi_epi16(a, b);
          }
          pace.step();
#pragma GCC unroll 4
          for (int r = 0; r < RB; ++r) {
            S* to = o + r * pitch + 2 * u;
            V first = V::load(to), second = V::load(to + L);
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) {
              first = E::mac(first, lo[g], w[r][g]);
              second = E::mac(second, hi[g], w[r][g]);
            }
            first.store(to);
            second.store(to + L);
          }
        }
#endif
      }
    }
  }
}

// The channel that place x of an accumulator row holds where keys were interleaved: unpacklo and unpackhi work within 128 bits,
// 8 channels a lane, the first 4 of each to the first vector.
inline int64_t channel_of(int64_t x) {
  const int64_t block = x / 32 * 32, v = x % 32 / 16, l = x % 16;
  return block + l / 4 * 8 + v * 4 + l % 4;
}

template <class E>
struct Decode {
  using S = typename E::S;
  using U = typename E::U;
  using V = Vec<S>;
  static constexpr int L = V::kLanes;
  static constexpr int64_t kUnits = kKeys / E::kPack;

  const DecodeParams& d;
  const AttnParams& p;
  const Runtime& rt;
  TileStats* stats;
  // A unit is a set of rows that share their keys: all rows of a kv head, or the rows that share one list.
  const int64_t group, units_per_head, R, regions;
  const int64_t copies;  // of the keys, each turned for its region; 1: one serves all
  const int64_t keys, split, splits, k_units, v_units;
  const int64_t size;  // bytes of a stored number
  S *part_m = nullptr, *part_l = nullptr, *part_o = nullptr;  // (splits, B, Hk, units, R) and (.., Dv)
  Workers workers;

  Decode(const DecodeParams& params, const Runtime& runtime, TileStats* st)
      : d(params), p(params.attn), rt(runtime), stats(st),
        group(p.H / p.Hk),
        units_per_head(!d.list ? 1 : d.list_by_head ? p.Nq * group : p.Nq),
        R(!d.list ? p.Nq * group : d.list_by_head ? 1 : group),
        regions(pos::region_count(p.region.kind)),
        copies(d.more[0].p ? regions : 1),
        keys(d.list ? d.list_len : p.Nk),
        split(tiles::decode_split(R)),
        splits(tiles::ceil_div(keys, split)),
        k_units(tiles::round_up(p.D, L * E::kPack) / E::kPack),
        v_units(tiles::round_up(p.Dv, L * E::kPack) / E::kPack),
        size(p.dtype == DType::f64 ? 8 : p.dtype == DType::f32 ? 4 : 2) {}

  struct Scratch {
    U *q, *k, *v, *pt;
    S *row, *s, *other, *o, *bias, *mul, *y, *m, *l, *scale, *left;
    HeadBias<S>* heads;
    uint64_t *seen, *common;
    int32_t* list;
    // Where rows lie: those of a tile in the order of use (keys, values, keys of the next tile), the keys of every copy as
    // stored, what was made of them in k and v.
    const char **stream, **keys, **k_rows, **v_rows;
    void carve(Carver& c, const Decode& t) {
      const AttnParams& p = t.p;
      const int64_t wide = tiles::round_up(p.D > p.Dv ? p.D : p.Dv, 64);
      q = c.take<U>(t.regions * t.R * t.k_units);
      k = c.take<U>(kChunk * t.k_units);
      v = c.take<U>(kKeys * t.v_units);
      pt = c.take<U>(t.R * kUnits);
      row = c.take<S>(wide);
      s = c.take<S>(t.R * kKeys);
      other = c.take<S>(t.R * kKeys);
      o = c.take<S>(t.R * t.v_units * E::kPack);
      bias = c.take<S>(kKeys);
      mul = c.take<S>(kKeys);
      y = c.take<S>(kKeys);
      m = c.take<S>(t.R);
      l = c.take<S>(t.R);
      scale = c.take<S>(t.R);
      left = c.take<S>(t.R);
      heads = c.take<HeadBias<S>>(t.group);
      seen = c.take<uint64_t>(t.R);
      common = c.take<uint64_t>(p.Nq);
      list = c.take<int32_t>(kKeys);
      stream = c.take<const char*>(3 * kKeys);
      keys = c.take<const char*>(t.copies * kKeys);
      k_rows = c.take<const char*>(kChunk);
      v_rows = c.take<const char*>(kKeys);
    }
  };

  // One task's view of its rows and keys.
  struct Unit {
    int64_t b, hk, sub, nk, offset;  // nk: keys of this batch; offset = nk - Nq
    const int32_t *list, *turn;      // of this unit, null: keys in order
  };
  // A tile of keys: [j0, j0 + n), or list[0..n) with -1 for none.
  struct Tile {
    int64_t x0, j0, n;
    int64_t next;  // entries of the tile that comes after it in this split
    const int32_t* list;
    bool anywhere;  // a list, less than half of whose keys follow the one before
    int64_t key(int64_t x) const { return list ? list[x] : j0 + x; }
  };

  int64_t head_of(const Unit& u, int64_t r) const {
    return u.hk * group + (!d.list ? r / p.Nq : d.list_by_head ? u.sub / p.Nq : r);
  }
  int64_t query_of(const Unit& u, int64_t r) const { return !d.list ? r % p.Nq : u.sub % p.Nq; }

  void run() {
    workers.measure(bytes_of([&](Carver& c) { Scratch().carve(c, *this); }));
    const int64_t units = p.B * p.Hk * units_per_head;
    const auto layout = [&](Carver& c) {
      part_m = c.take<S>(splits * units * R);
      part_l = c.take<S>(splits * units * R);
      part_o = c.take<S>(splits * units * R * p.Dv);
      workers.carve(c, rt.threads);
    };
    const Memory memory(rt, layout);
    rt.parallel(splits * units, [](void* self, int64_t task, int worker) { static_cast<Decode*>(self)->split_task(task, worker); }, this);
    rt.parallel(p.B * p.H, [](void* self, int64_t task, int worker) { static_cast<Decode*>(self)->join_task(task, worker); }, this);
  }

  Scratch scratch(int worker) const {
    Scratch w;
    Carver c = workers.at(worker);
    w.carve(c, *this);
    return w;
  }

  Unit unit_of(int64_t x) const {
    Unit u;
    u.sub = x % units_per_head;
    u.hk = x / units_per_head % p.Hk;
    u.b = x / units_per_head / p.Hk;
    u.nk = d.lengths ? d.lengths[u.b] : p.Nk;
    u.offset = u.nk - p.Nq;
    u.list = u.turn = nullptr;
    if (d.list) {
      const int64_t h = d.list_by_head ? head_of(u, 0) : u.hk;
      const int64_t at = u.b * d.list_sb + h * d.list_sh + query_of(u, 0) * d.list_sn;
      u.list = d.list + at;
      if (d.turn) u.turn = d.turn + u.b * d.turn_sb + h * d.turn_sh + query_of(u, 0) * d.turn_sn;
    }
    return u;
  }

  // ---- a split ------------------------------------------------------------------------------------------------------

  void split_task(int64_t task, int worker) {
    const int64_t units = p.B * p.Hk * units_per_head;
    const Unit u = unit_of(task % units);
    const int64_t x0 = task / units * split;
    const int64_t have = d.list ? keys : u.nk;
    const int64_t x1 = x0 + split < have ? x0 + split : have;
    Scratch w = scratch(worker);
    bool started = false;
    int64_t visited = 0, hidden = 0;
    for (int64_t t = 0; t < tiles::ceil_div(x1 - x0, kKeys); ++t) {
      Tile tile;
      tile.x0 = tile.j0 = x0 + t * kKeys;
      tile.n = x1 - tile.x0 < kKeys ? x1 - tile.x0 : kKeys;
      tile.list = nullptr;
      tile.anywhere = false;
      tile.next = x1 - tile.x0 - tile.n < kKeys ? x1 - tile.x0 - tile.n : kKeys;
      if (u.list) {
        std::memcpy(w.list, u.list + tile.x0, size_t(tile.n) * sizeof(int32_t));
        tile.list = w.list;
        int64_t steps = 0;
        for (int64_t x = 1; x < tile.n; ++x) steps += w.list[x] == w.list[x - 1] + 1;
        tile.anywhere = 2 * steps < tile.n;
      }
      const uint64_t any = look(u, tile, w);
      if (!any) { ++hidden; continue; }
      for (int x = 0; x < int(copies); ++x) find_rows(key_view(x), u, tile.x0, tile.n, w.keys + x * kKeys);
      find_stream(u, tile, w);
      if (!started) start(u, w);
      started = true;
      ++visited;
      if (tile.anywhere) {
        bring(w.stream, p.D * size);
        bring(values_of(w), p.Dv * size);
      }
      scores(u, tile, any, w);
      soften(u, tile, w);
      values(u, tile, any, w);
    }
    leave(task, started, w);
    if (stats) {
      const int64_t heads = d.list_by_head ? 1 : group;
      stats->add(visited * heads, hidden * heads, 0);
      stats->block_q = d.list ? 1 : p.Nq;
      stats->block_k = kKeys;
    }
  }

  // Queries turned for every region, scales, empty state.
  void start(const Unit& u, Scratch& w) const {
    for (int64_t g = 0; g < group; ++g) w.heads[g].init(p, u.b, u.hk * group + g, nullptr, nullptr);
    const int64_t wide = k_units * E::kPack;
    for (int64_t r = 0; r < R; ++r) {
      const int64_t h = head_of(u, r), i = query_of(u, r);
      for (int64_t x = 0; x < regions; ++x) {
        load_turned(w.row, p.q, p.dtype, p.D, region_rope<S>(p.q_rope, int(x)), p.rope_pairs, p.rope_layout, u.b, h, i);
        for (int64_t c = p.D; c < wide; ++c) w.row[c] = 0;
        U* q = w.q + (x * R + r) * k_units;
        if (in_halves(p.D) && !p.k_rope.cos)
          for (int64_t c = 0; c < wide; ++c) q[c] = U(w.row[c / (2 * L) * (2 * L) + c % L * 2 + c / L % 2]);
        else
          pack_row<E>(q, w.row, wide);
      }
      const S* rho = at<S>(p.row_scale, u.b, h);
      w.scale[r] = S(p.scale) * (rho ? rho[i * p.row_scale.sn] : S(1)) * S(kLog2e);
      w.m[r] = -kInf<S>;
      w.l[r] = 0;
    }
    std::memset(w.o, 0, size_t(R * v_units * E::kPack) * sizeof(S));
    for (int64_t y = 0; y < kChunk; ++y) w.k_rows[y] = reinterpret_cast<const char*>(w.k + y * k_units);
  }

  // ---- visibility: one bit a key --------------------------------------------------------------------------------------

  template <class Fn>
  static FASTPE_INLINE uint64_t test(const Tile& t, uint64_t bits, Fn&& f) {
    uint64_t r = 0;
    if (!t.list) {
      for (int64_t x = 0; x < t.n; ++x) r |= uint64_t(f(t.j0 + x)) << x;
    } else {
      for (int64_t x = 0; x < t.n; ++x) r |= uint64_t(bits >> x & 1 && f(t.list[x])) << x;
    }
    return r & bits;
  }

  // What row i of any head sees.
  uint64_t common_bits(const Unit& u, const Tile& t, int64_t i) const {
    const Visibility& v = p.vis;
    const pos::Band band{v.left, v.right, v.sinks};
    const int64_t I = i + u.offset;
    uint64_t bits;
    if (t.list) {
      bits = 0;
      for (int64_t x = 0; x < t.n; ++x) bits |= uint64_t(t.list[x] >= 0 && pos::visible(band, I, t.list[x])) << x;
    } else {
      const pos::Range r = pos::window_of_rows(band, I, I + 1, u.nk);
      bits = range_bits(r.lo - t.j0, r.hi - t.j0);
      if (v.left > 0 && v.sinks > t.j0) {
        const int64_t end = v.right > 0 && I + v.right < v.sinks ? I + v.right : v.sinks;
        bits |= range_bits(0, end - t.j0);
      }
      bits &= range_bits(0, t.n);
    }
    if (!bits) return 0;
    if (v.k_ids) {
      const int32_t q = v.q_ids[u.b * v.q_ids_sb + i];
      const int32_t* k = v.k_ids + u.b * v.k_ids_sb;
      bits = test(t, bits, [&](int64_t j) { return k[j] == q && k[j] >= 0; });
    }
    if (v.lower) {
      const int64_t lo = v.lower[u.b * v.lower_sb + i];
      bits = t.list ? test(t, bits, [&](int64_t j) { return j >= lo; }) : bits & range_bits(lo - t.j0, kKeys);
    }
    if (v.intervals) {
      const int32_t* a = v.intervals + u.b * v.intervals_sb;
      const int64_t n = p.Nk;
      bits = test(t, bits, [&](int64_t j) { return (I >= a[j] && I < a[n + j]) || (I >= a[2 * n + j] && I < a[3 * n + j]); });
    }
    if (v.relation) {
      const uint8_t* row = v.relation + v.q_seg[u.b * v.q_seg_sb + i] * v.Sk;
      const int32_t* k = v.k_seg + u.b * v.k_seg_sb;
      bits = test(t, bits, [&](int64_t j) { return row[k[j]] != 0; });
    }
    return bits;
  }

  // Fills seen[] and returns the keys that some row sees.
  uint64_t look(const Unit& u, const Tile& t, Scratch& w) const {
    const Visibility& v = p.vis;
    const bool by_head = v.mask || v.map;
    uint64_t any = 0;
    if (!d.list)
      for (int64_t i = 0; i < p.Nq; ++i) any |= w.common[i] = common_bits(u, t, i);
    else
      any = w.common[query_of(u, 0)] = common_bits(u, t, query_of(u, 0));
    if (!any) return 0;
    if (by_head) any = 0;
    for (int64_t r = 0; r < R; ++r) {
      const int64_t i = query_of(u, r), h = head_of(u, r);
      uint64_t bits = w.common[i];
      if (bits && v.mask) {
        const uint8_t* m = v.mask + u.b * v.mask_sb + h * v.mask_sh + i * v.mask_sn;
        const int64_t step = v.mask_sk;
        bits = test(t, bits, [&](int64_t j) { return m[j * step] != 0; });
      }
      if (bits && v.map) {
        const uint8_t* m = v.map + u.b * v.map_sb + h * v.map_sh + i / v.block_q * v.map_sn;
        bits = test(t, bits, [&](int64_t j) { return m[j / v.block_k] != 0; });
      }
      w.seen[r] = bits;
      any |= bits;
    }
    return any;
  }

  // ---- keys and values where they lie ---------------------------------------------------------------------------------

  // (batch or page, row in it) of key j.
  struct Place {
    int64_t b, n;
  };
  Place place(const Unit& u, int64_t j) const {
    if (!d.pages) return {u.b, j};
    return {d.pages[u.b * d.pages_sb + j / d.page_size], j % d.page_size};
  }
  FASTPE_INLINE const char* row_at(const View& x, const Unit& u, int64_t j) const {
    const Place a = place(u, j);
    return static_cast<const char*>(x.p) + (a.b * x.sb + u.hk * x.sh + a.n * x.sn) * size;
  }
  // Keys as region x reads them.
  const View& key_view(int x) const { return x && copies > 1 ? d.more[x - 1] : p.k; }
  // The rows of a whole tile from entry x0 on, of which n exist.
  void find_rows(const View& x, const Unit& u, int64_t x0, int64_t n, const char** rows) const {
    if (u.list) {
      for (int64_t y = 0; y < n; ++y) rows[y] = u.list[x0 + y] < 0 ? kNothing : row_at(x, u, u.list[x0 + y]);
    } else {
      for (int64_t c = 0; c < n; c += kChunk) {  // a chunk never crosses a page
        const char* row = row_at(x, u, x0 + c);
        const int64_t step = x.sn * size, end = n - c < kChunk ? n - c : kChunk;
        for (int64_t y = 0; y < end; ++y) rows[c + y] = row + y * step;
      }
    }
    for (int64_t y = n; y < kKeys; ++y) rows[y] = kNothing;
  }

  // The rows that tile t reads first where a row has a copy a region, and how far ahead they are asked for.
  void find_stream(const Unit& u, const Tile& t, Scratch& w) const {
    const auto first = [&](int64_t j) { return copies > 1 ? pos::region_of(p.region, u.offset, j) : 0; };
    std::memcpy(w.stream, w.keys + first(t.j0) * kKeys, kKeys * sizeof(*w.stream));
    find_rows(p.v, u, t.x0, t.n, w.stream + kKeys);
    find_rows(key_view(first(t.j0 + kKeys)), u, t.x0 + kKeys, t.next, w.stream + 2 * kKeys);
  }
  const char* const* values_of(const Scratch& w) const { return w.stream + kKeys; }
  int64_t distance() const {
    const int64_t rows = kAheadBytes / (p.D * size);
    return rows < 2 ? 2 : rows > kKeys / 2 ? kKeys / 2 : rows;
  }
  // Rows of values that are asked for while P is formed, a line a step.
  int64_t more() const {
    const int64_t rows = R * (kKeys / L) * 64 / (p.Dv * size);
    return rows > kKeys / 2 ? kKeys / 2 : rows;
  }

  static constexpr DType kOwn = kOwnType<E>;
  // Whether rows of so many channels are used where they lie: they are operands already, or become so in registers
  // (for every four rows anew, hence a copy for more than eight).
  bool as_stored(int64_t channels) const {
    return channels % (L * E::kPack * (has_halves() ? 2 : 1)) == 0 && (p.dtype == kOwn || R <= 8);
  }
  // Whether such rows are loaded as their even and their odd channels.
  bool has_halves() const { return p.dtype == DType::bf16 && kOwn != DType::bf16; }
  bool in_halves(int64_t channels) const { return has_halves() && as_stored(channels); }
  // f(tag of the type that rows are stored in)
  template <DType T> struct Stored { static constexpr DType type = T; };
  template <class Fn>
  FASTPE_INLINE void as_type(DType t, Fn&& f) const {
    if constexpr (E::kPack == 1 && sizeof(S) == 4) {
      if (t == DType::bf16) return f(Stored<DType::bf16>{});
      if (t == DType::f16) return f(Stored<DType::f16>{});
    }
    f(Stored<kOwn>{});
  }

  // A chunk of rows, and how they are stored.
  struct Rows16 {
    const char* const* row;
    DType type;
  };
  // The keys [c, c + 16) of a tile, turned for region x.
  Rows16 keys_of(const Unit& u, const Tile& t, int64_t c, int x, Scratch& w) const {
    const char* const* stored = w.keys + (copies > 1 ? x : 0) * kKeys + c;
    if (!p.k_rope.cos && as_stored(p.D)) return {stored, p.dtype};
    if (turns_whole<E>(p, p.k_rope)) {
      with_elements<S>(p.dtype, [&]<class From>(From) { turn_chunk<From>(u, t, c, x, stored, w); });
      return {w.k_rows, kOwn};
    }
    const int64_t wide = k_units * E::kPack;
    for (int64_t y = 0; y < kChunk; ++y) {
      U* out = w.k + y * k_units;
      const int64_t j = c + y < t.n ? t.key(c + y) : -1;
      if (j < 0) {
        std::memset(out, 0, size_t(k_units) * sizeof(U));
        continue;
      }
      const View row{const_cast<char*>(stored[y]), 0, 0, 0};
      load_turned(w.row, row, p.dtype, p.D, key_rope<S>(p, x, j), p.rope_pairs, p.rope_layout, u.b, u.hk, turn_of(u, t, c + y, j));
      for (int64_t e = p.D; e < wide; ++e) w.row[e] = 0;
      pack_row<E>(out, w.row, wide);
    }
    return {w.k_rows, kOwn};
  }
  // The row of k_rope that turns entry x of a tile, key j.
  static int64_t turn_of(const Unit& u, const Tile& t, int64_t x, int64_t j) { return u.turn ? u.turn[t.x0 + x] : j; }

  // Chunk c of the tile turned by the table of region x. Rows that are not there are zeros, whichever way they turn.
  template <class From>
  void turn_chunk(const Unit& u, const Tile& t, int64_t c, int x, const char* const* rows, Scratch& w) const {
    const bool by_key = p.k_rope.sr && pos::region_by_key(p.region.kind);
    const Rope one = region_rope<S>(p.k_rope, by_key ? 0 : x), other = by_key ? region_rope<S>(p.k_rope, 1) : one;
    for (int64_t y = 0; y < kChunk; ++y) {
      const int64_t j = c + y < t.n && t.key(c + y) >= 0 ? t.key(c + y) : -1;
      const Rope& rope = by_key && j < p.region.size ? other : one;
      const int64_t n = j < 0 ? 0 : turn_of(u, t, c + y, j);
      turn_operand<E, From>(w.k + y * k_units, reinterpret_cast<const typename From::T*>(rows[y]), at<S>(rope.cos, u.b, u.hk, n), at<S>(rope.sin, u.b, u.hk, n), p.rope_pairs, p.D);
    }
  }

  // ---- scores -----------------------------------------------------------------------------------------------------------

  void scores(const Unit& u, const Tile& t, uint64_t any, Scratch& w) const {
    const bool turned_alike = copies == 1 && (!p.k_rope.sr || pos::region_by_key(p.region.kind));
    uint64_t holds[kMaxRegions] = {any, any, any};  // keys some row sees in the region
    for (int x = 0; regions > 1 && x < int(regions); ++x) {
      const pos::Range r = pos::keys_of_region(p.region, x, u.offset, u.offset + p.Nq, t.j0, t.j0 + t.n);
      holds[x] &= range_bits(r.lo - t.j0, r.hi - t.j0);
    }
    for (int64_t c = 0; c < t.n; c += kChunk) {
      if (!(any >> c & 0xffff)) continue;
      Ahead ahead;
      if (!t.anywhere) ahead = {w.stream + c + distance(), p.D * size};
      Rows16 k{};
      bool loaded = false, first = true;
      for (int x = 0; x < int(regions); ++x) {
        if (!(holds[x] >> c & 0xffff)) continue;
        if (!loaded || !turned_alike) k = keys_of(u, t, c, x, w);
        loaded = true;
        S* out = (first ? w.s : w.other) + c;
        as_type(k.type, [&](auto type) {
          by_rows<S>(R, [&](auto n, int64_t r) {
            dots<E, decltype(type)::type, decltype(n)::value>(k.row, w.q + (x * R + r) * k_units, k_units, out + r * kKeys, kKeys, r == 0 ? ahead : Ahead{});
          });
        });
        ahead = {};
        if (!first)
          for (int64_t r = 0; r < R; ++r) {
            const uint64_t own = region_bits(u, t, x, query_of(u, r)) >> c;
            for (int64_t y = 0; y < kChunk; y += L)
              select(lane_mask<S>(own, y), V::load(out + r * kKeys + y), V::load(w.s + r * kKeys + c + y)).store(w.s + r * kKeys + c + y);
          }
        first = false;
      }
    }
  }

  uint64_t region_bits(const Unit& u, const Tile& t, int x, int64_t i) const {
    const int64_t I = i + u.offset;
    const pos::Range r = pos::keys_of_region(p.region, x, I, I + 1, t.j0, t.j0 + t.n);
    return range_bits(r.lo - t.j0, r.hi - t.j0);
  }

  // T over the offsets of the tile's keys from row I.
  static void look_up(const S* table, BiasForm form, int64_t len, int64_t I, const Tile& t, S* out) {
    const auto index = [&](int64_t x) { return pos::table_index(form, I - t.key(x), len); };
    if (t.list) {
      for (int64_t x = 0; x < t.n; ++x) out[x] = t.list[x] < 0 ? S(0) : table[index(x)];
      return;
    }
    // The index moves by one with the key, between the clamps.
    const int64_t a = index(0), e = index(t.n - 1);
    if (a == e) for (int64_t x = 0; x < t.n; ++x) out[x] = table[a];
    else if (e - a == t.n - 1) std::memcpy(out, table + a, size_t(t.n) * sizeof(S));
    else if (a - e == t.n - 1) for (int64_t x = 0; x < t.n; ++x) out[x] = table[a - x];
    else for (int64_t x = 0; x < t.n; ++x) out[x] = table[index(x)];
  }

  // Positions of the keys relative to the tile's first, so that large prefixes cancel before any product (bias.md 5.1).
  struct Anchor {
    S w0 = 0;
    double base = 0;
  };
  Anchor place_keys(const HeadBias<S>& hb, const Tile& t, Scratch& w) const {
    Anchor a;
    int64_t first = 0;
    while (t.list && first < t.n - 1 && t.list[first] < 0) ++first;
    const int64_t j0 = t.list && t.list[first] < 0 ? 0 : t.key(first);
    if (!hb.w) {
      if (hb.u) a.w0 = S(j0);
      else a.base = double(j0);
      for (int64_t x = 0; x < t.n; ++x) w.y[x] = S(t.key(x) - j0);
      return a;
    }
    a.w0 = hb.w[j0];
    a.base = hb.base ? hb.base[j0 / kPrefixBlock] : 0;
    if (!t.list && t.next > 0)
      for (int64_t x = 0; x < t.next; x += 64 / int64_t(sizeof(S))) __builtin_prefetch(hb.w + t.j0 + kKeys + x, 0, 2);
    if (!t.list && t.n == kKeys)
      for (int64_t x = 0; x < kKeys; x += L) (V::load(hb.w + j0 + x) - V(a.w0)).store(w.y + x);
    else if (!t.list)
      for (int64_t x = 0; x < t.n; ++x) w.y[x] = hb.w[j0 + x] - a.w0;
    else
      for (int64_t x = 0; x < t.n; ++x) {
        const int64_t j = t.list[x] < 0 ? j0 : t.list[x];
        w.y[x] = S(hb.base ? hb.base[j / kPrefixBlock] - a.base : 0) + (hb.w[j] - a.w0);
      }
    return a;
  }

  // Everything added to the products of row r, in log2 units; false: nothing is. `a` and w.y are those of the row's head.
  bool bias_row(const Unit& u, const Tile& t, int64_t r, const HeadBias<S>& hb, Anchor a, Scratch& w) const {
    const Bias& bias = p.bias;
    const int64_t h = head_of(u, r), i = query_of(u, r), I = i + u.offset;
    bool have = false;
    if (pos::is_rel_fn(hb.form)) {
      const S g = (hb.gamma ? hb.gamma[i * hb.gamma_step] : S(1)) * S(kLog2e);
      S own;  // the row's position relative to the anchor
      if (hb.u) own = hb.w ? S(0 - a.base) + (hb.u[i] - a.w0) : hb.u[i] - a.w0;
      else if (hb.w) own = S((hb.base ? hb.base[I / kPrefixBlock] : 0) - a.base) + (hb.w[I] - a.w0);
      else own = S(double(I) - a.base);
      pos::with_form(hb.form, [&](auto phi) {
        for (int64_t x = 0; x < kKeys; x += L) (V(g) * phi.value(V(own) - V::load(w.y + x), V(hb.p0), V(hb.p1))).store(w.bias + x);
      });
      have = true;
    } else if (pos::is_table(hb.form)) {
      look_up(hb.raw_table, hb.form, bias.table_len, I, t, w.bias);
      for (int64_t x = 0; x < kKeys; x += L) (V::load(w.bias + x) * V(S(kLog2e))).store(w.bias + x);
      have = true;
    }
    const auto add = [&](auto value) {
      for (int64_t x = 0; x < t.n; ++x) {
        const int64_t j = t.key(x);
        const S e = j < 0 ? S(0) : value(j) * S(kLog2e);
        w.bias[x] = have ? w.bias[x] + e : e;
      }
      have = true;
    };
    if (bias.dense) {
      const S* e = at<S>(bias.dense, u.b, h, i);
      const int64_t step = bias.dense_sk;
      add([&](int64_t j) { return e[j * step]; });
    }
    if (bias.pairs) {
      const S* e = at<S>(bias.pairs, u.b, h, bias.q_seg[u.b * bias.q_seg_sb + i]);
      const int32_t* seg = bias.k_seg + u.b * bias.k_seg_sb;
      add([&](int64_t j) { return e[seg[j]]; });
    }
    return have;
  }

  // What multiplies the products of row r, in w.mul; false: nothing does.
  bool factor_row(const Unit& u, const Tile& t, int64_t r, Scratch& w) const {
    const Bias& bias = p.bias;
    if (!bias.omega && !bias.factor) return false;
    const int64_t h = head_of(u, r), i = query_of(u, r), I = i + u.offset;
    if (bias.omega) look_up(at<S>(bias.omega, 0, h), bias.form, bias.table_len, I, t, w.mul);
    if (bias.factor) {
      const S* e = at<S>(bias.factor, u.b, h, bias.q_seg[u.b * bias.q_seg_sb + i]);
      const int32_t* seg = bias.k_seg + u.b * bias.k_seg_sb;
      for (int64_t x = 0; x < t.n; ++x) {
        const int64_t j = t.key(x);
        const S f = j < 0 ? S(1) : e[seg[j]];
        w.mul[x] = bias.omega ? w.mul[x] * f : f;
      }
    }
    return true;
  }

  // Scores, running maximum, P and its sums.
  void soften(const Unit& u, const Tile& t, Scratch& w) const {
    Pace<64> pace(t.anywhere ? Ahead{} : Ahead{values_of(w) + distance(), p.Dv * size}, 0, more());
    const V cap_in(S(p.softcap > 0 ? kLn2 / p.softcap : 0)), cap_out(S(p.softcap_mul * kLog2e));
    const bool positions = pos::is_rel_fn(p.bias.form);
    Anchor anchor;
    int64_t placed = -1;
    for (int64_t r = 0; r < R; ++r) {
      S* s = w.s + r * kKeys;
      const int64_t g = head_of(u, r) - u.hk * group;
      const HeadBias<S>& hb = w.heads[g];
      // Heads that share their positions share w.y.
      if (positions && (placed < 0 || (g != placed && p.bias.w.sh != 0))) {
        anchor = place_keys(hb, t, w);
        placed = g;
      }
      const bool has_bias = bias_row(u, t, r, hb, anchor, w), has_factor = factor_row(u, t, r, w);
      const V c(w.scale[r]);
      const uint64_t seen = w.seen[r];
      V best(-kInf<S>);
      const bool plain = !has_bias && !has_factor && p.softcap <= 0 && seen == ~uint64_t(0);
      w.left[r] = plain ? w.scale[r] : S(1);
      if (plain)
        for (int64_t x = 0; x < kKeys; x += L) best = max(V::load(s + x) * c, best);
      else for (int64_t x = 0; x < kKeys; x += L) {
        V y = V::load(s + x) * c;
        if (has_factor) y = y * V::load(w.mul + x);
        if (p.softcap > 0 && !p.softcap_bias) y = cap_out * tanh(y * cap_in);
        if (has_bias) y = y + V::load(w.bias + x);
        if (p.softcap_bias) y = cap_out * tanh(y * cap_in);
        if (seen != ~uint64_t(0)) y = select(lane_mask<S>(seen, x), y, V(-kInf<S>));
        y.store(s + x);
        best = max(y, best);  // drops NaN, which reaches the sum through P
      }
      const S top = highest(best);
      w.l[r] = top > w.m[r] ? rescale(w, r, top) : w.l[r];
    }
    for (int64_t r = 0; r < R; ++r) {
      S* s = w.s + r * kKeys;
      const V c(w.left[r]), m(w.m[r] == -kInf<S> ? S(0) : -w.m[r]);
      V sum(S(0));
      for (int64_t x = 0; x < kKeys; x += L) {
        const V e = exp2(fma(V::load(s + x), c, m));
        pace.step();
        sum = sum + e;
        if constexpr (E::kPack == 1) e.store(w.pt + r * kUnits + x);
#if defined(__AVX512BF16__)
        else store_bf16(reinterpret_cast<uint16_t*>(w.pt + r * kUnits) + x, e);
#endif
      }
      w.l[r] += reduce_add(sum);
    }
  }

  static FASTPE_INLINE S highest(V x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(S) == 4) return _mm512_reduce_max_ps(__m512(x.v));
#endif
    return reduce_max(x);
  }
  // Raises m of row r; returns the row's sum against the new m.
  S rescale(Scratch& w, int64_t r, S top) const {
    const S old = w.m[r];
    w.m[r] = top;
    if (old == -kInf<S>) return w.l[r];  // nothing yet, or NaN
    const S a = exp2(V(old - top)).v[0];
    S* o = w.o + r * v_units * E::kPack;
    for (int64_t e = 0; e < v_units * E::kPack; e += L) (V::load(o + e) * V(a)).store(o + e);
    return w.l[r] * a;
  }

  void values(const Unit& u, const Tile& t, uint64_t any, Scratch& w) const {
    uint32_t live = 0;
    for (int c = 0; c < kChunks; ++c)
      if (any >> (c * kChunk) & 0xffff) live |= 1u << c;
    const int64_t wide = v_units * E::kPack;
    const bool stored = as_stored(p.Dv);
    if (!stored)
      for (int64_t y = 0; y < kKeys; ++y) {
        if (!(live >> (y / kChunk) & 1)) continue;
        U* out = w.v + y * v_units;
        w.v_rows[y] = reinterpret_cast<const char*>(out);
        load_row(w.row, View{const_cast<char*>(values_of(w)[y]), 0, 0, 0}, p.dtype, 0, 0, 0, p.Dv);
        for (int64_t e = p.Dv; e < wide; ++e) w.row[e] = 0;
        pack_row<E>(out, w.row, wide);
      }
    const char* const* v = stored ? values_of(w) : w.v_rows;
    const Ahead ahead = t.anywhere ? Ahead{} : Ahead{values_of(w) + distance() + more(), p.Dv * size};
    as_type(stored ? p.dtype : kOwn, [&](auto type) {
      by_rows<S>(R, [&](auto n, int64_t r) {
        weigh<E, decltype(type)::type, decltype(n)::value>(v, live, v_units, w.pt + r * kUnits, w.o + r * wide, wide, r == 0 ? ahead : Ahead{});
      });
    });
  }

  void leave(int64_t task, bool started, Scratch& w) const {
    for (int64_t r = 0; r < R; ++r) {
      const int64_t x = task * R + r;
      part_m[x] = started ? w.m[r] : -kInf<S>;
      part_l[x] = started ? w.l[r] : S(0);
      if (!started) continue;
      S* out = part_o + x * p.Dv;
      const S* o = w.o + r * v_units * E::kPack;
      if constexpr (E::kPack != 1) {
        for (int64_t e = 0; e < v_units * E::kPack; ++e)
          if (const int64_t c = channel_of(e); c < p.Dv) out[c] = o[e];
      } else if (in_halves(p.Dv)) {
        for (int64_t c = 0; c < p.Dv; c += 2 * L)
          for (int l = 0; l < L; ++l) {
            out[c + 2 * l] = o[c + l];
            out[c + 2 * l + 1] = o[c + L + l];
          }
      } else {
        std::memcpy(out, o, size_t(p.Dv) * sizeof(S));
      }
    }
  }

  // ---- joining the splits -------------------------------------------------------------------------------------------------

  void join_task(int64_t task, int worker) {
    Scratch w = scratch(worker);
    const int64_t b = task / p.H, h = task % p.H;
    for (int64_t i = 0; i < p.Nq; ++i) join(b, h, i, w);
  }

  // Place of a row's part of split 0, and the step from split to split.
  int64_t part_of(int64_t b, int64_t h, int64_t i) const {
    const int64_t hk = h / group, g = h % group;
    const int64_t sub = !d.list ? 0 : d.list_by_head ? g * p.Nq + i : i;
    const int64_t r = !d.list ? g * p.Nq + i : d.list_by_head ? 0 : g;
    return ((b * p.Hk + hk) * units_per_head + sub) * R + r;
  }

  void join(int64_t b, int64_t h, int64_t i, Scratch& w) const {
    const int64_t first = part_of(b, h, i), step = p.B * p.Hk * units_per_head * R;
    const S* sink = at<S>(p.sink, 0, h);
    double top = sink ? double(*sink) * kLog2e : -__builtin_inf();
    for (int64_t x = 0; x < splits; ++x) {
      const double m = double(part_m[first + x * step]);
      top = m > top ? m : top;
    }
    // A row that has seen nothing, or only NaN: any finite reference does.
    const double ref = top == -__builtin_inf() ? 0 : top;
    double total = sink ? __builtin_exp2(double(*sink) * kLog2e - ref) : 0;
    S* o = w.row;
    for (int64_t e = 0; e < p.Dv; ++e) o[e] = 0;
    for (int64_t x = 0; x < splits; ++x) {
      const int64_t at = first + x * step;
      if (part_l[at] == 0) continue;  // saw nothing; NaN keeps its way
      const double f = part_m[at] == -kInf<S> ? 1 : __builtin_exp2(double(part_m[at]) - ref);
      total += double(part_l[at]) * f;
      const S* po = part_o + at * p.Dv;
      for (int64_t e = 0; e < p.Dv; ++e) o[e] += S(f) * po[e];
    }
    const S inv = total == 0 ? S(0) : S(1 / total);
    for (int64_t e = 0; e < p.Dv; ++e) o[e] *= inv;
    static_cast<S*>(p.lse)[(b * p.H + h) * p.Nq + i] = total == 0 ? -kInf<S> : S((ref + __builtin_log2(total)) * kLn2);
    store_row(o, p.o, p.dtype, b, h, i, p.Dv);
    if (p.residual.p) {
      S* rounded = w.o;
      load_row(rounded, p.o, p.dtype, b, h, i, p.Dv);
      for (int64_t e = 0; e < p.Dv; ++e) o[e] -= rounded[e];
      store_row(o, p.residual, p.dtype, b, h, i, p.Dv);
    }
  }
};

template <class E>
void decode(const DecodeParams& p, const Runtime& rt, TileStats* stats) {
  Decode<E>(p, rt, stats).run();
}

}  // namespace

void attn_decode(const DecodeParams& p, const Runtime& rt, TileStats* stats) {
  if (p.attn.dtype == DType::f64) return decode<OpF64>(p, rt, stats);
#if defined(__AVX512BF16__)
  if (p.attn.dtype == DType::bf16 && !exact_rows(p.attn)) return decode<OpBF16>(p, rt, stats);
#endif
  decode<OpF32>(p, rt, stats);
}

}  // namespace fastpe::cpu::FASTPE_ISA
