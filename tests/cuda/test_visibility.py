"""Visibility rules and regions in the CUDA kernels: rules against the dense mask they stand for, bit for bit; regions against
the float64 definition."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from emulated import SCHEDULES

import fastpe
from fastpe import reference
from fastpe.ops import _ARGS, NEEDS
from fastpe.testing.cases import REGIONS, Case, build
from fastpe.testing.compare import close_half, eager_attention, error

B, H, HK, NQ, NK, D = 2, 2, 1, 150, 210, 24
PLAIN = {
    "rope_layout": 0, "bias_form": 0, "left": 0, "right": 0, "sinks": 0, "scale": 0.25, "softcap": 0.0, "softcap_mul": 0.0, "skip_eps": 0.0,
    "softcap_bias": False, "block_q": 1, "block_k": 1, "region_kind": 0, "region_size": 0, "keep_residual": False,
}  # fmt: skip


def rules():
    """Name -> arguments of the op, and the mask they stand for."""
    g = torch.Generator().manual_seed(1)
    I, j = torch.arange(NQ)[:, None] + NK - NQ, torch.arange(NK)  # noqa: E741
    starts = torch.randint(0, NK, (2, B, NK), generator=g)
    ends = starts + torch.randint(0, 60, (2, B, NK), generator=g)
    planes = torch.stack([starts[0], ends[0], starts[1], ends[1]], 1).int()
    seen = ((planes[:, 0, None] <= I) & (I < planes[:, 1, None])) | ((planes[:, 2, None] <= I) & (I < planes[:, 3, None]))
    yield "intervals", {"intervals": planes}, seen[:, None]
    # Whole tiles hidden from whole blocks.
    near = torch.stack([j, j + 20, torch.zeros_like(j), torch.zeros_like(j)])[None].int().contiguous()
    yield "near", {"intervals": near}, ((j <= I) & (I < j + 20))[None, None]
    lower = torch.randint(0, NK, (1, NQ), generator=g).int()
    yield "lower", {"lower": lower, "right": 1}, ((j >= lower[0][:, None]) & (j <= I))[None, None]
    q, k = torch.randint(0, 5, (B, NQ), generator=g).int(), torch.randint(0, 4, (1, NK), generator=g).int()
    relation = torch.rand(5, 4, generator=g) < 0.5
    yield "segments", {"q_seg": q, "k_seg": k, "relation": relation}, relation[q.long()[:, :, None], k.long()[:, None]][:, None]
    for name, (bq, bk, shape) in {"blocks": (64, 64, (B, H)), "large blocks": (128, 64, (1, H)), "small blocks": (16, 8, (1, 1)), "odd blocks": (50, 70, (B, 1))}.items():
        lists = torch.rand(*shape, -(-NQ // bq), -(-NK // bk), generator=g) < 0.4
        dense = lists.repeat_interleave(bq, 2)[:, :, :NQ].repeat_interleave(bk, 3)[..., :NK]
        yield name, {"block_map": lists, "block_q": bq, "block_k": bk}, dense
    ids, key_ids = torch.randint(0, 3, (B, NQ), generator=g).int(), torch.randint(-1, 3, (B, NK), generator=g).int()
    both = seen[:, None] & (ids[:, None, :, None] == key_ids[:, None, None]) & (lists.new_ones(1) & (j <= I))
    yield "all at once", {"intervals": planes, "q_ids": ids, "k_ids": key_ids, "right": 1}, both


RULES = {name: rest for name, *rest in rules()}


def call(tensors, arguments):
    values = PLAIN | {"q": tensors[0], "k": tensors[1], "v": tensors[2]} | arguments
    return [values.get(name) for name in _ARGS]


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_its_mask(name, on_kernels):
    arguments, mask = RULES[name]
    g = torch.Generator().manual_seed(2)
    q, k, v, dout = (torch.randn(B, h, n, D, generator=g).bfloat16() for h, n in ((H, NQ), (HK, NK), (HK, NK), (H, NQ)))
    results = []
    for given in (arguments, {"mask": mask.contiguous()}):
        with on_kernels():
            out, lse, _ = torch.ops.fastpe.attn_fwd(*call((q, k, v), given))
            grads = torch.ops.fastpe.attn_bwd(dout, None, q, k, v, out, lse, None, *call((q, k, v), given)[3:-1], NEEDS["q"] | NEEDS["k"] | NEEDS["v"])
        results.append((out, lse, *grads[:3]))
    assert mask.any() and not mask.all()
    for rule, dense in zip(*results):
        assert torch.equal(rule, dense)


def test_hidden_tiles_are_not_visited(emu, on_emulator):
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(B, h, n, D, generator=g).bfloat16() for h, n in ((H, NQ), (HK, NK), (HK, NK)))
    visited = {}
    for name in ("near", "blocks"):
        arguments, mask = RULES[name]
        torch.ops.fastpe_emu.tile_counts()
        with on_emulator(**SCHEDULES[0]):
            torch.ops.fastpe.attn_fwd(*call((q, k, v), arguments))
        visited[name] = torch.ops.fastpe_emu.tile_counts()[0]
        padded = torch.zeros(B, H, 192, 256, dtype=torch.bool)
        padded[:, :, :NQ, :NK] = mask
        assert visited[name] == int(padded.unfold(2, 64, 64).unfold(3, 64, 64).flatten(-2).any(-1).sum())
    assert visited["near"] < B * H * 3 * 4


REGION_CASE = Case(B=1, H=2, Hk=1, Nq=150, Nk=210, D=16, Dv=16, rope="half", causal=True, lse_gradient=True, seed=3)


def compare_region(name, on_kernels, case=REGION_CASE, dtype=torch.bfloat16):
    case = dataclasses.replace(case, region=name, causal=case.causal and "bidirectional" not in name)
    want_out, want_lse, want = build(case, dtype, wide=True)(reference.attention)
    torch_out, torch_lse, torchs = build(case, dtype)(eager_attention)
    with on_kernels():
        out, lse, got = build(case, dtype)(fastpe.attention)
    close_half("out", out, want_out, torch_out, dtype=dtype)
    close_half("lse", lse, want_lse, torch_lse, floor=1.0, dtype=dtype)
    for leaf in want:
        if want[leaf] is not None:
            close_half(f"d {leaf}", got[leaf], want[leaf], torchs[leaf], floor=1e-2, dtype=dtype)


@pytest.mark.parametrize("name", [r for r in REGIONS if r != "none"])
def test_region(name, on_kernels):
    compare_region(name, on_kernels)


@pytest.mark.parametrize("bias,mask", [("t5", "none"), ("cable", "ids"), ("dense", "window_sinks"), ("alibi", "none")])
def test_region_with_bias_and_mask(bias, mask, on_kernels):
    compare_region("dual_chunk", on_kernels, dataclasses.replace(REGION_CASE, bias=bias, mask=mask), torch.float16)


@pytest.mark.parametrize("D", [128, 256])
def test_region_with_many_channels(D, on_kernels):
    compare_region("self_extend", on_kernels, dataclasses.replace(REGION_CASE, D=D, Dv=D, H=1, Nq=70, Nk=130))


def test_more_queries_than_keys(on_kernels):
    compare_region("self_extend_bidirectional", on_kernels, dataclasses.replace(REGION_CASE, Nq=150, Nk=70, causal=False))


@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
def test_segment_terms(shared, on_kernels):
    """Factor and addend by pair of segments, against the CPU kernels in float64."""
    g = torch.Generator().manual_seed(4)
    qkv = [torch.randn(B, h, n, D, generator=g).half() for h, n in ((H, NQ), (HK, NK), (HK, NK))]
    dout = torch.randn(B, H, NQ, D, generator=g).half()
    shape = (1, 1, 5, 3) if shared else (B, H, 5, 3)
    given = {
        "bias_factor": 0.5 + torch.rand(*shape, generator=g), "bias_pairs": torch.randn(*shape, generator=g), "right": 1, "keep_residual": True,
        "bias_q_seg": torch.randint(0, 5, (B, NQ), generator=g).int(), "bias_k_seg": torch.randint(0, 3, (B, NK), generator=g).int(),
        "softcap": 5.0, "softcap_mul": 5.0,
    }  # fmt: skip
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in given.items()} | {"keep_residual": False}
    needs = NEEDS["q"] | NEEDS["k"] | NEEDS["v"] | NEEDS["bias_factor"] | NEEDS["bias_pairs"]

    def results(tensors, dout, given):
        args = call(tensors, given)
        out, lse, residual = torch.ops.fastpe.attn_fwd(*args)
        grads = torch.ops.fastpe.attn_bwd(dout, None, *tensors, out, lse, residual if given["keep_residual"] else None, *args[3:-1], needs)
        return (out, lse, *(x for x in grads if x.numel()))

    with on_kernels():
        got = results(qkv, dout, given)
    want = results([x.double() for x in qkv], dout.double(), wide)
    assert len(got) == len(want) == 7
    for x, y in zip(got, want):
        assert error(x, y) <= 2.0**-9
