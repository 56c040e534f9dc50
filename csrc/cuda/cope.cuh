// Contextual positions: what the forward and the backward kernels share.
//
// A row counts gates from its last visible key to the first (params.h: CopeParams). Tiles come from the diagonal to the
// first key; the count to the right of a tile is carried from tile to tile as a sum and its rounding error, and within a
// tile a row is summed along the four lanes of a quad. Rows of fragments are queries in every kernel, so that the backward
// pass, which starts from the saved carries, has the positions of the forward pass to the bit.
#pragma once

#include "../pos/gate.h"
#include "plan.h"
#include "visible_tile.cuh"

namespace fastpe::cuda {

static_assert(kBlockN == kCopeBlockK && tiles::kBlockQ == 64);

// Heads of a call are taken in waves, as many (batch, kv head) as keep the table products of a wave within a budget.
struct CopeArgs {
  CopeParams c;               // attn.q and attn.k turned
  Spans spans;
  bool aligned_q, aligned_k, aligned_v, aligned_gate_q, aligned_gate_k, aligned_do;
  int64_t first, heads;       // (batch, kv head): of the wave
  // z_i = table_scale log2 e q_i table of every query of the wave, 64 rows a block: (heads * group, blocks * 64, ldz), entry
  // npos 0. Null without a table.
  float* z;
  int64_t ldz;
  // Backward.
  View d_o, dq, dk, dv, dgate_q, dgate_k;
  const float* delta;         // (B,H,Nq)
  float* before;              // (heads * group, blocks, tiles, 64) what a row's keys left of a tile give its gates; may be null
  float* dz;                  // as z: gradient by q_i table times table_scale; may be null
  int64_t outputs;            // CopeNeeds of this launch: which gradients its accumulators hold
  // A power of two that brings the gradients of logits to the size of those of scores before they become 16 bits.
  float unit;
};

// Gate logits in units of ln 2. NaN stays NaN.
FASTPE_DEVICE float sigmoid2(float x) { return 1.f / (1.f + ex2_approx(min(125.f, -x))); }
FASTPE_DEVICE float log_sigmoid2(float x) { return min(0.f, x) - pos::log2_1p(ex2_approx(-abs(x))); }

// Numbers of a call as every thread has them.
struct CopeScales {
  bool table, own;            // own: the gates' logits are products of their own
  float gate, score, bias;    // gate logits and scores to log2 units; without a table, the count to the bias
  float gate_grad;            // from the gradient of a count to that of a gate's product
  float top;                  // last position of the table
  FASTPE_DEVICE explicit CopeScales(const CopeParams& c)
      : table(c.table), own(c.gate_k.p), gate(float(c.gate_scale) * float(kLog2e)), score(float(c.attn.scale) * float(kLog2e)), bias(float(c.table_scale)),
        gate_grad(float(c.gate_scale) * (c.table ? float(kLn2) : float(c.table_scale))), top(float(c.npos - 1)) {}
  // Of a product: what it adds to the count, and the derivative by the logit over what gate_grad has.
  FASTPE_DEVICE float value(float product) const { return table ? sigmoid2(product * gate) : log_sigmoid2(product * gate); }
  FASTPE_DEVICE float slope(float product) const {
    const float g = sigmoid2(table ? product * gate : -product * gate);
    return table ? g * (1.f - g) : g;
  }
};

// What a row has counted to the right of a tile; sum + rest is exact to the rounding of rest.
struct Count {
  float sum = 0, rest = 0;
  // run: rest plus what a tile added. Two-sum: the new rest is the rounding error of the new sum.
  FASTPE_DEVICE void add(float run) {
    const float s = sum + run, b = s - sum;
    rest = (sum - (s - b)) + (run - b);
    sum = s;
  }
};

constexpr int kCopeNt = kBlockN / 8;

// Counts of the keys of a row: at[n][e] of column 8 n + 2 t + e includes the key's own gate. gate(n, e) is the key's.
// Returns rest plus the gates of the whole tile, the same bits in the four lanes of the row.
template <class Gate>
FASTPE_DEVICE float count_row(float (&at)[kCopeNt][2], const Count& count, Gate&& gate) {
  const uint32_t t = lane_index() & 3;
  float run = count.rest;
  FASTPE_UNROLL
  for (int x = 0; x < kCopeNt; ++x) {
    const int n = kCopeNt - 1 - x;
    const float g0 = gate(n, 0), g1 = gate(n, 1), pair = g0 + g1;
    const float neighbour = shfl_xor(pair, 1), half = pair + neighbour, other = shfl_xor(half, 2);
    const float right = (t & 1 ? 0.f : neighbour) + (t & 2 ? 0.f : other);
    at[n][1] = count.sum + (run + (right + g1));
    at[n][0] = count.sum + (run + (right + pair));
    run += half + other;
  }
  return run;
}

// Sums from the first key of a tile: x[n][e] becomes before + everything up to and with itself, and before takes the tile.
FASTPE_DEVICE void prefix_row(float (&x)[kCopeNt][2], float& before) {
  const uint32_t t = lane_index() & 3;
  FASTPE_UNROLL
  for (int n = 0; n < kCopeNt; ++n) {
    const float pair = x[n][0] + x[n][1], neighbour = shfl_xor(pair, 1), half = pair + neighbour, other = shfl_xor(half, 2);
    const float left = (t & 1 ? neighbour : 0.f) + (t & 2 ? other : 0.f);
    x[n][0] = before + (left + x[n][0]);
    x[n][1] = before + (left + pair);
    before += half + other;
  }
}

// A place in a row of z.
struct Position {
  int n;
  float frac;  // share of entry n + 1
  FASTPE_DEVICE Position(float count, float top) {
    const float at = min(top, count);
    n = int(max(at, 0.f));
    frac = at - float(n);
  }
};

// What a lane sees of the rows of a tile, as visible_tile.cuh has it, and whose gates count there: without a table, those
// of keys before the query.
struct CopeTile {
  bool tested;
  uint64_t seen[2], counts[2];
  template <class RowOf>
  FASTPE_DEVICE CopeTile(const AttnParams& p, bool table, pos::Band band, int64_t b, int64_t h, int64_t I0, int rows, int64_t j0, int keys, RowOf&& row_of) {
    const bool data = has_data(p.vis);
    // Rows past the last one count nothing.
    tested = keys < kBlockN || rows < 64 || data || !pos::tile_full(band, I0, I0 + rows, j0, j0 + keys) || (!table && j0 + keys > I0);
    FASTPE_UNROLL
    for (int x = 0; x < 2; ++x) {
      seen[x] = counts[x] = ~uint64_t(0);
      if (!tested) continue;
      const int64_t i = row_of(x);
      seen[x] = i < p.Nq ? keys_seen(p, band, 0, false, data, b, h, i, j0) : 0;
      counts[x] = table ? seen[x] : seen[x] & (bits_between(0, i + p.Nk - p.Nq, j0) >> frag_col(0));
    }
  }
  FASTPE_DEVICE bool sees(int x, int n, int e) const { return !tested || (seen[x] >> (8 * n + e) & 1); }
  FASTPE_DEVICE bool gates(int x, int n, int e) const { return !tested || (counts[x] >> (8 * n + e) & 1); }
};

// The saved count of a row (0 to 63) of a block and tile.
FASTPE_DEVICE float* carry_at(const CopeParams& c, int64_t b, int64_t h, int64_t qb, int64_t t) {
  const AttnParams& p = c.attn;
  const int64_t blocks = tiles::ceil_div(p.Nq, tiles::kBlockQ), tiles = tiles::ceil_div(p.Nk, kBlockN);
  return static_cast<float*>(c.carry) + (((b * p.H + h) * blocks + qb) * tiles + t) * 2 * tiles::kBlockQ;
}

// ---- products with the table, in float32 -----------------------------------------------------------------------------------

// Eight channels of a row, from global memory.
FASTPE_DEVICE Quad read_chunk(const uint16_t* p, bool aligned) { return aligned ? *reinterpret_cast<const Quad*>(p) : load_chunk(p); }

// One block per (head of the wave, 64 queries, 64 entries of z): a thread has one entry of 32 queries, 16 at a time.
template <class T>
FASTPE_KERNEL(128, 1) cope_table_kernel(const FASTPE_GRID_CONSTANT CopeArgs g) {
  const CopeParams& c = g.c;
  const AttnParams& p = c.attn;
  const int64_t nqb = tiles::ceil_div(p.Nq, tiles::kBlockQ), parts = tiles::ceil_div(g.ldz, 64), group = p.H / p.Hk;
  const int64_t head = block_index() / (nqb * parts), qb = block_index() / parts % nqb, n = block_index() % parts * 64 + thread_index() % 64;
  const int64_t bk = g.first + head / group, b = bk / p.Hk, h = bk % p.Hk * group + head % group;
  if (n >= g.ldz) return;
  const float* table = static_cast<const float*>(c.table);
  const float factor = float(c.table_scale) * float(kLog2e);
  FASTPE_NO_UNROLL
  for (int half = 0; half < 2; ++half) {
    constexpr int kRows = 16;
    const int r0 = int(thread_index() / 64) * 32 + half * kRows;
    float sum[kRows] = {};
    FASTPE_NO_UNROLL
    for (int64_t chunk = 0; chunk < p.D / 8 && n < c.npos; ++chunk) {
      float e[8];
      FASTPE_UNROLL
      for (int x = 0; x < 8; ++x) e[x] = table[(8 * chunk + x) * c.npos + n];
      FASTPE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const int64_t i = qb * 64 + r0 + r;
        if (i >= p.Nq) continue;
        const Quad q = read_chunk(row_at(p.q, b, h, i) + 8 * chunk, g.aligned_q);
        FASTPE_UNROLL
        for (int x = 0; x < 4; ++x) sum[r] = fma(wide_high<T>(q.x[x]), e[2 * x + 1], fma(wide_low<T>(q.x[x]), e[2 * x], sum[r]));
      }
    }
    FASTPE_UNROLL
    for (int r = 0; r < kRows; ++r) g.z[((head * nqb + qb) * 64 + r0 + r) * g.ldz + n] = sum[r] * factor;
  }
}

