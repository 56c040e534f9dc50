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
import math
from collections.abc import Callable

import torch

from . import _check
from ._call import Call, OpBias
from ._load import _C
from .prefix import BLOCK, Prefix, prefix_sum

Tensor = torch.Tensor

# Name -> id, from csrc/pos/bias_forms.def.
FORMS = {form.rstrip("_"): number for form, (number, _) in _C.bias_forms().items()}


class Bias:
    """Base of every bias object."""

    def op_args(self, call: Call) -> OpBias:
        """The kernel arguments for one call."""
        raise NotImplementedError

    def materialize(self, call: Call) -> Tensor:
        """The dense definition: float64, broadcastable to (B, H, Nq, Nk). Differentiable; quadratic memory."""
        raise NotImplementedError

    def __repr__(self) -> str:
        def show(x: object) -> str:
            if isinstance(x, Tensor):
                return f"tensor{tuple(x.shape)}" + (" with grad" if x.requires_grad else "")
            return getattr(x, "__name__", repr(x)) if callable(x) else repr(x)

        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        parts = [f"{f.name}={show(getattr(self, f.name))}" for f in fields if getattr(self, f.name) is not None]
        return f"{type(self).__name__}({', '.join(parts)})"


def _define(cls):
    return dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)


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
        return -first * torch.log(1 + second * d.abs())
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
        packed = torch.stack(torch.broadcast_tensors(first, second), dim=-1)
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

    Raises:
        TypeError, ValueError: wrong types, shapes, or positions beyond 2^53.

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

    def _values(self) -> tuple[Tensor | None, Tensor | None]:
        """query values, key values."""
        if self.key_positions is None:
            return None, self.positions
        return self.positions, self.key_positions

    def _slopes(self, call: Call) -> tuple[Tensor, Tensor]:
        past = self.slopes
        if isinstance(past, int):
            past = alibi_slopes(past, device=call.device)
        future = past if self.future_slopes is None else self.future_slopes
        return tuple(_per_head(call, self._where, what, x) for what, x in (("slopes", past), ("future_slopes", future)))

    def op_args(self, call: Call) -> OpBias:
        names = ("", "positions") if self.key_positions is None else ("positions", "key_positions")
        return _relative(call, self._where, "linear", self._slopes(call), *self._values(), None, names)

    def materialize(self, call: Call) -> Tensor:
        past, future = (m.double()[..., None, None] for m in self._slopes(call))
        d = _dense_difference(call, self._where, *self._values())
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


