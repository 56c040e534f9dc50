"""Contextual positions (fastpe.bias.Cope, PerRowForget): kernels against the definition, gradients, errors, repeatability."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

import fastpe
from fastpe import _cope_ops, bias, mask
from fastpe.testing import compare

VARIANTS = ("default", "nodiv", "keys", "values", "per_row")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; `sharp` multiplies the queries, so that gates lie near 0 and 1."""

    variant: str = "default"
    B: int = 1
    H: int = 2
    Hk: int = 1
    Nq: int = 70
    Nk: int = 70
    D: int = 16
    Dv: int = 24
    npos: int = 9
    mask: str = "none"
    rope: bool = False
    sink: bool = False
    storage: str = "bhnd"
    sharp: float = 1.0
    more: tuple[tuple[str, float], ...] = ()


def table(c: Case, dtype: torch.dtype, normal) -> torch.Tensor:
    """Random in float64. A count that float32 rounds across a whole number takes the slope of the other side, and the
    gradient is right for that one: below float64 the table is a sum of waves, whose neighbouring slopes differ little."""
    if dtype == torch.float64:
        return normal(c.D, c.npos)
    n = torch.arange(c.npos, dtype=torch.float64) / max(c.npos - 1, 1)
    return sum(normal(c.D, 1) * torch.cos(torch.pi * k * n) for k in (1, 2))


