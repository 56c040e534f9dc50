"""Hugging Face transformers models on fastpe's attention.

`register` makes the name "fastpe" known to transformers; a model picks it with ``attn_implementation="fastpe"`` or
``model.set_attn_implementation("fastpe")``. `patch` does that and more for one model: attention of the families that never
ask for an implementation, T5's table in place of its dense bias, rotation as one op or inside the attention call, other
frequencies, regions of positions. docs/transformers.md has their use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections import Counter
from collections.abc import Iterator

import torch

try:
    import transformers
except ImportError as error:  # pragma: no cover
    raise ImportError("fastpe.integrations.transformers needs transformers 5: pip install 'fastpe[transformers]'") from error

from transformers import AttentionInterface, AttentionMaskInterface

from .._rope import Rope
from ..attention import attention
from ..bias import Bias, Dense
from ..mask import Mask
from ..region import Region
from . import _hf_families as families
from . import _hf_rope as rotation
from ._hf_families import PositionBias
from ._hf_mask import Visibility, mask_function, visibility
from ._hf_patch import is_replaced, replace, restore, with_globals
from ._hf_rope import AttentionBuckets, EntropyABF, MsPoE, Settings

Tensor = torch.Tensor

__all__ = [
    "NAME",
    "AttentionBuckets",
    "Calls",
    "EntropyABF",
    "MsPoE",
    "attention_forward",
    "count_calls",
    "patch",
    "register",
    "unpatch",
]

NAME = "fastpe"

_WHERE = "fastpe.integrations.transformers"

# The implementation of models whose own attention is replaced: no attention function goes with it.
_PATCHED = "fastpe_patched"

_counters: list[Counter] = []


def register() -> None:
    """Makes ``attn_implementation="fastpe"`` known to transformers. Calling it again changes nothing.

    >>> import fastpe.integrations.transformers as hf, transformers
    >>> hf.register()
    >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    >>> model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="fastpe")
    >>> model(torch.arange(7)[None]).logits.shape
    torch.Size([1, 7, 50])
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, _guarded_mask_function)
    AttentionMaskInterface.register(_PATCHED, mask_function)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What AttentionInterface calls for the name "fastpe".

    Args:
        module: the attention module that calls.
        query: (B, H, Nq, D) with D up to 256, padded to a step of 8 if need be.
        key, value: (B, Hk, Nk, D), (B, Hk, Nk, Dv), as they leave the cache.
        attention_mask: what the mask function of the name returned; or bool (B | 1, H | 1, Nq, Nk), True where visible; or
            float, added to the scores; or None.
        dropout: must be 0.
        scaling: of the products, default 1 / sqrt(D).
        is_causal: default the module's; holds where attention_mask is None and Nq > 1 (bottom-right aligned).
        softcap: C of C tanh(x / C), applied to the scaled products.
        s_aux: (H,) sink logits.
        position_bias: (1 | B, H, Nq, Nk), added after softcap. Its gradient is formed if it requires one.
        kwargs: what else models pass. The window is in attention_mask, so `sliding_window` has nothing to add.

    Returns:
        out (B, Nq, H, Dv), contiguous; None in place of the weights, which are never formed.

    Raises:
        NotImplementedError: dropout, weights asked for, a paged cache; the message names the module's class and the argument.
    """
    where = f"{_WHERE}: {type(module).__name__}"
    if not torch.compiler.is_compiling():
        for counter in _counters:
            counter[module] += 1
    _refuse(where, dropout, kwargs)
    D, Dv = query.shape[-1], value.shape[-1]
    if scaling is None:
        scaling = D**-0.5
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    seen = visibility(where, attention_mask, is_causal, query.shape[2], key.shape[2])
    if seen.keys != key.shape[2]:
        key, value = key[:, :, : seen.keys], value[:, :, : seen.keys]
    bias = seen.bias
    if position_bias is not None:
        bias = _add(bias, _position_bias(position_bias, seen, query.shape[2]))
    call = {"bias": bias, "scale": scaling, "softcap": softcap, "sink": s_aux}
    value = _steps_of_8(value)
    if "_fastpe" in module.__dict__:
        out = rotation.attend(where, module, query, key, value, attention_mask, seen, kwargs, call)
    else:
        out = attention(_steps_of_8(query), _steps_of_8(key), value, mask=seen.mask, **call)
    return out[..., :Dv].transpose(1, 2).contiguous(), None


# What models pass that changes the result and that no argument of `fastpe.attention` stands for.
_UNSUPPORTED = {
    "cache": "a paged cache is read block by block; use attn_implementation='sdpa'",
    "indices": "keys chosen row by row are not supported; use attn_implementation='eager'",
    "block_indices": "key blocks chosen row by row are not supported; use attn_implementation='eager'",
    "sinks": "this model's sinks are not one logit per head; use attn_implementation='eager'",
    "layer_head_mask": "heads are not masked; use attn_implementation='eager'",
    "head_mask": "heads are not masked; use attn_implementation='eager'",
}


def _refuse(where: str, dropout: float, kwargs: dict) -> None:
    if dropout:
        raise NotImplementedError(
            f"{where}: dropout must be 0, got {dropout:g}; set the config's attention dropout to 0, or call model.eval()"
        )
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            f"{where}: output_attentions must be False, got True: the weights are never formed; use attn_implementation='eager'"
        )
    for name, why in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{where}: {name} must be None, got {type(kwargs[name]).__name__}: {why}")


def _steps_of_8(x: Tensor) -> Tensor:
    """Zero channels up to the next multiple of 8: they add nothing to a product."""
    missing = -x.shape[-1] % 8
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def _position_bias(x: Tensor | PositionBias, seen: Visibility, rows: int) -> Bias | None:
    return x.of(seen.offset, rows, seen.keys) if isinstance(x, PositionBias) else Dense(x[..., : seen.keys])


def _add(a: Bias | None, b: Bias | None) -> Bias | None:
    return b if a is None else a if b is None else a + b


# ---------------------------------------------------------------------------------------------------------------------
# Models that do not ask


def _asks(config) -> bool:
    """Whether the modeling file of a config looks attention implementations up by name."""
    modeling = sys.modules.get(type(config).__module__.replace(".configuration_", ".modeling_"))
    return modeling is None or hasattr(modeling, "ALL_ATTENTION_FUNCTIONS")


def _guarded_mask_function(*args, config=None, **kwargs) -> Tensor | None:
    """`mask_function`, for models that will hand its result back to `attention_forward`.

    The others would read it as a mask of their own, or take None for "everything is visible".
    """
    if config is not None and not torch.compiler.is_compiling() and not _asks(config):
        raise NotImplementedError(
            f"{_WHERE}: {type(config).__name__}: attn_implementation='{NAME}' is accepted but never used by this model's own "
            f"attention; use {_WHERE}.patch(model), or attn_implementation='sdpa'"
        )
    return mask_function(*args, config=config, **kwargs)


def patch(
    model: transformers.PreTrainedModel,
    *,
    rope: str | None = None,
    bias: Bias | None = None,
    mask: Mask | None = None,
    region: Region | None = None,
    scaling: dict | Rope | EntropyABF | MsPoE | AttentionBuckets | None = None,
) -> transformers.PreTrainedModel:
    """Moves a model's attention to fastpe, in place, and returns it.

    Models that look implementations up get "fastpe". MPT, Bloom, Falcon, GPT-J and CodeGen do not: their attention modules are
    given new methods. The T5 family keeps its bucket table instead of making the dense (1, H, Nq, Nk) bias of it. Other models
    of the process, and what `save_pretrained` writes, stay as they are.

    bias, mask, region and scaling change what the model computes, in the layers without a sliding window.

    Args:
        model: a transformers model.
        rope: "op": query and key are turned by one op instead of the ten of the modeling file. "fused": they are turned inside
            the attention call, and keys are cached as they were before. Default None: as the model does it, or "fused" where
            region or scaling ask for it.
        bias: added to the scores (`fastpe.bias`).
        mask: a further rule of visibility (`fastpe.mask`), such as fastpe.mask.streaming.
        region: sets of positions for near and far keys (`fastpe.region`): Self-Extend, DCA, STRING, ReRoPE, StreamingLLM, ...
            They count from the first real key of each text.
        scaling: other rotary frequencies: a dict as in a config's ``rope_parameters`` (``{"rope_type": "yarn", "factor": 4.0}``;
            rope_theta and original_max_position_embeddings default to the model's), a `fastpe.Rope`, or an `EntropyABF`, `MsPoE` or
            `AttentionBuckets`. Frequencies that depend on the length ("dynamic") are right with a cache, since it holds keys
            that are not turned yet.

    With rope="fused" the positions of cached tokens follow one another (padding on the left is fine).

    Raises:
        TypeError: not a transformers model, or an argument of the wrong kind.
        ValueError: a model that is patched already, an unknown rope.
        NotImplementedError: a model that neither asks for an implementation nor is one of the five, or whose rotation cannot be
            moved; the message names the class of the model or module, and the argument.

    >>> import fastpe, fastpe.integrations.transformers as hf, transformers
    >>> config = transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=2)
    >>> model = hf.patch(transformers.BloomForCausalLM(config).eval())
    >>> with hf.count_calls(model) as calls:
    ...     out = model(torch.arange(7)[None])
    >>> calls.by_class
    {'BloomAttention': 2}
    >>> hf.unpatch(model).config._attn_implementation
    'eager'
    >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    >>> model = hf.patch(transformers.LlamaForCausalLM(config), region=fastpe.region.self_extend(window=16, group=4))
    >>> model(torch.arange(40)[None]).logits.shape
    torch.Size([1, 40, 50])
    """
    where = f"{_WHERE}.patch"
    _check_arguments(where, model, rope, bias, mask, region, scaling)
    register()
    own = any(type(m).__name__ in families.FORWARDS for m in model.modules())
    if not own and not _asks(model.config):
        raise NotImplementedError(
            f"{where}: {type(model).__name__} does not ask for an attention implementation, and fastpe has none for its attention"
        )
    replace(model, "_fastpe_before", model.config._attn_implementation)
    try:
        for module in model.modules():
            _patch_module(module)
        _set_implementation(model, _PATCHED if own else NAME, own)
        if rope == "op":
            _turn_by_op(where, model)
        elif rope == "fused" or region is not None or scaling is not None:
            _turn_inside(where, model, region, scaling)
        if bias is not None or mask is not None:
            _add_to_calls(where, model, bias, mask)
        if isinstance(scaling, AttentionBuckets):
            replace(model, "forward", scaling.forward(f"{where}: {type(model).__name__}"))
    except Exception:
        unpatch(model)
        raise
    return model


def _check_arguments(where: str, model, rope, bias, mask, region, scaling) -> None:
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(f"{where}: model must be a transformers model, got {type(model).__name__}")
    where = f"{where}: {type(model).__name__}"
    if is_replaced(model):
        raise ValueError(f"{where} is patched already; call {_WHERE}.unpatch first")
    if rope not in (None, "op", "fused"):
        raise ValueError(f"{where}: rope must be 'op', 'fused' or None, got {rope!r}")
    conversions = (dict, Rope, EntropyABF, MsPoE, AttentionBuckets)
    for what, x, kinds, how in (
        ("bias", bias, Bias, "a fastpe.bias object"),
        ("mask", mask, Mask, "a fastpe.mask object"),
        ("region", region, Region, "a fastpe.region object"),
        ("scaling", scaling, conversions, "a dict of rope_parameters, a fastpe.Rope, EntropyABF, MsPoE or AttentionBuckets"),
    ):
        if x is not None and not isinstance(x, kinds):
            raise TypeError(f"{where}: {what} must be {how}, got {type(x).__name__}")
    if rope == "op" and (region is not None or scaling is not None):
        raise ValueError(
            f"{where}: rope='op' does not go with region or scaling, which need keys that are cached before rotation; use 'fused'"
        )
    if region is not None and not isinstance(scaling, (dict, Rope, type(None))):
        raise NotImplementedError(f"{where}: region does not go with scaling {type(scaling).__name__}")
    if region is not None and region.name == "streaming" and mask is None:
        raise ValueError(f"{where}: region {region!r} needs mask=fastpe.mask.streaming(...) with the same numbers")


def _patch_module(module: torch.nn.Module) -> None:
    name = type(module).__name__
    if name in families.FORWARDS:
        method, make = families.FORWARDS[name]
        new = make(attention_forward)
        if name == "FalconAttention":
            new = with_globals(new, apply_rotary_pos_emb=sys.modules[type(module).__module__].apply_rotary_pos_emb)
        replace(module, method, new)
    elif name in families.MASKS:
        forward = type(module).forward
        create = inspect.unwrap(forward).__globals__["create_causal_mask"]
        replace(module, "forward", with_globals(forward, create_causal_mask=families.MASKS[name](create)))
    elif name in families.TABLES:
        table = hasattr(module, "relative_attention_bias")
        replace(module, "compute_bias", families.compute_bias if table else families.compute_no_bias)
        # Without a table the module would make zeros of the size of the scores.
        replace(module, "has_relative_attention_bias", True)


# ---------------------------------------------------------------------------------------------------------------------
# Rotation


def _forward_of(module: torch.nn.Module):
    """The function behind module.forward, replaced or not."""
    return module.__dict__["forward"].__func__ if "forward" in module.__dict__ else type(module).forward


def _turning(where: str, model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Name and module of all attention that rotates."""
    named = [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith("Attention")]
    found = [(n, m) for n, m in named if rotation.rotary_names(_forward_of(m))]
    if not found:
        raise NotImplementedError(
            f"{where}: {type(model).__name__} has no attention with a rotation that rope knows; leave rope, region and scaling out"
        )
    return found


