import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from glf_fast.errors import UserError
from glf_fast.models import build
from glf_fast.models.glann import GLANN


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model() -> GLANN:
    torch.manual_seed(0)
    settings = {"latent_dim": 3, "width": 4, "hidden": 16, "items": 40, "matched": 64, "noise_dim": 5}
    built = build("glann", {"shape": [1, 8, 8], **settings})
    assert isinstance(built, GLANN)
    return built


def test_each_image_has_its_code_on_the_sphere(model: GLANN, images: Tensor) -> None:
    index = torch.arange(39, 7, -1)
    loss = model(images, None, index=index)["loss"]
    expected = (model.decoder(normalize(model.codes.weight[index])) - images).square().sum() / 32
    torch.testing.assert_close(loss, expected)
    loss.backward()
    gradient = model.codes.weight.grad
    assert gradient is not None and not gradient[:8].any() and gradient[8:].any(1).all()
    # A step along a code does not move the point on the sphere.
    assert (gradient * model.codes.weight).sum(1).abs().max() < 1e-5 * gradient.norm(dim=1).max()


def test_matching_is_the_distance_to_the_nearest(model: GLANN, images: Tensor) -> None:
    source = seeded()
    found = model(images, seeded(), 1)["matching"]
    codes = normalize(model.codes.weight[torch.randint(40, (64,), generator=source)])
    mapped = model.mapping(torch.randn(128, 5, generator=source))
    expected = sum(min((z - t).square().sum().item() for t in mapped) for z in codes) / 64
    assert found.item() == pytest.approx(expected, rel=1e-4)
    found.backward()
    assert model.codes.weight.grad is None and model.mapping[0].weight.grad is not None


def test_samples_have_the_distribution_of_the_codes(model: GLANN, images: Tensor) -> None:
    """Codes in a narrow cap of the sphere and, three times as many, in the opposite one."""
    poles = torch.tensor([[1.0, 0.0, 0.0]] * 10 + [[-1.0, 0.0, 0.0]] * 30)
    with torch.no_grad():
        model.codes.weight.copy_(poles + 0.1 * torch.randn(40, 3, generator=seeded()))
    optimizer = torch.optim.Adam(model.mapping.parameters(), lr=1e-2)
    for step in range(300):
        optimizer.zero_grad()
        model(images, seeded(step), 1)["matching"].backward()
        optimizer.step()
    decoded: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, args: decoded.append(args[0]))
    model.sample(1000, generator=seeded())
    codes = torch.cat(decoded)
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(1000))
    assert (codes[:, 0].abs() > 0.9).float().mean() > 0.8
    assert 0.15 < (codes[:, 0] > 0.9).float().mean() < 0.35


def test_the_number_of_codes_is_among_the_settings(model: GLANN) -> None:
    assert model.config["items"] == 40 and model.codes.weight.shape == (40, 3)
    untrained = build("glann", {"shape": [1, 8, 8], "latent_dim": 3, "width": 4, "hidden": 16})
    assert untrained.sample(2).shape == (2, 1, 8, 8)
    with pytest.raises(UserError, match="items = -1 must be 0 or more"):
        build("glann", {"shape": [1, 8, 8], "items": -1})
