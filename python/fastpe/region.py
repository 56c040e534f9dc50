"""Near and far keys at different positions under one softmax.

A region object splits the pairs of a call, row I = i + Nk - Nq and key j, into two or three regions by a closed rule, and gives
each region its own positions of queries and keys:

    score(i, j) = scale * factor(i) * <R(pq_r(i)) q_i, R(pk_r(j)) k_j>        r = region(I, j)

All regions of a row share one softmax, so nothing is merged and nothing is rounded in between.

| rule | region 1 | region 2 | region 3 |
|---|---|---|---|
| distance w | I - j < w | the others | |
| chunk c | j >= c (I // c) | the chunk before | older |
| key_set M | j >= M | j < M | |
| band w | abs(I - j) < w | I - j >= w | j - I >= w |

Both edges of every rule move monotonically with I, which is what lets the kernels visit each region as one range of keys.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from . import _check
from ._call import Call, RegionPlan, TurnedCall
from ._rope import Rope, XposRope
from .positions import hirope_regions, self_extend_shift

Tensor = torch.Tensor

# Name -> number and regions, as in csrc/pos/region.h.
KINDS = {"distance": (1, 2), "chunk": (2, 3), "key_set": (3, 2), "band": (4, 3)}

# What a rule says of one call: positions of the queries, a region each; of the keys, one for all or a region each; factor of the
# rows, (Nq,) or (1,), or None.
Positions = tuple[Sequence[Tensor], Sequence[Tensor], "Tensor | None"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Region:
    """Which positions near and far keys are met at; made by the functions of this module.

    `fastpe.attention(..., rope=rope, region=region)` needs a rope, whose angles it takes at the region's positions. Keys are given
    un-rotated.

    Args:
        kind: "distance", "chunk", "key_set" or "band", see the table of this module.
        size: w, c, M or w of that rule.
        rule: Call -> positions of the queries, of the keys, and a factor of the rows.
        name, facts: what `repr` shows.
        amplitude: factor of all logits that depends on nothing.
        axes: numbers that say where a token is; the rope must have as many.
        keys: indices of keys -> their positions, one tensor for all regions or one a region; None: they depend on more than the
            index, and a cache cannot keep keys turned.

    >>> import torch, fastpe
    >>> q = torch.randn(1, 2, 40, 16)
    >>> region = fastpe.region.self_extend(window=8, group=4)
    >>> fastpe.reference.attention(q, q, q, rope=fastpe.rope.default(16), region=region, is_causal=True).shape
    torch.Size([1, 2, 40, 16])
    """

    kind: str
    size: int
    rule: Callable[[Call], Positions]
    name: str = "region"
    facts: str = ""
    amplitude: float = 1.0
    axes: int = 1
    keys: Callable[[Tensor], tuple[Tensor, ...]] | None = None

    def __post_init__(self):
        where = f"fastpe.region.{self.name}"
        if self.kind not in KINDS:
            raise ValueError(f"{where}: kind must be one of {', '.join(map(repr, KINDS))}, got {self.kind!r}")
        _check.count(where, "size", self.size, 0 if self.kind == "key_set" else 1)

    def __repr__(self) -> str:
        return f"{self.name}({self.facts})"

    @property
    def regions(self) -> int:
        """How many regions the rule has."""
        return KINDS[self.kind][1]

    def kept_keys(self, where: str, index: Tensor) -> tuple[Tensor, ...]:
        """Positions of the keys of these indices, one tensor for each copy that a cache of turned keys holds.

        Raises:
            NotImplementedError: they depend on more than the index.

        >>> import torch, fastpe
        >>> fastpe.region.self_extend(window=4, group=2).kept_keys("here", torch.arange(4))[1].tolist()
        [0.0, 0.0, 1.0, 1.0]
        """
        if self.keys is None:
            raise NotImplementedError(f"{where}: region {self.name} places a key by more than its index; keep raw keys")
        positions = self.keys(index)
        if len(positions) == 1 or self.kind != "key_set":
            return positions
        near, behind = positions  # the key alone decides which of them it takes
        return (torch.where(index >= self.size, near, behind),)

    def plan(self, call: Call) -> RegionPlan:
        """The kernel's view of one call.

        Raises:
            ValueError: positions of a wrong number, shape or value.
        """
        where = f"fastpe.region.{self.name}"
        query, key, factor = self.rule(call)
        if len(query) != self.regions or len(key) not in (1, self.regions):
            raise ValueError(
                f"{where}: a {self.kind} rule has {self.regions} regions, got {len(query)} query and {len(key)} key positions"
            )
        made: dict[int, Tensor] = {}

        def checked(what: str, x: Tensor, n: int) -> Tensor:
            """One tensor for one, so that it is seen which angles are shared."""
            if id(x) not in made or made[id(x)].shape[-1] != n:
                made[id(x)] = self._positions(where, what, x, n, call)
            return made[id(x)]

        query = tuple(checked("query positions", x, call.Nq) for x in query)
        key = () if isinstance(call, TurnedCall) else tuple(checked("key positions", x, call.Nk) for x in key)
        if factor is not None:
            factor = factor.to(call.dtype).expand(call.Nq)
        return RegionPlan(KINDS[self.kind][0], self.size, query, key, self.amplitude, factor)

    def fit(self, rope: Rope, call: Call) -> Rope:
        """The rope all regions of a call share: frequencies that depend on the length of the text take Nk, whatever positions
        the regions use.

        Raises:
            ValueError: another number of axes than the positions have.
            NotImplementedError: xPos centred on the text, whose amplitude differs from region to region.
        """
        if rope.axes != self.axes:
            raise ValueError(f"fastpe.region.{self.name}: rope {rope.name} has {rope.axes} axes, the positions have {self.axes}")
        if isinstance(rope, XposRope) and isinstance(rope.center, str):
            raise NotImplementedError(
                f"fastpe.region.{self.name}: does not go with xPos centred on the text, whose middle the regions do not share; give it a number as center"
            )
        # A tensor keeps torch.compile from specialising on the length.
        return rope.at_length(_length(call).clamp(min=1))

    def _positions(self, where: str, what: str, x: Tensor, n: int, call: Call) -> Tensor:
        _check.is_tensor(where, what, x)
        shapes = "(N,) or (B, N)" if self.axes == 1 else f"({self.axes}, N) or ({self.axes}, B, N)"
        rest = x.shape if self.axes == 1 else x.shape[1:]
        if len(rest) not in (1, 2) or (self.axes > 1 and x.shape[0] != self.axes):
            raise ValueError(f"{where}: {what} must be {shapes}, got {_check.shape(x)}")
        if rest[-1] != n:
            raise ValueError(f"{where}: {what} are for {rest[-1]} tokens, the call has {n}")
        if len(rest) == 2:
            call.fits(where, what, rest[:1], ("batch entries", call.B))
        _check.on_device(where, what, x, call.device)
        if x.device.type == "cpu":
            _check.positions_in_range(where, what, x)
        return x.to(torch.float64)

    def region_of(self, call: Call) -> Tensor:
        """The definition: int64 (Nq, Nk), 1 up to the number of regions.

        >>> import torch, fastpe
        >>> call = fastpe.bias.Call(1, 1, 2, 5, True, torch.float64, torch.device("cpu"))
        >>> fastpe.region.dual_chunk(3, 1).region_of(call).tolist()
        [[2, 2, 1, 1, 1], [3, 3, 2, 2, 1]]
        """
        distance, w = call.distance(), self.size
        one = torch.ones_like(distance)
        if self.kind == "distance":
            return torch.where(distance < w, one, 2)
        if self.kind == "band":
            return torch.where(distance >= w, 2 * one, torch.where(-distance >= w, 3, one))
        j = call.key_index()[None, :]
        if self.kind == "key_set":
            return torch.where(j >= w, one, 2)
        own = w * _floor(call.query_index(), w)[:, None]
        return torch.where(j >= own, one, torch.where(j >= own - w, 2, 3))


def _places(call: Call) -> tuple[Tensor, Tensor]:
    """I and j, one tensor where they are the same numbers, so that their angles are formed once."""
    i = call.query_index()
    return i, (i if call.Nq == call.Nk else call.key_index())


def _at_index(j: Tensor) -> tuple[Tensor]:
    """Keys at their own indices in every region, as in plain rotation."""
    return (j,)


def _floor(x: Tensor, by: int) -> Tensor:
    return torch.div(x, by, rounding_mode="floor")


def _grouped(x: Tensor, group: int) -> Tensor:
    """x // group as float64: an integer tensor plus a fraction would be float32."""
    return _floor(x, group).double()


