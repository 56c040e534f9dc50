"""Speed of the CUDA kernels on one GPU, beside what a user would run otherwise.

    python benchmarks/gpu.py --json results/gpu.json           # every row, some minutes
    python benchmarks/gpu.py --rows forward,bias --length 4096

Peers: scaled_dot_product_attention with each of its back ends, FlexAttention compiled, flash-linear-attention's
forgetting attention where it is installed. Candidates alternate in one process; a round is timed by events around as
many calls as fill 20 ms, and the median of 7 rounds counts. FLOP are 4 B H Nq Nk D, half of it for causal, 2.5 times
for the backward pass. Inputs are random and together larger than the L2 cache. Every candidate's result is checked
against the first one's before it is timed; a peer that cannot run is a row that says why.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from timing import machine, write_json

import fastpe
from fastpe import bias as B

Tensor = torch.Tensor
ROWS: list[dict] = []
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}


def inputs(B_: int, H: int, N: int, D: int, grad: bool, Hk: int | None = None) -> list[Tensor]:
    g = torch.Generator("cuda").manual_seed(0)
    shapes = ((B_, H, N, D), (B_, Hk or H, N, D), (B_, Hk or H, N, D))
    return [torch.randn(*s, device="cuda", dtype=torch.bfloat16, generator=g).requires_grad_(grad) for s in shapes]


def once(call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def interleave(calls: dict, rounds: int = 7) -> dict[str, dict[str, float]]:
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        repeats[name] = max(1, min(200, int(20 / max(once(call), 1e-3))))
    samples: dict[str, list[float]] = {name: [] for name in calls}

    def many(name):
        for _ in range(repeats[name]):
            calls[name]()

    for _ in range(rounds):
        for name in calls:
            samples[name].append(once(lambda: many(name)) / repeats[name])
    return {n: {"ms": statistics.median(s), "spread": (max(s) - min(s)) / statistics.median(s)} for n, s in samples.items()}


def compare(row: str, case: str, candidates: dict, flop: float | None, tolerance: float = 0.03) -> None:
    """candidates: name -> function that returns a tensor or a tuple of tensors. The first is fastpe's."""
    want, usable = None, {}
    for name, call in candidates.items():
        try:
            got = call()
            got = got[0] if isinstance(got, tuple) else got
            torch.cuda.synchronize()
        except Exception as error:  # a peer that does not run here
            if want is None:
                raise
            text = (str(error).splitlines() or [type(error).__name__])[0][:160]
            ROWS.append({"row": row, "case": case, "name": name, "error": text})
            print(f"{row:10s} {case:44s} {name:22s} not run: {text}", flush=True)
            continue
        if want is None:
            want = got.float()
        else:
            wrong = float((got.float() - want).abs().max() / want.abs().max())
            if not wrong <= tolerance:
                raise AssertionError(f"{row} {case}: {name} differs from fastpe by {wrong:.3g} of the largest entry")
        usable[name] = call
    for name, t in interleave(usable).items():
        rate = flop / t["ms"] / 1e9 if flop else None
        ROWS.append({"row": row, "case": case, "name": name, **t, "tflops": rate})
        print(f"{row:10s} {case:44s} {name:22s} {t['ms']:9.3f} ms {f'{rate:7.0f} TFLOP/s' if rate else '':16s} spread {t['spread']:.2f}", flush=True)


def backward_of(call, leaves):
    out = call()
    out = out[0] if isinstance(out, tuple) else out
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def sdpa(q, k, v, backend, **kw):
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **kw)


