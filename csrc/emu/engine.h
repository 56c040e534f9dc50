// The inside of the emulator: what emu.cpp (threads, warps, barriers, cp.async) and sm90.cpp (mbarriers, bulk copies,
// wgmma) share. Nothing else includes it.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <sys/mman.h>

#include "emu.h"

// Saves the callee-saved registers on this stack and goes on with another one.
extern "C" void fastpe_emu_switch(void** save, void* load);

namespace fastpe::emu {

constexpr uint32_t kMaxThreads = 1024, kMaxWarps = kMaxThreads / 32, kBarriers = 16;
constexpr size_t kStack = 256 << 10, kPage = 4096;

inline std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
inline std::string format(const char* text, ...) {
  char buf[1024];
  va_list a;
  va_start(a, text);
  vsnprintf(buf, sizeof(buf), text, a);
  va_end(a);
  return buf;
}

inline const char* base_name(const char* path) {
  const char* s = path ? std::strrchr(path, '/') : nullptr;
  return s ? s + 1 : path ? path : "?";
}
inline std::string at(Site s) { return format("%s:%d", base_name(s.file), s.line); }
inline bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

// ---- shared-memory accesses in order -------------------------------------------------------------------------------

// Vector clock: what each warp, and after the last warp the engine of bulk copies, is known to have done.
struct Clock {
  uint32_t t[kMaxWarps + 1] = {};
  void join(const Clock& o, uint32_t n) {
    for (uint32_t i = 0; i < n; ++i) t[i] = std::max(t[i], o.t[i]);
  }
};

// kTensorLane: operands of wgmma, which are read for the warp as a whole.
constexpr uint8_t kNobody = 0xFF, kManyLanes = 0xFE, kTensorLane = 0xFD;

enum class By : uint8_t { thread, cp_async, bulk };

// 24 bytes, so that a line of the cache holds what is known of a row of a tile.
struct Access {
  const char* file = nullptr;
  uint32_t clock = 0, epoch = 0;
  uint32_t fences = 0;  // of a write: how many fence.proxy.async the thread had executed
  uint32_t line : 15, lane : 8, warp : 6, kind : 2, in_flight : 1;

  Access() : line(0), lane(kNobody), warp(0), kind(0), in_flight(0) {}
  Access(Site s, uint32_t clock, uint32_t epoch, uint32_t fences, uint8_t lane, uint32_t unit, bool in_flight, By by)
      : file(s.file), clock(clock), epoch(epoch), fences(fences), line(uint32_t(s.line) & 0x7FFF), lane(lane), warp(unit & 63), kind(uint32_t(by) & 3), in_flight(in_flight) {}
  Site site() const { return {file, int(line)}; }
  By by() const { return By(kind); }
};
static_assert(sizeof(Access) == 24 && kMaxWarps < 64);

// The last write and each unit's last read of every 4-byte cell. Units are the warps and the engine of bulk copies.
// 16 aligned bytes that were only touched together, as tiles are copied and read, are kept as one cell.
class Shadow {
 public:
  struct Cell {
    Access& write;
    uint64_t& readers;  // bit u: read(u) counts
    Access* first_read;
    size_t cells;
    Access& read(uint32_t unit) const { return first_read[unit * cells]; }
  };

  void start(uint32_t bytes, uint32_t units) {
    const size_t chunks = (bytes + 15) / 16;
    cells_ = chunks * 4;
    if (chunks > chunks_.size()) chunks_.resize(chunks);
    if (cells_ * units > reads_.size()) reads_.resize(cells_ * units);
    ++now_;
  }

  // Calls f(cell, its address) for the cells of an aligned access of 4, 8 or 16 bytes.
  template <class Fn>
  void touch(uint32_t addr, uint32_t bytes, Fn&& f) {
    Chunk& k = chunk(addr / 16);
    if (bytes == 16 && !k.split) return f(cell(k, addr), addr);
    if (!k.split) split(k, addr);
    for (uint32_t x = addr; x < addr + bytes; x += 4) f(cell(k, x), x);
  }
  // After a write to 16 aligned bytes: one cell from now on.
  void join(uint32_t addr) { chunks_[addr / 16].split = false; }
  const Access& last_write(uint32_t addr) {
    const Chunk& k = chunk(addr / 16);
    return k.writes[k.split ? addr / 4 % 4 : 0];
  }

 private:
  struct alignas(64) Chunk {
    uint32_t stamp = 0;  // block that used it last
    bool split = false;
    uint64_t readers[4];
    Access writes[4];
  };

