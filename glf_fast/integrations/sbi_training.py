"""sbi's training by `glf_fast.fit`: many steps in one call of C++, where sbi's own loop spends most of a step in Python."""

from __future__ import annotations

import time
from typing import Any

import torch
from sbi.inference import NLE, NPE
from torch import Tensor, nn

from glf_fast.fitting import FitResult, fit
from glf_fast.flow import Embedded, Flow, SequentialFlow

__all__ = ["train"]


def train(
    inference: NPE | NLE,
    *,
    training_batch_size: int = 200,
    learning_rate: float = 5e-4,
    validation_fraction: float = 0.1,
    stop_after_epochs: int = 20,
    max_num_epochs: int = 2**31 - 1,
    clip_max_norm: float | None = 5.0,
) -> Any:
    """Do what `inference.train(…)` does, faster: fit the estimator of the trainer's simulations, with sbi's settings.

    The same maximum likelihood by Adam on random batches, held-out rows, early stopping and best weights kept. On a processor
    the steps of `maf()` and `coupling_flow()` run in C++, unless the embedding net has parameters to train. Afterwards
    `inference.build_posterior()` and `inference.summary` are as after sbi's own training.

    Args:
        inference: an NPE or NLE trainer with one of our estimators (`density_estimator=maf()`), after `append_simulations`.
        training_batch_size, learning_rate, …: as in `inference.train`.

    Returns:
        The trained estimator.

    Raises:
        ValueError: no simulations, or a later round of NPE, whose loss corrects for the proposal (`inference.train` does).
        TypeError: a trainer of another kind, or an estimator that is not ours.

    Example:
        >>> prior = BoxUniform(-torch.ones(3), torch.ones(3))
        >>> inference = NPE(prior, density_estimator=maf(), show_progress_bars=False)
        >>> theta = prior.sample((500,))
        >>> estimator = train(inference.append_simulations(theta, theta + 0.1 * torch.randn(500, 3)), max_num_epochs=2)
        >>> inference.build_posterior().sample((4,), x=torch.zeros(1, 3), show_progress_bars=False).shape
        torch.Size([4, 3])
    """
    if not isinstance(inference, NPE | NLE):
        raise TypeError(f"inference must be an NPE or an NLE of sbi; got {type(inference).__name__}")
    rounds = inference._data_round_index
    if not rounds:
        raise ValueError("there are no simulations: call inference.append_simulations(theta, x) first")
    if isinstance(inference, NPE) and max(rounds) > 0:
        raise ValueError("a later round of NPE corrects its loss for the proposal: use inference.train()")
    theta, x, _ = inference.get_simulations()
    chosen = torch.randperm(len(theta))
    held_out = len(theta) - int((1 - validation_fraction) * len(theta))
    rows = chosen[held_out:].to(theta.device), chosen[:held_out].to(theta.device)  # to train on, to validate on
    estimator = inference._neural_net
    if estimator is None:
        estimator = inference._build_neural_net(theta[rows[0]].cpu(), x[rows[0]].cpu())
    if not isinstance(getattr(estimator, "net", None), SequentialFlow):
        raise TypeError(f"the estimator must be one of ours, such as maf(); got {type(estimator).__name__}")
    estimator.to(inference._device)
    values, condition = (x, theta) if isinstance(inference, NLE) else (theta, x)
    with torch.no_grad():
        estimator.loss(values[:2], condition[:2])  # raises where θ and x have changed places
    flow, data = _inner(estimator, values, condition)
    (z, context, before), (held_z, held_context, held_before) = ([t[part] for t in data] for part in rows)

    started, epochs = time.time(), 0

    def report(result: FitResult) -> None:
        nonlocal started, epochs
        epochs += 1
        inference._maybe_show_progress(inference._show_progress_bars, epochs)
        # sbi's losses are those of the simulations; what comes before the fitted flow adds a constant.
        inference.summary["training_loss"].append(result.training_loss[-1] - before.mean().item())
        inference.summary["validation_loss"].append(result.validation_loss[-1] - held_before.mean().item())
        inference.summary["epoch_durations_sec"].append(time.time() - started)
        started = time.time()

    result = fit(
        flow, z, context, epochs=max_num_epochs, batch_size=min(training_batch_size, len(z)), lr=learning_rate,
        clip=clip_max_norm, validation=(held_z, held_context), patience=stop_after_epochs,
        seed=int(torch.randint(2**31, ())), callback=report, progress=False,
    )  # fmt: skip
    estimator.eval().zero_grad(set_to_none=True)
    inference._neural_net = estimator
    inference.summary["epochs_trained"].append(len(result.training_loss))
    inference.summary["best_validation_loss"].append(min(result.validation_loss) - held_before.mean().item())
    return estimator


@torch.no_grad()
def _inner(estimator: Any, values: Tensor, condition: Tensor) -> tuple[Flow, tuple[Tensor, Tensor, Tensor]]:
    """The part of an estimator that is trained, and its rows: z (N, D), context (N, …), log|∂z/∂values| (N,)."""
    *fixed, flow = estimator.net.layers
    z, logdet = values, values.new_zeros(len(values))
    for layer in fixed:
        z, added = layer(z)
        logdet = logdet + added
    network: nn.Module = estimator.embedding_net
    if any(p.requires_grad for p in network.parameters()):
        return Embedded(flow, network, tuple(condition.shape[1:])), (z, condition, logdet)
    return flow, (z, network.eval()(condition), logdet)
