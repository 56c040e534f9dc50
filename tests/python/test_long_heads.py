"""Heads whose keys and values exceed a processor's own cache: blocks of queries take turns on the tiles."""

from __future__ import annotations

import pytest
import torch

import fastpe
from fastpe import bias, mask, reference
from fastpe.testing import compare

H, HK, N, D = 4, 2, 1601, 64  # 801 KiB of keys and values a head


def tensors(layout, queries=N):
    g = torch.Generator().manual_seed(3)

    def draw(heads, n):
        if layout == "bnhd":
            return torch.randn(1, n, heads, D, generator=g).transpose(1, 2).requires_grad_()
        return torch.randn(1, heads, n, D, generator=g).requires_grad_()

    table = (torch.randn(H, 400, generator=g) * 0.3).requires_grad_()
    return draw(H, queries), draw(HK, N), draw(HK, N), table


CASES = {
    "causal": {"is_causal": True},
    "window with sinks": {"mask": mask.streaming(70, 500)},
    "both sides": {},
    "documents": {"is_causal": True, "mask": mask.documents(cu_seqlens=torch.tensor([0, 700, 760, 1601]))},
}


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(name, layout):
    q, k, v, table = tensors(layout)
    kwargs = {**CASES[name], "bias": bias.RelativeTable(table, True)}
    g = torch.randn(1, H, N, D, generator=torch.Generator().manual_seed(4))
    with fastpe.tile_stats() as stats:
        out = fastpe.attention(q, k, v, **kwargs)
    assert stats.visited > 0
    got = torch.autograd.grad(out, (q, k, v, table), g)
    want_out = reference.attention(q, k, v, **kwargs)
    want = torch.autograd.grad(want_out, (q, k, v, table), g.double())
    compare.close("out", out, want_out, 2e-5)
    for what, a, b in zip(("dq", "dk", "dv", "dtable"), got, want, strict=True):
        compare.close(what, a, b, 1e-4)


def test_rows_do_not_depend_on_their_neighbours():
    """A block alone, paired with another, or split over threads: the same bits."""
    q, k, v, table = (x.detach() for x in tensors("bhnd"))
    whole = fastpe.attention(q, k, v, is_causal=True, bias=bias.Alibi(torch.rand(H)))
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            rerun = fastpe.attention(q, k, v, is_causal=True, bias=bias.RelativeTable(table, True))
            last = fastpe.attention(q[:, :, -65:], k, v, is_causal=True, bias=bias.RelativeTable(table, True))
            # 1601 = 25 blocks and one row: the last 65 rows are blocks of 64 and 1 in another place.
            compare.close("last rows", last, rerun[:, :, -65:], 1e-6)
            if n == 1:
                first = rerun
            assert torch.equal(rerun, first)
    finally:
        torch.set_num_threads(threads)
    assert torch.isfinite(whole).all()


def test_subnormals_are_flushed_only_inside():
    """Far keys under a steep slope have probabilities below 2^-126; the caller's arithmetic keeps its subnormals."""
    q, k, v, _ = (x.detach() for x in tensors("bhnd"))
    out = fastpe.attention(q, k, v, is_causal=True, bias=bias.Alibi(torch.full((H,), 0.5)))
    want = reference.attention(q, k, v, is_causal=True, bias=bias.Alibi(torch.full((H,), 0.5)))
    compare.close("out", out, want, 2e-5)
    assert (torch.tensor([1e-40]) * torch.tensor([0.5])).item() > 0