def _turn_by_op(where: str, model: torch.nn.Module) -> None:
    made = {}
    for _, module in _turning(where, model):
        forward = _forward_of(module)
        for name in rotation.rotary_names(forward):
            original = inspect.unwrap(forward).__globals__[name]
            if original not in made:
                made[original] = rotation.in_place_of(f"{where}: {type(module).__name__}", original)[0]
            forward = with_globals(forward, **{name: made[original]})
        replace(module, "forward", forward)


def _has_window(module: torch.nn.Module) -> bool:
    """Whether a layer sees a window or a chunk only."""
    config = getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    if types:
        return types[module.layer_idx] != "full_attention"
    return getattr(module, "sliding_window", getattr(config, "sliding_window", None)) is not None


def _turn_inside(where: str, model: torch.nn.Module, region: Region | None, scaling) -> None:
    verified = set()
    changed = 0
    for path, module in _turning(where, model):
        here = f"{where}: {type(module).__name__}"
        layer_type = getattr(module, "layer_type", None)
        forward = _forward_of(module)
        names = rotation.rotary_names(forward)
        original = inspect.unwrap(forward).__globals__[names[0]]
        _, layout = rotation.in_place_of(here, original)
        config = getattr(module, "config", model.config)
        settings = Settings(rope=rotation.rope_of(here, config, layer_type, layout))
        kind = (type(module), layer_type)
        want = _try(here, model, path, module, layer_type) if kind not in verified else None
        replace(module, "forward", with_globals(forward, **{n: rotation.unturned(settings, original) for n in names}))
        replace(module, "_fastpe", settings)
        if want is not None:
            got = _try(here, model, path, module, layer_type)
            if (got - want).abs().max() > torch.finfo(want.dtype).eps ** 0.5 * want.abs().max():
                raise NotImplementedError(
                    f"{here}: rope='fused' would change its numbers, it does more than rotate between query and scores; use rope='op'"
                )
            verified.add(kind)
        if (region is not None or scaling is not None) and not _has_window(module):
            changed += 1
            settings.region = region
            if isinstance(scaling, dict):
                settings.rope = rotation.rope_of(here, config, layer_type, layout, scaling)
            elif isinstance(scaling, Rope):
                settings.rope = scaling
            elif scaling is not None:
                for what, value in scaling.settings(settings.rope, module.layer_idx).items():
                    setattr(settings, what, value)
    if (region is not None or scaling is not None) and not changed:
        raise NotImplementedError(
            f"{where}: all layers of {type(model).__name__} have a sliding window, which region and scaling leave alone; set "
            "config.sliding_window to None before the model is made"
        )


