"""Fused attention for PyTorch in which position is part of the tile."""

from . import _load  # the compiled libraries first: everything below registers rules for their ops
from . import _cope_ops, _rope_ops, ops
from . import bias, config, mask, nn, positions, recipes, reference, region, rope
from ._info import info
from ._rope import Rope
from ._stats import tile_stats
from ._decode import gather_attention
from .attention import attention
from .cache import KVCache
from .landmark import landmark_attention, landmark_retrieval
from .mass import attention_mass, attention_rows
from .merge import merge
from .prefix import Prefix, prefix_sum
from .rotary import apply_rotary, apply_rotary_pair
from .rotary import apply_rotary

__version__ = info()["fastpe"]

__all__ = [
    "KVCache",
    "Prefix",
    "Rope",
    "__version__",
    "apply_rotary",
    "apply_rotary_pair",
    "attention",
    "attention_mass",
    "attention_rows",
    "bias",
    "config",
    "gather_attention",
    "info",
    "landmark_attention",
    "landmark_retrieval",
    "mask",
    "merge",
    "nn",
    "positions",
    "prefix_sum",
    "recipes",
    "reference",
    "region",
    "rope",
    "tile_stats",
]
