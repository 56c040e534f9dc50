"""Rotation of transformers models: as one op, or inside the attention call with keys cached as they were before it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable

import torch

from .. import _check
from .. import rope as ropes
from .._rope import Rope
from ..attention import attention
from ..bias import Bias
from ..mask import Mask
from ..region import Region
from ._hf_mask import Visibility, is_closed, is_compact, rows_apart, visibility
from ._hf_patch import replace

Tensor = torch.Tensor

_LAYOUTS = ("half", "interleaved")
# How a rotary module lays out the angle of pair j among the columns of cos and sin.
_COLUMNS = {
    "twice": lambda x: x[..., : x.shape[-1] // 2],  # all angles, then all again
    "repeated": lambda x: x[..., ::2],  # each angle two times
    "once": lambda x: x,
}
_SPREAD = {
    "twice": lambda x: torch.cat((x, x), -1),
    "repeated": lambda x: x.repeat_interleave(2, -1),
    "once": lambda x: x,
}


# ---------------------------------------------------------------------------------------------------------------------
# What stands in for the functions that modeling files call apply_rotary...


def _table(cos: Tensor, sin: Tensor, columns: str, like: Tensor) -> Tensor:
    """(B | 1, N, ...) cos and sin -> (2, B | 1, 1, N, J) as the ops read it."""
    pick = _COLUMNS[columns]
    table = torch.stack((pick(cos), pick(sin)))
    table = table if table.dim() == 4 else table[:, None]
    return table[:, :, None].to(torch.float64 if like.dtype == torch.float64 else torch.float32).contiguous()


def _turn(x: Tensor, table: Tensor, layout: int, heads_first: bool) -> Tensor:
    x = x if heads_first else x.transpose(1, 2)
    x = torch.ops.fastpe.rotate(x, table, layout, False)
    return x if heads_first else x.transpose(1, 2)


def _pair(columns: str, layout: int):
    def apply(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        table = _table(cos, sin, columns, q)
        if q.dtype == k.dtype and unsqueeze_dim == 1:
            return torch.ops.fastpe.rotate_pair(q, k, table, table, layout, False)
        return tuple(_turn(x, table, layout, unsqueeze_dim == 1) for x in (q, k))

    return apply


def _single(columns: str, layout: int):
    def apply(x, cos, sin, unsqueeze_dim=1):
        return _turn(x, _table(cos, sin, columns, x), layout, unsqueeze_dim == 1)

    return apply


def _sin_first(columns: str, layout: int):
    def apply(tensor, sin, cos):
        return _turn(tensor, _table(cos, sin, columns, tensor), layout, False)

    return apply


def _complex(columns: str, layout: int):
    def apply(xq, xk, freqs_cis):
        table = _table(freqs_cis.real, freqs_cis.imag, columns, xq)
        return tuple(_turn(x, table, layout, False) for x in (xq, xk))

    return apply


def _arguments(kind: str, q: Tensor, k: Tensor, angle: Tensor, columns: str) -> tuple:
    """A call of a kind on (1, H, N, D) q and k and (1, N, J) angles."""
    if kind == "complex":
        return q.transpose(1, 2), k.transpose(1, 2), torch.polar(torch.ones_like(angle), angle)
    cos, sin = (_SPREAD[columns](x) for x in (angle.cos(), angle.sin()))
    if kind == "sin_first":
        return q.transpose(1, 2), sin, cos
    return (q, cos, sin) if kind == "single" else (q, k, cos, sin)


# Parameter names of the functions in transformers -> (kind, what makes the one in its place).
_KINDS = {
    ("q", "k", "cos", "sin"): ("pair", _pair),
    ("x", "cos", "sin"): ("single", _single),
    ("tensor", "sin", "cos"): ("sin_first", _sin_first),
    ("xq", "xk", "freqs_cis"): ("complex", _complex),
}
_NAMES = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave", "apply_rotary_emb")


def rotary_names(forward: Callable) -> list[str]:
    """The rotation functions that a forward calls."""
    return [name for name in inspect.unwrap(forward).__code__.co_names if name in _NAMES]


def in_place_of(where: str, original: Callable) -> tuple[Callable, str]:
    """A function that computes what `original` does through fastpe's op, and the layout of its pairs.

    Which layout, and which column of cos belongs to which pair, is found by trying: products of rotated queries and keys must
    agree, since some families reorder channels on the way.
    """
    names = tuple(n for n in inspect.signature(inspect.unwrap(original)).parameters if n not in ("unsqueeze_dim", "position_ids", "kwargs"))
    if names not in _KINDS:
        raise NotImplementedError(f"{where}: its rotation takes ({', '.join(names)}), which rope does not know; leave rope out")
    kind, make = _KINDS[names]
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 3, 8, generator=g) for _ in range(2))
    angle = torch.rand(1, 3, 4, generator=g)

    def products(function: Callable, columns: str) -> Tensor:
        if kind in ("single", "sin_first"):
            turned = [function(*_arguments(kind, x, x, angle, columns)) for x in (q, k)]
        else:
            turned = function(*_arguments(kind, q, k, angle, columns))
        a, b = turned if kind in ("pair", "single") else (x.transpose(1, 2) for x in turned)
        return a @ b.transpose(-1, -2)

    for columns in _COLUMNS:
        if kind in ("sin_first", "complex") and columns != "once":
            continue
        try:
            want = products(original, columns)
        except RuntimeError:  # its cos has another number of columns
            continue
        for layout, name in enumerate(_LAYOUTS):
            if torch.allclose(products(make(columns, layout), columns), want, atol=1e-5):
                return make(columns, layout), name
    raise NotImplementedError(f"{where}: its rotation is none that rope knows; leave rope out")


# ---------------------------------------------------------------------------------------------------------------------
# Rotation inside the attention call


@dataclasses.dataclass
class Settings:
    """What an attention module's calls do beyond what the model asks for."""

    rope: Rope | None = None
    region: Region | None = None
    bias: Bias | None = None
    mask: Mask | None = None
    row_scale: Callable[[Tensor], Tensor] | None = None  # positions (B, Nq) -> (B, Nq)
    ms_poe: MsPoE | None = None
    turned: int | None = None  # channels of the query that the model wanted turned in the call under way

    def __deepcopy__(self, memo) -> Settings:
        # The rotation that sets `turned` holds this object, and copies of a function are the function.
        return self


