// The plan of landmark attention, made on the device from the marks: tiles of whole blocks, their kinds of keys, and the block
// and tile of every key.
#pragma once

#include "landmark.cuh"

namespace fastpe::cuda {

struct LandmarkPlanArgs {
  const uint8_t *is_landmark, *visible;  // (B|1,Nk); visible may be null
  int64_t landmark_sb, visible_sb, plans;
  LandmarkPlan plan;
};

// Tiles in the order of the keys, one warp for a plan.
FASTPE_KERNEL(32, 1) landmark_plan_kernel(const FASTPE_GRID_CONSTANT LandmarkPlanArgs a) {
  const int32_t lane = int32_t(lane_index()), n = int32_t(a.plan.Nk);
  const int64_t plan = block_index();
  const uint8_t* is_landmark = a.is_landmark + plan * a.landmark_sb;
  LandmarkTile* out = a.plan.tile + plan * a.plan.most;
  int32_t* own = a.plan.own + plan * a.plan.Nk;
  int32_t count = 0, start = 0, block = 0;  // tiles, first key without a tile, first key of the block
  const auto cut = [&](int32_t from, int32_t to, bool one_block) {
    const int32_t pieces = (to - from + kBlockN - 1) / kBlockN;
    FASTPE_NO_UNROLL
    for (int32_t x = lane; x < pieces; x += 32) {
      LandmarkTile& t = out[count + x];
      t.begin = from + x * kBlockN;
      t.end = to - t.begin < kBlockN ? to : t.begin + kBlockN;
      t.first = one_block ? count : count + x;
      t.last = one_block ? count + pieces : count + x + 1;
    }
    count += pieces;
  };
  FASTPE_NO_UNROLL
  for (int32_t base = 0; base < n; base += 1024) {
    // Lane x keeps the marks of the x-th 32 keys.
    uint32_t mine = 0;
    FASTPE_UNROLL
    for (int32_t x = 0; x < 32; ++x) {
      const int32_t j = base + 32 * x + lane;
      const uint32_t marks = ballot(j < n && is_landmark[j]);
      if (x == lane) mine = marks;
    }
    FASTPE_NO_UNROLL
    for (int32_t x = 0; x < 32 && base + 32 * x < n; ++x) {
      const int32_t j0 = base + 32 * x;
      uint32_t marks = shfl_idx(mine, uint32_t(x));
      const uint32_t before = marks & ((1u << lane) - 1);
      if (j0 + lane < n) own[j0 + lane] = before ? j0 + 32 - int32_t(count_leading_zeros(before)) : block;
      for (; marks; marks &= marks - 1) {
        const int32_t end = j0 + 32 - int32_t(count_leading_zeros(marks & (~marks + 1)));
        if (end - start > kBlockN) {
          if (block > start) cut(start, block, false);
          start = block;
          if (end - block > kBlockN) {
            cut(block, end, true);
            start = end;
          }
        }
        block = end;
      }
    }
  }
  // What no landmark has closed: nobody is past it, so its tiles stand alone.
  if (n - start > kBlockN && block > start) {
    cut(start, block, false);
    start = block;
  }
  cut(start, n, false);
  if (lane == 0) a.plan.count[plan] = count;
}

// Kinds of the keys of every tile, one warp each.
FASTPE_KERNEL(128, 1) landmark_tile_kernel(const FASTPE_GRID_CONSTANT LandmarkPlanArgs a) {
  const int64_t task = int64_t(block_index()) * 4 + warp_index();
  if (task >= a.plans * a.plan.most) return;
  const int64_t plan = task / a.plan.most, t = task % a.plan.most;
  if (t >= a.plan.count[plan]) return;
  LandmarkTile& tile = a.plan.tile[task];
  uint64_t ordinary = 0, landmark = 0, closing = 0;
  const int32_t begin = tile.begin, end = tile.end;
  FASTPE_UNROLL
  for (int32_t half = 0; half < 2; ++half) {
    const int32_t j = begin + 32 * half + int32_t(lane_index());
    const bool inside = j < end, mark = inside && a.is_landmark[plan * a.landmark_sb + j];
    const bool seen = inside && (!a.visible || a.visible[plan * a.visible_sb + j]);
    ordinary |= uint64_t(ballot(seen && !mark)) << (32 * half);
    landmark |= uint64_t(ballot(seen && mark)) << (32 * half);
    closing |= uint64_t(ballot(mark)) << (32 * half);
    if (inside) a.plan.tile_of[plan * a.plan.Nk + j] = int32_t(t);
  }
  if (lane_index() == 0) {
    tile.ordinary = ordinary;
    tile.landmark = landmark;
    tile.closing = closing;
  }
}

}  // namespace fastpe::cuda
