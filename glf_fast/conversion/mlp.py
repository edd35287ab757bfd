"""Networks of other libraries as the weights and biases of one MLP.

Nothing is detached: a weight of the result is a function of the library's parameters (a transpose, a choice of
columns, two blocks side by side), which autograd can take back.
"""

from __future__ import annotations

import inspect
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from glf_fast.conversion.activations import activation_of_call, activation_of_module, one_activation
from glf_fast.conversion.batch_norm import Norm, batch_norm_step, check_once, without_norms
from glf_fast.conversion.dropout import Dropped, behind_activation, dropouts_of, functional_dropout, lost
from glf_fast.conversion.layers import FIXED, FROZEN, TRAINED, Conditioner, NamedActivation, Unfusable
from glf_fast.conversion.library import overridden
from glf_fast.conversion.reading import parameters_of

__all__ = [
    "KNOWN",
    "Step",
    "Times",
    "assemble",
    "check_class",
    "check_hooks",
    "is_class",
    "linear_step",
    "network_steps",
    "read_bounded_mlp",
    "read_mlp",
    "role_of",
    "scale_outputs",
    "select_inputs",
    "select_outputs",
    "separate",
    "widen_inputs",
    "without_shift",
]


@dataclass(frozen=True)
class Times:
    """A step of a network that multiplies by a fixed number."""

    factor: float


# A step of a network: a linear layer (weight (out, in), bias or None), an activation, `Dropped`, `Times` or `Norm`.
Linear = tuple[Tensor, Tensor | None]
Step = Linear | NamedActivation | Dropped | Times | Norm

TANH = NamedActivation("tanh")
# Networks of libraries that torch.fx cannot follow: full name of the class → its steps. The libraries' files add to it.
KNOWN: dict[str, Callable[[Any], Iterator[Step]]] = {}
_METHODS = ("relu", "tanh")


def read_mlp(network: nn.Module) -> Conditioner:
    """The MLP that `network` is, on rows [passive columns, context], with its outputs in the network's own order.

    Reads Sequentials of linear layers and activations, nested or not, what is in `KNOWN`, and by torch.fx
    any module whose forward is such a chain, on one input or on the concatenation of several.

    Raises Unfusable, with the reason, for anything else.
    """
    mlp, bound = read_bounded_mlp(network)
    if bound is not None:
        raise Unfusable(f"{type(network).__name__} ends with tanh, which is covered in a network of log-scales alone")
    return mlp


def read_bounded_mlp(network: nn.Module) -> tuple[Conditioner, float | None]:
    """The MLP that `network` is, without a tanh behind it, and b where that makes b·tanh(y / b) of its outputs y.

    The factors that the network has behind its last layer are the conditioner's.

    Raises Unfusable, with the reason, as `read_mlp`.
    """
    read = list(network_steps(network))
    steps = without_norms(type(network).__name__, read)
    last = max((i for i, step in enumerate(steps) if isinstance(step, tuple)), default=len(steps) - 1)
    tail = [step for step in steps[last + 1 :] if not isinstance(step, Dropped)]
    steps = [step for i, step in enumerate(steps) if i <= last or isinstance(step, Dropped)]
    factor, bound = 1.0, None
    for step in tail:
        if isinstance(step, Times) and bound is None:
            factor *= step.factor
        elif isinstance(step, Times) and bound is not None:
            bound *= step.factor
        elif step == TANH and bound is None:
            bound = 1.0
        else:
            raise Unfusable(f"{type(network).__name__} is not linear → activation → … → linear")
    mlp = replace(
        _mlp(type(network).__name__, steps, network.training), normalised=any(isinstance(step, Norm) for step in read)
    )
    if bound is not None:
        factor *= bound
    if not (math.isfinite(factor) and factor) or (bound is not None and bound <= 0):
        raise Unfusable(f"{type(network).__name__} multiplies its outputs by {factor:g}")
    return (mlp if factor == 1 else scale_outputs(mlp, factor)), bound


