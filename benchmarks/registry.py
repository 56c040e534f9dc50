"""What a benchmark case is, and the one list of them.

A topic file (biases.py, rotary.py, ...) registers families with @family; run.py picks cases by name and measures them.
A case is named method/shape/dtype/pass/device, for instance alibi/S2/bf16/fwd/cpu.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable

import torch

Tensor = torch.Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}  # products, relative to a forward pass


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one call, and the name they go by."""

    name: str
    B: int
    H: int
    Hk: int
    Nq: int
    Nk: int
    D: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """A name of SHAPES, or BxHxHkxNxD, or BxHxHkxNqxNkxD."""
        if text in SHAPES:
            return SHAPES[text]
        if not re.fullmatch(r"\d+(x\d+){4,5}", text):
            raise ValueError(f"shape {text!r} is not one of {', '.join(SHAPES)} nor BxHxHkxNxD")
        n = [int(x) for x in text.split("x")]
        return cls(text, *n) if len(n) == 6 else cls(text, *n[:4], n[3], n[4])

    @property
    def flop(self) -> float:
        """Of a causal forward pass."""
        return 4.0 * self.B * self.H * (self.Nq * self.Nk - self.Nq**2 / 2) * self.D


SHAPES = {
    s.name: s
    for s in (
        Shape("XS", 1, 4, 2, 512, 512, 64),
        Shape("S1", 1, 8, 8, 1024, 1024, 64),
        Shape("S2", 1, 8, 8, 4096, 4096, 64),
        Shape("S3", 1, 32, 8, 2048, 2048, 128),
        Shape("S2x2", 1, 8, 8, 8192, 8192, 64),
        Shape("S2x4", 1, 8, 8, 16384, 16384, 64),
        Shape("S2H1", 1, 1, 1, 4096, 4096, 64),
        Shape("D8", 8, 32, 8, 1, 8192, 128),
        Shape("L64", 1, 32, 8, 1, 65536, 128),
        # A GPU: 16384 tokens in heads of 64 or 128 channels, 2048 in all, as in the papers of FlashAttention.
        Shape("G64", 1, 32, 32, 16384, 16384, 64),
        Shape("G128", 1, 16, 16, 16384, 16384, 128),
        Shape("G64x4k", 4, 32, 32, 4096, 4096, 64),
        Shape("G128x4k", 4, 16, 16, 4096, 4096, 128),
    )
}


@dataclasses.dataclass(frozen=True)
class Case:
    method: str
    shape: Shape
    dtype: str = "fp32"
    pass_: str = "fwd"
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.method}/{self.shape.name}/{self.dtype}/{self.pass_}/{self.device}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def trains(self) -> bool:
        return self.pass_ != "fwd"


class Wrong(Exception):
    """A candidate whose result is not what it should be."""


@dataclasses.dataclass
class Work:
    """What a case measures.

    calls: candidates by name; "fastpe" is what ratios are taken over. A candidate that cannot run raises when called.
    check: name -> error of that candidate's result against the definition; raises Wrong.
    flop, bytes: of one call of "fastpe", for rates and shares of the limit. 0: no rate is stated.
    clock: None stands for CPU time, or events on a GPU.
    skip_bound: of fastpe.config while it is timed; 0 compares at equal work, None is the default.
    """

    calls: dict[str, Callable[[], object]]
    check: Callable[[str], float]
    flop: float = 0.0
    bytes: float = 0.0
    clock: str | None = None
    skip_bound: float | None = 0.0


@dataclasses.dataclass(frozen=True)
class Family:
    """A method: builds the Work of a case. `peers` are names of candidates beside "fastpe"; those that take a compilation
    are in COMPILED."""

    method: str
    build: Callable[[Case, frozenset[str]], Work]
    peers: tuple[str, ...]
    shapes: tuple[str, ...] = ("XS", "S1", "S2", "S3")
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    passes: tuple[str, ...] = ("fwd", "fwd+bwd")


COMPILED = frozenset({"flex", "compiled", "compiled rotary"})
FAMILIES: dict[str, Family] = {}


def family(method: str, *, peers: tuple[str, ...] = (), **kwargs):
    """Registers build(case, wanted) -> Work; `wanted` is the set of candidates asked for."""

    def register(build):
        assert method not in FAMILIES, method
        FAMILIES[method] = Family(method, build, peers, **kwargs)
        return build

    return register


def case(name: str) -> Case:
    """The case of a name; without a device it is the CPU's.

    Raises:
        ValueError: no such method, shape, dtype or pass.
    """
    parts = name.split("/")
    if len(parts) == 4:
        parts.append("cpu")
    if len(parts) != 5:
        raise ValueError(f"case {name!r} is not method/shape/dtype/pass/device")
    method, shape, dtype, pass_, device = parts
    for what, x, known in (
        ("method", method, FAMILIES), ("dtype", dtype, DTYPES), ("pass", pass_, PASSES), ("device", device, ("cpu", "cuda")),
    ):  # fmt: skip
        if x not in known:
            raise ValueError(f"case {name!r}: {what} {x!r} is not one of {', '.join(known)}")
    return Case(method, Shape.parse(shape), dtype, pass_, device)


def everything(device: str = "cpu", shapes: tuple[str, ...] | None = None) -> list[Case]:
    """Every registered case, at the families' own shapes or at those given."""
    return [
        Case(f.method, Shape.parse(shape), dtype, pass_, device)
        for f in FAMILIES.values()
        for shape in (shapes or f.shapes)
        for dtype in f.dtypes
        for pass_ in f.passes
    ]


def select(cases: list[Case], patterns: list[str]) -> list[Case]:
    """Those whose name fits a pattern (shell wildcards; a pattern without one fits names that it is a part of).

    Raises:
        ValueError: a pattern that fits nothing.
    """
    if not patterns:
        return cases
    chosen: dict[str, Case] = {}
    for pattern in patterns:
        wild = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
        found = [c for c in cases if fnmatch.fnmatchcase(c.name, wild) or fnmatch.fnmatchcase(c.name.rsplit("/", 1)[0], wild)]
        if not found:
            raise ValueError(f"no case fits {pattern!r}; --list shows them all")
        chosen |= {c.name: c for c in found}
    return list(chosen.values())
