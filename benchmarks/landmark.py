"""Landmark attention (arXiv 2305.16300) against causal attention of the same shape: what the second level of the softmax costs.

The number is the length of a block with its landmark; 51 and 64 are those of the released models.
"""

from __future__ import annotations

import torch
from registry import PASSES, Case, Tensor, Work, Wrong, family

import fastpe
from fastpe.testing import compare

TOLERANCE = {"fp32": compare.TOLERANCE[torch.float32], "bf16": (2e-2, 4e-2)}


def _landmark(every: int):
    def build(case: Case, wanted: frozenset[str]) -> Work:
        s, dtype = case.shape, case.torch_dtype
        g = torch.Generator().manual_seed(0)
        sizes = [(s.B, h, s.Nk, s.D) for h in (s.H, s.Hk, s.Hk, s.H)]
        q, k, v, dout = (torch.randn(x, generator=g).to(case.device, dtype) for x in sizes)
        leaves = [x.requires_grad_(case.trains) for x in (q, k, v)]
        is_landmark = torch.arange(s.Nk, device=case.device) % every == every - 1
        attend = {
            "fastpe": lambda: fastpe.landmark_attention(q, k, v, is_landmark),
            "fastpe none": lambda: fastpe.attention(q, k, v, is_causal=True),
        }
        definition = {
            "fastpe": lambda *x: fastpe.reference.landmark_attention(*x, is_landmark),
            "fastpe none": lambda *x: fastpe.reference.attention(*x, is_causal=True),
        }

        def check(name: str) -> float:
            """One head: a gradient that is zero in the others leaves theirs out."""
            head = [x.detach()[:1, :1].double().requires_grad_(case.trains) for x in (q, k, v)]
            want = definition[name](*head)
            with torch.set_grad_enabled(case.trains):
                out = attend[name]()
            got, exact = [out.detach()[:1, :1]], [want.detach()]
            if case.trains:
                probe = torch.zeros_like(dout)
                probe[:1, :1] = dout[:1, :1]
                dq, dk, dv = torch.autograd.grad(out, leaves, probe)
                got += [dq[:1, :1], dk[:1, :1], dv[:1, :1]]
                exact += torch.autograd.grad(want, head, dout[:1, :1].double())
            worst = 0.0
            for i, (x, w) in enumerate(zip(got, exact, strict=True)):
                error, allowed = compare.error(x, w), TOLERANCE[case.dtype][i > 0]
                if not error <= allowed:
                    raise Wrong(f"{'out' if i == 0 else f'gradient {i} of 3'}: error {error:.2g} of the largest entry, allowed {allowed:.2g}")
                worst = max(worst, error)
            return worst

        def timed(f):
            def call() -> Tensor | tuple[Tensor, ...]:
                if case.trains:
                    return torch.autograd.grad(f(), leaves, dout)
                with torch.no_grad():
                    return f()

            return call

        flop = s.flop * PASSES[case.pass_]
        return Work({n: timed(f) for n, f in attend.items() if n in wanted or n == "fastpe"}, check, flop)

    return build


for _every in (51, 64):
    family(f"landmark{_every}", peers=("fastpe none",), shapes=("XS", "S1", "S2"))(_landmark(_every))
