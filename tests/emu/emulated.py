"""Builds the emulated kernels on demand, into build/emu."""

from __future__ import annotations

import fcntl
import pathlib
import platform
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emu"
# Orders of running threads and of landing copies. Every emulated call of tests/cuda runs under each.
SCHEDULES = ({"schedule": "fifo"}, {"schedule": "reverse"}, {"schedule": "random", "seed": 3, "copies": "random"}, {"schedule": "greedy", "copies": "early"})


def build(target: str) -> pathlib.Path:
    """The folder that holds `target`, built by the project's own CMake files."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the emulator runs on x86-64 only")
    cmake = shutil.which("cmake", path=str(pathlib.Path(sys.executable).parent)) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake on this machine: the emulated kernels cannot be built")
    ninja = shutil.which("ninja", path=str(pathlib.Path(cmake).parent)) or shutil.which("ninja")
    command = [cmake, "-S", str(ROOT), "-B", str(BUILD), "-DFASTPE_EMU=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    if ninja and not (BUILD / "CMakeCache.txt").exists():
        command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    # Test processes that run side by side share the folder: one builds, the others wait and find it built.
    BUILD.parent.mkdir(exist_ok=True)
    with open(BUILD.parent / "emu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for step in (command, [cmake, "--build", str(BUILD), "--target", target, "--parallel", "2"]):
            done = subprocess.run(step, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(step)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return BUILD / "emu"
