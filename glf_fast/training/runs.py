"""The folder of a run: its name, settings, log, scores and checkpoints.

config.toml  metrics.jsonl  scores.json  report.html  checkpoints/{last,best}/  samples/ reconstructions/ interpolations/
tensorboard/
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from glf_fast.errors import UserError
from glf_fast.files import atomic_write, read_json, write_json
from glf_fast.settings import shown
from glf_fast.training import checkpoint
from glf_fast.training.config import Config, differences
from glf_fast.training.config_files import load, to_toml

__all__ = [
    "append_metrics",
    "check_folder",
    "checkpoint_folder",
    "cut_metrics",
    "default_folder",
    "lock",
    "pick_checkpoint",
    "read_config",
    "read_metrics",
    "read_scores",
    "write_config",
    "write_scores",
]


def _changeable(config: Config) -> set[str]:
    """Settings that may change when a run is resumed, because they affect its length and its files, but not what is learnt."""
    free = {"max_minutes", "checkpoint_minutes", "pictures_every"}
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


def check_folder(folder: Path, config: Config) -> None:
    """Check that the run's folder is missing, empty, or holds a run with the same settings.

    Raises:
        UserError: the folder holds something else, or another run; the message names the settings that differ.
    """
    if (folder / "config.toml").is_file():
        changed = {k: v for k, v in differences(read_config(folder), config).items() if k not in _changeable(config)}
        if changed:
            listed = "; ".join(f"{key} = {shown(old)}, now {shown(new)}" for key, (old, new) in changed.items())
            raise UserError(
                f"{folder} holds a run with other settings ({listed}); choose another --out, or delete the folder"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not a run's folder (no config.toml) and is not empty; choose another --out")


def write_config(folder: Path, config: Config) -> None:
    """Make the run's folder, and write the settings to its config.toml."""
    with atomic_write(folder / "config.toml") as temporary:
        temporary.write_text(to_toml(config), encoding="utf-8")


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock the folder against training by other processes; raises UserError if another process is training in it."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise UserError(
            f"another process is training in {folder}; wait until it ends, or choose another --out"
        ) from None


def read_config(folder: Path) -> Config:
    """The settings of a run; raises UserError when `folder` is not a run's."""
    if not (folder / "config.toml").is_file():
        raise UserError(
            f"{folder} is not a run's folder (no config.toml); python -m glf_fast.train creates such folders"
        )
    return load(folder / "config.toml")


def checkpoint_folder(folder: Path, which: str) -> Path:
    """The folder of a run's checkpoint "best" or "last"."""
    return folder / "checkpoints" / which


def pick_checkpoint(folder: Path, which: str) -> str:
    """`which`, or "last", with a line on stderr, if the run was stopped before it had a best checkpoint."""
    if (
        which == "best"
        and not checkpoint.exists(checkpoint_folder(folder, "best"))
        and checkpoint.exists(checkpoint_folder(folder, "last"))
    ):
        print(f"{folder} has no best checkpoint yet; using the last checkpoint", file=sys.stderr)
        return "last"
    return which


# -- metrics.jsonl --------------------------------------------------------------------------------------------------------


def append_metrics(folder: Path, record: dict[str, Any]) -> None:
    """Add one line to the run's log; raises ValueError for NaN."""
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of the run's log, oldest first; an incomplete last line, left by a killed process, is ignored."""
    path = folder / "metrics.jsonl"
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or not isinstance(record.get("images"), int):
            raise UserError(
                f"{path} is not a run's log (line {len(records) + 1}); restore it from a copy, or delete it"
            )
        records.append(record)
    return records


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
    parts = {"settings", "checkpoint", "samples", "reconstructions"}
    if not isinstance(scores, list) or not all(isinstance(s, dict) and parts <= set(s) for s in scores):
        raise UserError(f"{path} does not hold scores; delete it, and run python -m glf_fast.evaluate {folder} again")
    for score in scores:
        score.setdefault("likelihood", None)  # version 0.1.0 had no model with a likelihood
        if "mode" not in score["settings"]:  # written by version 0.1.0, which knew one mode
            score["settings"]["mode"] = "authors" if score["settings"].pop("authors_protocol", False) else ""
    return scores


def write_scores(folder: Path, scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add scores to scores.json, replacing older scores with the same settings and checkpoint; returns all scores."""

    def key(score: dict[str, Any]) -> str:
        return json.dumps([score["settings"], score["checkpoint"]["name"]], sort_keys=True)

    new = {key(score) for score in scores}
    merged = [score for score in read_scores(folder) if key(score) not in new] + scores
    write_json(folder / "scores.json", merged)
    return merged
