"""Dense float64 definitions of what stands beside attention(): merging, grouped softmax, attention mass."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def merge(outs, lses, weights=None) -> tuple[Tensor, Tensor]:
    """`fastpe.merge` in float64.

    >>> import torch, fastpe
    >>> outs, lses = torch.randn(3, 1, 2, 4, 8), torch.randn(3, 1, 2, 4)
    >>> got, want = fastpe.merge(outs, lses), fastpe.reference.merge(outs, lses)
    >>> all(torch.allclose(a.double(), b, atol=1e-5) for a, b in zip(got, want))
    True
    """
    outs, lses = (x if isinstance(x, Tensor) else torch.stack(list(x)) for x in (outs, lses))
    outs, lses = outs.double(), lses.double()
    c = [1.0] * len(outs) if weights is None else list(weights)
    x = lses * torch.tensor(c, dtype=torch.float64, device=lses.device).reshape(-1, 1, 1, 1)
    # Rows shifted by their maximum; an empty row by 0, so that no -inf meets -inf.
    top = x.detach().amax(0)
    top = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    e = torch.exp(x - top)
    total = e.sum(0)
    empty = total == 0
    total = torch.where(empty, torch.ones_like(total), total)
    has = (lses != -torch.inf)[..., None]
    out = ((e / total)[..., None] * torch.where(has, outs, torch.zeros_like(outs))).sum(0)
    return out, torch.where(empty, -torch.inf, top + torch.log(total))
