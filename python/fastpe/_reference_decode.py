"""Dense float64 definition of attention over lists of keys."""

from __future__ import annotations

import torch

from ._reference_rope import rotate

Tensor = torch.Tensor


def gather_attention(
    query, key, value, index, *, rope=None, bias=None, mask=None, positions=None, key_positions=None, scale=None, head_scale=None,
    row_scale=None, softcap=None, softcap_includes_bias=False, temperature=None, sink=None, is_causal=False, return_lse=False,
):  # fmt: skip
    """`fastpe.gather_attention` in float64: the listed keys are copied out for every row.

    >>> import torch, fastpe
    >>> q, index = torch.randn(1, 2, 3, 8), torch.tensor([0, 2]).expand(1, 1, 1, 2)
    >>> got = fastpe.gather_attention(q, q, q, index)
    >>> torch.allclose(got.double(), fastpe.reference.gather_attention(q, q, q, index), atol=1e-5)
    True
    """
    from .reference import dense_parts, softmax_attention

    query, key, value = query.double(), key.double(), value.double()
    (B, H, Nq, D), (Hk, Nk), n = query.shape, key.shape[1:3], index.shape[3]
    renumber = key_positions is not None
    own = torch.arange(Nk - Nq, Nk, device=query.device) if positions is None else positions
    q, k, factor, b, visible, tau, _ = dense_parts(
        query, key, value, rope=None if renumber else rope, bias=bias, mask=mask, region=None, positions=None if rope is None or renumber else own,
        key_positions=None if rope is None or renumber else torch.arange(Nk, device=query.device), scale=scale, head_scale=head_scale,
        row_scale=row_scale, temperature=temperature, is_causal=is_causal,
    )  # fmt: skip
    group = H // Hk
    by_head = index.repeat_interleave(group, dim=1) if index.shape[1] == Hk and Hk != H else index
    at = by_head.long().expand(B, H, Nq, n)
    there = at >= 0
    at = at.clamp(min=0)

    def listed(x: Tensor | float | None) -> Tensor | None:
        """(.., Nq, Nk) at the listed keys."""
        return None if x is None else torch.as_tensor(x, dtype=None if isinstance(x, Tensor) else torch.float64).expand(B, H, Nq, Nk).gather(3, at)

    def rows(x: Tensor) -> Tensor:
        """(B, Hk, Nk, C) -> (B, H, Nq, n, C)."""
        x = x.repeat_interleave(group, dim=1)
        return x[:, :, None].expand(B, H, Nq, Nk, x.shape[3]).gather(3, at[..., None].expand(*at.shape, x.shape[3]))

    k, v = rows(k), rows(value)
    if renumber:
        where = key_positions.expand(index.shape)
        where = where.repeat_interleave(group, dim=1) if where.shape[1] == Hk and Hk != H else where
        used, turn = torch.unique(where.expand(B, H, Nq, n), return_inverse=True)
        q_table, k_table = rope.materialize_tables(own, used, Nq, used.shape[0], B, H, Hk, query.device)
        q = rotate(query, q_table[0], q_table[1], rope.layout, False)
        k_table = k_table.repeat_interleave(group, dim=2) if k_table.shape[2] == Hk and Hk > 1 else k_table
        cos, sin = (t.expand(B, H, *t.shape[2:]) for t in k_table)
        pick = turn.reshape(B, H, Nq * n, 1).expand(B, H, Nq * n, cos.shape[3])
        k = rotate(k.reshape(B, H, Nq * n, D), cos.gather(2, pick), sin.gather(2, pick), rope.layout, False).reshape(B, H, Nq, n, -1)

    def fold(x: Tensor | None) -> Tensor | None:
        """Rows become batch entries: (B, H, Nq, ...) -> (B Nq, H, ...)."""
        return None if x is None else x.transpose(1, 2).reshape(B * Nq, H, *x.shape[3:])

    one = lambda x: None if x is None else fold(x)[:, :, None]  # noqa: E731
    result = softmax_attention(
        one(q), fold(k), fold(v), one(listed(factor)), one(listed(b)), one(listed(visible) & there), softcap=softcap,
        softcap_includes_bias=softcap_includes_bias,
        temperature=None if tau is None else tau.expand(B, H, Nq, 1).transpose(1, 2).reshape(B * Nq, H, 1, 1),
        sink=None if sink is None else sink.double(), return_lse=return_lse,
    )  # fmt: skip
    out, lse = result if return_lse else (result, None)
    out = out.reshape(B, Nq, H, -1).transpose(1, 2)
    return (out, lse.reshape(B, Nq, H).transpose(1, 2)) if return_lse else out