class _Distance(Bias):
    """A bias T[h, I - j]. Subclasses give `_of_distance`, and `_reach` when it is constant from some distance on."""

    _where = "fastpe.bias"

    def _of_distance(self, call: Call, d: Tensor, dtype: torch.dtype) -> Tensor:
        """The bias at the int64 distances d = I - j, any shape S -> (H|1, *S) in dtype."""
        raise NotImplementedError

    def _reach(self) -> int | None:
        """A distance, to either side, from which the bias no longer changes."""
        return None

    def op_args(self, call: Call) -> OpBias:
        reach = self._reach()
        if call.causal:
            d = torch.arange(torch.sym_max(call.Nk, 1) if reach is None else reach + 1, device=call.device)
            form = "table_causal"
        else:
            far = torch.sym_max(torch.sym_max(call.Nq, call.Nk) - 1, 0) if reach is None else reach
            # The kernel's index is j - I, the negative of the distance.
            d = -torch.arange(-far, far + 1, device=call.device)
            form = "table"
        return OpBias(FORMS[form], table=self._of_distance(call, d, call.dtype).contiguous())

    def materialize(self, call: Call) -> Tensor:
        return self._of_distance(call, call.distance(), torch.float64)[None]


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

    The paper uses it causally. Clamping to the allowed range belongs to the owner of the parameters, `fastpe.nn.KerpleBias`.

    Args:
        p: (H,) float, positive (power: at most 2).
        a: (H,) float, positive.
        kind: "log" or "power".

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 6, 8)
    >>> b = fastpe.bias.Kerple(torch.tensor([1.0, 0.5]), torch.tensor([0.3, 0.9]))
    >>> fastpe.attention(q, q, q, bias=b, is_causal=True).shape
    torch.Size([1, 2, 6, 8])
    """

    p: Tensor
    a: Tensor
    kind: str = "log"

    _where = "fastpe.bias.Kerple"

    def __post_init__(self):
        if self.kind not in ("log", "power"):
            raise ValueError(f"{self._where}: kind must be 'log' or 'power', got {self.kind!r}")
        for what in ("p", "a"):
            x = _check.is_float(self._where, what, getattr(self, what))
            if x.dim() != 1:
                raise ValueError(f"{self._where}: {what} must be (H,), got {_check.shape(x)}")

    def _of_distance(self, call: Call, d: Tensor, dtype: torch.dtype) -> Tensor:
        p, a = (_head_vector(call, self._where, what, getattr(self, what), dtype, d) for what in ("p", "a"))
        size = d.abs().to(dtype)[None]
        return _phi("log", size, p, a) if self.kind == "log" else _phi("power", size, a, p)


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

    Gradients reach the table, or whatever the callable uses.

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

    _where = "fastpe.bias.RelativeTable"

    def __post_init__(self):
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
        if not isinstance(self.table, Tensor):
            return super().op_args(call)
        self._fits(call, self.table)
        form = FORMS["table_causal" if self.causal else "table"]
        return OpBias(form, table=call.aux(self._where, "table", self.table).contiguous())

    def _fits(self, call: Call, table: Tensor) -> None:
        if table.shape[0] not in (1, call.H):
            raise ValueError(f"{self._where}: table has {table.shape[0]} heads, the call has {call.H}")

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

    def _of_distance(self, call: Call, d: Tensor, dtype: torch.dtype) -> Tensor:
        _check.on_device(self._where, "table", self.table, call.device)
        if self.table.shape[1] not in (1, call.H):
            raise ValueError(f"{self._where}: table has {self.table.shape[1]} heads, the call has {call.H}")
        bucket = t5_bucket(
            -d, bidirectional=self.bidirectional, num_buckets=self.table.shape[0], max_distance=self.max_distance
        )
        table = self.table.to(dtype)
        if self.factor != 1.0:
            table = self.factor * table
        return table.t()[:, bucket]


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


@_define
class KernelCable(_Cumulative):
    """The kernel variant of Cable, arXiv 2503.08067: b = -g_i log(1 + (c_I - c_j)^2).

    Args:
        prefix: c, a `Prefix` of shape (B, H, Nk); or the increments, (B, H, Nk) float.
        row_weight: g, (B, H, Nk) or (B, H, Nq) float. Default 1.

    >>> import torch, fastpe
    >>> q, h = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6)
    >>> b = fastpe.bias.KernelCable(-torch.nn.functional.softplus(h))
    >>> fastpe.attention(q, q, q, bias=b, is_causal=True).shape
    torch.Size([1, 2, 6, 8])
    """

    prefix: Prefix | Tensor
    row_weight: Tensor | None = None

    _where = "fastpe.bias.KernelCable"

    def __post_init__(self):
        _as_prefix(self._where, "prefix", self.prefix)
        if self.row_weight is not None:
            _check.is_float(self._where, "row_weight", self.row_weight)
            _check_tokens(self._where, "row_weight", self.row_weight)

    def op_args(self, call: Call) -> OpBias:
        return _relative(call, self._where, "logsq", None, None, self._prefix(), self.row_weight, ("", self._field))

    def materialize(self, call: Call) -> Tensor:
        d = _dense_difference(call, self._where, None, _dense_prefix(self.prefix))
        b = -torch.log(1 + d * d)
        if self.row_weight is not None:
            b = _last_rows(call, self._where, "row_weight", _tokens(self.row_weight)).double()[..., None] * b
        return b


@_define
class Forget(_Cumulative):
    """The forgetting gates of FoX, arXiv 2503.02130: b = L_I - L_j, L the prefix sum of log f. Causal.

    Args:
        log_gates: log f <= 0 of each token, (B, H, Nk) float, float32 even under autocast; or their `Prefix`.
        seq_start: first token of each row when batches are padded on the left, (B,) integers: gates before it do not
            count. The padded keys themselves are hidden by `fastpe.mask.padding`. Not with a Prefix.

    >>> import torch, fastpe
    >>> q, z = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, requires_grad=True)
    >>> b = fastpe.bias.Forget(torch.nn.functional.logsigmoid(z))
    >>> fastpe.attention(q, q, q, bias=b, is_causal=True).sum().backward(); z.grad.shape
    torch.Size([1, 2, 6])
    """

    log_gates: Prefix | Tensor
    seq_start: Tensor | None = None

    _where = "fastpe.bias.Forget"
    _field = "log_gates"

    def __post_init__(self):
        _as_prefix(self._where, "log_gates", self.log_gates)
        if self.seq_start is not None:
            _check.is_integer(self._where, "seq_start", self.seq_start)
            if isinstance(self.log_gates, Prefix):
                raise ValueError(f"{self._where}: seq_start changes the gates before they are summed; give log_gates, not a Prefix")
            if self.seq_start.dim() != 1 or self.seq_start.shape[0] != self.log_gates.shape[0]:
                raise ValueError(
                    f"{self._where}: seq_start must be (B,) with B = {self.log_gates.shape[0]}, got {_check.shape(self.seq_start)}"
                )

    def _gates(self) -> Prefix | Tensor:
        x = self.log_gates
        if self.seq_start is None:
            return x
        before = torch.arange(x.shape[-1], device=x.device) < self.seq_start[:, None, None]
        return torch.where(before, torch.zeros_like(x), x)

    def _prefix(self) -> Prefix:
        x = self._gates()
        return x if isinstance(x, Prefix) else prefix_sum(x)

    def op_args(self, call: Call) -> OpBias:
        return _relative(call, self._where, "signed", None, None, self._prefix(), None, ("", self._field))

    def materialize(self, call: Call) -> Tensor:
        return _dense_difference(call, self._where, None, _dense_prefix(self._gates()))


# ---------------------------------------------------------------------------------------------------------------------
# Counting gates

from ._cope import Cope, PerRowForget  # noqa: E402, F401  (after the base class they build on)
