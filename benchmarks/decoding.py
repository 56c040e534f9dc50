"""Decoding: one new query against a cache of keys, with grouped heads. Bound by reading keys and values once.

Peers: scaled_dot_product_attention with enable_gqa ("sdpa"), with the heads of a group packed as query rows ("packed"),
two batched products ("bmm"), and those under torch.compile ("compiled"). The other calls of fastpe say what a bias, raw keys
that are rotated in the call, and regions cost on top.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from attend import PEER_TOLERANCE, sdpa
from registry import Case, Tensor, Work, Wrong, family

import fastpe
from fastpe.testing import compare


PEERS = ("sdpa", "packed", "bmm", "compiled")
OWN = ("fastpe alibi", "fastpe cable", "fastpe rope", "fastpe self_extend", "fastpe dual_chunk")


@family("decode", peers=(*PEERS, *OWN), shapes=("D8",), passes=("fwd",))
def decode(case: Case, wanted: frozenset[str]) -> Work:
    s, dtype, device = case.shape, case.torch_dtype, case.device
    g = torch.Generator().manual_seed(0)
    q = torch.randn(s.B, s.H, s.Nq, s.D, generator=g).to(device, dtype)
    k, v = (torch.randn(s.B, s.Hk, s.Nk, s.D, generator=g).to(device, dtype) for _ in range(2))
    packed = q.view(s.B, s.Hk, -1, s.D)  # one query per head, so its heads are the rows

    def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = torch.softmax((q @ k.transpose(-1, -2)).float() * s.D**-0.5, -1)
        return p.to(v.dtype) @ v

    compiled = torch.compile(products, dynamic=False)
    calls = {
        "fastpe": lambda: fastpe.attention(q, k, v, is_causal=True),
        "sdpa": lambda: sdpa(q, k, v),
        "packed": lambda: F.scaled_dot_product_attention(packed, k, v).view_as(q),
        "bmm": lambda: products(packed, k, v).view_as(q),
        "compiled": lambda: compiled(packed, k, v).view_as(q),
    }
    slopes = fastpe.bias.alibi_slopes(s.H, device=device)
    increments = -0.01 * torch.rand(s.B, s.H, s.Nk, generator=g).to(device)
    prefix, rope = fastpe.prefix_sum(increments), fastpe.rope.default(s.D)  # a cache keeps the sums
    own = {
        "fastpe alibi": {"bias": fastpe.bias.Alibi(slopes)},
        "fastpe cable": {"bias": fastpe.bias.Cable(prefix)},
        "fastpe rope": {"rope": rope},
        "fastpe self_extend": {"rope": rope, "region": fastpe.region.self_extend(1024, 8)},
        "fastpe dual_chunk": {"rope": rope, "region": fastpe.region.dual_chunk(3072, 512)},
    }
    for name, kwargs in own.items():
        calls[name] = lambda kwargs=kwargs: fastpe.attention(q, k, v, is_causal=True, **kwargs)
    group = s.H // s.Hk

    def part(name: str, b: int, heads: slice) -> dict:
        """The arguments of one sequence and some heads."""
        if name == "fastpe alibi":
            return {"bias": fastpe.bias.Alibi(slopes[heads])}
        if name == "fastpe cable":
            return {"bias": fastpe.bias.Cable(increments[b : b + 1, heads])}
        return own.get(name, {})

    def check(name: str) -> float:
        """One sequence and key head of each end: in float64 the whole cache would take gigabytes."""
        with torch.no_grad():
            out = calls[name]()
        worst = 0.0
        for b, h in ((0, 0), (s.B - 1, s.Hk - 1)):
            heads = slice(h * group, (h + 1) * group)
            one = q[b : b + 1, heads], k[b : b + 1, h : h + 1], v[b : b + 1, h : h + 1]
            kwargs = part(name, b, heads)
            want = fastpe.reference.attention(*one, is_causal=True, **kwargs)
            error = compare.error(out[b : b + 1, heads], want)
            if not name.startswith("fastpe"):
                allowed = PEER_TOLERANCE[case.dtype][0]
            elif case.dtype == "fp32":
                allowed = compare.TOLERANCE[torch.float32][0]
            else:
                eager = compare.eager_attention(*one, is_causal=True, **kwargs)
                allowed = 2 * max(compare.error(eager, want), torch.finfo(dtype).eps / 2) + 1e-5
            if not error <= allowed:
                raise Wrong(f"error {error:.2g} of the largest entry, allowed {allowed:.2g}")
            worst = max(worst, error)
        return worst

    def timed(f):
        def call():
            with torch.no_grad():
                return f()

        return call

    read = float((k.numel() + v.numel()) * k.element_size())
    flop = 4.0 * s.B * s.H * s.Nq * s.Nk * s.D
    return Work({n: timed(f) for n, f in calls.items() if n in wanted or n == "fastpe"}, check, flop, read)
