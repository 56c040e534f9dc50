"""Rules that depend on the length, decoded token by token with a cache of un-rotated keys."""

import fastpe
import pytest
import torch
from fastpe import rope

D, N, START = 32, 48, 12

RULES = {
    "dynamic_ntk": lambda: rope.dynamic_ntk(D, 4.0, 16),
    "dynamic_linear": lambda: rope.dynamic_linear(D, 16),
    "yarn": lambda: rope.yarn(D, None, 16),
    "longrope": lambda: rope.longrope(D, [1.0] * (D // 2), [4.0] * (D // 2), 24, max_position=96),
    "clex": lambda: rope.clex(
        torch.randn(D // 2, D, generator=torch.Generator().manual_seed(1)),
        0.1 * torch.randn(D, D // 2, generator=torch.Generator().manual_seed(2)), 16, max_factor=4, time_dt=0.25,
    ),
    "default": lambda: rope.default(D),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_every_step_equals_a_full_pass(name):
    embedding = fastpe.nn.RotaryEmbedding(RULES[name]())
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, N, D, generator=g) for h in (4, 2, 2))
    worst_raw = worst_rotated = 0.0
    rotated = fastpe.apply_rotary_pair(q[:, :, :START], k[:, :, :START], embedding.rope)[1]
    for n in range(START, N):
        # one pass over all tokens known at this step
        full = fastpe.attention(
            q[:, :, : n + 1], k[:, :, : n + 1], v[:, :, : n + 1], rope=embedding.rope, is_causal=True
        )[:, :, -1:]
        raw = fastpe.attention(q[:, :, n : n + 1], k[:, :, : n + 1], v[:, :, : n + 1], rope=embedding.rope, is_causal=True)
        worst_raw = max(worst_raw, (raw - full).abs().max().item())

        p = torch.tensor([n])
        q_now, k_now = embedding(q[:, :, n : n + 1], k[:, :, n : n + 1], p, p)
        rotated = torch.cat((rotated, k_now), 2)
        usual = fastpe.attention(q_now, rotated, v[:, :, : n + 1], is_causal=True)
        worst_rotated = max(worst_rotated, (usual - full).abs().max().item())
    assert worst_raw < 1e-5
    if name == "default":
        assert worst_rotated < 1e-5
    else:
        assert worst_rotated > 1e-3  # keys rotated for shorter lengths stay in the usual cache
