"""fastpe.landmark_attention and landmark_retrieval: against the definition, torch's own checks, repeatability, memory."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

import fastpe
from fastpe import _reference_parts
from fastpe.testing import compare

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `pattern`: every=n, random=percentage of landmarks, or a name; `sharp` multiplies the queries."""

    pattern: str = "every=16"
    B: int = 1
    H: int = 2
    Hk: int = 2
    Nq: int = 100
    Nk: int = 100
    D: int = 16
    Dv: int = 24
    rope: str = ""
    padding: bool = False
    per_batch: bool = False
    storage: str = "bhnd"
    sharp: float = 1.0

    def landmarks(self) -> torch.Tensor:
        kind, _, n = self.pattern.partition("=")
        g = torch.Generator().manual_seed(7)
        j = torch.arange(self.Nk)
        one = {
            "every": lambda: j % int(n) == int(n) - 1,
            "random": lambda: torch.rand(self.Nk, generator=g) < int(n) / 100,
            "none": lambda: j < 0,
            "all": lambda: j >= 0,
            "first": lambda: j < 3,  # blocks without ordinary tokens, rows that see nothing
            "long": lambda: (j == 3) | (j == self.Nk - 20),  # one block of several tiles' length
        }[kind]()
        if not self.per_batch:
            return one
        return torch.stack([one.roll(3 * b) for b in range(self.B)])

    def kwargs(self) -> dict:
        kwargs = {}
        if self.rope:
            kwargs["rope"] = fastpe.Rope(fastpe.rope.default(self.D).inv_freq, layout=self.rope)
        if self.padding:
            g = torch.Generator().manual_seed(8)
            real = torch.rand(self.B, self.Nk, generator=g) > 0.2
            real[:, :5] = False
            kwargs["mask"] = fastpe.mask.padding(real)
        return kwargs


CASES = {
    "every": Case(),
    "gqa_rope": Case("every=51", B=2, H=4, Nq=150, Nk=150, D=32, rope="half"),
    "interleaved_offset": Case("every=10", Nq=70, Nk=131, rope="interleaved", storage="bnhd"),
    "decode": Case("every=10", B=2, H=4, Nq=1, Nk=57, rope="half"),
    "more_queries": Case("every=7", Nq=90, Nk=40),
    "tile": Case("every=64", Nq=200, Nk=200),
    "two_tiles": Case("every=65", Nq=200, Nk=200, D=64, Dv=64),
    "irregular": Case("random=8", B=2, Nq=170, Nk=170, per_batch=True, storage="bnhd"),
    "dense_marks": Case("random=60", B=3, Nq=140, Nk=140, per_batch=True),
    "none": Case("none", Nq=170, Nk=170),
    "all": Case("all", Nq=70, Nk=70),
    "first": Case("first", Nq=70, Nk=70, rope="half"),
    "long": Case("long", Nq=330, Nk=330),
    "padding": Case("every=9", B=2, H=4, Nq=130, Nk=130, padding=True, rope="half"),
    "padding_irregular": Case("random=20", B=2, Nq=65, Nk=129, padding=True, per_batch=True),
    "sharp": Case("every=16", Nq=150, Nk=150, sharp=60.0),
    "sharp_padding": Case("random=10", B=2, Nq=150, Nk=150, padding=True, per_batch=True, sharp=60.0),
    "one_token": Case("none", Nq=1, Nk=1),
}


def inputs(case: Case, dtype: torch.dtype, grad: bool = True) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    made = []
    for h, n, d, factor in ((case.H, case.Nq, case.D, case.sharp), (case.Hk, case.Nk, case.D, 1), (case.Hk, case.Nk, case.Dv, 1)):
        x = factor * torch.randn(case.B, h, n, d, generator=g, dtype=torch.float64)
        if case.storage == "bnhd":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        made.append(x.to(dtype).requires_grad_(grad))
    return made


def run(attention, case: Case, leaves, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    out, lse = attention(*leaves, case.landmarks(), **case.kwargs(), return_lse=True)
    g = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=g, dtype=torch.float64).to(dtype).to(out.dtype)
    dlse = torch.randn(lse.shape, generator=g, dtype=torch.float64).float().to(lse.dtype)
    ((out * dout).sum() + (lse * dlse)[lse > -torch.inf].sum()).backward()
    return {"out": out, "lse": lse} | {name: x.grad for name, x in zip(("dq", "dk", "dv"), leaves)}