def attend(where: str, module, query: Tensor, key: Tensor, value: Tensor, attention_mask, seen: Visibility, kwargs, call) -> Tensor:
    """One attention call under the settings of its module; `call` holds the model's own arguments."""
    settings = module._fastpe
    turned, settings.turned = settings.turned, None
    if settings.bias is not None:
        call["bias"] = settings.bias if call["bias"] is None else call["bias"] + settings.bias
    if turned is None or settings.rope is None:
        # A layer without positions of its own, or one whose query came turned.
        return attention(query, key, value, mask=_and(seen.mask, settings.mask), **call)
    if turned != query.shape[-1]:
        raise NotImplementedError(
            f"{where}: rope='fused' needs the rotation on all of a head, this module turns {turned} of {query.shape[-1]} channels; "
            "use rope='op'"
        )
    given = kwargs.get("position_ids")
    if given is None or given.dim() != 2:
        raise NotImplementedError(f"{where}: rope='fused' needs position_ids (B, N), which do not reach this module's attention; use rope='op'")
    if settings.region is not None:
        return _by_region(where, settings, query, key, value, attention_mask, seen, call)
    positions, key_positions = _positions(where, given, seen, query.shape[2], kwargs.get("use_cache"))
    if settings.row_scale is not None:
        call["row_scale"] = settings.row_scale(positions)[:, None]
    rope = settings.rope
    if settings.ms_poe is not None:
        rope = settings.ms_poe.rope_of(where, module, rope, query, key)
    return attention(
        query, key, value, rope=rope, positions=positions, key_positions=key_positions, mask=_and(seen.mask, settings.mask), **call
    )


def _and(a: Mask | None, b: Mask | None) -> Mask | None:
    return b if a is None else a if b is None else a & b


def _positions(where: str, given: Tensor, seen: Visibility, rows: int, caching: bool | None) -> tuple[Tensor, Tensor]:
    """Positions of rows and keys. Keys from the cache stand one apart up to the first row, which is why gaps are refused."""
    if rows == seen.keys:
        if caching and given.shape[1] > 1 and _check.can_read(given) and bool((given.diff(dim=1) > 1).any()):
            raise ValueError(
                f"{where}: position_ids must not skip positions when a cache is used, since rope='fused' caches keys without "
                "positions; pass use_cache=False, or use rope='op'"
            )
        return given, given
    key = torch.arange(seen.keys, device=given.device) - seen.offset + given[:, :1]
    return given, key


