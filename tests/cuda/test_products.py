"""Products with tables (`RowProduct`, `ColProduct`) on the CUDA kernels against the float64 definition: tables clipped and
unclipped, of all heads and of each, narrow and wide, forward and backward."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fastpe
from fastpe import bias as biases
from fastpe import reference
from fastpe.ops import _ARGS, _PLAIN, NEEDS
from fastpe.testing.cases import Case, build
from fastpe.testing.compare import close_half, eager_attention

BF16, FP16 = torch.bfloat16, torch.float16
# Three key tiles or more, the last one ragged.
SMALL = Case(B=1, H=2, Hk=1, Nq=70, Nk=150, D=16, Dv=16, lse_gradient=True)


@dataclasses.dataclass(frozen=True)
class Tables:
    """What the products of a call are with. M: offsets to either side; None: all there are."""

    d: int
    sides: str = "both"
    M: int | None = None
    by_head: bool = False
    index: str = "clamp"


INDEX = {
    "clamp": None,
    # A window of entries, none outside it and none for every fifth offset.
    "holes": lambda r: torch.where((r < -9) | (r > 60) | (r % 5 == 0), -1, (r + 9).clamp(0, 69)),
}


def call(case: Case, tables: Tables, dtype, wide=False):
    """The call of `case` with the bias of `tables`, whose tensors are leaves beside the case's own."""
    run = build(case, dtype, wide=wide)
    g = torch.Generator().manual_seed(case.seed + 1)
    reach = max(case.Nq, case.Nk) - 1 if tables.M is None else tables.M
    entries = 70 if tables.index == "holes" else 2 * reach + 1
    parts = []
    for what, n, kind in (("row", case.Nq, biases.RowProduct), ("col", case.Nk, biases.ColProduct)):
        if tables.sides not in ("both", what):
            continue
        x = torch.randn(case.B, case.H, n, tables.d, dtype=torch.float64, generator=g) * tables.d**-0.5
        e = torch.randn(*([case.H] if tables.by_head else []), entries, tables.d, dtype=torch.float64, generator=g)
        parts.append(kind(run.leaves(f"{what}_x", x), run.leaves(f"{what}_e", e), INDEX[tables.index]))
    extra = [] if run.kwargs["bias"] is None else [run.kwargs["bias"]]
    run.kwargs["bias"] = sum(parts[1:] + extra, parts[0])
    return run


def compare(case, tables, dtype, on_kernels, **options):
    want = call(case, tables, dtype, wide=True)(reference.attention)
    own = call(case, tables, dtype)(eager_attention)
    with on_kernels(**options):
        got = call(case, tables, dtype)(fastpe.attention)
    close_half("out", got[0], want[0], own[0], dtype=dtype)
    close_half("lse", got[1], want[1], own[1], floor=1.0, dtype=dtype)
    assert {"row_x", "row_e"} <= got[2].keys() or {"col_x", "col_e"} <= got[2].keys()
    for name, x in want[2].items():
        if x is not None:
            close_half(f"d {name}", got[2][name], x, own[2][name], floor=1e-2, dtype=dtype)
    return got


@pytest.mark.parametrize("changes,tables,dtype", [
    # Shaw: beyond 16 offsets one entry for whole tiles.
    ({"Nk": 260, "causal": True}, Tables(24, "row", M=16), BF16),
    ({"Nq": 150, "Nk": 150}, Tables(20, "both", M=3), FP16),
    # Transformer-XL: an entry for every distance.
    ({"causal": True, "bias": "dense_by_key"}, Tables(32, "row"), FP16),
    ({"rope": "half", "bias": "alibi"}, Tables(12, "both", by_head=True), BF16),
    ({"B": 2, "mask": "everything", "score": ("row_scale",)}, Tables(9, "col", M=20), BF16),
    ({"B": 2, "H": 4, "Hk": 2, "Nq": 66, "mask": "blocks", "storage": "bnhd"}, Tables(16, "col"), FP16),
    ({"score": ("softcap", "sink")}, Tables(1, "both", M=40, by_head=True), FP16),
    ({"score": ("softcap_bias",)}, Tables(17, "row", M=70), BF16),
    ({"causal": True}, Tables(16, "both", index="holes"), BF16),
    ({"region": "self_extend", "rope": "half", "causal": True}, Tables(16, "both", M=9), FP16),
    ({"bias": "table", "mask": "documents"}, Tables(16, "row", M=9), BF16),
    ({"bias": "forget_both_sides", "mask": "window_sinks"}, Tables(16, "row", M=9), BF16),
], ids=lambda x: x if isinstance(x, str) else None)  # fmt: skip
def test_products(changes, tables, dtype, on_kernels):
    compare(dataclasses.replace(SMALL, **{"seed": 1} | changes), tables, dtype, on_kernels)


