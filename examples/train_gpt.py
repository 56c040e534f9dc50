"""A GPT-2-like language model, trained on text with any position encoding.

    python examples/train_gpt.py --encoding cable                          tiny: some minutes on a CPU
    python examples/train_gpt.py --throughput --threads 1                  time and memory of a step, encoding against encoding
    torchrun --nproc-per-node 8 examples/train_gpt.py --config small --tokens fineweb.bin --dtype bfloat16 --compile
    torchrun --nproc-per-node 8 examples/train_gpt.py --config medium --fsdp --checkpoint --tokens fineweb.bin --dtype bfloat16

Configurations paper-tiny, small and medium are those of Cable (arXiv 2503.08067): 1024 tokens, 524,288 of them per step, AdamW
(0.9, 0.95), weight decay 0.1, learning rate 6e-4 after a warm-up of 750 steps, cosine to a tenth. Text is read as bytes (--text,
by default that of extrapolation.py), or as GPT-2 tokens from a file of little-endian uint16 numbers (--tokens).

Reports tokens per second, the memory a step takes, and the perplexity of held-out text at several lengths; attention is
`fastpe.attention` throughout.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import statistics
import sys
import time

import extrapolation as ex  # first: it decides how threads wait
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpe

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))
from timing import CLOCKS, Samples, peak_extra_bytes  # noqa: E402

Tensor = torch.Tensor

ENCODINGS = (*ex.ENCODINGS, "sandwich", "fire", "cope", "kernel_cable")
GPT2_VOCABULARY = 50304  # 50257, rounded up to a multiple of 128 as GPT-2 trainers do


@dataclasses.dataclass(frozen=True)
class Settings:
    """A model and its training. Names as in extrapolation.py, whose evaluation reads them."""

    layers: int
    heads: int
    width: int
    length: int
    batch: int  # windows per step, over all processes
    steps: int
    learning_rate: float
    warmup: int
    multiples: tuple[float, ...] = (0.5, 1, 2, 4)
    weight_decay: float = 0.1
    dtype: str = "float32"
    seed: int = 0

    @property
    def lengths(self) -> list[int]:
        return [int(self.length * m) for m in self.multiples]


PAPER = {"length": 1024, "batch": 512, "steps": 19000, "learning_rate": 6e-4, "warmup": 750, "multiples": (0.5, 1, 2, 4, 8, 15)}
CONFIGS = {
    "tiny": Settings(4, 4, 128, 256, batch=16, steps=200, learning_rate=3e-3, warmup=20),
    "paper-tiny": Settings(6, 8, 512, **PAPER),
    "small": Settings(12, 12, 768, **PAPER),
    "medium": Settings(24, 16, 1024, **PAPER),
}
OVERRIDES = ("steps", "batch", "length", "warmup", "layers", "heads", "width")  # options of those names


# ---------------------------------------------------------------------------------------------------------------------
# Model


class GPT(ex.Transformer):
    """The transformer of extrapolation.py at GPT-2's sizes, with more encodings and, on request, activations that are
    computed again in the backward pass instead of kept."""

    def __init__(self, encoding: str, s: Settings, vocabulary: int, checkpointed: bool = False):
        super().__init__(encoding, s.width, s.layers, s.heads, vocabulary)
        self.checkpointed = checkpointed

    def _encode(self, encoding: str, width: int, heads: int) -> None:
        if encoding == "sandwich":
            self.bias = fastpe.nn.SandwichBias(heads)
        elif encoding == "fire":
            self.bias = fastpe.nn.FireBias(heads)
        elif encoding == "cope":
            for block in self.blocks:
                block.bias = fastpe.nn.CopeBias(width // heads, 64)
        elif encoding == "kernel_cable":
            for block in self.blocks:
                block.bias = KernelCable(width, heads)
        else:
            super()._encode(encoding, width, heads)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.is_sinusoidal:
            x = x + 0.02 * ex.sinusoids(*x.shape[1:]).to(x)  # at the size of the embeddings
        rope = None if self.rotary is None else self.rotary.rope
        bias = None if self.bias is None else self.bias()
        for block in self.blocks:
            if self.checkpointed and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, bias, use_reentrant=False)
            else:
                x = block(x, rope, bias)
        return F.linear(self.norm(x), self.embedding.weight)


class KernelCable(nn.Module):
    """K-CABLE: increments -softplus(linear(x)), b = -log(1 + (c_i - c_j)^2)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.increment = nn.Linear(width, heads)
        nn.init.normal_(self.increment.weight, 0.0, 0.02)
        nn.init.zeros_(self.increment.bias)

    def forward(self, x: Tensor) -> fastpe.bias.KernelCable:
        with torch.autocast(x.device.type, enabled=False):
            return fastpe.bias.KernelCable(-F.softplus(self.increment(x.float())).transpose(1, 2).contiguous())


