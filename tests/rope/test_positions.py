"""Position rules: what random draws may give, and what the rules refuse."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fastpe
from fastpe import positions

SEEDS = range(20)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_pose_draws(seed):
    for length, window, target in ((300, 64, 512), (64, 64, 256), (50, 64, 256), (1000, 64, 1024), (1, 64, 64)):
        tokens, p = positions.pose(length, window, target, generator=generator(seed))
        chunk = min(length, window)
        assert tokens.shape == p.shape == (chunk,)
        assert 0 <= tokens[0] and tokens[-1] < min(length, 5 * window) and p[-1] < target
        assert bool((tokens[1:] > tokens[:-1]).all()) and bool((p[1:] > p[:-1]).all())
        assert int(((p[1:] - p[:-1]) > 1).sum()) <= 1  # two chunks


@pytest.mark.parametrize("seed", SEEDS)
def test_cream_draws(seed):
    for factor, length in ((4, 384), (8, 500)):
        tokens, p = positions.cream(96, factor, length, generator=generator(seed))
        assert tokens.shape == p.shape == (96,)
        assert p[0] == 0 and p[-1] == 96 * factor - 1 and tokens[-1] == length - 1
        assert bool((p[1:] > p[:-1]).all()) and 0 <= tokens.min() and tokens.max() < length
        assert torch.equal(tokens[:16], torch.arange(16)) and torch.equal(p[:16], torch.arange(16))


def test_randomized_is_uniform_over_sets():
    counts = torch.zeros(40)
    for seed in range(400):
        n, limit = (5, 40) if seed % 2 else (30, 40)  # the two ways of drawing
        p = positions.randomized(n, limit, generator=generator(seed))
        assert p.dtype == torch.int64 and bool((p[1:] > p[:-1]).all()) and 0 <= p[0] and p[-1] < limit
        counts[p] += 1
    expected = 200 * (5 + 30) / 40
    assert (counts - expected).abs().max() < 5 * expected**0.5


@pytest.mark.parametrize("seed", SEEDS)
def test_segmented_draws(seed):
    p = positions.segmented(64, 256, 0.25, generator=generator(seed)).view(4, 16)
    assert bool((p[:, 1:] - p[:, :-1] == 1).all()) and bool((p[1:, 0] > p[:-1, -1]).all()) and p[-1, -1] < 256
    p, loss = positions.segmented_prefix(64, 256, 0.25, generator=generator(seed))
    assert loss.sum() == 16 and bool((p[loss].diff() == 1).all()) and bool((p.diff() > 0).all()) and p[-1] < 256


@pytest.mark.parametrize("seed", SEEDS)
def test_giraffe_and_clex_draws(seed):
    p = positions.giraffe_random(50, batch=3, generator=generator(seed))
    assert p.shape == (3, 50) and p.dtype == torch.float64
    assert bool((p.diff() >= 0).all()) and float(p.max()) <= 50 + 1e-9
    p, t = positions.clex_train(40, 16, generator=generator(seed))
    assert 1 <= t <= 16 and p[0] == 0 and p[-1] == 40 * t // 2 - 1 and bool((p.diff() > -1e-9).all())


def test_same_generator_same_draw():
    for draw in (
        lambda g: positions.pose(300, 64, 512, generator=g)[1],
        lambda g: positions.cream(96, 4, 384, generator=g)[1],
        lambda g: positions.randomized(10, 99, generator=g),
        lambda g: positions.segmented(64, 256, generator=g),
        lambda g: positions.clex_train(40, 16, generator=g)[0],
    ):
        assert torch.equal(draw(generator(3)), draw(generator(3)))


def test_v2pe_by_running_value():
    is_image = torch.tensor([0, 1, 1, 1, 0, 0, 1, 0]).bool()
    stride = torch.tensor([1, 16, 16, 16, 1, 1, 256, 1])
    value, want = -1.0, []
    for image, s in zip(is_image.tolist(), stride.tolist(), strict=True):
        value = value + s / 256 if image else -(-value // 1) + 1
        want.append(value)
    assert positions.v2pe(is_image, stride).tolist() == want
    far = positions.v2pe(torch.cat((torch.zeros(70000), torch.ones(3))).bool(), 1)
    assert bool((far[-3:].diff() == 1 / 256).all())  # float32 cannot hold such steps here


def test_mrope_text_alone_and_intervals():
    p, delta = positions.mrope(torch.zeros(5, dtype=torch.int64))
    assert torch.equal(p, torch.arange(5).expand(3, -1)) and delta == 0
    p, delta = positions.mrope(torch.tensor([1] * 3 + [0]), [(3, 2, 2)], intervals=[2.5])
    assert p[0].tolist() == [0, 2, 5, 1] and delta == 2


def test_batches_of_bipe_and_hirope():
    separators = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 1, 0]]).bool()
    intra, inter = positions.bipe(separators)
    for row in range(2):
        a, b = positions.bipe(separators[row])
        assert torch.equal(intra[row], a) and torch.equal(inter[row], b)
    both = positions.hirope(inter)
    assert both.shape == (2, 2, 5) and torch.equal(both[0], intra)
    near, far_q, far_k = positions.hirope_regions(inter, 4)
    assert torch.equal(far_q - far_k, torch.tensor([0, 3]).view(2, 1, 1).expand(2, 2, 5))
    assert torch.equal(near[0], torch.arange(5).expand(2, 5))


def test_increments_carry_gradients():
    delta = torch.rand(6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 1, 6, 8, dtype=torch.float64)
    f = lambda d: fastpe.apply_rotary(x, fastpe.rope.default(8), positions.increments(d))  # noqa: E731
    assert torch.autograd.gradcheck(f, (delta,))


@pytest.mark.parametrize("shift", ["true", "floor"])
def test_self_extend_reproduces_the_released_code(shift):
    """Near and far pairs as two calls joined by their lse, against the original code's output (window 20, group 3)."""
    data = np.load(Path(__file__).parent / "data" / "self_extend.npz")
    q, k, v = (torch.from_numpy(data[x]) for x in "qkv")
    n, window = q.shape[2], int(data["window"])
    rope = fastpe.rope.default(q.shape[3], base=float(data["base"]))
    far_q, far_k = positions.self_extend(n, window, int(data["group"]), shift=shift)
    i = torch.arange(n)
    far = fastpe.mask.dense(i[:, None] - i >= window)
    parts = [
        fastpe.attention(q, k, v, rope=rope, mask=fastpe.mask.window(window), is_causal=True, return_lse=True),
        fastpe.attention(q, k, v, rope=rope, positions=far_q, key_positions=far_k, mask=far, return_lse=True),
    ]
    lse = torch.logsumexp(torch.stack([part for _, part in parts]), 0)
    out = sum(part * torch.exp(part_lse - lse)[..., None] for part, part_lse in parts)
    torch.testing.assert_close(lse, torch.from_numpy(data[f"lse_{shift}"]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out, torch.from_numpy(data[f"out_{shift}"]), rtol=1e-9, atol=1e-9)


BAD = [
    (lambda: positions.self_extend(8, 0, 2), ValueError, "window must be at least 1, got 0"),
    (lambda: positions.self_extend(8, 4, 2, shift="none"), ValueError, "shift must be one of 'floor', 'true', got 'none'"),
    (lambda: positions.pose(300, 64, 32), ValueError, "target must be at least the chunk of 64 tokens, got 32"),
    (lambda: positions.pose(300, 64, 512, first=40), ValueError, r"first must be in \[1, 32\], got 40"),
    (lambda: positions.pose(300, 64, 512, second_end=301), ValueError, r"second_end must be in \[64, 300\], got 301"),
    (lambda: positions.pose(300, 64, 512, skip=449), ValueError, r"skip must be in \[0, 448\], got 449"),
    (lambda: positions.cream(97, 4, 384), ValueError, "window must be even, got 97"),
    (lambda: positions.cream(32, 4, 384, branch=1), ValueError, "window must exceed head and tail of 16 tokens each, got 32"),
    (lambda: positions.randomized(5, 4), ValueError, "n must be at most limit 4, got 5"),
    (lambda: positions.randomized(2, 9, sample=torch.tensor([3, 3])), ValueError, "sample must not repeat a position"),
    (lambda: positions.randomized(2, 9, sample=torch.tensor([3, 9])), ValueError, r"sample must lie in \[0, 9\), got 3 .. 9"),
    (lambda: positions.randomized(2, 9, sample=torch.tensor([3.0, 4.0])), TypeError, "sample must hold integers, got float32"),
    (lambda: positions.segmented(64, 256, 0.3), ValueError, "share must cut 64 tokens into equal segments, got 0.3"),
    (lambda: positions.segmented(4, 16, 0.5, starts=torch.tensor([3, 4])), ValueError, "starts must leave 2 tokens each"),
    (lambda: positions.segmented_prefix(64, 256, 2.0), ValueError, "share must be at most 1, got 2"),
    (lambda: positions.bipe(torch.zeros(3)), TypeError, "separators must be bool, got float32"),
    (lambda: positions.v2pe(torch.zeros(3), 1), ValueError, r"is_image must be bool \(N,\), got float32 \(3,\)"),
    (lambda: positions.v2pe(torch.zeros(3).bool(), torch.ones(2)), ValueError, r"stride must be a number or \(3,\), got \(2,\)"),
    (lambda: positions.grid(()), ValueError, "shape must have at least one axis, got none"),
    (lambda: positions.mrope(torch.ones(3, dtype=torch.int64)), ValueError, "grids has 0 entries, but token 0 starts another vision block"),
    (lambda: positions.mrope(torch.ones(3, dtype=torch.int64), [(1, 4, 4)]), ValueError, r"grids\[0\] needs 4 vision tokens from token 0 on"),
    (lambda: positions.mrope(torch.ones(3, dtype=torch.int64), [(1, 3, 4)]), ValueError, "no multiples of merge 2"),
    (lambda: positions.mrope(torch.zeros(3, dtype=torch.int64), [(1, 2, 2)]), ValueError, "grids has 1 entries, the text has room for 0"),
    (lambda: positions.clex_train(4, 64, factor=2, sample=torch.tensor([1])), ValueError, r"sample must be \(2,\), got \(1,\)"),
    (lambda: positions.giraffe_random(0), ValueError, "n must be at least 1, got 0"),
]  # fmt: skip


@pytest.mark.parametrize("n", range(len(BAD)))
def test_bad_input(n):
    call, error, message = BAD[n]
    with pytest.raises(error, match=message) as caught:
        call()
    assert str(caught.value).startswith("fastpe.positions.")
