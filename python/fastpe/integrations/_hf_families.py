"""Attention of the model families that transformers does not hand over, and biases that stay compact on their way to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..bias import T5, Bias, RelativeFn, RelativeTable, t5_bucket

Tensor = torch.Tensor


# ---------------------------------------------------------------------------------------------------------------------
# What may stand in for a dense position_bias


class PositionBias:
    """A bias that models pass along without looking at it."""

    def of(self, offset: int | Tensor, rows: int, keys: int) -> Bias | None:
        """The bias of a call whose row 0 stands at index `offset` of the keys."""
        raise NotImplementedError


class NoBias(PositionBias):
    """In place of the zeros that layers without a table pass."""

    def of(self, offset, rows, keys):
        return None


@dataclasses.dataclass(frozen=True, eq=False)
class TableBias(PositionBias):
    """T5's bucket table (buckets, H), in place of the dense bias made of it."""

    table: Tensor
    bidirectional: bool
    max_distance: int

    def of(self, offset, rows, keys):
        if isinstance(offset, int) and offset + rows == keys:
            return T5(self.table, self.bidirectional, self.max_distance)
        # Rows that are not the last keys: a static cache while tracing, or keys of another text.
        device = self.table.device
        reach = torch.arange(-self.max_distance, self.max_distance + 1, device=device)
        bucket = t5_bucket(
            reach, bidirectional=self.bidirectional, num_buckets=self.table.shape[0], max_distance=self.max_distance
        )
        rows_at = torch.arange(rows, device=device) + offset
        return RelativeTable(self.table[bucket].t(), positions=rows_at, key_positions=torch.arange(keys, device=device))


@dataclasses.dataclass(frozen=True, eq=False)
class KeyBias(PositionBias):
    """A bias by key (B | 1, H, Nk), as Bloom, Falcon and MPT state ALiBi.

    A number per row does not change a softmax, so b_j is passed as b_j - b_I: what is far then is small, and the kernels
    skip tiles that have decayed.
    """

    values: Tensor

    def of(self, offset, rows, keys):
        return RelativeFn("signed", key_values=-self.values[..., :keys])


# ---------------------------------------------------------------------------------------------------------------------
# Forwards. Each does what the class of its name does up to the scores, and calls `attend` instead of forming them.

Attend = Callable[..., tuple[Tensor, None]]


def _update(cache, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    return (key, value) if cache is None else cache.update(key, value, layer)


def _rate(dropout: float, module: torch.nn.Module) -> float:
    return dropout if module.training else 0.0


def mpt(attend: Attend):
    def forward(self, hidden_states, position_bias, past_key_values=None, attention_mask=None, **kwargs):
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        heads = (x.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2) for x in mixed.chunk(3, dim=-1))
        query, key, value = heads
        key, value = _update(past_key_values, key, value, self.layer_idx)
        keys = key.shape[2]
        if position_bias is not None:
            if position_bias.shape[-1] < keys:
                raise ValueError(
                    f"MptAttention: {keys} keys, but config.max_seq_len is {position_bias.shape[-1]}; raise it, ALiBi has no other limit"
                )
            position_bias = KeyBias(position_bias[None, :, 0, position_bias.shape[-1] - keys :])
        out, _ = attend(
            self, query, key, value, attention_mask, dropout=_rate(self.attn_dropout_p, self), scaling=self.softmax_scale,
            position_bias=position_bias,
        )  # fmt: skip
        return self.out_proj(out.flatten(2)), None

    return forward


def bloom(attend: Attend):
    def forward(
        self, hidden_states, residual, alibi, attention_mask, layer_past=None, use_cache=False, output_attentions=False, **kwargs
    ):
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        key, value = _update(layer_past, key, value, self.layer_idx)
        out, _ = attend(
            self, query, key, value, attention_mask, dropout=_rate(self.attention_dropout.p, self), scaling=self.inv_norm_factor,
            position_bias=KeyBias(alibi.unflatten(0, (-1, self.num_heads))[:, :, 0]), output_attentions=output_attentions,
        )  # fmt: skip
        # slow_but_exact sums the same product in slices.
        return F.dropout(self.dense(out.flatten(2)), self.hidden_dropout, self.training) + residual, None

    return forward


