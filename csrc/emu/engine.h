// The inside of the emulator: what emu.cpp (threads, warps, barriers, cp.async) and sm90.cpp (mbarriers, bulk copies,
// wgmma) share. Nothing else includes it.
#pragma once

#include <algorithm>
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

struct Access {
  Site site{nullptr, 0};
  uint32_t clock = 0, epoch = 0;
  uint32_t fences = 0;  // of a write: how many fence.proxy.async the thread had executed
  uint8_t lane = kNobody;
  uint8_t warp = 0;
  bool in_flight = false;
  By by = By::thread;
};

// The last write and each unit's last read of one 4-byte cell. Units are the warps and the engine of bulk copies.
class Shadow {
 public:
  void start(uint32_t bytes, uint32_t units) {
    const size_t cells = (bytes + 3) / 4;
    if (units != units_ || cells > stamp_.size()) {
      units_ = units;
      stamp_.assign(cells, 0);
      access_.assign(cells * (units + 1), Access{});
      now_ = 0;
    }
    ++now_;
  }
  // Access number 0 of a cell is its last write, 1 + u the last read of unit u.
  Access* cell(uint32_t c) {
    Access* a = access_.data() + size_t(c) * (units_ + 1);
    if (stamp_[c] != now_) {
      stamp_[c] = now_;
      for (uint32_t i = 0; i <= units_; ++i) a[i].lane = kNobody, a[i].in_flight = false;
    }
    return a;
  }

 private:
  uint32_t units_ = 0, now_ = 0;
  std::vector<uint32_t> stamp_;
  std::vector<Access> access_;
};

// ---- threads, warps, barriers ----------------------------------------------------------------------------------------

enum class State : uint8_t { ready, collective, barrier, group, mbarrier, done };

