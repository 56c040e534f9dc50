"""The targets: what fastpe promises in time and memory, each one a measure of a case and the figure it must reach.

`python benchmarks/run.py --suite targets` measures their cases and prints target, measured, pass or short.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Target:
    """One row. measure:

    "time X"        time of candidate X over that of fastpe: how many times faster fastpe is (X may list several: the best)
    "cost X"        time of fastpe over that of candidate X
    "share"         GFLOP/s over the limit of the machine, percent
    "tflops"        TFLOP/s
    "memory"        peak extra memory, MiB
    "growth CASE"   peak extra memory over that of another case
    """

    topic: str
    text: str
    case: str
    measure: str
    goal: float
    at_most: bool = False

    @property
    def cases(self) -> list[str]:
        return [self.case, self.measure.split(" ", 1)[1]] if self.measure.startswith("growth ") else [self.case]

    @property
    def candidates(self) -> set[str]:
        kind, _, rest = self.measure.partition(" ")
        return set(rest.split(" | ")) if kind in ("time", "cost") else set()


def _both(goals: tuple[float, float]):
    return zip(("fp32", "bf16"), goals)


def cpu() -> list[Target]:
    rows: list[Target] = []

    def add(*args, **kwargs) -> None:
        rows.append(Target(*args, **kwargs))

    for shape in ("S1", "S2", "S3"):
        for dt, goal in _both((1.4, 2.5)):
            for method in ("alibi", "kerple", "t5", "cable"):
                case = f"{method}/{shape}/{dt}/fwd/cpu"
                add("forward", f"{method} against SDPA causal without a bias", case, "time sdpa", goal)
                add("bias cost", f"{method} against no bias", case, "cost fastpe none", 1.05, at_most=True)
        for dt, goal in _both((2.5, 4.2)):
            add("forward", "alibi against SDPA with a dense mask", f"alibi/{shape}/{dt}/fwd/cpu", "time mask", goal)
        if shape != "S3":
            for dt, goal in _both((1.6, 2.8)):
                add("forward", "alibi against SDPA with extra channels", f"alibi/{shape}/{dt}/fwd/cpu", "time column", goal)
            for dt, goal in _both((2.0, 5.0)):
                add("forward", "alibi against FlexAttention compiled", f"alibi/{shape}/{dt}/fwd/cpu", "time flex", goal)
        for dt, goal in _both((1.5, 2.2)):
            case = f"cable/{shape}/{dt}/fwd+bwd/cpu"
            add("training", "cable with its gradient against SDPA without a bias", case, "time sdpa", goal)
            add("bias cost", "cable with its gradient against no bias", case, "cost fastpe none", 1.08, at_most=True)
            add("bias cost", "gradient of cable on top of a fixed bias", case, "cost fastpe fixed", 1.05, at_most=True)
            case = f"alibi/{shape}/{dt}/fwd+bwd/cpu"
            add("bias cost", "learned slopes against no bias", case, "cost fastpe none", 1.08, at_most=True)
        if shape != "S3":
            for method in ("kerple", "t5"):
                case = f"{method}/{shape}/fp32/fwd+bwd/cpu"
                add("training", f"learned {method} against the compiled formula", case, "time compiled", 5.0)
    for method, forward, training in (("fire", 8.0, 12.0), ("cope64", 5.0, 4.0), ("cope1024", 5.0, 4.0)):
        add("forward", f"{method} against the compiled formula", f"{method}/S1/fp32/fwd/cpu", "time compiled", forward)
        add("training", f"{method} against the compiled formula", f"{method}/S1/fp32/fwd+bwd/cpu", "time compiled", training)
    for dt, _ in _both((0, 0)):
        add("skipping", "alibi, 16384 tokens, against no bias", f"alibi_skip/S2x4/{dt}/fwd/cpu", "time fastpe none", 2.0)
        case = f"documents/S2/{dt}/fwd/cpu"
        add("documents", "512 in 4096 against FlexAttention with a block mask", case, "time flex", 1.5)
        for method, most in (("self_extend", 1.08), ("dual_chunk", 1.03)):
            case = f"{method}/S2/{dt}/fwd/cpu"
            add("regions", f"{method} against one region", case, "cost fastpe one region", most, at_most=True)
        for every in (51, 64):
            case = f"landmark{every}/S2/{dt}/fwd+bwd/cpu"
            add("landmark", f"blocks of {every} against causal attention", case, "cost fastpe none", 1.3, at_most=True)
    for dt, goal in _both((1.8, 2.0)):
        case = f"decode/D8/{dt}/fwd/cpu"
        add("decode", "against the best of packed SDPA, products, compiled", case, "time packed | bmm | compiled", goal)
        for method in ("rope", "self_extend", "dual_chunk", "cable"):
            case = f"decode_{method}/D8/{dt}/fwd/cpu"
            add("decode", f"{method} in a cache against no positions", case, "cost fastpe none", 1.15, at_most=True)
        case = f"decode_list/L64/{dt}/fwd/cpu"
        add("decode", "4096 of 65536 keys against 4096 in a row", case, "cost fastpe in a row", 1.15, at_most=True)
    for shape in ("S1", "S2", "S3"):
        for dt, _ in _both((0, 0)):
            add("rotation", "in place against the usual formula", f"rotate_inplace/{shape}/{dt}/fwd/cpu", "time eager", 8.0)
            add("rotation", "out of place against the usual formula", f"rotate/{shape}/{dt}/fwd/cpu", "time eager", 5.0)
            add("rotation", "inside attention, against none", f"rope/{shape}/{dt}/fwd/cpu", "cost fastpe none", 1.03, at_most=True)
    for dt, forward, backward in (("fp32", 80.0, 85.0), ("bf16", 75.0, 80.0)):
        add("limit", "alibi, share of the limit, %", f"alibi/S2/{dt}/fwd/cpu", "share", forward)
        add("limit", "alibi, share of the limit, %", f"alibi/S2/{dt}/bwd/cpu", "share", backward)
        for pass_, most in (("fwd", 24.0), ("fwd+bwd", 56.0)):
            case, longer = (f"alibi/{s}/{dt}/{pass_}/cpu" for s in ("S2", "S2x2"))
            add("memory", "alibi, extra memory, MiB", case, "memory", most, at_most=True)
            add("memory", "alibi, 8192 tokens over 4096", longer, f"growth {case}", 2.2, at_most=True)
        for shape, what in (("S2", "8 heads"), ("S2H1", "one head")):
            add("threads", f"two threads against one, {what}", f"threads/{shape}/{dt}/fwd+bwd/cpu", "time one thread", 1.9)
    return rows


def cuda() -> list[Target]:
    """One H100 SXM, bf16; figures of FlashAttention-2 and -3 with 16384 tokens."""
    rows: list[Target] = []

    def add(*args, **kwargs) -> None:
        rows.append(Target(*args, **kwargs))

    for shape, causal, full, training, most in (("G64", 299.0, 324.0, 284.0, 1.06), ("G128", 335.0, 370.0, 328.0, 1.03)):
        add("forward", "no bias, causal, TFLOP/s (FlashAttention-2)", f"none/{shape}/bf16/fwd/cuda", "tflops", causal)
        add("forward", "no bias, every key, TFLOP/s (FlashAttention-2)", f"full/{shape}/bf16/fwd/cuda", "tflops", full)
        add("backward", "no bias, causal, TFLOP/s (FlashAttention-2)", f"none/{shape}/bf16/fwd+bwd/cuda", "tflops", training)
        for method in ("alibi", "cable", "kerple", "t5"):
            case = f"{method}/{shape}/bf16/fwd/cuda"
            add("bias cost", f"{method} against no bias", case, "cost fastpe none", most, at_most=True)
        add("skipping", "alibi against no bias", f"alibi_skip/{shape}/bf16/fwd/cuda", "time fastpe none", 1.0)
        case = f"forget/{shape}/bf16/fwd+bwd/cuda"
        add("training", "forgetting gates against flash-linear-attention", case, "time flash-linear-attention", 1.0)
        for pass_ in ("fwd", "fwd+bwd"):
            add("flex", "alibi against FlexAttention compiled", f"alibi/{shape}/bf16/{pass_}/cuda", "time flex", 1.5)
        case = f"cable/{shape}/bf16/fwd+bwd/cuda"
        add("bias cost", "gradient of cable on top of a fixed bias", case, "cost fastpe fixed", 1.05, at_most=True)
        add("rotation", "inside attention against a separate pass", f"rope/{shape}/bf16/fwd/cuda", "time separate", 1.0)
        case = f"rope/{shape}x4k/bf16/fwd/cuda"
        add("rotation", "inside attention against a separate pass", case, "time separate", 1.15)
    add("forward", "no bias, causal, TFLOP/s (FlashAttention-3)", "none/G64/bf16/fwd/cuda", "tflops", 473.0)
    add("forward", "no bias, causal, TFLOP/s (FlashAttention-3)", "none/G128/bf16/fwd/cuda", "tflops", 616.0)
    return rows


def evaluate(targets: list[Target], cases: dict[str, dict]) -> list[dict]:
    """Each target's value from the measured cases (by name, as in a results file): pass, short, or why there is none."""
    return [{**dataclasses.asdict(t), **_state(t, cases)} for t in targets]


