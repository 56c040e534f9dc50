"""Long context without retraining: one small model, trained at one length, read at up to 16 times that.

A two-layer transformer with rotary embedding learns to find planted keys: pairs of a key and its value stand somewhere in a
haystack, and at the end the keys are asked for. Beyond the trained length plain RoPE loses them. The same weights are then
read with Self-Extend, dual chunk attention, STRING and ReRoPE, each of which is one object: `fastpe.attention(..., region=...)`.

    python examples/long_context.py --quick      one model and fewer lengths: under a minute on two cores
    python examples/long_context.py              three models: a few minutes

Results (JSON and picture) are in the results folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pathlib
import sys

# Threads that spin while they wait for each other make this small model several times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import fastpe  # noqa: E402

Tensor = torch.Tensor

FILLERS, KEYS, VALUES = 32, 32, 32


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the numbers."""

    models: int = 3  # trained from seeds 0, 1, ...; results are their mean
    steps: int = 900
    batch: int = 32
    length: int = 64
    multiples: tuple[float, ...] = (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16)
    pairs: int = 4
    tests: int = 64  # sequences of every length
    width: int = 64
    heads: int = 2
    learning_rate: float = 3e-3

    @property
    def lengths(self) -> list[int]:
        return [int(self.length * m) for m in self.multiples]

    @property
    def base(self) -> float:
        """The slowest pair of channels turns as far within the trained length as in a model of base 10000 and 4096 tokens."""
        return 10000 * self.length / 4096


