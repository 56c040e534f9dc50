"""Position rules: which position each token is given, in training or at inference.

Pure functions. Results are int64 where positions are whole and float64 where they are not, on the CPU unless an input says
otherwise. Random rules take their draws as arguments; a draw that is not given comes from ``generator``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from . import _check
from ._rope import check_choice

Tensor = torch.Tensor

__all__ = [
    "bipe", "clex_train", "compressed", "cream", "gali", "giraffe_random", "grid", "hirope", "hirope_regions", "increments",
    "interpolated", "mesa", "mrope", "parallel", "pose", "prompt_cache", "randomized", "segmented", "segmented_prefix",
    "self_extend", "sentinel", "sequential", "superposition", "v2pe",
]  # fmt: skip


def _integer(low: int, high: int, generator: torch.Generator | None) -> int:
    """Uniform in [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def _sample(limit: int, n: int, generator: torch.Generator | None) -> Tensor:
    """n different numbers of [0, limit), sorted."""
    if n > limit // 4:
        return torch.randperm(limit, generator=generator)[:n].sort().values
    # few of many: draw with spares until n differ, then drop spares at random
    found = torch.empty(0, dtype=torch.int64)
    while found.numel() < n:
        found = torch.cat((found, torch.randint(0, limit, (2 * n,), generator=generator))).unique()
    return found[torch.randperm(found.numel(), generator=generator)[:n]].sort().values


def _within(where: str, what: str, value: int, low: int, high: int) -> int:
    _check.count(where, what, value, low)
    if value > high:
        raise ValueError(f"{where}: {what} must be in [{low}, {high}], got {value}")
    return value


def _distinct(where: str, what: str, sample: Tensor, n: int, limit: int) -> Tensor:
    _check.is_integer(where, what, sample)
    if sample.shape != (n,):
        raise ValueError(f"{where}: {what} must be ({n},), got {_check.shape(sample)}")
    sample = sample.long().sort().values
    if n and (int(sample[0]) < 0 or int(sample[-1]) >= limit):
        raise ValueError(f"{where}: {what} must lie in [0, {limit}), got {int(sample[0])} .. {int(sample[-1])}")
    if n > 1 and not bool((sample[1:] > sample[:-1]).all()):
        raise ValueError(f"{where}: {what} must not repeat a position")
    return sample


def sequential(n: int, offset: int = 0) -> Tensor:
    """``offset .. offset + n - 1``, int64 (RoFormer, arXiv 2104.09864).

    >>> import fastpe
    >>> fastpe.positions.sequential(3, 10).tolist()
    [10, 11, 12]
    """
    where = "fastpe.positions.sequential"
    _check.count(where, "n", n, 0)
    return torch.arange(offset, offset + n)


def interpolated(n: int, factor: float, offset: int = 0) -> Tensor:
    """``(offset + arange(n)) / factor``, float64 (position interpolation, arXiv 2306.15595; same angles as `rope.linear`).

    >>> import fastpe
    >>> fastpe.positions.interpolated(3, 4.0).tolist()
    [0.0, 0.25, 0.5]
    """
    factor = _check.number("fastpe.positions.interpolated", "factor", factor, positive=True)
    return sequential(n, offset).double() / factor


def pose(
    length: int,
    window: int,
    target: int,
    *,
    first: int | None = None,
    second_end: int | None = None,
    skip: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """PoSE: train at a short window with the positions of a long text (arXiv 2309.10400).

    Two chunks of the text are joined to ``chunk = min(length, window)`` tokens; the second one's positions are shifted.

    Args:
        length: tokens of the text; at most ``5 * window`` of them are used.
        window: trained length.
        target: length aimed at, at least the chunk.
        first: tokens of the first chunk, in [1, (chunk + 1) // 2].
        second_end: text index one past the second chunk, in [chunk, length].
        skip: shift of the second chunk's positions, in [0, target - chunk].

    Returns:
        token indices and positions, int64 ``(chunk,)`` each.

    >>> import fastpe
    >>> tokens, p = fastpe.positions.pose(10, 4, 16, first=1, second_end=9, skip=5)
    >>> tokens.tolist(), p.tolist()
    ([0, 6, 7, 8], [0, 6, 7, 8])
    """
    where = "fastpe.positions.pose"
    _check.count(where, "length", length, 1)
    _check.count(where, "window", window, 1)
    length = min(length, 5 * window)
    chunk = min(length, window)
    if target < chunk:
        raise ValueError(f"{where}: target must be at least the chunk of {chunk} tokens, got {target}")

    def draw(what: str, value: int | None, low: int, high: int) -> int:
        return _integer(low, high, generator) if value is None else _within(where, what, value, low, high)

    first = draw("first", first, 1, (chunk + 1) // 2)
    end = draw("second_end", second_end, chunk, length)
    skip = draw("skip", skip, 0, target - chunk)
    tokens = torch.cat((torch.arange(first), torch.arange(end - (chunk - first), end)))
    positions = torch.arange(chunk)
    positions[first:] += skip
    return tokens, positions


def cream(
    window: int,
    factor: int,
    length: int,
    *,
    branch: int | None = None,
    u: float | None = None,
    end: int | None = None,
    mu: float | None = None,
    sigma: float = 3.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """CREAM: head, middle and tail of a long text in a short window, the middle drawn with a Gaussian preference (arXiv 2406.07138).

    A middle that ends inside the text takes the tokens at its positions, which may be tail tokens a second time; one that
    ends beyond takes those before the tail.

    Args:
        window: L, the trained length, even.
        factor: f; the target is ``f * L`` tokens.
        length: tokens of the text.
        branch: 0 gives head and tail L // 3 tokens each, 1 gives them 4 f; each with probability 1/2 if not given.
        u: uniform number in [0, 1] that picks the middle's stretch.
        end: last position of the middle, in a range that depends on the stretch (the error names it).
        mu, sigma: of the Gaussian; mu is ``1 + factor`` if not given (one release has 9 throughout).

    Returns:
        token indices and positions, int64 ``(window,)`` each.

    >>> import torch, fastpe
    >>> tokens, p = fastpe.positions.cream(96, 4, 384, generator=torch.Generator().manual_seed(0))
    >>> tokens.shape, int(p[0]), int(p[-1])
    (torch.Size([96]), 0, 383)
    """
    where = "fastpe.positions.cream"
    _check.count(where, "window", window, 2)
    _check.count(where, "factor", factor, 1)
    _check.count(where, "length", length, window)
    if window % 2:
        raise ValueError(f"{where}: window must be even, got {window}")
    branch = _integer(0, 1, generator) if branch is None else _within(where, "branch", branch, 0, 1)
    head = tail = window // 3 if branch == 0 else 4 * factor
    middle = window - head - tail
    if middle < 1:
        raise ValueError(f"{where}: window must exceed head and tail of {head} tokens each, got {window}")
    if u is None:
        u = float(torch.rand((), generator=generator, dtype=torch.float64))
    stretch = _cream_stretch(u, factor, 1 + factor if mu is None else mu, sigma)
    # head + (middle - 1) r / 2 and r / 2 L - tail - 1, in halves so that they stay whole numbers
    low = (2 * head + (middle - 1) * stretch) // 2
    high = stretch * window // 2 - tail - 1
    end = _integer(low, high, generator) if end is None else _within(where, "end", end, low, high)
    positions = torch.cat(
        (
            torch.arange(head),
            torch.arange(end - middle + 1, end + 1),
            torch.arange(factor * window - tail, factor * window),
        )
    )
    tail_tokens = torch.arange(length - tail, length)
    if end < length:
        middle_tokens = positions[head : head + middle]
    else:
        middle_tokens = torch.arange(length - tail - middle, length - tail)
    return torch.cat((torch.arange(head), middle_tokens, tail_tokens)), positions


def _cream_stretch(u: float, factor: int, mu: float, sigma: float) -> int:
    """floor of the Gaussian quantile of u on [2, 2 factor], with the distribution function not renormalised."""
    x = torch.linspace(2, 2 * factor, 1000, dtype=torch.float64)
    cdf = (1 + torch.erf((x - mu) / (sigma * math.sqrt(2)))) / 2
    if u <= float(cdf[0]):
        return 2
    if u >= float(cdf[-1]):
        return 2 * factor
    i = int(torch.searchsorted(cdf, torch.tensor(u, dtype=torch.float64), right=True))
    x0, x1, c0, c1 = float(x[i - 1]), float(x[i]), float(cdf[i - 1]), float(cdf[i])
    return math.floor(x0 + (x1 - x0) * (u - c0) / (c1 - c0))


def randomized(n: int, limit: int, *, sample: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Randomized positions: n of [0, limit), sorted, none twice; int64 ``(n,)`` (arXiv 2305.16843).

    One set per forward pass, shared by queries, keys and the batch. PoSE and CREAM use the same per sample as "RandPos".

    Args:
        sample: n different numbers of [0, limit) in any order.

    >>> import torch, fastpe
    >>> fastpe.positions.randomized(3, 100, sample=torch.tensor([40, 7, 99])).tolist()
    [7, 40, 99]
    """
    where = "fastpe.positions.randomized"
    _check.count(where, "n", n, 0)
    _check.count(where, "limit", limit, 0)
    if n > limit:
        raise ValueError(f"{where}: n must be at most limit {limit}, got {n}")
    return _sample(limit, n, generator) if sample is None else _distinct(where, "sample", sample, n, limit)


def giraffe_random(
    n: int | None = None, batch: int = 1, *, u: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Giraffe's randomized positions: steps uniform in [0, 2), squeezed to end at n at most (arXiv 2308.10882).

    Args:
        n, batch: size of the draw; not read when ``u`` is given.
        u: ``(N,)`` or ``(B, N)`` uniform numbers in [0, 1).

    Returns:
        float64 of u's shape, or ``(batch, n)``. The first position is ``2 u_0``, not 0.

    >>> import torch, fastpe
    >>> fastpe.positions.giraffe_random(u=torch.tensor([0.5, 0.25, 0.125])).tolist()
    [1.0, 1.5, 1.75]
    """
    where = "fastpe.positions.giraffe_random"
    if u is None:
        _check.count(where, "n", n, 1)
        u = torch.rand(batch, n, generator=generator, dtype=torch.float64)
    _check.is_float(where, "u", u)
    n = u.shape[-1]
    p = (2 * u.double()).cumsum(-1)
    return p * (n / p[..., -1:].clamp(min=n))


def segmented(
    train_length: int,
    target: int,
    share: float = 0.25,
    *,
    starts: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Segmented sequences, "chunk": pieces of a long text at their own positions (arXiv 2310.14633).

    ``1 / share`` segments of ``share * train_length`` tokens that do not overlap. How the published work draws their starts is
    not known to us: here every placement is equally likely.

    Args:
        train_length: tokens in all.
        target: length of the long text.
        starts: first positions of the segments, in rising order.

    Returns:
        int64 ``(train_length,)``; they index the text too.

    >>> import torch, fastpe
    >>> fastpe.positions.segmented(4, 16, 0.5, starts=torch.tensor([3, 10])).tolist()
    [3, 4, 10, 11]
    """
    where = "fastpe.positions.segmented"
    _check.count(where, "train_length", train_length, 1)
    _check.count(where, "target", target, train_length)
    share = _check.number(where, "share", share, positive=True)
    each = round(share * train_length)
    if each < 1 or train_length % each:
        raise ValueError(f"{where}: share must cut {train_length} tokens into equal segments, got {share:g}")
    count = train_length // each
    if starts is None:
        gaps = target - train_length
        # stars and bars: a uniform choice of how the gaps are shared out
        bars = _sample(gaps + count, count, generator) - torch.arange(count)
        starts = bars + torch.arange(count) * each
    else:
        _check.is_integer(where, "starts", starts)
        if starts.shape != (count,):
            raise ValueError(f"{where}: starts must be ({count},), got {_check.shape(starts)}")
        ends = torch.cat((starts[1:], torch.tensor([target])))
        if int(starts[0]) < 0 or not bool((starts + each <= ends).all()):
            raise ValueError(
                f"{where}: starts must leave {each} tokens each within [0, {target}), got {starts.tolist()}"
            )
    return (starts.long()[:, None] + torch.arange(each)).flatten()


def segmented_prefix(
    train_length: int,
    target: int,
    share: float = 0.25,
    *,
    start: int | None = None,
    sample: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Segmented sequences, "prefix": scattered tokens, then a contiguous suffix that alone bears the loss (arXiv 2310.14633).

    Args:
        train_length: tokens in all, ``share`` of them in the suffix.
        target: length of the long text.
        start: first position of the suffix.
        sample: the scattered positions, different numbers below ``start``.

    Returns:
        int64 positions and the bool mask of tokens that bear the loss, ``(train_length,)`` each.

    >>> import torch, fastpe
    >>> p, loss = fastpe.positions.segmented_prefix(4, 16, 0.5, start=9, sample=torch.tensor([2, 7]))
    >>> p.tolist(), loss.tolist()
    ([2, 7, 9, 10], [False, False, True, True])
    """
    where = "fastpe.positions.segmented_prefix"
    _check.count(where, "train_length", train_length, 1)
    _check.count(where, "target", target, train_length)
    share = _check.number(where, "share", share, positive=True)
    if share > 1:
        raise ValueError(f"{where}: share must be at most 1, got {share:g}")
    suffix = round(share * train_length)
    scattered = train_length - suffix
    if start is None:
        start = _integer(scattered, target - suffix, generator)
    else:
        _within(where, "start", start, scattered, target - suffix)
    if sample is None:
        sample = _sample(start, scattered, generator)
    else:
        sample = _distinct(where, "sample", sample, scattered, start)
    positions = torch.cat((sample, torch.arange(start, start + suffix)))
    return positions, torch.arange(train_length) >= scattered


def bipe(separators: Tensor, train_scale: int = 1024) -> tuple[Tensor, Tensor]:
    """BiPE's two levels: place inside the segment and number of the segment (arXiv 2401.16421).

    The first goes to a learned absolute embedding added to the token embedding, the second is the position for RoPE or
    ALiBi.

    Args:
        separators: bool ``(N,)`` or ``(B, N)``, True at the token that closes a segment (it belongs to that segment).
        train_scale: places are cut off at ``train_scale - 1``.

    Returns:
        intra, inter: int64 of the same shape.

    >>> import torch, fastpe
    >>> intra, inter = fastpe.positions.bipe(torch.tensor([False, True, False, False]))
    >>> intra.tolist(), inter.tolist()
    ([0, 1, 0, 1], [0, 0, 1, 1])
    """
    where = "fastpe.positions.bipe"
    _check.is_tensor(where, "separators", separators)
    if separators.dtype != torch.bool:
        raise TypeError(f"{where}: separators must be bool, got {_check.name(separators.dtype)}")
    _check.count(where, "train_scale", train_scale, 1)
    closed = separators.long()
    inter = closed.cumsum(-1) - closed
    return _place_in_segment(inter).clamp(max=train_scale - 1), inter


def _place_in_segment(segments: Tensor) -> Tensor:
    """Tokens since the segment number last changed."""
    n = torch.arange(segments.shape[-1], device=segments.device).expand_as(segments)
    starts = torch.zeros_like(n)
    starts[..., 1:] = torch.where(segments[..., 1:] != segments[..., :-1], n[..., 1:], 0)
    return n - starts.cummax(-1).values if n.numel() else n


def hirope(segments: Tensor) -> Tensor:
    """HiRoPE's two axes, for `fastpe.rope.hirope` (arXiv 2403.19115).

    Args:
        segments: int64 ``(N,)`` or ``(B, N)``, the number of each token's segment (function, class, ...), in rising order.

    Returns:
        int64 ``(2, N)`` or ``(2, B, N)``: place inside the segment, number of the segment.

    >>> import torch, fastpe
    >>> fastpe.positions.hirope(torch.tensor([0, 0, 1, 1, 1])).tolist()
    [[0, 1, 0, 1, 2], [0, 0, 1, 1, 1]]
    """
    _check.is_integer("fastpe.positions.hirope", "segments", segments)
    return torch.stack((_place_in_segment(segments), segments.long()))


def hirope_regions(segments: Tensor, window: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of HiRoPE's two regions (arXiv 2403.19115).

    Keys nearer than ``window`` tokens are met at plain positions, the others at two-level ones whose segment distance
    starts from ``window - 1``.

    Args:
        segments: as in `hirope`.

    Returns:
        near (both sides), far queries, far keys: int64 ``(2, N)`` or ``(2, B, N)`` each.

    >>> import torch, fastpe
    >>> near, far_q, far_k = fastpe.positions.hirope_regions(torch.tensor([0, 0, 1]), window=2)
    >>> near.tolist(), (far_q - far_k).tolist()
    ([[0, 1, 2], [0, 1, 2]], [[0, 0, 0], [1, 1, 1]])
    """
    _check.count("fastpe.positions.hirope_regions", "window", window, 1)
    far = hirope(segments)
    n = torch.arange(far.shape[-1], device=far.device).expand_as(far).contiguous()
    shift = torch.tensor([0, window - 1], device=far.device).view(2, *[1] * (far.dim() - 1))
    return n, far + shift, far


def self_extend(n: int, window: int = 1024, group: int = 8, *, shift: str = "floor") -> tuple[Tensor, Tensor]:
    """Self-Extend: positions of queries and keys that are ``window`` or more tokens apart (arXiv 2401.01325).

    Nearer pairs keep their indices. Far ones share positions in groups: ``i // group + shift`` and ``j // group``, so that
    the largest distance is about ``window + (n - window) / group``.

    Args:
        n: tokens.
        window: near means ``i - j < window``.
        group: tokens that share a position.
        shift: "floor", ``window - window // group`` (the paper), or "true", ``window - window / group`` (the released
            prefill code; differs where group does not divide window).

    Returns:
        far query positions and far key positions, float64 ``(n,)`` each.

    Raises:
        ValueError: n, window or group below 1, unknown shift.

    >>> import fastpe
    >>> q, k = fastpe.positions.self_extend(8, window=4, group=2)
    >>> q.tolist(), k.tolist()
    ([2.0, 2.0, 3.0, 3.0, 4.0, 4.0, 5.0, 5.0], [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0])
    """
    where = "fastpe.positions.self_extend"
    for what, x in (("n", n), ("window", window), ("group", group)):
        _check.count(where, what, x, 1)
    # With every pair near there is nothing to line up, and the released code leaves the shift out.
    reach = window if n - 1 >= window else 0
    key = (torch.arange(n) // group).double()
    return key + self_extend_shift(where, reach, group, shift), key


def self_extend_shift(where: str, window: int, group: int, shift: str) -> float:
    """What far query positions are moved by, so that distances go on where the window ends."""
    check_choice(where, "shift", shift, ("floor", "true"))
    return window - (window // group if shift == "floor" else window / group)


def v2pe(is_image: Tensor, stride: float | Tensor, num_image_token: int = 256) -> Tensor:
    """V2PE: image tokens advance the position by a fraction (arXiv 2412.09616).

    A text token goes to the next whole number above the position before it, an image token ``stride / num_image_token``
    further.

    Args:
        is_image: bool ``(N,)``; the tokens that open and close an image count as text.
        stride: 1 .. 256, one number or one per token ``(N,)`` (read at image tokens).

    Returns:
        float64 ``(N,)``. Generated tokens continue with +1.

    >>> import torch, fastpe
    >>> fastpe.positions.v2pe(torch.tensor([False, True, True, False]), stride=64).tolist()
    [0.0, 0.25, 0.5, 2.0]
    """
    where = "fastpe.positions.v2pe"
    _check.is_tensor(where, "is_image", is_image)
    if is_image.dtype != torch.bool or is_image.dim() != 1:
        raise ValueError(
            f"{where}: is_image must be bool (N,), got {_check.name(is_image.dtype)} {_check.shape(is_image)}"
        )
    _check.count(where, "num_image_token", num_image_token, 1)
    stride = torch.as_tensor(stride, dtype=torch.float64)
    if stride.dim() > 1 or (stride.dim() == 1 and stride.shape != is_image.shape):
        raise ValueError(f"{where}: stride must be a number or ({is_image.shape[0]},), got {_check.shape(stride)}")
    step = torch.where(is_image, stride / num_image_token, 0.0)
    out = torch.empty(is_image.shape[0], dtype=torch.float64)
    position, start = -1.0, 0
    # runs of tokens of one kind
    edges = (torch.where(is_image[1:] != is_image[:-1])[0] + 1).tolist()
    for end in [*edges, is_image.shape[0]]:
        if end == start:
            continue
        if bool(is_image[start]):
            out[start:end] = position + step[start:end].cumsum(0)
        else:
            out[start:end] = math.ceil(position) + torch.arange(1, end - start + 1)
        position, start = float(out[end - 1]), end
    return out


def increments(delta: Tensor, start: float = 0.0) -> Tensor:
    """``start + cumsum(delta)`` along the last axis, float64: the general form of rules that advance by an amount per token.

    Differentiable: with learned or content-dependent ``delta`` the rotation is too. Increments of +-1 that change sign where
    the language switches are one reading of CONFLATOR's switching points (arXiv 2309.05270).

    >>> import torch, fastpe
    >>> fastpe.positions.increments(torch.tensor([0.0, 1.0, 0.5])).tolist()
    [0.0, 1.0, 1.5]
    """
    _check.is_tensor("fastpe.positions.increments", "delta", delta)
    return start + delta.double().cumsum(-1)


def grid(shape: Sequence[int], leading: int = 0) -> Tensor:
    """Row-major places in a grid, int64 ``(axes, leading + prod(shape))`` (rope-vit, arXiv 2403.13298; MD-LRPE, 2405.21022).

    Axis 0 is the slowest, so a picture of h rows and w columns is ``grid((h, w))`` with axes (row, column).

    Args:
        leading: tokens before the grid (class token, text) that stay un-rotated: 0 on all axes.

    >>> import fastpe
    >>> fastpe.positions.grid((2, 2), leading=1).tolist()
    [[0, 0, 0, 1, 1], [0, 0, 1, 0, 1]]
    """
    where = "fastpe.positions.grid"
    if not shape:
        raise ValueError(f"{where}: shape must have at least one axis, got none")
    for n in shape:
        _check.count(where, "shape", n, 1)
    _check.count(where, "leading", leading, 0)
    places = torch.stack([x.flatten() for x in torch.meshgrid(*map(torch.arange, shape), indexing="ij")])
    return torch.cat((torch.zeros(len(shape), leading, dtype=torch.int64), places), 1)


def mrope(
    token_types: Tensor,
    grids: Sequence[Sequence[int]] = (),
    merge: int = 2,
    *,
    intervals: Sequence[float] | None = None,
) -> tuple[Tensor, int]:
    """M-RoPE positions on the axes (t, h, w) for text with pictures and videos (Qwen2-VL, arXiv 2409.12191).

    Text advances all axes by one. A block of T x H x W patches starts at the running position on every axis and counts
    ``t``, ``y``, ``x`` from there, t slowest, with ``y < H // merge`` and ``x < W // merge``; then the running position advances
    by ``max(H, W) // merge``, as in transformers 5. The length of a video does not count, so positions of a long one overlap
    the text after it.

    Args:
        token_types: integers ``(N,)``: 0 for text, anything else for the tokens of pictures and videos.
        grids: (T, H, W) in patches for each picture or video, in the order of the text. Neighbouring blocks may touch.
        merge: patches per token along each side.
        intervals: positions per step of t for each block, 1 if not given; the step is ``floor(t * interval)``
            (Qwen2.5-VL: tokens per second times seconds per grid).

    Returns:
        int64 ``(3, N)``, and ``delta = largest position + 1 - N``: generated token n goes to ``n + delta``.

    Raises:
        ValueError: grids that do not fill the vision tokens exactly.

    >>> import torch, fastpe
    >>> p, delta = fastpe.positions.mrope(torch.tensor([0, 1, 1, 0]), [(1, 2, 4)])
    >>> p.tolist(), delta
    ([[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]], 0)
    """
    where = "fastpe.positions.mrope"
    _check.is_integer(where, "token_types", token_types)
    if token_types.dim() != 1:
        raise ValueError(f"{where}: token_types must be (N,), got shape {_check.shape(token_types)}")
    _check.count(where, "merge", merge, 1)
    if intervals is None:
        intervals = [1.0] * len(grids)
    if len(intervals) != len(grids):
        raise ValueError(f"{where}: intervals has {len(intervals)} entries, expected {len(grids)} (one per grid)")
    vision = (token_types != 0).tolist()
    n, at, block, running = len(vision), 0, 0, 0
    parts = []
    while at < n:
        if not vision[at]:
            end = at
            while end < n and not vision[end]:
                end += 1
            parts.append(torch.arange(running, running + end - at).expand(3, -1))
            running, at = running + end - at, end
            continue
        if block == len(grids):
            raise ValueError(f"{where}: grids has {len(grids)} entries, but token {at} starts another vision block")
        t, h, w = grids[block]
        if h % merge or w % merge:
            raise ValueError(f"{where}: grids[{block}] has sides {h} x {w}, which are no multiples of merge {merge}")
        places = grid((t, h // merge, w // merge))
        size = places.shape[1]
        if not all(vision[at : at + size]) or at + size > n:
            raise ValueError(
                f"{where}: grids[{block}] needs {size} vision tokens from token {at} on, which the text does not have"
            )
        places[0] = (places[0] * intervals[block]).floor().long()
        parts.append(places + running)
        running, at, block = running + max(h, w) // merge, at + size, block + 1
    if block != len(grids):
        raise ValueError(f"{where}: grids has {len(grids)} entries, the text has room for {block}")
    positions = torch.cat(parts, 1) if parts else torch.zeros(3, 0, dtype=torch.int64)
    return positions, (int(positions.max()) + 1 - n if n else 0)


def clex_train(
    n: int,
    original: int,
    factor: int | None = None,
    *,
    max_factor: int = 16,
    sample: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, int]:
    """CLEX's training positions: n tokens spread over t times their number (arXiv 2310.16450).

    Args:
        n: tokens, at least 3.
        original: L0, length the model was trained at.
        factor: t, drawn uniformly from 1 .. max_factor if not given.
        sample: n - 2 different numbers of [0, n t - 2).

    Returns:
        float64 ``(n,)`` positions and t, to be passed on as `rope.clex`'s ``factor``.

    >>> import torch, fastpe
    >>> p, t = fastpe.positions.clex_train(4, 64, factor=2, sample=torch.tensor([1, 4]))
    >>> p.tolist(), t
    ([0.0, 2.0, 5.0, 7.0], 2)
    """
    where = "fastpe.positions.clex_train"
    _check.count(where, "n", n, 3)
    _check.count(where, "original", original, 1)
    _check.count(where, "max_factor", max_factor, 1)
    factor = _integer(1, max_factor, generator) if factor is None else _check.count(where, "factor", factor, 1)
    limit = n * factor - 2
    sample = _sample(limit, n - 2, generator) if sample is None else _distinct(where, "sample", sample, n - 2, limit)
    squeeze = max(1, n // original)
    ends = torch.tensor([0.0, n * factor // squeeze - 1], dtype=torch.float64)
    return torch.cat((ends[:1], (sample + 1).double() / squeeze, ends[1:])), factor


def parallel(prefix: int, lengths: Sequence[int], n: int) -> Tensor:
    """Parallel pieces that all start behind the prefix; what follows starts behind the longest (PCW, arXiv 2212.10947; APE, 2502.05431;
    structured prompting, 2212.06713).

    Goes with `fastpe.mask.parallel`. For PCW, whose windows share their first token, `prefix` is 1 and every length one less.

    Args:
        prefix: tokens at 0 .. prefix - 1.
        lengths: tokens of each piece.
        n: tokens in all.

    Returns:
        int64 ``(n,)``.

    >>> import fastpe
    >>> fastpe.positions.parallel(1, [3, 2], 8).tolist()
    [0, 1, 2, 3, 1, 2, 4, 5]
    """
    where = "fastpe.positions.parallel"
    _check.count(where, "prefix", prefix, 0)
    for x in lengths:
        _check.count(where, "lengths", x, 0)
    rest = n - prefix - sum(lengths)
    if rest < 0:
        raise ValueError(f"{where}: n must be at least {n - rest}, the tokens of prefix and pieces, got {n}")
    pieces = [torch.arange(prefix, prefix + x) for x in lengths]
    last = prefix + max(lengths, default=0)
    return torch.cat((torch.arange(prefix), *pieces, torch.arange(last, last + rest)))


def superposition(preamble: int, contexts: Sequence[int], query: int, n: int, kind: str = "equilibrium") -> Tensor:
    """Superposition prompting: preamble, (document, query) each, task (arXiv 2404.06910).

    Documents start together behind the preamble. "equilibrium" stretches each to the harmonic mean of their lengths, "rounded" rounds
    that to whole numbers, "max" leaves them as they are; the queries start together behind that mean or the longest document,
    the task behind the queries.

    Args:
        preamble, query: tokens.
        contexts: tokens of each document, at least 1.
        n: tokens in all.
        kind: "equilibrium", "max" or "rounded".

    Returns:
        float64 ``(n,)``.

    >>> import fastpe
    >>> fastpe.positions.superposition(1, [2, 4], 1, 9, "max").tolist()
    [0.0, 1.0, 2.0, 5.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    where = "fastpe.positions.superposition"
    check_choice(where, "kind", kind, ("equilibrium", "max", "rounded"))
    for what, x, low in (("preamble", preamble, 0), ("query", query, 0), *(("contexts", x, 1) for x in contexts)):
        _check.count(where, what, x, low)
    rest = n - preamble - sum(contexts) - query * len(contexts)
    if rest < 0:
        raise ValueError(f"{where}: n must be at least {n - rest}, the tokens before the task, got {n}")
    if not contexts:
        return torch.arange(n, dtype=torch.float64)
    shared = max(contexts) if kind == "max" else len(contexts) / sum(1 / x for x in contexts)
    parts = [torch.arange(preamble, dtype=torch.float64)]
    for x in contexts:
        step = 1.0 if kind == "max" else shared / x
        parts.append(preamble + torch.arange(x, dtype=torch.float64) * step)
        parts.append(preamble + shared + torch.arange(query, dtype=torch.float64))
    parts.append(preamble + shared + query + torch.arange(rest, dtype=torch.float64))
    p = torch.cat(parts)
    return p.round() if kind == "rounded" else p


def gali(n: int, train_length: int, local_window: int = 128) -> Tensor:
    """GALI: the trained positions, the first of them filled up with fractions until n tokens fit (arXiv 2502.02659).

    With ``G = ceil((n - local_window) / (train_length - local_window))`` the first positions advance by 1/G, for as few whole numbers
    as will do; the last tokens keep whole steps up to ``train_length - 1``. `fastpe.recipes.gali` uses them.

    Args:
        n: tokens.
        train_length: trained length.
        local_window: below train_length.

    Returns:
        float64 ``(n,)``.

    >>> import fastpe
    >>> fastpe.positions.gali(7, 5, 1).tolist()
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
    """
    numerators, steps = gali_fractions("fastpe.positions.gali", n, train_length, local_window)
    return numerators.double() / steps


def gali_fractions(where: str, n: int, train_length: int, local_window: int) -> tuple[Tensor, int]:
    """GALI's positions as whole numbers over G: their ceilings and floors must be exact."""
    _check.count(where, "n", n, 0)
    _check.count(where, "local_window", local_window, 0)
    _check.count(where, "train_length", train_length, local_window + 1)
    if n <= train_length:
        return torch.arange(n), 1
    steps = -(-(n - local_window) // (train_length - local_window))
    # Each whole number given up makes room for G tokens: the smallest count with train_length + count (G - 1) >= n.
    count = -(-(n - train_length) // (steps - 1))
    tail = train_length - count
    return torch.cat((torch.arange(n - tail), torch.arange(count, train_length) * steps)), steps


def mesa(n: int, chunk: int, width: int = 50) -> Tensor:
    """Mesa-Extrapolation: keys of the unfinished chunk keep their places, older ones share them in groups (arXiv 2410.15859).

    With ``last = (n - 1) mod chunk`` and ``B = n - last``, keys ``j >= B`` stand at j, the others at ``B - 1 - (B - 1 - j) // width``.

    Args:
        n: keys.
        chunk: tokens of a chunk.
        width: keys that share a position; the release uses 20, 50 and 200.

    Returns:
        int64 ``(n,)``.

    >>> import fastpe
    >>> fastpe.positions.mesa(8, 3, 2).tolist()
    [3, 4, 4, 5, 5, 6, 6, 7]
    """
    where = "fastpe.positions.mesa"
    for what, x, low in (("n", n, 0), ("chunk", chunk, 1), ("width", width, 1)):
        _check.count(where, what, x, low)
    first = n - (n - 1) % chunk
    j = torch.arange(n)
    return torch.where(j >= first, j, first - 1 - torch.div(first - 1 - j, width, rounding_mode="floor"))


def prompt_cache(starts: Sequence[int], lengths: Sequence[int], new: int = 0) -> Tensor:
    """Prompt Cache: cached modules at the positions of their schema, which may leave gaps or overlap (arXiv 2311.04934).

    Args:
        starts, lengths: first position and tokens of each module, in the order of the cache.
        new: tokens of the user behind them, which go on from the largest position.

    Returns:
        int64 ``(sum(lengths) + new,)``.

    >>> import fastpe
    >>> fastpe.positions.prompt_cache([0, 10], [2, 3], new=2).tolist()
    [0, 1, 10, 11, 12, 13, 14]
    """
    where = "fastpe.positions.prompt_cache"
    if len(starts) != len(lengths):
        raise ValueError(f"{where}: there are {len(starts)} starts and {len(lengths)} lengths")
    for what, xs in (("starts", starts), ("lengths", lengths), ("new", [new])):
        for x in xs:
            _check.count(where, what, x, 0)
    last = max((s + n for s, n in zip(starts, lengths) if n), default=0)
    return torch.cat([torch.arange(s, s + n) for s, n in zip((*starts, last), (*lengths, new))])


def sentinel(opens: Tensor, closes: Tensor) -> Tensor:
    """Sentinel tokens take the position of the token before them, others count through (arXiv 2310.08152).

    Args:
        opens, closes: bool ``(N,)`` or ``(B, N)``, as in `fastpe.mask.sentinel`.

    >>> import torch, fastpe
    >>> tokens = torch.tensor([1, 0, 0, 2, 0])
    >>> fastpe.positions.sentinel(tokens == 1, tokens == 2).tolist()
    [0, 0, 1, 1, 2]
    """
    return ((~(opens | closes)).long().cumsum(-1) - 1).clamp(min=0)


def compressed(marks: Tensor) -> Tensor:
    """Runs of compression or sum tokens go on from the token before them; other tokens count as if there were none (CCM, arXiv 2312.03414).

    Args:
        marks: int ``(N,)`` or ``(B, N)``: 0 for ordinary tokens, 1, 2, ... for kinds of runs; neighbouring runs differ in kind.

    >>> import torch, fastpe
    >>> fastpe.positions.compressed(torch.tensor([0, 0, 1, 1, 2, 2, 0])).tolist()
    [0, 1, 2, 3, 2, 3, 2]
    """
    _check.is_integer("fastpe.positions.compressed", "marks", marks)
    ordinary = (marks == 0).long().cumsum(-1) - 1
    return torch.where(marks == 0, ordinary, ordinary + 1 + _place_in_segment(marks))
