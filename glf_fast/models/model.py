"""The interface between models and everything that trains, samples and scores them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from glf_fast.errors import UserError, did_you_mean
from glf_fast.models import saving
from glf_fast.settings import Settings, check, table, updated

__all__ = [
    "Decodes",
    "DrawsCodes",
    "Encodes",
    "GenerativeModel",
    "HasLikelihood",
    "Interpolates",
    "ModelSettings",
    "Phase",
    "Reconstructs",
    "SamplesClasses",
    "ScoresCodes",
    "Stage",
    "Words",
    "Writes",
]

Losses = Callable[..., dict[str, Tensor]]
S = TypeVar("S", bound="ModelSettings")
M = TypeVar("M", bound="GenerativeModel")


@dataclass(frozen=True)
class ModelSettings(Settings):
    """The model."""

    name: str = ""
    """Name of the model."""

    def summary(self) -> str:
        """The settings that matter most, in a few words for the report."""
        return ""

    def trained_on(self: S, train: Any) -> S:
        """These settings with what the model must know of its training set, a `data.Dataset`.

        Examples are the number of its items, if the model has parameters for each, its classes, or the vocabulary of its
        sequences.

        Raises:
            ValueError: a training set that does not fit the settings.
        """
        return self


@dataclass(frozen=True)
class Phase:
    """One update within a training step.

    Attributes:
        losses: a method of the model, losses(x, generator) → scalars by name; all scalars are logged. In an indexed or
            labelled stage, index and labels of the batch are further arguments, see `Stage`. A scalar that is no mean over the
            items of x, and noise for them, come from `models.whole_batch`, so that several processes train as one does.
        moves: names of the parameter groups that the update changes; gradients of other groups are dropped.
        minimises: name of the scalar that is back-propagated.
        every: the phase takes part in every `every`-th step only.
        gradients: whether the gradient norm of each group that the phase moves is logged, as gradient_GROUP. It shows which
            one of two networks that compete is losing.
    """

    losses: Losses
    moves: tuple[str, ...]
    minimises: str = "loss"
    every: int = 1
    gradients: bool = False


@dataclass(frozen=True)
class Stage:
    """A part of training that ends before the next one begins.

    Attributes:
        phases: the updates of each step, in order; empty if the stage consists of `fit`.
        epochs: passes over the training data; None for the number in the run's configuration.
        inputs: function that maps a batch to the inputs of the phases and of `fit`, for instance images to their codes. It is
            applied once, in eval mode, at the start of the stage. None if the inputs are the batches themselves.
        fit: a closed-form fit to all inputs (N, …), instead of phases; the same inputs must give the same result.
        indexed: whether the losses also take the places (B,) of the batch's items in the training set, for a model that has
            parameters for each item. The model learns the number of items by `ModelSettings.trained_on`.
        labelled: whether the losses also take the labels (B,) of the batch's items, after the index of an indexed stage.
            `ModelSettings.trained_on` refuses data without labels.
    """

    phases: tuple[Phase, ...] = ()
    epochs: int | None = None
    inputs: Callable[[Tensor], Tensor] | None = None
    fit: Callable[[Tensor], None] | None = None
    indexed: bool = False
    labelled: bool = False


@dataclass(frozen=True)
class Words:
    """Texts of a model for log and report.

    Attributes:
        title: the model's usual name.
        interpolations: description of the pictures of interpolations.
        curves: titles, by name, of the scalars that the report and the progress line show; None shows all scalars under their
            names. Losses among them should fall as the model improves.
        about_curves: explanation of the curves.
        advice: what helps, beside lower learning rates and clipping, when the training of this model diverges.
        likelihood: description of the value of `log_likelihood`, if the model has this method; printed beside the score.
    """

    title: str
    interpolations: str = "From one test image to another."
    curves: Mapping[str, str] | None = None
    about_curves: str = ""
    advice: str = ""
    likelihood: str = "exact"


@runtime_checkable
class Encodes(Protocol):
    """A model that maps data to codes."""

    def encode(self, x: Tensor) -> Tensor:
        """Codes (B, …) of x (B, *shape), in the model's present mode and without random numbers."""
        ...


@runtime_checkable
class Decodes(Encodes, Protocol):
    """A model that also maps codes back to data."""

    def decode(self, z: Tensor) -> Tensor:
        """Data (B, *shape) of codes z as `encode` gives them, in the model's present mode."""
        ...


