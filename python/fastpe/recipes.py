"""Published methods that are a combination of fastpe's parts: one function each.

Query, key and value are those of `fastpe.attention`, un-rotated: (B, H, Nq, D), (B, Hk, Nk, D), (B, Hk, Nk, Dv). Where the released
code and the paper of a method differ, the default follows the paper's rule and the other is an option. Unless said otherwise
everything is differentiable; what a function selects (lists, top-k) has no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from . import _check, mask as masks, positions as places, region as regions
from ._rope import Rope, check_choice
from .attention import attention
from .bias import Alibi, Bias, Dense, SegmentPairs
from .mass import attention_mass, attention_rows
from .merge import merge
from .rotary import apply_rotary

Tensor = torch.Tensor

# Numbers of gathered keys held at a time.
_GATHER = 1 << 24


def _result(out: Tensor, lse: Tensor, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    return (out, lse) if return_lse else out


def _wide(x: Tensor) -> Tensor:
    """float32, or float64 as it is: what scores and selections are made in."""
    return x if x.dtype == torch.float64 else x.float()


def _group(query: Tensor, key: Tensor) -> int:
    return query.shape[1] // key.shape[1]


# ---------------------------------------------------------------------------------------------------------------------
# Lists of keys and how to choose them


def list_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: Tensor,
    visible: Tensor | None = None,
    *,
    rope: Rope | None = None,
    positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Every row over a list of keys of its own. Costs what the listed keys cost, and gathers them.

    Args:
        lists: int (B, H, Nq, n), keys of each row, none twice.
        visible: bool, broadcastable to lists: False entries take no part.
        rope: rotates query and listed keys.
        positions: (Nq,), of the queries; for rope.
        key_positions: (n,), of the entries of a list; for rope. LongHeads and others number the keys anew.
        scale: default 1 / sqrt(D).
        return_lse: also return lse (B, H, Nq).

    Returns:
        out (B, H, Nq, Dv); rows with nothing visible give 0.

    Raises:
        TypeError, ValueError: lists of another shape, keys the call does not have.

    >>> import torch, fastpe
    >>> q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 9, 8)
    >>> fastpe.recipes.list_attention(q, k, k, torch.arange(4).expand(1, 2, 3, 4)).shape
    torch.Size([1, 2, 3, 8])
    """
    where = "fastpe.recipes.list_attention"
    (B, H, Nq, D), (_, Hk, Nk, Dv) = query.shape, value.shape
    _check.is_integer(where, "lists", lists)
    if lists.dim() != 4 or lists.shape[:3] != (B, H, Nq):
        raise ValueError(f"{where}: lists must be (B, H, Nq, n) = ({B}, {H}, {Nq}, n), got {_check.shape(lists)}")
    n = lists.shape[3]
    if lists.numel() and _check.can_read(lists):
        low, high = (int(x) for x in torch.aminmax(lists))
        if low < 0 or high >= Nk:
            raise ValueError(f"{where}: lists must lie in [0, {Nk}), got {low if low < 0 else high}")
    if visible is not None:
        visible = _check.is_bool(where, "visible", visible).expand(lists.shape)
    if rope is not None and (positions is None or key_positions is None):
        raise ValueError(f"{where}: rope needs positions and key_positions")
    rows = max(1, _GATHER // max(1, B * H * n * max(D, Dv)))
    outs, lses = [], []
    for i in range(0, Nq, rows):
        some = lists[:, :, i : i + rows].long()
        m = some.shape[2]
        flat = some.reshape(B, Hk, H // Hk * m * n, 1)
        k, v = (x.gather(2, flat.expand(-1, -1, -1, x.shape[3])).reshape(B * H * m, 1, n, x.shape[3]) for x in (key, value))
        q = query[:, :, i : i + rows].reshape(B * H * m, 1, 1, D)
        more = {}
        if visible is not None:
            more["mask"] = masks.padding(visible[:, :, i : i + rows].reshape(B * H * m, n))
        if rope is not None:
            at = positions[i : i + rows].expand(B, H, m).reshape(-1, 1)
            more |= {"rope": rope, "positions": at, "key_positions": key_positions[None]}
        out, lse = attention(q, k, v, scale=scale, return_lse=True, **more)
        outs.append(out.reshape(B, H, m, Dv))
        lses.append(lse.reshape(B, H, m))
    if not outs:
        return _result(query.new_zeros(B, H, 0, Dv), query.new_zeros(B, H, 0, dtype=_wide(query).dtype), return_lse)
    return _result(torch.cat(outs, 2), torch.cat(lses, 2), return_lse)


def top(scores: Tensor, k: int, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k largest scores of the last axis in torch.topk's order, and whether each was allowed.

    Args:
        scores: (..., n).
        k: cut to n.
        allowed: bool, broadcastable to scores.

    Returns:
        int64 (..., min(k, n)) and bool of the same shape: False where fewer than k were allowed.

    >>> import torch, fastpe
    >>> fastpe.recipes.top(torch.tensor([0.1, 0.9, 0.5]), 2)[0].tolist()
    [1, 2]
    """
    if allowed is not None:
        scores = torch.where(allowed, scores, -torch.inf)
    best = scores.topk(min(k, scores.shape[-1]), -1)
    return best.indices, best.values > -torch.inf


def cosine_top(query: Tensor, key: Tensor, k: int, threshold: float | None = None) -> tuple[Tensor, Tensor]:
    """The k keys most similar in direction to each query (Extended Mind Transformers, arXiv 2406.02332).

    Args:
        query: (B, H, Nq, D), rotated as in the attention that follows.
        key: (B, Hk, M, D), memories as stored.
        threshold: selected keys of cosine at most this count as not selected.

    Returns:
        int64 (B, H, Nq, k) and bool of the same shape.

    >>> import torch, fastpe
    >>> index, kept = fastpe.recipes.cosine_top(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 20, 8), 4)
    >>> index.shape, bool(kept.all())
    (torch.Size([1, 2, 3, 4]), True)
    """
    q = torch.nn.functional.normalize(_wide(query.detach()), dim=-1)
    m = torch.nn.functional.normalize(_wide(key.detach()), dim=-1).repeat_interleave(_group(query, key), 1)
    best = (q @ m.mT).topk(min(k, m.shape[2]), -1)
    kept = torch.ones_like(best.indices, dtype=torch.bool) if threshold is None else best.values > threshold
    return best.indices, kept


# ---------------------------------------------------------------------------------------------------------------------
# Parallel contexts


def pcw(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], *, rope: Rope, return_lse: bool = False):
    """Parallel context windows: windows that do not see each other, then a task that sees all (arXiv 2212.10947).

    Args:
        lengths: tokens of each window with its first token. Tokens are laid out as `fastpe.mask.pcw` says: the longest window,
            the others without their first token, the task. Queries are the last Nq.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 12, 8)
    >>> fastpe.recipes.pcw(q, q, q, [4, 5], rope=fastpe.rope.default(8)).shape
    torch.Size([1, 2, 12, 8])
    """
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    order = sorted(range(len(lengths)), key=lambda n: n != longest)
    p = places.parallel(1, [lengths[n] - 1 for n in order], key.shape[2]).to(key.device)
    where = {"positions": p[key.shape[2] - query.shape[2] :], "key_positions": p}
    return attention(query, key, value, rope=rope, mask=masks.pcw(lengths, device=key.device), return_lse=return_lse, **where)


def ape(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: int,
    lengths: Sequence[int],
    *,
    rope: Rope,
    temperature: float = 0.9,
    scale: float = 0.9,
    weight: str = "code",
) -> Tensor:
    """Adaptive parallel encoding: contexts read at a temperature, weighted against the rest (arXiv 2502.05431).

    Prefix, contexts and what follows are laid out as in `fastpe.mask.ape`. The rows behind the contexts attend to all contexts with
    scores divided by `temperature`, and to prefix and each other as usual; the lse L of the contexts enters the weights as
    c L.

    Args:
        prefix: tokens of the prefix.
        lengths: tokens of each context. Queries are all tokens, or the last ones.
        temperature: T.
        scale: S.
        weight: "code", c = S T (released), or "paper", c = S (its pseudo-code).

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 14, 8)
    >>> fastpe.recipes.ape(q, q, q, 2, [4, 5], rope=fastpe.rope.default(8)).shape
    torch.Size([1, 2, 14, 8])
    """
    where = "fastpe.recipes.ape"
    check_choice(where, "weight", weight, ("code", "paper"))
    temperature = _check.number(where, "temperature", temperature, positive=True)
    scale = _check.number(where, "scale", scale, positive=True)
    Nq, Nk, D = query.shape[2], key.shape[2], query.shape[3]
    split = prefix + sum(lengths)
    if Nk < split:
        raise ValueError(f"{where}: prefix and contexts have {split} tokens, the call has {Nk} keys")
    p = places.parallel(prefix, lengths, Nk).to(key.device)
    first = Nk - Nq  # the first query
    parts = []
    if first < split:
        q, at = query[:, :, : split - first], p[first:split]
        parts.append(
            attention(
                q, key[:, :, :split], value[:, :, :split], rope=rope, positions=at, key_positions=p[:split],
                mask=masks.ape(prefix, lengths, device=key.device),
            )  # fmt: skip
        )
    if split < Nk:
        q, at = query[:, :, max(split - first, 0) :], p[max(split, first) :]
        inside = slice(prefix, split)
        own = torch.cat((torch.arange(prefix), torch.arange(split, Nk))).to(key.device)
        contexts = attention(
            q, key[:, :, inside], value[:, :, inside], rope=rope, positions=at, key_positions=p[inside],
            scale=D**-0.5 / temperature, return_lse=True,
        )  # fmt: skip
        others = attention(
            q, key.index_select(2, own), value.index_select(2, own), rope=rope, positions=at, key_positions=p[own], is_causal=True,
            return_lse=True,
        )  # fmt: skip
        c = scale * (temperature if weight == "code" else 1.0)
        parts.append(merge(*zip(contexts, others), weights=[c, 1.0])[0])
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def structured_prompting(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: int,
    length: int,
    *,
    rope: Rope | None = None,
    slopes: Tensor | None = None,
    return_lse: bool = False,
):
    """Structured prompting: groups of demonstrations read side by side; test tokens count their own part once a group (arXiv 2212.06713).

    Scores of test rows with test keys get + log(groups). Positions start over in every group.

    Args:
        groups, length: groups of `length` tokens each, then the test tokens. Queries are all tokens, or the last ones.
        rope: for rotary models.
        slopes: (H,), ALiBi slopes, for models like BLOOM.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 16, 8)
    >>> fastpe.recipes.structured_prompting(q, q, q, 3, 4, rope=fastpe.rope.default(8)).shape
    torch.Size([1, 2, 16, 8])
    """
    Nq, Nk = query.shape[2], key.shape[2]
    p = places.parallel(0, [length] * groups, Nk).to(key.device)
    test = (torch.arange(Nk, device=key.device) >= groups * length).long()
    own = torch.tensor([[0.0, 0.0], [0.0, math.log(groups)]], dtype=torch.float64, device=key.device)
    bias: Bias = SegmentPairs(test, bias=own)
    if slopes is not None:
        bias = bias + Alibi(slopes, positions=p)
    more = {} if rope is None else {"rope": rope, "positions": p[Nk - Nq :], "key_positions": p}
    seen = masks.structured_prompting(groups, length, device=key.device)
    return attention(query, key, value, bias=bias, mask=seen, return_lse=return_lse, **more)


def branch_log_weights(scores: Tensor, temperature: float = 0.1, top_k: int | None = None) -> Tensor:
    """Superposition prompting's weights of the documents: log p - max log p, p = softmax(scores / temperature) (arXiv 2404.06910).

    Args:
        scores: (documents,), log-likelihoods of the paths.
        temperature: 0.1 in the release's functions, 0.01 in its published settings.
        top_k: the others get -inf and are to be hidden.

    >>> import torch, fastpe
    >>> fastpe.recipes.branch_log_weights(torch.tensor([-2.0, -1.5, -2.2]), 0.5, top_k=2)
    tensor([-1.,  0., -inf])
    """
    w = _wide(scores) / _check.number("fastpe.recipes.branch_log_weights", "temperature", temperature, positive=True)
    w = w - w.amax()
    if top_k is not None and top_k < w.numel():
        kept = torch.zeros_like(w, dtype=torch.bool).scatter(0, w.topk(top_k).indices, True)
        w = torch.where(kept, w, -torch.inf)
    return w


def superposition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    preamble: int,
    contexts: Sequence[int],
    length: int,
    *,
    rope: Rope,
    log_weights: Tensor | None = None,
    kind: str = "equilibrium",
    return_lse: bool = False,
):
    """Superposition prompting: every document with its own copy of the query, then the task (arXiv 2404.06910).

    Args:
        preamble, contexts, length: tokens before all, of each document, and of the query behind each. Queries are all tokens, or the
            last ones.
        log_weights: (documents,), added to the scores of task rows with a document's tokens; -inf hides it. From
            `branch_log_weights`. Differentiable.
        kind: as in `fastpe.positions.superposition`.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 20, 8)
    >>> fastpe.recipes.superposition(q, q, q, 2, [3, 4], 3, rope=fastpe.rope.default(8)).shape
    torch.Size([1, 2, 20, 8])
    """
    Nq, Nk, device = query.shape[2], key.shape[2], key.device
    p = places.superposition(preamble, contexts, length, Nk, kind).to(device)
    hidden, bias = (), None
    if log_weights is not None:
        n = len(contexts)
        if log_weights.shape != (n,):
            raise ValueError(f"fastpe.recipes.superposition: log_weights must be ({n},), got {_check.shape(log_weights)}")
        pruned = log_weights.detach() == -torch.inf
        hidden = tuple(pruned.nonzero()[:, 0].tolist())
        # Segments: 0 before the documents, 1 .. n documents, n + 1 the task.
        counts = torch.tensor([preamble, *(x + length for x in contexts), Nk - preamble - sum(contexts) - length * n], device=device)
        segment = torch.repeat_interleave(torch.arange(n + 2, device=device), counts)
        row = torch.nn.functional.pad(torch.where(pruned, 0.0, log_weights), (1, 1))
        bias = SegmentPairs(segment, bias=torch.cat((row.new_zeros(n + 1, n + 2), row[None])))
    seen = masks.superposition(preamble, contexts, length, hidden=hidden, device=device)
    return attention(
        query, key, value, rope=rope, positions=p[Nk - Nq :], key_positions=p, mask=seen, bias=bias, return_lse=return_lse
    )


def ccm_merge(key: Tensor, value: Tensor, marks: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values for CCM's "merge": those of the m-th sum token of a run are the mean over the m-th compression tokens of all runs
    so far (arXiv 2312.03414).

    Goes with `fastpe.mask.compressed(marks, "merge", sums)` and attention without a rope: the keys are averaged rotated.

    Args:
        key, value: (B, Hk, N, D) and (B, Hk, N, Dv), rotated keys.
        marks, sums: bool (N,), compression and sum tokens; every run of sum tokens is as long as the runs of compression tokens.

    Raises:
        ValueError: runs that do not match.

    >>> import torch, fastpe
    >>> tokens = torch.tensor([0, 0, 1, 2, 0, 1, 2, 0])
    >>> k = torch.randn(1, 1, 8, 8)
    >>> merged, _ = fastpe.recipes.ccm_merge(k, k, tokens == 1, tokens == 2)
    >>> torch.allclose(merged[0, 0, 6], (k[0, 0, 2] + k[0, 0, 5]) / 2)
    True
    """
    n, device = key.shape[2], key.device
    j = torch.arange(n, device=device)
    place = places.compressed(marks.long() + 2 * sums.long()) - torch.where(marks | sums, 0, j)
    place = place - ((~(marks | sums)).long().cumsum(-1) - 1)  # 1, 2, ... inside a run
    if not torch.equal(place[sums].bincount(), place[marks].bincount()):
        raise ValueError("fastpe.recipes.ccm_merge: every run of sums must be as long as the run of marks before it")
    pick = marks[None, :] & sums[:, None] & (place[:, None] == place[None, :]) & (j[None, :] < j[:, None])
    mean = pick.double() / pick.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(sums[:, None], mean, torch.eye(n, dtype=torch.float64, device=device))
    rows = sums.nonzero()[:, 0]
    return tuple(x.index_copy(2, rows, (mean[rows].to(_wide(x).dtype) @ _wide(x)).to(x.dtype)) for x in (key, value))


