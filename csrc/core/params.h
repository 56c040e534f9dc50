// Plain structs that carry one call from the binding to a kernel. No torch, no ownership.
//
// Shapes follow scaled_dot_product_attention: q (B,H,Nq,D), k (B,Hk,Nk,D), v (B,Hk,Nk,Dv), H % Hk == 0.
// Strides count elements. A stride of 0 broadcasts that axis. "May be null" is said at the field.
// "aux" arrays hold float, or double when the call's dtype is f64; their last axis is contiguous unless said.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastpe {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

// The one list of bias forms is pos/bias_forms.def.
enum class BiasForm : int32_t {
#define FASTPE_BIAS_FORM(name, id, text) name = id,
#include "../pos/bias_forms.def"
#undef FASTPE_BIAS_FORM
};

enum class RopeLayout : int32_t { half = 0, interleaved = 1 };

// A (batch, head, token, channel) tensor whose channels are contiguous.
struct View {
  void* p = nullptr;
  int64_t sb = 0, sh = 0, sn = 0;
};

// A (batch, head, token) aux array, or (batch, head, token, x) with the last axis contiguous.
struct Aux {
  void* p = nullptr;  // may be null: not given
  int64_t sb = 0, sh = 0, sn = 0;
  explicit operator bool() const { return p != nullptr; }
};

// cos and sin, amplitude folded in: (B|1, H|1, N, J), J = rotary_dim / 2.
struct Rope {
  Aux cos, sin;    // null: no rotation
  int64_t sr = 0;  // from one region's table to the next; 0: one table for all regions
};

// Regions (pos/region.h): up to 3 sets of positions, one softmax.
enum class RegionKind : int32_t { none = 0, distance = 1, chunk = 2, key_set = 3, band = 4 };
constexpr int kMaxRegions = 3;
struct Region {
  RegionKind kind = RegionKind::none;
  int64_t size = 1;  // width, chunk or number of keys, at least 1 (key_set: at least 0)
};

struct Bias {
  BiasForm form = BiasForm::none;
  Aux params;      // rel_fn: (B|1,H|1,2) the two numbers of the form; token stride unused
  Aux gamma;       // rel_fn: row weight (B|1,H|1,Nq|1); may be null (1). fire: one over the row's normaliser
  Aux u;           // query positions (B|1,H|1,Nq); null: w at the query's index, or that index itself
  Aux w;           // key positions (B|1,H|1,Nk); null: the key's index. Table forms and fire: whole numbers. two_sided: (B|1,2H,Nk),
                   // H planes of the past, then H of the future; base likewise
  Aux base;        // double (B|1,H|1,ceil(Nk/128)): w[j] means w[j] + base[j/128]; null: 0. Only with u null
  Aux table;       // table forms: (1,H|1,L); fire: numerator by distance, (1,H|1,L)
  int64_t table_len = 0;
  // What follows can be added to any form. All of it may be null.
  Aux pieces;      // fire: three planes, sb apart, of (H|1,S): where a piece begins (ascending, the first -inf), slope, intercept
  int64_t pieces_len = 0;
  Aux omega;       // table forms: (1,H|1,table_len), multiplies the score by a function of the distance
  Aux rows, cols;  // (B,H,Nq,R) and (B,H,Nk,R): row i adds rows[i][index], key j adds cols[j][index]
  int64_t terms_len = 0;            // R
  const int32_t* index = nullptr;   // (2 M + 1) entry of rows, cols, row_e and col_e for the offset clamp(j - I, -M, M) + M; below 0: none
  int64_t index_len = 0;
  // Row i adds <row_q[i], row_e[index]>, key j adds <col_k[j], col_e[index]>: products formed tile by tile.
  Aux row_q, col_k;                 // (B|1,H|1,Nq,strip_d), (B|1,H|1,Nk,strip_d)
  Aux row_e, col_e;                 // (1,H|1,R,strip_d)
  int64_t strip_d = 0;
  Aux dense;       // (B|1,H|1,Nq|1,Nk|1): last axis contiguous, or broadcast (dense_sk 0)
  int64_t dense_sk = 0;
  // By pair of segments: the score is multiplied by factor[q_seg[i]][k_seg[j]] before everything else, pairs[..][..] is
  // added with the other biases. (B|1,H|1,Sq,Sk), last axis contiguous. Ids lie in [0, Sq) and [0, Sk).
  Aux factor, pairs;
  const int32_t *q_seg = nullptr, *k_seg = nullptr;  // (B|1,Nq), (B|1,Nk)
  int64_t q_seg_sb = 0, k_seg_sb = 0, Sq = 0, Sk = 0;
};

