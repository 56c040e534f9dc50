"""Rotation inside attention: its cost on top of attention, and phases formed in the call against ready-made tables.

    python benchmarks/rope_in_attention.py [--json FILE]

Targets: at most 3 % of attention from 1024 tokens on; forming the angles in the call no slower than reading cos and sin that
a model prepared as float32 tables.
"""

from __future__ import annotations

import argparse
from unittest.mock import patch

from timing import interleave, keep_freed_memory, machine, write_json

keep_freed_memory()

import torch  # noqa: E402

import fastpe  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for shape in ((1, 8, 8, 1024, 64), (1, 8, 8, 4096, 64), (1, 32, 8, 2048, 128)):
        for dtype in (torch.float32, torch.bfloat16):
            b, h, hk, n, d = shape
            q, k, v = (torch.randn(b, x, n, d).to(dtype) for x in (h, hk, hk))
            rope = fastpe.rope.default(d)
            table = torch.ops.fastpe.rope_table(p.double().view(1, 1, n), rope.inv_freq.view(1, 1, -1), 1.0, False, False)

            with torch.no_grad():
                turned = fastpe.apply_rotary_pair(q, k, rope)
                want = fastpe.attention(*turned, v, is_causal=True)
                error = (fastpe.attention(q, k, v, rope=rope, is_causal=True) - want).abs().max().item()
                assert error <= (1e-4 if dtype == torch.float32 else 3e-2), error
                t = interleave(
                    {
                        "none": lambda: fastpe.attention(q, k, v, is_causal=True),
                        "rope": lambda: fastpe.attention(q, k, v, rope=rope, is_causal=True),
                        "tables": with_tables,
                    },
                    rounds=args.rounds,
                )
            cost = 100 * (t["rope"]["median_s"] / t["none"]["median_s"] - 1)
            ratio = t["rope"]["median_s"] / t["tables"]["median_s"]
            rows.append({"shape": shape, "dtype": str(dtype), "rope_cost_percent": cost, "phases_over_tables": ratio})
            print(f"{str(shape):24s} {str(dtype):16s} rotation costs {cost:5.2f} % (target <= 3), phases / tables {ratio:.3f}", flush=True)
    if args.json:
        write_json(args.json, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
