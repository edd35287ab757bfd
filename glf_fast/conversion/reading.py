"""Reading a flow layer by layer: what can be fused becomes `Layer`s, what cannot is kept, with the reason."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn

from glf_fast.conversion.chains import Part, Shape
from glf_fast.conversion.images import Reshaped
from glf_fast.conversion.layers import (
    Conditioner,
    ConversionError,
    Coupling,
    Diagonal,
    Kept,
    Layer,
    Transform,
    Unfusable,
)
from glf_fast.conversion.library import Library, check_shape
from glf_fast.conversion.padding import fastest, only_permutes
from glf_fast.flow import Squeeze

__all__ = [
    "Map",
    "Reading",
    "check_modes",
    "check_precision",
    "copied",
    "fused_context",
    "lost_in_training",
    "networks",
    "on_processor",
    "parameters_of",
    "read_flow",
    "read_parts",
    "reason_of",
]

# A function of (x, context or None).
Map = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Reading:
    """A flow of some library, as it was read, with its own functions to compare with."""

    layers: list[Layer]  # first to last, data → N(0, I); a diagonal normal base is a `Diagonal` at the end
    event_shape: Shape  # of the data, (D,) or (C, H, W)
    log_prob: Map  # x (B, *event_shape) → log p (B,)
    inverse: Map | None = None  # z from N(0, I) → x; None where the library cannot
    embedding: nn.Module | None = None  # the network that the library sends the context through first
    # One sample's, before the embedding; () without context, None where nothing says what it is.
    context_shape: Shape | None = ()
    example: Tensor | None = None  # contexts (N, *context_shape) to compare with; random ones if None

    def contexts(self, n: int, generator: torch.Generator) -> Tensor | None:
        """n contexts to compare with; None if there is none."""
        if self.example is not None:
            return self.example[torch.randint(len(self.example), (n,), generator=generator)]
        if self.context_shape:
            return torch.randn(n, *self.context_shape, dtype=torch.float64, generator=generator)
        return None


def read_flow(library: Library, flow: nn.Module, device: str = "cpu") -> Reading:
    """A flow of the library, for `convert`; raises ConversionError. `device`: as in `read_parts`."""
    library.prepare(flow)
    base = library.base(flow)
    chains = [library.in_one_context(chain.parts) for chain in library.chains(flow)]
    parts = [part for chain in chains for part in chain]
    event_shape = parts[0].shape if parts else base.shape
    check_shape("the flow", event_shape)
    inside = {part.module for part in parts}
    others = [child for child in flow.children() if not inside & set(child.modules())]
    found = iter(read_parts(library, parts, device, others))
    layers: list[Layer] = []
    for chain, after in zip(chains, [*base.between, base.layers], strict=True):
        layers += [layer for _ in chain for layer in next(found)] + after
    squeezed = any(isinstance(layer, Kept) and isinstance(layer.module, Squeeze) for layer in layers)
    if event_shape != base.shape and not squeezed:
        layers.append(Kept(Reshaped(base.shape, event_shape), "noise has the data's shape"))
    columns, embedding = fused_context(layers), library.embedding(flow)
    context_shape: Shape | None = (columns,) if columns else library.context_shape(parts)
    if embedding is not None:
        context_shape = _embedded_shape(embedding, context_shape) if len(event_shape) == 1 else None

    def invert(z: Tensor, context: Tensor | None) -> Tensor:
        return library.generate(flow, base.noise(z.reshape(-1, *base.shape)), context)

    return Reading(
        layers=layers,
        event_shape=event_shape,
        log_prob=partial(library.log_prob, flow),
        inverse=invert if library.invertible(parts, layers) else None,
        embedding=embedding,
        context_shape=context_shape,
    )


def _embedded_shape(embedding: nn.Module, embedded: Shape | None) -> Shape | None:
    """The shape of a context before the embedding, from its first layer with parameters; without one, as behind it."""
    first = next((m for m in embedding.modules() if next(m.parameters(recurse=False), None) is not None), None)
    if first is None:
        return embedded or None
    return (first.in_features,) if isinstance(first, nn.Linear) else None


def fused_context(layers: Iterable[Layer]) -> int:
    """Columns of the context that the networks of fused transforms take; 0 without."""
    return max((layer.context_dim() for layer in layers if isinstance(layer, Transform) and layer.is_mlp), default=0)


def read_parts(
    library: Library,
    parts: Sequence[Part],
    device: str,
    others: Iterable[nn.Module] = (),
    read: Callable[[Part], list[Layer]] | None = None,
) -> list[list[Layer]]:
    """The layers of each part, in the order given (data → noise): `Kept` where it cannot be fused.

    A module that shares trained parameters with another one is kept: stacking copies, and copies would not stay equal.

    Args:
        device: the type of device on which the flow will run: padding is not worth its time on a "cpu" alone.
        others: the flow's other modules: its base, its embedding net.
        read: replaces `library.read`; a module that is kept then stays itself, without an adapter.
    """
    modules = [*(part.module for part in parts), *others]
    owners = Counter(p for module in modules for p in {id(p) for p in module.parameters() if p.requires_grad})

    def or_kept(part: Part, layers_of: Callable[[], list[Layer]]) -> list[Layer]:
        try:
            return layers_of()
        except ConversionError:
            raise
        except Exception as error:  # attributes of another release or class than is known raise whatever they like
            module = part.module if read else library.keep(part)
            return [Kept(module, f"{part.name} ({type(part.module).__name__}): {reason_of(error)}")]

    def own(part: Part) -> list[Layer]:
        if any(owners[id(p)] > 1 for p in part.module.parameters()):
            raise Unfusable(
                "shares parameters with another layer, the base or the embedding net; stacking would untie them"
            )
        return (read or library.read)(part)

    def fused(layers: list[Layer], permuted: bool) -> list[Layer]:
        layers = for_device(layers, device, permuted)
        uses = Counter(p for layer in layers for p in parameters_of(*_tensors(layer)))
        if uses and max(uses.values()) > 1:
            raise Unfusable("uses a network more than once; stacking would untie the uses")
        return layers

    found = [or_kept(part, partial(own, part)) for part in parts]
    permuted = only_permutes(layer for layers in found for layer in layers)
    return [or_kept(part, partial(fused, layers, permuted)) for part, layers in zip(parts, found, strict=True)]


def for_device(layers: Iterable[Layer], device: str, permuted: bool) -> list[Layer]:
    """The layers as they run on that type of device; raises Unfusable for one that is slower there than the library's.

    `permuted`: as in `fastest`.
    """
    return [
        fastest(layer, permuted) if isinstance(layer, Coupling) and layer.is_mlp and device == "cpu" else layer
        for layer in layers
    ]


def reason_of(error: Exception) -> str:
    """Why something stays as it is, in one line."""
    if isinstance(error, Unfusable | ConversionError):
        return str(error)
    lines = str(error).splitlines() or [""]
    return f"cannot be read: {type(error).__name__} {lines[0]}".strip()


def copied(module: nn.Module) -> nn.Module:
    """A deep copy. Tensors with a graph behind them, which caches and weight norm keep in modules, are copied without it.

    Raises ConversionError for one that cannot be copied all the same.
    """
    memo: dict[int, Tensor] = {}
    for part in module.modules():
        for value in vars(part).values():
            held = vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, nn.Module) else ()
            held = value if isinstance(value, tuple) else held
            for tensor in (value, *held):
                if isinstance(tensor, Tensor) and not tensor.is_leaf:
                    memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(module, memo)
    except RuntimeError as error:
        raise ConversionError(f"cannot be copied to compare with ({error})") from error


@contextmanager
def on_processor() -> Iterator[None]:
    """Inside the block, gradients are recorded and new tensors are on the processor, wherever it is entered."""
    # A device's context costs every call of torch, a third of all time, and is seldom needed.
    elsewhere = torch.get_default_device().type != "cpu"
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu") if elsewhere else nullcontext():
        yield


def check_precision(dtype: torch.dtype) -> None:
    """Raise ConversionError unless a flow may have that dtype."""
    if dtype not in (torch.float32, torch.float64):
        raise ConversionError(
            f"its parameters are {dtype}: keep the flow in float32 and run it under torch.autocast, which uses low precision "
            "where it is safe"
        )


def networks(layers: Iterable[Layer], *, kept: bool = True) -> Iterable[nn.Module]:
    """The networks of the library that stay in a flow of these layers: of couplings and, with `kept`, whole layers."""
    for layer in layers:
        if isinstance(layer, Coupling) and not layer.is_mlp:
            yield layer.conditioner
        elif kept and isinstance(layer, Kept):
            yield layer.module


def check_modes(layers: Iterable[Layer], training: bool) -> None:
    """Raise ConversionError where a network's dropout is in another mode than its flow's, which the fused one will follow."""
    for layer in layers:
        network = layer.conditioner if isinstance(layer, Coupling) and layer.is_mlp else None
        if network is not None and network.dropout and network.active != training:
            raise ConversionError("a network with dropout is in another mode than its flow: give both one mode")


def lost_in_training(layers: Iterable[Layer]) -> str:
    """Operations that the library's layers apply in training mode alone, and fused ones do not: "" if none."""
    names = set()
    for layer in layers:
        if isinstance(layer, Transform) and layer.is_mlp and layer.conditioner.lost:
            names.add(f"Dropout (p = {layer.conditioner.lost:g})")
        of_network = isinstance(layer, Transform) and layer.is_mlp and layer.conditioner.normalised
        if of_network or (isinstance(layer, Diagonal) and layer.statistics):
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
