"""Shapes for tracing and derivatives of the ops of contextual positions. Kernels: csrc/cpu/cope_*.cpp, csrc/cuda/cope.cu."""

from __future__ import annotations

import torch

from .ops import _like, _no_second_derivative, _sink_gradient, aux_dtype

Tensor = torch.Tensor

# csrc/core/params.h: CopeNeeds. The names are those of cope_fwd's arguments.
NEEDS = {"q": 1, "k": 2, "v": 4, "gate_q": 8, "gate_k": 16, "table": 32}

# cope_fwd's arguments, in order.
_ARGS = (
    "q", "k", "v", "gate_q", "gate_k", "table", "q_rope", "k_rope", "rope_layout",
    "left", "right", "sinks", "q_ids", "k_ids", "mask", "sink", "scale", "gate_scale", "table_scale", "training",
)  # fmt: skip
_PLAIN = ("rope_layout", "left", "right", "sinks", "scale", "gate_scale", "table_scale", "training")

# csrc/core/tiles.h: kBlockQ, and csrc/core/params.h: kCopeBlockK.
_BLOCK = 64


def _blocks(n: int) -> int:
    return (n + _BLOCK - 1) // _BLOCK


@torch.library.register_fake("fastpe::cope_fwd")
def _(q, k, v, *rest):
    training = rest[-1]
    B, H, Nq, _ = q.shape
    aux = aux_dtype(q.dtype)
    carry = (B, H, _blocks(Nq), _blocks(k.shape[2]), 2, _BLOCK) if training else (0,)
    keep_residual = training and q.dtype in (torch.bfloat16, torch.float16)
    residual = _like(q, v.shape[3]) if keep_residual else q.new_empty(0)
    return _like(q, v.shape[3]), q.new_empty(B, H, Nq, dtype=aux), q.new_empty(carry, dtype=aux), residual


@torch.library.register_fake("fastpe::cope_bwd")
def _(dout, dlse, q, k, v, out, lse, carry, residual, gate_q, gate_k, table, *rest):
    needs = rest[-1]
    inputs = dict(zip(NEEDS, (q, k, v, gate_q, gate_k, table)))

    def gradient(what):
        x = inputs[what]
        if not needs & NEEDS[what] or x is None:
            return q.new_empty(0, dtype=aux_dtype(q.dtype) if what == "table" else q.dtype)
        return torch.empty_like(x, memory_format=torch.contiguous_format) if what == "table" else _like(x, x.shape[3])

    return tuple(gradient(what) for what in NEEDS)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    args = dict(zip(_ARGS, inputs))
    ctx.plain = {what: args[what] for what in _PLAIN}
    ctx.tensors = tuple(what for what in _ARGS if what not in _PLAIN)
    ctx.save_for_backward(*(args[what] for what in ctx.tensors), *output)


def _backward(ctx, dout, dlse, _dcarry, _dresidual):
    none = (None,) * len(_ARGS)
    if dout is None and dlse is None:
        return none
    *tensors, out, lse, carry, residual = ctx.saved_tensors
    args = dict(zip(ctx.tensors, tensors)) | ctx.plain
    if not args["training"]:
        raise RuntimeError("fastpe.attention: this call was made without gradients in mind (training=False)")
    if out.dtype not in (torch.bfloat16, torch.float16):
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
        rest = (args[what] for what in _ARGS[3:-1])
        made = torch.ops.fastpe.cope_bwd(dout, dlse, *qkv, out, lse, carry, residual, *rest, needs)
        grads = {what: g for (what, bit), g in zip(NEEDS.items(), made) if needs & bit}
    if wanted["sink"]:
        grads["sink"] = _sink_gradient(args["sink"], dout, dlse, out, lse, residual)
    return tuple(grads.get(what) for what in _ARGS)


torch.library.register_autograd("fastpe::cope_fwd", _backward, setup_context=_save)
torch.library.register_autograd("fastpe::cope_bwd", _no_second_derivative)