def inputs(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Leaves by name, float64 numbers rounded to what the kernels read."""
    g = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    c = case
    Dv = c.D if c.variant == "values" else c.Dv
    x = {
        "query": c.sharp * normal(c.B, c.H, c.Nq, c.D),
        "key": normal(c.B, c.Hk, c.Nk, c.D),
        "value": normal(c.B, c.Hk, c.Nk, Dv),
    }
    if c.variant == "keys":
        x["gate_keys"] = normal(c.B, c.Hk, c.Nk, c.D)
    if c.variant == "per_row":
        x |= {"gate_queries": normal(c.B, c.H, c.Nq, 8), "gate_keys": normal(c.B, c.Hk, c.Nk, 8)}
    else:
        x["table"] = table(c, dtype, normal)
    if c.sink:
        x["sink"] = normal(c.H)
    aux = torch.float64 if dtype == torch.float64 else torch.float32
    return {name: t.to(aux if name in ("table", "sink") else dtype) for name, t in x.items()}


def masks(case: Case):
    c = case
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 2, (c.B, c.Nk), generator=g).cumsum(-1) // 9
    return {
        "none": lambda: None,
        "window": lambda: mask.window(31),
        "window_sinks": lambda: mask.window(20) & mask.sinks(3),
        "documents": lambda: mask.documents(ids=ids[:, c.Nk - c.Nq :], key_ids=ids),
        "padding": lambda: mask.padding(torch.rand(c.B, c.Nk, generator=g) < 0.8),
        "left_padding": lambda: mask.padding(torch.arange(c.Nk) >= 37),
        "dense": lambda: mask.dense(torch.rand(c.B, c.H, c.Nq, c.Nk, generator=g) < 0.7),
    }[c.mask]()


def call(case: Case, x: dict[str, torch.Tensor], attention=fastpe.attention):
    q, k, v = x["query"], x["key"], x["value"]
    if case.storage == "bnhd":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    if case.variant == "per_row":
        b = bias.PerRowForget(x["gate_queries"], x["gate_keys"])
    else:
        b = bias.Cope(x["table"], x.get("gate_keys"), value_gates=case.variant == "values", nodiv=case.variant == "nodiv")
    rope = fastpe.rope.default(case.D) if case.rope else None
    return attention(
        q, k, v, bias=b, rope=rope, mask=masks(case), sink=x.get("sink"), is_causal=True, return_lse=True, **dict(case.more)
    )


def run(case: Case, x: dict[str, torch.Tensor], attention=fastpe.attention):
    """out, lse and the gradients of everything."""
    x = {name: t.detach().clone().requires_grad_() for name, t in x.items()}
    out, lse = call(case, x, attention)
    g = torch.Generator().manual_seed(7)
    dout = torch.randn(out.shape, dtype=torch.float64, generator=g).bfloat16().to(out.dtype)
    dlse = torch.randn(lse.shape, dtype=torch.float64, generator=g).float().to(lse.dtype)
    ((out * dout).sum() + (torch.where(torch.isneginf(lse), 0.0, lse) * dlse).sum()).backward()
    return {"out": out.detach(), "lse": lse.detach(), **{name: t.grad for name, t in x.items()}}


def wide(x):
    return {name: t.double() for name, t in x.items()}


CASES = (
    [Case(v) for v in VARIANTS]
    + [Case(v, B=2, H=4, Hk=2, Nq=65, Nk=131, npos=70, mask="padding", sink=True) for v in VARIANTS]
    + [Case(v, Nq=150, Nk=130, D=8, Dv=8, npos=5, storage="bnhd") for v in ("default", "keys", "per_row")]
    + [Case("default", Nq=200, Nk=200, npos=npos, mask=m) for npos in (1, 2, 64, 201) for m in ("none", "window")]
    + [Case(v, Nq=90, Nk=140, mask=m, rope=True) for v in ("default", "values") for m in ("documents", "dense", "window_sinks", "left_padding")]
    + [Case("default", Nq=130, Nk=130, sharp=20.0, npos=12), Case("per_row", Nq=130, Nk=130, sharp=5.0)]
    + [Case(v, Nq=1, Nk=90, npos=20) for v in VARIANTS]
    + [Case(v, more=(("temperature", 0.7), ("scale", 0.4), ("head_scale", 1.3))) for v in ("default", "per_row")]
    + [Case("default", Nq=3, Nk=0), Case("default", B=1, Nq=0, Nk=5)]
)


def name(case: Case) -> str:
    return f"{case.variant}-{case.Nq}-{case.Nk}-{case.npos}-{case.mask}"


@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_definition(case, dtype, isa):
    x = inputs(case, dtype)
    got, want = run(case, x), run(case, wide(x), fastpe.reference.attention)
    for what, w in want.items():
        forward, backward = compare.TOLERANCE[dtype]
        compare.close(what, got[what], w, forward if what in ("out", "lse") else backward, floor=0.1)


@pytest.mark.parametrize("case", [Case(v, Nq=130, Nk=150, npos=n) for v in VARIANTS for n in (12, 151)], ids=name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half(case, dtype, isa):
    x = inputs(case, dtype)
    got, want = run(case, x), run(case, wide(x), fastpe.reference.attention)
    own = run(case, x, compare.eager_attention)
    for what, w in want.items():
        parameter = dtype if what not in ("out", "lse") else None
        compare.close_half(what, got[what], w, own[what], floor=0.1, dtype=parameter)


GRADCHECK = [Case(v, Nq=5, Nk=7, D=8, Dv=8, npos=4, mask=m, sink=m == "window") for v in VARIANTS for m in ("none", "window")]


@pytest.mark.parametrize("case", [*GRADCHECK, Case("default", Nq=5, Nk=7, D=8, Dv=8, rope=True)], ids=name)
def test_gradcheck(case):
    x = inputs(case, torch.float64)
    names = list(x)

    def f(*tensors):
        return call(case, dict(zip(names, tensors)))

    assert torch.autograd.gradcheck(f, tuple(t.clone().requires_grad_() for t in x.values()), eps=1e-7, atol=1e-6, rtol=1e-5)


def arguments(case: Case, training: bool = True):
    caught = []
    real = torch.ops.fastpe.cope_fwd

    class Spy:
        def __call__(self, *args):
            caught.append(args)
            return real(*args)

    x = {name: t.requires_grad_(training) for name, t in inputs(case, torch.float32).items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.fastpe, "cope_fwd", Spy())
        call(case, x)
    return tuple(t.detach().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t for t in caught[0])


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("variant", VARIANTS)
def test_op(variant):
    case = Case(variant, B=2, Nq=7, Nk=9, mask="documents", rope=True, sink=True, storage="bnhd")
    args = arguments(case)
    torch.library.opcheck(torch.ops.fastpe.cope_fwd, args, test_utils=CHECKS)
    args = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in args)
    out, lse, carry, _ = torch.ops.fastpe.cope_fwd(*args)
    have = dict(zip(_cope_ops._ARGS, args))
    needs = sum(bit for what, bit in _cope_ops.NEEDS.items() if have[what] is not None)
    full = (torch.randn_like(out), torch.randn_like(lse), *args[:3], out, lse, carry, None, *args[3:-1])
    for some in (needs, needs & 5, needs & 56):
        torch.library.opcheck(torch.ops.fastpe.cope_bwd, (*full, some), test_utils=CHECKS)


@pytest.mark.parametrize("case", [Case(v, B=2, H=4, Hk=2, Nq=200, Nk=230, npos=33) for v in VARIANTS], ids=name)
def test_parts_of_the_gradient(case):
    """Each input's gradient alone is, to the bit, the one computed with all the others."""
    x = inputs(case, torch.float32)
    want = run(case, x)
    for what in x:
        some = {n: t.detach().clone().requires_grad_(n == what) for n, t in x.items()}
        out, lse = call(case, some)
        g = torch.Generator().manual_seed(7)
        dout = torch.randn(out.shape, dtype=torch.float64, generator=g).bfloat16().to(out.dtype)
        dlse = torch.randn(lse.shape, dtype=torch.float64, generator=g).float().to(lse.dtype)
        ((out * dout).sum() + (lse * dlse).sum()).backward()
        assert torch.equal(some[what].grad, want[what]), what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["default", "keys", "per_row"])
