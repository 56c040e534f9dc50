"""torch.compile(fullgraph=True), forward and backward, lengths changing without a new compilation."""

from __future__ import annotations

import pytest
import torch

import fastpe

# Sums over the sequence come in blocks of 128: one graph serves every length within a block, another every length beyond.
LENGTHS = {"": (33, 70, 127), "long": (150, 300)}


class Layer(torch.nn.Module):
    """An attention layer with one kind of position."""

    def __init__(self, kind: str, width: int = 32, heads: int = 4):
        super().__init__()
        self.kind, self.heads = kind, heads
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.position = {
            "rope": lambda: fastpe.rope.default(width // heads),
            "alibi": lambda: fastpe.nn.AlibiBias(heads, learnable=True),
            "kerple": lambda: fastpe.nn.KerpleBias(heads),
            "t5": lambda: fastpe.nn.T5Bias(heads, bidirectional=False),
            "cable": lambda: fastpe.nn.CableBias(width, heads),
            "forget": lambda: fastpe.nn.ForgetBias(width, heads),
            "relative_key": lambda: torch.nn.Parameter(torch.randn(2 * 320 - 1, width // heads)),
            "window": lambda: None,
            "documents": lambda: None,
        }[kind]()

    def forward(self, x, ids):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        kwargs = {}
        if self.kind == "rope":
            kwargs["rope"] = self.position
        elif self.kind == "relative_key":
            kwargs["bias"] = fastpe.bias.relative_key(q, self.position)
        elif self.position is not None:
            kwargs["bias"] = self.position(x)
        if self.kind == "window":
            kwargs |= {"mask": fastpe.mask.window(16) & fastpe.mask.sinks(2), "softcap": 20.0}
        elif self.kind == "documents":
            kwargs["mask"] = fastpe.mask.documents(ids=ids) & fastpe.mask.padding(ids >= 0)
        out = fastpe.attention(q, k, v, is_causal=True, **kwargs)
        return out.transpose(1, 2).flatten(2)


KINDS = ("rope", "alibi", "kerple", "t5", "cable", "forget", "relative_key", "window", "documents")


@pytest.mark.parametrize("kind, lengths", [(kind, "") for kind in KINDS] + [("cable", "long")])
def test_lengths(kind, lengths):
    lengths = LENGTHS[lengths]
    torch._dynamo.reset()
    layer = Layer(kind)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in lengths:
        x = torch.randn(2, n, 32)
        ids = (torch.arange(n) // 20).expand(2, -1)
        grads = []
        for f in (layer, compiled):
            layer.zero_grad()
            y = x.clone().requires_grad_()
            with torch._dynamo.config.patch(error_on_recompile=n != lengths[0]):
                out = f(y, ids)
                out.square().sum().backward()
            grads.append((out.detach(), y.grad, *(p.grad.clone() for p in layer.parameters())))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_inductor():
    """Once through the real compiler; the graph holds the op as it is."""
    torch._dynamo.reset()
    layer = Layer("cable")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    x, ids = torch.randn(2, 37, 32), torch.zeros(2, 37, dtype=torch.int64)
    want = torch.autograd.grad(layer(x, ids).square().sum(), list(layer.parameters()))
    got = torch.autograd.grad(compiled(x, ids).square().sum(), list(layer.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_objects_from_outside():
    """Objects made once, outside the compiled function."""
    torch._dynamo.reset()
    b = fastpe.bias.Alibi(torch.rand(2, requires_grad=True))
    rope, window = fastpe.rope.default(8), fastpe.mask.window(5)

    def f(q):
        return fastpe.attention(q, q, q, bias=b, rope=rope, mask=window, is_causal=True, return_lse=True)

    q = torch.randn(1, 2, 9, 8)
    for a, c in zip(torch.compile(f, fullgraph=True, backend="aot_eager")(q), f(q)):
        torch.testing.assert_close(a, c)


def test_offset_lengths():
    """Nq and Nk move apart, as in prefill with a cache."""
    torch._dynamo.reset()

    def f(q, k, table):
        return fastpe.attention(q, k, k, bias=fastpe.bias.T5(table, False), is_causal=True)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    table = torch.randn(32, 2, requires_grad=True)
    for step, (nq, nk) in enumerate([(5, 40), (9, 77), (17, 130)]):
        q, k = torch.randn(1, 2, nq, 8), torch.randn(1, 2, nk, 8)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            (got,) = torch.autograd.grad(compiled(q, k, table).sum(), table)
        (want,) = torch.autograd.grad(f(q, k, table).sum(), table)
        torch.testing.assert_close(got, want)


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q):
            return fastpe.attention(q, q, q, bias=fastpe.bias.Alibi(2), is_causal=True)

    n = torch.export.Dim("n", min=2, max=512)
    program = torch.export.export(Model(), (torch.randn(1, 2, 16, 8),), dynamic_shapes=({2: n},))
    q = torch.randn(1, 2, 50, 8)
    torch.testing.assert_close(program.module()(q), Model()(q))


def test_checks_still_speak():
    def f(q, k):
        return fastpe.attention(q, k, k)

    with pytest.raises(Exception, match="key has 3 heads, which does not divide query's 4"):
        torch.compile(f, fullgraph=True, backend="aot_eager")(torch.zeros(1, 4, 5, 8), torch.zeros(1, 3, 5, 8))
