"""Modules that own the parameters of position biases and initialise them as their papers do.

Each is called inside a model's forward and returns an object for `fastpe.attention`. Modules that look at the text take
the hidden states x (B, N, d_model) that the attention layer itself projects. Per-token biases are computed in float32
even under autocast: their sums over thousands of tokens do not survive half precision.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from . import _check, bias
from ._nn_rope import RotaryEmbedding
from .bias import alibi_slopes
from .prefix import Prefix, prefix_sum

Tensor = torch.Tensor

__all__ = [
    "AlibiBias",
    "CableBias",
    "CopeBias",
    "FireBias",
    "ForgetBias",
    "KerpleBias",
    "RotaryEmbedding",
    "SandwichBias",
    "T5Bias",
]


def _heads(where: str, heads: int) -> int:
    return _check.count(where, "heads", heads, 1)


class AlibiBias(torch.nn.Module):
    """ALiBi (arXiv 2108.12409) with the paper's slopes.

    Args:
        heads: number of query heads.
        max_bias: see `fastpe.bias.alibi_slopes`.
        learnable: slopes are a parameter; else a buffer.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 4, 6, 8)
    >>> m = fastpe.nn.AlibiBias(4)
    >>> fastpe.attention(q, q, q, bias=m(), is_causal=True).shape
    torch.Size([1, 4, 6, 8])
    """

    def __init__(self, heads: int, *, max_bias: float = 8.0, learnable: bool = False):
        super().__init__()
        slopes = alibi_slopes(_heads("fastpe.nn.AlibiBias", heads), max_bias)
        if learnable:
            self.slopes = torch.nn.Parameter(slopes)
        else:
            self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, x: Tensor | None = None, *, positions: Tensor | None = None) -> bias.Alibi:
        """The bias; x is not looked at. positions: as in `fastpe.bias.Alibi`."""
        return bias.Alibi(self.slopes, positions=positions)


class KerpleBias(torch.nn.Module):
    """KERPLE (arXiv 2205.09921): p ~ U[0, 2), a ~ U[0, 1), one pair per head, shared by the layers of a model.

    As in the paper's code every forward clamps the parameters in place to at least 0.01 (and p to at most 2 for the power
    kernel), outside autograd: the gradient is that at the clamped value.

    Args:
        heads: number of query heads.
        kind: "log" or "power".
        weighted: also learn the multiplicative kernel exp(-weight_a |I - j|^weight_p) of the paper's code, from the same ranges.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 4, 6, 8)
    >>> m = fastpe.nn.KerpleBias(4)
    >>> fastpe.attention(q, q, q, bias=m(), is_causal=True).sum().backward()
    >>> m.p.grad.shape, m.a.grad.shape
    (torch.Size([4]), torch.Size([4]))
    """

    least = 0.01

    def __init__(self, heads: int, *, kind: str = "log", weighted: bool = False):
        super().__init__()
        where = "fastpe.nn.KerpleBias"
        _heads(where, heads)
        if kind not in ("log", "power"):
            raise ValueError(f"{where}: kind must be 'log' or 'power', got {kind!r}")
        self.kind = kind
        self.p = torch.nn.Parameter(torch.empty(heads))
        self.a = torch.nn.Parameter(torch.empty(heads))
        self.weight_p = torch.nn.Parameter(torch.empty(heads)) if weighted else None
        self.weight_a = torch.nn.Parameter(torch.empty(heads)) if weighted else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for p, a in ((self.p, self.a), (self.weight_p, self.weight_a)):
            if p is not None:
                torch.nn.init.uniform_(p, 0.0, 2.0)
                torch.nn.init.uniform_(a, 0.0, 1.0)

    def forward(self, x: Tensor | None = None) -> bias.Kerple:
        """The bias; x is not looked at."""
        with torch.no_grad():
            self.p.clamp_(min=self.least, max=2.0 if self.kind == "power" else None)
            self.a.clamp_(min=self.least)
            if self.weight_p is not None:
                self.weight_p.clamp_(min=self.least, max=2.0)
                self.weight_a.clamp_(min=self.least)
        return bias.Kerple(self.p, self.a, self.kind, self.weight_p, self.weight_a)


class T5Bias(torch.nn.Module):
    """T5's learned buckets (arXiv 1910.10683), one table shared by the layers of a model.

    T5 draws the table from N(0, d_model^-0.5) and calls attention with scale=1.

    Args:
        heads: number of query heads.
        num_buckets, max_distance: 32 and 128 in T5.
        bidirectional: True for encoders, False for decoders.
        std: of the initial table; T5 takes d_model ** -0.5.
        factor: multiplies the table; sqrt(D) in GPT-NeoX.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 4, 6, 8)
    >>> m = fastpe.nn.T5Bias(4, bidirectional=False)
    >>> fastpe.attention(q, q, q, bias=m(), scale=1.0, is_causal=True).shape
    torch.Size([1, 4, 6, 8])
    """

    def __init__(
        self,
        heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        std: float = 0.02,
        factor: float = 1.0,
    ):
        super().__init__()
        self.bidirectional, self.max_distance, self.factor = bidirectional, max_distance, factor
        self.std = _check.number("fastpe.nn.T5Bias", "std", std, positive=True)
        self.table = torch.nn.Parameter(torch.empty(num_buckets, _heads("fastpe.nn.T5Bias", heads)))
        self.reset_parameters()
        self()  # refuses bad bucket numbers now rather than at the first forward

    def reset_parameters(self) -> None:
        torch.nn.init.normal_(self.table, 0.0, self.std)

    def forward(self, x: Tensor | None = None) -> bias.T5:
        """The bias; x is not looked at."""
        return bias.T5(self.table, self.bidirectional, self.max_distance, self.factor)


class FireBias(torch.nn.Module):
    """FIRE (arXiv 2310.04418): a network Linear(1, width), ReLU, Linear(width, heads) with torch's default initialisation, a
    learnable c and a learnable factor of the threshold.

    Args:
        heads: number of query heads.
        width: 32 in the paper.
        c: initial value, 0.1 in the paper.
        L: the threshold L0, 512 in the paper; the module learns `L_mult`, 1 at first.
        eps: 1e-6.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 4, 6, 8)
    >>> m = fastpe.nn.FireBias(4)
    >>> fastpe.attention(q, q, q, bias=m(), is_causal=True).sum().backward()
    >>> m.c.grad.shape, m.mlp[0].weight.grad.shape
    (torch.Size([]), torch.Size([32, 1]))
    """

    def __init__(self, heads: int, *, width: int = 32, c: float = 0.1, L: float = 512.0, eps: float = 1e-6):
        super().__init__()
        where = "fastpe.nn.FireBias"
        _heads(where, heads)
        _check.count(where, "width", width, 1)
        self.L, self.eps = _check.number(where, "L", L, positive=True), _check.number(where, "eps", eps)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(1, width), torch.nn.ReLU(), torch.nn.Linear(width, heads))
        self.c = torch.nn.Parameter(torch.tensor(_check.number(where, "c", c)))
        self.L_mult = torch.nn.Parameter(torch.tensor(1.0))

    def forward(
        self, x: Tensor | None = None, *, positions: Tensor | None = None, max_distance: int | None = None
    ) -> bias.Fire:
        """The bias; x is not looked at. positions, max_distance: as in `fastpe.bias.Fire`; the paper's random positions are
        `fastpe.positions.randomized(n, limit)`, drawn anew for each training step."""
        threshold = self.L_mult * self.L
        return bias.Fire.from_mlp(self.mlp, self.c, threshold, eps=self.eps, positions=positions, max_distance=max_distance)


class RelativeBias(torch.nn.Module):
    """A learned function of the distance: a table, or a network of the logarithm of the distance.

    The network is Linear(1, width), ReLU, Linear(width, heads) of sign(d) log(1 + |d|), d = I - j, with torch's default
    initialisation: the log-spaced continuous bias of Swin v2 (arXiv 2111.09883) along one axis. It knows no largest distance.

    Args:
        heads: number of query heads.
        max_distance: entries to either side of a table drawn from N(0, std); beyond, the last one holds. Either this or width.
        width: of the network.
        causal: the table has no entries for keys after the query.
        std: 0.02, as usual for embeddings.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 4, 6, 8)
    >>> table, network = fastpe.nn.RelativeBias(4, max_distance=16), fastpe.nn.RelativeBias(4, width=32)
    >>> table.table.shape, fastpe.attention(q, q, q, bias=network()).shape
    (torch.Size([4, 33]), torch.Size([1, 4, 6, 8]))
    """

    def __init__(
        self, heads: int, *, max_distance: int | None = None, width: int | None = None, causal: bool = False, std: float = 0.02
    ):
        super().__init__()
        where = "fastpe.nn.RelativeBias"
        _heads(where, heads)
        if (max_distance is None) == (width is None):
            raise ValueError(f"{where}: give either max_distance, for a table, or width, for a network")
        self.causal, self.std = causal, _check.number(where, "std", std, positive=True)
        self.table = self.mlp = None
        if width is not None:
            if causal:
                raise ValueError(f"{where}: causal describes a table; a network sees the distances that occur")
            _check.count(where, "width", width, 1)
            self.mlp = torch.nn.Sequential(torch.nn.Linear(1, width), torch.nn.ReLU(), torch.nn.Linear(width, heads))
        else:
            _check.count(where, "max_distance", max_distance, 1)
            self.table = torch.nn.Parameter(torch.empty(heads, max_distance + 1 if causal else 2 * max_distance + 1))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.table is not None:
            torch.nn.init.normal_(self.table, 0.0, self.std)
        else:
            for layer in (self.mlp[0], self.mlp[2]):
                layer.reset_parameters()

    def forward(self, x: Tensor | None = None) -> bias.RelativeTable:
        """The bias; x is not looked at."""
        if self.table is not None:
            return bias.RelativeTable(self.table, self.causal)

        def of_distance(d: Tensor) -> Tensor:
            d = d.to(self.mlp[0].weight.dtype)
            return self.mlp((d.sign() * torch.log1p(d.abs()))[:, None]).T

        return bias.RelativeTable(of_distance)


class HeadScale(torch.nn.Module):
    """A learned temperature of each head, arXiv 2404.12224, for the `head_scale` of `fastpe.attention`.

    The paper trains these numbers alone, a few hundred steps at the new length, and keeps them at 1 or more, as every
    forward does here, outside autograd.

    Args:
        heads: number of query heads; 1 for the paper's UniformScale.
        init: 1.6, as in the released code.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 4, 6, 8)
    >>> m = fastpe.nn.HeadScale(4)
    >>> fastpe.attention(q, q, q, head_scale=m(), is_causal=True).sum().backward(); m.scale.grad.shape
    torch.Size([4])
    """

    def __init__(self, heads: int, *, init: float = 1.6):
        super().__init__()
        where = "fastpe.nn.HeadScale"
        self.init = _check.number(where, "init", init, positive=True)
        self.scale = torch.nn.Parameter(torch.full((_heads(where, heads),), self.init))

    def reset_parameters(self) -> None:
        torch.nn.init.constant_(self.scale, self.init)

    def forward(self, x: Tensor | None = None) -> Tensor:
        """The scales (heads,); x is not looked at."""
        with torch.no_grad():
            self.scale.clamp_(min=1.0)
        return self.scale


class SandwichBias(torch.nn.Module):
    """Sandwich (arXiv 2212.10356) with the published per-head factors; nothing is learned.

    Args:
        heads: number of query heads.
        dim: 128 in the paper.

    >>> import fastpe
    >>> fastpe.nn.SandwichBias(8)()
    Sandwich(factors=tensor(8,), dim=128)
    """

    def __init__(self, heads: int, *, dim: int = 128):
        super().__init__()
        self.dim = dim
        _heads("fastpe.nn.SandwichBias", heads)
        self.register_buffer("factors", heads / (8 * torch.arange(1, heads + 1, dtype=torch.float64)), persistent=False)

    def forward(self, x: Tensor | None = None) -> bias.Sandwich:
        """The bias; x is not looked at."""
        return bias.Sandwich(self.factors, self.dim)


def _project(x: Tensor, layer: torch.nn.Linear) -> Tensor:
    """layer(x) in float32 (float64 stays) with autocast off, (B, N, d) -> (B, H, N) in the memory order sums want."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(wide), layer.weight.to(wide), layer.bias.to(wide)).transpose(1, 2).contiguous()


