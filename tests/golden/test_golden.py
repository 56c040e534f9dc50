"""Every golden case through the public names: the definition in float64, then the kernels in every dtype and ISA."""

from __future__ import annotations

import golden_files as golden
import pytest
import golden_table as table
import torch

import fastpe
from fastpe import bias
from fastpe._load import _C
from fastpe.testing import compare
from fastpe.testing.cases import Leaves

NOT_MINE = table.OTHER_FILES | set(table.LATER_FILES)
MINE = [stem for stem in golden.stems() if stem.split("_")[0] in ("bias", "chunk") and stem not in NOT_MINE]
FOUND = [(stem, case) for stem in MINE for case in golden.case_names(stem)]
CALLED = [key for key in FOUND if key in table.CALLS]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Where every entry is tiny (gradients under strong decay), the terms that cancelled are of order one and set the error.
FLOOR = 0.1

def ids(key):
    return "/".join(key) if isinstance(key, tuple) else str(key).removeprefix("torch.")


@pytest.fixture(params=_C.available_isas())
def isa(request):
    before = _C.current_isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def load(stem, case):
    return golden.load(stem, case, table.BASES.get((stem, case)))


class Golden:
    """One case, its inputs rounded for a dtype."""

    def __init__(self, stem, case, dtype, wide=False):
        self.a = load(stem, case)
        self.stem, self.case = stem, case
        leaves = self.leaves = Leaves(dtype, wide)
        for name, main in (("q", True), ("k", True), ("v", True)):
            leaves(name, self.a[name], main=main)
        # Every other number the call may use, rounded as the kernels will read it.
        inputs = {
            name: leaves.rounded(x) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() else x
            for name, x in self.a.items()
        }
        if "inv_freq" in self.a:
            inputs["inv_freq"] = self.a["inv_freq"]
        kwargs = table.CALLS[stem, case](inputs, lambda name, main=False: leaves(name, self.a[name], main=main), leaves.watch)
        self.run = kwargs.pop("run", None)
        self.recipe = kwargs.pop("recipe", False)
        self.mask, self.region = (kwargs.pop(x, None) if self.run else kwargs.get(x) for x in ("mask", "region"))
        self.kwargs = kwargs | ({"scale": float(self.a["scale"])} if "scale" in self.a and not self.recipe else {})
        self.dout = leaves.rounded(self.a["do"], main=True) if "do" in self.a else None

    def __call__(self, attention):
        q, k, v = (self.leaves.named[name] for name in "qkv")
        if self.recipe:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(fastpe.recipes, "attention", attention)
                made = self.run(q, k, v)
        elif self.run:
            made = self.run(attention, q, k, v, **self.kwargs)
        else:
            made = attention(q, k, v, **self.kwargs, return_lse=True)
        made = made if isinstance(made, dict) else dict(zip(("out", "lse"), made))
        if self.dout is not None:
            (made["out"] * self.dout.to(made["out"].dtype)).sum().backward()
        return {name: x for name, x in made.items() if name in self.stored()} | self.gradients()

    def gradients(self):
        """Name in the file -> gradient, for every gradient the file holds."""
        found = {}
        for name in self.a:
            what = name[2:] if name.startswith("d_") else name[1:] if name.startswith("d") else None
            if what in self.leaves.named and name in self.stored():
                found[name] = self.leaves.named[what].grad
        return found

    def stored(self):
        """The results the file holds and this test must compare."""
        names = {n for n in self.a if golden.is_result(n)} - {"d_bar", "do"}
        return {n for n in names if (self.stem, self.case, n) not in table.NOT_COMPARED}


def coarse(key, tolerance):
    return max(tolerance, table.COARSE.get(key, (0.0,))[0])


def chosen(name, got, want):
    """True for what is selected and not computed: the same keys must have been."""
    if want.is_floating_point():
        return False
    assert torch.equal(got, want), name
    return True


@pytest.mark.parametrize("stem", golden.stems())
def test_file_is_known(stem):
    """A new golden file must be run, or be named as a later method; rope_* files are those of tests/rope."""
    known = {file for file, _ in table.CALLS} | NOT_MINE
    assert stem in known or stem.startswith("rope_"), f"{stem} is in no table"


@pytest.mark.parametrize("key", FOUND, ids=ids)
def test_case_is_known(key):
    assert key in table.CALLS or key in table.TABLES or key in table.NOT_RUN, f"{key} is in no table"


