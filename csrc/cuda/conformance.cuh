// One kernel per instruction of ptx.cuh, on inputs whose results are exact. They run in the emulator, and on a GPU with
// the same inputs; the outputs must agree bit for bit.
//
// Every kernel is one block. in and out are arrays of 32-bit words laid out as each kernel says.
#pragma once

#include "ptx.cuh"

namespace fastpe::cuda::conformance {

struct Args {
  const uint32_t* in;
  uint32_t* out;
};

// in: A (16,16) and B (16,8) as pairs of 16-bit numbers, rows first; C (16,8) float. out: D (16,8) float.
template <class T>
FASTPE_KERNEL(32, 1) mma_kernel(Args a) {
  const uint32_t lane = lane_index(), g = lane >> 2, t = lane & 3;
  const uint32_t *A = a.in, *B = a.in + 128, *C = a.in + 192;
  uint32_t ra[4], rb[2];
  for (uint32_t i = 0; i < 4; ++i) ra[i] = A[(g + 8 * (i & 1)) * 8 + t + 4 * (i >> 1)];
  for (uint32_t i = 0; i < 2; ++i) {
    const uint32_t k = 2 * t + 8 * i;
    const auto element = [&](uint32_t row) { return B[row * 4 + g / 2] >> (g & 1) * 16 & 0xFFFF; };
    rb[i] = element(k) | element(k + 1) << 16;
  }
  float d[4];
  for (uint32_t i = 0; i < 4; ++i) d[i] = float_of_bits(C[(g + 8 * (i >> 1)) * 8 + 2 * t + (i & 1)]);
  mma<T>(d, ra, rb[0], rb[1]);
  for (uint32_t i = 0; i < 4; ++i) a.out[(g + 8 * (i >> 1)) * 8 + 2 * t + (i & 1)] = bits_of_float(d[i]);
}

// in: 32 rows of 16 bytes. out: (2: plain, trans) (32 lanes) (4 registers). Row r lies at chunk (5 r) mod 32.
FASTPE_KERNEL(32, 1) ldmatrix_kernel(Args a) {
  const uint32_t lane = lane_index(), base = shared_base(), addr = base + (5 * lane % 32) * 16;
  Quad q;
  for (int i = 0; i < 4; ++i) q.x[i] = a.in[lane * 4 + i];
  st_shared_v4(addr, q);
  sync_warp();
  uint32_t d[4];
  ldmatrix_x4(d, addr);
  for (int i = 0; i < 4; ++i) a.out[lane * 4 + i] = d[i];
  ldmatrix_x4_trans(d, addr);
  for (int i = 0; i < 4; ++i) a.out[128 + lane * 4 + i] = d[i];
}

// in: 32 words. out: 10 rows of 32: idx 3 lane + 1, xor 5, up 3, down 7 (integers), xor 16 (float), ballot of odd words,
// all, any of words above 2^31, all of true, lanes that agree modulo 5.
FASTPE_KERNEL(32, 1) shuffle_kernel(Args a) {
  const uint32_t lane = lane_index(), x = a.in[lane];
  uint32_t* o = a.out + lane;
  o[0] = shfl_idx(x, (3 * lane + 1) & 31);
  o[32] = shfl_xor(x, 5);
  o[64] = shfl_up(x, 3);
  o[96] = shfl_down(x, 7);
  o[128] = bits_of_float(shfl_xor(float(x >> 8), 16));
  o[160] = ballot(x & 1);
  o[192] = vote_all(x >> 31);
  o[224] = vote_any(x >> 31);
  o[256] = vote_all(true);
  o[288] = match_any(x % 5);
}

// in: 64 x 16 bytes. out: the same, of chunk c only the first 16 - (c mod 17) bytes, the rest 0.
FASTPE_KERNEL(64, 1) cp_async_kernel(Args a) {
  const uint32_t c = thread_index(), base = shared_base();
  cp_async_16(base + c * 16, a.in + c * 4, 16 - c % 17);
  cp_async_commit();
  cp_async_wait<0>();
  sync_block();
  const uint32_t other = 63 - c;
  const Quad q = ld_shared_v4(base + other * 16);
  for (int i = 0; i < 4; ++i) a.out[other * 4 + i] = q.x[i];
}

// in: 256 floats. out: (256) bf16 bits | (256) fp16 bits | (256) bf16 of it and of its negative packed | the same fp16 |
// back from bf16 | back from fp16.
FASTPE_KERNEL(256, 1) convert_kernel(Args a) {
  const uint32_t t = thread_index();
  const float x = float_of_bits(a.in[t]);
  uint32_t* o = a.out + t;
  o[0] = float_to_bf16(x);
  o[256] = float_to_f16(x);
  o[512] = pack_bf16x2(x, -x);
  o[768] = pack_f16x2(x, -x);
  o[1024] = bits_of_float(bf16_to_float(float_to_bf16(x)));
  o[1280] = bits_of_float(f16_to_float(float_to_f16(x)));
}

// in: 128 words. out: 4 rows of 128: reversed through shared memory in words, in floats, all and any of "word is odd" |
// second pair of warps: what the first pair handed over through named barrier 1.
FASTPE_KERNEL(128, 1) barrier_kernel(Args a) {
  const uint32_t t = thread_index(), base = shared_base();
  const uint32_t x = a.in[t];
  st_shared_b32(base + 4 * t, x);
  sync_block();
  a.out[t] = ld_shared_b32(base + 4 * (127 - t));
  a.out[128 + t] = bits_of_float(ld_shared_f32(base + 4 * (t ^ 33)));
  a.out[256 + t] = uint32_t(sync_block_and(x & 1)) | uint32_t(sync_block_or(x & 1)) << 1;
  if (t < 64) {
    st_shared_f32(base + 4 * t, float(x & 0xFFFF));
    bar_arrive(1, 128);
    a.out[384 + t] = 0;
  } else {
    bar_sync(1, 128);
    a.out[384 + t] = bits_of_float(ld_shared_f32(base + 4 * (t - 64)));
  }
}

// in: 128 floats. out: 2^x | log2 |x|: approximate, to 2^-22 relative and 2^-22 absolute.
FASTPE_KERNEL(128, 1) exp_kernel(Args a) {
  const uint32_t t = thread_index();
  const float x = float_of_bits(a.in[t]);
  a.out[t] = bits_of_float(ex2_approx(x));
  a.out[128 + t] = bits_of_float(lg2_approx(x < 0 ? -x : x));
}

// Calls f(name, kernel, threads, shared bytes, words in, words out) for every kernel.
template <class Fn>
void for_each(Fn&& f) {
  f("mma_bf16", &mma_kernel<Bf16>, 32, 0, 320, 128);
  f("mma_f16", &mma_kernel<F16>, 32, 0, 320, 128);
  f("ldmatrix", &ldmatrix_kernel, 32, 512, 128, 256);
  f("shuffle", &shuffle_kernel, 32, 0, 32, 320);
  f("cp_async", &cp_async_kernel, 64, 1024, 256, 256);
  f("convert", &convert_kernel, 256, 0, 256, 1536);
  f("barrier", &barrier_kernel, 128, 512, 128, 512);
  f("exp", &exp_kernel, 128, 0, 128, 256);
}

}  // namespace fastpe::cuda::conformance
