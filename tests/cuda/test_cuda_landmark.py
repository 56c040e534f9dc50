"""The sm_80 landmark kernels, executed by the emulator or a GPU, against the float64 definition."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import sys

import pytest
import torch
from emulated import SCHEDULES

import fastpe
from fastpe.testing import compare

TESTS = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "golden"))


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CPU = load("landmark_cases", TESTS / "python" / "test_landmark.py")
GOLDEN = load("golden_parts_cases", TESTS / "golden" / "test_golden_parts.py")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Blocks(CPU.Case):
    """Blocks of the given lengths, landmark included, over and over."""

    lengths: tuple[int, ...] = ()

    def landmarks(self):
        marks, at = torch.zeros(self.Nk, dtype=torch.bool), -1
        while self.lengths:
            for n in self.lengths:
                at += n
                if at >= self.Nk:
                    return marks
                marks[at] = True
        return marks


CASES = CPU.CASES | {
    "dense_marks": dataclasses.replace(CPU.CASES["dense_marks"], B=2),
    "no_room": Blocks(lengths=(65, 1), H=1, Hk=1, Nq=300, Nk=300, rope="half"),
    "long_and_short": Blocks(lengths=(3, 150, 2, 20, 70, 64, 1), B=1, H=2, Hk=1, Nq=330, Nk=330, padding=True),
    "long_offset": Blocks(lengths=(100,), H=2, Hk=1, Nq=70, Nk=333, rope="half", storage="bnhd"),
}
PADDED = Blocks(lengths=(3, 90, 2, 20, 1), B=2, H=2, Hk=1, Nq=66, Nk=135, padding=True, rope="half")


def check(case, dtype, on_kernels, **options):
    leaves = CPU.inputs(case, dtype)
    with on_kernels(**options):
        got = CPU.run(fastpe.landmark_attention, case, leaves, dtype)
    want = CPU.run(fastpe.reference.landmark_attention, case, [x.detach().double().requires_grad_() for x in leaves], dtype)
    own = CPU.run(CPU.eager, case, [x.detach().requires_grad_() for x in leaves], dtype)
    for what, x in got.items():
        compare.close_half(what, x, want[what], own[what], floor=0.1, dtype=dtype)
    empty = want["lse"] == -torch.inf
    assert not got["out"][empty].any() and not got["dq"][empty].any()


# One of the two types each: what differs between them is one instruction.
@pytest.mark.parametrize("name", CASES)
def test_definition(name, on_kernels):
    check(CASES[name], list(HALF.values())[list(CASES).index(name) % 2], on_kernels)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("D,Dv", [(64, 64), (80, 96), (128, 128), (256, 256), (8, 200)])
def test_head_dims(D, Dv, dtype, on_kernels):
    check(Blocks(lengths=(51, 20, 66), H=1, Hk=1, Nq=66, Nk=150, D=D, Dv=Dv, rope="half"), HALF[dtype], on_kernels)


@pytest.mark.parametrize("Nq,Nk", [(1, 1), (1, 130), (64, 64), (65, 63), (130, 20), (129, 129), (63, 257), (5, 0), (0, 5)])
def test_lengths(Nq, Nk, on_kernels):
    case = CPU.Case("every=20", Hk=1, Nq=Nq, Nk=Nk, rope="interleaved")
    if Nq and Nk:
        check(case, torch.bfloat16, on_kernels)
        return
    with torch.no_grad(), on_kernels():
        got = fastpe.landmark_attention(*CPU.inputs(case, torch.bfloat16), case.landmarks(), return_lse=True)
    assert not got[0].any() and torch.isneginf(got[1]).all()


# Few queries: the tiles are cut into splits, a long block in one of them.
@pytest.mark.parametrize("case", [
    CPU.Case("every=50", H=4, Hk=2, Nq=1, Nk=1100, rope="half"),
    CPU.Case("random=10", B=2, Hk=1, Nq=3, Nk=600, per_batch=True, padding=True),
    Blocks(lengths=(270, 30, 300), H=1, Hk=1, Nq=20, Nk=1050, storage="bnhd"),
], ids=lambda c: c.pattern if not getattr(c, "lengths", ()) else "long")  # fmt: skip
def test_splits(case, on_kernels, emu, on_emulator):
    check(case, torch.bfloat16, on_kernels)
    emu.counters()
    with torch.no_grad(), on_emulator(**SCHEDULES[0]):
        fastpe.landmark_attention(*CPU.inputs(case, torch.bfloat16), case.landmarks(), **case.kwargs())
    assert emu.counters()["blocks"] > 2 * 2 * case.B * case.H


@pytest.mark.parametrize("D", [16, 136])
def test_padding_and_head_dims(D, on_kernels):
    check(dataclasses.replace(PADDED, B=1, D=D), torch.bfloat16, on_kernels)


@pytest.mark.parametrize("case", [PADDED, dataclasses.replace(CASES["irregular"], Nq=5, Nk=133)], ids=["padded", "irregular"])
def test_nothing_outside_the_tensors_is_read(case, on_emulator):
    check(case, torch.bfloat16, on_emulator, guard=True)


def test_hidden_numbers_are_never_read(on_kernels):
    """Values of landmarks, and padded keys and values, may hold anything."""
    q, k, v = CPU.inputs(PADDED, torch.bfloat16, False)
    is_landmark, hidden = PADDED.landmarks(), ~PADDED.kwargs()["mask"].padding[0][:, None, :, None]
    results = []
    for bad in (0.5, torch.nan):
        x = [q, torch.where(hidden, bad, k).to(k.dtype), torch.where(hidden | is_landmark[:, None], bad, v).to(v.dtype)]
        with on_kernels():
            results.append(CPU.run(fastpe.landmark_attention, PADDED, [y.detach().requires_grad_() for y in x], torch.bfloat16))
    for name, x in results[0].items():
        assert torch.equal(x, results[1][name]), name


@pytest.mark.parametrize("where", range(3), ids=["query", "key", "value"])
def test_not_finite_stays_in_its_rows(where, on_kernels):
    case = dataclasses.replace(CASES["every"], H=1, Hk=1, Nq=150, Nk=150)
    x = CPU.inputs(case, torch.bfloat16, False)
    results = []
    for bad in (None, torch.nan):
        if bad:
            x[where][..., 100, 3] = bad
        with torch.no_grad(), on_kernels():
            results.append(fastpe.landmark_attention(*x, case.landmarks()))
    rows = torch.arange(150)
    # Values: tiles that end before it, as in fastpe.attention.
    same = rows != 100 if where == 0 else rows < (100 if where == 1 else 64)
    assert torch.equal(results[0][:, :, same], results[1][:, :, same])
    assert results[1][:, :, 100 if where == 0 else 112].isnan().any()


@pytest.mark.parametrize("D", [16, 256])
@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_only_what_is_asked_for(wanted, D, on_kernels):
    case = Blocks(lengths=(20, 70), H=2, Hk=1, Nq=70, Nk=110, D=D, Dv=D)
    leaves = CPU.inputs(case, torch.bfloat16)
    alone = [x.detach().requires_grad_(name == wanted) for name, x in zip("qkv", leaves)]
    for x in (leaves, alone):
        with on_kernels():
            CPU.run(fastpe.landmark_attention, case, x, torch.bfloat16)
    for name, x, y in zip("qkv", alone, leaves):
        assert torch.equal(x.grad, y.grad) if name == wanted else x.grad is None


def test_no_bank_conflicts(emu, on_emulator):
    for D in (64, 96, 128, 256):
        case = Blocks(lengths=(30, 66), H=1, Hk=1, Nq=20, Nk=130, D=D, Dv=D)
        emu.counters()
        with on_emulator():
            CPU.run(fastpe.landmark_attention, case, CPU.inputs(case, torch.bfloat16), torch.bfloat16)
        counted = emu.counters()
        assert counted["extra_wavefronts"] == 0 and counted["mma"] > 0


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", [case for stem, case in GOLDEN.CASES if stem == "chunk_landmark"])
def test_golden(case, dtype, on_kernels):
    a, dtype = GOLDEN.load(("chunk_landmark", case)), HALF[dtype]
    with on_kernels():
        got = GOLDEN.landmark(a, dtype, fastpe)
    want, own = (GOLDEN.landmark(a, dtype, of) for of in (fastpe.reference, compare))
    for name, x in got.items():
        compare.close_half(name, x, want[name], own[name], floor=0.1)


@pytest.mark.parametrize("case", GOLDEN.RETRIEVALS)
def test_golden_retrieval(case, on_kernels):
    a = GOLDEN.golden.load("chunk_landmark_cache", case)
    with torch.no_grad(), on_kernels():
        got = GOLDEN.retrieval(a, torch.bfloat16, torch.bfloat16)
    GOLDEN.close_retrieval(*got, *GOLDEN.retrieval(a, torch.bfloat16, torch.float64), torch.bfloat16)


def test_retrieval_of_more_blocks_than_are_merged_at_once(on_kernels):
    x = CPU.cached(M=8 * 40 + 3, Nq=3, B=1, H=2, Hk=1, dtype=torch.bfloat16)
    with torch.no_grad(), on_kernels():
        got = fastpe.landmark_retrieval(**x, block=8, top_k=40)
    everything = (torch.cat((x[c], x[n]), 2) for c, n in (("key_cache", "key"), ("value_cache", "value")))
    marks = torch.cat((torch.arange(323) % 8 == 7, x["is_landmark"]))
    compare.close("out", got, fastpe.reference.landmark_attention(x["query"], *everything, marks), 0.02)
