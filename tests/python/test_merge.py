"""fastpe.merge: against attention over the union of the keys, the definition, and torch's own checks."""

from __future__ import annotations

import pytest
import torch

import fastpe
from fastpe.testing import compare

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def parts(P=3, B=2, H=2, N=7, Dv=24, dtype=torch.float64, storage="bhnd"):
    """Random outs and lses; row 2 is empty everywhere, row 4 in the first part, whose out is then not a number."""
    g = torch.Generator().manual_seed(0)
    outs, lses = [], []
    for i in range(P):
        o = torch.randn(B, H, N, Dv, generator=g, dtype=torch.float64)
        lse = 3 * torch.randn(B, H, N, generator=g, dtype=torch.float64)
        lse[..., 2] = -torch.inf
        if i == 0 and N > 4:
            lse[..., 4] = -torch.inf
            o[..., 4, :] = torch.nan
        if storage == "bnhd":
            o = o.transpose(1, 2).contiguous().transpose(1, 2)
            lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
        outs.append(o.to(dtype))
        lses.append(lse.to(torch.float64 if dtype == torch.float64 else torch.float32))
    return outs, lses


def gradients(merge, outs, lses, weights, dtype):
    """Results with random upstream gradients, which are rounded to `dtype`."""
    outs = [x.detach().requires_grad_() for x in outs]
    lses = [x.detach().requires_grad_() for x in lses]
    out, lse = merge(outs, lses, weights)
    g = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=g, dtype=torch.float64).to(dtype).to(out.dtype)
    dlse = torch.randn(lse.shape, generator=g, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32)).to(lse.dtype)
    seen = lse > -torch.inf
    ((out * dout).sum() + (lse * dlse)[seen].sum()).backward()
    return {"out": out, "lse": lse} | {f"dout{i}": x.grad for i, x in enumerate(outs)} | {f"dlse{i}": x.grad for i, x in enumerate(lses)}


@pytest.mark.parametrize("storage", ["bhnd", "bnhd"])
@pytest.mark.parametrize("weights", [None, (0.3, 1.0, 2.0)], ids=["plain", "weights"])
@pytest.mark.parametrize("n", [5, 16, 64, 65, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_definition(dtype, n, weights, storage, isa):
    outs, lses = parts(N=n, dtype=dtype, storage=storage)
    got = gradients(fastpe.merge, outs, lses, weights, dtype)
    want = gradients(fastpe.reference.merge, [x.double() for x in outs], [x.double() for x in lses], weights, dtype)
    for name, x in got.items():
        # Everything is formed in float32: half precision loses one rounding of the result and nothing else.
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(x.dtype, torch.finfo(x.dtype).eps / 2 * 1.01)
        compare.close(name, x, want[name], tolerance)
    assert (got["lse"][..., 2] == -torch.inf).all() and not got["out"][..., 2, :].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("cuts", [(30,), (64,), (1, 2, 90), (0, 50)], ids=str)
def test_union_of_keys(cuts, dtype):
    """Attention over pieces of the keys, merged, is attention over all of them: numbers and gradients."""
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, h, n, 16, generator=g, dtype=torch.float64).to(dtype) for h, n in ((4, 70), (2, 100), (2, 100)))
    edges = (0, *cuts, 100)
    keys = torch.arange(100)
    results = []
    for whole in (True, False):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        if whole:
            out, lse = fastpe.attention(*leaves, is_causal=True, return_lse=True)
        else:
            pieces = []
            for a, b in zip(edges, edges[1:]):  # an empty piece among them
                own = fastpe.mask.dense(((keys >= a) & (keys < b)).expand(70, 100))
                pieces.append(fastpe.attention(*leaves, mask=own, is_causal=True, return_lse=True))
            out, lse = fastpe.merge(*zip(*pieces))
        (out.sin().sum() + lse.cos().sum()).backward()
        results.append((out, lse, *(x.grad for x in leaves)))
    for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), *reversed(results)):
        compare.close(name, got, want, 1e-12 if dtype == torch.float64 else 1e-5)


def test_one_part_and_one_tensor():
    outs, lses = parts()
    out, lse = fastpe.merge(outs[1:2], lses[1:2])
    filled = torch.where((lses[1] == -torch.inf)[..., None], 0, outs[1])
    assert torch.equal(out, filled) and torch.equal(lse, lses[1])
    stacked = fastpe.merge(torch.stack(outs), torch.stack(lses))
    for a, b in zip(fastpe.merge(outs, lses), stacked):
        assert torch.equal(a, b)


def test_shared_part_is_expanded():
    """A part all batch entries share, as of a common prefix, needs no copy of its own for each."""
    outs, lses = parts(B=3)
    outs[0], lses[0] = outs[0][:1].expand(3, -1, -1, -1), lses[0][:1].expand(3, -1, -1)
    want = fastpe.merge([x.contiguous() for x in outs], [x.contiguous() for x in lses])
    for a, b in zip(fastpe.merge(outs, lses), want):
        assert torch.equal(a, b)


@pytest.mark.parametrize("N, B", [(0, 2), (3, 0)])
def test_nothing(N, B):
    o, lse = torch.randn(B, 2, N, 8, requires_grad=True), torch.randn(B, 2, N)
    out, total = fastpe.merge([o, o], [lse, lse])
    out.sum().backward()
    assert out.shape == (B, 2, N, 8) and total.shape == (B, 2, N) and o.grad.shape == o.shape