def _count(where: str, **least: tuple[int, int]) -> None:
    for what, (x, low) in least.items():
        _check.count(where, what, x, low)


def _log_n(call: Call, length: float | None) -> Tensor | None:
    """max(1, ln(I + 1) / ln(length)) by row: entropy-preserving scaling of ReRoPE and Self-Extend."""
    if length is None:
        return None
    rows = call.query_index().clamp(min=0).double() + 1
    return (rows.log() / math.log(length)).clamp(min=1)


def _check_log_base(where: str, what: str, x: float | None) -> None:
    if x is not None and _check.number(where, what, x) <= 1:
        raise ValueError(f"{where}: {what} must be above 1, got {x:g}")


def _length(call: Call) -> Tensor:
    """Nk as a float64 tensor: a plain number would make torch.compile specialise on it."""
    return torch.scalar_tensor(call.Nk, dtype=torch.float64, device=call.device)


def self_extend(window: int = 1024, group: int = 8, *, shift: str = "floor", scale_base: float | None = None) -> Region:
    """Self-Extend: keys `window` or more tokens back share positions in groups (arXiv 2401.01325).

    Near (I - j < window): positions I and j. Far: I // group + shift and j // group. No training; a model trained on L tokens
    reaches N while window + (N - window) / group stays below one half to two thirds of L.

    Args:
        window: neighbours at exact positions, at least 1.
        group: tokens that share a far position, at least 1.
        shift: "floor", `window - window // group` (the paper and the released decoding), or "true", `window - window / group` (the
            released prefill). They differ where group does not divide window.
        scale_base: rows are multiplied by max(1, ln(I + 1) / ln(scale_base)); None: not. The release writes -1 for None.

    Raises:
        TypeError, ValueError: window or group below 1, an unknown shift, scale_base not above 1.

    >>> import fastpe
    >>> fastpe.region.self_extend(window=512, group=16)
    self_extend(window=512, group=16, shift='floor')
    """
    where = "fastpe.region.self_extend"
    _count(where, window=(window, 1), group=(group, 1))
    _check_log_base(where, "scale_base", scale_base)
    move = self_extend_shift(where, window, group, shift)

    def keys(j: Tensor) -> tuple[Tensor, Tensor]:
        return j, _grouped(j, group)

    def rule(call: Call) -> Positions:
        i, j = _places(call)
        # Where every pair is near the release leaves the shift out; no far position is read then.
        return (i, _grouped(i, group) + move), keys(j), _log_n(call, scale_base)

    facts = f"window={window}, group={group}, shift={shift!r}" + ("" if scale_base is None else f", scale_base={scale_base:g}")
    return Region("distance", window, rule, "self_extend", facts, keys=keys)


