"""Fair timing: candidates alternate in one process, medians and ratios are reported.

CPU time of the process is the clock for one thread, because it does not count what other programs take; wall time is
the clock when threads are compared.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from typing import Callable

# Peers that materialise N x N temporaries must not pay for fresh pages in every round: keep freed memory mapped.
_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"}


def keep_freed_memory() -> None:
    """Re-executes the program once with malloc settings that keep freed pages (glibc reads them at start)."""
    if os.environ.get("MALLOC_MMAP_MAX_") != "0":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_MALLOC})


def interleave(
    candidates: dict[str, Callable[[], object]],
    *,
    rounds: int = 7,
    min_round_s: float = 0.05,
    wall: bool = False,
) -> dict[str, dict[str, float]]:
    """Times every candidate ``rounds`` times in turn. Returns median and spread in seconds per call.

    A round repeats a candidate until ``min_round_s`` has passed, so that short calls are not lost in the clock.
    """
    clock = time.perf_counter if wall else time.process_time
    repeats = {}
    for name, call in candidates.items():
        call()
        start = clock()
        call()
        once = max(clock() - start, 1e-7)
        repeats[name] = max(1, int(min_round_s / once))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            start = clock()
            for _ in range(repeats[name]):
                call()
            samples[name].append((clock() - start) / repeats[name])
    return {
        name: {
            "median_s": statistics.median(s),
            "min_s": min(s),
            "spread": (max(s) - min(s)) / statistics.median(s),
        }
        for name, s in samples.items()
    }


def machine() -> dict[str, object]:
    """Facts that make a figure repeatable."""
    import torch

    import fastpe

    def git(*args: str) -> str:
        try:
            return subprocess.run(["git", *args], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    model = platform.processor()
    try:
        with open("/proc/cpuinfo") as f:
            model = next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastpe": fastpe.info(),
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_json(path: str, payload: dict) -> None:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w") as f:
        json.dump(payload, f, indent=1)
        f.write("\n")
