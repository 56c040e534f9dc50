"""How each golden case is asked for through the public names, and which cannot be, and why."""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F

import fastpe
from fastpe import bias, mask, positions, recipes, region

# Files whose method is not in fastpe yet.
LATER_FILES: dict[str, str] = {}

# Files of functions other than fastpe.attention: test_golden_parts.py.
OTHER_FILES = {"chunk_keymass", "chunk_landmark", "chunk_landmark_cache", "chunk_lse_merge"}

# Cases of supported files that the public names cannot express.
NOT_RUN = {
}

# Cases that hold results only; their inputs are those of another case.
BASES = {
    **{("chunk_selfextend", f"{case}_{kind}"): case for case in ("a", "b", "c", "short") for kind in ("floor", "decode")},
    **{("chunk_dca", f"{case}_vllm"): case for case in ("a", "b")},
}

# What the original computed less exactly than float64; errors allowed of the largest entry.
COARSE = {
    ("chunk_ccm", "merge"): (1e-7, "averages in float32"),
    ("chunk_context_pruning", "alpha15"): (1e-7, "solves for the chances by a few iterations"),
    ("chunk_context_pruning", "alpha2"): (1e-7, "solves for the chances by a few iterations"),
    ("chunk_gali", "noise"): (1e-7, "scales the noise in float32"),
    ("chunk_squeezed", "a"): (1e-7, "scores clusters in float32"),
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


def _at(a, what="positions"):
    p = a[what]
    return {"rope": _rope(a), "positions": p, "key_positions": p}


def _anchor(a, leaf, watch):
    ids = a["document"]
    own = mask.documents(ids=ids) & mask.causal()
    return {**_at(a), "mask": mask.anchor(ids) if (ids == 0).sum() == 1 else own}


def _sentinel(a, leaf, watch):
    opens, closes = a["tokens"] == 1, a["tokens"] == 2
    assert torch.equal(positions.sentinel(opens, closes), a["positions"])
    return {**_at(a), "mask": mask.sentinel(opens, closes)}


def _ccm(kind):
    def call(a, leaf, watch):
        marks, sums = a["tokens"] // 100 == 1, a["tokens"] // 100 == 2
        assert torch.equal(positions.compressed(marks.long() + 2 * sums.long()), a["positions"])
        if kind != "merge":
            return {**_at(a), "mask": mask.compressed(marks, kind)}

        def run(attention, q, k, v, **more):
            q, k = (fastpe.apply_rotary(x, _rope(a), a["positions"]) for x in (q, k))
            k, v = recipes.ccm_merge(k, v, marks, sums)
            return attention(q, k, v, mask=mask.compressed(marks, kind, sums), return_lse=True, **more)

        return {"run": run, "mask": mask.compressed(marks, kind, sums if kind == "merge" else None)}

    return call


def _recipe(make, made_region=None):
    """make(a, leaf, watch) -> (q, k, v) -> results; recipes call whichever attention is being tested."""

    def call(a, leaf, watch):
        of = make(a, leaf, watch)

        def run(q, k, v):
            made = of(q, k, v)
            return made if isinstance(made, (dict, tuple)) else {"out": made}

        return {"run": run, "recipe": True, "region": made_region(a) if made_region else None}

    return call


def _pcw(lengths):
    def make(a, leaf, watch):
        n = a["q"].shape[2]
        longest = sorted(lengths, reverse=True)[0]
        others = [x for x in lengths if x != longest]
        assert torch.equal(positions.parallel(1, [x - 1 for x in (longest, *others)], n), a["positions"])
        return lambda q, k, v: recipes.pcw(q, k, v, lengths, rope=_rope(a), return_lse=True)

    return make


def _ape(prefix, lengths):
    def make(a, leaf, watch):
        assert torch.equal(positions.parallel(prefix, lengths, a["q"].shape[2]), a["positions"])
        settings = {"temperature": a["temperature"], "scale": float(a["scale"])}
        return lambda q, k, v: recipes.ape(q, k, v, prefix, lengths, rope=_rope(a), **settings)

    return make


def _structured_prompting(a, leaf, watch):
    groups, length = a["M"], a["group_len"]
    return lambda q, k, v: recipes.structured_prompting(
        q, k, v, groups, length, slopes=a["alibi_slopes"], return_lse=True
    )


def _superposition(preamble, contexts, query, scores, temperature, kind="equilibrium", top_k=None):
    def make(a, leaf, watch):
        weights = recipes.branch_log_weights(torch.tensor(scores, dtype=torch.float64), temperature, top_k)
        torch.testing.assert_close(weights, a["branch_log_weight"].double(), rtol=1e-6, atol=0)
        p = positions.superposition(preamble, contexts, query, a["q"].shape[2], kind)
        torch.testing.assert_close(p, a["positions_f64"].double(), rtol=1e-6, atol=0)
        return lambda q, k, v: recipes.superposition(
            q, k, v, preamble, contexts, query, rope=_rope(a), log_weights=weights, kind=kind, return_lse=True
        )

    return make


def _gali(chunk, draws=0):
    def make(a, leaf, watch):
        for name in (x for x in a if x.startswith("positions_")):
            n = a[name].numel()
            torch.testing.assert_close(positions.gali(n, a["L_train"], a["local_window"]), a[name].double(), rtol=1e-6, atol=0)
        settings = {"train_length": a["L_train"], "local_window": a["local_window"], "chunk": chunk}
        if draws:
            settings |= {"noise": a["std_base"], "draws": [a[f"noise_{n + 1}"] for n in range(draws)]}
        return lambda q, k, v: recipes.gali(q, k, v, rope=_rope(a), **settings)

    return make


def _memory(method, **settings):
    def make(a, leaf, watch):
        m = leaf("mem_k", main=True), leaf("mem_v", main=True)
        more = dict(settings)
        if "mem_visible" in a:
            more["memory_visible"] = a["mem_visible"]
        if "gate" in a:
            more["gate"] = torch.sigmoid(leaf("gate"))[..., 0, 0]
        return lambda q, k, v: method(q, k, v, *m, rope=_rope(a), return_lse=True, **more)

    return make


def _extended_mind(kind):
    def make(a, leaf, watch):
        m = leaf("mem_k", main=True), leaf("mem_v", main=True)
        settings = {"k": a["topk"]}
        if kind != "llama":
            settings["threshold"] = a["sim_threshold"]
        if kind == "mpt":
            settings |= {"slopes": bias.alibi_slopes(a["q"].shape[1]).double()}
        else:
            settings["rope"] = _rope(a)
        return lambda q, k, v: recipes.extended_mind(q, k, v, *m, return_lse=True, **settings)

    return make


def _cepe(a, leaf, watch):
    return lambda q, k, v: recipes.cepe(q, k, v, a["key_visible"], return_lse=True)


def _context_pruning(alpha):
    def make(a, leaf, watch):
        gates = leaf("q_int"), leaf("k_int"), leaf("beta")

        def run(q, k, v):
            b = watch("bias", recipes.context_pruning_bias(*gates, alpha))
            return recipes.attention(q, k, v, bias=bias.Dense(b), is_causal=True, return_lse=True)

        return run

    return make


def _wrope(a, leaf, watch):
    settings = {"window": a["window_w"], "far": a["far_position_b"]}
    of_decode = settings | {"sinks": a["sinks"], "share": a["topk_fraction"]}
    rope = _rope(a)

    def run(q, k, v):
        out, lse = recipes.attention(q, k, v, rope=rope, region=region.wrope(**settings), is_causal=True, return_lse=True)
        with torch.no_grad():
            last, book = q[:, :, -1:], a["codebook"]
            chosen = recipes.a2ats_select(last, recipes.codebook_ids(k, book), book, rope=rope, **of_decode)
            step = recipes.a2ats(last, k, v, book, rope=rope, **of_decode)
        # The original's window excludes the key at distance w.
        selected = chosen.repeat_interleave(q.shape[1] // k.shape[1], 1)[0]
        return {"out": out, "lse": lse, "out_decode": step, "selected": selected}

    return run


def _longheads(a, leaf, watch):
    chunk, length = a["window_size"], a["atten_length"]
    rope = _rope(a)

    def run(q, k, v):
        summary = recipes.longheads_chunk_keys(q, k, v, rope=rope, chunk=chunk)
        kwargs = {"rope": rope, "chunk_keys": summary, "chunk": chunk, "length": length, "begin": a["begin_selective_length"]}
        row = torch.arange(length, q.shape[2])
        selected = recipes.longheads_select(q[:, :, length:], summary, row, chunk, length // chunk)
        later = [x.to(q.dtype) for x in (a["q_decode"], a["k_decode"], a["v_decode"])]
        whole = torch.cat((k, later[1]), 2), torch.cat((v, later[2]), 2)
        return {
            "out": recipes.longheads(q, k, v, include_self=False, **kwargs),
            "out_decode": recipes.longheads(later[0], *whole, **kwargs),
            "selected": torch.nn.functional.pad(selected[0], (0, 0, length, 0), value=-1),
            "chunk_keys": summary,
        }

    return run


def _loki(a, leaf, watch):
    r, k_ = a["top_r"], a["top_k"]

    def run(q, k, v):
        index, allowed = recipes.loki_select(q, k, a["pca"], r, k_)
        out, lse = recipes.loki(q, k, v, a["pca"], r=r, k=k_, return_lse=True)
        n = q.shape[2]
        seen = torch.zeros(1, q.shape[1], n, n, dtype=torch.bool).scatter(-1, index, allowed)
        # Where a row sees fewer keys than it may choose the original marks hidden ones too.
        return {"out": out, "lse": lse, "selected": seen | (a["selected"] & ~torch.ones(n, n, dtype=torch.bool).tril())}

    return run


def _squeezed(a, leaf, watch):
    def run(q, k, v):
        fixed = a["k_fixed"].to(q.dtype), a["v_fixed"].to(q.dtype)
        labels, clusters = a["labels"], a["centroids"].shape[2]
        means, counts = recipes.cluster_centroids(fixed[0][:, :, : labels.shape[2]], labels, clusters)
        assert torch.equal(counts, a["keys_per_cluster"])
        made = {"centroids": means}
        for name, some in (("", slice(None)), ("single_", slice(-1, None))):
            made[f"{name}score"] = recipes.cluster_scores(q[:, :, some], means, counts)
            made[f"{name}keep"] = recipes.squeezed_keep(q[:, :, some], means, counts, labels, a["threshold"], 160)
        made["out"], made["lse"] = recipes.squeezed(q, k, v, *fixed, labels, means, counts, a["threshold"], return_lse=True)
        made["single_out"] = recipes.squeezed(q[:, :, -1:], k, v, *fixed, labels, means, counts, a["threshold"])
        return made

    return run


def _hyper(causal, draws):
    def make(a, leaf, watch):
        settings = {"block": a["block_size"], "samples": a["sample_size"], "min_length": a["min_seq_len"], "causal": causal}
        settings |= {"directions": a["proj_dir"][0, 0], "draws": [a[f"sampled_{n}"] for n in range(draws)]}

        def run(q, k, v):
            out, lse = recipes.hyper(q, k, v, return_lse=True, **settings)
            exact, exact_lse = recipes.attention(q, k, v, is_causal=causal, return_lse=True)
            return {"out": out, "lse": lse, "exact_out": exact, "exact_lse": exact_lse}

        return run

    return make


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
    **{("chunk_anchor", case): _anchor for case in ("flex", "flash", "intra", "interleaved")},
    **{("chunk_sentinel", case): _sentinel for case in "ab"},
    **{("chunk_ccm", case): _ccm(case) for case in ("concat", "concat_recur", "recur", "merge")},
    ("chunk_pcw", "a"): _recipe(_pcw([17, 23, 20])),
    ("chunk_pcw", "b"): _recipe(_pcw([30, 12])),
    ("chunk_ape", "a"): _recipe(_ape(6, [15, 22, 9])),
    ("chunk_ape", "b"): _recipe(_ape(3, [20, 20])),
    ("chunk_ape", "t1"): _recipe(_ape(2, [10, 14])),
    **{("chunk_structured_prompting", case): _recipe(_structured_prompting) for case in "ab"},
    ("chunk_superposition", "eq"): _recipe(_superposition(5, [9, 14, 11], 6, [-2.0, -1.5, -2.2], 0.5)),
    ("chunk_superposition", "max"): _recipe(_superposition(4, [12, 7], 5, [-1.0, -1.1], 0.1, "max")),
    ("chunk_superposition", "topk"): _recipe(_superposition(3, [8, 10, 6, 9], 4, [-2.0, -1.5, -2.2, -1.7], 0.5, top_k=2)),
    ("chunk_gali", "a"): _recipe(_gali(30)),
    ("chunk_gali", "noise"): _recipe(_gali(20, draws=3)),
    **{("chunk_longllama", case): _recipe(_memory(recipes.longllama)) for case in ("a", "pad")},
    **{("chunk_memlong", case): _recipe(_memory(recipes.memlong)) for case in ("zero", "gate")},
    ("chunk_memlong", "cont"): _recipe(_memory(recipes.memlong, kind="continual")),
    **{("chunk_extended_mind", case): _recipe(_extended_mind(case)) for case in ("llama", "llama_sim", "mpt")},
    ("chunk_cepe", "a"): _recipe(_cepe),
    ("chunk_context_pruning", "alpha15"): _recipe(_context_pruning(1.5)),
    ("chunk_context_pruning", "alpha2"): _recipe(_context_pruning(2.0)),
    ("chunk_context_pruning", "sigmoid"): _recipe(_context_pruning(1.000001)),
    **{("chunk_wrope", case): _recipe(_wrope, lambda a: region.wrope(a["window_w"], a["far_position_b"])) for case in "ab"},
    ("chunk_longheads", "a"): _recipe(_longheads),
    ("chunk_loki", "a"): _recipe(_loki),
    ("chunk_squeezed", "a"): _recipe(_squeezed),
    ("chunk_hyper", "nocausal"): _recipe(_hyper(False, 1)),
    ("chunk_hyper", "causal"): _recipe(_hyper(True, 2)),
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
