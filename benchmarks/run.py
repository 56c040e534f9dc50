"""Measures fastpe against what one would run otherwise, after checking both against the definition.

    python benchmarks/run.py --quick                              every method, small: three minutes on two cores
    python benchmarks/run.py alibi/S2                             cases by name, or part of one
    python benchmarks/run.py 'cable*/*/bf16/fwd+bwd' --shape 1x8x8x2048x64
    python benchmarks/run.py --suite targets --json benchmarks/results/targets.json
    python benchmarks/run.py --list

A case is method/shape/dtype/pass/device. Each runs in a process of its own, in which the candidates take turns; one that
cannot run, crashes or gives a wrong result is a row that says so. Exit status 1 after a wrong result, of fastpe or of a
peer. benchmarks/report.py makes tables and pictures of the results and compares two runs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pathlib
import sys
import time

from timing import interleave, keep_freed_memory, limits, machine, peak_extra_bytes, write_json

if __name__ == "__main__":
    keep_freed_memory()

import registry  # noqa: E402
import targets as promised  # noqa: E402
import torch  # noqa: E402
from registry import COMPILED, FAMILIES, Case, Wrong  # noqa: E402
from tqdm import tqdm  # noqa: E402

import fastpe  # noqa: E402

import biases, decoding, landmark, regions, rotary, threads  # noqa: E401, E402, F401  isort: skip  each registers its families

LENGTHS = (512, 1024, 2048, 4096)


def suite(name: str, device: str) -> dict[Case, frozenset[str] | None]:
    """The cases of a suite, each with the candidates it needs (None: all of the family's)."""
    if name == "quick":
        cases = {c: frozenset(FAMILIES[c.method].peers) - COMPILED for c in registry.everything(device) if c.shape.name == "XS"}
        cases[registry.case(f"alibi/XS/fp32/fwd/{device}")] = None  # one with compiled peers
        return cases
    if name == "targets":
        wanted: dict[Case, set[str]] = {}
        for t in promised.cpu() if device == "cpu" else promised.cuda():
            for c in t.cases:
                wanted.setdefault(registry.case(c), set()).update(t.candidates if c == t.case else ())
        for c, candidates in wanted.items():
            if device == "cuda" and c.method in ("none", "full"):
                candidates.update(FAMILIES[c.method].peers)  # no target, but what one would run there
        return {c: frozenset(w) for c, w in wanted.items()}
    if name == "lengths":
        picked = {"alibi": ("fwd", {"sdpa", "mask", "column", "flex", "x-transformers"}), "cable": ("fwd+bwd", {"sdpa", "compiled"})}
        return {
            registry.case(f"{method}/1x8x8x{n}x64/{dt}/{pass_}/{device}"): frozenset(peers)
            for method, (pass_, peers) in picked.items()
            for dt in ("fp32", "bf16")
            for n in LENGTHS
        }
    if name == "overhead":
        found = {}
        for c in registry.everything(device, ("S1",)):
            if "fastpe none" in FAMILIES[c.method].peers and c.method != "alibi_skip":
                found[c] = frozenset({"fastpe none"})
        return found
    if name == "skipping":
        return {c: None for c in registry.everything(device) if c.method == "alibi_skip" and c.pass_ == "fwd"}
    raise ValueError(name)


SUITES = ("quick", "targets", "lengths", "overhead", "skipping")

# ---------------------------------------------------------------------------------------------------------------------
# One case, in its own process


def measure(c: Case, wanted: frozenset[str], options: dict, say) -> dict:
    """Checks and times the candidates of a case. `say` tells the parent where it is."""
    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    work = FAMILIES[c.method].build(c, wanted)
    clock = work.clock or ("cuda events" if c.device == "cuda" else "cpu time" if options["threads"] == 1 else "wall time")
    result = {
        "case": c.name, "method": c.method, "shape": vars(c.shape) | {}, "dtype": c.dtype, "pass": c.pass_, "device": c.device,
        "threads": options["threads"], "clock": clock, "rows": [],
    }  # fmt: skip
    rows = {}
    with fastpe.config.skip_bound(work.skip_bound):
        for name, call in work.calls.items():
            say(name)
            rows[name] = row = {"candidate": name, "status": "ok"}
            try:
                row["error"] = work.check(name)
                peak = peak_extra_bytes(call, c.device)
                row["peak_mib"] = None if peak is None else peak / 2**20
            except Wrong as e:
                row |= {"status": "wrong", "message": str(e)}
            except Exception as e:  # noqa: BLE001  whatever a peer raises is its result
                row |= {"status": "failed", "message": f"{type(e).__name__}: {_first_line(e)}"}
        able = {name: work.calls[name] for name, row in rows.items() if row["status"] == "ok"}
        best = limits(c.device, str(c.torch_dtype).removeprefix("torch."))
        say("timing")
        taken = interleave(able, clock=clock, rounds=options["rounds"], min_round_s=options["min_round_s"])
        if not options["quick"]:  # a second look: the clock rate of the machine drifts
            again = limits(c.device, str(c.torch_dtype).removeprefix("torch."))
            best = {k: max(best[k], again[k]) for k in best}
    result["limits"] = best
    for name, t in taken.items():
        row = rows[name]
        row |= {"median_s": t.median, "spread": t.spread}
        if "fastpe" in taken:
            low, middle, high = t.over(taken["fastpe"])
            row |= {"ratio": middle, "ratio_low": low, "ratio_high": high}
    if "fastpe" in taken:
        ours = rows["fastpe"]
        if work.flop:
            ours["gflops"] = work.flop / ours["median_s"] / 1e9
            ours["share"] = ours["gflops"] / best["gflops"]
        if work.bytes:
            ours["gbs"] = work.bytes / ours["median_s"] / 1e9
            ours["share_of_copy"] = ours["gbs"] / best["copy_gbs"]
    result["rows"] = list(rows.values())
    return result


def _first_line(e: Exception) -> str:
    lines = str(e).strip().splitlines()
    return (lines[0] if lines else "")[:200]


def _child(connection, task, args) -> None:
    try:
        connection.send(("done", task(*args, lambda where: connection.send(("at", where)))))
    except Exception as e:  # noqa: BLE001
        connection.send(("failed", f"{type(e).__name__}: {_first_line(e)}"))
    connection.close()


def apart(task, args: tuple, timeout: float, device: str):
    """task(*args, say) in a process of its own: ("done", result), or ("failed" | "crashed", message, where it was)."""
    # A forked process has torch loaded; one that is to use a GPU must start afresh.
    context = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, task, args))
    process.start()
    theirs.close()
    where, end = "building", time.monotonic() + timeout
    try:
        while True:
            if not ours.poll(max(0.0, end - time.monotonic())):
                return "crashed", f"no result after {timeout:g} s", where
            kind, what = ours.recv()
            if kind == "at":
                where = what
            else:
                return (kind, what) if kind == "done" else (kind, what, where)
    except EOFError:
        process.join()
        return "crashed", f"exit status {process.exitcode}", where
    finally:
        if process.is_alive():
            process.join(1)
        if process.is_alive():
            process.kill()
        process.join()