def falcon(attend: Attend):
    def forward(
        self, hidden_states, alibi, attention_mask, position_ids=None, layer_past=None, use_cache=False, output_attentions=False,
        position_embeddings=None, **kwargs,
    ):  # fmt: skip
        fused = self.query_key_value(hidden_states)
        if self.new_decoder_architecture:
            # Keys and values stay one per group, in the cache too.
            fused = fused.unflatten(-1, (self.num_kv_heads, -1, self.head_dim))
            query, key, value = fused[..., :-2, :].flatten(2, 3), fused[..., -2, :], fused[..., -1, :]
        else:
            query, key, value = self._split_heads(fused)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        bias = None
        if alibi is None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)  # noqa: F821  a global of the model's module
        else:
            bias = KeyBias(alibi.reshape(-1, self.num_heads, alibi.shape[-1]) * self.inv_norm_factor)
        if attention_mask is not None and attention_mask.dim() == 3:
            attention_mask = attention_mask[:, None]  # undoes falcon_mask
        key, value = _update(layer_past, key, value, self.layer_idx)
        dropout = 0.0 if alibi is None else _rate(self.attention_dropout.p, self)
        out, _ = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.inv_norm_factor, position_bias=bias,
            position_ids=position_ids, use_cache=use_cache, output_attentions=output_attentions,
        )  # fmt: skip
        return self.dense(out.flatten(2)), None

    return forward


def gptj(attend: Attend):
    """`_attn` of GPT-J and CodeGen, which takes and gives (B, H, N, D)."""

    def _attn(self, query, key, value, attention_mask=None):
        out, _ = attend(
            self, query.to(value.dtype), key.to(value.dtype), value, attention_mask, dropout=_rate(self.attn_dropout.p, self),
            scaling=1.0 / self.scale_attn, is_causal=True,
        )  # fmt: skip
        return out.transpose(1, 2), None

    return _attn


# Class of the attention module -> (the method that is replaced, what makes the new one).
FORWARDS = {
    "MptAttention": ("forward", mpt),
    "BloomAttention": ("forward", bloom),
    "FalconAttention": ("forward", falcon),
    "GPTJAttention": ("_attn", gptj),
    "CodeGenAttention": ("_attn", gptj),
}


class Converted:
    """A mask whose conversion to another dtype is itself: MPT turns its mask into bool before its layers see it."""

    def __init__(self, mask: Tensor | None):
        self.mask = mask

    def to(self, dtype) -> Tensor | None:
        return self.mask


def mpt_mask(create: Callable) -> Callable:
    def create_causal_mask(*args, **kwargs):
        return Converted(create(*args, **kwargs))

    return create_causal_mask


def falcon_mask(create: Callable) -> Callable:
    """Falcon adds its ALiBi to masks of 4 dimensions."""

    def create_causal_mask(*args, **kwargs):
        mask = create(*args, **kwargs)
        return mask[:, 0] if mask is not None and mask.dim() == 4 and mask.dtype == torch.int32 else mask

    return create_causal_mask


# Class of the model whose forward makes the masks -> what replaces create_causal_mask in it.
MASKS = {"MptModel": mpt_mask, "FalconModel": falcon_mask}

# Attention modules with T5's table. UDOP adds further biases to its own and keeps the dense form.
TABLES = {
    "T5Attention", "MT5Attention", "UMT5Attention", "LongT5Attention", "SwitchTransformersAttention", "Pop2PianoAttention",
}  # fmt: skip


def compute_bias(self, query_length, key_length, device=None, past_seen_tokens=0) -> TableBias:
    """T5Attention.compute_bias without the dense tensor."""
    return TableBias(self.relative_attention_bias.weight, not self.is_decoder, self.relative_attention_max_distance)


def compute_no_bias(self, query_length, key_length, device=None, past_seen_tokens=0) -> NoBias:
    return NoBias()
