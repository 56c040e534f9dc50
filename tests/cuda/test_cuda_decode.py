"""Few queries, lists of keys and caches on the CUDA kernels: against the definition, and token by token against one call."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from agree import compare_forward as compare

import fastpe
from fastpe import reference
from fastpe._call import Call
from fastpe._decode import takes
from fastpe.testing.cases import BIASES, LONG_BIASES, LONG_MASKS, MASKS, REGIONS, STORAGE, Case, build
from fastpe.testing.compare import close_half, eager_attention, error

# Ten tiles of keys, the last one ragged; six rows share their keys.
SMALL = Case(B=2, H=4, Hk=2, Nq=3, Nk=150, D=16, Dv=16)
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Of the largest entry, where there is no eager torch to compare with: tests/python/test_decode.py.
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


def close(got, want, tolerance):
    for x, y in zip(got, want, strict=True):
        assert error(x, y, floor=1.0) <= tolerance


# ---- few queries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", BIASES | LONG_BIASES)
def test_bias(bias, on_kernels):
    case = dataclasses.replace(SMALL, bias=bias, causal=True, seed=1)
    given = build(case, torch.bfloat16).kwargs["bias"]
    if given is not None and not takes(given.op_args(Call(case.B, case.H, case.Nq, case.Nk, True, torch.float32, torch.device("cpu")))):
        pytest.skip("has the kernel for many queries")
    compare(case, torch.bfloat16, on_kernels)


@pytest.mark.parametrize("mask", MASKS | LONG_MASKS)
def test_mask(mask, on_kernels):
    compare(dataclasses.replace(SMALL, bias="cable", mask=mask, seed=2), torch.float16, on_kernels)


@pytest.mark.parametrize("D,rope", [(16, "half"), (24, "half"), (24, "interleaved"), (40, "partial"), (64, "positions"), (96, "half"), (12 * 8, "interleaved")])
def test_rope(D, rope, on_kernels):
    compare(dataclasses.replace(SMALL, D=D, rope=rope, bias="alibi", causal=True, seed=3), torch.bfloat16, on_kernels)


@pytest.mark.parametrize("score", [("head_scale", "row_scale", "sink"), ("softcap", "sink"), ("softcap_bias", "scale"), ("temperature",)], ids="+".join)
@pytest.mark.parametrize("bias", ["none", "t5"])
def test_score(score, bias, on_kernels):
    compare(dataclasses.replace(SMALL, score=score, bias=bias, seed=4), torch.float16, on_kernels)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("D,Dv", [(64, 64), (80, 96), (96, 40), (128, 128), (256, 256), (8, 200), (136, 72)])
def test_head_dims(D, Dv, dtype, on_kernels):
    compare(dataclasses.replace(SMALL, B=1, D=D, Dv=Dv, rope="half", bias="kerple_log", causal=True, seed=5), HALF[dtype], on_kernels)


# 32 rows: two tiles of them. 8 queries, 3 keys: rows that see nothing.
@pytest.mark.parametrize("Nq,Nk,H", [(1, 1, 2), (1, 700, 2), (8, 64, 4), (8, 3, 2), (5, 257, 8), (2, 16, 2), (7, 1100, 3)])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_lengths(Nq, Nk, H, causal, on_kernels):
    compare(dataclasses.replace(SMALL, H=H, Hk=1, Nq=Nq, Nk=Nk, bias="alibi", causal=causal, seed=6), torch.bfloat16, on_kernels)


@pytest.mark.parametrize("mask,Nk", [("window_sinks", 700), ("window_both", 200), ("window_sinks", 5)])
def test_what_a_window_hides_is_not_read(mask, Nk, on_kernels):
    """Keys and values outside are NaN."""
    case = dataclasses.replace(SMALL, Nk=Nk, mask=mask, causal=True, rope="half", seed=7)
    compare(case, torch.bfloat16, on_kernels)
    if Nk < 100:
        return
    run = build(case, torch.bfloat16)
    with torch.no_grad(), on_kernels():
        want = run(fastpe.attention, backward=False)
        for x in run.qkv[1:]:
            x[:, :, 32 : Nk - 48] = torch.nan
        got = run(fastpe.attention, backward=False)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_no_keys(on_kernels):
    run = build(dataclasses.replace(SMALL, Nk=0), torch.bfloat16)
    with torch.no_grad(), on_kernels():
        out, lse, _ = run(fastpe.attention, backward=False)
    assert (out == 0).all() and torch.isneginf(lse).all()


def test_nan_reaches_the_rows_that_see_it(on_kernels):
    run = build(dataclasses.replace(SMALL, Nk=700, causal=True), torch.bfloat16)
    with torch.no_grad(), on_kernels():
        run.qkv[1][0, 0, 698] = torch.nan
        out, lse, _ = run(fastpe.attention, backward=False)
    seen = torch.zeros(2, 4, 3, dtype=torch.bool)
    seen[0, :2, 1:] = True
    assert torch.equal(lse.isnan(), seen) and torch.equal(out.isnan().all(-1), seen) and torch.equal(out.isnan().any(-1), seen)


@pytest.mark.parametrize("storage", STORAGE)
def test_storage(storage, on_kernels):
    compare(dataclasses.replace(SMALL, storage=storage, rope="half", seed=8), torch.bfloat16, on_kernels)


@pytest.mark.parametrize("Nq", [1, 5])
@pytest.mark.parametrize("name", [r for r in REGIONS if r != "none"])
def test_region(name, Nq, on_kernels):
    case = dataclasses.replace(SMALL, Nq=Nq, Nk=90, rope="half", region=name, causal="bidirectional" not in name, seed=9)
    compare(case, torch.float16, on_kernels)


@pytest.mark.parametrize("D", [96, 256])
def test_region_with_many_channels_and_a_bias(D, on_kernels):
    compare(dataclasses.replace(SMALL, B=1, D=D, rope="half", region="dual_chunk", bias="t5", mask="ids", causal=True, seed=10), torch.bfloat16, on_kernels)


@pytest.mark.parametrize("case", [
    dataclasses.replace(SMALL, Nk=600, D=64, Dv=72, bias="table", mask="everything", rope="half", score=("sink",), seed=11),
    dataclasses.replace(SMALL, D=24, rope="half", region="dual_chunk", causal=True, bias="cable", storage="padded", seed=12),
], ids=["many", "region"])  # fmt: skip
def test_several_extras_at_once_stay_inside(case, on_emulator):
    compare(case, torch.bfloat16, on_emulator, guard=True)


@pytest.mark.parametrize("mask", ["documents", "dense", "all_rules"])
def test_nothing_outside_the_tensors_is_read(mask, on_emulator):
    compare(dataclasses.replace(SMALL, Nq=2, Nk=131, bias="segment_pairs_and_kerple", mask=mask, rope="interleaved", seed=13), torch.bfloat16, on_emulator, guard=True)


def test_no_bank_conflicts(emu, on_emulator):
    for D in (64, 96, 128, 256):
        emu.counters()
        compare(dataclasses.replace(SMALL, B=1, D=D, Dv=D, seed=14), torch.bfloat16, on_emulator)
        counted = emu.counters()
        assert counted["extra_wavefronts"] == 0 and counted["mma"] > 0


def test_keys_are_read_once_for_all_heads_that_share_them(emu, on_emulator):
    """The work is that of one head where the rows of all fit a tile."""
    used = {}
    for H in (1, 4):
        emu.counters()
        compare(dataclasses.replace(SMALL, B=1, H=H, Hk=1, Nq=2, seed=15), torch.bfloat16, on_emulator)
        used[H] = emu.counters()["mma"]
    assert used[1] == used[4]


# ---- lists of keys ------------------------------------------------------------------------------------------------------


def listed(heads, Nq, Nk, n, batch=2):
    """Indices with gaps, rows without any, and keys listed twice."""
    g = torch.Generator().manual_seed(heads * 100 + Nq)
    index = torch.randint(0, Nk, (batch, heads, Nq, n), generator=g)
    index[torch.rand(index.shape, generator=g) < 0.2] = -1
    index[0, 0, 0] = -1
    return index


LISTS = {
    "plain": lambda: {},
    "rope": lambda: {"rope": fastpe.rope.default(32)},
    "rope of 24 channels": lambda: {"rope": fastpe.rope.default(24)},
    "alibi": lambda: {"bias": fastpe.bias.Alibi(4)},
    "t5": lambda: {"bias": fastpe.bias.T5(torch.randn(32, 4)), "is_causal": True},
    "cable": lambda: {"bias": fastpe.bias.Cable(fastpe.prefix_sum(-torch.rand(2, 4, 200)))},
    "window": lambda: {"mask": fastpe.mask.window(100) & fastpe.mask.sinks(9), "is_causal": True},
    "documents": lambda: {"mask": fastpe.mask.padding(torch.rand(2, 200) < 0.7), "sink": torch.randn(4), "softcap": 5.0},
}


@pytest.mark.parametrize("heads,Nq", [(2, 1), (2, 3), (4, 3), (1, 1)])
@pytest.mark.parametrize("name", LISTS)
def test_lists(name, heads, Nq, on_kernels):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 32).half(), torch.randn(2, 2, 200, 32).half(), torch.randn(2, 2, 200, 24).half()
    index, given = listed(heads, Nq, 200, 77), LISTS[name]()
    want = reference.gather_attention(q, k, v, index, return_lse=True, **given)
    with on_kernels():
        got = fastpe.gather_attention(q, k, v, index, return_lse=True, **given)
    close(got, want, TOLERANCE[torch.float16])


@pytest.mark.parametrize("shape", ["entries", "places"])
def test_lists_at_new_positions(shape, on_kernels):
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 4, 2, 32).bfloat16(), torch.randn(2, 2, 200, 32).bfloat16(), torch.randn(2, 2, 200, 32).bfloat16()
    index = listed(2, 2, 200, 40)
    where = torch.randint(0, 300, index.shape if shape == "entries" else (40,))
    rope = fastpe.rope.default(32)
    want = reference.gather_attention(q, k, v, index, rope=rope, key_positions=where, return_lse=True)
    with on_kernels():
        got = fastpe.gather_attention(q, k, v, index, rope=rope, key_positions=where, return_lse=True)
    close(got, want, TOLERANCE[torch.bfloat16])


# ---- caches -------------------------------------------------------------------------------------------------------------

B, H, HK, D, N = 1, 4, 2, 32, 150
CACHES = {
    "none": ({}, {}),
    "rope": ({"rope": True}, {}),
    "rotated": ({"rope": True, "rotated": True}, {}),
    "alibi": ({}, {"bias": fastpe.bias.Alibi(H)}),
    "window": ({"rope": True}, {"mask": fastpe.mask.window(50) & fastpe.mask.sinks(2)}),
    "self-extend": ({"rope": True, "region": fastpe.region.self_extend(64, 4)}, {}),
    "self-extend rotated": ({"rope": True, "region": fastpe.region.self_extend(64, 4), "rotated": True}, {}),
    "dual chunk": ({"rope": True, "region": fastpe.region.dual_chunk(48, 16)}, {}),
    "dual chunk rotated": ({"rope": True, "region": fastpe.region.dual_chunk(48, 16), "rotated": True}, {}),
    "memory rotated": ({"rope": True, "region": fastpe.region.key_set(40, first=1), "rotated": True}, {}),
}


@pytest.mark.parametrize("page_size", [None, 32])
@pytest.mark.parametrize("name", CACHES)
def test_decoding_equals_one_call(name, page_size, on_kernels):
    """A prompt, single tokens, and a few at once."""
    made, given = CACHES[name]
    made = made | ({"rope": fastpe.rope.default(D)} if made.get("rope") else {})
    torch.manual_seed(2)
    q, k, v = (torch.randn(B, heads, N, D).bfloat16() for heads in (H, HK, HK))
    cache = fastpe.KVCache(B, HK, D, capacity=160 * B, page_size=page_size, dtype=torch.bfloat16, **made)
    outs, done = [], 0
    for n in (N - 14, 1, 1, 1, 1, 5, 5):
        with on_kernels():
            cache.append(k[:, :, done : done + n], v[:, :, done : done + n])
            done += n
            outs.append(cache.attention(q[:, :, done - n : done], **given))
    want = reference.attention(q, k, v, rope=cache.rope, region=cache.region, is_causal=True, **given)
    own = eager_attention(q, k, v, rope=cache.rope, region=cache.region, is_causal=True, **given)
    close_half("out", torch.cat(outs, 2), want, own, dtype=torch.bfloat16)


@pytest.mark.parametrize("page_size", [None, 16])
def test_a_changed_cache(page_size, on_kernels):
    """Evicted, forked and reordered; a cumulative bias reads the prefix of the cache."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, heads, 100, D).half() for heads in (H, HK, HK))
    gates = -torch.rand(2, H, 100)
    cache = fastpe.KVCache(2, HK, D, capacity=640, page_size=page_size, dtype=torch.float16)
    cache.append(k, v, increments=gates)
    with on_kernels():
        got = cache.attention(q[:, :, -2:], bias=fastpe.bias.Cable(cache.prefix))
    close((got,), (reference.attention(q[:, :, -2:], k, v, bias=fastpe.bias.Cable(fastpe.prefix_sum(gates)), is_causal=True),), TOLERANCE[torch.float16])
    beams = cache.fork(torch.tensor([1, 1, 0]))
    beams.evict(torch.arange(0, 100, 3))
    beams.reorder(torch.tensor([2, 0, 0]))
    pick = torch.tensor([0, 1, 1])
    with on_kernels():
        got = beams.attention(q[pick, :, -1:])
    close((got,), (reference.attention(q[pick, :, -1:], k[pick, :, ::3], v[pick, :, ::3]),), TOLERANCE[torch.float16])


