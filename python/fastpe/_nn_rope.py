"""The module around `fastpe.rope`; `fastpe.nn` exports it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._rope import Rope
from .rotary import apply_rotary_pair

Tensor = torch.Tensor


class RotaryEmbedding(torch.nn.Module):
    """A rotary embedding as a module: fixed, or built anew from learned parameters at every use.

    ``RotaryEmbedding(rope)`` holds a `fastpe.Rope`. ``RotaryEmbedding(builder, name=tensor, ...)`` owns the floating-point
    tensors among the arguments as parameters, keeps them in their dtype when the model is cast down, and calls ``builder``
    with them: learned frequencies (``rope.learned``), rope-vit's mixed ones (``rope.mixed``), LRPE (``rope.lrpe``), CLEX
    (``rope.clex``). There is nothing else to save in a checkpoint.

    Caches. Rules that depend on the length (`rope.dynamic_ntk`, `rope.longrope`, `rope.clex`, `rope.yarn` with factor
    None) give every length its own frequencies, so keys rotated for one length are wrong at the next. Keep the keys as they
    are before rotation, and pass the module's `rope` to `fastpe.attention`, which rotates them on the way in::

        k_cache, v_cache = torch.cat((k_cache, k), 2), torch.cat((v_cache, v), 2)      # k un-rotated
        out = fastpe.attention(q, k_cache, v_cache, rope=embedding.rope, is_causal=True)

    Every step then equals the last rows of one pass over the whole text. Rules that do not depend on the length may cache
    rotated keys: call the module, cache what it returns and attend without ``rope``.

    Args:
        rope: a `fastpe.Rope`, or a function that returns one.
        parameters: arguments of the function; floating-point tensors become parameters.

    Raises:
        TypeError: neither a Rope nor a function, or arguments for a Rope.

    >>> import torch, fastpe
    >>> embedding = fastpe.nn.RotaryEmbedding(fastpe.rope.default(8))
    >>> q, k = embedding(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))
    >>> mixed = fastpe.nn.RotaryEmbedding(fastpe.rope.mixed, freqs=fastpe.rope.mixed_init(2, 8))
    >>> [(name, tuple(p.shape)) for name, p in mixed.named_parameters()]
    [('freqs', (2, 2, 4))]
    """

    def __init__(self, rope: Rope | Callable[..., Rope], **parameters: Any):
        super().__init__()
        where = "fastpe.nn.RotaryEmbedding"
        if isinstance(rope, Rope):
            if parameters:
                raise TypeError(
                    f"{where}: {', '.join(parameters)} given with a Rope; pass the builder to have it called"
                )
        elif not callable(rope):
            raise TypeError(
                f"{where}: rope must be a fastpe.Rope or a function that returns one, got {type(rope).__name__}"
            )
        self._source = rope
        self._moved: dict[torch.device, Rope] = {}
        self._constants: dict[str, Any] = {}
        self._names: list[str] = []
        for name, value in parameters.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                is_parameter = isinstance(value, torch.nn.Parameter)
                self.register_parameter(name, value if is_parameter else torch.nn.Parameter(value.detach().clone()))
                self._names.append(name)
            else:
                self._constants[name] = value
        self.rope  # refuses bad arguments now rather than at the first forward

    @property
    def rope(self) -> Rope:
        """The embedding as `fastpe.attention` and `fastpe.apply_rotary` take it."""
        if isinstance(self._source, Rope):
            return self._source
        learned = {name: getattr(self, name) for name in self._names}
        built = self._source(**learned, **self._constants)
        if not isinstance(built, Rope):
            raise TypeError(
                f"fastpe.nn.RotaryEmbedding: the function must return a fastpe.Rope, got {type(built).__name__}"
            )
        return built

    def forward(
        self, query: Tensor, key: Tensor, positions: Tensor | None = None, key_positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rotated query and key; arguments as in `fastpe.apply_rotary_pair`."""
        return apply_rotary_pair(query, key, self._on(query.device), positions, key_positions)

    def _on(self, device: torch.device) -> Rope:
        rope = self.rope
        if rope is not self._source or rope.inv_freq.device == device:
            return rope
        if device not in self._moved:
            self._moved[device] = rope.to(device)
        return self._moved[device]

    def _apply(self, fn, recurse=True):
        # angles in bfloat16 are useless from a few hundred tokens on, so model.bfloat16() leaves frequencies alone
        def keep(t: Tensor) -> Tensor:
            out = fn(t)
            return out.to(t.dtype) if out.is_floating_point() and out.dtype.itemsize < 4 else out

        return super()._apply(keep, recurse)

    def extra_repr(self) -> str:
        return repr(self.rope)
