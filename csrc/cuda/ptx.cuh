// One function per instruction of sm_80 and newer. Kernels use these and plain C++; no other file of the kernels
// contains threadIdx, __shared__, asm or __shfl.
//
// Under nvcc they are the instructions; under g++ they are their execution by the emulator (emu/ptx_emu.h), with the
// same names and arguments. Shared memory is one dynamic block addressed by 32-bit byte offsets.
//
// Fragments of mma.m16n8k16, lane = 4 g + t, h the half of a register (low, high):
//   A register i: row g + 8 (i & 1), k 2 t + h + 8 (i >> 1)
//   B register i: k 2 t + h + 8 i, column g
//   C, D value i: row g + 8 (i >> 1), column 2 t + (i & 1)
// ldmatrix.x4: lanes 8 m .. 8 m + 7 give the addresses of the 16-byte rows of matrix m. Register m of a lane: plain, row
// g and columns 2 t + h; .trans, rows 2 t + h and column g.
#pragma once

#include <cstdint>

#if !defined(__CUDACC__)
#include "../emu/ptx_emu.h"
#else

#define FASTPE_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FASTPE_DEVICE __device__ __forceinline__
#define FASTPE_NOINLINE static __device__ __noinline__
#define FASTPE_GRID_CONSTANT __grid_constant__
#define FASTPE_UNROLL _Pragma("unroll")
#define FASTPE_NO_UNROLL _Pragma("unroll 1")

namespace fastpe::cuda {

constexpr uint32_t kFullMask = 0xFFFFFFFFu;

FASTPE_DEVICE uint32_t thread_index() { return threadIdx.x; }
FASTPE_DEVICE uint32_t lane_index() { return threadIdx.x & 31; }
FASTPE_DEVICE uint32_t warp_index() { return threadIdx.x >> 5; }
FASTPE_DEVICE uint32_t block_index() { return blockIdx.x; }
FASTPE_DEVICE uint32_t block_index_y() { return blockIdx.y; }

// ---- numbers --------------------------------------------------------------------------------------------------------

FASTPE_DEVICE float float_of_bits(uint32_t x) { return __uint_as_float(x); }
FASTPE_DEVICE uint32_t bits_of_float(float x) { return __float_as_uint(x); }

FASTPE_DEVICE float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTPE_DEVICE float lg2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FASTPE_DEVICE float bf16_to_float(uint16_t x) { return __uint_as_float(uint32_t(x) << 16); }
FASTPE_DEVICE uint16_t float_to_bf16(float x) {
  uint16_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
FASTPE_DEVICE float f16_to_float(uint16_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
FASTPE_DEVICE uint16_t float_to_f16(float x) {
  uint16_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
// Two numbers to one register, the first in the low half. The instruction puts its first source in the upper half.
FASTPE_DEVICE uint32_t pack_bf16x2(float lo, float hi) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}
FASTPE_DEVICE uint32_t pack_f16x2(float lo, float hi) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}

// 32 for 0.
FASTPE_DEVICE uint32_t count_leading_zeros(uint32_t x) { return uint32_t(__clz(int(x))); }

// ---- shared memory --------------------------------------------------------------------------------------------------

struct alignas(16) Quad {
  uint32_t x[4];
};

FASTPE_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(1024) unsigned char fastpe_shared[];
  return uint32_t(__cvta_generic_to_shared(fastpe_shared));
}
FASTPE_DEVICE uint32_t ld_shared_b32(uint32_t addr) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(addr) : "memory");
  return x;
}
FASTPE_DEVICE Quad ld_shared_v4(uint32_t addr) {
  Quad q;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(q.x[0]), "=r"(q.x[1]), "=r"(q.x[2]), "=r"(q.x[3]) : "r"(addr) : "memory");
  return q;
}
FASTPE_DEVICE float ld_shared_f32(uint32_t addr) { return __uint_as_float(ld_shared_b32(addr)); }
FASTPE_DEVICE void st_shared_b32(uint32_t addr, uint32_t x) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(addr), "r"(x) : "memory"); }
FASTPE_DEVICE void st_shared_f32(uint32_t addr, float x) { st_shared_b32(addr, __float_as_uint(x)); }
FASTPE_DEVICE void st_shared_v4(uint32_t addr, Quad q) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(q.x[0]), "r"(q.x[1]), "r"(q.x[2]), "r"(q.x[3]) : "memory");
}

// ---- barriers, votes, shuffles ----------------------------------------------------------------------------------------

