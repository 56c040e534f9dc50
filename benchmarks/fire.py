"""FIRE against its formula as one would write it in torch, compiled.

    python benchmarks/fire.py                                # both directions, about two minutes
    python benchmarks/fire.py --json benchmarks/results/fire.json
"""

from __future__ import annotations

import argparse
import math

from timing import interleave, keep_freed_memory, machine, write_json

keep_freed_memory()

import torch  # noqa: E402

import fastpe  # noqa: E402

SHAPE = (1, 8, 1024, 64)  # batch, heads, tokens, head size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    b, h, n, d = SHAPE
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(b, h, n, d, generator=g) for _ in range(4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    mlp = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.ReLU(), torch.nn.Linear(32, h))
    c, length = torch.tensor(0.1, requires_grad=True), torch.tensor(512.0, requires_grad=True)
    leaves = [q, k, v, *mlp.parameters(), c, length]
    position = torch.arange(n, dtype=torch.float32)
    distance = position[:, None] - position
    hidden = distance < 0

    @torch.compile(dynamic=False)
    def formula(q, k, v, w1, b1, w2, b2, c, length):
        x = torch.log((c * distance).abs() + 1) / (torch.log((c * torch.maximum(position[:, None], length)).abs() + 1) + 1e-6)
        bias = torch.relu(x[..., None] * w1[:, 0] + b1) @ w2.T + b2
        s = q @ k.transpose(-1, -2) / math.sqrt(d) + bias.permute(2, 0, 1)
        return torch.softmax(s.masked_fill(hidden, float("-inf")), -1) @ v

    def fused():
        return fastpe.attention(q, k, v, bias=fastpe.bias.Fire.from_mlp(mlp, c, length), is_causal=True)

    def written():
        return formula(*leaves)

    error = (fused() - written()).abs().max().item()
    assert error < 2e-5, error
    for a, w in zip(torch.autograd.grad(fused(), leaves, do), torch.autograd.grad(written(), leaves, do)):
        assert (a - w).abs().max() <= 1e-3 * (1 + w.abs().max()), (a - w).abs().max()
    rows = {}
    with torch.no_grad():
        rows["forward"] = 8.0, interleave({"formula": written, "fastpe": fused}, rounds=args.rounds)
    rows["forward+backward"] = 12.0, interleave(
        {
            "formula": lambda: torch.autograd.grad(written(), leaves, do),
            "fastpe": lambda: torch.autograd.grad(fused(), leaves, do),
            "no bias": lambda: torch.autograd.grad(fastpe.attention(q, k, v, is_causal=True), [q, k, v], do),
        },
        rounds=args.rounds,
    )
    found = []
    for name, (target, t) in rows.items():
        ratio = t["formula"]["median_s"] / t["fastpe"]["median_s"]
        times = ", ".join(f"{who} {1e3 * x['median_s']:.1f} ms" for who, x in t.items())
        print(f"{name:18s} {ratio:6.1f} times the compiled formula  target >= {target:g}  {'pass' if ratio >= target else 'short'}  ({times})")
        found.append({"case": name, "ratio": ratio, "target": target, "pass": ratio >= target, "times": t})
    if args.json:
        write_json(args.json, {"machine": machine(), "shape": SHAPE, "rows": found})


if __name__ == "__main__":
    main()