// visible(i, j), with I = i + Nk - Nq:
//   (right <= 0 or j - I < right) and (left <= 0 or I - j < left or j < sinks)
//   and (no ids or (k_id[j] >= 0 and q_id[i] == k_id[j])) and (no mask or mask[i][j])
//   and (no intervals or a1[j] <= I < b1[j] or a2[j] <= I < b2[j]) and (no lower or j >= lower[i])
//   and (no segments or relation[q_seg[i]][k_seg[j]]) and (no block map or map[i / block_q][j / block_k])
struct Visibility {
  int64_t left = 0;    // window to the past including the own key; 0: unlimited
  int64_t right = 0;   // 1: causal; 0: unlimited
  int64_t sinks = 0;   // first keys that stay visible outside the left window
  const int32_t* q_ids = nullptr;  // (B|1,Nq)
  const int32_t* k_ids = nullptr;  // (B|1,Nk)
  int64_t q_ids_sb = 0, k_ids_sb = 0;
  const uint8_t* mask = nullptr;   // bool (B|1,H|1,Nq|1,Nk|1)
  int64_t mask_sb = 0, mask_sh = 0, mask_sn = 0, mask_sk = 0;
  const int32_t* intervals = nullptr;  // (B|1,4,Nk): planes a1, b1, a2, b2, Nk apart
  const int32_t* lower = nullptr;      // (B|1,Nq)
  int64_t intervals_sb = 0, lower_sb = 0;
  const int32_t *q_seg = nullptr, *k_seg = nullptr;  // (B|1,Nq) in [0, Sq), (B|1,Nk) in [0, Sk)
  int64_t q_seg_sb = 0, k_seg_sb = 0, Sq = 0, Sk = 0;
  const uint8_t* relation = nullptr;   // bool (Sq,Sk) contiguous
  const uint8_t* map = nullptr;        // bool (B|1,H|1,ceil(Nq/block_q),ceil(Nk/block_k)), last axis contiguous
  int64_t map_sb = 0, map_sh = 0, map_sn = 0, block_q = 1, block_k = 1;
};

struct AttnParams {
  DType dtype = DType::f32;
  int64_t B = 0, H = 0, Hk = 0, Nq = 0, Nk = 0, D = 0, Dv = 0;
  View q, k, v, o;
  View residual;           // what rounding o to 16 bits took away, in the same type; p may be null: not kept
  void* lse = nullptr;     // (B,H,Nq) float (double for f64), contiguous
  double scale = 1;
  Rope q_rope, k_rope;     // both or neither; with regions both, q_rope one table a region, k_rope one or one a region
                           // (few queries: q_rope alone where keys are stored turned)
  Region region;
  int64_t rope_pairs = 0;  // J
  RopeLayout rope_layout = RopeLayout::half;
  Bias bias;
  Visibility vis;
  Aux row_scale;           // (B|1,H|1,Nq|1); may be null (1)
  Aux sink;                // (1,H|1,1) extra logit of the denominator; may be null
  double softcap = 0;      // C > 0: x = softcap_mul * tanh(x / C)
  double softcap_mul = 0;
  bool softcap_bias = false;  // x = softcap_mul * tanh((x + bias) / C)
  double skip_eps = 0;     // bound on the probability a row may lose to skipped tiles; 0: skip none
};

// Attention in which every row of keys is read once for all rows that share it: few queries, or a list of keys a row.
// bias must be one that decode_takes (pos/bias.h).
struct DecodeParams {
  AttnParams attn;
  // With q_rope alone the keys are stored turned: attn.k for all regions, or for the first, and more[x - 1] for region x.
  View more[kMaxRegions - 1];        // p may be null: not given
  // Keys and values in pages: attn.k and attn.v are pools (pages, Hk, page_size, D), and key j of batch b lies in row
  // j % page_size of page pages[b][j / page_size]. page_size is a multiple of 16.
  const int32_t* pages = nullptr;    // (B, ceil(Nk / page_size)); null: attn.k and attn.v hold the keys in order
  int64_t pages_sb = 0, page_size = 0;
  const int32_t* lengths = nullptr;  // (B) keys of each batch, Nq..Nk, and I = i + lengths[b] - Nq; null: Nk
  // Lists: row i of head h attends to the keys list[b][h][i][..], -1 for none. Regions do not go with lists.
  const int32_t* list = nullptr;     // (B|1, Hk|H|1, Nq|1, list_len); null: all keys
  int64_t list_sb = 0, list_sh = 0, list_sn = 0, list_len = 0;
  bool list_by_head = false;         // its heads are those of q
  const int32_t* turn = nullptr;     // beside each entry of list the row of k_rope that turns the key; null: the key's index
  int64_t turn_sb = 0, turn_sh = 0, turn_sn = 0;
};