def eager(query, key, value, is_landmark, *, rope=None, mask=None, return_lse=True):
    """The definition in the inputs' dtype with a float32 softmax: the yardstick of half precision."""
    (B, H, Nq, _), (_, Hk, Nk, _), dtype = query.shape, key.shape, query.dtype
    if rope is not None:
        tables = rope.materialize_tables(None, None, Nq, Nk, B, H, Hk, query.device)
        query, key = (_reference_parts.rotate(x, *t, rope.layout, False).to(dtype) for x, t in zip((query, key), tables))
    real = None if mask is None else mask.padding[0]
    return _reference_parts.grouped_softmax_attention(query, key, value, is_landmark, real, softmax_dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_definition(name, dtype, isa):
    case = CASES[name]
    leaves = inputs(case, dtype)
    got = run(fastpe.landmark_attention, case, leaves, dtype)
    want = run(fastpe.reference.landmark_attention, case, [x.detach().double().requires_grad_() for x in leaves], dtype)
    own = run(eager, case, [x.detach().requires_grad_() for x in leaves], dtype) if dtype not in compare.TOLERANCE else None
    for what, x in got.items():
        if own is None:
            forward, backward = compare.TOLERANCE[dtype]
            compare.close(what, x, want[what], backward if what.startswith("d") else forward, floor=1e-3)
        else:
            compare.close_half(what, x, want[what], own[what], floor=0.1, dtype=dtype)
    empty = want["lse"] == -torch.inf
    assert not got["out"][empty].any() and not got["dq"][empty].any()


def test_without_landmarks_it_is_causal_attention(isa):
    q, k, v = inputs(CASES["none"], torch.float64, False)
    got = fastpe.landmark_attention(q, k, v, torch.zeros(170, dtype=torch.bool), return_lse=True)
    for a, b in zip(got, fastpe.attention(q, k, v, is_causal=True, return_lse=True)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", range(3), ids=["query", "key", "value"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_finite_stays_in_its_rows(where, bad, dtype, isa):
    case = dataclasses.replace(CASES["every"], Nq=150, Nk=150)
    x = inputs(case, dtype, False)
    at, is_landmark = 100, case.landmarks()
    clean = fastpe.landmark_attention(*x, is_landmark)
    x[where][..., at, 3] = bad
    out = fastpe.landmark_attention(*x, is_landmark)
    rows = torch.arange(150)
    same = rows != at if where == 0 else rows < at
    if where == 2:
        same = rows < 64  # tiles that end before it, as in fastpe.attention
    # Its block of rows forms maxima, which it could do without before: another rounding in bfloat16.
    compare.close("others", out[:, :, same], clean[:, :, same], 1e-5 if dtype == torch.float32 else 1e-2)
    assert not torch.isfinite(out[:, :, at + 12 if where else at]).all()


def test_hidden_numbers_are_never_read(isa):
    """Values of landmarks, and padded keys and values, may hold anything."""
    case = CASES["padding"]
    q, k, v = inputs(case, torch.float32, False)
    is_landmark, real = case.landmarks(), case.kwargs()["mask"].padding[0]
    clean = fastpe.landmark_attention(q, k, v, is_landmark, **case.kwargs())
    hidden = ~real[:, None, :, None]
    k, v = torch.where(hidden, torch.nan, k), torch.where(hidden | is_landmark[:, None], torch.nan, v)
    assert torch.equal(fastpe.landmark_attention(q, k, v, is_landmark, **case.kwargs()), clean)


@pytest.mark.parametrize("name", ["gqa_rope", "irregular", "padding_irregular", "first", "sharp"])
def test_gradcheck(name):
    case = dataclasses.replace(CASES[name], B=1, H=2, Hk=1, Nq=9, Nk=13, D=8, Dv=8, per_batch=False, sharp=min(CASES[name].sharp, 15))
    if case.pattern.startswith("every"):
        case = dataclasses.replace(case, pattern="every=4")

    def f(*x):
        out, lse = fastpe.landmark_attention(*x, case.landmarks(), **case.kwargs(), return_lse=True)
        return out, torch.where(lse > -torch.inf, lse, 0)

    assert torch.autograd.gradcheck(f, inputs(case, torch.float64))


@pytest.mark.parametrize("name", ["gqa_rope", "irregular", "padding_irregular"])
def test_opcheck(name):
    case = dataclasses.replace(CASES[name], B=2, Nq=7, Nk=11, pattern="random=30")
    for grad in (True, False):
        caught = []
        with pytest.MonkeyPatch.context() as patch:
            real = torch.ops.fastpe.landmark_fwd
            patch.setattr(torch.ops.fastpe, "landmark_fwd", lambda *a: (caught.append(a), real(*a))[1])
            out, lse = fastpe.landmark_attention(*inputs(case, torch.float32, grad), case.landmarks(), **case.kwargs(), return_lse=True)
        args = caught[0]
        if grad:
            torch.library.opcheck(real, args, test_utils=CHECKS)
    for needs in (7, 1, 6):
        full = (torch.randn_like(out), torch.randn_like(lse), *args[:3], out, lse, *args[3:], needs)
        torch.library.opcheck(torch.ops.fastpe.landmark_bwd, full, test_utils=CHECKS)


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_only_what_is_asked_for(wanted):
    case = CASES["gqa_rope"]
    leaves = inputs(case, torch.float64)
    run(fastpe.landmark_attention, case, leaves, torch.float64)
    alone = [x.detach().requires_grad_(name == wanted) for name, x in zip("qkv", leaves)]
    run(fastpe.landmark_attention, case, alone, torch.float64)
    for name, x, y in zip("qkv", alone, leaves):
        assert torch.equal(x.grad, y.grad) if name == wanted else x.grad is None


def test_learned_angles():
    """Frequencies that learn get their gradient through the rotated tensors."""
    case = CASES["gqa_rope"]
    q, k, v = inputs(case, torch.float64, False)
    grads = []
    for attention in (fastpe.landmark_attention, fastpe.reference.landmark_attention):
        w = fastpe.rope.default(32).inv_freq.double().clone().requires_grad_()
        attention(q, k, v, case.landmarks(), rope=fastpe.rope.learned(w)).sin().sum().backward()
        grads.append(w.grad)
    torch.testing.assert_close(*grads)


def test_compile():
    torch._dynamo.reset()
    rope = fastpe.rope.default(8)

    def f(q, k, m):
        out, lse = fastpe.landmark_attention(q, k, k, m, rope=rope, return_lse=True)
        return out.sum() + lse.sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for step, (nq, nk) in enumerate([(5, 40), (9, 77), (17, 130)]):
        q, k = torch.randn(1, 2, nq, 8, requires_grad=True), torch.randn(1, 2, nk, 8, requires_grad=True)
        m = torch.arange(nk) % 6 == 5
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            got = torch.autograd.grad(compiled(q, k, m), (q, k))
        for a, b in zip(got, torch.autograd.grad(f(q, k, m), (q, k))):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_bitwise(dtype):
    case = dataclasses.replace(CASES["irregular"], H=4, Nq=400, Nk=400)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5) * 5:
            torch.set_num_threads(threads)
            results.append(run(fastpe.landmark_attention, case, inputs(case, dtype), dtype))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(x, other[name]), name


PROGRAM = """
import resource, torch, fastpe
torch.set_num_threads(2)

def call(n):
    q, k, v = (torch.randn(1, 2, n, 16, requires_grad=True) for _ in range(3))
    fastpe.landmark_attention(q, k, v, torch.arange(n) % 51 == 50).sum().backward()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

call(256)
start = peak()
call(4096)
middle = peak()
call(8192)
print(middle - start, peak() - start)
"""


def test_memory_is_linear():
    """One Nq x Nk float32 array of a head would be 256 MiB at the longer length."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    short, long = map(int, done.stdout.split())
    assert long <= 2.5 * short + 4096, f"{short} KiB at 4096 tokens, {long} KiB at 8192"
    assert long < 64 * 1024, f"{long} KiB at 8192 tokens"


# ---- errors -------------------------------------------------------------------------------------------------------------

q, m = torch.zeros(2, 2, 5, 8), torch.zeros(5, dtype=torch.bool)


@pytest.mark.parametrize(
    "error, args, kwargs, message",
    [
        (TypeError, (q, q, q, m.long()), {}, "is_landmark must be a bool tensor, got int64"),
        (TypeError, (q, q, q, [True]), {}, "is_landmark must be a tensor, got list"),
        (ValueError, (q, q, q, m[:4]), {}, r"is_landmark must be \(Nk,\) or \(B, Nk\) with Nk = 5, got \(4,\)"),
        (ValueError, (q, q, q, m.expand(3, 5)), {}, "is_landmark has 3 batch entries, the call has 2"),
        (ValueError, (q, q[:, :1].expand(2, 3, 5, 8), q[:, :1].expand(2, 3, 5, 8), m), {}, "key has 3 heads, which does not divide query's 2"),
        (TypeError, (q, q.double(), q, m), {}, "key is float64, query is float32"),
        (ValueError, (q, q, q, m), {"positions": torch.arange(5)}, "positions are for rope, which is None"),
        (TypeError, (q, q, q, m), {"rope": 3}, "rope must be a fastpe.rope object, got int"),
        (TypeError, (q, q, q, m), {"mask": m}, "mask must be a fastpe.mask object, got Tensor"),
        (NotImplementedError, (q, q, q, m), {"mask": fastpe.mask.window(3)}, r"only fastpe.mask.padding goes with landmarks, got Mask\(left=3"),
        (ValueError, (q, q, q, m), {"scale": float("inf")}, "scale must be finite"),
    ],
)
def test_errors(error, args, kwargs, message):
    with pytest.raises(error, match="fastpe.landmark_attention: " + message):
        fastpe.landmark_attention(*args, **kwargs)


def test_second_derivative():
    x = torch.randn(1, 1, 5, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(fastpe.landmark_attention(x, x, x, m).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="fastpe.landmark_attention: second derivatives"):
        dx.sum().backward()


# ---- retrieval ----------------------------------------------------------------------------------------------------------


def cached(M=37, Nq=9, B=2, H=4, Hk=2, D=16, Dv=24, dtype=torch.float64):
    """Cache and new tokens; a landmark among the new ones."""
    g = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    x = {"query": normal(B, H, Nq, D), "key": normal(B, Hk, Nq, D), "value": normal(B, Hk, Nq, Dv)}
    x |= {"is_landmark": torch.arange(Nq) == 4, "key_cache": normal(B, Hk, M, D), "value_cache": normal(B, Hk, M, Dv)}
    return x


@pytest.mark.parametrize("M", [0, 5, 8, 37, 40])
@pytest.mark.parametrize("rope", [None, "half", "interleaved"])
def test_all_blocks_is_no_retrieval(rope, M):
    """With room for every block the positions are the plain ones, and the result is landmark attention over everything."""
    x = cached(M)
    rope = None if rope is None else fastpe.Rope(fastpe.rope.default(16).inv_freq, layout=rope)
    got = fastpe.landmark_retrieval(**x, block=8, top_k=9, rope=rope)
    everything = (torch.cat((x[c], x[n]), 2) for c, n in (("key_cache", "key"), ("value_cache", "value")))
    marks = torch.cat((torch.arange(M) % 8 == 7, x["is_landmark"]))
    want = fastpe.reference.landmark_attention(x["query"], *everything, marks, rope=rope)
    compare.close("out", got, want, 1e-12)


def test_retrieval_in_pieces_and_shared(monkeypatch):
    x = cached()
    rope = fastpe.rope.default(16)
    out, selected = fastpe.landmark_retrieval(**x, block=8, top_k=2, rope=rope, return_selected=True)
    assert selected.shape == (2, 4, 9, 2) and (selected[..., 0] < selected[..., 1]).all()
    monkeypatch.setattr(sys.modules["fastpe.landmark"], "_GATHERED", 1)  # a row at a time
    compare.close("out", fastpe.landmark_retrieval(**x, block=8, top_k=2, rope=rope), out, 1e-14)
    _, shared = fastpe.landmark_retrieval(**x, block=8, top_k=2, rope=rope, shared_rows=True, return_selected=True)
    assert (shared == shared[:, :, :1]).all()
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in x.items()}
    rough, chosen = fastpe.landmark_retrieval(**half, block=8, top_k=2, rope=rope, return_selected=True)
    same = (chosen == selected).all(-1)
    assert same.double().mean() > 0.8
    compare.close("bfloat16", rough[same], out[same], 0.02)


@pytest.mark.parametrize(
    "error, change, message",
    [
        (ValueError, {"block": 1}, "block must be at least 2, got 1"),
        (ValueError, {"top_k": 0}, "top_k must be at least 1, got 0"),
        (ValueError, {"key_cache": torch.zeros(2, 3, 5, 16)}, r"key_cache must be \(B, Hk, M, channels\) beside \(2, 2, 9, 16\), got"),
        (ValueError, {"value_cache": torch.zeros(2, 2, 5, 24)}, "key_cache has 37 tokens, value_cache has 5"),
        (ValueError, {"query": torch.zeros(2, 4, 8, 16, dtype=torch.float64)}, "key has 9 tokens, query has 8"),
    ],
)
def test_retrieval_errors(error, change, message):
    with pytest.raises(error, match="fastpe.landmark_retrieval: " + message):
        fastpe.landmark_retrieval(**(cached() | {"block": 8, "top_k": 2} | change))
