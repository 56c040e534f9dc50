// The operators' signatures. All are functional except those whose name ends in _; none takes a length, so dynamic shapes do not
// specialise. csrc/core/params.h says what the arguments mean.
#pragma once

#include "args.h"
#include "cope.h"

namespace fastpe::binding {

template <class Library>
void define_ops(Library& m) {
  m.def(
      "attn_fwd(Tensor q, Tensor k, Tensor v, " FASTPE_ATTN_ARGS
      ", bool keep_residual) -> (Tensor out, Tensor lse, Tensor residual)");
  m.def(
      "attn_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? residual, " FASTPE_ATTN_ARGS
      ", int needs) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dparams, "
      "Tensor dgamma, Tensor du, Tensor dw, Tensor dtable, Tensor drow_scale, Tensor dpieces, Tensor domega, Tensor drows, "
      "Tensor dcols, Tensor ddense, Tensor dfactor, Tensor dpairs, Tensor drow_q, "
      "Tensor drow_e, Tensor dcol_k, Tensor dcol_e)");
  m.def(
      "attn_decode(Tensor q, Tensor k, Tensor v, " FASTPE_ATTN_ARGS
      ", Tensor? pages, Tensor? lengths, Tensor? list, Tensor? turn, Tensor[] k_more) -> (Tensor out, Tensor lse)");
  m.def(
      "cope_fwd(Tensor q, Tensor k, Tensor v, " FASTPE_COPE_ARGS
      ", bool training) -> (Tensor out, Tensor lse, Tensor carry, Tensor residual)");
  m.def(
      "cope_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor carry, "
      "Tensor? residual, " FASTPE_COPE_ARGS
      ", int needs) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dgate_q, Tensor dgate_k, Tensor dtable)");
  m.def(
      "landmark_fwd(Tensor q, Tensor k, Tensor v, Tensor is_landmark, Tensor? visible, Tensor? q_rope, Tensor? k_rope, "
      "int rope_layout, float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "landmark_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor is_landmark, "
      "Tensor? visible, Tensor? q_rope, Tensor? k_rope, int rope_layout, float scale, int needs) -> "
      "(Tensor dq, Tensor dk, Tensor dv)");
  m.def("attn_mass(Tensor q, Tensor k, Tensor lse, Tensor? weights, " FASTPE_ATTN_ARGS ") -> Tensor");
  m.def("attn_rows(Tensor q, Tensor k, Tensor? lse, int rows, bool logits, " FASTPE_ATTN_ARGS ") -> Tensor");
  m.def("merge_fwd(Tensor[] outs, Tensor[] lses, float[] factors) -> (Tensor out, Tensor lse)");
  m.def(
      "merge_bwd(Tensor? dout, Tensor? dlse, Tensor[] outs, Tensor[] lses, float[] factors, int needs) -> "
      "(Tensor[] douts, Tensor dlses)");
  m.def("rope_table(Tensor positions, Tensor inv_freq, float amplitude, bool float32_product, bool out_f64) -> Tensor");
  m.def("rotate(Tensor x, Tensor table, int layout, bool inverse) -> Tensor");
  m.def("rotate_(Tensor(a!) x, Tensor table, int layout, bool inverse) -> ()");
  m.def("rotate_pair(Tensor q, Tensor k, Tensor q_table, Tensor k_table, int layout, bool inverse) -> (Tensor, Tensor)");
  m.def("rotate_pair_(Tensor(a!) q, Tensor(b!) k, Tensor q_table, Tensor k_table, int layout, bool inverse) -> ()");
  m.def("prefix_sum(Tensor x, bool reverse) -> (Tensor local, Tensor base)");
  m.def("cumsum_exact(Tensor x, bool reverse) -> Tensor");
}

}  // namespace fastpe::binding
