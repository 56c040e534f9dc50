"""apply_rotary and apply_rotary_pair against the definition, and what they refuse."""

import fastpe
import pytest
import torch
from fastpe import positions, reference, rope
from fastpe._reference_rope import rotate

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# one rounding of the result, plus float32 tables and products
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def near(got, want, dtype):
    size = want.abs().max().item() if want.numel() else 0.0
    assert got.dtype == dtype
    assert (got.double() - want).abs().max().item() <= RELATIVE[dtype] * max(size, 1.0) if want.numel() else got.shape == want.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("shape", [(2, 3, 37, 64), (1, 1, 1, 8), (1, 2, 130, 72)], ids=str)
def test_matches_the_definition(isa, dtype, layout, shape):
    b, h, n, d = shape
    for rotary_dim in {d, d // 2, d - 2}:
        r = rope.default(rotary_dim, layout=layout)
        for order in ("bhnd", "bnhd"):
            x = draw(*shape, dtype=dtype)
            if order == "bnhd":
                x = x.transpose(1, 2).contiguous().transpose(1, 2)
            for p, inverse in ((None, False), (torch.arange(b * n).view(b, n) * 1000 + 7, True)):
                want = reference.apply_rotary(x, r, torch.arange(n) if p is None else p, inverse=inverse)
                y = fastpe.apply_rotary(x, r, p, inverse=inverse)
                near(y, want, dtype)
                assert y.stride() == x.stride()
                assert torch.equal(y[..., rotary_dim:], x[..., rotary_dim:])
                z = x.clone(memory_format=torch.preserve_format)
                assert fastpe.apply_rotary(z, r, p, inverse=inverse, inplace=True) is z
                assert torch.equal(z, y)


def test_strided_and_expanded_inputs():
    r = rope.default(16)
    big = draw(2, 9, 3, 48)
    x = big.transpose(1, 2)[..., 16:40]
    near(fastpe.apply_rotary(x, r), reference.apply_rotary(x, r, torch.arange(9)), torch.float32)
    keep = big.clone()
    fastpe.apply_rotary(x, r, inplace=True)
    assert torch.equal(big[..., :16], keep[..., :16]) and torch.equal(big[..., 40:], keep[..., 40:])
    wide = draw(1, 1, 9, 16).expand(2, 3, 9, 16)
    near(fastpe.apply_rotary(wide, r), reference.apply_rotary(wide, r, torch.arange(9)), torch.float32)


@pytest.mark.parametrize("n", [0, 1])
def test_short_inputs(n):
    for r in (rope.default(8), rope.xpos(8), rope.dynamic_ntk(8, 2.0, 4), rope.harpe(8, [1e4, 1e5])):
        q, k = fastpe.apply_rotary_pair(draw(1, 2, n, 8), draw(1, 2, n, 8), r)
        assert q.shape == k.shape == (1, 2, n, 8)
        assert fastpe.apply_rotary(draw(1, 2, n, 8), r).shape == (1, 2, n, 8)


ROPES = {
    "default": (rope.default(16), 1),
    "yarn": (rope.yarn(16, 8.0, 64), 1),
    "xpos": (rope.xpos(16, scale_base=64.0), 1),
    "dynamic": (rope.dynamic_ntk(16, 2.0, 8), 1),
    "first tokens": (rope.longrope(16, [1.0] * 8, [2.0] * 8, 64, max_position=512, first_tokens=3), 1),
    "query heads": (rope.harpe(16, [1e4, 2e4, 3e4, 4e4]), 1),
    "key heads": (rope.harpe(16, [1e4, 2e4]), 1),
    "batch": (rope.attention_buckets(16, [1e4, 5e4]), 1),
    "axial": (rope.axial(16), 2),
    "mixed": (rope.mixed(rope.mixed_init(4, 16, generator=torch.Generator().manual_seed(0))), 2),
    "float32": (rope.llama3(16, precision="float32"), 1),
    "three axes": (rope.mrope(16, [2, 3, 3], 1e4), 3),
}


def pair_positions(axes, n, seed):
    p = torch.rand(axes, 2, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 50
    return p if axes > 1 else p[0]


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("given", ["none", "shared", "own"])
def test_pair_matches_tables_from_the_definition(name, given):
    r, axes = ROPES[name]
    if given == "none" and axes > 1:
        pytest.skip("several axes have no positions by default")
    q, k = draw(2, 4, 7, 24, seed=1), draw(2, 2, 7 if given == "shared" else 11, 24, seed=2)
    pq = None if given == "none" else pair_positions(axes, 7, 3)
    pk = pair_positions(axes, 11, 4) if given == "own" else None
    got = fastpe.apply_rotary_pair(q, k, r, pq, pk)
    tq, tk = r.materialize_tables(pq, pk, 7, k.shape[2], 2, 4, 2)
    for y, x, table in zip(got, (q, k), (tq, tk), strict=True):
        near(y, rotate(x, table[0], table[1], r.layout), torch.float32)
    back = fastpe.apply_rotary_pair(*got, r, pq, pk, inverse=True)
    for y, x, table in zip(back, got, (tq, tk), strict=True):
        near(y, rotate(x, table[0], table[1], r.layout, True), torch.float32)
    overwritten = q.clone(), k.clone()
    fastpe.apply_rotary_pair(*overwritten, r, pq, pk, inplace=True)
    assert all(torch.equal(a, b) for a, b in zip(overwritten, got, strict=True))


def test_grouped_heads_use_the_right_rows():
    w = torch.tensor([[0.1], [0.2], [0.3], [0.4]], dtype=torch.float64)
    per_query = fastpe.Rope(w, "h")
    q_table, k_table = per_query.materialize_tables(None, None, 2, 2, 1, 4, 2)
    torch.testing.assert_close(q_table[1, 0, :, 1, 0], w[:, 0].sin())
    torch.testing.assert_close(k_table[1, 0, :, 1, 0], w[[0, 2], 0].sin())  # key head g: query head 2 g
    per_key = fastpe.Rope(w[:2], "h")
    q_table, k_table = per_key.materialize_tables(None, None, 2, 2, 1, 4, 2)
    torch.testing.assert_close(q_table[1, 0, :, 1, 0], w[[0, 0, 1, 1], 0].sin())
    torch.testing.assert_close(k_table[1, 0, :, 1, 0], w[:2, 0].sin())


@pytest.mark.parametrize("name", ROPES)
def test_attention_takes_every_rope(name):
    r, axes = ROPES[name]
    q, k, v = draw(2, 4, 7, 24, seed=1), draw(2, 2, 7, 24, seed=2), draw(2, 2, 7, 16, seed=3)
    p = pair_positions(axes, 7, 3)
    out = fastpe.attention(q, k, v, rope=r, positions=p, is_causal=True)
    want = reference.attention(q, k, v, rope=r, positions=p, is_causal=True)
    assert (out - want).abs().max() <= 2e-5 * want.abs().max()
    turned = fastpe.apply_rotary_pair(q, k, r, p)
    outside = fastpe.attention(*turned, v, is_causal=True)
    torch.testing.assert_close(out, outside, rtol=1e-5, atol=1e-5)


def test_shift_invariance_at_a_million():
    """Scores depend on the distance alone, to 1e-5, at positions up to 4M; the float32 product loses two digits there."""
    q, k = draw(1, 1, 64, 128, seed=1), draw(1, 1, 64, 128, seed=2)
    distance = torch.arange(64) * 3

    def scores(r, shift):
        a = fastpe.apply_rotary(q, r, distance + shift)
        b = fastpe.apply_rotary(k, r, torch.full((64,), shift))
        return (a.double() * b.double()).sum(-1) / 128**0.5

    r = rope.default(128, 500000.0)
    for shift in (1_000_000, 4_194_304):
        assert (scores(r, shift) - scores(r, 0)).abs().max() < 1e-5
    rounded = rope.default(128, 500000.0, precision="float32")
    assert (scores(rounded, 1_000_000) - scores(rounded, 0)).abs().max() > 1e-3


def test_far_positions_stay_exact():
    """Beyond 2^24, where float32 cannot hold the position, against arithmetic with 60 decimal digits."""
    mpmath = pytest.importorskip("mpmath")
    r = rope.default(64)
    p = torch.tensor([2**24 + 1, 2**28 + 3, 2**30 + 1, 2**40 + 3, 2**53])
    x = torch.ones(1, 1, 5, 64)
    x[..., 32:] = 0
    y = fastpe.apply_rotary(x, r, p)[0, 0]
    with mpmath.workdps(60):
        for n, atol in ((0, 2e-7), (1, 2e-7), (2, 4e-7)):
            want = [float(mpmath.cos(p[n].item() * mpmath.mpf(w))) for w in r.inv_freq.tolist()]
            assert (y[n, :32] - torch.tensor(want)).abs().max() < atol
    assert ((y[:, :32] ** 2 + y[:, 32:] ** 2) - 1).abs().max() < 1e-6  # still a rotation


def test_zero_frequencies_copy_bits():
    x = draw(1, 2, 9, 32, dtype=torch.bfloat16)
    r = rope.proportional(32, 0.25)
    y = fastpe.apply_rotary(x, r, torch.arange(9) * 123457)
    still = torch.cat((torch.arange(4, 16), torch.arange(20, 32)))
    assert torch.equal(y[..., still], x[..., still])


def test_nan_and_inf_stay_where_they_are():
    x = draw(1, 1, 3, 8)
    x[0, 0, 1, 2] = torch.nan
    x[0, 0, 2, 3] = torch.inf
    y = fastpe.apply_rotary(x, rope.default(8))
    assert torch.isnan(y[0, 0, 1, [2, 6]]).all()
    assert torch.isfinite(y[0, 0, 0]).all() and torch.isfinite(y[0, 0, 1, [0, 1, 3, 4, 5, 7]]).all()


def test_cosine_layout_and_its_transpose():
    r = rope.lrpe(6)
    x = draw(1, 2, 4, 6, dtype=torch.float64)
    y = fastpe.apply_rotary(x, r)
    cos, sin = r.materialize(torch.arange(4))
    torch.testing.assert_close(y, torch.cat((x * cos, x * sin), -1))
    torch.testing.assert_close(fastpe.apply_rotary(y, r, inverse=True), x)


def test_xpos_scores_decay_with_the_distance():
    r = rope.xpos(8, scale_base=16.0)
    q = k = torch.ones(1, 1, 40, 8, dtype=torch.float64)
    a, b = fastpe.apply_rotary_pair(q, k, r)
    zeta = (torch.arange(4) * 2 + 0.4 * 8) / (1.4 * 8)
    d = torch.tensor(25.0)
    want = (2 * zeta.double() ** (d / 16) * (d * r.inv_freq).cos()).sum()
    torch.testing.assert_close((a[0, 0, 30] * b[0, 0, 5]).sum(), want)
    moved = fastpe.apply_rotary_pair(q, k, rope.xpos(8, scale_base=16.0, center=0))
    torch.testing.assert_close((moved[0][0, 0, 30] * moved[1][0, 0, 5]).sum(), want)


X = torch.zeros(2, 4, 5, 16)
BAD = [
    (lambda: fastpe.apply_rotary(X[0], rope.default(8)), ValueError, r"x must be \(B, H, N, D\), got shape \(4, 5, 16\)"),
    (lambda: fastpe.apply_rotary(X.int(), rope.default(8)), TypeError, "x must be float32, .*got int32"),
    (lambda: fastpe.apply_rotary([1.0], rope.default(8)), TypeError, "x must be a tensor, got list"),
    (lambda: fastpe.apply_rotary(X, "yarn"), TypeError, "rope must be a fastpe.Rope, got str"),
    (lambda: fastpe.apply_rotary(X, rope.default(32)), ValueError, "rope turns 32 channels, x has 16"),
    (lambda: fastpe.apply_rotary(X.transpose(2, 3), rope.default(4)), ValueError, "x's last dimension must be contiguous, got stride 16"),
    (lambda: fastpe.apply_rotary(X[:1].expand(2, 4, 5, 16), rope.default(8), inplace=True), ValueError, "expanded"),
    (lambda: fastpe.apply_rotary(X.clone().requires_grad_(), rope.default(8), inplace=True), RuntimeError, "requires grad"),
    (lambda: fastpe.apply_rotary(X, rope.default(8), torch.zeros(2, 2, 5)), ValueError, r"positions must be \(N,\) or \(B, N\), got shape \(2, 2, 5\)"),
    (lambda: fastpe.apply_rotary(X, rope.default(8), torch.tensor(3)), ValueError, r"positions must be \(N,\) or \(B, N\), got shape \(\)"),
    (lambda: fastpe.apply_rotary(X, rope.default(8), torch.arange(4)), ValueError, "positions is for 4 tokens, got 5"),
    (lambda: fastpe.apply_rotary(X, rope.default(8), torch.zeros(3, 5)), ValueError, "positions has 3 batch rows, expected 1 or 2"),
    (lambda: fastpe.apply_rotary(X, rope.default(8), torch.zeros(5, dtype=torch.bfloat16)), TypeError, "positions must hold integers, float32 or float64, got bfloat16"),
    (lambda: fastpe.apply_rotary(X, rope.default(8), torch.zeros(5, dtype=torch.bool)), TypeError, "positions must hold integers"),
    (lambda: fastpe.apply_rotary(X, rope.default(8), torch.tensor([0, 1, 2, 3, 2**53 + 1])), ValueError, r"positions must lie within \+-2\*\*53"),
    (lambda: fastpe.apply_rotary(X, rope.default(8), torch.full((5,), torch.nan)), ValueError, "positions must be finite"),
    (lambda: fastpe.apply_rotary(X, rope.axial(8), torch.arange(5)), ValueError, r"positions must be \(2, N\) or \(2, B, N\) for a rope with 2 axes, got shape \(5,\)"),
    (lambda: fastpe.apply_rotary(X, rope.axial(8), torch.zeros(3, 5)), ValueError, "2 axes, got shape"),
    (lambda: fastpe.apply_rotary(X, rope.axial(8)), ValueError, r"rope axial has 2 axes, so positions \(2, N\) are needed, got none"),
    (lambda: fastpe.apply_rotary(X, rope.harpe(8, [1e4, 2e4])), ValueError, "rope harpe has frequencies for 2 heads, the call has 4 heads"),
    (lambda: fastpe.apply_rotary(X, rope.attention_buckets(8)), ValueError, "frequencies for 6 batch rows, x has 2"),
    (lambda: fastpe.apply_rotary(X, rope.lrpe(8)), ValueError, "x must have 8 channels"),
    (lambda: fastpe.apply_rotary(X, rope.lrpe(16), inplace=True), NotImplementedError, "cosine layout changes the number of channels"),
    (lambda: fastpe.apply_rotary_pair(X, X[:, :3], rope.default(8)), ValueError, "key has 3 heads, which does not divide query's 4"),
    (lambda: fastpe.apply_rotary_pair(X, X.double(), rope.default(8)), TypeError, "key must be float32 like query, got float64"),
    (lambda: fastpe.apply_rotary_pair(X, X[:1], rope.default(8)), ValueError, "key has 1 batch rows, query has 2"),
    (lambda: fastpe.apply_rotary_pair(X[:, :, :2], X, rope.default(8), torch.arange(2)), ValueError, "key_positions is needed when positions is given and there are 5 keys for 2 queries"),
    (lambda: fastpe.apply_rotary_pair(X, X, rope.default(8), None, torch.arange(5)), ValueError, "positions is needed when key_positions is given"),
    (lambda: fastpe.attention(X, X, X, rope=rope.lrpe(16)), NotImplementedError, "cosine layout doubles the channels.*apply_rotary"),
    (lambda: fastpe.attention(X, X, X, rope=rope.default(8), positions=torch.arange(4)), ValueError, "positions is for 4 tokens, got 5"),
    (lambda: fastpe.nn.RotaryEmbedding(3), TypeError, "rope must be a fastpe.Rope or a function that returns one, got int"),
    (lambda: fastpe.nn.RotaryEmbedding(rope.default(8), base=3.0), TypeError, "base given with a Rope"),
    (lambda: fastpe.nn.RotaryEmbedding(lambda: 3), TypeError, "must return a fastpe.Rope, got int"),
]  # fmt: skip


@pytest.mark.parametrize("n", range(len(BAD)))
def test_bad_input(n):
    call, error, message = BAD[n]
    with pytest.raises(error, match=message) as caught:
        call()
    assert str(caught.value).startswith("fastpe.")


def test_positions_helpers_compose_with_rotation():
    """Interpolated positions turn like interpolated frequencies; whole text and cached steps agree."""
    x = draw(1, 2, 6, 16)
    a = fastpe.apply_rotary(x, rope.default(16), positions.interpolated(6, 4.0))
    b = fastpe.apply_rotary(x, rope.linear(16, 4.0))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    steps = [fastpe.apply_rotary(x[:, :, n : n + 1], rope.default(16), torch.tensor([n])) for n in range(6)]
    torch.testing.assert_close(torch.cat(steps, 2), fastpe.apply_rotary(x, rope.default(16)), rtol=0, atol=0)


def test_module_moves_and_casts():
    m = fastpe.nn.RotaryEmbedding(rope.mixed, freqs=rope.mixed_init(2, 16).float())
    assert m.bfloat16().freqs.dtype == torch.float32
    assert m.double().freqs.dtype == torch.float64
    fixed = fastpe.nn.RotaryEmbedding(rope.default(16)).half()
    assert fixed.rope.inv_freq.dtype == torch.float64 and not fixed.state_dict()
    q = draw(1, 2, 5, 16, dtype=torch.float16)
    assert torch.equal(fixed(q, q)[0], fastpe.apply_rotary(q, rope.default(16)))
    kept = torch.nn.Parameter(torch.rand(8))
    assert fastpe.nn.RotaryEmbedding(rope.learned, inv_freq=kept).inv_freq is kept


def test_kept_tables_follow_the_frequencies():
    """Tables of default positions are kept between calls; what they depend on is seen."""
    r = rope.default(8)
    first = r.tables(None, None, 5, 5, 1, 2, 2)
    assert r.tables(None, None, 5, 5, 1, 2, 2)[0] is first[0]
    assert r.tables(None, None, 6, 6, 1, 2, 2)[0].shape[3] == 6
    r.inv_freq.mul_(2)
    changed = r.tables(None, None, 5, 5, 1, 2, 2)[0]
    assert torch.equal(changed, r.tables(torch.arange(5), None, 5, 5, 1, 2, 2)[0])
    assert not torch.equal(changed, first[0])
    with torch.inference_mode():
        inside = r.tables(None, None, 5, 5, 1, 2, 2)[0]
    assert inside.is_inference() and not r.tables(None, None, 5, 5, 1, 2, 2)[0].is_inference()
    learned = fastpe.Rope(torch.rand(4, dtype=torch.float64, requires_grad=True))
    assert learned.tables(None, None, 5, 5, 1, 2, 2)[0] is not learned.tables(None, None, 5, 5, 1, 2, 2)[0]
    big = rope.default(256)
    assert big.tables(None, None, 4096, 4096, 1, 1, 1)[0] is not big.tables(None, None, 4096, 4096, 1, 1, 1)[0]