def _mlp(name: str, steps: Sequence[Step], training: bool) -> Conditioner:
    """The MLP of these steps, of a network in that mode; raises Unfusable."""
    linears = [step for step in steps if isinstance(step, tuple)]
    activations = [step for step in steps if isinstance(step, NamedActivation)]
    kinds = [type(step) for step in steps if not isinstance(step, Dropped)]
    if kinds != [tuple, *[NamedActivation, tuple] * (len(linears) - 1)]:
        raise Unfusable(f"{name} is not linear → activation → … → linear")
    if len(linears) > 9:
        raise Unfusable(f"{name} has {len(linears) - 1} hidden layers; zero to eight are covered")
    activation = one_activation(name, activations)
    if any(len(a) != b.shape[1] for (a, _), (b, _) in itertools.pairwise(linears)):
        raise Unfusable(f"{name} has linear layers that do not follow each other")
    between: list[list[Step]] = [[]]  # steps before the first linear layer, and behind each of them
    for step in steps:
        if isinstance(step, tuple):
            between.append([])
        else:
            between[-1].append(step)
    hidden = [behind_activation(group) for group in between[1:-1]]
    return assemble(name, linears, activation, dropouts_of(hidden, steps, training))


def assemble(
    name: str, linears: Sequence[Linear], activation: NamedActivation, dropouts: Mapping[str, Any], blocks: int = 0
) -> Conditioner:
    """The conditioner of these linear layers; raises Unfusable where the network, of that name, uses one twice.

    Args:
        dropouts: as `dropouts_of` gives them.
    """
    check_once(name, linears)
    biases = [W.new_zeros(len(W)) if b is None else b for W, b in linears]
    return Conditioner(
        weights=[W.T for W, _ in linears],
        biases=biases,
        roles=[role_of(W, W.T) for W, _ in linears],
        bias_roles=[role_of(b, W.new_zeros(len(W))) for W, b in linears],
        factors=torch.ones_like(biases[-1], requires_grad=False),
        activation=activation,
        blocks=blocks,
        **dropouts,
    )


def role_of(parameter: Tensor | None, shape: Tensor) -> Tensor:
    """The role of a parameter's entries, as a tensor of `shape`'s shape."""
    role = FIXED if parameter is None else TRAINED if parameter.requires_grad else FROZEN
    return torch.full_like(shape, role, dtype=torch.uint8)


def select_inputs(mlp: Conditioner, columns: Tensor) -> Conditioner:
    """The MLP on x[:, columns] only; the other columns are taken to be zero."""
    return _with_first(mlp, lambda first: first[columns])


def widen_inputs(mlp: Conditioner, passive: int, columns: Sequence[int], width: int) -> Conditioner:
    """The MLP on [passive columns, context of that width] of one on [passive, context[:, columns]].

    What it was not given has zero weights that are never trained.
    """
    if tuple(columns) == tuple(range(width)):
        return mlp
    first = mlp.weights[0]
    rows = torch.tensor([*range(passive), *(passive + c for c in columns)], device=first.device)
    shape = (*first.shape[:-2], passive + width, first.shape[-1])
    return _with_first(mlp, lambda first: first.new_zeros(shape).index_copy(-2, rows, first))


def _with_first(mlp: Conditioner, change: Callable[[Tensor], Tensor]) -> Conditioner:
    """The MLP with `change` of its first layer's weights and their roles."""
    weights, roles = ([change(tensors[0]), *tensors[1:]] for tensors in (mlp.weights, mlp.roles))
    return replace(mlp, weights=weights, roles=roles)


def select_outputs(mlp: Conditioner, columns: Tensor) -> Conditioner:
    """The MLP with outputs out[:, columns]; of each, if they are two."""
    return _with_last(mlp, lambda last: last[..., columns])


def scale_outputs(mlp: Conditioner, *factors: float) -> Conditioner:
    """The MLP with its outputs, in as many equal parts as there are factors ([u | t] or t), times these."""
    scales = torch.ones_like(mlp.factors)  # (2T), (T) or (2, T)
    for part, factor in zip(scales.view(len(factors), -1), factors, strict=True):
        part.fill_(factor)
    signs = scales.sign()
    weights, biases = (
        [*tensors[:-1], tensors[-1] * sign]
        for tensors, sign in ((mlp.weights, signs.unsqueeze(-2)), (mlp.biases, signs))
    )
    return replace(mlp, weights=weights, biases=biases, factors=mlp.factors * scales.abs())