def _try(where: str, model: torch.nn.Module, path: str, module: torch.nn.Module, layer_type: str | None) -> torch.Tensor:
    """What one attention module makes of eight random tokens."""
    rotary = _rotary_of(model, path)
    first = next(m for m in module.modules() if isinstance(m, torch.nn.Linear) or hasattr(m, "in_features"))
    x = torch.randn(1, 8, first.in_features, generator=torch.Generator().manual_seed(0)).to(first.weight)
    positions = torch.arange(8, device=x.device)[None] + 3
    if rotary is None:
        raise NotImplementedError(f"{where}: rope='fused' found no rotary_emb beside this module; use rope='op'")
    many = (positions, layer_type) if "layer_type" in inspect.signature(rotary.forward).parameters else (positions,)
    given = {"hidden_states": x, "position_embeddings": rotary(x, *many), "attention_mask": None, "position_ids": positions}
    if "alibi" in inspect.signature(module.forward).parameters:
        given["alibi"] = None
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            return module(**given)[0]
    except TypeError as error:
        raise NotImplementedError(f"{where}: rope='fused' cannot call this module by itself ({error}); use rope='op'") from error
    finally:
        module.train(training)


def _rotary_of(model: torch.nn.Module, path: str) -> torch.nn.Module | None:
    """rotary_emb of the nearest module around."""
    parts = path.split(".")
    for n in range(len(parts), -1, -1):
        around = model.get_submodule(".".join(parts[:n]))
        if isinstance(getattr(around, "rotary_emb", None), torch.nn.Module):
            return around.rotary_emb
    return None


