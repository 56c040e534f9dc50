"""Additive biases and score modifiers: ALiBi, KERPLE, T5, Sandwich, Cable, forgetting gates, FIRE, CoPE, softcap ...

Peers of a bias: scaled_dot_product_attention without it ("sdpa"), with a ready-made dense mask ("mask"), with the bias as
extra channels ("column"); FlexAttention ("flex") and the written-out formula, both under torch.compile ("compiled");
x-transformers where it is installed.
"""

from __future__ import annotations

import math

import torch
from attend import GPU_ONLY, Attention
from registry import Case, Tensor, Work, family

import fastpe
from fastpe import bias as B

PLAIN = ("fastpe none", "sdpa")


def _uniform(*shape: int, low: float = 0.0, high: float = 1.0, seed: int = 1) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _distance(case: Case) -> Tensor:
    """I - j, int64 (Nq, Nk)."""
    s = case.shape
    return torch.arange(s.Nk - s.Nq, s.Nk, device=case.device)[:, None] - torch.arange(s.Nk, device=case.device)


def _key_index(case: Case) -> Tensor:
    return torch.arange(case.shape.Nk, device=case.device, dtype=torch.float32)


@family("none", peers=("sdpa", *GPU_ONLY))
def none(case: Case, wanted: frozenset[str]) -> Work:
    a = Attention(case, wanted)
    a.add_plain()
    return a.work()


@family("full", peers=("sdpa", *GPU_ONLY), shapes=("XS",))
def full(case: Case, wanted: frozenset[str]) -> Work:
    """Every key visible."""
    a = Attention(case, wanted, causal=False)
    a.add_plain()
    return a.work()


ALIBI = (*PLAIN, "fastpe fixed", "mask", "column", "flex", "compiled", "x-transformers", "flash-attn alibi")


def _alibi(case: Case, wanted: frozenset[str]) -> Attention:
    h = case.shape.H
    a = Attention(case, wanted, {"slopes": B.alibi_slopes(h)}, lambda p, rows: {"bias": B.Alibi(p["slopes"])})
    a.add_plain()
    return a


@family("alibi", peers=ALIBI)
def alibi(case: Case, wanted: frozenset[str]) -> Work:
    a = _alibi(case, wanted)
    fixed = a.params["slopes"].detach().clone()
    a.add("fastpe fixed", lambda: a.fused(bias=B.Alibi(fixed)))
    distance = _distance(case).clamp(min=0)
    a.add_dense(lambda p: -p["slopes"][:, None, None] * distance)
    a.add_column(lambda p: p["slopes"][None, :, None] * _key_index(case))

    def score_mod(p):
        slopes = p["slopes"]
        return lambda s, b, h, i, j: s - slopes[h] * (i - j)

    a.add_flex(score_mod)
    if "x-transformers" in wanted:
        a.add("x-transformers", _x_transformers(a))
    if case.device == "cuda":
        a.add("flash-attn alibi", lambda: a.flash_attn(fixed))
    return a.work()


def _x_transformers(a: Attention):
    """Its attention with its ALiBi; the bias is kept between calls."""
    modules = []

    def attend() -> Tensor:
        if not modules:
            from x_transformers.attend import Attend
            from x_transformers.x_transformers import AlibiPositionalBias

            h = a.case.shape.H
            if h != a.case.shape.Hk:
                raise NotImplementedError("x-transformers orders grouped heads otherwise")
            # Positions as AlibiPositionalBias counts them; slopes as fastpe's, so that both compute the same.
            position = AlibiPositionalBias(heads=h, total_heads=h, slopes=a.params["slopes"].detach().tolist()).to(a.case.device)
            modules.extend([Attend(causal=True, heads=h), position])
        n = a.q.shape[2]
        return modules[0](a.q, a.k, a.v, attn_bias=modules[1](n, n).to(a.q.dtype))[0]

    return attend


