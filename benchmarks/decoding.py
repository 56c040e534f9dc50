"""Decoding: one new query against a cache of keys, with grouped heads. Bound by reading keys and values once.

Peers: scaled_dot_product_attention with enable_gqa ("sdpa"), with the heads of a group packed as query rows ("packed"),
two batched products ("bmm"), and those under torch.compile ("compiled"). The other calls of fastpe say what a bias, raw keys
that are rotated in the call, and regions cost on top.

The families decode_* state that cost for a cache that keeps its keys turned (decode_cable: its prefix sum), against a cache
without positions ("fastpe none") and against raw keys turned at every step ("fastpe raw"). decode_list attends to one key of
sixteen, drawn at random, against as many keys in a row ("fastpe in a row") and against copying them out first ("gather").
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from attend import PEER_TOLERANCE, sdpa
from registry import Case, Tensor, Work, Wrong, family

import fastpe
from fastpe.testing import compare


PEERS = ("sdpa", "packed", "bmm", "compiled")
OWN = ("fastpe alibi", "fastpe cable", "fastpe rope", "fastpe self_extend", "fastpe dual_chunk")


@family("decode", peers=(*PEERS, *OWN), shapes=("D8",), passes=("fwd",))
def decode(case: Case, wanted: frozenset[str]) -> Work:
    s, dtype, device = case.shape, case.torch_dtype, case.device
    g = torch.Generator().manual_seed(0)
    q = torch.randn(s.B, s.H, s.Nq, s.D, generator=g).to(device, dtype)
    k, v = (torch.randn(s.B, s.Hk, s.Nk, s.D, generator=g).to(device, dtype) for _ in range(2))
    packed = q.view(s.B, s.Hk, -1, s.D)  # one query per head, so its heads are the rows

    def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = torch.softmax((q @ k.transpose(-1, -2)).float() * s.D**-0.5, -1)
        return p.to(v.dtype) @ v

    compiled = torch.compile(products, dynamic=False)
    calls = {
        "fastpe": lambda: fastpe.attention(q, k, v, is_causal=True),
        "sdpa": lambda: sdpa(q, k, v),
        "packed": lambda: F.scaled_dot_product_attention(packed, k, v).view_as(q),
        "bmm": lambda: products(packed, k, v).view_as(q),
        "compiled": lambda: compiled(packed, k, v).view_as(q),
    }
    slopes = fastpe.bias.alibi_slopes(s.H, device=device)
    increments = -0.01 * torch.rand(s.B, s.H, s.Nk, generator=g).to(device)
    prefix, rope = fastpe.prefix_sum(increments), fastpe.rope.default(s.D)  # a cache keeps the sums
    own = {
        "fastpe alibi": {"bias": fastpe.bias.Alibi(slopes)},
        "fastpe cable": {"bias": fastpe.bias.Cable(prefix)},
        "fastpe rope": {"rope": rope},
        "fastpe self_extend": {"rope": rope, "region": fastpe.region.self_extend(1024, 8)},
        "fastpe dual_chunk": {"rope": rope, "region": fastpe.region.dual_chunk(3072, 512)},
    }
    for name, kwargs in own.items():
        calls[name] = lambda kwargs=kwargs: fastpe.attention(q, k, v, is_causal=True, **kwargs)
    group = s.H // s.Hk

    def part(name: str, b: int, heads: slice) -> dict:
        """The arguments of one sequence and some heads."""
        if name == "fastpe alibi":
            return {"bias": fastpe.bias.Alibi(slopes[heads])}
        if name == "fastpe cable":
            return {"bias": fastpe.bias.Cable(increments[b : b + 1, heads])}
        return own.get(name, {})

    def check(name: str) -> float:
        """One sequence and key head of each end: in float64 the whole cache would take gigabytes."""
        with torch.no_grad():
            out = calls[name]()
        worst = 0.0
        for b, h in ((0, 0), (s.B - 1, s.Hk - 1)):
            heads = slice(h * group, (h + 1) * group)
            one = q[b : b + 1, heads], k[b : b + 1, h : h + 1], v[b : b + 1, h : h + 1]
            kwargs = part(name, b, heads)
            want = fastpe.reference.attention(*one, is_causal=True, **kwargs)
            error = compare.error(out[b : b + 1, heads], want)
            if not name.startswith("fastpe"):
                allowed = PEER_TOLERANCE[case.dtype][0]
            elif case.dtype == "fp32":
                allowed = compare.TOLERANCE[torch.float32][0]
            else:
                eager = compare.eager_attention(*one, is_causal=True, **kwargs)
                allowed = 2 * max(compare.error(eager, want), torch.finfo(dtype).eps / 2) + 1e-5
            if not error <= allowed:
                raise Wrong(f"error {error:.2g} of the largest entry, allowed {allowed:.2g}")
            worst = max(worst, error)
        return worst

    def timed(f):
        def call():
            with torch.no_grad():
                return f()

        return call

    read = float((k.numel() + v.numel()) * k.element_size())
    flop = 4.0 * s.B * s.H * s.Nq * s.Nk * s.D
    return Work({n: timed(f) for n, f in calls.items() if n in wanted or n == "fastpe"}, check, flop, read)


# ---- what positions cost ----------------------------------------------------------------------------------------------

POSITIONS = {
    "rope": None,
    "self_extend": fastpe.region.self_extend(1024, 8),
    "dual_chunk": fastpe.region.dual_chunk(3072, 512),
}


def _tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    s = case.shape
    g = torch.Generator().manual_seed(0)
    shapes = (s.B, s.H, s.Nq, s.D), (s.B, s.Hk, s.Nk, s.D), (s.B, s.Hk, s.Nk, s.D)
    return tuple(torch.randn(*x, generator=g).to(case.device, case.torch_dtype) for x in shapes)


def _one_head(case: Case, out: Tensor, q: Tensor, k: Tensor, v: Tensor, **kwargs) -> float:
    """Error of the last sequence's last key head against the definition; raises Wrong."""
    group = case.shape.H // case.shape.Hk
    one = q[-1:, -group:], k[-1:, -1:], v[-1:, -1:]
    want = fastpe.reference.attention(*one, is_causal=True, **kwargs)
    error = compare.error(out[-1:, -group:], want)
    allowed = compare.TOLERANCE[torch.float32][0]
    if case.dtype != "fp32":
        # Keys are rounded once more where they are kept turned, so eager attention over such keys is the measure.
        eager = compare.eager_attention(*one, is_causal=True, **kwargs)
        allowed = 2 * max(compare.error(eager, want), torch.finfo(q.dtype).eps / 2) + 1e-5
    if not error <= allowed:
        raise Wrong(f"error {error:.2g} of the largest entry, allowed {allowed:.2g}")
    return error