def _add_to_calls(where: str, model: torch.nn.Module, bias: Bias | None, mask: Mask | None) -> None:
    for module in _attentions(model):
        if not _has_window(module):
            if "_fastpe" not in module.__dict__:
                replace(module, "_fastpe", Settings())
            module._fastpe.bias, module._fastpe.mask = bias, mask


def unpatch(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Undoes `patch`, in place, and returns the model.

    Raises:
        ValueError: a model that is not patched.
    """
    if not is_replaced(model):
        raise ValueError(f"{_WHERE}.unpatch: {type(model).__name__} is not patched")
    before = model._fastpe_before
    own = model.config._attn_implementation == _PATCHED
    for module in model.modules():
        restore(module)
    _set_implementation(model, before, own)
    return model


def _set_implementation(model: transformers.PreTrainedModel, name: str, own: bool) -> None:
    if own:
        model.config._attn_implementation = name
    else:
        model.set_attn_implementation(name)


@dataclasses.dataclass
class Calls:
    """How often the attention modules of a model came here, filled in when a `count_calls` block ends.

    Attributes:
        by_class: calls by class name of the attention module.
        ignored: class names of attention modules that were not called.
    """

    by_class: dict[str, int] = dataclasses.field(default_factory=dict)
    ignored: list[str] = dataclasses.field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.by_class.values())


def _attentions(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules named Attention that hold no other."""
    named = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    return [m for m in named if not any(child in named for child in list(m.modules())[1:])]


@contextlib.contextmanager
def count_calls(model: torch.nn.Module) -> Iterator[Calls]:
    """Context manager that counts the calls a model makes to fastpe, and fails if it makes none.

    Calls inside a compiled graph are not counted.

    Raises:
        RuntimeError: the model ran on its own attention; the message names its class and what to do.

    >>> import fastpe.integrations.transformers as hf, transformers
    >>> hf.register()
    >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="fastpe")
    >>> with hf.count_calls(model) as calls:
    ...     out = model(torch.arange(7)[None])
    >>> calls.by_class
    {'LlamaAttention': 2}
    """
    counter: Counter = Counter()
    calls = Calls()
    _counters.append(counter)
    try:
        yield calls
    finally:
        _counters.remove(counter)
        classes = Counter()
        for module, n in counter.items():
            classes[type(module).__name__] += n
        calls.by_class = dict(classes)
        calls.ignored = sorted({type(m).__name__ for m in _attentions(model)} - set(calls.by_class))
    if not calls.total:
        raise RuntimeError(
            f"{_WHERE}: {type(model).__name__} made no call to fastpe: its attention ({', '.join(calls.ignored) or 'none found'}) "
            f"does not ask for an implementation, or another one is set (it is {model.config._attn_implementation!r}); "
            f"use {_WHERE}.patch(model)"
        )
