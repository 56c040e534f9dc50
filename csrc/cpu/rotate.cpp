// Rotary tables, and rotation of whole tensors.
//
// rope_table: a task is a block of token rows of one (batch, head); a row's phases are formed lane by lane in the loop
// over pairs, which the compiler turns into vectors.
// rotate: a task is (tensor, batch, block of tokens) and runs over all heads, so that the block of the tables (at most
// 16 KiB when the heads share it) stays in L1 while x streams through once.
#include "../core/params.h"
#include "../pos/rotate.h"
#include "kernels.h"
#include "simd.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

// ---- tables -----------------------------------------------------------------------------------------------------

constexpr int64_t kTableRows = 32;

struct TableJob {
  const RopeTableParams* p;
  const float *w_hi, *w_lo;  // (A,H,J) frequencies in turns; only the exact float32 mode reads them
  int64_t blocks;
};

void table_row_exact(const RopeTableParams& p, const TableJob& job, int64_t b, int64_t h, int64_t n, float* __restrict c, float* __restrict s) {
  const float m = float(p.amplitude);
  constexpr int64_t kChunk = 64;
  pos::Phase<float> phase[kChunk];
  for (int64_t j0 = 0; j0 < p.J; j0 += kChunk) {
    const int64_t len = p.J - j0 < kChunk ? p.J - j0 : kChunk;
    for (int64_t a = 0; a < p.A; ++a) {
      const pos::Split x = pos::split(p.positions[(a * p.B + b) * p.N + n]);
      const float* __restrict hi = job.w_hi + (a * p.H + h) * p.J + j0;
      const float* __restrict lo = job.w_lo + (a * p.H + h) * p.J + j0;
      for (int64_t j = 0; j < len; ++j) {
        pos::Phase<float> f = a ? phase[j] : pos::Phase<float>{};
        pos::add_phase(f, x, {hi[j], lo[j]});
        phase[j] = f;
      }
    }
    for (int64_t j = 0; j < len; ++j) {
      float cj, sj;
      pos::cos_sin(phase[j], cj, sj);
      c[j0 + j] = m * cj;
      s[j0 + j] = m * sj;
    }
  }
}

void table_row_product(const RopeTableParams& p, int64_t b, int64_t h, int64_t n, float* __restrict c, float* __restrict s) {
  const float m = float(p.amplitude);
  for (int64_t j = 0; j < p.J; ++j) {
    float angle = 0;
    for (int64_t a = 0; a < p.A; ++a) angle += pos::float32_angle(p.positions[(a * p.B + b) * p.N + n], p.inv_freq[(a * p.H + h) * p.J + j]);
    pos::Phase<float> f;
    pos::add_radians(f, angle);
    float cj, sj;
    pos::cos_sin(f, cj, sj);
    c[j] = m * cj;
    s[j] = m * sj;
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
    else if (p.float32_product)
      table_row_product(p, b, h, n, static_cast<float*>(p.cos) + at, static_cast<float*>(p.sin) + at);
    else
      table_row_exact(p, job, b, h, n, static_cast<float*>(p.cos) + at, static_cast<float*>(p.sin) + at);
  }
}

void rope_table(const RopeTableParams& p, const Runtime& rt) {
  const int64_t freqs = p.A * p.H * p.J;
  float* w = static_cast<float*>(rt.alloc(size_t(2 * freqs) * sizeof(float)));
  for (int64_t i = 0; i < freqs; ++i) {
    const pos::Split t = pos::frequency_in_turns(p.inv_freq[i]);
    w[i] = t.hi;
    w[freqs + i] = t.lo;
  }
  TableJob job{&p, w, w + freqs, (p.N + kTableRows - 1) / kTableRows};
  rt.parallel(p.B * p.H * job.blocks, table_task, &job);
  rt.release(w);
}

// ---- rotation ---------------------------------------------------------------------------------------------------
// Element types: how a vector and a scalar of the computing type S come from memory and go back.