# ---- the op --------------------------------------------------------------------------------------------------------------

ARGS = fastpe.ops._ARGS[3:-1]
NUMBERS = {name: 0 for name in fastpe.ops._PLAIN} | {"scale": 0.3, "softcap_bias": False, "block_q": 1, "block_k": 1, "region_size": 1, "right": 1}


def attn_decode(q, k, v, pages=None, lengths=None, list=None, turn=None, more=(), **given):  # noqa: A002
    return torch.ops.fastpe.attn_decode(q, k, v, *((NUMBERS | given).get(name) for name in ARGS), pages, lengths, list, turn, [*more])


def pooled(lengths, page_size=32, pages=20, room=8):
    """Keys and values of three batch entries in pages in any order; everything else in the pools is NaN."""
    torch.manual_seed(4)
    batch = len(lengths)
    q, k, v = (torch.randn(batch, heads, n, 32).half() for heads, n in ((4, 2), (2, max(lengths)), (2, max(lengths))))
    pools = [torch.full((pages, 2, page_size, 32), torch.nan).half() for _ in range(2)]
    free = torch.randperm(pages).tolist()
    table = torch.full((batch, room), -7, dtype=torch.int32)
    for b, n in enumerate(lengths):
        for x in range(-(-n // page_size)):
            table[b, x] = page = free.pop()
            for pool, held in zip(pools, (k, v)):
                part = held[b, :, x * page_size : min(n, (x + 1) * page_size)]
                pool[page, :, : part.shape[1]] = part
    return q, k, v, pools, table, torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize("extra", ["none", "cable", "rope", "rules"])
def test_batch_entries_of_any_length(extra, on_kernels):
    """Each as if alone; what is said by key has as many entries as the longest."""
    counts = [131, 2, 64]
    q, k, v, pools, table, lengths = pooled(counts)
    g = torch.Generator().manual_seed(5)
    prefix = -torch.rand(3, 4, 131, generator=g).cumsum(2)
    tables = fastpe.rope.default(32).tables(torch.tensor([500.0, 501.0]), torch.arange(131.0), 2, 131, 3, 4, 2)
    given = {
        "none": {},
        "cable": {"bias_form": 2, "bias_w": prefix},
        "rope": {"q_rope": tables[0], "k_rope": tables[1], "bias_form": 8, "bias_table": torch.randn(4, 9, generator=g)},
        "rules": {"intervals": torch.randint(0, 150, (3, 4, 131), generator=g).sort(1).values.int().contiguous(), "left": 90, "sinks": 5},
    }[extra]
    with on_kernels():
        out, lse = attn_decode(q, *pools, pages=table, lengths=lengths, **given)
    by_key = {"bias_w": 2, "k_rope": 3, "intervals": 2}
    for b, n in enumerate(counts):
        own = {name: x.narrow(by_key[name], 0, n) if name in by_key else x for name, x in given.items()}
        own = {name: x[b : b + 1].contiguous() if name in ("bias_w", "intervals") else x for name, x in own.items()}
        wide = {name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in own.items()}
        want = attn_decode(*(x.double() for x in (q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n])), **wide)
        close((out[b : b + 1], lse[b : b + 1]), want, TOLERANCE[torch.float16])


@pytest.mark.parametrize("page", [-1, 20, 2**31 - 1])
def test_pages_outside_the_pool_are_not_visible(page, on_emulator):
    """A GPU's host does not look at them, and the kernel does not read there."""
    q, k, v, pools, table, lengths = pooled([131, 100, 64])
    table[1, 1] = page
    with on_emulator(guard=True):
        out, lse = attn_decode(q, *pools, pages=table, lengths=lengths)
    there = torch.ones(1, 1, 1, 100, dtype=torch.bool)
    there[..., 32:64] = False
    want = attn_decode(*(x.double() for x in (q[1:2], k[1:2, :, :100], v[1:2, :, :100])), mask=there)
    close((out[1:2], lse[1:2]), want, TOLERANCE[torch.float16])


def test_lengths_outside_the_table(on_emulator):
    """At most what the table holds, at least none."""
    q, k, v, pools, table, lengths = pooled([128, 128, 128], room=4)
    with on_emulator(guard=True):
        out, lse = attn_decode(q, *pools, pages=table, lengths=torch.tensor([2**31 - 1, -3, 128], dtype=torch.int32))
        whole = attn_decode(q, *pools, pages=table, lengths=lengths)
    for b in (0, 2):
        assert torch.equal(out[b], whole[0][b]) and torch.equal(lse[b], whole[1][b])
    assert (out[1] == 0).all() and torch.isneginf(lse[1]).all()


def test_entries_outside_are_not_visible(on_emulator):
    torch.manual_seed(6)
    q, k, v = (torch.randn(1, heads, n, 32).half() for heads, n in ((4, 1), (2, 90), (2, 90)))
    index = torch.randint(0, 90, (1, 2, 1, 50), dtype=torch.int32)
    turn = torch.randint(0, 60, (1, 1, 1, 50), dtype=torch.int32)
    tables = fastpe.rope.default(32).tables(torch.tensor([70.0]), torch.arange(60.0), 1, 60, 1, 4, 2)
    given = {"q_rope": tables[0], "k_rope": tables[1], "right": 0}
    wrong, wrong_turn, right = index.clone(), turn.clone(), index.clone()
    wrong[..., 3], wrong[..., 17], wrong[..., 40] = 90, 2**31 - 1, -(2**31)
    wrong_turn[..., 9], wrong_turn[..., 33] = 60, -1
    right[..., [3, 17, 40, 9, 33]] = -1
    with on_emulator(guard=True):
        got = attn_decode(q, k, v, list=wrong, turn=wrong_turn, **given)
        want = attn_decode(q, k, v, list=right, turn=turn, **given)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_many_queries_over_pages(on_kernels):
    """More rows than a tile has, each tile of them with its own part of the keys."""
    torch.manual_seed(7)
    q, k, v = (torch.randn(1, heads, 100, D).bfloat16() for heads in (H, HK, HK))
    cache = fastpe.KVCache(1, HK, D, capacity=128, page_size=16, rope=fastpe.rope.default(D), dtype=torch.bfloat16)
    cache.append(k, v)
    with on_kernels():
        got = cache.attention(q, mask=fastpe.mask.window(30))
    given = {"rope": cache.rope, "mask": fastpe.mask.window(30), "is_causal": True}
    close_half("out", got, reference.attention(q, k, v, **given), eager_attention(q, k, v, **given), dtype=torch.bfloat16)


def test_the_call_for_few_queries_is_this_op(on_kernels):
    run = build(SMALL, torch.bfloat16)
    with torch.no_grad(), on_kernels():
        plain = torch.ops.fastpe.attn_fwd(*run.qkv, *(NUMBERS.get(name) for name in ARGS), False)
        few = attn_decode(*run.qkv)
    assert torch.equal(plain[0], few[0]) and torch.equal(plain[1], few[1])


def test_float32_is_refused(on_emulator):
    with pytest.raises(RuntimeError, match="take bfloat16 and float16, got float32"), on_emulator():
        attn_decode(*(x.float() for x in build(SMALL, torch.bfloat16).qkv))
