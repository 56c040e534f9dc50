"""Modules: initial values as the papers have them, gradients, state."""

from __future__ import annotations

import math

import pytest
import torch

import fastpe
from fastpe import nn

HEADS, WIDTH = 8, 256


def test_alibi():
    fixed, learned = nn.AlibiBias(HEADS), nn.AlibiBias(HEADS, learnable=True)
    assert list(fixed.parameters()) == [] and fixed.state_dict() == {}
    assert torch.equal(learned.slopes.detach(), fastpe.bias.alibi_slopes(HEADS))


@pytest.mark.parametrize("kind", ["log", "power"])
def test_kerple(kind):
    torch.manual_seed(0)
    m = nn.KerpleBias(4000, kind=kind)
    assert 0 <= m.p.min() and m.p.max() < 2 and abs(m.p.mean() - 1) < 0.05
    assert 0 <= m.a.min() and m.a.max() < 1 and abs(m.a.mean() - 0.5) < 0.05
    with torch.no_grad():
        m.p[0], m.a[0], m.p[1] = -1.0, -1.0, 5.0
    b = m()
    assert b.p[0] == b.a[0] == m.a[0] == torch.tensor(0.01)
    assert b.p[1] == (2.0 if kind == "power" else 5.0)
    # The clamp is outside autograd: a clamped parameter still gets its gradient.
    small = nn.KerpleBias(2, kind=kind)
    with torch.no_grad():
        small.a.fill_(-3.0)
    q = torch.randn(1, 2, 9, 8)
    fastpe.attention(q, q, q, bias=small(), is_causal=True).square().sum().backward()
    assert (small.a.grad != 0).all()


def test_t5():
    m = nn.T5Bias(HEADS, std=0.05)
    assert m.table.shape == (32, HEADS) and abs(m.table.std() - 0.05) < 0.015
    with pytest.raises(ValueError, match="num_buckets must be even"):
        nn.T5Bias(HEADS, num_buckets=31)


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_cable_starts_as_the_paper_says(version):
    m = nn.CableBias(WIDTH, HEADS, version=version)
    for layer in (m.increment, m.weight):
        if layer is not None:
            assert not layer.bias.any() and abs(layer.weight.std() - 0.02) < 0.002
    b = m(torch.zeros(1, 10, WIDTH))
    steps = b.prefix.values().diff(dim=-1)
    torch.testing.assert_close(steps, torch.full_like(steps, -math.log(2) if version == "v1" else 0.0))
    if version == "v3":
        torch.testing.assert_close(b.row_weight, torch.full_like(b.row_weight, math.log(2)))


def test_forget():
    m = nn.ForgetBias(WIDTH, HEADS)
    assert not m.gate.bias.any() and abs(m.gate.weight.std() - 0.02) < 0.002
    fixed = nn.ForgetBias(WIDTH, HEADS, decay_times=(4.0, 512.0))
    gates = torch.nn.functional.logsigmoid(fixed.logit.detach().double())
    # A head forgets by 1/e in its decay time.
    torch.testing.assert_close(-1 / gates, torch.logspace(math.log2(4), 9, HEADS, base=2, dtype=torch.float64), rtol=1e-4, atol=0)
    b = fixed(torch.randn(2, 5, WIDTH))
    assert b.log_gates.shape == (2, HEADS, 5)


def test_forget_on_both_sides():
    m = nn.ForgetBias(WIDTH, 2, bidirectional=True, gate_bias=5.0)
    assert m.gate.weight.shape == (4, WIDTH) and (m.gate.bias == 5).all()
    x, q = torch.randn(1, 30, WIDTH), torch.randn(1, 2, 30, 8)
    b = m(x)
    assert torch.equal(torch.cat([b.log_gates, b.future_log_gates], 1), torch.nn.functional.logsigmoid(m.gate(x).mT))
    fastpe.attention(q, q, q, bias=b).square().sum().backward()
    assert m.gate.weight.grad.abs().sum(1).all()
    with pytest.raises(NotImplementedError, match="past does not go with bidirectional gates"):
        m(x, b.log_gates)


