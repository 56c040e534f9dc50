"""The attention call: objects to op arguments, and every check on the way."""

from __future__ import annotations

import dataclasses

import torch

from . import _check, config
from ._call import Call, OpBias, OpMask, RegionPlan
from ._cope import Contextual
from ._rope import Rope
from .bias import FORMS, Bias
from .mask import Mask, causal
from .ops import aux_dtype
from .region import Region

Tensor = torch.Tensor

_WHERE = "fastpe.attention"
_LAYOUTS = {"half": 0, "interleaved": 1}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    rope: Rope | None = None,
    bias: Bias | None = None,
    mask: Mask | None = None,
    region: Region | None = None,
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
    """Softmax attention with position inside the tile: linear memory, forward and backward.

    With I = i + Nk - Nq the index of query row i among the keys (causal is bottom-right aligned), the score is formed in
    this order:

        x = scale * head_scale * row_scale * <rotate(q_i), rotate(k_j)>
        x = x * omega_ij                               if the bias has a multiplicative kernel (`fastpe.bias.Kerple`)
        x = softcap * tanh(x / softcap)                if softcap
        s = (x + bias_ij) / temperature                softcap_includes_bias: softcap * tanh((x + bias_ij) / softcap) / temperature
        s = -inf where not visible
        out_i = sum_j softmax_j(s) v_j                 sink: one more logit in the denominator, divided by nothing

    A row that sees no key gives out 0, lse -inf (the sink, if there is one) and no gradient.

    Args:
        query: (B, H, Nq, D) float32, bfloat16, float16 or float64; D from 8 to 256 in steps of 8. Any strides with a
            contiguous last dimension, so (B, N, H, D) storage seen through transpose(1, 2) costs no copy.
        key: (B, Hk, Nk, D), H a multiple of Hk; query head h reads key head h // (H // Hk).
        value: (B, Hk, Nk, Dv), Dv from 8 to 256 in steps of 8.
        rope: rotary embedding of query and key (`fastpe.rope`).
        bias: additive bias (`fastpe.bias`), not scaled by `scale`. Biases add up with `+`.
        mask: visibility (`fastpe.mask`).
        region: sets of positions for near and far keys (`fastpe.region`); needs a rope, whose angles it chooses.
        positions: positions for `rope`: of the queries, and of the keys too when key_positions is absent and Nq = Nk.
            (N,) or (B, N); see `Rope.tables`. Default: queries are the last Nq of positions 0..Nk-1. Biases carry their own.
        key_positions: positions of the keys.
        scale: default 1 / sqrt(D).
        head_scale: a number, or (H,) or (B, H) float. Differentiable.
        row_scale: (Nq,) or (B | 1, H | 1, Nq) float. Differentiable.
        softcap: C > 0 (50 in Gemma 2).
        softcap_includes_bias: cap scores and bias together, the order of x-transformers; needs softcap.
        temperature: a positive number, or (H,) float, dividing scores and bias. Differentiable. A tensor does not go with softcap.
        sink: (H,) float, one logit per head. Differentiable.
        is_causal: the same as mask & fastpe.mask.causal().
        return_lse: also return the natural-log sum of exponentials.

    Returns:
        out: (B, H, Nq, Dv), query's dtype and memory order.
        lse: (B, H, Nq) float32 (float64 for float64), differentiable.

    Under autocast query, key and value are cast to its dtype as in scaled_dot_product_attention; parameters stay float32.

    Raises:
        TypeError, ValueError: named after the argument, with what was expected and what came.
        NotImplementedError: two things that do not go together.

    >>> import torch, fastpe
    >>> q, k, v = (torch.randn(1, 4, 10, 16) for _ in range(3))
    >>> out = fastpe.attention(q, k, v, bias=fastpe.bias.Alibi(4), is_causal=True)
    >>> out, lse = fastpe.attention(q, k, v, mask=fastpe.mask.window(4, right=1), softcap=30.0, return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([1, 4, 10, 16]), torch.Size([1, 4, 10]))
    """
    _check_kinds(rope, bias, mask, region, is_causal, return_lse, softcap_includes_bias)
    query, key, value = _autocast(query, key, value)
    B, H, Nq, D, Nk = _check_qkv(query, key, value)
    _check_kernels(query.device.type, query.dtype, halves_for=f"bias {type(bias).__name__}" if isinstance(bias, Contextual) else None)
    ready = _ready(
        query, key, D, rope=rope, bias=bias, mask=mask, region=region, positions=positions, key_positions=key_positions, scale=scale,
        row_scale=row_scale, softcap=softcap, softcap_includes_bias=softcap_includes_bias, is_causal=is_causal,
    )  # fmt: skip
    if isinstance(bias, Contextual):
        if not ready.seen.banded:
            raise NotImplementedError(
                f"{_WHERE}: mask intervals, segments and block lists do not go with bias {type(bias).__name__}; use fastpe.mask.dense"
            )
        others = {"head_scale": head_scale, "row_scale": row_scale, "softcap": softcap, "temperature": temperature}
        out, lse = _contextual(ready.call, ready.query, ready.key, value, bias, ready.rotation, ready.seen, ready.scale, sink, others)
        return (out, lse) if return_lse else out
    out, lse = _fwd(ready, value, bias, head_scale, temperature, sink, softcap_includes_bias)
    return (out, lse) if return_lse else out


