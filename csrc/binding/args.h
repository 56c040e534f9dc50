// Tensors of a call, checked and turned into the structs of core/params.h. Shared by the bindings of all devices.
//
// These checks are the last line of defence: a call that passes them touches no memory outside its tensors. The Python
// layer checks first, in the user's words.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "core/params.h"
#include "pos/bias.h"
#include "pos/region.h"

namespace fastpe::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

// ---- messages ---------------------------------------------------------------------------------------------------

template <class... A>
[[noreturn]] void fail(const char* op, const A&... parts) {
  std::ostringstream s;
  s << "fastpe." << op << ": ";
  (s << ... << parts);
  throw std::runtime_error(s.str());
}

// check(op, condition, message parts...); the message is built only when the condition fails.
template <class... A>
void check(const char* op, bool ok, const A&... parts) {
  if (!ok) [[unlikely]] fail(op, parts...);
}

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline std::string shape_of(const Tensor& t) {
  std::string s = "(";
  for (int64_t d = 0; d < t.dim(); ++d) s += (d ? ", " : "") + std::to_string(t.size(d));
  return s + (t.dim() == 1 ? ",)" : ")");
}

// ---- single tensors ---------------------------------------------------------------------------------------------

// One axis of an expected shape: a length, or 1, which broadcasts.
struct Axis {
  int64_t size;
  bool may_be_one = false;
};
inline Axis broadcast(int64_t n) { return {n, true}; }

inline std::string wanted(std::initializer_list<Axis> axes) {
  std::string s = "(";
  bool first = true;
  for (const Axis& a : axes) {
    s += (first ? "" : ", ") + std::to_string(a.size) + (a.may_be_one && a.size != 1 ? " or 1" : "");
    first = false;
  }
  return s + (axes.size() == 1 ? ",)" : ")");
}

struct Call {
  const char* op;
  const Tensor& lead;  // the tensor whose device the others share
};

inline void check_device(const Call& c, const char* name, const Tensor& t) {
  check(c.op, t.device() == c.lead.device(), name, " is on another device than the first tensor of the call");
}
inline void check_dtype(const Call& c, const char* name, const Tensor& t, ScalarType want) {
  check(c.op, t.scalar_type() == want, name, " must be ", dtype_name(want), ", got ", dtype_name(t.scalar_type()));
}
inline void check_shape(const Call& c, const char* name, const Tensor& t, std::initializer_list<Axis> axes) {
  bool ok = t.dim() == int64_t(axes.size());
  int64_t d = 0;
  if (ok)
    for (const Axis& a : axes) {
      const int64_t n = t.size(d++);
      ok = ok && (n == a.size || (a.may_be_one && n == 1));
    }
  if (!ok) [[unlikely]] fail(c.op, name, " must be of shape ", wanted(axes), ", got ", shape_of(t));
}
inline void check_last_contiguous(const Call& c, const char* name, const Tensor& t) {
  const int64_t d = t.dim() - 1;
  check(c.op, t.size(d) <= 1 || t.stride(d) == 1 || t.numel() == 0, name, " must be contiguous in its last dimension, got stride ", t.stride(d));
}

inline void* read_ptr(const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); }
// A stride that steps through an axis of length 1 is 0, so the axis broadcasts.
inline int64_t step(const Tensor& t, int64_t d) { return t.size(d) == 1 ? 0 : t.stride(d); }
inline void* offset(void* p, int64_t elements, const Tensor& t) { return static_cast<char*>(p) + elements * int64_t(t.element_size()); }

inline DType dtype_of(const Call& c, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Double: return DType::f64;
    default: fail(c.op, name, " must be float32, bfloat16, float16 or float64, got ", dtype_name(t.scalar_type()));
  }
}
// The type of everything that is not q, k, v or their like.
inline ScalarType aux_type(DType t) { return t == DType::f64 ? ScalarType::Double : ScalarType::Float; }

// (B,H,N,D) with contiguous channels. `p` is what the caller may write to or only read.
inline View view(const Tensor& t, void* p) { return {p, t.stride(0), t.stride(1), t.stride(2)}; }
inline View read_view(const Call& c, const char* name, const Tensor& t) {
  check_last_contiguous(c, name, t);
  return view(t, read_ptr(t));
}

