"""Directions in a model's latent space: principal components of its codes, and attributes of the training images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from glf_fast.data import ImageDataset
from glf_fast.data.attributes import load_attribute
from glf_fast.errors import UserError, did_you_mean
from glf_fast.images import to_float, to_uint8
from glf_fast.metrics import subset
from glf_fast.models import Decodes, Encodes, GenerativeModel

__all__ = ["Codes", "has_codes"]

# Training images that are encoded, of all and with an attribute. A flow on pixels takes 10 ms for each.
_ENCODED = 500
_WITH = 200
_BATCH = 100
_COMPONENTS = 6
# More labels are no classes, but numbers of people or the like.
_MOST_LABELS = 100


@runtime_checkable
class _DecodesDrawn(Protocol):
    """A model that decodes codes which it draws, whether it has an encoder or not."""

    def decode(self, z: Tensor) -> Tensor: ...

    def sample_codes(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None, mode: str = ""
    ) -> Tensor: ...


def has_codes(model: GenerativeModel) -> bool:
    """Whether the model has codes that it can decode: of images, or drawn."""
    return isinstance(model, (Decodes, _DecodesDrawn))


class Codes:
    """The latent space of a model: codes of images, directions, and images of moved codes.

    A code is what the model's `encode` gives: a vector, or for a flow on pixels the noise of an image. Models without an
    encoder have the codes that they draw. Directions are computed when they are first asked for.

    Args:
        model: a model for which `has_codes` is true.
        train: the training images, and their labels.
        files: for each attribute's name the file and the name in it, see `load_attribute`.
    """

    def __init__(
        self, model: GenerativeModel, train: ImageDataset, files: Mapping[str, tuple[Path, str]] | None = None
    ) -> None:
        self.model, self.train = model, train
        self._files = dict(files or {})
        self._labels: dict[str, int] = {}
        if train.labels is not None and isinstance(model, Encodes):
            labels = train.labels.unique().tolist()
            if 2 <= len(labels) <= _MOST_LABELS:
                self._labels = {f"label {label}": label for label in labels}
        self.direction = cache(self._direction)
        self._principal = cache(self._components)

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the principal components, in the order of their variances."""
        return tuple(f"component {i}" for i in range(1, 1 + _COMPONENTS))

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the attributes: those of the file, and the labels of the data set; () for a model without an encoder."""
        return (*self._files, *self._labels) if isinstance(self.model, Encodes) else ()

    @property
    def mean(self) -> Tensor:
        """The mean code (…)."""
        return self._principal()[0]

    def encode(self, images: Tensor) -> Tensor:
        """Codes (N, …) of uint8 images (N, C, H, W), on the model's device.

        Raises:
            UserError: a model without an encoder.
        """
        if not isinstance(self.model, Encodes):
            raise UserError(f"{self.model.words.title} has no encoder, so an image has no code")
        device = next(self.model.parameters()).device
        with self.model.evaluating():
            return torch.cat([self.model.encode(to_float(part.to(device))) for part in images.split(_BATCH)])

    def draw(self, temperature: float, generator: torch.Generator) -> Tensor:
        """The code (…) of a sample."""
        if isinstance(self.model, _DecodesDrawn):
            with self.model.evaluating():
                return self.model.sample_codes(1, temperature=temperature, generator=generator)[0]
        image = self.model.sample(1, temperature=temperature, generator=generator)
        return self.encode(to_uint8(image.nan_to_num(0.0, 0.0, 0.0)))[0]

    def _components(self) -> tuple[Tensor, Tensor]:
        """The mean code (…) and principal components (6, …), each as long as one standard deviation."""
        if isinstance(self.model, Encodes):
            codes = self.encode(subset(self.train.images, _ENCODED))
        else:
            device = next(self.model.parameters()).device
            with self.model.evaluating():
                generator = torch.Generator(device).manual_seed(0)
                codes = cast(_DecodesDrawn, self.model).sample_codes(_ENCODED, generator=generator)
        if not codes.isfinite().all():
            raise UserError("the codes of the training images are not finite; the training has diverged")
        mean = codes.mean(0)
        rows = (codes - mean).flatten(1).double()
        _, lengths, directions = torch.linalg.svd(rows, full_matrices=False)
        chosen = directions[:_COMPONENTS]
        chosen = torch.cat([chosen, chosen.new_zeros(_COMPONENTS - len(chosen), chosen.shape[1])])
        deviations = chosen.new_zeros(_COMPONENTS)
        deviations[: len(lengths)] = lengths[:_COMPONENTS] / max(1, len(codes) - 1) ** 0.5
        # The sign of a singular vector is arbitrary: its largest entry shall be positive.
        signs = chosen.gather(1, chosen.abs().argmax(1, keepdim=True)).sign()
        return mean, (chosen * signs * deviations[:, None]).to(codes.dtype).unflatten(1, mean.shape)

    def _direction(self, name: str) -> Tensor:
        """The direction (…) called `name`.

        A component is as long as the standard deviation of the codes along it. An attribute is the difference of the mean codes
        of training images with it and without it, a label's that of images with this label and others. Only up to 200 images
        of the rarer kind are encoded: the mean of the others follows from that of all images and the share of the kind.

        Raises:
            UserError: an unknown name, or an attribute that all training images have, or none.
        """
        if name in self.components:
            return self._principal()[1][self.components.index(name)]
        if name not in self.attributes:
            known = (*self.components, *self.attributes)
            raise UserError(f"there is no direction {name!r}; {did_you_mean(name, known)}choose one of the list")
        if name in self._files:
            has = load_attribute(*self._files[name], self.train)
        else:
            assert self.train.labels is not None
            has = self.train.labels == self._labels[name]
        if bool(has.all()) or not bool(has.any()):
            raise UserError(
                f"{'all' if has.any() else 'none'} of the training images have the attribute {name}, so it has no direction"
            )
        share = has.double().mean().item()
        if share > 0.5:
            return (self.mean - self._mean_of(~has)) / share
        return (self._mean_of(has) - self.mean) / (1 - share)

    def _mean_of(self, part: Tensor) -> Tensor:
        """Mean code (…) of up to 200 training images of a part, bool (N,)."""
        return self.encode(subset(self.train.images[part], _WITH)).mean(0)

    def moved(self, code: Tensor, amounts: Sequence[Mapping[str, float]]) -> Tensor:
        """Images uint8 (N, C, H, W) of a code (…) moved N times: each time by the sum of directions times their amounts."""
        steps = [
            sum((amount * self.direction(name) for name, amount in moves.items()), torch.zeros_like(code))
            for moves in amounts
        ]
        with self.model.evaluating():
            images = cast(_DecodesDrawn, self.model).decode(code + torch.stack(steps))
        return to_uint8(images.nan_to_num(0.0, 0.0, 0.0)).cpu()
