"""Joining partial attentions by their lse, with the op's shapes and derivatives. Kernel: csrc/cpu/merge.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import _check
from .ops import _like, aux_dtype

Tensor = torch.Tensor

_WHERE = "fastpe.merge"


def merge(
    outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor, weights: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """Joins attentions over disjoint sets of keys into the attention over all of them, exactly and differentiably.

    With L_p the lse of part p and c_p its constant:

        lse = log sum_p exp(c_p L_p),   w_p = exp(c_p L_p - lse),   out = sum_p w_p out_p

    All constants 1 give the softmax over the union of the keys; others are the weighting of APE (arXiv 2502.05431), whose
    contexts have c = scale * temperature. Each tensor is read once, nothing but the weights of a few rows is held.

    Args:
        outs: P >= 1 partial outputs, each (B, H, N, Dv), float32, bfloat16, float16 or float64, any strides with a
            contiguous last dimension (so a part that all batch entries share may be expanded); or one (P, B, H, N, Dv) tensor.
        lses: as many natural-log lse, each (B, H, N) float32 (float64 for float64 outs); or one (P, B, H, N) tensor. They are
            never rounded to 16 bits: that costs 4 times the error of rounding the outputs.
        weights: P positive numbers c_p. Default: all 1.

    Returns:
        out: (B, H, N, Dv), dtype and memory order of the first part.
        lse: (B, H, N), the dtype of lses.
        A row of a part with lse -inf has no share, whatever its out holds; rows empty in all parts give out 0, lse -inf.

    Raises:
        TypeError, ValueError: named after the argument, with what was expected and what came.

    >>> import torch, fastpe
    >>> q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    >>> parts = [fastpe.attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(0, 2), slice(2, 6))]
    >>> out, lse = fastpe.merge(*zip(*parts))
    >>> torch.allclose(out, fastpe.attention(q, k, v), atol=1e-5)
    True
    """
    outs, lses = _parts("outs", outs, 5), _parts("lses", lses, 4)
    if len(outs) != len(lses):
        raise ValueError(f"{_WHERE}: there are {len(outs)} outs and {len(lses)} lses")
    if not outs:
        raise ValueError(f"{_WHERE}: outs must hold at least one part, got none")
    first = outs[0]
    for i, (out, lse) in enumerate(zip(outs, lses)):
        _check_part(f"outs[{i}]", out, first, 4, first.dtype)
        _check_part(f"lses[{i}]", lse, first, 3, aux_dtype(first.dtype))
        if out.stride(3) != 1 and out.shape[3] != 1:
            raise ValueError(f"{_WHERE}: outs[{i}]'s last dimension must be contiguous, its stride is {out.stride(3)}")
    return torch.ops.fastpe.merge_fwd(outs, lses, _constants(weights, len(outs)))


def _parts(what: str, x, axes: int) -> list[Tensor]:
    if isinstance(x, Tensor):
        if x.dim() != axes:
            raise ValueError(f"{_WHERE}: {what} as one tensor must have {axes} axes, parts first, got {_check.shape(x)}")
        return list(x.unbind(0))
    if not isinstance(x, Sequence):
        raise TypeError(f"{_WHERE}: {what} must be a sequence of tensors or one tensor, got {type(x).__name__}")
    return list(x)


def _check_part(what: str, x, first: Tensor, axes: int, dtype: torch.dtype) -> None:
    _check.is_float(_WHERE, what, x)
    if x.dtype != dtype:
        raise TypeError(f"{_WHERE}: {what} must be {_check.name(dtype)} beside {_check.name(first.dtype)} outs, got {_check.name(x.dtype)}")
    if x.dim() != axes:
        layout = "(B, H, N, Dv)" if axes == 4 else "(B, H, N)"
        raise ValueError(f"{_WHERE}: {what} must be {layout}, got {_check.shape(x)}")
    if x.shape != first.shape[:axes]:
        raise ValueError(f"{_WHERE}: {what} is {_check.shape(x)}, outs[0] is {_check.shape(first)}")
    if x.device != first.device:
        raise ValueError(f"{_WHERE}: {what} is on {x.device}, outs[0] is on {first.device}")


def _constants(weights, parts: int) -> list[float]:
    if weights is None:
        return [1.0] * parts
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence):
        raise TypeError(f"{_WHERE}: weights must be a sequence of {parts} numbers, got {type(weights).__name__}")
    if len(weights) != parts:
        raise ValueError(f"{_WHERE}: weights holds {len(weights)} numbers for {parts} parts")
    return [_check.number(_WHERE, f"weights[{i}]", c, positive=True) for i, c in enumerate(weights)]


# ---- what torch must know about the ops ---------------------------------------------------------------------------------


@torch.library.register_fake("fastpe::merge_fwd")
def _(outs, lses, factors):
    first = outs[0]
    return _like(first, first.shape[3]), first.new_empty(first.shape[:3], dtype=aux_dtype(first.dtype))


@torch.library.register_fake("fastpe::merge_bwd")
def _(dout, dlse, outs, lses, factors, needs):
    first = outs[0]
    aux = aux_dtype(first.dtype)
    douts = [_like(x, x.shape[3]) if needs & 1 else x.new_empty(0) for x in outs]
    return douts, first.new_empty((len(outs), *first.shape[:3]) if needs & 2 else (0,), dtype=aux)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    outs, lses, ctx.factors = inputs
    ctx.save_for_backward(*outs, *lses)


def _backward(ctx, dout, dlse):
    parts = len(ctx.factors)
    nothing = [None] * parts
    if dout is None and dlse is None:
        return nothing, nothing, None
    outs, lses = list(ctx.saved_tensors[:parts]), list(ctx.saved_tensors[parts:])
    wanted_outs, wanted_lses, _ = ctx.needs_input_grad
    needs = (1 if any(wanted_outs) else 0) | (2 if any(wanted_lses) else 0)
    douts, dlses = torch.ops.fastpe.merge_bwd(dout, dlse, outs, lses, ctx.factors, needs)
    return (
        [g if wanted else None for g, wanted in zip(douts, wanted_outs)],
        [dlses[i] if wanted else None for i, wanted in enumerate(wanted_lses)],
        None,
    )


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError("fastpe.merge: second derivatives are not supported; fastpe.reference.merge has them")


torch.library.register_autograd("fastpe::merge_fwd", _backward, setup_context=_save)
torch.library.register_autograd("fastpe::merge_bwd", _no_second_derivative)
