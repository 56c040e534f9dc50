"""Bad input: each line is a call and the message it must give. Nothing here may touch memory or abort."""

from __future__ import annotations

import math

import pytest
import torch

import fastpe
from fastpe import bias, mask

B, H, HK, N, D = 2, 8, 4, 10, 16


def t(*shape, dtype=torch.float32, **kwargs):
    return torch.zeros(*shape, dtype=dtype, **kwargs)


def call(q=None, k=None, v=None, **kwargs):
    q = t(B, H, N, D) if q is None else q
    k = t(B, HK, N, D) if k is None else k
    v = t(B, HK, N, D) if v is None else v
    return lambda: fastpe.attention(q, k, v, **kwargs)


def bias_call(make, **kwargs):
    return lambda: fastpe.attention(t(B, H, N, D), t(B, HK, N, D), t(B, HK, N, D), bias=make(), **kwargs)


def mask_call(make):
    return lambda: fastpe.attention(t(B, H, N, D), t(B, HK, N, D), t(B, HK, N, D), mask=make())


def short(make):
    """A call with fewer keys than queries."""
    return lambda: fastpe.attention(t(B, H, N, D), t(B, HK, 4, D), t(B, HK, 4, D), **make())


def grad(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, requires_grad=True)


def fire(activation=None, heads=H, **kwargs):
    mlp = torch.nn.Sequential(torch.nn.Linear(1, 4), activation or torch.nn.ReLU(), torch.nn.Linear(4, heads))
    return bias.Fire.from_mlp(mlp, torch.tensor(0.1), 512.0, **kwargs)


