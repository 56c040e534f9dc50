"""Each wrapper of csrc/cuda/ptx.cuh against its definition, bit for bit where the result is exact."""

import conformance_sm90
import numpy as np
import pytest
import torch


def bits(x):
    return np.ascontiguousarray(x).view(np.uint32).ravel()


def half_bits(x, dtype):
    """Numbers as the 16-bit patterns of a torch dtype."""
    return torch.from_numpy(np.asarray(x, np.float32)).to(dtype).view(torch.int16).numpy().view(np.uint16)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def test_every_kernel_has_a_test(emu):
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {n.replace("_bf16", "").replace("_f16", "") for n in emu.conformance_names() if n not in conformance_sm90.CHECKS} <= tested
    assert set(conformance_sm90.CHECKS) <= set(emu.conformance_names())


@pytest.mark.parametrize("name,dtype", [("mma_bf16", torch.bfloat16), ("mma_f16", torch.float16)])
def test_mma(emu, rng, name, dtype):
    a, b = rng.integers(-8, 9, (16, 16)), rng.integers(-8, 9, (16, 8))
    c = rng.integers(-1000, 1000, (16, 8)).astype(np.float32)
    words = np.concatenate([half_bits(a, dtype).view(np.uint32).ravel(), half_bits(b, dtype).view(np.uint32).ravel(), bits(c)])
    got = emu.conformance(name, words).view(np.float32).reshape(16, 8)
    np.testing.assert_array_equal(got, a @ b + c)


def test_ldmatrix(emu, rng):
    rows = rng.integers(0, 2**16, (32, 8), dtype=np.uint16)
    got = emu.conformance("ldmatrix", bits(rows)).reshape(2, 32, 4)
    for lane in range(32):
        g, c = lane >> 2, 2 * (lane & 3)
        for m in range(4):
            matrix = rows[8 * m : 8 * m + 8].astype(np.uint32)
            assert got[0, lane, m] == matrix[g, c] | matrix[g, c + 1] << 16
            assert got[1, lane, m] == matrix[c, g] | matrix[c + 1, g] << 16


def test_shuffle(emu, rng):
    x = rng.integers(0, 2**32, 32, dtype=np.uint32)
    lane = np.arange(32)
    got = emu.conformance("shuffle", x).reshape(10, 32)
    np.testing.assert_array_equal(got[0], x[(3 * lane + 1) % 32])
    np.testing.assert_array_equal(got[1], x[lane ^ 5])
    np.testing.assert_array_equal(got[2], x[np.where(lane >= 3, lane - 3, lane)])
    np.testing.assert_array_equal(got[3], x[np.where(lane + 7 < 32, lane + 7, lane)])
    np.testing.assert_array_equal(got[4].view(np.float32), (x >> 8).astype(np.float32)[lane ^ 16])
    odd = sum(int(v & 1) << i for i, v in enumerate(x))
    assert (got[5] == odd).all()
    assert (got[6] == (x >= 2**31).all()).all()
    assert (got[7] == (x >= 2**31).any()).all()
    assert (got[8] == 1).all()
    np.testing.assert_array_equal(got[9], [sum(1 << i for i in range(32) if x[i] % 5 == y % 5) for y in x])


def test_cp_async(emu, rng):
    x = rng.integers(0, 256, (64, 16), dtype=np.uint8)
    got = emu.conformance("cp_async", bits(x)).view(np.uint8).reshape(64, 16)
    for c in range(64):
        n = 16 - c % 17
        np.testing.assert_array_equal(got[c, :n], x[c, :n])
        assert (got[c, n:] == 0).all()


def test_convert(emu, rng):
    x = (rng.standard_normal(256) * 2.0 ** rng.integers(-30, 20, 256)).astype(np.float32)
    # Ties, subnormals of both types, the largest numbers and what lies beyond, infinities.
    special = [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 2**-24, 2**-25, 1.5 * 2**-24, 2**-14, 2**-14 - 2**-25]
    special += [65504, 65519, 65520, 65536, 3.4e38, np.inf, -np.inf, 1e-40, 2047.5 * 2**-24]
    x[: len(special)] = special
    got = emu.conformance("convert", bits(x)).reshape(6, 256)
    for row, dtype in ((0, torch.bfloat16), (1, torch.float16)):
        want = half_bits(x, dtype).astype(np.uint32)
        np.testing.assert_array_equal(got[row], want)
        np.testing.assert_array_equal(got[row + 2], want | (want ^ 0x8000) << 16)
        np.testing.assert_array_equal(got[row + 4].view(np.float32), torch.from_numpy(x).to(dtype).float().numpy())


def test_barrier(emu, rng):
    x = rng.integers(0, 2**30, 128, dtype=np.uint32)
    t = np.arange(128)
    got = emu.conformance("barrier", x).reshape(4, 128)
    np.testing.assert_array_equal(got[0], x[::-1])
    np.testing.assert_array_equal(got[1], x[t ^ 33])
    assert (got[2] == int((x & 1).all()) + 2 * int((x & 1).any())).all()
    np.testing.assert_array_equal(got[3, 64:].view(np.float32), (x & 0xFFFF)[:64].astype(np.float32))
    assert (emu.conformance("barrier", x | 1).reshape(4, 128)[2] == 3).all()


def test_exp(emu, rng):
    x = np.concatenate([rng.uniform(-20, 20, 126), [0.0, -np.inf]]).astype(np.float32)
    got = emu.conformance("exp", bits(x)).view(np.float32).reshape(2, 128)
    np.testing.assert_allclose(got[0], np.exp2(x.astype(np.float64)), rtol=2**-22)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(got[1], np.log2(np.abs(x.astype(np.float64))), rtol=2**-22, atol=2**-22)


def test_bank_conflicts_are_counted(emu, rng):
    emu.counters()
    emu.conformance("ldmatrix", bits(rng.integers(0, 2**16, (32, 8), dtype=np.uint16)))
    # Rows 5 r mod 8 of a matrix fall on 8 different bank groups.
    assert emu.counters()["extra_wavefronts"] == 0


@pytest.mark.parametrize("schedule,copies", [("fifo", "late"), ("reverse", "early"), ("random", "random"), ("greedy", "late")])
@pytest.mark.parametrize("name", conformance_sm90.CHECKS)
def test_sm90(emu, rng, name, schedule, copies):
    emu.set_options(schedule, copies, seed=3)
    conformance_sm90.check(name, emu.conformance, rng)
