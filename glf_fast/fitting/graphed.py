"""Steps of training on a GPU: one whole step is captured as a CUDA graph, and replayed.

A replay launches some dozen kernels at once, where a step through Python takes longer on the host than on the GPU.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from glf_fast.fitting.dataset import Rows, checked_rows, checked_weights
from glf_fast.fitting.small_step import small_step
from glf_fast.fitting.steps import loss_of, one_step
from glf_fast.flow import AutoregressiveFlow, CouplingFlow, Flow
from glf_fast.flow.stacked_flow import StackedFlow
from glf_fast.ops.backends import chosen
from glf_fast.ops.coupling_flow.training_step import Progress, SmallFlowStep

__all__ = ["DeviceStep", "GraphedStep", "GraphedSteps", "why_not"]

SECONDS = 0.2  # between two looks at the losses, after which Ctrl-C, callbacks and the display have their turn
MOST_STEPS = 1024  # between two such looks


def why_not(flow: Flow, optimizer: torch.optim.Optimizer, rows: Rows) -> str:
    """Why the steps of this training cannot be captured; "" where they can."""
    if type(flow) not in (CouplingFlow, AutoregressiveFlow) or "log_prob" in vars(flow):
        return "not a CouplingFlow or an AutoregressiveFlow"
    assert isinstance(flow, StackedFlow)
    if flow.config.get("dropout"):
        return "dropout"
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return f"{type(optimizer).__name__}: the optimizer must be Adam or AdamW of torch.optim"
    if len(optimizer.param_groups) != 1:
        return "an optimizer with several groups of parameters"
    group = optimizer.param_groups[0]
    if not group["fused"]:
        return "an optimizer without fused=True"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "an optimizer with hooks"
    trained = group["params"]
    if any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in trained):
        return "parameters with hooks"
    device = trained[0].device
    if any(t is not None and t.device != device for t in (*flow.state_dict().values(), *trained, *vars(rows).values())):
        return "the flow and the rows are on several devices"
    return "" if device.type == "cuda" else f"the flow is on {device}, not on a GPU"


class DeviceStep:
    """A training step that the host only starts: which rows, at which rate, whether all is finite is known to the device.

    A step whose loss or gradient is not finite changes nothing, and the next one repeats it.

    Args:
        optimizer: Adam or AdamW, with fused=True and one group of parameters.
        clip: longest gradient, over all parameters; infinity for any.
        steps: for how many steps there is room. With one, each step is the first one.
        batch: rows of a step.

    Attributes:
        order: (steps, batch), the rows of each step. rates: (steps,), the learning rates. losses: (steps,), before each step.
        made: (1,), steps that were made; of several, which one is next.
    """

    def __init__(
        self, flow: Flow, optimizer: torch.optim.Optimizer, rows: Rows, clip: float, steps: int, batch: int
    ) -> None:
        self.flow, self.optimizer, self.rows, self.clip = flow, optimizer, rows, clip
        like: Tensor = optimizer.param_groups[0]["params"][0]
        of_rates = torch.float32 if like.is_cuda else torch.float64  # as the optimizer's kernels read a rate
        self.order = torch.zeros(steps, batch, dtype=torch.int64, device=like.device)
        self.rates = torch.zeros(steps, dtype=of_rates, device=like.device)
        self.losses = torch.zeros(steps, dtype=like.dtype, device=like.device)
        self.made = torch.zeros(1, dtype=torch.int64, device=like.device)

    def run(self) -> None:
        """Make the next step."""
        several = len(self.order) > 1
        index, rate = (t.index_select(0, self.made)[0] if several else t[0] for t in (self.order, self.rates))
        x, context, weights = (
            None if t is None else t.index_select(0, index) for t in (self.rows.x, self.rows.context, self.rows.weights)
        )
        assert x is not None
        trained: list[nn.Parameter] = [p for p in self.optimizer.param_groups[0]["params"] if p.requires_grad]
        loss = loss_of(self.flow, x, context, weights)
        # Into the parameters themselves, a backward would add on the stream that made them.
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        loss = loss.detach()
        for p, gradient in zip(trained, gradients, strict=True):
            p.grad = gradient
        norm = nn.utils.get_total_norm([g for g in gradients if g is not None])
        if math.isfinite(self.clip):
            nn.utils.clip_grads_with_norm_(trained, self.clip, norm)
        broken = ((loss + norm) * 0 != 0).float()  # 0 times what is not finite is NaN
        with self._optimizer_at(rate, broken):
            self.optimizer.step()
        if several:
            self.losses.index_copy_(0, self.made, loss[None].to(self.losses.dtype))
            self.made += 1 - broken.to(self.made.dtype)
        else:
            self.losses.copy_(loss)

    @contextmanager
    def _optimizer_at(self, rate: Tensor, broken: Tensor) -> Iterator[None]:
        """The optimizer for a step at this rate, which changes nothing if `broken` is 1."""
        group = self.optimizer.param_groups[0]
        capturing = rate.is_cuda and torch.cuda.is_current_stream_capturing()
        before = group["lr"], group["capturable"]
        group["lr"], group["capturable"] = rate, capturing
        self.optimizer.found_inf = broken  # type: ignore[attr-defined]  # as torch.amp.GradScaler says it
        try:
            yield
        finally:
            del self.optimizer.found_inf  # type: ignore[attr-defined]
            group["lr"], group["capturable"] = before


class _Same:
    """An object that equals itself alone."""

    def __init__(self, what: object) -> None:
        self.what = what

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.what is other.what

    __hash__ = None  # type: ignore[assignment]


class CapturedStep:
    """A `DeviceStep` that is captured as a graph after its first run, and replayed.

    Of small flows, the kernels of `small_step` take the place of autograd and optimizer from the second run on, which goes
    through Python, too, and the third one is captured. Where parameters or the optimizer's state have moved, or a setting has
    changed, all is done again.

    Attributes:
        failed: why it could not be captured, so that each run goes through Python; "" where it could, or was not tried yet.
        rate: what its user has set its only rate to.
    """

    def __init__(self, step: DeviceStep) -> None:
        self.step = step
        self.failed = ""
        self.rate: float | Tensor = math.nan
        self._several = len(step.order) > 1
        self._small: SmallFlowStep | None = None
        self._compiled = False  # the kernels of `_small`, by its first run
        self._graph: torch.cuda.CUDAGraph | None = None
        self._known: list[Any] = []  # what the graph holds

    def prepare(self) -> None:
        """Say that parameters may have changed since the last step. Of a single step, each run takes them as they are."""
        if self._small is not None and self._several:
            self._small.prepare()

    def run(self, steps: int = 1) -> None:
        """Make the next steps."""
        while steps:
            if self._known != self._facts():
                # What is made once must not be in the graph: ActNorms' start, the optimizer's state, kernels that are compiled.
                self._graph = None
                self.step.run()
                self._choose()
                self._known = self._facts()
                made = 1
            else:
                if self._graph is None and not self.failed and (self._small is None or self._compiled):
                    self._capture()
                made = self._replay(steps)
            steps -= made
        torch.autograd.graph.increment_version(self._trained())

    def _replay(self, steps: int) -> int:
        """Make so many steps where they are captured, else one; returns how many."""
        if self._graph is None:
            self._run()
            return 1
        for _ in range(steps):
            self._graph.replay()
        return steps

    def _choose(self) -> None:
        step = self.step
        progress = Progress(step.order, step.rates, step.losses, step.made if self._several else None)
        self._small = small_step(step.flow, step.optimizer, step.rows, step.clip, progress)
        self._compiled = False
        self.prepare()

    def _run(self) -> None:
        if self._small is None:
            self.step.run()
            return
        if not self._several:
            self._small.prepare()
        self._small.run()
        self._compiled = True

    def _trained(self) -> list[Tensor]:
        return [p for p in self.step.optimizer.param_groups[0]["params"] if p.requires_grad]

    def _facts(self) -> list[Any]:
        """Addresses and settings that a graph holds; of the optimizer's state its dictionary, which a new state replaces."""
        optimizer, trained = self.step.optimizer, self._trained()
        settings = [v for name, v in optimizer.param_groups[0].items() if name not in ("params", "lr", "initial_lr")]
        device = trained[0].device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        precision = torch.get_float32_matmul_precision()
        addresses = [p.data_ptr() for p in trained]
        return [_Same(optimizer.state), *addresses, *settings, autocast, precision, chosen()]

    def _capture(self) -> None:
        try:
            graph = torch.cuda.CUDAGraph()
            # A capture that fails leaves its own stream behind as the current one.
            own = torch.cuda.stream(torch.cuda.current_stream(self.step.order.device))
            with own, torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run()
        except RuntimeError as error:
            self.failed = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"glf_fast: steps go through Python, because they could not be captured as a CUDA graph: {self.failed}",
                RuntimeWarning,
                stacklevel=2,
            )
        else:
            self._graph = graph


