"""Where the time of a CPU case goes, in samples of `perf` per 1000 samples in the matrix products.

    python benchmarks/profile_case.py rope/S1/fp32/fwd/cpu fastpe "fastpe none"

The products are the same work for every candidate of fastpe, so the totals compare on a machine too busy for times: what slows the
products counts for nothing. The rest is what a rotation, a bias or a mask costs. Needs Linux's perf.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time

REPORT = re.compile(r"^\s*[\d.]+%\s+(\d+)\s+\[\S\]\s+(.*\S)\s+(\S+)\s*$")


def loop(name: str, candidate: str, seconds: float) -> None:
    """Calls one candidate until the time is over."""
    import registry
    import run
    import torch

    import fastpe

    torch.set_num_threads(1)
    case = registry.case(name)
    work = run.FAMILIES[case.method].build(case, frozenset({candidate}))
    end = time.monotonic() + seconds
    with fastpe.config.skip_bound(work.skip_bound):
        while time.monotonic() < end:
            work.calls[candidate]()


def samples(name: str, candidate: str, seconds: float) -> list[tuple[str, int]]:
    """(function of fastpe's kernels, samples)."""
    with tempfile.NamedTemporaryFile() as data:
        again = [sys.executable, __file__, "--loop", "--seconds", str(seconds), name, candidate]
        subprocess.run(["perf", "record", "-q", "-e", "cpu-clock", "-F", "5000", "-o", data.name, "--", *again], check=True)
        text = subprocess.run(["perf", "report", "-i", data.name, "--stdio", "--show-nr-samples", "--sort", "sym,dso"], capture_output=True, text=True, check=True).stdout
    found = (REPORT.match(line) for line in text.splitlines())
    return [(m[2], int(m[1])) for m in found if m and m[3].startswith("libfastpe")]


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("case", help="as run.py --list names it")
    p.add_argument("candidates", nargs="+", metavar="CANDIDATE", help='"fastpe", "fastpe none" ...')
    p.add_argument("--seconds", type=float, default=10.0, help="how long each is sampled (default 10)")
    p.add_argument("--top", type=int, default=6, help="functions shown (default 6)")
    p.add_argument("--loop", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    if a.loop:
        loop(a.case, a.candidates[0], a.seconds)
        return 0
    if not shutil.which("perf"):
        p.error("needs Linux's perf on the PATH")
    for candidate in a.candidates:
        found = samples(a.case, candidate, a.seconds)
        products = sum(n for f, n in found if "gemm" in f)
        if not products:
            p.error(f"{candidate} of {a.case}: no sample in a matrix product")
        print(f"{candidate}: {1000 * sum(n for _, n in found) / products:.0f} ({products} samples in products)")
        for f, n in found[: a.top]:
            print(f"  {1000 * n / products:7.1f}  {re.sub(r'fastpe::cpu::|[(]anonymous namespace[)]::', '', f)[:110]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
