"""The folder of a run: its name, settings, log, scores and checkpoints.

config.toml  metrics.jsonl  scores.json  report.html  checkpoints/{last,best}/  samples/ classes/ reconstructions/
interpolations/ tensorboard/
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

from glf_fast import files
from glf_fast.distributed import by_main
from glf_fast.errors import UserError
from glf_fast.files import atomic_write, read_json, write_json
from glf_fast.settings import fits, shown
from glf_fast.training import checkpoint, sequence_scoring
from glf_fast.training.config import Config, differences
from glf_fast.training.config_files import load, to_toml, tomllib

__all__ = [
    "append_metrics",
    "check_folder",
    "checkpoint_folder",
    "cut_metrics",
    "default_folder",
    "pick_checkpoint",
    "read_config",
    "read_metrics",
    "read_scores",
    "sweep",
    "write_config",
    "write_scores",
]


# The last line of a config.toml, without which the file was cut off.
_END = "# end of the settings\n"
# The folders of a run that must be its own: a run that somebody else has made could write anywhere through links.
_INSIDE = ("samples", "classes", "reconstructions", "interpolations", "tensorboard")


def _changeable(config: Config) -> set[str]:
    """Settings that may change when a run is resumed, because they affect its length and its files, but not what is learnt."""
    free = {"max_minutes", "checkpoint_minutes", "pictures_every", "score.scores"}
    cosine = any(optimizer.schedule == "cosine" for optimizer in config.optimizers.values())
    return free if cosine else free | {"epochs"}


def default_folder(config: Config, base: Config, label: str) -> Path:
    """runs/{label}, then the settings in which `config` differs from `base`: the same command finds the same folder."""
    changes = {key: new for key, (_, new) in differences(base, config).items() if key not in _changeable(config)}
    parts = [label] + [
        f"{key}={'x'.join(map(str, new)) if isinstance(new, tuple) else new}" for key, new in changes.items()
    ]
    name = re.sub(r"[^\w.=-]+", "-", ",".join(parts))
    if len(name) > 100:
        name = f"{label}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"
    return Path("runs") / name


@by_main
def check_folder(folder: Path, config: Config) -> None:
    """Check that the run's folder is missing, empty, or holds a run with the same settings, and writes nowhere else.

    Raises:
        UserError: the folder holds something else, or another run; the message names the settings that differ. Or a folder in
            it, other than that of the checkpoints, is a link to a place outside. Or a link leads nowhere: a run whose
            checkpoints are on a disk that is not mounted must not start anew.
    """
    _check_links(folder)
    for path in (folder / name for name in _INSIDE):
        _check_is_folder(path)
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{path} is a link to {path.resolve()}, outside of the run's folder; remove the link, so that a folder can be "
                "written there (only checkpoints may be on another disk)"
            )
    for which, sign in (
        ("last", "images"),
        ("best", "score"),
    ):  # a record with the sign: there was a checkpoint, or nearly
        place = checkpoint_folder(folder, which)
        linked = next((path for path in (place, place.parent) if path.is_symlink()), None)
        if linked and not checkpoint.exists(place) and any(record.get(sign) for record in read_metrics(folder)):
            raise UserError(
                f"{linked} is a link to {linked.resolve()}, where there is no checkpoint, but {folder} has been trained; mount "
                "the disk that holds it, or delete metrics.jsonl to start anew"
            )
    if (folder / "config.toml").is_file():
        changed = {k: v for k, v in differences(read_config(folder), config).items() if k not in _changeable(config)}
        if changed:
            listed = "; ".join(f"{key} = {shown(old)}, now {shown(new)}" for key, (old, new) in changed.items())
            raise UserError(
                f"{folder} holds a run with other settings in its config.toml ({listed}); choose another --out, or delete "
                "the folder"
            )
    elif folder.exists() and (not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())):
        raise UserError(f"{folder} is not a run's folder (no config.toml) and is not empty; choose another --out")


def _check_links(folder: Path) -> None:
    """Raise UserError where a link, or something that is no folder, is in the place of a run's checkpoint or lock."""
    lasting = checkpoint_folder(folder, "last"), checkpoint_folder(folder, "best")
    if folder.is_symlink():
        _check_is_folder(folder)
    _check_is_folder(folder / "checkpoints")
    for path in lasting:
        if not checkpoint.exists(path):  # a killed process may have left it under another name
            _check_is_folder(path)
    if (lock := folder / ".lock").is_symlink():
        raise UserError(f"{lock} is a link, through which no lock is taken; delete it")