// An aux array of (B|1, H|1, ...): the strides of its first three axes.
inline Aux read_aux(const Call& c, const char* name, const OptTensor& t, ScalarType type, std::initializer_list<Axis> axes, bool last_contiguous = true) {
  if (!t) return {};
  check_device(c, name, *t);
  check_dtype(c, name, *t, type);
  check_shape(c, name, *t, axes);
  if (last_contiguous) check_last_contiguous(c, name, *t);
  return {read_ptr(*t), step(*t, 0), step(*t, 1), step(*t, 2)};
}

// A table (2, B|1, H|1, N, J) of cos and sin; with regions those of one after the other, (2 R, ...).
inline Rope read_rope(const Call& c, const char* name, const Tensor& t, ScalarType type, int64_t B, int64_t H, int64_t N, int64_t regions = 1) {
  check_device(c, name, t);
  check_dtype(c, name, t, type);
  check(c.op, t.dim() == 5, name, " must be of shape (", 2 * regions, ", B or 1, H or 1, N, J), got ", shape_of(t));
  check_shape(c, name, t, {{2 * regions}, broadcast(B), broadcast(H), {N}, {t.size(4)}});
  check_last_contiguous(c, name, t);
  const Aux cos{read_ptr(t), step(t, 1), step(t, 2), t.stride(3)};
  Aux sin = cos;
  sin.p = offset(cos.p, t.stride(0), t);
  return {cos, sin, regions > 1 ? 2 * t.stride(0) : 0};
}

// ---- new tensors ------------------------------------------------------------------------------------------------

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), type);
}
inline Tensor none(const Tensor& like, ScalarType type) { return empty(like, {0}, type); }

// (B,H,N,D) stored in `like`'s order of heads and tokens.
inline Tensor empty_in_order(const Tensor& like, int64_t B, int64_t H, int64_t N, int64_t D) {
  if (like.stride(1) < like.stride(2)) return torch::stable::transpose(empty(like, {B, N, H, D}, like.scalar_type()), 1, 2);
  return empty(like, {B, H, N, D}, like.scalar_type());
}
// Contiguous, with t's shape.
inline Tensor empty_contiguous(const Tensor& t) { return torch::stable::new_empty(t, t.sizes(), t.scalar_type()); }

// ---- attention --------------------------------------------------------------------------------------------------

struct AttnArgs {
  Tensor q, k, v;
  OptTensor q_rope, k_rope;
  int64_t rope_layout, bias_form;
  OptTensor bias_params, bias_gamma, bias_u, bias_w, bias_base, bias_table;
  int64_t left, right, sinks;
  OptTensor q_ids, k_ids, mask, row_scale, sink;
  double scale, softcap, softcap_mul, skip_eps;
  OptTensor bias_pieces, bias_omega, bias_rows, bias_cols, bias_index, bias_dense;
  bool softcap_bias;
  OptTensor bias_factor, bias_pairs, bias_q_seg, bias_k_seg;
  OptTensor intervals, lower, q_seg, k_seg, relation, block_map;
  int64_t block_q, block_k, region_kind, region_size;
  OptTensor bias_row_q, bias_row_e, bias_col_k, bias_col_e;
};

// The arguments attn_fwd and attn_bwd have in common: as schema text, as parameters, and in AttnArgs' order.
#define FASTPE_ATTN_ARGS \
  "Tensor? q_rope, Tensor? k_rope, int rope_layout, int bias_form, Tensor? bias_params, Tensor? bias_gamma, " \
  "Tensor? bias_u, Tensor? bias_w, Tensor? bias_base, Tensor? bias_table, int left, int right, int sinks, " \
  "Tensor? q_ids, Tensor? k_ids, Tensor? mask, Tensor? row_scale, Tensor? sink, float scale, float softcap, " \
  "float softcap_mul, float skip_eps, Tensor? bias_pieces, Tensor? bias_omega, Tensor? bias_rows, " \
  "Tensor? bias_cols, Tensor? bias_index, Tensor? bias_dense, bool softcap_bias, Tensor? bias_factor, " \
  "Tensor? bias_pairs, Tensor? bias_q_seg, Tensor? bias_k_seg, Tensor? intervals, Tensor? lower, Tensor? q_seg, " \
  "Tensor? k_seg, Tensor? relation, Tensor? block_map, int block_q, int block_k, int region_kind, int region_size, " \
  "Tensor? bias_row_q, Tensor? bias_row_e, Tensor? bias_col_k, Tensor? bias_col_e"
