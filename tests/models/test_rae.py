"""RAE: the terms of its loss by hand and by autograd, spectral norms, and which settings have an effect."""

from pathlib import Path

import pytest
import torch
from phase_gradients import phase_gradients
from torch import Tensor, nn

from glf_fast.errors import UserError
from glf_fast.models import RAE
from glf_fast.models.rae import RAESettings
from glf_fast.models.regularizers import decode_with_penalty
from glf_fast.models.spectral import spectral_norm
from glf_fast.settings import check, table

REGULARIZERS = [
    {"regularizer": "none"},
    {"regularizer": "l2", "strength": 0.5},
    {"regularizer": "gp", "strength": 0.5},
    {"regularizer": "gp", "strength": 0.5, "gradient_penalty": "released"},
    {"regularizer": "sn"},
    {"regularizer": "sn", "spectral_encoder": True},
]
LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
every_regularizer = pytest.mark.parametrize("settings", REGULARIZERS, ids=lambda s: "-".join(map(str, s.values())))


def build(**settings: object) -> RAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return RAE.from_config({"shape": [1, 8, 8], "latent_dim": 4, "width": 4, "hidden": 16, **settings})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@every_regularizer
def test_the_loss_is_the_sum_of_its_terms(settings: dict, images: Tensor) -> None:
    model = build(beta=0.3, **settings)
    losses = model(images, seeded())
    model.train()
    z = model.encode(images)
    x_hat = model.decode(z)
    # The same again, from other words: pixel by pixel and code by code.
    error = sum((a - b) ** 2 for a, b in zip(x_hat.flatten().tolist(), images.flatten().tolist(), strict=True)) / 32
    norm = sum(v**2 for v in z.flatten().tolist()) / 32
    # Spectral norms move on by a step of the power method between the two passes.
    assert losses["reconstruction"].item() == pytest.approx(error, rel=1e-3)
    assert losses["codes"].item() == pytest.approx(norm / 2, rel=1e-3)
    total = losses["reconstruction"] + 0.3 * losses["codes"] + 0.5 * losses.get("penalty", torch.zeros(()))
    torch.testing.assert_close(losses["loss"], total)
    assert ("penalty" in losses) == (settings["regularizer"] in ("l2", "gp"))


def test_l2_is_the_squared_norm_of_the_decoders_weights(images: Tensor) -> None:
    for networks in ("infogan", "rae"):
        model = build(regularizer="l2", networks=networks, **({} if networks == "infogan" else {"hidden": 1024}))
        matrices = [p for p in model.decoder.parameters() if p.ndim > 1]
        assert len(matrices) == 4
        wanted = sum(p.detach().square().sum().item() for p in matrices)
        assert model(images)["penalty"].item() == pytest.approx(wanted, rel=1e-5)
        gradients = torch.autograd.grad(model(images)["penalty"], matrices)
        for parameter, gradient in zip(matrices, gradients, strict=True):
            torch.testing.assert_close(gradient, 2 * parameter)


def jacobian(model: RAE, z: Tensor) -> Tensor:
    """∂D(z)/∂z of a whole batch (P, B, D), through the batch norms in the model's present mode."""
    return torch.autograd.functional.jacobian(lambda z: model.decode(z).flatten(), z)


def test_the_gradient_penalty_is_the_jacobians_norm_on_average(images: Tensor) -> None:
    model = build(regularizer="gp").double()
    x = images[:4].double()
    model.train()
    z = model.encode(x).detach()
    exact = jacobian(model, z)
    with torch.no_grad():  # a penalty has a graph of its own
        x_hat, penalty = decode_with_penalty(model.decode, z, seeded(), "jacobian")
    v = torch.randn(x_hat.shape, generator=seeded(), dtype=torch.float64).flatten()
    torch.testing.assert_close(penalty, torch.einsum("p,pbd->bd", v, exact).square().sum(1).mean())
    many = torch.randn(20_000, len(v), generator=seeded(1), dtype=torch.float64) @ exact.flatten(1)
    torch.testing.assert_close(many.square().sum(1).mean(), exact.square().sum(), rtol=0.02, atol=0)


def test_the_released_penalty_is_the_gradient_of_the_squared_output(images: Tensor) -> None:
    model = build(regularizer="gp", gradient_penalty="released").double()
    x = images[:4].double()
    model.train()
    z = model.encode(x).detach()
    x_hat, penalty = decode_with_penalty(model.decode, z, None, "released")
    gradient = torch.einsum("p,pbd->bd", 2 * x_hat.flatten(), jacobian(model, z))
    torch.testing.assert_close(penalty, gradient.square().sum(1).mean())


@pytest.mark.parametrize("form", ["jacobian", "released"])
def test_gradients_of_the_penalty_reach_encoder_and_decoder_and_are_right(form: str, images: Tensor) -> None:
    model = build(regularizer="gp", gradient_penalty=form).double().eval()
    x = images[:4].double()
    weights = [model.encoder.head.weight, model.decoder.layers[0].weight, model.decoder.layers[-1].weight]
    gradients = torch.autograd.grad(model(x, seeded())["penalty"], weights)
    for weight, gradient in zip(weights, gradients, strict=True):
        direction, step, values = torch.randn(weight.shape, generator=seeded(1), dtype=torch.float64), 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * step * direction
                values.append(model(x, seeded())["penalty"].item())
                weight -= sign * step * direction
        slope = (gradient * direction).sum().item()
        assert slope != 0 and slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


