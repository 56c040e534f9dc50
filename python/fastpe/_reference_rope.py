"""Rotation by its definition: plain torch, float64."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str = "half", inverse: bool = False) -> Tensor:
    """Turns pairs of channels of x by the angles whose cosines and sines are given.

    Pair (a, b) becomes ``(a cos - b sin, a sin + b cos)``; in the cosine layout channel a becomes ``a cos`` and ``a sin``, the
    sines after all cosines. Channels beyond the pairs are copied. RoFormer, arXiv 2104.09864.

    Args:
        x: ``(B, H, N, D)``.
        cos, sin: ``(B|1, H|1, N, J)``, amplitude included.
        layout: "half", "interleaved" or "cosine".
        inverse: turn the other way; for the cosine layout the transpose, from 2D channels back to D.

    Returns:
        float64, x's shape (``(B, H, N, 2D)`` for cosine).

    >>> import math, torch
    >>> from fastpe._reference_rope import rotate
    >>> quarter = torch.tensor(math.pi / 2).view(1, 1, 1, 1)
    >>> rotate(torch.tensor([[[[1.0, 0.0, 5.0]]]]), quarter.cos(), quarter.sin()).abs().round().tolist()
    [[[[0.0, 1.0, 5.0]]]]
    """
    x, cos, sin = x.double(), cos.double(), sin.double()
    pairs = cos.shape[-1]
    if layout == "cosine":
        if inverse:
            return x[..., :pairs] * cos + x[..., pairs:] * sin
        return torch.cat((x * cos, x * sin), -1)
    if inverse:
        sin = -sin
    turning, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if layout == "half":
        a, b = turning[..., :pairs], turning[..., pairs:]
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    elif layout == "interleaved":
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        raise ValueError(f"rotate: layout must be 'half', 'interleaved' or 'cosine', got {layout!r}")
    return torch.cat((turned, rest), -1)