FASTPE_DEVICE void sync_warp() { __syncwarp(); }
FASTPE_DEVICE void sync_block() { __syncthreads(); }
FASTPE_DEVICE bool sync_block_and(bool p) { return __syncthreads_and(p) != 0; }
FASTPE_DEVICE bool sync_block_or(bool p) { return __syncthreads_or(p) != 0; }
FASTPE_DEVICE void bar_sync(uint32_t id, uint32_t threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
FASTPE_DEVICE void bar_arrive(uint32_t id, uint32_t threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

FASTPE_DEVICE uint32_t shfl_idx(uint32_t x, uint32_t lane) { return __shfl_sync(kFullMask, x, int(lane)); }
FASTPE_DEVICE uint32_t shfl_xor(uint32_t x, uint32_t bits) { return __shfl_xor_sync(kFullMask, x, int(bits)); }
FASTPE_DEVICE uint32_t shfl_up(uint32_t x, uint32_t by) { return __shfl_up_sync(kFullMask, x, by); }
FASTPE_DEVICE uint32_t shfl_down(uint32_t x, uint32_t by) { return __shfl_down_sync(kFullMask, x, by); }
FASTPE_DEVICE float shfl_xor(float x, uint32_t bits) { return __shfl_xor_sync(kFullMask, x, int(bits)); }
FASTPE_DEVICE float shfl_idx(float x, uint32_t lane) { return __shfl_sync(kFullMask, x, int(lane)); }
FASTPE_DEVICE float shfl_up(float x, uint32_t by) { return __shfl_up_sync(kFullMask, x, by); }
FASTPE_DEVICE float shfl_down(float x, uint32_t by) { return __shfl_down_sync(kFullMask, x, by); }
FASTPE_DEVICE uint32_t ballot(bool p) { return __ballot_sync(kFullMask, p); }
FASTPE_DEVICE bool vote_all(bool p) { return __all_sync(kFullMask, p) != 0; }
FASTPE_DEVICE bool vote_any(bool p) { return __any_sync(kFullMask, p) != 0; }
// The lanes that brought the same x.
FASTPE_DEVICE uint32_t match_any(uint32_t x) { return __match_any_sync(kFullMask, x); }

// ---- asynchronous copies ------------------------------------------------------------------------------------------------

// 16 bytes to shared memory, the first `bytes` of them from src, the rest 0. Both addresses are multiples of 16.
FASTPE_DEVICE void cp_async_16(uint32_t dst, const void* src, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(__cvta_generic_to_global(src)), "r"(bytes) : "memory");
}
FASTPE_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
FASTPE_DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// ---- matrices -----------------------------------------------------------------------------------------------------------

FASTPE_DEVICE void ldmatrix_x4(uint32_t (&d)[4], uint32_t addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(addr) : "memory");
}
FASTPE_DEVICE void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(addr) : "memory");
}
// d += a b
FASTPE_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
FASTPE_DEVICE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace fastpe::cuda

#endif  // __CUDACC__

namespace fastpe::cuda {

// The two 16-bit types: storage only; arithmetic is in float.
struct Bf16 {
  static FASTPE_DEVICE float wide(uint16_t x) { return bf16_to_float(x); }
  static FASTPE_DEVICE uint16_t narrow(float x) { return float_to_bf16(x); }
  static FASTPE_DEVICE uint32_t pack(float lo, float hi) { return pack_bf16x2(lo, hi); }
};
struct F16 {
  static FASTPE_DEVICE float wide(uint16_t x) { return f16_to_float(x); }
  static FASTPE_DEVICE uint16_t narrow(float x) { return float_to_f16(x); }
  static FASTPE_DEVICE uint32_t pack(float lo, float hi) { return pack_f16x2(lo, hi); }
};
template <class T>
FASTPE_DEVICE float wide_low(uint32_t x) { return T::wide(uint16_t(x & 0xFFFF)); }
template <class T>
FASTPE_DEVICE float wide_high(uint32_t x) { return T::wide(uint16_t(x >> 16)); }

#if defined(__CUDACC__)
template <class T>
FASTPE_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (__is_same(T, Bf16)) mma_m16n8k16_bf16(d, a, b0, b1);
  else mma_m16n8k16_f16(d, a, b0, b1);
}
#else
template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, FASTPE_CALLER) {
  if constexpr (__is_same(T, Bf16)) mma_m16n8k16_bf16(d, a, b0, b1, f, l);
  else mma_m16n8k16_f16(d, a, b0, b1, f, l);
}
#endif

}  // namespace fastpe::cuda
