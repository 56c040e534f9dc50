#!/usr/bin/env python3
"""Extracts the repository's small golden set from the full one.

    python scripts/golden_subset.py ../shared/golden tests/golden/data

Whole cases are taken, as they are, so that their numbers stay those of the original code; arrays the tests can do without are
left out. rope_* files are small and copied by hand.
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np

# At least one case for every mechanism; None takes every case of the file.
CASES: dict[str, tuple[str, ...] | None] = {
    "bias_alibi": (
        "slopes", "causal_nonpow2_gqa_offset", "flash_causal_shortcut",
        "asymmetric_bidirectional", "packed_causal",
    ),
    "bias_bipe_alibi": None,
    "bias_kerple": ("log",),
    "bias_t5": (
        "bucket_bi_32_128", "bucket_uni_32_128", "bucket_uni_64_512", "encoder_temperature", "encoder_padded", "neox_causal_scaled_table",
    ),
    "bias_cable": ("v3_weighted_bidirectional_padded", "kernel_weighted", "nw_softplus_gqa_offset"),
    "bias_fox": ("offset", "left_padded", "strong_decay", "xt_bidirectional", "per_row_contextual"),
    "bias_cope": ("sep_key", "val_gates", "xt_listing"),
    "bias_sandwich": None,
    "bias_score_mods": (
        "head_row_scale_with_alibi", "alibi_then_softcap", "sink_with_prefix_bias", "window_sink_alibi",
    ),
    "bias_dense": ("head_broadcast_batch", "key_only"),
    "bias_dape": None,
    "bias_fire": ("bidirectional_small_L", "random_positions"),
    "bias_qrel": ("relative_key_query", "deberta_v2"),
    "bias_relproj": None,
    "chunk_swa": ("packed",),
    "chunk_lse_merge": ("two",),
    "chunk_keymass": ("a",),
    "chunk_landmark": ("irregular",),
    "chunk_landmark_cache": ("inc",),
}  # fmt: skip
# Of these the first batch entry and the first key head with its query heads are kept; nothing couples heads in them.
ONE_HEAD: dict[str, tuple[str, ...]] = {
    "chunk_anchor": ("interleaved",),
    "chunk_ape": ("t1",),
    "chunk_ccm": ("recur", "merge"),
    "chunk_cepe": ("a",),
    "chunk_dca": ("bigwin",),
    "chunk_extended_mind": ("llama",),
    "chunk_gali": ("a",),
    "chunk_hyper": ("nocausal",),
    "chunk_longheads": ("a",),
    "chunk_longllama": ("a",),
    "chunk_loki": ("a",),
    "chunk_memlong": ("gate",),
    "chunk_pcw": ("a",),
    "chunk_rerope": ("rerope",),
    "chunk_selfextend": ("a", "a_floor", "a_decode"),
    "chunk_selfextend_bidir": ("a",),
    "chunk_sentinel": ("a",),
    "chunk_streaming": ("a",),
    "chunk_string": ("a",),
    "chunk_structured_prompting": ("a",),
    "chunk_superposition": ("eq",),
    "chunk_wrope": ("a",),
}
# Of the methods that have one head's worth of parameters to each head, some heads are enough.
HEADS = {"bias_bipe_alibi": 2, "bias_fox": 2, "bias_kerple": 2, "bias_sandwich": 2, "bias_t5": 2}
LEFT_OUT = {"bias_code_f32", "x", "y_module", "dx_module", "q_fixed", "probs"}
# Their gradients are those of a mask or of a region that another file tests.
FORWARD_ONLY = {
    f"chunk_{stem}"
    for stem in ("anchor", "ccm", "cepe", "longllama", "pcw", "rerope", "sentinel", "streaming", "string", "structured_prompting", "superposition", "swa", "wrope")
}
GRADIENTS = ("do", "dq", "dk", "dv", "dmem_k", "dmem_v")


def wanted(name: str) -> bool:
    return name not in LEFT_OUT and not name.startswith("W_") and not name.endswith("_detached")


def some_heads(arrays: dict[str, np.ndarray], keep: int) -> dict[str, np.ndarray]:
    """The first heads of a case without grouped keys; a case without attention as it is."""
    if "q" not in arrays:
        return arrays
    heads = arrays["q"].shape[1]
    assert arrays["k"].shape[1] == heads

    def cut(x: np.ndarray) -> np.ndarray:
        if x.ndim >= 3 and x.shape[1] == heads:
            return x[:, :keep]
        if x.ndim >= 3 and x.shape[1] == 2 * heads:  # one set for each side
            return np.concatenate([x[:, :keep], x[:, heads : heads + keep]], 1)
        if x.ndim == 2 and x.shape[1] == heads < x.shape[0]:  # a table with a column a head
            return x[:, :keep]
        return x[:keep] if x.ndim == 1 and x.shape[0] == heads else x

    return {name: cut(x) for name, x in arrays.items()}


def one_head(arrays: dict[str, np.ndarray], shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """The first batch entry and key head of a case with (batch, query heads, key heads)."""
    batch, heads, kv_heads = shape
    group = heads // kv_heads

    def cut(name: str, x: np.ndarray) -> np.ndarray:
        if name in ("alibi_slopes", "selected") and x.ndim < 4:
            return x[:group]
        if name == "codebook":
            return x[:1]
        if name in ("key_visible", "mem_visible"):
            return x[:1]
        if x.ndim >= 3 and x.shape[0] in (1, batch) and x.shape[1] in (heads, kv_heads):
            return x[:1, : group if x.shape[1] == heads else 1]
        return x

    return {name: cut(name, x) for name, x in arrays.items()}


def extract(source: pathlib.Path, target: pathlib.Path, cases: tuple[str, ...] | None, heads: int | None, single: bool = False) -> None:
    mark = "__" if source.stem.startswith("chunk") else "/"
    with np.load(source, allow_pickle=False) as z:
        meta = json.loads(str(z["meta"]))
        taken = tuple(meta["cases"]) if cases is None else cases
        result = {}
        for case in taken:
            prefix = case + mark
            arrays = {key.removeprefix(prefix): z[key] for key in z.files if key.startswith(prefix)}
            assert arrays, f"{source.name} has no case {case}"
            if heads:
                arrays = some_heads(arrays, heads)
            if single:
                # A case of results alone belongs to the one before it in name.
                whole = {x: z[f"{(case if 'q' in arrays else case.split('_')[0])}{mark}{x}"].shape for x in "qk"}
                arrays = one_head(arrays, (*whole["q"][:2], whole["k"][1]))
            dropped = GRADIENTS if source.stem in FORWARD_ONLY else ()
            result |= {prefix + name: np.ascontiguousarray(x) for name, x in arrays.items() if wanted(name) and name not in dropped}
    meta["cases"] = {case: meta["cases"][case] for case in taken}
    np.savez_compressed(target, meta=np.array(json.dumps(meta)), **result)
    print(f"{target.name}: {len(taken)} cases, {target.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    full, small = map(pathlib.Path, sys.argv[1:])
    for stem, cases in CASES.items():
        extract(full / f"{stem}.npz", small / f"{stem}.npz", cases, HEADS.get(stem))
    for stem, cases in ONE_HEAD.items():
        extract(full / f"{stem}.npz", small / f"{stem}.npz", cases, None, single=True)


if __name__ == "__main__":
    main()