@family("alibi_skip", peers=("fastpe none",), shapes=("S1", "S2", "S2x2", "S2x4"))
def alibi_skip(case: Case, wanted: frozenset[str]) -> Work:
    """ALiBi as a user calls it: tiles that the decay has emptied are skipped."""
    return _alibi(case, wanted).work(skip_bound=None)


@family("kerple", peers=(*PLAIN, "mask", "compiled"))
def kerple(case: Case, wanted: frozenset[str]) -> Work:
    h = case.shape.H
    params = {"p": _uniform(h, low=0.1, high=1.1), "a": _uniform(h, low=0.1, high=1.1, seed=2)}
    a = Attention(case, wanted, params, lambda p, rows: {"bias": B.Kerple(p["p"], p["a"])})
    a.add_plain()
    distance = _distance(case).clamp(min=0)
    a.add_dense(lambda p: -p["p"][:, None, None] * torch.log1p(p["a"][:, None, None] * distance))
    return a.work()


@family("t5", peers=(*PLAIN, "mask", "compiled"))
def t5(case: Case, wanted: frozenset[str]) -> Work:
    table = torch.randn(32, case.shape.H, generator=torch.Generator().manual_seed(1))
    a = Attention(case, wanted, {"table": table}, lambda p, rows: {"bias": B.T5(p["table"], bidirectional=False)})
    a.add_plain()
    n = _distance(case).clamp(min=0)
    # Buckets of arXiv 1910.10683 as their code states them: 16 exact, 16 logarithmic up to 128.
    far = 16 + (torch.log(n.clamp(min=1).float() / 16) / math.log(128 / 16) * 16).long()
    bucket = torch.where(n < 16, n, far.clamp(max=31))
    a.add_dense(lambda p: p["table"][bucket].permute(2, 0, 1))
    return a.work()


@family("sandwich", peers=(*PLAIN, "mask"), passes=("fwd",))
def sandwich(case: Case, wanted: frozenset[str]) -> Work:
    h = case.shape.H
    a = Attention(case, wanted, kwargs=lambda p, rows: {"bias": B.Sandwich(h)})
    a.add_plain()
    distance = _distance(case).clamp(min=0).float()
    factor = h / (8.0 * torch.arange(1, h + 1, device=case.device))

    def dense(p):
        inverse = 10000.0 ** (-2 * torch.arange(64, device=case.device) / 128)
        return factor[:, None, None] * sum(torch.cos(distance * w) for w in inverse)

    a.add_dense(dense)
    return a.work()


def _increments(case: Case) -> Tensor:
    s = case.shape
    return -0.05 * _uniform(s.B, s.H, s.Nk)


@family("cable", peers=(*PLAIN, "fastpe fixed", "mask", "column", "compiled"))
def cable(case: Case, wanted: frozenset[str]) -> Work:
    """Increments alone (version 1); the same bias as forgetting gates."""
    a = Attention(case, wanted, {"x": _increments(case)}, lambda p, rows: {"bias": B.Cable(p["x"])})
    a.add_plain()
    fixed = a.params["x"].detach().clone()
    a.add("fastpe fixed", lambda: a.fused(bias=B.Cable(fixed)))

    def dense(p):
        c = p["x"].double().cumsum(-1).float()
        return c[..., :, None] - c[..., None, :]

    a.add_dense(dense)
    a.add_column(lambda p: -p["x"].double().cumsum(-1).float())
    return a.work()


@family("cable_weighted", peers=(*PLAIN, "mask", "compiled"))
def cable_weighted(case: Case, wanted: frozenset[str]) -> Work:
    """The published version: a weight per query row."""
    s = case.shape
    params = {"x": _increments(case), "g": _uniform(s.B, s.H, s.Nk, low=0.5, high=1.5, seed=2)}
    a = Attention(case, wanted, params, lambda p, rows: {"bias": B.Cable(p["x"], p["g"])})
    a.add_plain()

    def dense(p):
        c = p["x"].double().cumsum(-1).float()
        return p["g"][..., None] * (c[..., :, None] - c[..., None, :])

    a.add_dense(dense)
    return a.work()


