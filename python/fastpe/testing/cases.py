"""Random attention calls: one description, built for the kernels in any dtype and for the definition in float64.

    case = Case(B=2, H=4, Hk=2, Nq=65, Nk=127, bias="cable", mask="window", causal=True)
    run = build(case, torch.float32)            # what the kernel gets
    exact = build(case, torch.float32, wide=True)   # the same rounded numbers in float64
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .. import bias as biases
from .. import mask as masks
from .. import region as regions
from .. import rope as ropes

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `bias`, `mask`, `rope`, `region` name entries of BIASES or LONG_BIASES, MASKS or LONG_MASKS, ROPES, REGIONS; `score` those of
    SCORE. A region needs a rope without positions."""

    B: int = 2
    H: int = 4
    Hk: int = 2
    Nq: int = 33
    Nk: int = 33
    D: int = 16
    Dv: int = 16
    bias: str = "none"
    mask: str = "none"
    rope: str = "none"
    region: str = "none"
    score: tuple[str, ...] = ()
    causal: bool = False
    storage: str = "bhnd"
    lse_gradient: bool = False
    seed: int = 0


class Leaves:
    """Makes the float inputs of a call and remembers them by name, so that their gradients can be compared.

    Numbers come in float64 and are rounded to what the kernel will read: q, k and v to the call's dtype, everything else
    to float32 (float64 for float64). `wide` brings the rounded numbers back to float64. `given` takes the place of leaves
    by name.
    """

    def __init__(self, dtype: torch.dtype, wide: bool = False, given: dict[str, Tensor] | None = None):
        self.dtype, self.wide, self.given = dtype, wide, given or {}
        self.aux = torch.float64 if dtype == torch.float64 else torch.float32
        self.named: dict[str, Tensor] = {}

    def rounded(self, x: Tensor, *, main: bool = False) -> Tensor:
        x = x.detach().to(self.dtype if main else self.aux)
        return x.double() if self.wide else x

    def __call__(self, name: str, x: Tensor, *, main: bool = False) -> Tensor:
        assert name not in self.named, name
        self.named[name] = self.given[name] if name in self.given else self.rounded(x, main=main).requires_grad_()
        return self.named[name]

    def watch(self, name: str, x: Tensor) -> Tensor:
        """Remembers the gradient of something computed from leaves."""
        if x.requires_grad and not x.is_leaf:
            x.retain_grad()
        self.named[name] = x
        return x

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: x.grad for name, x in self.named.items()}


@dataclasses.dataclass
class Run:
    """A call ready to be made: attention(*qkv, **kwargs)."""

    qkv: tuple[Tensor, Tensor, Tensor]
    kwargs: dict
    leaves: Leaves
    dout: Tensor
    dlse: Tensor | None

    def __call__(self, attention: Callable, backward: bool = True) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        """out, lse and the gradients by name."""
        out, lse = attention(*self.qkv, **self.kwargs, return_lse=True)
        if not backward:
            return out, lse, {}
        loss = (out * self.dout.to(out.dtype)).sum()
        if self.dlse is not None:
            # -inf marks an empty row, which has no gradient.
            loss = loss + (torch.where(torch.isneginf(lse), 0.0, lse) * self.dlse.to(lse.dtype)).sum()
        if loss.requires_grad:
            loss.backward()
        return out, lse, self.leaves.gradients()


class _Draw:
    """Random numbers of one case."""

    def __init__(self, case: Case, leaves: Leaves):
        self.case, self.leaves = case, leaves
        self.g = torch.Generator().manual_seed(case.seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.g)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, dtype=torch.float64, generator=self.g)

    def coin(self, p: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.g) < p

    def leaf(self, name: str, x: Tensor) -> Tensor:
        return self.leaves(name, x)


def _kerple(kind: str):
    def make(d: _Draw):
        # Powers up to 1: a row that sees only keys 200 tokens off would else rest on the last bits of scores in the thousands.
        return biases.Kerple(d.leaf("p", d.uniform(0.1, 1, d.case.H)), d.leaf("a", d.uniform(0.05, 1, d.case.H)), kind)

    return make


