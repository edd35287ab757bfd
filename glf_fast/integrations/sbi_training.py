"""sbi's training by `glf_fast.fit`: many steps in one call of C++, where sbi's own loop spends most of a step in Python."""

from __future__ import annotations

import time
from typing import Any

import torch
from sbi.inference import NLE, NPE
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from glf_fast.fitting import FitResult, fit
from glf_fast.flow import Embedded, Flow, SequentialFlow

__all__ = ["train"]

CHUNK = 10_000  # simulations that go through an embedding net at once


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
    the steps of `maf()` and `coupling_flow()` run in C++, unless the embedding net has something to learn. Afterwards
    `inference.build_posterior()` and `inference.summary` are as after sbi's own training, which cannot resume this one.

    Args:
        inference: an NPE or NLE trainer with one of our estimators (`density_estimator=maf()`), after `append_simulations`.
        training_batch_size, learning_rate, validation_fraction: as in `inference.train`.
        stop_after_epochs, max_num_epochs, clip_max_norm: as in `inference.train`.

    Returns:
        The trained estimator.

    Raises:
        ValueError: no or too few simulations, NaN in them, arguments out of their range, an estimator of the other conditional,
            or a later round of NPE, whose loss corrects for the proposal (`inference.train` does).
        TypeError: a trainer of another kind, or an estimator that is not ours.
        KeyboardInterrupt: Ctrl-C; the trainer has the estimator with the best weights so far.

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
    if not isinstance(max_num_epochs, int) or max_num_epochs < 1:
        raise ValueError(f"max_num_epochs must be a whole number ≥ 1; got {max_num_epochs!r}")
    theta, x, _ = inference.get_simulations()
    training = int((1 - validation_fraction) * len(theta))
    if not 0 < validation_fraction < 1 or not 0 < training < len(theta):
        raise ValueError(
            f"of {len(theta)} simulations some must be trained on and some held out; got {validation_fraction=}"
        )
    chosen = torch.randperm(len(theta))
    rows = chosen[:training].to(theta.device), chosen[training:].to(theta.device)
    estimator = inference._neural_net
    if estimator is None:
        estimator = inference._build_neural_net(theta[rows[0]].cpu(), x[rows[0]].cpu())
    if not isinstance(getattr(estimator, "net", None), SequentialFlow):
        raise TypeError(f"the estimator must be one of ours, such as maf(); got {type(estimator).__name__}")
    estimator.check_of("x" if isinstance(inference, NLE) else "theta")
    estimator.to(inference._device)
    flow, data = _inner(estimator, *((x, theta) if isinstance(inference, NLE) else (theta, x)))
    wrong = [i for i, finite in enumerate(_finite(flow, *data).tolist()) if not finite]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(theta)} simulations have NaN or infinity in theta or x, first number {wrong[0]}: "
            "append_simulations(…, exclude_invalid_x=True) leaves them out"
        )
    (z, context, before), (held_z, held_context, held_before) = ([t[part.to(t.device)] for t in data] for part in rows)

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
    if result.validation_loss:
        inference.summary["epochs_trained"].append(len(result.validation_loss))
        inference.summary["best_validation_loss"].append(min(result.validation_loss) - held_before.mean().item())
    if result.stopped == "interrupted":
        raise KeyboardInterrupt
    return estimator


@torch.no_grad()
def _inner(estimator: Any, values: Tensor, condition: Tensor) -> tuple[Flow, tuple[Tensor, Tensor, Tensor]]:
    """The part of an estimator that is trained, and its rows: z (N, D), context (N, …), log|∂z/∂values| (N,)."""
    *fixed, flow = estimator.net.layers
    network: nn.Module = estimator.embedding_net
    # With nothing that training changes, or that is otherwise in training, the network runs once for all epochs.
    learns = any(p.requires_grad for p in network.parameters()) or any(
        isinstance(m, _NormBase | _DropoutNd) for m in network.modules()
    )
    if not learns:
        network.eval()
    device, found = flow.mlp_weights[0].device, []
    for v, c in zip(values.split(CHUNK), condition.split(CHUNK), strict=True):
        z, logdet = v.to(device), torch.zeros(len(v), dtype=v.dtype, device=device)
        for layer in fixed:
            z, added = layer(z)
            logdet = logdet + added
        found.append((z, c if learns else network(c.to(device)), logdet))
    z, context, logdet = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Embedded(flow, network, tuple(condition.shape[1:])) if learns else flow, (z, context, logdet)


def _finite(flow: Flow, z: Tensor, context: Tensor, logdet: Tensor) -> Tensor:
    """Whether a row has neither NaN nor infinity (N,). What an embedding net makes of its input is its own business."""
    finite = z.isfinite().all(1) & logdet.isfinite()
    return finite if isinstance(flow, Embedded) else finite & context.isfinite().flatten(1).all(1)
