"""The kernels of contextual positions, executed by the emulator or a GPU, against the float64 definition."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import sys

import pytest
import torch

import fastpe
from fastpe import bias
from fastpe.testing import compare

# The calls are those of the CPU kernels' tests.
FILE = pathlib.Path(__file__).parents[1] / "python" / "test_cope.py"
spec = importlib.util.spec_from_file_location("cope_cases", FILE)
calls = importlib.util.module_from_spec(spec)
sys.modules["cope_cases"] = calls  # dataclasses look their module up
spec.loader.exec_module(calls)
Case, VARIANTS = calls.Case, calls.VARIANTS

# Three key tiles, the last one ragged.
SMALL = Case(H=1, Nq=70, Nk=150, Dv=16)


def check(case, dtype, on_kernels, **options):
    x = calls.inputs(case, dtype)
    with on_kernels(**options):
        got = calls.run(case, x)
    want = calls.run(case, calls.wide(x), fastpe.reference.attention)
    own = calls.run(case, x, compare.eager_attention)
    for what, w in want.items():
        compare.close_half(what, got[what], w, own[what], floor=0.1, dtype=dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_variants(variant, dtype, on_kernels):
    check(dataclasses.replace(SMALL, variant=variant, H=2), dtype, on_kernels)


@pytest.mark.parametrize("npos", [1, 2, 64, 151])
def test_table_lengths(npos, on_kernels):
    """Saturated rows and rows that never are."""
    check(dataclasses.replace(SMALL, npos=npos, variant="keys" if npos == 2 else "default"), torch.bfloat16, on_kernels)


@pytest.mark.parametrize("variant", ["default", "values", "per_row"])
@pytest.mark.parametrize("mask", ["window", "window_sinks", "documents", "padding", "left_padding", "dense"])
def test_masks(variant, mask, on_kernels):
    check(dataclasses.replace(SMALL, variant=variant, B=2, mask=mask, rope=variant != "default", sink=True), torch.float16, on_kernels)


@pytest.mark.parametrize("Nq,Nk", [(1, 130), (64, 64), (65, 63), (150, 20), (200, 200)])
@pytest.mark.parametrize("variant", ["default", "per_row"])
def test_lengths(Nq, Nk, variant, on_kernels):
    """Empty rows among them."""
    check(dataclasses.replace(SMALL, variant=variant, Nq=Nq, Nk=Nk, npos=20), torch.bfloat16, on_kernels)


@pytest.mark.parametrize("D,Dv", [(64, 64), (72, 96), (128, 40), (136, 256)])
@pytest.mark.parametrize("variant", ["default", "keys", "per_row"])
def test_head_dims(D, Dv, variant, on_kernels):
    # As many tokens as make two tiles each: with many channels a product takes long here.
    check(dataclasses.replace(SMALL, variant=variant, D=D, Dv=Dv, Nq=30, Nk=90, npos=12), torch.bfloat16, on_kernels)


@pytest.mark.parametrize("variant", ["keys", "per_row"])
def test_heads_and_storage(variant, on_kernels):
    check(dataclasses.replace(SMALL, variant=variant, B=2, H=4, Hk=2, Nq=66, Nk=66, storage="bnhd", rope=True), torch.bfloat16, on_kernels)


def test_scales(on_kernels):
    more = (("temperature", 0.7), ("scale", 0.4), ("head_scale", 1.3))
    for variant in ("default", "per_row"):
        check(dataclasses.replace(SMALL, variant=variant, more=more), torch.bfloat16, on_kernels)


@pytest.mark.parametrize("case", [Case(sharp=20.0, npos=12), Case("per_row", sharp=5.0)], ids=lambda c: c.variant)
def test_sharp_gates(case, on_kernels):
    check(dataclasses.replace(case, H=1, Nq=130, Nk=130, Dv=16), torch.bfloat16, on_kernels)


def test_no_tokens(on_kernels):
    for case in (Case(Nq=3, Nk=0), Case(Nq=0, Nk=5)):
        check(case, torch.bfloat16, on_kernels)


def arguments(call):
    """The op's arguments in a call of the CPU kernels."""
    caught = []
    real = torch.ops.fastpe.cope_fwd
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.fastpe, "cope_fwd", lambda *args: caught.append(args) or real(*args))
        call()
    return tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in caught[0])


