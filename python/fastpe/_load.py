"""Loads the compiled parts: `_C` (no torch inside) and the operators of `torch.ops.fastpe`."""

from __future__ import annotations

import importlib
import pathlib

import torch

try:
    _C = importlib.import_module("._C", __package__)
except ModuleNotFoundError as error:
    raise ImportError(
        "fastpe: the compiled part is missing or was built for another Python. Install with\n"
        "    pip install -r requirements/build.txt && pip install --no-build-isolation .\n"
        "in the source folder (see README.md); importing from the source folder itself needs that too."
    ) from error

_HERE = pathlib.Path(_C.__file__).resolve().parent


def _load_operators() -> None:
    library = _HERE / "libfastpe_ops.so"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(f"fastpe: {library.name} does not load with torch {torch.__version__}; fastpe needs torch 2.10 or later: {error}") from error


_load_operators()