class GraphedSteps:
    """Many steps a call, for `fit`, each a replay. The host waits for the device once a call.

    Args:
        clip: longest gradient, over all parameters; infinity for any.
    """

    def __init__(self, flow: Flow, optimizer: torch.optim.AdamW, rows: Rows, clip: float) -> None:
        self.arguments = flow, optimizer, rows, clip
        self._step: CapturedStep | None = None
        self._at_once = 1  # steps of a call

    def run(self, order: Tensor, rates: Sequence[float]) -> tuple[list[float], str]:
        """As `Steps.run`."""
        if self._step is None:
            self._step = CapturedStep(DeviceStep(*self.arguments, MOST_STEPS, order.shape[1]))
        step, n = self._step.step, min(self._at_once, len(order))
        start = time.monotonic()
        step.order[:n].copy_(order[:n])
        step.rates[:n].copy_(torch.tensor(rates[:n], dtype=step.rates.dtype))
        step.made.zero_()
        self._step.prepare()
        self._step.run(n)
        found, made = step.losses[:n].tolist(), int(step.made)
        # The first call compiles, and the second one captures: neither says how long a step takes.
        by_time = n * SECONDS / max(time.monotonic() - start, 1e-6)
        self._at_once = max(1, min(int(by_time), 4 * n, MOST_STEPS))
        wrong = "" if made == n else "gradient" if math.isfinite(found[made]) else "loss"
        return found[:made], wrong


