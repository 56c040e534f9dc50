// The ops of a device that takes work from a stream: check, allocate, start kernels, return without waiting. The
// binding of GPUs and that of the emulator are this code with their own Queue:
//
//   explicit Queue(const Tensor& lead);                   // makes the tensor's device current while it lives
//   void* stream() const;
//   uint32_t* tile_counts(const Tensor& lead, int64_t blocks);  // (blocks, 2) on the device, or null: not counted
//   void count_tiles();                                   // after the launch
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "args.h"
#include "attn_bwd.h"
#include "cope.h"
#include "core/tiles.h"
#include "cuda/launch.h"
#include "decode.h"
#include "landmark.h"
#include "mass.h"
#include "merge.h"

namespace fastpe::binding {

// cudaErrorInvalidValue (1) is what asking for more shared memory than a block may have gives.
inline void started(const char* op, int rc) {
  check(op, rc == 0, "a kernel could not be started: ", cuda::error_text(rc), rc == 1 ? "; this GPU may have less shared memory a block than the head size needs (docs/cuda.md)" : "");
}

// 256-byte aligned memory of a call. Tensors of torch's allocator stay valid until the stream has used them.
struct Workspace {
  Tensor memory;
  char* base;
  Workspace(const Tensor& lead, size_t bytes) : memory(empty(lead, {int64_t(bytes) + 256}, ScalarType::Byte)) {
    base = static_cast<char*>(memory.mutable_data_ptr());
    base += (256 - reinterpret_cast<uintptr_t>(base) % 256) % 256;
  }
};

inline void check_half(const char* op, const Tensor& q) {
  check(op, q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half, "the CUDA kernels take bfloat16 and float16, got ", dtype_name(q.scalar_type()), "; cast q, k and v, or call on the CPU");
}
inline void check_type(const char* op, const Tensor& q) {
  check(op, q.scalar_type() != ScalarType::Double, "the CUDA kernels take float32, bfloat16 and float16, got float64; cast q, k and v, or call on the CPU");
}

// ---- attention ------------------------------------------------------------------------------------------------------

template <class Queue>
void run_decode(const char* op, const Tensor& q, const DecodeParams& d, int64_t page_count, int64_t turns) {
  check(op, d.attn.Nk <= std::numeric_limits<int32_t>::max(), "the kernel for few queries takes at most 2^31 - 1 keys, got ", d.attn.Nk);
  Queue queue(q);
  const Workspace w(q, cuda::attn_decode_workspace(d));
  started(op, cuda::attn_decode(d, page_count, turns, w.base, queue.stream()));
}

template <class Queue>
std::tuple<Tensor, Tensor, Tensor> device_attn_fwd(Tensor q, Tensor k, Tensor v, FASTPE_ATTN_PARAMS, bool keep_residual) {
  const char* op = "attn_fwd";
  check_type(op, q);
  const AttnArgs a{q, k, v, FASTPE_ATTN_VALUES};
  AttnParams p = read_attn(op, a);
  Tensor out = empty_in_order(q, p.B, p.H, p.Nq, p.Dv);
  Tensor lse = empty(q, {p.B, p.H, p.Nq}, aux_type(p.dtype));
  keep_residual = keep_residual && p.dtype != DType::f32;
  Tensor residual = keep_residual ? empty_in_order(q, p.B, p.H, p.Nq, p.Dv) : none(q, q.scalar_type());
  if (lse.numel() == 0) return {out, lse, residual};
  p.o = view(out, out.mutable_data_ptr());
  p.lse = lse.mutable_data_ptr();
  if (keep_residual) p.residual = view(residual, residual.mutable_data_ptr());
  if (p.dtype != DType::f32 && p.Nq <= tiles::kFewQueries && pos::decode_takes(p.bias)) {
    DecodeParams d;
    d.attn = p;
    run_decode<Queue>(op, q, d, 0, 0);
    return {out, lse, residual};
  }
  Queue queue(q);
  const Workspace w(q, cuda::attn_fwd_workspace(p));
  uint32_t* counts = queue.tile_counts(q, cuda::attn_fwd_blocks(p));
  started(op, cuda::attn_fwd(p, w.base, queue.stream(), counts));
  queue.count_tiles();
  return {out, lse, residual};
}

template <class Queue>
std::tuple<Tensor, Tensor> device_attn_decode(Tensor q, Tensor k, Tensor v, FASTPE_ATTN_PARAMS, OptTensor pages, OptTensor lengths, OptTensor list, OptTensor turn, std::vector<Tensor> more) {
  check_half("attn_decode", q);
  return attn_decode_on(q, k, v, FASTPE_ATTN_VALUES, pages, lengths, list, turn, more, false, [&](const DecodeParams& d, int64_t turns) {
    run_decode<Queue>("attn_decode", q, d, pages ? k.size(0) : 0, turns);
  });
}

template <class Queue>
AttnGrads device_attn_bwd(
    Tensor dout, OptTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, OptTensor residual, FASTPE_ATTN_PARAMS,
    int64_t needs) {
  check_type("attn_bwd", q);
  return attn_bwd_on(dout, dlse, q, k, v, out, lse, residual, FASTPE_ATTN_VALUES, needs, [&](const AttnBwdParams& b) {
    Queue queue(q);
    const Workspace w(q, cuda::attn_bwd_workspace(b));
    started("attn_bwd", cuda::attn_bwd(b, w.base, queue.stream()));
  });
}

// ---- landmark attention ---------------------------------------------------------------------------------------------

template <class Queue>
std::tuple<Tensor, Tensor> device_landmark_fwd(Tensor q, Tensor k, Tensor v, FASTPE_LANDMARK_PARAMS) {
  check_half("landmark_fwd", q);
  return landmark_fwd_on(q, k, v, FASTPE_LANDMARK_VALUES, [&](const LandmarkParams& p) {
    Queue queue(q);
    const Workspace w(q, cuda::landmark_fwd_workspace(p));
    started("landmark_fwd", cuda::landmark_fwd(p, w.base, queue.stream()));
  });
}
template <class Queue>
std::tuple<Tensor, Tensor, Tensor> device_landmark_bwd(
    Tensor dout, OptTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, FASTPE_LANDMARK_PARAMS, int64_t needs) {
  check_half("landmark_bwd", q);
  return landmark_bwd_on(dout, dlse, q, k, v, out, lse, FASTPE_LANDMARK_VALUES, needs, [&](const LandmarkBwdParams& b) {
    Queue queue(q);
    const Workspace w(q, cuda::landmark_bwd_workspace(b));
    started("landmark_bwd", cuda::landmark_bwd(b, w.base, queue.stream()));
  });
}

// ---- attention mass -------------------------------------------------------------------------------------------------

template <class Queue>
void run_mass(const char* op, const Tensor& q, const MassParams& p) {
  Queue queue(q);
  const Workspace w(q, cuda::attn_mass_workspace(p));
  started(op, cuda::attn_mass(p, w.base, queue.stream()));
}
template <class Queue>
Tensor device_attn_mass(Tensor q, Tensor k, Tensor lse, OptTensor weights, FASTPE_ATTN_PARAMS) {
  check_type("attn_mass", q);
  return attn_mass_on(q, k, lse, weights, FASTPE_ATTN_VALUES, [&](const MassParams& p) { run_mass<Queue>("attn_mass", q, p); });
}
template <class Queue>
Tensor device_attn_rows(Tensor q, Tensor k, OptTensor lse, int64_t rows, bool logits, FASTPE_ATTN_PARAMS) {
  check_type("attn_rows", q);
  return attn_rows_on(q, k, lse, rows, logits, FASTPE_ATTN_VALUES, [&](const MassParams& p) { run_mass<Queue>("attn_rows", q, p); });
}

// ---- contextual positions -------------------------------------------------------------------------------------------

template <class Queue>
std::tuple<Tensor, Tensor, Tensor, Tensor> device_cope_fwd(Tensor q, Tensor k, Tensor v, FASTPE_COPE_PARAMS, bool training) {
  check_half("cope_fwd", q);
  return cope_fwd_on(q, k, v, FASTPE_COPE_VALUES, training, [&](const CopeParams& c) {
    Queue queue(q);
    const Workspace w(q, cuda::cope_fwd_workspace(c));
    started("cope_fwd", cuda::cope_fwd(c, w.base, queue.stream()));
  });
}
template <class Queue>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> device_cope_bwd(
    Tensor dout, OptTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor carry, OptTensor residual, FASTPE_COPE_PARAMS,
    int64_t needs) {
  check_half("cope_bwd", q);
  return cope_bwd_on(dout, dlse, q, k, v, out, lse, carry, residual, FASTPE_COPE_VALUES, needs, [&](const CopeBwdParams& b) {
    Queue queue(q);
    const Workspace w(q, cuda::cope_bwd_workspace(b));
    started("cope_bwd", cuda::cope_bwd(b, w.base, queue.stream()));
  });
}

// ---- merging --------------------------------------------------------------------------------------------------------

inline void check_merges(const char* op, const MergeParams& p) {
  check(op, p.dtype != DType::f64, "the CUDA kernels take float32, bfloat16 and float16, got float64");
  check(op, p.P <= cuda::merge_parts(), "the CUDA kernels merge at most ", cuda::merge_parts(), " parts at once, got ", p.P, "; merge some of them first");
}
template <class Queue>
std::tuple<Tensor, Tensor> device_merge_fwd(Parts outs, Parts lses, std::vector<double> factors) {
  return merge_fwd_on(outs, lses, factors, [&](const MergeParams& p) {
    check_merges("merge_fwd", p);
    Queue queue(outs[0]);
    started("merge_fwd", cuda::merge_fwd(p, queue.stream()));
  });
}
template <class Queue>
std::tuple<Parts, Tensor> device_merge_bwd(OptTensor dout, OptTensor dlse, Parts outs, Parts lses, std::vector<double> factors, int64_t needs) {
  return merge_bwd_on(dout, dlse, outs, lses, factors, needs, [&](const MergeBwdParams& b) {
    check_merges("merge_bwd", b.fwd);
    Queue queue(outs[0]);
    started("merge_bwd", cuda::merge_bwd(b, queue.stream()));
  });
}

// ---- rotation -------------------------------------------------------------------------------------------------------

inline void check_rotates(const char* op, const RotateParams& p) {
  check(op, p.dtype != DType::f64, "the CUDA kernels take float32, bfloat16 and float16, got float64");
}

template <class Queue>
Tensor rotate_to_new(const char* op, const char* name, const Tensor& x, const char* table_name, const Tensor& table, int64_t layout, bool inverse) {
  RotateParams p = read_rotate(op, name, x, table_name, table, layout, inverse);
  check_rotates(op, p);
  Queue queue(x);
  Tensor y = empty_in_order(x, p.B, p.H, p.N, p.D);
  p.y = view(y, y.mutable_data_ptr());
  started(op, cuda::rotate(p, queue.stream()));
  return y;
}
template <class Queue>
void rotate_in_place(const char* op, const char* name, const Tensor& x, const char* table_name, const Tensor& table, int64_t layout, bool inverse) {
  RotateParams p = read_rotate(op, name, x, table_name, table, layout, inverse);
  check_rotates(op, p);
  check_writable(op, name, x);
  Queue queue(x);
  p.x.p = x.mutable_data_ptr();
  p.y = p.x;
  started(op, cuda::rotate(p, queue.stream()));
}

template <class Queue>
Tensor device_rotate(Tensor x, Tensor table, int64_t layout, bool inverse) {
  return rotate_to_new<Queue>("rotate", "x", x, "table", table, layout, inverse);
}
template <class Queue>
void device_rotate_(Tensor x, Tensor table, int64_t layout, bool inverse) {
  rotate_in_place<Queue>("rotate_", "x", x, "table", table, layout, inverse);
}
template <class Queue>
std::tuple<Tensor, Tensor> device_rotate_pair(Tensor q, Tensor k, Tensor q_table, Tensor k_table, int64_t layout, bool inverse) {
  const char* op = "rotate_pair";
  check_device({op, q}, "k", k);
  Tensor y = rotate_to_new<Queue>(op, "q", q, "q_table", q_table, layout, inverse);
  return {y, rotate_to_new<Queue>(op, "k", k, "k_table", k_table, layout, inverse)};
}
template <class Queue>
void device_rotate_pair_(Tensor q, Tensor k, Tensor q_table, Tensor k_table, int64_t layout, bool inverse) {
  const char* op = "rotate_pair_";
  check_device({op, q}, "k", k);
  rotate_in_place<Queue>(op, "q", q, "q_table", q_table, layout, inverse);
  rotate_in_place<Queue>(op, "k", k, "k_table", k_table, layout, inverse);
}

template <class Queue>
Tensor device_rope_table(Tensor positions, Tensor inv_freq, double amplitude, bool float32_product, bool out_f64) {
  const char* op = "rope_table";
  const Tensor x = torch::stable::contiguous(positions), w = torch::stable::contiguous(inv_freq);
  RopeTableParams p = read_rope_table(op, x, w, amplitude, float32_product, out_f64);
  Queue queue(x);
  Tensor table = empty(positions, {2, p.B, p.H, p.N, p.J}, out_f64 ? ScalarType::Double : ScalarType::Float);
  if (table.numel() == 0) return table;
  p.cos = table.mutable_data_ptr();
  p.sin = offset(p.cos, table.stride(0), table);
  started(op, cuda::rope_table(p, queue.stream()));
  return table;
}

// ---- sums along the sequence ----------------------------------------------------------------------------------------

template <class Queue>
std::tuple<Tensor, Tensor> device_prefix_sum(Tensor x, bool reverse) {
  const Tensor xc = torch::stable::contiguous(x);
  PrefixParams p = read_prefix("prefix_sum", xc, reverse);
  Queue queue(xc);
  Tensor local = empty_contiguous(xc);
  std::vector<int64_t> shape(xc.sizes().begin(), xc.sizes().end());
  shape.back() = (p.N + kPrefixBlock - 1) / kPrefixBlock;
  Tensor base = torch::stable::new_empty(xc, shape, ScalarType::Double);
  if (local.numel() == 0) return {local, base};
  p.local = local.mutable_data_ptr();
  p.base = static_cast<double*>(base.mutable_data_ptr());
  started("prefix_sum", cuda::prefix_sum(p, queue.stream()));
  return {local, base};
}

template <class Queue>
Tensor device_cumsum_exact(Tensor x, bool reverse) {
  const Tensor xc = torch::stable::contiguous(x);
  PrefixParams p = read_prefix("cumsum_exact", xc, reverse);
  Queue queue(xc);
  Tensor y = empty_contiguous(xc);
  if (y.numel() == 0) return y;
  p.local = y.mutable_data_ptr();
  started("cumsum_exact", cuda::prefix_sum(p, queue.stream()));
  return y;
}

// Registers everything above.
template <class Queue, class Library>
void implement_device_ops(Library& m) {
  m.impl("attn_fwd", TORCH_BOX(&device_attn_fwd<Queue>));
  m.impl("attn_bwd", TORCH_BOX(&device_attn_bwd<Queue>));
  m.impl("attn_decode", TORCH_BOX(&device_attn_decode<Queue>));
  m.impl("landmark_fwd", TORCH_BOX(&device_landmark_fwd<Queue>));
  m.impl("landmark_bwd", TORCH_BOX(&device_landmark_bwd<Queue>));
  m.impl("attn_mass", TORCH_BOX(&device_attn_mass<Queue>));
  m.impl("attn_rows", TORCH_BOX(&device_attn_rows<Queue>));
  m.impl("cope_fwd", TORCH_BOX(&device_cope_fwd<Queue>));
  m.impl("cope_bwd", TORCH_BOX(&device_cope_bwd<Queue>));
  m.impl("merge_fwd", TORCH_BOX(&device_merge_fwd<Queue>));
  m.impl("merge_bwd", TORCH_BOX(&device_merge_bwd<Queue>));
  m.impl("rope_table", TORCH_BOX(&device_rope_table<Queue>));
  m.impl("rotate", TORCH_BOX(&device_rotate<Queue>));
  m.impl("rotate_", TORCH_BOX(&device_rotate_<Queue>));
  m.impl("rotate_pair", TORCH_BOX(&device_rotate_pair<Queue>));
  m.impl("rotate_pair_", TORCH_BOX(&device_rotate_pair_<Queue>));
  m.impl("prefix_sum", TORCH_BOX(&device_prefix_sum<Queue>));
  m.impl("cumsum_exact", TORCH_BOX(&device_cumsum_exact<Queue>));
}

}  // namespace fastpe::binding
