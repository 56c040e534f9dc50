"""Recipes that no golden file holds, and what the golden ones leave open, against direct formulas."""

from __future__ import annotations

import math

import pytest
import torch

import fastpe
from fastpe import recipes

ROPE = fastpe.rope.default(16)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(q, k, v, visible, positions=None, key_positions=None, factor=1.0):
    """Attention written out."""
    if positions is not None:
        q, k = fastpe.reference.apply_rotary(q, ROPE, positions), fastpe.reference.apply_rotary(k, ROPE, key_positions)
    group = q.shape[1] // k.shape[1]
    s = q @ k.repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5 * factor
    return s.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num() @ v.repeat_interleave(group, 1)


def test_list_attention_is_masked_attention():
    """Gathered in pieces, with gradients, grouped heads and entries that count for nothing."""
    q, k, v = normal(2, 4, 7, 16), normal(2, 2, 30, 16, seed=1), normal(2, 2, 30, 24, seed=2)
    lists = torch.stack([torch.randperm(30, generator=torch.Generator().manual_seed(n))[:9] for n in range(56)]).reshape(2, 4, 7, 9)
    kept = torch.rand(2, 4, 7, 9, generator=torch.Generator().manual_seed(3)) < 0.8
    kept[0, 0, 0] = False
    visible = torch.zeros(2, 4, 7, 30, dtype=torch.bool).scatter(-1, lists, kept)
    results = []
    for piece in (1 << 24, 1):
        recipes_gather, recipes._GATHER = recipes._GATHER, piece
        try:
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = recipes.list_attention(*leaves, lists, kept)
        finally:
            recipes._GATHER = recipes_gather
        out.square().sum().backward()
        results.append((out.detach(), *(x.grad for x in leaves)))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want = dense(*leaves, visible)
    torch.where(visible.any(-1)[..., None], want, 0.0).square().sum().backward()
    for got in results:
        for x, y in zip(got, (want.detach(), *(x.grad for x in leaves))):
            torch.testing.assert_close(x, y.nan_to_num(), rtol=1e-10, atol=1e-10)


def test_list_attention_rejects_wrong_lists():
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"list_attention: lists must lie in \[0, 5\), got 5"):
        recipes.list_attention(q, k, k, torch.full((1, 2, 3, 1), 5))
    with pytest.raises(ValueError, match=r"lists must be \(B, H, Nq, n\) = \(1, 2, 3, n\), got \(1, 2, 2, 1\)"):
        recipes.list_attention(q, k, k, torch.zeros(1, 2, 2, 1).long())


def test_prompt_cache():
    q, k, v = normal(1, 2, 4, 16), normal(1, 2, 15, 16, seed=1), normal(1, 2, 15, 16, seed=2)
    p = torch.tensor([0, 1, 2, 20, 21, 22, 23, 24, 10, 11, 12, 25, 26, 27, 28])  # modules may leave gaps and come in any order
    got = recipes.prompt_cache(q, k, v, [0, 20, 10], [3, 5, 3], rope=ROPE)
    visible = torch.arange(15) <= torch.arange(11, 15)[:, None]
    torch.testing.assert_close(got, dense(q, k, v, visible, p[-4:], p), rtol=1e-10, atol=1e-10)


