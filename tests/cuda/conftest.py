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

OPS = ("attn_fwd", "attn_bwd", "rotate", "rotate_", "rotate_pair", "rotate_pair_", "rope_table", "prefix_sum", "cumsum_exact")


class _Redirect(TorchDispatchMode):
    """torch.ops.fastpe.<name> becomes torch.ops.fastpe_emu.<name>, for the ops that exist there. With `guard` (a function
    that gives memory in front of an inaccessible page) every tensor is copied to the end of such memory first."""

    def __init__(self, guard=None):
        super().__init__()
        names = [n for n in OPS if hasattr(torch.ops.fastpe_emu, n)]
        self.ops = {getattr(torch.ops.fastpe, n).default: getattr(torch.ops.fastpe_emu, n).default for n in names}
        self.calls, self.guard = 0, guard

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.ops:
            self.calls += 1
            if self.guard:
                args = [self.guarded(x) if isinstance(x, torch.Tensor) and x.numel() else x for x in args]
        return self.ops.get(func, func)(*args, **(kwargs or {}))

    def guarded(self, x):
        extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
        memory = torch.from_numpy(self.guard(extent * x.element_size())).view(x.dtype)
        return memory.as_strided(x.shape, x.stride()).copy_(x)


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
    def context(guard=False, **options):
        emu.set_options(**options)
        redirect = _Redirect(emu.guarded if guard else None)
        try:
            with redirect:
                yield
        finally:
            emu.set_options()
        assert redirect.calls > 0, "nothing ran on the emulator"

    return context
