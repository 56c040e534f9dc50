"""What the compiler makes of the kernels: registers, spills, tensor-core instructions."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")

# Bytes of spill stores a thread that are accepted, by head dim class. With 256 channels the accumulators alone take 128 of
# 255 registers.
SPILLS = {64: 0, 96: 0, 128: 0, 256: 704}

SOURCE = """
#include "cuda/sm80/attn_fwd.cuh"
using namespace fastpe::cuda;
"""
INSTANCE = "template __global__ void fastpe::cuda::attn_fwd_kernel<Bf16, {}, Kind::{}>(const __grid_constant__ FwdArgs);\n"


def compile_cubin(folder, arch, kinds, dims):
    file = folder / f"{arch}.cu"
    file.write_text(SOURCE + "".join(INSTANCE.format(d, k) for d in dims for k in kinds))
    command = [NVCC, "-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", "-cubin", "-Xptxas", "-v"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", str(folder / f"{arch}.cubin"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("arch,kind,dims", [("80", "rel", (96, 128, 256)), ("90a", "table", (64,))], ids=["sm_80", "sm_90a"])
def test_registers_and_spills(arch, kind, dims, tmp_path):
    report = compile_cubin(tmp_path, arch, [kind], dims)
    found = re.findall(r"entry function '\w*attn_fwd_kernel\w*?Li(\d+)E.*?(\d+) bytes spill stores.*?Used (\d+) registers", report, re.S)
    assert {int(d) for d, _, _ in found} == set(dims), report
    for dim, spilled, registers in found:
        assert int(spilled) <= SPILLS[int(dim)], f"{dim} channels: {spilled} bytes spilled"
        assert int(registers) <= 255
    # Nothing of the tile may be computed in double precision or on the stack of a called log or pow.
    text = sass(tmp_path / f"{arch}.cubin")
    if text is None:
        return
    for instruction in ("HMMA.16816.F32.BF16", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E", "MUFU.EX2"):
        assert instruction in text, f"no {instruction} in the machine code"


def sass(cubin):
    """The machine code as text, None without a disassembler (PyPI: nvidia-cuda-nvdisasm)."""
    tool = shutil.which("nvdisasm")
    if tool is None and (spec := importlib.util.find_spec("nvidia")):
        tool = next((str(t) for folder in spec.submodule_search_locations for t in pathlib.Path(folder).rglob("bin/nvdisasm")), None)
    if tool is None:
        return None
    return subprocess.run([tool, str(cubin)], capture_output=True, text=True, check=True).stdout


def test_every_instance_file_compiles_for_the_other_compiler(tmp_path):
    """Launch code and the kernels in front of attention, through nvcc's host side."""
    for name in ("attn_fwd.cu",):
        command = [NVCC, "-std=c++20", "-O1", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", "-gencode=arch=compute_80,code=sm_80"]
        command += ["-Werror", "cross-execution-space-call", "-c", "-o", str(tmp_path / "x.o"), str(ROOT / "csrc" / "cuda" / name)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_instructions_of_sm90(tmp_path):
    """The product on mbarriers, bulk copies and wgmma: nothing serialised or ignored by the assembler, no spills."""
    file = tmp_path / "product.cu"
    file.write_text('#include "emu/planted_sm90.h"\ntemplate __global__ void fastpe::planted_sm90::product_kernel<0>(const __grid_constant__ fastpe::cuda::conformance::Sm90Args);\n')
    command = [NVCC, "-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}", "-cubin", "-Xptxas", "-v"]
    done = subprocess.run([*command, "-gencode=arch=compute_90a,code=sm_90a", "-o", str(tmp_path / "90a.cubin"), str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"product_kernel.*?\D0 bytes spill stores", done.stderr, re.S), done.stderr
    # C7508: setmaxnreg ignored; C7510 and its neighbours: wgmma serialised.
    assert not re.search(r"C75\d\d|serializ|ignored", done.stderr), done.stderr
    text = sass(tmp_path / "90a.cubin")
    if text is not None:
        for instruction in ("HGMMA.64x64x16.F32.BF16", "UTMALDG.2D", "UTMASTG.2D", "SYNCS.PHASECHK", "USETMAXREG", "WARPGROUP.ARRIVE"):
            assert instruction in text, f"no {instruction} in the machine code"