def test_repeatable(variant, dtype):
    case = Case(variant, B=2, H=4, Hk=2, Nq=300, Nk=300, npos=40)
    x = inputs(case, dtype)
    threads = torch.get_num_threads()
    want = run(case, x)
    try:
        for n in [1, 2, 3] * 6 + [threads, threads]:
            torch.set_num_threads(n)
            got = run(case, x)
            assert all(torch.equal(got[what], want[what]) for what in want)
    finally:
        torch.set_num_threads(threads)


def test_compile():
    """Carries come in blocks of 64 tokens: one graph serves every length within a block, another every length beyond."""
    torch._dynamo.reset()
    table = torch.randn(16, 12, requires_grad=True)

    def f(q, k, v):
        return fastpe.attention(q, k, v, bias=bias.Cope(table), is_causal=True)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for step, n in enumerate((70, 127, 200)):
        q, k, v = (torch.randn(1, 2, n, 16, requires_grad=True) for _ in range(3))
        grads = []
        for g in (compiled, f):
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                grads.append(torch.autograd.grad(g(q, k, v).square().sum(), (q, k, v, table)))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_saturation_skips_no_score():
    """A count past the table's end gives the last entry: the same as a table that goes on with it."""
    x = inputs(Case(Nq=300, Nk=300, npos=6), torch.float64)
    longer = torch.cat([x["table"], x["table"][:, -1:].expand(-1, 400)], dim=1)
    results = []
    for table in (x["table"], longer):
        table = table.clone().requires_grad_()
        q, k, v = (x[n].clone().requires_grad_() for n in ("query", "key", "value"))
        out = fastpe.attention(q, k, v, bias=bias.Cope(table), is_causal=True)
        out.square().sum().backward()
        results.append((out, q.grad, k.grad, v.grad, torch.cat([table.grad[:, :5], table.grad[:, 5:].sum(1, keepdim=True)], 1)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_long_counts():
    """Counts in the thousands stay exact to float32's own rounding: position by position, against float64 sums."""
    n = 4096
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, n, 8, generator=g) for _ in range(2))
    q = q[:, :, -64:]
    # A table whose entry number n is n for every query makes the bias of a row the count itself; the score's own products
    # are left out, so lse of a row that sees one key is its position.
    table = torch.zeros(8, n + 1)
    table[0] = torch.arange(n + 1)
    q[..., 0] = 1.0
    k[..., 0] = 2.0
    gates = torch.sigmoid((q.double() @ k.double().transpose(-1, -2)) * 8**-0.5)
    index = torch.arange(n - 64, n)
    gates = torch.where(torch.arange(n) <= index[:, None], gates, 0.0)
    want = gates.flip(-1).cumsum(-1).flip(-1)
    for far in (0, 1000, 4000):
        v = torch.zeros(1, 1, n, 8)
        v[0, 0, far] = 1.0
        one = bias.Cope(table, nodiv=True)
        call = bias.Call(1, 1, 64, n, True, torch.float64, torch.device("cpu"))
        dense = one.materialize_for(call, q.double(), k.double(), v.double(), torch.arange(n) <= index[:, None])
        torch.testing.assert_close(dense, want)
        # out = P of the key; log P + lse = score.
        out, lse = fastpe.attention(q * 1.0, k, v, bias=one, is_causal=True, scale=0.0, temperature=600.0, return_lse=True)
        got = (out[..., 0].double().log() + lse.double()) * 600.0
        error = (got - want[..., far]).abs().max()
        assert error < 2e-3, error