ints = torch.tensor
ATT = "fastpe.attention: "
TABLE = [
    # query, key, value
    (call(q=[1.0]), TypeError, ATT + "query must be a tensor, got list"),
    (call(q=t(B, H, N, D, dtype=torch.int32)), TypeError, ATT + "query must be float32, bfloat16, float16 or float64, got int32"),
    (call(k=t(B, HK, N, D, dtype=torch.complex64)), TypeError, ATT + "key must be float32, bfloat16, float16 or float64, got complex64"),
    (call(k=t(B, HK, N, D, dtype=torch.bfloat16)), TypeError, ATT + "key is bfloat16, query is float32"),
    (call(v=t(B, HK, N, D, dtype=torch.float64)), TypeError, ATT + "value is float64, query is float32"),
    (call(k=t(B, HK, N, D, device="meta")), ValueError, ATT + "key is on meta, query is on cpu"),
    (call(v=t(B, HK, N, D, device="meta")), ValueError, ATT + "value is on meta, query is on cpu"),
    (call(q=t(H, N, D)), ValueError, ATT + "query must have 4 dimensions (batch, heads, tokens, channels), got (8, 10, 16)"),
    (call(v=t(1, B, HK, N, D)), ValueError, ATT + "value must have 4 dimensions (batch, heads, tokens, channels), got (1, 2, 4, 10, 16)"),
    (call(q=t(B, H, N, D).to_sparse()), TypeError, ATT + "query must be a dense strided tensor"),
    (call(k=t(3, HK, N, D)), ValueError, ATT + "key has batch size 3, query has 2"),
    (call(v=t(1, HK, N, D)), ValueError, ATT + "value has batch size 1, query has 2"),
    (call(k=t(B, 6, N, D), v=t(B, 6, N, D)), ValueError, ATT + "key has 6 heads, which does not divide query's 8"),
    (call(k=t(B, 0, N, D), v=t(B, 0, N, D)), ValueError, ATT + "key has 0 heads, which does not divide query's 8"),
    (call(q=t(B, 0, N, D)), ValueError, ATT + "query has no heads"),
    (call(v=t(B, 2, N, D)), ValueError, ATT + "value has 2 heads, key has 4"),
    (call(v=t(B, HK, 9, D)), ValueError, ATT + "value has 9 tokens, key has 10"),
    (call(k=t(B, HK, N, 24)), ValueError, ATT + "key has 24 channels, query has 16"),
    (call(q=t(B, H, N, 12), k=t(B, HK, N, 12)), ValueError, ATT + "query must have 8 to 256 channels in steps of 8, got 12"),
    (call(q=t(B, H, N, 264), k=t(B, HK, N, 264)), ValueError, ATT + "query must have 8 to 256 channels in steps of 8, got 264"),
    (call(q=t(B, H, N, 0), k=t(B, HK, N, 0)), ValueError, ATT + "query must have 8 to 256 channels in steps of 8, got 0"),
    (call(v=t(B, HK, N, 20)), ValueError, ATT + "value must have 8 to 256 channels in steps of 8, got 20"),
    (call(q=t(B, H, D, N + 6).transpose(2, 3)[:, :, :N]), ValueError, ATT + "query's last dimension must be contiguous, its stride is 16; pass query.contiguous()"),
    (call(k=t(B, HK, N, 2 * D)[..., ::2]), ValueError, ATT + "key's last dimension must be contiguous, its stride is 2; pass key.contiguous()"),
    (call(v=t(B, HK, N, 1).expand(-1, -1, -1, D)), ValueError, ATT + "value's last dimension must be contiguous, its stride is 0; pass value.contiguous()"),
    # objects
    (call(rope="rope"), TypeError, ATT + "rope must be a fastpe.rope object, got str"),
    (call(bias=t(N, N)), TypeError, ATT + "bias must be a fastpe.bias object (fastpe.bias.Dense wraps a tensor), got Tensor"),
    (call(mask=torch.ones(N, N, dtype=torch.bool)), TypeError, ATT + "mask must be a fastpe.mask object (fastpe.mask.dense wraps a bool tensor), got Tensor"),
    (call(region=object()), TypeError, ATT + "region must be a fastpe.region object, got object"),
    (call(is_causal=1), TypeError, ATT + "is_causal must be a bool, got int"),
    (call(return_lse="yes"), TypeError, ATT + "return_lse must be a bool, got str"),
    (call(positions=torch.arange(N)), ValueError, ATT + "positions are for rope, which is None; a bias takes its own positions"),
    (lambda: fastpe.attention(t(B, H, N, D), t(B, HK, N, D), t(B, HK, N, D), rope=fastpe.rope.default(32)), ValueError, ATT + "rope turns 32 channels, query has 16"),
    # numbers
    (call(scale=t(())), TypeError, ATT + "scale must be a Python number and has no gradient, got a tensor"),
    (call(scale=grad(())), TypeError, ATT + "scale must be a Python number and has no gradient, got a tensor that requires grad"),
    (call(scale=math.nan), ValueError, ATT + "scale must be finite, got nan"),
    (call(scale="1"), TypeError, ATT + "scale must be a number, got str"),
    (call(softcap=0), ValueError, ATT + "softcap must be positive, got 0"),
    (call(softcap=-3.0), ValueError, ATT + "softcap must be positive, got -3"),
    (call(softcap=grad(())), TypeError, ATT + "softcap must be a Python number and has no gradient, got a tensor that requires grad"),
    (call(temperature=0.0), ValueError, ATT + "temperature must be positive, got 0"),
    (call(temperature=t(B, H)), ValueError, ATT + "temperature must be a number or (H,), got (2, 8)"),
    (call(temperature=t(3)), ValueError, ATT + "temperature has 3 heads, the call has 8"),
    (call(temperature=t(H), softcap=2.0), NotImplementedError, ATT + "a temperature tensor does not go with softcap; use a number"),
    (call(head_scale=t(3)), ValueError, ATT + "head_scale has 3 heads, the call has 8"),
    (call(head_scale=t(3, H)), ValueError, ATT + "head_scale has 3 batch entries, the call has 2"),
    (call(head_scale=t(1, H, 1)), ValueError, ATT + "head_scale must be a number, (H,) or (B, H), got (1, 8, 1)"),
    (call(head_scale=ints([1] * H)), TypeError, ATT + "head_scale must be float32, bfloat16, float16 or float64, got int64"),
    (call(row_scale=t(N + 1)), ValueError, ATT + "row_scale has 11 queries, the call has 10"),
    (call(row_scale=t(H, N)), ValueError, ATT + "row_scale must be (Nq,) or (B, H, Nq), got (8, 10)"),
    (call(row_scale=t(N, device="meta")), ValueError, ATT + "row_scale is on meta, query is on cpu"),
    (call(sink=t(3)), ValueError, ATT + "sink must be (H,) with H = 8, got (3,)"),
    (call(sink=0.5), TypeError, ATT + "sink must be a tensor, got float"),
    # masks
    (lambda: mask.window(0), ValueError, "fastpe.mask.window: left must be at least 1, got 0"),
    (lambda: mask.window(-5), ValueError, "fastpe.mask.window: left must be at least 1, got -5"),
    (lambda: mask.window(4, -1), ValueError, "fastpe.mask.window: right must be at least 1, got -1"),
    (lambda: mask.window(4.0), TypeError, "fastpe.mask.window: left must be an integer, got float"),
    (lambda: mask.sinks(-1), ValueError, "fastpe.mask.sinks: n must be at least 0, got -1"),
    (lambda: mask.documents(), ValueError, "fastpe.mask.documents: give either cu_seqlens or ids"),
    (lambda: mask.documents(cu_seqlens=t(3)), TypeError, "fastpe.mask.documents: cu_seqlens must hold integers, got float32"),
    (lambda: mask.documents(cu_seqlens=grad(3)), TypeError, "fastpe.mask.documents: cu_seqlens must hold integers, got float32"),
    (lambda: mask.documents(cu_seqlens=ints([1, 5, 10])), ValueError, "fastpe.mask.documents: cu_seqlens must start at 0, got 1"),
    (lambda: mask.documents(cu_seqlens=ints([0, 6, 5, 10])), ValueError, "fastpe.mask.documents: cu_seqlens must not decrease, got 6 then 5 at entry 2"),
    (lambda: mask.documents(cu_seqlens=ints([0])), ValueError, "fastpe.mask.documents: cu_seqlens must be (documents + 1,) with at least one document, got (1,)"),
    (mask_call(lambda: mask.documents(cu_seqlens=ints([0, 5, 11]))), ValueError, "fastpe.mask.documents: cu_seqlens ends at 11, past the 10 keys"),
    (lambda: mask.documents(cu_seqlens=ints([0, 5]), key_ids=ints([0])), ValueError, "fastpe.mask.documents: key_ids go with ids, not with cu_seqlens"),
    (lambda: mask.documents(ids=grad(N)), TypeError, "fastpe.mask.documents: ids must hold integers, got float32"),
    (lambda: mask.documents(ids=ints([2**31])), ValueError, "fastpe.mask.documents: ids must be below 2**31, got 2147483648"),
    (lambda: mask.documents(ids=torch.zeros(1, 2, 3, dtype=torch.int64)), ValueError, "fastpe.mask.documents: ids must be (N,) or (B, N), got (1, 2, 3)"),
    (mask_call(lambda: mask.documents(ids=torch.arange(9))), ValueError, "fastpe.mask.documents: ids has 9 tokens, the call has 10 keys"),
    (mask_call(lambda: mask.documents(ids=torch.arange(10), key_ids=torch.arange(11))), ValueError, "fastpe.mask.documents: key_ids has 11 tokens, the call has 10 keys"),
    (mask_call(lambda: mask.documents(ids=torch.arange(9), key_ids=torch.arange(10))), ValueError, "fastpe.mask.documents: ids has 9 tokens, the call has 10 queries"),
    (mask_call(lambda: mask.documents(ids=torch.zeros(3, 10, dtype=torch.int64))), ValueError, "fastpe.mask.documents: ids has 3 batch entries, the call has 2"),
    (short(lambda: {"mask": mask.documents(ids=torch.arange(4))}), ValueError, "fastpe.mask.documents: 10 queries and 4 keys: queries are the last keys unless ids and key_ids are given"),
    (lambda: mask.padding(t(B, N)), TypeError, "fastpe.mask.padding: key_mask must be a bool tensor (True: visible), got float32"),
    (lambda: mask.padding(torch.ones(1, 1, N, dtype=torch.bool)), ValueError, "fastpe.mask.padding: key_mask must be (Nk,) or (B, Nk), got (1, 1, 10)"),
    (mask_call(lambda: mask.padding(torch.ones(B, 9, dtype=torch.bool))), ValueError, "fastpe.mask.padding: key_mask has 9 tokens, the call has 10 keys"),
    (mask_call(lambda: mask.padding(torch.ones(3, N, dtype=torch.bool))), ValueError, "fastpe.mask.padding: key_mask has 3 batch entries, the call has 2"),
    (mask_call(lambda: mask.padding(torch.ones(B, N, dtype=torch.bool, device="meta"))), ValueError, "fastpe.mask.padding: key_mask is on meta, query is on cpu"),
    (lambda: mask.dense(grad(N, N)), TypeError, "fastpe.mask.dense: mask must be a bool tensor (True: visible), got float32"),
    (lambda: mask.dense(torch.ones(B, N, N, dtype=torch.bool)), ValueError, "fastpe.mask.dense: mask must be (Nq, Nk) or (B, H, Nq, Nk), got (2, 10, 10)"),
    (mask_call(lambda: mask.dense(torch.ones(N, 9, dtype=torch.bool))), ValueError, "fastpe.mask.dense: mask has 9 keys, the call has 10"),
    (mask_call(lambda: mask.dense(torch.ones(1, 4, N, N, dtype=torch.bool))), ValueError, "fastpe.mask.dense: mask has 4 heads, the call has 8"),
    # biases
    (bias_call(lambda: bias.Alibi(6)), ValueError, "fastpe.bias.Alibi: slopes has 6 heads, the call has 8"),
    (bias_call(lambda: bias.Alibi(t(3, H))), ValueError, "fastpe.bias.Alibi: slopes has 3 batch entries, the call has 2"),
    (lambda: bias.Alibi(0), ValueError, "fastpe.bias.Alibi: slopes must be at least 1, got 0"),
    (lambda: bias.Alibi(ints([1, 2])), TypeError, "fastpe.bias.Alibi: slopes must be float32, bfloat16, float16 or float64, got int64"),
    (lambda: bias.Alibi(t(1, 2, 3)), ValueError, "fastpe.bias.Alibi: slopes must be (H,) or (B, H), got (1, 2, 3)"),
    (lambda: bias.Alibi(8, key_positions=torch.arange(3)), ValueError, "fastpe.bias.Alibi: key_positions without positions"),
    (lambda: bias.Alibi(8, positions=torch.ones(3, dtype=torch.bool)), TypeError, "fastpe.bias.Alibi: positions must hold numbers, got bool"),
    (bias_call(lambda: bias.Alibi(8, positions=torch.arange(9))), ValueError, "fastpe.bias.Alibi: positions has 9 tokens, the call has 10 keys"),
    (bias_call(lambda: bias.Alibi(8, positions=torch.arange(N) + 2**54)), ValueError, "fastpe.bias.Alibi: positions must lie within +-2**53, got 1.80144e+16"),
    (bias_call(lambda: bias.Alibi(8, positions=torch.full((N,), math.nan))), ValueError, "fastpe.bias.Alibi: positions must be finite"),
    (short(lambda: {"bias": bias.Alibi(8, positions=torch.arange(4))}), ValueError, "fastpe.bias.Alibi: 10 queries and 4 keys: queries are the last keys unless their own values are given"),
    (bias_call(lambda: bias.Alibi(t(8, device="meta"))), ValueError, "fastpe.bias.Alibi: slopes is on meta, query is on cpu"),
    (lambda: bias.alibi_slopes(0), ValueError, "fastpe.bias.alibi_slopes: heads must be at least 1, got 0"),
    (lambda: bias.Kerple(t(2), t(2), "sqrt"), ValueError, "fastpe.bias.Kerple: kind must be 'log' or 'power', got 'sqrt'"),
    (lambda: bias.Kerple(t(1, 2), t(2)), ValueError, "fastpe.bias.Kerple: p must be (H,), got (1, 2)"),
    (bias_call(lambda: bias.Kerple(t(3), t(3))), ValueError, "fastpe.bias.Kerple: p has 3 heads, the call has 8"),
    (lambda: bias.T5(t(5)), ValueError, "fastpe.bias.T5: table must be (num_buckets, H), got (5,)"),
    (lambda: bias.T5(t(31, 8)), ValueError, "fastpe.bias.T5: num_buckets must be even when bidirectional, got 31"),
    (lambda: bias.T5(t(32, 8), max_distance=8), ValueError, "fastpe.bias.T5: max_distance must be at least 9, got 8"),
    (bias_call(lambda: bias.T5(t(32, 6))), ValueError, "fastpe.bias.T5: table has 6 heads, the call has 8"),
    (lambda: bias.RelativeTable(t(2, 4)), ValueError, "fastpe.bias.RelativeTable: a two-sided table has 2 R + 1 entries, got 4 (causal=True for one side)"),
    (lambda: bias.RelativeTable(3), TypeError, "fastpe.bias.RelativeTable: table must be a tensor or a callable, got int"),
    (bias_call(lambda: bias.RelativeTable(t(3, 5))), ValueError, "fastpe.bias.RelativeTable: table has 3 heads, the call has 8"),
    (bias_call(lambda: bias.RelativeTable(t(8, 9), clamp=False)), ValueError, "fastpe.bias.RelativeTable: table holds distances up to 4, the call needs 9, that is 19 entries"),
    (bias_call(lambda: bias.RelativeTable(t(8, 7), True, clamp=False), is_causal=True), ValueError, "fastpe.bias.RelativeTable: table holds distances up to 6, the call needs 9, that is 10 entries"),
    (bias_call(lambda: bias.RelativeTable(t(8, 9), positions=3 * torch.arange(N), clamp=False)), ValueError, "fastpe.bias.RelativeTable: table holds distances up to 4, the call needs 27, that is 55 entries"),
    (bias_call(lambda: bias.RelativeTable(t(8, 19), positions=torch.arange(9))), ValueError, "fastpe.bias.RelativeTable: positions has 9 tokens, the call has 10 keys"),
    (lambda: bias.RelativeTable(t(8, 19), positions=grad(N)), TypeError, "fastpe.bias.RelativeTable: positions must hold integers and have no gradient, got float32 that requires grad; fastpe.bias.RelativeFn learns positions"),
    (lambda: bias.RelativeTable(t(8, 19), positions=ints([0]), key_positions=grad(N)), TypeError, "fastpe.bias.RelativeTable: key_positions must hold integers and have no gradient, got float32 that requires grad; fastpe.bias.RelativeFn learns positions"),
    (lambda: fire(positions=grad(N)), TypeError, "fastpe.bias.Fire: positions must hold integers and have no gradient, got float32 that requires grad; fastpe.bias.RelativeFn learns positions"),
    (lambda: bias.bipe_alibi(8, grad(N)), TypeError, "fastpe.bias.bipe_alibi: segments must hold integers, got float32"),
    (lambda: bias.relative_grid(t(8, 3, 27), torch.cartesian_prod(torch.arange(5), torch.arange(14))), ValueError, "fastpe.bias.relative_grid: table holds offsets up to 1 along axis 0, the coordinates need 4, that is 9 entries"),
    (bias_call(lambda: bias.RelativeTable(lambda d: t(8, 3))), ValueError, "fastpe.bias.RelativeTable: the callable must return (H, 19) for 19 distances, got (8, 3)"),
    (lambda: bias.Sandwich(4, dim=7), ValueError, "fastpe.bias.Sandwich: dim must be even, got 7"),
    (lambda: bias.Cable(t(2, 3)), ValueError, "fastpe.bias.Cable: prefix must be (B, H, N), got (2, 3)"),
    (bias_call(lambda: bias.Cable(t(B, H, 9))), ValueError, "fastpe.bias.Cable: prefix has 9 tokens, the call has 10 keys"),
    (bias_call(lambda: bias.Cable(t(B, HK, N))), ValueError, "fastpe.bias.Cable: prefix has 4 heads, the call has 8"),
    (bias_call(lambda: bias.Cable(t(B, H, N), t(B, H, 7))), ValueError, "fastpe.bias.Cable: row_weight has 7 tokens, the call has 10 queries"),
    (bias_call(lambda: bias.KernelCable(t(B, H, 9))), ValueError, "fastpe.bias.KernelCable: prefix has 9 tokens, the call has 10 keys"),
    (bias_call(lambda: bias.Forget(fastpe.prefix_sum(t(B, H, 11)))), ValueError, "fastpe.bias.Forget: log_gates has 11 tokens, the call has 10 keys"),
    (lambda: bias.KernelCable(t(B, H, N), block_sizes=[1, 1]), ValueError, "fastpe.bias.KernelCable: block_sizes must hold one length for each of 8 heads, got 2"),
    (lambda: bias.block_means(t(B, 2, N), [2, 0]), ValueError, "fastpe.bias.block_means: block_sizes must be at least 1, got 0"),
    (lambda: fire(torch.nn.GELU()), NotImplementedError, "fastpe.bias.Fire: the network must be Linear(1, W), ReLU, Linear(W, H) with biases, got Linear, GELU, Linear; use fastpe.bias.RelativeTable or fastpe.bias.Dense for others"),
    (bias_call(lambda: fire(heads=6)), ValueError, "fastpe.bias.Fire: w2 has 6 heads, the call has 8"),
    (bias_call(lambda: bias.Cope(t(D, 4))), ValueError, "fastpe.bias.Cope: counts the tokens between a key and a later query, so keys after the query must be hidden; the call is not causal (pass is_causal=True)"),
    (lambda: bias.Alibi(8) + bias.Cope(t(D, 4)), NotImplementedError, "fastpe.bias: Cope counts gates in a kernel of its own and does not add to other biases"),
    (bias_call(lambda: bias.Alibi(8) + bias.Cable(t(B, H, N))), ValueError, "fastpe.bias: Alibi and Cable both take the one closed form of a call; add functions of the distance in one RelativeTable(lambda d: ...), or give one of them as a Dense"),
    (bias_call(lambda: fire() + bias.RelativeTable(t(8, 19))), ValueError, "fastpe.bias: Fire and RelativeTable both take the one closed form of a call; add functions of the distance in one RelativeTable(lambda d: ...), or give one of them as a Dense"),
    (bias_call(lambda: bias.RowTable(t(B, H, N, 3)) + bias.RowTable(t(B, H, N, 3))), ValueError, "fastpe.bias: RowTable and RowTable both take the one RowTable of a call; join their tables along the channels, or give one of them as a Dense"),
    (bias_call(lambda: bias.RowTable(t(B, H, 7, 3))), ValueError, "fastpe.bias.RowTable: terms has 7 queries, the call has 10"),
    (lambda: bias.RowTable(t(B, H, N, 4)), ValueError, "fastpe.bias.RowTable: without index, terms hold 2 M + 1 offsets, got R = 4; give index for another order"),
    (lambda: bias.RowProduct(t(B, H, N, D), t(5, D + 1)), ValueError, "fastpe.bias.RowProduct: vectors must be (B, H, queries, d) and table (R, d) or (H, R, d), got (2, 8, 10, 16) and (5, 17)"),
    (lambda: bias.ColProduct(t(B, H, N, D), t(4, D)), ValueError, "fastpe.bias.ColProduct: without index, table holds 2 M + 1 offsets, got R = 4; give index for another order"),
    (bias_call(lambda: bias.RowProduct(t(B, H, 7, D), t(5, D))), ValueError, "fastpe.bias.RowProduct: vectors has 7 queries, the call has 10"),
    (bias_call(lambda: bias.RowProduct(t(B, H, N, D), t(6, 5, D))), ValueError, "fastpe.bias.RowProduct: table has 6 heads, the call has 8"),
    (bias_call(lambda: bias.RowProduct(t(B, H, N, D), t(5, D)) + bias.ColTable(t(B, H, N, 7))), ValueError, "fastpe.bias: RowProduct and ColTable both take the one index of a call; give the terms of rows and columns the same entries and index, or give one of them as a Dense"),
    (lambda: bias.transformer_xl(t(B, H, N, D), t(B, HK, N, D), t(4, H, D), t(H, D), t(H, D)), ValueError, "fastpe.bias.transformer_xl: r holds 4 distances, 10 keys need as many"),
    (bias_call(lambda: bias.Alibi(8, row_term=False)), NotImplementedError, "fastpe.bias.Alibi: row_term=False is the same softmax in causal calls only; leave row_term True"),
    (lambda: bias.Alibi(8, positions=torch.arange(N), row_term=False), NotImplementedError, "fastpe.bias.Alibi: row_term=False goes with neither positions nor future_slopes; leave row_term True"),
    (bias_call(lambda: bias.Alibi(8, row_term=False), is_causal=True, sink=t(H)), NotImplementedError, ATT + "sink does not go with a bias without its row term, Alibi: the sink's share of a row depends on it; use row_term=True"),
    (bias_call(lambda: bias.Alibi(8, row_term=False) + bias.Dense(t(N, N)), is_causal=True, sink=t(H)), NotImplementedError, ATT + "sink does not go with a bias without its row term, Sum: the sink's share of a row depends on it; use row_term=True"),
    (lambda: bias.Forget(ints([[[1]]])), TypeError, "fastpe.bias.Forget: log_gates must be float32, bfloat16, float16 or float64, got int64"),
    (lambda: bias.Forget(t(2, 3, 4), future_log_gates=t(2, 3, 5)), ValueError, "fastpe.bias.Forget: future_log_gates must have log_gates' shape (2, 3, 4), got (2, 3, 5)"),
    (lambda: bias.Forget(t(2, 3, 4), ints([0, 1]), fastpe.prefix_sum(t(2, 3, 4))), ValueError, "fastpe.bias.Forget: seq_start changes the gates before they are summed; give future_log_gates, not a Prefix"),
    (lambda: bias.Forget(t(2, 3, 4), ints([0])), ValueError, "fastpe.bias.Forget: seq_start must be (B,) with B = 2, got (1,)"),
    (lambda: bias.RelativeFn("cubic"), ValueError, "fastpe.bias.RelativeFn: kind must be one of linear, signed, abs, log, power, logsq, got 'cubic'"),
    (lambda: bias.RelativeFn("linear"), ValueError, "fastpe.bias.RelativeFn: kind linear takes params (a_plus, a_minus)"),
    (lambda: bias.RelativeFn("signed", (t(2), t(2))), ValueError, "fastpe.bias.RelativeFn: kind signed takes no params"),
    (lambda: bias.Dense(t(3)), ValueError, "fastpe.bias.Dense: values must be (Nq, Nk), (H, Nq, Nk) or (B, H, Nq, Nk), got (3,)"),
    (lambda: bias.Dense(ints([[1]])), TypeError, "fastpe.bias.Dense: values must be float32, bfloat16, float16 or float64, got int64"),
    (bias_call(lambda: bias.Dense(t(N, 9))), ValueError, "fastpe.bias.Dense: values has 9 keys, the call has 10"),
    (bias_call(lambda: bias.Dense(t(3, 1, N))), ValueError, "fastpe.bias.Dense: values has 3 heads, the call has 8"),
    (bias_call(lambda: bias.Alibi(8) + bias.T5(t(32, 8))), ValueError, "fastpe.bias: Alibi and T5 both take the one closed form of a call; add functions of the distance in one RelativeTable(lambda d: ...), or give one of them as a Dense"),
    (call(softcap_includes_bias=True), ValueError, ATT + "softcap_includes_bias without softcap"),
    # prefix sums
    (lambda: fastpe.prefix_sum(ints([1])), TypeError, "fastpe.prefix_sum: x must be float32, bfloat16, float16 or float64, got int64"),
    (lambda: fastpe.prefix_sum(t(())), ValueError, "fastpe.prefix_sum: x must have a token dimension, got a number"),
    (lambda: fastpe.prefix_sum(t(2, 3)).append(t(3, 1)), ValueError, "fastpe.Prefix.append: x must have local's leading shape (2, 3), got (3, 1)"),
    (lambda: fastpe.prefix_sum(t(3)).append(grad(1)), ValueError, "fastpe.Prefix.append: no gradient flows through append; call it under torch.no_grad(), or prefix_sum on the whole sequence"),
    (lambda: fastpe.Prefix(t(300), t(2, dtype=torch.float64)), ValueError, "fastpe.Prefix: 300 tokens need 3 bases (one for 128), got 2"),
    (lambda: fastpe.Prefix(t(300), t(3)), TypeError, "fastpe.Prefix: base must be float64, got float32"),
    # settings and modules
    (lambda: fastpe.config.set_skip_bound(1.0), ValueError, "fastpe.config.set_skip_bound: bound must be in [0, 1), got 1"),
    (lambda: fastpe.config.set_skip_bound("small"), TypeError, "fastpe.config.set_skip_bound: bound must be a number, got str"),
    (lambda: fastpe.nn.CableBias(16, 4, version="v2"), ValueError, "fastpe.nn.CableBias: version must be 'v1' or 'v3', got 'v2'"),
    (lambda: fastpe.nn.CableBias(16, 4)(t(1, 5, 8)), ValueError, "fastpe.nn.CableBias: x must be (B, N, 16), got (1, 5, 8)"),
    (lambda: fastpe.nn.KerpleBias(0), ValueError, "fastpe.nn.KerpleBias: heads must be at least 1, got 0"),
    (lambda: fastpe.nn.ForgetBias(16, 4, decay_times=(9.0, 2.0)), ValueError, "fastpe.nn.ForgetBias: decay_times must not decrease, got 9 then 2"),
]  # fmt: skip


@pytest.mark.parametrize("bad, kind, message", TABLE, ids=[message[:70] for _, _, message in TABLE])
def test_message(bad, kind, message):
    with pytest.raises(kind) as raised:
        bad()
    first, said = message.split(":")[0], str(raised.value)
    assert said == message or said.startswith(message + ";"), f"{first} said: {said}"
    assert type(raised.value) is kind


def test_second_derivative():
    q = torch.randn(1, 1, 5, 8, requires_grad=True)
    (g,) = torch.autograd.grad(fastpe.attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not supported"):
        g.sum().backward()


def test_what_the_cuda_kernels_do_not_have():
    """Without a GPU: the check alone."""
    from fastpe.attention import _check_kernels

    _check_kernels("cpu", torch.float64)
    _check_kernels("cuda", torch.float32)
    _check_kernels("cuda", torch.bfloat16, halves_for="landmarks")
    with pytest.raises(NotImplementedError, match="query on a GPU must be float32, bfloat16 or float16, got float64; cast"):
        _check_kernels("cuda", torch.float64)
    with pytest.raises(NotImplementedError, match="query on a GPU with landmarks must be bfloat16 or float16, got float32; cast"):
        _check_kernels("cuda", torch.float32, halves_for="landmarks")