def self_extend_bidirectional(
    window: int = 128, group: int = 8, *, original_length: int = 512, plain_below: int | None = None
) -> Region:
    """Self-Extend for encoders, the same on both sides of the diagonal (LongEmbed, arXiv 2404.12096).

    abs(I - j) < window: positions I and j. Keys far behind: I // group + shift and j // group. Keys far ahead: I // group and
    j // group + shift. All logits are multiplied by max(1, ln(Nk) / ln(original_length)).

    Args:
        window: neighbours to each side, counting the own token, at least 1.
        group: tokens that share a far position, at least 1. The release runs E5-RoPE with window 64 and group 9.
        original_length: trained length, above 1.
        plain_below: shorter texts are met at plain positions; original_length if not given, as released.

    Raises:
        TypeError, ValueError: window or group below 1, original_length below 2, plain_below negative.

    >>> import fastpe
    >>> fastpe.region.self_extend_bidirectional(64, 9)
    self_extend_bidirectional(window=64, group=9, original_length=512)
    """
    where = "fastpe.region.self_extend_bidirectional"
    _count(where, window=(window, 1), group=(group, 1), original_length=(original_length, 2))
    plain_below = original_length if plain_below is None else _check.count(where, "plain_below", plain_below, 0)
    move = self_extend_shift(where, window, group, "floor")

    def rule(call: Call) -> Positions:
        i, j = _places(call)
        length = _length(call)

        def far(x: Tensor, move: float) -> Tensor:
            return torch.where(length < plain_below, x.double(), _grouped(x, group) + move)

        factor = (length.log() / math.log(original_length)).clamp(min=1)
        return (i, far(i, move), far(i, 0.0)), (j, far(j, 0.0), far(j, move)), factor.reshape(1)

    facts = f"window={window}, group={group}, original_length={original_length}"
    return Region("band", window, rule, "self_extend_bidirectional", facts)


