"""fastpe.attention_mass and attention_rows: against the definition for every bias, mask and region; repeatability, memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fastpe
from fastpe.testing import compare
from fastpe.testing.cases import BIASES, MASKS, Case, build

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def prepared(case: Case, dtype: torch.dtype):
    """query, key, lse, the arguments of the call, and the same for the definition."""
    run, exact = build(case, dtype), build(case, dtype, wide=True)
    with torch.no_grad():
        _, lse = fastpe.attention(*run.qkv, **run.kwargs, return_lse=True)
    return (*run.qkv[:2], lse), run.kwargs, exact.qkv[:2], exact.kwargs


def agree(got, want, dtype, what="mass"):
    """Probabilities of rounded inputs. In half precision products are exact to float32, so only P itself is compared, but the
    turned keys and queries are rounded operands of the bfloat16 product: a score moves by 2^-8 of its size."""
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-5}.get(dtype, 3e-2)
    compare.close(what, got, want, tolerance, floor=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_plain(causal, dtype, isa):
    case = Case(H=4, Hk=2, Nq=150, Nk=193, D=32, rope="half", causal=causal)
    args, kwargs, wide, wide_kwargs = prepared(case, dtype)
    agree(fastpe.attention_mass(*args, **kwargs), fastpe.reference.attention_mass(*wide, **wide_kwargs), dtype)
    w = torch.rand(2, 1, 150)
    for rows in (1, 22, 64, 65, 150):
        got, want = (f.attention_rows for f in (fastpe, fastpe.reference))
        agree(got(*args, rows=rows, **kwargs), want(*wide, rows=rows, **wide_kwargs), dtype, "rows")
        got, want = (f.attention_mass for f in (fastpe, fastpe.reference))
        agree(got(*args, rows=rows, **kwargs), want(*wide, rows=rows, **wide_kwargs), dtype)
        for weights in (w, w[0, 0, 150 - rows :]):
            made = got(*args, rows=rows, row_weights=weights, **kwargs)
            agree(made, want(*wide, rows=rows, row_weights=weights, **wide_kwargs), dtype, "weighted")


@pytest.mark.parametrize("name", [*sorted(BIASES), "products"])
def test_every_bias(name):
    case = Case(Nq=70, Nk=70, bias=name, causal="causal" in name, mask="window_sinks", rope="interleaved")
    for dtype in (torch.float64, torch.float32):
        args, kwargs, wide, wide_kwargs = prepared(case, dtype)
        agree(fastpe.attention_mass(*args, **kwargs), fastpe.reference.attention_mass(*wide, **wide_kwargs), dtype)
    logits = fastpe.attention_rows(*args[:2], rows=9, logits=True, **kwargs)
    compare.close("logits", logits, fastpe.reference.attention_rows(*wide, rows=9, logits=True, **wide_kwargs), 1e-4, floor=1.0)


@pytest.mark.parametrize("name", sorted(MASKS))
def test_every_mask(name):
    case = Case(Nq=70, Nk=131, mask=name, bias="alibi", rope="half")
    for dtype in (torch.float64, torch.float32):
        args, kwargs, wide, wide_kwargs = prepared(case, dtype)
        agree(fastpe.attention_mass(*args, **kwargs), fastpe.reference.attention_mass(*wide, **wide_kwargs), dtype)
        agree(fastpe.attention_rows(*args, rows=70, **kwargs), fastpe.reference.attention_rows(*wide, rows=70, **wide_kwargs), dtype, "rows")


@pytest.mark.parametrize("score", ["scale", "head_scale", "row_scale", "softcap", "softcap_bias", "temperature", "sink"])
def test_every_score(score):
    case = Case(Nq=70, Nk=81, bias="alibi", causal=True, score=(score,))
    args, kwargs, wide, wide_kwargs = prepared(case, torch.float64)
    agree(fastpe.attention_mass(*args, **kwargs), fastpe.reference.attention_mass(*wide, **wide_kwargs), torch.float64)


REGIONS = {
    "self_extend": lambda: fastpe.region.self_extend(16, 4),
    "dual_chunk": lambda: fastpe.region.dual_chunk(48, 16),
    "bidirectional": lambda: fastpe.region.self_extend_bidirectional(16, 4),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", REGIONS)
def test_regions(name, dtype, isa):
    g = torch.Generator().manual_seed(5)
    q, k = (torch.randn(1, h, n, 16, generator=g, dtype=torch.float64).to(dtype) for h, n in ((4, 130), (2, 150)))
    kwargs = {"rope": fastpe.rope.default(16), "region": REGIONS[name](), "is_causal": name != "bidirectional"}
    _, lse = fastpe.attention(q, k, k, **kwargs, return_lse=True)
    agree(fastpe.attention_mass(q, k, lse, **kwargs), fastpe.reference.attention_mass(q, k, **kwargs), dtype)
    agree(fastpe.attention_rows(q, k, lse, rows=70, **kwargs), fastpe.reference.attention_rows(q, k, rows=70, **kwargs), dtype)


def test_empty_rows_add_nothing():
    q, k = torch.randn(1, 2, 70, 8), torch.randn(1, 2, 5, 8)  # the first 65 rows see nothing
    _, lse = fastpe.attention(q, k, k, is_causal=True, return_lse=True)
    mass = fastpe.attention_mass(q, k, lse, is_causal=True)
    torch.testing.assert_close(mass.sum(-1), torch.full((1, 2), 5.0))
    assert not fastpe.attention_rows(q, k, lse, rows=70, is_causal=True)[:, :, :65].any()


def test_nothing():
    q, k = torch.zeros(1, 2, 0, 8), torch.zeros(1, 2, 5, 8)
    assert torch.equal(fastpe.attention_mass(q, k, torch.zeros(1, 2, 0)), torch.zeros(1, 2, 5))
    assert fastpe.attention_mass(k, q, torch.zeros(1, 2, 5)).shape == (1, 2, 0)
    assert fastpe.attention_rows(k, k, torch.zeros(1, 2, 5), rows=0).shape == (1, 2, 0, 5)


def test_no_gradient():
    q, k = torch.randn(1, 2, 6, 8, requires_grad=True), torch.randn(1, 2, 6, 8, requires_grad=True)
    _, lse = fastpe.attention(q, k, k, return_lse=True)
    assert not fastpe.attention_mass(q, k, lse).requires_grad
    assert not fastpe.attention_rows(q, k, lse).requires_grad


def test_repeats_bitwise():
    case = Case(Nq=500, Nk=500, rope="half", bias="alibi", causal=True)
    args, kwargs, _, _ = prepared(case, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5) * 5:
            torch.set_num_threads(threads)
            results.append(fastpe.attention_mass(*args, **kwargs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, results[0]) for x in results)


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(B=2, Nq=7, Nk=11, bias="cable_bidirectional", mask="padding", rope="half", storage="bnhd")
        caught = {}
        args, kwargs, _, _ = prepared(case, dtype)
        with pytest.MonkeyPatch.context() as patch:
            ops = {name: getattr(torch.ops.fastpe, name) for name in ("attn_mass", "attn_rows")}
            for name, op in ops.items():
                patch.setattr(torch.ops.fastpe, name, lambda *a, op=op, name=name: (caught.setdefault(name, a), op(*a))[1])
            fastpe.attention_mass(*args, rows=3, **kwargs)
            fastpe.attention_rows(*args, rows=3, **kwargs)
        for name, op in ops.items():
            plain = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in caught[name])
            torch.library.opcheck(op, plain, test_utils=CHECKS)


def test_compile():
    torch._dynamo.reset()
    rope = fastpe.rope.default(8)

    def f(q, k):
        out, lse = fastpe.attention(q, k, k, rope=rope, is_causal=True, return_lse=True)
        return fastpe.attention_mass(q, k, lse, rows=4, rope=rope, is_causal=True)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for step, (nq, nk) in enumerate([(5, 40), (9, 77), (17, 130)]):
        q, k = torch.randn(1, 2, nq, 8), torch.randn(1, 2, nk, 8)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            torch.testing.assert_close(compiled(q, k), f(q, k))


PROGRAM = """
import resource, torch, fastpe
torch.set_num_threads(2)

