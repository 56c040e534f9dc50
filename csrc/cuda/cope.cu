// Attention with contextual positions: turned queries and keys and the spans of ids first, then, for one wave of heads after the
// other, the products of the queries with the table and the kernels that read them.
#include "cope.h"

#include "host.h"
#include "launch.cuh"
#include "launch.h"
#include "sum.cuh"

namespace fastpe::cuda {
namespace {

// Bytes of table products, their gradients and carries that the heads of a wave may take; one (batch, kv head) is the least.
#if !defined(FASTPE_COPE_WAVE_BYTES)
#define FASTPE_COPE_WAVE_BYTES (int64_t(256) << 20)
#endif
constexpr int64_t kWaveBytes = FASTPE_COPE_WAVE_BYTES;

int64_t query_blocks(const AttnParams& p) { return tiles::ceil_div(p.Nq, tiles::kBlockQ); }
int64_t key_tiles(const AttnParams& p) { return tiles::ceil_div(p.Nk, kBlockN); }
int64_t row_pitch(const CopeParams& c) { return c.table ? c.npos + 1 : 0; }

// How many (batch, kv head) go together. Every query has `numbers` floats.
int64_t wave_of(const AttnParams& p, int64_t numbers) {
  const int64_t bytes = p.H / p.Hk * query_blocks(p) * tiles::kBlockQ * numbers * 4, all = p.B * p.Hk;
  const int64_t fit = bytes ? kWaveBytes / bytes : all;
  return fit < 1 ? 1 : fit < all ? fit : all;
}

// Turned queries and keys, and spans, as pieces of the workspace.
CopeArgs carve(const CopeParams& c, Carver& m) {
  const AttnParams& p = c.attn;
  CopeArgs g{};
  g.c = c;
  if (p.q_rope.cos.p) g.c.attn.q = dense(m.take<uint16_t>(p.B * p.H * p.Nq * p.D), p.H, p.Nq, p.D);
  if (p.k_rope.cos.p) g.c.attn.k = dense(m.take<uint16_t>(p.B * p.Hk * p.Nk * p.D), p.Hk, p.Nk, p.D);
  g.spans = carve_spans(p, m);
  g.ldz = row_pitch(c);
  g.unit = 1;
  return g;
}
// What they hold. c: the call as it came.
int prepare(const CopeParams& c, CopeArgs& g, void* stream) {
  const AttnParams& p = c.attn;
  int rc = 0;
  if (p.q_rope.cos.p) rc = rotate_to(p, p.q, g.c.attn.q, p.q_rope, p.H, p.Nq, stream);
  if (p.k_rope.cos.p && !rc) rc = prepare_keys(p, static_cast<uint16_t*>(g.c.attn.k.p), nullptr, stream);
  g.aligned_q = aligned(g.c.attn.q);
  g.aligned_k = aligned(g.c.attn.k);
  g.aligned_v = aligned(p.v);
  g.aligned_gate_q = aligned(c.gate_q);
  g.aligned_gate_k = aligned(c.gate_k);
  return rc ? rc : prepare_spans(p, g.spans, stream);
}

// z of a wave.
template <class T>
int table_products(const CopeArgs& g, void* stream) {
  if (!g.z) return 0;
  const AttnParams& p = g.c.attn;
  return launch(&cope_table_kernel<T>, "cope_table", g.heads * (p.H / p.Hk) * query_blocks(p) * tiles::ceil_div(g.ldz, 64), 128, 0, stream, g);
}

// Calls f with the wave's place set.
template <class F>
int for_waves(CopeArgs& g, int64_t wave, F&& f) {
  const int64_t all = g.c.attn.B * g.c.attn.Hk;
  for (g.first = 0; g.first < all; g.first += wave) {
    g.heads = all - g.first < wave ? all - g.first : wave;
    if (const int rc = f()) return rc;
  }
  return 0;
}

int64_t wave_rows(const AttnParams& p, int64_t wave) { return wave * (p.H / p.Hk) * query_blocks(p) * tiles::kBlockQ; }

// ---- forward ----------------------------------------------------------------------------------------------------------

template <class T>
int forward(CopeArgs& g, int64_t wave, void* stream) {
  const AttnParams& p = g.c.attn;
  return for_waves(g, wave, [&] {
    if (const int rc = table_products<T>(g, stream)) return rc;
    return launch_cope_fwd<T>(g, g.heads * (p.H / p.Hk) * query_blocks(p), stream);
  });
}

CopeArgs carve_fwd(const CopeParams& c, int64_t wave, Carver& m) {
  CopeArgs g = carve(c, m);
  if (c.table) g.z = m.take<float>(wave_rows(c.attn, wave) * g.ldz);
  return g;
}

// ---- backward ---------------------------------------------------------------------------------------------------------

bool needs(const CopeBwdParams& a, int64_t bits) { return (a.needs & bits) != 0; }
bool needs_dz(const CopeBwdParams& a) { return a.fwd.table && needs(a, cope_need_q | cope_need_table); }
// The gradient of the keys that gates come from: the gates' own, or the scores'.
bool needs_before(const CopeBwdParams& a) { return needs(a, a.fwd.gate_k.p ? cope_need_gate_k : cope_need_k); }

int64_t bwd_wave(const CopeBwdParams& a) {
  const CopeParams& c = a.fwd;
  return wave_of(c.attn, row_pitch(c) * (needs_dz(a) ? 2 : 1) + (needs_before(a) ? key_tiles(c.attn) : 0));
}
// Parts of the table's gradient.
int64_t table_parts(const AttnParams& p, int64_t wave) {
  const int64_t blocks = wave_rows(p, wave) / tiles::kBlockQ;
  return blocks < 64 ? blocks : 64;
}

struct Backward {
  CopeArgs g;
  float *delta_rows, *parts;
};

Backward carve_bwd(const CopeBwdParams& a, int64_t wave, Carver& m) {
  const CopeParams& c = a.fwd;
  const AttnParams& p = c.attn;
  Backward x{};
  x.g = carve(c, m);
  x.delta_rows = m.take<float>(p.B * p.H * p.Nq);
  const int64_t rows = wave_rows(p, wave);
  if (c.table) x.g.z = m.take<float>(rows * x.g.ldz);
  if (needs_dz(a)) x.g.dz = m.take<float>(rows * x.g.ldz);
  if (needs_before(a)) x.g.before = m.take<float>(rows * key_tiles(p));
  if (needs(a, cope_need_table)) x.parts = m.take<float>(table_parts(p, wave) * p.D * c.npos);
  return x;
}

template <class T>
int backward(const CopeBwdParams& a, Backward& x, int64_t wave, void* stream) {
  CopeArgs& g = x.g;
  const CopeParams& c = g.c;
  const AttnParams& p = c.attn;
  BwdArgs d{};
  d.a.fwd = p;
  d.a.d_o = a.d_o;
  d.a.dlse = a.dlse;
  d.delta = x.delta_rows;
  if (const int rc = launch(&delta_kernel<T>, "delta", tiles::ceil_div(p.B * p.H * p.Nq, 4), 128, 0, stream, d)) return rc;
  const int64_t parts = table_parts(p, wave);
  const int rc = for_waves(g, wave, [&] {
    int e = table_products<T>(g, stream);
    g.outputs = a.needs & (cope_need_q | cope_need_gate_q);
    if (!e && (g.outputs || g.before || g.dz)) e = launch_cope_bwd_q<T>(g, g.heads * (p.H / p.Hk) * query_blocks(p), stream);
    if (x.parts && !e) {
      const TableGradArgs t{g, x.parts, parts, g.first == 0};
      e = launch(&cope_table_grad_kernel<T>, "cope_table_grad", parts * tiles::ceil_div(p.D, 32) * tiles::ceil_div(c.npos, 64), 128, 0, stream, t);
    }
    g.outputs = a.needs & (cope_need_k | cope_need_v | cope_need_gate_k);
    return e ? e : launch_cope_bwd_kv<T>(g, g.heads * key_tiles(p), stream);
  });
  if (rc || !x.parts) return rc;
  const SumArgs s{x.parts, nullptr, static_cast<float*>(a.dtable), parts, 1, p.D, c.npos, 0, true, false, false};
  return launch(&sum_kernel, "sum", tiles::ceil_div(p.D * c.npos, 128), 128, 0, stream, s);
}

}  // namespace

size_t cope_fwd_workspace(const CopeParams& c) {
  Carver m{nullptr};
  carve_fwd(c, wave_of(c.attn, row_pitch(c)), m);
  return m.used;
}

int cope_fwd(const CopeParams& c, void* workspace, void* stream) {
  const int64_t wave = wave_of(c.attn, row_pitch(c));
  Carver m{static_cast<char*>(workspace)};
  CopeArgs g = carve_fwd(c, wave, m);
  if (const int rc = prepare(c, g, stream)) return rc;
  return c.attn.dtype == DType::bf16 ? forward<Bf16>(g, wave, stream) : forward<F16>(g, wave, stream);
}

size_t cope_bwd_workspace(const CopeBwdParams& a) {
  Carver m{nullptr};
  carve_bwd(a, bwd_wave(a), m);
  return m.used;
}

int cope_bwd(const CopeBwdParams& a, void* workspace, void* stream) {
  const int64_t wave = bwd_wave(a);
  Carver m{static_cast<char*>(workspace)};
  Backward x = carve_bwd(a, wave, m);
  CopeArgs& g = x.g;
  if (const int rc = prepare(a.fwd, g, stream)) return rc;
  g.d_o = a.d_o;
  g.aligned_do = aligned(a.d_o);
  g.delta = x.delta_rows;
  g.dq = a.dq, g.dk = a.dk, g.dv = a.dv, g.dgate_q = a.dgate_q, g.dgate_k = a.dgate_k;
  const double scale = a.fwd.attn.scale != 0 ? a.fwd.attn.scale : a.fwd.gate_scale;
  const double size = scale < 0 ? -scale : scale;
  // Extreme scales stay as they are.
  if (size > 1e-6 && size < 1e6) g.unit = float(__builtin_ldexp(1.0, -__builtin_ilogb(size)));
  return a.fwd.attn.dtype == DType::bf16 ? backward<Bf16>(a, x, wave, stream) : backward<F16>(a, x, wave, stream);
}

}  // namespace fastpe::cuda
