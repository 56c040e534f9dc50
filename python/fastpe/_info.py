"""What is installed and what is in use."""

from __future__ import annotations

import platform
from typing import Any

import torch

from ._load import _C


def info() -> dict[str, Any]:
    """Build and run-time facts, for bug reports and to see which kernels run.

    Returns:
        A dict: `fastpe`, `torch`, `python` (versions), `isa` (instruction set in use, one of `isas_available`; the
        environment variable FASTPE_ISA picks another at import), `isas_available` (built in and present in this
        processor, the best first), `isas_built`, `cuda_architectures` (of the CUDA kernels built in; empty: none),
        `threads` (that a call may use, as `torch.get_num_threads`), `compiler`, `stable_abi` (the oldest torch whose
        interface the operators use).

    >>> import fastpe
    >>> facts = fastpe.info()
    >>> facts["isa"] in facts["isas_available"]
    True
    """
    build = _C.build_info()
    return {
        "fastpe": build["version"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "isa": _C.current_isa(),
        "isas_available": _C.available_isas(),
        "isas_built": build["isas"],
        "cuda_architectures": build["cuda_architectures"],
        "threads": torch.get_num_threads(),
        "compiler": build["compiler"],
        "stable_abi": build["stable_abi"],
    }
