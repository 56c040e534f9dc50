#include "sm90.h"

#include "engine.h"

namespace fastpe::emu {
namespace {

constexpr uint32_t kPoison = 0x7FC0DEAD;  // a NaN

uint32_t bits(float x) { return __builtin_bit_cast(uint32_t, x); }

Mbarrier& mbarrier_at(const char* what, uint32_t addr, Site site) {
  Engine& e = *t_engine;
  e.check_range(addr, 8, site);
  const auto found = e.mbarriers.find(addr);
  if (found == e.mbarriers.end()) fail(format("%s on shared address %u, where no mbarrier is initialised", what, addr), site);
  const Access& a = e.shadow.last_write(addr);
  const Thread& self = t_fiber->info;
  if (!e.ordered(a, self.warp, uint8_t(self.lane))) fail(format("%s is not ordered after the mbarrier's initialisation at %s", what, at(found->second.init).c_str()), site);
  e.note_read(self.warp, uint8_t(self.lane), addr, 8, site);
  return found->second;
}

uint32_t swizzled(uint32_t swizzle, uint32_t a) {
  switch (swizzle) {
    case 1: return a ^ ((a >> 3) & 0x10);
    case 2: return a ^ ((a >> 3) & 0x30);
    case 3: return a ^ ((a >> 3) & 0x70);
    default: return a;
  }
}

void check_mbarrier_of_copy(uint32_t addr, Site site) {
  const Mbarrier& b = mbarrier_at("a bulk copy that completes", addr, site);
  const Fiber& f = t_engine->fibers[b.thread];
  if (f.fences + f.mbarrier_fences == b.fences) fail(format("a bulk copy completes on the mbarrier initialised at %s, and its thread has executed no fence.mbarrier_init or fence.proxy.async since", at(b.init).c_str()), site);
}

// Calls f(shared address, global address, bytes inside) for every 16 bytes of a box.
template <class Fn>
void for_each_chunk(const TensorMap& m, const int32_t* where, uint32_t rank, uint32_t shared, Site site, Fn&& f) {
  if (m.magic != TensorMap::kMagic) fail("this is not a tensor map", site);
  if (m.rank != rank) fail(format("a copy of %u coordinates with a tensor map of %u dimensions", rank, m.rank), site);
  const uint32_t inner = m.box[0] * m.element, span[] = {128, 256, 512, 1024};
  if (shared % span[m.swizzle]) fail(format("shared address %u of a tile is not aligned to %u bytes, which its swizzle needs", shared, span[m.swizzle]), site);
  const uint32_t planes = rank == 3 ? m.box[2] : 1;
  for (uint32_t z = 0; z < planes; ++z)
    for (uint32_t y = 0; y < m.box[1]; ++y)
      for (uint32_t c = 0; c < inner / 16; ++c) {
        const uint32_t to = swizzled(m.swizzle, shared + (z * m.box[1] + y) * inner + c * 16);
        const int64_t x = int64_t(where[0]) + c * (16 / m.element), row = int64_t(where[1]) + y, plane = rank == 3 ? int64_t(where[2]) + z : 0;
        const bool outside = row < 0 || row >= int64_t(m.dims[1]) || (rank == 3 && (plane < 0 || plane >= int64_t(m.dims[2])));
        uint8_t* line = m.base + row * int64_t(m.strides[0]) + plane * int64_t(rank == 3 ? m.strides[1] : 0);
        // Elements of the chunk that lie inside the tensor.
        const int64_t n = 16 / m.element, lo = std::clamp<int64_t>(-x, 0, n), hi = std::clamp<int64_t>(int64_t(m.dims[0]) - x, 0, n);
        if (outside || hi <= lo) f(to, static_cast<uint8_t*>(nullptr), 0u, 0u);
        else f(to, line + (x + lo) * m.element, uint32_t(lo * m.element), uint32_t((hi - lo) * m.element));
      }
}

void issue(BulkLoad&& b) {
  Engine& e = *t_engine;
  Fiber& f = *t_fiber;
  bool now = e.opt.copies == CopyTiming::early;
  if (e.opt.copies == CopyTiming::random) now = e.random() & 1;
  for (uint32_t addr : b.chunks) {
    e.check_range(addr, 16, b.site);
    e.check_no_mbarrier(addr, 16, b.site);
    e.check_proxy("a bulk copy overwrites", addr, 16, b.site);
    e.note_write(f.info.warp, uint8_t(f.info.lane), addr, 16, b.site, true, false, By::bulk);
    std::memset(e.memory.data() + addr, 0xFF, 16);
  }
  if (now) e.land(b);
  else e.bulk.push_back(std::move(b));
}

// ---- wgmma -------------------------------------------------------------------------------------------------------------

// Where element (mn, k) of an operand lies. Checks what the descriptor says.
uint32_t element_at(uint64_t desc, bool trans, uint32_t mn, uint32_t k) {
  const uint32_t start = uint32_t(desc & 0x3FFF) << 4, lead = uint32_t(desc >> 16 & 0x3FFF) << 4, stride = uint32_t(desc >> 32 & 0x3FFF) << 4;
  const uint32_t a = trans ? start + mn / 64 * lead + mn % 64 * 2 + (k & 7) * 128 + (k >> 3) * stride
                           : start + (mn >> 3) * stride + (mn & 7) * 128 + 2 * k;
  return swizzled(3, a);
}
// Calls f(first row, first k, address) for every 16 bytes of an operand of `rows` rows or columns and 16 k.
template <class Fn>
void for_each_chunk(uint64_t desc, bool trans, uint32_t rows, Fn&& f) {
  if (trans) {
    for (uint32_t k = 0; k < 16; ++k)
      for (uint32_t mn = 0; mn < rows; mn += 8) f(mn, k, element_at(desc, true, mn, k));
  } else {
    for (uint32_t mn = 0; mn < rows; ++mn)
      for (uint32_t k = 0; k < 16; k += 8) f(mn, k, element_at(desc, false, mn, k));
  }
}

// Reads of both operands by the warps that take them: rows of a by the warp that owns them, b by all.
void note_operands(Group& g, const Wgmma& w, bool issued) {
  Engine& e = *t_engine;
  const uint32_t first = uint32_t(&g - e.groups.data()) * 4;
  const auto look = [&](uint32_t warp, uint32_t addr) {
    e.check_range(addr, 16, w.site);
    if (issued) e.check_proxy("wgmma reads", addr, 16, w.site);
    e.note_read(warp, kTensorLane, addr, 16, w.site);
  };
  if (!w.a_in_registers) for_each_chunk(w.a, w.trans_a, 64, [&](uint32_t m, uint32_t, uint32_t addr) { look(first + m / 16, addr); });
  for_each_chunk(w.b, w.trans_b, w.n, [&](uint32_t, uint32_t, uint32_t addr) {
    for (uint32_t i = 0; i < 4; ++i) look(first + i, addr);
  });
}

float wide(uint16_t x, bool bf16) { return bf16 ? __builtin_bit_cast(float, uint32_t(x) << 16) : float_of_f16(x); }

void operand(const Wgmma& w, uint64_t desc, bool trans, uint32_t rows, float* to /* (16,rows) */) {
  const uint8_t* memory = t_engine->memory.data();
  for_each_chunk(desc, trans, rows, [&](uint32_t mn, uint32_t k, uint32_t addr) {
    uint16_t x[8];
    std::memcpy(x, memory + addr, 16);
    for (uint32_t i = 0; i < 8; ++i) to[(trans ? k : k + i) * rows + (trans ? mn + i : mn)] = wide(x[i], w.bf16);
  });
}

uint32_t row_of(uint32_t thread, uint32_t i) { return 16 * (thread >> 5) + (thread >> 2 & 7) + 8 * (i >> 1 & 1); }
uint32_t column_of(uint32_t thread, uint32_t i) { return 8 * (i >> 2) + 2 * (thread & 3) + (i & 1); }

__attribute__((optimize("O3"))) void execute(Group& g, Wgmma& w) {
  note_operands(g, w, false);
  std::vector<float> A(64 * 16), B(16 * w.n), D(64 * w.n);
  if (w.a_in_registers) {
    for (uint32_t t = 0; t < 128; ++t)
      for (uint32_t i = 0; i < 4; ++i)
        for (uint32_t h = 0; h < 2; ++h)
          A[(2 * (t & 3) + h + 8 * (i >> 1)) * 64 + 16 * (t >> 5) + (t >> 2 & 7) + 8 * (i & 1)] = wide(uint16_t(w.a_registers[t * 4 + i] >> 16 * h), w.bf16);
  } else {
    operand(w, w.a, w.trans_a, 64, A.data());
  }
  operand(w, w.b, w.trans_b, w.n, B.data());
  Accumulator& acc = g.accumulators[w.accumulator];
  if (w.accumulate)
    for (uint32_t t = 0; t < 128; ++t)
      for (uint32_t i = 0; i < acc.n; ++i) D[row_of(t, i) * w.n + column_of(t, i)] = acc.value[t * acc.n + i];
  for (uint32_t m = 0; m < 64; ++m)
    for (uint32_t k = 0; k < 16; ++k) {
      const float a = A[k * 64 + m], *b = B.data() + k * w.n;
      float* d = D.data() + m * w.n;
      for (uint32_t n = 0; n < w.n; ++n) d[n] += a * b[n];
    }
  for (uint32_t t = 0; t < 128; ++t)
    for (uint32_t i = 0; i < acc.n; ++i) acc.value[t * acc.n + i] = D[row_of(t, i) * w.n + column_of(t, i)];
  for (uint32_t t = 0; t < 128; ++t)
    for (uint32_t i = 0; i < acc.n; ++i)
      if (bits(acc.registers[t][i]) != kPoison) fail(format("the accumulator of the wgmma issued at %s was written before the wait", at(w.site).c_str()), w.site);
  if (--acc.pending == 0)
    for (uint32_t t = 0; t < 128; ++t) std::copy_n(acc.value.data() + t * acc.n, acc.n, acc.registers[t]);
}

Group& group_of(const Fiber& f) { return t_engine->groups[f.info.tid / 128]; }

void issue_wgmma(void* const* records, uint32_t, Site site) {
  Group& g = group_of(*t_fiber);
  const auto call = [&](uint32_t t) -> const WgmmaCall& { return *static_cast<const WgmmaCall*>(records[t]); };
  const WgmmaCall& c = call(0);
  for (uint32_t t = 1; t < 128; ++t)
    if (call(t).a != c.a || call(t).b != c.b || call(t).accumulate != c.accumulate) fail("threads of a warpgroup disagree on a descriptor or on the accumulation of wgmma", site);
  if (!g.fenced) fail("wgmma without a wgmma.fence since the last commit", site);
  const auto check = [&](const char* name, uint64_t d) {
    if ((d >> 62) != 1) fail(format("the descriptor of %s is not of a 128-byte swizzle, which is the only one that is emulated", name), site);
    if (d >> 49 & 7) fail(format("the descriptor of %s has a base offset, which is not emulated", name), site);
  };
  if (!c.registers) check("a", c.a);
  check("b", c.b);
  Wgmma w{c.n, c.bf16, c.registers != nullptr, c.trans_a, c.trans_b, c.accumulate, c.a, c.b, {}, 0, site};
  note_operands(g, w, true);
  if (c.registers) {
    w.a_registers.resize(128 * 4);
    for (uint32_t t = 0; t < 128; ++t) std::copy_n(call(t).registers, 4, w.a_registers.data() + t * 4);
  }
  const auto is_mine = [&](const Accumulator& x) { return x.pending && x.registers[0] == c.d; };
  auto found = std::find_if(g.accumulators.begin(), g.accumulators.end(), is_mine);
  if (found == g.accumulators.end()) {
    found = std::find_if(g.accumulators.begin(), g.accumulators.end(), [](const Accumulator& x) { return x.pending == 0; });
    if (found == g.accumulators.end()) found = g.accumulators.insert(found, Accumulator{});
    found->n = c.n / 2;
    found->value.resize(128 * found->n);
    for (uint32_t t = 0; t < 128; ++t) {
      float* d = found->registers[t] = call(t).d;
      std::copy_n(d, found->n, found->value.data() + t * found->n);
      std::fill_n(d, found->n, __builtin_bit_cast(float, kPoison));
    }
  } else {
    for (uint32_t t = 0; t < 128; ++t)
      if (found->registers[t] != call(t).d || found->n != c.n / 2) fail("wgmma on a part of an accumulator that another wgmma will change", site);
  }
  ++found->pending;
  w.accumulator = size_t(found - g.accumulators.begin());
  g.open.push_back(std::move(w));
}

}  // namespace

// ---- the block ---------------------------------------------------------------------------------------------------------

void Engine::start_sm90() {
  mbarriers.clear();
  bulk.clear();
  bulk_clock = 0;
  for (Group& g : groups) {
    g.op = nullptr;
    g.arrived = 0;
    g.fenced = false;
    g.registers = 0;
    g.open.clear();
    g.groups.clear();
    g.accumulators.clear();
  }
}

void Engine::end_sm90(Dim3 index) {
  const auto left = [&](const std::string& what) { throw std::runtime_error(format("fastpe.emu: %s: block (%u,%u,%u): %s", kernel, index.x, index.y, index.z, what.c_str())); };
  if (!bulk.empty()) left("nobody waited for the bulk copy issued at " + at(bulk.front().site));
  for (const auto& [addr, b] : mbarriers)
    if (b.tx != 0) left(format("the mbarrier initialised at %s is left with %lld bytes %s", at(b.init).c_str(), static_cast<long long>(b.tx < 0 ? -b.tx : b.tx), b.tx < 0 ? "more than expected" : "still expected"));
}

void Engine::end_of_thread_sm90(const Fiber& f) {
  for (const auto& g : f.store_groups)
    if (!g.empty()) fail("the thread ended without waiting for its bulk store", g.front().site);
  if (!f.stores.empty()) fail("the thread ended with a bulk store that was never committed", f.stores.front().site);
  const Group& g = group_of(f);
  for (const auto& list : g.groups)
    if (!list.empty()) fail("the thread ended without waiting for its wgmma", list.front().site);
  if (!g.open.empty()) fail("the thread ended with a wgmma that was never committed", g.open.front().site);
}

bool Engine::deliver() {
  if (bulk.empty()) return false;
  const size_t i = random() % bulk.size();
  const BulkLoad b = std::move(bulk[i]);
  bulk.erase(bulk.begin() + ptrdiff_t(i));
  land(b);
  return true;
}

void Engine::land(const BulkLoad& b) {
  ++bulk_clock;
  for (size_t i = 0; i < b.chunks.size(); ++i) {
    std::memcpy(memory.data() + b.chunks[i], b.data.data() + 16 * i, 16);
    shadow.touch(b.chunks[i], 16, [&](Shadow::Cell c, uint32_t) { c.write = {b.site, bulk_clock, 0, 0, 0, bulk_unit(), false, By::bulk}; });
  }
  landed(b.mbarrier, int64_t(16 * b.chunks.size()));
}

void Engine::landed(uint32_t addr, int64_t bytes) {
  const auto found = mbarriers.find(addr);
  if (found == mbarriers.end()) {
    failed = true;
    error = format("%s: block (%u,%u,%u): a bulk copy arrived at shared address %u, where no mbarrier is any more", kernel, fibers[0].info.block.x, fibers[0].info.block.y, fibers[0].info.block.z, addr);
    return;
  }
  Mbarrier& b = found->second;
  b.released.t[bulk_unit()] = bulk_clock;
  b.tx -= bytes;
  finish_phase(b);
}

void Engine::finish_phase(Mbarrier& b) {
  if (b.pending || b.tx) return;
  ++b.phase;
  b.pending = b.count;
  b.complete.join(b.released, units());
  b.released = Clock{};
  std::vector<uint16_t> waiting;
  waiting.swap(b.waiting);
  for (uint16_t t : waiting) push(t);
}

std::string Engine::waits_at_mbarrier(const Fiber& f) const {
  const auto found = mbarriers.find(f.mbarrier);
  if (found == mbarriers.end()) return "waits at an mbarrier that was invalidated, at " + at(f.where);
  const Mbarrier& b = found->second;
  return format("waits at the mbarrier at %s for parity %u (phase %u: %u of %u arrivals and %lld bytes are missing)", at(f.where).c_str(), f.parity, b.phase, b.pending, b.count, static_cast<long long>(b.tx));
}

// ---- for the thread that is running ------------------------------------------------------------------------------------

void group_op(const WarpOp& op, uint64_t immediate, void* record, Site site) {
  Engine& e = *t_engine;
  Fiber& f = *t_fiber;
  Warp& w = e.warps[f.info.warp];
  Group& g = group_of(f);
  f.where = site;
  if (f.info.tid / 128 * 128 + 128 > e.threads) fail(format("%s in a warpgroup of fewer than 128 threads", op.name), site);
  if (w.arrived) fail(format("diverged: %s, while lanes 0x%08x of the warp are in %s at %s", op.name, w.arrived, w.op->name, at(w.site).c_str()), site);
  if (w.at_barrier) fail(format("diverged: %s, while lanes 0x%08x of the warp wait at a barrier", op.name, w.at_barrier), site);
  if (g.arrived == 0) {
    g.op = &op;
    g.site = site;
    g.immediate = immediate;
  } else if (g.op != &op || !same(g.site, site) || g.immediate != immediate) {
    fail(format("diverged: %s, while %u threads of the warpgroup are in %s at %s", op.name, g.arrived, g.op->name, at(g.site).c_str()), site);
  }
  const uint32_t first = f.info.tid / 128 * 128;
  g.record[f.info.tid - first] = record;
  w.in_group |= 1u << f.info.lane;
  if (++g.arrived != 128) {
    f.state = State::group;
    e.yield(f);
    return;
  }
  if (op.compute) op.compute(g.record, 0xFFFFFFFFu, site);
  g.arrived = 0;
  for (uint32_t i = 0; i < 4; ++i) e.warps[first / 32 + i].in_group = 0;
  for (uint32_t t = first; t < first + 128; ++t)
    if (t != f.info.tid) e.push(t);
  e.pause_if_not_fifo(f);
}

void mbarrier_init(uint32_t addr, uint32_t count, Site site) {
  Engine& e = *t_engine;
  Fiber& f = *t_fiber;
  f.where = site;
  e.check_range(addr, 8, site);
  if (count == 0 || count >= 1u << 20) fail(format("an mbarrier of %u arrivals", count), site);
  if (e.mbarriers.count(addr)) fail(format("shared address %u already holds the mbarrier initialised at %s", addr, at(e.mbarriers.at(addr).init).c_str()), site);
  e.check_no_mbarrier(addr, 8, site);
  e.note_write(f.info.warp, uint8_t(f.info.lane), addr, 8, site, false, false);
  Mbarrier& b = e.mbarriers[addr];
  b.count = b.pending = count;
  b.phase = 0;
  b.tx = 0;
  b.init = site;
  b.thread = f.info.tid;
  b.fences = f.fences + f.mbarrier_fences;
}
void mbarrier_inval(uint32_t addr, Site site) {
  Engine& e = *t_engine;
  t_fiber->where = site;
  const Mbarrier& b = mbarrier_at("mbarrier.inval", addr, site);
  if (!b.waiting.empty()) fail(format("mbarrier.inval while thread %u waits", b.waiting.front()), site);
  if (b.tx) fail(format("mbarrier.inval while %lld bytes are expected", static_cast<long long>(b.tx)), site);
  e.mbarriers.erase(addr);
  e.note_write(t_fiber->info.warp, uint8_t(t_fiber->info.lane), addr, 8, site, false, false);
}
void mbarrier_arrive(uint32_t addr, uint32_t bytes, Site site) {
  Engine& e = *t_engine;
  Fiber& f = *t_fiber;
  Warp& w = e.warps[f.info.warp];
  f.where = site;
  Mbarrier& b = mbarrier_at("mbarrier.arrive", addr, site);
  if (b.pending == 0) fail(format("one arrival more than the %u of the mbarrier initialised at %s, in a phase that waits for %lld bytes", b.count, at(b.init).c_str(), static_cast<long long>(b.tx)), site);
  b.released.join(w.clock, e.units());
  ++w.clock.t[f.info.warp];
  b.tx += bytes;
  --b.pending;
  e.finish_phase(b);
  e.pause_if_not_fifo(f);
}
bool mbarrier_try_wait(uint32_t addr, uint32_t parity, Site site) {
  Engine& e = *t_engine;
  Fiber& f = *t_fiber;
  f.where = site;
  if (parity > 1) fail(format("parity %u", parity), site);
  for (;;) {
    Mbarrier& b = mbarrier_at("mbarrier.try_wait", addr, site);
    if ((b.phase & 1) != parity) {
      e.warps[f.info.warp].clock.join(b.complete, e.units());
      return true;
    }
    f.mbarrier = addr;
    f.parity = parity;
    b.waiting.push_back(uint16_t(f.info.tid));
    f.state = State::mbarrier;
    e.yield(f);
  }
}

void fence_proxy_async(Site site) {
  t_fiber->where = site;
  ++t_fiber->fences;
}
void fence_mbarrier_init(Site site) {
  t_fiber->where = site;
  ++t_fiber->mbarrier_fences;
}

void tensor_load(uint32_t dst, const TensorMap& map, const int32_t* where, uint32_t rank, uint32_t mbarrier, Site site) {
  t_fiber->where = site;
  check_mbarrier_of_copy(mbarrier, site);
  BulkLoad b{{}, {}, mbarrier, site};
  for_each_chunk(map, where, rank, dst, site, [&](uint32_t to, const uint8_t* from, uint32_t skip, uint32_t bytes) {
    uint8_t x[16] = {};
    if (bytes) std::memcpy(x + skip, from, bytes);
    b.chunks.push_back(to);
    b.data.insert(b.data.end(), x, x + 16);
  });
  issue(std::move(b));
}
void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbarrier, Site site) {
  t_fiber->where = site;
  check_mbarrier_of_copy(mbarrier, site);
  if (bytes == 0 || bytes % 16) fail(format("a bulk copy of %u bytes, which is no multiple of 16", bytes), site);
  if (dst % 16 || reinterpret_cast<uintptr_t>(src) % 16) fail("an address of a bulk copy is not aligned to 16 bytes", site);
  BulkLoad b{{}, std::vector<uint8_t>(bytes), mbarrier, site};
  std::memcpy(b.data.data(), src, bytes);
  for (uint32_t i = 0; i < bytes; i += 16) b.chunks.push_back(dst + i);
  issue(std::move(b));
}