def rerope(window: int = 512, train_length: float | None = 4096) -> Region:
    """ReRoPE: every key `window` or more tokens back stands at distance `window` (github.com/bojone/rerope).

    Near: positions I and j. Far: the query at `window`, the key un-rotated. Rows are multiplied by
    max(1, ln(I + 1) / ln(train_length)).

    Args:
        window: the largest relative position, at least 1.
        train_length: trained length of the model, above 1; None: no factor.

    Raises:
        TypeError, ValueError: window below 1, train_length not above 1.

    >>> import fastpe
    >>> fastpe.region.rerope(512, train_length=2048)
    rerope(window=512, train_length=2048)
    """
    where = "fastpe.region.rerope"
    _count(where, window=(window, 1))
    _check_log_base(where, "train_length", train_length)
    facts = f"window={window}, train_length={train_length}"
    return Region("distance", window, _constant_far(window, window, train_length), "rerope", facts, keys=_unturned_far)


def _unturned_far(j: Tensor) -> tuple[Tensor, Tensor]:
    return j, torch.zeros_like(j)


def _constant_far(window: int, far: float, train_length: float | None) -> Callable[[Call], Positions]:
    def rule(call: Call) -> Positions:
        i, j = _places(call)
        return (i, torch.full_like(i, far, dtype=torch.float64)), _unturned_far(j), _log_n(call, train_length)

    return rule


def leaky_rerope(window: int = 512, factor: float = 16.0, train_length: float | None = 4096) -> Region:
    """Leaky ReRoPE: beyond `window` the relative position grows by 1 / factor a token (github.com/bojone/rerope).

    Far: query position (I + window (factor - 1)) / factor and key position j / factor, so that the distance is
    window + (I - j - window) / factor.

    Args:
        window: tokens at exact positions, at least 1.
        factor: positive; 1 is plain RoPE.
        train_length: as in `rerope`.

    Raises:
        TypeError, ValueError: window below 1, factor not positive, train_length not above 1.

    >>> import fastpe
    >>> fastpe.region.leaky_rerope(512, 8.0)
    leaky_rerope(window=512, factor=8, train_length=4096)
    """
    where = "fastpe.region.leaky_rerope"
    _count(where, window=(window, 1))
    factor = _check.number(where, "factor", factor, positive=True)
    _check_log_base(where, "train_length", train_length)

    def keys(j: Tensor) -> tuple[Tensor, Tensor]:
        return j, j.double() / factor

    def rule(call: Call) -> Positions:
        i, j = _places(call)
        return (i, (i.double() + window * (factor - 1)) / factor), keys(j), _log_n(call, train_length)

    facts = f"window={window}, factor={factor:g}, train_length={train_length}"
    return Region("distance", window, rule, "leaky_rerope", facts, keys=keys)