def run_case(c: Case, wanted: frozenset[str], options: dict) -> dict:
    """measure() apart; candidates that take the process down become rows, and the others are measured without them."""
    lost: list[dict] = []
    while True:
        kind, *what = apart(measure, (c, wanted, options), options["timeout"], c.device)
        if kind == "done":
            what[0]["rows"] += lost
            return what[0]
        message, where = what
        if where not in wanted:
            return {"case": c.name, "method": c.method, "message": f"{where}: {message}", "rows": [
                {"candidate": "fastpe", "status": "failed", "message": f"{where}: {message}"}, *lost]}  # fmt: skip
        lost.append({"candidate": where, "status": kind, "message": message})
        wanted -= {where}


# ---------------------------------------------------------------------------------------------------------------------
# A run


def describe(result: dict) -> str:
    lines = [result["case"]]
    for r in result["rows"]:
        if r["status"] != "ok":
            lines.append(f"  {r['candidate']:24s} {r['status']}: {r['message']}")
            continue
        text = f"  {r['candidate']:24s} {1e3 * r['median_s']:10.3f} ms  spread {100 * r['spread']:4.1f} %"
        if "ratio" in r:
            text += f"  {r['ratio']:7.3f} x [{r['ratio_low']:.3f}, {r['ratio_high']:.3f}]"
        if r.get("peak_mib") is not None:
            text += f"  {r['peak_mib']:8.1f} MiB"
        if r.get("gflops"):
            text += f"  {r['gflops']:7.1f} GFLOP/s, {100 * r['share']:.0f} % of the limit"
        if r.get("gbs"):
            text += f"  {r['gbs']:6.1f} GB/s, {100 * r['share_of_copy']:.0f} % of a copy"
        lines.append(text + f"  error {r['error']:.1e}")
    return "\n".join(lines)


def describe_target(t: dict) -> str:
    value = "     -  " if t["value"] is None else f"{t['value']:8.2f}"
    sign = "<=" if t["at_most"] else ">="
    return f"{t['topic']:10s} {t['text']:56s} {t['case']:34s} {value}  target {sign} {t['goal']:<6g} {t['state']}"


def is_wrong(results: list[dict]) -> bool:
    return any(r["status"] == "wrong" for result in results for r in result["rows"])


def kept(out: pathlib.Path, name: str, measured_again: set[str]) -> dict[str, dict]:
    """The cases of a results file of the same suite, by name, but for those."""
    if not out.exists():
        return {}
    try:
        before = json.loads(out.read_text())
        if before["suite"] != name:
            raise SystemExit(f"benchmarks: {out} holds the suite {before['suite']}, not {name}")
        return {c["case"]: c for c in before["cases"] if c["case"] not in measured_again}
    except (ValueError, KeyError, TypeError) as e:
        raise SystemExit(f"benchmarks: {out} is not a results file ({type(e).__name__}: {e})") from None


