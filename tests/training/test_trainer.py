"""The step, the schedules, the average, and the guard."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import several_processes
import torch

from glf_fast import data, use_backend
from glf_fast.errors import UserError
from glf_fast.training import checkpoint
from glf_fast.training.config import OptimizerConfig, default
from glf_fast.training.config_files import load, preset_path
from glf_fast.training.loss_log import LossLog
from glf_fast.training.trainer import Trainer

CPU = torch.device("cpu")
DIGITS = data.load("digits", "train")


def trainer(optimizers: dict[str, OptimizerConfig] | None = None, **changes: Any) -> Trainer:
    config = load(preset_path("smoke"))
    changes["optimizers"] = {**config.optimizers, **(optimizers or {})}
    return Trainer(dataclasses.replace(config, **changes), DIGITS, CPU)


def batch(position: int = 0) -> torch.Tensor:
    return DIGITS.images[position : position + 128]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_steps_learn_and_change_every_weight() -> None:
    one = trainer()
    one.step(batch())  # sets the flow's ActNorms
    before, losses = weights(one), [one.step(batch()) for _ in range(30)]
    # Not the likelihood: the codes that it is about spread out at first.
    assert losses[-1]["reconstruction"] < 0.8 * losses[0]["reconstruction"]
    assert all(not torch.equal(before[name], value) for name, value in one.model.named_parameters())
    assert one.images == 31 * 128


def test_the_kernels_train_as_the_reference_does() -> None:
    # Regularised GLF: the flow's gradient reaches the encoder, so every weight depends on the kernels.
    settings = dataclasses.replace(load(preset_path("smoke")).model, stop_gradient=False)

    def curve(backend: str, nudge: float = 0.0) -> torch.Tensor:
        one = trainer(model=settings)
        with torch.no_grad():
            for p in one.model.parameters():
                p.mul_(1 + nudge)
        with use_backend(backend):
            return torch.tensor([one.step(batch(128 * (i % 4)))["loss"] for i in range(40)])

    expected, got = curve("reference"), curve("cpp")
    # Adam amplifies rounding: the measure is what the last bit of the first weights does to plain PyTorch.
    noise = (curve("reference", 2**-23) - expected).abs()
    assert expected[-1] < expected[0] - 8
    assert (got - expected).abs().max() < 3 * noise.max() < 0.3


def test_the_start_and_the_noise_come_from_the_seed() -> None:
    settings = load(preset_path("smoke"))
    noisy = dataclasses.replace(settings.model, latent_noise=0.3)
    first, second, other = trainer(model=noisy), trainer(model=noisy), trainer(model=noisy, seed=1)
    torch.manual_seed(77)  # whatever the process did before makes no difference
    a = [first.step(batch(i))["loss"] for i in range(3)]
    torch.manual_seed(78)
    b = [second.step(batch(i))["loss"] for i in range(3)]
    assert a == b
    assert a != [other.step(batch(i))["loss"] for i in range(3)]


@pytest.mark.parametrize(
    ("settings", "epochs", "factors"),
    [
        (OptimizerConfig(decay_every=2, decay_factor=0.5), 6, [1, 1, 0.5, 0.5, 0.25, 0.25]),
        (OptimizerConfig(decay_every=0), 3, [1, 1, 1]),
        (OptimizerConfig(schedule="cosine"), 4, [0.01 + 0.99 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]),
    ],
)
def test_learning_rates_at_the_starts_of_epochs(settings: OptimizerConfig, epochs: int, factors: list[float]) -> None:
    settings = dataclasses.replace(settings, lr=0.25)
    one = trainer({"autoencoder": settings}, epochs=epochs)
    for epoch, factor in enumerate(factors):
        one.images = epoch * one.images_per_epoch
        one.step(batch())
        rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in one.optimizers.items()}
        assert rates == {"autoencoder": pytest.approx(0.25 * factor), "flow": 1e-3}


def test_learning_rates_rise_at_first() -> None:
    one = trainer({"flow": OptimizerConfig(lr=0.5, warmup_steps=4)})
    rates = []
    for _ in range(6):
        one.step(batch())
        rates.append(one.optimizers["flow"].param_groups[0]["lr"])
    assert rates == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_a_learning_rate_of_zero_freezes_its_group_alone() -> None:
    one = trainer({"autoencoder": OptimizerConfig(lr=0.0)})
    before = weights(one)
    for _ in range(2):
        one.step(batch())
    changed = {name for name, value in one.model.named_parameters() if not torch.equal(before[name], value)}
    assert changed and all(name.startswith("flow.") for name in changed)


def test_clipping_bounds_the_gradient_of_its_group_alone() -> None:
    one = trainer({"autoencoder": OptimizerConfig(clip=1e-3)})
    one.step(batch())
    norms = {
        name: torch.stack([p.grad.norm() for p in parameters]).norm()
        for name, parameters in one.model.parameter_groups().items()
    }
    assert norms["autoencoder"] == pytest.approx(1e-3, rel=1e-3)
    assert norms["flow"] > 0.1


def test_the_average_follows_the_weights() -> None:
    one = trainer(ema=0.5)
    one.step(batch())
    assert one.average is not None
    for ours, theirs in zip(one.average.state_dict().values(), one.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), "the first average is the weights, started flow and all"
    name = "decoder.layers.3.weight"
    old = one.average.state_dict()[name].clone()
    for _ in range(8):
        one.step(batch())
    decay = min(0.5**8, 1 / 11)
    wanted = decay * old + (1 - decay) * one.model.state_dict()[name]
    torch.testing.assert_close(one.average.state_dict()[name], wanted)
    assert one.best_model is one.average and not one.average.training
    assert trainer(ema=0.0).best_model.training


def test_bf16_computes_in_bf16_and_keeps_float32_weights() -> None:
    exact, coarse = trainer(), trainer(precision="bf16")
    a, b = exact.step(batch())["loss"], coarse.step(batch())["loss"]
    assert a != b
    assert a == pytest.approx(float(b), rel=0.05)
    assert all(value.dtype == torch.float32 for value in coarse.model.parameters())


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_restored_trainer_goes_on_bit_for_bit(ema: float, tmp_path: Path) -> None:
    one = trainer(ema=ema)
    for i in range(5):
        one.step(batch(i))
    one.save(tmp_path / "last", {"note": "x"}, for_resuming=True)
    two = trainer(ema=ema, seed=0)
    two.model.to(torch.float32)
    assert two.restore(tmp_path / "last")["note"] == "x"
    for i in range(5, 20):
        assert one.step(batch(i)) == two.step(batch(i))
    for ours, theirs in zip(one.best_model.state_dict().values(), two.best_model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    one = trainer(ema=0.0)
    one.step(batch())
    one.save(tmp_path / "last", {}, for_resuming=True)
    good = (tmp_path / "last" / "model.safetensors").read_bytes()
    with torch.no_grad():
        one.model.get_parameter("encoder.head.bias")[1] = math.inf
    with pytest.raises(UserError, match=r"encoder.head.bias is not finite after 128 images.*last was left unchanged"):
        one.save(tmp_path / "last", {}, for_resuming=True)
    assert (tmp_path / "last" / "model.safetensors").read_bytes() == good


def test_the_loss_log_averages_and_names_the_step_that_went_wrong(tmp_path: Path) -> None:
    log = LossLog("try this", capacity=4)
    for value in (1.0, 2.0, 6.0):
        log.add({"loss": torch.tensor(value), "nll": torch.tensor(-value)})
    assert log.flush(300, 100, tmp_path) == {"loss": 3.0, "nll": -3.0}
    for value in (1.0, math.nan, math.inf, 1.0):
        assert not log.full
        log.add({"loss": torch.tensor(1.0), "nll": torch.tensor(value)})
    assert log.full
    with pytest.raises(UserError) as error:
        log.flush(700, 100, tmp_path / "last")
    assert "not finite at step 5 (500 images): loss = 1, nll = nan; there is no checkpoint yet; try this" in str(
        error.value
    )


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size = 5000 is more than the 1617 training items of digits"):
        trainer(batch_size=5000)


def test_images_that_the_model_cannot_take_are_refused(tmp_path: Path) -> None:
    odd = data.ImageDataset.of("odd", "train", torch.zeros(300, 1, 10, 10, dtype=torch.uint8))
    with pytest.raises(UserError, match="multiples of 4"):
        Trainer(default("glf"), odd, CPU)


def test_checkpoints_for_use_hold_weights_alone(tmp_path: Path) -> None:
    one = trainer()
    one.step(batch())
    one.save(tmp_path / "best", {}, for_resuming=False)
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == [
        "checkpoint.json",
        "config.json",
        "model.safetensors",
    ]
    with pytest.raises(UserError, match=r"training.safetensors is missing"):
        checkpoint.read(tmp_path / "best", training=True)


def test_a_resumed_run_keeps_its_kind_of_batch_norm(tmp_path: Path) -> None:
    place = tmp_path / "checkpoint"
    for local, message in (
        (True, "with --local-batch-norm; give the option"),
        (False, "without --local-batch-norm; leave"),
    ):
        same, other = (several_processes.trainer("glf", local_batch_norm=kind) for kind in (local, not local))
        same.save(place, {}, for_resuming=True)
        same.restore(place)
        with pytest.raises(UserError, match=message):
            other.restore(place)
    whole = checkpoint.read(place, training=True)
    del whole.state["local_batch_norm"]  # as earlier versions wrote it
    checkpoint.write(place, whole)
    other.restore(place)
