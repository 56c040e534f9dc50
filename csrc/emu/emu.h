// Runs CUDA kernels on the CPU: one fiber per CUDA thread, checks always on. The emulated half of cuda/ptx.cuh calls
// what is declared here; nothing else does but launchers and tests.
//
// What is checked: order of shared-memory accesses (happens-before), reads of data whose cp.async has not been waited
// for, addresses and alignment, lanes that diverge before a collective, barriers that cannot complete, copies left
// behind. A failed check ends the launch with std::runtime_error that names block, thread, file and line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace fastpe::emu {

struct Site {
  const char* file;
  int line;
};

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

enum class Schedule {
  fifo,     // threads take turns in order
  reverse,  // the thread that became ready last goes first
  random,   // by seed
  greedy,   // a warp runs until all of it waits
};
enum class CopyTiming {
  late,    // cp.async delivers at the wait; until then the destination holds 0xFF
  early,   // at issue
  random,  // either, by seed
};
struct Options {
  Schedule schedule = Schedule::fifo;
  CopyTiming copies = CopyTiming::late;
  uint64_t seed = 1;
  int workers = 2;  // OS threads; a block stays on one
};
Options& options();

struct Counters {
  uint64_t blocks = 0, mma = 0, ldmatrix = 0, cp_async = 0, barriers = 0;
  uint64_t extra_wavefronts = 0;  // of ldmatrix, beyond one a matrix: bank conflicts
};
Counters read_counters(bool reset);

// Runs fn(args) as every thread of every block. Throws std::runtime_error when a check fails.
void run_grid(const char* kernel, Dim3 grid, uint32_t threads, uint32_t shared_bytes, void (*fn)(const void*), const void* args);

// Another way of running kernels: asked before every launch; true means it ran the kernel and the emulator does not.
using Runner = bool (*)(const char* kernel, uint32_t blocks, uint32_t threads, uint32_t shared_bytes, const void* args, size_t args_bytes);
Runner& other_runner();

// ---- for the thread that is running ---------------------------------------------------------------------------------

struct Thread {
  uint32_t tid = 0, lane = 0, warp = 0;
  Dim3 block, grid;
  uint32_t threads = 0;
};
const Thread& self();
Counters& count();

[[noreturn]] void fail(const std::string& what, Site site);

void read_shared(uint32_t addr, void* to, uint32_t bytes, Site site);
void write_shared(uint32_t addr, const void* from, uint32_t bytes, Site site);

// A collective of the lanes in `mask`: the last lane to arrive calls compute(records of all lanes, mask), then all go
// on. Every lane must bring the same operation, site, mask and immediate.
struct WarpOp {
  const char* name;
  bool full_mask;
  void (*compute)(void* const* records, uint32_t mask, Site site);
};
void warp_op(const WarpOp& op, uint32_t mask, uint64_t immediate, void* record, Site site);
void sync_warp(uint32_t mask, Site site);

// The number that half-precision bits stand for. A number with a small exponent is taken for a float with that exponent, and scaled.
inline float float_of_f16(uint16_t x) {
  const uint32_t size = uint32_t(x & 0x7FFF) << 13, sign = uint32_t(x & 0x8000) << 16;
  const uint32_t finite = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, size) * 0x1p112f);
  return __builtin_bit_cast(float, sign | (size < 0x0F800000u ? finite : size | 0x7F800000u));
}

// Record of mma.m16n8k16: a lane's fragments. The two functions are what a WarpOp computes.
struct Mma {
  float* d;
  const uint32_t *a, *b;
};
void mma_bf16(void* const* records, uint32_t mask, Site site);
void mma_f16(void* const* records, uint32_t mask, Site site);

enum class Reduce { none, all, any };
bool barrier_sync(uint32_t id, uint32_t count, Reduce reduce, bool predicate, Site site);
void barrier_arrive(uint32_t id, uint32_t count, Site site);

void cp_async_16(uint32_t dst, const void* src, uint32_t src_bytes, Site site);
void cp_async_commit(Site site);
void cp_async_wait(uint32_t groups_left, Site site);

// Reads 16 bytes of a row for ldmatrix on behalf of the lane that gave the address.
void read_shared_as(uint32_t lane, uint32_t addr, void* to, uint32_t bytes, Site site);

// ---- memory whose end is followed by an inaccessible page ---------------------------------------------------------------
// An access past the end, by a kernel, is reported like any other failed check.

void* guarded_alloc(size_t bytes);
void guarded_free(void* p, size_t bytes);

}  // namespace fastpe::emu
