"""Golden files of what stands beside fastpe.attention, each through its own public function: the definition in float64, then
the kernels in every dtype and ISA."""

from __future__ import annotations

import golden_files as golden
import golden_table as table
import pytest
import torch

import fastpe
from fastpe._load import _C
from fastpe._reference_parts import grouped_softmax_attention
from fastpe.testing import compare

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def ids(key):
    return "/".join(key) if isinstance(key, tuple) else str(key).removeprefix("torch.")


@pytest.fixture(params=_C.available_isas())
def isa(request):
    before = _C.current_isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def wide(dtype):
    """The dtype of lse and of the results of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounding(dtype):
    """One rounding to a half precision."""
    return torch.finfo(dtype).eps / 2 * 1.01


def merge(a, dtype, of):
    outs, lses = a["o_p"].to(dtype), a["lse_p"].to(wide(dtype))
    if of is fastpe.reference:
        outs, lses = outs.double(), lses.double()
    outs, lses = outs.requires_grad_(), lses.requires_grad_()
    out, lse = of.merge(outs, lses)
    seen = lse > -torch.inf
    dout, dlse = a["do"].to(dtype).to(out.dtype), a["dlse"].to(wide(dtype)).to(lse.dtype)
    ((out * dout).sum() + (lse * dlse)[seen].sum()).backward()
    return {"out": out, "lse": lse, "do_p": outs.grad, "dlse_p": lses.grad}


def landmark(a, dtype, of):
    q, k, v = (a[name].to(dtype) for name in "qkv")
    if of is fastpe.reference:
        q, k, v = q.double(), k.double(), v.double()
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    rope = fastpe.Rope(a["inv_freq"], layout="interleaved" if a["case"] == "partial" else "half")
    if of is compare:
        turned = (fastpe.reference.apply_rotary(x, rope).to(dtype) for x in (q, k))
        out, lse = grouped_softmax_attention(*turned, v, a["is_landmark"], softmax_dtype=torch.float32)
    else:
        out, lse = of.landmark_attention(q, k, v, a["is_landmark"], rope=rope, return_lse=True)
    (out * a["do"].to(dtype).to(out.dtype)).sum().backward()
    return {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}


def keymass(a, dtype, of):
    """Column sums, the scores of Finch, SnapKV and HOMER, what H2O keeps."""
    q, k = (a[name].to(dtype) for name in "qk")
    if of is fastpe.reference:
        q, k = q.double(), k.double()
    call = {"rope": fastpe.Rope(a["inv_freq"]), "is_causal": True}
    _, lse = of.attention(q, k, k, **call, return_lse=True)
    N, W = q.shape[2], a["W"]
    colsum = of.attention_mass(q, k, lse, **call)
    heavy, recent = int(a["heavy_ratio"] * N), int(a["recent_ratio"] * N)
    kept = fastpe.recipes.h2o_keep(colsum, heavy, recent)
    slot = torch.arange(N + 1)
    next_mask = torch.nn.functional.pad(kept & (slot[:N] < N - recent), (0, 1)) | (slot > N - recent)
    found = {"colsum": colsum, "h2o_scores": torch.where(kept, colsum, 0)[0], "h2o_next_mask": next_mask[:, :, None].to(lse.dtype)}
    if of is fastpe.reference:
        # As the original counts the keys of a row.
        counted = torch.arange(N - W, N, dtype=torch.float64)[:, None]
        p = of.attention_rows(q, k, rows=W, **call)
        return found | {
            "finch": (p * counted).mean(2)[..., : N - W],
            "snapkv": p.mean(2)[..., : N - W],
            "homer_sig": of.attention_rows(q, k, rows=1, logits=True, **call).amax(1)[:, 0],
        }
    calibrated = fastpe.recipes.homer_significance(q, k, a["homer_calibration"], **call)[0]
    # The release never drops the first tokens.
    least = [j for j in calibrated.argsort().tolist() if j > 2 or j in a["homer_removed"]]
    return found | {
        "finch": fastpe.recipes.finch_scores(q, k, lse, W, **call),
        "snapkv": fastpe.recipes.snapkv_scores(q, k, lse, W, **call),
        "homer_sig": fastpe.recipes.homer_significance(q, k, **call),
        "homer_removed": torch.tensor(least[: len(a["homer_removed"])]),
    }


CALLS = {"chunk_lse_merge": merge, "chunk_landmark": landmark, "chunk_keymass": keymass}
# The score of a half precision call moves with the rounding of its turned operands; what is kept may then differ.
NO_EAGER = {"chunk_lse_merge", "chunk_keymass"}
CASES = [(stem, case) for stem in CALLS if stem in golden.stems() for case in golden.case_names(stem)]


def load(key):
    return golden.load(*key) | {"case": key[1]}


def test_table_names_this_file():
    assert {*CALLS, "chunk_landmark_cache"} == table.OTHER_FILES


@pytest.mark.parametrize("key", CASES, ids=ids)
def test_definition(key, record_property):
    a = load(key)
    for name, x in CALLS[key[0]](a, torch.float64, fastpe.reference).items():
        compare.close(name, x, a[name], 1e-10)
    record_property("golden", (*key, "definition"))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("key", CASES, ids=ids)
def test_kernels(key, dtype, isa, record_property):
    a = load(key)
    run = CALLS[key[0]]
    got = run(a, dtype, fastpe)
    want = a if dtype in compare.TOLERANCE else run(a, dtype, fastpe.reference)
    own = run(a, dtype, compare) if dtype not in compare.TOLERANCE and key[0] not in NO_EAGER else {}
    for name, x in got.items():
        if name == "homer_removed" and dtype not in compare.TOLERANCE:
            continue
        if name in own:
            compare.close_half(name, x, want[name], own[name], floor=0.1)
            continue
        forward, backward = compare.TOLERANCE.get(dtype, (rounding(dtype),) * 2)
        if x.dtype == torch.float32:
            forward, backward = compare.TOLERANCE[torch.float32]
        if key[0] == "chunk_keymass" and dtype == torch.bfloat16:
            if name.startswith("h2o"):
                continue
            forward = 8 * rounding(dtype)
        if not x.is_floating_point():
            assert torch.equal(x, a[name]), name
            continue
        compare.close(name, x, want[name], backward if name.startswith("d") else forward)
    record_property("golden", (*key, f"{ids(dtype)} {isa}"))


RETRIEVALS = [case for case in golden.case_names("chunk_landmark_cache")] if "chunk_landmark_cache" in golden.stems() else []


def retrieval(a, dtype, of):
    """The numbers of `dtype`, computed in `of`."""
    q, k, v, k_cache, v_cache = (a[name].to(dtype).to(of) for name in ("q", "k", "v", "k_cache", "v_cache"))
    return fastpe.landmark_retrieval(
        q, k, v, a["is_landmark_current"], k_cache, v_cache, block=a["mem_freq"] + 1, top_k=a["top_k"],
        rope=fastpe.Rope(a["inv_freq"]), return_selected=True,
    )  # fmt: skip


def close_retrieval(out, selected, want, exact, dtype):
    """Half precision may choose other blocks, since its inputs are rounded: rows that chose the same are compared."""
    same = (selected == exact).all(-1)
    assert same.double().mean() >= 0.9
    # Products of rounded keys, of rounded P, and the result: a few roundings.
    compare.close("out", out[same], want[same], 4 * rounding(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("case", RETRIEVALS)
def test_landmark_cache(case, dtype, isa, record_property):
    a = golden.load("chunk_landmark_cache", case)
    out, selected = retrieval(a, dtype, dtype)
    if dtype in compare.TOLERANCE:
        assert torch.equal(selected[0], a["selected"])
        compare.close("out", out, a["out"], compare.TOLERANCE[dtype][0])
    else:
        close_retrieval(out, selected, *retrieval(a, dtype, torch.float64), dtype)
    record_property("golden", ("chunk_landmark_cache", case, f"{ids(dtype)} {isa}"))
