// Rotation, tables of cos and sin, sums along the sequence. All limited by memory.
#pragma once

#include <cmath>

#include "../core/params.h"
#include "../pos/rotate.h"
#include "tile.cuh"

namespace fastpe::cuda {

// Element types of rotate beside F32: storage and its float value.
template <class T>
struct Half {
  using Storage = uint16_t;
  static FASTPE_DEVICE float load(const uint16_t* p) { return T::wide(*p); }
  static FASTPE_DEVICE void store(uint16_t* p, float x) { *p = T::narrow(x); }
};

constexpr uint32_t kElementThreads = 256;

// One thread per two channels: a pair that is rotated, or two that pass through. A thread reads what it writes, so y may
// be x.
template <class E>
FASTPE_KERNEL(kElementThreads, 1) rotate_kernel(const FASTPE_GRID_CONSTANT RotateParams p) {
  using S = typename E::Storage;
  const int64_t slots = p.D / 2, at = int64_t(block_index()) * kElementThreads + thread_index();
  if (at >= p.B * p.H * p.N * slots) return;
  const int64_t slot = at % slots, row = at / slots, n = row % p.N, h = row / p.N % p.H, b = row / p.N / p.H;
  const S* x = static_cast<const S*>(p.x.p) + b * p.x.sb + h * p.x.sh + n * p.x.sn;
  S* y = static_cast<S*>(p.y.p) + b * p.y.sb + h * p.y.sh + n * p.y.sn;
  const bool rotated = slot < p.J, half = p.layout == RopeLayout::half && rotated;
  const int64_t first = half ? slot : 2 * slot, second = half ? slot + p.J : 2 * slot + 1;
  float u = E::load(x + first), v = E::load(x + second);
  if (rotated) {
    const float c = aux_at<float>(p.rope.cos, b, h, n)[slot], s = aux_at<float>(p.rope.sin, b, h, n)[slot];
    pos::rotate_pair(u, v, c, p.inverse ? -s : s);
  }
  E::store(y + first, u);
  E::store(y + second, v);
}

// One thread per (batch, head, token, pair).
template <class Out>
FASTPE_KERNEL(kElementThreads, 1) rope_table_kernel(const FASTPE_GRID_CONSTANT RopeTableParams p) {
  const int64_t at = int64_t(block_index()) * kElementThreads + thread_index();
  if (at >= p.B * p.H * p.N * p.J) return;
  const int64_t j = at % p.J, n = at / p.J % p.N, h = at / p.J / p.N % p.H, b = at / p.J / p.N / p.H;
  const auto position = [&](int64_t axis) { return p.positions[(axis * p.B + b) * p.N + n]; };
  const auto frequency = [&](int64_t axis) { return p.inv_freq[(axis * p.H + h) * p.J + j]; };
  if constexpr (sizeof(Out) == 8) {
    double exact = 0;
    float product = 0;
    for (int64_t axis = 0; axis < p.A; ++axis) {
      exact += pos::float64_angle(position(axis), frequency(axis));
      product += pos::float32_angle(position(axis), frequency(axis));
    }
    const double angle = p.float32_product ? double(product) : exact;
    static_cast<double*>(p.cos)[at] = p.amplitude * ::cos(angle);
    static_cast<double*>(p.sin)[at] = p.amplitude * ::sin(angle);
  } else {
    pos::Phase<float> phase;
    if (p.float32_product) {
      float angle = 0;
      for (int64_t axis = 0; axis < p.A; ++axis) angle += pos::float32_angle(position(axis), frequency(axis));
      pos::add_radians(phase, angle);
    } else {
      for (int64_t axis = 0; axis < p.A; ++axis) pos::add_phase(phase, pos::split(position(axis)), pos::frequency_in_turns(frequency(axis)));
    }
    float c, s;
    pos::cos_sin(phase, c, s);
    static_cast<float*>(p.cos)[at] = float(p.amplitude) * c;
    static_cast<float*>(p.sin)[at] = float(p.amplitude) * s;
  }
}

FASTPE_DEVICE double shfl_up(double x, uint32_t by) {
  const uint64_t u = __builtin_bit_cast(uint64_t, x);
  const uint32_t lo = shfl_up(uint32_t(u), by), hi = shfl_up(uint32_t(u >> 32), by);
  return __builtin_bit_cast(double, uint64_t(hi) << 32 | lo);
}
FASTPE_DEVICE double shfl_idx(double x, uint32_t lane) {
  const uint64_t u = __builtin_bit_cast(uint64_t, x);
  const uint32_t lo = shfl_idx(uint32_t(u), lane), hi = shfl_idx(uint32_t(u >> 32), lane);
  return __builtin_bit_cast(double, uint64_t(hi) << 32 | lo);
}

// One warp per row, kPrefixBlock numbers a round, in float64.
template <class S>
FASTPE_KERNEL(128, 1) prefix_kernel(const FASTPE_GRID_CONSTANT PrefixParams p) {
  constexpr int kEach = kPrefixBlock / 32;
  const int64_t row = int64_t(block_index()) * 4 + warp_index(), blocks = (p.N + kPrefixBlock - 1) / kPrefixBlock;
  if (row >= p.rows) return;
  const uint32_t lane = lane_index();
  const S* x = static_cast<const S*>(p.x) + row * p.N;
  S* y = static_cast<S*>(p.local) + row * p.N;
  double before = 0;
  FASTPE_NO_UNROLL
  for (int64_t i = 0; i < blocks; ++i) {
    // Blocks start at multiples of kPrefixBlock in either direction; in reverse a lane's numbers run backwards.
    const int64_t block = p.reverse ? blocks - 1 - i : i, lo = block * kPrefixBlock, hi = lo + kPrefixBlock < p.N ? lo + kPrefixBlock : p.N;
    double sums[kEach], sum = 0;
    const auto index = [&](int e) {
      const int64_t t = int64_t(lane) * kEach + e;
      return p.reverse ? hi - 1 - t : lo + t;
    };
    FASTPE_UNROLL
    for (int e = 0; e < kEach; ++e) {
      const int64_t n = index(e);
      if (n >= lo && n < hi) sum += double(x[n]);
      sums[e] = sum;
    }
    double scan = sum;
    FASTPE_UNROLL
    for (uint32_t step = 1; step < 32; step *= 2) {
      const double o = shfl_up(scan, step);
      if (lane >= step) scan += o;
    }
    double left = shfl_up(scan, 1);
    if (lane == 0) left = 0;
    FASTPE_UNROLL
    for (int e = 0; e < kEach; ++e) {
      const int64_t n = index(e);
      if (n >= lo && n < hi) y[n] = S(left + sums[e] + (p.base ? 0 : before));
    }
    if (p.base && lane == 0) p.base[row * blocks + block] = before;
    before += shfl_idx(scan, 31);
  }
}

}  // namespace fastpe::cuda
