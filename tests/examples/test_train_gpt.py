"""The GPT example, shortened: each encoding, each way to train, and the same numbers from two processes as from one."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

import fastpe

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


def _load():
    spec = importlib.util.spec_from_file_location("train_gpt", EXAMPLES / "train_gpt.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


gpt = _load()
SHORT = [
    "--layers", "2", "--width", "64", "--steps", "4", "--batch", "4", "--length", "32", "--multiples", "1", "2",
    "--held-out", "2048", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> pathlib.Path:
    """English prose that is on every machine: the language reference inside Python's help system."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics)))
    return path


@pytest.fixture
def command(tmp_path, text):
    """main() on a short text -> the results file."""
    pytest.importorskip("tqdm")

    def call(*arguments) -> dict:
        out = tmp_path / "out.json"
        assert gpt.main([*SHORT, "--text", str(text), "--out", str(out), *arguments]) == 0
        return json.loads(out.read_text())

    return call


def losses(results: dict) -> list[float]:
    return results["results"][0]["losses"]


# ---------------------------------------------------------------------------------------------------------------------
# One process


def test_every_encoding_trains_as_through_the_definition(command, monkeypatch):
    fused = command("--encoding", *gpt.ENCODINGS)
    calls = []

    def dense(q, k, v, **kwargs):
        calls.append("rope" if kwargs["rope"] is not None else type(kwargs["bias"]).__name__)
        return fastpe.reference.attention(q, k, v, **kwargs).to(q.dtype)

    monkeypatch.setattr(fastpe, "attention", dense)
    exact = command("--encoding", *gpt.ENCODINGS)
    assert [r["encoding"] for r in fused["results"]] == list(gpt.ENCODINGS)
    biases = {"Alibi", "Kerple", "T5", "Forget", "Cable", "Sandwich", "Fire", "Cope", "KernelCable"}
    assert set(calls) == {"rope", "NoneType", *biases}
    for a, b in zip(fused["results"], exact["results"], strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=5e-4), a["encoding"]
        for n, p in a["perplexity"].items():
            assert p["all"] == pytest.approx(b["perplexity"][n]["all"], rel=2e-3)
        assert a["losses"][-1] < a["losses"][0] and list(a["perplexity"]) == ["32", "64"]
        assert a["tokens_per_s"] > 0 and (a["step_memory_mib"] is None or a["step_memory_mib"] > 0)


def test_parts_and_checkpointing_change_nothing(command):
    whole = losses(command())
    assert losses(command("--part", "1")) == pytest.approx(whole, rel=1e-4)
    assert losses(command("--checkpoint")) == pytest.approx(whole, rel=1e-6)


def test_autocast_and_compile(command):
    whole = losses(command("--layers", "1"))
    assert losses(command("--layers", "1", "--dtype", "bfloat16", "--compile")) == pytest.approx(whole, rel=2e-2)


def test_throughput(command, capsys):
    results = command("--throughput", "--rounds", "2", "--encoding", "none", "cable")["results"]
    assert [r["encoding"] for r in results] == ["none", "cable", "cable, half the length"]
    for r in results:
        assert r["tokens_per_s"] > 0 and r["times"][r["encoding"]] == 1.0 and r["clock"] == "cpu time"
    assert "| encoding | tokens/s | time over none |" in capsys.readouterr().out


def test_sizes_are_those_of_gpt2():
    """Without position table; GPT-2 small has 124.4 million with one of 0.8 million."""
    with torch.device("meta"):
        found = {name: sum(p.numel() for p in gpt.GPT("none", s, gpt.GPT2_VOCABULARY if name != "tiny" else 256).parameters()) for name, s in gpt.CONFIGS.items()}
    assert found["small"] == pytest.approx(123.7e6, rel=2e-3)
    assert found["paper-tiny"] == pytest.approx(44.7e6, rel=2e-2) and found["medium"] == pytest.approx(354e6, rel=2e-2)
    assert 0.5e6 < found["tiny"] < 2e6
    paper = gpt.CONFIGS["medium"]
    assert paper.batch * paper.length == 524288 and paper.lengths[-1] == 15360


def test_learning_rate():
    s = gpt.CONFIGS["small"]
    assert gpt.learning_rate(s, 749) == pytest.approx(6e-4) and gpt.learning_rate(s, 374) == pytest.approx(3e-4)
    assert gpt.learning_rate(s, s.steps) == pytest.approx(6e-5)


def test_tokens_from_a_file(tmp_path):
    tokens = (np.arange(5000) * 7919 % 50257).astype("<u2")
    tokens.tofile(tmp_path / "t.bin")
    file = gpt.TokenFile(tmp_path / "t.bin", longest=64, held_out=512)
    assert len(file.train) + 7 * 64 + 1 == 5000  # a tenth of the file, in whole windows
    assert file.held_out.shape == (7, 65)
    assert file.held_out[0, 0] == int(tokens[len(file.train)]) and file.held_out[-1, -1] == int(tokens[-1])
    assert torch.equal(file.window(3, 5), torch.from_numpy(tokens[3:8].astype("int64")))
    with pytest.raises(gpt.ex.Problem, match="at least 10240 are needed"):
        gpt.TokenFile(tmp_path / "t.bin", longest=1024)


def test_token_file_trains(command, tmp_path):
    (np.arange(20000) % 97).astype("<u2").tofile(tmp_path / "t.bin")
    results = command("--tokens", str(tmp_path / "t.bin"), "--steps", "2", "--batch", "2")
    assert losses(results)[0] == pytest.approx(math.log(gpt.GPT2_VOCABULARY), rel=0.05)


def test_problems_are_named(tmp_path, text, capsys):
    assert gpt.main([*SHORT, "--text", str(tmp_path / "none.txt")]) == 1
    assert "none.txt: No such file" in capsys.readouterr().err
    assert gpt.main([*SHORT, "--text", str(text), "--part", "3"]) == 1
    assert "--batch 4 is not a multiple of 1 process(es) times --part 3" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Two processes


@pytest.mark.parametrize("mode", [["--part", "1"], ["--fsdp", "--checkpoint"]], ids=["ddp", "fsdp2"])
def test_two_processes_train_as_one(command, tmp_path, text, mode):
    one = command("--encoding", "cable", "kerple")
    out = tmp_path / "two.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLES / "train_gpt.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [*launch, *SHORT, "--text", str(text), "--out", str(out), "--encoding", "cable", "kerple", *mode],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads(out.read_text())
    assert two["processes"] == 2
    for a, b in zip(one["results"], two["results"], strict=True):
        assert b["losses"] == pytest.approx(a["losses"], rel=1e-4)
        for n, p in a["perplexity"].items():
            assert b["perplexity"][n]["all"] == pytest.approx(p["all"], rel=1e-3)
