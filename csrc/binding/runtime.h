// What the CPU implementations share: threads, scratch memory, counters.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <exception>

#include "cpu/dispatch.h"
#include "cpu/subnormal.h"

namespace fastpe::binding {

// Fixed for a call when its Runtime is made, so that workers and their scratch agree whatever other threads set.
inline thread_local int t_threads = 1;

// Tasks are handed out one by one, as workers become free. An exception of a task stops the rest and is thrown again
// in the calling thread; none may leave a worker.
inline void parallel(int64_t tasks, void (*fn)(void*, int64_t, int), void* ctx) {
  const int64_t workers = std::min<int64_t>(t_threads, tasks);
  if (workers <= 1) {
    const cpu::FlushSubnormals flush;
    for (int64_t t = 0; t < tasks; ++t) fn(ctx, t, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    const cpu::FlushSubnormals flush;
    try {
      for (int64_t t; !failed.load(std::memory_order_relaxed) && (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) fn(ctx, t, int(worker));
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

inline Runtime runtime() {
  t_threads = int(torch::stable::get_num_threads());
  return {t_threads, parallel, cpu::scratch_alloc, cpu::scratch_release};
}

// Collects the counters of one call when they are switched on.
class Stats {
 public:
  Stats() : on_(cpu::tile_stats_on()) {}
  ~Stats() {
    if (on_) cpu::add_tile_stats(s_);
  }
  TileStats* get() { return on_ ? &s_ : nullptr; }

 private:
  bool on_;
  TileStats s_;
};

}  // namespace fastpe::binding
