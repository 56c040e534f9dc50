"""Regions: kernels against the definition, decoding against prefill, the far rules against direct formulas, errors."""

from __future__ import annotations

import pytest
import torch

import fastpe
from fastpe import region
from fastpe.testing import cases, compare
from fastpe.testing.cases import Case, build

NAMES = [name for name in cases.REGIONS if name != "none"]
LONG = Case(B=1, H=4, Hk=2, Nq=150, Nk=150, D=16, Dv=24, rope="half", causal=True, lse_gradient=True)


def both(case: Case, dtype: torch.dtype) -> None:
    out, lse, grads = build(case, dtype)(fastpe.attention)
    want_out, want_lse, want_grads = build(case, dtype, wide=True)(fastpe.reference.attention)
    if dtype in compare.TOLERANCE:
        forward, backward = compare.TOLERANCE[dtype]
        compare.close("out", out, want_out, forward)
        compare.close("lse", lse, want_lse, forward)
        for name, x in grads.items():
            compare.close(name, x, want_grads[name], backward, floor=0.1)
    else:
        own_out, own_lse, own = build(case, dtype)(compare.eager_attention)
        compare.close_half("out", out, want_out, own_out, dtype=dtype)
        compare.close_half("lse", lse, want_lse, own_lse, floor=1.0)
        for name, x in grads.items():
            compare.close_half(name, x, want_grads[name], own[name], floor=0.1, dtype=dtype)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_against_definition(name, dtype):
    """Lengths that end inside tiles, several regions within a tile, grouped heads."""
    both(Case(**{**vars(LONG), "region": name}), dtype)