def regions(s: Settings) -> dict[str, fastpe.region.Region | None]:
    """The ways to read the model, with settings near those of their papers for a trained length."""
    length = s.length
    return {
        "RoPE": None,
        "Self-Extend": fastpe.region.self_extend(window=length // 4, group=32),
        "DCA": fastpe.region.dual_chunk(3 * length // 4, length // 8),
        "STRING": fastpe.region.string(length // 3, window=length // 32),
        "ReRoPE": fastpe.region.rerope(length // 2, train_length=length),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The task


def haystack(s: Settings, length: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` sequences: fillers with `pairs` pairs (key, value) among them, then the pairs again in another order."""

    def shuffled(n: int, k: int) -> Tensor:
        return torch.rand(count, n, generator=generator).argsort(-1)[:, :k]

    tokens = torch.randint(FILLERS, (count, length), generator=generator)
    keys = FILLERS + shuffled(KEYS, s.pairs)
    values = FILLERS + KEYS + torch.randint(VALUES, (count, s.pairs), generator=generator)
    places = 2 * shuffled((length - 2 * s.pairs) // 2, s.pairs)
    order = shuffled(s.pairs, s.pairs)
    asked = torch.arange(length - 2 * s.pairs, length, 2).expand(count, -1)
    for at, k, v in ((places, keys, values), (asked, keys.gather(1, order), values.gather(1, order))):
        tokens.scatter_(1, at, k).scatter_(1, at + 1, v)
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# The model


class Block(nn.Module):
    def __init__(self, s: Settings):
        super().__init__()
        self.heads = s.heads
        self.norm, self.norm2 = nn.RMSNorm(s.width), nn.RMSNorm(s.width)
        self.qkv, self.out = nn.Linear(s.width, 3 * s.width, bias=False), nn.Linear(s.width, s.width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(s.width, 2 * s.width), nn.GELU(), nn.Linear(2 * s.width, s.width))
        self.rope = fastpe.rope.default(s.width // s.heads, base=s.base)

    def forward(self, x: Tensor, region: fastpe.region.Region | None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = fastpe.attention(q, k, v, rope=self.rope, region=region, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self, s: Settings, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        vocabulary = FILLERS + KEYS + VALUES
        # A token knows the one before it, as with the short convolutions of recent models: a value can be found by its key.
        self.embed, self.before = nn.Embedding(vocabulary, s.width), nn.Embedding(vocabulary, s.width)
        self.blocks = nn.ModuleList(Block(s) for _ in range(2))
        self.norm, self.head = nn.RMSNorm(s.width), nn.Linear(s.width, vocabulary, bias=False)

    def forward(self, tokens: Tensor, region: fastpe.region.Region | None = None, last: int = 0) -> Tensor:
        """Logits of all tokens, or of the last ones."""
        x = self.embed(tokens) + F.pad(self.before(tokens[:, :-1]), (0, 0, 1, 0))
        for block in self.blocks:
            x = block(x, region)
        return self.head(self.norm(x[:, -last:]))


def answers(model: Model, s: Settings, tokens: Tensor, region=None) -> tuple[Tensor, Tensor]:
    """Logits after every asked key, and the values that should follow."""
    logits = model(tokens, region, last=2 * s.pairs)[:, ::2]
    return logits, tokens[:, -2 * s.pairs :][:, 1::2]


def practice(s: Settings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences for training, and which tokens are values of a key that has occurred before: half of them haystacks, half with
    the same pairs again and again between fillers, which have more to learn from."""
    slots, count = s.length // 2, s.batch // 2
    keys = torch.rand(count, KEYS, generator=generator).argsort(-1)[:, : s.pairs]
    values = torch.randint(VALUES, (count, s.pairs), generator=generator)
    which = torch.randint(s.pairs, (count, slots), generator=generator)
    planted = torch.rand(count, slots, generator=generator) < torch.rand(count, 1, generator=generator) * 0.8 + 0.2
    pair = torch.stack((FILLERS + keys.gather(1, which), FILLERS + KEYS + values.gather(1, which)), -1)
    filler = torch.randint(FILLERS, (count, slots, 2), generator=generator)
    tokens = torch.where(planted[..., None], pair, filler).flatten(1)
    seen = F.one_hot(which, s.pairs) * planted[..., None]
    again = planted & ((seen.cumsum(1) - seen).gather(-1, which[..., None])[..., 0] > 0)
    again = torch.stack((torch.zeros_like(again), again), -1).flatten(1)
    at_the_end = torch.zeros(s.batch - count, s.length, dtype=torch.bool)
    at_the_end[:, -2 * s.pairs + 1 :: 2] = True
    return torch.cat((tokens, haystack(s, s.length, s.batch - count, generator))), torch.cat((again, at_the_end))


def train(s: Settings, seed: int = 0, log=print) -> Model:
    model, generator = Model(s, seed), torch.Generator().manual_seed(seed)
    opt = torch.optim.AdamW(model.parameters(), s.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(s.steps):
        warm, cool = min(1.0, (step + 1) / 100), 0.5 * (1 + math.cos(math.pi * step / s.steps))
        opt.param_groups[0]["lr"] = s.learning_rate * warm * max(cool, 0.02)
        tokens, asked = practice(s, generator)
        logits, want = model(tokens)[:, :-1][asked[:, 1:]], tokens[asked]
        loss = F.cross_entropy(logits, want)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if log and (step % max(1, s.steps // 6) == 0 or step == s.steps - 1):
            found = (logits.argmax(-1) == want).float().mean()
            log(f"model {seed}  step {step:4d}  loss {loss.item():.3f}  found {100 * found.item():3.0f} %", flush=True)
    return model


@torch.no_grad()
def evaluate(model: Model, s: Settings) -> dict[str, list[float]]:
    """Share of the planted keys whose value is found, by way of reading, at every length."""
    found: dict[str, list[float]] = {name: [] for name in regions(s)}
    for length in s.lengths:
        tokens = haystack(s, length, s.tests, torch.Generator().manual_seed(1000 + length))
        for name, region in regions(s).items():
            logits, want = answers(model, s, tokens, region)
            found[name].append(round(float((logits.argmax(-1) == want).float().mean()), 4))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Table and picture


def mean(results: dict) -> dict[str, list[float]]:
    """By way of reading, the mean over the models at every length."""
    return {name: [sum(x) / len(x) for x in zip(*runs)] for name, runs in results["found"].items()}


def table(results: dict) -> str:
    """Markdown: percent found at each length."""
    rows = [["read with", *map(str, results["lengths"])], ["---", *["---:"] * len(results["lengths"])]]
    rows += [[name, *(f"{100 * x:.0f}" for x in y)] for name, y in mean(results).items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


STYLE = {  # colour, marker; colours keep apart for colour-blind readers
    "RoPE": ("#d55e00", "s"),
    "Self-Extend": ("#0072b2", "o"),
    "DCA": ("#009e73", "^"),
    "STRING": ("#e69f00", "D"),
    "ReRoPE": ("#cc79a7", "v"),
}


def draw(results: dict, path: pathlib.Path) -> None:
    """The picture: share of planted keys found against length; bands span the models."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    trained, lengths = results["settings"]["length"], results["lengths"]
    figure = Figure(figsize=(8.0, 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, y in mean(results).items():
        colour, marker = STYLE[name]
        runs = list(zip(*results["found"][name]))
        low, high = ([100 * of(x) for x in runs] for of in (min, max))
        axes.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(lengths, [100 * x for x in y], color=colour, marker=marker, markersize=5, linewidth=1.8, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylim(0, 103)
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.axvline(trained, color="#999999", linewidth=1, linestyle=":")
    axes.set_xlabel(f"tokens read (trained at {trained})")
    axes.set_ylabel("planted keys found, %")
    axes.set_title("The same weights, five ways to place far keys", fontsize=11)
    axes.legend(fontsize=9, loc="center left")
    figure.savefig(path, format="png")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def run(s: Settings, out: pathlib.Path, log=print) -> dict:
    found: dict[str, list[list[float]]] = {name: [] for name in regions(s)}
    for seed in range(s.models):
        for name, y in evaluate(train(s, seed, log), s).items():
            found[name].append(y)
    results = {
        "settings": dataclasses.asdict(s), "regions": {name: repr(r) for name, r in regions(s).items()}, "lengths": s.lengths, "found": found,
        "fastpe": fastpe.__version__, "torch": torch.__version__,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, out / "long_context.png")
    return results


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="one model, fewer steps and lengths")
    p.add_argument("--steps", type=int, help="training steps (default: 900, quick: 500)")
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results", "long_context"), metavar="DIR", help="results folder")
    p.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    args = p.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        import matplotlib  # noqa: F401  missing should show now, not after the training
    except ImportError:
        print("long_context: matplotlib is needed as well: python -m pip install matplotlib", file=sys.stderr)
        return 1
    s = Settings(models=1, steps=500, multiples=(1, 2, 4, 8, 16)) if args.quick else Settings()
    s = dataclasses.replace(s, **({"steps": args.steps} if args.steps else {}))
    results = run(s, args.out)
    print(f"\nPercent of planted keys found, trained at {s.length} tokens:\n\n{table(results)}\n\n{args.out / 'results.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
