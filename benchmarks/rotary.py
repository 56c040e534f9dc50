"""Rotary embedding: as a step of its own against the usual formula and a plain copy, and inside attention.

rotate, rotate_inplace: q and k, (B,H,N,D) memory, or (B,N,H,D) with _bnhd, in both pair layouts. "eager" and "compiled
rotary" are the formula of the LLaMA models; "copy" moves the same bytes. rope: attention with the rotation inside.
"""

from __future__ import annotations

import itertools

import torch
from attend import Attention
from registry import Case, Tensor, Work, Wrong, family

import fastpe

TOLERANCE = {"fp32": 2e-6, "bf16": 2e-2, "fp16": 4e-3}


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def apply_rotary_pos_emb(q, k, cos, sin):
    """The formula of Hugging Face's LLaMA: cos and sin (B,N,D) in q's dtype."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def _rotation(case: Case, wanted: frozenset[str], layout: str, bnhd: bool, in_place: bool) -> Work:
    s, dtype, device = case.shape, case.torch_dtype, case.device
    g = torch.Generator().manual_seed(0)

    def draw(heads: int) -> Tensor:
        x = torch.randn((s.B, s.Nk, heads, s.D) if bnhd else (s.B, heads, s.Nk, s.D), generator=g).to(device, dtype)
        return x.transpose(1, 2) if bnhd else x

    q, k = draw(s.H), draw(s.Hk)
    inv_freq = 10000.0 ** (-torch.arange(s.D // 2, dtype=torch.float64, device=device) / (s.D // 2))
    positions = torch.arange(s.Nk, dtype=torch.float64, device=device)
    angle = positions[:, None] * inv_freq
    # A model prepares its table once, and so do both sides here.
    table = torch.ops.fastpe.rope_table(positions.view(1, 1, -1), inv_freq.view(1, 1, -1), 1.0, False, False)
    which = {"half": 0, "interleaved": 1}[layout]
    wide = torch.cat((angle, angle), -1)
    cos, sin = wide.cos().to(dtype)[None], wide.sin().to(dtype)[None]
    compiled = torch.compile(apply_rotary_pos_emb, dynamic=False)
    qi, ki, qc, kc = q.clone(), k.clone(), torch.empty_like(q), torch.empty_like(k)
    inverse = itertools.cycle((False, True))

    def forth_and_back():
        torch.ops.fastpe.rotate_pair_(qi, ki, table, table, which, next(inverse))  # values stay what they are
        return qi, ki

    def copy():
        return qc.copy_(q), kc.copy_(k)

    # With the interleaved layout the peers keep the half layout: the usual code has nothing faster for it.
    calls = {
        "fastpe": forth_and_back if in_place else lambda: torch.ops.fastpe.rotate_pair(q, k, table, table, which, False),
        "eager": lambda: apply_rotary_pos_emb(q, k, cos, sin),
        "compiled rotary": lambda: compiled(q, k, cos, sin),
        "copy": copy,
    }

    if device == "cuda":

        def liger():
            from liger_kernel.transformers.rope import liger_rotary_pos_emb

            return liger_rotary_pos_emb(q.clone(), k.clone(), cos, sin)  # it writes into what it is given

        calls["liger"] = liger

    def exact(x: Tensor, layout: str) -> Tensor:
        rope = fastpe.rope.default(s.D, layout=layout)
        return fastpe.reference.apply_rotary(x, rope)

    def check(name: str) -> float:
        if name == "copy":
            return 0.0
        if name == "fastpe" and in_place:
            calls["fastpe"]()
            got = qi.clone(), ki.clone()
            calls["fastpe"]()
        else:
            got = calls[name]()
        worst = 0.0
        for y, x in zip(got, (q, k), strict=True):
            error = ((y.double() - exact(x, layout if name == "fastpe" else "half")).abs().max() / x.abs().max()).item()
            allowed = TOLERANCE[case.dtype] if name == "fastpe" else 4 * TOLERANCE[case.dtype] + 1e-3
            if not error <= allowed:
                raise Wrong(f"error {error:.2g} of the largest entry, allowed {allowed:.2g}")
            worst = max(worst, error)
        return worst

    moved = 2.0 * (q.numel() + k.numel()) * q.element_size()
    return Work({n: f for n, f in calls.items() if n in wanted or n == "fastpe"}, check, bytes=moved)


for _in_place, _bnhd, _layout in itertools.product((False, True), (False, True), ("half", "interleaved")):
    _name = "rotate" + "_inplace" * _in_place + "_bnhd" * _bnhd + "_interleaved" * (_layout == "interleaved")
    family(_name, peers=("eager", "compiled rotary", "copy", "liger"), passes=("fwd",))(
        lambda case, wanted, a=(_layout, _bnhd, _in_place): _rotation(case, wanted, *a)
    )


class _Prepared(fastpe.Rope):
    """A rope whose tables a model formed beforehand."""

    def tables(self, *args, **kwargs):
        return self.ready, self.ready


@family("rope", peers=("fastpe none", "fastpe tables", "separate", "separate eager"))
def rope(case: Case, wanted: frozenset[str]) -> Work:
    """Rotation inside attention: "fastpe tables" reads cos and sin that a model prepared, "separate" turns q and k
    beforehand, "separate eager" does so by the usual formula."""
    s = case.shape
    r = fastpe.rope.default(s.D)
    a = Attention(case, wanted, kwargs=lambda p, rows: {"rope": r})
    a.add("fastpe none", lambda: a.fused(), kwargs=lambda p, rows: {})
    positions = torch.arange(s.Nk, dtype=torch.float64, device=case.device)
    table = torch.ops.fastpe.rope_table(positions.view(1, 1, -1), r.inv_freq.to(case.device).view(1, 1, -1), 1.0, False, False)
    prepared = _Prepared(r.inv_freq)
    object.__setattr__(prepared, "ready", table)
    a.add("fastpe tables", lambda: a.fused(rope=prepared))

    def separate() -> Tensor:
        q, k = fastpe.apply_rotary_pair(a.q, a.k, r)
        return fastpe.attention(q, k, a.v, is_causal=True)

    a.add("separate", separate)
    angle = positions[:, None] * r.inv_freq.to(case.device)
    wide = torch.cat((angle, angle), -1)
    cos, sin = wide.cos().to(case.torch_dtype)[None], wide.sin().to(case.torch_dtype)[None]

    def usual() -> Tensor:
        q, k = apply_rotary_pos_emb(a.q, a.k, cos, sin)
        return fastpe.attention(q, k, a.v, is_causal=True)

    a.add("separate eager", usual)
    return a.work()
