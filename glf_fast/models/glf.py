"""Generative Latent Flow: an autoencoder, and a normalizing flow that learns the distribution of its codes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from glf_fast.flow import CouplingFlow, Flow, rnvp_flow
from glf_fast.models.autoencoder import Decoder, Encoder, check_image_shape
from glf_fast.models.model import GenerativeModel, ModelSettings, Phase, Words
from glf_fast.models.reconstruction import reconstruction_loss
from glf_fast.settings import AT_LEAST_2, NOT_NEGATIVE, POSITIVE, Rule, Settings, shown

__all__ = ["GLF", "FlowSettings", "GLFSettings"]

# Batch size of sampling. It bounds memory, and is part of the authors' protocol, which uses batch statistics.
_SAMPLE_BATCH = 500
# Of a deeper flow nothing would be seen for minutes but that it is being built.
_DEPTH: Rule = (lambda value: 0 < value <= 1000, "between 1 and 1000")


@dataclass(frozen=True)
class FlowSettings(Settings):
    """The normalizing flow."""

    kind: Literal["coupling", "rnvp"] = "coupling"
    """Kind of flow. coupling: Glow's steps (ActNorm, linear, coupling); rnvp: the GLF paper's blocks."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers in the couplings' networks; rnvp needs two equal widths."""
    steps: int = 8
    """For kind coupling: number of steps."""
    activation: str = "relu"
    """For kind coupling: activation of the networks: relu, leaky_relu, silu, gelu, tanh or elu."""
    coupling: Literal["affine", "separate", "additive", "spline"] = "affine"
    """For kind coupling: what becomes of the transformed half v. affine: v·e^s + t, with one network for s and t; separate: the
    same with one for each; additive: v + t; spline: a rational-quadratic spline of each number."""
    bins: int = 8
    """For coupling spline: bins of a spline."""
    bound: float = 5.0
    """For coupling spline: the splines act on numbers between -bound and bound."""
    log_scale: str = "tanh"
    """For kind coupling: the function that gives the log-scales: tanh, exp, glow, nflows, atan, softclip or jet."""
    log_scale_constant: float | None = None
    """For kind coupling: constant of the log-scale function; by default the usual constant of the function."""
    add_first: bool = False
    """For kind coupling: compute (v + t)·e^s instead of v·e^s + t."""
    linear: Literal["plu", "dense", "permutation"] = "plu"
    """For kind coupling: the linear layer between couplings."""
    actnorm: bool = True
    """For kind coupling: begin each step with an ActNorm."""
    blocks: int = 4
    """For kind rnvp: number of two-sided blocks."""
    clamp: float = 2.0
    """For kind rnvp: bound of the log-scales."""
    seed: int = 0
    """For kind rnvp: random seed of the fixed permutations."""

    CHOICE: ClassVar[str] = "kind"
    RULES: ClassVar[Mapping[str, Rule]] = {
        "hidden": (lambda value: 1 <= len(value) <= 4 and min(value) > 0, "one to four positive widths"),
        "steps": _DEPTH,
        "bins": (lambda value: value in range(2, 33), "between 2 and 32"),
        "bound": POSITIVE,
        "blocks": _DEPTH,
        "clamp": POSITIVE,
    }

    def effective(self) -> dict[str, Any]:
        """The fields that have an effect with this kind, by name."""
        rnvp, splines = ("blocks", "clamp", "seed"), ("bins", "bound")
        scales = ("log_scale", "log_scale_constant", "add_first")
        without = {"additive": splines + scales, "spline": scales}.get(self.coupling, splines)
        fields = dict(vars(self))
        if self.kind == "rnvp":
            return {name: fields[name] for name in ("kind", "hidden", *rnvp)}
        return {name: value for name, value in fields.items() if name not in (*rnvp, *without)}

    def choice(self, name: str) -> str:
        """The field that decides whether the field `name` has an effect."""
        of_coupling = name in ("bins", "bound", "log_scale", "log_scale_constant", "add_first")
        return "coupling" if of_coupling and self.kind == "coupling" else "kind"

    def mistake(self) -> str:
        """A message if the flow cannot be built with these settings, else ""."""
        if self.kind == "rnvp" and (len(self.hidden) != 2 or self.hidden[0] != self.hidden[1]):
            return f'hidden = {shown(self.hidden)} must be two equal widths for flow.kind = "rnvp"'
        try:
            with torch.random.fork_rng(devices=[]):
                replace(self, steps=1, blocks=1, hidden=(1,) * len(self.hidden)).build(2)
        except (ValueError, TypeError) as error:
            return str(error)
        return ""

    def build(self, dim: int) -> Flow:
        """The flow on vectors of length `dim`."""
        options = {name: value for name, value in self.effective().items() if name != "kind"}
        if self.kind == "rnvp":
            return rnvp_flow(dim, **{**options, "hidden": self.hidden[0]})
        if self.coupling == "spline":
            bound = options.pop("bound")
            options["spline"] = {"bins": options.pop("bins"), "low": -bound, "high": bound}
        return CouplingFlow(dim, **options)


