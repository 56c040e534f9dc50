// Rotary tables, and rotation of whole tensors.
//
// rope_table: a task is a block of token rows of one (batch, head); a row's phases are formed lane by lane in the loop
// over pairs, which the compiler turns into vectors.
// rotate: x streams through once, at the speed of a copy, while the part of the tables it needs stays in L1 or L2.
#include "../core/params.h"
#include "../pos/rotate.h"
#include "kernels.h"
#include "turn.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

// ---- tables -----------------------------------------------------------------------------------------------------

constexpr int64_t kTableRows = 32;
constexpr int64_t kPhases = 64;  // pairs whose phases are held at once

struct TableJob {
  const RopeTableParams* p;
  // (A,H,J): frequencies in turns as a sum of two, or, for the float32 product, in radians and unused.
  const float *w_hi, *w_lo;
  int64_t blocks;
};

// The phases of pairs of one row, structure of arrays for the vectoriser.
struct Phases {
  float rest[kPhases], quarters[kPhases];
};

FASTPE_INLINE void exact_phases(const TableJob& job, int64_t b, int64_t h, int64_t n, int64_t j0, int64_t len, Phases& out) {
  const RopeTableParams& p = *job.p;
  for (int64_t j = 0; j < len; ++j) out.rest[j] = out.quarters[j] = 0;
  for (int64_t a = 0; a < p.A; ++a) {
    const pos::Split x = pos::split(p.positions[(a * p.B + b) * p.N + n]);
    const float* __restrict hi = job.w_hi + (a * p.H + h) * p.J + j0;
    const float* __restrict lo = job.w_lo + (a * p.H + h) * p.J + j0;
    for (int64_t j = 0; j < len; ++j) {
      pos::Phase<float> f{out.rest[j], out.quarters[j]};
      pos::add_phase(f, x, {hi[j], lo[j]});
      out.rest[j] = f.rest;
      out.quarters[j] = f.quarters;
    }
  }
}
FASTPE_INLINE void product_phases(const TableJob& job, int64_t b, int64_t h, int64_t n, int64_t j0, int64_t len, Phases& out) {
  const RopeTableParams& p = *job.p;
  float angle[kPhases] = {};
  for (int64_t a = 0; a < p.A; ++a) {
    const double x = p.positions[(a * p.B + b) * p.N + n];
    const float* __restrict w = job.w_hi + (a * p.H + h) * p.J + j0;
    for (int64_t j = 0; j < len; ++j) angle[j] += pos::float32_angle(x, w[j]);
  }
  for (int64_t j = 0; j < len; ++j) {
    pos::Phase<float> f;
    pos::add_radians(f, angle[j]);
    out.rest[j] = f.rest;
    out.quarters[j] = f.quarters;
  }
}

void table_row_f32(const TableJob& job, int64_t b, int64_t h, int64_t n, float* __restrict c, float* __restrict s) {
  const RopeTableParams& p = *job.p;
  const float m = float(p.amplitude);
  Phases phases;
  for (int64_t j0 = 0; j0 < p.J; j0 += kPhases) {
    const int64_t len = p.J - j0 < kPhases ? p.J - j0 : kPhases;
    if (p.float32_product)
      product_phases(job, b, h, n, j0, len, phases);
    else
      exact_phases(job, b, h, n, j0, len, phases);
    for (int64_t j = 0; j < len; ++j) {
      float cj, sj;
      pos::cos_sin({phases.rest[j], phases.quarters[j]}, cj, sj);
      c[j0 + j] = m * cj;
      s[j0 + j] = m * sj;
    }
  }
}

void table_row_f64(const RopeTableParams& p, int64_t b, int64_t h, int64_t n, double* __restrict c, double* __restrict s) {
  for (int64_t j = 0; j < p.J; ++j) {
    double exact = 0;
    float product = 0;
    for (int64_t a = 0; a < p.A; ++a) {
      const double x = p.positions[(a * p.B + b) * p.N + n], w = p.inv_freq[(a * p.H + h) * p.J + j];
      exact += pos::float64_angle(x, w);
      product += pos::float32_angle(x, w);
    }
    const double angle = p.float32_product ? double(product) : exact;
    c[j] = p.amplitude * __builtin_cos(angle);
    s[j] = p.amplitude * __builtin_sin(angle);
  }
}

