// What the host code of the attention kernels shares.
#pragma once

#include <cstddef>
#include <cstdint>

#include "launch.h"
#include "plan.h"
#include "tile.cuh"

namespace fastpe::cuda {

// Pieces of the workspace; a null base measures.
struct Carver {
  char* base;
  size_t used = 0;
  template <class X>
  X* take(int64_t n) {
    used = (used + 255) / 256 * 256;
    X* p = base ? reinterpret_cast<X*>(base + used) : nullptr;
    used += size_t(n) * sizeof(X);
    return p;
  }
};

// Every row starts at a multiple of 16 bytes.
inline bool aligned(const View& v) {
  return reinterpret_cast<uintptr_t>(v.p) % 16 == 0 && v.sb % 8 == 0 && v.sh % 8 == 0 && v.sn % 8 == 0;
}

inline int class_of(const AttnParams& p) { return head_dim_class(p.D > p.Dv ? p.D : p.Dv); }

inline int64_t element_size(const AttnParams& p) { return p.dtype == DType::f32 ? 4 : 2; }

// (B,H,N,D) dense, channels contiguous.
inline View dense(void* p, int64_t H, int64_t N, int64_t D) { return {p, H * N * D, N * D, D}; }

// (rows, n) int32 with `planes` rows a batch entry.
inline int32_t* carve_span(Carver& c, const int32_t* x, int64_t x_sb, int64_t B, int64_t planes, int64_t n, int64_t& sb) {
  if (!x) return nullptr;
  const int64_t pairs = planes * tiles::ceil_div(n, kBlockN) * 2;
  sb = x_sb && B > 1 ? pairs : 0;
  return c.take<int32_t>((x_sb ? B : 1) * pairs);
}
inline Spans carve_spans(const AttnParams& p, Carver& c) {
  Spans s;
  const Visibility& v = p.vis;
  s.q_id = carve_span(c, v.q_ids, v.q_ids_sb, p.B, 1, p.Nq, s.q_id_sb);
  s.k_id = carve_span(c, v.k_ids, v.k_ids_sb, p.B, 1, p.Nk, s.k_id_sb);
  s.lower = carve_span(c, v.lower, v.lower_sb, p.B, 1, p.Nq, s.lower_sb);
  s.interval = carve_span(c, v.intervals, v.intervals_sb, p.B, 4, p.Nk, s.interval_sb);
  return s;
}

// y = x rotated, for a tensor of H heads and N tokens.
inline int rotate_to(const AttnParams& p, const View& x, const View& y, const Rope& rope, int64_t H, int64_t N, void* stream) {
  RotateParams r;
  r.dtype = p.dtype;
  r.B = p.B, r.H = H, r.N = N, r.D = p.D, r.J = p.rope_pairs;
  r.x = x, r.y = y;
  r.rope = rope;
  r.layout = p.rope_layout;
  return rotate(r, stream);
}

// Calls f(T) for the type of a call.
template <class Fn>
int with_type(DType t, Fn&& f) {
  return t == DType::f32 ? f(F32{}) : t == DType::bf16 ? f(Bf16{}) : f(F16{});
}

// attn_fwd.cu. Rotated keys, every copy of them, and norms by tile (may be null).
int prepare_keys(const AttnParams& p, void* rotated, float* k_norm, void* stream);
int prepare_queries(const AttnParams& p, const View& q, int64_t copy, void* stream);
int prepare_spans(const AttnParams& p, const Spans& s, void* stream);

}  // namespace fastpe::cuda
