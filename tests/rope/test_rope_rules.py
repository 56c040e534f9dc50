"""The frequency rules against formulas written down a second time, and what they refuse."""

import math

import fastpe
import pytest
import torch
from fastpe import rope

D, L0, BASE = 64, 2048, 10000.0


def plain(d=D, base=BASE):
    return [base ** (-2 * j / d) for j in range(d // 2)]


def same(r, want, rtol=1e-12):
    torch.testing.assert_close(r.inv_freq, torch.tensor(want, dtype=torch.float64), rtol=rtol, atol=0)


def yarn_scalar(d, s, L0, base, fast=32, slow=1, truncate=True):
    """YaRN for one pair at a time, from the paper's equations."""
    edge = [d * math.log(L0 / (r * 2 * math.pi)) / (2 * math.log(base)) for r in (fast, slow)]
    if truncate:
        edge = [math.floor(edge[0]), math.ceil(edge[1])]
    low, high = max(edge[0], 0), min(edge[1], d - 1)
    out = []
    for j, f in enumerate(plain(d, base)):
        slowed = min(max((j - low) / (high - low), 0), 1)
        out.append(f / s * slowed + f * (1 - slowed))
    return out


def test_single_vector_rules():
    same(rope.default(D), plain())
    same(rope.linear(D, 4.0), [f / 4 for f in plain()])
    same(rope.ntk(D, 4.0), plain(base=BASE * 4 ** (D / (D - 2))))
    same(rope.yarn(D, 8.0, L0), yarn_scalar(D, 8, L0, BASE))
    same(rope.yarn(D, 8.0, L0, 5e5, truncate=False), yarn_scalar(D, 8, L0, 5e5, truncate=False))
    same(rope.proportional(D, 0.3, factor=2.0), [f / 2 if j < int(0.3 * D // 2) else 0.0 for j, f in enumerate(plain())])


def test_llama3_meets_its_three_bands():
    r = rope.llama3(128)
    for w, f in zip(r.inv_freq.tolist(), plain(128, 500000.0), strict=True):
        turns = 8192 * f / (2 * math.pi)
        if turns >= 4:
            assert w == pytest.approx(f, rel=1e-12)
        elif turns <= 1:
            assert w == pytest.approx(f / 8, rel=1e-12)
        else:
            g = (turns - 1) / 3
            assert w == pytest.approx(f * ((1 - g) / 8 + g), rel=1e-12)


def test_yarn_amplitudes():
    assert rope.yarn(D, 1.0, L0).amplitude == 1
    assert rope.yarn(D, 4.0, L0).amplitude == pytest.approx(0.1 * math.log(4) + 1)
    assert rope.yarn(D, 4.0, L0, attn_factor=2.0).amplitude == pytest.approx(2 * (0.1 * math.log(4) + 1))
    assert rope.yarn(D, 4.0, L0, attention_factor=1.5).amplitude == 1.5
    both = rope.yarn(D, 40.0, L0, mscale=1.0, mscale_all_dim=0.5).amplitude
    assert both == pytest.approx((0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1))


def test_length_rules():
    r = rope.dynamic_ntk(D, 2.0, L0)
    for n in (1, L0, L0 + 1, 10 * L0):
        m = max(n, L0)
        same(r.at_length(n), plain(base=BASE * (2 * m / L0 - 1) ** (D / (D - 2))))
    assert float(r.at_length(torch.tensor(3 * L0)).inv_freq[-1]) == float(r.at_length(3 * L0).inv_freq[-1])
    r = rope.yarn(D, None, L0)
    same(r.at_length(4 * L0), yarn_scalar(D, 4, L0, BASE))
    assert float(r.at_length(4 * L0).amplitude) == pytest.approx(0.1 * math.log(4) + 1)
    assert float(r.at_length(L0 // 2).amplitude) == 1
    short, long = [1.0 + 0.1 * j for j in range(D // 2)], [2.0 + j for j in range(D // 2)]
    r = rope.longrope(D, short, long, L0, max_position=8 * L0)
    same(r.at_length(L0), [f / s for f, s in zip(plain(), short, strict=True)])
    same(r.at_length(L0 + 1), [f / s for f, s in zip(plain(), long, strict=True)])
    assert r.amplitude == pytest.approx(math.sqrt(1 + math.log(8) / math.log(L0)))
    same(rope.dynamic_linear(D, L0).at_length(3 * L0), [f / 3 for f in plain()])


def test_length_is_read_from_the_positions():
    x = torch.randn(1, 1, 3, D, generator=torch.Generator().manual_seed(0))
    r = rope.dynamic_ntk(D, 2.0, L0)
    p = torch.tensor([0, 5, 4 * L0 - 1])
    assert torch.equal(fastpe.apply_rotary(x, r, p), fastpe.apply_rotary(x, r.at_length(4 * L0), p))
    q, k = fastpe.apply_rotary_pair(x, x, r, torch.arange(3), p)  # queries share the keys' length
    assert torch.equal(q, fastpe.apply_rotary(x, r.at_length(4 * L0), torch.arange(3)))


def test_clex_grows_away_from_ntk_with_its_weights():
    g = torch.Generator().manual_seed(0)
    up, down = torch.randn(8, 16, generator=g), 0.05 * torch.randn(16, 8, generator=g)
    r = rope.clex(up, down, 64, max_factor=4, time_dt=0.05)
    same(r.at_length(64), plain(16))
    ntk = rope.ntk(16, 3.0).inv_freq
    gap = (r.at_length(65).inv_freq / ntk - 1).abs().max()
    assert 1e-3 < gap < 1
    assert torch.equal(r.at_length(64 * 9).inv_freq, r.at_length(64 * 4).inv_freq)
    fine = rope.clex(up, down, 64, factor=4, time_dt=0.0125).inv_freq
    torch.testing.assert_close(r.at_length(256).inv_freq, fine, rtol=1e-5, atol=0)


def test_repr_names_the_rule():
    assert repr(rope.mrope(128, [16, 24, 24])) == "mrope(rotary_dim=128, axes=3, layout='half')"
    assert repr(rope.harpe(8, [1e4, 2e4], precision="float32")) == "harpe(rotary_dim=8, heads=2, layout='half', precision='float32')"


# ---------------------------------------------------------------------------------------------- configurations


def config(rope_type="default", **parameters):
    top = {k: parameters.pop(k) for k in ("model_type", "rope_interleave", "qk_rope_head_dim") if k in parameters}
    return {
        "hidden_size": 512, "num_attention_heads": 8, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, **parameters}, **top,
    }  # fmt: skip


class Attributes:
    def __init__(self, fields):
        self.__dict__.update(fields)


CONFIGS = [
    (config(), rope.default(64)),
    (config(partial_rotary_factor=0.25), rope.default(16)),
    (config("linear", factor=2.0), rope.linear(64, 2.0)),
    (config("dynamic", factor=2.0), rope.dynamic_ntk(64, 2.0, 8192)),
    (config("yarn", factor=4.0, original_max_position_embeddings=2048), rope.yarn(64, 4.0, 2048)),
    (config("yarn", factor=None, original_max_position_embeddings=2048), rope.yarn(64, 4.0, 2048)),
    (config("yarn", factor=4.0, truncate=False), rope.yarn(64, 4.0, 8192, truncate=False)),
    (
        config("longrope", short_factor=[1.0] * 32, long_factor=[3.0] * 32, original_max_position_embeddings=2048),
        rope.longrope(64, [1.0] * 32, [3.0] * 32, 2048, max_position=8192),
    ),
    (config("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0), rope.llama3(64, original_max_position=8192, base=1e4)),
    (config("proportional", partial_rotary_factor=0.5), rope.proportional(64, 0.5)),
    (config("axial"), rope.axial(64, 2, 1e4, layout="half")),
    (config(mrope_section=[8, 12, 12]), rope.mrope(64, [8, 12, 12], 1e4)),
    (config(mrope_section=[12, 10, 10], mrope_interleaved=True), rope.mrope(64, [12, 10, 10], 1e4, order="interleaved")),
    (config(mrope_section=[11, 11, 10], model_type="ernie4_5_vl_moe"), rope.mrope(64, [11, 11, 10], 1e4, order="ernie")),
    (config(qk_rope_head_dim=32, rope_interleave=True), rope.default(32, layout="interleaved")),
    ({"head_dim": 32, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, rope.linear(32, 2.0, 5e5)),
    ({"head_dim": 32, "rotary_pct": 0.25, "rotary_emb_base": 10000}, rope.default(8)),
    ({"n_embd": 256, "n_head": 4, "rotary_dim": 32, "rope_theta": 1e4}, rope.default(32)),
]


@pytest.mark.parametrize("n", range(len(CONFIGS)))
def test_from_hf_config(n):
    given, want = CONFIGS[n]
    for form in (given, Attributes(given)):
        got = rope.from_hf_config(form)
        assert repr(got) == repr(want) and type(got) is type(want)
        for length in (100, 9000, 50000):
            a, b = got.at_length(length), want.at_length(length)
            assert torch.equal(a.inv_freq, b.inv_freq) and float(a.amplitude) == float(b.amplitude)


def test_one_rope_per_layer_type():
    c = {
        "head_dim": 64, "max_position_embeddings": 8192,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }  # fmt: skip
    same(rope.from_hf_config(c, layer_type="full_attention"), [f / 8 for f in plain(base=1e6)])
    same(rope.from_hf_config(c, layer_type="sliding_attention"), plain())
    old = {"head_dim": 64, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    same(rope.from_hf_config(old, layer_type="sliding_attention"), plain())
    same(rope.from_hf_config(old, layer_type="full_attention"), [f / 8 for f in plain(base=1e6)])


def test_agrees_with_transformers():
    """The frequencies transformers computes, to a rounding of float32, where it is installed."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    seen = set()
    for given, _ in CONFIGS[2:10]:
        parameters = dict(given["rope_parameters"])
        seen.add(parameters["rope_type"])
        c = transformers.LlamaConfig(**{**given, "rope_parameters": parameters})
        for length in (100, 9000):
            w, amplitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](c, "cpu", seq_len=length)
            r = rope.from_hf_config(c, precision="float32").at_length(length)
            torch.testing.assert_close(r.inv_freq, w.double(), rtol=1e-7, atol=0)
            assert float(r.amplitude) == pytest.approx(amplitude)
    assert seen == set(ROPE_INIT_FUNCTIONS), "a rule of transformers that nothing here compares"
    config_, _ = CONFIGS[0]
    c = transformers.LlamaConfig(**config_)
    w, _ = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters(c)
    torch.testing.assert_close(rope.from_hf_config(c, precision="float32").inv_freq, w.double(), rtol=1e-7, atol=0)


# ---------------------------------------------------------------------------------------------- bad input

LISTS = [1.0] * 4
BAD = [
    (lambda: rope.default(7), ValueError, "rotary_dim must be even, got 7"),
    (lambda: rope.default(0), ValueError, "rotary_dim must be at least 2, got 0"),
    (lambda: rope.default(8.0), TypeError, "rotary_dim must be an integer, got float"),
    (lambda: rope.default(8, 0.0), ValueError, "base must be positive, got 0"),
    (lambda: rope.default(8, -1.0), ValueError, "base must be positive, got -1"),
    (lambda: rope.default(8, math.inf), ValueError, "base must be finite"),
    (lambda: rope.default(8, layout="neox"), ValueError, "layout must be one of 'half', 'interleaved', 'cosine', got 'neox'"),
    (lambda: rope.default(8, precision="bf16"), ValueError, "precision must be one of 'exact', 'float32', got 'bf16'"),
    (lambda: rope.linear(8, 0.5), ValueError, "factor must be at least 1, got 0.5"),
    (lambda: rope.ntk(8, 0.0), ValueError, "alpha must be at least 1, got 0"),
    (lambda: rope.ntk(2, 2.0), ValueError, "rotary_dim must be at least 4"),
    (lambda: rope.dynamic_ntk(8, 0.9, 64), ValueError, "factor must be at least 1, got 0.9"),
    (lambda: rope.dynamic_ntk(8, 2.0, 64).at_length(0), ValueError, "length must be at least 1, got 0"),
    (lambda: rope.yarn(8, 0.5, 64), ValueError, "factor must be at least 1, got 0.5"),
    (lambda: rope.yarn(8, 2.0, 64, base=1.0), ValueError, "base must not be 1"),
    (lambda: rope.longrope(8, LISTS[:3], LISTS, 64, factor=2.0), ValueError, r"short_factor has 3 entries, expected 4 \(one per pair\)"),
    (lambda: rope.longrope(8, LISTS, LISTS * 2, 64, factor=2.0), ValueError, r"long_factor has 8 entries, expected 4"),
    (lambda: rope.longrope(8, LISTS, [1.0, 1.0, 0.0, 1.0], 64, factor=2.0), ValueError, "long_factor must be positive, got 0"),
    (lambda: rope.longrope(8, LISTS, LISTS, 64), ValueError, "max_position or factor is needed"),
    (lambda: rope.llama3(8, high_freq_factor=1.0), ValueError, "high_freq_factor must exceed low_freq_factor 1, got 1"),
    (lambda: rope.proportional(8, 1.5), ValueError, r"fraction must be in \[0, 1\], got 1.5"),
    (lambda: rope.clex(torch.zeros(4, 8), torch.zeros(4, 8), 64), ValueError, r"down must be \(8, 4\) to fit up, got \(4, 8\)"),
    (lambda: rope.clex(torch.zeros(4, 8), torch.zeros(8, 4), 64, factor=0.5), ValueError, "factor must be at least 1, got 0.5"),
    (lambda: rope.clex(torch.zeros(4, 8), torch.zeros(8, 4), 64, act="relu"), ValueError, "act must be one of 'tanh', 'silu', got 'relu'"),
    (lambda: rope.giraffe(8, scale=0.5), ValueError, "scale must be at least 1, got 0.5"),
    (lambda: rope.harpe(8, [1e4, -1.0]), ValueError, "bases must be positive, got -1"),
    (lambda: rope.ms_poe(8, [0.5]), ValueError, "ratios must be at least 1, got 0.5"),
    (lambda: rope.ms_poe_ratios(torch.zeros(4), assignment="table"), ValueError, "assignment must be one of 'paper', 'algorithm1', 'code', 'normal', got 'table'"),
    (lambda: rope.xpos(8, center="middle"), ValueError, "center must be one of 'floor', 'ceil', got 'middle'"),
    (lambda: rope.axial(10), ValueError, "rotary_dim must be a multiple of 4 for 2 axes, got 10"),
    (lambda: rope.mixed(torch.zeros(2, 4)), ValueError, r"freqs must be \(axes, heads, pairs\), got shape \(2, 4\)"),
    (lambda: rope.mrope(128, [16, 24, 23]), ValueError, r"sections \[16, 24, 23\] add up to 63, expected 64 \(rotary_dim / 2\)"),
    (lambda: rope.mrope(128, [32, 32]), ValueError, "sections must be 3 numbers, got 2"),
    (lambda: rope.mrope(128, [16, 24, 24], scaling=rope.default(64)), ValueError, "scaling must be a Rope of rotary_dim 128"),
    (lambda: rope.mrope(128, [16, 24, 24], scaling=rope.dynamic_ntk(128, 2.0, 64)), ValueError, "at_length"),
    (lambda: rope.hirope(8, 16), ValueError, "token_dim must be at most rotary_dim 8, got 16"),
    (lambda: rope.lrpe(8, axes=2), ValueError, "theta is needed for 2 axes, got none"),
    (lambda: rope.lrpe(8, axes=2, theta=torch.ones(3)), ValueError, "theta has 3 entries per axis, expected 4 for 8 angles on 2 axes"),
    (lambda: fastpe.Rope(torch.ones(2, 4)), ValueError, r"inv_freq must be \(pairs\) for dims='', got shape \(2, 4\)"),
    (lambda: fastpe.Rope(torch.ones(4, dtype=torch.int64)), TypeError, "inv_freq must be float64 or float32, got int64"),
    (lambda: fastpe.Rope(torch.ones(4), "x"), ValueError, "dims must be one of"),
    (lambda: rope.base_bound(1 << 21), ValueError, "length must be at most 1048576"),
    (lambda: rope.from_hf_config(config("superlong")), ValueError, "rope_type must be one of 'default', 'linear', 'dynamic', 'yarn', 'longrope', 'llama3', 'proportional', 'axial', got 'superlong'"),
    (lambda: rope.from_hf_config(config("linear")), ValueError, "config has no factor, which rope_type 'linear' needs"),
    (lambda: rope.from_hf_config({"head_dim": 8}), ValueError, "config has no rope_theta, which every rope needs"),
    (lambda: rope.from_hf_config({"rope_theta": 1e4}), ValueError, "config has no head_dim or hidden_size"),
    (lambda: rope.from_hf_config({"head_dim": 8, "rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}}), ValueError, "config has no max_position_embeddings, which rope_type 'dynamic' needs"),
    (lambda: rope.from_hf_config({"head_dim": 8, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}}), ValueError, "layer_type must be one of 'full_attention', got none"),
    (lambda: rope.from_hf_config({"head_dim": 8, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, layer_type="x"), ValueError, "layer_type must be one of 'full_attention', got 'x'"),
]  # fmt: skip


@pytest.mark.parametrize("n", range(len(BAD)))
def test_bad_input(n):
    call, error, message = BAD[n]
    with pytest.raises(error, match=message) as caught:
        call()
    assert str(caught.value).startswith("fastpe.")
