// Which region a pair (query, key) belongs to: chunked.md M1. A region has its own positions for queries and keys, hence
// its own rotation; all regions of a row share one softmax.
//
// I is the absolute row, I = i + Nk - Nq. Regions count from 0, near to far. Ranges are half-open. For a fixed key the rows
// of a region are one range, and for a fixed row so are its keys: a tile needs the products of a region only on the keys
// that some row of it puts there.
#pragma once

#include "../core/hd.h"
#include "../core/params.h"
#include "visible.h"

namespace fastpe::pos {

FASTPE_HD constexpr int region_count(RegionKind k) {
  return k == RegionKind::none ? 1 : k == RegionKind::distance || k == RegionKind::key_set ? 2 : 3;
}

FASTPE_HD constexpr int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// distance (size w): near while I - j < w.  chunk (c): the row's own chunk and after it; the chunk before; older.
// key_set (M): keys from M on; the first M.  band (w): |I - j| < w; before it; after it.
FASTPE_HD constexpr int region_of(Region r, int64_t I, int64_t j) {
  switch (r.kind) {
    case RegionKind::distance: return I - j < r.size ? 0 : 1;
    case RegionKind::chunk: {
      const int64_t own = floor_div(I, r.size) * r.size;
      return j >= own ? 0 : j >= own - r.size ? 1 : 2;
    }
    case RegionKind::key_set: return j >= r.size ? 0 : 1;
    case RegionKind::band: return I - j >= r.size ? 1 : j - I >= r.size ? 2 : 0;
    default: return 0;
  }
}

// Rows that have key j in region x.
FASTPE_HD constexpr Range rows_of_region(Region r, int x, int64_t j) {
  switch (r.kind) {
    case RegionKind::distance: return x == 0 ? Range{-kFar, j + r.size} : Range{j + r.size, kFar};
    case RegionKind::chunk: {
      const int64_t next = (floor_div(j, r.size) + 1) * r.size;
      return x == 0 ? Range{-kFar, next} : x == 1 ? Range{next, next + r.size} : Range{next + r.size, kFar};
    }
    case RegionKind::key_set: return (j >= r.size) == (x == 0) ? Range{-kFar, kFar} : Range{0, 0};
    case RegionKind::band: return x == 0 ? Range{j - r.size + 1, j + r.size} : x == 1 ? Range{j + r.size, kFar} : Range{-kFar, j - r.size + 1};
    default: return {-kFar, kFar};
  }
}

// The keys of [j0, j1) that some row of [I0, I1) has in region x, as one covering range (empty: lo == hi).
FASTPE_HD constexpr Range keys_of_region(Region r, int x, int64_t I0, int64_t I1, int64_t j0, int64_t j1) {
  int64_t lo = -kFar, hi = kFar;
  switch (r.kind) {
    case RegionKind::distance:
      if (x == 0) lo = I0 - r.size + 1;
      else hi = I1 - r.size;
      break;
    case RegionKind::chunk: {
      const int64_t first = floor_div(I0, r.size) * r.size, last = floor_div(I1 - 1, r.size) * r.size;
      if (x == 0) lo = first;
      else if (x == 1) lo = first - r.size, hi = last;
      else hi = last - r.size;
      break;
    }
    case RegionKind::key_set:
      if (x == 0) lo = r.size;
      else hi = r.size;
      break;
    case RegionKind::band:
      if (x == 0) lo = I0 - r.size + 1, hi = I1 - 1 + r.size;
      else if (x == 1) hi = I1 - r.size;
      else lo = I0 + r.size;
      break;
    default: break;
  }
  lo = lo > j0 ? lo : j0;
  hi = hi < j1 ? hi : j1;
  return lo < hi ? Range{lo, hi} : Range{j0, j0};
}

// Whether a key's own position variant depends on the key alone, so that one rotated copy of the keys serves all regions.
FASTPE_HD constexpr bool region_by_key(RegionKind k) { return k == RegionKind::key_set; }

namespace check {
constexpr bool regions_agree(Region r) {
  for (int64_t I = -5; I < 12; ++I)
    for (int64_t j = 0; j < 12; ++j)
      for (int x = 0; x < region_count(r.kind); ++x) {
        const Range rows = rows_of_region(r, x, j);
        if ((region_of(r, I, j) == x) != (I >= rows.lo && I < rows.hi)) return false;
      }
  for (int64_t I0 = -4; I0 < 10; I0 += 3)
    for (int64_t j0 = 0; j0 < 9; j0 += 3)
      for (int x = 0; x < region_count(r.kind); ++x) {
        const Range k = keys_of_region(r, x, I0, I0 + 4, j0, j0 + 5);
        for (int64_t j = j0; j < j0 + 5; ++j) {
          bool any = false;
          for (int64_t I = I0; I < I0 + 4; ++I) any |= region_of(r, I, j) == x;
          if (any && !(j >= k.lo && j < k.hi)) return false;
        }
      }
  return true;
}
constexpr bool all_regions_agree() {
  for (int kind = 0; kind <= int(RegionKind::band); ++kind)
    for (int64_t size = 1; size < 8; size += 2)
      if (!regions_agree({RegionKind(kind), size})) return false;
  return true;
}
static_assert(all_regions_agree(), "the ranges of a region disagree with the element rule");
}  // namespace check

}  // namespace fastpe::pos
