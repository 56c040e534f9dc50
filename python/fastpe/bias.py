"""Additive position biases.

A bias object is a small immutable description. It holds tensors (which may require grad) and knows its kernel
arguments (`op_args`), its dense float64 definition (`materialize`) and its `repr`. The bias is added after `scale`
and softcap and is not scaled itself. Throughout, i is a query row, j a key, and I = i + Nk - Nq the index of the query
among the keys.

A bias that depends on the distance only, or on a difference of per-token values, is a class here that ends in a table
or in `RelativeFn`; a bias with a formula of its own needs a form in csrc/pos/bias.h as well.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import _check
from ._call import Call, OpBias
from ._load import _C
from .prefix import BLOCK, Prefix, prefix_sum

Tensor = torch.Tensor

# Name -> id, from csrc/pos/bias_forms.def.
FORMS = {form.rstrip("_"): number for form, (number, _) in _C.bias_forms().items()}


class Bias:
    """Base of every bias object."""

    # True when the scores of a row are shifted by a number of its own: the same softmax, another lse.
    shifts_rows = False

    def op_args(self, call: Call) -> OpBias:
        """The kernel arguments for one call."""
        raise NotImplementedError

    def materialize(self, call: Call) -> Tensor:
        """The dense definition: float64, broadcastable to (B, H, Nq, Nk). Differentiable; quadratic memory."""
        raise NotImplementedError

    def multiplier(self, call: Call) -> Tensor | None:
        """The factor of the scaled products, dense float64, of a bias that has one (`Kerple` with a weight)."""
        return None

    def __add__(self, other: Bias) -> Sum:
        return Sum((*_parts(self), *_parts(other))) if isinstance(other, Bias) else NotImplemented

    def __repr__(self) -> str:
        def show(x: object) -> str:
            if isinstance(x, Tensor):
                return f"tensor{tuple(x.shape)}" + (" with grad" if x.requires_grad else "")
            return getattr(x, "__name__", repr(x)) if callable(x) else repr(x)

        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        given = [(f.name, getattr(self, f.name)) for f in fields if not (f.default is True and getattr(self, f.name))]
        parts = [f"{name}={show(x)}" for name, x in given if x is not None]
        return f"{type(self).__name__}({', '.join(parts)})"


def _define(cls):
    return dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)


def _parts(b: Bias) -> tuple[Bias, ...]:
    return b.terms if isinstance(b, Sum) else (b,)


@_define
class Sum(Bias):
    """Biases added up; `a + b` makes one.

    A call has room for one closed form (anything that is a function of a distance: Alibi, Kerple, T5, RelativeTable,
    Fire, Cable, Forget, ...), one RowTable, one ColTable, one RowProduct, one ColProduct, one SegmentPairs, and any number of Dense. Two closed forms are added in one
    `RelativeTable(lambda d: ...)` when both depend on the distance only, else one of them as a Dense.

    Args:
        terms: the biases.

    Raises:
        ValueError: two terms that need the same place; the message names both.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 5, 8)
    >>> b = fastpe.bias.Alibi(2) + fastpe.bias.Dense(torch.randn(2, 1, 5))
    >>> fastpe.attention(q, q, q, bias=b, is_causal=True).shape
    torch.Size([1, 2, 5, 8])
    """

    terms: tuple[Bias, ...]

    def __post_init__(self):
        for term in self.terms:
            if isinstance(term, Contextual):
                raise NotImplementedError(f"fastpe.bias: {type(term).__name__} counts gates in a kernel of its own and does not add to other biases")

    def op_args(self, call: Call) -> OpBias:
        total, owner = OpBias(), {}
        for term in self.terms:
            one = term.op_args(call)
            if one.form != FORMS["none"]:
                _alone(owner, "closed form", term, "add functions of the distance in one RelativeTable(lambda d: ...)")
                closed = {f.name: getattr(one, f.name) for f in dataclasses.fields(one) if f.name not in _OPEN}
                total = dataclasses.replace(total, **closed)
            for what, many in (("rows", "RowTable"), ("cols", "ColTable"), ("row_q", "RowProduct"), ("col_k", "ColProduct")):
                if getattr(one, what) is not None:
                    _alone(owner, many, term, "join their tables along the channels")
                    table = {"row_q": "row_e", "col_k": "col_e"}.get(what, what)
                    total = dataclasses.replace(total, **{what: getattr(one, what), table: getattr(one, table)})
            if one.index is not None:
                if total.index is not None and not (_same_index(total.index, one.index) and owner["index"]._entries() == term._entries()):
                    _alone({"index": owner["index"]}, "index", term, "give the terms of rows and columns the same entries and index")
                owner["index"] = term
                total = dataclasses.replace(total, index=one.index)
            if one.q_seg is not None:
                _alone(owner, "pair of segment tables", term, "join their segments")
                total = dataclasses.replace(total, **{what: getattr(one, what) for what in ("factor", "pairs", "q_seg", "k_seg")})
            if one.dense is not None:
                total = dataclasses.replace(total, dense=one.dense if total.dense is None else total.dense + one.dense)
        return total

    def materialize(self, call: Call) -> Tensor:
        return sum((term.materialize(call) for term in self.terms), torch.zeros(1, 1, 1, 1, dtype=torch.float64))

    def multiplier(self, call: Call) -> Tensor | None:
        made = [m for m in (term.multiplier(call) for term in self.terms) if m is not None]
        return math.prod(made[1:], start=made[0]) if made else None

    shifts_rows = property(lambda self: any(term.shifts_rows for term in self.terms))


_OPEN = ("rows", "cols", "row_q", "row_e", "col_k", "col_e", "index", "dense", "factor", "pairs", "q_seg", "k_seg")


def _alone(owner: dict[str, Bias], place: str, term: Bias, how: str) -> None:
    if place in owner:
        first, second = type(owner[place]).__name__, type(term).__name__
        raise ValueError(
            f"fastpe.bias: {first} and {second} both take the one {place} of a call; {how}, or give one of them as a Dense"
        )
    owner[place] = term


def _same_index(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and (not _check.can_read(a) or bool((a == b).all())))


# ---------------------------------------------------------------------------------------------------------------------
# Shapes of what users pass


def _check_heads(where: str, what: str, x: Tensor) -> None:
    _check.is_float(where, what, x)
    if x.dim() not in (1, 2):
        raise ValueError(f"{where}: {what} must be (H,) or (B, H), got {_check.shape(x)}")


def _per_head(call: Call, where: str, what: str, x: Tensor) -> Tensor:
    """(H,) or (B,H) -> (B|1, H|1) in the aux dtype."""
    x = x if x.dim() == 2 else x[None]
    call.fits(where, what, x.shape, ("batch entries", call.B), ("heads", call.H))
    return call.aux(where, what, x)


def _check_tokens(where: str, what: str, x: Tensor) -> None:
    _check.is_tensor(where, what, x)
    if x.dtype not in _check.FLOATS and x.dtype not in _check.INTEGERS:
        raise TypeError(f"{where}: {what} must hold numbers, got {_check.name(x.dtype)}")
    if x.dim() not in (1, 2, 3):
        raise ValueError(f"{where}: {what} must be (N,), (B, N) or (B, H, N), got {_check.shape(x)}")


def _tokens(x: Tensor) -> Tensor:
    """(N,), (B,N) or (B,H,N) -> (B|1, H|1, N)."""
    if x.dim() == 3:
        return x
    return x[None, None] if x.dim() == 1 else x[:, None]


def _fit_tokens(call: Call, where: str, what: str, x: Tensor, n: int, side: str) -> None:
    _check.on_device(where, what, x, call.device)
    call.fits(where, what, x.shape[:2], ("batch entries", call.B), ("heads", call.H))
    if x.shape[-1] != n:
        raise ValueError(f"{where}: {what} has {x.shape[-1]} tokens, the call has {n} {side}")


def _last_rows(call: Call, where: str, what: str, x: Tensor) -> Tensor:
    """Per-query numbers given for the queries, or for all keys of which the queries are the last."""
    n = x.shape[-1]
    if n != call.Nq and n == call.Nk and call.Nq < call.Nk:
        x = x[..., call.Nk - call.Nq :]
    _fit_tokens(call, where, what, x, call.Nq, "queries")
    return x


def _needs_query_index(call: Call, where: str) -> None:
    if call.Nq > call.Nk:
        raise ValueError(
            f"{where}: {call.Nq} queries and {call.Nk} keys: queries are the last keys unless their own values are given"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The general form


_KINDS = ("linear", "signed", "abs", "log", "power", "logsq")
_PARAMS = {"linear": ("a_plus", "a_minus"), "log": ("p", "a"), "power": ("a", "p")}


def _phi(kind: str, d: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor:
    """The formulas of arXiv 2108.12409, 2205.09921 and 2503.08067 in one place, for the dense definition."""
    if kind == "linear":
        return -first * d.clamp(min=0) - second * (-d).clamp(min=0)
    if kind == "signed":
        return d
    if kind == "abs":
        return -d.abs()
    if kind == "log":
        return -first * torch.log1p(second * d.abs())
    if kind == "logsq":
        return -torch.log(1 + d * d)
    # |D|^p is 0 at D = 0, and so are its derivatives there; 1 stands in where the power has none.
    zero = d == 0
    size = torch.where(zero, torch.ones_like(d), d.abs())
    return torch.where(zero, torch.zeros_like(d), -first * size**second)


@_define
class RelativeFn(Bias):
    """The general closed form: b = g * phi(u_i - w_j), with per-token values u and w and a row weight g.

    | kind | phi(D) | params |
    |---|---|---|
    | linear | -a_plus * max(D, 0) - a_minus * max(-D, 0) | (a_plus, a_minus) |
    | signed | D | none |
    | abs | -abs(D) | none |
    | log | -p * log(1 + a * abs(D)) | (p, a) |
    | power | -a * abs(D)^p, 0 at D = 0 | (a, p) |
    | logsq | -log(1 + D^2) | none |

    Args:
        kind: one of the table.
        params: two tensors (H,) or (B, H), each float; None for kinds without.
        query_values: u, (Nq,), (B, Nq) or (B, H, Nq). Default: the key value at the query's own index, or that index.
        key_values: w, (Nk,), (B, Nk), (B, H, Nk), or a `Prefix` of shape (B, H, Nk) (which keeps long sums exact).
            Default: the key's index.
        row_weight: g, (Nq,), (B, Nq) or (B, H, Nq) (or Nk long: the queries take the last Nq). Default 1.

    Everything float may require grad: params, values, row weight.

    Raises:
        ValueError, TypeError: unknown kind, missing params, wrong shapes or types.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 5, 8)
    >>> slopes = torch.tensor([0.5, 0.25])
    >>> b = fastpe.bias.RelativeFn("linear", params=(slopes, slopes))
    >>> torch.allclose(fastpe.attention(q, q, q, bias=b), fastpe.attention(q, q, q, bias=fastpe.bias.Alibi(slopes)))
    True
    """

    kind: str
    params: tuple[Tensor, Tensor] | None = None
    query_values: Tensor | None = None
    key_values: Tensor | Prefix | None = None
    row_weight: Tensor | None = None

    _where = "fastpe.bias.RelativeFn"

    def __post_init__(self):
        where = self._where
        if self.kind not in _KINDS:
            raise ValueError(f"{where}: kind must be one of {', '.join(_KINDS)}, got {self.kind!r}")
        names = _PARAMS.get(self.kind)
        if names is None and self.params is not None:
            raise ValueError(f"{where}: kind {self.kind} takes no params")
        if names is not None:
            if not isinstance(self.params, (tuple, list)) or len(self.params) != 2:
                raise ValueError(f"{where}: kind {self.kind} takes params ({names[0]}, {names[1]})")
            for what, x in zip(names, self.params):
                _check_heads(where, what, x)
        for what in ("query_values", "key_values", "row_weight"):
            x = getattr(self, what)
            if x is not None and not isinstance(x, Prefix):
                _check_tokens(where, what, x)

    def op_args(self, call: Call) -> OpBias:
        return _relative(call, self._where, self.kind, self.params, self.query_values, self.key_values, self.row_weight)

    def materialize(self, call: Call) -> Tensor:
        d = _dense_difference(call, self._where, self.query_values, self.key_values)
        first = second = None
        if self.params is not None:
            first, second = (_per_head(call, self._where, "params", x).double()[..., None, None] for x in self.params)
        b = _phi(self.kind, d, first, second)
        if self.row_weight is not None:
            b = _last_rows(call, self._where, "row_weight", _tokens(self.row_weight)).double()[..., None] * b
        return b


def _anchor(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values (..., N) as local + base[n // 128], so that neighbours keep their exact difference in float32."""
    base = x.detach()[..., ::BLOCK].double().contiguous()
    block = torch.arange(x.shape[-1], device=x.device) // BLOCK
    return (x.double() - base.index_select(-1, block)).to(dtype), base


