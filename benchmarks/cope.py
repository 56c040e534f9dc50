"""Contextual positions against the written-out formula, compiled and not, and against attention without a bias.

    python benchmarks/cope.py                                # shape (1, 8, 1024, 64), npos 64 and 1024, float32, one thread
    python benchmarks/cope.py --dtype bf16 --rounds 9
    python benchmarks/cope.py --json benchmarks/results/cope.json

Results are compared before anything is timed. CPU time of the process, candidates in turn.
"""

from __future__ import annotations

import argparse

from timing import interleave, keep_freed_memory, machine, write_json

keep_freed_memory()

import torch  # noqa: E402

import fastpe  # noqa: E402

TARGET = {"forward": 5.0, "forward+backward": 4.0}


def formula(q, k, v, table, visible):
    """arXiv 2405.18719 as its listing writes it (the bias divided by sqrt(D), as in the released code)."""
    scale = q.shape[-1] ** -0.5
    logits = (q @ k.transpose(-1, -2)).float() * scale
    gates = torch.sigmoid(logits) * visible
    pos = gates.flip(-1).cumsum(-1).flip(-1).clamp(max=table.shape[1] - 1)
    low, high = pos.floor(), pos.ceil()
    z = (q.float() @ table) * scale
    share = pos - low
    bias = share * z.gather(-1, high.long()) + (1 - share) * z.gather(-1, low.long())
    s = (logits + bias).masked_fill(~visible, -torch.inf)
    return torch.softmax(s, dim=-1).to(v.dtype) @ v


def difference(got, want) -> float:
    return max(((a.double() - b.double()).abs().max() / b.double().abs().max()).item() for a, b in zip(got, want, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1,8,1024,64", help="B,H,N,D")
    parser.add_argument("--npos", default="64,1024")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", help="write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    B, H, N, D = map(int, args.shape.split(","))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(B, H, N, D, generator=g).to(dtype) for _ in range(4))
    visible = torch.ones(N, N, dtype=torch.bool).tril()
    rows = []
    for npos in map(int, args.npos.split(",")):
        # Waves: a count that one side rounds across a whole number then meets nearly the same slope on the other.
        n = torch.arange(npos) / max(npos - 1, 1)
        table = sum(torch.randn(D, 1, generator=g) * torch.cos(torch.pi * k * n) for k in (1, 2))
        leaves = [x.clone().requires_grad_() for x in (q, k, v, table)]
        torch.compiler.reset()
        peers = {"formula": formula} | ({} if args.no_compile else {"compiled": torch.compile(formula, dynamic=False)})
        calls = {
            "fastpe": lambda q, k, v, t: fastpe.attention(q, k, v, bias=fastpe.bias.Cope(t), is_causal=True),
            "no bias": lambda q, k, v, t: fastpe.attention(q, k, v, is_causal=True),
            **{name: (lambda q, k, v, t, f=f: f(q, k, v, t, visible)) for name, f in peers.items()},
        }

        def forward(f):
            with torch.no_grad():
                return f(*(x.detach() for x in leaves))

        def both(f, name):
            out = f(*leaves)
            used = leaves[:3] if name == "no bias" else leaves
            return out, *torch.autograd.grad(out, used, dout)

        want = both(calls["formula"], "formula")
        got = both(calls["fastpe"], "fastpe")
        error = difference(got, want)
        assert error < (5e-3 if args.dtype == "fp32" else 0.1), error
        del want, got
        wall = args.threads > 1
        for what, timed in (
            ("forward", {n: (lambda f=f: forward(f)) for n, f in calls.items()}),
            ("forward+backward", {n: (lambda f=f, n=n: both(f, n)) for n, f in calls.items()}),
        ):
            times = {n: t["median_s"] for n, t in interleave(timed, rounds=args.rounds, wall=wall).items()}
            for name, t in times.items():
                ratio = t / times["fastpe"]
                rows.append({"npos": npos, "what": what, "case": name, "seconds": t, "over_fastpe": ratio})
                mark = ""
                if name == ("formula" if args.no_compile else "compiled"):
                    mark = f"   target >= {TARGET[what]:g} {'pass' if ratio >= TARGET[what] else 'short'}"
                print(f"npos {npos:5d}  {what:17s} {name:9s} {1e3 * t:9.2f} ms  {ratio:6.2f} x fastpe{mark}", flush=True)
        print(f"npos {npos:5d}  largest difference to the formula {error:.1e}")
    if args.json:
        write_json(args.json, {"machine": machine(), "shape": [B, H, N, D], "dtype": args.dtype, "rows": rows})


if __name__ == "__main__":
    main()
