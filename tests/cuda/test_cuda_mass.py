"""Attention mass and rows of probabilities on the CUDA kernels against the float64 definition."""

from __future__ import annotations

import pytest
import torch

import fastpe
from fastpe.testing import compare
from fastpe.testing.cases import Case, build

# Turned queries and keys are rounded operands: a score moves by that much of its size.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 2e-5}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", [
    Case(B=1, H=2, Hk=1, Nq=150, Nk=193, D=32, rope="half", causal=True),
    Case(B=2, H=2, Hk=1, Nq=70, Nk=131, D=16, bias="table", mask="everything"),
    Case(B=1, H=2, Hk=2, Nq=70, Nk=131, D=24, bias="dense", mask="blocks", score=("softcap",)),
    Case(B=1, H=2, Hk=1, Nq=100, Nk=140, D=16, bias="products", causal=True),
    Case(B=1, H=2, Hk=1, Nq=100, Nk=100, D=16, rope="half", region="dual_chunk", causal=True, bias="cable"),
], ids=lambda c: f"{c.bias}-{c.mask}-{c.region}")  # fmt: skip
def test_mass_and_rows(case, dtype, on_kernels):
    run, exact = build(case, dtype), build(case, dtype, wide=True)
    weights = torch.rand(case.B, 1, case.Nq, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, lse = fastpe.attention(*run.qkv, **run.kwargs, return_lse=True)
        q, k = run.qkv[:2]
        with on_kernels():
            mass = fastpe.attention_mass(q, k, lse, row_weights=weights, **run.kwargs)
            rows = {n: fastpe.attention_rows(q, k, lse, rows=n, **run.kwargs) for n in (1, 66)}
            logits = fastpe.attention_rows(q, k, rows=9, logits=True, **run.kwargs)
        want = fastpe.reference
        compare.close("mass", mass, want.attention_mass(*exact.qkv[:2], row_weights=weights, **exact.kwargs), TOLERANCE[dtype])
        for n, x in rows.items():
            compare.close("rows", x, want.attention_rows(*exact.qkv[:2], rows=n, **exact.kwargs), TOLERANCE[dtype], floor=1e-2)
        compare.close("logits", logits, want.attention_rows(*exact.qkv[:2], rows=9, logits=True, **exact.kwargs), TOLERANCE[dtype], floor=1.0)