def _relative(
    call: Call,
    where: str,
    kind: str,
    params: tuple[Tensor, Tensor] | None,
    query_values: Tensor | None,
    key_values: Tensor | Prefix | None,
    row_weight: Tensor | None,
    names: tuple[str, str] = ("query_values", "key_values"),
) -> OpBias:
    """Kernel arguments of g * phi(u - w); `names` are what the user calls u and w."""
    what_u, what_w = names
    u = w = base = gamma = packed = None
    if key_values is not None:
        keys = key_values if isinstance(key_values, Prefix) else _tokens(key_values)
        local = keys.local if isinstance(keys, Prefix) else keys
        if local.dim() != 3:
            raise ValueError(f"{where}: {what_w} must be a Prefix of shape (B, H, N), got {_check.shape(local)}")
        _fit_tokens(call, where, what_w, local, call.Nk, "keys")
        if not isinstance(keys, Prefix):
            _check.positions_in_range(where, what_w, keys)
        if query_values is None:
            _needs_query_index(call, where)
            if isinstance(keys, Prefix):
                w, base = call.aux(where, what_w, keys.local), keys.base
            else:
                w, base = _anchor(keys, call.dtype)
        else:
            w = keys.values() if isinstance(keys, Prefix) else keys
    if query_values is not None:
        u = _tokens(query_values)
        _fit_tokens(call, where, what_u, u, call.Nq, "queries")
        _check.positions_in_range(where, what_u, u)
        if w is None:
            w = call.key_index()[None, None]
        # A common shift leaves u - w as it is and lets float32 hold large positions.
        shift = w.detach()[..., :1].double() if call.Nk > 0 else 0.0
        u, w = ((x.double() - shift).to(call.dtype).contiguous() for x in (u, w))
    if row_weight is not None:
        gamma = call.aux(where, "row_weight", _last_rows(call, where, "row_weight", _tokens(row_weight))).contiguous()
    if params is not None:
        first, second = (_per_head(call, where, "params", x) for x in params)
        packed = torch.stack((first, second) if first.shape == second.shape else torch.broadcast_tensors(first, second), dim=-1)
    return OpBias(FORMS[kind], params=packed, gamma=gamma, u=u, w=w, base=base)


def _dense_difference(call: Call, where: str, query_values, key_values) -> Tensor:
    """u_i - w_j in float64, (B|1, H|1, Nq, Nk)."""

    def numbers(x):
        return x.values() if isinstance(x, Prefix) else _tokens(x).double()

    if query_values is None and key_values is not None:
        _needs_query_index(call, where)
    w = call.key_index().double()[None, None] if key_values is None else numbers(key_values)
    if query_values is not None:
        u = numbers(query_values)
    elif key_values is not None:
        u = w[..., call.Nk - call.Nq :]
    else:
        u = call.query_index().double()[None, None]
    return u[..., :, None] - w[..., None, :]


# ---------------------------------------------------------------------------------------------------------------------
# ALiBi


def alibi_slopes(heads: int, max_bias: float = 8.0, *, device=None) -> Tensor:
    """The slopes of the ALiBi paper (arXiv 2108.12409), float32 (heads,).

    For a power of two, 2^(-max_bias (h + 1) / heads). Otherwise the slopes of the power of two below, followed by every
    other slope of the power of two above, as in the paper's code; the shorter rule 2^(-8 (h + 1) / heads) differs.

    Args:
        heads: number of heads, at least 1.
        max_bias: 8 in the paper; `alibi_bias_max` of MPT.
        device: of the result.

    >>> import fastpe
    >>> fastpe.bias.alibi_slopes(4)
    tensor([0.2500, 0.0625, 0.0156, 0.0039])
    """
    where = "fastpe.bias.alibi_slopes"
    _check.count(where, "heads", heads, 1)
    max_bias = _check.number(where, "max_bias", max_bias, positive=True)

    def power_of_two(n: int) -> list[float]:
        return [2.0 ** (-max_bias * (h + 1) / n) for h in range(n)]

    below = 1 << (heads.bit_length() - 1)
    slopes = power_of_two(below)
    if below != heads:
        slopes += power_of_two(2 * below)[0::2][: heads - below]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