@pytest.mark.parametrize("case", [
    Case(npos=40, mask="window_sinks", sink=True, rope=True), Case("keys", npos=6, mask="documents"), Case("per_row", mask="dense", rope=True),
    Case("values", D=96, Nq=40, Nk=80),
], ids=lambda c: c.variant)  # fmt: skip
def test_several_extras_at_once(case, on_kernels):
    check(dataclasses.replace(case, H=1, Nq=min(case.Nq, 66), Nk=min(case.Nk + 60, 130)), torch.bfloat16, on_kernels)


@pytest.mark.parametrize("variant", ["keys", "per_row"])
def test_nothing_outside_the_tensors_is_read(variant, on_emulator):
    case = Case(variant, B=2, H=2, Nq=70, Nk=133, D=24, npos=11, mask="dense", rope=True, sink=True, storage="bnhd")
    check(case, torch.bfloat16, on_emulator, guard=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_carries_are_those_of_the_cpu(variant, on_kernels):
    """Counts to the right of every tile, as the backward pass of either could take them."""
    case = dataclasses.replace(SMALL, variant=variant, npos=200)
    x = calls.inputs(case, torch.bfloat16)
    args = arguments(lambda: calls.call(case, {name: t.requires_grad_() for name, t in x.items()}))
    want = torch.ops.fastpe.cope_fwd(*args)
    with on_kernels():
        got = torch.ops.fastpe.cope_fwd(*args)
    assert got[2].shape == want[2].shape
    rows = [slice(0, 64), slice(0, case.Nq - 64)]
    for block, at in enumerate(rows):
        counts = [x[2][:, :, block, :, :, at].double().sum(3) for x in (got, want)]
        compare.close(f"block {block}", *counts, 1e-5, floor=1.0)


@pytest.mark.parametrize("variant", ["default", "keys", "per_row"])
def test_parts_of_the_gradient(variant, on_emulator):
    """Each input's gradient alone is, to the bit, the one computed with all the others."""
    case = dataclasses.replace(SMALL, variant=variant, Nk=130)
    x = calls.inputs(case, torch.bfloat16)
    with on_emulator():
        want = calls.run(case, x)
        for what in x:
            some = {n: t.detach().clone().requires_grad_(n == what) for n, t in x.items()}
            out, lse = calls.call(case, some)
            g = torch.Generator().manual_seed(7)
            dout = torch.randn(out.shape, dtype=torch.float64, generator=g).bfloat16().to(out.dtype)
            dlse = torch.randn(lse.shape, dtype=torch.float64, generator=g).float().to(lse.dtype)
            ((out * dout).sum() + (lse * dlse).sum()).backward()
            assert torch.equal(some[what].grad, want[what]), what


def test_long_counts(on_kernels):
    """Counts in the thousands stay exact to float32's own rounding. Sums of tiles in float32 alone would miss by 8.7e-3: every
    tile is rounded the same way."""
    n = 8192
    q, k = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16), torch.zeros(1, 1, n, 8, dtype=torch.bfloat16)
    q[..., 0], k[..., 0] = 1.0, 1.75
    args = arguments(lambda: fastpe.attention(q, k, k.requires_grad_(), bias=bias.Cope(torch.zeros(8, n + 1)), is_causal=True))
    with on_kernels():
        carry = torch.ops.fastpe.cope_fwd(*args)[2]
    gate = torch.sigmoid(torch.tensor(1.75 * 8**-0.5, dtype=torch.float64))
    right = torch.arange(n // 64 - 1, -1, -1) * 64 * gate
    difference = carry[0, 0, 0, :, :, 0].double().sum(1) - right
    assert difference.abs().max() < 2e-3, difference


@pytest.mark.parametrize("variant", ["default", "per_row"])
def test_nan_and_inf_stay_in_their_rows(variant, on_kernels):
    case = Case(variant, H=1, Hk=1, Nq=100, Nk=100, npos=300)
    x = calls.inputs(case, torch.bfloat16)
    with on_kernels():
        clean, _ = calls.call(case, x)
        x["query"][0, 0, 40, 3] = torch.nan
        if variant == "per_row":
            x["gate_queries"][0, 0, 40, 3] = torch.nan
        x["key"][0, 0, 90, 2] = torch.inf
        out, _ = calls.call(case, x)
    assert out[0, 0, 40].isnan().all()
    rows = [i for i in range(90) if i != 40]
    torch.testing.assert_close(out[0, 0, rows], clean[0, 0, rows], rtol=0, atol=0)


def test_errors(on_emulator):
    case = Case(Nq=4, Nk=4)
    with pytest.raises(RuntimeError, match="fastpe.cope_fwd: the CUDA kernels take bfloat16 and float16, got float32"), on_emulator():
        calls.call(case, calls.inputs(case, torch.float32))
