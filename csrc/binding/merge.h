// Merging partial attentions: the checks and allocations that the bindings of all devices share. `run` starts the work.
#pragma once

#include <tuple>
#include <vector>

#include "args.h"

namespace fastpe::binding {

using Parts = std::vector<Tensor>;

// The parts of a call; `p` points into it.
struct MergeArgs {
  std::vector<View> o;
  std::vector<Aux> lse;
  std::vector<double> factors;
  MergeParams p;
};

inline void read_merge(const char* op, const Parts& outs, const Parts& lses, const std::vector<double>& factors, MergeArgs& a) {
  const size_t P = outs.size();
  check(op, P >= 1, "outs must hold at least one part");
  check(op, lses.size() == P && factors.size() == P, "there are ", P, " outs, ", lses.size(), " lses and ", factors.size(), " factors");
  const Tensor& first = outs[0];
  const Call c{op, first};
  MergeParams& p = a.p;
  p.dtype = dtype_of(c, "outs", first);
  check(op, first.dim() == 4, "outs must have 4 axes (batch, head, token, channel), got ", shape_of(first));
  p.P = int64_t(P), p.B = first.size(0), p.H = first.size(1), p.N = first.size(2), p.Dv = first.size(3);
  for (size_t q = 0; q < P; ++q) {
    check_device(c, "outs", outs[q]);
    check_dtype(c, "outs", outs[q], first.scalar_type());
    check_shape(c, "outs", outs[q], {{p.B}, {p.H}, {p.N}, {p.Dv}});
    a.o.push_back(read_view(c, "outs", outs[q]));
    check_device(c, "lses", lses[q]);
    check_dtype(c, "lses", lses[q], aux_type(p.dtype));
    check_shape(c, "lses", lses[q], {{p.B}, {p.H}, {p.N}});
    a.lse.push_back({read_ptr(lses[q]), lses[q].stride(0), lses[q].stride(1), lses[q].stride(2)});
    check(op, factors[q] > 0 && factors[q] <= std::numeric_limits<double>::max(), "factors must be positive and finite, got ", factors[q]);
  }
  a.factors = factors;
  p.o = a.o.data();
  p.lse = a.lse.data();
  p.factor = a.factors.data();
}

template <class Run>
std::tuple<Tensor, Tensor> merge_fwd_on(const Parts& outs, const Parts& lses, const std::vector<double>& factors, Run&& run) {
  MergeArgs a;
  read_merge("merge_fwd", outs, lses, factors, a);
  MergeParams& p = a.p;
  Tensor out = empty_in_order(outs[0], p.B, p.H, p.N, p.Dv);
  Tensor lse = empty(outs[0], {p.B, p.H, p.N}, aux_type(p.dtype));
  if (lse.numel() > 0) {
    p.out = view(out, out.mutable_data_ptr());
    p.out_lse = lse.mutable_data_ptr();
    run(p);
  }
  return {out, lse};
}

// needs: 1 the gradients of outs, 2 those of lses.
template <class Run>
std::tuple<Parts, Tensor> merge_bwd_on(const OptTensor& dout, const OptTensor& dlse, const Parts& outs, const Parts& lses, const std::vector<double>& factors, int64_t needs, Run&& run) {
  const char* op = "merge_bwd";
  MergeArgs a;
  read_merge(op, outs, lses, factors, a);
  MergeParams& p = a.p;
  const Call c{op, outs[0]};
  const ScalarType type = outs[0].scalar_type(), aux = aux_type(p.dtype);
  MergeBwdParams b;
  b.fwd = p;
  OptTensor dout_c, dlse_c;
  if (dout) {
    check_device(c, "dout", *dout);
    check_dtype(c, "dout", *dout, type);
    check_shape(c, "dout", *dout, {{p.B}, {p.H}, {p.N}, {p.Dv}});
    dout_c = p.Dv <= 1 || dout->stride(3) == 1 ? *dout : torch::stable::contiguous(*dout);
    b.d_out = read_view(c, "dout", *dout_c);
  }
  if (dlse) {
    check_device(c, "dlse", *dlse);
    check_dtype(c, "dlse", *dlse, aux);
    check_shape(c, "dlse", *dlse, {{p.B}, {p.H}, {p.N}});
    dlse_c = torch::stable::contiguous(*dlse);
    b.d_lse = dlse_c->const_data_ptr();
  }
  Parts douts;
  std::vector<View> d_o;
  for (const Tensor& o : outs) {
    douts.push_back(needs & 1 ? empty_in_order(o, p.B, p.H, p.N, p.Dv) : none(o, type));
    if (needs & 1) d_o.push_back(view(douts.back(), douts.back().mutable_data_ptr()));
  }
  Tensor dlses = needs & 2 ? empty(outs[0], {p.P, p.B, p.H, p.N}, aux) : none(outs[0], aux);
  if (needs && p.B > 0 && p.H > 0 && p.N > 0) {
    if (needs & 1) b.d_o = d_o.data();
    if (needs & 2) b.d_lse_p = dlses.mutable_data_ptr();
    run(b);
  }
  return {douts, dlses};
}

}  // namespace fastpe::binding