def dual_chunk(
    chunk_size: int, local_window: int | None = None, *, original_length: int | None = None, mscale: str = "hf"
) -> Region:
    """Dual chunk attention: own chunk, the chunk before, older chunks (ChunkLlama, arXiv 2402.17463).

    With c = chunk_size - local_window a key stands at j mod c. In its own chunk the query stands at I mod c, for the chunk
    before at min(I mod c + c, chunk_size), for older chunks at min(2 c - 1, chunk_size). No relative position exceeds
    chunk_size.

    The factor m^2 multiplies all logits, with m from the length of this call. The release keeps cached keys with the m of the
    step that wrote them, so where m > 1 its decoding differs from its own prefill; a call here equals prefill. The release
    also detaches the weights of the chunks in backward; the gradients here are those of the formula.

    Args:
        chunk_size: the release takes 3/4 of the trained length.
        local_window: below chunk_size; the release takes 1/8 of the trained length, hence chunk_size // 6 if not given.
        original_length: L0, trained length; None: m = 1 (as in Qwen).
        mscale: "hf", m = 1 + 0.05 ln(Nk / L0) above L0, or "serving" (the vLLM fork), m = 1 + 0.1 ln(Nk / L0), at least 1.

    Raises:
        TypeError, ValueError: local_window not below chunk_size, an unknown mscale.

    >>> import fastpe
    >>> fastpe.region.dual_chunk(3072, 512, original_length=4096)
    dual_chunk(chunk_size=3072, local_window=512, original_length=4096, mscale='hf')
    """
    where = "fastpe.region.dual_chunk"
    _count(where, chunk_size=(chunk_size, 1))
    local_window = chunk_size // 6 if local_window is None else _check.count(where, "local_window", local_window, 0)
    if local_window >= chunk_size:
        raise ValueError(f"{where}: local_window must be below chunk_size {chunk_size}, got {local_window}")
    slopes = {"hf": 0.05, "serving": 0.1}
    if mscale not in slopes:
        raise ValueError(f"{where}: mscale must be 'hf' or 'serving', got {mscale!r}")
    if original_length is not None:
        _count(where, original_length=(original_length, 1))
    c = chunk_size - local_window

    def keys(j: Tensor) -> tuple[Tensor]:
        return (torch.remainder(j, c),)

    def rule(call: Call) -> Positions:
        i, j = _places(call)
        key = keys(j)
        i = key[0] if j is i else torch.remainder(i, c)
        factor = None
        if original_length is not None:
            over = (_length(call) / original_length).log().clamp(min=0)
            factor = (1 + slopes[mscale] * over).square().reshape(1)
        return (i, (i + c).clamp(max=chunk_size), torch.full_like(i, min(2 * c - 1, chunk_size))), key, factor

    facts = f"chunk_size={chunk_size}, local_window={local_window}"
    if original_length is not None:
        facts += f", original_length={original_length}, mscale={mscale!r}"
    return Region("chunk", c, rule, "dual_chunk", facts, keys=keys)


def string(shift: int, window: int = 128, attention_factor: float = 0.1 * math.log(2) + 1) -> Region:
    """STRING: the rarely trained large distances are replaced by well trained ones (arXiv 2410.18745).

    Near (I - j < shift): positions I and j. Far: the query at I - shift + window, so that distances shift, shift + 1, ... become
    window, window + 1, ... The released prefill counts the key at distance `shift` twice, which is not done here; its decoding
    does not.

    Args:
        shift: S, the release takes a third of the trained length.
        window: W, the smallest far distance, at most shift.
        attention_factor: on cos and sin of query and key in the release, so logits get its square.

    Raises:
        TypeError, ValueError: shift below 1, window negative or above shift.

    >>> import fastpe
    >>> fastpe.region.string(1365)
    string(shift=1365, window=128, attention_factor=1.06931)
    """
    where = "fastpe.region.string"
    _count(where, shift=(shift, 1), window=(window, 0))
    if window > shift:
        raise ValueError(f"{where}: window must be at most shift {shift}, got {window}")
    attention_factor = _check.number(where, "attention_factor", attention_factor, positive=True)

    def rule(call: Call) -> Positions:
        i, j = _places(call)
        return (i, i - shift + window), _at_index(j), None

    facts = f"shift={shift}, window={window}, attention_factor={attention_factor:g}"
    return Region("distance", shift, rule, "string", facts, attention_factor**2, keys=_at_index)


def wrope(window: int = 64, far: float = 2048.0) -> Region:
    """WRoPE: far keys un-rotated, met by the query at one position (A2ATS, arXiv 2502.12665).

    Args:
        window: tokens at exact positions, at least 1.
        far: b, the query's position for all other keys.

    Raises:
        TypeError, ValueError: window below 1, far not finite.

    >>> import fastpe
    >>> fastpe.region.wrope()
    wrope(window=64, far=2048)
    """
    where = "fastpe.region.wrope"
    _count(where, window=(window, 1))
    far = _check.number(where, "far", far)
    return Region("distance", window, _constant_far(window, far, None), "wrope", f"window={window}, far={far:g}", keys=_unturned_far)