def test_mesa_extrapolation():
    q, k, v = normal(1, 2, 2, 16), normal(1, 2, 24, 16, seed=1), normal(1, 2, 24, 16, seed=2)
    n, chunk, width = 24, 7, 3
    tail = (n - 1) % chunk
    first = n - tail
    p = torch.tensor([j if j >= first else first - 1 - (first - 1 - j) // width for j in range(n)])
    rows = torch.tensor([max(1.0, math.log(i + 1) / math.log(16)) for i in (22, 23)], dtype=torch.float64)[:, None]
    got = recipes.mesa_extrapolation(q, k, v, rope=ROPE, chunk=chunk, width=width, train_length=16)
    visible = torch.arange(n) <= torch.tensor([[22], [23]])
    torch.testing.assert_close(got, dense(q, k, v, visible, p[-2:], p, rows), rtol=1e-10, atol=1e-10)


def test_decoding_continues_prefill():
    """Recipes whose last rows are those of a call with fewer queries."""
    q, k, v = (normal(1, 2, 60, 16, seed=n) for n in range(3))
    weights = torch.tensor([0.0, -0.5], dtype=torch.float64)
    for call in (
        lambda q: recipes.pcw(q, k, v, [20, 15], rope=ROPE),
        lambda q: recipes.ape(q, k, v, 4, [20, 15], rope=ROPE),
        lambda q: recipes.structured_prompting(q, k, v, 2, 12, rope=ROPE),
        lambda q: recipes.superposition(q, k, v, 3, [10, 14], 5, rope=ROPE, log_weights=weights),
        lambda q: recipes.gali(q, k, v, rope=ROPE, train_length=24, local_window=4, chunk=18),
        lambda q: recipes.streaming(q, k, v, rope=ROPE, start=2, recent=9),
        lambda q: recipes.extended_mind(q, k, v, k, v, rope=ROPE, k=5),
        lambda q: recipes.longllama(q, k, v, k, v, rope=ROPE),
        lambda q: recipes.loki(q, k, v, torch.linalg.qr(normal(2, 16, 16))[0], r=8, k=9),
    ):
        torch.testing.assert_close(call(q[:, :, -3:]), call(q)[:, :, -3:], rtol=1e-10, atol=1e-10)


def test_ape_weight_of_the_paper():
    """c = S instead of S T; with T = 1 both are one rule, and with S = T = 1 it is plain attention."""
    q, k, v = (normal(1, 2, 20, 16, seed=n) for n in range(3))

    def ape(**settings):
        return recipes.ape(q, k, v, 2, [6, 5], rope=ROPE, **settings)

    assert (ape() - ape(weight="paper")).abs().max() > 1e-4
    torch.testing.assert_close(ape(temperature=1.0), ape(temperature=1.0, weight="paper"))
    p = fastpe.positions.parallel(2, [6, 5], 20)
    plain = fastpe.attention(q, k, v, rope=ROPE, positions=p, mask=fastpe.mask.ape(2, [6, 5]))
    torch.testing.assert_close(ape(temperature=1.0, scale=1.0), plain)


def test_hyper_exact_when_blocks_hold_all():
    """With one block the approximation is attention itself, and hiding a row's own block from the samples leaves blocks alone."""
    q, k, v = (normal(1, 2, 64, 16, seed=n) for n in range(3))
    exact = fastpe.attention(q, k, v)
    torch.testing.assert_close(recipes.hyper(q, k, v, block=64, samples=8, min_length=1), exact)
    draws = [torch.zeros(1, 2, 8, dtype=torch.int64)]  # samples of the first block only
    directions = normal(16, 5, seed=9)
    hidden = recipes.hyper(q, k, v, block=32, samples=8, min_length=1, directions=directions, draws=draws, hide_own_block=True)
    blocks = recipes.hyper(q, k, v, block=32, samples=0, min_length=1, directions=directions)
    first = recipes.lsh_hash(q, directions).sort(stable=True, dim=-1).indices[..., :32]
    at = first[..., None].expand(-1, -1, -1, 16)
    torch.testing.assert_close(hidden.gather(2, at), blocks.gather(2, at))
    assert not torch.allclose(hidden, blocks)


def test_h2o_and_snapkv():
    q, k, v = (normal(1, 2, 40, 16, seed=n) for n in range(3))
    p = (q @ k.mT * 0.25).masked_fill(~torch.ones(40, 40).bool().tril(), -torch.inf).softmax(-1)
    mass = p.sum(2)
    kept = recipes.h2o_keep(mass, heavy=6, recent=8)
    assert kept[..., -8:].all() and (kept.sum(-1) == 14).all()
    assert (mass[..., :32][kept[..., :32]].reshape(2, 6).amin(-1) >= mass[..., :32].masked_fill(kept[..., :32], 0)[0].amax(-1)).all()
    scores = p[:, :, -8:, :32].mean(2)
    lse = fastpe.attention(q, k, v, is_causal=True, return_lse=True)[1]
    torch.testing.assert_close(recipes.snapkv_scores(q, k, lse, 8, is_causal=True), scores)
    visible = torch.arange(32, 40, dtype=torch.float64)[:, None]
    finch = recipes.finch_scores(q, k, lse, 8, is_causal=True)
    torch.testing.assert_close(finch, (p[:, :, -8:, :32] * visible).mean(2))
    pooled = torch.nn.functional.avg_pool1d(scores, 5, 1, 2)
    chosen = recipes.snapkv_keep(scores, 7)
    assert (chosen[..., 1:] > chosen[..., :-1]).all()
    assert torch.equal(pooled.gather(-1, chosen).sort(-1).values, pooled.sort(-1).values[..., -7:])


@pytest.mark.parametrize("alpha", (1.2, 1.5, 1.75, 2.0))
def test_entmax(alpha):
    """The share solves its equation and has the derivative of a difference quotient."""
    x = torch.linspace(-6, 6, 101, dtype=torch.float64).requires_grad_()
    p = recipes.entmax_first(x, alpha)
    e = alpha - 1
    inside = (p > 0) & (p < 1)
    solved = (p**e - (1 - p) ** e) / e
    torch.testing.assert_close(solved[inside], x[inside], rtol=1e-10, atol=1e-10)
    assert ((p == 0) == (x <= -1 / e)).all() and ((p == 1) == (x >= 1 / e)).all()
    (slope,) = torch.autograd.grad(p.sum(), x)
    h = 1e-6
    quotient = (recipes.entmax_first(x.detach() + h, alpha) - recipes.entmax_first(x.detach() - h, alpha)) / (2 * h)
    torch.testing.assert_close(slope[inside], quotient[inside], rtol=1e-4, atol=1e-6)


def test_context_pruning_in_float32_stays_finite():
    """The release's 1e-40 is a denormal; the log stops at -92 instead of reaching -inf."""
    q = normal(1, 60, 4).float()
    b = recipes.context_pruning_bias(q, q, -6.0, 1.5)
    assert torch.isfinite(b).all() and b.min() == -92.0
    assert torch.equal(b.diagonal(dim1=2, dim2=3), torch.zeros(1, 1, 60))


def test_gali_positions_are_exact():
    """Ceilings of fractions come from whole numbers: i + j / G in float32 would round up for long texts."""
    numerators, steps = fastpe.positions.gali_fractions("", 1_000_000, 400_000, 128)
    p = numerators.double() / steps
    assert steps == 3 and p[-1] == 399_999
    assert (torch.diff(p) > 0).all()
    assert torch.equal((-(-numerators // steps))[:7], torch.tensor([0, 1, 1, 1, 2, 2, 2]))


@pytest.mark.parametrize("rows", [1, 3])
def test_positional_hidden(rows):
    """Row by row against one softmax over the keys that row uses."""
    g = torch.Generator().manual_seed(0)
    q, q2 = (torch.randn(1, 4, 11, 8, generator=g, dtype=torch.float64) for _ in range(2))
    k, k2, v = (torch.randn(1, 2, 13, 8, generator=g, dtype=torch.float64) for _ in range(3))
    out = fastpe.recipes.positional_hidden(q, k, v, q2, k2, rows=rows, scale=0.4)
    for i in range(11):
        last = i >= 11 - rows
        s = 0.4 * (q2 if last else q)[:, :, i : i + 1] @ (k2 if last else k).repeat_interleave(2, 1).mT[..., : i + 3]
        torch.testing.assert_close(out[:, :, i : i + 1], s.softmax(-1) @ v.repeat_interleave(2, 1)[:, :, : i + 3])
    with pytest.raises(ValueError, match="rows must be at most the 11 queries, got 12"):
        fastpe.recipes.positional_hidden(q, k, v, q2, k2, rows=12)


def test_bad_input():
    q, k = torch.randn(1, 2, 10, 16), torch.randn(1, 2, 10, 16)
    marks, sums = torch.arange(10) == 3, torch.zeros(10, dtype=torch.bool)
    for call, error, message in (
        (lambda: recipes.ape(q, k, k, 4, [5, 6], rope=ROPE), ValueError, "prefix and contexts have 15 tokens, the call has 10 keys"),
        (lambda: recipes.ape(q, k, k, 1, [2], rope=ROPE, weight="both"), ValueError, "weight must be one of 'code', 'paper', got 'both'"),
        (lambda: recipes.superposition(q, k, k, 1, [2, 2], 1, rope=ROPE, log_weights=torch.zeros(3)), ValueError, r"log_weights must be \(2,\)"),
        (lambda: recipes.ccm_merge(k, k, marks, sums), ValueError, "every run of sums must be as long as the run of marks before it"),
        (lambda: recipes.longheads(q, k, k, rope=ROPE, chunk=4, length=14), ValueError, "length must be a multiple of chunk 4, got 14"),
        (lambda: recipes.longheads(q[:, :, -1:], k, k, rope=ROPE, chunk=2, length=6), ValueError, "chunk_keys are needed with 1 queries and 10 keys"),
        (lambda: recipes.a2ats(q, k, k, torch.randn(2, 4, 16), rope=ROPE), ValueError, "query must be one row, got 10"),
        (lambda: recipes.hyper(q, k, k, block=4, min_length=1), ValueError, "block 4 must divide the 10 queries and 10 keys"),
        (lambda: recipes.hyper(q[:, :1], k, k), ValueError, "must agree in batch, heads and tokens"),
        (lambda: recipes.memlong(q, k, k, k, k, rope=ROPE, kind="ring"), ValueError, "kind must be one of 'zero', 'continual', got 'ring'"),
        (lambda: recipes.entmax_first(q, 0.5), ValueError, "alpha must be at least 1, got 0.5"),
        (lambda: recipes.snapkv_keep(q, 3, kernel=4), ValueError, "kernel must be odd, got 4"),
        (lambda: recipes.prompt_cache(q, k, k, [0], [3], rope=ROPE), ValueError, "3 cached and 10 new tokens, the call has 10 keys"),
        (lambda: recipes.mesa_extrapolation(q, k, k, rope=ROPE, chunk=4), ValueError, "10 queries, the unfinished chunk has 1 tokens"),
        (lambda: recipes.gali(q, k, k, rope=ROPE, train_length=100), ValueError, "train_length must be at least 129, got 100"),
    ):
        with pytest.raises(error, match=message) as caught:
            call()
        assert str(caught.value).startswith("fastpe.")
