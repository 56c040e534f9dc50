"""float32 attention on the CUDA kernels against the float64 definition, with float32's tolerances: no rounding of operands to
fewer bits than they have."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fastpe
from fastpe import reference
from fastpe.testing.cases import BIASES, LONG_BIASES, LONG_MASKS, MASKS, REGIONS, Case, build
from fastpe.testing.compare import TOLERANCE, close

SMALL = Case(B=1, H=1, Hk=1, Nq=70, Nk=150, D=16, Dv=16, lse_gradient=True)
FORWARD, BACKWARD = TOLERANCE[torch.float32]


def compare(case, on_kernels, **options):
    want = build(case, torch.float32, wide=True)(reference.attention)
    with on_kernels(**options):
        got = build(case, torch.float32)(fastpe.attention)
    close("out", got[0], want[0], FORWARD)
    close("lse", got[1], want[1], FORWARD, floor=1.0)
    for name, x in want[2].items():
        if x is not None:
            # A gradient that is zero by cancellation is compared with the size of its terms.
            close(f"d {name}", got[2][name], x, BACKWARD, floor=1.0)


@pytest.mark.parametrize("bias", BIASES | LONG_BIASES)
def test_bias(bias, on_kernels):
    causal = len(bias) % 2 == 0
    compare(dataclasses.replace(SMALL, bias=bias, causal=causal, seed=1), on_kernels)


@pytest.mark.parametrize("mask", MASKS | LONG_MASKS)
def test_mask(mask, on_kernels):
    compare(dataclasses.replace(SMALL, B=2, bias="cable", mask=mask, seed=2), on_kernels)


@pytest.mark.parametrize("rope", ["half", "interleaved", "partial", "positions"])
def test_rope(rope, on_kernels):
    compare(dataclasses.replace(SMALL, H=2, D=24, rope=rope, bias="alibi", causal=True, seed=3), on_kernels)


@pytest.mark.parametrize("region", [r for r in REGIONS if r != "none"])
def test_region(region, on_kernels):
    causal = "bidirectional" not in region
    compare(dataclasses.replace(SMALL, H=2, D=24, rope="half", region=region, causal=causal, seed=4), on_kernels)


@pytest.mark.parametrize("score", ["scale", "head_scale", "row_scale", "softcap", "softcap_bias", "temperature", "sink"])
def test_score(score, on_kernels):
    compare(dataclasses.replace(SMALL, score=(score,), bias="t5", seed=5), on_kernels)


@pytest.mark.parametrize("D,Dv", [(64, 64), (80, 96), (128, 128), (256, 256), (8, 200)])
def test_head_dims(D, Dv, on_kernels):
    compare(dataclasses.replace(SMALL, Nq=40, D=D, Dv=Dv, causal=True, seed=6), on_kernels)


@pytest.mark.parametrize("Nq,Nk", [(1, 130), (64, 64), (65, 63), (130, 20), (63, 257), (3, 700)])
def test_lengths(Nq, Nk, on_kernels):
    compare(dataclasses.replace(SMALL, H=4, Hk=2, Nq=Nq, Nk=Nk, causal=Nq % 2 == 1, bias="table", seed=7), on_kernels)


@pytest.mark.parametrize("storage", ["bnhd", "padded", "expanded"])
def test_storage(storage, on_kernels):
    compare(dataclasses.replace(SMALL, B=2, H=4, Hk=2, Nq=66, Nk=66, storage=storage, rope="half", seed=8), on_kernels)


def test_large_scores_keep_their_bits(on_kernels):
    """Scores in the hundreds: what two bf16 parts of an operand leave out would be seen."""
    run, exact = (build(dataclasses.replace(SMALL, D=64, seed=9), torch.float32, wide=w) for w in (False, True))
    for r in (run, exact):
        r.qkv = (r.qkv[0] * 40, *r.qkv[1:])
    with torch.no_grad():
        want = exact(reference.attention, backward=False)
        with on_kernels():
            got = run(fastpe.attention, backward=False)
    # A few roundings of a score of this size to float32.
    close("lse", got[1], want[1], 8 * 2.0**-24)


def test_several_extras_at_once(on_kernels):
    compare(dataclasses.replace(SMALL, Nk=130, D=32, rope="half", bias="cable", mask="everything", score=("row_scale",), seed=10), on_kernels)


def test_nothing_outside_the_tensors_is_read(on_emulator):
    case = dataclasses.replace(SMALL, H=2, Nk=133, D=24, bias="products", mask="everything", rope="half", storage="padded", seed=11)
    compare(case, on_emulator, guard=True)


def test_float64_is_refused(on_emulator):
    q = torch.randn(1, 1, 4, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="take float32, bfloat16 and float16, got float64"), on_emulator():
        fastpe.attention(q, q, q)
