// Tile sizes, read by the kernels, by the tile plan and by the tests.
#pragma once

#include <cstdint>

namespace fastpe::tiles {

// Queries of a tile sit in vector lanes: 4 registers of 512 bits in float32.
constexpr int64_t kBlockQ = 64;

// Keys of a tile. Divides kPrefixBlock, so a tile has one prefix base. A float32 score tile of 64 x 64 is 16 KiB and
// stays in a 32 KiB L1 next to the operand being streamed; in bf16 the probabilities are half as large.
constexpr int64_t block_k(bool bf16_dot) { return bf16_dot ? 128 : 64; }

// Few queries: up to so many rows of a head, every key row is read once for all of them (cpu/decode.cpp); more amortise
// the packing of keys and values that the tiled kernel does.
constexpr int64_t kFewQueries = 8;
constexpr int64_t kDecodeKeys = 64;  // keys of a tile
// Keys of a split, the unit of work, for so many rows that share their keys: enough splits to keep threads busy with one
// sequence, few enough that the partial results stay below 2 % of the keys and values read.
constexpr int64_t decode_split(int64_t rows) { return rows <= 16 ? 512 : 1024; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Parts the backward pass cuts the query blocks of one (batch, kv head) into. A function of shapes alone, so that
// sums are formed in the same order for every thread count; enough parts to keep 16 workers busy.
constexpr int64_t backward_splits(int64_t batch_kv_heads, int64_t query_blocks) {
  const int64_t want = ceil_div(16, batch_kv_heads > 0 ? batch_kv_heads : 1);
  const int64_t most = query_blocks / 4 > 1 ? query_blocks / 4 : 1;
  return want < most ? want : most;
}

}  // namespace fastpe::tiles
