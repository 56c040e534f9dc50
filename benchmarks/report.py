"""Tables and pictures of benchmark runs, and the comparison of two.

    python benchmarks/report.py tables RUN.json...                     Markdown on standard output
    python benchmarks/report.py summary RUN.json...                    the short table of README
    python benchmarks/report.py pictures RUN.json... --out docs/images PNG (or --format svg)
    python benchmarks/report.py compare BEFORE.json AFTER.json         exit status 1 if a case became slower

RUN.json comes from benchmarks/run.py. Pictures are drawn from the cases that are there: time against length and memory against
length (suite lengths), cost of a bias and share of the limit (suite overhead), gain of tile skipping (suite skipping).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys

import targets

COLOURS = {  # colours keep apart for colour-blind readers
    "fastpe": "#009e73", "fastpe none": "#7fcfb9", "sdpa": "#0072b2", "mask": "#d55e00", "column": "#cc79a7", "flex": "#e69f00",
    "compiled": "#56b4e9", "x-transformers": "#8c510a",
}  # fmt: skip
LABELS = {
    "fastpe": "fastpe",
    "fastpe none": "fastpe without the bias",
    "sdpa": "SDPA without the bias",
    "mask": "SDPA, dense mask",
    "column": "SDPA, extra channels",
    "flex": "FlexAttention compiled",
    "compiled": "written-out formula compiled",
    "x-transformers": "x-transformers",
}
PASSES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward and backward"}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def load(paths: list[pathlib.Path]) -> dict:
    """Runs as one: all cases by name (a later file takes the place of an earlier one), and the machines."""
    cases, promised, machines = {}, [], []
    for path in paths:
        try:
            run = json.loads(path.read_text())
            found = {c["case"]: c for c in run["cases"]}
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise SystemExit(f"report: {path} is not a results file of benchmarks/run.py ({type(e).__name__}: {e})") from None
        cases |= found
        promised += run.get("targets", [])
        machines.append(run["machine"])
    return {"cases": cases, "targets": promised, "machines": machines}


def rows(case: dict) -> dict[str, dict]:
    """The candidates that were measured."""
    return {r["candidate"]: r for r in case["rows"] if r["status"] == "ok" and "median_s" in r}


def describe_machine(m: dict) -> str:
    f = m["fastpe"]
    where = m["gpu"] if "gpu" in m else f"{m['cpu']} ({f['isa']}, {m['cores']} cores)"
    load = "" if m.get("load") is None else f", load {m['load']:.1f} at the start"
    return f"{where}, {m['threads']} thread(s), torch {m['torch']}, fastpe {f['fastpe']} at {m['commit']}{load}, {m['date']}"


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A table; the first column to the left, the others to the right."""
    table = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(r) + " |" for r in table)


def case_table(cases: dict[str, dict]) -> str:
    body = []
    for name, c in cases.items():
        for r in c["rows"]:
            if r["status"] != "ok" or "median_s" not in r:
                body.append([name, r["candidate"], r["status"] + ": " + r.get("message", ""), "", "", "", "", ""])
                continue
            rate = f"{r['gflops']:.0f}" if "gflops" in r else f"{r['gbs']:.0f} GB/s" if "gbs" in r else ""
            share = r.get("share", r.get("share_of_copy"))
            peak = r.get("peak_mib")
            body.append([
                name, r["candidate"], f"{1e3 * r['median_s']:.3f}", f"{100 * r['spread']:.1f}", f"{r['ratio']:.2f}" if "ratio" in r else "",
                rate, "" if share is None else f"{100 * share:.0f}", "" if peak is None else f"{peak:.1f}",
            ])  # fmt: skip
    return markdown(["case", "candidate", "ms", "spread, %", "times fastpe", "GFLOP/s", "share of limit, %", "extra MiB"], body)


def target_table(found: list[dict]) -> str:
    body = []
    for t in found:
        value = "" if t["value"] is None else f"{t['value']:.2f}"
        spread = "" if not t.get("spread") else f"{t['spread'][0]:.2f} to {t['spread'][1]:.2f}"
        sign = "at most" if t["at_most"] else "at least"
        body.append([f"{t['topic']}: {t['text']}", t["case"], f"{sign} {t['goal']:g}", value, spread, t["state"]])
    reached = sum(t["state"] == "pass" for t in found)
    table = markdown(["target", "case", "goal", "measured", "quartiles", "state"], body)
    return f"{table}\n\n{reached} of {len(found)} reached."


