"""Rotary embedding of q and k against the eager and the compiled formula, and against a plain copy.

    python benchmarks/rotary.py [--dtype float32 bfloat16] [--rounds 15] [--no-compile] [--json FILE]

Candidates alternate in one process on one thread; figures are medians of ratios of process CPU time, with the quartiles
in brackets. Every candidate's result is compared with a float64 rotation before it is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

# Freed memory stays in the process: otherwise whoever allocates more pays for fresh pages in every round.
_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34), "MALLOC_TOP_PAD_": str(1 << 28)}
if __name__ == "__main__" and any(os.environ.get(k) != v for k, v in _MALLOC.items()):
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_MALLOC})

import torch

import fastpe

SHAPES = {  # (B, H, Hk, N, D)
    "S1": (1, 8, 8, 1024, 64),
    "S2": (1, 8, 8, 4096, 64),
    "S3": (1, 32, 8, 2048, 128),
}


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def apply_rotary_pos_emb(q, k, cos, sin):
    """The formula of Hugging Face's LLaMA: cos and sin (B,N,D) in q's dtype."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def cpu_time(f: Callable[[], object], repeat: int) -> float:
    start = time.process_time()
    for _ in range(repeat):
        f()
    return (time.process_time() - start) / repeat


def measure(candidates: dict[str, Callable[[], object]], rounds: int, seconds: float = 0.04) -> dict[str, list[float]]:
    repeat = {}
    for name, f in candidates.items():
        f()
        repeat[name] = max(1, int(seconds / max(cpu_time(f, 2), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, f in candidates.items():
            times[name].append(cpu_time(f, repeat[name]))
    return times


def ratio(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of a / b, round by round."""
    q = statistics.quantiles([x / y for x, y in zip(a, b, strict=True)], n=4)
    return q[1], q[0], q[2]


def run_case(shape: str, dtype: torch.dtype, token_major: bool, layout: int, rounds: int, compiled: bool) -> dict:
    B, H, Hk, N, D = SHAPES[shape]
    g = torch.Generator().manual_seed(0)

    def make(heads: int) -> torch.Tensor:
        size = (B, N, heads, D) if token_major else (B, heads, N, D)
        x = torch.randn(size, generator=g).to(dtype)
        return x.transpose(1, 2) if token_major else x

    q, k = make(H), make(Hk)
    inv_freq = 10000.0 ** (-torch.arange(D // 2, dtype=torch.float64) / (D // 2))
    positions = torch.arange(N, dtype=torch.float64)
    table = torch.ops.fastpe.rope_table(positions.view(1, 1, N), inv_freq.view(1, 1, -1), 1.0, False, False)
    angle = positions[:, None] * inv_freq
    full = torch.cat((angle, angle), dim=-1) if layout == 0 else angle.repeat_interleave(2, dim=-1)

    # With the interleaved layout the eager formula stays that of the half layout: the usual code has no faster one.
    half_cos = torch.cat((angle, angle), -1).cos().to(dtype)[None]
    half_sin = torch.cat((angle, angle), -1).sin().to(dtype)[None]
    candidates: dict[str, Callable[[], object]] = {
        "eager": lambda: apply_rotary_pos_emb(q, k, half_cos, half_sin),
        "fastpe": lambda: torch.ops.fastpe.rotate_pair(q, k, table, table, layout, False),
    }
    if compiled:
        torch.compiler.reset()  # past its limit of recompilations the compiler would quietly run the eager formula
        f = torch.compile(apply_rotary_pos_emb, dynamic=False)
        candidates["compiled"] = lambda: f(q, k, half_cos, half_sin)

    def exact(x: torch.Tensor) -> torch.Tensor:
        x = x.double()
        if layout == 0:
            return x * full.cos() + rotate_half(x) * full.sin()
        turned = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
        return x * full.cos() + turned * full.sin()

    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for got, x in zip(candidates["fastpe"](), (q, k), strict=True):
        torch.testing.assert_close(got.double(), exact(x), rtol=0, atol=tolerance * float(x.abs().max()))
    if layout == 0:
        for got, x in zip(candidates["eager"](), (q, k), strict=True):
            torch.testing.assert_close(got.double(), exact(x), rtol=0, atol=4 * tolerance * float(x.abs().max()) + 1e-3)

    # In place: forth and back again, so that values stay what they are; each call counts once.
    qi, ki = q.clone(), k.clone()
    state = {"inverse": False}

    def in_place() -> None:
        torch.ops.fastpe.rotate_pair_(qi, ki, table, table, layout, state["inverse"])
        state["inverse"] = not state["inverse"]

    candidates["fastpe in place"] = in_place
    qc, kc = torch.empty_like(q), torch.empty_like(k)

    def copy() -> None:
        qc.copy_(q)
        kc.copy_(k)

    candidates["copy"] = copy
    t = measure(candidates, rounds)
    bytes_moved = 2 * (q.numel() + k.numel()) * q.element_size()
    peers = [p for p in ("eager", "compiled") if p in t]
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "order": "BNHD" if token_major else "BHND",
        "layout": "interleaved" if layout else "half",
        "out_of_place": {p: ratio(t[p], t["fastpe"]) for p in peers},
        "in_place": {p: ratio(t[p], t["fastpe in place"]) for p in peers},
        "share_of_copy": {"out_of_place": ratio(t["copy"], t["fastpe"]), "in_place": ratio(t["copy"], t["fastpe in place"])},
        "gb_per_s": {name: bytes_moved / statistics.median(v) / 1e9 for name, v in t.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"instruction set {fastpe.info()['isa']}, torch {torch.__version__}; times of the peer divided by fastpe's")
    for shape in args.shape:
        for dtype in args.dtype:
            for token_major in (False, True):
                for layout in (0, 1):
                    r = run_case(shape, getattr(torch, dtype), token_major, layout, args.rounds, not args.no_compile)
                    rows.append(r)

                    def show(d: dict) -> str:
                        return "  ".join(f"{p} {m:5.2f} [{lo:.2f}, {hi:.2f}]" for p, (m, lo, hi) in d.items())

                    print(f"{r['shape']} {r['dtype']:8} {r['order']} {r['layout']:11} out of place: {show(r['out_of_place'])} | in place: {show(r['in_place'])}"
                          f" | of copy: {r['share_of_copy']['out_of_place'][0]:.2f}, {r['share_of_copy']['in_place'][0]:.2f}", flush=True)
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"info": fastpe.info(), "rows": rows}, f, indent=1)


if __name__ == "__main__":
    main()
