"""A model's configuration -> its rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import _rope_rules as rules
from ._rope import Rope

_WHERE = "fastpe.rope.from_hf_config"

# rope_type -> fields it cannot do without
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
    "axial": (),
}
_OLD_NAMES = {"su": "longrope", "mrope": "default"}


def _get(config: Any, *names: str) -> Any:
    """The first of these fields that is there and not None."""
    for name in names:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if value is not None:
            return value
    return None


def _need(value: Any, what: str, why: str) -> Any:
    if value is None:
        raise ValueError(f"{_WHERE}: config has no {what}, which {why} needs")
    return value


def _parameters(config: Any, layer_type: str | None) -> tuple[Mapping, bool]:
    """The rope parameters of a layer type, and whether the config keeps them per layer type."""
    given = _get(config, "rope_parameters", "rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise TypeError(f"{_WHERE}: rope_parameters must be a dict, got {type(given).__name__}")
    per_layer = {k: v for k, v in given.items() if isinstance(v, Mapping) or (v is None and k.endswith("_attention"))}
    if not per_layer:
        if layer_type == "sliding_attention" and _get(config, "rope_local_base_freq") is not None:
            return {"rope_type": "default", "rope_theta": _get(config, "rope_local_base_freq")}, False
        return given, False
    known = ", ".join(map(repr, per_layer))
    if layer_type is None:
        raise ValueError(f"{_WHERE}: config has one rope per layer type; layer_type must be one of {known}, got none")
    if layer_type not in per_layer:
        raise ValueError(f"{_WHERE}: layer_type must be one of {known}, got {layer_type!r}")
    if per_layer[layer_type] is None:
        raise ValueError(f"{_WHERE}: layers of type {layer_type!r} have no rope in this config")
    return per_layer[layer_type], True


def from_hf_config(
    config: Any, *, layer_type: str | None = None, layout: str | None = None, precision: str = "exact"
) -> Rope:
    """The rotary embedding of a Hugging Face model, from its configuration.

    Understands every rope_type of transformers' ROPE_INIT_FUNCTIONS (default, linear, dynamic, yarn, longrope, llama3,
    proportional) and "axial", partial rotary, per-layer types, ``mrope_section``, and both the ``rope_parameters`` and the
    older ``rope_scaling`` spelling.

    Args:
        config: a ``PreTrainedConfig`` (for multimodal models the text config), or the dict of its config.json.
        layer_type: which layers, for configs with one rope per layer type (Gemma 3: "full_attention",
            "sliding_attention").
        layout: "half" or "interleaved". Configs do not state it: without it, "interleaved" where the config says
            ``rope_interleave`` and for Ernie 4.5-VL, else "half", which is right for most models but not for GPT-J, CodeGen,
            Cohere, GLM and Llama 4.
        precision: "exact", or "float32" to compute what transformers computes.

    Raises:
        ValueError: an unknown rope_type (the known ones are listed), a missing field, a layer_type the config lacks.

    >>> import fastpe
    >>> config = {"hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 500000.0, "max_position_embeddings": 131072,
    ...           "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    ...                            "original_max_position_embeddings": 8192}}
    >>> fastpe.rope.from_hf_config(config)
    llama3(rotary_dim=128, layout='half')
    """
    parameters, nested = _parameters(config, layer_type)
    kind = _get(parameters, "rope_type", "type") or "default"
    kind = _OLD_NAMES.get(kind, kind)
    if kind not in ROPE_TYPES:
        raise ValueError(f"{_WHERE}: rope_type must be one of {', '.join(map(repr, ROPE_TYPES))}, got {kind!r}")
    for field in ROPE_TYPES[kind]:
        _need(parameters.get(field), field, f"rope_type {kind!r}")

    head_dim = _get(config, "qk_rope_head_dim", "head_dim")
    if head_dim is None:
        hidden = _need(_get(config, "hidden_size", "n_embd"), "head_dim or hidden_size", "every rope")
        head_dim = hidden // _need(_get(config, "num_attention_heads", "n_head"), "num_attention_heads", "every rope")
    base = _need(
        _get(parameters, "rope_theta") or _get(config, "rope_theta", "rotary_emb_base"), "rope_theta", "every rope"
    )
    share = _get(parameters, "partial_rotary_factor")
    if share is None:
        share = _get(config, "partial_rotary_factor", "rotary_pct")
    rotary_dim = int(head_dim * (1.0 if share is None else share))
    if share is None and kind == "default":
        rotary_dim = _get(config, "rotary_dim") or rotary_dim
    model = _get(config, "model_type") or ""
    ernie = model.startswith("ernie4_5_vl")
    if layout is None:
        layout = "interleaved" if ernie or _get(config, "rope_interleave") else "half"
    how = {"layout": layout, "precision": precision}

    def max_position() -> int:
        return _need(
            _get(config, "max_position_embeddings", "n_positions"), "max_position_embeddings", f"rope_type {kind!r}"
        )

    def original() -> int:
        inner, outer = (
            parameters.get("original_max_position_embeddings"),
            _get(config, "original_max_position_embeddings"),
        )
        first, second = (inner, outer) if nested else (outer, inner)
        return first or second or max_position()

    def factor() -> float:
        given = parameters.get("factor")
        return max_position() / original() if given is None else given

    if kind == "default":
        rope = rules.default(rotary_dim, base, **how)
    elif kind == "linear":
        rope = rules.linear(rotary_dim, parameters["factor"], base, **how)
    elif kind == "dynamic":
        rope = rules.dynamic_ntk(rotary_dim, parameters["factor"], max_position(), base, **how)
    elif kind == "yarn":
        rope = rules.yarn(
            rotary_dim, factor(), original(), base,
            beta_fast=parameters.get("beta_fast") or 32.0,
            beta_slow=parameters.get("beta_slow") or 1.0,
            # transformers reads this field from un-nested parameters only
            truncate=True if nested else parameters.get("truncate", True),
            attention_factor=parameters.get("attention_factor"),
            mscale=parameters.get("mscale"), mscale_all_dim=parameters.get("mscale_all_dim"),
            **how,
        )  # fmt: skip
    elif kind == "longrope":
        rope = rules.longrope(
            rotary_dim, parameters["short_factor"], parameters["long_factor"], original(),
            factor=factor(), base=base, attention_factor=parameters.get("attention_factor"), **how,
        )  # fmt: skip
    elif kind == "llama3":
        rope = rules.llama3(
            rotary_dim, parameters["factor"], parameters["low_freq_factor"], parameters["high_freq_factor"],
            original(), base, **how,
        )  # fmt: skip
    elif kind == "proportional":
        rope = rules.proportional(
            head_dim, 1.0 if share is None else share, base, factor=parameters.get("factor", 1.0), **how
        )
    else:
        rope = rules.axial(rotary_dim, 2, base, **how)

    sections = parameters.get("mrope_section")
    if sections is None:
        return rope
    order = "ernie" if ernie else "interleaved" if parameters.get("mrope_interleaved") else "sections"
    return rules.mrope(rotary_dim, sections, order=order, scaling=rope, **how)
