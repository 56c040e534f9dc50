"""Decoding: one new query against a cache of keys, with grouped heads. Bound by reading keys and values once.

Peers: scaled_dot_product_attention with enable_gqa ("sdpa"), with the heads of a group packed as query rows ("packed"),
two batched products ("bmm"), and those under torch.compile ("compiled").
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from attend import PEER_TOLERANCE, sdpa
from registry import Case, Tensor, Work, Wrong, family

import fastpe
from fastpe.testing import compare


@family("decode", peers=("sdpa", "packed", "bmm", "compiled"), shapes=("D8",), passes=("fwd",))
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
    # One cached sequence and key head of each end: in float64 the whole cache would take gigabytes.
    group = s.H // s.Hk
    probes = [(0, 0), (s.B - 1, s.Hk - 1)]
    exact, half = [], []
    for b, h in probes:
        one = q[b : b + 1, h * group : (h + 1) * group], k[b : b + 1, h : h + 1], v[b : b + 1, h : h + 1]
        exact.append(fastpe.reference.attention(*one))
        half.append(compare.eager_attention(*one))

    def check(name: str) -> float:
        with torch.no_grad():
            out = calls[name]()
        worst = 0.0
        for (b, h), want, own in zip(probes, exact, half):
            error = compare.error(out[b : b + 1, h * group : (h + 1) * group], want)
            if name == "fastpe" and case.dtype == "fp32":
                allowed = compare.TOLERANCE[torch.float32][0]
            elif name == "fastpe":
                allowed = 2 * max(compare.error(own, want), torch.finfo(dtype).eps / 2) + 1e-5
            else:
                allowed = PEER_TOLERANCE[case.dtype][0]
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
