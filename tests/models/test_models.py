"""What every model must do, for each one in the registry."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from phase_gradients import compare_in_a_group, phase_gradients
from several_processes import finished
from torch import Tensor
from toy_models import Adversarial, AdversarialSettings

from glf_fast import models
from glf_fast.errors import UserError
from glf_fast.grammar import EXPRESSIONS, Grammar, read, sentences
from glf_fast.models import Encodes, GenerativeModel, HasLikelihood, Interpolates, Reconstructs

# Sequences: expressions of up to 13 characters.
VOCABULARY = (" ", *Grammar.of(EXPRESSIONS).characters)
SEQUENCE = {
    "latent_dim": 4,
    "channels": [4],
    "kernels": [2],
    "dense": 16,
    "units": 8,
    "layers": 1,
    "vocabulary": list(VOCABULARY),
}
# A row for each model: settings that make it small, and how much 60 steps lower its loss, or a part of it, on 32 images.
SMALL = {
    "glf": (
        {"latent_dim": 4, "width": 4, "hidden": 16, "latent_noise": 0.05, "flow": {"steps": 2, "hidden": [8]}},
        "reconstruction",
        0.5,
    ),
    "vae": ({"latent_dim": 4, "width": 4, "hidden": 16}, "reconstruction", 0.7),
    "rae": ({"latent_dim": 4, "width": 4, "hidden": 16, "regularizer": "gp"}, "reconstruction", 0.7),
    "glann": ({"latent_dim": 4, "width": 4, "hidden": 16, "items": 32, "matched": 8}, "reconstruction", 0.6),
    "wae-mmd": ({"latent_dim": 4, "width": 4, "hidden": 16, "mmd_weight": 1.0}, "reconstruction", 0.5),
    "flow-vae": (
        {"latent_dim": 4, "width": 4, "hidden": 16, "posterior": "flow", "flow": {"steps": 2, "hidden": [8]}},
        "reconstruction",
        0.7,
    ),
    "two-stage-vae": (
        {"latent_dim": 4, "width": 4, "hidden": 16, "second_stage": {"hidden": [8, 8]}},
        "reconstruction",
        0.7,
    ),
    "glow": ({"levels": 2, "steps": 1, "width": 8}, "bits_per_dim", 0.85),
    "wae-gan": (
        {"latent_dim": 4, "width": 4, "hidden": 16, "code_weight": 1.0, "code_hidden": [8]},
        "reconstruction",
        0.5,
    ),
    "alpha-gan": (
        {
            "latent_dim": 4,
            "width": 4,
            "networks": "infogan",
            "hidden": 16,
            "code_hidden": [8],
            "reconstruction_weight": 50.0,
        },
        "reconstruction",
        0.8,
    ),
    "dcgan": ({"latent_dim": 4, "width": 4}, "discriminator_loss", 0.9),
    "wgan-gp": ({"latent_dim": 4, "width": 4}, "discriminator_loss", 0.5),
    "grammar-rae": (SEQUENCE | {"grammar": EXPRESSIONS, "regularizer": "gp"}, "reconstruction", 0.8),
    "grammar-vae": (SEQUENCE | {"grammar": EXPRESSIONS}, "reconstruction", 0.8),
    "character-vae": (SEQUENCE, "reconstruction", 0.8),
}
Build = Callable[[], GenerativeModel]


def of_sequences(name: str) -> bool:
    return name in SMALL and "tokens" in models.kind(name).takes


def small(name: str) -> GenerativeModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return models.build(name, {"shape": [13] if of_sequences(name) else [1, 8, 8], **SMALL[name][0]})


def prepared(model: GenerativeModel, x: Tensor) -> Tensor:
    """The inputs of the first stage."""
    inputs = model.stages()[0].inputs
    if inputs is None:
        return x
    with model.evaluating():
        return inputs(x)


@pytest.fixture(scope="session")
def expressions() -> Tensor:
    """32 expressions (32, 13), shuffled."""
    texts = ["".join(terminals) for terminals, _ in sentences(Grammar.of(EXPRESSIONS), 5)]
    chosen = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    return read([texts[i] for i in chosen.tolist() if len(texts[i]) <= 13][:32], 13, VOCABULARY, 0)


@pytest.fixture
def images(request: pytest.FixtureRequest, images: Tensor, expressions: Tensor) -> Tensor:
    """Data of the model: 32 images, or 32 expressions."""
    name = request.getfixturevalue("name") if "name" in request.fixturenames else ""
    return expressions if of_sequences(name) else images


def test_every_model_has_a_row() -> None:
    assert set(SMALL) == set(models.names())


@pytest.fixture(params=SMALL)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str) -> GenerativeModel:
    return small(name)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def train(model: GenerativeModel, images: Tensor, steps: int) -> list[dict[str, Tensor]]:
    """The losses of steps as the trainer makes them: phase after phase, each with an Adam for its groups."""
    groups = model.parameter_groups()
    optimizers = {name: torch.optim.Adam(parameters, lr=1e-2) for name, parameters in groups.items()}
    history, images = [], prepared(model, images)
    for step in range(steps):
        losses = {}
        for i, phase in enumerate(model.stages()[0].phases):
            found = model(images, seeded(step), 0, i)
            model.zero_grad()
            found[phase.minimises].backward()
            for group in phase.moves:
                optimizers[group].step()
            losses |= found
        history.append(losses)
    return history


def test_training_lowers_what_it_is_to_lower(name: str, model: GenerativeModel, images: Tensor) -> None:
    _, term, factor = SMALL[name]
    history = train(model, images, 60)
    assert history[-1][term] < factor * history[0][term]
    logged = set(history[0])
    for i, stage in enumerate(model.stages()[1:], 1):
        with model.evaluating():
            inputs = images if stage.inputs is None else stage.inputs(images)
        logged |= {loss for j in range(len(stage.phases)) for loss in model(inputs, seeded(), i, j)}
    assert set(model.words.curves or {}) <= logged, "the report draws what is logged"


def test_groups_hold_every_parameter_once_and_phases_move_them_all(model: GenerativeModel) -> None:
    groups = model.parameter_groups()
    assert tuple(groups) == model.groups
    assert sorted(id(p) for group in groups.values() for p in group) == sorted(id(p) for p in model.parameters())
    moved = {group for stage in model.stages() for phase in stage.phases for group in phase.moves}
    assert moved == set(groups) or any(stage.fit for stage in model.stages())


def test_random_numbers_come_from_the_generator(model: GenerativeModel, images: Tensor) -> None:
    inputs = prepared(model, images)
    model(inputs, seeded())  # a data-dependent start
    before = torch.get_rng_state()
    losses = [model(inputs, seeded(seed))[model.phases()[0].minimises].item() for seed in (0, 0)]
    samples = [model.sample(3, generator=seeded(seed)) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1]
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])


def test_use_leaves_the_model_as_it_was(model: GenerativeModel, images: Tensor) -> None:
    model(prepared(model, images), seeded())
    model.train()
    list(model.modules())[-1].eval()
    modes, state = [module.training for module in model.modules()], copy.deepcopy(model.state_dict())
    made = [model.sample(7, generator=seeded(), mode=mode) for mode in ("", *model.sampling_modes)]
    if isinstance(model, Reconstructs):
        made.append(model.reconstruct(images[:7]))
    if isinstance(model, Interpolates):
        made += list(model.interpolate(images[:7], images[7:14], 3).unbind(1))
    if isinstance(model, HasLikelihood):
        density = model.log_likelihood(images[:7], seeded())
        assert density.shape == (7,) and density.isfinite().all() and not density.requires_grad
        assert torch.equal(density, model.log_likelihood(images[:7], seeded()))
    for x in made:
        if x.is_floating_point():
            assert x.shape == (7, 1, 8, 8) and x.min() >= 0 and x.max() <= 1 and not x.requires_grad
        else:  # sequences may be longer than those of the data
            assert x.shape[0] == 7 and x.shape[1] >= 13 and x.min() >= 0 and x.max() < len(VOCABULARY)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert model.sample(0).shape == (0, *made[0].shape[1:])


def test_unknown_sampling_modes_are_named(model: GenerativeModel) -> None:
    with pytest.raises(UserError, match="has no sampling mode 'priors'"):
        model.sample(2, mode="priors")


def test_double_precision_is_kept(model: GenerativeModel, images: Tensor) -> None:
    model.double()
    if not images.is_floating_point():
        losses = model(prepared(model, images), seeded())
        assert all(value.dtype == torch.float64 for value in losses.values())
        return
    x = images[:2].double()
    made = [model.sample(2)]
    if isinstance(model, Reconstructs):
        made.append(model.reconstruct(x))
    if isinstance(model, Interpolates):
        made.append(model.interpolate(x[:1], x[1:], 3))
    assert all(x.dtype == torch.float64 for x in made)


def test_temperature_zero_leaves_no_variety(model: GenerativeModel, images: Tensor) -> None:
    model(prepared(model, images), seeded())
    still = model.sample(3, temperature=0.0)
    torch.testing.assert_close(still[0], still[2])


def test_interpolation_goes_from_one_reconstruction_or_image_to_the_other(
    model: GenerativeModel, images: Tensor
) -> None:
    if not isinstance(model, Interpolates):
        assert not hasattr(model, "interpolate")
        return
    model(prepared(model, images), seeded())
    way = model.interpolate(images[:5], images[5:10], 7)
    ends = model.reconstruct(images[:10]) if isinstance(model, Reconstructs) else images[:10]
    torch.testing.assert_close(way[:, 0], ends[:5], atol=1e-5, rtol=0)
    torch.testing.assert_close(way[:, -1], ends[5:], atol=1e-5, rtol=0)


def test_codes_have_no_randomness(model: GenerativeModel, images: Tensor) -> None:
    if not isinstance(model, Encodes):
        assert not hasattr(model, "encode")
        return
    model(prepared(model, images), seeded())
    codes = [model.eval().encode(images) for _ in range(2)]
    numbers = SMALL[model.settings.name][0].get("latent_dim", 64)  # Glow has as many as an image
    assert codes[0].flatten(1).shape == (32, numbers)
    assert torch.equal(*codes) and codes[0].std(0).min() > 0
    with pytest.raises(ValueError, match="x must have shape"):
        model.encode(images[..., :4])


def started(name: str, images: Tensor) -> GenerativeModel:
    """A model after its data-dependent start, whose batch norms use what they saw then; "adversarial" has two phases."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "adversarial":
            return Adversarial((1, 8, 8), AdversarialSettings())
    model = small(name)
    model(prepared(model, images), seeded())
    return model.eval()


