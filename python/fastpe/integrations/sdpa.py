"""`torch.nn.functional.scaled_dot_product_attention` with the same arguments and meaning, computed by fastpe."""

from __future__ import annotations

import torch

from .. import _check
from .. import mask as masks
from ..attention import attention
from ..bias import Dense

Tensor = torch.Tensor

__all__ = ["scaled_dot_product_attention"]

_WHERE = "fastpe.integrations.sdpa"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Drop-in for torch.nn.functional.scaled_dot_product_attention.

    Causal means what it means there: row i sees the keys j <= i, counted from the first of each (top-left aligned), also
    where there are more keys than queries or fewer. `fastpe.attention` itself is bottom-right aligned. Rows that see nothing
    give 0.

    Args:
        query: (..., H, Nq, D), at least 2 dimensions; D up to 256, padded to a step of 8 if need be.
        key, value: (..., H, Nk, D), (..., H, Nk, Dv); with enable_gqa fewer heads, which divide H. Leading dimensions of 1 are
            broadcast.
        attn_mask: bool, True where visible, or float, added to the scores, broadcastable to (..., H, Nq, Nk). The float mask
            gets a gradient if it requires one. Not with is_causal.
        dropout_p: must be 0.
        scale: default 1 / sqrt(D).

    Raises:
        NotImplementedError: dropout.
        TypeError, ValueError: named after the argument.

    >>> import torch
    >>> from fastpe.integrations.sdpa import scaled_dot_product_attention
    >>> q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 4, 9, 16)
    >>> want = torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True)
    >>> torch.allclose(scaled_dot_product_attention(q, k, k, is_causal=True), want, atol=1e-5)
    True
    """
    for what, x in (("query", query), ("key", key), ("value", value)):
        if _check.is_float(_WHERE, what, x).dim() < 2:
            raise ValueError(f"{_WHERE}: {what} must have at least 2 dimensions, got {_check.shape(x)}")
    if dropout_p:
        raise NotImplementedError(f"{_WHERE}: dropout_p must be 0, got {dropout_p:g}; fastpe drops nothing")
    if attn_mask is not None and is_causal:
        raise ValueError(f"{_WHERE}: attn_mask does not go with is_causal=True")
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        _check.is_float(_WHERE, "attn_mask", attn_mask)
    Nq, Nk, D, Dv = query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1]
    if scale is None:
        scale = D**-0.5
    lead, query, key, value = _four(query, key, value, enable_gqa)
    bias = mask = None
    if attn_mask is not None:
        attn_mask = _mask(attn_mask, lead, Nq, Nk)
        if attn_mask.dtype == torch.bool:
            mask = masks.dense(attn_mask)
        else:
            bias = Dense(attn_mask)
    if not is_causal:
        out = attention(query, key, value, scale=scale, mask=mask, bias=bias)
    elif Nq <= Nk:
        # Keys past the last row are seen by nobody.
        out = attention(query, key[:, :, :Nq], value[:, :, :Nq], scale=scale, is_causal=True)
    else:
        # Rows past the last key see all of them.
        square = attention(query[:, :, :Nk], key, value, scale=scale, is_causal=True)
        out = torch.cat((square, attention(query[:, :, Nk:], key, value, scale=scale)), 2)
    return out[..., :Dv].reshape(*lead, Nq, Dv)


def _four(query: Tensor, key: Tensor, value: Tensor, gqa: bool):
    """Leading dimensions (..., H) of the result, and the three as (B, H, N, channels) with channels in steps of 8."""
    heads = query.shape[-3] if query.dim() > 2 else 1
    if gqa:
        kv = key.shape[-3] if key.dim() > 2 else 1
        if heads % kv:
            raise ValueError(f"{_WHERE}: key has {kv} heads, which does not divide query's {heads}")
        lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
        shapes = [(*lead, x.shape[-3] if x.dim() > 2 else 1, *x.shape[-2:]) for x in (query, key, value)]
        lead = (*lead, heads)
    else:
        try:
            lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        except RuntimeError as error:
            shown = ", ".join(_check.shape(x) for x in (query, key, value))
            raise ValueError(f"{_WHERE}: the leading dimensions of query, key and value do not broadcast: {shown}") from error
        shapes = [(*lead, *x.shape[-2:]) for x in (query, key, value)]
    out = []
    for x, shape in zip((query, key, value), shapes, strict=True):
        x = x.expand(shape)
        x = x[(None,) * (4 - x.dim())] if x.dim() < 4 else x if x.dim() == 4 else x.flatten(0, -4)
        missing = -x.shape[-1] % 8
        x = torch.nn.functional.pad(x, (0, missing)) if missing else x
        out.append(x if x.stride(-1) == 1 else x.contiguous())
    return tuple(lead), *out


def _mask(x: Tensor, lead: tuple[int, ...], Nq: int, Nk: int) -> Tensor:
    """attn_mask as 4 dimensions that broadcast."""
    try:
        torch.broadcast_shapes(x.shape, (*lead, Nq, Nk))
    except RuntimeError as error:
        raise ValueError(f"{_WHERE}: attn_mask {_check.shape(x)} does not broadcast to {(*lead, Nq, Nk)}") from error
    if x.dim() > 4:
        return x.expand(*lead[:-1], *x.shape[-3:]).flatten(0, -4)
    return x[(None,) * (4 - x.dim())]
