"""Finds and reads the golden files: the repository's small set and, where it exists, the full set.

FASTPE_GOLDEN names the folder of the full set; without it ../shared/golden beside the repository is used if present. A case
in both is run from the full set, which holds the same numbers.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import pathlib

import numpy as np
import pytest
import torch

_HERE = pathlib.Path(__file__).parent
_SMALL = _HERE / "data"


def folders() -> list[pathlib.Path]:
    named = os.environ.get("FASTPE_GOLDEN")
    full = pathlib.Path(named) if named else _HERE.parents[2] / "shared" / "golden"
    if named and not full.is_dir():
        raise pytest.UsageError(f"FASTPE_GOLDEN={named} is not a folder")
    return [_SMALL] + ([full] if full.is_dir() and full.resolve() != _SMALL.resolve() else [])


@functools.cache
def _files() -> dict[str, pathlib.Path]:
    """stem -> file, the last folder winning."""
    return {path.stem: path for folder in folders() for path in sorted(folder.glob("*.npz"))}


def stems() -> list[str]:
    return sorted(_files())


@functools.cache
def _open(stem: str) -> tuple[dict, dict]:
    with np.load(_files()[stem], allow_pickle=False) as z:
        arrays = {key: z[key] for key in z.files}
    meta = json.loads(str(arrays.pop("meta")))
    cases: dict[str, dict] = collections.defaultdict(dict)
    for key, x in arrays.items():
        case, _, name = key.partition("__" if "__" in key else "/")
        cases[case][name] = x
    return meta, dict(cases)


def case_names(stem: str) -> list[str]:
    return list(_open(stem)[1])


def load(stem: str, case: str, base: str | None = None) -> dict:
    """The arrays of a case as tensors, with the plain values of its description; where `base` names another case, with the
    inputs of that one."""
    meta, cases = _open(stem)
    facts = {k: v for k, v in meta.get("cases", {}).get(case, {}).items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    own = facts | {name: torch.from_numpy(np.array(x)) for name, x in cases[case].items()}
    if base is None:
        return own
    return {name: x for name, x in load(stem, base).items() if not is_result(name)} | own


def is_result(name: str) -> bool:
    """Whether an array is an output or a gradient."""
    return name.startswith(("out", "lse", "d_", "dmem_", "exact_", "single_")) or name.endswith("_detached") or name in _RESULTS


_RESULTS = (
    "do", "dq", "dk", "dv", "dbias", "dgate", "dq_int", "dk_int", "dbeta",
    "selected", "chunk_keys", "centroids", "score", "keep",
)  # fmt: skip


_ran: collections.Counter = collections.Counter()


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        for key, value in report.user_properties:
            if key == "golden":
                _ran[tuple(value)] += 1


def pytest_terminal_summary(terminalreporter):
    if not _ran:
        return
    terminalreporter.section("golden cases run")
    by_file: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for (stem, case, how), n in _ran.items():
        by_file[stem][how] += 1
    for stem in sorted(by_file):
        counts = ", ".join(f"{how} {n}" for how, n in sorted(by_file[stem].items()))
        terminalreporter.line(f"{stem}: {counts} cases")
