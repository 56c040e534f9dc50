"""Landmark attention against causal attention of the same shapes: what the second level of the softmax costs.

    python benchmarks/landmark.py                            # shapes (1, 8, 1024 and 4096, 64), float32 and bf16, one thread
    python benchmarks/landmark.py --every 51 --rounds 9
    python benchmarks/landmark.py --json benchmarks/results/landmark.json

The result is compared with the definition before anything is timed. CPU time of the process, candidates in turn.
"""

from __future__ import annotations

import argparse

from timing import interleave, keep_freed_memory, machine, write_json

keep_freed_memory()

import torch  # noqa: E402

import fastpe  # noqa: E402

TARGET = 1.3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check(every: int, dtype: torch.dtype) -> float:
    """The largest difference to the definition, relative to the largest entry."""
    q, k, v = (torch.randn(1, 2, 300, 64).to(dtype) for _ in range(3))
    is_landmark = torch.arange(300) % every == every - 1
    got = fastpe.landmark_attention(q, k, v, is_landmark).double()
    want = fastpe.reference.landmark_attention(q, k, v, is_landmark)
    return float((got - want).abs().max() / want.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="1,8,1024,64 1,8,4096,64", help="B,H,N,D separated by blanks")
    parser.add_argument("--every", default="51,64", help="lengths of a block with its landmark; 51 and 64 are the released models'")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name in args.dtypes.split(","):
        dtype = DTYPES[name]
        for every in map(int, args.every.split(",")):
            error = check(every, dtype)
            assert error < (2e-5 if name == "fp32" else 2e-2), error
        for shape in args.shapes.split():
            B, H, N, D = map(int, shape.split(","))
            q, k, v, dout = (torch.randn(B, H, N, D).to(dtype) for _ in range(4))
            leaves = [x.requires_grad_() for x in (q, k, v)]
            calls = {"causal": lambda: fastpe.attention(*leaves, is_causal=True)}
            for every in map(int, args.every.split(",")):
                is_landmark = torch.arange(N) % every == every - 1
                calls[f"landmark {every}"] = lambda m=is_landmark: fastpe.landmark_attention(*leaves, m)

            def forward(call):
                with torch.no_grad():
                    return call()

            def both(call):
                return torch.autograd.grad(call(), leaves, dout)

            for what, run in (("forward", forward), ("forward+backward", both)):
                times = interleave({n: (lambda c=c: run(c)) for n, c in calls.items()}, rounds=args.rounds)
                base = times["causal"]["median_s"]
                for case, t in times.items():
                    ratio = t["median_s"] / base
                    rows.append({"dtype": name, "shape": [B, H, N, D], "what": what, "case": case, "seconds": t["median_s"], "over_causal": ratio})
                    mark = f"   target <= {TARGET:g} {'pass' if ratio <= TARGET else 'short'}" if what != "forward" and case != "causal" else ""
                    print(f"{name} {shape:12s} {what:17s} {case:12s} {1e3 * t['median_s']:9.2f} ms  {ratio:5.2f} x causal{mark}", flush=True)
    if args.json:
        write_json(args.json, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