#define FASTPE_ATTN_PARAMS \
  OptTensor q_rope, OptTensor k_rope, int64_t rope_layout, int64_t bias_form, OptTensor bias_params, OptTensor bias_gamma, \
      OptTensor bias_u, OptTensor bias_w, OptTensor bias_base, OptTensor bias_table, int64_t left, int64_t right, \
      int64_t sinks, OptTensor q_ids, OptTensor k_ids, OptTensor mask, OptTensor row_scale, OptTensor sink, double scale, \
      double softcap, double softcap_mul, double skip_eps, OptTensor bias_pieces, OptTensor bias_omega, \
      OptTensor bias_rows, OptTensor bias_cols, OptTensor bias_index, OptTensor bias_dense, bool softcap_bias, \
      OptTensor bias_factor, OptTensor bias_pairs, OptTensor bias_q_seg, OptTensor bias_k_seg, OptTensor intervals, \
      OptTensor lower, OptTensor q_seg, OptTensor k_seg, OptTensor relation, OptTensor block_map, int64_t block_q, \
      int64_t block_k, int64_t region_kind, int64_t region_size, OptTensor bias_row_q, OptTensor bias_row_e, \
      OptTensor bias_col_k, OptTensor bias_col_e
#define FASTPE_ATTN_VALUES \
  q_rope, k_rope, rope_layout, bias_form, bias_params, bias_gamma, bias_u, bias_w, bias_base, bias_table, left, right, \
      sinks, q_ids, k_ids, mask, row_scale, sink, scale, softcap, softcap_mul, skip_eps, bias_pieces, bias_omega, \
      bias_rows, bias_cols, bias_index, bias_dense, softcap_bias, bias_factor, bias_pairs, bias_q_seg, bias_k_seg, \
      intervals, lower, q_seg, k_seg, relation, block_map, block_q, block_k, region_kind, region_size, \
      bias_row_q, bias_row_e, bias_col_k, bias_col_e

inline RopeLayout layout_of(const char* op, int64_t layout) {
  check(op, layout == 0 || layout == 1, "layout must be 0 (half) or 1 (interleaved), got ", layout);
  return RopeLayout(layout);
}

inline BiasForm form_of(const char* op, int64_t id) {
  switch (id) {
#define FASTPE_BIAS_FORM(name, number, text) case number:
#include "pos/bias_forms.def"
#undef FASTPE_BIAS_FORM
    return BiasForm(id);
    default: fail(op, "bias_form ", id, " is not a form");
  }
}

// int32 (B|1, N) in [0, limit). A wrong id would read outside a table, so each is looked at where the host can.
inline const int32_t* read_ids(const Call& c, const char* name, const Tensor& t, int64_t B, int64_t N, int64_t limit, int64_t& sb) {
  check_device(c, name, t);
  check_dtype(c, name, t, ScalarType::Int);
  check_shape(c, name, t, {broadcast(B), {N}});
  check_last_contiguous(c, name, t);
  sb = step(t, 0);
  const int32_t* p = static_cast<const int32_t*>(t.const_data_ptr());
  if (t.is_cpu())
    for (int64_t b = 0; b < t.size(0); ++b)
      for (int64_t i = 0; i < N; ++i) {
        const int32_t x = p[b * sb + i];
        if (x < 0 || x >= limit) [[unlikely]] fail(c.op, name, " must lie in [0, ", limit, "), got ", x, " at token ", i);
      }
  return p;
}

