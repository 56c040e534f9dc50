// Forward attention: what runs before the kernel, and the choice of its instance.
#include "attn_fwd.h"
#include "host.h"
#include "launch.cuh"
#include "launch.h"
#include "prepare.cuh"

namespace fastpe::cuda {
namespace {

bool may_skip(const AttnParams& p) { return p.skip_eps > 0 && p.dtype != DType::f32 && p.region.kind == RegionKind::none && kind_of(p) != Kind::none && kind_of(p) != Kind::composed && !(p.softcap > 0); }

Prepared carve(const AttnParams& p, Carver& c) {
  const int64_t tiles = tiles::ceil_div(p.Nk, kBlockN);
  Prepared x;
  x.q = p.q;
  x.k = p.k;
  if (p.dtype == DType::f32 && p.q_rope.cos.p) {
    const int64_t one = p.B * p.H * p.Nq * p.D, regions = pos::region_count(p.region.kind);
    x.q = dense(c.take<float>(regions * one), p.H, p.Nq, p.D);
    x.q_copy = regions > 1 ? one : 0;
  }
  if (p.k_rope.cos.p) {
    const int64_t one = p.B * p.Hk * p.Nk * p.D;
    x.k = dense(c.take<char>(key_copies(p) * one * element_size(p)), p.Hk, p.Nk, p.D);
    x.k_copy = key_copies(p) > 1 ? one : 0;
  }
  x.spans = carve_spans(p, c);
  if (!may_skip(p)) return x;
  x.k_norm = c.take<float>(p.B * p.Hk * tiles);
  if (p.bias.w.p) {
    const int64_t nb = p.bias.w.sb ? p.B : 1, nh = p.bias.w.sh ? p.H : 1;
    x.w_span = c.take<float>(nb * nh * tiles * 2);
    x.w_sb = nb > 1 ? nh * tiles * 2 : 0;
    x.w_sh = nh > 1 ? tiles * 2 : 0;
  }
  if (p.bias.table.p) {
    const int64_t nh = p.bias.table.sh ? p.H : 1;
    x.env = c.take<float>(nh * p.bias.table_len);
    x.env_sh = nh > 1 ? p.bias.table_len : 0;
  }
  return x;
}

// Sums of the splits, then their maxima; null with one split.
float* carve_parts(const AttnParams& p, Carver& c) {
  const int64_t splits = fwd_splits(p);
  return splits > 1 ? c.take<float>(splits * p.B * p.H * p.Nq * (p.Dv + 2)) : nullptr;
}

int prepare(const AttnParams& p, const Prepared& x, void* stream) {
  const int64_t tiles = tiles::ceil_div(p.Nk, kBlockN);
  const bool rotate = p.k_rope.cos.p != nullptr;
  int rc = rotate || x.k_norm ? prepare_keys(p, rotate ? x.k.p : nullptr, x.k_norm, stream) : 0;
  if (!rc && p.dtype == DType::f32 && rotate) rc = prepare_queries(p, x.q, x.q_copy, stream);
  if (!rc) rc = prepare_spans(p, x.spans, stream);
  if (x.w_span && !rc) {
    const int64_t nb = p.bias.w.sb ? p.B : 1, nh = p.bias.w.sh ? p.H : 1, total = nb * nh * tiles;
    const SpanArgs a{p.bias.w.p, p.bias.w.sh, p.bias.w.sb, nh, p.Nk, tiles, total, x.w_span};
    rc = launch(&span_kernel<float>, "position_span", tiles::ceil_div(total, 4), 128, 0, stream, a);
  }
  if (x.env && !rc) {
    const EnvelopeArgs a{static_cast<const float*>(p.bias.table.p), p.bias.table.sh, p.bias.table_len, p.bias.form == BiasForm::table, x.env};
    rc = launch(&envelope_kernel, "envelope", p.bias.table.sh ? p.H : 1, 32, 0, stream, a);
  }
  return rc;
}

template <class T>
int dispatch(int head_dim, const FwdArgs& a, int64_t blocks, void* stream) {
  // float32 composes every score: one instance does for all biases.
  if constexpr (kIsF32<T>) return launch_attn_fwd<T, Kind::composed>(head_dim, a, blocks, stream);
  else switch (kind_of(a.p)) {
    case Kind::none: return launch_attn_fwd<T, Kind::none>(head_dim, a, blocks, stream);
    case Kind::rel: return launch_attn_fwd<T, Kind::rel>(head_dim, a, blocks, stream);
    case Kind::table: return launch_attn_fwd<T, Kind::table>(head_dim, a, blocks, stream);
    case Kind::composed: return launch_attn_fwd<T, Kind::composed>(head_dim, a, blocks, stream);
    default: return launch_attn_fwd<T, Kind::form>(head_dim, a, blocks, stream);
  }
}

}  // namespace

// Queries turned for every region.
int prepare_queries(const AttnParams& p, const View& q, int64_t copy, void* stream) {
  for (int x = 0; x < pos::region_count(p.region.kind); ++x) {
    View to = q;
    to.p = static_cast<char*>(q.p) + x * copy * element_size(p);
    Rope rope = p.q_rope;
    rope.cos.p = static_cast<float*>(rope.cos.p) + x * rope.sr;
    rope.sin.p = static_cast<float*>(rope.sin.p) + x * rope.sr;
    if (const int rc = rotate_to(p, p.q, to, rope, p.H, p.Nq, stream)) return rc;
  }
  return 0;
}

int prepare_keys(const AttnParams& p, void* rotated, float* k_norm, void* stream) {
  const KeysArgs a{p, rotated, k_norm, key_copies(p)};
  if (p.dtype == DType::f32) return launch(&keys_f32_kernel, "keys_f32", tiles::ceil_div(key_copies(p) * p.B * p.Hk * p.Nk * (p.D / 2), 128), 128, 0, stream, a);
  const int64_t blocks = (rotated ? key_copies(p) : 1) * p.B * p.Hk * tiles::ceil_div(p.Nk, kBlockN);
  if (p.dtype == DType::bf16) return launch(&keys_kernel<Bf16>, "keys", blocks, 128, 16, stream, a);
  return launch(&keys_kernel<F16>, "keys", blocks, 128, 16, stream, a);
}

int prepare_spans(const AttnParams& p, const Spans& s, void* stream) {
  int rc = 0;
  // Rows of one plane lie n apart.
  const auto span = [&](const int32_t* x, int64_t sb, int64_t planes, int64_t n, int32_t* out) {
    if (!out || rc) return;
    const int64_t blocks = tiles::ceil_div(n, kBlockN), total = (sb ? p.B : 1) * planes * blocks;
    const SpanArgs a{x, n, sb, planes, n, blocks, total, out};
    rc = launch(&span_kernel<int32_t>, "span", tiles::ceil_div(total, 4), 128, 0, stream, a);
  };
  span(p.vis.q_ids, p.vis.q_ids_sb, 1, p.Nq, s.q_id);
  span(p.vis.k_ids, p.vis.k_ids_sb, 1, p.Nk, s.k_id);
  span(p.vis.lower, p.vis.lower_sb, 1, p.Nq, s.lower);
  span(p.vis.intervals, p.vis.intervals_sb, 4, p.Nk, s.interval);
  return rc;
}

int64_t attn_fwd_blocks(const AttnParams& p) { return fwd_splits(p) * p.B * p.H * tiles::ceil_div(p.Nq, fwd_block_m(class_of(p))); }

size_t attn_fwd_workspace(const AttnParams& p) {
  Carver c{nullptr};
  carve(p, c);
  carve_parts(p, c);
  return c.used;
}

int attn_fwd(const AttnParams& p, void* workspace, void* stream, uint32_t* stats) {
  const int64_t blocks = attn_fwd_blocks(p);
  if (blocks == 0) return 0;
  Carver c{static_cast<char*>(workspace)};
  FwdArgs a;
  a.p = p;
  a.pre = carve(p, c);
  a.skip = may_skip(p) ? float(__builtin_log2(p.skip_eps) - __builtin_log2(double(p.Nk > 1 ? p.Nk : 1))) : -__builtin_inff();
  a.aligned_q = aligned(p.q);
  a.aligned_k = aligned(a.pre.k);
  a.aligned_v = aligned(p.v);
  a.stats = stats;
  a.splits = int(fwd_splits(p));
  a.part_o = carve_parts(p, c);
  a.part_ml = a.part_o ? a.part_o + a.splits * p.B * p.H * p.Nq * p.Dv : nullptr;
  if (const int rc = prepare(p, a.pre, stream)) return rc;
  return with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const int rc = dispatch<T>(class_of(p), a, blocks, stream);
    return rc || a.splits == 1 ? rc : launch(&attn_join_kernel<T>, "attn_join", tiles::ceil_div(p.B * p.H * p.Nq, 4), 128, 0, stream, a);
  });
}

}  // namespace fastpe::cuda
