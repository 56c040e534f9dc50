"""The installed package: what is in it, what its libraries need and export, how it starts."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import fastpe
import pytest
from fastpe._load import _C

PACKAGE = pathlib.Path(_C.__file__).parent
ROOT = pathlib.Path(__file__).parents[2]
LIBRARIES = {"cpu": PACKAGE / "libfastpe_cpu.so", "ops": PACKAGE / "libfastpe_ops.so", "_C": pathlib.Path(_C.__file__)}
X86 = platform.machine() in ("x86_64", "AMD64")


def run(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    full = {**os.environ, **(env or {})}
    full["PYTHONPATH"] = str(PACKAGE.parent)
    return subprocess.run(args, env=full, capture_output=True, text=True, timeout=300)


def tool(name: str) -> str:
    found = shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


# ---- contents -------------------------------------------------------------------------------------------------------


def test_libraries_lie_beside_the_python_files():
    for path in LIBRARIES.values():
        assert path.is_file(), path
    assert (PACKAGE / "py.typed").is_file()


def test_distribution_contents():
    try:
        files = importlib.metadata.files("fastpe")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from the source folder, nothing is installed")
    names = {str(f) for f in files}
    for name in ("fastpe/__init__.py", "fastpe/py.typed", "fastpe/libfastpe_cpu.so", "fastpe/libfastpe_ops.so", "fastpe/testing/cases.py"):
        assert name in names
    assert any(re.fullmatch(r"fastpe/_C\..*\.so", n) for n in names)
    assert any(n.endswith("LICENSE") for n in names)
    foreign = [n for n in names if not n.startswith(("fastpe/", "fastpe-", "../"))]
    assert not foreign
    assert not [n for n in names if n.endswith((".cpp", ".h", ".cu", ".def"))]
    meta = importlib.metadata.metadata("fastpe")
    assert meta["Requires-Python"] == ">=3.10"
    assert [r for r in importlib.metadata.requires("fastpe") if "extra" not in r] == ["torch>=2.10"]


def test_one_version():
    text = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.*)"$', text, re.M).group(1)
    assert fastpe.info()["fastpe"] == version == _C.build_info()["version"]


def test_requirements_are_pinned():
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        for line in path.read_text().splitlines():
            if line and not line.startswith(("#", "-r ")):
                assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line), (path.name, line)


@pytest.mark.parametrize("name", LIBRARIES)
def test_no_folder_of_the_building_machine(name):
    assert str(ROOT).encode() + b"/" not in LIBRARIES[name].read_bytes()


# ---- symbols --------------------------------------------------------------------------------------------------------


def needed(path: pathlib.Path) -> set[str]:
    out = subprocess.run([tool("readelf"), "-d", str(path)], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", out))


def test_kernels_and_module_know_no_torch():
    for name in ("cpu", "_C"):
        assert not [n for n in needed(LIBRARIES[name]) if "torch" in n or "c10" in n]


def test_operators_need_no_python_and_no_cuda():
    names = needed(LIBRARIES["ops"])
    assert "libfastpe_cpu.so" in names and "libtorch_cpu.so" in names
    assert not [n for n in names if "python" in n or "cuda" in n]


# The address of the C++ runtime's own routine, which the destructors of scratch memory bring: no code of an instruction set.
PERSONALITY = "DW.ref.__gxx_personality_v0"


def test_symbols_of_an_instruction_set():
    """A weak symbol, or one outside the set's own namespace, could be picked by the linker for every processor."""
    nm = tool("nm")
    objects = sorted(ROOT.glob("build/*/CMakeFiles/fastpe_isa_*.dir/csrc/cpu/*.cpp.o"))
    if not objects:
        pytest.skip("no build folder with objects")
    for path in objects:
        isa = re.search(r"fastpe_isa_(\w+)\.dir", str(path)).group(1)
        out = subprocess.run([nm, "-C", "--defined-only", "--extern-only", str(path)], capture_output=True, text=True, check=True).stdout
        symbols = [line.split(maxsplit=2)[2] for line in out.splitlines() if PERSONALITY not in line]
        assert symbols, path
        assert all(s == f"fastpe_kernels_{isa}" or s.startswith(f"fastpe::cpu::{isa}::") for s in symbols), (path, symbols)
        out = subprocess.run([nm, str(path)], capture_output=True, text=True, check=True).stdout
        assert not [line for line in re.findall(r"^\S* [WwVvu] .*$", out, re.M) if PERSONALITY not in line], path