@dataclasses.dataclass(frozen=True)
class _Ready:
    """A call whose positions, visibility and plain numbers are settled."""

    call: Call
    query: Tensor
    key: Tensor
    rotation: tuple[Tensor | None, Tensor | None, int]  # q tables, k tables, layout id
    plan: RegionPlan | None
    seen: OpMask
    scale: float
    row_scale: Tensor | None
    softcap: float  # 0: none


def _ready(
    query, key, D, *, rope, bias, mask, region, positions, key_positions, scale, row_scale, softcap, softcap_includes_bias, is_causal
) -> _Ready:
    (B, H, Nq, _), (_, Hk, Nk, _) = query.shape, key.shape
    scale = D**-0.5 if scale is None else _check.number(_WHERE, "scale", scale)
    if softcap_includes_bias and softcap is None:
        raise ValueError(f"{_WHERE}: softcap_includes_bias without softcap")
    softcap = 0.0 if softcap is None else _check.number(_WHERE, "softcap", softcap, positive=True)

    if is_causal:
        mask = causal() if mask is None else mask & causal()
    causal_only = mask is not None and mask.is_causal
    call = Call(B, H, Nq, Nk, causal_only, aux_dtype(query.dtype), query.device)

    plan = None if region is None else _plan(call, region, rope, bias, positions, key_positions)
    if plan is None:
        q_rope, k_rope, layout = _rotation(call, rope, positions, key_positions, D, Hk)
    else:
        q_rope, k_rope, layout = _region_rotation(call, rope, region, plan, D, Hk)
        scale *= plan.amplitude
        if plan.row_factor is not None:
            row_scale = plan.row_factor if row_scale is None else row_scale * plan.row_factor.to(row_scale.dtype)
    if rope is not None and torch.is_grad_enabled() and (q_rope.requires_grad or k_rope.requires_grad):
        # Learned angles need the gradient of the rotated tensors, which the attention kernels never hold.
        if plan is not None:
            raise NotImplementedError(f"{_WHERE}: region does not go with a rope or positions that require grad; detach them")
        query, key = torch.ops.fastpe.rotate_pair(query, key, q_rope, k_rope, layout, False)
        q_rope = k_rope = None
    seen = Mask().op_args(call) if mask is None else mask.op_args(call)
    return _Ready(call, query, key, (q_rope, k_rope, layout), plan, seen, scale, row_scale, softcap)


def _op_args(r: _Ready, bias: Bias | None, head_scale, temperature, sink, softcap_includes_bias: bool) -> tuple[tuple, bool]:
    """The arguments of torch.ops.fastpe.attn_fwd between value and keep_residual, and whether one of them learns."""
    call, seen, plan = r.call, r.seen, r.plan
    b = OpBias() if bias is None else bias.op_args(call)
    rho, scale = _row_scale(call, head_scale, r.row_scale, r.scale)
    softcap_mul = r.softcap
    if temperature is not None:
        b, rho, scale, softcap_mul = _divide_by_temperature(call, temperature, b, rho, scale, r.softcap, softcap_includes_bias)
    if sink is not None:
        if bias is not None and bias.shifts_rows:
            raise NotImplementedError(
                f"{_WHERE}: sink does not go with a bias without its row term, {type(bias).__name__}: the sink's share of a row "
                "depends on it; use row_term=True"
            )
        sink = _sink(call, sink)
    args = (
        *r.rotation,
        b.form, b.params, b.gamma, b.u, b.w, b.base, b.table,
        seen.left, seen.right, seen.sinks, seen.q_ids, seen.k_ids, seen.mask,
        rho, sink, scale, r.softcap, softcap_mul, config.skip_bound_for(r.query.dtype),
        b.pieces, b.omega, b.rows, b.cols, b.index, b.dense, softcap_includes_bias,
        b.factor, b.pairs, b.q_seg, b.k_seg,
        seen.intervals, seen.lower, seen.q_seg, seen.k_seg, seen.relation, seen.block_map, seen.block_q, seen.block_k,
        0 if plan is None else plan.kind, 1 if plan is None else plan.size,
        b.row_q, b.row_e, b.col_k, b.col_e,
    )  # fmt: skip
    learned = (
        b.params, b.gamma, b.u, b.w, b.table, b.pieces, b.omega, b.rows, b.cols, b.dense, b.factor, b.pairs,
        b.row_q, b.row_e, b.col_k, b.col_e, rho, sink,
    )  # fmt: skip
    return args, torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in learned)


