"""Argument checks. Every message names the function, the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers

import torch

Tensor = torch.Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape(x: Tensor) -> str:
    return "(" + ", ".join(str(n) for n in x.shape) + ("," if x.dim() == 1 else "") + ")"


def is_tensor(where: str, what: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: {what} must be a tensor, got {type(x).__name__}")
    return x


def is_float(where: str, what: str, x: object) -> Tensor:
    is_tensor(where, what, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{where}: {what} must be float32, bfloat16, float16 or float64, got {name(x.dtype)}")
    return x


def is_integer(where: str, what: str, x: object) -> Tensor:
    is_tensor(where, what, x)
    if x.dtype not in INTEGERS:
        raise TypeError(f"{where}: {what} must hold integers, got {name(x.dtype)}")
    return x


def is_bool(where: str, what: str, x: object) -> Tensor:
    is_tensor(where, what, x)
    if x.dtype != torch.bool:
        raise TypeError(f"{where}: {what} must be a bool tensor (True: visible), got {name(x.dtype)}")
    return x


def number(where: str, what: str, x: object, *, positive: bool = False) -> float:
    """A finite Python number. Tensors are refused: the value would be frozen and its gradient lost."""
    if isinstance(x, Tensor):
        grad = " that requires grad" if x.requires_grad else ""
        raise TypeError(f"{where}: {what} must be a Python number and has no gradient, got a tensor{grad}")
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{where}: {what} must be a number, got {type(x).__name__}")
    x = float(x)
    if not -math.inf < x < math.inf:  # math.isfinite does not trace
        raise ValueError(f"{where}: {what} must be finite, got {x}")
    if positive and x <= 0:
        raise ValueError(f"{where}: {what} must be positive, got {x:g}")
    return x


def count(where: str, what: str, x: object, least: int) -> int:
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        raise TypeError(f"{where}: {what} must be an integer, got {type(x).__name__}")
    if x < least:
        raise ValueError(f"{where}: {what} must be at least {least}, got {x}")
    return x


def on_device(where: str, what: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{where}: {what} is on {x.device}, query is on {device}")


def values_visible() -> bool:
    """True when tensor values may be read: not while torch.compile traces, nor on fake or meta tensors."""
    if torch.compiler.is_compiling():
        return False
    return torch._guards.detect_fake_mode() is None


def can_read(x: Tensor) -> bool:
    return values_visible() and x.device.type != "meta" and not torch._C._functorch.is_functorch_wrapped_tensor(x)


EXACT = 2.0**53


def positions_in_range(where: str, what: str, x: Tensor) -> None:
    """Positions are differenced in float64, which counts exactly up to 2**53."""
    if x.numel() == 0 or not can_read(x):
        return
    if x.is_floating_point():
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{where}: {what} must be finite")
        worst = float(x.detach().abs().max())
    else:
        low, high = torch.aminmax(x.detach())
        worst = max(-int(low), int(high))
    if worst > EXACT:
        raise ValueError(f"{where}: {what} must lie within +-2**53, got {worst:g}")
