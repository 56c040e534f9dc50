// The functions of cuda/ptx.cuh as g++ compiles them. cuda/ptx.cuh includes this file; nothing else does.
//
// f and l, the caller's file and line, are two plain parameters: default arguments inside a braced struct would give
// this file's own line.
#pragma once

#include <cmath>
#include <cstring>

#include "emu.h"

#define FASTPE_KERNEL(threads, blocks) [[maybe_unused]] static __attribute__((noinline)) void
#define FASTPE_DEVICE inline
#define FASTPE_NOINLINE [[maybe_unused]] static __attribute__((noinline))
#define FASTPE_GRID_CONSTANT
#define FASTPE_UNROLL
#define FASTPE_NO_UNROLL
#define FASTPE_CALLER const char *f = __builtin_FILE(), int l = __builtin_LINE()

namespace fastpe::cuda {

using emu::Site;

constexpr uint32_t kFullMask = 0xFFFFFFFFu;

inline uint32_t thread_index() { return emu::self().tid; }
inline uint32_t lane_index() { return emu::self().lane; }
inline uint32_t warp_index() { return emu::self().warp; }
inline uint32_t block_index() { return emu::self().block.x; }
inline uint32_t block_index_y() { return emu::self().block.y; }

// ---- numbers --------------------------------------------------------------------------------------------------------

inline float float_of_bits(uint32_t x) { return __builtin_bit_cast(float, x); }
inline uint32_t bits_of_float(float x) { return __builtin_bit_cast(uint32_t, x); }

inline float ex2_approx(float x) { return exp2f(x); }
inline float lg2_approx(float x) { return log2f(x); }

inline float bf16_to_float(uint16_t x) { return float_of_bits(uint32_t(x) << 16); }
inline uint16_t float_to_bf16(float x) {
  const uint32_t u = bits_of_float(x);
  if (x != x) return 0x7FFF;
  return uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}
inline float f16_to_float(uint16_t x) { return emu::float_of_f16(x); }
inline uint16_t float_to_f16(float x) {
  const uint32_t sign = bits_of_float(x) >> 16 & 0x8000, size = bits_of_float(x) & 0x7FFFFFFF;
  if (x != x) return 0x7FFF;
  if (size >= bits_of_float(65520.f)) return uint16_t(sign | 0x7C00);
  // Subnormal: in the sum the last bit is worth 2^-24.
  if (size < bits_of_float(0x1p-14f)) return uint16_t(sign | (bits_of_float(float_of_bits(size) + 0.5f) - bits_of_float(0.5f)));
  return uint16_t(sign | (size - (112u << 23) + 0xFFF + (size >> 13 & 1)) >> 13);
}
// Two numbers to one register, the first in the low half.
inline uint32_t pack_bf16x2(float lo, float hi) { return float_to_bf16(lo) | uint32_t(float_to_bf16(hi)) << 16; }
inline uint32_t pack_f16x2(float lo, float hi) { return float_to_f16(lo) | uint32_t(float_to_f16(hi)) << 16; }

inline uint32_t count_leading_zeros(uint32_t x) { return x ? uint32_t(__builtin_clz(x)) : 32u; }

// ---- shared memory --------------------------------------------------------------------------------------------------

struct alignas(16) Quad {
  uint32_t x[4];
};

inline uint32_t shared_base() { return 0; }
inline uint32_t ld_shared_b32(uint32_t addr, FASTPE_CALLER) {
  uint32_t x;
  emu::read_shared(addr, &x, 4, Site{f, l});
  return x;
}
inline Quad ld_shared_v4(uint32_t addr, FASTPE_CALLER) {
  Quad q;
  emu::read_shared(addr, &q, 16, Site{f, l});
  return q;
}
inline float ld_shared_f32(uint32_t addr, FASTPE_CALLER) { return float_of_bits(ld_shared_b32(addr, f, l)); }
inline void st_shared_b32(uint32_t addr, uint32_t x, FASTPE_CALLER) { emu::write_shared(addr, &x, 4, Site{f, l}); }
inline void st_shared_f32(uint32_t addr, float x, FASTPE_CALLER) { emu::write_shared(addr, &x, 4, Site{f, l}); }
inline void st_shared_v4(uint32_t addr, Quad q, FASTPE_CALLER) { emu::write_shared(addr, &q, 16, Site{f, l}); }

// ---- barriers, votes, shuffles ----------------------------------------------------------------------------------------

inline void sync_warp(FASTPE_CALLER) { emu::sync_warp(kFullMask, Site{f, l}); }
inline void sync_block(FASTPE_CALLER) { emu::barrier_sync(0, emu::self().threads, emu::Reduce::none, false, Site{f, l}); }
inline bool sync_block_and(bool p, FASTPE_CALLER) { return emu::barrier_sync(0, emu::self().threads, emu::Reduce::all, p, Site{f, l}); }
inline bool sync_block_or(bool p, FASTPE_CALLER) { return emu::barrier_sync(0, emu::self().threads, emu::Reduce::any, p, Site{f, l}); }
inline void bar_sync(uint32_t id, uint32_t threads, FASTPE_CALLER) { emu::barrier_sync(id, threads, emu::Reduce::none, false, Site{f, l}); }
inline void bar_arrive(uint32_t id, uint32_t threads, FASTPE_CALLER) { emu::barrier_arrive(id, threads, Site{f, l}); }

namespace emulated {
struct Shuffle {
  uint32_t value, from;
};
inline void shuffle(void* const* r, uint32_t mask, Site site) {
  uint32_t out[32];
  for (uint32_t i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    const uint32_t from = static_cast<Shuffle*>(r[i])->from;
    if (!(mask >> from & 1)) emu::fail("shfl.sync reads a lane outside its mask", site);
    out[i] = static_cast<Shuffle*>(r[from])->value;
  }
  for (uint32_t i = 0; i < 32; ++i)
    if (mask >> i & 1) static_cast<Shuffle*>(r[i])->value = out[i];
}
inline uint32_t shuffle(uint32_t x, uint32_t from, Site site) {
  static const emu::WarpOp op{"shfl.sync", false, shuffle};
  Shuffle s{x, from};
  emu::warp_op(op, kFullMask, 0, &s, site);
  return s.value;
}
inline uint32_t ballot(bool p, Site site) {
  static const emu::WarpOp op{"vote.sync", false, [](void* const* r, uint32_t mask, Site) {
    uint32_t votes = 0;
    for (uint32_t i = 0; i < 32; ++i)
      if (mask >> i & 1) votes |= *static_cast<uint32_t*>(r[i]) << i;
    for (uint32_t i = 0; i < 32; ++i)
      if (mask >> i & 1) *static_cast<uint32_t*>(r[i]) = votes;
  }};
  uint32_t v = p;
  emu::warp_op(op, kFullMask, 0, &v, site);
  return v;
}
inline uint32_t match(uint32_t x, Site site) {
  static const emu::WarpOp op{"match.any.sync", false, [](void* const* r, uint32_t mask, Site) {
    uint32_t out[32] = {};
    for (uint32_t i = 0; i < 32; ++i)
      for (uint32_t k = 0; k < 32; ++k)
        if ((mask >> i & 1) && (mask >> k & 1) && *static_cast<uint32_t*>(r[i]) == *static_cast<uint32_t*>(r[k])) out[i] |= 1u << k;
    for (uint32_t i = 0; i < 32; ++i)
      if (mask >> i & 1) *static_cast<uint32_t*>(r[i]) = out[i];
  }};
  emu::warp_op(op, kFullMask, 0, &x, site);
  return x;
}
}  // namespace emulated

inline uint32_t shfl_idx(uint32_t x, uint32_t lane, FASTPE_CALLER) { return emulated::shuffle(x, lane & 31, Site{f, l}); }
inline uint32_t shfl_xor(uint32_t x, uint32_t bits, FASTPE_CALLER) { return emulated::shuffle(x, (emu::self().lane ^ bits) & 31, Site{f, l}); }
inline uint32_t shfl_up(uint32_t x, uint32_t by, FASTPE_CALLER) {
  const uint32_t lane = emu::self().lane;
  return emulated::shuffle(x, lane >= by ? lane - by : lane, Site{f, l});
}
inline uint32_t shfl_down(uint32_t x, uint32_t by, FASTPE_CALLER) {
  const uint32_t lane = emu::self().lane;
  return emulated::shuffle(x, lane + by < 32 ? lane + by : lane, Site{f, l});
}
inline float shfl_xor(float x, uint32_t bits, FASTPE_CALLER) { return float_of_bits(shfl_xor(bits_of_float(x), bits, f, l)); }
inline float shfl_idx(float x, uint32_t lane, FASTPE_CALLER) { return float_of_bits(shfl_idx(bits_of_float(x), lane, f, l)); }
inline float shfl_up(float x, uint32_t by, FASTPE_CALLER) { return float_of_bits(shfl_up(bits_of_float(x), by, f, l)); }
inline float shfl_down(float x, uint32_t by, FASTPE_CALLER) { return float_of_bits(shfl_down(bits_of_float(x), by, f, l)); }
inline uint32_t ballot(bool p, FASTPE_CALLER) { return emulated::ballot(p, Site{f, l}); }
inline uint32_t match_any(uint32_t x, FASTPE_CALLER) { return emulated::match(x, Site{f, l}); }
inline bool vote_all(bool p, FASTPE_CALLER) { return emulated::ballot(p, Site{f, l}) == kFullMask; }
inline bool vote_any(bool p, FASTPE_CALLER) { return emulated::ballot(p, Site{f, l}) != 0; }

// ---- asynchronous copies ------------------------------------------------------------------------------------------------

inline void cp_async_16(uint32_t dst, const void* src, uint32_t bytes, FASTPE_CALLER) { emu::cp_async_16(dst, src, bytes, Site{f, l}); }
inline void cp_async_commit(FASTPE_CALLER) { emu::cp_async_commit(Site{f, l}); }
template <int N>
inline void cp_async_wait(FASTPE_CALLER) { emu::cp_async_wait(N, Site{f, l}); }

// ---- matrices -----------------------------------------------------------------------------------------------------------

namespace emulated {
struct Ldmatrix {
  uint32_t addr;
  uint32_t* out;
};
template <bool Trans>
inline void ldmatrix(void* const* r, uint32_t, Site site) {
  emu::Counters& n = emu::count();
  ++n.ldmatrix;
  for (uint32_t m = 0; m < 4; ++m) {
    uint16_t rows[8][8];
    uint32_t used[8] = {}, most = 0;
    for (uint32_t i = 0; i < 8; ++i) {
      const uint32_t addr = static_cast<Ldmatrix*>(r[8 * m + i])->addr;
      emu::read_shared_as(8 * m + i, addr, rows[i], 16, site);
      const uint32_t c = ++used[addr >> 4 & 7];
      most = c > most ? c : most;
    }
    n.extra_wavefronts += most - 1;
    for (uint32_t i = 0; i < 32; ++i) {
      const uint32_t g = i >> 2, c = 2 * (i & 3);
      const uint16_t lo = Trans ? rows[c][g] : rows[g][c], hi = Trans ? rows[c + 1][g] : rows[g][c + 1];
      static_cast<Ldmatrix*>(r[i])->out[m] = lo | uint32_t(hi) << 16;
    }
  }
}
}  // namespace emulated

inline void ldmatrix_x4(uint32_t (&d)[4], uint32_t addr, FASTPE_CALLER) {
  static const emu::WarpOp op{"ldmatrix", true, emulated::ldmatrix<false>};
  emulated::Ldmatrix x{addr, d};
  emu::warp_op(op, kFullMask, 0, &x, Site{f, l});
}
inline void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t addr, FASTPE_CALLER) {
  static const emu::WarpOp op{"ldmatrix.trans", true, emulated::ldmatrix<true>};
  emulated::Ldmatrix x{addr, d};
  emu::warp_op(op, kFullMask, 0, &x, Site{f, l});
}
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, FASTPE_CALLER) {
  static const emu::WarpOp op{"mma.m16n8k16.bf16", true, emu::mma_bf16};
  const uint32_t b[2] = {b0, b1};
  emu::Mma x{d, a, b};
  emu::warp_op(op, kFullMask, 0, &x, Site{f, l});
}
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, FASTPE_CALLER) {
  static const emu::WarpOp op{"mma.m16n8k16.f16", true, emu::mma_f16};
  const uint32_t b[2] = {b0, b1};
  emu::Mma x{d, a, b};
  emu::warp_op(op, kFullMask, 0, &x, Site{f, l});
}

}  // namespace fastpe::cuda