def test_left_padding():
    """Padded on the left or not: real tokens get the same output."""
    m = nn.ForgetBias(WIDTH, 2)
    x = torch.randn(1, 20, WIDTH)
    q = torch.randn(1, 2, 20, 8)
    start = torch.tensor([6])
    padded = fastpe.attention(
        q, q, q, bias=m(x, seq_start=start), mask=fastpe.mask.padding(torch.arange(20) >= start[:, None]), is_causal=True
    )
    real = fastpe.attention(q[:, :, 6:], q[:, :, 6:], q[:, :, 6:], bias=m(x[:, 6:]), is_causal=True)
    torch.testing.assert_close(padded[:, :, 6:], real)
    assert not padded[:, :, :6].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "make", [lambda: nn.CableBias(32, 2), lambda: nn.CableBias(32, 2, version="v1"), lambda: nn.ForgetBias(32, 2)]
)
def test_every_parameter_learns(make, dtype):
    m = make().to(dtype)
    x = torch.randn(2, 30, 32, dtype=dtype, requires_grad=True)
    q = torch.randn(2, 2, 30, 8, dtype=dtype)
    fastpe.attention(q, q, q, bias=m(x), is_causal=True).square().sum().backward()
    assert x.grad.dtype == dtype and x.grad.any()
    for name, p in m.named_parameters():
        assert p.grad is not None and p.grad.any() and torch.isfinite(p.grad).all(), name


def test_weighted_kerple():
    torch.manual_seed(0)
    m = nn.KerpleBias(4000, kind="power", weighted=True)
    for p, top in ((m.p, 2.0), (m.a, 1.0), (m.weight_p, 2.0), (m.weight_a, 1.0)):
        assert 0 <= p.min() and p.max() < top and abs(p.mean() - top / 2) < 0.05
    with torch.no_grad():
        m.weight_p[0], m.weight_p[1], m.weight_a[0] = 9.0, -1.0, -1.0
    b = m()
    assert (b.weight_p[0], b.weight_p[1], b.weight_a[0]) == (2.0, torch.tensor(0.01), torch.tensor(0.01))


def test_fire_starts_as_the_paper_says():
    torch.manual_seed(0)
    m = nn.FireBias(HEADS)
    torch.manual_seed(0)
    want = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.ReLU(), torch.nn.Linear(32, HEADS))
    assert all(torch.equal(a, b) for a, b in zip(m.mlp.parameters(), want.parameters(), strict=True))
    assert m.c == torch.tensor(0.1) and m.L_mult == 1.0 and m.L == 512.0 and m.eps == 1e-6
    b = m()
    assert b.L == 512.0 and b.L.requires_grad and b.c is m.c


def test_cope_starts_at_zero():
    m = nn.CopeBias(8, 5, separate_keys=True, d_model=16, kv_heads=2)
    assert not m.table.any() and m.gate.bias is None
    q, k, x = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 12, 16)
    # A table of zeros is no bias, and its gradient is not zero.
    torch.testing.assert_close(fastpe.attention(q, k, k, bias=m(x), is_causal=True), fastpe.attention(q, k, k, is_causal=True))
    fastpe.attention(q, k, k, bias=m(x), is_causal=True).square().sum().backward()
    assert m.table.grad.any()


def test_sandwich_has_the_published_factors():
    m = nn.SandwichBias(HEADS)
    torch.testing.assert_close(m.factors, torch.tensor([HEADS / (8 * (h + 1)) for h in range(HEADS)], dtype=torch.float64))
    assert list(m.parameters()) == []


@pytest.mark.parametrize("make", [lambda: nn.RelativeBias(2, max_distance=9), lambda: nn.RelativeBias(2, max_distance=9, causal=True), lambda: nn.RelativeBias(2, width=16)])
def test_relative(make):
    m = make()
    if m.table is not None:
        assert m.table.shape == (2, 10 if m.causal else 19) and abs(nn.RelativeBias(64, max_distance=200).table.std() - 0.02) < 0.001
    q = torch.randn(1, 2, 30, 8)
    out, want = (f(q, q, q, bias=m(), is_causal=True) for f in (fastpe.attention, fastpe.reference.attention))
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    assert all(p.grad.any() for p in m.parameters())
    with pytest.raises(ValueError, match="give either max_distance, for a table, or width, for a network"):
        nn.RelativeBias(2)


def test_head_scale():
    m = nn.HeadScale(2)
    assert (m.scale == 1.6).all()
    with torch.no_grad():
        m.scale[0] = 0.3
    q = torch.randn(1, 2, 30, 8)
    out = fastpe.attention(q, q, q, head_scale=m(), is_causal=True)
    assert m.scale.tolist() == pytest.approx([1.0, 1.6])
    torch.testing.assert_close(out.double(), fastpe.reference.attention(q, q, q, head_scale=m.scale.detach(), is_causal=True), rtol=1e-5, atol=1e-5)
