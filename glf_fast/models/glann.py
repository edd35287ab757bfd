"""GLANN: a learned code for every training image, and a network that maps noise to such codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glf_fast.errors import UserError
from glf_fast.models.latent import DecoderModel, LatentSettings, decoder
from glf_fast.models.model import Phase, Stage, Words
from glf_fast.models.reconstruction import reconstruction_loss
from glf_fast.models.whole_batch import share, whole
from glf_fast.settings import AT_LEAST_2, NOT_NEGATIVE, POSITIVE, Rule

__all__ = ["GLANN", "GLANNSettings"]

# Width of the two hidden layers of T, in the released code.
_UNITS = 128


@dataclass(frozen=True)
class GLANNSettings(LatentSettings):
    """GLANN."""

    name: str = "glann"
    """Name of the model."""
    reconstruction: Literal["mse", "bce", "l1", "perceptual"] = "mse"
    """Distance between images and what the decoder makes of their codes."""
    noise_dim: int = 32
    """Length of the noise vectors that are mapped to codes."""
    matched: int = 2048
    """Codes that are matched in a step of the second stage, each to the nearest of twice as many mapped noise vectors."""
    mapping_epochs: int = 5
    """Length of the second stage, in passes over the training set."""
    items: int = 0
    """Images in the training set, each of which has a code; 0: as many as the training set has."""

    RULES: ClassVar[Mapping[str, Rule]] = {
        **LatentSettings.RULES,
        "latent_dim": AT_LEAST_2,  # the sphere in one dimension is two points
        "noise_dim": POSITIVE,
        "matched": POSITIVE,
        "mapping_epochs": POSITIVE,
        "items": NOT_NEGATIVE,
    }

    def summary(self) -> str:
        """The settings that matter most, in a few words for the report."""
        return f"{self.latent_dim} latent dimensions, {self.reconstruction} loss"

    def trained_on(self, train: Sized) -> GLANNSettings:
        """These settings with the number of images of the training set.

        Raises:
            UserError: the settings name another number.
        """
        if self.items not in (0, len(train)):
            raise UserError(
                f"model.items = {self.items}, but the training set has {len(train)} images; leave model.items out"
            )
        return replace(self, items=len(train))


class GLANN(DecoderModel):
    """Generative Latent Nearest Neighbors (Hoshen, Li, Malik, arXiv:1812.08985).

    In the first stage, GLO (Bojanowski et al., arXiv:1707.05776), every training image x_i has a code z_i = c_i/‖c_i‖ on the
    unit sphere, and the c_i and the decoder D minimise the mean of d(D(z_i), x_i). In the second stage, IMLE (Li, Malik,
    arXiv:1809.09087), a network T of noise e ~ N(0, I) minimises the mean of min_j ‖T(e_j) − z_i‖². Samples are
    D(T(e)/‖T(e)‖).

    The released code divides codes by their norms after each epoch, and with gradients that do not know of it. It matches all
    codes at once, in each of 50 epochs; here as many codes as `matched` are drawn and matched in each step. Both have two noise
    vectors for each code.

    The codes are N·D parameters, which a checkpoint holds (60,000 codes of length 32: 7.7 MB) and sampling does not need. There
    is no encoder, so that other images have no codes.

    Args:
        shape: (C, H, W) of the images, H and W multiples of 4.
        settings: see `GLANNSettings`; a model with `items` = 0 can be sampled, but not trained.
    """

    Settings = GLANNSettings
    groups = ("decoder", "codes", "mapping")
    words = Words(
        "GLANN",
        curves={"reconstruction": "reconstruction", "matching": "squared distance of codes to their nearest T(e)"},
        about_curves="The second curve is that of the second stage.",
    )
    settings: GLANNSettings

    def __init__(self, shape: Sequence[int], settings: GLANNSettings = GLANNSettings()) -> None:
        super().__init__(shape, settings)
        dim = settings.latent_dim
        self.decoder = decoder(shape, settings)
        self.codes = nn.Embedding(settings.items, dim)
        nn.init.normal_(self.codes.weight, std=dim**-0.5)
        self.mapping = nn.Sequential(
            nn.Linear(settings.noise_dim, _UNITS, bias=False),
            nn.BatchNorm1d(_UNITS),
            nn.ReLU(),
            nn.Linear(_UNITS, _UNITS, bias=False),
            nn.BatchNorm1d(_UNITS),
            nn.ReLU(),
            nn.Linear(_UNITS, dim, bias=False),
        )

    # -- training ------------------------------------------------------------------------------------------------------

    def losses(self, x: Tensor, generator: torch.Generator | None, index: Tensor) -> dict[str, Tensor]:
        """The reconstruction loss of a batch x (B, C, H, W) in [0, 1] of the training images at `index` (B,)."""
        self._check_batch("x", x)
        error = reconstruction_loss(self.settings.reconstruction, self.decoder(F.normalize(self.codes(index))), x)
        return {"loss": error, "reconstruction": error.detach()}

    def match(self, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """mean_i min_j ‖T(e_j) − z_i‖² over codes that are drawn, like the e_j, from `generator`; x is not used."""
        codes, count = self.codes.weight.detach(), self.settings.matched
        chosen = torch.randint(len(codes), (count,), generator=generator, device=codes.device)
        z, mapped = F.normalize(codes[share(chosen)]), whole(self._mapped(2 * count, 1.0, generator))
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            nearest = (mapped.square().sum(1) - 2 * z @ mapped.mT).argmin(1)
        return {"matching": (mapped[nearest] - z).square().sum(1).mean()}

    def phases(self) -> tuple[Phase, ...]:
        """The phase of GLO."""
        return (Phase(self.losses, moves=("decoder", "codes")),)

    def stages(self) -> tuple[Stage, ...]:
        """GLO, then IMLE."""
        imle = Phase(self.match, moves=("mapping",), minimises="matching")
        return Stage(self.phases(), indexed=True), Stage((imle,), epochs=self.settings.mapping_epochs)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """{"decoder": D, "codes": the c_i, "mapping": T}."""
        return {name: list(getattr(self, name).parameters()) for name in self.groups}

    # -- use -----------------------------------------------------------------------------------------------------------

    def sample_codes(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None, mode: str = ""
    ) -> Tensor:
        """n codes T(e)/‖T(e)‖ (n, latent_dim), e ~ temperature·N(0, I); arguments are those of `sample`."""
        return F.normalize(self._mapped(n, temperature, generator))

    def _mapped(self, n: int, temperature: float, generator: torch.Generator | None) -> Tensor:
        """T(e) for n vectors e ~ temperature·N(0, I), or this process's share of them: (n, latent_dim), float32 or better."""
        like = self.codes.weight
        e = torch.randn(n, self.settings.noise_dim, generator=generator, device=like.device, dtype=like.dtype)
        with torch.autocast(like.device.type, enabled=False):  # distances of nearby codes need their digits
            return self.mapping(temperature * share(e))
