"""Flows of public projects: what is replaced computes and trains as before, and what is left has the expected reason."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bench.projects import PROJECTS, SMALL, Project
from glf_fast import accelerate
from glf_fast.integrations import fast_splines

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.(lu|qr) is deprecated:UserWarning",  # called by the libraries
    "ignore::DeprecationWarning:FrEIA",
)


def _rows(project: Project) -> int:
    return 48 if len(project.shape) == 1 else 4


def _agree(project: Project, original: nn.Module, fast: nn.Module) -> None:
    """log p, its gradient with respect to the data, and samples of the same noise, to float32 rounding."""
    x, context = project.inputs(_rows(project))
    # nflows' batch norm has no inverse in training mode.
    invertible = not any(type(m).__name__ == "BatchNorm" and m.training for m in original.modules())
    pairs = []
    for flow in (original, fast):
        torch.manual_seed(1)  # of dropout
        data = x.clone().requires_grad_()
        log_p = project.log_prob(flow, data, context)
        (gradient,) = torch.autograd.grad(log_p.sum(), data)
        torch.manual_seed(2)
        with torch.no_grad():
            samples = [project.sample(flow, len(x), context)] if invertible else []
        pairs.append((log_p.detach(), gradient, *samples))
    for wanted, got in zip(*pairs, strict=True):
        scale = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=3e-5 * scale)


def _losses(project: Project, flow: nn.Module) -> Tensor:
    """Ten steps of Adam, of images four; in eval mode where the fused flow drops other units."""
    if project.dropout:
        flow.eval()
    optimizer = torch.optim.Adam([p for p in flow.parameters() if p.requires_grad], 1e-3)
    torch.manual_seed(3)
    batches = [project.inputs(_rows(project)) for _ in range(10 if len(project.shape) == 1 else 4)]
    found = []
    for x, context in batches:
        loss = project.loss_of(flow, x, context)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def _same_losses(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * max(1.0, wanted.abs().max().item()))


@pytest.mark.parametrize("name", PROJECTS)
def test_a_project_goes_on_as_before(name: str) -> None:
    project = PROJECTS[name]
    original = project.made(SMALL)
    fast = copy.deepcopy(original)
    report = accelerate(fast)
    if project.left:
        assert not report and project.left in str(report), report
        return
    assert report and sum(r.couplings for r in report.replaced) >= 2, report
    changed = {kind for r in report.replaced for kind in r.reparametrised.split(", ") if kind}
    assert changed <= project.other
    _agree(project, original.eval(), fast.eval())
    if not project.training:  # batch norm and dropout that were fused in eval mode stay as they are there
        assert any(r.lost for r in report.replaced)
        return
    assert not any(r.lost for r in report.replaced)
    if project.dropout:
        x, context = project.inputs(_rows(project))
        assert not torch.equal(*(project.log_prob(fast.train(), x, context) for _ in range(2)))
    else:
        _agree(project, original.train(), fast.train())
    wanted, got = _losses(project, original), _losses(project, fast)
    assert wanted.isfinite().all()
    same = slice(1) if changed else slice(None)  # another step was made only where the report says so
    _same_losses(got[same], wanted[same])
    if changed:  # with those parameters frozen all steps are the same
        original = project.made(SMALL)
        for module in original.modules():
            if type(module).__name__ in changed:
                for p in module.parameters(recurse=False):
                    p.requires_grad_(False)
        fast = copy.deepcopy(original)
        report = accelerate(fast)
        assert report and not any(r.reparametrised for r in report.replaced), report
        _same_losses(_losses(project, fast), _losses(project, original))


def test_splines_that_accelerate_leaves_are_replaced_by_function() -> None:
    project = PROJECTS["normflows examples, conditional flow"]
    original = project.made(SMALL)
    fast = copy.deepcopy(original)
    x, context = project.inputs(48)
    wanted = project.log_prob(original, x, context), _losses(project, original)
    with fast_splines() as replaced:
        assert "normflows" in str(replaced)
        got = project.log_prob(fast, x, context), _losses(project, fast)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_most_projects_are_replaced_and_the_others_have_a_reason() -> None:
    assert len(PROJECTS) == 71
    assert all(bool(project.left) == bool(project.why) for project in PROJECTS.values())
    assert sum(bool(project.why and not project.how) for project in PROJECTS.values()) <= 12