struct TableGradArgs {
  CopeArgs g;
  float* parts;    // (parts, D, npos): added to unless `first`
  int64_t count;   // parts a wave's blocks of queries are cut into
  bool first;
};

// The table's gradient by parts, one block per (part, 32 channels, 64 entries): a thread has one entry of 16 channels.
template <class T>
FASTPE_KERNEL(128, 1) cope_table_grad_kernel(const FASTPE_GRID_CONSTANT TableGradArgs a) {
  const CopeArgs& g = a.g;
  const CopeParams& c = g.c;
  const AttnParams& p = c.attn;
  const int64_t nqb = tiles::ceil_div(p.Nq, tiles::kBlockQ), columns = tiles::ceil_div(c.npos, 64), channels = tiles::ceil_div(p.D, 32), group = p.H / p.Hk;
  const int64_t part = block_index() / (columns * channels), d0 = (block_index() / columns % channels * 2 + thread_index() / 64) * 16;
  const int64_t n = block_index() % columns * 64 + thread_index() % 64;
  if (n >= c.npos || d0 >= p.D) return;
  const int64_t blocks = g.heads * group * nqb, from = blocks * part / a.count, to = blocks * (part + 1) / a.count;
  const bool two = d0 + 8 < p.D;
  float sum[16] = {};
  FASTPE_NO_UNROLL
  for (int64_t block = from; block < to; ++block) {
    const int64_t head = block / nqb, i0 = block % nqb * 64, bk = g.first + head / group, b = bk / p.Hk, h = bk % p.Hk * group + head % group;
    const int rows = int(p.Nq - i0 < 64 ? p.Nq - i0 : 64);
    FASTPE_NO_UNROLL
    for (int r = 0; r < rows; ++r) {
      const float dz = g.dz[(block * 64 + r) * g.ldz + n];
      const uint16_t* row = row_at(p.q, b, h, i0 + r) + d0;
      FASTPE_UNROLL
      for (int x = 0; x < 2; ++x) {
        if (x == 1 && !two) continue;
        const Quad q = read_chunk(row + 8 * x, g.aligned_q);
        FASTPE_UNROLL
        for (int y = 0; y < 4; ++y) {
          sum[8 * x + 2 * y] = fma(wide_low<T>(q.x[y]), dz, sum[8 * x + 2 * y]);
          sum[8 * x + 2 * y + 1] = fma(wide_high<T>(q.x[y]), dz, sum[8 * x + 2 * y + 1]);
        }
      }
    }
  }
  FASTPE_UNROLL
  for (int x = 0; x < 16; ++x) {
    if (d0 + x >= p.D) continue;
    float& y = a.parts[(part * p.D + d0 + x) * c.npos + n];
    const float add = sum[x] * float(c.table_scale);
    y = a.first ? add : y + add;
  }
}

}  // namespace fastpe::cuda
