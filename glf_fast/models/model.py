"""What the trainer and the commands know of a model, and how every model is saved and loaded."""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from glf_fast.errors import UserError, did_you_mean
from glf_fast.files import read_json, save_tensors, write_json

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "GenerativeModel"]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

M = TypeVar("M", bound="GenerativeModel")


class GenerativeModel(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="glf_fast",
    tags=["normalizing-flow", "image-generation"],
):
    """A model of images (C, H, W) in [0, 1]: its losses, its optimizers' parameters, and how it samples.

    `save_pretrained`, `from_pretrained` and `push_to_hub` use two files, safetensors and JSON; pickles are never read.

    Attributes:
        config: the constructor's arguments, JSON-ready; `type(model)(**model.config)` builds the same model untrained.
        image_shape: (C, H, W).
    """

    config: dict[str, Any]
    image_shape: tuple[int, int, int]

    def losses(self, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Scalars of a batch x (B, C, H, W) in [0, 1]: "loss" is the one to back-propagate, the others tell what it is made of.

        Args:
            generator: source of all random numbers, on x's device; the global one if None.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """`losses`, under the name that DistributedDataParallel and torch.compile wrap."""
        return self.losses(x, generator)

    def sample(
        self,
        n: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        authors_protocol: bool = False,
    ) -> Tensor:
        """n images (n, C, H, W) in [0, 1], in eval mode and without gradients.

        Args:
            temperature: standard deviation of the noise; below 1 trades variety for typicality.
            generator: source of the noise, on the model's device; the global one if None.
            authors_protocol: as the model's authors sampled, where that differs and moves the score.
        """
        raise NotImplementedError

    def reconstruct(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) in [0, 1] through the model and back, in eval mode and without gradients."""
        raise NotImplementedError

    def interpolate(self, x0: Tensor, x1: Tensor, steps: int) -> Tensor:
        """(B, steps, C, H, W): the way from each reconstructed x0 to its x1 (B, C, H, W), ends included, in eval mode."""
        raise NotImplementedError

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the name of the optimizer settings that they want; every trainable parameter once."""
        raise NotImplementedError

    def _check_images(self, name: str, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(
                f"{name} must be floating-point in [0, 1]; got {x.dtype} (convert pixels with images.to_float)"
            )
        if x.ndim != 4 or tuple(x.shape[1:]) != self.image_shape:
            wanted = ", ".join(map(str, self.image_shape))
            raise ValueError(f"{name} must have shape (batch, {wanted}); got {tuple(x.shape)}")

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Eval mode and no gradients inside; afterwards every module is in the mode that it had."""
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
        """An untrained model from the constructor's arguments; raises UserError for unknown, missing or wrong ones."""
        known = list(inspect.signature(cls).parameters)
        for key in config:
            if key not in known:
                hint = did_you_mean(key, known)
                raise UserError(f"{cls.__name__} has no setting {key!r}; {hint}it has {', '.join(known)}")
        try:
            return cls(**config)
        except (TypeError, ValueError) as error:
            raise UserError(f"{cls.__name__} cannot be built: {error}") from error

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write `config.json`, `model.safetensors` and a model card to a folder.

        Files appear whole, and none before all could be written; a model card that is there already stays.

        Args:
            options: of huggingface_hub's mixin: push_to_hub, repo_id, model_card_kwargs, …
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
            # Not straight into the folder: the mixin deletes the old config.json before it writes the weights.
            result = super().save_pretrained(temporary, **{"repo_id": folder.name, **options})
            for file in Path(temporary).iterdir():
                if file.name != "README.md" or not (folder / file.name).exists():
                    file.replace(folder / file.name)
        return result

    def _save_pretrained(self, save_directory: Path) -> None:
        save_tensors(save_directory / WEIGHTS_FILE, self.state_dict())
        write_json(save_directory / CONFIG_FILE, self.config)

    @classmethod
    def from_pretrained(
        cls: type[M],
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: torch.device | str = "cpu",
        **download: Any,
    ) -> M:
        """The model that `save_pretrained` wrote to a folder, or that the Hugging Face hub has under this name, in eval mode.

        A folder is read without network. The global random numbers are left as they were.

        Args:
            map_location: device to load to.
            download: of huggingface_hub's `snapshot_download`: revision, token, cache_dir, local_files_only, …

        Raises:
            UserError: no such folder or name, files missing, corrupt, of another model, or pickled.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            try:
                name = str(pretrained_model_name_or_path)
                folder = Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE], **download))
            except (HFValidationError, OSError) as error:
                reason = str(error).strip().splitlines()[0]
                raise UserError(
                    f"there is no folder {pretrained_model_name_or_path}, and no such model on the Hugging Face hub ({reason})"
                ) from error
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / file).is_file():
                raise UserError(f"{folder} has no {file}{_pickles_in(folder)}; save_pretrained writes one")
        config = read_json(folder / CONFIG_FILE)
        if not isinstance(config, dict):
            raise UserError(f"{folder / CONFIG_FILE} does not hold a model's settings; restore it from a copy")
        with torch.random.fork_rng(devices=[]):
            model = cls.from_config(config)
        try:
            model.load_state_dict(load_file(folder / WEIGHTS_FILE))
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{folder / WEIGHTS_FILE} is corrupt or belongs to another {CONFIG_FILE} ({reason}); restore it from a copy"
            ) from error
        return model.to(map_location).eval()


def _pickles_in(folder: Path) -> str:
    pickles = [
        file.name for file in sorted(folder.iterdir()) if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    ]
    return f" but {', '.join(pickles)}: a pickle can run any code when it is read, so none is" if pickles else ""
