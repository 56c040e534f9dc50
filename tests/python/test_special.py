"""NaN and infinity, rows that see nothing, degenerate sizes, extreme positions."""

from __future__ import annotations

import math

import pytest
import torch

import fastpe
from fastpe import bias, mask
from fastpe.testing import compare
from fastpe.testing.cases import Case, build

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_stays_in_its_rows(where, bad, dtype, isa):
    """As IEEE says: rows that see the number may become NaN, the others keep their values. A NaN or infinite value meets
    the zero probabilities of rows before it (0 * inf is NaN there, as in scaled_dot_product_attention), in its channel only."""
    n, at, channel = 150, 100, 3
    q, k, v = (torch.randn(1, 1, n, 16).to(dtype) for _ in range(3))
    clean, clean_lse = fastpe.attention(q, k, v, is_causal=True, return_lse=True)
    x = {"query": q, "key": k, "value": v}[where]
    x[0, 0, at, channel] = bad
    out, lse = fastpe.attention(q, k, v, is_causal=True, return_lse=True)
    out, lse, clean, clean_lse = out[0, 0], lse[0, 0], clean[0, 0], clean_lse[0, 0]
    rows = torch.arange(n)
    touched = rows == at if where == "query" else rows >= at
    if where == "value":
        others = torch.arange(16) != channel
        torch.testing.assert_close(out[:, others], clean[:, others])
        torch.testing.assert_close(lse, clean_lse)
        before = out[~touched, channel]
        kept = ~before.isnan()
        torch.testing.assert_close(before[kept], clean[~touched, channel][kept])
        assert kept[:64].all(), "rows whose tiles end before the number never meet it"
        hit = out[touched, channel]
        assert hit.isnan().all() if math.isnan(bad) else (hit == bad).all()
        return
    torch.testing.assert_close(out[~touched], clean[~touched])
    torch.testing.assert_close(lse[~touched], clean_lse[~touched])
    if math.isnan(bad):
        assert out[touched].isnan().all() and lse[touched].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["none", "alibi", "cable", "t5", "forget", "fn_power"])
def test_empty_rows(name, dtype, isa):
    case = Case(B=2, Nq=70, Nk=70, bias=name, mask="left_padding", causal=True, lse_gradient=True, seed=3)
    run = build(case, dtype)
    call = fastpe.bias.Call(2, 4, 70, 70, True, torch.float64, torch.device("cpu"))
    seen = (run.kwargs["mask"] & mask.causal()).materialize(call).any(-1).broadcast_to(2, 4, 70)
    assert not seen.all()
    out, lse, grads = run(fastpe.attention)
    assert not out[~seen].any() and torch.isneginf(lse[~seen]).all() and torch.isfinite(lse[seen]).all()
    for what, g in grads.items():
        assert torch.isfinite(g).all(), what
    assert not grads["query"][~seen].any()


def test_empty_rows_with_sink():
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    sink = torch.tensor([0.5, -1.0], requires_grad=True)
    out, lse = fastpe.attention(q, q, q, mask=mask.padding(torch.zeros(4, dtype=torch.bool)), sink=sink, return_lse=True)
    torch.testing.assert_close(lse, sink.detach()[None, :, None].expand_as(lse))
    lse.sum().backward()
    assert not out.any() and not q.grad.any()
    torch.testing.assert_close(sink.grad, torch.full((2,), 4.0))


@pytest.mark.parametrize("Nq, Nk", [(0, 5), (5, 0), (0, 0), (1, 1), (1, 300), (300, 1)])
@pytest.mark.parametrize("name", ["none", "alibi", "kerple_log", "t5", "table", "cable", "fn_abs"])
def test_lengths(Nq, Nk, name):
    if name == "cable" and Nq > Nk:
        pytest.skip("a cumulative bias takes its queries from the keys")
    case = Case(Nq=Nq, Nk=Nk, bias=name, causal=True)
    out, lse, grads = build(case, torch.float64)(fastpe.attention)
    want = build(case, torch.float64)(fastpe.reference.attention)
    compare.close("out", out, want[0], 1e-10) if out.numel() else None
    compare.close("lse", lse, want[1], 1e-10) if lse.numel() else None
    for what, g in grads.items():
        if g is not None and want[2][what] is not None and g.numel():
            compare.close(what, g, want[2][what], 1e-10, floor=1.0)


def test_no_batch():
    out = fastpe.attention(torch.zeros(0, 2, 5, 8), torch.zeros(0, 2, 5, 8), torch.zeros(0, 2, 5, 16))
    assert out.shape == (0, 2, 5, 16)


def test_large_positions():
    """Integer positions far beyond float32's 2^24 keep their differences."""
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    near = torch.arange(40)
    for offset in (2**24 + 1, 2**31 + 7, 2**52):
        for kwargs in ({}, {"key_positions": near + offset}):
            far = bias.Alibi(2, positions=near + offset, **kwargs)
            here = bias.Alibi(2, positions=near, **({"key_positions": near} if kwargs else {}))
            torch.testing.assert_close(
                fastpe.attention(q, k, v, bias=far, is_causal=True), fastpe.attention(q, k, v, bias=here, is_causal=True)
            )


def test_huge_invisible_bias():
    """A forgetting gate makes keys of the future tower by thousands; they are invisible and must not matter."""
    gates = torch.full((1, 1, 100), -50.0, requires_grad=True)
    q = torch.randn(1, 1, 100, 8, requires_grad=True)
    out = fastpe.attention(q, q, q, bias=bias.Forget(gates), is_causal=True)
    out.sum().backward()
    torch.testing.assert_close(out.detach(), q.detach())
    assert torch.isfinite(gates.grad).all()


def test_long_prefix_keeps_its_differences():
    """softplus increments over 100,000 tokens: a plain float32 prefix errs by 1e-2 here (bias.md 5.1)."""
    n = 100_000
    steps = -torch.nn.functional.softplus(torch.randn(1, 1, n))
    exact = steps.double().cumsum(-1)
    c = fastpe.prefix_sum(steps)
    for gap in (1, 8, 1000):
        got = [float(c.difference(i, i - gap)) for i in range(n - 500, n)]
        want = [float(exact[0, 0, i] - exact[0, 0, i - gap]) for i in range(n - 500, n)]
        assert max(abs(a - b) for a, b in zip(got, want)) < 1e-4
    q, k, v = torch.randn(1, 1, 4, 16), torch.randn(1, 1, n, 16), torch.randn(1, 1, n, 16)
    out = fastpe.attention(q, k, v, bias=bias.Cable(c), is_causal=True)
    want = fastpe.reference.attention(q, k, v, bias=bias.Cable(steps), is_causal=True)
    compare.close("out", out, want, 2e-5)


def test_backward_without_queries():
    q, k = torch.randn(1, 2, 0, 8, requires_grad=True), torch.randn(1, 2, 5, 8, requires_grad=True)
    fastpe.attention(q, k, k).sum().backward()  # sum hands over an expanded gradient
    assert q.grad.shape == q.shape and not k.grad.any()
