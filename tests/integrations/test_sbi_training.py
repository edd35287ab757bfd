"""sbi's training by `glf_fast.fit` against sbi's own loop."""

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sbi.inference import NLE, NPE, NRE
from sbi.utils import BoxUniform
from torch import Tensor, nn

from glf_fast.fitting import fused
from glf_fast.integrations.sbi import coupling_flow, maf, maf_likelihood, train

PRIOR = BoxUniform(-torch.ones(2), torch.ones(2))
SMALL: dict[str, Any] = {"steps": 2, "hidden": (16, 16)}


def simulations(n: int = 600) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    theta = PRIOR.sample((n,))
    return theta, 30 * theta + 5 * torch.randn(n, 2) + 4


def trainer(kind: type = NPE, builder: Any = None, rows: int = 600) -> Any:
    made = kind(PRIOR, density_estimator=builder or maf(**SMALL), show_progress_bars=False)
    return made.append_simulations(*simulations(rows))


def embedded() -> Callable[..., Any]:
    return maf(**SMALL, embedding_net=nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)))


@pytest.mark.filterwarnings("ignore:Maximum number of epochs")
@pytest.mark.parametrize(
    ("kind", "make", "is_fused"),
    [
        (NPE, lambda: maf(**SMALL), True),
        (NPE, lambda: coupling_flow(**SMALL, z_score_theta="transform_to_unconstrained", prior=PRIOR), True),
        (NPE, embedded, False),
        (NLE, lambda: maf_likelihood(**SMALL), True),
    ],
)
def test_losses_are_those_of_sbis_loop(
    kind: type, make: Callable[[], Any], is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best loss after some epochs, of held-out rows; and the loss in the summary is the estimator's."""
    fused_steps: list[int] = []
    run = fused.FusedSteps.run
    monkeypatch.setattr(fused.FusedSteps, "run", lambda *a: (fused_steps.append(1), run(*a))[1])
    found = []
    for by in (train, lambda made, **settings: made.train(**settings)):
        made = trainer(kind, make())
        torch.manual_seed(1)
        estimator = by(made, max_num_epochs=12, learning_rate=5e-3, training_batch_size=50)
        found.append(made.summary["best_validation_loss"][-1])
        if by is train:
            assert bool(fused_steps) == is_fused and not estimator.training
            # Simulations of another draw: as good as those held out, within 60 rows' noise.
            theta, x = simulations(3000)[0][600:], simulations(3000)[1][600:]
            with torch.no_grad():
                loss = estimator.loss(theta, x) if kind is NPE else estimator.loss(x, theta)
            assert abs(loss.mean() - found[0]) < 5 * loss.std() / 60**0.5
            assert len(made.summary["training_loss"]) == made.summary["epochs_trained"][-1] == 12
            assert made.build_posterior() is not None
    assert abs(found[0] - found[1]) < 0.25


def test_the_same_seed_gives_the_same_estimator_and_goes_on() -> None:
    first, second = trainer(), trainer()
    states = []
    for made in (first, second):
        torch.manual_seed(3)
        made._neural_net = None
        states.append({k: v.clone() for k, v in train(made, max_num_epochs=2).state_dict().items()})
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert train(first, max_num_epochs=1) is first._neural_net  # trains what is there
    assert any(not torch.equal(v, states[0][k]) for k, v in first._neural_net.state_dict().items())


@pytest.mark.filterwarnings("ignore:Only one data sample")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NRE(PRIOR, show_progress_bars=False), TypeError, "must be an NPE or an NLE of sbi; got NRE"),
        (lambda: NPE(PRIOR, density_estimator=maf()), ValueError, "call inference.append_simulations"),
        (lambda: trainer(builder="maf"), TypeError, "must be one of ours, such as maf"),
        (lambda: trainer(NPE, maf_likelihood(**SMALL)), ValueError, "have changed places"),
        (lambda: trainer(NLE, maf(**SMALL)), ValueError, "have changed places"),
        (
            lambda: with_nan(maf(**SMALL)),
            ValueError,
            "1 of 60 simulations have NaN or infinity in theta or x, first number 3",
        ),
        (lambda: trainer(rows=1), ValueError, "of 1 simulations some must be trained on"),
    ],
)
def test_refusals(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        train(make())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"validation_fraction": 0}, "validation_fraction=0"), ({"max_num_epochs": 0}, "max_num_epochs must be")],
)
def test_settings_are_named_as_in_sbi(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(trainer(rows=60), **settings)


def with_nan(builder: Any) -> Any:
    """A trainer of 60 simulations, of which the fourth has NaN."""
    made = NPE(PRIOR, density_estimator=builder, show_progress_bars=False)
    theta, x = simulations(60)
    x[3, 0] = torch.nan
    return made.append_simulations(theta, x, exclude_invalid_x=False)


def test_an_embedding_net_may_take_nan_and_its_statistics_are_of_training_batches() -> None:
    class Known(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.nan_to_num()

    norm = nn.BatchNorm1d(2, affine=False)
    train(with_nan(maf(**SMALL, z_score_x="none", embedding_net=nn.Sequential(Known(), norm))), max_num_epochs=3)
    assert norm.num_batches_tracked == 3  # of 54 rows each, 200 at most


def test_ctrl_c_ends_the_script_and_keeps_the_best_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    run = fused.FusedSteps.run
    for epochs in (0, 2):
        made = trainer(rows=100)
        count = []

        def interrupt(self: Any, *arguments: Any, after: int = epochs, count: list[int] = count) -> Any:
            if len(count) == after:
                signal.raise_signal(signal.SIGINT)
            count.append(1)
            return run(self, *arguments)

        with monkeypatch.context() as patched:
            patched.setattr(fused.FusedSteps, "run", interrupt)
            with pytest.raises(KeyboardInterrupt):
                train(made, training_batch_size=90)
        assert made.build_posterior() is not None and len(made.summary["training_loss"]) <= epochs + 1


def test_a_later_round_is_refused() -> None:
    made = trainer(rows=100)
    train(made, max_num_epochs=1)
    made.append_simulations(*simulations(100), proposal=made.build_posterior().set_default_x(torch.zeros(1, 2)))
    with pytest.raises(ValueError, match=r"use inference\.train\(\)"):
        train(made)
