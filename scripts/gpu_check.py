"""The steps of scripts/gpu_check.sh. Each is one child process with a time limit; none stops the others."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu"
PACKAGE = BUILD / "package"
OUT = pathlib.Path(sys.argv[1]).resolve()
RESULT: dict = {"steps": {}}


def write() -> None:
    (OUT / "gpu_check.json").write_text(json.dumps(RESULT, indent=1) + "\n")


def step(name: str, command: list[str], limit: int, **env: str) -> str:
    """Runs a command, records how it ended, returns what it printed."""
    began = time.monotonic()
    log = OUT / f"{name}.log"
    with open(log, "w") as f:
        try:
            code = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(PACKAGE), **env}, stdout=f, stderr=subprocess.STDOUT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = 124
    text = log.read_text(errors="replace")
    last = text.strip().splitlines()[-1:] or [""]
    RESULT["steps"][name] = {"exit": code, "seconds": round(time.monotonic() - began), "last_line": last[0][-300:]}
    if code:
        RESULT["steps"][name]["tail"] = text[-3000:]
    write()
    print(f"{name:16s} exit {code} after {RESULT['steps'][name]['seconds']} s: {last[0][:150]}", flush=True)
    return text


def tool(name: str) -> str:
    beside = str(pathlib.Path(sys.executable).parent)
    return shutil.which(name, path=beside) or shutil.which(name) or sys.exit(f"gpu_check: {name} is not on the PATH")


def facts() -> dict:
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu_check: this torch sees no GPU")
    p = torch.cuda.get_device_properties(0)
    smi = shutil.which("nvidia-smi")
    driver = subprocess.run([smi, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True).stdout.strip() if smi else "unknown"
    nvcc = subprocess.run([tool("nvcc"), "--version"], capture_output=True, text=True).stdout
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "gpu": p.name, "capability": f"{p.major}.{p.minor}", "memory_gib": round(p.total_memory / 2**30), "driver": driver,
        "torch": torch.__version__, "torch_cuda": torch.version.cuda, "nvcc": (re.search(r"release ([\d.]+)", nvcc) or [None, "unknown"])[1],
        "python": sys.version.split()[0], "commit": commit or "unknown", "date": time.strftime("%Y-%m-%d"), "_major": p.major,
    }  # fmt: skip


def build(major: int) -> None:
    # The architecture that is here, with machine code for it; PTX of 8.0 where there is none of its own.
    architectures = "90a-real" if major == 9 else "80"
    configure = [
        tool("cmake"), "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}",
        "-DFASTPE_CUDA=ON", f"-DFASTPE_CUDA_ARCHITECTURES={architectures}", f"-DCMAKE_CUDA_COMPILER={tool('nvcc')}",
    ]  # fmt: skip
    step("configure", configure, 120)
    step("build", [tool("cmake"), "--build", str(BUILD), "--target", "all", "fastpe_conformance"], 600)
    shutil.rmtree(PACKAGE, ignore_errors=True)
    shutil.copytree(ROOT / "python", PACKAGE, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    step("install", [tool("cmake"), "--install", str(BUILD), "--prefix", str(PACKAGE)], 120)


def counts(text: str) -> dict[str, int]:
    return {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)s?", text.strip().splitlines()[-1] if text.strip() else "")}


def main() -> int:
    chosen = os.environ.get("FASTPE_GPU_STEPS", "build conformance tests sanitizer benchmarks").split()
    device = facts()
    major = device.pop("_major")
    RESULT["device"] = device
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    env = {"FASTPE_CONFORMANCE": str(BUILD / "libfastpe_conformance.so"), "FASTPE_TEST_KERNELS": "gpu"}
    if "build" in chosen:
        build(major)
    if "conformance" in chosen:
        RESULT["conformance"] = counts(step("conformance", [*pytest, "tests/cuda/test_gpu.py", "-k", "conformance"], 120, **env))
    if "tests" in chosen:
        RESULT["tests"] = counts(step("tests", [*pytest, "tests/cuda", "--ignore=tests/cuda/test_ptx.py", "-k", "not conformance"], 900, **env))
    if "sanitizer" in chosen:
        sanitizer = shutil.which("compute-sanitizer")
        for check in ("memcheck", "racecheck"):
            if sanitizer is None:
                RESULT["steps"][check] = {"exit": None, "last_line": "compute-sanitizer is not on the PATH"}
                continue
            command = [sanitizer, "--tool", check, "--error-exitcode", "99", "--target-processes", "all", *pytest, "-x", "tests/cuda/test_attn_fwd.py", "tests/cuda/test_attn_bwd.py", "-k", "test_storage or (test_lengths and 65-63)"]
            step(check, command, 600, PYTORCH_NO_CUDA_MEMORY_CACHING="1", **env)
    if "benchmarks" in chosen:
        figures = OUT / "gpu_benchmarks.json"
        step("benchmarks", [sys.executable, "benchmarks/run.py", "--suite", "targets", "--device", "cuda", "--timeout", "120", "--json", str(figures)], 1500)
        if figures.exists():
            RESULT["benchmarks"] = json.loads(figures.read_text())
            figures.unlink()
    write()
    return int(any(s["exit"] for s in RESULT["steps"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
