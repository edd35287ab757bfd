"""Generative Latent Flow: an autoencoder, and a normalizing flow that learns the distribution of its codes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast.flow import CouplingFlow, Flow, rnvp_flow
from glf_fast.models.autoencoder import Decoder, Encoder, check_image_shape
from glf_fast.models.model import GenerativeModel
from glf_fast.models.reconstruction import check_reconstruction, reconstruction_loss

__all__ = ["GLF"]

# Samples are drawn in batches of this size: it bounds memory, and the authors' protocol is defined by it.
_SAMPLE_BATCH = 500


class GLF(GenerativeModel):
    """Generative Latent Flow (Xiao, Yan, Amit, arXiv:1905.10485).

    With encoder E, decoder D, flow F, codes z = E(x) and noisy codes z̃ = z + σ·s·ε, ε ~ N(0, I), the loss of a batch is

        β·d(D(z̃), x) − mean log p_F(sg(z̃)),        log p_F(z) = log N(F(z); 0, I) + log|det ∂F/∂z|,

    where sg stops the gradient: reconstruction alone trains the autoencoder, likelihood alone the flow. Samples are
    D(F⁻¹(u)), u ~ N(0, I).

    Args:
        image_shape: (C, H, W), H and W multiples of 4.
        latent_dim: D, columns of z.
        width, hidden: of the networks, see `Encoder`.
        reconstruction: d: "mse", "bce", "l1" or "perceptual", see `reconstruction_loss`.
        beta: β. Matters when stop_gradient is False; else it scales the autoencoder's gradient, which Adam undoes.
        stop_gradient: False trains the encoder by the likelihood too: the regularised GLF. Give it latent noise, or the
            likelihood grows without bound as the encoder shrinks the codes.
        latent_noise: σ. Noise gives the flow a density to learn where the codes fill a thin sheet, and the decoder an answer
            off that sheet. In units of s: of each code's standard deviation over the batch if stop_gradient, so that the
            encoder cannot outgrow the noise; 1 if not, so that it cannot shrink with the codes.
        flow: {"kind": "coupling", …} with the arguments of `CouplingFlow` (the default), or {"kind": "rnvp", …} with those of
            `rnvp_flow`, the paper's; `dim` is given by latent_dim.
    """

    def __init__(
        self,
        *,
        image_shape: Sequence[int],
        latent_dim: int = 64,
        width: int = 64,
        hidden: int = 1024,
        reconstruction: str = "mse",
        beta: float = 1.0,
        stop_gradient: bool = True,
        latent_noise: float = 0.0,
        flow: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_reconstruction(reconstruction)
        if latent_noise < 0:
            raise ValueError(f"latent_noise is a standard deviation, so it must be ≥ 0; got {latent_noise}")
        self.image_shape = check_image_shape(image_shape)
        self.latent_dim = latent_dim
        self.reconstruction = reconstruction
        self.beta = beta
        self.stop_gradient = stop_gradient
        self.latent_noise = latent_noise
        self.encoder = Encoder(image_shape, latent_dim, width, hidden)
        self.decoder = Decoder(image_shape, latent_dim, width, hidden)
        self.flow = _build_flow(latent_dim, flow or {})
        self.config = {
            "image_shape": list(self.image_shape),
            "latent_dim": latent_dim,
            "width": width,
            "hidden": hidden,
            "reconstruction": reconstruction,
            "beta": beta,
            "stop_gradient": stop_gradient,
            "latent_noise": latent_noise,
            "flow": {"kind": "coupling", **(flow or {})},
        }

    # -- training ------------------------------------------------------------------------------------------------------

    def losses(self, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """{"loss", "reconstruction", "nll"} of a batch x (B, C, H, W) in [0, 1]; nll in nats per image.

        Args:
            generator: source of the latent noise, on x's device; the global one if None.
        """
        z = self.encode(x)
        if self.latent_noise > 0:
            noise = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
            unit = z.detach().std(0, correction=0) if self.stop_gradient else 1.0
            z = z + self.latent_noise * unit * noise
        reconstruction = reconstruction_loss(self.reconstruction, self.decode(z), x)
        nll = -self.flow.log_prob(z.detach() if self.stop_gradient else z).mean()
        return {"loss": self.beta * reconstruction + nll, "reconstruction": reconstruction, "nll": nll}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """{"autoencoder": encoder and decoder, "flow": the flow}."""
        return {
            "autoencoder": [*self.encoder.parameters(), *self.decoder.parameters()],
            "flow": list(self.flow.parameters()),
        }

    # -- use -----------------------------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Tensor:
        """Images x (B, C, H, W) in [0, 1] → codes z (B, latent_dim)."""
        self._check_images("x", x)
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """Codes z (B, latent_dim) → images (B, C, H, W) in [0, 1]."""
        return self.decoder(z)

    def reconstruct(self, x: Tensor) -> Tensor:
        """D(E(x)) for x (B, C, H, W) in [0, 1], in eval mode and without gradients or noise."""
        with self._evaluating():
            return self.decode(self.encode(x))

    def sample(
        self,
        n: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        authors_protocol: bool = False,
    ) -> Tensor:
        """n images D(F⁻¹(u)), u ~ temperature·N(0, I): (n, C, H, W) in [0, 1], in eval mode and without gradients.

        Args:
            temperature: standard deviation of u; below 1 trades variety for typicality.
            generator: source of u, on the model's device; the global one if None.
            authors_protocol: as the released code samples: batch norms take the statistics of 500 samples at a time, so that
                a sample depends on its neighbours, and each image is stretched to [0, 1]. Both move the Fréchet distance.
        """
        starts = range(0, n, _SAMPLE_BATCH) or [0]
        # Whole batches where a batch's statistics matter; a single sample has none.
        sizes = [_SAMPLE_BATCH if authors_protocol else min(_SAMPLE_BATCH, n - start) for start in starts]
        with self._evaluating(), _batch_statistics(self) if authors_protocol else contextlib.nullcontext():
            x = torch.cat(
                [self.decode(self.flow.sample(k, temperature=temperature, generator=generator)) for k in sizes]
            )[:n]
        if authors_protocol:
            low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
            x = (x - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)
        return x

    def interpolate(self, x0: Tensor, x1: Tensor, steps: int) -> Tensor:
        """(B, steps, C, H, W): from each reconstructed x0 to its x1 (B, C, H, W) along an arc in the flow's base space.

        An arc u_t = [sin((1−t)ω)·u₀ + sin(tω)·u₁] / sin ω, ω the angle between u₀ and u₁: a straight line would cross the
        middle of the Gaussian, where no sample is.
        """
        if steps < 2:
            raise ValueError(f"steps counts both ends, so it must be ≥ 2; got {steps}")
        with self._evaluating():
            u0, u1 = (self.flow(self.encode(x))[0][:, None] for x in (x0, x1))
            t = torch.linspace(0, 1, steps, device=u0.device, dtype=u0.dtype)[:, None]
            # Parallel or opposite ends leave the arc undefined; a tiny turn then stands for it.
            omega = torch.nn.functional.cosine_similarity(u0, u1, -1).clamp(-0.9999, 0.9999).acos()[..., None]
            u = (((1 - t) * omega).sin() * u0 + (t * omega).sin() * u1) / omega.sin()
            return self.decode(self.flow.inverse(u.flatten(0, 1))[0]).unflatten(0, (len(x0), steps))


def _build_flow(dim: int, settings: Mapping[str, Any]) -> Flow:
    kinds: dict[str, Callable[..., Flow]] = {"coupling": CouplingFlow, "rnvp": rnvp_flow}
    kind = settings.get("kind", "coupling")
    if kind not in kinds:
        raise ValueError(f"the flow's kind must be one of {', '.join(map(repr, kinds))}; got {kind!r}")
    arguments = {name: value for name, value in settings.items() if name != "kind"}
    return kinds[kind](dim, **arguments)


@contextlib.contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms normalise by the batch at hand inside, and their running statistics stay as they are."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    try:
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        yield
    finally:
        for norm, (training, track_running_stats) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, track_running_stats
