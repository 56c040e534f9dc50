#include "engine.h"

#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <thread>
#include <type_traits>

#if !defined(__x86_64__)
#error "the emulator switches stacks by hand and knows x86-64 only"
#endif

asm(R"(
.text
.globl fastpe_emu_switch
.hidden fastpe_emu_switch
.type fastpe_emu_switch, @function
fastpe_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastpe_emu_switch, .-fastpe_emu_switch
)");

namespace fastpe::emu {

constinit thread_local Fiber* t_fiber = nullptr;
constinit thread_local Engine* t_engine = nullptr;

void fiber_main() {
  Engine* e = t_engine;
  e->fn(e->args);
  Fiber& f = *t_fiber;
  if (f.copies.size() > f.open) fail("the thread ended without waiting for its cp.async", f.copies.front().site);
  if (f.open) fail("the thread ended with a cp.async that was never committed", f.copies.front().site);
  e->end_of_thread_sm90(f);
  f.state = State::done;
  --e->left;
  e->yield(f);
  __builtin_unreachable();
}

namespace {

// ---- faults inside kernels ---------------------------------------------------------------------------------------------

thread_local uintptr_t t_fault = 0;
struct sigaction g_before;

void after_fault() {
  Fiber& f = *t_fiber;
  fail(format("access to address 0x%zx, which is outside every tensor (last operation before it at %s)", size_t(t_fault), f.where.file ? at(f.where).c_str() : "the start"), f.where);
}
void on_fault(int sig, siginfo_t* info, void* context) {
  if (!t_fiber) {
    sigaction(sig, &g_before, nullptr);
    return;
  }
  // Go on in after_fault, on the thread's own stack, below everything the interrupted code may still hold.
  t_fault = reinterpret_cast<uintptr_t>(info->si_addr);
  auto* u = static_cast<ucontext_t*>(context);
  uintptr_t sp = uintptr_t(u->uc_mcontext.gregs[REG_RSP]);
  sp = ((sp - 1024) & ~uintptr_t(15)) - 8;
  u->uc_mcontext.gregs[REG_RSP] = greg_t(sp);
  u->uc_mcontext.gregs[REG_RIP] = greg_t(reinterpret_cast<uintptr_t>(&after_fault));
}

// While a launch runs, faults of kernels become errors; before and after, the process handles them as it did.
class FaultHandler {
 public:
  FaultHandler() {
    std::lock_guard<std::mutex> g(lock());
    if (users()++ > 0) return;
    struct sigaction a = {};
    a.sa_sigaction = on_fault;
    a.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigaction(SIGSEGV, &a, &g_before);
  }
  ~FaultHandler() {
    std::lock_guard<std::mutex> g(lock());
    if (--users() == 0) sigaction(SIGSEGV, &g_before, nullptr);
  }