def run(cases: dict[Case, frozenset[str]], options: dict, out: pathlib.Path, device: str, name: str, before: dict[str, dict]) -> list[dict]:
    """Measures the cases in turn and keeps the results file up to date, which starts with the cases `before`."""
    kind, *facts = apart(_machine, (device, options["threads"]), 120.0, device)
    if kind != "done":
        raise SystemExit(f"benchmarks: {facts[0]}")
    payload = {"suite": name, "machine": facts[0], "settings": options, "cases": [], "targets": []}
    # Work ahead in FLOP, so that the time left is about right; a case costs as much as 20 GFLOP before any product.
    effort = {c: 20e9 + (len(w) + 1) * options["rounds"] * registry.PASSES[c.pass_] * c.shape.flop for c, w in cases.items()}
    done = dict(before)
    quiet = {"mininterval": 0.3 if sys.stderr.isatty() else 20.0, "dynamic_ncols": True}
    form = "{percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left {desc}"

    def save() -> None:
        payload["cases"] = list(done.values())
        if name == "targets":
            payload["targets"] = promised.evaluate(promised.cpu() if device == "cpu" else promised.cuda(), done)
        write_json(out, payload)

    save()
    with tqdm(total=sum(effort.values()), bar_format=form, smoothing=0.1, **quiet) as bar:
        for c, wanted in cases.items():
            bar.set_description_str(c.name, refresh=False)
            done[c.name] = run_case(c, wanted, options) | {"commit": facts[0]["commit"], "date": facts[0]["date"]}
            save()
            (bar.write if sys.stderr.isatty() else print)(describe(done[c.name]))
            sys.stdout.flush()
            bar.update(effort[c])
    for t in payload["targets"]:
        print(describe_target(t))
    if payload["targets"]:
        states = [t["state"] for t in payload["targets"]]
        reached, short = states.count("pass"), states.count("short")
        print(f"{reached} of {len(states)} targets reached, {short} short, {len(states) - reached - short} without a value")
    print(out)
    return payload["cases"]


def _machine(device: str, threads: int, say) -> dict:
    torch.set_num_threads(threads)
    return machine(device)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("pattern", nargs="*", help="cases by name or part of it, shell wildcards; of the suite if one is named, else of all")
    add("--suite", choices=SUITES, help="a named set of cases")
    add("--quick", action="store_true", help="the suite 'quick' with few, short rounds")
    add("--list", action="store_true", help="print the names of the cases and their peers, measure nothing")
    add("--shape", nargs="+", help="other shapes: BxHxHkxNxD, BxHxHkxNqxNkxD or a name")
    add("--dtype", nargs="+", choices=list(registry.DTYPES))
    add("--pass", dest="pass_", nargs="+", choices=list(registry.PASSES))
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--peers", nargs="*", help="candidates beside fastpe (default: the family's)")
    add("--no-compile", action="store_true", help="leave out peers that take a compilation")
    add("--rounds", type=int, help="default 7, quick 3")
    add("--threads", type=int, default=1, help="above 1 the clock is wall time (default 1)")
    add("--timeout", type=float, default=900.0, help="seconds for one case (default 900)")
    add("--resume", action="store_true", help="keep the cases that the results file holds and measure the others, or those named by a pattern")
    add("--json", type=pathlib.Path, help="results file (default results/benchmarks/SUITE.json)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    name = args.suite or ("quick" if args.quick and not args.pattern and not args.shape else "cases")
    try:
        if name != "cases":
            cases = suite(name, args.device)
        else:
            for s in args.shape or ():
                registry.Shape.parse(s)
            everything = registry.everything(args.device, tuple(args.shape) if args.shape else None)
            if args.pass_ and "bwd" in args.pass_ or any("/bwd" in p for p in args.pattern):
                everything += [Case(c.method, c.shape, c.dtype, "bwd", c.device) for c in everything if c.pass_ == "fwd+bwd"]
            cases = dict.fromkeys(everything)
        chosen = registry.select(list(cases), args.pattern)
    except ValueError as e:
        print(f"benchmarks: {e}", file=sys.stderr)
        return 2
    out = args.json or pathlib.Path("results", "benchmarks", f"{name}.json")
    before = kept(out, name, {c.name for c in chosen} if args.pattern else set()) if args.resume else {}
    picked = {}
    for c in chosen:
        if (args.dtype and c.dtype not in args.dtype) or (args.pass_ and c.pass_ not in args.pass_):
            continue
        wanted = frozenset(FAMILIES[c.method].peers) if cases[c] is None else cases[c]
        wanted = wanted if args.peers is None else frozenset(args.peers)
        if c.name not in before:
            picked[c] = wanted - COMPILED if args.no_compile else wanted
    if args.list:
        for c, wanted in picked.items():
            print(f"{c.name:44s} {', '.join(sorted(wanted))}")
        return 0
    options = {
        "rounds": args.rounds or (3 if args.quick else 7), "min_round_s": 0.01 if args.quick else 0.05,
        "quick": args.quick, "threads": args.threads, "timeout": args.timeout,
    }  # fmt: skip
    results = run(picked, options, out, args.device, name, before)
    if is_wrong(results):
        print("benchmarks: a result is wrong", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
