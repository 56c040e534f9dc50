"""Attention over lists of keys and over pages: what their calls share, and `gather_attention`."""

from __future__ import annotations

import torch

from . import _check, config
from ._call import Call, OpBias
from ._cope import Contextual
from ._rope import Rope
from .attention import _LAYOUTS, _autocast, _check_kernels, _check_kinds, _check_qkv, _divide_by_temperature, _rotation, _row_scale, _sink
from .bias import FORMS, Bias
from .mask import Mask, causal
from .ops import aux_dtype

Tensor = torch.Tensor

# csrc/pos/bias.h: decode_takes.
_FORMS = {FORMS[name] for name in ("none", "linear", "signed", "abs", "log", "power", "logsq", "table", "table_causal")}


@torch.library.register_fake("fastpe::attn_decode")
def _(q, k, v, *rest):
    B, H, N, _ = q.shape
    channels = v.shape[3]
    out = q.new_empty(B, N, H, channels).transpose(1, 2) if q.stride(1) < q.stride(2) else q.new_empty(B, H, N, channels)
    return out, q.new_empty(q.shape[:3], dtype=aux_dtype(q.dtype))


def no_gradient(where: str, instead: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise NotImplementedError(f"{where}: has no gradient; call it under torch.no_grad(), or {instead}")


def _op_bias(call: Call, bias: Bias | None) -> OpBias:
    return OpBias() if bias is None else bias.op_args(call)


def takes(b: OpBias) -> bool:
    """Whether attn_decode has the kernels of a bias."""
    strips = (b.rows, b.cols, b.row_e, b.col_e)
    return b.form in _FORMS and (b.table is None or (b.u is None and b.w is None)) and all(x is None for x in strips)


def run(
    where: str, call: Call, query: Tensor, key: Tensor, value: Tensor, rotation, region, seen, *, bias=None, scale=None, head_scale=None, row_scale=None,
    softcap=None, softcap_includes_bias=False, temperature=None, sink=None, return_lse=False, pages=None, lengths=None, index=None, turn=None, more=(),
    b=None,
):  # fmt: skip
    """One call of torch.ops.fastpe.attn_decode. rotation: q table, k table, layout id; region: its plan or None; more: keys
    turned for the regions after the first, where keys are stored turned (the k table is None then); b: op arguments of the bias,
    if they are known."""
    if isinstance(bias, Contextual):
        raise NotImplementedError(f"{where}: bias {type(bias).__name__} reads every earlier key; use fastpe.attention")
    _check_kernels(query.device.type, query.dtype, where, "pages or lists of keys")
    b = _op_bias(call, bias) if b is None else b
    if not takes(b):
        raise NotImplementedError(
            f"{where}: bias {type(bias).__name__} does not go with lists and pages of keys; use fastpe.attention on contiguous keys"
        )
    scale = query.shape[3] ** -0.5 if scale is None else _check.number(where, "scale", scale)
    if softcap_includes_bias and softcap is None:
        raise ValueError(f"{where}: softcap_includes_bias without softcap")
    softcap = 0.0 if softcap is None else _check.number(where, "softcap", softcap, positive=True)
    if region is not None:
        scale *= region.amplitude
        if region.row_factor is not None:
            row_scale = region.row_factor if row_scale is None else row_scale * region.row_factor.to(row_scale.dtype)
    rho, scale = _row_scale(call, head_scale, row_scale, scale)
    softcap_mul = softcap
    if temperature is not None:
        b, rho, scale, softcap_mul = _divide_by_temperature(call, temperature, b, rho, scale, softcap, softcap_includes_bias)
    if sink is not None:
        if bias is not None and bias.shifts_rows:
            raise NotImplementedError(f"{where}: sink does not go with a bias without its row term, {type(bias).__name__}; use row_term=True")
        sink = _sink(call, sink)
    no_gradient(where, "use fastpe.attention", query, key, value, *rotation[:2], rho, sink, b.params, b.gamma, b.u, b.w, b.table, b.omega, b.dense)
    out, lse = torch.ops.fastpe.attn_decode(
        query, key, value, *rotation,
        b.form, b.params, b.gamma, b.u, b.w, b.base, b.table,
        seen.left, seen.right, seen.sinks, seen.q_ids, seen.k_ids, seen.mask,
        rho, sink, scale, softcap, softcap_mul, config.skip_bound_for(query.dtype),
        b.pieces, b.omega, b.rows, b.cols, b.index, b.dense, softcap_includes_bias,
        b.factor, b.pairs, b.q_seg, b.k_seg,
        seen.intervals, seen.lower, seen.q_seg, seen.k_seg, seen.relation, seen.block_map, seen.block_q, seen.block_k,
        0 if region is None else region.kind, 1 if region is None else region.size,
        b.row_q, b.row_e, b.col_k, b.col_e, pages, lengths, index, turn, list(more),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def gather_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    *,
    rope: Rope | None = None,
    bias: Bias | None = None,
    mask: Mask | None = None,
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    scale: float | None = None,
    head_scale: Tensor | float | None = None,
    row_scale: Tensor | None = None,
    softcap: float | None = None,
    softcap_includes_bias: bool = False,
    temperature: Tensor | float | None = None,
    sink: Tensor | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every row over its own list of keys, at the cost of the keys listed.

    Row i of head h attends to the keys index[b, h, i]; everything else is as in `fastpe.attention`, and a key keeps its index for
    mask and bias. A key listed twice counts twice. For retrieval (LongHeads, Landmark, Extended Mind) and for eviction and sparse
    decoding (Loki, A2ATS, Squeezed, H2O).

    Args:
        query: (B, H, Nq, D) as in `fastpe.attention`.
        key: (B, Hk, Nk, D).
        value: (B, Hk, Nk, Dv).
        index: (B | 1, H | Hk | 1, Nq | 1, n) integers: indices of keys, -1 for none. With Hk heads a list serves the query heads of
            its key head, which then share each key read.
        rope: rotary embedding; key is un-rotated.
        bias: additive bias by the keys' own indices (`fastpe.bias`; not Fire, RowTable, ColTable, Cope or a table over
            positions).
        mask: visibility by the keys' own indices.
        positions: (Nq,) or (B, Nq) of the queries, for rope. Default: I = i + Nk - Nq.
        key_positions: new positions of the listed keys, for rope: (n,) or of index's shape, integers or floats. Default: a key's
            index. LongHeads and Landmark retrieval renumber the keys they fetch.
        scale, head_scale, row_scale, softcap, softcap_includes_bias, temperature, sink, is_causal, return_lse: as in
            `fastpe.attention`.

    Returns:
        out (B, H, Nq, Dv), and with return_lse also lse (B, H, Nq). A row without a listed visible key gives out 0, lse -inf.

    Raises:
        TypeError, ValueError: named after the argument. RuntimeError: an index outside [-1, Nk), on the CPU; on a GPU, which would have
            to be waited for, such a key is not visible.
        NotImplementedError: an input requires grad (no released method needs one), or a bias that lists do not take.

    >>> import torch, fastpe
    >>> q, k = torch.randn(1, 4, 2, 16), torch.randn(1, 2, 1000, 16)
    >>> best = (q.view(1, 2, 2, 2, 16).mean(2) @ k.transpose(2, 3)).topk(8).indices   # 8 keys for each key head and row
    >>> fastpe.gather_attention(q, k, k, best, rope=fastpe.rope.default(16)).shape
    torch.Size([1, 4, 2, 16])
    """
    where = "fastpe.gather_attention"
    _check_kinds(rope, bias, mask, None, is_causal, return_lse, softcap_includes_bias)
    query, key, value = _autocast(query, key, value)
    B, H, Nq, D, Nk = _check_qkv(query, key, value)
    Hk = key.shape[1]
    _check.is_integer(where, "index", index)
    _check.on_device(where, "index", index, query.device)
    if index.dim() != 4 or index.shape[0] not in (1, B) or index.shape[1] not in (1, Hk, H) or index.shape[2] not in (1, Nq):
        raise ValueError(
            f"{where}: index must be (B | 1, H | Hk | 1, Nq | 1, n), here ({B} or 1, {H}, {Hk} or 1, {Nq} or 1, n), got {_check.shape(index)}"
        )
    if is_causal:
        mask = causal() if mask is None else mask & causal()
    call = Call(B, H, Nq, Nk, mask is not None and mask.is_causal, aux_dtype(query.dtype), query.device)
    seen = (Mask() if mask is None else mask).op_args(call)
    turn = None
    if key_positions is None and rope is not None and positions is None and index.numel() < Nk:
        # Angles of the listed keys alone, an entry each; the last query tells the length, as among all keys.
        turn = torch.arange(index.numel(), dtype=torch.int32, device=call.device).reshape(index.shape)
        at = index.reshape(-1).clamp(min=0)
        if rope.rotary_dim > D:
            raise ValueError(f"{where}: rope turns {rope.rotary_dim} channels, query has {D}")
        tables = rope.tables(call.query_index(), at, Nq, at.shape[0], B, H, Hk, out_dtype=call.dtype, device=call.device, where=where)
        rotation = *tables, _LAYOUTS[rope.layout]
    elif key_positions is None:
        rotation = _rotation(call, rope, positions, None if positions is None else call.key_index(), D, Hk)
    else:
        _check.is_tensor(where, "key_positions", key_positions)
        if rope is None:
            raise ValueError(f"{where}: key_positions are for rope, which is None")
        if bias is not None:
            raise NotImplementedError(f"{where}: bias goes by the keys' own indices and does not go with new key_positions; give one of them")
        if key_positions.shape not in (index.shape, index.shape[-1:]):
            raise ValueError(f"{where}: key_positions must be ({index.shape[-1]},) or index's {_check.shape(index)}, got {_check.shape(key_positions)}")
        if call.device.type == "cuda":  # how many positions are in use would have to be waited for
            used, turn = key_positions.reshape(-1), torch.arange(key_positions.numel(), device=call.device).reshape(key_positions.shape)
        else:  # one row of the table for each position in use
            used, turn = torch.unique(key_positions, return_inverse=True)
        turn = turn.to(torch.int32).reshape(*(1,) * (4 - turn.dim()), *turn.shape)
        own = call.query_index() if positions is None else positions
        tables = rope.tables(own, used, Nq, used.shape[0], B, H, Hk, out_dtype=call.dtype, device=call.device, where=where)
        rotation = *tables, _LAYOUTS[rope.layout]
    return run(
        where, call, query, key, value, rotation, None, seen, bias=bias, scale=scale, head_scale=head_scale, row_scale=row_scale,
        softcap=softcap, softcap_includes_bias=softcap_includes_bias, temperature=temperature, sink=sink, return_lse=return_lse,
        index=index.to(torch.int32).contiguous(), turn=turn,
    )  # fmt: skip
