// Attention over pages and lists of keys: the checks and allocations that the bindings of all devices share.
//
// What pages, lengths, list and turn hold is looked at where the host can do so without waiting for a device. A device takes
// shapes alone, and its kernel bounds what it reads (cuda/sm80/decode.cuh).
#pragma once

#include <tuple>
#include <vector>

#include "args.h"

namespace fastpe::binding {

// int32, contiguous in its last axis.
inline const int32_t* read_ints(const Call& c, const char* name, const Tensor& t) {
  check_device(c, name, t);
  check_dtype(c, name, t, ScalarType::Int);
  check_last_contiguous(c, name, t);
  return static_cast<const int32_t*>(t.const_data_ptr());
}

// Keys of the longest batch entry.
inline int64_t most_keys(const Call& c, const int32_t* n, int64_t B, int64_t Nq) {
  int64_t most = 0;
  for (int64_t b = 0; b < B; ++b) {
    check(c.op, n[b] >= Nq, "lengths must be at least the number of queries, ", Nq, ", got ", n[b], " for batch entry ", b);
    most = n[b] > most ? n[b] : most;
  }
  return most;
}
// The same of shapes: what an array by key has, or, without one, what the pages can hold.
inline int64_t keys_by_shape(const AttnArgs& a, int64_t room) {
  const auto by_key = [](const OptTensor& t, int64_t axis, bool broadcasts, int64_t& n) {
    if (n < 0 && t && t->dim() > axis && !(broadcasts && t->size(axis) == 1)) n = t->size(axis);
  };
  int64_t n = -1;
  by_key(a.k_rope, 3, false, n);
  by_key(a.bias_w, 2, false, n);
  by_key(a.k_ids, 1, false, n);
  by_key(a.intervals, 2, false, n);
  by_key(a.k_seg, 1, false, n);
  by_key(a.bias_k_seg, 1, false, n);
  by_key(a.mask, 3, true, n);
  by_key(a.bias_dense, 3, true, n);
  if (n >= 0) return n;
  const int64_t mapped = a.block_map && a.block_map->dim() == 4 && a.block_k >= 1 ? a.block_map->size(3) * a.block_k : room;
  return mapped < room ? mapped : room;
}

inline void read_pages(const Call& c, const AttnParams& p, const Tensor& k, const Tensor& pages, bool look, DecodeParams& d) {
  d.pages = read_ints(c, "pages", pages);
  d.page_size = k.size(2);
  check(c.op, d.page_size >= 16 && d.page_size % 16 == 0, "a page must hold a multiple of 16 keys, got ", d.page_size);
  const int64_t need = (p.Nk + d.page_size - 1) / d.page_size;
  check(c.op, pages.dim() == 2 && pages.size(0) == p.B && pages.size(1) >= need, "pages must be of shape (", p.B, ", ", need, " or more), got ", shape_of(pages));
  d.pages_sb = pages.stride(0);
  if (!look) return;
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t x = 0; x < (d.lengths[b] + d.page_size - 1) / d.page_size; ++x) {
      const int32_t page = d.pages[b * d.pages_sb + x];
      check(c.op, page >= 0 && page < k.size(0), "pages must lie in [0, ", k.size(0), "), got ", page, " for keys from ", x * d.page_size, " on of batch entry ", b);
    }
}

inline void read_list(const Call& c, const AttnParams& p, const Tensor& list, const OptTensor& turn, int64_t turns, bool look, DecodeParams& d) {
  const auto places = [&](const char* name, const Tensor& t, int64_t lo, int64_t hi, int64_t& sb, int64_t& sh, int64_t& sn) {
    const int32_t* x = read_ints(c, name, t);
    check(c.op, t.dim() == 4, name, " must be of shape (B or 1, H or Hk or 1, Nq or 1, n), got ", shape_of(t));
    const int64_t heads = t.size(1) == p.Hk ? p.Hk : p.H;
    check_shape(c, name, t, {broadcast(p.B), broadcast(heads), broadcast(p.Nq), {list.size(3)}});
    sb = step(t, 0), sh = step(t, 1), sn = step(t, 2);
    if (!look) return x;
    for (int64_t b = 0; b < t.size(0); ++b)
      for (int64_t h = 0; h < t.size(1); ++h)
        for (int64_t i = 0; i < t.size(2); ++i)
          for (int64_t n = 0; n < t.size(3); ++n) {
            const int32_t j = x[b * sb + h * sh + i * sn + n];
            if (j < lo || j >= hi) [[unlikely]] fail(c.op, name, " must lie in [", lo, ", ", hi, "), got ", j, " for batch entry ", b, ", head ", h, ", row ", i, ", place ", n);
          }
    return x;
  };
  d.list = places("list", list, -1, p.Nk, d.list_sb, d.list_sh, d.list_sn);
  d.list_len = list.size(3);
  d.list_by_head = list.size(1) == p.H && p.H != p.Hk;
  check(c.op, p.region.kind == RegionKind::none, "regions do not go with lists of keys");
  if (!turn) return;
  check(c.op, turn->dim() == 4 && (turn->size(1) == 1 || turn->size(1) == list.size(1)), "turn must have list's heads or 1, got ", shape_of(*turn));
  d.turn = places("turn", *turn, 0, turns, d.turn_sb, d.turn_sh, d.turn_sn);
}

