"""Random command lines, TOML files and environments: exit status 0, or one line that says what is wrong."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glf_fast import evaluate, sample, train
from glf_fast.data import __main__ as data
from glf_fast.metrics import __main__ as metrics
from tests.faults.children import Ended
from tests.faults.judging import environment, judge, outcomes, run
from tests.faults.verdicts import Outcome, Verdict

# -- values ---------------------------------------------------------------------------------------------------------------

NUMBERS = (
    "0", "1", "2", "3", "8", "16", "-1", "-0", "0.5", "1e-400", "1e400", "nan", "inf", "-inf", "NaN", "1_000", "0x10",
    "1e3", "٣", "½", "9223372036854775807", "9223372036854775808", "-9223372036854775809", "9" * 40, "1e308",
    "5e-324", "1.0", "+4", "1,2", "[8,8]",
)  # fmt: skip
WORDS = (
    "", " ", "x", "None", "null", "true", "false", "True", "relu", "tiny", "exp", "glow", "jet", "bf16", "cosine",
    "cpu", "cuda", "cuda:1", "cpu:99", "meta", "mps", "vulkan", "rnvp", "vae", "glf", "digits", "digits:test",
    "data.npy", "no/such/path", ".", "~nosuchuser/x", "/dev/null", "run", "a b", "é", "\N{GRINNING FACE}",
    "\u202egnp", "\x1b[31m", "new\nline", "\udcff", "%s", "{}", "$HOME", "-", "--", "-1", "--n", "=", "x" * 300,
    "x" * 1200, "{None}", "error: x", "l'été", "@x",
)  # fmt: skip
SETTINGS = (
    "--epochs", "--batch-size", "--seed", "--precision", "--ema", "--max-minutes", "--checkpoint-minutes",
    "--pictures-every", "--data.source", "--data.image-size", "--data.skip-unusable", "--model.name",
    "--model.latent-dim", "--model.width", "--model.hidden", "--model.reconstruction", "--model.beta",
    "--model.stop-gradient", "--model.latent-noise", "--flow.kind", "--flow.hidden", "--flow.steps",
    "--flow.activation", "--flow.log-scale", "--flow.log-scale-constant", "--flow.add-first", "--flow.linear",
    "--flow.actnorm", "--flow.blocks", "--flow.clamp", "--flow.seed", "--optimizer.lr", "--optimizer.betas",
    "--optimizer.eps", "--optimizer.schedule", "--optimizer.decay-every", "--optimizer.clip", "--flow-optimizer.lr",
    "--autoencoder-optimizer.warmup-steps", "--score.extractors", "--score.samples", "--score.every", "--preset",
    "--config", "--device", "--data-dir", "--out", "--no-flow.actnorm", "--no-model.stop-gradient",
)  # fmt: skip
DRAWS = ("--n", "--out", "--temperature", "--towards", "--mode", "--seed", "--checkpoint", "--data-dir", "--device")
SCORES = (
    "--checkpoint",
    "--extractor",
    "--n",
    "--temperature",
    "--seed",
    "--mode",
    "--other-data",
    "--data-dir",
    "--device",
)
DISTANCES = ("--extractor", "--n", "--weights", "--device", "--image-size", "--skip-unusable", "--json", "--out")
DATA = ("--data-dir", "--image-size", "--skip-unusable")


def _value(chance: random.Random) -> str:
    return chance.choice(NUMBERS if chance.random() < 0.6 else WORDS)


def _misspelled(option: str, chance: random.Random) -> str:
    at = chance.randrange(2, len(option))
    return chance.choice(
        (
            option[:at] + option[at + 1 :],
            option[:at] + "x" + option[at:],
            option.upper(),
            option.replace("-", "_"),
            option[1:],
        )
    )


def _options(names: Sequence[str], chance: random.Random, most: int = 3) -> list[str]:
    """Options with values of all kinds; some are misspelled, without a value, or with several."""
    words: list[str] = []
    for _ in range(chance.randrange(most + 1)):
        name = chance.choice(names)
        if chance.random() < 0.1:
            name = _misspelled(name, chance)
        values = [_value(chance) for _ in range(chance.choice((0, 1, 1, 1, 1, 1, 2, 3)))]
        words += [f"{name}={values[0]}"] if values and chance.random() < 0.3 else [name, *values]
    return words


# -- TOML -----------------------------------------------------------------------------------------------------------------

KEYS = (
    "epochs", "batch_size", "seed", "precision", "ema", "data", "data.source", "model", "model.name",
    "model.latent_dim", "flow", "flow.hidden", "flow.steps", "flow.kind", "flow.activation", "optimizer",
    "optimizer.lr", "optimizer.betas", "score.extractors", "score.samples", "flow_optimizer.lr", "epoch",
    "floww.steps", '""', '"a.b"', "'\u202e'", '"new\\nline"', "optimizers", "RULES",
)  # fmt: skip
VALUES = (
    "1", "-1", "0", "1.5", "nan", "inf", "-inf", "1e400", "9" * 40, "true", '"x"', '""', "[]", "[1]", "[1, 2]",
    "[0.9, 0.999]", '["tiny"]', "[[1]]", "{}", "{a = 1}", '{name = "vae"}', "1979-05-27", "07:32:00",
    "1979-05-27T07:32:00Z", '"digits"', '"rnvp"', "0x10", "1_0", '"\\u0000"', '"\\u202e"', "'''a\nb'''", '"\\ud800"',
    "[1, 'a']", "[" * 3000, "{a = " * 3000, "0b1", "é", '"\N{GRINNING FACE}"', "'data.npy'",
)  # fmt: skip


def toml(chance: random.Random) -> bytes:
    """A file of settings, whole, wrong or no TOML."""
    lines = []
    for _ in range(chance.randrange(5)):
        key, value = chance.choice(KEYS), chance.choice(VALUES)
        lines.append(
            chance.choice((f"{key} = {value}", f"[{key}]", f"[[{key}]]", f"{key} = {value}", f"{key}.{key} = {value}"))
        )
    content = chance.choice(("\n", "\r\n", "\r")).join(lines).encode()
    match chance.randrange(12):
        case 0:
            content = b"\xef\xbb\xbf" + content
        case 1:
            content = content[: chance.randrange(len(content) + 1)]
        case 2:
            content += chance.choice(
                (b"\xff\xfe", b"\0", b"\x1b[31m = 1", b"a." * 20_000 + b"b = 1", b"\n" * 10_000, b"[a]\n" * 2)
            )
        case 3:
            content = content.decode().encode("utf-16")
        case 4:
            content = chance.randbytes(50)
    return content


# -- commands -------------------------------------------------------------------------------------------------------------

Case = tuple[Any, list[str]]


def _print_config(place: Path, chance: random.Random) -> Case:
    return train, [*_preset(chance), *_options(SETTINGS, chance), "--print-config"]


def _dry_run(place: Path, chance: random.Random) -> Case:
    small = ["--preset", "smoke", "--data.source", "data.npy", "--batch-size", "8", "--device", "cpu"]
    return train, [*small, *_options(SETTINGS, chance, 2), "--dry-run"]


def _toml(place: Path, chance: random.Random) -> Case:
    (place / "my.toml").write_bytes(toml(chance))
    return train, [*_preset(chance), "--config", "my.toml", *_options(SETTINGS, chance, 1), "--print-config"]


def _sample(place: Path, chance: random.Random) -> Case:
    words = _options(DRAWS, chance)
    return sample, [*_run(chance), *([] if "--n" in " ".join(words) else ["--n", "3"]), *words]


def _evaluate(place: Path, chance: random.Random) -> Case:
    words = _options(SCORES, chance)
    return evaluate, [*_run(chance), *([] if "--extractor" in " ".join(words) else ["--extractor", "tiny"]), *words]


def _metrics(place: Path, chance: random.Random) -> Case:
    operands = [
        chance.choice(("data.npy", "data.npy", "digits:test", _value(chance)))
        for _ in range(chance.choice((1, 2, 2, 2, 3)))
    ]
    words = _options(DISTANCES, chance)
    tiny = [] if "--extractor" in " ".join(words) else ["--extractor", "tiny"]
    return metrics, [chance.choice(("calc", "calc", "ref", _value(chance))), *operands, *tiny, *words]


def _data(place: Path, chance: random.Random) -> Case:
    return data, [
        chance.choice(("info", "info", "list", _value(chance))),
        *[_value(chance)] * chance.choice((0, 1, 1, 1)),
        *_options(DATA, chance, 2),
    ]


def _preset(chance: random.Random) -> list[str]:
    return chance.choice(
        ([], ["--preset", "smoke"], ["--preset", chance.choice(("mnist", "vae-mnist", "fashion-mnist-rnvp", "smok"))])
    )


def _run(chance: random.Random) -> list[str]:
    return ["run"] if chance.random() < 0.9 else [_value(chance)] * chance.randrange(3)


COMMANDS: tuple[Callable[[Path, random.Random], Case], ...] = (
    _print_config, _print_config, _dry_run, _toml, _toml, _sample, _evaluate, _metrics, _data,
)  # fmt: skip

# -- environments ---------------------------------------------------------------------------------------------------------

# What a command may find around it: changes of the environment (None: unset), and what is done to the streams.
AROUND: tuple[tuple[dict[str, str | None], str], ...] = (
    ({"COLUMNS": "1"}, ""), ({"COLUMNS": "-3"}, ""), ({"COLUMNS": "x"}, ""), ({"COLUMNS": "9" * 30}, ""),
    ({"HOME": None}, ""), ({"HOME": "/nowhere"}, ""), ({"GLF_FAST_CACHE": "/dev/null/x"}, ""),
    ({"GLF_FAST_CACHE": "~nosuchuser/x"}, ""), ({"GLF_FAST_CACHE": "data.npy"}, ""),
    ({"GLF_FAST_CACHE": "\udcff"}, ""), ({"GLF_FAST_CACHE": ""}, ""), ({"TMPDIR": "/nowhere"}, ""),
    ({"XDG_CACHE_HOME": "relative", "GLF_FAST_CACHE": None}, ""), ({"GLF_FAST_VGG16": "data.npy"}, ""),
    ({"NO_COLOR": "1"}, ""), ({"GLF_FAST_INCEPTION": "/nowhere"}, ""), ({"FORCE_COLOR": "1"}, ""),
    ({"TERM": "dumb"}, ""), ({}, "stdout closed"), ({}, "stderr closed"), ({}, "stdout full"), ({}, "stderr full"),
    ({}, "stdout ascii"), ({}, "stdout latin-1"), ({}, "reader gone"),
)  # fmt: skip


def _change(changes: dict[str, str | None], streams: str) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    stream, _, what = streams.partition(" ")
    if what == "closed":
        os.close({"stdout": 1, "stderr": 2}[stream])
        setattr(sys, stream, None)
    elif what == "full":
        number = {"stdout": 1, "stderr": 2}[stream]
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)
    elif what in ("ascii", "latin-1"):
        sys.stdout.reconfigure(encoding=what)  # type: ignore[union-attr]
        sys.stderr.reconfigure(encoding=what)  # type: ignore[union-attr]
    elif what == "gone":
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)


def _judge_around(ended: Ended, streams: str) -> tuple[Verdict, str]:
    """The verdict, where a stream that takes nothing may cost what would be written to it, and the exit status."""
    quiet = {"stdout full": (0, 2, 120), "reader gone": (0, 2, 120, 141)}
    if streams in quiet and ended.status in quiet[streams] and not ended.hung and "Traceback" not in ended.err:
        return Verdict.SURVIVED if ended.status == 0 else Verdict.REFUSED, ""
    if streams in ("stderr closed", "stderr full") and ended.status == 2 and not ended.hung:
        return Verdict.REFUSED, ""
    return judge(ended)


# Read when the package is imported, so that these need processes of their own: variable, value, and what must be said of it.
AT_IMPORT = (
    ("GLF_FAST_BACKEND", "cdua"), ("GLF_FAST_BACKEND", "cuda"), ("GLF_FAST_BACKEND", "triton"),
    ("GLF_FAST_BACKEND", "new\nline\x1b[31m"), ("GLF_FAST_BACKEND", ""), ("GLF_FAST_BACKEND", "reference"),
    ("GLF_FAST_ISA", "mmx"), ("GLF_FAST_ISA", "generic"), ("PYTHONIOENCODING", "ascii"),
    ("PYTHONIOENCODING", "utf-16"), ("PYTHONUTF8", "0"), ("LC_ALL", "C"), ("PYTHONWARNINGS", "error"),
    ("PYTHONOPTIMIZE", "2"), ("OMP_NUM_THREADS", "0"), ("TRITON_INTERPRET", "x"),
)  # fmt: skip


def _process(place: Path, chance: random.Random) -> tuple[str, Verdict, str]:
    variable, value = chance.choice(AT_IMPORT)
    words = chance.choice(
        (["data", "info", "data.npy"], ["train", "--preset", "smoke", "--print-config"], ["data", "list"])
    )
    done = subprocess.run(
        [sys.executable, "-m", f"glf_fast.{words[0]}", *words[1:]],
        cwd=place,
        env={**os.environ, **environment(place), "PYTHONPATH": os.pathsep.join(sys.path), variable: value},
        capture_output=True,
        timeout=120,
    )
    texts = [
        text.decode("utf-16" if value == "utf-16" and text else "utf-8", "replace")
        for text in (done.stdout, done.stderr)
    ]
    return f"process with {variable}", *judge(Ended(done.returncode, *texts, 0.0))


# -- the campaign ---------------------------------------------------------------------------------------------------------


def prepare(place: Path) -> None:
    """Write a run and an array, on which the commands work."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "cache").mkdir(exist_ok=True)
    np.save(place / "data.npy", np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8))
    options = (
        "--preset",
        "smoke",
        "--data.source",
        "data.npy",
        "--batch-size",
        "16",
        "--epochs",
        "1",
        "--score.samples",
        "8",
    )
    ended = run(train, *options, "--out", "run", "--device", "cpu", place=place)
    assert ended.status == 0, ended.err


def campaign(seed: int, count: int, folder: Path) -> Iterator[Outcome]:
    """Run `count` random commands; a fifth of them in an odd environment."""
    whole, place = folder / "whole", folder / "commands"
    prepare(whole)

    def one(number: int) -> tuple[str, Verdict, str]:
        chance = random.Random(f"{seed} {number}")
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole, place)
        if chance.random() < 0.005:
            return _process(place, chance)
        make = chance.choice(COMMANDS)
        module, words = make(place, chance)
        changes, streams = chance.choice(AROUND) if chance.random() < 0.2 else ({}, "")
        ended = run(module, *words, place=place, before=lambda: _change(changes, streams))
        verdict, detail = _judge_around(ended, streams)
        row = make.__name__.removeprefix("_").replace("_", "-")
        where = f"{words!r} {changes or ''} {streams}: {detail}" if detail else ""
        return f"{row}{', odd environment' * bool(changes or streams)}", verdict, where[:4000]

    yield from outcomes("command line", count, seed, one)
