"""The long-context example, shortened: what its curves must look like, and its files."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys

import pytest
import torch

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "long_context.py"


def _load():
    spec = importlib.util.spec_from_file_location("long_context", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ex = _load()


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads that wait for each other on a busy machine are many times slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_far_keys_are_found_again(tmp_path, capsys):
    s = ex.Settings(models=1, steps=450, multiples=(1, 1.25, 4, 16), tests=24)
    results = ex.run(s, tmp_path, log=None)
    found = ex.mean(results)
    assert min(y[0] for y in found.values()) > 0.8, "the trained length itself"
    assert found["RoPE"][2] < 0.5 and found["RoPE"][3] < 0.3, "plain RoPE is lost beyond it"
    for name in ("Self-Extend", "DCA", "ReRoPE"):
        assert found[name][2] > 0.7, f"{name} at 4 times the trained length"
        assert found[name][3] > found["RoPE"][3] + 0.3, f"{name} at 16 times the trained length"
    assert found["STRING"][1] > found["RoPE"][1], "STRING reaches a third beyond"
    assert found["STRING"][3] < 0.5, "and no further"
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["lengths"] == [64, 80, 256, 1024] and written["found"] == results["found"]
    assert (tmp_path / "long_context.png").stat().st_size > 5000
    rows = ex.table(results).splitlines()
    assert len(rows) == 2 + len(ex.regions(s)) and rows[2].startswith("| RoPE | ")


def test_the_task_is_what_it_says():
    """Every asked key was planted once, with the value that must follow it; practice asks only for keys that occurred."""
    s = ex.Settings()
    tokens = ex.haystack(s, 200, 30, torch.Generator().manual_seed(0))
    first, last = tokens[:, : -2 * s.pairs], tokens[:, -2 * s.pairs :]
    is_key = (first >= ex.FILLERS) & (first < ex.FILLERS + ex.KEYS)
    assert (is_key.sum(1) == s.pairs).all()
    for row, ask in zip(first, last):
        for k, v in ask.reshape(-1, 2).tolist():
            at = (row == k).nonzero()
            assert at.numel() == 1 and int(row[at + 1]) == v
    tokens, asked = ex.practice(s, torch.Generator().manual_seed(1))
    half = s.batch // 2
    assert torch.equal(asked[half:].nonzero()[:, 1].reshape(half, -1), torch.arange(s.length - 7, s.length, 2).expand(half, -1))
    for row, mark in zip(tokens[:half], asked[:half]):
        seen = {}
        for n in range(0, s.length, 2):
            k, v = row[n : n + 2].tolist()
            if k >= ex.FILLERS:
                assert bool(mark[n + 1]) == (k in seen) and seen.setdefault(k, v) == v
            else:
                assert not mark[n + 1]


def test_command_line(tmp_path, capsys):
    assert ex.main(["--quick", "--steps", "2", "--out", str(tmp_path / "made"), "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "Percent of planted keys found, trained at 64 tokens" in printed and "| ReRoPE | " in printed
    assert json.loads((tmp_path / "made" / "results.json").read_text())["settings"]["steps"] == 2
