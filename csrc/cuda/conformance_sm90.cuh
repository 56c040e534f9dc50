// One kernel per instruction of ptx_sm90.cuh, as conformance.cuh does for ptx.cuh.
#pragma once

#include "ptx_sm90.cuh"
#include "tensor_map.h"

namespace fastpe::cuda::conformance {

struct Sm90Args {
  const uint32_t* in;
  uint32_t* out;
  TensorMap maps[3];
  uint32_t rank;        // of the copy
  int32_t x, y, z;
  uint32_t bytes;
};

// Byte of a tile with a swizzle of 128 bytes, relative to its start.
FASTPE_DEVICE uint32_t swizzle_128(uint32_t byte) { return byte ^ (byte >> 3 & 0x70); }

// Two mbarriers hand 4 x 32 words from warp 0 to warp 1, then one of them counts all threads.
// in: (4,32) words. out: (4,32): lane l of round r has word 31 - l, plus r | (64) what the other warp stored before the
// count | (64) whether elect_one is true in one lane exactly.
FASTPE_KERNEL(64, 1) mbarrier_kernel(const FASTPE_GRID_CONSTANT Sm90Args a) {
  const uint32_t t = thread_index(), lane = lane_index(), base = shared_base(), full = base, empty = base + 8, data = base + 64;
  if (t == 0) {
    mbarrier_init(full, 32);
    mbarrier_init(empty, 32);
    fence_mbarrier_init();
  }
  sync_block();
  for (uint32_t r = 0; r < 4; ++r) {
    if (warp_index() == 0) {
      if (r > 0) mbarrier_wait_parity(empty, (r - 1) & 1);
      st_shared_b32(data + 4 * lane, a.in[32 * r + lane]);
      mbarrier_arrive(full);
    } else {
      mbarrier_wait_parity(full, r & 1);
      a.out[32 * r + lane] = ld_shared_b32(data + 4 * (31 - lane)) + r;
      mbarrier_arrive(empty);
    }
  }
  sync_block();
  if (t == 0) {
    mbarrier_inval(full);
    mbarrier_init(full, 64);
  }
  sync_block();
  st_shared_b32(data + 4 * t, a.in[t]);
  mbarrier_arrive(full);
  mbarrier_wait_parity(full, 0);
  a.out[128 + t] = ld_shared_b32(data + 4 * (t ^ 32));
  const uint32_t elected = ballot(elect_one());
  a.out[192 + t] = elected != 0 && (elected & (elected - 1)) == 0;
}

// A box of maps[0], as it lies in shared memory.
FASTPE_KERNEL(128, 1) tma_load_kernel(const FASTPE_GRID_CONSTANT Sm90Args a) {
  const uint32_t t = thread_index(), full = shared_base(), tile = full + 1024;
  if (t == 0) {
    prefetch_tensor_map(&a.maps[0]);
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(full, a.bytes);
    if (a.rank == 2) tma_load_2d(tile, &a.maps[0], a.x, a.y, full);
    else tma_load_3d(tile, &a.maps[0], a.x, a.y, a.z, full);
  }
  sync_block();
  mbarrier_wait_parity(full, 0);
  for (uint32_t i = t; i < a.bytes / 4; i += 128) a.out[i] = ld_shared_b32(tile + 4 * i);
}

// in: bytes / 4 words. out: the same.
FASTPE_KERNEL(128, 1) bulk_load_kernel(const FASTPE_GRID_CONSTANT Sm90Args a) {
  const uint32_t t = thread_index(), full = shared_base(), to = full + 16;
  if (t == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(full, a.bytes);
    bulk_load(to, a.in, a.bytes, full);
  }
  sync_block();
  mbarrier_wait_parity(full, 0);
  for (uint32_t i = t; i < a.bytes / 4; i += 128) a.out[i] = ld_shared_b32(to + 4 * i);
}

// in: the tile as it lies in shared memory. out: the tensor of maps[0], a box of it stored; the rest is as it was.
FASTPE_KERNEL(128, 1) tma_store_kernel(const FASTPE_GRID_CONSTANT Sm90Args a) {
  const uint32_t t = thread_index(), tile = shared_base();
  for (uint32_t i = t; i < a.bytes / 4; i += 128) st_shared_b32(tile + 4 * i, a.in[i]);
  fence_proxy_async();
  sync_block();
  if (t == 0) {
    if (a.rank == 2) tma_store_2d(&a.maps[0], a.x, a.y, tile);
    else tma_store_3d(&a.maps[0], a.x, a.y, a.z, tile);
    bulk_commit();
    bulk_wait_read<0>();
    bulk_wait<0>();
  }
}

// in: A (64 m, 64 k), B (64 k, N) as pairs of 16-bit numbers, rows first; C (64,N) float. out: A B, plus C unless kFresh.
template <class T, int N, bool kRs, bool kTransA, bool kTransB, bool kFresh>
FASTPE_KERNEL(128, 1) wgmma_kernel(const FASTPE_GRID_CONSTANT Sm90Args a) {
  const uint32_t tid = thread_index(), warp = warp_index(), g = lane_index() >> 2, t = lane_index() & 3, sA = shared_base(), sB = sA + 64 * 128;
  const uint32_t *A = a.in, *B = A + 64 * 32, *C = B + 64 * N / 2;
  const auto element = [](const uint32_t* x, uint32_t i) { return x[i / 2] >> 16 * (i & 1) & 0xFFFF; };
  // Rows of 128 bytes: 64 k of one m or n, or 64 m or n of one k.
  for (uint32_t i = tid; i < 64 * 32; i += 128) {
    const uint32_t row = i / 32, x = 2 * (i % 32);
    const uint32_t word = kTransA ? element(A, x * 64 + row) | element(A, (x + 1) * 64 + row) << 16 : A[i];
    st_shared_b32(sA + swizzle_128(4 * i), word);
  }
  constexpr uint32_t kRows = kTransB ? (N + 63) / 64 * 64 : N;
  for (uint32_t i = tid; i < kRows * 32; i += 128) {
    const uint32_t row = i / 32, x = 2 * (i % 32), n = kTransB ? row / 64 * 64 + x : row, k = kTransB ? row % 64 : x;
    const uint32_t word = n >= N ? 0 : element(B, k * N + n) | element(B, (kTransB ? k * N + n + 1 : (k + 1) * N + n)) << 16;
    st_shared_b32(sB + swizzle_128(4 * i), word);
  }
  fence_proxy_async();
  sync_block();
  float d[N / 2];
  FASTPE_UNROLL
  for (uint32_t i = 0; i < N / 2; ++i) d[i] = float_of_bits(C[(16 * warp + g + 8 * (i >> 1 & 1)) * N + 8 * (i >> 2) + 2 * t + (i & 1)]);
  uint32_t fa[4][4];
  FASTPE_UNROLL
  for (uint32_t k = 0; k < 4; ++k)
    FASTPE_UNROLL
    for (uint32_t i = 0; i < 4; ++i) fa[k][i] = A[(16 * warp + g + 8 * (i & 1)) * 32 + 8 * k + t + 4 * (i >> 1)];
  wgmma_registers(d);
  wgmma_fence();
  FASTPE_UNROLL
  for (uint32_t k = 0; k < 4; ++k) {
    const uint64_t da = wgmma_descriptor(sA + k * (kTransA ? 2048 : 32), 1024, kTransA ? 8192 : 0);
    const uint64_t db = wgmma_descriptor(sB + k * (kTransB ? 2048 : 32), 1024, kTransB ? 8192 : 0);
    if constexpr (kRs) wgmma_rs<T, N, kTransB>(d, fa[k], db, !kFresh || k > 0);
    else wgmma_ss<T, N, kTransA, kTransB>(d, da, db, !kFresh || k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_registers(d);
  FASTPE_UNROLL
  for (uint32_t i = 0; i < N / 2; ++i) a.out[(16 * warp + g + 8 * (i >> 1 & 1)) * N + 8 * (i >> 2) + 2 * t + (i & 1)] = bits_of_float(d[i]);
}

// Two accumulators and three groups, one still on its way while the result of the one before it is read. in: A (64 m, 64 k),
// B (64 n, 64 k) bf16. out: three (64,64): the products over k from 0 to 15, from 16 to 31, from 0 to 15 and 32 to 47.
FASTPE_KERNEL(128, 1) wgmma_groups_kernel(const FASTPE_GRID_CONSTANT Sm90Args a) {
  const uint32_t tid = thread_index(), warp = warp_index(), g = lane_index() >> 2, t = lane_index() & 3, sA = shared_base(), sB = sA + 64 * 128;
  for (uint32_t i = tid; i < 2 * 64 * 32; i += 128) st_shared_b32(sA + swizzle_128(4 * i), a.in[i]);
  fence_proxy_async();
  sync_block();
  const auto put = [&](uint32_t which, const float (&d)[32]) {
    FASTPE_UNROLL
    for (uint32_t i = 0; i < 32; ++i) a.out[which * 4096 + (16 * warp + g + 8 * (i >> 1 & 1)) * 64 + 8 * (i >> 2) + 2 * t + (i & 1)] = bits_of_float(d[i]);
  };
  const auto descriptor = [](uint32_t tile, uint32_t k) { return wgmma_descriptor(tile + 32 * k, 1024); };
  float d[32], e[32];
  FASTPE_UNROLL
  for (int i = 0; i < 32; ++i) d[i] = e[i] = 0;
  wgmma_registers(d);
  wgmma_registers(e);
  wgmma_fence();
  wgmma_ss<Bf16, 64>(d, descriptor(sA, 0), descriptor(sB, 0), false);
  wgmma_commit();
  wgmma_fence();
  wgmma_ss<Bf16, 64>(e, descriptor(sA, 1), descriptor(sB, 1), false);
  wgmma_commit();
  wgmma_wait<1>();
  wgmma_registers(d);
  put(0, d);
  wgmma_registers(d);
  wgmma_fence();
  wgmma_ss<Bf16, 64>(d, descriptor(sA, 2), descriptor(sB, 2), true);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_registers(d);
  wgmma_registers(e);
  put(1, e);
  put(2, d);
}

// A tensor of 2160 words: (57 of 60) rows of (70 of 72) elements of 2 bytes, or (3 of 3) of (19 of 20) such rows, or rows of
// 35 of 4 bytes.
constexpr int64_t kTensorWords = 2160;
inline TensorView tensor(const void* base, uint32_t rank, uint32_t element, Swizzle swizzle, uint32_t x, uint32_t y, uint32_t z = 1) {
  return {base, rank, element, {140 / element, rank == 3 ? 19u : 57u, 3}, {144, 144 * 20}, {x, y, z}, swizzle};
}

// Calls f(name, kernel, threads, shared bytes, words in, words out, fill) for every kernel. fill(args) sets what depends on
// in and out; it returns 0 or a cudaError_t.
template <class Fn>
void for_each_sm90(Fn&& f) {
  const auto nothing = [](Sm90Args&) { return 0; };
  f("mbarrier", &mbarrier_kernel, 64, 64 + 256, 128, 256, nothing);
  const auto load = [&](const char* name, uint32_t rank, uint32_t element, Swizzle s, uint32_t bx, uint32_t by, uint32_t bz, int32_t x, int32_t y, int32_t z) {
    const uint32_t bytes = bx * element * by * bz;
    f(name, &tma_load_kernel, 128, 1024 + bytes, kTensorWords, bytes / 4, [=](Sm90Args& a) {
      a.rank = rank, a.x = x, a.y = y, a.z = z, a.bytes = bytes;
      return make_tensor_map(a.maps[0], tensor(a.in, rank, element, s, bx, by, bz));
    });
  };
  load("tma_load_2d", 2, 2, Swizzle::none, 24, 20, 1, -3, 45, 0);
  load("tma_load_2d_32", 2, 2, Swizzle::b32, 16, 40, 1, 60, -2, 0);
  load("tma_load_2d_64", 2, 2, Swizzle::b64, 32, 33, 1, 48, 5, 0);
  load("tma_load_2d_128", 2, 2, Swizzle::b128, 64, 50, 1, 33, 10, 0);
  load("tma_load_2d_float", 2, 4, Swizzle::b128, 32, 9, 1, 5, 50, 0);
  load("tma_load_3d", 3, 2, Swizzle::none, 8, 6, 4, 64, 16, -1);
  load("tma_load_3d_128", 3, 2, Swizzle::b128, 64, 8, 3, 8, 15, 1);
  f("bulk_load", &bulk_load_kernel, 128, 16 + 2064, 516, 516, [](Sm90Args& a) {
    a.bytes = 2064;
    return 0;
  });
  const auto store = [&](const char* name, uint32_t rank, Swizzle s, uint32_t bx, uint32_t by, uint32_t bz, int32_t x, int32_t y, int32_t z) {
    const uint32_t bytes = bx * 2 * by * bz;
    f(name, &tma_store_kernel, 128, bytes, bytes / 4, kTensorWords, [=](Sm90Args& a) {
      a.rank = rank, a.x = x, a.y = y, a.z = z, a.bytes = bytes;
      return make_tensor_map(a.maps[0], tensor(a.out, rank, 2, s, bx, by, bz));
    });
  };
  store("tma_store_2d", 2, Swizzle::none, 24, 20, 1, -3, 45, 0);
  store("tma_store_2d_128", 2, Swizzle::b128, 64, 50, 1, 33, 10, 0);
  store("tma_store_3d_128", 3, Swizzle::b128, 64, 8, 3, 8, 15, 1);
  f("wgmma_groups", &wgmma_groups_kernel, 128, 2 * 64 * 128, 4096, 3 * 4096, nothing);
  const auto product = [&](const char* name, int n, auto kernel) {
    f(name, kernel, 128, (64 + (n + 63) / 64 * 64) * 128, 2048 + 32 * n + 64 * n, 64 * n, nothing);
  };
  // Type, columns, a in registers, a and b MN-major, C ignored.
  product("wgmma_bf16", 64, &wgmma_kernel<Bf16, 64, false, false, false, false>);
  product("wgmma_f16", 64, &wgmma_kernel<F16, 64, false, false, false, true>);
  product("wgmma_n96_bf16", 96, &wgmma_kernel<Bf16, 96, false, false, false, true>);
  product("wgmma_n128_f16", 128, &wgmma_kernel<F16, 128, false, false, true, false>);
  product("wgmma_trans_bf16", 64, &wgmma_kernel<Bf16, 64, false, true, true, false>);
  product("wgmma_trans_a_f16", 64, &wgmma_kernel<F16, 64, false, true, false, false>);
  product("wgmma_rs_bf16", 64, &wgmma_kernel<Bf16, 64, true, false, false, false>);
  product("wgmma_rs_trans_f16", 256, &wgmma_kernel<F16, 256, true, false, true, false>);
}

}  // namespace fastpe::cuda::conformance
