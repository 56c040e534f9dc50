"""What the parts of one attention call tell each other."""

from __future__ import annotations

import dataclasses

import torch

from . import _check

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Call:
    """The facts a bias or a mask needs to describe itself to the kernels.

    `causal` says that no key of the future is visible, so tables may end at distance 0. `dtype` is that of the float
    arrays beside q, k and v: float64 in a float64 call, else float32.
    """

    B: int
    H: int
    Nq: int
    Nk: int
    causal: bool
    dtype: torch.dtype
    device: torch.device

    def query_index(self) -> Tensor:
        """I = i + Nk - Nq, int64 (Nq,)."""
        return torch.arange(self.Nq, device=self.device) + (self.Nk - self.Nq)

    def key_index(self) -> Tensor:
        """j, int64 (Nk,)."""
        return torch.arange(self.Nk, device=self.device)

    def distance(self) -> Tensor:
        """I - j, int64 (Nq,Nk)."""
        return self.query_index()[:, None] - self.key_index()[None, :]

    def aux(self, where: str, what: str, x: Tensor) -> Tensor:
        _check.on_device(where, what, x, self.device)
        return x.to(self.dtype)

    def fits(self, where: str, what: str, shape: tuple[int, ...], *axes: tuple[str, int]) -> None:
        """Each axis must be 1 or the length given with its meaning."""
        for n, (meaning, size) in zip(shape, axes, strict=True):
            if n != 1 and n != size:
                raise ValueError(f"{where}: {what} has {n} {meaning}, the call has {size}")


@dataclasses.dataclass(frozen=True)
class TurnedCall(Call):
    """A call whose keys are turned already: their positions are not asked for."""

    def key_index(self) -> Tensor:
        return torch.arange(0, device=self.device)


@dataclasses.dataclass(frozen=True)
class OpBias:
    """The bias arguments of torch.ops.fastpe.attn_fwd; csrc/core/params.h says what they mean."""

    form: int = 0
    params: Tensor | None = None
    gamma: Tensor | None = None
    u: Tensor | None = None
    w: Tensor | None = None
    base: Tensor | None = None
    table: Tensor | None = None
    pieces: Tensor | None = None
    omega: Tensor | None = None
    rows: Tensor | None = None
    cols: Tensor | None = None
    index: Tensor | None = None
    row_q: Tensor | None = None
    row_e: Tensor | None = None
    col_k: Tensor | None = None
    col_e: Tensor | None = None
    dense: Tensor | None = None
    factor: Tensor | None = None
    pairs: Tensor | None = None
    q_seg: Tensor | None = None
    k_seg: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class OpMask:
    """The visibility arguments of torch.ops.fastpe.attn_fwd; csrc/core/params.h says what they mean."""

    left: int = 0
    right: int = 0
    sinks: int = 0
    q_ids: Tensor | None = None
    k_ids: Tensor | None = None
    mask: Tensor | None = None
    intervals: Tensor | None = None
    lower: Tensor | None = None
    q_seg: Tensor | None = None
    k_seg: Tensor | None = None
    relation: Tensor | None = None
    block_map: Tensor | None = None
    block_q: int = 1
    block_k: int = 1

    @property
    def banded(self) -> bool:
        """Windows, ids and a dense mask only."""
        return self.intervals is None and self.lower is None and self.relation is None and self.block_map is None


@dataclasses.dataclass(frozen=True)
class RegionPlan:
    """What one call needs to know of a region (csrc/pos/region.h): the rule and the positions of every region.

    `query` holds one float64 array of positions a region, (Nq,) or (B, Nq); `key` the same for keys, or one array that
    serves all regions; none where keys are turned already. Logits are multiplied by `amplitude`, and row i by `row_factor`[i].
    """

    kind: int
    size: int
    query: tuple[Tensor, ...]
    key: tuple[Tensor, ...]
    amplitude: float = 1.0
    row_factor: Tensor | None = None