def test_data_parallel_processes_have_the_gradients_of_whole_batches_in_every_phase(
    images: Tensor, expressions: Tensor, tmp_path: Path
) -> None:
    every = [(name, expressions if of_sequences(name) else images) for name in (*SMALL, "adversarial")]
    pairs = [(model := started(name, x), prepared(model, x)) for name, x in every]
    torch.save(pairs, tmp_path / "models.pt")
    finished(2, compare_in_a_group, tmp_path / "models.pt")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # asked for by dynamo itself
@pytest.mark.parametrize("name", [*SMALL, "adversarial"])
def test_torch_compile_gives_the_gradients_of_every_phase(name: str, images: Tensor) -> None:
    torch.compiler.reset()
    model = started(name, images)
    images = prepared(model, images)
    compiled = torch.compile(model, backend="aot_eager")
    for i in range(len(model.phases())):
        expected, got = phase_gradients(model, model, images, i), phase_gradients(compiled, model, images, i)
        assert set(got) == set(expected)
        for parameter, gradient in got.items():
            torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-6)


def test_saving_and_loading_keep_everything(name: str, model: GenerativeModel, images: Tensor, tmp_path: Path) -> None:
    train(model, images, 2)
    model.save_pretrained(tmp_path)
    loaded = models.kind(name).from_pretrained(tmp_path)
    assert loaded.config == model.config and loaded.settings == model.settings and not loaded.training
    samples = [m.sample(4, generator=seeded()) for m in (model, loaded)]
    assert torch.equal(*samples)


def test_autocast_changes_little(model: GenerativeModel, images: Tensor) -> None:
    inputs = prepared(model, images)
    full = model(inputs, seeded())
    with torch.autocast("cpu", torch.bfloat16):
        low = model(inputs, seeded())
    for key, value in low.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, full[key], rtol=0.02, atol=0.05)


def test_wrong_batches_are_named(model: GenerativeModel, images: Tensor) -> None:
    if of_sequences(model.settings.name):
        with pytest.raises(ValueError, match=r"x must have shape \(batch, 13\); got \(32, 4\)"):
            prepared(model, images[:, :4])
        with pytest.raises(TypeError, match=r"x must be int64 tokens; got torch.float32"):
            prepared(model, images.float())
        return
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 1, 8, 8\); got \(32, 1, 4, 8\)"):
        model(images[:, :, :4])
    with pytest.raises(TypeError, match="to_float"):
        model((255 * images).to(torch.uint8))


def test_a_wrong_model_is_named() -> None:
    with pytest.raises(ValueError, match="no model 'glff'; did you mean 'glf'"):
        models.kind("glff")
