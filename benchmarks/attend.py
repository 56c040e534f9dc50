"""Attention cases: fastpe's call, its peers, and the check of both against the definition.

Checked at the timed shape: with a gradient of out that is zero except in the last rows, out in those rows and every
gradient equal those of a call with these rows alone, which the dense float64 definition computes in little memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch._functorch.config as functorch
import torch.nn.functional as F
from registry import PASSES, Case, Tensor, Work, Wrong
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastpe
from fastpe.testing import compare

ROWS = 64
BACKENDS = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION}
GPU_ONLY = (*BACKENDS, "flash-attn", "xformers")

# Largest error of a peer, relative to the largest entry: what shows that it computes the same thing, forward and backward.
PEER_TOLERANCE = {"fp32": (1e-3, 1e-2), "bf16": (5e-2, 1e-1), "fp16": (1e-2, 5e-2)}


def sdpa(q: Tensor, k: Tensor, v: Tensor, **kwargs) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **kwargs)


class Attention:
    """Builds the Work of one attention case.

    Args:
        case, wanted: as a family gets them.
        params: what the method learns, by name; float32. They are leaves of the passes with a gradient.
        kwargs: (params, rows) -> the arguments of fastpe.attention, all rows (rows None) or the last `rows` of them, from
            params in the dtype they come in.
        causal: the call is causal.
        pairs: visible query-key pairs of one head, for the FLOP count; default all, or the causal half.
        loose: tolerance of "fastpe" instead of the usual one (for functions that jump).
    """

    def __init__(
        self,
        case: Case,
        wanted: frozenset[str],
        params: dict[str, Tensor] | None = None,
        kwargs: Callable[[dict[str, Tensor], int | None], dict] = lambda p, rows: {},
        *,
        causal: bool = True,
        pairs: float | None = None,
        loose: float | None = None,
    ):
        self.case, self.wanted, self.kwargs, self.causal, self.loose = case, wanted, kwargs, causal, loose
        s, dtype = case.shape, case.torch_dtype
        g = torch.Generator().manual_seed(0)

        def draw(heads: int, n: int) -> Tensor:
            return torch.randn(s.B, heads, n, s.D, generator=g).to(case.device, dtype).requires_grad_(case.trains)

        self.q, self.k, self.v = draw(s.H, s.Nq), draw(s.Hk, s.Nk), draw(s.Hk, s.Nk)
        self.params = {n: p.to(case.device).requires_grad_(case.trains) for n, p in (params or {}).items()}
        self.dout = torch.randn(s.B, s.H, s.Nq, s.D, generator=g).to(case.device, dtype)
        self.rows = min(ROWS, s.Nq)
        self.probe = torch.zeros_like(self.dout)
        self.probe[:, :, s.Nq - self.rows :] = self.dout[:, :, s.Nq - self.rows :]
        self._candidates: dict[str, tuple[Callable[[], Tensor], list[Tensor], Callable, bool]] = {}
        self._wanted_values: dict[tuple, tuple] = {}
        self.pairs = pairs if pairs is not None else s.Nq * s.Nk - (s.Nq * s.Nq / 2 if causal else 0)
        self.add("fastpe", lambda: self.fused(**self.kwargs(self.params, None)), list(self.params))

    def fused(self, **kwargs) -> Tensor:
        return fastpe.attention(self.q, self.k, self.v, is_causal=self.causal, **kwargs)

    def add(
        self,
        name: str,
        attend: Callable[[], Tensor],
        params: list[str] | tuple[str, ...] = (),
        kwargs: Callable[[dict[str, Tensor], int | None], dict] | None = None,
    ) -> None:
        """A candidate: attend() -> out, differentiated for q, k, v and the named params. `kwargs`: what it computes, in the
        form of the constructor's, where that is not what "fastpe" computes."""
        if name in self.wanted or name == "fastpe":
            leaves = [self.q, self.k, self.v, *(self.params[p] for p in params)]
            self._candidates[name] = attend, leaves, kwargs or self.kwargs, name == "fastpe" or name.startswith("fastpe ")

    def add_plain(self) -> None:
        """Attention without what the method adds: fastpe's, and scaled_dot_product_attention's."""
        self.add("fastpe none", lambda: self.fused(), kwargs=lambda p, rows: {})
        self.add("sdpa", lambda: sdpa(self.q, self.k, self.v, is_causal=self.causal), kwargs=lambda p, rows: {})
        if self.case.device == "cuda":
            for name, backend in BACKENDS.items():
                self.add(name, self._by_backend(backend), kwargs=lambda p, rows: {})
            self.add("flash-attn", self.flash_attn, kwargs=lambda p, rows: {})
            self.add("xformers", self._xformers, kwargs=lambda p, rows: {})

    def _by_backend(self, backend: SDPBackend) -> Callable[[], Tensor]:
        def attend():
            with sdpa_kernel([backend]):
                return sdpa(self.q, self.k, self.v, is_causal=self.causal)

        return attend

    def flash_attn(self, slopes: Tensor | None = None) -> Tensor:
        from flash_attn import flash_attn_func

        q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))
        return flash_attn_func(q, k, v, causal=self.causal, alibi_slopes=slopes).transpose(1, 2)

    def _xformers(self) -> Tensor:
        from xformers.ops import LowerTriangularMask, memory_efficient_attention

        if self.case.shape.H != self.case.shape.Hk:
            raise NotImplementedError("grouped heads take five dimensions there")
        mask = LowerTriangularMask() if self.causal else None
        q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))
        return memory_efficient_attention(q, k, v, attn_bias=mask).transpose(1, 2)

    def add_dense(self, bias: Callable[[dict[str, Tensor]], Tensor]) -> None:
        """Peers that hold the bias as an array; bias(params) -> float32, broadcastable to (B, H, N, N).

        "mask": ready-made, without gradient, in scaled_dot_product_attention. "compiled": the written-out formula under
        torch.compile, with the bias formed, and its gradient, in the call.
        """
        s = self.case.shape
        hidden = torch.ones(s.Nq, s.Nk, dtype=torch.bool, device=self.case.device).triu(1 + s.Nk - s.Nq)
        if "mask" in self.wanted:
            with torch.no_grad():
                b = bias(self.params)
                b = b.masked_fill(hidden, -math.inf) if self.causal else b
                b = b.to(self.case.torch_dtype).expand(b.shape[0] if b.dim() == 4 else 1, s.H, s.Nq, s.Nk).contiguous()
            self.add("mask", lambda: sdpa(self.q, self.k, self.v, attn_mask=b))
        if "compiled" in self.wanted:
            names = list(self.params)
            functorch.donated_buffer = self.case.pass_ != "bwd"  # the pass that keeps its graph

            @torch.compile(dynamic=False)
            def formula(q, k, v, *params):
                group = q.shape[1] // k.shape[1]
                if group > 1:
                    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
                x = (q @ k.transpose(-1, -2)).float() / math.sqrt(s.D) + bias(dict(zip(names, params)))
                if self.causal:
                    x = x.masked_fill(hidden, -math.inf)
                return torch.softmax(x, -1).to(v.dtype) @ v

            self.add("compiled", lambda: formula(self.q, self.k, self.v, *self.params.values()), names)

    def add_column(self, key_term: Callable[[dict[str, Tensor]], Tensor]) -> None:
        """The bias as extra channels, for biases that are a term of the key (up to a term of the row, which cancels):
        key_term(params) -> (B|1, H, Nk) float32. One channel in float32, three in half precision; the value is padded
        because the fused CPU kernel wants equal head sizes."""
        s, dtype = self.case.shape, self.case.torch_dtype
        if "column" not in self.wanted or s.H != s.Hk or self.case.trains:
            return
        with torch.no_grad():
            t = (key_term(self.params) * math.sqrt(s.D))[..., None].expand(s.B, s.H, s.Nk, 1)
            high = t.to(dtype).float()
            middle = (t - high).to(dtype).float()
            terms = [t] if dtype == torch.float32 else [high, middle, t - high - middle]
            pad = -(s.D + len(terms)) % 8
            one = torch.ones(s.B, s.H, s.Nq, len(terms), device=t.device)
            q = F.pad(torch.cat([self.q.float(), one], -1), (0, pad)).to(dtype)
            k = F.pad(torch.cat([self.k.float(), *terms], -1), (0, pad)).to(dtype)
            v = F.pad(self.v, (0, q.shape[-1] - s.D))
        self.add("column", lambda: sdpa(q, k, v, is_causal=self.causal, scale=s.D**-0.5)[..., : s.D])

    def add_flex(self, score_mod: Callable | None, visible: Callable | None = None) -> None:
        """FlexAttention compiled; score_mod(params) -> the function of (score, b, h, i, j); visible(b, h, i, j) beside causality."""
        if "flex" not in self.wanted:
            return
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        s, causal = self.case.shape, self.causal

        def seen(b, h, i, j):
            x = i >= j if causal else i >= 0
            return x & visible(b, h, i, j) if visible is not None else x

        mask = create_block_mask(seen, None, None, s.Nq, s.Nk, device=self.case.device)
        mod = None if score_mod is None else score_mod(self.params)
        flex = torch.compile(flex_attention, dynamic=False)
        gqa = s.H != s.Hk
        self.add(
            "flex", lambda: flex(self.q, self.k, self.v, score_mod=mod, block_mask=mask, enable_gqa=gqa), list(self.params)
        )

    # -----------------------------------------------------------------------------------------------------------------

    def _definition(self, kwargs: Callable, names: tuple[str, ...], attention: Callable, wide: bool) -> tuple[Tensor, ...]:
        """out of the last rows and the gradients, by `attention`, from the numbers the kernels read."""
        main = torch.float64 if wide else self.case.torch_dtype
        r, s = self.rows, self.case.shape
        q, k, v = (x.detach().to(main).requires_grad_(self.case.trains) for x in (self.q[:, :, s.Nq - r :], self.k, self.v))
        params = {n: p.detach().to(torch.float64 if wide else p.dtype).requires_grad_(p.requires_grad) for n, p in self.params.items()}
        out = attention(q, k, v, is_causal=self.causal, **kwargs(params, r))
        if not self.case.trains:
            return (out,)
        grads = torch.autograd.grad(out, [q, k, v, *(params[n] for n in names)], self.dout[:, :, s.Nq - r :].to(out.dtype))
        return (out.detach(), *grads)

    def _expected(self, kwargs: Callable, leaves: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
        """By the float64 definition, and for half precision by plain torch in that precision."""
        names = tuple(n for n, p in self.params.items() if any(p is x for x in leaves))
        key = (kwargs, names)
        if key not in self._wanted_values:
            exact = self._definition(kwargs, names, fastpe.reference.attention, True)
            half = None if self.case.dtype == "fp32" else self._definition(kwargs, names, compare.eager_attention, False)
            self._wanted_values[key] = exact, half
        return self._wanted_values[key]

    def check(self, name: str) -> float:
        """The largest error of a candidate's out and gradients, relative to the largest entry."""
        attend, leaves, kwargs, ours = self._candidates[name]
        n = self.case.shape.Nq - self.rows
        with torch.set_grad_enabled(self.case.trains):
            out = attend()
        got = [out.detach()[:, :, n:]]
        if self.case.trains:
            dq, *others = torch.autograd.grad(out, leaves, self.probe)
            got += [dq[:, :, n:], *others]
        exact, half = self._expected(kwargs, leaves)
        # A parameter's gradient that is zero by definition (a term of the row alone cancels) is held to the size of the others.
        largest = max(float(w.abs().max()) for w in exact[1:]) if self.case.trains else 0.0
        worst = 0.0
        for i, (x, w) in enumerate(zip(got, exact, strict=True)):
            floor = 0.1 * largest if i > 3 else 0.0
            what = "out" if i == 0 else f"gradient {i} of {len(exact) - 1}"
            try:
                error = compare.error(x, w, floor=floor)
                if not ours:
                    allowed = PEER_TOLERANCE[self.case.dtype][i > 0]
                elif self.loose is not None:
                    allowed = self.loose
                elif half is None:
                    allowed = compare.TOLERANCE[torch.float32][i > 0]
                else:
                    own = max(compare.error(half[i], w, floor=floor), torch.finfo(self.case.torch_dtype).eps / 2)
                    allowed = 2 * own + 1e-5
            except AssertionError as e:
                raise Wrong(f"{what}: {e}") from None
            if not error <= allowed:
                raise Wrong(f"{what}: error {error:.2g} of the largest entry, allowed {allowed:.2g}")
            worst = max(worst, error)
        return worst

    def _call(self, name: str) -> Callable[[], object]:
        attend, leaves, _, _ = self._candidates[name]
        if self.case.pass_ == "fwd":

            def forward():
                with torch.no_grad():
                    return attend()

            return forward
        if self.case.pass_ == "fwd+bwd":
            return lambda: torch.autograd.grad(attend(), leaves, self.dout)
        out: list[Tensor] = []

        def backward():
            if not out:
                out.append(attend())
            return torch.autograd.grad(out[0], leaves, self.dout, retain_graph=True)

        return backward

    def work(self, **kwargs) -> Work:
        s = self.case.shape
        flop = 4.0 * s.B * s.H * self.pairs * s.D * PASSES[self.case.pass_]
        return Work({name: self._call(name) for name in self._candidates}, self.check, flop, **kwargs)