void tensor_store(const TensorMap& map, const int32_t* where, uint32_t rank, uint32_t src, Site site) {
  Engine& e = *t_engine;
  Fiber& f = *t_fiber;
  f.where = site;
  BulkStore s{{}, ++e.bulk_clock, site, false};
  for_each_chunk(map, where, rank, src, site, [&](uint32_t from, uint8_t* to, uint32_t skip, uint32_t bytes) {
    e.check_range(from, 16, site);
    e.check_proxy("a bulk store reads", from, 16, site);
    e.note_read(f.info.warp, uint8_t(f.info.lane), from, 16, site);
    // The read goes on after this instruction, until the thread waits.
    e.shadow.touch(from, 16, [&](Shadow::Cell c, uint32_t) {
      c.read(e.bulk_unit()) = {site, s.clock, 0, 0, 0, e.bulk_unit(), false, By::bulk};
      c.readers |= uint64_t(1) << e.bulk_unit();
    });
    if (bytes) s.pieces.push_back({from + skip, bytes, to});
  });
  bool now = e.opt.copies == CopyTiming::early;
  if (e.opt.copies == CopyTiming::random) now = e.random() & 1;
  if (now) {
    for (const auto& p : s.pieces) std::memcpy(p.to, e.memory.data() + p.from, p.bytes);
    s.landed = true;
  }
  f.stores.push_back(std::move(s));
}
void bulk_commit(Site site) {
  t_fiber->where = site;
  t_fiber->store_groups.push_back(std::move(t_fiber->stores));
  t_fiber->stores.clear();
}
void bulk_wait(uint32_t groups_left, Site site) {
  Engine& e = *t_engine;
  Fiber& f = *t_fiber;
  f.where = site;
  while (f.store_groups.size() > groups_left) {
    for (const BulkStore& s : f.store_groups.front()) {
      if (!s.landed)
        for (const auto& p : s.pieces) std::memcpy(p.to, e.memory.data() + p.from, p.bytes);
      uint32_t& known = e.warps[f.info.warp].clock.t[e.bulk_unit()];
      known = std::max(known, s.clock);
    }
    f.store_groups.pop_front();
  }
}

