// What the emulator adds for compute capability 9.0: mbarriers, bulk copies by tensor maps, wgmma. Called by
// ptx_sm90_emu.h and by the host code that makes tensor maps.
//
// How asynchronous work is made visible: a bulk copy fills its destination with 0xFF when it is issued and delivers when no
// thread can run, in random order; wgmma fills its accumulators with NaN when it is issued and computes when it is waited
// for. What ordinary stores wrote may be read by either only behind the storing thread's fence.proxy.async.
#pragma once

#include "emu.h"

namespace fastpe::emu {

// A tensor map as the emulator reads it; as large as the driver's.
struct alignas(128) TensorMap {
  static constexpr uint64_t kMagic = 0x70616D726F736E74ull;
  uint64_t magic = 0;
  uint8_t* base = nullptr;
  uint32_t rank = 0, element = 0;  // dimensions; bytes of an element
  uint64_t dims[3] = {}, strides[2] = {};  // innermost first; bytes from one row, one matrix to the next
  uint32_t box[3] = {}, swizzle = 0;       // 0 none, 1, 2, 3: 32, 64, 128 bytes
};
static_assert(sizeof(TensorMap) == 128);

// ---- for the thread that is running ---------------------------------------------------------------------------------

// A collective of the four warps of an aligned warpgroup, as WarpOp is one of a warp. It orders no memory accesses.
void group_op(const WarpOp& op, uint64_t immediate, void* record, Site site);

void mbarrier_init(uint32_t addr, uint32_t count, Site site);
void mbarrier_inval(uint32_t addr, Site site);
// Expects `bytes` more of bulk copies, then arrives.
void mbarrier_arrive(uint32_t addr, uint32_t bytes, Site site);
// Returns true, once the phase of that parity is complete.
bool mbarrier_try_wait(uint32_t addr, uint32_t parity, Site site);

void fence_proxy_async(Site site);
void fence_mbarrier_init(Site site);

// at: coordinates of the box's first element, innermost first.
void tensor_load(uint32_t dst, const TensorMap& map, const int32_t* at, uint32_t rank, uint32_t mbarrier, Site site);
void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbarrier, Site site);
void tensor_store(const TensorMap& map, const int32_t* at, uint32_t rank, uint32_t src, Site site);
void bulk_commit(Site site);
void bulk_wait(uint32_t groups_left, Site site);

// d (64,n) = a (64,16) b (16,n), plus d if accumulate. registers: 4 of a, null: descriptor a.
struct WgmmaCall {
  uint32_t n;
  bool bf16, trans_a, trans_b, accumulate;
  float* d;
  const uint32_t* registers;
  uint64_t a, b;
};
void wgmma(const WgmmaCall& call, Site site);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(uint32_t groups_left, Site site);

void set_max_registers(uint32_t n, bool more, Site site);

}  // namespace fastpe::emu
