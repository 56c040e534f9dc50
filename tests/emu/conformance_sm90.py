"""What the kernels of csrc/cuda/conformance_sm90.cuh must give, bit for bit. run(name, words) is the emulator, the PTX
runner or a GPU."""

from __future__ import annotations

import functools

import numpy as np
import torch

TENSOR_WORDS = 2160
MASKS = {0: 0, 32: 0x10, 64: 0x30, 128: 0x70}


def bits(x):
    return np.ascontiguousarray(x).view(np.uint32).ravel()


def half_bits(x, dtype):
    return torch.from_numpy(np.asarray(x, np.float32)).to(dtype).view(torch.int16).numpy().view(np.uint16)


def mbarrier(run, rng, name):
    x = rng.integers(0, 2**31, (4, 32), dtype=np.uint32)
    got = run(name, x.ravel())
    np.testing.assert_array_equal(got[:128].reshape(4, 32), x[:, ::-1] + np.arange(4, dtype=np.uint32)[:, None])
    np.testing.assert_array_equal(got[128:192], x.ravel()[np.arange(64) ^ 32])
    assert (got[192:] == 1).all()


def in_tile(byte, swizzle):
    """Where a byte of a tile lies under a swizzle, the tile's start being aligned as it needs."""
    return byte ^ (byte >> 3 & MASKS[swizzle])


def box_bytes(rank, element, box, at):
    """(shape, element): for every element of the box, where its bytes lie in the tensor; -1 outside."""
    dims = (140 // element, 57, 1) if rank == 2 else (140 // element, 19, 3)
    z, y, x = np.meshgrid(*(np.arange(n) + p for n, p in zip(box[::-1], at[::-1])), indexing="ij")
    inside = (x >= 0) & (x < dims[0]) & (y >= 0) & (y < dims[1]) & (z >= 0) & (z < dims[2])
    where = x * element + y * 144 + z * 144 * 20
    return np.where(inside[..., None], where[..., None] + np.arange(element), -1)


def tma_load(run, rng, name, rank, element, swizzle, box, at):
    x = rng.integers(0, 256, TENSOR_WORDS * 4, dtype=np.uint8)
    source = box_bytes(rank, element, box, at).ravel()
    want = np.zeros(len(source), np.uint8)
    want[in_tile(np.arange(len(source)), swizzle)] = np.where(source < 0, 0, x[source])
    assert (source < 0).any() and (source >= 0).any()
    np.testing.assert_array_equal(run(name, bits(x)).view(np.uint8), want)


def tma_store(run, rng, name, rank, element, swizzle, box, at):
    target = box_bytes(rank, element, box, at).ravel()
    x = rng.integers(0, 256, len(target), dtype=np.uint8)
    want = np.full(TENSOR_WORDS * 4, 0xFF, np.uint8)
    inside = target >= 0
    want[target[inside]] = x[in_tile(np.arange(len(target)), swizzle)][inside]
    np.testing.assert_array_equal(run(name, bits(x)).view(np.uint8), want)


def bulk_load(run, rng, name):
    x = rng.integers(0, 2**32, 516, dtype=np.uint32)
    np.testing.assert_array_equal(run(name, x), x)


def wgmma(run, rng, name, n, dtype, fresh):
    a, b = rng.integers(-8, 9, (64, 64)), rng.integers(-8, 9, (64, n))
    c = rng.integers(-1000, 1000, (64, n)).astype(np.float32)
    got = run(name, np.concatenate([bits(half_bits(a, dtype)), bits(half_bits(b, dtype)), bits(c)]))
    np.testing.assert_array_equal(got.view(np.float32).reshape(64, n), a @ b + (0 if fresh else c))


def wgmma_groups(run, rng, name):
    a, b = rng.integers(-8, 9, (64, 64)), rng.integers(-8, 9, (64, 64))
    got = run(name, np.concatenate([bits(half_bits(x, torch.bfloat16)) for x in (a, b)])).view(np.float32).reshape(3, 64, 64)
    part = [a[:, k : k + 16] @ b[:, k : k + 16].T for k in (0, 16, 32)]
    np.testing.assert_array_equal(got, np.stack([part[0], part[1], part[0] + part[2]]))


def product_inputs(rng):
    """Words of A (60,264) and B (56,264), and their product, whose sums are exact in bf16."""
    a, b = rng.integers(-1, 2, (60, 264)), rng.integers(-1, 2, (56, 264))
    want = a @ b.T
    assert np.abs(want).max() <= 256
    return np.concatenate([bits(half_bits(x, torch.bfloat16)) for x in (a, b)]), half_bits(want, torch.bfloat16)


def product(run, rng, name):
    words, want = product_inputs(rng)
    np.testing.assert_array_equal(run(name, words).view(np.uint16).reshape(60, 56), want)


_BF16, _F16 = torch.bfloat16, torch.float16
_COPIES = {
    "tma_load_2d": (2, 2, 0, (24, 20, 1), (-3, 45, 0)),
    "tma_load_2d_32": (2, 2, 32, (16, 40, 1), (60, -2, 0)),
    "tma_load_2d_64": (2, 2, 64, (32, 33, 1), (48, 5, 0)),
    "tma_load_2d_128": (2, 2, 128, (64, 50, 1), (33, 10, 0)),
    "tma_load_2d_float": (2, 4, 128, (32, 9, 1), (5, 50, 0)),
    "tma_load_3d": (3, 2, 0, (8, 6, 4), (64, 16, -1)),
    "tma_load_3d_128": (3, 2, 128, (64, 8, 3), (8, 15, 1)),
    "tma_store_2d": (2, 2, 0, (24, 20, 1), (-3, 45, 0)),
    "tma_store_2d_128": (2, 2, 128, (64, 50, 1), (33, 10, 0)),
    "tma_store_3d_128": (3, 2, 128, (64, 8, 3), (8, 15, 1)),
}
_PRODUCTS = {
    "wgmma_bf16": (64, _BF16, False), "wgmma_f16": (64, _F16, True), "wgmma_n96_bf16": (96, _BF16, True),
    "wgmma_n128_f16": (128, _F16, False), "wgmma_trans_bf16": (64, _BF16, False), "wgmma_trans_a_f16": (64, _F16, False),
    "wgmma_rs_bf16": (64, _BF16, False), "wgmma_rs_trans_f16": (256, _F16, False),
}  # fmt: skip


CHECKS = {
    "mbarrier": mbarrier, "bulk_load": bulk_load, "product_sm90": product, "wgmma_groups": wgmma_groups,
    **{name: functools.partial(tma_load if "load" in name else tma_store, rank=r, element=e, swizzle=s, box=b, at=at) for name, (r, e, s, b, at) in _COPIES.items()},
    **{name: functools.partial(wgmma, n=n, dtype=dtype, fresh=fresh) for name, (n, dtype, fresh) in _PRODUCTS.items()},
}  # fmt: skip


def check(name, run, rng):
    CHECKS[name](run, rng, name)
