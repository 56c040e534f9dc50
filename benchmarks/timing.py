"""Fair timing: candidates alternate in one process; medians, quartiles and ratios round by round are reported.

CPU time of the process is the clock for one thread, because it does not count what other programs take; wall time is
the clock when threads are compared, CUDA events on a GPU.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

# Peers that materialise N x N temporaries must not pay for fresh pages in every round: keep freed memory mapped.
_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"}


def keep_freed_memory() -> None:
    """Re-executes the program once with malloc settings that keep freed pages (glibc reads them at start)."""
    if sys.platform == "linux" and os.environ.get("MALLOC_MMAP_MAX_") != "0":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_MALLOC})


@dataclasses.dataclass(frozen=True)
class Samples:
    """Seconds per call, one entry per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, _, high = _quartiles(self.seconds)
        return (high - low) / self.median

    def over(self, other: Samples) -> tuple[float, float, float]:
        """Quartiles (low, median, high) of self / other, round by round: what slows both at once cancels."""
        return _quartiles([a / b for a, b in zip(self.seconds, other.seconds, strict=True)])


def _quartiles(x) -> tuple[float, float, float]:
    if len(x) < 2:
        return x[0], x[0], x[0]
    low, middle, high = statistics.quantiles(x, n=4, method="inclusive")
    return low, middle, high


def _by(clock: Callable[[], float]) -> Callable[[Callable[[], object], int], float]:
    def seconds(call, repeats):
        start = clock()
        for _ in range(repeats):
            call()
        return (clock() - start) / repeats

    return seconds


def _by_events(call: Callable[[], object], repeats: int) -> float:
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end) / repeats


CLOCKS = {"cpu time": _by(time.process_time), "wall time": _by(time.perf_counter), "cuda events": _by_events}


def interleave(
    calls: dict[str, Callable[[], object]], *, clock: str = "cpu time", rounds: int = 7, min_round_s: float = 0.05
) -> dict[str, Samples]:
    """Times every call `rounds` times in turn, after one warm-up.

    A round repeats a call until `min_round_s` has passed, so that short calls are not lost in the clock.
    """
    seconds = CLOCKS[clock]
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, int(min_round_s / max(seconds(call, 1), 1e-7)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(seconds(call, repeats[name]))
    return {name: Samples(tuple(s)) for name, s in taken.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def _status(key: str) -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key)) * 1024


def peak_extra_bytes(call: Callable[[], object], device: str = "cpu") -> int | None:
    """How far one call raises the memory in use above what was in use before, outputs included; None where the system
    does not tell (Linux does).

    What earlier calls have freed is given back first, or it would hide what this one takes.
    """
    import torch

    import fastpe

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        fastpe._load._C.scratch_trim()
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # sets the high-water mark to what is in use now
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, StopIteration):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Limits


def limits(device: str, dtype: str) -> dict[str, float]:
    """What the machine can do at best, measured now: GFLOP/s of multiply-adds in the arithmetic of `dtype`, GB/s of a copy.

    On a CPU one core's loop of multiply-adds on registers; on a GPU a square matrix product. Copies count bytes read and
    written.
    """
    import torch

    import fastpe

    clock = CLOCKS["cuda events" if device == "cuda" else "cpu time"]
    a = torch.ones(2**26 if device == "cuda" else 2**23, device=device)
    b = torch.zeros_like(a)
    copy_s = min(clock(lambda: b.copy_(a), 3) for _ in range(5))
    if device == "cuda":
        x = torch.randn(8192, 8192, device=device).to(getattr(torch, dtype))
        x @ x
        gflops = 2 * 8192**3 / min(clock(lambda: x @ x, 3) for _ in range(5)) / 1e9
    else:
        arithmetic = {"float64": "fp64", "bfloat16": "bf16"}.get(dtype, "fp32")
        gflops = fastpe._load._C.peak_gflops(arithmetic)
    return {"gflops": gflops, "copy_gbs": 2 * a.numel() * a.element_size() / copy_s / 1e9}


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def _git(*args: str) -> str:
    try:
        here = os.path.dirname(os.path.abspath(__file__))
        return subprocess.run(["git", "-C", here, *args], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device: str = "cpu") -> dict[str, object]:
    """Facts that make a figure repeatable."""
    import torch

    import fastpe

    model = platform.processor()
    try:
        with open("/proc/cpuinfo") as f:
            model = next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    facts = {
        "cpu": model,
        "cores": os.cpu_count(),
        "load": load,  # programs running at the start: above the number of cores, others were at work
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastpe": fastpe.info(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d"),
    }
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts


def write_json(path: str | pathlib.Path, payload: dict) -> None:
    """Takes the place of `path` when all of it is written."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(payload, indent=1) + "\n")
    os.replace(part, path)