def call(n):
    q, k = (torch.randn(1, 2, n, 16) for _ in range(2))
    fastpe.attention_mass(q, k, torch.zeros(1, 2, n), is_causal=True)

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
    assert long < 24 * 1024, f"{long} KiB at 8192 tokens"


q, s = torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5)


@pytest.mark.parametrize(
    "error, args, kwargs, message",
    [
        (TypeError, (q, q, s.bfloat16()), {}, "lse must be float32 beside float32, got bfloat16"),
        (ValueError, (q, q, s[..., :4]), {}, r"lse must be \(B, H, Nq\) beside query \(2, 2, 5, 8\), got \(2, 2, 4\)"),
        (ValueError, (q, q, s), {"rows": 6}, "rows is 6, query has 5"),
        (TypeError, (q, q, s), {"rows": 1.5}, "rows must be an integer, got float"),
        (ValueError, (q, q, s), {"rows": -1}, "rows must be at least 0, got -1"),
        (ValueError, (q, q, s), {"row_weights": torch.ones(4)}, r"row_weights is \(1, 1, 4\), the call has"),
        (ValueError, (q, q, s), {"row_weights": torch.ones(2, 5)}, r"row_weights must be \(Nq,\) or \(B, H, Nq\), got \(2, 5\)"),
        (TypeError, (q, q, s), {"row_weights": torch.ones(5, dtype=torch.int64)}, "row_weights must be float32"),
        (TypeError, (q, q, s), {"value": q}, "unknown argument value; the others are those of fastpe.attention"),
        (ValueError, (q, q[:, :1].expand(2, 3, 5, 8), s), {}, "key has 3 heads, which does not divide query's 2"),
        (NotImplementedError, (q, q, s), {"bias": fastpe.bias.Cope(torch.zeros(8, 4))}, "does not go with bias Cope"),
    ],
)
def test_errors(error, args, kwargs, message):
    with pytest.raises(error, match="fastpe.attention_mass: " + message):
        fastpe.attention_mass(*args, **kwargs)


def test_rows_errors():
    with pytest.raises(ValueError, match="fastpe.attention_rows: lse is needed for probabilities; logits=True does without"):
        fastpe.attention_rows(q, q)
    with pytest.raises(TypeError, match="fastpe.attention_rows: logits must be a bool, got int"):
        fastpe.attention_rows(q, q, s, logits=1)
