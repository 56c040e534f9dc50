// Attention of few queries: the choice of an instance, and the join of the splits.
#include "decode.h"
#include "host.h"
#include "launch.cuh"
#include "launch.h"
#include "sm80/attn_fwd.cuh"

namespace fastpe::cuda {
namespace {

template <class T>
int run(const DecodeArgs& a, void* stream) {
  const AttnParams& p = a.d.attn;
  const DecodeUnits u = decode_units(a.d);
  const int64_t blocks = a.splits * p.B * p.Hk * u.per_head * tiles::ceil_div(u.rows, kDecodeRows);
  if (const int rc = launch_attn_decode<T>(class_of(p), a, blocks, stream)) return rc;
  FwdArgs join{};
  join.p = p;
  join.splits = a.splits;
  join.part_o = a.part_o;
  join.part_ml = a.part_ml;
  return launch(&attn_join_kernel<T>, "attn_join", tiles::ceil_div(p.B * p.H * p.Nq, 4), 128, 0, stream, join);
}

}  // namespace

size_t attn_decode_workspace(const DecodeParams& d) {
  const AttnParams& p = d.attn;
  return size_t(decode_splits(d) * p.B * p.H * p.Nq * (p.Dv + 2)) * sizeof(float);
}

int attn_decode(const DecodeParams& d, int64_t page_count, int64_t turns, void* workspace, void* stream) {
  const AttnParams& p = d.attn;
  DecodeArgs a;
  a.d = d;
  a.page_count = page_count;
  a.turns = turns;
  a.splits = int(decode_splits(d));
  a.aligned_k = aligned(p.k);
  for (const View& v : d.more) a.aligned_k = a.aligned_k && (!v.p || aligned(v));
  a.aligned_v = aligned(p.v);
  a.part_o = static_cast<float*>(workspace);
  a.part_ml = a.part_o + a.splits * p.B * p.H * p.Nq * p.Dv;
  return p.dtype == DType::bf16 ? run<Bf16>(a, stream) : run<F16>(a, stream);
}

}  // namespace fastpe::cuda
