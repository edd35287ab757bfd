"""A flow as variational posterior, trained through `rsample`; its ELBO comes close to the log evidence.

    python examples/flow_posterior.py [--quick] [--out FOLDER]

The posterior is Neal's funnel: v ~ N(0, 3²) is the log-variance of nine other numbers, x ~ N(0, e^v). Its evidence is 1 by
construction, so −ELBO is KL(q ‖ p) in nats. A normal distribution, correlated or not, cannot have the shape of a funnel.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, MultivariateNormal, Normal
from tqdm import trange

from glf_fast import CouplingFlow

DIM = 10


def log_funnel(x: Tensor) -> Tensor:
    """log p of x (B, 10), v first."""
    v = x[:, :1]
    return Normal(0.0, 3.0).log_prob(v).sum(1) + Normal(0.0, (v / 2).exp()).log_prob(x[:, 1:]).sum(1)


class NormalPosterior(nn.Module):
    """A normal distribution with a learned mean and covariance matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(DIM))
        self.lower = nn.Parameter(torch.zeros(DIM, DIM))

    def distribution(self) -> Distribution:
        scale = self.lower.tril(-1) + self.lower.diagonal().exp().diag()
        return MultivariateNormal(self.mean, scale_tril=scale)


def elbo(q: Distribution, n: int) -> Tensor:
    """E_q[log p − log q], (), from n differentiable samples; a flow gives samples and their density in one pass."""
    both = getattr(q, "rsample_and_log_prob", lambda shape: (x := q.rsample(shape), q.log_prob(x)))
    x, log_q = both((n,))
    return (log_funnel(x) - log_q).mean()


def fit(make: Callable[[], nn.Module], steps: int, name: str) -> tuple[Distribution, float]:
    """A fitted q, and its ELBO from many samples."""
    torch.manual_seed(0)
    model = make()  # a flow has a method `distribution`, like NormalPosterior
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    progress = trange(steps, desc=name)
    for _ in progress:
        loss = -elbo(model.distribution(), 256)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(elbo=f"{-loss.item():.3f}", refresh=False)
    with torch.no_grad():
        return model.distribution(), elbo(model.distribution(), 100_000).item()


def main() -> None:
    matplotlib.use("Agg")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"))
    arguments = parser.parse_args()
    steps = 20 if arguments.quick else 2500
    found = {
        "normal distribution": fit(NormalPosterior, steps, "normal distribution"),
        # No ActNorm, because it is initialised from a batch of data, and a variational posterior has no data.
        "flow": fit(lambda: CouplingFlow(DIM, steps=8, hidden=(64, 64), actnorm=False), steps, "flow"),
    }

    v = 3 * torch.randn(3000)
    samples = {"the funnel": torch.stack([v, (v / 2).exp() * torch.randn(3000)], 1)}
    samples |= {name: q.sample((3000,)) for name, (q, _) in found.items()}
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), sharex=True, sharey=True)
    for axis, (name, x) in zip(axes, samples.items(), strict=True):
        axis.scatter(x[:, 1], x[:, 0], s=2, alpha=0.5)
        axis.set(title=name, xlim=(-15, 15), ylim=(-10, 10), xlabel="x₁")
    axes[0].set_ylabel("v")
    arguments.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out / "flow_posterior.png", dpi=120, bbox_inches="tight")
    normal, flow = (bound for _, bound in found.values())
    print(f"KL(q ‖ p): {-normal:.3f} nats with the normal distribution, {-flow:.3f} nats with the flow")
    print(f"gained: {flow - normal:.3f} nats; see {arguments.out / 'flow_posterior.png'}")


if __name__ == "__main__":
    main()