def _relative(kind: str):
    def make(d: _Draw):
        c = d.case
        params = None
        if kind in ("linear", "log", "power"):
            params = d.leaf("first", d.uniform(0.1, 1, c.H)), d.leaf("second", d.uniform(0.2, 1.5, c.H))
        u = d.leaf("u", d.uniform(0, 8, c.B, c.H, c.Nq))
        w = d.leaf("w", d.uniform(0, 8, c.B, 1, c.Nk))
        return biases.RelativeFn(kind, params, u, w, d.leaf("g", d.uniform(0.2, 1, c.B, c.H, c.Nq)))

    return make


def _t5(bidirectional: bool):
    def make(d: _Draw):
        return biases.T5(d.leaf("table", d.normal(16, d.case.H)), bidirectional, max_distance=40)

    return make


def _cable(weighted: bool, bidirectional: bool = False):
    def make(d: _Draw):
        c = d.case
        h = d.leaf("h", d.normal(c.B, c.H, c.Nk))
        g = F.softplus(d.leaf("hs", d.normal(c.B, c.H, c.Nk))) if weighted else None
        return biases.Cable(-F.softplus(h) if not weighted else -torch.relu(h), g, bidirectional)

    return make


def _kernel_cable(d: _Draw):
    c = d.case
    h = d.leaf("h", d.normal(c.B, c.H, c.Nk))
    return biases.KernelCable(-F.softplus(h), F.softplus(d.leaf("hs", d.normal(c.B, c.H, c.Nk))))


def _block_cable(d: _Draw):
    c = d.case
    h = d.leaf("h", d.normal(c.B, c.H, c.Nk))
    return biases.KernelCable(-F.softplus(h), block_sizes=[int(2 ** (h / 2)) for h in range(c.H)])


def _dense(*axes: str, beside: str | None = None):
    """A dense bias over the axes named (the others broadcast), alone or added to another bias."""

    def make(d: _Draw):
        c = d.case
        shape = [n if axis in axes else 1 for axis, n in (("B", c.B), ("H", c.H), ("Nq", c.Nq), ("Nk", c.Nk))]
        x = biases.Dense(d.leaf("dense", d.normal(*shape)))
        return x if beside is None else BIASES[beside](d) + x

    return make


def _weighted_kerple(d: _Draw):
    h, leaf = d.case.H, d.leaf
    pair = leaf("p", d.uniform(0.3, 1.5, h)), leaf("a", d.uniform(0.05, 0.5, h))
    weight = leaf("weight_p", d.uniform(0.3, 1.0, h)), leaf("weight_a", d.uniform(0.05, 0.3, h))
    return biases.Kerple(*pair, "power", *weight)


def _table_positions(causal: bool):
    def make(d: _Draw):
        c = d.case
        p, k = (torch.randint(0, 40, (c.B, n), generator=d.g) for n in (c.Nq, c.Nk))
        return biases.RelativeTable(d.leaf("table", d.normal(c.H, 31)), causal, p, k)

    return make


def _rows_cols(d: _Draw):
    c = d.case
    rows, cols = (d.leaf(name, d.normal(c.B, c.H, n, 13)) for name, n in (("rows", c.Nq), ("cols", c.Nk)))
    return biases.RowTable(rows) + biases.ColTable(cols)


