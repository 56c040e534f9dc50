"""Samples in units of the matrix products, from a report of perf."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))
import profile_case  # noqa: E402

REPORT = """
# Samples: 1K of event 'cpu-clock'
    50.00%           500  [.] fastpe::cpu::avx2::(anonymous namespace)::gemm_rows<fastpe::cpu::avx2::(anonymous namespace)::OpF32, 2, true, true>  libfastpe_cpu.so
    30.00%           300  [.] fastpe::cpu::avx2::(anonymous namespace)::gemm_cols<fastpe::cpu::avx2::(anonymous namespace)::OpF32, 1, true, true>  libfastpe_cpu.so
    10.00%           200  [.] fastpe::cpu::avx2::(anonymous namespace)::Forward<fastpe::cpu::avx2::(anonymous namespace)::OpF32>::run_blocks  libfastpe_cpu.so
     9.00%            90  [k] clear_page_erms  [kernel.kallsyms]
     1.00%            10  [.] malloc  libc.so.6
"""


@pytest.fixture
def perf(monkeypatch):
    """perf that has sampled `text` -> the commands it got."""
    commands = []

    def install(text):
        def run(command, **kwargs):
            commands.append(command)
            return subprocess.CompletedProcess(command, 0, stdout=text)

        monkeypatch.setattr(profile_case.shutil, "which", lambda name: f"/bin/{name}")
        monkeypatch.setattr(profile_case.subprocess, "run", run)
        return commands

    return install


def test_total_is_per_thousand_samples_in_products(perf, capsys):
    commands = perf(REPORT)
    assert profile_case.main(["rope/S1/fp32/fwd/cpu", "fastpe", "fastpe none", "--top", "1", "--seconds", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "fastpe: 1250 (800 samples in products)"  # (500 + 300 + 200) / 800
    assert lines[1].split() == ["625.0", "avx2::gemm_rows<avx2::OpF32,", "2,", "true,", "true>"]
    assert lines[2].startswith("fastpe none: 1250")
    recorded = [c for c in commands if c[1] == "record"]
    assert [c[-2:] for c in recorded] == [["rope/S1/fp32/fwd/cpu", "fastpe"], ["rope/S1/fp32/fwd/cpu", "fastpe none"]]
    assert all(c[c.index("--seconds") + 1] == "3.0" for c in recorded)


def test_no_product_is_an_error(perf, capsys):
    perf(REPORT.replace("gemm", "norm"))
    with pytest.raises(SystemExit):
        profile_case.main(["prefix/S1/fp32/fwd/cpu", "fastpe"])
    assert "no sample in a matrix product" in capsys.readouterr().err


def test_loop_calls_the_candidate(monkeypatch):
    import registry
    import run
    import torch

    calls, threads = [], torch.get_num_threads()

    def build(case, wanted):
        assert case.name == "rope/S1/fp32/fwd/cpu" and wanted == {"fastpe"}
        return registry.Work({"fastpe": lambda: calls.append(1)}, lambda name: 0.0)

    monkeypatch.setitem(run.FAMILIES, "rope", type("F", (), {"build": staticmethod(build)}))
    try:
        profile_case.loop("rope/S1/fp32/fwd/cpu", "fastpe", 0.05)
    finally:
        torch.set_num_threads(threads)
    assert calls
