// Attention mass and rows of probabilities: the checks and allocations that the bindings of all devices share. `run` starts
// the work.
#pragma once

#include "args.h"

namespace fastpe::binding {

// Everything but the outputs. Values have no say, keys stand in for them.
inline MassParams read_mass(const char* op, const Tensor& q, const Tensor& k, const OptTensor& lse, FASTPE_ATTN_PARAMS) {
  const AttnArgs a{q, k, k, FASTPE_ATTN_VALUES};
  MassParams p;
  p.fwd = read_attn(op, a);
  if (lse) {
    const Call c{op, q};
    check_device(c, "lse", *lse);
    check_dtype(c, "lse", *lse, aux_type(p.fwd.dtype));
    check_shape(c, "lse", *lse, {{p.fwd.B}, {p.fwd.H}, {p.fwd.Nq}});
    check(op, lse->is_contiguous(), "lse must be contiguous");
    p.fwd.lse = read_ptr(*lse);
  }
  return p;
}

template <class Run>
Tensor attn_mass_on(const Tensor& q, const Tensor& k, const Tensor& lse, const OptTensor& weights, FASTPE_ATTN_PARAMS, Run&& run) {
  const char* op = "attn_mass";
  MassParams p = read_mass(op, q, k, lse, FASTPE_ATTN_VALUES);
  const AttnParams& f = p.fwd;
  p.weights = read_aux({op, q}, "weights", weights, aux_type(f.dtype), {broadcast(f.B), broadcast(f.H), {f.Nq}});
  Tensor mass = empty(q, {f.B, f.H, f.Nk}, aux_type(f.dtype));
  if (mass.numel() > 0 && f.Nq > 0) {
    p.mass = mass.mutable_data_ptr();
    run(p);
  } else {
    torch::stable::zero_(mass);
  }
  return mass;
}

template <class Run>
Tensor attn_rows_on(const Tensor& q, const Tensor& k, const OptTensor& lse, int64_t rows, bool logits, FASTPE_ATTN_PARAMS, Run&& run) {
  const char* op = "attn_rows";
  MassParams p = read_mass(op, q, k, lse, FASTPE_ATTN_VALUES);
  const AttnParams& f = p.fwd;
  check(op, rows >= 0 && rows <= f.Nq, "rows must lie in [0, ", f.Nq, "], got ", rows);
  check(op, logits || lse.has_value(), "lse is missing");
  Tensor out = empty(q, {f.B, f.H, rows, f.Nk}, aux_type(f.dtype));
  if (out.numel() > 0) {
    p.rows_out = out.mutable_data_ptr();
    p.rows = rows;
    p.logits = logits;
    run(p);
  }
  return out;
}

}  // namespace fastpe::binding