def _by_region(where: str, settings: Settings, query, key, value, attention_mask, seen: Visibility, call) -> Tensor:
    """Regions count tokens, so each text starts at its first real key."""
    one = {"rope": settings.rope, "region": settings.region}

    def closed(s: Visibility, rows: int) -> Mask | None:
        if s.bias is not None or not is_closed(s.mask) or not isinstance(s.offset, int) or s.offset + rows != s.keys:
            raise NotImplementedError(f"{where}: region needs a causal or plain attention_mask with padding on the left only")
        return _and(s.mask, settings.mask)

    rows = query.shape[2]
    if is_closed(seen.mask) and isinstance(seen.offset, int):
        return attention(query, key, value, mask=closed(seen, rows), **one, **call)
    if not is_compact(attention_mask) or not _check.can_read(attention_mask):
        closed(seen, rows)  # says what is missing
        raise NotImplementedError(f"{where}: region does not go with padding or a static cache under torch.compile")
    outs = []
    for b in range(query.shape[0]):
        keys_off, rows_off, rest = rows_apart(attention_mask[..., : seen.keys], b)
        q, k, v = query[b : b + 1, :, rows_off:], key[b : b + 1, :, keys_off:], value[b : b + 1, :, keys_off:]
        s = visibility(where, rest, True, q.shape[2], k.shape[2])
        out = attention(q, k[:, :, : s.keys], v[:, :, : s.keys], mask=closed(s, q.shape[2]), **one, **call)
        outs.append(torch.nn.functional.pad(out, (0, 0, rows_off, 0)))
    return torch.cat(outs)


# ---------------------------------------------------------------------------------------------------------------------
# Conversions that are more than a Rope


@dataclasses.dataclass(frozen=True)
class EntropyABF:
    """Entropy-ABF (arXiv 2401.07004) as `patch`'s scaling: a large base and rows scaled by max(1, ln(p + 1) / ln(train_length)).

    Args:
        base: of the frequencies.
        train_length: tokens the model was trained on.
        first_layer: layers before it keep their rows unscaled, 2 in the paper.

    >>> import torch, transformers, fastpe.integrations.transformers as hf
    >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    >>> model = hf.patch(transformers.LlamaForCausalLM(config).eval(), scaling=hf.EntropyABF(train_length=8))
    >>> model.generate(torch.arange(2, 12)[None], max_new_tokens=2, do_sample=False, eos_token_id=None).shape
    torch.Size([1, 12])
    """

    base: float = 500000.0
    train_length: int = 4096
    first_layer: int = 2

    def settings(self, old: Rope, layer: int) -> dict:
        scale = None
        if layer >= self.first_layer:
            scale = functools.partial(ropes.entropy_abf_scale, train_length=self.train_length)
        return {"rope": ropes.default(old.rotary_dim, self.base, layout=old.layout), "row_scale": scale}


@dataclasses.dataclass(frozen=True)
class MsPoE:
    """Ms-PoE (arXiv 2403.04797) as `patch`'s scaling: every head reads positions divided by a ratio of its own, chosen layer by
    layer from the prompt. One text at a time.

    Args:
        low, high: range of the ratios.
        assignment: see `fastpe.rope.ms_poe_ratios`.
        first_layer: layers before it are left as they are, 2 in the released code.

    >>> import torch, transformers, fastpe.integrations.transformers as hf
    >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    >>> model = hf.patch(transformers.LlamaForCausalLM(config).eval(), scaling=hf.MsPoE(first_layer=0))
    >>> model.generate(torch.arange(2, 12)[None], max_new_tokens=2, do_sample=False, eos_token_id=None).shape
    torch.Size([1, 12])
    """

    low: float = 1.2
    high: float = 1.8
    assignment: str = "paper"
    first_layer: int = 2

    def settings(self, old: Rope, layer: int) -> dict:
        return {"rope": old, "ms_poe": self if layer >= self.first_layer else None}

    def rope_of(self, where: str, module, rope: Rope, query: Tensor, key: Tensor) -> Rope:
        """A prompt chooses the ratios; the tokens after it keep them."""
        chosen = module.__dict__.get("_fastpe_ratios")
        if query.shape[0] != 1:
            raise NotImplementedError(f"{where}: scaling MsPoE reads one text at a time, got a batch of {query.shape[0]}")
        if query.shape[2] != key.shape[2]:
            if chosen is None:
                raise ValueError(f"{where}: scaling MsPoE chooses its ratios from a prompt in one piece, which has not come")
        else:
            outliers = ropes.ms_poe_outliers(query, key)[0]
            chosen = ropes.ms_poe_ratios(outliers, self.low, self.high, assignment=self.assignment)
            replace(module, "_fastpe_ratios", chosen)
        return rope.replace(inv_freq=rope.inv_freq / chosen[:, None], dims="h", name="ms_poe")


