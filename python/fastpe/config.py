"""Settings that hold for every call."""

from __future__ import annotations

import torch

from . import _check

_DEFAULT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-12, torch.float16: 2.0**-12, torch.float64: 0.0}
_bound: float | None = None


def skip_bound_for(dtype: torch.dtype) -> float:
    """The bound a call of this dtype runs under."""
    return _DEFAULT[dtype] if _bound is None else _bound


def set_skip_bound(bound: float | None) -> None:
    """Sets the probability a row may lose to tiles that are skipped because the bias has decayed there.

    Args:
        bound: from 0 (skip nothing but what is invisible) to below 1; None restores the default, which is 2^-24 for
            float32, 2^-12 for bfloat16 and float16, and 0 for float64. The bound also covers what is lost from each
            gradient asked for.

    Raises:
        ValueError: bound is not in [0, 1).

    >>> import fastpe
    >>> fastpe.config.set_skip_bound(1e-6)
    >>> fastpe.config.skip_bound_for(torch.float32)
    1e-06
    >>> fastpe.config.set_skip_bound(None)
    """
    global _bound
    if bound is not None:
        bound = _check.number("fastpe.config.set_skip_bound", "bound", bound)
        if not 0 <= bound < 1:
            raise ValueError(f"fastpe.config.set_skip_bound: bound must be in [0, 1), got {bound:g}")
    _bound = bound


class skip_bound:
    """Context manager: calls inside run under this bound (see `set_skip_bound`).

    >>> import fastpe
    >>> with fastpe.config.skip_bound(0.0):
    ...     fastpe.config.skip_bound_for(torch.float32)
    0.0
    """

    def __init__(self, bound: float | None):
        self.bound = bound

    def __enter__(self) -> None:
        self.outer = _bound
        set_skip_bound(self.bound)

    def __exit__(self, *exc) -> None:
        set_skip_bound(self.outer)
