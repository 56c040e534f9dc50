// A small kernel in the style of the attention kernels, and the mistakes the emulator has to catch in it.
//
// out[i] = max over keys j < nk of <q_i, k_j>: two warps of 16 query rows, key tiles of 32 rows through a double buffer
// of cp.async, ldmatrix and mma, then an exchange of the results through shared memory inside the warp and between the
// warps.
#pragma once

#include "cuda/ptx.cuh"

namespace fastpe::planted {

using namespace fastpe::cuda;

enum Bug {
  kNone,
  kNoBarrierAfterWait,
  kNoBarrierBeforeRefill,
  kNoWait,
  kWrongFragment,
  kShuffleInBranch,
  kNoKeyMask,
  kReadPastEnd,
  kNoSyncWarp,
  kNoNamedBarrier,
  kUnmatchedArrive,
  kEarlyReturn,
  kUnwaitedCopy,
  kUncommittedCopy,
  kMisaligned,
  kSharedOutOfRange,
  kBarrierInHalfWarp,
  kMmaInHalfWarp,
  kOtherCallSite,
  kTwoWriters,
  kBarrierCount,
  kBugs,
};

struct Args {
  const uint16_t *q, *k;  // bf16 (nq,16), (nk,16)
  float* out;             // (nq)
  uint32_t nq, nk;
};

constexpr uint32_t kSmemKeys = 0, kSmemQ = 2 * 32 * 32, kSmemMax = kSmemQ + 32 * 32, kSmemBytes = kSmemMax + 2 * 32 * 4 + 64 * 4;

// Rows of 32 bytes: two 16-byte chunks, swapped in every other group of four rows, so that 8 rows of one chunk column
// fall on 8 different bank groups.
inline uint32_t at(uint32_t row, uint32_t chunk) { return row * 32 + ((chunk ^ (row >> 2 & 1)) * 16); }

template <int kBug>
FASTPE_KERNEL(64, 1) kernel(Args a) {
  const uint32_t tid = thread_index(), lane = lane_index(), warp = warp_index(), base = shared_base();
  const auto load_keys = [&](uint32_t tile) {
    const uint32_t row = tid >> 1, chunk = tid & 1, j = tile * 32 + row;
    const bool inside = kBug == kReadPastEnd || j < a.nk;
    const uint32_t dst = base + kSmemKeys + (tile & 1) * 1024 + at(row, chunk);
    cp_async_16(dst, a.k + (inside ? j : 0) * 16 + chunk * 8, inside ? 16 : 0);
    if (kBug != kUncommittedCopy) cp_async_commit();
  };
  const uint32_t tiles = (a.nk + 31) / 32;
  {
    const uint32_t row = tid >> 1, chunk = tid & 1;
    const bool inside = row < a.nq;
    cp_async_16(base + kSmemQ + at(row, chunk), a.q + (inside ? row : 0) * 16 + chunk * 8, inside ? 16 : 0);
  }
  load_keys(0);
  if (kBug == kEarlyReturn && warp * 16 >= a.nq) {
    cp_async_wait<0>();
    return;
  }
  const uint32_t g = lane >> 2, t = lane & 3, r = lane & 15, half = lane >> 4;
  float best[2] = {-__builtin_inff(), -__builtin_inff()};
  for (uint32_t n = 0; n < tiles; ++n) {
    if (n + 1 < tiles) load_keys(n + 1);
    else cp_async_commit();
    if (kBug != kNoWait) cp_async_wait<1>();
    if (kBug == kBarrierInHalfWarp) {
      if (lane < 16) sync_block();
      else sync_block();
    } else if (kBug == kBarrierCount) {
      bar_sync(0, warp == 0 ? 64 : 32);
    } else if (kBug != kNoBarrierAfterWait) {
      sync_block();
    }
    uint32_t fa[4], fb[4];
    const uint32_t keys = base + kSmemKeys + (n & 1) * 1024;
    ldmatrix_x4(fa, base + kSmemQ + at(warp * 16 + r, half) + (kBug == kMisaligned ? 4 : 0));
    for (uint32_t c = 0; c < 2; ++c) {
      ldmatrix_x4(fb, keys + at(c * 16 + r, half) + (kBug == kSharedOutOfRange ? kSmemBytes / 16 * 16 : 0));
      for (uint32_t x = 0; x < 2; ++x) {
        float s[4] = {};
        const uint32_t b0 = kBug == kWrongFragment ? fb[2 * x] : fb[x], b1 = kBug == kWrongFragment ? fb[2 * x + 1] : fb[x + 2];
        if (kBug != kMmaInHalfWarp || lane < 16) mma<Bf16>(s, fa, b0, b1);
        for (uint32_t e = 0; e < 4; ++e) {
          const uint32_t j = n * 32 + c * 16 + x * 8 + 2 * t + (e & 1);
          if (kBug == kNoKeyMask || j < a.nk) best[e >> 1] = s[e] > best[e >> 1] ? s[e] : best[e >> 1];
        }
      }
    }
    if (kBug != kNoBarrierBeforeRefill) sync_block();
  }
  if (kBug != kUnwaitedCopy) cp_async_wait<0>();
  else cp_async_16(base + kSmemKeys + tid * 16, a.k, 16), cp_async_commit();

  for (int e = 0; e < 2; ++e) {
    if (kBug == kShuffleInBranch) {
      if (t != 3) best[e] = fmaxf(best[e], shfl_xor(best[e], 1));
    } else if (kBug == kOtherCallSite) {
      if (t & 1) best[e] = fmaxf(best[e], shfl_xor(best[e], 1));
      else best[e] = fmaxf(best[e], shfl_xor(best[e], 1));
    } else {
      best[e] = fmaxf(best[e], shfl_xor(best[e], 1));
    }
    best[e] = fmaxf(best[e], shfl_xor(best[e], 2));
  }
  // Rows change lanes inside the warp.
  const uint32_t mine = base + kSmemMax + warp * 64;
  if (t == 0) {
    st_shared_f32(mine + g * 4, best[0]);
    st_shared_f32(mine + (g + 8) * 4, best[1]);
  }
  if (kBug != kNoSyncWarp) sync_warp();
  const float row_max = ld_shared_f32(mine + r * 4);
  // Warp 0 hands its rows to warp 1, which stores everything.
  const uint32_t hand = base + kSmemMax + 128;
  if (kBug == kTwoWriters) st_shared_f32(hand + 128, row_max);
  if (warp == 0) {
    if (lane < 16) st_shared_f32(hand + lane * 4, row_max);
    bar_arrive(1, 64);
    if (kBug == kUnmatchedArrive) bar_arrive(2, 64);
  } else {
    if (kBug == kNoNamedBarrier) bar_arrive(1, 64);
    else bar_sync(1, 64);
    const float x = lane < 16 ? ld_shared_f32(hand + lane * 4) : row_max;
    if (lane < a.nq) a.out[lane] = x;
  }
}

}  // namespace fastpe::planted
