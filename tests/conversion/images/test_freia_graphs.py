"""FrEIA's graphs that branch: U-shaped flows of several scales, whose stages are fused one by one."""

import copy

import FrEIA.framework as ff
import FrEIA.modules as fm
import pytest
import torch
from library_flows import shake
from torch import nn

from glf_fast import AffineCoupling, accelerate, convert
from glf_fast.conversion import ConversionError

SHAPES = [(4, 8, 12), (6, 4, 6), (8, 2, 3)]  # of the three inputs, fine to coarse


def conv_net(size):
    def net(n_in, n_out):
        return nn.Sequential(
            nn.Conv2d(n_in, n_in, size, padding="same"), nn.ReLU(), nn.Conv2d(n_in, n_out, size, padding="same")
        )

    return net


def stage(node, steps=3, conditions=None):
    nodes = []
    for step in range(steps):
        options = {"subnet_constructor": conv_net((3, 1)[step % 2]), "affine_clamping": 2.0}
        nodes.append(ff.Node(nodes[-1] if nodes else node, fm.AllInOneBlock, options, conditions=conditions))
    return nodes


def u_shaped(condition=None):
    """Half of what leaves a coarse stage is noise, the other half joins the input of the next finer one."""
    inputs = [ff.InputNode(*shape) for shape in SHAPES]
    node, nodes, outputs = inputs[-1], [], []
    for finer in reversed(inputs[:-1]):
        steps = stage(node)
        split = ff.Node(steps[-1], fm.Split, {"section_sizes": (4, steps[-1].output_dims[0][0] - 4), "dim": 0})
        up = ff.Node(split.out0, fm.IRevNetUpsampling, {})
        node = ff.Node([finer.out0, up.out0], fm.Concat, {"dim": 0})
        outputs.insert(0, ff.OutputNode(split.out1))
        nodes += [*steps, split, up, node]
    conditions = [] if condition is None else [condition]
    steps = stage(node, conditions=condition)
    graph = ff.GraphINN([*inputs, *conditions, *nodes, *steps, ff.OutputNode(steps[-1]), *outputs])
    return shake(graph, 0.1)


def loss(graph, x, **options):
    z, logdet = graph(x, **options)
    return sum(0.5 * part.square().sum() for part in z) - logdet.sum()


@pytest.fixture
def images():
    return [torch.randn(3, *shape, requires_grad=True) for shape in SHAPES]


def test_stages_are_fused_one_by_one(images):
    graph = u_shaped()
    fused = copy.deepcopy(graph)
    report = accelerate(fused)
    assert [r.couplings for r in report.replaced] == [3, 3, 3]
    assert sorted(x.reason.split("(")[1].split(")")[0] for x in report.left) == sorted(
        2 * ["Split", "IRevNetUpsampling", "Concat"]
    )
    assert sum(isinstance(module, AffineCoupling) for module in fused.modules()) == 9
    for mode in (True, False):
        graph.train(mode)
        fused.train(mode)
        (z, logdet), (got, got_logdet) = graph(images), fused(images)
        torch.testing.assert_close(got, z, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got_logdet, logdet, rtol=1e-4, atol=1e-3)
        back, back_logdet = fused(z, rev=True)
        torch.testing.assert_close(list(back), images, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(back_logdet, -logdet, rtol=1e-4, atol=1e-3)
    wanted, gradients = (torch.autograd.grad(loss(g, images), images) for g in (graph, fused))
    torch.testing.assert_close(gradients, wanted, rtol=1e-3, atol=1e-3)
    assert not accelerate(fused), "a second time there is nothing to do"


def test_weights_are_saved_and_copied(images):
    graph = u_shaped()
    other = copy.deepcopy(graph)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1) if p.requires_grad else None
    accelerate(graph)
    accelerate(other)
    other.load_state_dict(graph.state_dict())
    for same in (other, copy.deepcopy(graph)):
        torch.testing.assert_close(same(images), graph(images))


def test_same_training(images):
    """Its global affine layers are frozen: other parameters are trained for those, as the report says."""
    graph = u_shaped()
    for name, p in graph.named_parameters():
        p.requires_grad_(p.requires_grad and "global" not in name)
    fused = copy.deepcopy(graph)
    report = accelerate(fused)
    assert report and "trains other parameters" not in str(report)
    losses = []
    for g in (graph, fused):
        torch.manual_seed(0)
        optimizer = torch.optim.Adam((p for p in g.parameters() if p.requires_grad), 1e-3)
        found = []
        for _ in range(8):
            optimizer.zero_grad()
            value = loss(g, [torch.randn(4, *shape) for shape in SHAPES])
            value.backward()
            optimizer.step()
            found.append(value.detach())
        losses.append(torch.stack(found))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-3)


def test_conditions_of_one_stage(images):
    condition = ff.ConditionNode(2, *SHAPES[0][1:])
    graph = u_shaped(condition)
    fused, c = copy.deepcopy(graph), [torch.randn(3, 2, *SHAPES[0][1:])]
    assert len(accelerate(fused).replaced) == 3
    torch.testing.assert_close(fused(images, c=c), graph(images, c=c), rtol=1e-4, atol=1e-3)


def test_convert_refuses():
    with pytest.raises(ConversionError, match="a GraphINN with 3 inputs and 3 outputs"):
        convert(u_shaped())
