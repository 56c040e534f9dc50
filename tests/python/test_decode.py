"""Few queries, lists of keys and caches: against the definition, and token by token against one call."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastpe

B, H, HK, D = 2, 4, 2, 32
DTYPES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def draw(Nq, Nk, dtype=torch.float32, D=D, Dv=None, heads=(H, HK), batch=B):
    q = torch.randn(batch, heads[0], Nq, D).to(dtype)
    k, v = torch.randn(batch, heads[1], Nk, D).to(dtype), torch.randn(batch, heads[1], Nk, Dv or D).to(dtype)
    return q, k, v


def close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        a = a.double()
        assert torch.equal(torch.isfinite(a), torch.isfinite(b))
        a, b = a[torch.isfinite(b)], b[torch.isfinite(b)]
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        assert b.numel() == 0 or float((a - b).abs().max()) <= tolerance * scale


def cable(heads, n):
    return fastpe.bias.Cable(fastpe.prefix_sum(-torch.rand(B, heads, n)))


# Everything the kernel for few queries knows, over more keys than one split has.
CALLS = {
    "plain": lambda n: {},
    "rope": lambda n: {"rope": fastpe.rope.default(D)},
    "partial interleaved rope": lambda n: {"rope": fastpe.rope.default(16, layout="interleaved")},
    "alibi": lambda n: {"bias": fastpe.bias.Alibi(H)},
    "kerple": lambda n: {"bias": fastpe.bias.Kerple(torch.rand(H) + 0.5, torch.rand(H) + 0.1)},
    "t5": lambda n: {"bias": fastpe.bias.T5(torch.randn(32, H))},
    "table": lambda n: {"bias": fastpe.bias.RelativeTable(torch.randn(H, 65))},
    "cable": lambda n: {"bias": cable(H, n)},
    "dense": lambda n: {"bias": fastpe.bias.Dense(torch.randn(1, H, 1, n))},
    "self-extend": lambda n: {"rope": fastpe.rope.default(D), "region": fastpe.region.self_extend(100, 4)},
    "dual chunk": lambda n: {"rope": fastpe.rope.default(D), "region": fastpe.region.dual_chunk(96, 16)},
    "streaming": lambda n: {"rope": fastpe.rope.default(D), "region": fastpe.region.streaming(4, 200), "mask": fastpe.mask.window(201) & fastpe.mask.sinks(4)},
    "band": lambda n: {"rope": fastpe.rope.default(D), "region": fastpe.region.self_extend_bidirectional(50, 4)},
    "window": lambda n: {"mask": fastpe.mask.window(70)},
    "dense mask": lambda n: {"mask": fastpe.mask.dense(torch.rand(B, 1, 1, n) < 0.3)},
    "padding": lambda n: {"mask": fastpe.mask.padding(torch.arange(n)[None] >= torch.tensor([[0], [n // 2]]))},
    "scores": lambda n: {"softcap": 5.0, "sink": torch.randn(H), "row_scale": torch.rand(B, H, 1) + 0.5, "temperature": 1.5},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
def test_few_queries(name, dtype, isa):
    for Nq, Nk, width in ((1, 700, D), (3, 333, 64), (8, 64, D), (1, 1, D)):
        kw = CALLS[name](Nk)
        q, k, v = draw(Nq, Nk, dtype, D=width, Dv=48)
        causal = name != "band"
        got = fastpe.attention(q, k, v, is_causal=causal, return_lse=True, **kw)
        want = fastpe.reference.attention(q, k, v, is_causal=causal, return_lse=True, **kw)
        close(got, want, DTYPES[dtype])


@pytest.mark.parametrize("storage", ("strided", "expanded", "odd pitch"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_storage(storage, dtype):
    q, k, v = draw(2, 400, dtype, D=64)
    if storage == "strided":
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    elif storage == "expanded":
        k, v = (x[:1].expand(B, -1, -1, -1) for x in (k, v))
    else:
        k, v = (torch.nn.functional.pad(x, (0, 1))[..., :64] for x in (k, v))
    close((fastpe.attention(q, k, v),), (fastpe.reference.attention(q, k, v),), DTYPES[dtype])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_bitwise_over_threads(dtype):
    q, k, v = draw(2, 3000, dtype, D=64, heads=(8, 1), batch=1)
    kw = {"rope": fastpe.rope.default(64), "bias": fastpe.bias.Alibi(8)}
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(fastpe.attention(q, k, v, is_causal=True, return_lse=True, **kw))
    torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_nan_and_empty_rows():
    q, k, v = draw(1, 300)
    k[0, 0, 290] = torch.nan
    out = fastpe.attention(q, k, v, is_causal=True)
    assert out[0, :2].isnan().all() and not out[0, 2:].isnan().any() and not out[1].isnan().any()
    hidden = fastpe.mask.dense(torch.zeros(B, 1, 1, 300, dtype=torch.bool))
    out, lse = fastpe.attention(q, k.nan_to_num(), v, mask=hidden, return_lse=True)
    assert not out.any() and (lse == -torch.inf).all()


def test_gradients_of_a_few_queries():
    q, k, v = (x.requires_grad_() for x in draw(3, 40, torch.float64, D=8, batch=1))
    bias = fastpe.bias.Kerple(torch.rand(H, dtype=torch.float64).requires_grad_(), torch.rand(H, dtype=torch.float64) + 0.2)
    assert torch.autograd.gradcheck(lambda *x: fastpe.attention(*x, bias=bias, is_causal=True), (q, k, v))


# ---- token by token ------------------------------------------------------------------------------------------------

N = 300
ROPES = {
    "none": (None, {}),
    "rope": (lambda: fastpe.rope.default(D), {}),
    "self-extend": (lambda: fastpe.rope.default(D), {"region": fastpe.region.self_extend(64, 4)}),
    "self-extend, true shift": (lambda: fastpe.rope.default(D), {"region": fastpe.region.self_extend(64, 5, shift="true")}),
    "rerope": (lambda: fastpe.rope.default(D), {"region": fastpe.region.rerope(50, None)}),
    "leaky rerope": (lambda: fastpe.rope.default(D), {"region": fastpe.region.leaky_rerope(50, 8.0, None)}),
    "dual chunk": (lambda: fastpe.rope.default(D), {"region": fastpe.region.dual_chunk(96, 16)}),
    "string": (lambda: fastpe.rope.default(D), {"region": fastpe.region.string(100, 16)}),
    "streaming": (lambda: fastpe.rope.default(D), {"region": fastpe.region.streaming(4, 60), "mask": fastpe.mask.window(61) & fastpe.mask.sinks(4)}),
    "window": (lambda: fastpe.rope.default(D), {"mask": fastpe.mask.window(50) & fastpe.mask.sinks(2)}),
    "alibi": (None, {"bias": fastpe.bias.Alibi(H)}),
    "kerple": (None, {"bias": fastpe.bias.Kerple(torch.linspace(0.5, 2, H), torch.linspace(0.1, 1, H))}),
    "t5": (None, {"bias": fastpe.bias.T5(torch.linspace(-9, 9, 32 * H).reshape(32, H).sin(), bidirectional=False)}),
}


def stepwise(cache, q, k, v, steps, **kw):
    """Tokens arrive in portions; the outputs of all of them."""
    outs, done = [], 0
    for n in steps:
        cache.append(k[:, :, done : done + n], v[:, :, done : done + n])
        done += n
        outs.append(cache.attention(q[:, :, done - n : done], **kw))
    return torch.cat(outs, 2)


def portions(n):
    """A prompt, single tokens, and a few at once."""
    out = [n - 40] + [1] * 20 + [4] * 5
    assert sum(out) == n
    return out


@pytest.mark.parametrize("page_size", (None, 32))
@pytest.mark.parametrize("name", ROPES)
def test_decoding_equals_one_call(name, page_size):
    rope, kw = ROPES[name]
    rope = rope and rope()
    q, k, v = draw(N, N)
    cache = fastpe.KVCache(B, HK, D, capacity=N if page_size is None else 1280, rope=rope, page_size=page_size)
    got = stepwise(cache, q, k, v, portions(N), **kw)
    close((got,), (fastpe.reference.attention(q, k, v, rope=rope, is_causal=True, **kw),), 3e-5)


@pytest.mark.parametrize("page_size", (None, 16))
@pytest.mark.parametrize("kind", ("Cable", "Forget"))
def test_cumulative_biases_read_the_prefix_of_the_cache(kind, page_size):
    q, k, v = draw(N, N)
    gates = -torch.rand(B, H, N)
    make = fastpe.bias.Cable if kind == "Cable" else fastpe.bias.Forget
    cache = fastpe.KVCache(B, HK, D, capacity=1280, page_size=page_size)
    outs, done = [], 0
    for n in portions(N):
        cache.append(k[:, :, done : done + n], v[:, :, done : done + n], increments=gates[:, :, done : done + n])
        done += n
        outs.append(cache.attention(q[:, :, done - n : done], bias=make(cache.prefix)))
    want = fastpe.reference.attention(q, k, v, bias=make(fastpe.prefix_sum(gates)), is_causal=True)
    close((torch.cat(outs, 2),), (want,), 3e-5)
    assert torch.allclose(cache.prefix.values(), gates.double().cumsum(-1), atol=1e-5)


@pytest.mark.parametrize("page_size", (None, 32))
def test_rotated_keys_and_dynamic_frequencies(page_size):
    q, k, v = draw(N, N)
    rope = fastpe.rope.default(D)
    room = 1280
    cache = fastpe.KVCache(B, HK, D, capacity=room, rope=rope, rotated=True, page_size=page_size)
    close((stepwise(cache, q, k, v, portions(N)),), (fastpe.reference.attention(q, k, v, rope=rope, is_causal=True),), 3e-5)
    # Dynamic NTK turns all keys anew at every length: each step equals the last row of a call of that length.
    dynamic = fastpe.rope.dynamic_ntk(D, factor=2.0, max_position=128)
    cache = fastpe.KVCache(B, HK, D, capacity=room, rope=dynamic, page_size=page_size)
    cache.append(k[:, :, :290], v[:, :, :290])
    for n in range(291, N + 1):
        cache.append(k[:, :, n - 1 : n], v[:, :, n - 1 : n])
        got = cache.attention(q[:, :, n - 1 : n])
        want = fastpe.reference.attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], rope=dynamic, is_causal=True)[:, :, -1:]
        close((got,), (want,), 3e-5)
    with pytest.raises(NotImplementedError, match="keep raw keys"):
        fastpe.KVCache(B, HK, D, capacity=room, rope=dynamic, rotated=True)


# ---- keys kept turned ------------------------------------------------------------------------------------------------

TURNED = {
    "self-extend": lambda: fastpe.region.self_extend(64, 4),
    "self-extend, true shift, log": lambda: fastpe.region.self_extend(64, 5, shift="true", scale_base=100),
    "rerope": lambda: fastpe.region.rerope(50, 100),
    "leaky rerope": lambda: fastpe.region.leaky_rerope(50, 8.0, None),
    "dual chunk": lambda: fastpe.region.dual_chunk(96, 16, original_length=4096),
    "string": lambda: fastpe.region.string(100, 16),
    "wrope": lambda: fastpe.region.wrope(30, 100.0),
    "streaming": lambda: fastpe.region.streaming(4, 60),
    "memory": lambda: fastpe.region.key_set(40, first=1),
    "memory, continual": lambda: fastpe.region.key_set(40, "continual"),
}
TWO_COPIES = ("self-extend", "self-extend, true shift, log", "rerope", "leaky rerope", "wrope")


def turned(name, rope=None, page_size=None, batch=B, dtype=torch.float32, **kw):
    rope = fastpe.rope.default(D) if rope is None else rope
    capacity = N if page_size is None else 1280
    return fastpe.KVCache(batch, HK, D, capacity=capacity, rope=rope, region=TURNED[name](), rotated=True, page_size=page_size, dtype=dtype, **kw)


@pytest.mark.parametrize("page_size", (None, 32))
@pytest.mark.parametrize("name", TURNED)
def test_turned_keys_decode_as_one_call(name, page_size, isa):
    cache = turned(name, page_size=page_size)
    assert len(cache._keys if page_size is None else cache._pool.keys) == 1 + (name in TWO_COPIES)
    q, k, v = draw(N, N)
    got = stepwise(cache, q, k, v, portions(N))
    close((got,), (fastpe.reference.attention(q, k, v, rope=cache.rope, region=cache.region, is_causal=True),), 3e-5)


@pytest.mark.parametrize("name", ("self-extend", "dual chunk", "leaky rerope"))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
def test_turned_keys_in_every_type(name, dtype):
    """A prompt, then steps, against eager attention of the same type where that is coarse."""
    cache = turned(name, dtype=dtype)
    q, k, v = draw(N, N, dtype)
    got = stepwise(cache, q, k, v, portions(N))
    close((got,), (fastpe.reference.attention(q, k, v, rope=cache.rope, region=cache.region, is_causal=True),), DTYPES[dtype])


@pytest.mark.parametrize(
    "rope",
    (
        fastpe.rope.default(16, layout="interleaved"),
        fastpe.rope.default(D).replace(amplitude=1.3),
        fastpe.rope.default(D, precision="float32"),
        fastpe.Rope(torch.rand(H, D // 2, dtype=torch.float64), "h"),
        fastpe.Rope(torch.rand(HK, D // 2, dtype=torch.float64), "h"),
    ),
    ids=("partial interleaved", "amplitude", "float32 product", "by query head", "by key head"),
)
@pytest.mark.parametrize("name", ("self-extend", "dual chunk"))
def test_turned_keys_of_any_fixed_rope(name, rope):
    cache = turned(name, rope)
    q, k, v = draw(N, N)
    got = stepwise(cache, q, k, v, portions(N))
    close((got,), (fastpe.reference.attention(q, k, v, rope=rope, region=cache.region, is_causal=True),), 3e-5)


@pytest.mark.parametrize("name", ("self-extend", "dual chunk"))
def test_turned_keys_go_with_biases_masks_and_scores(name):
    q, k, v = draw(N, N)
    cache = turned(name)
    cache.append(k, v)
    for Nq in (1, 20):
        kinds = {
            "fire": {"bias": fastpe.bias.Fire(torch.randn(8), torch.randn(8), torch.randn(H, 8), torch.randn(H), c=torch.tensor(0.1), L=64.0)},
            "t5": {"bias": fastpe.bias.T5(torch.randn(32, H))},
            "window": {"mask": fastpe.mask.window(90)},
            "scores": {"softcap": 5.0, "sink": torch.randn(H), "row_scale": torch.rand(B, H, Nq) + 0.5, "temperature": 1.5, "head_scale": torch.rand(H), "scale": 0.3},
        }
        for kw in kinds.values():
            got = cache.attention(q[:, :, -Nq:], return_lse=True, **kw)
            want = fastpe.reference.attention(q[:, :, -Nq:], k, v, rope=cache.rope, region=cache.region, is_causal=True, return_lse=True, **kw)
            close(got, want, 5e-5)


def test_gradients_over_turned_keys():
    q, k, v = draw(2, 150)
    cache = turned("self-extend")
    cache.append(k, v)
    q.requires_grad_()
    grad = torch.autograd.grad(cache.attention(q).square().sum(), q)
    want = torch.autograd.grad(fastpe.attention(q, k, v, rope=cache.rope, region=cache.region, is_causal=True).square().sum(), q)
    close(grad, [x.double() for x in want], 1e-4)
    learned = cache.rope.replace(inv_freq=cache.rope.inv_freq.clone().requires_grad_())
    cache = turned("dual chunk", learned)
    cache.append(k, v)
    with pytest.raises(NotImplementedError, match="has no gradient"):
        cache.attention(q[:, :, -1:].detach())
    with torch.no_grad():
        cache.attention(q[:, :, -1:])


@pytest.mark.parametrize("page_size", (None, 16))
def test_all_copies_follow_trim_fork_and_reorder(page_size):
    cache = turned("self-extend", page_size=page_size)
    q, k, v = draw(200, 200)
    cache.append(k, v)
    cache.trim(150)
    beams = cache.fork(torch.tensor([1, 1, 0]))
    new = torch.randn(3, HK, 30, D), torch.randn(3, HK, 30, D)
    beams.append(*new)
    order = torch.tensor([2, 0, 0])
    beams.reorder(order)
    more = torch.randn(3, HK, 2, D), torch.randn(3, HK, 2, D)
    beams.append(*more)
    pick = torch.tensor([1, 1, 0])
    want_k, want_v = (torch.cat([torch.cat([x[pick, :, :150], n], 2)[order], m], 2) for x, n, m in zip((k, v), new, more))
    query = torch.randn(3, H, 2, D)
    want = fastpe.reference.attention(query, want_k, want_v, rope=cache.rope, region=cache.region, is_causal=True)
    close((beams.attention(query),), (want,), 2e-5)
    # The original has gone its own way.
    cache.append(k[:, :, 150:160], v[:, :, 150:160])
    want = fastpe.reference.attention(q[:, :, 159:160], k[:, :, :160], v[:, :, :160], rope=cache.rope, region=cache.region, is_causal=True)
    close((cache.attention(q[:, :, 159:160]),), (want,), 2e-5)


def test_the_region_of_a_cache_and_of_a_call():
    q, k, v = draw(1, 150)
    rope, region = fastpe.rope.default(D), fastpe.region.self_extend(64, 4)
    raw = fastpe.KVCache(B, HK, D, capacity=150, rope=rope, region=region)
    raw.append(k, v)
    other = fastpe.region.rerope(30, None)
    for kw, used in (({}, region), ({"region": other}, other)):
        close((raw.attention(q, **kw),), (fastpe.reference.attention(q, k, v, rope=rope, region=used, is_causal=True),), 2e-5)
    # Keys at their own indices serve every region that meets them there.
    plain = fastpe.KVCache(B, HK, D, capacity=150, rope=rope, rotated=True)
    plain.append(k, v)
    for used in (None, fastpe.region.string(50, 16), fastpe.region.streaming(4, 60)):
        close((plain.attention(q, region=used),), (fastpe.reference.attention(q, k, v, rope=rope, region=used, is_causal=True),), 2e-5)
    with pytest.raises(NotImplementedError, match=r"kept turned for plain rotation, and region self_extend\(.*\) meets them elsewhere; keep raw keys"):
        plain.attention(q, region=region)
    kept = fastpe.KVCache(B, HK, D, capacity=150, rope=rope, region=region, rotated=True)
    kept.append(k, v)
    with pytest.raises(NotImplementedError, match=r"kept turned for region self_extend\(.*\), and region rerope\(.*\) meets them elsewhere"):
        kept.attention(q, region=other)
    with pytest.raises(NotImplementedError, match="counts them from 0; keep raw keys and renumber"):
        kept.evict(torch.arange(10))


def test_what_cannot_be_kept_turned():
    rope = fastpe.rope.default(D)
    make = lambda **kw: fastpe.KVCache(1, 1, D, capacity=64, **kw)  # noqa: E731
    p = torch.arange(8)
    for region in (
        fastpe.region.self_extend_bidirectional(8, 4),
        fastpe.region.key_set(4, torch.arange(4)),
        fastpe.region.custom("distance", 3, [p, p // 2 + 2], [p, p // 2]),
    ):
        with pytest.raises(NotImplementedError, match="places a key by more than its index; keep raw keys"):
            make(rope=rope, region=region, rotated=True)
        make(rope=rope, region=region)
    with pytest.raises(NotImplementedError, match="turns a key by more than its own position; keep raw keys"):
        make(rope=fastpe.rope.dynamic_ntk(D, factor=2.0, max_position=128), region=fastpe.region.self_extend(8, 4), rotated=True)
    with pytest.raises(ValueError, match="region chooses positions for rope, which is None"):
        make(region=fastpe.region.self_extend(8, 4))
    with pytest.raises(TypeError, match="region must be a fastpe.region object, got int"):
        make(rope=rope, region=3)


def test_op_checks_of_turned_keys():
    q, k, v = draw(1, 64)
    tables = fastpe.rope.default(D).tables(None, None, 1, 64, B, H, HK)
    two = torch.cat([tables[0], tables[0]])
    tail = (0, 0, *(None,) * 6, 0, 0, 0, *(None,) * 5, 0.2, 0.0, 0.0, 0.0, *(None,) * 6, False, *(None,) * 10, 1, 1)
    call = lambda q_rope, k_rope, kind, more: torch.ops.fastpe.attn_decode(q, k, v, q_rope, k_rope, *tail, kind, 8, *(None,) * 8, more)  # noqa: E731
    call(tables[0], None, 0, [])
    call(two, None, 1, [k])
    with pytest.raises(RuntimeError, match="k_more must hold keys for 1 regions, got 2"):
        call(two, None, 1, [k, k])
    with pytest.raises(RuntimeError, match="k_more goes with q_rope alone"):
        call(two, tables[1], 1, [k])
    with pytest.raises(RuntimeError, match=r"k_more must be of shape \(2, 2, 64, 32\), got \(2, 2, 63, 32\)"):
        call(two, None, 1, [k[:, :, :63]])
    with pytest.raises(RuntimeError, match="q_rope and k_rope go together"):
        call(None, tables[1], 0, [])


# ---- changing a cache ------------------------------------------------------------------------------------------------


def filled(page_size, n=100, rope=None, capacity=640, **kw):
    q, k, v = draw(n, n)
    cache = fastpe.KVCache(B, HK, D, capacity=capacity, rope=rope, page_size=page_size, **kw)
    cache.append(k, v)
    return cache, q, k, v


@pytest.mark.parametrize("page_size", (None, 16))
def test_trim_and_retry(page_size):
    cache, q, k, v = filled(page_size, rope=fastpe.rope.default(D))
    cache.trim(70)
    assert cache.length == 70 and torch.equal(cache.key, k[:, :, :70])
    cache.append(k[:, :, 70:], v[:, :, 70:])
    want = fastpe.reference.attention(q[:, :, 99:], k, v, rope=cache.rope, is_causal=True)
    close((cache.attention(q[:, :, 99:]),), (want,), 2e-5)
    with pytest.raises(ValueError, match="length is 101, the cache holds 100"):
        cache.trim(101)


@pytest.mark.parametrize("page_size", (None, 16))
def test_evicted_tokens_keep_their_positions_or_not(page_size):
    for renumber in (False, True):
        cache, q, k, v = filled(page_size, rope=fastpe.rope.default(D))
        keep = torch.stack([torch.randperm(99)[:40].sort().values for _ in range(B)])
        keep[:, -1] = 99
        cache.evict(keep, renumber=renumber)
        at = keep[:, None, :, None].expand(B, HK, 40, D)
        place = torch.arange(40) if renumber else keep
        own = torch.tensor([39]) if renumber else torch.tensor([99])
        kept_k, kept_v = k.gather(2, at), v.gather(2, at)
        want = fastpe.reference.attention(q[:, :, 99:], kept_k, kept_v, rope=cache.rope, positions=own, key_positions=place)
        close((cache.attention(q[:, :, 99:]),), (want,), 2e-5)
        more = draw(1, 1)
        cache.append(more[1], more[2])
        both = torch.cat([kept_k, more[1]], 2), torch.cat([kept_v, more[2]], 2)
        place = torch.cat([place, (own + 1).expand(*place.shape[:-1], 1)], -1)
        want = fastpe.reference.attention(more[0], *both, rope=cache.rope, positions=own + 1, key_positions=place)
        close((cache.attention(more[0]),), (want,), 2e-5)


def test_eviction_keeps_the_prefix():
    q, k, v = draw(200, 200)
    gates = -torch.rand(B, H, 200)
    cache = fastpe.KVCache(B, HK, D, capacity=256)
    cache.append(k, v, increments=gates)
    keep = torch.arange(1, 200, 2)
    cache.evict(keep)
    cache.append(k[:, :, :1], v[:, :, :1], increments=gates[:, :, :1])
    c = torch.cat([gates.double().cumsum(-1), gates.double().sum(-1, keepdim=True) + gates[:, :, :1]], -1)
    want = c[..., torch.cat([keep, torch.tensor([200])])]
    got = cache.prefix.values()
    assert torch.allclose(got[..., -1:] - got, want[..., -1:] - want, atol=1e-5)


def test_evicted_by_head():
    rope = fastpe.rope.default(D)
    cache, q, k, v = filled(None, rope=rope, rotated=True)
    keep = torch.stack([torch.randperm(100)[:30].sort().values for _ in range(B * HK)]).reshape(B, HK, 30)
    cache.evict(keep)
    index = keep[:, :, None]
    want = fastpe.reference.gather_attention(q[:, :, 99:], k, v, index, rope=rope)
    close((cache.attention(q[:, :, 99:]),), (want,), 2e-5)
    raw, q, k, v = filled(None, rope=rope)
    raw.evict(keep)
    with pytest.raises(ValueError, match="no common positions"):
        raw.attention(q[:, :, 99:])


@pytest.mark.parametrize("page_size", (None, 16))
def test_fork_and_reorder(page_size):
    cache, q, k, v = filled(page_size, rope=fastpe.rope.default(D))
    free = cache._pool.free if page_size else 0
    beams = cache.fork(torch.tensor([1, 1, 0]))
    if page_size:
        assert cache._pool.free == free  # the prompt is held once
    new = torch.randn(3, HK, 1, D), torch.randn(3, HK, 1, D)
    beams.append(*new)
    assert torch.equal(cache.key, k) and torch.equal(cache.value, v)  # the original is untouched
    pick = torch.tensor([1, 1, 0])
    want_k, want_v = torch.cat([k[pick], new[0]], 2), torch.cat([v[pick], new[1]], 2)
    assert torch.equal(beams.key, want_k) and torch.equal(beams.value, want_v)
    order = torch.tensor([2, 0, 0])
    beams.reorder(order)
    more = torch.randn(3, HK, 2, D), torch.randn(3, HK, 2, D)
    beams.append(*more)
    want_k, want_v = torch.cat([want_k[order], more[0]], 2), torch.cat([want_v[order], more[1]], 2)
    query = torch.randn(3, H, 2, D)
    want = fastpe.reference.attention(query, want_k, want_v, rope=cache.rope, is_causal=True)
    close((beams.attention(query),), (want,), 2e-5)
    if page_size:
        beams.release()
        assert cache._pool.free == free and torch.equal(cache.key, k)


def flags_of(address: int) -> list[str]:
    """What Linux notes about the piece of memory that holds the address."""
    inside = False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.parametrize("page_size", [None, 64])
def test_a_large_cache_asks_for_huge_pages(page_size):
    if not pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("this system has no transparent huge pages")
    cache = fastpe.KVCache(1, 2, 64, capacity=32768, page_size=page_size)  # 16 MiB each for keys and values
    held = [cache._keys[0], cache._value] if page_size is None else [cache._pool.keys[0], cache._pool.value]
    for x in held:
        assert "hg" in flags_of(x.data_ptr() + 8 * 2**20)


@pytest.mark.parametrize("page_size", (None, 16))
def test_overflow_says_capacity_and_need_and_writes_nothing(page_size):
    cache, q, k, v = filled(page_size, capacity=112 if page_size is None else 224)
    before = cache.key.clone()
    what = "capacity is 112 tokens, 120 are needed" if page_size is None else "capacity is 14 pages of 16 tokens, 2 more are needed for 20 tokens"
    with pytest.raises(ValueError, match=what):
        cache.append(k[:, :, :20], v[:, :, :20])
    assert cache.length == 100 and torch.equal(cache.key, before) and cache.positions.shape == (100,)
    # A shared page that would have to be copied counts.
    if page_size:
        fork = cache.fork()
        with pytest.raises(ValueError, match="2 more are needed for 1 tokens of 2 sequences, 0 are free"):
            fork.append(k[:, :, :1], v[:, :, :1])


def test_cache_errors():
    cache, q, k, v = filled(16, rope=fastpe.rope.default(D))
    with pytest.raises(ValueError, match=r"key must be \(2, 2, M, 32\), got \(2, 3, 1, 32\)"):
        cache.append(torch.zeros(2, 3, 1, 32), v[:, :, :1])
    with pytest.raises(TypeError, match="key is float64, the cache holds float32"):
        cache.append(k[:, :, :1].double(), v[:, :, :1])
    with pytest.raises(ValueError, match="increments belong to every append or to none"):
        cache.append(k[:, :, :1], v[:, :, :1], increments=torch.zeros(B, H, 1))
    with pytest.raises(ValueError, match=r"keep must lie in \[0, 100\), got 0 to 100"):
        cache.evict(torch.tensor([0, 100]))
    with pytest.raises(ValueError, match=r"index must hold 2 numbers in \[0, 2\)"):
        cache.reorder(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="101 queries, but the cache holds 100"):
        cache.attention(torch.zeros(B, H, 101, D))
    with pytest.raises(NotImplementedError, match="RowTable does not go with lists and pages"):
        cache.attention(q[:, :, -1:], bias=fastpe.bias.RowTable(torch.randn(B, H, 1, 5)))
    with pytest.raises(ValueError, match="multiple of 16 that divides capacity"):
        fastpe.KVCache(1, 1, 16, capacity=100, page_size=24)


@pytest.mark.parametrize("page", (-1, 40))
def test_pages_outside_the_pool(page):
    cache, q, k, v = filled(16)
    cache._pages[1][3] = page
    with pytest.raises(RuntimeError, match=rf"pages must lie in \[0, 40\), got {page} for keys from 48 on of batch entry 1"):
        cache.attention(q[:, :, -1:])


# ---- lists of keys ------------------------------------------------------------------------------------------------


@st.composite
def lists(draw):
    Nk, n = draw(st.integers(1, 150)), draw(st.integers(1, 90))
    Nq = draw(st.integers(1, min(5, Nk)))
    shape = (draw(st.sampled_from((1, B))), draw(st.sampled_from((1, HK, H))), draw(st.sampled_from((1, Nq))), n)
    return Nq, Nk, shape, draw(st.sampled_from(("none", "rope", "renumbered", "alibi", "t5", "cable", "window"))), draw(st.booleans()), draw(st.integers(0, 9999))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lists())
def test_lists(case):
    Nq, Nk, shape, kind, causal, seed = case
    torch.manual_seed(seed)
    q, k, v = draw(Nq, Nk)
    index = torch.randint(-1, Nk, shape)
    kw = {
        "none": lambda: {},
        "rope": lambda: {"rope": fastpe.rope.default(D)},
        "renumbered": lambda: {"rope": fastpe.rope.default(D), "key_positions": torch.randint(0, 50, shape), "positions": torch.arange(60, 60 + Nq)},
        "alibi": lambda: {"bias": fastpe.bias.Alibi(H)},
        "t5": lambda: {"bias": fastpe.bias.T5(torch.randn(32, H)), "sink": torch.randn(H)},
        "cable": lambda: {"bias": cable(H, Nk)},
        "window": lambda: {"mask": fastpe.mask.window(30), "softcap": 4.0},
    }[kind]()
    got = fastpe.gather_attention(q, k, v, index, is_causal=causal, return_lse=True, **kw)
    want = fastpe.reference.gather_attention(q, k, v, index, is_causal=causal, return_lse=True, **kw)
    close(got, want, 3e-5)


@pytest.mark.parametrize("heads", ((4, 2), (32, 2)))
@pytest.mark.parametrize("width", (24, 64))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
def test_lists_in_every_type(dtype, width, heads, isa):
    """Rows used where they lie and rows that are copied: widths that no vector divides, many heads to a key in 16 bits."""
    q, k, v = draw(1, 300, dtype, D=width, heads=heads)
    index = torch.randint(-1, 300, (B, heads[1], 1, 150))
    for rope in (None, fastpe.rope.default(width)):
        got = fastpe.gather_attention(q, k, v, index, rope=rope, return_lse=True)
        want = fastpe.reference.gather_attention(q, k, v, index, rope=rope, return_lse=True)
        close(got, want, DTYPES[dtype])


def test_a_list_of_all_keys_is_attention():
    q, k, v = draw(4, 200, torch.float64)
    index = torch.randperm(200).expand(1, 1, 1, 200)
    got = fastpe.gather_attention(q, k, v, index, rope=fastpe.rope.default(D), bias=fastpe.bias.Alibi(H), is_causal=True, return_lse=True)
    want = fastpe.reference.attention(q, k, v, rope=fastpe.rope.default(D), bias=fastpe.bias.Alibi(H), is_causal=True, return_lse=True)
    close(got, want, 1e-10)


def test_list_errors():
    q, k, v = draw(2, 50)
    with pytest.raises(RuntimeError, match=r"list must lie in \[-1, 50\), got 50 for batch entry 0, head 0, row 0, place 1"):
        fastpe.gather_attention(q, k, v, torch.tensor([0, 50]).expand(1, 1, 1, 2))
    with pytest.raises(ValueError, match=r"index must be .*got \(3, 1, 1, 2\)"):
        fastpe.gather_attention(q, k, v, torch.zeros(3, 1, 1, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="index must hold integers, got float32"):
        fastpe.gather_attention(q, k, v, torch.zeros(1, 1, 1, 2))
    index = torch.zeros(1, 1, 1, 2, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="has no gradient"):
        fastpe.gather_attention(q.requires_grad_(), k, v, index)
    with pytest.raises(NotImplementedError, match="does not go with new key_positions"):
        fastpe.gather_attention(q.detach(), k, v, index, rope=fastpe.rope.default(D), key_positions=torch.arange(2), bias=fastpe.bias.Alibi(H))


def test_op_checks():
    q, k, v = draw(1, 64)
    index = torch.zeros(1, 1, 1, 4, dtype=torch.int32)
    args = (q, k, v, None, None, 0, 0, *(None,) * 6, 0, 0, 0, *(None,) * 5, 0.2, 0.0, 0.0, 0.0, *(None,) * 6, False, *(None,) * 10, 1, 1, 0, 1, *(None,) * 4)
    torch.library.opcheck(torch.ops.fastpe.attn_decode.default, (*args, None, None, index, None, []))
