"""What attention gives every key, and rows of its probabilities. Kernel: csrc/cpu/mass.cpp."""

from __future__ import annotations

import torch

from . import _check
from ._cope import Contextual
from .attention import _autocast, _check_kinds, _check_qkv, _op_args, _ready
from .ops import aux_dtype

Tensor = torch.Tensor


def attention_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    rows: int | None = None,
    row_weights: Tensor | None = None,
    **call,
) -> Tensor:
    """The attention every key receives, sum_i w_i P(i, j), from the lse of a finished call; no N x N array.

    The scores of H2O (arXiv 2306.14048) and LoCoCo take all rows, those of SnapKV the mean over the last rows, those of Finch
    (arXiv 2408.00167) weigh rows by the number of keys they see.

    Args:
        query, key: (B, H, Nq, D) and (B, Hk, Nk, D), as handed to `fastpe.attention`.
        lse: (B, H, Nq), what that call returned with return_lse.
        rows: only the last `rows` rows. Default: all.
        row_weights: w, (Nq,) or (B | 1, H | 1, Nq) float; with `rows` the last axis may hold that many. Default: 1.
        call: rope, bias, mask, region, positions, key_positions, scale, head_scale, row_scale, softcap,
            softcap_includes_bias, temperature, sink and is_causal, the same as in that call. Errors in them name
            fastpe.attention, which defines them.

    Returns:
        (B, H, Nk) float32 (float64 for float64), without gradient. Rows that see nothing add nothing.

    Raises:
        TypeError, ValueError: named after the argument, with what was expected and what came.
        NotImplementedError: a bias made from query and key (`fastpe.bias.Cope`, `PerRowForget`).

    >>> import torch, fastpe
    >>> q, k, v = (torch.randn(1, 2, 12, 8) for _ in range(3))
    >>> out, lse = fastpe.attention(q, k, v, is_causal=True, return_lse=True)
    >>> mass = fastpe.attention_mass(q, k, lse, is_causal=True)
    >>> torch.allclose(mass.sum(-1), torch.tensor(12.0))
    True
    >>> recent = fastpe.attention_mass(q, k, lse, rows=4, is_causal=True) / 4  # SnapKV before its pooling
    """
    where = "fastpe.attention_mass"
    with torch.no_grad():
        query, key, args = _prepare(where, query, key, call)
        lse = _lse(where, lse, query)
        B, H, Nq, _ = query.shape
        rows = None if rows is None else _rows(where, rows, Nq)
        if row_weights is not None:
            row_weights = _row_weights(where, row_weights, query, rows, lse.dtype)
        elif rows is not None:
            row_weights = torch.ones(1, 1, rows, dtype=lse.dtype, device=query.device)
        if row_weights is not None and row_weights.shape[2] != Nq:
            row_weights = torch.nn.functional.pad(row_weights, (Nq - row_weights.shape[2], 0))
        return torch.ops.fastpe.attn_mass(query, key, lse, row_weights, *args)


def attention_rows(
    query: Tensor, key: Tensor, lse: Tensor | None = None, *, rows: int = 1, logits: bool = False, **call
) -> Tensor:
    """Probabilities, or logits, of the last rows over all keys, for methods that read single rows of attention.

    Attention Sorting and retrieval heads (arXiv 2404.15574) read the last row's probabilities, HOMER (arXiv 2404.10308) its
    logits.

    Args:
        query, key, call: as in `attention_mass`.
        lse: (B, H, Nq), what `fastpe.attention` returned; not needed for logits.
        rows: how many rows, the last ones.
        logits: the scores instead, -inf where a key is hidden.

    Returns:
        (B, H, rows, Nk) float32 (float64 for float64), without gradient.

    Raises:
        As `attention_mass`.

    >>> import torch, fastpe
    >>> q, k, v = (torch.randn(1, 2, 12, 8) for _ in range(3))
    >>> out, lse = fastpe.attention(q, k, v, is_causal=True, return_lse=True)
    >>> p = fastpe.attention_rows(q, k, lse, rows=2, is_causal=True)
    >>> torch.allclose(p @ v, out[:, :, -2:], atol=1e-5)
    True
    """
    where = "fastpe.attention_rows"
    if not isinstance(logits, bool):
        raise TypeError(f"{where}: logits must be a bool, got {type(logits).__name__}")
    with torch.no_grad():
        query, key, args = _prepare(where, query, key, call)
        if lse is None and not logits:
            raise ValueError(f"{where}: lse is needed for probabilities; logits=True does without")
        lse = None if lse is None else _lse(where, lse, query)
        rows = _rows(where, rows, query.shape[2])
        return torch.ops.fastpe.attn_rows(query, key, lse, rows, logits, *args)