@family("kernel_cable", peers=PLAIN)
def kernel_cable(case: Case, wanted: frozenset[str]) -> Work:
    a = Attention(case, wanted, {"x": _increments(case)}, lambda p, rows: {"bias": B.KernelCable(p["x"])})
    a.add_plain()
    return a.work()


@family("forget", peers=(*PLAIN, "mask", "flash-linear-attention"))
def forget(case: Case, wanted: frozenset[str]) -> Work:
    a = Attention(case, wanted, {"gates": _increments(case)}, lambda p, rows: {"bias": B.Forget(p["gates"])})
    a.add_plain()

    def dense(p):
        c = p["gates"].double().cumsum(-1).float()
        return c[..., :, None] - c[..., None, :]

    a.add_dense(dense)

    def fla() -> Tensor:
        from fla.ops.forgetting_attn import parallel_forgetting_attn

        q, k, v = (x.transpose(1, 2) for x in (a.q, a.k, a.v))
        return parallel_forgetting_attn(q, k, v, a.params["gates"].transpose(1, 2)).transpose(1, 2)

    if case.device == "cuda":
        a.add("flash-linear-attention", fla, ["gates"])
    return a.work()


@family("fire", peers=(*PLAIN, "compiled"), shapes=("XS", "S1"))
def fire(case: Case, wanted: frozenset[str]) -> Work:
    h = case.shape.H
    g = torch.Generator().manual_seed(1)
    params = {
        "w1": torch.rand(32, generator=g) * 2 - 1,
        "b1": torch.rand(32, generator=g) * 2 - 1,
        "w2": (torch.rand(h, 32, generator=g) * 2 - 1) * 32**-0.5,
        "b2": (torch.rand(h, generator=g) * 2 - 1) * 32**-0.5,
        "c": torch.tensor(0.1),
        "length": torch.tensor(512.0),
    }
    a = Attention(case, wanted, params, lambda p, rows: {"bias": B.Fire(*p.values())})
    a.add_plain()
    s = case.shape
    distance = _distance(case)
    row = torch.arange(s.Nk - s.Nq, s.Nk, device=case.device, dtype=torch.float32)[:, None]

    def dense(p):
        top = torch.log((p["c"] * torch.maximum(row, p["length"])).abs() + 1) + 1e-6
        x = torch.log((p["c"] * distance).abs() + 1) / top
        return (torch.relu(x[..., None] * p["w1"] + p["b1"]) @ p["w2"].T + p["b2"]).permute(2, 0, 1)

    a.add_dense(dense)
    return a.work()


def _cope(npos: int):
    def build(case: Case, wanted: frozenset[str]) -> Work:
        s = case.shape
        g = torch.Generator().manual_seed(1)
        # Waves: a count that one side rounds across a whole number then meets nearly the same slope on the other.
        n = torch.arange(npos) / max(npos - 1, 1)
        table = sum(torch.randn(s.D, 1, generator=g) * torch.cos(math.pi * k * n) for k in (1, 2))
        loose = 5e-3 if case.dtype == "fp32" else 0.1
        a = Attention(case, wanted, {"table": table}, lambda p, rows: {"bias": B.Cope(p["table"])}, loose=loose)
        a.add_plain()
        visible = _distance(case) >= 0

        @torch.compile(dynamic=False)
        def formula(q, k, v, table):
            """arXiv 2405.18719 as its listing writes it, the bias divided by sqrt(D) as in the released code."""
            group = q.shape[1] // k.shape[1]
            if group > 1:
                k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            logits = (q @ k.transpose(-1, -2)).float() * s.D**-0.5
            gates = torch.sigmoid(logits) * visible
            count = gates.flip(-1).cumsum(-1).flip(-1).clamp(max=table.shape[1] - 1)
            low, high = count.floor(), count.ceil()
            z = (q.float() @ table) * s.D**-0.5
            share = count - low
            b = share * z.gather(-1, high.long()) + (1 - share) * z.gather(-1, low.long())
            return torch.softmax((logits + b).masked_fill(~visible, -math.inf), -1).to(v.dtype) @ v

        a.add("compiled", lambda: formula(a.q, a.k, a.v, a.params["table"]), ["table"])
        return a.work()

    return build