@pytest.mark.parametrize("Nq,Nk", [(1, 130), (64, 64), (65, 63), (130, 20), (63, 257), (5, 1)])
def test_lengths(Nq, Nk, on_kernels):
    causal = Nq % 2 == 1
    compare(dataclasses.replace(SMALL, Nq=Nq, Nk=Nk, causal=causal, seed=2), Tables(16, M=None if Nq < 65 else 30), BF16, on_kernels)


@pytest.mark.parametrize("D,d", [(64, 64), (96, 100), (128, 72), (256, 256)])
def test_head_dims(D, d, on_kernels):
    compare(dataclasses.replace(SMALL, H=1, D=D, Dv=D, Nq=40, seed=3), Tables(d), BF16, on_kernels)


def test_splits_of_the_keys(on_kernels):
    compare(dataclasses.replace(SMALL, Nq=3, Nk=700, causal=True, seed=4), Tables(16, M=50), BF16, on_kernels)


def test_rows_without_keys(on_kernels):
    case = dataclasses.replace(SMALL, Nq=100, Nk=30, causal=True, seed=5)
    out, lse, grads = compare(case, Tables(8), BF16, on_kernels)
    assert (out[:, :, :70] == 0).all() and torch.isneginf(lse[:, :, :70]).all() and (grads["row_x"][:, :, :70] == 0).all()


@pytest.mark.parametrize("changes", [{"mask": "everything", "B": 2, "H": 1}, {"D": 136, "Dv": 136, "Nq": 40, "region": "dual_chunk", "causal": True, "H": 1}], ids=["masked", "wide"])
def test_several_extras_at_once(changes, on_kernels):
    compare(dataclasses.replace(SMALL, **{"Nk": 130, "rope": "half", "seed": 6} | changes), Tables(16, M=40), BF16, on_kernels)


def test_nothing_outside_the_tensors_is_read(on_emulator):
    case = dataclasses.replace(SMALL, B=2, Nq=67, Nk=133, storage="padded", seed=7)
    compare(case, Tables(13, by_head=True), BF16, on_emulator, guard=True)
    compare(case, Tables(13, M=2), FP16, on_emulator, guard=True)


def test_broadcast_vectors_get_no_gradient_from_the_op(on_emulator):
    """The op writes gradients for every batch entry and head; a broadcast tensor has no room for them."""
    q, x, e = torch.randn(2, 2, 4, 8).bfloat16(), torch.randn(1, 1, 4, 8), torch.randn(1, 7, 8)
    given = {"bias_row_q": x, "bias_row_e": e, "bias_index": torch.arange(7, dtype=torch.int32)}
    plain = {"scale": 0.25, "block_q": 1, "block_k": 1, "softcap_bias": False}
    rest = [given.get(n, plain.get(n, 0 if n in _PLAIN else None)) for n in _ARGS[3:-1]]
    with on_emulator():
        out, lse, _ = torch.ops.fastpe.attn_fwd(q, q, q, *rest, False)
        with pytest.raises(RuntimeError, match="bias_row_q must be of shape"):
            torch.ops.fastpe.attn_bwd(q, None, q, q, q, out, lse, None, *rest, NEEDS["bias_row_q"])
