"""Tables, pictures and comparison, from small results files."""

from __future__ import annotations

import copy
import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import report  # noqa: E402

MACHINE = {
    "cpu": "X", "cores": 2, "threads": 1, "torch": "2", "commit": "abc", "date": "2026-01-01", "load": 0.5,
    "fastpe": {"fastpe": "0.1", "isa": "avx2"},
}  # fmt: skip


def row(candidate: str, ms: float, ours: float, **facts) -> dict:
    ratio = ms / ours
    return {
        "candidate": candidate, "status": "ok", "median_s": ms / 1e3, "spread": 0.01, "error": 1e-6, "peak_mib": ms,
        "ratio": ratio, "ratio_low": 0.98 * ratio, "ratio_high": 1.02 * ratio, **facts,
    }  # fmt: skip


def case(method: str, n: int, ours: float, dtype: str = "fp32", pass_: str = "fwd", **peers: float) -> dict:
    name = "S1" if n == 1024 else f"1x8x8x{n}x64"
    rows = [row("fastpe", ours, ours, gflops=100.0 / ours, share=0.6)] + [row(p.replace("_", " "), ms, ours) for p, ms in peers.items()]
    shape = {"name": name, "B": 1, "H": 8, "Hk": 8, "Nq": n, "Nk": n, "D": 64}
    return {"case": f"{method}/{name}/{dtype}/{pass_}/cpu", "method": method, "shape": shape, "dtype": dtype, "pass": pass_, "rows": rows}


def write(path: pathlib.Path, *cases: dict, targets: list | None = None) -> pathlib.Path:
    path.write_text(json.dumps({"machine": MACHINE, "cases": list(cases), "targets": targets or []}))
    return path


@pytest.fixture
def run(tmp_path):
    cases = [case("alibi", n, n / 100, fastpe_none=n / 110, sdpa=n / 50, mask=n / 25) for n in (512, 1024, 2048)]
    cases += [case("alibi_skip", n, 4.0, fastpe_none=4.0 * n / 512) for n in (512, 1024, 2048)]
    cases[0]["rows"].append({"candidate": "flex", "status": "failed", "message": "no backward"})
    return write(tmp_path / "run.json", *cases)


def test_table_of_cases(run, capsys):
    assert report.main(["tables", str(run)]) == 0
    out = capsys.readouterr().out
    assert "X (avx2, 2 cores), 1 thread(s), torch 2, fastpe 0.1 at abc, load 0.5 at the start, 2026-01-01" in out
    assert "| alibi/S1/fp32/fwd/cpu | sdpa | 20.480 | 1.0 | 2.00 |  |  | 20.5 |" in out
    assert "| alibi/1x8x8x512x64/fp32/fwd/cpu | flex | failed: no backward |" in out
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1


def test_table_of_targets(tmp_path, capsys):
    targets = [
        {"topic": "forward", "text": "alibi", "case": "a", "measure": "time sdpa", "goal": 1.4, "at_most": False, "value": 1.5,
         "spread": [1.4, 1.6], "state": "pass"},
        {"topic": "memory", "text": "alibi", "case": "b", "measure": "memory", "goal": 24, "at_most": True, "value": None, "spread": None,
         "state": "not measured"},
    ]  # fmt: skip
    assert report.main(["tables", str(write(tmp_path / "t.json", targets=targets))]) == 0
    out = capsys.readouterr().out
    assert "| forward: alibi | a | at least 1.4 | 1.50 | 1.40 to 1.60 | pass |" in out
    assert "| memory: alibi | b | at most 24 |  |  | not measured |" in out
    assert "1 of 2 reached." in out


def test_summary(tmp_path, capsys):
    cases = [case("alibi", 1024, 10.0, sdpa=15.0), case("alibi", 1024, 10.0, dtype="bf16", sdpa=27.25)]
    assert report.main(["summary", str(write(tmp_path / "s.json", *cases))]) == 0
    out = capsys.readouterr().out
    assert "| --- | --- | ---: | ---: |" in out
    assert [line for line in out.splitlines() if "ALiBi" in line] == ["| SDPA causal, no bias | ALiBi forward, 1024 tokens | 1.50 | 2.73 |"]


