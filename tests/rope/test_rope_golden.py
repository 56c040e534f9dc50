"""Every case of the rope_* golden files, through public names, in exact and in float32 mode.

The numbers come from the methods' own published code (each file's meta names it). Files are read from the repository's
own set and, if FASTPE_GOLDEN names a directory, from there too.
"""

import fnmatch
import json
import math
import os
import pathlib

import fastpe
import numpy as np
import pytest
import torch
from fastpe import positions, rope

HERE = pathlib.Path(__file__).resolve().parent
MODES = ("exact", "float32")

NOT_RUN = {
    "gateloop.operator": "linear attention without softmax whose gates multiply the score: not a rotation of query and key",
}

HANDLERS: list[tuple[str, object]] = []


def folders():
    own = HERE.parent / "golden" / "data"
    other = os.environ.get("FASTPE_GOLDEN") or HERE.parents[2] / "shared" / "golden"
    return [own] + ([pathlib.Path(other)] if pathlib.Path(other).is_dir() else [])


class Case:
    def __init__(self, file, meta, archive):
        self.file, self.name, self.params = file, meta["name"], meta.get("params") or {}
        self.arrays = {k[len(self.name) + 1 :]: archive[k] for k in archive.files if k.startswith(self.name + ".")}

    @property
    def id(self):
        return f"{self.file}.{self.name}"

    def __getitem__(self, what):
        if what in self.arrays:
            return torch.from_numpy(np.array(self.arrays[what]))
        return self.params[what]

    def __contains__(self, what):
        return what in self.arrays or what in self.params

    def get(self, what, default=None):
        return self[what] if what in self else default


def load():
    cases = {}
    for folder in folders():
        for path in sorted(folder.glob("rope_*.npz")):
            archive = np.load(path)
            meta = json.loads(str(archive["meta"]))
            for entry in meta["cases"]:
                case = Case(path.stem.removeprefix("rope_"), entry, archive)
                cases[case.id] = case  # a case in both folders holds the same numbers
    return cases


CASES = load()


def golden(*patterns):
    def register(f):
        HANDLERS.extend((p, f) for p in patterns)
        return f

    return register


def handler(case):
    found = [f for pattern, f in HANDLERS if fnmatch.fnmatchcase(case.id, pattern)]
    return found[0] if found else None


class Mode:
    """How close the result must be: what the reference code's own float32 angles cost in exact mode, rounding otherwise."""

    def __init__(self, precision):
        self.precision = precision
        self.checked = 0
        self.drift = 0.0  # of frequencies: torch's float32 power ends in another bit with AVX2 than with AVX-512

    def phase(self, r, p):
        """Largest angle in radians."""
        w = r.inv_freq.detach().double().abs().max().item()
        return w * p.double().abs().max().item() if p is not None and p.numel() else 0.0

    def close(self, got, want, phase=0.0, size=1.0, atol=None):
        want = want.detach()
        if atol is None:
            atol = 2e-6 * max(1.0, size) + self.drift * phase * size if self.precision == "float32" else 1e-6 + 2.0**-23 * phase * size
        assert got.shape == want.shape, (got.shape, want.shape)
        worst = (got.detach().double() - want.double()).abs().max().item()
        assert worst <= atol, f"differs by {worst:.3g}, allowed {atol:.3g}"
        self.checked += 1

    def frequencies(self, got, want):
        # float32 arithmetic of the reference: powers and a few operations, each rounded
        rtol = 1e-15 if want.dtype == torch.float64 else 2e-7 if self.precision == "float32" else 2e-6
        got, want = got.detach().double(), want.double()
        torch.testing.assert_close(got, want, rtol=rtol, atol=1e-12)
        self.drift = ((got - want).abs() / want.abs().clamp(min=1e-12)).max().item()
        self.checked += 1

    def rotated(self, r, x, p, want, key=False, phase=None):
        got = fastpe.apply_rotary(x, r.key_side if key else r, p)
        self.close(got, want, self.phase(r, p) if phase is None else phase, x.abs().max().item())

    def tables(self, r, p, cos, sin, **how):
        """Compares with stored cos and sin, (..., J) or with every column doubled (..., 2J)."""
        c, s = r.materialize(p, torch.float32, **how)
        n = torch.ones(c.shape[0], 1, c.shape[2], 2 * r.pairs)
        n[..., r.pairs :] = 0  # pairs (1, 0) turn into (cos, sin)
        turned = fastpe.apply_rotary(n, r.replace(layout="half"), p) if not how else torch.cat((c, s), -1)
        for got, want in ((turned[..., : r.pairs], cos), (turned[..., r.pairs :], sin), (c, cos), (s, sin)):
            if want.shape[-1] == 2 * r.pairs:
                want = want[..., : r.pairs] if torch.equal(want[..., : r.pairs], want[..., r.pairs :]) else want[..., ::2]
            self.close(got.reshape(want.shape), want, self.phase(r, p), max(1.0, want.abs().max().item()))


@pytest.mark.parametrize("precision", MODES)
@pytest.mark.parametrize("key", CASES, ids=str)
def test_case(key, precision):
    case = CASES[key]
    if case.id in NOT_RUN:
        pytest.skip(NOT_RUN[case.id])
    f = handler(case)
    assert f is not None, f"no test for {case.id}: add a handler or a reason"
    mode = Mode(precision)
    f(case, mode)
    assert mode.checked > 0


