"""accelerate: what it compares besides the density, what it leaves alone, and what it says."""

from __future__ import annotations

import normflows as nf
import pytest
import torch
from torch import nn

from glf_fast.conversion.accelerate import accelerate


def flow(kind: type = nf.NormalizingFlow, n: int = 2) -> nf.NormalizingFlow:
    torch.manual_seed(0)
    blocks = [nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4])) for _ in range(n)]
    return kind(nf.distributions.DiagGaussian(4), blocks)


def test_the_sampling_direction_is_compared() -> None:
    made = flow()
    made.flows[0].forward = lambda z, context=None: (3 * z, z.new_zeros(len(z)))
    report = accelerate(made)
    assert not report and "the inverse differs" in str(report)
    (left,) = report.left
    assert left.where == "the model" and left.reason.startswith("flows.1 … flows.0: ")


class Annealed(nf.NormalizingFlow):
    """Its log_prob walks the layers: with others in their place it would be another one, and nobody would notice."""

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        log_q = x.new_zeros(len(x))
        for layer, factor in zip(reversed(self.flows), (1.0, 0.5), strict=False):
            x, logdet = layer.inverse(x)
            log_q = log_q + factor * logdet
        return log_q + self.q0.log_prob(x)


def test_a_property_that_raises_is_a_reason() -> None:
    class Flow(nn.Module):  # the name of nflows' class
        @property
        def _transform(self) -> nn.Module:
            raise RuntimeError("made at the first call")

    report = accelerate(nn.ModuleList([Flow(), flow()]))
    assert report.replaced and "RuntimeError made at the first call" in str(report)


def test_flows_with_methods_of_their_own_stay() -> None:
    made = flow(Annealed)
    x = torch.randn(5, 4)
    before = made.log_prob(x)
    report = accelerate(nn.ModuleDict({"prior": made}))
    assert not report and "Annealed has its own log_prob, which may read the layers" in str(report)
    assert torch.equal(made.log_prob(x), before)

    class Named(nf.NormalizingFlow):
        """Adds, but replaces nothing."""

        def describe(self) -> str:
            return "mine"

    assert accelerate(flow(Named))


@pytest.mark.parametrize("what", ["posterior", "list"])
def test_what_is_no_module_is_refused(what: str) -> None:
    class Posterior:
        posterior_estimator = flow()

    given = Posterior() if what == "posterior" else [flow()]
    message = "got Posterior: give its posterior_estimator" if what == "posterior" else "got list$"
    with pytest.raises(TypeError, match=message):
        accelerate(given)


def test_a_line_where_it_takes_long(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert accelerate(flow())
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("glf_fast.conversion.accelerate._LONG", 0.0)
    assert accelerate(flow())
    assert "glf_fast: comparing the layers of the model (NormalizingFlow)" in capsys.readouterr().err