def forward(n: int) -> None:
    for D, H in ((64, 32), (128, 16)):
        for causal in (False, True):
            b = max(1, 16384 // n)
            q, k, v = inputs(b, H, n, D, False)
            flop = 4 * b * H * n * n * D / (2 if causal else 1)
            calls = {"fastpe": lambda: fastpe.attention(q, k, v, is_causal=causal)}
            calls |= {f"sdpa {name}": (lambda s: lambda: sdpa(q, k, v, s, is_causal=causal))(s) for name, s in SDPA.items()}
            compare("forward", f"N {n}, D {D}, {'causal' if causal else 'all'}", calls, flop)


def backward(n: int) -> None:
    for D, H in ((64, 32), (128, 16)):
        b = max(1, 16384 // n)
        q, k, v = inputs(b, H, n, D, True)
        flop = 2.5 * 4 * b * H * n * n * D / 2
        calls = {"fastpe": backward_of(lambda: fastpe.attention(q, k, v, is_causal=True), (q, k, v))}
        for name, s in SDPA.items():
            try:
                calls[f"sdpa {name}"] = backward_of(lambda: sdpa(q, k, v, s, is_causal=True), (q, k, v))
            except RuntimeError as error:
                ROWS.append({"row": "backward", "case": f"N {n}, D {D}", "name": f"sdpa {name}", "error": str(error).splitlines()[0]})
        compare("backward", f"N {n}, D {D}, causal", calls, flop, tolerance=0.1)


def _flex(score_mod, n: int):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device="cuda")
    return torch.compile(lambda q, k, v: flex_attention(q, k, v, score_mod=score_mod, block_mask=block), dynamic=False)


def bias(n: int) -> None:
    for D, H in ((64, 32), (128, 16)):
        b = max(1, 16384 // n)
        q, k, v = inputs(b, H, n, D, False)
        flop = 4 * b * H * n * n * D / 2
        slopes = B.alibi_slopes(H).cuda()
        gates = torch.full((b, H, n), -0.01, device="cuda")
        p, a = torch.rand(H, device="cuda") + 0.1, torch.rand(H, device="cuda") + 0.1
        table = torch.randn(32, H, device="cuda")
        none = {"fastpe, no bias": lambda: fastpe.attention(q, k, v, is_causal=True)}
        for name, x in (("ALiBi", B.Alibi(slopes)), ("Cable", B.Cable(gates)), ("KERPLE", B.Kerple(p, a)), ("T5", B.T5(table, False))):
            with fastpe.config.skip_bound(0.0):
                compare("bias", f"{name}, nothing skipped, N {n}, D {D}", {"fastpe": lambda: fastpe.attention(q, k, v, bias=x, is_causal=True)}, flop)
            compare("bias", f"{name}, N {n}, D {D}", {"fastpe": lambda: fastpe.attention(q, k, v, bias=x, is_causal=True)}, flop)
        compare("bias", f"none, N {n}, D {D}", none, flop)
        flex = _flex(lambda s, b_, h, i, j: s + slopes[h] * (j - i), n)
        compare("bias", f"ALiBi against FlexAttention, N {n}, D {D}", {"fastpe": lambda: fastpe.attention(q, k, v, bias=B.Alibi(slopes), is_causal=True), "flex": lambda: flex(q, k, v)}, flop)


def bias_backward(n: int) -> None:
    for D, H in ((64, 32), (128, 16)):
        b = max(1, 16384 // n)
        q, k, v = inputs(b, H, n, D, True)
        flop = 2.5 * 4 * b * H * n * n * D / 2
        gates = torch.full((b, H, n), -0.01, device="cuda", requires_grad=True)
        slopes = B.alibi_slopes(H).cuda().requires_grad_()
        table = torch.randn(32, H, device="cuda", requires_grad=True)

        def call(x):
            return fastpe.attention(q, k, v, bias=x, is_causal=True)

        calls = {
            "fastpe, no bias": backward_of(lambda: call(None), (q, k, v)),
        }
        compare("bias_bwd", f"none, N {n}, D {D}", calls, flop)
        for name, make, leaf in (("Cable", lambda: B.Cable(gates), gates), ("ALiBi", lambda: B.Alibi(slopes), slopes), ("T5", lambda: B.T5(table, False), table)):
            compare("bias_bwd", f"{name} with its gradient, N {n}, D {D}", {"fastpe": backward_of(lambda: call(make()), (q, k, v, leaf))}, flop)
    try:
        from fla.ops.forgetting_attn import parallel_forgetting_attn
    except ImportError:
        ROWS.append({"row": "bias_bwd", "case": "forgetting attention", "name": "flash-linear-attention", "error": "not installed"})
        return
    H, D = 16, 128
    q, k, v = inputs(1, H, n, D, True)
    log_gates = torch.full((1, H, n), -0.01, device="cuda", requires_grad=True)
    by_token = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    gates = log_gates.detach().transpose(1, 2).contiguous().requires_grad_()
    mine = backward_of(lambda: fastpe.attention(q, k, v, bias=B.Forget(log_gates), is_causal=True), (q, k, v, log_gates))
    theirs = backward_of(lambda: parallel_forgetting_attn(*by_token, gates), (*by_token, gates))
    compare("bias_bwd", f"forgetting attention, N {n}, D {D}", {"fastpe": mine, "flash-linear-attention": lambda: theirs()[0].transpose(1, 2)}, None, tolerance=0.1)


def rotation(n: int) -> None:
    for length in (1024, 4096, n):
        b, H, D = max(1, 16384 // length), 16, 128
        q, k, v = inputs(b, H, length, D, False)
        rope = fastpe.rope.default(D)

        def apart():
            return fastpe.attention(*fastpe.apply_rotary_pair(q, k, rope), v, is_causal=True)

        compare("rotation", f"N {length}, D {D}, causal", {"fastpe, inside": lambda: fastpe.attention(q, k, v, rope=rope, is_causal=True), "fastpe, apart": apart}, None)


TABLE = {f.__name__: f for f in (forward, backward, bias, bias_backward, rotation)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(TABLE))
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a GPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    start = time.time()
    failed = []
    for name in args.rows.split(","):
        try:
            TABLE[name](args.length)
        except Exception as error:  # the other rows still count
            failed.append(f"{name}: {type(error).__name__}: {error}")
            print(failed[-1], flush=True)
        torch.cuda.empty_cache()
    facts = machine() | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    if args.json:
        write_json(args.json, {"machine": facts, "seconds": round(time.time() - start), "failed": failed, "rows": ROWS})
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
