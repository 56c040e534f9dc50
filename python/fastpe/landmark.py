"""Landmark attention, a softmax of two levels, with the ops' shapes and derivatives. Kernels: csrc/cpu/landmark_*.cpp,
csrc/cuda/sm80/landmark_*.cuh."""

from __future__ import annotations

import torch

from . import _check
from ._call import Call
from ._rope import Rope
from .attention import _autocast, _check_kernels, _check_qkv, _rotation
from .mask import Mask
from .merge import merge
from .ops import _like, aux_dtype
from .rotary import apply_rotary

Tensor = torch.Tensor

_WHERE = "fastpe.landmark_attention"


def landmark_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_landmark: Tensor,
    *,
    rope: Rope | None = None,
    mask: Mask | None = None,
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention in which every earlier block of tokens is reached through its landmark (arXiv 2305.16300).

    A landmark token closes its block. With I = i + Nk - Nq the index of query row i among the keys and b its block:

        a = softmax over {ordinary j <= I of block b} and {landmarks of blocks before b}
        p_c = softmax over the ordinary tokens of an earlier block c
        out_i = sum_{j in b} a_j v_j + sum_{c < b} a_landmark(c) sum_{j in c} p_c(j) v_j

    The values of landmarks are not used, and no row sees the landmark of its own block. An earlier block without ordinary
    tokens takes its share of `a` and gives nothing. Linear memory; one pass as in `fastpe.attention`.

    Args:
        query: (B, H, Nq, D) float32, bfloat16, float16 or float64 (on a GPU bfloat16 or float16); D from 8 to 256 in steps
            of 8; any strides with a contiguous last dimension.
        key: (B, Hk, Nk, D), H a multiple of Hk.
        value: (B, Hk, Nk, Dv), Dv from 8 to 256 in steps of 8.
        is_landmark: (Nk,) or (B, Nk) bool. Any pattern; the released models put one after every 50 or 63 tokens.
            On a CPU scratch memory grows with the longest block; on a GPU blocks of more than 64 tokens are read more
            than once (docs/cuda.md).
        rope: rotary embedding of query and key (`fastpe.rope`).
        mask: only `fastpe.mask.padding`, and `fastpe.mask.causal`, which holds anyway. A padded key is in no softmax; a
            padded landmark closes its block, which nobody reaches.
        positions, key_positions: positions for `rope`, as in `fastpe.attention`.
        scale: default 1 / sqrt(D).
        return_lse: also return the log-sum-exp of the outer softmax.

    Returns:
        out: (B, H, Nq, Dv), query's dtype and memory order. A row that sees nothing gives 0.
        lse: (B, H, Nq) float32 (float64 for float64), differentiable; -inf where a row sees nothing.

    Raises:
        TypeError, ValueError: named after the argument, with what was expected and what came.
        NotImplementedError: a mask with another rule; another dtype on a GPU.

    >>> import torch, fastpe
    >>> q, k, v = (torch.randn(1, 2, 20, 16) for _ in range(3))
    >>> is_landmark = torch.arange(20) % 6 == 5
    >>> out = fastpe.landmark_attention(q, k, v, is_landmark, rope=fastpe.rope.default(16))
    >>> out.shape
    torch.Size([1, 2, 20, 16])
    """
    for what, x, kind, how in (
        ("rope", rope, Rope, "a fastpe.rope object"),
        ("mask", mask, Mask, "a fastpe.mask object"),
        ("return_lse", return_lse, bool, "a bool"),
    ):
        if x is not None and not isinstance(x, kind):
            raise TypeError(f"{_WHERE}: {what} must be {how}, got {type(x).__name__}")
    query, key, value = _autocast(query, key, value, _WHERE)
    B, H, Nq, D, Nk = _check_qkv(query, key, value, _WHERE)
    _check_kernels(query.device.type, query.dtype, _WHERE, "landmarks")
    scale = D**-0.5 if scale is None else _check.number(_WHERE, "scale", scale)
    call = Call(B, H, Nq, Nk, True, aux_dtype(query.dtype), query.device)
    is_landmark = _per_key(_WHERE, "is_landmark", is_landmark, call)
    q_rope, k_rope, layout = _rotation(call, rope, positions, key_positions, D, key.shape[1], _WHERE)
    if rope is not None and torch.is_grad_enabled() and (q_rope.requires_grad or k_rope.requires_grad):
        # Learned angles need the gradient of the rotated tensors, which the kernels never hold.
        query, key = torch.ops.fastpe.rotate_pair(query, key, q_rope, k_rope, layout, False)
        q_rope = k_rope = None
    out, lse = torch.ops.fastpe.landmark_fwd(
        query, key, value, is_landmark, _padding(mask, call), q_rope, k_rope, layout, scale
    )
    return (out, lse) if return_lse else out


def landmark_retrieval(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_landmark: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    block: int,
    top_k: int,
    rope: Rope | None = None,
    scale: float | None = None,
    shared_rows: bool = False,
    return_selected: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Landmark attention over a cache of which every row reads its top_k blocks only (arXiv 2305.16300, section 3.2).

    The cache holds n = M // block blocks, each closed by its landmark, then M % block further tokens, which belong to the
    block the new tokens go on with. A block is ranked by the logit of its landmark. With K = min(top_k, n), the chosen blocks
    stand, in their order, on the K + 1 block places before the incomplete part: the r-th on place r, or on r + 1 if it is
    among the last K, so that recent blocks keep their distance. Positions of the new tokens go on from M.
    Blocks of a group of rows at a time are gathered: memory does not grow with the cache.

    Args:
        query: (B, H, Nq, D), not rotated.
        key, value: (B, Hk, Nq, D) and (B, Hk, Nq, Dv), the new tokens' own, not rotated.
        is_landmark: (Nq,) or (B, Nq) bool, landmarks among the new tokens.
        key_cache, value_cache: (B, Hk, M, D) and (B, Hk, M, Dv), not rotated.
        block: length of a cached block with its landmark (51 in the language model code, 64 in the LLaMA code).
        top_k: blocks a row reads.
        rope: rotary embedding (`fastpe.rope`), with its usual positions.
        scale: default 1 / sqrt(D).
        shared_rows: choose once for all rows of a head, by the largest rank any of them gives, instead of row by row.
        return_selected: also return the chosen blocks.

    Returns:
        out: (B, H, Nq, Dv), query's dtype.
        selected: (B, H, Nq, K) int64, ascending.

    Gradients pass to everything but the choice.

    >>> import torch, fastpe
    >>> cache, new = torch.randn(1, 2, 42, 16), torch.randn(1, 2, 3, 16)
    >>> no_landmark = torch.zeros(3, dtype=torch.bool)
    >>> out, chosen = fastpe.landmark_retrieval(
    ...     new, new, new, no_landmark, cache, cache, block=8, top_k=2, rope=fastpe.rope.default(16), return_selected=True
    ... )
    >>> out.shape, chosen.shape  # 5 blocks, of which 2, and 2 tokens of the block that is being written
    (torch.Size([1, 2, 3, 16]), torch.Size([1, 2, 3, 2]))
    """
    where = "fastpe.landmark_retrieval"
    query, key, value = _autocast(query, key, value, where)
    B, H, Nq, D, Nk = _check_qkv(query, key, value, where)
    _check_kernels(query.device.type, query.dtype, where, "landmarks")
    if Nk != Nq:
        raise ValueError(f"{where}: key has {Nk} tokens, query has {Nq}; they are the same new tokens")
    block, top_k = _check.count(where, "block", block, 2), _check.count(where, "top_k", top_k, 1)
    for what, x, like in (("key_cache", key_cache, key), ("value_cache", value_cache, value)):
        _check.is_float(where, what, x)
        if x.dim() != 4 or x.shape[:2] != like.shape[:2] or x.shape[3] != like.shape[3]:
            raise ValueError(f"{where}: {what} must be (B, Hk, M, channels) beside {_check.shape(like)}, got {_check.shape(x)}")
        _check.on_device(where, what, x, query.device)
    if key_cache.shape[2] != value_cache.shape[2]:
        raise ValueError(f"{where}: key_cache has {key_cache.shape[2]} tokens, value_cache has {value_cache.shape[2]}")
    call = Call(B, H, Nq, Nq, True, aux_dtype(query.dtype), query.device)
    is_landmark = _per_key(where, "is_landmark", is_landmark, call)
    scale = D**-0.5 if scale is None else _check.number(where, "scale", scale)
    n, key_cache, value_cache = key_cache.shape[2] // block, key_cache.to(key.dtype), value_cache.to(value.dtype)
    full, total, K = n * block, key_cache.shape[2], min(top_k, key_cache.shape[2] // block)

    # The block that is being written, and the new tokens after it.
    tail = total - full
    near_k, near_v = (torch.cat((c[:, :, full:], x), 2) for c, x in ((key_cache, key), (value_cache, value)))
    marks = torch.cat((is_landmark.new_zeros(is_landmark.shape[0], tail), is_landmark), 1)
    index = torch.arange(full, total + Nq, device=query.device)
    at = {} if rope is None else {"positions": index[tail:], "key_positions": index}
    out, lse = landmark_attention(query, near_k, near_v, marks, rope=rope, scale=scale, return_lse=True, **at)
    if K == 0:
        return (out, torch.empty(B, H, Nq, 0, dtype=torch.int64, device=query.device)) if return_selected else out

    # Keys of a block turned by their place in it, once; queries by the distance to each of the K + 1 places.
    wide = aux_dtype(query.dtype)
    cached_k, cached_v = (c[:, :, :full].unflatten(2, (n, block)) for c in (key_cache, value_cache))
    places = [query] * (K + 1)
    if rope is not None:
        cached_k = apply_rotary(cached_k.flatten(2, 3).contiguous(), rope, torch.arange(full, device=query.device) % block)
        cached_k = cached_k.unflatten(2, (n, block))
        places = [apply_rotary(query, rope, index[tail:] - full + (K + 1 - place) * block) for place in range(K + 1)]
    places = torch.stack(places, 3)  # (B, H, Nq, K + 1, D)

    with torch.no_grad():
        heads = cached_k[:, :, :, block - 1].to(wide).repeat_interleave(H // key.shape[1], 1)  # (B, H, n, D) landmarks
        rank = places[..., 0, :].to(wide) @ heads[:, :, : n - K].mT
        recent = (places[..., 1:, :].to(wide) * heads[:, :, None, n - K :]).sum(-1)
        rank = torch.cat((rank, recent), -1)
        if shared_rows:
            rank = rank.amax(2, keepdim=True).expand_as(rank)
        selected = rank.topk(K, dim=-1).indices.sort(-1).values
        place = torch.arange(K, device=query.device) + (selected >= n - K)

    pieces = []
    head = torch.arange(H, device=query.device) // (H // key.shape[1])
    of = (torch.arange(B, device=query.device)[:, None, None, None], head[:, None, None])
    step = max(1, _GATHERED // max(1, B * H * K * block * (D + value.shape[3])))
    for start in range(0, Nq, step):
        rows = slice(start, start + step)
        chosen = (*of, selected[:, :, rows])
        q = places[:, :, rows].gather(3, place[:, :, rows, :, None].expand(-1, -1, -1, -1, D))
        s = scale * (cached_k[chosen].to(wide) @ q[..., None].to(wide))[..., 0]  # (B, H, rows, K, block)
        p = torch.softmax(s[..., :-1], -1)
        pieces.append(((p[..., None, :] @ cached_v[chosen][..., :-1, :].to(wide))[..., 0, :], s[..., -1]))
    block_out, block_lse = (torch.cat(x, 2) for x in zip(*pieces))  # (B, H, Nq, K, Dv), (B, H, Nq, K)
    outs, lses = [out.to(wide), *(x.contiguous() for x in block_out.unbind(3))], [lse, *block_lse.unbind(3)]
    while len(outs) > _MERGED:
        one, one_lse = merge(outs[:_MERGED], lses[:_MERGED])
        outs, lses = [one, *outs[_MERGED:]], [one_lse, *lses[_MERGED:]]
    out = merge(outs, lses)[0].to(query.dtype)
    return (out, selected) if return_selected else out


# Numbers gathered at a time; parts merged at a time, which the CUDA kernels limit.
_GATHERED = 1 << 23
_MERGED = 32


def _per_key(where: str, what: str, x, call: Call) -> Tensor:
    """(Nk,) or (B|1, Nk) bool -> contiguous (B|1, Nk)."""
    _check.is_tensor(where, what, x)
    if x.dtype != torch.bool:
        raise TypeError(f"{where}: {what} must be a bool tensor, got {_check.name(x.dtype)}")
    _check.on_device(where, what, x, call.device)
    if x.dim() not in (1, 2) or x.shape[-1] != call.Nk:
        raise ValueError(f"{where}: {what} must be (Nk,) or (B, Nk) with Nk = {call.Nk}, got {_check.shape(x)}")
    x = x if x.dim() == 2 else x[None]
    if x.shape[0] not in (1, call.B):
        raise ValueError(f"{where}: {what} has {x.shape[0]} batch entries, the call has {call.B}")
    return x.contiguous()


def _padding(mask: Mask | None, call: Call) -> Tensor | None:
    """Keys that are not padding, (B|1, Nk), or None."""
    if mask is None:
        return None
    only = Mask(right=1 if mask.right == 1 else None, padding=mask.padding)
    for f in mask.__dataclass_fields__:
        if getattr(mask, f) != getattr(only, f):
            raise NotImplementedError(f"{_WHERE}: only fastpe.mask.padding goes with landmarks, got {mask!r}")
    seen = None
    for x in mask.padding:
        x = _per_key(_WHERE, "mask's padding", x, call)
        seen = x if seen is None else seen & x
    return seen


# ---- what torch must know about the ops ---------------------------------------------------------------------------------


@torch.library.register_fake("fastpe::landmark_fwd")
def _(q, k, v, is_landmark, visible, q_rope, k_rope, rope_layout, scale):
    return _like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=aux_dtype(q.dtype))


@torch.library.register_fake("fastpe::landmark_bwd")
def _(dout, dlse, q, k, v, *rest):
    needs = rest[-1]
    return tuple(_like(x, x.shape[3]) if needs & bit else q.new_empty(0) for x, bit in ((q, 1), (k, 2), (v, 4)))


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    *tensors, ctx.rope_layout, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, dout, dlse):
    none = (None,) * 9
    if dout is None and dlse is None:
        return none
    q, k, v, *given, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout if dout.stride(-1) == 1 else dout.contiguous()
    wanted = ctx.needs_input_grad[:3]
    needs = sum(bit for bit, want in zip((1, 2, 4), wanted) if want)
    grads = torch.ops.fastpe.landmark_bwd(
        dout, None if dlse is None else dlse.contiguous(), q, k, v, out, lse, *given, ctx.rope_layout, ctx.scale, needs
    )
    return (*(g if want else None for g, want in zip(grads, wanted)), *none[3:])


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError(
        f"{_WHERE}: second derivatives are not supported; fastpe.reference.landmark_attention has them, at quadratic cost"
    )


torch.library.register_autograd("fastpe::landmark_fwd", _backward, setup_context=_save)
torch.library.register_autograd("fastpe::landmark_bwd", _no_second_derivative)
