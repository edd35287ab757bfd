"""anomalib's CFLOW, FastFlow and U-Flow, accelerated: the same anomaly maps, likelihoods and training."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import detector_models
from glf_fast import accelerate

pytestmark = [
    pytest.mark.skipif(bool(detector_models.MISSING), reason=detector_models.MISSING),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

SIZE = 64
MODELS: dict[str, Callable[[], Any]] = {
    "CFLOW": lambda: detector_models.cflow(coupling_blocks=2, condition_vector=8, fiber_batch_size=50),
    "CFLOW, wide": lambda: detector_models.cflow(layers=("layer4",), coupling_blocks=2, condition_vector=8),
    "FastFlow": lambda: detector_models.fastflow(SIZE, flow_steps=2),
    "U-Flow": lambda: detector_models.uflow(SIZE, flow_steps=2),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Any]:
    """A model, the same one accelerated, and the report."""
    torch.manual_seed(0)
    model = MODELS[request.param]()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and ("global" in name or "subnet" in name):
                p.add_(0.02 * torch.randn_like(p))
    fast = copy.deepcopy(model)
    return model, fast, accelerate(fast)


def couplings(model: nn.Module) -> int:
    return sum(type(module).__name__ == "AllInOneBlock" for module in model.modules())


def flows(model: Any) -> nn.Module:
    return next(getattr(model, n) for n in ("decoders", "fast_flow_blocks", "flow") if hasattr(model, n))


def loss(model: Any, images: Tensor, features: list[Tensor] | None = None) -> Tensor:
    """The models' own losses, without their reductions; the rows that CFLOW's decoders are given are added to `features`."""
    features = [] if features is None else features
    if hasattr(model, "decoders"):
        from anomalib.models.image.cflow.utils import get_logp, positional_encoding_2d

        total = images.new_zeros(())
        for name, decoder in zip(model.pool_layers, model.decoders, strict=True):
            maps = model.encoder(images)[name]
            places = positional_encoding_2d(model.condition_vector, *maps.shape[2:]).expand(len(maps), -1, -1, -1)
            rows, places = (t.movedim(1, -1).flatten(0, 2) for t in (maps, places))
            features.append(rows.requires_grad_())
            z, logdet = decoder(rows, [places])
            width = rows.shape[1]
            total = total - nn.functional.logsigmoid(get_logp(width, z, logdet) / width).mean()
        return total
    z, logdets = model(images)
    logdets = torch.stack(list(logdets)) if isinstance(logdets, list) else logdets
    return sum(0.5 * part.square().sum() for part in z) / len(images) - logdets.sum() / len(images)


def test_every_coupling_is_replaced(pair: tuple[nn.Module, nn.Module, Any]) -> None:
    model, fast, report = pair
    assert sum(r.couplings for r in report.replaced) == couplings(model) > 0
    assert couplings(fast) == 0
    # No permutation is a product of matrices.
    linear = {
        module.linear for module in fast.modules() if type(module).__name__ in ("InvertibleLinear", "FixedLinear")
    }
    assert linear == {"permutation"}


def test_same_anomaly_maps(pair: tuple[nn.Module, nn.Module, Any]) -> None:
    images = torch.randn(2, 3, SIZE, SIZE)
    model, fast, _ = pair
    with torch.no_grad():
        wanted, got = (m.eval()(images) for m in (model, fast))
    torch.testing.assert_close(got.anomaly_map, wanted.anomaly_map, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.pred_score, wanted.pred_score, rtol=1e-4, atol=1e-5)


def test_same_losses_and_their_gradients(pair: tuple[nn.Module, nn.Module, Any]) -> None:
    """Gradients of the images, or of the features, where the model computes these without gradients (CFLOW)."""
    images = torch.randn(2, 3, SIZE, SIZE)
    losses, gradients = [], []
    for m in pair[:2]:
        given, features = images.clone().requires_grad_(), []
        value = loss(m.train(), given, features)
        losses.append(value.detach())
        gradients.append(torch.autograd.grad(value, features or [given]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)
    for got, wanted in zip(gradients[1], gradients[0], strict=True):
        scale = wanted.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("frozen", [True, False], ids=["global affine layers frozen", "all trained"])
def test_same_training(pair: tuple[nn.Module, nn.Module, Any], frozen: bool) -> None:
    """The global scales are log-scales in the fused flow, whose steps are larger: the loss differs in the third digit."""
    model = copy.deepcopy(pair[0])
    for name, p in flows(model).named_parameters():
        p.requires_grad_(p.requires_grad and not (frozen and "global" in name))
    fast = copy.deepcopy(model)
    assert ("trains other parameters" in str(accelerate(fast))) != frozen
    curves = []
    for m in (model, fast):
        torch.manual_seed(1)
        m.train()
        optimizer = torch.optim.Adam([p for p in m.parameters() if p.requires_grad], 1e-3)
        curve = []
        for _ in range(5):
            optimizer.zero_grad()
            value = loss(m, torch.randn(2, 3, SIZE, SIZE))
            value.backward()
            optimizer.step()
            curve.append(value.detach())
        curves.append(torch.stack(curve))
    torch.testing.assert_close(curves[1], curves[0], rtol=2e-3 if frozen else 2e-2, atol=1e-3)


def test_weights_are_saved(pair: tuple[nn.Module, nn.Module, Any]) -> None:
    """Loading restores the maps of a model that was accelerated with other weights."""
    model, fast, _ = pair
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in flows(other).parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
    accelerate(other)
    images = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        wanted = fast.eval()(images).anomaly_map
        assert not torch.allclose(other.eval()(images).anomaly_map, wanted, rtol=1e-3)
        other.load_state_dict({name: t.clone() for name, t in fast.state_dict().items()})
        assert torch.equal(other.eval()(images).anomaly_map, wanted)


def test_one_call_per_feature_map() -> None:
    torch.manual_seed(0)
    model = MODELS["CFLOW"]()
    accelerate(model)
    images = torch.randn(1, 3, SIZE, SIZE)
    calls: list[int] = []
    model.decoders[0].register_forward_hook(lambda module, given, out: calls.append(len(given[0])))
    wanted = model(images).anomaly_map
    assert len(calls) == 6
    calls.clear()
    model.fiber_batch_size = 1 << 20
    torch.testing.assert_close(model(images).anomaly_map, wanted, rtol=1e-4, atol=1e-5)
    assert calls == [256]


def test_example_of_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "drop-in.md").read_text(encoding="utf-8")
    section = text.split("## anomalib")[1].split("\n## ")[0]
    (block,) = re.findall(r"```py\n(.*?)```", section, re.DOTALL)
    detector_models.cflow(layers=("layer1",), coupling_blocks=1)  # imports the packages
    exec(block, {"__name__": "documentation"})