def singular_values(network: nn.Module) -> list[Tensor]:
    """The singular values of each layer's weight, as a matrix with a row for each output channel."""
    return [
        torch.linalg.svdvals(layer.weight.detach().movedim(int(isinstance(layer, nn.ConvTranspose2d)), 0).flatten(1))
        for layer in network.modules()
        if isinstance(layer, LAYERS)
    ]


@pytest.mark.parametrize(("networks", "encoder"), [("infogan", True), ("rae", False)])
def test_spectral_norms_are_one_through_training(networks: str, encoder: bool, images: Tensor) -> None:
    sizes = {"width": 8, "hidden": 1024 if networks == "rae" else 32}
    model = build(regularizer="sn", spectral_encoder=encoder, networks=networks, **sizes)
    before = singular_values(model.encoder)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    average = torch.optim.swa_utils.AveragedModel(
        model, avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.8), use_buffers=True
    )
    for step in range(15):
        optimizer.zero_grad()
        model(images, seeded(step))["loss"].backward()
        optimizer.step()
        average.update_parameters(model)
    for one in (model, average.module):  # an averaged vector is shorter than 1, which must not matter
        one.eval()
        for values in singular_values(one.decoder) + (singular_values(one.encoder) if encoder else []):
            assert values[0].item() == pytest.approx(1, abs=0.02)
    if not encoder:
        assert any(abs(values[0] - 1) > 0.1 for values in before + singular_values(model.encoder))


def test_the_gradient_of_a_spectral_norm_is_right() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.ConvTranspose2d(3, 5, 2)).double()
    weight = layer[0].weight.detach().clone()
    spectral_norm(layer)
    for _ in range(300):
        layer[0].weight  # noqa: B018 - a step of the power method
    raw = layer[0].parametrizations.weight.original
    cotangent = torch.randn(weight.shape, dtype=torch.float64)
    [found] = torch.autograd.grad((layer.eval()[0].weight * cotangent).sum(), raw)
    exact = weight.requires_grad_()
    sigma = torch.linalg.matrix_norm(exact.movedim(1, 0).flatten(1), 2)
    [wanted] = torch.autograd.grad((exact / sigma * cotangent).sum(), exact)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)


@every_regularizer
def test_every_kind_trains_saves_and_loads(settings: dict, images: Tensor, tmp_path: Path) -> None:
    weak = {"strength": 1e-3} if "strength" in settings else {}
    model = build(beta=1e-3, **{**settings, **weak})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = model(images, seeded())["reconstruction"].item()
    for step in range(30):
        optimizer.zero_grad()
        losses = model(images, seeded(step))
        losses["loss"].backward()
        optimizer.step()
    assert losses["reconstruction"].item() < 0.8 * first
    model.save_pretrained(tmp_path)
    loaded = RAE.from_pretrained(tmp_path)
    assert loaded.settings == model.settings
    for mode in ("", "prior"):
        assert torch.equal(
            model.sample(5, generator=seeded(), mode=mode), loaded.sample(5, generator=seeded(), mode=mode)
        )
    full, model = model.eval(), loaded
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images, seeded())
    for name, value in full(images, seeded()).items():
        assert low[name].dtype == torch.float32
        torch.testing.assert_close(low[name], value, rtol=0.1, atol=0.1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # asked for by dynamo itself
def test_torch_compile_gives_the_gradients_of_spectral_norms(images: Tensor) -> None:
    torch.compiler.reset()  # the gradient penalty is compiled in test_models.py
    model = build(regularizer="sn").eval()
    compiled = torch.compile(model, backend="aot_eager")
    expected, found = (phase_gradients(call, model, images, 0) for call in (model, compiled))
    assert set(found) == set(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_codes_come_from_the_density_or_from_the_prior(images: Tensor) -> None:
    model = build()
    model(images)
    model.eval()
    with torch.no_grad():
        codes = 100 + model.encode(images)
        model.stages()[1].fit(codes)
        drawn, prior = (model.sample_codes(500, generator=seeded(), mode=mode) for mode in ("", "prior"))
    torch.testing.assert_close(drawn.mean(0), codes.mean(0), atol=0.2, rtol=0)
    torch.testing.assert_close(prior, torch.randn(500, 4, generator=seeded()))
    plain = build(density={"kind": "none"})
    assert len(plain.stages()) == 1 and torch.equal(plain.sample_codes(500, generator=seeded()), prior)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regularizer": "sn", "strength": 1.0}, 'strength = 1.0 has no effect with regularizer = "sn"'),
        (
            {"regularizer": "l2", "gradient_penalty": "released"},
            'gradient_penalty .* no effect with regularizer = "l2"',
        ),
        ({"regularizer": "gp", "spectral_encoder": True}, 'spectral_encoder .* no effect with regularizer = "gp"'),
        ({"networks": "rae", "hidden": 5}, 'hidden = 5 has no effect with networks = "rae"'),
        ({"beta": -1.0}, "beta = -1.0 must be 0 or more"),
    ],
)
def test_settings_without_effect_are_errors(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(RAESettings(**settings))


def test_effective_settings_survive_a_table() -> None:
    keys = table(RAESettings(regularizer="none", networks="rae")).keys()
    assert not {"strength", "gradient_penalty", "spectral_encoder", "hidden"} & keys and "networks" in keys
    assert table(RAESettings())["density"] == {"kind": "mixture", "components": 10}
