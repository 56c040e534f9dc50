"""The PTX that nvcc makes of the same sources, executed by ptx_runner.py: what the emulator never sees is wrong inline
assembly, and what the compiler makes of the rest."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import re
import shutil
import subprocess

import numpy as np
import ptx_runner
import pytest
import torch

import fastpe
from fastpe.testing.cases import Case, build
from fastpe.testing.compare import error

ROOT = pathlib.Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")

SOURCE = """
#include "cuda/conformance.cuh"
#include "cuda/landmark_plan.cuh"
#include "cuda/prepare.cuh"
#include "cuda/sm80/attn_fwd.cuh"
#include "cuda/sm80/cope_bwd.cuh"
#include "cuda/sm80/cope_fwd.cuh"
#include "cuda/sm80/landmark_fwd.cuh"
using namespace fastpe::cuda;
template __global__ void conformance::mma_kernel<Bf16>(conformance::Args);
template __global__ void conformance::mma_kernel<F16>(conformance::Args);
template __global__ void fastpe::cuda::keys_kernel<Bf16>(const __grid_constant__ KeysArgs);
template __global__ void fastpe::cuda::attn_fwd_kernel<Bf16, 64, Kind::rel>(const __grid_constant__ FwdArgs);
template __global__ void fastpe::cuda::attn_fwd_kernel<Bf16, 64, Kind::table>(const __grid_constant__ FwdArgs);
template __global__ void fastpe::cuda::cope_table_kernel<Bf16>(const __grid_constant__ CopeArgs);
template __global__ void fastpe::cuda::cope_table_grad_kernel<Bf16>(const __grid_constant__ TableGradArgs);
template __global__ void fastpe::cuda::cope_fwd_kernel<Bf16, 64>(const __grid_constant__ CopeArgs);
template __global__ void fastpe::cuda::cope_bwd_q_kernel<Bf16, 64>(const __grid_constant__ CopeArgs);
template __global__ void fastpe::cuda::cope_bwd_kv_kernel<Bf16, 64>(const __grid_constant__ CopeArgs);
template __global__ void fastpe::cuda::landmark_fwd_kernel<Bf16, 64>(const __grid_constant__ LandmarkFwdArgs);
"""
LANDMARK = ("landmark_plan", "landmark_tile", "landmark_fwd")
COPE = ("cope_table", "cope_table_grad", "cope_fwd", "cope_bwd_q", "cope_bwd_kv")
# Name of a launch: what its mangled name contains.
ENTRIES = {
    **{n: [f"{n}_kernel"] for n in ("ldmatrix", "shuffle", "cp_async", "convert", "barrier", "exp", "envelope", *COPE, *LANDMARK)},
    "mma_bf16": ["mma_kernel", "Bf16"], "mma_f16": ["mma_kernel", "F16"], "keys": ["keys_kernel"],
}  # fmt: skip


def nvcc(tmp_path, source, *flags):
    file = tmp_path / "kernels.cu"
    file.write_text(source)
    command = [NVCC, "-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", *flags, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ptx")
    nvcc(folder, SOURCE, "-arch=compute_80", "-ptx", "-o", "kernels.ptx")
    return (folder / "kernels.ptx").read_text()


@pytest.fixture(scope="module")
def functions(text):
    return ptx_runner.parse(text)


@pytest.fixture
def ptx(emu, functions):
    """Launches run the PTX; says which did."""
    ran = []

    def entry(parts):
        (found,) = [n for n in functions if all(p in n for p in parts)]
        return found

    def run(kernel, blocks, threads, shared, arguments):
        parts = ENTRIES.get(kernel)
        if kernel == "attn_fwd":
            parts = ["attn_fwd_kernel", run.kind]
        if parts is None:
            return False
        ptx_runner.launch(functions, entry(parts), arguments, blocks, threads, shared)
        ran.append(kernel)
        return True

    run.ran, run.kind = ran, "KindE1E"
    emu.set_runner(run)
    yield run
    emu.set_runner(None)


def conformance_tests():
    spec = importlib.util.spec_from_file_location("conformance", ROOT / "tests" / "emu" / "test_conformance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONFORMANCE = conformance_tests()


@pytest.mark.parametrize("name", ["ldmatrix", "shuffle", "cp_async", "convert", "barrier", "exp"])
def test_conformance(name, emu, ptx):
    getattr(CONFORMANCE, "test_" + name)(emu, np.random.default_rng(5))
    assert name in ptx.ran


@pytest.mark.parametrize("name,dtype", [("mma_bf16", torch.bfloat16), ("mma_f16", torch.float16)])
def test_conformance_mma(name, dtype, emu, ptx):
    CONFORMANCE.test_mma(emu, np.random.default_rng(5), name, dtype)
    assert ptx.ran == [name]


def test_swapped_operands_are_caught(emu, text, functions, ptx):
    """The mistake the emulator cannot see: the first source of the packing instruction goes to the upper half."""
    wrong, found = re.subn(r"(cvt\.rn\.bf16x2\.f32 %r\d+), (%f\d+), (%f\d+);", r"\1, \3, \2;", text)
    assert found
    functions = ptx_runner.parse(wrong)
    (entry,) = [n for n in functions if "convert_kernel" in n]
    emu.set_runner(lambda kernel, *rest: bool(ptx_runner.launch(functions, entry, rest[3], *rest[:3])))
    with pytest.raises(AssertionError):
        CONFORMANCE.test_convert(emu, np.random.default_rng(5))


CASES = {
    "alibi": (Case(B=1, H=2, Hk=1, Nq=20, Nk=150, D=40, Dv=64, bias="alibi", causal=True, rope="half", seed=1), "KindE1E"),
    "cable": (Case(B=1, H=1, Hk=1, Nq=70, Nk=130, D=64, Dv=64, bias="cable", mask="everything", seed=2), "KindE1E"),
    "table": (Case(B=1, H=1, Hk=1, Nq=9, Nk=70, D=64, Dv=24, bias="t5", score=("sink", "softcap"), storage="padded", seed=3), "KindE2E"),
}


@pytest.mark.parametrize("name", CASES)
def test_forward(name, ptx, on_emulator, emu):
    case, ptx.kind = CASES[name]
    with torch.no_grad():
        with on_emulator():
            out, lse, _ = build(case, torch.bfloat16)(fastpe.attention, backward=False)
        assert "attn_fwd" in ptx.ran
        emu.set_runner(None)
        with on_emulator():
            want, want_lse, _ = build(dataclasses.replace(case), torch.bfloat16)(fastpe.attention, backward=False)
    # Fused products and another order of sums: the last bit of bf16 may differ.
    assert error(lse, want_lse) <= 1e-5
    assert error(out, want) <= 2.0**-8


@pytest.mark.parametrize("name", ["cope", "per_row"])
def test_contextual_positions(name, ptx, on_emulator, emu):
    g = torch.Generator().manual_seed(4)
    q, k, v, gate_k = (torch.randn(1, 1, n, 24, generator=g).bfloat16().requires_grad_() for n in (20, 80, 80, 80))
    table = torch.randn(24, 12, generator=g).requires_grad_()
    gate_q = torch.randn(1, 1, 20, 24, generator=g).bfloat16().requires_grad_()
    bias = fastpe.bias.Cope(table, gate_k) if name == "cope" else fastpe.bias.PerRowForget(gate_q, gate_k)
    leaves = (q, k, v, gate_k, table if name == "cope" else gate_q)

    def run():
        with on_emulator():
            out, lse = fastpe.attention(q, k, v, bias=bias, is_causal=True, return_lse=True)
            return out.detach(), lse.detach(), *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)

    got = run()
    assert set(ptx.ran) == {n for n in COPE if name == "cope" or "table" not in n}
    emu.set_runner(None)
    for x, want in zip(got, run(), strict=True):
        assert error(x, want) <= 2.0**-8


def test_landmark(ptx, on_emulator, emu):
    """Short blocks, one longer than a tile, padding, a block without a landmark."""
    g = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 1, n, 64, generator=g).bfloat16() for n in (40, 150, 150))
    is_landmark, real = torch.zeros(150, dtype=torch.bool), torch.rand(1, 150, generator=g) > 0.2
    is_landmark[[30, 100, 120]] = True
    call = {"rope": fastpe.rope.default(64), "mask": fastpe.mask.padding(real), "return_lse": True}
    with torch.no_grad():
        with on_emulator():
            out, lse = fastpe.landmark_attention(q, k, v, is_landmark, **call)
        assert {"landmark_plan", "landmark_tile", "landmark_fwd", "keys"} <= set(ptx.ran)
        emu.set_runner(None)
        with on_emulator():
            want, want_lse = fastpe.landmark_attention(q, k, v, is_landmark, **call)
    assert error(lse, want_lse) <= 1e-5
    assert error(out, want) <= 2.0**-8
