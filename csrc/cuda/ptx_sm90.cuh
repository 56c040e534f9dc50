// One function per instruction of sm_90a: mbarriers, bulk copies (TMA), wgmma. The rules are those of ptx.cuh, which this
// file includes. Code for another architecture traps where it meets one of them: the host does not start such kernels there.
//
// Tiles lie in shared memory as a bulk copy with a swizzle of 128 bytes leaves them: rows of 128 bytes, the 16-byte chunks of
// row r at chunk ^ (r & 7); the tile starts at a multiple of 1024. Descriptors of such tiles (wgmma_descriptor):
//   K-major (a row is one m or n, 64 k): stride = bytes from 8 rows to the next 8, lead unused; 16 k further: addr + 32
//   MN-major (a row is one k, 64 m or n): stride = bytes from 8 k to the next 8, lead = bytes from 64 m or n to the next
//   64; 16 k further: addr + 2 stride
//
// wgmma.m64nNk16: value i of thread T = 32 w + 4 g + t of a warpgroup is row 16 w + g + 8 ((i >> 1) & 1), column
// 8 (i >> 2) + 2 t + (i & 1). a in registers is the A fragment of mma.m16n8k16 for rows 16 w to 16 w + 15.
// wgmma_fence comes before every batch, wgmma_commit ends it; until wgmma_wait its accumulators, a registers and tiles are
// the tensor core's. Its reads of shared memory belong to all four warps: each of them says when it has waited.
#pragma once

#include "ptx.cuh"

namespace fastpe::cuda {

// How a bulk copy by a tensor map permutes the 16-byte chunks of a tile; as the driver numbers it.
enum class Swizzle : uint32_t { none, b32, b64, b128 };

}  // namespace fastpe::cuda

#if !defined(__CUDACC__)
#include "../emu/ptx_sm90_emu.h"
#else

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTPE_SM90(...) asm volatile(__VA_ARGS__)
#else
#define FASTPE_SM90(...) __trap()
#endif

