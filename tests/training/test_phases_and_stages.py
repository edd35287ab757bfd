"""Models with several optimizers, phases and stages, through whole runs: what each part moves, and that all of it resumes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from toy_models import Adversarial, Rows, Staged

from glf_fast import data, models, sample, seeds, train
from glf_fast.errors import UserError
from glf_fast.models import GenerativeModel
from glf_fast.models.glann import GLANNSettings
from glf_fast.training import checkpoint, runs
from glf_fast.training.arguments import parse_train
from glf_fast.training.config import Config, OptimizerConfig, ScoreConfig, default, with_table
from glf_fast.training.loss_log import LossLog
from glf_fast.training.pictures import draw_pictures
from glf_fast.training.trainer import Trainer

CPU = torch.device("cpu")
DIGITS = data.load("digits", "train")
TOYS: dict[str, type[GenerativeModel]] = {"adversarial": Adversarial, "rows": Rows, "staged": Staged}
Call = Callable[..., None]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in TOYS.items():
        monkeypatch.setitem(models._MODELS, name, kind)


def config(name: str, **changes: object) -> Config:
    return dataclasses.replace(default(name), batch_size=128, **changes)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_each_phase_moves_its_groups_with_their_own_optimizer() -> None:
    optimizers = {"discriminator": OptimizerConfig(lr=1e-2), "generator": OptimizerConfig(lr=1e-3)}
    one = Trainer(config("adversarial", optimizers=optimizers), DIGITS, CPU)
    for step in range(4):
        before = weights(one)
        losses = one.step(DIGITS.images[:128])
        changed = {name.split(".")[0] for name, value in weights(one).items() if not torch.equal(value, before[name])}
        expected = {"discriminator", "generator"} if step % 2 == 0 else {"discriminator"}
        assert changed == expected == set(losses)
    steps = {name: o.state[o.param_groups[0]["params"][0]]["step"].item() for name, o in one.optimizers.items()}
    assert steps == {"discriminator": 4, "generator": 2}
    # The first step of Adam is as long as its learning rate.
    first = Trainer(config("adversarial", optimizers=optimizers), DIGITS, CPU)
    before = weights(first)
    first.step(DIGITS.images[:128])
    for group, settings in optimizers.items():
        name = f"{group}.2.bias"
        moved = (first.model.state_dict()[name] - before[name]).abs().max()
        assert moved == pytest.approx(settings.lr, rel=1e-3)


def test_watched_phases_log_the_norms_of_their_gradients_before_clipping() -> None:
    """With and without clipping; a network that the settings leave out has no optimizer, and no norm."""
    small = dataclasses.replace(default("alpha-gan").model, latent_dim=4, width=4, posterior="gaussian")
    norms = []
    for clip in (0.0, 1e-3):
        optimizers = dict.fromkeys(models.kind("alpha-gan").groups, OptimizerConfig(lr=0.0, clip=clip))
        one = Trainer(config("alpha-gan", model=small, optimizers=optimizers), DIGITS, CPU)
        losses = one.step(DIGITS.images[:128])
        norms.append({name: norm for name, norm in losses.items() if name.startswith("gradient_")})
        assert set(norms[-1]) == {"gradient_encoder", "gradient_generator", "gradient_discriminator"}
        [group] = one.optimizers["discriminator"].param_groups  # the last phase's
        left = torch.stack([p.grad.norm() for p in group["params"]]).norm()
        torch.testing.assert_close(left, torch.tensor(clip) if clip else losses["gradient_discriminator"])
    assert norms[0] == norms[1] and "code_discriminator" not in one.optimizers


def test_the_guard_says_what_helps_this_model(tmp_path: Path) -> None:
    wild = dict.fromkeys(models.kind("dcgan").groups, OptimizerConfig(lr=1e30))
    model = dataclasses.replace(default("dcgan").model, latent_dim=4, width=4)
    one, log = Trainer(config("dcgan", model=model, optimizers=wild), DIGITS, CPU), LossLog("")
    log.remedy = one.remedy
    for _ in range(3):
        log.add(one.step(DIGITS.images[:128]))
    with pytest.raises(UserError) as error:
        log.flush(one.images, 128, tmp_path / "last")
    text = str(error.value)
    assert "discriminator_accuracy = " in text and "gradient_generator = " in text and "\n" not in text
    assert "lower the learning rates" in text and "a discriminator has won where its accuracy is near 1" in text
    with pytest.raises(UserError, match=r"is not finite after 384 images; .*discriminator has won"):
        one.save(tmp_path / "last", {}, for_resuming=True)


@pytest.mark.parametrize("name", ["alpha-gan", "dcgan", "wgan-gp", "wae-gan"])
def test_adversarial_models_go_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = dataclasses.replace(default(name).model, latent_dim=4, width=4)
    one, two = (Trainer(config(name, model=model, ema=0.5), DIGITS, CPU) for _ in range(2))
    for i in range(3):
        one.step(DIGITS.images[128 * i : 128 * (i + 1)])
    one.save(tmp_path / "last", {}, for_resuming=True)
    two.restore(tmp_path / "last")
    for i in range(3, 6):
        x = DIGITS.images[128 * i : 128 * (i + 1)]
        assert one.step(x) == two.step(x)
    for trainer in (one, two):
        assert trainer.images == 6 * 128
    for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_each_phase_has_the_gradients_of_its_own_loss_alone() -> None:
    still = dict.fromkeys(("discriminator", "generator"), OptimizerConfig(lr=0.0))
    one = Trainer(config("adversarial", optimizers=still), DIGITS, CPU)
    model = one.model
    assert isinstance(model, Adversarial)
    one.step(DIGITS.images[:128])  # ends with the generator's phase, whose loss reaches the discriminator, too
    one.step(DIGITS.images[:128])  # the discriminator's phase alone
    loss = model.discriminate(DIGITS.images[:128] / 255, seeds.generator(0, "step", 0, 128))["discriminator"]
    gradients = torch.autograd.grad(loss, list(model.discriminator.parameters()))
    for parameter, gradient in zip(model.discriminator.parameters(), gradients, strict=True):
        assert gradient.any() and torch.equal(parameter.grad, gradient)


def arguments(name: str, folder: Path, *more: str) -> list[str]:
    settings = ["--model.name", name, "--data.source", "digits", "--epochs", "2", "--batch-size", "128", "--ema", "0.9"]
    scores = ["--score.extractors", "tiny", "--score.samples", "60", "--score.every", "1", "--pictures-every", "100"]
    empty = folder.with_name("empty.toml")
    empty.write_text("")
    return ["--config", str(empty), *settings, *scores, "--out", str(folder), "--checkpoint-minutes", "0", *more]


def interrupted(call: Call, command: list[str], monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    """The run as a crash after so many images leaves it, which is in the middle of a step."""
    step = Trainer.step

    def crash(self: Trainer, batch: torch.Tensor, index: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.images >= images:
            raise KeyboardInterrupt
        return step(self, batch, index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", crash)
        call(train, *command)


EPOCH = 12 * 128
SMALL_GLANN = ["--model.latent-dim", "4", "--model.width", "4", "--model.hidden", "16", "--model.matched", "64"]


@pytest.mark.parametrize(
    ("name", "more", "crashes"),
    [
        ("adversarial", ["--model.dropout", "0.2"], [5 * 128]),
        ("staged", [], [5 * 128, 2 * EPOCH, 2 * EPOCH + 5 * 128]),
        ("staged", ["--model.density", "closed"], [5 * 128]),
        ("staged", ["--model.density", "joint"], [2 * EPOCH + 5 * 128]),
        ("glann", [*SMALL_GLANN, "--model.mapping-epochs", "2"], [5 * 128, 2 * EPOCH, 2 * EPOCH + 5 * 128]),
    ],
)
def test_runs_resume_bit_for_bit(
    name: str, more: list[str], crashes: list[int], tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(train, *arguments(name, tmp_path / "whole", *more))
    command = arguments(name, tmp_path / "broken", *more)
    for images in crashes:
        interrupted(call, command, monkeypatch, images)
    call(train, *command)
    for part in ("last/model", "last/training", "best/model"):
        a, b = (load_file(tmp_path / run / "checkpoints" / f"{part}.safetensors") for run in ("whole", "broken"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), part
    scores = [[r["score"] for r in runs.read_metrics(tmp_path / run) if "score" in r] for run in ("whole", "broken")]
    assert scores[0] == scores[1]
    # Before the last stage no samples are scored, and a model that does not reconstruct has one score alone.
    assert len(scores[0]) == (1 if "closed" in more else 2)
    assert all(score["reconstructions"] is None for score in scores[0])
    assert not (tmp_path / "whole" / "reconstructions").exists()
    assert "Reconstructions" not in (tmp_path / "whole" / "report.html").read_text()


@pytest.mark.parametrize("density", ["gradient", "closed"])
def test_the_second_stage_fits_the_codes_and_leaves_the_networks_alone(density: str) -> None:
    toy = dataclasses.replace(default("staged").model, density=density, density_epochs=30)
    fast = {"density": OptimizerConfig(lr=0.05), "autoencoder": OptimizerConfig()}
    one = Trainer(config("staged", model=toy, epochs=1, optimizers=fast, ema=0.5), DIGITS, CPU)
    while one.images < one.ends[0]:
        position = one.images % one.images_per_epoch
        one.step(one.inputs()[position : position + 128])
    one.advance()
    before, codes = weights(one), one.inputs()
    assert codes.shape == (len(DIGITS), 4) and one.in_last_stage
    while one.images < one.ends[1]:
        position = one.images % one.images_per_epoch
        one.step(codes[position : position + 128])
    assert all(torch.equal(before[name], value) for name, value in weights(one).items() if "coder" in name)
    model = one.best_model
    assert isinstance(model, Staged)
    # What is sampled from: the average's decoder with the density of the average's codes.
    torch.testing.assert_close(codes, model.encode(DIGITS.images / 255).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.mean.detach(), codes.mean(0), atol=0.1 * codes.std().item(), rtol=0.1)
    torch.testing.assert_close(model.log_std.detach().exp(), codes.std(0), atol=0.0, rtol=0.2)


def test_an_indexed_stage_moves_what_belongs_to_the_batch() -> None:
    model = GLANNSettings(latent_dim=4, width=4, hidden=16)
    one = Trainer(config("glann", model=model), DIGITS, CPU)
    assert one.model.settings.items == len(DIGITS)
    index = torch.randperm(len(DIGITS))[:128]
    before = weights(one)["codes.weight"]
    one.step(DIGITS.images[index], index)
    moved = (weights(one)["codes.weight"] != before).any(1).nonzero().flatten()
    assert torch.equal(moved, index.sort().values)
    with pytest.raises(UserError, match=r"model.items = 7, but the training set has \d+ images; leave model.items out"):
        Trainer(config("glann", model=dataclasses.replace(model, items=7)), DIGITS, CPU)


@pytest.mark.usefixtures("curves")
def test_samples_are_drawn_when_the_density_is_there(tmp_path: Path, call: Call) -> None:
    folder = tmp_path / "r"
    call(train, *arguments("staged", folder, "--model.density", "closed", "--pictures-every", "1", "--ema", "0"))
    [picture] = (folder / "samples").iterdir()
    model, _ = checkpoint.load_model(folder / "checkpoints" / "best", CPU)
    with Image.open(picture) as drawn:
        wanted = draw_pictures(model, data.load("digits", "test").items, 0)["samples"]
        scale = drawn.width // wanted.shape[-1]
        assert np.array_equal(np.asarray(drawn)[::scale, ::scale], wanted[0].numpy())


def test_names_of_losses_are_those_of_one_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Trainer(config("adversarial"), DIGITS, CPU)
    for name in ("discriminator", "lr_x", "epoch"):
        monkeypatch.setattr(Adversarial, "deceive", lambda self, x, generator=None, name=name: {
            name: self.draw(2, generator).sum(), "generator": self.draw(2, generator).sum()})  # fmt: skip
        one._logged.clear()
        one.images = 0
        with pytest.raises(ValueError, match=f"{name} is a name of the log, or of another phase's loss"):
            one.step(DIGITS.images[:128])


def test_a_step_may_have_no_phase(tmp_path: Path) -> None:
    assert LossLog("").flush(0, 1, tmp_path) == {}


def test_groups_and_tables_do_not_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Staged, "groups", ("autoencoder", "score"))
    changed = with_table(default("staged"), "score", ScoreConfig(samples=7))
    assert changed.score.samples == 7 and changed.optimizers["score"] == OptimizerConfig()
    monkeypatch.setattr(Staged, "groups", ("x", "x"))
    with pytest.raises(AssertionError, match="collide"):
        default("staged")


@pytest.mark.usefixtures("curves")
def test_epochs_that_are_over_cannot_be_taken_back(tmp_path: Path, call: Call) -> None:
    call(train, *arguments("adversarial", tmp_path / "r"))
    before = (tmp_path / "r" / "config.toml").read_text()
    with pytest.raises(UserError, match="has trained for 2 epochs already"):
        call(train, *arguments("adversarial", tmp_path / "r", "--epochs", "1"))
    assert (tmp_path / "r" / "config.toml").read_text() == before


def test_epochs_of_a_stage_that_is_over_cannot_change(tmp_path: Path, call: Call) -> None:
    call(train, *arguments("staged", tmp_path / "r"))
    with pytest.raises(
        UserError, match="has finished stage 1 of its training, so the epochs of this stage cannot change"
    ):
        call(train, *arguments("staged", tmp_path / "r", "--epochs", "3"))


def test_a_time_limit_is_refused_where_it_would_leave_out_a_stage(tmp_path: Path, call: Call) -> None:
    with pytest.raises(UserError, match="trains in 2 stages, and a time limit"):
        call(train, *arguments("staged", tmp_path / "r", "--max-minutes", "1"))
    assert not (tmp_path / "r").exists()


def test_help_shows_the_chosen_models_settings_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for name, own, foreign in (("staged", "--model.density", "--flow.steps"), ("glf", "--flow.steps", "--density")):
        with pytest.raises(SystemExit):
            parse_train(["--config", "/dev/null", "--model.name", name, "--help"])
        text = capsys.readouterr().out
        assert own in text and foreign not in text
    assert "gradient or closed" not in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.densty", "closed"], "unknown option --model.densty; did you mean '--model.density'?"),
        (["--flow.steps", "3"], "unknown option --flow.steps"),
        (["--preset", "smoke"], "smoke.toml (for model 'staged') has an unknown key 'model.latent_dim'"),
        (["--model.name", "stagd"], "no model 'stagd'; did you mean 'staged'?"),
    ],
)
def test_settings_that_the_model_does_not_have_are_errors(more: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        parse_train([*arguments("staged", tmp_path / "r"), *more])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_optimizer_settings_for_all_groups_and_for_one(tmp_path: Path) -> None:
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text('[model]\nname = "staged"\n[optimizer]\nlr = 0.1\nclip = 2.0\n[density_optimizer]\nlr = 0.2')
    second.write_text("[optimizer]\nclip = 3.0\n[autoencoder_optimizer]\neps = 1e-5")
    files = ["--config", str(first), "--config", str(second)]
    both = parse_train(files).config.optimizers
    assert [both["autoencoder"].lr, both["density"].lr] == [0.1, 0.2]
    assert [both["autoencoder"].clip, both["density"].clip, both["autoencoder"].eps] == [3.0, 3.0, 1e-5]
    given = parse_train([*files, "--density-optimizer.lr", "0.2", "--optimizer.lr", "0.001"]).config.optimizers
    assert [given["autoencoder"].lr, given["density"].lr] == [0.001, 0.2]


@pytest.mark.usefixtures("curves")
def test_a_model_of_rows_trains_on_a_table(tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(3.0, 0.5, (300, 2)).astype(np.float32))
    table = ["--config", "/dev/null", "--data.source", str(tmp_path / "rows.npy"), "--batch-size", "32"]
    command = [*table, "--model.name", "rows", "--optimizer.lr", "0.05", "--epochs", "40", "--out", str(tmp_path / "r")]
    interrupted(call, command, pytest.MonkeyPatch(), 20 * 8 * 32)
    call(train, *command)
    assert "no scores" in capsys.readouterr().out
    call(train, *command)
    assert "is finished" in capsys.readouterr().err
    weights = load_file(tmp_path / "r" / "checkpoints" / "best" / "model.safetensors")
    torch.testing.assert_close(weights["mean"], torch.full((2,), 3.0), atol=0.15, rtol=0)
    torch.testing.assert_close(weights["log_std"].exp(), torch.full((2,), 0.5), atol=0.1, rtol=0)
    assert (tmp_path / "r" / "report.html").is_file() and not (tmp_path / "r" / "samples").exists()
    with pytest.raises(UserError, match="this Toy of rows was trained on data of shape"):
        call(sample, tmp_path / "r", "--out", tmp_path / "x.png")
    with pytest.raises(
        UserError,
        match=r"model 'adversarial' takes images, but .*rows.npy holds rows of a table; choose --model.name rows",
    ):
        call(train, *table, "--model.name", "adversarial", "--out", tmp_path / "s")
    assert not (tmp_path / "s").exists()
