"""How each golden case is asked for through the public names, and which cannot be, and why."""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F

import fastpe
from fastpe import bias, mask, region

# Files whose method is not in fastpe yet.
LATER_FILES = {
    "chunk_anchor": "fastpe.mask.intervals",
    "chunk_ape": "fastpe.merge",
    "chunk_ccm": "fastpe.mask.segments",
    "chunk_cepe": "fastpe.merge",
    "chunk_extended_mind": "fastpe.region.key_set",
    "chunk_gali": "fastpe.positions.gali and logit noise",
    "chunk_hyper": "fastpe.mask.blocks and fastpe.merge",
    "chunk_keymass": "fastpe.attention_mass",
    "chunk_landmark": "fastpe.landmark_attention",
    "chunk_landmark_cache": "fastpe.landmark_attention",
    "chunk_loki": "fastpe.mask.blocks",
    "chunk_longheads": "fastpe.mask.blocks",
    "chunk_longllama": "fastpe.region.key_set",
    "chunk_memlong": "fastpe.region.key_set",
    "chunk_pcw": "fastpe.mask.intervals",
    "chunk_sentinel": "fastpe.mask.segments",
    "chunk_squeezed": "fastpe.mask.blocks",
    "chunk_structured_prompting": "fastpe.mask.intervals",
    "chunk_superposition": "fastpe.mask.intervals",
    "chunk_wrope": "fastpe.region.wrope",
}

# Files of functions other than fastpe.attention: test_golden_parts.py.
OTHER_FILES = {"chunk_lse_merge"}

# Files whose definition runs and whose kernels do not yet.
NO_KERNEL = {f"chunk_{stem}" for stem in ("dca", "rerope", "selfextend", "selfextend_bidir", "streaming", "string")}

# Cases of supported files that the public names cannot express.
NOT_RUN = {
}

# Cases that hold results only; their inputs are those of another case.
BASES = {
    **{("chunk_selfextend", f"{case}_{kind}"): case for case in ("a", "b", "c", "short") for kind in ("floor", "decode")},
    **{("chunk_dca", f"{case}_vllm"): case for case in ("a", "b")},
}

# Results that nothing public holds, or that differ on purpose.
_DETACHED = "the release detaches the weights of its merge; the gradient here is that of the formula"
NOT_COMPARED = {
    **{("chunk_dca", case, f"d{x}_detached"): _DETACHED for case in ("a", "b", "bigwin", "short") for x in "qkv"},
    ("chunk_dca", "b", "out_decode_last"): "the release keeps cached keys with the mscale of the step that wrote them",
    **{("chunk_string", case, "out_code_prefill"): "the released prefill counts the key at distance `shift` twice" for case in "ab"},
    ("bias_t5", "encoder", "d_per_distance"): "of the expanded table, which the object makes",
    ("bias_t5", "decoder", "d_per_distance"): "of the expanded table, which the object makes",
    ("bias_t5", "encoder_temperature", "d_per_distance"): "of the expanded table, which the object makes",
    ("bias_t5", "encoder_padded", "d_per_distance"): "of the expanded table, which the object makes",
    ("bias_fox", "left_padded", "d_log_lambda"): "of the sum of the zeroed gates, which the object makes",
}


def _causal(a, **kwargs):
    return kwargs | {"is_causal": True}


def _alibi(a, leaf, **more):
    return _causal(a, bias=bias.Alibi(leaf("slopes")), **more)


def _random_distance(a, leaf, of_distance):
    slopes = leaf("slopes")
    return {"bias": bias.RelativeTable(lambda d: -slopes[:, None] * of_distance(d).to(slopes.dtype))}


def _t5(bidirectional, max_distance, causal, factor=1.0):
    def call(a, leaf, watch):
        b = bias.T5(leaf("table"), bidirectional, max_distance, factor)
        kwargs = {"bias": b, "is_causal": causal}
        if "temperature" in a:
            kwargs["temperature"] = float(a["temperature"])
        return kwargs

    return call


def _t5_padded(a, leaf, watch):
    return {"bias": bias.T5(leaf("table"), True, 24), "mask": mask.padding(a["mask"].any(0))}


def _sandwich(a, leaf, watch):
    heads = a["q"].shape[1]
    # The small set keeps the first of the 8 heads.
    factors = 8 if heads == 8 else 1 / torch.arange(1, heads + 1, dtype=torch.float64)
    return {"bias": bias.Sandwich(factors, dim=int(a["d_bar"])), "is_causal": True}


