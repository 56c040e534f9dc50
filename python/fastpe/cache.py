"""Keys and values kept between calls: what decoding needs."""

from __future__ import annotations

import dataclasses

import torch

from . import _check
from ._call import Call
from ._decode import run
from ._rope import Rope, XposRope
from .attention import _check_kinds, _plan, _region_rotation, _rotation, attention
from .mask import Mask, causal
from .ops import aux_dtype
from .prefix import BLOCK, Prefix
from .rotary import apply_rotary

Tensor = torch.Tensor

_WHERE = "fastpe.KVCache"


@dataclasses.dataclass
class _Pool:
    """Pages shared by a cache and its forks."""

    key: Tensor  # (pages, Hk, page size, D)
    value: Tensor
    uses: list[int]  # how many sequences point at a page

    @property
    def free(self) -> int:
        return self.uses.count(0)

    def take(self) -> int:
        page = self.uses.index(0)
        self.uses[page] = 1
        return page


class KVCache:
    """Keys and values of B sequences of one length, in one block of memory or in pages, and attention over them.

    Keys are kept raw by default, so that every rule of positions works on them: frequencies that depend on the length (dynamic NTK),
    regions (Self-Extend, ReRoPE, dual chunk), positions after an eviction. `rotated=True` stores rotated keys, which decodes a little
    faster where the rope never changes. Decoding token by token gives what one call over the whole sequence gives.

    Args:
        batch: B, sequences.
        heads: Hk, key heads.
        channels: D; value_channels: Dv, default D.
        capacity: tokens a sequence may hold; with pages, tokens of all pages together (shared by forks).
        rope: rotary embedding of queries and keys.
        rotated: store rotated keys.
        page_size: tokens of a page, a multiple of 16; None: one block of memory for each sequence. Pages are read in place.
        dtype: of keys and values, default float32. device: default CPU.

    Attributes:
        length: tokens held.
        positions: (N,) or (B, N) int64, where the held tokens stand in the text; None after an eviction by head.
        prefix: `Prefix` of the increments given to append, for Cable and Forget; None without any.
        values_of: name -> (B, X, N), the per-token values given to append.

    >>> import torch, fastpe
    >>> cache = fastpe.KVCache(1, 2, 16, capacity=64, rope=fastpe.rope.default(16))
    >>> q, k, v = torch.randn(1, 4, 10, 16), torch.randn(1, 2, 10, 16), torch.randn(1, 2, 10, 16)
    >>> whole = fastpe.attention(q, k, v, rope=cache.rope, is_causal=True)
    >>> steps = []
    >>> for t in range(10):
    ...     cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    ...     steps.append(cache.attention(q[:, :, t : t + 1]))
    >>> torch.allclose(torch.cat(steps, 2), whole, atol=1e-5)
    True
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        channels: int,
        value_channels: int | None = None,
        *,
        capacity: int,
        rope: Rope | None = None,
        rotated: bool = False,
        page_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        for what, x in (("batch", batch), ("heads", heads), ("channels", channels), ("capacity", capacity)):
            _check.count(_WHERE, what, x, 1)
        value_channels = channels if value_channels is None else _check.count(_WHERE, "value_channels", value_channels, 1)
        if dtype not in _check.FLOATS:
            raise TypeError(f"{_WHERE}: dtype must be float32, bfloat16, float16 or float64, got {_check.name(dtype)}")
        if rope is not None and not isinstance(rope, Rope):
            raise TypeError(f"{_WHERE}: rope must be a fastpe.rope object, got {type(rope).__name__}")
        if rotated and rope is None:
            raise ValueError(f"{_WHERE}: rotated keys need a rope")
        if rotated and (rope.at_length(1) is not rope or isinstance(rope, XposRope)):
            raise NotImplementedError(f"{_WHERE}: rope {rope.name} turns a key by more than its own position; keep raw keys")
        self.batch, self.heads, self.channels, self.value_channels = batch, heads, channels, value_channels
        self.capacity, self.rope, self.rotated, self.page_size, self.dtype = capacity, rope, rotated, page_size, dtype
        self.length = 0
        self.positions: Tensor | None = torch.zeros(0, dtype=torch.int64, device=device)
        self.values_of: dict[str, Tensor] = {}
        self._local = self._base = None  # of the prefix, with room
        self._next = 0  # the position of the next token
        if page_size is None:
            self._key = torch.empty(batch, heads, capacity, channels, dtype=dtype, device=device)
            self._value = torch.empty(batch, heads, capacity, value_channels, dtype=dtype, device=device)
            return
        _check.count(_WHERE, "page_size", page_size, 16)
        if page_size % 16 or capacity % page_size:
            raise ValueError(f"{_WHERE}: page_size must be a multiple of 16 that divides capacity {capacity}, got {page_size}")
        pages = capacity // page_size
        key = torch.empty(pages, heads, page_size, channels, dtype=dtype, device=device)
        self._pool = _Pool(key, torch.empty(pages, heads, page_size, value_channels, dtype=dtype, device=device), [0] * pages)
        self._pages: list[list[int]] = [[] for _ in range(batch)]

    def __repr__(self) -> str:
        kind = "contiguous" if self.page_size is None else f"pages of {self.page_size}"
        return f"KVCache(batch={self.batch}, heads={self.heads}, length={self.length}, {kind}, {_check.name(self.dtype)})"

    # ---- what is held

    @property
    def key(self) -> Tensor:
        """(B, Hk, N, D): a view of the block, or a copy out of the pages."""
        return self._held(self._key) if self.page_size is None else self._collect(self._pool.key)

    @property
    def value(self) -> Tensor:
        """(B, Hk, N, Dv), as `key`."""
        return self._held(self._value) if self.page_size is None else self._collect(self._pool.value)

    @property
    def pages(self) -> Tensor:
        """(B, ceil(N / page_size)) int32, the page of every run of tokens."""
        if self.page_size is None:
            raise ValueError(f"{_WHERE}.pages: the cache is one block of memory")
        return torch.tensor(self._pages, dtype=torch.int32).reshape(self.batch, -1)

    @property
    def prefix(self) -> Prefix | None:
        if self._local is None:
            return None
        return Prefix(self._local[..., : self.length], self._base[..., : (self.length + BLOCK - 1) // BLOCK])

    def _held(self, x: Tensor) -> Tensor:
        return x[:, :, : self.length]

    def _collect(self, pool: Tensor) -> Tensor:
        rows = pool[self.pages.long().to(pool.device)]  # (B, pages, Hk, size, D)
        return rows.transpose(1, 2).flatten(2, 3)[:, :, : self.length]

    # ---- append

    @torch.no_grad()
    def append(self, key: Tensor, value: Tensor, *, increments: Tensor | None = None, **values: Tensor) -> None:
        """Adds M tokens to every sequence. Nothing is written when anything is wrong.

        Args:
            key: (B, Hk, M, D), un-rotated. value: (B, Hk, M, Dv).
            increments: (B, H, M) terms of the prefix sum a cumulative bias needs (Cable, Forget: the log gates); with every append
                or with none.
            values: (B, X, M) further values of each token by name, found again in `values_of`.

        Raises:
            ValueError: a shape that does not fit, or more tokens than there is room for, with capacity and need.
        """
        where = f"{_WHERE}.append"
        M = self._check_new(where, key, value)
        self._check_room(where, M)
        for name, x in (({} if increments is None else {"increments": increments}) | values).items():
            _check.is_float(where, name, x)
            if x.dim() != 3 or x.shape[0] != self.batch or x.shape[2] != M:
                raise ValueError(f"{where}: {name} must be ({self.batch}, heads, {M}), got {_check.shape(x)}")
        if self.length and (increments is None) != (self._local is None):
            raise ValueError(f"{where}: increments belong to every append or to none")
        if increments is not None and self._local is not None and increments.shape[1] != self._local.shape[1]:
            raise ValueError(f"{where}: increments have {increments.shape[1]} heads, the cache's {self._local.shape[1]}")
        for name, x in values.items():
            held = self.values_of.get(name)
            if self.length and (held is None or held.shape[1] != x.shape[1]):
                raise ValueError(f"{where}: {name} must come with every append, with the same heads")
        if self.length and self.values_of.keys() != values.keys():
            raise ValueError(f"{where}: values {sorted(values)} came, the cache keeps {sorted(self.values_of)}")

        new = torch.arange(self._next, self._next + M, device=key.device)
        if self.rotated:
            key = apply_rotary(key, self.rope, new)
        self._write(key, value)
        if increments is not None:
            self._extend_prefix(increments)
        for name, x in values.items():
            self.values_of[name] = x.clone() if not self.length else torch.cat([self.values_of[name], x], 2)
        if self.positions is not None:
            self.positions = torch.cat([self.positions, new.expand(*self.positions.shape[:-1], M)], -1)
        self.length += M
        self._next += M

    def _check_new(self, where: str, key: Tensor, value: Tensor) -> int:
        for what, x, channels in (("key", key, self.channels), ("value", value, self.value_channels)):
            _check.is_float(where, what, x)
            if x.dim() != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (self.batch, self.heads, channels):
                raise ValueError(f"{where}: {what} must be ({self.batch}, {self.heads}, M, {channels}), got {_check.shape(x)}")
            if x.dtype != self.dtype:
                raise TypeError(f"{where}: {what} is {_check.name(x.dtype)}, the cache holds {_check.name(self.dtype)}")
        if value.shape[2] != key.shape[2]:
            raise ValueError(f"{where}: value has {value.shape[2]} tokens, key has {key.shape[2]}")
        return key.shape[2]

    def _check_room(self, where: str, M: int) -> None:
        if self.page_size is None:
            if self.length + M > self.capacity:
                raise ValueError(f"{where}: capacity is {self.capacity} tokens, {self.length + M} are needed ({self.length} held, {M} new)")
            return
        need = self._new_pages(M)
        if need > self._pool.free:
            raise ValueError(
                f"{where}: capacity is {len(self._pool.uses)} pages of {self.page_size} tokens, {need} more are needed for {M} tokens of "
                f"{self.batch} sequences, {self._pool.free} are free"
            )

    def _new_pages(self, M: int) -> int:
        """Pages that M more tokens take, copies of shared ones among them."""
        if M == 0:
            return 0
        size = self.page_size
        fresh = (self.length + M + size - 1) // size - (self.length + size - 1) // size
        need = fresh * self.batch
        if self.length % size:
            # All but the last owner of a page that is written must have their own.
            writers: dict[int, int] = {}
            for row in self._pages:
                writers[row[-1]] = writers.get(row[-1], 0) + 1
            need += sum(n - (self._pool.uses[page] == n) for page, n in writers.items())
        return need

    def _write(self, key: Tensor, value: Tensor) -> None:
        M = key.shape[2]
        if self.page_size is None:
            self._key[:, :, self.length : self.length + M] = key
            self._value[:, :, self.length : self.length + M] = value
            return
        pool, size = self._pool, self.page_size
        for b, row in enumerate(self._pages):
            if self.length % size and M and pool.uses[row[-1]] > 1:  # copy on write
                own = pool.take()
                pool.key[own], pool.value[own] = pool.key[row[-1]], pool.value[row[-1]]
                pool.uses[row[-1]] -= 1
                row[-1] = own
            done = 0
            while done < M:
                at = (self.length + done) % size
                if at == 0:
                    row.append(pool.take())
                n = min(size - at, M - done)
                pool.key[row[-1], :, at : at + n] = key[b, :, done : done + n]
                pool.value[row[-1], :, at : at + n] = value[b, :, done : done + n]
                done += n

    def _extend_prefix(self, x: Tensor) -> None:
        x = x.to(aux_dtype(x.dtype))
        room = self.capacity
        n, M = self.length, x.shape[2]
        if self._local is None:
            self._local = x.new_empty(self.batch, x.shape[1], room)
            self._base = x.new_empty(self.batch, x.shape[1], (room + BLOCK - 1) // BLOCK, dtype=torch.float64)
        # The last block alone goes on: appending costs what is appended.
        first = max(n - 1, 0) // BLOCK * BLOCK
        last = Prefix(self._local[..., first:n].clone(), self._base[..., first // BLOCK : (n + BLOCK - 1) // BLOCK].clone()).append(x)
        self._local[..., first : n + M] = last.local
        self._base[..., first // BLOCK : (n + M + BLOCK - 1) // BLOCK] = last.base

    # ---- change

    @torch.no_grad()
    def trim(self, length: int) -> None:
        """Forgets all tokens from `length` on (rejected drafts, a retried answer).

        Raises:
            ValueError: length is more than is held.
        """
        where = f"{_WHERE}.trim"
        _check.count(where, "length", length, 0)
        if length > self.length:
            raise ValueError(f"{where}: length is {length}, the cache holds {self.length}")
        if self.page_size is not None:
            keep = (length + self.page_size - 1) // self.page_size
            for row in self._pages:
                self._drop(row[keep:])
                del row[keep:]
        gone = self.length - length
        self.values_of = {name: x[:, :, :length] for name, x in self.values_of.items()}
        if self.positions is not None:
            self.positions = self.positions[..., :length]
        self.length, self._next = length, self._next - gone

    @torch.no_grad()
    def evict(self, keep: Tensor, *, renumber: bool = False) -> None:
        """Keeps the listed tokens only, in the order listed (H2O, SnapKV, StreamingLLM).

        Kept tokens keep the positions they were met at, which `attention` then gives to the rope, unless renumber.

        Args:
            keep: indices of held tokens: (n,), (B, n), or (B, Hk, n) for a choice per head (a rope then needs rotated keys or renumber).
            renumber: positions become 0..n-1, and the next token stands at n. Needs raw keys.

        Raises:
            ValueError: an index outside the tokens held, or a shape that does not fit.
            NotImplementedError: renumber with rotated keys.
        """
        where = f"{_WHERE}.evict"
        _check.is_integer(where, "keep", keep)
        keep = keep.long()
        shapes = {1: (), 2: (self.batch,), 3: (self.batch, self.heads)}
        if keep.dim() not in shapes or keep.shape[:-1] != shapes[keep.dim()]:
            raise ValueError(f"{where}: keep must be (n,), ({self.batch}, n) or ({self.batch}, {self.heads}, n), got {_check.shape(keep)}")
        if keep.numel() and not 0 <= int(keep.min()) <= int(keep.max()) < self.length:
            raise ValueError(f"{where}: keep must lie in [0, {self.length}), got {int(keep.min())} to {int(keep.max())}")
        if renumber and self.rotated:
            raise NotImplementedError(f"{where}: renumber does not go with rotated keys; keep raw keys")
        if keep.dim() == 3 and (self._local is not None or self.values_of):
            raise NotImplementedError(f"{where}: a choice per head does not go with the values of a bias, which have other heads")
        n = keep.shape[-1]
        if n > self.length:
            raise ValueError(f"{where}: keep lists {n} tokens, the cache holds {self.length}")
        by_head = keep.reshape(*(1,) * (3 - keep.dim()), *keep.shape) if keep.dim() != 2 else keep[:, None]
        by_head = by_head.expand(self.batch, self.heads, n)

        def kept(x: Tensor, index: Tensor = by_head) -> Tensor:
            index = index if index.shape[1] == x.shape[1] else index[:, :1].expand(-1, x.shape[1], -1)
            return x.gather(2, index if x.dim() == 3 else index[..., None].expand(*index.shape, x.shape[3]))

        key, value = kept(self.key), kept(self.value)
        prefix = None if self._local is None else kept(self.prefix.values())
        self.values_of = {name: kept(x) for name, x in self.values_of.items()}
        if renumber:
            self.positions, self._next = torch.arange(n, device=key.device), n
        elif keep.dim() == 3:
            self.positions = None
        elif self.positions is not None:
            self.positions = self.positions.expand(*keep.shape[:-1], -1).gather(-1, keep) if keep.dim() == 2 else self.positions[..., keep]
        if self.page_size is not None:
            for row in self._pages:
                self._drop(row)
                row.clear()
        self.length = 0
        self._write(key, value)
        self.length = n
        if prefix is not None and n:
            # Any anchor near the values serves: the first of each block.
            base = prefix[..., ::BLOCK]
            block = torch.arange(n, device=prefix.device) // BLOCK
            self._base[..., : base.shape[-1]] = base
            self._local[..., :n] = (prefix - base[..., block]).to(self._local.dtype)

    @torch.no_grad()
    def reorder(self, index: Tensor) -> None:
        """Sequence b becomes what sequence index[b] was (beam search). Pages are shared, not copied.

        Args:
            index: (B,) integers in [0, B).
        """
        where = f"{_WHERE}.reorder"
        _check.is_integer(where, "index", index)
        if index.shape != (self.batch,) or (index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.batch):
            raise ValueError(f"{where}: index must hold {self.batch} numbers in [0, {self.batch}), got {index.tolist()}")
        index = index.long()
        if self.page_size is None:
            for x in (self._key, self._value):
                x[:, :, : self.length] = x[:, :, : self.length][index]
        else:
            rows = [list(self._pages[b]) for b in index.tolist()]
            self._share(rows)
            for row in self._pages:
                self._drop(row)
            self._pages = rows
        if self._local is not None:
            self._local, self._base = self._local[index], self._base[index]
        self.values_of = {name: x[index] for name, x in self.values_of.items()}
        if self.positions is not None and self.positions.dim() == 2:
            self.positions = self.positions[index]

    @torch.no_grad()
    def fork(self, index: Tensor | None = None) -> KVCache:
        """Another cache that starts with the sequences index[0], index[1], ... of this one (default: all).

        With pages both share what they have in common, and the first to write to a shared page takes a copy: a prompt is held once
        for any number of answers. Without pages the tokens are copied.

        Args:
            index: (B',) integers in [0, B).
        """
        where = f"{_WHERE}.fork"
        if index is None:
            index = torch.arange(self.batch)
        _check.is_integer(where, "index", index)
        if index.dim() != 1 or not index.numel() or not 0 <= int(index.min()) <= int(index.max()) < self.batch:
            raise ValueError(f"{where}: index must hold numbers in [0, {self.batch}), got {index.tolist()}")
        index = index.long()
        new = object.__new__(KVCache)
        new.__dict__.update(self.__dict__)
        new.batch = index.shape[0]
        new.values_of = {name: x[index] for name, x in self.values_of.items()}
        if self._local is not None:
            new._local, new._base = self._local[index], self._base[index]
        if self.positions is not None and self.positions.dim() == 2:
            new.positions = self.positions[index]
        if self.page_size is None:
            new._key, new._value = self._key[index], self._value[index]
        else:
            new._pages = [list(self._pages[b]) for b in index.tolist()]
            self._share(new._pages)
        return new

    def release(self) -> None:
        """Gives all tokens up, and with pages their pages back."""
        self.trim(0)

    def _share(self, rows: list[list[int]]) -> None:
        for row in rows:
            for page in row:
                self._pool.uses[page] += 1

    def _drop(self, pages: list[int]) -> None:
        for page in pages:
            self._pool.uses[page] -= 1

    # ---- attention

    def attention(self, query: Tensor, *, region=None, mask: Mask | None = None, bias=None, is_causal: bool = True, return_lse: bool = False, **score):
        """`fastpe.attention` of new queries over the tokens held; the last query stands at the last token.

        Append the new tokens first. The rope is the cache's, raw keys are turned as they are read, and pages are read in place.

        Args:
            query: (B, H, Nq, D), un-rotated.
            region, mask, bias, return_lse: as in `fastpe.attention`. Cumulative biases read this cache: `fastpe.bias.Cable(cache.prefix)`.
            is_causal: default True, which matters for more than one query.
            score: scale, head_scale, row_scale, softcap, softcap_includes_bias, temperature, sink.

        Raises:
            NotImplementedError: what pages or rotated keys do not take (regions with rotated keys; row, column and FIRE biases
                with pages).
        """
        where = f"{_WHERE}.attention"
        _check.is_float(where, "query", query)
        if query.dim() != 4 or query.shape[0] != self.batch or query.shape[3] != self.channels:
            raise ValueError(f"{where}: query must be ({self.batch}, H, Nq, {self.channels}), got {_check.shape(query)}")
        Nq = query.shape[2]
        if Nq > self.length:
            raise ValueError(f"{where}: {Nq} queries, but the cache holds {self.length} tokens; append theirs first")
        rope, own, keys = self.rope, None, None
        plain = self.positions is not None and self.positions.dim() == 1 and self._next == self.length
        if rope is not None and (self.rotated or not plain):
            # The last tokens are those of the queries, whatever was evicted before them.
            own = torch.arange(self._next - Nq, self._next, device=query.device)
            keys = self.positions
        if rope is not None and region is not None and self.rotated:
            raise NotImplementedError(f"{where}: region chooses positions when it reads the keys; keep raw keys")
        if region is not None and not plain:
            raise NotImplementedError(f"{where}: region counts keys from 0 and does not go with evicted tokens; use evict(..., renumber=True)")
        if self.rotated:
            query, rope, own, keys = apply_rotary(query, rope, own), None, None, None
        elif own is not None and keys is None:
            raise ValueError(f"{where}: tokens evicted by head have no common positions for rope; keep rotated keys, or renumber")
        if self.page_size is None:
            return attention(
                query, self.key, self.value, rope=rope, positions=own, key_positions=keys, region=region, mask=mask, bias=bias,
                is_causal=is_causal, return_lse=return_lse, **score,
            )  # fmt: skip
        _check_kinds(rope, bias, mask, region, is_causal, return_lse, score.get("softcap_includes_bias", False))
        if query.dtype != self.dtype:
            raise TypeError(f"{where}: query is {_check.name(query.dtype)}, the cache holds {_check.name(self.dtype)}")
        if query.shape[1] % self.heads:
            raise ValueError(f"{where}: key has {self.heads} heads, which does not divide query's {query.shape[1]}")
        if is_causal:
            mask = causal() if mask is None else mask & causal()
        H, D = query.shape[1], self.channels
        call = Call(self.batch, H, Nq, self.length, mask is not None and mask.is_causal, aux_dtype(query.dtype), query.device)
        plan = None if region is None else _plan(call, region, rope, bias, None, None)
        if plan is None:
            rotation = _rotation(call, rope, own, keys, D, self.heads)
        else:
            rotation = _region_rotation(call, rope, region, plan, D, self.heads)
        return run(
            where, call, query, self._pool.key, self._pool.value, rotation, plan, (Mask() if mask is None else mask).op_args(call), bias=bias,
            return_lse=return_lse, pages=self.pages, lengths=torch.full((self.batch,), self.length, dtype=torch.int32), **score,
        )  # fmt: skip