@_define
class Alibi(Bias):
    """Attention with linear biases, arXiv 2108.12409: b = -m_h |I - j|.

    Args:
        slopes: m, (H,) or (B, H) float; or the number of heads, for `alibi_slopes(heads)`. Learnable when it requires grad.
        future_slopes: slopes for keys after the query, (H,) or (B, H). Default: `slopes`, the symmetric form.
        positions: real positions instead of indices, (N,), (B, N) or (B, H, N), integers or floats, exact up to 2^53.
            Positions of the queries; when `key_positions` is absent, of all Nk tokens, of which the queries are the last Nq.
            Floats may require grad (sign(0) = 0).
        key_positions: positions of the keys, same shapes.
        row_term: False gives the bias that flash-attention's causal kernel adds, m_h (j - (Nk - 1)): each row is shifted by
            m_h (Nk - 1 - I). out is the same, lse is that of the shifted scores and must not be merged with others. Causal
            calls only, no positions, not with a sink.

    Raises:
        TypeError, ValueError: wrong types, shapes, or positions beyond 2^53.
        NotImplementedError: row_term=False with what a shifted row changes.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 4, 6, 8)
    >>> out = fastpe.attention(q, q, q, bias=fastpe.bias.Alibi(4), is_causal=True)
    >>> fastpe.bias.Alibi(torch.nn.Parameter(fastpe.bias.alibi_slopes(4)))
    Alibi(slopes=tensor(4,) with grad)
    """

    slopes: Tensor | int
    future_slopes: Tensor | None = None
    positions: Tensor | None = None
    key_positions: Tensor | None = None
    row_term: bool = True

    _where = "fastpe.bias.Alibi"

    def __post_init__(self):
        where = self._where
        if isinstance(self.slopes, int):
            _check.count(where, "slopes", self.slopes, 1)
        else:
            _check_heads(where, "slopes", self.slopes)
        if self.future_slopes is not None:
            _check_heads(where, "future_slopes", self.future_slopes)
        for what in ("positions", "key_positions"):
            if getattr(self, what) is not None:
                _check_tokens(where, what, getattr(self, what))
        if self.positions is None and self.key_positions is not None:
            raise ValueError(f"{where}: key_positions without positions")
        if not self.row_term and (self.positions is not None or self.future_slopes is not None):
            raise NotImplementedError(f"{where}: row_term=False goes with neither positions nor future_slopes; leave row_term True")

    shifts_rows = property(lambda self: not self.row_term)

    def _values(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """query values, key values."""
        if not self.row_term:
            if not call.causal:
                raise NotImplementedError(f"{self._where}: row_term=False is the same softmax in causal calls only; leave row_term True")
            return torch.full((call.Nq,), call.Nk - 1, device=call.device), None
        if self.key_positions is None:
            return None, self.positions
        return self.positions, self.key_positions

    def _slopes(self, call: Call) -> tuple[Tensor, Tensor]:
        slopes = self.slopes
        if isinstance(slopes, int):
            slopes = alibi_slopes(slopes, device=call.device)
        past = _per_head(call, self._where, "slopes", slopes)
        return past, past if self.future_slopes is None else _per_head(call, self._where, "future_slopes", self.future_slopes)

    def op_args(self, call: Call) -> OpBias:
        names = ("", "positions") if self.key_positions is None else ("positions", "key_positions")
        return _relative(call, self._where, "linear", self._slopes(call), *self._values(call), None, names)

    def materialize(self, call: Call) -> Tensor:
        past, future = (m.double()[..., None, None] for m in self._slopes(call))
        d = _dense_difference(call, self._where, *self._values(call))
        return -(past * d.clamp(min=0) + future * (-d).clamp(min=0))


def bipe_alibi(slopes: Tensor | int, segments: Tensor, *, factor: float = 96.0) -> Alibi:
    """The inter-segment bias of BiPE, arXiv 2401.16421: b = -factor * m_h * (seg_i - seg_j).

    The intra-segment half of BiPE is an absolute embedding of the input and no matter of attention.

    Args:
        slopes: (H,) or (B, H) float, or the number of heads for the paper's ALiBi slopes.
        segments: 0-based segment index of each token, (N,) or (B, N) integers.
        factor: 96 in the released code.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 4, 8)
    >>> b = fastpe.bias.bipe_alibi(2, torch.tensor([0, 0, 1, 1]))
    >>> fastpe.attention(q, q, q, bias=b, is_causal=True).shape
    torch.Size([1, 2, 4, 8])
    """
    where = "fastpe.bias.bipe_alibi"
    _check.is_integer(where, "segments", segments)
    if isinstance(slopes, int):
        slopes = alibi_slopes(slopes, device=segments.device)
    _check_heads(where, "slopes", slopes)
    return Alibi(_check.number(where, "factor", factor) * slopes, positions=segments)


# ---------------------------------------------------------------------------------------------------------------------
# Functions of the distance


def _causal_distances(n: int, device: torch.device) -> Tensor:
    return torch.arange(n, device=device)


def _two_sided_distances(far: int, device: torch.device) -> Tensor:
    # The kernel's index is j - I, the negative of the distance.
    return -torch.arange(-far, far + 1, device=device)


def _measured(distances: Callable, n: int, device: torch.device, kind: type[_Distance], plain: tuple) -> Tensor:
    return kind._measure(distances(n, device), *plain)


@functools.lru_cache(maxsize=32)
def _kept(inference: bool, *args) -> Tensor:
    return _measured(*args)


def _measure_once(*args) -> Tensor:
    """`_measured`, kept between calls: no tensor of the user's enters. The 14 small ops of T5's buckets took 4 % of a call of
    1024 tokens. Anew where tensors are not plain memory of this process."""
    _, n, device, *_ = args
    if device.type != "cpu" or torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None or n > 1 << 16:
        return _measured(*args)
    return _kept(torch.is_inference_mode_enabled(), *args)


class _Distance(Bias):
    """A bias T[h, I - j]. Subclasses give `_of_distance`, and `_reach` when it is constant from some distance on."""

    _where = "fastpe.bias"

    @staticmethod
    def _measure(d: Tensor, *plain) -> Tensor:
        """What `_of_distance` takes of the int64 distances d = I - j, any shape -> the same shape; the distances themselves."""
        return d

    def _plain(self, dtype: torch.dtype) -> tuple:
        """What `_measure` needs beside the distances: plain hashable values, no tensors."""
        return ()

    def _of_distance(self, call: Call, d: Tensor, dtype: torch.dtype) -> Tensor:
        """The bias at the distances, measured, any shape S -> (H|1, *S) in dtype."""
        raise NotImplementedError

    def _reach(self) -> int | None:
        """A distance, to either side, from which the bias no longer changes."""
        return None

    def _omega(self, call: Call, d: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The multiplicative kernel at the distances d, as `_of_distance`."""
        return None

    def op_args(self, call: Call) -> OpBias:
        reach = self._reach()
        if call.causal:
            distances, n = _causal_distances, torch.sym_max(call.Nk, 1) if reach is None else reach + 1
            form = "table_causal"
        else:
            distances, n = _two_sided_distances, torch.sym_max(torch.sym_max(call.Nq, call.Nk) - 1, 0) if reach is None else reach
            form = "table"
        d = _measure_once(distances, n, call.device, type(self), self._plain(call.dtype))
        omega = self._omega(call, d, call.dtype)
        return OpBias(
            FORMS[form],
            table=self._of_distance(call, d, call.dtype).contiguous(),
            omega=None if omega is None else omega.contiguous(),
        )

    def materialize(self, call: Call) -> Tensor:
        d = self._measure(call.distance(), *self._plain(torch.float64))
        return self._of_distance(call, d, torch.float64)[None]

    def multiplier(self, call: Call) -> Tensor | None:
        omega = self._omega(call, call.distance(), torch.float64)
        return None if omega is None else omega[None]


def _head_vector(call: Call, where: str, what: str, x: Tensor, dtype: torch.dtype, like: Tensor) -> Tensor:
    """(H,) -> (H, 1, ...) for broadcasting against `like`."""
    call.fits(where, what, x.shape, ("heads", call.H))
    _check.on_device(where, what, x, call.device)
    return x.to(dtype).reshape(-1, *(1,) * like.dim())


@_define
class Kerple(_Distance):
    """KERPLE, arXiv 2205.09921, its logarithmic and power kernels.

        log:    b = -p_h log(1 + a_h |I - j|)          (the paper's r1 = p, r2 = a)
        power:  b = -a_h |I - j|^(p_h), 0 on the diagonal  (r1 = a, r2 = p)

    The weighted variant of the paper's code also multiplies the scaled products by omega = exp(-weight_a_h |I - j|^weight_p_h).
    The paper uses it causally. Clamping to the allowed range belongs to the owner of the parameters, `fastpe.nn.KerpleBias`.

    Args:
        p: (H,) float, positive (power: at most 2).
        a: (H,) float, positive.
        kind: "log" or "power".
        weight_p, weight_a: (H,) float, both or neither.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 6, 8)
    >>> b = fastpe.bias.Kerple(torch.tensor([1.0, 0.5]), torch.tensor([0.3, 0.9]))
    >>> fastpe.attention(q, q, q, bias=b, is_causal=True).shape
    torch.Size([1, 2, 6, 8])
    """

    p: Tensor
    a: Tensor
    kind: str = "log"
    weight_p: Tensor | None = None
    weight_a: Tensor | None = None

    _where = "fastpe.bias.Kerple"

    def __post_init__(self):
        if self.kind not in ("log", "power"):
            raise ValueError(f"{self._where}: kind must be 'log' or 'power', got {self.kind!r}")
        if (self.weight_p is None) != (self.weight_a is None):
            raise ValueError(f"{self._where}: weight_p and weight_a go together")
        for what in ("p", "a") if self.weight_p is None else ("p", "a", "weight_p", "weight_a"):
            x = _check.is_float(self._where, what, getattr(self, what))
            if x.dim() != 1:
                raise ValueError(f"{self._where}: {what} must be (H,), got {_check.shape(x)}")

    @staticmethod
    def _measure(d: Tensor, dtype: torch.dtype) -> Tensor:
        return d.to(dtype)

    def _plain(self, dtype: torch.dtype) -> tuple:
        return (dtype,)

    def _omega(self, call: Call, d: Tensor, dtype: torch.dtype) -> Tensor | None:
        if self.weight_p is None:
            return None
        p, a = (_head_vector(call, self._where, what, getattr(self, what), dtype, d) for what in ("weight_p", "weight_a"))
        return torch.exp(_phi("power", d.to(dtype)[None], a, p))

    def _of_distance(self, call: Call, d: Tensor, dtype: torch.dtype) -> Tensor:
        p, a = (_head_vector(call, self._where, what, getattr(self, what), dtype, d) for what in ("p", "a"))
        return _phi("log", d[None], p, a) if self.kind == "log" else _phi("power", d[None], a, p)


@_define
class RelativeTable(_Distance):
    """A bias that is any function of the distance: a learned table, or a callable that makes one.

    Args:
        table: one of
            - (H | 1, 2 R + 1) float, two-sided: b = table[h, clamp(j - I, -R, R) + R];
            - with causal=True (H | 1, L) float: b = table[h, clamp(I - j, 0, L - 1)] (keys after the query, if they are
              visible, take the entry of distance 0);
            - a callable: given int64 distances I - j of shape (n,), returns (H | 1, n) float. It is called once for a call
              of `attention` with the n distances that can occur, so an MLP of the distance costs O(N).
        causal: the table holds distances 0..L-1 only. Not with a callable, which sees the distances needed.
        positions: integer positions p instead of indices: distances are p_i - p_j. (N,), (B, N) or (B, H, N), of the queries, and
            of all Nk tokens when `key_positions` is absent. They have no gradient. For grids see `relative_grid`.
        key_positions: integer positions of the keys.
        max_distance: with positions and a callable, the largest |p_i - p_j|; by default read from the positions.
        clamp: False refuses a tensor that does not hold every distance of the call, instead of clamping to its ends. Which
            keys a mask hides beside causality is not looked at.

    Gradients reach the table, or whatever the callable uses.

    Raises:
        TypeError, ValueError: wrong types or shapes; with clamp=False a table that is too short (the message says which
            range the call needs).

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 6, 8)
    >>> table = torch.nn.Parameter(torch.zeros(2, 2 * 4 + 1))        # constant from distance 4 on
    >>> out = fastpe.attention(q, q, q, bias=fastpe.bias.RelativeTable(table))
    >>> out.sum().backward(); table.grad.shape
    torch.Size([2, 9])
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> b = fastpe.bias.RelativeTable(lambda d: mlp(torch.log1p(d.abs().float())[:, None]).T)
    >>> fastpe.attention(q, q, q, bias=b).shape
    torch.Size([1, 2, 6, 8])
    """

    table: Tensor | Callable[[Tensor], Tensor]
    causal: bool = False
    positions: Tensor | None = None
    key_positions: Tensor | None = None
    max_distance: int | None = None
    clamp: bool = True

    _where = "fastpe.bias.RelativeTable"

    def __post_init__(self):
        _integer_positions(self._where, self.positions, self.key_positions)
        if isinstance(self.table, Tensor):
            _check.is_float(self._where, "table", self.table)
            if self.table.dim() != 2 or self.table.shape[1] < 1:
                raise ValueError(f"{self._where}: table must be (H, entries), got {_check.shape(self.table)}")
            if not self.causal and self.table.shape[1] % 2 == 0:
                raise ValueError(
                    f"{self._where}: a two-sided table has 2 R + 1 entries, got {self.table.shape[1]} (causal=True for one side)"
                )
        elif not callable(self.table):
            raise TypeError(f"{self._where}: table must be a tensor or a callable, got {type(self.table).__name__}")
        elif self.causal:
            raise ValueError(f"{self._where}: causal=True describes a tensor; a callable sees the distances that occur")

    def op_args(self, call: Call) -> OpBias:
        u = w = None
        if self.positions is not None:
            p, keys = _mapped(call, self._where, self.positions, self.key_positions)
            u, w = _shifted(call, p, keys)
        if not isinstance(self.table, Tensor):
            if u is None:
                return super().op_args(call)
            far = _reach_of(self._where, p, keys, self.max_distance)
            d = -torch.arange(-far, far + 1, device=call.device)
            return OpBias(FORMS["table"], table=self._of_distance(call, d, call.dtype).contiguous(), u=u, w=w)
        self._fits(call, self.table)
        if not self.clamp:
            self._holds(call, _reach_of(self._where, p, keys, self.max_distance) if u is not None else None)
        form = FORMS["table_causal" if self.causal else "table"]
        return OpBias(form, table=call.aux(self._where, "table", self.table).contiguous(), u=u, w=w)

    def materialize(self, call: Call) -> Tensor:
        if self.positions is None:
            return super().materialize(call)
        p, keys = _mapped(call, self._where, self.positions, self.key_positions)
        d = p[..., :, None] - keys[..., None, :]  # (B|1, H|1, Nq, Nk)
        # One table row for each head, looked up at that head's distances.
        b = self._of_distance(call, d, torch.float64)  # (H|1, B|1, H|1, Nq, Nk)
        heads = torch.arange(max(b.shape[0], d.shape[1]), device=call.device)
        return b[heads.clamp(max=b.shape[0] - 1), :, heads.clamp(max=d.shape[1] - 1)].transpose(0, 1)

    def _fits(self, call: Call, table: Tensor) -> None:
        if table.shape[0] not in (1, call.H):
            raise ValueError(f"{self._where}: table has {table.shape[0]} heads, the call has {call.H}")

    def _holds(self, call: Call, mapped: int | None) -> None:
        """Raises where a distance of the call is beyond the table's ends; `mapped`: the largest one of position arrays."""
        entries = self.table.shape[1]
        if mapped is not None:
            need = mapped
        else:
            need = max(call.Nk - 1, 0) if call.causal else max(call.Nq - 1, call.Nk - 1, 0)
        has = entries - 1 if self.causal else entries // 2
        if need > has:
            wants = need + 1 if self.causal else 2 * need + 1
            raise ValueError(f"{self._where}: table holds distances up to {has}, the call needs {need}, that is {wants} entries")

    def _of_distance(self, call: Call, d: Tensor, dtype: torch.dtype) -> Tensor:
        if isinstance(self.table, Tensor):
            self._fits(call, self.table)
            entries = self.table.shape[1]
            reach = entries // 2
            index = d.clamp(0, entries - 1) if self.causal else (-d).clamp(-reach, reach) + reach
            return self.table.to(dtype)[:, index]
        table = self.table(d.reshape(-1))
        _check.is_float(self._where, "the callable's result", table)
        if table.dim() != 2 or table.shape[1] != d.numel():
            raise ValueError(
                f"{self._where}: the callable must return (H, {d.numel()}) for {d.numel()} distances, got {_check.shape(table)}"
            )
        self._fits(call, table)
        _check.on_device(self._where, "the callable's result", table, call.device)
        return table.to(dtype).reshape(table.shape[0], *d.shape)


def relative_grid(table: Tensor, coordinates: Tensor, key_coordinates: Tensor | None = None) -> RelativeTable:
    """A learned table over the offsets of a grid, as in Swin (arXiv 2103.14030): b = table[h, dy + R0, dx + R1], (dy, dx) = key - query.

    Args:
        table: (H | 1, 2 R0 + 1, 2 R1 + 1) float.
        coordinates: (N, 2) integers, row and column of each token; of the queries, and of all tokens when
            `key_coordinates` is absent.
        key_coordinates: (Nk, 2) integers.

    Raises:
        ValueError: coordinates whose differences the table does not hold; the message says which range it needs.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 12, 8)
    >>> grid = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    >>> table = torch.zeros(2, 5, 7, requires_grad=True)
    >>> fastpe.attention(q, q, q, bias=fastpe.bias.relative_grid(table, grid)).sum().backward(); table.grad.shape
    torch.Size([2, 5, 7])
    """
    where = "fastpe.bias.relative_grid"
    _check.is_float(where, "table", table)
    if table.dim() != 3 or table.shape[1] % 2 == 0 or table.shape[2] % 2 == 0:
        raise ValueError(f"{where}: table must be (H, 2 R0 + 1, 2 R1 + 1), got {_check.shape(table)}")
    keys = coordinates if key_coordinates is None else key_coordinates
    for what, x in (("coordinates", coordinates), ("key_coordinates", keys)):
        _check.is_integer(where, what, x)
        if x.dim() != 2 or x.shape[1] != 2:
            raise ValueError(f"{where}: {what} must be (N, 2), got {_check.shape(x)}")
    if coordinates.numel() and keys.numel() and _check.can_read(coordinates) and _check.can_read(keys):
        for axis in range(2):
            a, b = coordinates[:, axis], keys[:, axis]
            need = max(int(a.max() - b.min()), int(b.max() - a.min()))
            if need > table.shape[1 + axis] // 2:
                raise ValueError(
                    f"{where}: table holds offsets up to {table.shape[1 + axis] // 2} along axis {axis}, the coordinates need "
                    f"{need}, that is {2 * need + 1} entries"
                )
    step = torch.tensor([table.shape[2], 1], device=coordinates.device)
    given = None if key_coordinates is None else (keys.long() * step).sum(1)
    return RelativeTable(table.flatten(1), positions=(coordinates.long() * step).sum(1), key_positions=given)


def t5_bucket(relative: Tensor, *, bidirectional: bool = True, num_buckets: int = 32, max_distance: int = 128) -> Tensor:
    """The bucket of a relative offset j - I, arXiv 1910.10683: exact when near, logarithmic up to max_distance, then one.

    The logarithm is float32, as in the released models.

    Args:
        relative: int64 offsets, key minus query, any shape.
        bidirectional: half of the buckets for keys after the query; else those share bucket 0.
        num_buckets: 32 in T5; even when bidirectional.
        max_distance: 128 in T5; offsets at least this far share the last bucket.

    Returns:
        int64, shape of relative.

    >>> import torch, fastpe
    >>> fastpe.bias.t5_bucket(torch.tensor([-128, -20, -3, 0, 3]))
    tensor([15, 10,  3,  0, 19])
    """
    where = "fastpe.bias.t5_bucket"
    _check.is_integer(where, "relative", relative)
    _check_buckets(where, bidirectional, num_buckets, max_distance)
    if bidirectional:
        buckets = num_buckets // 2
        offset = torch.where(relative > 0, buckets, 0)
        n = relative.abs()
    else:
        buckets = num_buckets
        offset = torch.zeros_like(relative)
        n = (-relative).clamp(min=0)
    exact = buckets // 2
    # Distances below `exact` never use the logarithm; 1 keeps it finite there.
    ratio = torch.log(n.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return offset + torch.where(n < exact, n, far)


def _check_buckets(where: str, bidirectional: bool, num_buckets: int, max_distance: int) -> None:
    _check.count(where, "num_buckets", num_buckets, 4 if bidirectional else 2)
    if bidirectional and num_buckets % 2:
        raise ValueError(f"{where}: num_buckets must be even when bidirectional, got {num_buckets}")
    exact = num_buckets // (4 if bidirectional else 2)
    _check.count(where, "max_distance", max_distance, exact + 1)


@_define
class T5(_Distance):
    """T5's bucketed relative bias, arXiv 1910.10683: b = factor * table[bucket(j - I), h].

    T5 itself calls attention with scale=1 (its initialisation holds the 1/sqrt(D)); GPT-NeoX and the KERPLE code use
    factor = sqrt(D) with the usual scale.

    Args:
        table: (num_buckets, H) float, shared by T5's layers.
        bidirectional: True for encoders, False for decoders.
        max_distance: 128 in T5.
        factor: multiplies the table.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 6, 8)
    >>> table = torch.nn.Parameter(torch.randn(32, 2))
    >>> out = fastpe.attention(q, q, q, bias=fastpe.bias.T5(table), scale=1.0)
    >>> out.sum().backward(); table.grad.shape
    torch.Size([32, 2])
    """

    table: Tensor
    bidirectional: bool = True
    max_distance: int = 128
    factor: float = 1.0

    _where = "fastpe.bias.T5"

    def __post_init__(self):
        _check.is_float(self._where, "table", self.table)
        if self.table.dim() != 2:
            raise ValueError(f"{self._where}: table must be (num_buckets, H), got {_check.shape(self.table)}")
        _check_buckets(self._where, self.bidirectional, self.table.shape[0], self.max_distance)
        _check.number(self._where, "factor", self.factor)

    def _reach(self) -> int:
        return self.max_distance

    @staticmethod
    def _measure(d: Tensor, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
        return t5_bucket(-d, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance)

    def _plain(self, dtype: torch.dtype) -> tuple:
        return self.bidirectional, self.table.shape[0], self.max_distance

    def _of_distance(self, call: Call, d: Tensor, dtype: torch.dtype) -> Tensor:
        _check.on_device(self._where, "table", self.table, call.device)
        if self.table.shape[1] not in (1, call.H):
            raise ValueError(f"{self._where}: table has {self.table.shape[1]} heads, the call has {call.H}")
        table = self.table.to(dtype)
        if self.factor != 1.0:
            table = self.factor * table
        return table.t()[:, d]


@_define
class Sandwich(_Distance):
    """Sandwich, arXiv 2212.10356: b = f_h * sum_{t < dim / 2} cos((I - j) / 10000^(2 t / dim)), no parameters.

    Args:
        factors: f, (H,) float; or the number of heads, for the published f_h = H / (8 (h + 1)).
        dim: 128 in the paper; even.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 6, 8)
    >>> fastpe.attention(q, q, q, bias=fastpe.bias.Sandwich(2), is_causal=True).shape
    torch.Size([1, 2, 6, 8])
    """

    factors: Tensor | int
    dim: int = 128

    _where = "fastpe.bias.Sandwich"

    def __post_init__(self):
        if isinstance(self.factors, int):
            _check.count(self._where, "factors", self.factors, 1)
        else:
            _check.is_float(self._where, "factors", self.factors)
            if self.factors.dim() != 1:
                raise ValueError(f"{self._where}: factors must be (H,), got {_check.shape(self.factors)}")
        _check.count(self._where, "dim", self.dim, 2)
        if self.dim % 2:
            raise ValueError(f"{self._where}: dim must be even, got {self.dim}")

    def _of_distance(self, call: Call, d: Tensor, dtype: torch.dtype) -> Tensor:
        f = self.factors
        if isinstance(f, int):
            f = f / (8 * torch.arange(1, f + 1, dtype=torch.float64, device=call.device))
        f = _head_vector(call, self._where, "factors", f, torch.float64, d)
        total = torch.zeros(d.shape, dtype=torch.float64, device=call.device)
        # One term at a time: a dense (N, dim / 2) table of cosines is never needed.
        for t in range(self.dim // 2):
            total = total + torch.cos(d.double() * 10000.0 ** (-2 * t / self.dim))
        return (f * total[None]).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Prefix sums


def _as_prefix(where: str, what: str, x: Prefix | Tensor) -> None:
    if not isinstance(x, Prefix):
        _check.is_float(where, what, x)
    if len(x.shape) != 3:
        raise ValueError(f"{where}: {what} must be (B, H, N), got {tuple(x.shape)}")


class _Cumulative(Bias):
    """A bias on differences of one prefix sum."""

    _where = "fastpe.bias"
    _field = "prefix"

    def _prefix(self) -> Prefix:
        x = getattr(self, self._field)
        return x if isinstance(x, Prefix) else prefix_sum(x)


@_define
class Cable(_Cumulative):
    """Context-aware biases, arXiv 2503.08067: b = g_i (c_I - c_j), c the prefix sum of per-token increments <= 0.

    Version 1 takes increments -softplus(h) and no weight; the published version takes -relu(h) and g = softplus(h'):
    `fastpe.nn.CableBias` owns the two projections.

    Args:
        prefix: c, a `Prefix` of shape (B, H, Nk); or the increments themselves, (B, H, Nk) float.
        row_weight: g, (B, H, Nk) or (B, H, Nq) float. Default 1.
        bidirectional: b = -g_i |c_I - c_j| instead, for encoders.

    Gradients reach the increments and the weight. Nq <= Nk: the queries are the last keys.

    >>> import torch, fastpe
    >>> q, h = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, requires_grad=True)
    >>> b = fastpe.bias.Cable(-torch.relu(h), row_weight=torch.nn.functional.softplus(h))
    >>> fastpe.attention(q, q, q, bias=b, is_causal=True).sum().backward(); h.grad.shape
    torch.Size([1, 2, 6])
    """

    prefix: Prefix | Tensor
    row_weight: Tensor | None = None
    bidirectional: bool = False

    _where = "fastpe.bias.Cable"

    def __post_init__(self):
        _as_prefix(self._where, "prefix", self.prefix)
        if self.row_weight is not None:
            _check.is_float(self._where, "row_weight", self.row_weight)
            _check_tokens(self._where, "row_weight", self.row_weight)

    def op_args(self, call: Call) -> OpBias:
        kind = "abs" if self.bidirectional else "signed"
        return _relative(call, self._where, kind, None, None, self._prefix(), self.row_weight, ("", self._field))

    def materialize(self, call: Call) -> Tensor:
        d = _dense_difference(call, self._where, None, _dense_prefix(self.prefix))
        b = -d.abs() if self.bidirectional else d
        if self.row_weight is not None:
            b = _last_rows(call, self._where, "row_weight", _tokens(self.row_weight)).double()[..., None] * b
        return b


def _dense_prefix(x: Prefix | Tensor) -> Tensor:
    """c in float64, from the terms by torch alone."""
    return x.values() if isinstance(x, Prefix) else x.double().cumsum(-1)


def _check_blocks(where: str, sizes: Sequence[int], heads: int) -> None:
    if len(sizes) != heads:
        raise ValueError(f"{where}: block_sizes must hold one length for each of {heads} heads, got {len(sizes)}")
    for size in sizes:
        _check.count(where, "block_sizes", size, 1)


def block_means(prefix: Prefix | Tensor, sizes: Sequence[int]) -> Tensor:
    """Means of a prefix sum over blocks of tokens, each given to the block after it: a variant of K-CABLE (arXiv 2503.08067).

    Tokens of the first block get 0; those of an incomplete last block keep c itself. So no token sees a later one.

    Args:
        prefix: c, a `Prefix` or a float tensor, (B, H, N).
        sizes: tokens of a block, one number for each head; the released code takes int(2^(h / 2)) for head h.

    Returns:
        (B, H, N) float64, differentiable.

    >>> import torch, fastpe
    >>> fastpe.bias.block_means(torch.arange(7.0)[None, None], [2])
    tensor([[[0.0000, 0.0000, 0.5000, 0.5000, 2.5000, 2.5000, 6.0000]]], dtype=torch.float64)
    """
    where = "fastpe.bias.block_means"
    _as_prefix(where, "prefix", prefix)
    _check_blocks(where, sizes, prefix.shape[1])
    c = prefix.values() if isinstance(prefix, Prefix) else prefix.double()
    heads = []
    for row, size in zip(c.unbind(1), sizes):
        whole = row.shape[-1] // size
        means = row[:, : whole * size].unflatten(-1, (whole, size)).mean(-1)
        shifted = torch.cat([torch.zeros_like(means[:, :1]), means[:, :-1]], -1)[:, :whole]
        heads.append(torch.cat([shifted.repeat_interleave(size, -1), row[:, whole * size :]], -1))
    return torch.stack(heads, 1)


@_define
class KernelCable(_Cumulative):
    """The kernel variant of Cable, arXiv 2503.08067: b = -g_i log(1 + (c_I - c_j)^2).

    Args:
        prefix: c, a `Prefix` of shape (B, H, Nk); or the increments, (B, H, Nk) float.
        row_weight: g, (B, H, Nk) or (B, H, Nq) float. Default 1.
        block_sizes: one length for each head: c is replaced by `block_means(c, block_sizes)`, a variant of that code, whose
            lengths are int(2^(h / 2)).

    >>> import torch, fastpe
    >>> q, h = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6)
    >>> b = fastpe.bias.KernelCable(-torch.nn.functional.softplus(h))
    >>> fastpe.attention(q, q, q, bias=b, is_causal=True).shape
    torch.Size([1, 2, 6, 8])
    >>> blocks = fastpe.bias.KernelCable(-torch.nn.functional.softplus(h), block_sizes=[int(2 ** (h / 2)) for h in range(2)])
    >>> fastpe.attention(q, q, q, bias=blocks, is_causal=True).shape
    torch.Size([1, 2, 6, 8])
    """

    prefix: Prefix | Tensor
    row_weight: Tensor | None = None
    block_sizes: Sequence[int] | None = None

    _where = "fastpe.bias.KernelCable"

    def __post_init__(self):
        _as_prefix(self._where, "prefix", self.prefix)
        if self.row_weight is not None:
            _check.is_float(self._where, "row_weight", self.row_weight)
            _check_tokens(self._where, "row_weight", self.row_weight)
        if self.block_sizes is not None:
            _check_blocks(self._where, self.block_sizes, self.prefix.shape[1])

    def op_args(self, call: Call) -> OpBias:
        c = self._prefix()
        if self.block_sizes is not None:
            c = block_means(c, self.block_sizes)
        return _relative(call, self._where, "logsq", None, None, c, self.row_weight, ("", self._field))

    def materialize(self, call: Call) -> Tensor:
        c = _dense_prefix(self.prefix)
        if self.block_sizes is not None:
            c = block_means(c, self.block_sizes)
        d = _dense_difference(call, self._where, None, c)
        b = -torch.log(1 + d * d)
        if self.row_weight is not None:
            b = _last_rows(call, self._where, "row_weight", _tokens(self.row_weight)).double()[..., None] * b
        return b


@_define
class Forget(_Cumulative):
    """The forgetting gates of FoX, arXiv 2503.02130: b = L_I - L_j, L the prefix sum of log f. Causal, or with gates for each side.

    Args:
        log_gates: log f <= 0 of each token, (B, H, Nk) float, float32 even under autocast; or their `Prefix`.
        seq_start: first token of each row when batches are padded on the left, (B,) integers: gates before it do not
            count. The padded keys themselves are hidden by `fastpe.mask.padding`. Not with a Prefix.
        future_log_gates: log f of the keys after the query, as log_gates: b = R_j - R_I for j > I, R their prefix sum
            (x-transformers' bidirectional data-dependent ALiBi). Default: keys after the query are to be hidden.

    >>> import torch, fastpe
    >>> q, z = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, requires_grad=True)
    >>> b = fastpe.bias.Forget(torch.nn.functional.logsigmoid(z))
    >>> fastpe.attention(q, q, q, bias=b, is_causal=True).sum().backward(); z.grad.shape
    torch.Size([1, 2, 6])
    >>> both = fastpe.bias.Forget(torch.full((1, 2, 6), -0.1), future_log_gates=torch.full((1, 2, 6), -0.5))
    >>> fastpe.attention(q, q, q, bias=both).shape
    torch.Size([1, 2, 6, 8])
    """

    log_gates: Prefix | Tensor
    seq_start: Tensor | None = None
    future_log_gates: Prefix | Tensor | None = None

    _where = "fastpe.bias.Forget"
    _field = "log_gates"

    def __post_init__(self):
        _as_prefix(self._where, "log_gates", self.log_gates)
        if self.future_log_gates is not None:
            _as_prefix(self._where, "future_log_gates", self.future_log_gates)
            if tuple(self.future_log_gates.shape) != tuple(self.log_gates.shape):
                raise ValueError(
                    f"{self._where}: future_log_gates must have log_gates' shape {tuple(self.log_gates.shape)}, "
                    f"got {tuple(self.future_log_gates.shape)}"
                )
            if self.seq_start is not None and isinstance(self.future_log_gates, Prefix):
                raise ValueError(f"{self._where}: seq_start changes the gates before they are summed; give future_log_gates, not a Prefix")
        if self.seq_start is not None:
            _check.is_integer(self._where, "seq_start", self.seq_start)
            if isinstance(self.log_gates, Prefix):
                raise ValueError(f"{self._where}: seq_start changes the gates before they are summed; give log_gates, not a Prefix")
            if self.seq_start.dim() != 1 or self.seq_start.shape[0] != self.log_gates.shape[0]:
                raise ValueError(
                    f"{self._where}: seq_start must be (B,) with B = {self.log_gates.shape[0]}, got {_check.shape(self.seq_start)}"
                )

    def _gates(self, x: Prefix | Tensor) -> Prefix | Tensor:
        if self.seq_start is None:
            return x
        before = torch.arange(x.shape[-1], device=x.device) < self.seq_start[:, None, None]
        return torch.where(before, torch.zeros_like(x), x)

    def op_args(self, call: Call) -> OpBias:
        sides = []
        for what in ("log_gates", "future_log_gates"):
            x = getattr(self, what)
            if x is not None:
                x = self._gates(x)
                c = x if isinstance(x, Prefix) else prefix_sum(x)
                sides.append(_relative(call, self._where, "signed", None, None, c, None, ("", what)))
        if len(sides) == 1:
            return sides[0]
        w, base = (torch.cat([getattr(side, what).expand(-1, call.H, -1) for side in sides], 1) for what in ("w", "base"))
        return OpBias(FORMS["two_sided"], w=w, base=base)

    def materialize(self, call: Call) -> Tensor:
        past = _dense_difference(call, self._where, None, _dense_prefix(self._gates(self.log_gates)))
        if self.future_log_gates is None:
            return past
        future = _dense_difference(call, self._where, None, _dense_prefix(self._gates(self.future_log_gates)))
        return torch.where(call.distance() >= 0, past, -future)


# ---------------------------------------------------------------------------------------------------------------------
# FIRE


def _integer_positions(where: str, positions: Tensor | None, key_positions: Tensor | None) -> None:
    """Position maps are whole numbers and have no gradient."""
    for what, x in (("positions", positions), ("key_positions", key_positions)):
        if x is not None:
            if isinstance(x, Tensor) and x.requires_grad:
                raise TypeError(
                    f"{where}: {what} must hold integers and have no gradient, got {_check.name(x.dtype)} that requires grad; "
                    "fastpe.bias.RelativeFn learns positions"
                )
            _check.is_integer(where, what, x)
            _check_tokens(where, what, x)
    if positions is None and key_positions is not None:
        raise ValueError(f"{where}: key_positions without positions")


def _mapped(call: Call, where: str, positions: Tensor, key_positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Integer positions of queries (B|1, H|1, Nq) and keys (B|1, H|1, Nk), int64."""
    if key_positions is None:
        _needs_query_index(call, where)
        w = _tokens(positions)
        _fit_tokens(call, where, "positions", w, call.Nk, "keys")
        u = w[..., call.Nk - call.Nq :]
    else:
        u, w = _tokens(positions), _tokens(key_positions)
        _fit_tokens(call, where, "positions", u, call.Nq, "queries")
        _fit_tokens(call, where, "key_positions", w, call.Nk, "keys")
    return u.long(), w.long()


def _shifted(call: Call, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The positions relative to the first key's, in the aux dtype: differences stay exact up to 2**24."""
    shift = w[..., :1] if call.Nk > 0 else 0
    return (u - shift).to(call.dtype).contiguous(), (w - shift).to(call.dtype).contiguous()


def _reach_of(where: str, u: Tensor, w: Tensor, given: int | None) -> int:
    """The largest |u - w|, read from the values unless it is given."""
    if given is not None:
        return given
    if not (_check.can_read(u) and _check.can_read(w)):
        raise ValueError(f"{where}: max_distance is needed where the values of positions cannot be read, as under torch.compile")
    if u.numel() == 0 or w.numel() == 0:
        return 0
    return max(int(u.max() - w.min()), int(w.max() - u.min()), 0)


@_define
class Fire(Bias):
    """FIRE, arXiv 2310.04418: a small network of the distance, normalised by the query's position.

        x_ij = log(|c (p_i - p_j)| + 1) / (log(|c| max(p_i, L) + 1) + eps)
        b_hij = b2_h + sum_k w2_hk relu(w1_k x_ij + b1_k)

    The network is evaluated exactly, as the piecewise linear function that it is: a few comparisons near the diagonal, one
    multiply-add elsewhere, whatever its width.

    Args:
        w1, b1: (W,) float, the first layer; (W, 1) is taken too.
        w2, b2: (H, W) and (H,) float, the second layer.
        c: float tensor of one element.
        L: threshold, a number or a float tensor of one element (L_mult * L0 in the released code; its absolute value counts).
        eps: 1e-6 in the released code.
        positions: p, integers (N,), (B, N) or (B, H, N), sorted or not; of the queries, and of all Nk tokens when
            `key_positions` is absent. Default: indices, 0-based. For training on random positions (`fastpe.positions.randomized`).
        key_positions: positions of the keys.
        max_distance: the largest |p_i - p_j| that can occur; by default read from the positions.

    Gradients reach w1, b1, w2, b2, c and L. Not causal by itself.

    Raises:
        TypeError, ValueError: wrong types or shapes; positions that are not integers.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 6, 8)
    >>> w1, b1, w2, b2 = torch.randn(32), torch.randn(32), torch.randn(2, 32), torch.zeros(2)
    >>> b = fastpe.bias.Fire(w1, b1, w2.requires_grad_(), b2, c=torch.tensor(0.1), L=512.0)
    >>> fastpe.attention(q, q, q, bias=b, is_causal=True).sum().backward(); w2.grad.shape
    torch.Size([2, 32])
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    c: Tensor
    L: Tensor | float
    eps: float = 1e-6
    positions: Tensor | None = None
    key_positions: Tensor | None = None
    max_distance: int | None = None

    _where = "fastpe.bias.Fire"

    def __post_init__(self):
        where = self._where
        for what in ("w1", "b1", "w2", "b2", "c"):
            _check.is_float(where, what, getattr(self, what))
        if isinstance(self.L, Tensor):
            _check.is_float(where, "L", self.L)
        else:
            _check.number(where, "L", self.L)
        for what in ("c", "L"):
            x = getattr(self, what)
            if isinstance(x, Tensor) and x.numel() != 1:
                raise ValueError(f"{where}: {what} must have one element, got {_check.shape(x)}")
        width = self.b1.shape[0] if self.b1.dim() == 1 else -1
        shapes = {"w1": ((width,), (width, 1)), "b1": ((width,),), "b2": ((self.b2.numel(),),), "w2": ((self.b2.numel(), width),)}
        for what, allowed in shapes.items():
            if width < 1 or tuple(getattr(self, what).shape) not in allowed:
                got = ", ".join(f"{n} {_check.shape(getattr(self, n))}" for n in ("w1", "b1", "w2", "b2"))
                raise ValueError(f"{where}: w1, b1, w2, b2 must be (W,), (W,), (H, W), (H,), got {got}")
        _check.number(where, "eps", self.eps)
        _integer_positions(where, self.positions, self.key_positions)

    @classmethod
    def from_mlp(cls, mlp: torch.nn.Module, c: Tensor, L: Tensor | float, **kwargs) -> Fire:
        """The bias of Sequential(Linear(1, W), ReLU(), Linear(W, H)); kwargs are those of Fire.

        Raises:
            NotImplementedError: another network, which is not piecewise linear in this form. Its function of the distance
                fits `RelativeTable` where rows need no normaliser, any function at all fits `Dense`.

        >>> import torch, fastpe
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> fastpe.bias.Fire.from_mlp(mlp, torch.tensor(0.1), 512.0).w2.shape
        torch.Size([4, 32])
        """
        parts = list(mlp) if isinstance(mlp, torch.nn.Sequential) else [mlp]
        kinds = [type(part) for part in parts]
        linear = torch.nn.Linear
        if kinds != [linear, torch.nn.ReLU, linear] or parts[0].in_features != 1 or any(x.bias is None for x in (parts[0], parts[2])):
            raise NotImplementedError(
                f"{cls._where}: the network must be Linear(1, W), ReLU, Linear(W, H) with biases, got "
                f"{', '.join(kind.__name__ for kind in kinds)}; use fastpe.bias.RelativeTable or fastpe.bias.Dense for others"
            )
        return cls(parts[0].weight, parts[0].bias, parts[2].weight, parts[2].bias, c, L, **kwargs)

    def _network(self, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        for what in ("w1", "b1", "w2", "b2", "c"):
            _check.on_device(self._where, what, getattr(self, what), call.device)
        if self.b2.shape[0] not in (1, call.H):
            raise ValueError(f"{self._where}: w2 has {self.b2.shape[0]} heads, the call has {call.H}")
        return self.w1.reshape(-1).double(), self.b1.double(), self.w2.double(), self.b2.double()

    def _scalars(self, call: Call) -> tuple[Tensor, Tensor]:
        c = self.c.reshape(()).double().abs()
        if not isinstance(self.L, Tensor):
            return c, torch.full((), abs(float(self.L)), dtype=torch.float64, device=call.device)
        return c, self.L.reshape(()).double().abs()

    def _normaliser(self, call: Call, p: Tensor) -> Tensor:
        """log(|c| max(p, L) + 1) + eps, float64, p's shape."""
        c, threshold = self._scalars(call)
        return torch.log(c * torch.maximum(p.double(), threshold) + 1) + self.eps

    def _pieces(self, call: Call) -> Tensor:
        """(3, H|1, W + 1): where each piece of the network begins, its slope and its intercept."""
        w1, b1, w2, b2 = self._network(call)
        flat = w1 == 0
        at = torch.where(flat, torch.inf, -b1 / torch.where(flat, 1.0, w1)).detach()
        start, order = torch.sort(at)
        rank = torch.argsort(order)
        piece = torch.arange(start.shape[0] + 1, device=call.device)
        # A unit is on beyond its kink when its weight is positive, before it when negative.
        on = torch.where((w1 > 0)[:, None], piece > rank[:, None], piece <= rank[:, None])
        on = torch.where(flat[:, None], (b1 > 0)[:, None], on).double()
        slope = w2 @ (w1[:, None] * on)
        intercept = b2[:, None] + w2 @ (b1[:, None] * on)
        start = torch.cat([start.new_full((1,), -torch.inf), start])
        return torch.stack(torch.broadcast_tensors(start, slope, intercept)).to(call.dtype)

    def op_args(self, call: Call) -> OpBias:
        u = w = None
        if self.positions is None:
            p = call.query_index()[None, None]
            reach = (call.Nk if call.causal else torch.sym_max(call.Nq, call.Nk)) - 1
        else:
            p, keys = _mapped(call, self._where, self.positions, self.key_positions)
            reach = _reach_of(self._where, p, keys, self.max_distance)
            u, w = _shifted(call, p, keys)
        c, _ = self._scalars(call)
        n = torch.arange(torch.sym_max(reach, 0) + 1, device=call.device)
        table = torch.log(c * n + 1).to(call.dtype)[None]
        gamma = (1 / self._normaliser(call, p)).to(call.dtype).contiguous()
        return OpBias(FORMS["fire"], gamma=gamma, u=u, w=w, table=table, pieces=self._pieces(call).contiguous())

    def materialize(self, call: Call) -> Tensor:
        if self.positions is None:
            p, keys = call.query_index()[None, None], call.key_index()[None, None]
        else:
            p, keys = _mapped(call, self._where, self.positions, self.key_positions)
        w1, b1, w2, b2 = self._network(call)
        c, _ = self._scalars(call)
        n = (p[..., :, None] - keys[..., None, :]).abs()
        x = torch.log(c * n + 1) / self._normaliser(call, p)[..., None]
        b = torch.relu(x[..., None] * w1 + b1) @ w2.T + b2
        if x.shape[1] == 1:
            return b[:, 0].movedim(-1, 1)
        index = torch.arange(call.H, device=call.device) if b.shape[-1] > 1 else torch.zeros(call.H, dtype=torch.int64)
        return b.gather(-1, index[None, :, None, None, None].expand(*b.shape[:-1], 1))[..., 0]


# ---------------------------------------------------------------------------------------------------------------------
# One number for each query (or key) and relative offset


class _Indexed(Bias):
    _where = "fastpe.bias"
    _side = "queries"

    def __post_init__(self):
        _check.is_float(self._where, "terms", self.terms)
        if self.terms.dim() != 4 or self.terms.shape[3] < 1:
            raise ValueError(f"{self._where}: terms must be (B, H, {self._side}, R), got {_check.shape(self.terms)}")
        if self.index is None and self.terms.shape[3] % 2 == 0:
            raise ValueError(
                f"{self._where}: without index, terms hold 2 M + 1 offsets, got R = {self.terms.shape[3]}; give index for another order"
            )
        if self.index is not None and not callable(self.index):
            raise TypeError(f"{self._where}: index must be a callable of the distance, got {type(self.index).__name__}")

    def _terms(self, call: Call) -> Tensor:
        n = call.Nq if self._side == "queries" else call.Nk
        x, entries = self.terms, self.terms.shape[3]
        axes = ("batch entries", call.B), ("heads", call.H), (self._side, n)
        call.fits(self._where, "terms", x.shape[:3], *axes)
        return call.aux(self._where, "terms", x).expand(call.B, call.H, n, entries)

    def _entries(self) -> int:
        return self.terms.shape[3]

    def _entry(self, d: Tensor) -> Tensor:
        """The entry of distances I - j; negative: none."""
        entries = self._entries()
        if self.index is None:
            return d.clamp(-(entries // 2), entries // 2) + entries // 2
        e = self.index(d.reshape(-1))
        _check.is_integer(self._where, "the result of index", e)
        if e.shape != (d.numel(),):
            raise ValueError(f"{self._where}: index must return ({d.numel()},) for {d.numel()} distances, got {_check.shape(e)}")
        if e.numel() and _check.can_read(e) and int(e.max()) >= entries:
            raise ValueError(f"{self._where}: index returns {int(e.max())}, terms have {entries} entries")
        return e.reshape(d.shape)

    def _lut(self, call: Call) -> Tensor:
        far = torch.sym_max(torch.sym_max(call.Nq, call.Nk) - 1, 0)
        return self._entry(-torch.arange(-far, far + 1, device=call.device)).to(torch.int32)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


@_define
class RowTable(_Indexed):
    """b_ij = terms[i, entry(I - j)]: every query brings one number for each relative offset, usually terms = scale * q E^T.

    For terms that are products with a table of many entries see `RowProduct`, which does not hold them.

    Args:
        terms: (B | 1, H | 1, Nq, R) float.
        index: the entry of a distance: a callable of int64 distances I - j (n,) that returns integers (n,) below R; negative
            adds nothing. Default: clamp(I - j, -M, M) + M with R = 2 M + 1.

    Memory is Nq * R numbers for each head: linear for clipped or bucketed tables.

    >>> import torch, fastpe
    >>> q, table = torch.randn(1, 2, 6, 8), torch.randn(2 * 3 + 1, 8, requires_grad=True)
    >>> b = fastpe.bias.RowTable(8**-0.5 * q @ table.T)
    >>> fastpe.attention(q, q, q, bias=b).sum().backward(); table.grad.shape
    torch.Size([7, 8])
    """

    terms: Tensor
    index: Callable[[Tensor], Tensor] | None = None

    _where = "fastpe.bias.RowTable"

    def op_args(self, call: Call) -> OpBias:
        return OpBias(rows=_last_contiguous(self._terms(call)), index=self._lut(call))

    def materialize(self, call: Call) -> Tensor:
        e = self._entry(call.distance())
        b = self._terms(call).double().gather(3, e.clamp(min=0).expand(call.B, call.H, *e.shape))
        return torch.where(e < 0, 0.0, b)


@_define
class ColTable(_Indexed):
    """b_ij = terms[j, entry(I - j)]: every key brings one number for each relative offset, usually terms = scale * k F^T.

    Args:
        terms: (B | 1, H | 1, Nk, R) float, by query head.
        index: as in `RowTable`; both in one call must have the same R and index.

    >>> import torch, fastpe
    >>> q, k, table = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(7, 8)
    >>> b = fastpe.bias.RowTable(q @ table.T) + fastpe.bias.ColTable(k @ table.T)
    >>> fastpe.attention(q, k, k, bias=b).shape
    torch.Size([1, 2, 6, 8])
    """

    terms: Tensor
    index: Callable[[Tensor], Tensor] | None = None

    _where = "fastpe.bias.ColTable"
    _side = "keys"

    def op_args(self, call: Call) -> OpBias:
        return OpBias(cols=_last_contiguous(self._terms(call)), index=self._lut(call))

    def materialize(self, call: Call) -> Tensor:
        e = self._entry(call.distance()).T
        b = self._terms(call).double().gather(3, e.clamp(min=0).expand(call.B, call.H, *e.shape))
        return torch.where(e < 0, 0.0, b).transpose(2, 3)


class _Product(_Indexed):
    """<vectors of a token, entry of a table>. `terms` is what a table of all entries would hold: its shape alone is asked."""

    def __post_init__(self):
        where = self._where
        for what in ("vectors", "table"):
            _check.is_float(where, what, getattr(self, what))
        x, e = self.vectors, self.table
        if x.dim() != 4 or e.dim() not in (2, 3) or x.shape[3] != e.shape[-1] or e.shape[-2] < 1:
            raise ValueError(
                f"{where}: vectors must be (B, H, {self._side}, d) and table (R, d) or (H, R, d), got {_check.shape(x)} and {_check.shape(e)}"
            )
        if not 1 <= x.shape[3] <= 256:
            raise ValueError(f"{where}: vectors must have 1 to 256 channels, got {x.shape[3]}")
        if self.index is None and e.shape[-2] % 2 == 0:
            raise ValueError(f"{where}: without index, table holds 2 M + 1 offsets, got R = {e.shape[-2]}; give index for another order")
        if self.index is not None and not callable(self.index):
            raise TypeError(f"{where}: index must be a callable of the distance, got {type(self.index).__name__}")

    def _entries(self) -> int:
        return self.table.shape[-2]

    def _operands(self, call: Call) -> tuple[Tensor, Tensor]:
        """vectors (B|1, H|1, N, d) and table (H|1, R, d) in the aux dtype."""
        n = call.Nq if self._side == "queries" else call.Nk
        x, e = self.vectors, self.table
        call.fits(self._where, "vectors", x.shape[:3], ("batch entries", call.B), ("heads", call.H), (self._side, n))
        if x.shape[2] != n:
            raise ValueError(f"{self._where}: vectors has {x.shape[2]} {self._side}, the call has {n}")
        e = e if e.dim() == 3 else e[None]
        call.fits(self._where, "table", e.shape[:1], ("heads", call.H))
        x, e = call.aux(self._where, "vectors", x), call.aux(self._where, "table", e)
        # Gradients come for every head; torch sums those of a broadcast axis.
        # A stride of 0 tells the kernels that all heads share a table of one.
        own = e.stride(2) == 1 and (e.shape[0] == 1 or e.stride(0) != 0)
        return _last_contiguous(x.expand(call.B, call.H, *x.shape[2:])), (e if own else e.contiguous())

    def _terms(self, call: Call) -> Tensor:
        x, e = self._operands(call)
        return x.double() @ e.double().transpose(-1, -2)


@_define
class RowProduct(_Product):
    """b_ij = <vectors_i, table[entry(I - j)]>: a `RowTable` of vectors table^T that is never held.

    The kernels form the products of a tile with the entries that the tile's offsets need, forward and backward, so memory
    is linear however many entries the table has. Serves Shaw's relative keys, Transformer-XL, DeBERTa.

    Args:
        vectors: (B | 1, H | 1, Nq, d) float, usually scale * query; d up to 256.
        table: (R, d) or (H, R, d) float.
        index: the entry of a distance, as in `RowTable`. Default: clamp(I - j, -M, M) + M with R = 2 M + 1.

    Gradients reach vectors and table.

    >>> import torch, fastpe
    >>> q, table = torch.randn(1, 2, 6, 8), torch.randn(11, 8, requires_grad=True)
    >>> b = fastpe.bias.RowProduct(8**-0.5 * q, table)
    >>> fastpe.attention(q, q, q, bias=b).sum().backward(); table.grad.shape
    torch.Size([11, 8])
    """

    vectors: Tensor
    table: Tensor
    index: Callable[[Tensor], Tensor] | None = None

    _where = "fastpe.bias.RowProduct"

    def op_args(self, call: Call) -> OpBias:
        x, e = self._operands(call)
        return OpBias(row_q=x, row_e=e, index=self._lut(call))

    materialize = RowTable.materialize


@_define
class ColProduct(_Product):
    """b_ij = <vectors_j, table[entry(I - j)]>: a `ColTable` of vectors table^T that is never held; see `RowProduct`.

    Args:
        vectors: (B | 1, H | 1, Nk, d) float, usually scale * key by query head.
        table: (R, d) or (H, R, d) float. R, d and index are those of a RowProduct in the same call.
        index: as in `RowProduct`.

    >>> import torch, fastpe
    >>> q, k, table = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(11, 8)
    >>> b = fastpe.bias.RowProduct(q, table) + fastpe.bias.ColProduct(k, table)
    >>> fastpe.attention(q, k, k, bias=b).shape
    torch.Size([1, 2, 6, 8])
    """

    vectors: Tensor
    table: Tensor
    index: Callable[[Tensor], Tensor] | None = None

    _where = "fastpe.bias.ColProduct"
    _side = "keys"

    def op_args(self, call: Call) -> OpBias:
        x, e = self._operands(call)
        return OpBias(col_k=x, col_e=e, index=self._lut(call))

    materialize = ColTable.materialize


def _wide(x: Tensor) -> Tensor:
    """Half precision to float32: terms are float32 in the kernel."""
    return x if x.dtype == torch.float64 else x.float()


def _scale_of(x: Tensor, scale: float | None) -> float:
    return x.shape[-1] ** -0.5 if scale is None else scale


def _query_heads(query: Tensor, key: Tensor) -> Tensor:
    return _wide(key).repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def relative_key(query: Tensor, table: Tensor, *, key: Tensor | None = None, scale: float | None = None) -> Bias:
    """Relative keys of Shaw et al., arXiv 1803.02155: b = scale * q_i . E[I - j], distances clipped to the table.

    Args:
        query: (B, H, Nq, D), what is given to attention.
        table: E, (2 M + 1, D) float, entry M at distance 0.
        key: with it also + scale * k_j . E[I - j], method 4 of arXiv 2009.13658 ("relative_key_query").
        scale: default 1 / sqrt(D), as in attention.

    The value term of the original paper is no bias and not part of this.

    >>> import torch, fastpe
    >>> q, table = torch.randn(1, 2, 6, 8), torch.randn(11, 8)
    >>> fastpe.attention(q, q, q, bias=fastpe.bias.relative_key(q, table, key=q)).shape
    torch.Size([1, 2, 6, 8])
    """
    scale, table = _scale_of(query, scale), _wide(table)
    rows = RowProduct(scale * _wide(query), table)
    return rows if key is None else rows + ColProduct(scale * _query_heads(query, key), table)


def _causal_entry(entries: int) -> Callable[[Tensor], Tensor]:
    def entry(d: Tensor) -> Tensor:
        return torch.where((d >= 0) & (d < entries), d, -1)

    return entry


def transformer_xl(
    query: Tensor, key: Tensor, r: Tensor, content_bias: Tensor, position_bias: Tensor, *, scale: float | None = None
) -> Bias:
    """Transformer-XL, arXiv 1901.02860: scale * (u_h . k_j + (q_i + v_h) . r_{h, I - j}) beside scale * q_i . k_j. Causal.

    Args:
        query, key: (B, H, Nq, D), (B, Hk, Nk, D), what is given to attention.
        r: projected sinusoids of the distances 0, 1, ..., (T, H, D) with T at least Nk.
        content_bias, position_bias: u and v, (H, D).
        scale: default 1 / sqrt(D).

    >>> import torch, fastpe
    >>> q, r, u = torch.randn(1, 2, 6, 8), torch.randn(6, 2, 8), torch.zeros(2, 8)
    >>> fastpe.attention(q, q, q, bias=fastpe.bias.transformer_xl(q, q, r, u, u), is_causal=True).shape
    torch.Size([1, 2, 6, 8])
    """
    scale = _scale_of(query, scale)
    if r.shape[0] < key.shape[2]:
        raise ValueError(f"fastpe.bias.transformer_xl: r holds {r.shape[0]} distances, {key.shape[2]} keys need as many")
    rows = scale * (_wide(query) + _wide(position_bias)[:, None])
    by_key = scale * (_query_heads(query, key) * _wide(content_bias)[:, None]).sum(-1)
    return RowProduct(rows, _wide(r).transpose(0, 1), _causal_entry(r.shape[0])) + Dense(by_key[:, :, None])


def deberta_bucket(distance: Tensor, buckets: int = 256, max_distance: int = 512) -> Tensor:
    """The signed bucket of DeBERTa-v2 (arXiv 2006.03654): the distance I - j itself near 0, logarithmic beyond buckets / 2.

    Args:
        distance: integers, any shape.
        buckets, max_distance: `position_buckets` and `max_relative_positions` of the released models.

    >>> import torch, fastpe
    >>> fastpe.bias.deberta_bucket(torch.tensor([-40, -3, 0, 2, 20]), 8, 64)
    tensor([-7, -3,  0,  2,  6])
    """
    mid = buckets // 2
    size = torch.where(distance.abs() < mid, mid - 1, distance.abs())
    far = torch.ceil(torch.log(size.float() / mid) / math.log((max_distance - 1) / mid) * (mid - 1)) + mid
    return torch.where(size <= mid, distance, far.to(distance.dtype) * distance.sign())


def deberta(
    query: Tensor,
    key: Tensor,
    key_table: Tensor,
    query_table: Tensor,
    *,
    buckets: int = 256,
    max_distance: int = 512,
    scale: float | None = None,
) -> Bias:
    """Disentangled attention of DeBERTa-v2, arXiv 2006.03654: scale * (q_i . K[h, e] + k_j . Q[h, e]), e by bucket of I - j.

    Attention itself is called with the same scale.

    Args:
        query, key: (B, H, Nq, D), (B, Hk, Nk, D), what is given to attention.
        key_table, query_table: projected relative embeddings, (H, 2 * buckets, D).
        buckets, max_distance: see `deberta_bucket`.
        scale: default 1 / sqrt(3 D).

    >>> import torch, fastpe
    >>> q, table = torch.randn(1, 2, 6, 8), torch.randn(2, 16, 8)
    >>> b = fastpe.bias.deberta(q, q, table, table, buckets=8, max_distance=64)
    >>> fastpe.attention(q, q, q, bias=b, scale=24**-0.5).shape
    torch.Size([1, 2, 6, 8])
    """
    scale = (3 * query.shape[-1]) ** -0.5 if scale is None else scale

    def entry(d: Tensor) -> Tensor:
        return (deberta_bucket(d, buckets, max_distance) + buckets).clamp(0, 2 * buckets - 1)

    rows = RowProduct(scale * _wide(query), _wide(key_table), entry)
    return rows + ColProduct(scale * _query_heads(query, key), _wide(query_table), entry)


def distance_bank(weights: Tensor, bank: Tensor) -> RowProduct:
    """A row-projected bank of distance curves (x-transformers): b = sum_r weights[i, r] bank[r, I - j] for 0 <= I - j < M, else 0.

    Args:
        weights: (B, H, Nq, R) float.
        bank: (R, M) float.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 6, 8)
    >>> b = fastpe.bias.distance_bank(torch.randn(1, 2, 6, 3), torch.randn(3, 4))
    >>> fastpe.attention(q, q, q, bias=b, is_causal=True).shape
    torch.Size([1, 2, 6, 8])
    """
    return RowProduct(_wide(weights), _wide(bank).T, _causal_entry(bank.shape[1]))


# ---------------------------------------------------------------------------------------------------------------------
# Dense


@_define
class Dense(Bias):
    """An additive tensor: what no other bias can say, at the quadratic memory it costs.

    Args:
        values: (Nq | 1, Nk | 1), (H | 1, Nq | 1, Nk | 1) or (B | 1, H | 1, Nq | 1, Nk | 1) float. (B, H, 1, Nk) is a bias by
            key, linear in memory. -inf hides a pair. Used in float32 (float64 in a float64 call).

    The gradient has the shape of `values`: dS summed over what was broadcast, in a fixed order. Tiles are not skipped under
    the bound in a call with a dense bias. Methods that mix heads, such as DAPE (arXiv 2405.14722), come down to this: the
    scores are made outside, and what is added to scale * <q, k> is given here.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 5, 8)
    >>> x = torch.zeros(2, 5, 5, requires_grad=True)
    >>> fastpe.attention(q, q, q, bias=fastpe.bias.Dense(x) + fastpe.bias.Alibi(2)).sum().backward(); x.grad.shape
    torch.Size([2, 5, 5])
    """

    values: Tensor

    _where = "fastpe.bias.Dense"

    def __post_init__(self):
        _check.is_float(self._where, "values", self.values)
        if self.values.dim() not in (2, 3, 4):
            raise ValueError(
                f"{self._where}: values must be (Nq, Nk), (H, Nq, Nk) or (B, H, Nq, Nk), got {_check.shape(self.values)}"
            )

    def _full(self, call: Call) -> Tensor:
        x = self.values[(None,) * (4 - self.values.dim())]
        axes = ("batch entries", call.B), ("heads", call.H), ("queries", call.Nq), ("keys", call.Nk)
        call.fits(self._where, "values", x.shape, *axes)
        _check.on_device(self._where, "values", x, call.device)
        return x

    def op_args(self, call: Call) -> OpBias:
        x = self._full(call).to(call.dtype)
        if x.requires_grad or x.stride(3) != 1:
            x = x.contiguous()
        return OpBias(dense=x)

    def materialize(self, call: Call) -> Tensor:
        return self._full(call).double()


# ---------------------------------------------------------------------------------------------------------------------
# Counting gates

from ._cope import Contextual, Cope, PerRowForget  # noqa: E402, F401  (after the base class they build on)
from ._segment_bias import SegmentPairs  # noqa: E402, F401
