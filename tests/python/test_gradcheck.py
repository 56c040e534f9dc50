"""Numerical derivatives in float64 (torch.autograd.gradcheck) for every bias form, score option and rotation, lse included."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fastpe
from fastpe.testing import cases
from fastpe.testing.cases import Case, build

SMALL = Case(B=1, H=2, Hk=1, Nq=3, Nk=4, D=8, Dv=8, causal=True, lse_gradient=True)
BOTH = dataclasses.replace(SMALL, causal=False, mask="window_both")

CASES = (
    [dataclasses.replace(SMALL, bias=b) for b in (*cases.BIASES, *cases.LONG_BIASES)]
    + [dataclasses.replace(BOTH, bias=b) for b in (*cases.BIASES, *cases.LONG_BIASES)]
    + [
        dataclasses.replace(SMALL, bias=b, rope="half", mask=m, score=("sink",), Nk=9)
        for b in (*cases.BIASES, *cases.LONG_BIASES)
        for m in ("window", "documents")
    ]
    + [dataclasses.replace(SMALL, bias="alibi", score=(s,)) for s in cases.SCORE]
    + [dataclasses.replace(SMALL, bias="cable", score=("head_scale", "row_scale", "softcap", "temperature", "sink"))]
    + [dataclasses.replace(SMALL, bias="t5", score=("temperature",), rope=r) for r in cases.ROPES]
    + [dataclasses.replace(SMALL, mask=m, rope="half", Nk=6) for m in (*cases.MASKS, *cases.LONG_MASKS)]
    + [dataclasses.replace(SMALL, region=r, rope="half", Nq=20, Nk=30) for r in cases.REGIONS]
)


def name(case: Case) -> str:
    return "-".join([case.bias, case.mask, case.rope, case.region, *case.score, "causal" if case.causal else "both"])


@pytest.mark.parametrize("case", CASES, ids=name)
def test_attention(case):
    names = list(build(case, torch.float64).leaves.named)

    def f(*inputs):
        # The objects hold their tensors, so each evaluation makes the call anew around the inputs gradcheck moves.
        given = dict(zip(names, inputs))
        run = build(case, torch.float64, given=given)
        out, lse = fastpe.attention(*run.qkv, **run.kwargs, return_lse=True)
        return out, torch.where(torch.isneginf(lse), 0.0, lse)

    inputs = tuple(x.detach().clone().requires_grad_() for x in build(case, torch.float64).leaves.named.values())
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True, eps=1e-6, atol=1e-6, rtol=1e-5)


def test_temperature_tensor():
    q, k, v = (torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    tau = torch.tensor([0.7, 1.3], dtype=torch.float64, requires_grad=True)
    slopes = torch.tensor([0.3, 0.1], dtype=torch.float64, requires_grad=True)

    def f(q, k, v, tau, slopes):
        return fastpe.attention(q, k, v, bias=fastpe.bias.Alibi(slopes), temperature=tau, is_causal=True)

    assert torch.autograd.gradcheck(f, (q, k, v, tau, slopes), fast_mode=True)


def test_rope_frequencies_and_positions():
    q, k, v = (torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    w = torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([0.0, 1.5, 2.0, 7.0], dtype=torch.float64, requires_grad=True)

    def f(q, k, v, w, p):
        return fastpe.attention(q, k, v, rope=fastpe.Rope(w), positions=p, is_causal=True)

    assert torch.autograd.gradcheck(f, (q, k, v, w, p), fast_mode=True)


@pytest.mark.parametrize("reverse", [False, True])
def test_prefix_sum(reverse):
    x = torch.randn(2, 1, 300, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fastpe.prefix_sum(x, reverse=reverse).values(), (x,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: torch.ops.fastpe.cumsum_exact(x, reverse), (x,), fast_mode=True)


def test_reference_is_differentiable_twice():
    q, k, v = (torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def f(q, k, v):
        return fastpe.reference.attention(q, k, v, bias=fastpe.bias.Alibi(2), is_causal=True)

    assert torch.autograd.gradgradcheck(f, (q, k, v), fast_mode=True)