// What the backward pass is asked for, a bit set.
enum Needs : int64_t {
  need_q = 1 << 0, need_k = 1 << 1, need_v = 1 << 2,
  need_params = 1 << 3, need_gamma = 1 << 4, need_u = 1 << 5, need_w = 1 << 6, need_table = 1 << 7,
  need_row_scale = 1 << 8, need_pieces = 1 << 9, need_omega = 1 << 10, need_rows = 1 << 11, need_cols = 1 << 12, need_dense = 1 << 13,
  need_factor = 1 << 14, need_pairs = 1 << 15,
  need_row_q = 1 << 16, need_row_e = 1 << 17, need_col_k = 1 << 18, need_col_e = 1 << 19,
};

// Gradients. Pointers of what is not needed are null. dq/dk/dv have the inputs' dtype and dense (B,H,N,D) or
// (B,N,H,D) strides; the rest is float (double for f64), contiguous, with the broadcast shape of its input.
struct AttnBwdParams {
  AttnParams fwd;          // o and lse are inputs here
  View d_o;
  // fwd.residual, where kept: delta_i = <dO_i, O_i> is then exact to 16 more bits. A rounded delta leaves row sums of
  // dS that are not zero, and gradients that weigh dS by distance amplify them (2 to 4 times the error of eager torch).
  const void* dlse = nullptr;  // (B,H,Nq) contiguous; may be null (0)
  View dq, dk, dv;
  int64_t needs = 0;
  void *dparams = nullptr, *dgamma = nullptr, *du = nullptr, *dw = nullptr, *dtable = nullptr, *drow_scale = nullptr;
  void *dpieces = nullptr, *domega = nullptr, *drows = nullptr, *dcols = nullptr, *ddense = nullptr;
  void *dfactor = nullptr, *dpairs = nullptr;
  void *drow_q = nullptr, *drow_e = nullptr, *dcol_k = nullptr, *dcol_e = nullptr;
};

// Attention whose bias counts gates: bias.md 3.8 and 4. With a_ij the gate logit of a visible pair (times gate_scale),
//   table:      p_ij = min(sum over t >= j of sigmoid(a_it), npos - 1), b_ij = table_scale * (z_i at p_ij, linear between
//               its entries), z_i = q_i table
//   no table:   b_ij = table_scale * sum over j <= t < I of log sigmoid(a_it)
// attn.vis must be causal (right = 1); attn.bias, row_scale, softcap and skip_eps are not used.
struct CopeParams {
  AttnParams attn;
  View gate_q;             // (B,H,Nq,G); p may be null: q
  View gate_k;             // (B,Hk,Nk,G); p may be null: k, whose products with q are the gate logits
  int64_t G = 0;           // D where gate_q is null
  const void* table = nullptr;  // (D,npos) aux, contiguous; may be null
  int64_t npos = 0;
  double gate_scale = 1, table_scale = 1;
  // What the scan has counted to the right of each key tile: aux (B, H, query blocks, key tiles, 2, kBlockQ), the count
  // and what rounding took from it. 8 bytes for each kCopeBlockK scores of a row. Forward: may be null, not kept.
  void* carry = nullptr;
};
constexpr int64_t kCopeBlockK = 64;

enum CopeNeeds : int64_t { cope_need_q = 1, cope_need_k = 2, cope_need_v = 4, cope_need_gate_q = 8, cope_need_gate_k = 16, cope_need_table = 32 };

// Gradients, laid out as in AttnBwdParams.
struct CopeBwdParams {
  CopeParams fwd;
  View d_o;
  const void* dlse = nullptr;
  View dq, dk, dv, dgate_q, dgate_k;
  void* dtable = nullptr;
  int64_t needs = 0;
};

// What attention gives every key, or the probabilities or logits of the last rows: chunked.md M6. fwd.lse is an input (not
// read for logits), fwd.v, o and sink are not used. Either mass or rows_out is given.
struct MassParams {
  AttnParams fwd;
  Aux weights;                 // (B|1,H|1,Nq) factor of a row; may be null (1)
  void* mass = nullptr;        // aux (B,H,Nk) contiguous: sum over i of weights_i P_ij
  void* rows_out = nullptr;    // aux (B,H,rows,Nk) contiguous
  int64_t rows = 0;            // last rows of the queries
  bool logits = false;         // scores, -inf where hidden, instead of probabilities
};

