import pytest
import torch
from torch import Tensor

from glf_fast.models import build
from glf_fast.models.wae import WAE, squared_mmd


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kernel(x: Tensor, y: Tensor) -> float:
    """The sum of the released code's kernels, of two vectors."""
    squared = sum((a - b) ** 2 for a, b in zip(x.tolist(), y.tolist(), strict=True))
    constants = [2 * len(x) * scale for scale in (0.1, 0.2, 0.5, 1, 2, 5, 10)]
    return sum(c / (c + squared) for c in constants)


def test_mmd_is_the_double_loop() -> None:
    z, e = (torch.randn(n, 3, generator=seeded(n), dtype=torch.float64) for n in (5, 4))
    expected = 0.0
    for rows in (z, e):
        pairs = [kernel(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        expected += sum(pairs) / len(pairs)
    expected -= 2 * sum(kernel(a, b) for a in z for b in e) / (len(z) * len(e))
    assert squared_mmd(z, e).item() == pytest.approx(expected, rel=1e-12)
    assert squared_mmd(z.float(), e.float()).item() == pytest.approx(expected, abs=2e-6)


def expectation(variance: float, dim: int) -> float:
    """E k(x, y) where x − y ~ N(0, `variance`·I): C / (C + q) = ∫ exp(−t·(1 + q/C)) dt, and E exp(−t·q/C) is a power."""
    t = torch.linspace(0, 60, 600_001, dtype=torch.float64)
    value = 0.0
    for scale in (0.1, 0.2, 0.5, 1, 2, 5, 10):
        powers = (1 + 2 * t * variance / (2 * dim * scale)) ** (-dim / 2)
        value += torch.trapezoid((-t).exp() * powers, t).item()
    return value


@pytest.mark.parametrize("deviation", [1.0, 0.5, 2.0])
def test_mmd_is_unbiased(deviation: float) -> None:
    """Against the MMD² of N(0, s²·I) and N(0, I), one integral for each kernel; 0 for equal laws."""
    dim, draws = 4, 2000
    exact = expectation(2 * deviation**2, dim) + expectation(2.0, dim) - 2 * expectation(deviation**2 + 1, dim)
    assert abs(exact) < 1e-9 if deviation == 1 else exact > 0.05
    source = seeded()
    noise = torch.randn(draws, 2, 16, dim, generator=source, dtype=torch.float64)
    found = torch.vmap(squared_mmd)(deviation * noise[:, 0], noise[:, 1])
    error = (found.std() / draws**0.5).item()
    assert error < 0.01
    assert found.mean().item() == pytest.approx(exact, abs=4 * error)
    if deviation == 1:
        assert (found < 0).any(), "an estimate that is never negative is biased"


def test_losses_are_the_formula(images: Tensor) -> None:
    settings = {"latent_dim": 4, "width": 4, "hidden": 16}
    torch.manual_seed(0)
    model = build("wae-mmd", {"shape": [1, 8, 8], **settings, "mmd_weight": 7.0})
    assert isinstance(model, WAE)
    losses = model.losses(images, seeded())
    z = model.encode(images)
    error = (model.decoder(z) - images).square().sum() / 32
    penalty = squared_mmd(z, torch.randn(32, 4, generator=seeded()))
    torch.testing.assert_close(losses["loss"], error + 7 * penalty, rtol=1e-4, atol=1e-4)
    losses["mmd"].backward()
    gradient = model.encoder.head.weight.grad
    assert gradient is not None and gradient.isfinite().all() and gradient.any()
    assert model.decoder.layers[0].weight.grad is None


def test_the_penalty_makes_codes_normal(images: Tensor) -> None:
    torch.manual_seed(0)
    model = build("wae-mmd", {"shape": [1, 8, 8], "latent_dim": 2, "width": 4, "hidden": 16, "mmd_weight": 1e4})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(150):
        optimizer.zero_grad()
        model(images, seeded(step))["loss"].backward()
        optimizer.step()
    codes = model.encode(images).detach()
    assert codes.mean(0).abs().max() < 0.35 and (codes.std(0) - 1).abs().max() < 0.35
