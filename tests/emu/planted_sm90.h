// A small product in the style of kernels for compute capability 9.0, and the mistakes the emulator has to catch in it.
//
// C (M,N) = A (M,K) B (N,K)^T, bf16, one tile of 64 x 64: a warpgroup of which one thread copies tiles of 64 k through a ring
// of two stages (tensor maps, mbarriers), and a warpgroup that multiplies (wgmma) and stores through shared memory. Without a
// mistake it is a conformance kernel too.
#pragma once

#include "cuda/conformance_sm90.cuh"

namespace fastpe::planted_sm90 {

using namespace fastpe::cuda;

enum Bug {
  kNone,
  kFewBytes,
  kManyBytes,
  kNoEmptyWait,
  kNoFullWait,
  kWrongParity,
  kNoWgmmaWait,
  kWrongStride,
  kNoProxyFence,
  kNoNamedBarrier,
  kNoInitFence,
  kNoBarrierAfterInit,
  kNoWgmmaFence,
  kReleaseBeforeWait,
  kAccumulatorInFlight,
  kReadInFlight,
  kWgmmaInOneWarp,
  kThreadsDisagree,
  kSetRegistersInOneWarp,
  kTooManyRegisters,
  kUnwaitedStore,
  kUncommittedStore,
  kReuseBeforeStoreIsRead,
  kMisalignedTile,
  kNotInitialised,
  kTooManyArrivals,
  kStoreOnMbarrier,
  kUnwaitedLoad,
  kNoDescriptorSwizzle,
  kOneGroupTooFew,
  kBugs,
};

constexpr int64_t kM = 60, kN = 56, kK = 264;
constexpr uint32_t kStages = 2, kTiles = (kK + 63) / 64, kTileBytes = 64 * 128;
constexpr uint32_t kA = 1024, kB = kA + kStages * kTileBytes, kC = kB + kStages * kTileBytes, kSmemBytes = kC + kTileBytes;
constexpr int64_t kWordsIn = (kM + kN) * kK / 2, kWordsOut = kM * kN / 2;

inline int fill(conformance::Sm90Args& a) {
  const auto map = [](TensorMap& m, const void* base, int64_t rows, int64_t columns) {
    return make_tensor_map(m, {base, 2, 2, {uint64_t(columns), uint64_t(rows), 1}, {uint64_t(columns) * 2, 0}, {64, 64, 1}, Swizzle::b128});
  };
  int rc = map(a.maps[0], a.in, kM, kK);
  if (!rc) rc = map(a.maps[1], a.in + kM * kK / 2, kN, kK);
  return rc ? rc : map(a.maps[2], a.out, kM, kN);
}

template <int kBug>
FASTPE_KERNEL(256, 1) product_kernel(const FASTPE_GRID_CONSTANT conformance::Sm90Args a) {
  const uint32_t tid = thread_index(), warp = warp_index(), lane = lane_index(), base = shared_base();
  const auto full = [&](uint32_t stage) { return base + 8 * stage; };
  const auto empty = [&](uint32_t stage) { return base + 8 * (kStages + stage); };
  if (tid == 0) {
    for (uint32_t s = 0; s < kStages; ++s) {
      mbarrier_init(full(s), 1);
      mbarrier_init(empty(s), 4);
    }
    if (kBug != kNoInitFence) fence_mbarrier_init();
  }
  if (kBug != kNoBarrierAfterInit) sync_block();
  if (warp < 4) {
    if (kBug != kSetRegistersInOneWarp) setmaxnreg_dec<40>();
    else if (warp == 0) setmaxnreg_dec<40>();
    if (warp == 0 && elect_one()) {
      for (uint32_t n = 0; n < kTiles + (kBug == kUnwaitedLoad); ++n) {
        const uint32_t s = n % kStages, use = n / kStages;
        if (kBug != kNoEmptyWait && use > 0) mbarrier_wait_parity(empty(s), (use - 1) & 1);
        mbarrier_arrive_expect_tx(kBug == kNotInitialised ? base + 64 : full(s), kBug == kFewBytes ? kTileBytes : kBug == kManyBytes ? 3 * kTileBytes : 2 * kTileBytes);
        if (kBug == kTooManyArrivals) mbarrier_arrive(full(s));
        tma_load_2d(base + kA + s * kTileBytes + (kBug == kMisalignedTile ? 128 : 0), &a.maps[0], int32_t(64 * n), 0, full(s));
        tma_load_2d(base + kB + s * kTileBytes, &a.maps[1], int32_t(64 * n), 0, full(s));
      }
      if (kBug == kStoreOnMbarrier) st_shared_b32(full(0), 0);
    }
    return;
  }
  setmaxnreg_inc<kBug == kTooManyRegisters ? 256 : 232>();
  if (kBug == kTooManyRegisters) setmaxnreg_inc<480>();
  float d[32];
  FASTPE_UNROLL
  for (int i = 0; i < 32; ++i) d[i] = 0;
  [[maybe_unused]] float seen = 0;
  FASTPE_NO_UNROLL
  for (uint32_t n = 0; n < kTiles; ++n) {
    const uint32_t s = n % kStages, use = n / kStages;
    if (kBug != kNoFullWait) mbarrier_wait_parity(full(s), (use & 1) ^ (kBug == kWrongParity));
    wgmma_registers(d);
    if (kBug != kNoWgmmaFence) wgmma_fence();
    FASTPE_UNROLL
    for (uint32_t k = 0; k < 4; ++k) {
      uint64_t da = wgmma_descriptor(base + kA + s * kTileBytes + 32 * k, kBug == kWrongStride ? 512 : 1024);
      const uint64_t db = wgmma_descriptor(base + kB + s * kTileBytes + 32 * k, 1024);
      if (kBug == kNoDescriptorSwizzle) da &= ~(uint64_t(3) << 62);
      if (kBug == kThreadsDisagree && lane == 3) da += 1;
      if (kBug != kWgmmaInOneWarp || warp == 4) wgmma_ss<Bf16, 64>(d, da, db, true);
    }
    wgmma_commit();
    if (kBug == kReleaseBeforeWait && lane == 0) mbarrier_arrive(empty(s));
    if (kBug == kAccumulatorInFlight) d[5] = 1;
    if (kBug == kReadInFlight) seen += d[0];
    if (kBug != kNoWgmmaWait) wgmma_wait<kBug == kOneGroupTooFew>();
    wgmma_registers(d);
    if (kBug != kReleaseBeforeWait && lane == 0) mbarrier_arrive(empty(s));
  }
  if (kBug == kReadInFlight) d[0] = seen;
  const uint32_t row = 16 * (warp & 3) + (lane >> 2), col = 2 * (lane & 3);
  FASTPE_UNROLL
  for (uint32_t i = 0; i < 32; i += 2) {
    const uint32_t byte = (row + 8 * (i >> 1 & 1)) * 128 + (8 * (i >> 2) + col) * 2;
    st_shared_b32(base + kC + conformance::swizzle_128(byte), Bf16::pack(d[i], d[i + 1]));
  }
  if (kBug != kNoProxyFence) fence_proxy_async();
  if (kBug != kNoNamedBarrier) bar_sync(1, 128);
  if (tid == 128) {
    tma_store_2d(&a.maps[2], 0, 0, base + kC);
    if (kBug != kUncommittedStore) bulk_commit();
    if (kBug == kReuseBeforeStoreIsRead) st_shared_b32(base + kC, 0);
    if (kBug != kUnwaitedStore) bulk_wait<0>();
  }
}

}  // namespace fastpe::planted_sm90