  Chunk& chunk(uint32_t i) {
    Chunk& k = chunks_[i];
    if (k.stamp != now_) {
      k.stamp = now_;
      k.split = false;
      k.readers[0] = 0;
      k.writes[0] = {};
    }
    return k;
  }
  Cell cell(Chunk& k, uint32_t addr) { return {k.writes[addr / 4 % 4], k.readers[addr / 4 % 4], reads_.data() + addr / 4, cells_}; }
  void split(Chunk& k, uint32_t addr) {
    k.split = true;
    const uint32_t from = addr / 16 * 16;
    const Cell all = cell(k, from);
    for (uint32_t c = 1; c < 4; ++c) {
      const Cell one = cell(k, from + 4 * c);
      one.write = all.write;
      one.readers = all.readers;
      for (uint64_t left = all.readers; left; left &= left - 1) one.read(uint32_t(std::countr_zero(left))) = all.read(uint32_t(std::countr_zero(left)));
    }
  }

  size_t cells_ = 0;
  uint32_t now_ = 0;
  std::vector<Chunk> chunks_;
  std::vector<Access> reads_;  // (units,cells): a warp's reads of neighbours lie together
};

// ---- threads, warps, barriers ----------------------------------------------------------------------------------------

enum class State : uint8_t { ready, collective, barrier, group, mbarrier, done };

struct Copy {
  uint32_t dst;
  const void* src;
  uint32_t bytes;
  Site site;
};

struct Engine;

// A bulk copy to shared memory: 16-byte chunks and where they go.
struct BulkLoad {
  std::vector<uint32_t> chunks;
  std::vector<uint8_t> data;
  uint32_t mbarrier;
  Site site;
};
// A tile on its way from shared to global memory: chunks of shared memory, where they go and how much of them.
struct BulkStore {
  struct Piece {
    uint32_t from, bytes;
    uint8_t* to;
  };
  std::vector<Piece> pieces;
  uint32_t clock;
  Site site;
  bool landed;
};

struct Mbarrier {
  uint32_t count, pending, phase;
  int64_t tx;
  Clock released, complete;  // by the arrivals of this phase, of all earlier ones
  Site init;
  uint32_t thread, fences;  // that initialised it, and the fences it had executed then
  std::vector<uint16_t> waiting;
};

// One wgmma between issue and wait.
struct Wgmma {
  uint32_t n;
  bool bf16, a_in_registers, trans_a, trans_b, accumulate;
  uint64_t a, b;  // descriptors
  std::vector<uint32_t> a_registers;  // (128,4)
  size_t accumulator;  // index
  Site site;
};
// An accumulator that some wgmma on its way will change: its registers hold NaN meanwhile.
struct Accumulator {
  float* registers[128];
  uint32_t n;  // numbers a thread
  std::vector<float> value;  // (128,n)
  uint32_t pending;
};
struct Group {
  const WarpOp* op = nullptr;
  Site site{nullptr, 0};
  uint32_t arrived = 0;
  uint64_t immediate = 0;
  void* record[128];
  bool fenced = false;
  uint32_t registers = 0;  // setmaxnreg, 0: as launched
  std::vector<Wgmma> open;
  std::deque<std::vector<Wgmma>> groups;
  std::vector<Accumulator> accumulators;
};

struct Fiber {
  Thread info;
  void* sp = nullptr;
  Site where{nullptr, 0};
  State state = State::done;
  bool predicate = false;
  char* stack = nullptr;
  std::vector<Copy> copies;      // not waited for, the oldest first
  std::vector<uint32_t> groups;  // how many of them are in each group that was committed
  uint32_t open = 0;             // and in none
  uint32_t fences = 0, mbarrier_fences = 0;
  uint32_t mbarrier = 0, parity = 0;  // waited for
  std::vector<BulkStore> stores;
  std::deque<std::vector<BulkStore>> store_groups;
};

struct Warp {
  const WarpOp* op = nullptr;
  Site site{nullptr, 0};
  uint32_t mask = 0, arrived = 0, at_barrier = 0, in_group = 0;
  uint32_t barrier_id = 0;
  uint64_t immediate = 0;
  void* record[32];
  Clock clock;
  uint32_t epoch = 0;
  // For greedy: a ring of ready threads, and whether the warp is in the list of those that have some.
  uint16_t ready[32];
  uint32_t head = 0, ready_count = 0;
  bool listed = false;
};

struct Barrier {
  uint32_t count = 0, arrived = 0;
  bool all = true, any = false;
  Reduce reduce = Reduce::none;
  Clock clock;
  Site first{nullptr, 0};
  std::vector<uint16_t> waiting;
};

extern constinit thread_local Fiber* t_fiber;
extern constinit thread_local Engine* t_engine;

struct Random {
  uint64_t s;
  uint64_t operator()() {  // splitmix64
    uint64_t z = (s += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
};

void fiber_main();

struct Engine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Group> groups;
  Barrier barriers[kBarriers];
  std::map<uint32_t, Mbarrier> mbarriers;  // by address
  std::vector<BulkLoad> bulk;              // on their way
  uint32_t bulk_clock = 0;
  // Threads: a ring for fifo, a list for reverse and random. For greedy a ring of `listed` warps: all that have ready threads,
  // in the order in which they came to have some, except perhaps the last one that ran.
  std::vector<uint16_t> ready;
  size_t head = 0, ready_count = 0, listed = 0;
  std::vector<uint8_t> memory;
  uint32_t shared_bytes = 0, threads = 0, left = 0;  // left: threads that have not ended
  Shadow shadow;
  Options opt;
  Random random{1};
  Counters counters;
  uint32_t last_warp = 0;
  const char* kernel = "";
  void (*fn)(const void*) = nullptr;
  const void* args = nullptr;
  void* scheduler_sp = nullptr;
  bool failed = false;
  std::string error;

  Engine() { ready.resize(kMaxThreads); }
  ~Engine() {
    for (Fiber& f : fibers)
      if (f.stack) munmap(f.stack, kStack + kPage);
  }

  void push(uint32_t tid) {
    fibers[tid].state = State::ready;
    ++ready_count;
    switch (opt.schedule) {
      case Schedule::fifo: ready[(head + ready_count - 1) % kMaxThreads] = uint16_t(tid); break;
      case Schedule::reverse:
      case Schedule::random: ready[ready_count - 1] = uint16_t(tid); break;
      case Schedule::greedy: {
        Warp& w = warps[tid / 32];
        w.ready[(w.head + w.ready_count++) % 32] = uint16_t(tid);
        if (w.listed) break;
        w.listed = true;
        ready[(head + listed++) % kMaxThreads] = uint16_t(tid / 32);
      }
    }
  }
  uint32_t pop() {
    --ready_count;
    switch (opt.schedule) {
      case Schedule::fifo: {
        const uint32_t t = ready[head];
        head = (head + 1) % kMaxThreads;
        return t;
      }
      case Schedule::random: {
        const size_t i = random() % (ready_count + 1);
        const uint32_t t = ready[i];
        std::copy(ready.begin() + i + 1, ready.begin() + ready_count + 1, ready.begin() + i);
        return t;
      }
      case Schedule::greedy: {
        while (warps[last_warp].ready_count == 0) {
          last_warp = ready[head];
          head = (head + 1) % kMaxThreads;
          --listed;
          warps[last_warp].listed = false;
        }
        Warp& w = warps[last_warp];
        const uint32_t t = w.ready[w.head];
        w.head = (w.head + 1) % 32;
        --w.ready_count;
        return t;
      }
      case Schedule::reverse: break;
    }
    return ready[ready_count];
  }

  uint32_t units() const { return uint32_t(warps.size()) + 1; }
  uint32_t bulk_unit() const { return uint32_t(warps.size()); }

  // Goes on with the next thread, or with block() when there is none; returns when this thread is chosen again.
  void yield(Fiber& f) {
    if (ready_count == 0 || failed) return fastpe_emu_switch(&f.sp, scheduler_sp);
    Fiber& next = fibers[pop()];
    if (&next == &f) return;
    t_fiber = &next;
    fastpe_emu_switch(&f.sp, next.sp);
  }
  void pause_if_not_fifo(Fiber& f) {
    if (opt.schedule == Schedule::fifo) return;
    push(f.info.tid);
    yield(f);
  }

  void prepare(Fiber& f) {
    if (!f.stack) {
      void* m = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
      if (m == MAP_FAILED) throw std::runtime_error("fastpe.emu: no memory for thread stacks");
      f.stack = static_cast<char*>(m);
      mprotect(f.stack, kPage, PROT_NONE);
    }
    // Staggered, or the frames of all threads fall into the same cache sets.
    char* top = f.stack + kPage + kStack - (f.info.tid % 64) * 64;
    void** sp = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
    *--sp = nullptr;  // what fiber_main would return to; also gives the alignment a call gives
    *--sp = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; ++i) *--sp = nullptr;
    f.sp = sp;
  }

