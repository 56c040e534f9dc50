"""Other libraries' attention functions on fastpe, against torch's or their documented meaning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastpe.integrations.flash import flash_attn_func, flash_attn_varlen_func
from fastpe.integrations.sdpa import scaled_dot_product_attention as ours


def randn(*shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def close(got, want, tol=2e-5):
    assert got.shape == want.shape
    assert (got.double() - want.double()).abs().max() <= tol * want.double().abs().max()


def refused(call, error, *said):
    with pytest.raises(error) as caught:
        call()
    for text in said:
        assert text in str(caught.value), str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# scaled_dot_product_attention


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4, 9, 16), (2, 4, 9, 16), (2, 4, 9, 16)),
        ((2, 4, 5, 16), (2, 4, 9, 16), (2, 4, 9, 24)),
        ((2, 4, 9, 16), (2, 4, 5, 16), (2, 4, 5, 8)),
        ((4, 7, 16), (4, 9, 16), (4, 9, 16)),
        ((7, 16), (9, 16), (9, 16)),
        ((2, 3, 4, 7, 16), (2, 3, 4, 9, 16), (2, 3, 4, 9, 16)),
        ((2, 4, 7, 12), (2, 4, 9, 12), (2, 4, 9, 20)),
        ((2, 4, 7, 16), (1, 1, 9, 16), (2, 1, 9, 16)),
        ((2, 4, 1, 16), (2, 4, 9, 16), (2, 4, 9, 16)),
    ],
)
def test_sdpa_shapes(shapes):
    q, k, v = (randn(*s) for s in shapes)
    close(ours(q, k, v), F.scaled_dot_product_attention(q, k, v))
    close(ours(q, k, v, scale=0.3), F.scaled_dot_product_attention(q, k, v, scale=0.3))
    close(ours(q, k, v, is_causal=True), F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_sdpa_causal_is_top_left():
    q, k, v = randn(1, 1, 3, 8), randn(1, 1, 5, 8), randn(1, 1, 5, 8)
    close(ours(q, k, v, is_causal=True)[0, 0, 0], v[0, 0, 0])


def test_sdpa_grouped_heads():
    q, k, v = randn(2, 6, 7, 16), randn(2, 2, 9, 16), randn(2, 2, 9, 16)
    close(ours(q, k, v, enable_gqa=True), F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    refused(lambda: ours(q, k, v), ValueError, "leading dimensions", "(2, 6, 7, 16)")
    refused(lambda: ours(q, randn(2, 4, 9, 16), randn(2, 4, 9, 16), enable_gqa=True), ValueError, "4 heads")


@pytest.mark.parametrize("shape", [(7, 9), (1, 9), (4, 7, 9), (2, 1, 7, 9), (2, 4, 7, 9), (2, 1, 1, 9)])
def test_sdpa_masks_and_gradients(shape):
    seen = randn(*shape) > -0.5
    seen[..., 0] = True
    for mask in (seen, randn(*shape) * 2):
        grads = []
        for function in (ours, F.scaled_dot_product_attention):
            inputs = [x.requires_grad_() for x in (randn(2, 4, 7, 16), randn(2, 4, 9, 16), randn(2, 4, 9, 16))]
            given = mask if mask.dtype == torch.bool else mask.clone().requires_grad_()
            out = function(*inputs, attn_mask=given)
            out.square().sum().backward()
            grads.append([out, *(x.grad for x in inputs), *([] if mask.dtype == torch.bool else [given.grad])])
        for got, want in zip(*grads, strict=True):
            close(got, want, 1e-4)


def test_sdpa_masks_of_more_dimensions_and_rows_without_keys():
    q, k = randn(2, 3, 4, 7, 16), randn(2, 3, 4, 9, 16)
    mask = randn(2, 1, 4, 7, 9) > 0
    close(ours(q, k, k, attn_mask=mask), F.scaled_dot_product_attention(q, k, k, attn_mask=mask))
    mask = torch.ones(7, 9, dtype=torch.bool)
    mask[3] = False
    assert (ours(q, k, k, attn_mask=mask)[..., 3, :] == 0).all()


def test_sdpa_other_dtypes_and_layouts():
    q, k = randn(2, 9, 4, 16).transpose(1, 2), randn(2, 4, 16, 9).transpose(2, 3)
    close(ours(q, k, k), F.scaled_dot_product_attention(q, k, k))
    close(ours(q.double(), k.double(), k.double()), F.scaled_dot_product_attention(q.double(), k.double(), k.double()), 1e-10)
    half = ours(q.bfloat16(), k.bfloat16(), k.bfloat16())
    assert half.dtype == torch.bfloat16
    close(half, F.scaled_dot_product_attention(q, k, k), 2e-2)


def test_sdpa_refusals():
    q = randn(2, 4, 7, 16)
    refused(lambda: ours(q, q, q, dropout_p=0.1), NotImplementedError, "dropout_p must be 0, got 0.1")
    refused(lambda: ours(q, q, q, attn_mask=torch.ones(7, 7, dtype=torch.bool), is_causal=True), ValueError, "attn_mask", "is_causal")
    refused(lambda: ours(q, q, q, attn_mask=torch.ones(7, 7).long()), TypeError, "attn_mask", "int64")
    refused(lambda: ours(q, q, q, attn_mask=torch.ones(6, 7)), ValueError, "attn_mask (6, 7)")


# ---------------------------------------------------------------------------------------------------------------------
# flash-attention


def flash_definition(q, k, v, scale, causal, window, softcap, slopes):
    """(Nq, H, D), (Nk, Hk, D): the documentation of flash_attn_func, word for word, in float64. out and lse (H, Nq)."""
    Nq, Nk = q.shape[0], k.shape[0]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    s = q @ k.mT * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    i, j = torch.arange(Nq)[:, None] + Nk - Nq, torch.arange(Nk)
    if slopes is not None:
        s = s - slopes.double()[:, None, None] * (i - j).abs()
    left, right = window
    right = 0 if causal else right
    hidden = torch.zeros(Nq, Nk, dtype=torch.bool)
    if left >= 0:
        hidden |= j < i - left
    if right >= 0:
        hidden |= j > i + right
    s = s.masked_fill(hidden, -torch.inf)
    lse = s.logsumexp(-1)
    p = torch.where(hidden.all(-1)[:, None], 0.0, (s - lse[..., None]).exp())
    return (p @ v).transpose(0, 1), lse


CALLS = [
    {},
    {"causal": True},
    {"causal": True, "window_size": (3, 0)},
    {"window_size": (2, 1)},
    {"window_size": (-1, 2), "softcap": 5.0},
    {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.05])},
    {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.05]), "softmax_scale": 0.4},
]


def definition(q, k, v, call):
    return flash_definition(
        q, k, v, call.get("softmax_scale", q.shape[-1] ** -0.5), call.get("causal", False), call.get("window_size", (-1, -1)),
        call.get("softcap", 0.0), call.get("alibi_slopes"),
    )  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("sizes", [(9, 9), (5, 9), (9, 5)])
def test_flash_attn_func(call, sizes):
    Nq, Nk = sizes
    q, k, v = randn(2, Nq, 4, 16), randn(2, Nk, 2, 16), randn(2, Nk, 2, 16)
    out, lse, probs = flash_attn_func(q, k, v, **call, return_attn_probs=True)
    assert probs is None
    for b in range(2):
        want, want_lse = definition(q[b], k[b], v[b], call)
        close(out[b], want)
        finite = torch.isfinite(want_lse)
        assert torch.equal(finite, torch.isfinite(lse[b]))
        close(lse[b][finite], want_lse[finite])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("ends", [([0, 4, 5, 12], [0, 4, 5, 12]), ([0, 2, 3, 9], [0, 4, 8, 15]), ([0, 6, 6, 12], [0, 4, 5, 9])])
def test_flash_attn_varlen_func(call, ends):
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ends)
    q, k, v = randn(ends[0][-1], 4, 16), randn(ends[1][-1], 2, 16), randn(ends[1][-1], 2, 16)
    out, lse, _ = flash_attn_varlen_func(q, k, v, cu_q, cu_k, **call, return_attn_probs=True)
    for a, b, c, d in zip(ends[0], ends[0][1:], ends[1], ends[1][1:]):
        if a < b:
            want, want_lse = definition(q[a:b], k[c:d], v[c:d], call)
            assert (out[a:b].double() - want).abs().max() < 2e-5 * max(1.0, want.abs().max())
            finite = torch.isfinite(want_lse)
            assert torch.equal(finite, torch.isfinite(lse[:, a:b]))
            assert (lse[:, a:b][finite].double() - want_lse[finite]).abs().max() < 2e-5


def test_flash_gradients():
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.05], requires_grad=True)
    grads = []
    for function in (lambda *x: flash_attn_func(*x, causal=True, alibi_slopes=slopes), None):
        x = [y.requires_grad_() for y in (randn(1, 7, 4, 16), randn(1, 7, 2, 16), randn(1, 7, 2, 16))]
        slopes.grad = None
        out = function(*x) if function else flash_definition(*(y[0] for y in x), 0.25, True, (-1, -1), 0.0, slopes)[0][None]
        out.square().sum().backward()
        grads.append([y.grad for y in (*x, slopes)])
    for got, want in zip(*grads, strict=True):
        close(got, want, 1e-4)


def test_flash_refusals():
    q, cu = randn(1, 7, 4, 16), torch.tensor([0, 7])
    refused(lambda: flash_attn_func(q, q, q, dropout_p=0.1), NotImplementedError, "dropout_p must be 0, got 0.1")
    refused(lambda: flash_attn_func(q, q, q, window_size=(-2, 0)), ValueError, "window_size", "-2")
    q = q[0]
    refused(lambda: flash_attn_varlen_func(q, q, q, cu, cu, block_table=cu), NotImplementedError, "block_table")
    refused(lambda: flash_attn_varlen_func(q, q, q, cu, torch.tensor([0, 6])), ValueError, "cu_seqlens_k must rise from 0 to 7")
    refused(lambda: flash_attn_varlen_func(q, q, q, cu, cu, alibi_slopes=torch.ones(1, 4)), NotImplementedError, "alibi_slopes")