class GraphedStep:
    """A training step of a flow that is one CUDA graph: rows, loss, gradients, clipping and AdamW.

    A call makes one step by maximum likelihood, on the mean of −log p(x | context) over the rows that it is given. The first
    calls of each batch size are ordinary steps, the second or third one captures, and all others replay. Parameters and the
    state of the optimizer are changed in place: `state_dict`, checkpoints and learning-rate schedulers work as ever, and
    settings of the optimizer are read at each call. A step whose loss or gradient is not finite changes nothing. `fit` makes
    whole runs of such steps.

    On a processor, and wherever `why_not` is not empty, each call is an ordinary step with the same result.

    Args:
        flow: the flow, in training mode.
        optimizer: `torch.optim.AdamW` or `Adam` of the flow's parameters, with `fused=True`.
        x: (N, *event_shape), all rows, on the flow's device. Batches that are made as training goes are copied into x.
        context: (N, *context_shape), of a conditional flow.
        weights: (N,) ≥ 0, factors of the rows' losses.
        clip: scale gradients down whose norm, over all parameters, is above this.

    Attributes:
        why_not: why steps are not captured, such as "dropout"; "" where they are.

    Raises:
        ValueError, TypeError: arguments that do not fit the flow, NaN in x or context.

    Example:
        >>> flow = CouplingFlow(dim=3, steps=4, hidden=(32, 32))
        >>> optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3, fused=True)
        >>> step = GraphedStep(flow, optimizer, x=torch.randn(1000, 3), clip=5.0)
        >>> losses = [step(rows) for rows in torch.randperm(1000).split(250)]
        >>> torch.stack(losses).isfinite().all()
        tensor(True)
    """

    def __init__(
        self,
        flow: Flow,
        optimizer: torch.optim.Optimizer,
        x: Tensor,
        context: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        clip: float | None = None,
    ) -> None:
        if not isinstance(flow, Flow):
            raise TypeError(f"flow must be a glf_fast.Flow; got {type(flow).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be one of torch.optim; got {type(optimizer).__name__}")
        if clip is not None and not 0 < clip < math.inf:
            raise ValueError(f"clip must be > 0 and finite; got {clip!r}")
        x, context = checked_rows(flow, x, context, "")
        rows = Rows(x, context, None if weights is None else checked_weights(weights, len(x)))
        self._arguments = flow, optimizer, rows, math.inf if clip is None else clip
        self._by_batch: dict[int, CapturedStep] = {}
        self._why_not = why_not(flow, optimizer, rows)

    @property
    def why_not(self) -> str:
        """Why steps are not captured; "" where they are."""
        failed = [step.failed for step in self._by_batch.values() if step.failed]
        return self._why_not or (failed[0] if failed else "")

    def __call__(self, rows: Tensor) -> Tensor:
        """Make a step on these rows, indices (B,) into x; returns the loss before it, without waiting for the GPU."""
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.ndim != 1 or not len(rows):
            got = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"rows must be indices (B,) into x, an int64 tensor; got {got}")
        flow, optimizer, all_rows, clip = self._arguments
        with torch.enable_grad():
            if self._why_not:
                like = optimizer.param_groups[0]["params"][0]
                return one_step(flow, optimizer, all_rows.pick(rows, like), clip)[0]
            captured = self._by_batch.get(len(rows))
            if captured is None:
                captured = self._by_batch[len(rows)] = CapturedStep(DeviceStep(*self._arguments, 1, len(rows)))
            step = captured.step
            step.order[0].copy_(rows)
            rate = optimizer.param_groups[0]["lr"]
            if isinstance(rate, Tensor) or rate != captured.rate:
                step.rates.fill_(rate)
                captured.rate = rate
            captured.run()
            return step.losses[0].clone()
