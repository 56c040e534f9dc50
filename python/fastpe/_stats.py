"""What the kernels did: tiles computed, hidden and skipped."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from ._load import _C


@dataclasses.dataclass
class TileStats:
    """Counts of key tiles over all calls inside a `tile_stats` block, filled in when the block ends.

    Attributes:
        visited: tiles whose products were computed.
        hidden: tiles without a visible pair, never touched.
        decayed: tiles skipped because the bias has decayed there, within the bound of `fastpe.config.skip_bound`.
        block_q, block_k: tile size of the last call.
        share: decayed tiles among those with a visible pair, 0 to 1.
    """

    visited: int = 0
    hidden: int = 0
    decayed: int = 0
    block_q: int = 0
    block_k: int = 0

    @property
    def share(self) -> float:
        return self.decayed / max(self.visited + self.decayed, 1)


@contextlib.contextmanager
def tile_stats() -> Iterator[TileStats]:
    """Context manager that counts the tiles of the calls inside it, forward and backward. One at a time per process.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 1, 512, 16)
    >>> with fastpe.tile_stats() as stats:
    ...     out = fastpe.attention(q, q, q, is_causal=True)
    >>> stats.visited > 0 and stats.hidden > 0
    True
    """
    stats = TileStats()
    _C.reset_tile_stats()
    _C.set_tile_stats(True)
    try:
        yield stats
    finally:
        _C.set_tile_stats(False)
        for what, n in _C.tile_stats().items():
            setattr(stats, what, n)