def _fwd(ready: _Ready, value: Tensor, bias: Bias | None, head_scale, temperature, sink, softcap_includes_bias: bool) -> tuple[Tensor, Tensor]:
    args, learned = _op_args(ready, bias, head_scale, temperature, sink, softcap_includes_bias)
    # In 16 bits, gradients of parameters need what rounding took from out (csrc/core/params.h: residual).
    out, lse, _ = torch.ops.fastpe.attn_fwd(ready.query, ready.key, value, *args, learned)
    return out, lse


def _contextual(call: Call, query, key, value, bias: Contextual, rotation, seen: OpMask, scale: float, sink, others):
    """out and lse of a call whose bias reads query and key."""
    what = type(bias).__name__
    for name in ("head_scale", "temperature"):
        if isinstance(others[name], Tensor):
            raise NotImplementedError(f"{_WHERE}: a {name} tensor does not go with bias {what}; use a number")
    for name, instead in (("row_scale", "scale the rows of query, which scales their gates too"), ("softcap", "leave it out")):
        if others[name] is not None:
            raise NotImplementedError(f"{_WHERE}: {name} does not go with bias {what}; {instead}")
    args = bias.cope_args(call, query, key, value)
    table_scale = args.table_scale
    if others["head_scale"] is not None:
        scale *= _check.number(_WHERE, "head_scale", others["head_scale"])
    if others["temperature"] is not None:
        temperature = _check.number(_WHERE, "temperature", others["temperature"], positive=True)
        scale, table_scale = scale / temperature, table_scale / temperature
    if sink is not None:
        sink = _sink(call, sink)
    inputs = (query, key, value, args.gate_q, args.gate_k, args.table)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, sink))
    out, lse, _, _ = torch.ops.fastpe.cope_fwd(
        *inputs, *rotation, seen.left, seen.right, seen.sinks, seen.q_ids, seen.k_ids, seen.mask,
        sink, scale, args.gate_scale, table_scale, training,
    )  # fmt: skip
    return out, lse


def _check_kinds(rope, bias, mask, region, is_causal, return_lse, softcap_includes_bias) -> None:
    for what, x, kind, how in (
        ("rope", rope, Rope, "a fastpe.rope object"),
        ("bias", bias, Bias, "a fastpe.bias object (fastpe.bias.Dense wraps a tensor)"),
        ("mask", mask, Mask, "a fastpe.mask object (fastpe.mask.dense wraps a bool tensor)"),
        ("region", region, Region, "a fastpe.region object"),
        ("is_causal", is_causal, bool, "a bool"),
        ("return_lse", return_lse, bool, "a bool"),
        ("softcap_includes_bias", softcap_includes_bias, bool, "a bool"),
    ):
        if x is not None and not isinstance(x, kind):
            raise TypeError(f"{_WHERE}: {what} must be {how}, got {type(x).__name__}")


def _autocast(query: Tensor, key: Tensor, value: Tensor, where: str = _WHERE) -> tuple[Tensor, Tensor, Tensor]:
    for what, x in (("query", query), ("key", key), ("value", value)):
        _check.is_float(where, what, x)
    device = query.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))


def _check_kernels(device: str, dtype: torch.dtype, where: str = _WHERE, halves_for: str | None = None) -> None:
    """What the CUDA kernels do not have. halves_for: what they take 16-bit numbers alone for."""
    if device != "cuda" or dtype in (torch.bfloat16, torch.float16) or (dtype == torch.float32 and halves_for is None):
        return
    wanted = "float32, bfloat16 or float16" if halves_for is None else "bfloat16 or float16"
    what = "" if halves_for is None else f" with {halves_for}"
    raise NotImplementedError(f"{where}: query on a GPU{what} must be {wanted}, got {_check.name(dtype)}; cast query, key and value, or call on the CPU")


