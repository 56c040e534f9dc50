"""Dense float64 definitions of what stands beside attention(): merging, grouped softmax, attention mass."""

from __future__ import annotations

import torch

from ._reference_rope import rotate

Tensor = torch.Tensor


def merge(outs, lses, weights=None) -> tuple[Tensor, Tensor]:
    """`fastpe.merge` in float64.

    >>> import torch, fastpe
    >>> outs, lses = torch.randn(3, 1, 2, 4, 8), torch.randn(3, 1, 2, 4)
    >>> got, want = fastpe.merge(outs, lses), fastpe.reference.merge(outs, lses)
    >>> all(torch.allclose(a.double(), b, atol=1e-5) for a, b in zip(got, want))
    True
    """
    outs, lses = (x if isinstance(x, Tensor) else torch.stack(list(x)) for x in (outs, lses))
    outs, lses = outs.double(), lses.double()
    c = [1.0] * len(outs) if weights is None else list(weights)
    x = lses * torch.tensor(c, dtype=torch.float64, device=lses.device).reshape(-1, 1, 1, 1)
    # Rows shifted by their maximum; an empty row by 0, so that no -inf meets -inf.
    top = x.detach().amax(0)
    top = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    e = torch.exp(x - top)
    total = e.sum(0)
    empty = total == 0
    total = torch.where(empty, torch.ones_like(total), total)
    has = (lses != -torch.inf)[..., None]
    out = ((e / total)[..., None] * torch.where(has, outs, torch.zeros_like(outs))).sum(0)
    return out, torch.where(empty, -torch.inf, top + torch.log(total))


def landmark_attention(
    query, key, value, is_landmark, *, rope=None, mask=None, positions=None, key_positions=None, scale=None, return_lse=False
):
    """`fastpe.landmark_attention` as one dense float64 computation.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 9, 8)
    >>> is_landmark = torch.tensor([0, 0, 1, 0, 1, 0, 0, 0, 1], dtype=torch.bool)
    >>> got = fastpe.landmark_attention(q, q, q, is_landmark)
    >>> torch.allclose(got.double(), fastpe.reference.landmark_attention(q, q, q, is_landmark), atol=1e-5)
    True
    """
    query, key, value = query.double(), key.double(), value.double()
    (B, H, Nq, D), (_, Hk, Nk, _) = query.shape, key.shape
    if rope is not None:
        q_table, k_table = rope.materialize_tables(positions, key_positions, Nq, Nk, B, H, Hk, query.device)
        query, key = (rotate(x, *t, rope.layout, False) for x, t in ((query, q_table), (key, k_table)))
    real = None if mask is None else torch.stack([x.expand(B, Nk) for x in mask.padding]).all(0)
    out, lse = grouped_softmax_attention(query, key, value, is_landmark, real, scale)
    return (out, lse) if return_lse else out


def grouped_softmax_attention(query, key, value, is_landmark, real=None, scale=None, softmax_dtype=torch.float64):
    """The two softmaxes of landmark attention on dense arrays, the products in the inputs' dtype and everything between in
    softmax_dtype. `real` (B|1, Nk): keys that are not padding."""
    (B, H, Nq, D), (_, Hk, Nk, _) = query.shape, key.shape
    key, value = (x.repeat_interleave(H // Hk, dim=1) for x in (key, value))
    s = (D**-0.5 if scale is None else scale) * (query @ key.transpose(-1, -2)).to(softmax_dtype)
    mark = is_landmark.expand(B, Nk)
    real = torch.ones_like(mark) if real is None else real.expand(B, Nk)
    block = mark.long().cumsum(-1) - mark.long()  # landmarks before j
    j, i = torch.arange(Nk), torch.arange(Nq) + Nk - Nq
    own = block.gather(-1, i.clamp(min=0).expand(B, Nq))[..., None] if Nk else i.new_zeros(B, Nq, 1)
    seen = (j <= i[:, None]) & real[:, None, :]
    mark, block = mark[:, None, :], block[:, None, :]
    a = _softmax(s, (seen & ~mark & (block == own) | seen & mark & (block < own))[:, None])

    # P(i, j) of an earlier block: the share of its landmark times the softmax inside the block. The blocks of a sequence
    # divide its keys, so each is formed on its own columns.
    def earlier(b: int) -> Tensor:
        sizes = torch.bincount(block[b, 0]).tolist()
        columns = [x[b].split(sizes, -1) for x in (s, seen, mark, a.probability)]
        parts = []
        for c, (s_c, seen_c, mark_c, probability) in enumerate(zip(*columns, strict=True)):
            inner = _softmax(s_c, seen_c & ~mark_c & (own[b] > c)).probability
            parts.append(torch.where(mark_c, probability, 0.0).sum(-1, keepdim=True) * inner)
        return torch.cat(parts, -1)

    p = torch.where(mark[:, None], 0.0, a.probability)
    if B and Nk:
        p = p + torch.stack([earlier(b) for b in range(B)])
    return p.to(value.dtype) @ value, a.lse


class _softmax:
    """Softmax over the visible entries of the last axis: rows shifted by their maximum, an empty row by 0."""

    def __init__(self, s: Tensor, visible: Tensor):
        s = torch.where(visible, s, -torch.inf)
        top = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -torch.inf)
        top = torch.where(top == -torch.inf, torch.zeros_like(top), top)
        e = torch.exp(s - top)
        total = e.sum(-1, keepdim=True)
        empty = total == 0
        total = torch.where(empty, torch.ones_like(total), total)
        self.probability = e / total
        self.lse = torch.where(empty, -torch.inf, top + torch.log(total))[..., 0]


def attention_rows(query, key, lse=None, *, rows: int = 1, logits: bool = False, **call) -> Tensor:
    """`fastpe.attention_rows` in float64; lse is formed again.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 6, 8)
    >>> _, lse = fastpe.attention(q, q, q, return_lse=True)
    >>> got = fastpe.attention_rows(q, q, lse, rows=3)
    >>> torch.allclose(got.double(), fastpe.reference.attention_rows(q, q, rows=3), atol=1e-5)
    True
    """
    from . import reference

    # Attention over unit vectors returns the probabilities.
    units = torch.eye(key.shape[2], dtype=torch.float64, device=key.device).expand(*key.shape[:2], -1, -1)
    p, lse = reference.attention(query, key, units, **call, return_lse=True)
    first = query.shape[2] - rows
    return (torch.log(p) + lse[..., None] if logits else p)[:, :, first:]


def attention_mass(query, key, lse=None, *, rows: int | None = None, row_weights=None, **call) -> Tensor:
    """`fastpe.attention_mass` in float64; lse is formed again.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 6, 8)
    >>> _, lse = fastpe.attention(q, q, q, return_lse=True)
    >>> got = fastpe.attention_mass(q, q, lse)
    >>> torch.allclose(got.double(), fastpe.reference.attention_mass(q, q), atol=1e-5)
    True
    """
    p = attention_rows(query, key, rows=query.shape[2] if rows is None else rows, **call)
    if row_weights is not None:
        p = p * row_weights.double()[..., row_weights.shape[-1] - p.shape[2] :, None]
    return p.sum(2)
