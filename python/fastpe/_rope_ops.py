"""Fake and autograd registrations of the rotary ops: rope_table, rotate, rotate_pair and their in-place forms."""

from __future__ import annotations

import torch

from . import _load  # noqa: F401  registers the ops
from .ops import _like

Tensor = torch.Tensor

_ops = torch.ops.fastpe


# ---- fake


@torch.library.register_fake("fastpe::rope_table")
def _(positions, inv_freq, amplitude, float32_product, out_f64):
    _, b, n = positions.shape
    _, h, j = inv_freq.shape
    return positions.new_empty((2, b, h, n, j), dtype=torch.float64 if out_f64 else torch.float32)


@torch.library.register_fake("fastpe::rotate")
def _(x, table, layout, inverse):
    return _like(x, x.shape[3])


@torch.library.register_fake("fastpe::rotate_pair")
def _(q, k, q_table, k_table, layout, inverse):
    return _like(q, q.shape[3]), _like(k, k.shape[3])


@torch.library.register_fake("fastpe::rotate_")
def _(x, table, layout, inverse):
    return None


@torch.library.register_fake("fastpe::rotate_pair_")
def _(q, k, q_table, k_table, layout, inverse):
    return None


# ---- gradients


def _table_setup(ctx, inputs, output):
    positions, inv_freq = inputs[:2]
    ctx.save_for_backward(positions, inv_freq, output)


def _table_backward(ctx, dtable):
    positions, inv_freq, table = ctx.saved_tensors
    # the table holds m cos and m sin, so turning an angle by dphi moves it by (-m sin, m cos) dphi
    dphi = (table[0] * dtable[1] - table[1] * dtable[0]).double()  # (B,H,N,J)
    dp = dw = None
    if ctx.needs_input_grad[0]:
        dp = torch.einsum("ahj,bhnj->abn", inv_freq, dphi)
    if ctx.needs_input_grad[1]:
        dw = torch.einsum("abn,bhnj->ahj", positions, dphi)
    return dp, dw, None, None, None


torch.library.register_autograd("fastpe::rope_table", _table_backward, setup_context=_table_setup)


def _pairs(x: Tensor, j: int, layout: int) -> tuple[Tensor, Tensor]:
    return (x[..., :j], x[..., j : 2 * j]) if layout == 0 else (x[..., 0 : 2 * j : 2], x[..., 1 : 2 * j : 2])


def _table_grad(x: Tensor, dy: Tensor, table: Tensor, layout: int, inverse: bool) -> Tensor:
    """Gradient of rotate(x, table) for the table."""
    j = table.shape[-1]
    x1, x2 = _pairs(x.to(table.dtype), j, layout)
    d1, d2 = _pairs(dy.to(table.dtype), j, layout)
    dcos, dsin = d1 * x1 + d2 * x2, d2 * x1 - d1 * x2
    return torch.stack((dcos, -dsin if inverse else dsin)).sum_to_size(table.shape)


def _rotate_setup(ctx, inputs, output):
    x, table, ctx.layout, ctx.inverse = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, table)


def _rotate_backward(ctx, dy):
    x, table = ctx.saved_tensors
    dx = dtable = None
    if dy.stride(-1) != 1:
        dy = dy.contiguous()
    if ctx.needs_input_grad[0]:
        dx = _ops.rotate(dy, table, ctx.layout, not ctx.inverse)
    if ctx.needs_input_grad[1]:
        dtable = _table_grad(x, dy, table, ctx.layout, ctx.inverse)
    return dx, dtable, None, None


torch.library.register_autograd("fastpe::rotate", _rotate_backward, setup_context=_rotate_setup)


def _pair_setup(ctx, inputs, output):
    q, k, q_table, k_table, ctx.layout, ctx.inverse = inputs
    need = ctx.needs_input_grad
    ctx.save_for_backward(q if need[2] else None, k if need[3] else None, q_table, k_table)


def _pair_backward(ctx, dq, dk):
    q, k, q_table, k_table = ctx.saved_tensors
    need, layout, inverse = ctx.needs_input_grad, ctx.layout, ctx.inverse
    dq = dq if dq.stride(-1) == 1 else dq.contiguous()
    dk = dk if dk.stride(-1) == 1 else dk.contiguous()
    gq = gk = None
    if need[0] and need[1]:
        gq, gk = _ops.rotate_pair(dq, dk, q_table, k_table, layout, not inverse)
    elif need[0]:
        gq = _ops.rotate(dq, q_table, layout, not inverse)
    elif need[1]:
        gk = _ops.rotate(dk, k_table, layout, not inverse)
    gqt = _table_grad(q, dq, q_table, layout, inverse) if need[2] else None
    gkt = _table_grad(k, dk, k_table, layout, inverse) if need[3] else None
    return gq, gk, gqt, gkt, None, None


torch.library.register_autograd("fastpe::rotate_pair", _pair_backward, setup_context=_pair_setup)


# ---- in place: no gradient flows through an overwritten input


def _refuse(name: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(
            f"fastpe.{name}: an input that requires grad cannot be rotated in place; use the out-of-place form or torch.no_grad()"
        )


def _rotate_inplace(x, table, layout, inverse):
    _refuse("rotate_", x, table)
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.rotate_(x, table, layout, inverse)


def _pair_inplace(q, k, q_table, k_table, layout, inverse):
    _refuse("rotate_pair_", q, k, q_table, k_table)
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.rotate_pair_(q, k, q_table, k_table, layout, inverse)


_library = torch.library.Library("fastpe", "IMPL")
_library.impl("rotate_", _rotate_inplace, "Autograd")
_library.impl("rotate_pair_", _pair_inplace, "Autograd")
