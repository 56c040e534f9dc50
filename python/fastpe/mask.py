"""Which keys a query sees.

A mask object gathers visibility rules; `a & b` holds where both hold. With I = i + Nk - Nq the index of query row i among
the keys, key j is visible iff

    (no left window or I - j < left or j is one of the first `sinks` keys of its document)
    and (no right window or j - I < right)
    and (no documents, or both tokens belong to the same one)
    and (no padding, or the key is real)
    and (no dense mask, or mask[i, j])
    and (no intervals, or first_start[j] <= I < first_end[j] or second_start[j] <= I < second_end[j])
    and (no lower bound, or j >= lower[I])
    and (no segments, or relation[segment of i, segment of j])
    and (no blocks, or key block j // block_k is on the list of query block i // block_q)

All but the dense mask cost memory linear in the tokens (lists: one bit a pair of blocks). A row that sees nothing gives out 0, lse -inf and no gradient.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

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
            return _last_rows(where, k, call), k
        return _sides(where, self.ids, self.key_ids, call)


def _sides(where: str, ids: Tensor, key_ids: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """Numbers of the tokens: of queries (B|1, Nq) and of keys (B|1, Nk), int64. Without key_ids, ids are those of the keys, of
    which the queries are the last."""
    k = _tokens(where, "ids" if key_ids is None else "key_ids", ids if key_ids is None else key_ids, call.Nk, "keys", call)
    return (_last_rows(where, k, call) if key_ids is None else _tokens(where, "ids", ids, call.Nq, "queries", call)), k


def _tokens(where: str, what: str, x: Tensor, n: int, side: str, call: Call) -> Tensor:
    x = x[None] if x.dim() == 1 else x
    _check.on_device(where, what, x, call.device)
    call.fits(where, what, x.shape[:1], ("batch entries", call.B))
    if x.shape[1] != n:
        raise ValueError(f"{where}: {what} has {x.shape[1]} tokens, the call has {n} {side}")
    return x.to(torch.int64)


def _last_rows(where: str, k: Tensor, call: Call) -> Tensor:
    if call.Nq > call.Nk:
        raise ValueError(f"{where}: {call.Nq} queries and {call.Nk} keys: queries are the last keys unless ids and key_ids are given")
    return k[:, call.Nk - call.Nq :]


@dataclasses.dataclass(frozen=True, eq=False)
class _Intervals:
    """Which rows see a key: bounds (B|1, 4, N) hold first_start, first_end, second_start, second_end. Which keys a row may see:
    from lower (B|1, N) on. Both by absolute index; tokens past N are ordinary ones, where the rule is open."""

    where: str
    bounds: Tensor
    lower: Tensor | None = None
    open: bool = False

    def rows(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """bounds (B|1, 4, Nk) and lower (B|1, Nq), int64."""
        _check.on_device(self.where, "tokens", self.bounds, call.device)
        call.fits(self.where, "intervals", self.bounds.shape[:1], ("batch entries", call.B))
        n = self.bounds.shape[-1]
        if n > call.Nk or (n < call.Nk and not self.open):
            raise ValueError(f"{self.where}: given for {n} tokens, the call has {call.Nk} keys")
        bounds, lower = self.bounds, self.lower
        if n < call.Nk:
            rest = bounds.new_tensor([0, _END, 0, 0]).reshape(1, 4, 1).expand(bounds.shape[0], 4, call.Nk - n)
            bounds = torch.cat((bounds, rest), -1)
        if lower is not None:
            lower = torch.nn.functional.pad(lower, (0, call.Nk - n))
            lower = _last_rows(self.where, lower, call)
        return bounds, lower


# Later than any row.
_END = 2**31 - 1


@dataclasses.dataclass(frozen=True, eq=False)
class _Segments:
    """relation[segment of the query, segment of the key]."""

    where: str
    relation: Tensor  # bool (Sq, Sk)
    ids: Tensor
    key_ids: Tensor | None = None

    def sides(self, call: Call) -> tuple[Tensor, Tensor]:
        return _sides(self.where, self.ids, self.key_ids, call)


@dataclasses.dataclass(frozen=True, eq=False)
class _Blocks:
    """Lists of key blocks (B|1, H|1, query blocks, n), -1 behind the last, or the same as a bool map over all key blocks."""

    where: str
    lists: Tensor
    block_q: int
    block_k: int

    def map(self, call: Call) -> Tensor:
        """bool (B|1, H|1, query blocks, key blocks)."""
        x, where = self.lists, self.where
        rows, cols = -(-call.Nq // self.block_q), -(-call.Nk // self.block_k)
        _check.on_device(where, "lists", x, call.device)
        call.fits(where, "lists", x.shape[:2], ("batch entries", call.B), ("heads", call.H))
        if x.shape[2] != rows:
            raise ValueError(f"{where}: lists has {x.shape[2]} query blocks, the call has {rows} of {self.block_q} queries")
        if x.dtype == torch.bool:
            if x.shape[3] != cols:
                raise ValueError(f"{where}: lists has {x.shape[3]} key blocks, the call has {cols} of {self.block_k} keys")
            return x
        if x.numel() and _check.can_read(x) and int(x.max()) >= cols:
            raise ValueError(f"{where}: lists must hold key blocks below {cols}, got {int(x.max())}")
        # One column more takes what the padding writes.
        made = torch.zeros(*x.shape[:3], cols + 1, dtype=torch.bool, device=x.device)
        return made.scatter_(-1, torch.where(x < 0, cols, x), True)[..., :cols]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """Visibility rules; made by the functions of this module, combined with `&`.

    An Nq x Nk bool mask is made in these cases only, everything else is linear: a dense mask itself; sinks together with a left
    window and documents (the kernels know the first keys of the sequence, not those of each document); two interval rules
    that leave some key more than two intervals of rows; two segment tables whose product has more entries than there are pairs.

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
    intervals: tuple[_Intervals, ...] = ()
    segments: tuple[_Segments, ...] = ()
    blocks: tuple[_Blocks, ...] = ()

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
            intervals=self.intervals + other.intervals,
            segments=self.segments + other.segments,
            blocks=self.blocks + other.blocks,
        )

    def __repr__(self) -> str:
        parts = [f"{f}={getattr(self, f)}" for f in ("left", "right", "sinks") if getattr(self, f) is not None]
        for rule in self.documents:
            given = rule.cu_seqlens if rule.cu_seqlens is not None else rule.ids
            parts.append(f"documents={'cu_seqlens' if rule.cu_seqlens is not None else 'ids'}{tuple(given.shape)}")
        parts += [f"padding={tuple(x.shape)}" for x in self.padding]
        parts += [f"dense={tuple(x.shape)}" for x in self.dense]
        parts += [f"intervals={tuple(x.bounds[:, 0].shape)}" for x in self.intervals]
        parts += [f"segments={tuple(x.relation.shape)}" for x in self.segments]
        parts += [f"blocks={tuple(x.lists.shape)} of {x.block_q} x {x.block_k}" for x in self.blocks]
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
        more = [self._intervals(call), self._segments(call), self._blocks(call)]
        for dense in (one.pop("dense", None) for one in more):
            if dense is not None:
                mask = dense if mask is None else mask & dense
        return OpMask(left, self.right or 0, sinks, q, k, mask, **more[0], **more[1], **more[2])

    def _intervals(self, call: Call) -> dict:
        if not self.intervals:
            return {}
        bounds, lower = self.intervals[0].rows(call)
        dense = None
        for rule in self.intervals[1:]:
            more, low = rule.rows(call)
            both = _meet(bounds, more)
            if both is None:
                dense = _seen(more, call) if dense is None else dense & _seen(more, call)
            else:
                bounds = both
            lower = low if lower is None else lower if low is None else torch.maximum(*torch.broadcast_tensors(lower, low))
        args = {"intervals": bounds.clamp(max=call.Nk).to(torch.int32).contiguous(), "dense": dense}
        if lower is not None:
            args["lower"] = lower.to(torch.int32).contiguous()
        return args

    def _segments(self, call: Call) -> dict:
        if not self.segments:
            return {}
        first, *rest = self.segments
        (q, k), relation = first.sides(call), first.relation
        dense = None
        for rule in rest:
            q2, k2 = rule.sides(call)
            Sq, Sk = rule.relation.shape
            if relation.numel() * Sq * Sk > max(call.Nq * call.Nk, 4096):
                seen = _related(rule.relation, q2, k2)
                dense = seen if dense is None else dense & seen
                continue
            # A pair of segments is a segment of the product.
            relation = torch.kron(relation.byte(), rule.relation.byte()).bool()
            q, k = q * Sq + q2, k * Sk + k2
        ids = (x.to(torch.int32).contiguous() for x in (q, k))
        return {**dict(zip(("q_seg", "k_seg"), ids)), "relation": relation.contiguous(), "dense": dense}

    def _blocks(self, call: Call) -> dict:
        if not self.blocks:
            return {}
        block_q, block_k = (math.gcd(*(getattr(x, what) for x in self.blocks)) for what in ("block_q", "block_k"))
        shape = -(-call.Nq // block_q), -(-call.Nk // block_k)
        made = None
        for x in self.blocks:
            one = x.map(call)
            if x.block_q != block_q:
                one = one.repeat_interleave(x.block_q // block_q, -2)[..., : shape[0], :]
            if x.block_k != block_k:
                one = one.repeat_interleave(x.block_k // block_k, -1)[..., : shape[1]]
            made = one if made is None else made & one
        return {"block_map": made.contiguous(), "block_q": block_q, "block_k": block_k}

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
        for rule in self.intervals:
            bounds, lower = rule.rows(call)
            visible = visible & _seen(bounds, call)
            if lower is not None:
                visible = visible & (call.key_index() >= lower[..., None])[:, None]
        for rule in self.segments:
            visible = visible & _related(rule.relation, *rule.sides(call))
        for rule in self.blocks:
            i = torch.arange(call.Nq, device=call.device) // rule.block_q
            visible = visible & rule.map(call)[..., i, :][..., call.key_index() // rule.block_k]
        return visible


def _seen(bounds: Tensor, call: Call) -> Tensor:
    """(B|1, 4, Nk) -> bool (B|1, 1, Nq, Nk)"""
    i = call.query_index()[:, None]
    a1, b1, a2, b2 = bounds[:, :, None].unbind(1)
    return (((i >= a1) & (i < b1)) | ((i >= a2) & (i < b2)))[:, None]


def _meet(x: Tensor, y: Tensor) -> Tensor | None:
    """Rows in the intervals of both, (B|1, 4, N); None where that takes more than two intervals or cannot be known."""
    if not (_check.can_read(x) and _check.can_read(y)):
        return None
    starts, ends = [], []
    for a in (0, 2):
        for b in (0, 2):
            starts.append(torch.maximum(*torch.broadcast_tensors(x[:, a], y[:, b])))
            ends.append(torch.minimum(*torch.broadcast_tensors(x[:, a + 1], y[:, b + 1])))
    start, end = torch.stack(starts, -1), torch.stack(ends, -1)
    empty = start >= end
    if bool(((~empty).sum(-1) > 2).any()):
        return None
    order = torch.where(empty, _END, start).argsort(-1)[..., :2]
    start, end, empty = (t.gather(-1, order) for t in (start, end, empty))
    start, end = torch.where(empty, 0, start), torch.where(empty, 0, end)
    return torch.stack((start[..., 0], end[..., 0], start[..., 1], end[..., 1]), 1)


def _related(relation: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """bool (B|1, 1, Nq, Nk)"""
    return relation[q[:, :, None], k[:, None, :]][:, None]


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


def intervals(
    first_start: Tensor,
    first_end: Tensor,
    second_start: Tensor | None = None,
    second_end: Tensor | None = None,
    *,
    lower: Tensor | None = None,
) -> Mask:
    """A key is seen by one or two ranges of rows, and a row sees nothing before its lower bound. Linear memory.

    Row I sees key j iff first_start[j] <= I < first_end[j] or second_start[j] <= I < second_end[j], and j >= lower[I]. Causality is
    a rule of its own: `& fastpe.mask.causal()`.

    Args:
        first_start, first_end: int (Nk,) or (B, Nk), rows by absolute index I = i + Nk - Nq; an end at or before its start is
            an empty range.
        second_start, second_end: the second range, which must not overlap the first.
        lower: int (N,) or (B, N), one entry a token, of which the queries are the last.

    Raises:
        TypeError: not integers.
        ValueError: shapes that differ, ranges that overlap, negative numbers, lower bounds past the last key.

    >>> import torch, fastpe
    >>> start, end = torch.tensor([0, 0, 2, 2]), torch.tensor([4, 2, 4, 4])      # key 1 is seen by rows 0 and 1 only
    >>> fastpe.mask.intervals(start, end)
    Mask(intervals=(1, 4))
    """
    where = "fastpe.mask.intervals"
    given = {"first_start": first_start, "first_end": first_end, "second_start": second_start, "second_end": second_end}
    if (second_start is None) != (second_end is None):
        raise ValueError(f"{where}: second_start and second_end go together")
    parts = []
    for what, x in given.items():
        if x is None:
            parts.append(torch.zeros_like(parts[0]))
            continue
        parts.append(_index(where, what, x))
        if parts[-1].shape[-1] != parts[0].shape[-1]:
            raise ValueError(f"{where}: {what} has {parts[-1].shape[-1]} tokens, first_start has {parts[0].shape[-1]}")
    a1, b1, a2, b2 = torch.broadcast_tensors(*parts)
    if _check.can_read(a1):
        clash = ((a1 < b1) & (a2 < b2) & (a1 < b2) & (a2 < b1)).nonzero()
        if clash.numel():
            at = tuple(clash[0].tolist())
            ranges = f"[{int(a1[at])}, {int(b1[at])}) and [{int(a2[at])}, {int(b2[at])})"
            raise ValueError(f"{where}: the ranges of a key must not overlap, got {ranges} at key {at[-1]}")
    if lower is not None:
        lower = _index(where, "lower", lower)
        n = lower.shape[-1]
        if n != a1.shape[-1]:
            raise ValueError(f"{where}: lower has {n} tokens, first_start has {a1.shape[-1]}")
        if lower.numel() and _check.can_read(lower) and int(lower.max()) > n:
            raise ValueError(f"{where}: lower must be at most {n}, got {int(lower.max())}")
    return Mask(intervals=(_Intervals(where, torch.stack((a1, b1, a2, b2), 1), lower),))


def _index(where: str, what: str, x: Tensor) -> Tensor:
    """Non-negative integers (N,) or (B, N) as int64 (B|1, N)."""
    _check.is_integer(where, what, x)
    if x.dim() not in (1, 2):
        raise ValueError(f"{where}: {what} must be (N,) or (B, N), got {_check.shape(x)}")
    if x.numel() and _check.can_read(x):
        low, high = (int(n) for n in torch.aminmax(x))
        if low < 0 or high > _END:
            raise ValueError(f"{where}: {what} must lie in [0, 2**31), got {low if low < 0 else high}")
    return (x[None] if x.dim() == 1 else x).to(torch.int64)


def segments(relation: Tensor, ids: Tensor, key_ids: Tensor | None = None) -> Mask:
    """Which segments see which: row i sees key j iff relation[ids[i], key_ids[j]].

    Args:
        relation: bool (Sq, Sk).
        ids: int (N,) or (B, N) in [0, Sq). Of the queries when key_ids is given; else of the keys, of which the queries are the
            last, and then Sq = Sk.
        key_ids: int (Nk,) or (B, Nk) in [0, Sk).

    Raises:
        TypeError, ValueError: wrong types or shapes, segments that the relation does not have.

    >>> import torch, fastpe
    >>> history_and_answers = torch.tensor([[True, True, True], [True, True, False], [True, False, True]])
    >>> fastpe.mask.segments(history_and_answers, torch.tensor([0, 0, 1, 1, 2]))
    Mask(segments=(3, 3))
    """
    where = "fastpe.mask.segments"
    _check.is_bool(where, "relation", relation)
    if relation.dim() != 2 or 0 in relation.shape:
        raise ValueError(f"{where}: relation must be (Sq, Sk), got {_check.shape(relation)}")
    if key_ids is None and relation.shape[0] != relation.shape[1]:
        raise ValueError(f"{where}: relation must be square without key_ids, got {_check.shape(relation)}")
    for what, x, size in (("ids", ids, relation.shape[0]), ("key_ids", key_ids, relation.shape[1])):
        if x is None:
            continue
        _index(where, what, x)
        if x.numel() and _check.can_read(x) and int(x.max()) >= size:
            raise ValueError(f"{where}: {what} must be below {size}, the size of the relation, got {int(x.max())}")
    return Mask(segments=(_Segments(where, relation, ids, key_ids),))


def blocks(lists: Tensor, block_q: int = 64, block_k: int = 64) -> Mask:
    """Lists of key blocks: rows of query block i // block_q see the key blocks on its list. Hidden blocks cost nothing.

    Args:
        lists: int (query blocks, n) or (B | 1, H | 1, query blocks, n), ascending, -1 behind the last; or bool of the same shape with
            n = key blocks, True where on the list. Query blocks are counted from the first query of the call.
        block_q, block_k: rows and keys of a block, at least 1. The last ones may be cut.

    Raises:
        TypeError, ValueError: wrong types or shapes; lists that are not ascending or hold blocks the call does not have.

    >>> import torch, fastpe
    >>> fastpe.mask.blocks(torch.tensor([[0, -1], [0, 1]]), 2, 2) & fastpe.mask.causal()
    Mask(right=1, blocks=(1, 1, 2, 2) of 2 x 2)
    """
    where = "fastpe.mask.blocks"
    _check.count(where, "block_q", block_q, 1)
    _check.count(where, "block_k", block_k, 1)
    _check.is_tensor(where, "lists", lists)
    if lists.dtype != torch.bool:
        _check.is_integer(where, "lists", lists)
    if lists.dim() not in (2, 4):
        raise ValueError(f"{where}: lists must be (query blocks, n) or (B, H, query blocks, n), got {_check.shape(lists)}")
    lists = lists[None, None] if lists.dim() == 2 else lists
    if lists.dtype != torch.bool:
        lists = lists.to(torch.int64)
        if lists.numel() and _check.can_read(lists):
            if int(lists.min()) < -1:
                raise ValueError(f"{where}: lists must hold key blocks or -1, got {int(lists.min())}")
            before, after = lists[..., :-1], lists[..., 1:]
            fall = ((after >= 0) & (before >= after) | (before < 0) & (after >= 0)).nonzero()
            if fall.numel():
                at = tuple(fall[0].tolist())
                raise ValueError(
                    f"{where}: lists must be ascending, -1 behind the last, got {int(before[at])} then {int(after[at])} in query block {at[2]}"
                )
    return Mask(blocks=(_Blocks(where, lists, block_q, block_k),))


# ---------------------------------------------------------------------------------------------------------------------
# Layouts of published methods. All are causal but Uni-Encoder's.


def parallel(prefix: int, lengths: Sequence[int], *, hidden: Sequence[int] = (), device: torch.device | str | None = None) -> Mask:
    """Parallel pieces between a shared prefix and what follows: every piece sees the prefix and itself, later tokens see all.

    Tokens are laid out prefix, piece 1, ..., piece n, rest. The layout of parallel context windows (`pcw`), adaptive parallel
    encoding (`ape`), structured prompting and superposition prompting.

    Args:
        prefix: tokens of the prefix.
        lengths: tokens of each piece.
        hidden: pieces that the rest does not see (superposition prompting prunes some).
        device: where the call runs; the default device if not given.

    Raises:
        TypeError, ValueError: negative lengths, hidden pieces that do not exist.

    >>> import torch, fastpe
    >>> call = fastpe.bias.Call(1, 1, 5, 5, True, torch.float64, torch.device("cpu"))
    >>> fastpe.mask.parallel(1, [1, 2]).materialize(call)[0, 0].int().tolist()
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1]]
    """
    return _parallel("fastpe.mask.parallel", prefix, lengths, hidden, device)


def _parallel(where: str, prefix: int, lengths: Sequence[int], hidden: Sequence[int], device) -> Mask:
    _check.count(where, "prefix", prefix, 0)
    for n in lengths:
        _check.count(where, "lengths", n, 0)
    for n in hidden:
        if _check.count(where, "hidden", n, 0) >= len(lengths):
            raise ValueError(f"{where}: hidden must be below {len(lengths)}, the number of pieces, got {n}")
    edges = [prefix]
    for n in lengths:
        edges.append(edges[-1] + n)
    total = edges[-1]
    bounds = torch.zeros(1, 4, total, dtype=torch.int64, device=device)
    bounds[:, 1, :prefix] = _END
    for n, (start, end) in enumerate(zip(edges, edges[1:])):
        bounds[:, 1, start:end] = end
        bounds[:, 2, start:end] = total
        bounds[:, 3, start:end] = 0 if n in hidden else _END
    return Mask(right=1, intervals=(_Intervals(where, bounds, open=True),))


def pcw(lengths: Sequence[int], *, device: torch.device | str | None = None) -> Mask:
    """Parallel context windows (arXiv 2212.10947).

    Tokens are laid out as released: the longest window first, the others without their first token (all windows begin with the same
    one), then the task tokens, which see everything.

    Args:
        lengths: tokens of each window with its first token, in any order; the longest counts as the first.
        device: as in `parallel`.

    Raises:
        ValueError: a window of no token.

    >>> import fastpe
    >>> fastpe.mask.pcw([3, 5, 4])
    Mask(right=1, intervals=(1, 10))
    """
    where = "fastpe.mask.pcw"
    for n in lengths:
        _check.count(where, "lengths", n, 1)
    longest = max(range(len(lengths)), key=lengths.__getitem__) if len(lengths) else 0
    order = sorted(range(len(lengths)), key=lambda n: n != longest)
    return _parallel(where, min(1, len(lengths)), [lengths[n] - 1 for n in order], (), device)


def ape(prefix: int, lengths: Sequence[int], *, device: torch.device | str | None = None) -> Mask:
    """Adaptive parallel encoding: `parallel` under its name (arXiv 2502.05431); `fastpe.recipes.ape` adds its merging.

    >>> import fastpe
    >>> fastpe.mask.ape(6, [15, 22, 9])
    Mask(right=1, intervals=(1, 52))
    """
    return _parallel("fastpe.mask.ape", prefix, lengths, (), device)


def structured_prompting(groups: int, length: int, *, device: torch.device | str | None = None) -> Mask:
    """Structured prompting: `groups` groups of `length` tokens, then test tokens that see all (arXiv 2212.06713).

    >>> import fastpe
    >>> fastpe.mask.structured_prompting(3, 16)
    Mask(right=1, intervals=(1, 48))
    """
    _check.count("fastpe.mask.structured_prompting", "groups", groups, 0)
    return _parallel("fastpe.mask.structured_prompting", 0, [length] * groups, (), device)


def superposition(
    preamble: int, contexts: Sequence[int], query: int, *, hidden: Sequence[int] = (), device: torch.device | str | None = None
) -> Mask:
    """Superposition prompting: preamble, then (context, query) for each document, then the task (arXiv 2404.06910).

    Args:
        preamble: tokens before all.
        contexts: tokens of each document.
        query: tokens of the query that follows every document.
        hidden: documents pruned from what the task sees.
        device: as in `parallel`.

    >>> import fastpe
    >>> fastpe.mask.superposition(5, [9, 14, 11], 6)
    Mask(right=1, intervals=(1, 57))
    """
    _check.count("fastpe.mask.superposition", "query", query, 0)
    return _parallel("fastpe.mask.superposition", preamble, [n + query for n in contexts], hidden, device)


def uni_encoder(history: int, lengths: Sequence[int], kind: str = "arrow", *, device: torch.device | str | None = None) -> Mask:
    """Uni-Encoder: a history and several candidate answers in one bidirectional pass (github.com/dll-wu/Uni-Encoder).

    Args:
        history: tokens of the history, laid out first.
        lengths: tokens of each candidate.
        kind: "arrow": the history sees everything, a candidate the history and itself; "diag": everybody only itself;
            "square": everything.
        device: as in `parallel`.

    Raises:
        ValueError: an unknown kind, negative lengths.

    >>> import fastpe
    >>> fastpe.mask.uni_encoder(10, [3, 4])
    Mask(segments=(3, 3))
    """
    where = "fastpe.mask.uni_encoder"
    if kind not in ("arrow", "diag", "square"):
        raise ValueError(f"{where}: kind must be 'arrow', 'diag' or 'square', got {kind!r}")
    for what, n in (("history", history), *(("lengths", n) for n in lengths)):
        _check.count(where, what, n, 0)
    size = 1 + len(lengths)
    relation = torch.eye(size, dtype=torch.bool, device=device)
    if kind == "arrow":
        relation[0], relation[:, 0] = True, True
    elif kind == "square":
        relation[:] = True
    counts = torch.tensor([history, *lengths], device=device)
    return Mask(segments=(_Segments(where, relation, torch.repeat_interleave(torch.arange(size, device=device), counts)),))


def anchor(ids: Tensor) -> Mask:
    """AnchorAttention: causal within a document, and document 0 is seen by all (arXiv 2411.13476).

    The published setting is one anchor token of id 0 in front, positions counted through. Documents may be in pieces: ids repeat.
    Its "intra" and "flash" variants are `documents(ids=ids) & causal()`, the latter with positions 0 at the first tokens.

    Args:
        ids: int (N,) or (B, N), document of every key, at least 0.

    Raises:
        TypeError, ValueError: wrong types or shapes, negative ids.

    >>> import torch, fastpe
    >>> fastpe.mask.anchor(torch.tensor([0, 1, 1, 2, 2, 2]))                 # documents in one piece each: intervals
    Mask(right=1, intervals=(1, 6))
    >>> fastpe.mask.anchor(torch.tensor([0, 1, 2, 1, 2]))
    Mask(right=1, segments=(3, 3))
    """
    where = "fastpe.mask.anchor"
    x = _index(where, "ids", ids)
    if not _check.can_read(x):
        raise NotImplementedError(f"{where}: reads ids to choose its rule; make the mask outside of torch.compile")
    n = x.shape[-1]
    if n == 0:
        return Mask(right=1)
    new, sorted_ids = _starts(x), x.sort(-1).values
    if bool((new.sum(-1) == _starts(sorted_ids).sum(-1)).all()):  # as many pieces as documents
        end = torch.where(x == 0, _END, _next(new))
        zero = torch.zeros_like(end)
        return Mask(right=1, intervals=(_Intervals(where, torch.stack((zero, end, zero, zero), 1)),))
    size = 1 + int(x.max())
    relation = torch.eye(size, dtype=torch.bool, device=x.device)
    relation[:, 0] = True
    return Mask(right=1, segments=(_Segments(where, relation, ids),))


def _starts(ids: Tensor) -> Tensor:
    """True where a token's number differs from the one before; (B, N)."""
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return new


def _next(marks: Tensor) -> Tensor:
    """The first marked index after each token, _END where there is none; (B, N)."""
    at = torch.where(marks, torch.arange(marks.shape[-1], device=marks.device), _END)
    after = torch.nn.functional.pad(at[..., 1:], (0, 1), value=_END)
    return after.flip(-1).cummin(-1).values.flip(-1)


def _marks(where: str, what: str, x: Tensor) -> Tensor:
    _check.is_tensor(where, what, x)
    if x.dtype != torch.bool or x.dim() not in (1, 2):
        raise ValueError(f"{where}: {what} must be bool (N,) or (B, N), got {_check.name(x.dtype)} {_check.shape(x)}")
    return x[None] if x.dim() == 1 else x


def sentinel(opens: Tensor, closes: Tensor) -> Mask:
    """Sentinel tokens: a span between an opening and a closing token is compressed into the latter (arXiv 2310.08152).

    An opening token sees itself; a closing one its span with both ends; tokens in a span what is outside spans before it, closing
    tokens and their own span but for its opening; later tokens see closing tokens and what is outside spans.

    Args:
        opens, closes: bool (N,) or (B, N), True at opening and closing tokens. They alternate; the last span may stay open.

    Raises:
        ValueError: wrong types or shapes, tokens that do not alternate.

    >>> import torch, fastpe
    >>> tokens = torch.tensor([0, 1, 0, 0, 2, 0])
    >>> fastpe.mask.sentinel(tokens == 1, tokens == 2)
    Mask(right=1, intervals=(1, 6))
    """
    where = "fastpe.mask.sentinel"
    opens, closes = torch.broadcast_tensors(_marks(where, "opens", opens), _marks(where, "closes", closes))
    n = opens.shape[-1]
    if n == 0:
        return Mask(right=1)
    depth = opens.long().cumsum(-1) - closes.long().cumsum(-1)
    if depth.numel() and _check.can_read(depth) and (int(depth.min()) < 0 or int(depth.max()) > 1 or bool((opens & closes).any())):
        raise ValueError(f"{where}: opening and closing tokens must alternate, opening first")
    j = torch.arange(n, device=opens.device).expand_as(depth)
    close = _next(closes)
    inside = (depth == 1) & ~opens
    end = torch.where(opens, j + 1, torch.where(inside, close + 1, _END))
    # The closing row sees the opening key too.
    start2 = torch.where(opens, close, 0)
    end2 = torch.where(opens & (close < _END), close + 1, 0)
    opened = torch.where(opens, j, 0).cummax(-1).values
    lower = torch.where(opens, j, torch.where(closes, opened, 0))
    bounds = torch.stack((torch.zeros_like(end), end, start2, end2), 1)
    return Mask(right=1, intervals=(_Intervals(where, bounds, lower),))


def compressed(marks: Tensor, kind: str = "concat", sums: Tensor | None = None) -> Mask:
    """Compression tokens: a run of them closes each segment and stands for it (CCM, arXiv 2312.03414; gist tokens, 2304.08467).

    A token sees its own segment, which ends with its run of compression tokens, and of the others:

    * "concat": after the last run, all compression tokens;
    * "concat_recur": all earlier compression tokens;
    * "recur" (gist): the run that closed the segment before;
    * "merge": each run is followed by a run of sum tokens. A sum token sees all compression tokens so far and its own run; other
      tokens their segment and the sum tokens before it. `fastpe.recipes.ccm_merge` averages their keys and values.

    Args:
        marks: bool (N,) or (B, N), True at compression tokens.
        kind: one of the above.
        sums: bool like marks, True at sum tokens; for "merge" only.

    Raises:
        ValueError: an unknown kind, wrong types or shapes, sums with another kind than "merge" or "merge" without.

    >>> import torch, fastpe
    >>> marks = torch.tensor([0, 0, 1, 0, 0, 1, 0]).bool()
    >>> fastpe.mask.compressed(marks, "recur")
    Mask(right=1, intervals=(1, 7))
    """
    where = "fastpe.mask.compressed"
    kinds = ("concat", "concat_recur", "recur", "merge")
    if kind not in kinds:
        raise ValueError(f"{where}: kind must be one of {', '.join(map(repr, kinds))}, got {kind!r}")
    if (sums is None) == (kind == "merge"):
        raise ValueError(f"{where}: kind {kind!r} {'needs' if kind == 'merge' else 'takes no'} sums")
    marks = _marks(where, "marks", marks)
    n = marks.shape[-1]
    if n == 0:
        return Mask(right=1)
    if kind == "merge":
        return _compressed_merge(where, marks, _marks(where, "sums", sums))
    after = torch.zeros_like(marks)  # the first token of every segment but the first
    after[:, 1:] = marks[:, :-1] & ~marks[:, 1:]
    end = _next(after)
    start2, end2 = torch.zeros_like(end), torch.zeros_like(end)
    if kind == "concat":
        last = torch.where(marks, torch.arange(1, n + 1, device=marks.device), 0).amax(-1, keepdim=True)
        seen = marks & (end <= last)
        start2, end2 = torch.where(seen, last, 0), torch.where(seen, _END, 0)
    elif kind == "concat_recur":
        end = torch.where(marks, _END, end)
    else:
        # The end of the next segment, for which the sequence without a next one is followed by one that never ends.
        ends = torch.nn.functional.pad(end, (0, 1), value=_END)
        end = torch.where(marks, ends.gather(-1, end.clamp(max=n)), end)
    bounds = torch.stack((torch.zeros_like(end), end, start2, end2), 1)
    return Mask(right=1, intervals=(_Intervals(where, bounds),))


def _compressed_merge(where: str, marks: Tensor, sums: Tensor) -> Mask:
    """Three segments a turn: text 3 s, compression tokens 3 s + 1, sum tokens 3 s + 2."""
    marks, sums = torch.broadcast_tensors(marks, sums)
    turn = torch.zeros_like(marks)
    turn[:, 1:] = sums[:, :-1] & ~sums[:, 1:]
    turn = turn.long().cumsum(-1)
    ids = 3 * turn + marks.long() + 2 * sums.long()
    if not _check.can_read(ids):
        raise NotImplementedError(f"{where}: 'merge' reads marks to size its table; make the mask outside of torch.compile")
    size = 3 * (1 + int(turn.max()))
    s = torch.arange(size, device=marks.device)
    (q, q_kind), (k, k_kind) = (s[:, None] // 3, s[:, None] % 3), (s // 3, s % 3)
    text = ((k_kind < 2) & (k == q)) | ((k_kind == 2) & (k == q - 1))
    total = ((k_kind == 1) & (k <= q)) | ((k_kind == 2) & (k == q))
    relation = torch.where(q_kind == 2, total, text)
    return Mask(right=1, segments=(_Segments(where, relation, ids),))
