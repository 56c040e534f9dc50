"""The speed and memory targets of the CPU kernels, measured against what a user would run otherwise.

    python benchmarks/targets.py                       # every row, about ten minutes on one core
    python benchmarks/targets.py --rows forward,limit  # some rows
    python benchmarks/targets.py --json benchmarks/results/targets.json

Every row checks its result against a peer or the reference before it is timed, prints target, measured ratio and
pass or short, and goes into the JSON file. Peers that cannot run are a row that says why.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import traceback

from timing import interleave, keep_freed_memory, machine, write_json

keep_freed_memory()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import fastpe  # noqa: E402
from fastpe import bias as B  # noqa: E402

SHAPES = {
    "S1": (1, 8, 8, 1024, 64),
    "S2": (1, 8, 8, 4096, 64),
    "S3": (1, 32, 8, 2048, 128),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS: list[dict] = []


def inputs(shape: str, dtype: torch.dtype, grad: bool = False):
    b, h, hk, n, d = SHAPES[shape]
    g = torch.Generator().manual_seed(0)
    q = torch.randn(b, h, n, d, generator=g).to(dtype)
    k = torch.randn(b, hk, n, d, generator=g).to(dtype)
    v = torch.randn(b, hk, n, d, generator=g).to(dtype)
    return [x.requires_grad_(grad) for x in (q, k, v)]


def report(row: str, case: str, target: float, value: float, *, at_most: bool = False, **extra) -> None:
    ok = value <= target if at_most else value >= target
    sign = "<=" if at_most else ">="
    print(f"{row:12s} {case:44s} {value:8.2f}  target {sign} {target:<6g} {'pass' if ok else 'short'}", flush=True)
    ROWS.append({"row": row, "case": case, "value": value, "target": target, "at_most": at_most, "pass": ok, **extra})


def check(case: str, got: torch.Tensor, want: torch.Tensor, tol: float) -> None:
    err = (got.double() - want.double()).abs().max().item() / max(want.double().abs().max().item(), 1e-30)
    if not err <= tol:
        raise AssertionError(f"{case}: wrong result, error {err:.2e} above {tol:.0e}")


def make_bias(kind: str, h: int, n: int, grad: bool = False):
    """The bias object, the dense float32 bias, and the cumulative vector where there is one."""
    if kind == "alibi":
        s = B.alibi_slopes(h).requires_grad_(grad)
        i = torch.arange(n)
        return B.Alibi(s), -s.detach()[:, None, None] * (i[:, None] - i).clamp(min=0), (s.detach()[:, None] * i)[None], [s]
    g = torch.Generator().manual_seed(1)
    if kind == "kerple":
        p = torch.rand(h, generator=g).add(0.1).requires_grad_(grad)
        a = torch.rand(h, generator=g).add(0.1).requires_grad_(grad)
        d = (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=0)
        return B.Kerple(p, a), (-p[:, None, None] * torch.log1p(a[:, None, None] * d)).detach(), None, [p, a]
    if kind == "t5":
        t = torch.randn(32, h, generator=g).requires_grad_(grad)
        bias = B.T5(t, bidirectional=False)
        idx = B.t5_bucket(torch.arange(n) - torch.arange(n)[:, None], bidirectional=False)
        return bias, t.detach()[idx].permute(2, 0, 1).contiguous(), None, [t]
    inc = (-0.05 * torch.rand(1, h, n, generator=g)).requires_grad_(grad)
    c = inc.detach().double().cumsum(-1)
    return B.Cable(inc), (c[:, :, :, None] - c[:, :, None, :]).float()[0], -c.float(), [inc]


def sdpa(q, k, v, **kw):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **kw)


def extra_columns(q, k, c, dtype):
    """q and k with the bias c_i - c_j as additional channels: one in float32, three in bf16, padded to 8."""
    d = q.shape[-1]
    one = torch.ones(*q.shape[:-1], 1)
    key = (-c if c.dim() == 3 else -c[None])[..., None] * math.sqrt(d)
    key = -key  # c holds m * j: the key term of -m (i - j)
    if dtype == torch.float32:
        cols_q, cols_k = [one], [key]
    else:
        hi = key.bfloat16().float()
        mid = (key - hi).bfloat16().float()
        cols_q, cols_k = [one, one, one], [hi, mid, key - hi - mid]
    pad = (-(d + len(cols_q))) % 8
    zero = torch.zeros(*q.shape[:-1], pad)
    qq = torch.cat([q.float(), *cols_q, zero], -1).to(dtype)
    kk = torch.cat([k.float(), *[x.expand(*k.shape[:-1], 1) for x in cols_k], zero], -1).to(dtype)
    return qq, kk


def row_forward(quick: bool) -> None:
    for dt, dtype in DTYPES.items():
        for shape in ("S1", "S2", "S3"):
            b, h, hk, n, d = SHAPES[shape]
            q, k, v = inputs(shape, dtype)
            cands = {"sdpa": lambda: sdpa(q, k, v, is_causal=True), "none": lambda: fastpe.attention(q, k, v, is_causal=True)}
            dense = {}
            for kind in ("alibi", "kerple", "t5", "cable"):
                obj, full, _, _ = make_bias(kind, h, n)
                cands[kind] = lambda obj=obj: fastpe.attention(q, k, v, bias=obj, is_causal=True)
                if kind == "alibi":
                    m = full.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf")).to(dtype)[None]
                    dense["dense"] = lambda m=m: sdpa(q, k, v, attn_mask=m)
                    check(f"{shape} {dt} alibi", cands[kind](), F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=full.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))[None], enable_gqa=h != hk), 2e-5 if dt == "fp32" else 2e-2)
            with torch.no_grad(), fastpe.config.skip_bound(0.0):
                cands.update(dense)
                if h == hk:
                    slope_col = (B.alibi_slopes(h)[:, None] * torch.arange(n))[None]
                    q2, k2 = extra_columns(q, k, slope_col, dtype)
                    v2 = F.pad(v, (0, q2.shape[-1] - d))  # the fused CPU kernel wants equal head sizes
                    cands["column"] = lambda: sdpa(q2, k2, v2, is_causal=True, scale=1 / math.sqrt(d))[..., :d]
                    check(f"{shape} {dt} column", cands["column"](), cands["alibi"](), 1e-3 if dt == "fp32" else 3e-2)
                t = interleave(cands, rounds=5 if quick else 9)
            med = {c: x["median_s"] for c, x in t.items()}
            lim = (1.4, 2.5, 1.6, 2) if dt == "fp32" else (2.5, 4.2, 2.8, 5)
            for kind in ("alibi", "kerple", "t5", "cable"):
                report("forward", f"{shape} {dt} {kind} vs SDPA causal without bias", lim[0], med["sdpa"] / med[kind])
                report("bias/none", f"{shape} {dt} {kind} forward against no bias", 1.05, med[kind] / med["none"], at_most=True)
            report("forward", f"{shape} {dt} alibi vs SDPA dense mask", lim[1], med["dense"] / med["alibi"])
            if "column" in med:
                report("forward", f"{shape} {dt} alibi vs SDPA extra column", lim[2], med["column"] / med["alibi"])


def row_flex(quick: bool) -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    for dt, dtype in DTYPES.items():
        for shape in ("S1", "S2"):
            b, h, hk, n, d = SHAPES[shape]
            q, k, v = inputs(shape, dtype)
            slopes = B.alibi_slopes(h)
            mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device="cpu")
            obj = B.Alibi(slopes)

            def mod(s, b, h, i, j):
                return s - slopes[h] * (i - j)

            with torch.no_grad(), fastpe.config.skip_bound(0.0):
                cands = {
                    "flex": lambda: compiled(q, k, v, score_mod=mod, block_mask=mask),
                    "fastpe": lambda: fastpe.attention(q, k, v, bias=obj, is_causal=True),
                }
                check(f"flex {shape} {dt}", cands["fastpe"](), cands["flex"](), 2e-4 if dt == "fp32" else 3e-2)
                t = interleave(cands, rounds=5 if quick else 9)
            report("flex", f"{shape} {dt} alibi vs FlexAttention compiled", 2 if dt == "fp32" else 5, t["flex"]["median_s"] / t["fastpe"]["median_s"])


def row_backward(quick: bool) -> None:
    for dt, dtype in DTYPES.items():
        for shape in ("S1", "S2", "S3"):
            b, h, hk, n, d = SHAPES[shape]
            q, k, v = inputs(shape, dtype, grad=True)
            do = torch.randn_like(q)

            def step(out, leaves):
                torch.autograd.grad(out, leaves, do)

            obj, _, _, leaves = make_bias("cable", h, n, grad=True)
            al, _, _, sl = make_bias("alibi", h, n, grad=True)
            fixed, _, _, _ = make_bias("cable", h, n)
            cands = {
                "sdpa": lambda: step(sdpa(q, k, v, is_causal=True), [q, k, v]),
                "cable": lambda: step(fastpe.attention(q, k, v, bias=B.Cable(leaves[0]), is_causal=True), [q, k, v, *leaves]),
                "fixed": lambda: step(fastpe.attention(q, k, v, bias=fixed, is_causal=True), [q, k, v]),
                "slopes": lambda: step(fastpe.attention(q, k, v, bias=al, is_causal=True), [q, k, v, *sl]),
                "none": lambda: step(fastpe.attention(q, k, v, is_causal=True), [q, k, v]),
            }
            with fastpe.config.skip_bound(0.0):
                t = {c: x["median_s"] for c, x in interleave(cands, rounds=5 if quick else 9).items()}
            report("fwd+bwd", f"{shape} {dt} cumulative with gradient vs SDPA", 1.5 if dt == "fp32" else 2.2, t["sdpa"] / t["cable"])
            report("bias/none", f"{shape} {dt} cumulative fwd+bwd against no bias", 1.08, t["cable"] / t["none"], at_most=True)
            report("bias/none", f"{shape} {dt} bias gradient on top of a fixed bias", 1.05, t["cable"] / t["fixed"], at_most=True)
            report("bias/none", f"{shape} {dt} learnable slopes fwd+bwd against no bias", 1.08, t["slopes"] / t["none"], at_most=True)


def row_learned(quick: bool) -> None:
    for shape in ("S1", "S2"):
        b, h, hk, n, d = SHAPES[shape]
        q, k, v = inputs(shape, torch.float32, grad=True)
        do = torch.randn_like(q)
        for kind in ("kerple", "t5"):
            obj, _, _, leaves = make_bias(kind, h, n, grad=True)
            idx = B.t5_bucket(torch.arange(n) - torch.arange(n)[:, None], bidirectional=False) if kind == "t5" else None
            dist = (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=0).float()
            hidden = torch.ones(n, n, dtype=torch.bool).triu(1)

            @torch.compile(dynamic=False)
            def formula(q, k, v, *params):
                s = q @ k.transpose(-1, -2) / math.sqrt(d)
                if kind == "kerple":
                    s = s - params[0][:, None, None] * torch.log1p(params[1][:, None, None] * dist)
                else:
                    s = s + params[0][idx].permute(2, 0, 1)
                return torch.softmax(s.masked_fill(hidden, float("-inf")), -1) @ v

            def ours(obj=obj):
                cls = B.Kerple(*leaves) if kind == "kerple" else B.T5(leaves[0], bidirectional=False)
                return fastpe.attention(q, k, v, bias=cls, is_causal=True)

            check(f"learned {kind} {shape}", ours().detach(), formula(q, k, v, *leaves).detach(), 2e-5)
            with fastpe.config.skip_bound(0.0):
                t = interleave(
                    {
                        "formula": lambda: torch.autograd.grad(formula(q, k, v, *leaves), [q, k, v, *leaves], do),
                        "fastpe": lambda: torch.autograd.grad(ours(), [q, k, v, *leaves], do),
                    },
                    rounds=5 if quick else 7,
                )
            report("learned", f"{shape} fp32 {kind} fwd+bwd vs compiled formula", 5, t["formula"]["median_s"] / t["fastpe"]["median_s"])
            torch._dynamo.reset()


def row_limit(quick: bool) -> None:
    """Share of the rate of an FMA or dot-product loop; causal FLOPs, backward 2.5 times the forward."""
    for dt, dtype in DTYPES.items():
        b, h, hk, n, d = SHAPES["S2"]
        peak = fastpe._load._C.peak_gflops(dt)
        flop = 4 * b * h * n * n * d / 2
        q, k, v = inputs("S2", dtype, grad=True)
        do = torch.randn_like(q)
        obj, _, _, _ = make_bias("alibi", h, n)
        with fastpe.config.skip_bound(0.0):
            out = fastpe.attention(q, k, v, bias=obj, is_causal=True)

            def fwd():
                with torch.no_grad():
                    fastpe.attention(q, k, v, bias=obj, is_causal=True)

            t = interleave({"fwd": fwd, "bwd": lambda: torch.autograd.grad(out, [q, k, v], do, retain_graph=True)}, rounds=5 if quick else 9)
        for part, scale, target in (("fwd", 1.0, (80, 75)), ("bwd", 2.5, (85, 80))):
            share = 100 * flop * scale / t[part]["median_s"] / 1e9 / peak
            report("limit", f"S2 {dt} {part} share of {peak:.0f} GFLOP/s, %", target[0 if dt == "fp32" else 1], share)


def row_skip(quick: bool) -> None:
    n, h, d = 16384, 8, 64
    for dt, dtype in DTYPES.items():
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, h, n, d, generator=g).to(dtype) for _ in range(3))
        obj = B.Alibi(B.alibi_slopes(h))
        with torch.no_grad():
            t = interleave(
                {"none": lambda: fastpe.attention(q, k, v, is_causal=True), "alibi": lambda: fastpe.attention(q, k, v, bias=obj, is_causal=True)},
                rounds=2 if quick else 3,
            )
        report("skip", f"N=16384 {dt} ALiBi 8 heads against no bias", 2, t["none"]["median_s"] / t["alibi"]["median_s"])


def row_documents(quick: bool) -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    n = 4096
    ids = torch.arange(n) // 512
    for dt, dtype in DTYPES.items():
        q, k, v = inputs("S2", dtype)
        mask = create_block_mask(lambda b, h, i, j: (i >= j) & (ids[i] == ids[j]), None, None, n, n, device="cpu")
        docs = fastpe.mask.documents(ids=ids)
        with torch.no_grad():
            cands = {
                "flex": lambda: compiled(q, k, v, block_mask=mask),
                "fastpe": lambda: fastpe.attention(q, k, v, mask=docs, is_causal=True),
            }
            check(f"documents {dt}", cands["fastpe"](), cands["flex"](), 1e-4 if dt == "fp32" else 3e-2)
            t = interleave(cands, rounds=5 if quick else 9)
        report("documents", f"512 in 4096 {dt} vs FlexAttention block mask", 1.5, t["flex"]["median_s"] / t["fastpe"]["median_s"])


def row_threads(quick: bool) -> None:
    for dt, dtype in DTYPES.items():
        for name, (h, n) in {"B*Hk=8": (8, 4096), "B*Hk=1": (1, 4096)}.items():
            g = torch.Generator().manual_seed(0)
            q, k, v = (torch.randn(1, h, n, 64, generator=g).to(dtype).requires_grad_() for _ in range(3))
            do = torch.randn_like(q)

            def run(threads):
                torch.set_num_threads(threads)
                torch.autograd.grad(fastpe.attention(q, k, v, is_causal=True), [q, k, v], do)

            t = interleave({"one": lambda: run(1), "two": lambda: run(2)}, rounds=5 if quick else 9, wall=True)
            torch.set_num_threads(1)
            report("threads", f"{name} {dt} fwd+bwd, two threads against one", 1.9, t["one"]["median_s"] / t["two"]["median_s"])


_MEMORY = """
import sys, torch, fastpe
from fastpe import bias as B
torch.set_num_threads(1)
n, train, dtype = int(sys.argv[1]), sys.argv[2] == "train", getattr(torch, sys.argv[3])
def make(n):
    return [torch.randn(1, 8, n, 64).to(dtype).requires_grad_(train) for _ in range(3)]
