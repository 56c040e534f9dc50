// The one product of all kernels:  C[m][n] (+)= sum_k A[m][k] * B[k][n].
//
// A enters by broadcast in operand units, row-major or (At) with its rows m side by side, A[m][k] at a[k * lda + m]; B has its n axis in vector lanes. A unit is one scalar, or
// for bf16 a pair of neighbours in k packed into 32 bits, so that one vdpbf16ps does two steps of k and the loop is
// the same. The attention kernels keep queries (or channels) in the lanes, which leaves every softmax step vertical.
#pragma once

#include "simd.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

// Operand types of a product. S: score scalar, U: operand unit, kPack: scalars in a unit.
struct OpF32 {
  using S = float;
  using U = float;
  static constexpr int kPack = 1;
  using BVec = VF;
  static FASTPE_INLINE BVec load_b(const U* p) { return VF::load(p); }
  static FASTPE_INLINE BVec bcast(const U* p) { return VF(*p); }
  static FASTPE_INLINE VF mac(VF acc, BVec a, BVec b) { return fma(a, b, acc); }
};

struct OpF64 {
  using S = double;
  using U = double;
  static constexpr int kPack = 1;
  using BVec = VD;
  static FASTPE_INLINE BVec load_b(const U* p) { return VD::load(p); }
  static FASTPE_INLINE BVec bcast(const U* p) { return VD(*p); }
  static FASTPE_INLINE VD mac(VD acc, BVec a, BVec b) { return fma(a, b, acc); }
};

#if defined(__AVX512BF16__)
struct OpBF16 {
  using S = float;
  using U = uint32_t;
  static constexpr int kPack = 2;
  struct BVec { __m512i v; };
  static FASTPE_INLINE BVec load_b(const U* p) { return {_mm512_loadu_si512(p)}; }
  static FASTPE_INLINE BVec bcast(const U* p) { return {_mm512_set1_epi32(int(*p))}; }
  static FASTPE_INLINE VF mac(VF acc, BVec a, BVec b) {
    return VF(VF::Raw(_mm512_dpbf16_ps(__m512(acc.v), (__m512bh)a.v, (__m512bh)b.v)));
  }
};
#endif

// Memory that a later product reads. A product asks for it while it runs, the same number of lines a block, so that tiles from beyond
// the L1 are there in time: with 4096 keys of 64 channels, 2 MiB, both products of a tile ran at 0.66 of the FMA rate without and
// at 0.90 with it (AMD Zen 3; 0.92 where everything is in the L2).
class Upcoming {
 public:
  Upcoming() {}
  Upcoming(const void* p, int64_t bytes) : at_(static_cast<const char*>(p)), end_(at_ + bytes) {}
  // To be spread over so many blocks.
  Upcoming over(int64_t blocks) const {
    Upcoming r = *this;
    r.lines_ = blocks > 0 ? ((end_ - at_) / 64 + blocks - 1) / blocks : 0;
    return r;
  }
  FASTPE_INLINE void fetch() {
    for (int64_t n = 0; n < lines_ && at_ < end_; ++n, at_ += 64) __builtin_prefetch(at_);
  }

 private:
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t lines_ = 0;
};

