"""Hugging Face transformers models on fastpe's attention.

`register` makes the name "fastpe" known to transformers; a model picks it with ``attn_implementation="fastpe"`` or
``model.set_attn_implementation("fastpe")``. `patch` does that and more for one model: attention of the families that never
ask for an implementation, and T5's table in place of its dense bias.
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

from ..attention import attention
from ..bias import Bias, Dense
from . import _hf_families as families
from ._hf_families import PositionBias
from ._hf_mask import Visibility, mask_function, visibility
from ._hf_patch import is_replaced, replace, restore, with_globals

Tensor = torch.Tensor

__all__ = ["NAME", "Calls", "attention_forward", "count_calls", "patch", "register", "unpatch"]

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
    out = attention(
        _steps_of_8(query), _steps_of_8(key), _steps_of_8(value),
        bias=bias, mask=seen.mask, scale=scaling, softcap=softcap, sink=s_aux,
    )  # fmt: skip
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


def patch(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Moves a model's attention to fastpe, in place, and returns it.

    Models that look implementations up get "fastpe". MPT, Bloom, Falcon, GPT-J and CodeGen do not: their attention modules are
    given new methods. The T5 family keeps its bucket table instead of making the dense (1, H, Nq, Nk) bias of it. Other models
    of the process, and what `save_pretrained` writes, stay as they are.

    Args:
        model: a transformers model.

    Raises:
        TypeError: not a transformers model.
        ValueError: a model that is patched already.
        NotImplementedError: a model that neither asks for an implementation nor is one of the five; the message names its class.

    >>> import fastpe.integrations.transformers as hf, transformers
    >>> config = transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=2)
    >>> model = hf.patch(transformers.BloomForCausalLM(config).eval())
    >>> with hf.count_calls(model) as calls:
    ...     out = model(torch.arange(7)[None])
    >>> calls.by_class
    {'BloomAttention': 2}
    >>> hf.unpatch(model).config._attn_implementation
    'eager'
    """
    where = f"{_WHERE}.patch"
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(f"{where}: model must be a transformers model, got {type(model).__name__}")
    if is_replaced(model):
        raise ValueError(f"{where}: {type(model).__name__} is patched already; call {_WHERE}.unpatch first")
    register()
    own = [m for m in model.modules() if type(m).__name__ in families.FORWARDS]
    if not own and not _asks(model.config):
        raise NotImplementedError(
            f"{where}: {type(model).__name__} does not ask for an attention implementation, and fastpe has none for its attention"
        )
    replace(model, "_fastpe_before", model.config._attn_implementation)
    for module in model.modules():
        name = type(module).__name__
        if name in families.FORWARDS:
            method, make = families.FORWARDS[name]
            new = make(attention_forward)
            if name == "FalconAttention":
                new = with_globals(new, **_rotation_of(module))
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
    _set_implementation(model, _PATCHED if own else NAME, bool(own))
    return model


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


def _rotation_of(module: torch.nn.Module) -> dict:
    """apply_rotary_pos_emb as the module's own file has it."""
    return {"apply_rotary_pos_emb": sys.modules[type(module).__module__].apply_rotary_pos_emb}


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
