"""Anchored prefix sums: exactness at length, both directions, every instruction set."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

ops = torch.ops.fastpe
BLOCK = 128


def value(local: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    return local.double() + base.repeat_interleave(BLOCK, -1)[..., : local.shape[-1]]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("N", [1, 2, 127, 128, 129, 256, 1000])
def test_against_rational_sums(isa, N, dtype, reverse):
    torch.manual_seed(N)
    x = torch.randn(2, N, dtype=dtype)
    local, base = ops.prefix_sum(x, reverse)
    plain = ops.cumsum_exact(x, reverse)
    assert local.dtype == plain.dtype == dtype and base.dtype == torch.float64
    assert local.shape == x.shape and base.shape == (2, math.ceil(N / BLOCK))
    for row in range(2):
        numbers = [Fraction(v) for v in x[row].double().tolist()]
        if reverse:
            numbers.reverse()
        sums, total = [], Fraction(0)
        for v in numbers:
            total += v
            sums.append(float(total))
        if reverse:
            sums.reverse()
        want = torch.tensor(sums, dtype=torch.float64)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(value(local, base)[row], want, rtol=0, atol=2e-14 * N + eps * float(local.abs().max()))
        torch.testing.assert_close(plain[row].double(), want, rtol=eps, atol=2e-14 * N)


# What a difference of two prefixes is off by at N = 131072: a few units in the last place of a block's sum. A flat
# float32 prefix, however it is summed, is off by those of the whole sum, and a bfloat16 one is of no use.
@pytest.mark.parametrize(
    ("increments", "distance", "anchored", "flat", "half"),
    [("softplus", 8, 1.3e-5, 7.8e-3, 5e2), ("softplus", 1024, 8.1e-5, 7.8e-3, 5e2), ("gates", 8, 6.0e-7, 2.4e-4, 16.0)],
)
def test_differences_at_length(isa, increments, distance, anchored, flat, half):
    torch.manual_seed(0)
    N = 131072
    x = F.softplus(torch.randn(N)) if increments == "softplus" else F.logsigmoid(torch.randn(N) + 4)
    local, base = ops.prefix_sum(x.view(1, N), False)
    exact = x.double().cumsum(0)
    i = torch.randint(1024, N, (20000,))
    j = i - torch.randint(0, distance + 1, (20000,)).clamp(max=distance)

    def worst(difference):
        return float((difference.double() - (exact[i] - exact[j])).abs().max())

    # as a kernel forms it: float32 difference inside the blocks, float64 difference of the anchors
    # The bounds are those of one draw; another draw reaches a third more.
    assert worst((local[0, i] - local[0, j]) + (base[0, i // BLOCK] - base[0, j // BLOCK]).float()) <= 1.33 * anchored
    # The sums that fastpe does not use, to the factor of two that the draw decides.
    for c, error in ((x.cumsum(0), flat), (exact.float(), flat), (exact.bfloat16(), half)):
        assert error / 2 <= worst(c[i].double() - c[j].double()) <= 2 * error


def test_any_leading_shape_and_strides(isa):
    torch.manual_seed(0)
    x = torch.randn(3, 200, 2).transpose(1, 2)
    local, base = ops.prefix_sum(x, False)
    assert local.shape == (3, 2, 200) and base.shape == (3, 2, 2)
    torch.testing.assert_close(value(local, base), x.double().cumsum(-1), rtol=0, atol=1e-5)
    local, base = ops.prefix_sum(torch.ones(300), False)
    assert value(local, base).tolist() == list(range(1, 301))


def test_reverse_is_the_adjoint(isa):
    """<cumsum(x), y> = <x, reversed cumsum(y)>: the backward of one is the other."""
    torch.manual_seed(0)
    x, y = torch.randn(4, 700, dtype=torch.float64), torch.randn(4, 700, dtype=torch.float64)
    left = (ops.cumsum_exact(x, False) * y).sum()
    right = (x * ops.cumsum_exact(y, True)).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0,)])
def test_empty(shape):
    local, base = ops.prefix_sum(torch.empty(shape), False)
    assert local.shape == shape and base.shape == (*shape[:-1], math.ceil(shape[-1] / BLOCK))
    assert ops.cumsum_exact(torch.empty(shape), True).shape == shape


def test_thread_counts_agree_bit_for_bit(threads):
    x = torch.randn(13, 5000)
    results = []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        results.append((*ops.prefix_sum(x, False), ops.cumsum_exact(x, True)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_messages():
    with pytest.raises(RuntimeError, match="fastpe.prefix_sum: x must be float32 or float64, got bfloat16"):
        ops.prefix_sum(torch.ones(3, dtype=torch.bfloat16), False)
    with pytest.raises(RuntimeError, match="fastpe.cumsum_exact: x must be float32 or float64, got int64"):
        ops.cumsum_exact(torch.ones(3, dtype=torch.int64), False)
    with pytest.raises(RuntimeError, match="x must have at least one axis"):
        ops.prefix_sum(torch.tensor(1.0), False)
