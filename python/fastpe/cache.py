"""Keys and values kept between calls: what decoding needs."""

from __future__ import annotations

import dataclasses

import torch

from . import _check
from ._call import Call, TurnedCall
from ._cope import Contextual
from ._decode import run, takes
from ._load import _C
from ._rope import Rope, XposRope
from .attention import _LAYOUTS, _check_kinds, _check_qkv, _fwd, _plan, _ready, _region_rotation, _rotation, attention
from .mask import Mask, causal
from .ops import aux_dtype
from .prefix import BLOCK, Prefix
from .region import Region, _at_index
from .rotary import apply_rotary

Tensor = torch.Tensor

_WHERE = "fastpe.KVCache"
_FEW = 8  # queries of a head up to which attn_decode serves a call: tiles::kFewQueries


def _room(*shape: int, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """Uninitialised memory, on a CPU in huge pages if the system grants them: keys are read once a step and seldom in
    order, so that the translation of addresses is part of the time (benchmarks/decoding.py)."""
    x = torch.empty(*shape, dtype=dtype, device=device)
    if x.device.type == "cpu" and type(x) is Tensor:
        _C.ask_for_huge_pages(x.data_ptr(), x.numel() * x.element_size())
    return x


@dataclasses.dataclass
class _Pool:
    """Pages shared by a cache and its forks."""

    keys: list[Tensor]  # copies of (pages, Hk, page size, D), see KVCache
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
    any region, positions counted anew after an eviction. `rotated=True` turns a key once, when it comes, instead of at every step:
    for ropes whose frequencies never change, and regions that place a key by its index alone. Decoding token by token gives what
    one call over the whole sequence gives.

    Args:
        batch: B, sequences.
        heads: Hk, key heads.
        channels: D; value_channels: Dv, default D.
        capacity: tokens a sequence may hold; with pages, tokens of all pages together (shared by forks).
        rope: rotary embedding of queries and keys.
        region: which positions near and far keys are met at (`fastpe.region`), for every call of `attention` that names no other.
        rotated: keep keys turned. Plain rotation, dual chunk, STRING, StreamingLLM and memory keys take the room of raw keys;
            Self-Extend, ReRoPE, Leaky ReRoPE and WRoPE keep two copies of K, one turned for near and one for far.
        page_size: tokens of a page, a multiple of 16; None: one block of memory for each sequence. Pages are read in place.
        dtype: of keys and values, default float32. device: default CPU, where memory comes in huge pages of 2 MiB, as it is
            written, if Linux grants them.

    Attributes:
        length: tokens held.
        positions: (N,) or (B, N) int64, where the held tokens stand in the text; None after an eviction by head.
        prefix: `Prefix` of the increments given to append, for Cable and Forget; None without any.
        values_of: name -> (B, X, N), the per-token values given to append.

    Raises:
        TypeError, ValueError: named after the argument.
        NotImplementedError: rotated with what turns a key by more than its index (dynamic NTK and other rules of the length, xPos,
            HiRoPE, regions of your own).

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
        region: Region | None = None,
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
        if region is not None:
            if not isinstance(region, Region):
                raise TypeError(f"{_WHERE}: region must be a fastpe.region object, got {type(region).__name__}")
            if rope is None:
                raise ValueError(f"{_WHERE}: region chooses positions for rope, which is None")
        if rotated and rope is None:
            raise ValueError(f"{_WHERE}: rotated keys need a rope")
        if rotated and (rope.at_length(1) is not rope or isinstance(rope, XposRope)):
            raise NotImplementedError(f"{_WHERE}: rope {rope.name} turns a key by more than its own position; keep raw keys")
        self.batch, self.heads, self.channels, self.value_channels = batch, heads, channels, value_channels
        self.capacity, self.rope, self.region, self.rotated = capacity, rope, region, rotated
        self.page_size, self.dtype = page_size, dtype
        self.length = 0
        self.positions: Tensor | None = torch.zeros(0, dtype=torch.int64, device=device)
        self.values_of: dict[str, Tensor] = {}
        self._local = self._base = None  # of the prefix, with room
        self._next = 0  # the position of the next token
        copies = len(region.kept_keys(_WHERE, self.positions)) if rotated and region is not None else 1
        if page_size is None:
            self._keys = [_room(batch, heads, capacity, channels, dtype=dtype, device=device) for _ in range(copies)]
            self._value = _room(batch, heads, capacity, value_channels, dtype=dtype, device=device)
            return
        _check.count(_WHERE, "page_size", page_size, 16)
        if page_size % 16 or capacity % page_size:
            raise ValueError(f"{_WHERE}: page_size must be a multiple of 16 that divides capacity {capacity}, got {page_size}")
        pages = capacity // page_size
        keys = [_room(pages, heads, page_size, channels, dtype=dtype, device=device) for _ in range(copies)]
        self._pool = _Pool(keys, _room(pages, heads, page_size, value_channels, dtype=dtype, device=device), [0] * pages)
        self._pages: list[list[int]] = [[] for _ in range(batch)]
        self._table: tuple[list[list[int]], Tensor] | None = None  # the pages as the kernel was last given them

    def __repr__(self) -> str:
        kind = "contiguous" if self.page_size is None else f"pages of {self.page_size}"
        return f"KVCache(batch={self.batch}, heads={self.heads}, length={self.length}, {kind}, {_check.name(self.dtype)})"

    # ---- what is held

    @property
    def key(self) -> Tensor:
        """(B, Hk, N, D): a view of the block, or a copy out of the pages. Rotated keys stand where near ones do."""
        return self._held(self._keys[0]) if self.page_size is None else self._collect(self._pool.keys[0])

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
        self._write(self._turned(key, new) if self.rotated else [key], value)
        if increments is not None:
            self._extend_prefix(increments)
        for name, x in values.items():
            self.values_of[name] = x.clone() if not self.length else torch.cat([self.values_of[name], x], 2)
        if self.positions is not None:
            self.positions = torch.cat([self.positions, new.expand(*self.positions.shape[:-1], M)], -1)
        self.length += M
        self._next += M

    def _turned(self, key: Tensor, index: Tensor) -> list[Tensor]:
        """The copies of new keys that are kept."""
        heads = self.rope.heads or self.heads  # frequencies may be those of query heads
        sizes = index.shape[0], self.batch, heads, aux_dtype(key.dtype), key.device
        tables = [
            self.rope.one_table(_WHERE, at, *sizes, kv_heads=self.heads, query=False)
            for at in (_at_index(index) if self.region is None else self.region.kept_keys(_WHERE, index))
        ]
        return [torch.ops.fastpe.rotate(key, table, _LAYOUTS[self.rope.layout], False) for table in tables]

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

    def _write(self, keys: list[Tensor], value: Tensor) -> None:
        M = value.shape[2]
        if self.page_size is None:
            for held, key in zip(self._keys, keys, strict=True):
                held[:, :, self.length : self.length + M] = key
            self._value[:, :, self.length : self.length + M] = value
            return
        pool, size = self._pool, self.page_size
        for b, row in enumerate(self._pages):
            if self.length % size and M and pool.uses[row[-1]] > 1:  # copy on write
                own = pool.take()
                for held in (*pool.keys, pool.value):
                    held[own] = held[row[-1]]
                pool.uses[row[-1]] -= 1
                row[-1] = own
            done = 0
            while done < M:
                at = (self.length + done) % size
                if at == 0:
                    row.append(pool.take())
                n = min(size - at, M - done)
                for held, new in zip((*pool.keys, pool.value), (*keys, value), strict=True):
                    held[row[-1], :, at : at + n] = new[b, :, done : done + n]
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
            NotImplementedError: renumber with rotated keys; keys kept turned for a region, which counts them from 0.
        """
        where = f"{_WHERE}.evict"
        _check.is_integer(where, "keep", keep)
        keep = keep.long()
        shapes = {1: (), 2: (self.batch,), 3: (self.batch, self.heads)}
        if keep.dim() not in shapes or keep.shape[:-1] != shapes[keep.dim()]:
            raise ValueError(f"{where}: keep must be (n,), ({self.batch}, n) or ({self.batch}, {self.heads}, n), got {_check.shape(keep)}")
        if keep.numel() and not 0 <= int(keep.min()) <= int(keep.max()) < self.length:
            raise ValueError(f"{where}: keep must lie in [0, {self.length}), got {int(keep.min())} to {int(keep.max())}")
        if self.rotated and self.region is not None:
            raise NotImplementedError(f"{where}: keys are kept turned for region {self.region!r}, which counts them from 0; keep raw keys and renumber")
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
        self._write([key], value)
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
            for x in (*self._keys, self._value):
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
            new._keys, new._value = [x[index] for x in self._keys], self._value[index]
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

        Append the new tokens first. The rope is the cache's, raw keys are turned as they are read, turned ones are read as they are,
        and pages are read in place.

        Args:
            query: (B, H, Nq, D), un-rotated.
            region: as in `fastpe.attention`; default the cache's.
            mask, bias, return_lse: as in `fastpe.attention`. Cumulative biases read this cache: `fastpe.bias.Cable(cache.prefix)`.
            is_causal: default True, which matters for more than one query.
            score: scale, head_scale, row_scale, softcap, softcap_includes_bias, temperature, sink.

        Raises:
            NotImplementedError: what pages or rotated keys do not take (row, column and FIRE biases with pages; a region that
                keys are not kept turned for).
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
        region = self.region if region is None else region
        if region is not None and not isinstance(region, Region):
            raise TypeError(f"{where}: region must be a fastpe.region object, got {type(region).__name__}")
        if region is not None and not plain:
            raise NotImplementedError(f"{where}: region counts keys from 0 and does not go with evicted tokens; use evict(..., renumber=True)")
        if region is not None and self.rotated:
            return self._attention_turned(where, query, region, mask, bias, is_causal, return_lse, score)
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
        self._check_query(where, query)
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
            where, call, query, self._pool.keys[0], self._pool.value, rotation, plan, (Mask() if mask is None else mask).op_args(call), bias=bias,
            return_lse=return_lse, **self._in_pages(), **score,
        )  # fmt: skip

    def _in_pages(self) -> dict[str, Tensor]:
        device = self._pool.value.device
        if self._table is None or self._table[0] != self._pages:
            self._table = [list(row) for row in self._pages], self.pages.to(device, non_blocking=True)
        return {"pages": self._table[1], "lengths": torch.full((self.batch,), self.length, dtype=torch.int32, device=device)}

    def _attention_turned(self, where, query, region, mask, bias, is_causal, return_lse, score):
        """Over keys kept turned for `region`."""
        kept = _at_index if self.region is None else self.region.keys
        if region is not self.region and region.keys is not kept:
            turned = "plain rotation" if self.region is None else f"region {self.region!r}"
            raise NotImplementedError(f"{where}: keys are kept turned for {turned}, and region {region!r} meets them elsewhere; keep raw keys")
        _check_kinds(self.rope, bias, mask, region, is_causal, return_lse, score.get("softcap_includes_bias", False))
        paged = self.page_size is not None
        keys, value = (self._pool.keys, self._pool.value) if paged else ([self._held(x) for x in self._keys], self._held(self._value))
        B, Hk, Nq, D = self.batch, self.heads, query.shape[2], self.channels
        if paged:
            self._check_query(where, query)
        else:
            _check_qkv(query, keys[0], value)
        seen = mask
        if is_causal:
            seen = causal() if mask is None else mask & causal()
        call = Call(B, query.shape[1], Nq, self.length, seen is not None and seen.is_causal, aux_dtype(query.dtype), query.device)
        b = None if bias is None or isinstance(bias, Contextual) else bias.op_args(call)
        tensors = (query, *score.values(), *(() if b is None else vars(b).values()))
        learns = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)
        has_kernel = query.device.type == "cpu" or (query.device.type == "cuda" and query.dtype != torch.float32)
        if paged or (has_kernel and Nq <= _FEW and not learns and (b is None or takes(b))):
            plan = _plan(TurnedCall(**vars(call)), region, self.rope, bias, None, None)
            rotation = _region_rotation(call, self.rope, region, plan, D, Hk)
            return run(
                where, call, query, keys[0], value, rotation, plan, (Mask() if seen is None else seen).op_args(call), bias=bias, b=b,
                return_lse=return_lse, more=keys[1:], **(self._in_pages() if paged else {}), **score,
            )  # fmt: skip
        # Kernels for many queries turn keys in their tiles: from where the first copy stands on.
        given = {"scale": None, "row_scale": None, "softcap": None, "softcap_includes_bias": False} | score
        rest = {what: given.pop(what, None) for what in ("head_scale", "temperature", "sink")}
        ready = _ready(
            query, keys[0], D, rope=self.rope, bias=bias, mask=mask, region=region, positions=None, key_positions=None,
            is_causal=is_causal, **given,
        )  # fmt: skip
        q_rope, k_rope, layout = ready.rotation
        ready = dataclasses.replace(ready, rotation=(q_rope, _onward(k_rope, len(keys)), layout))
        out, lse = _fwd(ready, value, bias, rest["head_scale"], rest["temperature"], rest["sink"], given["softcap_includes_bias"])
        return (out, lse) if return_lse else out

    def _check_query(self, where: str, query: Tensor) -> None:
        if query.dtype != self.dtype:
            raise TypeError(f"{where}: query is {_check.name(query.dtype)}, the cache holds {_check.name(self.dtype)}")
        if query.shape[1] % self.heads:
            raise ValueError(f"{where}: key has {self.heads} heads, which does not divide query's {query.shape[1]}")


def _onward(table: Tensor, copies: int) -> Tensor:
    """Tables (2 R, B|1, Hk|1, N, J) that turn keys which stand where the first of the copies does: to the place of each, or,
    where one copy serves all regions, not at all."""
    if copies == 1:
        still = table.new_tensor([1.0, 0.0]).reshape(2, 1, 1, 1, 1).repeat(1, 1, 1, 1, table.shape[4])
        return still.expand(-1, -1, -1, table.shape[3], -1)
    cos, sin = table[0::2].double(), table[1::2].double()
    norm = cos[:1].square() + sin[:1].square()
    onward = (cos * cos[:1] + sin * sin[:1]) / norm, (sin * cos[:1] - cos * sin[:1]) / norm
    return torch.stack(onward, 1).flatten(0, 1).to(table.dtype)