PLAIN = [i for i, c in CASES.items() if c.file in ("roformer", "pi_linear") and "q_rot" in c]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("key", PLAIN)
def test_plain_rotation_in_every_dtype_on_every_isa(isa, key, dtype):
    case = CASES[key]
    how = {"layout": case["layout"]}
    base = case.get("base") or case["rope_theta"]
    r = rope.linear(case["rotary_dim"], case.params.get("factor", 1.0), base, **how)
    p = case["position_ids"]
    q, k = fastpe.apply_rotary_pair(case["q"].to(dtype), case["k"].to(dtype), r, p, p)
    phase = r.inv_freq.max().item() * p.abs().max().item()
    for got, x, want in ((q, case["q"], case["q_rot"]), (k, case["k"], case["k_rot"])):
        # the reference's float32 angles, and roundings to the narrow type: of both members of the pair and of the result,
        # which is up to sqrt(2) larger
        narrow = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0)
        atol = 1e-6 + (2.0**-23 * phase + 2**0.5 * narrow) * x.abs().max()
        assert got.dtype == dtype and (got.double() - want.double()).abs().max() <= atol


def test_every_file_and_handler_is_used():
    methods = {case.file for case in CASES.values()}
    assert len(methods) >= 31
    unused = [p for p, _ in HANDLERS if not any(fnmatch.fnmatchcase(c.id, p) for c in CASES.values())]
    assert not unused


# ---------------------------------------------------------------------------------------------- plain rotation


def both(case, mode, r):
    if "q_rot" in case:
        mode.rotated(r, case["q"], case["position_ids"], case["q_rot"])
        mode.rotated(r, case["k"], case["position_ids"], case["k_rot"], key=True)
        q, k = fastpe.apply_rotary_pair(case["q"], case["k"], r, case["position_ids"], case["position_ids"])
        phase = mode.phase(r, case["position_ids"])
        mode.close(q, case["q_rot"], phase, case["q"].abs().max().item())
        mode.close(k, case["k_rot"], phase, case["k"].abs().max().item())


@golden("roformer.flash_ref_*")
def _(case, mode):
    r = rope.default(case["rotary_dim"], case["base"], layout=case["layout"], precision=mode.precision)
    x = case["x"].transpose(1, 2)
    mode.rotated(r, x, case["position_ids"], case["x_rot"].transpose(1, 2))
    y = x.clone(memory_format=torch.preserve_format)
    assert fastpe.apply_rotary(y, r, case["position_ids"], inplace=True) is y
    mode.close(y, case["x_rot"].transpose(1, 2), mode.phase(r, case["position_ids"]), x.abs().max().item())
    mode.tables(r, case["position_ids"], case["cos"], case["sin"])


@golden("roformer.interleaved_full_*")
def _(case, mode):
    # RoFormer's own table comes from float64 angles: float32 mode differs by the float32 angles' error
    r = rope.default(case["rotary_dim"], case["base"], layout=case["layout"], precision=mode.precision)
    p = case["position_ids"]
    for x in "qkv":
        size = case[x].abs().max().item()
        atol = 1e-6 if mode.precision == "exact" else 2e-6 + 2.0**-23 * mode.phase(r, p)
        mode.close(fastpe.apply_rotary(case[x], r, p), case[x + "_rot"], atol=atol * max(1.0, size))


@golden("roformer.*")
def _(case, mode):
    r = rope.default(case["rotary_dim"], case["base"], layout=case["layout"], precision=mode.precision)
    both(case, mode, r)
    p = case["position_ids"]
    if "inv_freq" in case:
        mode.frequencies(r.inv_freq, case["inv_freq"])
    if "cos" in case:
        mode.tables(r, p, case["cos"], case["sin"])
    if "dq" in case:
        q, k = case["q"].requires_grad_(), case["k"].requires_grad_()
        turned = fastpe.apply_rotary_pair(q, k, r, p, p)
        dq, dk = torch.autograd.grad(turned, (q, k), (case["dq_rot"], case["dk_rot"]))
        size = case["dq_rot"].abs().max().item()
        mode.close(dq, case["dq"], mode.phase(r, p), size)
        mode.close(dk, case["dk"], mode.phase(r, p), size)
        back = fastpe.apply_rotary(case["dq_rot"], r, p, inverse=True)
        mode.close(back, case["dq"], mode.phase(r, p), size)


def config_of(case):
    fields = ("rope_type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor",
              "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate", "mscale",
              "mscale_all_dim", "partial_rotary_factor")  # fmt: skip
    return {
        "head_dim": case["head_dim"],
        "max_position_embeddings": case["max_position_embeddings"],
        "rope_parameters": {k: case.params[k] for k in fields if k in case.params},
    }


@golden("pi_linear.hf_*", "dynamic_ntk.factor*", "llama3.*", "proportional.*", "yarn.hf_*", "longrope.hf_*")
def _(case, mode):
    r = rope.from_hf_config(config_of(case), layout=case["layout"], precision=mode.precision)
    length = case.params.get("seq_len") or 1
    r = r.at_length(length)
    mode.frequencies(r.inv_freq, case["inv_freq"])
    assert math.isclose(r.amplitude, case["attention_factor_out"], rel_tol=1e-12)
    assert r.rotary_dim == case["rotary_dim"]
    both(case, mode, r)


