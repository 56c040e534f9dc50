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
        "slopes", "causal_nonpow2_gqa_offset", "flash_noncausal_batch_slopes", "flash_causal_shortcut",
        "custom_positions_causal", "asymmetric_bidirectional", "packed_causal",
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
        "head_row_scale_with_alibi", "softcap_then_alibi", "alibi_then_softcap", "sink_with_prefix_bias", "window_sink_alibi",
    ),
    "bias_dense": ("head_broadcast_batch", "key_only"),
    "bias_dape": None,
    "bias_fire": ("bidirectional_small_L", "random_positions"),
    "bias_qrel": ("relative_key_query", "deberta_v2"),
    "bias_relproj": None,
    "chunk_swa": ("packed",),
    "chunk_lse_merge": ("two",),
}  # fmt: skip
# Of the methods that have one head's worth of parameters to each head, some heads are enough.
HEADS = {"bias_bipe_alibi": 2, "bias_kerple": 2, "bias_sandwich": 2}
LEFT_OUT = {"bias_code_f32", "x", "y_module", "dx_module"}


def wanted(name: str) -> bool:
    return name not in LEFT_OUT and not name.startswith("W_")


def some_heads(arrays: dict[str, np.ndarray], keep: int) -> dict[str, np.ndarray]:
    """The first heads of a case without grouped keys."""
    heads = arrays["q"].shape[1]
    assert arrays["k"].shape[1] == heads

    def cut(x: np.ndarray) -> np.ndarray:
        if x.ndim >= 3 and x.shape[1] == heads:
            return x[:, :keep]
        return x[:keep] if x.ndim == 1 and x.shape[0] == heads else x

    return {name: cut(x) for name, x in arrays.items()}


def extract(source: pathlib.Path, target: pathlib.Path, cases: tuple[str, ...] | None, heads: int | None) -> None:
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
            result |= {prefix + name: np.ascontiguousarray(x) for name, x in arrays.items() if wanted(name)}
    meta["cases"] = {case: meta["cases"][case] for case in taken}
    np.savez_compressed(target, meta=np.array(json.dumps(meta)), **result)
    print(f"{target.name}: {len(taken)} cases, {target.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    full, small = map(pathlib.Path, sys.argv[1:])
    for stem, cases in CASES.items():
        extract(full / f"{stem}.npz", small / f"{stem}.npz", cases, HEADS.get(stem))


if __name__ == "__main__":
    main()
