"""flash-attention's functions with the same arguments and meaning, computed by fastpe."""

from __future__ import annotations

import torch

from .. import _check
from .. import mask as masks
from ..attention import attention
from ..bias import Alibi
from ._rows import seen_by_rows

Tensor = torch.Tensor

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]


def _window(where: str, causal: bool, window_size: tuple[int, int]) -> masks.Mask | None:
    """-1 is unlimited; left and right do not count the own key."""
    if len(window_size) != 2 or min(window_size) < -1:
        raise ValueError(f"{where}: window_size must be (left, right), each at least -1, got {window_size!r}")
    left, right = window_size
    if causal:
        right = 0
    if left < 0 and right < 0:
        return None
    return masks.window(left + 1 if left >= 0 else None, right + 1 if right >= 0 else None)


def _refuse(where: str, dropout_p: float, **others) -> None:
    if dropout_p:
        raise NotImplementedError(f"{where}: dropout_p must be 0, got {dropout_p:g}; fastpe drops nothing")
    for what, x in others.items():
        if x is not None:
            raise NotImplementedError(f"{where}: {what} must be None, got {type(x).__name__}")


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash_attn.flash_attn_func (arXiv 2307.08691), on any device and dtype fastpe runs on.

    Args:
        q: (B, Nq, H, D).
        k, v: (B, Nk, Hk, D), H a multiple of Hk.
        dropout_p: must be 0.
        softmax_scale: default 1 / sqrt(D).
        causal: bottom-right aligned, as there from version 2.1 on.
        window_size: (left, right): row i sees i + Nk - Nq - left to i + Nk - Nq + right; -1 is unlimited.
        softcap: 0 for none.
        alibi_slopes: (H,) or (B, H) float32: the bias -slope |i + Nk - Nq - j|. Gets a gradient if it requires one.
        deterministic: fastpe always is.
        return_attn_probs: return (out, lse, None).

    Returns:
        out (B, Nq, H, D); with return_attn_probs also lse (B, H, Nq), and None for the probabilities, which are never formed.

    >>> import torch
    >>> from fastpe.integrations.flash import flash_attn_func
    >>> q = torch.randn(2, 10, 4, 16)
    >>> flash_attn_func(q, q, q, causal=True, window_size=(3, 0)).shape
    torch.Size([2, 10, 4, 16])
    """
    where = "fastpe.integrations.flash.flash_attn_func"
    _refuse(where, dropout_p)
    out, lse = attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        scale=softmax_scale,
        mask=_window(where, causal, window_size),
        softcap=softcap or None,
        bias=None if alibi_slopes is None else Alibi(alibi_slopes),
        return_lse=True,
    )
    out = out.transpose(1, 2)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash_attn.flash_attn_varlen_func: sequences of different lengths, one after the other.

    Args:
        q: (total_q, H, D).
        k, v: (total_k, Hk, D).
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) integers from 0 to total_q and total_k.
        max_seqlen_q, max_seqlen_k: not needed.
        alibi_slopes: (H,) float32.
        block_table: must be None.
        The others: as in `flash_attn_func`, for each sequence by itself.

    Returns:
        out (total_q, H, D); with return_attn_probs also lse (H, total_q), and None.

    >>> import torch
    >>> from fastpe.integrations.flash import flash_attn_varlen_func
    >>> q, cu = torch.randn(10, 4, 16), torch.tensor([0, 3, 10])
    >>> flash_attn_varlen_func(q, q, q, cu, cu, causal=True).shape
    torch.Size([10, 4, 16])
    """
    where = "fastpe.integrations.flash.flash_attn_varlen_func"
    _refuse(where, dropout_p, block_table=block_table)
    for what, x, n in (("cu_seqlens_q", cu_seqlens_q, q.shape[0]), ("cu_seqlens_k", cu_seqlens_k, k.shape[0])):
        _check.is_integer(where, what, x)
        if x.dim() != 1 or x.shape[0] < 2 or x.shape != cu_seqlens_q.shape:
            raise ValueError(f"{where}: {what} must be (sequences + 1,), the same for queries and keys, got {_check.shape(x)}")
        if _check.can_read(x) and (int(x[0]) != 0 or int(x[-1]) != n or bool((x.diff() < 0).any())):
            raise ValueError(f"{where}: {what} must rise from 0 to {n}, got {x.tolist()}")
    if alibi_slopes is not None and alibi_slopes.dim() != 1:
        raise NotImplementedError(f"{where}: alibi_slopes must be (H,), got {_check.shape(alibi_slopes)}: packed sequences are one batch entry")
    near = _window(where, causal, window_size)
    same = cu_seqlens_q is cu_seqlens_k or (_check.can_read(cu_seqlens_q) and torch.equal(cu_seqlens_q, cu_seqlens_k))
    bias = None
    if same:
        # One index counts queries and keys, so distances are those inside a sequence.
        mask = masks.documents(cu_seqlens=cu_seqlens_k)
        mask = mask if near is None else mask & near
        if alibi_slopes is not None:
            bias = Alibi(alibi_slopes)
    else:
        mask, bias = _apart(cu_seqlens_q.long(), cu_seqlens_k.long(), q.shape[0], k.shape[0], near, alibi_slopes)
    out, lse = attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        scale=softmax_scale,
        mask=mask,
        softcap=softcap or None,
        bias=bias,
        return_lse=True,
    )
    out = out[0].transpose(0, 1)
    return (out, lse[0], None) if return_attn_probs else out


def _apart(cu_q: Tensor, cu_k: Tensor, rows: int, keys: int, near: masks.Mask | None, slopes: Tensor | None):
    """Mask and bias of sequences whose queries are the last of their own keys."""
    i, j = torch.arange(rows, device=cu_q.device), torch.arange(keys, device=cu_q.device)
    q_of, k_of = (torch.searchsorted(cu[1:].contiguous(), n, right=True) for cu, n in ((cu_q, i), (cu_k, j)))
    # Row at which a sequence's first key would stand.
    origin = cu_q[1:] - cu_k.diff()
    own = origin[k_of] + j - cu_k[k_of]
    first, after = cu_q[k_of], cu_q[k_of + 1]
    if near is not None and near.right is not None:
        first = torch.maximum(first, own - (near.right - 1))
    if near is not None and near.left is not None:
        after = torch.minimum(after, own + near.left)
    after = torch.maximum(first, after)
    bias = None if slopes is None else Alibi(slopes, positions=i - origin[q_of], key_positions=j - cu_k[k_of])
    return seen_by_rows(first[None], after[None], rows, keys), bias
