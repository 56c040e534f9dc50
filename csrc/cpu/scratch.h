// Scratch memory of a call: one block, cut into aligned pieces.
#pragma once

#include "kernels.h"

namespace fastpe::cpu::FASTPE_ISA {
namespace {

// Cuts a block; with base == nullptr it only measures.
struct Carver {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t n) {
    used = (used + 63) / 64 * 64;
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += size_t(n) * sizeof(T);
    return p;
  }
};

// Bytes that carve(carver) takes.
template <class Fn>
int64_t bytes_of(Fn&& carve) {
  Carver c{nullptr};
  carve(c);
  return int64_t(c.used);
}

// `count` packs, each carved by carve(pack, carver).
template <class Pack, class Fn>
Pack* carve_packs(Carver& c, int64_t count, Fn&& carve) {
  Pack* packs = c.take<Pack>(count);
  for (int64_t i = 0; i < count; ++i) {
    Pack k;
    carve(k, c);
    if (c.base) packs[i] = k;
  }
  return packs;
}

// As much for every worker.
struct Workers {
  char* base = nullptr;
  size_t bytes = 0;
  // Whole lines, and one between workers.
  void measure(int64_t each) { bytes = (size_t(each) + 127) / 64 * 64; }
  void carve(Carver& c, int threads) { base = c.take<char>(int64_t(bytes) * threads); }
  Carver at(int worker) const { return {base + size_t(worker) * bytes}; }
};

// The block that layout(carver) cuts, for as long as this lives.
class Memory {
 public:
  template <class Fn>
  Memory(const Runtime& rt, Fn&& layout) : rt_(rt), base_(static_cast<char*>(rt.alloc(size_t(bytes_of(layout)) + 64))) {
    Carver c{base_};
    layout(c);
  }
  ~Memory() { rt_.release(base_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

 private:
  const Runtime& rt_;
  char* base_;
};

}  // namespace
}  // namespace fastpe::cpu::FASTPE_ISA
