"""rotate, rotate_, rotate_pair against complex multiplication in float64."""

from __future__ import annotations

import pytest
import torch
from fastpe._load import _C

ops = torch.ops.fastpe
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Half a unit in the last place of the largest entry; float32 also rounds the products and the tables.
TOLERANCE = {torch.float32: 4e-7, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 1e-14}


def make_table(N: int, J: int, dtype: torch.dtype, B: int = 1, H: int = 1) -> torch.Tensor:
    """Random angles with an amplitude, so that nothing depends on how rotary angles are made."""
    g = torch.Generator().manual_seed(N * 1000 + J)
    angle = torch.rand(B, H, N, J, generator=g, dtype=torch.float64) * 20 - 10
    m = 0.5 + torch.rand(B, H, N, J, generator=g, dtype=torch.float64)
    return torch.stack((m * angle.cos(), m * angle.sin())).to(torch.float64 if dtype == torch.float64 else torch.float32)


def expected(x: torch.Tensor, table: torch.Tensor, layout: int, inverse: bool) -> torch.Tensor:
    """As multiplication of complex numbers."""
    x, J = x.double(), table.shape[-1]
    head, tail = x[..., : 2 * J], x[..., 2 * J :]
    pairs = torch.stack((head[..., :J], head[..., J:]), -1) if layout == 0 else head.unflatten(-1, (J, 2))
    z = torch.view_as_complex(pairs.contiguous())
    turn = torch.complex(table[0].double(), table[1].double())
    z = z * (turn.conj() if inverse else turn)
    y = torch.view_as_real(z)
    y = torch.cat((y[..., 0], y[..., 1]), -1) if layout == 0 else y.flatten(-2)
    return torch.cat((y, tail), -1)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    bound = TOLERANCE[dtype] * float(want.abs().max())
    torch.testing.assert_close(got.double(), want, rtol=0, atol=bound)


ORDERS = {
    "BHND": lambda B, H, N, D: torch.randn(B, H, N, D),
    "BNHD": lambda B, H, N, D: torch.randn(B, N, H, D).transpose(1, 2),
    "HNBD": lambda B, H, N, D: torch.randn(H, N, B, D).permute(2, 0, 1, 3),
    "padded": lambda B, H, N, D: torch.randn(B, H + 1, 2 * N, D + 24)[:, 1:, ::2, 8 : 8 + D],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotate(isa, dtype, layout, inverse, order):
    torch.manual_seed(0)
    for B, H, N, D, J in [(2, 3, 37, 64, 32), (1, 2, 5, 8, 4), (2, 1, 3, 80, 20), (1, 2, 70, 24, 11), (1, 1, 1, 256, 128)]:
        x = ORDERS[order](B, H, N, D).to(dtype)
        if dtype in (torch.bfloat16, torch.float16) and order != "BHND":
            x = ORDERS[order](B, H, N, D)
            x = torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x)
        table = make_table(N, J, dtype)
        want = expected(x, table, layout, inverse)
        before = x.clone()
        y = ops.rotate(x, table, layout, inverse)
        close(y, want, dtype)
        assert torch.equal(x, before)
        assert torch.equal(y[..., 2 * J :], x[..., 2 * J :])  # channels beyond the rotated ones, bit for bit
        x_in_place = torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x)
        assert ops.rotate_(x_in_place, table, layout, inverse) is None
        assert torch.equal(x_in_place, y)


@pytest.mark.parametrize("layout", [0, 1])
def test_tables_per_batch_and_head(isa, layout):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 32)
    for B, H in [(2, 3), (1, 3), (2, 1)]:
        table = make_table(9, 16, torch.float32, B, H)
        close(ops.rotate(x, table, layout, False), expected(x, table, layout, False), torch.float32)
    expanded = make_table(9, 16, torch.float32).expand(2, 2, 3, 9, 16)
    close(ops.rotate(x, expanded, layout, False), expected(x, expanded, layout, False), torch.float32)


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pair(isa, dtype, layout):
    torch.manual_seed(0)
    q = torch.randn(2, 6, 33, 64).to(dtype)
    k = torch.randn(2, 45, 2, 64).to(dtype).transpose(1, 2)
    tq, tk = make_table(33, 32, dtype), make_table(45, 16, dtype)
    yq, yk = ops.rotate_pair(q, k, tq, tk, layout, False)
    assert torch.equal(yq, ops.rotate(q, tq, layout, False)) and torch.equal(yk, ops.rotate(k, tk, layout, False))
    q2, k2 = q.clone(), k.clone()
    ops.rotate_pair_(q2, k2, tq, tk, layout, False)
    assert torch.equal(q2, yq) and torch.equal(k2, yk)


def test_result_keeps_the_order_of_heads_and_tokens():
    table = make_table(5, 8, torch.float32)
    assert ops.rotate(torch.randn(2, 5, 3, 16).transpose(1, 2), table, 0, False).transpose(1, 2).is_contiguous()
    assert ops.rotate(torch.randn(2, 3, 5, 16), table, 0, False).is_contiguous()