def _timed(calls: dict, wanted: frozenset[str]) -> dict:
    def without_gradient(call):
        def run():
            with torch.no_grad():
                return call()

        return run

    return {name: without_gradient(call) for name, call in calls.items() if name == "fastpe" or name in wanted}


def _cost_of_positions(name: str):
    def build(case: Case, wanted: frozenset[str]) -> Work:
        s, region, rope = case.shape, POSITIONS[name], fastpe.rope.default(case.shape.D)
        # First, in memory that nothing has used yet: pages once handed out stay as small as they were.
        room = dict(capacity=s.Nk, dtype=case.torch_dtype, device=case.device)
        cache = fastpe.KVCache(s.B, s.Hk, s.D, rope=rope, region=region, rotated=True, **room)
        plain = fastpe.KVCache(s.B, s.Hk, s.D, **room)
        q, k, v = _tensors(case)
        for held in (cache, plain):
            held.append(k, v)
        calls = {
            "fastpe": lambda: cache.attention(q),
            "fastpe none": lambda: plain.attention(q),
            "fastpe raw": lambda: fastpe.attention(q, k, v, rope=rope, region=region, is_causal=True),
        }
        calls = _timed(calls, wanted)
        kwargs = {"rope": rope, "region": region}
        return Work(calls, lambda c: _one_head(case, calls[c](), q, k, v, **({} if c == "fastpe none" else kwargs)), *_rates(case, s.Nk))

    family(f"decode_{name}", peers=("fastpe none", "fastpe raw"), shapes=("D8",), passes=("fwd",))(build)


def _rates(case: Case, keys: int) -> tuple[float, float]:
    s = case.shape
    return 4.0 * s.B * s.H * s.Nq * keys * s.D, 2.0 * s.B * s.Hk * keys * s.D * case.torch_dtype.itemsize


for _name in POSITIONS:
    _cost_of_positions(_name)


@family("decode_cable", peers=("fastpe none",), shapes=("D8",), passes=("fwd",))
def decode_cable(case: Case, wanted: frozenset[str]) -> Work:
    s, (q, k, v) = case.shape, _tensors(case)
    increments = -0.01 * torch.rand(s.B, s.H, s.Nk, generator=torch.Generator().manual_seed(1)).to(case.device)
    cache = fastpe.KVCache(s.B, s.Hk, s.D, capacity=s.Nk, dtype=q.dtype, device=q.device)
    cache.append(k, v, increments=increments)
    calls = _timed(
        {
            "fastpe": lambda: cache.attention(q, bias=fastpe.bias.Cable(cache.prefix)),
            "fastpe none": lambda: cache.attention(q),
        },
        wanted,
    )
    bias = fastpe.bias.Cable(increments[-1:, -(s.H // s.Hk) :])
    return Work(calls, lambda c: _one_head(case, calls[c](), q, k, v, **({} if c == "fastpe none" else {"bias": bias})), *_rates(case, s.Nk))


@family("decode_list", peers=("fastpe in a row", "gather"), shapes=("L64",), passes=("fwd",))
def decode_list(case: Case, wanted: frozenset[str]) -> Work:
    s = case.shape
    n = s.Nk // 16
    # First, as above.
    cache, picked = (fastpe.KVCache(s.B, s.Hk, s.D, capacity=x, dtype=case.torch_dtype, device=case.device) for x in (s.Nk, n))
    q, k, v = _tensors(case)
    g = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(s.Nk, generator=g)[:n] for _ in range(s.B * s.Hk)]).reshape(s.B, s.Hk, 1, n).to(case.device, torch.int32)
    at = index[:, :, 0, :, None].long().expand(s.B, s.Hk, n, s.D)
    picked_k, picked_v = k.gather(2, at), v.gather(2, at)
    cache.append(k, v)
    picked.append(picked_k, picked_v)
    k, v = cache.key, cache.value
    calls = _timed(
        {
            "fastpe": lambda: fastpe.gather_attention(q, k, v, index),
            "fastpe in a row": lambda: fastpe.attention(q, picked.key, picked.value),
            "gather": lambda: sdpa(q, k.gather(2, at), v.gather(2, at)),
        },
        wanted,
    )
    return Work(calls, lambda c: _one_head(case, calls[c](), q, picked_k, picked_v), *_rates(case, n))