def learning_rate(s: Settings, step: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < s.warmup:
        return s.learning_rate * (step + 1) / s.warmup
    done = (step - s.warmup) / max(1, s.steps - s.warmup)
    return s.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


# ---------------------------------------------------------------------------------------------------------------------
# Text


class TokenFile:
    """A file of uint16 tokens, read where it lies: `train` and `held_out` as those of extrapolation.Corpus."""

    def __init__(self, path: pathlib.Path, longest: int, held_out: int = 2**20):
        import numpy as np

        try:
            self.data = np.memmap(path, dtype="<u2", mode="r")
        except (OSError, ValueError) as e:
            raise ex.Problem(f"--tokens {path}: {e}") from None
        blocks = min(held_out, len(self.data) // 10) // longest
        if blocks < 1:
            raise ex.Problem(f"--tokens {path}: {len(self.data)} tokens; at least {10 * longest} are needed")
        self.train = self.data[: len(self.data) - blocks * longest - 1]
        tail = self.data[len(self.train) :].astype(np.int32)
        self.held_out = torch.from_numpy(tail).unfold(0, longest + 1, longest)

    def window(self, start: int, length: int) -> Tensor:
        return torch.from_numpy(self.train[start : start + length].astype("int64"))


def batch(corpus, s: Settings, step: int, p: Processes) -> tuple[Tensor, Tensor]:
    """This process's share of the windows of a step, and what follows each token. The windows are a function of seed and step
    alone: every encoding, and every number of processes, sees the same."""
    g = torch.Generator().manual_seed(s.seed * 1_000_003 + step)
    starts = torch.randint(len(corpus.train) - s.length, (s.batch,), generator=g)
    starts = starts.tensor_split(p.count)[p.rank].tolist()
    window = torch.stack([corpus.window(i, s.length + 1) for i in starts]).to(p.device, non_blocking=True)
    return window[:, :-1], window[:, 1:]


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those torchrun started; alone without it."""

    rank: int
    count: int
    device: str

    @classmethod
    @contextlib.contextmanager
    def join(cls, device: str | None):
        rank, count, local = (int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda":
            torch.cuda.set_device(local)
        started = "RANK" in os.environ
        if started:
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        try:
            yield cls(rank, count, device)
        finally:
            if started:
                dist.destroy_process_group()

    def mean(self, x: Tensor) -> Tensor:
        if self.count > 1:
            dist.all_reduce(x)
            x /= self.count
        return x


def distribute(model: GPT, p: Processes, fsdp: bool) -> nn.Module:
    """DDP, or FSDP2: parameters, gradients and optimiser state cut over the processes, block by block."""
    if p.count == 1:
        return model
    if not fsdp:
        return nn.parallel.DistributedDataParallel(model, device_ids=[torch.cuda.current_device()] if p.device == "cuda" else None)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options = {"mesh": init_device_mesh(p.device, (p.count,)), "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Training


class Trainer:
    """One model and its optimiser; step(i) is one optimiser step over `s.batch` windows, in parts of `part` per process."""

    def __init__(self, encoding: str, corpus, s: Settings, p: Processes, args: argparse.Namespace):
        vocabulary = GPT2_VOCABULARY if args.tokens else 256
        torch.manual_seed(s.seed)
        self.s, self.p, self.corpus = s, p, corpus
        self.model = GPT(encoding, s, vocabulary, args.checkpoint).to(p.device)
        self.parameters = sum(x.numel() for x in self.model.parameters())
        whole = distribute(self.model, p, args.fsdp)
        self.opt = ex.optimiser(self.model, s)
        self.call = torch.compile(whole, dynamic=False) if args.compile else whole
        mine = s.batch // p.count
        self.part = min(args.part or mine, mine)
        if s.batch % p.count or mine % self.part:
            raise ex.Problem(f"--batch {s.batch} is not a multiple of {p.count} process(es) times --part {self.part}")
        self.parts = mine // self.part

    def step(self, i: int) -> float:
        s, p = self.s, self.p
        for group in self.opt.param_groups:
            group["lr"] = learning_rate(s, i)
        self.opt.zero_grad(set_to_none=True)
        tokens, targets = batch(self.corpus, s, i, p)
        total = torch.zeros((), device=p.device)
        for k, (x, y) in enumerate(zip(tokens.split(self.part), targets.split(self.part))):
            # Gradients travel between processes once, with the last part.
            last = k + 1 == self.parts
            wait = contextlib.nullcontext()
            if isinstance(self.call, nn.parallel.DistributedDataParallel) and not last:
                wait = self.call.no_sync()
            with wait:
                loss = ex.byte_losses(self.call, s, x, y).mean() / self.parts
                loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.opt.step()
        return p.mean(total).item()

    def evaluate(self) -> dict[int, dict[str, float]]:
        return ex.evaluate(self.call if self.p.count > 1 else self.model, self.corpus, self.s, windows=1)


def train(encoding: str, corpus, s: Settings, p: Processes, args: argparse.Namespace) -> dict:
    from tqdm import tqdm

    t = Trainer(encoding, corpus, s, p, args)
    losses, memory = [], None
    bar = tqdm(total=s.steps, unit="step", desc=encoding, disable=p.rank > 0, mininterval=0.3 if sys.stderr.isatty() else 20.0)
    with bar:
        losses.append(t.step(0))  # compiles, and forms the optimiser's state
        bar.update(1)
        if s.steps > 1:
            memory = peak_extra_bytes(lambda: losses.append(t.step(1)), p.device)
            bar.update(1)
        start = time.perf_counter()
        for i in range(2, s.steps):
            losses.append(t.step(i))
            bar.update(1)
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
            if not math.isfinite(losses[-1]):
                raise ex.Problem(f"{encoding}: the loss is {losses[-1]} at step {i}")
        taken = time.perf_counter() - start
    return {
        "encoding": encoding,
        "parameters": t.parameters,
        "losses": [round(x, 4) for x in losses],
        "tokens_per_s": round(s.batch * s.length * max(0, s.steps - 2) / taken) if s.steps > 2 else None,
        "step_memory_mib": None if memory is None else round(memory / 2**20, 1),
        "perplexity": {n: {k: round(v, 4) for k, v in x.items()} for n, x in t.evaluate().items()},
    }


def throughput(encodings: list[str], corpus, s: Settings, p: Processes, args: argparse.Namespace) -> list[dict]:
    """Time and memory of a training step: encodings take turns, round by round. Cable also at half the length, as its paper
    sets it beside sinusoids at the whole length, with as many tokens per step."""
    clock = "cuda events" if p.device == "cuda" else "cpu time" if torch.get_num_threads() == 1 else "wall time"
    trainers = {e: Trainer(e, corpus, s, p, args) for e in encodings}
    if "cable" in encodings:
        half = dataclasses.replace(s, length=s.length // 2, batch=2 * s.batch)
        trainers["cable, half the length"] = Trainer("cable", corpus, half, p, args)
    memory, seconds = {}, {name: [] for name in trainers}
    for name, t in trainers.items():
        t.step(0)
        memory[name] = peak_extra_bytes(lambda: t.step(0), p.device)
    for i in range(args.rounds):
        for name, t in trainers.items():
            seconds[name].append(CLOCKS[clock](lambda: t.step(i), 1))
    taken = {name: Samples(tuple(x)) for name, x in seconds.items()}
    found = []
    for name, x in taken.items():
        row = {"encoding": name, "tokens_per_s": s.batch * s.length / x.median, "clock": clock, "spread": x.spread}
        row["step_memory_mib"] = None if memory[name] is None else memory[name] / 2**20
        row["times"] = {other: x.over(taken[other])[1] for other in taken}
        found.append(row)
    return found


def throughput_table(found: list[dict]) -> str:
    base = found[0]
    lines = [f"| encoding | tokens/s | time over {base['encoding']} | memory of a step, MiB | over {base['encoding']} |", "|---|---:|---:|---:|---:|"]
    for r in found:
        m, m0 = r["step_memory_mib"], base["step_memory_mib"]
        memory = ["", ""] if m is None or not m0 else [f"{m:.0f}", f"{100 * (m / m0 - 1):+.1f} %"]
        time_ = f"{100 * (r['times'][base['encoding']] - 1):+.1f} %"
        lines.append(f"| {r['encoding']} | {r['tokens_per_s']:.0f} | {time_} | {' | '.join(memory)} |")
    return "\n".join(lines)


def training_table(found: list[dict], s: Settings) -> str:
    head = ["encoding", "parameters", "tokens/s", "memory of a step, MiB", *(f"perplexity at {n}" for n in s.lengths)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for r in found:
        cells = [r["encoding"], f"{r['parameters']:,}", r["tokens_per_s"], r["step_memory_mib"], *(f"{r['perplexity'][n]['all']:.2f}" for n in s.lengths)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--encoding", nargs="+", choices=ENCODINGS, metavar="NAME", help=f"of {' '.join(ENCODINGS)} (default: cable; with --throughput none sinusoidal rope alibi cable)")
    add("--config", choices=CONFIGS, default="tiny")
    for name in OVERRIDES:
        add(f"--{name}", type=ex._count, help=f"instead of the configuration's {name}")
    add("--part", type=ex._count, help="windows at a time in one process; gradients add up over parts (default: all)")
    add("--multiples", type=float, nargs="+", help="lengths to evaluate at, in units of the trained length")
    add("--text", type=pathlib.Path, metavar="FILE", help="text, read as bytes (default: the documentation of Django 5.2)")
    add("--tokens", type=pathlib.Path, metavar="FILE", help="GPT-2 tokens as little-endian uint16")
    add("--held-out", type=ex._count, default=2**16, help="bytes of the text to evaluate on (default 65536)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    add("--compile", action="store_true", help="torch.compile")
    add("--checkpoint", action="store_true", help="compute activations again in the backward pass instead of keeping them")
    add("--fsdp", action="store_true", help="under torchrun: FSDP2 instead of DDP")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    add("--threads", type=ex._count, help="CPU threads")
    add("--throughput", action="store_true", help="compare time and memory of a step between encodings, train nothing")
    add("--rounds", type=ex._count, default=7, help="of --throughput")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, metavar="FILE", help="results as JSON")
    return p.parse_args(argv)


def run(args: argparse.Namespace) -> list[dict]:
    if args.threads:
        torch.set_num_threads(args.threads)
    changed = {k: v for k in OVERRIDES if (v := getattr(args, k)) is not None}
    if args.multiples:
        changed["multiples"] = tuple(args.multiples)
    s = dataclasses.replace(CONFIGS[args.config], dtype=args.dtype, seed=args.seed, **changed)
    with Processes.join(args.device) as p:
        if args.tokens:
            corpus = TokenFile(args.tokens, max(s.lengths))
        else:
            try:
                text = ex.fetch_text() if args.text is None else args.text.read_bytes()
            except OSError as e:
                raise ex.Problem(f"--text {args.text}: {e.strerror}") from None
            corpus = ex.split(text, max(s.lengths), args.held_out)
        if args.throughput:
            found = throughput(args.encoding or ["none", "sinusoidal", "rope", "alibi", "cable"], corpus, s, p, args)
            table = throughput_table(found)
        else:
            found = [train(e, corpus, s, p, args) for e in args.encoding or ["cable"]]
            table = training_table(found, s)
        if p.rank == 0:
            print(table)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                facts = {"processes": p.count, "device": p.device, "threads": torch.get_num_threads(), "versions": fastpe.info()}
                settings = dataclasses.asdict(s) | {"compile": args.compile, "checkpoint": args.checkpoint, "fsdp": args.fsdp}
                args.out.write_text(json.dumps({"settings": settings, **facts, "results": found}, indent=1) + "\n")
    return found


def main(argv: list[str] | None = None) -> int:
    try:
        run(parse(argv))
    except ex.Problem as e:
        print(f"train_gpt: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