def separate(net_u: Conditioner, net_t: Conditioner) -> Conditioner:
    """The networks of u and of t as one conditioner; hidden layers are filled up to equal widths with zeros that are
    never trained.

    Raises Unfusable if depth, activation or numbers of columns differ, or if they share parameters.
    """
    if net_u.blocks or net_t.blocks:
        raise Unfusable("it has two networks, for scale and shift, of which one is residual")
    if len(net_u.weights) != len(net_t.weights) or net_u.activation != net_t.activation:
        raise Unfusable("its networks for scale and shift differ in depth or activation")
    if (net_u.n_in, net_u.n_out) != (net_t.n_in, net_t.n_out):
        raise Unfusable("its networks for scale and shift differ in their numbers of columns")
    if parameters_of(*net_u.weights, *net_u.biases) & parameters_of(*net_t.weights, *net_t.biases):
        raise Unfusable("its networks for scale and shift share parameters")
    names = ("weights", "biases", "roles", "bias_roles")
    pairs: dict[str, Any] = {name: list(map(_pair, getattr(net_u, name), getattr(net_t, name))) for name in names}
    factors = torch.stack([net_u.factors, net_t.factors])
    normalised = net_u.normalised or net_t.normalised
    dropouts = [Dropped(net.dropout, net.active) for net in (net_u, net_t) if net.dropout]
    losses = [net_u.lost, net_t.lost]
    if net_u.dropout != net_t.dropout or net_u.active != net_t.active:
        pairs |= {"dropout": 0.0, "active": False}
        losses.append(lost(dropouts))
    return replace(net_u, lost=max(losses), factors=factors, normalised=normalised, **pairs)


def without_shift(net_u: Conditioner) -> Conditioner:
    """A network that makes u alone, with t = 0 after it that is never trained."""
    return _with_last(net_u, lambda last: torch.cat([last, torch.zeros_like(last)], -1))


def _with_last(mlp: Conditioner, change: Callable[[Tensor], Tensor]) -> Conditioner:
    """The MLP with `change` of the tensors of its last layer: weights, biases, their roles, and factors."""
    weights, biases, roles, bias_roles = (
        [*tensors[:-1], change(tensors[-1])] for tensors in (mlp.weights, mlp.biases, mlp.roles, mlp.bias_roles)
    )
    factors = change(mlp.factors)
    return replace(mlp, weights=weights, biases=biases, roles=roles, bias_roles=bias_roles, factors=factors)


def _pair(a: Tensor, b: Tensor) -> Tensor:
    """Both in one tensor, each filled up with zeros (FIXED) to the larger of their sizes."""
    sizes = [max(sizes) for sizes in zip(a.shape, b.shape, strict=True)]
    filled = []
    for tensor in (a, b):
        missing = [size - n for size, n in zip(sizes, tensor.shape, strict=True)]
        filled.append(F.pad(tensor, [n for count in reversed(missing) for n in (0, count)]))
    return torch.stack(filled)


def _known(module: nn.Module) -> Callable[[Any], Iterator[Step]] | None:
    """The entry of KNOWN for its class, or for one of that full name in a copy of the library inside of another package."""
    return next((steps for name, steps in KNOWN.items() if is_class(module, name)), None)


def is_class(module: nn.Module, name: str) -> bool:
    """Whether its class has that full name, or is one of that name in a copy of the library inside of another package."""
    return f".{type(module).__module__}.{type(module).__name__}".endswith(f".{name}")


def check_class(module: nn.Module, name: str) -> None:
    """Raise Unfusable unless the module computes what the library's class of that name does.

    A subclass with methods of its own may do something else in training mode alone, which no comparison in eval mode shows.
    """
    check_hooks(module)
    kind = type(module)
    base = next((base for base in reversed(kind.__mro__) if base.__name__ == name), None)
    if base is None:
        raise Unfusable(f"{kind.__name__} is no {name}")
    if changed := overridden(kind, base):
        raise Unfusable(f"{kind.__name__} has its own {', '.join(changed)}, where {name} is covered")


