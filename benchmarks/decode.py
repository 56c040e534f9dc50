"""Decoding against what people run on a CPU: one new token for 8 sequences, 32 query heads on 8 key heads, 8192 keys, D 128.

Peers, each given the best case: packed SDPA (the group's heads as query rows, so keys are read once), two batched matrix
products, the written-out formula under torch.compile, and SDPA's own enable_gqa for scale. Then fastpe with a bias and with
regions against fastpe without, rotation included where the method has one.

    python benchmarks/decode.py [--dtype float32] [--threads 2] [--json results/decode.json]
"""

from __future__ import annotations

import argparse

import timing

timing.keep_freed_memory()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import fastpe  # noqa: E402

B, H, HK, N, D = 8, 32, 8, 8192, 128


def packed_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q.view(B, HK, H // HK, D), k, v).view(B, H, 1, D)


def bmm(q, k, v):
    s = torch.matmul(q.view(B, HK, H // HK, D), k.transpose(-1, -2)) * D**-0.5
    return torch.matmul(torch.softmax(s.float(), -1).to(v.dtype), v).view(B, H, 1, D)


def grouped_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def peers(q, k, v) -> dict:
    formula = torch.compile(bmm, dynamic=False)
    return {
        "packed SDPA": lambda: packed_sdpa(q, k, v),
        "two products": lambda: bmm(q, k, v),
        "compiled formula": lambda: formula(q, k, v),
        "SDPA enable_gqa": lambda: grouped_sdpa(q, k, v),
    }


def own(q, k, v) -> dict:
    rope = fastpe.rope.default(D)
    cable = fastpe.bias.Cable(fastpe.prefix_sum(-torch.rand(B, H, N) * 0.01))
    calls = {
        "fastpe": {},
        "fastpe, ALiBi": {"bias": fastpe.bias.Alibi(H)},
        "fastpe, Cable": {"bias": cable},
        "fastpe, RoPE on raw keys": {"rope": rope},
        "fastpe, Self-Extend on raw keys": {"rope": rope, "region": fastpe.region.self_extend(8, 1024)},
        "fastpe, DCA on raw keys": {"rope": rope, "region": fastpe.region.dual_chunk(3072, 512)},
    }
    return {name: (lambda kw=kw: fastpe.attention(q, k, v, is_causal=True, **kw)) for name, kw in calls.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="names of own calls to time, separated by |")
    parser.add_argument("--json", default="")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    dtype = getattr(torch, a.dtype)
    q = torch.randn(B, H, 1, D).to(dtype)
    k, v = (torch.randn(B, HK, N, D).to(dtype) for _ in range(2))
    calls = peers(q, k, v) | own(q, k, v)

    want = fastpe.reference.attention(q[:1], k[:1], v[:1])
    for name in ("fastpe", "packed SDPA", "two products", "compiled formula"):
        worst = float((calls[name]()[:1].double() - want).abs().max())
        assert worst < (1e-5 if a.dtype == "float32" else 5e-3), f"{name} is off by {worst}"

    if a.only:
        calls = {name: call for name, call in calls.items() if name in a.only.split("|") or name == "fastpe"}
    times = timing.interleave(calls, rounds=a.rounds, wall=a.threads > 1)
    plain = times["fastpe"]["median_s"]
    size = (k.numel() + v.numel()) * k.element_size()
    print(f"{a.dtype}, {a.threads} thread(s): keys and values {size / 2**20:.0f} MiB, read at {size / plain / 1e9:.1f} GB/s by fastpe")
    for name, t in times.items():
        print(f"{name:34s} {t['median_s'] * 1e3:8.1f} ms   spread {t['spread']:.2f}   / fastpe {t['median_s'] / plain:6.2f}")
    if a.json:
        timing.write_json(a.json, {"machine": timing.machine(), "dtype": a.dtype, "threads": a.threads, "times": times})


if __name__ == "__main__":
    main()
