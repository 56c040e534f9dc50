"""The description of a rotary embedding and the tables of cosines and sines it stands for."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import _check

Tensor = torch.Tensor

# The last tables of default positions of every rope, and what they were made for.
_KEPT: weakref.WeakKeyDictionary[Rope, tuple[tuple, tuple[Tensor, Tensor]]] = weakref.WeakKeyDictionary()
_KEPT_BYTES = 2 << 20

LAYOUTS = ("half", "interleaved", "cosine")
PRECISIONS = ("exact", "float32")
_DIMS = {
    "": ("pairs",),
    "h": ("heads", "pairs"),
    "b": ("batch", "pairs"),
    "a": ("axes", "pairs"),
    "ah": ("axes", "heads", "pairs"),
}
_WHERE = "fastpe.Rope"


def _kernel_table(out_dtype: torch.dtype) -> Callable[[Tensor, Tensor, float, bool], Tensor]:
    out_f64 = out_dtype == torch.float64

    def make(positions: Tensor, inv_freq: Tensor, amplitude: float, float32_product: bool) -> Tensor:
        return torch.ops.fastpe.rope_table(positions, inv_freq, amplitude, float32_product, out_f64)

    return make


def _definition_table(positions: Tensor, inv_freq: Tensor, amplitude: float, float32_product: bool) -> Tensor:
    """(A,B,N) positions and (A,H,J) inverse frequencies -> (2,B,H,N,J): the definition, in float64."""
    if float32_product:
        positions, inv_freq = positions.float(), inv_freq.float()
    phase = (positions[:, :, None, :, None] * inv_freq[:, None, :, None, :]).sum(0).double()
    return torch.stack((phase.cos(), phase.sin())) * amplitude


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Rope:
    """A rotary position embedding: which angle each pair of channels turns by, and by how much it is scaled.

    Token n of head h and batch row b turns pair j by ``sum_a p[a,b,n] * inv_freq[a,h,j]`` radians; both channels are then
    multiplied by ``amplitude``. Channels from ``rotary_dim`` on are copied (RoFormer, arXiv 2104.09864). The builders of
    `fastpe.rope` make one for every published rule; this class is the general form.

    Args:
        inv_freq: radians per position, float64 or float32: ``(J,)``, or more axes as ``dims`` says. May require grad; it
            is read at every use, so a parameter stays live.
        dims: the leading axes of ``inv_freq``: "" none, "h" query heads (or key heads), "b" batch rows, "a" position
            axes, "ah" position axes and heads.
        amplitude: factor of cos and sin, a number or a tensor of one element (which may require grad).
        layout: "half" pairs channels (j, j + J), "interleaved" (2j, 2j + 1); "cosine" gives every channel its own angle
            and returns [x cos, x sin], twice the channels (`fastpe.apply_rotary` only).
        precision: "exact" is right to 2e-7 up to position 2^30, and to 2^-52 of the angle in float64 calls; "float32"
            multiplies position and frequency in float32, as the code most published checkpoints were trained with did.
        name: what ``repr`` calls it.

    With grouped heads, frequencies given per query head serve key head g with those of query head ``g * (H // Hk)``;
    frequencies given per key head serve all query heads of its group.

    Raises:
        TypeError, ValueError: a wrong type, shape, layout or precision.

    >>> import torch, fastpe
    >>> rope = fastpe.Rope(torch.tensor([1.0, 0.1], dtype=torch.float64))
    >>> rope
    rope(rotary_dim=4, layout='half')
    >>> cos, sin = rope.materialize(torch.arange(3))
    >>> cos.shape
    torch.Size([1, 1, 3, 2])
    """

    inv_freq: Tensor
    dims: str = ""
    amplitude: float | Tensor = 1.0
    layout: str = "half"
    precision: str = "exact"
    name: str = "rope"

    _sides_differ: ClassVar[bool] = False  # whether queries and keys at one position turn differently

    def __post_init__(self) -> None:
        where = f"fastpe.rope.{self.name}" if self.name != "rope" else _WHERE
        w = _check.is_tensor(where, "inv_freq", self.inv_freq)
        if w.dtype not in (torch.float64, torch.float32):
            raise TypeError(f"{where}: inv_freq must be float64 or float32, got {_check.name(w.dtype)}")
        if self.dims not in _DIMS:
            raise ValueError(f"{where}: dims must be one of {', '.join(map(repr, _DIMS))}, got {self.dims!r}")
        if w.dim() != len(_DIMS[self.dims]):
            raise ValueError(
                f"{where}: inv_freq must be ({', '.join(_DIMS[self.dims])}) for dims={self.dims!r}, got shape {_check.shape(w)}"
            )
        if 0 in w.shape:
            raise ValueError(f"{where}: inv_freq must not be empty, got shape {_check.shape(w)}")
        check_choice(where, "layout", self.layout, LAYOUTS)
        check_choice(where, "precision", self.precision, PRECISIONS)
        if isinstance(self.amplitude, Tensor):
            if self.amplitude.numel() != 1:
                raise ValueError(f"{where}: amplitude must have one element, got shape {_check.shape(self.amplitude)}")
        else:
            _check.number(where, "amplitude", self.amplitude)

    # ---- facts

    @property
    def pairs(self) -> int:
        """J: how many angles a token has."""
        return self.inv_freq.shape[-1]

    @property
    def rotary_dim(self) -> int:
        """How many channels turn: 2J, or J in the cosine layout."""
        return self.pairs if self.layout == "cosine" else 2 * self.pairs

    @property
    def axes(self) -> int:
        """A: how many numbers say where a token is (1 for text)."""
        return self.inv_freq.shape[0] if "a" in self.dims else 1

    @property
    def heads(self) -> int | None:
        """How many heads have frequencies of their own; None when all share them."""
        return self.inv_freq.shape[-2] if "h" in self.dims else None

    @property
    def key_side(self) -> Rope:
        """The Rope that treats what it is given as keys. It differs from this one for xPos alone."""
        return self

    def __repr__(self) -> str:
        parts = [f"rotary_dim={self.rotary_dim}"]
        if self.axes > 1:
            parts.append(f"axes={self.axes}")
        if self.heads:
            parts.append(f"heads={self.heads}")
        if self.dims == "b":
            parts.append(f"batch={self.inv_freq.shape[0]}")
        if isinstance(self.amplitude, Tensor):
            parts.append("amplitude=tensor")
        elif self.amplitude != 1:
            parts.append(f"amplitude={self.amplitude:.6g}")
        parts.append(f"layout={self.layout!r}")
        if self.precision != "exact":
            parts.append(f"precision={self.precision!r}")
        return f"{self.name}({', '.join(parts)})"

    def replace(self, **changes: Any) -> Rope:
        """A copy with some fields changed.

        >>> import fastpe
        >>> fastpe.rope.default(8).replace(layout="interleaved")
        default(rotary_dim=8, layout='interleaved')
        """
        return dataclasses.replace(self, **changes)

    def to(self, device: torch.device | str) -> Rope:
        """The same embedding with its tensors on another device."""
        move = {
            f.name: getattr(self, f.name).to(device)
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **move)

    # ---- what depends on the length of the text

    def at_length(self, length: int | Tensor) -> Rope:
        """The embedding for a text of ``length`` tokens, with nothing left that depends on the length.

        Rules such as dynamic NTK, CLEX and LongRoPE choose their frequencies by the largest position in use plus one.
        Calls work that out for themselves; this fixes it. Other embeddings return themselves.

        Args:
            length: tokens, an integer or a tensor of one element (which keeps torch.compile from specialising on it).

        >>> import fastpe
        >>> dynamic = fastpe.rope.dynamic_ntk(64, factor=2.0, max_position=2048)
        >>> bool(dynamic.at_length(8192).inv_freq[-1] < dynamic.inv_freq[-1])
        True
        """
        return self

    def _at(self, length: Callable[[], Tensor]) -> tuple[Tensor, float | Tensor]:
        """Inverse frequencies, as given, and amplitude. `length` is called by the rules that need it."""
        return self.inv_freq, self.amplitude

    # ---- tables

    def tables(
        self,
        positions_q: Tensor | None,
        positions_k: Tensor | None,
        q_len: int,
        k_len: int,
        batch: int,
        heads: int,
        kv_heads: int,
        out_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        *,
        where: str = "fastpe.attention",
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines for the queries and the keys of one attention call, as the kernels read them.

        Args:
            positions_q, positions_k: where the tokens are: ``(N,)`` or ``(B,N)``, and for an embedding with A > 1 axes
                ``(A,N)`` or ``(A,B,N)``; integers, float32 or float64, which may require grad. Without them queries are
                the last ``q_len`` of ``k_len`` tokens in a row. Keys follow the queries' positions when only those are
                given and the lengths agree.
            q_len, k_len, batch, heads, kv_heads: sizes of the call.
            out_dtype: float32, or float64 for a float64 call.
            device: where the call runs; the device of ``inv_freq`` if not given.
            where: the function that errors name.

        Returns:
            ``(2, B|1, H|1, q_len, J)`` and ``(2, B|1, Hk|1, k_len, J)``; [0] is cos, [1] is sin, amplitude included.

        On a CPU the tables of tokens in a row are kept for the next call, the last one of a rope and up to 2 MiB: the layers
        of a model share them.

        >>> import fastpe
        >>> q_table, k_table = fastpe.rope.default(8).tables(None, None, 2, 5, batch=1, heads=4, kv_heads=4)
        >>> q_table.shape, k_table.shape
        (torch.Size([2, 1, 1, 2, 4]), torch.Size([2, 1, 1, 5, 4]))
        """
        keep = positions_q is None and positions_k is None and q_len == k_len and self._may_keep(q_len, out_dtype, device)
        if not keep:
            return self._kernel_tables(where, positions_q, positions_k, q_len, k_len, batch, heads, kv_heads, device, out_dtype)
        # Version and address tell whether the frequencies were written to or replaced.
        w = self.inv_freq
        key = (q_len, heads, kv_heads, out_dtype, w.data_ptr(), w._version, torch.is_inference_mode_enabled())
        kept = _KEPT.get(self)
        if kept is None or kept[0] != key:
            kept = key, self._kernel_tables(where, None, None, q_len, k_len, batch, heads, kv_heads, device, out_dtype)
            _KEPT[self] = kept
        return kept[1]

    def _may_keep(self, n: int, out_dtype: torch.dtype, device) -> bool:
        w = self.inv_freq
        return (
            type(self) is Rope  # rules of subclasses may depend on more than their fields
            and not torch.compiler.is_compiling()
            and type(w) in (Tensor, torch.nn.Parameter)
            and not w.requires_grad
            and not w.is_inference()  # has no version
            and not isinstance(self.amplitude, Tensor)
            and self.dims in ("", "h")
            and w.device.type == "cpu"
            and (device is None or torch.device(device).type == "cpu")
            and _get_current_dispatch_mode() is None
            and 2 * n * w.numel() * out_dtype.itemsize <= _KEPT_BYTES
        )

    def _kernel_tables(self, where, positions_q, positions_k, q_len, k_len, batch, heads, kv_heads, device, out_dtype):
        return self._both(
            where,
            _kernel_table(out_dtype),
            positions_q,
            positions_k,
            q_len,
            k_len,
            batch,
            heads,
            kv_heads,
            device,
            out_dtype,
        )

    def materialize_tables(
        self,
        positions_q: Tensor | None,
        positions_k: Tensor | None,
        q_len: int,
        k_len: int,
        batch: int,
        heads: int,
        kv_heads: int,
        device: torch.device | str | None = None,
        *,
        where: str = "fastpe.reference",
    ) -> tuple[Tensor, Tensor]:
        """`tables` from the definition: plain torch, float64."""
        return self._both(
            where,
            _definition_table,
            positions_q,
            positions_k,
            q_len,
            k_len,
            batch,
            heads,
            kv_heads,
            device,
            torch.float64,
        )

    def materialize(
        self, positions: Tensor, dtype: torch.dtype = torch.float64, *, length: int | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The definition: cos and sin of every angle times the amplitude, in plain torch.

        Args:
            positions: as in `tables`.
            dtype: of the result; the work is done in float64.
            length: for rules that depend on it; the largest position plus one if not given.

        Returns:
            cos, sin, each ``(B|1, H|1, N, J)``.
        """
        p = self._positions(_WHERE, "positions", positions, None, None, self.inv_freq.device)
        size = (lambda: _as_length(length, p)) if length is not None else (lambda: _length_of(p))
        table = self._table(_definition_table, p, size, lambda w: w, torch.float64, 1)
        return table[0].to(dtype), table[1].to(dtype)

    def one_table(
        self,
        where: str,
        positions: Tensor | None,
        n: int,
        batch: int,
        heads: int,
        out_dtype: torch.dtype,
        device: torch.device,
        *,
        kv_heads: int | None = None,
        query: bool = True,
    ) -> Tensor:
        """The table for a single tensor of ``n`` tokens, ``(2, B|1, H|1, n, J)``: queries, or keys, of `heads` query heads over
        `kv_heads`."""
        p = self._positions(where, "positions", positions, n, batch, device)
        return self._table(
            _kernel_table(out_dtype),
            p,
            lambda: _length_of(p),
            lambda w: self._rows(where, w, heads, kv_heads or heads, query),
            out_dtype,
            1 if query else -1,
        )

    def _both(self, where, make, positions_q, positions_k, q_len, k_len, batch, heads, kv_heads, device, out_dtype):
        if self.layout == "cosine":
            raise NotImplementedError(
                f"{where}: {self.name} in the cosine layout doubles the channels, which attention does not do in its tiles; "
                "call fastpe.apply_rotary on query and key first"
            )
        device = self.inv_freq.device if device is None else torch.device(device)
        if positions_k is None and positions_q is not None:
            if q_len != k_len:
                raise ValueError(
                    f"{where}: key_positions is needed when positions is given and there are {k_len} keys for {q_len} queries"
                )
            positions_k = positions_q
        same = positions_q is positions_k and q_len == k_len
        if positions_q is None and positions_k is not None:
            raise ValueError(f"{where}: positions is needed when key_positions is given")
        if positions_q is None:
            self._one_axis(where)
            pk = torch.arange(k_len, device=device, dtype=torch.float64).view(1, 1, -1)
            pq = pk if same else torch.arange(k_len - q_len, k_len, device=device, dtype=torch.float64).view(1, 1, -1)
        else:
            pq = self._positions(where, "positions", positions_q, q_len, batch, device)
            pk = pq if same else self._positions(where, "key_positions", positions_k, k_len, batch, device)

        def size() -> Tensor:
            return _length_of(pq) if same else torch.maximum(_length_of(pq), _length_of(pk))

        q_table = self._table(make, pq, size, lambda w: self._rows(where, w, heads, kv_heads, True), out_dtype, 1)
        if same and not self._sides_differ and ("h" not in self.dims or heads == kv_heads):
            return q_table, q_table
        return q_table, self._table(
            make, pk, size, lambda w: self._rows(where, w, heads, kv_heads, False), out_dtype, -1
        )

    def _table(self, make, positions: Tensor, length, rows, out_dtype: torch.dtype, side: int) -> Tensor:
        """(A,B|1,N) positions -> (2,B|1,H|1,N,J). `rows` picks the rows of per-head frequencies this side uses, which is
        1 for queries and -1 for keys."""
        w, amplitude = self._at(length)
        w = w.to(device=positions.device, dtype=torch.float64)
        factor = 1.0 if isinstance(amplitude, Tensor) else float(amplitude)
        f32 = self.precision == "float32"
        if self.dims == "b":
            table = self._batched(make, positions, w[None], factor, f32)
        else:
            w = w if "a" in self.dims else w[None]
            w = rows(w) if "h" in self.dims else w[:, None]
            table = make(positions, w, factor, f32)
        if isinstance(amplitude, Tensor):
            table = table * amplitude.to(device=table.device, dtype=table.dtype).reshape(())
        return table

    def _batched(self, make, positions: Tensor, w: Tensor, factor: float, f32: bool) -> Tensor:
        """Frequencies by batch row. Rows that share their positions are computed as heads, then moved."""
        if positions.shape[1] == 1:
            return make(positions, w, factor, f32).transpose(1, 2)
        return torch.cat(
            [make(positions[:, b : b + 1], w[:, b : b + 1], factor, f32) for b in range(w.shape[1])], dim=1
        )

    def _rows(self, where: str, w: Tensor, heads: int, kv_heads: int, query: bool) -> Tensor:
        """(A,Hw,J) -> (A,H,J) for queries, (A,Hk,J) for keys."""
        given = w.shape[1]
        if given == heads:
            return w if query or heads == kv_heads else w[:, :: heads // kv_heads]
        if given == kv_heads:
            return w.repeat_interleave(heads // kv_heads, dim=1) if query else w
        what = f"{heads}" if heads == kv_heads else f"{heads} query and {kv_heads} key"
        raise ValueError(f"{where}: rope {self.name} has frequencies for {given} heads, the call has {what} heads")

    def _one_axis(self, where: str) -> None:
        if self.axes != 1:
            raise ValueError(
                f"{where}: rope {self.name} has {self.axes} axes, so positions ({self.axes}, N) are needed, got none"
            )

    def _positions(
        self, where: str, what: str, p: Tensor | None, n: int | None, batch: int | None, device: torch.device
    ) -> Tensor:
        """Checks positions and brings them to (A, B|1, N) float64; `n` and `batch` of None are not checked."""
        if p is None:
            self._one_axis(where)
            return torch.arange(n, device=device, dtype=torch.float64).view(1, 1, -1)
        _check.is_tensor(where, what, p)
        if p.dtype not in (*_check.INTEGERS, torch.float32, torch.float64):
            raise TypeError(f"{where}: {what} must hold integers, float32 or float64, got {_check.name(p.dtype)}")
        given, axes = p, self.axes
        if axes == 1:
            if p.dim() not in (1, 2, 3) or (p.dim() == 3 and p.shape[0] != 1):
                raise ValueError(f"{where}: {what} must be (N,) or (B, N), got shape {_check.shape(p)}")
            p = p if p.dim() == 3 else p.reshape(1, -1, p.shape[-1]) if p.numel() else p.reshape(1, 1, 0)
        else:
            if p.dim() not in (2, 3) or p.shape[0] != axes:
                raise ValueError(
                    f"{where}: {what} must be ({axes}, N) or ({axes}, B, N) for a rope with {axes} axes, "
                    f"got shape {_check.shape(p)}"
                )
            p = p if p.dim() == 3 else p[:, None]
        if n is not None and p.shape[2] != n:
            raise ValueError(
                f"{where}: {what} is for {p.shape[2]} tokens, got {n} of them (positions have shape {_check.shape(given)})"
            )
        if batch is not None and p.shape[1] != 1 and p.shape[1] != batch:
            raise ValueError(f"{where}: {what} has {p.shape[1]} batch rows, expected 1 or {batch}")
        if p.device != device:
            raise ValueError(f"{where}: {what} is on {p.device}, expected {device}")
        if p.device.type == "cpu":  # elsewhere reading the values would stall the device
            _check.positions_in_range(where, what, p)
        return p.to(torch.float64)


def check_choice(where: str, what: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{where}: {what} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _length_of(positions: Tensor) -> Tensor:
    """The largest position plus one, a float64 tensor of no axes: tokens in the text as far as this call knows."""
    if positions.shape[-1] == 0:
        return torch.zeros((), dtype=torch.float64, device=positions.device)
    return positions.detach().amax() + 1.0


def _as_length(length: int | Tensor, like: Tensor) -> Tensor:
    if isinstance(length, Tensor):
        return length.detach().to(device=like.device, dtype=torch.float64).reshape(())
    return torch.scalar_tensor(length, dtype=torch.float64, device=like.device)


LengthRule = Callable[[Tensor], tuple[Tensor, "float | Tensor"]]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LengthRope(Rope):
    """A Rope whose frequencies are a pure function of the length. `inv_freq` is what short texts get."""

    rule: LengthRule | None = None

    def at_length(self, length: int | Tensor) -> Rope:
        if not isinstance(length, Tensor):
            _check.count(f"fastpe.rope.{self.name}", "length", length, 1)
        w, amplitude = self.rule(_as_length(length, self.inv_freq))
        return Rope(w, self.dims, amplitude, self.layout, self.precision, self.name)

    def _at(self, length):
        return self.rule(length().to(self.inv_freq.device))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class XposRope(Rope):
    """Rotation with the amplitude zeta_j^(+-(p - c) / scale_base): + on queries, - on keys."""

    zeta: Tensor | None = None
    scale_base: float = 512.0
    center: float | str = "floor"
    sign: int = 1

    _sides_differ: ClassVar[bool] = True

    @property
    def key_side(self) -> Rope:
        return dataclasses.replace(self, sign=-self.sign)

    def _table(self, make, positions, length, rows, out_dtype, side):
        table = super()._table(make, positions, length, rows, out_dtype, side)
        if self.center == "floor":
            c = (length() / 2).floor()
        elif self.center == "ceil":
            c = (length() / 2).ceil()
        else:
            c = self.center
        exponent = (positions[0] - c) * (side * self.sign / self.scale_base)
        zeta = self.zeta.to(positions.device)
        return table * (exponent[:, None, :, None] * zeta.log()).exp().to(table.dtype)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FirstTokensRope(Rope):
    """Tokens at positions below `count` turn as this Rope says, the others as `later` says."""

    count: int = 0
    later: Rope | None = None

    def to(self, device):
        return dataclasses.replace(super().to(device), later=self.later.to(device))

    def at_length(self, length):
        return dataclasses.replace(self, later=self.later.at_length(length))

    def _table(self, make, positions, length, rows, out_dtype, side):
        first = super()._table(make, positions, length, rows, out_dtype, side)
        later = self.later._table(make, positions, length, rows, out_dtype, side)
        return torch.where((positions[0] < self.count)[:, None, :, None], first, later)
