"""Position regions of long-context methods against one region with the same rotation.

self_extend: window 1024, groups of 8. dual_chunk: chunks of 1024, which tiles divide, so that no tile holds two regions.
"""

from __future__ import annotations

from attend import Attention
from registry import Case, Work, family

import fastpe


def _region(region: fastpe.region.Region):
    def build(case: Case, wanted: frozenset[str]) -> Work:
        rope = fastpe.rope.default(case.shape.D)
        a = Attention(case, wanted, kwargs=lambda p, rows: {"rope": rope, "region": region})
        a.add("fastpe one region", lambda: a.fused(rope=rope), kwargs=lambda p, rows: {"rope": rope})
        return a.work()

    return build


for _name, _object in (("self_extend", fastpe.region.self_extend(1024, 8)), ("dual_chunk", fastpe.region.dual_chunk(1280, 256))):
    family(_name, peers=("fastpe one region",), shapes=("S2",))(_region(_object))
