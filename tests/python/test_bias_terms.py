"""Composed biases: sums, grids, repeatability of their gradients, pieces of FIRE's network."""

from __future__ import annotations

import pytest
import torch

import fastpe
from fastpe import bias
from fastpe.testing import compare
from fastpe.testing.cases import Case, build


def attend(b, dtype=torch.float64, n=70, heads=2, attention=fastpe.attention, **kwargs):
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, n, 16, generator=g, dtype=dtype) for _ in range(3))
    return attention(q, k, v, bias=b, **kwargs)


def test_order_of_a_sum_does_not_matter():
    a, x = bias.Alibi(2), bias.Dense(torch.randn(2, 70, 70, dtype=torch.float64))
    row = bias.RowTable(torch.randn(2, 2, 70, 9, dtype=torch.float64))
    torch.testing.assert_close(attend(a + x + row), attend(row + (x + a)))
    torch.testing.assert_close(attend(x + x), attend(bias.Dense(2 * x.values)))


def test_sum_is_the_sum_of_the_definitions():
    call = bias.Call(2, 2, 70, 70, False, torch.float64, torch.device("cpu"))
    a, x = bias.Alibi(2), bias.Dense(torch.randn(70, 70, dtype=torch.float64))
    torch.testing.assert_close((a + x).materialize(call), a.materialize(call) + x.values)


@pytest.mark.parametrize("step", [1, 3])
def test_grid(step):
    """A grid's table against one lookup of both offsets for every pair."""
    grid = step * torch.cartesian_prod(torch.arange(5), torch.arange(14))
    table = torch.randn(2, 8 * step + 1, 26 * step + 1, dtype=torch.float64, requires_grad=True)
    d = grid[None] - grid[:, None]
    dense = table[:, d[..., 0] + 4 * step, d[..., 1] + 13 * step]
    out, want = attend(bias.relative_grid(table, grid)), attend(bias.Dense(dense), attention=fastpe.reference.attention)
    torch.testing.assert_close(out, want)
    got, exact = (torch.autograd.grad(x.square().sum(), table)[0] for x in (out, want))
    torch.testing.assert_close(got, exact)


def test_grid_needs():
    with pytest.raises(ValueError, match="holds offsets up to 1 along axis 0, the coordinates need 4, that is 9 entries"):
        bias.relative_grid(torch.zeros(1, 3, 27), torch.cartesian_prod(torch.arange(5), torch.arange(14)))


@pytest.mark.parametrize("name", ["dense", "dense_heads", "dense_batch", "dense_shared", "dense_by_key", "rows_cols", "products", "product_clipped", "fire", "table_positions", "forget_both_sides"])
def test_gradients_do_not_depend_on_threads(name, isa):
    case = Case(B=2, H=4, Hk=2, Nq=150, Nk=150, bias=name, causal=True, seed=5)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            runs.append(build(case, torch.float32)(fastpe.attention))
    finally:
        torch.set_num_threads(before)
    for out, _, grads in runs[1:]:
        assert torch.equal(out, runs[0][0])
        assert all(torch.equal(g, runs[0][2][what]) for what, g in grads.items())


@pytest.mark.parametrize("w1, b1", [([0.0, 1.0], [1.0, -0.5]), ([0.0, 0.0], [-1.0, 2.0]), ([2.0, -2.0, 2.0], [-1.0, 1.0, -1.0])])
def test_fire_flat_and_coinciding_units(w1, b1):
    """Units without a kink, and kinks at one place."""
    w1, b1 = torch.tensor(w1, dtype=torch.float64), torch.tensor(b1, dtype=torch.float64)
    w2, b2 = torch.randn(2, w1.shape[0], dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    b = bias.Fire(w1, b1, w2, b2, torch.tensor(0.3, dtype=torch.float64), 20.0)
    torch.testing.assert_close(attend(b), attend(b, attention=fastpe.reference.attention))


def test_fire_takes_relu_only():
    mlp = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.GELU(), torch.nn.Linear(4, 2))
    with pytest.raises(NotImplementedError, match="got Linear, GELU, Linear; use fastpe.bias.RelativeTable or fastpe.bias.Dense"):
        bias.Fire.from_mlp(mlp, torch.tensor(0.1), 512.0)


def test_position_maps_have_no_gradient():
    with pytest.raises(TypeError, match="positions must hold integers and have no gradient, got float32 that requires grad"):
        bias.RelativeTable(torch.zeros(1, 3), positions=torch.zeros(5, requires_grad=True))


def test_minus_infinity_hides():
    hidden = torch.zeros(70, 70, dtype=torch.float64)
    hidden[:, 40:] = -torch.inf
    hidden[3] = -torch.inf
    out, lse = attend(bias.Dense(hidden), return_lse=True)
    want, want_lse = attend(None, mask=fastpe.mask.dense(hidden == 0), return_lse=True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unclipped_rows(dtype):
    """One entry for every offset, several tiles, grouped heads."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 200, 16, generator=g).to(dtype)
    k = torch.randn(1, 2, 200, 16, generator=g).to(dtype)
    b = bias.relative_key(q, torch.randn(399, 16, generator=g), key=k)
    out, want = (f(q, k, k, bias=b) for f in (fastpe.attention, fastpe.reference.attention))
    compare.close("out", out.double(), want, 2e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("n", [1, 5, 12, 70])
def test_block_means(n):
    """Against a walk over the tokens."""
    sizes, c = [int(2 ** (h / 2)) for h in range(6)], torch.randn(2, 6, n, dtype=torch.float64)
    want = torch.empty_like(c)
    for h, size in enumerate(sizes):
        for t in range(n):
            block = t // size
            if (block + 1) * size > n:
                want[:, h, t] = c[:, h, t]
            else:
                want[:, h, t] = c[:, h, (block - 1) * size : block * size].mean(-1) if block else 0.0
    torch.testing.assert_close(bias.block_means(c, sizes), want)


def test_row_term():
    """Without the row term out stays, and lse moves by the term."""
    (out, lse), (shifted, moved) = (
        attend(bias.Alibi(2, row_term=term), is_causal=True, return_lse=True) for term in (True, False)
    )
    torch.testing.assert_close(shifted, out)
    term = bias.alibi_slopes(2).double()[:, None] * (69 - torch.arange(70))
    torch.testing.assert_close(moved + term, lse)


def test_table_that_must_hold_every_distance():
    whole = bias.RelativeTable(torch.randn(2, 139, dtype=torch.float64), clamp=False)
    torch.testing.assert_close(attend(whole), attend(bias.RelativeTable(whole.table)))
    torch.testing.assert_close(attend(whole, attention=fastpe.reference.attention), attend(whole))
    assert attend(bias.RelativeTable(torch.randn(2, 70, dtype=torch.float64), True, clamp=False), is_causal=True).shape


@pytest.mark.parametrize("product", [bias.RowProduct, bias.ColProduct])
def test_a_table_expanded_over_the_heads_has_a_gradient_for_each(product):
    q, k, v = (torch.randn(2, 4, 40, 16, dtype=torch.float64) for _ in range(3))
    table = torch.randn(1, 9, 16, dtype=torch.float64).expand(4, 9, 16)
    gradients = []
    for x in (table.detach(), table.clone()):
        x.requires_grad_()
        out = fastpe.attention(q, k, v, bias=product(q if product is bias.RowProduct else k, x), is_causal=True)
        gradients.append(torch.autograd.grad(out.square().sum(), x)[0])
    torch.testing.assert_close(*gradients)