for _npos in (64, 1024):
    family(f"cope{_npos}", peers=(*PLAIN, "compiled"), shapes=("XS", "S1"))(_cope(_npos))


@family("per_row_forget", peers=PLAIN, shapes=("XS", "S1"))
def per_row_forget(case: Case, wanted: frozenset[str]) -> Work:
    s = case.shape
    g = torch.Generator().manual_seed(1)
    params = {"gq": torch.randn(s.B, s.H, s.Nq, 32, generator=g), "gk": torch.randn(s.B, s.Hk, s.Nk, 32, generator=g)}

    def kwargs(p, rows):
        gq = p["gq"] if rows is None else p["gq"][:, :, p["gq"].shape[2] - rows :]
        return {"bias": B.PerRowForget(gq, p["gk"])}

    a = Attention(case, wanted, params, kwargs, loose=None if case.dtype == "fp32" else 0.1)
    a.add_plain()
    return a.work()


@family("dense", peers=(*PLAIN, "mask", "compiled"), shapes=("XS", "S1"))
def dense(case: Case, wanted: frozenset[str]) -> Work:
    """A bias that is an array, (1, H, N, N), with its gradient."""
    s = case.shape
    x = torch.randn(1, s.H, s.Nq, s.Nk, generator=torch.Generator().manual_seed(1))

    def kwargs(p, rows):
        return {"bias": B.Dense(p["x"] if rows is None else p["x"][:, :, s.Nq - rows :])}

    a = Attention(case, wanted, {"x": x}, kwargs)
    a.add_plain()
    a.add_dense(lambda p: p["x"])
    return a.work()


@family("softcap", peers=(*PLAIN, "flex"))
def softcap(case: Case, wanted: frozenset[str]) -> Work:
    a = Attention(case, wanted, kwargs=lambda p, rows: {"softcap": 30.0})
    a.add_plain()
    a.add_flex(lambda p: lambda s, b, h, i, j: 30.0 * torch.tanh(s / 30.0))
    return a.work()


@family("sink", peers=PLAIN)
def sink(case: Case, wanted: frozenset[str]) -> Work:
    params = {"sink": torch.randn(case.shape.H, generator=torch.Generator().manual_seed(1))}
    a = Attention(case, wanted, params, lambda p, rows: {"sink": p["sink"]})
    a.add_plain()
    return a.work()


@family("documents", peers=("flex",))
def documents(case: Case, wanted: frozenset[str]) -> Work:
    """Texts of 512 tokens packed into one sequence."""
    s = case.shape
    ids = torch.arange(s.Nk, device=case.device) // 512

    def kwargs(p, rows):
        q_ids = ids if rows is None else ids[s.Nk - rows :]
        return {"mask": fastpe.mask.documents(ids=q_ids, key_ids=ids)}

    whole, rest = divmod(s.Nk, 512)
    a = Attention(case, wanted, kwargs=kwargs, pairs=(whole * 512**2 + rest**2) / 2)
    a.add_flex(None, lambda b, h, i, j: ids[i] == ids[j])
    return a.work()


@family("window", peers=("fastpe none", "flex"), shapes=("S2",))
def window(case: Case, wanted: frozenset[str]) -> Work:
    """The last 1024 keys."""
    s, w = case.shape, 1024
    a = Attention(case, wanted, kwargs=lambda p, rows: {"mask": fastpe.mask.window(w)}, pairs=s.Nq * min(w, s.Nk) - min(w, s.Nk) ** 2 / 2)
    a.add_plain()
    a.add_flex(None, lambda b, h, i, j: i - j < w)
    return a.work()
