"""Generative Latent Flow: an autoencoder, and a normalizing flow that learns the distribution of its codes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from glf_fast.errors import UserError
from glf_fast.models.arc import flow_arc
from glf_fast.models.flow_settings import FlowSettings
from glf_fast.models.latent import SAMPLE_BATCH, LatentModel, LatentSettings
from glf_fast.models.model import Phase, Stage, Words
from glf_fast.models.reconstruction import reconstruction_loss
from glf_fast.models.whole_batch import noise_like, whole
from glf_fast.settings import AT_LEAST_2, NOT_NEGATIVE, POSITIVE, Rule

__all__ = ["GLF", "GLFSettings"]


@dataclass(frozen=True)
class GLFSettings(LatentSettings):
    """Generative Latent Flow; the settings of its flow are a table of their own."""

    name: str = "glf"
    """Name of the model."""
    reconstruction: Literal["mse", "bce", "l1", "perceptual"] = "mse"
    """Distance between images and their reconstructions."""
    beta: float = 1.0
    """Weight of the reconstruction loss against the flow's likelihood. With stop_gradient the weight hardly matters, because
    Adam undoes a factor of the gradient."""
    stop_gradient: bool = True
    """Train the encoder by the reconstruction loss alone, not by the flow's likelihood."""
    latent_noise: float = 0.0
    """Standard deviation of the noise on codes in training, relative to the standard deviation of the codes; without
    stop_gradient, the noise has this standard deviation itself."""
    flow_epochs: int = 0
    """Passes over the codes of the trained autoencoder in which the flow alone is trained further, after all else."""
    flow: FlowSettings = FlowSettings()  # noqa: RUF009 - frozen

    RULES: ClassVar[Mapping[str, Rule]] = {
        **LatentSettings.RULES,
        "latent_dim": AT_LEAST_2,  # a coupling needs two halves
        "beta": POSITIVE,
        "latent_noise": NOT_NEGATIVE,
        "flow_epochs": NOT_NEGATIVE,
    }

    def summary(self) -> str:
        """The settings that matter most, in a few words for the report."""
        return f"{self.latent_dim} latent dimensions, {self.reconstruction} loss, {self.flow.kind} flow"


