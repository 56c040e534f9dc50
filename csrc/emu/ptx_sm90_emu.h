// The functions of cuda/ptx_sm90.cuh as g++ compiles them. cuda/ptx_sm90.cuh includes this file; nothing else does.
#pragma once

#include "sm90.h"

namespace fastpe::cuda {

using emu::TensorMap;

// ---- mbarriers --------------------------------------------------------------------------------------------------------

inline void mbarrier_init(uint32_t addr, uint32_t count, FASTPE_CALLER) { emu::mbarrier_init(addr, count, Site{f, l}); }
inline void mbarrier_inval(uint32_t addr, FASTPE_CALLER) { emu::mbarrier_inval(addr, Site{f, l}); }
inline void mbarrier_arrive(uint32_t addr, FASTPE_CALLER) { emu::mbarrier_arrive(addr, 0, Site{f, l}); }
inline void mbarrier_arrive_expect_tx(uint32_t addr, uint32_t bytes, FASTPE_CALLER) { emu::mbarrier_arrive(addr, bytes, Site{f, l}); }
inline bool mbarrier_try_wait_parity(uint32_t addr, uint32_t parity, FASTPE_CALLER) { return emu::mbarrier_try_wait(addr, parity, Site{f, l}); }
inline void fence_mbarrier_init(FASTPE_CALLER) { emu::fence_mbarrier_init(Site{f, l}); }
inline void fence_proxy_async(FASTPE_CALLER) { emu::fence_proxy_async(Site{f, l}); }

// ---- bulk copies --------------------------------------------------------------------------------------------------------

inline void prefetch_tensor_map(const TensorMap*) {}
inline void tma_load_2d(uint32_t dst, const TensorMap* map, int32_t x, int32_t y, uint32_t mbarrier, FASTPE_CALLER) {
  const int32_t at[2] = {x, y};
  emu::tensor_load(dst, *map, at, 2, mbarrier, Site{f, l});
}
inline void tma_load_3d(uint32_t dst, const TensorMap* map, int32_t x, int32_t y, int32_t z, uint32_t mbarrier, FASTPE_CALLER) {
  const int32_t at[3] = {x, y, z};
  emu::tensor_load(dst, *map, at, 3, mbarrier, Site{f, l});
}
inline void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbarrier, FASTPE_CALLER) { emu::bulk_load(dst, src, bytes, mbarrier, Site{f, l}); }
inline void tma_store_2d(const TensorMap* map, int32_t x, int32_t y, uint32_t src, FASTPE_CALLER) {
  const int32_t at[2] = {x, y};
  emu::tensor_store(*map, at, 2, src, Site{f, l});
}
inline void tma_store_3d(const TensorMap* map, int32_t x, int32_t y, int32_t z, uint32_t src, FASTPE_CALLER) {
  const int32_t at[3] = {x, y, z};
  emu::tensor_store(*map, at, 3, src, Site{f, l});
}
inline void bulk_commit(FASTPE_CALLER) { emu::bulk_commit(Site{f, l}); }
template <int N>
inline void bulk_wait(FASTPE_CALLER) { emu::bulk_wait(N, Site{f, l}); }
template <int N>
inline void bulk_wait_read(FASTPE_CALLER) { emu::bulk_wait(N, Site{f, l}); }

// ---- warps and warpgroups -----------------------------------------------------------------------------------------------

inline bool elect_one(FASTPE_CALLER) {
  static const emu::WarpOp op{"elect.sync", true, nullptr};
  emu::warp_op(op, kFullMask, 0, nullptr, Site{f, l});
  return emu::self().lane == 0;
}
template <int N>
inline void setmaxnreg_inc(FASTPE_CALLER) { emu::set_max_registers(N, true, Site{f, l}); }
template <int N>
inline void setmaxnreg_dec(FASTPE_CALLER) { emu::set_max_registers(N, false, Site{f, l}); }

// ---- matrices -----------------------------------------------------------------------------------------------------------

inline void wgmma_fence(FASTPE_CALLER) { emu::wgmma_fence(Site{f, l}); }
inline void wgmma_commit(FASTPE_CALLER) { emu::wgmma_commit(Site{f, l}); }
template <int N>
inline void wgmma_wait(FASTPE_CALLER) { emu::wgmma_wait(N, Site{f, l}); }
template <int kRegisters>
inline void wgmma_registers(float (&)[kRegisters]) {}
template <class T, int N, bool kTransA = false, bool kTransB = false>
inline void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate, FASTPE_CALLER) {
  emu::wgmma({N, __is_same(T, Bf16), kTransA, kTransB, accumulate, d, nullptr, a, b}, Site{f, l});
}
template <class T, int N, bool kTransB = false>
inline void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate, FASTPE_CALLER) {
  emu::wgmma({N, __is_same(T, Bf16), false, kTransB, accumulate, d, a, 0, b}, Site{f, l});
}

}  // namespace fastpe::cuda
