"""The two Glows that are copied most, written anew from their formulas with the names of their classes and attributes."""

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glf_fast import accelerate, convert
from glf_fast.conversion import ConversionError


def squeezed(x: Tensor) -> Tensor:
    return F.pixel_unshuffle(x, 2)


def unsqueezed(x: Tensor) -> Tensor:
    return F.pixel_shuffle(x, 2)


def pixels(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]


def network(given: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(given, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, outputs, 3, padding=1))


# -- one list of steps in each block ------------------------------------------------------------------------------------------


class ActNorm(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        self.loc, self.scale = nn.Parameter(torch.zeros(1, C, 1, 1)), nn.Parameter(torch.ones(1, C, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.initialized.item() == 0:
            with torch.no_grad():
                self.loc.copy_(-x.mean((0, 2, 3), keepdim=True))
                self.scale.copy_(1 / (x.std((0, 2, 3), keepdim=True) + 1e-6))
                self.initialized.fill_(1)
        return self.scale * (x + self.loc), pixels(x) * self.scale.abs().log().sum()

    def reverse(self, y: Tensor) -> Tensor:
        return y / self.scale - self.loc


class InvConv2d(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(C, C))[0][:, :, None, None].contiguous())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.conv2d(x, self.weight), pixels(x) * torch.linalg.slogdet(self.weight.flatten(1).double())[1].to(x)

    def reverse(self, y: Tensor) -> Tensor:
        return F.conv2d(y, self.weight.flatten(1).inverse()[:, :, None, None])


class InvConv2dLU(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        P, L, U = torch.linalg.lu(torch.linalg.qr(torch.randn(C, C))[0])
        self.register_buffer("w_p", P)
        self.register_buffer("s_sign", U.diagonal().sign())
        self.w_l, self.w_u = nn.Parameter(L.contiguous()), nn.Parameter(U.triu(1).contiguous())
        self.w_s = nn.Parameter(U.diagonal().abs().log())

    def calc_weight(self) -> Tensor:
        lower = self.w_l.tril(-1) + torch.eye(len(self.w_l), dtype=self.w_l.dtype)
        return (self.w_p @ lower @ (self.w_u.triu(1) + torch.diag(self.s_sign * self.w_s.exp())))[:, :, None, None]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.conv2d(x, self.calc_weight()), pixels(x) * self.w_s.sum()

    reverse = InvConv2d.reverse

    @property
    def weight(self) -> Tensor:
        return self.calc_weight()


class AffineCoupling(nn.Module):
    def __init__(self, C: int, affine: bool, shift: float = 2.0) -> None:
        super().__init__()
        self.affine, self.shift, self.net = affine, shift, network(C // 2, C if affine else C // 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        a, b = x.chunk(2, 1)
        if not self.affine:
            return torch.cat([a, b + self.net(a)], 1), None
        u, t = self.net(a).chunk(2, 1)
        s = torch.sigmoid(u + self.shift)
        return torch.cat([a, (b + t) * s], 1), s.log().flatten(1).sum(1)

    def reverse(self, y: Tensor) -> Tensor:
        a, b = y.chunk(2, 1)
        if not self.affine:
            return torch.cat([a, b - self.net(a)], 1)
        u, t = self.net(a).chunk(2, 1)
        return torch.cat([a, b / torch.sigmoid(u + self.shift) - t], 1)


class Flow(nn.Module):
    def __init__(self, C: int, affine: bool, conv_lu: bool) -> None:
        super().__init__()
        self.actnorm, self.invconv = ActNorm(C), InvConv2dLU(C) if conv_lu else InvConv2d(C)
        self.coupling = AffineCoupling(C, affine)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, logdet = self.actnorm(x)
        x, more = self.invconv(x)
        x, last = self.coupling(x)
        return x, logdet + more if last is None else logdet + more + last

    def reverse(self, y: Tensor) -> Tensor:
        return self.actnorm.reverse(self.invconv.reverse(self.coupling.reverse(y)))


class Block(nn.Module):
    def __init__(self, C: int, steps: int, split: bool, affine: bool, conv_lu: bool) -> None:
        super().__init__()
        self.flows, self.split = nn.ModuleList(Flow(4 * C, affine, conv_lu) for _ in range(steps)), split

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor]:
        x, logdet = squeezed(x), 0.0
        for flow in self.flows:
            x, more = flow(x)
            logdet = logdet + more
        return (*x.chunk(2, 1), logdet) if self.split else (x, x, logdet)  # type: ignore[return-value]

    def reverse(self, x: Tensor, z: Tensor) -> Tensor:
        x = torch.cat([x, z], 1) if self.split else z
        for flow in self.flows[::-1]:
            x = flow.reverse(x)
        return unsqueezed(x)


class Glow(nn.Module):
    def __init__(self, C: int, steps: int, levels: int, affine: bool = True, conv_lu: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(C * 2**i, steps, i < levels - 1, affine, conv_lu) for i in range(levels)
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        log_p, logdet, outputs = x.new_zeros(len(x)), x.new_zeros(len(x)), []
        for block in self.blocks:
            *parts, more = block(x)
            x, z = parts if block.split else (x, parts[0])
            log_p = log_p - 0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)
            logdet, outputs = logdet + more, [*outputs, z]
        return log_p, logdet, outputs

    def reverse(self, outputs: list[Tensor]) -> Tensor:
        x = outputs[-1]
        for block, z in zip(self.blocks[::-1], outputs[::-1], strict=True):
            x = block.reverse(x, z)
        return x

    def log_prob(self, x: Tensor) -> Tensor:
        log_p, logdet, _ = self(x)
        return log_p + logdet


# -- steps in a list of layers ------------------------------------------------------------------------------------------------


class ActNorm2d(nn.Module):
    """Starts in training mode alone. No state_dict says that it has started."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.bias, self.logs = nn.Parameter(torch.zeros(1, C, 1, 1)), nn.Parameter(torch.zeros(1, C, 1, 1))
        self.inited = False

    def forward(self, x: Tensor, logdet: Tensor | None = None, reverse: bool = False) -> tuple[Tensor, Tensor | None]:
        if not self.inited and self.training:
            with torch.no_grad():
                self.bias.copy_(-x.mean((0, 2, 3), keepdim=True))
                self.logs.copy_(-x.std((0, 2, 3), keepdim=True).log())
            self.inited = True
        x = x * torch.exp(-self.logs) - self.bias if reverse else (x + self.bias) * self.logs.exp()
        own = pixels(x) * self.logs.sum()
        return x, None if logdet is None else logdet - own if reverse else logdet + own


class NormedConv(nn.Conv2d):
    """The networks' layers have ActNorms, too."""

    def __init__(self, C: int, outputs: int) -> None:
        super().__init__(C, outputs, 3, padding=1, bias=False)
        self.actnorm = ActNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.actnorm(super().forward(x))[0]


class InvertibleConv1x1(nn.Module):
    """Its inverse matrix ends in float32, and with LU two of its tensors are no buffers: no `.double()` moves them."""

    def __init__(self, C: int, LU: bool) -> None:
        super().__init__()
        self.LU, W = LU, torch.linalg.qr(torch.randn(C, C))[0].contiguous()
        if LU:
            P, L, U = torch.linalg.lu(W)
            self.register_buffer("p", P)
            self.register_buffer("sign_s", U.diagonal().sign())
            self.l, self.u = nn.Parameter(L.contiguous()), nn.Parameter(U.triu(1).contiguous())
            self.log_s = nn.Parameter(U.diagonal().abs().log())
            self.eye, self.l_mask = torch.eye(C), torch.ones(C, C).tril(-1)
        else:
            self.weight = nn.Parameter(W)

    def get_weight(self, x: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        if self.LU:
            W = (
                self.p
                @ (self.l * self.l_mask + self.eye)
                @ (self.u * self.l_mask.T + (self.sign_s * self.log_s.exp()).diag())
            )
            logdet = self.log_s.sum()
        else:
            W, logdet = self.weight, torch.linalg.slogdet(self.weight)[1]
        return (W.double().inverse().float() if reverse else W)[:, :, None, None], pixels(x) * logdet

    def forward(self, x: Tensor, logdet: Tensor | None = None, reverse: bool = False) -> tuple[Tensor, Tensor | None]:
        weight, own = self.get_weight(x, reverse)
        return F.conv2d(x, weight), None if logdet is None else logdet - own if reverse else logdet + own


class Permute2d(nn.Module):
    def __init__(self, C: int, shuffle: bool) -> None:
        super().__init__()
        self.indices = torch.randperm(C).numpy() if shuffle else torch.arange(C).flip(0).numpy()

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        return x[:, torch.as_tensor(self.indices).argsort() if reverse else self.indices]


class FlowStep(nn.Module):
    """chaiyujin's, with the name of its permutation; or, if `bound`, y0ast's, with a function, and with `block` for `f`."""

    FlowPermutation: ClassVar[dict[str, Callable[..., Any]]] = {
        "reverse": lambda step, z, logdet, rev: (step.reverse(z, rev), logdet),
        "shuffle": lambda step, z, logdet, rev: (step.shuffle(z, rev), logdet),
        "invconv": lambda step, z, logdet, rev: step.invconv(z, logdet, rev),
    }

    def __init__(self, C: int, flow_permutation: str, flow_coupling: str, LU: bool, bound: bool) -> None:
        super().__init__()
        self.flow_coupling, self.actnorm = flow_coupling, ActNorm2d(C)
        convolves = flow_permutation == "invconv"
        module = InvertibleConv1x1(C, LU) if convolves else Permute2d(C, flow_permutation == "shuffle")
        setattr(self, flow_permutation, module)
        self.flow_permutation: Any = flow_permutation
        if bound:
            self.bind(flow_permutation)
        outputs = C if flow_coupling == "affine" else C // 2
        net = nn.Sequential(NormedConv(C // 2, 6), nn.ReLU(), nn.Conv2d(6, outputs, 3, padding=1))
        setattr(self, "block" if bound else "f", net)

    def bind(self, name: str) -> None:
        """As published: a function that holds this step, also in copies of it."""
        self.flow_permutation = lambda z, logdet, rev: self.FlowPermutation[name](self, z, logdet, rev)

    def permuted(self, x: Tensor, logdet: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor | None]:
        if callable(self.flow_permutation):
            return self.flow_permutation(x, logdet, reverse)
        return FlowStep.FlowPermutation[self.flow_permutation](self, x, logdet, reverse)

    def forward(self, x: Tensor, logdet: Tensor | None = None, reverse: bool = False) -> tuple[Tensor, Tensor | None]:
        if not reverse:
            x, logdet = self.permuted(*self.actnorm(x, logdet), False)
        a, b = x.chunk(2, 1)
        h, sign = (self.f if hasattr(self, "f") else self.block)(a), -1 if reverse else 1
        if self.flow_coupling == "affine":
            t, s = h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2)
            b = b / s - t if reverse else (b + t) * s
            logdet = None if logdet is None else logdet + sign * s.log().flatten(1).sum(1)
        else:
            b = b + sign * h
        x = torch.cat([a, b], 1)
        return self.actnorm(*self.permuted(x, logdet, True), True) if reverse else (x, logdet)


class Split2d(nn.Module):
    """Scores half of the channels; on the way back it draws them."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C // 2, C, 3, padding=1)

    def forward(
        self, x: Tensor, logdet: Tensor | float = 0.0, reverse: bool = False, eps_std: float | None = None
    ) -> tuple[Tensor, Tensor | float]:
        a, *b = (x,) if reverse else x.chunk(2, 1)
        h = self.conv(a)
        mean, logs = h[:, 0::2], h[:, 1::2]
        if reverse:
            return torch.cat([a, mean + logs.exp() * torch.randn_like(mean) * (eps_std or 1)], 1), logdet
        z = (b[0] - mean) * torch.exp(-logs)
        return a, logdet - (logs + 0.5 * z.square() + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


class SqueezeLayer(nn.Module):
    def forward(self, x: Tensor, logdet: Tensor | None = None, reverse: bool = False) -> tuple[Tensor, Tensor | None]:
        return unsqueezed(x) if reverse else squeezed(x), logdet


class FlowNet(nn.Module):
    def __init__(
        self, C: int, steps: int, levels: int, permutation: str, coupling: str, LU: bool = False, bound: bool = False
    ) -> None:
        super().__init__()
        self.layers, self.output_shapes = nn.ModuleList(), []
        for level in range(levels):
            C *= 4
            self.layers.append(SqueezeLayer())
            self.layers.extend(FlowStep(C, permutation, coupling, LU, bound) for _ in range(steps))
            if level < levels - 1:
                self.layers.append(Split2d(C))
                C //= 2
        self.output_shapes = [[-1, 0, 0, 0] for _ in self.layers]

    def forward(
        self, x: Tensor, logdet: Tensor | float = 0.0, reverse: bool = False, eps_std: float | None = None
    ) -> tuple[Tensor, Tensor] | Tensor:
        if reverse:
            for layer in reversed(self.layers):
                options = {"eps_std": eps_std} if isinstance(layer, Split2d) else {}
                x, logdet = layer(x, logdet=0, reverse=True, **options)
            return x
        for layer, _ in zip(self.layers, self.output_shapes, strict=False):
            x, logdet = layer(x, logdet, reverse=False)
        return x, logdet

    def log_prob(self, x: Tensor) -> Tensor:
        z, logdet = self(x)
        return logdet - 0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)


MAKE = {
    "blocks": lambda: Glow(1, 2, 2),
    "blocks, free matrices": lambda: Glow(1, 2, 2, conv_lu=False),
    "blocks, additive": lambda: Glow(1, 2, 1, affine=False),
    "steps": lambda: FlowNet(1, 2, 2, "invconv", "affine"),
    "steps, LU": lambda: FlowNet(1, 1, 2, "invconv", "additive", LU=True),
    "steps, shuffled": lambda: FlowNet(1, 2, 1, "shuffle", "additive"),
    "steps, reversed": lambda: FlowNet(1, 1, 2, "reverse", "affine"),
    "bound steps": lambda: FlowNet(1, 2, 1, "invconv", "affine", bound=True),
    "bound steps, shuffled": lambda: FlowNet(1, 2, 1, "shuffle", "additive", bound=True),
}


def rebuilt(flow: nn.Module, x: Tensor) -> Tensor:
    """The images again; where splits draw what they have dropped, these of a seed."""
    torch.manual_seed(0)
    return flow.reverse(flow(x)[2]) if isinstance(flow, Glow) else flow(flow(x)[0], reverse=True)


def copied(flow: nn.Module) -> nn.Module:
    flow = copy.deepcopy(flow)
    for step in flow.modules():
        if isinstance(step, FlowStep) and callable(step.flow_permutation):
            step.bind(next(name for name in ("invconv", "shuffle", "reverse") if hasattr(step, name)))
    return flow


def curve(flow: nn.Module, x: Tensor, kind: type[torch.optim.Optimizer], lr: float) -> list[float]:
    flow, losses = copied(flow), []
    optimizer = kind([p for p in flow.parameters() if p.requires_grad], lr=lr)
    for _ in range(4):
        optimizer.zero_grad()
        loss = -flow.log_prob(x).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", MAKE)
def test_steps_are_replaced_and_train_as_before(name, tools):
    flow, x = MAKE[name](), torch.randn(8, 1, 8, 8)
    flow.log_prob(1 + 2 * x)  # ActNorms start
    flow = tools.shake(flow, 0.05)
    # In place of scales and of LU's factors, other parameters are trained.
    frozen = ("actnorm.loc", "actnorm.scale", "invconv.w_", "invconv.l", "invconv.u")
    for part, parameter in flow.named_parameters():
        parameter.requires_grad_(not any(word in part for word in frozen))
    original = copied(flow)
    report = accelerate(flow)
    assert sum(r.couplings for r in report.replaced) == sum(isinstance(m, Flow | FlowStep) for m in original.modules())
    assert not any(isinstance(m, Flow | FlowStep) for m in flow.modules()) and "other parameters" not in str(report)
    image = rebuilt(original, x) if any(isinstance(m, Split2d) for m in flow.modules()) else x
    torch.testing.assert_close(rebuilt(flow, x), image, rtol=1e-3, atol=1e-3)
    flow, original, x = flow.double(), original.double(), x.double()
    # The matrices of fused steps are those of the float32 flow, inverted or assembled in that precision.
    torch.testing.assert_close(flow.log_prob(x), original.log_prob(x), rtol=1e-6, atol=1e-4)
    for kind, lr in ((torch.optim.SGD, 1e-4), (torch.optim.Adam, 1e-3)):
        ours, theirs = (curve(f, x, kind, lr) for f in (flow, original))
        assert ours[-1] < ours[0] and ours == pytest.approx(theirs, rel=1e-6)


def test_what_does_not_fit_is_refused_with_a_reason(tools):
    fresh = Glow(1, 1, 1)
    assert "an ActNorm has not been initialised" in str(accelerate(fresh))
    flow, x = Glow(1, 1, 1), torch.randn(8, 1, 8, 8)
    flow.log_prob(x)
    with pytest.raises(ConversionError, match=r"no flow of .*accelerate"):
        convert(flow)
    assert "trains other parameters for Flow" in str(accelerate(flow))
    assert "fused steps have none" in str(accelerate(flow))
    other = Glow(1, 2, 1)
    other.blocks[0].flows[1].coupling.shift = 1.0  # another formula
    other.log_prob(x)
    report = accelerate(tools.shake(other, 0.05))
    assert not report and "differs" in str(report)


def test_steps_of_a_checkpoint_are_not_to_be_started_again(tools):
    """No state_dict has `inited`: a batch in training mode would overwrite the trained values."""
    trained, loaded = (FlowNet(1, 2, 1, "invconv", "affine") for _ in range(2))
    assert "an ActNorm has not been initialised: send a batch" in str(accelerate(loaded))  # it is new
    x = torch.randn(8, 1, 8, 8)
    trained.log_prob(1 + 2 * x)
    loaded.load_state_dict(tools.shake(trained, 0.05).state_dict())
    report = str(accelerate(loaded))
    assert (
        "`inited` is False, as after loading a checkpoint: call set_actnorm_init()" in report and "send" not in report
    )
    for module in loaded.modules():  # what set_actnorm_init() does
        if isinstance(module, ActNorm2d):
            module.inited = True
    wanted = trained.log_prob(x)
    assert accelerate(loaded).replaced[0].couplings == 2
    torch.testing.assert_close(loaded.log_prob(x), wanted, rtol=1e-4, atol=1e-3)