struct F32 {
  using T = float;
  using S = float;
  static FASTPE_INLINE VF load(const T* p) { return VF::load(p); }
  static FASTPE_INLINE void store(T* p, VF v) { v.store(p); }
  static FASTPE_INLINE S get(T x) { return x; }
  static FASTPE_INLINE T put(S x) { return x; }
};
struct F64 {
  using T = double;
  using S = double;
  static FASTPE_INLINE VD load(const T* p) { return VD::load(p); }
  static FASTPE_INLINE void store(T* p, VD v) { v.store(p); }
  static FASTPE_INLINE S get(T x) { return x; }
  static FASTPE_INLINE T put(S x) { return x; }
};
struct BF16 {
  using T = uint16_t;
  using S = float;
  static FASTPE_INLINE VF load(const T* p) { return load_bf16(p); }
  static FASTPE_INLINE void store(T* p, VF v) { store_bf16(p, v); }
  static FASTPE_INLINE S get(T x) { return bf16_to_float(x); }
  static FASTPE_INLINE T put(S x) { return float_to_bf16(x); }
};
struct F16 {
  using T = uint16_t;
  using S = float;
  static FASTPE_INLINE VF load(const T* p) { return load_f16(p); }
  static FASTPE_INLINE void store(T* p, VF v) { store_f16(p, v); }
  static FASTPE_INLINE S get(T x) { return f16_to_float(x); }
  static FASTPE_INLINE T put(S x) { return float_to_f16(x); }
};

// Lane choices for (x0, y0, x1, y1, ...) <-> (x0, x1, ...), (y0, y1, ...); the two vectors count as one of 2 L lanes.
template <class S>
struct Pairs {
  static constexpr int L = Vec<S>::kLanes;
  using V = Vec<S>;
  using I = typename V::RawInt;
  static FASTPE_INLINE V pick(V a, V b, I lanes) {
#if defined(__clang__)
    typename V::Raw r;
    for (int l = 0; l < L; ++l) r[l] = lanes[l] < L ? a.v[lanes[l]] : b.v[lanes[l] - L];
    return V(r);
#else
    return V(__builtin_shuffle(a.v, b.v, lanes));
#endif
  }
  template <class F>
  static FASTPE_INLINE I lanes(F f) {
    I r;
    for (int l = 0; l < L; ++l) r[l] = f(l);
    return r;
  }
  static FASTPE_INLINE V evens(V a, V b) { return pick(a, b, lanes([](int l) { return 2 * l; })); }
  static FASTPE_INLINE V odds(V a, V b) { return pick(a, b, lanes([](int l) { return 2 * l + 1; })); }
  static FASTPE_INLINE V zip_lo(V x, V y) { return pick(x, y, lanes([](int l) { return l / 2 + (l % 2) * L; })); }
  static FASTPE_INLINE V zip_hi(V x, V y) { return pick(x, y, lanes([](int l) { return (l + L) / 2 + (l % 2) * L; })); }
};

// One token of one head; y may be x. `sign` is -1 for the inverse rotation.
template <class E>
FASTPE_INLINE void rotate_half_row(const typename E::T* x, typename E::T* y, const typename E::S* c, const typename E::S* s, typename E::S sign, int64_t J) {
  using V = Vec<typename E::S>;
  int64_t j = 0;
  for (; j + V::kLanes <= J; j += V::kLanes) {
    V u = E::load(x + j), v = E::load(x + J + j);
    pos::rotate_pair(u, v, V::load(c + j), V(sign) * V::load(s + j));
    E::store(y + j, u);
    E::store(y + J + j, v);
  }
  for (; j < J; ++j) {
    typename E::S u = E::get(x[j]), v = E::get(x[J + j]);
    pos::rotate_pair(u, v, c[j], sign * s[j]);
    y[j] = E::put(u);
    y[J + j] = E::put(v);
  }
}
template <class E>
FASTPE_INLINE void rotate_interleaved_row(const typename E::T* x, typename E::T* y, const typename E::S* c, const typename E::S* s, typename E::S sign, int64_t J) {
  using S = typename E::S;
  using V = Vec<S>;
  using P = Pairs<S>;
  int64_t j = 0;
  for (; j + V::kLanes <= J; j += V::kLanes) {
    const V a = E::load(x + 2 * j), b = E::load(x + 2 * j + V::kLanes);
    V u = P::evens(a, b), v = P::odds(a, b);
    pos::rotate_pair(u, v, V::load(c + j), V(sign) * V::load(s + j));
    E::store(y + 2 * j, P::zip_lo(u, v));
    E::store(y + 2 * j + V::kLanes, P::zip_hi(u, v));
  }
  for (; j < J; ++j) {
    S u = E::get(x[2 * j]), v = E::get(x[2 * j + 1]);
    pos::rotate_pair(u, v, c[j], sign * s[j]);
    y[2 * j] = E::put(u);
    y[2 * j + 1] = E::put(v);
  }
}

