"""pyro. Transforms are noise → data, and a flow is a ComposeTransformModule of them; its base is taken to be N(0, I)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Independent, Normal, Transform, TransformedDistribution, constraints

from glf_fast.conversion.activations import named_activation
from glf_fast.conversion.autoregressive import DeclaredAutoregressive, masked_linear
from glf_fast.conversion.chains import Chain, Part, Replacement, replaced
from glf_fast.conversion.layers import Bijection, ConversionError, Layer, Permutation, Unfusable
from glf_fast.conversion.library import Base, FusedLayer, Library, run_on_rows
from glf_fast.conversion.mlp import check_class

__all__ = ["LIBRARY"]


class Plain(nn.Module):
    """A transform that is no module, in a place for modules. Its tensors take part in `to`, as buffers do."""

    def __init__(self, transform: Any) -> None:
        super().__init__()
        self.transform = transform

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Plain:
        super()._apply(fn, recurse)
        _apply_to_tensors(self.transform, fn, set())
        return self


def _apply_to_tensors(held: Any, fn: Callable[[Tensor], Tensor], seen: set[int]) -> None:
    """Replace the tensors of a transform that is no module, and of those inside of it, by fn of them."""
    if id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, nn.Module):
        held._apply(fn)
    elif isinstance(held, list | tuple):
        for item in held:
            _apply_to_tensors(item, fn, seen)
    elif isinstance(held, Transform):
        for name, value in vars(held).items():
            if isinstance(value, Tensor):
                new = fn(value.detach())
                setattr(held, name, nn.Parameter(new, value.requires_grad) if isinstance(value, nn.Parameter) else new)
            else:
                _apply_to_tensors(value, fn, seen)


class KeptTransform(Bijection):
    """A transform of pyro with its directions exchanged: forward is data → noise."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.layer = part.module

    def _run(self, x: Tensor, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
        transform = _transform(self.layer)
        noise, data = (x, transform(x)) if inverse else (transform.inv(x), x)
        logdet = transform.log_abs_det_jacobian(noise, data)
        if transform.domain.event_dim == 0:  # of each number, or one for a column in all rows
            logdet = logdet.expand(data.shape).sum(-1)
        logdet = logdet.expand(len(x))
        _forget(transform)
        return (data, logdet) if inverse else (noise, -logdet)


class PyroLayer(Transform, FusedLayer):
    """A flow as a transform, noise → data, that is a module, too; it remembers its last pair, as pyro's own do."""

    domain = codomain = constraints.real_vector
    bijective = True
    sign = +1

    def __init__(self, flow: Any) -> None:
        FusedLayer.__init__(self, flow)
        self._cache_size, self._inv = 1, None
        self._cached_x_y: tuple[Any, Any] = (None, None)
        self._logdet: Tensor | None = None

    def __hash__(self) -> int:
        return id(self)

    def _call(self, x: Tensor) -> Tensor:
        y, self._logdet = run_on_rows(self.flow.inverse, x)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, logdet = run_on_rows(self.flow, y)
        self._logdet = -logdet
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det ∂y/∂x|, in the shape of the batch."""
        known_x, known_y = self._cached_x_y
        if self._logdet is None or x is not known_x or y is not known_y:
            return run_on_rows(self.flow.inverse, x)[1]
        return self._logdet

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cached_x_y": (None, None), "_logdet": None}


def _transform(module: Any) -> Any:
    return module.transform if isinstance(module, Plain) else module


def _forget(transform: Any) -> None:
    """Drop what the transform remembers of its last call: with their graphs such tensors could not be copied."""
    for name, value in vars(transform).items():
        if name.startswith("_cache") and isinstance(value, Tensor):
            setattr(transform, name, None)
    transform._cached_x_y = None, None


def _undone(transform: Any, data: Tensor) -> Tensor:
    """Data → noise of an AffineAutoregressive. pyro's own loop over the features begins with zeros in float32."""
    low, high, noise = transform.log_scale_min_clip, transform.log_scale_max_clip, torch.zeros_like(data)
    for _ in range(data.shape[-1]):
        mean, log_scale = transform.arn(noise)
        if transform.stable:
            log_scale = F.logsigmoid(log_scale + transform.sigmoid_bias)
            noise = (data - (1 - log_scale.exp()) * mean) * torch.exp(-log_scale)
        else:
            log_scale = log_scale + (log_scale.clamp(low, high) - log_scale).detach()
            noise = (data - mean) * torch.exp(-log_scale)
    transform._cached_log_scale = log_scale
    return noise


def _prepare(copied: nn.Module) -> None:
    """Inverses in float64, and the tensors of transforms that are no modules, which no module converts."""
    for part in getattr(copied, "parts", ()):
        if not isinstance(part, nn.Module):
            Plain(part).double()
    for module in copied.modules():
        if type(module).__name__ == "AffineAutoregressive":
            module._inverse = partial(_undone, module)  # type: ignore[assignment]


def _affine_autoregressive(part: Part) -> list[Layer]:
    transform: Any = part.module
    network: Any = transform.arn
    if transform.stable:
        raise Unfusable("stable=True shifts by (1 − σ)·μ")
    limits = transform.log_scale_min_clip, transform.log_scale_max_clip
    if limits != (-5, 3):
        raise Unfusable(f"its log-scale is clipped to {limits}; (-5, 3) is covered")
    if not hasattr(network, "skip_layer"):
        raise Unfusable("its network is given a context")
    check_class(network, "AutoRegressiveNN")
    if network.skip_layer is not None:
        raise Unfusable("its network has skip connections")
    outputs = torch.arange(2 * network.input_dim).view(2, -1).T.flip(1)  # all means come first, then all log-scales
    linears = [masked_linear(layer) for layer in network.layers]
    return [DeclaredAutoregressive(linears, outputs, named_activation(network.f), log_scale="clamp", undo=True).read()]


def _plain(part: Part) -> list[Layer]:
    transform = part.module.transform
    if type(transform).__name__ != "Permute" or transform.event_dim != 1:
        raise Unfusable("no kernel covers this kind of transform")
    return [Permutation(transform.permutation.argsort())]


def _chains(flow: Any) -> list[Chain]:
    """`flow.parts`, from the last one on."""
    dims = [part.arn.input_dim for part in flow.parts if hasattr(part, "arn") and hasattr(part.arn, "input_dim")]
    if not dims:
        raise ConversionError("it has no AffineAutoregressive, the only transform that is fused")
    parts = [
        Part(str(i), part if isinstance(part, nn.Module) else Plain(part), (dims[0],))
        for i, part in reversed(list(enumerate(flow.parts)))
    ]
    return [Chain(parts, partial(_put, flow, parts))]


def _put(flow: Any, parts: Sequence[Part], replacements: Sequence[Replacement]) -> None:
    modules = replaced([part.module for part in parts], replacements)[::-1]
    flow.parts = [_transform(module) for module in modules]
    flow._inv = None  # its inverse, which has the old parts
    flow._modules.clear()
    for i, module in enumerate(module for module in flow.parts if isinstance(module, nn.Module)):
        flow._modules[str(i)] = module


def _log_prob(flow: Any, x: Tensor, context: Tensor | None) -> Tensor:
    """As torch's own distribution adds it up: what is compared with must share nothing with KeptTransform."""
    base = Independent(Normal(x.new_zeros(x.shape[1]), 1.0, validate_args=False), 1)
    log_prob = TransformedDistribution(base, [flow], validate_args=False).log_prob(x)
    for part in flow.parts:
        _forget(part)
    return log_prob


LIBRARY: Library = Library(
    package="pyro",
    flows=("ComposeTransformModule",),
    packages=("pyro.distributions.transforms", "pyro.distributions.torch_transform"),
    marks=("parts", "domain"),
    chains=_chains,
    base=lambda flow: Base(_chains(flow)[0].parts[0].shape),
    log_prob=_log_prob,
    generate=lambda flow, noise, context: flow(noise),
    kept=KeptTransform,
    fused=lambda fused, parts: PyroLayer(fused),
    prepare=_prepare,
    on_vectors={"AffineAutoregressive": _affine_autoregressive, "Plain": _plain},
)
