"""The benchmarks as a program: a short run is right from end to end, and a wrong result cannot pass for a measurement."""

from __future__ import annotations

import json
import os
import pathlib
import sys

import pytest
import torch

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import registry  # noqa: E402
import run as program  # noqa: E402
import targets as promised  # noqa: E402
import timing  # noqa: E402
from attend import Attention  # noqa: E402

import fastpe  # noqa: E402

OPTIONS = {"rounds": 2, "min_round_s": 0.0, "quick": True, "threads": 1, "timeout": 120.0}


@pytest.fixture(autouse=True)
def restored():
    """Registered families and the number of threads, as they were."""
    families, threads = dict(registry.FAMILIES), torch.get_num_threads()
    yield
    registry.FAMILIES.clear()
    registry.FAMILIES.update(families)
    torch.set_num_threads(threads)


def command(tmp_path, *arguments) -> tuple[int, dict]:
    """main() with few short rounds -> exit status, results."""
    out = tmp_path / "run.json"
    status = program.main([*arguments, "--json", str(out), "--rounds", "1", "--quick"])
    return status, json.loads(out.read_text()) if out.exists() else {}


def by_candidate(case: dict) -> dict[str, dict]:
    return {r["candidate"]: r for r in case["rows"]}


# ---------------------------------------------------------------------------------------------------------------------
# A short run


def test_every_method_is_right_and_measured(tmp_path, capsys):
    """The quick suite in float32, without compilation, training where a method trains: each candidate checked against the
    definition and timed."""
    patterns = [f"{m}/XS/fp32/{'fwd+bwd' if 'fwd+bwd' in f.passes else 'fwd'}/cpu" for m, f in registry.FAMILIES.items() if "XS" in f.shapes]
    status, run = command(tmp_path, *patterns, "--suite", "quick", "--no-compile")
    assert status == 0
    small = {m for m, f in registry.FAMILIES.items() if "XS" in f.shapes}
    assert {c["method"] for c in run["cases"]} == small
    for case in run["cases"]:
        candidates = by_candidate(case)
        ours = candidates["fastpe"]
        assert ours["status"] == "ok" and ours["median_s"] > 0 and ours["ratio"] == 1.0, case["case"]
        assert all(r["status"] in ("ok", "failed") for r in case["rows"]), case
        assert 0 < ours.get("share", 0.5) < 1.2 and ours.get("share_of_copy", 0.5) > 0, case["case"]  # caches outrun a copy
        if "sdpa" in registry.FAMILIES[case["method"]].peers:
            assert candidates["sdpa"]["ratio_low"] <= candidates["sdpa"]["ratio"] <= candidates["sdpa"]["ratio_high"]
    machine = run["machine"]
    assert machine["fastpe"]["isa"] == fastpe.info()["isa"] and machine["threads"] == 1
    assert {"cpu", "cores", "torch", "python", "commit", "dirty", "date", "load"} <= set(machine)
    captured = capsys.readouterr()
    assert "alibi/XS/fp32/fwd+bwd/cpu" in captured.out and "% of the limit" in captured.out
    assert "left" in captured.err


def test_half_precision_and_compiled_peers(tmp_path):
    status, run = command(tmp_path, "alibi/XS/bf16/fwd/cpu", "rotate/XS/bf16")
    assert status == 0
    candidates = by_candidate(run["cases"][0])
    for name in ("fastpe", "sdpa", "mask", "compiled", "flex"):
        assert candidates[name]["status"] == "ok", candidates[name]
    assert candidates["flex"]["ratio"] > 0.5  # compiled code, not the eager fallback that takes 50 times as long


def test_memory_of_a_dense_bias_shows(tmp_path):
    """512 x 512 scores of 4 heads in float32 are 4 MiB; fastpe holds none of them."""
    _, run = command(tmp_path, "kerple/XS/fp32/fwd+bwd/cpu", "--peers", "compiled")
    candidates = by_candidate(run["cases"][0])
    assert candidates["compiled"]["peak_mib"] > candidates["fastpe"]["peak_mib"] + 2
    assert candidates["fastpe"]["peak_mib"] < 8


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    measured = []
    measure = program.run_case
    monkeypatch.setattr(program, "run_case", lambda c, *a: measured.append(c.name) or measure(c, *a))
    _, first = command(tmp_path, "sink/XS/fp32/fwd/cpu", "--peers")
    _, second = command(tmp_path, "--resume", "sink/XS/fp32/fwd/cpu", "--peers")
    assert measured == ["sink/XS/fp32/fwd/cpu"] * 2, "a case that is named is measured again"
    _, third = command(tmp_path, "--resume", "sink/XS/bf16/fwd/cpu", "--peers")
    assert measured[2:] == ["sink/XS/bf16/fwd/cpu"] and [c["case"] for c in third["cases"]] == [measured[0], measured[2]]
    assert third["cases"][0] == second["cases"][0] != first["cases"][0]
    assert all(c["commit"] == third["machine"]["commit"] for c in third["cases"])
    with pytest.raises(SystemExit, match="holds the suite cases, not skipping"):
        command(tmp_path, "--resume", "--suite", "skipping")