_CALL = {
    "rope": None, "bias": None, "mask": None, "region": None, "positions": None, "key_positions": None, "scale": None,
    "head_scale": None, "row_scale": None, "softcap": None, "softcap_includes_bias": False, "temperature": None, "sink": None,
    "is_causal": False,
}  # fmt: skip


def _prepare(where: str, query: Tensor, key: Tensor, given: dict) -> tuple[Tensor, Tensor, tuple]:
    for name in given:
        if name not in _CALL:
            raise TypeError(f"{where}: unknown argument {name}; the others are those of fastpe.attention")
    call = {**_CALL, **given}
    _check_kinds(call["rope"], call["bias"], call["mask"], call["region"], call["is_causal"], False, call["softcap_includes_bias"])
    query, key, _ = _autocast(query, key, key, where)
    D = _check_qkv(query, key, key, where)[3]
    bias, head_scale, temperature, sink = (call.pop(name) for name in ("bias", "head_scale", "temperature", "sink"))
    if isinstance(bias, Contextual):
        raise NotImplementedError(f"{where}: does not go with bias {type(bias).__name__}; use fastpe.reference.attention_mass")
    ready = _ready(query, key, D, bias=bias, **call)
    args, _ = _op_args(ready, bias, head_scale, temperature, sink, call["softcap_includes_bias"])
    return query, key, args


def _lse(where: str, lse: Tensor, query: Tensor) -> Tensor:
    _check.is_float(where, "lse", lse)
    want = aux_dtype(query.dtype)
    if lse.dtype != want:
        raise TypeError(f"{where}: lse must be {_check.name(want)} beside {_check.name(query.dtype)}, got {_check.name(lse.dtype)}")
    if lse.shape != query.shape[:3]:
        raise ValueError(f"{where}: lse must be (B, H, Nq) beside query {_check.shape(query)}, got {_check.shape(lse)}")
    _check.on_device(where, "lse", lse, query.device)
    return lse.contiguous()


def _rows(where: str, rows: int, Nq: int) -> int:
    rows = _check.count(where, "rows", rows, 0)
    if rows > Nq:
        raise ValueError(f"{where}: rows is {rows}, query has {Nq}")
    return rows


def _row_weights(where: str, w: Tensor, query: Tensor, rows: int | None, dtype: torch.dtype) -> Tensor:
    """(B|1, H|1, Nq or rows)."""
    _check.is_float(where, "row_weights", w)
    _check.on_device(where, "row_weights", w, query.device)
    B, H, Nq, _ = query.shape
    if w.dim() not in (1, 3):
        raise ValueError(f"{where}: row_weights must be (Nq,) or (B, H, Nq), got {_check.shape(w)}")
    w = w if w.dim() == 3 else w[None, None]
    lengths = (Nq,) if rows is None else (Nq, rows)
    if w.shape[0] not in (1, B) or w.shape[1] not in (1, H) or w.shape[2] not in lengths:
        raise ValueError(f"{where}: row_weights is {_check.shape(w)}, the call has {B} batch entries, {H} heads and {Nq} queries")
    if rows is not None and w.shape[2] != rows:
        w = w[:, :, Nq - rows :]
    return w.to(dtype).contiguous()


@torch.library.register_fake("fastpe::attn_mass")
def _(q, k, lse, weights, *rest):
    return q.new_empty(q.shape[0], q.shape[1], k.shape[2], dtype=aux_dtype(q.dtype))


@torch.library.register_fake("fastpe::attn_rows")
def _(q, k, lse, rows, logits, *rest):
    return q.new_empty(q.shape[0], q.shape[1], rows, k.shape[2], dtype=aux_dtype(q.dtype))