@pytest.mark.parametrize("weights", [None, (0.5, 1.5, 1.0)], ids=["plain", "weights"])
def test_gradcheck(weights):
    g = torch.Generator().manual_seed(3)
    outs = [torch.randn(1, 2, 3, 8, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 2, 3, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: fastpe.merge(x[:3], x[3:], weights), (*outs, *lses))


@pytest.mark.parametrize("storage", ["bhnd", "bnhd"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype, storage):
    outs, lses = parts(N=5, dtype=dtype, storage=storage)
    outs = [torch.nan_to_num(x).detach().requires_grad_(dtype == torch.float64) for x in outs]
    lses = [x.detach().clamp(min=-9).requires_grad_(dtype == torch.float64) for x in lses]
    factors = [1.0, 0.5, 2.0]
    torch.library.opcheck(torch.ops.fastpe.merge_fwd, (outs, lses, factors), test_utils=CHECKS)
    plain = [x.detach() for x in outs], [x.detach() for x in lses]
    dout, dlse = torch.randn_like(plain[0][0]), torch.randn_like(plain[1][0])
    for needs in (1, 2, 3):
        torch.library.opcheck(torch.ops.fastpe.merge_bwd, (dout, dlse, *plain, factors, needs), test_utils=CHECKS)


def test_one_output_used_and_one_input():
    outs, lses = parts(N=4)
    for used in (0, 1):
        for wanted in ("outs", "lses"):
            results = []
            for merge in (fastpe.merge, fastpe.reference.merge):
                leaves = [x.detach().requires_grad_() for x in (outs if wanted == "outs" else lses)]
                made = merge(leaves, lses) if wanted == "outs" else merge(outs, leaves)
                y = made[used]
                if y.requires_grad:
                    y[y > -torch.inf].sin().sum().backward()
                results.append([x.grad for x in leaves])
            for a, b in zip(*results):
                assert (a is None and (b is None or not b.any())) or torch.allclose(a, torch.zeros_like(a) if b is None else b, atol=1e-12)


def test_compile():
    torch._dynamo.reset()

    def f(q, k):
        half = k.shape[2] // 2
        pieces = [fastpe.attention(q, x, x, return_lse=True) for x in (k[:, :, :half], k[:, :, half:])]
        out, lse = fastpe.merge([p[0] for p in pieces], [p[1] for p in pieces], (0.9, 1.0))
        return out.sum() + lse.sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for step, (nq, nk) in enumerate([(5, 40), (9, 78), (17, 130)]):
        q, k = torch.randn(1, 2, nq, 8, requires_grad=True), torch.randn(1, 2, nk, 8, requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            got = torch.autograd.grad(compiled(q, k), (q, k))
        for a, b in zip(got, torch.autograd.grad(f(q, k), (q, k))):
            torch.testing.assert_close(a, b)


def test_repeats_bitwise():
    outs, lses = parts(P=4, N=200, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3) * 7:
            torch.set_num_threads(threads)
            results.append(gradients(fastpe.merge, outs, lses, None, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(torch.nan_to_num(x), torch.nan_to_num(other[name])), name


def test_second_derivative():
    outs, lses = parts(N=3)
    x = torch.nan_to_num(outs[0]).requires_grad_()
    out, _ = fastpe.merge([x, outs[1]], lses[:2])
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="fastpe.merge: second derivatives"):
        dx.sum().backward()


o, s = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    "error, args, message",
    [
        (ValueError, ([], []), "outs must hold at least one part, got none"),
        (ValueError, ([o, o], [s]), "there are 2 outs and 1 lses"),
        (TypeError, (3, [s]), "outs must be a sequence of tensors or one tensor, got int"),
        (TypeError, ([o, 3], [s, s]), r"outs\[1\] must be a tensor, got int"),
        (ValueError, (o, [s]), r"outs as one tensor must have 5 axes, parts first, got \(1, 2, 3, 8\)"),
        (TypeError, ([o, o.half()], [s, s]), r"outs\[1\] must be float32 beside float32 outs, got float16"),
        (TypeError, ([o.bfloat16()], [s.bfloat16()]), r"lses\[0\] must be float32 beside bfloat16 outs, got bfloat16"),
        (ValueError, ([o, o[:, :1]], [s, s]), r"outs\[1\] is \(1, 1, 3, 8\), outs\[0\] is \(1, 2, 3, 8\)"),
        (ValueError, ([o], [s[..., None]]), r"lses\[0\] must be \(B, H, N\), got \(1, 2, 3, 1\)"),
        (ValueError, ([o], [s[:, :, :2]]), r"lses\[0\] is \(1, 2, 2\), outs\[0\] is \(1, 2, 3, 8\)"),
        (ValueError, ([o.expand(1, 2, 3, 8)[..., ::2]], [s]), r"outs\[0\]'s last dimension must be contiguous, its stride is 2"),
        (TypeError, ([o], [s], torch.ones(1)), "weights must be a sequence of 1 numbers, got Tensor"),
        (ValueError, ([o], [s], [1, 1]), "weights holds 2 numbers for 1 parts"),
        (ValueError, ([o], [s], [0.0]), r"weights\[0\] must be positive, got 0"),
        (ValueError, ([o], [s], [float("nan")]), r"weights\[0\] must be finite"),
    ],
)
def test_errors(error, args, message):
    with pytest.raises(error, match="fastpe.merge: " + message):
        fastpe.merge(*args)