@golden("dynamic_ntk.hf_stateful_sequence")
def _(case, mode):
    limit = case["max_position_embeddings"]
    r = rope.dynamic_ntk(32, case["factor"], limit, case["rope_theta"], precision=mode.precision)
    longest = limit
    # the caller's state: the longest text so far, forgotten by a text that is shorter than the trained length
    for length, want in zip(case["lengths"].tolist(), case["inv_freq"], strict=True):
        longest = limit if length < limit else max(longest, length)
        mode.frequencies(r.at_length(longest).inv_freq, want)


@golden("dynamic_ntk.yarnrepo_dynamic_linear")
def _(case, mode):
    r = rope.dynamic_linear(case["cos"].shape[1], case["max_position_embeddings"], case["base"], precision=mode.precision)
    r = r.at_length(case["seq_len"])
    p = torch.arange(case["seq_len"])
    plain = rope.default(r.rotary_dim, case["base"], precision=mode.precision)
    # the reference divides positions, which rounds elsewhere than dividing frequencies
    scaled = p.float() * (case["max_position_embeddings"] / case["seq_len"])
    mode.tables(plain, scaled, case["cos"], case["sin"])
    mode.close(r.materialize(p)[0][0, 0, :, : case["cos"].shape[1]], case["cos"][:, : r.pairs], atol=2e-5)


@golden("pi_linear.yarnrepo_positions_divided")
def _(case, mode):
    p = positions.interpolated(case["cos"].shape[0], case["scale"])
    r = rope.default(case["head_dim"], case["base"], precision=mode.precision)
    mode.tables(r, p, case["cos"], case["sin"])


@golden("ntk_aware.alpha*")
def _(case, mode):
    r = rope.ntk(case["head_dim"], case["alpha"], case["base"], precision=mode.precision)
    mode.frequencies(r.inv_freq, case["inv_freq"])
    mode.tables(r, torch.arange(40), case["cos"], case["sin"])


@golden("ntk_aware.rotary_embedding_torch_rescale3")
def _(case, mode):
    r = rope.ntk(case["dim"], case["theta_rescale_factor"], case["theta"], precision=mode.precision)
    mode.frequencies(r.inv_freq, case["inv_freq"])


@golden("ntk_by_parts.*")
def _(case, mode):
    r = rope.ntk_by_parts(
        case["dim"], case["scale"], case["original_max_position_embeddings"], case["base"],
        ntk_factor=case.params.get("ntk_factor", 1.0), precision=mode.precision,
    )  # fmt: skip
    mode.frequencies(r.inv_freq, case["inv_freq"])


@golden("yarn.*")
def _(case, mode):
    L0, revised = case["original_max_position_embeddings"], "revised" in case.name
    how = {k: case.params[k] for k in ("extrapolation_factor", "attn_factor", "beta_fast", "beta_slow") if k in case.params}
    r = rope.yarn(
        case["dim"], case.params.get("scale"), L0, case["base"], revised=revised, precision=mode.precision, **how
    )
    if case.name == "repo_dynamic":
        r = r.at_length(case["seq_len"])
    mode.frequencies(r.inv_freq, case["inv_freq"])
    assert math.isclose(float(r.amplitude), float(case["mscale"]), rel_tol=1e-6)
    p = torch.arange(case["cos"].shape[0])
    mode.tables(r, p, case["cos"], case["sin"])


# ---------------------------------------------------------------------------------------------- LongRoPE, CLEX


def longrope(case, mode, **how):
    return rope.longrope(
        case["dim"], case["rescale_factors"], case["rescale_factors"], case["original_max_position_embeddings"],
        max_position=case["max_position_embeddings"], base=case["base"], precision=mode.precision, **how,
    )  # fmt: skip


@golden("longrope.ms_su", "longrope.ms_yarn", "longrope.ms_1.37")
def _(case, mode):
    policy = case["policy"]
    r = longrope(case, mode, attention_factor=float(policy) if policy[0].isdigit() else policy)
    assert math.isclose(r.amplitude, float(case["mscale"]), rel_tol=1e-12)
    mode.tables(r, case["position_ids"], case["cos"], case["sin"])


@golden("longrope.ms_dynamic_*")
def _(case, mode):
    mode.frequencies(longrope(case, mode, dynamic=True).at_length(case["seq_len"]).inv_freq, case["inv_freq"])


@golden("longrope.ms_mixed_first_n")
def _(case, mode):
    r = longrope(case, mode, first_tokens=case["start_token_idx"])
    both(case, mode, r)
    mode.tables(r, case["position_ids"], case["cos"], case["sin"])