namespace fastpe::cuda {

// The driver's CUtensorMap. A kernel takes it as part of its grid-constant argument.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

// ---- mbarriers --------------------------------------------------------------------------------------------------------

// 8 bytes of shared memory at a multiple of 8. One thread initialises it, executes fence_mbarrier_init, then a barrier.
FASTPE_DEVICE void mbarrier_init(uint32_t addr, uint32_t count) { FASTPE_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(addr), "r"(count) : "memory"); }
FASTPE_DEVICE void mbarrier_inval(uint32_t addr) { FASTPE_SM90("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(addr) : "memory"); }
FASTPE_DEVICE void mbarrier_arrive(uint32_t addr) { FASTPE_SM90("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(addr) : "memory"); }
// The phase also waits for `bytes` more of bulk copies.
FASTPE_DEVICE void mbarrier_arrive_expect_tx(uint32_t addr, uint32_t bytes) {
  FASTPE_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(addr), "r"(bytes) : "memory");
}
// Whether the phase of that parity is complete; may wait a while before it says no.
FASTPE_DEVICE bool mbarrier_try_wait_parity(uint32_t addr, uint32_t parity) {
  uint32_t done = 0;
  FASTPE_SM90("{\n.reg .pred %%pw;\nmbarrier.try_wait.parity.shared::cta.b64 %%pw, [%1], %2;\nselp.b32 %0, 1, 0, %%pw;\n}" : "=r"(done) : "r"(addr), "r"(parity) : "memory");
  return done != 0;
}
// What this thread has initialised is visible to bulk copies.
FASTPE_DEVICE void fence_mbarrier_init() { FASTPE_SM90("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// What this thread has stored to shared memory is visible to wgmma and bulk copies that are ordered after it.
FASTPE_DEVICE void fence_proxy_async() { FASTPE_SM90("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- bulk copies --------------------------------------------------------------------------------------------------------
// One thread issues them. Coordinates are elements, innermost first; what lies outside the tensor reads as 0 and counts
// among the bytes that arrive, and is not stored.

FASTPE_DEVICE void prefetch_tensor_map(const TensorMap* map) { FASTPE_SM90("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
FASTPE_DEVICE void tma_load_2d(uint32_t dst, const TensorMap* map, int32_t x, int32_t y, uint32_t mbarrier) {
  FASTPE_SM90("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
              ::"r"(dst), "l"(map), "r"(x), "r"(y), "r"(mbarrier) : "memory");
}
FASTPE_DEVICE void tma_load_3d(uint32_t dst, const TensorMap* map, int32_t x, int32_t y, int32_t z, uint32_t mbarrier) {
  FASTPE_SM90("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
              ::"r"(dst), "l"(map), "r"(x), "r"(y), "r"(z), "r"(mbarrier) : "memory");
}
// Consecutive bytes, a multiple of 16, both addresses too.
FASTPE_DEVICE void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbarrier) {
  FASTPE_SM90("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
              ::"r"(dst), "l"(__cvta_generic_to_global(src)), "r"(bytes), "r"(mbarrier) : "memory");
}
FASTPE_DEVICE void tma_store_2d(const TensorMap* map, int32_t x, int32_t y, uint32_t src) {
  FASTPE_SM90("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(x), "r"(y), "r"(src) : "memory");
}
FASTPE_DEVICE void tma_store_3d(const TensorMap* map, int32_t x, int32_t y, int32_t z, uint32_t src) {
  FASTPE_SM90("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(map), "r"(x), "r"(y), "r"(z), "r"(src) : "memory");
}
// Stores of this thread since the last commit become a group; wait until at most N groups are left, until they are written
// or (read) until their shared memory may be overwritten.
FASTPE_DEVICE void bulk_commit() { FASTPE_SM90("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N>
FASTPE_DEVICE void bulk_wait() { FASTPE_SM90("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory"); }
template <int N>
FASTPE_DEVICE void bulk_wait_read() { FASTPE_SM90("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"); }

// ---- warps and warpgroups -----------------------------------------------------------------------------------------------

// True in one lane of the warp.
FASTPE_DEVICE bool elect_one() {
  uint32_t mine = 0;
  FASTPE_SM90("{\n.reg .pred %%pw;\nelect.sync _|%%pw, 0xFFFFFFFF;\nselp.b32 %0, 1, 0, %%pw;\n}" : "=r"(mine)::"memory");
  return mine != 0;
}
// Registers a thread of this warpgroup: 24 to 256 in steps of 8.
template <int N>
FASTPE_DEVICE void setmaxnreg_inc() { FASTPE_SM90("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N>
FASTPE_DEVICE void setmaxnreg_dec() { FASTPE_SM90("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// ---- matrices -----------------------------------------------------------------------------------------------------------

FASTPE_DEVICE void wgmma_fence() { FASTPE_SM90("wgmma.fence.sync.aligned;" ::: "memory"); }
FASTPE_DEVICE void wgmma_commit() { FASTPE_SM90("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
FASTPE_DEVICE void wgmma_wait() { FASTPE_SM90("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// No instruction: the compiler moves no use of d across it. After wgmma_wait, and between ordinary writes and wgmma_fence.
template <int kRegisters>
FASTPE_DEVICE void wgmma_registers(float (&d)[kRegisters]) {
  FASTPE_UNROLL
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define FASTPE_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FASTPE_D32(i) FASTPE_D8(i), FASTPE_D8(i + 8), FASTPE_D8(i + 16), FASTPE_D8(i + 24)
#define FASTPE_L0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTPE_L1 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTPE_L2 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTPE_L3 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// d (64,N) in N / 2 registers: the operands after them are numbered from there on.
#define FASTPE_WGMMA_SS(N, type, list, regs, a, b, c, ta, tb)                                                                      \
  FASTPE_SM90("{\n.reg .pred %%pw;\nsetp.ne.b32 %%pw, %" #c ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type   \
              " {" list "}, %" #a ", %" #b ", %%pw, 1, 1, %" #ta ", %" #tb ";\n}"                                                    \
              : regs : "l"(desc_a), "l"(desc_b), "r"(uint32_t(accumulate)), "n"(int(kTransA)), "n"(int(kTransB)) : "memory")
#define FASTPE_WGMMA_RS(N, type, list, regs, a0, a1, a2, a3, b, c, tb)                                                             \
  FASTPE_SM90("{\n.reg .pred %%pw;\nsetp.ne.b32 %%pw, %" #c ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type   \
              " {" list "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", %%pw, 1, 1, %" #tb ";\n}"                             \
              : regs : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b), "r"(uint32_t(accumulate)), "n"(int(kTransB)) : "memory")
#define FASTPE_L1H "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FASTPE_TEXT_64 FASTPE_L0
#define FASTPE_TEXT_96 FASTPE_L0 ", " FASTPE_L1H
#define FASTPE_TEXT_128 FASTPE_L0 ", " FASTPE_L1
#define FASTPE_TEXT_256 FASTPE_L0 ", " FASTPE_L1 ", " FASTPE_L2 ", " FASTPE_L3
#define FASTPE_REGS_64 FASTPE_D32(0)
#define FASTPE_REGS_96 FASTPE_D32(0), FASTPE_D8(32), FASTPE_D8(40)
#define FASTPE_REGS_128 FASTPE_D32(0), FASTPE_D32(32)
#define FASTPE_REGS_256 FASTPE_D32(0), FASTPE_D32(32), FASTPE_D32(64), FASTPE_D32(96)
// d = a b, plus d if accumulate; a (64,16), b (16,N) from tiles. trans: MN-major.
template <class T, int N, bool kTransA = false, bool kTransB = false>
FASTPE_DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t desc_a, uint64_t desc_b, bool accumulate) {
  static_assert(N == 64 || N == 96 || N == 128 || N == 256);
  if constexpr (N == 64 && __is_same(T, Bf16)) FASTPE_WGMMA_SS(64, "bf16", FASTPE_TEXT_64, FASTPE_REGS_64, 32, 33, 34, 35, 36);
  else if constexpr (N == 64 && __is_same(T, F16)) FASTPE_WGMMA_SS(64, "f16", FASTPE_TEXT_64, FASTPE_REGS_64, 32, 33, 34, 35, 36);
  else if constexpr (N == 96 && __is_same(T, Bf16)) FASTPE_WGMMA_SS(96, "bf16", FASTPE_TEXT_96, FASTPE_REGS_96, 48, 49, 50, 51, 52);
  else if constexpr (N == 96 && __is_same(T, F16)) FASTPE_WGMMA_SS(96, "f16", FASTPE_TEXT_96, FASTPE_REGS_96, 48, 49, 50, 51, 52);
  else if constexpr (N == 128 && __is_same(T, Bf16)) FASTPE_WGMMA_SS(128, "bf16", FASTPE_TEXT_128, FASTPE_REGS_128, 64, 65, 66, 67, 68);
  else if constexpr (N == 128 && __is_same(T, F16)) FASTPE_WGMMA_SS(128, "f16", FASTPE_TEXT_128, FASTPE_REGS_128, 64, 65, 66, 67, 68);
  else if constexpr (N == 256 && __is_same(T, Bf16)) FASTPE_WGMMA_SS(256, "bf16", FASTPE_TEXT_256, FASTPE_REGS_256, 128, 129, 130, 131, 132);
  else if constexpr (N == 256 && __is_same(T, F16)) FASTPE_WGMMA_SS(256, "f16", FASTPE_TEXT_256, FASTPE_REGS_256, 128, 129, 130, 131, 132);
}
// a from registers.
template <class T, int N, bool kTransB = false>
FASTPE_DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t desc_b, bool accumulate) {
  static_assert(N == 64 || N == 96 || N == 128 || N == 256);
  if constexpr (N == 64 && __is_same(T, Bf16)) FASTPE_WGMMA_RS(64, "bf16", FASTPE_TEXT_64, FASTPE_REGS_64, 32, 33, 34, 35, 36, 37, 38);
  else if constexpr (N == 64 && __is_same(T, F16)) FASTPE_WGMMA_RS(64, "f16", FASTPE_TEXT_64, FASTPE_REGS_64, 32, 33, 34, 35, 36, 37, 38);
  else if constexpr (N == 96 && __is_same(T, Bf16)) FASTPE_WGMMA_RS(96, "bf16", FASTPE_TEXT_96, FASTPE_REGS_96, 48, 49, 50, 51, 52, 53, 54);
  else if constexpr (N == 96 && __is_same(T, F16)) FASTPE_WGMMA_RS(96, "f16", FASTPE_TEXT_96, FASTPE_REGS_96, 48, 49, 50, 51, 52, 53, 54);
  else if constexpr (N == 128 && __is_same(T, Bf16)) FASTPE_WGMMA_RS(128, "bf16", FASTPE_TEXT_128, FASTPE_REGS_128, 64, 65, 66, 67, 68, 69, 70);
  else if constexpr (N == 128 && __is_same(T, F16)) FASTPE_WGMMA_RS(128, "f16", FASTPE_TEXT_128, FASTPE_REGS_128, 64, 65, 66, 67, 68, 69, 70);
  else if constexpr (N == 256 && __is_same(T, Bf16)) FASTPE_WGMMA_RS(256, "bf16", FASTPE_TEXT_256, FASTPE_REGS_256, 128, 129, 130, 131, 132, 133, 134);
  else if constexpr (N == 256 && __is_same(T, F16)) FASTPE_WGMMA_RS(256, "f16", FASTPE_TEXT_256, FASTPE_REGS_256, 128, 129, 130, 131, 132, 133, 134);
}
#undef FASTPE_D8
#undef FASTPE_D32
#undef FASTPE_L0
#undef FASTPE_L1
#undef FASTPE_L2
#undef FASTPE_L3
#undef FASTPE_L1H
#undef FASTPE_TEXT_64
#undef FASTPE_REGS_64
#undef FASTPE_TEXT_96
#undef FASTPE_REGS_96
#undef FASTPE_TEXT_128
#undef FASTPE_REGS_128
#undef FASTPE_TEXT_256
#undef FASTPE_REGS_256
#undef FASTPE_WGMMA_SS
#undef FASTPE_WGMMA_RS

}  // namespace fastpe::cuda

#endif  // __CUDACC__

namespace fastpe::cuda {

// Of a tile with a swizzle of 128 bytes.
FASTPE_DEVICE uint64_t wgmma_descriptor(uint32_t addr, uint32_t stride, uint32_t lead = 0) {
  return uint64_t((addr & 0x3FFFF) >> 4) | uint64_t(lead >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}

#if defined(__CUDACC__)
FASTPE_DEVICE void mbarrier_wait_parity(uint32_t addr, uint32_t parity) {
  while (!mbarrier_try_wait_parity(addr, parity)) {}
}
#else
inline void mbarrier_wait_parity(uint32_t addr, uint32_t parity, FASTPE_CALLER) {
  while (!mbarrier_try_wait_parity(addr, parity, f, l)) {}
}
#endif

}  // namespace fastpe::cuda