@pytest.mark.parametrize("form", ["png", "svg"])
def test_pictures(run, tmp_path, form, capsys):
    pytest.importorskip("matplotlib")
    assert report.main(["pictures", str(run), "--out", str(tmp_path / "out"), "--format", form]) == 0
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert written == {f"benchmark_{name}.{form}" for name in ("time", "memory", "overhead", "limit", "skipping")}
    start = {"png": b"\x89PNG", "svg": b"<?xml"}[form]
    assert all((tmp_path / "out" / name).read_bytes().startswith(start) for name in written)


def test_pictures_show_what_was_measured(run):
    pytest.importorskip("matplotlib")
    cases = report.load([run])["cases"]
    (ax,) = report.time_picture(cases).axes
    lines = {tuple(line.get_xdata()): None for line in ax.get_lines()}
    assert set(lines) == {(512, 1024, 2048)} and len(ax.get_lines()) == 4
    assert any(list(line.get_ydata()) == pytest.approx([5.12, 10.24, 20.48]) for line in ax.get_lines())
    few = {"x": case("alibi", 1024, 99.0, fastpe_none=99.0)}  # the same length elsewhere, with fewer candidates
    (ax,) = report.time_picture(cases | few).axes
    assert all(99.0 not in list(line.get_ydata()) for line in ax.get_lines())
    (ax,) = report.overhead_picture(cases).axes
    assert sorted(p.get_width() for p in ax.patches) == pytest.approx([1.1])  # at 1024 tokens
    (ax,) = report.skipping_picture(cases).axes
    assert list(ax.get_lines()[0].get_ydata()) == pytest.approx([1, 2, 4])
    assert report.time_picture({}) is report.overhead_picture({}) is report.skipping_picture({}) is None


def test_nothing_to_draw(tmp_path, capsys):
    assert report.main(["pictures", str(write(tmp_path / "empty.json")), "--out", str(tmp_path)]) == 2
    assert "no case" in capsys.readouterr().out


def compare(tmp_path, before: list[dict], after: list[dict], *arguments: str) -> int:
    paths = write(tmp_path / "before.json", *before), write(tmp_path / "after.json", *after)
    return report.main(["compare", *map(str, paths), *arguments])


def test_compare(tmp_path, capsys):
    before = [case("alibi", 1024, 10.0, sdpa=20.0), case("t5", 1024, 10.0, sdpa=20.0)]
    assert compare(tmp_path, before, copy.deepcopy(before)) == 0
    assert "2 cases, 0 slower by more than 5 %" in capsys.readouterr().out
    slower = [case("alibi", 1024, 11.0, sdpa=20.0), before[1]]
    assert compare(tmp_path, before, slower) == 1
    out = capsys.readouterr().out
    assert "| alibi/S1/fp32/fwd/cpu | 1.100 | slower |" in out and "| t5/S1/fp32/fwd/cpu | 1.000 |  |" in out
    assert compare(tmp_path, before, slower, "--threshold", "0.2") == 0
    assert compare(tmp_path, slower, before) == 0
    assert "faster" in capsys.readouterr().out


def test_compare_by_peer_does_not_see_a_slower_machine(tmp_path):
    before, after = [case("alibi", 1024, 10.0, sdpa=20.0)], [case("alibi", 1024, 15.0, sdpa=30.0)]
    assert compare(tmp_path, before, after) == 0
    assert compare(tmp_path, before, after, "--by", "time") == 1


def test_compare_sees_what_is_no_longer_measured(tmp_path, capsys):
    before = [case("alibi", 1024, 10.0, sdpa=20.0), case("t5", 1024, 10.0, sdpa=20.0)]
    after = copy.deepcopy(before)
    after[1]["rows"][0] = {"candidate": "fastpe", "status": "wrong", "message": "error 1"}
    assert compare(tmp_path, before, after) == 1
    assert "1 no longer measured" in capsys.readouterr().out
    assert compare(tmp_path, before, [case("fire", 1024, 1.0, sdpa=2.0)]) == 2


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(SystemExit, match="x.json is not a results file"):
        report.main(["tables", str(tmp_path / "x.json")])