inline Bias read_bias(const Call& c, const AttnArgs& a, ScalarType aux, int64_t B, int64_t H, int64_t Nq, int64_t Nk) {
  Bias b;
  b.form = form_of(c.op, a.bias_form);
  b.params = read_aux(c, "bias_params", a.bias_params, aux, {broadcast(B), broadcast(H), {2}});
  b.gamma = read_aux(c, "bias_gamma", a.bias_gamma, aux, {broadcast(B), broadcast(H), broadcast(Nq)});
  b.u = read_aux(c, "bias_u", a.bias_u, aux, {broadcast(B), broadcast(H), {Nq}});
  const bool two_sided = b.form == BiasForm::two_sided;
  const Axis w_heads = two_sided ? Axis{2 * H} : broadcast(H);
  b.w = read_aux(c, "bias_w", a.bias_w, aux, {broadcast(B), w_heads, {Nk}});
  b.base = read_aux(c, "bias_base", a.bias_base, ScalarType::Double, {broadcast(B), w_heads, {(Nk + kPrefixBlock - 1) / kPrefixBlock}});
  if (a.bias_table) {
    const Tensor& t = *a.bias_table;
    check_device(c, "bias_table", t);
    check_dtype(c, "bias_table", t, aux);
    check(c.op, t.dim() == 2 && (t.size(0) == H || t.size(0) == 1) && t.size(1) >= 1, "bias_table must be of shape (", H, " or 1, L) with L >= 1, got ", shape_of(t));
    check_last_contiguous(c, "bias_table", t);
    b.table = {read_ptr(t), 0, step(t, 0), 0};
    b.table_len = t.size(1);
  }
  const bool rel_fn = pos::is_rel_fn(b.form) || two_sided, fire = b.form == BiasForm::fire, table = pos::is_table(b.form) || fire;
  check(c.op, table == bool(b.table), "bias_table belongs to the table forms and to fire, and they need it; bias_form is ", a.bias_form);
  check(c.op, b.form != BiasForm::table || b.table_len % 2 == 1, "bias_table of the two-sided form must have an odd length, got ", b.table_len);
  check(c.op, rel_fn || !(b.params || b.base), "bias_params and bias_base belong to the forms of a distance; bias_form is ", a.bias_form);
  check(c.op, rel_fn || fire || !b.gamma, "bias_gamma belongs to the forms of a distance and to fire; bias_form is ", a.bias_form);
  check(c.op, rel_fn || table || !(b.u || b.w), "bias_u and bias_w belong to a form of the distance; bias_form is ", a.bias_form);
  const bool needs_params = b.form == BiasForm::linear || b.form == BiasForm::log || b.form == BiasForm::power;
  check(c.op, !two_sided || (a.bias_w && !a.bias_u && !a.bias_params), "bias_w alone belongs to the two-sided form, and it needs it");
  check(c.op, !needs_params || b.params, "bias_params is missing for bias_form ", a.bias_form);
  check(c.op, !b.base || (b.w && !b.u), "bias_base goes with bias_w and without bias_u");
  check(c.op, !b.w || b.u || Nq <= Nk, "bias_w without bias_u needs no more queries than keys, got ", Nq, " and ", Nk);
  check(c.op, fire == a.bias_pieces.has_value() && (!fire || a.bias_gamma.has_value()), "bias_pieces and bias_gamma belong to fire, and it needs them; bias_form is ", a.bias_form);
  if (a.bias_pieces) {
    const Tensor& t = *a.bias_pieces;
    check_device(c, "bias_pieces", t);
    check_dtype(c, "bias_pieces", t, aux);
    check(c.op, t.dim() == 3 && t.size(0) == 3 && (t.size(1) == H || t.size(1) == 1) && t.size(2) >= 1, "bias_pieces must be of shape (3, ", H, " or 1, S) with S >= 1, got ", shape_of(t));
    check_last_contiguous(c, "bias_pieces", t);
    b.pieces = {read_ptr(t), t.stride(0), step(t, 1), 0};
    b.pieces_len = t.size(2);
  }
  if (a.bias_omega) {
    const Tensor& t = *a.bias_omega;
    check_device(c, "bias_omega", t);
    check_dtype(c, "bias_omega", t, aux);
    check(c.op, pos::is_table(b.form) && !b.u && !b.w, "bias_omega goes with a table form over plain distances; bias_form is ", a.bias_form);
    check(c.op, t.dim() == 2 && (t.size(0) == H || t.size(0) == 1) && t.size(1) == b.table_len, "bias_omega must be of shape (", H, " or 1, ", b.table_len, "), got ", shape_of(t));
    check_last_contiguous(c, "bias_omega", t);
    b.omega = {read_ptr(t), 0, step(t, 0), 0};
  }
  check(c.op, (a.bias_rows || a.bias_cols || a.bias_row_q || a.bias_col_k) == a.bias_index.has_value(), "row and column terms and bias_index go together");
  const auto terms = [&](const char* name, const OptTensor& t, int64_t N, Aux& x) {
    if (!t) return;
    check_device(c, name, *t);
    check_dtype(c, name, *t, aux);
    check(c.op, t->dim() == 4 && t->size(3) >= 1 && (!b.terms_len || t->size(3) == b.terms_len), name, " must be of shape (B, H, N, R), R the same for rows and columns, got ", shape_of(*t));
    check_shape(c, name, *t, {{B}, {H}, {N}, {t->size(3)}});
    check_last_contiguous(c, name, *t);
    x = {read_ptr(*t), step(*t, 0), step(*t, 1), step(*t, 2)};
    b.terms_len = t->size(3);
  };
  terms("bias_rows", a.bias_rows, Nq, b.rows);
  terms("bias_cols", a.bias_cols, Nk, b.cols);
  const auto strip = [&](const char* token_name, const char* table_name, const OptTensor& tokens, const OptTensor& table, int64_t N, Aux& x, Aux& e) {
    check(c.op, tokens.has_value() == table.has_value(), token_name, " and ", table_name, " go together");
    if (!tokens) return;
    check(c.op, tokens->dim() == 4 && tokens->size(3) >= 1 && tokens->size(3) <= 256, token_name, " must be of shape (B or 1, H or 1, N, d), d from 1 to 256, got ", shape_of(*tokens));
    check(c.op, !b.strip_d || tokens->size(3) == b.strip_d, "bias_row_q and bias_col_k must have as many channels");
    b.strip_d = tokens->size(3);
    x = read_aux(c, token_name, tokens, aux, {broadcast(B), broadcast(H), {N}, {b.strip_d}});
    x.sn = tokens->stride(2);
    check_device(c, table_name, *table);
    check_dtype(c, table_name, *table, aux);
    check(c.op, table->dim() == 3 && (table->size(0) == H || table->size(0) == 1) && table->size(1) >= 1 && table->size(2) == b.strip_d, table_name, " must be of shape (", H, " or 1, R, ", b.strip_d, "), got ", shape_of(*table));
    check(c.op, !b.terms_len || table->size(1) == b.terms_len, table_name, " must have as many entries as the other terms, ", b.terms_len, ", got ", table->size(1));
    check_last_contiguous(c, table_name, *table);
    e = {read_ptr(*table), 0, step(*table, 0), table->stride(1)};
    b.terms_len = table->size(1);
  };
  strip("bias_row_q", "bias_row_e", a.bias_row_q, a.bias_row_e, Nq, b.row_q, b.row_e);
  strip("bias_col_k", "bias_col_e", a.bias_col_k, a.bias_col_e, Nk, b.col_k, b.col_e);
  if (a.bias_index) {
    const Tensor& t = *a.bias_index;
    check_device(c, "bias_index", t);
    check_dtype(c, "bias_index", t, ScalarType::Int);
    check(c.op, t.dim() == 1 && t.size(0) % 2 == 1, "bias_index must have one axis of odd length, got ", shape_of(t));
    check_last_contiguous(c, "bias_index", t);
    b.index = static_cast<const int32_t*>(t.const_data_ptr());
    b.index_len = t.size(0);
  }
  if (a.bias_dense) {
    const Tensor& t = *a.bias_dense;
    b.dense = read_aux(c, "bias_dense", a.bias_dense, aux, {broadcast(B), broadcast(H), broadcast(Nq), broadcast(Nk)});
    b.dense_sk = t.size(3) == 1 ? 0 : 1;
  }
  const bool by_pair = a.bias_factor || a.bias_pairs;
  check(c.op, by_pair == a.bias_q_seg.has_value() && by_pair == a.bias_k_seg.has_value(), "bias_factor or bias_pairs goes with bias_q_seg and bias_k_seg");
  if (by_pair) {
    const Tensor& t = a.bias_factor ? *a.bias_factor : *a.bias_pairs;
    check(c.op, t.dim() == 4 && t.size(2) >= 1 && t.size(3) >= 1, "bias_factor and bias_pairs must be of shape (B or 1, H or 1, Sq, Sk), got ", shape_of(t));
    b.Sq = t.size(2), b.Sk = t.size(3);
    b.factor = read_aux(c, "bias_factor", a.bias_factor, aux, {broadcast(B), broadcast(H), {b.Sq}, {b.Sk}});
    b.pairs = read_aux(c, "bias_pairs", a.bias_pairs, aux, {broadcast(B), broadcast(H), {b.Sq}, {b.Sk}});
    // The kernels index rows of Sk entries: an axis of length 1 needs its stride too.
    if (b.factor) b.factor.sn = a.bias_factor->stride(2);
    if (b.pairs) b.pairs.sn = a.bias_pairs->stride(2);
    b.q_seg = read_ids(c, "bias_q_seg", *a.bias_q_seg, B, Nq, b.Sq, b.q_seg_sb);
    b.k_seg = read_ids(c, "bias_k_seg", *a.bias_k_seg, B, Nk, b.Sk, b.k_seg_sb);
  }
  return b;
}

