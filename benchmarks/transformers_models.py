"""Tokens per second of transformers models on fastpe, "eager", "sdpa" and "flex_attention": prefill, decode, training step; memory.

    python benchmarks/transformers_models.py                              # about half an hour on one core
    python benchmarks/transformers_models.py --models llama,t5 --modes train
    python benchmarks/transformers_models.py --json benchmarks/results/transformers_models.json

The models have the layers of real ones (1B to 2B, T5 base, Bloom 560M), two of them, and a small vocabulary, so that attention and
feed-forward stand in their usual proportion. One thread, CPU time, candidates in turn in one process; every candidate's logits are
compared with eager's before it is timed. A candidate that cannot run is a row that says why.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import warnings

from timing import interleave, keep_freed_memory, machine, peak_extra_bytes, write_json

keep_freed_memory()

import torch  # noqa: E402
import transformers as T  # noqa: E402

import fastpe.integrations.transformers as hf  # noqa: E402

T.logging.set_verbosity_error()
warnings.filterwarnings("ignore")

_COMMON = dict(vocab_size=1024, num_hidden_layers=2, max_position_embeddings=8192, pad_token_id=0, eos_token_id=None)
_BACKENDS = ("eager", "sdpa", "flex_attention")

# Name -> (class, config, what fastpe is given).
MODELS = {
    "llama": lambda: (
        T.LlamaForCausalLM,
        T.LlamaConfig(**_COMMON, hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, head_dim=64),
        {"rope": "op"},
    ),
    "gemma2": lambda: (
        T.Gemma2ForCausalLM,
        T.Gemma2Config(**_COMMON, hidden_size=2304, intermediate_size=9216, num_attention_heads=8, num_key_value_heads=4, head_dim=256, sliding_window=1024),
        {"rope": "op"},
    ),
    "gpt_oss": lambda: (
        T.GptOssForCausalLM,
        T.GptOssConfig(
            **_COMMON, hidden_size=2880, intermediate_size=720, num_attention_heads=64, num_key_value_heads=8, head_dim=64, sliding_window=128,
            num_local_experts=4, num_experts_per_tok=1,
            rope_parameters={"rope_theta": 150000.0, "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096},
        ),
        {"rope": "op"},
    ),
    "bloom": lambda: (T.BloomForCausalLM, T.BloomConfig(vocab_size=1024, hidden_size=1024, n_layer=2, n_head=16, pad_token_id=0, eos_token_id=None), {}),
    "t5": lambda: (
        T.T5ForConditionalGeneration,
        T.T5Config(
            vocab_size=1024, d_model=768, d_kv=64, d_ff=3072, num_layers=2, num_decoder_layers=2, num_heads=12, dropout_rate=0.0,
            pad_token_id=0, decoder_start_token_id=0, eos_token_id=None,
        ),
        {},
    ),
}  # fmt: skip
MODES = ("prefill", "decode", "train", "memory")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PREFILL, TRAIN = 2048, 1024
RESULTS: list[pathlib.Path] = []  # the results file, if one is asked for


def build(name: str, backend: str, dtype: torch.dtype):
    cls, config, how = MODELS[name]()
    torch.manual_seed(0)
    if backend == "fastpe":
        model = hf.patch(cls._from_config(config, attn_implementation="eager").to(dtype), **how)
    else:
        model = cls._from_config(config, attn_implementation=backend).to(dtype)
        if model.config._attn_implementation != backend:
            raise NotImplementedError(f"{cls.__name__} has no {backend}")
    return model.eval()


def tokens(n: int) -> torch.Tensor:
    return torch.randint(3, 1000, (1, n), generator=torch.Generator().manual_seed(1))


def inputs(name: str, n: int) -> dict:
    return {"input_ids": tokens(n), "decoder_input_ids": tokens(n)} if name == "t5" else {"input_ids": tokens(n)}


def prefill(name: str, model):
    given = inputs(name, PREFILL)

    @torch.no_grad()
    def call():
        return model(**given).logits[:, -1:]

    return call


def decode(name: str, model):
    """The steps that read token PREFILL + 1 and the few after it."""
    with torch.no_grad():
        first = model(**inputs(name, PREFILL), use_cache=True)
    cache = first.past_key_values
    step = {"past_key_values": cache, "use_cache": True}
    if name == "t5":
        hidden = T.modeling_outputs.BaseModelOutput(first.encoder_last_hidden_state)
        step |= {"encoder_outputs": hidden, "decoder_input_ids": tokens(1)}
    else:
        step |= {"input_ids": tokens(1)}

    @torch.no_grad()
    def call():
        return model(**step).logits

    return call


def train(name: str, model, n: int = TRAIN):
    given = {"input_ids": tokens(n), "labels": tokens(n)}

    def call():
        model.zero_grad(set_to_none=True)
        out = model(**given)
        out.loss.backward()
        return out.logits

    return call


def measure(name: str, mode: str, dtype: str, backends: tuple[str, ...]) -> None:
    make = {"prefill": prefill, "decode": decode, "train": train}[mode]
    count = {"prefill": PREFILL, "decode": 1, "train": TRAIN}[mode]
    candidates, why = {}, {}
    want = None
    for backend in (*backends, "fastpe"):
        if backend == "flex_attention" and (mode == "decode" or name == "t5"):
            why[backend] = "not tried: compiled anew for every length of a cache" if mode == "decode" else "its table did not compile on a CPU"
            continue
        try:
            call = make(name, build(name, backend, DTYPES[dtype]))
            got = call().detach().float()
            want = got if want is None else want
            error = ((got - want).abs().max() / want.abs().max()).item()
            if not error <= (1e-3 if dtype == "fp32" else 0.1):
                raise AssertionError(f"logits differ from eager's by {error:.1e}")
            candidates[backend] = call
        except Exception as error:  # noqa: BLE001  what a peer cannot do is a result
            why[backend] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    if "fastpe" not in candidates:
        raise SystemExit(f"transformers_models: {name} {mode} {dtype}: fastpe: {why['fastpe']}")
    times = interleave(candidates, rounds=7 if mode == "decode" else 3)
    over = {b: t.over(times["fastpe"]) for b, t in times.items() if b != "fastpe"}
    row = {"model": name, "mode": mode, "dtype": dtype, "tokens": PREFILL if mode != "train" else TRAIN}
    row |= {"tokens_per_s": {b: count / t.median for b, t in times.items()}, "spread": {b: t.spread for b, t in times.items()}}
    report(row | {"ratio": {b: middle for b, (_, middle, _) in over.items()}, "cannot": why})


def memory(name: str, dtype: str, backends: tuple[str, ...]) -> None:
    """Peak bytes that a training step adds; the gradients are there, as in every step but the first."""
    row = {"model": name, "mode": "memory", "dtype": dtype, "tokens": PREFILL, "extra_mb": {}, "cannot": {}}
    for backend in (*(b for b in backends if b != "flex_attention"), "fastpe"):
        try:
            model = build(name, backend, DTYPES[dtype])
            train(name, model, 64)()
            row["extra_mb"][backend] = peak_extra_bytes(train(name, model, PREFILL)) / 2**20
        except Exception as error:  # noqa: BLE001
            row["cannot"][backend] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    report(row | {"ratio": {b: x / row["extra_mb"]["fastpe"] for b, x in row["extra_mb"].items() if b != "fastpe"}})


def report(row: dict) -> None:
    """Prints the row and puts it into the results file, in the place of an earlier one of the same case."""
    if RESULTS:
        facts = machine()
        row["machine"] = {x: facts[x] for x in ("cpu", "torch", "commit", "date")} | {"isa": facts["fastpe"]["isa"]}
        rows = json.loads(RESULTS[0].read_text())["rows"] if RESULTS[0].exists() else []
        case = ("model", "mode", "dtype")
        rows = [r for r in rows if any(r[x] != row[x] for x in case)] + [row]
        write_json(RESULTS[0], {"machine": facts, "rows": rows})
    shown = row.get("tokens_per_s") or row["extra_mb"]
    text = "  ".join(f"{b} {x:.1f}" for b, x in shown.items())
    ratios = "  ".join(f"{b} {x:.2f}" for b, x in row["ratio"].items())
    print(f"{row['model']:8s} {row['mode']:8s} {row['dtype']}  {text}   times fastpe: {ratios}  {row['cannot'] or ''}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--modes", default=",".join(MODES), help="comma-separated")
    parser.add_argument("--dtypes", default="fp32,bf16", help="comma-separated")
    parser.add_argument("--backends", default=",".join(_BACKENDS), help="comma-separated, beside fastpe")
    parser.add_argument("--json", help="write every row here as it is measured; rows of other cases are kept")
    args = parser.parse_args()
    backends = tuple(args.backends.split(","))
    if args.json:
        RESULTS.append(pathlib.Path(args.json))
    torch.set_num_threads(1)
    hf.register()
    for name in args.models.split(","):
        for mode in args.modes.split(","):
            for dtype in args.dtypes.split(","):
                memory(name, dtype, backends) if mode == "memory" else measure(name, mode, dtype, backends)


if __name__ == "__main__":
    main()
