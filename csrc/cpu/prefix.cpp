// Sums along the sequence, one row a task. Every sum is formed in float64 and rounded once, where it is stored.
#include "../core/params.h"
#include "kernels.h"
#include "simd.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

// Anchored: sums inside blocks of kPrefixBlock, and what came before each block.
template <class S>
void prefix_row(const S* x, S* local, double* base, int64_t N, bool reverse) {
  double before = 0;
  const int64_t blocks = (N + kPrefixBlock - 1) / kPrefixBlock;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t b = reverse ? blocks - 1 - i : i;
    const int64_t lo = b * kPrefixBlock, hi = lo + kPrefixBlock < N ? lo + kPrefixBlock : N;
    double sum = 0;
    for (int64_t t = 0; t < hi - lo; ++t) {
      const int64_t n = reverse ? hi - 1 - t : lo + t;
      sum += double(x[n]);
      local[n] = S(sum);
    }
    base[b] = before;
    before += sum;
  }
}

template <class S>
void plain_row(const S* x, S* y, int64_t N, bool reverse) {
  double sum = 0;
  for (int64_t t = 0; t < N; ++t) {
    const int64_t n = reverse ? N - 1 - t : t;
    sum += double(x[n]);
    y[n] = S(sum);
  }
}

template <class S>
void prefix_task(void* ctx, int64_t row, int) {
  const PrefixParams& p = *static_cast<const PrefixParams*>(ctx);
  const S* x = static_cast<const S*>(p.x) + row * p.N;
  S* y = static_cast<S*>(p.local) + row * p.N;
  if (p.base)
    prefix_row(x, y, p.base + row * ((p.N + kPrefixBlock - 1) / kPrefixBlock), p.N, p.reverse);
  else
    plain_row(x, y, p.N, p.reverse);
}

}  // namespace

void prefix_sum(const PrefixParams& p, const Runtime& rt) {
  rt.parallel(p.rows, p.f64 ? prefix_task<double> : prefix_task<float>, const_cast<PrefixParams*>(&p));
}

}  // namespace fastpe::cpu::FASTPE_ISA
