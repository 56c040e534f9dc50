"""Rotation as an operation of its own."""

from __future__ import annotations

import torch

from . import _check, _rope_ops  # noqa: F401  registers gradients
from ._rope import Rope

Tensor = torch.Tensor

_LAYOUT = {"half": 0, "interleaved": 1}


def _input(where: str, what: str, x: Tensor, rope: Rope, inverse: bool, inplace: bool) -> None:
    _check.is_float(where, what, x)
    if x.dim() != 4:
        raise ValueError(f"{where}: {what} must be (B, H, N, D), got shape {_check.shape(x)}")
    if not isinstance(rope, Rope):
        raise TypeError(f"{where}: rope must be a fastpe.Rope, got {type(rope).__name__}")
    d = x.shape[-1]
    if rope.layout == "cosine":
        expected = 2 * rope.pairs if inverse else rope.pairs
        if d != expected:
            raise ValueError(f"{where}: {what} must have {expected} channels for {rope!r}, got {d}")
        if inplace:
            raise NotImplementedError(
                f"{where}: the cosine layout changes the number of channels, so inplace must be False"
            )
        return
    if rope.rotary_dim > d:
        raise ValueError(f"{where}: rope turns {rope.rotary_dim} channels, {what} has {d}")
    if d > 1 and x.stride(-1) != 1:
        raise ValueError(f"{where}: {what}'s last dimension must be contiguous, got stride {x.stride(-1)}")
    if inplace:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(f"{where}: {what} requires grad and cannot be rotated in place; use inplace=False")
        if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
            raise ValueError(
                f"{where}: {what} is expanded (stride 0) and cannot be rotated in place; use inplace=False"
            )


def _cosine(x: Tensor, table: Tensor, inverse: bool) -> Tensor:
    cos, sin = table[0], table[1]
    wide = x.to(table.dtype)
    if inverse:
        j = table.shape[-1]
        return (wide[..., :j] * cos + wide[..., j:] * sin).to(x.dtype)
    return torch.cat((wide * cos, wide * sin), -1).to(x.dtype)


def _frozen(where: str, *tables: Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tables):
        raise RuntimeError(
            f"{where}: rope or positions require grad, so the rotation cannot be done in place; use inplace=False"
        )


def _out_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def apply_rotary(
    x: Tensor, rope: Rope, positions: Tensor | None = None, *, inverse: bool = False, inplace: bool = False
) -> Tensor:
    """Rotates x by position (RoFormer, arXiv 2104.09864, and every rule of `fastpe.rope`).

    Args:
        x: ``(B, H, N, D)``, float32, bfloat16, float16 or float64, any strides with a contiguous last dimension, so
            ``(B, N, H, D)`` storage needs no copy.
        rope: a `fastpe.Rope`. Per-head frequencies are for H heads; for keys of grouped heads use `apply_rotary_pair`, which
            knows both counts. Keys of xPos take ``rope.key_side``.
        positions: ``(N,)`` or ``(B, N)``; ``(A, N)`` or ``(A, B, N)`` for a rope with A > 1 axes; integers, float32 or
            float64. 0 .. N-1 if not given.
        inverse: turn by the opposite angles. The amplitude multiplies as it does forward, so this is the transpose, and
            undoes the rotation where the amplitude is 1.
        inplace: overwrite x and return it.

    Returns:
        x's dtype and shape, ``(B, H, N, 2D)`` for the cosine layout. Angles and products are computed in float32 (float64
        for float64) and rounded once. Gradients reach x, and ``rope``'s frequencies and ``positions`` if they require one.

    Raises:
        TypeError, ValueError: dtype, shape, device, a rope that turns more channels than x has, an expanded x in place.
        RuntimeError: in place with something that requires grad.

    >>> import torch, fastpe
    >>> x = torch.randn(1, 2, 5, 8)
    >>> y = fastpe.apply_rotary(x, fastpe.rope.default(8))
    >>> torch.allclose(fastpe.apply_rotary(y, fastpe.rope.default(8), inverse=True), x, atol=1e-6)
    True
    """
    where = "fastpe.apply_rotary"
    _input(where, "x", x, rope, inverse, inplace)
    b, h, n, _ = x.shape
    if rope.dims == "b" and rope.inv_freq.shape[0] != b:
        raise ValueError(
            f"{where}: rope {rope.name} has frequencies for {rope.inv_freq.shape[0]} batch rows, x has {b}"
        )
    table = rope.one_table(where, positions, n, b, h, _out_dtype(x), x.device)
    if rope.layout == "cosine":
        return _cosine(x, table, inverse)
    if inplace:
        _frozen(where, table)
        torch.ops.fastpe.rotate_(x, table, _LAYOUT[rope.layout], inverse)
        return x
    return torch.ops.fastpe.rotate(x, table, _LAYOUT[rope.layout], inverse)


def apply_rotary_pair(
    query: Tensor,
    key: Tensor,
    rope: Rope,
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    *,
    inverse: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotates query and key in one pass, each with its side of the embedding.

    It differs from two `apply_rotary` calls where the sides do: xPos, per-head frequencies with grouped heads, and rules that
    depend on the length of the text, which both sides share.

    Args:
        query: ``(B, H, Nq, D)``.  key: ``(B, Hk, Nk, D)`` of query's dtype, H a multiple of Hk.
        positions, key_positions: as in `apply_rotary`. Without either, queries are the last Nq of Nk tokens; with
            ``positions`` alone and Nq = Nk keys share them.
        inverse, inplace: as in `apply_rotary`.

    Returns:
        rotated query and key.

    >>> import torch, fastpe
    >>> q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    >>> q, k = fastpe.apply_rotary_pair(q, k, fastpe.rope.xpos(8))
    >>> q.shape, k.shape
    (torch.Size([1, 4, 5, 8]), torch.Size([1, 2, 5, 8]))
    """
    where = "fastpe.apply_rotary_pair"
    _input(where, "query", query, rope, inverse, inplace)
    _input(where, "key", key, rope, inverse, inplace)
    if key.dtype != query.dtype:
        raise TypeError(f"{where}: key must be {_check.name(query.dtype)} like query, got {_check.name(key.dtype)}")
    _check.on_device(where, "key", key, query.device)
    b, h, nq, _ = query.shape
    bk, hk, nk, _ = key.shape
    if bk != b:
        raise ValueError(f"{where}: key has {bk} batch rows, query has {b}")
    if h % hk:
        raise ValueError(f"{where}: key has {hk} heads, which does not divide query's {h}")
    if rope.dims == "b" and rope.inv_freq.shape[0] != b:
        raise ValueError(
            f"{where}: rope {rope.name} has frequencies for {rope.inv_freq.shape[0]} batch rows, query has {b}"
        )
    if rope.layout == "cosine":
        k_positions = positions if key_positions is None and nq == nk else key_positions
        return (
            apply_rotary(query, rope, positions, inverse=inverse),
            apply_rotary(key, rope, k_positions, inverse=inverse),
        )
    q_table, k_table = rope.tables(
        positions, key_positions, nq, nk, b, h, hk, _out_dtype(query), query.device, where=where
    )
    layout = _LAYOUT[rope.layout]
    if inplace:
        _frozen(where, q_table, k_table)
        torch.ops.fastpe.rotate_pair_(query, key, q_table, k_table, layout, inverse)
        return query, key
    return torch.ops.fastpe.rotate_pair(query, key, q_table, k_table, layout, inverse)
