"""Two threads against one, wall time: also where there is a single head, so that work must split along the sequence."""

from __future__ import annotations

import torch
from attend import Attention
from registry import Case, Work, family


@family("threads", peers=("one thread",), shapes=("S2", "S2H1"), passes=("fwd+bwd",))
def threads(case: Case, wanted: frozenset[str]) -> Work:
    a = Attention(case, wanted)

    def on(count: int):
        def call():
            torch.set_num_threads(count)
            return a.fused()

        return call

    a.add("fastpe", on(2))
    a.add("one thread", on(1))
    return a.work(clock="wall time")