inline Region read_region(const Call& c, const AttnArgs& a) {
  check(c.op, a.region_kind >= 0 && a.region_kind <= int64_t(RegionKind::band), "region_kind ", a.region_kind, " is not a kind");
  Region r{RegionKind(a.region_kind), a.region_size};
  if (r.kind == RegionKind::none) return {};
  check(c.op, a.q_rope.has_value(), "regions differ by their rotation, but there is no q_rope");
  check(c.op, r.size >= (r.kind == RegionKind::key_set ? 0 : 1), "region_size must be at least ", r.kind == RegionKind::key_set ? 0 : 1, ", got ", r.size);
  return r;
}

inline Visibility read_visibility(const Call& c, const AttnArgs& a, int64_t B, int64_t H, int64_t Nq, int64_t Nk) {
  check(c.op, a.left >= 0 && a.right >= 0 && a.sinks >= 0, "left, right and sinks must not be negative, got ", a.left, ", ", a.right, ", ", a.sinks);
  Visibility v;
  v.left = a.left;
  v.right = a.right;
  v.sinks = a.sinks;
  check(c.op, a.q_ids.has_value() == a.k_ids.has_value(), "q_ids and k_ids go together");
  const auto ids = [&](const char* name, const OptTensor& t, int64_t N, const int32_t*& p, int64_t& sb) {
    if (!t) return;
    check_device(c, name, *t);
    check_dtype(c, name, *t, ScalarType::Int);
    check_shape(c, name, *t, {broadcast(B), {N}});
    check_last_contiguous(c, name, *t);
    p = static_cast<const int32_t*>(t->const_data_ptr());
    sb = step(*t, 0);
  };
  ids("q_ids", a.q_ids, Nq, v.q_ids, v.q_ids_sb);
  ids("k_ids", a.k_ids, Nk, v.k_ids, v.k_ids_sb);
  if (a.mask) {
    const Tensor& m = *a.mask;
    check_device(c, "mask", m);
    check_dtype(c, "mask", m, ScalarType::Bool);
    check_shape(c, "mask", m, {broadcast(B), broadcast(H), broadcast(Nq), broadcast(Nk)});
    v.mask = static_cast<const uint8_t*>(m.const_data_ptr());
    v.mask_sb = step(m, 0);
    v.mask_sh = step(m, 1);
    v.mask_sn = step(m, 2);
    v.mask_sk = step(m, 3);
  }
  if (a.intervals) {
    const Tensor& t = *a.intervals;
    check_device(c, "intervals", t);
    check_dtype(c, "intervals", t, ScalarType::Int);
    check_shape(c, "intervals", t, {broadcast(B), {4}, {Nk}});
    check(c.op, t.is_contiguous(), "intervals must be contiguous");
    v.intervals = static_cast<const int32_t*>(t.const_data_ptr());
    v.intervals_sb = step(t, 0);
  }
  ids("lower", a.lower, Nq, v.lower, v.lower_sb);
  check(c.op, a.q_seg.has_value() == a.k_seg.has_value() && a.q_seg.has_value() == a.relation.has_value(), "q_seg, k_seg and relation go together");
  if (a.relation) {
    const Tensor& t = *a.relation;
    check_device(c, "relation", t);
    check_dtype(c, "relation", t, ScalarType::Bool);
    check(c.op, t.dim() == 2 && t.size(0) >= 1 && t.size(1) >= 1 && t.is_contiguous(), "relation must be a contiguous (Sq, Sk), got ", shape_of(t));
    v.relation = static_cast<const uint8_t*>(t.const_data_ptr());
    v.Sq = t.size(0), v.Sk = t.size(1);
    v.q_seg = read_ids(c, "q_seg", *a.q_seg, B, Nq, v.Sq, v.q_seg_sb);
    v.k_seg = read_ids(c, "k_seg", *a.k_seg, B, Nk, v.Sk, v.k_seg_sb);
  }
  if (a.block_map) {
    const Tensor& t = *a.block_map;
    check(c.op, a.block_q >= 1 && a.block_k >= 1, "block_q and block_k must be at least 1, got ", a.block_q, " and ", a.block_k);
    check_device(c, "block_map", t);
    check_dtype(c, "block_map", t, ScalarType::Bool);
    check_shape(c, "block_map", t, {broadcast(B), broadcast(H), {(Nq + a.block_q - 1) / a.block_q}, {(Nk + a.block_k - 1) / a.block_k}});
    check_last_contiguous(c, "block_map", t);
    v.map = static_cast<const uint8_t*>(t.const_data_ptr());
    v.map_sb = step(t, 0), v.map_sh = step(t, 1), v.map_sn = t.stride(2);
    v.block_q = a.block_q, v.block_k = a.block_k;
  }
  return v;
}

