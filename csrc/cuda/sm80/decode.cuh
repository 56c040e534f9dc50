// Attention of few queries on mma.sync, for sm_80 and newer: decoding, and lists of keys.
//
// Bound by reading K and V once. All rows that share their keys, the heads of a kv head times the queries or those of one
// list, are the rows of one product (16 of them; more take further blocks), and every key row is read once for all of them.
// Work: one block per (split, batch, kv head, list of it, 16 rows). The key tiles that the band lets some row see are cut into
// splits, whose number depends on shapes alone; attn_join_kernel (attn_fwd.cuh) puts them together.
// The four warps of a block do not meet until its end: each takes every fourth tile of 16 keys of the split, with buffers, a
// softmax and an accumulator of its own. Then the block joins them in the order of the warps.
// Shared memory: row maxima and sums | Q, one a region | per warp two stages of K and V; in the end its accumulator.
// A warp's round for one tile; its copies are under way when it starts:
//   find the next tile that some row sees something of, start its copies into the other stage
//   wait                       K and V of this tile are there
//   turn K where it is stored unturned; S = Q K^T, for every region that the tile has pairs in
//   scale, bias, mask, online softmax; O += P V
// Keys are turned in shared memory, in place; where the two channels of a pair lie in no common pair of chunks, on the way in.
//
// The host does not know lengths, pages and lists. A length counts as at most Nk; a key whose page, place in the list or row of
// k_rope is out of range is not there, and its row is not read.
#pragma once

#include "../compose.cuh"
#include "../plan.h"
#include "../softmax.cuh"
#include "../visible_tile.cuh"

