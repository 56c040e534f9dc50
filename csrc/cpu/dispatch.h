// What libfastpe_cpu offers to the two libraries on top of it: the choice of instruction set, scratch memory, counters.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

#define FASTPE_API __attribute__((visibility("default")))

namespace fastpe::cpu {

// Names in the order of preference, the best first.
FASTPE_API std::vector<std::string> built_isas();
FASTPE_API std::vector<std::string> available_isas();  // built, and this processor has it
FASTPE_API std::string current_isa();
// Throws std::invalid_argument naming the available ones.
FASTPE_API void set_isa(const std::string& name);

// Scratch memory, 64-byte aligned, any thread. Released blocks are kept for the next call, up to 64 MiB in all: a page
// that the kernel has to map and clear costs ten times one that is already there.
FASTPE_API void* scratch_alloc(size_t bytes);
FASTPE_API void scratch_release(void* p);
struct ScratchUse {
  size_t kept = 0, lent = 0;  // bytes
};
FASTPE_API ScratchUse scratch_use();
FASTPE_API void scratch_trim();  // gives the kept blocks back

// Asks the system to hold this memory in huge pages, as far as it covers whole ones. A wish: nothing tells whether it was granted.
FASTPE_API void ask_for_huge_pages(void* p, size_t bytes);

// Counters of tiles, off at first. Calls that run while they are on add to them.
FASTPE_API bool tile_stats_on();
FASTPE_API void set_tile_stats(bool on);
FASTPE_API void add_tile_stats(const TileStats& s);
FASTPE_API TileStats read_tile_stats();
FASTPE_API void reset_tile_stats();

}  // namespace fastpe::cpu