def _check_is_folder(path: Path) -> None:
    """Raise UserError if there is something other than a folder, or a link to a folder."""
    if path.is_symlink() and not path.is_dir():
        raise UserError(
            f"{path} is a link to {os.readlink(path)}, which is not a folder; mount the disk that holds it, or delete the link"
        )
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is not a folder; move it away")


@by_main
def write_config(folder: Path, config: Config) -> None:
    """Write the settings to the run's config.toml, with their number, by which `read_config` sees whether all are there."""
    text = to_toml(config)
    with atomic_write(folder / "config.toml") as temporary:
        temporary.write_text(f"# {_settings(tomllib.loads(text))} settings\n{text}{_END}", encoding="utf-8")


@by_main
def sweep(folder: Path) -> None:
    """Remove what killed processes left in a run's folder, in its folders of pictures and beside its checkpoints."""
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())):
        files.sweep(place)
    for which in ("last", "best"):
        checkpoint.sweep(checkpoint_folder(folder, which))


def read_config(folder: Path) -> Config:
    """The settings of a run; raises UserError when `folder` is not a run's, or when settings are missing."""
    path = folder / "config.toml"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a run's folder (no config.toml); python -m glf_fast.train creates such folders"
        )
    config = load(path)
    text = path.read_text(encoding="utf-8-sig")
    counted, ended = re.match(r"# (\d{1,9}) settings\n", text), _END in text
    # Version 0.1.0 wrote neither number nor end, and this table last.
    whole = (
        ended and _settings(tomllib.loads(text)) >= int(counted[1]) if counted else not ended and "\n[score]\n" in text
    )
    if not whole:
        raise UserError(
            f"{path} is damaged: settings are missing; restore it from a copy, or train again with another --out"
        )
    return config


def _settings(table: dict[str, Any]) -> int:
    """The number of settings in a table of a TOML file and in the tables within it."""
    return sum(_settings(value) if isinstance(value, dict) else 1 for value in table.values())


def checkpoint_folder(folder: Path, which: str) -> Path:
    """The folder of a run's checkpoint "best" or "last"."""
    return folder / "checkpoints" / which


def pick_checkpoint(folder: Path, which: str) -> str:
    """`which`, or "last", with a line on stderr, if the run was stopped before it had a best checkpoint.

    Raises:
        UserError: a link in the place of a checkpoint leads nowhere.
    """
    _check_links(folder)
    if (
        which == "best"
        and not checkpoint.exists(checkpoint_folder(folder, "best"))
        and checkpoint.exists(checkpoint_folder(folder, "last"))
    ):
        print(f"{folder} has no best checkpoint yet; using the last checkpoint", file=sys.stderr)
        return "last"
    return which


# -- metrics.jsonl --------------------------------------------------------------------------------------------------------


