"""Factor and bias of a pair of segments."""

from __future__ import annotations

import torch

from . import _check
from ._call import Call, OpBias
from .bias import Bias, _define
from .mask import _index, _sides

Tensor = torch.Tensor


@_define
class SegmentPairs(Bias):
    """By the segments of query and key: the score is multiplied by a factor, and a bias is added.

        score <- factor[seg_i, seg_j] * score        before softcap, like `scale`
        score <- score + bias[seg_i, seg_j]

    The log M of structured prompting (arXiv 2212.06713), branch weights of superposition prompting (2404.06910), gates between memory
    and local keys (MemLong, 2408.16967). Adds to other biases with `+`. Memory linear in the tokens.

    Args:
        ids: int (N,) or (B, N) in [0, Sq). Of the queries when key_ids is given; else of the keys, of which the queries are the
            last.
        key_ids: int (Nk,) or (B, Nk) in [0, Sk).
        factor: float (Sq, Sk), (H, Sq, Sk) or (B | 1, H | 1, Sq, Sk). Differentiable. Default 1.
        bias: the same shapes, finite. Differentiable. Default 0.

    Raises:
        TypeError, ValueError: wrong types or shapes, segments the tables do not have.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 6, 8)
    >>> own = torch.tensor([[0.0, 0.0], [0.0, 1.0]])                       # tokens of segment 1 see each other better
    >>> b = fastpe.bias.SegmentPairs(torch.tensor([0, 0, 0, 1, 1, 1]), bias=own)
    >>> fastpe.reference.attention(q, q, q, bias=b, is_causal=True).shape
    torch.Size([1, 2, 6, 8])
    """

    ids: Tensor
    key_ids: Tensor | None = None
    factor: Tensor | None = None
    bias: Tensor | None = None

    _where = "fastpe.bias.SegmentPairs"

    def __post_init__(self):
        where = self._where
        tables = {what: x for what, x in (("factor", self.factor), ("bias", self.bias)) if x is not None}
        if not tables:
            raise ValueError(f"{where}: give a factor or a bias")
        for what, x in tables.items():
            _check.is_float(where, what, x)
            if x.dim() not in (2, 3, 4) or 0 in x.shape[-2:]:
                raise ValueError(f"{where}: {what} must be (Sq, Sk), (H, Sq, Sk) or (B, H, Sq, Sk), got {_check.shape(x)}")
        sizes = [tuple(x.shape[-2:]) for x in tables.values()]
        if len(set(sizes)) > 1:
            raise ValueError(f"{where}: factor is for {sizes[0]} segments, bias for {sizes[1]}")
        queries, keys = sizes[0]
        for what, x, n in (("ids", self.ids, queries if self.key_ids is not None else min(sizes[0])), ("key_ids", self.key_ids, keys)):
            if x is None:
                continue
            _index(where, what, x)
            if x.numel() and _check.can_read(x) and int(x.max()) >= n:
                raise ValueError(f"{where}: {what} must be below {n}, the size of the tables, got {int(x.max())}")

    def _table(self, what: str, call: Call) -> Tensor | None:
        x = getattr(self, what)
        if x is None:
            return None
        x = x[(None,) * (4 - x.dim())]
        call.fits(self._where, what, x.shape[:2], ("batch entries", call.B), ("heads", call.H))
        return call.aux(self._where, what, x)

    def op_args(self, call: Call) -> OpBias:
        q, k = (x.to(torch.int32).contiguous() for x in _sides(self._where, self.ids, self.key_ids, call))
        factor, bias = (None if x is None else x.contiguous() for x in (self._table("factor", call), self._table("bias", call)))
        return OpBias(factor=factor, pairs=bias, q_seg=q, k_seg=k)

    def _spread(self, what: str, call: Call) -> Tensor | None:
        """(B|1, H|1, Nq, Nk) float64"""
        x = self._table(what, call)
        if x is None:
            return None
        q, k = _sides(self._where, self.ids, self.key_ids, call)
        rows = max(x.shape[0], q.shape[0], k.shape[0])
        x, q, k = x.double().expand(rows, -1, -1, -1), q.expand(rows, -1), k.expand(rows, -1)
        b, h = torch.arange(rows, device=call.device)[:, None, None, None], torch.arange(x.shape[1], device=call.device)[None, :, None, None]
        return x[b, h, q[:, None, :, None], k[:, None, None, :]]

    def materialize(self, call: Call) -> Tensor:
        b = self._spread("bias", call)
        return torch.zeros(1, 1, 1, 1, dtype=torch.float64, device=call.device) if b is None else b

    def multiplier(self, call: Call) -> Tensor | None:
        return self._spread("factor", call)
