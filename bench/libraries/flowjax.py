"""flowjax, compiled by XLA: couplings or masked networks between permutations, as jitted passes over arrays."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bench.cases import AutoregressiveCase, FlowCase

__all__ = ["fits", "new_flow", "passes", "why_not"]


def why_not() -> str:
    """Why it cannot be measured, or ""."""
    return "" if importlib.util.find_spec("flowjax") else "flowjax is not installed (glf_fast[bench] has it)"


def new_flow(case: FlowCase) -> Any:
    """A flow of a case's size.

    Raises:
        ValueError: hidden layers of several widths.
    """
    import jax
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import coupling_flow, masked_autoregressive_flow

    if len({*case.hidden}) != 1:
        raise ValueError(f"hidden layers of one width are needed; got {case.hidden}")
    masked = isinstance(case, AutoregressiveCase)
    return (masked_autoregressive_flow if masked else coupling_flow)(
        jax.random.key(0),
        base_dist=Normal(jax.numpy.zeros(case.dim)),
        # So many inner knots, and two at the ends, whose slopes the network makes, too; None is affine.
        transformer=RationalQuadraticSpline(knots=case.bins - 1, interval=5) if case.bins else None,
        cond_dim=case.context_dim or None,
        flow_layers=case.steps,
        nn_width=case.hidden[0],
        nn_depth=len(case.hidden),
        nn_activation=jax.numpy.tanh if masked else jax.nn.relu,
    )


def fits(case: FlowCase, rows: int, epochs: int) -> Callable[[], Any]:
    """Runs of `fit_to_data` over so many rows in batches of a case's size; the compilation is over.

    Raises:
        ValueError: hidden layers of several widths. AssertionError: what is wrong with a run.
    """
    import jax
    import optax
    from flowjax.train import fit_to_data
    from flowjax.train.losses import MaximumLikelihoodLoss

    flow = new_flow(case)
    data = tuple(jax.numpy.asarray(t.numpy()) for t in replace(case, batch=rows).inputs() if t is not None)
    loss, optimizer = MaximumLikelihoodLoss(), optax.adam(1e-9)  # others would be compiled again

    def run() -> Any:
        fitted, losses = fit_to_data(
            jax.random.key(1), flow, data, loss_fn=loss, optimizer=optimizer, max_epochs=epochs, max_patience=epochs,
            batch_size=case.batch, show_progress=False,
        )  # fmt: skip
        return jax.block_until_ready(jax.tree.leaves(fitted)), losses["val"]

    _, losses = run()
    assert len(losses) == epochs and all(map(math.isfinite, losses)), f"losses {losses}"
    return run


def passes(case: FlowCase, mode: str) -> Callable[[], Any]:
    """One pass of a flow of a case's size, which returns when it is done; its compilation is over.

    Raises:
        ValueError: hidden layers of several widths. AssertionError: what is wrong with a pass.
    """
    import equinox
    import jax
    import optax
    import paramax

    flow = new_flow(case)
    parameters, rest = equinox.partition(
        flow, equinox.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )
    x, context = (None if t is None else jax.numpy.asarray(t.numpy()) for t in case.inputs())

    def log_prob(parameters: Any, x: Any, context: Any) -> Any:
        return paramax.unwrap(equinox.combine(parameters, rest)).log_prob(x, context)

    def sample(parameters: Any, key: Any, context: Any) -> Any:
        shape = (case.batch,) if context is None else ()
        return paramax.unwrap(equinox.combine(parameters, rest)).sample(key, shape, context)

    def loss(parameters: Any, x: Any, context: Any) -> Any:
        return -log_prob(parameters, x, context).mean()

    optimizer = optax.adam(1e-9)  # as in bench.flows

    def step(parameters: Any, state: Any, x: Any, context: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(parameters, x, context)
        updates, state = optimizer.update(gradients, state)
        return value, equinox.apply_updates(parameters, updates), state

    stepped = jax.jit(step, donate_argnums=(0, 1))
    state = optimizer.init(parameters)

    def one_step() -> Any:
        nonlocal parameters, state
        value, parameters, state = jax.block_until_ready(stepped(parameters, state, x, context))
        return value

    functions = {"log_prob": log_prob, "sample": sample, "train": jax.value_and_grad(loss)}
    if mode == "step":
        one = one_step
    else:
        compiled = jax.jit(functions[mode])
        given = jax.random.key(1) if mode == "sample" else x
        one = lambda: jax.block_until_ready(compiled(parameters, given, context))  # noqa: E731
    out = one()
    shapes = {"log_prob": (case.batch,), "sample": (case.batch, case.dim)}
    value = out[0] if mode == "train" else out
    assert value.shape == shapes.get(mode, ()), f"shape {value.shape}"
    assert all(jax.numpy.isfinite(leaf).all() for leaf in jax.tree.leaves(out)), "not all finite"
    return one