void table_task(void* ctx, int64_t task, int) {
  const TableJob& job = *static_cast<const TableJob*>(ctx);
  const RopeTableParams& p = *job.p;
  const int64_t bh = task / job.blocks, n0 = task % job.blocks * kTableRows;
  const int64_t n1 = n0 + kTableRows < p.N ? n0 + kTableRows : p.N;
  for (int64_t n = n0; n < n1; ++n) {
    const int64_t b = bh / p.H, h = bh % p.H, at = (bh * p.N + n) * p.J;
    if (p.out_f64)
      table_row_f64(p, b, h, n, static_cast<double*>(p.cos) + at, static_cast<double*>(p.sin) + at);
    else
      table_row_f32(job, b, h, n, static_cast<float*>(p.cos) + at, static_cast<float*>(p.sin) + at);
  }
}

}  // namespace

void rope_table(const RopeTableParams& p, const Runtime& rt) {
  const int64_t freqs = p.A * p.H * p.J;
  float* w = static_cast<float*>(rt.alloc(size_t(2 * freqs) * sizeof(float)));
  for (int64_t i = 0; i < freqs; ++i) {
    const pos::Split t = p.float32_product ? pos::Split{float(p.inv_freq[i]), 0} : pos::frequency_in_turns(p.inv_freq[i]);
    w[i] = t.hi;
    w[freqs + i] = t.lo;
  }
  TableJob job{&p, w, w + freqs, (p.N + kTableRows - 1) / kTableRows};
  rt.parallel(p.B * p.H * job.blocks, table_task, &job);
  rt.release(w);
}

