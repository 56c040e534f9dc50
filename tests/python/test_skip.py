"""Skipped tiles: what is hidden is never touched, what has decayed is skipped only within the bound."""

from __future__ import annotations

import pytest
import torch

import fastpe
from fastpe import bias, mask

N = 2048


def run(kwargs, bound, dtype=torch.float32, scale=1.0, backward=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, N, 16, generator=g).to(dtype) for _ in range(3))
    q = (q * scale).requires_grad_()
    k, v = k.requires_grad_(), v.requires_grad_()
    with fastpe.config.skip_bound(bound), fastpe.tile_stats() as stats:
        out, lse = fastpe.attention(q, k, v, is_causal=True, return_lse=True, **kwargs)
        if backward:
            out.float().sum().backward()
    return out.detach().double(), lse.detach().double(), [x.grad for x in (q, k, v)], stats


BIASES = {
    "alibi": lambda: bias.Alibi(torch.tensor([0.5, 0.25])),
    "kerple_power": lambda: bias.Kerple(torch.tensor([1.0, 0.7]), torch.tensor([0.5, 0.9]), "power"),
    "cable": lambda: bias.Cable(-torch.full((1, 2, N), 0.3)),
    "forget": lambda: bias.Forget(torch.full((1, 2, N), -0.2)),
    "t5_falling": lambda: bias.RelativeTable(-torch.arange(N).float()[None].expand(2, N) * 0.2, causal=True),
}


@pytest.mark.parametrize("name", BIASES)
def test_decayed_tiles_are_skipped(name, isa):
    """Far fewer tiles, and the same numbers within the bound."""
    kwargs = {"bias": BIASES[name]()}
    full_out, full_lse, full_grads, full = run(kwargs, 0.0)
    out, lse, grads, stats = run(kwargs, 2.0**-24)
    assert full.decayed == 0
    assert stats.decayed > 0 and stats.visited < 0.7 * full.visited, stats
    assert (out - full_out).abs().max() < 1e-5 and (lse - full_lse).abs().max() < 1e-5
    for a, b in zip(grads, full_grads):
        assert (a - b).abs().max() < 1e-5 * (1 + b.abs().max())


@pytest.mark.parametrize("bound", [2.0**-24, 1e-4, 1e-2])
def test_loss_is_within_the_bound(bound):
    """The probability a row loses is at most the bound: exp(lse) shrinks by no more than it."""
    kwargs = {"bias": bias.Alibi(torch.tensor([0.02, 0.05]))}
    _, exact, _, _ = run(kwargs, 0.0, torch.float64, backward=False)
    _, lse, _, stats = run(kwargs, bound, torch.float64, backward=False)
    lost = 1 - torch.exp(lse - exact)
    assert lost.max() <= bound and lost.min() > -1e-12
    if bound == 1e-2:
        assert stats.decayed > 0


def test_adversarial_scores():
    """Keys far away that win in spite of their bias are never skipped."""
    q = torch.zeros(1, 1, N, 16)
    k = torch.zeros(1, 1, N, 16)
    v = torch.randn(1, 1, N, 16)
    q[..., 0] = 40.0
    k[:, :, 3, 0] = 40.0  # one key at the start scores 400 above the rest
    kwargs = {"bias": bias.Alibi(torch.tensor([0.15])), "is_causal": True}
    want = fastpe.reference.attention(q, k, v, **kwargs)
    got = fastpe.attention(q, k, v, **kwargs)
    assert (got.double() - want).abs().max() < 1e-4
    rising = {"bias": bias.Alibi(torch.tensor([-0.1])), "is_causal": True}
    got, want = fastpe.attention(q, k, v, **rising), fastpe.reference.attention(q, k, v, **rising)
    assert (got.double() - want).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["alibi", "cable", "kerple_power"])
def test_parameter_gradients_within_the_bound(name):
    """A gradient that weighs scores by their distance sees what was skipped; it stays in float32's tolerance."""

    def gradient(bound):
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 2, N, 16, generator=g) for _ in range(3))
        x = torch.full((2,), 0.4, requires_grad=True)
        y = torch.full((2,), 0.9, requires_grad=True)
        b = {
            "alibi": lambda: bias.Alibi(x),
            "cable": lambda: bias.Cable(-x[None, :, None].expand(1, 2, N), y[None, :, None].expand(1, 2, N)),
            "kerple_power": lambda: bias.Kerple(y, x, "power"),
        }[name]()
        with fastpe.config.skip_bound(bound):
            fastpe.attention(q, k, v, bias=b, is_causal=True).square().sum().backward()
        return [t.grad for t in (x, y) if t.grad is not None]

    for a, b in zip(gradient(None), gradient(0.0), strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_hidden_tiles_are_not_touched():
    """Window and causal calls visit a band of tiles."""
    _, _, _, causal = run({}, 0.0, backward=False)
    _, _, _, window = run({"mask": mask.window(128)}, 0.0, backward=False)
    assert causal.decayed == window.decayed == 0
    assert causal.hidden > 0 and window.visited < 0.3 * causal.visited
    edges = torch.arange(0, N + 1, 256)
    _, _, _, packed = run({"mask": mask.documents(cu_seqlens=edges)}, 0.0, backward=False)
    assert packed.visited < 0.4 * causal.visited


def test_hidden_poison_is_not_touched():
    """NaN keys in tiles that no row sees leave the result alone."""
    q, k, v = (torch.randn(1, 1, N, 16) for _ in range(3))
    clean = fastpe.attention(q[:, :, -64:], k, v, mask=mask.window(64), is_causal=True)
    k[:, :, : N - 512] = torch.nan
    v[:, :, : N - 512] = torch.nan
    assert torch.equal(fastpe.attention(q[:, :, -64:], k, v, mask=mask.window(64), is_causal=True), clean)
