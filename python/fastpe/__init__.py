"""Fused attention for PyTorch in which position is part of the tile."""

from . import _load  # the compiled libraries first: everything below registers rules for their ops
from . import _rope_ops, ops
from . import bias, config, mask, nn, positions, reference, rope
from ._info import info
from ._rope import Rope
from ._rope_ops import apply_rotary
from ._stats import tile_stats
from .attention import attention
from .prefix import Prefix, prefix_sum

__version__ = info()["version"]

__all__ = [
    "Prefix",
    "Rope",
    "__version__",
    "apply_rotary",
    "attention",
    "bias",
    "config",
    "info",
    "mask",
    "nn",
    "positions",
    "prefix_sum",
    "reference",
    "rope",
    "tile_stats",
]