@pytest.mark.parametrize("layout", [0, 1])
def test_forth_and_back(isa, layout):
    """With amplitude 1 the inverse rotation undoes the rotation."""
    angle = torch.rand(1, 1, 40, 24, dtype=torch.float64) * 100
    table = torch.stack((angle.cos(), angle.sin())).float()
    x = torch.randn(1, 4, 40, 64)
    back = ops.rotate(ops.rotate(x, table, layout, False), table, layout, True)
    torch.testing.assert_close(back, x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_once_to_nearest_even(isa, dtype):
    """The float32 result, formed lane by lane in torch, rounded by torch: equal but for a last bit of the float32 sum."""
    torch.manual_seed(1)
    x = torch.randn(1, 2, 50, 64).to(dtype)
    table = make_table(50, 32, dtype)
    y = ops.rotate(x, table, 0, False)
    want = expected(x, table, 0, False).float().to(dtype)
    different = y != want
    assert float(different.float().mean()) < 2e-3
    torch.testing.assert_close(y[different], want[different], rtol=2.0**-7 if dtype == torch.bfloat16 else 2.0**-10, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_stay(isa, dtype):
    x = torch.ones(1, 1, 3, 64, dtype=dtype)
    x[0, 0, 0, 5] = float("nan")
    x[0, 0, 1, 40] = float("inf")
    x[0, 0, 2, 63] = float("nan")
    y = ops.rotate(x, make_table(3, 32, dtype), 0, False)
    assert bool(y[0, 0, 0, [5, 37]].isnan().all()) and int(y[0, 0, 0].isnan().sum()) == 2
    assert not bool(y[0, 0, 1, [40, 8]].isfinite().any()) and int((~y[0, 0, 1].isfinite()).sum()) == 2
    assert bool(y[0, 0, 2, [63, 31]].isnan().all())
    if dtype in (torch.bfloat16, torch.float16):  # NaN payloads that a careless rounding would turn into inf
        bits = torch.tensor([0x7F81 if dtype == torch.bfloat16 else 0x7C01], dtype=torch.int16).view(dtype)
        assert bool(ops.rotate(bits.expand(1, 1, 3, 64).contiguous(), make_table(3, 32, dtype), 1, False).isnan().all())


def test_overflow_rounds_to_inf(isa):
    table = torch.stack((torch.full((1, 1, 1, 32), 2.0), torch.zeros(1, 1, 1, 32)))
    x = torch.full((1, 1, 1, 64), 60000.0, dtype=torch.float16)
    assert bool(ops.rotate(x, table, 0, False).isinf().all())


@pytest.mark.parametrize("shape", [(0, 2, 3, 16), (1, 0, 3, 16), (1, 2, 0, 16)])
def test_empty(shape):
    x = torch.empty(shape)
    table = make_table(shape[2], 8, torch.float32)
    assert ops.rotate(x, table, 0, False).shape == x.shape
    ops.rotate_(x, table, 0, False)


def test_thread_counts_agree_bit_for_bit(threads):
    torch.manual_seed(0)
    q, k = torch.randn(2, 5, 777, 64), torch.randn(2, 777, 3, 64).transpose(1, 2)
    inv_freq = (10000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)).view(1, 1, 32)
    results = []
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        table = ops.rope_table(torch.arange(777, dtype=torch.float64).view(1, 1, -1), inv_freq, 1.0, False, False)
        results.append((table, *ops.rotate_pair(q, k, table, table, 1, False)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_scalar_pair():
    c, s = 0.6, 0.8
    assert _C.rotate_pair(1.0, 0.0, c, s) == (0.6, 0.8)
    assert _C.rotate_pair(0.0, 1.0, c, s) == (-0.8, 0.6)


X, T = torch.zeros(1, 2, 3, 16), torch.zeros(2, 1, 1, 3, 8)


@pytest.mark.parametrize(
    ("x", "table", "layout", "message"),
    [
        (X[0], T, 0, r"fastpe.rotate: x must have 4 axes \(batch, head, token, channel\), got \(2, 3, 16\)"),
        (X.int(), T, 0, "x must be float32, bfloat16, float16 or float64, got int32"),
        (X, T.double(), 0, "table must be float32, got float64"),
        (X.double(), T, 0, "table must be float64, got float32"),
        (X, T[:, :, :, :2], 0, r"table must be of shape \(2, 1, 2 or 1, 3, 8\), got \(2, 1, 1, 2, 8\)"),
        (X, T[0], 0, "table must be of shape"),
        (X, torch.zeros(2, 1, 1, 3, 9), 0, "table rotates 18 channels, x has 16"),
        (X, T, 2, r"layout must be 0 \(half\) or 1 \(interleaved\), got 2"),
        (torch.zeros(1, 2, 16, 3).transpose(2, 3), T, 0, "x must be contiguous in its last dimension, got stride 3"),
    ],
)
def test_messages(x, table, layout, message):
    with pytest.raises(RuntimeError, match=message):
        ops.rotate(x, table, layout, False)


def test_expanded_tensor_is_not_rotated_in_place():
    with pytest.raises(RuntimeError, match="x is expanded along axis 1 and cannot be rotated in place"):
        ops.rotate_(torch.zeros(1, 1, 3, 16).expand(1, 2, 3, 16), T, 0, False)