# ---------------------------------------------------------------------------------------------------------------------
# What must not pass


def planted(name: str, attend, **kwargs):
    """A family "planted" whose candidate `name` is attend(Attention) -> out."""

    def build(case, wanted):
        a = Attention(case, wanted, **kwargs)
        a.add_plain()
        a.add(name, lambda: attend(a))
        return a.work()

    registry.family("planted", peers=("sdpa", name), shapes=("XS",))(build)


def halved_gradient(a: Attention) -> torch.Tensor:
    out = a.fused()
    return out if not out.requires_grad else out * 0.5 + out.detach() * 0.5


@pytest.mark.parametrize("pass_", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize(
    ("attend", "where"),
    [
        (lambda a: 1.01 * a.fused(), {"fwd", "fwd+bwd"}),
        (lambda a: a.fused().index_fill(2, torch.tensor([511]), float("nan")), {"fwd", "fwd+bwd"}),
        (halved_gradient, {"fwd+bwd"}),
    ],
    ids=["one percent off", "a row of nan", "half the gradient"],
)
def test_wrong_peer_is_a_row_and_fails_the_run(tmp_path, pass_, attend, where, capsys):
    planted("bad", attend)
    status, run = command(tmp_path, f"planted/XS/fp32/{pass_}/cpu")
    bad, good = (by_candidate(run["cases"][0])[n] for n in ("bad", "fastpe"))
    assert good["status"] == "ok" and good["median_s"] > 0
    if pass_ in where:
        assert status == 1 and bad["status"] == "wrong" and "median_s" not in bad
        assert "a result is wrong" in capsys.readouterr().err
    else:
        assert status == 0 and bad["status"] == "ok"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_wrong_fastpe_fails_the_run(tmp_path, dtype, monkeypatch):
    """fastpe with slopes 1 % off, as a broken kernel would have them."""
    right = fastpe.attention

    def broken(q, k, v, *, bias=None, **kwargs):
        bias = None if bias is None else fastpe.bias.Alibi(1.05 * bias.slopes)
        return right(q, k, v, bias=bias, **kwargs)

    monkeypatch.setattr(fastpe, "attention", broken)
    status, run = command(tmp_path, f"alibi/XS/{dtype}/fwd/cpu", "--no-compile")
    candidates = by_candidate(run["cases"][0])
    assert status == 1 and candidates["fastpe"]["status"] == "wrong"
    assert "ratio" not in candidates["sdpa"], "there is nothing to compare with"


def test_peers_that_raise_die_or_hang_are_rows():
    def hang(a):
        while True:
            pass

    ways = {
        "raises": lambda a: a.q.nonsense,
        "dies": lambda a: os.kill(os.getpid(), 9),
        "hangs": hang,
    }

    def build(case, wanted):
        a = Attention(case, wanted)
        for name, attend in ways.items():
            a.add(name, lambda attend=attend: attend(a))
        return a.work()

    registry.family("planted", peers=tuple(ways), shapes=("XS",))(build)
    result = program.run_case(registry.case("planted/XS/fp32/fwd"), frozenset(ways), OPTIONS | {"timeout": 8.0})
    rows = by_candidate(result)
    assert rows["fastpe"]["status"] == "ok" and rows["fastpe"]["median_s"] > 0
    assert rows["raises"]["status"] == "failed" and "nonsense" in rows["raises"]["message"]
    assert rows["dies"]["status"] == "crashed" and "-9" in rows["dies"]["message"]
    assert rows["hangs"]["status"] == "crashed" and "no result after 8 s" in rows["hangs"]["message"]


def test_fastpe_that_dies_is_a_row(monkeypatch, tmp_path):
    monkeypatch.setattr(fastpe, "attention", lambda *a, **k: os.kill(os.getpid(), 9))
    _, run = command(tmp_path, "none/XS/fp32/fwd/cpu")
    assert by_candidate(run["cases"][0])["fastpe"]["status"] == "failed"


# ---------------------------------------------------------------------------------------------------------------------
# Cases and targets


def test_names_of_cases():
    c = registry.case("alibi/1x8x2x300x64/bf16/fwd+bwd")
    assert (c.shape.H, c.shape.Hk, c.shape.Nq, c.shape.Nk, c.device) == (8, 2, 300, 300, "cpu")
    assert registry.case(c.name) == c
    for bad in ("alibi", "alibi/S1/fp32", "nothing/S1/fp32/fwd", "alibi/S9/fp32/fwd", "alibi/S1/fp8/fwd", "alibi/S1/fp32/back"):
        with pytest.raises(ValueError, match="case|shape"):
            registry.case(bad)


def test_patterns():
    cases = registry.everything()
    assert {c.name for c in registry.select(cases, ["alibi/S1/fp32"])} == {f"alibi/S1/fp32/{p}/cpu" for p in ("fwd", "fwd+bwd")}
    assert {c.method for c in registry.select(cases, ["cable*"])} == {"cable", "cable_weighted"}
    with pytest.raises(ValueError, match="no case fits 'alibbi'"):
        registry.select(cases, ["alibbi"])


def test_unknown_pattern_is_named(capsys):
    assert program.main(["alibbi"]) == 2
    assert "no case fits 'alibbi'" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_targets_name_cases_and_candidates_that_exist(device):
    rows = getattr(promised, device)()
    assert len(rows) > 25
    for t in rows:
        for name in t.cases:
            assert registry.case(name).device == device
        assert t.candidates <= set(registry.FAMILIES[registry.case(t.case).method].peers), t
    chosen = program.suite("targets", device)
    assert {c.name for c in chosen} == {name for t in rows for name in t.cases}


def test_states_of_targets():
    def row(candidate, seconds, **facts):
        ratio = seconds / 2.0
        return {"candidate": candidate, "status": "ok", "median_s": seconds, "ratio": ratio, "ratio_low": ratio, "ratio_high": ratio, **facts}

    ours = row("fastpe", 2.0, share=0.5, gflops=3000.0, peak_mib=30.0)
    broken = {"candidate": "flex", "status": "failed", "message": "no"}
    cases = {
        "a": {"rows": [ours, row("sdpa", 5.0), row("mask", 3.0), broken]},
        "b": {"rows": [row("fastpe", 2.0, peak_mib=15.0)]},
        "c": {"rows": [{"candidate": "fastpe", "status": "wrong", "message": "error 1"}]},
    }
    made = [
        (("a", "time sdpa", 2.4), 2.5, "pass"),
        (("a", "time sdpa", 2.6), 2.5, "short"),
        (("a", "time sdpa | mask", 2.0), 1.5, "short"),
        (("a", "cost mask", 0.7, True), 2 / 3, "pass"),
        (("a", "share", 60), 50.0, "short"),
        (("a", "tflops", 3), 3.0, "pass"),
        (("a", "memory", 24, True), 30.0, "short"),
        (("a", "growth b", 2.2, True), 2.0, "pass"),
        (("a", "time flex", 1), None, "flex: no"),
        (("c", "time sdpa", 1), None, "fastpe: error 1"),
        (("d", "share", 1), None, "not measured"),
    ]
    for given, value, state in made:
        (found,) = promised.evaluate([promised.Target("t", "t", *given)], cases)
        assert found["state"] == state, given
        assert found["value"] == (None if value is None else pytest.approx(value)), given


# ---------------------------------------------------------------------------------------------------------------------
# The clock


def test_interleaving_takes_turns_and_ratios_are_by_round(monkeypatch):
    order, seconds = [], iter(range(1, 100))
    monkeypatch.setitem(timing.CLOCKS, "cpu time", lambda call, repeats: (call(), float(next(seconds)))[1])
    taken = timing.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, min_round_s=0)
    assert "".join(order) == "aabb" + "ab" * 3  # warm-up and one call to see how long it takes, then turns
    assert taken["a"].seconds == (3.0, 5.0, 7.0) and taken["b"].seconds == (4.0, 6.0, 8.0)
    assert taken["a"].median == 5.0 and taken["a"].spread == pytest.approx(0.4)
    assert taken["b"].over(taken["a"]) == pytest.approx((sum((8 / 7, 6 / 5)) / 2, 6 / 5, (4 / 3 + 6 / 5) / 2))