namespace {

// ---- rotation ---------------------------------------------------------------------------------------------------
// From here on an output does not stay in L2 between its rotation and its use. Measured out of place at 33 MiB:
// 1.2 to 1.4 times faster.
constexpr int64_t kStreamBytes = int64_t(8) << 20;

// Calls from here on read x from memory, or from a third-level cache shared with others. Beside the two streams of the
// tables, which are in cache, the processor's own prefetcher follows x badly: tensors beyond the L3 ran at 14 GB/s
// without asking for what lies a page ahead, and at 36 with it. What is nearer loses by asking: 4 MiB of q and k took
// 1.1 to 1.3 times as long.
constexpr int64_t kPrefetchBytes = int64_t(8) << 20;
FASTPE_INLINE void prefetch_row(const void* row, int64_t bytes) {
  const char* ahead = static_cast<const char*>(row) + 4096;
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(ahead + at, 1);
}

constexpr int64_t size_of(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : 2; }

// Heads turned together by one read of the table's row. Measured at S1 to S3: float32 1.04 to 1.17 times faster than one
// head after the other; 16-bit types, whose conversions fill the registers, are slower.
constexpr int together(int64_t size) { return size >= 4 ? 2 : 1; }

// Where a row lies, and how far it is to the next in every array.
template <class E>
struct Line {
  const typename E::T* x;
  typename E::T* y;
  const typename E::S *c, *s;
  int64_t dx, dy, dc, ds;
};

// `count` steps along a line of G heads, which are gx and gy apart. Pointers move: forming each row's address from its
// indices took a third of the time of bf16 rows of 64.
template <class E, RopeLayout L, bool Inverse, bool Stream, bool Prefetch, int G>
FASTPE_INLINE void rotate_line(Line<E> at, int64_t count, int64_t gx, int64_t gy, int64_t J, int64_t D) {
  using T = typename E::T;
  const int64_t tail = D - 2 * J;
  const bool in_place = at.x == at.y, copy_tail = !in_place && tail > 0;
  for (; count > 0; --count, at.x += at.dx, at.y += at.dy, at.c += at.dc, at.s += at.ds) {
    if constexpr (Prefetch) {
      for (int g = 0; g < G; ++g) {
        prefetch_row(at.x + g * gx, D * int64_t(sizeof(T)));
        if (!in_place && !Stream) prefetch_row(at.y + g * gy, D * int64_t(sizeof(T)));
      }
    }
    rotate_rows_to<E, E, L, Inverse, Stream, G>(at.x, gx, at.y, gy, at.c, at.s, J);
    if (copy_tail)
      for (int g = 0; g < G; ++g) std::memcpy(at.y + g * gy + 2 * J, at.x + g * gx + 2 * J, size_t(tail) * sizeof(T));
  }
}

// Tokens [n0, n1) of heads [h0, h1) of batch row b; the axis whose steps are shorter in memory runs inside.
template <class E, RopeLayout L, bool Inverse, bool Stream>
void rotate_block(const RotateParams& p, bool prefetch, int64_t b, int64_t h0, int64_t h1, int64_t n0, int64_t n1) {
  using T = typename E::T;
  using S = typename E::S;
  constexpr int G = together(sizeof(T));
  const Aux &cos = p.rope.cos, &sin = p.rope.sin;
  const auto line = [&](int64_t h, int64_t n) {
    return Line<E>{static_cast<const T*>(p.x.p) + b * p.x.sb + h * p.x.sh + n * p.x.sn, static_cast<T*>(p.y.p) + b * p.y.sb + h * p.y.sh + n * p.y.sn,
                   static_cast<const S*>(cos.p) + b * cos.sb + h * cos.sh + n * cos.sn, static_cast<const S*>(sin.p) + b * sin.sb + h * sin.sh + n * sin.sn,
                   p.x.sn, p.y.sn, cos.sn, sin.sn};
  };
  const int64_t grouped = cos.sh == 0 && sin.sh == 0 ? h0 + (h1 - h0) / G * G : h0;
  if (p.x.sh < p.x.sn) {
    for (int64_t n = n0; n < n1; ++n) {
      Line<E> at = line(h0, n);
      at.dx = G * p.x.sh, at.dy = G * p.y.sh, at.dc = at.ds = 0;
      rotate_line<E, L, Inverse, Stream, false, G>(at, (grouped - h0) / G, p.x.sh, p.y.sh, p.J, p.D);
      at = line(grouped, n);
      at.dx = p.x.sh, at.dy = p.y.sh, at.dc = cos.sh, at.ds = sin.sh;
      rotate_line<E, L, Inverse, Stream, false, 1>(at, h1 - grouped, 0, 0, p.J, p.D);
    }
  } else {
    const auto run = [&]<bool Prefetch>() {
      for (int64_t h = h0; h < grouped; h += G) rotate_line<E, L, Inverse, Stream, Prefetch, G>(line(h, n0), n1 - n0, p.x.sh, p.y.sh, p.J, p.D);
      for (int64_t h = grouped; h < h1; ++h) rotate_line<E, L, Inverse, Stream, Prefetch, 1>(line(h, n0), n1 - n0, 0, 0, p.J, p.D);
    };
    if (prefetch) run.template operator()<true>();
    else run.template operator()<false>();
  }
  if constexpr (Stream) stream_done();
}

// How one tensor is cut into tasks: (batch row, block of tokens, group of heads), the last fastest.
struct Cut {
  int64_t tokens, heads;
  int64_t token_blocks, head_groups;
};
Cut cut(const RotateParams& p) {
  const int64_t table_row = 2 * p.J * (p.dtype == DType::f64 ? 8 : 4);
  // Tokens outside: the table's row serves all heads from L1. Heads outside: long runs of one head, so that memory is
  // read in order, and a part of the table that stays in L2 from head to head.
  const bool heads_inside = p.x.sh < p.x.sn;
  const int64_t budget = heads_inside ? 16 << 10 : 128 << 10;
  int64_t tokens = table_row > 0 ? budget / table_row : p.N;
  if (tokens < 8) tokens = 8;
  if (tokens > p.N) tokens = p.N;
  const int64_t heads = heads_inside ? p.H : together(size_of(p.dtype));
  return {tokens, heads, (p.N + tokens - 1) / tokens, (p.H + heads - 1) / heads};
}

constexpr int kMaxTensors = 2;
struct RotateJob {
  const RotateParams* p;
  int count;
  Cut cut[kMaxTensors];
  int64_t first_task[kMaxTensors + 1];  // of each tensor, and the end
  bool prefetch;
};

// Large, out of place, and every vector aligned.
template <class E>
bool streams(const RotateParams& p) {
  constexpr int64_t size = int64_t(sizeof(typename E::T)), vector = size * Vec<typename E::S>::kLanes;
  if (p.x.p == p.y.p || p.B * p.H * p.N * p.D * size < kStreamBytes || kVecBytes < 32) return false;
  const int64_t places = int64_t(reinterpret_cast<uintptr_t>(p.y.p)) | p.y.sb * size | p.y.sh * size | p.y.sn * size | p.J * size;
  return places % vector == 0;
}

template <class E>
FASTPE_INLINE void rotate_any(const RotateParams& p, bool prefetch, int64_t b, int64_t h0, int64_t h1, int64_t n0, int64_t n1) {
  const auto run = [&]<bool Inverse, bool Stream>() {
    if (p.layout == RopeLayout::half) rotate_block<E, RopeLayout::half, Inverse, Stream>(p, prefetch, b, h0, h1, n0, n1);
    else rotate_block<E, RopeLayout::interleaved, Inverse, Stream>(p, prefetch, b, h0, h1, n0, n1);
  };
  if (streams<E>(p)) {
    if (p.inverse) run.template operator()<true, true>();
    else run.template operator()<false, true>();
  } else {
    if (p.inverse) run.template operator()<true, false>();
    else run.template operator()<false, false>();
  }
}

void rotate_task(void* ctx, int64_t task, int) {
  const RotateJob& job = *static_cast<const RotateJob*>(ctx);
  const int t = job.count > 1 && task >= job.first_task[1] ? 1 : 0;
  const RotateParams& p = job.p[t];
  const Cut& c = job.cut[t];
  task -= job.first_task[t];
  const int64_t h0 = task % c.head_groups * c.heads;
  const int64_t n0 = task / c.head_groups % c.token_blocks * c.tokens;
  const int64_t b = task / c.head_groups / c.token_blocks;
  const int64_t h1 = h0 + c.heads < p.H ? h0 + c.heads : p.H, n1 = n0 + c.tokens < p.N ? n0 + c.tokens : p.N;
  switch (p.dtype) {
    case DType::f32: rotate_any<F32>(p, job.prefetch, b, h0, h1, n0, n1); break;
    case DType::bf16: rotate_any<BF16>(p, job.prefetch, b, h0, h1, n0, n1); break;
    case DType::f16: rotate_any<F16>(p, job.prefetch, b, h0, h1, n0, n1); break;
    case DType::f64: rotate_any<F64>(p, job.prefetch, b, h0, h1, n0, n1); break;
  }
}

}  // namespace

void rotate(const RotateParams* p, int count, const Runtime& rt) {
  for (; count > 0; p += kMaxTensors, count -= kMaxTensors) {
    RotateJob job{p, count < kMaxTensors ? count : kMaxTensors, {}, {}, false};
    int64_t bytes = 0;
    for (int t = 0; t < job.count; ++t) {
      bytes += p[t].B * p[t].H * p[t].N * p[t].D * size_of(p[t].dtype);
      job.cut[t] = cut(p[t]);
      job.first_task[t + 1] = job.first_task[t] + p[t].B * job.cut[t].token_blocks * job.cut[t].head_groups;
    }
    job.prefetch = bytes >= kPrefetchBytes;
    rt.parallel(job.first_task[job.count], rotate_task, &job);
  }
}

}  // namespace fastpe::cpu::FASTPE_ISA
