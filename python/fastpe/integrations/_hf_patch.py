"""Methods of a model replaced one by one, so that other models of the process stay as they are."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable

import torch

_KEPT = "_fastpe_replaced"


def with_globals(function: Callable, **names) -> Callable:
    """The same code with some global names standing for something else."""
    function = inspect.unwrap(function)
    scope = {**function.__globals__, **names}
    # torch.compile looks globals up in the module of this name, where they are still the old ones.
    scope.pop("__name__", None)
    new = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    new.__kwdefaults__ = function.__kwdefaults__
    return new


def replace(module: torch.nn.Module, name: str, value: object) -> None:
    """Sets an attribute of one module; functions become its methods."""
    kept = module.__dict__.setdefault(_KEPT, {})
    if name not in kept:
        kept[name] = module.__dict__.get(name, _KEPT)
    module.__dict__[name] = types.MethodType(value, module) if isinstance(value, types.FunctionType) else value


def restore(module: torch.nn.Module) -> None:
    """Undoes every `replace` of a module."""
    for name, before in module.__dict__.pop(_KEPT, {}).items():
        if before is _KEPT or before == _KEPT:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = before


def is_replaced(module: torch.nn.Module) -> bool:
    return _KEPT in module.__dict__