def _check_hidden(where: str, x: Tensor, d_model: int) -> None:
    _check.is_float(where, "x", x)
    if x.dim() != 3 or x.shape[2] != d_model:
        raise ValueError(f"{where}: x must be (B, N, {d_model}), got {_check.shape(x)}")


class CableBias(torch.nn.Module):
    """Cable, context-aware biases (arXiv 2503.08067).

    v3 (the published version): increments -relu(h), weight g = softplus(h'), b = g_i (c_i - c_j).
    v1 (the first code): increments -softplus(h), b = c_i - c_j; that code used attention scale 1.
    h and h' are linear in x, weights N(0, 0.02), bias 0, one projection per layer.

    Args:
        d_model: width of x.
        heads: number of query heads.
        version: "v3" or "v1".
        bidirectional: b = -g_i |c_i - c_j|, for encoders (v3).

    >>> import torch, fastpe
    >>> x, q = torch.randn(1, 6, 32), torch.randn(1, 4, 6, 8)
    >>> m = fastpe.nn.CableBias(32, 4)
    >>> fastpe.attention(q, q, q, bias=m(x), is_causal=True).shape
    torch.Size([1, 4, 6, 8])
    """

    def __init__(self, d_model: int, heads: int, *, version: str = "v3", bidirectional: bool = False):
        super().__init__()
        where = "fastpe.nn.CableBias"
        if version not in ("v1", "v3"):
            raise ValueError(f"{where}: version must be 'v1' or 'v3', got {version!r}")
        if version == "v1" and bidirectional:
            raise NotImplementedError(f"{where}: version 'v1' does not go with bidirectional; use 'v3'")
        self.d_model = _check.count(where, "d_model", d_model, 1)
        self.version, self.bidirectional = version, bidirectional
        self.increment = torch.nn.Linear(d_model, _heads(where, heads))
        self.weight = torch.nn.Linear(d_model, heads) if version == "v3" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.increment, self.weight):
            if layer is not None:
                torch.nn.init.normal_(layer.weight, 0.0, 0.02)
                torch.nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, past: Prefix | None = None) -> bias.Cable:
        """The bias for hidden states x (B, N, d_model).

        Args:
            x: (B, N, d_model); with `past`, of the new tokens only.
            past: the prefix of the tokens in the cache (`bias.prefix` of the step before); decoding, no gradient.
        """
        where = "fastpe.nn.CableBias"
        _check_hidden(where, x, self.d_model)
        h = _project(x, self.increment)
        terms = -F.softplus(h) if self.version == "v1" else -torch.relu(h)
        prefix = prefix_sum(terms) if past is None else past.append(terms)
        g = None if self.weight is None else F.softplus(_project(x, self.weight))
        return bias.Cable(prefix, g, self.bidirectional)


