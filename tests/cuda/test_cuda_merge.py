"""Merging on the CUDA kernels against the float64 definition, with gradients."""

from __future__ import annotations

import importlib.util
import pathlib

import pytest
import torch

import fastpe
from fastpe.testing import compare

spec = importlib.util.spec_from_file_location("merge_cases", pathlib.Path(__file__).parents[1] / "python" / "test_merge.py")
CASES = importlib.util.module_from_spec(spec)
spec.loader.exec_module(CASES)


@pytest.mark.parametrize("P,n,storage,weights", [(3, 65, "bhnd", (0.3, 1.0, 2.0)), (3, 5, "bnhd", None), (32, 6, "bhnd", None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_definition(dtype, P, n, storage, weights, on_kernels):
    outs, lses = CASES.parts(P=P, N=n, dtype=dtype, storage=storage)
    with on_kernels():
        got = CASES.gradients(fastpe.merge, outs, lses, weights, dtype)
    want = CASES.gradients(fastpe.reference.merge, [x.double() for x in outs], [x.double() for x in lses], weights, dtype)
    for name, x in got.items():
        compare.close(name, x, want[name], 4e-6 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps / 2 * 1.02)
    assert (got["lse"][..., 2] == -torch.inf).all() and not got["out"][..., 2, :].any()


def test_too_many_parts_are_refused(on_kernels):
    outs, lses = CASES.parts(P=33, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="at most 32 parts at once, got 33"), on_kernels():
        fastpe.merge(outs, lses)
