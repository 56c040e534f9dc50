"""What bias and mask objects hand to the kernels, against their own definitions and against brute force."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fastpe
from fastpe import bias, mask
from fastpe._load import _C
from fastpe.bias import Call


def call(B=2, H=2, Nq=9, Nk=9, causal=False, dtype=torch.float64):
    return Call(B, H, Nq, Nk, causal, dtype, torch.device("cpu"))


def dense_visibility(m: mask.Mask, c: Call) -> torch.Tensor:
    """Visibility from the kernel arguments, pair by pair, by the rule of csrc/core/params.h."""
    a = m.op_args(c)
    seen = torch.zeros(c.B, c.H, c.Nq, c.Nk, dtype=torch.bool)
    for i in range(c.Nq):
        for j in range(c.Nk):
            index = i + c.Nk - c.Nq
            by_index = _C.visible(index, j, a.left, a.right, a.sinks)
            for b in range(c.B):
                row = by_index
                if a.k_ids is not None:
                    k = a.k_ids[b % a.k_ids.shape[0], j]
                    row = row and bool(k >= 0) and bool(k == a.q_ids[b % a.q_ids.shape[0], i])
                for h in range(c.H):
                    x = a.mask
                    own = True if x is None else x[b % x.shape[0], h % x.shape[1], i % x.shape[2], j % x.shape[3]]
                    seen[b, h, i, j] = row and bool(own)
    return seen


IDS = torch.tensor([[0, 0, 1, 1, 0, 2, 2, -1, 1], [3, 3, 3, 0, 0, 0, 0, 0, 0]])
KEYS = torch.tensor([[True] * 7 + [False] * 2, [False] * 3 + [True] * 6])
MASKS = {
    "nothing": mask.Mask(),
    "causal": mask.causal(),
    "window": mask.window(3),
    "window_right": mask.window(None, 2),
    "window_both": mask.window(3, 4),
    "sinks_alone": mask.sinks(2),
    "window_sinks": mask.window(2, 1) & mask.sinks(2),
    "cu_seqlens": mask.documents(cu_seqlens=torch.tensor([0, 4, 4, 7])),
    "ids": mask.documents(ids=IDS),
    "padding": mask.padding(KEYS),
    "padding_row": mask.padding(KEYS[0]),
    "dense": mask.dense(torch.rand(9, 9) > 0.5),
    "dense_heads": mask.dense(torch.rand(1, 2, 9, 1) > 0.3),
    "document_sinks": mask.documents(ids=IDS) & mask.window(2) & mask.sinks(1),
    "document_sinks_padding": mask.documents(ids=IDS) & mask.window(1) & mask.sinks(1) & mask.padding(KEYS) & mask.causal(),
    "two_documents": mask.documents(ids=IDS) & mask.documents(cu_seqlens=torch.tensor([0, 3, 9])),
    "two_documents_sinks": mask.documents(ids=IDS)
    & mask.documents(cu_seqlens=torch.tensor([0, 3, 9]))
    & mask.window(1)
    & mask.sinks(1),
    "two_paddings": mask.padding(KEYS) & mask.padding(KEYS.flip(0)),
    "two_dense": mask.dense(torch.rand(9, 9) > 0.3) & mask.dense(torch.rand(2, 1, 1, 9) > 0.3),
}


@pytest.mark.parametrize("Nq", [9, 4])
@pytest.mark.parametrize("name", MASKS)
def test_mask_arguments(name, Nq):
    m = MASKS[name]
    if name.startswith(("dense", "two_dense")) and Nq != 9:
        pytest.skip("a dense mask has its own lengths")
    c = call(Nq=Nq)
    want = m.materialize(c).broadcast_to(2, 2, Nq, 9)
    assert torch.equal(dense_visibility(m, c), want)


def test_mask_definition_by_hand():
    c = call(B=1, H=1, Nq=4, Nk=6)
    m = mask.window(2, 1) & mask.sinks(1) & mask.padding(torch.tensor([True, True, True, False, True, True]))
    #              keys 0  1  2  3  4  5; queries stand at 2, 3, 4, 5
    want = [[1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 0, 0], [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 1, 1]]
    assert m.materialize(c)[0, 0].int().tolist() == want


def test_documents_by_hand():
    c = call(B=1, H=1, Nq=5, Nk=5)
    m = mask.documents(cu_seqlens=torch.tensor([0, 2, 4])) & mask.causal()
    want = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]
    assert m.materialize(c)[0, 0].int().tolist() == want


def test_masks_cost_no_square_array():
    """Only a dense mask and sinks of documents hand an Nq x Nk array to the kernels."""
    c = call()
    square = {name for name, m in MASKS.items() if m.op_args(c).mask is not None}
    assert square == {n for n in MASKS if "dense" in n or ("document" in n and "sinks" in n)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("causal", [False, True])
def test_tables_are_as_long_as_they_must_be(causal, dtype):
    c = call(Nq=5, Nk=300, causal=causal, dtype=dtype)
    p = torch.rand(2)
    for b, reach in ((bias.Kerple(p, p), 299), (bias.T5(torch.randn(32, 2)), 128), (bias.Sandwich(2, dim=8), 299)):
        a = b.op_args(c)
        assert a.form == bias.FORMS["table_causal" if causal else "table"]
        assert a.table.shape == (2, reach + 1 if causal else 2 * reach + 1) and a.table.dtype == dtype


def test_kinds_are_small_and_frozen():
    b = bias.Alibi(torch.rand(2, requires_grad=True), positions=torch.arange(3))
    assert repr(b) == "Alibi(slopes=tensor(2,) with grad, positions=tensor(3,))"
    with pytest.raises(dataclasses.FrozenInstanceError):
        b.slopes = None
    assert repr(bias.Kerple(torch.rand(2), torch.rand(2))) == "Kerple(p=tensor(2,), a=tensor(2,), kind='log')"
    assert repr(mask.causal() & mask.padding(KEYS)) == "Mask(right=1, padding=(2, 9))"
    assert repr(fastpe.prefix_sum(torch.zeros(1, 1, 4))) == "Prefix(shape=(1, 1, 4), dtype=float32)"


def test_alibi_is_a_relative_fn():
    """The same numbers three ways: closed form, general form, table."""
    q = torch.randn(1, 4, 20, 8, dtype=torch.float64)
    m = bias.alibi_slopes(4).double()
    ways = (
        bias.Alibi(4),
        bias.RelativeFn("linear", (m, m)),
        bias.RelativeTable(lambda d: -m[:, None] * d.abs()),
        bias.RelativeTable(-m[:, None] * torch.arange(-19, 20).abs()),
    )
    out = [fastpe.attention(q, q, q, bias=b) for b in ways]
    for x in out[1:]:
        torch.testing.assert_close(x, out[0])


def test_cable_v1_is_forgetting():
    """Cable's first version is FoX with z = -h (bias.md 3.6)."""
    q, h = torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30)
    a = fastpe.attention(q, q, q, bias=bias.Cable(-torch.nn.functional.softplus(h)), is_causal=True)
    b = fastpe.attention(q, q, q, bias=bias.Forget(torch.nn.functional.logsigmoid(-h)), is_causal=True)
    torch.testing.assert_close(a, b)


def test_cable_with_constant_tokens_is_alibi():
    """Token increments -1 and weights m_h give ALiBi (the paper's remark)."""
    q, m = torch.randn(1, 4, 30, 8), bias.alibi_slopes(4)
    b = bias.Cable(-torch.ones(1, 4, 30), m[None, :, None].expand(1, 4, 30))
    torch.testing.assert_close(
        fastpe.attention(q, q, q, bias=b, is_causal=True), fastpe.attention(q, q, q, bias=bias.Alibi(4), is_causal=True)
    )


def test_gqa_is_repeated_heads():
    q, k, v = torch.randn(1, 6, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    got = fastpe.attention(q, k, v)
    want = fastpe.attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    torch.testing.assert_close(got, want)


def test_against_sdpa():
    """The plain call is torch's own attention."""
    q, k, v = (torch.randn(2, 4, 50, 16, dtype=torch.float64) for _ in range(3))
    for causal in (False, True):
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.testing.assert_close(fastpe.attention(q, k, v, is_causal=causal), want)
