"""Sends attention calls to the CUDA kernels: executed by the emulator, and where there is a GPU on that too."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "emu"))
import emulated  # noqa: E402

OPS = ("attn_fwd", "attn_bwd", "attn_decode", "cope_fwd", "cope_bwd", "rotate", "rotate_", "rotate_pair", "rotate_pair_", "rope_table", "prefix_sum", "cumsum_exact", "merge_fwd", "merge_bwd", "attn_mass", "attn_rows", "landmark_fwd", "landmark_bwd")
GPU = torch.cuda.is_available()
# Threads of the emulator: test processes side by side share the cores.
WORKERS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
# What runs the kernels. FASTPE_TEST_KERNELS=gpu leaves the emulator out, for a machine where it was run before.
RUNNERS = [r for r in ("emulator", "gpu") if (r != "gpu" or GPU) and os.environ.get("FASTPE_TEST_KERNELS", r) == r]


class _Redirect(TorchDispatchMode):
    """torch.ops.fastpe.<name> on CPU tensors becomes ops.<name>, for the ops that exist there; `move` takes every tensor
    argument to where the op wants it, `back` every result to where it came from. `run` calls the op."""

    def __init__(self, ops, move=None, back=None, run=lambda op, args, kwargs: op(*args, **kwargs)):
        super().__init__()
        names = [n for n in OPS if hasattr(ops, n)]
        self.ops = {getattr(torch.ops.fastpe, n).default: getattr(ops, n).default for n in names}
        self.calls, self.move, self.back, self.run = 0, move, back, run

    def moved(self, x):
        if isinstance(x, (list, tuple)):
            return [self.moved(y) for y in x]
        return self.move(x) if self.move and isinstance(x, torch.Tensor) and x.numel() else x

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in self.ops:
            return func(*args, **kwargs)
        self.calls += 1
        moved = [self.moved(x) for x in args]
        result = self.run(self.ops[func], moved, kwargs)
        if self.move:
            for i in _written(func):
                args[i].copy_(moved[i])
        return result if self.back is None else torch.utils._pytree.tree_map_only(torch.Tensor, self.back, result)


def _written(op):
    """Which arguments the op writes to."""
    return [i for i, a in enumerate(op._schema.arguments) if a.is_write]


def _under(emu, schedules):
    """A way to call an op under every one of the schedules; all have to give the same bits."""

    def run(op, args, kwargs):
        written = _written(op)
        calls = [args] + [[_cpu_copy(x) if i in written else x for i, x in enumerate(args)] for _ in schedules[1:]]
        returned, results = [], []
        for options, given in zip(schedules, calls, strict=True):
            emu.set_options(**{"workers": WORKERS} | options)
            returned.append(op(*given, **kwargs))
            results.append([x for x in torch.utils._pytree.tree_leaves((returned[-1], [given[i] for i in written])) if isinstance(x, torch.Tensor)])
        for options, other in zip(schedules[1:], results[1:], strict=True):
            for i, (x, y) in enumerate(zip(results[0], other, strict=True)):
                assert x.stride() == y.stride() and torch.equal(_bits(x), _bits(y)), f"{op}: result {i} under {options} is not the one under {schedules[0]}"
        return returned[0]

    return run


def _bits(x):
    """x's numbers as integers: NaN is not equal to itself, and -0 equals 0."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _in_memory(x, flat):
    """x's numbers in `flat`, with x's strides."""
    return flat.as_strided(x.shape, x.stride()).copy_(x)


def _extent(x):
    return 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))


def _to_gpu(x):
    return _in_memory(x, torch.empty(_extent(x), dtype=x.dtype, device="cuda"))


def _cpu_copy(x):
    return _in_memory(x, torch.empty(_extent(x), dtype=x.dtype)) if x.numel() else x.cpu()


@pytest.fixture(autouse=True)
def one_thread_of_torch():
    """Its others would spin where the emulator needs the cores, and the tensors are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    """A context manager: calls inside it run the emulated kernels, and at least one does. Every op runs under all of
    emulated.SCHEDULES, or with the options given, once."""

    @contextlib.contextmanager
    def context(guard=False, **options):
        def guarded(x):
            return _in_memory(x, torch.from_numpy(emu.guarded(_extent(x) * x.element_size())).view(x.dtype))

        run = _under(emu, [options] if options else emulated.SCHEDULES)
        redirect = _Redirect(torch.ops.fastpe_emu, guarded if guard else None, run=run)
        try:
            with redirect:
                yield
        finally:
            emu.set_options()
        assert redirect.calls > 0, "nothing ran on the emulator"

    return context


@pytest.fixture(params=RUNNERS)
def on_kernels(request):
    """A context manager: calls inside it run the CUDA kernels, on the emulator or on a GPU, with everything else as it was."""
    if request.param == "emulator":
        return request.getfixturevalue("on_emulator")

    @contextlib.contextmanager
    def context():
        redirect = _Redirect(torch.ops.fastpe, _to_gpu, _cpu_copy)
        with redirect:
            yield
        assert redirect.calls > 0, "nothing ran on the GPU"

    return context


class GpuConformance:
    """The conformance kernels on a GPU, as the emulator's module offers them."""

    def __init__(self, library):
        self.library = ctypes.CDLL(library)
        self.library.fastpe_conformance_name.restype = ctypes.c_char_p

    def conformance_names(self):
        return [self.library.fastpe_conformance_name(i).decode() for i in range(self.library.fastpe_conformance_count())]

    def conformance(self, name, words):
        words = np.ascontiguousarray(words, np.uint32).ravel()
        out = np.zeros(2**15, np.uint32)
        n = self.library.fastpe_conformance_run(name.encode(), words.ctypes.data_as(ctypes.c_void_p), len(words), out.ctypes.data_as(ctypes.c_void_p), len(out))
        assert n >= 0, f"{name}: error {-n}"
        return out[:n]


@pytest.fixture(scope="session")
def gpu_conformance():
    """FASTPE_CONFORMANCE names the library; scripts/gpu_check.sh builds it."""
    library = os.environ.get("FASTPE_CONFORMANCE")
    if not GPU or not library:
        pytest.skip("needs a GPU and FASTPE_CONFORMANCE")
    return GpuConformance(library)
