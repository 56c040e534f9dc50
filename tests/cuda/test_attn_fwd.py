"""The sm_80 forward kernel, executed by the emulator or a GPU, against the float64 definition."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from agree import compare_forward as compare
from emulated import SCHEDULES

import fastpe
from fastpe.ops import _ARGS, _PLAIN
from fastpe.testing.cases import BIASES, LONG_BIASES, LONG_MASKS, MASKS, NEEDS_KEYS, NEEDS_KEYS_MASK, ROPES, SCORE, STORAGE, Case, build
from fastpe.testing.compare import error

# attn_fwd's arguments after q, k and v, of a call without any extras.
PLAIN = [{"scale": 0.25, "block_q": 1, "block_k": 1, "softcap_bias": False}.get(n, 0 if n in _PLAIN else None) for n in _ARGS[3:-1]]
# Three key tiles, the last one ragged.
SMALL = Case(B=1, H=1, Hk=1, Nq=70, Nk=150, D=16, Dv=16)
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("bias", BIASES | LONG_BIASES)
def test_bias(bias, causal, on_kernels):
    compare(dataclasses.replace(SMALL, bias=bias, causal=causal, seed=1), torch.bfloat16, on_kernels)


@pytest.mark.parametrize("bias", ["none", "cable"])
@pytest.mark.parametrize("mask", MASKS | LONG_MASKS)
def test_mask(mask, bias, on_kernels):
    compare(dataclasses.replace(SMALL, B=2, bias=bias, mask=mask, seed=2), torch.float16, on_kernels)


@pytest.mark.parametrize("layout_case", [(16, "half"), (24, "interleaved"), (40, "partial"), (64, "positions"), (8, "half")], ids=str)
def test_rope(layout_case, on_kernels):
    D, rope = layout_case
    assert rope in ROPES
    compare(dataclasses.replace(SMALL, H=2, D=D, rope=rope, bias="alibi", causal=True, seed=3), torch.bfloat16, on_kernels)


@pytest.mark.parametrize("score", [*((s,) for s in SCORE), ("softcap", "sink", "row_scale")], ids="+".join)
def test_score(score, on_kernels):
    compare(dataclasses.replace(SMALL, score=score, bias="t5", seed=4), torch.float16, on_kernels)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("D,Dv", [(64, 64), (80, 96), (96, 40), (128, 128), (256, 256), (8, 200), (136, 72)])
def test_head_dims(D, Dv, dtype, on_kernels):
    compare(dataclasses.replace(SMALL, H=1, D=D, Dv=Dv, bias="kerple_log", causal=True, seed=5), HALF[dtype], on_kernels)


@pytest.mark.parametrize("Nq,Nk", [(1, 1), (1, 130), (64, 64), (65, 63), (130, 20), (129, 129), (63, 257), (5, 0), (0, 5)])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("bias", ["none", "alibi"])
def test_lengths(Nq, Nk, bias, causal, on_kernels):
    case = dataclasses.replace(SMALL, H=2, Nq=Nq, Nk=Nk, bias=bias, causal=causal, seed=6)
    if Nq and Nk:
        compare(case, torch.bfloat16, on_kernels)
        return
    run = build(case, torch.bfloat16)
    with torch.no_grad(), on_kernels():
        out, lse, _ = run(fastpe.attention, backward=False)
    assert (out == 0).all() and torch.isneginf(lse).all()


@pytest.mark.parametrize("storage", STORAGE)
def test_storage(storage, on_kernels):
    compare(dataclasses.replace(SMALL, B=2, H=4, Hk=2, storage=storage, rope="half", seed=7), torch.bfloat16, on_kernels)


def test_every_bias_and_mask_without_keys_goes_with_more_queries_than_keys(on_emulator):
    for bias in ("alibi", "t5", "fn_power"):
        assert bias not in NEEDS_KEYS
        compare(dataclasses.replace(SMALL, Nq=150, Nk=70, bias=bias, mask="window_both", seed=8), torch.float16, on_emulator)
    assert "ids" not in NEEDS_KEYS_MASK


@pytest.mark.parametrize("D", [64, 96])
def test_several_extras_at_once(D, on_kernels):
    compare(dataclasses.replace(SMALL, Nq=90, D=D, Dv=D, bias="table", mask="everything", rope="half", score=("sink",), seed=9), torch.bfloat16, on_kernels)


@pytest.mark.parametrize("bias,mask,storage", [("cable", "everything", "bhnd"), ("t5", "dense", "bnhd"), ("fn_log", "ids", "padded"), ("alibi", "window_sinks", "bhnd")])
def test_nothing_outside_the_tensors_is_read(bias, mask, storage, on_emulator):
    case = dataclasses.replace(SMALL, B=2, Nq=67, Nk=133, D=24, bias=bias, mask=mask, rope="half", storage=storage, score=("row_scale", "sink"), seed=12)
    compare(case, torch.bfloat16, on_emulator, guard=True)


def test_no_bank_conflicts(emu, on_emulator):
    for D in (64, 96, 128, 256):
        emu.counters()
        compare(dataclasses.replace(SMALL, H=1, D=D, Dv=D, Nq=16, seed=10), torch.bfloat16, on_emulator)
        counted = emu.counters()
        assert counted["extra_wavefronts"] == 0 and counted["mma"] > 0


@pytest.mark.parametrize("bias", ["alibi", "forget", "kerple_log", "sandwich"])
def test_decayed_tiles_are_skipped_within_the_bound(bias, on_emulator):
    case = dataclasses.replace(SMALL, H=1, Nq=64, Nk=640, bias=bias, causal=True, seed=11)
    run = build(case, torch.bfloat16)
    if bias == "alibi":
        run.kwargs["bias"] = fastpe.bias.Alibi(torch.tensor([0.5]))
    if bias == "forget":
        run.kwargs["bias"] = fastpe.bias.Forget(torch.full((1, 1, 640), -0.5))
    results = []
    for bound in (0.0, 2.0**-12):
        torch.ops.fastpe_emu.tile_counts()
        with torch.no_grad(), fastpe.config.skip_bound(bound), on_emulator(**SCHEDULES[0]):
            out, lse, _ = run(fastpe.attention, backward=False)
        results.append((out, lse, *torch.ops.fastpe_emu.tile_counts()))
    (exact, exact_lse, all_tiles, none), (out, lse, visited, skipped) = results
    assert none == 0 and visited + skipped == all_tiles == 10
    assert error(lse, exact_lse) <= 2.0**-11
    assert error(out, exact) <= 2.0**-7
    if bias in ("alibi", "forget"):
        assert skipped >= 5


def test_residual_is_what_rounding_took(on_emulator, emu):
    run = build(dataclasses.replace(SMALL, bias="none"), torch.bfloat16)
    q, k, v = run.qkv
    with torch.no_grad():
        out, _, residual = torch.ops.fastpe_emu.attn_fwd(q, k, v, *PLAIN, True)
        exact, _, _ = torch.ops.fastpe.attn_fwd(q.double(), k.double(), v.double(), *PLAIN, False)
    assert error(out.double() + residual.double(), exact) < 0.6 * error(out, exact)


@pytest.mark.parametrize("Nq,Nk,bias,mask,score", [(9, 700, "alibi", "none", ()), (11, 1100, "t5", "left_padding", ("sink",)), (20, 600, "dense", "window_sinks", ("sink", "row_scale")), (2, 520, "rows_clipped", "ids", ())])
def test_splits_of_the_keys(Nq, Nk, bias, mask, score, on_kernels, emu, on_emulator):
    case = dataclasses.replace(SMALL, B=2, H=2, Nq=Nq, Nk=Nk, D=24, Dv=40, bias=bias, mask=mask, score=score, rope="half", causal=True, seed=13)
    compare(case, torch.bfloat16, on_kernels)
    emu.counters()
    compare(case, torch.bfloat16, on_emulator, **SCHEDULES[0])
    assert emu.counters()["blocks"] > 2 * 2 * case.B * case.H


def test_nan_comes_through_a_split_that_sees_nothing_else(on_kernels):
    q, k, v = (torch.randn(1, 1, n, 16, dtype=torch.bfloat16) for n in (12, 1024, 1024))
    k[:, :, 512:] = torch.nan
    with torch.no_grad(), on_kernels():
        out, lse = fastpe.attention(q, k, v, return_lse=True)
    assert out.isnan().all() and lse.isnan().all()


def test_splits_keep_the_residual(on_emulator):
    run = build(dataclasses.replace(SMALL, Nq=2, Nk=600), torch.bfloat16)
    q, k, v = run.qkv
    with torch.no_grad(), on_emulator():
        out, _, residual = torch.ops.fastpe.attn_fwd(q, k, v, *PLAIN, True)
    exact, _, _ = torch.ops.fastpe.attn_fwd(q.double(), k.double(), v.double(), *PLAIN, False)
    assert error(out.double() + residual.double(), exact) < 0.6 * error(out, exact)
