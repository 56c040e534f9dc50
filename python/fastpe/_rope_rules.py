"""The builders of `fastpe.rope`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from . import _check
from ._rope import FirstTokensRope, LengthRope, Rope, XposRope, check_choice

Tensor = torch.Tensor


# ---------------------------------------------------------------------------------------------- shared pieces


def _dtype(precision: str) -> torch.dtype:
    # "float32" frequencies are rounded where the published code rounds them
    return torch.float32 if precision == "float32" else torch.float64


def _even(where: str, what: str, value: int) -> int:
    _check.count(where, what, value, 2)
    if value % 2:
        raise ValueError(f"{where}: {what} must be even, got {value}")
    return value


def _factor(where: str, what: str, value: float) -> float:
    value = _check.number(where, what, value)
    if value < 1:
        raise ValueError(f"{where}: {what} must be at least 1, got {value:g}")
    return value


def _factors(where: str, what: str, values: Sequence[float] | Tensor, count: int, dtype: torch.dtype) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.dim() != 1 or values.shape[0] != count:
        got = values.shape[0] if values.dim() == 1 else f"shape {_check.shape(values)}"
        raise ValueError(f"{where}: {what} has {got} entries, expected {count} (one per pair)")
    if not bool((values > 0).all()):
        raise ValueError(f"{where}: {what} must be positive, got {values.min().item():g}")
    return values.to(dtype)


def _base_powers(where: str, rotary_dim: int, base: float, dtype: torch.dtype) -> Tensor:
    """base^(2j/R), the reciprocal of the plain frequencies."""
    _even(where, "rotary_dim", rotary_dim)
    base = _check.number(where, "base", base, positive=True)
    return base ** (torch.arange(0, rotary_dim, 2).to(dtype) / rotary_dim)


def _plain(where: str, rotary_dim: int, base: float, dtype: torch.dtype) -> Tensor:
    return 1.0 / _base_powers(where, rotary_dim, base, dtype)


def _ntk_exponent(where: str, rotary_dim: int) -> float:
    if _even(where, "rotary_dim", rotary_dim) == 2:
        raise ValueError(f"{where}: rotary_dim must be at least 4 (its exponent is R / (R - 2)), got 2")
    return rotary_dim / (rotary_dim - 2)


def _rope(name: str, w: Tensor, layout: str, precision: str, dims: str = "", amplitude: float | Tensor = 1.0) -> Rope:
    return Rope(w.double(), dims, amplitude, layout, precision, name)


def _by_length(name: str, rule, original: int, layout: str, precision: str) -> Rope:
    w, amplitude = rule(torch.scalar_tensor(original, dtype=torch.float64))
    return LengthRope(w, "", amplitude, layout, precision, name, rule=rule)


# ---------------------------------------------------------------------------------------------- one frequency vector


def default(rotary_dim: int, base: float = 10000.0, *, layout: str = "half", precision: str = "exact") -> Rope:
    """RoPE, ``w_j = base^(-2j/R)`` (RoFormer, arXiv 2104.09864).

    A larger base is the "adjusted base frequency" of arXiv 2309.16039 (500000 there).

    Args:
        rotary_dim: R, even. With R below the head size the remaining channels are copied (partial rotary).
        base: positive.
        layout, precision: see the module.

    Raises:
        ValueError: odd rotary_dim, base not positive.

    >>> import fastpe
    >>> fastpe.rope.default(4).inv_freq.tolist()
    [1.0, 0.01]
    """
    return _rope("default", _plain("fastpe.rope.default", rotary_dim, base, _dtype(precision)), layout, precision)


def linear(
    rotary_dim: int, factor: float, base: float = 10000.0, *, layout: str = "half", precision: str = "exact"
) -> Rope:
    """Position interpolation, ``w_j / factor`` (arXiv 2306.15595).

    Args:
        factor: new length over trained length, at least 1.

    >>> import fastpe
    >>> fastpe.rope.linear(4, factor=4.0).inv_freq.tolist()
    [0.25, 0.0025]
    """
    where = "fastpe.rope.linear"
    factor = _factor(where, "factor", factor)
    return _rope("linear", _plain(where, rotary_dim, base, _dtype(precision)) / factor, layout, precision)


def dynamic_linear(
    rotary_dim: int, max_position: int, base: float = 10000.0, *, layout: str = "half", precision: str = "exact"
) -> Rope:
    """Position interpolation by ``length / max_position`` once the text is longer than ``max_position`` (YaRN repository).

    The frequencies depend on the length, so rotated keys must not be cached: see `fastpe.nn.RotaryEmbedding`.

    >>> import fastpe
    >>> fastpe.rope.dynamic_linear(4, max_position=1000).at_length(4000).inv_freq.tolist()
    [0.25, 0.0025]
    """
    where = "fastpe.rope.dynamic_linear"
    _check.count(where, "max_position", max_position, 1)
    plain = _plain(where, rotary_dim, base, _dtype(precision)).double()

    def rule(length: Tensor) -> tuple[Tensor, float]:
        return plain.to(length.device) / (length / max_position).clamp(min=1.0), 1.0

    return _by_length("dynamic_linear", rule, max_position, layout, precision)


def ntk(
    rotary_dim: int, alpha: float, base: float = 10000.0, *, layout: str = "half", precision: str = "exact"
) -> Rope:
    """NTK-aware scaling: RoPE with the base times ``alpha^(R/(R-2))`` (described in YaRN, arXiv 2309.00071).

    Args:
        alpha: at least 1.

    Raises:
        ValueError: rotary_dim of 2, for which the exponent is undefined.

    >>> import fastpe
    >>> slowest = fastpe.rope.ntk(64, alpha=8.0).inv_freq[-1] / fastpe.rope.default(64).inv_freq[-1]
    >>> round(float(slowest), 6)
    0.125
    """
    where = "fastpe.rope.ntk"
    exponent = _ntk_exponent(where, rotary_dim)
    base = _check.number(where, "base", base, positive=True) * _factor(where, "alpha", alpha) ** exponent
    return _rope("ntk", _plain(where, rotary_dim, base, _dtype(precision)), layout, precision)


def dynamic_ntk(
    rotary_dim: int,
    factor: float,
    max_position: int,
    base: float = 10000.0,
    *,
    layout: str = "half",
    precision: str = "exact",
) -> Rope:
    """Dynamic NTK: the base grows with the text, ``base * (factor * len / max_position - (factor - 1))^(R/(R-2))``.

    ``len`` is the longer of the text and ``max_position`` (transformers' "dynamic"; YaRN, arXiv 2309.00071). It is a pure
    function of the length: keys rotated for an earlier length do not fit, so cache them un-rotated
    (see `fastpe.nn.RotaryEmbedding`).

    Args:
        factor: at least 1.
        max_position: length the model was trained at.

    >>> import fastpe
    >>> rope = fastpe.rope.dynamic_ntk(64, factor=2.0, max_position=2048)
    >>> bool((rope.at_length(1000).inv_freq == fastpe.rope.default(64).inv_freq).all())
    True
    """
    where = "fastpe.rope.dynamic_ntk"
    exponent = _ntk_exponent(where, rotary_dim)
    factor = _factor(where, "factor", factor)
    base = _check.number(where, "base", base, positive=True)
    _check.count(where, "max_position", max_position, 1)
    dtype = _dtype(precision)
    powers = torch.arange(0, rotary_dim, 2).to(dtype) / rotary_dim

    def rule(length: Tensor) -> tuple[Tensor, float]:
        length = length.to(dtype).clamp(min=max_position)
        grown = base * (factor * length / max_position - (factor - 1)) ** exponent
        return (1.0 / grown ** powers.to(length.device)).double(), 1.0

    return _by_length("dynamic_ntk", rule, max_position, layout, precision)


def _correction_dim(rotations: float, rotary_dim: int, base: float, length: float) -> float:
    """The (real) pair index that turns `rotations` times in `length` tokens."""
    return rotary_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))


def _keep_mask(
    where: str,
    rotary_dim: int,
    base: float,
    length: float,
    fast: float,
    slow: float,
    truncate: bool,
    dtype: torch.dtype,
) -> Tensor:
    """(R/2,) 1 for pairs that turn more than `fast` times in `length` tokens, 0 below `slow`, a ramp in the pair index between."""
    _even(where, "rotary_dim", rotary_dim)
    if _check.number(where, "base", base, positive=True) == 1:
        raise ValueError(f"{where}: base must not be 1, whose pairs all turn alike")
    low = _correction_dim(fast, rotary_dim, base, length)
    high = _correction_dim(slow, rotary_dim, base, length)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(rotary_dim // 2, dtype=dtype) - low) / (high - low)
    return 1 - ramp.clamp(0, 1)


def ntk_by_parts(
    rotary_dim: int,
    factor: float,
    original_max_position: int = 2048,
    base: float = 10000.0,
    *,
    ntk_factor: float = 1.0,
    extrapolation_factor: float = 1.0,
    layout: str = "half",
    precision: str = "exact",
) -> Rope:
    """NTK-by-parts as released in the YaRN repository (arXiv 2309.00071): slow pairs interpolated, middle ones NTK-scaled, fast ones kept.

    Args:
        factor: new length over ``original_max_position``, at least 1.
        ntk_factor, extrapolation_factor: weights of the NTK-scaled and of the unchanged part.

    >>> import fastpe
    >>> rope = fastpe.rope.ntk_by_parts(64, factor=4.0)
    >>> float(rope.inv_freq[0])
    1.0
    """
    where = "fastpe.rope.ntk_by_parts"
    dtype = _dtype(precision)
    factor = _factor(where, "factor", factor)
    _check.count(where, "original_max_position", original_max_position, 1)
    powers = _base_powers(where, rotary_dim, base, dtype)
    kept, interpolated = 1.0 / powers, 1.0 / (factor * powers)
    scaled = _plain(where, rotary_dim, base * factor ** _ntk_exponent(where, rotary_dim), dtype)
    weight = _keep_mask(where, rotary_dim, base, original_max_position, 1.25, 0.75, True, dtype) * ntk_factor
    w = interpolated * (1 - weight) + scaled * weight
    weight = _keep_mask(where, rotary_dim, base, original_max_position, 16, 2, True, dtype) * extrapolation_factor
    return _rope("ntk_by_parts", w * (1 - weight) + kept * weight, layout, precision)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's amplitude ``0.1 * mscale * ln(factor) + 1`` (arXiv 2309.00071); 1 for a factor up to 1.

    DeepSeek models also multiply the softmax scale by ``yarn_mscale(factor, mscale_all_dim) ** 2``: pass it in
    `fastpe.attention`'s ``scale``.

    >>> import fastpe
    >>> round(fastpe.rope.yarn_mscale(4.0), 6)
    1.138629
    """
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn(
    rotary_dim: int,
    factor: float | None,
    original_max_position: int,
    base: float = 10000.0,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    extrapolation_factor: float = 1.0,
    attention_factor: float | None = None,
    attn_factor: float = 1.0,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    revised: bool = False,
    layout: str = "half",
    precision: str = "exact",
) -> Rope:
    """YaRN: slow pairs interpolated, fast pairs kept, a ramp in between, and a larger amplitude (arXiv 2309.00071).

    Args:
        factor: new length over ``original_max_position``, at least 1. None makes it dynamic: ``length /
            original_max_position`` of the text at hand, at least 1; then cache keys un-rotated.
        original_max_position: length the model was trained at.
        beta_fast, beta_slow: turns within that length above which a pair is kept and below which it is interpolated.
        truncate: round the ends of the ramp to whole pairs.
        extrapolation_factor: weight of the kept frequencies.
        attention_factor: amplitude of cos and sin, used as it is. Without it: ``yarn_mscale(factor, mscale) /
            yarn_mscale(factor, mscale_all_dim)`` if both are given (DeepSeek), else ``yarn_mscale(factor)``; times
            ``attn_factor``.
        revised: blend the periods instead of the frequencies (PoSE repository, arXiv 2309.10400).

    >>> import fastpe
    >>> fastpe.rope.yarn(128, factor=4.0, original_max_position=4096)
    yarn(rotary_dim=128, amplitude=1.13863, layout='half')
    """
    where = "fastpe.rope.yarn"
    dtype = _dtype(precision)
    _check.count(where, "original_max_position", original_max_position, 1)
    if factor is not None:
        factor = _factor(where, "factor", factor)
    powers = _base_powers(where, rotary_dim, base, dtype)
    keep = _keep_mask(where, rotary_dim, base, original_max_position, beta_fast, beta_slow, truncate, dtype)
    keep = keep * extrapolation_factor

    def blend(s: float | Tensor, powers: Tensor, keep: Tensor) -> Tensor:
        if revised:
            return (1.0 / powers) / ((1 - keep) * s + keep)
        return 1.0 / (s * powers) * (1 - keep) + 1.0 / powers * keep

    if factor is not None:
        if attention_factor is None:
            if mscale and mscale_all_dim:
                attention_factor = attn_factor * yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
            else:
                attention_factor = attn_factor * yarn_mscale(factor)
        return _rope("yarn", blend(factor, powers, keep), layout, precision, amplitude=float(attention_factor))

    def rule(length: Tensor) -> tuple[Tensor, float | Tensor]:
        s = (length / original_max_position).clamp(min=1.0)
        w = blend(s.to(dtype), powers.to(length.device), keep.to(length.device)).double()
        if attention_factor is not None:
            return w, attention_factor
        if mscale and mscale_all_dim:
            return w, attn_factor * (0.1 * mscale * s.log() + 1) / (0.1 * mscale_all_dim * s.log() + 1)
        return w, attn_factor * (0.1 * s.log() + 1)

    return _by_length("yarn", rule, original_max_position, layout, precision)


def longrope(
    rotary_dim: int,
    short_factor: Sequence[float],
    long_factor: Sequence[float],
    original_max_position: int,
    *,
    max_position: int | None = None,
    factor: float | None = None,
    base: float = 10000.0,
    attention_factor: float | str | None = None,
    dynamic: bool = False,
    first_tokens: int = 0,
    layout: str = "half",
    precision: str = "exact",
) -> Rope:
    """LongRoPE: every pair is slowed by a searched factor (arXiv 2402.13753; transformers' "longrope").

    A text of up to ``original_max_position`` tokens uses ``short_factor``, a longer one ``long_factor``, all of its tokens
    alike. The choice depends on the length, so cache keys un-rotated where texts grow past the switch.

    Args:
        short_factor, long_factor: R/2 positive numbers each; the frequencies are divided by them.
        original_max_position: L0, length the model was trained at.
        max_position, factor: the length aimed at, or that over L0; one of them sets the amplitude.
        attention_factor: amplitude: a number, "su" for ``sqrt(1 + ln factor / ln L0)`` (the default) or "yarn" for
            ``yarn_mscale(factor)``.
        dynamic: slow by ``1 + (long - 1) * (len / L0 - 1) / (factor - 1)``, growing with the text (official code's
            dynamic class), in place of the switch.
        first_tokens: tokens at positions below this turn at the plain frequencies with amplitude 1, in texts of any length;
            the others by ``long_factor``. Such scores are not a function of the distance alone.

    Raises:
        ValueError: a list whose length is not R/2, neither max_position nor factor nor a number for attention_factor.

    >>> import fastpe
    >>> rope = fastpe.rope.longrope(8, [1.0] * 4, [1.0, 2.0, 4.0, 8.0], original_max_position=4096, max_position=32768)
    >>> float(rope.at_length(4096).inv_freq[3] / rope.at_length(4097).inv_freq[3])
    8.0
    """
    where = "fastpe.rope.longrope"
    dtype = _dtype(precision)
    _check.count(where, "original_max_position", original_max_position, 2)
    _check.count(where, "first_tokens", first_tokens, 0)
    powers = _base_powers(where, rotary_dim, base, dtype)
    short = _factors(where, "short_factor", short_factor, rotary_dim // 2, dtype)
    long = _factors(where, "long_factor", long_factor, rotary_dim // 2, dtype)
    if factor is None and max_position is not None:
        factor = _check.count(where, "max_position", max_position, 1) / original_max_position
    if (factor is None and not isinstance(attention_factor, (int, float))) or (dynamic and factor is None):
        raise ValueError(f"{where}: max_position or factor is needed to set the amplitude, got neither")
    if attention_factor is None or isinstance(attention_factor, str):
        check_choice(where, "attention_factor", attention_factor, (None, "su", "yarn"))
        if attention_factor == "yarn":
            attention_factor = yarn_mscale(factor)
        elif factor <= 1:
            attention_factor = 1.0
        else:
            attention_factor = math.sqrt(1 + math.log(factor) / math.log(original_max_position))
    slow = 1.0 / (long * powers)
    if first_tokens:
        later = _rope("longrope", slow, layout, precision, amplitude=attention_factor)
        return FirstTokensRope(
            (1.0 / powers).double(), "", 1.0, layout, precision, "longrope", count=first_tokens, later=later
        )

    if dynamic:
        if factor <= 1:
            raise ValueError(f"{where}: factor must be above 1 for dynamic=True, got {factor:g}")

        def rule(length: Tensor) -> tuple[Tensor, float]:
            grown = (length / original_max_position).clamp(min=1.0) - 1
            stretch = 1 + (long.to(length.device) - 1) * (grown / (factor - 1)).to(dtype)
            return (1.0 / (stretch * powers.to(length.device))).double(), attention_factor

    else:
        fast = 1.0 / (short * powers)

        def rule(length: Tensor) -> tuple[Tensor, float]:
            w = torch.where(length > original_max_position, slow.to(length.device), fast.to(length.device))
            return w.double(), attention_factor

    return _by_length("longrope", rule, original_max_position, layout, precision)


def llama3(
    rotary_dim: int,
    factor: float = 8.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_position: int = 8192,
    base: float = 500000.0,
    *,
    layout: str = "half",
    precision: str = "exact",
) -> Rope:
    """Llama 3.1's scaling: pairs whose period exceeds the trained length are slowed by ``factor`` (arXiv 2407.21783).

    Pairs that turn more than ``high_freq_factor`` times in ``original_max_position`` tokens are kept, those below
    ``low_freq_factor`` divided by ``factor``, blended in between.

    >>> import fastpe
    >>> rope = fastpe.rope.llama3(128)
    >>> float(fastpe.rope.default(128, 500000.0).inv_freq[-1] / rope.inv_freq[-1])
    8.0
    """
    where = "fastpe.rope.llama3"
    factor = _factor(where, "factor", factor)
    low = _check.number(where, "low_freq_factor", low_freq_factor, positive=True)
    high = _check.number(where, "high_freq_factor", high_freq_factor, positive=True)
    if high <= low:
        raise ValueError(f"{where}: high_freq_factor must exceed low_freq_factor {low:g}, got {high:g}")
    _check.count(where, "original_max_position", original_max_position, 1)
    w = _plain(where, rotary_dim, base, _dtype(precision))
    period = 2 * math.pi / w
    keep = (original_max_position / period - low) / (high - low)
    blended = (1 - keep) * w / factor + keep * w
    w = torch.where(keep >= 1, w, torch.where(keep <= 0, w / factor, blended))
    return _rope("llama3", w, layout, precision)


def proportional(
    head_dim: int,
    fraction: float,
    base: float = 10000.0,
    *,
    factor: float = 1.0,
    layout: str = "half",
    precision: str = "exact",
) -> Rope:
    """p-RoPE: only the fastest ``fraction`` of the pairs turn (arXiv 2410.06205; transformers' "proportional").

    Unlike partial rotary, pairs span the whole head, (j, j + D/2), and the exponent is over ``head_dim``; the slow pairs
    have frequency 0 and are returned bit for bit.

    Args:
        fraction: share of the channels that turn, in [0, 1].
        factor: divides the frequencies, at least 1.

    >>> import fastpe
    >>> fastpe.rope.proportional(8, 0.5).inv_freq.tolist()
    [1.0, 0.1, 0.0, 0.0]
    """
    where = "fastpe.rope.proportional"
    fraction = _check.number(where, "fraction", fraction)
    if not 0 <= fraction <= 1:
        raise ValueError(f"{where}: fraction must be in [0, 1], got {fraction:g}")
    w = _plain(where, head_dim, base, _dtype(precision)) / _factor(where, "factor", factor)
    turning = int(fraction * head_dim // 2)
    return _rope("proportional", torch.where(torch.arange(head_dim // 2) < turning, w, 0.0), layout, precision)


def giraffe(
    rotary_dim: int,
    base: float = 10000.0,
    *,
    scale: float = 1.0,
    power: float = 0.0,
    truncate: float | None = None,
    layout: str = "half",
    precision: str = "exact",
) -> Rope:
    """Giraffe's scalings, in this order: linear, power, truncation (arXiv 2308.10882).

    Args:
        scale: divides the frequencies, at least 1.
        power: multiplies frequency j by ``(1 - j / (R/2))^power``, at least 0.
        truncate: T. With c = 2 pi / T, frequencies of at least c are kept, those down to c / 8 become c / 16, the rest 0.

    >>> import fastpe
    >>> fastpe.rope.giraffe(4, truncate=100.0).inv_freq.tolist()[0]
    1.0
    """
    where = "fastpe.rope.giraffe"
    dtype = _dtype(precision)
    w = _plain(where, rotary_dim, base, dtype) / _factor(where, "scale", scale)
    power = _check.number(where, "power", power)
    if power < 0:
        raise ValueError(f"{where}: power must be at least 0, got {power:g}")
    if power > 0:
        w = w * (1 - torch.arange(rotary_dim // 2, dtype=dtype) / (rotary_dim // 2)) ** power
    if truncate is not None:
        c = 2 * math.pi / _check.number(where, "truncate", truncate, positive=True)
        w = torch.where(w >= c, w, torch.where(w >= c / 8, c / 16, 0.0))
    return _rope("giraffe", w, layout, precision)


# ---------------------------------------------------------------------------------------------- CLEX


def _clex_ode(up: Tensor, down: Tensor, start: Tensor, end: float, step: float, base: float, act) -> Tensor:
    """ln w at t = 1, 2, .. up to `end`, then at `end`: rows (floor(end) [+ 1 if end is no integer], J).

    dx/dt = act((x + ln n(t)) up) down + d(t)/n(t), where n(t) are the NTK-aware frequencies for alpha = 2t - 1 and d their
    derivative; Runge-Kutta of order 4 by the 3/8 rule on a fixed grid (CLEX, arXiv 2310.16450).
    """
    dtype, pairs = start.dtype, start.shape[0]
    dim = 2 * pairs
    count = math.ceil((end - 1) / step + 1)
    grid = torch.arange(count, dtype=dtype) * step + 1
    grid[-1] = end
    t0, h = grid[:-1], grid[1:] - grid[:-1]
    stages = torch.stack((t0, t0 + h / 3, t0 + h * 2 / 3, grid[1:]), 1)
    alpha = (2 * stages - 1).clamp(min=1.0)[..., None]
    i = torch.arange(0, dim, 2, dtype=dtype)
    log_n = (-(i / dim) * math.log(base) - i / (dim - 2) * alpha.log()).to(start.device)
    d_over_n = (-2 * i / (dim - 2) / alpha).to(start.device)

    wanted = [float(t) for t in range(1, math.floor(end) + 1)]
    if wanted[-1] != end:
        wanted.append(float(end))
    points, steps = grid.tolist(), h.tolist()
    x, out = start, [start]
    for n, h in enumerate(steps):

        def slope(stage: int, y: Tensor) -> Tensor:
            return act((y + log_n[n, stage]) @ up) @ down + d_over_n[n, stage]

        k1 = slope(0, x)
        k2 = slope(1, x + h * k1 / 3)
        k3 = slope(2, x + h * (k2 - k1 / 3))
        k4 = slope(3, x + h * (k1 - k2 + k3))
        nxt = x + h * (k1 + 3 * (k2 + k3) + k4) / 8
        while len(out) < len(wanted) and wanted[len(out)] <= points[n + 1]:
            share = (wanted[len(out)] - points[n]) / (points[n + 1] - points[n])
            out.append(nxt if share >= 1 else x + (nxt - x) * share)
        x = nxt
    out.extend([x] * (len(wanted) - len(out)))
    return torch.stack(out)


def clex(
    up: Tensor,
    down: Tensor,
    max_position: int,
    *,
    factor: float | None = None,
    max_factor: int = 16,
    base: float = 10000.0,
    act: str = "tanh",
    time_dt: float = 0.01,
    layout: str = "half",
    precision: str = "exact",
) -> Rope:
    """CLEX: frequencies follow an ordinary differential equation with learned weights in the length (arXiv 2310.16450).

    Gradients reach ``up`` and ``down`` through the solver. The equation is solved when this is called: build the
    embedding anew in every training step (`fastpe.nn.RotaryEmbedding` does), and once for inference.

    Args:
        up: ``(R/2, c R)``, kaiming-uniform at the start; c is the paper's parameter factor.
        down: ``(c R, R/2)``, zeros at the start, which gives NTK-aware frequencies.
        max_position: L0, length the model was trained at.
        factor: training: the drawn length factor t >= 1 (see `fastpe.positions.clex_train`). Without it the embedding
            depends on the length and uses ``t = min(ceil(length / L0), max_factor)``, with t = 1 plain RoPE; cache keys
            un-rotated.
        max_factor: largest integer t.
        act: "tanh" or "silu".
        time_dt: step of the solver.

    Raises:
        ValueError: shapes of up and down that do not fit, factor below 1.

    >>> import torch, fastpe
    >>> rope = fastpe.rope.clex(torch.randn(8, 16), torch.zeros(16, 8), 32, max_factor=4, time_dt=0.1)
    >>> ntk = fastpe.rope.ntk(16, alpha=2 * 2 - 1.0)
    >>> torch.allclose(rope.at_length(64).inv_freq, ntk.inv_freq, rtol=1e-4)
    True
    """
    where = "fastpe.rope.clex"
    for what, x in (("up", up), ("down", down)):
        _check.is_float(where, what, x)
        if x.dim() != 2:
            raise ValueError(f"{where}: {what} must have 2 axes, got shape {_check.shape(x)}")
    if down.shape != (up.shape[1], up.shape[0]):
        raise ValueError(f"{where}: down must be ({up.shape[1]}, {up.shape[0]}) to fit up, got {_check.shape(down)}")
    if up.shape[0] < 2:
        raise ValueError(f"{where}: up must have at least 2 rows (pairs), got {up.shape[0]}")
    check_choice(where, "act", act, ("tanh", "silu"))
    _check.count(where, "max_position", max_position, 1)
    _check.count(where, "max_factor", max_factor, 1)
    step = _check.number(where, "time_dt", time_dt, positive=True)
    end = float(max_factor) if factor is None else _factor(where, "factor", factor)
    dtype = _dtype(precision)
    plain = _plain(where, 2 * up.shape[0], base, dtype).to(up.device)
    activation = torch.tanh if act == "tanh" else torch.nn.functional.silu
    if end > 1:
        path = _clex_ode(up.to(dtype), down.to(dtype), plain.log(), end, step, base, activation)
        table = torch.cat((plain[None], path[1:].exp())).double()
    else:
        table = plain[None].double()
    if factor is not None:
        return _rope("clex", table[-1], layout, precision)

    def rule(length: Tensor) -> tuple[Tensor, float]:
        t = (length / max_position).ceil().clamp(1, max_factor).to(torch.int64)
        return table.to(length.device).index_select(0, (t - 1).reshape(1))[0], 1.0

    return LengthRope(table[0], "", 1.0, layout, precision, "clex", rule=rule)


# ---------------------------------------------------------------------------------------------- per head, per batch row


HARPE_BASES: tuple[float, ...] = tuple(
    1e4 * n
    for n in (
        100,
        115,
        130,
        145,
        217,
        220,
        223,
        247,
        250,
        265,
        268,
        271,
        274,
        280,
        283,
        292,
        301,
        304,
        310,
        313,
        316,
        322,
        343,
        346,
        361,
        388,
        409,
        415,
        439,
        445,
        451,
        454,
    )
)
"""The searched bases of HARPE's Table 2, one per head of a 32-head model (arXiv 2412.07171)."""

BUCKET_BASES: tuple[float, ...] = (10000.0, 17500.0, 18000.0, 19000.0, 20000.0, 25000.0)
"""The bases Attention Buckets uses for tool use (arXiv 2312.04455)."""


def _bases(where: str, bases: Sequence[float] | Tensor) -> Tensor:
    bases = torch.as_tensor(bases, dtype=torch.float64)
    if bases.dim() != 1 or bases.numel() == 0:
        raise ValueError(f"{where}: bases must be a list of numbers, got shape {_check.shape(bases)}")
    if not bool((bases > 0).all()):
        raise ValueError(f"{where}: bases must be positive, got {bases.min().item():g}")
    return bases


def _many_bases(where: str, rotary_dim: int, bases: Sequence[float] | Tensor, dtype: torch.dtype) -> Tensor:
    _even(where, "rotary_dim", rotary_dim)
    exponent = torch.arange(0, rotary_dim, 2).to(dtype) / rotary_dim
    return 1.0 / _bases(where, bases).to(dtype)[:, None] ** exponent


def harpe_bases(heads: int, low: float = 1e6, high: float = 5e6) -> Tensor:
    """HARPE's uniform spacing of bases over the heads, ``low`` to ``high`` (arXiv 2412.07171): float64 ``(heads,)``.

    >>> import fastpe
    >>> fastpe.rope.harpe_bases(5).tolist()
    [1000000.0, 2000000.0, 3000000.0, 4000000.0, 5000000.0]
    """
    where = "fastpe.rope.harpe_bases"
    _check.count(where, "heads", heads, 2)
    return torch.linspace(
        _check.number(where, "low", low, positive=True),
        _check.number(where, "high", high, positive=True),
        heads,
        dtype=torch.float64,
    )


def harpe(rotary_dim: int, bases: Sequence[float] | Tensor, *, layout: str = "half", precision: str = "exact") -> Rope:
    """HARPE: every head has its own base (arXiv 2412.07171).

    Args:
        bases: one per head; see `harpe_bases` and `HARPE_BASES`.

    >>> import fastpe
    >>> fastpe.rope.harpe(64, fastpe.rope.harpe_bases(8))
    harpe(rotary_dim=64, heads=8, layout='half')
    """
    return _rope(
        "harpe", _many_bases("fastpe.rope.harpe", rotary_dim, bases, _dtype(precision)), layout, precision, "h"
    )


def attention_buckets(
    rotary_dim: int,
    bases: Sequence[float] | Tensor = BUCKET_BASES,
    *,
    layout: str = "half",
    precision: str = "exact",
) -> Rope:
    """Attention Buckets: every batch row has its own base (arXiv 2312.04455).

    Repeat the text once per base, keep one cache per row and combine the rows' last logits with `mix_buckets`.

    Args:
        bases: one per batch row.

    >>> import fastpe
    >>> fastpe.rope.attention_buckets(64)
    attention_buckets(rotary_dim=64, batch=6, layout='half')
    """
    w = _many_bases("fastpe.rope.attention_buckets", rotary_dim, bases, _dtype(precision))
    return _rope("attention_buckets", w, layout, precision, "b")


def mix_buckets(logits: Tensor) -> Tensor:
    """Combines the logits of Attention Buckets' rows: rows weighted by the softmax of their largest logit (arXiv 2312.04455).

    Args:
        logits: ``(buckets, vocabulary)`` of the last position, any float dtype.

    Returns:
        float32 ``(vocabulary,)``.

    >>> import torch, fastpe
    >>> fastpe.rope.mix_buckets(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).tolist()
    [1.0, 0.5]
    """
    where = "fastpe.rope.mix_buckets"
    _check.is_float(where, "logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"{where}: logits must be (buckets, vocabulary), got shape {_check.shape(logits)}")
    logits = logits.float()
    return logits.amax(1).softmax(0) @ logits


def ms_poe(
    rotary_dim: int,
    ratios: Sequence[float] | Tensor,
    base: float = 10000.0,
    *,
    layout: str = "half",
    precision: str = "exact",
) -> Rope:
    """Ms-PoE: every head reads positions divided by its own ratio (arXiv 2403.04797).

    With grouped heads key head g uses the ratio of query head ``g * (H // Hk)`` while the group's query heads keep theirs,
    as the released code does; scores are then no longer a function of the distance.

    Args:
        ratios: one per query head, at least 1; see `ms_poe_ratios`.

    >>> import fastpe
    >>> fastpe.rope.ms_poe(64, [1.2, 1.4, 1.6, 1.8])
    ms_poe(rotary_dim=64, heads=4, layout='half')
    """
    where = "fastpe.rope.ms_poe"
    ratios = torch.as_tensor(ratios, dtype=torch.float64)
    if ratios.dim() != 1 or ratios.numel() == 0:
        raise ValueError(f"{where}: ratios must be a list of numbers, one per head, got shape {_check.shape(ratios)}")
    if not bool((ratios >= 1).all()):
        raise ValueError(f"{where}: ratios must be at least 1, got {ratios.min().item():g}")
    w = _plain(where, rotary_dim, base, _dtype(precision)).double()
    return _rope("ms_poe", w / ratios[:, None], layout, precision, "h")


def ms_poe_outliers(query: Tensor, key: Tensor, *, threshold: float = 3.0) -> Tensor:
    """Ms-PoE's measure of how position-aware a head is (arXiv 2403.04797): float64 ``(B, H)``.

    The share of keys whose attention from the last query exceeds ``threshold`` times the row's mean, from un-rotated
    query and key.

    Args:
        query: ``(B, H, Nq, D)``; only the last row is read.
        key: ``(B, Hk, Nk, D)``.

    >>> import torch, fastpe
    >>> fastpe.rope.ms_poe_outliers(torch.ones(1, 2, 1, 8), torch.zeros(1, 2, 5, 8)).tolist()
    [[0.0, 0.0]]
    """
    where = "fastpe.rope.ms_poe_outliers"
    for what, x in (("query", query), ("key", key)):
        if _check.is_float(where, what, x).dim() != 4:
            raise ValueError(f"{where}: {what} must be (B, H, N, D), got shape {_check.shape(x)}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{where}: key has {key.shape[1]} heads, which does not divide query's {query.shape[1]}")
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query[:, :, -1:].float() @ key.float().transpose(2, 3))[:, :, 0] / math.sqrt(query.shape[3])
    p = scores.softmax(-1)
    return (p > threshold * p.mean(-1, keepdim=True)).double().mean(-1)


def ms_poe_ratios(
    outliers: Tensor | None,
    low: float = 1.2,
    high: float = 1.8,
    *,
    assignment: str = "paper",
    heads: int | None = None,
) -> Tensor:
    """Which head gets which of Ms-PoE's ratios (arXiv 2403.04797): float64 ``(H,)`` for `ms_poe`.

    The paper's text, its Algorithm 1 and the released code differ:

    * "paper": heads sorted by falling outlier share; the i-th gets ``low + i (high - low) / (H - 1)``.
    * "algorithm1": head h gets that ratio at index ``argsort(-outliers)[h]``, the inverse permutation.
    * "code": head h gets ``low + (high - low) argsort(-outliers)[h] / H``, which never reaches ``high``.
    * "normal": the released code's option without measuring: the order H-1 .. 0 in place of the argsort.

    Args:
        outliers: ``(H,)``, from `ms_poe_outliers`; ties keep the order of the heads. Not read for "normal".
        heads: H, for "normal" without outliers.

    >>> import torch, fastpe
    >>> fastpe.rope.ms_poe_ratios(torch.tensor([0.1, 0.3, 0.2]), 1.0, 2.0).tolist()
    [2.0, 1.0, 1.5]
    """
    where = "fastpe.rope.ms_poe_ratios"
    check_choice(where, "assignment", assignment, ("paper", "algorithm1", "code", "normal"))
    low, high = _factor(where, "low", low), _factor(where, "high", high)
    if assignment == "normal":
        if heads is None:
            heads = _check.is_tensor(where, "outliers", outliers).shape[0]
        order = torch.arange(heads - 1, -1, -1)
    else:
        _check.is_tensor(where, "outliers", outliers)
        if outliers.dim() != 1:
            raise ValueError(f"{where}: outliers must be (H,), got shape {_check.shape(outliers)}")
        order = torch.argsort(outliers, descending=True, stable=True)
    n = order.shape[0]
    if assignment in ("code", "normal"):
        return low + (high - low) * order.double() / n
    ratios = torch.linspace(low, high, n, dtype=torch.float64, device=order.device)
    if assignment == "algorithm1":
        return ratios[order]
    return torch.empty_like(ratios).scatter_(0, order, ratios)


def learned(inv_freq: Tensor, *, dims: str = "", layout: str = "half", precision: str = "exact") -> Rope:
    """Learnable frequencies: gradients reach ``inv_freq`` from `fastpe.attention` and `fastpe.apply_rotary`.

    Args:
        inv_freq: a float32 or float64 parameter, shape as ``dims`` says (see `Rope`).

    >>> import torch, fastpe
    >>> w = torch.nn.Parameter(fastpe.rope.default(8).inv_freq.clone())
    >>> fastpe.rope.learned(w)
    learned(rotary_dim=8, layout='half')
    """
    return Rope(inv_freq, dims, 1.0, layout, precision, "learned")


def xpos(
    rotary_dim: int,
    base: float = 10000.0,
    *,
    scale_base: float = 512.0,
    center: float | str = "floor",
    layout: str = "half",
    precision: str = "exact",
) -> Rope:
    """xPos: RoPE whose scores decay with the distance, pair j by ``zeta_j^(distance / scale_base)`` (arXiv 2212.10554).

    Queries are scaled by ``zeta_j^((p - c) / scale_base)``, keys by the inverse, ``zeta_j = (2j + 0.4 R) / (1.4 R)``. For
    `fastpe.apply_rotary` on keys pass ``rope.key_side``.

    Args:
        center: c, the same for all tokens that meet: a position, or half the text's length rounded down ("floor") or up
            ("ceil"). Exact arithmetic does not see it; it keeps the factors in range (0.29^(n / 1024) at n tokens). Rotated
            keys may only be cached with a number here.

    >>> import fastpe
    >>> fastpe.rope.xpos(64)
    xpos(rotary_dim=64, layout='half')
    """
    where = "fastpe.rope.xpos"
    w = _plain(where, rotary_dim, base, _dtype(precision)).double()
    _check.number(where, "scale_base", scale_base, positive=True)
    if isinstance(center, str):
        check_choice(where, "center", center, ("floor", "ceil"))
    else:
        center = _check.number(where, "center", center)
    zeta = (torch.arange(0, rotary_dim, 2, dtype=torch.float64) + 0.4 * rotary_dim) / (1.4 * rotary_dim)
    return XposRope(w, "", 1.0, layout, precision, "xpos", zeta=zeta, scale_base=float(scale_base), center=center)


# ---------------------------------------------------------------------------------------------- several axes


def axial(
    rotary_dim: int,
    axes: int = 2,
    base: float = 100.0,
    *,
    spectrum: str = "power",
    max_freq: float = 10.0,
    order: str = "blocks",
    layout: str = "interleaved",
    precision: str = "exact",
) -> Rope:
    """Axial RoPE: each position axis turns its own share of the pairs (rope-vit, arXiv 2403.13298).

    ``base=100, layout="interleaved"`` with axes (column, row) is rope-vit; ``base=10000, layout="half"`` with axes (row,
    column) is the vision tower of Qwen2-VL and transformers' "axial"; ``spectrum="pixel"`` is rotary-embedding-torch's, with
    positions in [-1, 1].

    Args:
        rotary_dim: R, a multiple of ``2 * axes``; each axis has P = R / (2 axes) pairs.
        axes: position axes; positions are ``(axes, N)`` or ``(axes, B, N)``, see `fastpe.positions.grid`.
        spectrum: "power": ``base^(-i / P)``; "pixel": ``pi * linspace(1, max_freq / 2, P)``.
        order: "blocks": axis 0's pairs first, then axis 1's; "alternate": pair j belongs to axis ``j % axes`` and has the
            frequency ``base^(-j / (axes * P))`` (V2PE's alternative table, arXiv 2412.09616).

    >>> import fastpe
    >>> fastpe.rope.axial(8).inv_freq.tolist()
    [[1.0, 0.1, 0.0, 0.0], [0.0, 0.0, 1.0, 0.1]]
    """
    where = "fastpe.rope.axial"
    _check.count(where, "axes", axes, 1)
    _check.count(where, "rotary_dim", rotary_dim, 2)
    if rotary_dim % (2 * axes):
        raise ValueError(f"{where}: rotary_dim must be a multiple of {2 * axes} for {axes} axes, got {rotary_dim}")
    check_choice(where, "spectrum", spectrum, ("power", "pixel"))
    check_choice(where, "order", order, ("blocks", "alternate"))
    pairs = rotary_dim // 2
    each = pairs // axes
    dtype = _dtype(precision)
    if order == "alternate":
        axis = torch.arange(pairs) % axes
        w = _plain(where, rotary_dim, base, dtype)
    else:
        axis = torch.arange(pairs) // each
        if spectrum == "pixel":
            _check.number(where, "max_freq", max_freq, positive=True)
            w = torch.linspace(1.0, max_freq / 2, each, dtype=dtype) * math.pi
        else:
            w = _plain(where, 2 * each, base, dtype)
        w = w.repeat(axes)
    return _rope("axial", _on_axes(w, axis, axes), layout, precision, "a")


def _on_axes(w: Tensor, axis: Tensor, axes: int) -> Tensor:
    """(J,) frequencies, of which pair j belongs to one axis -> (A,J)."""
    return torch.where(axis == torch.arange(axes)[:, None], w, 0.0)


def mixed_init(
    heads: int,
    head_dim: int,
    theta: float = 10.0,
    *,
    angles: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Start values for `mixed` as in rope-vit (arXiv 2403.13298): float64 ``(2, heads, head_dim / 2)``.

    Each head gets a random direction; its first half of pairs turns along it, the second half across, at frequencies
    ``theta^(-4i / D)``.

    Args:
        angles: the directions in radians ``(heads,)``; drawn uniformly in [0, 2 pi) from ``generator`` if not given.

    >>> import torch, fastpe
    >>> fastpe.rope.mixed_init(1, 4, angles=torch.zeros(1)).round(decimals=6)[0].tolist()
    [[1.0, 0.0]]
    """
    where = "fastpe.rope.mixed_init"
    _check.count(where, "heads", heads, 1)
    _check.count(where, "head_dim", head_dim, 4)
    if head_dim % 4:
        raise ValueError(f"{where}: head_dim must be a multiple of 4, got {head_dim}")
    if angles is None:
        angles = 2 * math.pi * torch.rand(heads, generator=generator, dtype=torch.float64)
    elif angles.shape != (heads,):
        raise ValueError(f"{where}: angles must be ({heads},), got {_check.shape(angles)}")
    magnitude = _plain(where, head_dim // 2, theta, torch.float64)
    angles = angles.double()[:, None]
    across = angles + math.pi / 2
    x = torch.cat((magnitude * angles.cos(), magnitude * across.cos()), 1)
    y = torch.cat((magnitude * angles.sin(), magnitude * across.sin()), 1)
    return torch.stack((x, y))


def mixed(freqs: Tensor, *, layout: str = "interleaved", precision: str = "exact") -> Rope:
    """RoPE-Mixed: every pair of every head turns along its own direction of the plane (rope-vit, arXiv 2403.13298).

    Args:
        freqs: ``(A, H, J)``, learnable; see `mixed_init`. Positions are ``(A, N)`` or ``(A, B, N)``.

    >>> import fastpe
    >>> fastpe.rope.mixed(fastpe.rope.mixed_init(3, 16))
    mixed(rotary_dim=16, axes=2, heads=3, layout='interleaved')
    """
    _check.is_tensor("fastpe.rope.mixed", "freqs", freqs)
    if freqs.dim() != 3:
        raise ValueError(f"fastpe.rope.mixed: freqs must be (axes, heads, pairs), got shape {_check.shape(freqs)}")
    return Rope(freqs, "ah", 1.0, layout, precision, "mixed")


def mrope_axes(sections: Sequence[int], order: str = "sections") -> list[int]:
    """Which axis of (t, h, w) = (0, 1, 2) each pair of `mrope` reads.

    >>> import fastpe
    >>> fastpe.rope.mrope_axes([2, 2, 2], "interleaved")
    [0, 1, 2, 0, 1, 2]
    """
    where = "fastpe.rope.mrope_axes"
    check_choice(where, "order", order, ("sections", "interleaved", "ernie"))
    if len(sections) != 3:
        raise ValueError(f"{where}: sections must be 3 numbers, got {len(sections)}")
    for n in sections:
        _check.count(where, "sections", n, 0)
    pairs = sum(sections)
    if order == "sections":
        return [axis for axis, n in enumerate(sections) for _ in range(n)]
    if order == "interleaved":
        _, h, w = sections
        return [1 if j % 3 == 1 and j < 3 * h else 2 if j % 3 == 2 and j < 3 * w else 0 for j in range(pairs)]
    h, w, t = sections
    if h != w:
        raise ValueError(f"{where}: sections (h, w, t) must have h == w for order 'ernie', got {h} and {w}")
    return [1, 2] * h + [0] * t


def mrope(
    rotary_dim: int,
    sections: Sequence[int],
    base: float = 1000000.0,
    *,
    order: str = "sections",
    scaling: Rope | None = None,
    layout: str | None = None,
    precision: str = "exact",
) -> Rope:
    """M-RoPE: three position axes (time, height, width) share the pairs (Qwen2-VL, arXiv 2409.12191).

    Positions are ``(3, N)`` or ``(3, B, N)``, see `fastpe.positions.mrope`; text has the same number on all axes.

    Args:
        sections: pairs per axis, adding up to R/2: (t, h, w), or (h, w, t) for order "ernie".
        order: "sections": t's pairs, then h's, then w's (Qwen2-VL, Qwen2.5-VL); "interleaved": t, h, w in turn (Qwen3-VL);
            "ernie": h and w in turn, then t (Ernie 4.5-VL).
        scaling: an embedding for plain text whose frequencies and amplitude to use, for example YaRN; ``base`` is not read
            then.
        layout: "half", and "interleaved" for order "ernie", if not given.

    Raises:
        ValueError: sections that do not add up to R/2.

    >>> import fastpe
    >>> fastpe.rope.mrope(128, [16, 24, 24])
    mrope(rotary_dim=128, axes=3, layout='half')
    """
    where = "fastpe.rope.mrope"
    _even(where, "rotary_dim", rotary_dim)
    axis = mrope_axes(sections, order)
    if len(axis) != rotary_dim // 2:
        raise ValueError(
            f"{where}: sections {list(sections)} add up to {len(axis)}, expected {rotary_dim // 2} (rotary_dim / 2)"
        )
    if layout is None:
        layout = "interleaved" if order == "ernie" else "half"
    amplitude: float | Tensor = 1.0
    if scaling is None:
        w = _plain(where, rotary_dim, base, _dtype(precision))
    else:
        if type(scaling) is not Rope or scaling.dims or scaling.rotary_dim != rotary_dim:
            raise ValueError(
                f"{where}: scaling must be a Rope of rotary_dim {rotary_dim} without axes, heads or dependence on the "
                f"length (see Rope.at_length), got {scaling!r}"
            )
        w, amplitude = scaling.inv_freq, scaling.amplitude
    return _rope("mrope", _on_axes(w.double(), torch.tensor(axis), 3), layout, precision, "a", amplitude)


def hirope(
    rotary_dim: int,
    token_dim: int | None = None,
    base: float = 10000.0,
    *,
    layout: str = "half",
    precision: str = "exact",
) -> Rope:
    """HiRoPE: the fast pairs read the place inside a segment, the slow ones the segment's number (arXiv 2403.19115).

    Positions are ``(2, N)`` or ``(2, B, N)``: (token, segment), see `fastpe.positions.hirope`.

    Args:
        token_dim: channels of the token level, R/2 if not given.

    >>> import fastpe
    >>> fastpe.rope.hirope(8).inv_freq[0].tolist()
    [1.0, 0.1, 0.0, 0.0]
    """
    where = "fastpe.rope.hirope"
    w = _plain(where, rotary_dim, base, _dtype(precision))
    pairs = rotary_dim // 4 if token_dim is None else _even(where, "token_dim", token_dim) // 2
    if pairs > rotary_dim // 2:
        raise ValueError(f"{where}: token_dim must be at most rotary_dim {rotary_dim}, got {token_dim}")
    return _rope("hirope", _on_axes(w, (torch.arange(rotary_dim // 2) >= pairs).long(), 2), layout, precision, "a")


def lrpe(
    head_dim: int,
    *,
    axes: int = 1,
    theta: Tensor | None = None,
    base: float = 10000.0,
    layout: str = "cosine",
    precision: str = "exact",
) -> Rope:
    """LRPE, linearized relative encoding, also over several axes (MD-LRPE; LightNet, arXiv 2405.21022).

    In the cosine layout every channel c has its own angle and `fastpe.apply_rotary` returns ``[x cos, x sin]``, 2D
    channels; in the rotating layouts it is RoPE with learnable, per-head frequencies. Channel (or pair) c reads axis
    ``c // e`` with frequency ``theta[..., c % e]``.

    Args:
        axes: position axes; leading tokens without a place in the grid get position 0 on all (`fastpe.positions.grid`).
        theta: ``(e,)`` or ``(H, e)``, may be learnable, ``axes * e`` at least the number of angles. For one axis the default
            is ``base^(-2c/D)``.
        layout: "cosine" (D angles), "half" or "interleaved" (D/2 angles).

    >>> import torch, fastpe
    >>> rope = fastpe.rope.lrpe(4)
    >>> fastpe.apply_rotary(torch.ones(1, 1, 3, 4), rope).shape
    torch.Size([1, 1, 3, 8])
    """
    where = "fastpe.rope.lrpe"
    check_choice(where, "layout", layout, ("cosine", "half", "interleaved"))
    _check.count(where, "axes", axes, 1)
    if layout == "cosine":
        angles = _check.count(where, "head_dim", head_dim, 1)
    else:
        angles = _even(where, "head_dim", head_dim) // 2
    if theta is None:
        if axes > 1:
            raise ValueError(f"{where}: theta is needed for {axes} axes, got none")
        base = _check.number(where, "base", base, positive=True)
        theta = base ** (-2.0 * torch.arange(angles, dtype=torch.float64) / head_dim)
    _check.is_tensor(where, "theta", theta)
    if theta.dim() not in (1, 2):
        raise ValueError(f"{where}: theta must be (e,) or (H, e), got shape {_check.shape(theta)}")
    e = theta.shape[-1]
    if axes * e < angles or (axes == 1 and e != angles):
        raise ValueError(
            f"{where}: theta has {e} entries per axis, expected {-(-angles // axes)} for {angles} angles on {axes} axes"
        )
    per_head = "h" if theta.dim() == 2 else ""
    if axes == 1:
        return Rope(theta, per_head, 1.0, layout, precision, "lrpe")
    c = torch.arange(angles, device=theta.device)
    w = theta[..., c % e]
    on = (c // e == torch.arange(axes, device=theta.device)[:, None]).to(w.dtype)
    w = on[:, None] * w if per_head else on * w
    return Rope(w, "a" + per_head, 1.0, layout, precision, "lrpe")


# ---------------------------------------------------------------------------------------------- helpers around the base


BASE_BOUND: dict[int, float] = {
    1024: 4.3e3,
    2048: 1.6e4,
    4096: 2.7e4,
    8192: 8.4e4,
    16384: 3.1e5,
    32768: 6.4e5,
    65536: 2.1e6,
    131072: 7.8e6,
    262144: 3.6e7,
    524288: 6.4e7,
    1048576: 5.1e8,
}
"""Smallest base for a context length, as printed in arXiv 2405.14591 (the head size is not stated there)."""


def base_bound(length: int) -> float:
    """The smallest RoPE base for a context of ``length`` tokens by the table of arXiv 2405.14591.

    Lengths between two entries get the longer one's base. `context_of_base` checks a base for a head size of your own: the
    table is not reproduced by it above 8k at head size 128, and larger bases do not always reach further.

    Raises:
        ValueError: a length beyond the table (1M).

    >>> import fastpe
    >>> fastpe.rope.base_bound(32768)
    640000.0
    """
    where = "fastpe.rope.base_bound"
    _check.count(where, "length", length, 1)
    for known, base in BASE_BOUND.items():
        if length <= known:
            return base
    raise ValueError(
        f"{where}: length must be at most {max(BASE_BOUND)}, the last entry of the paper's table, got {length}"
    )


def cosine_sum(base: float, distance: Tensor, rotary_dim: int = 128) -> Tensor:
    """``B_m = sum_j cos(m base^(-2j/R))``: how well RoPE tells a similar token at distance m from a random one (arXiv 2405.14591).

    Args:
        distance: m, any shape.

    Returns:
        float64, the shape of ``distance``.

    >>> import torch, fastpe
    >>> float(fastpe.rope.cosine_sum(10000.0, torch.tensor(0)))
    64.0
    """
    where = "fastpe.rope.cosine_sum"
    _check.is_tensor(where, "distance", distance)
    w = _plain(where, rotary_dim, base, torch.float64).to(distance.device)
    return (distance.double()[..., None] * w).cos().sum(-1)


def context_of_base(base: float, rotary_dim: int = 128, *, limit: int = 1 << 20) -> int | None:
    """The longest L such that `cosine_sum` is not negative at any whole distance up to L (arXiv 2405.14591).

    Args:
        limit: how far to look.

    Returns:
        L, or None when no distance up to ``limit`` is negative. Not monotonic in the base.

    >>> import fastpe
    >>> fastpe.rope.context_of_base(10000.0)
    1706
    """
    where = "fastpe.rope.context_of_base"
    _check.count(where, "limit", limit, 1)
    block = 4096
    for start in range(0, limit + 1, block):
        m = torch.arange(start, min(start + block, limit + 1))
        negative = (cosine_sum(base, m, rotary_dim) < 0).nonzero()
        if negative.numel():
            return start + int(negative[0]) - 1
    return None


def attention_waveform(base: float, distance: Tensor, rotary_dim: int = 128) -> Tensor:
    """``2 / sqrt(R) * cosine_sum``: the score of equal vectors by distance, whose peaks and troughs Attention Buckets
    (arXiv 2312.04455) and HARPE (arXiv 2412.07171) place against each other when they search for bases.

    >>> import torch, fastpe
    >>> float(fastpe.rope.attention_waveform(10000.0, torch.tensor(0), 64))
    8.0
    """
    return cosine_sum(base, distance, rotary_dim) * (2 / math.sqrt(rotary_dim))


# ---------------------------------------------------------------------------------------------- row scales


def _position_scale(where: str, positions: Tensor) -> Tensor:
    _check.is_tensor(where, "positions", positions)
    return positions.double()


def entropy_abf_scale(positions: Tensor, train_length: int = 4096) -> Tensor:
    """Entropy-ABF's scale of query rows, ``max(1, ln(p + 1) / ln(train_length))`` (arXiv 2401.07004).

    Pass it as `fastpe.attention`'s ``row_scale`` with ``rope.default(R, 500000.0)``; the paper leaves out layers 0 and 1.

    Args:
        positions: of the queries, from 0, any shape.

    Returns:
        float32, the shape of ``positions``.

    >>> import torch, fastpe
    >>> fastpe.rope.entropy_abf_scale(torch.tensor([0, 4095, 4096**2 - 1])).tolist()
    [1.0, 1.0, 2.0]
    """
    where = "fastpe.rope.entropy_abf_scale"
    _check.count(where, "train_length", train_length, 2)
    return ((_position_scale(where, positions) + 1).log() / math.log(train_length)).clamp(min=1.0).float()


def log_n_scale(length: int | Tensor, train_length: int) -> float | Tensor:
    """log-n scaling, ``ln(length) / ln(train_length)``, not clamped (an option of CLEX, arXiv 2310.16450).

    Args:
        length: one number for the whole call, or a tensor of lengths: with segment numbers plus one it is BiPE's option
            (arXiv 2401.16421), where the first segment gets 0.

    Returns:
        a number, or float32 in the tensor's shape.

    >>> import fastpe
    >>> fastpe.rope.log_n_scale(4096**2, 4096)
    2.0
    """
    where = "fastpe.rope.log_n_scale"
    _check.count(where, "train_length", train_length, 2)
    if isinstance(length, Tensor):
        return (length.double().log() / math.log(train_length)).float()
    return math.log(_check.count(where, "length", length, 1)) / math.log(train_length)


def floor_log_scale(positions: Tensor, floor_scale: int = 8192, beta: float = 0.1, *, offset: int = 1) -> Tensor:
    """``1 + beta ln(1 + floor((p + offset) / floor_scale))``: the query scale of Llama 4 (offset 1) and Ministral 3 (offset 0).

    Args:
        positions: of the queries, from 0, any shape.

    Returns:
        float32, the shape of ``positions``, for `fastpe.attention`'s ``row_scale``.

    >>> import torch, fastpe
    >>> fastpe.rope.floor_log_scale(torch.tensor([0, 8190])).tolist()
    [1.0, 1.0]
    """
    where = "fastpe.rope.floor_log_scale"
    _check.count(where, "floor_scale", floor_scale, 1)
    steps = ((_position_scale(where, positions) + offset) / floor_scale).floor()
    return (1 + beta * (1 + steps).log()).float()