# against, what, case but for its dtype, measure as in targets.py
SUMMARY = (
    ("SDPA causal, no bias", "ALiBi forward, 1024 tokens", "alibi/S1/{}/fwd/cpu", "time sdpa"),
    ("SDPA causal, no bias", "ALiBi forward, 4096 tokens", "alibi/S2/{}/fwd/cpu", "time sdpa"),
    ("SDPA with a ready-made dense mask", "ALiBi forward, 4096 tokens", "alibi/S2/{}/fwd/cpu", "time mask"),
    ("SDPA with the bias as extra channels", "ALiBi forward, 4096 tokens", "alibi/S2/{}/fwd/cpu", "time column"),
    ("FlexAttention compiled", "ALiBi forward, 4096 tokens", "alibi/S2/{}/fwd/cpu", "time flex"),
    ("SDPA causal, no bias", "cumulative bias with its gradient, forward + backward, 1024 tokens", "cable/S1/{}/fwd+bwd/cpu", "time sdpa"),
    ("written-out formula compiled", "learned KERPLE, forward + backward, 4096 tokens", "kerple/S2/{}/fwd+bwd/cpu", "time compiled"),
    ("written-out formula compiled", "FIRE, forward + backward, 1024 tokens", "fire/S1/{}/fwd+bwd/cpu", "time compiled"),
    ("fastpe without a bias", "ALiBi forward, 16384 tokens, tiles skipped", "alibi_skip/S2x4/{}/fwd/cpu", "time fastpe none"),
    ("FlexAttention with a block mask", "documents of 512 in 4096", "documents/S2/{}/fwd/cpu", "time flex"),
    ("grouped products, compiled or not", "decoding, 8 sequences of 8192 keys", "decode/D8/{}/fwd/cpu", "time packed | bmm | compiled"),
)


def summary_table(cases: dict[str, dict]) -> str:
    body = []
    for against, what, case, measure in SUMMARY:
        states = targets.evaluate([targets.Target("", "", case.format(dt), measure, 0.0) for dt in ("fp32", "bf16")], cases)
        if any(s["value"] for s in states):
            body.append([against, what, *("" if s["value"] is None else f"{s['value']:.2f}" for s in states)])
    table = markdown(["against", "case", "float32", "bfloat16"], body)
    return table.replace("| --- | ---: |", "| --- | --- |", 1)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def _figure(columns: int, height: float = 3.6):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * columns, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _by_length(cases: dict[str, dict], method: str, pass_: str, dtype: str) -> dict[int, dict]:
    """Cases of 8 heads of 64 channels that differ in length only, shortest first; of one length that with most candidates."""
    wanted = {"method": method, "pass": pass_, "dtype": dtype}
    found = [c for c in cases.values() if c["rows"] and wanted.items() <= c.items() and (c["shape"]["D"], c["shape"]["H"]) == (64, 8)]
    return {c["shape"]["Nk"]: c for c in sorted(found, key=lambda c: (c["shape"]["Nk"], len(rows(c))))}


def _order(which: tuple[str, str, str]) -> tuple:
    return which[0], which[1], list(DTYPES).index(which[2])


def _lines(cases: dict[str, dict], key: str, label: str):
    """One axes per method, pass and dtype that has at least two lengths; a line per candidate."""
    which = sorted({(c["method"], c["pass"], c["dtype"]) for c in cases.values() if c["rows"] and c["method"] != "alibi_skip"}, key=_order)
    which = [w for w in which if sum(len(rows(c)) > 1 for c in _by_length(cases, *w).values()) > 2]
    if not which:
        return None
    figure, axes = _figure(len(which))
    named = {}
    for ax, w in zip(axes, which):
        points: dict[str, list[tuple[int, float]]] = {}
        for n, c in _by_length(cases, *w).items():
            for candidate, r in rows(c).items():
                if candidate in COLOURS and r.get(key):
                    points.setdefault(candidate, []).append((n, r[key]))
        for candidate, p in points.items():
            factor = 1e3 if key == "median_s" else 1.0
            marker = "o" if candidate.startswith("fastpe") else "s"
            x, y = [n for n, _ in p], [factor * v for _, v in p]
            (named[candidate],) = ax.plot(x, y, color=COLOURS[candidate], marker=marker, markersize=4, linewidth=1.6)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        lengths = sorted({n for p in points.values() for n, _ in p})
        ax.set_xticks(lengths, [str(n) for n in lengths])
        ax.set_title(f"{w[0]}, {PASSES[w[1]]}, {DTYPES[w[2]]}", fontsize=10)
        ax.set_xlabel("tokens")
        ax.grid(True, color="#dddddd", linewidth=0.7)
    axes[0].set_ylabel(label)
    order = [c for c in COLOURS if c in named]
    figure.legend([named[c] for c in order], [LABELS[c] for c in order], loc="outside lower center", ncols=2 * len(which), fontsize=9)
    return figure