def check_hooks(module: nn.Module) -> None:
    """Raise Unfusable for a module that may compute something else than its class does."""
    if "forward" in vars(module) and type(module).__name__ != "OptimizedModule":  # torch.compile sets one
        raise Unfusable(f"{type(module).__name__} has a forward that is not its class's")
    if hooks := [h for h in ("_forward_hooks", "_forward_pre_hooks", "parametrizations") if getattr(module, h, None)]:
        raise Unfusable(
            f"{type(module).__name__} has {hooks[0].strip('_').replace('_', ' ')}, which may change what it computes"
        )


def linear_step(module: Any) -> Iterator[Step]:
    """The step of a linear layer with `weight` and `bias`; raises Unfusable for a stack of them."""
    if module.weight.ndim != 2:
        raise Unfusable(f"{type(module).__name__} is a stack of linear layers")
    yield module.weight, module.bias


def network_steps(module: nn.Module) -> Iterator[Step]:
    """The steps that `module` applies to its input, in order."""
    name = type(module).__name__
    check_hooks(module)
    if type(module) is nn.Identity:
        return
    activation = activation_of_module(module)
    if isinstance(module, nn.Dropout) and type(module).forward is nn.Dropout.forward:
        if module.p:
            yield Dropped(float(module.p), module.training)
    elif activation is not None:
        yield activation
    elif name == "OptimizedModule":  # torch.compile's; its module takes seconds to import
        yield from network_steps(module._orig_mod)  # type: ignore[arg-type]
    elif type(module) is nn.Linear:
        yield from linear_step(module)
    elif type(module) is nn.BatchNorm1d:
        yield batch_norm_step(module)
    elif (steps := _known(module)) is not None:
        yield from steps(module)
    elif type(module).forward is nn.Sequential.forward:
        for child in module._modules.values():  # children() leaves out a module that comes again, as activations do
            assert child is not None
            yield from network_steps(child)
    elif next(module.children(), None) is None:
        raise Unfusable(f"{module} is neither a linear layer nor one of the activations that are covered")
    else:
        yield from _traced_steps(module)


def _traced_steps(module: nn.Module) -> Iterator[Step]:
    """The chain of layers between the inputs, one or concatenated, and the output, found by torch.fx."""
    name = type(module).__name__
    if "Residual" in name or "ResNet" in name:  # likely, and worth a reason of its own
        raise Unfusable(f"{name} is residual; MLPs and the ResidualNet of nflows are fused")
    graph = _traced(module)
    other = _in_other_mode(module)
    if _operations(graph) != _operations(other):
        raise Unfusable(f"{name} does something else in {'eval' if module.training else 'training'} mode")
    modules = dict(module.named_modules())
    inputs = [node for node in graph.nodes if node.op == "placeholder" and not _is_absent(node)]
    node = _concatenated(inputs)
    while True:
        users = [] if node is None else list(node.users)
        if node is None or len(users) != 1:
            raise Unfusable(f"{name} is not a chain of layers")
        last, node = node, users[0]
        if node.op == "output":
            if node.args != (last,):
                raise Unfusable(f"{name} has more than one output")
            return
        if node.op == "call_function" and node.target is F.dropout:
            yield from functional_dropout(node, other)
            continue
        if _keeps_rows(node, last):
            continue
        if (factor := _factor(node, last)) is not None:
            yield Times(factor)
            continue
        if node.op == "call_function" and node.args[:1] == (last,):
            yield activation_of_call(node.target, node.args[1:], node.kwargs)
            continue
        covered = node.op == "call_module" or (node.op == "call_method" and node.target in _METHODS)
        if node.args != (last,) or node.kwargs or not covered:
            raise Unfusable(f"{name} is not a chain of linear layers and activations (at {node.name!r})")
        if node.op == "call_module":
            yield from network_steps(modules[str(node.target)])
        else:
            yield NamedActivation(str(node.target))


