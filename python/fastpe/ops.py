"""What torch must know about fastpe's ops beyond their kernels: shapes for tracing, and derivatives.

Schemas and kernels are in csrc/binding. Every rule here must agree with them in shape, dtype and stride.
"""

from __future__ import annotations

import torch

from .prefix import BLOCK

Tensor = torch.Tensor

# csrc/core/params.h: Needs. The names are those of attn_fwd's arguments.
NEEDS = {
    "q": 1,
    "k": 2,
    "v": 4,
    "bias_params": 8,
    "bias_gamma": 16,
    "bias_u": 32,
    "bias_w": 64,
    "bias_table": 128,
    "row_scale": 256,
    "bias_pieces": 512,
    "bias_omega": 1024,
    "bias_rows": 2048,
    "bias_cols": 4096,
    "bias_dense": 8192,
    "bias_factor": 16384,
    "bias_pairs": 32768,
    "bias_row_q": 65536,
    "bias_row_e": 131072,
    "bias_col_k": 262144,
    "bias_col_e": 524288,
}

# attn_fwd's arguments, in order.
_ARGS = (
    "q", "k", "v", "q_rope", "k_rope", "rope_layout",
    "bias_form", "bias_params", "bias_gamma", "bias_u", "bias_w", "bias_base", "bias_table",
    "left", "right", "sinks", "q_ids", "k_ids", "mask",
    "row_scale", "sink", "scale", "softcap", "softcap_mul", "skip_eps",
    "bias_pieces", "bias_omega", "bias_rows", "bias_cols", "bias_index", "bias_dense", "softcap_bias",
    "bias_factor", "bias_pairs", "bias_q_seg", "bias_k_seg", "intervals", "lower", "q_seg", "k_seg", "relation",
    "block_map", "block_q", "block_k", "region_kind", "region_size",
    "bias_row_q", "bias_row_e", "bias_col_k", "bias_col_e", "keep_residual",
)  # fmt: skip
_PLAIN = (
    "rope_layout", "bias_form", "left", "right", "sinks", "scale", "softcap", "softcap_mul", "skip_eps", "softcap_bias", "block_q", "block_k",
    "region_kind", "region_size", "keep_residual",
)  # fmt: skip


def aux_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lse and of the float arrays beside q, k and v."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _like(x: Tensor, channels: int) -> Tensor:
    """A dense (B,H,N,channels) tensor in x's memory order: (B,N,H,channels) if that is how x came."""
    B, H, N, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(B, N, H, channels).transpose(1, 2)
    return x.new_empty(B, H, N, channels)


@torch.library.register_fake("fastpe::attn_fwd")
def _(q, k, v, *rest):
    keep_residual = rest[-1] and q.dtype in (torch.bfloat16, torch.float16)
    residual = _like(q, v.shape[3]) if keep_residual else q.new_empty(0)
    return _like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=aux_dtype(q.dtype)), residual


@torch.library.register_fake("fastpe::attn_bwd")
def _(dout, dlse, q, k, v, out, lse, residual, *rest):
    inputs = {"q": q, "k": k, "v": v} | dict(zip(_ARGS[3:-1], rest))
    needs = rest[-1]

    def gradient(what):
        x = inputs[what]
        if not needs & NEEDS[what] or x is None:
            return q.new_empty(0, dtype=q.dtype if what in ("q", "k", "v") else aux_dtype(q.dtype))
        return _like(x, x.shape[3]) if what in ("q", "k", "v") else torch.empty_like(x, memory_format=torch.contiguous_format)

    return tuple(gradient(what) for what in NEEDS)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    args = dict(zip(_ARGS, inputs))
    ctx.plain = {what: args[what] for what in _PLAIN}
    ctx.tensors = tuple(what for what in _ARGS if what not in _PLAIN)
    ctx.save_for_backward(*(args[what] for what in ctx.tensors), *output)


def _backward(ctx, dout, dlse, _dresidual):
    none = (None,) * len(_ARGS)
    if dout is None and dlse is None:
        return none
    *tensors, out, lse, residual = ctx.saved_tensors
    args = dict(zip(ctx.tensors, tensors)) | ctx.plain
    if not args["keep_residual"] or out.dtype not in (torch.bfloat16, torch.float16):
        residual = None
    wanted = dict(zip(_ARGS, ctx.needs_input_grad))
    needs = sum(bit for what, bit in NEEDS.items() if wanted[what])
    if dout is None:
        dout = torch.zeros_like(out)
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    if dlse is not None:
        dlse = dlse.contiguous()
    grads = {}
    if needs:
        qkv = (args["q"], args["k"], args["v"])
        made = torch.ops.fastpe.attn_bwd(dout, dlse, *qkv, out, lse, residual, *(args[what] for what in _ARGS[3:-1]), needs)
        grads = {what: g for (what, bit), g in zip(NEEDS.items(), made) if needs & bit}
    if wanted["sink"]:
        grads["sink"] = _sink_gradient(args["sink"], dout, dlse, out, lse, residual)
    return tuple(grads.get(what) for what in _ARGS)


def _sink_gradient(sink: Tensor, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, residual: Tensor | None) -> Tensor:
    """The sink takes the share exp(sink - lse) of every row and gives nothing to out."""
    full = out.to(lse.dtype) if residual is None else out.to(lse.dtype) + residual.to(lse.dtype)
    delta = (dout.to(lse.dtype) * full).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    share = torch.exp(sink[None, :, None] - lse)
    share = torch.where(lse == -torch.inf, torch.zeros_like(share), share)
    return -(share * delta).sum((0, 2))


torch.library.register_autograd("fastpe::attn_fwd", _backward, setup_context=_save)


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError(
        "fastpe.attention: second derivatives are not supported; fastpe.reference.attention has them, at quadratic cost"
    )


torch.library.register_autograd("fastpe::attn_bwd", _no_second_derivative)


@torch.library.register_fake("fastpe::prefix_sum")
def _(x, reverse):
    blocks = (x.shape[-1] + BLOCK - 1) // BLOCK
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(
        *x.shape[:-1], blocks, dtype=torch.float64
    )


@torch.library.register_fake("fastpe::cumsum_exact")
def _(x, reverse):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_direction(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.reverse = inputs[1]


def _prefix_backward(ctx, dlocal, dbase):
    # `local` carries the gradient of the whole sum (fastpe.Prefix), so `base` has no say.
    if dlocal is None:
        return None, None
    return torch.ops.fastpe.cumsum_exact(dlocal.contiguous(), not ctx.reverse), None


def _cumsum_backward(ctx, grad):
    if grad is None:
        return None, None
    return torch.ops.fastpe.cumsum_exact(grad.contiguous(), not ctx.reverse), None


torch.library.register_autograd("fastpe::prefix_sum", _prefix_backward, setup_context=_save_direction)
torch.library.register_autograd("fastpe::cumsum_exact", _cumsum_backward, setup_context=_save_direction)
