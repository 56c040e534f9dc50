"""rope_table against an angle formed with integers, in extended precision."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from fastpe._load import _C

op = torch.ops.fastpe.rope_table


def frequencies(J: int, base: float = 10000.0) -> torch.Tensor:
    return base ** (-torch.arange(J, dtype=torch.float64) / J)


def exact(position: float, inv_freq: float) -> tuple[float, float]:
    with mpmath.workdps(50):
        angle = mpmath.mpf(position) * mpmath.mpf(inv_freq)
        return float(mpmath.cos(angle)), float(mpmath.sin(angle))


def table(positions: torch.Tensor, inv_freq: torch.Tensor, amplitude: float = 1.0, product: bool = False, f64: bool = False) -> torch.Tensor:
    return op(positions.double().view(1, 1, -1), inv_freq.view(1, 1, -1), amplitude, product, f64)[:, 0, 0]


# The sum of two float32 numbers knows a frequency to 2^-50 of itself; times 2^30 that is 1e-6 radians.
@pytest.mark.parametrize(
    ("start", "tolerance"),
    [(0, 2e-7), (4096, 2e-7), (131072, 2e-7), (1 << 20, 2e-7), (4_000_000, 2e-7), ((1 << 24) + 1, 3e-7), ((1 << 30) + 12345, 2e-6), (-4_000_000, 2e-7)],
)
@pytest.mark.parametrize("base", [1e4, 5e5])
def test_exact_phase(isa, start, tolerance, base):
    w = frequencies(19, base)
    p = start + torch.tensor([0.0, 1.0, 2.0, 37.0, 100.0, 1000.0])
    t = table(p, w)
    assert t.dtype == torch.float32 and t.shape == (2, 6, 19)
    for n, position in enumerate(p.double().tolist()):
        for j, freq in enumerate(w.tolist()):
            c, s = exact(position, freq)
            assert abs(float(t[0, n, j]) - c) < tolerance
            assert abs(float(t[1, n, j]) - s) < tolerance


def test_fractional_positions(isa):
    w = frequencies(8)
    p = torch.tensor([0.25, 0.1, 1234.567, 131072.0625], dtype=torch.float64)
    t = table(p, w)
    for n, position in enumerate(p.tolist()):
        for j, freq in enumerate(w.tolist()):
            c, s = exact(position, freq)
            assert abs(float(t[0, n, j]) - c) < 2e-7 and abs(float(t[1, n, j]) - s) < 2e-7


def test_long_rows_are_the_short_ones(isa):
    """Vector lanes, their rest and the blocks of pairs give the same numbers."""
    w = frequencies(150)
    p = torch.arange(70)
    t = table(p, w)
    for j in (0, 1, 15, 16, 63, 64, 127, 128, 149):
        torch.testing.assert_close(t[:, :, j], table(p, w[j : j + 1])[:, :, 0], rtol=0, atol=3e-7)


def test_zero_frequency_and_zero_position_are_exact(isa):
    w = torch.tensor([0.0, 1.0, 0.0, 1e-9], dtype=torch.float64)
    p = torch.tensor([0.0, 1.0, 4e6, -3.5, 1e12])
    for product in (False, True):
        t = table(p, w, product=product)
        assert bool((t[0][:, [0, 2]] == 1).all()) and bool((t[1][:, [0, 2]] == 0).all())
        assert bool((t[0][0] == 1).all()) and bool((t[1][0] == 0).all())


def test_amplitude(isa):
    w = frequencies(16)
    p = torch.arange(5)
    torch.testing.assert_close(table(p, w, 1.25), 1.25 * table(p, w), rtol=2e-7, atol=0)


@pytest.mark.parametrize("start", [0, 4096, 131072, 1 << 20])
def test_float32_product_is_that_of_the_checkpoints(isa, start):
    """cos and sin of the float32 angle; the angle itself is float32 arithmetic, which torch states bit for bit."""
    w = frequencies(64)
    p = start + torch.arange(50)
    angle = (p.float()[:, None] * w.float()[None]).double()
    t = table(p, w, product=True)
    torch.testing.assert_close(t[0].double(), angle.cos(), rtol=0, atol=2e-7)
    torch.testing.assert_close(t[1].double(), angle.sin(), rtol=0, atol=2e-7)
    f64 = table(p, w, product=True, f64=True)
    torch.testing.assert_close(f64[0], angle.cos(), rtol=0, atol=1e-15)
    if start == 1 << 20:
        assert float((t[0].double() - table(p, w)[0].double()).abs().max()) > 1e-3  # the two modes do differ there


def test_float64(isa):
    w = frequencies(11)
    p = torch.tensor([0.0, 1.5, 1000.0, 131072.0], dtype=torch.float64)
    t = table(p, w, 0.5, f64=True)
    assert t.dtype == torch.float64
    angle = p[:, None] * w[None]
    torch.testing.assert_close(t[0], 0.5 * angle.cos(), rtol=0, atol=1e-15)
    torch.testing.assert_close(t[1], 0.5 * angle.sin(), rtol=0, atol=1e-15)


def test_axes_heads_and_batches(isa):
    torch.manual_seed(0)
    p = torch.randint(0, 1000, (3, 2, 9)).double()
    w = torch.rand(3, 4, 5, dtype=torch.float64)
    angle = torch.einsum("abn,ahj->bhnj", p, w)
    t = op(p, w, 1.0, False, False)
    assert t.shape == (2, 2, 4, 9, 5)
    torch.testing.assert_close(t[0].double(), angle.cos(), rtol=0, atol=4e-7)
    torch.testing.assert_close(t[1].double(), angle.sin(), rtol=0, atol=4e-7)
    # the float32 product is summed over the axes in float32, in their order
    a32 = sum(p[a].float()[:, None, :, None] * w[a].float()[None, :, None, :] for a in range(3))
    t = op(p, w, 1.0, True, False)
    torch.testing.assert_close(t[0].double(), a32.double().cos(), rtol=0, atol=2e-7)


def test_not_a_number_stays_one(isa):
    t = table(torch.tensor([math.nan, math.inf, 1.0]), frequencies(20))
    assert bool(t[:, :2].isnan().all()) and bool(t[:, 2].isfinite().all())


def test_empty():
    w = frequencies(4)
    assert table(torch.empty(0), w).shape == (2, 0, 4)


def test_scalar_functions_are_the_kernels():
    """The header's scalar, which a CUDA thread uses too."""
    for position in (0.0, 1.0, 131071.0, 4e6, 2.0**24 + 3, -17.5):
        for freq in (1.0, 0.3, 1e-4, 0.0):
            c, s = exact(position, freq)
            got = _C.cos_sin(position, freq)
            assert abs(got[0] - c) < 3e-7 and abs(got[1] - s) < 3e-7
            rest, quarters = _C.phase(position, freq)
            assert abs(rest) < 0.5 and quarters == int(quarters)
            turns = mpmath.mpf(position) * mpmath.mpf(freq) / (2 * mpmath.pi)
            difference = turns - rest - quarters / 4
            assert abs(difference - mpmath.nint(difference)) < 4e-8


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(1, 1, 3), torch.ones(1, 1, 2, dtype=torch.float64)), "positions must be float64, got float32"),
        ((torch.zeros(1, 1, 3, dtype=torch.float64), torch.ones(1, 1, 2)), "inv_freq must be float64, got float32"),
        ((torch.zeros(3, dtype=torch.float64), torch.ones(1, 1, 2, dtype=torch.float64)), r"positions must be of shape .*got \(3,\)"),
        ((torch.zeros(2, 1, 3, dtype=torch.float64), torch.ones(1, 1, 2, dtype=torch.float64)), "positions have 2 axes, inv_freq has 1"),
    ],
)
def test_messages(args, message):
    with pytest.raises(RuntimeError, match=message):
        op(*args, 1.0, False, False)