def _check_qkv(query: Tensor, key: Tensor, value: Tensor, where: str = _WHERE) -> tuple[int, int, int, int, int]:
    for what, x in (("query", query), ("key", key), ("value", value)):
        if x.layout != torch.strided or x.is_nested:
            raise TypeError(f"{where}: {what} must be a dense strided tensor")
        if x.dim() != 4:
            raise ValueError(f"{where}: {what} must have 4 dimensions (batch, heads, tokens, channels), got {_check.shape(x)}")
    for what, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(f"{where}: {what} is {_check.name(x.dtype)}, query is {_check.name(query.dtype)}")
        _check.on_device(where, what, x, query.device)
    B, H, Nq, D = query.shape
    _, Hk, Nk, Dv = value.shape
    for what, x in (("key", key), ("value", value)):
        if x.shape[0] != B:
            raise ValueError(f"{where}: {what} has batch size {x.shape[0]}, query has {B}")
    if H < 1:
        raise ValueError(f"{where}: query has no heads")
    if key.shape[1] != Hk:
        raise ValueError(f"{where}: value has {Hk} heads, key has {key.shape[1]}")
    if Hk < 1 or H % Hk:
        raise ValueError(f"{where}: key has {Hk} heads, which does not divide query's {H}")
    if key.shape[2] != Nk:
        raise ValueError(f"{where}: value has {Nk} tokens, key has {key.shape[2]}")
    if key.shape[3] != D:
        raise ValueError(f"{where}: key has {key.shape[3]} channels, query has {D}")
    for what, channels in (("query", D), ("value", Dv)):
        if not 8 <= channels <= 256 or channels % 8:
            raise ValueError(f"{where}: {what} must have 8 to 256 channels in steps of 8, got {channels}")
    for what, x in (("query", query), ("key", key), ("value", value)):
        if x.stride(3) != 1:
            raise ValueError(
                f"{where}: {what}'s last dimension must be contiguous, its stride is {x.stride(3)}; pass {what}.contiguous()"
            )
    return B, H, Nq, D, Nk


def _rotation(call: Call, rope: Rope | None, positions, key_positions, D: int, Hk: int, where: str = _WHERE):
    """q table, k table, layout id."""
    if rope is None:
        for what, x in (("positions", positions), ("key_positions", key_positions)):
            if x is not None:
                raise ValueError(f"{where}: {what} are for rope, which is None; a bias takes its own positions")
        return None, None, 0
    if rope.rotary_dim > D:
        raise ValueError(f"{where}: rope turns {rope.rotary_dim} channels, query has {D}")
    tables = rope.tables(
        positions, key_positions, call.Nq, call.Nk, call.B, call.H, Hk, out_dtype=call.dtype, device=call.device, where=where
    )
    return *tables, _LAYOUTS[rope.layout]


def _plan(call: Call, region: Region, rope, bias, positions, key_positions) -> RegionPlan:
    if rope is None:
        raise ValueError(f"{_WHERE}: region chooses positions for rope, which is None")
    for what, x in (("positions", positions), ("key_positions", key_positions)):
        if x is not None:
            raise ValueError(f"{_WHERE}: {what} and region both say where tokens are; give one of them")
    if isinstance(bias, Contextual):
        raise NotImplementedError(f"{_WHERE}: region does not go with bias {type(bias).__name__}")
    return region.plan(call)


