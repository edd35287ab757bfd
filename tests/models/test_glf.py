import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from glf_fast.errors import UserError
from glf_fast.models import GLF, build, names

Build = Callable[..., GLF]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(model: nn.Module, scalar: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    scalar.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("flow", "reconstruction"),
    [
        ({"steps": 2, "hidden": [8]}, "mse"),
        ({"steps": 2, "hidden": [8]}, "bce"),
        ({"kind": "rnvp", "blocks": 2, "hidden": 8}, "l1"),
        ({"steps": 2, "hidden": [8], "coupling": "spline", "bins": 4, "bound": 8.0}, "mse"),
        ({"kind": "autoregressive", "steps": 2, "hidden": [8]}, "mse"),
        ({"kind": "autoregressive", "steps": 2, "hidden": [8], "coupling": "spline", "bins": 4, "bound": 8.0}, "mse"),
    ],
)
def test_training_lowers_both_losses(small_glf: Build, images: Tensor, reconstruction: str, flow: dict) -> None:
    model = small_glf(reconstruction=reconstruction, flow=flow, latent_noise=0.05)
    settings = [{"params": group, "lr": 1e-2} for group in model.parameter_groups().values()]
    optimizer = torch.optim.Adam(settings)
    start = model.losses(images, seeded())
    for step in range(60):
        optimizer.zero_grad()
        losses = model(images, seeded(step))
        losses["loss"].backward()
        optimizer.step()
    entropy = 0.0
    if reconstruction == "bce":  # the least that a cross-entropy can be
        entropy = torch.nn.functional.binary_cross_entropy(images, images, reduction="sum").item() / len(images)
    assert losses["reconstruction"].item() - entropy < 0.5 * (start["reconstruction"].item() - entropy)
    assert losses["nll"] < start["nll"] or losses["nll"] < 6  # codes spread from 0, so the likelihood chases them


def test_stopped_gradient_splits_the_model_in_two(small_glf: Build, images: Tensor) -> None:
    model = small_glf(beta=3.0)
    losses = model.losses(images)
    torch.testing.assert_close(losses["loss"], 3 * losses["reconstruction"] + losses["nll"])
    whole = gradients(model, losses["loss"])
    reconstruction = gradients(model, model.losses(images)["reconstruction"])
    nll = gradients(model, model.losses(images)["nll"])
    assert {name.split(".")[0] for name in reconstruction} == {"encoder", "decoder"}
    assert {name.split(".")[0] for name in nll} == {"flow"}
    assert whole.keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in whole.items():
        expected = 3 * reconstruction[name] if name in reconstruction else nll[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_regularised_glf_trains_the_encoder_by_the_likelihood(small_glf: Build, images: Tensor) -> None:
    nll = gradients(small_glf(stop_gradient=False), small_glf(stop_gradient=False).losses(images)["nll"])
    assert nll == {}  # another model's loss: the check below is not vacuous
    model = small_glf(stop_gradient=False)
    nll = gradients(model, model.losses(images)["nll"])
    assert {name.split(".")[0] for name in nll} == {"encoder", "flow"}
    assert nll["encoder.head.weight"].abs().max() > 0


@pytest.mark.parametrize(("stop_gradient", "scale"), [(True, 1.0), (True, 50.0), (False, 1.0), (False, 50.0)])
def test_unit_of_the_latent_noise(small_glf: Build, images: Tensor, stop_gradient: bool, scale: float) -> None:
    model = small_glf(stop_gradient=stop_gradient, latent_noise=0.1)
    with torch.no_grad():
        model.encoder.head.weight *= scale
    decoded: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, args: decoded.append(args[0]))
    x = images.repeat(100, 1, 1, 1)
    model.losses(x, seeded())
    z = model.encode(x)
    noise = (decoded[0] - z).std(0)
    unit = z.std(0) if stop_gradient else torch.ones(4)
    torch.testing.assert_close(noise, 0.1 * unit, rtol=0.1, atol=0)


def test_random_numbers_come_from_the_generator(small_glf: Build, images: Tensor) -> None:
    model = small_glf(latent_noise=0.3)
    model.losses(images)  # the flow's start
    before = torch.get_rng_state()
    losses = [model.losses(images, seeded(s))["reconstruction"].item() for s in (0, 0, 1)]
    samples = [model.sample(3, generator=seeded(s)) for s in (0, 0, 1)]
    model.reconstruct(images)
    model.interpolate(images, images, 3)
    small_glf(latent_noise=0.0).losses(images)
    assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])


@pytest.fixture
def trained(small_glf: Build, images: Tensor) -> GLF:
    """In training mode, with batch norms that are far from their running statistics."""
    model = small_glf(flow={"kind": "rnvp", "blocks": 1, "hidden": 8}, latent_noise=0.2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=seeded())
    model.losses(images)
    return model


