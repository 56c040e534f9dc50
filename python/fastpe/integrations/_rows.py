"""Visibility given as one run of rows for each key."""

from __future__ import annotations

import torch

from .. import mask as masks

Tensor = torch.Tensor


def seen_by_rows(first: Tensor, after: Tensor, rows: int, keys: int) -> masks.Mask:
    """Key j is seen by the rows first[j] <= i < after[j]; (B | 1, Nk) integers."""
    if rows <= keys:
        return masks.intervals(first + (keys - rows), after + (keys - rows))
    # Rows before the first key have no index that intervals could name.
    row = torch.arange(rows, device=first.device)[:, None]
    return masks.dense(((row >= first[:, None]) & (row < after[:, None]))[:, None])
