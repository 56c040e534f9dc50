"""Golden cases in half precision through the CUDA kernels: numbers of the methods' original code."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

import pytest
import torch

import fastpe
from fastpe.testing import compare

FOLDER = pathlib.Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(FOLDER))
spec = importlib.util.spec_from_file_location("golden_cases", FOLDER / "test_golden.py")
GOLDEN = importlib.util.module_from_spec(spec)
spec.loader.exec_module(GOLDEN)


# Results with many entries; the gradient of a parameter has few.
MAIN = ("out", "lse", "dq", "dk", "dv")


@pytest.mark.parametrize("number", range(len(GOLDEN.CALLED)), ids=lambda i: GOLDEN.ids(GOLDEN.CALLED[i]))
def test_kernels(number, on_kernels):
    key = GOLDEN.CALLED[number]
    # One of the two types each: what differs between them is one instruction.
    dtype = (torch.bfloat16, torch.float16)[number % 2]
    case = GOLDEN.Golden(*key, dtype)
    with on_kernels():
        got = case(fastpe.attention)
    want = GOLDEN.Golden(*key, dtype, wide=True)(fastpe.reference.attention)
    own = GOLDEN.Golden(*key, dtype)(compare.eager_attention)
    for name, x in got.items():
        if GOLDEN.chosen(name, x, want[name]):
            continue
        compare.close_half(name, x, want[name], own[name], floor=GOLDEN.FLOOR, dtype=None if name in MAIN else dtype)