bias = B.Alibi(B.alibi_slopes(8))
def step(q, k, v):
    out = fastpe.attention(q, k, v, bias=bias, is_causal=True)
    if train:
        torch.autograd.grad(out, [q, k, v], torch.ones_like(out))
step(*make(64))
q, k, v = make(n)
rss = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
before = rss()
step(q, k, v)
# VmHWM belongs to this program alone; ru_maxrss would start at the size of the one that launched it.
peak = next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith("VmHWM"))
print((peak - before) / 2**20)
"""


def row_memory(quick: bool) -> None:
    """Peak growth of the process over its inputs; outputs and gradients are counted."""
    for dt in ("float32", "bfloat16"):
        for mode, target in (("infer", 24), ("train", 56)):
            peak = {}
            for n in (4096, 8192):
                env = {**os.environ, "MALLOC_TOP_PAD_": "0", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_MAX_": "65536"}
                r = subprocess.run([sys.executable, "-c", _MEMORY, str(n), mode, dt], capture_output=True, text=True, env=env, check=True)
                peak[n] = float(r.stdout)
            report("memory", f"S2 {dt} {mode}, MiB over inputs", target, peak[4096], at_most=True, double_length=peak[8192])
            report("memory", f"S2 {dt} {mode}, growth when N doubles", 2.2, peak[8192] / peak[4096], at_most=True)


def main() -> None:
    rows = {name[4:]: f for name, f in globals().items() if name.startswith("row_")}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(rows), help=f"comma-separated, of: {', '.join(rows)}")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    for name in args.rows.split(","):
        if name not in rows:
            parser.error(f"unknown row {name!r}; known: {', '.join(rows)}")
        try:
            rows[name](args.quick)
        except Exception as error:  # a peer that cannot run must not hide the other rows
            failed |= isinstance(error, AssertionError)
            traceback.print_exc(limit=2)
            ROWS.append({"row": name, "error": f"{type(error).__name__}: {error}"})
    if args.json:
        write_json(args.json, {"machine": machine(), "rows": ROWS})
    short = [r for r in ROWS if not r.get("pass", False)]
    print(f"{len(ROWS) - len(short)} of {len(ROWS)} rows pass")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
