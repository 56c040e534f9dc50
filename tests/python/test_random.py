"""Whole random calls against the definition, in every dtype."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st

import fastpe
from fastpe.testing import cases, compare
from fastpe.testing.cases import Case, build

# Around the edges of tiles, and the degenerate ones.
LENGTHS = (0, 1, 2, 7, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 200)


@st.composite
def calls(draw):
    Hk = draw(st.sampled_from((1, 1, 2)))
    region = draw(st.sampled_from(("none", "none", *sorted(cases.REGIONS))))
    case = Case(
        B=draw(st.sampled_from((1, 1, 2, 3))),
        H=Hk * draw(st.sampled_from((1, 2, 3))),
        Hk=Hk,
        Nq=draw(st.sampled_from(LENGTHS)),
        Nk=draw(st.sampled_from(LENGTHS)),
        D=draw(st.sampled_from((8, 16, 24, 64))),
        Dv=draw(st.sampled_from((8, 16, 40))),
        bias=draw(st.sampled_from(sorted(cases.BIASES | cases.LONG_BIASES))),
        mask=draw(st.sampled_from(sorted(cases.MASKS | cases.LONG_MASKS))),
        rope=draw(st.sampled_from(sorted(cases.ROPES) if region == "none" else ("half", "interleaved", "partial"))),
        region=region,
        score=tuple(draw(st.lists(st.sampled_from(sorted(cases.SCORE)), unique=True, max_size=3))),
        causal=draw(st.booleans()),
        storage=draw(st.sampled_from(cases.STORAGE)),
        lse_gradient=draw(st.booleans()),
        seed=draw(st.integers(0, 10**6)),
    )
    assume(case.region != "key_set_continual" or case.Nk > 0)
    assume(case.Nq <= case.Nk or (case.bias not in cases.NEEDS_KEYS and case.mask not in cases.NEEDS_KEYS_MASK))
    return case


def check(case: Case, dtype: torch.dtype) -> None:
    got = build(case, dtype)(fastpe.attention)
    want = build(case, dtype, wide=True)(fastpe.reference.attention)
    half = dtype not in compare.TOLERANCE
    own = build(case, dtype)(compare.eager_attention) if half else want

    def same(what, x, y, z, tolerance, floor=1.0):
        if x is None or y is None:
            assert (x is None or not x.any()) and (y is None or not y.any()), what
        elif half:
            compare.close_half(what, x, y, z, floor=floor, dtype=dtype, drawn=True)
        else:
            compare.close(what, x, y, tolerance, floor=floor)

    forward, backward = compare.TOLERANCE.get(dtype, (0, 0))
    same("out", got[0], want[0], own[0], forward)
    same("lse", got[1], want[1], own[1], forward)
    # A parameter's gradient sums terms weighted by distances of up to the length (a power's: times their logarithm); where
    # they cancel, this is its scale.
    longest = float(max(case.Nq, case.Nk, 1))
    if "power" in case.bias:
        longest *= 1 + math.log(longest)
    for name, g in got[2].items():
        same(name, g, want[2][name], own[2][name], backward, 1.0 if name in ("query", "key", "value") else longest)


COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": False, "database": None}
# Calls in a whole run of this file's drawn tests: at least 2,000. Parts, so that the workers of a run share them.
PARTS, EXAMPLES = 4, {torch.float64: 130, torch.float32: 200, torch.bfloat16: 110, torch.float16: 65}
assert PARTS * sum(EXAMPLES.values()) >= 2000


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("dtype", EXAMPLES, ids=lambda x: str(x).removeprefix("torch."))
def test_calls(dtype, part):
    made = 0

    @seed(part)
    @settings(max_examples=EXAMPLES[dtype], **COMMON)
    @given(calls())
    def drawn(case):
        nonlocal made
        check(case, dtype)
        made += 1

    drawn()
    assert made >= EXAMPLES[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=8, derandomize=True, **COMMON)
@given(case=calls())
def test_other_isas(dtype, isa, case):
    check(case, dtype)


@pytest.mark.parametrize("D, Dv", [(8, 256), (256, 8), (256, 256), (72, 120), (128, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_sizes(D, Dv, dtype, isa):
    check(Case(B=1, H=2, Hk=1, Nq=70, Nk=131, D=D, Dv=Dv, bias="alibi", causal=True, rope="half"), dtype)