def streaming(start: int = 4, recent: int = 2000) -> Region:
    """StreamingLLM: positions inside a cache of the first `start` and the last `recent` tokens (arXiv 2309.17453).

    Goes with `fastpe.mask.streaming(start, recent)`, which hides what the cache has dropped. Recent keys: positions I and j. The
    first `start` keys: the query at min(I, start + recent), the key at j.

    Args:
        start: sinks, at least 0.
        recent: tokens kept beside them, at least 1; a step sees start + recent + 1 keys.

    Raises:
        TypeError, ValueError: start negative, recent below 1.

    >>> import torch, fastpe
    >>> q, rope = torch.randn(1, 2, 30, 8), fastpe.rope.default(8)
    >>> out = fastpe.reference.attention(q, q, q, rope=rope, region=fastpe.region.streaming(2, 9), mask=fastpe.mask.streaming(2, 9))
    >>> cache = q[:, :, [0, 1, *range(20, 30)]]                    # what the last step would find
    >>> step = fastpe.reference.attention(q[:, :, -1:], cache, cache, rope=rope)
    >>> torch.allclose(out[:, :, -1:], step)
    True
    """
    where = "fastpe.region.streaming"
    _count(where, start=(start, 0), recent=(recent, 1))

    def rule(call: Call) -> Positions:
        i = call.query_index()
        return (i, i.clamp(max=start + recent)), _at_index(call.key_index()), None

    return Region("key_set", start, rule, "streaming", f"start={start}, recent={recent}", keys=_at_index)


def key_set(keys: int, memory: str | Tensor = "zero", *, first: float = 0.0) -> Region:
    """Memory keys laid before the local ones (LongLLaMA, arXiv 2307.03170; MemLong, 2408.16967; Extended Mind, 2406.02332).

    Local token number n, which is key M + n, stands at first + n; queries are the last local tokens. Memory keys stand where
    `memory` says and are met by the query at its own position.

    | method | call |
    |---|---|
    | LongLLaMA, Extended Mind (memories stored un-rotated) | `key_set(M)` |
    | MemLong "Zero" | `key_set(M, first=1)` |
    | MemLong "Continual" | `key_set(M, "continual")` |

    Args:
        keys: M, the number of memory keys, at least 0; they are the first keys of the call.
        memory: "zero": all at position 0; "continual": 0 .. M - 1, local tokens continue from M; or positions (M,) or (B, M).
        first: position of the first local token; "continual" takes none.

    Raises:
        TypeError, ValueError: keys negative or more than the call has, memory of a wrong length.

    >>> import torch, fastpe
    >>> memory, q = torch.randn(1, 2, 7, 8), torch.randn(1, 2, 5, 8)
    >>> k = torch.cat((memory, q), 2)
    >>> region = fastpe.region.key_set(7)
    >>> fastpe.reference.attention(q, k, k, rope=fastpe.rope.default(8), region=region, is_causal=True).shape
    torch.Size([1, 2, 5, 8])
    """
    where = "fastpe.region.key_set"
    _count(where, keys=(keys, 0))
    first = _check.number(where, "first", first)
    if isinstance(memory, str):
        if memory not in ("zero", "continual"):
            raise ValueError(f"{where}: memory must be 'zero', 'continual' or positions, got {memory!r}")
        if memory == "continual":
            if first:
                raise ValueError(f"{where}: first must be 0 for memory 'continual', got {first:g}")
            first = keys
    else:
        _check.is_tensor(where, "memory", memory)
        if memory.dim() not in (1, 2) or memory.shape[-1] != keys:
            raise ValueError(f"{where}: memory must be (M,) or (B, M) with M = {keys}, got {_check.shape(memory)}")

    def near(j: Tensor) -> Tensor:
        return j.double() - keys + first

    def by_index(j: Tensor) -> tuple[Tensor, Tensor]:
        return near(j), torch.zeros_like(j) if memory == "zero" else j

    def rule(call: Call) -> Positions:
        if call.Nk < keys:
            raise ValueError(f"{where}: {keys} memory keys, the call has {call.Nk} keys")
        local = call.query_index().double() - keys + first
        j = call.key_index()
        if isinstance(memory, Tensor):
            _check.on_device(where, "memory", memory, call.device)
            return (local, local), (near(j), torch.nn.functional.pad(memory.double(), (0, call.Nk - keys))), None
        return (local, local), by_index(j), None

    how = repr(memory) if isinstance(memory, str) else f"tensor{tuple(memory.shape)}"
    facts = f"keys={keys}, memory={how}" + (f", first={first:g}" if first and memory != "continual" else "")
    return Region("key_set", keys, rule, "key_set", facts, keys=None if isinstance(memory, Tensor) else by_index)