def test_cpu_time_does_not_count_sleep():
    import time

    taken = timing.interleave({"sleep": lambda: time.sleep(0.02)}, rounds=2, min_round_s=0)
    assert taken["sleep"].median < 0.01
    assert timing.interleave({"sleep": lambda: time.sleep(0.02)}, rounds=2, min_round_s=0, clock="wall time")["sleep"].median >= 0.02


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the system does not tell the peak")
def test_peak_memory_is_that_of_the_call():
    kept = []
    size = 32 * 2**20
    low = size - 2**20  # Linux counts resident pages per CPU and adds them up in batches (64 pages and more per CPU)
    peak = timing.peak_extra_bytes(lambda: torch.ones(size // 4).sum())
    assert low <= peak < size + 8 * 2**20
    peak = timing.peak_extra_bytes(lambda: kept.append(torch.ones(size // 4)))
    assert low <= peak < size + 8 * 2**20
    assert timing.peak_extra_bytes(lambda: None) < 4 * 2**20


def test_limit_is_a_rate():
    best = timing.limits("cpu", "float32")
    assert 0.5 < best["gflops"] < 2000 and 0.5 < best["copy_gbs"] < 1000


def test_a_process_that_starts_afresh():
    """As for a GPU, where nothing may be inherited: the task and its case travel by name."""
    kind, result = program.apart(program.measure, (registry.case("none/XS/fp32/fwd"), frozenset({"sdpa"}), OPTIONS), 120.0, "cuda")
    assert kind == "done" and [r["status"] for r in result["rows"]] == ["ok", "ok"]
