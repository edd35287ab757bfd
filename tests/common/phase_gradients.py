"""Gradients of a model's phases, alone and in a group of processes, which import this module by its name."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed import barrier, destroy_process_group, get_rank, init_process_group
from torch.nn.parallel import DistributedDataParallel

from glf_fast.models import GenerativeModel


def phase_gradients(
    call: nn.Module, model: GenerativeModel, images: Tensor, phase: int, index: Tensor | None = None
) -> dict[str, Tensor]:
    """The gradients of the parameters that a phase moves, by name; `call` is the model itself, or what wraps it."""
    moves, minimises = model.phases()[phase].moves, model.phases()[phase].minimises
    model.zero_grad()
    call(images, torch.Generator().manual_seed(0), 0, phase, index)[minimises].backward()
    moved = {p for name in moves for p in model.parameter_groups()[name]}
    return {name: p.grad.clone() for name, p in model.named_parameters() if p in moved and p.grad is not None}


def compare_in_a_group(file: Path) -> None:
    """Check that two processes, each with one half of a model's inputs, get the gradients of all inputs, in any wrapper.

    The file holds pairs of a model and its inputs.
    """
    pairs = torch.load(file, weights_only=False)
    # Second derivatives of convolutions with one channel come with strides of their own, which costs DDP a copy.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    init_process_group("gloo")
    for model, images in pairs:
        half, index = images.chunk(2)[get_rank()], torch.arange(len(images)).chunk(2)[get_rank()]
        # One of several phases need not reach every parameter, and the first stage reaches none of the next one's.
        partial = any(set(phase.moves) != set(model.groups) for phase in model.phases())
        wrapped = DistributedDataParallel(model, find_unused_parameters=partial)
        for i in range(len(model.phases())):
            expected = phase_gradients(model, model, images, i)
            found = phase_gradients(wrapped, model, half, i, index)
            assert found and set(found) == set(expected)
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
    del wrapped  # a wrapper that outlives its group, or a process that leaves before the other, may wait for ever
    gc.collect()
    barrier()
    destroy_process_group()