 private:
  static std::mutex& lock() {
    static std::mutex m;
    return m;
  }
  static int& users() {
    static int n = 0;
    return n;
  }
};

// Engines are kept: their stacks are the expensive part.
std::mutex g_pool_lock;
std::vector<std::unique_ptr<Engine>> g_pool;
Counters g_counters;

std::unique_ptr<Engine> take_engine() {
  std::lock_guard<std::mutex> g(g_pool_lock);
  if (g_pool.empty()) return std::make_unique<Engine>();
  auto e = std::move(g_pool.back());
  g_pool.pop_back();
  return e;
}
void give_engine(std::unique_ptr<Engine> e) {
  std::lock_guard<std::mutex> g(g_pool_lock);
  Counters& c = e->counters;
  g_counters.blocks += c.blocks, g_counters.mma += c.mma, g_counters.ldmatrix += c.ldmatrix, g_counters.cp_async += c.cp_async;
  g_counters.barriers += c.barriers, g_counters.extra_wavefronts += c.extra_wavefronts;
  c = Counters{};
  g_pool.push_back(std::move(e));
}

}  // namespace

Options& options() {
  static Options o;
  return o;
}

Runner& other_runner() {
  static Runner r = nullptr;
  return r;
}

Counters read_counters(bool reset) {
  std::lock_guard<std::mutex> g(g_pool_lock);
  const Counters c = g_counters;
  if (reset) g_counters = Counters{};
  return c;
}

void run_grid(const char* kernel, Dim3 grid, uint32_t threads, uint32_t shared_bytes, void (*fn)(const void*), const void* args) {
  const auto refuse = [&](const char* why) { throw std::runtime_error(std::string("fastpe.emu: ") + kernel + ": " + why); };
  if (threads == 0 || threads > kMaxThreads || threads % 32) refuse("a block has 32 to 1024 threads in whole warps");
  if (shared_bytes > 227 * 1024) refuse("more shared memory than a block can have (227 KiB)");
  if (grid.y > 65535 || grid.z > 65535) refuse("the grid is larger than 65535 along y or z");
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (blocks == 0) refuse("the grid is empty");
  FaultHandler faults;
  std::atomic<uint64_t> next{0};
  std::atomic<bool> stop{false};
  std::mutex error_lock;
  std::string error;
  const auto work = [&] {
    std::unique_ptr<Engine> e = take_engine();
    e->opt = options();
    e->kernel = kernel;
    e->fn = fn;
    e->args = args;
    e->threads = threads;
    e->shared_bytes = shared_bytes;
    if (e->fibers.size() < threads) e->fibers.resize(threads);
    e->warps.resize(threads / 32);
    e->groups.resize((threads + 127) / 128);
    Engine* before = t_engine;
    t_engine = e.get();
    try {
      for (uint64_t b; !stop.load() && (b = next.fetch_add(1)) < blocks;)
        e->block({uint32_t(b % grid.x), uint32_t(b / grid.x % grid.y), uint32_t(b / grid.x / grid.y)}, grid);
    } catch (const std::exception& x) {
      std::lock_guard<std::mutex> g(error_lock);
      if (error.empty()) error = x.what();
      stop = true;
    }
    t_engine = before;
    give_engine(std::move(e));
  };
  const int workers = int(std::min<uint64_t>(uint64_t(std::max(1, options().workers)), blocks));
  std::vector<std::thread> others;
  for (int i = 1; i < workers; ++i) others.emplace_back(work);
  work();
  for (std::thread& t : others) t.join();
  if (stop) throw std::runtime_error(error);
}

// ---- for the thread that is running -----------------------------------------------------------------------------------

const Thread& self() { return t_fiber->info; }
Counters& count() { return t_engine->counters; }

void fail(const std::string& what, Site site) {
  Engine& e = *t_engine;
  Fiber& f = *t_fiber;
  e.error = e.name(f) + " at " + at(site) + ": " + what;
  e.failed = true;
  e.yield(f);
  __builtin_unreachable();
}

namespace {

// Calls f with the number of bytes of an access, 4 or 16, as a constant.
template <class Fn>
void with_size(uint32_t bytes, Site site, Fn&& f) {
  if (bytes == 16) f(std::integral_constant<uint32_t, 16>{});
  else if (bytes == 4) f(std::integral_constant<uint32_t, 4>{});
  else fail(format("an access of %u bytes", bytes), site);
}

}  // namespace

void read_shared_as(uint32_t lane, uint32_t addr, void* to, uint32_t bytes, Site site) {
  Engine& e = *t_engine;
  with_size(bytes, site, [&](auto n) {
    e.check_range(addr, n, site);
    e.note_read(t_fiber->info.warp, uint8_t(lane), addr, n, site);
    std::memcpy(to, e.memory.data() + addr, n);
  });
}
void read_shared(uint32_t addr, void* to, uint32_t bytes, Site site) {
  t_fiber->where = site;
  read_shared_as(t_fiber->info.lane, addr, to, bytes, site);
}
void write_shared(uint32_t addr, const void* from, uint32_t bytes, Site site) {
  Engine& e = *t_engine;
  t_fiber->where = site;
  with_size(bytes, site, [&](auto n) {
    e.check_range(addr, n, site);
    e.check_no_mbarrier(addr, n, site);
    e.note_write(t_fiber->info.warp, uint8_t(t_fiber->info.lane), addr, n, site, false, false);
    std::memcpy(e.memory.data() + addr, from, n);
  });
}

void warp_op(const WarpOp& op, uint32_t mask, uint64_t immediate, void* record, Site site) {
  Engine& e = *t_engine;
  Fiber& f = *t_fiber;
  Warp& w = e.warps[f.info.warp];
  f.where = site;
  const uint32_t bit = 1u << f.info.lane;
  if (!(mask & bit)) fail(format("%s with mask 0x%08x, which leaves out the lane itself", op.name, mask), site);
  if (op.full_mask && mask != 0xFFFFFFFFu) fail(format("%s needs the whole warp, mask is 0x%08x", op.name, mask), site);
  if (w.arrived == 0) {
    w.op = &op;
    w.site = site;
    w.mask = mask;
    w.immediate = immediate;
  } else if (w.op != &op || !same(w.site, site)) {
    fail(format("diverged: %s, while lanes 0x%08x of the warp are in %s at %s", op.name, w.arrived, w.op->name, at(w.site).c_str()), site);
  } else if (w.mask != mask || w.immediate != immediate) {
    fail(format("lanes of a warp disagree on the mask or on an immediate of %s (mask 0x%08x against 0x%08x)", op.name, mask, w.mask), site);
  }
  if (w.at_barrier) fail(format("diverged: %s, while lanes 0x%08x of the warp wait at a barrier", op.name, w.at_barrier), site);
  if (w.in_group) fail(format("diverged: %s, while lanes 0x%08x of the warp are in %s", op.name, w.in_group, e.groups[f.info.warp / 4].op->name), site);
  w.record[f.info.lane] = record;
  w.arrived |= bit;
  if (w.arrived != mask) {
    f.state = State::collective;
    e.yield(f);
    return;
  }
  if (op.compute) op.compute(w.record, mask, site);
  w.arrived = 0;
  for (uint32_t l = 0; l < 32; ++l)
    if ((mask >> l & 1) && l != f.info.lane) e.push(f.info.warp * 32 + l);
  e.pause_if_not_fifo(f);
}

void sync_warp(uint32_t mask, Site site) {
  static const WarpOp op{"bar.warp.sync", false, [](void* const*, uint32_t, Site) { ++t_engine->warps[t_fiber->info.warp].epoch; }};
  warp_op(op, mask, 0, nullptr, site);
}

namespace {

Barrier& join_barrier(uint32_t id, uint32_t count, Site site) {
  Engine& e = *t_engine;
  Fiber& f = *t_fiber;
  Warp& w = e.warps[f.info.warp];
  f.where = site;
  if (id >= kBarriers) fail(format("barrier %u does not exist", id), site);
  if (count == 0 || count % 32 || count > e.threads) fail(format("a barrier of %u threads in a block of %u", count, e.threads), site);
  if (w.arrived) fail(format("diverged: a barrier, while lanes 0x%08x of the warp are in %s at %s", w.arrived, w.op->name, at(w.site).c_str()), site);
  if (w.in_group) fail(format("diverged: a barrier, while lanes 0x%08x of the warp are in %s", w.in_group, e.groups[f.info.warp / 4].op->name), site);
  if (w.at_barrier && (w.barrier_id != id || !same(w.site, site))) fail(format("diverged: barrier %u, while lanes 0x%08x of the warp wait at barrier %u at %s", id, w.at_barrier, w.barrier_id, at(w.site).c_str()), site);
  w.site = site;
  w.barrier_id = id;
  w.at_barrier |= 1u << f.info.lane;
  Barrier& b = e.barriers[id];
  if (b.arrived == 0) {
    b.count = count;
    b.first = site;
    b.all = true;
    b.any = false;
    b.clock = Clock{};
  } else if (b.count != count) {
    fail(format("barrier %u of %u threads, others came with %u at %s", id, count, b.count, at(b.first).c_str()), site);
  }
  ++b.arrived;
  // A warp releases what it did before as a whole, with its last lane.
  if (w.at_barrier == 0xFFFFFFFFu) {
    b.clock.join(w.clock, e.units());
    ++w.clock.t[f.info.warp];
    ++w.epoch;
    w.at_barrier = 0;
    ++e.counters.barriers;
  }
  return b;
}

void complete(Barrier& b) {
  Engine& e = *t_engine;
  const bool all = b.all, any = b.any;
  const Reduce r = b.reduce;
  std::vector<uint16_t> waiting;
  waiting.swap(b.waiting);
  b.arrived = 0;
  for (uint16_t t : waiting) {
    Fiber& o = e.fibers[t];
    o.predicate = r == Reduce::all ? all : any;
    e.warps[o.info.warp].clock.join(b.clock, e.units());
    if (t != t_fiber->info.tid) e.push(t);
  }
}

}  // namespace

bool barrier_sync(uint32_t id, uint32_t count, Reduce reduce, bool predicate, Site site) {
  Engine& e = *t_engine;
  Fiber& f = *t_fiber;
  Barrier& b = join_barrier(id, count, site);
  b.all = b.all && predicate;
  b.any = b.any || predicate;
  b.reduce = reduce;
  b.waiting.push_back(uint16_t(f.info.tid));
  if (b.arrived == b.count) {
    complete(b);
    e.pause_if_not_fifo(f);
  } else {
    f.state = State::barrier;
    e.yield(f);
  }
  return f.predicate;
}

void barrier_arrive(uint32_t id, uint32_t count, Site site) {
  // The instruction is of the whole warp and does not block: without the rendezvous a lane could be two barriers ahead.
  struct Arrival {
    uint32_t id, count;
  } r{id, count};
  static const WarpOp op{"bar.arrive", true, [](void* const* records, uint32_t, Site s) {
    const Arrival& x = *static_cast<const Arrival*>(records[0]);
    Warp& w = t_engine->warps[t_fiber->info.warp];
    w.arrived = 0;
    Barrier* b = nullptr;
    const Thread self = t_fiber->info;
    for (uint32_t l = 0; l < 32; ++l) {
      t_fiber->info.lane = l;
      b = &join_barrier(x.id, x.count, s);
    }
    t_fiber->info = self;
    if (b->arrived == b->count) complete(*b);
  }};
  warp_op(op, 0xFFFFFFFFu, uint64_t(id) << 32 | count, &r, site);
}

void cp_async_16(uint32_t dst, const void* src, uint32_t src_bytes, Site site) {
  Engine& e = *t_engine;
  Fiber& f = *t_fiber;
  f.where = site;
  e.check_range(dst, 16, site);
  if (src_bytes > 16) fail(format("cp.async of %u source bytes", src_bytes), site);
  if (reinterpret_cast<uintptr_t>(src) % 16) fail("the global address of a cp.async is not aligned to 16 bytes", site);
  ++e.counters.cp_async;
  bool now = e.opt.copies == CopyTiming::early;
  if (e.opt.copies == CopyTiming::random) now = e.random() & 1;
  e.check_no_mbarrier(dst, 16, site);
  e.note_write(f.info.warp, uint8_t(f.info.lane), dst, 16, site, true, false, By::cp_async);
  if (now) {
    // The data is there, but nothing entitles anyone to read it: the cells stay in flight until the wait.
    uint8_t buf[16] = {};
    std::memcpy(buf, src, src_bytes);
    std::memcpy(e.memory.data() + dst, buf, 16);
  } else {
    std::memset(e.memory.data() + dst, 0xFF, 16);
  }
  f.copies.push_back({dst, src, src_bytes, site});
  ++f.open;
}
void cp_async_commit(Site site) {
  t_fiber->where = site;
  t_fiber->groups.push_back(t_fiber->open);
  t_fiber->open = 0;
}
void cp_async_wait(uint32_t groups_left, Site site) {
  Fiber& f = *t_fiber;
  f.where = site;
  if (f.groups.size() <= groups_left) return;
  const auto end = f.groups.end() - groups_left;
  auto copy = f.copies.begin();
  for (auto g = f.groups.begin(); g != end; ++g)
    for (uint32_t i = 0; i < *g; ++i) t_engine->land(f, *copy++, site);
  f.copies.erase(f.copies.begin(), copy);
  f.groups.erase(f.groups.begin(), end);
}

// ---- products ----------------------------------------------------------------------------------------------------------

namespace {

using Row = float __attribute__((vector_size(32)));

// Exact products, summed in float32 one k after the other.
template <bool kBf16, uint32_t kRows = 4>
inline __attribute__((always_inline)) void multiply(void* const* r) {
  alignas(32) uint16_t a[16 * 16], b[16 * 8];
  alignas(32) float A[16 * 16], B[16 * 8];
  Row D[16];
  for (uint32_t i = 0; i < 32; ++i) {
    const Mma& x = *static_cast<const Mma*>(r[i]);
    const uint32_t g = i >> 2, t = 2 * (i & 3);
    for (uint32_t e = 0; e < 4; ++e) std::memcpy(&a[(g + 8 * (e & 1)) * 16 + t + 8 * (e >> 1)], &x.a[e], 4);
    for (uint32_t e = 0; e < 2; ++e) {
      b[(t + 8 * e) * 8 + g] = uint16_t(x.b[e]);
      b[(t + 1 + 8 * e) * 8 + g] = uint16_t(x.b[e] >> 16);
      std::memcpy(reinterpret_cast<char*>(&D[g + 8 * e]) + 4 * t, &x.d[2 * e], 8);
    }
  }
  const auto wide = [](uint16_t x) __attribute__((always_inline)) { return kBf16 ? __builtin_bit_cast(float, uint32_t(x) << 16) : float_of_f16(x); };
  for (uint32_t i = 0; i < 256; ++i) A[i] = wide(a[i]);
  for (uint32_t i = 0; i < 128; ++i) B[i] = wide(b[i]);
  for (uint32_t m = 0; m < 16; m += kRows) {
    Row d[kRows];
    for (uint32_t y = 0; y < kRows; ++y) d[y] = D[m + y];
    for (uint32_t k = 0; k < 16; ++k) {
      Row x;
      std::memcpy(&x, B + 8 * k, sizeof(x));
      for (uint32_t y = 0; y < kRows; ++y) d[y] += A[(m + y) * 16 + k] * x;
    }
    for (uint32_t y = 0; y < kRows; ++y) D[m + y] = d[y];
  }
  for (uint32_t i = 0; i < 32; ++i) {
    float* d = static_cast<const Mma*>(r[i])->d;
    for (uint32_t e = 0; e < 2; ++e) std::memcpy(&d[2 * e], reinterpret_cast<const char*>(&D[(i >> 2) + 8 * e]) + 8 * (i & 3), 8);
  }
}

}  // namespace

// Compiled twice where the system can choose at load time.
#if defined(__gnu_linux__) && defined(__GLIBC__)
#define FASTPE_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define FASTPE_CLONES
#endif

FASTPE_CLONES void mma_bf16(void* const* records, uint32_t, Site) {
  ++t_engine->counters.mma;
  multiply<true>(records);
}
FASTPE_CLONES void mma_f16(void* const* records, uint32_t, Site) {
  ++t_engine->counters.mma;
  multiply<false>(records);
}

void* guarded_alloc(size_t bytes) {
  const size_t body = (bytes + kPage - 1) / kPage * kPage;
  void* m = mmap(nullptr, body + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (m == MAP_FAILED) throw std::runtime_error("fastpe.emu: no memory");
  char* p = static_cast<char*>(m);
  std::memset(p, 0xFF, body);
  mprotect(p + body, kPage, PROT_NONE);
  return p + (body - bytes);
}
void guarded_free(void* p, size_t bytes) {
  const size_t body = (bytes + kPage - 1) / kPage * kPage;
  munmap(static_cast<char*>(p) - (body - bytes), body + kPage);
}

}  // namespace fastpe::emu
