"""What only a GPU can show: instructions as the emulator models them, streams, graphs, several calls at once."""

from __future__ import annotations

import importlib.util
import pathlib

import conformance_sm90
import numpy as np
import pytest
import torch

import fastpe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

spec = importlib.util.spec_from_file_location("conformance", pathlib.Path(__file__).parents[1] / "emu" / "test_conformance.py")
CONFORMANCE = importlib.util.module_from_spec(spec)
spec.loader.exec_module(CONFORMANCE)


@pytest.mark.parametrize("name", ["ldmatrix", "shuffle", "cp_async", "convert", "barrier", "exp"])
def test_conformance(name, gpu_conformance):
    getattr(CONFORMANCE, "test_" + name)(gpu_conformance, np.random.default_rng(5))


@pytest.mark.parametrize("name,dtype", [("mma_bf16", torch.bfloat16), ("mma_f16", torch.float16)])
def test_conformance_mma(name, dtype, gpu_conformance):
    CONFORMANCE.test_mma(gpu_conformance, np.random.default_rng(5), name, dtype)


# The instructions are those of compute capability 9.0 alone, not of what came later.
@pytest.mark.parametrize("name", conformance_sm90.CHECKS)
def test_conformance_sm90(name, gpu_conformance):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    conformance_sm90.check(name, gpu_conformance.conformance, np.random.default_rng(5))


def call(seed=0, n=300):
    g = torch.Generator("cuda").manual_seed(seed)
    q, k, v = (torch.randn(2, 4, n, 64, device="cuda", dtype=torch.bfloat16, generator=g).requires_grad_() for _ in range(3))
    slopes = torch.rand(4, device="cuda", generator=g).requires_grad_()
    return (q, k, v), slopes


def run(qkv, slopes):
    out = fastpe.attention(*qkv, bias=fastpe.bias.Alibi(slopes), rope=fastpe.rope.default(64), is_causal=True)
    return out, torch.autograd.grad(out.float().square().sum(), (*qkv, slopes))


def test_the_library_is_there():
    assert fastpe.info()["cuda_architectures"]


def test_results_repeat_bit_for_bit():
    inputs = call()
    first, first_grads = run(*inputs)
    for _ in range(20):
        out, grads = run(*inputs)
        assert torch.equal(out, first) and all(map(torch.equal, grads, first_grads))


def test_a_side_stream_is_used():
    inputs = call()
    want, _ = run(*inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Work in front, so that a kernel on another stream would read zeros.
        late = [torch.zeros_like(x) for x in inputs[0]]
        torch.cuda._sleep(200_000_000)
        for x, y in zip(late, inputs[0]):
            x.copy_(y.detach())
        out, _ = run([x.requires_grad_() for x in late], inputs[1])
    stream.synchronize()
    assert torch.equal(out, want)


def test_no_call_waits_for_the_device():
    inputs = call()
    run(*inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_over_pages_and_one_over_a_list_do_not_wait():
    cache = fastpe.KVCache(2, 2, 64, capacity=1024, page_size=16, rope=fastpe.rope.default(64), dtype=torch.bfloat16, device="cuda")
    k, v, q = (torch.randn(2, h, n, 64, device="cuda", dtype=torch.bfloat16) for h, n in ((2, 300), (2, 300), (4, 1)))
    cache.append(k, v)
    index = torch.randint(0, 300, (2, 2, 1, 40), device="cuda")
    call = lambda: (cache.attention(q), fastpe.gather_attention(q, k, v, index, rope=cache.rope, key_positions=index))  # noqa: E731
    want = call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, got, want))
    torch.testing.assert_close(want[0], fastpe.attention(q, k, v, rope=cache.rope, is_causal=True))


def test_a_graph_captures_forward_and_backward():
    (q, k, v), slopes = call()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run((q, k, v), slopes)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = run((q, k, v), slopes)
    other, _ = call(seed=1)
    with torch.no_grad():
        for x, y in zip((q, k, v), other):
            x.copy_(y)
    graph.replay()
    want, want_grads = run((q, k, v), slopes)
    assert torch.equal(out, want) and all(map(torch.equal, grads, want_grads))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device():
    inputs = call()
    want, _ = run(*inputs)
    qkv = [x.detach().to("cuda:1").requires_grad_() for x in inputs[0]]
    out, _ = run(qkv, inputs[1].detach().to("cuda:1").requires_grad_())
    assert out.device.index == 1 and torch.equal(out.to("cuda:0"), want)


def test_compiled_without_graph_breaks():
    (q, k, v), slopes = call()
    forward = torch.compile(lambda q, k, v, s: fastpe.attention(q, k, v, bias=fastpe.bias.Alibi(s), is_causal=True), fullgraph=True)
    want = fastpe.attention(q, k, v, bias=fastpe.bias.Alibi(slopes), is_causal=True)
    assert torch.equal(forward(q, k, v, slopes), want)


def test_offsets_past_two_to_the_31():
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    n = 2**31 // (64 * 128) + 64
    q = torch.randn(1, 64, n, 128, device="cuda", dtype=torch.bfloat16)
    out = fastpe.attention(q, q, q, mask=fastpe.mask.window(128), is_causal=True)
    last = [x[:, -1:, -256:] for x in (q, q, q)]
    want = fastpe.attention(*last, mask=fastpe.mask.window(128), is_causal=True)
    torch.testing.assert_close(out[:, -1:, -64:], want[:, :, -64:])


def test_float64_is_refused_by_name():
    q = torch.randn(1, 1, 8, 16, device="cuda", dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="must be float32, bfloat16 or float16, got float64"):
        fastpe.attention(q, q, q)
    with pytest.raises(NotImplementedError, match="fastpe.landmark_attention: query on a GPU must be bfloat16 or float16"):
        fastpe.landmark_attention(q, q, q, torch.zeros(8, dtype=torch.bool, device="cuda"))
