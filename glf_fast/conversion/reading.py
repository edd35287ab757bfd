"""Reading a flow layer by layer: what can be fused becomes `Layer`s, what cannot is kept, with the reason."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from glf_fast.conversion.layers import Conditioner, Coupling, Diagonal, Kept, Layer, NetworkCoupling, Unfusable
from glf_fast.conversion.padding import check_padding

__all__ = [
    "ConversionError",
    "Reading",
    "check_precision",
    "check_vectors",
    "context_features",
    "copied",
    "lost_in_training",
    "networks",
    "parameters_of",
    "read_each",
    "read_parts",
    "trained_together",
]


class ConversionError(ValueError):
    """A flow that cannot be converted; the message names the layer and the reason."""


@dataclass(frozen=True)
class Reading:
    """A flow of some library, as its reader `read(flow)` returns it.

    layers: first to last, data → N(0, I); a diagonal normal base is a `Diagonal` at the end.
    event_shape: of the data, (D,) or (C, H, W).
    log_prob: (x (B, *event_shape), context or None) → log p (B,) by the library itself, to compare with.
    inverse: (z like x from N(0, I), context or None) → x by the library itself; None where the library cannot.
    embedding: the network that the library sends the context through first, if any.
    context_shape: of one sample's context before the embedding; () without context, None where nothing says what it is.
    example: contexts (N, *context_shape) to compare with; random ones if None.
    """

    layers: list[Layer]
    event_shape: tuple[int, ...]
    log_prob: Callable[[Tensor, Tensor | None], Tensor]
    inverse: Callable[[Tensor, Tensor | None], Tensor] | None = None
    embedding: nn.Module | None = None
    context_shape: tuple[int, ...] | None = ()
    example: Tensor | None = None

    def contexts(self, n: int, generator: torch.Generator) -> Tensor | None:
        """n contexts to compare with; None if there is none."""
        if self.example is not None:
            return self.example[torch.randint(len(self.example), (n,), generator=generator)]
        if self.context_shape:
            return torch.randn(n, *self.context_shape, dtype=torch.float64, generator=generator)
        return None


def read_each(
    named_modules: Iterable[tuple[str, nn.Module]],
    read: Callable[[nn.Module], list[Layer]],
    keep: Callable[[nn.Module], nn.Module],
    device: str,
    others: Iterable[nn.Module] = (),
) -> list[Layer]:
    """The layers of the library's modules, in the order given (data → noise); as `read_parts`, in one list."""
    return [layer for part in read_parts(named_modules, read, keep, device, others) for layer in part]


def read_parts(
    named_modules: Iterable[tuple[str, nn.Module]],
    read: Callable[[nn.Module], list[Layer]],
    keep: Callable[[nn.Module], nn.Module],
    device: str,
    others: Iterable[nn.Module] = (),
) -> list[list[Layer]]:
    """The layers of each of the library's modules, in the order given (data → noise).

    Args:
        named_modules: name, for messages, and module of each of the library's layers.
        read: one module's layers; raises Unfusable.
        keep: the adapter that a `Kept` holds, for a module that `read` refuses.
        device: the type of device on which the flow will run: padding is not worth its time on a "cpu" alone.
        others: what else there is in the flow: its base, its embedding net.

    A module whose trained parameters are another's, too, is kept: stacking copies, and copies would not stay equal.
    """
    named = list(named_modules)
    modules = [*(module for _, module in named), *others]
    owners = Counter(p for module in modules for p in {id(p) for p in module.parameters() if p.requires_grad})
    parts: list[list[Layer]] = []
    for name, module in named:
        try:
            if any(owners[id(p)] > 1 for p in module.parameters()):
                raise Unfusable(
                    "shares parameters with another layer, the base or the embedding net; stacking would untie them"
                )
            part = read(module)
            for layer in part:
                if isinstance(layer, Coupling) and device == "cpu":
                    check_padding(layer)
            uses = Counter(p for layer in part for p in parameters_of(*_tensors(layer)))
            if uses and max(uses.values()) > 1:
                raise Unfusable("uses a network more than once; stacking would untie the uses")
        except Unfusable as reason:
            part = [Kept(keep(module), f"{name} ({type(module).__name__}): {reason}")]
        parts.append(part)
    return parts


def trained_together(*parameters: Tensor) -> bool:
    """Whether the library trains them; raises Unfusable if it trains some alone."""
    trained = {p.requires_grad for p in parameters}
    if len(trained) > 1:
        raise Unfusable("only some of its parameters are trained")
    return trained == {True}


def check_vectors(what: str, shape: tuple[int, ...]) -> None:
    """Raise ConversionError unless one sample of that shape is a vector."""
    if len(shape) != 1:
        raise ConversionError(f"{what} works on samples of shape {shape}: vectors and images (C, H, W) are covered")


def copied(module: nn.Module) -> nn.Module:
    """A deep copy. Tensors with a graph behind them, which caches and weight norm keep in modules, are copied without it.

    Raises ConversionError for one that cannot be copied all the same.
    """
    memo: dict[int, Tensor] = {}
    for part in module.modules():
        for value in vars(part).values():
            held = vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, nn.Module) else ()
            for tensor in (value, *held):
                if isinstance(tensor, Tensor) and not tensor.is_leaf:
                    memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(module, memo)
    except RuntimeError as error:
        raise ConversionError(f"cannot be copied to compare with ({error})") from error


def check_precision(dtype: torch.dtype) -> None:
    """Raise ConversionError unless a flow may have that dtype."""
    if dtype not in (torch.float32, torch.float64):
        raise ConversionError(
            f"its parameters are {dtype}: keep the flow in float32 and run it under torch.autocast, which uses low precision "
            "where it is safe"
        )


def context_features(modules: Iterable[nn.Module]) -> int:
    """The columns of the context that networks of nflows and normflows were made for; 0 if none says so."""
    for module in modules:
        features = getattr(module, "context_features", None)
        if isinstance(features, int):
            return features
        layer = getattr(module, "context_layer", None)  # of a MADE
        if isinstance(layer, nn.Linear):
            return layer.in_features
    return 0


def networks(layers: Iterable[Layer], *, kept: bool = True) -> Iterable[nn.Module]:
    """The networks of the library that stay in a flow of these layers: of couplings and, with `kept`, whole layers."""
    for layer in layers:
        if isinstance(layer, NetworkCoupling):
            yield layer.network
        elif kept and isinstance(layer, Kept):
            yield layer.module


def lost_in_training(layers: Iterable[Layer]) -> str:
    """What the library's layers do in training mode alone, and fused ones do not: "" if nothing."""
    names = set()
    for layer in layers:
        if isinstance(layer, Coupling) and layer.conditioner.dropout:
            names.add(f"Dropout (p = {layer.conditioner.dropout:g})")
        if isinstance(layer, Diagonal) and layer.statistics:
            names.add("BatchNorm")
    return ", ".join(sorted(names))


def parameters_of(*tensors: Tensor) -> set[int]:
    """ids of the parameters (leaves that require gradients) that the tensors are functions of."""
    found = {id(t) for t in tensors if t.is_leaf and t.requires_grad}
    seen = set()
    todo = [t.grad_fn for t in tensors if t.grad_fn is not None]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo += [following for following, _ in node.next_functions if following is not None]
    return found


def _tensors(layer: object) -> Iterable[Tensor]:
    """All tensors of a layer, those of its conditioner too."""
    if isinstance(layer, Kept):
        return
    for field in fields(layer):  # type: ignore[arg-type]
        value = getattr(layer, field.name)
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list):
            yield from value
        elif isinstance(value, Conditioner):
            yield from _tensors(value)
