"""torch's own checks of the ops: schema, fake tensors, autograd registration, tracing with dynamic shapes."""

from __future__ import annotations

import pytest
import torch

import fastpe
from fastpe import ops
from fastpe.testing.cases import Case, build

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")

CASES = [
    Case(B=2, Nq=7, Nk=9, bias="cable", mask="padding", causal=True, rope="half"),
    Case(B=2, Nq=7, Nk=9, Dv=24, bias="alibi", mask="window_sinks", storage="bnhd", score=("row_scale", "sink")),
    Case(B=3, Nq=5, Nk=5, bias="t5", mask="dense", rope="interleaved", storage="padded", score=("softcap",)),
    Case(B=2, Nq=5, Nk=11, bias="fn_log", mask="ids", storage="expanded"),
]


def arguments(case: Case, dtype=torch.float32, grad=True):
    """The arguments attention hands to attn_fwd."""
    run = build(case, dtype)
    caught = []
    real = torch.ops.fastpe.attn_fwd

    class Spy:
        def __call__(self, *args):
            caught.append(args)
            return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.fastpe, "attn_fwd", Spy())
        run(fastpe.attention, backward=False)

    def leaf(x):
        if not isinstance(x, torch.Tensor):
            return x
        fresh = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        with torch.no_grad():
            fresh.copy_(x) if 0 not in x.stride() else None
        fresh = fresh if 0 not in x.stride() else x.detach()
        return fresh.requires_grad_(grad and fresh.dtype in (torch.float32, torch.float64) and x.requires_grad)

    return tuple(leaf(x) for x in caught[0])


def name(case):
    return f"{case.bias}-{case.mask}-{case.storage}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_attn_fwd(case):
    torch.library.opcheck(torch.ops.fastpe.attn_fwd, arguments(case), test_utils=CHECKS)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_attn_bwd(case):
    args = arguments(case, grad=False)
    out, lse, _ = torch.ops.fastpe.attn_fwd(*args)
    have = dict(zip(ops._ARGS, args))
    needs = sum(bit for what, bit in ops.NEEDS.items() if have[what] is not None)
    dlse = torch.randn_like(lse)
    full = (torch.randn_like(out), dlse, *args[:3], out, lse, None, *args[3:-1])
    torch.library.opcheck(torch.ops.fastpe.attn_bwd, (*full, needs), test_utils=CHECKS)
    torch.library.opcheck(torch.ops.fastpe.attn_bwd, (*full, needs & (1 | 4)), test_utils=CHECKS)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n", [1, 127, 128, 129, 300])
def test_prefix_ops(n, reverse):
    x = torch.randn(2, 3, n, requires_grad=True)
    torch.library.opcheck(torch.ops.fastpe.prefix_sum, (x, reverse), test_utils=CHECKS)
    torch.library.opcheck(torch.ops.fastpe.cumsum_exact, (x, reverse), test_utils=CHECKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("storage", ["bhnd", "bnhd"])
def test_memory_order(storage, dtype):
    """out and the gradients come in the order of their input, so the usual transpose back costs no copy."""
    run = build(Case(H=4, Hk=2, Nq=5, Nk=6, Dv=24, storage=storage), dtype)
    inputs = [x.detach().requires_grad_() for x in run.qkv]
    out = fastpe.attention(*inputs)
    out.sum().backward()
    heads_first = storage == "bhnd"
    for x in (out, *(x.grad for x in inputs)):
        assert x.is_contiguous() == heads_first
        assert x.transpose(1, 2).is_contiguous() == (not heads_first)


def test_only_what_is_asked_for():
    """A gradient nobody needs is neither computed nor returned."""
    asked = []
    real = torch.ops.fastpe.attn_bwd

    class Spy:
        def __call__(self, *args):
            asked.append(args[-1])
            return real(*args)

    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    slopes = torch.rand(2, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.fastpe, "attn_bwd", Spy())
        fastpe.attention(q, k, v, bias=fastpe.bias.Alibi(slopes)).sum().backward()
        fastpe.attention(q, k, v.requires_grad_()).sum().backward()
        sink = torch.zeros(2, requires_grad=True)
        fastpe.attention(q, k, v.detach(), sink=sink).sum().backward()
    assert asked == [ops.NEEDS["bias_params"], ops.NEEDS["v"]]
    assert slopes.grad.shape == (2,) and sink.grad.shape == (2,)


@pytest.mark.parametrize("what", ["out", "lse"])
def test_one_output_used(what):
    case = Case(bias="cable", causal=True)
    results = []
    for attention in (fastpe.attention, fastpe.reference.attention):
        run = build(case, torch.float64)
        out, lse = attention(*run.qkv, **run.kwargs, return_lse=True)
        (out if what == "out" else lse).square().sum().backward()
        results.append(run.leaves.gradients())
    for name_ in results[0]:
        a, b = results[0][name_], results[1][name_]
        if name_ == "value" and what == "lse":
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b)


def test_saved_tensors():
    """Backward keeps q, k, v, out, lse and the parameters; nothing that grows with Nq * Nk."""
    kept = []
    run = build(Case(B=1, Nq=64, Nk=64, bias="kerple_log", causal=True, rope="half"), torch.float32)

    def pack(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        fastpe.attention(*run.qkv, **run.kwargs)
    assert max(kept) <= 64 * 64  # the largest is query, 4 heads of 64 x 16


def test_forms_are_those_of_the_kernels():
    assert fastpe.bias.FORMS["table_causal"] == 8 and set(fastpe.bias._KINDS) < set(fastpe.bias.FORMS)