@dataclasses.dataclass(frozen=True)
class AttentionBuckets:
    """Attention Buckets (arXiv 2312.04455) as `patch`'s scaling: the text is read once for each base, side by side, and the
    logits are weighted by the softmax of their largest. One text at a time.

    Args:
        bases: of the frequencies, one a bucket; those of the paper's tool use.

    >>> import torch, transformers, fastpe.integrations.transformers as hf
    >>> config = transformers.LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    >>> model = hf.patch(transformers.LlamaForCausalLM(config).eval(), scaling=hf.AttentionBuckets())
    >>> model.generate(torch.arange(2, 12)[None], max_new_tokens=2, do_sample=False, eos_token_id=None).shape
    torch.Size([1, 12])
    """

    bases: tuple[float, ...] = tuple(ropes.BUCKET_BASES)

    def settings(self, old: Rope, layer: int) -> dict:
        return {"rope": ropes.attention_buckets(old.rotary_dim, self.bases, layout=old.layout)}

    def forward(self, where: str) -> Callable:
        """The model's forward around all buckets."""
        n = len(self.bases)

        def forward(model, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
            if input_ids is None or input_ids.shape[0] != 1 or kwargs.get("labels") is not None:
                raise NotImplementedError(f"{where}: scaling AttentionBuckets reads input_ids of one text, without labels")
            many = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
            many = {what: None if x is None else x.expand(n, *x.shape[1:]) for what, x in many.items()}
            out = type(model).forward(model, **many, **kwargs)
            logits = out.logits
            mixed = [ropes.mix_buckets(logits[:, t]) for t in range(logits.shape[1])]
            out.logits = torch.stack(mixed)[None].to(logits.dtype)
            return out

        return forward


def unturned(settings: Settings, original: Callable) -> Callable:
    """Returns query and key as they are, for the attention call to turn."""
    names = tuple(inspect.signature(inspect.unwrap(original)).parameters)
    if names[0] == "q" or names[0] == "xq":

        def pair(q, k, *args, **kwargs):
            settings.turned = q.shape[-1]
            return q, k

        return pair

    def single(x, *args, **kwargs):
        settings.turned = x.shape[-1]
        return x

    return single


def rope_of(where: str, config, layer_type: str | None, layout: str, scaling: dict | None = None) -> Rope:
    """The model's rope from its config, with some of its parameters changed."""
    if scaling is not None:
        config = copy.copy(config)
        given = dict(config.rope_parameters)
        nested = isinstance(given.get(layer_type), dict) if layer_type else False
        old = given[layer_type] if nested else given
        new = {"rope_theta": old.get("rope_theta")} | scaling
        if "original_max_position_embeddings" not in new:
            new["original_max_position_embeddings"] = config.max_position_embeddings
        if old.get("partial_rotary_factor") is not None:
            new.setdefault("partial_rotary_factor", old["partial_rotary_factor"])
        config.rope_parameters = {**given, layer_type: new} if nested else new
    else:
        nested = any(isinstance(v, dict) for v in (getattr(config, "rope_parameters", None) or {}).values())
    try:
        rope = ropes.from_hf_config(config, layer_type=layer_type if nested else None, layout=layout, precision="float32")
    except (TypeError, ValueError) as error:
        what = "rope='fused'" if scaling is None else f"scaling {scaling}"
        raise NotImplementedError(f"{where}: {what} does not fit this model's config ({error})") from error
    if rope.axes != 1:
        raise NotImplementedError(f"{where}: rope='fused' needs one position a token, this model has {rope.axes}; use rope='op'")
    return rope
