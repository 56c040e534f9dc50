"""Prefix sums over the sequence, kept so that differences stay exact at any length."""

from __future__ import annotations

import dataclasses

import torch

from . import _check

Tensor = torch.Tensor
BLOCK = 128


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """A prefix sum c in anchored form: c[..., n] = local[..., n] + base[..., n // 128].

    A float32 prefix of 100,000 terms is good to 1e-2 only, because its last bits are those of the whole sum, while
    a bias needs differences of neighbours. `local` is the sum inside a block of 128 tokens (float32, or float64 for
    float64 input), `base` the float64 sum of everything before the block.

    The gradient with respect to the value c is carried by `local`; `base` has none.

    Attributes:
        local: (..., N) float32 or float64.
        base: (..., ceil(N / 128)) float64.

    >>> import torch, fastpe
    >>> c = fastpe.prefix_sum(-torch.ones(1, 1, 300))
    >>> c.length, c.local.shape, c.base.shape
    (300, torch.Size([1, 1, 300]), torch.Size([1, 1, 3]))
    >>> c.difference(299, 0)
    tensor([[-299.]], dtype=torch.float64)
    """

    local: Tensor
    base: Tensor

    def __post_init__(self):
        where = "fastpe.Prefix"
        _check.is_float(where, "local", self.local)
        _check.is_tensor(where, "base", self.base)
        if self.local.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{where}: local must be float32 or float64, got {_check.name(self.local.dtype)}")
        if self.base.dtype != torch.float64:
            raise TypeError(f"{where}: base must be float64, got {_check.name(self.base.dtype)}")
        if self.local.dim() == 0 or self.base.dim() != self.local.dim() or self.base.shape[:-1] != self.local.shape[:-1]:
            raise ValueError(
                f"{where}: base must have local's leading shape, got local {_check.shape(self.local)} "
                f"and base {_check.shape(self.base)}"
            )
        blocks = (self.local.shape[-1] + BLOCK - 1) // BLOCK
        if self.base.shape[-1] != blocks:
            raise ValueError(
                f"{where}: {self.local.shape[-1]} tokens need {blocks} bases (one for {BLOCK}), got {self.base.shape[-1]}"
            )

    @property
    def length(self) -> int:
        """The number of tokens N."""
        return self.local.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """The shape of local."""
        return self.local.shape

    def values(self) -> Tensor:
        """The plain prefix sum, float64 (..., N)."""
        block = torch.arange(self.length, device=self.local.device) // BLOCK
        return self.local.double() + self.base.index_select(-1, block)

    def difference(self, i: int, j: int) -> Tensor:
        """c[..., i] - c[..., j] without the rounding of the long sums, float64 (...)."""
        n = self.length
        for what, t in (("i", i), ("j", j)):
            if not 0 <= t < n:
                raise IndexError(f"fastpe.Prefix.difference: {what} = {t} is outside 0..{n - 1}")
        inside = self.local[..., i].double() - self.local[..., j].double()
        return inside + (self.base[..., i // BLOCK] - self.base[..., j // BLOCK])

    def append(self, x: Tensor) -> "Prefix":
        """The prefix sum continued over new terms, for decoding with a cache.

        Args:
            x: (..., M) the terms of the new tokens, leading shape as local.

        Returns:
            A Prefix of N + M tokens. No gradient flows through it.

        Raises:
            ValueError: the leading shapes differ, or x requires grad while gradients are recorded.

        >>> import torch, fastpe
        >>> c = fastpe.prefix_sum(torch.ones(1, 1, 200)).append(torch.ones(1, 1, 60))
        >>> c.values()[0, 0, -1]
        tensor(260., dtype=torch.float64)
        """
        where = "fastpe.Prefix.append"
        _check.is_float(where, "x", x)
        if x.dim() != self.local.dim() or x.shape[:-1] != self.local.shape[:-1]:
            raise ValueError(f"{where}: x must have local's leading shape {_check.shape(self.local)}, got {_check.shape(x)}")
        if torch.is_grad_enabled() and (x.requires_grad or self.local.requires_grad):
            raise ValueError(f"{where}: no gradient flows through append; call it under torch.no_grad(), or prefix_sum on the whole sequence")
        with torch.no_grad():
            x = x.to(self.local.dtype)
            n = self.length
            used = n % BLOCK
            if used:
                # The open block goes on from its last partial sum, placed as the last of `used` terms.
                last = self.local[..., -1:]
                x = torch.cat([last.new_zeros(*last.shape[:-1], used - 1), last, x], dim=-1)
                start = self.base[..., -1:]
            elif n:
                start = self.base[..., -1:] + self.local[..., -1:].double()
            else:
                start = self.base.new_zeros(*self.base.shape[:-1], 1)
            local, base = torch.ops.fastpe.prefix_sum(x.contiguous(), False)
            keep = self.base[..., :-1] if used else self.base
            return Prefix(torch.cat([self.local, local[..., used:]], -1), torch.cat([keep, start + base], -1))

    def __repr__(self) -> str:
        return f"Prefix(shape={tuple(self.local.shape)}, dtype={_check.name(self.local.dtype)})"


def prefix_sum(x: Tensor, *, reverse: bool = False) -> Prefix:
    """Inclusive prefix sum over the last dimension, in the anchored form of `Prefix`.

    Accumulated in float64 whatever the input, also under autocast. Differentiable: the gradient is the inclusive sum
    from the other side.

    Args:
        x: (..., N), usually (B, H, N) log-gates or increments; float32 or float64 (bfloat16 and float16 are widened
            to float32 first).
        reverse: sum over t >= n instead of t <= n.

    Returns:
        Prefix of N tokens.

    Raises:
        TypeError: x is not a float tensor.
        ValueError: x has no dimension.

    >>> import torch, fastpe
    >>> fastpe.prefix_sum(torch.tensor([1.0, 2.0, 3.0])).values()
    tensor([1., 3., 6.], dtype=torch.float64)
    >>> fastpe.prefix_sum(torch.tensor([1.0, 2.0, 3.0]), reverse=True).values()
    tensor([6., 5., 3.], dtype=torch.float64)
    """
    where = "fastpe.prefix_sum"
    _check.is_float(where, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{where}: x must have a token dimension, got a number")
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    local, base = torch.ops.fastpe.prefix_sum(x.contiguous(), bool(reverse))
    return Prefix(local, base)