@pytest.mark.parametrize(
    "more",
    [
        {"bias": "kerple_log"},
        {"bias": "cable", "score": ("softcap", "sink")},
        {"mask": "documents", "bias": "alibi"},
        {"mask": "window_sinks"},
        {"mask": "intervals", "bias": "segment_pairs"},
        {"mask": "blocks", "rope": "interleaved"},
        {"Nq": 70, "score": ("row_scale", "head_scale")},
        {"storage": "bnhd", "causal": False},
    ],
    ids=lambda m: "-".join(map(str, m.values())),
)
@pytest.mark.parametrize("name", ["self_extend", "dual_chunk", "streaming", "self_extend_bidirectional"])
def test_composes(name, more):
    both(Case(**{**vars(LONG), "region": name, **more}), torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_is_prefill(name):
    """Token by token over the growing cache of raw keys, and in steps of several."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 4, 60, 16, dtype=torch.float64) for _ in range(3))
    rope, r = fastpe.rope.default(16), cases.REGIONS[name]
    # What depends on the length of the text is that of the text so far: prefill at that length.
    for n, last in ((1, 1), (9, 1), (27, 1), (60, 1), (60, 5)):
        whole = fastpe.attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], rope=rope, region=r, is_causal=True)
        step = fastpe.attention(q[:, :, n - last : n], k[:, :, :n], v[:, :, :n], rope=rope, region=r, is_causal=True)
        torch.testing.assert_close(step, whole[:, :, -last:], rtol=1e-12, atol=1e-12)


def test_hirope_against_scores():
    """The rule pair by pair: token level and segment level distances, and plain ones near."""
    torch.manual_seed(2)
    n, window, d = 40, 7, 16
    segments = torch.arange(n) // 6 + (torch.arange(n) % 6 > 3)
    q, k, v = (torch.randn(1, 2, n, d, dtype=torch.float64) for _ in range(3))
    rope = fastpe.rope.hirope(d)
    place = torch.arange(n) - torch.tensor([(segments == s).nonzero()[0, 0] for s in segments])
    scores = torch.empty(1, 2, n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(i + 1):
            if i - j < window:
                distance = [i - j, i - j]
            else:
                distance = [place[i] - place[j], segments[i] - segments[j] + window - 1]
            at = torch.tensor(distance).reshape(2, 1)
            turned = fastpe.reference.apply_rotary(q[:, :, i : i + 1], rope, at)
            scores[:, :, i, j] = (turned[:, :, 0] * k[:, :, j]).sum(-1)
    p = (scores / d**0.5).masked_fill(~torch.ones(n, n).bool().tril(), -torch.inf).softmax(-1)
    got = fastpe.attention(q, k, v, rope=rope, region=region.hirope(segments, window), is_causal=True)
    torch.testing.assert_close(got, p @ v, rtol=1e-10, atol=1e-10)


def test_far_keys_are_not_merged_apart():
    """In bfloat16 one softmax over the regions errs less than regions rounded apart and merged, which releases do."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 2, 400, 32).bfloat16() for _ in range(3))
    rope, r = fastpe.rope.default(32), region.dual_chunk(96, 16)
    exact = fastpe.reference.attention(q, k, v, rope=rope, region=r, is_causal=True)
    got = fastpe.attention(q, k, v, rope=rope, region=r, is_causal=True).double()
    plan = r.plan(fastpe.bias.Call(1, 2, 400, 400, True, torch.float32, q.device))
    of = r.region_of(fastpe.bias.Call(1, 2, 400, 400, True, torch.float32, q.device))
    parts = [
        fastpe.attention(
            q, k, v, rope=rope, positions=p, key_positions=plan.key[0], mask=fastpe.mask.dense(of == n + 1), is_causal=True, return_lse=True
        )
        for n, p in enumerate(plan.query)
    ]
    merged = fastpe.merge(*zip(*parts))[0].double()

    def rms(x):
        return float((x - exact).square().mean().sqrt())

    assert rms(got) < rms(merged)


def test_length_dependent_ropes_see_one_length():
    """Dynamic NTK takes the length of the text, not the largest position of a region."""
    torch.manual_seed(4)
    q, k, v = (torch.randn(1, 2, 90, 16, dtype=torch.float64) for _ in range(3))
    dynamic, r = fastpe.rope.dynamic_ntk(16, factor=2.0, max_position=32), region.self_extend(20, 4)
    got = fastpe.attention(q, k, v, rope=dynamic, region=r, is_causal=True)
    want = fastpe.attention(q, k, v, rope=dynamic.at_length(90), region=r, is_causal=True)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_lengths_do_not_recompile():
    rope, regions = fastpe.rope.default(16), [cases.REGIONS[n] for n in ("self_extend", "dual_chunk", "string", "rerope")]
    regions.append(cases.REGIONS["self_extend_bidirectional"])
    for r in regions:
        torch._dynamo.reset()
        made = []

        def backend(graph, inputs):
            made.append(graph)
            return graph

        def f(q, k, v):
            return fastpe.attention(q, k, v, rope=rope, region=r, is_causal=True)

        compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
        for n in (33, 70, 127):
            q, k, v = (torch.randn(1, 2, n, 16) for _ in range(3))
            torch.testing.assert_close(compiled(q, k, v), f(q, k, v), rtol=1e-5, atol=1e-5)
        assert len(made) == 1, r


def test_repeats_bitwise():
    run = build(Case(**{**vars(LONG), "region": "dual_chunk"}), torch.float32)
    first = run(fastpe.attention)
    for _ in range(3):
        again = build(Case(**{**vars(LONG), "region": "dual_chunk"}), torch.float32)(fastpe.attention)
        assert all(torch.equal(x, y) for x, y in zip((first[0], first[1], *first[2].values()), (again[0], again[1], *again[2].values())))


Q = torch.randn(1, 2, 10, 16)
ROPE = fastpe.rope.default(16)


def ask(r, **kwargs):
    return fastpe.attention(Q, Q, Q, **{"rope": ROPE, "region": r, "is_causal": True, **kwargs})


BAD = [
    (lambda: region.self_extend(0, 4), ValueError, "self_extend: window must be at least 1, got 0"),
    (lambda: region.self_extend(8, 2.0), TypeError, "self_extend: group must be an integer, got float"),
    (lambda: region.self_extend(8, 2, shift="half"), ValueError, "shift must be one of 'floor', 'true', got 'half'"),
    (lambda: region.self_extend(8, 2, scale_base=1), ValueError, "scale_base must be above 1, got 1"),
    (lambda: region.rerope(8, train_length=-1), ValueError, "train_length must be above 1, got -1"),
    (lambda: region.leaky_rerope(8, 0), ValueError, "factor must be positive, got 0"),
    (lambda: region.dual_chunk(8, 8), ValueError, "local_window must be below chunk_size 8, got 8"),
    (lambda: region.dual_chunk(8, 2, mscale="vllm"), ValueError, "mscale must be 'hf' or 'serving', got 'vllm'"),
    (lambda: region.string(8, 9), ValueError, "window must be at most shift 8, got 9"),
    (lambda: region.streaming(-1, 4), ValueError, "start must be at least 0, got -1"),
    (lambda: region.key_set(2, "before"), ValueError, "memory must be 'zero', 'continual' or positions, got 'before'"),
    (lambda: region.key_set(2, torch.arange(3)), ValueError, r"memory must be \(M,\) or \(B, M\) with M = 2, got \(3,\)"),
    (lambda: region.key_set(2, "continual", first=1), ValueError, "first must be 0 for memory 'continual', got 1"),
    (lambda: region.hirope(torch.tensor([0, 2, 1])), ValueError, "segments must not fall, got 2 then 1 at token 2"),
    (lambda: region.custom("ring", 3, [], []), ValueError, "kind must be one of 'distance', 'chunk', 'key_set', 'band', got 'ring'"),
    (lambda: region.custom("chunk", 0, [Q[0, 0, :, 0]] * 3, [Q[0, 0, :, 0]]), ValueError, "size must be at least 1, got 0"),
    (
        lambda: region.custom("chunk", 3, [torch.arange(3)] * 2, [torch.arange(3)]),
        ValueError,
        "query must hold 3 position arrays for 'chunk', got 2",
    ),
    (
        lambda: region.custom("distance", 3, [torch.tensor([0.0, torch.nan])] * 2, [torch.arange(2)]),
        ValueError,
        "query must be finite",
    ),
    (
        lambda: ask(region.custom("distance", 3, [torch.arange(9)] * 2, [torch.arange(10)])),
        ValueError,
        "query positions are for 9 tokens, the call has 10",
    ),
    (lambda: ask(region.key_set(11)), ValueError, "key_set: 11 memory keys, the call has 10 keys"),
    (lambda: ask(region.hirope(torch.arange(9)), rope=fastpe.rope.hirope(16)), ValueError, "segments has 9 tokens, the call has 10 keys"),
    (lambda: ask(region.hirope(torch.arange(10))), ValueError, "rope default has 1 axes, the positions have 2"),
    (lambda: ask(region.self_extend(4, 2), rope=None), ValueError, "region chooses positions for rope, which is None"),
    (
        lambda: ask(region.self_extend(4, 2), positions=torch.arange(10)),
        ValueError,
        "positions and region both say where tokens are; give one of them",
    ),
    (lambda: ask(region.self_extend(4, 2), rope=fastpe.rope.xpos(16)), NotImplementedError, "does not go with xPos centred on the text"),
    (lambda: ask("self_extend"), TypeError, "region must be a fastpe.region object, got str"),
]


@pytest.mark.parametrize("n", range(len(BAD)))
def test_bad_input(n):
    call, error, message = BAD[n]
    with pytest.raises(error, match=message) as caught:
        call()
    assert str(caught.value).startswith("fastpe.")
