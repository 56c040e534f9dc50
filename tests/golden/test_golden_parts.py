"""Golden files of what stands beside fastpe.attention, each through its own public function: the definition in float64, then
the kernels in every dtype and ISA."""

from __future__ import annotations

import golden_files as golden
import golden_table as table
import pytest
import torch

import fastpe
from fastpe._load import _C
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


CALLS = {"chunk_lse_merge": merge}
CASES = [(stem, case) for stem in CALLS if stem in golden.stems() for case in golden.case_names(stem)]


def test_table_names_this_file():
    assert set(CALLS) == table.OTHER_FILES


@pytest.mark.parametrize("key", CASES, ids=ids)
def test_definition(key, record_property):
    a = golden.load(*key)
    for name, x in CALLS[key[0]](a, torch.float64, fastpe.reference).items():
        compare.close(name, x, a[name], 1e-10)
    record_property("golden", (*key, "definition"))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("key", CASES, ids=ids)
def test_kernels(key, dtype, isa, record_property):
    a = golden.load(*key)
    run = CALLS[key[0]]
    got = run(a, dtype, fastpe)
    want = a if dtype in compare.TOLERANCE else run(a, dtype, fastpe.reference)
    for name, x in got.items():
        forward, backward = compare.TOLERANCE.get(dtype, (rounding(dtype),) * 2)
        if x.dtype == torch.float32:
            forward, backward = compare.TOLERANCE[torch.float32]
        compare.close(name, x, want[name], backward if name.startswith("d") else forward)
    record_property("golden", (*key, f"{ids(dtype)} {isa}"))