@by_main
def append_metrics(folder: Path, record: dict[str, Any]) -> None:
    """Add one line to the run's log; raises ValueError for NaN."""
    path = folder / "metrics.jsonl"
    with files.errors_name(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of the run's log, oldest first.

    An incomplete last line, left by a killed process, is ignored. Other damaged lines are left out, and named on stderr.
    """
    path = folder / "metrics.jsonl"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    records, damaged = [], []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        if (record := _record(line)) is None:
            damaged.append(number)
        else:
            records.append(record)
    if damaged:
        some = ", ".join(map(str, damaged[:5])) + ", …" * (len(damaged) > 5)
        print(f"{path}: damaged lines are left out ({some})", file=sys.stderr)
    return records


def _record(line: str) -> dict[str, Any] | None:
    """A record of the log, or None if the line is none: all values are numbers, but for a score."""
    try:
        record = json.loads(line)
        score = record.pop("score", None)
        numbers = [record["epoch"], *record.values()]
        if score is not None:
            numbers += [score["value"], 0 if score["reconstructions"] is None else score["reconstructions"]]
            numbers += [] if isinstance(score["metric"], str) else [math.nan]
            record["score"] = score
        whole = type(record["images"]) is int and record["images"] >= 0
        whole = whole and all(fits(number) and math.isfinite(number) for number in numbers)
        return record if whole else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


@by_main
def cut_metrics(folder: Path, images: int) -> None:
    """Remove the records after `images` images from the log, because a resumed run writes them again."""
    kept = [record for record in read_metrics(folder) if record["images"] <= images]
    with atomic_write(folder / "metrics.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


# -- scores.json ----------------------------------------------------------------------------------------------------------


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """The scores of this run's checkpoints; see `scoring.evaluate` for an entry."""
    path = folder / "scores.json"
    scores = read_json(path) if path.is_file() else []
    try:
        for score in scores:
            if "sequences" in score:
                sequence_scoring.check(score)
                continue
            score.setdefault("likelihood", None)  # version 0.1.0 had no model with a likelihood
            for part in filter(None, (score["samples"], score["reconstructions"])):  # nor precision and recall
                part.setdefault("precision", None)
                part.setdefault("recall", None)
            if "mode" not in score["settings"]:  # written by version 0.1.0, which knew one mode
                score["settings"]["mode"] = "authors" if score["settings"].pop("authors_protocol", False) else ""
            _check_score(score)
    except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path} does not hold scores; delete it, and run python -m glf_fast.evaluate {folder} again"
        ) from error
    return scores


def _check_score(score: dict[str, Any]) -> None:
    """Look up whatever `scoring.table` and the report do; raises TypeError or KeyError where something is missing."""
    samples, rebuilt, settings, about = (
        score[part] for part in ("samples", "reconstructions", "settings", "checkpoint")
    )
    numbers = [samples["value"], *samples["floors"].values(), settings["n"], settings["temperature"], settings["seed"]]
    numbers += [
        samples["floors"]["train/test"],
        samples["floors"]["train/train"],
        samples["protocol"]["reference"]["n"],
    ]
    numbers += [about["epoch"], *(samples["interval"] or ()), *([rebuilt["value"]] if rebuilt else ())]
    numbers += [samples["kid"][part] for part in ("mean", "std")] if samples["kid"] else []
    for part in filter(None, (samples, rebuilt)):
        numbers += [] if part["precision"] is None else [part["precision"], part["recall"]]
    for number in score.get("battery", ()):
        numbers += [x for x in (number["value"], number["real"], number["noise"]) if x is not None]
        numbers += [*(number["interval"] or ()), *(x for point in number.get("curve", ()) for x in point)]
        _ = "".join(number[part] for part in ("score", "name", "better", "meaning", "protocol", "note"))
        _ = base64.b64decode(number.get("picture", ""), validate=True)
    if density := score["likelihood"]:
        numbers += [density["value"], *density["interval"]] if density["value"] is not None else []
        _ = density["what"] + density["metric"]
    _ = "".join([*samples["notes"], samples["metric"], settings["mode"], settings["extractor"], about["name"]])
    if not all(isinstance(number, (int, float)) and fits(number) for number in numbers):
        raise TypeError("scores are numbers")


@by_main
def write_scores(folder: Path, scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add scores to scores.json, replacing older scores with the same settings and checkpoint; returns all scores."""

    def key(score: dict[str, Any]) -> str:
        return json.dumps([score["settings"], score["checkpoint"]["name"]], sort_keys=True)

    new = {key(score) for score in scores}
    merged = [score for score in read_scores(folder) if key(score) not in new] + scores
    write_json(folder / "scores.json", merged)
    return merged
