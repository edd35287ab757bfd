"""The training and the test split that a run's settings name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from glf_fast import data
from glf_fast.data import Dataset
from glf_fast.distributed import unhurried
from glf_fast.errors import UserError
from glf_fast.training.config import DataConfig

__all__ = ["load_other", "load_splits"]


def load_splits(config: DataConfig, data_dir: Path | None) -> tuple[Dataset, Dataset]:
    """Load both splits; raises UserError also if they have too few items, or items of different shapes."""
    options: dict[str, Any] = {"image_size": config.image_size, "skip_unusable": config.skip_unusable}
    with unhurried():
        train, test = (data.load(config.source, split, data_dir=data_dir, **options) for split in data.SPLITS)
    for dataset, least in ((train, 4), (test, 2)):  # scores compare two halves of train; a covariance needs two items
        if len(dataset) < least:
            raise UserError(f"{config.source} has {len(dataset)} {dataset.split} items; at least {least} are needed")
    if train.shape != test.shape:
        raise UserError(
            f"{config.source} has training items of shape {train.shape} and test items of shape {test.shape}; "
            "both must be alike (grey and coloured images differ in their channels)"
        )
    return train, test


def load_other(source: str, config: DataConfig, shape: tuple[int, ...], data_dir: Path | None) -> Dataset:
    """The test split of another data set than the run's, with images resized to the sides of `shape` where that is possible.

    What the source cannot take is left out: `skip_unusable` of the run's settings, and a `data_dir` for an absolute path or
    for data that come with a library.
    """
    resizes, known = data.resizes(source), data.SOURCES.get(source)
    square = len(shape) == 3 and shape[1] == shape[2]
    other = replace(
        config,
        source=source,
        image_size=shape[1] if resizes and square else None,
        skip_unusable=config.skip_unusable and resizes and known is None,
    )
    in_folder = known.files if known else not Path(source).is_absolute()
    return load_splits(other, data_dir if in_folder else None)[1]
