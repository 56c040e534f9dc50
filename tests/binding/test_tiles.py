"""The tile plan against counting by hand and against what the kernels report; scratch memory; counters."""

from __future__ import annotations

import gc
import threading

import fastpe
import pytest
import torch
from fastpe._load import _C


def count(Nq, Nk, bq, bk, left, right, sinks):
    """Tiles that hold a visible pair, by looking at every pair."""
    I = torch.arange(Nq)[:, None] + Nk - Nq
    j = torch.arange(Nk)[None]
    seen = torch.ones(Nq, Nk, dtype=torch.bool)
    if right:
        seen &= j - I < right
    if left:
        seen &= (I - j < left) | (j < sinks)
    return sum(bool(seen[a : a + bq, b : b + bk].any()) for a in range(0, Nq, bq) for b in range(0, Nk, bk))


VISIBILITIES = [(0, 0, 0), (0, 1, 0), (70, 1, 0), (1, 1, 0), (70, 1, 5), (40, 30, 0), (0, 20, 0)]


@pytest.mark.parametrize(("left", "right", "sinks"), VISIBILITIES)
@pytest.mark.parametrize(("Nq", "Nk"), [(1, 1), (64, 64), (65, 200), (300, 300), (1, 500), (200, 130)])
def test_plan_counts_tiles(Nq, Nk, left, right, sinks):
    plan = _C.tile_plan(2, 4, 2, Nq, Nk, left=left, right=right, sinks=sinks)
    want = count(Nq, Nk, plan["block_q"], plan["block_k"], left, right, sinks)
    total = -(-Nq // plan["block_q"]) * -(-Nk // plan["block_k"])
    assert plan["visited"] == 8 * want and plan["hidden"] == 8 * (total - want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("left", "right", "sinks"), VISIBILITIES)
def test_kernels_follow_the_plan(isa, left, right, sinks, dtype):
    Nq, Nk = 150, 333
    q = torch.randn(2, 4, Nq, 16).to(dtype)
    k = torch.randn(2, 2, Nk, 16).to(dtype)
    v = torch.randn(2, 2, Nk, 8).to(dtype)
    _C.reset_tile_stats()
    _C.set_tile_stats(True)
    try:
        torch.ops.fastpe.attn_fwd(q, k, v, *arguments(left, right, sinks))
    finally:
        _C.set_tile_stats(False)
    got = _C.tile_stats()
    plan = _C.tile_plan(2, 4, 2, Nq, Nk, dtype=str(dtype).removeprefix("torch."), left=left, right=right, sinks=sinks)
    assert {key: got[key] for key in ("visited", "hidden", "block_q", "block_k")} == {key: plan[key] for key in ("visited", "hidden", "block_q", "block_k")}
    assert got["decayed"] == 0 and plan["isa"] == isa


def arguments(left: int, right: int, sinks: int) -> list:
    """The arguments of attn_fwd after q, k and v: by name from its schema, everything absent but the visibility."""
    given = {"left": left, "right": right, "sinks": sinks, "scale": 0.25}
    values = []
    for a in torch.ops.fastpe.attn_fwd.default._schema.arguments[3:]:
        kind = str(a.type)
        values.append(given.get(a.name, None if kind.startswith("Optional") else False if kind == "bool" else 0.0 if kind == "float" else 0))
    return values


def test_counters_are_off_unless_asked_for():
    _C.reset_tile_stats()
    q = torch.randn(1, 1, 70, 16)
    fastpe.attention(q, q, q, is_causal=True)
    assert _C.tile_stats() == {"visited": 0, "hidden": 0, "decayed": 0, "block_q": 0, "block_k": 0}


def test_plan_refuses_nonsense():
    with pytest.raises(ValueError, match="dtype 'int8' is not float32, bfloat16, float16 or float64"):
        _C.tile_plan(1, 1, 1, 8, 8, dtype="int8")
    with pytest.raises(ValueError, match="Hk at least 1"):
        _C.tile_plan(1, 1, 0, 8, 8)


# ---- scratch memory -------------------------------------------------------------------------------------------------


def test_scratch_comes_back_and_is_kept():
    q = torch.randn(1, 2, 300, 32, requires_grad=True)
    for _ in range(3):
        fastpe.attention(q, q, q, is_causal=True).sum().backward()
        assert _C.scratch_use()["lent"] == 0
    first = _C.scratch_use()["kept"]
    assert 0 < first <= 64 << 20
    for _ in range(5):
        fastpe.attention(q, q, q, is_causal=True).sum().backward()
    assert _C.scratch_use() == {"kept": first, "lent": 0}
    _C.scratch_trim()
    assert _C.scratch_use() == {"kept": 0, "lent": 0}


def test_scratch_from_many_threads():
    """Calls from several Python threads at once share the arena and give everything back."""
    q = torch.randn(1, 2, 200, 32)
    want = fastpe.attention(q, q, q, is_causal=True)
    wrong = []

    def work():
        for _ in range(20):
            if not torch.equal(fastpe.attention(q, q, q, is_causal=True), want):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    gc.collect()
    assert not wrong
    assert _C.scratch_use()["lent"] == 0 and _C.scratch_use()["kept"] <= 64 << 20


# ---- position functions ---------------------------------------------------------------------------------------------


def test_visible_is_the_rule():
    for I in range(-2, 9):
        for j in range(9):
            for left, right, sinks in [(0, 0, 0), (3, 1, 0), (3, 1, 2), (0, 2, 0), (2, 0, 0), (2, 2, 4)]:
                want = (right == 0 or j - I < right) and (left == 0 or I - j < left or j < sinks)
                assert _C.visible(I, j, left, right, sinks) == want


def test_bias_forms_against_torch():
    """Value and derivatives of every form of a distance, by autograd on the formula of bias_forms.def."""
    formulas = {
        "linear": lambda d, p0, p1: -p0 * d.clamp(min=0) - p1 * (-d).clamp(min=0),
        "signed_": lambda d, p0, p1: d,
        "abs": lambda d, p0, p1: -d.abs(),
        "log": lambda d, p0, p1: -p0 * (1 + p1 * d.abs()).log(),
        "power": lambda d, p0, p1: -p0 * d.abs() ** p1,
        "logsq": lambda d, p0, p1: -(1 + d * d).log(),
    }
    forms = _C.bias_forms()
    # Tables and FIRE are not functions of a distance and two numbers; the golden cases test them.
    assert set(formulas) == set(forms) - {"none", "table", "table_causal", "fire", "two_sided"}
    for name, f in formulas.items():
        for d in (-7.25, -1.0, 0.5, 3.0, 1000.0):
            x = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (d, 0.7, 0.4)]
            y = f(*x)
            g = torch.autograd.grad(y, x, allow_unused=True)
            want = [y.item()] + [0.0 if t is None else t.item() for t in g]
            assert _C.bias_value(name, d, 0.7, 0.4) == pytest.approx(want, rel=1e-12, abs=1e-13)
            assert _C.bias_value_f32(name, d, 0.7, 0.4) == pytest.approx(want, rel=3e-6, abs=1e-6)
        assert _C.bias_value(name, 0.0, 0.7, 0.4)[0] == 0.0
    with pytest.raises(ValueError, match="'table' is not a function of a distance"):
        _C.bias_value("table", 1.0)
    with pytest.raises(ValueError, match="'nothing' is not a bias form"):
        _C.bias_value("nothing", 1.0)


def test_table_index():
    two_sided = [_C.table_index("table", t, 7) for t in range(-5, 6)]
    assert two_sided == [6, 6, 6, 5, 4, 3, 2, 1, 0, 0, 0]  # clamp(j - I, -3, 3) + 3, j - I = -t
    assert [_C.table_index("table_causal", t, 4) for t in range(-2, 6)] == [0, 0, 0, 1, 2, 3, 3, 3]