def _prefix(watch, terms, name="prefix"):
    c = fastpe.prefix_sum(terms)
    watch(name, c.local)
    return c


def _cable(increment, kind):
    def call(a, leaf, watch):
        c = _prefix(watch, -increment(leaf("h")))
        g = watch("g", F.softplus(leaf("hs"))) if "hs" in a else None
        padded = mask.padding(a["mask"].any(0)) if kind.endswith("padded") else None
        bidirectional = "bidirectional" in kind
        b = bias.KernelCable(c, g) if kind.startswith("kernel") else bias.Cable(c, g, bidirectional)
        return {"bias": b, "is_causal": not bidirectional, "mask": padded}

    return call


def _fox(a, leaf, watch):
    gates = watch("log_fgate", F.logsigmoid(leaf("fgate_logit")))
    kwargs = {"is_causal": True}
    if "seq_start" in a:
        start = a["seq_start"]
        kwargs["mask"] = mask.padding(torch.arange(gates.shape[-1]) >= start[:, None])
        b = bias.Forget(gates, start)
    else:
        b = bias.Forget(_prefix(watch, gates, "log_lambda"))
    return kwargs | {"bias": b}


def _fox_both_sides(a, leaf, watch):
    gates = watch("log_fgate", F.logsigmoid(leaf("fgate_logit")))
    past, future = gates.chunk(2, dim=1)
    return {"bias": bias.Forget(past, future_log_gates=future)}


def _swa(a, leaf, watch):
    rope = fastpe.Rope(a["inv_freq"])
    kwargs = {"rope": rope, "positions": a["positions"], "is_causal": True}
    window, sinks = a["window"], a["sinks"]
    kwargs["mask"] = mask.window(window) & mask.sinks(sinks)
    if len(a["cu_seqlens"]) > 2:
        kwargs["mask"] &= mask.documents(cu_seqlens=a["cu_seqlens"])
    return kwargs


def _head_scale(a, leaf, watch):
    return _causal(a, head_scale=leaf("head_scale"))


def _scored_alibi(a, leaf, watch):
    kwargs = _alibi(a, leaf)
    if "head_scale" in a:
        kwargs |= {"head_scale": leaf("head_scale"), "row_scale": a["row_scale"]}
    if "softcap" in a:
        kwargs["softcap"] = float(a["softcap"])
    if "window" in a:
        kwargs |= {"mask": mask.window(int(a["window"])), "sink": leaf("sink")}
    return kwargs


def _cope(**options):
    def call(a, leaf, watch):
        table = leaf("pos_emb_PD").t() if "pos_emb_PD" in a else leaf("pos_emb")
        gate_keys = leaf("k_gate") if "k_gate" in a else None
        return _causal(a, bias=bias.Cope(table, gate_keys, **options))

    return call


def _dense(a, leaf, watch):
    return {"bias": bias.Dense(leaf("bias"))}


def _qrel(make):
    """A bias made from query and key: make(a, leaf) -> bias(q, k)."""

    def call(a, leaf, watch):
        of = make(a, leaf)
        causal = "mask" in a

        def run(attention, q, k, v, **kwargs):
            return attention(q, k, v, bias=of(q, k), is_causal=causal, return_lse=True, **kwargs)

        return {"run": run}

    return call


def _shaw(with_key):
    def make(a, leaf):
        table = leaf("table")
        return lambda q, k: bias.relative_key(q, table, key=k if with_key else None)

    return make


def _transformer_xl(a, leaf):
    r, u, v = leaf("r"), leaf("u"), leaf("v_bias")
    return lambda q, k: bias.transformer_xl(q, k, r, u, v)


def _deberta(a, leaf):
    k_rel, q_rel = leaf("k_rel"), leaf("q_rel")
    return lambda q, k: bias.deberta(q, k, k_rel, q_rel, buckets=8, max_distance=64)


def _ram(a, leaf):
    table = leaf("table")
    n = table.shape[0]
    return lambda q, k: bias.RowTable(
        q.shape[-1] ** -0.5 * q.to(table.dtype) @ table.T, lambda d: torch.where((d >= 0) & (d < n), d, -1)
    )


def _fire(a, leaf, watch):
    network = (leaf(name) for name in ("w1", "b1", "w2", "b2"))
    positions = a["positions"].long() if "positions" in a else None
    threshold = leaf("L_mult") * float(a["init_L"])
    return {
        "bias": bias.Fire(*network, leaf("c"), threshold, float(a["eps"]), positions),
        "is_causal": "mask" in a,
    }


