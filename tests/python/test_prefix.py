"""Anchored prefix sums and their continuation."""

from __future__ import annotations

import pytest
import torch

import fastpe


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values(n, reverse, dtype, isa):
    x = torch.randn(2, 3, n).to(dtype)
    c = fastpe.prefix_sum(x, reverse=reverse)
    assert c.local.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert c.local.shape == (2, 3, n) and c.base.shape == (2, 3, -(-n // 128))
    torch.testing.assert_close(c.values(), fastpe.reference.prefix_sum(x, reverse=reverse), rtol=0, atol=1e-5)


@pytest.mark.parametrize("strided", [False, True])
def test_gradient(strided):
    x = torch.randn(2, 300, 3).transpose(1, 2) if strided else torch.randn(2, 3, 300)
    x.requires_grad_()
    weight = torch.randn(2, 3, 300, dtype=torch.float64)
    (fastpe.prefix_sum(x).values() * weight).sum().backward()
    torch.testing.assert_close(x.grad.double(), weight.flip(-1).cumsum(-1).flip(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (128, 1, 127), (100, 60, 300), (0, 5, 130), (127, 1, 1), (256, 128)])
def test_append(sizes):
    x = torch.randn(2, 3, sum(sizes))
    parts = list(x.split(sizes, -1))
    c = fastpe.prefix_sum(parts[0])
    for part in parts[1:]:
        c = c.append(part)
    whole = fastpe.prefix_sum(x)
    torch.testing.assert_close(c.local, whole.local)
    torch.testing.assert_close(c.base, whole.base, rtol=1e-6, atol=1e-5)


def test_decoding_matches_the_whole_sequence():
    """One token at a time with a cache, against one call over everything."""
    module = fastpe.nn.CableBias(16, 2)
    x = torch.randn(1, 140, 16)
    q, k, v = (torch.randn(1, 2, 140, 8) for _ in range(3))
    with torch.no_grad():
        want = fastpe.attention(q, k, v, bias=module(x), is_causal=True)
        past = module(x[:, :100]).prefix
        for t in range(100, 140):
            b = module(x[:, t : t + 1], past)
            past = b.prefix
            out = fastpe.attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], bias=b, is_causal=True)
            torch.testing.assert_close(out, want[:, :, t : t + 1])


def test_difference_is_checked():
    c = fastpe.prefix_sum(torch.ones(4))
    assert c.difference(3, 1) == 2
    with pytest.raises(IndexError, match="i = 4 is outside 0..3"):
        c.difference(4, 0)
