"""Rotation, tables and sums of the CUDA kernels, executed by the emulator, against float64 definitions."""

from __future__ import annotations

import math

import pytest
import torch

from fastpe.testing.compare import error


@pytest.fixture
def ops(on_emulator):
    with on_emulator():
        yield torch.ops.fastpe


def rotated(x, cos, sin, layout):
    """The definition, in float64."""
    x, J = x.double(), cos.shape[-1]
    y = x.clone()
    first, second = (slice(0, J), slice(J, 2 * J)) if layout == 0 else (slice(0, 2 * J, 2), slice(1, 2 * J, 2))
    y[..., first] = x[..., first] * cos - x[..., second] * sin
    y[..., second] = x[..., first] * sin + x[..., second] * cos
    return y


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 3e-7), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)], ids=str)
@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("J", [4, 12])
def test_rotate(ops, dtype, tolerance, layout, J):
    torch.manual_seed(J)
    x = torch.randn(2, 7, 3, 24).to(dtype).transpose(1, 2)
    table = torch.randn(2, 2, 1, 7, J)
    want = rotated(x, table[0].double(), table[1].double(), layout)
    got = ops.rotate(x, table, layout, False)
    assert got.stride() == x.stride()
    assert error(got, want) <= tolerance
    assert torch.equal(ops.rotate(x, torch.stack([table[0], -table[1]]), layout, True), got)
    again = x.clone()
    ops.rotate_(again, table, layout, False)
    assert torch.equal(again, got)


def test_a_result_that_depends_on_the_schedule_is_reported(on_emulator, emu):
    x, table = torch.randn(1, 1, 3, 8), torch.randn(2, 1, 1, 3, 4)
    launches = []
    # The kernel does not run under the third schedule.
    emu.set_runner(lambda *launch: launches.append(launch) or len(launches) == 3)
    try:
        with pytest.raises(AssertionError, match="rotate_.*'random'"), on_emulator():
            torch.ops.fastpe.rotate_(x, table, 0, False)
    finally:
        emu.set_runner(None)
    assert len(launches) == 4


@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_rope_table(ops, product, wide):
    positions = torch.tensor([[[0.0, 1, 77, 131071, 4.0e6, -3.5]], [[5.0, 0, 2, 1000, 1e5, 9]]], dtype=torch.float64)
    inv_freq = torch.stack([10000.0 ** -(torch.arange(5, dtype=torch.float64) / 5), torch.linspace(1e-4, 1, 5, dtype=torch.float64)])[:, None]
    got = ops.rope_table(positions, inv_freq, 1.25, product, wide)
    x = positions[:, :, None, :, None]
    w = inv_freq[:, None, :, None, :]
    if product:
        angle = (x.float() * w.float()).sum(0).double()  # as the published checkpoints: in float32
    else:
        angle = (x * w).sum(0)
    want = 1.25 * torch.stack([angle.cos(), angle.sin()])
    assert got.shape == want.shape and got.dtype == (torch.float64 if wide else torch.float32)
    assert (got - want).abs().max() <= (1e-12 if wide else 1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("N", [1, 31, 128, 129, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prefix_sums(ops, N, reverse, dtype):
    x = torch.randn(2, 3, N, dtype=dtype, generator=torch.Generator().manual_seed(N))
    exact = x.double().flip(-1).cumsum(-1).flip(-1) if reverse else x.double().cumsum(-1)
    local, base = ops.prefix_sum(x, reverse)
    assert local.dtype == dtype and base.shape == (2, 3, math.ceil(N / 128))
    got = local.double() + base.repeat_interleave(128, -1)[..., :N]
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert (got - exact).abs().max() <= tolerance
    plain = ops.cumsum_exact(x, reverse)
    assert plain.dtype == dtype and (plain.double() - exact).abs().max() <= tolerance * 3
    assert torch.equal(ops.cumsum_exact(x[..., None].transpose(-1, -2), reverse)[..., 0, :], plain)


def test_schemas_are_those_of_the_ops(emu):
    ops = torch.ops.fastpe_emu

    def text(op):
        return str(op.default._schema).split("::", 1)[1]

    for name in ("attn_fwd", "attn_bwd", "rotate", "rotate_", "rope_table", "prefix_sum", "cumsum_exact", "merge_fwd", "merge_bwd", "attn_mass", "attn_rows"):
        assert text(getattr(ops, name)) == text(getattr(torch.ops.fastpe, name)), name