  std::string name(const Fiber& f) const {
    return format("%s: block (%u,%u,%u) thread %u (warp %u lane %u)", kernel, f.info.block.x, f.info.block.y, f.info.block.z, f.info.tid, f.info.warp, f.info.lane);
  }

  void deadlock() {
    std::map<std::string, std::vector<uint32_t>> states;
    for (uint32_t t = 0; t < threads; ++t) {
      const Fiber& f = fibers[t];
      std::string what;
      if (f.state == State::done) what = "has ended";
      else if (f.state == State::barrier) what = "waits at the barrier at " + at(f.where);
      else if (f.state == State::mbarrier) what = waits_at_mbarrier(f);
      else if (f.state == State::group) what = std::string("waits in ") + groups[t / 128].op->name + " at " + at(f.where);
      else what = std::string("waits in ") + (warps[t / 32].op ? warps[t / 32].op->name : "a collective") + " at " + at(f.where);
      states[what].push_back(t);
    }
    error = format("%s: block (%u,%u,%u): deadlock:", kernel, fibers[0].info.block.x, fibers[0].info.block.y, fibers[0].info.block.z);
    for (const auto& [what, list] : states) {
      error += " threads";
      for (size_t i = 0; i < list.size();) {
        size_t e = i;
        while (e + 1 < list.size() && list[e + 1] == list[e] + 1) ++e;
        error += e > i ? format(" %u-%u", list[i], list[e]) : format(" %u", list[i]);
        i = e + 1;
      }
      error += " " + what + ";";
    }
    failed = true;
  }