def _rows_clipped(d: _Draw):
    c = d.case
    rows = d.leaf("rows", d.normal(1, c.H, c.Nq, 3))
    return biases.RowTable(rows, lambda r: torch.where(r < 0, -1, (r // 5).clamp(max=2))) + biases.Alibi(c.H)


def _products(d: _Draw):
    """Unclipped rows with one table, clipped columns with a table of each head."""
    c = d.case
    many = 2 * max(c.Nq, c.Nk, 1) - 1
    rows = biases.RowProduct(0.3 * d.leaf("row_q", d.normal(c.B, c.H, c.Nq, 12)), d.leaf("row_e", d.normal(many, 12)))
    return rows + biases.ColProduct(0.3 * d.leaf("col_k", d.normal(1, c.H, c.Nk, 12)), d.leaf("col_e", d.normal(c.H, many, 12)))


def _product_clipped(d: _Draw):
    c = d.case
    table = d.leaf("col_e", d.normal(c.H, 3, 8))
    index = lambda r: torch.where(r < 0, -1, (r // 50).clamp(max=2))  # noqa: E731
    return biases.ColProduct(0.3 * d.leaf("col_k", d.normal(c.B, 1, c.Nk, 8)), table, index) + biases.Alibi(c.H)


def _fire(random: bool):
    def make(d: _Draw):
        c = d.case
        leaf = d.leaf
        network = leaf("w1", d.normal(12)), leaf("b1", d.normal(12)), leaf("w2", d.normal(c.H, 12)), leaf("b2", d.normal(c.H))
        scalars = leaf("c", d.uniform(0.1, 0.4, 1)[0]), leaf("L", d.uniform(9, 30, 1)[0])
        if not random:
            return biases.Fire(*network, *scalars)
        p, k = (torch.randint(0, 90, (c.B, n), generator=d.g) for n in (c.Nq, c.Nk))
        return biases.Fire(*network, *scalars, positions=p, key_positions=k)

    return make


def _segment_pairs(*tables: str):
    def make(d: _Draw):
        c = d.case
        q, k = (torch.randint(0, size, (c.B, n), generator=d.g) for size, n in ((2, c.Nq), (3, c.Nk)))
        given = {"factor": lambda: d.uniform(0.3, 1.5, c.H, 2, 3), "bias": lambda: d.normal(c.B, 1, 2, 3)}
        return biases.SegmentPairs(q, k, **{what: d.leaf(f"pairs_{what}", given[what]()) for what in tables})

    return make


def _forget(d: _Draw):
    z = d.leaf("z", d.normal(d.case.B, d.case.H, d.case.Nk) + 2)
    return biases.Forget(F.logsigmoid(z))


def _forget_both_sides(d: _Draw):
    past, future = (F.logsigmoid(d.leaf(name, d.normal(d.case.B, d.case.H, d.case.Nk) + 2)) for name in ("z", "z2"))
    return biases.Forget(past, future_log_gates=future)


def _table(causal: bool):
    def make(d: _Draw):
        return biases.RelativeTable(d.leaf("table", d.normal(d.case.H, 31)), causal)

    return make


def _callable(d: _Draw):
    weight = d.leaf("weight", d.normal(d.case.H))
    return biases.RelativeTable(lambda r: weight[:, None] * torch.cos(0.3 * r.to(weight.dtype)))


def _alibi_positions(d: _Draw):
    c = d.case
    slopes = d.leaf("slopes", d.uniform(0.05, 0.5, c.H))
    return biases.Alibi(slopes, positions=d.leaf("positions", d.uniform(0, 20, c.B, c.Nk)))


# Biases that take per-key values without query values need Nq <= Nk.
BIASES: dict[str, Callable[[_Draw], biases.Bias | None]] = {
    "none": lambda d: None,
    "alibi": lambda d: biases.Alibi(d.leaf("slopes", d.uniform(0.05, 0.5, d.case.H))),
    "alibi_batch": lambda d: biases.Alibi(
        d.leaf("slopes", d.uniform(0.05, 0.5, d.case.B, d.case.H)), d.leaf("future", d.uniform(0.05, 0.5, d.case.H))
    ),
    "alibi_fixed": lambda d: biases.Alibi(d.case.H),
    "alibi_positions": _alibi_positions,
    "kerple_log": _kerple("log"),
    "kerple_power": _kerple("power"),
    "t5": _t5(True),
    "t5_causal": _t5(False),
    "table": _table(False),
    "table_causal": _table(True),
    "table_callable": _callable,
    "sandwich": lambda d: biases.Sandwich(d.case.H, dim=32),
    "cable_v1": _cable(False),
    "cable": _cable(True),
    "cable_bidirectional": _cable(True, True),
    "kernel_cable": _kernel_cable,
    "block_cable": _block_cable,
    "forget": _forget,
    "forget_both_sides": _forget_both_sides,
    "kerple_weighted": _weighted_kerple,
    "table_positions": _table_positions(False),
    "table_positions_causal": _table_positions(True),
    "rows_cols": _rows_cols,
    "rows_clipped": _rows_clipped,
    "fire": _fire(False),
    "fire_positions": _fire(True),
    "dense": _dense("B", "H", "Nq", "Nk"),
    "dense_heads": _dense("H", "Nq", "Nk"),
    "dense_batch": _dense("B", "Nq", "Nk"),
    "dense_shared": _dense("Nq", "Nk"),
    "dense_by_key": _dense("B", "Nk"),
    "dense_by_row": _dense("H", "Nq"),
    "dense_and_alibi": _dense("Nq", "Nk", beside="alibi"),
    "dense_and_cable": _dense("H", "Nk", beside="cable"),
    **{f"fn_{kind}": _relative(kind) for kind in ("linear", "signed", "abs", "log", "power", "logsq")},
}
# What long-context methods bring.
LONG_BIASES: dict[str, Callable[[_Draw], biases.Bias]] = {
    "products": _products,
    "product_clipped": _product_clipped,
    "segment_pairs": _segment_pairs("factor", "bias"),
    "segment_factor": _segment_pairs("factor"),
    "segment_pairs_and_kerple": lambda d: BIASES["kerple_weighted"](d) + _segment_pairs("factor", "bias")(d),
}
NEEDS_KEYS = {"dense_and_cable", "alibi_positions", "cable_v1", "cable", "cable_bidirectional", "kernel_cable", "block_cable", "forget", "forget_both_sides"}


def _documents(d: _Draw):
    cuts = torch.randint(0, d.case.Nk + 1, (3,), generator=d.g).sort().values
    return masks.documents(cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), cuts]))


def _ids(d: _Draw):
    c = d.case
    return masks.documents(
        ids=torch.randint(0, 3, (c.B, c.Nq), generator=d.g), key_ids=torch.randint(-1, 3, (c.B, c.Nk), generator=d.g)
    )


MASKS: dict[str, Callable[[_Draw], masks.Mask | None]] = {
    "none": lambda d: None,
    "window": lambda d: masks.window(7),
    "window_both": lambda d: masks.window(5, 9),
    "window_sinks": lambda d: masks.window(6) & masks.sinks(3),
    "documents": _documents,
    "ids": _ids,
    "padding": lambda d: masks.padding(d.coin(0.7, d.case.B, d.case.Nk)),
    "left_padding": lambda d: masks.padding(
        torch.arange(d.case.Nk) >= torch.randint(0, d.case.Nk + 1, (d.case.B, 1), generator=d.g)
    ),
    "dense": lambda d: masks.dense(d.coin(0.6, d.case.B, 1, d.case.Nq, d.case.Nk)),
    "everything": lambda d: masks.window(11, 9)
    & masks.sinks(2)
    & _ids(d)
    & masks.padding(d.coin(0.9, d.case.B, d.case.Nk))
    & masks.dense(d.coin(0.9, d.case.H, 1, 1).reshape(1, d.case.H, 1, 1)),
}
NEEDS_KEYS_MASK = {"documents", "lower"}


def _intervals(*, lower: bool = False):
    def make(d: _Draw):
        n = d.case.Nk
        edges = torch.randint(0, n + 2, (4, d.case.B, n), generator=d.g).sort(0).values
        low = torch.randint(0, n // 2 + 1, (n,), generator=d.g) if lower else None
        return masks.intervals(*edges, lower=low)

    return make


def _segments(d: _Draw):
    c = d.case
    q, k = (torch.randint(0, size, (c.B, n), generator=d.g) for size, n in ((3, c.Nq), (4, c.Nk)))
    return masks.segments(d.coin(0.6, 3, 4), q, k)


def _blocks(block_q: int, block_k: int, *axes: str):
    def make(d: _Draw):
        c = d.case
        lead = (c.B if "B" in axes else 1, c.H if "H" in axes else 1)
        return masks.blocks(d.coin(0.5, *lead, -(-c.Nq // block_q), -(-c.Nk // block_k)), block_q, block_k)

    return make


# What long-context methods bring.
LONG_MASKS: dict[str, Callable[[_Draw], masks.Mask]] = {
    "intervals": _intervals(),
    "lower": _intervals(lower=True),
    "segments": _segments,
    "blocks": _blocks(16, 8, "B", "H"),
    "blocks_shared": _blocks(64, 64),
    "blocks_and_window": lambda d: _blocks(5, 7, "H")(d) & masks.window(20),
    "all_rules": lambda d: _intervals()(d) & _segments(d) & _blocks(8, 32, "B")(d) & masks.padding(d.coin(0.9, d.case.B, d.case.Nk)),
}

REGIONS: dict[str, regions.Region | None] = {
    "none": None,
    "self_extend": regions.self_extend(9, 4, scale_base=20.0),
    "self_extend_true": regions.self_extend(10, 3, shift="true"),
    "self_extend_bidirectional": regions.self_extend_bidirectional(7, 3, original_length=16),
    "rerope": regions.rerope(12, 30),
    "leaky_rerope": regions.leaky_rerope(12, 3.5, None),
    "dual_chunk": regions.dual_chunk(24, 5, original_length=40),
    "dual_chunk_serving": regions.dual_chunk(24, 8, original_length=40, mscale="serving"),
    "string": regions.string(13, 4),
    "wrope": regions.wrope(8, 40.0),
    "streaming": regions.streaming(3, 12),
    "key_set": regions.key_set(0),
    "key_set_continual": regions.key_set(1, "continual"),
}

ROPES: dict[str, Callable[[_Draw], dict]] = {
    "none": lambda d: {},
    "half": lambda d: {"rope": ropes.default(d.case.D)},
    "interleaved": lambda d: {"rope": ropes.default(d.case.D, layout="interleaved")},
    "partial": lambda d: {"rope": ropes.default(max(2, d.case.D // 2 // 2 * 2))},
    "positions": lambda d: {
        "rope": ropes.default(d.case.D),
        "positions": d.uniform(0, 500, d.case.B, d.case.Nq).round(),
        "key_positions": d.uniform(0, 500, d.case.B, d.case.Nk).round(),
    },
}

SCORE: dict[str, Callable[[_Draw], dict]] = {
    "scale": lambda d: {"scale": 0.37},
    "head_scale": lambda d: {"head_scale": d.leaf("head_scale", d.uniform(0.5, 1.5, d.case.H))},
    "row_scale": lambda d: {"row_scale": d.leaf("row_scale", d.uniform(0.0, 1.5, d.case.B, 1, d.case.Nq))},
    "softcap": lambda d: {"softcap": 2.5},
    "softcap_bias": lambda d: {"softcap": 2.5, "softcap_includes_bias": True},
    "temperature": lambda d: {"temperature": 0.8},
    "sink": lambda d: {"sink": d.leaf("sink", d.normal(d.case.H))},
}

STORAGE = ("bhnd", "bnhd", "padded", "expanded")


def _store(x: Tensor, storage: str) -> Tensor:
    """x with other strides: (B,N,H,D) memory, or rows with gaps."""
    if storage == "bnhd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if storage == "padded":
        wide = x.new_full((*x.shape[:3], x.shape[3] + 3), 7.0)
        wide[..., 2:-1] = x
        return wide[..., 2:-1]
    return x


def build(case: Case, dtype: torch.dtype, *, wide: bool = False, given: dict[str, Tensor] | None = None) -> Run:
    """The call a case describes, its numbers rounded to `dtype`; with `wide`, those rounded numbers in float64; `given`
    takes the place of leaves by name."""
    leaves = Leaves(dtype, wide, given)
    d = _Draw(case, leaves)
    c = case
    shapes = {"query": (c.B, c.H, c.Nq, c.D), "key": (c.B, c.Hk, c.Nk, c.D), "value": (c.B, c.Hk, c.Nk, c.Dv)}
    qkv = []
    for name, shape in shapes.items():
        x = d.normal(*shape)
        if c.storage == "expanded" and name != "query":
            x = leaves(name, x[:, :1], main=True).expand(shape)
        else:
            x = _store(leaves(name, x, main=True), "bhnd" if c.storage == "expanded" else c.storage)
        qkv.append(x)
    kwargs: dict = {"bias": (BIASES | LONG_BIASES)[c.bias](d), "mask": (MASKS | LONG_MASKS)[c.mask](d), "is_causal": c.causal, **ROPES[c.rope](d)}
    if c.region != "none":
        kwargs["region"] = REGIONS[c.region]
    for name in c.score:
        kwargs |= SCORE[name](d)
    dout = leaves.rounded(d.normal(c.B, c.H, c.Nq, c.Dv), main=True)
    dlse = leaves.rounded(d.normal(c.B, c.H, c.Nq)) if c.lse_gradient else None
    return Run(tuple(qkv), kwargs, leaves, dout, dlse)