class _Tracer(fx.Tracer):
    """Follows a forward that compares the shape of its input with what it was made for, as if they were equal.

    The fused layer is compared with the original afterwards, on inputs of that shape.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Layers that are known are not traced into."""
        return m.__module__.startswith("torch.nn") or _known(m) is not None

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The answer of shapes that fit."""
        if obj.node.target in (operator.ne, operator.eq):
            return obj.node.target is operator.eq
        return super().to_bool(obj)

    def create_arg(self, a: Any) -> Any:
        """Sizes that were computed by NumPy are numbers, too."""
        return super().create_arg(a.item() if type(a).__module__ == "numpy" and hasattr(a, "item") else a)


def _traced(module: nn.Module) -> fx.Graph:
    """The graph of a module; if that cannot be had, of calls without its optional inputs, such as a context."""
    try:
        return _pruned(_Tracer().trace(module))
    except Exception as error:  # whatever a user's forward does with a proxy
        optional = {key: None for key, p in inspect.signature(module.forward).parameters.items() if p.default is None}
        with suppress(Exception):
            if optional:
                return _pruned(_Tracer().trace(module, optional))
        raise Unfusable(f"{type(module).__name__}'s forward cannot be followed ({type(error).__name__})") from error


def _pruned(graph: fx.Graph) -> fx.Graph:
    """The graph without comparisons of shapes, whose results nothing uses."""
    for node in reversed(graph.nodes):
        read = node.target in (getattr, operator.getitem, operator.eq, operator.ne)
        if node.op == "call_function" and read and not node.users:
            graph.erase_node(node)
    return graph


def _is_absent(node: fx.Node) -> bool:
    """Whether an input is not used, or was taken to be None."""
    return all(getattr(user.target, "__name__", "") == "_assert_is_none" for user in node.users)


def _keeps_rows(node: fx.Node, last: fx.Node) -> bool:
    """Whether a node gives rows the shape (B, n), which they have."""
    if node.op != "call_method" or node.target not in ("reshape", "view") or node.kwargs:
        return False
    first, *sizes = node.args
    sizes = list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
    return first is last and len(sizes) == 2 and bool(sizes[0] == -1) and type(sizes[1]) is int


def _factor(node: fx.Node, last: fx.Node) -> float | None:
    """The number that a node multiplies its input by; None for other nodes."""
    times, by = (operator.mul, torch.mul, "mul"), (operator.truediv, torch.div, torch.true_divide, "div")
    if node.target not in (*times, *by) or node.kwargs or len(node.args) != 2:
        return None
    a, b = node.args
    if b is last and node.target in times:
        a, b = b, a
    if a is not last or isinstance(b, bool) or not isinstance(b, int | float) or not b:
        return None
    return float(b) if node.target in times else 1.0 / b


def _in_other_mode(module: nn.Module) -> fx.Graph | None:
    """The graph in the mode that `module` is not in, training or eval; None where that cannot be followed."""
    modes = {part: part.training for part in module.modules()}
    try:
        return _traced(module.train(not module.training))
    except Exception:
        return None
    finally:
        for part, training in modes.items():
            part.training = training


def _operations(graph: fx.Graph | None) -> list[str] | None:
    if graph is None:
        return None
    given = (
        {k: v for k, v in node.kwargs.items() if (node.target, k) != (F.dropout, "training")} for node in graph.nodes
    )
    return [
        f"{node.op} {node.target} {node.args[1:]} {kwargs}" for node, kwargs in zip(graph.nodes, given, strict=True)
    ]


def _concatenated(inputs: list[fx.Node]) -> fx.Node | None:
    """The node that holds the whole input: the only input, or the inputs concatenated in their order."""
    if len(inputs) == 1:
        return inputs[0]
    if not inputs or any(len(node.users) != 1 for node in inputs):
        return None
    node = next(iter(inputs[0].users))
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    joined = node.op == "call_function" and node.target in (torch.cat, torch.concat) and dim in (1, -1)
    return node if joined and list(node.args[0]) == inputs else None  # type: ignore
