"""Argument checks shared by the operations: each error names the argument, what came and what would be right."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from glf_fast.reference import ACTIVATION_FUNCTIONS, COUPLINGS, LOG_SCALES, NETWORKS, PARAMETRIZATIONS, TAILS, Spline

__all__ = [
    "check_activation",
    "check_alike",
    "check_channels",
    "check_choice",
    "check_device",
    "check_dropout",
    "check_fake",
    "check_floating",
    "check_hidden_layers",
    "check_integer",
    "check_log_scale",
    "check_network_of",
    "check_seed",
    "check_shape",
    "check_spline",
    "check_spline_of",
    "check_state",
    "check_tensors",
]


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_integer(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless `value` is an integer, also one of numpy, of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be an int; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be ≥ {least}; got {value}")


def check_dropout(value: Any) -> None:
    """Raise ValueError unless `value` is a probability with which hidden units are dropped."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) < 1:
        raise ValueError(f"dropout must be a number of at least 0, and below 1; got {value!r}")


def check_seed(seed: Any) -> None:
    """Raise TypeError or ValueError unless `seed` is one that dropout takes."""
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        got = f"a tensor of {seed.dtype}" if isinstance(seed, Tensor) else repr(seed)
        raise TypeError(f"seed must be a tensor of int64 where dropout is above 0; got {got}")
    if seed.numel() != 1:
        raise ValueError(f"seed must have one element; got shape {tuple(seed.shape)}")


def check_log_scale(name: str, constant: float | None) -> None:
    """Raise ValueError unless `name` is a log-scale function and `constant` one that it can have; None is its default."""
    check_choice("log_scale", name, LOG_SCALES)
    if constant is None:
        return
    if LOG_SCALES[name] is None:
        raise ValueError(f"log_scale {name!r} has no constant; got log_scale_constant={constant}")
    low, high = {"softclip": (0.0, 1.0), "glow": (-math.inf, math.inf)}.get(name, (0.0, math.inf))
    if not low < constant < high:
        raise ValueError(f"log_scale_constant of {name!r} must be between {low} and {high}; got {constant}")


def check_activation(name: str, constant: Any) -> None:
    """Raise ValueError unless `name` is an activation and `constant` one that it can have; None is its default."""
    check_choice("activation", name, ACTIVATION_FUNCTIONS)
    if constant is None:
        return
    f = ACTIVATION_FUNCTIONS[name]
    if f.default is None:
        raise ValueError(f"activation {name!r} has no constant; got activation_constant={constant}")
    low, high = f.interval
    if isinstance(constant, bool) or not isinstance(constant, numbers.Real) or not low < float(constant) < high:
        raise ValueError(
            f"activation_constant of {name!r} must be a number above {low:g} and below {high:g}; got {constant!r}"
        )


def check_network_of(coupling: str, network: str) -> None:
    """Raise ValueError unless `network` is a kind of network, and one that a coupling of this name can have."""
    check_choice("network", network, NETWORKS)
    if network != "mlp" and COUPLINGS[coupling].networks > 1:
        raise ValueError(f"coupling={coupling!r} has two MLPs; got network={network!r}, which is for one network")


def check_spline(options: Spline) -> None:
    """Raise ValueError unless these are options that a spline can have, TypeError unless they are a `Spline`."""
    if not isinstance(options, Spline):
        raise TypeError(f"a spline's options must be a glf_fast.Spline, such as Spline(bins=8); got {options!r}")
    for name in ("tails", "parametrization"):
        if not isinstance(value := getattr(options, name), str):
            raise TypeError(f"a spline's {name} must be a name; got {value!r}")
    for name in ("low", "high", "scale", "min_width", "min_height", "min_derivative"):
        value = getattr(options, name)
        if not (isinstance(value, int | float) or (value is None and name.startswith("min_"))):
            raise TypeError(f"a spline's {name} must be a number; got {value!r}")
    check_choice("tails", options.tails, TAILS)
    check_choice("parametrization", options.parametrization, PARAMETRIZATIONS)
    if type(options.bins) is not int or not 2 <= options.bins <= 32:
        raise ValueError(f"a spline's bins must be 2 to 32, an int; got {options.bins!r}")
    if not -1e6 <= options.low < options.high <= 1e6:  # float32 has no digits left for the bins of larger boxes
        raise ValueError(
            f"a spline's box must have -1e6 <= low < high <= 1e6; got low={options.low}, high={options.high}"
        )
    if not 0 < options.scale < math.inf:
        raise ValueError(f"a spline's scale must be positive; got {options.scale}")
    form = PARAMETRIZATIONS[options.parametrization]
    least = form.min_derivative if options.min_derivative is None else options.min_derivative
    if not 0 < least < 1:
        raise ValueError(f"min_derivative must be between 0 and 1; got {least}")
    for name, given in (("min_width", options.min_width), ("min_height", options.min_height)):
        if given and form.soft_clip:
            raise ValueError(f"parametrization {options.parametrization!r} has no {name}; got {given}")
        if not 0 <= (given or 0) * options.bins < 1:
            raise ValueError(
                f"{name} of {options.bins} bins must be at least 0 and less than 1/{options.bins}; got {given}"
            )


def check_spline_of(coupling: str, spline: Spline | None) -> None:
    """Raise ValueError or TypeError unless a coupling of this name can have such a spline; None is the default one."""
    if spline is None:
        return
    check_spline(spline)
    if coupling != "spline":
        raise ValueError(f'spline is for coupling="spline"; got {spline!r} with coupling={coupling!r}')


