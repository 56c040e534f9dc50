"""The dense definition of everything fastpe computes: float64, differentiable, readable, slow.

Scores are formed in this order, which is normative: scale, head and row scale, multiplicative kernel, softcap, bias, temperature, visibility,
sink. Every bias and mask object states its own dense form (`materialize`); nothing here goes through the kernels.
"""

from __future__ import annotations

import torch

from . import _check
from ._call import Call
from ._cope import Contextual
from ._reference_decode import gather_attention
from ._reference_parts import attention_mass, attention_rows, landmark_attention, merge
from ._reference_rope import rotate

Tensor = torch.Tensor

__all__ = ["apply_rotary", "attention", "attention_mass", "attention_rows", "gather_attention", "landmark_attention", "merge", "prefix_sum", "rotate", "softmax_attention"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    rope=None,
    bias=None,
    mask=None,
    region=None,
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
    """`fastpe.attention` as one dense float64 computation with the same arguments.

    Returns:
        out (B, H, Nq, Dv) float64, and with return_lse also lse (B, H, Nq) float64.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 6, 8, dtype=torch.float64)
    >>> b = fastpe.bias.Alibi(2)
    >>> got = fastpe.attention(q, q, q, bias=b, is_causal=True)
    >>> torch.allclose(got, fastpe.reference.attention(q, q, q, bias=b, is_causal=True))
    True
    """
    parts = dense_parts(
        query.double(), key.double(), value.double(), rope=rope, bias=bias, mask=mask, region=region, positions=positions,
        key_positions=key_positions, scale=scale, head_scale=head_scale, row_scale=row_scale, temperature=temperature, is_causal=is_causal,
    )  # fmt: skip
    query, key, factor, b, visible, tau, region_of = parts
    sink = None if sink is None else sink.double()
    return softmax_attention(
        query, key, value.double(), factor, b, visible, softcap=softcap, softcap_includes_bias=softcap_includes_bias,
        temperature=tau, sink=sink, region_of=region_of, return_lse=return_lse,
    )  # fmt: skip


def dense_parts(
    query, key, value, *, rope, bias, mask, region, positions, key_positions, scale, head_scale, row_scale, temperature, is_causal
):  # fmt: skip
    """The arguments of a call as dense float64 arrays: rotated query and key (a tuple each with regions), the factor of the
    products, bias, visibility, temperature and the regions of the pairs, as `softmax_attention` takes them."""
    (B, H, Nq, D), Nk = query.shape, key.shape[2]
    if scale is None:
        scale = D**-0.5
    causal = is_causal or (mask is not None and mask.is_causal)
    call = Call(B, H, Nq, Nk, causal, torch.float64, query.device)
    plan = region_of = None
    if region is not None:
        if rope is None:
            raise ValueError("fastpe.reference.attention: region chooses positions for rope, which is None")
        if positions is not None or key_positions is not None:
            raise ValueError("fastpe.reference.attention: positions and region both say where tokens are; give one of them")
        if isinstance(bias, Contextual):
            raise NotImplementedError(f"fastpe.reference.attention: region does not go with bias {type(bias).__name__}")
        plan, region_of, rope = region.plan(call), region.region_of(call), region.fit(rope, call)
        query, key = _rotated_by_region(query, key, rope, plan, call)
    elif rope is not None:
        q_table, k_table = rope.materialize_tables(positions, key_positions, Nq, Nk, B, H, key.shape[1], query.device)
        query = rotate(query, q_table[0], q_table[1], rope.layout, False)
        key = rotate(key, k_table[0], k_table[1], rope.layout, False)

    visible = call.distance() >= 0 if is_causal else torch.ones(Nq, Nk, dtype=torch.bool, device=call.device)
    visible = visible[None, None]
    if mask is not None:
        visible = visible & mask.materialize(call)
    rho = torch.ones(1, 1, 1, dtype=torch.float64, device=call.device)
    if plan is not None:
        rho = rho * plan.amplitude
        if plan.row_factor is not None:
            rho = rho * plan.row_factor
    if head_scale is not None:
        rho = rho * _heads(head_scale, call.device)[..., None]
    if row_scale is not None:
        rho = rho * row_scale.double().reshape(*(1,) * (3 - row_scale.dim()), *row_scale.shape)
    tau = None if temperature is None else _heads(temperature, call.device)[..., None, None]
    if isinstance(bias, Contextual):
        b = bias.materialize_for(call, query, key, value, visible)
    else:
        b = None if bias is None else bias.materialize(call)
    omega = None if bias is None or isinstance(bias, Contextual) else bias.multiplier(call)
    factor = scale * rho[..., None]
    return query, key, factor if omega is None else factor * omega, b, visible, tau, region_of


def _rotated_by_region(query: Tensor, key: Tensor, rope, plan, call: Call) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """query and key turned by the positions of each region."""
    keys = plan.key * len(plan.query) if len(plan.key) == 1 else plan.key
    turned = []
    for p, k in zip(plan.query, keys, strict=True):
        q_table, k_table = rope.materialize_tables(p, k, call.Nq, call.Nk, call.B, call.H, key.shape[1], call.device)
        turned.append((rotate(query, *q_table, rope.layout), rotate(key, *k_table, rope.layout)))
    return tuple(q for q, _ in turned), tuple(k for _, k in turned)


def _heads(x: Tensor | float, device: torch.device) -> Tensor:
    """A number, (H,) or (B, H) -> float64 (B|1, H|1)."""
    x = torch.as_tensor(x, dtype=torch.float64, device=device)
    return x.reshape(*(1,) * (2 - x.dim()), *x.shape)


def softmax_attention(
    query: Tensor | tuple[Tensor, ...],
    key: Tensor | tuple[Tensor, ...],
    value: Tensor,
    factor: Tensor | float,
    bias: Tensor | None,
    visible: Tensor,
    *,
    softcap: float | None = None,
    softcap_includes_bias: bool = False,
    temperature: Tensor | float | None = None,
    sink: Tensor | None = None,
    region_of: Tensor | None = None,
    return_lse: bool = False,
    softmax_dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention on dense arrays, the products in the inputs' dtype and everything between in softmax_dtype.

    With half precision inputs and a float32 softmax this is attention as plain torch computes it, which is what the
    half precision kernels are measured against.

    Args:
        query, key, value: (B, H, Nq, D), (B, Hk, Nk, D), (B, Hk, Nk, Dv), one dtype. With regions a query and a key for each.
        factor: multiplies the products; broadcastable to (B, H, Nq, Nk).
        bias: broadcastable to (B, H, Nq, Nk), or None.
        visible: bool, broadcastable to (B, H, Nq, Nk).
        softcap, softcap_includes_bias, temperature, sink: as in `attention`; temperature broadcastable to (B, H, Nq, 1).
        region_of: (Nq, Nk), which query and key a pair takes, counted from 1; None: there is one of each.
        softmax_dtype: of scores, softmax and lse.
    """
    queries, keys = ((query,), (key,)) if region_of is None else (query, key)
    group = queries[0].shape[1] // value.shape[1]
    value = value.repeat_interleave(group, dim=1)
    products = [q @ k.repeat_interleave(group, dim=1).transpose(-1, -2) for q, k in zip(queries, keys, strict=True)]
    x = products[0]
    for n, other in enumerate(products[1:], 2):
        x = torch.where(region_of == n, other, x)
    x = factor * x.to(softmax_dtype)
    if softcap is not None and not softcap_includes_bias:
        x = softcap * torch.tanh(x / softcap)
    s = x if bias is None else x + bias
    if softcap is not None and softcap_includes_bias:
        s = softcap * torch.tanh(s / softcap)
    if temperature is not None:
        s = s / temperature
    s = torch.where(visible, s, -torch.inf)

    # Rows shifted by their maximum; an empty row by 0, so that no -inf meets -inf.
    top = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -torch.inf)
    if sink is not None:
        sink = sink.to(softmax_dtype).reshape(1, -1, 1, 1)
        top = torch.maximum(top, sink.detach())
    top = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    p = torch.exp(s - top)
    total = p.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    empty = total == 0
    total = torch.where(empty, torch.ones_like(total), total)
    out = (p / total).to(value.dtype) @ value
    if not return_lse:
        return out
    lse = torch.where(empty, -torch.inf, top + torch.log(total))[..., 0]
    return out, lse


def apply_rotary(x: Tensor, rope, positions: Tensor | None = None, *, inverse: bool = False) -> Tensor:
    """`fastpe.apply_rotary` in float64, x (B, H, N, D).

    >>> import torch, fastpe
    >>> x, rope = torch.randn(1, 2, 5, 8), fastpe.rope.default(8)
    >>> turned = fastpe.reference.apply_rotary(x, rope)
    >>> torch.allclose(fastpe.reference.apply_rotary(turned, rope, inverse=True), x.double())
    True
    """
    if positions is None:
        positions = torch.arange(x.shape[2], device=x.device)
    cos, sin = rope.materialize(positions)
    return rotate(x, cos, sin, rope.layout, inverse)


def prefix_sum(x: Tensor, *, reverse: bool = False) -> Tensor:
    """The inclusive prefix sum over the last dimension in float64: what `fastpe.prefix_sum(x).values()` approximates.

    >>> import torch, fastpe
    >>> fastpe.reference.prefix_sum(torch.tensor([1.0, 2.0, 3.0]), reverse=True)
    tensor([6., 5., 3.], dtype=torch.float64)
    """
    x = _check.is_float("fastpe.reference.prefix_sum", "x", x).double()
    return x.flip(-1).cumsum(-1).flip(-1) if reverse else x.cumsum(-1)
