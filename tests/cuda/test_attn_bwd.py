"""The sm_80 backward kernels, executed by the emulator or a GPU, against the float64 definition."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fastpe
from fastpe import reference
from fastpe.testing.cases import BIASES, LONG_BIASES, LONG_MASKS, MASKS, Case, build
from fastpe.testing.compare import close_half, eager_attention

SMALL = Case(B=1, H=1, Hk=1, Nq=70, Nk=150, D=16, Dv=16, lse_gradient=True)


def compare(case, dtype, on_kernels, **options):
    run = build(case, dtype)
    _, _, want = build(case, dtype, wide=True)(reference.attention)
    _, _, torchs = build(case, dtype)(eager_attention)
    with on_kernels(**options):
        _, _, got = run(fastpe.attention)
    assert got.keys() == want.keys()
    for name in want:
        if want[name] is None:
            continue
        # A gradient that is zero by cancellation is compared with the size of its terms.
        close_half(f"d {name}", got[name], want[name], torchs[name], floor=1e-2, dtype=dtype)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("bias", BIASES | LONG_BIASES)
def test_bias(bias, causal, on_kernels):
    # Two heads: how well roundings cancel in the one number of one head says little.
    compare(dataclasses.replace(SMALL, H=2, bias=bias, causal=causal, seed=1), torch.bfloat16, on_kernels)


@pytest.mark.parametrize("mask", MASKS | LONG_MASKS)
def test_mask(mask, on_kernels):
    compare(dataclasses.replace(SMALL, B=2, bias="cable", mask=mask, seed=2), torch.float16, on_kernels)


@pytest.mark.parametrize("rope", ["half", "interleaved", "partial", "positions"])
def test_rope(rope, on_kernels):
    compare(dataclasses.replace(SMALL, H=2, D=24, rope=rope, bias="alibi", causal=True, seed=3), torch.bfloat16, on_kernels)


@pytest.mark.parametrize("score", ["scale", "head_scale", "row_scale", "softcap", "softcap_bias"])
def test_score(score, on_kernels):
    compare(dataclasses.replace(SMALL, score=(score,), bias="alibi", seed=4), torch.float16, on_kernels)


@pytest.mark.parametrize("D,Dv", [(64, 64), (80, 96), (128, 128), (256, 256), (8, 200)])
def test_head_dims(D, Dv, on_kernels):
    compare(dataclasses.replace(SMALL, H=1, D=D, Dv=Dv, bias="alibi", causal=True, seed=5), torch.bfloat16, on_kernels)


@pytest.mark.parametrize("Nq,Nk", [(1, 130), (64, 64), (65, 63), (130, 20), (63, 257)])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_lengths(Nq, Nk, causal, on_kernels):
    compare(dataclasses.replace(SMALL, H=2, Nq=Nq, Nk=Nk, causal=causal, seed=6), torch.bfloat16, on_kernels)


@pytest.mark.parametrize("storage", ["bnhd", "padded", "expanded"])
def test_storage(storage, on_emulator):
    compare(dataclasses.replace(SMALL, B=2, H=4, Hk=2, Nq=66, Nk=66, storage=storage, rope="half", seed=7), torch.bfloat16, on_emulator)


@pytest.mark.parametrize("changes", [
    {"bias": "cable", "mask": "everything", "score": ("row_scale",)},
    {"bias": "fire", "mask": "segments", "region": "dual_chunk", "causal": True},
    {"bias": "dense_and_cable", "mask": "blocks", "score": ("softcap_bias",)},
    {"bias": "table_positions", "D": 136, "Dv": 136, "Nq": 40},
], ids=lambda c: c["bias"])  # fmt: skip
def test_several_extras_at_once(changes, on_kernels):
    compare(dataclasses.replace(SMALL, **{"Nk": 130, "D": 32, "rope": "half", "seed": 9} | changes), torch.bfloat16, on_kernels)


def test_nothing_outside_the_tensors_is_read(on_emulator):
    case = dataclasses.replace(SMALL, B=2, Nk=133, D=24, bias="cable", mask="everything", rope="half", storage="padded", seed=12)
    compare(case, torch.bfloat16, on_emulator, guard=True)
