"""Biases that count gates between a query and a key: they see the tokens' own vectors, not only where tokens stand."""

from __future__ import annotations

import dataclasses

import torch

from . import _check
from ._call import Call, OpBias
from .bias import Bias, _define

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class CopeArgs:
    """The arguments of torch.ops.fastpe.cope_fwd that a contextual bias gives; csrc/core/params.h says what they mean."""

    gate_q: Tensor | None
    gate_k: Tensor | None
    table: Tensor | None
    gate_scale: float
    table_scale: float


class Contextual(Bias):
    """Base of the biases that need query, key or value."""

    _where = "fastpe.bias"

    def op_args(self, call: Call) -> OpBias:
        raise NotImplementedError(f"{self._where}: {type(self).__name__} goes to fastpe.attention, which reads query and key for it")

    def materialize(self, call: Call) -> Tensor:
        raise NotImplementedError(
            f"{self._where}: the dense form depends on query and key; use materialize_for(call, query, key, value, visible)"
        )

    def materialize_for(self, call: Call, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        """The dense definition for one call: (B, H, Nq, Nk), in float64 when query is.

        Args:
            call: the facts of the call.
            query, key, value: (B, H, Nq, D), (B, Hk, Nk, D), (B, Hk, Nk, Dv), rotated if the call rotates them.
            visible: bool, broadcastable to (B, H, Nq, Nk).
        """
        raise NotImplementedError

    def cope_args(self, call: Call, query: Tensor, key: Tensor, value: Tensor) -> CopeArgs:
        """The kernel arguments for one call."""
        raise NotImplementedError

    def _needs_causal(self, call: Call) -> None:
        if not call.causal:
            raise ValueError(
                f"{self._where}: counts the tokens between a key and a later query, so keys after the query must be hidden; "
                "the call is not causal (pass is_causal=True)"
            )

    def _gate_fits(self, call: Call, what: str, x: Tensor, heads: int, tokens: int, dtype: torch.dtype) -> Tensor:
        _check.on_device(self._where, what, x, call.device)
        if x.shape[0] != call.B or x.shape[1] != heads or x.shape[2] != tokens:
            raise ValueError(
                f"{self._where}: {what} must be (B, heads, tokens, channels) with ({call.B}, {heads}, {tokens}), got {_check.shape(x)}"
            )
        x = x.to(dtype)
        return x if x.stride(3) == 1 else x.contiguous()


def _check_gate(where: str, what: str, x: Tensor) -> None:
    _check.is_float(where, what, x)
    if x.dim() != 4:
        raise ValueError(f"{where}: {what} must be (B, heads, tokens, channels), got {_check.shape(x)}")


def _logits(query: Tensor, key: Tensor, scale: float, wide: torch.dtype) -> Tensor:
    """scale * <query, key> of every pair, key heads repeated, the products in the inputs' dtype."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return scale * (query @ key.transpose(-1, -2)).to(wide)


@_define
class Cope(Contextual):
    """Contextual position encoding, arXiv 2405.18719: positions count gates instead of tokens. Causal.

        g_ij = sigmoid(gate_scale * <q_i, k_j>), 0 where j is not visible to i
        p_ij = min(g_ij + g_i(j+1) + ... + g_iI, npos - 1)
        b_ij = factor * z_i at p_ij, z_i = q_i table, linear between whole positions

    The count of a query and the slopes between positions carry the gradient; whole positions carry none. query, key and
    value enter as the score sees them: rotated, if the call has a rope.

    Args:
        table: (D, npos) float, one for all heads; zeros at the start in `fastpe.nn.CopeBias`. npos - 1 is the largest
            count; once every query of a block has counted that far, its gates cost nothing. As long as the sequence + 1
            for no limit.
        gate_keys: (B, Hk, Nk, D) float, keys of the gates alone (the paper's separate keys). Default: key.
        value_gates: gates from <q_i, v_j> instead.
        nodiv: b_ij is not divided by sqrt(D), as in the paper's listing; the released code divides. factor is 1 or
            D^-0.5.
        gate_scale: default D^-0.5.

    Training keeps 8 bytes per query and 64 keys for the backward pass: memory that grows with Nq * Nk, an eighth of a byte
    per score. Everything else is linear. Positions are float32 (float64 for float64).

    >>> import torch, fastpe
    >>> q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    >>> table = torch.randn(8, 5, requires_grad=True)
    >>> out = fastpe.attention(q, k, v, bias=fastpe.bias.Cope(table), is_causal=True)
    >>> out.sum().backward(); table.grad.shape
    torch.Size([8, 5])
    """

    table: Tensor
    gate_keys: Tensor | None = None
    value_gates: bool = False
    nodiv: bool = False
    gate_scale: float | None = None

    _where = "fastpe.bias.Cope"

    def __post_init__(self):
        where = self._where
        _check.is_float(where, "table", self.table)
        if self.table.dim() != 2 or self.table.shape[1] < 1:
            raise ValueError(f"{where}: table must be (D, npos), got {_check.shape(self.table)}")
        for what in ("value_gates", "nodiv"):
            if not isinstance(getattr(self, what), bool):
                raise TypeError(f"{where}: {what} must be a bool, got {type(getattr(self, what)).__name__}")
        if self.gate_keys is not None:
            _check_gate(where, "gate_keys", self.gate_keys)
            if self.value_gates:
                raise ValueError(f"{where}: gates come from gate_keys or from the values (value_gates), not from both")
        if self.gate_scale is not None:
            _check.number(where, "gate_scale", self.gate_scale)

    def _scales(self, D: int) -> tuple[float, float]:
        """Of the gate logits and of the table."""
        return D**-0.5 if self.gate_scale is None else float(self.gate_scale), 1.0 if self.nodiv else D**-0.5

    def _gates(self, call: Call, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """What query meets in the gates; None: key."""
        self._needs_causal(call)
        D = query.shape[3]
        if self.table.shape[0] != D:
            raise ValueError(f"{self._where}: table has {self.table.shape[0]} channels, query has {D}")
        x, what = (value, "value") if self.value_gates else (self.gate_keys, "gate_keys")
        if x is not None and x.shape[3] != D:
            raise ValueError(f"{self._where}: {what} has {x.shape[3]} channels, query has {D}")
        return x if x is None or self.value_gates else self._gate_fits(call, what, x, key.shape[1], call.Nk, query.dtype)

    def cope_args(self, call: Call, query: Tensor, key: Tensor, value: Tensor) -> CopeArgs:
        gate_k = self._gates(call, query, key, value)
        table = call.aux(self._where, "table", self.table).contiguous()
        return CopeArgs(None, gate_k, table, *self._scales(query.shape[3]))

    def materialize_for(self, call: Call, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        gate_k = self._gates(call, query, key, value)
        gate_scale, factor = self._scales(query.shape[3])
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        logits = _logits(query, key if gate_k is None else gate_k, gate_scale, wide)
        gates = torch.where(visible, torch.sigmoid(logits), 0.0)
        count = gates.flip(-1).cumsum(-1).flip(-1).clamp(max=self.table.shape[1] - 1)
        low, high = count.detach().floor().long(), count.detach().ceil().long()
        z = query.to(wide) @ self.table.to(wide)
        share = count - low
        return factor * (share * z.gather(-1, high) + (1 - share) * z.gather(-1, low))


@_define
class PerRowForget(Contextual):
    """Forgetting gates that look at the query too: b_ij = sum over j <= t < i of log sigmoid(gate_scale * <gq_i, gk_t>).

    The per-row data-dependent ALiBi of x-transformers; 0 on the diagonal, falling with the distance. Causal; keys that a
    query does not see do not count. Compare `fastpe.bias.Forget`, whose gates belong to the keys alone.

    Args:
        gate_queries: gq, (B, H, Nq, G) float, G from 8 to 256 in steps of 8.
        gate_keys: gk, (B, Hk, Nk, G) float.
        gate_scale: default G^-0.5.

    Memory as in `fastpe.bias.Cope`.

    >>> import torch, fastpe
    >>> q, k, v = (torch.randn(1, 2, 9, 16) for _ in range(3))
    >>> gq, gk = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(2))
    >>> out = fastpe.attention(q, k, v, bias=fastpe.bias.PerRowForget(gq, gk), is_causal=True)
    >>> out.sum().backward(); gq.grad.shape
    torch.Size([1, 2, 9, 8])
    """

    gate_queries: Tensor
    gate_keys: Tensor
    gate_scale: float | None = None

    _where = "fastpe.bias.PerRowForget"

    def __post_init__(self):
        where = self._where
        _check_gate(where, "gate_queries", self.gate_queries)
        _check_gate(where, "gate_keys", self.gate_keys)
        channels = self.gate_queries.shape[3]
        if self.gate_keys.shape[3] != channels:
            raise ValueError(f"{where}: gate_keys has {self.gate_keys.shape[3]} channels, gate_queries has {channels}")
        if not 8 <= channels <= 256 or channels % 8:
            raise ValueError(f"{where}: gate_queries must have 8 to 256 channels in steps of 8, got {channels}")
        if self.gate_scale is not None:
            _check.number(where, "gate_scale", self.gate_scale)

    def cope_args(self, call: Call, query: Tensor, key: Tensor, value: Tensor) -> CopeArgs:
        self._needs_causal(call)
        gate_q = self._gate_fits(call, "gate_queries", self.gate_queries, call.H, call.Nq, query.dtype)
        gate_k = self._gate_fits(call, "gate_keys", self.gate_keys, key.shape[1], call.Nk, query.dtype)
        return CopeArgs(gate_q, gate_k, None, self._scale(), 1.0)

    def _scale(self) -> float:
        return self.gate_queries.shape[3] ** -0.5 if self.gate_scale is None else float(self.gate_scale)

    def materialize_for(self, call: Call, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        args = self.cope_args(call, query, key, value)
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        logits = _logits(args.gate_q, args.gate_k, args.gate_scale, wide)
        counts = visible & (call.distance() > 0)
        return torch.where(counts, torch.nn.functional.logsigmoid(logits), 0.0).flip(-1).cumsum(-1).flip(-1)