void wgmma(const WgmmaCall& call, Site site) {
  static const WarpOp op{"wgmma.mma_async", true, issue_wgmma};
  WgmmaCall c = call;
  const uint64_t shape = call.n | uint64_t(call.bf16) << 16 | uint64_t(call.trans_a) << 17 | uint64_t(call.trans_b) << 18 | uint64_t(call.registers != nullptr) << 19;
  group_op(op, shape, &c, site);
}
void wgmma_fence(Site site) {
  static const WarpOp op{"wgmma.fence", true, [](void* const*, uint32_t, Site) { group_of(*t_fiber).fenced = true; }};
  group_op(op, 0, nullptr, site);
}
void wgmma_commit(Site site) {
  static const WarpOp op{"wgmma.commit_group", true, [](void* const*, uint32_t, Site) {
    Group& g = group_of(*t_fiber);
    g.groups.push_back(std::move(g.open));
    g.open.clear();
    g.fenced = false;
  }};
  group_op(op, 0, nullptr, site);
}
void wgmma_wait(uint32_t groups_left, Site site) {
  static const WarpOp op{"wgmma.wait_group", true, [](void* const* records, uint32_t, Site) {
    Group& g = group_of(*t_fiber);
    while (g.groups.size() > *static_cast<const uint32_t*>(records[0])) {
      for (Wgmma& w : g.groups.front()) execute(g, w);
      g.groups.pop_front();
    }
  }};
  group_op(op, groups_left, &groups_left, site);
}

void set_max_registers(uint32_t n, bool more, Site site) {
  struct Request {
    uint32_t n;
  } r{n};
  static const WarpOp op{"setmaxnreg", true, [](void* const* records, uint32_t, Site s) {
    Engine& e = *t_engine;
    const uint32_t n = static_cast<const Request*>(records[0])->n;
    if (n < 24 || n > 256 || n % 8) fail(format("setmaxnreg of %u registers; 24 to 256 in steps of 8 exist", n), s);
    group_of(*t_fiber).registers = n;
    uint32_t sum = 0;
    for (const Group& g : e.groups) sum += g.registers * 128;
    if (sum > 64 * 1024) fail(format("the warpgroups of the block ask for %u registers; there are 65536", sum), s);
  }};
  group_op(op, uint64_t(more) << 32 | n, &r, site);
}

}  // namespace fastpe::emu