// Attention with a softmax of two levels: chunked.md 3.10. attn must be causal and without bias, row scale, softcap, sink.
struct LandmarkParams {
  AttnParams attn;
  const uint8_t* is_landmark = nullptr;  // bool (B|1,Nk)
  int64_t landmark_sb = 0;
  const uint8_t* visible = nullptr;      // bool (B|1,Nk), keys that are not padding; may be null (all)
  int64_t visible_sb = 0;
};

// Gradients as in AttnBwdParams; needs: need_q, need_k, need_v.
struct LandmarkBwdParams {
  LandmarkParams fwd;
  View d_o;
  const void* dlse = nullptr;            // (B,H,Nq) contiguous; may be null (0)
  View dq, dk, dv;
  int64_t needs = 0;
};

// Partial attentions over disjoint sets of keys, joined: chunked.md M3. With factors c_p and L_p the parts' lse,
//   L = log sum_p exp(c_p L_p),  w_p = exp(c_p L_p - L),  out = sum_p w_p o_p.
// A part whose L_p is -inf has no share, whatever its o_p holds; a row of such parts gives out 0, L -inf.
struct MergeParams {
  DType dtype = DType::f32;
  int64_t P = 0, B = 0, H = 0, N = 0, Dv = 0;
  const View* o = nullptr;          // P of (B,H,N,Dv)
  const Aux* lse = nullptr;         // P of (B,H,N)
  const double* factor = nullptr;   // P, positive
  View out;
  void* out_lse = nullptr;          // aux (B,H,N), contiguous
};

// d o_p = w_p d_out,  d L_p = c_p w_p (d_lse + <d_out, o_p - out>).
struct MergeBwdParams {
  MergeParams fwd;                  // out and out_lse are not read
  View d_out;                       // p may be null (0)
  const void* d_lse = nullptr;      // aux (B,H,N), contiguous; may be null (0)
  const View* d_o = nullptr;        // P; may be null: not needed
  void* d_lse_p = nullptr;          // aux (P,B,H,N), contiguous; may be null: not needed
};

// y = rotate(x), x and y (B,H,N,D) of one dtype; y may be x.
struct RotateParams {
  DType dtype = DType::f32;
  int64_t B = 0, H = 0, N = 0, D = 0, J = 0;
  View x, y;
  Rope rope;
  RopeLayout layout = RopeLayout::half;
  bool inverse = false;
};

// Tables of cos and sin from positions and inverse frequencies; rope.md 1.1 and 7.
struct RopeTableParams {
  bool out_f64 = false;
  int64_t A = 0, B = 0, H = 0, N = 0, J = 0;
  const double* positions = nullptr;  // (A,B,N) contiguous
  const double* inv_freq = nullptr;   // (A,H,J) contiguous, radians per position
  bool float32_product = false;       // the product published checkpoints were trained with
  double amplitude = 1;
  void *cos = nullptr, *sin = nullptr;  // (B,H,N,J) contiguous
};

// Anchored prefix sums: local (rows,N) inside blocks of 128, base (rows,ceil(N/128)) double; bias.md 2.3.
constexpr int64_t kPrefixBlock = 128;
struct PrefixParams {
  bool f64 = false;  // type of x and local
  int64_t rows = 0, N = 0;
  const void* x = nullptr;  // (rows,N) contiguous
  void* local = nullptr;    // forward output; the plain sum (one number a token) when base is null
  double* base = nullptr;
  bool reverse = false;     // sum over t >= n
};

// How a kernel asks its host for threads and memory.
struct Runtime {
  int threads = 1;
  // Calls fn(ctx, task, worker) once for every task in [0, tasks); worker in [0, threads). Order is free.
  void (*parallel)(int64_t tasks, void (*fn)(void* ctx, int64_t task, int worker), void* ctx) = nullptr;
  void* (*alloc)(size_t bytes) = nullptr;  // 64-byte aligned, uninitialised; never null (throws)
  void (*release)(void*) = nullptr;
};

// What a call did, counted by the kernels when switched on.
struct TileStats {
  int64_t visited = 0;       // tiles whose products were computed
  int64_t hidden = 0;        // tiles without a visible pair, never touched
  int64_t decayed = 0;       // tiles skipped under the bound skip_eps
  int64_t block_q = 0, block_k = 0;

  // Adds the tiles that a task met; tasks may add at the same time.
  void add(int64_t visited_, int64_t hidden_, int64_t decayed_) {
    __atomic_fetch_add(&visited, visited_, __ATOMIC_RELAXED);
    __atomic_fetch_add(&hidden, hidden_, __ATOMIC_RELAXED);
    __atomic_fetch_add(&decayed, decayed_, __ATOMIC_RELAXED);
  }
};

}  // namespace fastpe