class ForgetBias(torch.nn.Module):
    """The forget gate of FoX (arXiv 2503.02130): log f = logsigmoid(linear(x)), one gate per head and token.

    Args:
        d_model: width of x.
        heads: number of query heads.
        std: of the initial weights N(0, std); the bias starts at 0.
        decay_times: (shortest, longest) half-open memory times in tokens: the gates then do not depend on the text, each
            head keeps -log(expm1(1 / T_h)) with T_h spaced logarithmically between them, as a learnable parameter.
        bidirectional: gates of their own for the keys after the query (x-transformers): 2 * heads of them, the first
            `heads` for the past. Not with decay_times.
        gate_bias: initial bias of the gates, 0 in FoX, 5 in x-transformers.

    >>> import torch, fastpe
    >>> x, q = torch.randn(1, 6, 32), torch.randn(1, 4, 6, 8)
    >>> m = fastpe.nn.ForgetBias(32, 4)
    >>> fastpe.attention(q, q, q, bias=m(x), is_causal=True).shape
    torch.Size([1, 4, 6, 8])
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        std: float = 0.02,
        decay_times: tuple[float, float] | None = None,
        bidirectional: bool = False,
        gate_bias: float = 0.0,
    ):
        super().__init__()
        where = "fastpe.nn.ForgetBias"
        self.d_model = _check.count(where, "d_model", d_model, 1)
        self.std = _check.number(where, "std", std, positive=True)
        self.gate_bias = _check.number(where, "gate_bias", gate_bias)
        _heads(where, heads)
        self.decay_times, self.bidirectional = decay_times, bidirectional
        if decay_times is None:
            self.gate = torch.nn.Linear(d_model, 2 * heads if bidirectional else heads)
        elif bidirectional:
            raise NotImplementedError(f"{where}: decay_times does not go with bidirectional; use gates of the text")
        else:
            if not isinstance(decay_times, (tuple, list)) or len(decay_times) != 2:
                raise ValueError(f"{where}: decay_times must be (shortest, longest), got {decay_times!r}")
            low, high = (_check.number(where, "decay_times", t, positive=True) for t in decay_times)
            if high < low:
                raise ValueError(f"{where}: decay_times must not decrease, got {low:g} then {high:g}")
            self.logit = torch.nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.decay_times is None:
            torch.nn.init.normal_(self.gate.weight, 0.0, self.std)
            torch.nn.init.constant_(self.gate.bias, self.gate_bias)
            return
        low, high = (math.log(t) for t in self.decay_times)
        times = torch.linspace(low, high, self.logit.shape[0], dtype=torch.float64).exp()
        with torch.no_grad():
            self.logit.copy_(-torch.log(torch.expm1(1 / times)))

    def forward(
        self, x: Tensor, past: Prefix | None = None, *, seq_start: Tensor | None = None
    ) -> bias.Forget:
        """The bias for hidden states x (B, N, d_model).

        Args:
            x: (B, N, d_model); with `past`, of the new tokens only.
            past: the prefix of the tokens in the cache (`bias.log_gates` of the step before); decoding, no gradient. Not
                with bidirectional gates.
            seq_start: (B,) integers, first real token of rows padded on the left. Not with `past`.
        """
        where = "fastpe.nn.ForgetBias"
        _check_hidden(where, x, self.d_model)
        if self.decay_times is None:
            z = _project(x, self.gate)
        else:
            z = self.logit.float()[None, :, None].expand(x.shape[0], -1, x.shape[1])
        gates = F.logsigmoid(z)
        if seq_start is not None and past is not None:
            raise ValueError(f"{where}: seq_start belongs to the first tokens, and past holds those already")
        if self.bidirectional:
            if past is not None:
                raise NotImplementedError(f"{where}: past does not go with bidirectional gates, which see the whole text")
            behind, ahead = gates.chunk(2, dim=1)
            return bias.Forget(behind, seq_start, ahead)
        if seq_start is not None:
            return bias.Forget(gates, seq_start)
        return bias.Forget(prefix_sum(gates) if past is None else past.append(gates))


class CopeBias(torch.nn.Module):
    """Contextual position encoding (arXiv 2405.18719): one table (head_dim, npos) for all heads, zeros at the start.

    Args:
        head_dim: channels of a query head.
        npos: entries of the table; counts stop at npos - 1. The paper takes the training length + 1 or less (64 often does).
        separate_keys: the gates have a projection of x of their own, (d_model -> kv_heads * head_dim), no bias.
        d_model, kv_heads: for separate_keys.
        nodiv: see `fastpe.bias.Cope`.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 4, 6, 8)
    >>> m = fastpe.nn.CopeBias(8, 4)
    >>> fastpe.attention(q, q, q, bias=m(), is_causal=True).sum().backward(); m.table.grad.shape
    torch.Size([8, 4])
    """

    def __init__(
        self,
        head_dim: int,
        npos: int,
        *,
        separate_keys: bool = False,
        d_model: int | None = None,
        kv_heads: int | None = None,
        nodiv: bool = False,
    ):
        super().__init__()
        where = "fastpe.nn.CopeBias"
        _check.count(where, "head_dim", head_dim, 1)
        _check.count(where, "npos", npos, 1)
        if separate_keys != (d_model is not None) or separate_keys != (kv_heads is not None):
            raise ValueError(f"{where}: d_model and kv_heads go with separate_keys=True")
        self.nodiv, self.d_model = nodiv, d_model
        self.table = torch.nn.Parameter(torch.zeros(head_dim, npos))
        self.gate = None
        if separate_keys:
            _check.count(where, "d_model", d_model, 1)
            _check.count(where, "kv_heads", kv_heads, 1)
            self.gate = torch.nn.Linear(d_model, kv_heads * head_dim, bias=False)

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.table)
        if self.gate is not None:
            self.gate.reset_parameters()

    def forward(self, x: Tensor | None = None) -> bias.Cope:
        """The bias; x (B, Nk, d_model), the keys' hidden states, only for separate_keys."""
        if self.gate is None:
            return bias.Cope(self.table, nodiv=self.nodiv)
        _check_hidden("fastpe.nn.CopeBias", x, self.d_model)
        keys = self.gate(x).unflatten(-1, (-1, self.table.shape[0])).transpose(1, 2)
        return bias.Cope(self.table, keys, nodiv=self.nodiv)
