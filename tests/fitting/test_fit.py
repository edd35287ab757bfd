"""fit does what a plain loop does, by C++ and by PyTorch, and refuses what it cannot do."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glf_fast import (
    ActNorm,
    AffineCoupling,
    AutoregressiveFlow,
    CouplingFlow,
    Flow,
    InvertibleLinear,
    SequentialFlow,
    Split,
    Squeeze,
    fit,
    use_backend,
)
from glf_fast.fitting.dataset import dataset
from glf_fast.fitting.fused import why_not
from glf_fast.flow import Embedded

ROWS, BATCH, EPOCHS = 70, 16, 2


def flow(dim: int = 5, steps: int = 3, hidden: tuple[int, ...] = (12, 9), **options: Any) -> Callable[[], Flow]:
    return lambda: CouplingFlow(dim, steps, hidden, **options)


def frozen() -> Flow:
    made = CouplingFlow(5, 2, (8,))
    made.actnorm_bias.requires_grad_(False)
    made.mlp_weights[1].requires_grad_(False)
    return made


def held() -> Flow:
    made = CouplingFlow(5, 2, (8,))
    made.hold("mlp_weights.0", torch.rand_like(made.mlp_weights[0]) < 0.5)
    return made


def images() -> Flow:
    network = nn.Sequential(nn.Conv2d(2, 4, 1), nn.SiLU(), nn.Conv2d(4, 4, 1))
    layers = [Squeeze(), ActNorm(4), InvertibleLinear(4), AffineCoupling(4, network), Split(4)]
    return SequentialFlow(layers, (1, 4, 2))


def masked(**options: Any) -> Callable[[], Flow]:
    return lambda: AutoregressiveFlow(4, 3, (12, 9), **options)


class Chosen(CouplingFlow):
    """A class of a user's, whose density may be another."""


FUSED = {
    "plu": flow(),
    "context": flow(context_dim=3),
    "dense": flow(linear="dense"),
    "permutation": flow(linear="permutation", context_dim=2),
    "no-actnorm": flow(actnorm=False),
    "dense-no-actnorm": flow(linear="dense", actnorm=False),
    "permutation-no-actnorm": flow(linear="permutation", actnorm=False),
    "separate": flow(coupling="separate", context_dim=2),
    "additive": flow(coupling="additive"),
    "silu-glow": flow(activation="silu", log_scale="glow", add_first=True),
    "spline": flow(coupling="spline", context_dim=2),
    "residual": flow(3, 2, (8, 8), network="residual", context_dim=2, coupling="spline"),
    "masked": masked(context_dim=3, context_layer=True, log_scale="softplus"),
    "masked-plu": masked(linear="plu", actnorm=True, context_dim=2),
    "masked-spline": masked(transform="spline", activation="silu"),
    "masked-residual": lambda: AutoregressiveFlow(4, 2, (8, 8), context_dim=2, network="residual", linear="dense"),
    "slope": flow(4, 2, (8,) * 5, activation="leaky_relu", activation_constant=0.3),
    "no hidden layers": flow(4, 2, (), context_dim=2),
    "masked, mish": masked(activation="mish"),
    "masked, no hidden layers": lambda: AutoregressiveFlow(4, 2, (), 2),
    "frozen": frozen,
    # Parameters of which two threads take a half each.
    "large": flow(40, 4, (256,)),
}
OTHERS = {
    "reversible": flow(reversible=True),
    "held": held,
    "subclass": lambda: Chosen(5, 2, (8,)),
    "layers": lambda: CouplingFlow(5, 2, (8,), context_dim=2).to_layers(),
    "embedded": lambda: Embedded(CouplingFlow(5, 2, (8,), context_dim=4), nn.Flatten(), (2, 2)),
    "images": images,
}