# ---------------------------------------------------------------------------------------------------------------------
# Greedy logit interpolation


def gali(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    rope: Rope,
    train_length: int,
    local_window: int = 128,
    chunk: int | float = 3000,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    draws: Sequence[Tensor] | None = None,
) -> Tensor:
    """GALI: positions in between are met by interpolating logits (arXiv 2502.02659). Prefill; decoding is the call with one query.

    Rows are read in chunks: the first train_length plainly; each later one at `fastpe.positions.gali` of the length so far. A query
    stands at the ceiling of its position; a key between two whole positions is mixed of its rotations to both, which is the
    same as interpolating its logits.

    Args:
        train_length: trained length of the model.
        local_window: tokens whose positions stay whole at least.
        chunk: tokens of a chunk, or a share of the text (float).
        noise: standard deviation at full distance of the Gaussian noise on interpolated logits; 0: none (the release uses 1 in
            some settings).
        generator: for the noise.
        draws: the noise of each later chunk, standard normal (B, H, rows, keys), instead of the generator's.

    Raises:
        TypeError, ValueError: lengths that do not fit.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 40, 8)
    >>> fastpe.recipes.gali(q, q, q, rope=fastpe.rope.default(8), train_length=16, local_window=4, chunk=12).shape
    torch.Size([1, 2, 40, 8])
    """
    where = "fastpe.recipes.gali"
    noise = _check.number(where, "noise", noise)
    Nq, N, device = query.shape[2], key.shape[2], key.device
    size = int(N * chunk) if isinstance(chunk, float) else chunk
    _check.count(where, "chunk", size, 1)
    first = N - Nq
    edges = [0, *range(min(train_length, N), N, size), N]
    outs, drawn = [], 0
    for begin, end in zip(edges, edges[1:]):
        later = begin >= train_length
        drawn += later
        if end <= first:
            continue
        begin = max(begin, first)
        numerators, steps = places.gali_fractions(where, end, train_length, local_window)
        numerators = numerators.to(device)
        low, ceil = numerators // steps, -(-numerators // steps)
        share = (ceil * steps - numerators).double() / steps
        q = apply_rotary(query[:, :, begin - first : end - first], rope, ceil[begin:end])
        high_k, low_k = (apply_rotary(key[:, :, :end], rope, p) for p in (ceil, low))
        mixed = torch.lerp(_wide(high_k), _wide(low_k), share[:, None].to(_wide(key).dtype)).to(key.dtype)
        bias = None
        if noise and later:
            shape = query.shape[0], query.shape[1], end - begin, end
            z = draws[drawn - 1] if draws is not None else torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
            i, j = torch.arange(begin, end, device=device)[:, None], torch.arange(end, device=device)
            bias = Dense(z[:, :, -(end - begin) :] * torch.where(share != 0, (i - j) / end * noise, 0.0))
        outs.append(attention(q, mixed, value[:, :, :end], bias=bias, is_causal=True))
    return torch.cat(outs, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Chunks chosen by every row


def longheads_chunk_keys(query: Tensor, key: Tensor, value: Tensor, *, rope: Rope, chunk: int = 256) -> Tensor:
    """LongHeads' summary of every full chunk (arXiv 2402.10685).

    Inside a chunk, with positions 0 .. chunk - 1, every token attends to all; the mean of the outputs is the query that pools the
    rotated keys by attention.

    Args:
        query, key, value: (B, H, N, D), (B, Hk, N, D), (B, Hk, N, D) of all tokens.

    Returns:
        (B, H, N // chunk, D).

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 20, 8)
    >>> fastpe.recipes.longheads_chunk_keys(q, q, q, rope=fastpe.rope.default(8), chunk=8).shape
    torch.Size([1, 2, 2, 8])
    """
    where = "fastpe.recipes.longheads_chunk_keys"
    _check.count(where, "chunk", chunk, 1)
    if value.shape[3] != key.shape[3]:
        raise ValueError(f"{where}: value must have key's {key.shape[3]} channels, got {value.shape[3]}")
    B, H, N, D = query.shape
    chunks = N // chunk

    def cut(x: Tensor) -> Tensor:
        x = x[:, :, : chunks * chunk].reshape(B, x.shape[1], chunks, chunk, D)
        return x.transpose(1, 2).reshape(B * chunks, -1, chunk, D)

    at = torch.arange(chunk, device=key.device)
    q, k = apply_rotary(cut(query), rope, at), apply_rotary(cut(key), rope, at)
    pooled = attention(q, k, cut(value)).mean(2, keepdim=True)
    return attention(pooled, k, k).reshape(B, chunks, H, D).transpose(1, 2)


def longheads_select(query: Tensor, chunk_keys: Tensor, row: Tensor, chunk: int, count: int) -> Tensor:
    """Chunks every row attends to: the first, the one before its own, its own, and the best others; ascending.

    Args:
        query: (B, H, Nq, D), un-rotated.
        chunk_keys: (B, H, chunks, D) from `longheads_chunk_keys`.
        row: (Nq,), absolute index of every query; each must have `count` chunks up to its own.
        count: chunks in all, at least 3.

    Returns:
        int64 (B, H, Nq, count).

    >>> import torch, fastpe
    >>> q, c = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 9, 8)
    >>> fastpe.recipes.longheads_select(q, c, torch.tensor([79]), 8, 4)[0, 0, 0, [0, 2, 3]].tolist()
    [0, 8, 9]
    """
    own = torch.div(row, chunk, rounding_mode="floor")[:, None]
    scores = _wide(query.detach()) @ _wide(chunk_keys.detach()).mT
    c = torch.arange(chunk_keys.shape[2], device=query.device)
    chosen, _ = top(scores, count - 3, (c > 0) & (c < own - 1))
    fixed = torch.cat((torch.zeros_like(own), own - 1, own), -1).expand(*scores.shape[:3], 3)
    return torch.cat((chosen, fixed), -1).sort(-1).values


def longheads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    rope: Rope,
    chunk_keys: Tensor | None = None,
    chunk: int = 256,
    length: int = 4096,
    begin: int | None = None,
    include_self: bool = True,
) -> Tensor:
    """LongHeads: every head and row attends to chunks of its own choice, numbered anew (arXiv 2402.10685). Inference only.

    With K = length / chunk, a row attends to K chunks (`longheads_select`), their keys at positions 0, 1, ...; the query stands at
    (K - 1) chunk + I mod chunk. Rows below `begin` attend to all keys at plain positions.

    Args:
        chunk_keys: summaries, from `longheads_chunk_keys`; made from the call if not given, which needs Nq = Nk.
        chunk, length: tokens of a chunk and of what a row attends to, a multiple of it, at least 3 chunks.
        begin: the first row that chooses; length if not given.
        include_self: whether a row sees its own key. The released prefill does not, its decoding does.

    Raises:
        TypeError, ValueError: lengths that do not fit.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 50, 8)
    >>> fastpe.recipes.longheads(q, q, q, rope=fastpe.rope.default(8), chunk=8, length=32).shape
    torch.Size([1, 2, 50, 8])
    """
    where = "fastpe.recipes.longheads"
    _check.count(where, "chunk", chunk, 1)
    _check.count(where, "length", length, 3 * chunk)
    count, left_over = divmod(length, chunk)
    if left_over:
        raise ValueError(f"{where}: length must be a multiple of chunk {chunk}, got {length}")
    begin = length if begin is None else _check.count(where, "begin", begin, (count - 1) * chunk)
    Nq, Nk, device = query.shape[2], key.shape[2], key.device
    if chunk_keys is None:
        if Nq != Nk:
            raise ValueError(f"{where}: chunk_keys are needed with {Nq} queries and {Nk} keys")
        chunk_keys = longheads_chunk_keys(query, key, value, rope=rope, chunk=chunk)
    plain = min(max(begin - (Nk - Nq), 0), Nq)  # rows that do not choose
    parts = []
    if plain:
        n = Nk - Nq + plain
        parts.append(attention(query[:, :, :plain], key[:, :, :n], value[:, :, :n], rope=rope, is_causal=True))
    if plain < Nq:
        row = torch.arange(Nk - Nq + plain, Nk, device=device)
        q = query[:, :, plain:]
        at = (count - 1) * chunk + row % chunk
        entry = torch.arange(length, device=device)
        visible = entry < at[:, None] + include_self
        chosen = longheads_select(q, chunk_keys, row, chunk, count)
        lists = (chosen[..., None] * chunk + torch.arange(chunk, device=device)).flatten(-2).clamp(max=Nk - 1)
        parts.append(list_attention(q, key, value, lists, visible, rope=rope, positions=at, key_positions=entry))
    return torch.cat(parts, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Keys chosen by clusters, principal components, code books


def cluster_centroids(key: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Mean and number of the keys of every cluster (Squeezed Attention, arXiv 2411.09688).

    Args:
        key: (B, Hk, N, D), rotated, not normalised. (The labels come from k-means on normalised keys.)
        labels: int (B, Hk, N) in [0, clusters).

    Returns:
        (B, Hk, clusters, D) in float32 or float64, and int64 (B, Hk, clusters); empty clusters have mean 0.

    >>> import torch, fastpe
    >>> c, n = fastpe.recipes.cluster_centroids(torch.randn(1, 2, 6, 8), torch.tensor([0, 1, 0, 1, 1, 0]).expand(1, 2, 6), 2)
    >>> c.shape, n[0, 0].tolist()
    (torch.Size([1, 2, 2, 8]), [3, 3])
    """
    k = _wide(key)
    total = k.new_zeros(*k.shape[:2], clusters, k.shape[3]).scatter_add(2, labels[..., None].expand_as(k), k)
    counts = labels.new_zeros(*labels.shape[:2], clusters).scatter_add(2, labels, torch.ones_like(labels))
    return total / counts.clamp(min=1)[..., None], counts


def cluster_scores(query: Tensor, centroids: Tensor, counts: Tensor, *, scale: float | None = None) -> Tensor:
    """Squeezed Attention's share of a key of each cluster, averaged over the rows (arXiv 2411.09688).

    S(i, c) = exp(s q_i C_c) / sum_c' n_c' exp(s q_i C_c'); the score of c is its mean over i.

    Args:
        query: (B, H, Nq, D), rotated.
        centroids, counts: from `cluster_centroids`.
        scale: default 1 / sqrt(D).

    Returns:
        (B, H, clusters) float32 or float64.

    >>> import torch, fastpe
    >>> c, n = fastpe.recipes.cluster_centroids(torch.randn(1, 2, 6, 8), torch.arange(6).expand(1, 2, 6) // 3, 2)
    >>> s = fastpe.recipes.cluster_scores(torch.randn(1, 2, 4, 8), c, n)
    >>> torch.allclose((s * n).sum(-1), torch.ones(1, 2))                     # shares of all keys
    True
    """
    group = _group(query, centroids)
    c, n = centroids.repeat_interleave(group, 1), counts.repeat_interleave(group, 1)
    logits = _wide(query) @ c.to(_wide(query).dtype).mT * (query.shape[3] ** -0.5 if scale is None else scale)
    weight = n[:, :, None].log().to(logits.dtype)
    return (logits - torch.logsumexp(logits + weight, -1, keepdim=True)).exp().mean(2)


def squeezed_threshold(query: Tensor, centroids: Tensor, counts: Tensor, labels: Tensor, quantile: float) -> Tensor:
    """The score that `quantile` of the keys of all heads stay below, by the queries of the observation window (arXiv 2411.09688).

    Args:
        query: (B, H, W, D), the last queries of the fixed prefix, rotated.
        quantile: in [0, 1]; the release offers 0.5, 0.7, 0.8, 0.9.

    Returns:
        a scalar tensor.

    >>> import torch, fastpe
    >>> labels = torch.arange(6).expand(1, 2, 6) // 3
    >>> c, n = fastpe.recipes.cluster_centroids(torch.randn(1, 2, 6, 8), labels, 2)
    >>> fastpe.recipes.squeezed_threshold(torch.randn(1, 2, 4, 8), c, n, labels, 0.7).shape
    torch.Size([])
    """
    scores = cluster_scores(query, centroids, counts)
    by_key = scores.gather(-1, labels.repeat_interleave(_group(query, centroids), 1))
    return torch.quantile(by_key.flatten(), quantile)


def squeezed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fixed_key: Tensor,
    fixed_value: Tensor,
    labels: Tensor,
    centroids: Tensor,
    counts: Tensor,
    threshold: float | Tensor,
    *,
    return_lse: bool = False,
):
    """Squeezed Attention: of a fixed prefix only keys in clusters that score above a threshold (arXiv 2411.09688).

    Rotated inputs. All rows see the kept keys of the prefix, and the keys of the call causally. Cost: the kept keys.

    Args:
        fixed_key, fixed_value: (B, Hk, F, D) and (B, Hk, F, Dv). Those behind the labelled ones, the observation window, are always
            kept.
        labels: int (B, Hk, L), L <= F.
        centroids, counts: from `cluster_centroids`.
        threshold: a key is kept if the score of its cluster is larger; from `squeezed_threshold`.

    >>> import torch, fastpe
    >>> labels, fixed = torch.arange(6).expand(1, 2, 6) // 3, torch.randn(1, 2, 8, 8)
    >>> c, n = fastpe.recipes.cluster_centroids(fixed[:, :, :6], labels, 2)
    >>> q = torch.randn(1, 2, 4, 8)
    >>> fastpe.recipes.squeezed(q, q, q, fixed, fixed, labels, c, n, 0.16).shape
    torch.Size([1, 2, 4, 8])
    """
    kept = squeezed_keep(query, centroids, counts, labels, threshold, fixed_key.shape[2])
    (B, H, Nq, D), n = query.shape, int(kept.sum(-1).max()) if kept.numel() else 0
    # The kept keys of every query head in front, and how many they are.
    order = torch.argsort(~kept, dim=-1, stable=True)[..., :n]
    here = kept.gather(-1, order).reshape(B * H, n)
    packed = []
    for x in (fixed_key, fixed_value):
        x = x.repeat_interleave(H // x.shape[1], 1)
        packed.append(x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[3])).reshape(B * H, 1, n, x.shape[3]))
    out, lse = attention(query.reshape(B * H, 1, Nq, D), *packed, mask=masks.padding(here), return_lse=True)
    own = attention(query, key, value, is_causal=True, return_lse=True)
    out, lse = merge((out.reshape(B, H, Nq, -1), own[0]), (lse.reshape(B, H, Nq), own[1]))
    return _result(out, lse, return_lse)


def squeezed_keep(query: Tensor, centroids: Tensor, counts: Tensor, labels: Tensor, threshold: float | Tensor, fixed: int) -> Tensor:
    """Which of `fixed` prefix keys Squeezed Attention keeps: bool (B, H, fixed).

    >>> import torch, fastpe
    >>> labels, k = torch.arange(6).expand(1, 2, 6) // 3, torch.randn(1, 2, 6, 8)
    >>> c, n = fastpe.recipes.cluster_centroids(k, labels, 2)
    >>> fastpe.recipes.squeezed_keep(torch.randn(1, 2, 4, 8), c, n, labels, 1.0, 8)[0, 0].tolist()
    [False, False, False, False, False, False, True, True]
    """
    scores = cluster_scores(query.detach(), centroids, counts)
    by_key = scores.gather(-1, labels.repeat_interleave(_group(query, centroids), 1))
    return torch.nn.functional.pad(by_key > threshold, (0, fixed - labels.shape[-1]), value=True)


def loki_select(query: Tensor, key: Tensor, basis: Tensor, r: int, k: int) -> tuple[Tensor, Tensor]:
    """Loki's choice: keys of the largest scores in the first r principal components, causal (arXiv 2406.02542).

    Args:
        query, key: rotated.
        basis: (H, D, D) or (B, H, D, D), principal components as columns, of the rotated keys of each query head.
        r, k: components and keys.

    Returns:
        int64 (B, H, Nq, k) and bool of the same shape: False where a row sees fewer.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 9, 8)
    >>> fastpe.recipes.loki_select(q, q, torch.eye(8).expand(2, 8, 8), 4, 3)[0].shape
    torch.Size([1, 2, 9, 3])
    """
    basis = _wide(basis)[..., :r]
    q, k_ = _wide(query.detach()) @ basis, _wide(key.detach()).repeat_interleave(_group(query, key), 1) @ basis
    Nq, Nk = query.shape[2], key.shape[2]
    rows = max(1, _GATHER // max(1, q.shape[0] * q.shape[1] * Nk))
    j, chosen = torch.arange(Nk, device=q.device), []
    for i in range(0, max(Nq, 1), rows):
        row = torch.arange(i, min(i + rows, Nq), device=q.device)[:, None] + (Nk - Nq)
        chosen.append(top(q[:, :, i : i + rows] @ k_.mT, k, j <= row))
    return tuple(torch.cat(x, 2) for x in zip(*chosen))


def loki(query: Tensor, key: Tensor, value: Tensor, basis: Tensor, *, r: int, k: int, return_lse: bool = False):
    """Loki: exact attention over the k keys that score best in r principal components (arXiv 2406.02542). Rotated inputs.

    Args:
        basis, r, k: as in `loki_select`.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 9, 8)
    >>> fastpe.recipes.loki(q, q, q, torch.eye(8).expand(2, 8, 8), r=4, k=3).shape
    torch.Size([1, 2, 9, 8])
    """
    return list_attention(query, key, value, *loki_select(query, key, basis, r, k), return_lse=return_lse)


def codebook_ids(key: Tensor, codebook: Tensor) -> Tensor:
    """The nearest entry of a code book for each un-rotated key (A2ATS, arXiv 2502.12665).

    Args:
        key: (B, Hk, N, D).
        codebook: (Hk, C, D).

    Returns:
        int64 (B, Hk, N).

    >>> import torch, fastpe
    >>> fastpe.recipes.codebook_ids(torch.randn(1, 2, 5, 8), torch.randn(2, 16, 8)).shape
    torch.Size([1, 2, 5])
    """
    return torch.cdist(_wide(key), _wide(codebook)[None].expand(key.shape[0], -1, -1, -1)).argmin(-1)


def a2ats_select(
    query: Tensor, ids: Tensor, codebook: Tensor, *, rope: Rope, window: int = 64, far: float = 2048.0, sinks: int = 8, share: float = 0.03
) -> Tensor:
    """A2ATS' choice at one decoding step, the same for the query heads of a key head (arXiv 2502.12665).

    Keys are ranked by the WRoPE score of their code book entry, the query at position `far`; the best int(share N) of every query
    head, their union over the heads of a group, the first `sinks` keys and the last `window`.

    Args:
        query: (B, H, 1, D), un-rotated, of the last token.
        ids: (B, Hk, N) from `codebook_ids`.
        codebook: (Hk, C, D).

    Returns:
        bool (B, Hk, N).

    >>> import torch, fastpe
    >>> q, k, book = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 40, 8), torch.randn(2, 4, 8)
    >>> seen = fastpe.recipes.a2ats_select(q, fastpe.recipes.codebook_ids(k, book), book, rope=fastpe.rope.default(8), window=4, sinks=2)
    >>> seen[0, 0].sum().item()
    7
    """
    B, Hk, N = ids.shape
    group = query.shape[1] // Hk
    at = torch.tensor([far], dtype=torch.float64, device=query.device)
    q = apply_rotary(_wide(query.detach()), rope, at)
    scores = (q @ _wide(codebook).repeat_interleave(group, 0).mT)[:, :, 0].gather(-1, ids.repeat_interleave(group, 1))
    j = torch.arange(N, device=ids.device)
    always = (j < sinks) | (N - 1 - j < window)
    index, allowed = top(scores, int(share * N), ~always)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, allowed)
    return chosen.reshape(B, Hk, group, N).any(2) | always


def a2ats(query: Tensor, key: Tensor, value: Tensor, codebook: Tensor, *, rope: Rope, ids: Tensor | None = None, **selection) -> Tensor:
    """A2ATS: one decoding step over the keys a code book finds, at their own positions (arXiv 2502.12665).

    Args:
        query: (B, H, 1, D), un-rotated, of the last of the keys' tokens.
        codebook: (Hk, C, D), entries for un-rotated keys.
        ids: from `codebook_ids`, if already known.
        selection: window, far, sinks, share of `a2ats_select`.

    >>> import torch, fastpe
    >>> q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 40, 8)
    >>> fastpe.recipes.a2ats(q, k, k, torch.randn(2, 4, 8), rope=fastpe.rope.default(8), window=4, sinks=2).shape
    torch.Size([1, 2, 1, 8])
    """
    if query.shape[2] != 1:
        raise ValueError(f"fastpe.recipes.a2ats: query must be one row, got {query.shape[2]}")
    ids = codebook_ids(key, codebook) if ids is None else ids
    chosen = a2ats_select(query, ids, codebook, rope=rope, **selection)
    B, H, _, D = query.shape
    Hk, N = key.shape[1:3]
    n = int(chosen.sum(-1).max())
    order = torch.argsort(~chosen, dim=-1, stable=True)[..., :n]
    here = chosen.gather(-1, order).reshape(B * Hk, n)
    k, v = (x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[3])).reshape(B * Hk, 1, n, x.shape[3]) for x in (key, value))
    at = {"positions": torch.tensor([N - 1], device=key.device), "key_positions": order.reshape(B * Hk, n)}
    out = attention(query.reshape(B * Hk, H // Hk, 1, D), k, v, rope=rope, mask=masks.padding(here), **at)
    return out.reshape(B, H, 1, -1)


# ---------------------------------------------------------------------------------------------------------------------
# HyperAttention


def lsh_hash(x: Tensor, directions: Tensor) -> Tensor:
    """Sign hash whose neighbouring codes differ in one bit, so that sorting brings similar vectors together (HyperAttention,
    arXiv 2310.05869).

    Args:
        x: (..., N, D).
        directions: (D, R), normal draws.

    Returns:
        int64 (..., N) in [0, 2^R).

    >>> import torch, fastpe
    >>> fastpe.recipes.lsh_hash(torch.tensor([[1.0, 1.0], [-1.0, 1.0]]), torch.eye(2)).tolist()
    [2, 3]
    """
    bits = (_wide(x) @ directions.to(_wide(x).dtype) > 0).long()
    code = (bits << torch.arange(bits.shape[-1], device=x.device)).sum(-1)
    return code ^ (code >> 1)


def hyper(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block: int = 256,
    samples: int = 256,
    min_length: int = 4096,
    directions: Tensor | None = None,
    causal: bool = False,
    hide_own_block: bool = False,
    generator: torch.Generator | None = None,
    draws: Sequence[Tensor] | None = None,
    return_lse: bool = False,
):
    """HyperAttention: blocks of similar queries and keys, and samples for the rest (arXiv 2310.05869).

    Queries and keys are sorted by a hash and meet in equally placed blocks; uniformly drawn keys, weighted by how many each stands
    for, represent the others; the two parts are merged exactly. With `causal` the sequence is halved: two causal halves, and
    the lower half on the upper keys.

    Args:
        query, key, value: as many heads each, as many queries as keys; lengths that block divides.
        block, samples: keys of a block and drawn keys.
        min_length: shorter parts are computed exactly.
        directions: (D, R) of `lsh_hash`; 7 normal draws if not given.
        hide_own_block: samples from a row's own block do not count again. The release means to do so and, but for one half-precision
            path, does not.
        generator, draws: of the samples; draws hold (B, heads, samples) indices into the sorted keys in the order they are
            used.

    Raises:
        ValueError: lengths that block does not divide, odd halves, other head counts.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 64, 8)
    >>> fastpe.recipes.hyper(q, q, q, block=16, samples=16, min_length=32).shape
    torch.Size([1, 2, 64, 8])
    """
    where = "fastpe.recipes.hyper"
    for what, x, low in (("block", block, 1), ("samples", samples, 0), ("min_length", min_length, 1)):
        _check.count(where, what, x, low)
    if not query.shape[:3] == key.shape[:3] == value.shape[:3]:
        raise ValueError(f"{where}: query, key and value must agree in batch, heads and tokens, got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}")
    if directions is None:
        directions = torch.randn(query.shape[3], 7, generator=generator, device=query.device)
    stock = iter(draws) if draws is not None else None

    def sample(shape: tuple[int, int], n: int) -> Tensor:
        if stock is not None:
            return next(stock).reshape(*shape, samples)
        return torch.randint(n, (*shape, samples), generator=generator, device=query.device)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        (B, H, n, D), m = q.shape, k.shape[2]
        if n < min_length:
            return attention(q, k, v, return_lse=True)
        if n % block or m % block:
            raise ValueError(f"{where}: block {block} must divide the {n} queries and {m} keys of a part")

        def ordered(x: Tensor, by: Tensor) -> Tensor:
            return x.gather(2, by[..., None].expand_as(x))

        q_order, k_order = (lsh_hash(x.detach(), directions).sort(stable=True, dim=-1).indices for x in (q, k))
        q, k, v = ordered(q, q_order), ordered(k, k_order), ordered(v, k_order)
        blocks = m // block
        cut = (x.reshape(B * H * blocks, 1, -1, x.shape[3]) for x in (q, k, v))
        out, lse = attention(*cut, return_lse=True)
        out, lse = out.reshape(B, H, n, -1), lse.reshape(B, H, n)
        if samples and blocks > 1:
            drawn = sample((B, H), m)
            seen = None
            if hide_own_block:
                own = torch.arange(n, device=q.device) // (n // blocks)
                seen = masks.dense(own[:, None] != (drawn // block)[:, :, None])
            some = attention(q, ordered_rows(k, drawn), ordered_rows(v, drawn), mask=seen, return_lse=True)
            out, lse = merge((out, some[0]), (lse, some[1] + math.log(m / samples)))
        back = q_order.argsort(-1)
        return ordered(out, back), lse.gather(2, back)

    def ordered_rows(x: Tensor, index: Tensor) -> Tensor:
        return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))

    def halves(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        B, H, n, _ = q.shape
        if n <= min_length:
            return attention(q, k, v, is_causal=True, return_lse=True)
        if n % 2:
            raise ValueError(f"{where}: {n} tokens cannot be halved")
        cut = (x.reshape(B, 2 * H, n // 2, x.shape[3]) for x in (q, k, v))
        out, lse = halves(*cut)
        out, lse = out.reshape(B, H, n, -1), lse.reshape(B, H, n)
        cross = plain(q[:, :, n // 2 :].contiguous(), k[:, :, : n // 2].contiguous(), v[:, :, : n // 2].contiguous())
        low = merge((out[:, :, n // 2 :], cross[0]), (lse[:, :, n // 2 :], cross[1]))
        return torch.cat((out[:, :, : n // 2], low[0]), 2), torch.cat((lse[:, :, : n // 2], low[1]), 2)

    return _result(*(halves if causal else plain)(query, key, value), return_lse)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def longllama(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    rope: Rope,
    memory_visible: Tensor | None = None,
    return_lse: bool = False,
):
    """Focused Transformer, LongLLaMA: memory keys as if they were the first token, one softmax (arXiv 2307.03170).

    Local positions start over at 0; every row sees all memory and the local keys causally.

    Args:
        memory_key, memory_value: (B, Hk, M, D) and (B, Hk, M, Dv), un-rotated.
        memory_visible: bool (M,) or (B, M), False for padded memory.

    >>> import torch, fastpe
    >>> q, m = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8)
    >>> fastpe.recipes.longllama(q, q, q, m, m, rope=fastpe.rope.default(8)).shape
    torch.Size([1, 2, 5, 8])
    """
    seen = masks.causal()
    if memory_visible is not None:
        seen = seen & masks.padding(torch.nn.functional.pad(memory_visible, (0, key.shape[2]), value=True))
    k, v = torch.cat((memory_key, key), 2), torch.cat((memory_value, value), 2)
    region = regions.key_set(memory_key.shape[2])
    return attention(query, k, v, rope=rope, region=region, mask=seen, return_lse=return_lse)


def memlong(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    rope: Rope,
    kind: str = "zero",
    gate: Tensor | None = None,
    return_lse: bool = False,
):
    """MemLong: retrieved keys before the local ones, optionally gated (arXiv 2408.16967).

    The rule of the release's eager path: one softmax. (Its flash path adds two softmaxes and hides memory causally.)

    Args:
        memory_key, memory_value: (B, Hk, M, D) and (B, Hk, M, Dv), un-rotated.
        kind: "zero", memory at position 0 and local tokens from 1 on, or "continual", local tokens continue the memory's positions.
        gate: (H,) or (B, H), g in [0, 1] (the release has a sigmoid before it): memory scores times g, local ones times 1 - g.
            Differentiable.

    >>> import torch, fastpe
    >>> q, m = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8)
    >>> fastpe.recipes.memlong(q, q, q, m, m, rope=fastpe.rope.default(8), gate=torch.tensor([0.3, 0.6])).shape
    torch.Size([1, 2, 5, 8])
    """
    check_choice("fastpe.recipes.memlong", "kind", kind, ("zero", "continual"))
    M = memory_key.shape[2]
    region = regions.key_set(M, first=1) if kind == "zero" else regions.key_set(M, "continual")
    bias = None
    if gate is not None:
        gate = gate if gate.dim() == 2 else gate[None]
        local = (torch.arange(M + key.shape[2], device=key.device) >= M).long()
        rows = torch.zeros(query.shape[2], dtype=torch.int64, device=key.device)
        bias = SegmentPairs(rows, local, factor=torch.stack((gate, 1 - gate), -1)[:, :, None])
    k, v = torch.cat((memory_key, key), 2), torch.cat((memory_value, value), 2)
    return attention(query, k, v, rope=rope, region=region, bias=bias, is_causal=True, return_lse=return_lse)


def extended_mind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    *,
    rope: Rope | None = None,
    slopes: Tensor | None = None,
    k: int = 10,
    threshold: float | None = None,
    return_lse: bool = False,
):
    """Extended Mind Transformers: every head and row retrieves k memories by cosine similarity (arXiv 2406.02332).

    Memory keys are stored un-rotated; the query is rotated at its own position. One softmax over the retrieved memories and the
    local keys. Differentiable but for the choice.

    Args:
        memory_key, memory_value: (B, Hk, M, D) and (B, Hk, M, Dv).
        rope: for Llama.
        slopes: (H,), ALiBi slopes, for MPT: memory scores get -slope Nk, local ones -slope (Nk - 1 - j).
        k: memories per head and row.
        threshold: retrieved memories of cosine at most this are dropped; the release offers 0.25.

    >>> import torch, fastpe
    >>> q, m = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8)
    >>> fastpe.recipes.extended_mind(q, q, q, m, m, rope=fastpe.rope.default(8), k=3).shape
    torch.Size([1, 2, 5, 8])
    """
    Nq, Nk, device = query.shape[2], key.shape[2], key.device
    asked, sought, bias = query, query, None
    if rope is not None:
        at = torch.arange(Nk - Nq, Nk, device=device)
        asked, sought = apply_rotary(query, rope, at), apply_rotary(_wide(query.detach()), rope, at)
    index, kept = cosine_top(sought, memory_key, k, threshold)
    far, far_lse = list_attention(asked, memory_key, memory_value, index, kept, return_lse=True)
    if slopes is not None:
        far_lse = far_lse - (slopes * Nk).to(far_lse.dtype)[None, :, None]
        bias = Dense(slopes[:, None, None] * (1 - Nk + torch.arange(Nk, device=device)))
    near, near_lse = attention(query, key, value, rope=rope, bias=bias, is_causal=True, return_lse=True)
    return _result(*merge((near, far), (near_lse, far_lse)), return_lse)


def cepe(query: Tensor, key: Tensor, value: Tensor, key_visible: Tensor | None = None, *, return_lse: bool = False):
    """Cross attention on states of chunks encoded one by one: no rotation, no causality (CEPE, arXiv 2402.16617; XC-Cache, 2404.15420).

    Args:
        key, value: (B, Hk, chunks * tokens, D), the chunks joined along the tokens.
        key_visible: bool (B, Nk), False for padding.

    >>> import torch, fastpe
    >>> q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 12, 8)
    >>> fastpe.recipes.cepe(q, k, k, torch.ones(1, 12).bool()).shape
    torch.Size([1, 2, 5, 8])
    """
    seen = None if key_visible is None else masks.padding(key_visible)
    return attention(query, key, value, mask=seen, return_lse=return_lse)


# ---------------------------------------------------------------------------------------------------------------------
# Pruning and eviction


def entmax_first(x: Tensor, alpha: float) -> Tensor:
    """The first entry of entmax_alpha over (x, 0): a sigmoid that reaches 0 and 1 where alpha > 1 (arXiv 1905.05702).

    Args:
        x: float.
        alpha: 1 is the sigmoid, 2 is sparsemax, in between as sparse.

    >>> import torch, fastpe
    >>> fastpe.recipes.entmax_first(torch.tensor([-2.0, 0.0, 1.0]), 2.0)
    tensor([0.0000, 0.5000, 1.0000])
    """
    alpha = _check.number("fastpe.recipes.entmax_first", "alpha", alpha)
    if alpha < 1:
        raise ValueError(f"fastpe.recipes.entmax_first: alpha must be at least 1, got {alpha:g}")
    if alpha == 1:
        return torch.sigmoid(x)
    if alpha == 2:
        return ((1 + x) / 2).clamp(0, 1)
    if alpha == 1.5:
        y = x.clamp(-2, 2)
        return (1 + y / 2 * (2 - y * y / 4).clamp(min=0).sqrt()) / 2
    # p^(alpha-1) - (1-p)^(alpha-1) = (alpha-1) x, solved for the smaller of p and 1 - p.
    with torch.no_grad():
        e, size = alpha - 1, x.detach().abs().double()
        low, high = torch.full_like(size, -800.0), torch.full_like(size, math.log(0.5))
        for _ in range(64):
            t = (low + high) / 2  # log of the smaller share
            gap = (torch.expm1(e * torch.log1p(-t.exp())) - torch.expm1(e * t)) / e
            low, high = torch.where(gap > size, t, low), torch.where(gap > size, high, t)
        small = torch.where(size >= 1 / e, 0.0, ((low + high) / 2).exp())
        p = torch.where(x > 0, 1 - small, small)
        a, b = p ** (2 - alpha), (1 - p) ** (2 - alpha)
        inside = (p > 0) & (p < 1)
        slope = torch.where(inside, a * b / (a + b), 0.0)
    return p.to(x.dtype) + slope.to(x.dtype) * (x - x.detach())


def context_pruning_bias(query: Tensor, key: Tensor, beta: Tensor | float, alpha: float, *, epsilon: float = 1e-40) -> Tensor:
    """Dynamic Context Pruning: the log of the chance that every key is still there (arXiv 2305.15805).

    x(n, j) = <q_n, k_j> / sqrt(r) + beta; token n keeps key j with p(n, j) = entmax_alpha([x, 0])_1 for n > j and 1 otherwise;
    bias(i, j) = log(prod_{n <= i} p(n, j) + epsilon). Quadratic memory, as the method has it.

    Args:
        query, key: (B, N, r), the interaction queries and keys.
        beta: a number or one element; 5 at the start of training.
        alpha: raised from 1 in training; large at inference.
        epsilon: the release's, a float32 denormal; where those are flushed to zero (and so by default in float32) the log stops at -92.

    Returns:
        (B, 1, N, N).

    >>> import torch, fastpe
    >>> b = fastpe.recipes.context_pruning_bias(torch.randn(1, 6, 4), torch.randn(1, 6, 4), 5.0, 1.5)
    >>> b.shape, float(b[0, 0, 0, 0])
    (torch.Size([1, 1, 6, 6]), 0.0)
    """
    q, k = _wide(query), _wide(key)
    n = q.shape[1]
    p = entmax_first(q @ k.mT * q.shape[-1] ** -0.5 + beta, alpha)
    later = torch.ones(n, n, dtype=torch.bool, device=q.device).tril(-1)
    kept = torch.where(later, p, 1.0).cumprod(1)
    if kept.dtype == torch.float64:
        return (kept + epsilon).log()[:, None]
    floor = math.exp(-87.0)  # a normal number of float32; below it nothing is left of exp(bias)
    return torch.where(kept > floor, kept.clamp(min=floor).log(), -92.0)[:, None]


def context_pruning(
    query: Tensor, key: Tensor, value: Tensor, gate_query: Tensor, gate_key: Tensor, beta: Tensor | float, alpha: float, *, return_lse: bool = False
):
    """Dynamic Context Pruning in training: causal attention with the bias of `context_pruning_bias` (arXiv 2305.15805).

    >>> import torch, fastpe
    >>> q, g = torch.randn(1, 2, 6, 8), torch.randn(1, 6, 4)
    >>> fastpe.recipes.context_pruning(q, q, q, g, g, 5.0, 1.5).shape
    torch.Size([1, 2, 6, 8])
    """
    bias = Dense(context_pruning_bias(gate_query, gate_key, beta, alpha))
    return attention(query, key, value, bias=bias, is_causal=True, return_lse=return_lse)


def h2o_keep(mass: Tensor, heavy: int, recent: int) -> Tensor:
    """H2O's cache: the last `recent` keys and, of the others, the `heavy` with the largest column mass (arXiv 2306.14048).

    Args:
        mass: (..., N), `fastpe.attention_mass` summed over all rows so far.
        heavy, recent: numbers of keys; the release takes shares of the prompt, int(r N).

    Returns:
        bool (..., N).

    >>> import torch, fastpe
    >>> fastpe.recipes.h2o_keep(torch.tensor([3.0, 1.0, 2.0, 0.5, 0.1]), 1, 2).tolist()
    [True, False, False, True, True]
    """
    where = "fastpe.recipes.h2o_keep"
    _check.count(where, "heavy", heavy, 0)
    _check.count(where, "recent", recent, 0)
    n = mass.shape[-1]
    j = torch.arange(n, device=mass.device)
    last = j >= n - recent
    index, allowed = top(mass.detach(), heavy, ~last)
    return torch.zeros_like(mass, dtype=torch.bool).scatter(-1, index, allowed) | last


def snapkv_keep(scores: Tensor, count: int, kernel: int = 5) -> Tensor:
    """SnapKV's choice: the keys with the largest pooled scores (arXiv 2404.14469).

    Args:
        scores: (..., N), mean over the last rows of their probabilities (`fastpe.attention_mass` divided by the rows), for the keys
            before those rows.
        count: keys to keep.
        kernel: odd, width of the average pooling.

    Returns:
        int64 (..., count), ascending.

    >>> import torch, fastpe
    >>> fastpe.recipes.snapkv_keep(torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 1.0, 0.0]), 3, kernel=3).tolist()
    [1, 2, 3]
    """
    where = "fastpe.recipes.snapkv_keep"
    _check.count(where, "kernel", kernel, 1)
    if kernel % 2 == 0:
        raise ValueError(f"{where}: kernel must be odd, got {kernel}")
    x = _wide(scores.detach())
    pooled = torch.nn.functional.avg_pool1d(x.reshape(-1, 1, x.shape[-1]), kernel, 1, kernel // 2).reshape(x.shape)
    return top(pooled, count)[0].sort(-1).values


def snapkv_scores(query: Tensor, key: Tensor, lse: Tensor, rows: int = 64, **call) -> Tensor:
    """SnapKV's scores before pooling: the mean probability the last rows give each key before them (arXiv 2404.14469).

    Args:
        query, key, lse, call: as in `fastpe.attention_mass`.
        rows: the observation window.

    Returns:
        (B, H, Nk - rows) float32 (float64 for float64), for `snapkv_keep`.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 20, 8)
    >>> _, lse = fastpe.attention(q, q, q, is_causal=True, return_lse=True)
    >>> scores = fastpe.recipes.snapkv_scores(q, q, lse, rows=4, is_causal=True)
    >>> fastpe.recipes.snapkv_keep(scores, 5).shape
    torch.Size([1, 2, 5])
    """
    _window("fastpe.recipes.snapkv_scores", query, key, rows)
    return attention_mass(query, key, lse, rows=rows, **call)[..., : key.shape[2] - rows] / rows


def finch_scores(query: Tensor, key: Tensor, lse: Tensor, rows: int, **call) -> Tensor:
    """Finch's scores: `snapkv_scores` with every row weighted by the number of keys it sees (arXiv 2408.00167).

    Rows are the last of a causal call; the t-th of W rows counts Nk - W + t keys, as the release does (one fewer than it sees).

    Args:
        query, key, lse, call: as in `fastpe.attention_mass`.
        rows: the length of the prompt at the end.

    Returns:
        (B, H, Nk - rows) float32 (float64 for float64).

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 20, 8)
    >>> _, lse = fastpe.attention(q, q, q, is_causal=True, return_lse=True)
    >>> fastpe.recipes.finch_scores(q, q, lse, rows=4, is_causal=True).shape
    torch.Size([1, 2, 16])
    """
    _window("fastpe.recipes.finch_scores", query, key, rows)
    Nk = key.shape[2]
    seen = torch.arange(Nk - rows, Nk, dtype=torch.float64, device=query.device)
    return attention_mass(query, key, lse, rows=rows, row_weights=seen, **call)[..., : Nk - rows] / rows


def homer_significance(query: Tensor, key: Tensor, calibration: Tensor | None = None, **call) -> Tensor:
    """HOMER's significance of every key: the largest logit any head's last row gives it (arXiv 2404.10308).

    Args:
        query, key, call: as in `fastpe.attention_rows`.
        calibration: (at least Nk,) what a key at this distance from the last one gets anyway, taken off.

    Returns:
        (B, Nk) float32 (float64 for float64).

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 20, 8)
    >>> fastpe.recipes.homer_significance(q, q, is_causal=True).shape
    torch.Size([1, 20])
    """
    significance = attention_rows(query, key, rows=1, logits=True, **call).amax(1)[:, 0]
    if calibration is None:
        return significance
    Nk = key.shape[2]
    if calibration.dim() != 1 or calibration.shape[0] < Nk:
        raise ValueError(f"fastpe.recipes.homer_significance: calibration must be ({Nk},) or longer, got {_check.shape(calibration)}")
    return significance - calibration[:Nk].flip(0).to(significance.dtype)


def _window(where: str, query: Tensor, key: Tensor, rows: int) -> None:
    _check.count(where, "rows", rows, 1)
    if rows > min(query.shape[2], key.shape[2]):
        raise ValueError(f"{where}: rows is {rows}, the call has {query.shape[2]} queries and {key.shape[2]} keys")


def streaming(query: Tensor, key: Tensor, value: Tensor, *, rope: Rope, start: int = 4, recent: int = 2000, return_lse: bool = False):
    """StreamingLLM: sinks and a window, at positions inside its cache (arXiv 2309.17453).

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 30, 8)
    >>> fastpe.recipes.streaming(q, q, q, rope=fastpe.rope.default(8), start=2, recent=9).shape
    torch.Size([1, 2, 30, 8])
    """
    region, seen = regions.streaming(start, recent), masks.streaming(start, recent)
    return attention(query, key, value, rope=rope, region=region, mask=seen, return_lse=return_lse)


def prompt_cache(
    query: Tensor, key: Tensor, value: Tensor, starts: Sequence[int], lengths: Sequence[int], *, rope: Rope, return_lse: bool = False
):
    """Prompt Cache: new tokens behind cached modules that keep the positions of their schema (arXiv 2311.04934).

    Args:
        starts, lengths: as in `fastpe.positions.prompt_cache`; queries are the tokens behind the modules.

    >>> import torch, fastpe
    >>> q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 9, 8)
    >>> fastpe.recipes.prompt_cache(q, k, k, [0, 20], [2, 4], rope=fastpe.rope.default(8)).shape
    torch.Size([1, 2, 3, 8])
    """
    Nq, Nk = query.shape[2], key.shape[2]
    if sum(lengths) + Nq != Nk:
        raise ValueError(f"fastpe.recipes.prompt_cache: {sum(lengths)} cached and {Nq} new tokens, the call has {Nk} keys")
    p = places.prompt_cache(starts, lengths, Nq).to(key.device)
    return attention(query, key, value, rope=rope, positions=p[Nk - Nq :], key_positions=p, is_causal=True, return_lse=return_lse)


def mesa_extrapolation(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    rope: Rope,
    chunk: int,
    width: int = 50,
    train_length: float | None = None,
    return_lse: bool = False,
):
    """Mesa-Extrapolation: the last rows over all keys, those of finished chunks at shared positions (arXiv 2410.15859).

    The step that generates. (While reading, every chunk sees the first chunk and itself: `fastpe.attention` on those keys.)

    Args:
        query: rows of the unfinished chunk, the last of the keys' tokens.
        chunk, width: as in `fastpe.positions.mesa`.
        train_length: rows are multiplied by max(1, ln(I + 1) / ln(train_length)); None: not.

    Raises:
        ValueError: more queries than the unfinished chunk has tokens (its first one belongs to the chunk before).

    >>> import torch, fastpe
    >>> q, k = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 31, 8)
    >>> fastpe.recipes.mesa_extrapolation(q, k, k, rope=fastpe.rope.default(8), chunk=7, width=3).shape
    torch.Size([1, 2, 2, 8])
    """
    where = "fastpe.recipes.mesa_extrapolation"
    Nq, Nk = query.shape[2], key.shape[2]
    open_ = max((Nk - 1) % chunk, 1)
    if Nq > open_:
        raise ValueError(f"{where}: {Nq} queries, the unfinished chunk has {open_} tokens with positions of their own")
    p = places.mesa(Nk, chunk, width).to(key.device)
    rows = None
    if train_length is not None:
        train_length = _check.number(where, "train_length", train_length)
        i = torch.arange(Nk - Nq, Nk, device=key.device, dtype=torch.float64)
        rows = ((i + 1).log() / math.log(train_length)).clamp(min=1).to(_wide(query).dtype)
    return attention(
        query, key, value, rope=rope, positions=p[Nk - Nq :], key_positions=p, row_scale=rows, is_causal=True, return_lse=return_lse
    )


# ---------------------------------------------------------------------------------------------------------------------
# Last queries of their own


def positional_hidden(
    query: Tensor, key: Tensor, value: Tensor, scaled_query: Tensor, scaled_key: Tensor, *, rows: int = 1, **call
) -> Tensor:
    """Scaling one hidden channel against position bias, arXiv 2406.02536: the last queries see keys made from other states.

    In the chosen layers the paper multiplies one channel of the hidden states by a factor (channel 2393, factor -1 in layers
    10 to 25 of Llama-2-7B) before the projections of query and key, and uses those for the last `rows` queries only.

    Args:
        query, key, value: of the plain hidden states, causal.
        scaled_query, scaled_key: of the scaled ones, the same shapes. Decoding takes scaled_key alone.
        rows: 1 in the released code (`last_recompute_tokens`).
        call: further arguments of `fastpe.attention` that fit both parts, such as rope or scale.

    Returns:
        out, (B, H, Nq, Dv).

    >>> import torch, fastpe
    >>> q, k, v, q2, k2 = (torch.randn(1, 2, 9, 8) for _ in range(5))
    >>> out = fastpe.recipes.positional_hidden(q, k, v, q2, k2, rope=fastpe.rope.default(8))
    >>> torch.allclose(out[:, :, :8], fastpe.attention(q, k, v, rope=fastpe.rope.default(8), is_causal=True)[:, :, :8], atol=1e-6)
    True
    """
    where = "fastpe.recipes.positional_hidden"
    _check.count(where, "rows", rows, 1)
    if rows > query.shape[2]:
        raise ValueError(f"{where}: rows must be at most the {query.shape[2]} queries, got {rows}")
    for what, x, like in (("scaled_query", scaled_query, query), ("scaled_key", scaled_key, key)):
        if x.shape != like.shape:
            raise ValueError(f"{where}: {what} must be {_check.shape(like)}, got {_check.shape(x)}")
    first = attention(query[:, :, :-rows], key[:, :, :-rows], value[:, :, :-rows], is_causal=True, **call)
    last = attention(scaled_query[:, :, -rows:], scaled_key, value, is_causal=True, **call)
    return torch.cat([first, last], 2)
