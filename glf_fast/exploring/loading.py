"""Runs, opened to be explored: the model, its data, and what can be done with the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from glf_fast import data
from glf_fast.data import ImageDataset
from glf_fast.data.attributes import load_attribute
from glf_fast.errors import UserError
from glf_fast.exploring.codes import Codes, has_codes
from glf_fast.exploring.neighbours import Neighbours
from glf_fast.models import Decodes, GenerativeModel, HasLikelihood, Interpolates, Reconstructs, ScoresCodes
from glf_fast.training import checkpoint, runs
from glf_fast.training.splits import load_splits

__all__ = ["Opened", "open_run"]


@dataclass(frozen=True, eq=False)
class Opened:
    """A run that is explored.

    Attributes:
        name: name of the run's folder.
        model: the model of a checkpoint, in eval mode.
        train, test: the data that the model was trained on, and the test images.
        codes: directions in the model's latent space, or None for a model without codes.
        neighbours: search among the training images.
    """

    name: str
    model: GenerativeModel
    train: ImageDataset
    test: ImageDataset
    codes: Codes | None
    neighbours: Neighbours = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "neighbours", Neighbours(self.train.images))

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    def abilities(self) -> tuple[str, ...]:
        """Names of the answers that this model can give, see `answers`."""
        model = self.model
        able = {
            "sample": True,
            "nearest": True,
            "walk": self.codes is not None,
            "interpolate": isinstance(model, Interpolates),
            "edit": self.codes is not None and bool(self.codes.attributes) and isinstance(model, Decodes),
            "reconstruct": isinstance(model, (Reconstructs, Decodes, HasLikelihood, ScoresCodes)),
        }
        return tuple(name for name, there in able.items() if there)


def open_run(
    folder: Path,
    device: torch.device,
    *,
    which: str = "best",
    data_dir: Path | None = None,
    attributes: Path | None = None,
    names: Sequence[str] = (),
) -> Opened:
    """The run in a folder, with its model on `device`.

    Args:
        which: checkpoint "best" or "last".
        data_dir: folder in which to look for the data set first.
        attributes: file with attributes of the training images, see `load_attribute`.
        names: names of the attributes in this file.

    Raises:
        UserError: no run, a run on other data than images, a damaged checkpoint, data that are missing or have changed, or
            attributes that do not belong to the training images.
    """
    config = runs.read_config(folder)
    place = runs.checkpoint_folder(folder, runs.pick_checkpoint(folder, which))
    model, state = checkpoint.load_model(place, device)
    checkpoint.check_state(place, state)
    if len(model.shape) != 3:
        raise UserError(
            f"{folder} cannot be explored: its {model.words.title} was trained on data of shape {model.shape}, and the page "
            "shows images"
        )
    train, test = (data.as_images(split) for split in load_splits(config.data, data_dir))
    if train.shape != model.shape or train.fingerprint != state["data"]:
        raise UserError(
            f"{config.data.source} holds other data than {folder} was trained on; give the folder of the original data with "
            "--data-dir"
        )
    codes = None
    if has_codes(model):
        codes = Codes(model, train, {name: (attributes, name) for name in names} if attributes else {})
        if attributes and names:
            load_attribute(attributes, names[0], train)  # a file of other images is refused now, not in the page
    return Opened(folder.resolve().name, model, train, test, codes)