  void block(Dim3 index, Dim3 grid) {
    head = ready_count = listed = 0;
    last_warp = 0;
    failed = false;
    memory.assign(shared_bytes, 0xFF);
    shadow.start(shared_bytes, units());
    for (Warp& w : warps) {
      w.op = nullptr;
      w.arrived = w.at_barrier = w.in_group = 0;
      w.epoch = 0;
      w.clock = Clock{};
      w.head = w.ready_count = 0;
      w.listed = false;
    }
    for (uint32_t i = 0; i < warps.size(); ++i) warps[i].clock.t[i] = 1;
    for (Barrier& b : barriers) {
      b.count = b.arrived = 0;
      b.waiting.clear();
    }
    start_sm90();
    random.s = opt.seed + 1000003ull * (index.x + uint64_t(grid.x) * (index.y + uint64_t(grid.y) * index.z));
    for (uint32_t t = 0; t < threads; ++t) {
      Fiber& f = fibers[t];
      f.info = {t, t % 32, t / 32, index, grid, threads};
      f.copies.clear();
      f.groups.clear();
      f.open = 0;
      f.fences = f.mbarrier_fences = 0;
      f.stores.clear();
      f.store_groups.clear();
      f.where = {nullptr, 0};
      prepare(f);
      push(t);
    }
    left = threads;
    while (left > 0 && !failed) {
      if (ready_count == 0) {
        if (deliver()) continue;
        deadlock();
        break;
      }
      Fiber& f = fibers[pop()];
      t_fiber = &f;
      fastpe_emu_switch(&scheduler_sp, f.sp);
      t_fiber = nullptr;
    }
    ++counters.blocks;
    if (failed) throw std::runtime_error("fastpe.emu: " + error);
    end_sm90(index);
    for (uint32_t i = 0; i < kBarriers; ++i)
      if (barriers[i].arrived)
        throw std::runtime_error(format("fastpe.emu: %s: block (%u,%u,%u): %u threads arrived at barrier %u, first at %s, and nobody waited for them", kernel, index.x, index.y, index.z, barriers[i].arrived, i, at(barriers[i].first).c_str()));
  }

  // ---- order of shared accesses --------------------------------------------------------------------------------------

  void check_range(uint32_t addr, uint32_t bytes, Site site) {
    if (addr % bytes) fail(format("shared address %u is not aligned to %u bytes", addr, bytes), site);
    if (addr > shared_bytes || bytes > shared_bytes - addr) fail(format("shared address %u + %u is outside the block's %u bytes", addr, bytes, shared_bytes), site);
  }

  bool ordered(const Access& a, uint32_t warp, uint8_t lane) const {
    if (a.lane == kNobody) return true;
    if (a.warp != warp) return warps[warp].clock.t[a.warp] >= a.clock;
    return a.lane == lane || a.epoch != warps[warp].epoch;
  }
  [[noreturn]] void race(const char* now, const char* before, const Access& a, uint32_t addr, Site site) {
    const std::string who = a.warp == bulk_unit() ? "the bulk copy issued" : format("warp %u lane %s", uint32_t(a.warp), a.lane >= kTensorLane ? "several" : std::to_string(uint32_t(a.lane)).c_str());
    fail(format("race on shared byte %u: this %s is not ordered after the %s of %s at %s", addr, now, before, who.c_str(), at(a.site()).c_str()), site);
  }