def test_no_stale_entries():
    """With the full set at hand every entry of the tables must exist in it."""
    if len(golden.folders()) == 1:
        pytest.skip("the full golden set is not here")
    entries = {*table.CALLS, *table.TABLES, *table.NOT_RUN}
    assert entries <= set(FOUND), sorted(entries - set(FOUND))
    assert set(table.LATER_FILES) <= set(golden.stems())


@pytest.mark.parametrize("key", [key for key in FOUND if key in table.TABLES], ids=ids)
def test_table(key, record_property):
    table.TABLES[key](golden.load(*key))
    record_property("golden", (*key, "table"))


@pytest.mark.parametrize("key", CALLED, ids=ids)
def test_definition(key, record_property):
    g = Golden(*key, torch.float64)
    got = g(fastpe.reference.attention)
    compared = set(got)
    stored = g.stored()
    assert compared >= stored, f"stored but not compared: {sorted(stored - compared)}"
    for name in sorted(stored):
        if chosen(name, got[name], g.a[name]):
            continue
        compare.close(name, got[name], g.a[name], coarse(key, 1e-10), floor=FLOOR)
    record_property("golden", (*key, "definition"))


@pytest.mark.parametrize("key", CALLED, ids=ids)
def test_dense_bias_and_mask(key):
    """The objects' own dense forms, against the arrays the original code made."""
    g = Golden(*key, torch.float64)
    if g.run and g.mask is None or "bias" not in g.a and "mask" not in g.a and "visible" not in g.a:
        pytest.skip("nothing stored to compare")
    (B, H, Nq, _), Nk = g.a["q"].shape, g.a["k"].shape[2]
    causal = g.kwargs.get("is_causal", False)
    call = fastpe.bias.Call(B, H, Nq, Nk, causal, torch.float64, torch.device("cpu"))
    m = g.mask or fastpe.mask.Mask()
    visible = (m & fastpe.mask.causal() if causal else m).materialize(call)
    stored = g.a.get("mask", g.a.get("visible", torch.ones(Nq, Nk, dtype=torch.bool)))
    if "mask" in g.a or "visible" in g.a or g.stem.startswith("bias_"):
        assert (visible == stored).all()
    if "bias" in g.a and g.kwargs.get("bias") is not None:
        b = g.kwargs["bias"]
        if isinstance(b, (bias.Cope, bias.PerRowForget)):
            dense = b.materialize_for(call, g.a["q"], g.a["k"], g.a["v"], visible)
        else:
            dense = b.materialize(call)
        got, want, seen = torch.broadcast_tensors(dense, g.a["bias"], visible)
        compare.close("bias", got[seen], want[seen], 1e-12)


@pytest.mark.parametrize("key", [key for key in CALLED if "region" in golden.load(*key)], ids=ids)
def test_regions(key):
    """Which region a pair is in, and the positions of every region that has a pair, as the original code had them."""
    g = Golden(*key, torch.float64)
    (B, H, Nq, _), Nk = g.a["q"].shape, g.a["k"].shape[2]
    call = fastpe.bias.Call(B, H, Nq, Nk, False, torch.float64, torch.device("cpu"))
    plan, got, want = g.region.plan(call), g.region.region_of(call), g.a["region"]
    assert torch.equal(got[want > 0], want[want > 0].long())
    for r in want[want > 0].unique().tolist():
        queries, keys = ((want == r).any(axis) for axis in (1, 0))
        for side, mine, used in (("pq", plan.query, queries), ("pk", plan.key, keys)):
            stored = g.a.get(f"{side}{r}", g.a.get(side))
            if stored is None:
                continue
            torch.testing.assert_close(mine[r - 1 if len(mine) > 1 else 0][used], stored.double()[used], rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("key", CALLED, ids=ids)
def test_kernels(key, dtype, isa, record_property):
    got = Golden(*key, dtype)(fastpe.attention)
    if dtype in compare.TOLERANCE:
        want = load(*key)
        forward, backward = compare.TOLERANCE[dtype]
        for name, x in got.items():
            if chosen(name, x, want[name]):
                continue
            compare.close(name, x, want[name], coarse(key, backward if name.startswith("d") else forward), floor=FLOOR)
    else:
        want = Golden(*key, dtype, wide=True)(fastpe.reference.attention)
        own = Golden(*key, dtype)(compare.eager_attention)
        for name, x in got.items():
            if chosen(name, x, want[name]):
                continue
            parameter = dtype if name.startswith("d_") else None
            compare.close_half(name, x, want[name], own[name], floor=FLOOR, dtype=parameter)
    record_property("golden", (*key, f"{ids(dtype)} {isa}"))
