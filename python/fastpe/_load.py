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


def _load(name: str, needs: str) -> None:
    try:
        torch.ops.load_library(str(_HERE / name))
    except OSError as error:
        raise ImportError(f"fastpe: {name} does not load with torch {torch.__version__}; {needs}: {error}") from error


_load("libfastpe_ops.so", "fastpe needs torch 2.10 or later")
# A torch without CUDA lacks a symbol of this library, and would never call it.
if _C.build_info()["cuda_architectures"] and torch.version.cuda is not None:
    _load("libfastpe_cuda.so", "reinstall fastpe with the torch that is in use")