  void note_read(uint32_t warp, uint8_t lane, uint32_t addr, uint32_t bytes, Site site) {
    const Warp& w = warps[warp];
    shadow.touch(addr, bytes, [&](Shadow::Cell c, uint32_t at_byte) {
      if (c.write.in_flight) fail(format(c.write.by() == By::bulk ? "shared byte %u is read before the bulk copy issued at %s has arrived" : "shared byte %u is read before the cp.async issued at %s has been waited for", at_byte, at(c.write.site()).c_str()), site);
      if (!ordered(c.write, warp, lane)) race("read", "write", c.write, at_byte, site);
      Access& r = c.read(warp);
      const bool mixed = (c.readers >> warp & 1) && r.lane != lane && r.epoch == w.epoch && r.clock == w.clock.t[warp];
      r = {site, w.clock.t[warp], w.epoch, 0, mixed ? kManyLanes : lane, warp, false, By::thread};
      c.readers |= uint64_t(1) << warp;
    });
  }
  // landing: the second half of a cp.async, which its own issue does not conflict with.
  void note_write(uint32_t warp, uint8_t lane, uint32_t addr, uint32_t bytes, Site site, bool in_flight, bool landing, By by = By::thread) {
    const Warp& w = warps[warp];
    shadow.touch(addr, bytes, [&](Shadow::Cell c, uint32_t at_byte) {
      if (c.write.in_flight && !(landing && c.write.warp == warp && c.write.lane == lane))
        fail(format("shared byte %u is written while the %s issued at %s is under way", at_byte, c.write.by() == By::bulk ? "bulk copy" : "cp.async", at(c.write.site()).c_str()), site);
      if (!ordered(c.write, warp, lane)) race("write", "write", c.write, at_byte, site);
      for (uint64_t left = c.readers; left; left &= left - 1) {
        const Access& r = c.read(uint32_t(std::countr_zero(left)));
        if (!ordered(r, warp, lane)) race("write", "read", r, at_byte, site);
      }
      c.readers = 0;
      c.write = {site, w.clock.t[warp], w.epoch, fibers[warp * 32 + lane].fences, lane, warp, in_flight, by};
    });
    if (bytes == 16) shadow.join(addr);
  }
  // Before wgmma or a bulk copy takes memory: what threads wrote there has to be behind their fence.proxy.async.
  void check_proxy(const char* what, uint32_t addr, uint32_t bytes, Site site) {
    for (uint32_t x = addr; x < addr + bytes; x += 4) {
      const Access& a = shadow.last_write(x);
      if (a.lane != kNobody && a.by() != By::bulk && a.fences == fibers[a.warp * 32u + a.lane].fences)
        fail(format("%s shared byte %u, which warp %u lane %u wrote at %s and has executed no fence.proxy.async since", what, x, uint32_t(a.warp), uint32_t(a.lane), at(a.site()).c_str()), site);
    }
  }
  void check_no_mbarrier(uint32_t addr, uint32_t bytes, Site site) {
    if (mbarriers.empty()) return;
    const auto next = mbarriers.lower_bound(addr + bytes);
    if (next != mbarriers.begin() && std::prev(next)->first + 8 > addr) fail(format("shared byte %u belongs to the mbarrier initialised at %s", std::prev(next)->first, at(std::prev(next)->second.init).c_str()), site);
  }

  void land(Fiber& f, const Copy& c, Site wait) {
    note_write(f.info.warp, uint8_t(f.info.lane), c.dst, 16, c.site, false, true, By::cp_async);
    f.where = wait;
    uint8_t buf[16] = {};
    std::memcpy(buf, c.src, c.bytes);
    std::memcpy(memory.data() + c.dst, buf, 16);
  }

  // ---- sm90.cpp --------------------------------------------------------------------------------------------------------

  void start_sm90();
  void end_sm90(Dim3 index);  // throws if the block left something behind
  bool deliver();             // one bulk copy; false: none is on its way
  void land(const BulkLoad& b);
  void landed(uint32_t mbarrier, int64_t bytes);
  void finish_phase(Mbarrier& b);
  std::string waits_at_mbarrier(const Fiber& f) const;
  void end_of_thread_sm90(const Fiber& f);
};

}  // namespace fastpe::emu
