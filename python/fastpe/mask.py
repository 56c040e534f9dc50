"""Which keys a query sees.

A mask object gathers visibility rules; `a & b` holds where both hold. With I = i + Nk - Nq the index of query row i among
the keys, key j is visible iff

    (no left window or I - j < left or j is one of the first `sinks` keys of its document)
    and (no right window or j - I < right)
    and (no documents, or both tokens belong to the same one)
    and (no padding, or the key is real)
    and (no dense mask, or mask[i, j])

A row that sees nothing gives out 0, lse -inf and no gradient.
"""

from __future__ import annotations

import dataclasses

import torch

from . import _check
from ._call import Call, OpMask

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class _Documents:
    """One rule "same document". Negative ids are padding: such keys are seen by nobody, such queries see nothing."""

    ids: Tensor | None = None  # (N,) or (B, N)
    key_ids: Tensor | None = None
    cu_seqlens: Tensor | None = None  # (documents + 1,)

    def sides(self, call: Call) -> tuple[Tensor, Tensor]:
        """query ids (B|1, Nq), key ids (B|1, Nk), int64."""
        where = "fastpe.mask.documents"
        if self.cu_seqlens is not None:
            cu = self.cu_seqlens
            _check.on_device(where, "cu_seqlens", cu, call.device)
            if _check.can_read(cu) and int(cu[-1]) > call.Nk:
                raise ValueError(f"{where}: cu_seqlens ends at {int(cu[-1])}, past the {call.Nk} keys")
            j = call.key_index()
            k = torch.searchsorted(cu[1:].to(torch.int64).contiguous(), j, right=True)
            k = torch.where(j < cu[-1], k, -1)[None]
            q = None
        elif self.key_ids is None:
            k, q = self._rows("ids", self.ids, call), None
        else:
            q, k = self._rows("ids", self.ids, call), self._rows("key_ids", self.key_ids, call)
        if k.shape[1] != call.Nk:
            what = "ids" if self.key_ids is None else "key_ids"
            raise ValueError(f"{where}: {what} has {k.shape[1]} tokens, the call has {call.Nk} keys")
        if q is None:
            if call.Nq > call.Nk:
                raise ValueError(
                    f"{where}: {call.Nq} queries and {call.Nk} keys: queries are the last keys unless ids and key_ids are given"
                )
            q = k[:, call.Nk - call.Nq :]
        if q.shape[1] != call.Nq:
            raise ValueError(f"{where}: ids has {q.shape[1]} tokens, the call has {call.Nq} queries")
        return q, k

    @staticmethod
    def _rows(what: str, x: Tensor, call: Call) -> Tensor:
        x = x[None] if x.dim() == 1 else x
        _check.on_device("fastpe.mask.documents", what, x, call.device)
        call.fits("fastpe.mask.documents", what, x.shape[:1], ("batch entries", call.B))
        return x.to(torch.int64)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """Visibility rules; made by the functions of this module, combined with `&`.

    Only two combinations cost an Nq x Nk bool mask, everything else is linear: a dense mask itself, and sinks together
    with a left window and documents (the kernels know the first keys of the sequence, not those of each document).

    >>> import fastpe
    >>> fastpe.mask.causal() & fastpe.mask.window(128) & fastpe.mask.sinks(4)
    Mask(left=128, right=1, sinks=4)
    """

    left: int | None = None
    right: int | None = None
    sinks: int | None = None
    documents: tuple[_Documents, ...] = ()
    padding: tuple[Tensor, ...] = ()
    dense: tuple[Tensor, ...] = ()

    def __and__(self, other: "Mask") -> "Mask":
        if not isinstance(other, Mask):
            return NotImplemented

        def least(a: int | None, b: int | None) -> int | None:
            return b if a is None else a if b is None else min(a, b)

        return Mask(
            left=least(self.left, other.left),
            right=least(self.right, other.right),
            sinks=least(self.sinks, other.sinks),
            documents=self.documents + other.documents,
            padding=self.padding + other.padding,
            dense=self.dense + other.dense,
        )

    def __repr__(self) -> str:
        parts = [f"{f}={getattr(self, f)}" for f in ("left", "right", "sinks") if getattr(self, f) is not None]
        for rule in self.documents:
            given = rule.cu_seqlens if rule.cu_seqlens is not None else rule.ids
            parts.append(f"documents={'cu_seqlens' if rule.cu_seqlens is not None else 'ids'}{tuple(given.shape)}")
        parts += [f"padding={tuple(x.shape)}" for x in self.padding]
        parts += [f"dense={tuple(x.shape)}" for x in self.dense]
        return f"Mask({', '.join(parts)})"

    @property
    def is_causal(self) -> bool:
        """No key after the query is visible."""
        return self.right == 1

    def _document_ids(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """All document rules as one pair of ids, int64 (B|1, Nq) and (B|1, Nk)."""
        q = k = None
        for rule in self.documents:
            q, k = rule.sides(call) if q is None else _both(q, k, *rule.sides(call))
        return q, k

    def _with_padding(
        self, call: Call, q: Tensor | None, k: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The same ids, with -1 at padded keys."""
        for real in self.padding:
            real = _key_mask(real, call)
            if k is None:
                q = torch.zeros(1, call.Nq, dtype=torch.int64, device=call.device)
                k = torch.zeros(1, call.Nk, dtype=torch.int64, device=call.device)
            k = torch.where(real, k, -1)
        return q, k

    def _dense(self, call: Call) -> Tensor | None:
        mask = None
        for x in self.dense:
            x = _dense_mask(x, call)
            mask = x if mask is None else mask & x
        return mask

    def op_args(self, call: Call) -> OpMask:
        """The kernel arguments for one call."""
        q, k = self._document_ids(call)
        mask = self._dense(call)
        left, sinks = self.left or 0, self.sinks or 0
        if left and sinks and k is not None:
            kept = (call.distance() < left) | (_rank(k) < sinks)[:, None, :]
            kept = kept[:, None]
            mask = kept if mask is None else mask & kept
            left = sinks = 0
        if not left:
            sinks = 0
        q, k = self._with_padding(call, q, k)
        if q is not None:
            q, k = q.to(torch.int32).contiguous(), k.to(torch.int32).contiguous()
        return OpMask(left, self.right or 0, sinks, q, k, mask)

    def materialize(self, call: Call) -> Tensor:
        """The definition: bool (B|1, H|1, Nq, Nk), True where visible."""
        d = call.distance()
        visible = torch.ones_like(d, dtype=torch.bool)[None, None]
        if self.right is not None:
            visible = visible & (-d < self.right)
        same = None
        for rule in self.documents:
            q, k = rule.sides(call)
            pair = (q[:, :, None] == k[:, None, :]) & (k >= 0)[:, None, :]
            twin = (k[:, :, None] == k[:, None, :]) & (k >= 0)[:, None, :]
            same = twin if same is None else same & twin
            visible = visible & pair[:, None]
        if self.left is not None:
            near = (d < self.left)[None]
            if self.sinks is not None:
                if same is None:
                    near = near | (call.key_index() < self.sinks)
                else:
                    # How many keys of the same document come before.
                    near = near | ((same & (d.new_ones(call.Nk, call.Nk).tril(-1) > 0)).sum(-1)[:, None, :] < self.sinks)
            visible = visible & near[:, None]
        for real in self.padding:
            visible = visible & _key_mask(real, call)[:, None, None, :]
        for x in self.dense:
            visible = visible & _dense_mask(x, call)
        return visible


def _both(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor) -> tuple[Tensor, Tensor]:
    """Ids that are equal iff both pairs of ids are, numbered within int32."""
    (q1, q2), (k1, k2) = torch.broadcast_tensors(q1, q2), torch.broadcast_tensors(k1, k2)
    rows = max(q1.shape[0], k1.shape[0])
    step = 1 + torch.maximum(q2.amax(), k2.amax()).clamp(min=0)
    q = torch.where((q1 < 0) | (q2 < 0), -1, q1 * step + q2).expand(rows, -1)
    k = torch.where((k1 < 0) | (k2 < 0), -1, k1 * step + k2).expand(rows, -1)
    # The place of an id among the sorted key ids is its new name; a query whose id no key has sees nothing.
    order = k.sort(dim=-1).values.contiguous()

    def place(x: Tensor) -> Tensor:
        at = torch.searchsorted(order, x.contiguous()).clamp(max=order.shape[-1] - 1)
        return torch.where((order.gather(-1, at) == x) & (x >= 0), at, -1)

    return place(q), place(k)


def _rank(k: Tensor) -> Tensor:
    """How many earlier keys share a key's id, (B|1, Nk)."""
    order = torch.argsort(k, dim=-1, stable=True)
    ids = k.gather(-1, order).contiguous()
    rank = torch.arange(k.shape[-1], device=k.device) - torch.searchsorted(ids, ids)
    return torch.empty_like(rank).scatter(-1, order, rank)


def _key_mask(x: Tensor, call: Call) -> Tensor:
    """(B|1, Nk)"""
    where = "fastpe.mask.padding"
    x = x[None] if x.dim() == 1 else x
    _check.on_device(where, "key_mask", x, call.device)
    call.fits(where, "key_mask", x.shape[:1], ("batch entries", call.B))
    if x.shape[1] != call.Nk:
        raise ValueError(f"{where}: key_mask has {x.shape[1]} tokens, the call has {call.Nk} keys")
    return x


def _dense_mask(x: Tensor, call: Call) -> Tensor:
    """(B|1, H|1, Nq|1, Nk|1)"""
    where = "fastpe.mask.dense"
    x = x[None, None] if x.dim() == 2 else x
    _check.on_device(where, "mask", x, call.device)
    axes = ("batch entries", call.B), ("heads", call.H), ("queries", call.Nq), ("keys", call.Nk)
    call.fits(where, "mask", x.shape, *axes)
    return x


def causal() -> Mask:
    """No key after the query; query row i stands at I = i + Nk - Nq (bottom-right aligned).

    >>> import fastpe
    >>> fastpe.mask.causal()
    Mask(right=1)
    """
    return Mask(right=1)


def window(left: int | None = None, right: int | None = None) -> Mask:
    """Keys near the query: I - j < left and j - I < right, so `left` and `right` both count the query's own position.

    Args:
        left: keys to the past including the own one, at least 1; None: unlimited.
        right: keys to the future including the own one, at least 1; 1 is causal; None: unlimited.

    Raises:
        ValueError: left or right below 1.

    >>> import fastpe
    >>> fastpe.mask.window(4, right=1)          # the own key and the 3 before
    Mask(left=4, right=1)
    """
    for what, x in (("left", left), ("right", right)):
        if x is not None:
            _check.count("fastpe.mask.window", what, x, 1)
    return Mask(left=left, right=right)


def sinks(n: int) -> Mask:
    """The first n keys (of each document, if there are documents) stay visible outside the left window.

    Does nothing without a left window. With documents and a left window an Nq x Nk bool mask is built.

    Args:
        n: at least 0.

    >>> import fastpe
    >>> fastpe.mask.window(64, right=1) & fastpe.mask.sinks(4)
    Mask(left=64, right=1, sinks=4)
    """
    _check.count("fastpe.mask.sinks", "n", n, 0)
    return Mask(sinks=n)


def streaming(start: int = 4, recent: int = 2000) -> Mask:
    """What StreamingLLM's cache holds at every step: the first `start` keys, the last `recent` and the own one (arXiv 2309.17453).

    Goes with `fastpe.region.streaming(start, recent)`.

    Args:
        start: at least 0.
        recent: at least 1.

    >>> import fastpe
    >>> fastpe.mask.streaming(4, 100)
    Mask(left=101, right=1, sinks=4)
    """
    _check.count("fastpe.mask.streaming", "start", start, 0)
    _check.count("fastpe.mask.streaming", "recent", recent, 1)
    return Mask(left=recent + 1, right=1, sinks=start)


def documents(*, cu_seqlens: Tensor | None = None, ids: Tensor | None = None, key_ids: Tensor | None = None) -> Mask:
    """Tokens see their own document only. Give either cu_seqlens or ids.

    Args:
        cu_seqlens: (documents + 1,) integers, boundaries over the keys: starts at 0, never decreases, ends at most at Nk.
            Keys past its end are padding. The same for every batch entry.
        ids: (N,) or (B, N) integers below 2^31. Of the queries when key_ids is given; else of the keys, of which the
            queries are the last Nq. Equal ids need not be neighbours. Negative ids are padding.
        key_ids: (Nk,) or (B, Nk) integers.

    Raises:
        TypeError, ValueError: wrong types or shapes, boundaries out of order, ids beyond int32.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 6, 8)
    >>> packed = fastpe.mask.documents(cu_seqlens=torch.tensor([0, 4, 6])) & fastpe.mask.causal()
    >>> out = fastpe.attention(q, q, q, mask=packed)
    >>> torch.allclose(out[:, :, 4:], fastpe.attention(q[:, :, 4:], q[:, :, 4:], q[:, :, 4:], is_causal=True), atol=1e-6)
    True
    """
    where = "fastpe.mask.documents"
    if (cu_seqlens is None) == (ids is None):
        raise ValueError(f"{where}: give either cu_seqlens or ids")
    if cu_seqlens is not None:
        if key_ids is not None:
            raise ValueError(f"{where}: key_ids go with ids, not with cu_seqlens")
        _check.is_integer(where, "cu_seqlens", cu_seqlens)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(f"{where}: cu_seqlens must be (documents + 1,) with at least one document, got {_check.shape(cu_seqlens)}")
        if _check.can_read(cu_seqlens):
            if int(cu_seqlens[0]) != 0:
                raise ValueError(f"{where}: cu_seqlens must start at 0, got {int(cu_seqlens[0])}")
            fall = (cu_seqlens[1:] < cu_seqlens[:-1]).nonzero()
            if fall.numel():
                n = int(fall[0])
                raise ValueError(
                    f"{where}: cu_seqlens must not decrease, got {int(cu_seqlens[n])} then {int(cu_seqlens[n + 1])} at entry {n + 1}"
                )
    for what, x in (("ids", ids), ("key_ids", key_ids)):
        if x is None:
            continue
        _check.is_integer(where, what, x)
        if x.dim() not in (1, 2):
            raise ValueError(f"{where}: {what} must be (N,) or (B, N), got {_check.shape(x)}")
        if x.dtype == torch.int64 and x.numel() and _check.can_read(x) and int(x.max()) >= 2**31:
            raise ValueError(f"{where}: {what} must be below 2**31, got {int(x.max())}")
    return Mask(documents=(_Documents(ids=ids, key_ids=key_ids, cu_seqlens=cu_seqlens),))


def padding(key_mask: Tensor) -> Mask:
    """Hides padded keys.

    Args:
        key_mask: bool (B, Nk) or (Nk,), True for real tokens.

    >>> import torch, fastpe
    >>> fastpe.mask.padding(torch.tensor([[True, True, False]]))
    Mask(padding=(1, 3))
    """
    where = "fastpe.mask.padding"
    _check.is_bool(where, "key_mask", key_mask)
    if key_mask.dim() not in (1, 2):
        raise ValueError(f"{where}: key_mask must be (Nk,) or (B, Nk), got {_check.shape(key_mask)}")
    return Mask(padding=(key_mask,))


def dense(mask: Tensor) -> Mask:
    """Any visibility, as a bool array. Quadratic memory: a last resort.

    Args:
        mask: bool (Nq, Nk) or (B | 1, H | 1, Nq | 1, Nk | 1), True where visible.

    >>> import torch, fastpe
    >>> fastpe.mask.dense(torch.ones(4, 4, dtype=torch.bool).tril())
    Mask(dense=(4, 4))
    """
    where = "fastpe.mask.dense"
    _check.is_bool(where, "mask", mask)
    if mask.dim() not in (2, 4):
        raise ValueError(f"{where}: mask must be (Nq, Nk) or (B, H, Nq, Nk), got {_check.shape(mask)}")
    return Mask(dense=(mask,))
