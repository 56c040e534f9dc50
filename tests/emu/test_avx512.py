"""The emulated AVX-512 instructions (csrc/emu/avx512.h) against their definitions, and bit for bit against a processor that has
them."""

import ctypes
import math
import pathlib
import subprocess

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCE = pathlib.Path(__file__).with_name("avx512_ops.cpp")
FLOATS = ("fmadd", "max", "sqrt", "reduce", "scalef", "sums", "round", "dot", "to_bf16", "to_bf16_one", "half", "widen", "zip", "insert")


def _flags() -> set[str]:
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return set(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())


pytestmark = pytest.mark.skipif(not {"avx2", "fma", "f16c"} <= _flags(), reason="the emulated kernels need AVX2")


def _build(folder: pathlib.Path, name: str, *flags: str) -> ctypes.CDLL:
    target = folder / f"{name}.so"
    subprocess.run(["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-Wno-psabi", "-ffp-contract=off", *flags, str(SOURCE), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> ctypes.CDLL:
    return _build(tmp_path_factory.mktemp("emulated"), "ops", "-mavx2", "-mfma", "-mf16c", "-DFASTPE_EMULATED_BF16=1", "-include", str(ROOT / "csrc/emu/avx512.h"))


def run(lib: ctypes.CDLL, op: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, size: int = 96, dtype=np.float32) -> np.ndarray:
    r = np.zeros(size, dtype)
    getattr(lib, f"op_{op}")(*(ctypes.c_void_p(x.ctypes.data) for x in (r, a, b, c)))
    return r


def numbers(seed: int, special: bool = True) -> tuple[np.ndarray, ...]:
    g = np.random.default_rng(seed)
    out = []
    for _ in range(3):
        x = (g.standard_normal(16) * np.exp(g.uniform(-20, 20, 16))).astype(np.float32)
        if special:
            x[g.integers(0, 16, 4)] = g.choice(np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1e-40, 127.4, -149.5], np.float32), 4)
        out.append(x)
    return tuple(out)


def places(seed: int, end: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, end, 16).astype(np.int32)


def as_halves(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint16)


def bf16(x: np.ndarray) -> np.ndarray:
    """Bits of x rounded to bfloat16 by torch; instructions count subnormal numbers as 0."""
    x = np.where(np.abs(x) < np.float32(2) ** -126, np.copysign(np.float32(0), x), x)
    return torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def same(got: np.ndarray, want: np.ndarray) -> None:
    assert ((got == want) | (np.isnan(got) & np.isnan(want))).all(), (got, want)


@pytest.mark.parametrize("seed", range(8))
def test_numbers(emulated, seed):
    a, b, c = numbers(seed)
    with np.errstate(all="ignore"):
        exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
        got = run(emulated, "fmadd", a, b, c)[:16]
        near = np.isfinite(exact) & (np.abs(exact) < 3e38)
        assert (np.abs(got - exact)[near] <= np.maximum(np.abs(exact) * 6e-8, 1e-45)[near]).all()
        same(run(emulated, "max", a, b, c)[:16], np.where(a > b, a, b))
        same(run(emulated, "sqrt", a, b, c)[:16], np.sqrt(a))
        same(run(emulated, "half", a, b, c)[:16], a.astype(np.float16).astype(np.float32))
        same(run(emulated, "reduce", a, b, c)[:16], np.where(np.isinf(a), np.float32(0), a - np.floor(a)))
        scaled = np.array([math.nan if np.isnan(x) or np.isnan(y) else float(x) * 2.0 ** float(np.floor(np.clip(y, -400, 400))) for x, y in zip(a, b, strict=True)])
        same(run(emulated, "scalef", a, b, c)[:16], scaled.astype(np.float32))
    fine, *_ = numbers(seed, special=False)
    small = np.clip(fine, -2e9, 2e9).astype(np.float32)
    assert (run(emulated, "round", small, b, c, dtype=np.int32)[:16] == np.trunc(small.astype(np.float64)).astype(np.int64)).all()
    total, most = run(emulated, "sums", fine, b, c)[:2]
    assert most == fine.max() and abs(total - fine.astype(np.float64).sum()) <= 2e-6 * np.abs(fine).sum()


@pytest.mark.parametrize("seed", range(8))
def test_bf16(emulated, seed):
    a, b, _ = numbers(seed)
    nan = np.concatenate([np.isnan(a), np.isnan(b)])
    got, want = as_halves(run(emulated, "to_bf16", a, b, b))[:32], np.concatenate([bf16(a), bf16(b)])
    assert (got == want)[~nan].all() and ((got & 0x7F80) == 0x7F80)[nan].all() and ((got & 0x7F) != 0)[nan].all()
    assert (as_halves(run(emulated, "to_bf16_one", a, b, b))[:16] == got[:16]).all()
    assert (run(emulated, "widen", a, b, b, dtype=np.uint32)[:16] == as_halves(a)[:16]).all()
    # Pairs of bf16 numbers: each of the two products is rounded into the sum on its own.
    g = np.random.default_rng(seed)
    x, y = (torch.from_numpy(g.standard_normal(32).astype(np.float32)).to(torch.bfloat16) for _ in range(2))
    c = g.standard_normal(16).astype(np.float32)
    pairs = [t.view(torch.int16).numpy().view(np.float32).copy() for t in (x, y)]
    p = (x.double() * y.double()).numpy().reshape(16, 2)
    want = ((c + p[:, 1]).astype(np.float32).astype(np.float64) + p[:, 0]).astype(np.float32)
    assert (run(emulated, "dot", pairs[0], pairs[1], c)[:16] == want).all()


