"""Visibility as transformers describes it, kept linear in the number of keys.

Every mask that transformers composes by itself (causal, sliding, chunked, bidirectional, packed sequences, padding, any
cache) shows each key to one run of query rows. The mask function therefore returns an int32 tensor (B, 1, 3, Nk):

    [:, 0, 0] first row that sees the key        [:, 0, 1] first row after those        [:, 0, 2] index of row 0 among the keys

A tensor passes through models, static caches and torch.compile where another object would not. What is not of this kind
(overlays a user adds, blocks of image tokens) becomes the dense bool mask that "sdpa" gets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from transformers import masking_utils

from .. import _check
from .. import bias as biases
from .. import mask as masks
from ._rows import seen_by_rows

Tensor = torch.Tensor

ROWS, AFTER, OFFSET = range(3)

_CAUSAL = masking_utils.causal_mask_function
_BIDIRECTIONAL = masking_utils.bidirectional_mask_function
_AND = masking_utils.and_masks(_CAUSAL).__code__
_OR = masking_utils.or_masks(_CAUSAL).__code__
# The overlays whose visible rows, seen from the key's own row to either side, are first visible and then no more.
_OVERLAYS = {
    masking_utils.sliding_window_overlay(1).__code__,
    masking_utils.sliding_window_bidirectional_overlay(1).__code__,
    masking_utils.chunked_overlay(1, torch.zeros(1)).__code__,
    masking_utils.packed_sequence_mask_function(torch.zeros(1)).__code__,
}
_REMAP = masking_utils.remap_positions_for_packed_sequence(_CAUSAL, torch.zeros(1)).__code__


def _is_run(function: Callable) -> bool:
    """Whether each key is seen by one run of rows that holds its own row, or ends beside it."""
    if function in (_CAUSAL, _BIDIRECTIONAL):
        return True
    code = getattr(function, "__code__", None)
    if torch.compiler.is_compiling():
        # Closures cannot be read while tracing. The caller has ruled out what users add (use_vmap).
        return code is _AND
    inside = dict(zip(code.co_freevars, (c.cell_contents for c in function.__closure__ or ()))) if code else {}
    if code is _AND:
        return all(_is_run(f) for f in inside["mask_functions"])
    if code is _REMAP:
        return _is_run(inside["mask_function"])
    return code in _OVERLAYS


def _first(visible: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, steps: int) -> Tensor:
    """The first row in [low, high] that is visible, where all rows from it to `high`, which is, are too."""
    for _ in range(steps):
        middle = (low + high) // 2
        seen = visible(middle)
        low, high = torch.where(seen, low, middle + 1), torch.where(seen, middle, high)
    return high


def _runs(function: Callable, batch: int, rows: int, first_row: int | Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """First visible row and first row after the visible ones of every key, (B|1, Nk).

    By bisection from the key's own row: the mask functions are evaluated element by element, Nk log2(rows) times. While tracing,
    by a reduction over all rows, which the compiler fuses with what it reduces: an unrolled bisection takes it minutes.
    """
    if function is _CAUSAL:
        return (keys - first_row).clamp(min=0, max=rows)[None], torch.full_like(keys, rows)[None]
    if function is _BIDIRECTIONAL:
        return torch.zeros_like(keys)[None], torch.full_like(keys, rows)[None]
    head = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=keys.device)
    at = torch.arange(batch, device=keys.device).view(-1, 1, 1, 1)
    k = keys.view(1, 1, 1, -1)

    def visible(row: Tensor) -> Tensor:
        return function(at, head, row + first_row, k)

    if torch.compiler.is_compiling():
        row = torch.arange(rows, device=keys.device).view(1, 1, -1, 1)
        seen = visible(row)
        first, after = torch.where(seen, row, rows).amin(2), torch.where(seen, row + 1, 0).amax(2)
        return torch.where(after > 0, first, 0)[:, 0], after[:, 0]
    own = (k - first_row).clamp(min=0, max=rows - 1)
    seen = visible(own)
    steps = rows.bit_length()
    first = _first(visible, torch.zeros_like(own), own, steps)
    # The same search upwards, on negated rows.
    last = -_first(lambda row: visible(-row), torch.full_like(own, 1 - rows), -own, steps)
    first, after = torch.where(seen, first, 0), torch.where(seen, last + 1, 0)
    return first[:, 0, 0], after[:, 0, 0]


def _real_keys(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """The 2-D padding mask cut or extended to the keys, bool (B, Nk)."""
    padded = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    return None if padded is None else padded[:, kv_offset : kv_offset + kv_length]


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = _CAUSAL,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config=None,
    **kwargs,
) -> Tensor | None:
    """What AttentionMaskInterface calls for the name "fastpe": None where `is_causal` says all, a compact mask (see the
    module), or a dense bool mask (B, 1, Nq, Nk)."""
    real = _real_keys(attention_mask, kv_length, kv_offset)
    if real is not None and _check.can_read(real) and bool(real.all()):
        real = None
    fits = local_size is None or kv_length < local_size
    if real is None and fits:
        aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
        if allow_is_bidirectional_skip and getattr(config, "is_causal", True):
            return None
        if allow_is_causal_skip and aligned:
            return None
    if use_vmap or not _is_run(mask_function):
        return masking_utils.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
            allow_is_causal_skip=False, allow_is_bidirectional_skip=False, use_vmap=use_vmap, device=device,
        )  # fmt: skip
    keys = torch.arange(kv_length, device=device) + kv_offset
    first, after = _runs(mask_function, batch_size, q_length, q_offset, keys)
    if real is not None:
        after = torch.where(real, after, 0)
        first = torch.where(real, first, 0)
    first, after = torch.broadcast_tensors(first, after)
    offset = torch.zeros_like(first) + (q_offset - kv_offset)
    return torch.stack((first, after, offset), dim=1).to(torch.int32)[:, None].expand(batch_size, -1, -1, -1)


# ---------------------------------------------------------------------------------------------------------------------
# From there to the arguments of a call


@dataclasses.dataclass(frozen=True)
class Visibility:
    """What a call to attention needs: how many keys to read, the rule, an additive mask, and where the rows stand.

    offset is the index of row 0 among the keys: an int where it is known, else a tensor of no axes.
    """

    keys: int
    mask: masks.Mask | None
    offset: int | Tensor
    bias: biases.Dense | None = None


def is_compact(mask: Tensor | None) -> bool:
    return isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[2] == 3


def visibility(where: str, mask: Tensor | None, is_causal: bool, rows: int, keys: int) -> Visibility:
    """Reads what a model hands to its attention function as attention_mask."""
    if mask is None:
        return Visibility(keys, masks.causal() if is_causal and rows > 1 else None, keys - rows)
    if not isinstance(mask, Tensor):
        raise TypeError(f"{where}: attention_mask must be a tensor or None, got {type(mask).__name__}")
    if mask.dim() != 4:
        raise ValueError(f"{where}: attention_mask must have 4 dimensions (batch, heads, queries, keys), got {_check.shape(mask)}")
    if is_compact(mask):
        return _compact(mask, rows, keys)
    if mask.dtype == torch.bool:
        return Visibility(keys, masks.dense(mask), keys - rows)
    if mask.dtype in _check.FLOATS:
        return Visibility(keys, None, keys - rows, biases.Dense(mask))
    raise TypeError(f"{where}: attention_mask must be bool or float, got {_check.name(mask.dtype)}")


def _compact(mask: Tensor, rows: int, keys: int) -> Visibility:
    if not _check.can_read(mask):
        return Visibility(keys, _by_rows(mask, rows, keys), mask[0, 0, OFFSET, 0])
    # All layers are given the same tensor: read it once, and again if it was written to.
    facts = (rows, keys, None if mask.is_inference() else mask._version)
    read = getattr(mask, "_fastpe_visibility", None)
    if read is None or read[0] != facts:
        read = (facts, _read(mask, rows, keys))
        mask._fastpe_visibility = read
    return read[1]


def _read(mask: Tensor, rows: int, keys: int) -> Visibility:
    """The same mask in closed form where it has one, and without the keys at the end that no row sees."""
    first, after, offset = mask[:, 0, ROWS], mask[:, 0, AFTER], int(mask[0, 0, OFFSET, 0])
    seen = (after > first).any(0).nonzero()
    # A static cache ends in keys that are not written yet. Rows stay the last of the keys, where they were among them.
    used = max(int(seen[-1]) + 1 if seen.numel() else 0, min(keys, offset + rows), 1)
    first, after = first[:, :used], after[:, :used]
    full, hidden = (first <= 0) & (after >= rows), after <= first
    if bool(full.all()):
        return Visibility(used, None, offset)
    if bool((full | hidden).all()):
        return Visibility(used, masks.padding(full), offset)
    if offset + rows == used:
        window = _window(first, after, rows, offset)
        if window is not None:
            return Visibility(used, masks.window(window or None, right=1), offset)
    return Visibility(used, _by_rows(mask[..., :used], rows, used), offset)


def _window(first: Tensor, after: Tensor, rows: int, offset: int) -> int | None:
    """w of the causal window that shows exactly this, 0 for a causal mask without a window, None for anything else."""
    own = torch.arange(first.shape[1], device=first.device) - offset
    hidden = after <= first
    if not bool((hidden | (first == own.clamp(min=0))).all()):
        return None
    inside = (~hidden & (after < rows))[0]
    if bool(inside.any()):
        window = int((after[0] - own)[inside][0])
    elif bool(hidden.any()):
        # One row: the first key it sees is the last of its window.
        window = 1 - int(own[~hidden[0]][0]) if rows == 1 and not bool(hidden[0].all()) else 0
    else:
        window = 0
    expected = (own + window).clamp(min=0, max=rows) if window else torch.full_like(own, rows)
    return window if bool((torch.where(hidden, 0, after) == expected).all()) else None


def _by_rows(mask: Tensor, rows: int, keys: int) -> masks.Mask:
    mask = mask[:1] if mask.stride(0) == 0 else mask
    return seen_by_rows(mask[:, 0, ROWS], mask[:, 0, AFTER], rows, keys)


def is_closed(mask: masks.Mask | None) -> bool:
    """Causal, a window, or everything: what depends on I - j alone."""
    if mask is None:
        return True
    return not any(getattr(mask, f.name) for f in dataclasses.fields(mask) if f.name not in ("left", "right", "sinks"))


def rows_apart(mask: Tensor, entry: int) -> tuple[int, int, Tensor]:
    """One batch entry of a compact mask without its padding on the left: padded keys, padded rows, the mask of the rest."""
    one = mask[entry : entry + 1]
    first, after, offset = one[:, 0, ROWS], one[:, 0, AFTER], int(one[0, 0, OFFSET, 0])
    seen = (after > first)[0].nonzero()
    keys = int(seen[0]) if seen.numel() else 0
    rows = max(0, keys - offset)
    planes = ((first - rows).clamp(min=0), (after - rows).clamp(min=0), torch.full_like(first, offset + rows - keys))
    return keys, rows, torch.stack(planes, 1)[:, None, :, keys:]
