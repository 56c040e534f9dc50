// What one core can do at best: a loop of independent multiply-adds on registers, the yardstick of the benchmarks.
#include <ctime>

#include "gemm.h"
#include "kernels.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

// GFLOP/s of E's multiply-add on 24 (or 12) accumulators that never leave their registers.
template <class E>
__attribute__((noinline)) double mac_rate() {
  using V = Vec<typename E::S>;
  constexpr int kAcc = 6 * (kNV > 2 ? 4 : 2);
  alignas(64) typename E::U unit[V::kLanes] = {};
  typename E::S sink[V::kLanes];
  asm volatile("" : : "r"(unit) : "memory");  // what it holds is not known to the compiler
  const typename E::BVec a = E::load_b(unit), b = E::bcast(unit);
  double best = 0;
  for (int round = 0; round < 5; ++round) {
    V acc[kAcc];
#pragma GCC unroll 24
    for (int i = 0; i < kAcc; ++i) acc[i] = V(typename E::S(i));
    timespec t0, t1;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t0);
    constexpr int kSteps = 200000;
    for (int s = 0; s < kSteps; ++s) {
#pragma GCC unroll 24
      for (int i = 0; i < kAcc; ++i) acc[i] = E::mac(acc[i], a, b);
    }
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t1);
    V sum = acc[0];
    for (int i = 1; i < kAcc; ++i) sum = sum + acc[i];
    sum.store(sink);
    asm volatile("" : : "r"(sink) : "memory");
    const double s = double(t1.tv_sec - t0.tv_sec) + 1e-9 * double(t1.tv_nsec - t0.tv_nsec);
    const double rate = 2.0 * V::kLanes * E::kPack * kAcc * kSteps / s * 1e-9;
    if (rate > best) best = rate;
  }
  return best;
}

}  // namespace

double peak_gflops(DType type) {
  if (type == DType::f64) return mac_rate<OpF64>();
#if defined(__AVX512BF16__)
  if (type == DType::bf16) return mac_rate<OpBF16>();
#endif
  return mac_rate<OpF32>();
}

}  // namespace fastpe::cpu::FASTPE_ISA