def test_kernel_library_exports_only_its_interface():
    nm = tool("nm")
    out = subprocess.run([nm, "-DC", "--defined-only", str(LIBRARIES["cpu"])], capture_output=True, text=True, check=True).stdout
    symbols = [line.split(maxsplit=2)[2] for line in out.splitlines()]
    ours = [s for s in symbols if "fastpe" in s]
    assert ours
    for s in ours:
        assert re.match(r"fastpe::cpu::[a-z_]+(\[abi:\w+\])?\(", s), s
    assert not [s for s in symbols if s.startswith("fastpe_kernels_")]


def test_stable_abi():
    pytest.importorskip("torch_abi_audit")
    for name in ("ops", "cpu", "_C"):
        done = run(sys.executable, "-c", "import sys; from torch_abi_audit.cli import main; sys.exit(main())", str(LIBRARIES[name]), "--check", "torch")
        assert done.returncode == 0, done.stdout + done.stderr
    done = run(sys.executable, "-c", "import sys; from torch_abi_audit.cli import main; sys.exit(main())", str(LIBRARIES["ops"]), "--json")
    assert '"stable"' in done.stdout.lower(), done.stdout


# ---- start ----------------------------------------------------------------------------------------------------------


def test_module_loads_without_torch():
    code = (
        "import importlib.util, sys; s = importlib.util.spec_from_file_location('_C', sys.argv[1]); "
        "m = importlib.util.module_from_spec(s); s.loader.exec_module(m); assert 'torch' not in sys.modules; print(m.current_isa())"
    )
    done = run(sys.executable, "-c", code, str(LIBRARIES["_C"]), env={"FASTPE_ISA": "generic"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "generic"


def test_import_without_a_gpu():
    done = run(sys.executable, "-c", "import fastpe, torch; assert not torch.cuda.is_available(); fastpe.info()", env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr


def test_info_command():
    done = run(sys.executable, "-m", "fastpe", "info", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert set(facts) == {"fastpe", "torch", "python", "isa", "isas_available", "isas_built", "cuda_architectures", "threads", "compiler", "stable_abi"}
    assert facts["isas_built"][-1] == "generic" and set(facts["isas_available"]) <= set(facts["isas_built"])
    if X86:
        assert set(facts["isas_built"]) == {"avx512bf16", "avx512", "avx2", "generic"}
    plain = run(sys.executable, "-m", "fastpe", "info").stdout
    for key in facts:
        assert re.search(rf"^{key} ", plain, re.M)


@pytest.mark.parametrize("isa", _C.available_isas())
def test_environment_chooses_the_instruction_set(isa):
    done = run(sys.executable, "-m", "fastpe", "info", "--json", env={"FASTPE_ISA": isa})
    assert json.loads(done.stdout)["isa"] == isa


def test_best_instruction_set_is_the_default():
    done = run(sys.executable, "-m", "fastpe", "info", "--json", env={"FASTPE_ISA": ""})
    facts = json.loads(done.stdout)
    assert facts["isa"] == facts["isas_available"][0]


def test_unknown_instruction_set_is_a_clear_import_error():
    done = run(sys.executable, "-c", "import fastpe", env={"FASTPE_ISA": "sse9"})
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: FASTPE_ISA: unknown instruction set 'sse9'; available: ") and "generic" in last


def test_set_isa_names_the_available_ones():
    with pytest.raises(ValueError, match=r"unknown instruction set 'sse9'; available: .*generic"):
        _C.set_isa("sse9")


def test_import_without_the_compiled_part_says_how_to_install(tmp_path):
    copy = tmp_path / "fastpe"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = subprocess.run([sys.executable, "-c", "import fastpe"], env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: fastpe: the compiled part is missing" in done.stderr and "--no-build-isolation" in done.stderr