@pytest.mark.parametrize("variant", ["default", "per_row"])
def test_nan_and_inf_stay_in_their_rows(variant):
    case = Case(variant, H=1, Hk=1, Nq=100, Nk=100, npos=300)
    x = inputs(case, torch.float32)
    clean, _ = call(case, x)
    x["query"][0, 0, 40, 3] = torch.nan
    if variant == "per_row":
        x["gate_queries"][0, 0, 40, 3] = torch.nan
    x["key"][0, 0, 90, 2] = torch.inf
    out, _ = call(case, x)
    assert out[0, 0, 40].isnan().all()
    rows = [i for i in range(90) if i != 40]
    torch.testing.assert_close(out[0, 0, rows], clean[0, 0, rows], rtol=0, atol=0)


def test_module():
    x, q = torch.randn(2, 9, 32), torch.randn(2, 4, 9, 8)
    k = torch.randn(2, 2, 9, 8)
    plain = fastpe.nn.CopeBias(8, 5)
    assert not plain.table.any()
    out = fastpe.attention(q, k, k, bias=plain(), is_causal=True)
    torch.testing.assert_close(out, fastpe.attention(q, k, k, is_causal=True))
    separate = fastpe.nn.CopeBias(8, 5, separate_keys=True, d_model=32, kv_heads=2)
    torch.nn.init.normal_(separate.table)
    fastpe.attention(q, k, k, bias=separate(x), is_causal=True).square().sum().backward()
    assert separate.gate.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="d_model and kv_heads go with separate_keys"):
        fastpe.nn.CopeBias(8, 5, separate_keys=True)


def test_errors():
    q = torch.randn(1, 2, 6, 8)
    cope = bias.Cope(torch.zeros(8, 4))

    def raises(kind, text, b=cope, **kwargs):
        with pytest.raises(kind, match=text):
            fastpe.attention(q, q, q, bias=b, **({"is_causal": True} | kwargs))

    raises(ValueError, "the call is not causal", is_causal=False)
    raises(ValueError, "the call is not causal", bias.PerRowForget(q, q), is_causal=False)
    raises(ValueError, "table has 16 channels, query has 8", bias.Cope(torch.zeros(16, 4)))
    raises(ValueError, r"gate_keys must be .* \(1, 2, 6\), got \(1, 2, 5, 8\)", bias.Cope(torch.zeros(8, 4), torch.zeros(1, 2, 5, 8)))
    raises(NotImplementedError, "softcap does not go with bias Cope", softcap=5.0)
    raises(NotImplementedError, "row_scale does not go with bias Cope", row_scale=torch.ones(6))
    raises(NotImplementedError, "a temperature tensor does not go with bias Cope", temperature=torch.ones(2))
    raises(NotImplementedError, "a head_scale tensor does not go with bias PerRowForget", bias.PerRowForget(q, q), head_scale=torch.ones(2))
    with pytest.raises(ValueError, match="not from both"):
        bias.Cope(torch.zeros(8, 4), q, value_gates=True)
    with pytest.raises(ValueError, match=r"table must be \(D, npos\)"):
        bias.Cope(torch.zeros(8))
    with pytest.raises(NotImplementedError, match="depends on query and key"):
        cope.materialize(bias.Call(1, 2, 6, 6, True, torch.float32, q.device))
    with pytest.raises(NotImplementedError, match="second derivatives"):
        y = q.clone().requires_grad_()
        (g,) = torch.autograd.grad(fastpe.attention(y, y, y, bias=cope, is_causal=True).sum(), y, create_graph=True)
        g.sum().backward()


PROGRAM = """
import resource, torch, fastpe
torch.set_num_threads(2)
def call(n):
    q, k, v = (torch.randn(1, 2, n, 16, requires_grad=True) for _ in range(3))
    table = torch.randn(16, 64, requires_grad=True)
    fastpe.attention(q, k, v, bias=fastpe.bias.Cope(table), is_causal=True).sum().backward()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call(256)
start = peak()
call(4096)
print(peak() - start)
"""


def test_memory():
    """Carries are 2 heads * 4096^2 / 64 * 8 bytes = 4 MiB; one dense float32 array of a head would be 64 MiB."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40 * 1024, f"{done.stdout} KiB"
