"""Gradients, torch.compile and opcheck of the rotary ops."""

import fastpe
import pytest
import torch
from fastpe import reference, rope

F64 = torch.float64
ops = torch.ops.fastpe


def draw(*shape, seed=0, dtype=F64, grad=False):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)
    return x.requires_grad_(grad)


def ramp(*shape, grad=True):
    """Distinct frequencies of sensible size."""
    n = torch.Size(shape).numel()
    return (1.5 / (1 + torch.arange(n, dtype=F64)).reshape(shape)).requires_grad_(grad)


# ---------------------------------------------------------------------------------------------- gradcheck in float64


@pytest.mark.parametrize("layout", ["half", "interleaved", "cosine"])
@pytest.mark.parametrize("inverse", [False, True])
def test_frequencies_positions_and_input(layout, inverse):
    pairs = 3
    channels = {"cosine": 2 * pairs if inverse else pairs}.get(layout, 7)
    x, w = draw(2, 2, 3, channels, grad=True), ramp(pairs)
    p = draw(2, 3, seed=1, grad=True)

    def f(x, w, p):
        return fastpe.apply_rotary(x, rope.learned(w, layout=layout), p, inverse=inverse)

    assert torch.autograd.gradcheck(f, (x, w, p))
    assert torch.autograd.gradgradcheck(f, (x[:1, :1, :2], w, p[:1, :2]))


@pytest.mark.parametrize("dims", ["", "h", "b", "a", "ah"])
def test_every_shape_of_frequencies(dims):
    shape = {"": (3,), "h": (4, 3), "b": (2, 3), "a": (2, 3), "ah": (2, 4, 3)}[dims]
    p = draw(2, 2, 3, seed=1, grad=True) if "a" in dims else draw(2, 3, seed=1, grad=True)
    q, k, w = draw(2, 4, 3, 6, grad=True), draw(2, 2, 3, 6, seed=2, grad=True), ramp(*shape)
    amplitude = torch.tensor(1.3, dtype=F64, requires_grad=True)

    def f(q, k, w, p, m):
        return fastpe.apply_rotary_pair(q, k, fastpe.Rope(w, dims, m), p)

    assert torch.autograd.gradcheck(f, (q, k, w, p, amplitude))


@pytest.mark.parametrize("name", ["mixed", "learned", "xpos"])
def test_inside_attention(name):
    q, k, v = draw(1, 2, 5, 8, grad=True), draw(1, 1, 6, 8, seed=1, grad=True), draw(1, 1, 6, 8, seed=2, grad=True)
    axes = (2,) if name == "mixed" else ()
    w = ramp(2, 2, 4) if name == "mixed" else ramp(4)
    pq, pk = draw(*axes, 5, seed=3, grad=True), draw(*axes, 6, seed=4, grad=True)
    zeta = rope.xpos(8, scale_base=8.0)

    def f(q, k, v, w, pq, pk):
        r = {"mixed": lambda: rope.mixed(w), "learned": lambda: rope.learned(w), "xpos": lambda: zeta.replace(inv_freq=w)}[name]()
        return fastpe.attention(q, k, v, rope=r, positions=pq, key_positions=pk)

    assert torch.autograd.gradcheck(f, (q, k, v, w, pq, pk))


def test_gradients_equal_those_of_the_definition_in_float32():
    x, p = draw(2, 3, 50, 16, dtype=torch.float32, grad=True), (torch.arange(50) * 37.5).requires_grad_()
    w = rope.default(16).inv_freq.clone().requires_grad_()
    dy = draw(2, 3, 50, 16, seed=5, dtype=torch.float32)
    r = rope.learned(w)
    got = torch.autograd.grad(fastpe.apply_rotary(x, r, p), (x, w, p), dy)
    want = torch.autograd.grad(reference.apply_rotary(x, r, p), (x, w, p), dy.double())
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_clex_weights():
    up = (draw(4, 8) * 0.3).requires_grad_()
    down = (draw(8, 4, seed=1) * 0.3).requires_grad_()
    x = draw(1, 1, 3, 8, seed=2)

    def trained(up, down):
        r = rope.clex(up, down, 16, factor=2.5, time_dt=0.25, act="silu")
        return r.inv_freq, fastpe.apply_rotary(x, r)

    def inferred(up, down):
        return fastpe.apply_rotary(x, rope.clex(up, down, 16, max_factor=3, time_dt=0.5), torch.tensor([3, 20, 40]))

    assert torch.autograd.gradcheck(trained, (up, down))
    assert torch.autograd.gradcheck(inferred, (up, down))


def test_training_step_of_the_module():
    m = fastpe.nn.RotaryEmbedding(rope.clex, up=torch.randn(4, 8), down=torch.zeros(8, 4), max_position=16, factor=2, time_dt=0.5)
    q, k = draw(1, 2, 6, 8, dtype=torch.float32), draw(1, 2, 6, 8, seed=1, dtype=torch.float32)
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        a, b = m(q, k)
        loss = (a @ b.transpose(2, 3)).softmax(-1).diagonal(dim1=2, dim2=3).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_in_place_refuses_gradients():
    x = draw(1, 1, 2, 4, dtype=torch.float32)
    table = rope.default(4).tables(None, None, 2, 2, 1, 1, 1)[0]
    leaf = x.clone().requires_grad_()
    for call in (
        lambda: ops.rotate_(leaf, table, 0, False),
        lambda: ops.rotate_pair_(x, leaf, table, table, 0, False),
        lambda: ops.rotate_(x, table.clone().requires_grad_(), 0, False),
        lambda: fastpe.apply_rotary(x, rope.learned(torch.ones(2, requires_grad=True)), inplace=True),
    ):
        with pytest.raises(RuntimeError, match="in place"):
            call()
    with torch.no_grad():
        ops.rotate_(leaf, table, 0, False)
    assert torch.equal(leaf, ops.rotate(x, table, 0, False))