def data(of: Flow, rows: int = ROWS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(5)
    x = 1 + torch.randn(rows, *of.event_shape, generator=g, dtype=dtype).exp()
    return x, torch.randn(rows, *of.context_shape, generator=g, dtype=dtype) if of.context_shape else None


def made(make: Callable[[], Flow], dtype: torch.dtype = torch.float64) -> Flow:
    torch.manual_seed(0)
    found = make().to(dtype)
    with torch.no_grad():  # nothing at its trivial start
        for name, parameter in found.named_parameters():
            if "actnorm" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return found


def plain_loop(of: Flow, x: Tensor, context: Tensor | None, weights: Tensor | None, lr: float, clip: float | None,
               cosine: bool) -> list[float]:  # fmt: skip
    """The mean loss of each epoch."""
    of.train()
    optimizer = torch.optim.AdamW(of.parameters(), lr, weight_decay=0.1)
    weights = None if weights is None else weights / weights.mean()
    step, means, steps = 0, [], len(x) // BATCH
    for epoch in range(EPOCHS):
        losses = []
        for rows in dataset(of, x, context, None, 0, 3).order(3, epoch, BATCH):
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / EPOCHS / steps)) / 2 if cosine else lr
            log_prob = of.log_prob(x[rows], None if context is None else context[rows])
            loss = -(log_prob if weights is None else weights[rows] * log_prob).mean()
            optimizer.zero_grad()
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(of.parameters(), clip)
            optimizer.step()
            losses.append(loss.item())
            step += 1
        means.append(sum(losses) / len(losses))
    return means


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", [*FUSED, *OTHERS])
def test_a_run_equals_a_plain_loop(name: str) -> None:
    make = (FUSED | OTHERS)[name]
    x, context = data(make())
    everything = (torch.rand(ROWS, dtype=torch.float64) + 0.1, 0.5, True)
    for weights, clip, cosine in [everything] if name == "large" else [(None, None, False), everything]:
        expected = made(make)
        losses = plain_loop(expected, x, context, weights, 0.005, clip, cosine)
        for backend in ["auto", "reference"] if name in FUSED else ["auto"]:
            with use_backend(backend), threads(2 if name == "large" else 1):
                found = made(make)
                assert (why_not(found, BATCH) == "") == (name in FUSED and backend == "auto")
                result = fit(
                    found, x, context, epochs=EPOCHS, batch_size=BATCH, lr=0.005, weight_decay=0.1, clip=clip, weights=weights,
                    validation=0, schedule="cosine" if cosine else None, seed=3, progress=False,
                )  # fmt: skip
            assert result.training_loss == pytest.approx(losses, abs=1e-10, rel=1e-12)
            for (key, a), b in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
                torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10, msg=lambda m, key=key: f"{key}: {m}")
            assert (result.steps, result.stopped, result.best_epoch) == (EPOCHS * (ROWS // BATCH), "epochs", EPOCHS)
            assert not found.training and all(p.grad is None for p in found.parameters())


def test_both_paths_have_one_loss_in_float32_and_parameters_know_that_they_changed() -> None:
    results = []
    for backend in ("auto", "reference"):
        with use_backend(backend):
            found = made(FUSED["context"], torch.float32)
            versions = [p._version for p in found.parameters()]
            x, context = data(found, 200, torch.float32)
            results.append(fit(found, x, context, epochs=3, batch_size=50, validation=0.2, progress=False))
            assert all(p._version > v for p, v in zip(found.parameters(), versions, strict=True))
    a, b = results
    assert a.training_loss == pytest.approx(b.training_loss, rel=1e-5)
    assert a.validation_loss == pytest.approx(b.validation_loss, rel=1e-5)


def test_the_validation_loss_decides_what_is_kept_and_when_it_ends() -> None:
    found = made(FUSED["plu"])
    (x, _), (others, _) = data(found), data(found, 300)
    others = others[ROWS:]
    result = fit(found, x, epochs=500, batch_size=32, lr=0.02, validation=(others, None), patience=4, progress=False)
    losses = result.validation_loss
    assert result.stopped == "patience" and len(losses) == result.best_epoch + 4 == len(result.training_loss)
    assert min(losses) == losses[result.best_epoch - 1]
    assert -found.log_prob(others).mean().item() == pytest.approx(min(losses), rel=1e-12)


def test_rows_are_held_out_and_weighted_in_validation_too() -> None:
    found = made(FUSED["plu"])
    x, _ = data(found)
    weights = torch.rand(ROWS, dtype=torch.float64)
    rows = dataset(found, x, None, weights, 0.3, 7)
    assert len(rows.validation) == 21
    assert sorted([*rows.train.tolist(), *rows.validation.tolist()]) == [*range(ROWS)]
    epochs = [rows.order(7, epoch, 16) for epoch in range(2)]
    assert all(len(order.unique()) == 48 for order in epochs) and not torch.equal(*epochs)
    result = fit(found, x, epochs=1, batch_size=16, weights=weights, validation=0.3, seed=7, progress=False)
    log_prob = found.log_prob(x[rows.validation])
    expected = -(weights[rows.validation] * log_prob).sum() / weights[rows.validation].sum()
    assert result.validation_loss == [pytest.approx(expected.item(), rel=1e-12)]


def dropout() -> Flow:
    return Embedded(CouplingFlow(5, 2, (8,), context_dim=4), nn.Sequential(nn.Flatten(), nn.Dropout(0.5)), (2, 2))


@pytest.mark.parametrize("make", [FUSED["plu"], dropout], ids=["fused", "dropout"])
def test_a_seed_decides_everything_and_changes_nothing_outside(make: Callable[[], Flow]) -> None:
    x, context = data(make())
    runs = []
    for seed, noise in [(1, 0), (1, 1), (2, 0)]:
        found = made(make)
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        fit(found, x, context, epochs=2, batch_size=16, seed=seed, progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(torch.cat([p.flatten() for p in found.parameters()]))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_loss_that_is_not_finite_changes_nothing(backend: str) -> None:
    found = made(FUSED["no-actnorm"], torch.float32)
    x, _ = data(found, dtype=torch.float32)
    order, bad = dataset(found, x, None, None, 0, 0).order(0, 0, 16), 2
    x[order[bad, 5]] = 1e30  # its square is infinite
    expected = made(FUSED["no-actnorm"], torch.float32)
    with use_backend(backend), pytest.raises(FloatingPointError) as error:
        fit(found, x, epochs=3, batch_size=16, validation=0, progress=False)
    assert re.search(
        rf"loss is not finite in epoch 1, step {bad + 1} of 4 \(step {bad + 1} of the run\)", str(error.value)
    )
    optimizer = torch.optim.AdamW(expected.train().parameters(), 1e-3, weight_decay=0.0)
    for rows in order[:bad]:
        optimizer.zero_grad()
        (-expected.log_prob(x[rows]).mean()).backward()
        optimizer.step()
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert not found.training


def test_progress_is_said_on_stderr_and_not_otherwise(capfd: pytest.CaptureFixture[str]) -> None:
    x, _ = data(made(FUSED["plu"]))
    fit(made(FUSED["plu"]), x, epochs=2, batch_size=16, progress=False)
    assert capfd.readouterr() == ("", "")
    fit(made(FUSED["plu"]), x, epochs=2, batch_size=16)
    out, err = capfd.readouterr()
    assert out == "" and re.search(r"epoch 2/2 .* rows .* loss -?\d.* validation -?\d", err)


X = torch.randn(40, 5)
CONDITIONAL = flow(context_dim=3)


@pytest.mark.parametrize(
    ("make", "arguments", "options", "message"),
    [
        (flow(), [X], {"epochs": 0}, "epochs must be a whole number ≥ 1; got 0"),
        (flow(), [X], {"batch_size": 2.5}, "batch_size must be a whole number ≥ 1; got 2.5"),
        (flow(), [X], {"batch_size": 37}, "batch_size=37 is larger than the 36 rows to train on"),
        (flow(), [X], {"lr": 0.0}, "lr must be > 0 and finite; got 0.0"),
        (flow(), [X], {"lr": math.nan}, "lr must be > 0"),
        (flow(), [X], {"clip": -1.0}, "clip must be > 0"),
        (flow(), [X], {"weight_decay": -0.1}, "weight_decay must be ≥ 0"),
        (flow(), [X], {"schedule": "cosin"}, "schedule must be one of 'cosine'; got 'cosin'"),
        (flow(), [X], {"patience": 3, "validation": 0}, "patience looks at the validation loss"),
        (flow(), [X], {"validation": 1.0}, "validation must be a fraction of the rows from 0 to below 1; got 1.0"),
        (flow(), [X], {"validation": X, "patience": 2}, "validation must be a fraction of the rows, or a pair"),
        (flow(), [X], {"weights": torch.eye(1, 40)[0], "validation": 0.5, "seed": 1}, "weights are 0 for all rows"),
        (flow(), [X], {"validation": (X[:, 1:], None)}, r"validation x must have shape \(rows, 5\); got \(40, 4\)"),
        (flow(), [X[:1]], {"batch_size": 1}, "leaves no row of 1 to train on"),
        (flow(), [X[:0]], {}, r"x must have shape \(rows, 5\); got \(0, 5\)"),
        (flow(), [X[0]], {}, r"x must have shape \(rows, 5\); got \(5,\)"),
        (flow(), [X.numpy()], {}, "x must be a torch.Tensor; got ndarray"),
        (flow(), [X.double()], {}, "x is torch.float64 but the flow is torch.float32"),
        (flow(), [X.long()], {}, "x must be floating-point"),
        (flow(), [torch.cat([X, X / 0])], {}, "x has NaN or infinity in 40 of 80 rows, first in row 40"),
        (flow(), [X, X], {}, "takes no context, but a context was given"),
        (CONDITIONAL, [X], {}, r"this flow is conditional: give a context of shape \(rows, 3\)"),
        (CONDITIONAL, [X, X[:, :2]], {}, r"context must have shape \(rows, 3\); got \(40, 2\)"),
        (CONDITIONAL, [X, X[:39, :3]], {}, "x has 40 rows but context has 39"),
        (CONDITIONAL, [X, X[:, :3].double()], {}, "context is torch.float64 but the flow is torch.float32"),
        (CONDITIONAL, [X, X[:, :3].long()], {}, "context must be floating-point"),
        (CONDITIONAL, [X, X[:, :3] * math.nan], {}, "context has NaN or infinity in 40"),
        (flow(), [X], {"weights": torch.ones(39)}, r"weights must have shape \(rows,\) = \(40,\); got \(39,\)"),
        (flow(), [X], {"weights": -torch.ones(40)}, "weights must be finite and ≥ 0"),
        (flow(), [X], {"weights": torch.zeros(40)}, "weights are 0 for all rows to train on"),
        (lambda: CouplingFlow(5, 1, (8,)).requires_grad_(False), [X], {}, "the flow has no parameters to train"),
        (lambda: nn.Linear(5, 5), [X], {}, "flow must be a glf_fast.Flow; got Linear"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(
    make: Any, arguments: list[Any], options: dict[str, Any], message: str
) -> None:
    options = {"batch_size": 16, "progress": False, **options}
    with pytest.raises((ValueError, TypeError), match=message):
        fit(make(), *arguments, **options)


def test_an_equal_validation_loss_is_no_better_one() -> None:
    made_, (x, context) = made(flow(), torch.float32), data(flow()(), 100, torch.float32)
    made_.log_prob(x)  # starts ActNorms
    result = fit(made_, x, context, epochs=8, batch_size=20, lr=1e-30, patience=2, progress=False)
    assert (result.stopped, result.best_epoch, len(result.validation_loss)) == ("patience", 1, 3)