def hirope(segments: Tensor, window: int = 512) -> Region:
    """HiRoPE: far keys at two-level positions, token in the segment and number of the segment (arXiv 2403.19115).

    Goes with `fastpe.rope.hirope`, which turns some pairs of channels by each. Near (I - j < window): both levels at plain
    positions. Far: the segment distance starts from window - 1.

    Args:
        segments: int (N,) or (B, N) with one entry a key: the number of its segment (function, class, ...), in rising order.
        window: at least 1.

    Raises:
        TypeError, ValueError: segments that fall, or of another length than the call has keys; window below 1.

    >>> import torch, fastpe
    >>> segments = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    >>> q = torch.randn(1, 2, 8, 16)
    >>> region = fastpe.region.hirope(segments, window=3)
    >>> fastpe.reference.attention(q, q, q, rope=fastpe.rope.hirope(16), region=region, is_causal=True).shape
    torch.Size([1, 2, 8, 16])
    """
    where = "fastpe.region.hirope"
    _check.is_integer(where, "segments", segments)
    _count(where, window=(window, 1))
    if segments.dim() not in (1, 2):
        raise ValueError(f"{where}: segments must be (N,) or (B, N), got {_check.shape(segments)}")
    if _check.can_read(segments):
        fall = (segments[..., 1:] < segments[..., :-1]).nonzero()
        if fall.numel():
            n = int(fall[0, -1])
            at = (*fall[0, :-1].tolist(), n)
            next_to = (*at[:-1], n + 1)
            raise ValueError(
                f"{where}: segments must not fall, got {int(segments[at])} then {int(segments[next_to])} at token {n + 1}"
            )

    def rule(call: Call) -> Positions:
        if segments.shape[-1] != call.Nk:
            raise ValueError(f"{where}: segments has {segments.shape[-1]} tokens, the call has {call.Nk} keys")
        if call.Nq > call.Nk:
            raise ValueError(f"{where}: {call.Nq} queries and {call.Nk} keys: queries are the last keys")
        _check.on_device(where, "segments", segments, call.device)
        near, far_q, far_k = hirope_regions(segments, window)
        last = call.Nk - call.Nq
        return (near[..., last:], far_q[..., last:]), (near, far_k), None

    return Region("distance", window, rule, "hirope", f"segments={tuple(segments.shape)}, window={window}", axes=2)


def custom(kind: str, size: int, query: Sequence[Tensor], key: Sequence[Tensor], *, amplitude: float = 1.0, axes: int = 1) -> Region:
    """A region with positions of your own.

    Args:
        kind, size: the rule that splits the pairs, see the table of this module.
        query: positions of the queries, one (Nq,) or (B, Nq) a region, near to far; with A axes (A, Nq) or (A, B, Nq). Whole or
            real numbers.
        key: positions of the keys, one a region, or one for all.
        amplitude: factor of all logits.
        axes: numbers that say where a token is.

    Raises:
        TypeError, ValueError: an unknown kind, a size below 1 (key_set: below 0), positions that are not finite or whose number
            does not fit the rule.

    >>> import torch, fastpe
    >>> p = torch.arange(6)
    >>> fastpe.region.custom("distance", 3, [p, p // 2 + 2], [p, p // 2])
    custom(distance 3)
    """
    where = "fastpe.region.custom"
    if kind not in KINDS:
        raise ValueError(f"{where}: kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    amplitude = _check.number(where, "amplitude", amplitude)
    for what, given, allowed in (("query", query, (KINDS[kind][1],)), ("key", key, (1, KINDS[kind][1]))):
        if len(given) not in allowed:
            raise ValueError(f"{where}: {what} must hold {' or '.join(map(str, allowed))} position arrays for {kind!r}, got {len(given)}")
        for x in given:
            _check.is_tensor(where, what, x)
            if x.dtype not in (*_check.INTEGERS, torch.float32, torch.float64):
                raise TypeError(f"{where}: {what} must hold integers, float32 or float64, got {_check.name(x.dtype)}")
            _check.positions_in_range(where, what, x)
    query, key = tuple(query), tuple(key)
    return Region(kind, size, lambda call: (query, key, None), "custom", f"{kind} {size}", amplitude, axes)