// Further copies of the keys, turned for the regions after the first.
inline void read_more(const Call& c, const AttnParams& p, const Tensor& k, const std::vector<Tensor>& more, const KeyStore& store, DecodeParams& d) {
  const int64_t regions = pos::region_count(p.region.kind);
  check(c.op, store.ready, "k_more goes with q_rope alone");
  check(c.op, int64_t(more.size()) == regions - 1, "k_more must hold keys for ", regions - 1, " regions, got ", more.size());
  for (size_t x = 0; x < more.size(); ++x) {
    check_device(c, "k_more", more[x]);
    check_dtype(c, "k_more", more[x], k.scalar_type());
    check_shape(c, "k_more", more[x], {{k.size(0)}, {k.size(1)}, {k.size(2)}, {k.size(3)}});
    d.more[x] = read_view(c, "k_more", more[x]);
  }
}

// look: whether the host may read what the tensors hold. run(d, rows of k_rope that turn chooses from) starts the work.
template <class Run>
std::tuple<Tensor, Tensor> attn_decode_on(
    const Tensor& q, const Tensor& k, const Tensor& v, FASTPE_ATTN_PARAMS, const OptTensor& pages, const OptTensor& lengths, const OptTensor& list,
    const OptTensor& turn, const std::vector<Tensor>& more, bool look, Run&& run) {
  const char* op = "attn_decode";
  const AttnArgs a{q, k, v, FASTPE_ATTN_VALUES};
  const Call c{op, q};
  KeyStore store;
  DecodeParams d;
  check(op, q.dim() == 4, "q must have 4 axes (batch, head, token, channel), got ", shape_of(q));
  check(op, !pages || (lengths && !list), "pages go with lengths and without a list");
  check(op, !lengths || pages, "lengths go with pages");
  check(op, !turn || (list && k_rope), "turn goes with list and k_rope");
  store.paged = pages.has_value();
  if (pages) {
    d.lengths = read_ints(c, "lengths", *lengths);
    check_shape(c, "lengths", *lengths, {{q.size(0)}});
    check(op, k.dim() == 4 && pages->dim() == 2, "k must have 4 axes and pages 2, got ", shape_of(k), " and ", shape_of(*pages));
    const int64_t room = pages->size(1) * k.size(2);
    store.keys = look ? most_keys(c, d.lengths, q.size(0), q.size(2)) : keys_by_shape(a, room);
  }
  store.turned = turn.has_value();
  store.ready = q_rope && !k_rope;
  AttnParams p = read_attn(op, a, store);
  check(op, pos::decode_takes(p.bias), "bias_form ", bias_form, " with row, column or position arrays does not go with pages and lists");
  Tensor out = empty_in_order(q, p.B, p.H, p.Nq, p.Dv);
  Tensor lse = empty(q, {p.B, p.H, p.Nq}, aux_type(p.dtype));
  const int64_t turns = turn ? k_rope->size(3) : 0;
  if (!more.empty()) read_more(c, p, k, more, store, d);
  if (pages) read_pages(c, p, k, *pages, look, d);
  if (list) read_list(c, p, *list, turn, turns, look, d);
  if (lse.numel() > 0) {
    p.o = view(out, out.mutable_data_ptr());
    p.lse = lse.mutable_data_ptr();
    d.attn = p;
    run(d, turns);
  }
  return {out, lse};
}

}  // namespace fastpe::binding