namespace fastpe::cuda {

constexpr int kDecodeRows = 16, kDecodeKeys = 16;
constexpr int kMaxDecodeSplits = 32;  // attn_join_kernel has a lane for each

template <int kD>
struct DecodeTile {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  // Blocks of a multiprocessor that registers leave room for. Three up to 128 channels would spill up to 372 bytes a thread.
  static constexpr int kBlocks = kD <= 128 ? 2 : 1;
  static constexpr uint32_t kTileBytes = kDecodeKeys * kD * 2, kWarpBytes = 4 * kTileBytes;
  static constexpr uint32_t kState = 0, kQ = kWarps * kDecodeRows * 8;
  static constexpr uint32_t bytes(int regions) { return kQ + uint32_t(regions) * kTileBytes + kWarps * kWarpBytes; }
  // A warp's accumulator takes the place of its stages; the pitch puts neighbouring rows in other banks.
  static constexpr uint32_t kOutPitch = (kD + 8) * 4;
  static_assert(kDecodeRows * kOutPitch <= kWarpBytes);
};

struct DecodeArgs {
  DecodeParams d;
  int64_t page_count;  // pages of the pools
  int64_t turns;       // rows of k_rope
  int splits;
  bool aligned_k, aligned_v;
  // As in FwdArgs: (splits,B,H,Nq,Dv) sums of P V, (splits,B,H,Nq,2) row maximum in log2 units and sum of P.
  float *part_o, *part_ml;
};

// Sets of rows that share their keys: how many a kv head has, and their rows.
struct DecodeUnits {
  int64_t per_head, rows;
};
FASTPE_HD DecodeUnits decode_units(const DecodeParams& d) {
  const int64_t group = d.attn.H / d.attn.Hk;
  if (!d.list) return {1, group * d.attn.Nq};
  if (d.list_by_head) return {group * d.attn.Nq, 1};
  return {d.attn.Nq, group};
}

// Parts the keys are cut into. Of shapes alone: a length is not known to the host.
inline int64_t decode_splits(const DecodeParams& d) {
  const AttnParams& p = d.attn;
  int64_t keys = d.list ? d.list_len : p.Nk;
  if (!d.list && p.vis.left > 0 && p.vis.right == 1) {
    const int64_t seen = p.vis.left + p.Nq + p.vis.sinks;
    keys = keys < seen ? keys : seen;
  }
  const DecodeUnits u = decode_units(d);
  const int64_t blocks = p.B * p.Hk * u.per_head * tiles::ceil_div(u.rows, kDecodeRows);
  const int64_t want = tiles::ceil_div(512, blocks > 0 ? blocks : 1), most = keys / 256, n = want < most ? want : most;
  return n < 1 ? 1 : n < kMaxDecodeSplits ? n : kMaxDecodeSplits;
}

// How scores come about: by a scale; with a linear function of the positions; term by term.
enum class Scores { plain, rel, composed };
FASTPE_DEVICE Scores scores_of(const AttnParams& p) {
  const Kind k = kind_of(p);
  if (p.softcap > 0 || k == Kind::table || k == Kind::form || k == Kind::composed) return Scores::composed;
  return k == Kind::none ? Scores::plain : Scores::rel;
}

// u_i - w_j; the parts of a prefix sum cancel in double before they are rounded. offset: I - i.
FASTPE_DEVICE float decode_distance(const AttnParams& p, int64_t b, int64_t h, int64_t i, int64_t offset, int64_t j) {
  const Bias& s = p.bias;
  const int64_t I = i + offset > 0 ? i + offset : 0;
  if (!s.w.p) return s.u.p ? aux_at<float>(s.u, b, h)[i] - float(j) : float(i + offset - j);
  const float* w = aux_at<float>(s.w, b, h);
  if (s.u.p) return aux_at<float>(s.u, b, h)[i] - w[j];
  const float near = w[I] - w[j];
  if (!s.base.p) return near;
  const double* base = aux_at<double>(s.base, b, h);
  return float(base[I / kPrefixBlock] - base[j / kPrefixBlock]) + near;
}

// Out of line: composing is many instructions, and a lane has eight scores. Parameters are read anew, from the nearest cache:
// kept, they would take the registers of the accumulator.
FASTPE_NOINLINE float decode_score(const AttnParams& p, Scores scores, Softcap cap, int64_t b, int64_t h, int64_t i, int64_t nk, int64_t j, float product) {
  const Bias& s = p.bias;
  const bool by_position = pos::is_rel_fn(s.form);
  const float d = by_position ? decode_distance(p, b, h, i, nk - p.Nq, j) : 0.f, gm = s.gamma.p ? *aux_at<float>(s.gamma, b, h, i) : 1.f;
  const float* params = s.params.p ? aux_at<float>(s.params, b, h) : nullptr;
  const float p0 = params ? params[0] : 0.f, p1 = params ? params[1] : 0.f;
  if (scores == Scores::rel) return fma(gm * float(kLog2e), s.form == BiasForm::signed_ ? d : pos::Phi<BiasForm::linear>::value(d, p0, p1), product);
  return compose(p, cap, b, h, i, j, product, d, gm, p0, p1, 0.f, nk - p.Nk).x;
}

template <class T, int kD>
FASTPE_KERNEL(DecodeTile<kD>::kThreads, DecodeTile<kD>::kBlocks) attn_decode_kernel(const FASTPE_GRID_CONSTANT DecodeArgs a) {
  using Shape = DecodeTile<kD>;
  constexpr int kDt = kD / 8;
  constexpr uint32_t kChunks = Tile<kD>::kChunks, kItems = kChunks * kDecodeKeys / 32, kThreads = Shape::kThreads;
  static_assert(kItems % 2 == 0);
  constexpr int64_t kTile = kDecodeKeys;
  const DecodeParams& d = a.d;
  const AttnParams& p = d.attn;
  const float kInf = __builtin_inff();
  const uint32_t lane = lane_index(), warp = warp_index();

  // ---- rows and keys of the block ------------------------------------------------------------------------------------------
  const DecodeUnits units = decode_units(d);
  const int64_t group = p.H / p.Hk, row_tiles = tiles::ceil_div(units.rows, kDecodeRows);
  // Counts of keys, rows and tiles stay below 2^31; what multiplies a stride is widened there.
  int64_t place = block_index();
  const int row0 = int(place % row_tiles) * kDecodeRows;
  place /= row_tiles;
  const int sub = int(place % units.per_head);
  place /= units.per_head;
  const int hk = int(place % p.Hk);
  place /= p.Hk;
  const int b = int(place % p.B), split = int(place / p.B), Nq = int(p.Nq);
  const int rows = int(units.rows - row0 < kDecodeRows ? units.rows - row0 : kDecodeRows);
  const auto head_of = [&](int row) { return hk * int(group) + (!d.list ? (row0 + row) / Nq : d.list_by_head ? sub / Nq : row0 + row); };
  const auto query_of = [&](int row) { return d.list ? sub % Nq : (row0 + row) % Nq; };

  int nk = int(p.Nk);
  if (d.lengths) {
    const int n = d.lengths[b];
    nk = n < 0 ? 0 : n < nk ? n : nk;
  }
  const int offset = nk - Nq;
  // Absolute rows [I0, I1): of a part of one head, or of all queries.
  const bool one_head = d.list || row0 / Nq == (row0 + rows - 1) / Nq;
  const int I0 = offset + (one_head ? query_of(0) : 0), I1 = offset + (one_head ? query_of(rows - 1) + 1 : Nq);
  const pos::Band band{p.vis.left, p.vis.right, p.vis.sinks};
  // A block map of whole 64-key tiles, which `sees` leaves to the choice of tiles, is looked at by key here.
  const bool by_tile = p.vis.map && map_is_by_tile(p.vis), data = by_tile || has_data(p.vis);
  const int32_t *list = nullptr, *turn = nullptr;
  if (d.list) {
    const int64_t h = d.list_by_head ? head_of(0) : hk, i = query_of(0);
    list = d.list + b * d.list_sb + h * d.list_sh + i * d.list_sn;
    if (d.turn) turn = d.turn + b * d.turn_sb + h * d.turn_sh + i * d.turn_sn;
  }
  // Tiles: those of the list; or those of the sinks, then those of the window.
  int sink_tiles = 0, window_tile = 0, tile_count = 0;
  if (list) {
    tile_count = int(tiles::ceil_div(d.list_len, kTile));
  } else {
    const pos::Range w = pos::window_of_rows(band, I0, I1, nk);
    const int end_tile = w.hi > w.lo ? int(tiles::ceil_div(w.hi, kTile)) : 0;
    window_tile = w.hi > w.lo ? int(w.lo / kTile) : 0;
    if (band.left > 0 && band.sinks > 0) {
      int64_t end = band.sinks < nk ? band.sinks : nk;
      if (band.right > 0 && I1 - 1 + band.right < end) end = I1 - 1 + band.right;
      sink_tiles = end > 0 ? int(tiles::ceil_div(end, kTile)) : 0;
      if (end_tile > 0 && sink_tiles > window_tile) sink_tiles = window_tile;
    }
    tile_count = sink_tiles + end_tile - window_tile;
  }
  const int begin = int(int64_t(tile_count) * split / a.splits), end = int(int64_t(tile_count) * (split + 1) / a.splits);

  const uint32_t smem = shared_base(), sQ = smem + Shape::kQ;
  const int regions = pos::region_count(p.region.kind);
  const uint32_t sWarp = sQ + uint32_t(regions) * Shape::kTileBytes + warp * Shape::kWarpBytes;
  const auto stage_k = [&](uint32_t stage) { return sWarp + 2 * stage * Shape::kTileBytes; };
  const auto stage_v = [&](uint32_t stage) { return sWarp + (2 * stage + 1) * Shape::kTileBytes; };

  // ---- what stays with a row -------------------------------------------------------------------------------------------------
  // A lane has rows frag_row(0) and frag_row(1); where they are past the last they repeat it.
  int h[2], i[2];
  float c[2], m[2], l[2];
  FASTPE_UNROLL
  for (int x = 0; x < 2; ++x) {
    const int row = int(frag_row(uint32_t(x))) < rows ? int(frag_row(uint32_t(x))) : rows - 1;
    h[x] = head_of(row);
    i[x] = query_of(row);
    c[x] = float(p.scale) * (p.row_scale.p ? *aux_at<float>(p.row_scale, b, h[x], i[x]) : 1.f) * float(kLog2e);
    m[x] = -kInf;
    l[x] = 0;
  }
  const Scores scores = scores_of(p);
  const Softcap cap(p);

  // ---- keys ----------------------------------------------------------------------------------------------------------------
  struct Keys {
    int x;                 // number of the tile
    int key, spot;         // of entry lane % 16: the key, -1 for none, and the row of k_rope that turns it
    uint32_t seen;         // bit e: the row of the lane's score e sees its key
    int store, first;      // batch or page that the tile lies in, and the key of its row 0
  };
  const auto first_key = [&](int x) { return (x < sink_tiles ? x : x - sink_tiles + window_tile) * kDecodeKeys; };
  // A lane's scores count e = 4 x + 2 n + c: row x, column 8 n + 2 (lane % 4) + c. The key of score e:
  const auto key_of = [&](const Keys& k, uint32_t e) { return int(shfl_idx(uint32_t(k.key), 8 * (e >> 1 & 1) + frag_col(e & 1))); };
  // The first tile from x on, in this warp's steps, that some row sees something of; x = end: none.
  const auto find = [&](int x) {
    Keys k{end, -1, -1, 0, b, 0};
    FASTPE_NO_UNROLL
    for (; x < end; x += Shape::kWarps) {
      const int entry = int(lane & 15);
      bool whole = false;
      if (list) {
        const int at = x * kDecodeKeys + entry;
        k.key = at < d.list_len ? list[at] : -1;
        if (k.key >= nk) k.key = -1;
        k.spot = k.key;
        if (turn && k.key >= 0) {
          k.spot = turn[at];
          if (k.spot < 0 || k.spot >= a.turns) k.key = -1;
        }
      } else {
        const int j0 = first_key(x), j = j0 + entry;
        if (d.pages) {  // a tile never crosses a page
          const int size = int(d.page_size), page = j0 / size;
          k.store = d.pages[b * d.pages_sb + page];
          k.first = page * size;
          if (k.store < 0 || k.store >= a.page_count) continue;
        }
        k.key = k.spot = j < nk ? j : -1;
        whole = !data && j0 + kDecodeKeys <= nk && pos::tile_full(band, I0, I1, j0, j0 + kDecodeKeys);
      }
      k.seen = whole ? 0xFF : 0;
      if (!whole) {
        FASTPE_NO_UNROLL
        for (uint32_t e = 0; e < 8; ++e) {
          const int j = key_of(k, e), I = (e < 4 ? i[0] : i[1]) + offset;
          bool see = j >= 0 && pos::visible(band, I, j);
          if (see && data) {
            const int row_h = e < 4 ? h[0] : h[1];
            see = sees(p, b, row_h, I - offset, j, nk - p.Nk) && (!by_tile || rules_allow(p, b, I - offset, j, row_h, nk - p.Nk));
          }
          if (see) k.seen |= 1u << e;
        }
      }
      if (!vote_any(k.seen != 0)) continue;
      k.x = x;
      break;
    }
    return k;
  };

  const bool copies = d.more[0].p != nullptr;
  const auto key_view = [&](int region) -> const View& { return copies && region > 0 ? d.more[region - 1] : p.k; };
  const bool interleaved = p.rope_layout == RopeLayout::interleaved;
  const bool turns = p.k_rope.cos.p != nullptr, turns_in_place = turns && (interleaved || p.rope_pairs % 8 == 0);
  // Entry `row` of a tile in a tensor; only where it has a key.
  const auto row_of = [&](const View& view, const Keys& k, int j) {
    return static_cast<const uint16_t*>(view.p) + k.store * view.sb + hk * view.sh + (j - k.first) * view.sn;
  };
  // The rows of a tile, to be committed and waited for; what is not there becomes 0.
  const auto load = [&](uint32_t tile, const View& view, int64_t channels, bool aligned, const Keys& k) {
    const auto each = [&](uint32_t x) {
      const uint32_t item = 32 * x + lane, row = item / kChunks, chunk = item % kChunks;
      const int j = int(shfl_idx(uint32_t(k.key), row));
      const bool inside = j >= 0 && int64_t(chunk * 8) < channels;
      const uint16_t* src = inside ? row_of(view, k, j) + chunk * 8 : static_cast<const uint16_t*>(view.p);
      const uint32_t dst = tile + Tile<kD>::at(row, chunk);
      if (aligned) cp_async_16(dst, src, inside ? 16 : 0);
      else st_shared_v4(dst, inside ? load_chunk(src) : Quad{});
    };
    FASTPE_NO_UNROLL
    for (uint32_t x = 0; x < kItems; x += 2) {
      each(x);
      each(x + 1);
    }
  };
  // The same of keys that are turned on their way.
  const auto load_turned = [&](uint32_t tile, const View& view, const Keys& k, int region) {
    FASTPE_NO_UNROLL
    for (uint32_t x = 0; x < kItems; ++x) {
      const uint32_t item = 32 * x + lane, row = item / kChunks, chunk = item % kChunks;
      const int j = int(shfl_idx(uint32_t(k.key), row)), spot = int(shfl_idx(uint32_t(k.spot), row));
      Quad q{};
      if (j >= 0 && int64_t(chunk * 8) < p.D) {
        const Rope rope = key_rope(p, region, j);
        q = load_chunk_rotated<T>(row_of(view, k, j), chunk, aux_at<float>(rope.cos, b, hk, spot), aux_at<float>(rope.sin, b, hk, spot), uint32_t(p.rope_pairs), p.rope_layout);
      }
      st_shared_v4(tile + Tile<kD>::at(row, chunk), q);
    }
  };
  // Turns the keys of a tile where they lie; a lane has both channels of its pairs.
  const auto turn_in_place = [&](uint32_t tile, const Keys& k, int region) {
    const uint32_t J = uint32_t(p.rope_pairs), per_row = interleaved ? (J + 3) / 4 : J / 8;
    FASTPE_NO_UNROLL
    for (uint32_t x = 0; x < kDecodeKeys * per_row; x += 32) {
      const uint32_t item = x + lane, row = item / per_row, chunk = item % per_row;
      const int j = int(shfl_idx(uint32_t(k.key), row & 15)), spot = int(shfl_idx(uint32_t(k.spot), row & 15));
      if (row >= kDecodeKeys || j < 0) continue;
      const Rope rope = key_rope(p, region, j);
      const float *cos = aux_at<float>(rope.cos, b, hk, spot), *sin = aux_at<float>(rope.sin, b, hk, spot);
      const uint32_t at = tile + Tile<kD>::at(row, chunk);
      Quad q = ld_shared_v4(at);
      if (interleaved) {
        FASTPE_UNROLL
        for (uint32_t y = 0; y < 4; ++y) {
          const uint32_t pair = 4 * chunk + y;
          if (pair >= J) continue;
          float lo = wide_low<T>(q.x[y]), hi = wide_high<T>(q.x[y]);
          pos::rotate_pair(lo, hi, cos[pair], sin[pair]);
          q.x[y] = T::pack(lo, hi);
        }
      } else {
        const uint32_t other_at = tile + Tile<kD>::at(row, chunk + per_row);
        Quad other = ld_shared_v4(other_at);
        FASTPE_UNROLL
        for (uint32_t y = 0; y < 4; ++y) {
          const uint32_t pair = 8 * chunk + 2 * y;
          float a0 = wide_low<T>(q.x[y]), a1 = wide_high<T>(q.x[y]), b0 = wide_low<T>(other.x[y]), b1 = wide_high<T>(other.x[y]);
          pos::rotate_pair(a0, b0, cos[pair], sin[pair]);
          pos::rotate_pair(a1, b1, cos[pair + 1], sin[pair + 1]);
          q.x[y] = T::pack(a0, a1);
          other.x[y] = T::pack(b0, b1);
        }
        st_shared_v4(other_at, other);
      }
      st_shared_v4(at, q);
    }
  };
  const auto load_keys = [&](uint32_t tile, const Keys& k, int region) {
    if (turns && !turns_in_place) load_turned(tile, key_view(region), k, region);
    else load(tile, key_view(region), p.D, a.aligned_k, k);
  };
  // Whether some row has some key of a tile in the region.
  const auto has_region = [&](const Keys& k, int region) {
    if (regions == 1) return region == 0;
    const int j0 = first_key(k.x), j1 = j0 + kDecodeKeys < nk ? j0 + kDecodeKeys : nk;
    return tile_has_region(p, region, I0, I1, j0, j1);
  };
  const auto first_region = [&](const Keys& k) {
    int region = 0;
    while (region < regions - 1 && !has_region(k, region)) ++region;
    return region;
  };
  // One operand serves all regions.
  const bool alike = !copies && (!p.k_rope.sr || pos::region_by_key(p.region.kind));
  const auto start = [&](const Keys& k, uint32_t stage) {
    load_keys(stage_k(stage), k, first_region(k));
    load(stage_v(stage), p.v, p.Dv, a.aligned_v, k);
  };

  // ---- Q, turned for every region ------------------------------------------------------------------------------------------------
  FASTPE_NO_UNROLL
  for (int region = 0; region < regions; ++region) {
    const Rope rope = p.q_rope.cos.p ? region_rope(p.q_rope, region) : Rope{};
    FASTPE_NO_UNROLL
    for (uint32_t item = thread_index(); item < kDecodeRows * kChunks; item += kThreads) {
      const uint32_t row = item / kChunks, chunk = item % kChunks;
      Quad v{};
      if (int(row) < rows && int64_t(chunk * 8) < p.D) {
        const int hq = head_of(int(row)), iq = query_of(int(row));
        const uint16_t* q = row_at(p.q, b, hq, iq);
        if (rope.cos.p) v = load_chunk_rotated<T>(q, chunk, aux_at<float>(rope.cos, b, hq, iq), aux_at<float>(rope.sin, b, hq, iq), uint32_t(p.rope_pairs), p.rope_layout);
        else v = load_chunk(q + chunk * 8);
      }
      st_shared_v4(sQ + uint32_t(region) * Shape::kTileBytes + Tile<kD>::at(row, chunk), v);
    }
  }
  sync_block();

  float o[kDt][4];
  FASTPE_UNROLL
  for (int x = 0; x < kDt; ++x)
    FASTPE_UNROLL
    for (int e = 0; e < 4; ++e) o[x][e] = 0;
  const auto products = [&](float (&s)[2][4], uint32_t sK, int region) {
    const uint32_t q = sQ + uint32_t(region) * Shape::kTileBytes;
    FASTPE_UNROLL
    for (int n = 0; n < 2; ++n)
      FASTPE_UNROLL
      for (int e = 0; e < 4; ++e) s[n][e] = 0;
    FASTPE_UNROLL
    for (int k = 0; k < kD / 16; ++k) {
      uint32_t fq[4], fk[4];
      ldmatrix_x4(fq, fragment_at<kD>(q, 0, 2 * k));
      ldmatrix_x4(fk, fragment_at<kD>(sK, 0, 2 * k));
      mma<T>(s[0], fq, fk[0], fk[2]);
      mma<T>(s[1], fq, fk[1], fk[3]);
    }
  };

  // The first time round there is no tile at hand yet.
  uint32_t stage = 1;
  int from = begin + int(warp);
  Keys now{end, -1, -1, 0, b, 0};
  bool started = false;
  FASTPE_NO_UNROLL
  for (;;) {
    const Keys next = find(from);
    if (next.x < end) start(next, stage ^ 1);
    cp_async_commit();
    if (started) {
    cp_async_wait<1>();
    sync_warp();

    // ---- S = Q K^T ----------------------------------------------------------------------------------------------------------------
    const uint32_t sK = stage_k(stage), sV = stage_v(stage);
    int region = first_region(now);
    if (turns_in_place) {
      turn_in_place(sK, now, region);
      sync_warp();
    }
    float s[2][4];
    products(s, sK, region);
    FASTPE_NO_UNROLL
    for (++region; region < regions; ++region) {
      if (!has_region(now, region)) continue;
      if (!alike) {
        sync_warp();
        load_keys(sK, now, region);
        cp_async_commit();
        cp_async_wait<0>();
        sync_warp();
        if (turns_in_place) {
          turn_in_place(sK, now, region);
          sync_warp();
        }
      }
      float other[2][4];
      products(other, sK, region);
      FASTPE_UNROLL
      for (uint32_t e = 0; e < 8; ++e) {
        const uint32_t x = e >> 2, n = e >> 1 & 1, v = 2 * x + (e & 1);
        if (pos::region_of(p.region, i[x] + offset, key_of(now, e)) == region) s[n][v] = other[n][v];
      }
    }

    // ---- scale, bias, mask ----------------------------------------------------------------------------------------------------------
    FASTPE_UNROLL
    for (int e = 0; e < 8; ++e) s[e >> 1 & 1][2 * (e >> 2) + (e & 1)] *= c[e >> 2];
    if (scores != Scores::plain) {
      // One after the other, each lane through places of its own where the keys were.
      const auto score_at = [&](uint32_t e) { return sK + (32 * e + lane) * 4; };
      sync_warp();
      FASTPE_UNROLL
      for (uint32_t e = 0; e < 8; ++e) st_shared_f32(score_at(e), s[e >> 1 & 1][2 * (e >> 2) + (e & 1)]);
      FASTPE_NO_UNROLL
      for (uint32_t e = 0; e < 8; ++e) {
        const int j = key_of(now, e);
        if (now.seen >> e & 1) st_shared_f32(score_at(e), decode_score(p, scores, cap, b, e < 4 ? h[0] : h[1], e < 4 ? i[0] : i[1], nk, j, ld_shared_f32(score_at(e))));
      }
      FASTPE_UNROLL
      for (uint32_t e = 0; e < 8; ++e) s[e >> 1 & 1][2 * (e >> 2) + (e & 1)] = ld_shared_f32(score_at(e));
    }
    FASTPE_UNROLL
    for (int e = 0; e < 8; ++e)
      if (!(now.seen >> e & 1)) s[e >> 1 & 1][2 * (e >> 2) + (e & 1)] = -kInf;

    // ---- online softmax ----------------------------------------------------------------------------------------------------------------
    FASTPE_UNROLL
    for (int x = 0; x < 2; ++x) {
      const float alpha = online_softmax<2>(m[x], l[x], [&](int n, int e) -> float& { return s[n][2 * x + e]; });
      FASTPE_UNROLL
      for (int t = 0; t < kDt; ++t) {
        o[t][2 * x] *= alpha;
        o[t][2 * x + 1] *= alpha;
      }
    }

    // ---- O += P V -------------------------------------------------------------------------------------------------------------------------
    const uint32_t fp[4] = {T::pack(s[0][0], s[0][1]), T::pack(s[0][2], s[0][3]), T::pack(s[1][0], s[1][1]), T::pack(s[1][2], s[1][3])};
    FASTPE_UNROLL
    for (int t = 0; t < kD / 16; ++t) {
      uint32_t fv[4];
      ldmatrix_x4_trans(fv, fragment_at<kD>(sV, 0, 2 * t));
      mma<T>(o[2 * t], fp, fv[0], fv[1]);
      mma<T>(o[2 * t + 1], fp, fv[2], fv[3]);
    }
    // The warp has finished with the stage.
    sync_warp();
    }  // started
    if (next.x >= end) break;
    now = next;
    from = now.x + Shape::kWarps;
    started = true;
    stage ^= 1;
  }
  cp_async_wait<0>();

  // ---- the warps' parts together -----------------------------------------------------------------------------------------------------------
  const auto state_at = [&](uint32_t w, uint32_t row) { return smem + Shape::kState + (w * kDecodeRows + row) * 8; };
  FASTPE_UNROLL
  for (int x = 0; x < 2; ++x) {
    l[x] += shfl_xor(l[x], 1);
    l[x] += shfl_xor(l[x], 2);
    const uint32_t row = frag_row(uint32_t(x));
    if ((lane & 3) == 0) {
      st_shared_f32(state_at(warp, row), m[x]);
      st_shared_f32(state_at(warp, row) + 4, l[x]);
    }
    FASTPE_UNROLL
    for (int t = 0; t < kDt; ++t)
      FASTPE_UNROLL
      for (uint32_t e = 0; e < 2; ++e) st_shared_f32(sWarp + row * Shape::kOutPitch + (uint32_t(8 * t) + frag_col(e)) * 4, o[t][2 * x + int(e)]);
  }
  sync_block();
  FASTPE_NO_UNROLL
  for (uint32_t row = warp; row < uint32_t(rows); row += Shape::kWarps) {
    float weight[Shape::kWarps], top = -kInf, sum = 0;
    FASTPE_UNROLL
    for (uint32_t w = 0; w < Shape::kWarps; ++w) {
      weight[w] = ld_shared_f32(state_at(w, row));
      top = max(weight[w], top);
    }
    const float safe = top == -kInf ? 0.f : top;
    FASTPE_UNROLL
    for (uint32_t w = 0; w < Shape::kWarps; ++w) {
      const float part = ld_shared_f32(state_at(w, row) + 4);
      // A warp that saw nothing has no weight; one that saw only NaN keeps it.
      weight[w] = part == 0 ? 0.f : weight[w] == -kInf ? 1.f : ex2_approx(weight[w] - safe);
      sum += weight[w] == 0 ? 0.f : weight[w] * part;
    }
    const int64_t out = ((split * p.B + b) * p.H + head_of(int(row))) * p.Nq + query_of(int(row));
    if (lane == 0) {
      // Against other splits NaN weighs more than anything.
      a.part_ml[2 * out] = sum == sum ? top : kInf;
      a.part_ml[2 * out + 1] = sum;
    }
    FASTPE_NO_UNROLL
    for (uint32_t channel = lane; channel < uint32_t(p.Dv); channel += 32) {
      float y = 0;
      FASTPE_UNROLL
      for (uint32_t w = 0; w < Shape::kWarps; ++w)
        if (weight[w] != 0) y = fma(weight[w], ld_shared_f32(sQ + uint32_t(regions) * Shape::kTileBytes + w * Shape::kWarpBytes + row * Shape::kOutPitch + channel * 4), y);
      a.part_o[out * p.Dv + channel] = y;
    }
  }
}

}  // namespace fastpe::cuda