class GLF(LatentModel):
    """Generative Latent Flow (Xiao, Yan, Amit, arXiv:1905.10485).

    With encoder E, decoder D, flow F, codes z = E(x) and noisy codes z̃ = z + σ·s·ε, ε ~ N(0, I), the loss of a batch is

        β·d(D(z̃), x) − mean log p_F(sg(z̃)),        log p_F(z) = log N(F(z); 0, I) + log|det ∂F/∂z|,

    where sg stops the gradient. The reconstruction loss alone trains the autoencoder, the likelihood alone trains the flow.
    Samples are D(F⁻¹(u)), u ~ N(0, I).

    Args:
        shape: (C, H, W) of the images, H and W multiples of 4.
        settings: see `GLFSettings`. In the formula

            beta: is β. It matters if stop_gradient is False; otherwise it scales the autoencoder's gradient, and Adam undoes
                this.
            stop_gradient: False omits sg, so that the likelihood also trains the encoder: the regularised GLF. Use latent noise
                then; without noise the likelihood grows without bound as the encoder shrinks the codes.
            latent_noise: is σ. If the codes lie near a surface of lower dimension, noise gives the flow a density to learn, and
                trains the decoder beside the surface. With stop_gradient, s is the standard deviation of each coordinate of the
                codes over the batch, so that the encoder cannot outgrow the noise. Without it, s is 1, so that the noise cannot
                shrink with the codes.
            flow_epochs: the flow learns codes that move as long as the autoencoder learns, and from batches, in training mode;
                its last epochs may be on codes at rest, in evaluation mode. The paper has none.
    """

    Settings = GLFSettings
    groups = ("autoencoder", "flow")
    words = Words(
        title="GLF",
        interpolations="From one test image to another along an arc in the flow's Gaussian space.",
        curves={
            "reconstruction": "reconstruction",
            "nll_vs_normal": "nll of the flow minus nll of a normal distribution",
        },
        about_curves=(
            "The second curve compares the flow's negative log-likelihood (nll) with the nll of a normal distribution fitted "
            "to the codes of each batch; below 0 the flow is better. The nll itself may rise while the samples improve, "
            "because the encoder rescales its codes."
        ),
    )
    sampling_modes: ClassVar[Mapping[str, str]] = {
        "authors": "the sampling protocol of GLF's authors: batch statistics, and images stretched to [0, 1]",
        "denoised": "each code without its expected latent noise, by one step along the flow's score",
    }
    settings: GLFSettings

    def __init__(self, shape: Sequence[int], settings: GLFSettings = GLFSettings()) -> None:
        super().__init__(shape, settings)
        self.flow = settings.flow.build(settings.latent_dim)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GLF:
        """An untrained model; also reads configurations of version 0.1.0, which have other names and one width for rnvp."""
        values = {"shape" if key == "image_shape" else key: value for key, value in config.items()}
        flow = values.get("flow")
        if isinstance(flow, dict) and isinstance(flow.get("hidden"), int):
            values["flow"] = {**flow, "hidden": [flow["hidden"]] * 2}
        return super().from_config(values)

    # -- training ------------------------------------------------------------------------------------------------------

    def losses(self, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Scalars of a batch x (B, C, H, W) in [0, 1]; likelihoods in nats per image.

        Args:
            generator: source of the latent noise, on x's device; the global one if None.

        Returns:
            loss: the loss to back-propagate.    reconstruction, nll: the two terms of the loss.
            nll_vs_normal: nll minus the nll of a normal distribution with the batch's mean and variances. The difference does
                not change when the encoder rescales its codes.
        """
        settings, z = self.settings, self._noisy(self.encode(x), generator)
        reconstruction = reconstruction_loss(settings.reconstruction, self.decode(z), x)
        nll = -self.flow.log_prob(z.detach() if settings.stop_gradient else z).mean()
        return {
            "loss": settings.beta * reconstruction + nll,
            "reconstruction": reconstruction,
            "nll": nll,
            "nll_vs_normal": nll.detach() - _normal_nll(whole(z.detach())),
        }

    def flow_losses(self, z: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """`nll` and `nll_vs_normal` of `losses` for codes z (B, latent_dim) without noise."""
        z = self._noisy(z, generator)
        nll = -self.flow.log_prob(z).mean()
        return {"nll": nll, "nll_vs_normal": nll.detach() - _normal_nll(whole(z))}

    def _noisy(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        """z̃ = z + σ·s·ε."""
        settings = self.settings
        if not settings.latent_noise:
            return z
        unit = whole(z.detach()).std(0, correction=0) if settings.stop_gradient else 1.0
        return z + settings.latent_noise * unit * noise_like(z, generator)

    def stages(self) -> tuple[Stage, ...]:
        """Training of all parameters by one loss; then, with `flow_epochs`, of the flow alone on codes that no longer move."""
        first, epochs = Stage(self.phases()), self.settings.flow_epochs
        last = Phase(self.flow_losses, moves=("flow",), minimises="nll")
        return (first, Stage((last,), epochs=epochs, inputs=self.encode)) if epochs else (first,)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """{"autoencoder": encoder and decoder, "flow": the flow}."""
        return {**super().parameter_groups(), "flow": list(self.flow.parameters())}

    # -- use -----------------------------------------------------------------------------------------------------------

    def sample_codes(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None, mode: str = ""
    ) -> Tensor:
        """n codes F⁻¹(u), u ~ temperature·N(0, I): (n, latent_dim); in mode "denoised" the `denoised` ones."""
        z = self.flow.sample(n, temperature=temperature, generator=generator)
        return self.denoised(z) if mode == "denoised" else z

    def code_log_prob(self, z: Tensor) -> Tensor:
        """log p_F(z) of codes z (B, latent_dim): (B,) in nats, in eval mode and without gradients.

        If the flow was trained with latent noise, its density is that of noisy codes.
        """
        with self.evaluating():
            return self.flow.log_prob(z)

    def denoised(self, z: Tensor) -> Tensor:
        """E[z | z̃] = z̃ + σ²·s²·∇ log p_F(z̃) of noisy codes z̃ (B, latent_dim), by Tweedie's formula; in eval mode.

        The step is exact if p_F is the density of noisy codes. It is that of TarFlow (Zhai et al., arXiv:2412.06329). With
        stop_gradient the variances s² of clean codes are those of 4,096 codes of the flow, of a fixed seed, over 1 + σ².

        Raises:
            UserError: the model has no latent noise.
        """
        settings = self.settings
        if not settings.latent_noise:
            raise UserError('mode "denoised" needs a GLF that was trained with latent noise (model.latent_noise > 0)')
        with self.evaluating():
            variances: Tensor | float = settings.latent_noise**2
            if settings.stop_gradient:
                codes = self.flow.sample(4096, generator=torch.Generator(z.device).manual_seed(0))
                variances = variances / (1 + variances) * codes.var(0)
            with torch.inference_mode(False), torch.enable_grad():
                z = z.detach().clone().requires_grad_()
                [score] = torch.autograd.grad(self.flow.log_prob(z).sum(), z)
            return z.detach() + variances * score

    def sample(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None, mode: str = ""
    ) -> Tensor:
        """n images D(F⁻¹(u)), u ~ temperature·N(0, I): (n, C, H, W) in [0, 1], in eval mode and without gradients.

        Args:
            temperature: standard deviation of u; a value below 1 gives more typical but less varied samples.
            generator: source of u, on the model's device; the global generator if None.
            mode: "authors" samples as the released code does. Batch norms use the statistics of 500 samples at a time, so that
                a sample depends on the rest of its batch, and each image is stretched to [0, 1]. Both change the Fréchet
                distance. "denoised" decodes the codes that `denoised` returns.
        """
        if mode != "authors":
            return super().sample(n, temperature=temperature, generator=generator, mode=mode)
        with self.evaluating(), _batch_statistics(self):
            starts = range(0, n, SAMPLE_BATCH) or [0]
            # Whole batches, also the last one, because a sample depends on its batch.
            codes = (self.sample_codes(SAMPLE_BATCH, temperature=temperature, generator=generator) for _ in starts)
            x = torch.cat([self.decode(z) for z in codes])[:n]
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        return (x - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)

    def interpolate_codes(self, z0: Tensor, z1: Tensor, steps: int) -> Tensor:
        """Codes (B, steps, latent_dim) on an arc in the flow's base space from each code z0 to its z1 (B, latent_dim)."""
        return flow_arc(self.flow, z0, z1, steps)


def _normal_nll(z: Tensor) -> Tensor:
    """Mean nll of codes z (B, D) under the normal distribution with their own mean and variances, in nats."""
    # A coordinate that is constant over the batch has an unbounded density; the smallest number replaces its variance.
    variances = z.var(0, correction=0).clamp(min=torch.finfo(z.dtype).tiny)
    return 0.5 * (math.log(2 * math.pi) + 1 + variances.log()).sum()


@contextlib.contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside the block, batch norms use the statistics of the batch, and their running statistics do not change."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    try:
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        yield
    finally:
        for norm, (training, track_running_stats) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, track_running_stats