def test_sampling_leaves_the_model_as_it_was(trained: GLF, images: Tensor) -> None:
    trained.decoder.eval()
    modes = [module.training for module in trained.modules()]
    state = copy.deepcopy(trained.state_dict())
    for mode in ("", "authors", "denoised"):
        x = trained.sample(7, generator=seeded(), mode=mode)
        assert x.shape == (7, 1, 8, 8) and x.min() >= 0 and x.max() <= 1 and not x.requires_grad
    trained.reconstruct(images)
    trained.interpolate(images, images, 2)
    assert [module.training for module in trained.modules()] == modes
    assert all(m.track_running_stats for m in trained.modules() if hasattr(m, "track_running_stats"))
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_samples_are_decoded_base_noise(trained: GLF) -> None:
    noise = torch.randn(5, 4, generator=seeded())
    samples = trained.sample(5, temperature=0.7, generator=seeded())
    trained.eval()
    expected = trained.decode(trained.flow.inverse(0.7 * noise)[0])
    torch.testing.assert_close(samples, expected)
    # In eval mode a sample does not depend on its neighbours.
    torch.testing.assert_close(trained.decode(trained.flow.inverse(0.7 * noise[:2])[0]), samples[:2])


def test_samples_in_any_number(trained: GLF) -> None:
    assert trained.sample(0).shape == (0, 1, 8, 8)
    assert trained.sample(1001, generator=seeded()).shape == (1001, 1, 8, 8)
    still = trained.sample(3, temperature=0.0)
    assert torch.equal(still[0], still[2])
    with pytest.raises(ValueError, match="n must be ≥ 0"):
        trained.sample(-1)


def test_authors_protocol(trained: GLF) -> None:
    """Batch statistics in flow and decoder, then every image stretched to [0, 1]."""
    samples = trained.sample(6, generator=seeded(), mode="authors")
    reference = copy.deepcopy(trained).train()
    x = reference.decode(reference.flow.inverse(torch.randn(500, 4, generator=seeded()))[0])[:6]
    low, high = x.flatten(1).min(1).values.view(-1, 1, 1, 1), x.flatten(1).max(1).values.view(-1, 1, 1, 1)
    torch.testing.assert_close(samples, (x - low) / (high - low))
    assert (samples.flatten(1).min(1).values == 0).all() and (samples.flatten(1).max(1).values == 1).all()
    assert (samples - trained.sample(6, generator=seeded())).abs().max() > 0.05


@pytest.mark.parametrize("n", [0, 1, 501])
def test_authors_protocol_takes_any_number(n: int, trained: GLF) -> None:
    samples = trained.sample(n, generator=seeded(), mode="authors")
    assert samples.shape == (n, 1, 8, 8) and samples.isfinite().all()
    torch.testing.assert_close(samples[:1], trained.sample(6, generator=seeded(), mode="authors")[: min(n, 1)])


def test_authors_protocol_does_not_start_the_flow(small_glf: Build) -> None:
    model = small_glf()
    model.sample(8, mode="authors")
    assert not model.flow.actnorm_initialized.any()


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_denoised_codes_are_the_posterior_mean(small_glf: Build, stop_gradient: bool) -> None:
    """Of a normal distribution: E[z | z̃] = z̃ − N·S⁻¹·(z̃ − μ), with the covariances N of the noise and S of noisy codes."""
    model = small_glf(stop_gradient=stop_gradient, latent_noise=0.5)
    model.flow(torch.randn(64, 4, generator=seeded()) * torch.tensor([0.5, 1.0, 2.0, 4.0]) + 1.0)  # starts the ActNorms
    model = model.double().eval()  # the couplings of a flow that was not trained are the identity
    matrix = torch.func.jacfwd(lambda z: model.flow(z[None])[0][0])(torch.zeros(4, dtype=torch.float64))
    covariance = torch.linalg.inv(matrix.mT @ matrix)
    mean = model.flow.inverse(torch.zeros(1, 4, dtype=torch.float64))[0]
    # Noise of standard deviation σ; with stop_gradient of σ·s, where s² + σ²·s² is the variance of noisy codes.
    noise = covariance.diagonal() * 0.25 / 1.25 if stop_gradient else torch.full((4,), 0.25, dtype=torch.float64)
    z = model.flow.sample(300, generator=seeded())
    expected = -noise * torch.linalg.solve(covariance, (z - mean).mT).mT
    step = model.denoised(z) - z
    # The variance of 4,096 codes has a standard error of 2 %.
    torch.testing.assert_close(step, expected, rtol=0.08 if stop_gradient else 1e-6, atol=1e-7)
    torch.testing.assert_close(model.denoised(z[:2]) - z[:2], step[:2])
    assert not step.requires_grad and model.denoised(z[:0]).shape == (0, 4)
    torch.testing.assert_close(model.sample(300, generator=seeded(), mode="denoised"), model.decode(model.denoised(z)))


