"""Settings: presets, files over files, the command line over all, and what is said about mistakes."""

import dataclasses
import io
import sys
from pathlib import Path

import pytest

from glf_fast import models
from glf_fast.command_line import pick_device
from glf_fast.data import load as load_data
from glf_fast.errors import UserError
from glf_fast.metrics import names as extractor_names
from glf_fast.models.flow_settings import FlowSettings
from glf_fast.models.glf import GLFSettings
from glf_fast.training.arguments import parse_train
from glf_fast.training.config import DataConfig, check, default, with_table
from glf_fast.training.config_files import load, preset_path, presets, to_toml

PAPER = {"mnist": 100, "fashion-mnist": 100, "cifar10": 200, "celeba": 40}


def toml(tmp_path: Path, text: str, name: str = "my.toml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_there_are_all_presets() -> None:
    wanted = {"smoke", "quick", "fashion-mnist-rnvp", *PAPER, *(f"{name}-perceptual" for name in PAPER)}
    assert wanted <= set(presets())


@pytest.mark.parametrize("name", presets())
def test_a_preset_is_valid_and_survives_printing(name: str, tmp_path: Path) -> None:
    config = check(load(preset_path(name)))
    printed = to_toml(config)
    assert load(toml(tmp_path, printed)) == config
    assert set(config.score.extractors) <= set(extractor_names())
    assert config.epochs == PAPER.get(name.removesuffix("-perceptual"), config.epochs)
    if isinstance(config.model, GLFSettings):
        assert (config.model.reconstruction == "perceptual") == name.endswith("-perceptual")


@pytest.mark.parametrize("name", presets())
def test_a_preset_builds_its_model(name: str) -> None:
    config = load(preset_path(name))
    kind = models.kind(config.model.name)
    small = {name: 2 for name in ("width", "hidden") if name in config.model.effective()}
    side = max(8, 2 ** config.model.effective().get("levels", 0))
    if "tokens" in kind.takes:
        shape, settings = (19,), config.model.trained_on(load_data("expressions"))
    else:
        shape, settings = (1, side, side), dataclasses.replace(config.model, **small)
    model = kind(shape, settings)
    assert tuple(model.parameter_groups()) == kind.groups == tuple(config.optimizers)
    assert models.build(config.model.name, model.config).config == model.config


def test_odd_values_survive_printing(tmp_path: Path) -> None:
    flow = FlowSettings(kind="rnvp", hidden=(5, 5), clamp=1e-7)
    config = dataclasses.replace(default("glf"), model=GLFSettings(flow=flow), ema=0.1 + 0.2)
    config = with_table(config, "data", DataConfig(source='a "quoted"\\name\né'))
    assert load(toml(tmp_path, to_toml(config))) == config


def test_later_files_and_then_the_command_line_win(tmp_path: Path) -> None:
    first = toml(tmp_path, "epochs = 7\nseed = 1\n[flow]\nsteps = 3\nhidden = [16]", "first.toml")
    second = toml(tmp_path, "seed = 2\n[flow]\nhidden = [32, 32]", "second.toml")
    arguments = ["--preset", "smoke", "--config", str(first), "--config", str(second), "--flow.hidden", "4", "5", "6"]
    command = parse_train(arguments)
    assert (command.config.epochs, command.config.seed, command.config.model.flow.steps) == (7, 2, 3)
    assert command.config.model.flow.hidden == (4, 5, 6)
    assert command.base.model.flow.hidden == (32, 32)
    assert command.config.data.source == "digits", "what no file mentions is the preset's"


def test_a_file_may_begin_with_a_mark_and_must_end(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbfepochs = 3\n")
    assert load(tmp_path / "a.toml").epochs == 3
    (tmp_path / "deep.toml").write_text("a = " + "[" * 100_000)
    with pytest.raises(UserError, match=r"deep.toml cannot be read as TOML"):
        load(tmp_path / "deep.toml")


def test_a_path_that_is_no_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.source = 'x.udcff' is not UTF-8"):
        parse_train(["--data.source", "x\udcff"])


def test_without_arguments_it_is_preset_quick() -> None:
    assert parse_train([]).config == load(preset_path("quick"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "unknown key 'epoch'; did you mean 'epochs'?"),
        ("[flow]\nstep = 3", "unknown key 'flow.step'; did you mean 'flow.steps'?"),
        ("[flwo]\nsteps = 3", "unknown key 'flwo'; did you mean 'flow'?"),
        ("zzz = 3", "known keys: epochs, batch_size"),
        ('epochs = "3"', 'epochs = "3" must be an integer'),
        ("epochs = 2.5", "epochs = 2.5 must be an integer"),
        ("epochs = true", "epochs = true must be an integer"),
        ("ema = false", "ema = false must be a number"),
        ("ema = nan", "ema = NaN must be a number"),
        ("flow = 3", "flow = 3 must be a table: [flow]"),
        ("[flow]\nhidden = 64", "flow.hidden = 64 must be a list of integers"),
        ("[flow]\nhidden = [64, 2.5]", "must be a list of integers"),
        ("[flow]\nactnorm = 1", "flow.actnorm = 1 must be true or false"),
        ("[flow_optimizer]\nbetas = [0.9]", "flow_optimizer.betas = [0.9] must be a list of 2 numbers"),
        ('precision = "fp16"', 'precision = "fp16" must be one of "fp32", "bf16"'),
        ("epochs = ", "cannot be read as TOML"),
        ("epochs = 3\nepochs = 4", "cannot be read as TOML"),
    ],
)
def test_a_mistake_in_a_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = toml(tmp_path, text)
    with pytest.raises(UserError) as error:
        parse_train(["--config", str(file)])
    assert message in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--preset fashion-mnits", "no preset 'fashion-mnits'; did you mean 'fashion-mnist'?"),
        ("--preset", "--preset: expected one argument"),
        ("--config nowhere.toml", "no config file nowhere.toml"),
        ("--flow.stps 3", "unknown option --flow.stps; did you mean '--flow.steps'?"),
        ("--dry-rum", "unknown option --dry-rum; did you mean '--dry-run'?"),
        (
            "--flow.steps many",
            "--flow.steps: invalid literal for int() with base 10: 'many' (wanted: --flow.steps INT)",
        ),
        (
            "--flow.kind nvp",
            "invalid choice 'nvp' for argument '--flow.kind'. Expected one of ('coupling', 'autoregressive', 'rnvp')",
        ),
        ("--flow.steps", "Missing value for argument '--flow.steps'"),
        ("quick", "unexpected argument quick"),
        ("--epochs 0", "epochs = 0 must be positive"),
        ("--batch-size 1", "batch_size = 1 must be 2 or more"),
        ("--ema 1", "ema = 1.0 must be in [0, 1)"),
        ("--flow-optimizer.lr nan", "flow_optimizer.lr = nan must be finite"),
        ("--flow-optimizer.betas 0.9 1.5", "flow_optimizer.betas = [0.9, 1.5] must be in [0, 1)"),
        ("--flow.hidden 8 0", "flow.hidden = [8, 0] must be zero to eight positive widths"),
        (
            "--flow.clamp 3",
            'flow.clamp = 3.0 has no effect with flow.kind = "coupling"; set it back to its default, 2.0',
        ),
        (
            "--flow.kind rnvp --flow.steps 3",
            'flow.steps = 3 has no effect with flow.kind = "rnvp"; set it back to its default, 8',
        ),
        ("--flow.bins 4", 'flow.bins = 4 has no effect with flow.coupling = "affine"; set it back to its default, 8'),
        (
            "--flow.coupling spline --flow.add-first",
            'flow.add_first = true has no effect with flow.coupling = "spline"',
        ),
        (
            "--flow.kind autoregressive --flow.coupling additive",
            'flow.coupling = "additive" must be "affine" or "spline" for flow.kind = "autoregressive"',
        ),
        (
            "--flow.kind autoregressive --flow.add-first",
            'flow.add_first = true has no effect with flow.kind = "autoregressive"',
        ),
        ("--flow.coupling spline --flow.bins 1", "flow.bins = 1 must be between 2 and 32"),
        ("--flow.kind rnvp --flow.hidden 8", "flow.hidden = [8] must be two equal widths"),
        (
            "--flow-optimizer.schedule cosine --flow-optimizer.decay-every 3",
            'decay_every = 3 has no effect with flow_optimizer.schedule = "cosine"; set it back to its default, 50',
        ),
        ("--flow.activation nonsense", "flow.activation must be one of 'relu', 'leaky_relu', "),
        ("--flow.log-scale 😀", "flow.log_scale must be one of 'tanh', 'exp', "),
        ("--flow.log-scale-constant -5", "flow.log_scale_constant of 'tanh' must be between 0.0 and inf; got -5.0"),
        ("--flow.hidden 8 8 8 8 8 8 8 8 8", " must be zero to eight positive widths"),
        ("--flow.activation-constant 2", "flow.activation 'relu' has no constant; got activation_constant=2.0"),
        ("--flow.hidden 16,24", "; a list is written with spaces: --flow.hidden 16 24; "),
        ("--model.latent-dim 1", "model.latent_dim = 1 must be 2 or more"),
        ("--data.image-size 0", "data.image_size = 0 must be positive"),
        ("--data.source=", 'data.source = "" must be a name or a path'),
        ("--score.extractors tinny", "score.extractors: there is no extractor 'tinny'; did you mean 'tiny'?"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_train(
            ["--preset", "fashion-mnist", *arguments.split()] if "--preset" not in arguments else arguments.split()
        )
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--flow.steps many", "base 10: 'many' (wanted: --flow.steps INT); python -m glf_fast.train --help"),
        ("--flow.kind nvp", "one of ('coupling', 'autoregressive', 'rnvp'); python -m glf_fast.train --help"),
    ],
)
def test_boxes_of_any_encoding_become_one_line(
    arguments: str, message: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tyro draws its boxes by the encoding of the output, with ─ and │ or with hyphens alone."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(UserError) as error:
        parse_train(arguments.split())
    text = str(error.value)
    assert message in text and "---" not in text and "─" not in text and "\n" not in text
    assert text.startswith(("Error parsing", "invalid choice"))


def test_help_explains_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_train(["--preset", "smoke", "--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    assert "--flow.steps" in text and "number of steps" in text and "(default: 2)" in text and "--dry-run" in text


def test_a_device_that_is_not_there_is_named() -> None:
    assert pick_device("cpu").type == "cpu"
    for name in ("cuda:99", "gpu", "cpu:9", "meta"):
        with pytest.raises(UserError, match=name):
            pick_device(name)


HUGE = "9" * 400


@pytest.mark.parametrize(
    "text", [f"ema = {HUGE}", f"epochs = {HUGE}", f"[flow]\nhidden = [{HUGE}]", "seed = 9223372036854775808"]
)
def test_integers_of_more_than_64_bits_are_refused_in_files(text: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"must be (an integer of 64 bits|a number of at most|a list of integers)"
    ) as error:
        parse_train(["--config", str(toml(tmp_path, text))])
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "option",
    ["--epochs", "--seed", "--model.latent-dim", "--flow.hidden", "--score.samples", "--flow-optimizer.warmup-steps"],
)
def test_integers_of_more_than_64_bits_are_refused_as_options(option: str) -> None:
    with pytest.raises(UserError, match=r"9… must be an integer of 64 bits|9…\] must be|\[9+… must be an") as error:
        parse_train(["--preset", "quick", option, HUGE])
    assert len(str(error.value)) < 300
    assert parse_train(["--seed", str(2**63 - 1)]).config.seed == 2**63 - 1


def test_a_model_of_huge_integers_is_refused() -> None:
    with pytest.raises(UserError, match=r"latent_dim = 9+… must be an integer of 64 bits"):
        models.build("glf", {"shape": [1, 8, 8], "latent_dim": int(HUGE)})
