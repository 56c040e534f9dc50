// Choice of instruction set at run time, scratch memory, tile counters. Compiled for the baseline processor.
#include "dispatch.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <sstream>
#include <stdexcept>
#include <unordered_map>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define FASTPE_ISA_ENTRY(name, features) extern const fastpe::cpu::KernelTable fastpe_kernels_##name;
#include "isa_list.def"
#undef FASTPE_ISA_ENTRY

namespace fastpe::cpu {
namespace {

// ---- instruction sets -------------------------------------------------------------------------------------------

struct Entry {
  const char* name;
  const char* features;  // separated by blanks
  const KernelTable* table;
};
const Entry kEntries[] = {
#define FASTPE_ISA_ENTRY(name, features) {#name, features, &fastpe_kernels_##name},
#include "isa_list.def"
#undef FASTPE_ISA_ENTRY
};

bool processor_has(const std::string& feature) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // The compiler's tests include the operating system's consent to save the registers.
  if (feature == "avx2") return __builtin_cpu_supports("avx2");
  if (feature == "fma") return __builtin_cpu_supports("fma");
  if (feature == "avx512f") return __builtin_cpu_supports("avx512f");
  if (feature == "avx512bw") return __builtin_cpu_supports("avx512bw");
  if (feature == "avx512dq") return __builtin_cpu_supports("avx512dq");
  if (feature == "avx512vl") return __builtin_cpu_supports("avx512vl");
  if (feature == "avx512bf16") return __builtin_cpu_supports("avx512bf16");
  if (feature == "f16c") {  // not a name that every supported compiler knows
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  }
#endif
  throw std::logic_error("fastpe: no run-time test for the processor feature " + feature);
}

bool available(const Entry& e) {
  std::istringstream features(e.features);
  for (std::string f; features >> f;)
    if (!processor_has(f)) return false;
  return true;
}

std::string join(const std::vector<std::string>& names) {
  std::string s;
  for (const std::string& n : names) s += (s.empty() ? "" : ", ") + n;
  return s;
}

const KernelTable* find(const std::string& name, const char* who) {
  for (const Entry& e : kEntries)
    if (name == e.name) {
      if (available(e)) return e.table;
      throw std::invalid_argument(std::string(who) + ": this processor lacks the instruction set " + name + "; available: " + join(available_isas()));
    }
  throw std::invalid_argument(std::string(who) + ": unknown instruction set '" + name + "'; available: " + join(available_isas()));
}

const KernelTable* first_choice() {
  if (const char* name = std::getenv("FASTPE_ISA"); name && *name) return find(name, "FASTPE_ISA");
  for (const Entry& e : kEntries)
    if (available(e)) return e.table;
  throw std::logic_error("fastpe: built without a generic instruction set");
}

std::atomic<const KernelTable*> g_table{nullptr};

// ---- scratch memory ---------------------------------------------------------------------------------------------

constexpr size_t kHugePage = size_t(2) << 20;

class Arena {
 public:
  void* alloc(size_t bytes) {
    // Large blocks are whole huge pages where the system grants them: 1 to 2 % of an attention call otherwise goes to
    // misses of the translation buffer.
    const size_t align = bytes >= kHugePage ? kHugePage : kAlign;
    const size_t want = (bytes < align ? align : bytes + align - 1) / align * align;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      // Best fit, unless most of the block would lie idle while lent.
      auto it = free_.lower_bound(want);
      if (it != free_.end() && it->first <= 2 * want + 4096) {
        void* p = it->second;
        kept_ -= it->first;
        lend(p, it->first);
        free_.erase(it);
        return p;
      }
    }
    void* p = std::aligned_alloc(align, want);
    if (!p) throw std::bad_alloc();
    if (align == kHugePage) ask_for_huge_pages(p, want);
    std::lock_guard<std::mutex> lock(mutex_);
    lend(p, want);
    return p;
  }

  void release(void* p) {
    if (!p) return;
    std::vector<void*> drop;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto it = lent_.find(p);
      if (it == lent_.end()) return;
      const size_t bytes = it->second;
      lent_.erase(it);
      lent_bytes_ -= bytes;
      if (bytes > kKeep) {
        drop.push_back(p);
      } else {
        free_.emplace(bytes, p);
        kept_ += bytes;
        // The smallest go first: they are the cheapest to get again.
        while (kept_ > kKeep) {
          const auto small = free_.begin();
          kept_ -= small->first;
          drop.push_back(small->second);
          free_.erase(small);
        }
      }
    }
    for (void* d : drop) std::free(d);
  }

  void trim() {
    std::multimap<size_t, void*> drop;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      drop.swap(free_);
      kept_ = 0;
    }
    for (const auto& [bytes, p] : drop) std::free(p);
  }

  ScratchUse use() {
    std::lock_guard<std::mutex> lock(mutex_);
    return {kept_, lent_bytes_};
  }

 private:
  static constexpr size_t kAlign = 64, kKeep = size_t(64) << 20;
  void lend(void* p, size_t bytes) {
    lent_.emplace(p, bytes);
    lent_bytes_ += bytes;
  }
  std::mutex mutex_;
  std::multimap<size_t, void*> free_;
  std::unordered_map<void*, size_t> lent_;
  size_t kept_ = 0, lent_bytes_ = 0;
};

Arena& arena() {
  // Never destroyed: a worker thread may still give a block back while the process ends.
  static Arena* a = new Arena;
  return *a;
}

std::atomic<bool> g_stats_on{false};
std::mutex g_stats_mutex;
TileStats g_stats;

}  // namespace

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Entry& e : kEntries) names.push_back(e.name);
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Entry& e : kEntries)
    if (available(e)) names.push_back(e.name);
  return names;
}

const KernelTable& kernels() {
  const KernelTable* t = g_table.load(std::memory_order_acquire);
  if (!t) {
    // Two threads that come here at once choose the same table.
    t = first_choice();
    const KernelTable* none = nullptr;
    if (!g_table.compare_exchange_strong(none, t)) t = none;
  }
  return *t;
}

std::string current_isa() { return kernels().isa; }
void set_isa(const std::string& name) { g_table.store(find(name, "fastpe.set_isa"), std::memory_order_release); }

void* scratch_alloc(size_t bytes) { return arena().alloc(bytes); }
void scratch_release(void* p) { arena().release(p); }
ScratchUse scratch_use() { return arena().use(); }
void scratch_trim() { arena().trim(); }

void ask_for_huge_pages(void* p, size_t bytes) {
#if defined(__linux__)
  const uintptr_t from = (reinterpret_cast<uintptr_t>(p) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(p) + bytes) / kHugePage * kHugePage;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

bool tile_stats_on() { return g_stats_on.load(std::memory_order_relaxed); }
void set_tile_stats(bool on) { g_stats_on.store(on, std::memory_order_relaxed); }
void add_tile_stats(const TileStats& s) {
  std::lock_guard<std::mutex> lock(g_stats_mutex);
  g_stats.visited += s.visited;
  g_stats.hidden += s.hidden;
  g_stats.decayed += s.decayed;
  g_stats.block_q = s.block_q;
  g_stats.block_k = s.block_k;
}
TileStats read_tile_stats() {
  std::lock_guard<std::mutex> lock(g_stats_mutex);
  return g_stats;
}
void reset_tile_stats() {
  std::lock_guard<std::mutex> lock(g_stats_mutex);
  g_stats = {};
}

}  // namespace fastpe::cpu