def _state(t: Target, cases: dict[str, dict]) -> dict:
    for name in t.cases:
        if name not in cases:
            return {"value": None, "state": "not measured"}
    rows = {r["candidate"]: r for r in cases[t.case]["rows"]}
    ours = rows.get("fastpe")
    if ours is None or ours["status"] != "ok":
        return {"value": None, "state": f"fastpe: {ours['message'] if ours else cases[t.case].get('message', 'not measured')}"}
    kind, _, rest = t.measure.partition(" ")
    spread = None
    if kind in ("time", "cost"):
        able = [rows[c] for c in rest.split(" | ") if c in rows and rows[c]["status"] == "ok"]
        if not able:
            return {"value": None, "state": f"{rest}: {'; '.join(rows[c]['message'] for c in rest.split(' | ') if c in rows)}"}
        peer = min(able, key=lambda r: r["median_s"])
        value = peer["ratio"] if kind == "time" else 1 / peer["ratio"]
        spread = sorted(x if kind == "time" else 1 / x for x in (peer["ratio_low"], peer["ratio_high"]))
    else:
        if kind == "growth":
            other = next(r for r in cases[rest]["rows"] if r["candidate"] == "fastpe")
            pair = ours.get("peak_mib"), other.get("peak_mib")
            value = pair[0] / pair[1] if all(pair) else None
        else:
            key, factor = {"share": ("share", 100.0), "tflops": ("gflops", 1e-3), "memory": ("peak_mib", 1.0)}[kind]
            value = None if ours.get(key) is None else ours[key] * factor
        if value is None:
            return {"value": None, "state": "not measured"}
    reached = value <= t.goal if t.at_most else value >= t.goal
    return {"value": value, "spread": spread, "state": "pass" if reached else "short"}