def _dape(a, leaf, watch):
    """S = x + a + MLP([x; a]) over the heads of both: made outside, given as a dense bias."""
    w1, b1, w2, b2 = (leaf(name) for name in ("w1", "b1", "w2", "b2"))
    alibi, scale = a["bias"], float(a["scale"])

    def run(attention, q, k, v, **kwargs):
        x = scale * (q.to(w1.dtype) @ k.to(w1.dtype).transpose(-1, -2))
        both = torch.cat([x, alibi], 1).movedim(1, -1)
        added = F.leaky_relu(both @ w1.T + b1, 0.01) @ w2.T + b2
        return attention(q, k, v, bias=bias.Dense(alibi + added.movedim(-1, 1)), is_causal=True, return_lse=True, **kwargs)

    return {"run": run}


def _rope(a):
    return fastpe.Rope(a["inv_freq"])


def _last_row(name, make):
    """The call make(a) describes, and its last row alone as result `name`: decoding finds what prefill did."""

    def call(a, leaf, watch):
        kwargs = make(a)

        def run(attention, q, k, v, **more):
            out, lse = attention(q, k, v, return_lse=True, **kwargs, **more)
            with torch.no_grad():
                return {"out": out, "lse": lse, name: attention(q[:, :, -1:], k, v, **kwargs, **more)}

        return {"run": run, "region": kwargs["region"]}

    return call


def _self_extend(a, shift):
    base = a["scale_base"]
    r = region.self_extend(a["neighbor_window"], a["group_size"], shift=shift, scale_base=base if base > 0 else None)
    return _causal(a, rope=_rope(a), region=r)


def _self_extend_decode(a, leaf, watch):
    def run(attention, q, k, v, **more):
        q, k, v = q[:1, :, -1:], k[:1], v[:1]
        return {f"out_{shift}": attention(q, k, v, **_self_extend(a, shift), **more) for shift in ("true", "floor")}

    return {"run": run}


def _self_extend_bidirectional(a, leaf, watch):
    r = region.self_extend_bidirectional(
        a["neighbor_window"], a["group_size"], original_length=a["original_length"], plain_below=0
    )
    return {"rope": _rope(a), "region": r, "mask": mask.padding(a["key_visible"])}


def _rerope(a):
    w, n = a["window"], a["training_length"]
    leaky = a.get("leaky_scaling_factor")
    r = region.leaky_rerope(w, leaky, n) if leaky else region.rerope(w, n)
    return _causal(a, rope=_rope(a), region=r)


def _dca(a, mscale="hf"):
    r = region.dual_chunk(
        a["chunk_size"], a["local_window"], original_length=a["original_max_position_embeddings"], mscale=mscale
    )
    return _causal(a, rope=_rope(a), region=r)


def _dca_serving(a, leaf, watch):
    def run(attention, q, k, v, **more):
        out, lse = attention(q[:, :, -a["out"].shape[2] :], k, v, return_lse=True, **_dca(a, "serving"), **more)
        return {"out": out, "lse": lse}

    return {"run": run}


def _string(a):
    return _causal(a, rope=_rope(a), region=region.string(a["shift_S"], a["window_W"], a["attention_factor"]))


def _streaming(a, leaf, watch):
    start, recent = a["start_size"], a["recent_size"]
    return {"rope": _rope(a), "region": region.streaming(start, recent), "mask": mask.streaming(start, recent)}