def time_picture(cases: dict[str, dict]):
    return _lines(cases, "median_s", "ms")


def memory_picture(cases: dict[str, dict]):
    return _lines(cases, "peak_mib", "extra memory, MiB")


def _bars(cases: dict[str, dict], value, label: str, line: float | None):
    """A bar per method, one axes per pass, the two dtypes beside each other."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for c in cases.values():
        if c["rows"] and c["shape"]["name"] == "S1" and c["method"] != "alibi_skip" and (v := value(rows(c))) is not None:
            found.setdefault(c["pass"], {}).setdefault(c["method"], {})[c["dtype"]] = v
    if not found:
        return None
    figure, axes = _figure(len(found), 0.28 * max(len(m) for m in found.values()) + 1.4)
    for ax, (pass_, methods) in zip(axes, found.items()):
        for k, (dtype, colour) in enumerate((("fp32", "#0072b2"), ("bf16", "#e69f00"))):
            at = [i + 0.4 * k for i, m in enumerate(methods) if dtype in methods[m]]
            ax.barh(at, [v[dtype] for v in methods.values() if dtype in v], 0.38, color=colour, label=DTYPES[dtype])
        ax.set_axisbelow(True)
        ax.set_yticks([i + 0.2 for i in range(len(methods))], list(methods))
        ax.invert_yaxis()
        ax.set_xlabel(label)
        ax.set_title(PASSES[pass_], fontsize=10)
        if line is not None:
            ax.axvline(line, color="#444444", linewidth=1, linestyle=":")
        ax.grid(True, axis="x", color="#dddddd", linewidth=0.7)
    axes[0].legend(fontsize=8)
    return figure


def overhead_picture(cases: dict[str, dict]):
    def cost(r):
        return 1 / r["fastpe none"]["ratio"] if "fastpe none" in r and "ratio" in r["fastpe none"] else None

    return _bars(cases, cost, "time over that of attention without it", 1.0)


def limit_picture(cases: dict[str, dict]):
    return _bars(cases, lambda r: 100 * r["fastpe"]["share"] if "share" in r.get("fastpe", {}) else None, "share of the limit, %", 100.0)


def skipping_picture(cases: dict[str, dict]):
    lines = {}
    for dtype in ("fp32", "bf16"):
        measured = {n: rows(c) for n, c in _by_length(cases, "alibi_skip", "fwd", dtype).items()}
        points = [(n, r["fastpe none"]["ratio"]) for n, r in measured.items() if "ratio" in r.get("fastpe none", {})]
        if points:
            lines[dtype] = points
    if not lines:
        return None
    figure, (ax,) = _figure(1)
    for dtype, points in lines.items():
        ax.plot(*zip(*points), marker="o", label=DTYPES[dtype], color={"fp32": "#0072b2", "bf16": "#e69f00"}[dtype])
    lengths = sorted({n for p in lines.values() for n, _ in p})
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [str(n) for n in lengths])
    ax.axhline(1.0, color="#444444", linewidth=1, linestyle=":")
    ax.set_xlabel("tokens")
    ax.set_ylabel("times faster than without a bias")
    ax.set_title("ALiBi, forward: tiles the decay has emptied are skipped", fontsize=10)
    ax.grid(True, color="#dddddd", linewidth=0.7)
    ax.legend(fontsize=9)
    return figure


PICTURES = {
    "time": time_picture, "memory": memory_picture, "overhead": overhead_picture, "limit": limit_picture, "skipping": skipping_picture,
}  # fmt: skip


def draw(cases: dict[str, dict], out: pathlib.Path, form: str) -> list[pathlib.Path]:
    """The pictures for which there are cases, out/benchmark_NAME.FORM."""
    written = []
    out.mkdir(parents=True, exist_ok=True)
    for name, make in PICTURES.items():
        if (figure := make(cases)) is not None:
            path = out / f"benchmark_{name}.{form}"
            figure.savefig(path, format=form)
            written.append(path)
    return written


# ---------------------------------------------------------------------------------------------------------------------
# Comparing two runs


def changes(before: dict[str, dict], after: dict[str, dict], by: str) -> list[tuple[str, float]]:
    """(case, factor) of what both runs hold; above 1: the later run is slower.

    by "peer": fastpe's time in units of the peers' (geometric mean over those in both runs), which carries over between
    machines and loads; by "time": fastpe's time itself.
    """
    found = []
    for name in before.keys() & after.keys():
        old, new = rows(before[name]), rows(after[name])
        if "fastpe" not in old or "fastpe" not in new:
            continue
        if by == "time":
            found.append((name, new["fastpe"]["median_s"] / old["fastpe"]["median_s"]))
            continue
        peers = [p for p in old if p in new and not p.startswith("fastpe")]
        if peers:
            found.append((name, statistics.geometric_mean(old[p]["ratio"] / new[p]["ratio"] for p in peers)))
    return sorted(found, key=lambda x: -x[1])


def compare(before: dict, after: dict, threshold: float, by: str) -> int:
    found = changes(before["cases"], after["cases"], by)
    if not found:
        print("report: the two runs have no case in common that both measured", file=sys.stderr)
        return 2
    lost = [
        name
        for name, c in before["cases"].items()
        if name in after["cases"] and "fastpe" in rows(c) and "fastpe" not in rows(after["cases"][name])
    ]
    body = [[name, f"{x:.3f}", "slower" if x > 1 + threshold else "faster" if x < 1 / (1 + threshold) else ""] for name, x in found]
    body += [[name, "", "no longer measured"] for name in lost]
    what = "fastpe's time over the peers', after / before" if by == "peer" else "fastpe's time, after / before"
    print(markdown(["case", what, ""], body))
    slower = sum(x > 1 + threshold for _, x in found)
    print(f"\n{len(found)} cases, {slower} slower by more than {100 * threshold:g} %, {len(lost)} no longer measured")
    return 1 if slower or lost else 0


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    t = commands.add_parser("tables", help="Markdown: targets, or every candidate of every case")
    t.add_argument("runs", nargs="+", type=pathlib.Path)
    t.add_argument("--all", action="store_true", help="every candidate, also where there are targets")
    m = commands.add_parser("summary", help="the short table of README")
    m.add_argument("runs", nargs="+", type=pathlib.Path)
    d = commands.add_parser("pictures", help="PNG or SVG files")
    d.add_argument("runs", nargs="+", type=pathlib.Path)
    d.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results", "benchmarks"))
    d.add_argument("--format", choices=("png", "svg"), default="png")
    c = commands.add_parser("compare", help="two runs; exit status 1 if fastpe became slower somewhere")
    c.add_argument("before", type=pathlib.Path)
    c.add_argument("after", type=pathlib.Path)
    c.add_argument("--threshold", type=float, default=0.05, help="relative slowdown that counts (default 0.05)")
    c.add_argument("--by", choices=("peer", "time"), default="peer", help="compare times in units of the peers' (default), or times")
    args = p.parse_args(argv)
    if args.command == "compare":
        return compare(load([args.before]), load([args.after]), args.threshold, args.by)
    runs = load(args.runs)
    if args.command == "pictures":
        written = draw(runs["cases"], args.out, args.format)
        print("\n".join(map(str, written)) if written else "report: no case that a picture is made of")
        return 0 if written else 2
    for m in runs["machines"]:
        print(f"{describe_machine(m)}\n")
    if args.command == "summary":
        print(summary_table(runs["cases"]))
        return 0
    if runs["targets"]:
        print(target_table(runs["targets"]))
    if args.all or not runs["targets"]:
        print(case_table(runs["cases"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