# ---------------------------------------------------------------------------------------------- opcheck


def table(b, h, n, j, dtype=torch.float32, grad=False):
    return draw(2, b, h, n, j, seed=9, dtype=dtype, grad=grad)


OPCHECK = {
    "rope_table": lambda: (ops.rope_table, (draw(2, 3, 37, grad=True), ramp(2, 4, 5), 1.5, False, False)),
    "rope_table float64": lambda: (ops.rope_table, (draw(1, 1, 1, grad=True), ramp(1, 1, 3), 1.0, False, True)),
    "rope_table float32 product": lambda: (ops.rope_table, (draw(1, 3, 37), ramp(1, 4, 5, grad=False), 1.5, True, False)),
    "rotate": lambda: (ops.rotate, (draw(3, 2, 37, 16, dtype=torch.float32, grad=True), table(1, 1, 37, 8, grad=True), 0, False)),
    "rotate strided": lambda: (
        ops.rotate,
        (draw(3, 37, 2, 24, dtype=torch.float32).transpose(1, 2)[..., :16].requires_grad_(), table(3, 2, 37, 4), 1, True),
    ),
    "rotate bfloat16": lambda: (ops.rotate, (draw(2, 2, 5, 8, dtype=torch.bfloat16), table(1, 1, 5, 4), 0, False)),
    "rotate_": lambda: (ops.rotate_, (draw(3, 2, 37, 16, dtype=torch.float32), table(1, 2, 37, 8), 1, False)),
    "rotate_pair": lambda: (
        ops.rotate_pair,
        (
            draw(2, 4, 37, 16, dtype=torch.float32, grad=True), draw(2, 11, 2, 16, dtype=torch.float32).transpose(1, 2).requires_grad_(),
            table(1, 1, 37, 8), table(2, 2, 11, 8, grad=True), 0, False,
        ),
    ),
    "rotate_pair_": lambda: (
        ops.rotate_pair_,
        (draw(2, 4, 37, 16), draw(2, 2, 11, 16), table(1, 1, 37, 8, F64), table(2, 2, 11, 8, F64), 1, True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name):
    op, args = OPCHECK[name]()
    torch.library.opcheck(op.default, args, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------- torch.compile


COMPILED = {
    "default": lambda w: rope.default(16),
    "learned": lambda w: rope.learned(w),
    "xpos": lambda w: rope.xpos(16),
    "dynamic_ntk": lambda w: rope.dynamic_ntk(16, 2.0, 24),
    "yarn dynamic": lambda w: rope.yarn(16, None, 24),
    "longrope": lambda w: rope.longrope(16, [1.0] * 8, [2.0] * 8, 24, max_position=64),
    "harpe": lambda w: rope.harpe(16, [1e4, 1e5]),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compile_once_for_all_lengths(name):
    torch._dynamo.reset()
    w = rope.default(16).inv_freq.clone().requires_grad_()
    r = COMPILED[name](w)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def f(q, k):
        a, b = fastpe.apply_rotary_pair(q, k, r)
        return (a * b).sum() + fastpe.apply_rotary(q, r).sum()

    compiled = torch.compile(f, backend=counting, fullgraph=True, dynamic=True)
    for n in (20, 33, 50):
        q, k = (draw(2, 2, n, 16, seed=s, dtype=torch.float32, grad=True) for s in (1, 2))
        got, want = compiled(q, k), f(q, k)
        torch.testing.assert_close(got, want)
        leaves = (q, k, w) if name == "learned" else (q, k)
        for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1


def test_compile_through_aot_autograd():
    torch._dynamo.reset()
    m = fastpe.nn.RotaryEmbedding(rope.mixed, freqs=rope.mixed_init(2, 16, generator=torch.Generator().manual_seed(0)))
    p = fastpe.positions.grid((3, 4))

    def f(q, k):
        return sum(x.square().sum(-1).cos().sum() for x in m(q, k, p)) + (m(q, k, p)[0] * k).sum()

    q, k = (draw(1, 2, 12, 16, seed=s, dtype=torch.float32, grad=True) for s in (1, 2))
    leaves = (q, k, m.freqs)
    want = torch.autograd.grad(f(q, k), leaves)
    got = torch.autograd.grad(torch.compile(f, backend="aot_eager", fullgraph=True)(q, k), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_autocast_and_checkpoint():
    r = rope.default(16)
    x = draw(1, 2, 9, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = fastpe.apply_rotary(x, r)
    assert torch.equal(inside, fastpe.apply_rotary(x, r))
    x = draw(1, 2, 9, 16, dtype=torch.float32, grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda x: fastpe.apply_rotary(x, r).square().sum(), x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y, x)[0], 2 * x)