// Regions, or visibility beyond windows, ids and dense masks.
inline bool beyond_bands(const AttnParams& p) {
  return p.region.kind != RegionKind::none || p.vis.intervals || p.vis.lower || p.vis.relation || p.vis.map;
}

// Keys and values that are not (B,Hk,Nk,..) in order (ops_decode.cpp).
struct KeyStore {
  bool paged = false;   // pools (pages, Hk, page size, ..) holding `keys` keys of a batch
  int64_t keys = 0;
  bool turned = false;  // rows of k_rope are chosen by entry, not by key
  bool ready = false;   // keys are turned already: q_rope comes alone
};

// Everything but the outputs.
inline AttnParams read_attn(const char* op, const AttnArgs& a, const KeyStore& store = {}) {
  const Call c{op, a.q};
  const Tensor &q = a.q, &k = a.k, &v = a.v;
  AttnParams p;
  p.dtype = dtype_of(c, "q", q);
  check(op, q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must have 4 axes (batch, head, token, channel), got ", shape_of(q), ", ", shape_of(k), " and ", shape_of(v));
  p.B = q.size(0), p.H = q.size(1), p.Nq = q.size(2), p.D = q.size(3);
  p.Hk = k.size(1), p.Nk = k.size(2), p.Dv = v.size(3);
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"k", k}, {"v", v}}) {
    check_device(c, name, t);
    check_dtype(c, name, t, q.scalar_type());
  }
  const int64_t batches = store.paged ? k.size(0) : p.B;
  check_shape(c, "k", k, {{batches}, {p.Hk}, {p.Nk}, {p.D}});
  check_shape(c, "v", v, {{batches}, {p.Hk}, {p.Nk}, {p.Dv}});
  if (store.paged) p.Nk = store.keys;
  check(op, p.Hk > 0 ? p.H % p.Hk == 0 : p.H == 0, "k has ", p.Hk, " heads, which does not divide q's ", p.H);
  for (const int64_t d : {p.D, p.Dv}) check(op, d >= 8 && d <= 256 && d % 8 == 0, "head sizes must be 8 to 256 in steps of 8, got ", p.D, " for q and k, ", p.Dv, " for v");
  p.q = read_view(c, "q", q);
  p.k = read_view(c, "k", k);
  p.v = read_view(c, "v", v);

  const ScalarType aux = aux_type(p.dtype);
  check(op, store.ready ? !a.k_rope.has_value() : a.q_rope.has_value() == a.k_rope.has_value(), "q_rope and k_rope go together");
  p.rope_layout = layout_of(op, a.rope_layout);
  p.region = read_region(c, a);
  if (a.q_rope) {
    const int64_t regions = pos::region_count(p.region.kind);
    p.q_rope = read_rope(c, "q_rope", *a.q_rope, aux, p.B, p.H, p.Nq, regions);
    p.rope_pairs = a.q_rope->size(4);
    if (a.k_rope) {
      p.k_rope = read_rope(c, "k_rope", *a.k_rope, aux, p.B, p.Hk, store.turned ? a.k_rope->size(3) : p.Nk, a.k_rope->dim() == 5 && a.k_rope->size(0) == 2 ? 1 : regions);
      check(op, a.k_rope->size(4) == p.rope_pairs, "q_rope has ", p.rope_pairs, " pairs, k_rope has ", a.k_rope->size(4));
    }
    check(op, p.rope_pairs >= 1 && 2 * p.rope_pairs <= p.D, "q_rope rotates ", 2 * p.rope_pairs, " channels, q has ", p.D);
  }
  p.bias = read_bias(c, a, aux, p.B, p.H, p.Nq, p.Nk);
  p.vis = read_visibility(c, a, p.B, p.H, p.Nq, p.Nk);
  p.row_scale = read_aux(c, "row_scale", a.row_scale, aux, {broadcast(p.B), broadcast(p.H), broadcast(p.Nq)}, false);
  if (a.sink) {
    check_device(c, "sink", *a.sink);
    check_dtype(c, "sink", *a.sink, aux);
    check_shape(c, "sink", *a.sink, {{p.H}});
    p.sink = {read_ptr(*a.sink), 0, step(*a.sink, 0), 0};
  }
  check(op, !(a.softcap < 0), "softcap must not be negative, got ", a.softcap);
  check(op, a.skip_eps >= 0 && a.skip_eps < 1, "skip_eps must lie in [0, 1), got ", a.skip_eps);
  p.scale = a.scale;
  p.softcap = a.softcap;
  p.softcap_mul = a.softcap_mul;
  p.skip_eps = a.skip_eps;
  p.softcap_bias = a.softcap_bias && a.softcap > 0;
  return p;
}