def _region_rotation(call: Call, rope: Rope, region: Region, plan: RegionPlan, D: int, Hk: int):
    """q tables of all regions one after the other, k tables (one or one a region; None where keys are turned already), layout id."""
    if rope.rotary_dim > D:
        raise ValueError(f"{_WHERE}: rope turns {rope.rotary_dim} channels, query has {D}")
    rope = region.fit(rope, call)

    def tables(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        sizes = query.shape[-1], key.shape[-1], call.B, call.H, Hk
        return rope.tables(query, key, *sizes, out_dtype=call.dtype, device=call.device)

    if not plan.key:
        at = torch.cat(torch.broadcast_tensors(*plan.query), -1)
        table = rope.one_table(_WHERE, at, at.shape[-1], call.B, call.H, call.dtype, call.device, kv_heads=Hk)
        table = table.unflatten(3, (len(plan.query), -1)).movedim(3, 0)
        return table.flatten(0, 1).contiguous(), None, _LAYOUTS[rope.layout]
    if len(plan.key) == 1:
        first, k_rope = tables(plan.query[0], plan.key[0])
        # Asked for one set of positions on both sides, a rope forms its angles once.
        return _one_after_the_other([first, *(tables(q, q)[0] for q in plan.query[1:])]), k_rope, _LAYOUTS[rope.layout]
    q_rope, k_rope = (_one_after_the_other(x) for x in zip(*map(tables, plan.query, plan.key)))
    return q_rope, k_rope, _LAYOUTS[rope.layout]


def _one_after_the_other(tables: list[Tensor]) -> Tensor:
    """(2, B|1, H|1, N, J) each -> (2 R, B|1, H|1, N, J)."""
    return torch.cat(torch.broadcast_tensors(*tables))


def _row_scale(call: Call, head_scale, row_scale, scale: float) -> tuple[Tensor | None, float]:
    """head_scale * row_scale as one (B|1, H|1, Nq|1) tensor, or None; a plain number joins `scale`."""
    rho = None
    if isinstance(head_scale, Tensor):
        _check.is_float(_WHERE, "head_scale", head_scale)
        if head_scale.dim() not in (1, 2):
            raise ValueError(f"{_WHERE}: head_scale must be a number, (H,) or (B, H), got {_check.shape(head_scale)}")
        head_scale = head_scale if head_scale.dim() == 2 else head_scale[None]
        call.fits(_WHERE, "head_scale", head_scale.shape, ("batch entries", call.B), ("heads", call.H))
        rho = call.aux(_WHERE, "head_scale", head_scale)[..., None]
    elif head_scale is not None:
        scale *= _check.number(_WHERE, "head_scale", head_scale)
    if row_scale is not None:
        _check.is_float(_WHERE, "row_scale", row_scale)
        if row_scale.dim() not in (1, 3):
            raise ValueError(f"{_WHERE}: row_scale must be (Nq,) or (B, H, Nq), got {_check.shape(row_scale)}")
        row_scale = row_scale if row_scale.dim() == 3 else row_scale[None, None]
        axes = ("batch entries", call.B), ("heads", call.H), ("queries", call.Nq)
        call.fits(_WHERE, "row_scale", row_scale.shape, *axes)
        row_scale = call.aux(_WHERE, "row_scale", row_scale)
        rho = row_scale if rho is None else rho * row_scale
    return (None if rho is None else rho.contiguous()), scale


def _divide_by_temperature(call: Call, temperature, b: OpBias, rho, scale: float, softcap: float, capped_bias: bool):
    """Folds 1 / temperature into what multiplies the scores and into the bias; a cap of both takes it alone."""
    softcap_mul = softcap
    if isinstance(temperature, Tensor):
        _check.is_float(_WHERE, "temperature", temperature)
        if temperature.dim() > 1:
            raise ValueError(f"{_WHERE}: temperature must be a number or (H,), got {_check.shape(temperature)}")
        if softcap:
            raise NotImplementedError(f"{_WHERE}: a temperature tensor does not go with softcap; use a number")
        inverse = temperature.reshape(-1)
        call.fits(_WHERE, "temperature", inverse.shape, ("heads", call.H))
        inverse = 1 / call.aux(_WHERE, "temperature", inverse)[None, :, None]
        rho = inverse if rho is None else rho * inverse
    else:
        inverse = 1 / _check.number(_WHERE, "temperature", temperature, positive=True)
        if softcap:
            softcap_mul *= inverse
        else:
            scale *= inverse
    return (b if capped_bias else _divided(call, b, inverse)), rho, scale, softcap_mul


def _divided(call: Call, b: OpBias, inverse: Tensor | float) -> OpBias:
    """Every additive part of a bias times `inverse`, a number or (1, H, 1)."""
    per_head = inverse[0] if isinstance(inverse, Tensor) else inverse
    each = inverse[..., None] if isinstance(inverse, Tensor) else inverse
    parts = {what: getattr(b, what) * each for what in ("rows", "cols", "row_q", "col_k", "dense", "pairs") if getattr(b, what) is not None}
    if b.pieces is not None:
        start, slope, intercept = b.pieces
        parts["pieces"] = torch.stack(torch.broadcast_tensors(start, slope * per_head, intercept * per_head))
    elif b.table is not None:
        parts["table"] = b.table * per_head
    elif b.form != FORMS["none"]:
        one = torch.ones(1, 1, 1, dtype=call.dtype, device=call.device) if b.gamma is None else b.gamma
        parts["gamma"] = one * inverse
    return dataclasses.replace(b, **parts)


def _sink(call: Call, sink: Tensor) -> Tensor:
    _check.is_float(_WHERE, "sink", sink)
    if sink.dim() != 1 or sink.shape[0] != call.H:
        raise ValueError(f"{_WHERE}: sink must be (H,) with H = {call.H}, got {_check.shape(sink)}")
    return call.aux(_WHERE, "sink", sink).contiguous()