@dataclass(frozen=True)
class GLFSettings(ModelSettings):
    """Generative Latent Flow; the settings of its flow are a table of their own."""

    name: str = "glf"
    """Name of the model."""
    latent_dim: int = 20
    """Length of a code, the dimension of the latent space."""
    width: int = 64
    """Channels after the encoder's first convolution."""
    hidden: int = 1024
    """Units of the dense layer in encoder and decoder."""
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
    flow: FlowSettings = FlowSettings()

    RULES: ClassVar[Mapping[str, Rule]] = {
        "latent_dim": AT_LEAST_2,  # a coupling needs two halves
        "width": POSITIVE,
        "hidden": POSITIVE,
        "beta": POSITIVE,
        "latent_noise": NOT_NEGATIVE,
    }

    def summary(self) -> str:
        """The settings that matter most, in a few words for the report."""
        return f"{self.latent_dim} latent dimensions, {self.reconstruction} loss, {self.flow.kind} flow"


class GLF(GenerativeModel):
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
        "authors": "the sampling protocol of GLF's authors: batch statistics, and images stretched to [0, 1]"
    }
    settings: GLFSettings

    def __init__(self, shape: Sequence[int], settings: GLFSettings = GLFSettings()) -> None:
        super().__init__(check_image_shape(shape), settings)
        sizes = settings.latent_dim, settings.width, settings.hidden
        self.encoder = Encoder(shape, *sizes)
        self.decoder = Decoder(shape, *sizes)
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
        settings, z = self.settings, self.encode(x)
        if settings.latent_noise > 0:
            noise = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
            unit = z.detach().std(0, correction=0) if settings.stop_gradient else 1.0
            z = z + settings.latent_noise * unit * noise
        reconstruction = reconstruction_loss(settings.reconstruction, self.decode(z), x)
        nll = -self.flow.log_prob(z.detach() if settings.stop_gradient else z).mean()
        return {
            "loss": settings.beta * reconstruction + nll,
            "reconstruction": reconstruction,
            "nll": nll,
            "nll_vs_normal": nll.detach() - _normal_nll(z.detach()),
        }

    def phases(self) -> tuple[Phase, ...]:
        """A single phase, which trains all parameters by the same loss."""
        return (Phase(self.losses, moves=self.groups),)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """{"autoencoder": encoder and decoder, "flow": the flow}."""
        return {
            "autoencoder": [*self.encoder.parameters(), *self.decoder.parameters()],
            "flow": list(self.flow.parameters()),
        }

    # -- use -----------------------------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Tensor:
        """Images x (B, C, H, W) in [0, 1] → codes z (B, latent_dim)."""
        self._check_batch("x", x)
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """Codes z (B, latent_dim) → images (B, C, H, W) in [0, 1]."""
        return self.decoder(z)

    def reconstruct(self, x: Tensor) -> Tensor:
        """D(E(x)) for x (B, C, H, W) in [0, 1], in eval mode and without gradients or noise."""
        with self.evaluating():
            return self.decode(self.encode(x))

    def sample(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None, mode: str = ""
    ) -> Tensor:
        """n images D(F⁻¹(u)), u ~ temperature·N(0, I): (n, C, H, W) in [0, 1], in eval mode and without gradients.

        Args:
            temperature: standard deviation of u; a value below 1 gives more typical but less varied samples.
            generator: source of u, on the model's device; the global generator if None.
            mode: "authors" samples as the released code does. Batch norms use the statistics of 500 samples at a time, so that
                a sample depends on the rest of its batch, and each image is stretched to [0, 1]. Both change the Fréchet
                distance.
        """
        authors = mode == "authors"
        starts = range(0, n, _SAMPLE_BATCH) or [0]
        # Batch statistics need whole batches; a single sample has no variance.
        sizes = [_SAMPLE_BATCH if authors else min(_SAMPLE_BATCH, n - start) for start in starts]
        with self.evaluating(), _batch_statistics(self) if authors else contextlib.nullcontext():
            x = torch.cat(
                [self.decode(self.flow.sample(k, temperature=temperature, generator=generator)) for k in sizes]
            )[:n]
        if authors:
            low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
            x = (x - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)
        return x

    def interpolate(self, x0: Tensor, x1: Tensor, steps: int) -> Tensor:
        """Images (B, steps, C, H, W) on an arc in the flow's base space from each reconstructed x0 to its x1 (B, C, H, W).

        The arc is u_t = [sin((1−t)ω)·u₀ + sin(tω)·u₁] / sin ω, with the angle ω between u₀ and u₁. A straight line would cross
        the middle of the Gaussian, where samples are very rare.
        """
        if steps < 2:
            raise ValueError(f"steps counts both ends, so steps must be ≥ 2; got {steps}")
        with self.evaluating():
            u0, u1 = (self.flow(self.encode(x))[0][:, None] for x in (x0, x1))
            t = torch.linspace(0, 1, steps, device=u0.device, dtype=u0.dtype)[:, None]
            # Parallel or opposite ends leave the arc undefined; the clamp then uses a slightly different angle.
            omega = torch.nn.functional.cosine_similarity(u0, u1, -1).clamp(-0.9999, 0.9999).acos()[..., None]
            u = (((1 - t) * omega).sin() * u0 + (t * omega).sin() * u1) / omega.sin()
            return self.decode(self.flow.inverse(u.flatten(0, 1))[0]).unflatten(0, (len(x0), steps))


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
