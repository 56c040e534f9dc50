"""Skipped tiles: what is hidden is never touched, what has decayed is skipped only within the bound."""

from __future__ import annotations

import dataclasses

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
    "k_cable": lambda: bias.KernelCable(torch.full((1, 2, N), -1.0), torch.full((1, 2, N), 12.0)),
    "sandwich": lambda: bias.Sandwich(torch.tensor([2.0, 1.5]), dim=128),
    "fire": lambda: falling_fire(),
    "fire_positions": lambda: falling_fire(positions=3 * torch.arange(N)),
    "table_positions": lambda: bias.RelativeTable(-0.2 * torch.arange(N).float()[None], True, positions=torch.arange(N)),
    "alibi_positions": lambda: bias.Alibi(torch.tensor([0.5, 0.25]), positions=torch.arange(N).double()),
    "kerple_weighted": lambda: bias.Kerple(*(torch.tensor(x) for x in ([1.0, 0.7], [0.5, 0.9])), "power", *(torch.tensor([0.1, 0.2]) for _ in range(2))),
}


def falling_fire(**kwargs):
    """A network that falls by 60 over the normalised distance, with a kink halfway."""
    w1, b1 = torch.tensor([1.0, 1.0]), torch.tensor([0.0, -0.5])
    w2 = torch.tensor([[-60.0, -40.0], [-80.0, -20.0]])
    return bias.Fire(w1, b1, w2, torch.zeros(2), torch.tensor(1.0), 64.0, **kwargs)


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


@pytest.mark.parametrize("score", [{"softcap": 20.0}, {"temperature": 0.5}, {"softcap": 100.0, "softcap_includes_bias": True}], ids=str)
def test_composed_scores_are_skipped(score, isa):
    kwargs = {"bias": bias.Alibi(torch.tensor([0.5, 0.25])), **score}
    full_out, full_lse, full_grads, full = run(kwargs, 0.0)
    out, lse, grads, stats = run(kwargs, 2.0**-24)
    assert 0 < stats.decayed and stats.share > 0.2 and stats.visited < 0.8 * full.visited
    assert (out - full_out).abs().max() < 1e-5 and (lse - full_lse).abs().max() < 1e-5
    for a, b in zip(grads, full_grads):
        assert (a - b).abs().max() < 1e-5 * (1 + b.abs().max())


def test_both_sides_are_skipped(isa):
    """Gates of their own for each side, no causality."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, N, 16, generator=g) for _ in range(3))
    b = bias.Forget(torch.full((1, 2, N), -0.2), future_log_gates=torch.full((1, 2, N), -0.4))
    with fastpe.config.skip_bound(0.0):
        want = fastpe.attention(q, k, v, bias=b)
    with fastpe.tile_stats() as stats:
        out = fastpe.attention(q, k, v, bias=b)
    assert stats.share > 0.5 and (out - want).abs().max() < 1e-5


ADVERSARIES = {name: BIASES[name] for name in ("alibi", "kerple_power", "cable", "sandwich", "fire", "table_positions", "kerple_weighted")}
MASKS = {
    "none": lambda: None,
    "documents": lambda: mask.documents(cu_seqlens=torch.tensor([0, 300, 1111, N])),
    "window": lambda: mask.window(1500) & mask.sinks(70),
}


def adversary(make, seed):
    """Queries of one direction and keys along it, every far tile just about as large as its bias lets it matter: half of
    them too small to be computed, half of them too large to be left out. H = 4 heads share 2 of keys."""
    g = torch.Generator().manual_seed(seed)
    d = torch.arange(N, dtype=torch.float64)
    call = bias.Call(1, 2, N, N, True, torch.float64, torch.device("cpu"))
    fall = make().materialize(call)[0, :, -1].flip(-1)  # (2, N) by distance from the last row
    direction = torch.nn.functional.normalize(torch.randn(16, dtype=torch.float64, generator=g), dim=0)
    q = direction.expand(1, 4, N, 16) * 4.0
    need = (fall[:, :1] - fall).flip(-1) - 9.0 + 6.0 * torch.rand(2, N // 64, dtype=torch.float64, generator=g).repeat_interleave(64, -1)
    need = torch.where(d < N - 128, need, 0.0).clamp(-60.0, 60.0)  # the score 16 channels and scale 1 / 4 must give
    k = direction * need[None, :, :, None]
    return q, k, torch.randn(1, 2, N, 16, dtype=torch.float64, generator=g)


def of_four_heads(b, call_heads=4):
    """The bias of 2 heads given to 4: head h takes that of h // 2, as its keys."""
    fields = {}
    for f in dataclasses.fields(b):
        x = getattr(b, f.name)
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            axis = next((a for a, n in enumerate(x.shape) if n == 2 and f.name not in ("w1", "b1")), None)
            fields[f.name] = x if axis is None else x.repeat_interleave(2, axis)
    return dataclasses.replace(b, **fields)


@pytest.mark.parametrize("hide", MASKS)
@pytest.mark.parametrize("name", ADVERSARIES)
def test_bound_against_an_adversary(name, hide):
    """Forward: no row loses more than the bound. Backward: no gradient moves by more than a few times that."""
    bound = 1e-3
    made = ADVERSARIES[name]
    q, k, v = adversary(made, seed=len(name))
    b = of_four_heads(made())

    def both(eps):
        x = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        with fastpe.config.skip_bound(eps), fastpe.tile_stats() as stats:
            out, lse = fastpe.attention(*x, bias=b, mask=MASKS[hide](), is_causal=True, return_lse=True)
        with fastpe.config.skip_bound(eps), fastpe.tile_stats() as back:
            out.sin().sum().backward()
        return out.detach(), lse.detach(), [t.grad for t in x], stats, back

    want, lse, grads, _, _ = both(0.0)
    got, less, moved, stats, back = both(bound)
    assert stats.decayed > 0 and back.decayed > 0 and stats.visited > 0, "nothing to doubt"
    lost = 1 - torch.exp(less - lse)
    assert -1e-12 < lost.min() and lost.max() <= bound, lost.max()
    assert (got - want).abs().max() <= 2 * bound * v.abs().max()
    for what, a, e in zip("qkv", moved, grads):
        assert (a - e).abs().max() <= 4 * bound * e.abs().max(), what


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