struct Copy {
  uint32_t dst;
  const void* src;
  uint32_t bytes;
  Site site;
  bool landed;
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
  char* stack = nullptr;
  State state = State::done;
  Site where{nullptr, 0};
  bool predicate = false;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
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
  std::vector<uint16_t> ready;  // a ring for fifo, a list otherwise
  size_t head = 0, ready_count = 0;
  std::vector<uint8_t> memory;
  uint32_t shared_bytes = 0, threads = 0;
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
    if (opt.schedule == Schedule::fifo) ready[(head + ready_count) % kMaxThreads] = uint16_t(tid);
    else ready[ready_count] = uint16_t(tid);
    ++ready_count;
  }
  uint32_t pop() {
    if (opt.schedule == Schedule::fifo) {
      const uint32_t t = ready[head];
      head = (head + 1) % kMaxThreads;
      --ready_count;
      return t;
    }
    size_t i = ready_count - 1;
    if (opt.schedule == Schedule::random) i = random() % ready_count;
    if (opt.schedule == Schedule::greedy) {
      i = 0;
      for (size_t x = 0; x < ready_count; ++x)
        if (ready[x] / 32 == last_warp) { i = x; break; }
    }
    const uint32_t t = ready[i];
    std::copy(ready.begin() + i + 1, ready.begin() + ready_count, ready.begin() + i);
    --ready_count;
    last_warp = t / 32;
    return t;
  }

  uint32_t units() const { return uint32_t(warps.size()) + 1; }
  uint32_t bulk_unit() const { return uint32_t(warps.size()); }

  // Back to the scheduler; returns when this thread is chosen again.
  void yield(Fiber& f) { fastpe_emu_switch(&f.sp, scheduler_sp); }
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
    head = ready_count = 0;
    last_warp = 0;
    failed = false;
    memory.assign(shared_bytes, 0xFF);
    shadow.start(shared_bytes, units());
    for (Warp& w : warps) {
      w.op = nullptr;
      w.arrived = w.at_barrier = w.in_group = 0;
      w.epoch = 0;
      w.clock = Clock{};
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
      f.open.clear();
      f.groups.clear();
      f.fences = f.mbarrier_fences = 0;
      f.stores.clear();
      f.store_groups.clear();
      f.where = {nullptr, 0};
      prepare(f);
      push(t);
    }
    uint32_t left = threads;
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
      if (f.state == State::done) --left;
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
    const std::string who = a.warp == bulk_unit() ? "the bulk copy issued" : format("warp %u lane %s", a.warp, a.lane >= kTensorLane ? "several" : std::to_string(a.lane).c_str());
    fail(format("race on shared byte %u: this %s is not ordered after the %s of %s at %s", addr, now, before, who.c_str(), at(a.site).c_str()), site);
  }

  void note_read(uint32_t warp, uint8_t lane, uint32_t addr, uint32_t bytes, Site site) {
    const Warp& w = warps[warp];
    for (uint32_t c = addr / 4; c < (addr + bytes + 3) / 4; ++c) {
      Access* a = shadow.cell(c);
      if (a[0].in_flight) fail(format(a[0].by == By::bulk ? "shared byte %u is read before the bulk copy issued at %s has arrived" : "shared byte %u is read before the cp.async issued at %s has been waited for", c * 4, at(a[0].site).c_str()), site);
      if (!ordered(a[0], warp, lane)) race("read", "write", a[0], c * 4, site);
      Access& r = a[1 + warp];
      const bool mixed = r.lane != kNobody && r.lane != lane && r.epoch == w.epoch && r.clock == w.clock.t[warp];
      r = {site, w.clock.t[warp], w.epoch, 0, mixed ? kManyLanes : lane, uint8_t(warp), false, By::thread};
    }
  }
  // landing: the second half of a cp.async, which its own issue does not conflict with.
  void note_write(uint32_t warp, uint8_t lane, uint32_t addr, uint32_t bytes, Site site, bool in_flight, bool landing, By by = By::thread) {
    const Warp& w = warps[warp];
    for (uint32_t c = addr / 4; c < (addr + bytes + 3) / 4; ++c) {
      Access* a = shadow.cell(c);
      if (a[0].in_flight && !(landing && a[0].warp == warp && a[0].lane == lane))
        fail(format("shared byte %u is written while the %s issued at %s is under way", c * 4, a[0].by == By::bulk ? "bulk copy" : "cp.async", at(a[0].site).c_str()), site);
      if (!ordered(a[0], warp, lane)) race("write", "write", a[0], c * 4, site);
      for (uint32_t i = 0; i < units(); ++i) {
        if (!ordered(a[1 + i], warp, lane)) race("write", "read", a[1 + i], c * 4, site);
        a[1 + i].lane = kNobody;
      }
      a[0] = {site, w.clock.t[warp], w.epoch, fibers[warp * 32 + lane].fences, lane, uint8_t(warp), in_flight, by};
    }
  }
  // Before wgmma or a bulk copy takes memory: what threads wrote there has to be behind their fence.proxy.async.
  void check_proxy(const char* what, uint32_t addr, uint32_t bytes, Site site) {
    for (uint32_t c = addr / 4; c < (addr + bytes + 3) / 4; ++c) {
      const Access& a = shadow.cell(c)[0];
      if (a.lane != kNobody && a.by != By::bulk && a.fences == fibers[a.warp * 32u + a.lane].fences)
        fail(format("%s shared byte %u, which warp %u lane %u wrote at %s and has executed no fence.proxy.async since", what, c * 4, a.warp, a.lane, at(a.site).c_str()), site);
    }
  }
  void check_no_mbarrier(uint32_t addr, uint32_t bytes, Site site) {
    if (mbarriers.empty()) return;
    const auto next = mbarriers.lower_bound(addr + bytes);
    if (next != mbarriers.begin() && std::prev(next)->first + 8 > addr) fail(format("shared byte %u belongs to the mbarrier initialised at %s", std::prev(next)->first, at(std::prev(next)->second.init).c_str()), site);
  }

  void land(Fiber& f, Copy& c, Site wait) {
    if (c.landed) return;
    note_write(f.info.warp, uint8_t(f.info.lane), c.dst, 16, c.site, false, true, By::cp_async);
    f.where = wait;
    uint8_t buf[16] = {};
    std::memcpy(buf, c.src, c.bytes);
    std::memcpy(memory.data() + c.dst, buf, 16);
    c.landed = true;
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