# (file, case) -> call(a, leaf, watch) -> the arguments of fastpe.attention beyond q, k, v and scale, or {"run": ...}:
# run(attention, q, k, v, **rest) -> (out, lse), or results by their names in the file.
# `a` holds the arrays, leaf(name) is array `name` as an input that requires grad, watch(name, x) compares x's gradient.
CALLS = {
    ("bias_alibi", "causal_pow2"): lambda a, leaf, watch: _alibi(a, leaf),
    ("bias_alibi", "causal_nonpow2_gqa_offset"): lambda a, leaf, watch: _alibi(a, leaf),
    ("bias_alibi", "flash_noncausal_batch_slopes"): lambda a, leaf, watch: {"bias": bias.Alibi(leaf("slopes"))},
    ("bias_alibi", "flash_causal_shortcut"): lambda a, leaf, watch: _causal(a, bias=bias.Alibi(leaf("slopes"), row_term=False)),
    ("bias_alibi", "custom_positions_causal"): lambda a, leaf, watch: _causal(
        a, bias=bias.Alibi(leaf("slopes"), positions=leaf("pos"))
    ),
    ("bias_alibi", "asymmetric_bidirectional"): lambda a, leaf, watch: {
        "bias": bias.Alibi(leaf("slope_past"), leaf("slope_future"))
    },
    ("bias_alibi", "packed_causal"): lambda a, leaf, watch: _alibi(
        a, leaf, mask=mask.documents(cu_seqlens=a["cu_seqlens"])
    ),
    ("bias_alibi", "randpe_bidirectional"): lambda a, leaf, watch: _random_distance(
        a, leaf, lambda d: d.abs() - 0.5 * (d > 0)
    ),
    ("bias_alibi", "randpe_randomised"): lambda a, leaf, watch: _random_distance(
        a, leaf, lambda d: a["distance_map"][d.abs()] - 0.5 * (d > 0)
    ),
    ("bias_bipe_alibi", "causal"): lambda a, leaf, watch: _causal(
        a, bias=bias.bipe_alibi(leaf("slopes"), a["segment_pos"], factor=1.0)
    ),
    ("bias_kerple", "log"): lambda a, leaf, watch: _causal(a, bias=bias.Kerple(leaf("bias_p"), leaf("bias_a"))),
    ("bias_kerple", "power"): lambda a, leaf, watch: _causal(
        a, bias=bias.Kerple(leaf("bias_p"), leaf("bias_a"), "power")
    ),
    ("bias_kerple", "power_weighted"): lambda a, leaf, watch: _causal(
        a, bias=bias.Kerple(leaf("bias_p"), leaf("bias_a"), "power", leaf("wei_p"), leaf("wei_a"))
    ),
    ("bias_t5", "encoder"): _t5(True, 32, False),
    ("bias_t5", "decoder"): _t5(False, 48, True),
    ("bias_t5", "encoder_temperature"): _t5(True, 32, False),
    ("bias_t5", "encoder_padded"): _t5_padded,
    ("bias_t5", "neox_causal_scaled_table"): _t5(False, 128, True, math.sqrt(16)),
    ("bias_sandwich", "causal"): _sandwich,
    ("bias_cable", "v1_repo_scale1"): _cable(F.softplus, "v1"),
    ("bias_cable", "v3_weighted"): _cable(torch.relu, "v3"),
    ("bias_cable", "v3_weighted_bidirectional"): _cable(torch.relu, "bidirectional"),
    ("bias_cable", "v3_weighted_bidirectional_padded"): _cable(torch.relu, "bidirectional_padded"),
    ("bias_cable", "kernel_softplus"): _cable(F.softplus, "kernel"),
    ("bias_cable", "kernel_weighted"): _cable(torch.relu, "kernel"),
    ("bias_cable", "kernel_weighted_bidirectional"): _cable(torch.relu, "kernel_bidirectional"),
    ("bias_cable", "nw_softplus_gqa_offset"): _cable(F.softplus, "v1"),
    ("bias_fox", "causal"): _fox,
    ("bias_fox", "offset"): _fox,
    ("bias_fox", "left_padded"): _fox,
    ("bias_fox", "strong_decay"): _fox,
    ("bias_fox", "xt_causal"): _fox,
    ("bias_fox", "xt_bidirectional"): _fox_both_sides,
    ("bias_fox", "per_row_contextual"): lambda a, leaf, watch: _causal(
        a, bias=bias.PerRowForget(leaf("gate_q"), leaf("gate_k"), gate_scale=float(a["gate_scale"]))
    ),
    ("bias_cope", "default"): _cope(),
    ("bias_cope", "nodiv"): _cope(nodiv=True),
    ("bias_cope", "full_npos"): _cope(),
    ("bias_cope", "sep_key"): _cope(),
    ("bias_cope", "val_gates"): _cope(value_gates=True),
    ("bias_cope", "sharp_gates"): _cope(),
    ("bias_cope", "xt_listing"): _cope(nodiv=True),
    ("bias_score_mods", "head_scale"): _head_scale,
    ("bias_score_mods", "uniform_scale"): lambda a, leaf, watch: _causal(a),
    ("bias_score_mods", "log_n_scale"): lambda a, leaf, watch: _causal(a, row_scale=a["row_scale"]),
    ("bias_score_mods", "head_row_scale_with_alibi"): _scored_alibi,
    ("bias_score_mods", "softcap"): lambda a, leaf, watch: _causal(a, softcap=float(a["softcap"])),
    ("bias_score_mods", "softcap_then_alibi"): _scored_alibi,
    ("bias_score_mods", "alibi_then_softcap"): lambda a, leaf, watch: _scored_alibi(a, leaf, watch)
    | {"softcap_includes_bias": True},
    ("bias_qrel", "relative_key"): _qrel(_shaw(False)),
    ("bias_qrel", "relative_key_query"): _qrel(_shaw(True)),
    ("bias_qrel", "transformer_xl"): _qrel(_transformer_xl),
    ("bias_qrel", "deberta_v2"): _qrel(_deberta),
    ("bias_qrel", "ram_relative"): _qrel(_ram),
    ("bias_relproj", "causal"): lambda a, leaf, watch: _causal(
        a, bias=bias.distance_bank(leaf("row_weights"), leaf("distance_bank"))
    ),
    **{
        ("bias_fire", case): _fire
        for case in ("causal_L512", "causal_small_L", "bidirectional_small_L", "random_positions", "dape_flavour")
    },
    ("bias_dense", "full"): _dense,
    ("bias_dense", "head_broadcast_batch"): _dense,
    ("bias_dense", "batch_broadcast_head"): _dense,
    ("bias_dense", "key_only"): _dense,
    ("bias_dape", "alibi_dape_v1"): _dape,
    ("chunk_context_pruning", "alpha15"): lambda a, leaf, watch: _causal(a, **_dense(a, leaf, watch)),
    ("chunk_context_pruning", "alpha2"): lambda a, leaf, watch: _causal(a, **_dense(a, leaf, watch)),
    ("chunk_context_pruning", "sigmoid"): lambda a, leaf, watch: _causal(a, **_dense(a, leaf, watch)),
    ("bias_score_mods", "sink"): lambda a, leaf, watch: _causal(a, sink=leaf("sink")),
    ("bias_score_mods", "sink_with_prefix_bias"): lambda a, leaf, watch: _causal(
        a, bias=bias.Cable(_prefix(watch, F.logsigmoid(leaf("h") + 2))), sink=leaf("sink")
    ),
    ("bias_score_mods", "window_sink_alibi"): _scored_alibi,
    ("chunk_swa", "window"): _swa,
    ("chunk_swa", "sinks"): _swa,
    ("chunk_swa", "packed"): _swa,
    **{("chunk_selfextend", case): lambda a, leaf, watch: _self_extend(a, "true") for case in ("a", "b", "c", "short")},
    **{("chunk_selfextend", f"{case}_floor"): lambda a, leaf, watch: _self_extend(a, "floor") for case in ("a", "b", "short")},
    **{("chunk_selfextend", f"{case}_decode"): _self_extend_decode for case in ("a", "b", "c", "short")},
    **{("chunk_selfextend_bidir", case): _self_extend_bidirectional for case in "ab"},
    **{("chunk_rerope", case): _last_row("out_decode_last", _rerope) for case in ("rerope", "leaky", "rerope_odd")},
    **{("chunk_dca", case): _last_row("out_decode_last", _dca) for case in ("a", "b", "bigwin", "short")},
    **{("chunk_dca", f"{case}_vllm"): _dca_serving for case in "ab"},
    **{("chunk_string", case): _last_row("out_code_decode_last", _string) for case in "ab"},
    **{("chunk_streaming", case): _streaming for case in "ab"},
}


def _slopes(a):
    for name, want in a.items():
        got = bias.alibi_slopes(int(name[1:]))
        torch.testing.assert_close(got.double(), want, rtol=1e-7, atol=0)


def _buckets(kind, buckets, distance):
    def check(a):
        got = bias.t5_bucket(
            a["rel_key_minus_query"], bidirectional=kind == "bi", num_buckets=buckets, max_distance=distance
        )
        assert torch.equal(got, a["bucket"])

    return check


# Cases that are tables and no attention.
TABLES = {("bias_alibi", "slopes"): _slopes}
for _name in ("bi_32_128", "bi_64_512", "bi_16_64", "uni_32_128", "uni_64_512", "uni_16_64"):
    _kind, _buckets_, _distance = re.fullmatch(r"(\w+?)_(\d+)_(\d+)", _name).groups()
    TABLES["bias_t5", f"bucket_{_name}"] = _buckets(_kind, int(_buckets_), int(_distance))
