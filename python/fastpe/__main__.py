"""Command line: `python -m fastpe info`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="fastpe", description="Attention kernels in which position is part of the tile.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    show = commands.add_parser("info", help="print versions, instruction set, CUDA architectures, threads")
    show.add_argument("--json", action="store_true", help="as JSON")
    args = parser.parse_args(argv)

    from ._info import info

    facts = info()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        width = max(map(len, facts))
        for key, value in facts.items():
            print(f"{key:<{width}}  {', '.join(value) or 'none' if isinstance(value, list) else value}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
