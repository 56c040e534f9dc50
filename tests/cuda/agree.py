"""The forward pass of a case through the CUDA kernels, against the float64 definition."""

from __future__ import annotations

import torch

import fastpe
from fastpe import reference
from fastpe.testing.cases import build
from fastpe.testing.compare import close_half, eager_attention


def compare_forward(case, dtype, on_kernels, **options):
    """out and lse err by no more than compare.close_half allows."""
    run = build(case, dtype)
    with torch.no_grad():
        want, want_lse, _ = build(case, dtype, wide=True)(reference.attention, backward=False)
        torchs, torchs_lse, _ = build(case, dtype)(eager_attention, backward=False)
        with on_kernels(**options):
            out, lse, _ = run(fastpe.attention, backward=False)
    assert out.dtype == dtype and lse.dtype == torch.float32
    close_half("out", out, want, torchs, dtype=dtype)
    close_half("lse", lse, want_lse, torchs_lse, floor=1.0, dtype=dtype)