struct RotateJob {
  const RotateParams* p;
  int count;
  int64_t first_task[3];  // of each tensor, and the end
  int64_t rows[2];        // tokens of a task
};
constexpr int kMaxTensors = 2;

template <class E>
void rotate_block(const RotateParams& p, int64_t b, int64_t n0, int64_t n1) {
  using T = typename E::T;
  using S = typename E::S;
  const S sign = p.inverse ? S(-1) : S(1);
  const int64_t tail = p.D - 2 * p.J;
  const bool copy_tail = p.x.p != p.y.p && tail > 0;
  const bool half = p.layout == RopeLayout::half;
  const auto row = [&](int64_t h, int64_t n) __attribute__((always_inline)) {
    const T* x = static_cast<const T*>(p.x.p) + b * p.x.sb + h * p.x.sh + n * p.x.sn;
    T* y = static_cast<T*>(p.y.p) + b * p.y.sb + h * p.y.sh + n * p.y.sn;
    const S* c = static_cast<const S*>(p.rope.cos.p) + b * p.rope.cos.sb + h * p.rope.cos.sh + n * p.rope.cos.sn;
    const S* s = static_cast<const S*>(p.rope.sin.p) + b * p.rope.sin.sb + h * p.rope.sin.sh + n * p.rope.sin.sn;
    if (half)
      rotate_half_row<E>(x, y, c, s, sign, p.J);
    else
      rotate_interleaved_row<E>(x, y, c, s, sign, p.J);
    if (copy_tail) std::memcpy(y + 2 * p.J, x + 2 * p.J, size_t(tail) * sizeof(T));
  };
  // The axis whose steps are shorter in memory runs inside.
  if (p.x.sh < p.x.sn) {
    for (int64_t n = n0; n < n1; ++n)
      for (int64_t h = 0; h < p.H; ++h) row(h, n);
  } else {
    for (int64_t h = 0; h < p.H; ++h)
      for (int64_t n = n0; n < n1; ++n) row(h, n);
  }
}

void rotate_task(void* ctx, int64_t task, int) {
  const RotateJob& job = *static_cast<const RotateJob*>(ctx);
  const int t = job.count > 1 && task >= job.first_task[1] ? 1 : 0;
  const RotateParams& p = job.p[t];
  const int64_t blocks = (p.N + job.rows[t] - 1) / job.rows[t];
  const int64_t local = task - job.first_task[t];
  const int64_t b = local / blocks, n0 = local % blocks * job.rows[t];
  const int64_t n1 = n0 + job.rows[t] < p.N ? n0 + job.rows[t] : p.N;
  switch (p.dtype) {
    case DType::f32: rotate_block<F32>(p, b, n0, n1); break;
    case DType::bf16: rotate_block<BF16>(p, b, n0, n1); break;
    case DType::f16: rotate_block<F16>(p, b, n0, n1); break;
    case DType::f64: rotate_block<F64>(p, b, n0, n1); break;
  }
}

void rotate(const RotateParams* p, int count, const Runtime& rt) {
  for (; count > 0; p += kMaxTensors, count -= kMaxTensors) {
    RotateJob job{p, count < kMaxTensors ? count : kMaxTensors, {0, 0, 0}, {1, 1}};
    for (int t = 0; t < job.count; ++t) {
      const int64_t table_row = 2 * p[t].J * (p[t].dtype == DType::f64 ? 8 : 4);
      const int64_t fit = 16384 / (table_row > 0 ? table_row : 1);
      job.rows[t] = fit < 8 ? 8 : fit;
      const int64_t blocks = (p[t].N + job.rows[t] - 1) / job.rows[t];
      job.first_task[t + 1] = job.first_task[t] + p[t].B * blocks;
    }
    rt.parallel(job.first_task[job.count], rotate_task, &job);
  }
}

}  // namespace
}  // namespace fastpe::cpu::FASTPE_ISA