@pytest.mark.parametrize("seed", range(4))
def test_lanes(emulated, seed):
    a, b, _ = numbers(seed, special=False)
    at = places(seed, 32)
    r = run(emulated, "permute", a, b, at)
    assert (r[:16] == np.concatenate([a, b])[at]).all()
    by_half = as_halves(at)
    assert (as_halves(r)[32:64] == as_halves(a)[by_half % 32]).all()
    assert (as_halves(r)[64:96] == np.concatenate([as_halves(a), as_halves(b)])[by_half % 64]).all()
    lo = np.concatenate([np.stack([as_halves(a)[x : x + 4], as_halves(b)[x : x + 4]], 1).ravel() for x in (0, 8, 16, 24)])
    hi = np.concatenate([np.stack([as_halves(a)[x : x + 4], as_halves(b)[x : x + 4]], 1).ravel() for x in (4, 12, 20, 28)])
    assert (as_halves(run(emulated, "zip", a, b, b))[:64] == np.concatenate([lo, hi])).all()
    r = run(emulated, "insert", a, b, b)
    assert (r[:16] == np.concatenate([a[:8], b[:8]])).all() and (r[16:32] == np.concatenate([a[:8], b[:4], a[12:]])).all() and (r[32:40] == a[8:]).all()
    table = np.random.default_rng(seed).standard_normal(64).astype(np.float32)
    far = places(seed, 64)
    r = run(emulated, "gather", table, b, far)
    want = np.zeros(64, np.float32)
    for lane in range(16):
        if 0x5A3C >> lane & 1:
            want[far[lane]] = b[lane]
    assert (r[:16] == table[far]).all() and (r[16:80] == want).all()


@pytest.mark.parametrize("seed", range(4))
def test_whole_numbers_and_masks(emulated, seed):
    g = np.random.default_rng(seed)
    a, b = (g.integers(-(2**31), 2**31, 16).astype(np.int32) for _ in range(2))
    b[:4] = a[:4]
    m = np.array([0xA5C3, 77] + [0] * 14, np.int32)
    r = run(emulated, "whole", a, b, m, dtype=np.int32).view(np.uint32)
    x, y = a.view(np.uint32), b.view(np.uint32)
    for got, want in zip(r.reshape(6, 16), (x + y, x - y, x & y, x | y, x << 16, x >> 16), strict=True):
        assert (got == want).all()
    a[5], b[6] = np.array([np.nan, np.nan], np.float32).view(np.int32)
    r = run(emulated, "masks", a, b, m, dtype=np.int32)
    mask = np.array([0xA5C3 >> lane & 1 for lane in range(16)], bool)

    def bits(x: np.ndarray) -> int:
        return int((x.astype(np.int64) << np.arange(len(x))).sum())

    unordered = np.isnan(a.view(np.float32)) | np.isnan(b.view(np.float32))
    assert list(r[:5]) == [bits(a < 0), bits(a.view(np.int64) < 0), bits((a & b) != 0), bits((a != b) & mask), bits(unordered)]
    for got, want in zip(r[16:64].reshape(3, 16), (np.where(mask, b | 77, a), np.where(mask, b, a), np.where(mask, b, 0)), strict=True):
        assert (got == want).all()


@pytest.mark.skipif(not {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"} <= _flags(), reason="a processor without AVX-512 and its bf16 instructions has nothing to compare with")
def test_the_processor_says_the_same(emulated, tmp_path):
    flags = [f"-mavx512{x}" for x in ("f", "bw", "dq", "vl", "bf16")]
    real = _build(tmp_path, "real", "-mavx2", "-mfma", "-mf16c", *flags)
    for seed in range(200):
        a, b, c = numbers(seed)
        for op in FLOATS:
            got, want = (run(lib, op, a, b, c) for lib in (emulated, real))
            nan = np.isnan(got) & np.isnan(want)
            assert (got.view(np.uint32) == want.view(np.uint32))[~nan].all(), (op, seed)
        at, far, table = places(seed, 32), places(seed, 64), np.random.default_rng(seed).standard_normal(64).astype(np.float32)
        for op, args in (("permute", (a, b, at)), ("gather", (table, b, far))):
            assert (run(emulated, op, *args).view(np.uint32) == run(real, op, *args).view(np.uint32)).all(), (op, seed)
        x, y = a.view(np.int32), b.view(np.int32)
        for op in ("whole", "masks"):
            assert (run(emulated, op, x, y, far, dtype=np.int32) == run(real, op, x, y, far, dtype=np.int32)).all(), (op, seed)
