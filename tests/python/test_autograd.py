"""Autocast, checkpointing, repeated and threaded runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fastpe
from fastpe.testing.cases import Case, build


def test_autocast_casts_like_sdpa():
    q, k, v = (torch.randn(1, 2, 9, 16, requires_grad=True) for _ in range(3))
    slopes = torch.rand(2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out, lse = fastpe.attention(
            q, k, v, bias=fastpe.bias.Alibi(slopes), head_scale=slopes + 1, is_causal=True, return_lse=True
        )
    assert out.dtype == theirs.dtype == torch.bfloat16 and lse.dtype == torch.float32
    out.float().sum().backward()
    assert q.grad.dtype == slopes.grad.dtype == torch.float32
    x = torch.randn(1, 2, 9, 16, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastpe.attention(x, x, x).dtype == torch.float64


@pytest.mark.parametrize("make", [fastpe.nn.CableBias, fastpe.nn.ForgetBias])
def test_increments_stay_float32(make):
    module, x = make(32, 4), torch.randn(2, 200, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = module(x)
    outside = module(x)
    for b in (inside, outside):
        prefix = b.prefix if isinstance(b, fastpe.bias.Cable) else b.log_gates
        prefix = prefix if isinstance(prefix, fastpe.Prefix) else fastpe.prefix_sum(prefix)
        assert prefix.local.dtype == torch.float32
    call = fastpe.bias.Call(2, 4, 200, 200, True, torch.float32, torch.device("cpu"))
    assert torch.equal(inside.materialize(call), outside.materialize(call))


def test_prefix_sum_under_autocast():
    x = torch.randn(1, 1, 500, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fastpe.prefix_sum(x)
    assert torch.equal(inside.local, fastpe.prefix_sum(x).local)


def test_autocast_compiled():
    module = fastpe.nn.CableBias(16, 2)

    def f(x, q):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fastpe.attention(q, q, q, bias=module(x), is_causal=True)

    x, q = torch.randn(1, 9, 16), torch.randn(1, 2, 9, 8)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x, q), f(x, q))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    module = fastpe.nn.CableBias(16, 2)
    x = torch.randn(1, 20, 16, requires_grad=True)

    def f(x):
        q = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return fastpe.attention(q, q, q, bias=module(x), is_causal=True).sum()

    want = torch.autograd.grad(f(x), [x, *module.parameters()])
    x2 = x.detach().requires_grad_()
    module.zero_grad()
    checkpoint(f, x2, use_reentrant=reentrant).backward()
    for a, b in zip([x2.grad, *(p.grad for p in module.parameters())], want):
        assert torch.equal(a, b)


REPEATED = [
    Case(B=2, H=4, Hk=2, Nq=150, Nk=150, D=32, Dv=32, bias="cable", causal=True, rope="half", lse_gradient=True),
    Case(B=1, H=3, Hk=1, Nq=97, Nk=131, D=16, Dv=24, bias="t5", mask="window_both", score=("row_scale", "sink")),
    Case(B=1, H=4, Hk=4, Nq=130, Nk=130, bias="alibi", mask="documents", causal=True, storage="bnhd"),
    Case(B=1, H=2, Hk=1, Nq=200, Nk=200, bias="fn_log", score=("head_scale", "softcap", "temperature")),
]


def everything(case, dtype):
    out, lse, grads = build(case, dtype)(fastpe.attention)
    return [out.detach(), lse.detach(), *(g for g in grads.values() if g is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", REPEATED, ids=lambda c: c.bias)
def test_bitwise_repeatable(case, dtype, isa):
    """The same bits in 20 runs, for 1, 2 and 3 threads."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = everything(case, dtype)
        for run in range(20):
            torch.set_num_threads(1 + run % 3)
            for a, b in zip(first, everything(case, dtype), strict=True):
                assert torch.equal(a, b), f"run {run} with {1 + run % 3} threads"
    finally:
        torch.set_num_threads(threads)


ATTENTIONS = {
    "attention": lambda q, k, v: fastpe.attention(q, k, v, is_causal=True),
    "cope": lambda q, k, v: fastpe.attention(q, k, v, is_causal=True, bias=fastpe.bias.Cope(torch.full((q.shape[-1], 8), 0.1))),
    "landmark": lambda q, k, v: fastpe.landmark_attention(q, k, v, (torch.arange(q.shape[2]) % 13 == 12)[None]),
}


@pytest.mark.parametrize("channels", [64, 24])  # whole vectors on every instruction set, and not
@pytest.mark.parametrize("call", ATTENTIONS.values(), ids=ATTENTIONS)
def test_layout_of_the_upstream_gradient(call, channels):
    """Contiguous rows are read where they lie, others are copied: the gradients are the same bits."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 130, channels, generator=g).requires_grad_() for _ in range(3))
    upstream = torch.randn(1, 2, 130, channels, generator=g)
    wide = torch.zeros(1, 2, 130, channels + 8)
    wide[..., :channels] = upstream
    same = (upstream.transpose(1, 2).contiguous().transpose(1, 2), wide[..., :channels])
    row = upstream[:, :, :1]

    def gradients(d_out):
        return torch.autograd.grad(call(q, k, v), (q, k, v), d_out)

    for layout in same:
        assert all(torch.equal(a, b) for a, b in zip(gradients(upstream), gradients(layout)))
    assert all(torch.equal(a, b) for a, b in zip(gradients(row.expand_as(upstream)), gradients(row.repeat(1, 1, 130, 1))))