def check_tensors(**named: Any) -> None:
    """Raise TypeError unless all are tensors; a context may be None.

    Asked where an attribute was missing: asking before every call would take longer than the other checks.
    """
    for name, value in named.items():
        if not isinstance(value, Tensor) and not (value is None and name == "context"):
            raise TypeError(
                f"{name} must be a torch.Tensor; got {type(value).__name__} (torch.as_tensor converts lists and arrays)"
            ) from None


def check_shape(name: str, tensor: Tensor, shape: Sequence[int | None], meaning: str) -> None:
    """Raise ValueError unless the tensor has this shape; None stands for any size. `meaning` is the shape in symbols."""
    try:
        if tensor.shape == shape:  # the common case, ten times faster than what follows
            return
    except AttributeError:
        check_tensors(**{name: tensor})
        raise
    if tensor.ndim != len(shape) or any(
        want is not None and got != want for got, want in zip(tensor.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must have shape {meaning} = ({wanted}); got {tuple(tensor.shape)}")


def check_channels(name: str, tensor: Tensor, dim: int) -> None:
    """Raise ValueError unless the tensor is (batch, dim, …)."""
    if not (isinstance(tensor, Tensor) and tensor.ndim >= 2 and tensor.shape[1] == dim):
        check_tensors(**{name: tensor})
        check_shape(name, tensor, (None, dim, *(None,) * (tensor.ndim - 2)), "(batch, dim, …)")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the tensor is floating-point."""
    try:
        floating = tensor.is_floating_point()
    except AttributeError:
        check_tensors(**{name: tensor})
        raise
    if not floating:
        raise TypeError(f"{name} must be floating-point; got {tensor.dtype} (convert it with .float())")


def check_state(name: str, tensor: Tensor, parameters: Tensor) -> Tensor:
    """The flow's state in the dtype of its parameters: half-precision input is widened, float32/float64 mixtures refused."""
    check_floating(name, tensor)
    if parameters.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"the flow's parameters are {parameters.dtype}, its state must be float32 or float64: keep the flow in float32 "
            "and run it under torch.autocast, which uses low precision where it is safe"
        )
    if tensor.device != parameters.device:
        raise ValueError(
            f"{name} is on {tensor.device} but the flow is on {parameters.device}: move one of them with .to()"
        )
    if tensor.dtype != parameters.dtype and tensor.dtype.itemsize >= 4:
        raise TypeError(f"{name} is {tensor.dtype} but the flow is {parameters.dtype}: convert one of them with .to()")
    return tensor if tensor.dtype == parameters.dtype else tensor.to(parameters.dtype)


def check_device(named: Iterable[tuple[str, Tensor | None]], device: torch.device) -> None:
    """Raise ValueError unless all tensors are on this device; None is nowhere."""
    given = {name: tensor for name, tensor in named if tensor is not None}
    check_tensors(**given)  # arrays have a device, too
    for name, tensor in given.items():
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} but the rest is on {device}: move one of them with .to()")


def check_alike(named: Iterable[tuple[str, Tensor]], state: Tensor) -> None:
    """Raise unless all tensors are on the state's device and of its dtype, or of half precision (autocast computes in it)."""
    for name, tensor in named:
        if tensor.device != state.device:
            check_device([(name, tensor)], state.device)
        if tensor.dtype != state.dtype and (tensor.dtype.itemsize >= 4 or not tensor.is_floating_point()):
            raise TypeError(f"{name} is {tensor.dtype} but the rest is {state.dtype}: convert one of them with .to()")


def check_hidden_layers(weights: Sequence[Tensor], biases: Sequence[Tensor], steps: int, n_in: int, n_v: int) -> None:
    """Raise ValueError unless stacked MLP weights (K, nᵢ, nᵢ₊₁) and biases (K, nᵢ₊₁) chain from n_in to 2·n_v, or n_v.

    Those of two networks, (K, 2, nᵢ, nᵢ₊₁) and (K, 2, nᵢ₊₁), from n_in to n_v.
    """
    if len(weights) != len(biases) or not weights:
        raise ValueError(
            f"weights and biases must be two lists of one length ≥ 1; got {len(weights)} and {len(biases)}"
        )
    stack = (steps, 2) if weights[0].ndim == 4 else (steps,)
    n_out = n_v if len(stack) == 2 or weights[-1].shape[-1] == n_v else 2 * n_v
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        width = n_out if i == len(weights) - 1 else weight.shape[-1]
        if weight.shape != (*stack, n_in, width) or bias.shape != (*stack, width):  # names are made only for errors
            names = "steps, networks" if len(stack) == 2 else "steps"
            check_shape(f"weights[{i}]", weight, (*stack, n_in, width), f"({names}, in, out)")
            check_shape(f"biases[{i}]", bias, (*stack, width), f"({names}, out)")
        n_in = width


def check_fake(tensor: Tensor) -> None:
    """Raise RuntimeError for a real tensor in the fake implementation of an operation.

    torch calls that implementation, too, when one of the arguments is on "meta", and would return uninitialised memory.
    """
    if tensor.device.type != "meta" and type(tensor) in (Tensor, torch.nn.Parameter):
        raise RuntimeError(f"some arguments are on {tensor.device}, others on meta, where tensors have no data")