// ---- rotation ---------------------------------------------------------------------------------------------------

inline RotateParams read_rotate(const char* op, const char* name, const Tensor& x, const char* table_name, const Tensor& table, int64_t layout, bool inverse) {
  const Call c{op, x};
  RotateParams p;
  p.dtype = dtype_of(c, name, x);
  check(op, x.dim() == 4, name, " must have 4 axes (batch, head, token, channel), got ", shape_of(x));
  p.B = x.size(0), p.H = x.size(1), p.N = x.size(2), p.D = x.size(3);
  p.x = read_view(c, name, x);
  p.rope = read_rope(c, table_name, table, aux_type(p.dtype), p.B, p.H, p.N);
  p.J = table.size(4);
  check(op, 2 * p.J <= p.D, table_name, " rotates ", 2 * p.J, " channels, ", name, " has ", p.D);
  p.layout = layout_of(op, layout);
  p.inverse = inverse;
  return p;
}

// Contiguous positions (A, B|1, N) and inv_freq (A, H|1, J).
inline RopeTableParams read_rope_table(const char* op, const Tensor& x, const Tensor& w, double amplitude, bool float32_product, bool out_f64) {
  const Call c{op, x};
  check_device(c, "inv_freq", w);
  check_dtype(c, "positions", x, ScalarType::Double);
  check_dtype(c, "inv_freq", w, ScalarType::Double);
  check(op, x.dim() == 3, "positions must be of shape (axes, B or 1, N), got ", shape_of(x));
  check(op, w.dim() == 3, "inv_freq must be of shape (axes, H or 1, J), got ", shape_of(w));
  check(op, x.size(0) == w.size(0), "positions have ", x.size(0), " axes, inv_freq has ", w.size(0));
  RopeTableParams p;
  p.out_f64 = out_f64;
  p.A = x.size(0), p.B = x.size(1), p.N = x.size(2), p.H = w.size(1), p.J = w.size(2);
  check(op, p.A >= 1, "positions must have at least one axis, got ", shape_of(x));
  p.positions = static_cast<const double*>(x.const_data_ptr());
  p.inv_freq = static_cast<const double*>(w.const_data_ptr());
  p.float32_product = float32_product;
  p.amplitude = amplitude;
  return p;
}

// Sums along the last axis of a contiguous x.
inline PrefixParams read_prefix(const char* op, const Tensor& x, bool reverse) {
  const ScalarType t = x.scalar_type();
  check(op, t == ScalarType::Float || t == ScalarType::Double, "x must be float32 or float64, got ", dtype_name(t));
  check(op, x.dim() >= 1, "x must have at least one axis");
  PrefixParams p;
  p.f64 = t == ScalarType::Double;
  p.N = x.size(x.dim() - 1);
  p.rows = p.N ? x.numel() / p.N : 0;
  p.x = x.const_data_ptr();
  p.reverse = reverse;
  return p;
}

// A tensor that is written in place must not hold one element under two indices.
inline void check_writable(const char* op, const char* name, const Tensor& x) {
  for (int64_t d = 0; d < x.dim(); ++d)
    check(op, x.size(d) <= 1 || x.stride(d) != 0, name, " is expanded along axis ", d, " and cannot be rotated in place; use a copy of it");
}

}  // namespace fastpe::binding
