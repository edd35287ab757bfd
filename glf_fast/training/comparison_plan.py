"""The plan of a comparison: its rows, the settings that they share, and the folders of their runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from glf_fast.data import Kind, expected_kind
from glf_fast.distributed import by_main
from glf_fast.errors import UserError, did_you_mean
from glf_fast.settings import shown
from glf_fast.training import runs
from glf_fast.training.config import Config, check, differences
from glf_fast.training.config_files import load

__all__ = ["Plan", "row_file", "rows", "shared_files", "sizes"]

_FOLDER = Path(__file__).parent.parent / "presets" / "compare"
# Settings in which the runs of one comparison may differ, because they do not affect what is learnt, or differ on purpose.
_FREE = {"seed", "max_minutes", "checkpoint_minutes", "pictures_every", "score.scores"}


def rows(kind: Kind = "images") -> tuple[str, ...]:
    """Names of the rows for a kind of data: first those in order.txt, in its order, then the others by name."""
    folder = _folder(kind)
    order = (folder / "order.txt").read_text(encoding="utf-8").split()
    names = sorted(path.stem for path in folder.glob("*.toml"))
    return tuple(sorted(names, key=lambda name: order.index(name) if name in order else len(order)))


def sizes(kind: Kind = "images") -> tuple[str, ...]:
    """Names of the sizes of a comparison: files of shared settings. {size}-{data}.toml changes a size for one data set."""
    return tuple(sorted(path.stem for path in (_folder(kind) / "shared").glob("*.toml") if "-" not in path.stem))


def row_file(row: str, kind: Kind = "images") -> Path:
    """The file with the settings of a row; raises UserError, with the nearest name, if the row does not exist."""
    known = rows(kind)
    if row not in known:
        raise UserError(f"no row {row!r} to compare; {did_you_mean(row, known)}the rows are {', '.join(known)}")
    return _folder(kind) / f"{row}.toml"


def shared_files(size: str, data: str) -> list[Path]:
    """The files with the settings that all rows share; raises UserError, with the nearest name, for an unknown size."""
    kind = expected_kind(data)
    if size not in sizes(kind):
        raise UserError(f"no size {size!r}; {did_you_mean(size, sizes(kind))}the sizes are {', '.join(sizes(kind))}")
    candidates = (_folder(kind) / "shared" / f"{name}.toml" for name in (size, f"{size}-{Path(data).name}"))
    return [path for path in candidates if path.is_file()]


def _folder(kind: Kind) -> Path:
    """The folder with the rows for a kind of data; images have theirs in the folder of all."""
    return _FOLDER / "sequences" if kind == "tokens" else _FOLDER


@dataclass(frozen=True)
class Plan:
    """The plan of a comparison.

    Attributes:
        rows: names of the rows to train.    data: name or path of the data set.    size: one of `sizes()`.
        epochs: passes over the training data; None for the number of the size.
        seeds: each row is trained with the seeds 0 … seeds − 1.
        out: folder of the comparison; None for a folder in comparisons/ named by data, size and epochs.
        scores: names of the scores in the table; () for those of the size.

    Raises:
        UserError: an unknown row or size, or settings that do not fit together.
    """

    rows: tuple[str, ...]
    data: str
    size: str
    epochs: int | None = None
    seeds: int = 1
    out: Path | None = None
    scores: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"--seeds {self.seeds} must be 1 or more")
        if not self.rows:
            raise UserError(f"--models needs at least one row; the rows are {', '.join(rows(self.kind))}")
        for row in self.rows:
            self.config(row)

    @property
    def kind(self) -> Kind:
        """The kind of the data, as their name tells it."""
        return expected_kind(self.data)

    # -- settings and folders ------------------------------------------------------------------------------------------

    @property
    def shared(self) -> Config:
        """The settings that all rows share, with those of a model."""
        return self._completed(load(model=self._first_model, shared=shared_files(self.size, self.data)))

    @property
    def _first_model(self) -> str:
        """The model whose own settings complete the shared ones: of images the default one, else that of the first row."""
        return "" if self.kind == "images" else load(row_file(rows(self.kind)[0], self.kind)).model.name

    def config(self, row: str, seed: int = 0) -> Config:
        """The settings of a run."""
        config = self._completed(load(row_file(row, self.kind), shared=shared_files(self.size, self.data)))
        return check(replace(config, seed=seed))

    def _completed(self, config: Config) -> Config:
        epochs = config.epochs if self.epochs is None else self.epochs
        score = replace(config.score, scores=self.scores or config.score.scores)
        return replace(config, epochs=epochs, data=replace(config.data, source=self.data), score=score)

    @property
    def folder(self) -> Path:
        """The folder of the comparison."""
        data = re.sub(r"[^\w.=-]+", "-", Path(self.data).name)
        return self.out or Path("comparisons") / f"{data}-{self.size}-{self.shared.epochs}-epochs"

    def run_folder(self, row: str, seed: int) -> Path:
        """The folder of a run."""
        return self.folder / "runs" / f"{row}-seed-{seed}"

    @property
    def wanted(self) -> list[tuple[str, int]]:
        """Row and seed of each run to train, in order: the table is complete after the first seed."""
        return [(row, seed) for seed in range(self.seeds) for row in self.rows]

    def present(self) -> Iterator[tuple[str, int]]:
        """Row and seed of each run in the folder, of these rows or of others."""
        for path in sorted((self.folder / "runs").glob("*")):
            name = re.fullmatch(r"(.+)-seed-(0|[1-9][0-9]*)", path.name)
            if name and name[1] in rows(self.kind) and (path / "config.toml").is_file():
                yield name[1], int(name[2])

    @by_main
    def check_folder(self) -> None:
        """Raise UserError unless the folder is missing, empty, or holds a comparison with the same shared settings."""
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is not a folder; choose another --out")
        filled = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
        if filled and not (folder / "runs").is_dir():
            raise UserError(f"{folder} is not a comparison's folder (no runs) and is not empty; choose another --out")
        for row, seed in self.present():
            before = runs.read_config(self.run_folder(row, seed))
            changed = {
                key: values for key, values in differences(before, self.config(row, seed)).items() if key not in _FREE
            }
            if changed:
                listed = "; ".join(f"{key} = {shown(old)}, now {shown(new)}" for key, (old, new) in changed.items())
                raise UserError(
                    f"{self.run_folder(row, seed)} was trained with other settings than this comparison has ({listed}); "
                    "choose another --out, so that all rows of a table have the same settings"
                )
