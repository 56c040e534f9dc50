"""Intervals, segment tables, block lists: their rules pair by pair, composition, layouts of methods, errors."""

from __future__ import annotations

import pytest
import torch

import fastpe
from fastpe import mask
from fastpe.testing import cases, compare
from fastpe.testing.cases import Case, build


def call(Nq, Nk, B=1, H=1):
    return fastpe.bias.Call(B, H, Nq, Nk, False, torch.float64, torch.device("cpu"))


def seen(m, Nq, Nk=None, B=1, H=1):
    """What the kernel sees of a mask: one-hot values, uniform probabilities."""
    Nk = Nq if Nk is None else Nk
    D = -(-max(Nk, 8) // 8) * 8
    q = torch.zeros(B, H, Nq, 8, dtype=torch.float64)
    k = torch.zeros(B, H, Nk, 8, dtype=torch.float64)
    v = torch.eye(D, dtype=torch.float64)[:Nk].expand(B, H, Nk, D)
    return (fastpe.attention(q, k, v, mask=m) > 0)[..., :Nk]


def agree(m, Nq, Nk=None, B=1, H=1):
    Nk = Nq if Nk is None else Nk
    got, want = seen(m, Nq, Nk, B, H), m.materialize(call(Nq, Nk, B, H)).expand(B, H, Nq, Nk)
    assert torch.equal(got, want)
    return want


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", cases.LONG_MASKS)
@pytest.mark.parametrize("lengths", [(33, 70), (150, 150), (1, 90)], ids=str)
def test_against_definition(name, lengths, dtype):
    case = Case(B=2, H=4, Hk=2, Nq=lengths[0], Nk=lengths[1], mask=name, bias="alibi", rope="half", lse_gradient=True)
    out, lse, grads = build(case, dtype)(fastpe.attention)
    want_out, want_lse, want_grads = build(case, dtype, wide=True)(fastpe.reference.attention)
    own_out, own_lse, own = build(case, dtype)(compare.eager_attention)
    if dtype == torch.float32:
        compare.close("out", out, want_out, 2e-5)
        compare.close("lse", lse, want_lse, 2e-5)
        for what, x in grads.items():
            compare.close(what, x, want_grads[what], 1e-4, floor=0.1)
    else:
        compare.close_half("out", out, want_out, own_out, dtype=dtype)
        for what, x in grads.items():
            compare.close_half(what, x, want_grads[what], own[what], floor=0.1, dtype=dtype)


def test_intervals_pair_by_pair():
    a1, b1, a2, b2 = (torch.tensor(x) for x in ([0, 2, 5, 0], [1, 4, 5, 6], [3, 4, 0, 6], [6, 6, 2, 6]))
    lower = torch.tensor([0, 0, 0, 1])
    m = mask.intervals(a1, b1, a2, b2, lower=lower)
    want = torch.zeros(4, 4, dtype=torch.bool)
    for i in range(4):
        for j in range(4):
            inside = int(a1[j]) <= i < int(b1[j]) or int(a2[j]) <= i < int(b2[j])
            want[i, j] = inside and j >= int(lower[i])
    assert torch.equal(agree(m, 4)[0, 0], want)
    assert torch.equal(agree(m, 2, 4)[0, 0], want[2:])


def test_two_interval_rules():
    """Where two intervals are enough they stay intervals; where three are needed the mask becomes a dense one, and stays right."""
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        one, two = (mask.intervals(*torch.randint(0, 31, (4, 2, 30), generator=g).sort(0).values) for _ in range(2))
        both = one & two
        want = one.materialize(call(30, 30, 2)) & two.materialize(call(30, 30, 2))
        assert torch.equal(agree(both, 30, B=2), want)
    narrow = mask.parallel(2, [5, 6]) & mask.intervals(torch.zeros(13).long(), torch.arange(13).clamp(min=9))
    agree(narrow, 13)
    assert narrow.op_args(call(13, 13)).mask is None
    comb = mask.intervals(*(torch.full((4,), x) for x in (0, 2, 3, 5))) & mask.intervals(*(torch.full((4,), x) for x in (1, 4, 0, 0)))
    assert comb.op_args(call(4, 4)).mask is None
    three = mask.intervals(*(torch.full((9,), x) for x in (0, 4, 5, 9))) & mask.intervals(*(torch.full((9,), x) for x in (1, 6, 7, 9)))
    assert agree(three, 9)[0, 0, :, 0].tolist() == [0, 1, 1, 1, 0, 1, 0, 1, 1]
    assert three.op_args(call(9, 9)).mask is not None


def test_lower_bounds_take_the_larger():
    n = 12
    everything = torch.zeros(n).long(), torch.full((n,), n)
    one = mask.intervals(*everything, lower=torch.arange(n) // 2)
    two = mask.intervals(*everything, lower=torch.arange(n).clamp(max=3))
    want = agree(one & two, n)[0, 0]
    j, i = torch.arange(n), torch.arange(n)[:, None]
    assert torch.equal(want, j >= torch.maximum(i // 2, i.clamp(max=3)))


def test_segments():
    relation = torch.tensor([[1, 0, 1], [0, 1, 0]]).bool()
    q, k = torch.tensor([[0, 1, 1], [1, 0, 0]]), torch.tensor([0, 1, 2, 2])
    want = agree(mask.segments(relation, q, k), 3, 4, B=2)
    assert torch.equal(want[:, 0], relation[q][:, :, k])


def test_two_segment_tables():
    g = torch.Generator().manual_seed(1)

    def table(size, n):
        return mask.segments(torch.rand(size, size, generator=g) < 0.6, torch.randint(0, size, (n,), generator=g))

    for size, linear in ((3, True), (9, False)):
        one, two = table(size, 80), table(size, 80)
        agree(one & two, 80)
        assert ((one & two).op_args(call(80, 80)).mask is None) == linear


def test_blocks():
    lists = torch.tensor([[[[0, 2, -1], [1, -1, -1]], [[-1, -1, -1], [0, 1, 2]]]])
    want = agree(mask.blocks(lists, 3, 2), 5, 5, H=2)
    assert want[0, 0].int().tolist() == [[1, 1, 0, 0, 1]] * 3 + [[0, 0, 1, 1, 0]] * 2
    assert not want[0, 1, :3].any() and want[0, 1, 3:].all()
    as_map = torch.tensor([[[[1, 0, 1], [0, 1, 0]], [[0, 0, 0], [1, 1, 1]]]]).bool()
    assert torch.equal(agree(mask.blocks(as_map, 3, 2), 5, 5, H=2), want)


def test_blocks_of_two_sizes():
    g = torch.Generator().manual_seed(2)
    one = mask.blocks(torch.rand(1, 2, 4, 7, generator=g) < 0.6, 12, 6)
    two = mask.blocks(torch.rand(1, 1, 5, 10, generator=g) < 0.6, 8, 4)
    both = one & two
    want = one.materialize(call(38, 40, 1, 2)) & two.materialize(call(38, 40, 1, 2))
    assert torch.equal(agree(both, 38, 40, H=2), want)
    assert (both.op_args(call(38, 40, 1, 2)).block_q, both.op_args(call(38, 40, 1, 2)).block_k) == (4, 2)


def test_hidden_blocks_are_not_read():
    """Attention over a list costs what the listed keys cost: hidden keys may hold anything, and few tiles are visited."""
    q, k, v = (torch.randn(1, 2, 512, 16) for _ in range(3))
    m = mask.blocks(torch.tensor([[1]] * 8), 64, 64)
    k[:, :, 128:], v[:, :, 128:] = torch.nan, torch.nan
    with fastpe.tile_stats() as stats:
        out = fastpe.attention(q, k, v, mask=m)
    assert torch.isfinite(out).all()
    assert 0 < stats.visited <= stats.hidden


@pytest.mark.parametrize("kind", ("arrow", "diag", "square"))
def test_uni_encoder(kind):
    piece = [0] * 3 + [1] * 2 + [2] * 4
    want = agree(mask.uni_encoder(3, [2, 4], kind), 9)[0, 0]
    for i in range(9):
        for j in range(9):
            rule = {"arrow": piece[i] == 0 or piece[j] in (0, piece[i]), "diag": piece[i] == piece[j], "square": True}
            assert bool(want[i, j]) == rule[kind]


def test_parallel_layouts():
    """Pieces see the prefix and themselves, the rest sees all; as decoding grows the rest, too."""
    piece = [0, 0, 1, 1, 1, 2, 3, 3, 9, 9]
    m = mask.parallel(2, [3, 1, 2], hidden=[1])
    for n in (8, 9, 10):
        want = agree(m, n)[0, 0]
        for i in range(n):
            for j in range(n):
                rule = j <= i and (piece[j] in (0, piece[i]) or piece[i] == 9 and piece[j] != 2)
                assert bool(want[i, j]) == rule, (i, j)
    assert torch.equal(agree(m, 2, 10), m.materialize(call(10, 10))[..., 8:, :])


def test_batched_layouts():
    """A layout of a batch is that of its rows."""
    g = torch.Generator().manual_seed(3)
    tokens = torch.tensor([[0, 1, 0, 2, 0, 1, 0, 0], [1, 2, 0, 0, 1, 0, 2, 0]])
    marks = torch.rand(2, 20, generator=g) < 0.3
    ids = torch.tensor([[0, 1, 1, 2, 2, 3], [0, 0, 1, 1, 1, 1]])
    mixed = torch.tensor([[0, 1, 2, 1, 2, 3], [0, 0, 1, 1, 1, 1]])
    for make, x in (
        (lambda t: mask.sentinel(t == 1, t == 2), tokens),
        (lambda t: mask.compressed(t, "concat"), marks),
        (lambda t: mask.compressed(t, "concat_recur"), marks),
        (lambda t: mask.compressed(t, "recur"), marks),
        (lambda t: mask.compressed(t == 1, "merge", t == 2), tokens),
        (mask.anchor, ids),
        (mask.anchor, mixed),
    ):
        n = x.shape[1]
        want = agree(make(x), n, B=2)
        for b in range(2):
            assert torch.equal(want[b : b + 1], make(x[b]).materialize(call(n, n)))


def test_compressed_by_its_words():
    """Every kind pair by pair, runs of different lengths, a run at the end."""
    marks = torch.tensor([0, 0, 1, 0, 1, 1, 0, 0, 0, 1]).bool()
    n, segment = 10, [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    for tail in (0, 3):
        marks_ = torch.cat((marks, torch.zeros(tail).bool()))
        segment_ = segment + [3] * tail
        last = 3 if tail else 2  # text after the last run
        for kind in ("concat", "concat_recur", "recur"):
            want = agree(mask.compressed(marks_, kind), n + tail)[0, 0]
            for i in range(n + tail):
                for j in range(i + 1):
                    rule = segment_[i] == segment_[j]
                    if marks_[j] and segment_[j] < segment_[i]:
                        rule |= {"concat": segment_[i] == last == 3, "concat_recur": True, "recur": segment_[j] == segment_[i] - 1}[kind]
                    assert bool(want[i, j]) == rule, (kind, i, j)


COMPILED = {
    "parallel": lambda n: mask.parallel(2, [5, 9]),
    "intervals": lambda n: mask.intervals(torch.arange(n), torch.arange(n) + 4),
    "segments": lambda n: mask.segments(torch.eye(3).bool(), torch.arange(n) % 3),
    "sentinel": lambda n: mask.sentinel(torch.arange(n) % 10 == 1, torch.arange(n) % 10 == 5),
    "recur": lambda n: mask.compressed(torch.arange(n) % 10 == 5, "recur"),
}


@pytest.mark.parametrize("name", COMPILED)
def test_lengths_do_not_recompile(name):
    torch._dynamo.reset()
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph

    def f(q):
        return fastpe.attention(q, q, q, mask=COMPILED[name](q.shape[2]))

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    for n in (40, 70, 100):
        q = torch.randn(1, 2, n, 16)
        torch.testing.assert_close(compiled(q), f(q), rtol=1e-5, atol=1e-5)
    assert len(made) == 1


def n_(x):
    return torch.tensor(x)


BAD = [
    (lambda: mask.intervals(n_([0, 0]), n_([2, 2]), n_([1, 5]), n_([3, 6])), ValueError, r"must not overlap, got \[0, 2\) and \[1, 3\) at key 0"),
    (lambda: mask.intervals(n_([0, 0]), n_([2])), ValueError, "first_end has 1 tokens, first_start has 2"),
    (lambda: mask.intervals(n_([0]), n_([2]), n_([3])), ValueError, "second_start and second_end go together"),
    (lambda: mask.intervals(n_([-1]), n_([2])), ValueError, r"first_start must lie in \[0, 2\*\*31\), got -1"),
    (lambda: mask.intervals(n_([0.0]), n_([2])), TypeError, "first_start must hold integers, got float32"),
    (lambda: mask.intervals(n_([0]), n_([2]), lower=n_([2])), ValueError, "lower must be at most 1, got 2"),
    (lambda: seen(mask.intervals(n_([0]), n_([2])), 2), ValueError, "intervals: given for 1 tokens, the call has 2 keys"),
    (lambda: seen(mask.parallel(2, [3]), 4), ValueError, "parallel: given for 5 tokens, the call has 4 keys"),
    (lambda: mask.segments(torch.ones(2, 3).bool(), n_([0])), ValueError, r"relation must be square without key_ids, got \(2, 3\)"),
    (lambda: mask.segments(torch.ones(2, 2).bool(), n_([0, 2])), ValueError, "ids must be below 2, the size of the relation, got 2"),
    (lambda: mask.segments(torch.ones(2, 2), n_([0, 1])), TypeError, "relation must be a bool tensor"),
    (lambda: seen(mask.segments(torch.ones(2, 2).bool(), n_([0, 1])), 3), ValueError, "segments: ids has 2 tokens, the call has 3 keys"),
    (lambda: mask.blocks(n_([[1, 0]])), ValueError, "lists must be ascending, -1 behind the last, got 1 then 0 in query block 0"),
    (lambda: mask.blocks(n_([[1, 1]])), ValueError, "got 1 then 1 in query block 0"),
    (lambda: mask.blocks(n_([[0, 1], [-1, 0]])), ValueError, "got -1 then 0 in query block 1"),
    (lambda: mask.blocks(n_([[-2]])), ValueError, "lists must hold key blocks or -1, got -2"),
    (lambda: mask.blocks(n_([[0]]), 0), ValueError, "block_q must be at least 1, got 0"),
    (lambda: seen(mask.blocks(n_([[5]]), 8, 2), 8), ValueError, "lists must hold key blocks below 4, got 5"),
    (lambda: seen(mask.blocks(n_([[0]]), 4, 2), 8), ValueError, "lists has 1 query blocks, the call has 2 of 4 queries"),
    (lambda: mask.parallel(1, [2], hidden=[1]), ValueError, "hidden must be below 1, the number of pieces, got 1"),
    (lambda: mask.pcw([3, 0]), ValueError, "lengths must be at least 1, got 0"),
    (lambda: mask.uni_encoder(3, [1], "bow"), ValueError, "kind must be 'arrow', 'diag' or 'square', got 'bow'"),
    (lambda: mask.sentinel(n_([False, True]), n_([True, False])), ValueError, "opening and closing tokens must alternate"),
    (lambda: mask.compressed(n_([True]), "gist"), ValueError, "kind must be one of 'concat', 'concat_recur', 'recur', 'merge', got 'gist'"),
    (lambda: mask.compressed(n_([True]), "merge"), ValueError, "kind 'merge' needs sums"),
    (lambda: mask.anchor(n_([-1])), ValueError, r"ids must lie in \[0, 2\*\*31\), got -1"),
    (lambda: fastpe.bias.SegmentPairs(n_([0])), ValueError, "give a factor or a bias"),
    (lambda: fastpe.bias.SegmentPairs(n_([2]), bias=torch.zeros(2, 2)), ValueError, "ids must be below 2, the size of the tables, got 2"),
    (
        lambda: fastpe.bias.SegmentPairs(n_([0]), factor=torch.zeros(2, 2), bias=torch.zeros(3, 3)),
        ValueError,
        r"factor is for \(2, 2\) segments, bias for \(3, 3\)",
    ),
]


@pytest.mark.parametrize("n", range(len(BAD)))
def test_bad_input(n):
    make, error, message = BAD[n]
    with pytest.raises(error, match=message) as caught:
        make()
    assert str(caught.value).startswith("fastpe.")
