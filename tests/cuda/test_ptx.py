"""The PTX that nvcc makes of the same sources, executed by ptx_runner.py: what the emulator never sees is wrong inline
assembly, and what the compiler makes of the rest."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pathlib
import re
import shutil
import subprocess

import conformance_sm90
import numpy as np
import ptx_runner
import pytest
import torch
from emulated import SCHEDULES

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
#include "cuda/sm80/decode.cuh"
#include "cuda/sm80/landmark_fwd.cuh"
using namespace fastpe::cuda;
template __global__ void conformance::mma_kernel<Bf16>(conformance::Args);
template __global__ void conformance::mma_kernel<F16>(conformance::Args);
template __global__ void fastpe::cuda::keys_kernel<Bf16>(const __grid_constant__ KeysArgs);
template __global__ void fastpe::cuda::attn_fwd_kernel<Bf16, 64, Kind::rel>(const __grid_constant__ FwdArgs);
template __global__ void fastpe::cuda::attn_fwd_kernel<Bf16, 64, Kind::table>(const __grid_constant__ FwdArgs);
template __global__ void fastpe::cuda::attn_fwd_kernel<Bf16, 64, Kind::composed>(const __grid_constant__ FwdArgs);
template __global__ void fastpe::cuda::attn_fwd_kernel<F32, 64, Kind::composed>(const __grid_constant__ FwdArgs);
template __global__ void fastpe::cuda::attn_decode_kernel<Bf16, 64>(const __grid_constant__ DecodeArgs);
template __global__ void fastpe::cuda::cope_table_kernel<Bf16>(const __grid_constant__ CopeArgs);
template __global__ void fastpe::cuda::cope_table_grad_kernel<Bf16>(const __grid_constant__ TableGradArgs);
template __global__ void fastpe::cuda::cope_fwd_kernel<Bf16, 64>(const __grid_constant__ CopeArgs);
template __global__ void fastpe::cuda::cope_bwd_q_kernel<Bf16, 64>(const __grid_constant__ CopeArgs);
template __global__ void fastpe::cuda::cope_bwd_kv_kernel<Bf16, 64>(const __grid_constant__ CopeArgs);
template __global__ void fastpe::cuda::landmark_fwd_kernel<Bf16, 64>(const __grid_constant__ LandmarkFwdArgs);
"""
LANDMARK = ("landmark_plan", "landmark_tile", "landmark_fwd")
COPE = ("cope_table", "cope_table_grad", "cope_fwd", "cope_bwd_q", "cope_bwd_kv")
BACKWARD = """
#include "cuda/sm80/attn_bwd_terms.cuh"
using namespace fastpe::cuda;
template __global__ void fastpe::cuda::delta_kernel<Bf16>(const __grid_constant__ BwdArgs);
template __global__ void fastpe::cuda::attn_bwd_q_kernel<Bf16, 64, Kind::rel>(const __grid_constant__ BwdArgs);
template __global__ void fastpe::cuda::attn_bwd_kv_kernel<Bf16, 64, Kind::rel, true, true>(const __grid_constant__ BwdArgs);
template __global__ void fastpe::cuda::attn_bwd_q_kernel<F32, 64, Kind::composed>(const __grid_constant__ BwdArgs);
template __global__ void fastpe::cuda::attn_bwd_kv_kernel<F32, 64, Kind::composed, true, true>(const __grid_constant__ BwdArgs);
template __global__ void fastpe::cuda::attn_bwd_terms_kernel<Bf16, 64>(const __grid_constant__ TermsArgs);
"""
SM90 = """
#include "emu/planted_sm90.h"
using namespace fastpe::cuda;
const void* kernels[64];
void collect() {
  int i = 0;
  conformance::for_each_sm90([&](const char*, auto kernel, auto&&...) { kernels[i++] = (const void*)kernel; });
  kernels[i++] = (const void*)&fastpe::planted_sm90::product_kernel<0>;
}
"""
# Name of a launch: what its mangled name contains.
ENTRIES = {
    **{n: [f"{n}_kernel"] for n in ("ldmatrix", "shuffle", "cp_async", "convert", "barrier", "exp", "envelope", *COPE, *LANDMARK)},
    "mma_bf16": ["mma_kernel", "Bf16"], "mma_f16": ["mma_kernel", "F16"], "keys": ["keys_kernel"],
}  # fmt: skip
ENTRIES_SM90 = {
    **{n: [n + "_kernel"] for n in ("mbarrier", "bulk_load", "wgmma_groups")}, "product_sm90": ["product_kernel"],
    **{n: [n[: n.index("_2d" if "_2d" in n else "_3d")] + "_kernel"] for n in conformance_sm90.CHECKS if n.startswith("tma")},
    # Type, columns, a in registers, a and b MN-major, C ignored.
    "wgmma_bf16": ["4Bf16ELi64ELb0ELb0ELb0ELb0E"], "wgmma_f16": ["3F16ELi64ELb0ELb0ELb0ELb1E"], "wgmma_n96_bf16": ["4Bf16ELi96E"],
    "wgmma_n128_f16": ["3F16ELi128E"], "wgmma_trans_bf16": ["4Bf16ELi64ELb0ELb1ELb1E"], "wgmma_trans_a_f16": ["3F16ELi64ELb0ELb1ELb0E"],
    "wgmma_rs_bf16": ["4Bf16ELi64ELb1E"], "wgmma_rs_trans_f16": ["3F16ELi256E"],
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


@pytest.fixture(scope="module")
def backward_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ptx_backward")
    nvcc(folder, BACKWARD, "-arch=compute_80", "-ptx", "-o", "kernels.ptx")
    return (folder / "kernels.ptx").read_text()


@pytest.fixture
def on_emulator(on_emulator):
    """Under one schedule: this file is about instructions, not about their order."""
    return functools.partial(on_emulator, **SCHEDULES[0])


def entry_of(functions, parts):
    (found,) = [n for n in functions if all(p in n for p in parts)]
    return found


@pytest.fixture
def ptx(emu, functions):
    """Launches run the PTX; says which did."""
    ran = []

    def run(kernel, blocks, threads, shared, arguments):
        parts = ENTRIES.get(kernel)
        if kernel in ("attn_fwd", "attn_decode"):
            parts = [kernel + "_kernel", *run.instance]
        if parts is None:
            return False
        ptx_runner.launch(functions, entry_of(functions, parts), arguments, blocks, threads, shared)
        ran.append(kernel)
        return True

    run.ran, run.instance = ran, ()
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


@pytest.fixture(scope="module")
def sm90(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ptx_sm90")
    nvcc(folder, SM90, f"-I{ROOT / 'tests'}", "-arch=compute_90a", "-ptx", "-o", "kernels.ptx")
    return (folder / "kernels.ptx").read_text()


def conformance_sm90_by_ptx(name, text, emu):
    functions, ran = ptx_runner.parse(text), []

    def run(kernel, blocks, threads, shared, arguments):
        ptx_runner.launch(functions, entry_of(functions, ENTRIES_SM90[kernel]), arguments, blocks, threads, shared)
        ran.append(kernel)
        return True

    emu.set_runner(run)
    try:
        conformance_sm90.check(name, emu.conformance, np.random.default_rng(5))
    finally:
        emu.set_runner(None)
    assert ran == [name]


@pytest.mark.parametrize("name", conformance_sm90.CHECKS)
def test_conformance_sm90(name, sm90, emu):
    conformance_sm90_by_ptx(name, sm90, emu)


@pytest.mark.parametrize(
    "name,pattern,replacement",
    [
        ("wgmma_trans_bf16", r"(wgmma\.mma_async.*1, 1, )1, 1;", r"\g<1>0, 1;"),
        ("tma_load_2d", r"(\[%rd\d+, )\{(%r\d+), (%r\d+)\}", r"\1{\3, \2}"),
        ("product_sm90", r"(mbarrier\.arrive\.expect_tx.*), (16384|%r\d+);", r"\1, 8192;"),
    ],
)
def test_mistakes_in_the_assembly_of_sm90_are_caught(name, pattern, replacement, sm90, emu):
    wrong, found = re.subn(pattern, replacement, sm90)
    assert found
    with pytest.raises((AssertionError, RuntimeError)):
        conformance_sm90_by_ptx(name, wrong, emu)


def test_swapped_operands_are_caught(emu, text, functions, ptx):
    """The mistake the emulator cannot see: the first source of the packing instruction goes to the upper half."""
    wrong, found = re.subn(r"(cvt\.rn\.bf16x2\.f32 %r\d+), (%f\d+), (%f\d+);", r"\1, \3, \2;", text)
    assert found
    functions = ptx_runner.parse(wrong)
    (entry,) = [n for n in functions if "convert_kernel" in n]
    emu.set_runner(lambda kernel, *rest: bool(ptx_runner.launch(functions, entry, rest[3], *rest[:3])))
    with pytest.raises(AssertionError):
        CONFORMANCE.test_convert(emu, np.random.default_rng(5))


def dtype_of(name):
    return torch.float32 if name == "float32" else torch.bfloat16


# The kernel and, of its mangled name, what tells the instance.
REL, TABLE, COMPOSED, WIDE = ("attn_fwd", "4Bf16", "KindE1E"), ("attn_fwd", "4Bf16", "KindE2E"), ("attn_fwd", "4Bf16", "KindE4E"), ("attn_fwd", "3F32")
CASES = {
    "alibi": (Case(B=1, H=2, Hk=1, Nq=20, Nk=150, D=40, Dv=64, bias="alibi", causal=True, rope="half", seed=1), REL),
    "cable": (Case(B=1, H=1, Hk=1, Nq=70, Nk=130, D=64, Dv=64, bias="cable", mask="everything", seed=2), REL),
    "table": (Case(B=1, H=1, Hk=1, Nq=9, Nk=70, D=64, Dv=24, bias="t5", score=("sink", "softcap"), storage="padded", seed=3), TABLE),
    "products": (Case(B=1, H=1, Hk=1, Nq=20, Nk=70, D=64, Dv=24, bias="products", causal=True, seed=4), COMPOSED),
    "float32": (Case(B=1, H=1, Hk=1, Nq=20, Nk=70, D=24, Dv=64, bias="t5", mask="ids", score=("sink",), seed=5), WIDE),
    # Warps with tiles of their own, a different number each.
    "decode": (Case(B=1, H=4, Hk=2, Nq=2, Nk=150, D=64, Dv=40, bias="cable", rope="half", causal=True, seed=6), ("attn_decode",)),
    "decode_table": (Case(B=1, H=2, Hk=1, Nq=3, Nk=70, D=24, Dv=64, bias="t5", mask="ids", region="dual_chunk", rope="interleaved", seed=7), ("attn_decode",)),
}


@pytest.mark.parametrize("name", CASES)
def test_forward(name, ptx, on_emulator, emu):
    case, (kernel, *ptx.instance) = CASES[name]
    dtype = dtype_of(name)
    with torch.no_grad():
        with on_emulator():
            out, lse, _ = build(case, dtype)(fastpe.attention, backward=False)
        assert kernel in ptx.ran
        emu.set_runner(None)
        with on_emulator():
            want, want_lse, _ = build(dataclasses.replace(case), dtype)(fastpe.attention, backward=False)
    # Fused products and another order of sums: the last bit may differ.
    assert error(lse, want_lse) <= 1e-5
    assert error(out, want) <= (1e-5 if dtype == torch.float32 else 2.0**-8)


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


PASSES, TERMS = {"delta", "attn_bwd_q", "attn_bwd_kv"}, {"delta", "attn_bwd_terms"}
# What runs as PTX: the two passes are compiled for bf16 and the kind rel, and for float32. Where parameters are learned attn_bwd_terms sums delta anew,
# so only a case without any depends on the kernel delta.
BACKWARD_CASES = {
    "alibi": (Case(B=1, H=2, Hk=1, Nq=20, Nk=70, D=40, Dv=64, bias="alibi", causal=True, rope="half", lse_gradient=True, seed=1), PASSES),
    "cable": (Case(B=1, H=1, Hk=1, Nq=66, Nk=70, D=64, Dv=64, bias="cable", mask="everything", seed=2), PASSES),
    "table": (Case(B=1, H=1, Hk=1, Nq=9, Nk=70, D=64, Dv=24, bias="t5", score=("sink", "softcap"), storage="padded", seed=3), TERMS),
    "plain": (Case(B=1, H=2, Hk=1, Nq=7, Nk=20, D=64, Dv=40, lse_gradient=True, seed=4), {"delta"}),
    "products": (Case(B=1, H=1, Hk=1, Nq=9, Nk=70, D=24, Dv=64, bias="product_clipped", causal=True, seed=5), {"attn_bwd_terms", "offset_sum"}),
    "float32": (Case(B=1, H=1, Hk=1, Nq=9, Nk=70, D=24, Dv=64, bias="alibi", mask="ids", lse_gradient=True, seed=6), {"attn_bwd_q", "attn_bwd_kv"}),
}


def gradients_by_ptx(name, kernels, text, emu, on_emulator):
    functions, ran = ptx_runner.parse(text), set()
    instance = {torch.bfloat16: "4Bf16", torch.float32: "3F32"}[dtype_of(name)]

    def run(kernel, blocks, threads, shared, arguments):
        if kernel not in kernels:
            return False
        parts = [kernel + "_kernel"] if kernel == "offset_sum" else [kernel + "_kernel", instance]
        ptx_runner.launch(functions, entry_of(functions, parts), arguments, blocks, threads, shared)
        ran.add(kernel)
        return True

    emu.set_runner(run)
    try:
        with on_emulator():
            _, _, got = build(BACKWARD_CASES[name][0], dtype_of(name))(fastpe.attention)
    finally:
        emu.set_runner(None)
    assert ran == kernels
    return got


def compare_gradients(got, name, on_emulator):
    with on_emulator():
        _, _, want = build(BACKWARD_CASES[name][0], dtype_of(name))(fastpe.attention)
    assert got.keys() == want.keys()
    for leaf, x in want.items():
        if x is not None:
            # As for the forward pass; dS is rounded to bf16 on the way, and a float32 sum takes up its last bits.
            assert error(got[leaf], x) <= (1e-5 if dtype_of(name) == torch.float32 else 2.0**-7), leaf


@pytest.mark.parametrize("name", BACKWARD_CASES)
def test_backward(name, backward_text, on_emulator, emu):
    kernels = BACKWARD_CASES[name][1]
    compare_gradients(gradients_by_ptx(name, kernels, backward_text, emu, on_emulator), name, on_emulator)


@pytest.mark.parametrize("kernel,name", [("attn_bwd_q", "alibi"), ("attn_bwd_kv", "alibi"), ("attn_bwd_terms", "table"), ("delta", "plain"), ("attn_bwd_kv", "float32")])
def test_mistakes_in_the_assembly_of_the_backward_pass_are_caught(kernel, name, backward_text, on_emulator, emu):
    # Exponentials to another base: everything depends on them but delta, which is a sum over lanes.
    pattern, wrong = (r"shfl\.sync\.bfly", "shfl.sync.up") if kernel == "delta" else (r"ex2\.approx\.ftz\.f32", "rcp.approx.ftz.f32")
    text, found = re.subn(pattern, wrong, backward_text)
    assert found
    with pytest.raises(AssertionError):
        compare_gradients(gradients_by_ptx(name, {kernel}, text, emu, on_emulator), name, on_emulator)
