"""Sends attention calls to the emulated CUDA kernels."""

from __future__ import annotations

import contextlib
import pathlib
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "emu"))
import emulated  # noqa: E402


class _Redirect(TorchDispatchMode):
    """torch.ops.fastpe.<name> becomes torch.ops.fastpe_emu.<name>, for the ops that exist there."""

    def __init__(self, names):
        super().__init__()
        self.ops = {getattr(torch.ops.fastpe, n).default: getattr(torch.ops.fastpe_emu, n).default for n in names}
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func in self.ops
        return self.ops.get(func, func)(*args, **(kwargs or {}))


@pytest.fixture(scope="session")
def emu():
    """The module fastpe_emu_tests; torch.ops.fastpe_emu is loaded too."""
    emulated.build("fastpe_emu_tests")
    folder = emulated.build("fastpe_emu_ops")
    torch.ops.load_library(str(folder / "libfastpe_emu_ops.so"))
    sys.path.insert(0, str(folder))
    import fastpe_emu_tests

    return fastpe_emu_tests


@pytest.fixture
def on_emulator(emu):
    """A context manager: calls inside it run the emulated kernels, and at least one does."""

    @contextlib.contextmanager
    def context(**options):
        emu.set_options(**options)
        redirect = _Redirect(["attn_fwd"])
        try:
            with redirect:
                yield
        finally:
            emu.set_options()
        assert redirect.calls > 0, "nothing ran on the emulator"

    return context
