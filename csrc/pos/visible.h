// Which pairs (query, key) see each other by index: causal order, window, sinks. params.h states the rule; document
// ids and dense masks are per-element data and are tested by the kernels on tiles that this file calls visible.
//
// I is the absolute row, I = i + Nk - Nq, everywhere in this file. Ranges are half-open.
#pragma once

#include <cstdint>

#include "../core/hd.h"

namespace fastpe::pos {

constexpr int64_t kFar = int64_t(1) << 60;

struct Band {
  int64_t left = 0;   // keys with I - j < left; 0: unlimited
  int64_t right = 0;  // keys with j - I < right; 1: causal; 0: unlimited
  int64_t sinks = 0;  // keys j < sinks ignore `left`
};

struct Range {
  int64_t lo, hi;
};

FASTPE_HD constexpr bool visible(Band b, int64_t I, int64_t j) {
  return (b.right <= 0 || j - I < b.right) && (b.left <= 0 || I - j < b.left || j < b.sinks);
}

// Rows that see key j.
FASTPE_HD constexpr Range rows_of_key(Band b, int64_t j) {
  const int64_t lo = b.right > 0 ? j - b.right + 1 : -kFar;
  const int64_t hi = b.left > 0 && j >= b.sinks ? j + b.left : kFar;
  return {lo, hi};
}

// The window part of what the rows [I0, I1) see, clipped to [0, nk); sinks come on top.
FASTPE_HD constexpr Range window_of_rows(Band b, int64_t I0, int64_t I1, int64_t nk) {
  int64_t lo = b.left > 0 ? I0 - b.left + 1 : 0;
  int64_t hi = b.right > 0 ? I1 - 1 + b.right : nk;
  if (lo < 0) lo = 0;
  if (hi > nk) hi = nk;
  return {lo, hi < lo ? lo : hi};
}

// The keys of [j0, j1) that some row of [I0, I1) sees, as one covering range (empty: lo == hi).
FASTPE_HD constexpr Range keys_in_tile(Band b, int64_t I0, int64_t I1, int64_t j0, int64_t j1) {
  const Range w = window_of_rows(b, I0, I1, j1);
  int64_t lo = w.lo > j0 ? w.lo : j0;
  int64_t hi = w.hi;
  if (b.left > 0 && j0 < b.sinks) {
    int64_t s = b.sinks < j1 ? b.sinks : j1;
    const int64_t causal_end = b.right > 0 ? I1 - 1 + b.right : j1;
    if (s > causal_end) s = causal_end;
    if (s > j0) {
      if (hi <= lo) hi = s;
      lo = j0;
      if (hi < s) hi = s;
    }
  }
  return hi > lo ? Range{lo, hi} : Range{j0, j0};
}

// Every row of [I0, I1) sees every key of [j0, j1), as far as indices go.
FASTPE_HD constexpr bool tile_full(Band b, int64_t I0, int64_t I1, int64_t j0, int64_t j1) {
  const bool right_ok = b.right <= 0 || j1 - 1 - I0 < b.right;
  const bool left_ok = b.left <= 0 || I1 - 1 - j0 < b.left || j1 <= b.sinks;
  return right_ok && left_ok;
}

// ---- proof by brute force, in every compiler that reads this file ---------------------------------------------------

namespace check {
constexpr bool one(Band b, int64_t I0, int64_t I1, int64_t j0, int64_t j1) {
  bool any = false, all = true;
  int64_t first = j1, last = j0;
  for (int64_t I = I0; I < I1; ++I)
    for (int64_t j = j0; j < j1; ++j) {
      const bool v = visible(b, I, j);
      const Range r = rows_of_key(b, j);
      if (v != (I >= r.lo && I < r.hi)) return false;
      if (v && j < first) first = j;
      if (v && j + 1 > last) last = j + 1;
      any |= v;
      all &= v;
    }
  const Range k = keys_in_tile(b, I0, I1, j0, j1);
  if (any ? (k.lo > first || k.hi < last || k.lo < j0 || k.hi > j1) : k.lo != k.hi) return false;
  // Without sinks the range is tight.
  if (any && b.sinks == 0 && (k.lo != first || k.hi != last)) return false;
  return !tile_full(b, I0, I1, j0, j1) || all;
}
constexpr bool brute_force() {
  for (int64_t left = 0; left < 5; ++left)
    for (int64_t right = 0; right < 3; ++right)
      for (int64_t sinks = 0; sinks < 4; sinks += 3)
        for (int64_t I0 = -2; I0 < 7; I0 += 3)
          for (int64_t j0 = 0; j0 < 8; j0 += 2)
            for (int64_t n = 1; n < 4; n += 2)
              if (!one({left, right, sinks}, I0, I0 + 2, j0, j0 + n)) return false;
  return true;
}
static_assert(brute_force(), "tile visibility disagrees with the element rule");
}  // namespace check

}  // namespace fastpe::pos
