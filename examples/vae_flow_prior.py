"""A flow as the prior of a VAE: the codes may have any distribution, and the bound on log p(x) rises.

    python examples/vae_flow_prior.py [--quick] [--out FOLDER]

The images are scikit-learn's handwritten digits, 8 × 8; nothing is downloaded. The prior is one term of the loss,
`prior.log_prob(z)`, so a flow replaces N(0, I) in one line.
"""

import argparse
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.distributions import Binomial, Independent, Normal
from tqdm import trange

from glf_fast import CouplingFlow

LATENT = 8


class VAE(nn.Module):
    """A VAE with a diagonal normal q(z | x), a binomial p(x | z) with 16 levels, and p(z) a flow or N(0, I)."""

    def __init__(self, flow: CouplingFlow | None) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, 256), nn.ReLU(), nn.Linear(256, 64))
        self.flow = flow

    def prior(self) -> torch.distributions.Distribution:
        """The prior p(z)."""
        if self.flow is not None:
            return self.flow.distribution()
        return Independent(Normal(torch.zeros(LATENT), torch.ones(LATENT)), 1)

    def decode(self, z: torch.Tensor) -> Independent:
        """The likelihood p(x | z)."""
        return Independent(Binomial(16, logits=self.decoder(z), validate_args=False), 1, validate_args=False)

    def elbo(self, x: torch.Tensor) -> torch.Tensor:
        """A lower bound of log p(x) in nats, (B,)."""
        mean, log_std = self.encoder(x / 16).chunk(2, 1)
        posterior = Independent(Normal(mean, log_std.exp()), 1)
        z = posterior.rsample()
        return self.decode(z).log_prob(x) + self.prior().log_prob(z) - posterior.log_prob(z)


def train(flow: CouplingFlow | None, x: torch.Tensor, test: torch.Tensor, epochs: int, name: str) -> tuple[VAE, float]:
    """A trained VAE, and its ELBO on the test images."""
    model = VAE(flow)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, fused=True)
    progress = trange(epochs, desc=name)
    for _ in progress:
        for batch in x[torch.randperm(len(x))].split(128):
            loss = -model.elbo(batch).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        progress.set_postfix(elbo=f"{-loss.item():.2f}")
    with torch.no_grad():
        return model.eval(), torch.stack([model.elbo(test).mean() for _ in range(20)]).mean().item()


def picture(models: dict[str, VAE], path: Path) -> None:
    """A grid of samples of each model."""
    figure, axes = plt.subplots(1, len(models), figsize=(4.5 * len(models), 4.8))
    for axis, (name, model) in zip(axes, models.items(), strict=True):
        images = nn.functional.pad(model.decode(model.prior().sample((64,))).mean.reshape(8, 8, 8, 8), (2, 2, 2, 2))
        axis.imshow(images.permute(0, 2, 1, 3).reshape(96, 96).detach().numpy(), cmap="gray_r")
        axis.set_title(f"samples, prior: {name}")
        axis.axis("off")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    matplotlib.use("Agg")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    x = torch.tensor(load_digits().data, dtype=torch.float32)[torch.randperm(1797)]
    epochs, models, bounds = (2 if arguments.quick else 150), {}, {}
    for name, flow in {"N(0, I)": None, "a flow": CouplingFlow(LATENT, steps=6, hidden=(64, 64))}.items():
        models[name], bounds[name] = train(flow, x[:1500], x[1500:], epochs, f"prior: {name}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    picture(models, arguments.out / "vae_flow_prior.png")
    print(f"ELBO of the test images: {bounds['N(0, I)']:.2f} nats with N(0, I), {bounds['a flow']:.2f} with a flow")
    print(
        f"gained: {bounds['a flow'] - bounds['N(0, I)']:.2f} nats an image; see {arguments.out / 'vae_flow_prior.png'}"
    )


if __name__ == "__main__":
    main()