def test_without_latent_noise_there_is_nothing_to_remove(small_glf: Build) -> None:
    with pytest.raises(UserError, match=r"trained with latent noise \(model.latent_noise > 0\)"):
        small_glf().sample(3, mode="denoised")


def test_interpolation_goes_from_one_reconstruction_to_the_other(small_glf: Build, images: Tensor) -> None:
    model = small_glf()
    model.losses(images)
    way = model.interpolate(images[:5], images[5:10], 7)
    assert way.shape == (5, 7, 1, 8, 8)
    torch.testing.assert_close(way[:, 0], model.reconstruct(images[:5]), atol=1e-5, rtol=0)
    torch.testing.assert_close(way[:, -1], model.reconstruct(images[5:10]), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.interpolate(images[5:10], images[:5], 7), way.flip(1), atol=1e-5, rtol=0)
    same = model.interpolate(images[:2], images[:2], 3)
    torch.testing.assert_close(same[:, 1], model.reconstruct(images[:2]), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="steps counts both ends"):
        model.interpolate(images, images, 1)


def test_perceptual_network_is_no_part_of_the_model(small_glf: Build) -> None:
    model = small_glf(reconstruction="perceptual")
    assert model.state_dict().keys() == small_glf().state_dict().keys()


def test_nll_vs_normal_is_what_a_flow_gains(small_glf: Build, images: Tensor) -> None:
    """Against a normal distribution whose likelihood torch.distributions computes; no matter how codes are scaled."""
    model = small_glf(flow={"steps": 1, "hidden": [8], "actnorm": False})
    losses, z = model.losses(images), model.encode(images)
    normal = torch.distributions.Normal(z.mean(0), z.std(0, correction=0))
    expected = losses["nll"] + normal.log_prob(z).sum(1).mean()
    torch.testing.assert_close(losses["nll_vs_normal"], expected, rtol=1e-4, atol=1e-4)
    assert not losses["nll_vs_normal"].requires_grad
    started = [small_glf(), small_glf()]
    with torch.no_grad():
        started[1].encoder.head.weight *= 50
    values = [m.losses(images) for m in started]  # each flow starts with the scale of its codes
    torch.testing.assert_close(values[0]["nll_vs_normal"], values[1]["nll_vs_normal"], rtol=1e-3, atol=1e-3)
    assert (values[0]["nll"] - values[1]["nll"]).abs() > 10


def test_registry(small_glf: Build) -> None:
    assert "glf" in names()
    model = build("glf", {"shape": [1, 8, 8], "latent_dim": 4, "hidden": 16})
    assert isinstance(model, GLF)
    assert build("glf", model.config).config == model.config
    assert model.config["flow"]["kind"] == "coupling" and "clamp" not in model.config["flow"]


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("glff", {}, "no model 'glff'; did you mean 'glf'"),
        ("glf", {}, "has no shape"),
        ("glf", {"shape": [1, 8, 8], "latent_din": 4}, "unknown key 'latent_din'; did you mean 'latent_dim'"),
        ("glf", {"shape": [1, 9, 8]}, "multiples of 4"),
        ("glf", {"shape": [1, 8, 8], "latent_noise": -1.0}, "latent_noise = -1.0 must be 0 or more"),
        ("glf", {"shape": [1, 8, 8], "reconstruction": "vgg"}, 'reconstruction = "vgg" must be one of'),
        (
            "glf",
            {"shape": [1, 8, 8], "flow": {"kind": "glow"}},
            'flow.kind = "glow" must be one of "coupling", "autoregressive", "rnvp"',
        ),
        ("glf", {"shape": [1, 8, 8], "flow": {"depth": 3}}, "'flow.depth'"),
        ("glf", {"shape": [1, 8, 8], "flow": {"kind": "rnvp", "steps": 3}}, "flow.steps = 3 has no effect"),
    ],
)
def test_wrong_settings_are_named(name: str, config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(name, config)


def test_the_last_epochs_may_train_the_flow_alone(small_glf: Callable[..., GLF], images: Tensor) -> None:
    assert len(small_glf().stages()) == 1
    model = small_glf(flow_epochs=3).eval()
    _, stage = model.stages()
    assert stage.epochs == 3 and stage.inputs is not None and [phase.moves for phase in stage.phases] == [("flow",)]
    with torch.no_grad():
        alone = model(stage.inputs(images), None, 1)
        both = model.losses(images)
    assert alone == {name: both[name] for name in ("nll", "nll_vs_normal")}
