"""The CUDA library: it compiles and links where nvcc is, whatever torch is installed; what the compiler made of the kernels."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch

from fastpe._load import _C

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cuda"
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")

# Bytes of spill stores a thread that are accepted on sm_80, by kernel and head dim class; every other kernel has none.
# With 256 channels the accumulators alone take 128 of 255 registers, the key pass holds two of them up to 128, composed
# scores and regions add their own, and contextual positions hold the gates' products beside those of scores.
SPILLS = {
    ("attn_fwd", 96): 64, ("attn_fwd", 128): 128, ("attn_fwd", 256): 768,
    ("attn_bwd_q", 96): 96, ("attn_bwd_q", 128): 128, ("attn_bwd_q", 256): 704,
    ("attn_bwd_kv", 64): 64, ("attn_bwd_kv", 96): 320, ("attn_bwd_kv", 128): 512, ("attn_bwd_kv", 256): 1024,
    ("attn_decode", 256): 448,
    ("attn_bwd_terms", 64): 256, ("attn_bwd_terms", 96): 448, ("attn_bwd_terms", 128): 448, ("attn_bwd_terms", 256): 704,
    ("cope_fwd", 96): 32, ("cope_fwd", 128): 32, ("cope_fwd", 256): 512,
    ("cope_bwd_q", 64): 128, ("cope_bwd_q", 96): 160, ("cope_bwd_q", 128): 160, ("cope_bwd_q", 256): 640,
    ("cope_bwd_kv", 64): 96, ("cope_bwd_kv", 96): 128, ("cope_bwd_kv", 128): 128, ("cope_bwd_kv", 256): 832,
    ("landmark_fwd", 256): 256, ("landmark_bwd_q", 96): 64, ("landmark_bwd_q", 256): 192,
    ("landmark_bwd_kv", 128): 384, ("landmark_bwd_kv", 256): 704,
}  # fmt: skip
# float32 holds an operand's fragment three times and its rows' addresses.
SPILLS_F32 = SPILLS | {
    ("attn_bwd_q", 64): 128, ("attn_bwd_q", 96): 192, ("attn_bwd_q", 128): 320, ("attn_bwd_q", 256): 1024,
    ("attn_bwd_terms", 64): 448,
}  # fmt: skip


def configure(folder: pathlib.Path, *options: str) -> subprocess.CompletedProcess[str]:
    cmake = shutil.which("cmake", path=str(pathlib.Path(sys.executable).parent)) or shutil.which("cmake")
    ninja = shutil.which("ninja", path=str(pathlib.Path(sys.executable).parent)) or shutil.which("ninja")
    if cmake is None or ninja is None:
        pytest.skip("needs cmake and ninja")
    command = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}", *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def library():
    """libfastpe_cuda.so for one architecture: half the time of both."""
    done = configure(BUILD, "-DFASTPE_CUDA=ON", "-DFASTPE_CUDA_ARCHITECTURES=80-real", "-DFASTPE_ISAS=generic")
    assert done.returncode == 0, done.stderr
    cmake = re.search(r"CMAKE_COMMAND:INTERNAL=(.*)", (BUILD / "CMakeCache.txt").read_text()).group(1)
    began = time.monotonic()
    done = subprocess.run([cmake, "--build", str(BUILD), "--target", "fastpe_cuda", "--parallel", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    print(f"built in {time.monotonic() - began:.0f} s")
    # What was compiled earlier is in the log of that time.
    with open(BUILD / "ptxas.log", "a") as log:
        log.write(done.stdout)
    return BUILD / "libfastpe_cuda.so"


@needs_nvcc
def test_registers_and_spills(library):
    text = (BUILD / "ptxas.log").read_text()
    found = re.findall(r"Compiling entry function '(\w+)' for 'sm_80'.*?\n.*?(\d+) bytes spill stores.*?Used (\d+) registers", text, re.S)
    last = {name: (int(spilled), int(registers)) for name, spilled, registers in found}
    if not last:
        pytest.skip("the library was compiled outside this test")
    assert sum("attn_" in name for name in last) >= 90
    assert sum("landmark_" in name for name in last) >= 26
    for name, (spilled, registers) in last.items():
        kernel = re.search(r"((?:attn|cope|landmark)_(?:fwd|bwd_q|bwd_kv|bwd_terms|decode))_kernel.*?Li(\d+)E", name)
        allowed = (SPILLS_F32 if "3F32" in name else SPILLS).get((kernel.group(1), int(kernel.group(2))), 0) if kernel else 0
        assert spilled <= allowed, f"{name}: {spilled} bytes spilled, {allowed} allowed"
        assert registers <= 255


@needs_nvcc
def test_what_the_library_needs(library):
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    out = subprocess.run([readelf, "-d", str(library)], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", out))
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed
    # The CUDA runtime is inside; the driver is reached through it.
    assert not [n for n in needed if "python" in n or "cudart" in n or "libcuda" in n or "c10" in n]
    out = subprocess.run([readelf, "--dyn-syms", "-W", str(library)], capture_output=True, text=True, check=True).stdout
    torch_symbols = set(re.findall(r" UND (aoti_torch_\w+|torch_\w+)", out))
    assert "aoti_torch_get_current_cuda_stream" in torch_symbols
    assert not re.findall(r" UND _ZN\w*(?:2at|3c10|5torch)\w*", out)


@needs_nvcc
def test_no_folder_of_the_building_machine(library):
    assert str(ROOT).encode() + b"/" not in library.read_bytes()


@needs_nvcc
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_imports_a_package_that_has_the_library(library, tmp_path):
    """The package as a build with FASTPE_CUDA=ON leaves it: the library beside the others, and _C saying so."""
    package = pathlib.Path(_C.__file__).parent
    copy = tmp_path / "fastpe"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "_C.*"))
    shutil.copy(library, copy)
    done = subprocess.run([re.search(r"CMAKE_COMMAND:INTERNAL=(.*)", (BUILD / "CMakeCache.txt").read_text()).group(1), "--build", str(BUILD), "--target", "_C"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    for path in [*BUILD.glob("_C.*.so"), BUILD / "libfastpe_cpu.so"]:
        shutil.copy(path, copy)
    code = "import fastpe, json; print(json.dumps(fastpe.info()))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cuda_architectures"] == ["80"]


def test_auto_without_cuda_in_torch_builds_for_the_cpu(tmp_path):
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    done = configure(tmp_path, "-DFASTPE_CUDA=AUTO", "-DFASTPE_ISAS=generic")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("CMakeFiles/fastpe_cuda*"))


@pytest.mark.parametrize(("options", "message"), [(["-DFASTPE_CUDA=maybe"], "expected AUTO, ON or OFF"), (["-DFASTPE_CUDA=ON", "-DFASTPE_EMU=ON"], "use two build folders")])
def test_wrong_options_are_named(tmp_path, options, message):
    done = configure(tmp_path, *options)
    assert done.returncode != 0 and message in " ".join(done.stderr.split())