@runtime_checkable
class DrawsCodes(Decodes, Protocol):
    """A model with codes that also has a distribution of them."""

    def sample_codes(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None, mode: str = ""
    ) -> Tensor:
        """n codes (n, …) of the distribution; arguments are those of `GenerativeModel.sample`."""
        ...


@runtime_checkable
class HasLikelihood(Protocol):
    """A model with a likelihood of data; `Words.likelihood` says whether it is exact or a bound."""

    def log_likelihood(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """log p(x) of x (B, *shape), or a lower bound of it: (B,) in nats, in eval mode and without gradients."""
        ...


@runtime_checkable
class ScoresCodes(Encodes, Protocol):
    """A model that has a density of codes, but none of data."""

    def code_log_prob(self, z: Tensor) -> Tensor:
        """log p(z) of codes z as `encode` gives them: (B,) in nats, in eval mode and without gradients."""
        ...


@runtime_checkable
class Reconstructs(Protocol):
    """A model that maps data to codes and back."""

    def reconstruct(self, x: Tensor) -> Tensor:
        """Reconstructions (B, *shape) of x (B, *shape), in eval mode and without gradients."""
        ...


@runtime_checkable
class Interpolates(Protocol):
    """A model that interpolates between two data points."""

    def interpolate(self, x0: Tensor, x1: Tensor, steps: int) -> Tensor:
        """Points (B, steps, *shape) from each reconstructed x0 to its x1 (B, *shape), ends included, in eval mode."""
        ...


@runtime_checkable
class SamplesClasses(Protocol):
    """A model that can sample from one class. It is used as one if it has classes."""

    @property
    def classes(self) -> tuple[int, ...]:
        """Labels of the classes; () for a model without."""
        ...

    def sample_classes(
        self, labels: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """One sample of each of the labels (B,): (B, *shape), in eval mode, see `GenerativeModel.sample`."""
        ...


@runtime_checkable
class Writes(Protocol):
    """A model of token sequences, which writes them as text."""

    def text(self, tokens: Tensor) -> list[str]:
        """Sequences int64 (n, …), as the model gives them or as in its data set, in writing."""
        ...


class GenerativeModel(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="glf_fast",
    tags=["generative-model"],
):
    """Base class of generative models of data (*shape): settings, losses, the parameters that each loss trains, and sampling.

    Images are (C, H, W) in [0, 1], token sequences int64 (L,). Further methods are optional: see `Reconstructs`,
    `Interpolates`, `Encodes`, `Writes`, `HasLikelihood` and `SamplesClasses`.

    `save_pretrained`, `from_pretrained` and `push_to_hub` use two files, safetensors and JSON; pickles are never read.

    Class attributes:
        Settings: class of the model's settings; the default of its field `name` is the model's name.
        groups: names of the parameter groups, in order; each group has an optimizer of its own.
        words: texts of the model for log and report; an instance may replace them by texts that depend on its settings.
        takes: kinds of data sets that the model can be trained on: "images", "table", "tokens".
        sampling_modes: descriptions of the other ways to sample, by name.

    Attributes:
        shape: shape of one data point.    settings: an instance of Settings.
    """

    Settings: ClassVar[type[ModelSettings]]
    groups: ClassVar[tuple[str, ...]]
    words: Words
    takes: ClassVar[frozenset[str]] = frozenset({"images"})
    sampling_modes: ClassVar[Mapping[str, str]] = {}

    def __init__(self, shape: Sequence[int], settings: ModelSettings) -> None:
        super().__init__()
        check(settings)
        self.shape, self.settings = tuple(map(int, shape)), settings

    @property
    def config(self) -> dict[str, Any]:
        """Shape and settings, JSON-ready; `from_config` builds the same model from them, untrained."""
        return {"shape": list(self.shape), **table(self.settings)}

    # -- training ------------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of each group, by the names in `groups`; every trainable parameter is in one group."""
        raise NotImplementedError

    def phases(self) -> tuple[Phase, ...]:
        """The updates of a step of the first stage, in order."""
        raise NotImplementedError

    def stages(self) -> tuple[Stage, ...]:
        """The parts of training, in order."""
        return (Stage(self.phases()),)

    def forward(
        self,
        x: Tensor,
        generator: torch.Generator | None = None,
        stage: int = 0,
        phase: int = 0,
        index: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a phase; called `forward` because DistributedDataParallel and torch.compile wrap this method.

        Args:
            index: places (B,) of x in the training set, for an indexed stage; by default the first ones.
            labels: classes (B,) of x, for a labelled stage.
        """
        this = self.stages()[stage]
        given: list[Tensor | None] = []
        if this.indexed:
            given.append(torch.arange(len(x), device=x.device) if index is None else index)
        if this.labelled:
            given.append(labels)
        return this.phases[phase].losses(x, generator, *given)

    # -- use -----------------------------------------------------------------------------------------------------------

    def sample(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None, mode: str = ""
    ) -> Tensor:
        """n samples (n, *shape), in eval mode and without gradients.

        Args:
            temperature: standard deviation of the noise; a value below 1 gives more typical but less varied samples.
            generator: source of the noise, on the model's device; the global generator if None.
            mode: one of `sampling_modes`, or "" for the usual way.
        """
        raise NotImplementedError

    def check_mode(self, mode: str) -> None:
        """Raise UserError, with the nearest name, unless `mode` is "" or one of `sampling_modes`."""
        if mode and mode not in self.sampling_modes:
            known = ", ".join(self.sampling_modes) or "none"
            hint = did_you_mean(mode, self.sampling_modes)
            raise UserError(f"{self.words.title} has no sampling mode {mode!r}; {hint}its modes are: {known}")

    def _check_batch(self, name: str, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{name} must be a torch.Tensor; got {type(x).__name__} (torch.as_tensor converts lists and arrays)"
            )
        if not x.is_floating_point():
            raise TypeError(
                f"{name} must be floating-point, with pixels in [0, 1]; got {x.dtype} "
                "(glf_fast.images.to_float converts uint8 pixels)"
            )
        if tuple(x.shape[1:]) != self.shape:
            wanted = ", ".join(map(str, self.shape))
            raise ValueError(f"{name} must have shape (batch, {wanted}); got {tuple(x.shape)}")

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Use eval mode and no gradients inside the block; afterwards every module has its previous mode again."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, training in modes.items():
                module.training = training

    # -- files ---------------------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls: type[M], config: Mapping[str, Any]) -> M:
        """An untrained model from shape and settings; raises UserError for unknown or wrong settings, or a missing shape."""
        values = {key: value for key, value in config.items() if key not in ("shape", "name")}
        settings = updated(cls.Settings(), values, f"the configuration of {cls.__name__}")
        try:
            return cls(config["shape"], settings)
        except KeyError:
            raise UserError(f"{cls.__name__} cannot be built: its configuration has no shape") from None
        except (
            TypeError,
            ValueError,
            OverflowError,
            RuntimeError,
            MemoryError,
        ) as error:  # sizes that nobody has memory for
            raise UserError(f"{cls.__name__} cannot be built: {str(error).splitlines()[0]}") from error

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write `config.json`, `model.safetensors` and a model card to a folder.

        All files are written to a temporary folder first, and moved when they are complete. An existing model card stays.

        Args:
            options: options of huggingface_hub's mixin: push_to_hub, repo_id, model_card_kwargs, …
        """
        folder = Path(save_directory)
        with saving.beside(folder) as temporary:
            # Not directly into the folder, because the mixin deletes the old config.json before it writes the weights.
            return super().save_pretrained(temporary, **{"repo_id": folder.name, **options})

    def _save_pretrained(self, save_directory: Path) -> None:
        saving.write(save_directory, self.config, self.state_dict())

    @classmethod
    def from_pretrained(
        cls: type[M],
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: torch.device | str = "cpu",
        **download: Any,
    ) -> M:
        """The model that `save_pretrained` wrote to a folder, or that has this name on the Hugging Face hub, in eval mode.

        Its dtypes are those that were saved: float64 stays float64, and bfloat16 needs `.float()` before flows can use it.
        A folder is read without network. The state of the global random numbers does not change.

        Args:
            map_location: device to load to.
            download: options of huggingface_hub's `snapshot_download`: revision, token, cache_dir, local_files_only, …

        Raises:
            UserError: an unknown folder or name, or files that are missing, corrupt, of another model, or pickled.
        """
        folder = saving.find(pretrained_model_name_or_path, **download)
        config, weights = saving.read(folder)
        try:
            with torch.random.fork_rng(devices=[]):
                model = cls.from_config(config)
        except UserError as error:
            raise UserError(f"{folder / saving.CONFIG_FILE}: {error}") from error
        saving.load_weights(model, weights, folder)
        return model.to(map_location).eval()