@golden("clex.init_zero_down")
def _(case, mode):
    pairs = case["dim"] // 2
    up = torch.randn(pairs, 2 * pairs)
    r = rope.clex(up, torch.zeros(2 * pairs, pairs), 32, max_factor=case["max_factor"], time_dt=case["time_dt"],
                  precision=mode.precision)  # fmt: skip
    for t in range(1, case["max_factor"] + 1):
        w = r.at_length(32 * t).inv_freq
        torch.testing.assert_close(w, case["inv_freq_t"][t - 1].double(), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(w, case["closed_form"][t - 1], rtol=1e-5, atol=1e-9)
        mode.checked += 1


@golden("clex.*")
def _(case, mode):
    up, down = case["ode_up_proj"].requires_grad_(), case["ode_down_proj"].requires_grad_()
    L0 = case["max_position_embeddings"]
    how = {"max_factor": case["max_factor"], "act": case["act"], "time_dt": case["time_dt"], "base": case["base"]}
    r = rope.clex(up, down, L0, precision=mode.precision, **how)
    w = torch.stack([r.at_length(L0 * t).inv_freq for t in range(1, case["max_factor"] + 1)])
    torch.testing.assert_close(w, case["inv_freq_t"].double(), rtol=2e-5, atol=1e-9)
    grads = torch.autograd.grad((w * case["w"]).sum(), (up, down))
    for got, want in zip(grads, (case["dW_up"], case["dW_down"]), strict=True):
        mode.close(got, want, atol=2e-5 * want.abs().max().item())
    with torch.no_grad():
        for name in case.arrays:
            if name.startswith("cos_len"):
                n = int(name.removeprefix("cos_len"))
                # a frequency that is off by 1e-6 of itself turns by 1e-6 of the angle more
                for got, want in zip(r.materialize(torch.arange(n)), (case[name], case[name.replace("cos", "sin")]), strict=True):
                    mode.close(got[0, 0], want, atol=2e-6 + 1e-6 * n)
    fixed = rope.clex(up, down, L0, factor=3.0, precision=mode.precision, **how)
    torch.testing.assert_close(fixed.inv_freq, w[2], rtol=1e-5, atol=1e-9)


# ---------------------------------------------------------------------------------------------- Giraffe, HARPE, Ms-PoE, buckets


@golden("giraffe.randomized_*")
def _(case, mode):
    p = positions.giraffe_random(u=case["u"])
    # u is stored in float32 and the reference sums in it
    mode.close(p, case["positions"], atol=1e-5 * p.max().item())
    r = rope.default(case["dim"], case["base"], precision=mode.precision)
    c, s = r.materialize(case["positions"])
    mode.close(c[:, 0], case["cos"], atol=1e-5)
    mode.close(s[:, 0], case["sin"], atol=1e-5)


@golden("giraffe.*")
def _(case, mode):
    r = rope.giraffe(
        case["dim"], case["base"], scale=case.params.get("scale", 1.0), power=case.params.get("scale_power", 0.0),
        truncate=case.params.get("truncate"), precision=mode.precision,
    )  # fmt: skip
    mode.frequencies(r.inv_freq, case["inv_freq"])
    mode.tables(r, torch.arange(case["cos"].shape[0]), case["cos"], case["sin"])


@golden("harpe.*")
def _(case, mode):
    bases = case["bases"]
    torch.testing.assert_close(
        torch.tensor(rope.HARPE_BASES) / 1e6, torch.tensor(case["table2_full_millions"]), rtol=1e-6, atol=0
    )
    if case.name == "uniform":
        torch.testing.assert_close(rope.harpe_bases(4), bases, rtol=1e-14, atol=0)
    r = rope.harpe(case["head_dim"], bases)  # float64 from the paper's formulas: exact mode alone
    mode.frequencies(r.inv_freq, case["inv_freq"])
    p = case["position_ids"]
    for x, want in (("q", "q_rot"), ("k", "k_rot")):
        mode.close(fastpe.apply_rotary(case[x], r, p), case[want], atol=1e-10)
        mode.close(fastpe.apply_rotary(case[x].float(), r, p), case[want], atol=1e-6)


@golden("mspoe.paper_text_assignment")
def _(case, mode):
    for assignment, want in (("paper", "ratio_paper_text"), ("algorithm1", "ratio_paper_algorithm1")):
        got = rope.ms_poe_ratios(case["S"], case["r_min"], case["r_max"], assignment=assignment)
        mode.close(got, case[want], atol=1e-12)


@golden("mspoe.*")
def _(case, mode):
    q, k = case["q"], case["k"]
    share = rope.ms_poe_outliers(q, k)
    mode.close(share[0], case["S"], atol=1e-12)
    assignment = "normal" if case["head_type"] == "normal" else "code"
    ratios = rope.ms_poe_ratios(share[0], case["compress_ratio_min"], case["compress_ratio_max"], assignment=assignment)
    mode.close(ratios, case["ratio_q"], atol=1e-12)
    r = rope.ms_poe(case["head_dim"], ratios, case["base"], precision=mode.precision)
    p = case["position_ids"]
    qr, kr = fastpe.apply_rotary_pair(q, k, r, p, p)
    mode.close(qr, case["q_rot"], mode.phase(r, p), q.abs().max().item())
    mode.close(kr, case["k_rot"], mode.phase(r, p), k.abs().max().item())
    kr = kr.repeat_interleave(case["H"] // case["Hk"], 1)
    scores = qr @ kr.transpose(2, 3) / math.sqrt(case["head_dim"])
    n = q.shape[2]
    scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    mode.close(scores.softmax(-1), case["attn"], atol=5e-6)


@golden("attention_buckets.batched_bases")
def _(case, mode):
    assert list(rope.BUCKET_BASES) == case["bases"].tolist()
    r = rope.attention_buckets(case["head_dim"], case["bases"], precision=mode.precision)
    rows = r.inv_freq.shape[0]
    for x, want in (("q", "q_rot"), ("k", "k_rot")):
        y = fastpe.apply_rotary(case[x].expand(rows, -1, -1, -1), r, case["position_ids"])
        mode.close(y, case[want], mode.phase(r, case["position_ids"]), case[x].abs().max().item())
        each = fastpe.apply_rotary(case[x].expand(rows, -1, -1, -1), r, case["position_ids"].expand(rows, -1))
        torch.testing.assert_close(each, y, rtol=0, atol=0)


@golden("attention_buckets.logit_mixture")
def _(case, mode):
    logits = case["logits"]
    mode.close(rope.mix_buckets(logits), case["mixed"][0], atol=1e-6)
    # logits that are their row's maximum on a diagonal: the mixture is then the weights times the maxima
    peaks = logits.amax(1)
    mode.close(rope.mix_buckets(torch.diag(peaks)) / peaks, case["weight"], atol=1e-6)


@golden("attention_buckets.waveform_*")
def _(case, mode):
    m = torch.arange(case["word_low"], case["word_high"])
    wave = rope.attention_waveform(case["base"], m, case["d"])
    stored = case["waveform"]
    step = (len(m) + len(stored) - 1) // len(stored)
    mode.close(wave[::step], stored, atol=1e-4)
    for kind, sign in (("peaks", 1), ("troughs", -1)):
        at = case[kind] - case["word_low"]
        inside = at[(at > 0) & (at < len(m) - 1)]
        assert bool((sign * wave[inside] >= sign * wave[inside - 1] - 1e-6).all())
        assert bool((sign * wave[inside] >= sign * wave[inside + 1] - 1e-6).all())


@golden("base_bound.*")
def _(case, mode):
    mode.close(rope.cosine_sum(case["base"], case["m"], case["d"]), case["B"], atol=1e-9)
    assert rope.context_of_base(case["base"], case["d"], limit=int(case["scanned"])) == int(case["longest_L"])


@golden("entropy_abf.*")
def _(case, mode):
    r = rope.default(case["head_dim"], case["base"], precision=mode.precision)
    p = case["position_ids"]
    scale = torch.ones_like(p, dtype=torch.float32)
    if "q_scale" in case:
        scale = rope.entropy_abf_scale(p, case["c"])
        mode.close(scale, case["q_scale"], atol=1e-6)
    q, k = fastpe.apply_rotary_pair(case["q"], case["k"], r, p, p)
    size = case["q_rot"].abs().max().item()
    mode.close(q * scale[:, None, :, None], case["q_rot"], mode.phase(r, p), size)
    mode.close(k, case["k_rot"], mode.phase(r, p), size)


# ---------------------------------------------------------------------------------------------- position rules


@golden("pose.pose_*")
def _(case, mode):
    tokens, p = positions.pose(
        case["raw_length"], case["chunk"], case["target"], first=case["rt1"], second_end=case["rt2"], skip=case["skip"]
    )
    assert torch.equal(tokens, case["token_index"]) and torch.equal(p, case["positions"])
    mode.checked += 1


@golden("pose.randpos_*")
def _(case, mode):
    p = case["positions"]
    shuffled = p[torch.randperm(len(p), generator=torch.Generator().manual_seed(1))]
    assert torch.equal(positions.randomized(len(p), case["target"], sample=shuffled), p)
    mode.checked += 1


@golden("cream.*")
def _(case, mode):
    how = {"branch": case["branch"], "u": case["u"], "mu": case["mu"], "sigma": case["sigma"]}
    tokens, p = positions.cream(case["model_max"], case["factor"], case["tokens"], end=case["end_id"], **how)
    assert torch.equal(tokens, case["token_index"]) and torch.equal(p, case["positions"])
    for outside in (case["end_low"] - 1, case["end_high"] + 1):
        with pytest.raises(ValueError):
            positions.cream(case["model_max"], case["factor"], case["tokens"], end=outside, **how)
    if case.name.startswith("bigai"):
        assert case["mu"] == 1 + case["factor"]
    mode.checked += 1


@golden("randomized.*")
def _(case, mode):
    n = case["q"].shape[1]
    if "positions" in case:
        p = positions.randomized(n, case["L_max"], sample=case["positions"])
        assert torch.equal(p, case["positions"].long())
    else:
        p = positions.sequential(n)
    r = rope.default(case["q"].shape[3], case["max_time"], layout=case["layout"], precision=mode.precision)
    for x in "qk":
        if x in case:
            mode.rotated(r, case[x].transpose(1, 2), p, case[x + "_rot"].transpose(1, 2))


@golden("segmented.chunk_*")
def _(case, mode):
    p = positions.segmented(case["L_t"], case["L_e"], case["alpha"], starts=torch.tensor(case["starts"]))
    assert torch.equal(p, case["positions"])
    mode.checked += 1


@golden("segmented.prefix_*")
def _(case, mode):
    want = case["positions"]
    p, loss = positions.segmented_prefix(
        case["L_t"], case["L_e"], case["alpha"], start=case["i"], sample=want[want < case["i"]]
    )
    assert torch.equal(p, want) and torch.equal(loss, case["loss_mask"])
    mode.checked += 1


@golden("bipe.ids_*")
def _(case, mode):
    separators = torch.isin(case["token_ids"], torch.tensor(case["separators"]))
    intra, inter = positions.bipe(separators, case["train_scale"])
    assert torch.equal(intra, case["intra"]) and torch.equal(inter, case["inter"])
    mode.checked += 1


@golden("bipe.bipe_rope_qk")
def _(case, mode):
    r = rope.default(case["head_dim"], case["base"], layout=case["layout"], precision=mode.precision)
    for x in "qk":
        mode.rotated(r, case[x], case["inter"], case[x + "_rot"])


@golden("bipe.bipe_alibi_*")
def _(case, mode):
    slopes = 96 * fastpe.bias.alibi_slopes(case["num_heads"]).double()
    mode.close(slopes, case["slopes"], atol=1e-5)
    # the reference leaves out the part that is constant along a row: -slope (seg_i - seg_j) = slope seg_j + const
    mode.close(slopes[:, None] * case["inter"][:, None].double(), case["bias"], atol=1e-3)


@golden("v2pe.v2pe_*")
def _(case, mode):
    texts, tiles, strides = case["texts"], case["tiles"], case["strides"]
    kinds, stride = [], []
    for n, text in enumerate(texts):
        kinds += [False] * text
        stride += [1] * text
        if n < len(tiles):
            image = tiles[n] * case["num_image_token"]
            kinds += [False] + [True] * image + [False]
            stride += [1] + [strides[n]] * image + [1]
    p = positions.v2pe(torch.tensor(kinds), torch.tensor(stride), case["num_image_token"])
    # the reference keeps float32 positions
    mode.close(p[case["idx"]], case["positions"], atol=2e-3 if max(p) > 128 else 1e-6)


@golden("v2pe.fractional_rotation")
def _(case, mode):
    r = rope.default(case["head_dim"], case["base"], layout=case["layout"], precision=mode.precision)
    mode.rotated(r, case["q"], case["positions"], case["q_rot"])


@golden("v2pe.intern_2d_table")
def _(case, mode):
    r = rope.axial(case["dim"], 2, case["base"], order="alternate", layout="half", precision=mode.precision)
    h, w, d = case["cos"].shape
    mode.tables(r, positions.grid((h, w)), case["cos"].view(h * w, d), case["sin"].view(h * w, d))


# ---------------------------------------------------------------------------------------------- several axes


@golden("mrope.positions_qwen2vl")
def _(case, mode):
    grids = case["image_grid_thw"] + case["video_grid_thw"]
    p, delta = positions.mrope(case["token_type"][0], grids, case["spatial_merge_size"])
    assert torch.equal(p, case["position_ids"][:, 0]) and delta == int(case["delta"])
    mode.checked += 1


@golden("mrope.section", "mrope.interleaved", "mrope.ernie_hw_interleaved")
def _(case, mode):
    order = {"section": "sections", "interleaved": "interleaved"}.get(case.name, "ernie")
    sections = case.get("mrope_section") or case["mrope_section_h_w_t"]
    assert rope.mrope_axes(sections, order) == case["axis_of_pair"]
    r = rope.mrope(case["head_dim"], sections, case["base"], order=order, precision=mode.precision)
    assert r.layout == case["layout"]
    both(case, mode, r)


@golden("mrope.vision_axial_qwen2vl")
def _(case, mode):
    r = rope.axial(case["head_dim"], 2, case["base"], layout=case["layout"], precision=mode.precision)
    p = positions.grid(case["grid"])
    assert torch.equal(p, case["positions_hw"])
    for x in "qk":
        mode.rotated(r, case[x].transpose(0, 1)[None], p, case[x + "_rot"].transpose(0, 1)[None])


@golden("multidim.md_lrpe_*")
def _(case, mode):
    theta, x = case["theta"].requires_grad_(), case["x"].requires_grad_()
    shape = case["shape"]
    r = rope.lrpe(case["head_dim"], axes=len(shape), theta=theta, precision=mode.precision)
    p = positions.grid(shape, case["l"])
    y = fastpe.apply_rotary(x, r, p)
    size = case["dy"].abs().max().item() * 4
    mode.close(y, case["y"], mode.phase(r, p), x.abs().max().item())
    dx, dtheta = torch.autograd.grad(y, (x, theta), case["dy"])
    mode.close(dx, case["dx"], mode.phase(r, p), size)
    mode.close(dtheta, case["dtheta"], atol=2e-5 * case["dtheta"].abs().max().item())


@golden("multidim.lrpe_cosine_1d")
def _(case, mode):
    r = rope.lrpe(case["x"].shape[3], theta=case["theta"], precision=mode.precision)
    p = positions.sequential(case["x"].shape[1], case["offset"])
    mode.rotated(r, case["x"].transpose(1, 2), p, case["y"].transpose(1, 2))


@golden("multidim.lrpe_rotate_1d_perhead_theta")
def _(case, mode):
    theta, x = case["theta"].requires_grad_(), case["x"].requires_grad_()
    r = rope.lrpe(case["x"].shape[3], theta=theta, layout="half", precision=mode.precision)
    p = positions.sequential(x.shape[1], case["offset"])
    y = fastpe.apply_rotary(x.transpose(1, 2), r, p).transpose(1, 2)
    mode.close(y, case["y"], mode.phase(r, p), x.abs().max().item())
    dx, dtheta = torch.autograd.grad(y, (x, theta), case["dy"])
    mode.close(dx, case["dx"], mode.phase(r, p), case["dy"].abs().max().item())
    mode.close(dtheta, case["dtheta"], atol=2e-5 * case["dtheta"].abs().max().item())


@golden("multidim.ropevit_axial")
def _(case, mode):
    r = rope.axial(case["head_dim"], 2, case["base"], precision=mode.precision)
    p = positions.grid((case["end_y"], case["end_x"])).flip(0)  # (column, row)
    for x in "qk":
        mode.rotated(r, case[x], p, case[x + "_rot"])


@golden("multidim.ropevit_mixed_learnable")
def _(case, mode):
    freqs = case["freqs"].requires_grad_()
    r = rope.mixed(freqs, precision=mode.precision)
    p = positions.grid((case["end_y"], case["end_x"])).flip(0)
    mode.rotated(r, case["k"], p, case["k_rot"], phase=20.0)
    q = case["q"].requires_grad_()
    y = fastpe.apply_rotary(q, r, p)
    mode.close(y, case["q_rot"], 20.0, q.abs().max().item())
    dq, df = torch.autograd.grad(y, (q, freqs), case["dq_rot"])
    mode.close(dq, case["dq"], 20.0, case["dq_rot"].abs().max().item())
    mode.close(df, case["dfreqs"], atol=2e-5 * case["dfreqs"].abs().max().item())


@golden("multidim.ret_axial_*")
def _(case, mode):
    pixel = case["freqs_for"] == "pixel"
    shape = case["grid"]
    how = {"spectrum": "pixel", "max_freq": case["max_freq"]} if pixel else {"base": 10000.0}
    r = rope.axial(case["rotary_dim"], 2, precision=mode.precision, **how)
    p = positions.grid(shape)
    if pixel:
        p = torch.stack([torch.linspace(-1, 1, n, dtype=torch.float64)[p[a]] for a, n in enumerate(shape)])
    x, y = case["x"].flatten(1, 2)[:, None], case["y"].flatten(1, 2)[:, None]
    # pixel angles reach 100 radians at positions that are themselves rounded to float32
    mode.close(fastpe.apply_rotary(x, r, p), y, 220.0, x.abs().max().item(), atol=5e-5 if pixel else None)


@golden("learned_freq.learned")
def _(case, mode):
    freqs, p, q = case["freqs"].requires_grad_(), case["positions"].requires_grad_(), case["q"].requires_grad_()
    r = rope.learned(freqs, layout=case["layout"], precision=mode.precision)
    y = fastpe.apply_rotary(q, r, p)
    mode.close(y, case["q_rot"], mode.phase(r, p), q.abs().max().item())
    dq, df, dp = torch.autograd.grad(y, (q, freqs, p), case["dq_rot"])
    mode.close(dq, case["dq"], mode.phase(r, p), case["dq_rot"].abs().max().item())
    mode.close(df, case["dfreqs"], atol=2e-5 * case["dfreqs"].abs().max().item())
    mode.close(dp, case["dpositions"], atol=2e-5 * case["dpositions"].abs().max().item())


# ---------------------------------------------------------------------------------------------- xPos


@golden("xpos.torchscale_*")
def _(case, mode):
    n, offset = case["q"].shape[1], case["offset"]
    r = rope.xpos(case["head_dim"], case["base"], scale_base=case["scale_base"], center="ceil", layout=case["layout"],
                  precision=mode.precision)  # fmt: skip
    p = positions.sequential(n, offset)
    q, k = fastpe.apply_rotary_pair(case["q"][:, None], case["k"][:, None], r, p, p)
    mode.close(q[:, 0], case["q_rot"], mode.phase(r, p), case["q"].abs().max().item())
    mode.close(k[:, 0], case["k_rot"], mode.phase(r, p), case["k"].abs().max().item())


@golden("xpos.flash_attn_tables")
def _(case, mode):
    r = rope.xpos(case["head_dim"], case["base"], scale_base=case["scale_base"], precision=mode.precision)
    n = case["seqlen"]
    q_table, k_table = r.tables(None, None, n, n, 1, 1, 1)
    for table, side in ((q_table, "q"), (k_table, "k")):
        mode.close(table[0, 0, 0], case["cos_" + side], float(n))
        mode.close(table[1, 0, 0], case["sin_" + side], float(n))


@golden("xpos.rotary_embedding_torch")
def _(case, mode):
    r = rope.xpos(case["head_dim"], scale_base=case["scale_base"], layout=case["layout"], precision=mode.precision)
    q, k = fastpe.apply_rotary_pair(case["q"], case["k"], r)
    mode.close(q, case["q_rot"], 15.0, case["q"].abs().max().item())
    mode.close(k, case["k_rot"], 15.0, case["k"].abs().max().item())


# ---------------------------------------------------------------------------------------------- the rest


@golden("tulip.*")
def _(case, mode):
    d = case["q"].shape[3]
    if case["scaling_factor"]:
        r = rope.dynamic_ntk(d, case["scaling_factor"], case["old_len"], layout=case["layout"], precision=mode.precision)
        r = r.at_length(case["new_len"])
    else:
        r = rope.default(d, case["base"], layout=case["layout"], precision=mode.precision)
    torch.testing.assert_close(r.inv_freq, case["inv_freq"], rtol=1e-6, atol=0)
    for x in "qk":
        # one table of float64 frequencies, so both modes are held to the exact one's bound
        p = positions.sequential(case[x].shape[1])
        got = fastpe.apply_rotary(case[x].transpose(1, 2), r, p)
        size = case[x].abs().max().item()
        mode.close(got, case[x + "_rot"].transpose(1, 2), atol=2e-6 + 2.0**-23 * mode.phase(r, p) * size)


@golden("hirope.two_level_window")
def _(case, mode):
    r = rope.hirope(case["head_dim"], case["d_s"], case["base"])
    segments, W = case["segment_index"], case["L_window"]
    near, far_q, far_k = positions.hirope_regions(segments, W)
    assert torch.equal(positions.hirope(segments)[0], case["token_index"])
    n = len(segments)
    delta = torch.arange(n)[:, None] - torch.arange(n)
    for dtype, atol in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        q, k = case["q"][None].to(dtype), case["k"][None].to(dtype)
        qn, kn = fastpe.apply_rotary_pair(q, k, r, near, near)
        qf, kf = fastpe.apply_rotary_pair(q, k, r, far_q, far_k)
        scores = torch.where(delta < W, qn @ kn.transpose(2, 3), qf @ kf.transpose(2, 3)).tril()[0]
        mode.close(scores, case["scores"].tril(), atol=atol)


@golden("wrope.score_matrix")
def _(case, mode):
    b, W = case["relative_pos"], case["window"]
    for dtype, atol in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        q, k = case["q"][None].to(dtype), case["k"][None].to(dtype)
        n, d = q.shape[2:]
        r = rope.default(d)
        qn, kn = fastpe.apply_rotary_pair(q, k, r)
        far = fastpe.apply_rotary(q, r, torch.full((n,), b)) @ k.transpose(2, 3)
        delta = torch.arange(n)[:, None] - torch.arange(n)
        scores = torch.where(delta < W, qn @ kn.transpose(2, 3), far)[0]
        mode.close(scores.tril(), case["scores"].tril(), atol=atol)


@golden("wrope.decode_step")
def _(case, mode):
    r = rope.default(case["head_dim"], precision=mode.precision)
    q, k = case["q"], case["k_raw"]
    n, groups = k.shape[2], case["H"] // case["Hk"]
    wide = k.repeat_interleave(groups, 1)
    far = fastpe.apply_rotary(q, r, torch.tensor([case["relative_pos"]])) @ wide.transpose(2, 3)
    mode.close(far[0, :, 0] / math.sqrt(case["head_dim"]), case["approx_logits"], atol=2e-5)
    p = torch.arange(n)
    qr, kr = fastpe.apply_rotary_pair(q, k, r, p[-1:], p)
    scores = qr @ kr.repeat_interleave(groups, 1).transpose(2, 3) / math.sqrt(case["head_dim"])
    probabilities = scores.masked_fill(~case["selected"][None, :, None], -torch.inf).softmax(-1)
    mode.close(probabilities, case["attn"], atol=5e-6)
    out = probabilities @ case["v"].repeat_interleave(groups, 1)
    mode.close(out.transpose(1, 2).flatten(2), case["out"], atol=2e-5)


@golden("precision.base*")
def _(case, mode):
    r = rope.default(case["head_dim"], case["base"], precision=mode.precision)
    p = case["positions"]
    n = torch.ones(1, 1, len(p), case["head_dim"])
    n[..., r.pairs :] = 0
    turned = fastpe.apply_rotary(n, r, p)[0, 0]
    got = turned[:, : r.pairs], turned[:, r.pairs :]
    if mode.precision == "exact":
        torch.testing.assert_close(r.inv_freq, case["inv_freq64"], rtol=1e-14, atol=0)
        wide = fastpe.apply_rotary(n.double(), r, p)[0, 0]
        mode.close(wide[:, : r.pairs], case["cos64"], atol=1e-8)  # one rounding of a float64 angle of 4e6 radians
        mode.close(wide[:, r.pairs :], case["sin64"], atol=1e-8)
        mode.close(got[0], case["cos64"], atol=3e-7)
        mode.close(got[1], case["sin64"], atol=3e-7)
    else:
        mode.close(got[0], case["hf_cos32"], atol=2e-6)
        mode.close(got[1], case["hf_sin32"], atol=2e-6)
    bf16 = fastpe.apply_rotary(n.bfloat16(), rope.default(case["head_dim"], case["base"], precision="float32"), p)[0, 0]
    mode.close(bf16[:, : r.pairs].float(), case["hf_cos_bf16"], atol=2.0**-8)


@golden("precision.shift_invariance")
def _(case, mode):
    r = rope.default(case["head_dim"], case["base"])
    want = case["scores_exact"]
    for shift in case["shifts"]:
        for dtype, atol in ((torch.float64, 1e-8), (torch.float32, 1e-5)):
            q, k = case["q"].to(dtype), case["k"].to(dtype)
            rows = q.shape[0]
            q = fastpe.apply_rotary(q[None, None], r, torch.full((rows,), shift + case["distance"]))[0, 0]
            k = fastpe.apply_rotary(k[None, None], r, torch.full((rows,), shift))[0, 0]
            scores = (q.double() * k.double()).sum(-1)
            mode.close(scores, want, atol=atol * max(1.0, want.abs().max().item()))