template <class E, int MR, int NV, bool Acc, bool At, class Ld>
FASTPE_INLINE void micro(const typename E::U* a, int64_t lda, const typename E::U* b, Ld ldb, typename E::S* c, int64_t ldc, int64_t K) {
  using V = Vec<typename E::S>;
  constexpr int L = V::kLanes;
  V acc[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) acc[r][n] = Acc ? V::load(c + r * ldc + n * L) : V(typename E::S(0));
  // Four steps at a time, and a constant Ld: each instruction less counts where a core's other thread is busy too. Against two steps
  // and an addition a step the products were 1.05 (scores) to 1.1 times (sums over keys) as fast (AMD Zen 3).
#pragma GCC unroll 4
  for (int64_t k = 0; k < K; ++k) {
    typename E::BVec bv[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) bv[n] = E::load_b(b + k * ldb + n * L);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const typename E::BVec av = E::bcast(At ? a + k * lda + r : a + r * lda + k);
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) acc[r][n] = E::mac(acc[r][n], av, bv[n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) acc[r][n].store(c + r * ldc + n * L);
}

template <class E, int NV, bool Acc, bool At, class Ld>
__attribute__((noinline)) void gemm_cols(const typename E::U* a, int64_t lda, const typename E::U* b, Ld ldb, typename E::S* c, int64_t ldc, int64_t M, int64_t K, Upcoming next) {
  const int64_t step = At ? 1 : lda;
  int64_t m = 0;
  for (; m + 6 <= M; m += 6) {
    next.fetch();
    micro<E, 6, NV, Acc, At>(a + m * step, lda, b, ldb, c + m * ldc, ldc, K);
  }
  next.fetch();
  if (m + 4 <= M) { micro<E, 4, NV, Acc, At>(a + m * step, lda, b, ldb, c + m * ldc, ldc, K); m += 4; }
  if (m + 2 <= M) { micro<E, 2, NV, Acc, At>(a + m * step, lda, b, ldb, c + m * ldc, ldc, K); m += 2; }
  if (m < M) micro<E, 1, NV, Acc, At>(a + m * step, lda, b, ldb, c + m * ldc, ldc, K);
}

// Blocks of 6 rows, each over all columns. Two vectors are a quarter of a tile's row: column by column, A (16 KiB), a strip of B and one of
// C, both a line in every fourth, would ask for 12 ways of the 8 that a 32 KiB L1 has there.
template <class E, int NV, bool Acc, bool At, class Ld>
__attribute__((noinline)) void gemm_rows(const typename E::U* a, int64_t lda, const typename E::U* b, Ld ldb, typename E::S* c, int64_t ldc, int64_t M, int64_t N, int64_t K, Upcoming next) {
  constexpr int W = NV * Vec<typename E::S>::kLanes;
  const int64_t step = At ? 1 : lda;
  const auto rows = [&](auto count, int64_t m) {
    for (int64_t n = 0; n < N; n += W) {
      next.fetch();
      micro<E, decltype(count)::value, NV, Acc, At>(a + m * step, lda, b + n, ldb, c + m * ldc + n, ldc, K);
    }
    return m + decltype(count)::value;
  };
  int64_t m = 0;
  while (m + 6 <= M) m = rows(std::integral_constant<int, 6>{}, m);
  if (m + 4 <= M) m = rows(std::integral_constant<int, 4>{}, m);
  if (m + 2 <= M) m = rows(std::integral_constant<int, 2>{}, m);
  if (m < M) rows(std::integral_constant<int, 1>{}, m);
}

// N is a multiple of the vector length; K counts units. Ld: int64_t, or an integral_constant. `next`: what to ask for meanwhile.
template <class E, bool Acc, bool At = false, class Ld>
FASTPE_INLINE void gemm(const typename E::U* a, int64_t lda, const typename E::U* b, Ld ldb, typename E::S* c, int64_t ldc, int64_t M, int64_t N, int64_t K, const Upcoming& next = {}) {
  constexpr int L = Vec<typename E::S>::kLanes;
  const int64_t down = (M + 5) / 6;
  int64_t n = 0;
  if constexpr (kNV > 2) {
    for (; n + kNV * L <= N; n += kNV * L) gemm_cols<E, kNV, Acc, At>(a, lda, b + n, ldb, c + n, ldc, M, K, n ? Upcoming{} : next.over(down));
    if (n + 2 * L <= N) { gemm_cols<E, 2, Acc, At>(a, lda, b + n, ldb, c + n, ldc, M, K, n ? Upcoming{} : next.over(down)); n += 2 * L; }
  } else {
    n = N / (kNV * L) * (kNV * L);
    if (n) gemm_rows<E, kNV, Acc, At>(a, lda, b, ldb, c, ldc, M, n, K, next.over(down * (n / (kNV * L))));
  }
  if (n + L <= N) gemm_cols<E, 1, Acc, At>(a, lda, b + n, ldb, c + n, ldc, M, K, {});
}

}  // namespace
}  // namespace fastpe::cpu::FASTPE_ISA
